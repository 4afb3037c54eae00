"""Reads a dense feed-forward block: which of its linears is which, what lies between them, what it drops.

A block is recognised by what it computes and not by its names. Its own ``forward`` runs twice on a few random tokens,
on the CPU, with every linear answering random numbers in place of a product: what reaches the last linear then tells
the activation and which projection is the gate, whatever the block calls them. No weight is read, so it works for any
device, size and dtype, on ``meta`` and with projections that start at zero, and it costs milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from dmoe.activations import NAMES, ActivationName
from dmoe.known_activations import match_activation

RECOGNISED = (
    "down(act(up(x))) or down(act(gate(x)) * up(x)), with biases or without, with nn.Dropout before or after down, act "
    f"being {', '.join(NAMES[:-1])} or {NAMES[-1]}: an nn.Sequential, a hand-written module, the MLP of a Hugging Face "
    "model; or a whole nn.TransformerEncoderLayer or nn.TransformerDecoderLayer"
)

_TOKENS = 64  # enough values to tell gelu from its tanh form at any width


class UnrecognisedFFNError(ValueError):
    """A module is no feed-forward block of a known form; the message is the rest of a sentence that names it."""


@dataclass(frozen=True)
class DenseFFN:
    """What a dense feed-forward block computes, and where its weights lie.

    Attributes:
        up: the linear whose output the activation, or the gate, is applied to.
        gate: the linear under the activation in a gated block; None without one, and where ``fused``.
        down: the last linear.
        gated: ``down(act(gate(x)) * up(x))`` instead of ``down(act(up(x)))``.
        fused: None; or for an ``up`` that computes gate and up in one product, which comes first: ``gate`` or ``up``.
        activation: None where it is none that dmoe has.
        activation_dropout, output_dropout: probabilities before and after ``down``.
    """

    up: nn.Module
    gate: nn.Module | None
    down: nn.Module
    gated: bool
    fused: str | None
    activation: ActivationName | None
    activation_dropout: float
    output_dropout: float

    @property
    def hidden_size(self) -> int:
        """H."""
        return _sizes(self.up)[1]

    @property
    def ffn_hidden_size(self) -> int:
        """F."""
        return _sizes(self.down)[1]

    @property
    def linears(self) -> list[nn.Module]:
        """All of its linears."""
        return [linear for linear in (self.gate, self.up, self.down) if linear is not None]

    @property
    def has_bias(self) -> bool:
        """Whether any linear has a bias."""
        return any(linear.bias is not None for linear in self.linears)

    def up_proj(self) -> Tensor:
        """``(2, F, H)`` gate then up when gated, else ``(F, H)``."""
        return self._halves(_matrix)

    def down_proj(self) -> Tensor:
        """``(H, F)``."""
        return _matrix(self.down)

    def up_bias(self) -> Tensor:
        """``(2, F)`` or ``(F,)``; zeros where a linear has none."""
        return self._halves(_bias)

    def down_bias(self) -> Tensor:
        """``(H,)``; zeros without one."""
        return _bias(self.down)

    def _halves(self, read: Callable[[nn.Module], Tensor]) -> Tensor:
        up = read(self.up)
        if self.gate is not None:
            return torch.stack((read(self.gate), up))
        if self.fused is None:
            return up
        halves = up.view(2, self.ffn_hidden_size, *up.shape[1:])
        return halves if self.fused == "gate" else halves.flip(0)


def is_linear(module: nn.Module) -> bool:
    """An ``nn.Linear``, or Hugging Face's ``Conv1D`` (GPT-2), whose weight is the transpose of one."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _matrix(linear: nn.Module) -> Tensor:
    """A linear's weight as [out, in]."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(linear, nn.Linear) else weight.t()


def _bias(linear: nn.Module) -> Tensor:
    bias = linear.bias
    return bias if isinstance(bias, Tensor) else _matrix(linear).new_zeros(_sizes(linear)[0])


def _sizes(linear: nn.Module) -> tuple[int, int]:
    """(out, in)."""
    rows, columns = _matrix(linear).shape
    return rows, columns


@dataclass
class _Trace:
    """One run of a block on planted numbers: what went into each linear and dropout, in order, and what came out."""

    x: Tensor
    calls: list[tuple[str, Tensor, Tensor]] = field(default_factory=list)  # linear, its input, its planted output
    dropouts: list[tuple[float, Tensor]] = field(default_factory=list)  # probability, input
    output: Any = None


def read_ffn(module: nn.Module, *, ignore_functional_dropout: bool = False) -> DenseFFN:
    """What a dense feed-forward block computes.

    Args:
        module: the block; or an ``nn.TransformerEncoderLayer`` or ``nn.TransformerDecoderLayer``, whose feed-forward
            part is read (the dropout behind it is the layer's own, and not reported). Left as it was.
        ignore_functional_dropout: accept a block whose forward differs in training by more than its ``nn.Dropout``
            modules.

    Raises:
        UnrecognisedFFNError: it is none; the message says what was found.
    """
    forward: Callable[[Tensor], Any]
    in_layer = isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        linears: dict[str, nn.Module] = {"linear1": module.linear1, "linear2": module.linear2}
        forward = module._ff_block
    else:
        linears = {name: child for name, child in module.named_modules() if is_linear(child)}
        forward = module.forward
        _check_nothing_else(module, linears)
    if is_linear(module) or len(linears) not in (2, 3) or not all(map(is_linear, linears.values())):
        found = "is a single linear" if is_linear(module) else f"holds {sum(map(is_linear, linears.values()))} linears"
        raise UnrecognisedFFNError(f"{found}, where a feed-forward block holds 2, or 3 with a gate")
    _check_weights(linears)

    trace = _trace(module, forward, linears, training=False)
    *ups, down = _check_flow(trace, linears)
    if not ignore_functional_dropout:
        trained = _trace(module, forward, linears, training=True, hidden=trace.x.shape[-1])
        same = _equal(trained.calls[-1][1], down[1]) and _equal(trained.output, trace.output)
        if not same:
            raise UnrecognisedFFNError(
                "does more in training than its nn.Dropout modules do (a call of F.dropout, perhaps); pass "
                "activation_dropout=... to say what should stand in for it"
            )

    width, wide = down[1].shape[-1], ups[0][2].shape[-1]
    gated = len(ups) == 2 or wide == 2 * width
    if wide not in (width, 2 * width) or (len(ups) == 2 and not wide == ups[1][2].shape[-1] == width):
        shapes = {name: _sizes(linear)[::-1] for name, linear in linears.items()}
        raise UnrecognisedFFNError(f"has linears whose widths (in, out) do not follow each other: {shapes}")
    first, second = (ups[0][2], ups[1][2]) if len(ups) == 2 else (ups[0][2][..., :width], ups[0][2][..., -width:])
    activation, gate_first = match_activation(down[1], first, second, gated)
    gate, up = (ups[0], ups[1]) if len(ups) == 2 else (None, ups[0])
    if gate is not None and not gate_first:
        gate, up = up, gate
    activation_dropout, output_dropout = _dropout_places(trace, down)
    return DenseFFN(
        up=linears[up[0]],
        gate=None if gate is None else linears[gate[0]],
        down=linears[down[0]],
        gated=gated,
        fused=None if gate is not None or not gated else ("gate" if gate_first else "up"),
        activation=activation,
        activation_dropout=activation_dropout,
        output_dropout=0.0 if in_layer else output_dropout,
    )


def _check_nothing_else(module: nn.Module, linears: dict[str, nn.Module]) -> None:
    """A block of linears holds no other state: a norm or a scale inside would be lost."""
    known = {id(tensor) for linear in linears.values() for tensor in linear.parameters(recurse=False)}
    others = [name for name, parameter in module.named_parameters() if id(parameter) not in known]
    others += [name for name, _ in module.named_buffers()]
    if others:
        names = ", ".join(others[:4]) + (", ..." if len(others) > 4 else "")
        raise UnrecognisedFFNError(f"holds {len(linears)} linears, and besides them {names}")


def _check_weights(linears: dict[str, nn.Module]) -> None:
    for name, linear in linears.items():
        weight = linear.weight
        fits = isinstance(weight, Tensor) and not is_lazy(weight) and weight.is_floating_point() and weight.dim() == 2
        if fits and isinstance(linear, nn.Linear):
            fits = linear.weight.shape == (linear.out_features, linear.in_features)
        if not fits:
            raise UnrecognisedFFNError(
                f"holds the linear {name!r}, whose weight is no plain matrix (quantised or lazy?)"
            )
    homes = {(_matrix(linear).device, _matrix(linear).dtype) for linear in linears.values()}
    if len(homes) > 1:
        raise UnrecognisedFFNError(f"holds linears of several devices or dtypes: {sorted(map(str, homes))}")


def _trace(
    module: nn.Module,
    forward: Callable[[Tensor], Any],
    linears: dict[str, nn.Module],
    *,
    training: bool,
    hidden: int | None = None,
) -> _Trace:
    """Run a block on random tokens of its hidden size: one linear's input width and another's output width."""
    outs = {_sizes(linear)[0] for linear in linears.values()}
    ins = dict.fromkeys(_sizes(linear)[1] for linear in linears.values())  # in order, each once
    sizes = [size for size in ins if size in outs] if hidden is None else [hidden]
    failure = f"has no linear that leads back to the width of another's input (in {list(ins)}, out {sorted(outs)})"
    for size in sizes:
        trace = _Trace(_plant(1, _TOKENS, size, seed=0))
        dropouts = [child for child in module.modules() if isinstance(child, nn.Dropout)]
        try:
            with (
                _planted(module, linears, dropouts, trace, training),
                torch.no_grad(),
                torch.random.fork_rng(devices=[]),
            ):
                trace.output = forward(trace.x)
        except Exception as error:  # whatever a stranger's forward raises, the answer is the same
            failure = f"does not run on one (batch, tokens, {size}) tensor: {type(error).__name__}: {error}"
            continue
        return trace
    raise UnrecognisedFFNError(failure)


def _plant(*shape: int, seed: int) -> Tensor:
    """Normal float32 numbers, of standard deviation 2, that bfloat16 holds too: a cast inside a block is exact."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return (2 * torch.randn(shape, generator=generator, device="cpu", dtype=torch.float32)).bfloat16().float()


def _equal(a: Tensor, b: Tensor) -> bool:
    """Same tokens, in whatever leading shape and dtype the block handles them."""
    return a.shape[-1] == b.shape[-1] and torch.equal(
        a.reshape(-1, a.shape[-1]).float(), b.reshape(-1, b.shape[-1]).float()
    )


@contextmanager
def _planted(
    module: nn.Module, linears: dict[str, nn.Module], dropouts: list[nn.Dropout], trace: _Trace, training: bool
) -> Iterator[None]:
    """While open, linears answer random numbers and dropouts pass everything; both write into the trace."""

    def as_linear(name: str, linear: nn.Module, seed: int) -> Callable[[Tensor], Tensor]:
        rows, columns = _sizes(linear)

        def answer(x: Tensor) -> Tensor:
            if x.shape[-1] != columns:
                raise ValueError(f"linear {name!r} takes {columns} features and got {x.shape[-1]}")
            planted = _plant(*x.shape[:-1], rows, seed=seed)
            trace.calls.append((name, x.clone(), planted.clone()))  # clones: an in-place activation overwrites planted
            return planted

        return answer

    def as_dropout(dropout: nn.Dropout) -> Callable[[Tensor], Tensor]:
        def answer(x: Tensor) -> Tensor:
            trace.dropouts.append((dropout.p, x.clone()))
            return x

        return answer

    answers: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
        (dropout, as_dropout(dropout)) for dropout in dropouts
    ]
    answers += [(linear, as_linear(name, linear, 1 + i)) for i, (name, linear) in enumerate(linears.items())]
    flags = [(child, child.training) for child in module.modules()]
    before = [(child, child.__dict__.get("forward")) for child, _ in answers]
    try:
        for child, answer in answers:
            child.__dict__["forward"] = answer  # on the instance: Module.__call__ looks there first
        for child, _ in flags:
            child.training = training
        yield
    finally:
        for child, own in before:
            if own is None:
                del child.__dict__["forward"]
            else:
                child.__dict__["forward"] = own
        for child, flag in flags:
            child.training = flag


def _check_flow(trace: _Trace, linears: dict[str, nn.Module]) -> list[tuple[str, Tensor, Tensor]]:
    """The calls, once they are: x into all linears but the last, and the last one's output out of the block."""
    called = [name for name, _, _ in trace.calls]
    if sorted(called) != sorted(linears):
        raise UnrecognisedFFNError(f"holds the linears {list(linears)}, and its forward calls {called}")
    for name, x, _ in trace.calls[:-1]:
        if not _equal(x, trace.x):
            raise UnrecognisedFFNError(
                f"does not hand its input as it is to its linear {name!r} (a norm or a dropout before it?)"
            )
    name, _, planted = trace.calls[-1]
    output = trace.output
    if not isinstance(output, Tensor):
        raise UnrecognisedFFNError(f"returns {type(output).__name__}, where a tensor was expected")
    if output.shape != trace.x.shape or not _equal(output, planted):
        raise UnrecognisedFFNError(
            f"does not return the output of its last linear {name!r} as it is (a residual or a scale after it?)"
        )
    return trace.calls


def _dropout_places(trace: _Trace, down: tuple[str, Tensor, Tensor]) -> tuple[float, float]:
    """Probability of dropping before the last linear and after it; dropouts in a row act as one."""
    before = after = 0.0
    for p, x in trace.dropouts:
        if _equal(x.to(down[1].dtype), down[1]):
            before += p - before * p
        elif _equal(x, down[2]):
            after += p - after * p
        elif p > 0:
            raise UnrecognisedFFNError("has an nn.Dropout that is neither right before nor right after its last linear")
    return before, after
