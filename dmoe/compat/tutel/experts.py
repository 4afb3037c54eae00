"""Experts with Tutel's parameters, in its names and shapes, read where they lie."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.compat.tutel.arguments import ExpertOptions
from dmoe.config import MoEConfig
from dmoe.expert_slice import ExpertSlice
from dmoe.expert_weights import ExpertWeights
from dmoe.experts import Experts


class TutelExperts(Experts):
    """dmoe's experts, whose own parameters give way to others that hold the same numbers.

    Args:
        config: of the layer.
        options: the user's.
        owned: what lives on this rank; None is all experts.
    """

    def __init__(self, config: MoEConfig, options: ExpertOptions, *, owned: ExpertSlice | None) -> None:
        super().__init__(config, owned=owned, device="meta")
        for name in [*self._parameters]:
            del self._parameters[name]
        experts, width, hidden = len(self.owned.experts), self.ffn_sizes[0], config.hidden_size
        for name, shape in self.shapes(options, experts, width, hidden).items():
            self.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape)))
        self.mark_parameters()
        self.reset_parameters()
        self.seed = None  # ranks may seed differently, as Tutel's examples do

    @staticmethod
    def shapes(options: ExpertOptions, experts: int, width: int, hidden: int) -> dict[str, tuple[int, ...] | None]:
        """Tutel's parameters, in its order; None for a bias that is not there."""
        raise NotImplementedError

    def mark_parameters(self) -> None:
        """Also as Tutel marks them."""
        super().mark_parameters()
        for parameter in self.parameters():
            parameter._tutel_expert = True  # type: ignore[attr-defined]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, parameter in self.named_parameters():
            key = prefix + name
            value = state_dict.get(key)
            if value is None and name.endswith("bias"):
                warnings.warn(f"moe_layer: {key}: not in the state dict, zeros are loaded, as in Tutel", stacklevel=2)
                state_dict[key] = torch.zeros_like(parameter)
            elif isinstance(value, Tensor) and value.numel() == parameter.numel():
                state_dict[key] = value.view(parameter.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class FfnExperts(TutelExperts):
    """``ffn``: ``act(x @ batched_fc1_w.T + batched_fc1_bias) @ batched_fc2_w + batched_fc2_bias``, for each expert."""

    batched_fc1_w: nn.Parameter
    batched_fc2_w: nn.Parameter
    batched_fc1_bias: nn.Parameter | None
    batched_fc2_bias: nn.Parameter | None

    @staticmethod
    def shapes(options: ExpertOptions, experts: int, width: int, hidden: int) -> dict[str, tuple[int, ...] | None]:
        """See :class:`TutelExperts`."""
        return {
            "batched_fc1_w": (experts, width, hidden),
            "batched_fc2_w": (experts, width, hidden),
            "batched_fc1_bias": (experts, width) if options.bias1 else None,
            "batched_fc2_bias": (experts, hidden) if options.bias2 else None,
        }

    def weights(self) -> ExpertWeights:
        """What lives here of the parameters, as one value."""
        return ExpertWeights(
            up_proj=self.batched_fc1_w,
            down_proj=self.batched_fc2_w.transpose(1, 2),
            up_bias=self.batched_fc1_bias,
            down_bias=self.batched_fc2_bias,
            gated=False,
        )

    def _shard_dim(self, name: str) -> int | None:
        return None if name == "batched_fc2_bias" else 1


class LlamaExperts(TutelExperts):
    """``llama_ffn``: ``(act(x @ W_fc1) * (x @ W_fc2)) @ W_fc3`` for each expert, each parameter flat."""

    W_fc1: nn.Parameter
    W_fc2: nn.Parameter
    W_fc3: nn.Parameter

    @staticmethod
    def shapes(options: ExpertOptions, experts: int, width: int, hidden: int) -> dict[str, tuple[int, ...] | None]:
        """See :class:`TutelExperts`."""
        return dict.fromkeys(("W_fc1", "W_fc2", "W_fc3"), (experts * width * hidden,))

    def weights(self) -> ExpertWeights:
        """What lives here of the parameters, as one value."""
        shape = (len(self.owned.experts), self.config.hidden_size, self.ffn_sizes[0])
        return ExpertWeights(
            up_proj=self.W_fc2.view(shape).transpose(1, 2),
            gate_proj=self.W_fc1.view(shape).transpose(1, 2),
            down_proj=self.W_fc3.view(shape[0], shape[2], shape[1]).transpose(1, 2),
        )

    def _shard_dim(self, name: str) -> int | None:
        return None

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        here, everywhere = self.owned.experts, self.config.num_experts
        for name, parameter in self.named_parameters():
            value = state_dict.get(prefix + name)
            if isinstance(value, Tensor) and value.numel() * len(here) == parameter.numel() * everywhere:
                state_dict[prefix + name] = value.view(everywhere, -1)[here.start : here.stop].reshape(-1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
