"""``MoE``, a layer whose experts take a bounded number of tokens, and the load-balancing loss over all layers.

What differs from MegaBlocks, for ``dMoE`` too:

- Parameters are held in dmoe's layout (``experts.mlp.up_proj`` or ``gate_up_proj``, ``down_proj``), so optimizer states
  and FSDP1 see those names. ``state_dict()`` and ``load_state_dict()`` speak MegaBlocks' (``experts.mlp.w1``, ``v1``,
  ``w2``), and ``experts.mlp.w1`` and its kin are views of the parameters, ``(E, ., .)`` also where MegaBlocks has
  ``(E * F, H)``.
- Zero tokens work, and so does any ``ffn_hidden_size``; inputs may have any leading dimensions.
- Products and sums are accumulated in float32 and rounded once; ties between experts go to the lowest id.
- What the losses need is saved in training alone and holds one round: see :mod:`.saved`.
- ``shared_expert`` and ``return_bias`` work together.
- ``MoE`` with ``mlp_type='glu'`` is refused: MegaBlocks builds plain experts there without a word.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dmoe import losses
from dmoe.compat.megablocks.layers import common
from dmoe.compat.megablocks.layers.arguments import Arguments
from dmoe.compat.megablocks.layers.glu import SharedGLU
from dmoe.compat.megablocks.layers.mlp import MLP, ExpertParameters, SharedMLP
from dmoe.compat.megablocks.layers.router import LearnedRouter
from dmoe.compat.megablocks.layers.saved import Rounds, layers_per_stage
from dmoe.ops._checks import check_tensors
from dmoe.plan import plan_token_choice

_LOADS = Rounds("load-balancing loss", "clear_load_balancing_loss")


def save_load_balancing_loss(loss: tuple[Tensor, Tensor]) -> None:
    """Add what a layer contributes, ``(tokens_per_expert (E,), expert_scores (T, E))``.

    Layers do this by themselves, in training. What is saved by hand stays until it is cleared.
    """
    _LOADS.save(loss)


def get_load_balancing_loss() -> list[tuple[Tensor, Tensor]]:
    """What the layers saved since the last clearing, in order: a new list of (tokens_per_expert, expert_scores)."""
    return _LOADS.values()


def clear_load_balancing_loss() -> None:
    """Forget what the layers saved, and the graphs it holds: call it after each step."""
    _LOADS.clear()


def batched_load_balancing_loss(args: Arguments) -> Tensor | float:
    """``weight * E / (num_layers * T * K) * sum_l sum_e n_le * mean_t p_lte`` (Switch; Fedus et al. 2021, eq. 4).

    ``n_le`` counts layer l's assignments to expert e before any drop, ``p_lte`` are its scores of token t.

    Args:
        args: the model's; ``num_layers`` and the pipeline options say how many layers must have left something.

    Returns:
        A scalar in the scores' dtype, float32 with ``moe_lbl_in_fp32``: the weight under even routing, over all
        pipeline stages. 0.0 when the weight is 0; 0 without tokens.

    Raises:
        ValueError: another number of layers has run in training since the last clearing, or shapes disagree.
        RuntimeError: the layers ran under ``no_grad``, and this does not.
    """
    if args.moe_loss_weight == 0:
        return 0.0
    saved, layers, experts = _LOADS.values(), layers_per_stage(args), args.moe_num_experts
    if len(saved) != layers:
        raise ValueError(
            f"batched_load_balancing_loss: expected {layers} layers (num_layers = {args.num_layers}, "
            f"pipeline_model_parallel_size = {args.pipeline_model_parallel_size}, "
            f"num_layers_per_virtual_pipeline_stage = {args.num_layers_per_virtual_pipeline_stage}), got {len(saved)} "
            "since clear_load_balancing_loss(); layers in evaluation leave nothing"
        )
    _LOADS.check_recorded()
    tokens = saved[0][1].shape[0]
    for counts, scores in saved:
        if tuple(counts.shape) != (experts,) or tuple(scores.shape) != (tokens, experts):
            raise ValueError(
                f"batched_load_balancing_loss: expected tokens_per_expert ({experts},) and expert_scores "
                f"({tokens}, {experts}) of every layer, got {tuple(counts.shape)} and {tuple(scores.shape)}"
            )
    given = saved[0][1].dtype
    wide = torch.promote_types(given, torch.float32)  # half precision counts to 65504, and exactly to 2048
    total = torch.stack([torch.dot(counts.to(wide), scores.sum(0, dtype=wide)) for counts, scores in saved]).sum()
    scale = experts * args.moe_loss_weight / (args.num_layers * max(tokens, 1) ** 2 * args.moe_top_k)
    return (scale * total).to(wide if args.moe_lbl_in_fp32 else given)


class ParallelMLP(nn.Module):
    """The experts behind a router: ``forward`` takes its scores and choices.

    Args:
        args: sizes, capacity, bias.
    """

    mlp: ExpertParameters
    bias: nn.Parameter | None

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        args.check()
        self.args = args
        self.num_experts, self.top_k = args.moe_num_experts, args.moe_top_k
        self.mlp = self._init_mlp(args)
        bias = torch.zeros(args.hidden_size, device=args.device, dtype=common.dtype(args)) if args.bias else None
        self.bias = None if bias is None else nn.Parameter(bias)

    def _init_mlp(self, args: Arguments) -> ExpertParameters:
        if args.mlp_type != "mlp":
            raise ValueError(
                f"MoE: mlp_type: expected 'mlp', got {args.mlp_type!r}: a capacity goes with plain experts only; "
                "dMoE has gated ones"
            )
        return MLP(args)

    def expert_capacity(self, tokens: int) -> int:
        """``int(moe_capacity_factor * K * T / E)``: rows that one expert takes of T tokens; 0 means all."""
        return int(self.args.moe_capacity_factor * (self.top_k * tokens / self.num_experts))

    def load_balancing_loss(self, tokens_per_expert: Tensor, expert_scores: Tensor) -> Tensor:
        """This layer's loss without a weight, 1 under even routing; see :func:`dmoe.losses.load_balancing_loss`."""
        return losses.load_balancing_loss(expert_scores, tokens_per_expert)

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
        tokens = x.reshape(-1, x.shape[-1])
        top_experts = top_experts.reshape(-1, self.top_k)
        plan = plan_token_choice(top_experts, self.num_experts, capacity=self._capacity(tokens.shape[0]))
        y = self.mlp.route(tokens, plan, expert_weights.reshape(-1, self.top_k)).view(x.shape)
        if self.training and self.args.moe_loss_weight > 0:
            _LOADS.save((plan.tokens_per_expert, scores), self, self.args)
        if self.bias is None:
            return y
        return (y, self.bias) if self.args.return_bias else y + self.bias

    def _capacity(self, tokens: int) -> int | None:
        return min(self.expert_capacity(tokens), tokens * self.top_k) or None


class MoE(nn.Module):
    """A Mixture-of-Experts layer with a capacity; :class:`~dmoe.compat.megablocks.dMoE` has none.

    Args:
        args: all options.
    """

    def __init__(self, args: Arguments) -> None:
        super().__init__()
        if not isinstance(args, Arguments):
            raise TypeError(f"{type(self).__name__}: args: expected Arguments, got {type(args).__name__}")
        args.check()
        self.router = LearnedRouter(args)
        self.experts = self._init_experts_mlp(args)
        self.shared_expert: SharedMLP | None = None
        if args.shared_expert:
            self.shared_expert = (SharedGLU if args.mlp_type == "glu" else SharedMLP)(args)

    def _init_experts_mlp(self, args: Arguments) -> ParallelMLP:
        return ParallelMLP(args)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """``(sequence, batch, H)``, or any leading dimensions, to the same shape.

        Returns:
            ``(out, bias)`` with ``bias`` and ``return_bias``, otherwise ``out`` alone.

        Raises:
            TypeError, ValueError: x is no floating-point tensor of ``hidden_size`` columns.
        """
        name, hidden = type(self).__name__, self.router.args.hidden_size
        check_tensors(name, x=x)
        if not x.is_floating_point():
            raise TypeError(f"{name}: x: expected a floating-point tensor, got {x.dtype}")
        if x.dim() < 1 or x.shape[-1] != hidden:
            raise ValueError(f"{name}: x: expected shape (..., hidden_size = {hidden}), got {tuple(x.shape)}")
        x = common.cast_if_autocast_enabled(x)
        scores, expert_weights, top_experts = self.router(x)
        out = self.experts(x, scores, expert_weights, top_experts)
        if self.shared_expert is None:
            return out
        return self.shared_expert.add_experts_sharedexpert(self.shared_expert(x), out)
