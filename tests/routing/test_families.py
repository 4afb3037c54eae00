"""Every family: gradients, compilation, masks, replay, copies, and what it says to bad input."""

from __future__ import annotations

import copy

import pytest
import torch
from router_cases import FAMILIES, SIZES, VOCAB, config_of, inputs, layer_of

import dmoe
from dmoe import MoE, MoEConfig
from dmoe.routing import Base, Cosine, Hash, Sinkhorn, TopK

ALL = list(FAMILIES)


def run(layer, x, ids, seed=3, **more):
    torch.manual_seed(seed)  # noise alike
    y = layer(x, token_ids=ids, **more)
    return y, dmoe.aux_loss(layer)


@pytest.mark.parametrize("name", ALL)
def test_gradients_are_those_of_finite_differences(name):
    layer = layer_of(name, torch.float64)
    x, ids = inputs(8, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def function(x, *parameters):
        torch.manual_seed(3)
        y = torch.func.functional_call(layer, dict(zip(names, parameters, strict=True)), (x,), {"token_ids": ids})
        return y, dmoe.aux_loss(layer)

    chosen = [p.detach().clone().requires_grad_() for p in parameters]
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), *chosen), fast_mode=True, atol=1e-7)


@pytest.mark.parametrize("name", ALL)
def test_compiled_whole_it_is_the_same(name):
    layer, compiled = layer_of(name), layer_of(name)
    step = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x, ids = inputs()
    for mode in (True, False):
        layer.train(mode)
        compiled.train(mode)
        expected, loss = run(layer, x, ids)
        torch.manual_seed(3)
        y = step(x, token_ids=ids)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(dmoe.aux_loss(compiled), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in ALL if name != "base"])
def test_nothing_is_read_back(name):
    """On the meta device there is nothing to read: what runs there never makes the host wait."""
    layer = layer_of(name).to("meta")
    x, ids = inputs()
    y, loss = run(layer, x.to("meta"), ids.to("meta"))
    assert y.shape == x.shape
    (y.sum() + loss.to("meta")).backward()


@pytest.mark.parametrize("name", [name for name in ALL if name != "base"])
def test_masked_tokens_take_no_expert_and_are_in_no_loss(name):
    if name == "tutel":
        pytest.skip("the loss load_importance knows no mask, and says so")
    layer = layer_of(name).eval() if name in ("gumbel", "sampling", "random", "random_raw") else layer_of(name)
    x, ids = inputs()
    mask = torch.rand(2, 8) < 0.6
    torch.manual_seed(3)
    y, loss = run(layer, x, ids, token_mask=mask)
    spoiled, other = run(layer, x.masked_fill(~mask.unsqueeze(-1), torch.nan), ids, token_mask=mask)
    assert torch.equal(y, spoiled)
    assert torch.equal(loss, other)
    assert not y[~mask].any()
    assert layer.last_metrics.tokens_per_expert.sum() <= mask.sum() * (4 if name == "expert_choice" else 2)


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("expert_choice",)])
def test_a_routing_is_replayed(name):
    layer = layer_of(name)
    x, ids = inputs()
    indices = torch.stack([torch.randperm(4)[: layer.config.top_k] for _ in range(16)]).view(2, 8, -1)
    run(layer, x, ids, expert_indices=indices)
    counts = torch.bincount(indices.flatten(), minlength=4)
    assert layer.last_metrics.tokens_per_expert.tolist() == counts.tolist()


@pytest.mark.parametrize("name", ALL)
def test_copies_states_and_no_tokens(name):
    layer = layer_of(name)
    x, ids = inputs()
    twin = layer_of(name, seed=9)
    twin.load_state_dict(layer.state_dict())
    expected = run(layer.eval(), x, ids)[0]
    for other in (twin.eval(), copy.deepcopy(layer)):
        assert torch.equal(run(other, x, ids)[0], expected)
    blank = layer_of(name, seed=9).to("meta").to_empty(device="cpu")
    for module in blank.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    blank.load_state_dict(layer.state_dict())
    assert torch.equal(run(blank.eval(), x, ids)[0], expected)
    assert run(layer.train(), x[:, :0], ids[:, :0])[0].shape == (2, 0, 6)
    assert repr(config_of(name)) == repr(config_of(name))
    assert hash(config_of(name)) == hash(config_of(name))


@pytest.mark.parametrize("name", ALL)
def test_in_bfloat16_under_autocast_and_frozen(name):
    layer = layer_of(name, torch.bfloat16)
    x, ids = inputs(dtype=torch.bfloat16)
    y, loss = run(layer, x, ids)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()
    assert loss.isfinite()
    layer = layer_of(name)
    with torch.autocast("cpu", torch.bfloat16):
        y, loss = run(layer, x.float(), ids)
    assert y.isfinite().all()
    (y.float().sum() + loss).backward()
    for parameter in layer.router.parameters():
        assert parameter.grad.isfinite().all()
    with torch.no_grad():
        assert run(layer.requires_grad_(False).eval(), x.float(), ids)[0].isfinite().all()


SMALL = {"hidden_size": 6, "ffn_hidden_size": 8, "num_experts": 4}
BAD = [
    (lambda: Cosine(dim=0), "Cosine: dim: expected at least 1, got 0"),
    (lambda: Cosine(temperature=0.0), "Cosine: temperature: expected a positive number, got 0.0"),
    (lambda: Cosine(dim="wide"), "Cosine: dim: expected an integer, got 'wide'"),
    (lambda: Cosine(second_expert="both"), "Cosine: second_expert: expected one of 'all', 'sampling', 'random'"),
    (lambda: TopK(noise_std=0.0), "TopK: noise_std: expected a positive number"),
    (lambda: TopK(noise_in_eval=1), "TopK: noise_in_eval: expected True or False, got 1"),
    (lambda: Sinkhorn(max_iterations=0), "Sinkhorn: max_iterations: expected at least 1, got 0"),
    (lambda: Base(over="all"), "Base: over: expected one of 'local', 'group', got 'all'"),
    (lambda: Hash(vocab_size=0), "Hash: vocab_size: expected at least 1, or None, got 0"),
    (lambda: Hash(frequencies=[1, -1]), "Hash: frequencies: expected numbers of at least 0"),
    (lambda: Hash(frequencies=["a"]), "Hash: frequencies: expected one number for each id, got something else"),
    (lambda: Hash(table=[]), r"Hash: table: expected a number for each of at least one id, got \[\]"),
    (lambda: Hash(table=5), "Hash: table: expected a number for each of at least one id, got 5"),
    (lambda: Hash(table=[0, 1.5]), "Hash: table: expected integers, got 1.5 for id 1"),
    (lambda: TopK(noise_std=float("inf")), "TopK: noise_std: expected a positive number"),
    (lambda: MoEConfig(**SMALL, gate_scale=float("inf")), "MoEConfig: gate_scale: expected a positive number, got inf"),
    (
        lambda: MoEConfig(**SMALL, top_k=2, router=Base(), allow_future_leak=True),
        "MoEConfig: top_k: expected at most 1 with router='base', which sends a token to 1 expert, got 2",
    ),
    (lambda: MoEConfig(**SMALL, top_k=2, router=Hash(vocab_size=9)), "top_k: expected 1 with router='hash'.*got 2"),
    (lambda: MoEConfig(**SMALL, top_k=1, router="hash"), "router: expected one of vocab_size, frequencies and table"),
    (
        lambda: MoEConfig(**SMALL, top_k=1, router=Hash(table=[0, 1, 4])),
        r"Hash: table: expected 1 different expert in \[0, 4\) for each id, got 4 for id 2",
    ),
    (
        lambda: MoEConfig(**SMALL, top_k=2, router=Hash(table=[[0, 1], [2, 2]])),
        r"Hash: table: expected 2 different experts in \[0, 4\) for each id, got \(2, 2\) for id 1",
    ),
    (lambda: MoEConfig(**SMALL, top_k=1, router="base"), "router: expected 'top_k' in a causal model.*got 'base'"),
    (
        lambda: MoEConfig(**SMALL, top_k=3, router=TopK(second_expert="random")),
        "TopK: second_expert: expected 'all' with top_k = 3, which has no second expert alone, got 'random'",
    ),
    (
        lambda: MoEConfig(**SMALL, losses={"load": 1.0}),
        "TopK: logit_noise: expected 'gaussian' with the losses 'load' and 'load_importance', which are about it",
    ),
    (
        lambda: MoEConfig(**SMALL, losses={"importance": 1.0}, score_function="sigmoid"),
        "MoEConfig: score_function: expected 'softmax' with the losses 'importance'",
    ),
    (
        lambda: MoEConfig(**SMALL, router="sinkhorn", allow_future_leak=True, score_function="sigmoid"),
        "MoEConfig: score_function: expected 'softmax' with router='sinkhorn'",
    ),
    (
        lambda: MoEConfig(**SMALL, router="expert_choice", causal=False, drop_order="choice_major"),
        "MoEConfig: drop_order: expected 'token_major' with router='expert_choice', which does not read it, got",
    ),
    (
        lambda: MoEConfig(**SMALL, top_k=1, router="base", causal=False, gate_normalization=1.0),
        "MoEConfig: gate_normalization: expected None with router='base', which does not read it, got 1.0",
    ),
    (
        lambda: MoEConfig(**SMALL, top_k=1, router=Hash(vocab_size=9), score_function="sigmoid"),
        "MoEConfig: score_function: expected 'softmax' with router='hash', which does not read it, got 'sigmoid'",
    ),
    (
        lambda: MoEConfig(**SMALL, top_k=1, router=Hash(table=[0, 1], weights="learned"), selection_bias=True),
        "MoEConfig: selection_bias: expected False with router='hash', which does not read it, got True",
    ),
    (
        lambda: MoEConfig(**SMALL, router="sinkhorn", causal=False, losses={"load_importance": 0.5}),
        "MoEConfig: losses: expected no 'load_importance' with router='sinkhorn', which has none, got 0.5",
    ),
    (
        lambda: MoEConfig(**SMALL, top_k=1, router="base", causal=False, router_z_loss_coefficient=0.1),
        "MoEConfig: losses: expected no 'z' with router='base', which has none, got 0.1",
    ),
    (lambda: MoEConfig(**SMALL, router="cosine", router_bias=True), "router_bias: expected False with router='cosine'"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_options_out_of_range_are_one_sentence(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_inputs_that_a_family_cannot_take_are_one_sentence():
    x, ids = inputs(10, 1)
    layer = layer_of("hash")
    with pytest.raises(ValueError, match=r"MoE: token_ids: expected the ids of the tokens.*got none: call"):
        layer(x)
    with pytest.raises(ValueError, match=rf"MoE: token_ids: expected ids in \[0, {VOCAB}\).*got -1 to 19"):
        layer(x, token_ids=torch.tensor([[-1] * 9 + [19]]))
    layer = layer_of("base")
    with pytest.raises(ValueError, match=r"MoE: x: expected a number of tokens divisible by num_experts = 4 .* got 10"):
        layer(x)
    with pytest.raises(ValueError, match="MoE: token_mask: expected None in training with router='base'"):
        layer(x, token_mask=ids > 3)
    assert layer.eval()(x, token_mask=ids > 3).shape == x.shape
    with pytest.raises(ValueError, match="MoE: token_groups: expected a divisor of the number of tokens, 10, got 3"):
        layer_of("groups", token_groups=3)(x)
    with pytest.raises(ValueError, match="token_groups: expected a divisor of the number of tokens, 10, got 4"):
        dmoe.losses.importance_loss(torch.rand(10, 4), 4)
    layer = layer_of("tutel")
    with pytest.raises(ValueError, match="MoE: token_mask: expected None with the loss 'load_importance'"):
        layer(x, token_mask=ids > 3)
    assert layer.eval()(x, token_mask=ids > 3).shape == x.shape


def test_a_family_without_build_says_so():
    with pytest.raises(NotImplementedError, match="Nothing: expected a build method"):
        MoE(**SIZES, router=type("Nothing", (dmoe.routing.RouterFamily,), {})())


@pytest.mark.parametrize("name", ["sequence", "expert_choice", "uniform", "hash"])
def test_a_batch_of_no_sequence_has_no_group(name):
    layer = layer_of(name, token_groups="sequence", capacity_factor=1.0)
    x, ids = inputs()
    for training in (True, False):
        y, loss = run(layer.train(training), x[:0], ids[:0])
        assert y.shape == (0, 8, 6)
        assert loss == 0


@pytest.mark.parametrize("name", ["hash", "hash, learned"])
def test_a_table_is_there_without_being_saved(name):
    layer = layer_of(name)
    x, ids = inputs()
    expected = run(layer, x, ids)[0]
    blank = layer_of(name, seed=9).to("meta").to_empty(device="cpu")
    blank.load_state_dict(layer.state_dict())
    assert torch.equal(run(blank, x, ids)[0], expected)
    with torch.device("meta"):
        blank = MoE(layer.config)
    blank.load_state_dict(layer.state_dict(), assign=True)
    assert torch.equal(run(blank.double().float(), x, ids)[0], expected)


@pytest.mark.parametrize("name", ["hash", "hash, learned"])
def test_the_id_of_padding_may_be_any_number(name):
    layer = layer_of(name)
    x, ids = inputs()
    mask = torch.rand(2, 8) < 0.6
    expected = run(layer, x, ids, token_mask=mask)[0]
    assert torch.equal(run(layer, x, ids.masked_fill(~mask, -100), token_mask=mask)[0], expected)


def test_tables_may_be_numpy_arrays():
    table = [[0, 1], [2, 3]]
    assert Hash(table=torch.tensor(table).numpy()) == Hash(table=torch.tensor(table)) == Hash(table=table)
    assert repr(Hash(frequencies=torch.tensor([3, 1]).numpy())) == repr(Hash(frequencies=[3, 1]))
