"""MoE blocks of Transformers from tiny models of their families, and what they compute, under their own names."""

from __future__ import annotations

import copy
import functools
import importlib
import re
from pathlib import Path

import pytest
import torch
import transformers
from hf_families import shrunk, tiny_model
from torch import nn

from dmoe.integrations.transformers.block_module import MoEBlock
from dmoe.integrations.transformers.versions import check_version

MODELS = Path(transformers.__file__).parent / "models"
# Families whose choices, of 8 experts, are made inside groups.
GROUPED = ("DeepseekV3MoE", "DeepseekV2Moe", "Mistral4MoE", "MistralLarge4TextMoE", "Glm4MoeMoE", "Dots1MoE")
_GROUPS = {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy"}
_EIGHT = dict.fromkeys(("n_routed_experts", "num_local_experts", "num_experts"), 8)
# What a block needs besides, or its config, where no model of text has one.
_GIVEN = {
    "Cohere2MoeSparseMoeBlock": {"shared_expert_combination_strategy": "sum"},
    "DeepseekV4SparseMoeBlock": {"mlp_layer_types": ["moe", "moe"]},
    "LagunaSparseMoeBlock": {"moe_router_logit_softcapping": 2.0},
}
# Blocks that no model of text has: their config, what it needs besides, and the block's other arguments.
_ALONE = {
    "Qwen3OmniMoeTalkerTextSparseMoeBlock": (
        "Qwen3OmniMoeTalkerTextConfig", {"shared_expert_intermediate_size": 24, "norm_topk_prob": True}, (),
    ),
    "Dots3NoteVisionMoE": ("Dots3NoteVisionConfig", {"pyramid_num_routed": [4, 4], "adapter_in_dim": 32}, (0,)),
}  # fmt: skip


@functools.cache
def home_of(block):
    """The package of transformers.models that defines a class; None where this release has none of that name."""
    defined = re.compile(rf"^class {block}\(", re.MULTILINE)
    found = [file.parent.name for file in MODELS.glob("*/modeling_*.py") if defined.search(file.read_text())]
    return found[0] if found else None


def tiny_block(block, **given):
    """A block with random weights and biases, float32, eval mode, E = 4 (8 in groups), K = 2 (3), H = 32."""
    home = home_of(block)
    kind = getattr(importlib.import_module(f"transformers.models.{home}.modeling_{home}"), block)
    given = {**_GIVEN.get(block, {}), **({**_GROUPS, **_EIGHT} if block in GROUPED else {}), **given}
    if block in _ALONE:
        name, more, arguments = _ALONE[block]
        config = getattr(importlib.import_module(f"transformers.models.{home}.configuration_{home}"), name)
        config = config(**shrunk(config), **more)
        config._experts_implementation = "eager"
        made = _drawn(kind(config, *arguments).eval())
    else:
        model = tiny(home, **given)
        made = next(module for module in model.modules() if type(module) is kind)
    return with_biases(made)


def tiny(family, **given):
    """:func:`hf_families.tiny_model`, or Llama 4; skips the test in a release without such a model."""
    if family == "llama4":
        return with_biases(_tiny_llama4())
    try:
        return with_biases(tiny_model(family, **given))
    except AssertionError as error:
        if check_version() >= (5, 24):
            raise
        pytest.skip(str(error)[:200])


def _tiny_llama4():
    """A model of Llama 4, which is not on the experts interface; K = 2, every layer with experts."""
    config = transformers.Llama4TextConfig
    small = shrunk(
        config, intermediate_size_mlp=24, interleave_moe_layer_step=1, no_rope_layers=[1, 0], moe_layers=[0, 1]
    )
    torch.manual_seed(0)
    return _drawn(transformers.Llama4ForCausalLM(config(**small)).eval())


def _drawn(model):
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def with_biases(model):
    """Biases that choose and biases that add, which models begin with at zero, are drawn."""
    torch.manual_seed(1)
    for name, tensor in (*model.named_buffers(), *model.named_parameters()):
        if name.endswith(("correction_bias", "expert_bias", "router.bias", "_proj_bias")):
            tensor.data.normal_(0, 0.3)
    return model


def results(model, call):
    """What a call returns, and the gradients of its first output times fixed numbers, under Hugging Face's names.

    Args:
        model: or a block, with or without dmoe's blocks.
        call: a function without arguments, to a tensor or a tuple of tensors.
    """
    model.zero_grad()
    found = call()
    found = found if isinstance(found, tuple) else (found,)
    numbers = torch.randn(found[0].shape, generator=torch.Generator().manual_seed(2))
    (found[0].float() * numbers).sum().backward()
    outputs = {f"output {number}": tensor.detach() for number, tensor in enumerate(found)}
    return outputs, gradients(model)


def gradients(model):
    """Gradients by Hugging Face's names."""
    found, inside = {}, set()
    for name, module in model.named_modules():
        if isinstance(module, MoEBlock):
            prefix = f"{name}." if name else ""
            grads = {own: parameter.grad for own, parameter in module.moe.named_parameters()}
            inside |= {f"{prefix}moe.{own}" for own in grads}
            for weight in module.weights:
                if grads.get(weight.ours) is not None:
                    parts = weight.to_theirs(grads[weight.ours])
                    found |= {prefix + theirs: part for theirs, part in zip(weight.theirs, parts, strict=True)}
    for name, parameter in model.named_parameters():
        if name not in inside and parameter.grad is not None:
            found[name] = parameter.grad
    return {name: grad.clone() for name, grad in found.items()}


def assert_near(found, expected, tolerance):
    """Equal names; each tensor's largest difference relative to its largest number."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    far = {}
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        error = (found[name].double() - tensor.double()).abs().max() / tensor.abs().max().clamp(min=1e-30)
        if not error <= tolerance:
            far[name] = error.item()
    assert not far, far


def saved(model):
    """A copy of the state."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found, expected):
    """The same names in the same order, and the same bits."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def holding(block):
    """A model that is a copy of this block and nothing else."""
    return nn.ModuleDict({"mlp": copy.deepcopy(block)})
