"""All contestants by name, and what the process of each runs."""

from __future__ import annotations

import functools
import resource
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.profiler import profile

from .harness import CLOCKS, available_memory, relative_error, saved_bytes, stopwatch
from .layer_case import Case, make_step, make_weights
from .layer_marks import Dense, Floor
from .layers import Contestant, Dmoe, DmoeComposed, DmoeWithLoss, GroupedMM, HuggingFace, Loop

CONTESTANTS: dict[str, Callable[[Case, dict[str, Tensor]], Contestant]] = {
    "dmoe": Dmoe,
    "dmoe + balance loss": DmoeWithLoss,
    "dmoe torch": DmoeComposed,
    "expert loop": Loop,
    "sort + grouped_mm": GroupedMM,
    "HF eager": functools.partial(HuggingFace, implementation="eager"),
    "HF batched_mm": functools.partial(HuggingFace, implementation="batched_mm"),
    "HF grouped_mm": functools.partial(HuggingFace, implementation="grouped_mm"),
    "dense FFN": Dense,
    "floor": Floor,
}
RIVALS = ("expert loop", "sort + grouped_mm", "HF eager", "HF batched_mm", "HF grouped_mm")
IN_TRAINING = ("dmoe + balance loss",)  # in inference there is no loss to balance


class Bench:
    """What one worker process runs: a contestant by name, on one case after another, timed by one of ``CLOCKS``."""

    def __init__(self, name: str, clock: str) -> None:
        self.name, self.clock = name, CLOCKS[clock]
        self.contestant: Contestant | None = None

    def build(self, case: Case, memory: int) -> str:
        """Get ready for a case; a reason why this contestant cannot run it, or nothing.

        Args:
            case: the case.
            memory: bytes that it may use.
        """
        self.contestant = None
        if self.name == "HF batched_mm":
            # It gathers both weights for every row, and backward makes the gradient of the same size.
            needed = (2 if case.training else 1) * case.rows * case.expert_bytes
            memory = min(memory, available_memory() or memory)
            if needed > memory:
                have, want = memory / 2**30, needed / 2**30
                gradient = " and its gradient" if case.training else ""
                return f"needs {want:.1f} GiB for a copy of the weights per row{gradient}; {have:.1f} GiB allowed"
        weights = make_weights(case)
        self.case, self.router = case, weights["router"]
        self.contestant = CONTESTANTS[self.name](case, weights)
        return ""

    def _built(self) -> Contestant:
        if self.contestant is None:
            raise RuntimeError(f"{self.name}: no case is built")
        return self.contestant

    def _step(self, seed: int) -> Callable[[], None]:
        return self._built().prepare(*make_step(self.case, self.router, seed))

    def _mode(self) -> torch.inference_mode:
        return torch.inference_mode(not self.case.training)

    def errors(self, seed: int, path: str) -> dict[str, float]:
        """Relative errors against :func:`~parts.layer_case.reference`, stored at ``path``."""
        step = self._step(seed)
        with self._mode():
            step()
        expected, got = torch.load(path), self._built().results()
        names = [name for name in self._built().compared if name in expected]
        return {name: relative_error(got[name], expected[name]) for name in names}

    def saved_bytes(self) -> int:
        """Bytes kept for backward beside the parameters, each storage once; -1 where autograd is not used."""
        if isinstance(self.contestant, Floor):
            return -1
        return saved_bytes(self._step(0), self._built().parameters())

    def time(self, ahead: Sequence[int], timed: Sequence[int]) -> tuple[float, int]:
        """Seconds and page faults of a step: the mean over steps of the seeds ``timed``, one after another.

        Those ``ahead`` of them do not count: they wake the threads and bring the weights back into the caches, as the
        step before does in a training loop.
        """
        for seed in ahead:
            step = self._step(seed)
            with self._mode():
                step()
        steps = [self._step(seed) for seed in timed]

        def run() -> None:
            for step in steps:
                step()

        with self._mode():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            seconds = stopwatch(run, self.clock)
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        return seconds / len(steps), faults // len(steps)

    def operations(self) -> tuple[int, int]:
        """Operations of one step: those that Python calls, and with all that they call in turn through PyTorch."""
        steps = [self._step(seed) for seed in (0, 1)]
        with self._mode():
            steps[0]()
            with profile(use_kineto=False) as profiled:
                steps[1]()
        calls = [event for event in profiled.function_events if "::" in event.name]
        return sum(event.cpu_parent is None for event in calls), len(calls)

    def read_seconds(self) -> float:
        """What one pass over the experts' weights costs: a sum of them as 64-bit integers."""
        weights = [w.detach().flatten().view(torch.int64) for w in self._built().parameters() if w.dim() > 2]

        def run() -> None:
            for weight in weights:
                weight.sum()

        return sorted(stopwatch(run, self.clock) for _ in range(5))[2]
