"""MegaBlocks' layers as loops over tokens, from checkpoints in its names and shapes, and layers drawn for them."""

from __future__ import annotations

import copy
from functools import partial

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from megablocks_cases import arguments
from torch import nn

from dmoe.compat import megablocks
from dmoe.compat.megablocks.layers.arguments import DEFAULT_ACTIVATION_FN


def layer_with(kind, **options):
    """``MoE`` or ``dMoE`` as users make it, and its arguments."""
    args = arguments(**options)
    return (megablocks.MoE if kind == "MoE" else megablocks.dMoE)(args), args


def is_moe(layer):
    return type(layer) is megablocks.MoE


# ---- Token by token, from a checkpoint. What follows, but for the strategy, uses nothing of dmoe.


def expert(state, e, token, args, capacity_form):
    """One token (H,) through expert e, read out of w1, v1 and w2 as MegaBlocks stores them."""
    width = args.ffn_hidden_size
    w1, w2 = state["experts.mlp.w1"], state["experts.mlp.w2"]
    if capacity_form:  # (E, H, F) and (E, F, H)
        return args.activation_fn(token @ w1[e]) @ w2[e]
    rows = slice(e * width, (e + 1) * width)  # (E * F, H)
    hidden = args.activation_fn(w1[rows] @ token)
    if args.mlp_type == "glu":
        hidden = hidden * (state["experts.mlp.v1"][rows] @ token)
    return hidden @ w2[rows]


def choose(scores, args):
    """Ids (T, K) and weights (T, K) of each token's choices."""
    tokens, top_k = scores.shape[0], args.moe_top_k
    chosen = [sorted(range(args.moe_num_experts), key=lambda e: -row[e])[:top_k] for row in scores.detach().tolist()]
    weights = scores.gather(1, torch.tensor(chosen).view(tokens, top_k).long())
    if args.moe_normalize_expert_weights:
        p = float(args.moe_normalize_expert_weights)
        weights = weights / (weights**p).sum(1, keepdim=True) ** (1 / p)
    if args.uniform_expert_assignment:
        chosen = [[(t * top_k + k) % args.moe_num_experts for k in range(top_k)] for t in range(tokens)]
    return chosen, weights


def experts_by_loops(state, tokens, chosen, weights, args, capacity_form):
    """Weighted sums (T, H) and the number of assignments of each expert, with MegaBlocks' capacity and drop order."""
    counts = [sum(row.count(e) for row in chosen) for e in range(args.moe_num_experts)]
    limit = max(counts, default=0)
    if capacity_form:
        share = args.moe_top_k * tokens.shape[0] / args.moe_num_experts
        limit = int(args.moe_capacity_factor * share) or limit
    used, rows = [0] * args.moe_num_experts, []
    for t, token in enumerate(tokens):
        total = torch.zeros(tokens.shape[1], dtype=weights.dtype)
        for k, e in enumerate(chosen[t]):
            used[e] += 1
            if used[e] <= limit:
                total = total + weights[t, k] * expert(state, e, token, args, capacity_form)
        rows.append(total)
    out = torch.stack(rows).to(tokens.dtype) if rows else tokens * 0
    return out, counts


def layer_by_loops(state, x, args, capacity_form):
    """(output with the bias added, scores, counts, router logits)."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = tokens @ state["router.layer.weight"].T
    scores = torch.softmax(logits, -1)
    chosen, weights = choose(scores, args)
    out, counts = experts_by_loops(state, tokens, chosen, weights, args, capacity_form)
    if args.bias:
        out = out + state["experts.bias"]
    if args.shared_expert:
        linear = {
            name: (state[f"shared_expert.{name}.weight"], state.get(f"shared_expert.{name}.bias"))
            for name in ("up_proj", "down_proj", "gate_proj")
            if f"shared_expert.{name}.weight" in state
        }
        hidden = F.linear(tokens, *linear["up_proj"])
        if args.mlp_type == "glu":
            hidden = hidden * args.activation_fn(F.linear(tokens, *linear["gate_proj"]))
        else:
            hidden = args.activation_fn(hidden)
        shared = F.linear(hidden, *linear["down_proj"])
        if args.shared_expert_weighted_sum:
            share = 1 / (args.moe_top_k + 1)
            out, shared = out * (1 - share), shared * share
        out = out + shared
    return out.view(x.shape), scores, counts, logits


ACTIVATIONS = {
    "default": DEFAULT_ACTIVATION_FN,
    "gelu": F.gelu,
    "silu": F.silu,
    "relu": nn.ReLU(),
    "unknown": lambda x: torch.sin(x) + x,
}


@st.composite
def layers(draw):
    kind = draw(st.sampled_from(["MoE", "dMoE"]))
    experts = draw(st.integers(1, 5))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    shared = draw(st.booleans())
    layer, args = layer_with(
        kind,
        hidden_size=draw(st.integers(1, 7)),
        ffn_hidden_size=draw(st.integers(1, 9)),
        moe_num_experts=experts,
        moe_top_k=draw(st.integers(1, experts)),
        moe_capacity_factor=draw(st.sampled_from([0, 0.4, 1, 1.1, 2])),
        moe_normalize_expert_weights=draw(st.sampled_from([None, 0, 1, 2, 3.5])),
        mlp_type="mlp" if kind == "MoE" else draw(st.sampled_from(["mlp", "glu"])),
        mlp_impl=draw(st.sampled_from(["grouped", "sparse"])),
        memory_optimized_mlp=draw(st.booleans()),
        bias=draw(st.booleans()),
        return_bias=draw(st.booleans()),
        uniform_expert_assignment=draw(st.booleans()),
        activation_fn=ACTIVATIONS[draw(st.sampled_from(sorted(ACTIVATIONS)))],
        shared_expert=shared,
        shared_expert_weighted_sum=draw(st.booleans()),
        shared_expert_hidden_size=draw(st.sampled_from([None, 5])),
        moe_zloss_weight=draw(st.sampled_from([0, 0.3])),
        init_method=partial(nn.init.normal_, std=0.7),
        output_layer_init_method=partial(nn.init.normal_, std=0.5),
    )
    layer = layer.double()
    if args.bias:
        nn.init.normal_(layer.experts.bias)
    leading = draw(st.sampled_from([(0, 3), (1, 1), (4, 3), (7, 2), (5,), (2, 2, 3)]))
    x = torch.randn(*leading, 2 * args.hidden_size, dtype=torch.float64)[..., 1::2]
    return layer, args, x.detach()


def bias_added(result, args):
    """The layer's result as one tensor, after a look at its form."""
    if not (args.bias and args.return_bias):
        return result
    out, bias = result
    return out + bias


def leaves(layer):
    return {name: tensor.clone().requires_grad_() for name, tensor in layer.state_dict().items()}


def grads_as_checkpoint(layer):
    """The parameters' gradients, in the names and shapes of a checkpoint."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for to, parameter in zip(twin.parameters(), layer.parameters(), strict=True):
            to.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    return twin.state_dict()
