"""Every option of MegaBlocks, and what is refused."""

from __future__ import annotations

import re
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import without_generated_products
from megablocks_cases import arguments
from megablocks_oracle import (
    layer_with,
)
from torch import nn

from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers.arguments import DEFAULT_ACTIVATION_FN, from_megatron
from dmoe.compat.megablocks.layers.parameters import fused_activation

pytestmark = without_generated_products


# ---- Options


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"quantize_inputs_num_bits": 8}, NotImplementedError, "does not quantize"),
        ({"quantize_rematerialize_num_bits": 4}, NotImplementedError, "does not quantize"),
        ({"quantize_scatter_num_bits": 8}, NotImplementedError, "does not quantize"),
        ({"mlp_type": "moe"}, ValueError, "'mlp' or 'glu'"),
        ({"mlp_impl": "torch"}, ValueError, "'grouped' or 'sparse'"),
        ({"moe_top_k": 5}, ValueError, "1 to moe_num_experts = 4"),
        ({"moe_top_k": 0}, ValueError, "1 to moe_num_experts = 4"),
        ({"hidden_size": 0}, ValueError, "at least 1"),
        ({"ffn_hidden_size": 0}, ValueError, "at least 1"),
        ({"num_layers": 0}, ValueError, "at least 1"),
        ({"moe_num_experts": 0}, ValueError, "at least 1"),
        ({"pipeline_model_parallel_size": 0}, ValueError, "at least 1"),
        ({"num_layers_per_virtual_pipeline_stage": 0}, ValueError, "at least 1, or None"),
        ({"moe_capacity_factor": -1}, ValueError, "at least 0"),
        ({"moe_normalize_expert_weights": 0.5}, ValueError, "finite p >= 1"),
        ({"moe_normalize_expert_weights": float("inf")}, ValueError, "finite p >= 1"),
        ({"moe_jitter_eps": -0.1}, ValueError, "at least 0"),
        ({"moe_loss_weight": -1.0}, ValueError, "at least 0"),
        ({"moe_zloss_weight": -1.0}, ValueError, "at least 0"),
        ({"activation_fn": None}, ValueError, "a function"),
        ({"shared_expert_hidden_size": 0}, ValueError, "at least 1"),
    ],
)
def test_what_is_not_offered_is_refused(options, error, message):
    (name, value), args = *options.items(), arguments()
    pattern = rf"^Arguments: {name}: expected .*got {re.escape(repr(value))}"
    with pytest.raises(error, match=pattern) as caught:
        arguments(**options)
    assert message in str(caught.value)
    setattr(args, name, value)  # as Megatron's adapters do
    for layer in (megablocks.MoE, megablocks.dMoE, megablocks.ParallelMLP, megablocks.ParallelDroplessMLP):
        with pytest.raises(error, match=pattern):
            layer(args)


def test_gated_experts_with_a_capacity_are_refused():
    with pytest.raises(ValueError, match=r"MoE: mlp_type: expected 'mlp', got 'glu'"):
        layer_with("MoE", mlp_type="glu")


def test_every_option_of_megablocks_exists_with_its_default():
    args = megablocks.Arguments()
    defaults = {
        "hidden_size": 1024, "ffn_hidden_size": 4096, "num_layers": 1, "bias": True, "return_bias": True,
        "moe_num_experts": 1, "moe_top_k": 1, "moe_capacity_factor": 1, "moe_normalize_expert_weights": None,
        "moe_loss_weight": 0.1, "moe_jitter_eps": None, "moe_lbl_in_fp32": False,
        "moe_expert_model_parallelism": False, "expert_parallel_group": None, "pipeline_model_parallel_size": 1,
        "num_layers_per_virtual_pipeline_stage": None, "memory_optimized_mlp": False, "mlp_type": "mlp",
        "mlp_impl": "grouped", "fp16": True, "bf16": False, "uniform_expert_assignment": False,
        "shared_expert": False, "fc_cls": nn.Linear, "fc_kwargs": {}, "remat_act_fn": True,
        "shared_expert_hidden_size": 4096, "shared_expert_weighted_sum": False, "moe_zloss_weight": 0,
        "moe_zloss_in_fp32": False,
    }  # fmt: skip
    assert {name: getattr(args, name) for name in defaults} == defaults
    x = torch.randn(5)
    assert torch.equal(args.activation_fn(x), F.gelu(x, approximate="tanh"))
    for init in (args.init_method, args.output_layer_init_method):
        drawn = init(torch.empty(100_000))
        assert drawn.std() == pytest.approx(0.02, rel=0.02)
    expected = torch.cuda.current_device() if torch.cuda.is_available() else torch.device("cpu")
    assert args.device == expected


def test_arguments_of_megatron_are_taken_by_name():
    theirs = types.SimpleNamespace(
        hidden_size=12, ffn_hidden_size=20, moe_num_experts=8, moe_top_k=2, micro_batch_size=3, fp16=False
    )
    args = from_megatron(theirs)
    assert (args.hidden_size, args.moe_num_experts, args.moe_top_k, args.fp16) == (12, 8, 2, False)
    assert args.shared_expert_hidden_size == 20
    theirs.quantize_inputs_num_bits = 8
    with pytest.raises(NotImplementedError, match="quantize_inputs_num_bits"):
        from_megatron(theirs)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (DEFAULT_ACTIVATION_FN, "gelu_tanh"), (F.gelu, "gelu"), (partial(F.gelu, approximate="none"), "gelu"),
        (partial(F.gelu), "gelu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (F.silu, "silu"),
        (nn.SiLU(), "silu"), (F.relu, "relu"), (torch.relu, "relu"), (nn.ReLU(), "relu"), (torch.tanh, None),
        (partial(F.silu, inplace=True), None), (lambda x: x, None), (None, None),
    ],
)  # fmt: skip
def test_known_activations_are_fused(function, name):
    assert fused_activation(function) == name


def test_a_shared_expert_takes_any_linear():
    made = []

    class Linear(nn.Linear):
        def __init__(self, *sizes, bias, device, init_std):
            super().__init__(*sizes, bias=bias, device=device)
            made.append((sizes, bias, init_std))

    layer, _ = layer_with(
        "dMoE", mlp_type="glu", bias=False, shared_expert=True, shared_expert_hidden_size=7, fc_cls=Linear,
        fc_kwargs={"init_std": 0.1},
    )  # fmt: skip
    assert made == [((6, 7), False, 0.1), ((7, 6), False, 0.1), ((6, 7), False, 0.1)]
    assert layer.shared_expert.down_proj._is_residual
    assert layer(torch.randn(2, 3, 6)).shape == (2, 3, 6)
