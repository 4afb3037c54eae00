"""Ranks that compute as many rows each: ``balance_ranks="replicate"`` beside the layer as its experts stand.

    python benchmarks/level_ranks.py [--quick] [--cases "W=2"] [--rounds 9] [--threads 1]

Starts 2, then 4 ranks of a gloo group on this machine. On every case both agree first in float64, output and all
gradients, and what goes over the wire has to be what the layer's metrics say; else nothing is reported. Then they take
turns. A turn is forward and backward, from a barrier to a barrier, so that the slowest rank counts. Four ranks on fewer
cores take turns on these as well: their seconds say nothing, and are left out.
"""

from __future__ import annotations

import os
import random
import statistics
from typing import Any

import torch
from parts.ep_levels import CONTESTANTS, Case, Rank
from parts.ep_ranks import KEEP_MEMORY, RankFailedError, Ranks
from parts.harness import (
    COLOURS,
    CheckError,
    Timing,
    arguments,
    checked,
    describe,
    environment,
    markdown_table,
    milliseconds,
    new_figure,
    require_close,
    run_benchmark,
    save_figure,
    stem,
    write_json,
)
from tqdm import tqdm

CASES = [
    Case(w, t, 512, f, 8, k, zipf)
    for w, t in ((2, 1024), (4, 512))
    for f in (1024, 4096)
    for k, zipf in ((1, 0.0), (2, 1.2))
]
CHECK_TOKENS = 96
AIM, MOST = 1.3, 1.05  # times the speed on two ranks with wide experts; rows of the largest rank over the mean


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=9)
    parser.set_defaults(threads=1, seconds=60.0, warmup=1)
    args = checked(parser)
    cases = [case for case in CASES if args.cases in case.label and (not args.quick or case.ffn == 1024)]
    if not cases:
        parser.error(f"--cases {args.cases!r}: no such case; labels are like {CASES[0].label!r}")
    cores = len(os.sched_getaffinity(0))
    results = []
    with tqdm(total=len(cases), unit="case", mininterval=1) as bar:
        for world in dict.fromkeys(case.ranks for case in cases):
            with Ranks(Rank, world, threads=args.threads, limit=300.0, environment=KEEP_MEMORY) as ranks:
                for case in (case for case in cases if case.ranks == world):
                    bar.set_postfix_str(case.label)
                    results.append(run_case(case, ranks, args, timed=world <= cores))
                    bar.update()
    env = environment(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / stem("level_ranks", env)
    write_json(base.with_suffix(".json"), env, vars(args), results)
    text = report(results, env, base.name)
    base.with_suffix(".md").write_text(text)
    plot(results, base.with_suffix(".png"))
    print(text)
    print(f"written: {base.name}.json, .md, .png")


def run_case(case: Case, ranks: Ranks, args: Any, *, timed: bool) -> dict[str, Any]:
    """Check, count and time one case."""
    ranks.call("build", case, CHECK_TOKENS, torch.float64, 1)
    for rank, found in enumerate(ranks.call("errors")):
        require_close(f"level_ranks, {case.label}, rank {rank}: with copies against without", found, 1e-12)
    ranks.call("build", case, case.tokens, torch.float32, None)
    traffic = {name: ranks.call("traffic", name) for name in CONTESTANTS}
    for name, by_rank in traffic.items():
        for rank, found in enumerate(by_rank):
            if found["forward"] != found["metrics"]:
                raise CheckError(
                    f"level_ranks, {case.label}, rank {rank}: bytes of {name}: {found['forward']} on the wire, "
                    f"{found['metrics']} in the metrics"
                )
    samples: dict[str, list[float]] = {name: [] for name in CONTESTANTS}
    order, turns = random.Random(args.seed), list(CONTESTANTS)
    for round_ in range(-args.warmup, (3 if args.quick else args.rounds) if timed else -args.warmup):
        order.shuffle(turns)
        for name in turns:
            slowest = max(both for _, both in ranks.call("time", name))
            if round_ >= 0:
                samples[name].append(slowest)
    before = [sum(rows) for rows in zip(*(found["own_rows"] for found in traffic["level"]), strict=True)]
    mean = statistics.fmean(before)
    without, level = samples.values()
    return {
        "case": {**vars(case), "label": case.label, "routing": case.routing},
        "traffic": traffic,
        "rows": {"as they stand": max(before) / mean, "level": max(traffic["level"][0]["rows"]) / mean},
        "copies": sum(found["copies"] for found in traffic["level"]),
        "timings": {name: Timing.of(kept) for name, kept in samples.items() if kept},
        "ratio": Timing.of([a / b for a, b in zip(without, level, strict=True)]) if timed else None,
    }


# ------------------------------------------------------------------------------------------------------------ report


def megabytes(entry: dict[str, Any], name: str) -> float:
    """Mean over the ranks of what one sends in forward and backward, in 10**6 bytes."""
    return statistics.fmean(found["forward"] + found["backward"] for found in entry["traffic"][name]) / 1e6


def report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    """The table as Markdown."""
    rows = []
    for entry in results:
        ratio, timings = entry["ratio"], entry["timings"]
        times = [milliseconds(timings[n].median) for n in CONTESTANTS] if timings else ["-", "-"]
        told = f"{ratio.median:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})" if ratio else "-"
        moved = [f"{megabytes(entry, n):.1f}" for n in CONTESTANTS]
        level = [f"{entry['rows'][n]:.2f}" for n in CONTESTANTS]
        rows.append([entry["case"]["label"], *level, str(entry["copies"]), *moved, *times, told])
    header = ["case", "rows, as they stand", "level", "copies", "MB, as they stand", "level"]
    header += ["ms, as they stand", "level", "times as fast"]
    missed = [
        entry["case"]["label"]
        for entry in results
        if entry["rows"]["level"] > MOST
        or (entry["ratio"] and entry["case"]["ffn"] == 4096 and entry["ratio"].median < AIM)
    ]
    aims = f"rows of at most {MOST} means; {AIM} times as fast on two ranks with F = 4096"
    parts = [
        "# Ranks made level by copies of experts, on gloo",
        describe(env),
        f"![step time]({name}.png)",
        "T tokens on each of W ranks, gated experts, float32. Rows: those of the rank with most over the mean. Copies: "
        "of all ranks together. MB: what a rank sends in forward and backward, weights of copies and their gradients "
        "with it, mean over the ranks. Milliseconds: median of forward and backward of the slowest rank, by turns; the "
        "ratio is the median over rounds, in brackets the 10th and 90th percentile. A copy is made where it pays by "
        "`dmoe.parallel.rows_that_pay`. Before timing, output and all gradients agreed in float64 within 1e-12.",
        markdown_table(header, rows),
        f"Aims: {aims}. " + ("Missed: " + "; ".join(missed) + "." if missed else "Met in every case."),
    ]
    return "\n\n".join(parts) + "\n"


def plot(results: list[dict[str, Any]], path: Any) -> None:
    """Milliseconds of a step, a pair of bars for each case that was timed."""
    entries = [entry for entry in results if entry["timings"]]
    figure, (axis,) = new_figure(1, width=2 + 1.6 * max(len(entries), 1), height=4.2)
    for n, name in enumerate(CONTESTANTS):
        found = [1e3 * entry["timings"][name].median for entry in entries]
        places = [place + 0.36 * (n - 0.5) for place in range(len(entries))]
        bars = axis.bar(places, found, width=0.34, color=COLOURS[n], label=name)
        axis.bar_label(bars, [f"{ms:.0f}" for ms in found], fontsize=8)
    axis.set_xticks(range(len(entries)), [entry["case"]["label"].replace(" K", "\nK") for entry in entries], fontsize=8)
    axis.set_ylabel("ms, forward + backward")
    axis.legend(frameon=False)
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main, RankFailedError)
