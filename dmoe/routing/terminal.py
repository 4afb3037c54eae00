"""A view of a routing as text: a grid of tokens and experts, a bar for each expert, and what it comes to."""

from __future__ import annotations

import math
import textwrap

from dmoe.routing.view import RoutingView

WIDTH = 120
_LONGEST_BAR = 60  # characters; a longer one stands for several assignments each


def as_text(view: RoutingView) -> str:
    """The lines of a view, 120 columns at most; where the grid would be wider, each token lists its experts."""
    parts = [[_headline(view), *_notes(view)], _grid(view), _bars(view), _facts(view)]
    return "\n\n".join("\n".join(part) for part in parts)


def _headline(view: RoutingView) -> str:
    return f"{view.name}: {summary(view)}, in {'training' if view.training else 'evaluation'}"


def summary(view: RoutingView) -> str:
    """Who chooses how many of whom, and up to which capacity."""
    each = f" in each of {view.groups} groups" if view.groups > 1 else ""
    if view.experts_choose:
        return f"each of {view.num_experts} experts takes {view.capacity} of {view.num_tokens} tokens{each}"
    limit = "dropless" if view.capacity is None else f"capacity {view.capacity}{each}"
    return f"{view.num_tokens} tokens choose {view.top_k} of {view.num_experts} experts, {limit}"


def _notes(view: RoutingView) -> list[str]:
    return [line for note in view.notes for line in textwrap.wrap(note, WIDTH)]


def _grid(view: RoutingView) -> list[str]:
    choice, kept = view.choice.tolist(), view.kept.tolist()
    label = max(len("token"), len(str(view.num_tokens - 1)))
    names = [f"e{expert}" for expert in range(view.num_experts)]
    digits = len(str(max((max(row) for row in choice), default=0)))
    cell = max(len(names[-1]), digits) + 2
    if label + cell * view.num_experts > WIDTH:
        return _lists(view, label)
    lines = ["token".rjust(label) + "".join(name.rjust(cell) for name in names)]
    for token, row in enumerate(choice):
        if view.groups > 1 and token and token % (view.num_tokens // view.groups) == 0:
            lines.append("")
        cells = (
            f"{k or '.'}".rjust(cell - 1) + ("x" if k and not kept[token][expert] else " ")
            for expert, k in enumerate(row)
        )
        lines.append((str(token).rjust(label) + " " + "".join(cells)).rstrip())
    return lines


def _lists(view: RoutingView, label: int) -> list[str]:
    lines = ["token".rjust(label) + "  experts"]
    for token, row in enumerate(view.choice.tolist()):
        chosen = sorted((k, expert) for expert, k in enumerate(row) if k)
        words = [f"e{expert}{'' if view.kept[token, expert] else 'x'}" for _, expert in chosen]
        lines += textwrap.wrap(
            " ".join(words) or ".",
            WIDTH,
            initial_indent=str(token).rjust(label) + "  ",
            subsequent_indent=" " * (label + 2),
        )
    return lines


def _bars(view: RoutingView) -> list[str]:
    load, computed = view.load.tolist(), view.computed.tolist()
    limited = view.capacity is not None and view.groups == 1 and not view.experts_choose
    most = max([*load, 1])
    step = math.ceil(most / _LONGEST_BAR)
    counts = [f"{here}/{all_}" for here, all_ in zip(computed, load, strict=True)]
    names = [f"e{expert}" for expert in range(view.num_experts)]
    label, width = max(len("expert"), len(names[-1])), max(len("kept/load"), *map(len, counts))
    each = "" if step == 1 else f"  one mark for {step}"
    lines = ["expert".rjust(label) + "  " + "kept/load".rjust(width) + each]
    for name, count, here, all_ in zip(names, counts, computed, load, strict=True):
        bar = "#" * math.ceil(here / step)
        if limited and view.capacity is not None and view.capacity <= most:
            bar = bar.ljust(math.ceil(view.capacity / step)) + "|"
        bar += "x" * math.ceil((all_ - here) / step)
        lines.append(f"{name.rjust(label)}  {count.rjust(width)}  {bar}".rstrip())
    return lines


def _facts(view: RoutingView) -> list[str]:
    assigned, computed = int(view.load.sum()), int(view.computed.sum())
    facts = [
        f"dropped  {assigned - computed} of {assigned} assignments ({view.dropped:.1%}); "
        f"{view.idle_tokens} of {view.num_tokens} tokens reach no expert"
    ]
    if view.entropy is not None:
        facts.append(f"entropy  {view.entropy:.3f} nats of at most {math.log(view.num_experts):.3f}")
    losses = [f"{name} {value:.4g} (coefficient {coefficient:g})" for name, (coefficient, value) in view.losses.items()]
    facts.append("losses   " + (", ".join(losses) or ("none" if view.training else "none in evaluation")))
    whose = "an expert's first choice" if view.experts_choose else "a token's first choice"
    second = ", 2 its second" if view.choice.max() > 1 else ""
    drops = "" if assigned == computed else "; x: dropped"
    facts.append(f"(1 is {whose}{second}{drops})")
    return facts
