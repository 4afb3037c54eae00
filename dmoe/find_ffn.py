"""Which modules of a model are meant, and what each of them computes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dmoe.dense_ffn import RECOGNISED, DenseFFN, UnrecognisedFFNError, read_ffn
from dmoe.layer import MoE

Pattern = str | re.Pattern[str]
Select = Pattern | Sequence[Pattern] | Callable[[str, nn.Module], bool]


def select_names(model: nn.Module, select: Select) -> list[str]:
    """Names of the outermost modules that are selected."""
    chosen: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(_inside(name, outer) for outer in chosen) and _matches(select, name, module):
            chosen.append(name)
    if not chosen:
        raise ValueError(f"replace_ffn: select: no module matches {select!r}. {_could_select(model)}")
    return chosen


def _inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(outer + ".")


def _matches(select: Select, name: str, module: nn.Module) -> bool:
    if isinstance(select, str):
        return fnmatchcase(name, select) and (name != "" or select == "")  # "*" means all inside, not the model
    if isinstance(select, re.Pattern):
        return select.search(name) is not None
    if callable(select):
        return bool(select(name, module))
    if not isinstance(select, Sequence):
        raise TypeError(
            "replace_ffn: select: expected a glob, a compiled regular expression, a sequence of these, or a function "
            f"of name and module; got {type(select).__name__}"
        )
    return any(_matches(pattern, name, module) for pattern in select)


def by_module(model: nn.Module, names: list[str]) -> list[tuple[nn.Module, list[str]]]:
    """Each selected module with all its selected names, in order."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name in names:
        module = model.get_submodule(name)
        found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def read_block(model: nn.Module, name: str, module: nn.Module, *, ignore_functional_dropout: bool) -> DenseFFN:
    """What a selected module computes, or an error that names it."""
    what = f"replace_ffn: {name!r} ({type(module).__name__})"
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    if any(isinstance(other, MoE) for other in (*above, *module.modules())):
        raise ValueError(
            f"{what}: expected a dense feed-forward block, and it is, holds, or lies in a dmoe.MoE already"
        )
    if name == "" and not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise ValueError(
            f"{what}: expected a module inside the model, got the model itself, which cannot be exchanged in place"
        )
    try:
        return read_ffn(module, ignore_functional_dropout=ignore_functional_dropout)
    except UnrecognisedFFNError as error:
        raise ValueError(
            f"{what} is not recognised as a feed-forward block: it {error}. {_instead(module)}"
            f"Recognised: {RECOGNISED}. {_could_select(model)}"
        ) from error


def _instead(module: nn.Module) -> str:
    """Where to look for what replacing blocks is not for: experts that a model of Transformers has already."""
    from_transformers = type(module).__module__.partition(".")[0] in ("transformers", "transformers_modules")
    if not (from_transformers and any(parameter.dim() == 3 for parameter in module.parameters())):
        return ""
    return "It has experts: dmoe.integrations.transformers.use(model) lets dmoe compute them. "


def _could_select(model: nn.Module) -> str:
    """A sentence with the names of a few blocks that would be accepted."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name == "" or any(_inside(name, outer) for outer in found):
            continue
        try:
            read_ffn(module)
        except UnrecognisedFFNError:
            continue
        found.append(name)
        if len(found) == 5:
            break
    if found:
        return f"Feed-forward blocks in this model: {', '.join(found)}"
    return f"This {type(model).__name__} holds no feed-forward block of a known form"
