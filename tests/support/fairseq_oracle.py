"""The branch's gate and the log line's figures, token by token in Python, from the formulas of its papers and page."""

from __future__ import annotations

import math


def softmax(row):
    top = max(row)
    powers = [math.exp(value - top) for value in row]
    return [power / sum(powers) for power in powers]


def gate(
    logits,
    capacity,
    *,
    top_k=2,
    before=False,
    by_gate=False,
    padding=None,
    uniform=None,
):
    """Who is kept, with what weight, and what is logged.

    Args:
        logits: rows of numbers.
        capacity: rows of an expert, or None.
        top_k: 1 or 2.
        before: the two gates share 1 before the drop.
        by_gate: tokens with a large first gate come first.
        padding: which tokens are padding.
        uniform: one draw of U(0, 1) per token for the policy 'random'.
    """
    tokens, experts = len(logits), len(logits[0])
    padding = padding or [False] * tokens
    probs = [softmax(row) for row in logits]
    ranked = [sorted(range(experts), key=lambda e, p=p: (-p[e], e))[:top_k] for p in probs]
    gates = [[p[e] for e in ranks] for p, ranks in zip(probs, ranked, strict=True)]
    if before and top_k == 2:
        gates = [[g / sum(pair) for g in pair] for pair in gates]
    asked = [[not padding[t]] * top_k for t in range(tokens)]
    if uniform is not None:
        for t in range(tokens):
            asked[t][1] = asked[t][1] and 2 * gates[t][1] > uniform[t]
    order = list(range(tokens))
    if by_gate:
        order.sort(key=lambda t: -max(probs[t]))
    used, kept = [0] * experts, [[False] * top_k for _ in range(tokens)]
    for k in range(top_k):
        for t in order:
            if asked[t][k]:
                expert = ranked[t][k]
                kept[t][k] = capacity is None or used[expert] < capacity
                used[expert] += 1
    weights = [[0.0] * experts for _ in range(tokens)]
    for t in range(tokens):
        alive = [g * k for g, k in zip(gates[t], kept[t], strict=True)]
        total = sum(alive) if top_k == 2 and not before else 1.0
        for expert, g in zip(ranked[t], alive, strict=True):
            weights[t][expert] = g / total if total else 0.0

    mean = [sum(p[e] for p in probs) / tokens for e in range(experts)]
    share = [sum(asked[t][0] and ranked[t][0] == e for t in range(tokens)) / tokens for e in range(experts)]
    figures = {
        "gate_loss": experts * sum(m * s for m, s in zip(mean, share, strict=True)),
        "entropy_gating": -sum(p * math.log(p) for row in probs for p in row) / tokens,
    }
    sample = max(math.ceil(0.2 * experts), 1)
    for k in range(2):
        name = str(k + 1)
        if k >= top_k:
            names = ("overflow_expert{}", "expert{}_balance_top", "expert{}_balance_bottom", "unused_expert{}_count")
            figures |= {each.format(name): 0.0 for each in names}
            continue
        counts = sorted((sum(r[k] == e for r in ranked) for e in range(experts)), reverse=True)
        wanted = sum(a[k] for a in asked)
        lost = sum(a[k] and not b[k] for a, b in zip(asked, kept, strict=True))
        figures["overflow_expert" + name] = 100 * lost / max(wanted, 1)
        figures[f"expert{name}_balance_top"] = 100 * sum(counts[:sample]) / tokens
        figures[f"expert{name}_balance_bottom"] = 100 * sum(counts[-sample:]) / tokens
        figures[f"unused_expert{name}_count"] = float(counts.count(0))
    rows = [
        sorted(t for t in range(tokens) for k in range(top_k) if kept[t][k] and ranked[t][k] == e)
        for e in range(experts)
    ]
    return rows, weights, figures
