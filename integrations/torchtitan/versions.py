"""Which torchtitan this is for."""

from __future__ import annotations

import os
import warnings
from importlib.metadata import PackageNotFoundError, version

SUPPORTED = (0, 3)
TRY = "DMOE_UNTRIED_TORCHTITAN"  # =1 in the environment: another release is not refused
INSTALL = "pip install 'torchtitan>=0.3,<0.4'"


def check_version() -> None:
    """See that a supported release of torchtitan is installed.

    Raises:
        ImportError: none is, or another one, but for that under ``TRY``.
    """
    expected = f"dmoe.integrations.torchtitan: expected torchtitan {SUPPORTED[0]}.{SUPPORTED[1]}"
    try:
        found = version("torchtitan")
    except PackageNotFoundError:
        raise ImportError(f"{expected}, found none; install it with: {INSTALL}") from None
    if tuple(found.split(".")[:2]) == tuple(str(number) for number in SUPPORTED):
        return
    if os.environ.get(TRY) != "1":
        raise ImportError(
            f"{expected}, found {found}; install a supported one with: {INSTALL}, or try this one as it is, with "
            f"{TRY}=1 in the environment"
        )
    warnings.warn(f"dmoe: torchtitan {found} has not been tried with this dmoe ({TRY}=1)", stacklevel=2)
