"""Settings that dmoe does not carry, and releases it does not support: one sentence each, with a way out."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.nn.functional as F
from megatron_cases import Ranks

pytestmark = pytest.mark.xdist_group("megatron")

ONE = Ranks(1)

# What is set on a valid TransformerConfig -> words of the sentence.
REFUSED = {
    ("fp8", "hybrid"): "--fp8-format (fp8='hybrid'): dmoe's experts compute in the parameters' dtype; leave it out",
    ("fp4", "e2m1"): "--fp4-format",
    ("moe_router_load_balancing_type", ("sinkhorn",)): "--moe-router-load-balancing-type",
    ("moe_router_load_balancing_type", "sinkhorn"): "moe_aux_loss_coeff=0.01): sinkhorn balances without a loss; set",
    ("moe_router_load_balancing_type", ("aux_loss", "quantile_balancing")): "choose aux_loss, seq_aux_loss",
    ("moe_router_score_function", "tanh"): "--moe-router-score-function",
    ("moe_router_dtype", "fp64"): "--moe-router-dtype (moe_router_dtype='fp64'): dmoe's router computes in float32",
    ("moe_enable_routing_replay", True): "--moe-enable-routing-replay",
    ("moe_router_topk_limited_devices", 2): "use --moe-router-num-groups",
    ("moe_router_padding_for_quantization", True): "dmoe never pads tokens",
    ("moe_router_padding_for_fp8", True): "dmoe never pads tokens",
    ("moe_router_force_biased", 0.5): "--moe-router-force-biased",
    ("moe_pad_expert_input_to_capacity", True): "--moe-pad-expert-input-to-capacity",
    ("moe_expert_rank_capacity_factor", 1.0): "--moe-expert-rank-capacity-factor",
    ("moe_token_dropping", True): "use --moe-expert-capacity-factor",
    ("moe_latent_size", 16): "--moe-latent-size",
    ("moe_token_dispatcher_type", "flex"): "choose alltoall",
    ("moe_enable_deepep", True): "--moe-enable-deepep",
    ("moe_paged_stash", True): "--moe-paged-stash",
    ("moe_single_grouped_weight", True): "--moe-single-grouped-weight",
    ("moe_single_grouped_bias", True): "--moe-single-grouped-bias",
    ("moe_mlp_glu_interleave_size", 32): "dmoe keeps gate and up apart",
    ("use_transformer_engine_op_fuser", True): "--use-transformer-engine-op-fuser",
    ("activation_func_clamp_value", 7.0): "it is not translated into a dmoe.ClampedSwiGLU",
    ("glu_linear_offset", 1.0): "--glu-linear-offset",
    ("activation_func_fp8_input_store", True): "--activation-func-fp8-input-store",
    ("overlap_moe_expert_parallel_comm", True): "use --moe-dmoe-overlap-degree instead",
    ("overlap_dispatch_backward_with_experts_wgrad", True): "use --moe-dmoe-overlap-degree instead",
    ("delay_wgrad_compute", True): "--delay-wgrad-compute",
    ("enable_cuda_graph", True): "--enable-cuda-graph",
    ("external_cuda_graph", True): "--external-cuda-graph",
    ("cuda_graph_impl", "local"): "Megatron would capture dmoe's layer as a dense one",
    ("init_model_with_meta_device", True): "--init-model-with-meta-device",
    ("use_kitchen", True): "--use-kitchen",
    ("transformer_impl", "inference_optimized"): "choose transformer_engine or local",
    ("offload_modules", ("moe_act",)): "leave out expert_fc1 and moe_act",
    ("num_moe_experts", None): "give --num-experts",
    ("activation_func", F.elu): "activation function (activation_func='elu'): dmoe's experts have silu",
    ("moe_apply_probs_on_input", True): "it needs --moe-router-topk 1",
    ("moe_router_group_topk", 1): "without --moe-router-pre-softmax a group would rank by a sum of logits",
}


@pytest.mark.parametrize(("option", "value"), REFUSED, ids=lambda part: getattr(part, "__name__", str(part))[:24])
def test_an_option_that_dmoe_does_not_carry_is_refused(megatron, option, value):
    (told,) = megatron.run("told", ONE, "translate", {}, {option: value})
    kind, sentence = told
    assert kind == "ValueError"
    assert sentence.startswith("dmoe.integrations.megatron: ")
    assert REFUSED[option, value] in sentence
    assert sentence.count(";") == 1  # one sentence: what, why; what to do
    assert "\n" not in sentence


def test_too_many_best_of_a_group_are_refused(megatron):
    (told,) = megatron.run("told", ONE, "translate", {"moe_router_topk": 4}, {"moe_router_group_topk": 1})
    assert "a group would rank by its 4 best experts" in told[1]


def test_choices_that_balance_by_themselves(megatron):
    """Sinkhorn's and quantiles go with no loss and no other bias; quantiles only where Megatron moves them."""
    without_loss = {"moe_aux_loss_coeff": 0.0}

    def told(kind, **fields):
        attributes = {"moe_router_load_balancing_type": kind, **fields}
        return megatron.run("told", ONE, "translate", without_loss, attributes)[0]

    assert told("sinkhorn") is None
    for kind in ("sinkhorn", "quantile_balancing"):
        _, sentence = told(kind, moe_router_enable_expert_bias=True)
        assert f"--moe-router-enable-expert-bias (moe_router_enable_expert_bias=True): {kind} does not" in sentence
    if megatron.run("release", ONE, None)[0] < "0.19":
        assert told("quantile_balancing")[1].endswith("has no step that would move its bias; install 0.19")
        return
    assert told("quantile_balancing") is None
    for name in ("tensor_model_parallel_size", "context_parallel_size"):
        assert "of all tensor- and context-parallel ranks' tokens" in told("quantile_balancing", **{name: 2})[1]
    _, sentence = told("quantile_balancing", moe_router_quantile_balancing_ema=1.0)
    assert "--moe-router-quantile-balancing-ema (selection_bias_decay): expected 0 <= share < 1" in sentence


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("moe_grouped_gemm", True),
        ("moe_permute_fusion", True),
        ("moe_router_fusion", True),
        ("moe_token_dispatcher_type", "allgather"),
        ("moe_shared_expert_overlap", True),
        ("moe_router_force_load_balancing", True),
    ],
)
def test_options_that_only_name_an_implementation_are_carried(megatron, option, value):
    assert megatron.run("told", ONE, "translate", {}, {option: value}) == [None]


def test_experts_alone_leave_the_router_to_megatron(megatron):
    for option, value in (("moe_router_score_function", "tanh"), ("moe_router_dtype", "fp64")):
        assert megatron.run("told", ONE, "experts", {}, {option: value}) == [None]
    (told,) = megatron.run("told", ONE, "experts", {}, {"moe_latent_size": 16})
    assert "--moe-latent-size" in told[1]


def test_experts_that_the_ranks_cannot_share(megatron):
    for told in megatron.run("told", Ranks(2, ep=2), "layer", {}, {"num_moe_experts": 5}):
        assert told == (
            "ValueError",
            "dmoe.integrations.megatron: --num-experts 5: expected a multiple of --expert-model-parallel-size 2; "
            "change one of the two",
        )


def test_tensor_without_sequence_parallelism(megatron):
    for told in megatron.run("told", Ranks(2, tp=2, ep=2, etp=1), "train", {"sequence_parallel": False}, {}):
        assert told == (
            "ValueError",
            "dmoe.integrations.megatron: --tensor-model-parallel-size (tensor_model_parallel_size=2): without sequence "
            "parallelism every tensor-parallel rank would train on the same tokens; add --sequence-parallel",
        )


def test_a_shared_expert_needs_a_spec_that_names_one(megatron):
    shared = {"moe_shared_expert_intermediate_size": 64}
    (told,) = megatron.run("told", ONE, "layer", shared, {})
    assert "build the spec with dmoe_block_spec or dmoe_layer_spec" in told[1]


def test_main_grads_have_to_be_float32(megatron):
    (told,) = megatron.run("told", ONE, "bfloat16 main_grad", {}, {"gradient_accumulation_fusion": True})
    assert "--accumulate-allreduce-grads-in-fp32 or --no-gradient-accumulation-fusion" in told[1]


def test_an_option_of_dmoe_that_has_a_name_in_megatron(megatron):
    (told,) = megatron.run("told", ONE, "options", {}, {})
    assert "options: expected some of activation, backend" in told[1]
    assert "got top_k" in told[1]


def test_main_grads_and_chunks_of_experts_go_together(megatron):
    fused = {"gradient_accumulation_fusion": True}
    assert megatron.run("told", ONE, "overlap", {}, fused) == [[True, False]]


IMPORT = """
import sys, types
version = {version!r}
if version is None:
    sys.modules["megatron"] = None
else:
    core = types.ModuleType("megatron.core")
    core.__version__ = version
    sys.modules["megatron"], sys.modules["megatron.core"] = types.ModuleType("megatron"), core
import dmoe, dmoe.integrations
try:
    import dmoe.integrations.megatron
except ImportError as error:
    print(type(error).__name__, error)
else:
    print("imported")
"""


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        (None, "found none; install it with: pip install 'megatron-core>=0.16,<0.20'"),
        ("0.15.3", "found 0.15.3; install a supported one with: pip install 'megatron-core>=0.16,<0.20'"),
        (
            "0.20.0rc1",
            "found 0.20.0rc1; install a supported one with: pip install 'megatron-core>=0.16,<0.20', or try this one "
            "as it is, with DMOE_UNTRIED_MEGATRON=1 in the environment",
        ),
    ],
)
def test_a_release_that_is_not_supported(version, expected):
    said = "ImportError dmoe.integrations.megatron: expected megatron-core 0.16 to 0.19, " + expected
    done = _imported(version)
    assert done.stdout.strip() == said, done.stderr


def _imported(version, **environment):
    environment = {**os.environ, **environment}
    program = IMPORT.format(version=version)
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)


def test_a_newer_release_can_be_tried():
    done = _imported("0.20.0", DMOE_UNTRIED_MEGATRON="1")
    assert done.stdout.strip() == "imported", done.stderr
    assert "megatron-core 0.20.0 has not been tried with this dmoe" in done.stderr
    done = _imported("0.15.3", DMOE_UNTRIED_MEGATRON="1")
    assert "found 0.15.3" in done.stdout, "an older one lacks what is used"
