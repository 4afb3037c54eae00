"""The tables of ``layer_cpu.py``."""

from __future__ import annotations

from typing import Any

from .harness import describe, markdown_table, milliseconds, time_cells
from .layer_bench import CONTESTANTS, RIVALS
from .layer_run import TOLERANCE
from .processor import describe_limits, share_of_limit

REGIMES = {"changing": "every step has new tokens", "fixed": "the same tokens in every step"}
AIM, AIM_FROM = 1.15, 512  # times the floor; from so many tokens on


def nearest(entry: dict[str, Any], regime: str) -> tuple[str, float]:
    """The fastest rival, and its median over dmoe's."""
    timings = entry["timings"][regime]
    name = min((n for n in RIVALS if n in timings), key=lambda n: timings[n].median, default="")
    return name, timings[name].median / timings["dmoe"].median if name else float("inf")


def over_floor(entry: dict[str, Any], regime: str) -> float | None:
    """dmoe's median over the floor's."""
    timings = entry["timings"][regime]
    return timings["dmoe"].median / timings["floor"].median if "floor" in timings else None


def report(results: list[dict[str, Any]], env: dict[str, Any], name: str) -> str:
    """All tables as Markdown."""
    parts = [
        "# A MoE layer on the CPU: training steps and inference",
        describe(env),
        describe_limits(env),
        f"![times of all contestants over the floor]({name}.png)",
        "Median milliseconds; in brackets, how many times dmoe's. Bold: the fastest that computes the layer. The dense "
        "FFN (width K * F: equal FLOPs, another function) and the floor (the experts' bare matrix products) are marks "
        "to measure by. *Share of the limit*: the FLOPs of the experts' products over the time, over the limit above. "
        "Before timing, output and, in training, gradients of input, router and experts of each agreed with a float64 "
        "loop over experts, within a relative norm of "
        + " and ".join(f"{tolerance:.0e} ({dtype})" for dtype, tolerance in TOLERANCE.items())
        + ". Percentiles, errors, loads and page faults are in the JSON.",
    ]
    for (passes, dtype), entries in panels_of(results).items():
        for regime, said in REGIMES.items():
            parts += [f"## {passes.capitalize()}, {dtype}, {said}", _times(entries, regime, env["limits"].get(dtype))]
            parts += _remarks(entries, regime)
    trained = [entry for entry in results if entry["saved_bytes"]]
    if trained:
        parts += ["## Saved for backward beside the parameters, MiB", _saved(trained)]
    reasons = [f"- {e['case']['label']}, {n}: {why}" for e in results for n, why in e["not_run"].items()]
    if reasons:
        parts += ["## Not run", "\n".join(reasons)]
    return "\n\n".join(parts) + "\n"


def panels_of(results: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The lines by passes and dtype."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in results:
        found.setdefault((entry["case"]["passes"], entry["case"]["dtype"]), []).append(entry)
    return found


def _names(entries: list[dict[str, Any]]) -> list[str]:
    """Contestants of these lines, in the usual order."""
    return [n for n in CONTESTANTS if any(n in e["timings"]["changing"] or n in e["not_run"] for e in entries)]


def _times(entries: list[dict[str, Any]], regime: str, limit: float | None) -> str:
    names, rows = _names(entries), []
    for entry in entries:
        timings = entry["timings"][regime]
        cells = time_cells(timings, names, "dmoe", ("dmoe", *RIVALS))
        ratio = over_floor(entry, regime)
        mine = timings["dmoe"]
        spread = f"{milliseconds(mine.p10)} to {milliseconds(mine.p90)}"
        shares = [
            share_of_limit(entry["case"]["expert_flops"], timings[n].median, limit) if n in timings else "-"
            for n in ("dmoe", "floor")
        ]
        rows.append([shape_of(entry), *cells, spread, "-" if ratio is None else f"{ratio:.2f}", *shares])
    header = ["T, H, F, E, K", *names, "dmoe, p10 to p90", "dmoe / floor", "share of the limit", "the floor's"]
    return markdown_table(header, rows)


def _remarks(entries: list[dict[str, Any]], regime: str) -> list[str]:
    lines = []
    for entry in entries:
        (name, times), above = nearest(entry, regime), over_floor(entry, regime)
        if times < 1:
            lines.append(f"- {shape_of(entry)}: behind {name}, which takes {times:.2f} of its time")
        if above and above > AIM and entry["case"]["tokens"] >= AIM_FROM:
            lines.append(f"- {shape_of(entry)}: {above:.2f} times the floor; the aim is {AIM}")
    return ["Aims missed:\n\n" + "\n".join(lines)] if lines else ["Every aim is met."]


def _saved(results: list[dict[str, Any]]) -> str:
    names = [n for n in _names(results) if n != "floor"]
    rows = [
        [
            f"{shape_of(entry)}, {entry['case']['dtype']}",
            *(f"{entry['saved_bytes'][n] / 2**20:.2f}" if n in entry["saved_bytes"] else "not run" for n in names),
        ]
        for entry in results
    ]
    return markdown_table(["T, H, F, E, K, dtype", *names], rows)


def shape_of(entry: dict[str, Any]) -> str:
    """The line's sizes, as its first column says them."""
    case = entry["case"]
    return ", ".join(str(case[key]) for key in ("tokens", "hidden", "ffn", "experts", "top_k"))
