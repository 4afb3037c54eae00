"""What a framework gives a layer instead of its own: a shared expert, the handling of losses, an order of dropping."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from torch import nn

from dmoe import MoE, Routing, aux_loss
from dmoe.losses import attach_loss

SIZES = {"hidden_size": 6, "ffn_hidden_size": 8, "num_experts": 4, "dtype": torch.float64}


def test_a_given_shared_expert_is_added_and_gets_gradients():
    torch.manual_seed(0)
    own = nn.Linear(6, 6, dtype=torch.float64)
    with_it = MoE(**SIZES, shared_expert=own)
    without = MoE(**SIZES)
    without.load_state_dict({k: v for k, v in with_it.state_dict().items() if not k.startswith("shared_expert.")})
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    y = with_it(x)
    torch.testing.assert_close(y, without(x) + own(x), rtol=0, atol=1e-12)
    assert "shared_expert.weight" in with_it.state_dict()  # a module is one of the layer's own
    y.sum().backward()
    torch.testing.assert_close(own.bias.grad, torch.full((6,), 10.0, dtype=torch.float64))


def test_a_function_serves_as_shared_expert_and_two_of_them_are_refused():
    x = torch.randn(5, 6, dtype=torch.float64)
    layer = MoE(**SIZES, shared_expert=lambda tokens: 2 * tokens)
    plain = MoE(**SIZES)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), plain(x) + 2 * x, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="MoE: shared_expert: expected None with shared_ffn_hidden_size, which builds"):
        MoE(**SIZES, shared_ffn_hidden_size=8, shared_expert=lambda tokens: tokens)


class Framework:
    """Hangs losses on the output by itself, and remembers what it was given."""

    def __init__(self):
        self.seen = []

    def attach(self, y, routing):
        self.seen.append((y.shape, routing))
        return attach_loss(y, routing.log_z.sum() + routing.router_probs[:, 0].sum(), torch.tensor(1.0))


def test_a_framework_attaches_losses_of_its_own():
    framework = Framework()
    options = {"router_z_loss_coefficient": 0.5, "load_balancing_coefficient": 0.5}
    layer = MoE(**SIZES, **options, attach_losses=framework.attach)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    layer(x).sum().backward()
    ((shape, routing),) = framework.seen
    assert shape == x.shape
    assert isinstance(routing, Routing)
    assert aux_loss(layer) == 0  # nothing of the layer's own is recorded
    by_hand = MoE(**SIZES, load_balancing_coefficient=0.0)
    by_hand.load_state_dict(layer.state_dict())
    logits = x.reshape(-1, 6) @ by_hand.router.weight.t()
    (by_hand(x).sum() + torch.logsumexp(logits, 1).sum() + torch.softmax(logits, 1)[:, 0].sum()).backward()
    torch.testing.assert_close(layer.router.weight.grad, by_hand.router.weight.grad, rtol=0, atol=1e-12)


def test_outside_training_nobody_attaches_losses_and_a_copy_keeps_the_hook():
    framework = Framework()
    layer = MoE(**SIZES, router_z_loss_coefficient=0.5, attach_losses=framework.attach)
    x = torch.randn(5, 6, dtype=torch.float64)
    layer.eval()(x)
    assert not framework.seen
    copied = copy.deepcopy(layer).train()
    copied(x)
    assert len(copied.auxiliary.attach.__self__.seen) == 1


@pytest.mark.parametrize("order", ["gate_weight", "normalized_gate_weight"])
def test_who_is_dropped_by_weight_and_by_normalised_weight(order):
    torch.manual_seed(1)
    layer = MoE(**SIZES, top_k=2, capacity=3, drop_order=order, softmax_order="after_topk")
    logits = torch.randn(12, 4, dtype=torch.float64) * 2
    routing = layer.router.route(logits)
    indices = routing.expert_indices.tolist()
    weights = torch.softmax(logits, 1).gather(1, routing.expert_indices)
    if order == "normalized_gate_weight":
        weights = weights / weights.sum(1, keepdim=True)
    kept = oracle.keep_by_capacity(indices, 4, 3, "gate_weight", weights.tolist())
    assert (routing.gate_weights > 0).tolist() == kept
    other = layer.router.route(logits[:0])
    assert other.gate_weights.shape == (0, 2)


def test_the_two_orders_by_weight_are_not_the_same():
    torch.manual_seed(1)
    logits = torch.randn(12, 4, dtype=torch.float64) * 2
    kept = []
    for order in ("gate_weight", "normalized_gate_weight"):
        layer = MoE(**SIZES, top_k=2, capacity=3, drop_order=order, softmax_order="after_topk")
        kept.append((layer.router.route(logits).gate_weights > 0).tolist())
    assert kept[0] != kept[1]
