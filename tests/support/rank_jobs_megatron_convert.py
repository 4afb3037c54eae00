"""What a process is told to do about converted states: load them into real modules of Megatron's, and run those."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import types

import torch
import torch.nn.functional as F
from megatron_cases import Case, Ranks
from rank_jobs_megatron import (  # before Megatron: it lets that run on the CPU
    LENGTH,
    MICRO_BATCH,
    VOCABULARY,
    build,
    config_of,
    connect,
    values,
)

from megatron.core.transformer.moe import moe_utils  # isort: skip

PLAIN = {"gated_linear_unit": False, "activation_func": F.gelu}
CASES = {
    "gated": {},
    "plain": PLAIN,
    "biases": {**PLAIN, "add_bias_linear": True},
    "gated biases": {"add_bias_linear": True},
    "shared": {"moe_shared_expert_intermediate_size": 24, "moe_shared_expert_gate": True},
    "sigmoid": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "every other layer": {"moe_layer_freq": [1, 0]},
}


def _filled(model):
    """Every parameter and saved buffer random, biases and norms included."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if torch.is_tensor(tensor):
                tensor.copy_(values(tensor.shape, name) * (0.5 if "router" in name else 0.2))
    return model


def _losses(model):
    tokens = torch.arange(MICRO_BATCH * (LENGTH + 1)).view(MICRO_BATCH, -1) * 7 % VOCABULARY
    position = torch.arange(LENGTH).unsqueeze(0).expand(MICRO_BATCH, -1)
    attention = torch.ones(1, 1, LENGTH, LENGTH).triu(1).bool()
    with torch.no_grad():
        return model(tokens[:, :-1].contiguous(), position, attention, labels=tokens[:, 1:].contiguous())


def _tensors(state):
    return {name: value for name, value in state.items() if torch.is_tensor(value)}


def through_models(group, name, store):
    """Two GPTs, native and dmoe's (whole layers, and experts alone), on the same converted values."""
    from dmoe.integrations.megatron import convert_state

    connect(Ranks(), store)
    case = Case(config=CASES[name])
    native = _filled(build(case, "native")[1])
    state, expected = native.state_dict(), _losses(native)
    report = {}
    for impl, layout in (("dmoe", "dmoe"), ("experts", "dmoe_experts")):
        mine = build(case, impl)[1]
        converted = convert_state(state, layout)
        mine.load_state_dict(converted, strict=True)
        back = convert_state(mine.state_dict(), "sequential")
        fresh = build(case, "native")[1]
        fresh.load_state_dict(back, strict=True)
        again = _tensors(back)
        report[layout] = {
            "error": float((_losses(mine) - expected).abs().max()),
            "same names": list(again) == list(_tensors(state)),
            "same values": all(torch.equal(again[key], value) for key, value in _tensors(state).items()),
            "native again": bool(torch.equal(_losses(fresh), expected)),
        }
    return report | {"scale": float(expected.abs().max())}


def through_checkpoint(group, name, folder, store):
    """A file of a native GPT, with Megatron's args in it: its layers as dmoe.MoE, and the file again."""
    from dmoe.checkpoint import load_layers
    from dmoe.checkpoint.__main__ import main

    connect(Ranks(), store)
    native = _filled(build(Case(config=CASES[name]), "native")[1])
    config, state = native.config, _tensors(native.state_dict())
    args = argparse.Namespace(
        moe_router_topk=config.moe_router_topk,
        moe_router_score_function=config.moe_router_score_function,
        moe_router_pre_softmax=config.moe_router_pre_softmax,
        moe_router_topk_scaling_factor=config.moe_router_topk_scaling_factor,
        swiglu=config.gated_linear_unit,
    )
    torch.save({"model": state, "args": args, "iteration": 5}, f"{folder}/theirs.pt")
    there = main(["convert", f"{folder}/theirs.pt", f"{folder}/ours", "--to", "dmoe"])
    back = main(["convert", f"{folder}/ours", f"{folder}/back.pt", "--to", "megatron-sequential"])
    found = torch.load(f"{folder}/back.pt", weights_only=False)
    report = {
        "statuses": [there, back],
        "same names": list(found["model"]) == list(state),
        "same values": all(torch.equal(found["model"][key], value) for key, value in state.items()),
        "beside": found["args"] == args and found["iteration"] == 5,
        "layers": {},
    }
    for layer, moe in load_layers(f"{folder}/ours").items():
        theirs = native.get_submodule(layer).eval()
        x = values((7, 2, config.hidden_size), layer)
        with torch.no_grad():
            expected, ours = theirs(x)[0], moe(x)
        report["layers"][layer] = float((ours - expected).abs().max() / expected.abs().max())
    return report


def _loop_gmm(x, weights, counts, trans_b=False):
    """What the grouped_gemm package computes, one product after the other."""
    parts = x.split([int(count) for count in counts])
    return torch.cat([part @ (weight.t() if trans_b else weight) for part, weight in zip(parts, weights, strict=True)])


def through_grouped_mlp(group, gated, store):
    """Megatron's GroupedMLP itself, whose parameters are in a layout of their own; None where it is gone."""
    from dmoe.integrations.megatron import DmoeExperts, convert_state

    try:
        from megatron.core.transformer.moe import grouped_gemm_util
        from megatron.core.transformer.moe.experts import GroupedMLP
    except ImportError:
        return None
    connect(Ranks(), store)
    config = config_of(Case(config={} if gated else PLAIN))
    groups, experts = moe_utils.get_default_pg_collection(), config.num_moe_experts
    grouped_gemm_util.grouped_gemm = grouped_gemm_util.ops = types.SimpleNamespace(gmm=_loop_gmm)
    native = _filled(GroupedMLP(experts, config, pg_collection=groups))
    mine = DmoeExperts(experts, config, pg_collection=groups)
    state = {f"experts.{name}": tensor for name, tensor in _tensors(native.state_dict()).items()}
    converted = convert_state(state, "dmoe_experts", num_experts=experts)
    mine.load_state_dict({name.removeprefix("experts."): tensor for name, tensor in converted.items()})
    counts = torch.tensor([3, 0, 5, 1, 0, 4, 2, 6])
    x, probs = values((int(counts.sum()), config.hidden_size), "x"), values((int(counts.sum()),), "p").abs()
    config.bf16 = True  # its forward insists, and computes in the dtype of what it is given
    expected = native(x, counts, probs)[0]
    config.bf16 = False
    back = convert_state(converted, "grouped")
    return {
        "error": float((mine(x, counts, probs)[0] - expected).abs().max()),
        "scale": float(expected.abs().max()),
        "same": list(back) == list(state) and all(torch.equal(back[key], state[key]) for key in state),
    }


def through_megablocks(group, gated, biased, store):
    """dmoe's layer in Megatron on a state of MegaBlocks' fork, against MegaBlocks' formula written out."""
    from dmoe.integrations.megatron import DmoeLayer, convert_state

    connect(Ranks(), store)
    top_1 = {"moe_router_topk": 1, "moe_router_pre_softmax": True, "add_bias_linear": biased}
    config = config_of(Case(config=top_1 if gated else top_1 | PLAIN))
    E, H, W = config.num_moe_experts, config.hidden_size, config.moe_ffn_hidden_size
    names = ("w1", "v1", "w2") if gated else ("w1", "w2")
    state = {f"experts.mlp.{name}": values((E * W, H), name) * 0.2 for name in names}
    state["router.layer.weight"] = values((E, H), "router")
    if biased:
        state["experts.bias"] = values((H,), "bias")
    options = {} if gated else {"activation": "gelu_tanh"}
    layer = DmoeLayer(config, options=options | ({"bias": "output"} if biased else {})).eval()
    layer.load_state_dict(convert_state(state, "dmoe"), strict=True)
    x = values((5, 3, H), "x")
    tokens = x.view(-1, H)
    scores = (tokens @ state["router.layer.weight"].t()).softmax(-1)
    weight, chosen = scores.max(-1)
    w1, w2 = (state[f"experts.mlp.{name}"].view(E, W, H)[chosen] for name in ("w1", "w2"))
    hidden = torch.einsum("th,tfh->tf", tokens, w1)
    if gated:
        v1 = state["experts.mlp.v1"].view(E, W, H)[chosen]
        hidden = F.silu(hidden) * torch.einsum("th,tfh->tf", tokens, v1)
    else:
        hidden = F.gelu(hidden, approximate="tanh")
    expected = torch.einsum("tf,tfh->th", hidden, w2) * weight.unsqueeze(-1)
    expected = expected + state["experts.bias"] if biased else expected
    sharded = layer.sharded_state_dict("mlp.")
    keys = {part.key for part in sharded.values() if hasattr(part, "key")}
    y = layer(x)[0].view(-1, H)
    return {"error": float((y - expected).abs().max()), "scale": float(expected.abs().max()), "keys": sorted(keys)}


def options_of_the_command_line(group, store):
    """A model from the constant spec that `--spec` names, while a training loop of Megatron's holds arguments."""
    connect(Ranks(), store)
    args = types.SimpleNamespace(moe_dmoe_overlap_degree=2, moe_dmoe_drop_order="choice_major")
    sys.modules["megatron.training"] = types.SimpleNamespace(get_args=lambda: args)
    try:
        model = build(Case(), "constant")[1]
    finally:
        del sys.modules["megatron.training"]
    found = [layer.mlp.moe.config for layer in model.decoder.layers]
    plain = build(Case(), "constant")[1].decoder.layers[0].mlp.moe.config
    return [dataclasses.replace(config, overlap_degree=1, drop_order=plain.drop_order) == plain for config in found], [
        (config.overlap_degree, config.drop_order) for config in found
    ]
