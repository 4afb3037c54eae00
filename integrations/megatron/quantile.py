"""Megatron's ``quantile_balancing``: the bias of dmoe's router under Megatron's names.

Megatron subtracts ``qb_beta`` from the logits, dmoe adds its bias to them: ``qb_beta = -bias``. The step that Megatron
takes after each global batch, to ``ema * beta + (1 - ema) * accum / count`` less its mean, is the same for both signs:
it is given the bias, and what was counted for it, as dmoe has them. Files hold ``qb_beta``, of either layer.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_OWN, _MEGATRONS = "selection_bias", "qb_beta"


class QuantileBias:
    """The bias of a router with ``selection_bias_rule="quantile"``, whose states say ``qb_beta`` from here on.

    Args:
        router: dmoe's.
    """

    def __init__(self, router: Any) -> None:
        self.router = router
        router.register_state_dict_post_hook(_as_megatron_has_it)
        router.register_load_state_dict_pre_hook(_as_dmoe_has_it)

    @property
    def bias(self) -> Tensor:
        """``(E,)`` float32."""
        return self.router.float32(_OWN, self.router.weight.device)

    @property
    def beta(self) -> Tensor:
        """``(E,)`` float32, a copy: Megatron's."""
        return -self.bias

    @property
    def counted(self) -> Tensor:
        """``(E + 1,)`` float32: balanced biases since the last step, added up, and how many they are."""
        return self.router.float32("load_since_update", self.router.weight.device)


def _as_megatron_has_it(router: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    state_dict[prefix + _MEGATRONS] = -state_dict.pop(prefix + _OWN)


def _as_dmoe_has_it(router: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    beta = state_dict.pop(prefix + _MEGATRONS, None)
    if beta is not None:
        state_dict[prefix + _OWN] = -beta
