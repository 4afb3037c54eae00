"""What a router does with some tokens, as plain numbers: who goes where, who is dropped, how experts are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dmoe.auxiliary import AuxiliaryLosses
from dmoe.config import MoEConfig
from dmoe.metrics import dropped_share, routing_entropy
from dmoe.routing import Cosine, Hash, Routing, build_router, groups_of

POPULARITY = 0.8  # standard deviation of what makes some experts more popular than others in random logits


@dataclass(frozen=True)
class RoutingView:
    """One routing of T tokens to E experts. Tensors are on the CPU.

    Attributes:
        name: of what is shown.
        choice: ``(T, E)`` integer: k where the expert is the token's k-th choice (or the token the expert's, if experts
            choose), 0 where neither.
        kept: ``(T, E)`` bool: chosen and not dropped.
        shade: ``(T, E)`` float, the probabilities behind it, or None.
        shade_name: what these are.
        load, computed: assignments of each expert before any drop, and what is left of them, ``(E,)`` integer.
        capacity: the most rows of an expert (and group); None where nothing is dropped.
        groups: of consecutive tokens, with a capacity each.
        top_k: K.
        training: whether the router trained.
        experts_choose: tokens do not.
        dropped: share of the assignments.
        entropy: mean entropy of the probabilities, nats; None where the router has none.
        losses: by name, each its coefficient and its value without it; empty in evaluation.
        notes: sentences about how this differs from what the name promises.
    """

    name: str
    choice: Tensor
    kept: Tensor
    shade: Tensor | None
    shade_name: str
    load: Tensor
    computed: Tensor
    capacity: int | None
    groups: int
    top_k: int
    training: bool
    experts_choose: bool
    dropped: float
    entropy: float | None
    losses: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.choice.shape[0]

    @property
    def num_experts(self) -> int:
        """E."""
        return self.choice.shape[1]

    @property
    def idle_tokens(self) -> int:
        """Tokens that no expert computes."""
        return int((~self.kept.any(1)).sum())


def random_logits(num_tokens: int, num_experts: int, seed: int) -> Tensor:
    """Standard normal logits, ``(T, E)`` float32, raised by a popularity of each expert that is normal, too."""
    generator = torch.Generator().manual_seed(seed)
    popularity = POPULARITY * torch.randn(num_experts, generator=generator)
    return torch.randn(num_tokens, num_experts, generator=generator) + popularity


@torch.no_grad()
def look(
    config: MoEConfig,
    *,
    name: str,
    logits: Tensor | None = None,
    num_tokens: int = 32,
    seed: int = 0,
    training: bool = True,
    notes: tuple[str, ...] = (),
) -> RoutingView:
    """Route tokens once as ``config`` says.

    Args:
        config: of the layer, of which only the router is built.
        name, notes: see :class:`RoutingView`.
        logits: ``(T, E)`` floating point, given to the router instead of its own. None draws them, or what the family
            looks at: random x for ``cosine``, ids of a Zipf distribution for ``hash``.
        num_tokens: T, without logits.
        seed: of all that is drawn; PyTorch's generator is left as it was.
        training: whether the router is in training mode.

    Raises:
        ValueError: logits of another shape, or for a family that has none; and what the router refuses.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        router = build_router(config, device="cpu").train(training)
        drawn = logits if logits is not None else random_logits(num_tokens, config.num_experts, seed)
        torch.manual_seed(seed)  # the same noise for every router, whatever it drew for its parameters
        routing, seen = _route(router, config, drawn, seed, given=logits is not None)
    shade, shade_name = routing.router_probs, "router probability"
    if shade is None and seen is not None:
        shade, shade_name = torch.softmax(seen.float(), 1), "softmax of the logits"
    groups = groups_of(config, len(drawn), 1)
    choice, kept = _choices(routing, len(drawn), config.num_experts, groups)
    capacity = routing.plan.num_rows // (config.num_experts * groups) if config.family.experts_choose else None
    terms = AuxiliaryLosses(config).terms(routing) if training else {}
    return RoutingView(
        name=name,
        choice=choice,
        kept=kept,
        shade=shade,
        shade_name=shade_name,
        load=routing.plan.tokens_per_expert.long(),
        computed=kept.sum(0),
        capacity=routing.plan.capacity if capacity is None else capacity,
        groups=groups,
        top_k=config.top_k,
        training=training,
        experts_choose=config.family.experts_choose,
        dropped=float(dropped_share(routing.plan.tokens_per_expert, kept.sum(0))),
        entropy=None if routing.router_probs is None else float(routing_entropy(routing.router_probs)),
        losses={loss: (coefficient, float(terms[loss])) for loss, coefficient in config.coefficients if loss in terms},
        notes=notes,
    )


def _route(
    router: nn.Module, config: MoEConfig, logits: Tensor, seed: int, *, given: bool
) -> tuple[Routing, Tensor | None]:
    """The routing, and the logits that it looked at, if any."""
    generator = torch.Generator().manual_seed(seed)
    by_logits = getattr(router, "route", None)
    family = config.family
    if isinstance(family, Hash):
        table = family.experts_of_ids(config.num_experts)
        frequency = 1 / torch.arange(1, len(table) + 1)
        ids = torch.multinomial(frequency, len(logits), replacement=True, generator=generator)
        if family.weights == "learned":
            assert by_logits is not None
            return by_logits(logits, expert_indices=table[ids]), logits
    else:
        ids = None
    if by_logits is not None and (given or not isinstance(family, Cosine)):
        return by_logits(logits), logits
    if given:
        raise ValueError(f"routing.show: --logits: expected none with router={family.name!r}, which has no logits")
    x = torch.randn(len(logits), config.hidden_size, generator=generator)
    return router(x, token_ids=ids), None


def _choices(routing: Routing, num_tokens: int, num_experts: int, groups: int) -> tuple[Tensor, Tensor]:
    """``choice`` and ``kept`` of a view."""
    choice = torch.zeros(num_tokens, num_experts, dtype=torch.int64)
    kept = torch.zeros(num_tokens, num_experts, dtype=torch.bool)
    plan = routing.plan
    if routing.expert_indices is not None:
        for k in range(routing.expert_indices.shape[1]):
            expert = routing.expert_indices[:, k].long()
            token = (expert < num_experts).nonzero().flatten()  # E: a policy took the choice away
            choice[token, expert[token]] = k + 1
            kept[token, expert[token]] = plan.token_to_rows[token, k] >= 0
        return choice, kept
    starts, tokens = plan.expert_offsets.tolist(), plan.row_to_token.tolist()
    of_group = max(plan.num_rows // (num_experts * groups), 1)
    for chooser in range(num_experts):
        for place, chosen in enumerate(tokens[starts[chooser] : starts[chooser + 1]]):
            if chosen >= 0:
                choice[chosen, chooser], kept[chosen, chooser] = place % of_group + 1, True
    return choice, kept
