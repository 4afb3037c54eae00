"""Times and memory on a CUDA device: events around each pass, contestants in turns, a flushed cache."""

from __future__ import annotations

import contextlib
import gc
import statistics
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._C._autograd import DeviceType

from parts.gpu_contestants import Contestant, DenseChain
from parts.gpu_shapes import Rates
from parts.harness import Timing, interleave

PASSES = ("forward", "backward", "step")


HEAD_START = 2_000_000  # clocks, a millisecond: what the host needs to put a step's launches into the queue


class Flush:
    """Pushes what earlier runs left out of the L2 cache, outside the timed region, and keeps the device waiting.

    While it waits the host runs ahead, so that what is timed is what the device does, and no gap between launches.
    Without ``head_start`` the host's gaps count, as they do for whoever calls one forward and waits for it.
    """

    def __init__(self, device: torch.device, *, head_start: bool = True) -> None:
        self.head_start = head_start
        size = torch.cuda.get_device_properties(device).L2_cache_size
        self.room = torch.empty(4 * size, dtype=torch.int8, device=device)

    def __call__(self) -> None:
        self.room.zero_()
        if self.head_start:
            torch.cuda._sleep(HEAD_START)


class Runner(Protocol):
    """The two halves of a step."""

    def forward(self) -> Any:
        """Returns what backward is given."""

    def backward(self, y: Any) -> None:
        """All gradients, which are dropped."""


@dataclass
class Eager:
    """A contestant's step, launched kernel by kernel."""

    contestant: Contestant

    def forward(self) -> Tensor:
        """y."""
        with self.contestant.around():
            return self.contestant.forward()

    def backward(self, y: Tensor) -> None:
        """The gradients of the leaves."""
        if isinstance(self.contestant, DenseChain):
            self.contestant.backward()
        else:
            with self.contestant.around():
                torch.autograd.grad(y, list(self.contestant.leaves()), self.contestant.problem.grad)


@dataclass
class Sampler:
    """Runs steps and keeps the seconds of their parts."""

    runner: Runner
    flush: Callable[[], None]
    samples: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in PASSES})

    def __call__(self, i: int) -> float:
        """One training step; rounds below 0 are warm-up and are not kept. Returns the seconds of the step."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self.flush()
        events[0].record()
        y = self.runner.forward()
        events[1].record()
        self.runner.backward(y)
        events[2].record()
        events[2].synchronize()
        forward, backward = (events[k].elapsed_time(events[k + 1]) / 1e3 for k in (0, 1))
        if i >= 0:
            for name, seconds in zip(PASSES, (forward, backward, forward + backward), strict=True):
                self.samples[name].append(seconds)
        return forward + backward


def time_training(
    runners: Mapping[str, Runner],
    device: torch.device,
    *,
    rounds: int,
    seconds_each: float,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Forward, backward and step of each, in turns, twice over.

    Args:
        runners: by contestant; each passed its check, so everything is compiled.
        device: where.
        rounds: turns of each, in each of the two passes.
        seconds_each: a slow contestant gets fewer turns, at least three.
        tick: called after every round.

    Returns:
        name -> {"forward": Timing, "backward": Timing, "step": Timing, "spread": relative difference of the two
        passes' median steps}.
    """
    flush = Flush(device)
    passes: list[dict[str, Sampler]] = []
    for seed in (0, 1):
        samplers = {name: Sampler(runner, flush) for name, runner in runners.items()}
        interleave(samplers, rounds=rounds, warmup=2, seconds_each=seconds_each, seed=seed, tick=tick)
        passes.append(samplers)
    found: dict[str, dict[str, Any]] = {}
    for name in runners:
        first, second = (samplers[name].samples for samplers in passes)
        found[name] = {part: Timing.of(first[part] + second[part]) for part in PASSES}
        medians = [statistics.median(samples["step"]) for samples in (first, second)]
        found[name]["spread"] = abs(medians[0] - medians[1]) / min(medians)
    return found


def memory(contestant: Contestant, device: torch.device) -> dict[str, int]:
    """Bytes beyond what was there before: ``peak`` of a step, and ``held`` between forward and backward, without y."""
    if isinstance(contestant, DenseChain):
        return {}
    torch.cuda.synchronize(device)
    gc.collect()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    y = contestant.forward()
    held = torch.cuda.memory_allocated(device) - before - y.untyped_storage().nbytes()
    grads = torch.autograd.grad(y, list(contestant.leaves()), contestant.problem.grad)
    peak = torch.cuda.max_memory_allocated(device) - before
    del y, grads
    return {"held": held, "peak": peak}


def seconds_of(
    run: Callable[[], Any], device: torch.device, *, rounds: int = 20, flush: Callable[[], None] | None = None
) -> float:
    """Median seconds of a call by events, after two that do not count."""
    flush = Flush(device) if flush is None else flush
    samples = []
    for i in range(rounds + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush()
        start.record()
        run()
        end.record()
        end.synchronize()
        if i >= 2:
            samples.append(start.elapsed_time(end) / 1e3)
    return statistics.median(samples)


def ceilings(device: torch.device) -> Rates:
    """What this GPU does now: an 8192^3 bf16 product of random numbers, and a copy of 4 GiB, read plus written."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    product = seconds_of(lambda: torch.mm(a, b, out=out), device, rounds=20)
    source = torch.empty(2**32, dtype=torch.int8, device=device).random_(0, 100)
    target = torch.empty_like(source)
    copy = seconds_of(lambda: target.copy_(source), device, rounds=10)
    return Rates(flops=2 * 8192**3 / product, bytes=2 * source.numel() / copy)


def _warm_up(run: Callable[[], Any]) -> None:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def graph_of(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """Capture a call, after three on a side stream."""
    _warm_up(run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


class Graphed:
    """A contestant's step as two CUDA graphs, of forward and of backward, which shares forward's memory."""

    def __init__(self, contestant: Contestant) -> None:
        eager = Eager(contestant)
        _warm_up(lambda: eager.backward(eager.forward()))
        self.graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
        with torch.cuda.graph(self.graphs[0]):
            self.y = eager.forward()
        with torch.cuda.graph(self.graphs[1], pool=self.graphs[0].pool()):
            eager.backward(self.y)

    def forward(self) -> None:
        """Replay."""
        self.graphs[0].replay()

    def backward(self, y: None) -> None:
        """Replay."""
        self.graphs[1].replay()


def replay_seconds(run: Callable[[], Any], device: torch.device, flush: Callable[[], None] | None = None) -> float:
    """Median seconds of a call as one CUDA graph."""
    return seconds_of(graph_of(run).replay, device, flush=flush)


def step_of(contestant: Contestant) -> Callable[[], list[Tensor]]:
    """A whole training step as one call, for capturing and counting."""

    def step() -> list[Tensor]:
        with contestant.around():
            y = contestant.forward()
            return [y, *torch.autograd.grad(y, list(contestant.leaves()), contestant.problem.grad)]

    return step


def launches(run: Callable[[], Any], device: torch.device) -> int:
    """Kernels, copies and fills that one call puts on the device, by the profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    run()
    torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize(device)
    return sum(event.device_type == DeviceType.CUDA for event in profile.events())


@contextlib.contextmanager
def memory_returned(device: torch.device) -> Iterator[None]:
    """Gives cached blocks back afterwards, so that one case's do not count as another's."""
    try:
        yield
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def gpu_facts(device: torch.device) -> dict[str, Any]:
    """Name, memory, multiprocessors, L2, driver and clocks of the GPU."""
    properties = torch.cuda.get_device_properties(device)
    facts: dict[str, Any] = {
        "name": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size // 2**20,
        "cuda": torch.version.cuda,
    }
    query = "driver_version,clocks.sm,clocks.max.sm,power.limit"
    try:
        told = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"], capture_output=True, text=True, check=True
        ).stdout
        facts |= dict(zip(query.split(","), (part.strip() for part in told.splitlines()[0].split(",")), strict=True))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        facts["driver_version"] = "unknown"
    return facts
