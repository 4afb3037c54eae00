"""``MoE``, a layer whose experts take a bounded number of tokens: router, experts, and the steps between them.

Every step can be overridden, and every module hooked, wrapped or replaced. Where nobody has done so, one fused
operation stands for the steps (:mod:`.overrides`); otherwise they run one by one, with equal results. What differs from
MegaBlocks, for ``dMoE`` too:

- Zero tokens work, and so does any ``ffn_hidden_size`` (``mlp_impl="sparse"`` by steps wants whole blocks, as there);
  inputs may have any leading dimensions.
- Products and sums are accumulated in float32 and rounded once; ties between experts go to the lowest id.
- What the losses need is saved in training alone, and does not pile up where nobody clears it: see :mod:`.saved`.
- ``shared_expert`` and ``return_bias`` work together.
- ``MoE`` with ``mlp_type='glu'`` is refused: MegaBlocks builds plain experts there without a word.
- Under ``moe_expert_model_parallelism`` the tokens of all ranks are one batch, of which an expert takes as many as one
  rank's layer takes of that batch, and the first ones. MegaBlocks counts K twice there, and so the ranks that share an
  expert; and each rank counts by its own number of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor, nn

from dmoe import losses
from dmoe.compat._not_offered import attributes_of
from dmoe.compat.megablocks import ops
from dmoe.compat.megablocks.layers import common, mlp, mpu, router, sharedexpert_registry
from dmoe.compat.megablocks.layers import expert_parallel as ranks
from dmoe.compat.megablocks.layers.all_to_all import all_to_all
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.balance import (
    _LOADS,
    batched_load_balancing_and_z_loss,
    batched_load_balancing_loss,
    clear_load_balancing_loss,
    get_load_balancing_loss,
    save_load_balancing_loss,
)
from dmoe.compat.megablocks.layers.overrides import is_untouched, is_unwatched, steps
from dmoe.compat.megablocks.layers.parameters import ExpertParameters
from dmoe.ops._checks import check_floating, check_tensors
from dmoe.ops.histogram import histogram
from dmoe.outputs import as_output
from dmoe.parallel import AllToAllDispatcher, Dispatched
from dmoe.plan import plan_token_choice

__all__ = [
    "MoE",
    "ParallelMLP",
    "all_to_all",
    "batched_load_balancing_and_z_loss",
    "batched_load_balancing_loss",
    "clear_load_balancing_loss",
    "common",
    "get_load_balancing_loss",
    "mlp",
    "mpu",
    "ops",
    "router",
    "save_load_balancing_loss",
    "sharedexpert_registry",
]

__getattr__ = attributes_of(__name__)

_Step = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@steps("indices_and_bins", "permute_and_compute")
class ParallelMLP(nn.Module):
    """The experts behind a router: ``forward`` takes its scores and choices.

    Args:
        args: sizes, capacity, bias, ranks.

    Attributes:
        mlp: the experts. Another module takes bins, ``mlp(x (E, C, H))``, and returns their results; under expert
            parallelism E and C are of this rank's experts and the tokens of all ranks.
        sort_end_bit: how many bits an expert's id has.
    """

    mlp: nn.Module
    bias: nn.Parameter | None

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        args.check()
        self.args = args
        self.num_experts, self.top_k = args.moe_num_experts, args.moe_top_k
        self.sort_end_bit = max(math.ceil(math.log2(self.num_experts)), 1)
        self.mlp = self._init_mlp(args)
        bias = torch.zeros(args.hidden_size, device=args.device, dtype=common.dtype(args)) if args.bias else None
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self._forward_fn: _Step | None = None
        self._ranks_agree = False

    def _init_mlp(self, args: Arguments) -> nn.Module:
        if args.mlp_type != "mlp":
            raise ValueError(
                f"MoE: mlp_type: expected 'mlp', got {args.mlp_type!r}: a capacity goes with plain experts only; "
                "dMoE has gated ones"
            )
        if (count := mpu.get_weight_parallel_world_size(args)) > 1:
            raise NotImplementedError(
                f"MoE: moe_weight_parallelism: expected False, or one rank, got {args.moe_weight_parallelism} over "
                f"{count} ranks: MegaBlocks has it for dMoE alone; shard these weights with FSDP2"
            )
        return mlp.MLP(args)

    @property
    def forward_fn(self) -> _Step:
        """What :meth:`forward` calls: :meth:`parallel_forward_once` with expert parallelism, else
        :meth:`forward_once`; or what was assigned.
        """
        if self._forward_fn is not None:
            return self._forward_fn
        return self.parallel_forward_once if self.args.moe_expert_model_parallelism else self.forward_once

    @forward_fn.setter
    def forward_fn(self, function: _Step) -> None:
        self._forward_fn = function

    @property
    def dispatcher(self) -> AllToAllDispatcher | None:
        """By which :mod:`dmoe.parallel` knows the ranks that share these experts; None where this one has all."""
        return ranks.sharing_ranks(self.args)

    @property
    def experts(self) -> nn.Module:
        """:attr:`mlp`, under the name that :mod:`dmoe.parallel` looks for."""
        return self.mlp

    def expert_capacity(self, tokens: int | Fraction) -> int:
        """``int(moe_capacity_factor * K * T * W / E)``: rows that one expert takes; 0 means all.

        Args:
            tokens: T, of each of W expert-parallel ranks; or their mean.
        """
        per_expert = self.top_k * tokens * mpu.get_expert_parallel_world_size(self.args) / self.num_experts
        return int(self.args.moe_capacity_factor * float(per_expert))

    def load_balancing_loss(self, tokens_per_expert: Tensor, expert_scores: Tensor) -> Tensor:
        """This layer's loss without a weight, 1 under even routing; see :func:`dmoe.losses.load_balancing_loss`."""
        return losses.load_balancing_loss(expert_scores, tokens_per_expert)

    def indices_and_bins(self, top_expert: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Plan of the choices ``(T * K,)``.

        Returns:
            int32 ``indices`` and ``bin_ids (T * K,)``, ``bins`` and ``tokens_per_expert (E,)``, as :mod:`..ops` has
            them.
        """
        top_expert = top_expert.int()
        bin_ids, indices = ops.sort(top_expert, self.sort_end_bit)
        tokens_per_expert = ops.histogram(top_expert, self.num_experts)
        return indices, bin_ids, ops.inclusive_cumsum(tokens_per_expert, 0), tokens_per_expert

    def permute_and_compute(
        self,
        x: Tensor,
        tokens_per_expert: Tensor,
        indices: Tensor,
        bin_ids: Tensor,
        expert_weights: Tensor | None,
        bins: Tensor,
        expert_capacity: int,
        top_k: int,
    ) -> Tensor:
        """Tokens ``(..., H)`` into bins of ``expert_capacity`` rows, through :attr:`mlp`, and back to ``(T, H)``."""
        bins_of_x = ops.binned_gather(x.reshape(-1, x.shape[-1]), indices, bins, expert_capacity, top_k)
        return ops.binned_scatter(self.mlp(bins_of_x), indices, expert_weights, bins, top_k)

    def forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens through their experts, weighted and summed.

        Args:
            x: ``(..., H)``, T tokens in all.
            expert_weights, top_experts: ``(T, K)``, or flat.

        Returns:
            ``(T, H)``, and how many choices each expert has, ``(E,)`` int32, before any drop.
        """
        if self._is_plain():
            return self._fused_once(x, expert_weights, top_experts)
        with torch.no_grad():
            indices, bin_ids, bins, tokens_per_expert = self.indices_and_bins(top_experts.flatten())
            capacity = self.expert_capacity(x.numel() // x.shape[-1]) or int(tokens_per_expert.max())
        weights = expert_weights.flatten()
        y = self.permute_and_compute(x, tokens_per_expert, indices, bin_ids, weights, bins, capacity, self.top_k)
        return y, tokens_per_expert

    def parallel_forward_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        """:meth:`forward_once` under expert parallelism; see :mod:`.expert_parallel`.

        Every rank calls it, with any number of tokens, and gets its own tokens' results and its own counts ``(E,)``.
        """
        if mpu.get_expert_parallel_world_size(self.args) == 1:
            return self.forward_once(x, expert_weights, top_experts)
        if not self._ranks_agree:
            ranks.check_ranks(type(self).__name__, self.args)
            self._ranks_agree = True
        plain = self._is_plain()
        with torch.no_grad():
            if plain:
                tokens_per_expert = histogram(top_experts.flatten().int(), self.num_experts)
            else:
                *_, tokens_per_expert = self.indices_and_bins(top_experts.flatten())
        tokens = x.reshape(-1, x.shape[-1])
        y = ranks.through_ranks(
            self.args,
            tokens,
            expert_weights.reshape(-1, self.top_k),
            top_experts.reshape(-1, self.top_k),
            self._fused_rows if plain else self._rows_by_steps,
            lambda: self._capacity_of_ranks(tokens),
        )
        return y, tokens_per_expert

    def _fused_rows(self, arrived: Dispatched) -> Tensor:
        assert isinstance(self.mlp, ExpertParameters)
        return self.mlp.route(arrived.x, arrived.plan, arrived.gate_weights)

    def _rows_by_steps(self, arrived: Dispatched) -> Tensor:
        return ranks.rows_by_steps(arrived, self.permute_and_compute)

    def _is_plain(self) -> bool:
        """Whether nobody would see a difference between the steps and the fused operation."""
        return is_untouched(self) and is_untouched(self.mlp) and is_unwatched(self.mlp)

    def _fused_once(self, x: Tensor, expert_weights: Tensor, top_experts: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(self.mlp, ExpertParameters)
        tokens, top_experts = x.reshape(-1, x.shape[-1]), top_experts.reshape(-1, self.top_k)
        plan = plan_token_choice(top_experts, self.num_experts, capacity=self._capacity(tokens.shape[0]))
        return self.mlp.route(tokens, plan, expert_weights.reshape(-1, self.top_k)), plan.tokens_per_expert

    def _capacity(self, tokens: int | Fraction) -> int | None:
        everything = int(tokens * mpu.get_expert_parallel_world_size(self.args)) * self.top_k
        return min(self.expert_capacity(tokens), everything) or None

    def _capacity_of_ranks(self, tokens: Tensor) -> int | None:
        return self._capacity(ranks.mean_tokens(self.args, tokens.shape[0], tokens.device))

    def forward(
        self, x: Tensor, scores: Tensor, expert_weights: Tensor, top_experts: Tensor
    ) -> Tensor | tuple[Tensor, nn.Parameter]:
        """Every token through its experts.

        Where an expert's capacity binds it keeps the first tokens, choice by choice; the others lose that expert.

        Args:
            x: ``(..., H)``, T tokens in all.
            scores: ``(T, E)``, for the load-balancing loss.
            expert_weights: ``(T, K)`` floating point.
            top_experts: ``(T, K)`` integer in [0, E).

        Returns:
            ``(..., H)`` plus the bias; with ``return_bias``, both apart.
        """
        y, tokens_per_expert = self.forward_fn(x, expert_weights, top_experts)
        y = as_output(y, x.shape)
        if self.training and self.args.moe_loss_weight > 0:
            _LOADS.save((tokens_per_expert, scores), self, self.args, y)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias


class MoE(nn.Module):
    """A Mixture-of-Experts layer with a capacity; :class:`~dmoe.compat.megablocks.dMoE` has none.

    Args:
        args: all options.

    Attributes:
        router: any module that returns scores ``(T, E)``, weights ``(T, K)`` and experts ``(T, K)`` of ``(..., H)``.
        experts: a :class:`ParallelMLP`, or what takes its arguments.
    """

    router: nn.Module
    experts: nn.Module
    shared_expert: mlp.SharedMLP | None

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        if not isinstance(args, Arguments):
            raise TypeError(f"{type(self).__name__}: args: expected Arguments, got {type(args).__name__}")
        args.check()
        self.args = args
        self.router = router.LearnedRouter(args)
        self.experts = self._init_experts_mlp(args)
        self.shared_expert = sharedexpert_registry.get(args) if args.shared_expert else None

    def _init_experts_mlp(self, args: Arguments) -> nn.Module:
        return ParallelMLP(args)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``(sequence, batch, H)``, or any leading dimensions, to the same shape.

        Returns:
            ``(out, bias)`` with ``bias`` and ``return_bias``, otherwise ``out`` alone.

        Raises:
            TypeError, ValueError: x is no floating-point tensor of ``hidden_size`` columns.
        """
        name, hidden = type(self).__name__, self.args.hidden_size
        check_tensors(name, x=x)
        check_floating(name, x=x)
        if x.dim() < 1 or x.shape[-1] != hidden:
            raise ValueError(f"{name}: x: expected shape (..., hidden_size = {hidden}), got {tuple(x.shape)}")
        x = common.cast_if_autocast_enabled(x)
        scores, expert_weights, top_experts = self.router(x)
        out = self.experts(x, scores, expert_weights, top_experts)
        if self.shared_expert is None:
            return out
        return self.shared_expert.add_experts_sharedexpert(self.shared_expert(x), out)
