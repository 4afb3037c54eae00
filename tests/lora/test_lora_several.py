"""Several adapters over one base: one or a sum of them for all tokens, or one for each token."""

from __future__ import annotations

import copy

import pytest
import torch
from lora_cases import randomise
from torch.utils.checkpoint import CheckpointError, checkpoint

import dmoe

FIELDS = {
    "hidden_size": 6,
    "ffn_hidden_size": 5,
    "num_experts": 4,
    "top_k": 2,
    "bias": "expert",
    "shared_ffn_hidden_size": 3,
    "load_balancing_coefficient": 0.0,
    "dtype": torch.float64,
}
NAMES = ("english", "french", "polish")


def three(**fields):
    """A layer with three adapters of other ranks, scales and targets, and one layer for each with it alone merged."""
    torch.manual_seed(0)
    layer, x = dmoe.MoE(**{**FIELDS, **fields}), torch.randn(3, 7, 6, dtype=torch.float64)
    plain, alone = copy.deepcopy(layer), []
    options = [{"rank": 2, "alpha": 3.0, "targets": ("*",)}, {"rank": 3, "targets": ("experts",)}]
    options.append({"rank": 1, "alpha": 0.5, "targets": ("experts.down", "router")})
    for number, (name, each) in enumerate(zip(NAMES, options, strict=True)):
        randomise(dmoe.lora.add(layer, name=name, **each).values(), seed=number)
        merged = copy.deepcopy(plain)
        dmoe.lora.load_state_dict(merged, dmoe.lora.state_dict(layer, name))
        dmoe.lora.merge(merged)
        alone.append(merged)
    return layer, x, plain, alone


def test_the_newest_is_active_and_others_can_be():
    layer, x, plain, alone = three()
    assert layer.experts.lora.names == list(NAMES)
    torch.testing.assert_close(layer(x), alone[2](x))
    for name, merged in zip(NAMES, alone, strict=True):
        dmoe.lora.set_active(layer, name)
        torch.testing.assert_close(layer(x), merged(x))
    dmoe.lora.set_active(layer, ["english", "polish"])
    both = copy.deepcopy(plain)
    for name in ("english", "polish"):
        dmoe.lora.load_state_dict(both, dmoe.lora.state_dict(layer, name), name=name)
        dmoe.lora.merge(both, name)
    torch.testing.assert_close(layer(x), both(x))
    dmoe.lora.disable(layer)
    assert torch.equal(layer(x), plain(x))
    dmoe.lora.enable(layer)
    torch.testing.assert_close(layer(x), both(x))
    dmoe.lora.remove(layer, "english")
    torch.testing.assert_close(layer(x), alone[2](x))
    for name in ("french", "polish"):
        dmoe.lora.remove(layer, name)
    assert torch.equal(layer(x), plain(x))
    assert [name for name, _ in layer.named_parameters()] == [name for name, _ in plain.named_parameters()]


@pytest.mark.parametrize("shape", [(3, 7), (21,)])
@pytest.mark.parametrize("names", [None, ("polish", "english")])
def test_one_for_each_token(shape, names):
    layer, x, plain, alone = three()
    order = NAMES if names is None else names
    ids = torch.randint(-1, len(order), (21,), generator=torch.Generator().manual_seed(1))
    expected = torch.empty(21, 6, dtype=torch.float64)
    for number in range(-1, len(order)):
        one = plain if number < 0 else alone[NAMES.index(order[number])]
        expected[ids == number] = one(x).detach().view(21, 6)[ids == number]
    with dmoe.lora.use(layer, ids.view(shape), names=names):
        torch.testing.assert_close(layer(x).view(21, 6), expected)
        with dmoe.lora.disable(layer):
            assert torch.equal(layer(x), plain(x))
        inner = torch.full((21,), -1)
        with dmoe.lora.use(layer, inner):
            torch.testing.assert_close(layer(x), plain(x))
        torch.testing.assert_close(layer(x).view(21, 6), expected)
    torch.testing.assert_close(layer(x), alone[2](x))


def test_each_is_trained_by_its_own_tokens():
    layer, x, _, _ = three()
    ids = torch.arange(21) % 3 - 1  # none of the third
    of = {name: [p for key, p in layer.named_parameters() if f".{name}." in key] for name in NAMES}
    with dmoe.lora.use(layer, ids):
        layer(x).square().sum().backward()
    assert not any(p.grad.any() for p in of["polish"] if p.grad is not None)
    grads = [p.grad.clone() for p in of["french"]]
    layer.zero_grad()
    dmoe.lora.set_active(layer, "french")
    layer(x.view(21, 6)[ids == 1]).square().sum().backward()
    for p, grad in zip(of["french"], grads, strict=True):
        torch.testing.assert_close(p.grad, grad)
    assert all(p.grad is None for p in of["english"])


def test_a_jittered_router_sees_one_input():
    """Its own columns and the thin ones are of the same noisy tokens."""
    torch.manual_seed(0)
    layer = dmoe.MoE(**FIELDS, input_jitter=0.3)
    x = torch.randn(9, 6, dtype=torch.float64)
    trained = dmoe.lora.add(layer, rank=6, targets=("router",))
    with torch.no_grad():
        trained["router.lora.default.weight.a"].copy_(torch.eye(6))
        trained["router.lora.default.weight.b"].copy_(-layer.router.weight)
    logits = layer.router.logits(x)
    assert logits.abs().max() < 1e-12
    assert layer.router.logits(x).shape == (9, 4)


def test_recomputation_belongs_inside_the_block():
    layer, x, _, _ = three()
    ids = torch.arange(21) % 4 - 1
    parameters = [p for p in layer.parameters() if p.requires_grad]
    x.requires_grad_()
    for reentrant in (False, True):
        grads = []
        for run in (layer, lambda x, r=reentrant: checkpoint(layer, x, use_reentrant=r)):
            layer.zero_grad()
            with dmoe.lora.use(layer, ids):
                run(x).square().sum().backward()
            grads.append([None if p.grad is None else p.grad.clone() for p in parameters])
        for one, other in zip(*grads, strict=True):
            torch.testing.assert_close(one, other)
        with dmoe.lora.use(layer, ids):
            y = checkpoint(layer, x, use_reentrant=reentrant)
        with pytest.raises(RuntimeError, match=r"dmoe\.lora\.use: expected backward inside the with block"):
            y.sum().backward()
        y = checkpoint(layer, x, use_reentrant=reentrant)  # and none is in the way of what comes
        y.sum().backward()


@pytest.mark.parametrize("target", ["router", "experts", "experts.down"])
def test_a_checkpoint_of_another_block_is_not_computed_with_this_ones_choice(target):
    torch.manual_seed(0)
    layer, x = dmoe.MoE(**FIELDS), torch.randn(21, 6, dtype=torch.float64, requires_grad=True)
    for name in ("one", "other"):
        randomise(dmoe.lora.add(layer, rank=2, targets=[target], name=name).values())
    with dmoe.lora.use(layer, torch.zeros(21, dtype=torch.int64)):
        first = checkpoint(layer, x, use_reentrant=False)
    with dmoe.lora.use(layer, torch.ones(21, dtype=torch.int64)):
        layer(x)
        with pytest.raises(CheckpointError):
            first.sum().backward()
    first = checkpoint(layer, x, use_reentrant=False)
    with dmoe.lora.use(layer, torch.ones(21, dtype=torch.int64)), pytest.raises(CheckpointError):
        first.sum().backward()


def test_what_cannot_be_chosen_is_said():
    layer, x, _, _ = three()
    ids = torch.zeros(21, dtype=torch.int64)
    known = r"names of the model's adapters \['english', 'french', 'polish'\]"
    with pytest.raises(ValueError, match=rf"dmoe\.lora\.set_active: expected {known}, got 'czech'"):
        dmoe.lora.set_active(layer, "czech")
    with pytest.raises(ValueError, match=rf"dmoe\.lora\.remove: expected {known}, got 'czech'"):
        dmoe.lora.remove(layer, "czech")
    with pytest.raises(ValueError, match=rf"dmoe\.lora\.use: expected {known}, got 'czech'"):
        dmoe.lora.use(layer, ids, ["czech"]).__enter__()
    with pytest.raises(ValueError, match=r"dmoe\.lora\.use: expected at least one name of the model's adapters"):
        dmoe.lora.use(layer, ids, []).__enter__()
    with pytest.raises(
        TypeError, match=r"dmoe\.lora\.use: adapter_ids: expected an int32 or int64 tensor, got torch.f"
    ):
        dmoe.lora.use(layer, ids.float()).__enter__()
    with pytest.raises(TypeError, match=r"dmoe\.lora\.use: adapter_ids: expected an int32 or int64 tensor, got list"):
        dmoe.lora.use(layer, [0]).__enter__()
    with (
        dmoe.lora.use(layer, ids[:20]),
        pytest.raises(ValueError, match=r"MoE.router: adapter_ids: .* 21 tokens, got 20"),
    ):
        layer(x)
    dmoe.lora.remove(layer, "english"), dmoe.lora.remove(layer, "polish")
    with (
        dmoe.lora.use(layer, ids[:20]),
        pytest.raises(ValueError, match=r"moe_mlp: adapter_ids: .* \(21,\) .* \(20,\)"),
    ):
        layer(x)
    with (
        dmoe.lora.use(layer, ids + 1),
        pytest.raises(RuntimeError, match="adapter_ids: expected numbers of 1 adapters"),
    ):
        layer(x)
    dmoe.lora.add(layer, rank=2, dropout=0.5, name="dropping")
    dmoe.lora.set_active(layer, ["french", "dropping"])
    with pytest.raises(ValueError, match=r"one dropout for all adapters that are active together, got \[0\.0, 0\.5\]"):
        layer(x)
    layer.eval()(x)
    assert layer.experts.lora.by_token is None  # every block has been left


def test_copies_and_files_are_outside_of_the_block():
    layer, x, plain, alone = three()
    with dmoe.lora.use(layer, torch.full((21,), -1)):
        twin = copy.deepcopy(layer)
        torch.testing.assert_close(layer(x), plain(x))
    torch.testing.assert_close(twin(x), alone[2](x))
