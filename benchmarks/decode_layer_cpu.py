"""How fast is ``dmoe.MoE`` on the CPU when it decodes 1 to 16 tokens, and what does a forward cost before it computes?

    python benchmarks/decode_layer_cpu.py [--quick] [--cases "E=64"] [--clock cpu --threads 1]

The whole layer, router included, on the shapes of ``SHAPES``: forward under ``torch.inference_mode()`` of a module that
evaluates, new tokens in every call, several calls in a turn. Contestants, their processes and the check against float64
are those of ``layer_cpu.py``; ``decode_cpu.py`` has the experts alone. A second table counts what a forward of a layer
of almost no arithmetic costs: operations, and microseconds.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts.harness import (
    add_clock,
    arguments,
    checked,
    describe,
    draw_ratios,
    environment,
    markdown_table,
    milliseconds,
    new_figure,
    publish,
    run_benchmark,
    save_figure,
    time_cells,
)
from parts.layer_bench import RIVALS
from parts.layer_case import Case
from parts.layer_report import nearest
from parts.layer_run import (
    MOST,
    TOLERANCE,
    add_layer_options,
    chosen_cases,
    chosen_contestants,
    run_case,
    workers_of,
)
from parts.workers import Worker
from tqdm import tqdm

SHAPES = ((512, 256, 8, 2), (512, 256, 64, 8), (512, 256, 256, 8))  # H, F, E, K
TOKENS = (1, 4, 16)
TINY = Case(1, 16, 16, 8, 2, "fp32", "inference")
CONTESTANTS = ("dmoe", *RIVALS)


def run_line(case: Case, workers: dict[str, Worker], args: Any, tick: Any) -> dict[str, Any]:
    """One case, with what dmoe's forward reads at the least, and what reading so much costs."""
    entry = run_case("decode_layer_cpu", case, workers, args, ["changing"], tick)
    chosen = entry["load"]["chosen"]
    entry["chosen_bytes"] = chosen * case.expert_bytes
    entry["reading"] = workers["dmoe"].call("read_seconds") * chosen / case.experts
    return entry


def report(results: list[dict[str, Any]], tiny: dict[str, Any], env: dict[str, Any], name: str) -> str:
    """Both tables as Markdown."""
    names = [n for n in CONTESTANTS if n in tiny["timings"]["changing"]]
    rows = []
    for entry in results:
        case, timings = entry["case"], entry["timings"]["changing"]
        rival, times = nearest(entry, "changing")
        mine = timings["dmoe"]
        rows.append(
            [
                ", ".join(str(case[key]) for key in ("dtype", "hidden", "ffn", "experts", "top_k", "tokens")),
                *time_cells(timings, names, "dmoe", names),
                f"{milliseconds(mine.p10)} to {milliseconds(mine.p90)}",
                f"{times:.2f}, {rival}",
                f"{case['experts'] * case['expert_bytes'] / 1e6:.0f}",
                f"{entry['chosen_bytes'] / 1e6:.1f}",
                f"{entry['reading'] / mine.median:.2f}",
            ]
        )
    header = ["dtype, H, F, E, K, T", *names, "dmoe, p10 to p90", "nearest rival over dmoe"]
    header += ["weights, MB", "chosen, MB", "reading"]
    behind = [
        f"- {entry['case']['label']}: {times:.2f}, {rival}"
        for entry in results
        for rival, times in [nearest(entry, "changing")]
        if times < 1
    ]
    parts = [
        "# Decoding with a MoE layer on the CPU",
        describe(env),
        f"![the nearest rival's time over dmoe's]({name}.png)",
        "The whole layer, router included, in inference: median milliseconds of a call, each with new tokens, up to "
        f"{MOST} calls in a turn; in brackets, how many times dmoe's; bold: the fastest. *Weights*: bytes of all "
        "experts; *chosen*: of those that a call's tokens go to, in the mean. *Reading*: what summing the chosen "
        "experts' weights as integers costs, over dmoe's time (from the cache where all weights fit there). Outputs of "
        "all agreed with a float64 loop over experts within a relative norm of "
        + " and ".join(f"{tolerance:.0e} ({dtype})" for dtype, tolerance in TOLERANCE.items())
        + " before anything was timed.",
        markdown_table(header, rows),
        "Behind a rival:\n\n" + "\n".join(behind) if behind else "First on every line.",
        "## What a forward costs before it computes",
        f"A layer of almost no arithmetic ({TINY.label}). *Called from Python*: operations that the contestant's "
        "Python calls; *in all*: with those that these call through PyTorch's dispatcher, as its profiler sees them.",
        _overhead(tiny, names),
    ]
    return "\n\n".join(parts) + "\n"


def _overhead(tiny: dict[str, Any], names: list[str]) -> str:
    timings = tiny["timings"]["changing"]
    rows = []
    for name in names:
        timing, (outer, every) = timings[name], tiny["operations"][name]
        spread = f"{timing.p10 * 1e6:.0f} to {timing.p90 * 1e6:.0f}"
        rows.append([name, str(outer), str(every), f"{timing.median * 1e6:.0f}", spread])
    return markdown_table(["", "called from Python", "in all", "microseconds of a forward", "p10 to p90"], rows)


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """The nearest rival's time over dmoe's by T, a panel for each dtype, a line for each E."""
    dtypes = list(dict.fromkeys(entry["case"]["dtype"] for entry in results))
    figure, axes = new_figure(len(dtypes), width=5.0 * len(dtypes), height=4.0)
    for axis, dtype in zip(axes, dtypes, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for entry in (e for e in results if e["case"]["dtype"] == dtype):
            case = entry["case"]
            points = lines.setdefault(f"E={case['experts']} K={case['top_k']}", [])
            points.append((case["tokens"], nearest(entry, "changing")[1]))
        draw_ratios(axis, lines, TOKENS)
        axis.set_title(dtype)
    axes[0].set_ylim(bottom=0)  # once all panels are drawn: they share it
    axes[0].set_ylabel("nearest rival's time over dmoe's")
    axes[0].legend(fontsize=8, frameon=False)
    title = f"Decoding, MoE layer, {env['hardware']}, {env['threads']} threads (above 1: dmoe is faster)"
    figure.suptitle(title, x=0.07, ha="left")
    figure.subplots_adjust(top=0.84)
    save_figure(figure, path)


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=30)
    add_layer_options(parser)
    add_clock(parser)
    parser.set_defaults(seconds=5.0)
    args = checked(parser)
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 3), min(args.seconds, 1.0)
    every = [
        Case(tokens, *shape, dtype, "inference")
        for dtype in args.dtypes.split(",")
        for shape in (SHAPES[:2] if args.quick else SHAPES)
        for tokens in (TOKENS[:1] if args.quick else TOKENS)
    ]
    cases, names = chosen_cases(parser, args, every), chosen_contestants(parser, args, CONTESTANTS)

    with (
        workers_of(names, args) as workers,
        tqdm(total=(len(cases) + 1) * args.rounds, unit="round", mininterval=1) as bar,
    ):
        tiny = run_case("decode_layer_cpu", TINY, workers, args, ["changing"], lambda: bar.update())
        tiny["operations"] = {name: workers[name].call("operations") for name in tiny["timings"]["changing"]}
        results = []
        for case in cases:
            bar.set_postfix_str(case.label)
            results.append(run_line(case, workers, args, lambda: bar.update()))
    env = environment(args.threads, args.clock)
    env["of_a_tiny_layer"] = tiny
    publish(
        "decode_layer_cpu",
        env,
        args,
        results,
        report=lambda name: report(results, tiny, env, name),
        plot=lambda path: plot(results, env, path),
    )


if __name__ == "__main__":
    run_benchmark(main)
