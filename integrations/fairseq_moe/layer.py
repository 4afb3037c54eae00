"""The MoE layer of a fairseq model: dmoe's layer with the branch's gate, and the branch's names in checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.fairseq_moe import names
from dmoe.integrations.fairseq_moe.exchange_timer import ExchangeTimer
from dmoe.integrations.fairseq_moe.flags import FlagError, MoEFlags
from dmoe.integrations.fairseq_moe.gate import Gate, gate_fields
from dmoe.integrations.fairseq_moe.parallel import expert_groups
from dmoe.integrations.fairseq_moe.statistics import NAMES, OF_CHOICES
from dmoe.integrations.naming import by_flags

Activation = Literal["gelu", "gelu_tanh", "relu", "silu"]
_ACTIVATIONS: dict[str, Activation] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "swish": "silu",
}
# Whose values the config checks; the others are checked as flags.
_FLAGS = {
    "expert_dropout": "--dropout",
    "activation_dropout": "--activation-dropout",
    "ffn_hidden_size": "--moe-expert-ffn-dim, --encoder-ffn-embed-dim or --decoder-ffn-embed-dim",
}


class MoELayer(nn.Module):
    """A layer's feed-forward half: gate, experts, and dropout inside each expert.

    Parameters are dmoe's (all experts of a rank in one tensor); ``state_dict()`` and ``load_state_dict()`` speak the
    branch's names, ``gate.wg.weight`` and ``experts.{local}.fc1|fc2.{weight,bias}``. With several ranks the experts are
    spread over fairseq's data-parallel group.

    Args:
        flags: what ``--moe-*`` said.
        embed_dim: H.
        ffn_dim: F, unless ``--moe-expert-ffn-dim`` gives one.
        activation: ``--activation-fn``.
        dropout, activation_dropout: probabilities inside the experts.
    """

    def __init__(
        self,
        flags: MoEFlags,
        embed_dim: int,
        ffn_dim: int,
        activation: str,
        dropout: float,
        activation_dropout: float,
    ) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise FlagError(f"--activation-fn: expected one of {known} in a MoE layer, got {activation!r}")
        with by_flags(_FLAGS, "", FlagError):
            config = dmoe.MoEConfig(
                hidden_size=embed_dim,
                ffn_hidden_size=flags.moe_expert_ffn_dim or ffn_dim,
                num_experts=flags.moe_expert_count,
                activation=_ACTIVATIONS[activation],
                gated=False,
                bias="expert",
                expert_dropout=float(dropout),
                activation_dropout=float(activation_dropout),
                expert_grad_scale="mean" if flags.moe_normalize_expert_grad == "world_size" else "sqrt_world_size",
                **gate_fields(flags),
            )
        self.flags = flags
        self.moe = dmoe.MoE(
            config,
            router_module=Gate(config, flags),
            ep_group=expert_groups(flags.moe_expert_count).ep_group,
            dtensor=False,
            attach_losses=_left_to_the_criterion,
        )
        timed = flags.record_a2a_perf_stats and isinstance(self.moe.dispatcher, dmoe.parallel.AllToAllDispatcher)
        self.timer = ExchangeTimer(self.moe.dispatcher) if timed else None
        names.speak_as_the_branch(self)

    @property
    def gate(self) -> Gate:
        """The layer's router."""
        gate = self.moe.router
        assert isinstance(gate, Gate)
        return gate

    def forward(self, x: Tensor, padding: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Every token through its experts.

        Args:
            x: ``(S, B, H)``, time first as fairseq's layers have it.
            padding: ``(B, S)`` bool, True for padding, looked at with ``--use-moe-pad-mask``.

        Returns:
            ``(S, B, H)``, and the gate loss, scalar float32.
        """
        gate = self.gate
        ordered = not self.flags.moe_dropless  # the branch counts a capacity sentence by sentence
        mask = None
        if padding is not None and self.flags.use_moe_pad_mask:
            mask = ~(padding if ordered else padding.t())
        y = self.moe(x.transpose(0, 1) if ordered else x, token_mask=mask)
        routing, gate.routing = gate.routing, None
        assert isinstance(y, Tensor)
        assert routing is not None
        loss = self.moe.router_losses(routing)
        assert loss is not None
        return (y.transpose(0, 1) if ordered else y), loss

    @torch.no_grad()
    def statistics(self) -> Tensor | None:
        """The last forward's figures in the order of ``statistics.NAMES``, ``(11,)`` float32; None before the first."""
        metrics, of_choices = self.moe.last_metrics, self.gate.statistics
        if metrics is None or of_choices is None:
            return None
        figures = dict(zip(OF_CHOICES, of_choices.unbind(), strict=True))
        figures["entropy_gating"] = metrics.entropy.to(of_choices)
        if self.timer is not None:
            times = of_choices.new_tensor(self.timer.take())
            figures |= {"all_to_all_cpu_time_ms": times[0], "all_to_all_cuda_time_ms": times[1]}
        none = of_choices.new_zeros(())
        return torch.stack([figures.get(name, none) for name in NAMES])


def _left_to_the_criterion(y: Tensor, routing: dmoe.Routing) -> Tensor:
    """The loss is an output of the layer, and hangs on nothing."""
    return y


def moe_layers(model: nn.Module) -> Iterator[MoELayer]:
    """Every MoE layer of a fairseq model, in order."""
    return (module for module in model.modules() if isinstance(module, MoELayer))


def feed_forward_dropouts(cfg: Any) -> tuple[float, float]:
    """Dropout on an expert's output and after its activation, as fairseq's layers read them off a config."""
    return float(cfg.dropout), float(cfg.activation_dropout or cfg.relu_dropout or 0)
