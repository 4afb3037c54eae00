"""Which of dmoe's activations a function is, told by what it computes and not by its name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.activations import ActivationName

ACTIVATIONS: dict[ActivationName, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu_squared": lambda x: nn.functional.relu(x).square(),
    "sigmoid": torch.sigmoid,
}


def read_activation(function: Callable[[Tensor], Any]) -> tuple[ActivationName | None, float]:
    """The activation that a function computes of a few hundred numbers, elementwise, and what it drops afterwards.

    Args:
        function: of a float64 tensor ``(1, 1, N)`` on the CPU, which it may write into.

    Returns:
        The activation, None where it is another one; and the probability of the ``nn.Dropout`` modules that it calls on
        its result, which act as one. A function that draws random numbers in another way, drops anything else, or
        raises, is none of these activations.
    """
    near = torch.linspace(-8, 8, 321, dtype=torch.float64, device="cpu").view(1, 1, -1)
    far = near * 1e3  # where clipped ones differ
    dropped: list[tuple[float, Tensor]] = []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _dropouts_off(dropped):
            found, beyond = function(near.clone()), function(far.clone())
    except Exception:  # whatever a stranger's function raises, the answer is the same
        return None, 0.0
    if not all(isinstance(y, Tensor) and y.shape == near.shape and y.is_floating_point() for y in (found, beyond)):
        return None, 0.0
    name = match_activation(found, near, near, gated=False)[0]
    if name is None or not torch.allclose(beyond.double(), ACTIVATIONS[name](far), rtol=1e-2):
        return None, 0.0
    kept = 1.0
    for p, x in dropped[: len(dropped) // 2]:  # those of the first call
        if p and (x.shape != near.shape or match_activation(x, near, near, gated=False)[0] != name):
            return None, 0.0
        kept *= 1 - p
    return name, 1 - kept


@contextmanager
def _dropouts_off(seen: list[tuple[float, Tensor]]) -> Iterator[None]:
    """While open, ``nn.Dropout`` modules pass everything; their probabilities and inputs are noted."""
    flags: list[tuple[nn.Module, bool]] = []

    def before(module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.Dropout):
            seen.append((module.p, args[0].clone()))
            flags.append((module, module.training))
            module.training = False

    hook = nn.modules.module.register_module_forward_pre_hook(before)  # of all modules: nobody says which it calls
    try:
        yield
    finally:
        hook.remove()
        for module, training in reversed(flags):
            module.training = training


def match_activation(
    observed: Tensor, first: Tensor, second: Tensor, gated: bool
) -> tuple[ActivationName | None, bool]:
    """The activation that leads to what the last linear saw, and whether ``first`` is under it; None if none does.

    Tolerance: 2 ulp of the block's dtype, plus 32 float32 ulp of the largest value, for formulas that cancel in the
    tail (the two gelus are 4e-4 apart). Of several the closest wins.
    """
    best: tuple[float, ActivationName | None, bool] = (float("inf"), None, True)
    for name, function in ACTIVATIONS.items():
        for gate_first in (True, False) if gated else (True,):
            gate, up = (first, second) if gate_first else (second, first)
            expected = function(gate) * up if gated else function(gate)
            error = (expected.to(observed.dtype).double() - observed.double()).abs()
            bound = (
                2 * torch.finfo(observed.dtype).eps * expected.abs()
                + 32 * torch.finfo(torch.float32).eps * expected.abs().max()
            )
            if error.mean() < best[0] and bool((error <= bound).all()):
                best = (float(error.mean()), name, gate_first)
    return best[1], best[2]
