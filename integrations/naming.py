"""Errors about an option, by the name under which it was given: dmoe's own name a field of its config."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager


@contextmanager
def by_flags(flags: Mapping[str, str], speaker: str, error: type[Exception] | None = None) -> Iterator[None]:
    """Let what dmoe says about a field of :class:`dmoe.MoEConfig` be said about a framework's flag.

    Args:
        flags: field to flag.
        speaker: who says it now.
        error: what is raised; by default the error that came. One about none of the fields is left as it is.

    Raises:
        ValueError or TypeError: with every field replaced by its flag, and the first one still named behind it.
    """
    try:
        yield
    except (ValueError, TypeError) as came:
        said = re.match(r"(?:\w+: )?(\w+)(?=: expected )", str(came))
        if said is None or said[1] not in flags:
            raise
        fields = re.compile(rf"\b({'|'.join(map(re.escape, flags))})\b")
        rest = fields.sub(lambda field: flags[field[0]], str(came)[said.end() :])
        raise (error or type(came))(f"{speaker}{flags[said[1]]} ({said[1]}){rest}") from came
