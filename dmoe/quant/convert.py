"""A model's experts, quantised in place and back, one projection at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dmoe.config import CODED_BACKENDS
from dmoe.expert_slice import local_part
from dmoe.expert_targets import as_patterns, check_patterns, fields_of, half_of, matches
from dmoe.experts import Experts
from dmoe.ops.weight_formats import check_block, encode, format_of
from dmoe.other_experts import experts_in, slice_of
from dmoe.quant.projection import QuantizedProjection
from dmoe.quantized_weight import QuantizedWeight

Progress = Callable[[Iterable[str], int], Iterable[str]]  # wraps an iterable of known length, as tqdm does


class _Place(NamedTuple):
    module: Any  # whose parameter it is
    field: str
    experts: Any  # the module itself, or what is known of somebody else's

    @property
    def weight(self) -> Tensor:
        """What lives here of it, as :class:`dmoe.ExpertWeights` has it."""
        if self.module is self.experts:
            return local_part(getattr(self.module, self.field))
        weights = self.experts.weights()
        return weights.down_proj if half_of(self.field) == "down" else weights.up_proj

    @property
    def interleaved(self) -> bool:
        """Whether rows of gate and up take turns in the parameter."""
        return half_of(self.field) == "up" and getattr(self.experts, "interleaved", False)


@torch.no_grad()
def quantize(
    model: nn.Module,
    format: str = "nf4",
    *,
    targets: Sequence[str] = ("experts",),
    group: int | None = None,
    zero_points: bool = False,
    scales_dtype: torch.dtype | None = None,
    progress: Progress = lambda names, total: names,
) -> list[str]:
    """Replace projections of a model's experts by codes; their parameters are gone, biases stay.

    One projection after the other, each expert by expert: beside what was and what will be, memory holds the codes of
    one projection and one expert in float32. Weights on ``meta`` become codes there, to be loaded.

    Adapters beside experts (``dmoe.lora``) stay, and may come before or after. Under expert parallelism each rank
    quantises its own experts, on all of them with the same arguments. An optimizer that was told of the parameters
    keeps them: make it afterwards.

    Args:
        model: any module; each ``Experts`` inside is found, those of shared experts where ``targets`` name them, and
            experts of other packages' models that an integration knows.
        format: ``int8``, ``fp8``, ``int4``, ``nf4`` or ``mxfp4``; see :mod:`dmoe.ops.weight_formats`.
        targets: of :data:`dmoe.quant.TARGETS`, shell patterns or beginnings: ``experts``, ``experts.down``, ``*``.
        group: columns that share a scale, for ``int4`` 32, 64 or 128; None is the format's default.
        zero_points: ``int4`` alone: see :func:`dmoe.ops.weight_formats.encode`.
        scales_dtype: float32, bfloat16 or float16; None is the format's default.
        progress: wraps the names as they are quantised.

    Returns:
        Names of what was quantised, as ``blocks.0.experts.gate_up_proj``.

    Raises:
        TypeError, ValueError: before anything is changed: arguments that are none of these, nothing to quantise, a
            projection that is codes already, sizes that are no multiples of the group, experts of different widths,
            cut along F over a mesh, or sharded by FSDP, a ``backend`` without such products, values that are not
            finite.
        ValueError: scales that ``scales_dtype`` does not hold; what stands before in the model is quantised by then.
    """
    form = format_of("quantize", format)
    places = _places("quantize", model, targets)
    if not places:
        raise ValueError(f"quantize: model: expected experts that targets {list(targets)} name, found none")
    for name, place in places.items():
        _check_place(name, place)
        _check_sizes(name, place, format, group)
        _check_finite(name, place)
    for name in progress(places, len(places)):
        place = places[name]
        weight = place.weight
        # In the parameter's own order: a view.
        rows = (weight.transpose(1, 2) if place.interleaved else weight).flatten(1, -2)
        block = form.block(rows.shape[-1]) if group is None else (form.rows, group)
        try:
            codes, scales, zeros = encode(rows, format, block, zero_points, scales_dtype)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        value = QuantizedWeight(codes, scales, format, tuple(weight.shape), block, zeros, place.interleaved)
        _put(place, value, weight.dtype)
        del weight, rows  # before the next one's codes are made
    return list(places)


@torch.no_grad()
def dequantize(
    model: nn.Module, dtype: torch.dtype | None = None, *, progress: Progress = lambda names, total: names
) -> list[str]:
    """Replace codes by parameters of their values; these are frozen, until ``requires_grad_()``.

    Args:
        model: any module.
        dtype: of the parameters; None is what each projection was before it was quantised.
        progress: wraps the names as they are decoded.

    Returns:
        Names of what was codes, as :func:`quantize` returns them; none where nothing was.
    """
    found = {
        f"{name}.{field}".lstrip("."): _Place(module, field, experts)
        for name, module in model.named_modules()
        if (experts := experts_in(module)) is not None
        for field in fields_of(experts).values()
        if isinstance(getattr(module, field), QuantizedProjection)
    }
    for name in progress(found, len(found)):
        module, field, experts = found[name]
        held: QuantizedProjection = getattr(module, field)
        weight = _decoded(held.value(), held.dtype if dtype is None else dtype)
        if module is not experts:
            weight = experts.as_parameter(field, weight)
        weight = slice_of(experts).distributed(weight, None) if hasattr(held.codes, "to_local") else weight
        delattr(module, field)
        module.register_parameter(field, nn.Parameter(weight, requires_grad=False))
        if isinstance(module, Experts):
            module.mark_parameters()
    return list(found)


def assign(
    module: nn.Module, *, up_proj: QuantizedWeight | None = None, down_proj: QuantizedWeight | None = None
) -> None:
    """Put codes that are there already into experts, in place of these projections.

    Args:
        module: a layer's experts, ``layer.experts`` or ``layer.shared_expert.mlp``; or a module of somebody else's
            that an integration knows.
        up_proj: of gate and up together where there is a gate, ``(E, 2, F, H)``; else ``(E, F, H)``. None leaves it.
        down_proj: ``(E, H, F)``; None leaves it. Under expert parallelism both are of the experts that live here.

    Raises:
        TypeError, ValueError: no experts, or no such value; a shape that is not the projection's; experts that
            :func:`quantize` would refuse, but for being codes already.
    """
    if (experts := experts_in(module)) is None:
        raise TypeError(f"assign: experts: expected a layer's experts, got {type(module).__name__}")
    fields = fields_of(experts)
    given = {fields["up"]: up_proj, fields["down"]: down_proj}
    for field, value in given.items():
        if value is None:
            continue
        if not isinstance(value, QuantizedWeight):
            raise TypeError(f"assign: {field}: expected a QuantizedWeight, got {type(value).__name__}")
        _check_place(f"assign: {field}", _Place(module, field, experts), codes_too=True)
        held = getattr(module, field)
        known = held.value() if isinstance(held, QuantizedProjection) else _Place(module, field, experts).weight
        expected = tuple(known.shape)
        if tuple(value.shape) != expected:
            raise ValueError(f"assign: {field}: expected shape {expected}, got {tuple(value.shape)}")
    for field, value in given.items():
        if value is not None:
            _put(_Place(module, field, experts), value, getattr(module, field).dtype)


def _check_finite(name: str, place: _Place) -> None:
    """Expert by expert, so that the answers take little memory."""
    weight = place.weight
    if weight.is_meta:
        return
    for expert in range(weight.shape[0]):
        if not torch.isfinite(weight[expert]).all():
            raise ValueError(f"quantize: {name}: expected finite values, got others in expert {expert}")


def _put(place: _Place, value: QuantizedWeight, dtype: torch.dtype) -> None:
    """In place of a parameter, or of other codes."""
    owned = place.experts.owned if getattr(place.experts, "distributed", False) else None
    delattr(place.module, place.field)
    place.module.register_module(place.field, QuantizedProjection(value, dtype, owned))


def _places(op: str, model: nn.Module, targets: Sequence[str]) -> dict[str, _Place]:
    """What targets name, by its name in the model."""
    patterns = as_patterns(op, targets)
    check_patterns(op, patterns)
    found = {}
    for name, module in model.named_modules():
        experts = experts_in(module)
        if experts is None:
            continue
        part = "experts" if getattr(experts, "routed", True) else "shared_expert"
        for half, field in fields_of(experts).items():
            if matches(f"{part}.{half}", patterns):
                found[f"{name}.{field}".lstrip(".")] = _Place(module, field, experts)
    return found


def _check_place(name: str, place: _Place, codes_too: bool = False) -> None:
    """Codes can stand there."""
    module, field, experts = place
    held, owned = getattr(module, field), slice_of(experts)
    if isinstance(held, QuantizedProjection):
        if not codes_too:
            raise ValueError(f"{name}: expected a weight, got codes of {held.text}: dmoe.quant.dequantize it first")
    elif not isinstance(held, Tensor):
        raise ValueError(f"{name}: expected a weight, got {type(held).__name__}")
    elif hasattr(module, "unshard") or (module is not experts and hasattr(held, "to_local")):
        raise ValueError(f"{name}: expected experts that FSDP does not shard: quantise before fully_shard")
    if module is not experts:
        return
    config = module.config
    if not isinstance(config.ffn_hidden_size, int):
        raise ValueError(
            f"{name}: expected experts of one width, got ffn_hidden_size={config.ffn_hidden_size}: codes have no other"
        )
    if owned.num_shards > 1 and owned.mesh is not None:
        raise ValueError(
            f"{name}: expected whole experts on each rank, or dtensor=False, got a DTensor of {owned.num_shards} parts "
            "of their F"
        )
    if config.backend not in (None, *CODED_BACKENDS):
        raise ValueError(
            f"{name}: expected backend None, 'grouped' or 'torch', got {config.backend!r}, which multiplies no codes"
        )


def _check_sizes(name: str, place: _Place, format: str, group: int | None) -> None:
    columns = place.weight.shape[-1]
    form = format_of("quantize", format)
    check_block(name, format, form.block(columns) if group is None else (form.rows, group), columns)


def _decoded(value: QuantizedWeight, dtype: torch.dtype) -> Tensor:
    """Expert by expert, so that what is made on the way is of one."""
    out = torch.empty(value.shape, dtype=dtype, device=value.device)
    for e in range(value.shape[0]):
        out[e] = value[e : e + 1].dequantize(dtype)[0]
    return out
