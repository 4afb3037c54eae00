"""What stands for objects of other packages in a file: their names and their arguments, and nothing of their code.

Files of Megatron, DeepSpeed and fairseq hold ``args`` and random states beside the tensors. Their pickles name classes,
which a reader would import and call. Here each name becomes an inert class that only keeps what it would have been
given, also where the package is installed; and it is written under the old name again.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import Any

# Packages whose names a file may hold; of others only those below, and argparse.Namespace.
PACKAGES = (
    "apex",
    "deepspeed",
    "fairseq",
    "megablocks",
    "megatron",
    "omegaconf",
    "transformer_engine",
    "tutel",
)
# How numpy rebuilds arrays and scalars, which random states are kept in.
_REBUILDERS = re.compile(
    r"numpy\.(?:_?core\.(?:multiarray\.(?:_reconstruct|scalar|_frombuffer)|numeric\._frombuffer)|ndarray|dtype|dtypes\.\w+"
    r"|random\._pickle\.__\w+_ctor|random\._\w+\.\w+)"
)
_GETATTR = "builtins.getattr"  # what Python 3.11 writes for a member of an enumeration
# str() of members of enumerations, which args print and whose pickles hold the value alone.
_MEMBERS = {
    ("ModelType", 1): "encoder_or_decoder",
    ("ModelType", 2): "encoder_and_decoder",
    ("ModelType", 3): "retro_encoder",
    ("ModelType", 4): "retro_decoder",
    ("PositionEmbeddingType", 1): "rotary",
    ("PositionEmbeddingType", 2): "absolute",
    ("PositionEmbeddingType", 3): "alibi",
}


class StandIn:
    """An object of a class that is not looked up.

    Attributes:
        path: full name of the class (of each subclass, which stands for one name).
        arguments: what it would have been called with.
        state: what it would have been restored from; None without any.
        attribute: the name of the member that it stands for; None where it stands for an object.
    """

    path: str = ""

    def __new__(cls, *arguments: Any) -> StandIn:
        """An object with these arguments."""
        made = object.__new__(cls)
        made.arguments, made.state, made.attribute = arguments, None, None
        return made

    def __init__(self, *arguments: Any) -> None:  # __new__ has seen them
        self.arguments: tuple[Any, ...]
        self.state: Any
        self.attribute: str | None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __str__(self) -> str:
        name = self.path.rpartition(".")[2]
        if self.attribute is not None:
            return f"{name}.{self.attribute}"
        value = self.arguments[0] if len(self.arguments) == 1 else None
        member = _MEMBERS.get((name, value)) if isinstance(value, int) else None
        return f"{name}({', '.join(map(str, self.arguments))})" if member is None else f"{name}.{member}"

    __repr__ = __str__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, StandIn):
            return NotImplemented
        return vars(self) == vars(other) and self.path == other.path

    def __hash__(self) -> int:
        return hash(self.path)


def stand_ins(names: Iterable[str]) -> list[tuple[Callable[..., Any], str]]:
    """What a reader uses for these names, as ``torch.serialization.safe_globals`` takes it; others are left out."""
    found: list[tuple[Callable[..., Any], str]] = []
    for name in names:
        if name == "argparse.Namespace":
            found.append((Namespace, name))
        elif name == _GETATTR:
            found.append((_member, name))
        elif name.partition(".")[0] in PACKAGES or _REBUILDERS.fullmatch(name):
            found.append((type("StandIn", (StandIn,), {"path": name}), name))
    return found


def _member(of: Any, name: Any) -> StandIn:
    """For ``getattr``: a member of an enumeration that is a stand-in itself; nothing else has attributes here."""
    if not (isinstance(of, type) and issubclass(of, StandIn) and isinstance(name, str)):
        raise TypeError(f"expected a member of an enumeration, got getattr of {of!r}")
    made = of()
    made.attribute = name
    return made
