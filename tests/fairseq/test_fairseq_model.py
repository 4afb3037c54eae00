"""MoE layers in fairseq's models: what they compute, their gradients, their names, and the criterion's arithmetic."""

from __future__ import annotations

import math

import fairseq_jobs as jobs
import pytest
import torch
import torch.nn.functional as F
from fairseq_pool import in_fairseq, needs_fairseq

pytestmark = needs_fairseq

POLICY = ["--moe-second-expert-policy", "all"]


@pytest.mark.parametrize(
    ("arch", "activation", "flags", "layers"),
    [
        ("transformer_lm_gpt", "gelu", ["--moe-freq", 2, "--moe-dropless"], 2),
        ("transformer_lm", "gelu_accurate", ["--moe-freq", 1, "--moe-dropless"], 4),
        ("transformer_lm_gpt2_tiny", "relu", ["--moe-freq", 2, "--moe-dropless", "--use-moe-pad-mask"], 2),
        ("transformer", "relu", ["--moe-freq", 2, "--moe-dropless"], 2),
        ("transformer", "gelu", ["--encoder-moe-freq", 1, "--moe-dropless"], 2),
        ("transformer", "relu", ["--decoder-moe-freq", 2, "--moe-eval-capacity-token-fraction", 1], 1),
    ],
)
def test_equal_experts_are_the_dense_model(arch, activation, flags, layers):
    """Weights share 1, so experts that are copies of a feed-forward layer give exactly that layer's output."""
    common = ["--activation-fn", activation]
    x, y, losses, count = in_fairseq(jobs.equal_experts, arch, common, *flags, "--moe-expert-count", 4)
    kept = slice(None) if "--use-moe-pad-mask" not in flags else slice(0, -1)  # the last sentence has padding
    rounded = activation.startswith("gelu")  # fairseq computes its gelu in float32
    torch.testing.assert_close(y[kept], x[kept], rtol=0, atol=3e-7 if rounded else 1e-12)
    assert count == len(losses) == layers
    assert all(0 < loss <= 4 for loss in losses)


@pytest.fixture(scope="module")
def plain():
    return in_fairseq(jobs.one_backward, False, *POLICY)


@pytest.mark.parametrize(
    "flags", [POLICY, ["--moe-second-expert-policy", "sampling", "--moe-dropless"]], ids=["all", "sampling"]
)
def test_checkpointed_activations_change_no_gradient(flags, plain):
    loss, size, logged, gradients, held = in_fairseq(jobs.one_backward, True, *flags)
    other = plain if flags is POLICY else in_fairseq(jobs.one_backward, False, *flags)
    assert (loss, size, logged) == (other[0], other[1], other[2])
    assert held == []  # no graph is kept
    for name, gradient in other[3].items():
        torch.testing.assert_close(gradients[name], gradient, rtol=0, atol=1e-12, msg=name)
        assert gradient.abs().max() > 0, name


def test_the_gate_loss_has_its_own_gradient(plain):
    """loss = nll + wt * size * f(losses): twice the weight adds the same again, to the gates and below them."""
    without, half = (in_fairseq(jobs.one_backward, True, *POLICY, "--moe-gate-loss-wt", wt) for wt in (0, 0.5))
    for name, gradient in plain[3].items():  # fairseq's log-softmax is float32
        torch.testing.assert_close(half[3][name] - without[3][name], gradient - half[3][name], rtol=1e-4, atol=1e-6)
    gate = "decoder.layers.3.moe_layer.moe.router.weight"
    assert (plain[3][gate] - without[3][gate]).abs().max() > 1e-3
    assert plain[0] - without[0] == pytest.approx(plain[2]["moe_loss"])


def test_how_the_gate_losses_are_combined(plain):
    """From one layer's losses of two: their mean by default."""
    total, mean = (
        in_fairseq(jobs.one_backward, False, *POLICY, "--moe-gate-loss-combine-method", how)[2]["moe_loss"]
        for how in ("sum", "average")
    )
    assert mean == plain[2]["moe_loss"]
    assert total == pytest.approx(2 * mean, rel=1e-12)
    neg_log = in_fairseq(jobs.one_backward, False, *POLICY, "--moe-gate-loss-transform", "neg_log")[2]
    size = plain[1]
    assert neg_log["moe_loss"] == pytest.approx(-size * math.log(mean / size), rel=1e-9)
    assert neg_log["loss"] == pytest.approx(neg_log["inner_loss"] + neg_log["moe_loss"], rel=1e-12)


@pytest.mark.parametrize("encoder", [False, True])
def test_dropout_is_inside_the_experts_and_nowhere_else(encoder):
    attention, experts = in_fairseq(jobs.dropped_shares, 0.5, encoder)
    assert attention == pytest.approx(0.5, abs=0.03)
    assert experts == pytest.approx(0.5, abs=0.03)  # 0.75 if the layer dropped the sum once more


def test_the_log_line_of_fairseqs_own_page():
    """Its first line: inner loss 20.472 bits, gate loss 16.72 nats, weight 0.01, loss 20.714."""
    tokens = 8192
    nll, gate = 20.472 * math.log(2) * tokens, 16.72 * tokens
    output = {"loss": nll + 0.01 * gate, "inner_loss": nll, "moe_loss": gate, "ntokens": tokens, "sample_size": tokens}
    parts = [
        {**output, "batch_count": 1, "overflow_expert1": 20.0},
        {**output, "batch_count": 1, "overflow_expert1": 30.0},
    ]
    logged = in_fairseq(jobs.logged_by, parts)
    assert logged["loss"] == pytest.approx(20.714, abs=1e-3)
    assert (logged["inner_loss"], logged["moe_gate_loss"]) == pytest.approx((20.472, 16.72))
    assert logged["overflow_expert1"] == pytest.approx(25)  # means of micro-batches
    assert logged["ppl"] == pytest.approx(2**20.472, rel=1e-4)
    by_sentence = in_fairseq(jobs.logged_by, [{**parts[0], "sample_size": 4}])
    assert by_sentence["nll_loss"] == pytest.approx(20.472)
    assert by_sentence["inner_loss"] == pytest.approx(20.472 * tokens / 4)


def test_checkpoints_speak_the_branchs_names():
    shapes, theirs, x, y, same = in_fairseq(jobs.names_and_numbers)
    expected = {"decoder.layers.3.moe_layer.gate.wg.weight": (4, 8)}
    for expert in range(4):
        at = f"decoder.layers.3.moe_layer.experts.{expert}"
        expected |= {
            f"{at}.fc1.weight": (12, 8),
            f"{at}.fc1.bias": (12,),
            f"{at}.fc2.weight": (8, 12),
            f"{at}.fc2.bias": (8,),
        }
    assert {name: shape for name, shape in shapes.items() if name.startswith("decoder.layers.3.moe_layer")} == expected
    assert "decoder.layers.2.fc1.weight" in shapes
    assert "decoder.layers.3.fc1.weight" not in shapes
    assert same
    layer = {name.removeprefix("decoder.layers.3.moe_layer."): value for name, value in theirs.items()}
    gates, chosen = (x.float() @ layer["gate.wg.weight"].float().t()).softmax(-1).topk(2)
    outputs = [
        F.linear(
            F.gelu(F.linear(x, layer[f"experts.{e}.fc1.weight"], layer[f"experts.{e}.fc1.bias"])),
            layer[f"experts.{e}.fc2.weight"],
            layer[f"experts.{e}.fc2.bias"],
        )
        for e in range(4)
    ]
    expected_y = sum(
        (gates / gates.sum(-1, keepdim=True))[..., k, None]
        * torch.stack(outputs, -2).gather(-2, chosen[..., k, None, None].expand(*chosen.shape[:2], 1, 8)).squeeze(-2)
        for k in range(2)
    )
    torch.testing.assert_close(y, expected_y, rtol=1e-5, atol=1e-5)  # gates in float32


def test_a_checkpoint_of_another_number_of_experts_is_told():
    told = in_fairseq(jobs.wrong_checkpoint, 6, 4)
    assert "decoder.layers.1.moe_layer.experts: expected 4 experts" in told
    assert "in the checkpoint, got 6" in told


LAYER = "decoder.layers.3.moe_layer."
OURS = [f"experts.{expert}.{name}.weight" for name in ("fc1", "fc2") for expert in (0, 1)]
OTHERS = {
    "gated": (["gate.wg.weight", "experts.0.w1.weight", "experts.0.w2.weight", "experts.1.w1.weight"], "0.w1.weight"),
    "MegaBlocks'": (["gate.wg.weight", "experts.mlp.w1", "experts.mlp.w2"], "mlp.w1"),
    "all in one": (["gate.wg.weight", "experts.fc1.weight", "experts.fc2.weight"], "fc1.weight"),
    "half of them": ([*OURS[:2], "experts.0.fc2.kernel", "experts.1.fc2.kernel"], "0.fc2.kernel"),
}


@pytest.mark.parametrize(("names", "first"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("strict", [False, True])
def test_experts_of_another_layout_are_refused(names, first, strict):
    """Also where names that are not known are skipped: experts would stay as they were made."""
    told = in_fairseq(jobs.loaded, names, LAYER, strict)
    assert f"{LAYER}experts: expected experts.N.fc1.weight, experts.N.fc2.weight, got experts of another layout" in told
    assert f"(experts.{first}" in told


def test_experts_of_another_layout_under_dmoes_own_names_are_refused():
    told = in_fairseq(jobs.loaded, ["moe.experts.w1", "moe.experts.w2"], LAYER, False)
    assert f"{LAYER}moe.experts: expected up_proj, down_proj, got experts of another layout (w1, w2)" in told


@pytest.mark.parametrize("names", [[], ["gate.wg.weight"], OURS[:2], ["fc1.weight"], [*OURS, "experts.0.fc3.weight"]])
def test_experts_may_be_left_out(names):
    """All, or some of their values: what ``strict=False`` is for; what is there is loaded."""
    came = in_fairseq(jobs.loaded, names, LAYER, False)
    assert {name.removeprefix(LAYER) for name, is_there in came.items() if is_there} == set(names) & {
        name.removeprefix(LAYER) for name in came
    }
    assert len(came) == 1 + 2 * 4


@pytest.mark.parametrize(
    ("arch", "flags", "built", "losses"),
    [
        ("transformer_lm_gpt", "--moe-freq 3", "d12 d12 m12 d12", 1),
        ("transformer_lm_gpt", "--moe-freq 2 --moe-expert-ffn-dim 20", "d12 m20 d12 m20", 2),
        ("transformer_lm_gpt", "--moe-freq 2 --alternate-decoder-ffn-embed-dim 28", "d12 d28 d12 d28", 0),
        ("transformer_lm_gpt", "--moe-freq 1 --checkpoint-activations", "m12 m12 m12 m12", 4),
        ("transformer_lm_gpt", "", "d12 d12 d12 d12", 0),
        ("transformer", "--encoder-moe-freq 1 --decoder-moe-freq 2", "m12 m12 d20 m20", 3),
        ("transformer", "--encoder-moe-freq 2 --checkpoint-activations", "d12 m12 d20 d20", 1),
        ("transformer", "--moe-freq 2 --alternate-ffn-embed-dim 28", "d12 d28 d20 m20", 1),
        ("transformer_iwslt_de_en", "", "d12 d12 d20 d20", 0),
    ],
)
def test_which_layers_have_experts(arch, flags, built, losses):
    arch, *rest = ("transformer", "--arch", arch) if arch.startswith("transformer_iwslt") else (arch,)
    found, count = in_fairseq(jobs.layers_built, arch, *rest, "--moe-expert-count", 4, *flags.split())
    assert " ".join(f"{kind[0]}{width}" for kind, width in found) == built
    assert count == losses
