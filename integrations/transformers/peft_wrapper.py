"""PEFT's wrapper of one parameter of the experts, handing over its factors instead of a sum; imports PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora.layer import ParamWrapper

from dmoe.integrations.transformers.lora import HANDED


class FactorsWrapper(ParamWrapper):
    """The class that :func:`dmoe.integrations.transformers.lora.hand_over` gives to wrappers that exist."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Several adapters, one matrix for all experts, and weights in 8 bits go PEFT's own way."""
        here = [name for name in active_adapters or () if name in self.lora_A]
        if len(here) != 1 or self.num_experts < 2 or self.get_param().dtype.itemsize < 2:
            with super()._activate_lora(active_adapters):
                yield
            return
        handed = self.get_base_layer().__dict__.setdefault(HANDED, {})
        handed[self.parameter_name] = self.get_delta_factors(here[0])
        try:
            yield
        finally:
            del handed[self.parameter_name]
