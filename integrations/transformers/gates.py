"""Which of dmoe's activations an experts module applies between its projections, told by what it computes.

A module's gate is run on a few hundred float64 numbers, and what comes out is compared with what dmoe's own operation
makes of them, for every activation that it has; those with parameters are tried with the numbers that the module keeps
(its ``limit``, ``alpha`` and so on). No name of a class is looked at, so subclasses, copies and code from the hub are
known as well as the originals.
"""

from __future__ import annotations

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import dmoe
from dmoe.integrations.transformers.versions import Layout, layout_of

_NAMED = ("silu", "gelu", "gelu_tanh", "relu", "relu_squared", "sigmoid")
_ALPHAS, _OFFSETS = (1.0, 1.702), (0.0, 1.0)  # what published gates write into their formula
_MOST_KNOWN = 256


class Gate(NamedTuple):
    """An activation of :func:`dmoe.functional.moe_mlp`, and the order of the columns that it reads.

    Attributes:
        activation: as ``moe_mlp`` takes it, as text: a compiler may keep that in a graph.
        interleaved: columns are gate0, up0, gate1, up1; False also without a gate.
    """

    activation: Any
    interleaved: bool


# By all that a gate may depend on: values, so that copies of a module are known, and changes of its numbers are seen.
_known: dict[Any, Gate | None] = {}


@torch.compiler.assume_constant_result
def gate_of(experts: nn.Module, act_name: str = "act_fn") -> Gate | None:
    """The activation between a module's projections; None where it is none that dmoe has.

    What a compiled graph computes is settled when it is traced: this is called then, and not looked into.

    Args:
        experts: the module.
        act_name: its attribute that holds the activation, if it has no ``_apply_gate``.
    """
    layout, act = layout_of(experts), getattr(experts, act_name, None)
    own = getattr(experts, "_apply_gate", None) if layout.gated else None
    if (isinstance(act, nn.Module) and _has_to_be_called(act)) or (own is not None and experts._buffers):
        return None  # a buffer, of which nobody says what it is for, may be the gate's
    kind = type(act) if isinstance(act, nn.Module) else act
    numbers = _numbers(experts) + _numbers_of_act(act)
    key = (layout, getattr(own, "__func__", own), kind, experts.training, numbers)
    if key not in _known:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = _recognise(apply_gate(experts, layout, act_name), layout, numbers)
    return _known[key]


def apply_gate(experts: Any, layout: Layout, act_name: str = "act_fn") -> Callable[[Tensor], Tensor]:
    """What the module itself does to the up projection's result: ``(R, 2 F)``, or ``(R, F)`` without a gate."""
    if not layout.gated:
        return getattr(experts, act_name)
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate

    def default(pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, dim=-1)
        return getattr(experts, act_name)(gate) * up

    return default


def _has_to_be_called(act: Any) -> bool:
    """Somebody looks at what it is given, or changes it; or it has numbers that training may change."""
    if act._forward_hooks or act._forward_pre_hooks or act._backward_hooks or act._parameters or act._buffers:
        return True
    return bool(act._modules) and any(map(_has_to_be_called, act._modules.values()))


def _numbers(thing: Any) -> tuple[tuple[str, float], ...]:
    """What it keeps as plain numbers, by name."""
    named = getattr(thing, "__dict__", {})
    return tuple([(n, v) for n, v in named.items() if type(v) in (int, float) and n[0] != "_"])


def _numbers_of_act(act: Any) -> tuple[tuple[str, float], ...]:
    """Those of an activation, and of the modules that it is made of."""
    if not isinstance(act, nn.Module):
        return ()
    own = _numbers(act)
    return tuple(itertools.chain(own, *map(_numbers_of_act, act._modules.values()))) if act._modules else own


def _recognise(
    function: Callable[[Tensor], Tensor], layout: Layout, numbers: tuple[tuple[str, float], ...]
) -> Gate | None:
    """Look, in a thread of its own: modes, autocast and tracing that are on here are not on there."""
    found: list[Gate] = []

    def look() -> None:
        try:
            found.extend(itertools.islice(_candidates_that_fit(function, layout, numbers), 1))
        except Exception:  # whatever a stranger's gate raises, the answer is the same
            found.clear()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0] if found else None


def _candidates_that_fit(
    function: Callable[[Tensor], Tensor], layout: Layout, numbers: tuple[tuple[str, float], ...]
) -> Iterator[Gate]:
    gate, up = _plant()
    for interleaved in dict.fromkeys((layout.interleaved, not layout.interleaved)) if layout.gated else (False,):
        pre = gate
        if layout.gated:
            pre = torch.stack((gate, up), 1 if interleaved else 0).flatten()
        observed = _observe(function, pre.unsqueeze(0))
        if observed is None or observed.shape != (1, gate.numel()):
            return
        for activation in _candidates(numbers, layout.gated):
            expected = _evaluate(activation, gate, up if layout.gated else None)
            if _alike(observed[0], expected, gate, up):
                yield Gate(activation, interleaved)


def _plant() -> tuple[Tensor, Tensor]:
    """Gates and ups that cover what near numbers tell (the two gelus are 4e-4 apart) and far ones (clamps, caps)."""
    near = torch.linspace(-12, 12, 241, dtype=torch.float64, device="cpu")
    far = torch.linspace(-900, 900, 61, dtype=torch.float64, device="cpu")
    gate = torch.cat((near, far))
    up = torch.cat((torch.cos(17 * near) * 12, torch.cos(17 * far) * 900))
    return gate, up


def _observe(function: Callable[[Tensor], Any], pre: Tensor) -> Tensor | None:
    """What it makes of the numbers; None unless that follows from the numbers alone."""
    with torch.random.fork_rng(devices=[]):
        first, again = function(pre.clone()), function(pre.clone())
    settled = isinstance(first, Tensor) and not first.requires_grad and torch.equal(first, again)
    return first.detach() if settled else None


def _candidates(numbers: tuple[tuple[str, float], ...], gated: bool) -> Iterator[str]:
    """dmoe's activations, those with numbers of their own for all that may be theirs."""
    yield from _NAMED
    values = {float(value) for _, value in numbers if 0 < value < math.inf} if gated else set()
    for limit, alpha, offset in itertools.product(values, {*_ALPHAS, *values}, _OFFSETS):
        yield str(dmoe.ClampedSwiGLU(limit, alpha, offset))
    for caps in itertools.product(values, repeat=2):
        yield str(dmoe.SoftcappedSwiGLU(*caps))


def _evaluate(activation: Any, gate: Tensor, up: Tensor | None) -> Tensor:
    """What dmoe's operation computes of them: through one expert, whose projections hand on what they are given."""
    if up is None:
        x, up_proj, down_proj = gate.unsqueeze(1), gate.new_ones(1, 1, 1), gate.new_ones(1, 1, 1)
    else:
        x, up_proj = torch.stack((gate, up), 1), torch.eye(2, dtype=gate.dtype, device="cpu").view(1, 2, 1, 2)
        down_proj = gate.new_ones(1, 2, 1)
    weights = dmoe.ExpertWeights(up_proj, down_proj, gated=up is not None)
    first = torch.zeros(x.shape[0], 1, dtype=torch.int64, device="cpu")
    y = dmoe.functional.moe_mlp(x, first, torch.ones_like(x[:, :1]), weights, activation=activation)
    return y[:, 0]


def _alike(observed: Tensor, expected: Tensor, gate: Tensor, up: Tensor) -> bool:
    """Equal but for a gate that computes in float32, and what that loses in a tail that cancels."""
    bound = 2e-6 * expected.abs() + 1e-6 * (1 + gate.abs().clamp(max=12)) * (1 + up.abs())
    return bool(((observed.double() - expected).abs() <= bound).all())
