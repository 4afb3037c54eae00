"""An independent meaning of the layer: one token after the other, one expert after the other. Imports nothing of dmoe.

Given float64 tensors it is the truth the layer is held to; given narrower ones it is "plain PyTorch", whose own
rounding error is the yardstick. Gradients come from autograd over these loops.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

ACT = {
    "silu": F.silu,
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x) ** 2,
    "sigmoid": torch.sigmoid,
    # Not dmoe's: functions that tests give it.
    "mish": F.mish,
    "log of size": lambda x: torch.log(x.abs()),
    "two poles": lambda x: torch.log(x.abs()) + 1 / (x - 0.5),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


def clamped_swiglu(gate, up, limit, alpha, up_offset):
    """GPT-OSS's with 7, 1.702, 1; DeepSeek-V4's with 10, 1, 0."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + up_offset) * (gate * torch.sigmoid(gate * alpha))


def softcapped_swiglu(gate, up, gate_cap, up_cap):
    """Inkling-2's."""
    return torch.tanh(gate / gate_cap) * gate_cap * torch.sigmoid(gate) * (torch.tanh(up / up_cap) * up_cap)


GATED = {"clamped_swiglu": clamped_swiglu, "softcapped_swiglu": softcapped_swiglu}


def gated_hidden(activation, gate, up):
    """What an activation, written as the operation takes it, makes of gate and up."""
    name, _, numbers = activation.partition("(")
    if not numbers:
        return ACT[name](gate) * up
    wide = torch.float64 if gate.dtype == torch.float64 else torch.float32  # rounded once, like dmoe's
    numbers = [float(number) for number in numbers.removesuffix(")").split(",")]
    return GATED[name](gate.to(wide), up.to(wide), *numbers).to(gate.dtype)


def expert_forward(x, up, down, up_bias, down_bias, *, activation, gated, hidden_scale=None):
    """One token (H,) through one expert: up is (2, F, H) or (F, H), down (H, F)."""
    if gated:
        gate, value = up[0] @ x, up[1] @ x
        if up_bias is not None:
            gate, value = gate + up_bias[0], value + up_bias[1]
        hidden = gated_hidden(activation, gate, value)
    else:
        value = up @ x
        hidden = ACT[activation](value if up_bias is None else value + up_bias)
    if hidden_scale is not None:
        hidden = (hidden * hidden_scale).to(down.dtype)
    out = down @ hidden
    return out if down_bias is None else out + down_bias


def pick_expert(weights, expert, ffn_sizes):
    """One expert's (up, down, up_bias, down_bias) out of stacked or packed parameters."""
    up, down, up_bias, down_bias = weights
    if ffn_sizes:
        start = sum(ffn_sizes[:expert])
        cols = slice(start, start + ffn_sizes[expert])
        up, down = up[..., cols, :], down[:, cols]
        up_bias = None if up_bias is None else up_bias[..., cols]
    else:
        up, down = up[expert], down[expert]
        up_bias = None if up_bias is None else up_bias[expert]
    return up, down, up_bias, None if down_bias is None else down_bias[expert]


def moe(x, indices, gates, kept, weights, *, activation="silu", gated=True, gate_on="output", ffn_sizes=()):
    """y (T, H): sum over the kept choices of each token.

    indices, kept: lists of lists (T, K); gates: tensor (T, K); weights: (up, down, up_bias, down_bias).
    """
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros(x.shape[1], dtype=gates.dtype)
        for k, expert in enumerate(indices[t]):
            if not kept[t][k]:
                continue
            up, down, up_bias, down_bias = pick_expert(weights, expert, ffn_sizes)
            w, token = gates[t, k], x[t]
            if gate_on == "input":
                token = (token * w).to(x.dtype)
            out = expert_forward(
                token,
                up,
                down,
                up_bias,
                down_bias,
                activation=activation,
                gated=gated,
                hidden_scale=w if gate_on == "activation" else None,
            )
            total = total + (out * w if gate_on == "output" else out)
        rows.append(total.to(x.dtype))
    return torch.stack(rows) if rows else x * 0


def gate_weights(logits, indices, kept, *, score="softmax", p=None, after_drop=False, over_chosen=False, scale=1.0):
    """Gate weights (T, K) of the given choices; 0 where not kept. ``kept`` is None for a masked choice."""
    rows = []
    for t in range(logits.shape[0]):
        scores = torch.softmax(logits[t], 0) if score == "softmax" else torch.sigmoid(logits[t])
        chosen = [k for k, flag in enumerate(kept[t]) if flag is not None]
        if over_chosen and chosen:
            chosen_logits = torch.stack([logits[t, indices[t][k]] for k in chosen])
            values = dict(zip(chosen, torch.softmax(chosen_logits, 0), strict=True))
        else:
            values = {k: scores[indices[t][k]] for k in chosen}
        norm = 1.0
        if p is not None:
            counted = [values[k] for k in chosen if kept[t][k] or not after_drop]
            norm = torch.stack([v.abs() ** p for v in counted]).sum() ** (1 / p) if counted else 1.0
        zero = logits[t].sum() * 0
        rows.append(torch.stack([values[k] / norm * scale if kept[t][k] else zero for k in range(len(kept[t]))]))
    return torch.stack(rows) if rows else logits.new_zeros(0, len(indices[0]) if indices else 0)


def balance_loss(logits, indices, mask, num_experts, *, score="softmax", first_only=False):
    """E * sum_e f_e p_e over the tokens that count."""
    counts, total, seen = [0] * num_experts, logits.new_zeros(num_experts), 0
    for t in range(logits.shape[0]):
        if not mask[t]:
            continue
        seen += 1
        scores = torch.softmax(logits[t], 0) if score == "softmax" else torch.sigmoid(logits[t])
        total = total + scores / scores.sum()
        for expert in indices[t][:1] if first_only else indices[t]:
            counts[expert] += 1
    if not seen:
        return logits.sum() * 0
    share = torch.tensor([c / max(sum(counts), 1) for c in counts], dtype=logits.dtype)
    return num_experts * (share * total / seen).sum()


def z_loss(logits, mask):
    """Mean squared logsumexp over the tokens that count."""
    terms = [torch.logsumexp(logits[t], 0) ** 2 for t in range(logits.shape[0]) if mask[t]]
    return torch.stack(terms).mean() if terms else logits.sum() * 0


def keep_by_capacity(indices, num_experts, capacity, order, priority=None):
    """Which choices (T, K) get a row: None for a masked one, else True or False. Pure Python."""
    tokens, top_k = len(indices), len(indices[0]) if indices else 0
    token_order = list(range(tokens))
    if order == "batch_prioritized":
        token_order.sort(key=lambda t: -max(priority[t]))
    if order == "gate_weight":
        visits = sorted(((t, k) for t in range(tokens) for k in range(top_k)), key=lambda tk: -priority[tk[0]][tk[1]])
    elif order == "token_major":
        visits = [(t, k) for t in token_order for k in range(top_k)]
    else:
        visits = [(t, k) for k in range(top_k) for t in token_order]
    used, kept = [0] * num_experts, [[None] * top_k for _ in range(tokens)]
    for t, k in visits:
        expert = indices[t][k]
        if expert == num_experts:
            continue
        kept[t][k] = capacity is None or used[expert] < capacity
        used[expert] += 1
    return kept


def best_experts(scores, top_k, *, bias=None, num_groups=1, top_groups=None, group_score="top2_sum"):
    """Chosen experts (T, K) by plain sorting; ties to the lowest id."""
    out = []
    for row in scores:
        value = [s + (0.0 if bias is None else bias[e]) for e, s in enumerate(row)]
        allowed = set(range(len(value)))
        if top_groups is not None and top_groups < num_groups:
            size = len(value) // num_groups
            rank = []
            for g in range(num_groups):
                members = sorted(value[g * size : (g + 1) * size], reverse=True)
                rank.append(sum(members[: 2 if group_score == "top2_sum" else 1]))
            best = sorted(range(num_groups), key=lambda g: -rank[g])[:top_groups]
            allowed = {e for g in best for e in range(g * size, (g + 1) * size)}
        order = sorted(allowed, key=lambda e: (-value[e], e))
        out.append(order[:top_k])
    return out


def entropy(logits):
    """Mean entropy in nats of softmax(logits), pure Python."""
    total = 0.0
    for row in logits:
        top = max(row)
        exps = [math.exp(v - top) for v in row]
        probs = [e / sum(exps) for e in exps]
        total -= sum(p * math.log(p) for p in probs if p > 0)
    return total / max(len(logits), 1)
