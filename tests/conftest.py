"""Settings for all tests: hypothesis without deadlines, `gpu` tests only where a GPU is, poisoned empty memory."""

from __future__ import annotations

import os
import tempfile

import compiling
import hypothesis
import pytest
import quick_interpreter
import torch
import torch.distributed as dist
from broken_device import pytest_runtest_makereport, pytest_runtest_protocol  # noqa: F401 - hooks
from megatron_cases import MegatronRanks
from rank_pool import RankPool

if torch.cuda.is_available():  # cuBLAS wants this before its first call, or deterministic mode refuses its products
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Neither a case nor the drawing of cases fails for being slow: that tells of the machine.
_SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("dmoe", deadline=None, suppress_health_check=_SLOW, print_blob=True)
# In CI the same cases every time: a new one is found by people, who can look at it.
hypothesis.settings.register_profile("ci", parent=hypothesis.settings.get_profile("dmoe"), derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dmoe")


def pytest_configure(config):
    os.environ.setdefault("DMOE_CERTIFY", "0")  # tests look at the kernels themselves, refused ones above all
    # Triton reads this once, when it is imported. With `-m "not gpu"` the suite runs as on a machine without a GPU.
    if not torch.cuda.is_available() or config.option.markexpr == "not gpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # inductor finds compiled graphs by the names of our operations, whatever these do by now, and its folder in /tmp is
    # that of every checkout: what another one compiled would run here. One folder for a run and all its workers.
    if "TORCHINDUCTOR_CACHE_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="inductor")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items):
    # DMOE_TEST_DEVICE=cpu rehearses the GPU tests: see gpu_helpers.py.
    if not torch.cuda.is_available() and "DMOE_TEST_DEVICE" not in os.environ:
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


@pytest.fixture(autouse=True)
def _quick_interpreter():
    quick_interpreter.install()  # where a test has imported kernels


@pytest.fixture(autouse=True)
def _nothing_compiled():
    """No test meets another one's graphs: PyTorch keeps eight of a function, and fails where a ninth must be whole."""
    yield
    compiling.forget()


@pytest.fixture(autouse=True)
def _no_group_left(request):
    """A process group that a test leaves behind fails others, far away."""
    before = dist.is_initialized()
    yield
    if dist.is_initialized() and not before and "gpu" not in request.keywords:  # those share one per file
        dist.destroy_process_group()
        pytest.fail("a process group is left behind")


@pytest.fixture(scope="session")
def ranks():
    """Four gloo ranks, started once."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def pair():
    """Two gloo ranks that are the whole group, for frameworks that take it all; their tests stay in one worker."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def megatron(tmp_path_factory):
    """Ranks that run Megatron, started once; tests that use them stay in one worker (``xdist_group``)."""
    ranks = MegatronRanks(str(tmp_path_factory.mktemp("megatron")))
    yield ranks
    ranks.close()


@pytest.fixture
def _no_generated_products():
    """oneDNN writes code for every new shape, 2 ms each: too long for hundreds of tiny products of all sizes."""
    with torch.backends.mkldnn.flags(enabled=False):
        yield
