"""A small model of two mixtures, and what a loop over its tokens says that they did."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dmoe import MoE, ResidualMoE
from dmoe.monitoring import Limits

H, VOCABULARY = 8, 11
QUIET = Limits(dead_steps=10**9, collapse=2, certain=-1, undecided=2, dropped_share=2, logits_growth=1e9)
FIELDS = {"hidden_size": H, "ffn_hidden_size": 8, "top_k": 2}


class TwoMixtures(nn.Module):
    """Token ids to hidden states; the second mixture has a capacity, and a dense block beside it."""

    def __init__(self, dtype=torch.float64, checkpointed=None, aux_loss="attached", **options):
        super().__init__()
        torch.manual_seed(5)
        self.embedding = nn.Embedding(VOCABULARY, H, dtype=dtype)
        self.first = MoE(**FIELDS, num_experts=4, aux_loss=aux_loss, **options, dtype=dtype)
        inner = MoE(**FIELDS, num_experts=6, capacity_factor=0.75, aux_loss=aux_loss, **options, dtype=dtype)
        self.second = ResidualMoE(inner, nn.Linear(H, H, dtype=dtype))
        with torch.no_grad():  # routers that prefer some experts
            for layer in (self.first, inner):
                layer.router.weight.mul_(30)
        self.checkpointed = checkpointed
        self.inputs = {"first": [], "second.moe": []}  # of every forward that is no recomputation

    def forward(self, ids):
        x = self.embedding(ids)
        for name, block in (("first", self.first), ("second.moe", self.second)):
            if torch._C._current_graph_task_id() == -1:
                self.inputs[name].append(x.detach())
            again = self.checkpointed
            x = x + (block(x) if again is None else checkpoint(block, x, use_reentrant=again))
        return x

    def mixtures(self):
        return {"first": self.first, "second.moe": self.second.moe}


def by_hand(layer, inputs):
    """What a layer without losses of tokens did with them, one token after the other, in plain Python."""
    weight, experts, top_k = layer.router.weight.detach(), layer.config.num_experts, layer.config.top_k
    weight = (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).tolist()
    tokens = [0] * experts
    pairs, entropy, squares, largest, count = [], 0.0, 0.0, 0.0, 0
    kept = [0] * experts
    for x in inputs:
        rows = x.reshape(-1, x.shape[-1]).tolist()
        room = None
        if layer.config.capacity_factor is not None:
            room = math.ceil(layer.config.capacity_factor * len(rows) * top_k / experts)
        chosen = []
        for row in rows:
            logits = [sum(a * b for a, b in zip(row, w, strict=True)) for w in weight]
            top = max(logits)
            parts = [math.exp(value - top) for value in logits]
            probs = [part / sum(parts) for part in parts]
            entropy -= sum(p * math.log(p) for p in probs if p > 0) * top_k  # weighted by assignments
            squares += sum(value * value for value in logits)
            largest = max(largest, *map(abs, logits))
            count += experts
            chosen.append(sorted(range(experts), key=lambda e: (-logits[e], e))[:top_k])
        pairs += chosen
        here = [sum(expert in each for each in chosen) for expert in range(experts)]
        tokens = [a + b for a, b in zip(tokens, here, strict=True)]
        kept = [a + (b if room is None else min(b, room)) for a, b in zip(kept, here, strict=True)]
    return SimpleNamespace(
        tokens=tokens, kept=kept, entropy=entropy, squares=squares, largest=largest, count=count, chosen=pairs
    )


def compare(record, hands):
    """A layer's record with the loops of all ranks."""
    total = [sum(each) for each in zip(*(hand.tokens for hand in hands), strict=True)]
    kept = [sum(each) for each in zip(*(hand.kept for hand in hands), strict=True)]
    assert list(record.tokens_per_expert) == total
    assert list(record.kept_per_expert) == kept
    assert record.dead_experts == total.count(0)
    assert math.isclose(record.dropped_share, 1 - sum(kept) / max(sum(total), 1), abs_tol=1e-6)
    assert all(math.isclose(a, b / max(sum(total), 1), abs_tol=1e-6) for a, b in zip(record.load, total, strict=True))
    assert math.isclose(record.entropy, sum(hand.entropy for hand in hands) / max(sum(total), 1), rel_tol=1e-9)
    count = sum(hand.count for hand in hands)
    assert math.isclose(record.router_logits_rms, math.sqrt(sum(h.squares for h in hands) / count), rel_tol=1e-9)
    assert math.isclose(record.router_logits_max, max(hand.largest for hand in hands), rel_tol=1e-9)
