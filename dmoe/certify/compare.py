"""Whether a kernel's results are right: as near to the exact ones as PyTorch's own in that dtype, and repeatable."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The rule of the tests (twice PyTorch's own error) with room for a draw in which PyTorch was lucky.
FACTOR, ULPS = 4.0, 8.0

Results = Mapping[str, Tensor]


class Run(NamedTuple):
    """One call to check.

    Attributes:
        label: what it is, for the report.
        kernel, reference: called with ``arguments``; results by name, of which only what is defined.
        arguments: of the call; neither writes into them.
    """

    label: str
    kernel: Callable[..., Results]
    reference: Callable[..., Results]
    arguments: tuple[Any, ...]


def judge(run: Run) -> str:
    """What is wrong, ``""`` if nothing is."""
    exact = run.reference(*map(_widened, run.arguments))
    own = run.reference(*run.arguments)
    got = run.kernel(*run.arguments)
    again = run.kernel(*run.arguments)
    for name, result in got.items():
        if result.shape != exact[name].shape:
            return f"{run.label}: {name}: expected shape {tuple(exact[name].shape)}, got {tuple(result.shape)}"
        if not torch.equal(_bits(result), _bits(again[name])):
            return f"{run.label}: {name}: two runs gave different bits"
        if not result.is_floating_point():
            if not torch.equal(result, exact[name]):
                wrong = int((result != exact[name]).sum())
                return f"{run.label}: {name}: {wrong} of {result.numel()} integers are wrong"
            continue
        found, theirs = row_error(result, exact[name]), row_error(own[name], exact[name])
        bound = FACTOR * theirs + ULPS * torch.finfo(result.dtype).eps
        if not found <= bound:  # NaN is no error within a bound either
            return (
                f"{run.label}: {name}: the worst row is off by {found:.1e} of its norm, PyTorch's own operations by "
                f"{theirs:.1e}"
            )
    return ""


def row_error(result: Tensor, exact: Tensor) -> float:
    """The largest distance of a row, over its norm, where that is not far below the usual."""
    if not exact.numel():
        return 0.0
    rows, true = (tensor.reshape(-1, tensor.shape[-1] if tensor.dim() else 1).double() for tensor in (result, exact))
    norms = true.norm(dim=1)
    usual = norms[norms > 0]
    floor = 0.1 * float(usual.median()) if usual.numel() else 1.0
    return float(((rows - true).norm(dim=1) / norms.clamp_min(floor)).max())


def _bits(tensor: Tensor) -> Tensor:
    """So that NaN equals NaN."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.element_size()]) if tensor.is_floating_point() else tensor


def _widened(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
