"""What the benchmarks share: interleaved timing, a check before every figure, reports as JSON, Markdown and a plot."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dmoe

RESULTS = Path(__file__).resolve().parents[1] / "results"

# Okabe and Ito's palette, told apart under every common colour blindness; yellow is left out, too pale on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F", "#882255")

# What makes oneDNN, PyTorch and MKL believe in a lesser processor than there is: in the report, and in its files' name.
RESTRICTIONS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")

# Of the processor: the seconds of all this process's threads, which a machine's other users do not lengthen.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


class CheckError(Exception):
    """Two contestants do not compute the same thing, so there is nothing to report."""


def run_benchmark(main: Callable[[], None], *others: type[Exception]) -> None:
    """Run one; a :class:`CheckError`, or one of ``others``, ends it with a sentence."""
    errors: tuple[type[Exception], ...] = (CheckError, *others)
    try:
        main()
    except errors as error:
        raise SystemExit(f"nothing is reported: {error}") from error


# ------------------------------------------------------------------------------------------------------------ timing


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant over its rounds."""

    median: float
    p10: float
    p90: float
    best: float
    rounds: int

    @staticmethod
    def of(samples: Sequence[float]) -> Timing:
        """Summarise at least one sample."""
        ordered = torch.tensor(sorted(samples), dtype=torch.float64)
        p10, median, p90 = torch.quantile(ordered, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        return Timing(median, p10, p90, float(ordered[0]), len(samples))


def stopwatch(run: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call by a clock, with Python's garbage collector held still."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        start = clock()
        run()
        return clock() - start
    finally:
        if collecting:
            gc.enable()


def interleave(
    contestants: Mapping[str, Callable[[int], float]],
    *,
    rounds: int,
    warmup: int,
    seconds_each: float,
    seed: int,
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Timing]:
    """Time contestants in turns, so that a slow minute of the machine falls on all of them.

    Args:
        contestants: name to a function that runs round i once and returns its seconds.
        rounds: turns of each contestant; the order is shuffled anew in every round.
        warmup: turns that are not counted, fewer for a slow contestant; their rounds are numbered from ``-warmup``.
        seconds_each: a contestant that would take longer than this in all gets fewer turns, at least three, spread over
            the run.
        seed: of the shuffling.
        tick: called after every round, for a progress bar.

    Returns:
        A summary for each contestant.
    """
    order = random.Random(seed)
    names = list(contestants)
    cost: dict[str, float] = {}
    for name in names:
        spent: list[float] = []
        while len(spent) < warmup and sum(spent) < seconds_each / 5:
            spent.append(contestants[name](len(spent) - warmup))
        cost[name] = min(spent)
    turns = {name: max(min(rounds, 3), min(rounds, int(seconds_each / max(cost[name], 1e-9)))) for name in names}
    samples: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        order.shuffle(names)
        for name in names:
            # Turn j of n falls on round floor(j * rounds / n).
            if len(samples[name]) < turns[name] and len(samples[name]) * rounds // turns[name] <= i:
                samples[name].append(contestants[name](i))
        tick()
    return {name: Timing.of(samples[name]) for name in contestants}


# ------------------------------------------------------------------------------------------------------------- check


def saved_bytes(run: Callable[[], Any], owned: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for backward while ``run`` runs, each storage once, those of ``owned`` not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in owned}
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storage.nbytes() for storage in kept.values())


def relative_error(got: Tensor, expected: Tensor) -> float:
    """``||got - expected|| / ||expected||`` in float64; infinite where shapes differ, NaN where ``got`` has one."""
    if got.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    scale = expected.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return float((got.detach().double() - expected).norm() / scale)


def require_close(where: str, errors: Mapping[str, float], tolerance: float) -> None:
    """Refuse to go on unless every error is within the tolerance (a NaN is not).

    Raises:
        CheckError: names the contestant and the tensors that are off.
    """
    off = {name: error for name, error in errors.items() if not error <= tolerance}
    if off:
        listed = ", ".join(f"{name} by {error:.2e}" for name, error in off.items())
        raise CheckError(f"{where}: expected agreement within {tolerance:.0e} (relative norm), but off: {listed}")


# ------------------------------------------------------------------------------------------------------- environment


def environment(threads: int, clock: str = "wall") -> dict[str, Any]:
    """What a reader needs to know about the machine and the software behind the figures, and by which clock."""
    flags, model, family = _processor()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "dmoe": dmoe.__version__}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["transformers"] = importlib.metadata.version("transformers")
    wanted = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "bf16", "sve")
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": model,
        "family": family,
        "cores": os.cpu_count(),
        "threads": threads,
        "clock": clock,
        "restrictions": {name: os.environ[name] for name in RESTRICTIONS if name in os.environ},
        "instructions": [flag for flag in wanted if flag in flags],
        "memory_gib": round(_memory("MemTotal") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "compiled": any(Path(dmoe.__file__).parent.glob("_C*.so")),
        "versions": versions,
    }


def _processor() -> tuple[set[str], str, str]:
    """Instruction flags, model name, and family and model numbers (a cloud's model name alone says little)."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set(), platform.processor() or platform.machine(), ""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    model = field("model name") or platform.machine()
    return (
        set((field("flags") or field("Features")).split()),
        model,
        f"family {field('cpu family')} model {field('model')}",
    )


def _memory(field: str) -> int:
    """A line of /proc/meminfo in bytes; 0 where there is none."""
    try:
        found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def available_memory() -> int:
    """Bytes that can be had without swapping; 0 when unknown."""
    return _memory("MemAvailable")


# ------------------------------------------------------------------------------------------------------------ report


def arguments(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds of a few cases: does it run at all?")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSON, the table and the plot")
    parser.add_argument("--rounds", type=int, default=rounds, help="counted turns of each contestant")
    parser.add_argument("--warmup", type=int, default=3, help="turns before the counted ones")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="budget of one contestant in one case; fewer turns beyond it"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="PyTorch's threads")
    parser.add_argument("--cases", default="", help="only cases whose label contains this")
    parser.add_argument("--contestants", default="", help="only these beside dmoe, separated by commas")
    parser.add_argument("--seed", type=int, default=0, help="of the data and of the order of turns")
    return parser


def add_clock(parser: argparse.ArgumentParser) -> None:
    """``--clock``, for benchmarks that can count the processor's seconds instead of the wall's."""
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: seconds of the processor, of one thread")


def checked(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse, refuse what makes no sense, and set the threads."""
    args = parser.parse_args()
    for name in ("rounds", "warmup", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(args, name)}")
    if getattr(args, "clock", "wall") == "cpu" and args.threads != 1:
        parser.error(f"--clock cpu: expected --threads 1, as threads that wait cost time too, got {args.threads}")
    torch.set_num_threads(args.threads)
    return args


def stem(name: str, env: Mapping[str, Any]) -> str:
    """``<name>_<hardware>_<date>``; before the hardware the processor's clock, and what it was restricted to."""
    measured = ["one_thread"] if env.get("clock") == "cpu" else []
    measured += [value.lower() for value in dict.fromkeys(env.get("restrictions", {}).values())]
    label = env["gpu"]["name"] if "gpu" in env else f"{env['hardware']} {env['cores']} cores"
    hardware = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")
    return "_".join([name, *measured, hardware, env["date"]])


def describe(env: Mapping[str, Any]) -> str:
    """One line on where the figures come from."""
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    clock = "" if env["clock"] == "wall" else " by the processor's clock"
    under = " ".join(f"{name}={value}" for name, value in env["restrictions"].items())
    return (
        f"{env['hardware']} ({env['family']}; {', '.join(env['instructions'])}), {env['cores']} cores, "
        f"{env['threads']} threads{clock}; {versions}; {env['date']}." + (f" Under {under}." if under else "")
    )


def write_json(
    path: Path, env: Mapping[str, Any], settings: Mapping[str, Any], cases: Sequence[Mapping[str, Any]]
) -> None:
    """All figures, with what they depend on: paths are the machine's, and stay out."""
    settings = {name: value for name, value in settings.items() if name != "out"}

    def plain(value: Any) -> Any:
        return asdict(value) if isinstance(value, Timing) else str(value)

    document = {"environment": env, "settings": settings, "cases": cases}
    with replaced(path) as partial:
        partial.write_text(json.dumps(document, indent=1, default=plain) + "\n")


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A file to write, which then takes the other's place: whoever looks, or is killed, finds one of the two whole."""
    partial = path.with_name(f".{path.name}.partial{path.suffix}")
    yield partial
    os.replace(partial, path)


def publish(
    name: str,
    env: Mapping[str, Any],
    args: argparse.Namespace,
    results: list[dict[str, Any]],
    *,
    report: Callable[[str], str],
    plot: Callable[[Path], None],
) -> None:
    """Write JSON, Markdown and plot into ``args.out``, and print the text.

    Args:
        name: of the benchmark.
        env: see :func:`environment`.
        args: the settings.
        results: one for each case.
        report: makes the text, given the files' name without an ending.
        plot: draws into the given path.
    """
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out / stem(name, env)
    write_json(base.with_suffix(".json"), env, vars(args), results)
    text = report(base.name)
    base.with_suffix(".md").write_text(text)
    plot(base.with_suffix(".png"))
    print(text)
    print(f"written: {base}.json, .md, .png")


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, the first column to the left and the others to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    """Three significant digits, without an exponent."""
    value = seconds * 1e3
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f}"


def time_cells(timings: Mapping[str, Timing], names: Sequence[str], mine: str, compared: Sequence[str]) -> list[str]:
    """Medians in milliseconds, and how many times ``mine`` the others are; the fastest of ``compared`` is bold."""
    first = min((n for n in compared if n in timings), key=lambda n: timings[n].median)
    cells = []
    for n in names:
        if n not in timings:
            cells.append("not run")
            continue
        shown = milliseconds(timings[n].median)
        shown = f"**{shown}**" if n == first else shown
        cells.append(shown if n == mine else f"{shown} ({timings[n].median / timings[mine].median:.2f})")
    return cells


# -------------------------------------------------------------------------------------------------------------- plot


def new_figure(columns: int, *, width: float, height: float, rows: int = 1) -> tuple[Any, list[Any]]:
    """A light figure of panels, row by row; those of a row share their y axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": "#666666",
            "axes.titlesize": 11,
            "axes.titlelocation": "left",
            "axes.grid": True,
            "grid.color": "#e6e6e6",
            "figure.facecolor": "white",
            "axes.facecolor": "white",
        }
    )
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, sharey="row")
    return figure, list(axes.flat)


def draw_ratios(axis: Any, lines: Mapping[str, Sequence[tuple[int, float]]], tokens: Sequence[int]) -> None:
    """The nearest rival's time over dmoe's by T: a line for each name, given as points (T, ratio)."""
    for i, (name, points) in enumerate(lines.items()):
        axis.plot(*zip(*points, strict=True), marker="o", color=COLOURS[i % len(COLOURS)], label=name)
    axis.axhline(1, color="#666666", lw=1)
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [str(t) for t in tokens])
    axis.set_xlabel("T")


def label_lines(axis: Any, ends: Sequence[tuple[float, float, str, str]], *, gap: float = 0.045) -> None:
    """Write each line's name beside its end, moved apart where they would overlap.

    Args:
        axis: with a logarithmic y axis and its limits set.
        ends: x, y, text and colour of each.
        gap: smallest distance between two labels, as a share of the axis' height.
    """
    place = axis.transAxes.inverted()
    heights = [float(place.transform(axis.transData.transform((x, y)))[1]) for x, y, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    for _ in range(500):  # neighbours that are too close push each other apart
        for low in range(len(placed) - 1):
            overlap = gap - (placed[low + 1] - placed[low])
            if overlap > 0:
                placed[low] -= overlap / 2
                placed[low + 1] += overlap / 2
    for i, height in zip(order, placed, strict=True):
        x, y, text, colour = ends[i]
        axis.annotate(
            text,
            xy=(x, y),
            xytext=(1.03, height),
            textcoords="axes fraction",
            color=colour,
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.6, "alpha": 0.6, "shrinkA": 0, "shrinkB": 3},
        )


def save_figure(figure: Any, path: Path) -> None:
    """Write the PNG and forget the figure."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=130, bbox_inches="tight")
    plt.close(figure)
