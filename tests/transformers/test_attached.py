"""Adapters and codes in a model of Transformers: nobody computes, or saves, the model as if they were not there."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, PreTrainedModel, Qwen3MoeConfig

import dmoe
from dmoe.integrations.transformers import from_dmoe, parallelize, register, restore, save_pretrained, to_dmoe, use

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=4),
    "gpt_oss": lambda: GptOssConfig(**SMALL, num_local_experts=4, sliding_window=8),
}
IDS = torch.arange(40).view(2, 20) * 7 % 64


def base(family, **fields):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), **{"experts_implementation": "eager", **fields})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
    return model.eval()


def with_word(family):
    register()
    return base(family, experts_implementation="dmoe")


def with_use(family):
    model = base(family)
    use(model)
    return model


def with_blocks(family):
    model = base(family)
    to_dmoe(model)
    return model


def add(model, **fields):
    torch.manual_seed(1)
    for parameter in dmoe.lora.add(model, rank=4, alpha=8, **fields).values():
        torch.nn.init.normal_(parameter, std=0.25)


def quantize(model):
    dmoe.quant.quantize(model, "int8")


ATTACH = {"adapters": add, "codes": quantize}


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


# ---------------------------------------------------------------------------------------- another implementation's word


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("kind", ATTACH)
@pytest.mark.parametrize("make", [with_word, with_use])
@pytest.mark.parametrize("family", CONFIGS)
def test_another_implementation_is_refused(family, make, kind, implementation):
    model = make(family)
    ATTACH[kind](model)
    expected = logits(model)
    for each in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(each), expected, rtol=0, atol=0)
        each.set_experts_implementation(implementation)
        with pytest.raises(ValueError, match=rf"Experts: expected .*{kind} of dmoe.*, got .*'{implementation}'"):
            logits(each)
        use(each)
        torch.testing.assert_close(logits(each), expected, rtol=0, atol=0)


def test_an_unpickled_model_does_not_lose_the_check_to_a_hook_of_somebody_else(monkeypatch):
    """Numbers of hooks begin at 0 in every process."""
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    model = with_use("mixtral")
    add(model)
    stored = pickle.dumps(model)
    monkeypatch.setattr(torch.utils.hooks.RemovableHandle, "next_id", 0)
    again = pickle.loads(stored)
    for layer in again.model.layers:
        layer.mlp.experts.register_forward_pre_hook(lambda *_: None)
    again.set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"adapters of dmoe.lora"):
        logits(again)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_and_peft_around_it_change_nothing(reentrant):
    model = with_use("qwen3_moe")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    add(model, freeze=False)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if ".lora.default." in n)
    model.get_base_model().set_experts_implementation("eager")
    with pytest.raises(ValueError, match=r"adapters of dmoe.lora"):
        model(input_ids=IDS, labels=IDS)


def test_compiled_in_one_graph_and_refused_there():
    model = with_use("mixtral")
    add(model)
    expected = logits(model)
    experts = model.model.layers[0].mlp.experts
    x, index, gates = torch.randn(5, 32), torch.rand(5, 4).argsort(1)[:, :2], torch.rand(5, 2)
    whole = torch.compile(experts, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(whole(x, index, gates), experts(x, index, gates))
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(Exception, match=r"adapters of dmoe.lora"):
        logits(compiled)
    with pytest.raises(Exception, match=r"adapters of dmoe.lora"), torch.no_grad():
        whole(x, index, gates)


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_taken_out_is_computed_by_anybody(family):
    model = with_use(family)
    add(model)
    quantize(model)
    dmoe.quant.dequantize(model)
    dmoe.lora.merge(model)
    expected = logits(model)
    dmoe.lora.remove(model)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    restore(model)
    for _, module in model.named_modules():
        assert not module._forward_pre_hooks
        assert not {name for name in vars(module) if name.startswith("_dmoe")}


# ----------------------------------------------------------------------------------------------------- blocks' way back


@pytest.mark.parametrize(("kind", "fields"), [("adapters", {"targets": ("router",)}), ("adapters", {}), ("codes", {})])
def test_blocks_do_not_go_back_without_what_is_in_them(kind, fields):
    model = with_blocks("mixtral")
    ATTACH[kind](model, **fields)
    expected = logits(model)
    with pytest.raises(ValueError, match=rf"from_dmoe: model.layers.0.mlp.moe.*: expected .*, got {kind} of dmoe"):
        from_dmoe(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    if kind == "adapters":
        dmoe.lora.merge(model)
        dmoe.lora.remove(model)
    else:
        dmoe.quant.dequantize(model)
    assert len(from_dmoe(model)) == 2
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------- saved files


@pytest.mark.parametrize("kind", ATTACH)
@pytest.mark.parametrize("make", [with_word, with_use, with_blocks])
@pytest.mark.parametrize("family", CONFIGS)
def test_folders_that_could_not_be_read_are_not_written(family, make, kind, tmp_path):
    model = make(family)
    ATTACH[kind](model)
    expected = logits(model)
    for each in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=rf"save_pretrained: model.layers.0.mlp.*, got {kind} of dmoe.*torch.save"):
            each.save_pretrained(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    # The ways out that it names.
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = make(family)
    ATTACH[kind](other)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=0)
    if kind == "adapters":
        dmoe.lora.merge(model)
        dmoe.lora.remove(model)
    else:
        dmoe.quant.dequantize(model)
    model.save_pretrained(tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", experts_implementation="eager")
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)


def test_given_tensors_are_saved_if_they_are_the_bases(tmp_path):
    model = with_use("mixtral")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain = logits(model)
    add(model)
    with pytest.raises(ValueError, match=r"adapters of dmoe.lora"):
        model.save_pretrained(tmp_path / "folder", state_dict=model.state_dict())
    model.save_pretrained(tmp_path / "folder", True, state)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", experts_implementation="eager")
    torch.testing.assert_close(logits(again), plain, rtol=1e-4, atol=1e-4)


def test_other_models_are_saved_as_ever(tmp_path):
    register()
    saving = PreTrainedModel.save_pretrained
    use(base("mixtral"))
    with_blocks("mixtral")
    assert PreTrainedModel.save_pretrained is saving, "twice is once"
    model = base("mixtral")
    model.save_pretrained(tmp_path / "folder")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", experts_implementation="eager")
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ATTACH)
def test_spread_models_too(kind, tmp_path):
    base("mixtral").save_pretrained(tmp_path / "base")
    model = parallelize(tmp_path / "base", ep=1, fsdp=1, progress=False)
    ATTACH[kind](model)
    with pytest.raises(ValueError, match=rf"save_pretrained: model.layers.0.mlp.moe.*, got {kind} of dmoe"):
        save_pretrained(model, tmp_path / "folder", progress=False)
    assert not (tmp_path / "folder").exists()


# ----------------------------------------------------------------------------------------------------- inside of PEFT's


def wrapped(family, make=with_use):
    """PEFT's adapters of attention around a model, and what is to be trained of them."""
    torch.manual_seed(3)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(make(family), config)
    return model, [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize("make", [with_use, with_blocks])
@pytest.mark.parametrize("family", CONFIGS)
def test_names_are_those_of_the_model_that_peft_wraps(family, make, tmp_path):
    model, trained = wrapped(family, make)
    add(model, freeze=False)
    assert {name for name, each in model.named_parameters() if each.requires_grad} >= set(trained)
    dmoe.lora.save_peft(model, tmp_path / "experts", base="somewhere")
    plain = make(family)
    add(plain)
    dmoe.lora.save_peft(plain, tmp_path / "plain", base="somewhere")
    found = []
    for folder in ("plain", "experts"):
        with safe_open(tmp_path / folder / "adapter_model.safetensors", "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found.append((tensors, json.loads((tmp_path / folder / "adapter_config.json").read_text())))
    assert found[0][1] == found[1][1]
    assert found[0][0].keys() == found[1][0].keys()
    assert all(torch.equal(tensor, found[1][0][name]) for name, tensor in found[0][0].items())
    # Files go into either, whoever wrote them.
    expected = logits(model)
    again, _ = wrapped(family, make)
    assert dmoe.lora.load_peft(again, tmp_path / "plain") == []
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    again = make(family)
    assert dmoe.lora.load_peft(again, tmp_path / "experts") == []
    torch.testing.assert_close(logits(again), logits(plain), rtol=0, atol=0)
    read = PeftModel.from_pretrained(base(family), tmp_path / "experts")
    torch.testing.assert_close(logits(read), logits(plain), rtol=1e-4, atol=1e-4)


def test_both_kinds_are_trained_and_saved_each_in_its_own_folder(tmp_path):
    model, trained = wrapped("qwen3_moe")
    add(model, freeze=False)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(model.get_parameter(name).grad.any() for name in trained)
    assert all(p.grad.any() for n, p in model.named_parameters() if ".lora.default." in n)
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "attention")
    dmoe.lora.save_peft(model, tmp_path / "experts")
    again = PeftModel.from_pretrained(with_use("qwen3_moe"), tmp_path / "attention")
    dmoe.lora.load_peft(again, tmp_path / "experts")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


def test_freezing_is_told_to_leave_what_peft_trains():
    """``freeze``, which is the default, freezes PEFT's adapters as well."""
    model, trained = wrapped("mixtral")
    add(model)
    assert not any(model.get_parameter(name).requires_grad for name in trained)


def test_beside_experts_that_peft_adapts_as_well(tmp_path):
    config = LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    model = get_peft_model(with_use("qwen3_moe"), config)
    add(model, freeze=False)
    dmoe.lora.save_peft(model, tmp_path / "experts")
    again = with_use("qwen3_moe")
    dmoe.lora.load_peft(again, tmp_path / "experts")
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)
