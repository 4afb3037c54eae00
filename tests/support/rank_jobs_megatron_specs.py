"""What a process is told to do about specs: what is in them, and what a model built from them computes."""

from __future__ import annotations

import contextlib
import functools
from unittest.mock import patch

import rank_jobs_megatron as jobs
import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel, gpt_layer_specs
from megatron.core.models.gpt import experimental_attention_variant_module_specs as variants
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron_cases import Case

from dmoe.integrations import megatron as integration


def _name(part):
    """The class that a part of a spec builds."""
    part = part.func if isinstance(part, functools.partial) else part
    part = getattr(part, "__self__", part)  # 0.19: a class's as_mlp_submodule
    return getattr(getattr(part, "module", part), "__name__", str(part))


def _parts(submodules):
    return _name(submodules.self_attention), _name(submodules.mlp)


@contextlib.contextmanager
def _as_if_transformer_engine_were_here():
    """Only names of classes are looked at: no such layer is built."""
    with contextlib.ExitStack() as stack:
        for module in (variants, gpt_layer_specs):
            stack.enter_context(patch.object(module, "HAVE_TE", True))
            stack.enter_context(patch.object(module, "TESpecProvider", LocalSpecProvider, create=True))
            stack.enter_context(patch.object(module, "TENorm", torch.nn.LayerNorm, create=True))
        yield


def parts_with_a_variant_of_attention(group, ranks, fields, store):
    """``(attention, mlp)`` of each layer: Megatron's own, dmoe's block, and what each constant spec's layers take."""
    jobs.connect(ranks, store)
    config = jobs.config_of(Case(ranks, fields))
    with _as_if_transformer_engine_were_here():
        native = variants.get_transformer_block_with_experimental_attention_variant_spec(config)
        found = {
            "native": [_parts(layer.submodules) for layer in native.layer_specs],
            "dmoe": [_parts(layer.submodules) for layer in integration.dmoe_block_spec(config).layer_specs],
        }
        for name in ("dmoe_gpt_spec", "dmoe_experts_spec"):
            found[name] = _parts_taken(getattr(integration, name).module, config)
    return found


def _parts_taken(layer, config):
    """What a class of layers builds of a model, layer by layer."""
    taken = []
    with patch.object(TransformerLayer, "__init__", lambda self, config, parts, *a, **k: taken.append(_parts(parts))):
        for number in range(config.num_layers):
            layer(config, layer_number=number + 1)
    return taken


def told_without_transformer_engine(group, ranks, fields, store):
    jobs.connect(ranks, store)
    try:
        integration.dmoe_block_spec(jobs.config_of(Case(ranks, fields)))
    except ValueError as error:
        return str(error)
    return None


def exchanged_in_a_stack(group, ranks, nothing, store):
    """MoE layers of Mamba's stack, and what else became of it."""
    from megatron.core.ssm import mamba_block

    jobs.connect(ranks, store)
    config = jobs.config_of(Case(ranks))
    layer = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False).layer_specs[0]
    stack = getattr(mamba_block, "MambaStack", None) or mamba_block.HybridStack
    submodules = getattr(mamba_block, "MambaStackSubmodules", None) or mamba_block.HybridStackSubmodules
    spec = ModuleSpec(module=stack, submodules=submodules(moe_layer=layer, attention_layer=layer.submodules))
    whole, experts = integration.with_dmoe(spec), integration.with_dmoe_experts(spec)
    moe = experts.submodules.moe_layer.submodules.mlp
    moe = moe.keywords["submodules"] if isinstance(moe, functools.partial) else moe.submodules
    return {
        "whole": _name(whole.submodules.moe_layer.submodules.mlp),
        "experts": _name(moe.experts),
        "the same stack": whole.module is stack,
        "left as it is": whole.submodules.mamba_layer is spec.submodules.mamba_layer,
        "not in place": _name(layer.submodules.mlp) == "MoELayer",
    }


def _with_further_tokens(case, impl):
    """A GPT that predicts further tokens, every layer from one spec."""
    config = jobs.config_of(case)
    block = jobs.spec_of(config, "dmoe" if impl == "constant" else impl)
    return config, GPTModel(
        config=config,
        transformer_layer_spec=jobs.spec_of(config, impl),
        mtp_block_spec=gpt_layer_specs.get_gpt_mtp_block_spec(config, block, use_transformer_engine=False),
        vocab_size=jobs.VOCABULARY,
        max_sequence_length=jobs.LENGTH,
        position_embedding_type="rope",
    )


def further_tokens(group, ranks, impls, store):
    """Loss, and norm of the gradients, of each implementation on the same values."""
    jobs.connect(ranks, store)
    case = Case(ranks, {"mtp_num_layers": 1, "moe_aux_loss_coeff": 1.0})
    native = _with_further_tokens(case, "native")[1]
    found = {}
    for impl in impls:
        config, model = _with_further_tokens(case, impl)
        layout = {"native": "sequential", "experts": "dmoe_experts"}.get(impl, "dmoe")
        model.load_state_dict(integration.convert_state(native.state_dict(), layout), strict=True)
        tokens = next(jobs.batches(config))
        position = torch.arange(jobs.LENGTH).expand(jobs.MICRO_BATCH, -1)
        mask = torch.ones(1, 1, jobs.LENGTH, jobs.LENGTH).triu(1).bool()
        inputs, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        counted = torch.ones(jobs.MICRO_BATCH, jobs.LENGTH)
        loss = model(inputs, position, mask, labels=labels, loss_mask=counted).mean()
        loss.backward()
        norms = [parameter.grad.norm() for parameter in model.parameters() if parameter.grad is not None]
        layers = [type(module).__name__ for module in model.modules()]
        found[impl] = (float(loss), float(torch.stack(norms).norm()), layers.count("DmoeLayer"))
    return found
