"""Recording which experts tokens take, and having a model take them again: what reinforcement learning asks of a MoE.

The sampler and the trainer round differently, and near ties then send tokens to other experts, whose log-probabilities
differ by much more than rounding. Replaying the sampler's choices in the trainer removes that (R3: Ma et al. 2025,
arXiv 2510.11370). Gate weights, and their gradient to the router, are those of the live scores.

Both work by hooks on the layers' routers, which see what every family of routers is called with and returns. A forward
that runs inside a backward is a checkpoint's recomputation: it is not recorded, and it gets the choices that its
forward got. Which forward that was is told by its tokens' bits (and by the numbers of autograd's nodes where tokens are
the same), as neither kind of checkpointing says it, and neither micro-batches nor pipeline schedules keep an order.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.layer import MoE
from dmoe.model_tools import moe_layers
from dmoe.routing_record import RoutingRecord, Selection, append, empty_record

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")
_MOST_FORWARDS = 64  # of a layer, whose recomputations are served after the context


@contextmanager
def record_routing(model: nn.Module, *, layers: Iterable[Any] | None = None) -> Iterator[RoutingRecord]:
    """Record the choices of every :class:`dmoe.MoE` layer of a model, in each forward inside the context.

    Args:
        model: any module, wrapped (DDP, FSDP2, ``torch.compile``) or not. What is compiled runs eagerly inside.
        layers: names for its layers, in order: a pipeline stage that numbers its own says which of the whole model's
            they are. None: their qualified names, without those of wrappers.

    Yields:
        The :class:`dmoe.RoutingRecord`, which grows: of each layer the tokens of every forward in turn, without those
        that ``token_mask`` leaves out. Recomputations of activation checkpoints add nothing. On expert-parallel ranks
        it is of this rank's tokens.

    Raises:
        ValueError: no such layers, or layers whose experts choose.
    """
    named = _named_layers("record_routing", model, layers)
    record = empty_record({name: (layer.config.num_experts, layer.config.top_k) for name, layer in named.items()})

    def hook_of(name: str) -> Any:
        def after(router: nn.Module, args: Any, kwargs: dict[str, Any], routing: Any) -> None:
            if _in_backward():
                return
            chosen, mask = routing.expert_indices, kwargs.get("token_mask")
            if chosen is None:
                raise ValueError(f"record_routing: layer {name}: expected a router whose tokens choose, got no choices")
            append(record, name, (chosen if mask is None else chosen[mask]).detach())

        return after

    handles = [layer.router.register_forward_hook(hook_of(name), with_kwargs=True) for name, layer in named.items()]
    try:
        with _eagerly():
            yield record
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Forward:
    """One forward of a layer: what it got, for its recomputation.

    Attributes:
        digest: of its tokens' bits, a scalar on their device.
        shape: of its tokens.
        choices: of those that its mask left in, as the record has them.
        mask: ``(T,)`` bool, or None.
        num_experts: E.
        node: the number of the next node of autograd's graph, then.
        in_graph: whether it made nodes itself.
    """

    digest: Tensor
    shape: tuple[int, ...]
    choices: Tensor
    mask: Tensor | None
    num_experts: int
    node: int
    in_graph: bool


class Replay:
    """What :func:`replay_routing` yields: which tokens of its record are next."""

    def __init__(self, record: RoutingRecord) -> None:
        self._record, self._choices = record, record.choices
        self._used = {layer: torch.zeros(record.num_tokens, dtype=torch.bool, device="cpu") for layer in record.layers}
        self.take(slice(None))

    def take(self, tokens: Selection) -> None:
        """Forwards to come take these tokens of the record, one after the other; without it all, from the first.

        Args:
            tokens: a slice, or ids of tokens in the order in which a batch has them, or a mask.

        Raises:
            ValueError: tokens that the record has not.
        """
        self._record.tokens(tokens)  # says what is wrong
        everyone = torch.arange(self._record.num_tokens, device="cpu")
        self._order = everyone[tokens if isinstance(tokens, slice) else torch.as_tensor(tokens).cpu()]
        self._next = dict.fromkeys(self._choices, 0)

    def _of(self, layer: str, count: int) -> Tensor:
        """The choices of a layer's next tokens."""
        first = self._next[layer]
        order = self._order[first : first + count]
        if len(order) < count:
            raise ValueError(
                f"replay_routing: layer {layer}: expected a forward of at most {len(self._order) - first} tokens, "
                f"which are left of {len(self._order)}, got {count} (a last token that no engine ran through the "
                "model: RoutingRecord.padded)"
            )
        self._next[layer] = first + count
        self._used[layer][order] = True
        return self._choices[layer][order]

    @property
    def unused(self) -> dict[str, int]:
        """How many tokens of each layer no forward has taken yet; layers without any are left out."""
        left = {layer: int((~used).sum()) for layer, used in self._used.items()}
        return {layer: count for layer, count in left.items() if count}


@dataclass
class _State:
    """What stays at a router: who replays at the moment, and what recomputations may ask for.

    Attributes:
        active: the replay and the layer's name in its record; None outside.
        forwards: the last ones that were replayed.
    """

    active: tuple[Replay, str] | None = None
    forwards: deque[_Forward] = field(default_factory=lambda: deque(maxlen=_MOST_FORWARDS))

    def __deepcopy__(self, memo: Any) -> _State:
        return _State()

    def __reduce__(self) -> Any:
        return _State, ()  # a copy of a layer, and one in a file, has replayed nothing


@contextmanager
def replay_routing(
    model: nn.Module, record: RoutingRecord, *, layers: Iterable[Any] | None = None, allow_unused: bool = False
) -> Iterator[Replay]:
    """Have every :class:`dmoe.MoE` layer of a model take the experts that a record says, in each forward inside.

    Gate weights come from the live scores, with their gradient. Forwards take the record's tokens in turn, each as many
    as it has that ``token_mask`` leaves in: batches, micro-batches, padding and packing may be others than when it was
    recorded, and so may the number of expert-parallel ranks, each with a record of its own tokens
    (:meth:`dmoe.RoutingRecord.tokens`). Activation checkpoints of either kind recompute with their forward's choices,
    after the context as well (of each layer's last 64 forwards).

    Args:
        model: any module, wrapped (DDP, FSDP2, ``torch.compile``) or not. What is compiled runs eagerly inside.
        record: of the model's layers, and no others: see :meth:`dmoe.RoutingRecord.select`.
        layers: the record's names of the model's layers, in order; None: their qualified names, without those of
            wrappers.
        allow_unused: leave without an error although tokens of the record were not taken.

    Yields:
        A :class:`Replay`, whose ``take`` says which tokens come next.

    Raises:
        ValueError: layers, K, E or numbers of tokens that do not fit; a forward that was given ``expert_indices``, too;
            or, at the end, tokens that no forward has taken.
        RuntimeError: a recomputation whose tokens no forward had; or a replay inside a replay.
    """
    named = _named_layers("replay_routing", model, layers)
    _check_fits(record, named)
    replay = Replay(record)
    states = {name: _state_of(layer) for name, layer in named.items()}
    if any(state.active is not None for state in states.values()):
        raise RuntimeError("replay_routing: expected a model that replays nothing, got one inside another replay")
    for name, state in states.items():
        state.active = (replay, name)
    try:
        with _eagerly():
            yield replay
    finally:
        for state in states.values():
            state.active = None
    if replay.unused and not allow_unused:
        raise ValueError(
            f"replay_routing: expected forwards that take all {record.num_tokens} tokens of the record, got tokens "
            f"left by layer: {replay.unused}; allow_unused=True leaves them"
        )


def _state_of(layer: MoE) -> _State:
    """A router's state; made, and its hook put, the first time that it replays."""
    found: _State | None = layer.router.__dict__.get("_dmoe_replay")
    if found is None:
        found = _State()
        layer.router.__dict__["_dmoe_replay"] = found
        layer.router.register_forward_pre_hook(_before, with_kwargs=True)
    return found


def _before(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a router's forward: give it the record's choices."""
    if torch.compiler.is_compiling():  # outside of contexts, which run everything eagerly
        return None
    state: _State = router.__dict__["_dmoe_replay"]
    x: Tensor = args[0]
    if _in_backward():
        again = _recomputed(state, x)
        return None if again is None else (args, {**kwargs, "expert_indices": again})
    if state.active is None:
        return None
    replay, layer = state.active
    if kwargs.get("expert_indices") is not None:
        raise ValueError(
            f"replay_routing: layer {layer}: expected forwards without expert_indices, which the record has, got some"
        )
    mask: Tensor | None = kwargs.get("token_mask")
    count = x.shape[0] if mask is None else int(mask.sum())
    choices, experts = replay._of(layer, count), replay._record.num_experts[layer]
    if _may_be_recomputed():
        node: int = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        in_graph = torch.is_grad_enabled()
        state.forwards.append(_Forward(_digest(x), tuple(x.shape), choices, mask, experts, node, in_graph))
    return args, {**kwargs, "expert_indices": _indices(x, choices, mask, experts)}


def _indices(x: Tensor, choices: Tensor, mask: Tensor | None, num_experts: int) -> Tensor:
    """``(T, K)`` as a router takes it: the choices of the tokens that a mask leaves in, and E for the others."""
    ids = choices.to(x.device, torch.int64)
    if mask is None:
        return ids
    every = ids.new_full((x.shape[0], ids.shape[1]), num_experts)
    every[mask] = ids
    return every


def _recomputed(state: _State, x: Tensor) -> Tensor | None:
    """The choices of the forward that a recomputation repeats; None where the layer did not replay it.

    Raises:
        RuntimeError: the layer replays now, and had no such tokens.
    """
    alike = [each for each in state.forwards if each.shape == tuple(x.shape) and each.digest.device == x.device]
    digest = _digest(x)
    same = [each for each in alike if torch.equal(each.digest, digest)]
    if not same:
        if state.active is None:
            return None
        raise RuntimeError(
            "replay_routing: a checkpoint recomputes tokens whose bits no forward in this context had; its forward has "
            "to be inside the context, and everything before the layer deterministic (preserve_rng_state=True)"
        )
    forward = min(same, key=_distance)
    return _indices(x, forward.choices, forward.mask, forward.num_experts)


def _distance(forward: _Forward) -> tuple[bool, int]:
    """How far a forward is from the node whose backward recomputes: of forwards of the very same tokens the nearest.

    A checkpoint that ran without a graph has its own node before all of its forward; one that saves by hooks is woken
    by the last of its forward's nodes that wants a tensor.
    """
    here: Any = torch._C._current_autograd_node()
    nodes = (forward.node - here._sequence_nr()) * (-1 if forward.in_graph else 1)
    return nodes < 0, nodes


def _digest(x: Tensor) -> Tensor:
    """A number, on x's device, that tokens have in common when their bits are the same, and hardly otherwise."""
    words = x.detach().contiguous().view(torch.int32 if x.element_size() >= 4 else torch.int16)
    sums = torch.cat([words.sum(dim, dtype=torch.int64) for dim in (0, 1)])  # of columns, and of tokens
    place = torch.arange(len(sums), device=x.device)
    return (sums * (place * 2654435761 + 1)).sum()  # modulo 2**64


def _in_backward() -> bool:
    """Whether this runs inside a backward: a forward there is a checkpoint's, run again."""
    return torch._C._current_graph_task_id() != -1


def _may_be_recomputed() -> bool:
    """Whether a checkpoint may run this forward again: one kind runs it without a graph, the other saves by hooks."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _eagerly() -> AbstractContextManager[Any]:
    """What was compiled runs as it is: a compiled graph has no place for hooks that it was not traced with."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _named_layers(what: str, model: nn.Module, names: Iterable[Any] | None) -> dict[str, MoE]:
    """The layers of a model by their names in a record.

    Raises:
        ValueError: none, another number of names, or layers whose experts choose.
    """
    if isinstance(model, nn.DataParallel):
        raise ValueError(f"{what}: model: expected no nn.DataParallel, whose replicas run at once, got one")
    found = moe_layers(model)
    if not found:
        raise ValueError(
            f"{what}: model: expected one with dmoe.MoE layers, got {type(model).__name__} without any. Where experts "
            "run behind Transformers' experts interface the router is Transformers' own, and dmoe sees no choice of "
            "it: dmoe.integrations.transformers.to_dmoe makes whole blocks dmoe.MoE"
        )
    if choosing := [name for name, layer in found.items() if layer.config.family.experts_choose]:
        raise ValueError(f"{what}: model: expected layers whose tokens choose, got {choosing}, whose experts do")
    given = [_plain(name, model) for name in found] if names is None else list(map(str, names))
    if len(given) != len(found) or len(set(given)) != len(given):
        raise ValueError(f"{what}: layers: expected {len(found)} different names for {list(found)}, got {given}")
    return dict(zip(given, found.values(), strict=True))


def _plain(name: str, model: nn.Module) -> str:
    """A layer's name without those of wrappers."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    inner: Any = model
    while type(inner).__name__ in ("DistributedDataParallel", "OptimizedModule"):
        is_ddp = type(inner).__name__ == "DistributedDataParallel"  # whose name for the model is anybody's
        parts, inner = (parts[1:], inner.module) if is_ddp else (parts, inner._orig_mod)
    return ".".join(parts)


def _check_fits(record: RoutingRecord, named: dict[str, MoE]) -> None:
    if not isinstance(record, RoutingRecord):
        raise TypeError(f"replay_routing: record: expected a RoutingRecord, got {type(record).__name__}")
    if set(record.layers) != set(named):
        raise ValueError(
            f"replay_routing: record: expected the model's layers {list(named)}, got {list(record.layers)}; "
            "RoutingRecord.select cuts a record, renamed gives it other names, and layers= says which are the model's"
        )
    expected = {name: (layer.config.num_experts, layer.config.top_k) for name, layer in named.items()}
    got = record._kind()
    for name, pair in expected.items():
        if got[name] != pair:
            raise ValueError(f"replay_routing: layer {name}: expected a record of (E, K) = {pair}, got {got[name]}")
