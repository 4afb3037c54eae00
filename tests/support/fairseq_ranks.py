"""What the tests of fairseq on several ranks share: processes, data, and comparing runs."""

from __future__ import annotations

import atexit
import functools
import tempfile

import fairseq_tools as tools
import rank_jobs_fairseq as jobs
from rank_pool import RankPool

BACKENDS = ("legacy_ddp", "pytorch_ddp", "fully_sharded")


@functools.cache
def pool():
    """Processes of their own: fairseq changes `dataclasses` and logging of whoever imports it."""
    processes = RankPool(4)
    atexit.register(processes.close)
    return processes


@functools.cache
def data():
    """A folder of binarised text."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    pool().run(jobs.prepare, folder.name, ranks=1)
    return f"{folder.name}/bin"


@functools.cache
def _pairs():
    """A folder of binarised sentence pairs."""
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    return pool().run(jobs.prepare_pairs, folder.name, ranks=1)[0]


@functools.cache
def train_pairs(ranks, experts, *flags):
    """What each rank ends with after three updates of an encoder and a decoder, dense or with experts."""
    words = [*tools.PAIRS, *(tools.EXPERTS if experts else ["--criterion", "cross_entropy"])]
    short = ["--cpu", "--no-save", "--disable-validation", "--max-update", "3"]
    return pool().run(jobs.train, [_pairs(), *map(str, words), *short, *flags], ranks=ranks)


def train(ranks, poison=None, only_load=False, **changes):
    """What each rank ends with: see `rank_jobs_fairseq.train`."""
    changes = changes if "save_dir" in changes else {"no_save": True, **changes}
    return pool().run(jobs.train, [data(), *jobs.flags(**changes)], poison, only_load, ranks=ranks)


def failure(ranks, tool="train", **changes):
    """What each rank says when it fails."""
    return pool().run(jobs.failure, tool, [data(), *jobs.flags(**changes)], ranks=ranks)


@functools.cache
def _alone(changes):
    return train(1, **dict(changes))[0]


def alone(**changes):
    """The run on one rank, once for all tests that compare with it."""
    return _alone(tuple(sorted(changes.items())))


def differences(one, several):
    """The largest one of experts, and of all else: from a whole model to parts of it."""
    names = [name for name in one if ".experts." in name]
    experts = 1 + max(int(name.split(".experts.")[1].partition(".")[0]) for name in names)
    local = max(experts // len(several), 1)
    assert len(names) == 4 * experts
    assert sum(".experts." in name for name in several[0]) == 4 * local
    of_experts, of_others = [], []
    for name, value in one.items():
        rank, there = 0, name
        if name in names:
            layer, _, rest = name.partition(".experts.")
            expert, _, field = rest.partition(".")
            rank, there = int(expert) // local, f"{layer}.experts.{int(expert) % local}.{field}"
        # Not memory that fairseq leaves unwritten; nor what only the first rank gathers.
        if not name.endswith("_float_tensor") and several[rank][there] is not None:
            difference = (value.double() - several[rank][there].double()).abs().max().item()
            (of_experts if name in names else of_others).append(difference)
    return max(of_experts), max(of_others)


def models(runs):
    return [run["model"] for run in runs]
