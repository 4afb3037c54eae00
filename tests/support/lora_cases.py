"""Adapters of layers as dense matrices: what a layer with ``W + s B A`` computes, by loops and autograd."""

from __future__ import annotations

import torch
from torch.func import functional_call


def randomise(parameters, seed=1, std=0.5):
    """Values for all factors; ``B`` is zero when an adapter is added, and nothing could be seen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
            local.copy_(torch.randn(local.shape, generator=generator, dtype=torch.float64) * std)


def dense(base, factors, scale, widths=()):
    """One weight of all experts with the products added: expert by expert, in the weight's own form.

    Args:
        base: ``(E, ..., out, in)``, ``(2, sum F, H)`` and the like with ``widths``, or a router's ``(E, H)``.
        factors: ``a`` and ``b``.
        scale: s.
        widths: of experts that differ; which factor is packed shows in their numbers of dimensions.
    """
    a, b = factors
    if base.dim() == 2 and not widths:
        return base + scale * b @ a
    if not widths:
        experts = []
        for e in range(base.shape[0]):
            of_a, of_b = a[e if len(a) > 1 else 0], b[e if len(b) > 1 else 0]
            experts.append(base[e] + scale * torch.tensordot(of_b, of_a, 1))
        return torch.stack(experts)
    parts, start = [], 0
    down = a.dim() == 2
    for e, width in enumerate(widths):
        columns = slice(start, start + width)
        start += width
        if down:
            parts.append(base[:, columns] + scale * b[e if len(b) > 1 else 0] @ a[:, columns])
        else:
            of_a = a[e if len(a) > 1 else 0]
            parts.append(base[..., columns, :] + scale * torch.tensordot(b[..., columns, :], of_a, 1))
    return torch.cat(parts, 1 if down else -2)


def dense_parameters(layer, trained, scale, name="default"):
    """Of a layer without adapters: its parameters by name, those that have factors with the product added.

    ``trained`` is what :func:`dmoe.lora.add` returned, by qualified name.
    """
    own = {key: value for key, value in layer.named_parameters() if ".lora." not in key}
    widths = layer.config.ffn_hidden_size
    result = dict(own)
    for key, value in own.items():
        module, _, leaf = key.rpartition(".")
        prefix = f"{module}.lora.{name}.{leaf}."
        if prefix + "a" in trained:
            of_experts = module == "experts" and not isinstance(widths, int)
            both = trained[prefix + "a"], trained[prefix + "b"]
            result[key] = dense(value, both, scale, tuple(widths) if of_experts else ())
    return result


def run_dense(twin, parameters, x, **options):
    """A twin without adapters, run on those parameters."""
    return functional_call(twin, parameters, (x,), options)
