"""What a run's numbers mean, in sentences; each with a verdict: fine, or worth a look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from dmoe.report.columns import PARTS, Columns, Curve, early, late
from dmoe.report.reading import Run


@dataclass(frozen=True)
class Finding:
    """One tile of the page.

    Attributes:
        title: what it is about.
        value: the number to be seen first, with its unit.
        text: a sentence.
        fine: False where it is worth a look; None where it is neither good nor bad.
    """

    title: str
    value: str
    text: str
    fine: bool | None = None


def summary(run: Run, columns: Columns) -> str:
    """What was run."""
    first, last = columns.steps[0][0], columns.steps[-1][1]
    experts = sorted(set(run.layers.values()))
    widths = f"{experts[0]}" if len(experts) == 1 else f"{experts[0]} to {experts[-1]}" if experts else "no"
    chosen = sorted(set(run.top_k.values()))
    of = f", of which a token takes {' or '.join(map(str, chosen))}" if chosen else ""
    ranks = f"{run.ranks} ranks" if run.ranks > 1 else "one rank"
    layers = f"{len(run.layers)} layers" if len(run.layers) != 1 else "one layer"
    per_column = -(-len(run.lines) // len(columns.steps))
    thinned = f" Each column of a picture is {per_column} recorded steps." if per_column > 1 else ""
    return (
        f"{len(run.lines):,} recorded steps, {first:,} to {last:,}, of {layers} with {widths} experts each{of}, on "
        f"{ranks}.{thinned}"
    )


def findings(columns: Columns) -> list[Finding]:
    """Of the last tenth of the run, one after the other; what was not recorded is left out."""
    found = [_load(columns), _entropy(columns), _dead(columns), _dropped(columns), _logits(columns)]
    found += [_similarity(columns), _time(columns), _bytes(columns)]
    return [each for each in found if each is not None]


def _worst(columns: Columns, name: str) -> tuple[float, str] | None:
    """The largest late value of a curve of the layers, and whose."""
    values = [
        (value, layer)
        for layer, each in columns.layers.items()
        if (value := late(each.peak if name == "peak" else each.curves.get(name, []))) is not None
    ]
    return max(values, default=None)


def _of(columns: Columns, name: str, when: Callable[[Curve], float | None] = late) -> float | None:
    """Mean over layers of a curve's late (or early) values."""
    values = [value for each in columns.layers.values() if (value := when(each.curves.get(name, []))) is not None]
    return sum(values) / len(values) if values else None


def _load(columns: Columns) -> Finding | None:
    worst = _worst(columns, "peak")
    if worst is None:
        return None
    peaks = [value for each in columns.layers.values() if (value := late(each.peak)) is not None]
    mean = sum(peaks) / len(peaks)
    text = f"is what a layer's busiest expert takes at the end; most of all in {_called(worst[1])}, {worst[0]:.1f}."
    return Finding("Busiest experts", f"{mean:.1f} times even", text, fine=worst[0] < 3)


def _entropy(columns: Columns) -> Finding | None:
    now, before = _of(columns, "entropy"), _of(columns, "entropy", early)
    if now is None or before is None:
        return None
    moved = "and it began with" if abs(now - before) >= 0.02 else "as at the beginning, of"
    text = f"is the routers' entropy as a share of its largest, {moved} {before:.0%}: 100% is undecided, 0% certain."
    return Finding("Entropy", f"{now:.0%}", text, fine=None if now > 0.02 else False)


def _dead(columns: Columns) -> Finding | None:
    idle = {}
    for name, layer in columns.layers.items():
        tail = [load for load in layer.load[-max(1, round(len(layer.load) * 0.1)) :] if load is not None]
        count = sum(not any(values) for values in zip(*tail, strict=False))
        if count:
            idle[name] = count
    if not columns.layers:
        return None
    if not idle:
        return Finding("Dead experts", "none", "Every expert is given tokens at the end of the run.", fine=True)
    name, most = max(idle.items(), key=lambda item: item[1])
    where = f"in {_called(name)}" if len(idle) == 1 else f"in {len(idle)} layers, most in {_called(name)}: {most}"
    return Finding(
        "Dead experts", f"{sum(idle.values())}", f"had no token in the last tenth of the run, {where}.", False
    )


def _dropped(columns: Columns) -> Finding | None:
    share, worst = _of(columns, "dropped_share"), _worst(columns, "dropped_share")
    if share is None or worst is None:
        return None
    if not any(value for each in columns.layers.values() for value in each.curves["dropped_share"]):
        return Finding("Dropped", "nothing", "No assignment was dropped in any step.", fine=True)
    text = f"of the assignments are dropped at the end; most in {_called(worst[1])}, {worst[0]:.1%}."
    return Finding("Dropped", f"{share:.1%}", text, fine=worst[0] < 0.1)


def _logits(columns: Columns) -> Finding | None:
    now, before = _of(columns, "router_logits_rms"), _of(columns, "router_logits_rms", early)
    worst = _worst(columns, "router_logits_max")
    if now is None or before is None or worst is None:
        return None
    largest = f"the largest is {worst[0]:.3g}, in {_called(worst[1])}"
    text = f"is the RMS of the routers' logits, {before:.2g} at first; {largest}."
    return Finding("Router logits", f"{now:.2g}", text, fine=not (now > 4 * before and worst[0] > 20))


def _similarity(columns: Columns) -> Finding | None:
    curves = [
        [v for v in each.curves.get("expert_similarity", []) if v is not None] for each in columns.layers.values()
    ]
    ends = [curve[-1] for curve in curves if curve]
    if not ends:
        return None
    now, worst = sum(ends) / len(ends), max(ends)
    text = (
        "is the mean cosine between two experts' weights: 1 for copies, near 0 for experts that have nothing in common."
    )
    return Finding("Similarity", f"{now:.2f}", text, fine=None if worst < 0.9 else False)


def _time(columns: Columns) -> Finding | None:
    step = late(columns.seconds)
    parts = {
        part: sum(value for each in columns.layers.values() if (value := late(each.seconds.get(part, []))) is not None)
        for part in PARTS
    }
    total = sum(parts.values())
    if not step:
        return None
    if not total:
        return Finding("Step", seconds(step), "The layers' own times were not recorded (compiled).")
    shares = ", ".join(f"{part} {value / total:.0%}" for part, value in parts.items())
    text = f"a step; the mixtures' forwards are {total / step:.0%} of it: {shares}."
    return Finding("Time", seconds(step), text)


def _bytes(columns: Columns) -> Finding | None:
    values = [
        value for each in columns.layers.values() if (value := late(each.curves.get("bytes_sent", []))) is not None
    ]
    if not values:
        return None
    return Finding("Sent", in_bytes(sum(values)), "go from rank to rank in a step's forwards, of all layers and ranks.")


def _called(name: str) -> str:
    return name or "the layer"


def seconds(value: float) -> str:
    """With a unit that fits."""
    return f"{value:.3g} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def in_bytes(value: float) -> str:
    """With a unit that fits."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"
