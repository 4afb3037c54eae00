"""The layouts that there are, and which of them a source is in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dmoe.checkpoint.formats.base import Format
from dmoe.checkpoint.formats.deepspeed import DEEPSPEED
from dmoe.checkpoint.formats.dmoe_files import DMOE
from dmoe.checkpoint.formats.fairseq import FAIRSEQ
from dmoe.checkpoint.formats.fastertransformer import FASTERTRANSFORMER
from dmoe.checkpoint.formats.hf import HF
from dmoe.checkpoint.formats.megablocks import MEGABLOCKS
from dmoe.checkpoint.formats.megatron import FORMATS as MEGATRON
from dmoe.checkpoint.formats.megatron_deepspeed import MEGATRON_DEEPSPEED
from dmoe.checkpoint.formats.tutel import SWIN_MOE, TUTEL
from dmoe.checkpoint.formats.vmoe import VMOE

_ALL: tuple[Format, ...] = (
    DMOE,
    DEEPSPEED,
    MEGATRON_DEEPSPEED,
    FASTERTRANSFORMER,
    TUTEL,
    SWIN_MOE,
    MEGABLOCKS,
    *MEGATRON,
    FAIRSEQ,
    HF,
    VMOE,
)
FORMATS: dict[str, Format] = {each.name: each for each in _ALL}


def find_format(sources: Sequence[Path], name: str | None = None) -> Format:
    """The layout of files.

    Args:
        sources: a folder or file, or the files of all ranks.
        name: what the user says it is; None looks.

    Raises:
        FileNotFoundError: there is no such file, one of several.
        ValueError: a name that no layout has, files in none (or no files), or in several that all fit.
    """
    for source in sources:
        if "{rank" not in str(source) and not source.exists() and len(sources) > 1:
            raise FileNotFoundError(f"{source}: expected a file or folder, got nothing of that name")
    found = fitting(sources, name)
    if len(found) == 1:
        return found[0]
    shown = ", ".join(map(str, sources[:3])) + (", ..." if len(sources) > 3 else "")
    if not found:
        why = _why_none(sources)
        raise ValueError(f"{shown}: expected a checkpoint in one of the layouts {', '.join(FORMATS)}, got {why}")
    raise ValueError(
        f"{shown}: more than one layout fits: {' and '.join(each.name for each in found)}; say which: --from"
    )


def fitting(sources: Sequence[Path], name: str | None = None) -> list[Format]:
    """The layouts that files look like; or the one that the user says they are in.

    Raises:
        ValueError: a name that no layout has.
    """
    if name is None:
        return [each for each in FORMATS.values() if each.fits(sources)]
    if name not in FORMATS:
        raise ValueError(f"--from: expected one of {', '.join(FORMATS)}, got {name}")
    return [FORMATS[name]]


def _why_none(sources: Sequence[Path]) -> str:
    """What is wrong with files that are in no layout, as far as reading one tells."""
    from dmoe.checkpoint.formats.rank_contents import Content, expanded

    for source in sources:
        if "{rank" not in str(source) and not source.exists():
            return "nothing of that name"
        for file in expanded(source):
            try:
                Content.of(file)
            except ValueError as error:
                return str(error)
    return "no MoE layers by names that are known"
