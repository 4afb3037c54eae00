"""Runs one line of the layer's tables: contestants in processes of their own build it, are checked, and take turns."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .harness import Timing, available_memory, interleave
from .layer_bench import CONTESTANTS, IN_TRAINING, Bench
from .layer_case import Case, make_step, make_weights, reference, route
from .workers import Worker, WorkerError, worst_errors

# Relative norms against float64. Half of bfloat16's last place is 2e-3 of a value, and a gradient passes four
# roundings; Hugging Face's router also rounds logits and gate weights. A swapped weight or a lost row is off by more.
TOLERANCE = {"fp32": 1e-5, "bf16": 3e-2}
SLOW = 1.0  # seconds of a step from which a turn is one step
TURN = 0.005  # seconds that a turn's counted steps take together, as long as they are no more than
MOST = 20


def add_layer_options(parser: argparse.ArgumentParser) -> None:
    """Options of the layer's benchmarks beside those that all have."""
    parser.add_argument("--dtypes", default="fp32,bf16", help="separated by commas")
    parser.add_argument(
        "--memory-gib", type=float, default=0.6 * available_memory() / 2**30, help="most that one may use"
    )


def chosen_cases(parser: argparse.ArgumentParser, args: argparse.Namespace, cases: Sequence[Case]) -> list[Case]:
    """Those of the wanted dtypes whose label has ``--cases`` in it."""
    dtypes = args.dtypes.split(",")
    chosen = [case for case in cases if case.dtype in dtypes and args.cases in case.label]
    if not chosen or not set(dtypes) <= set(TOLERANCE):
        parser.error(
            f"--cases {args.cases!r}, --dtypes {args.dtypes!r}: no such case; labels are like {cases[0].label!r}"
        )
    return chosen


def chosen_contestants(
    parser: argparse.ArgumentParser, args: argparse.Namespace, known: Sequence[str] = tuple(CONTESTANTS)
) -> list[str]:
    """dmoe and those of ``--contestants``, or all that are known."""
    wanted = {"dmoe", *args.contestants.split(",")} if args.contestants else set(known)
    if not wanted <= set(known):
        parser.error(f"--contestants: expected some of {list(known)}, got {sorted(wanted - set(known))}")
    return [name for name in known if name in wanted]


@contextmanager
def workers_of(names: Sequence[str], args: argparse.Namespace) -> Iterator[dict[str, Worker]]:
    """A process for each contestant, ended with the block."""
    workers = {name: Worker(Bench, name, args.clock, threads=args.threads) for name in names}
    try:
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def run_case(
    benchmark: str,
    case: Case,
    workers: dict[str, Worker],
    args: argparse.Namespace,
    regimes: Sequence[str],
    tick: Callable[[], None],
) -> dict[str, Any]:
    """Build, check and time one case; contestants that cannot run it are listed with the reason.

    Args:
        benchmark: its name, for messages.
        case: the line.
        workers: see :func:`workers_of`.
        args: the settings.
        regimes: ``changing`` (new tokens in every step) and ``fixed`` (the same again and again).
        tick: called after every round.
    """
    field, reasons = _built(case, workers, int(args.memory_gib * 2**30))
    errors = worst_errors(
        f"{benchmark}, {case.label}", field, lambda seed: reference(case, seed), TOLERANCE[case.dtype]
    )
    saved = {name: worker.call("saved_bytes") for name, worker in field.items()} if case.training else {}
    faults: dict[str, int] = {}
    counted = dict.fromkeys(field, 1)
    slow = dict.fromkeys(field, False)
    timings: dict[str, dict[str, Timing]] = {}
    for regime in regimes:

        def turn(name: str, regime: str = regime) -> Callable[[int], float]:
            def seconds(i: int) -> float:
                # As many steps ahead as count; none where steps are slow. In the changing regime no round has the
                # tokens of another.
                first = 100 + 2 * MOST * (args.warmup + i)
                ahead = 0 if slow[name] else counted[name]
                steps = range(first, first + ahead + counted[name])
                seeds = list(steps) if regime == "changing" else [0] * len(steps)
                elapsed, faults[name] = workers[name].call("time", seeds[:ahead], seeds[ahead:])
                slow[name], counted[name] = elapsed > SLOW, max(1, min(MOST, int(TURN / elapsed)))
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
        "case": {**vars(case), "label": case.label, "expert_flops": case.flops, "expert_bytes": case.expert_bytes},
        "load": _load(case, args.rounds),
        "timings": timings,
        "not_run": reasons,
        "saved_bytes": saved,
        "page_faults_of_last_step": faults,
        "errors": errors,
    }


def _built(case: Case, workers: dict[str, Worker], memory: int) -> tuple[dict[str, Worker], dict[str, str]]:
    """Who runs the case, and why the others do not."""
    field: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    for name, worker in workers.items():
        if name in IN_TRAINING and not case.training:
            continue
        try:
            reason = worker.call("build", case, memory)
            if not reason:
                worker.call("time", [], [0])  # does it run at all?
        except WorkerError as error:
            if name.startswith("dmoe"):
                raise
            reason = str(error).strip().splitlines()[-1]
        if reason:
            reasons[name] = reason
        else:
            field[name] = worker
    return field, reasons


def _load(case: Case, steps: int) -> dict[str, float]:
    """How uneven the changing regime's routing is.

    An expert's rows over the mean: least, most, standard deviation; and how many experts have any, in the mean.
    """
    router = make_weights(case)["router"]
    ratios = []
    for seed in range(100, 100 + min(steps, 8)):
        counts = torch.bincount(
            route(make_step(case, router, seed)[0], router, case.top_k)[1].flatten(), minlength=case.experts
        )
        ratios.append(counts * case.experts / case.rows)
    every = torch.stack(ratios)
    chosen = float((every > 0).sum(1).double().mean())
    return {"least": float(every.min()), "most": float(every.max()), "spread": float(every.std()), "chosen": chosen}
