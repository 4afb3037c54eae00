"""Products with experts held as codes beside the same products with weights: forward and gradient of the input.

A projection of 8 experts, 2048 by 2048, larger in every dtype than the processor's caches: one product per expert, and
the one back. Times are processor time of one thread, which other programs on the machine disturb least.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parts.harness import (
    COLOURS,
    Timing,
    arguments,
    checked,
    describe,
    environment,
    interleave,
    markdown_table,
    milliseconds,
    new_figure,
    publish,
    relative_error,
    require_close,
    run_benchmark,
    save_figure,
    stopwatch,
)
from torch import Tensor
from tqdm import tqdm

from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.quantized_gemm import quantized_gemm
from dmoe.ops.weight_formats import FORMATS, decode, encode

EXPERTS, ROWS, COLUMNS = 8, 2048, 2048
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
Pass = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Case:
    """Rows of each expert, and the dtype of x, of the results and of the weights that are none of codes."""

    rows: int
    dtype: torch.dtype

    @property
    def label(self) -> str:
        """As ``--cases`` finds it."""
        return f"{self.rows} rows an expert, {str(self.dtype).removeprefix('torch.')}"


class Contest:
    """Weights, as numbers and as codes in every format, made once."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.weight = torch.randn(EXPERTS, ROWS, COLUMNS, generator=self.generator) / COLUMNS**0.5
        self.codes = {name: encode(self.weight, name) for name in FORMATS}

    def bytes_of(self, name: str) -> int:
        """Of codes, scales and zero points."""
        return sum(part.nbytes for part in self.codes[name] if part is not None)

    def passes(self, case: Case) -> dict[str, Pass]:
        """Name to what is timed: the product and the one back, of the same rows."""
        counts = torch.full((EXPERTS + 1,), case.rows, dtype=torch.int32)
        counts[0] = 0
        offsets, total = counts.cumsum(0).int(), EXPERTS * case.rows
        x = torch.randn(total, COLUMNS, generator=self.generator).to(case.dtype)
        grad = torch.randn(total, ROWS, generator=self.generator).to(case.dtype)
        plain = self.weight.to(case.dtype)

        def with_weights(weight: Tensor) -> Pass:
            return lambda: (grouped_gemm(x, weight, offsets), grouped_gemm(grad, weight, offsets, trans_b=False))

        def with_codes(name: str) -> Pass:
            parts = (*self.codes[name], name, list(FORMATS[name].block(COLUMNS)), offsets)
            return lambda: (quantized_gemm(x, *parts, True), quantized_gemm(grad, *parts, False))

        found = {"weights": with_weights(plain)} | {name: with_codes(name) for name in FORMATS}
        for name in FORMATS:
            own = decode(*self.codes[name], name, FORMATS[name].block(COLUMNS), case.dtype)
            pairs = zip(("forward", "input gradient"), found[name](), with_weights(own)(), strict=True)
            errors = {f"{name}'s {what}": relative_error(got, expected) for what, got, expected in pairs}
            require_close(f"quantized_experts, {case.label}", errors, TOLERANCE[case.dtype])
        return found


def timed(run: Pass) -> Callable[[int], float]:
    """Seconds of this thread's processor time."""
    return lambda _: stopwatch(run, time.thread_time)


def table(results: list[dict[str, Any]], env: dict[str, Any], sizes: dict[str, int]) -> str:
    """The report as Markdown."""
    names = list(results[0]["timings"])
    rows = []
    for entry in results:
        first = entry["timings"]["weights"].median
        cells = [
            milliseconds(t.median) + ("" if name == "weights" else f" ({t.median / first:.2f})")
            for name, t in entry["timings"].items()
        ]
        rows.append([entry["case"], *cells])
    numbers = EXPERTS * ROWS * COLUMNS
    held = [[name, f"{size / 2**20:.1f}", f"{8 * size / numbers:.2f}"] for name, size in sizes.items()]
    intro = (
        f"{EXPERTS} experts of {ROWS} by {COLUMNS}. Median milliseconds of processor time for the product of all rows "
        "and the one back to the gradient of the input, on one thread; in brackets how many times that of `weights`, "
        "which are in the dtype of the line. Every format's results agreed with those of its decoded weights before "
        "any was timed."
    )
    return "\n\n".join(
        [
            "# Experts held as codes",
            describe(env),
            intro,
            markdown_table(["", *names], rows),
            markdown_table(["held as", "MiB", "bits a weight"], held) + "\n",
        ]
    )


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """Times of each format, in parts of those with weights, by rows: a panel for each dtype."""
    dtypes = list(dict.fromkeys(entry["dtype"] for entry in results))
    figure, axes = new_figure(len(dtypes), width=4 * len(dtypes) + 1.6, height=4)
    for axis, dtype in zip(axes, dtypes, strict=True):
        entries = [entry for entry in results if entry["dtype"] == dtype]
        for colour, name in zip(COLOURS, FORMATS, strict=False):
            ratios = [entry["timings"][name].median / entry["timings"]["weights"].median for entry in entries]
            axis.plot([entry["rows"] for entry in entries], ratios, color=colour, marker="o", ms=4, label=name)
        axis.axhline(1, color="#666666", lw=1)
        axis.set(xscale="log", title=dtype, xlabel="rows an expert", ylim=(0, None))
    axes[0].set_ylabel("times as long as with weights")
    axes[-1].legend(frameon=False)
    figure.suptitle(f"Experts held as codes on {env['hardware']}, one thread (lower is better)", x=0.07, ha="left")
    save_figure(figure, path)


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=9)
    parser.set_defaults(threads=1)
    args = checked(parser)
    grid = [Case(rows, dtype) for dtype in TOLERANCE for rows in ((1, 32) if args.quick else (1, 8, 32, 256))]
    grid = [case for case in grid if args.cases in case.label]
    if not grid:
        parser.error(f"--cases {args.cases!r}: no case has that in its label, e.g. {Case(1, torch.float32).label!r}")
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    contest, results = Contest(args.seed), []
    with tqdm(total=len(grid) * rounds, unit="round") as bar:
        for case in grid:
            bar.set_postfix_str(case.label)
            found = contest.passes(case)
            if args.contestants:
                found = {name: run for name, run in found.items() if name in {"weights", *args.contestants.split(",")}}
            timings: dict[str, Timing] = interleave(
                {name: timed(run) for name, run in found.items()},
                rounds=rounds,
                warmup=args.warmup,
                seconds_each=args.seconds,
                seed=args.seed,
                tick=lambda: bar.update(),
            )
            dtype = str(case.dtype).removeprefix("torch.")
            results.append({"case": case.label, "rows": case.rows, "dtype": dtype, "timings": timings})
    sizes = {"float32": contest.weight.nbytes, "bfloat16": contest.weight.nbytes // 2}
    sizes |= {name: contest.bytes_of(name) for name in FORMATS}
    env = environment(args.threads)
    publish(
        "quantized_experts",
        env,
        args,
        [*results, {"bytes": sizes}],
        report=lambda name: table(results, env, sizes),
        plot=lambda path: plot(results, env, path),
    )


if __name__ == "__main__":
    run_benchmark(main)
