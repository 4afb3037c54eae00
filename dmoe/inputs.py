"""What a layer accepts, checked once at the door: the parts it is built from, and what its forward is given."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from dmoe.config import MoEConfig


def config_of(config: MoEConfig | None, fields: dict[str, Any]) -> MoEConfig:
    """The config that a layer was given, whole or by its fields.

    Raises:
        TypeError: something else, or both.
    """
    if config is not None and not isinstance(config, MoEConfig):
        raise TypeError(f"MoE: config: expected a MoEConfig, got {type(config).__name__}; give fields as keywords")
    if config is not None and fields:
        raise TypeError(
            f"MoE: expected a config or its fields, got a config and {sorted(fields)}; use dataclasses.replace"
        )
    return config or MoEConfig(**fields)


def check_parts(config: MoEConfig, router_module: Any, shared_expert: Any) -> None:
    """Parts of the user's own that a layer is to be built with; None stands for the layer's.

    Raises:
        TypeError: a router without :class:`dmoe.routing.Router`'s methods.
        ValueError: a shared expert beside the one that the config describes.
    """
    routes = isinstance(router_module, nn.Module) and hasattr(router_module, "update_selection_bias")
    if router_module is not None and not routes:
        raise TypeError(
            f"MoE: router_module: expected a module with dmoe.routing.Router's methods, got {router_module!r:.80}"
        )
    if shared_expert is not None and config.shared_ffn_hidden_size:
        raise ValueError(
            "MoE: shared_expert: expected None with shared_ffn_hidden_size, which builds one, got "
            f"{type(shared_expert).__name__}"
        )


def check_copied(config: MoEConfig, *, keeps_loss: bool) -> None:
    """``nn.DataParallel`` is about to train a copy of the layer, and to throw it away afterwards.

    Args:
        config: of the layer.
        keeps_loss: whether its loss waits in it for the caller.

    Raises:
        RuntimeError: something would be lost with the copy.
    """
    lost = ["auxiliary loss"] if keeps_loss else []
    lost += ["loads for the selection bias"] if config.selection_bias else []
    if lost:
        raise RuntimeError(
            "MoE: nn.DataParallel trains copies of this layer and throws them away, and with them their "
            f"{' and '.join(lost)}: use DistributedDataParallel"
        )


def check_inputs(
    config: MoEConfig,
    x: Tensor,
    token_mask: Tensor | None,
    token_ids: Tensor | None,
    expert_indices: Tensor | None,
) -> None:
    """The arguments of :meth:`dmoe.MoE.forward`: they fit each other and the config.

    Where they have to be is for the router and the experts to say: only inside their own forward are their parameters
    sure to be in place.

    Raises:
        ValueError, TypeError: another shape, type or device than expected.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"MoE: x: expected a floating-point tensor, got {got}")
    if x.is_nested:
        raise TypeError(
            "MoE: x: expected a dense tensor, got a nested one; of a jagged one give x.values(), (tokens, H), and put "
            "the result back with torch.nested.nested_tensor_from_jagged(y, x.offsets())"
        )
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise RuntimeError(
            "MoE: torch.func's transforms (vmap, grad, ...) and forward-mode differentiation (jvp) are not supported; "
            "give the layer the whole batch, and use backward() or torch.autograd.grad"
        )
    if x.dim() < 1 or x.shape[-1] != config.hidden_size:
        raise ValueError(f"MoE: x: expected shape (..., hidden_size = {config.hidden_size}), got {tuple(x.shape)}")
    leading = tuple(x.shape[:-1])
    expected = {
        "token_mask": (token_mask, leading),
        "token_ids": (token_ids, leading),
        "expert_indices": (expert_indices, (*leading, config.top_k)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"MoE: {name}: expected a tensor, got {type(tensor).__name__}")
        if tuple(tensor.shape) != shape or tensor.device != x.device:
            raise ValueError(
                f"MoE: {name}: expected shape {shape} on {x.device}, got {tuple(tensor.shape)} on {tensor.device}"
            )
        allowed = (torch.bool,) if name == "token_mask" else (torch.int32, torch.int64)
        if tensor.dtype not in allowed:
            kinds = " or ".join(map(str, allowed))
            raise TypeError(f"MoE: {name}: expected {kinds}, got {tensor.dtype}")


def flatten_inputs(
    router: nn.Module,
    x: Tensor,
    token_mask: Tensor | None,
    token_ids: Tensor | None,
    expert_indices: Tensor | None,
) -> tuple[Tensor, dict[str, Any]]:
    """What :meth:`dmoe.MoE.forward` was given, token by token: x as ``(T, H)``, and the rest as the router takes it."""
    tokens = x.reshape(-1, x.shape[-1]).contiguous()  # once: router and experts save the same memory
    if token_mask is not None:
        token_mask = token_mask.reshape(-1)
        if not getattr(router, "reads_masked", False):
            tokens = tokens.masked_fill(~token_mask.unsqueeze(1), 0)  # 0 * NaN would reach the router's gradient
    about: dict[str, Any] = {
        "token_mask": token_mask,
        "token_ids": None if token_ids is None else token_ids.reshape(-1),
        "expert_indices": None if expert_indices is None else expert_indices.reshape(-1, expert_indices.shape[-1]),
    }
    if getattr(router, "by_sequence", False):
        about["num_sequences"] = math.prod(x.shape[:-2])
    return tokens, about


def jittered(tokens: Tensor, jitter: float) -> Tensor:
    """Tokens times U(1 - jitter, 1 + jitter), number by number, for the layer's input as a whole."""
    return tokens * torch.empty_like(tokens).uniform_(1 - jitter, 1 + jitter) if jitter else tokens
