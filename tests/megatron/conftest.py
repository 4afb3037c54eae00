"""The release of megatron-core that is tried is this process's, too, before any test imports another one."""

from __future__ import annotations

import os
import sys
import typing

sys.path[:0] = [wheel for wheel in [os.environ.get("MEGATRON_WHEEL")] if wheel]
if not hasattr(typing, "override"):
    typing.override = lambda method: method  # Python 3.11, for megatron-core from 0.17 on
