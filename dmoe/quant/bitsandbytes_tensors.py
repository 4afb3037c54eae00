"""bitsandbytes' quantised parameters as :class:`dmoe.QuantizedWeight`, read by their attributes (of 0.43 to 0.50).

bitsandbytes is not imported.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dmoe.quant.packing import Parts, joined, swapped
from dmoe.quantized_weight import QuantizedWeight


def from_bitsandbytes(
    parameters: Any, quant_state: Any = None, *, gated: bool = False, interleaved: bool = False
) -> QuantizedWeight:
    """What bitsandbytes holds, as it is: codes are not quantised anew.

    Args:
        parameters: one ``Params4bit`` of a weight ``(E, N, K)``, or E of ``(N, K)``: of type ``nf4``, in blocks of 64,
            K a multiple of 64. Its statistics may be compressed (``nested``). Or ``Int8Params``, likewise.
        quant_state: where the parameter is a plain tensor of codes: its ``QuantState``, or a list of them.
        gated: whether rows are gate and up, and the value's shape ``(E, 2, N / 2, K)``.
        interleaved: whether gate's rows and up's take turns.

    Raises:
        TypeError: a parameter that is not quantised (bitsandbytes does that where it moves one to a device).
        ValueError: another type (``fp4``) or size of blocks, or rows that are no multiple of them.
    """
    each = list(parameters) if isinstance(parameters, list | tuple) else [parameters]
    states = list(quant_state) if isinstance(quant_state, list | tuple) else [quant_state] * len(each)
    if len(states) != len(each):
        raise ValueError(
            f"from_bitsandbytes: quant_state: expected {len(each)}, one for each tensor, got {len(states)}"
        )
    parts = [_parts(parameter, state) for parameter, state in zip(each, states, strict=True)]
    if not parts:
        raise ValueError("from_bitsandbytes: parameters: expected at least one, got none")
    return joined("from_bitsandbytes", parts, gated=gated, interleaved=interleaved)


def _parts(parameter: Any, state: Any) -> Parts:
    state = getattr(parameter, "quant_state", None) if state is None else state
    if state is not None:
        return _four_bits(parameter, state)
    scales = getattr(parameter, "SCB", None)
    if scales is None:
        raise TypeError(
            "from_bitsandbytes: parameters: expected Params4bit or Int8Params that are quantised, or codes and "
            f"quant_state, got {type(parameter).__name__} without either's statistics"
        )
    codes = _plain(parameter)
    codes = codes if codes.dim() == 3 else codes.unsqueeze(0)
    if codes.dtype != torch.int8:
        raise TypeError(f"from_bitsandbytes: Int8Params: expected int8 codes, got {codes.dtype}")
    # SCB is the largest magnitude of each row, which 127 stands for.
    scales = (scales.float() / 127).view(*codes.shape[:2], 1)
    return Parts(codes, scales, None, "int8", (1, codes.shape[-1]))


def _four_bits(parameter: Any, state: Any) -> Parts:
    shape = tuple(state.shape)
    shape = shape if len(shape) == 3 else (1, *shape)
    if state.quant_type != "nf4":
        raise ValueError(f"from_bitsandbytes: quant_type: expected nf4, got {state.quant_type}")
    if state.blocksize != 64 or len(shape) != 3 or shape[-1] % 64:
        raise ValueError(
            f"from_bitsandbytes: expected blocks of 64 in rows of a multiple of 64, got blocks of {state.blocksize} in "
            f"a weight of shape {tuple(state.shape)}"
        )
    scales = state.absmax
    if getattr(state, "nested", False):  # 8-bit codes of a table, in blocks of their own, around a mean
        inner = state.state2
        values = inner.code.float()[scales.int()]
        scales = values * inner.absmax.float().repeat_interleave(inner.blocksize)[: scales.numel()] + state.offset
    experts, rows, columns = shape
    codes = swapped(_plain(parameter).view(torch.uint8)).view(experts, rows, columns // 2)
    return Parts(codes, scales.float().view(experts, rows, columns // 64), None, "nf4", (1, 64))


def _plain(parameter: Any) -> Tensor:
    """Without the class, whose methods would do things of their own."""
    return parameter.data.detach().as_subclass(torch.Tensor).contiguous()
