"""What each operation's products cost, for ``torch.utils.flop_counter.FlopCounterMode``: 2 m n k for (m, k) by (k, n).

Rows are counted as the plan holds them: what a capacity dropped costs nothing. A tensor without values (fake, or on
``meta``) tells the number that its plan reserves instead, and of different widths the mean. Padding,
activations and sums are not counted. Loaded by :func:`dmoe.ops._library.count_flops`; who calls ``block_sdd``,
``block_dsd`` or ``block_dds`` and nothing else of dmoe imports it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from torch.utils.flop_counter import FlopCounterMode, flop_registry, register_flop_formula

from dmoe.ops import (  # noqa: F401
    block_sparse,
    block_sparse_mlp,
    fp8,
    grouped_gemm,
    grouped_gemm_invariant,
    grouped_gemm_sum,
    moe_mlp,
    moe_mlp_deferred,
    quantized_gemm,
    router_logits,
)
from dmoe.ops._moe_mlp_call import Call

_ops = torch.ops.dmoe


def _values(offsets: Tensor) -> list[int] | None:
    return None if offsets.is_meta or isinstance(offsets, FakeTensor) else offsets.tolist()


def _last(offsets: Tensor, bound: int) -> int:
    """How many of ``bound`` rows or blocks are in use."""
    values = _values(offsets)
    return bound if values is None else values[-1]


def _rows_times_width(call: Call) -> float:
    """Rows times the F of their experts."""
    values, sizes = _values(call.expert_offsets), call.ffn_sizes
    bound = call.row_to_token.shape[0]
    if not sizes:
        return (bound if values is None else values[-1]) * call.down_proj.shape[-1]
    if values is None:
        return bound * sum(sizes) / len(sizes)
    return sum((end - begin) * size for begin, end, size in zip(values, values[1:], sizes, strict=False))


def _mlp(*arguments: Any, up: bool = True, down: bool = True) -> int:
    call = Call(*arguments)
    products = (2 if call.gated else 1) * up + down
    return int(2 * _rows_times_width(call) * call.x.shape[1] * products)


def _register(*names: str) -> Any:
    operations = [getattr(_ops, name) for name in names]
    return register_flop_formula(operations, get_raw=True)


def _either(*ends: str) -> list[str]:
    """Names of the experts' operations: by device, of PyTorch's own, and those whose bits no batch changes."""
    return [f"moe_mlp{way}{end}" for way in ("", "_torch", "_invariant") for end in ends]


@_register(*_either("", "_inference", "_lean"), "block_sparse_mlp", "block_sparse_mlp_inference")
def _forward(*arguments: Any, out_val: Any = None) -> int:
    return _mlp(*arguments)


@_register(*_either("_pre_activation"))
def _pre_activation(*arguments: Any, out_val: Any = None) -> int:
    return _mlp(*arguments, down=False)


@_register(*_either("_backward"), "block_sparse_mlp_backward")
def _backward(grad_y: Tensor, pre: Tensor, of_weights: bool, *arguments: Any, out_val: Any = None) -> int:
    return _mlp(*arguments) * (2 if of_weights else 1)


@_register(*_either("_backward_into"))
def _backward_into(grad_y: Tensor, pre: Tensor, *arguments: Any, out_val: Any = None) -> int:
    return 2 * _mlp(*arguments)


@_register("moe_mlp_backward_data")
def _backward_data(grad_y: Tensor, pre: Tensor, *arguments: Any, out_val: Any = None) -> int:
    return _mlp(*arguments)


@_register("moe_mlp_backward_weights", "moe_mlp_backward_weights_into")
def _backward_weights(grad_y: Tensor, grad_pre: Tensor, hidden: Tensor, *arguments: Any, out_val: Any = None) -> int:
    return _mlp(*arguments)


@_register("grouped_gemm", "grouped_gemm_portable", "grouped_gemm_invariant")
def _grouped_gemm(a: Tensor, b: Tensor, expert_offsets: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * _last(expert_offsets, a.shape[0]) * b.shape[1] * b.shape[2]


@_register("fp8_gemm")
def _fp8_gemm(a_codes: Tensor, _: Tensor, w_codes: Tensor, __: Tensor, *rest: Any, out_val: Any = None) -> int:
    return _grouped_gemm(a_codes, w_codes, rest[0])


@_register("grouped_gemm_sum")
def _grouped_gemm_sum(
    a: Tensor, b: Tensor, a2: Tensor, b2: Tensor, expert_offsets: Tensor, *_: Any, out_val: Any = None
) -> int:
    return _grouped_gemm(a, b, expert_offsets) + _grouped_gemm(a2, b2, expert_offsets)


@_register("quantized_gemm")
def _quantized_gemm(a: Tensor, codes: Tensor, *rest: Any, out_val: Any = None) -> int:
    expert_offsets, a2 = rest[4], rest[6] if len(rest) > 6 else None
    rows, columns = _last(expert_offsets, a.shape[0]), out_val.shape[1]
    return 2 * rows * columns * (a.shape[1] + (0 if a2 is None else a2.shape[1]))


@_register("grouped_gemm_weight", "grouped_gemm_weight_portable")
def _grouped_gemm_weight(a: Tensor, b: Tensor, expert_offsets: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * _last(expert_offsets, a.shape[0]) * a.shape[1] * b.shape[1]


@_register("router_logits")
def _router_logits(x: Tensor, weight: Tensor, *_: Any, out_val: Any = None) -> int:
    return 2 * x.shape[0] * weight.numel()


@_register("router_logits_backward")
def _router_logits_backward(grad: Tensor, x: Tensor, weight: Tensor, *_: Any, out_val: Any = None) -> int:
    return 4 * x.shape[0] * weight.numel()


# A topology is six tensors: row_indices, column_indices, offsets, ...


@_register("block_sdd")
def _block_sdd(a: Tensor, b: Tensor, *rest: Any, out_val: Any = None) -> int:
    return 2 * _last(rest[2], rest[0].shape[0]) * rest[6] ** 2 * a.shape[1]


@_register("block_dsd")
def _block_dsd(data: Tensor, *rest: Any, out_val: Any = None) -> int:
    return 2 * _last(rest[2], rest[0].shape[0]) * data.shape[-1] ** 2 * rest[7].shape[1]


@_register("block_dds")
def _block_dds(dense: Tensor, data: Tensor, *rest: Any, out_val: Any = None) -> int:
    return 2 * _last(rest[2], rest[0].shape[0]) * data.shape[-1] ** 2 * dense.shape[0]


def _tell_active_counters() -> None:
    """A counter copies the formulas when it is made, and this file may be loaded by the first call that it sees."""
    ours = {op: formula for op, formula in flop_registry.items() if str(op).startswith("dmoe.")}
    for mode in _get_current_dispatch_mode_stack():
        counter = getattr(mode, "counter", mode)
        if isinstance(counter, FlopCounterMode):
            counter.flop_registry.update(ours)


_tell_active_counters()
