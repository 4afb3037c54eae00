"""MoEGPT: a small decoder-only transformer. READ ``MoEGPT.features`` FIRST: it is the flow."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dmoe.layer import MoE
from dmoe.models.attention import Attention, Reading, Rotary
from dmoe.models.cache import KeyValueCache
from dmoe.models.config import MoEGPTConfig
from dmoe.models.ffn import build_ffn, depends_on_others, of_each_sequence


class Block(nn.Module):
    """Pre-norm: each half reads a normalised stream and adds to the plain one."""

    def __init__(self, config: MoEGPTConfig, layer: int, ffn: nn.Module, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.layer, self.separate = layer, depends_on_others(config.moe.get(layer))
        self.attention_norm = _norm(config, device, dtype)
        self.attention = Attention(config, device, dtype)
        self.ffn_norm = _norm(config, device, dtype)
        self.ffn = ffn

    def forward(self, x: Tensor, reading: Reading, token_ids: Tensor) -> Tensor:
        """``(B, S, H)`` to the same; ``token_ids (B, S)`` are those by which hash layers route."""
        x = x + self.attention(self.attention_norm(x), reading, self.layer)
        normed, mask = self.ffn_norm(x), reading.token_mask
        if mask is None:
            return x + self.ffn(normed, token_ids=token_ids)
        if self.separate:
            return x + of_each_sequence(self.ffn, normed, mask, token_ids)
        return x + self.ffn(normed, token_mask=mask, token_ids=token_ids)


class MoEGPT(nn.Module):
    """A GPT-2-like decoder whose FFNs are dense, :class:`dmoe.MoE`, or both (PR-MoE).

    With the config's defaults and ``moe`` layers of ``MoEConfig(..., top_k=1, gated=False, activation="gelu_tanh",
    bias="expert")`` it computes what Megatron-DeepSpeed trains and FasterTransformer runs. ``dmoe.aux_loss(model)``
    after a training forward balances its experts; :func:`dmoe.models.generate` continues texts.

    Args:
        config: what the model is.
        device, dtype: of the parameters, as in ``nn.Linear``; ``meta`` for a model that is loaded afterwards.
        of_moe: what each :class:`dmoe.MoE` takes besides its config, as ``ep_group``.

    Attributes:
        config: as given.
    """

    def __init__(
        self,
        config: MoEGPTConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **of_moe: Any,
    ) -> None:
        super().__init__()
        if not isinstance(config, MoEGPTConfig):
            raise TypeError(f"MoEGPT: config: expected a MoEGPTConfig, got {type(config).__name__}")
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        # First, so that what an FFN draws does not depend on what the rest is made of.
        ffns = [build_ffn(config, layer, **where, **of_moe) for layer in range(config.num_layers)]
        V, H = config.vocab_size, config.hidden_size
        self.embedding = nn.Embedding(V, H, **where)
        self.positions: nn.Embedding | None = None
        self.rotary: Rotary | None = None
        if config.positions == "learned":
            self.positions = nn.Embedding(config.max_positions, H, **where)
        else:
            self.rotary = Rotary(config.max_positions, config.head_size, device)
        self.blocks = nn.ModuleList(Block(config, layer, ffn, **where) for layer, ffn in enumerate(ffns))
        self.norm = _norm(config, device, dtype)
        self.head = None if config.tied_head else nn.Linear(H, V, bias=False, **where)
        with torch.no_grad():  # Embeddings of variance 1 would make logits of variance H, and drown positions
            if config.tied_head:
                self.embedding.weight.normal_(std=H**-0.5)
            if self.positions is not None:
                self.positions.weight.normal_(std=H**-0.5 if config.tied_head else 0.02)

    def forward(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Logits of the next token at every position, ``(B, S, V)``; arguments as :meth:`features` takes them."""
        return self.logits(self.features(tokens, token_mask=token_mask, cache=cache))

    def features(
        self, tokens: Tensor, *, token_mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """What the output head reads.

        Args:
            tokens: ``(B, S)`` int64 ids in [0, V). Masked ones may be any id.
            token_mask: ``(B, S)`` bool, False for padding, which stands behind a sequence's tokens. It is seen by no
                token and takes no expert. Layers with a capacity, or whose experts choose, see each sequence alone.
            cache: of the B sequences: the tokens go on where it ends, and are kept in it.

        Returns:
            ``(B, S, H)``, normalised; anything at masked tokens.

        Raises:
            ValueError: tokens or mask of another shape or type; more tokens than ``max_positions``, or the cache's
                capacity.
        """
        self._check(tokens, token_mask, cache)
        S = tokens.shape[1]
        positions = None if cache is None else cache.positions(S)
        x = self.embedding(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(S, device=tokens.device) if positions is None else positions)
        turn = None if self.rotary is None else self.rotary(positions, S, x)
        visible = None
        if cache is not None and positions is not None and cache.reach:
            slots = torch.arange(cache.reach + S, device=tokens.device)
            visible = (slots <= positions[:, :, None])[:, None]
        reading = Reading(positions, turn, token_mask, cache, visible)
        for block in self.blocks:
            x = block(x, reading, tokens)
        if cache is not None:
            cache.advance(S, token_mask)
        return self.norm(x)

    def logits(self, features: Tensor) -> Tensor:
        """``(..., H)`` of :meth:`features` to ``(..., V)``."""
        return F.linear(features, self.embedding.weight) if self.head is None else self.head(features)

    def new_cache(self, batch_size: int, capacity: int) -> KeyValueCache:
        """An empty cache for this model, where and in the type that its parameters are."""
        like = self.embedding.weight
        return KeyValueCache(self.config, batch_size, capacity, device=like.device, dtype=like.dtype)

    @property
    def moe_layers(self) -> list[MoE]:
        """The mixture layers from input to output."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    def _check(self, tokens: Tensor, token_mask: Tensor | None, cache: KeyValueCache | None) -> None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"MoEGPT: tokens: expected (B, S) of int64, got {tuple(tokens.shape)} of {tokens.dtype}")
        if token_mask is not None and (token_mask.shape != tokens.shape or token_mask.dtype != torch.bool):
            raise ValueError(
                f"MoEGPT: token_mask: expected {tuple(tokens.shape)} of torch.bool, got {tuple(token_mask.shape)} of "
                f"{token_mask.dtype}"
            )
        if cache is not None and len(cache.lengths) != len(tokens):
            raise ValueError(f"MoEGPT: cache: expected one of {len(tokens)} sequences, got {len(cache.lengths)}")
        if cache is None and tokens.shape[1] > self.config.max_positions:
            raise ValueError(
                f"MoEGPT: tokens: expected at most max_positions = {self.config.max_positions} of them, got "
                f"{tokens.shape[1]}"
            )


def _norm(config: MoEGPTConfig, device: Any, dtype: Any) -> nn.Module:
    if config.norm == "rms":
        return nn.RMSNorm(config.hidden_size, eps=config.norm_eps, device=device, dtype=dtype)
    assert config.norm_eps is not None
    return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.bias, device=device, dtype=dtype)
