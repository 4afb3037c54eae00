"""Measure launch shapes of the expert MLP's kernels on this GPU, and write the best as a table that dmoe loads.

    python -m dmoe.tune --shape T,H,F,E,K [--shape ...] --out tuned.json [--budget 300]
    DMOE_KERNEL_CONFIGS=tuned.json python train.py

For each kernel it times candidates around the built-in launch shape, on the expert MLP's own forward and backward with
random routing: median of CUDA events. A candidate that does not compile, does not fit in shared memory or gives another
result than the built-in one (beyond rounding) is dropped. ``--list`` prints the candidates and needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dmoe.expert_weights import ExpertWeights
from dmoe.functional import run_experts
from dmoe.kernels import configs
from dmoe.ops.tile_table import preferred_tile_rows
from dmoe.plan import plan_token_choice

Entries = dict[str, tuple[str, configs.Config]]  # by name in the table: the kernel, its built-in launch shape


def candidates(config: configs.Config, kernel: str) -> list[configs.Config]:
    """Launch shapes around a given one, each once, the given one first."""
    found = [config]
    for block_n, warps in ((64, 4), (128, 4), (128, 8), (256, 8), (256, 16)):
        for block_k in (32, 64, 128):
            for stages in (3, 4, 5):
                parts = max(1, min(8, block_n // 32))
                found.append(
                    dataclasses.replace(
                        config, block_n=block_n, block_k=block_k, num_warps=warps, num_stages=stages, parts=parts
                    )
                )
    for group in (4, 16):
        found.append(dataclasses.replace(config, group=group))
    if kernel != "weight_grad":
        found.append(dataclasses.replace(config, flatten=True))
        # Two programs on a multiprocessor: one multiplies while the other stores. Each has half of the shared memory.
        for block_k, stages in ((64, 3), (32, 4), (32, 5)):
            half = dataclasses.replace(config, block_n=128, block_k=block_k, num_warps=4, num_stages=stages, parts=4)
            found += [dataclasses.replace(half, programs=2), dataclasses.replace(half, programs=2, flatten=True)]
    return list(dict.fromkeys(found))


def few(config: configs.Config, kernel: str) -> list[configs.Config]:
    """The half dozen of :func:`candidates`' kind that say most in a minute or two, the given one first."""
    found = [config, dataclasses.replace(config, num_stages=max(config.num_stages - 1, 2))]
    found.append(dataclasses.replace(config, num_stages=config.num_stages + (2 if kernel == "weight_grad" else 1)))
    found.append(dataclasses.replace(config, group=16))
    found.append(dataclasses.replace(config, block_n=128, num_warps=8, parts=4))
    if kernel != "weight_grad":
        half = dataclasses.replace(config, block_n=128, num_warps=8, num_stages=3, parts=8)
        found += [dataclasses.replace(config, flatten=True), dataclasses.replace(half, programs=2)]
    return list(dict.fromkeys(found))


def kernels_of(shape: tuple[int, ...], capability: int, gated: bool) -> Entries:
    """The entries that a layer of this shape looks up: name in the table, and the built-in launch shape."""
    tokens, hidden, ffn, experts, top_k = shape
    rows = preferred_tile_rows(tokens * top_k, experts)
    pre = 2 * ffn if gated else ffn
    looked_up = {
        "up_gated" if gated else "up": (hidden, ffn),
        "down": (ffn, hidden),
        "hidden_grad": (hidden, ffn),
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

    def __init__(self, shape: tuple[int, ...], gated: bool):
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
        y = run_experts(self.x, self.plan, self.gates, self.weights)
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
    around: Callable[[configs.Config, str], list[configs.Config]] = candidates,
) -> dict[str, configs.Config]:
    """The fastest launch shape of each entry, one entry after the other, the earlier ones kept.

    Args:
        entries: what to improve.
        measure: milliseconds under a table; infinite for a table that does not work.
        deadline: of ``time.monotonic``; what was found until then counts.
        progress: wraps each entry's candidates.
        around: the candidates of an entry, its built-in launch shape first.
    """
    best: dict[str, configs.Config] = {}
    for name, (kernel, built_in) in entries.items():
        fastest = measure(best)
        for candidate in progress(around(built_in, kernel)[1:], name):
            if time.monotonic() > deadline:
                return best
            taken = measure({**best, name: candidate})
            if taken < 0.99 * fastest:  # less is noise
                taken = measure({**best, name: candidate})  # and so may be more, once
            if taken < 0.99 * fastest:
                fastest, best[name] = taken, candidate
    return best


def tune(
    shape: tuple[int, ...],
    gated: bool,
    deadline: float,
    around: Callable[[configs.Config, str], list[configs.Config]] = candidates,
) -> dict[str, configs.Config]:
    """Search on this GPU."""
    layer = Layer(shape, gated)
    expected = layer.run()

    def measure(table: dict[str, configs.Config]) -> float:
        with tempfile.TemporaryDirectory() as folder:
            write(table, Path(folder) / "table.json")
            configs.load(Path(folder) / "table.json", replace_all=True)
        try:
            results = layer.run()
            close = all(
                (a.float() - b.float()).norm() <= 1e-2 * b.float().norm()
                for a, b in zip(results, expected, strict=True)
            )
            return layer.milliseconds() if close else float("inf")
        except Exception as error:  # too much shared memory, a compiler that gives up: not this one
            print(f"dropped: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return float("inf")

    def progress(items: Sequence[Any], name: str) -> Sequence[Any]:
        try:
            from tqdm import tqdm
        except ImportError:  # a courtesy
            print(f"{name}: {len(items)} candidates")
            return items
        return tqdm(items, desc=name)

    entries = kernels_of(shape, 10 * torch.cuda.get_device_capability()[0], gated)
    return search(entries, measure, deadline, progress, around)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, tune every shape, write."""
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.tune", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", action="append", required=True, metavar="T,H,F,E,K")
    parser.add_argument("--plain", action="store_true", help="experts without a gate")
    parser.add_argument("--out", type=Path, default=Path("tuned.json"))
    parser.add_argument("--budget", type=float, default=300, help="seconds in all")
    parser.add_argument("--few", action="store_true", help="try the half dozen for each kernel that say most")
    parser.add_argument("--list", action="store_true", help="print what would be tried, and stop")
    parser.add_argument("--tables", type=Path, help="with --list: also write a JSON list of tables, one a candidate")
    options = parser.parse_args(arguments)
    around = few if options.few else candidates
    shapes = []
    for text in options.shape:
        numbers = [part.strip() for part in text.split(",")]
        shape = tuple(int(part) for part in numbers if part.isdigit())
        if len(shape) != 5 or len(numbers) != 5 or min(shape) < 1:
            parser.error(f"--shape: expected five numbers T,H,F,E,K of at least 1, got {text}")
        if shape[4] > shape[3]:
            parser.error(f"--shape: expected K of at most E, got {text}")
        shapes.append(shape)
    if not options.budget > 0:
        parser.error(f"--budget: expected more than 0 seconds, got {options.budget}")
    if not options.list and not options.out.absolute().parent.is_dir():
        parser.error(f"--out: expected a file in a folder that exists, got {options.out}")
    if options.list:
        tables = []
        for shape in shapes:
            for name, (kernel, config) in kernels_of(shape, 90, not options.plain).items():
                print(name, *around(config, kernel), sep="\n  ")
                tables += [{name: dataclasses.asdict(candidate)} for candidate in around(config, kernel)]
        if options.tables:
            options.tables.write_text(json.dumps(tables))
        return
    if not torch.cuda.is_available():
        parser.error("expected a CUDA device, and this machine has none; --list needs none")
    best: dict[str, configs.Config] = {}
    deadline = time.monotonic() + options.budget
    for shape in shapes:
        best |= tune(shape, not options.plain, deadline, around)
        write(best, options.out)
    print(f"{options.out}: {len(best)} launch shapes that beat the built-in; use: DMOE_KERNEL_CONFIGS={options.out}")


if __name__ == "__main__":
    main()
