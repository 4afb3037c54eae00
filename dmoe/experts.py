"""The experts: their weights as a value, and the module that owns them. Nothing here knows about routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from dmoe.config import Activation, GateWeightOn, MoEConfig
from dmoe.expert_slice import ExpertSlice, local_part, scaled
from dmoe.expert_states import other_layout
from dmoe.expert_weights import F_DIM, ExpertWeights
from dmoe.ops._checks import check_plain, check_tensors
from dmoe.ops._library import has_triton
from dmoe.ops.activation import accumulate_dtype
from dmoe.ops.block_sparse import block_size_for
from dmoe.ops.block_sparse_mlp import block_sparse_mlp
from dmoe.ops.grouped_gemm import grouped_gemm
from dmoe.ops.moe_mlp import has_tangent, moe_mlp
from dmoe.ops.moe_mlp_deferred import moe_mlp_deferred
from dmoe.ops.philox import draw_seed
from dmoe.plan import RoutingPlan, device_tile_rows, plan_token_choice
from dmoe.strides import is_transposed, readable


def run_experts(
    x: Tensor,
    plan: RoutingPlan,
    gate_weights: Tensor,
    weights: ExpertWeights,
    *,
    activation: Activation = "silu",
    gate_weight_on: GateWeightOn = "output",
    activation_dropout: float = 0.0,
    expert_dropout: float = 0.0,
    backend: str | None = None,
    residual: Tensor | None = None,
    main_grads: Sequence[Tensor | None] | None = None,
    recompute: bool = False,
) -> Tensor:
    """Every token through its experts, weighted and summed.

    Args:
        x: ``(T, H)`` floating point.
        plan: where tokens go.
        gate_weights: one per assignment, ``(T, K)`` or flat in the order of ``plan.token_rows``.
        weights: the experts.
        activation, gate_weight_on: see :class:`dmoe.MoEConfig`.
        activation_dropout, expert_dropout: probabilities; 0 outside training.
        backend: None, ``grouped``, ``block_sparse`` or ``reference``.
        residual: ``(T, H)``, added to the sum before it is rounded: a shared expert's output, say.
        main_grads: float32 buffers in the shapes of ``up_proj`` and ``down_proj``, and of ``gate_proj`` where there is
            one. Backward adds these gradients to them, and the weights get none (Megatron's ``main_grad``). A frozen
            projection's is left alone, and may be None. Only with the default backend.
        recompute: save x only, not the pre-activation, and compute that again in backward: ``R * F`` numbers (gated:
            ``R * 2 F``) less memory, a sixth of a training step's products (gated: 22%) more. Only with the default
            backend.

    Returns:
        ``(T, H)`` in x's dtype (autocast's under autocast).

    Raises:
        ValueError: sizes, dtypes or devices that do not fit together.
    """
    _check(x, plan, gate_weights, weights)
    _check_extras(x, weights, residual, main_grads, recompute, backend)
    gate_weights = gate_weights.to(accumulate_dtype(x.dtype))
    packed, gate_proj = bool(weights.ffn_sizes), weights.gate_proj
    up_proj, down_proj = (readable(weight, packed=packed) for weight in (weights.up_proj, weights.down_proj))
    gate_proj = None if gate_proj is None else readable(gate_proj, packed=packed)
    if gate_proj is not None and x.is_cuda and gate_proj.stride() != up_proj.stride():
        gate_proj, up_proj = gate_proj.contiguous(), up_proj.contiguous()  # one kernel reads both, in one way
    seed = draw_seed(x.device) if activation_dropout or expert_dropout else None
    arguments: tuple[Any, ...] = (
        x.contiguous(),
        gate_weights.contiguous(),
        up_proj,
        down_proj,
        None if weights.up_bias is None else weights.up_bias.contiguous(),
        None if weights.down_bias is None else weights.down_bias.contiguous(),
        plan.expert_offsets,
        plan.row_to_token,
        plan.row_to_slot,
        plan.token_offsets,
        plan.token_rows,
        seed,
        list(weights.ffn_sizes) or None,  # an empty list is what AOTInductor's runtime cannot read back
        activation,
        weights.gated,
        gate_weight_on,
        activation_dropout,
        expert_dropout,
    )
    plain = main_grads is None and not recompute
    if backend == "block_sparse" or (backend is None and plain and _block_sparse_by_default(x, weights)):
        y = block_sparse_mlp(*_in_one_piece(arguments, weights))
        return y if residual is None else y + residual.to(y.dtype)
    up_main_grad, down_main_grad, gate_main_grad = (*(main_grads or ()), None, None, None)[:3]
    arguments = (
        *arguments,
        None if residual is None else residual.contiguous(),
        plan.tiles,
        plan.experts_by_load,
        plan.tile_rows,
        up_main_grad,
        down_main_grad,
        gate_proj,
        gate_main_grad,
    )
    if weights.later is not None and backend != "reference" and torch.is_grad_enabled():
        return moe_mlp_deferred(weights.later, *arguments, recompute=recompute)
    return moe_mlp(*arguments, backend=backend, recompute=recompute)


def _in_one_piece(arguments: tuple[Any, ...], weights: ExpertWeights) -> tuple[Any, ...]:
    """The same with contiguous projections, gate and up in one: block-sparse products know no other layout."""
    up, down = weights.up_proj, weights.down_proj
    if weights.gate_proj is not None:
        up = torch.stack([weights.gate_proj, up], 0 if weights.ffn_sizes else 1)
    return *arguments[:2], up.contiguous(), down.contiguous(), *arguments[4:]


def _block_sparse_by_default(x: Tensor, weights: ExpertWeights) -> bool:
    """Widths that differ, on a GPU: the other way would compute every expert as wide as the widest."""
    suits = x.is_cuda and bool(weights.ffn_sizes) and x.dtype != torch.float64
    return suits and block_size_for(weights.ffn_sizes) is not None and has_triton()


def _check_extras(
    x: Tensor,
    weights: ExpertWeights,
    residual: Tensor | None,
    main_grads: Sequence[Tensor | None] | None,
    recompute: bool,
    backend: str | None,
) -> None:
    if backend not in (None, "grouped", "block_sparse", "reference"):
        raise ValueError(f"moe_mlp: backend: expected None, 'grouped', 'block_sparse' or 'reference', got {backend!r}")
    if residual is not None:
        check_tensors("moe_mlp", residual=residual)
        if residual.shape != x.shape or residual.device != x.device:
            raise ValueError(
                f"moe_mlp: residual: expected x's shape {tuple(x.shape)} on {x.device}, got {tuple(residual.shape)} on "
                f"{residual.device}"
            )
        cast = torch.is_autocast_enabled(x.device.type) and residual.is_floating_point()
        if residual.dtype != x.dtype and not cast:
            raise ValueError(f"moe_mlp: residual: expected x's dtype {x.dtype}, got {residual.dtype}")
    if not isinstance(recompute, bool):
        raise TypeError(f"moe_mlp: recompute: expected True or False, got {recompute!r}")
    if backend in ("block_sparse", "reference") and (recompute or main_grads is not None):
        name, allowed = ("recompute", "False") if recompute else ("main_grads", "None")
        raise ValueError(
            f"moe_mlp: {name}: expected {allowed} with backend={backend!r}, whose backward has no such option"
        )
    if main_grads is None:
        return
    projections = {"up_proj": weights.up_proj, "down_proj": weights.down_proj}
    if weights.gate_proj is not None:
        projections["gate_proj"] = weights.gate_proj
    if not isinstance(main_grads, tuple | list) or len(main_grads) != len(projections):
        got = f"{len(main_grads)} of them" if isinstance(main_grads, tuple | list) else type(main_grads).__name__
        many = "a pair of buffers, for" if len(projections) == 2 else "three buffers, for"
        raise TypeError(f"moe_mlp: main_grads: expected {many} {' and '.join(projections)}, got {got}")
    for (name, weight), buffer in zip(projections.items(), main_grads, strict=True):
        if buffer is None and not weight.requires_grad:
            continue
        if not isinstance(buffer, Tensor):
            raise TypeError(f"moe_mlp: main_grads: {name}: expected a tensor, got {type(buffer).__name__}")
        dense = buffer.is_contiguous() or (buffer.stride() == weight.stride() and is_transposed(weight))
        fits = buffer.shape == weight.shape and buffer.device == weight.device and dense
        if not fits or buffer.dtype != torch.float32:
            strided = "" if buffer.is_contiguous() else f" with strides {buffer.stride()}"
            order = "contiguous" if weight.is_contiguous() else f"contiguous (or with strides {weight.stride()})"
            raise ValueError(
                f"moe_mlp: main_grads: {name}: expected {order} float32 {tuple(weight.shape)} on {weight.device}, "
                f"got {buffer.dtype} {tuple(buffer.shape)} on {buffer.device}{strided}"
            )


def _check(x: Tensor, plan: RoutingPlan, gate_weights: Tensor, weights: ExpertWeights) -> None:
    if not x.is_floating_point():
        raise TypeError(f"moe_mlp: x: expected a floating-point tensor, got {x.dtype}")
    if x.shape != (plan.num_tokens, weights.hidden_size):
        raise ValueError(
            f"moe_mlp: x: expected shape {(plan.num_tokens, weights.hidden_size)} (tokens of the routing, "
            f"hidden size of the weights), got {tuple(x.shape)}"
        )
    if plan.num_experts != weights.num_experts:
        raise ValueError(f"moe_mlp: the routing has {plan.num_experts} experts, the weights {weights.num_experts}")
    if gate_weights.numel() != plan.token_rows.numel():
        raise ValueError(
            f"moe_mlp: gate_weights: expected one for each of {plan.token_rows.numel()} assignments, got shape "
            f"{tuple(gate_weights.shape)}"
        )
    if not gate_weights.is_floating_point():
        raise TypeError(f"moe_mlp: gate_weights: expected a floating-point tensor, got {gate_weights.dtype}")
    if has_tangent(x):
        raise RuntimeError("moe_mlp: forward-mode differentiation (jvp) is not supported; use reverse mode")
    devices = {x.device, weights.up_proj.device, gate_weights.device, plan.token_rows.device}
    if len(devices) > 1:
        raise ValueError(
            f"moe_mlp: expected all tensors on one device, got x on {x.device}, weights on {weights.up_proj.device}, "
            f"gate_weights on {gate_weights.device}, indices on {plan.token_rows.device}"
        )
    if x.dtype != weights.up_proj.dtype and not torch.is_autocast_enabled(x.device.type):
        raise ValueError(
            f"moe_mlp: expected x and weights of one dtype, got {x.dtype} and {weights.up_proj.dtype}; convert one, or "
            "use torch.autocast"
        )


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
        widths = config.ffn_sizes[owned.experts.start : owned.experts.stop]
        self.ffn_sizes = tuple(width // owned.num_shards for width in widths)
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
        self.mark_parameters()
        self.reset_parameters()

    def _shard_dim(self, name: str) -> int | None:
        """Which dimension of a parameter of equally wide experts is F."""
        if name == "down_bias":
            return None
        return 2 if name == "down_proj" or self.config.gated else 1

    def mark_parameters(self) -> None:
        """Set ``expert`` and ``allreduce`` on each parameter, as after something replaced them."""
        for param in self.parameters():
            param.expert = self.routed  # type: ignore[attr-defined]
            if self.distributed:
                param.allreduce = False  # type: ignore[attr-defined]

    def _apply(self, fn: Any, recurse: bool = True) -> Experts:
        super()._apply(fn, recurse)
        self.mark_parameters()  # to(), double(), to_empty() may make parameters of their own
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Marks again: a deep copy of a parameter is without its attributes."""
        super().__setstate__(state)
        self.mark_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        names = dict(self.named_parameters())
        wrong = other_layout(state_dict, prefix, names, [name for name in names if name in (self.up_name, "down_proj")])
        if wrong is not None:
            args[-1].append(wrong)  # torch's error_msgs, which are raised with strict=False, too
        for name, parameter in self.named_parameters() if self.distributed else ():
            value = state_dict.get(prefix + name)  # whose dict is load_state_dict's own
            if isinstance(value, Tensor) and isinstance(self.config.ffn_hidden_size, int):
                state_dict[prefix + name] = self.owned.part_of(value, parameter, self._shard_dim(name))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.mark_parameters()  # load_state_dict(assign=True) brings parameters of its own
        self.seed = None  # the values come from elsewhere now

    def weights(self) -> ExpertWeights:
        """What lives here of the parameters, as one value."""

        def here(parameter: Tensor | None) -> Tensor | None:
            return None if parameter is None else local_part(parameter)

        up_proj, down_proj = local_part(getattr(self, self.up_name)), local_part(self.down_proj)
        check_plain("Experts", up_proj=up_proj, down_proj=down_proj)
        return ExpertWeights(
            up_proj=up_proj,
            down_proj=down_proj,
            up_bias=here(getattr(self, self.up_bias_name)),
            down_bias=here(self.down_bias),
            gated=self.config.gated,
            ffn_sizes=() if isinstance(self.config.ffn_hidden_size, int) else self.ffn_sizes,
        )

    def _weights_at_work(self) -> ExpertWeights:
        """Those weights with their gradients scaled, and one shard's share of the down bias."""
        weights, scale, shards = self.weights(), self.owned.grad_scale, self.owned.num_shards
        if scale == 1 and shards == 1:
            return weights
        given = {name: tensor for name in F_DIM if (tensor := getattr(weights, name)) is not None}
        # Every shard adds its part of the sum over F; the bias, which all of them hold, has to come out once.
        forward_scale = dict.fromkeys(given, 1.0) | {"down_bias": 1 / shards}
        at_work: dict[str, Any] = {name: scaled(tensor, forward_scale[name], scale) for name, tensor in given.items()}
        return replace(weights, **at_work)

    def weights_ahead(self) -> ExpertWeights | None:
        """The weights at work for a :meth:`forward` to come, their gradients computed where backward comes to this.

        None where they may not be here yet: FSDP gathers them for that forward, and takes their gradients after it;
        offloading replaces the forward, or hooks it, to bring them.
        """
        hooked = hasattr(self, "unshard") or "forward" in self.__dict__ or bool(self._forward_pre_hooks)
        return None if hooked else self._weights_at_work().deferred()

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
        return self._weights_at_work().parts(count)

    def expert_slices(self, expert: int) -> list[tuple[str, Tensor, int]]:
        """Each parameter's part for one expert, counted among those owned: its field in :class:`ExpertWeights`, a view,
        the fan-in of its layer.
        """
        config, weights = self.config, self.weights()
        width = self.ffn_sizes[expert]
        if weights.ffn_sizes:
            start = sum(self.ffn_sizes[:expert])
            columns = slice(start, start + width)
            up, down = weights.up_proj[..., columns, :], weights.down_proj[:, columns]
            up_bias = None if weights.up_bias is None else weights.up_bias[..., columns]
        else:
            up, down = weights.up_proj[expert], weights.down_proj[expert]
            up_bias = None if weights.up_bias is None else weights.up_bias[expert]
        fan_in = width * self.owned.num_shards
        slices = [("up_proj", up, config.hidden_size), ("down_proj", down, fan_in)]
        if up_bias is not None and weights.down_bias is not None:
            slices += [("up_bias", up_bias, config.hidden_size), ("down_bias", weights.down_bias[expert], fan_in)]
        return slices

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values: expert e's are a function of (seed, e), so who holds which expert does not change them.

        One seed is drawn from PyTorch's default generator. Uniform in +-1/sqrt(fan_in) as ``nn.Linear``, or normal with
        ``init_std`` and zero biases.
        """
        if self.down_proj.is_meta or is_fake(self.down_proj):
            return
        seed = self.seed = int(torch.randint(2**62, (), device="cpu").item())  # whatever the default device is
        for position, expert in enumerate(self.owned.experts):
            generator = torch.Generator(device="cpu").manual_seed((seed + expert * 0x9E3779B97F4A7C15) % 2**63)
            for name, tensor, fan_in in self.expert_slices(position):
                shape, dim = list(tensor.shape), F_DIM[name]
                if dim is not None:
                    shape[dim] *= self.owned.num_shards
                fresh = torch.empty(shape, dtype=torch.float32, device="cpu")
                if self.config.init_std is None:
                    bound = 1 / math.sqrt(fan_in)
                    fresh.uniform_(-bound, bound, generator=generator)
                elif name.endswith("proj"):
                    fresh.normal_(0, self.config.init_std, generator=generator)
                else:
                    fresh.zero_()
                if dim is not None:
                    columns = self.owned.columns(shape[dim])
                    fresh = fresh.narrow(dim, columns.start, columns.stop - columns.start)
                tensor.copy_(fresh)

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
        weights: ExpertWeights | None = None,
    ) -> Tensor:
        """``(T, H)`` through the experts, or through those of :meth:`in_parts`; see :func:`run_experts`."""
        config = self.config
        return run_experts(
            x,
            plan,
            gate_weights,
            self._weights_at_work() if weights is None else weights,
            activation=config.activation,
            gate_weight_on=config.gate_weight_on,
            activation_dropout=config.activation_dropout if self.training else 0.0,
            expert_dropout=config.expert_dropout if self.training else 0.0,
            backend=config.backend,
            residual=residual,
            main_grads=self._main_grads(),
            recompute=config.recompute_pre_activation,
        )

    def extra_repr(self) -> str:
        """Sizes and activation for ``print(model)``."""
        c = self.config
        kind = f"gated {c.activation}" if c.gated else c.activation
        owned = self.owned
        here = f" (here {owned.experts.start} to {owned.experts.stop - 1}" if self.distributed else ""
        if here:
            here += f", part {owned.shard} of {owned.num_shards} of F)" if owned.num_shards > 1 else ")"
        sizes = f"hidden_size={c.hidden_size}, ffn_hidden_size={c.ffn_hidden_size}"
        return f"num_experts={c.num_experts}{here}, {sizes}, {kind}"


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
            backend=None if config.backend == "block_sparse" else config.backend,  # a single expert is dense
            recompute_pre_activation=config.recompute_pre_activation,
            accumulate_main_grad=config.accumulate_main_grad,
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
        if self.gate is not None:
            weight = torch.sigmoid(self.gate(x).to(dtype))
        tile_rows = device_tile_rows(x.device, x.shape[0], 1)
        return self.mlp(x, plan_token_choice(everyone, 1, tile_rows=tile_rows), weight)
