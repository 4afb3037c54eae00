"""fairseq's transformer layers with the MoE layer in place of ``fc1`` and ``fc2``; their ``forward`` is inherited.

The gate loss is an *output* of such a layer: with ``--checkpoint-activations`` the first forward runs without a graph,
and only what the layer returns is connected to the second one. A forward hook, which runs outside the checkpoint, takes
it off again, so that fairseq's loop over layers sees what it expects.
"""

from __future__ import annotations

from typing import Any

from fairseq.modules.fairseq_dropout import FairseqDropout
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase, TransformerEncoderLayerBase
from torch import Tensor, nn

from dmoe.integrations.fairseq_moe.flags import FlagError, MoEFlags
from dmoe.integrations.fairseq_moe.layer import MoELayer, feed_forward_dropouts


class _SparingDropout(FairseqDropout):
    """A layer's dropout, but for the experts' sum: they had theirs inside, before the combine."""

    spared: Tensor | None = None

    def forward(self, x: Tensor, inplace: bool = False) -> Tensor:
        """``(S, B, H)`` to the same."""
        if x is self.spared:
            self.spared = None
            return x
        return super().forward(x, inplace)


class _Experts:
    """What both layers share: the stock ``forward`` computes ``fc2(activation_fn(fc1(x)))``, and gets the MoE there."""

    moe_layer: MoELayer
    _padding: Tensor | None = None
    _gate_loss: Tensor | None = None

    def build_fc1(self, *sizes: Any) -> nn.Module:
        """A placeholder: stock constructors read the shapes of the two linears, nobody computes with them."""
        return nn.Linear(1, 1)

    build_fc2 = build_fc1

    def _put_experts(self: Any, flags: MoEFlags, cfg: Any, half: Any) -> None:
        if cfg.quant_noise.pq:
            raise FlagError("--quant-noise-pq: expected 0 in a model with MoE layers, whose experts have no such noise")
        dropout, activation_dropout = feed_forward_dropouts(cfg)
        self.moe_layer = MoELayer(
            flags, self.embed_dim, half.ffn_embed_dim, str(cfg.activation_fn), dropout, activation_dropout
        )
        self.fc1, self.fc2 = nn.Identity(), nn.Identity()
        self.activation_fn = self._through_experts
        self.activation_dropout_module.p = 0.0
        self.dropout_module = _SparingDropout(dropout, module_name=type(self).__name__)
        self.register_forward_hook(_set_gate_loss_aside)

    def _through_experts(self: Any, x: Tensor) -> Tensor:
        y, self._gate_loss = self.moe_layer(x, self._padding)
        self.dropout_module.spared = y
        return y

    def _taken_gate_loss(self: Any) -> Tensor:
        loss, self._gate_loss, self._padding = self._gate_loss, None, None
        return loss


class MoEDecoderLayer(_Experts, TransformerDecoderLayerBase):
    """A decoder layer with experts; see ``TransformerDecoderLayerBase``."""

    def __init__(self, cfg: Any, flags: MoEFlags, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, no_encoder_attn)
        self._put_experts(flags, cfg, cfg.decoder)

    def forward(self, x: Tensor, *args: Any, self_attn_padding_mask: Tensor | None = None, **kwargs: Any) -> Any:
        """What the stock layer returns, and the gate loss behind it."""
        self._padding = self_attn_padding_mask
        out = super().forward(x, *args, self_attn_padding_mask=self_attn_padding_mask, **kwargs)
        return (*out, self._taken_gate_loss())


class MoEEncoderLayer(_Experts, TransformerEncoderLayerBase):
    """An encoder layer with experts; see ``TransformerEncoderLayerBase``."""

    def __init__(self, cfg: Any, flags: MoEFlags, return_fc: bool = False) -> None:
        super().__init__(cfg, return_fc=return_fc)
        self._put_experts(flags, cfg, cfg.encoder)
        self.can_use_fastpath = False  # a fused dense layer
        for name in ("in_proj", "out_proj", "fc1", "fc2"):  # whose copies of the weights nobody needs here
            delattr(self, name + "_weight")
            delattr(self, name + "_bias")

    def _load_from_state_dict(self, *args: Any) -> None:
        nn.Module._load_from_state_dict(self, *args)  # the stock one fills those copies

    def forward(
        self, x: Tensor, encoder_padding_mask: Tensor | None = None, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """What the stock layer returns, and the gate loss behind it."""
        self._padding = encoder_padding_mask
        out = super().forward(x, encoder_padding_mask, attn_mask)
        out = out if isinstance(out, tuple) else (out,)
        return (*out, self._taken_gate_loss())


def _set_gate_loss_aside(layer: Any, _: Any, out: tuple[Any, ...]) -> Any:
    layer.gate_loss = out[-1]
    return out[:-1] if len(out) > 2 else out[0]


def take_gate_losses(layers: nn.ModuleList) -> list[Tensor]:
    """The gate losses of the last forward of these layers, once: they are forgotten, and their graphs with them."""
    # children(): iterating over a LayerDropModuleList would draw again which layers to drop.
    taken = [layer.__dict__.pop("gate_loss", None) for layer in layers.children()]
    return [loss for loss in taken if loss is not None]
