"""Tokens choose experts: scores, noise, top-k (maybe in the best groups and under a bias), a policy, a capacity."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig
from dmoe.losses import BALANCE_LOSSES, NOISE_LOSSES, gshard_loss
from dmoe.ops.gate_weights import gate_weights
from dmoe.ops.histogram import histogram
from dmoe.ops.router_scores import router_scores
from dmoe.ops.router_top_k import RouterChoice, router_top_k, select_experts
from dmoe.ops.topk_indices import topk_indices
from dmoe.plan import RoutingPlan
from dmoe.router_family import RouterFamily, register
from dmoe.routing import noise
from dmoe.routing.base import LinearRouter, Routing
from dmoe.routing.noise import losses_of_noise
from dmoe.routing.planning import groups_of, plan_choices, tokens_sharing
from dmoe.routing.rules import check_logits, rule_of
from dmoe.routing.second_expert import SecondExpert, keep_second, sample_second
from dmoe.routing.selection_bias import balanced_bias, count_in_backward, quantile_choice, quantile_step, sign_step


@register("top_k")
@dataclass(frozen=True)
class TopK(RouterFamily):
    """Each token takes its K best experts (Shazeer et al. 2017); the config has scores, normalisation and capacity.

    Args:
        second_expert: with K = 2, what becomes of the second: ``all`` keep it; ``sampling``: drawn from the softmax of
            the others, instead of the best of them; ``random``: kept with probability 2 g, g its weight relative to
            both where the weights are normalised before a drop, else its score (GShard, fairseq); ``random_raw``:
            always the score, which is its weight as well unless weights are normalised after a drop (Transformers'
            NLLB).
        logit_noise: ``gaussian``: chosen and weighed by noisy logits, of standard deviation ``noise_std / E`` (V-MoE,
            Tutel); ``gumbel``: chosen by logits with Gumbel noise, which draws from the softmax, and weighed without
            (DeepSpeed's RSample).
        noise_std: of the Gaussian noise, times E.
        noise_in_eval: noise and policy act in evaluation, too.
        masked_tokens: tokens that ``token_mask`` leaves out are ``absent``, in everything; or ``unrouted``: they take
            no expert, but are read as they are and count in the losses' means, as padding does in fairseq, and what
            DeepSpeed's ``used_token`` leaves out. The balance loss is then :func:`dmoe.losses.gshard_loss`.
    """

    second_expert: SecondExpert = "all"
    logit_noise: Literal["none", "gaussian", "gumbel"] = "none"
    noise_std: float = 1.0
    noise_in_eval: bool = False
    masked_tokens: Literal["absent", "unrouted"] = "absent"

    def _check_fields(self) -> None:
        self.require(0 < self.noise_std < math.inf, "noise_std", "a positive number; logit_noise='none' is no noise")

    def check(self, config: MoEConfig) -> None:
        """See :class:`dmoe.router_family.RouterFamily`."""
        super().check(config)
        two = self.second_expert == "all" or config.top_k == 2
        self.require(two, "second_expert", f"'all' with top_k = {config.top_k}, which has no second expert alone")
        noisy = self.logit_noise == "gaussian" or not config.has_loss("load", "load_importance")
        self.require(
            noisy, "logit_noise", "'gaussian' with the losses 'load' and 'load_importance', which are about it"
        )
        plain = config.score_function == "softmax" or not config.has_loss(*NOISE_LOSSES)
        if not plain:
            raise ValueError(
                "MoEConfig: score_function: expected 'softmax' with the losses 'importance', 'load' and "
                f"'load_importance', got {config.score_function!r}"
            )
        of_gshard = config.load_balancing_choices == "first" and config.token_groups == 1
        balanced = config.has_loss(*BALANCE_LOSSES)
        fits = not balanced or (of_gshard and not config.has_loss("sequence", "global"))
        for name, drawless in (("logit_noise", "none"), ("second_expert", "all")):
            own = not config.batch_invariant or getattr(self, name) == drawless
            self.require(own, name, f"{drawless!r} with batch_invariant=True, as draws go by a token's place")
        self.require(
            self.masked_tokens == "absent" or fits,
            "masked_tokens",
            "'absent' with a balance loss over anything but first choices and all tokens of a rank",
        )

    def build(self, config: MoEConfig, *, ranks: Any = None, device: Any = None, dtype: Any = None) -> nn.Module:
        """See :class:`dmoe.router_family.RouterFamily`."""
        return TopKRouter(config, self, ranks=ranks, device=device, dtype=dtype)


class TopKRouter(LinearRouter):
    """The router of :class:`TopK`.

    NaN in a token's logits makes that token's scores NaN: it goes to the lowest expert ids, its own output is NaN, and
    no other token's is.

    Args:
        config: everything about scores, selection, normalisation and capacity.
        options: of the family; None is the config's.
        ranks: :class:`dmoe.parallel.LoadOfRanks`, who shares a capacity with ``capacity_over="group"``; None is nobody.
        device, dtype: of the parameters. The selection bias and its counters are float32.

    Attributes:
        rule: how experts are scored, chosen and weighed, as :func:`dmoe.ops.router_top_k.router_top_k` takes it.
        reads_masked: whether masked tokens have to come as they are: see :attr:`TopK.masked_tokens`.
    """

    selection_bias: Tensor | None
    load_since_update: Tensor | None

    def __init__(
        self,
        config: MoEConfig,
        options: TopK | None = None,
        *,
        ranks: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        family = config.family if options is None else options
        self.options = family if isinstance(family, TopK) else TopK()
        self.ranks, self.reads_masked = ranks, self.options.masked_tokens == "unrouted"
        super().__init__(config, device=device, dtype=dtype)  # which makes parameters as the options say
        self.rule = rule_of(config)
        self.has_own_losses = self.reads_masked or config.has_loss(*NOISE_LOSSES)
        self.by_quantile = config.selection_bias and config.selection_bias_rule == "quantile"
        if config.selection_bias:
            counted = config.num_experts + int(self.by_quantile)
            self.register_float32("selection_bias", 0.0, config.num_experts, device=device)
            self.register_float32("load_since_update", 0.0, counted, device=device, persistent=False)
        else:
            self.register_buffer("selection_bias", None)
            self.load_since_update = None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh values: the linear's, and a selection bias of 0."""
        super().reset_parameters()
        for name in (*self.float32_saved, *self.float32_unsaved):
            getattr(self, name).zero_()

    def route(
        self,
        router_logits: Tensor,
        *,
        token_mask: Tensor | None = None,
        expert_indices: Tensor | None = None,
        num_sequences: int = 1,
    ) -> Routing:
        """Route by given logits ``(T, E)``; see :meth:`dmoe.routing.LinearRouter.route`.

        Masked tokens that are only ``unrouted`` count in the losses.
        """
        config = self.config
        check_logits(router_logits, config, expert_indices)
        num_tokens = router_logits.shape[0]
        groups = groups_of(config, num_tokens, num_sequences)
        capacity = config.capacity_for(tokens_sharing(config, num_tokens // groups, self.ranks), self.training)

        # Tokens that are only unrouted are scored as the others, and lose their experts afterwards.
        counted, unrouted = (None, token_mask) if self.reads_masked else (token_mask, None)
        noisy = self.training or self.options.noise_in_eval
        policy = self.options.second_expert if noisy and expert_indices is None else "all"
        logits = self._with_noise(router_logits) if noisy else router_logits
        given, amounts = (expert_indices, None) if expert_indices is not None else self._choose(logits, token_mask)
        choice = router_top_k(
            router_logits if self.options.logit_noise == "gumbel" else logits,
            self.rule,
            selection_bias=self._score_bias(logits.device),
            token_mask=counted,
            expert_indices=given,
            with_log_z=config.has_loss("z"),
            with_weights=capacity is None and policy == "all" and unrouted is None,
            count_first=config.load_balancing_choices == "first" and config.has_loss("load_balancing", "global"),
            backend=config.backend,
            batch_invariant=config.batch_invariant,
        )
        scores, chosen = choice.scores, choice.expert_indices
        if policy == "sampling":
            chosen = sample_second(logits, chosen)
        routed = chosen
        if policy in ("random", "random_raw"):
            before = config.normalize_when == "before_drop" and self.rule.normalization > 0
            routed = keep_second(scores, chosen, normalized=before and policy == "random")
        first = choice.first_choices_per_expert
        if unrouted is not None:
            routed = routed.masked_fill(~unrouted.unsqueeze(1), config.num_experts)
            first = None if first is None else histogram(routed[:, 0].contiguous(), config.num_experts + 1)[:-1]
        plan = plan_choices(routed, scores, config, capacity=capacity, groups=groups, rule=self.rule, ranks=self.ranks)
        weights = self._weights(choice, chosen, plan, raw_second=policy == "random_raw")
        if self.load_since_update is not None and self.training and torch.is_grad_enabled():
            counter = self.float32("load_since_update", weights.device)
            amounts = amounts if self.by_quantile else plan.tokens_per_expert
            if amounts is not None:  # a replayed routing says nothing of quantiles
                weights = count_in_backward(weights, amounts, counter)
        return Routing(
            plan=plan,
            gate_weights=weights,
            router_probs=self._probabilities(scores),
            log_z=choice.log_z,
            expert_indices=routed,
            chosen_indices=None if routed is chosen else chosen,
            first_choices_per_expert=first,
            token_mask=counted,
            counted_choices=self._plain_choices(scores, token_mask),
            losses=self._losses(router_logits, logits, scores, groups, counted, first),
            router_logits=router_logits,
        )

    def _with_noise(self, logits: Tensor) -> Tensor:
        kind = self.options.logit_noise
        if kind == "none":
            return logits
        if kind == "gumbel":
            return logits.detach() + noise.gumbel(logits)
        return logits + noise.gaussian(logits) * (self.options.noise_std / self.config.num_experts)

    def _score_bias(self, device: torch.device) -> Tensor | None:
        """What scores are raised by for the choice."""
        biased = self.config.selection_bias and not self.by_quantile and self.config.selection_bias_on == "scores"
        return self.float32("selection_bias", device) if biased else None

    def _choose(self, logits: Tensor, token_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Experts by other numbers than the scores that weigh them, or None; and what a bias is to count of it."""
        if self.by_quantile:
            chosen, cutoff = quantile_choice(logits, self.float32("selection_bias", logits.device), self.rule.top_k)
            trains = self.training and torch.is_grad_enabled()
            return chosen, balanced_bias(logits, cutoff, self.rule.top_k, token_mask) if trains else None
        if self.config.selection_bias_on == "logits":
            return select_experts(logits, self.rule, self.float32("selection_bias", logits.device)), None
        if self.options.logit_noise != "gumbel" or not (self.training or self.options.noise_in_eval):
            return None, None
        scores, _ = router_scores(logits, self.rule.score_function, backend=self.config.backend)
        return select_experts(scores, self.rule, self._score_bias(logits.device)), None

    def _weights(self, choice: RouterChoice, chosen: Tensor, plan: RoutingPlan, *, raw_second: bool) -> Tensor:
        if choice.gate_weights is not None:
            return choice.gate_weights
        config = self.config
        options: dict[str, Any] = {"scale": config.gate_scale, "backend": config.backend}
        # `chosen`, not what was routed: a choice that a policy took away still counts in a norm before the drop, and
        # weighs 0, as a dropped one does.
        weights = gate_weights(
            choice.scores,
            chosen,
            plan.token_to_rows,
            normalization=self.rule.normalization or None,
            after_drop=config.normalize_when == "after_drop" and config.gate_normalization is not None,
            **options,
        )
        if not raw_second:
            return weights
        raw = gate_weights(choice.scores, chosen, plan.token_to_rows, **options)
        before = config.normalize_when == "before_drop"
        return torch.stack([weights[:, 0], raw[:, 1]], 1) if before else weights

    def _plain_choices(self, scores: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """What the balance losses count with ``load_balancing_choices="plain"``."""
        config = self.config
        if config.load_balancing_choices != "plain" or not config.has_loss(*BALANCE_LOSSES):
            return None
        plain = topk_indices(scores.detach(), config.top_k)
        return plain if token_mask is None else plain.masked_fill(~token_mask.unsqueeze(1), config.num_experts)

    def _losses(
        self,
        clean: Tensor,
        noisy: Tensor,
        scores: Tensor,
        groups: int,
        token_mask: Tensor | None,
        first_choices: Tensor | None,
    ) -> dict[str, Tensor]:
        """The losses that are about noise, or about tokens that are only unrouted, as far as the config names them."""
        if not self.has_own_losses:
            return {}
        found = losses_of_noise(
            self.config, clean, noisy, scores, self.options.noise_std, groups, token_mask, self.training
        )
        if self.reads_masked and self.config.has_loss("load_balancing") and first_choices is not None:
            found["load_balancing"] = gshard_loss(self._probabilities(scores), first_choices)
        return found

    @torch.no_grad()
    def update_selection_bias(self) -> None:
        """Move the bias by what was counted since the last update; see ``MoEConfig.selection_bias_rule``."""
        if self.selection_bias is None or self.load_since_update is None:
            return
        load = self.float32("load_since_update", self.selection_bias.device)
        bias = self.float32("selection_bias", load.device)
        if self.by_quantile:
            quantile_step(bias, load, self.config.selection_bias_decay)
        else:
            sign_step(bias, load, self.config.selection_bias_update_rate)
        load.zero_()
