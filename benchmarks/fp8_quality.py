"""What fp8 costs in quality: the example's loss curve beside bfloat16's, and errors of its experts' results.

    python benchmarks/fp8_quality.py [--steps 120] [--quick] [--threads 1]

The model is `examples/train_lm.py`'s, under autocast to bfloat16. All runs take turns, from one measurement to the
next; one of them is bfloat16 from another seed, which says how far apart two runs are anyway. Errors are measured on
what the experts of the trained model get in a training step, against float64. Bytes and times are those of one layer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
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
    save_figure,
    saved_bytes,
    stopwatch,
)
from torch import Tensor

import dmoe

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from lm.data import load_corpus, training_batch
from lm.settings import Settings
from lm.training import Run, train

FP8, SAVED = {"expert_compute": "fp8"}, {"saved_activations": "fp8"}
RUNS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, another seed": {"seed": 1},
    "fp8": FP8,
    "fp8, saved as fp8": {**FP8, **SAVED},
}
# Name -> keywords of dmoe.run_experts.
WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "saved as fp8": {"saved_activations": "fp8"},
    "fp8": {"expert_compute": "fp8"},
    "fp8, saved as fp8": {"expert_compute": "fp8", "saved_activations": "fp8"},
}
RESULTS = ("y", "grad x", "grad gate weights", "grad up_proj", "grad down_proj")
SIZES = ((2048, 512, 1024, 8, 2), (2048, 512, 256, 16, 4))  # tokens, hidden, ffn, experts, top k


def trained(steps: int, eval_bytes: int, seed: int) -> list[Run]:
    """All runs, trained to the end."""
    common = {
        "top_k": 2,
        "balance": 0.05,
        "dtype": "bfloat16",
        "steps": steps,
        "warmup": max(1, steps // 20),
        "eval_every": max(1, steps // 15),
        "eval_bytes": eval_bytes,
    }
    settings = {name: Settings(**{**common, "seed": seed, **more}) for name, more in RUNS.items()}
    first = settings["bf16"]
    corpus = load_corpus(first.data, first.data_bytes, first.seq_len)
    runs = [Run(name, each, corpus, torch.device("cpu")) for name, each in settings.items()]
    for run in runs:
        run.warm_up()
    train(runs, lambda: None, lambda: False)
    return runs


def inputs_of_experts(run: Run) -> list[tuple[Any, ...]]:
    """What each layer's experts get in the next training step, and the gradient of what they return."""
    found: list[tuple[Any, ...]] = []

    def note(module: Any, given: tuple[Any, ...], y: Tensor) -> None:
        place = len(found)
        found.append((module, *given[:3]))
        y.register_hook(lambda grad: found.__setitem__(place, (*found[place], grad)))

    hooks = [layer.experts.register_forward_hook(note) for layer in run.model.moe_layers]
    s = run.settings
    inputs, targets = training_batch(run.corpus, seed=s.seed, step=run.step, batch=s.batch, seq_len=s.seq_len)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run.model(inputs)
    torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).backward()
    for hook in hooks:
        hook.remove()
    run.model.zero_grad()
    return found


def results_of(captured: tuple[Any, ...], dtype: torch.dtype, **how: Any) -> list[Tensor]:
    """y and the gradients, in the order of RESULTS."""
    experts, x, plan, gates, grad_y = captured
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = experts.weights()
    leaves = [
        tensor.detach().to(kind).requires_grad_()
        for tensor, kind in ((x, dtype), (gates, wide), (given.up_proj, dtype), (given.down_proj, dtype))
    ]
    weights = dmoe.ExpertWeights(leaves[2], leaves[3], gated=given.gated)
    y = dmoe.run_experts(leaves[0], plan, leaves[1], weights, activation=experts.config.activation, **how)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(dtype))]


def errors(run: Run) -> list[dict[str, Any]]:
    """Of each layer and way, ``||got - exact|| / ||exact||`` of each result.

    Raises:
        CheckError: a way is so far off that it computes something else.
    """
    rows = []
    for number, captured in enumerate(inputs_of_experts(run)):
        exact = results_of(captured, torch.float64)
        for name, how in WAYS.items():
            got = results_of(captured, torch.bfloat16, **how)
            found = {r: relative_error(a, b) for r, a, b in zip(RESULTS, got, exact, strict=True)}
            require_close(f"layer {number}, {name}", found, 0.25)
            rows.append({"layer": number, "way": name, "errors": found})
    return rows


def one_layer(size: tuple[int, ...], how: dict[str, Any]) -> tuple[Callable[[], Any], int, int]:
    """A training step of experts alone in bfloat16; bytes saved by them, and by a whole layer with its router."""
    tokens, hidden, ffn, experts, top_k = size
    torch.manual_seed(0)
    layer = dmoe.MoE(
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_experts=experts,
        top_k=top_k,
        dtype=torch.bfloat16,
        **how,
    )
    x = torch.randn(tokens, hidden, dtype=torch.bfloat16)
    with torch.no_grad():
        routing = layer.router(x)
    gates = routing.gate_weights
    weights = list(layer.parameters())

    def forward() -> Tensor:
        fresh = (x * 1).requires_grad_()  # activations of a model, which are no one's but the experts'
        return layer.experts(fresh, routing.plan, gates)

    def step() -> None:
        forward().sum().backward()
        layer.zero_grad()

    held = [*weights, gates, *vars(routing.plan).values()]
    alone = saved_bytes(forward, [each for each in held if isinstance(each, Tensor)])
    whole = saved_bytes(lambda: layer((x * 1).requires_grad_()), weights)
    return step, alone, whole


def layers(rounds: int, warmup: int, seconds: float, seed: int) -> list[dict[str, Any]]:
    """Bytes and times of each size."""
    cases = []
    for size in SIZES:
        made = {name: one_layer(size, how) for name, how in WAYS.items()}
        contestants = {name: (lambda _, step=step: stopwatch(step)) for name, (step, _, _) in made.items()}
        timings = interleave(contestants, rounds=rounds, warmup=warmup, seconds_each=seconds, seed=seed)
        saved = {name: {"experts": alone, "layer": whole} for name, (_, alone, whole) in made.items()}
        cases.append({"size": size, "timings": timings, "saved": saved})
    return cases


def report(results: list[dict[str, Any]], env: dict[str, Any], steps: int) -> str:
    """As Markdown."""
    curve, of_layers, sizes = (entry["of"] for entry in results)
    parts = ["# fp8 experts: quality, bytes and time", describe(env)]
    parts.append(
        f"## Held-out bits per byte\n\n`examples/train_lm.py`'s model, {steps} steps under autocast to bfloat16; "
        "seconds are those of its training steps, in turns with the others."
    )
    base = curve["bf16"][-1]
    rows = []
    for name, (*_, last) in curve.items():
        held_out, seconds = last["held_out_bpb"], last["seconds"]
        cells = [f"{held_out:.4f}", f"{held_out - base['held_out_bpb']:+.4f}", f"{last['train_bpb']:.4f}"]
        rows.append([name, *cells, f"{seconds:.0f}", f"{seconds / base['seconds']:.2f}"])
    header = ["run", "held out, at the end", "minus bf16", "training, last stretch", "seconds", "times bf16"]
    parts.append(markdown_table(header, rows))
    parts.append(
        "## Relative errors\n\n`||got - exact|| / ||exact||` against float64, on what the experts of the trained "
        "bf16 model get in one training step."
    )
    rows = [[f"layer {e['layer']}, {e['way']}", *(f"{100 * e['errors'][r]:.2f}%" for r in RESULTS)] for e in of_layers]
    parts.append(markdown_table(["layer, way", *RESULTS], rows))
    parts.append(
        "## One layer in bfloat16\n\nTraining step of the experts: median [10th, 90th percentile] milliseconds. Saved "
        "for backward, MiB: by the experts alone, and by a whole layer, whose router keeps x as well."
    )
    for case in sizes:
        tokens, hidden, ffn, experts, top_k = case["size"]
        first = case["timings"]["bf16"].median
        rows = []
        for name, timing in case["timings"].items():
            kept = (f"{case['saved'][name][what] / 2**20:.2f}" for what in ("experts", "layer"))
            rows.append([name, _shown(timing), f"{timing.median / first:.2f}", *kept])
        parts.append(f"T = {tokens}, H = {hidden}, F = {ffn}, E = {experts}, K = {top_k}")
        parts.append(markdown_table(["way", "ms", "times bf16", "saved: experts", "saved: layer"], rows))
    return "\n\n".join(parts) + "\n"


def _shown(timing: Timing) -> str:
    return f"{milliseconds(timing.median)} [{milliseconds(timing.p10)}, {milliseconds(timing.p90)}]"


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """The curves, and how far each is from bfloat16's of the same seed."""
    curves = results[0]["of"]
    figure, (left, right) = new_figure(2, width=11, height=4.2)
    right.remove()  # it would share the other's axis
    right = figure.add_subplot(1, 2, 2)
    right.spines[["top", "right"]].set_visible(False)
    base = [point["held_out_bpb"] for point in curves["bf16"]]
    for (name, curve), colour in zip(curves.items(), COLOURS, strict=False):
        steps, values = ([point[key] for point in curve] for key in ("step", "held_out_bpb"))
        style = "--" if "seed" in name else "-"
        left.plot(steps, values, style, color=colour, label=name, lw=1.6)
        if name != "bf16":
            right.plot(steps, [a - b for a, b in zip(values, base, strict=True)], style, color=colour, lw=1.6)
    left.set(title="Held-out bits per byte", xlabel="step")
    left.legend(frameon=False, fontsize=9)
    right.axhline(0, color=COLOURS[0], lw=1)
    right.set(title="minus bf16's", xlabel="step")
    figure.suptitle(f"{env['hardware']}, {env['cores']} cores, {env['date']}", fontsize=9, x=0.99, ha="right")
    save_figure(figure, path)


def main() -> None:
    """Train, measure, write the report."""
    parser = arguments(__doc__.splitlines()[0], rounds=10)
    parser.add_argument("--steps", type=int, default=120, help="training steps of each run")
    args = checked(parser)
    if args.quick:
        args.steps, args.rounds, args.warmup = min(args.steps, 2), min(args.rounds, 2), 1
    runs = trained(args.steps, 2_500 if args.quick else 16_384, args.seed)
    env = environment(args.threads)
    results: list[dict[str, Any]] = [
        {"label": "curves", "of": {run.name: run.curve for run in runs}},
        {"label": "errors", "of": errors(runs[0])},
        {"label": "layers", "of": layers(args.rounds, args.warmup, args.seconds, args.seed)},
    ]
    publish(
        "fp8_quality",
        env,
        args,
        results,
        report=lambda _: report(results, env, args.steps),
        plot=lambda path: plot(results, env, path),
    )


if __name__ == "__main__":
    main()
