"""Where torchtitan is: a folder of its own, on the path of the processes that need it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
INSTALLED = Path(sys.prefix) / "torchtitan"
MISSING = "torchtitan is not installed: make .venv/torchtitan"
PYTHONPATH = os.pathsep.join([str(ROOT), str(INSTALLED), str(ROOT / "tests/support"), os.environ.get("PYTHONPATH", "")])
