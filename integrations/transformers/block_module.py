"""What stands in a model in a Hugging Face MoE block's place: a :class:`dmoe.MoE` that speaks as the block did."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

import dmoe
from dmoe.integrations.transformers.attached import guard_saving
from dmoe.integrations.transformers.blocks_table import block_weights, known_family
from dmoe.integrations.transformers.blocks_weights import rename_to_ours, rename_to_theirs

_OURS = "moe."
_FLOAT32 = ("router.selection_bias",)
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class MoEBlock(nn.Module):
    """A :class:`dmoe.MoE` in the place, and with the manners, of a MoE block of Transformers.

    Parameters are dmoe's (``moe.router.weight``, ``moe.experts.gate_up_proj`` ...), as optimizers and expert
    parallelism want them. ``state_dict()`` has the block's own names and shapes, and ``load_state_dict`` takes them (or
    dmoe's), so ``save_pretrained`` writes a checkpoint that plain Transformers loads; with expert parallelism its
    experts are ``DTensor``. A forward returns what the block's did, and shows the router's outputs to whatever records
    them (``output_router_logits``): a child of the router's name and class that computes nothing.

    Args:
        theirs: the block, which is kept for :func:`from_dmoe`; :meth:`take` takes its tensors.
        moe: the layer.

    Attributes:
        moe: the layer.
        theirs: the block, whose parameters are empty; not a child.
        family: its family.
        weights: the map of its tensors.
    """

    theirs: nn.Module

    def __init__(self, theirs: nn.Module, moe: dmoe.MoE) -> None:
        super().__init__()
        self.family = known_family(theirs)
        self.weights = tuple(block_weights(theirs, self.family))
        self.moe = moe
        object.__setattr__(self, "theirs", theirs)  # no child: its tensors are nobody's
        self.add_module(self.family.router, _recorded(getattr(theirs, self.family.router)))
        _share_hooks(theirs, self)
        self._is_hf_initialized = True
        self.train(theirs.training)

    @property
    def their_modules(self) -> dict[str, str]:
        """Parts of the layer by the names that the block's have, for :func:`dmoe.lora.save_peft`."""
        found = {"moe.experts": "experts"}
        for weight in self.weights:
            if weight.ours == "router.weight":
                found["moe.router"] = weight.theirs[0].removesuffix(".weight")
            elif weight.ours == "shared_expert.mlp.down_proj":
                found["moe.shared_expert.mlp"] = weight.theirs[0].removesuffix(".down_proj.weight")
        return found

    @property
    def interleaved(self) -> bool:
        """Whether rows of gate and up take turns in the block's parameters."""
        return self.family.experts.startswith("interleaved")

    def forward(self, hidden_states: Tensor, input_ids: Tensor | None = None) -> Tensor | tuple[Tensor | None, ...]:
        """``(B, S, H)`` to the same shape and dtype, or ``(B * S, H)``; a tuple with what the family returns beside it.

        Router logits, and weights, are float32 where the block's may be in the model's dtype. ``input_ids`` are what
        DeepSeek-V4 hands to every block, and are not looked at.
        """
        y, routing = self.moe(hidden_states, return_routing=True)
        self.get_submodule(self.family.router)(*(_output(routing, name) for name in self.family.router_returns))
        y = y.to(hidden_states.dtype)
        y = y.flatten(0, -2) if self.family.flat else y
        return (y, *(_output(routing, name) for name in self.family.returns)) if self.family.returns else y

    def take(self) -> None:
        """Move the block's tensors into the layer, which is on ``meta``: views, where nothing has to be moved.

        A rank of an expert-parallel layer keeps its own experts only.
        """
        state = self.theirs.state_dict(keep_vars=True)
        with torch.no_grad():
            ours = {each.ours: each.to_ours([state[name].detach() for name in each.theirs]) for each in self.weights}
            self.moe.load_state_dict(ours, assign=True)
        trained = {each.ours: state[each.theirs[0]].requires_grad for each in self.weights}
        for name, parameter in self.moe.named_parameters():
            parameter.requires_grad_(trained[name])
        for tensor in state.values():
            tensor.grad = None
            tensor.data = tensor.data.new_empty(0)

    def give_back(self) -> nn.Module:
        """The block with the layer's tensors, in its own parameter objects where these are on the same device.

        Experts that are spread over ranks are gathered, so all ranks have to call this.
        """
        state, kept = self.moe.state_dict(keep_vars=True), self._in_their_dtype()
        for weight in self.weights:
            ours = state[weight.ours]
            whole = ours.detach().full_tensor() if hasattr(ours, "full_tensor") else ours.detach()
            for name, tensor in zip(weight.theirs, weight.to_theirs(whole), strict=True):
                _put(self.theirs, name, tensor.to(kept.get(name, tensor.dtype)), trained=ours.requires_grad)
        return self.theirs.train(self.training)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The block's own names and shapes, in its own dtypes."""
        state = super().state_dict(*args, destination=destination, prefix=prefix, keep_vars=keep_vars)
        rename_to_theirs(state, self.weights, prefix, prefix + _OURS)
        for name, dtype in self._in_their_dtype().items():
            if prefix + name in state:
                state[prefix + name] = state[prefix + name].to(dtype)
        return state

    def _in_their_dtype(self) -> dict[str, torch.dtype]:
        """What dmoe keeps in float32 whatever a model is cast to, and the dtypes that the block had it in."""
        theirs = self.theirs.state_dict(keep_vars=True)
        return {name: theirs[name].dtype for each in self.weights if each.ours in _FLOAT32 for name in each.theirs}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        ours = prefix + _OURS
        rename_to_ours(state_dict, self.weights, prefix, ours)  # the dict is load_state_dict's own
        own = (
            self.moe.experts.parameters() if self.moe.experts.distributed else ()
        )  # they take their own part of a whole
        spread = {id(parameter) for parameter in own}
        for name, parameter in self.moe.named_parameters():
            value = state_dict.get(ours + name)
            if not isinstance(value, Tensor) or isinstance(value, DTensor):
                continue
            if isinstance(parameter, DTensor) and id(parameter) not in spread:  # FSDP2 shards it
                mesh, value = parameter.device_mesh, value.to(parameter.device)
                state_dict[ours + name] = distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """Without the family, whose functions no file can hold: it is found again by the block's class."""
        return {name: value for name, value in super().__getstate__().items() if name not in ("family", "weights")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        guard_saving()  # in this process, perhaps for the first time
        self.family = known_family(self.theirs)
        self.weights = tuple(block_weights(self.theirs, self.family))

    def _fqn_modifiers(self) -> dict[str, str]:
        """For ``torch.distributed.checkpoint``, which looks up each name of the state dict as an attribute."""
        return {name.partition(".")[0]: "theirs" for weight in self.weights for name in weight.theirs}


def _output(routing: Any, name: str) -> Tensor | None:
    """What a router of Transformers returns under a name of :class:`Family`'s; None for what nobody reads."""
    if name == "mean_weights":
        return routing.gate_weights / routing.gate_weights.shape[1]
    found = {"logits": routing.router_logits, "weights": routing.gate_weights, "indices": routing.expert_indices}
    return found.get(name)


def _nothing() -> str:
    return ""


def _as_given(*outputs: Any) -> tuple[Any, ...]:
    return outputs


def _recorded(router: nn.Module) -> nn.Module:
    """A module of the router's class, without parameters, that returns what it is given: hooks find it by its class."""
    recorded: Any = type(router).__new__(type(router))
    nn.Module.__init__(recorded)
    recorded.forward = _as_given
    recorded.extra_repr = _nothing
    recorded._is_hf_initialized = True  # there is nothing that Transformers could initialise
    _share_hooks(router, recorded)
    made: nn.Module = recorded
    return made


def _share_hooks(one: nn.Module, other: nn.Module) -> None:
    """Hooks of either are hooks of both, now and later."""
    for name in _HOOKS:
        other.__dict__[name] = one.__dict__[name]


def _put(block: nn.Module, name: str, tensor: Tensor, *, trained: bool) -> None:
    path, _, leaf = name.rpartition(".")
    owner = block.get_submodule(path)
    old = getattr(owner, leaf)
    if leaf in owner._buffers:
        owner._buffers[leaf] = tensor
    elif torch._has_compatible_shallow_copy_type(old, tensor):
        old.data = tensor
        old.requires_grad_(trained)
    else:
        new = nn.Parameter(tensor, requires_grad=trained)
        new.__dict__.update(old.__dict__)
        owner.register_parameter(leaf, new)
