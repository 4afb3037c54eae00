"""How fast is ``dmoe.ops.routing_plan`` beside the same plan from PyTorch's own operations?

    python benchmarks/routing_ops.py [--quick] [--cases E=64] [--threads 2]

The contestant to beat is what a PyTorch user writes: a stable argsort of the expert ids, a bincount, a cumsum, and the
inverse permutation; with int64 ids, as ``torch.topk`` returns them, and with int32 ids, which PyTorch sorts faster. The
plan's own plain-PyTorch reference is timed too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from parts.harness import (
    COLOURS,
    CheckError,
    Timing,
    arguments,
    checked,
    describe,
    environment,
    interleave,
    label_lines,
    markdown_table,
    milliseconds,
    new_figure,
    publish,
    run_benchmark,
    save_figure,
    stopwatch,
)
from torch import Tensor
from tqdm import tqdm

from dmoe.ops import routing_plan
from dmoe.ops.routing_plan import routing_plan_ref

AIM = 10.0  # times faster than PyTorch's operations, from AIM_ROWS rows on
AIM_ROWS = 100_000
SAMPLE_SECONDS = 2e-3  # short operations are repeated until one sample takes about this long


@dataclass(frozen=True)
class Case:
    """One size."""

    rows: int
    experts: int
    top_k: int

    @property
    def label(self) -> str:
        """For tables and for ``--cases``."""
        return f"rows={self.rows} E={self.experts} K={self.top_k}"

    def expert_indices(self, seed: int) -> Tensor:
        """``(T, K)`` int64, the K ids of a token distinct: an arithmetic progression modulo E with an odd step."""
        generator = torch.Generator().manual_seed(seed)
        tokens = self.rows // self.top_k
        first = torch.randint(self.experts, (tokens, 1), generator=generator)
        step = 2 * torch.randint(self.experts, (tokens, 1), generator=generator) + 1
        return (first + step * torch.arange(self.top_k)) % self.experts


def torch_plan(expert_indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Permutation, its inverse, offsets and counts, by PyTorch's own operations."""
    flat = expert_indices.flatten()
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=num_experts)
    offsets = counts.new_zeros(num_experts + 1)
    torch.cumsum(counts, 0, out=offsets[1:])
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    return order, inverse, offsets, counts


def contestants(case: Case, seed: int) -> dict[str, Callable[[], Any]]:
    """Name to what is timed, on one batch of ids."""
    ids = case.expert_indices(seed)
    narrow = ids.int()
    E = case.experts
    return {
        "dmoe": lambda: routing_plan(ids, E),
        "torch": lambda: torch_plan(ids, E),
        "torch, int32 ids": lambda: torch_plan(narrow, E),
        "reference": lambda: routing_plan_ref(ids, E, 1, None, False, None, False, 0),
    }


def check(case: Case, found: dict[str, Callable[[], Any]]) -> None:
    """Every contestant must find the same plan, to the last index."""
    order, inverse, offsets, counts = torch_plan(case.expert_indices(0), case.experts)
    expected = (order // case.top_k, order % case.top_k, offsets, inverse, counts)
    names = ("row_to_token", "row_to_slot", "expert_offsets", "token_rows", "tokens_per_expert")
    for contestant, run in found.items():
        got = run()
        if contestant.startswith("torch"):
            permutation, inverse, offsets, counts = got
            got = (permutation // case.top_k, permutation % case.top_k, offsets, inverse, counts)
        for name, mine, theirs in zip(names, got[: len(names)], expected, strict=True):  # no tiles were asked for
            if not torch.equal(mine.long(), theirs):
                raise CheckError(f"routing_ops, {case.label}: {contestant} and torch differ in {name}")


def repeated(run: Callable[[], Any]) -> Callable[[int], float]:
    """Seconds a call, averaged over enough calls for the clock."""
    run()
    calls = max(1, min(1000, int(SAMPLE_SECONDS / max(stopwatch(run), 1e-9))))

    def sample(_: int) -> float:
        def several() -> None:
            for _ in range(calls):
                run()

        return stopwatch(several) / calls

    return sample


def tables(cases: list[dict[str, Any]], env: dict[str, Any]) -> str:
    """The report as Markdown."""
    names = list(cases[0]["timings"])
    header = [
        "rows (T*K)",
        "E",
        "K",
        *(f"{name}, ms" for name in names),
        "times torch",
        "times torch, int32 ids",
        "aim",
    ]
    rows = []
    for entry in cases:
        case, timings = entry["case"], entry["timings"]
        cells = [
            f"{milliseconds(t.median)} [{milliseconds(t.p10)}, {milliseconds(t.p90)}]" if t else "-"
            for t in timings.values()
        ]
        gains = [_gain(timings, rival) for rival in ("torch", "torch, int32 ids")]
        aim = "" if case["rows"] < AIM_ROWS else "met" if gains[0] is not None and gains[0] >= AIM else "missed"
        shown = ["-" if gain is None else f"{gain:.1f}x" for gain in gains]
        rows.append([f"{case['rows']:,}", str(case["experts"]), str(case["top_k"]), *cells, *shown, aim])
    intro = (
        "Median [10th, 90th percentile] milliseconds. `times torch`: how many times faster dmoe is than "
        "a stable argsort, bincount, cumsum and the inverse on int64 ids; "
        f"the aim is {AIM:.0f}x from {AIM_ROWS:,} rows on. "
        "All contestants found the same plan before any was timed."
    )
    return "\n\n".join(
        ["# routing_plan beside PyTorch's operations", describe(env), intro, markdown_table(header, rows) + "\n"]
    )


def _gain(timings: dict[str, Timing], rival: str) -> float | None:
    return timings[rival].median / timings["dmoe"].median if rival in timings and "dmoe" in timings else None


def plot(cases: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """Time a row against rows, a panel for each E, at the largest K."""
    top_k = max(entry["case"]["top_k"] for entry in cases)
    cases = [entry for entry in cases if entry["case"]["top_k"] == top_k]
    experts = sorted({entry["case"]["experts"] for entry in cases})
    figure, axes = new_figure(len(experts), width=3.4 * len(experts) + 1.6, height=4)
    for axis, count in zip(axes, experts, strict=True):
        entries = [entry for entry in cases if entry["case"]["experts"] == count]
        ends = []
        for i, name in enumerate(entries[0]["timings"]):
            xs = [entry["case"]["rows"] for entry in entries]
            timings = [entry["timings"][name] for entry in entries]
            ys = [t.median / x * 1e9 for t, x in zip(timings, xs, strict=True)]
            axis.plot(xs, ys, color=COLOURS[i], marker="o", ms=4, lw=2.2 if name == "dmoe" else 1.3)
            low = [t.p10 / x * 1e9 for t, x in zip(timings, xs, strict=True)]
            high = [t.p90 / x * 1e9 for t, x in zip(timings, xs, strict=True)]
            axis.fill_between(xs, low, high, color=COLOURS[i], alpha=0.15, lw=0)
            ends.append((xs[-1], ys[-1], name, COLOURS[i]))
        axis.set(xscale="log", yscale="log", title=f"E = {count}, K = {top_k}", xlabel="rows (T*K)")
        if axis is axes[-1]:
            figure.canvas.draw()
            label_lines(axis, ends, gap=0.06)
    axes[0].set_ylabel("nanoseconds a row")
    figure.suptitle(f"Routing plan on {env['hardware']}, {env['threads']} threads (lower is better)", x=0.07, ha="left")
    save_figure(figure, path)


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=15)
    args = checked(parser)
    sizes = (1_000, 10_000, 100_000) if args.quick else (1_000, 10_000, 100_000, 1_000_000, 10_000_000)
    grid = [Case(rows, experts, k) for experts in (8, 64, 512) for k in (2, 8) for rows in sizes]
    grid = [case for case in grid if args.cases in case.label]
    if not grid:
        parser.error(f"--cases {args.cases!r}: no case has that in its label, e.g. {Case(1000, 64, 8).label!r}")
    rounds = min(args.rounds, 3) if args.quick else args.rounds

    results: list[dict[str, Any]] = []
    with tqdm(total=len(grid) * rounds, unit="round") as bar:
        for case in grid:
            bar.set_postfix_str(case.label)
            field = contestants(case, 0)
            check(case, field)
            if args.contestants:
                wanted = {"dmoe", *args.contestants.split(",")}
                field = {name: run for name, run in field.items() if name in wanted}
            timings = interleave(
                {name: repeated(run) for name, run in field.items()},
                rounds=rounds,
                warmup=args.warmup,
                seconds_each=args.seconds,
                seed=args.seed,
                tick=lambda: bar.update(),
            )
            results.append({"case": vars(case), "timings": timings})

    env = environment(args.threads)
    publish(
        "routing_ops",
        env,
        args,
        results,
        report=lambda name: tables(results, env),
        plot=lambda path: plot(results, env, path),
    )


if __name__ == "__main__":
    run_benchmark(main)
