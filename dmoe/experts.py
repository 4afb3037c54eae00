"""The experts: the module that owns their weights. Nothing here knows about routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from dmoe.activation_functions import name_of
from dmoe.config import MoEConfig
from dmoe.expert_init import draw_initial_seed, initialise
from dmoe.expert_slice import ExpertSlice, local_part, scaled
from dmoe.expert_states import adapters_without_place, other_layout, weights_for_codes
from dmoe.expert_weights import F_DIM, ExpertWeights, Weight
from dmoe.functional import run_experts
from dmoe.ops._checks import check_plain
from dmoe.parallel.copies import Copies, Lent
from dmoe.plan import RoutingPlan


class Experts(nn.Module):
    """Owns the weights of E experts. Parameter names are part of the checkpoint: see :class:`ExpertWeights`.

    Args:
        config: sizes, activation, bias and dropout.
        routed: whether tokens are routed to these experts, so that their parameters differ between expert-parallel
            ranks (``param.expert``, see :func:`dmoe.is_expert_param`); False for a shared expert.
        owned: what lives here, when the rest lives on other ranks. The parameters are then marked ``allreduce = False``
            (DeepSpeed, Megatron): not every rank has gradients for them. None is all experts.
        device, dtype: of the parameters, as in ``nn.Linear``.

    Attributes:
        seed: what the initial values were made from; None on the meta device, and once values were loaded.
    """

    gate_up_proj: nn.Parameter | None
    up_proj: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(
        self,
        config: MoEConfig,
        *,
        routed: bool = True,
        owned: ExpertSlice | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config, self.routed, self.distributed = config, routed, owned is not None
        self.owned = owned = ExpertSlice(range(config.num_experts), config.num_experts) if owned is None else owned
        self.ffn_sizes = self._widths_here()
        self.seed: int | None = None
        uniform = isinstance(config.ffn_hidden_size, int)
        hidden, experts = config.hidden_size, len(owned.experts)
        halves = (2,) if config.gated else ()
        up: tuple[int, ...]
        down: tuple[int, ...]
        if uniform:
            width = self.ffn_sizes[0]
            up, down = (experts, *halves, width), (experts, hidden, width)
        else:
            up, down = (*halves, sum(self.ffn_sizes)), (hidden, sum(self.ffn_sizes))

        def parameter(*shape: int, shard_dim: int | None) -> nn.Parameter:
            return nn.Parameter(owned.distributed(torch.empty(*shape, device=device, dtype=dtype), shard_dim))

        self.up_name = "gate_up_proj" if config.gated else "up_proj"
        self.up_bias_name = self.up_name.removesuffix("proj") + "bias"
        self.register_parameter(self.up_name, parameter(*up, hidden, shard_dim=len(up) - 1))
        self.down_proj = parameter(*down, shard_dim=2)
        with_bias = config.bias == "expert"
        self.register_parameter(self.up_bias_name, parameter(*up, shard_dim=len(up) - 1) if with_bias else None)
        self.register_parameter("down_bias", parameter(experts, hidden, shard_dim=None) if with_bias else None)
        self.register_module("lora", None)  # what dmoe.lora puts beside the weights
        self.mark_parameters()
        self.reset_parameters()

    def _shard_dim(self, name: str) -> int | None:
        """Which dimension of a parameter of equally wide experts is F."""
        if name == "down_bias":
            return None
        return 2 if name == "down_proj" or self.config.gated else 1

    def _widths_here(self) -> tuple[int, ...]:
        """Columns of each expert that lives here."""
        widths = self.config.ffn_sizes[self.owned.experts.start : self.owned.experts.stop]
        return tuple(width // self.owned.num_shards for width in widths)

    @torch.no_grad()
    def keep(self, owned: ExpertSlice) -> None:
        """Let go of all experts but those of one rank, in place: the parameters become new ones, of what lives there.

        Args:
            owned: what stays.

        Raises:
            ValueError: some are elsewhere already; or weights that are codes, adapters beside them, ``main_grad``
                buffers, or weights that FSDP has cut.
        """
        beside = {
            "experts that are spread already": self.distributed,
            "weights that are codes": bool(self._coded()),
            "adapters": self.lora is not None,
            "weights that are cut": any(hasattr(each, "to_local") for each in self.parameters()),
            "main_grad buffers": any(getattr(each, "main_grad", None) is not None for each in self.parameters()),
        }
        if found := [what for what, there in beside.items() if there]:
            raise ValueError(
                f"Experts.keep: expected plain weights of all {self.config.num_experts} experts, got {found[0]}: "
                "spread the experts first"
            )
        whole = dict(self._parameters)
        self.owned, self.distributed = owned, True
        self.ffn_sizes = self._widths_here()
        for name, parameter in whole.items():
            if parameter is None:
                continue
            dim = self._shard_dim(name)
            if isinstance(self.config.ffn_hidden_size, int) or name == "down_bias":
                part = owned.cut(parameter, dim)
            else:
                part = owned.cut_columns(parameter, self.config.ffn_sizes, -2 if name == self.up_name else -1)
            part = owned.distributed(part.clone(memory_format=torch.contiguous_format), dim)
            self.register_parameter(name, nn.Parameter(part, requires_grad=parameter.requires_grad))
        self.mark_parameters()

    def _coded(self) -> list[str]:
        """Projections that are codes: what dmoe.quant puts in a parameter's place."""
        return [name for name in (self.up_name, "down_proj") if self._modules.get(name) is not None]

    def mark_parameters(self) -> None:
        """Say on each parameter what it is, and freeze what is, as after something replaced them.

        ``expert`` and ``allreduce``; and ``unit_dims``, how many of the last dimensions are one matrix of an expert (2)
        or one bias (1), 0 where its matrices do not lie in it one behind the other, or are not whole.
        """
        for name, param in self.named_parameters():
            param.expert = self.routed  # type: ignore[attr-defined]
            if self.distributed:
                param.allreduce = False  # type: ignore[attr-defined]
            if "." not in name:
                stacked = isinstance(self.config.ffn_hidden_size, int) and self.owned.num_shards == 1
                param.unit_dims = (1 if name.endswith("bias") else 2) if stacked else 0  # type: ignore[attr-defined]
        if self.config.frozen_down_bias and self.down_bias is not None:
            self.down_bias.requires_grad_(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self.mark_parameters()  # to(), double(), to_empty() may make parameters of their own
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Marks again: a deep copy of a parameter is without its attributes."""
        super().__setstate__(state)
        self._modules.setdefault("lora", None)
        self.mark_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        names = dict(self.named_parameters())
        wrong = other_layout(state_dict, prefix, names, [name for name in names if name in (self.up_name, "down_proj")])
        wrong = wrong or weights_for_codes(state_dict, prefix, self._coded())
        if wrong is not None:
            args[-1].append(wrong)  # torch's error_msgs, which are raised with strict=False, too
        for name, parameter in self.named_parameters() if self.distributed else ():
            value = state_dict.get(prefix + name)  # whose dict is load_state_dict's own
            if isinstance(value, Tensor) and isinstance(self.config.ffn_hidden_size, int):
                state_dict[prefix + name] = self.owned.part_of(value, parameter, self._shard_dim(name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        args[-2].extend(adapters_without_place(state_dict, prefix, self.lora))  # torch's unexpected_keys
        self.mark_parameters()  # load_state_dict(assign=True) brings parameters of its own
        self.seed = None  # the values come from elsewhere now

    def weights(self) -> ExpertWeights:
        """What lives here of the parameters, as one value."""

        def here(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else local_part(parameter)

        def projection(name: str) -> Weight:
            held = getattr(self, name)
            if isinstance(held, nn.Module):  # what dmoe.quant puts in a parameter's place
                return held.value()  # type: ignore[operator]
            check_plain("Experts", **{name: (weight := local_part(held))})
            return weight

        return ExpertWeights(
            up_proj=projection(self.up_name),
            down_proj=projection("down_proj"),
            up_bias=here(getattr(self, self.up_bias_name)),
            down_bias=here(self.down_bias),
            gated=self.config.gated,
            ffn_sizes=() if isinstance(self.config.ffn_hidden_size, int) else self.ffn_sizes,
        )

    def _weights_at_work(self) -> ExpertWeights:
        """Those weights with their gradients scaled and looked through, and one shard's share of the down bias."""
        weights, scale, shards = self.weights(), self.owned.grad_scale, self.owned.num_shards
        share = self.owned.share_overflow
        if scale == 1 and shards == 1 and share is None:
            return weights
        given = {name: tensor for name in F_DIM if isinstance(tensor := getattr(weights, name), Tensor)}
        if share is not None:
            given = dict(zip(given, share(tuple(given.values())), strict=True))
        # Every shard adds its part of the sum over F; the bias, which all of them hold, has to come out once.
        forward_scale = dict.fromkeys(given, 1.0) | {"down_bias": 1 / shards}
        at_work: dict[str, Any] = {name: scaled(tensor, forward_scale[name], scale) for name, tensor in given.items()}
        return replace(weights, **at_work)

    def weights_ahead(self, copies: Copies | None = None) -> ExpertWeights | Lent | None:
        """The weights at work for a :meth:`forward` to come, their gradients computed where backward comes to this.

        With ``copies`` those that other ranks host are on their way to them.

        None where they may not be here yet: FSDP gathers them for that forward, and takes their gradients after it;
        offloading replaces the forward, or hooks it, to bring them. (A hook that says ``only_looks`` brings nothing.)
        """
        bring = [hook for hook in self._forward_pre_hooks.values() if not getattr(hook, "only_looks", False)]
        if hasattr(self, "unshard") or "forward" in self.__dict__ or bring or self.lora is not None:
            return None
        return (self._weights_at_work() if copies is None else self._lend(copies)).deferred()

    def _lend(self, copies: Copies, x: Tensor | None = None) -> Lent:
        """The weights at work, some of them on their way to other ranks: see :meth:`Copies.start`."""
        return copies.start(self._weights_at_work(), self._main_grads(), x)

    def _adapters_at_work(self, dtype: torch.dtype | None) -> dict[str, Any]:
        """Adapters beside weights of such a dtype, and tokens' choice, as :func:`dmoe.run_experts` takes them."""
        held: Any = self.lora
        if held is None:
            return {}
        adapters, adapter_ids = held.value(dtype)
        scale = self.owned.grad_scale
        if scale != 1 and adapters is not None:
            several = isinstance(adapters, list)
            adapters = [each.with_grad_scale(scale) for each in (adapters if several else [adapters])]
            adapters = adapters if several else adapters[0]
        return {"adapters": adapters, "adapter_ids": adapter_ids}

    def set_grad_scale(self, scale: float) -> None:
        """Multiply the gradients of experts that ranks share by this from now on, as where a framework divides them.

        Args:
            scale: 1 leaves the sum over the tokens of all ranks that share them, each rank's loss counted whole.
        """
        self.owned = replace(self.owned, grad_scale=scale)

    def in_parts(self, count: int) -> list[ExpertWeights]:
        """The weights at work in ``count`` groups of consecutive experts, for :meth:`forward` one by one.

        Raises:
            ValueError: FSDP keeps the weights, which it gathers for one forward and no more.
        """
        if hasattr(self, "unshard"):
            raise ValueError(
                f"Experts: overlap_degree: expected 1 for experts that FSDP shards, got {count}: their weights are "
                "gathered for one forward, not for each chunk"
            )
        if self.lora is not None:
            raise ValueError(f"Experts: overlap_degree: expected 1 for experts that have adapters, got {count}")
        return self._weights_at_work().parts(count)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values: expert e's are a function of (seed, e), so who holds which expert does not change them.

        One seed is drawn from PyTorch's default generator. Values are as the config's ``init`` says, or normal with
        ``init_std`` and zero biases. Projections that are codes have their values from elsewhere, and so has the rest
        beside them.
        """
        one = next(self.parameters(), None)
        if self._coded() or one is None or one.is_meta or is_fake(one):
            return
        self.seed = draw_initial_seed()
        c, uncut = self.config, self._uncut()
        initialise(uncut or self.weights(), self.owned, self.seed, c.init_std, c.init, c.frozen_down_bias)
        for name, field in self._fields.items() if uncut is not None else ():
            parameter = self._parameters[name]
            if parameter is not None:
                local_part(parameter).copy_(self.owned.cut_by_fsdp(getattr(uncut, field), parameter))

    @property
    def _fields(self) -> dict[str, str]:
        """Names of parameters, and of the fields of :class:`ExpertWeights` that they are."""
        of_bias = {self.up_bias_name: "up_bias", "down_bias": "down_bias"}
        return {self.up_name: "up_proj", "down_proj": "down_proj", **of_bias}

    def _uncut(self) -> ExpertWeights | None:
        """New memory for all values of the experts here, where FSDP2 has cut them between forwards; None elsewhere."""
        uniform = isinstance(self.config.ffn_hidden_size, int)
        shapes: dict[str, list[int]] = {}
        cut = False
        for name, field in self._fields.items():
            parameter = self._parameters.get(name)
            if parameter is None:
                continue
            shape, dim = list(parameter.shape), self._shard_dim(name)
            if uniform and self.owned.mesh is not None:
                shape[0] = len(self.owned.experts)
                if dim is not None:
                    shape[dim] //= self.owned.num_shards
            shapes[field] = shape
            cut = cut or list(local_part(parameter).shape) != shape
        if not cut:
            return None
        like = local_part(next(self.parameters()))
        sizes = () if uniform else self.ffn_sizes
        fresh: dict[str, Any] = {field: like.new_empty(shape) for field, shape in shapes.items()}
        return ExpertWeights(gated=self.config.gated, ffn_sizes=sizes, **fresh)

    def _main_grads(self) -> tuple[Tensor | None, Tensor | None] | None:
        """The buffers that backward adds to, when the config asks for it and autograd is on; None for a frozen one."""
        if not self.config.accumulate_main_grad or not torch.is_grad_enabled():
            return None
        buffers = []
        for name in (self.up_name, "down_proj"):
            parameter = getattr(self, name)
            buffer = getattr(parameter, "main_grad", None) if parameter.requires_grad else None
            if buffer is None and parameter.requires_grad:
                raise RuntimeError(
                    f"Experts: {name}.main_grad: expected a float32 buffer in the parameter's shape, got none; "
                    "accumulate_main_grad=True needs one on every projection that is trained, before the first forward"
                )
            buffers.append(buffer)
        return None if buffers == [None, None] else (buffers[0], buffers[1])

    def forward(
        self,
        x: Tensor,
        plan: RoutingPlan,
        gate_weights: Tensor,
        residual: Tensor | None = None,
        weights: ExpertWeights | Lent | None = None,
        copies: Copies | None = None,
        copies_plan: RoutingPlan | None = None,
    ) -> Tensor:
        """``(T, H)`` through the experts, or through those of :meth:`in_parts`; see :func:`dmoe.run_experts`.

        ``weights`` are those of :meth:`weights_ahead`, if it had any. With ``copies`` this rank computes experts of
        others, too, for the rows in ``copies_plan``, and others compute its own.
        """
        if weights is None:
            weights = self._weights_at_work() if copies is None else self._lend(copies, x)
        if not isinstance(weights, Lent):
            return self._run(x, plan, gate_weights, residual, weights, self._main_grads())
        x = x if weights.x is None else weights.x
        y = self._run(x, plan, gate_weights, residual, weights.weights, self._main_grads())
        y, hosted = weights.finish(y)
        if hosted is None or copies_plan is None:
            return y
        return self._run(x, copies_plan, gate_weights, y, hosted, None)

    def _run(
        self,
        x: Tensor,
        plan: RoutingPlan,
        gate_weights: Tensor,
        residual: Tensor | None,
        weights: ExpertWeights,
        main_grads: Sequence[Tensor | None] | None,
    ) -> Tensor:
        """:func:`dmoe.run_experts` as the config says."""
        config = self.config
        return run_experts(
            x,
            plan,
            gate_weights,
            weights,
            activation=config.activation,
            gate_weight_on=config.gate_weight_on,
            activation_dropout=config.activation_dropout if self.training else 0.0,
            expert_dropout=config.expert_dropout if self.training else 0.0,
            backend=config.backend,
            residual=residual,
            main_grads=main_grads,
            recompute=config.recompute_pre_activation,
            expert_compute=config.expert_compute,
            saved_activations=config.saved_activations,
            batch_invariant=config.batch_invariant,
            **self._adapters_at_work(weights.dtype),
        )

    def extra_repr(self) -> str:
        """Sizes and activation for ``print(model)``."""
        c = self.config
        kind = f"gated {name_of(c.activation)}" if c.gated else name_of(c.activation)
        owned = self.owned
        here = f" (here {owned.experts.start} to {owned.experts.stop - 1}" if self.distributed else ""
        if here:
            here += f", part {owned.shard} of {owned.num_shards} of F)" if owned.num_shards > 1 else ")"
        sizes = f"hidden_size={c.hidden_size}, ffn_hidden_size={c.ffn_hidden_size}"
        return f"num_experts={c.num_experts}{here}, {sizes}, {kind}"
