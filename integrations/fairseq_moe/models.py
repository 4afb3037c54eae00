"""fairseq's transformer models with MoE layers, under their own names: every ``--arch`` of theirs stays."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from fairseq import models as registries
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import transformer_lm
from fairseq.models.transformer import TransformerConfig, TransformerDecoder, TransformerModel
from fairseq.models.transformer.transformer_decoder import TransformerDecoderBase
from fairseq.models.transformer.transformer_encoder import TransformerEncoderBase
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from fairseq.utils import safe_getattr
from torch import nn

from dmoe.integrations.fairseq_moe.flags import (
    EncoderDecoderFlags,
    FlagError,
    MoEFlags,
    has_moe_layers,
    read_flags,
)
from dmoe.integrations.fairseq_moe.modules import MoEDecoderLayer, MoEEncoderLayer, take_gate_losses


def _wrapped(layer: nn.Module, cfg: Any) -> nn.Module:
    if cfg.checkpoint_activations:
        return checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
    return layer


class _MoEDecoding:
    """A decoder some of whose layers have experts. Mixed into fairseq's two decoder classes."""

    layers: nn.ModuleList

    def __init__(self, args: Any, *rest: Any, **kwargs: Any) -> None:
        self.moe_flags, self._built = read_flags(args), 0
        if safe_getattr(args, "scale_fc", False):
            raise FlagError("--scale-fc: expected none in a model with MoE layers, whose experts have no such norm")
        super().__init__(args, *rest, **kwargs)  # type: ignore[call-arg]

    def build_decoder_layer(self, args: Any, no_encoder_attn: bool = False) -> nn.Module:
        """The next layer from below; fairseq does not say which one it is."""
        flags = self.moe_flags
        self._built += 1
        every = max(flags.decoder_moe_freq, flags.moe_freq)
        if not every or self._built % every:
            return super().build_decoder_layer(args, no_encoder_attn)  # type: ignore[misc]
        cfg = TransformerConfig.from_namespace(args)
        if flags.alternate_decoder_ffn_embed_dim:
            cfg = copy.deepcopy(cfg)
            cfg.decoder.ffn_embed_dim = flags.alternate_decoder_ffn_embed_dim
            return super().build_decoder_layer(cfg, no_encoder_attn)  # type: ignore[misc]
        return _wrapped(MoEDecoderLayer(cfg, flags, no_encoder_attn), cfg)

    def extract_features_scriptable(
        self, prev_output_tokens: Any, encoder_out: Any, *rest: Any, **kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        """As the stock decoder, with the gate losses of encoder and decoder in ``extra["l_aux"]``."""
        x, extra = super().extract_features_scriptable(  # type: ignore[misc]
            prev_output_tokens, encoder_out, *rest, **kwargs
        )
        of_encoder = [] if encoder_out is None else encoder_out.get("l_aux", [])
        return x, {**extra, "l_aux": [*of_encoder, *take_gate_losses(self.layers)]}


class MoEDecoder(_MoEDecoding, TransformerDecoderBase):
    """The decoder of encoder-decoder models."""


class MoELanguageModelDecoder(_MoEDecoding, TransformerDecoder):
    """The decoder of language models, whose arguments are flat."""


class MoEEncoder(TransformerEncoderBase):
    """An encoder some of whose layers have experts."""

    def __init__(self, cfg: Any, *rest: Any, **kwargs: Any) -> None:
        self.moe_flags, self._built = read_flags(cfg), 0
        super().__init__(cfg, *rest, **kwargs)
        for layer in self.layers.children():
            layer.can_use_fastpath = False  # it would hand nested tensors to the layers with experts

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        """The next layer from below."""
        flags = self.moe_flags
        self._built += 1
        every = max(flags.encoder_moe_freq, flags.moe_freq)
        if not every or self._built % every:
            return super().build_encoder_layer(cfg)
        if flags.alternate_ffn_embed_dim:
            cfg = copy.deepcopy(cfg)
            cfg.encoder.ffn_embed_dim = flags.alternate_ffn_embed_dim
            return super().build_encoder_layer(cfg)
        return _wrapped(MoEEncoderLayer(cfg, flags, return_fc=self.return_fc), cfg)

    def forward_scriptable(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As the stock encoder, with its gate losses under ``l_aux``."""
        out = super().forward_scriptable(*args, **kwargs)
        return {**out, "l_aux": take_gate_losses(self.layers)}


@dataclass
class MoELanguageModelConfig(TransformerLanguageModelConfig, MoEFlags):
    """Options of ``transformer_lm`` and ``--moe-*``."""


class MoETransformerLanguageModel(TransformerLanguageModel):
    """``transformer_lm`` with ``--moe-*``."""

    @classmethod
    def build_model(cls, args: Any, task: Any) -> Any:
        """A model from arguments; the stock one without ``--moe-freq``."""
        flags = read_flags(args)
        if not flags.moe_freq:
            return super().build_model(args, task)
        with _decoder_of_language_models(MoELanguageModelDecoder):
            return super().build_model(args, task)


class MoETransformerModel(TransformerModel):
    """``transformer`` with ``--moe-*``, ``--encoder-moe-freq`` and ``--decoder-moe-freq``."""

    @classmethod
    def add_args(cls, parser: Any) -> None:
        """The stock flags and those of this package."""
        super().add_args(parser)
        gen_parser_from_dataclass(parser, EncoderDecoderFlags(), delete_default=True)

    @classmethod
    def build_encoder(cls, args: Any, src_dict: Any, embed_tokens: Any) -> Any:
        """The encoder; the stock one without MoE layers."""
        cfg = TransformerConfig.from_namespace(args)
        flags = read_flags(cfg)
        if not max(flags.encoder_moe_freq, flags.moe_freq):
            return super().build_encoder(cfg, src_dict, embed_tokens)
        return MoEEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, args: Any, tgt_dict: Any, embed_tokens: Any) -> Any:
        """The decoder; one that also hands on the encoder's gate losses when there are any."""
        cfg = TransformerConfig.from_namespace(args)
        flags = read_flags(cfg)
        if not has_moe_layers(flags):
            return super().build_decoder(cfg, tgt_dict, embed_tokens)
        return MoEDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


@contextmanager
def _decoder_of_language_models(decoder: type) -> Iterator[None]:
    """``TransformerLanguageModel.build_model`` names its decoder's class as a global of its module."""
    stock = transformer_lm.TransformerDecoder
    transformer_lm.TransformerDecoder = decoder
    try:
        yield
    finally:
        transformer_lm.TransformerDecoder = stock


def register() -> None:
    """Put the two models where the stock ones were registered; a second call does nothing."""
    _take_over("transformer_lm", MoETransformerLanguageModel, MoELanguageModelConfig)
    _take_over("transformer", MoETransformerModel, None)


def _take_over(name: str, model: type, config: type | None) -> None:
    if registries.MODEL_REGISTRY[name] is model:
        return
    archs = {arch: registries.ARCH_CONFIG_REGISTRY[arch] for arch in registries.ARCH_MODEL_INV_REGISTRY.pop(name)}
    del registries.MODEL_REGISTRY[name]
    registries.MODEL_DATACLASS_REGISTRY.pop(name, None)
    for arch in archs:
        for registry in (
            registries.ARCH_MODEL_REGISTRY,
            registries.ARCH_MODEL_NAME_REGISTRY,
            registries.ARCH_CONFIG_REGISTRY,
        ):
            del registry[arch]
    registries.register_model(name, dataclass=config)(model)
    for arch, configure in archs.items():
        if arch not in registries.ARCH_CONFIG_REGISTRY:
            registries.register_model_architecture(name, arch)(configure)
