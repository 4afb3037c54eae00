"""What people do with models, with dmoe's experts and with eager's: the same."""

from __future__ import annotations

import copy
import functools

import hf_families
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import dmoe.integrations.transformers as on_transformers
from dmoe.integrations.transformers import gates

on_transformers.register()
MODELS = ["mixtral", "gpt_oss", "nemotron_h", "llama4"]


def pair(family, **given):
    """A model that eager computes, and a copy that dmoe does."""
    eager = hf_families.tiny_model(family, holds=lambda model: True, **given)
    ours = copy.deepcopy(eager)
    assert on_transformers.use(ours)
    if hf_families.experts_of(eager):
        hf_families.set_implementation(eager, "eager")
    return eager, ours


def assert_near(found, wanted, tolerance=1e-5):
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("family", [*MODELS, "muse_spark"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(family, reentrant):
    _, ours = pair(family)

    def grads():
        ours.zero_grad()
        y = hf_families.run(ours)
        y.square().mean().backward()
        return {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}

    ours.train()
    wanted = grads()
    ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        ours.enable_input_require_grads()
    found = grads()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_router_logits_and_auxiliary_losses(family):
    eager, ours = pair(family)
    ids = hf_families.token_ids()
    with torch.no_grad():
        wanted, found = (
            model(input_ids=ids, labels=ids, use_cache=False, output_router_logits=True) for model in (eager, ours)
        )
    if family == "llama4":  # whose model for text records them, and hands them on nowhere
        with torch.no_grad():
            wanted, found = (model.model(input_ids=ids, output_router_logits=True) for model in (eager, ours))
    else:
        assert_near(found.loss, wanted.loss)
        assert_near(found.aux_loss, wanted.aux_loss)
    assert len(found.router_logits) == len(wanted.router_logits) > 0
    for one, other in zip(found.router_logits, wanted.router_logits, strict=True):
        assert_near(one, other)


@pytest.mark.parametrize("family", MODELS)
def test_generate_gives_the_same_tokens(family):
    eager, ours = pair(family)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(*(model.generate(hf_families.token_ids(), **how) for model in (eager, ours)))


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_files_are_those_of_transformers(family, tmp_path):
    eager, ours = pair(family)
    eager.save_pretrained(tmp_path / "eager")
    ours.save_pretrained(tmp_path / "ours")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "ours" / file).read_bytes() == (tmp_path / "eager" / file).read_bytes(), file
    words = {"experts_implementation": "dmoe"} if family == "mixtral" else {}
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", **words)
    if family == "llama4":
        on_transformers.use(again)
    assert torch.equal(hf_families.run(again), hf_families.run(ours))
    assert_near(hf_families.run(again), hf_families.run(eager))


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_offloaded_to_disk(family, when, tmp_path):
    from accelerate import disk_offload
    from accelerate.hooks import remove_hook_from_module

    eager, ours = pair(family)
    with torch.no_grad():
        wanted = hf_families.run(eager)
    if when == "before":
        on_transformers.restore(ours)
    # Not all of Llama 4: its rotary embedding runs offloaded with no implementation of experts.
    disk_offload(ours.model.layers if family == "llama4" else ours, tmp_path)
    assert any(parameter.is_meta for parameter in ours.parameters())
    names = on_transformers.use(ours)
    with torch.no_grad():
        assert_near(hf_families.run(ours), wanted)
        assert on_transformers.restore(ours) == names
        assert torch.equal(hf_families.run(ours), wanted)
    on_transformers.use(ours)
    remove_hook_from_module(ours, recurse=True)
    on_transformers.restore(ours)
    assert not [n for n, m in ours.named_modules() if isinstance(vars(m).get("forward"), functools.partial)]


def train(model, folder, bf16):
    from transformers import Trainer, TrainingArguments

    ids = [hf_families.token_ids(seed=seed % 4)[0] for seed in range(40)]
    arguments = TrainingArguments(
        folder, max_steps=20, per_device_train_batch_size=2, learning_rate=2e-3, report_to=[], save_strategy="no",
        logging_steps=1, use_cpu=True, bf16=bf16, disable_tqdm=True, seed=0, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


@pytest.mark.parametrize(
    ("family", "bf16", "tolerance"), [("mixtral", False, 1e-5), ("gpt_oss", False, 1e-5), ("mixtral", True, 2e-3)]
)
def test_trainer_takes_the_same_20_steps(family, bf16, tolerance, tmp_path):
    eager, ours = pair(family)
    torch.use_deterministic_algorithms(False)
    wanted, found = (train(model, str(tmp_path), bf16) for model in (eager, ours))
    assert len(found) == 20
    assert found[-1] < found[0]
    assert (found - wanted).abs().max() <= tolerance * wanted.max()


def block_of(family):
    """What holds the experts of a model's last layer, and what it is called with."""
    _, ours = pair(family)
    experts = list(hf_families.experts_of(ours).values())
    torch.manual_seed(0)
    x = torch.randn(2, 9, hf_families.HIDDEN)
    if not experts:
        return ours.model.layers[-1].feed_forward, (x,)
    x, index, gates = x[0], torch.rand(9, hf_families.EXPERTS).argsort(1)[:, :2], torch.rand(9, 2)
    return experts[-1], (x.requires_grad_(), index, gates)


def first_of(result):
    return result[0] if isinstance(result, tuple) else result


# PyTorch 2.11's compiler takes no module as an argument of what it calls while it traces, as the gate's probe is.
traced_calls = pytest.mark.skipif(torch.__version__ < (2, 13), reason="tracing the word needs PyTorch 2.13")


@traced_calls
@pytest.mark.parametrize("family", [*MODELS, "inkling2", "muse_spark"])
def test_one_graph_that_is_compiled_once_from_the_first_call_on(family):
    from torch._dynamo.utils import counters

    block, (x, *routing) = block_of(family)
    gates._known.clear()  # the traced call is the one that recognises the gate
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for turn in range(3):
        routing[:1] = [index.roll(turn, 0) for index in routing[:1]]
        results = []
        for computing in (compiled, block):
            block.zero_grad()
            y = first_of(computing(x, *routing))
            y.square().mean().backward()
            results.append((y.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)))
        for one, other in zip(*results, strict=True):
            assert_near(one, other)
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("family", "strict"), [pytest.param("gpt_oss", True, marks=traced_calls), ("muse_spark", False), ("llama4", False)]
)
def test_export(family, strict):
    block, (x, *routing) = block_of(family)
    gates._known.clear()
    program = torch.export.export(block, (x, *routing), strict=strict)
    assert torch.equal(first_of(program.module()(2 * x, *routing)), first_of(block(2 * x, *routing)))
    assert any("dmoe" in str(node.target) for node in program.graph.nodes)


@traced_calls
def test_a_whole_model_is_one_graph():
    _, ours = pair("mixtral")
    compiled = torch.compile(ours, fullgraph=True, backend="eager")
    with torch.no_grad():
        assert_near(hf_families.run(compiled), hf_families.run(ours))


@pytest.mark.parametrize("family", ["mixtral", "llama4"])
def test_peft_adapts_the_experts_as_it_does_with_eager(family):
    from peft import LoraConfig, get_peft_model

    eager, ours = pair(family)
    lora = LoraConfig(r=4, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    results = []
    for model in (eager, ours):
        torch.manual_seed(0)
        adapted = get_peft_model(model, lora)
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        y = hf_families.run(adapted)
        y.square().mean().backward()
        results.append((y.detach(), *(p.grad for p in adapted.parameters() if p.grad is not None)))
    assert len(results[0]) == len(results[1]) > 4
    for one, other in zip(*results, strict=True):
        assert_near(other, one)
    assert on_transformers.use(adapted), "and behind PEFT"
