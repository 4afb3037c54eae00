"""What forward and backward change, kept so that a step can be done again as if it had never been."""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.expert_slice import local_part


class StepState:
    """A model's state before a step, put back by :meth:`restore`.

    Generators (PyTorch's default ones, Python's, and those given), buffers and the layers' state that is no buffer,
    gradients and ``main_grad`` buffers, metrics and auxiliary losses that wait to be read. Tensors are written in
    place, as DDP's buckets and CUDA graphs know them by their memory.

    Memory: a copy of every buffer, but for codes of frozen experts; and of every gradient that is there. Gradients that
    are None (``zero_grad(set_to_none=True)``, the default) take none.

    Args:
        model: whose state it is.
        generators: further ones that the step draws from.
        gradients_are_zero: gradients that are there are zeros: no copy of them is made.

    Raises:
        ValueError: FSDP holds gradients of micro-batches before, which are no state of the model.
    """

    def __init__(
        self, model: nn.Module, generators: Iterable[torch.Generator] = (), *, gradients_are_zero: bool = False
    ) -> None:
        self._model = model
        _reshard(model)
        _refuse_held_gradients(model)
        devices = torch.cuda.default_generators if torch.cuda.is_initialized() else ()
        held = (torch.default_generator, *devices, *generators)
        self._generators = [(generator, generator.get_state()) for generator in held]
        self._python = random.getstate()
        copies: dict[int, Tensor] = {}
        self._buffers = [
            (holder, name, buffer, copies.setdefault(id(buffer), _copy(buffer)))
            for holder, name, buffer in _state_tensors(model)
        ]
        self._absent = [
            (module, name) for module in model.modules() for name, buffer in module._buffers.items() if buffer is None
        ]
        self._parameters = list(model.parameters())
        self._versions = [_version(parameter) for parameter in self._parameters]
        keep = _zero if gradients_are_zero else _copy
        self._gradients = [
            (parameter, name, grad, None if grad is None else keep(grad))
            for parameter in self._parameters
            for name in ("grad", "main_grad")
            if name == "grad" or hasattr(parameter, name)
            for grad in (getattr(parameter, name),)
        ]
        self._layers = [_LayerState(module) for module in model.modules() if hasattr(module, "auxiliary")]

    @property
    def parameters_changed(self) -> bool:
        """Whether anybody has written to a parameter since, as an optimizer does."""
        return self._versions != [_version(parameter) for parameter in self._parameters]

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back."""
        _reshard(self._model)
        for generator, state in self._generators:
            generator.set_state(state)
        random.setstate(self._python)
        for holder, name, buffer, copied in self._buffers:
            if getattr(holder, name) is not buffer:
                setattr(holder, name, buffer)
            local_part(buffer).copy_(copied)
        for module, name in self._absent:
            module._buffers[name] = None
        for parameter, name, grad, before in self._gradients:
            if getattr(parameter, name) is not grad:
                setattr(parameter, name, grad)
            if grad is not None and before is not None:
                local_part(grad.detach()).copy_(before)
        for layer in self._layers:
            layer.restore()
        torch.clear_autocast_cache()  # casts made inside an autocast that is still on, with the graph of the first run


class _LayerState:
    """The metrics of an MoE layer, and its losses that wait to be read."""

    _NAMES = ("last_metrics", "l_aux")

    def __init__(self, layer: Any) -> None:
        self._layer, self._auxiliary = layer, dict(vars(layer.auxiliary))
        self._values = {name: getattr(layer, name) for name in self._NAMES if hasattr(layer, name)}

    def restore(self) -> None:
        vars(self._layer.auxiliary).update(self._auxiliary)
        for name, value in self._values.items():
            setattr(self._layer, name, value)


def _state_tensors(model: nn.Module) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers, saved or not, and float32 state that is no buffer: the module, the name there and the tensor."""
    return [
        (module, name, tensor)
        for module in model.modules()
        if not getattr(module, "constant_buffers", False)
        for name in (*module._buffers, *getattr(module, "float32_unsaved", ()))
        if (tensor := getattr(module, name)) is not None and not tensor.is_meta
    ]


def _copy(tensor: Tensor) -> Tensor:
    return local_part(tensor.detach()).clone()


def _zero(tensor: Tensor) -> Tensor:
    return local_part(tensor.detach()).new_zeros(())


def _version(parameter: Tensor) -> int:
    return 0 if parameter.is_inference() else parameter._version


def _fsdp_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "reshard") and hasattr(module, "_get_fsdp_state")]


def _reshard(model: nn.Module) -> None:
    """After a forward without backward FSDP leaves whole parameters in the model, whose gradients are nobody's."""
    for module in _fsdp_modules(model):
        module.reshard()


def _refuse_held_gradients(model: nn.Module) -> None:
    for module in _fsdp_modules(model):
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        held = [each for group in groups if group is not None for each in group.fsdp_params]
        whole = [getattr(each, "_unsharded_param", None) for each in held]
        grads = [each.grad for each in whole if each is not None]
        grads += [getattr(each, "unsharded_accumulated_grad", None) for each in held]
        if any(grad is not None for grad in grads):
            raise ValueError(
                "exact_step: expected all micro-batches of an optimizer step inside one step, got gradients of earlier "
                "ones that FSDP has not reduced yet (set_requires_gradient_sync(False))"
            )
