"""Measure launch shapes of the expert MLP's kernels on this GPU, and write the best as a table that dmoe loads.

    python -m dmoe.tune --shape T,H,F,E,K [--shape ...] --out tuned.json [--budget 300]
    DMOE_KERNEL_CONFIGS=tuned.json python train.py

For each kernel it times candidates around the built-in launch shape, on the expert MLP's own forward and backward with
random routing: median of CUDA events. A candidate is certified first (:mod:`dmoe.certify`, in a process of its own):
what does not compile, does not fit, hangs, crashes or is wrong never runs here and is dropped; so is what gives another
result than the built-in one, beyond rounding. ``--list`` prints the candidates and needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dmoe.activations import Activation, activation_of
from dmoe.expert_weights import ExpertWeights
from dmoe.functional import run_experts
from dmoe.kernels import configs
from dmoe.ops import _trust
from dmoe.ops.tile_table import preferred_tile_rows
from dmoe.plan import plan_token_choice

Entries = dict[str, tuple[str, configs.Config]]  # by name in the table: the kernel, its built-in launch shape


def candidates(config: configs.Config, kernel: str) -> list[configs.Config]:
    """Some six launch shapes, each once, the given one first: what the machine code leaves open, and no more.

    What cannot fit in the registers, as two programs of four warps with 128 rows, is not among them.
    """

    def like(**fields: Any) -> configs.Config:
        return dataclasses.replace(config, **fields)

    if kernel == "weight_grad":
        small = {"block_n": 128, "parts": 2}
        found = [like(num_stages=5), like(**small), like(**small, num_stages=5), like(**small, num_stages=9)]
        found.append(like(**small, num_stages=5, maxnreg=128))  # two of them fit on a multiprocessor
        return list(dict.fromkeys([config, *found]))
    found = [like(group=4), like(group=16), like(flatten=not config.flatten)]
    if config.num_warps == 4:  # tiles of few rows: registers and shared memory enough for more programs
        found += [like(programs=3 - config.programs), like(num_stages=3), like(block_n=64, parts=4)]
    else:
        # Two programs on a multiprocessor: one multiplies while the other stores. Each has half of the shared memory,
        # and half of the registers: 128 a thread with eight warps.
        halved = {"num_warps": 8, "num_stages": 3, "programs": 2, "maxnreg": 128}
        whole = {"num_warps": 8, "num_stages": 4, "programs": 1, "maxnreg": None}
        gated, back = kernel == "up_gated", kernel.startswith("hidden_grad")
        found.append(like(block_n=64 if gated else 128, parts=8 if back else 4, flatten=True, **halved))
        if back:  # the long epilogue of a wide tile needs twice the warps
            whole["num_warps"] = 16
        found.append(like(block_n=128 if gated else 256, parts=8 if back else 4, **whole))
    return [config, *(c for c in dict.fromkeys(found) if c != config and _fits(c, gated=kernel == "up_gated"))]


def _fits(config: configs.Config, *, gated: bool) -> bool:
    """Whether the sums, and some 40 registers beside them, fit in what a thread may have."""
    rows = 64 if config.num_warps == 4 else 128
    sums = rows * config.block_n * (2 if gated else 1) // (32 * config.num_warps)
    return sums + 40 <= min(255, 64 * 1024 // (32 * config.num_warps * config.programs), config.maxnreg or 255)


def kernels_of(shape: tuple[int, ...], capability: int, gated: bool, activation: str = "silu") -> Entries:
    """The entries that a layer of this shape looks up: name in the table, and the built-in launch shape."""
    tokens, hidden, ffn, experts, top_k = shape
    rows = preferred_tile_rows(tokens * top_k, experts)
    pre = 2 * ffn if gated else ffn
    looked_up = {
        "up_gated" if gated else "up": (hidden, ffn),
        "down": (ffn, hidden),
        configs.hidden_grad_name(activation, 0.0, False, gated=gated): (hidden, ffn),
        "row_grad": (pre, hidden),
    }
    entries = [(kernel, k, n) for kernel, (k, n) in looked_up.items()]
    entries += [("weight_grad", hidden, ffn), ("weight_grad", pre, hidden)]
    return {
        configs.key(kernel, capability, 2, rows, k, n): (kernel, configs.choose(kernel, capability, 2, rows, k, n))
        for kernel, k, n in entries
    }


class Layer:
    """One expert MLP with fixed routing, to run forward and backward."""

    def __init__(self, shape: tuple[int, ...], gated: bool, activation: Activation = "silu"):
        self.activation = activation
        tokens, hidden, ffn, experts, top_k = shape
        options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        generator = torch.Generator("cuda").manual_seed(0)

        def normal(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator, **options)

        indices = torch.rand(tokens, experts, generator=generator, device="cuda").topk(top_k).indices
        rows = preferred_tile_rows(tokens * top_k, experts)
        self.plan = plan_token_choice(indices, experts, tile_rows=rows)
        self.x = normal(tokens, hidden).requires_grad_()
        self.gates = torch.rand(tokens, top_k, generator=generator, device="cuda")
        up = normal(experts, *((2,) if gated else ()), ffn, hidden) / hidden**0.5
        down = normal(experts, hidden, ffn) / ffn**0.5
        self.weights = ExpertWeights(up.requires_grad_(), down.requires_grad_(), gated=gated)
        self.grad = normal(tokens, hidden)

    def run(self) -> list[torch.Tensor]:
        """y and the gradients of x and both projections."""
        y = run_experts(self.x, self.plan, self.gates, self.weights, activation=self.activation)
        leaves = (self.x, self.weights.up_proj, self.weights.down_proj)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.grad)]

    def milliseconds(self, repeats: int = 10) -> float:
        """Median time of forward and backward."""
        times = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self.run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times)[repeats // 2]


def write(table: dict[str, configs.Config], path: Path) -> None:
    """A table as a file; whole or not at all."""
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(json.dumps({name: dataclasses.asdict(c) for name, c in table.items()}, indent=1) + "\n")
    partial.replace(path)


def search(
    entries: Entries,
    measure: Callable[[dict[str, configs.Config]], float],
    deadline: float,
    progress: Callable[[Sequence[Any], str], Sequence[Any]] = lambda items, name: items,
) -> dict[str, configs.Config]:
    """The fastest launch shape of each entry, one entry after the other, the earlier ones kept.

    Args:
        entries: what to improve.
        measure: milliseconds under a table; infinite for a table that does not work.
        deadline: of ``time.monotonic``; what was found until then counts.
        progress: wraps each entry's candidates.
    """
    best: dict[str, configs.Config] = {}
    for name, (kernel, built_in) in entries.items():
        fastest = measure(best)
        for candidate in progress(candidates(built_in, kernel)[1:], name):
            if time.monotonic() > deadline:
                return best
            taken = measure({**best, name: candidate})
            if taken < 0.99 * fastest:  # less is noise
                taken = measure({**best, name: candidate})  # and so may be more, once
            if taken < 0.99 * fastest:
                fastest, best[name] = taken, candidate
    return best


class Measure:
    """Milliseconds of a layer under a table of launch shapes; infinite under one that is not to be trusted."""

    def __init__(self, layer: Any) -> None:
        """Run it once under the built-in ones.

        Raises:
            RuntimeError: not even those are trusted, and there is nothing to compare with.
        """
        if _trust.mode() == "0":
            os.environ["DMOE_CERTIFY"] = "1"  # what nobody has seen run may not win
        self.layer, self.expected = layer, layer.run()
        if _trust.refused:
            raise RuntimeError(f"dmoe.tune: the built-in launch shapes are refused here: {_trust.refused}")

    def __call__(self, table: dict[str, configs.Config]) -> float:
        """Certify, run, compare, time."""
        configs.replace_measured(table)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a refusal, which is told below
                results = self.layer.run()
        except Exception as error:  # too much shared memory, a compiler that gives up: not this one
            print(f"dropped: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return float("inf")
        refused = dict(_trust.refused)
        _trust.refused.clear()
        if refused:
            print(f"dropped: {'; '.join(refused.values())}")
            return float("inf")
        pairs = zip(results, self.expected, strict=True)
        close = all((a.float() - b.float()).norm() <= 1e-2 * b.float().norm() for a, b in pairs)
        return self.layer.milliseconds() if close else float("inf")


def tune(
    shape: tuple[int, ...], gated: bool, deadline: float, activation: Activation = "silu"
) -> dict[str, configs.Config]:
    """Search on this GPU."""
    measure = Measure(Layer(shape, gated, activation))

    def progress(items: Sequence[Any], name: str) -> Sequence[Any]:
        try:
            from tqdm import tqdm
        except ImportError:  # a courtesy
            print(f"{name}: {len(items)} candidates")
            return items
        return tqdm(items, desc=name)

    capability = 10 * torch.cuda.get_device_capability()[0]
    return search(kernels_of(shape, capability, gated, str(activation)), measure, deadline, progress)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, tune every shape, write."""
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", required=True, metavar="T,H,F,E,K")
    parser.add_argument("--plain", action="store_true", help="experts without a gate")
    parser.add_argument(
        "--activation", default="silu", help="a name, or one with numbers as text: clamped_swiglu(7.0,1.702,1.0)"
    )
    parser.add_argument("--out", type=Path, default=Path("tuned.json"))
    parser.add_argument("--budget", type=float, default=300, help="seconds in all")
    parser.add_argument("--list", action="store_true", help="print what would be tried, and stop")
    parser.add_argument("--tables", type=Path, help="with --list: also write a JSON list of tables, one a candidate")
    options = parser.parse_args(arguments)
    shapes = []
    for text in options.shape:
        numbers = [part.strip() for part in text.split(",")]
        shape = tuple(int(part) for part in numbers if part.isdigit())
        if len(shape) != 5 or len(numbers) != 5 or min(shape) < 1:
            parser.error(f"--shape: expected five numbers T,H,F,E,K of at least 1, got {text}")
        if shape[4] > shape[3]:
            parser.error(f"--shape: expected K of at most E, got {text}")
        shapes.append(shape)
    try:
        activation = activation_of(options.activation, "dmoe.tune", not options.plain)
    except ValueError as error:
        parser.error(str(error))
    if not options.budget > 0:
        parser.error(f"--budget: expected more than 0 seconds, got {options.budget}")
    if not options.list and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: expected a file in a folder that exists, got {options.out}")
    if options.list:
        tables = []
        for shape in shapes:
            for name, (kernel, config) in kernels_of(shape, 90, not options.plain, str(activation)).items():
                tried = candidates(config, kernel)
                print(name, *tried, sep="\n  ")
                tables += [{name: dataclasses.asdict(candidate)} for candidate in tried]
        if options.tables:
            options.tables.write_text(json.dumps(tables))
        return
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, and this machine has none; --list needs none")
    best: dict[str, configs.Config] = {}
    deadline = time.monotonic() + options.budget
    for shape in shapes:
        best |= tune(shape, not options.plain, deadline, activation)
        write(best, options.out)
    print(f"{options.out}: {len(best)} launch shapes that beat the built-in; use: DMOE_KERNEL_CONFIGS={options.out}")


if __name__ == "__main__":
    main()
