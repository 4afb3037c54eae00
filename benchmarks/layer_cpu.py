"""How fast is a training step of ``dmoe.MoE`` on the CPU, beside other ways to write the same layer?

    python benchmarks/layer_cpu.py [--quick] [--cases "T=512 H=512"] [--contestants "floor,HF eager"] [--threads 2]

Forward and backward of one Qwen3-MoE-style layer, on the same weights, outputs and gradients checked against a float64
loop over experts before anything is timed. Each contestant has a process of its own, and they take turns. Two regimes:

- changing: every step has new tokens, so the rows per expert change from step to step, as in training;
- fixed: the same tokens again and again, which flatters whoever pays for each new shape.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parts.harness import (
    COLOURS,
    Timing,
    arguments,
    available_memory,
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
    time_cells,
)
from parts.layers import CONTESTANTS, RIVALS, Bench, Case, make_step, make_weights, reference, route
from parts.workers import Worker, WorkerError, worst_errors
from tqdm import tqdm

SHAPES = (  # T, H, F, E, K
    (512, 256, 128, 8, 2),
    (2048, 512, 256, 16, 4),
    (2048, 512, 128, 64, 8),
    (512, 512, 1024, 8, 2),
    (2048, 512, 1024, 8, 2),
    (512, 512, 128, 64, 8),
)
QUICK_SHAPES = (SHAPES[0], SHAPES[5])
REGIMES = ("changing", "fixed")
# Relative norms against float64. Half of bfloat16's last place is 2e-3 of a value, and a gradient passes four
# roundings; Hugging Face's router also rounds logits and gate weights. A swapped weight or a lost row is off by more.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}
AIM = 1.15  # times the floor
SLOW = 1.0  # seconds of a step from which a turn is one step


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=25)
    parser.add_argument("--dtypes", default="fp32,bf16", help="separated by commas")
    parser.add_argument(
        "--memory-gib", type=float, default=0.6 * available_memory() / 2**30, help="most that one may use"
    )
    args = checked(parser)
    shapes = QUICK_SHAPES if args.quick else SHAPES
    cases = [Case(*shape, dtype) for dtype in args.dtypes.split(",") for shape in shapes]
    cases = [case for case in cases if args.cases in case.label]
    if not cases or not set(args.dtypes.split(",")) <= set(TOLERANCE):
        like = Case(*SHAPES[0], "fp32").label
        parser.error(f"--cases {args.cases!r}, --dtypes {args.dtypes!r}: no such case; labels are like {like!r}")
    wanted = ["dmoe", *args.contestants.split(",")] if args.contestants else list(CONTESTANTS)
    unknown = set(wanted) - set(CONTESTANTS)
    if unknown:
        parser.error(f"--contestants: expected some of {list(CONTESTANTS)}, got {sorted(unknown)}")
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 3), min(args.seconds, 2.0)

    workers = {name: Worker(Bench, name, threads=args.threads) for name in CONTESTANTS if name in wanted}
    results: list[dict[str, Any]] = []
    try:
        with tqdm(total=len(cases) * len(REGIMES) * args.rounds, unit="round", mininterval=1) as bar:
            for case in cases:
                bar.set_postfix_str(case.label)
                results.append(run_case(case, workers, args, lambda: bar.update()))
    finally:
        for worker in workers.values():
            worker.close()

    env = environment(args.threads)
    publish(
        "layer_cpu",
        env,
        args,
        results,
        report=lambda name: report(results, env, name),
        plot=lambda path: plot(results, env, path),
    )


def run_case(case: Case, workers: dict[str, Worker], args: Any, tick: Callable[[], None]) -> dict[str, Any]:
    """Build, check and time one case; contestants that cannot run it are listed with the reason."""
    reasons: dict[str, str] = {}
    field = dict(workers)
    for name, worker in workers.items():
        try:
            reason = worker.call("build", case, int(args.memory_gib * 2**30))
            if not reason:
                worker.call("time", [0])  # does it run at all?
        except WorkerError as error:
            if name.startswith("dmoe"):
                raise
            reason = str(error).strip().splitlines()[-1]
        if reason:
            reasons[name] = reason
            del field[name]

    errors = worst_errors(f"layer_cpu, {case.label}", field, lambda seed: reference(case, seed), TOLERANCE[case.dtype])

    saved = {name: worker.call("saved_bytes") for name, worker in field.items()}
    faults: dict[str, int] = {}
    slow = dict.fromkeys(field, False)
    timings: dict[str, dict[str, Timing]] = {}
    for regime in REGIMES:

        def turn(name: str, regime: str = regime) -> Callable[[int], float]:
            def seconds(i: int) -> float:
                # Two steps, the second counts; only that one where steps are slow. Seeds are never used twice in the
                # changing regime.
                first = 100 + 2 * (args.warmup + i)
                seeds = [first, first + 1] if regime == "changing" else [0, 0]
                elapsed, faults[name] = workers[name].call("time", seeds[: 1 if slow[name] else 2])
                slow[name] = elapsed > SLOW
                return float(elapsed)

            return seconds

        timings[regime] = interleave(
            {name: turn(name) for name in field},
            rounds=args.rounds,
            warmup=args.warmup,
            seconds_each=args.seconds,
            seed=args.seed,
            tick=tick,
        )
    return {
        "case": {**vars(case), "label": case.label, "expert_flops": case.flops},
        "load": load(case, args.rounds),
        "timings": timings,
        "not_run": reasons,
        "saved_bytes": saved,
        "page_faults_of_last_step": faults,
        "errors": errors,
    }


def load(case: Case, steps: int) -> dict[str, float]:
    """How uneven the changing regime's routing is: an expert's rows over the mean; least, most, standard deviation."""
    router = make_weights(case)["router"]
    ratios = []
    for seed in range(100, 100 + min(steps, 8)):
        counts = torch.bincount(
            route(make_step(case, router, seed)[0], router, case.top_k)[1].flatten(), minlength=case.experts
        )
        ratios.append(counts * case.experts / case.rows)
    every = torch.stack(ratios)
    return {"least": float(every.min()), "most": float(every.max()), "spread": float(every.std())}


# ------------------------------------------------------------------------------------------------------------ report


def lost(entry: dict[str, Any], regime: str) -> list[str]:
    """Contestants of the same work that were faster than dmoe."""
    timings = entry["timings"][regime]
    return [name for name in RIVALS if name in timings and timings[name].median < timings["dmoe"].median]


def over_floor(entry: dict[str, Any], regime: str) -> float | None:
    """dmoe's median over the floor's."""
    timings = entry["timings"][regime]
    return timings["dmoe"].median / timings["floor"].median if "floor" in timings else None


def report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    """All tables as Markdown."""
    names = [
        n for n in CONTESTANTS if any(n in entry["timings"]["fixed"] or n in entry["not_run"] for entry in results)
    ]
    parts = [
        "# One training step of a MoE layer on the CPU",
        describe(env),
        f"![times of all contestants over the floor]({name}.png)",
        "Forward + backward, median milliseconds; in brackets, how many times dmoe's. Bold: the fastest that computes "
        "the layer. The dense FFN (width K * F: equal FLOPs, another function) and the floor (the experts' bare matrix "
        "products) are marks to measure by. Before timing, output and gradients of input, router and experts of each "
        "agreed with a float64 loop over experts, within a relative norm of "
        + " and ".join(f"{tolerance:.0e} ({dtype})" for dtype, tolerance in TOLERANCE.items())
        + ". Percentiles, errors, loads and page faults are in the JSON.",
    ]
    for regime in REGIMES:
        for dtype in dict.fromkeys(entry["case"]["dtype"] for entry in results):
            chosen = [entry for entry in results if entry["case"]["dtype"] == dtype]
            title = "every step has new tokens" if regime == "changing" else "the same tokens in every step"
            parts += [f"## {dtype}, {title}", _times(chosen, regime, names)]
            parts += _remarks(chosen, regime)
    parts += ["## Saved for backward beside the parameters, MiB", _saved(results, names)]
    reasons = [f"- {e['case']['label']}, {n}: {why}" for e in results for n, why in e["not_run"].items()]
    if reasons:
        parts += ["## Not run", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"


def _times(entries: list[dict[str, Any]], regime: str, names: list[str]) -> str:
    rows = []
    for entry in entries:
        timings = entry["timings"][regime]
        cells = time_cells(timings, names, "dmoe", ("dmoe", *RIVALS))
        ratio = over_floor(entry, regime)
        mine = timings["dmoe"]
        spread = f"{milliseconds(mine.p10)} to {milliseconds(mine.p90)}"
        rows.append([_shape(entry), *cells, spread, "-" if ratio is None else f"{ratio:.2f}"])
    return markdown_table(["T, H, F, E, K", *names, "dmoe, p10 to p90", "dmoe / floor"], rows)


def _remarks(entries: list[dict[str, Any]], regime: str) -> list[str]:
    beaten = {_shape(entry): lost(entry, regime) for entry in entries}
    above = {_shape(entry): over_floor(entry, regime) for entry in entries}
    lines = [f"- {shape}: behind {', '.join(names)}" for shape, names in beaten.items() if names]
    lines += [
        f"- {shape}: {ratio:.2f} times the floor; the aim is {AIM}"
        for shape, ratio in above.items()
        if ratio and ratio > AIM
    ]
    return ["Aims missed:\n\n" + "\n".join(lines)] if lines else ["Every aim is met."]


def _saved(results: list[dict[str, Any]], names: list[str]) -> str:
    names = [n for n in names if n != "floor"]
    rows = [
        [
            f"{_shape(entry)}, {entry['case']['dtype']}",
            *(f"{entry['saved_bytes'][n] / 2**20:.2f}" if n in entry["saved_bytes"] else "not run" for n in names),
        ]
        for entry in results
    ]
    return markdown_table(["T, H, F, E, K, dtype", *names], rows)


def _shape(entry: dict[str, Any]) -> str:
    case = entry["case"]
    return ", ".join(str(case[key]) for key in ("tokens", "hidden", "ffn", "experts", "top_k"))


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path, regime: str = "changing") -> None:
    """Times over the floor, a panel for each dtype, the shapes side by side."""
    dtypes = list(dict.fromkeys(entry["case"]["dtype"] for entry in results))
    shown = [n for n in CONTESTANTS if n != "dmoe + balance loss"]
    figure, axes = new_figure(len(dtypes), width=6.2 * len(dtypes), height=4.8)
    ends_of: list[list[tuple[float, float, str, str]]] = []
    drawn: list[float] = []
    for axis, dtype in zip(axes, dtypes, strict=True):
        entries = [
            entry for entry in results if entry["case"]["dtype"] == dtype and "floor" in entry["timings"][regime]
        ]
        axis.axhspan(1, AIM, color="#f0e6c8", lw=0, zorder=0)
        ends: list[tuple[float, float, str, str]] = []
        for i, name in enumerate(shown):
            points = [
                (x, entry["timings"][regime][name], entry["timings"][regime]["floor"].median)
                for x, entry in enumerate(entries)
                if name in entry["timings"][regime]
            ]
            if not points:
                continue
            xs = [x for x, _, _ in points]
            ys = [timing.median / floor for _, timing, floor in points]
            bars = [[(t.median - t.p10) / f for _, t, f in points], [(t.p90 - t.median) / f for _, t, f in points]]
            bold = name == "dmoe"
            style = {"color": COLOURS[i], "marker": "o", "ms": 7 if bold else 5, "zorder": 4 if bold else 3}
            # Lines only lead the eye from one shape to the next.
            axis.plot(
                xs,
                ys,
                lw=2.4 if bold else 0.9,
                alpha=1 if bold else 0.55,
                ls="--" if name == "floor" else "-",
                color=COLOURS[i],
            )
            axis.errorbar(xs, ys, yerr=bars, ls="none", elinewidth=1, **style)
            ends.append((xs[-1], ys[-1], name, COLOURS[i]))
            drawn += ys
        axis.set_yscale("log")
        ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
        axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])
        axis.minorticks_off()
        labels = ["\n".join(_shape(entry).replace(" ", "").split(",")) for entry in entries]
        axis.set_xticks(range(len(entries)), labels, fontsize=9)
        axis.set_xlim(-0.4, len(entries) - 0.6)
        axis.set_xlabel("T, H, F, E, K (downwards)")
        axis.set_title(dtype)
        ends_of.append(ends)
    axes[0].set_ylabel("training step, times the bare products")
    where = f"{env['hardware']}, {env['threads']} threads"
    title = f"MoE layer, forward + backward, {where} (lower is better; band: the aim)"
    figure.suptitle(title, x=0.07, ha="left")
    figure.subplots_adjust(wspace=0.42, top=0.86)
    if drawn:  # the panels share their axis; ticks must not widen it
        axes[0].set_ylim(min(drawn) / 1.3, max(drawn) * 1.3)
    figure.canvas.draw()
    for axis, ends in zip(axes, ends_of, strict=True):
        label_lines(axis, ends, gap=0.052)
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
