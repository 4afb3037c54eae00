"""NVIDIA FasterTransformer's folders of a GPT with MoE layers, byte for byte as its converter writes them.

========================================  ==========================================================================
file in ``{N}-gpu``                       what it is
========================================  ==========================================================================
``model.NAME.bin``, ``model.NAME.R.bin``  numbers in C order without a header; those of rank R of N
``config.ini``                            sizes, dtype, N, which layers have experts
``args.txt``                              what the training was called with
``vocab.json``, ``merges.txt``            the tokenizer's, where given
========================================  ==========================================================================

Where NVIDIA's converter is wrong (a gate replaced by another under pipeline parallelism, heads cut in two, a folder
without ``config.ini``) this one is right, or refuses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dmoe.checkpoint.formats.base import Options, copy_files, files_beside
from dmoe.checkpoint.formats.ft_config import ARGS, CONFIG, DTYPES, END_ID, FTConfig, args_text, check_gpus, end_of_text
from dmoe.checkpoint.formats.ft_read import FOLDER, file_names, find_folder, read_folder
from dmoe.checkpoint.formats.gpt_model import sizes_of
from dmoe.checkpoint.formats.gpt_names import Part, Sizes, all_parts, ft_pieces
from dmoe.checkpoint.formats.megatron_args import default_args, tanh_gelu_warnings
from dmoe.checkpoint.model import Model
from dmoe.checkpoint.new_folder import new_folder
from dmoe.checkpoint.stored import Stored

_AT_A_TIME = 4 << 20  # bytes of a tensor whose files have its rows, or experts, one after the other


class FasterTransformer:
    """See the module; :class:`dmoe.checkpoint.formats.base.Format` says what the methods do."""

    name = "fastertransformer"
    about = "NVIDIA FasterTransformer's GPT: a folder N-gpu of raw numbers for N inference ranks"

    def fits(self, sources: Sequence[Path]) -> bool:
        """Whether this is a folder with a ``config.ini`` and raw tensors, or one with ``N-gpu`` in it."""
        if len(sources) != 1 or not sources[0].is_dir():
            return False
        try:
            folder = find_folder(sources[0])
            named = folder != sources[0] or FOLDER.fullmatch(folder.resolve().name) is not None
            return any(folder.glob("model.*.bin")) and (named or (folder / CONFIG).is_file())
        except ValueError:  # several
            return True
        except OSError:
            return False

    def read(self, sources: Sequence[Path], options: Options) -> Model:
        """The model in a folder ``N-gpu``, or in the only one inside the given folder.

        Args:
            sources: one folder.
            options: none concern this layout.

        Raises:
            OSError: a file is missing.
            ValueError: files that ``config.ini`` does not describe, or several folders to choose from.
        """
        if len(sources) != 1:
            raise ValueError(f"{self.name}: expected one folder, got {len(sources)} paths")
        return read_folder(sources[0], self.name)

    def write(self, model: Model, target: Path, options: Options) -> list[Path]:
        """Write ``{target}/{N}-gpu``; what FasterTransformer would compute otherwise is told in ``model.notes``.

        Args:
            model: a GPT: LayerNorm, learned positions, tied head, biases, GELU, plain top-K experts with biases,
                equally many in each MoE layer.
            target: the folder around it; it is made where it is missing.
            options: ``gpus`` N, a divisor of heads and F (None: that of the folder that was read, or 1); ``dtype``,
                float16 or float32 (None: float16 where the embedding has it, else float32); ``vocab``, ``merges``,
                ``overwrite``, ``progress``.

        Raises:
            OSError: it cannot be written, or is there already.
            ValueError: another architecture, or N or a dtype that the layout does not have.
        """
        sizes = sizes_of(model, self.name)
        config = _config(model, sizes, options)
        args = model.origin.get("args")
        if not args:
            args = default_args(sizes, config.norm_eps, _top_k(model))
        model.notes += _warnings(model, options)
        made = not target.exists()
        if made:
            target.mkdir()
        try:
            folder = target / f"{config.gpus}-gpu"
            with new_folder(folder, overwrite=options.overwrite, marker=CONFIG) as part:
                for ours, theirs, each in all_parts(sizes):
                    paths = [part / name for name in file_names(theirs, each, config.gpus)]
                    if _write(model.tensors[ours], each, paths, config, options):
                        model.notes.append(f"{theirs}: {ours}: numbers beyond float16's range became infinite")
                (part / CONFIG).write_bytes(config.text.encode())
                (part / ARGS).write_bytes(args_text(args).encode())
                copy_files(model, options, part)
        except BaseException:
            if made:
                with contextlib.suppress(OSError):  # of another process's, too, it is not ours
                    target.rmdir()
            raise
        return [folder]


def _config(model: Model, sizes: Sizes, options: Options) -> FTConfig:
    name = FasterTransformer.name
    if sizes.residual:
        raise ValueError(
            f"{name}: blocks.{min(sizes.residual)}.ffn.coefficient: expected experts alone, got PR-MoE's dense block "
            "beside them, which the layout does not have"
        )
    if len(set(sizes.experts.values())) > 1:
        told = ", ".join(f"{count} in layer {layer}" for layer, count in sizes.experts.items())
        raise ValueError(f"{name}: expected equally many experts in all MoE layers, got {told}")
    gpus = model.origin.get("gpus", 1) if options.gpus is None else options.gpus
    check_gpus(sizes, gpus, f"{name}: gpus")
    dtype = options.dtype
    if dtype is None:
        half = model.tensors["embedding.weight"].dtype == torch.float16
        dtype = torch.float16 if half else torch.float32
    if dtype not in DTYPES.values():
        raise ValueError(f"{name}: dtype: expected {' or '.join(DTYPES)}, got {dtype}")
    assert model.gpt is not None
    vocab = files_beside(model, options).get("vocab")
    end = None if vocab is None else end_of_text(vocab)
    ids = [int(model.origin.get(key, END_ID)) for key in ("start_id", "end_id")]
    if options.vocab is not None or (vocab is not None and "end_id" not in model.origin):
        ids = [END_ID if end is None else end] * 2
    return FTConfig(sizes, model.gpt["norm_eps"], ids[0], ids[1], dtype, gpus)


def _warnings(model: Model, options: Options) -> list[str]:
    found = []
    if (top_k := _top_k(model)) > 1:
        found.append(f"top_k = {top_k}: FasterTransformer's example runs one expert for each token")
    told = tanh_gelu_warnings(model.origin.get("args", []))
    if not told and model.gpt is not None and model.gpt["activation"] != "gelu_tanh":
        told = [f"activation = {model.gpt['activation']}"]
    found += [f"{each}; FasterTransformer runs tanh gelu" for each in told]
    vocab = files_beside(model, options).get("vocab")
    if vocab is not None and end_of_text(vocab) is None:
        found.append(f"{vocab}: no <|endoftext|>: start_id and end_id are {END_ID}")
    return found


def _top_k(model: Model) -> int:
    return max((config.top_k for config in model.layers.values() if config is not None), default=1)


def _write(stored: Stored, part: Part, paths: Sequence[Path], config: FTConfig, options: Options) -> bool:
    """Write a tensor's files; returns whether finite numbers became infinite."""
    overflow = False
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for tensor in _slices(stored, part):
            for file, piece in zip(files, ft_pieces(part, tensor, config.gpus), strict=True):
                wide = piece.float() if piece.dtype == torch.bfloat16 else piece
                numbers = wide.to(config.dtype).contiguous()
                overflow |= bool((numbers.isinf() & wide.isfinite()).any())
                file.write(memoryview(numbers.numpy()).cast("B"))  # type: ignore[arg-type]
                options.progress(numbers.nbytes)
    return overflow


def _slices(stored: Stored, part: Part) -> Iterator[Tensor]:
    """A tensor, an expert or some rows at a time where its files have them one after the other."""
    rows = stored.shape[0]
    step = max(1, _AT_A_TIME * rows // max(1, stored.nbytes)) if part.by_rows else rows
    for start in range(0, rows, step):
        yield stored.rows(start, min(rows, start + step))


FASTERTRANSFORMER = FasterTransformer()
