"""What each family of routers costs, and whether top-k has become slower than in another checkout of dmoe.

    python benchmarks/routers.py [--before OTHER_CHECKOUT] [--quick] [--threads 2] [--cases T=2048]

Timed are the router and the losses alone, forward and backward to x; the experts' own time at the same size is given
beside it. With ``--before`` a second process runs the other checkout's top-k, and the two take turns.
"""

from __future__ import annotations

import json
import os
import subprocess
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
    save_figure,
    stopwatch,
)
from tqdm import tqdm

import dmoe

HERE = Path(__file__).resolve().parent
LEAK = {"allow_future_leak": True}
NOISE = {"importance": 5e-3, "load": 5e-3}
# Name -> family, its options, fields of the config, training.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], bool]] = {
    "top-k": ("", {}, {}, True),
    "top-k, normalised, capacity 1.25": ("", {}, {"gate_normalization": 1.0, "capacity_factor": 1.25}, True),
    "top-k, sigmoid, bias": ("", {}, {"score_function": "sigmoid", "selection_bias": True}, True),
    "top-k, square root of softplus": ("TopK", {}, {"score_function": "sqrt_softplus"}, True),
    "top-k, quantile bias": ("TopK", {}, {"selection_bias": True, "selection_bias_rule": "quantile"}, True),
    "Gaussian noise, importance and load": ("TopK", {"logit_noise": "gaussian"}, {"losses": NOISE}, True),
    "second expert sampled": ("TopK", {"second_expert": "sampling"}, {"gate_normalization": 1.0}, True),
    "random order, capacity 1.25": ("TopK", {}, {"drop_order": "random", "capacity_factor": 1.25}, True),
    "8 groups, capacity 1.25": ("TopK", {}, {"token_groups": 8, "capacity_factor": 1.25}, True),
    "cosine, width 256": ("Cosine", {}, {}, True),
    "Sinkhorn": ("Sinkhorn", {}, LEAK, True),
    "BASE, training": ("Base", {}, {"top_k": 1, **LEAK}, True),
    "BASE, evaluation": ("Base", {}, {"top_k": 1, **LEAK}, False),
    "hash": ("Hash", {"vocab_size": 50257}, {"top_k": 1}, True),
    "expert choice": ("ExpertChoice", {}, LEAK, True),
    "uniform": ("Uniform", {}, {}, True),
}
OLD = ("top-k", "top-k, normalised, capacity 1.25", "top-k, sigmoid, bias")  # what every checkout has
SIZES = ((512, 256, 8), (2048, 512, 16), (8192, 512, 64))  # tokens, hidden, experts


class Worker:
    """A process that times routers of one checkout."""

    def __init__(self, checkout: Path, threads: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
        environment |= {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}  # threads at rest must not slow the others
        command = [sys.executable, str(HERE / "parts" / "router_worker.py"), str(threads)]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True)

    def seconds(self, request: dict[str, Any]) -> float:
        """One sample."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request, sort_keys=True) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"routers: the process that times ended with status {self.process.wait()}: see above")
        return float(json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def request(name: str, tokens: int, hidden: int, experts: int) -> dict[str, Any]:
    """What a worker is asked."""
    family, options, fields, training = FAMILIES[name]
    sizes = {"hidden_size": hidden, "ffn_hidden_size": 4, "num_experts": experts, "top_k": 2}
    return {"family": family, "options": options, "fields": {**sizes, **fields}, "tokens": tokens, "training": training}


def experts_seconds(tokens: int, hidden: int, experts: int) -> float:
    """The experts of a layer with F = H, top 2, forward and backward: what a router's time is to be compared with."""
    layer = dmoe.MoE(hidden_size=hidden, ffn_hidden_size=hidden, num_experts=experts, top_k=2, router="uniform")
    x = torch.randn(tokens, hidden, requires_grad=True)

    def run() -> None:
        layer(x).sum().backward()

    run()
    return sorted(stopwatch(run) for _ in range(5))[2]


def table(results: list[dict[str, Any]], env: dict[str, Any]) -> str:
    """The report as Markdown."""
    parts = ["# What routers cost", describe(env)]
    intro = (
        "Router and losses, forward and backward to x, float32, in turns: median [10th, 90th percentile] milliseconds, "
        "and times top-k. `experts`: those of the layer at F = H and K = 2, for comparison."
    )
    if any("before" in entry for entry in results):
        intro += (
            " `before` and `after`: the other checkout and this one, each in a process of its own that times these "
            "lines alone, in the same run; their ratio is that of the medians."
        )
    parts.append(intro)
    for entry in results:
        tokens, hidden, experts = entry["size"]
        plain = entry["timings"]["top-k"].median
        rows = []
        for name, timing in entry["timings"].items():
            before, after = (entry.get(side, {}).get(name) for side in ("before", "after"))
            paired = ["", "", ""]
            if before is not None:
                paired = [_shown(before), _shown(after), f"{after.median / before.median:.3f}"]
            rows.append([name, _shown(timing), f"{timing.median / plain:.2f}", *paired])
        rows.append(["experts", milliseconds(entry["experts"]), f"{entry['experts'] / plain:.2f}", "", "", ""])
        parts.append(f"## T = {tokens}, H = {hidden}, E = {experts}")
        parts.append(markdown_table(["router", "ms", "times top-k", "before, ms", "after, ms", "after / before"], rows))
    return "\n\n".join(parts) + "\n"


def _shown(timing: Timing) -> str:
    return f"{milliseconds(timing.median)} [{milliseconds(timing.p10)}, {milliseconds(timing.p90)}]"


def plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    """A bar for each family, a panel for each size."""
    figure, axes = new_figure(len(results), width=3.2 * len(results) + 2.4, height=5)
    for axis, entry in zip(axes, results, strict=True):
        names = list(entry["timings"])
        values = [entry["timings"][name].median * 1e3 for name in names]
        axis.barh(range(len(names)), values, color=COLOURS[0])
        axis.axvline(entry["experts"] * 1e3, color=COLOURS[1], lw=1.5)
        axis.text(entry["experts"] * 1e3, -0.9, "experts", color=COLOURS[1], ha="center", fontsize=8)
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names))
        axis.invert_yaxis()
        tokens, hidden, experts = entry["size"]
        axis.set(xscale="log", xlabel="milliseconds", title=f"T = {tokens}, H = {hidden}, E = {experts}")
    figure.suptitle(f"Routers on {env['hardware']}, {env['threads']} threads", x=0.02, ha="left")
    save_figure(figure, path)


def main() -> None:
    """Time, write."""
    parser = arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=25)
    parser.add_argument(
        "--before", type=Path, help="another checkout of dmoe, built, whose top-k takes turns with ours"
    )
    args = checked(parser)
    if args.before is not None and not (args.before / "dmoe" / "layer.py").exists():
        parser.error(f"--before: expected a checkout of dmoe, got {args.before}")
    sizes = [
        size for size in SIZES[: 1 if args.quick else None] if args.cases in f"T={size[0]} H={size[1]} E={size[2]}"
    ]
    if not sizes:
        parser.error(f"--cases {args.cases!r}: no size has that in its label, e.g. 'T=512 H=256 E=8'")
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    now = Worker(HERE.parent, args.threads)
    # Two processes that take turns at the same few routers: one of each checkout, so that nothing else differs.
    rivals: dict[str, Worker] = {}
    if args.before is not None:
        rivals = {"before": Worker(args.before.resolve(), args.threads), "after": Worker(HERE.parent, args.threads)}
    results = []
    with tqdm(total=len(sizes) * rounds, unit="round") as bar:
        for size in sizes:
            contestants: dict[str, Callable[[int], float]] = {}
            for name in FAMILIES:
                asked = request(name, *size)
                contestants[name] = lambda _, asked=asked: now.seconds(asked)  # type: ignore[misc]
                for side, worker in rivals.items() if name in OLD else ():
                    contestants[f"{side}: {name}"] = lambda _, asked=asked, worker=worker: worker.seconds(asked)  # type: ignore[misc]
            timings = interleave(contestants, rounds=rounds, warmup=args.warmup, seconds_each=args.seconds,
                                 seed=args.seed, tick=bar.update)  # fmt: skip
            entry: dict[str, Any] = {"size": size, "experts": experts_seconds(*size)}
            entry["timings"] = {name: timings[name] for name in FAMILIES}
            for side in rivals:
                entry[side] = {name: timings[f"{side}: {name}"] for name in OLD}
            results.append(entry)
    for worker in (now, *rivals.values()):
        worker.close()
    env = environment(args.threads)
    publish(
        "routers", env, args, results, report=lambda _: table(results, env), plot=lambda path: plot(results, env, path)
    )


if __name__ == "__main__":
    main()
