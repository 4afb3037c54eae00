"""What an ablation's runs say together: means over seeds, and differences to the base, paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .variants import BASE, Variant

# Student's t at 97.5% for 1, 2, ... degrees of freedom.
T_TABLE = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@dataclass(frozen=True)
class Row:
    """One variant over its seeds. Bits are held-out bits per byte at the end."""

    variant: Variant
    bits: list[float]
    differences: list[float]
    """To the base's run of the same seed."""
    seconds: float
    """Processor time of training, the mean; a dense run before it included."""
    busiest: float
    """Load of the busiest expert relative to the mean, in the last tenth of the steps; the mean over seeds."""

    @property
    def half_width(self) -> float:
        """Of the 95% interval of the mean difference, by Student's t; infinite for one seed."""
        count = len(self.differences)
        if count < 2:
            return math.inf
        t = T_TABLE[min(count - 2, len(T_TABLE) - 1)]
        return t * statistics.stdev(self.differences) / math.sqrt(count)

    @property
    def clear(self) -> bool:
        """Whether the mean difference is outside of what seeds do: the interval leaves out 0."""
        return abs(statistics.fmean(self.differences)) > self.half_width


def rows(result: dict[str, Any], variants: Sequence[Variant]) -> list[Row]:
    """A row for each variant that has all seeds of the base."""
    runs = result["runs"]
    seeds = [key.partition("/")[2] for key in runs if key.startswith(f"{BASE}/")]
    found = []
    for variant in variants:
        own = [runs.get(f"{variant.name}/{seed}") for seed in seeds]
        if not own or None in own:
            continue
        bits = [run["held_out_bpb"] for run in own]
        base = [runs[f"{BASE}/{seed}"]["held_out_bpb"] for seed in seeds]
        found.append(
            Row(
                variant,
                bits,
                [a - b for a, b in zip(bits, base, strict=True)],
                statistics.fmean(run["seconds"] for run in own),
                statistics.fmean(run["busiest"] for run in own),
            )
        )
    return found


def table(found: Sequence[Row]) -> str:
    """Lines of Markdown."""
    lines = [
        "| | | held-out bits per byte | to the base, same seed | seeds | 95% | busiest expert | seconds |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        spread = f" ± {statistics.stdev(row.bits):.4f}" if len(row.bits) > 1 else ""
        difference, each, half = "", "", ""
        if row.variant.name != BASE:
            difference = f"{statistics.fmean(row.differences):+.4f}"
            difference = f"**{difference}**" if row.clear else difference
            each = f"{min(row.differences):+.4f} .. {max(row.differences):+.4f}"
            half = f"± {row.half_width:.4f}" if math.isfinite(row.half_width) else ""
        lines.append(
            f"| {row.variant.factor} | {row.variant.value} | {statistics.fmean(row.bits):.4f}{spread} | {difference} | "
            f"{each} | {half} | {row.busiest:.1f}x | {row.seconds:.0f} |"
        )
    return "\n".join(lines)
