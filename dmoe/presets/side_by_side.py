"""Configs beside each other as text: in columns where they fit, else in a paragraph each."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from typing import Any

from dmoe.config import MoEConfig
from dmoe.router_family import RouterFamily, family_of

WIDTH = 120
_CELLS = (40, 32, 24, 20, 16)  # how wide a value may get before it goes on in the next line: the widest that fits
_TOGETHER = "\N{NO-BREAK SPACE}"  # what stands for a space where a line is not to end
_SIZES = {"hidden_size": "H", "ffn_hidden_size": "F", "num_experts": "E", "top_k": "K"}
_OF_LOSSES = ("load_balancing_coefficient", "router_z_loss_coefficient", "losses", "load_balancing_over")
# The first field of each paragraph's line, in the order of the config: experts, router, capacity, losses, the rest.
_LINES = ("activation", "router", "capacity", "losses", "backend")


def as_text(configs: Mapping[str, MoEConfig]) -> str:
    """The settings of configs in which any of them differs from :class:`dmoe.MoEConfig`'s defaults.

    Args:
        configs: by the names to show.
    """
    settings = {name: _settings(config) for name, config in configs.items()}
    default = _settings(MoEConfig(1, 1, 1, 1))
    told = [row for row in default if row in _SIZES or any(each[row] != default[row] for each in settings.values())]
    default |= {row: _text(_default(row)) for row in _SIZES}
    columns = {"default": default, **settings}
    for cell in _CELLS:
        values = {name: [textwrap.wrap(each[row], cell) for row in told] for name, each in columns.items()}
        widths = [max(map(len, told)), *(_width(name, lines) for name, lines in values.items())]
        if sum(widths) + 2 * len(columns) <= WIDTH:
            return _in_columns(told, values, widths)
    return _in_paragraphs(settings, default)


def _in_columns(rows: Sequence[str], values: Mapping[str, Sequence[list[str]]], widths: Sequence[int]) -> str:
    lines = [["", *values], ["-" * width for width in widths]]
    for number, row in enumerate(rows):
        cells = [[row], *(column[number] for column in values.values())]
        height = max(map(len, cells))
        lines += [[cell[n] if n < len(cell) else "" for cell in cells] for n in range(height)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _in_paragraphs(settings: Mapping[str, Mapping[str, str]], default: Mapping[str, str]) -> str:
    name_width = max(len(name) for name in settings)
    size_widths = {
        row: max(len(short), *(len(each[row]) for each in settings.values())) for row, short in _SIZES.items()
    }
    head = [
        "preset".ljust(name_width),
        *(short.rjust(size_widths[row]) for row, short in _SIZES.items()),
        "what differs from MoEConfig's defaults, and the losses",
    ]
    margin = len("  ".join(head[:-1])) + 2
    text = ["  ".join(head), "-" * WIDTH]
    for name, each in settings.items():
        sizes = [each[row].rjust(size_widths[row]) for row in _SIZES]
        first = "  ".join([name.ljust(name_width), *sizes]) + "  "
        for line in _groups(each, default):
            text += textwrap.wrap(line, WIDTH, initial_indent=first, subsequent_indent=" " * (margin + 2))
            first = " " * margin
    return "\n".join(text).replace(_TOGETHER, " ")


def _groups(each: Mapping[str, str], default: Mapping[str, str]) -> list[str]:
    """A config's settings as lines of ``field=value, field=value``."""
    lines: list[list[str]] = [[]]
    for row, value in each.items():
        if row in _LINES:
            lines.append([])
        if row == "losses" or (row not in _SIZES and value != default[row]):
            lines[-1].append(f"{row}={value}".replace(" ", _TOGETHER))
    return [", ".join(line) for line in lines if line]


def _settings(config: MoEConfig) -> dict[str, str]:
    """Every field of a config as text, in order; what the losses are told by is one entry."""
    found = {}
    for field in fields(config):
        if field.name not in _OF_LOSSES:
            found[field.name] = _text(getattr(config, field.name))
        elif field.name == _OF_LOSSES[0]:
            found["losses"] = " + ".join(f"{value:g} {name}" for name, value in config.coefficients) or "none"
    return found


def _default(field_name: str) -> Any:
    default = next(field.default for field in fields(MoEConfig) if field.name == field_name)
    return "-" if default is MISSING else default


def _text(value: Any) -> str:
    if isinstance(value, RouterFamily):
        return _family(value)
    if isinstance(value, tuple):
        return f"{min(value)} to {max(value)}"  # widths of experts
    return f"{value:g}" if isinstance(value, float) else str(value)


def _family(family: RouterFamily) -> str:
    """A family's name, and its options that are not the defaults."""
    plain = family_of(family.name) if family.name else family
    told = [
        f"{field.name}={'given' if isinstance(value, tuple) else _text(value)}"
        for field in fields(family)
        if (value := getattr(family, field.name)) != getattr(plain, field.name)
    ]
    return (family.name or type(family).__name__) + (f" ({', '.join(told)})" if told else "")


def _width(name: str, cells: Sequence[list[str]]) -> int:
    return max(map(len, (name, *(line for cell in cells for line in cell))))
