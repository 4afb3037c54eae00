"""What does it cost that a token's bits do not depend on its batch, and that its routing is recorded or replayed?

    python benchmarks/batch_invariance.py [--quick] [--cases bf16] [--threads 1]

``dmoe.MoE`` (H = 512, F = 1024, E = 16, K = 2), without and with a backward, new tokens in every turn: as it is, with
``batch_invariant=True``, inside ``record_routing``, and inside ``replay_routing`` with choices of another layer. In
processor time: other work on the machine then costs its caches and not its cores. Before timing, the two ways have to
agree in float64, and the invariant one to give single tokens the bits that they have in the batch.
"""

from __future__ import annotations

import contextlib
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
    interleave,
    markdown_table,
    new_figure,
    publish,
    relative_error,
    require_close,
    run_benchmark,
    save_figure,
    stopwatch,
    time_cells,
)
from tqdm import tqdm

import dmoe

SIZES: dict[str, Any] = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_experts": 16, "top_k": 2}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}
NAMES = ("dmoe", "batch_invariant", "recording", "replaying")


class Case(NamedTuple):
    """Tokens of a turn, their dtype, and whether a backward belongs to it."""

    dtype: str
    tokens: int
    backward: bool

    @property
    def label(self) -> str:
        """For ``--cases``, and the tables."""
        return f"{self.dtype} T={self.tokens} {'forward + backward' if self.backward else 'forward'}"


CASES = [Case(dtype, tokens, back) for dtype in DTYPES for back in (False, True) for tokens in (1, 16, 128, 1024)]


def main() -> None:
    """Run, check, time, write."""
    args = checked(arguments(__doc__.split("\n")[0] if __doc__ else "", rounds=31))
    lines = [case for case in CASES if all(word in case.label.split() for word in args.cases.split())]
    if not lines:
        raise SystemExit(f"--cases {args.cases!r}: no such case; labels are like {CASES[0].label!r}")
    if args.quick:
        args.rounds, args.seconds, lines = min(args.rounds, 3), min(args.seconds, 1.0), lines[:2]
    with tqdm(total=len(lines) * args.rounds, unit="round", mininterval=1) as bar:
        results = [_run_case(case, args, bar) for case in lines]
    env = environment(args.threads)
    publish(
        "batch_invariance",
        env,
        args,
        results,
        report=lambda name: _report(results, env, name),
        plot=lambda path: _plot(results, env, path),
    )


def _layers(dtype: torch.dtype) -> tuple[dmoe.MoE, dmoe.MoE]:
    torch.manual_seed(0)
    plain = dmoe.MoE(**SIZES, load_balancing_coefficient=0.0, dtype=dtype)
    invariant = dmoe.MoE(**SIZES, load_balancing_coefficient=0.0, batch_invariant=True, dtype=dtype)
    invariant.load_state_dict(plain.state_dict())
    return plain, invariant


def _check(case: Case) -> dict[str, float]:
    """Raises CheckError unless the figures are about the same results, and the promise holds."""
    plain, invariant = _layers(torch.float64)
    x = torch.randn(min(case.tokens, 64), SIZES["hidden_size"], dtype=torch.float64)
    with torch.no_grad():
        errors = {"y": relative_error(invariant(x), plain(x))}
    require_close(case.label, errors, 1e-12)
    layer = _layers(DTYPES[case.dtype])[1]
    x = torch.randn(case.tokens, SIZES["hidden_size"]).to(DTYPES[case.dtype])
    with torch.no_grad():
        y = layer(x)
        same = all(torch.equal(layer(x[t : t + 1]), y[t : t + 1]) for t in range(0, case.tokens, case.tokens // 8 + 1))
    if not same:
        raise CheckError(f"{case.label}: a token alone has other bits than in the batch")
    return errors


def _run_case(case: Case, args: Any, bar: Any) -> dict[str, Any]:
    bar.set_postfix_str(case.label)
    errors, dtype = _check(case), DTYPES[case.dtype]
    plain, invariant = _layers(dtype)

    def turn_of(layer: dmoe.MoE, context: Callable[[], Any]) -> Callable[[int], float]:
        def turn(number: int) -> float:
            torch.manual_seed(number)
            x = torch.randn(case.tokens, SIZES["hidden_size"]).to(dtype).requires_grad_(case.backward)
            layer.zero_grad()

            def run() -> None:
                with torch.set_grad_enabled(case.backward), context():
                    y = layer(x)
                    if case.backward:
                        y.sum().backward()

            return stopwatch(run, time.process_time)

        return turn

    other = dmoe.MoE(**SIZES)
    with dmoe.record_routing(other) as record, torch.no_grad():
        other(torch.randn(case.tokens, SIZES["hidden_size"]))
    contexts: dict[str, tuple[dmoe.MoE, Callable[[], Any]]] = {
        "dmoe": (plain, contextlib.nullcontext),
        "batch_invariant": (invariant, contextlib.nullcontext),
        "recording": (plain, lambda: dmoe.record_routing(plain)),
        "replaying": (plain, lambda: dmoe.replay_routing(plain, record)),
    }
    timings = interleave(
        {name: turn_of(*contexts[name]) for name in NAMES},
        rounds=args.rounds,
        warmup=args.warmup,
        seconds_each=args.seconds,
        seed=args.seed,
        tick=bar.update,
    )
    return {"case": {**case._asdict(), "label": case.label}, "timings": timings, "errors": errors}


def _report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    sizes = "H={hidden_size} F={ffn_hidden_size} E={num_experts} K={top_k}".format(**SIZES)
    parts = [
        "# Batch invariance, recording and replaying",
        describe(env),
        f"![times over dmoe's]({name}.png)",
        f"`dmoe.MoE`, {sizes}. Median milliseconds of processor time, in turns; in brackets, how many times the layer "
        "without any of it. Other work shared the cores. Replayed choices are another layer's: as even as its router "
        "made them, and found before the gate weights. Before timing, `batch_invariant=True` agreed with the layer in "
        "float64 within a relative norm of 1e-12, and gave single tokens the bits that they have in the batch.",
        markdown_table(
            ["case", *NAMES], [[e["case"]["label"], *time_cells(e["timings"], NAMES, NAMES[0], NAMES)] for e in results]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _plot(results: list[dict[str, Any]], env: dict[str, Any], path: Path) -> None:
    figure, (axis,) = new_figure(1, width=8.0, height=0.3 * len(results) + 1.6)
    rows = results[::-1]
    for colour, name in zip(COLOURS, NAMES[1:], strict=False):
        ratios = [entry["timings"][name].median / entry["timings"][NAMES[0]].median for entry in rows]
        axis.scatter(ratios, range(len(rows)), s=34, color=colour, label=name, zorder=3)
    axis.axvline(1, color="#888888", lw=0.8, zorder=1)
    axis.set_yticks(range(len(rows)), [entry["case"]["label"] for entry in rows], fontsize=9)
    axis.set_xlabel("processor time over the layer's without it")
    axis.legend(fontsize=8, frameon=False)
    figure.suptitle(f"Batch invariance, {env['hardware']}, {env['threads']} thread(s)")
    save_figure(figure, path)


if __name__ == "__main__":
    run_benchmark(main)
