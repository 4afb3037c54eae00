"""What MegaBlocks' checkpoints hold, and what layers are filled with."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from helpers import without_generated_products
from megablocks_oracle import (
    layer_by_loops,
    layer_with,
)
from torch import nn

import dmoe

pytestmark = without_generated_products


# ---- Checkpoints


@pytest.mark.parametrize(
    ("kind", "mlp_type", "shapes"),
    [
        ("MoE", "mlp", {"w1": (4, 6, 10), "w2": (4, 10, 6)}),
        ("dMoE", "mlp", {"w1": (40, 6), "w2": (40, 6)}),
        ("dMoE", "glu", {"w1": (40, 6), "v1": (40, 6), "w2": (40, 6)}),
    ],
)
def test_a_state_dict_has_megablocks_names_and_shapes_and_loads_again(kind, mlp_type, shapes, tmp_path):
    layer, _ = layer_with(kind, mlp_type=mlp_type, shared_expert=True)
    model = nn.Sequential(nn.Linear(6, 6), layer).eval()
    state = model.state_dict()
    names = {f"1.experts.mlp.{name}": shape for name, shape in shapes.items()}
    names |= {"1.router.layer.weight": (4, 6), "1.experts.bias": (6,), "0.weight": (6, 6), "0.bias": (6,)}
    linears = {"up_proj": (10, 6), "down_proj": (6, 10)} | ({"gate_proj": (10, 6)} if mlp_type == "glu" else {})
    for name, shape in linears.items():
        names |= {f"1.shared_expert.{name}.weight": shape, f"1.shared_expert.{name}.bias": shape[:1]}
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == names
    assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in state.values())

    torch.save(state, tmp_path / "model.pt")
    fresh = nn.Sequential(nn.Linear(6, 6), layer_with(kind, mlp_type=mlp_type, shared_expert=True)[0]).eval()
    before = fresh(torch.ones(1, 6))[0]
    missing, unexpected = fresh.load_state_dict(torch.load(tmp_path / "model.pt"))
    assert (missing, unexpected) == ([], [])
    for (name, ours), (_, theirs) in zip(fresh.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(ours, theirs), name
    x = torch.randn(5, 6)
    assert torch.equal(fresh(x)[0], model(x)[0])
    assert not torch.equal(before, fresh(torch.ones(1, 6))[0])

    meta = copy.deepcopy(model).to("meta")
    meta.load_state_dict(state, assign=True)
    assert torch.equal(meta(x)[0], model(x)[0])
    assert all(parameter.is_contiguous() for parameter in meta.parameters())
    assert dmoe.is_expert_param(meta[1].experts.mlp.w2)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x)[0], model(x)[0])


@pytest.mark.parametrize(("kind", "mlp_type"), [("MoE", "mlp"), ("dMoE", "mlp"), ("dMoE", "glu")])
def test_a_checkpoint_that_megablocks_wrote_computes_the_same(kind, mlp_type):
    torch.manual_seed(0)
    layer, args = layer_with(kind, mlp_type=mlp_type, return_bias=False)
    capacity_form = kind == "MoE"
    state = {"router.layer.weight": torch.randn(4, 6), "experts.bias": torch.randn(6)}
    state["experts.mlp.w1"] = torch.randn(4, 6, 10) if capacity_form else torch.randn(40, 6)
    state["experts.mlp.w2"] = torch.randn(4, 10, 6) if capacity_form else torch.randn(40, 6)
    if mlp_type == "glu":
        state["experts.mlp.v1"] = torch.randn(40, 6)
    layer.load_state_dict({name: tensor.clone() for name, tensor in state.items()})
    x = torch.randn(3, 4, 6)
    torch.testing.assert_close(layer(x), layer_by_loops(state, x, args, capacity_form)[0], rtol=1e-4, atol=1e-4)
    again = layer.state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)


def test_what_a_checkpoint_lacks_or_has_too_much_is_named():
    layer, _ = layer_with("dMoE", mlp_type="glu")
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    kept = layer.experts.mlp.v1.detach().clone()
    partial_state = {name: tensor + 1 for name, tensor in state.items() if not name.endswith("v1")}
    with pytest.raises(RuntimeError, match=r"Missing key.*experts\.mlp\.v1"):
        layer.load_state_dict(partial_state)
    layer.load_state_dict(state)
    missing, unexpected = layer.load_state_dict({**partial_state, "experts.mlp.up_proj": kept}, strict=False)
    assert (missing, unexpected) == (["experts.mlp.v1"], ["experts.mlp.up_proj"])
    assert torch.equal(layer.experts.mlp.v1, kept)
    assert torch.equal(layer.experts.mlp.w1, state["experts.mlp.w1"] + 1)
    with pytest.raises(RuntimeError, match=r"size mismatch for experts\.mlp\.w2: .*\[20, 6\].*\[40, 6\]"):
        layer.load_state_dict({**state, "experts.mlp.w2": state["experts.mlp.w2"][:20]})


def test_the_users_functions_initialise_weights_in_megablocks_orientation():
    seen = []

    def init(tensor):
        seen.append(tuple(tensor.shape))
        with torch.no_grad():
            tensor.copy_(torch.arange(tensor.shape[-2]).unsqueeze(1).expand_as(tensor))

    gated, _ = layer_with("dMoE", mlp_type="glu", init_method=init, output_layer_init_method=nn.init.ones_)
    assert seen == [(4, 6), (4, 10, 6), (4, 10, 6)]
    rows = torch.arange(10.0).repeat(4).unsqueeze(1).expand(40, 6)
    state = gated.state_dict()
    assert torch.equal(state["experts.mlp.w1"], rows)
    assert torch.equal(state["experts.mlp.v1"], rows)
    assert (state["experts.mlp.w2"] == 1).all()
    moe, _ = layer_with("MoE", init_method=init, output_layer_init_method=nn.init.ones_)
    assert torch.equal(moe.state_dict()["experts.mlp.w1"], torch.arange(10.0).expand(4, 6, 10))
    assert not moe.experts.bias.any()
    layer_with("dMoE", device="meta")  # nothing to fill
