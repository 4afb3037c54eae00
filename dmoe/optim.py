"""Optimizers that are made for matrices, on experts, whose matrices lie stacked in one parameter."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.expert_slice import local_part


class PerMatrix(torch.optim.Optimizer):
    """Any optimizer, given each expert's matrices one by one: Muon, Adafactor, or whatever takes no ``DTensor``.

    ::

        matrices, rest = [], []
        for name, parameter in model.named_parameters():
            hidden = parameter.ndim >= 2 and not name.endswith("bias") and not name.startswith(("embedding", "head"))
            (matrices if hidden else rest).append(parameter)
        optimizers = [dmoe.optim.PerMatrix(matrices, torch.optim.Muon, lr=0.02), torch.optim.AdamW(rest)]

    Muon orthogonalises a matrix, Adafactor measures rows, columns and the size of a step. Both take a parameter for one
    matrix: ``gate_up_proj (E, 2, F, H)`` is refused by some, others flatten it, or mix experts, so that a step depends
    on which of them share a rank. Here the gate and the up projection of each expert are matrices of their
    own, and so is each expert's ``down_proj``; biases are one vector for each expert and half. A step gives the same
    bits however many ranks the experts are spread over.

    It is an optimizer like any other to schedulers, scalers and ``torch.distributed.checkpoint``: its state has the
    parameters' shapes, ``DTensor`` where they are.

    Args:
        params: as every optimizer takes them. A parameter of one or two dimensions that is no expert's goes to the
            optimizer as it is. One of more dimensions that is no expert of dmoe is taken for a stack of matrices in its
            last two (so do not give it convolutions).
        optimizer: a class, as ``torch.optim.Muon``, or what ``params, **options`` makes an optimizer of.
        **options: its options.

    Raises:
        ValueError: experts of different widths, or a parameter of which a rank holds a part of each matrix (ranks that
            share an expert's F, ``expert_tp_group``, or FSDP2 with more replicas than experts on a rank); an optimizer
            that calls the model within a step, as LBFGS.
    """

    def __init__(self, params: Iterable[Any], optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> None:
        self._units: dict[nn.Parameter, list[nn.Parameter]] = {}
        self.inner: torch.optim.Optimizer | None = None
        self._make_inner = partial(optimizer, **options)
        super().__init__(params, dict(options))
        self.inner = self._make_inner([self._of_inner(group) for group in self.param_groups])
        _refuse_if_it_calls_the_model(self.inner)
        self.defaults = dict(self.inner.defaults)
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            outer.update(_options_of(inner))  # with defaults, and as it keeps them: a tensor for lr, say

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ever: parameters with options of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            self._units[parameter] = _units_of(parameter)
        if self.inner is not None:
            self.inner.add_param_group(self._of_inner(group))

    def __getstate__(self) -> dict[str, Any]:
        """With what makes the inner optimizer anew: its matrices and its state are parts of what is here."""
        marks = [(parameter, _unit_dims(parameter)) for parameter in self._units]
        return {**super().__getstate__(), "_make_inner": self._make_inner, "marks": marks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy, or from a file: units are parts of the copy's parameters. (``load_state_dict`` calls this, too.)"""
        own = {name: value for name, value in state.items() if name != "marks"}
        super().__setstate__(own)
        if "marks" not in state:
            return
        marks = state["marks"]
        for parameter, dims in marks:
            parameter.unit_dims = dims  # a deep copy of a parameter is without its attributes
        self._units = {parameter: _units_of(parameter) for parameter, _ in marks}
        self.inner = self._make_inner([self._of_inner(group) for group in self.param_groups])
        self._share_state()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the inner optimizer; a parameter without a gradient is left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        assert self.inner is not None
        for outer, inner in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner.update(_options_of(outer))  # schedulers write into ours
        stacked = {parameter: units for parameter, units in self._units.items() if units[0] is not parameter}
        for parameter, units in stacked.items():
            _follow(parameter, units)
            grads = [None] * len(units) if parameter.grad is None else _parts(parameter, local_part(parameter.grad))
            for unit, grad in zip(units, grads, strict=True):
                unit.grad = grad
        self.inner.step()
        for parameter, units in self._units.items():
            if units[0] is parameter:
                if parameter in self.inner.state:
                    self.state[parameter] = self.inner.state[parameter]
                continue
            for unit in units:
                unit.grad = None
            self._keep_state(parameter, units)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What ``state_dict()`` gave, also of another number of ranks by ``torch.distributed.checkpoint``."""
        super().load_state_dict(state_dict)
        self._keep_dtypes(state_dict)
        self._share_state()

    def _share_state(self) -> None:
        """Let the inner optimizer go on from our state, as parts of it."""
        assert self.inner is not None
        self.inner.state.clear()
        for parameter, units in self._units.items():
            if parameter not in self.state:
                continue
            if units[0] is parameter:
                self.inner.state[parameter] = self.state[parameter]
                continue
            states: list[dict[str, Any]] = [{} for _ in units]
            for key, value in self.state[parameter].items():
                each = _of_units(parameter, value, len(units))
                for state, part in zip(states, each, strict=True):
                    state[key] = part
            self.inner.state.update(zip(units, states, strict=True))

    def _keep_dtypes(self, state_dict: dict[str, Any]) -> None:
        """PyTorch casts loaded state to the parameter's dtype: bytes of an 8-bit optimizer would be numbers then."""
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        ours = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(saved, ours, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, Tensor) and self.state[parameter][name].dtype != value.dtype:
                    self.state[parameter][name] = value.detach().clone().to(parameter.device)

    def _of_inner(self, group: dict[str, Any]) -> dict[str, Any]:
        units = [unit for parameter in group["params"] for unit in self._units[parameter]]
        return {**_options_of(group), "params": units}

    def _keep_state(self, parameter: nn.Parameter, units: list[nn.Parameter]) -> None:
        """One tensor of each kind of state, of which the inner optimizer's are parts from then on."""
        assert self.inner is not None
        states = [self.inner.state[unit] for unit in units if unit in self.inner.state]
        if len(states) < len(units):
            return
        ours = self.state[parameter]
        for key, first in states[0].items():
            if not isinstance(first, Tensor) or first.dim() == 0:
                ours[key] = first  # a count of steps, alike for all
                continue
            values = [state[key] for state in states]
            parts = _of_units(parameter, ours[key], len(units)) if key in ours else []
            if [part.data_ptr() for part in parts] == [value.data_ptr() for value in values]:
                continue
            ours[key] = _like_stack(parameter, torch.stack(values)[: _lead_of(parameter).numel()])
            for state, part in zip(states, _of_units(parameter, ours[key], len(units)), strict=True):
                state[key] = part


def _refuse_if_it_calls_the_model(optimizer: torch.optim.Optimizer) -> None:
    """Between such calls the model's gradients would have to become the matrices' each time."""
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(
            "PerMatrix: optimizer: expected one whose step takes the gradients that are there, got "
            f"{type(optimizer).__name__}, whose step calls the model by itself"
        )


def _options_of(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}


def _unit_dims(parameter: Tensor) -> int:
    """Dimensions of what is one expert's: 2 of a matrix, 1 of a bias; all of a parameter that is no stack.

    Raises:
        ValueError: see :class:`PerMatrix`.
    """
    what = f"PerMatrix: params: expected whole matrices of experts, got {tuple(parameter.shape)}"
    dims: int = getattr(parameter, "unit_dims", min(parameter.dim(), 2))  # as dmoe.MoE's experts say
    if dims == 0:
        raise ValueError(f"{what} of experts of different widths, or of which ranks share each expert's F")
    if dims < parameter.dim() and local_part(parameter.detach()).shape[1:] != parameter.shape[1:]:
        raise ValueError(
            f"{what} of which each rank holds {tuple(local_part(parameter.detach()).shape)}: with FSDP2 let no more "
            "ranks hold the same experts than there are experts on one"
        )
    return dims


def _parts(parameter: Tensor, local: Tensor) -> list[Any]:
    """The units of what lies here of a parameter, or of a tensor in its shape, as views; see :func:`_cut`."""
    return _cut(local, local.dim() - _unit_dims(parameter))


def _cut(local: Tensor, lead: int) -> list[Any]:
    """What the first ``lead`` dimensions count, as views.

    Where FSDP2 has left nothing here it is one of zeros: the inner optimizer keeps state of the same kinds for it as
    other ranks' do, as ``torch.distributed.checkpoint`` expects.
    """
    if not local.shape[:lead].numel():
        return [local.new_zeros(local.shape[lead:])]
    return [local[index] for index in _indices(local.shape[:lead])]


def _indices(shape: Iterable[int]) -> list[tuple[int, ...]]:
    indices: list[tuple[int, ...]] = [()]
    for size in shape:
        indices = [(*index, position) for index in indices for position in range(size)]
    return indices


def _units_of(parameter: nn.Parameter) -> list[nn.Parameter]:
    if _unit_dims(parameter) == parameter.dim():
        return [parameter]
    parts = _parts(parameter, local_part(parameter.detach()))
    return [nn.Parameter(part, requires_grad=parameter.requires_grad) for part in parts]


def _follow(parameter: nn.Parameter, units: list[nn.Parameter]) -> None:
    """Where the parameter's memory has been exchanged, by ``to()`` or ``data =``, units become views of the new one."""
    local = local_part(parameter.detach())
    if local.numel() and units[0].data_ptr() != local.data_ptr():
        for unit, part in zip(units, _parts(parameter, local), strict=True):
            unit.data = part


def _of_units(parameter: Tensor, value: Any, count: int) -> list[Any]:
    """A parameter's state as its units have it: views of a stack, and each its own of what is alike for all."""
    if not isinstance(value, Tensor):
        return [value] * count
    if value.dim() == 0:
        return [value.clone() for _ in range(count)]
    return _cut(local_part(value), len(_lead_of(parameter)))


def _lead_of(parameter: Tensor) -> torch.Size:
    """The dimensions that count a parameter's units, as many as lie here."""
    return local_part(parameter.detach()).shape[: parameter.dim() - _unit_dims(parameter)]


def _like_stack(parameter: Any, values: Tensor) -> Tensor:
    """The state of all units as one tensor, which is cut over ranks as the parameter is."""
    stacked = values.view(*_lead_of(parameter), *values.shape[1:])
    if not hasattr(parameter, "to_local"):
        return stacked
    from torch.distributed.tensor import DTensor

    shape = torch.Size([parameter.shape[0], *stacked.shape[1:]])
    stride = tuple(math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
    return DTensor.from_local(
        stacked, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
    )
