"""What stands in the place of a projection's parameter: its codes and scales as buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.expert_slice import ExpertSlice, local_part
from dmoe.ops.weight_formats import FORMATS
from dmoe.quantized_weight import QuantizedWeight

_TENSORS = ("codes", "scales", "zeros")


class QuantizedProjection(nn.Module):
    """One frozen projection of all experts, as codes.

    Its state dict has ``codes``, ``scales``, ``zeros`` where there are zero points, and ``format``: the format's name,
    block and order of rows as text, in bytes, so that codes of another format of the same shape are refused. Casts of
    the model (``to(dtype)``, ``half()``) leave all of them as they are; they follow the device.

    Args:
        weight: the value.
        dtype: what it was before, for :func:`dmoe.quant.dequantize`; None is PyTorch's default.
        owned: the part of all experts that the value is, under expert parallelism; None is all of them. Where it has a
            mesh the buffers are ``DTensor`` on it, as parameters are.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    format: Tensor
    requires_grad = False
    constant_buffers = True  # which nothing changes in a step: who restores a model copies none of them

    def __init__(
        self, weight: QuantizedWeight, dtype: torch.dtype | None = None, owned: ExpertSlice | None = None
    ) -> None:
        super().__init__()
        self.owned = owned
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.format_name, self.block, self.interleaved = weight.format, weight.block, weight.interleaved
        self.inner_shape = tuple(weight.shape[1:])
        for name in _TENSORS:
            tensor = getattr(weight, name)
            if tensor is not None and owned is not None:
                tensor = owned.distributed(tensor, None)
            self.register_buffer(name, tensor)
        text = list(self.text.encode())
        self.register_buffer("format", torch.tensor(text, dtype=torch.uint8, device=weight.device))

    @property
    def shape(self) -> torch.Size:
        """Of the weight that the codes stand for: of the whole, where they are ``DTensor``."""
        return torch.Size((self.codes.shape[0], *self.inner_shape))

    def value(self) -> QuantizedWeight:
        """What lives here of it."""
        codes, scales, zeros = (None if t is None else local_part(t) for t in (self.codes, self.scales, self.zeros))
        assert codes is not None
        assert scales is not None
        shape = (codes.shape[0], *self.inner_shape)
        return QuantizedWeight(codes, scales, self.format_name, shape, self.block, zeros, self.interleaved)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedProjection:
        """Where ``fn`` puts tensors, without the dtype that it gives them; decoded, the weights will have that."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        for name, tensor in self._buffers.items():
            if tensor is None:
                continue
            asked = fn(local_part(tensor).new_empty(0))
            self._buffers[name] = fn(tensor) if asked.dtype == tensor.dtype else tensor.to(asked.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """fp8 codes as bytes: PyTorch cannot read its own pickles of that dtype, but for ``torch.save``'s."""
        buffers = dict(self._buffers)
        if self.codes.dtype == torch.float8_e4m3fn and type(self.codes) is Tensor:
            buffers["codes"] = self.codes.view(torch.uint8)
        return {**self.__dict__, "_buffers": buffers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """The way back."""
        super().__setstate__(state)
        own = FORMATS[self.format_name].codes
        if self.codes.dtype != own:
            self._buffers["codes"] = self.codes.view(own)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        missing, errors = args[2], args[4]  # torch's lists; what is in the last is raised with strict=False, too
        name, codes = prefix.removesuffix("."), state_dict.get(prefix + "codes")
        if isinstance(codes, Tensor) and codes.dtype != self.codes.dtype:
            errors.append(f"{prefix}codes: expected {self.codes.dtype} for {self.text}, got {codes.dtype}")
            return
        there = state_dict.get(prefix + "format")
        if isinstance(there, Tensor) and not (there.is_meta or self.format.is_meta) and _text_of(there) != self.text:
            errors.append(f"{name}: expected codes of {self.text}, got {_text_of(there)}")
            return
        for each in _TENSORS:
            value, own = state_dict.get(prefix + each), getattr(self, each)
            if self.owned is not None and isinstance(value, Tensor) and own is not None:
                state_dict[prefix + each] = self.owned.part_of(value, own, None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if there is None and prefix + "format" in missing:
            missing.remove(prefix + "format")  # files of codes and scales alone will do

    @property
    def text(self) -> str:
        """What ``format`` holds."""
        rows, columns = self.block
        return f"{self.format_name} {rows}x{columns}{' interleaved' if self.interleaved else ''}"

    def extra_repr(self) -> str:
        """Format and sizes for ``print(model)``."""
        bits = 8 * self.value().nbytes / max(1, local_part(self.codes).shape[0] * self._numbers())
        zeros = "" if self.zeros is None else ", with zero points"
        return f"{self.text}, shape={tuple(self.shape)}{zeros}, {bits:.3g} bits a weight"

    def _numbers(self) -> int:
        """Of one expert."""
        return self.codes.shape[1] * self.codes.shape[2] * 8 // FORMATS[self.format_name].bits


def _text_of(tensor: Tensor) -> str:
    return bytes(tensor.tolist()).decode(errors="replace")
