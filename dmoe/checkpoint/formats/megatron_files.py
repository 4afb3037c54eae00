"""Where a Megatron-DeepSpeed checkpoint's files are: those of the ranks, and a file for each expert."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dmoe.checkpoint.new_folder import is_name

LATEST = "latest"  # a file that holds the name of the folder beside it
# Paths of the dense states, the first that exists counts; and whether Megatron wrote them, not DeepSpeed.
PATTERNS = {
    "mp_rank_{tp:02}/model_states.pt": False,
    "mp_rank_{tp:02}_{pp:03}/model_states.pt": False,
    "tp_rank_{tp:02}_pp_rank_{pp:03}/model_states.pt": False,
    "mp_rank_{tp:02}_model_states.pt": False,
    "mp_rank_{tp:02}_{pp:03}_model_states.pt": False,
    "tp_rank_{tp:02}_pp_rank_{pp:03}_model_states.pt": False,
    "mp_rank_{tp:02}/model_rng.pt": True,
    "mp_rank_{tp:02}_{pp:03}/model_rng.pt": True,
    "tp_rank_{tp:02}_pp_rank_{pp:03}/model_rng.pt": True,
}
EXPERT = "layer_{ordinal}_expert_{expert}_mp_rank_{tp:02}_model_states.pt"
_EXPERT = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")


@dataclass(frozen=True)
class Files:
    """The dense states of all ranks.

    Attributes:
        folder: the files' own, behind ``latest``.
        tag: its name, where ``latest`` names it; else None.
        pattern: one of ``PATTERNS``.
        tp, pp: how many ranks have files.
    """

    folder: Path
    tag: str | None
    pattern: str
    tp: int
    pp: int

    def dense(self, tp: int, pp: int) -> Path:
        """The file of a rank."""
        return self.folder / self.pattern.format(tp=tp, pp=pp)


def find_files(source: Path) -> Files:
    """The files in a folder, or in the one that its ``latest`` names; some ranks' may be missing, see ``require``.

    Raises:
        OSError: no such files.
        ValueError: a ``latest`` that names no folder beside it.
    """
    folder, tag = tagged_folder(source)
    if tag is not None and (found := _ranks(source)):
        folder, tag = source, None
    else:
        found = _ranks(folder)
    for pattern, ranks in found.items():
        tp, pp = (max(numbers) + 1 for numbers in zip(*ranks, strict=True))
        return Files(folder, tag, pattern, tp, pp)
    raise FileNotFoundError(
        f"{folder}: expected files of a Megatron-DeepSpeed checkpoint, as {PATTERNS_SHOWN}, got none of these names"
    )


PATTERNS_SHOWN = ", ".join(pattern.format(tp=0, pp=0) for pattern in list(PATTERNS)[:4])


def require(files: Files, tp: int, pp: int) -> None:
    """Whether the files of so many ranks are there.

    Raises:
        FileNotFoundError: the first that is not.
    """
    for stage in range(pp):
        for rank in range(tp):
            if not files.dense(rank, stage).is_file():
                raise FileNotFoundError(
                    f"{files.dense(rank, stage)}: expected the file of tensor-parallel rank {rank} of {tp}, stage "
                    f"{stage} of {pp}, got no such file"
                )


def find_experts(folder: Path, counts: Sequence[int], tp: int) -> list[list[list[int]]]:
    """Which ranks' files hold which expert.

    Args:
        folder: of the files.
        counts: E of every MoE layer, in order.
        tp: tensor-parallel ranks, of which any may have saved an expert.

    Returns:
        Ranks, by the MoE layer's ordinal and expert; at least one for each.

    Raises:
        FileNotFoundError: an expert that no file is named after.
        ValueError: a file of a layer, an expert or a rank that the model does not have.
    """
    found: list[list[list[int]]] = [[[] for _ in range(count)] for count in counts]
    for path in sorted(folder.iterdir()):
        if (match := _EXPERT.fullmatch(path.name)) is None:
            continue
        ordinal, expert, rank = map(int, match.groups())
        if ordinal >= len(counts) or expert >= counts[ordinal] or rank >= tp:
            raise ValueError(
                f"{path}: expected experts of {len(counts)} MoE layers ({', '.join(map(str, counts))}) on {tp} "
                f"tensor-parallel ranks, as the gates and args have them, got a file of another"
            )
        found[ordinal][expert].append(rank)
    for ordinal, experts in enumerate(found):
        for expert, ranks in enumerate(experts):
            if not ranks:
                name = EXPERT.format(ordinal=ordinal, expert=expert, tp=0)
                raise FileNotFoundError(
                    f"{folder / name}: expected expert {expert} of {len(experts)} of MoE layer {ordinal}, got no file "
                    f"of it for any tensor-parallel rank"
                )
    return found


def tagged_folder(source: Path) -> tuple[Path, str | None]:
    """The folder that ``latest`` names, and that name; the given one and None where there is no such file.

    Raises:
        ValueError: it holds something else than a name.
    """
    latest = source / LATEST
    if not latest.is_file():
        return source, None
    tag = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not is_name(tag):
        raise ValueError(f"{latest}: expected the name of a folder beside it, got {tag!r:.80}")
    return source / tag, tag


def _ranks(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """The patterns that names in a folder have, in order, with their ranks."""
    found: dict[str, list[tuple[int, int]]] = {}
    if not folder.is_dir():
        return found
    names = [path.name for path in folder.iterdir()]
    for pattern in PATTERNS:
        first, _, inside = pattern.partition("/")
        shape = re.sub(r"\\{(tp|pp):0\d\\}", r"(?P<\1>\\d+)", re.escape(first))
        for name in names:
            match = re.fullmatch(shape, name)
            if match is not None and (not inside or (folder / name / inside).is_file()):
                ranks = match.groupdict()
                found.setdefault(pattern, []).append((int(ranks["tp"]), int(ranks.get("pp", 0))))
    return found
