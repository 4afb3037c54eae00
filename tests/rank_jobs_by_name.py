"""Jobs whose modules must not be imported by the tests' own process, because importing them changes it."""

from __future__ import annotations

import importlib


def call(group, module, name, *arguments):
    """A function of a module, in the process that runs the job."""
    return getattr(importlib.import_module(module), name)(group, *arguments)
