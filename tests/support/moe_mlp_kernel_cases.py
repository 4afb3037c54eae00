"""Calls of the expert MLP's Triton kernels with small launch shapes, so that every loop goes round."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import strategies as st
from moe_mlp_cases import build, cases

from dmoe.ops._moe_mlp_call import Call
from dmoe.ops.moe_mlp_ref import moe_mlp_backward_ref, moe_mlp_ref
from dmoe.ops.tile_table import tile_table

NAMES = ("x", "gate_weights", "up_proj", "down_proj", "up_bias", "down_bias", "gate_proj")


@contextlib.contextmanager
def small_blocks(block_n, block_k, parts, block_m, group, flatten=False):
    """Inside, launch shapes are of a few rows and columns, and a persistent program walks several tiles.

    Kernels differ in their shapes, as they do on a GPU: whoever asks for another kernel's is found out.
    """
    import dmoe.kernels.operands as operands  # not on top: only where Triton is
    from dmoe.kernels import configs

    def choose(kernel, *_):
        wide = block_n * (1 + sorted(configs._SMALL).index(kernel) % 2)
        return configs.Config(wide, block_k, 4, 2, group=group, block_m=block_m, parts=parts, flatten=flatten)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operands, "choose", choose)
        patch.setattr(operands, "multiprocessors", lambda device: 3)
        yield


@st.composite
def tilings(draw):
    block_n = draw(st.sampled_from([16, 32, 64]))
    return {
        "block_n": block_n,
        "block_k": draw(st.sampled_from([16, 32])),
        "parts": draw(st.sampled_from([p for p in (1, 2, 4, 8) if block_n // p >= 8])),
        "block_m": draw(st.sampled_from([16, 32])),
        "group": draw(st.integers(1, 3)),
        "flatten": draw(st.booleans()),
    }


@st.composite
def calls(draw):
    """A call with everything that the small cases leave out: several tiles, dropout, residual, main gradients."""
    case = draw(cases())
    case["tokens"] = draw(st.integers(1, 70))
    case["hidden"] = draw(st.sampled_from([16, 33, 48, 64, 70]))
    case["sizes"] = draw(st.sampled_from([8, 31, 32, 64, 72]))
    dtype = draw(st.sampled_from([torch.float32, torch.float16]))
    arguments, grad, _, _ = build(case, dtype)
    call = Call(*arguments)
    projections = {n: w for n in ("up_proj", "down_proj", "gate_proj") if (w := getattr(call, n)) is not None}
    call = call._replace(**{n: w / w.shape[-1] ** 0.5 for n, w in projections.items()})  # outputs of order 1
    tile_rows = draw(st.sampled_from([0, 16, 32]))
    if tile_rows:
        tiles, by_load = tile_table(call.expert_offsets, call.row_to_token.shape[0], tile_rows)
        call = call._replace(tiles=tiles, experts_by_load=by_load, tile_rows=tile_rows)
    if draw(st.booleans()):
        call = call._replace(residual=torch.randn_like(call.x))
    if draw(st.booleans()):
        call = call._replace(
            seed=torch.tensor(draw(st.integers(-(2**63), 2**63 - 1))),
            activation_dropout=draw(st.sampled_from([0.0, 0.3])),
            expert_dropout=draw(st.sampled_from([0.0, 0.2])),
        )
    return call, grad


def widened(call):
    """The same call in float64."""
    return Call(*(v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in call))


def in_reference(call, grad):
    """y and all gradients from the reference."""
    y, pre = moe_mlp_ref(*call)
    return [y, *moe_mlp_backward_ref(grad, pre, True, *call)]
