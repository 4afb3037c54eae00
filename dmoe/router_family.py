"""What names a family of routers in ``MoEConfig(router=...)``, and holds the options that only this family has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from torch import nn

    from dmoe.config import MoEConfig

_BY_NAME: dict[str, type[RouterFamily]] = {}
_Class = TypeVar("_Class", bound="type[RouterFamily]")


@dataclass(frozen=True)
class RouterFamily:
    """Base of every family: a frozen dataclass of its own options, which builds its router.

    A subclass adds fields with defaults, checks their ranges in ``_check_fields``, what depends on the rest of the
    layer in :meth:`check`, and returns its module from :meth:`build`. ``docs/routing.md`` has one from start to end.
    Values of ``Literal``, bool, int and float fields are checked here.

    Attributes:
        name: under which :func:`register` knows it, and which errors show.
        experts_choose: experts choose their tokens, not tokens their experts: no capacity drops anything.
        looks_ahead: a token's routing depends on later tokens of the batch, so a causal model has to say that it is
            meant (``MoEConfig.causal``).
        weights_sum_to_1: gate weights of a token sum to 1, whatever its logits.
        most_choices: the largest K that the family can do; None for any.
        unread: fields of the config that mean nothing here: any value but the default is refused.
        lacks_losses: names of losses that there is nothing to compute of; a config that names one is refused.
    """

    name: ClassVar[str] = ""
    experts_choose: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = False
    weights_sum_to_1: ClassVar[bool] = False
    most_choices: ClassVar[int | None] = None
    unread: ClassVar[tuple[str, ...]] = ()
    lacks_losses: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        check_types(self, type(self).__name__)
        self._check_fields()

    def require(self, condition: bool, field: str, allowed: str) -> None:
        """Raise a ValueError in the house's words unless ``condition``."""
        require(type(self).__name__, self, condition, field, allowed)

    def _check_fields(self) -> None:
        """Raise ValueError for an option out of range; types are checked already."""

    def check(self, config: MoEConfig) -> None:
        """Raise ValueError where the layer's own options do not go with this family."""
        most = self.most_choices
        if most is not None and config.top_k > most:
            raise ValueError(
                f"MoEConfig: top_k: expected at most {most} with router={self.name!r}, which sends a token to "
                f"{most} expert{'s' if most > 1 else ''}, got {config.top_k}"
            )
        for field in fields(config):
            value = getattr(config, field.name)
            if field.name in self.unread and value != field.default:
                raise ValueError(
                    f"MoEConfig: {field.name}: expected {field.default!r} with router={self.name!r}, which does not "
                    f"read it, got {value!r}"
                )
        for name, coefficient in config.coefficients:
            if name in self.lacks_losses:
                raise ValueError(
                    f"MoEConfig: losses: expected no {name!r} with router={self.name!r}, which has none, got "
                    f"{coefficient}"
                )

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """The router: a module that keeps :class:`dmoe.routing.Router`.

        Args:
            config: of the layer.
            ranks: :class:`dmoe.parallel.LoadOfRanks`, the ranks whose tokens share the experts; None for this one.
            device, dtype: of the parameters.
        """
        raise NotImplementedError(f"{type(self).__name__}: expected a build method that returns the router")


def register(name: str) -> Callable[[_Class], _Class]:
    """Class decorator: ``MoEConfig(router=name)`` means this family with its defaults.

    Raises:
        ValueError: the name is another family's.
    """

    def named(family: _Class) -> _Class:
        taken = _BY_NAME.get(name)
        same = taken is not None and (taken.__module__, taken.__qualname__) == (family.__module__, family.__qualname__)
        if taken is not None and not same:  # the same class again: a module that was reloaded
            raise ValueError(
                f"register: name: expected one that no family has, got {name!r}, which is {taken.__name__}"
            )
        family.name = name
        _BY_NAME[name] = family
        return family

    return named


def family_of(router: str | RouterFamily) -> RouterFamily:
    """The family that a name, or the family itself, stands for.

    Raises:
        ValueError: a name that nobody registered, or something else.
    """
    if isinstance(router, RouterFamily):
        return router
    if isinstance(router, str) and router in _BY_NAME:
        return _BY_NAME[router]()
    known = ", ".join(map(repr, sorted(_BY_NAME)))
    raise ValueError(f"MoEConfig: router: expected one of {known}, or one of dmoe.routing's families, got {router!r}")


def require(operation: str, owner: Any, condition: bool, field: str, allowed: str) -> None:
    """Raise ValueError naming ``owner``'s field, what was expected and what it is, unless ``condition``."""
    if not condition:
        raise ValueError(f"{operation}: {field}: expected {allowed}, got {getattr(owner, field)!r}")


def check_types(owner: Any, operation: str, skip: tuple[str, ...] = ()) -> None:
    """Check a dataclass's fields against their annotations: ``Literal``, bool, int and float, each maybe with None.

    Raises:
        ValueError: a value of another type, or that its ``Literal`` does not name.
    """
    hints = get_type_hints(type(owner))
    for field in fields(owner):
        if field.name in skip:
            continue
        value, hint = getattr(owner, field.name), hints[field.name]
        kinds = (hint, *get_args(hint))
        choices = _choices(hint)
        if choices:
            allowed = "one of " + ", ".join(map(repr, choices))
            require(operation, owner, not isinstance(value, list) and value in choices, field.name, allowed)
        elif hint is bool:
            require(operation, owner, isinstance(value, bool), field.name, "True or False")
        elif float in kinds:
            number = isinstance(value, int | float) and not isinstance(value, bool)
            require(operation, owner, number or (value is None and hint is not float), field.name, "a number")
        elif int in kinds:
            integer = isinstance(value, int) and not isinstance(value, bool)
            require(operation, owner, integer or (value is None and hint is not int), field.name, "an integer")


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values a ``Literal`` (or ``Literal | None``) admits; empty for any other type."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    found = tuple(value for part in get_args(hint) if get_origin(part) is Literal for value in get_args(part))
    return (*found, None) if found else ()
