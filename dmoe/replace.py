"""``replace_ffn``: a model's dense feed-forward blocks become MoE layers."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.dense_ffn import RECOGNISED, DenseFFN, UnrecognisedFFNError, read_ffn
from dmoe.layer import MoE

Pattern = str | re.Pattern[str]
Select = Pattern | Sequence[Pattern] | Callable[[str, nn.Module], bool]


def replace_ffn(
    model: nn.Module,
    select: Select,
    *,
    num_experts: int,
    top_k: int = 2,
    ffn_hidden_size: int | Sequence[int] | None = None,
    upcycle: bool = False,
    perturb: float = 0.0,
    **config_fields: Any,
) -> list[str]:
    """Replace chosen feed-forward blocks of a model by :class:`dmoe.MoE`, in place.

    ::

        names = dmoe.replace_ffn(model, "model.layers.*.mlp", num_experts=8, top_k=2)
        loss = model(input_ids, labels=labels).loss + dmoe.aux_loss(model)

    A block is recognised by what it computes, ``down(act(up(x)))`` or ``down(act(gate(x)) * up(x))``, whatever its
    parts are called: an ``nn.Sequential``, a module written by hand, the MLP of a Hugging Face model. Selecting an
    ``nn.TransformerEncoderLayer`` or ``nn.TransformerDecoderLayer`` swaps its feed-forward part: its ``linear1``
    becomes the MoE layer, ``activation``, ``dropout`` and ``linear2`` become ``nn.Identity``, and PyTorch's fused
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
        num_experts, top_k: E and K.
        ffn_hidden_size: F of each expert; None for the dense block's.
        upcycle: copy the dense block into every expert (Komatsuzaki et al. 2023, "Sparse Upcycling"). Gate weights are
            then normalised to sum to 1 and dense biases become expert biases, so that the new model's output equals the
            old one's, up to rounding and to tokens that a ``capacity`` drops.
        perturb: standard deviation of the noise that upcycled projections are multiplied by: ``w * (1 + perturb * n)``
            with n standard normal, different for every expert: a function of (seed, expert), with one seed a layer
            drawn from PyTorch's default generator.
        **config_fields: fields of :class:`dmoe.MoEConfig`, over what was read from the block. ``bias`` is ``expert``
            where the block has biases; ``num_moe_layers`` is the number of layers that this call makes.

    Returns:
        Qualified names of the replaced modules, in the model's order.

    Raises:
        ValueError: nothing is selected (the message lists modules that could be), a selected module is no feed-forward
            block of a known form, or options that contradict each other, the block or upcycling.
        TypeError: an unknown field, or one that the block itself decides.
    """
    _check_options(ffn_hidden_size, upcycle, perturb, config_fields)
    names = _select(model, select)
    chosen = _by_module(model, names)
    count = config_fields.pop("num_moe_layers", len(chosen))
    jobs = []
    for module, aliases in chosen:
        ffn = _read(model, aliases[0], module, ignore_functional_dropout="activation_dropout" in config_fields)
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
                f"replace_ffn: {aliases[0]!r} ({type(module).__name__}): expected the activation silu, gelu, gelu_tanh "
                "or relu, got another one; without upcycle=True, activation=... chooses one for the experts"
            )
        config = MoEConfig(
            hidden_size=ffn.hidden_size, num_experts=num_experts, top_k=top_k, num_moe_layers=count, **options
        )
        if upcycle:
            _check_upcycle(aliases[0], ffn, config)
        jobs.append(_Job(aliases, module, ffn, config))

    built = [(job, _build(job, upcycle, perturb)) for job in jobs]
    for job, moe in built:  # nothing below can fail
        if isinstance(job.module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            _install_in_layer(job.module, moe)
            continue
        p = job.ffn.output_dropout
        parts: OrderedDict[str, nn.Module] = OrderedDict(moe=moe, dropout=nn.Dropout(p))
        replacement = nn.Sequential(parts).train(job.module.training) if p else moe
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


def _select(model: nn.Module, select: Select) -> list[str]:
    """Names of the outermost modules that are selected."""
    chosen: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(_inside(name, outer) for outer in chosen) and _matches(select, name, module):
            chosen.append(name)
    if not chosen:
        raise ValueError(f"replace_ffn: select: no module matches {select!r}. {_could_select(model)}")
    return chosen


def _inside(name: str, outer: str) -> bool:
    return outer == "" or name.startswith(outer + ".")


def _matches(select: Select, name: str, module: nn.Module) -> bool:
    if isinstance(select, str):
        return fnmatchcase(name, select) and (name != "" or select == "")  # "*" means all inside, not the model
    if isinstance(select, re.Pattern):
        return select.search(name) is not None
    if callable(select):
        return bool(select(name, module))
    if not isinstance(select, Sequence):
        raise TypeError(
            "replace_ffn: select: expected a glob, a compiled regular expression, a sequence of these, or a function "
            f"of name and module; got {type(select).__name__}"
        )
    return any(_matches(pattern, name, module) for pattern in select)


def _by_module(model: nn.Module, names: list[str]) -> list[tuple[nn.Module, list[str]]]:
    """Each selected module with all its selected names, in order."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for name in names:
        module = model.get_submodule(name)
        found.setdefault(id(module), (module, []))[1].append(name)
    return list(found.values())


def _read(model: nn.Module, name: str, module: nn.Module, *, ignore_functional_dropout: bool) -> DenseFFN:
    """What a selected module computes, or an error that names it."""
    what = f"replace_ffn: {name!r} ({type(module).__name__})"
    parts = name.split(".")
    above = [model.get_submodule(".".join(parts[:depth])) for depth in range(len(parts))]
    if any(isinstance(other, MoE) for other in (*above, *module.modules())):
        raise ValueError(
            f"{what}: expected a dense feed-forward block, and it is, holds, or lies in a dmoe.MoE already"
        )
    if name == "" and not isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        raise ValueError(
            f"{what}: expected a module inside the model, got the model itself, which cannot be exchanged in place"
        )
    try:
        return read_ffn(module, ignore_functional_dropout=ignore_functional_dropout)
    except UnrecognisedFFNError as error:
        raise ValueError(
            f"{what} is not recognised as a feed-forward block: it {error}. Recognised: {RECOGNISED}. "
            + _could_select(model)
        ) from error


def _could_select(model: nn.Module) -> str:
    """A sentence with the names of a few blocks that would be accepted."""
    found: list[str] = []
    for name, module in model.named_modules():
        if name == "" or any(_inside(name, outer) for outer in found):
            continue
        try:
            read_ffn(module)
        except UnrecognisedFFNError:
            continue
        found.append(name)
        if len(found) == 5:
            break
    if found:
        return f"Feed-forward blocks in this model: {', '.join(found)}"
    return f"This {type(model).__name__} holds no feed-forward block of a known form"


def _check_upcycle(name: str, ffn: DenseFFN, config: MoEConfig) -> None:
    """Refuse options under which the experts' weighted sum is not the dense block."""
    weights_sum_to_1 = config.gate_normalization == 1 or config.family.weights_sum_to_1
    if config.softmax_order == "after_topk" and config.gate_normalization is None:
        weights_sum_to_1 = True
    on_sum = config.gate_weight_on == "output" or (config.gate_weight_on == "activation" and ffn.down.bias is None)
    up_has_bias = ffn.up.bias is not None or (ffn.gate is not None and ffn.gate.bias is not None)
    kept = {"expert": True, "output": not up_has_bias, "none": not ffn.has_bias}[config.bias]
    required: list[tuple[str, bool, str]] = [
        ("ffn_hidden_size", config.ffn_hidden_size == ffn.ffn_hidden_size, f"the dense block's {ffn.ffn_hidden_size}"),
        ("activation", config.activation == ffn.activation, f"the dense block's {ffn.activation!r}"),
        ("gated", config.gated == ffn.gated, f"the dense block's {ffn.gated}"),
        ("bias", kept, "'expert', to hold the dense block's biases"),
        ("router", not config.family.experts_choose, "'top_k': experts that pick tokens leave some out"),
        ("gate_normalization", weights_sum_to_1, "1.0, so that gate weights sum to 1"),
        ("gate_scale", config.gate_scale == 1, "1, so that gate weights sum to 1"),
        ("gate_weight_on", on_sum, "'output', so that the weighted sum of equal experts is one of them"),
        (
            "shared_ffn_hidden_size",
            config.shared_ffn_hidden_size is None,
            "None: a shared expert adds to the dense output",
        ),
    ]
    for option, holds, allowed in required:
        if not holds:
            raise ValueError(
                f"replace_ffn: {name!r}: {option}: with upcycle=True expected {allowed}; got "
                f"{getattr(config, option)!r}"
            )
    if ffn.down_proj().is_meta:
        raise ValueError(
            f"replace_ffn: {name!r}: expected weights to copy with upcycle=True, got a module on the meta device"
        )


def _build(job: _Job, upcycle: bool, perturb: float) -> MoE:
    ffn, config = job.ffn, job.config
    weight = ffn.down_proj()
    where: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if upcycle:
        moe = MoE(config, device="meta", dtype=weight.dtype)  # experts are copied: drawing them first takes longer
        moe.experts.to_empty(device=weight.device)
        moe.router = type(moe.router)(config, **where)
        if moe.output_bias is not None:
            moe.output_bias = nn.Parameter(ffn.down_bias().detach().clone())
        _copy_into_experts(ffn, moe, perturb)
    else:
        moe = MoE(config, **where)
    _copy_requires_grad(ffn, moe)
    return moe.train(job.module.training)


@torch.no_grad()
def _copy_into_experts(ffn: DenseFFN, moe: MoE, perturb: float) -> None:
    dense = {
        "up_proj": ffn.up_proj(),
        "down_proj": ffn.down_proj(),
        "up_bias": ffn.up_bias(),
        "down_bias": ffn.down_bias(),
    }
    seed = int(torch.randint(2**62, (), device="cpu").item()) if perturb else 0
    weights = moe.experts.weights()
    for expert in range(moe.config.num_experts):
        generator = torch.Generator(device="cpu").manual_seed((seed + expert * 0x9E3779B97F4A7C15) % 2**63)
        for name, target in weights.of_expert(expert).items():
            target.copy_(dense[name])
            if perturb and name.endswith("proj"):
                noise = torch.randn(target.shape, generator=generator, device="cpu", dtype=torch.float32)
                target.mul_((1 + perturb * noise).to(target.device, target.dtype))


def _copy_requires_grad(ffn: DenseFFN, moe: MoE) -> None:
    """Weight for weight from the counterpart; what has none follows the block as a whole."""

    def trained(tensors: list[Any]) -> bool:
        return any(tensor.requires_grad for tensor in tensors if isinstance(tensor, Tensor))

    ups = [linear for linear in (ffn.gate, ffn.up) if linear is not None]
    like = {
        "up_proj": trained([linear.weight for linear in ups]),
        "down_proj": trained([ffn.down.weight]),
        "up_bias": trained([linear.bias if linear.bias is not None else linear.weight for linear in ups]),
        "down_bias": trained([ffn.down.bias if ffn.down.bias is not None else ffn.down.weight]),
    }
    moe.requires_grad_(any(like.values()))
    weights = moe.experts.weights()
    for name, flag in like.items():
        tensor = getattr(weights, name)
        if tensor is not None:
            tensor.requires_grad_(flag)
    if moe.output_bias is not None:
        moe.output_bias.requires_grad_(like["down_bias"])


def _install_in_layer(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, moe: MoE) -> None:
    """Its feed-forward part is ``linear2(dropout(activation(linear1(x))))``, written out in its forward."""
    layer.linear1 = moe  # type: ignore[assignment]
    layer.activation = nn.Identity()
    layer.dropout = nn.Identity()  # type: ignore[assignment]
    layer.linear2 = nn.Identity()  # type: ignore[assignment]
    if isinstance(layer, nn.TransformerEncoderLayer):
        layer.activation_relu_or_gelu = 0  # "neither": the fused kernel, which takes two dense weights, is not tried


def _forgo_nested_tensors(model: nn.Module) -> None:
    """Keep encoders from packing padded batches into nested tensors, which only the fused kernel of a layer takes."""
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder):
            linears = [layer.linear1 for layer in encoder.layers if isinstance(layer, nn.TransformerEncoderLayer)]
            if any(isinstance(linear, MoE) for linear in linears):
                encoder.use_nested_tensor = False
