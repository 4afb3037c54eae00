"""The expert that every token takes beside its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.experts import Experts
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.grouped_gemm_invariant import linear_invariant
from dmoe.ops.router_scores import router_scores
from dmoe.plan import device_tile_rows, plan_token_choice


class _Gate(nn.Linear):
    """A linear without a bias, whose bits do not depend on the number of threads on the CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """``(T, H)`` to ``(T, 1)``."""
        if x.device.type != "cpu":
            return super().forward(x)
        return grouped_gemm(x.unsqueeze(0), self.weight.unsqueeze(0))[0]


class SharedExpert(nn.Module):
    """One expert that every token takes beside its own (DeepSeekMoE), optionally scaled by ``sigmoid(x @ w)``.

    It runs through the same operation as the routed experts, so it saves as little.

    Args:
        config: ``shared_ffn_hidden_size``, ``shared_expert_gate`` and the expert options.
        device, dtype: of the parameters.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        assert config.shared_ffn_hidden_size is not None
        one = MoEConfig(
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.shared_ffn_hidden_size,
            num_experts=1,
            top_k=1,
            activation=config.activation,
            gated=config.gated,
            bias="expert" if config.bias == "expert" else "none",
            activation_dropout=config.activation_dropout,
            expert_dropout=config.expert_dropout,
            init_std=config.init_std,
            init=config.init,
            backend=None if config.backend == "block_sparse" else config.backend,  # a single expert is dense
            recompute_pre_activation=config.recompute_pre_activation,
            expert_compute=config.expert_compute,
            saved_activations=config.saved_activations,
            accumulate_main_grad=config.accumulate_main_grad,
            batch_invariant=config.batch_invariant,
        )
        self.mlp = Experts(one, routed=False, device=device, dtype=dtype)
        self.gate = (
            _Gate(config.hidden_size, 1, bias=False, device=device, dtype=dtype) if config.shared_expert_gate else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """``(T, H)`` to ``(T, H)``."""
        everyone = torch.zeros(x.shape[0], 1, dtype=torch.int32, device=x.device)
        dtype = accumulate_dtype(x.dtype)
        weight = torch.ones(x.shape[0], 1, dtype=dtype, device=x.device)
        if self.gate is not None and self.mlp.config.batch_invariant:
            with torch.autocast(x.device.type, enabled=False):
                logits = linear_invariant(x, self.gate.weight.to(x.dtype)).to(dtype)
            weight = router_scores(logits, "sigmoid", batch_invariant=True)[0]
        elif self.gate is not None:
            weight = torch.sigmoid(self.gate(x).to(dtype))
        tile_rows = device_tile_rows(x.device, x.shape[0], 1)
        return self.mlp(x, plan_token_choice(everyone, 1, tile_rows=tile_rows), weight)
