"""``python -m dmoe.lora merge|convert``; see :mod:`dmoe.lora.command`."""

from __future__ import annotations

import sys

from dmoe.lora.command import main

if __name__ == "__main__":
    sys.exit(main())
