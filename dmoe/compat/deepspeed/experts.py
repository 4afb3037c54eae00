"""Experts that begin as copies of one module, and are saved one by one under its names, as DeepSpeed saves them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.dense_ffn import DenseFFN
from dmoe.expert_slice import ExpertSlice
from dmoe.experts import Experts
from dmoe.upcycle import copy_into_experts, copy_requires_grad

_STACK = "deepspeed_experts."


@dataclass(frozen=True)
class Entry:
    """One tensor of the module that experts are copies of, and where it lies in a stack of dmoe's.

    Attributes:
        name: in the module.
        parameter: the stack: ``up_proj``, ``gate_up_proj``, ``down_proj`` or their biases.
        half: 0 for the gate and 1 for up, where the stack holds both and this is one of them.
        fused: it is both, ``gate`` or ``up`` first; None where it is one projection.
        transposed: it is a matrix [in, out].
    """

    name: str
    parameter: str
    half: int | None = None
    fused: str | None = None
    transposed: bool = False

    def theirs(self, of_expert: Tensor) -> Tensor:
        """The module's tensor, of an expert's part of the stack: a view where it can be one."""
        tensor = of_expert if self.half is None else of_expert[self.half]
        if self.fused is not None:
            tensor = (tensor if self.fused == "gate" else tensor.flip(0)).flatten(0, 1)
        return tensor.t() if self.transposed else tensor

    def write(self, of_expert: Tensor, value: Tensor) -> None:
        """The other way: the module's tensor into an expert's part of the stack."""
        target = of_expert if self.half is None else of_expert[self.half]
        value = value.t() if self.transposed else value
        if self.fused is not None:
            value = value.unflatten(0, (2, -1))
            value = value if self.fused == "gate" else value.flip(0)
        target.copy_(value)


def entries_of(expert: nn.Module, ffn: DenseFFN) -> list[Entry]:
    """Every tensor of a feed-forward block, in the order of its state dict."""
    names = {id(module): name for name, module in expert.named_modules()}
    up = "gate_up" if ffn.gated else "up"
    found = []
    for linear in ffn.linears:
        stack = "down" if linear is ffn.down else up
        half = None if ffn.gate is None or linear is ffn.down else int(linear is ffn.up)
        fused = ffn.fused if linear is ffn.up else None
        transposed = not isinstance(linear, nn.Linear)
        prefix = names[id(linear)]
        prefix = prefix + "." if prefix else ""
        found.append(Entry(f"{prefix}weight", f"{stack}_proj", half, fused, transposed))
        if linear.bias is not None:
            found.append(Entry(f"{prefix}bias", f"{stack}_bias", half, fused))
    order = {name: position for position, name in enumerate(expert.state_dict())}
    return sorted(found, key=lambda entry: order[entry.name])


class DeepSpeedExperts(Experts):
    """The experts of one rank, all equal to begin with, whose state is ``deepspeed_experts.{n}.<the module's names>``.

    ``n`` counts the experts of this rank, as in DeepSpeed. A state dict with as many as there are on all ranks is taken
    for all of them.

    Args:
        config: of the layer.
        expert: the module that each of them begins as.
        ffn: what it computes.
        owned: what lives here; None is all experts.
        group_name: that DeepSpeed finds on the parameters of a group of ranks.
    """

    group_name: str = ""

    def __init__(
        self, config: MoEConfig, expert: nn.Module, ffn: DenseFFN, *, owned: ExpertSlice | None, group_name: str
    ) -> None:
        weight = ffn.down_proj()
        super().__init__(config, owned=owned, device="meta", dtype=weight.dtype)
        self.entries = entries_of(expert, ffn)
        self.group_name = group_name
        for name in (self.up_bias_name, "down_bias"):  # a bias that the module has not is none here
            if name not in {entry.parameter for entry in self.entries}:
                self.register_parameter(name, None)
        self.to_empty(device=weight.device)
        copy_into_experts(ffn, self)
        copy_requires_grad(ffn, self)

    def mark_parameters(self) -> None:
        """Also by ``group_name``."""
        super().mark_parameters()
        for parameter in self.parameters() if self.distributed else ():
            parameter.group_name = self.group_name  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for expert in range(len(self.owned.experts)):
            for entry in self.entries:
                stack: Tensor = getattr(self, entry.parameter)
                stack = stack if keep_vars else stack.detach()
                destination[f"{prefix}{_STACK}{expert}.{entry.name}"] = entry.theirs(stack[expert])

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = prefix + _STACK
        there = {key[len(start) :].partition(".")[0] for key in state_dict if key.startswith(start)}
        whole = len(there) == self.config.num_experts > len(self.owned.experts)
        first = self.owned.experts.start if whole else 0
        if whole and self.owned.share_overflow is None:
            error_msgs.append(
                f"{start}*: expected the {len(self.owned.experts)} experts of this rank, or a layer that knows its "
                f"ranks, got {len(there)}: call set_deepspeed_parallelism before"
            )
        for name in dict.fromkeys(entry.parameter for entry in self.entries):
            keys = {
                (expert, entry): f"{start}{first + expert}.{entry.name}"
                for expert in range(len(self.owned.experts))
                for entry in self.entries
                if entry.parameter == name
            }
            missing_keys += [key for key in keys.values() if key not in state_dict]
            state_dict[prefix + name] = self._stacked(getattr(self, name), keys, state_dict, error_msgs)
        if whole:
            for key in [key for key in state_dict if key.startswith(start)]:
                del state_dict[key]  # those of other ranks
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _stacked(
        self,
        current: Tensor,
        keys: dict[tuple[int, Entry], str],
        state_dict: dict[str, Any],
        error_msgs: list[str],
    ) -> Tensor:
        """A stack of what a state dict, which loses it, has; the rest as it is now."""
        values = {place: state_dict.pop(key) for place, key in keys.items() if key in state_dict}
        if not values:
            return current.detach()
        one = next(iter(values.values()))
        stack = torch.empty(current.shape, dtype=one.dtype, device=one.device)
        if len(values) < len(keys) and not current.is_meta:
            stack.copy_(current.detach())
        for (expert, entry), value in values.items():
            expected = entry.theirs(stack[expert]).shape
            if value.shape == expected:
                entry.write(stack[expert], value)
            else:
                error_msgs.append(
                    f"size mismatch for {keys[expert, entry]}: expected {tuple(expected)}, got {tuple(value.shape)}"
                )
        return stack

    def extra_repr(self) -> str:
        """The names of one expert's tensors, too."""
        return f"{super().extra_repr()}, each saved as {_names(self.entries)}"


def _names(entries: Sequence[Entry]) -> str:
    return ", ".join(entry.name for entry in entries)
