"""Losses: their values, and how a training loop gets them (explicit, attached, checkpointed, scaled, accumulated)."""

from __future__ import annotations

import gc
import warnings

import oracle
import pytest
import torch
from helpers import small_config
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

import dmoe
from dmoe import MoE, aux_loss
from dmoe.losses import attach_loss, load_balancing_loss, router_z_loss, sequence_load_balancing_loss


@given(st.integers(0, 9), st.integers(1, 6), st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 2**20))
def test_losses_equal_the_oracle(tokens, experts, top_k, first_only, masked, seed):
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(tokens) < 0.6 if masked else torch.ones(tokens, dtype=torch.bool)
    indices = torch.randint(experts, (tokens, min(top_k, experts)))
    chosen = indices[mask][:, :1] if first_only else indices[mask]
    counts = torch.bincount(chosen.flatten(), minlength=experts)
    argument = mask if masked else None
    ours = load_balancing_loss(logits.softmax(-1), counts, argument), router_z_loss(logits.logsumexp(-1), argument)
    theirs = (
        oracle.balance_loss(logits, indices.tolist(), mask.tolist(), experts, first_only=first_only),
        oracle.z_loss(logits, mask.tolist()),
    )
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)
        (a,) = torch.autograd.grad(mine, logits, retain_graph=True, allow_unused=True)
        (b,) = torch.autograd.grad(expected, logits, retain_graph=True, allow_unused=True)
        torch.testing.assert_close(a, b)


def test_balance_loss_is_one_when_even_and_names_a_mismatch():
    even = torch.full((8, 4), 0.25)
    assert load_balancing_loss(even, torch.full((4,), 4)).item() == 1
    with pytest.raises(ValueError, match=r"load_balancing_loss: tokens_per_expert: expected shape \(4,\).*got \(3,\)"):
        load_balancing_loss(even, torch.ones(3))


def test_a_hot_expert_is_penalised_for_what_it_was_asked_not_for_what_it_kept():
    """f comes from before the drop: with a capacity of 1 the counts after it would look even."""
    layer = MoE(hidden_size=4, ffn_hidden_size=4, num_experts=4, top_k=1, capacity=1, load_balancing_coefficient=1.0)
    with torch.no_grad():
        layer.router.weight.zero_()[0, 0] = 20.0
    x = torch.ones(16, 4)
    layer(x)
    assert layer.last_metrics.kept_per_expert.tolist() == [1, 0, 0, 0]
    assert dmoe.aux_loss(layer).item() == pytest.approx(4.0, rel=1e-4)


class Net(nn.Module):
    def __init__(self, layers=2, use_checkpoint=None, dtype=torch.float64, **fields):
        super().__init__()
        fields = {"load_balancing_coefficient": 0.7, "router_z_loss_coefficient": 0.3, **fields}
        self.use_checkpoint = use_checkpoint
        self.layers = nn.ModuleList(
            MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3, num_moe_layers=layers, dtype=dtype, **fields)
            for _ in range(layers)
        )

    def forward(self, x):
        for layer in self.layers:
            if self.use_checkpoint is None:
                x = x + layer(x)
            else:
                x = x + checkpoint(layer, x, use_reentrant=self.use_checkpoint == "reentrant")
        return x


def gradients(net, x, mode="explicit", *, scale=1.0):
    net.zero_grad()
    loss = net(x).square().sum()
    if mode == "explicit":
        loss = loss + dmoe.aux_loss(net)
    else:
        dmoe.set_aux_loss_scale(net, scale)
    (loss * scale).backward()
    return [p.grad / scale for p in net.parameters()]


@pytest.mark.parametrize("mode", ["explicit", "attached"])
@pytest.mark.parametrize("use_checkpoint", [None, "non_reentrant", "reentrant"])
@pytest.mark.parametrize("scale", [1.0, 65536.0])
def test_every_way_gives_the_same_gradients(mode, use_checkpoint, scale):
    torch.manual_seed(0)
    plain = Net()
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    expected = gradients(plain, x)
    net = Net(use_checkpoint=use_checkpoint, aux_loss=mode)
    net.load_state_dict(plain.state_dict())
    if (mode, use_checkpoint) == ("explicit", "reentrant"):
        with pytest.raises(RuntimeError, match=r"no graph.*use_reentrant=False.*aux_loss='attached'"):
            gradients(net, x, mode)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a checkpoint's second forward is no unread loss
        for _ in range(2):
            for got, want in zip(gradients(net, x, mode, scale=scale), expected, strict=True):
                torch.testing.assert_close(got, want)
    assert any(g.abs().max() > 0 for g in expected)


def test_aux_loss_changes_the_gradients_at_all():
    torch.manual_seed(0)
    net = Net()
    x = torch.randn(7, 6, dtype=torch.float64)
    with_loss = gradients(net, x)
    net.zero_grad()
    net(x).square().sum().backward()
    dmoe.aux_loss(net)
    router = dict(zip([n for n, _ in net.named_parameters()], with_loss, strict=True))["layers.1.router.weight"]
    assert not torch.allclose(router, net.layers[1].router.weight.grad)


@pytest.mark.parametrize("mode", ["explicit", "attached"])
def test_a_grad_scaler_at_65536(mode):
    """float16 under a scaler: the unscaled gradients are those of a float32 run without one."""
    torch.manual_seed(0)
    net = Net(dtype=torch.float32, aux_loss=mode)
    x = torch.randn(7, 6) / 8
    expected = gradients(net, x, mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    net.zero_grad()
    loss = net(x).square().sum()
    if mode == "explicit":
        loss = loss + dmoe.aux_loss(net)
    scaled = scaler.scale(loss)
    dmoe.set_aux_loss_scale(net, scaler._scale)
    scaled.backward()
    scaler.unscale_(optimizer)
    assert scaler._found_inf_per_device(optimizer)[torch.device("cpu")].item() == 0
    for p, want in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, want, rtol=1e-4, atol=1e-6)


def test_gradient_accumulation_adds_up():
    torch.manual_seed(0)
    net = Net()
    batches = [torch.randn(5, 6, dtype=torch.float64) for _ in range(3)]
    parts = [gradients(net, batch) for batch in batches]
    net.zero_grad()
    for batch in batches:
        ((net(batch).square().sum() + dmoe.aux_loss(net)) / 3).backward()
    for p, *terms in zip(net.parameters(), *parts, strict=True):
        torch.testing.assert_close(p.grad, sum(terms) / 3)


def test_nothing_accumulates_over_a_thousand_forwards():
    torch.manual_seed(0)
    net = Net(layers=1, dtype=torch.float32)
    x = torch.randn(7, 6)

    def live():
        gc.collect()
        return sum(isinstance(o, torch.Tensor) for o in gc.get_objects())

    for training in (False, True):
        net.train(training)
        for _ in range(3):
            net(x)
            dmoe.aux_loss(net)
        before, first = live(), None
        for _ in range(500):
            net(x)
            value = dmoe.aux_loss(net).item()
            first = value if first is None else first
            assert value == first
        assert live() <= before + 2
    net.eval()
    net(x)
    assert dmoe.aux_loss(net).item() == 0


def test_an_unread_loss_warns_once():
    layer = MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3)
    x = torch.randn(5, 6)
    layer(x)
    with pytest.warns(UserWarning, match=r"auxiliary loss.*dmoe\.aux_loss\(model\)"):
        layer(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x)
        layer.eval()(x)


def test_an_unread_loss_warns_when_compiled():
    layer, x = MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3), torch.randn(5, 6)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            compiled(x)
            dmoe.aux_loss(layer)
        compiled(x)
    with pytest.warns(UserWarning, match=r"auxiliary loss.*dmoe\.aux_loss\(model\)"):
        compiled(x)
    torch.testing.assert_close(dmoe.aux_loss(layer), layer.router_losses(layer.router(x)))  # compiled sums are others


def test_no_warning_where_there_is_no_loss():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fields in ({"load_balancing_coefficient": 0.0}, {"aux_loss": "attached"}, {"router": "uniform"}):
            layer = MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3, **fields)
            for _ in range(3):
                layer(torch.randn(5, 6)).sum().backward()


def test_reading_clears_and_a_model_without_layers_gives_zero():
    layer = MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3)
    layer(torch.randn(5, 6))
    assert dmoe.aux_loss(layer).item() > 0
    assert dmoe.aux_loss(layer).item() == 0
    assert dmoe.aux_loss(nn.Linear(2, 2)).item() == 0
    layer(torch.randn(0, 6))
    assert dmoe.aux_loss(layer).item() == 0


def test_no_grad_training_forward_may_be_read_without_gradients():
    layer = MoE(hidden_size=6, ffn_hidden_size=4, num_experts=3)
    with torch.no_grad():
        layer(torch.randn(5, 6))
        assert dmoe.aux_loss(layer).item() > 0


def test_attach_loss_is_the_identity():
    y = torch.randn(3, requires_grad=True)
    w = torch.tensor(2.0, requires_grad=True)
    out = attach_loss(y, w * 3, torch.tensor(10.0))
    assert torch.equal(out, y)
    out.sum().backward()
    assert torch.equal(y.grad, torch.ones(3))
    assert w.grad.item() == 30


@given(
    sequences=st.integers(1, 4),
    length=st.integers(1, 5),
    experts=st.integers(1, 5),
    masked=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_sequence_balance_is_the_mean_over_sequences(sequences, length, experts, masked, seed):
    torch.manual_seed(seed)
    top_k = 1 + seed % experts
    probs = torch.rand(sequences, length, experts, dtype=torch.float64).softmax(-1)
    ids = torch.rand(sequences, length, experts).argsort(-1)[..., :top_k]
    mask = torch.rand(sequences, length) < 0.6 if masked else torch.ones(sequences, length, dtype=torch.bool)
    expected = 0.0
    for s in range(sequences):
        tokens = [t for t in range(length) if mask[s, t]]
        for e in range(experts):
            chosen = sum(int(i) == e for t in tokens for i in ids[s, t])
            if tokens:
                mean = sum(probs[s, t, e].item() for t in tokens) / len(tokens)
                expected += experts * chosen / (len(tokens) * top_k) * mean / sequences
    probs[~mask] = torch.nan
    ids = ids.masked_fill(~mask.unsqueeze(-1), experts)
    actual = sequence_load_balancing_loss(
        probs.flatten(0, 1), ids.flatten(0, 1), sequences, mask.flatten() if masked else None
    )
    assert actual.item() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_sequences_have_to_be_of_one_length():
    with pytest.raises(ValueError, match="sequence_load_balancing_loss: expected 7 tokens in equally long sequences"):
        sequence_load_balancing_loss(torch.ones(7, 2), torch.zeros(7, 1), 2)
    assert sequence_load_balancing_loss(torch.ones(0, 2), torch.zeros(0, 1), 3) == 0


@pytest.mark.parametrize("choices", ["all", "first"])
def test_a_layer_balances_each_sequence(choices):
    torch.manual_seed(0)
    layer = MoE(small_config(load_balancing_over="sequence", load_balancing_choices=choices))
    other = MoE(small_config(load_balancing_choices=choices))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(2, 3, 5, 8)
    layer(x)
    together = aux_loss(layer)
    alone = []
    for one in x.flatten(0, 1):
        other(one)
        alone.append(aux_loss(other))
    torch.testing.assert_close(together, torch.stack(alone).mean())
