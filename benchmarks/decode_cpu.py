"""How fast are the experts of a decode step or a small batch on the CPU, beside Transformers' own three ways?

    python benchmarks/decode_cpu.py [--quick] [--cases "bf16 plain"] [--threads 2] [--clock wall]

Transformers' experts modules (Mixtral's: weights (E, 2F, H), (E, H, F); Aria's: transposed, (E, H, 2F), (E, F, H))
run by ``eager``, ``grouped_mm`` and ``batched_mm``, and ``dmoe.functional.moe_mlp`` on the same parameters: forward
alone without gradients, and forward + backward with gradients that start from None. New tokens and a new routing in
every round, the same for all. Outputs and gradients agree with a float64 loop over experts before anything is timed.

Contestants take turns call by call in a shuffled order, and what is compared is the median over rounds of a rival's
time over dmoe's in the same round. ``--clock cpu`` counts the processor's seconds of one thread instead of the wall's:
for a machine that others use. ``ONEDNN_MAX_CPU_ISA=AVX512_CORE``, or ``AVX2`` with ``ATEN_CPU_CAPABILITY=avx2``,
imitate processors without bfloat16 instructions, for Transformers' ways and for dmoe.
"""

from __future__ import annotations

import csv
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from parts.decode import DTYPES, Case, Step, build, check, run
from parts.harness import (
    CLOCKS,
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
    stem,
    stopwatch,
)
from torch import nn
from tqdm import tqdm

RIVALS = ("eager", "grouped_mm", "batched_mm")
TOKENS = (1, 8, 16, 32, 64, 128)
MID, OLMOE = (512, 256, 32, 4), (2048, 1024, 64, 8)  # H, F, E, K
SLOW = 0.05  # seconds of a step, from which a turn is one
EQUAL = 0.97  # of a rival's time: within the spread of pairs


def read_seconds(module: nn.Module, clock: Callable[[], float]) -> float:
    """What one pass over all weights costs: a sum of them as 64-bit integers."""
    weights = [weight.detach().flatten().view(torch.int64) for weight in module.parameters()]
    samples = []
    for _ in range(5):
        start = clock()
        for weight in weights:
            weight.sum()
        samples.append(clock() - start)
    return statistics.median(samples)


def measure(case: Case, module: nn.Module, names: list[str], args: Any) -> dict[str, list[float | None]]:
    """Seconds of each contestant by round; None where a slow one had no turn."""
    clock, train = CLOCKS[args.clock], case.passes != "forward"
    order, spent = random.Random(args.seed), dict.fromkeys(names, 0.0)
    samples: dict[str, list[float | None]] = {name: [] for name in names}
    slow = dict.fromkeys(names, False)
    for i in range(-args.warmup, args.rounds):
        turns = list(names)
        order.shuffle(turns)
        for who in turns:
            if i > 0 and spent[who] > args.seconds:
                samples[who].append(None)
                continue
            # Gradients are large: whether their memory has just been given back to the system, or lies ready, is the
            # work of whoever ran before. A step of one's own, which does not count, comes in between.
            before = [10_000 + i] if train and not slow[who] else []
            for seed in (*before, 100 + i):
                seconds = timed(module, who, Step.of(case, seed), train, clock)
                spent[who] += seconds
            slow[who] = seconds > SLOW
            if i >= 0:
                samples[who].append(seconds)
    return samples


def timed(module: nn.Module, who: str, step: Step, train: bool, clock: Callable[[], float]) -> float:
    """Seconds of one step, whose gradients are left to nobody."""

    def once() -> None:
        with torch.set_grad_enabled(train):
            y = run(module, who, step)
            if train:
                y.backward(step.grad)

    seconds = stopwatch(once, clock)
    for leaf in (step.x, step.gates, *module.parameters()):
        leaf.grad = None
    return seconds


def run_case(case: Case, module: nn.Module, names: list[str], reading: float, args: Any) -> dict[str, Any]:
    """Check and time one case."""
    errors = check(case, module, names)
    samples = measure(case, module, names, args)
    medians = {who: statistics.median(s for s in times if s is not None) for who, times in samples.items()}
    ratios = {}
    for who in names[:-1]:
        pairs = [a / b for a, b in zip(samples[who], samples["dmoe"], strict=True) if a is not None and b is not None]
        ordered = sorted(pairs)
        ratios[who] = {
            "median": statistics.median(pairs),
            "p10": ordered[len(pairs) // 10],
            "p90": ordered[-1 - len(pairs) // 10],
            "pairs": len(pairs),
        }
    experts = case.shape[2]
    touched = statistics.mean(Step.of(case, 100 + i).indices.unique().numel() for i in range(args.rounds)) / experts
    return {
        "case": {**vars(case), "label": case.label},
        "seconds": medians,
        "ratios": ratios,
        "reading": reading * touched,  # of the chosen experts' weights, once
        "errors": errors,
    }


def nearest(entry: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The rival that is fastest beside dmoe, and its times over dmoe's."""
    who = min(entry["ratios"], key=lambda name: entry["ratios"][name]["median"])
    return who, entry["ratios"][who]


def report(results: list[dict[str, Any]], env: dict[str, Any], args: Any, name: str) -> str:
    """All tables as Markdown."""
    unit = "wall clock" if args.clock == "wall" else "the processor's time of one thread"
    parts = [
        "# Experts of a decode step and of small batches on the CPU",
        describe(env),
        f"![a rival's time over dmoe's]({name}.png)",
        f"Median milliseconds ({unit}); new tokens and a new routing in every round. *Nearest rival over dmoe*: the "
        "median over rounds of its time over dmoe's in the same round, and the 10th and 90th percentile; above 1 dmoe "
        "is faster. *Reading*: what summing the chosen experts' weights costs, over dmoe's time; weights that fit a "
        "cache are read from there. Outputs and gradients of all agreed with a float64 loop before anything was timed.",
    ]
    for passes in dict.fromkeys(entry["case"]["passes"] for entry in results):
        rows = []
        for entry in (e for e in results if e["case"]["passes"] == passes):
            case, (who, ratio) = entry["case"], nearest(entry)
            cells = [milliseconds(entry["seconds"][n]) if n in entry["seconds"] else "-" for n in (*RIVALS, "dmoe")]
            spread = f"{ratio['median']:.2f} ({ratio['p10']:.2f} to {ratio['p90']:.2f}), {who}"
            share = f"{entry['reading'] / entry['seconds']['dmoe']:.2f}" if passes == "forward" else "-"
            title = f"{case['dtype']}, {case['layout']}, {', '.join(map(str, case['shape']))}, {case['tokens']}"
            rows.append([title, *cells, spread, share])
        header = ["dtype, weights, H, F, E, K, T", *RIVALS, "dmoe", "nearest rival over dmoe", "reading"]
        parts += [f"## {passes.capitalize()}", markdown_table(header, rows)]
    behind = [f"- {e['case']['label']}: {nearest(e)[1]['median']:.2f}" for e in results if lost(e)]
    parts.append("Behind a rival:\n\n" + "\n".join(behind) if behind else "First on every line.")
    return "\n\n".join(parts) + "\n"


def lost(entry: dict[str, Any]) -> bool:
    """Whether a rival was faster, by more than counts as equal."""
    return nearest(entry)[1]["median"] < EQUAL


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """The nearest rival's time over dmoe's by T, a panel for each pass."""
    passes = list(dict.fromkeys(entry["case"]["passes"] for entry in results))
    figure, axes = new_figure(len(passes), width=5.5 * len(passes), height=4.2)
    for axis, one in zip(axes, passes, strict=True):
        entries = [entry for entry in results if entry["case"]["passes"] == one]
        lines: dict[str, list[tuple[int, float]]] = {}
        for entry in entries:
            case = entry["case"]
            label = f"{case['dtype']}, {case['layout']}, H={case['shape'][0]} E={case['shape'][2]}"
            lines.setdefault(label, []).append((case["tokens"], nearest(entry)[1]["median"]))
        draw_ratios(axis, lines, TOKENS)
        axis.set_title(one)
    axes[0].set_ylim(bottom=0)  # once all panels are drawn: they share it
    axes[0].set_ylabel("nearest rival's time over dmoe's")
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(
        f"Experts, {env['hardware']}, {env['threads']} threads (above 1: dmoe is faster)", x=0.07, ha="left"
    )
    figure.subplots_adjust(top=0.84)
    save_figure(figure, path)


def write_csv(path: Path, results: list[dict[str, Any]]) -> None:
    """One line for each case and contestant."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["passes", "dtype", "weights", "H", "F", "E", "K", "T", "contestant", "ms", "over dmoe"])
        for entry in results:
            case = entry["case"]
            for who, seconds in entry["seconds"].items():
                ratio = entry["ratios"][who]["median"] if who in entry["ratios"] else 1.0
                row = [case["passes"], case["dtype"], case["layout"], *case["shape"], case["tokens"]]
                writer.writerow([*row, who, f"{seconds * 1e3:.4f}", f"{ratio:.3f}"])


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=30)
    add_clock(parser)
    parser.set_defaults(seconds=3.0)
    args = checked(parser)
    names = [n for n in RIVALS if not args.contestants or n in args.contestants.split(",")]
    if not names:
        parser.error(f"--contestants: expected some of {', '.join(RIVALS)}, got {args.contestants!r}")
    tokens = TOKENS[:2] if args.quick else TOKENS
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 3), min(args.seconds, 1.0)
    modules = [
        (shape, dtype, layout) for shape in (MID, OLMOE) for dtype in DTYPES for layout in ("plain", "transposed")
    ]
    cases = [[Case(*key, passes, t) for passes in ("forward", "forward + backward") for t in tokens] for key in modules]
    # The large one is for decoding: a step of training would be spent on writing gradients of a gigabyte.
    chosen = [
        [c for c in group if args.cases in c.label and (c.shape == MID or (c.passes == "forward" and c.tokens <= 8))]
        for group in cases
    ]
    if not any(chosen):
        parser.error(f"--cases {args.cases!r}: no such case; labels are like {cases[0][0].label!r}")
    results = []
    with tqdm(total=sum(map(len, chosen)), unit="case", mininterval=1) as bar:
        for key, group in zip(modules, chosen, strict=True):
            if not group:
                continue
            module = build(*key)
            reading = read_seconds(module, CLOCKS[args.clock])
            for case in group:
                bar.set_postfix_str(case.label)
                results.append(run_case(case, module, [*names, "dmoe"], reading, args))
                bar.update()
    results.sort(key=lambda entry: entry["case"]["passes"])
    env = environment(args.threads, args.clock)
    args.out.mkdir(parents=True, exist_ok=True)
    write_csv(args.out / f"{stem('decode_cpu', env)}.csv", results)
    publish(
        "decode_cpu",
        env,
        args,
        results,
        report=lambda title: report(results, env, args, title),
        plot=lambda path: plot(results, env, path),
    )


if __name__ == "__main__":
    run_benchmark(main)
