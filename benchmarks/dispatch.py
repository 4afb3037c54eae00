"""Tokens to other ranks and back: dmoe's dispatcher beside the naive all-to-all of one row for each choice.

    python benchmarks/dispatch.py [--quick] [--cases "W=4 T=1024 H=2048"] [--ranks 2,4] [--threads 1]

Starts 2, then 4 ranks of a gloo group on this machine. On every case all contestants agree first with the naive one, in
float64 on output and gradients, and every byte count (what went over the wire, what the dispatcher's metrics say, what
``parts.ep_bytes`` predicts) has to be the same; else nothing is reported. Then they take turns. A turn is forward and
backward, from a barrier to a barrier, so that the slowest rank counts.

Two kinds of cases: movement alone, where an expert only scales its rows, and with experts of width F.
"""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parts.ep_bytes import Wire, copies_closed_form, counted_rows
from parts.ep_movement import CONTESTANTS, Case, Rank
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

EXPERTS = 64
TOKENS = {2: 2048, 4: 1024}  # on each rank: as many in all
SHAPES = [(h, 0, k, zipf) for h in (1024, 2048) for k in (2, 8) for zipf in (0.0, 1.0)]
SHAPES += [(1024, 256, k, zipf) for k in (2, 8) for zipf in (0.0, 1.0)]
CHECK_TOKENS = 192
AIM = 1.3  # times the naive all-to-all's speed, at K = 8
NARROW_TOLERANCE = 0.1  # relative norm: e4m3 has three bits behind the point, a rounding of up to 2**-4


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=15)
    parser.add_argument("--ranks", default="2,4", help="sizes of the group, separated by commas")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds in which a turn must be over")
    parser.add_argument(
        "--memory",
        choices=("kept", "returned"),
        default="kept",
        help="what glibc does with freed tensors: its default is to return large ones to the system",
    )
    parser.set_defaults(threads=1, seconds=8.0, warmup=1)
    args = checked(parser)
    worlds = [int(world) for world in args.ranks.split(",")]
    if not set(worlds) <= set(TOKENS):
        parser.error(f"--ranks: expected some of {list(TOKENS)}, got {worlds}")
    if args.quick:
        args.rounds, args.seconds = 3, 1.0
    names = ["dmoe", "naive", *args.contestants.split(",")] if args.contestants else list(CONTESTANTS)
    if not set(names) <= set(CONTESTANTS):
        parser.error(f"--contestants: expected some of {list(CONTESTANTS)}, got {names}")
    names = list(dict.fromkeys(names))
    cases = [Case(w, TOKENS[w], h, f, EXPERTS, k, zipf) for w in worlds for h, f, k, zipf in SHAPES]
    cases = [case for case in cases if args.cases in case.label and (not args.quick or case.hidden == 1024)]
    if not cases:
        parser.error(
            f"--cases {args.cases!r}: no such case; labels are like {Case(2, 2048, 1024, 0, EXPERTS, 2, 0.0).label!r}"
        )

    results: list[dict[str, Any]] = []
    with tqdm(total=len(cases) * args.rounds, unit="round", mininterval=1) as bar:
        for world in worlds:
            mine = [case for case in cases if case.ranks == world]
            if not mine:
                continue
            environ = KEEP_MEMORY if args.memory == "kept" else {}
            with Ranks(Rank, world, threads=args.threads, limit=args.limit, environment=environ) as ranks:
                for case in mine:
                    bar.set_postfix_str(case.label)
                    results.append(run_case(case, names, ranks, args, bar.update))

    env = environment(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / stem("dispatch", env)
    write_json(base.with_suffix(".json"), env, vars(args), results)
    write_csv(results, base.with_suffix(".csv"))
    text = report(results, env, base.name, args.memory)
    base.with_suffix(".md").write_text(text)
    plot(results, env, base.with_suffix(".png"))
    print(text)
    print(f"written: {base.name}.json, .csv, .md, .png")


def run_case(case: Case, names: list[str], ranks: Ranks, args: Any, tick: Callable[[], Any]) -> dict[str, Any]:
    """Check, count and time one case."""
    errors: dict[str, float] = {}
    for name in names:
        narrow = "fp8" in name
        ranks.call("build", case, CHECK_TOKENS, torch.float32 if narrow else torch.float64, args.seed)
        for rank, found in enumerate(ranks.call("errors", name, "naive")):
            where = f"dispatch, {case.label}, rank {rank}: {name} against the naive all-to-all"
            require_close(where, found, NARROW_TOLERANCE if narrow else 1e-12)
            errors[name] = max(errors.get(name, 0.0), *found.values())

    ranks.call("build", case, case.tokens, torch.float32, args.seed + 1)
    traffic = {name: ranks.call("traffic", name) for name in names}
    check_bytes(case, traffic, ranks.call("choices"))

    samples: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    order = random.Random(args.seed)
    turns = list(names)
    spent = 0.0
    for i in range(-args.warmup, args.rounds):
        order.shuffle(turns)
        for name in turns:
            if i >= 3 and spent > args.seconds * len(names):
                continue  # three rounds at least, and whole ones
            every = ranks.call("time", name)
            slowest = max(forward for forward, _ in every), max(both for _, both in every)
            spent += slowest[1]
            if i >= 0:
                samples[name].append(slowest)
        if i >= 0:
            tick()
    rounds = min(len(kept) for kept in samples.values())
    samples = {name: kept[:rounds] for name, kept in samples.items()}
    return {
        "case": {**vars(case), "label": case.label, "routing": case.routing},
        "traffic": traffic,
        "copies": {
            "measured": statistics.fmean(found["rows"] / found["tokens"] for found in traffic["dmoe"]),
            "naive": statistics.fmean(found["naive_rows"] / found["tokens"] for found in traffic["dmoe"]),
            "closed form": copies_closed_form(case.ranks, case.experts, case.top_k),
        },
        "errors": errors,
        "timings": {
            name: {
                "forward": Timing.of([forward for forward, _ in kept]),
                "forward + backward": Timing.of([both for _, both in kept]),
            }
            for name, kept in samples.items()
        },
        "ratios": {name: ratios(samples["naive"], samples[name]) for name in names},
    }


def ratios(naive: list[tuple[float, float]], other: list[tuple[float, float]]) -> dict[str, Timing]:
    """How many times the naive one's speed, round by round: a slow moment of the machine falls on both."""
    return {
        phase: Timing.of([theirs[n] / mine[n] for theirs, mine in zip(naive, other, strict=True)])
        for n, phase in enumerate(("forward", "forward + backward"))
    }


def check_bytes(case: Case, traffic: dict[str, list[dict[str, int]]], choices: list[torch.Tensor]) -> None:
    """Every way to know the bytes has to give the same number, on each rank.

    Raises:
        CheckError: names the contestant, the rank and both numbers.
    """
    rows = counted_rows(choices, case.experts)
    naive_rows = counted_rows(choices, case.experts, naive=True)
    naive_wire = Wire.naive(case.hidden, case.experts // case.ranks, "fp32")
    for name, by_rank in traffic.items():
        narrow = "fp8" in name
        wire = Wire.deduplicated(case.hidden, case.top_k, "fp32", narrow=narrow)
        deduplicated = "naive" not in name
        forward = wire.forward(rows) if deduplicated else naive_wire.forward(naive_rows)
        backward = wire.backward(rows) if deduplicated else naive_wire.backward(naive_rows)
        for rank, found in enumerate(by_rank):
            expected = {"forward": int(forward[rank]), "backward": int(backward[rank])}
            if deduplicated:
                expected["metrics"] = int(forward[rank])
                counts = (case.ranks - 1) * naive_wire.counts
                expected["metrics_naive"] = int(naive_wire.forward(naive_rows)[rank]) - counts
            off = {k: (found[k], v) for k, v in expected.items() if found[k] != v}
            if off:
                listed = ", ".join(f"{key} {got}, expected {want}" for key, (got, want) in off.items())
                raise CheckError(f"dispatch, {case.label}, rank {rank}: bytes of {name}: {listed}")


# ------------------------------------------------------------------------------------------------------------ report


def megabytes(entry: dict[str, Any], name: str, *phases: str) -> float:
    """Mean over the ranks of what one sends, in 10**6 bytes."""
    return statistics.fmean(sum(found[phase] for phase in phases) for found in entry["traffic"][name]) / 1e6


def report(results: list[dict[str, Any]], env: dict[str, Any], name: str, memory: str) -> str:
    """All tables as Markdown."""
    movement = [entry for entry in results if not entry["case"]["ffn"]]
    layers = [entry for entry in results if entry["case"]["ffn"]]
    parts = [
        "# Tokens to other ranks and back, on gloo",
        describe(env),
        f"![speed over the naive all-to-all]({name}.png)",
        f"E = {EXPERTS} experts, float32, T tokens on each rank, one machine: gloo's TCP over the loopback device. The "
        "naive all-to-all sends one row for each choice of each token, as MegaBlocks does, in plain PyTorch; `naive, "
        "dmoe's gathers` is the same with dmoe's gather and weighted sum, so that the rows on the wire are what is "
        f"left to differ. Freed memory is {memory}{' by the processes' if memory == 'kept' else ' to the system'}. "
        "Before timing, outputs and all gradients agreed in float64 within a relative norm of 1e-12.",
        "## Bytes",
        "10^6 bytes that one rank sends to others in a forward (rows, their choices, results, counts), mean over the "
        "ranks. On the wire, in the dispatcher's metrics and as `parts/ep_bytes.py` predicts: the same number on every "
        "rank, else there is no report. Copies: rows of one token, that to its own rank included; the closed form "
        "holds for the uniform routing.",
        _bytes(movement),
    ]
    notes = (
        "Median milliseconds of forward + backward; ratios are the naive one's seconds over dmoe's, the median over "
        "rounds in which both ran, in brackets the 10th and 90th percentile. "
        f"{env['cores']} cores carry all ranks and both ends of every connection, and other programs ran beside: "
        "believe the ratios rather than the times."
    )
    what = {
        "Movement alone": "An expert scales its rows. The naive all-to-all brings a row for each choice, so it scales "
        "K rows for a token; dmoe scales a row once with the sum over its local experts.",
        "With experts of width F": "Gated experts, F = 256, by the same grouped products for all: what dmoe saved on "
        "the wire it now expands on arrival.",
    }
    for (title, meaning), entries in zip(what.items(), (movement, layers), strict=True):
        if entries:
            parts += [f"## {title}", f"{meaning} {notes}", _times(entries), _aims(entries), *_remark(entries)]
            notes = "Figures as above."
    return "\n\n".join(parts) + "\n"


def _bytes(entries: list[dict[str, Any]]) -> str:
    narrow = [name for name in CONTESTANTS if "fp8" in name and name in entries[0]["traffic"]] if entries else []
    rows = []
    for entry in entries:
        naive, dmoe = (megabytes(entry, n, "forward") for n in ("naive", "dmoe"))
        cells = [f"{naive:.3f}", f"{dmoe:.3f}", f"{dmoe / naive:.3f}"]
        for n in narrow:
            cells += [f"{megabytes(entry, n, 'forward'):.3f}", f"{megabytes(entry, n, 'forward') / naive:.3f}"]
        copies = entry["copies"]
        expected = f"{copies['closed form']:.3f}" if not entry["case"]["zipf"] else "-"
        rows.append([_shape(entry), *cells, f"{copies['naive']:.3f}", f"{copies['measured']:.3f}", expected])
    header = ["W, T, H, K, routing", "naive", "deduplicated", "/ naive"]
    header += [text for n in narrow for text in (n.removeprefix("dmoe ") + " wire", "/ naive")]
    return markdown_table([*header, "copies, naive", "copies, deduplicated", "closed form"], rows)


def _times(entries: list[dict[str, Any]]) -> str:
    names = [name for name in CONTESTANTS if name in entries[0]["timings"]]
    rivals = [name for name in names if name.startswith("naive")]
    phase, rows = "forward + backward", []
    for entry in entries:
        cells = [milliseconds(entry["timings"][name][phase].median) for name in names]
        fast = entry["ratios"]["dmoe"]
        ratio = fast[phase]
        forward = fast["forward"]
        cells += [f"{forward.median:.2f}", f"{ratio.median:.2f} ({ratio.p10:.2f} to {ratio.p90:.2f})"]
        for name in rivals[1:]:
            cells.append(f"{entry['timings'][name][phase].median / entry['timings']['dmoe'][phase].median:.2f}")
        rows.append([_shape(entry), *cells, str(ratio.rounds)])
    header = ["W, T, H, K, routing", *names, "naive / dmoe, forward", "naive / dmoe, forward + backward"]
    return markdown_table([*header, *(f"{name} / dmoe" for name in rivals[1:]), "rounds"], rows)


def _aims(entries: list[dict[str, Any]]) -> str:
    missed = [
        f"- {_shape(entry)}: {ratio.median:.2f}"
        for entry in entries
        if entry["case"]["top_k"] == 8 and (ratio := entry["ratios"]["dmoe"]["forward + backward"]).median < AIM
    ]
    aim = f"{AIM} times at K = 8"
    return f"Below the aim of {aim}:\n\n" + "\n".join(missed) if missed else f"The aim, {aim}, is met in every case."


def _remark(entries: list[dict[str, Any]]) -> list[str]:
    """A warning where a budget or a busy machine left few rounds."""
    few = sum(entry["ratios"]["dmoe"]["forward"].rounds < 5 for entry in entries)
    return [f"{few} of {len(entries)} cases have fewer than five rounds: their ratios say little."] if few else []


def _shape(entry: dict[str, Any]) -> str:
    case = entry["case"]
    return ", ".join(str(case[key]) for key in ("ranks", "tokens", "hidden", "top_k", "routing"))


def write_csv(results: list[dict[str, Any]], path: Path) -> None:
    """One line for each case and contestant."""
    with path.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        keys = ["ranks", "tokens", "hidden", "ffn", "experts", "top_k", "routing"]
        sizes = ["bytes_forward", "bytes_backward", "copies", "copies_closed_form"]
        times = ["forward_s", "forward_backward_s", "speed_over_naive", "p10", "p90", "rounds"]
        out.writerow([*keys, "contestant", *sizes, *times])
        for entry in results:
            case = entry["case"]
            for name, seconds in entry["timings"].items():
                ratio = entry["ratios"][name]["forward + backward"]
                copies = entry["copies"]["naive" if "naive" in name else "measured"]
                sent = (round(1e6 * megabytes(entry, name, phase)) for phase in ("forward", "backward"))
                medians = (seconds["forward"].median, seconds["forward + backward"].median)
                figures = (*medians, ratio.median, ratio.p10, ratio.p90)
                expected = entry["copies"]["closed form"]
                line = [*(case[key] for key in keys), name, *sent, f"{copies:.4f}", f"{expected:.4f}"]
                out.writerow([*line, *(f"{figure:.5g}" for figure in figures), ratio.rounds])


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """Speed over the naive all-to-all, a panel for each kind of case, beside the share of bytes saved."""
    panels = [(t, [e for e in results if bool(e["case"]["ffn"]) == w]) for t, w in (("movement", 0), ("experts", 1))]
    panels = [(title, entries) for title, entries in panels if entries]
    most = max(len(entries) for _, entries in panels)
    figure, axes = new_figure(len(panels), width=(1.6 + 0.52 * most) * len(panels), height=4.6)
    for axis, (title, entries) in zip(axes, panels, strict=True):
        axis.axhline(AIM, color="#999999", lw=1, ls="--", zorder=1)
        axis.axhline(1, color="#333333", lw=1, zorder=1)
        shift = 0.0
        for n, name in enumerate(name for name in CONTESTANTS if name != "naive" and name in entries[0]["ratios"]):
            found = [entry["ratios"][name]["forward + backward"] for entry in entries]
            bars = [[t.median - t.p10 for t in found], [t.p90 - t.median for t in found]]
            xs = [x + shift for x in range(len(entries))]
            axis.errorbar(
                xs, [t.median for t in found], yerr=bars, fmt="o", ms=6, elinewidth=1, color=COLOURS[n], label=name
            )
            shift += 0.2
        saved = [megabytes(e, "naive", "forward") / megabytes(e, "dmoe", "forward") for e in entries]
        axis.plot(range(len(entries)), saved, "_", ms=16, color=COLOURS[3], label="bytes, naive / dmoe")
        labels = [_shape(entry).replace(", ", "\n") for entry in entries]
        axis.set_xticks(range(len(entries)), labels, fontsize=7)
        axis.set_xlabel("W, T, H, K, routing (downwards)")
        axis.set_title(title + (", F = 256" if title == "experts" else " alone"))
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("times the naive all-to-all's speed (dashed: the aim)")
    axes[0].legend(fontsize=8, frameon=False)
    where = f"gloo on {env['hardware']}, {env['cores']} cores"
    figure.suptitle(f"Forward + backward of dispatch and combine, {where} (higher is better)", x=0.07, ha="left")
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main, RankFailedError)
