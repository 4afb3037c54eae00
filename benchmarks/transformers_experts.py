"""How fast are the experts of Hugging Face's models with each implementation, and what do they keep for backward?

    python benchmarks/transformers_experts.py [--quick] [--cases "gpt_oss fwd bf16"] [--models mixtral,llama4]

Each line is a module of Transformers (llama4: the whole block, whose experts the interface does not reach) with new
tokens and a new routing in every turn. Outputs and gradients are first compared with the module's own loop over experts
in float64. ``lora`` is a training step of PEFT's adapters (r = 8) on both projections of frozen experts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from parts.harness import (
    COLOURS,
    arguments,
    available_memory,
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
from parts.hf_experts import TOLERANCE, Case, errors_of, exact, field, timings_of
from tqdm import tqdm

MODELS = ("mixtral", "gpt_oss", "aria", "llama4", "lora")
SMALL = (1, 8, 64, 128)


def cases_of(model: str) -> list[Case]:
    """The lines of one model."""
    if model == "lora":
        return [Case(model, 2048, dtype, backward=True) for dtype in TOLERANCE]
    lines = []
    for dtype in TOLERANCE:
        for backward in (False, True):
            sizes: dict[str, Any] = {"dtype": dtype, "backward": backward}
            if model == "llama4":
                lines += [Case(model, t, **sizes, experts=16, top_k=1) for t in (*SMALL, 1024)]
            else:
                lines += [Case(model, t, **sizes) for t in (*SMALL, 2048)]
    return lines


def main() -> None:
    """Run, check, time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=41)
    parser.add_argument("--models", default=",".join(MODELS), help="separated by commas")
    parser.add_argument("--memory-gib", type=float, default=0.3 * available_memory() / 2**30, help="most for one")
    args = checked(parser)
    unknown = set(args.models.split(",")) - set(MODELS)
    if unknown:
        parser.error(f"--models: expected some of {', '.join(MODELS)}, got {', '.join(sorted(unknown))}")
    words = args.cases.split()
    lines = [case for model in args.models.split(",") for case in cases_of(model)]
    lines = [case for case in lines if all(word in case.label.split() for word in words)]
    if not lines:
        parser.error(f"--cases {args.cases!r}: no such case; labels are like {cases_of('mixtral')[0].label!r}")
    if args.quick:
        args.rounds, args.seconds = min(args.rounds, 3), min(args.seconds, 1.0)
        lines = [case for case in lines if case.tokens <= 64]
    results = []
    with tqdm(total=len(lines) * args.rounds, unit="round", mininterval=1) as bar:
        for case in lines:
            bar.set_postfix_str(case.label)
            results.append(run_case(case, args, bar))
    env = environment(args.threads)
    publish(
        "transformers_experts",
        env,
        args,
        results,
        report=lambda name: report(results, env, name),
        plot=lambda path: plot(results, env, path),
    )


def run_case(case: Case, args: Any, bar: Any) -> dict[str, Any]:
    """Build, check and time one line."""
    contestants, reasons = field(case, int(args.memory_gib * 2**30))
    truth = exact(case, contestants[0], seed=0)
    errors = {}
    for contestant in contestants:
        # They add a bias's gradient up in the weights' dtype: in bfloat16 that is no figure to check.
        rival = case.dtype == "bf16" and contestant.name in ("grouped_mm", "batched_mm")
        errors[contestant.name] = errors_of(contestant, truth, passed_over="_bias" if rival else None)
    del truth
    timings = timings_of(contestants, args, bar.update)
    saved = {c.name: c.saved_bytes() for c in contestants} if case.backward else {}
    return {
        "case": {**vars(case), "label": case.label},
        "timings": timings,
        "saved_bytes": saved,
        "errors": errors,
        "not_run": reasons,
    }


def report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    """All tables as Markdown."""
    parts = [
        "# Experts of Hugging Face's models, by implementation",
        describe(env),
        f"![times over dmoe's]({name}.png)",
        f"Median milliseconds{' of processor time' if env['threads'] == 1 else ''} of a turn with new tokens and a new "
        "routing; in brackets, how many times dmoe's. Bold: the fastest. Saved: MiB kept for backward beside "
        "parameters and inputs. Before timing, outputs and gradients of each agreed with the module's own loop over "
        "experts in float64, within a relative norm of "
        + " and ".join(f"{bound:.0e} ({dtype})" for dtype, bound in TOLERANCE.items())
        + ", but for bias gradients of grouped_mm and batched_mm in bfloat16, which are off by up to a half. "
        "Percentiles and errors are in the JSON.",
    ]
    for model in dict.fromkeys(entry["case"]["model"] for entry in results):
        entries = [entry for entry in results if entry["case"]["model"] == model]
        names = list(dict.fromkeys(n for entry in entries for n in (*entry["timings"], *entry["not_run"])))
        parts += [f"## {model}", _table(entries, names)]
        behind = [
            f"- {entry['case']['label']}: behind {n} ({t.median / entry['timings']['dmoe'].median:.2f})"
            for entry in entries
            for n, t in entry["timings"].items()
            if "dmoe" in entry["timings"] and t.median < entry["timings"]["dmoe"].median
        ]
        if model != "lora":
            parts.append("Behind:\n\n" + "\n".join(behind) if behind else "First on every line.")
    not_run = [(entry["case"]["label"], n, why) for entry in results for n, why in entry["not_run"].items()]
    reasons = [f"- {label}, {n}: {why}" for label, n, why in not_run]
    if reasons:
        parts += ["## Not run", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"


def _mine(entry: dict[str, Any]) -> str:
    return "dmoe" if "dmoe" in entry["timings"] else "PEFT's sum, dmoe"


def _table(entries: list[dict[str, Any]], names: list[str]) -> str:
    rows = []
    for entry in entries:
        timings, saved = entry["timings"], entry["saved_bytes"]
        cells = time_cells(timings, names, _mine(entry), names)
        kept = [f"{saved[n] / 2**20:.2f}" if n in saved else "-" for n in names]
        case = entry["case"]
        label = f"{'fwd+bwd' if case['backward'] else 'fwd'} {case['dtype']} T={case['tokens']}"
        rows.append([label, *cells, " / ".join(kept)])
    case = entries[0]["case"]
    sizes = f"H={case['hidden']} F={case['ffn']} E={case['experts']} K={case['top_k']}"
    return markdown_table([sizes, *names, "saved, MiB"], rows)


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """Times over dmoe's, a panel for each model, a dot for each implementation on each line."""
    shown = [m for m in dict.fromkeys(entry["case"]["model"] for entry in results) if m != "lora"] or ["lora"]
    figure, axes = new_figure(len(shown), width=4.6 * len(shown), height=6.4)
    names = list(dict.fromkeys(n for entry in results if entry["case"]["model"] in shown for n in entry["timings"]))
    for axis, model in zip(axes, shown, strict=True):
        entries = [entry for entry in results if entry["case"]["model"] == model][::-1]
        for colour, n in zip(COLOURS, names, strict=False):
            points = [
                (entry["timings"][n].median / entry["timings"][_mine(entry)].median, y)
                for y, entry in enumerate(entries)
                if n in entry["timings"]
            ]
            axis.scatter(*zip(*points, strict=True), s=34, color=colour, label=n, zorder=3) if points else None
        axis.axvline(1, color="#888888", lw=0.8, zorder=1)
        axis.set_xscale("log")
        axis.set_xticks((1, 2, 5, 10, 20, 50), ("1x", "2x", "5x", "10x", "20x", "50x"))
        axis.minorticks_off()
        # The panels share their lines; the largest number of tokens is 2048, of llama4 1024.
        labels = [
            f"{'f+b' if e['case']['backward'] else 'fwd'} {e['case']['dtype']} "
            f"{e['case']['tokens'] if e['case']['tokens'] < 1024 else 'many'}"
            for e in entries
        ]
        axis.set_yticks(range(len(entries)), labels, fontsize=8)
        axis.set_title(f"{model} (many: {max(e['case']['tokens'] for e in entries)} tokens)")
        axis.set_xlabel("time over dmoe's")
    handles, found = axes[0].get_legend_handles_labels()
    axes[-1].legend(handles, found, fontsize=8, frameon=False, loc="center right")
    figure.suptitle(f"Experts by implementation, {env['hardware']}, {env['threads']} thread (right of 1: slower)")
    figure.subplots_adjust(wspace=0.2)
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
