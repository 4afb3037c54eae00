"""The modules that own adapters: a set of them beside the weights of experts, or of a router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from dmoe.adapters import Adapters, LowRank
from dmoe.expert_init import draw_initial_seed
from dmoe.expert_slice import ExpertSlice, local_part
from dmoe.lora.config import LoRA
from dmoe.lora.factors import LoRAFactors, ProjectionShape, generators_of


class TokensChoice(NamedTuple):
    """One block of :func:`dmoe.lora.use`.

    Attributes:
        names: adapters to choose from.
        ids: which of them each token takes, ``(T,)``.
        block: of no numbers, in a shape that no other block's has.
    """

    names: tuple[str, ...]
    ids: Tensor
    block: Tensor


class _OfBlock(torch.autograd.Function):
    """A tensor as it is; the graph keeps the block that it was used in.

    Activation checkpointing compares the shapes of what is kept, and so will not go on with what it has computed again
    in another block, with other ids.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, block: Tensor) -> Tensor:
        ctx.save_for_backward(block)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        _ = ctx.saved_tensors  # has it computed again
        return grad, None


class AdapterSet(nn.Module):
    """Adapters beside one module's weights, by name, as children; which of them work is kept here.

    Attributes:
        active: names of those that are added to the weights.
        enabled: False is the base alone.
        merged: names of those whose product is in the weights already.
        by_token: what each token has chosen, while :func:`dmoe.lora.use` is on.
    """

    def __init__(self) -> None:
        super().__init__()
        self.active: tuple[str, ...] = ()
        self.enabled = True
        self.merged: tuple[str, ...] = ()
        self.by_token: TokensChoice | None = None
        self.base: dict[str, Tensor] = {}  # what merge was told to keep
        self._chosen_by_token = False

    @property
    def names(self) -> list[str]:
        """Of all adapters here, as they were added."""
        return list(self._modules)

    def config_of(self, name: str) -> LoRA:
        """Of one adapter."""
        held: Any = self._modules[name]
        return held.config

    def summary(self) -> list[tuple[str, str, int | None]]:
        """Name, options and seed of each: what ranks compare."""
        held: Any = self._modules
        return [(name, str(adapter.config), adapter.seed) for name, adapter in held.items()]

    def put(self, name: str, adapter: nn.Module) -> None:
        """Add one under a name that :func:`check_name` has seen."""
        self.add_module(name, adapter.train(self.training))

    def drop(self, name: str) -> None:
        """Take one out."""
        del self._modules[name]
        self.active = tuple(each for each in self.active if each != name)
        self.merged = tuple(each for each in self.merged if each != name)

    def at_work(self) -> tuple[str, ...]:
        """Names of what is added to the weights, for all tokens alike."""
        return tuple(name for name in self.active if name not in self.merged) if self.enabled else ()

    def tokens_choice(self) -> TokensChoice | None:
        """``by_token``, where it is to be heeded.

        Raises:
            RuntimeError: activation checkpointing computes again, in a backward outside of ``use``, what was computed
                inside of it.
        """
        if not torch.compiler.is_compiling():
            if torch._C._current_graph_task_id() == -1:
                self._chosen_by_token = self.by_token is not None
            elif self._chosen_by_token and self.by_token is None:
                raise RuntimeError(
                    "dmoe.lora.use: expected backward inside the with block, where activation checkpointing computes "
                    "layers again and has to choose the same adapters, got a backward behind it"
                )
        return self.by_token if self.enabled else None

    def __getstate__(self) -> dict[str, Any]:
        """Without the choice of the moment."""
        return {**self.__dict__, "by_token": None, "_chosen_by_token": False}

    def extra_repr(self) -> str:
        """Which of them work."""
        told = [f"active={list(self.active)}"] + (["disabled"] if not self.enabled else [])
        return ", ".join(told + ([f"merged={list(self.merged)}"] if self.merged else []))


def of_block(tensor: Tensor, block: Tensor | None) -> Tensor:
    """The tensor, of which the graph knows that it was used in this block; a compiler sees to that itself."""
    return tensor if block is None or torch.compiler.is_compiling() else _OfBlock.apply(tensor, block)


def check_name(operation: str, name: Any) -> None:
    """A name of an adapter, which becomes a module's; ``operation`` is what an error names.

    Raises:
        ValueError: it cannot be one.
    """
    if not isinstance(name, str) or not name or "." in name or hasattr(AdapterSet(), name):
        raise ValueError(f"{operation}: name: expected a word without dots that no attribute has, got {name!r}")


class Adapter(nn.Module):
    """What adapters of experts and of routers have in common.

    Attributes:
        config: its options.
        seed: what the initial values were made from; None on the meta device, and once values were loaded.
        number: that adapters of a model are ordered by, equal where the name is.
    """

    def __init__(self, config: LoRA) -> None:
        super().__init__()
        self.config, self.number = config, 0
        self.seed: int | None = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values, from a seed that PyTorch's default generator draws."""
        one = next(self.parameters())
        if one.is_meta or is_fake(one):
            return
        self.seed = draw_initial_seed()
        self._fill(self.seed)

    def _fill(self, seed: int) -> None:
        raise NotImplementedError

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.seed = None  # the values come from elsewhere now

    def extra_repr(self) -> str:
        """Options."""
        return str(self.config)


class ExpertAdapter(Adapter):
    """One adapter of all experts: :class:`LoRAFactors` by the name of the projection they stand beside.

    Args:
        projections: by parameter name, those that are adapted.
        config: of the adapter.
        where: which experts live here.
        device, dtype: of the parameters.

    Initial values of expert e are a function of (seed, e), so who holds which expert does not change them.
    """

    def __init__(
        self,
        projections: Mapping[str, ProjectionShape],
        config: LoRA,
        where: ExpertSlice,
        *,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(config)
        self.where = where
        for name, projection in projections.items():
            self.add_module(name, LoRAFactors(projection, config, where, device=device, dtype=dtype))
        self.reset_parameters()

    @property
    def factors(self) -> dict[str, LoRAFactors]:
        """By the projection's name."""
        held: Any = dict(self._modules)
        return held

    def _fill(self, seed: int) -> None:
        generators = generators_of(self.where, seed)
        for factors in self.factors.values():
            factors.fill(self.config, self.where.experts, generators)

    def value(self, dtype: torch.dtype | None, block: Tensor | None = None) -> Adapters:
        """What lives here of the factors, as one value, in ``dtype`` (None: in their own); used in a block, if any."""
        dropout = self.config.dropout if self.training else 0.0
        held = self.factors
        tensors: list[Tensor] = [local_part(factor) for each in held.values() for factor in (each.a, each.b)]
        if self.where.share_overflow is not None:
            tensors = list(self.where.share_overflow(tensors))
        tensors[0] = of_block(tensors[0], block)
        if dtype is not None:
            tensors = [tensor.to(dtype) for tensor in tensors]
        found: dict[str, LowRank | None] = {"up": None, "down": None}
        for each, a, b in zip(held.values(), tensors[::2], tensors[1::2], strict=True):
            found[each.projection.half] = LowRank(a, b, self.config.scale, dropout)
        return Adapters(**found)


class ExpertAdapters(AdapterSet):
    """What stands as ``lora`` beside the weights of experts, in :class:`dmoe.MoE`'s or another module."""

    def value(self, dtype: torch.dtype | None = None) -> tuple[Adapters | list[Adapters] | None, Tensor | None]:
        """As :func:`dmoe.run_experts` takes them: ``adapters`` and ``adapter_ids``.

        Args:
            dtype: of the weights that they stand beside, to which factors are rounded; None leaves them.
        """
        held: Any = self._modules
        chosen = self.tokens_choice()
        if chosen is not None:
            found = [held[name].value(dtype, chosen.block) if name in held else Adapters() for name in chosen.names]
            return found, chosen.ids
        names = self.at_work()
        if not names:
            return None, None
        return summed([held[name].value(dtype) for name in names]), None


def summed(adapters: Sequence[Adapters]) -> Adapters:
    """One that adds what all of these add: their factors side by side.

    Raises:
        ValueError: dropouts that differ.
    """
    if len(adapters) == 1:
        return adapters[0]
    return Adapters(
        _joined("up", [each.up for each in adapters if each.up is not None]),
        _joined("down", [each.down for each in adapters if each.down is not None]),
    )


def _joined(name: str, factors: Sequence[LowRank]) -> LowRank | None:
    if len(factors) < 2:
        return factors[0] if factors else None
    if len({low.dropout for low in factors}) > 1:
        raise ValueError(
            f"dmoe.lora: expected one dropout for all adapters that are active together, got "
            f"{sorted({low.dropout for low in factors})} for {name}"
        )
    alike = len({low.scale for low in factors}) == 1
    a = side_by_side([low.a for low in factors], -2)
    b = side_by_side([low.b if alike else low.b * low.scale for low in factors], -1)
    return replace(factors[0], a=a, b=b, scale=factors[0].scale if alike else 1.0)


def side_by_side(factors: Sequence[Tensor], dim: int) -> Tensor:
    """Along their ranks; what is shared by all experts is repeated where others are not."""
    if factors[0].dim() == 2:  # of experts of different widths, side by side themselves
        return torch.cat(list(factors), dim)
    experts = max(factor.shape[0] for factor in factors)
    alike = all(factor.shape[0] == experts for factor in factors)
    return torch.cat([f if alike else f.expand(experts, *f.shape[1:]) for f in factors], dim)
