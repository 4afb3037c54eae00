"""The layer on one hand, the oracle on the layer's parameters on the other; and what a forward saves."""

from __future__ import annotations

import oracle
import torch

from dmoe import MoEConfig, aux_loss


class Reference:
    """The layer's parameters and input in another dtype, run through the oracle. Router arithmetic stays in float32 or
    wider, as the layer's does."""

    def __init__(self, layer, x, grad, mask, dtype, router_dtype):
        self.config, self.mask = layer.config, mask
        self.dtype, self.router_dtype = dtype, router_dtype
        self.leaves = {name: p.detach().clone().to(dtype).requires_grad_() for name, p in layer.named_parameters()}
        self.x = x.detach().clone().to(dtype).requires_grad_()
        self.grad = grad.to(dtype)

    def run(self, indices, kept):
        c, p = self.config, self.leaves
        wide = self.router_dtype
        x = self.x.masked_fill(~self.mask.bool().unsqueeze(1), 0)  # what a masked token holds does not matter
        logits = x.to(wide) @ p["router.weight"].to(wide).t()
        if "router.bias" in p:
            logits = logits + p["router.bias"].to(wide)
        gates = oracle.gate_weights(
            logits,
            indices,
            kept,
            score=c.score_function,
            p=c.gate_normalization,
            after_drop=c.normalize_when == "after_drop",
            over_chosen=c.softmax_order == "after_topk",
            scale=c.gate_scale,
        )
        y = self.experts("experts", x, indices, gates, kept, c)
        if c.shared_ffn_hidden_size:
            ones = torch.ones(len(indices), 1, dtype=wide)
            if c.shared_expert_gate:
                ones = torch.sigmoid((x @ p["shared_expert.gate.weight"].t()).to(wide))
            one = MoEConfig(
                hidden_size=c.hidden_size,
                ffn_hidden_size=c.shared_ffn_hidden_size,
                num_experts=1,
                top_k=1,
                activation=c.activation,
                gated=c.gated,
            )
            everyone = [[0]] * len(indices), ones, [[True]] * len(indices)
            y = y + self.experts("shared_expert.mlp", x, *everyone, one)
        if "output_bias" in p:
            y = y + p["output_bias"]
        counts = [bool(m) for m in self.mask]
        loss = logits.sum() * 0
        if c.load_balancing_coefficient:
            first = c.load_balancing_choices == "first"
            balance = oracle.balance_loss(
                logits, indices, counts, c.num_experts, score=c.score_function, first_only=first
            )
            loss = loss + balance * c.load_balancing_coefficient / c.num_moe_layers
        if c.router_z_loss_coefficient:
            loss = loss + oracle.z_loss(logits, counts) * c.router_z_loss_coefficient / c.num_moe_layers
        ((y * self.grad).sum() + loss).backward()
        results = {"y": y.detach(), "aux_loss": loss.detach(), "grad x": self.x.grad}
        for name, leaf in p.items():
            results[f"grad {name}"] = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        return results

    def experts(self, prefix, x, indices, gates, kept, config):
        p = self.leaves
        up = p.get(f"{prefix}.gate_up_proj", p.get(f"{prefix}.up_proj"))
        up_bias = p.get(f"{prefix}.gate_up_bias", p.get(f"{prefix}.up_bias"))
        weights = up, p[f"{prefix}.down_proj"], up_bias, p.get(f"{prefix}.down_bias")
        sizes = () if isinstance(config.ffn_hidden_size, int) else config.ffn_hidden_size
        return oracle.moe(
            x,
            indices,
            gates,
            kept,
            weights,
            activation=config.activation,
            gated=config.gated,
            gate_on=config.gate_weight_on,
            ffn_sizes=sizes,
        )


def run_layer(layer, x, grad, mask):
    x = x.detach().clone().requires_grad_()
    y = layer(x, token_mask=mask)
    loss = aux_loss(layer)
    ((y * grad).sum() + loss).backward()
    results = {"y": y.detach(), "aux_loss": loss.detach(), "grad x": x.grad}
    for name, p in layer.named_parameters():
        results[f"grad {name}"] = torch.zeros_like(p) if p.grad is None else p.grad
    return results


def routing_of(layer, x, mask):
    """The layer's own choices, and which of them got a row: near ties must not make a test flake."""
    with torch.no_grad():
        routing = layer.router(x, token_mask=mask)
    indices = routing.expert_indices.tolist()
    rows = routing.plan.token_to_rows.tolist()
    experts = layer.config.num_experts
    kept = [
        [None if e == experts else row >= 0 for e, row in zip(*pair, strict=True)]
        for pair in zip(indices, rows, strict=True)
    ]
    return indices, kept


def formula(config, tokens, dtype, *, rows=None):
    """Bytes that backward needs besides parameters, from the layer's documentation.

    x, the pre-activation, router probabilities in float32 (float64 for float64), gate weights, and the plan's int32
    indices beside the int64 choice of experts; a few numbers per expert for the load-balancing loss.
    """
    size = torch.finfo(dtype).bits // 8
    wide = 8 if dtype == torch.float64 else 4
    T, E, K, H = tokens, config.num_experts, config.top_k, config.hidden_size
    R = T * K if rows is None else rows
    pre = max(config.ffn_sizes) * (2 if config.gated else 1)
    plan = 4 * (R + R + (E + 1) + (T + 1) + T * K)  # row_to_token, row_to_slot, expert_, token_offsets, token_rows
    total = T * H * size + R * pre * size + T * E * wide + T * K * wide + T * K * 8 + plan
    if config.load_balancing_coefficient:
        total += E * wide  # each expert's share of the load
        total += T * wide if config.score_function == "sigmoid" else 0  # each token's sum of scores
    if config.selection_bias:
        total += 4 * E  # the load that backward counts
    if config.router_z_loss_coefficient:
        total += T * wide  # log-partition of each token
    return total
