"""``python -m dmoe.routing.show PRESET``: draws what a router does with given or random logits.

In the terminal, and with ``--out picture.png`` as a picture (which needs matplotlib). ``docs/routing.md`` shows some.
"""

from __future__ import annotations

import argparse
import ast
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dmoe import presets
from dmoe.config import MoEConfig
from dmoe.router_family import RouterFamily, family_of
from dmoe.routing.logits_file import read_logits
from dmoe.routing.terminal import as_text
from dmoe.routing.view import RoutingView, look

_FEW = 8  # experts, unless somebody asks for more
_SHOWN = ("num_experts", "top_k", "num_groups", "top_k_groups")
_SMALL = {"hidden_size": 16, "ffn_hidden_size": 16}  # no weight of an expert is made; only a cosine router has an x


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, or 2 with one sentence about what was wrong."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        views = _views(args)
        if args.out is not None:
            from dmoe.routing.picture import save_picture

            save_picture(views, args.out)
    except (OSError, ValueError, TypeError, ImportError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"{parser.prog}: error: {text}", file=sys.stderr)
        return 2
    try:
        print(f"wrote {args.out}" if args.out else "\n\n\n".join(map(as_text, views)), flush=True)
    except BrokenPipeError:  # whoever reads has seen enough; and Python is to find nothing left to write
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dmoe.routing.show",
        description="Draws what routers do with given or random logits: who goes where, who is dropped, the loads.",
        epilog=f"Presets: {', '.join(presets.NAMES)}.",
    )
    parser.add_argument(
        "presets", nargs="+", metavar="PRESET", help="its name; with settings of its own as in vmoe:batch_priority=True"
    )
    parser.add_argument("--tokens", type=int, metavar="T", help="how many random tokens (default: 32)")
    parser.add_argument("--experts", type=int, metavar="E", help=f"how many experts (default: {_FEW} at most)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of all that is random (default: 0)")
    parser.add_argument("--logits", type=Path, metavar="FILE", help="(T, E) numbers: .pt (a tensor), .csv or .json")
    parser.add_argument("--eval", action="store_true", help="in evaluation instead of training")
    parser.add_argument("--out", type=Path, metavar="FILE", help="a picture instead of text: .png, .svg or .pdf")
    parser.add_argument(
        "--field",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a field of MoEConfig, or an argument of the presets; a router's own options go as "
        "'router=top_k(second_expert=all)'; may be repeated",
    )
    return parser


def _views(args: argparse.Namespace) -> list[RoutingView]:
    logits = None if args.logits is None else read_logits(args.logits)
    there = (None, None) if logits is None else logits.shape
    for name, asked, given in zip(("tokens", "experts"), (args.tokens, args.experts), there, strict=True):
        if asked is not None and (asked < 1 or given not in (None, asked)):
            expected = "at least 1" if given is None else f"{given}, as {args.logits} has them, or nothing"
            raise ValueError(f"--{name}: expected {expected}, got {asked}")
    common: dict[str, Any] = {}
    for text in args.field:
        common |= parse_settings(text, "--field")
    return [_view(text, args, common, logits) for text in args.presets]


def _view(text: str, args: argparse.Namespace, common: dict[str, Any], logits: Tensor | None) -> RoutingView:
    name, _, own = text.partition(":")
    published = presets.get(name)
    settings = {**common, **parse_settings(own, text)}
    experts = args.experts if logits is None else logits.shape[1]
    experts = settings.pop("num_experts", experts) or min(published.num_experts, _FEW)
    config = presets.get(name, **{**_SMALL, **fewer_experts(published, experts), **settings})
    return look(
        config,
        name=", ".join([name, *(f"{field}={_told(value)}" for field, value in settings.items())]),
        logits=logits,
        num_tokens=args.tokens or 32,
        seed=args.seed,
        training=not args.eval,
        notes=_notes(published, config),
    )


def fewer_experts(published: MoEConfig, num_experts: int) -> dict[str, Any]:
    """Fields that make a preset one of so many experts: of few, fewer are chosen, in fewer groups of two at least."""
    if num_experts >= published.num_experts:
        return {"num_experts": num_experts}
    top_k = min(published.top_k, max(2, num_experts // 4), num_experts)
    fields: dict[str, Any] = {"num_experts": num_experts, "top_k": top_k}
    if published.num_groups > 1:
        sizes = [n for n in range(1, published.num_groups + 1) if num_experts % n == 0 and num_experts // n >= 2]
        groups = max(sizes, default=1)
        share = (published.top_k_groups or published.num_groups) / published.num_groups
        needed = -(-top_k * groups // num_experts)
        fields |= {"num_groups": groups, "top_k_groups": max(round(share * groups), needed, 1)}
    return fields


def _notes(published: MoEConfig, config: MoEConfig) -> tuple[str, ...]:
    changed = [
        f"{name} {getattr(config, name)} instead of {getattr(published, name)}"
        for name in _SHOWN
        if getattr(config, name) != getattr(published, name)
    ]
    return (f"Not as published: {', '.join(changed)}.",) if changed else ()


def _told(value: Any) -> str:
    return value.name if isinstance(value, RouterFamily) else str(value)


def parse_settings(text: str, where: str) -> dict[str, Any]:
    """``"top_k=2, drop_order=random, router=cosine(dim=8)"`` to a dict. Nothing in it is run.

    Args:
        text: names and Python's literals, words, or families of routers with such options.
        where: what errors name.

    Raises:
        ValueError: anything else, or options that a family refuses.
        TypeError: options that a family has not.
    """
    try:
        call = ast.parse(f"_({text})", mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        call = None
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
        raise ValueError(f"{where}: expected NAME=VALUE, as in top_k=2, got {text!r}")
    return _options(call, text, where)


def _options(call: ast.Call, text: str, where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if call.args:
        raise ValueError(f"{where}: expected NAME=VALUE, as in top_k=2, got {text!r}")
    for keyword in call.keywords:
        node = keyword.value
        if isinstance(node, ast.Name):
            found[str(keyword.arg)] = node.id
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            found[str(keyword.arg)] = type(family_of(node.func.id))(**_options(node, text, where))
        else:
            try:
                found[str(keyword.arg)] = ast.literal_eval(node)
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{where}: {keyword.arg}: expected a word, a number or a list, got {text!r}"
                ) from error
    return found


if __name__ == "__main__":
    sys.exit(main())
