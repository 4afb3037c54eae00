"""``replace_ffn``: a model's dense feed-forward blocks become MoE layers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.dense_ffn import DenseFFN
from dmoe.find_ffn import Select, by_module, read_block, select_names
from dmoe.layer import MoE
from dmoe.residual import ResidualMoE
from dmoe.upcycle import build_moe, check_upcycle


def replace_ffn(
    model: nn.Module,
    select: Select,
    *,
    num_experts: int | Sequence[int],
    top_k: int = 2,
    ffn_hidden_size: int | Sequence[int] | None = None,
    upcycle: bool = False,
    perturb: float = 0.0,
    residual: bool = False,
    **config_fields: Any,
) -> list[str]:
    """Replace chosen feed-forward blocks of a model by :class:`dmoe.MoE`, in place.

    ::

        names = dmoe.replace_ffn(model, "model.layers.*.mlp", num_experts=8, top_k=2)
        loss = model(input_ids, labels=labels).loss + dmoe.aux_loss(model)

    A block is recognised by what it computes, ``down(act(up(x)))`` or ``down(act(gate(x)) * up(x))``, whatever its
    parts are called: an ``nn.Sequential``, a module written by hand, the MLP of a Hugging Face model. Selecting an
    ``nn.TransformerEncoderLayer`` or ``nn.TransformerDecoderLayer`` swaps its feed-forward part: its ``linear1``
    becomes the MoE layer, ``activation``, ``dropout`` and ``linear2`` pass on what they get, and PyTorch's fused
    inference path, which reads the dense weights, is switched off for it. (Call this on the ``nn.TransformerEncoder``
    or a module that holds it, so that its nested-tensor path can be switched off too.)

    A new layer takes device, dtype, training flag, activation, gating and dropouts from the block it replaces, and each
    weight's ``requires_grad`` from its counterpart; the router is trainable if any part of the block is. A dropout
    before the last linear becomes ``activation_dropout``; one after it stays, and the replacement is then an
    ``nn.Sequential`` of ``moe`` and ``dropout``. Forward hooks of replaced modules are not carried over. Optimizers
    made before hold the old parameters: make them afterwards.

    Args:
        model: any module. Changed in place; on an error it is as it was.
        select: which modules. A glob over qualified names (``*`` crosses dots: ``"*.mlp"``, ``"layers.*"``), a compiled
            regular expression (``search``), a sequence of these, or a function of name and module. Of modules inside
            each other the outermost counts. A module that is selected under several names is replaced once, and
            stays shared.
        num_experts: E; or a list, one count for each block that is replaced, in the model's order: a pyramid of few
            experts below and more above (PR-MoE: Rajbhandari et al. 2022).
        top_k: K.
        ffn_hidden_size: F of each expert; None for the dense block's.
        upcycle: copy the dense block into every expert (Komatsuzaki et al. 2023, "Sparse Upcycling"). Gate weights are
            then normalised to sum to 1 and dense biases become expert biases, so that the new model's output equals the
            old one's, up to rounding and to tokens that a ``capacity`` drops.
        perturb: standard deviation of the noise that upcycled projections are multiplied by: ``w * (1 + perturb * n)``
            with n standard normal, different for every expert: a function of (seed, expert), with one seed a layer
            drawn from PyTorch's default generator.
        residual: keep each block, with its weights, beside its experts: a :class:`dmoe.ResidualMoE` of both comes in
            its place (PR-MoE's other half).
        **config_fields: fields of :class:`dmoe.MoEConfig`, over what was read from the block. ``bias`` is ``expert``
            where the block has biases; ``num_moe_layers`` is the number of layers that this call makes.

    Returns:
        Qualified names of the replaced modules, in the model's order.

    Raises:
        ValueError: nothing is selected (the message lists modules that could be), a selected module is no feed-forward
            block of a known form, counts of experts that are not one for each, or options that contradict each other,
            the block or upcycling.
        TypeError: an unknown field, or one that the block itself decides.
    """
    _check_options(ffn_hidden_size, upcycle, perturb, config_fields)
    names = select_names(model, select)
    chosen = by_module(model, names)
    counts = _counts(num_experts, [aliases[0] for _, aliases in chosen])
    num_layers = config_fields.pop("num_moe_layers", len(chosen))
    jobs = []
    for (module, aliases), experts in zip(chosen, counts, strict=True):
        ffn = read_block(model, aliases[0], module, ignore_functional_dropout="activation_dropout" in config_fields)
        options = {
            "ffn_hidden_size": ffn.ffn_hidden_size if ffn_hidden_size is None else ffn_hidden_size,
            "activation": ffn.activation,
            "gated": ffn.gated,
            "bias": "expert" if ffn.has_bias else "none",
            "activation_dropout": ffn.activation_dropout,
            **({"gate_normalization": 1.0} if upcycle and config_fields.get("softmax_order") != "after_topk" else {}),
            **config_fields,
        }
        if options["activation"] is None or (upcycle and ffn.activation is None):
            raise ValueError(
                f"replace_ffn: {aliases[0]!r} ({type(module).__name__}): expected the activation silu, gelu, "
                "gelu_tanh, relu, relu_squared or sigmoid, got another one; without upcycle=True, activation=... "
                "chooses one for the experts"
            )
        config = MoEConfig(
            hidden_size=ffn.hidden_size, num_experts=experts, top_k=top_k, num_moe_layers=num_layers, **options
        )
        if upcycle:
            check_upcycle(aliases[0], ffn, config)
        jobs.append(_Job(aliases, module, ffn, config))

    built = [(job, _replacement(job, upcycle, perturb, residual)) for job in jobs]
    for job, replacement in built:  # nothing below can fail
        if isinstance(job.module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            _install_in_layer(job.module, replacement)
            continue
        for name in job.names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
    _forgo_nested_tensors(model)
    return names


@dataclass(frozen=True)
class _Job:
    """One block to replace: every name it is selected under, itself, what it computes, what comes instead."""

    names: list[str]
    module: nn.Module
    ffn: DenseFFN
    config: MoEConfig


def _counts(num_experts: int | Sequence[int], blocks: list[str]) -> list[int]:
    """E of each block."""
    if not isinstance(num_experts, Sequence):
        return [num_experts] * len(blocks)
    if len(num_experts) != len(blocks):
        raise ValueError(
            f"replace_ffn: num_experts: expected {len(blocks)} counts, one for each block that is replaced "
            f"({', '.join(blocks)}), got {len(num_experts)}: {list(num_experts)}"
        )
    return list(num_experts)


def _check_options(
    ffn_hidden_size: int | Sequence[int] | None, upcycle: bool, perturb: float, config_fields: dict[str, Any]
) -> None:
    known = {option.name for option in fields(MoEConfig)} - {"hidden_size", "return_bias"}
    unknown = sorted(set(config_fields) - known)
    if unknown:
        raise TypeError(
            f"replace_ffn: expected fields of dmoe.MoEConfig other than hidden_size and return_bias, which the dense "
            f"block decides; got {', '.join(unknown)}"
        )
    if perturb < 0 or (perturb and not upcycle):
        raise ValueError(f"replace_ffn: perturb: expected at least 0, and 0 without upcycle=True; got {perturb}")


def _replacement(job: _Job, upcycle: bool, perturb: float, residual: bool) -> nn.Module:
    """What comes in a block's place, with its training flag."""
    training, p = job.module.training, job.ffn.output_dropout
    moe: nn.Module = build_moe(job.ffn, job.config, upcycle=upcycle, perturb=perturb).train(training)
    if p:
        moe = nn.Sequential(OrderedDict(moe=moe, dropout=nn.Dropout(p))).train(training)
    if not residual:
        return moe
    in_layer = isinstance(job.module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    mixed = ResidualMoE(moe, _FeedForward(job.module) if in_layer else job.module, job.ffn.hidden_size)
    mixed.coefficient.requires_grad_(any(parameter.requires_grad for parameter in moe.parameters()))
    mixed.training = mixed.coefficient.training = training  # not train(), which reaches into the block
    return mixed


class _FeedForward(nn.Module):
    """The feed-forward part of a transformer layer, which that writes out in its forward, as a block of its own."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.linear1, self.activation, self.dropout = layer.linear1, layer.activation, layer.dropout
        self.linear2 = layer.linear2
        self.training = layer.training

    def forward(self, x: Tensor) -> Tensor:
        """``(..., H)`` to the same shape."""
        y: Tensor = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return y


def _install_in_layer(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, replacement: nn.Module) -> None:
    """Its feed-forward part is ``linear2(dropout(activation(linear1(x))))``, written out in its forward."""
    layer.linear1 = replacement  # type: ignore[assignment]
    # A function, as PyTorch has it there: of a module its decoder layer does not know when it is copied or unpickled,
    # and applies relu.
    del layer.activation
    layer.activation = _identity
    layer.dropout = nn.Identity()  # type: ignore[assignment]
    layer.linear2 = nn.Identity()  # type: ignore[assignment]
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # "neither": the fused kernel, which takes two dense weights, is not tried


def _identity(x: Tensor) -> Tensor:
    return x


def _forgo_nested_tensors(model: nn.Module) -> None:
    """Keep encoders from packing padded batches into nested tensors, which only the fused kernel of a layer takes."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            linears = [layer.linear1 for layer in encoder.layers if isinstance(layer, nn.TransformerEncoderLayer)]
            if any(isinstance(linear, MoE | ResidualMoE) for linear in linears):
                encoder.use_nested_tensor = False
