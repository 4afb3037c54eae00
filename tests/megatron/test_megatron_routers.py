"""Megatron's own router and dmoe's, told the same by a ``TransformerConfig``, on the same logits."""

from __future__ import annotations

import pytest
import torch
from megatron_cases import Ranks, since

pytestmark = pytest.mark.xdist_group("megatron")
needs_0_19 = since(0, 19)

SHAPE = (25, 2)  # positions, sequences
SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = {"moe_router_enable_expert_bias": True, "moe_router_bias_update_rate": 0.2}
GROUPS = {"moe_router_num_groups": 5, "moe_router_group_topk": 2, "moe_router_topk": 4, "num_moe_experts": 10}
SINKHORN = {"moe_router_load_balancing_type": "sinkhorn", "moe_aux_loss_coeff": 0.0}
SQRT_SOFTPLUS = {"moe_router_score_function": "sqrtsoftplus"}
QUANTILE = {"moe_router_load_balancing_type": "quantile_balancing", "moe_aux_loss_coeff": 0.0, "num_moe_experts": 10}
# 100 assignments to 10 experts by a factor of 1.1: 11 rows, where multiplying first would give 12.
OF_100 = {"num_moe_experts": 10, "moe_expert_capacity_factor": 1.1}

CASES = {
    "softmax over the chosen": {},
    "softmax over all": {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 1.5},
    "sigmoid": SIGMOID,
    "one expert by its sigmoid": SIGMOID | {"moe_router_topk": 1},
    "sigmoid, bias": SIGMOID | BIAS,
    "sigmoid, bias, groups": SIGMOID | BIAS | GROUPS,
    "capacity, the smallest weights dropped": OF_100,
    "capacity, later tokens dropped": OF_100 | {"moe_token_drop_policy": "position"},
    "sinkhorn": SINKHORN,
    "sinkhorn, one expert": SINKHORN | {"moe_router_topk": 1},
    "sinkhorn, what it does not look at": SINKHORN | SIGMOID | {"moe_router_topk_scaling_factor": 3.0},
}
NEWER = {
    "sqrtsoftplus": SQRT_SOFTPLUS,
    "sqrtsoftplus, one expert": SQRT_SOFTPLUS | {"moe_router_topk": 1},
    "sqrtsoftplus, bias, groups": SQRT_SOFTPLUS | BIAS | GROUPS,
    "quantile balancing": QUANTILE,
    "quantile balancing, with memory": QUANTILE | SIGMOID | {"moe_router_quantile_balancing_ema": 0.7},
}


@pytest.fixture(scope="module")
def weights(megatron):
    """Both routers' weights in each call, by the name of a case and whether it trains."""
    cases = CASES | (NEWER if not needs_0_19.args[0] else {})
    return megatron.run("routed", Ranks(1), cases, SHAPE, about="routers")[0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", [*CASES, *(pytest.param(name, marks=needs_0_19) for name in NEWER)])
def test_the_same_logits_go_the_same_way(weights, name, training):
    config, found = (CASES | NEWER)[name], weights[name, training]
    for theirs, ours in found:
        if "later tokens" in name:  # it asks for the largest of ones and zeros, and takes any
            theirs, ours = theirs > 0, ours > 0
            assert torch.equal(theirs.sum(0), ours.sum(0))
            continue
        assert torch.equal(theirs > 0, ours > 0)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    loads = (found[0][1] > 0).sum(0)
    even = 50 * config.get("moe_router_topk", 2) / len(loads)
    if config.get("moe_expert_capacity_factor"):
        assert loads.max() == 11
    elif training and config.get("moe_router_load_balancing_type") == "sinkhorn":
        assert loads.max() < 1.3 * even
    else:
        assert loads.max() > 1.45 * even


@pytest.mark.parametrize("name", ["sigmoid, bias", pytest.param("quantile balancing", marks=needs_0_19)])
def test_biases_move(weights, name):
    """The second call goes by biases that have moved, and would go elsewhere by those of the start."""
    (_, moved), (_, still) = (weights[name, training][1] for training in (True, False))
    assert (moved[:, 0] > 0).sum() < 0.8 * (still[:, 0] > 0).sum()
