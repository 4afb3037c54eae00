"""Models with dmoe's blocks in use: saved, trained, compiled, copied, checkpointed; what is kept, and bad input."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys

import pytest
import rank_jobs_blocks
import torch
from hf_blocks import (
    assert_near,
    assert_same_state,
    gradients,
    holding,
    results,
    saved,
    tiny,
    tiny_block,
)
from hf_families import run, token_ids
from patience import PATIENCE
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

import dmoe
from dmoe.integrations.transformers.block_module import MoEBlock
from dmoe.integrations.transformers.blocks import from_dmoe, to_dmoe
from dmoe.integrations.transformers.versions import check_version

IDS = token_ids()


# ---------------------------------------------------------------------------------------------------------------- files

_PLAIN = """
import json, sys, torch, transformers
answers = {}
for folder in sys.argv[2:]:
    config = json.load(open(folder + "/config.json"))
    model = getattr(transformers, config["architectures"][0]).from_pretrained(folder).eval()
    with torch.no_grad():
        answers[folder] = model(input_ids=torch.tensor(json.loads(sys.argv[1])), use_cache=False)[0]
assert not any(name.split(".")[0] == "dmoe" for name in sys.modules)
torch.save(answers, sys.stdout.buffer)
"""


def test_what_is_saved_is_loaded_by_plain_transformers(tmp_path):
    families = ("mixtral", "qwen2_moe", "deepseek_v3", "hunyuan_v1_moe", "gpt_oss", "ernie4_5_moe")
    expected = {}
    for family in families:
        model = tiny(family)
        to_dmoe(model)
        with torch.no_grad():
            for parameter in model.parameters():  # as after training
                parameter.mul_(1.01)
            expected[str(tmp_path / family)] = run(model, IDS)
        model.save_pretrained(tmp_path / family)
    command = [sys.executable, "-c", _PLAIN, json.dumps(IDS.tolist()), *expected]
    done = subprocess.run(command, env=os.environ, capture_output=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    found = torch.load(io.BytesIO(done.stdout), weights_only=True)
    assert_near(found, expected, 1e-6)


def test_files_are_those_of_the_model_itself(tmp_path):
    """The hub's layout, an expert a tensor, and not that of the module in memory."""
    model = tiny("mixtral")
    model.save_pretrained(tmp_path / "theirs")
    to_dmoe(model)
    model.save_pretrained(tmp_path / "ours")
    theirs, ours = (_tensors(tmp_path / name) for name in ("theirs", "ours"))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in theirs
    assert_same_state(ours, theirs)


def _tensors(folder):
    return dict(sorted(load_file(folder / "model.safetensors").items()))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "ernie4_5_moe"])
def test_state_dicts_of_either_are_loaded_by_both(family):
    one, other = tiny(family), tiny(family)
    to_dmoe(one)
    for parameter in other.parameters():
        parameter.data.normal_()
    one.load_state_dict(other.state_dict())
    assert_same_state(dict(sorted(one.state_dict().items())), dict(sorted(other.state_dict().items())))
    for parameter in one.parameters():
        parameter.data.normal_()
    other.load_state_dict(one.state_dict())
    assert_near({"y": run(one, IDS)}, {"y": run(other, IDS)}, 1e-5)
    lacking = one.state_dict()
    gone = lacking.pop(next(name for name in lacking if "experts" in name))
    assert gone is not None
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: .*moe\.experts"):
        one.load_state_dict(lacking)


def test_distributed_checkpoints_find_every_name():
    model = tiny("deepseek_v3")
    to_dmoe(model)
    before = saved(model)
    state = dcp.get_model_state_dict(model)
    assert_same_state(state, before)
    dcp.set_model_state_dict(model, {name: torch.zeros_like(tensor) for name, tensor in before.items()})
    assert all(not parameter.any() for parameter in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    run(model, IDS).sum().backward()
    optimizer.step()
    moments = dcp.get_optimizer_state_dict(model, optimizer)
    assert "model.layers.1.mlp.moe.experts.gate_up_proj" in moments["state"]
    dcp.set_optimizer_state_dict(model, optimizer, moments)


# ------------------------------------------------------------------------------------------------------------- training


def train(model, steps=3):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        optimizer.zero_grad()
        ids = token_ids(seed=step)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_trained_and_put_back_is_trained_plain(family):
    plain, replaced = tiny(family), tiny(family)
    to_dmoe(replaced)
    train(plain.train())
    train(replaced.train())
    from_dmoe(replaced)
    assert_near(replaced.state_dict(), plain.state_dict(), 3e-5)  # float32's rounding, through an optimizer's steps
    assert replaced.training
    assert all(module.training for module in replaced.modules())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "minimax", "llama4"])
@pytest.mark.parametrize("before", [False, True], ids=["hooked later", "hooked before"])
def test_router_logits_and_the_models_own_loss(family, before):
    if family in ("llama4", "deepseek_v3") and check_version() < (5, 20):
        pytest.skip("this release records the block itself, or nothing")
    model = tiny(family)
    recorded = model if family in ("mixtral", "minimax") else model.model
    options = {"input_ids": IDS, "use_cache": False, "output_router_logits": True}
    plain = copy.deepcopy(model)
    expected = (plain if recorded is model else plain.model)(**options)
    if before:
        recorded(**options)
    to_dmoe(model)
    found = recorded(**options)
    assert len(found.router_logits) == len(expected.router_logits) > 0
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        assert_near({"logits": ours}, {"logits": theirs}, 1e-6)
    if recorded is model:
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
        for one in (plain, model):
            one.zero_grad()
            one(**options, labels=IDS).loss.backward()
        assert_near(gradients(model), gradients(plain), 1e-5)
    from_dmoe(model)
    assert len(recorded(**options).router_logits) == len(expected.router_logits)


def test_losses_of_dmoe_where_they_are_asked_for():
    model = tiny("mixtral").train()
    to_dmoe(model, load_balancing_coefficient=0.5, router_z_loss_coefficient=1e-3)
    configs = [module.moe.config for module in model.modules() if isinstance(module, MoEBlock)]
    assert [config.num_moe_layers for config in configs] == [2, 2]
    run(model, IDS)
    loss = dmoe.aux_loss(model)
    assert 0.5 < loss.item() < 2.0
    loss.backward()
    assert model.model.layers[0].mlp.moe.router.weight.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_under_gradient_checkpointing(reentrant):
    model = tiny("mixtral").train()
    _, expected = results(model, lambda: run(model, IDS))
    to_dmoe(model)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    _, found = results(model, lambda: run(model, IDS))
    assert_near(found, expected, 1e-5)


def test_jitter_reaches_the_whole_block():
    block = tiny_block("MixtralSparseMoeBlock", router_jitter_noise=0.2)
    model = holding(block).train()
    to_dmoe(model)
    assert model["mlp"].moe.config.input_jitter_on == "layer"
    x = torch.ones(1, 5, 32)
    y = model["mlp"](x)
    assert not torch.equal(y, y[:, :1].expand(-1, 5, -1))
    torch.testing.assert_close(model["mlp"].eval()(x), block.eval()(x))


@pytest.mark.parametrize("name", ["Qwen2MoeSparseMoeBlock", "GptOssMLP"])
def test_over_two_ranks(name, ranks):
    shares = [torch.randn(1, tokens, 32, generator=torch.Generator().manual_seed(tokens)) for tokens in (5, 9)]
    plain, before = rank_jobs_blocks.plain_block(name, shares)
    found = ranks.run(rank_jobs_blocks.block_over_ranks, name, shares, ranks=2)
    for (y, grad, here, state, after), expected in zip(found, plain, strict=True):
        assert_near({"y": y, "x": grad}, dict(zip("yx", expected, strict=True)), 3e-6)
        assert here == 2
        assert_same_state(dict(sorted(state.items())), dict(sorted(before.items())))
        assert_same_state(after, {name: tensor * 2 for name, tensor in before.items()})


def test_under_fsdp2(ranks):
    for error, same, refusal in ranks.run(rank_jobs_blocks.sharded_model, "qwen2_moe", ranks=2):
        assert error < 1e-6
        assert same == [True, True, True]
        assert refusal.startswith(
            "from_dmoe: expected parameters that FSDP2 does not shard, got a sharded block: model"
        )


# --------------------------------------------------------------------------------------------------------- other dtypes


def test_bfloat16_is_as_near_to_float32_as_eager():
    block = tiny_block("Qwen2MoeSparseMoeBlock")
    x = torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = block(x.float())
    model = holding(block).bfloat16()
    eager = model["mlp"](x).float()
    to_dmoe(model)
    ours = model["mlp"](x)
    assert ours.dtype == torch.bfloat16
    same = (ours.float() - exact).abs().mean(), (eager - exact).abs().mean()
    assert same[0] <= same[1], same
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()["mlp"](x.float()).dtype == torch.float32  # as the block's own


@pytest.mark.parametrize("family", ["deepseek_v3", "ernie4_5_moe"])
@pytest.mark.parametrize("exact", [(), ("gate.weight",), ("correction_bias",)], ids=str)
def test_dtypes_of_single_tensors_are_kept(family, exact):
    """Routers and their biases are in float32 or not, by release and by how a model was loaded."""
    model = tiny(family)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.endswith(exact):
            tensor.data = tensor.data.bfloat16()
    before = saved(model)
    to_dmoe(model)
    assert_same_state(dict(sorted(model.state_dict().items())), dict(sorted(before.items())))
    run(model, IDS)
    from_dmoe(model)
    assert_same_state(model.state_dict(), before)


def test_a_cast_in_between_is_the_blocks_as_well():
    model = tiny("deepseek_v3")
    to_dmoe(model)
    model.bfloat16()
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    from_dmoe(model)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == dtypes
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16}


# ------------------------------------------------------------------------------------------ compiled, copied, generated


def test_compiled_whole_and_once():
    model = tiny("mixtral")
    expected = run(model, IDS)
    to_dmoe(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            assert_near({"y": compiled(input_ids=IDS, use_cache=False)[0]}, {"y": expected}, 1e-6)


def test_generates_the_same_tokens():
    model = tiny("qwen3_moe")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(IDS, **options)
    to_dmoe(model)
    assert torch.equal(model.generate(IDS, **options), expected)


def test_copies_and_pickles_go_their_own_ways():
    model = tiny("mixtral")
    expected, before = run(model, IDS), saved(model)
    to_dmoe(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    others = [copy.deepcopy(model), torch.load(file, weights_only=False)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    for other in others:
        assert_near({"y": run(other, IDS)}, {"y": expected}, 1e-6)
        from_dmoe(other)
        assert_same_state(other.state_dict(), before)
    assert not run(model, IDS).any()


def test_on_meta_there_is_nothing_to_move():
    real = tiny("gpt_oss")
    with torch.device("meta"):
        model = type(real)(real.config)
    names = list(model.state_dict())
    to_dmoe(model)
    assert sorted(model.state_dict()) == sorted(names)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert model.model.layers[0].mlp.moe.experts.gate_up_proj.shape == (4, 2, 24, 32)


# ------------------------------------------------------------------------------------------------- what is kept; errors


def test_no_memory_is_taken_for_what_need_not_move():
    model = tiny("mixtral")
    where = model.model.layers[0].mlp.experts.gate_up_proj.data_ptr()
    to_dmoe(model)
    block = model.model.layers[0].mlp
    assert block.moe.experts.gate_up_proj.data_ptr() == where
    assert all(parameter.numel() == 0 for parameter in block.theirs.parameters())
    from_dmoe(model)
    assert model.model.layers[0].mlp.experts.gate_up_proj.data_ptr() == where


def test_what_is_frozen_hooked_and_set_stays_so():
    model = tiny("qwen2_moe")
    blocks = [module for module in model.modules() if type(module).__name__ == "Qwen2MoeSparseMoeBlock"]
    calls = []
    blocks[0].register_forward_hook(lambda module, args, output: calls.append(module))
    blocks[0].gate.weight.requires_grad_(False)
    blocks[0].experts.requires_grad_(False)
    blocks[0].experts.down_proj.mark = "mine"
    to_dmoe(model)
    ours = model.model.layers[0].mlp if isinstance(model.model.layers[0].mlp, MoEBlock) else model.model.layers[1].mlp
    trained = {name for name, parameter in ours.moe.named_parameters() if parameter.requires_grad}
    assert trained == {"shared_expert.mlp.gate_up_proj", "shared_expert.mlp.down_proj", "shared_expert.gate.weight"}
    run(model, IDS)
    assert calls == [ours]
    ours.moe.experts.down_proj.requires_grad_(True)
    from_dmoe(model)
    assert [module for module in model.modules() if type(module).__name__ == "Qwen2MoeSparseMoeBlock"] == blocks
    frozen = {name for name, parameter in blocks[0].named_parameters() if not parameter.requires_grad}
    assert frozen == {"gate.weight", "experts.gate_up_proj"}
    assert blocks[0].experts.down_proj.mark == "mine"
    run(model, IDS)
    assert calls == [ours, blocks[0]]


def test_again_changes_nothing():
    model = tiny("mixtral")
    assert len(to_dmoe(model)) == 2
    block = model.model.layers[0].mlp
    assert to_dmoe(model) == []
    assert model.model.layers[0].mlp is block


def tied(model):
    model.model.layers[0].mlp.gate.weight = model.model.layers[1].mlp.gate.weight


def adapted(model):
    torch.nn.utils.parametrize.register_parametrization(model.model.layers[1].mlp.experts, "down_proj", nn.Identity())


def quantised(model):
    experts = model.model.layers[1].mlp.experts
    experts.down_proj = nn.Parameter(experts.down_proj.to(torch.int8), requires_grad=False)


def offloaded(model):
    model.model.layers[1].mlp.gate._hf_hook = object()


def halved(model):
    model.model.layers[1].mlp = tiny_block("Qwen2MoeSparseMoeBlock")
    model.model.layers[1].mlp.shared_expert.up_proj.weight.requires_grad_(False)


def unknown(model):
    kind = type(model.model.layers[1].mlp)
    kind = type("NewSparseMoeBlock", (kind,), {"__module__": kind.__module__})
    new = kind(model.config)
    new.load_state_dict(model.model.layers[1].mlp.state_dict())
    model.model.layers[1].mlp = new


def strange(model):
    model.model.layers[1].mlp.experts.act_fn = nn.Softplus()


BAD = [
    (
        tied,
        {},
        ValueError,
        r"expected tensors of one block's own, got model.layers.0.mlp.gate.weight, which is model.l",
    ),
    (
        adapted,
        {},
        ValueError,
        r"expected a MixtralSparseMoeBlock without adapters and .*, got one with experts.param",
    ),
    (
        quantised,
        {},
        ValueError,
        r"expected floating-point weights, got torch.int8: model.layers.1.mlp.experts.down_proj",
    ),
    (offloaded, {}, ValueError, r"expected a model in one place, got one that accelerate moves: model.layers.1.mlp"),
    (halved, {}, ValueError, r"expected shared_expert.gate_proj.weight and shared_expert.up_proj.weight to be trained"),
    (unknown, {}, ValueError, r"expected MoE blocks that the table names, got NewSparseMoeBlock at model.layers.1.mlp"),
    (strange, {}, ValueError, r"expected experts with an activation that dmoe has, got those of MixtralSparseMoeBlock"),
    (None, {"top_k": 1}, ValueError, r"top_k: expected no value, the model settles it as 2, got 1"),
    (None, {"coefficient": 1.0}, TypeError, r"expected fields of dmoe.MoEConfig, got coefficient"),
    (
        None,
        {"load_balancing_coefficient": -1.0},
        ValueError,
        r"load_balancing_coefficient: expected at least 0, got -1",
    ),
]


@pytest.mark.parametrize(("spoil", "options", "error", "text"), BAD)
def test_bad_input_is_one_sentence_and_changes_nothing(spoil, options, error, text):
    model = tiny("mixtral")
    if spoil is not None:
        spoil(model)
    modules, before = list(model.modules()), saved(model)
    with pytest.raises(error, match=text) as raised:
        to_dmoe(model, **options)
    assert "\n" not in str(raised.value)
    assert list(model.modules()) == modules
    assert_same_state(model.state_dict(), before)


def test_a_failure_halfway_puts_everything_back(monkeypatch):
    model = tiny("mixtral")
    modules, before, expected = list(model.modules()), saved(model), run(model, IDS)
    taken = []

    def take(block, really=MoEBlock.take):
        if taken:
            raise MemoryError("no more")
        taken.append(block)
        really(block)

    monkeypatch.setattr(MoEBlock, "take", take)
    with pytest.raises(MemoryError):
        to_dmoe(model)
    assert list(model.modules()) == modules
    assert_same_state(model.state_dict(), before)
    assert torch.equal(run(model, IDS), expected)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (to_dmoe, "to_dmoe: expected a model with MoE blocks, got Linear"),
        (from_dmoe, "from_dmoe: expected a model that to_dmoe changed, got"),
    ],
)
def test_a_model_without_blocks_is_told(function, text):
    with pytest.raises(ValueError, match=text):
        function(nn.Linear(2, 2))
