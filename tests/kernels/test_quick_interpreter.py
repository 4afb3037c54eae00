"""The interpreter as the tests use it: one look through the language a launch, and the language as before after it."""

from __future__ import annotations

import pytest
import torch
from helpers import interpreted

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
pytestmark = interpreted


@triton.jit
def _doubled(x):
    return 2 * x


@triton.jit
def _kernel(x, y, SIZE: tl.constexpr):
    at = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(y + at, _doubled(_doubled(tl.load(x + at))))


@triton.jit
def _failing(x):
    _doubled(tl.load(x).no_such_method())


def test_device_functions_do_not_replace_the_language_again(monkeypatch):
    from triton.runtime import interpreter

    looked, search = [], interpreter._patch_builtin

    def counted(where, *rest):
        looked.append(where)
        return search(where, *rest)

    monkeypatch.setattr(interpreter, "_patch_builtin", counted)
    before, x, y = tl.load, torch.arange(8.0), torch.empty(8)
    for launches in (1, 2):
        _kernel[(2,)](x, y, SIZE=4)
        assert torch.equal(y, 4 * x)
        assert looked.count(tl) == launches
        assert tl.load is before


def test_a_kernel_that_fails_leaves_the_language_as_it_was():
    before = tl.load
    for _ in range(2):
        with pytest.raises(Exception, match="no_such_method"):
            _failing[(1,)](torch.zeros(1))
        assert tl.load is before
    x, y = torch.arange(4.0), torch.empty(4)
    _kernel[(1,)](x, y, SIZE=4)
    assert torch.equal(y, 4 * x)
