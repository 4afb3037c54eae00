"""What routers draw, each kind of random number in one place, on the device; and the losses that are about it."""

from __future__ import annotations

import torch
from torch import Tensor

from dmoe.config import MoEConfig
from dmoe.losses import importance_loss, load_importance_loss, load_loss


def gaussian(like: Tensor) -> Tensor:
    """Standard normal numbers in the shape, dtype and place of ``like``."""
    return torch.randn_like(like)


def gumbel(like: Tensor) -> Tensor:
    """Gumbel(0, 1) numbers: the largest of ``logits + gumbel`` is a draw from their softmax (Gumbel 1954).

    In float32 at least, as :func:`uniform`: of the few numbers of bfloat16 many are equal, and ties are no chance.
    """
    return -torch.empty_like(like, dtype=_wide(like)).exponential_().log()


def uniform(like: Tensor) -> Tensor:
    """Numbers in [0, 1), in float32 at least."""
    return torch.rand_like(like, dtype=_wide(like))


def _wide(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def losses_of_noise(
    config: MoEConfig,
    clean: Tensor,
    noisy: Tensor,
    scores: Tensor,
    noise_std: float,
    groups: int,
    token_mask: Tensor | None,
    training: bool = True,
) -> dict[str, Tensor]:
    """``importance``, ``load`` and ``load_importance`` by name, as far as a config names them.

    Args:
        config: names and K.
        clean, noisy: logits ``(T, E)``, one tensor where there is no noise.
        scores: ``(T, E)``, of the noisy ones.
        noise_std: E times the standard deviation of the noise.
        groups: of consecutive tokens, each with losses of its own.
        token_mask: ``(T,)`` bool.
        training: whether a mask that a loss does not know is an error; in evaluation, where nobody adds losses to
            anything, that loss is left out.
    """
    found: dict[str, Tensor] = {}
    if config.has_loss("importance"):
        wide = torch.promote_types(clean.dtype, torch.float32)
        probs = scores if clean is noisy else torch.softmax(clean.to(wide), -1)
        found["importance"] = importance_loss(probs, groups, token_mask)
    if config.has_loss("load") and clean is not noisy:  # V-MoE has none without noise
        found["load"] = load_loss(clean, noisy, config.top_k, noise_std, groups, token_mask)
    if config.has_loss("load_importance") and (training or token_mask is None):
        if token_mask is not None:
            raise ValueError("MoE: token_mask: expected None with the loss 'load_importance', whose sums know no mask")
        found["load_importance"] = load_importance_loss(clean, noisy, config.top_k, noise_std)
    return found
