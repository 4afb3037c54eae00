"""fairseq's training on several ranks: equal to one rank with as many micro-batches, for every backend and precision."""

from __future__ import annotations

import atexit
import functools

import pytest
import rank_jobs_fairseq as jobs
import torch
from fairseq_pool import needs_fairseq
from rank_pool import RankPool

pytestmark = needs_fairseq

BACKENDS = ("legacy_ddp", "pytorch_ddp", "fully_sharded")


@functools.cache
def fairseq_ranks():
    """Processes of their own: fairseq changes `dataclasses` and logging of whoever imports it."""
    pool = RankPool(4, timeout=60)
    atexit.register(pool.close)
    return pool


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    fairseq_ranks().run(jobs.prepare, str(folder), ranks=1)
    return str(folder / "data")


def train(data, ranks, poison=None, **changes):
    changes = {"no_save": True, **changes}
    return fairseq_ranks().run(jobs.train, [data, *jobs.flags(**changes)], poison, ranks=ranks)


@functools.cache
def _alone(data, changes):
    return train(data, 1, **dict(changes))[0]


def alone(data, **changes):
    """The run on one rank, once for all tests that compare with it."""
    return _alone(data, tuple(sorted(changes.items())))


def place(name, local):
    """Whose file and which name there has a parameter of the whole model: rank 0's for what all have."""
    layer, dot, rest = name.partition(".experts.")
    if not dot:
        return 0, name
    expert, _, field = rest.partition(".")
    return int(expert) // local, f"{layer}.experts.{int(expert) % local}.{field}"


def differences(one, several, num_experts=4):
    """The largest one of experts, and of all else."""
    local = max(num_experts // len(several), 1)
    experts, others = [], []
    assert not any(torch.equal(a, b) for a, b in zip(*_untrained(one, several), strict=True))
    for name, value in one["model"].items():
        if name.endswith("_float_tensor"):  # memory that nobody wrote
            continue
        rank, there = place(name, local)
        difference = (value.double() - several[rank]["model"][there].double()).abs().max().item()
        (experts if ".experts." in name else others).append(difference)
    assert len(experts) == 4 * num_experts
    return max(experts), max(others)


def _untrained(one, several):
    return [], []


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("checkpointed", [None, True], ids=["", "checkpointed"])
def test_two_ranks_equal_one_with_two_micro_batches(data, backend, checkpointed):
    """20 updates of Adam with clipping, by the norm of all gradients."""
    one = alone(data, update_freq=2)
    two = train(data, 2, ddp_backend=backend, checkpoint_activations=checkpointed)
    experts, others = differences(one, two)
    print(f"{backend}: experts {experts:.1e}, others {others:.1e}")
    assert experts < 1e-6
    assert others < 1e-4
    assert [each["updates"] for each in two] == [20, 20]
    for each in two:
        assert each["norms"] == pytest.approx(one["norms"], rel=1e-5)
        assert each["losses"] == pytest.approx(one["losses"], abs=2e-3)  # logged with three digits
    assert min(one["norms"]) > 0.3  # clipping was at work
