"""Settings for all tests: hypothesis without deadlines, `gpu` tests only where a GPU is, poisoned empty memory."""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():  # Triton reads this once, when it is imported: kernels run under its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

hypothesis.settings.register_profile("dmoe", deadline=None, print_blob=True)
# In CI the same cases every time: a new one is found by people, who can look at it.
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("dmoe"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dmoe")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and this machine has none"))


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch):
    """Memory that nobody wrote reads as NaN: `torch.utils.deterministic.fill_uninitialized_memory` at work."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def _no_generated_products():
    """oneDNN writes code for every new shape, 2 ms each: too long for hundreds of tiny products of all sizes."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield
