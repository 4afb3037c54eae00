"""What belongs to a layer beside its parameters: it survives copies, files, `to_empty`, loading and casts."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import dmoe
from dmoe import MoE

SIZES = {"hidden_size": 6, "ffn_hidden_size": 8, "num_experts": 4, "top_k": 2}


@pytest.fixture
def compiled():
    """A layer whose forward is compiled in place, and has run."""
    torch.manual_seed(0)
    layer = MoE(**SIZES)
    layer.compile(backend="eager")
    layer(torch.randn(3, 6))
    return layer


def test_a_copy_of_a_compiled_layer_runs_its_own_weights(compiled):
    twin, x = copy.deepcopy(compiled), torch.randn(3, 6)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert torch.equal(twin(x), torch.zeros(3, 6))
    assert compiled(x).abs().max() > 0


def test_a_compiled_layer_is_saved_whole(compiled):
    file, x = io.BytesIO(), torch.randn(3, 6)
    torch.save(nn.Sequential(compiled), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), compiled(x))
    assert loaded[0].take_aux_loss() is not None  # it goes on recording


FIELDS = {**SIZES, "aux_loss": "attached", "selection_bias": True, "bias": "output", "load_balancing_coefficient": 0.5}


def by_to_empty(state):
    layer = MoE(**FIELDS, device="meta").to_empty(device="cpu")
    layer.load_state_dict(state)
    return layer


def by_assigning(state):
    with torch.device("meta"):
        layer = MoE(**FIELDS)
    layer.load_state_dict(state, assign=True)
    return layer


def by_emptying_a_real_one(state):
    layer = MoE(**FIELDS).to_empty(device="cpu")
    layer.load_state_dict(state)
    return layer


@pytest.mark.parametrize("build", [by_to_empty, by_assigning, by_emptying_a_real_one])
def test_what_is_not_saved_is_right_after_every_way_of_loading(build):
    torch.manual_seed(0)
    original, x = MoE(**FIELDS), torch.randn(5, 6)
    layer = build({name: value.clone() for name, value in original.state_dict().items()})
    for each in (original, layer):
        each(x).sum().backward()
    assert layer.aux_loss_scale == 1
    assert torch.equal(layer.router.load_since_update, original.router.load_since_update)
    assert layer.router.load_since_update.sum() == 10
    assert torch.equal(layer.router.weight.grad, original.router.weight.grad)


def test_a_scale_that_was_set_outlives_casts_moves_and_empty_memory():
    layer = MoE(**FIELDS, device="meta")
    dmoe.set_aux_loss_scale(layer, 65536.0)
    layer.to_empty(device="cpu").half().float()
    assert layer.aux_loss_scale == 65536
    assert copy.deepcopy(layer).aux_loss_scale == 65536
    layer.to("meta")
    assert layer(torch.zeros(2, 6, device="meta")).is_meta  # shapes alone can be asked for


def test_only_what_is_saved_is_a_buffer():
    """DDP sends rank 0's buffers to all ranks, FSDP1 casts them: neither may happen to counts and constants."""
    assert [name for name, _ in MoE(**FIELDS).named_buffers()] == ["router.selection_bias"]


def test_state_that_somebody_cast_in_place_is_float32_again_in_the_next_forward():
    """What FSDP1 does to buffers with ``MixedPrecision(buffer_dtype=torch.bfloat16)``; bfloat16 counts to 256."""
    layer = MoE(**FIELDS)
    for buffer in layer.buffers():
        buffer.data = buffer.to(torch.bfloat16)
    for _ in range(3):
        layer(torch.randn(301, 6)).sum().backward()
    assert layer.router.load_since_update.sum() == 3 * 301 * 2
    dmoe.update_selection_bias(layer)
    assert layer.router.selection_bias.dtype == torch.float32
    assert layer.router.selection_bias.abs().max() == layer.config.selection_bias_update_rate == 1e-3
