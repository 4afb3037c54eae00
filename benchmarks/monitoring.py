"""What does ``dmoe.monitor`` cost a training step on the CPU?

    python benchmarks/monitoring.py [--quick] [--cases "T=2048"] [--threads 2]

Steps without a monitor, recorded ones (into a folder) and those between two records (``every``) take turns
on the same batch: the lines of ``layer_cpu.py`` in float32 (forward, backward, loss) and the language model of
``examples/train_lm.py`` (with AdamW and clipping). In processor time, and by the differences within a round, so that
other work on the machine falls on both sides. Before timing, a recorded step has to leave the same gradients, and
record what ``dmoe.reduce_metrics`` says.
"""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parts.harness import (
    COLOURS,
    CheckError,
    arguments,
    checked,
    describe,
    environment,
    markdown_table,
    milliseconds,
    new_figure,
    publish,
    run_benchmark,
    save_figure,
    stopwatch,
)
from torch import Tensor, nn
from tqdm import tqdm

import dmoe
from dmoe.models import MoEGPT, MoEGPTConfig

WAYS = ("plain", "recorded", "between")
AIM = 0.02


class Case(NamedTuple):
    """A training step: of one layer, or of the language model where there are several."""

    tokens: int
    hidden: int
    ffn: int
    experts: int
    top_k: int
    layers: int = 1

    @property
    def label(self) -> str:
        """For ``--cases``, and the tables."""
        kind = "layer" if self.layers == 1 else f"language model, {self.layers} layers"
        return f"{kind}, T={self.tokens} H={self.hidden} F={self.ffn} E={self.experts} K={self.top_k}"


CASES = (
    Case(2304, 128, 256, 32, 2, layers=3),
    Case(512, 256, 128, 8, 2),
    Case(2048, 512, 256, 16, 4),
    Case(2048, 512, 128, 64, 8),
    Case(512, 512, 1024, 8, 2),
    Case(2048, 512, 1024, 8, 2),
    Case(512, 512, 128, 64, 8),
)


def main() -> None:
    """Run, check, time, write."""
    args = checked(arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=301))
    cases = [case for case in CASES if args.cases in case.label]
    if not cases:
        raise SystemExit(f"--cases {args.cases!r}: no such case; labels are like {CASES[0].label!r}")
    if args.quick:
        args.rounds, cases = min(args.rounds, 5), cases[:2]
    with tqdm(total=len(cases) * args.rounds, unit="round", mininterval=1) as bar:
        results = [_run_case(case, args, bar) for case in cases]
    env = environment(args.threads)
    publish(
        "monitoring",
        env,
        args,
        results,
        report=lambda name: _report(results, env, name),
        plot=lambda path: _plot(results, env, path),
    )


def _training(case: Case) -> tuple[nn.Module, Callable[[Tensor], None], Callable[[int], Tensor]]:
    """The model, one step of it, and the batch of a round."""
    torch.manual_seed(0)
    fields: dict[str, Any] = {
        "hidden_size": case.hidden,
        "ffn_hidden_size": case.ffn,
        "num_experts": case.experts,
        "top_k": case.top_k,
    }
    if case.layers == 1:
        layer = dmoe.MoE(**fields)

        def layer_step(x: Tensor) -> None:
            layer.zero_grad()
            (layer(x).sum() + dmoe.aux_loss(layer)).backward()

        return layer, layer_step, lambda number: _noise(case, number).requires_grad_()
    moe = dict.fromkeys(range(case.layers), dmoe.MoEConfig(**fields, num_moe_layers=case.layers))
    model = MoEGPT(MoEGPTConfig(256, case.hidden, case.layers, 2, case.ffn, 192, norm="rms", bias=False, moe=moe))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)  # every round the same work

    def model_step(ids: Tensor) -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()) + dmoe.aux_loss(model)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    def ids_of(number: int) -> Tensor:
        return torch.randint(256, (case.tokens // 192, 192), generator=torch.Generator().manual_seed(number + 1000))

    return model, model_step, ids_of


def _noise(case: Case, number: int) -> Tensor:
    return torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(number + 1000))


def _check(case: Case) -> None:
    """Raises CheckError unless a monitored step does what a plain one does, and records what happened."""
    model, step, batch = _training(case)
    step(batch(0))
    expected = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    with dmoe.monitor(model, limits=_quiet()) as monitor, monitor.step(0):
        step(batch(0))
    got = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    if case.layers == 1 and not all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)):
        raise CheckError(f"{case.label}: a recorded step leaves other gradients")
    assert monitor.last is not None
    for name, metrics in dmoe.reduce_metrics(model).items():
        record = monitor.last.layers[name]
        if list(record.tokens_per_expert) != metrics.tokens_per_expert.tolist() or record.entropy != metrics.entropy:
            raise CheckError(f"{case.label}: layer {name}: other numbers than dmoe.reduce_metrics has")


def _quiet() -> dmoe.monitoring.Limits:
    """Random tokens are nothing to warn of."""
    return dmoe.monitoring.Limits(dead_steps=10**9, collapse=2.0, certain=-1.0, undecided=2.0, logits_growth=1e9)


def _run_case(case: Case, args: Any, bar: Any) -> dict[str, Any]:
    bar.set_postfix_str(case.label)
    _check(case)
    model, step, batch = _training(case)
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        monitors = {
            "recorded": dmoe.monitor(
                model, Path(folder) / "recorded", every=1, similarity_every=10**9, limits=_quiet()
            ),
            "between": dmoe.monitor(model, Path(folder) / "between", every=10**9, limits=_quiet()),
        }

        def turn(way: str, number: int) -> float:
            x = batch(number)
            if way == "plain":
                return stopwatch(lambda: step(x), time.process_time)
            with monitors[way] as monitor:
                return stopwatch(lambda: _monitored(monitor, number, step, x), time.process_time)

        order, start = random.Random(args.seed), time.perf_counter()
        for number in range(1, args.warmup + args.rounds + 1):
            for way in order.sample(WAYS, len(WAYS)):
                took = turn(way, number)
                if number > args.warmup:
                    seconds[way].append(took)
            bar.update(number > args.warmup)
            if time.perf_counter() - start > len(WAYS) * args.seconds and number > args.warmup + 2:
                break
    similarity = [stopwatch(lambda: _similarity(model), time.process_time) for _ in range(5)]
    return {"case": {**case._asdict(), "label": case.label}, **_summary(seconds, sorted(similarity)[2])}


def _monitored(monitor: Any, number: int, step: Callable[[Tensor], None], x: Tensor) -> None:
    with monitor.step(number), monitor.part("all"):
        step(x)


def _similarity(model: nn.Module) -> None:
    for layer in dmoe.moe_layers(model).values():
        dmoe.monitoring.expert_similarity(layer.experts)


def _summary(seconds: dict[str, list[float]], similarity: float) -> dict[str, Any]:
    """Medians, and what a step costs more as a share of a plain one: with the middle 90 % of its bootstrap."""
    plain = torch.tensor(seconds["plain"], dtype=torch.float64)
    middle = float(plain.median())
    summary: dict[str, Any] = {"rounds": len(plain), "plain": middle, "similarity": similarity}
    generator = torch.Generator().manual_seed(0)
    for way in WAYS[1:]:
        more = torch.tensor(seconds[way], dtype=torch.float64) - plain
        drawn = more[torch.randint(len(more), (2000, len(more)), generator=generator)].median(1).values
        low, high = torch.quantile(drawn, torch.tensor([0.05, 0.95], dtype=torch.float64)).tolist()
        summary[way] = {"seconds": float(more.median()), "low": low, "high": high}
    # A hundred steps: all recorded, or every tenth; in one of them the similarity of experts is measured.
    per_step = {"every=1": summary["recorded"]["seconds"]}
    per_step["every=10"] = (summary["recorded"]["seconds"] + 9 * summary["between"]["seconds"]) / 10
    summary["share"] = {name: (value + similarity / 100) / middle for name, value in per_step.items()}
    return summary


def _report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    rows = []
    for entry in results:
        costs = [entry["recorded"], entry["between"]]
        rows.append(
            [
                entry["case"]["label"],
                milliseconds(entry["plain"]),
                *(f"{c['seconds'] * 1e3:.3f} [{c['low'] * 1e3:.3f}, {c['high'] * 1e3:.3f}]" for c in costs),
                milliseconds(entry["similarity"]),
                *(
                    f"{'**' if share < AIM else ''}{share:.2%}{'**' if share < AIM else ''}"
                    for share in entry["share"].values()
                ),
            ]
        )
    parts = [
        "# What the monitor costs",
        describe(env),
        f"![share of a step]({name}.png)",
        "Training steps on the CPU in float32, in processor time: a plain step; what a recorded one (to a folder, with "
        "one named part) and one between two records take more, as the median of differences within a round, and the "
        "middle 90 % of its bootstrap; what measuring the similarity of experts takes once in 100 steps; and all of it "
        "as a share of a plain step. The aim is 2 %. The host's other work shared the cores.",
        markdown_table(
            ["step", "plain, ms", "recorded, + ms", "between, + ms", "similarity, ms", *results[0]["share"]], rows
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    figure, (axis,) = new_figure(1, width=8.0, height=0.4 * len(results) + 1.6)
    rows = results[::-1]
    for colour, name in zip(COLOURS, results[0]["share"], strict=False):
        shares = [100 * entry["share"][name] for entry in rows]
        axis.scatter(shares, range(len(rows)), s=34, color=colour, label=name, zorder=3)
    axis.axvline(100 * AIM, color="#888888", lw=0.8, zorder=1)
    axis.set_xlim(left=min(0.0, axis.get_xlim()[0]))
    axis.set_yticks(range(len(rows)), [entry["case"]["label"] for entry in rows], fontsize=8)
    axis.set_xlabel("processor time of monitoring, % of a plain step (line: the aim)")
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Monitoring, {env['hardware']}, {env['threads']} thread(s)")
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
