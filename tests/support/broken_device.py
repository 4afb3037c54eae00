"""A worker whose CUDA device broke down ends, so that pytest-xdist starts another: hooks that conftest.py takes over.

An access outside memory leaves the CUDA context of its process unusable: every later test of that process would fail of
an error that is not its own.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

STATUS = 3  # of a process that ended for this


def is_broken() -> bool:
    """Whether the device of this process answers every call with the error of an earlier one."""
    if not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


_failed = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    """Remembers that a part of the test failed."""
    report = yield
    item.stash[_failed] = item.stash.get(_failed, False) or report.failed
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """Ends the process behind a failed GPU test that broke the device; its own reports are on their way by then."""
    done = yield
    if item.get_closest_marker("gpu") and item.stash.get(_failed, False) and is_broken():
        sys.stderr.write(f"{item.nodeid} broke the device; this process ends\n")
        sys.stderr.flush()
        if hasattr(item.config, "workerinput"):
            os._exit(STATUS)  # at once: cleaning up would ask the device
        pytest.exit("the CUDA device broke down, and no other test can run in this process", returncode=STATUS)
    return done
