"""Which releases are taken, and that nothing is imported before it is asked for."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import dmoe
import dmoe.integrations.transformers as on_transformers
from dmoe.integrations.transformers import versions
from dmoe.integrations.transformers.experts import dmoe_experts

ROOT = str(Path(dmoe.__file__).parent.parent)


def test_importing_it_imports_no_transformers():
    program = """
import sys, dmoe.integrations.transformers as t
assert {'register', 'use', 'restore'} <= set(dir(t)) == set(t.__all__)
assert not [name for name in sys.modules if name.partition('.')[0] == 'transformers']
t.register()
assert not [name for name in sys.modules if name.startswith('transformers.models.llama4')]
"""
    with_root = os.environ | {"PYTHONPATH": os.pathsep.join([*sys.path, ROOT])}
    done = subprocess.run([sys.executable, "-c", program], env=with_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ("5.6.2", "expected transformers 5.7 or newer, found 5.6.2; install it with: pip install 'transformers>=5.7'"),
        (
            "4.57.1",
            "expected transformers 5.7 or newer, found 4.57.1; install it with: pip install 'transformers>=5.7'",
        ),
        ("5.7.0", None),
        ("5.10.0.dev0", None),
        ("6.0.0rc1", None),
    ],
)
def test_older_releases_are_refused_in_a_sentence(found, said, monkeypatch):
    installed = types.ModuleType("transformers")
    installed.__version__ = found
    monkeypatch.setitem(sys.modules, "transformers", installed)
    if said is None:
        assert versions.check_version() >= (5, 7)
        return
    for call in (versions.check_version, on_transformers.register, lambda: on_transformers.use(torch.nn.Identity())):
        with pytest.raises(ImportError) as error:
            call()
        assert str(error.value) == f"dmoe.integrations.transformers: {said}"


def test_none_at_all_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"expected transformers 5.7 or newer, found none; install it with: pip"):
        on_transformers.use(torch.nn.Identity())


def test_a_word_is_registered_once_and_takes_nobody_elses_place():
    on_transformers.register()
    on_transformers.register()
    on_transformers.register("mine")
    plain, fp8 = versions.registries()
    assert plain["dmoe"] is plain["mine"] is dmoe_experts
    assert fp8["dmoe"] is fp8["mine"] is not dmoe_experts
    for taken in ("grouped_mm", "eager"):
        with pytest.raises(ValueError, match=f"register: name: expected a free one, got '{taken}'"):
            on_transformers.register(taken)
    assert plain["grouped_mm"] is not dmoe_experts
    plain._global_mapping.pop("mine"), fp8._global_mapping.pop("mine")


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match=r"module 'dmoe.integrations.transformers' has no attribute 'usee'"):
        on_transformers.usee  # noqa: B018
