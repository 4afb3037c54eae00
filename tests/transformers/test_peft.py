"""PEFT's adapters of expert weights: equal to eager, through the factors where they are there, and lean."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import saved_bytes
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GptOssConfig, MuseSparkTextConfig, Qwen3MoeConfig

import dmoe
from dmoe.integrations.transformers import lora, register, restore, use
from dmoe.integrations.transformers.experts import dmoe_experts

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
CONFIGS = {
    "qwen3_moe": lambda: Qwen3MoeConfig(**SMALL, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    # transposed, interleaved, with biases and a gate of its own
    "gpt_oss": lambda: GptOssConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
}
IDS = torch.arange(40).view(2, 20) * 7 % 64


def adapted_model(family, r=4, adapters=("default",), scale=0.3):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), experts_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    model = get_peft_model(model, lora_config(r), adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, lora_config(r))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=scale)
    return model


def lora_config(r=4):
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    return LoraConfig(r=r, lora_alpha=8, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM")


def step(model):
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, tolerance=1e-5):
    assert (ours[0] - theirs[0]).norm() <= tolerance * theirs[0].norm()
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        assert (ours[1][name] - grad).norm() <= tolerance * grad.norm(), name


def switched(model, how):
    if how == "use":
        assert use(model)
    else:
        register()
        model.get_base_model().set_experts_implementation("dmoe")
    return model


@pytest.fixture
def factored_calls(monkeypatch):
    """How many calls of the operation had adapters, and how many had none."""
    calls = []
    own = dmoe.functional.moe_mlp

    def spy(*args, **options):
        if args[0].shape[0] == IDS.numel():  # not those that find out what a gate computes
            calls.append(options.get("adapters") is not None)
        return own(*args, **options)

    monkeypatch.setattr(dmoe.functional, "moe_mlp", spy)
    return calls


@pytest.mark.parametrize("how", ["word", "use"])
@pytest.mark.parametrize("family", CONFIGS)
def test_adapters_equal_eager_and_go_through_their_factors(family, how, factored_calls):
    model = adapted_model(family)
    eager = step(model)
    assert any("lora_A" in name for name in eager[1])
    assert not any("base_layer.gate_up_proj" in name for name in eager[1])  # frozen
    assert_same(step(switched(model, how)), eager)
    assert factored_calls == [True, True]
    if how == "use":
        restore(model)
        assert_same(step(model), eager, 0)
        assert len(factored_calls) == 2


@pytest.mark.parametrize("how", ["word", "use"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_equal(how, reentrant):
    model = adapted_model("qwen3_moe")
    model.enable_input_require_grads()
    model.train()
    eager = step(model)
    switched(model, how)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same(step(model), eager)


def test_peft_goes_its_own_way_where_there_are_no_factors(factored_calls):
    model = switched(adapted_model("qwen3_moe", adapters=("default", "other")), "use")
    with torch.no_grad():
        for names in (["default", "other"], ["default"]):
            model.base_model.set_adapter(names)
            ours = model(IDS).logits
            restore(model)
            theirs = model(IDS).logits
            use(model)
            torch.testing.assert_close(ours, theirs)
        assert factored_calls == [False] * 2 + [True] * 2
        with model.disable_adapter():
            plain = model(IDS).logits
            restore(model)
            torch.testing.assert_close(plain, model(IDS).logits)
        use(model)
        adapted = model(IDS).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, adapted, rtol=1e-4, atol=1e-5)


def test_copies_pickles_and_saved_adapters(tmp_path):
    model = switched(adapted_model("qwen3_moe"), "use")
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert step(twin)[0].norm() > 0  # its own factors, not those of what it was copied from
    torch.save(twin, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert_same(step(again), step(twin), 0)
    twin.save_pretrained(tmp_path / "adapter")
    restore(twin)
    twin.save_pretrained(tmp_path / "plain")
    saved = [load_file(tmp_path / folder / "adapter_model.safetensors") for folder in ("adapter", "plain")]
    torch.testing.assert_close(saved[0], saved[1], rtol=0, atol=0)


def test_experts_that_are_composed_get_the_sum():
    torch.manual_seed(0)
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts

    config = MuseSparkTextConfig(
        num_attention_heads=4, hidden_size=16, moe_hidden_size=16, moe_intermediate_size=8, num_local_experts=3
    )
    experts = MuseSparkExperts(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x, index, gates = torch.randn(7, 16), torch.randint(0, 3, (7, 2)), torch.rand(7, 2)
    lhs, rhs = torch.randn(3, 16, 2), torch.randn(3, 2, 16)
    experts.__dict__[lora.HANDED] = {"gate_up_proj": (lhs, rhs, 0.5)}
    ours = dmoe_experts(experts, x, index, gates)
    del experts.__dict__[lora.HANDED]
    with torch.no_grad():
        experts.gate_up_proj += 0.5 * lhs @ rhs
    torch.testing.assert_close(ours, dmoe_experts(experts, x, index, gates))


def test_nothing_as_large_as_all_experts_is_kept():
    model = switched(adapted_model("qwen3_moe"), "use")
    model.train()
    with saved_bytes(exclude=list(model.parameters())) as ours:
        model(IDS)
    restore(model)
    model.get_base_model().set_experts_implementation("grouped_mm")
    with saved_bytes(exclude=list(model.parameters())) as theirs:
        model(IDS)
    assert ours.total < 0.7 * theirs.total


def test_trl_fine_tunes_as_eager_does(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def losses(how):
        torch.manual_seed(0)
        model = adapted_model("qwen3_moe")
        if how:
            switched(model, how)
        rows = Dataset.from_dict({"input_ids": [[(i * j) % 64 for j in range(1, 13)] for i in range(8)]})
        settings = SFTConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=4,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            learning_rate=1e-2,
            gradient_checkpointing=False,
        )
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    eager = losses(None)
    assert len(set(eager)) == 4
    for how in ("word", "use"):
        torch.testing.assert_close(losses(how), eager, rtol=2e-4, atol=0)


def tokenizer():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {str(i): i for i in range(64)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="0")), pad_token="0", eos_token="1"
    )
