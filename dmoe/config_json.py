"""``MoEConfig`` as plain JSON values and back: what a model's file says of its layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from dmoe.activation_functions import name_of
from dmoe.config import MoEConfig
from dmoe.router_family import RouterFamily, family_of, registered

_FIELDS = {field.name: field for field in dataclasses.fields(MoEConfig)}


def config_to_json(config: MoEConfig) -> dict[str, Any]:
    """The fields that have no default, and those that differ from theirs, as JSON has values.

    Args:
        config: whose router family is registered under a name; options of the family are numbers, text or lists.

    Returns:
        A dict for ``json.dumps``. ``router`` is the family's name, or ``{"name": ..., option: ...}`` with the options
        that differ from their defaults; ``activation`` a name, or the numbers of one by name; ``losses`` a dict.

    Raises:
        TypeError: no MoEConfig.
        ValueError: a family without a name, or with an option that JSON cannot hold; an activation that is a function.
    """
    if not isinstance(config, MoEConfig):
        raise TypeError(f"config_to_json: config: expected a MoEConfig, got {type(config).__name__}")
    found: dict[str, Any] = {}
    for name, field in _FIELDS.items():
        value = getattr(config, name)
        if name == "router":
            written = _family_to_json(config.family)
            if written != field.default:
                found[name] = written
        elif name == "activation" and callable(value):
            raise ValueError(
                "config_to_json: activation: expected a name, or one with numbers, got the Python function "
                f"{name_of(value)}, which a file could not hold: leave it out, and give it again where the file is read"
            )
        elif field.default is dataclasses.MISSING or value != field.default:
            found[name] = _plain(value, name, is_losses=name == "losses")
    return found


def config_from_json(values: Mapping[str, Any]) -> MoEConfig:
    """The inverse of :func:`config_to_json`. Values are read as data; nothing of them is executed or imported.

    Args:
        values: what :func:`config_to_json` gave, or ``json.loads`` of its text. Fields that are absent have their
            defaults.

    Raises:
        ValueError: a field or router that does not exist, one that is missing, or a value that it cannot have.
    """
    values = _mapping(values, "values")
    unknown = sorted(map(str, set(values) - set(_FIELDS)))
    if unknown:
        raise ValueError(f"config_from_json: expected fields of MoEConfig, got {', '.join(unknown)}")
    required = [name for name, field in _FIELDS.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        raise ValueError(f"config_from_json: expected {', '.join(required)}, got none of {', '.join(missing)}")
    given = dict(values)
    if "router" in given:
        given["router"] = _family_from_json(given["router"])
    if given.get("losses") is not None:
        given["losses"] = _mapping(given["losses"], "losses")
    width = given["ffn_hidden_size"]
    if not _is_int(width) and not (isinstance(width, list) and width and all(map(_is_int, width))):
        raise ValueError(
            f"config_from_json: ffn_hidden_size: expected an integer, or a list of them, got {width!r:.80}"
        )
    try:
        return MoEConfig(**given)
    except (TypeError, OverflowError) as error:  # a value that the checks could not even compare
        raise ValueError(f"config_from_json: expected values as MoEConfig takes them, got: {error}") from error


def _family_to_json(family: RouterFamily) -> str | dict[str, Any]:
    kind = type(family)
    if kind not in registered():
        raise ValueError(
            f"config_to_json: router: expected a family under dmoe.routing.register, got {kind.__name__}, which a "
            "file could not name"
        )
    # A field of the family without a default is one that a file has to name.
    options = {
        field.name: _plain(getattr(family, field.name), f"router {kind.name!r}: {field.name}")
        for field in dataclasses.fields(family)
        if field.init and (_default(field) is dataclasses.MISSING or getattr(family, field.name) != _default(field))
    }
    return {"name": kind.name, **options} if options else kind.name


def _family_from_json(written: Any) -> RouterFamily:
    if isinstance(written, str):
        return family_of(written)
    options = dict(_mapping(written, "router"))
    name = options.pop("name", None)
    kind = next((each for each in registered() if each.name == name), None)
    if kind is None:
        known = ", ".join(sorted(repr(each.name) for each in registered()))
        raise ValueError(f"config_from_json: router: expected a name, one of {known}, got {name!r:.80}")
    unknown = sorted(set(options) - {field.name for field in dataclasses.fields(kind) if field.init})
    if unknown:
        raise ValueError(f"config_from_json: router {name!r}: expected options of it, got {', '.join(unknown)}")
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"config_from_json: router {name!r}: expected options as it takes them: {error}") from error


def _plain(value: Any, name: str, *, is_losses: bool = False) -> Any:
    """A value as JSON has it.

    Raises:
        ValueError: it is of another kind.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if is_losses:
        return dict(value)
    if isinstance(value, Sequence):
        return [_plain(each, name) for each in value]
    raise ValueError(f"config_to_json: {name}: expected a number, text or a list, got {type(value).__name__}")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"config_from_json: {name}: expected an object with names, got {value!r:.80}")
    return value


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
