"""Adapters there and back: dmoe's to PEFT's own loader, PEFT's to dmoe, and merged folders, with equal logits."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GptOssConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig

import dmoe
from dmoe.integrations.transformers import restore, to_dmoe, use
from dmoe.lora.command import convert, main
from dmoe.lora.peft_write import LAYOUTS

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SMALL, head_dim=8, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2
    ),
    # transposed, interleaved, with biases and a gate of its own
    "gpt_oss": lambda: GptOssConfig(**SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
}
IDS = torch.arange(40).view(2, 20) * 7 % 64
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
TIGHT = {torch.float64: 1e-6, torch.float32: 1e-5}  # norms and softmax of these models are float32 in any case


def base(family, dtype=torch.float64, experts_implementation="eager"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), experts_implementation="eager").to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
    return model.eval()


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")


def assert_close(found, expected, dtype=torch.float64, experts_implementation="eager"):
    assert (found - expected).abs().max() <= TIGHT[dtype] * expected.abs().max()


def filled(parameters, std=0.25):
    torch.manual_seed(1)
    for parameter in parameters:
        torch.nn.init.normal_(parameter, std=std)


def ours(family, how, dtype=torch.float64, **fields):
    """A model with dmoe's adapters, and what it computes: something else than without them."""
    model = base(family, dtype)
    plain = logits(model)
    how(model)
    filled(dmoe.lora.add(model, rank=4, alpha=8, **fields).values())
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    return model, expected


def theirs(family, folder, dtype=torch.float64, modules=("q_proj",), **fields):
    """An adapter that PEFT has made and saved, and what its model computes."""
    model = base(family, dtype)
    plain = logits(model)
    given = {"r": 3, "lora_alpha": 8, "target_modules": list(modules), "target_parameters": TARGETS, **fields}
    model = get_peft_model(model, LoraConfig(**given), autocast_adapter_dtype=False)
    filled(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    model.save_pretrained(folder)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.1 * plain.abs().max()
    return expected


@pytest.mark.parametrize(("how", "dtype"), [(use, torch.float64), (to_dmoe, torch.float32)])
@pytest.mark.parametrize("family", CONFIGS)
def test_peft_reads_what_dmoe_writes(family, how, dtype, tmp_path):
    targets = ("experts", "router") if how is to_dmoe else ("experts",)
    model, expected = ours(family, how, dtype, targets=targets)
    dmoe.lora.save_peft(model, tmp_path / "adapter")
    for layout in LAYOUTS[1:]:
        if family != "gpt_oss" or layout == "vllm":
            dmoe.lora.save_peft(model, tmp_path / layout, layout=layout)
    for folder in tmp_path.iterdir():
        read = PeftModel.from_pretrained(base(family, dtype), folder, autocast_adapter_dtype=False)
        assert_close(logits(read), expected, dtype)
        again = base(family, dtype)
        how(again)
        assert dmoe.lora.load_peft(again, folder) == []
        assert_close(logits(again), expected, dtype)
        read.set_adapter("default")  # and dmoe computes what PEFT has read
        use(read)
        assert_close(logits(read), expected, dtype)


@pytest.mark.parametrize(
    ("how", "fields"),
    [(use, {"use_rslora": True, "rank_pattern": {"experts.down_proj": 5}}), (to_dmoe, {})],
    ids=["use", "to_dmoe"],
)
@pytest.mark.parametrize("family", CONFIGS)
def test_dmoe_reads_what_peft_writes(family, how, fields, tmp_path):
    expected = theirs(family, tmp_path / "adapter", modules=[], **fields)
    model = base(family)
    how(model)
    assert dmoe.lora.load_peft(model, tmp_path / "adapter") == []
    assert_close(logits(model), expected)
    dmoe.lora.save_peft(model, tmp_path / "again")
    read = PeftModel.from_pretrained(base(family), tmp_path / "again", autocast_adapter_dtype=False)
    assert_close(logits(read), expected)


def test_what_dmoe_does_not_adapt_is_refused_or_left_to_peft(tmp_path):
    theirs("qwen3_moe", tmp_path / "adapter")
    model = base("qwen3_moe")
    use(model)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj: expected a module that dmoe adapts"):
        dmoe.lora.load_peft(model, tmp_path / "adapter")
    assert not dmoe.lora.adapted_modules(model)
    left = dmoe.lora.load_peft(model, tmp_path / "adapter", strict=False)
    assert left == [f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]
    other = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SMALL, head_dim=8, mlp_only_layers=[0], num_experts=4))
    use(other)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts: expected a module that dmoe adapts"):
        dmoe.lora.load_peft(other, tmp_path / "adapter", strict=False)


@pytest.mark.parametrize("family", CONFIGS)
def test_merged_folders_load_as_plain_models(family, tmp_path, capsys):
    base(family).save_pretrained(tmp_path / "base", max_shard_size="20KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    expected = theirs(family, tmp_path / "adapter", modules=["q_proj", "o_proj"], rank_pattern={"experts.down_proj": 5})
    given = [str(tmp_path / "base"), str(tmp_path / "adapter")]
    assert main(["merge", *given, str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "tokenizer.json").exists()
    merged = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float64, experts_implementation="eager"
    )
    assert_close(logits(merged), expected)
    assert main(["merge", *given, str(tmp_path / "merged")]) == 2  # it is there
    assert "overwrite" in capsys.readouterr().err
    for layout in LAYOUTS:
        if family == "gpt_oss" and layout in ("peft-experts", "sglang"):
            continue
        convert(tmp_path / "adapter", tmp_path / layout, layout, base=tmp_path / "base")
        assert main(["merge", str(tmp_path / "base"), str(tmp_path / layout), str(tmp_path / f"m-{layout}")]) == 0
        merged = AutoModelForCausalLM.from_pretrained(
            tmp_path / f"m-{layout}", dtype=torch.float64, experts_implementation="eager"
        )
        assert_close(logits(merged), expected)


def test_merged_once_rounded(tmp_path):
    """bfloat16 weights: each is the float32 sum, rounded; every other tensor is as it was."""
    model = base("qwen3_moe").bfloat16()
    model.save_pretrained(tmp_path / "base")
    theirs("qwen3_moe", tmp_path / "adapter", torch.float32, modules=[])
    assert main(["merge", *(str(tmp_path / each) for each in ("base", "adapter", "merged"))]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    exact = base("qwen3_moe", torch.float64)
    for parameter, given in zip(exact.parameters(), model.parameters(), strict=True):
        parameter.data = given.double()
    exact = PeftModel.from_pretrained(exact, tmp_path / "adapter", autocast_adapter_dtype=False).merge_and_unload()
    for name, tensor in exact.state_dict().items():
        if "experts" in name:
            ulp = 2.0 ** (torch.frexp(tensor.float()).exponent - 8)
            assert ((merged[name].double() - tensor).abs() <= 0.51 * ulp).all(), name
        else:
            assert torch.equal(merged[name].double(), tensor), name


def test_a_target_that_the_base_does_not_have(tmp_path, capsys):
    base("qwen3_moe").save_pretrained(tmp_path / "base")
    theirs("qwen3_moe", tmp_path / "adapter")
    config = base("mixtral").config
    config.num_hidden_layers = 1
    small = AutoModelForCausalLM.from_config(config)
    small.save_pretrained(tmp_path / "small")
    assert main(["merge", str(tmp_path / "small"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "adapter_model.safetensors: model.layers.1.mlp.experts: expected a module of the model in" in told
    wide = json.loads((tmp_path / "base" / "config.json").read_text())
    wide["moe_intermediate_size"] = 32
    other = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**wide))
    other.save_pretrained(tmp_path / "wide")
    assert main(["merge", str(tmp_path / "wide"), str(tmp_path / "adapter"), str(tmp_path / "out")]) == 2
    assert "gate_up_proj: expected an update of (4, 64, 32), as the weight is, got one of (4, 48, 32)" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_shared_experts_and_their_gate(tmp_path):
    """Of Qwen2-MoE: linear layers of their own, as attention's are."""
    fields = {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 16, "num_experts": 4}

    def model():
        torch.manual_seed(0)
        config = Qwen2MoeConfig(**SMALL, **fields)
        made = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.3 if parameter.dim() > 1 else 0.5)
        return made

    modules = ["shared_expert.gate_proj", "shared_expert.up_proj", "shared_expert.down_proj"]
    peft = get_peft_model(
        model(), LoraConfig(r=3, target_modules=[*modules, "shared_expert_gate"], init_lora_weights=False)
    )
    with torch.no_grad():
        peft = peft.double()
        expected = logits(peft)
    peft.save_pretrained(tmp_path / "adapter")
    model().save_pretrained(tmp_path / "base")
    assert main(["merge", *(str(tmp_path / each) for each in ("base", "adapter", "merged"))]) == 0
    assert_close(
        logits(
            AutoModelForCausalLM.from_pretrained(
                tmp_path / "merged", dtype=torch.float64, experts_implementation="eager"
            )
        ),
        expected,
    )


@pytest.mark.parametrize("family", CONFIGS)
def test_merging_in_memory_and_codes(family):
    model, expected = ours(family, use, torch.float32)
    with dmoe.lora.disable(model):
        plain = logits(model)
    assert_close(plain, logits(base(family, torch.float32)), torch.float32)
    merged = copy.deepcopy(model)
    dmoe.lora.merge(merged)
    dmoe.lora.remove(merged)
    restore(merged)  # Transformers computes it
    assert_close(logits(merged), expected, torch.float32)
    with pytest.raises(ValueError, match=r"restore: model.layers.0.mlp.experts.lora: expected .*, got adapters"):
        restore(model)
    for form in ("int8", "fp8"):
        coded = copy.deepcopy(model)
        assert len(dmoe.quant.quantize(coded, form)) == 4
        found = logits(coded)
        assert 1e-4 < (found - expected).norm() / expected.norm() < 0.3  # what rounding makes of it
        assert len(dmoe.quant.dequantize(coded)) == 4
        shapes = {name: parameter.shape for name, parameter in base(family).named_parameters()}
        mine = {name: parameter.shape for name, parameter in coded.named_parameters() if ".lora." not in name}
        assert mine == shapes
        assert_close(logits(coded), found, torch.float32)
        dmoe.lora.merge(coded)
        dmoe.lora.remove(coded)
        restore(coded)
        assert_close(logits(coded), found, torch.float32)


def test_experts_that_dmoe_does_not_compute_get_no_adapters():
    model = base("qwen3_moe")
    for change in (dmoe.lora.add, dmoe.quant.quantize):
        use(model)
        restore(model)
        with pytest.raises(
            ValueError, match=r"expected experts that dmoe computes, as after .*use.model., got .*eager"
        ):
            change(model)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("family", "codes"), [("qwen3_moe", None), ("gpt_oss", "int8")])
def test_checkpointing_is_equal(family, codes, reentrant):
    model, _ = ours(family, use, torch.float32)
    if codes:
        dmoe.quant.quantize(model, codes)
    model.enable_input_require_grads()
    model.train()

    def step():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.requires_grad}

    plain = step()
    assert len(plain) == 8
    assert all(".lora.default." in name for name in plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for name, grad in step().items():
        assert (grad - plain[name]).norm() <= 1e-5 * plain[name].norm(), name
        assert grad.any(), name


def test_gradients_are_those_of_the_sum():
    """Each factor's, by the chain rule from the gradient of a weight that is ``W + s B A``."""
    for family in CONFIGS:
        model, _ = ours(family, use)
        model(input_ids=IDS, labels=IDS).loss.backward()
        merged = copy.deepcopy(model)
        merged.zero_grad()
        dmoe.lora.merge(merged)
        dmoe.lora.remove(merged)
        restore(merged)
        merged.requires_grad_()
        merged(input_ids=IDS, labels=IDS).loss.backward()
        experts, plain = model.model.layers[0].mlp.experts, merged.model.layers[0].mlp.experts
        factors = experts.lora.default.down_proj
        grad = plain.down_proj.grad
        grad = grad.mT if family == "gpt_oss" else grad
        assert_close(factors.a.grad, 2 * factors.b.mT @ grad)
        assert_close(factors.b.grad, 2 * grad @ factors.a.mT)
        factors, grad = experts.lora.default.gate_up_proj, plain.gate_up_proj.grad
        if family == "gpt_oss":
            grad = grad.mT.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)
        assert_close(factors.a.grad, 2 * factors.b.flatten(1, 2).mT @ grad)
        assert_close(factors.b.grad.flatten(1, 2), 2 * grad @ factors.a.mT)


def test_one_adapter_for_each_token():
    model, first = ours("qwen3_moe", use, torch.float32)
    filled(dmoe.lora.add(model, rank=2, name="other").values(), 0.1)
    second = logits(model)
    ids = torch.tensor([[0], [1]]).expand(2, 20).contiguous()
    with dmoe.lora.use(model, ids, ["default", "other"]):
        found = logits(model)
    assert_close(found, torch.stack([first[0], second[1]]), torch.float32)
