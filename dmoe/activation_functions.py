"""Python functions as activations: what they have to be, whether dmoe has them by name, and what they are called.

Experts with a gate compute ``fn(gate) * up``, others ``fn(x)``. The function sees rows ``(N, F)`` of the
pre-activation, a chunk at a time, in float32 (float64 for float64), and gives as many numbers of that dtype, each from
one of them: its derivative is autograd's, of the function on a chunk again in backward, so that nothing but the
pre-activation is saved.

What it computes is looked at once, and must not change afterwards.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.activations import Activation, ActivationName, activation_of
from dmoe.known_activations import ACTIVATIONS, read_activation

ActivationFunction = Callable[[Tensor], Tensor]


class _Seen:
    """What has been found out about one function."""

    def __init__(self, name: ActivationName | None) -> None:
        self.name = name
        self.checked: set[tuple[torch.device, torch.dtype]] = set()


# By identity, and only for as long as somebody else holds the function.
_seen: weakref.WeakKeyDictionary[Any, _Seen] = weakref.WeakKeyDictionary()


def read_given(value: Any, operation: str, gated: bool) -> Activation | ActivationFunction:
    """The activation that somebody gave: what :func:`dmoe.activations.activation_of` reads, or a function.

    A function that computes a named activation, value and derivative to float64's rounding, becomes the name, which
    kernels know. It is tried on the CPU; one that does not work there is left as it is.

    Args:
        value: what was given.
        operation: for the error.
        gated: whether the experts have a gate.

    Raises:
        ValueError: neither, or a module with parameters or buffers of its own, or with a class for an instance.
    """
    if isinstance(value, str | Mapping) or not callable(value):
        return activation_of(value, operation, gated)
    if torch.compiler.is_dynamo_compiling():
        return _outside_graphs_read(value, operation)
    return _read_function(value, operation)


def _read_function(function: Any, operation: str) -> ActivationName | ActivationFunction:
    seen = _find(function)
    if seen is None:
        _check_state(function, operation)
        seen = _Seen(_in_a_thread(lambda: _recognise(function)))
        _keep(function, seen)
    return function if seen.name is None else seen.name


# torch.compiler.disable would import dynamo with dmoe, which takes seconds.
_outside_graphs_read: Any = torch._disable_dynamo(_read_function)  # type: ignore[attr-defined]


def check_function(function: ActivationFunction, operation: str, device: torch.device, dtype: torch.dtype) -> None:
    """Try a function on a few numbers, before its first use on a device and in a dtype.

    Nothing is tried on ``meta``, or while a CUDA graph is captured.

    Raises:
        ValueError: it raises, gives something that is no tensor, another shape, dtype or device; a number depends on
            other numbers, on its place or on chance; autograd does not follow it, or follows it to tensors of others.
    """
    if device.type == "meta" or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return
    seen = _find(function)
    if seen is not None and (device, dtype) in seen.checked:
        return
    problem = _in_a_thread(lambda: _problem(function, device, dtype))
    if problem is not None:
        raise ValueError(
            f"{operation}: activation: expected a function that makes of each number of a {dtype} tensor on {device} "
            f"another one, got {name_of(function)}, {problem}"
        )
    if seen is None:
        _keep(function, seen := _Seen(None))
    seen.checked.add((device, dtype))


def name_of(activation: Activation | ActivationFunction) -> str:
    """As text: a name, one with its numbers, or where a function is defined. It is the same on all ranks."""
    if isinstance(activation, str) or not callable(activation):
        return str(activation)
    if isinstance(activation, nn.Module):
        return f"{type(activation).__module__}.{' '.join(repr(activation).split())}"
    if isinstance(activation, functools.partial):
        given = [*map(repr, activation.args), *(f"{key}={value!r}" for key, value in activation.keywords.items())]
        return f"functools.partial({', '.join([name_of(activation.func), *given])})"
    named: Any = activation if hasattr(activation, "__qualname__") else type(activation)
    if getattr(torch, getattr(named, "__name__", ""), None) is activation:
        return f"torch.{named.__name__}"  # whose own name begins with a class of PyTorch's
    return f"{named.__module__}.{named.__qualname__}"


def _find(function: Any) -> _Seen | None:
    try:
        return _seen.get(function)
    except TypeError:  # nothing to hash or to refer to
        return None


def _keep(function: Any, seen: _Seen) -> None:
    try:
        _seen[function] = seen
    except TypeError:
        return  # looked at again in each call


def _check_state(function: Any, operation: str) -> None:
    if isinstance(function, type):
        raise ValueError(
            f"{operation}: activation: expected a function, got the class {function.__qualname__}; an instance of it "
            "may be one"
        )
    if isinstance(function, nn.Module):
        own = [name for name, _ in (*function.named_parameters(), *function.named_buffers())]
        if own:
            raise ValueError(
                f"{operation}: activation: expected a module without parameters and buffers, which the layer would "
                f"neither train nor move nor save, got {name_of(function)} with {', '.join(own)}"
            )


def _in_a_thread(look: Callable[[], Any]) -> Any:
    """Modes, autocast and gradients that are on or off here are not there."""
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(look()))
    thread.start()
    thread.join()
    return found[0] if found else None


def _recognise(function: Any) -> ActivationName | None:
    modules = function.modules() if isinstance(function, nn.Module) else ()
    if any(each._forward_hooks or each._forward_pre_hooks or each._backward_hooks for each in modules):
        return None  # somebody wants to see what it is given
    name, dropout = read_activation(function)
    if name is None or dropout:
        return None
    try:
        x = _everywhere()
        mine, theirs = _with_slope(function, x), _with_slope(ACTIVATIONS[name], x)
    except Exception:  # whatever a stranger's function raises, the answer is the same
        return None
    alike = (torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(mine, theirs, strict=True))
    return name if all(alike) else None


def _everywhere() -> Tensor:
    """``(3, N)`` numbers at irregular distances: dense where activations bend, and of every size up to 1e12."""
    steps = torch.arange(24_000, dtype=torch.float64, device="cpu")
    near = 40 * torch.frac(steps * 0.6180339887498949) * torch.where(steps % 2 == 0, 1.0, -1.0)
    far = 10 ** (torch.linspace(-12, 12, 3_000, dtype=torch.float64, device="cpu"))
    return torch.cat((near, far, -far)).view(3, -1)


def _with_slope(function: ActivationFunction, x: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    y = function(leaf.clone())
    (slope,) = torch.autograd.grad(y, leaf, torch.ones_like(y))
    return y.detach(), slope


def _problem(function: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    """What is wrong with it, as the end of a sentence; None for nothing."""
    try:
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_rng_type(device)):
            return _fault(function, device, dtype)
    except Exception as error:
        return f"which raised {type(error).__name__}: {error}"


def _rng_type(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def _fault(function: Any, device: torch.device, dtype: torch.dtype) -> str | None:
    place = torch.arange(24, dtype=dtype, device=device).view(4, 6)
    x, other = 4 * torch.sin(1 + 2.3 * place), 4 * torch.cos(1 + 1.7 * place)
    y = function(x.clone())
    if not isinstance(y, Tensor):
        return f"which gave {type(y).__name__}"
    if y.shape != x.shape or y.dtype != dtype or y.device != x.device:
        return f"which made of shape {tuple(x.shape)} {tuple(y.shape)}, {y.dtype} on {y.device}"
    if y.requires_grad:
        return "which computes with a tensor that requires a gradient, and would get none"
    tolerance = 1e3 * torch.finfo(dtype).eps

    def alike(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)

    if not alike(function(x.clone()), y):
        return "which gave other numbers the second time"
    checkered = (place + place // 6) % 2 == 0
    mixed = function(torch.where(checkered, x, other))
    if not alike(mixed, torch.where(checkered, y, function(other.clone()))):
        return "of which a number depends on others"
    if not alike(function(x.flip(0, 1)).flip(0, 1), y):
        return "of which a number depends on its place"
    if not alike(function(x[1:3].clone()), y[1:3]) or not alike(function(x.clone().view(1, -1))[0], y.flatten()):
        return "of which a number depends on how many there are"
    large = torch.where(place % 5 == 0, 1e3 * x, x)  # what a largest number decides, say
    if not alike(function(large)[place % 5 != 0], y[place % 5 != 0]):
        return "of which a number depends on others"
    leaf = x.clone().requires_grad_()
    if not function(leaf.clone()).requires_grad:
        return "whose result autograd does not follow"
    _with_slope(function, x)
    return None
