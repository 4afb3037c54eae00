"""Megatron-DeepSpeed's checkpoints of a GPT with MoE layers, as ModelScope publishes them.

A folder, or one that a file ``latest`` in it names, with

===========================================  =======================================================================
file                                         what it is
===========================================  =======================================================================
``mp_rank_00/model_states.pt``               everything but the experts, of tensor-parallel rank 0; see
                                             ``megatron_files.PATTERNS`` for the other names
``layer_0_expert_3_mp_rank_00_model_...pt``  expert 3 of the first MoE layer, on any tensor-parallel rank's file
===========================================  =======================================================================

Nothing in the files is executed: classes of Megatron and DeepSpeed are read as stand-ins.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmoe.checkpoint.formats.base import Options
from dmoe.checkpoint.formats.megatron_files import find_files
from dmoe.checkpoint.formats.megatron_read import read_checkpoint
from dmoe.checkpoint.formats.megatron_state import model_of
from dmoe.checkpoint.formats.megatron_write import write_checkpoint
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.torch_reader import read_lazily


class MegatronDeepSpeed:
    """See the module; :class:`dmoe.checkpoint.formats.base.Format` says what the methods do."""

    name = "deepspeed-gpt"
    about = "a GPT of Megatron-DeepSpeed (ModelScope's GPT-MoE): a folder of rank and expert files"

    def fits(self, sources: Sequence[Path]) -> bool:
        """Whether this is a folder with such files, the first of which holds a Megatron GPT, or cannot be read."""
        if len(sources) != 1 or not sources[0].is_dir():
            return False
        try:
            first = find_files(sources[0]).dense(0, 0)
        except (OSError, ValueError):
            return False
        try:
            return model_of(read_lazily(first)) is not None
        except (OSError, ValueError):
            return True

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """The model in a folder; ``gpt`` is set, and ``origin`` says how it was cut.

        Args:
            sources: one folder.
            options: none concern this layout.

        Raises:
            OSError: no such folder or files, as of a rank or an expert.
            ValueError: damaged files, another ``checkpoint_version`` than 3.0, objects that are refused, ranks that
                hold different numbers of a tensor they share, shapes that ``args`` does not have.
        """
        if len(sources) != 1:
            raise ValueError(f"{self.name}: expected one folder, got {len(sources)} paths")
        return read_checkpoint(sources[0], self.name)

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """Write a folder: as it was where the model came from one, else for one rank.

        Args:
            model: a GPT: LayerNorm, learned positions, tied head, biases, GELU, plain top-K experts with biases.
            target: the folder, which must not be there, or be empty.
            options: ``ranks``, ``dtype``, ``vocab``, ``merges``, ``overwrite``, ``progress``.

        Raises:
            OSError: it cannot be written, or is there already.
            ValueError: another architecture, or ranks that do not divide heads, F and V.
        """
        return write_checkpoint(model, target, options, self.name)


MEGATRON_DEEPSPEED = MegatronDeepSpeed()
