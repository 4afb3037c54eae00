"""What does a training step of adapters on all experts cost, in time and memory, by who computes it?

    python benchmarks/lora_experts.py [--quick] [--cases "bf16 T=2048"]

The experts of a Hugging Face model (Qwen3-MoE, E = 64), frozen, with LoRA of rank 16 on both projections, new tokens
and a new routing in every turn: PEFT's wrapper of parameters on Transformers' own implementations and on dmoe's;
``dmoe.lora`` on the same module, and on four-bit experts; and the full fine-tune, in which all weights get gradients.
Before timing, outputs and gradients are compared in float64 (not those of four-bit experts, which are other weights).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from parts.harness import (
    COLOURS,
    arguments,
    checked,
    describe,
    environment,
    markdown_table,
    new_figure,
    publish,
    run_benchmark,
    save_figure,
    time_cells,
)
from parts.hf_experts import TOLERANCE, Case, errors_of, timings_of
from parts.lora_contestants import FULL, MINE, QUANTIZED, contestants_of, exact_results, peak_bytes
from tqdm import tqdm

CASES = [
    Case("lora", tokens, dtype, True, experts=64, top_k=top_k)
    for dtype in TOLERANCE
    for tokens in (512, 2048)
    for top_k in (2, 8)
]


def main() -> None:
    """Run, check, time, write."""
    args = checked(arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=21))
    words = args.cases.split()
    lines = [case for case in CASES if all(word in case.label.split() for word in words)]
    if not lines:
        raise SystemExit(f"--cases {args.cases!r}: no such case; labels are like {CASES[0].label!r}")
    if args.quick:
        args.rounds, args.seconds, lines = min(args.rounds, 3), min(args.seconds, 1.0), lines[:1]
    with tqdm(total=len(lines) * args.rounds, unit="round", mininterval=1) as bar:
        results = [_run_case(case, args, bar) for case in lines]
    env = environment(args.threads)
    publish(
        "lora_experts",
        env,
        args,
        results,
        report=lambda name: _report(results, env, name),
        plot=lambda path: _plot(results, env, path),
    )


def _run_case(case: Case, args: Any, bar: Any) -> dict[str, Any]:
    bar.set_postfix_str(case.label)
    contestants = contestants_of(case)
    truth, errors = exact_results(contestants), {}
    for contestant in contestants:
        if contestant.name in truth:
            errors[contestant.name] = errors_of(contestant, truth[contestant.name])
    del truth
    timings = timings_of(contestants, args, bar.update)
    return {
        "case": {**vars(case), "label": case.label},
        "timings": timings,
        "errors": errors,
        "saved_bytes": {c.name: c.saved_bytes() for c in contestants},
        "weight_bytes": {c.name: _bytes(c.module) for c in contestants},
        "grad_bytes": {c.name: sum(p.nbytes for p in c.parameters) for c in contestants},
        "peak_bytes": {c.name: peak_bytes(c) for c in contestants},
    }


def _bytes(module: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def _report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    names = list(results[0]["timings"])
    case = results[0]["case"]
    parts = [
        "# A training step of LoRA on all experts",
        describe(env),
        f"![times over dmoe.lora's]({name}.png)",
        f"The experts of Qwen3-MoE in Transformers: H={case['hidden']} F={case['ffn']} E={case['experts']}, rank 16 on "
        "both projections. Median milliseconds of forward and backward with new tokens and a new routing; in brackets, "
        f"how many times {MINE}'s. Before timing, outputs and gradients agreed with float64 within a relative norm of "
        + " and ".join(f"{bound:.0e} ({dtype})" for dtype, bound in TOLERANCE.items())
        + f" ({QUANTIZED} computes with other weights; its factors are float32).",
        markdown_table(
            ["dtype, tokens, K", *names],
            [[_line(e), *time_cells(e["timings"], names, MINE, names)] for e in results],
        ),
    ]
    for title, field, words in (
        ("Peak memory", "peak_bytes", "MiB by which the process grew in a step, gradients included (resident pages)"),
        ("Saved for backward", "saved_bytes", "MiB beside parameters and inputs"),
        ("Gradients", "grad_bytes", "MiB, and as much again for each of the optimizer's moments"),
        ("Weights", "weight_bytes", "MiB of experts and adapters"),
    ):
        rows = [[_line(e), *(f"{e[field][n] / 2**20:.1f}" for n in names)] for e in results]
        parts += [f"## {title}", words + ".", markdown_table(["dtype, tokens, K", *names], rows)]
    return "\n\n".join(parts) + "\n"


def _line(entry: dict[str, Any]) -> str:
    case = entry["case"]
    return f"{case['dtype']}, {case['tokens']}, {case['top_k']}"


def _plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    figure, axes = new_figure(2, width=12.5, height=4.8)
    names = [name for name in results[0]["timings"] if name != MINE]
    rows = results[::-1]
    for axis, field, words in ((axes[0], "timings", "time"), (axes[1], "peak_bytes", "peak memory of a step")):
        for colour, name in zip(COLOURS, names, strict=False):
            ratios = []
            for entry in rows:
                mine, other = entry[field][MINE], entry[field][name]
                ratios.append(other.median / mine.median if field == "timings" else other / max(mine, 1))
            axis.scatter(ratios, range(len(rows)), s=34, color=colour, label=name, zorder=3)
        axis.axvline(1, color="#888888", lw=0.8, zorder=1)
        axis.set_xscale("log")
        axis.set_xticks((0.5, 1, 2, 5, 10), ("0.5x", "1x", "2x", "5x", "10x"))
        axis.minorticks_off()
        axis.set_yticks(range(len(rows)), [_line(entry) for entry in rows], fontsize=9)
        axis.set_xlabel(f"{words} over {MINE}'s")
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(f"LoRA on all experts, {env['hardware']}, {env['threads']} thread(s); {FULL} for comparison")
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
