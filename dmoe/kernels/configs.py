"""Tile shapes: which kernel runs with which blocks, warps and pipeline depth, by GPU family and size of a tile's rows.

A small table, not autotuning: the choice costs nothing at run time and is the same in every process. To measure a
better one for a GPU: ``python -m dmoe.tune``, which writes a file that :func:`load` (or the environment
variable ``DMOE_KERNEL_CONFIGS``) reads.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Config:
    """Launch shape of one kernel.

    Attributes:
        block_n: columns of a tile of the result. Its rows are the plan's tiles, or ``block_m`` where there is no plan.
        block_k: how much of the summed dimension one step loads.
        num_warps, num_stages: warps of a program; steps in flight.
        group: row tiles that are walked before the next column of tiles, so that a weight is read again from L2.
        block_m: rows of a weight gradient's tile.
        programs: persistent programs on each multiprocessor.
        parts: pieces (1, 2, 4, 8) that an epilogue takes a tile's columns in, so that it fits in the registers.
        flatten: let a persistent program fetch its next tile's first steps while it finishes the last one.
        maxnreg: the most registers of a thread, so that ``programs`` fit; None for as many as the compiler likes.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group: int = 8
    block_m: int = 128
    programs: int = 1
    parts: int = 1
    flatten: bool = False
    maxnreg: int | None = None


# For 16-bit numbers and tiles of 128 rows, by family. up counts the columns of one half when gated: two accumulators.
_DATACENTER = {
    "up": Config(256, 64, 8, 4, parts=4),
    "up_gated": Config(128, 64, 8, 4, parts=4),
    "down": Config(256, 64, 8, 4, parts=4),
    "hidden_grad": Config(256, 64, 8, 3, parts=8),
    "hidden_grad_dropout": Config(256, 64, 8, 3, parts=8),
    "hidden_grad_long": Config(128, 64, 8, 3, parts=8),
    "row_grad": Config(256, 64, 8, 4, parts=4),
    "weight_grad": Config(256, 64, 8, 7, parts=4),
    "quantized": Config(128, 64, 8, 4, parts=4),
    "quantized_int8": Config(128, 64, 8, 4, parts=4),
    "fp8": Config(128, 128, 8, 4, parts=4),
}
_BLACKWELL = _DATACENTER  # tensor memory holds the sums, and is used by programs of at most 8 warps
# Two programs a multiprocessor: one multiplies while the other stores. 128 registers is half of 64 K for 8 warps.
_TWO = Config(128, 64, 8, 3, parts=8, programs=2, flatten=True, maxnreg=128)
_HOPPER = {
    **{kernel: replace(config, flatten=kernel != "weight_grad") for kernel, config in _DATACENTER.items()},
    "hidden_grad": _TWO,  # its epilogue is long
    "hidden_grad_dropout": Config(256, 64, 16, 4, parts=8),  # twice the warps: with 8 it spills
    "quantized": replace(_TWO, num_stages=4),  # a step decodes, then multiplies: two programs take turns
    "quantized_int8": replace(_TWO, block_k=32, num_stages=4),  # with 64 it spills
}
_HOPPER_SHORT = {"down": replace(_TWO, parts=4), "row_grad": replace(_TWO, parts=4)}  # sums of few steps
_SHORT = 512  # numbers
# 99 KB of shared memory are enough: Ampere, Ada, and Blackwell without tensor memory.
_PORTABLE = {
    "up": Config(128, 32, 8, 4, parts=2),
    "up_gated": Config(64, 32, 8, 4),
    "down": Config(128, 32, 8, 4),
    "hidden_grad": Config(64, 32, 8, 4, parts=2),
    "hidden_grad_dropout": Config(64, 32, 8, 4, parts=4),
    "hidden_grad_long": Config(32, 32, 8, 4, parts=2),
    "row_grad": Config(128, 32, 8, 4),
    "weight_grad": Config(128, 32, 8, 4, parts=2),
    "quantized": Config(128, 32, 8, 4, parts=2),
    "quantized_int8": Config(128, 32, 8, 4, parts=2),
    "fp8": Config(128, 64, 8, 3, parts=2),
}
_FAMILIES = {"hopper": _HOPPER, "blackwell": _BLACKWELL, "portable": _PORTABLE}
# float32 on the ordinary arithmetic units, and rows that are not 16-byte aligned, read number by number: without small
# tiles the registers would spill.
_SMALL = {
    "up": Config(64, 16, 8, 2, parts=2),
    "up_gated": Config(32, 16, 8, 2),
    "down": Config(64, 16, 8, 2),
    "hidden_grad": Config(32, 16, 8, 2, parts=2),
    "hidden_grad_dropout": Config(32, 16, 8, 2, parts=2),
    "hidden_grad_long": Config(32, 16, 8, 2, parts=2),
    "row_grad": Config(64, 16, 8, 2),
    "weight_grad": Config(64, 16, 8, 3, block_m=64),
    "quantized": Config(64, 16, 8, 2, parts=2),
    "quantized_int8": Config(64, 16, 8, 2, parts=2),
    "fp8": Config(64, 32, 8, 2, parts=2),
}


def family(capability: int) -> str:
    """Which GPUs share a table: ``hopper`` (9.x), ``blackwell`` (10.x, with tensor memory), ``portable`` (the rest)."""
    return {9: "hopper", 10: "blackwell"}.get(capability // 10, "portable")


_measured: dict[str, Config] = {}
generation = 0  # how often they have changed: what was certified, was so under one of their states


def load(path: str | os.PathLike[str], *, replace_all: bool = False) -> None:
    """Use measured launch shapes from a file, before the built-in ones, in this process.

    Args:
        path: JSON: ``{"kernel/family/bytes/tile_rows/K/N": {"block_n": ..., ...}}``, as ``dmoe.tune`` writes it.
        replace_all: forget what was loaded before; otherwise the file's entries join it.

    Raises:
        ValueError: no such file, no JSON, or an entry that is no launch shape or names no kernel.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"kernel configs: {path}: expected JSON, got {error}") from error
    except OSError as error:
        raise ValueError(f"kernel configs: {path}: {error.strerror}") from error
    if not isinstance(entries, dict):
        raise ValueError(
            f"kernel configs: {path}: expected a JSON object of launch shapes by name, got {type(entries).__name__}"
        )
    measured = {}
    for name, entry in entries.items():
        try:
            measured[name] = _checked(name, entry)
        except ValueError as error:
            raise ValueError(f"kernel configs: {path}: {name}: {error}") from error
    replace_measured(measured if replace_all else {**_measured, **measured})


def replace_measured(table: dict[str, Config]) -> None:
    """Use these measured launch shapes, by name, and no others."""
    global generation
    fresh = dict(table)
    _measured.clear()
    _measured.update(fresh)
    generation += 1
    choose.cache_clear()


def measured() -> dict[str, Config]:
    """The measured launch shapes in use, by name: the environment's file, and what was loaded since."""
    _load_from_environment()
    return dict(_measured)


def _checked(name: str, entry: Any) -> Config:
    kernel, *rest = name.split("/")
    if len(rest) != 5 or not all(number.isdigit() for number in rest[1:]):
        raise ValueError("expected a name like kernel/family/bytes/tile_rows/K/N")
    if kernel not in _SMALL:
        raise ValueError(f"expected one of the kernels {', '.join(sorted(_SMALL))}")
    if rest[0] not in _FAMILIES:
        raise ValueError(f"expected one of the families {', '.join(sorted(_FAMILIES))}")
    try:
        config = Config(**entry)
    except TypeError as error:
        raise ValueError(f"expected the fields of Config, got {entry}") from error
    if type(config.flatten) is not bool:
        raise ValueError(f"flatten: expected true or false, got {config.flatten!r}")
    for field, value in asdict(config).items():
        if field == "flatten" or (field == "maxnreg" and value is None):
            continue
        if type(value) is not int or value < 1:
            allowed = "a power of 2 of at least 16" if field.startswith("block") else "an integer of at least 1"
            raise ValueError(f"{field}: expected {allowed}, got {value!r}")
        if field.startswith("block") and (value < 16 or value & (value - 1)):
            raise ValueError(f"{field}: expected a power of 2 of at least 16, got {value}")
    if config.maxnreg is not None and (config.maxnreg % 8 or not 32 <= config.maxnreg <= 248):
        raise ValueError(f"maxnreg: expected null or a multiple of 8 from 32 to 248, got {config.maxnreg}")
    if config.num_warps not in (1, 2, 4, 8, 16):
        raise ValueError(f"num_warps: expected 1, 2, 4, 8 or 16, got {config.num_warps}")
    if config.parts not in (1, 2, 4, 8) or config.block_n // config.parts < 8:
        raise ValueError(f"parts: expected 1, 2, 4 or 8, of 8 columns each or more, got {config.parts}")
    return config


def key(kernel: str, capability: int, element_size: int, tile_rows: int, k: int, n: int) -> str:
    """The name of an entry in a measured table."""
    return f"{kernel}/{family(capability)}/{element_size}/{tile_rows}/{k}/{n}"


@functools.cache
def _load_from_environment() -> None:
    path = os.environ.get("DMOE_KERNEL_CONFIGS")
    if path:
        load(path)


def hidden_grad_name(
    activation: str, dropout: float, transposed: bool, interleaved: bool = False, gated: bool = True
) -> str:
    """Whose launch shape the product back through the activation takes.

    A mask in the epilogue, another activation than silu, or a weight that is transposed in memory, needs registers that
    two programs on a multiprocessor have not; columns that take turns, or an activation of both halves, still more.
    Short activations of a gate do, too: the compiler computes them for all of a part at once.
    """
    if interleaved or "(" in activation or (gated and activation in ("relu_squared", "sigmoid")):
        return "hidden_grad_long"
    return "hidden_grad_dropout" if dropout or activation != "silu" or transposed else "hidden_grad"


@functools.cache
def choose(kernel: str, capability: int, element_size: int, tile_rows: int, k: int, n: int) -> Config:
    """The launch shape of a kernel.

    Args:
        kernel: ``up``, ``up_gated``, ``down``, ``hidden_grad`` or as :func:`hidden_grad_name` has it, ``row_grad``,
            ``weight_grad``; ``quantized`` and ``quantized_int8`` weights; ``fp8``, of both factors.
        capability: of the GPU, 90 for Hopper.
        element_size: bytes of one number.
        tile_rows: rows of a tile; for ``weight_grad`` it does not matter.
        k: columns of the rows' operand; what the sums run over, but for ``weight_grad``.
        n: columns of the result.
    """
    _load_from_environment()
    measured = _measured.get(key(kernel, capability, element_size, tile_rows, k, n))
    if measured is not None:
        return measured
    if element_size == 4 or (k * element_size) % 16 or (n * element_size) % 16:
        config = _SMALL[kernel]
    else:
        config = _FAMILIES[family(capability)][kernel]
        if family(capability) == "hopper" and k <= _SHORT:
            config = _HOPPER_SHORT.get(kernel, config)
        if tile_rows < 128 and kernel != "weight_grad":  # few rows: fewer warps, and less to throw away
            config = replace(config, block_n=min(config.block_n, 128), num_warps=4, maxnreg=None)
    block_n = min(config.block_n, max(16, 1 << (n - 1).bit_length()))
    return replace(config, block_n=block_n, parts=min(config.parts, max(block_n // 16, 1)))
