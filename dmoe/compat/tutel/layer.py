"""``moe_layer``: Tutel's arguments, results and state, on dmoe's routers and experts."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.compat._layers import RoutedLayer, first_choice_loss
from dmoe.compat.tutel.arguments import check_output_dim, read_experts, read_gates
from dmoe.compat.tutel.experts import FfnExperts, LlamaExperts
from dmoe.compat.tutel.gates import Call, build_gate, family_for
from dmoe.compat.tutel.ranks import all_ranks, global_experts, largest, levels_of, sharded_ranks
from dmoe.config import MoEConfig
from dmoe.outputs import as_output


class MOELayer(RoutedLayer):
    """Tutel's ``moe_layer``: ``y = layer(x)``, whose ``y.l_aux`` is the balance loss.

    ::

        layer = moe_layer(
            gate_type={"type": "top", "k": 2},
            model_dim=512,
            experts={"type": "ffn", "num_experts_per_device": 2, "hidden_size_per_expert": 1024},
        )

    The numbers are Tutel's, and so are names and shapes of the parameters. What differs: with a capacity factor of 0 no
    token is dropped under batch priority either, and ``dispatch_count`` is a count there; ``model_dim`` may be odd;
    dictionaries are left as they are; environment variables are not read.

    Args:
        gate_type: ``{"type": "top" or "cosine_top", "k", "capacity_factor", "gate_noise", "fp32_gate", ...}``, or a
            list of these, of which a forward chooses one.
        model_dim: H.
        experts: ``{"type": "ffn" or "llama_ffn", "num_experts_per_device", "hidden_size_per_expert", ...}``.
        scan_expert_func: called with name and parameter of each of the experts' parameters.
        result_func: what makes the result of y.
        group: the ranks that share the experts; None is all of them.
        seeds: of the gates, the experts, and what comes afterwards.
        a2a_ffn_overlap_degree: chunks of experts, of which one computes while the next one's tokens travel: the largest
            number that divides this and the experts of a rank. Capacities are rounded up to multiples of it, as there.
        is_postscore: the gate weight multiplies the expert's output; False: its input.
        batch_prioritized_routing: tokens with a small largest score are dropped first.
        normalize_gate: with k > 1 a token's weights sum to 1, before a drop.
        is_gshard_loss: False: the loss of importance and load, which needs ``gate_noise``.
        parallel_type: how Tutel spreads one and the same computation; dmoe's does not depend on it.
        use_2dh: tokens travel in two hops, inside a node and between nodes.
        ep_levels: dmoe's own: the groups of these hops, as :class:`dmoe.MoE` takes them.

    Attributes:
        l_aux: of the last forward.
        dispatch_count: how many tokens each expert was given in it before any drop, ``(E,)``.

    Raises:
        ValueError, TypeError: what dmoe does not have, and arguments that do not fit.
    """

    dispatch_count: Tensor | None = None

    def __init__(
        self,
        gate_type: Mapping[str, Any] | Sequence[Mapping[str, Any]] | str,
        model_dim: int,
        experts: Mapping[str, Any] | None = None,
        scan_expert_func: Callable[[str, Tensor], Any] | None = None,
        result_func: Callable[[Tensor], Any] | None = None,
        group: Any = None,
        seeds: Sequence[int | None] | None = None,
        a2a_ffn_overlap_degree: int = 1,
        is_postscore: bool = True,
        batch_prioritized_routing: bool = False,
        normalize_gate: bool = True,
        is_gshard_loss: bool = True,
        parallel_type: str = "adaptive:1",
        use_2dh: bool = False,
        *,
        ep_levels: Any = None,
        **kwargs: Any,
    ) -> None:
        if "pad_samples" in kwargs:
            warnings.warn("moe_layer: pad_samples: nothing is padded, as in Tutel by now", stacklevel=2)
        if others := sorted(set(kwargs) - {"pad_samples"}):
            raise TypeError(f"moe_layer: expected Tutel's arguments, got {', '.join(others)}")
        gates, options = read_gates(gate_type), read_experts(experts)
        assert experts is not None
        check_output_dim(experts, model_dim)
        group = all_ranks() if group is None else group
        num_experts = global_experts(options.per_device, group)
        ranks = 1 if group is None else dist.get_world_size(group)
        sharded = max(ranks // num_experts, 1)
        if options.gated and sharded > 1:
            raise ValueError(
                f"moe_layer: experts: num_experts_per_device: expected at least 1 with 'llama_ffn', got experts that "
                f"{sharded} ranks share, whose flat parameters Tutel cuts across rows"
            )
        if not is_gshard_loss and any(gate.gate_noise <= 0 for gate in gates):
            raise ValueError(
                "moe_layer: is_gshard_loss: expected True without gate_noise, which the other loss is about"
            )
        sharded_ranks(parallel_type, sharded)
        base = MoEConfig(
            hidden_size=model_dim,
            ffn_hidden_size=options.hidden_size,
            num_experts=num_experts,
            top_k=min(int(gates[0].k), num_experts),
            activation=options.activation,
            activation_dropout=options.dropout,
            gated=options.gated,
            bias="expert" if options.bias1 or options.bias2 else "none",
            gate_weight_on="output" if is_postscore else "input",
            init_std=0.01 if options.gated else None,
            router=family_for(gates[0]),
            capacity_factor=gates[0].capacity_factor,
            capacity_formula="floor_per_choice",
            drop_order="batch_prioritized" if batch_prioritized_routing else "choice_major",
            losses={} if is_gshard_loss else {"load_importance": 1.0},
            aux_loss="attached",  # nothing is kept: l_aux is the caller's
            expert_grad_scale="sum",  # as Tutel's all-to-all leaves them
        )
        spread = {"ep_group": group, "ep_levels": levels_of(use_2dh, ep_levels, group)} if ranks > 1 else {}
        super().__init__(base, device="meta", dtensor=False, **spread)
        self.group, self.result_func, self.sharded_count = group, result_func, sharded
        self.model_dim, self.is_gshard_loss, self.a2a_ffn_overlap_degree = model_dim, is_gshard_loss, 1
        owned = self.experts.owned if ranks > 1 else None
        self.num_local_experts = num_experts // ranks if sharded == 1 else 1
        del self._modules["router"], self._modules["experts"]
        self.register_buffer("_num_global_experts", torch.tensor(num_experts))
        _seed(seeds, 1)
        self.experts = (LlamaExperts if options.gated else FfnExperts)(base, options, owned=owned)
        for name, parameter in self.experts.named_parameters():
            if scan_expert_func is not None:
                scan_expert_func(name, parameter)
        built: list[nn.Module] = []
        for index, gate in enumerate(gates):
            _seed(seeds, 0, index)
            built.append(build_gate(gate, base, normalize=normalize_gate))
        self.gates = nn.ModuleList(built)
        _seed(seeds, 2)
        self._overlap(a2a_ffn_overlap_degree)

    @property
    def router(self) -> nn.Module:
        """The first gate."""
        return self.gates[0]

    @property
    def num_global_experts(self) -> int:
        """E."""
        return self.config.num_experts

    @staticmethod
    def global_expert_count(num_local_experts: float, group: Any = None) -> int:
        """E of a group whose ranks have so many experts each; -n, or 1 / n, is one of n ranks."""
        return global_experts(read_experts(_of_count(num_local_experts)).per_device, group or all_ranks())

    def get_parameter_iterator(self, param_type: str) -> Iterator[tuple[str, nn.Parameter]]:
        """Names and parameters of the ``gate``, or of the ``local_experts``."""
        if param_type == "gate":
            return self.gates.named_parameters()
        if param_type == "local_experts":
            return self.experts.named_parameters()
        raise ValueError(f"get_parameter_iterator: param_type: expected 'gate' or 'local_experts', got {param_type!r}")

    def _overlap(self, degree: int) -> None:
        """Exchange in so many chunks from now on, as far as a rank's experts can be cut."""
        if not isinstance(degree, int) or degree < 1:
            raise ValueError(f"moe_layer: a2a_ffn_overlap_degree: expected an integer of at least 1, got {degree!r}")
        self.a2a_ffn_overlap_degree = degree
        able = math.gcd(degree, self.num_local_experts) if self.experts.distributed else 1
        if able != self.config.overlap_degree:
            self.config = replace(self.config, overlap_degree=able)

    def forward(  # type: ignore[override]
        self,
        input: Tensor,
        gate_index: int = 0,
        capacity_factor: float | None = None,
        top_k: int | None = None,
        a2a_ffn_overlap_degree: int | None = None,
        reserve_dims: int = 1,
        inequivalent_tokens: bool = False,
        adaptive_r: int | None = None,
        megablocks_size: int = 0,
    ) -> Any:
        """Every token through its experts.

        Args:
            input: ``(..., H)`` floating point.
            gate_index: which of several gates.
            capacity_factor, top_k: instead of the gate's; 0 and None are the gate's.
            a2a_ffn_overlap_degree: from now on.
            reserve_dims: 1.
            inequivalent_tokens: capacities are counted from the most tokens that a rank has.
            adaptive_r: as ``parallel_type="adaptive:r"``.
            megablocks_size: without gradients, on one rank: capacities are rounded up to multiples of it.

        Returns:
            ``(..., H)`` in the input's dtype, with ``l_aux``: the balance loss, a scalar with a gradient, without a
            coefficient, in evaluation too; or what ``result_func`` makes of that.
        """
        if reserve_dims != 1:
            raise ValueError(
                f"moe_layer: reserve_dims: expected 1, got {reserve_dims}: more are for experts of your own, which "
                "dmoe does not call"
            )
        if input.dim() < 2 or input.shape[-1] != self.model_dim:
            raise ValueError(
                f"moe_layer: input: expected shape (..., model_dim = {self.model_dim}) of two or more dimensions, got "
                f"{tuple(input.shape)}"
            )
        if adaptive_r is not None:
            sharded_ranks(f"adaptive:{adaptive_r}", self.sharded_count)
        if a2a_ffn_overlap_degree is not None:
            self._overlap(a2a_ffn_overlap_degree)
        tokens = input.reshape(-1, self.model_dim).to(self._dtype(input)).contiguous()
        gate: Any = self.gates[gate_index]
        call = Call(
            top_k=top_k or gate.top_k,
            capacity_factor=capacity_factor or gate.capacity_factor,
            alignment=self._alignment(megablocks_size),
        )
        gate.configure(call)
        if inequivalent_tokens and call.capacity_factor and self.experts.distributed:
            most = largest(tokens.shape[0], self.group, tokens.device)
            gate.configure(call._replace(capacity=gate.config.capacity_for(most, self.training)))
        y, routing = self.route_and_run(tokens, gate)
        self.dispatch_count = routing.plan.tokens_per_expert
        self.l_aux = first_choice_loss(routing) if self.is_gshard_loss else routing.losses["load_importance"]
        result = as_output(y, input.shape).to(input.dtype)
        result.l_aux = self.l_aux  # type: ignore[attr-defined]
        return result if self.result_func is None else self.result_func(result)

    def _dtype(self, input: Tensor) -> torch.dtype:
        """What tokens travel and are computed in: autocast's, or the experts'."""
        kind = input.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return next(self.experts.parameters()).dtype

    def _alignment(self, megablocks_size: int) -> int:
        """What capacities are rounded up to a multiple of."""
        alone = self.num_local_experts > 1 and not torch.is_grad_enabled() and not self.experts.distributed
        block = max(megablocks_size, 1) if alone else 1
        alignment = -(-self.sharded_count * self.a2a_ffn_overlap_degree // block) * block
        return alignment if alignment <= 256 else -(-alignment // 128) * 128

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        key = prefix + "_num_global_experts"
        there = int(state_dict.setdefault(key, self._num_global_experts))  # not in the files of Tutel's first versions
        if there != self.num_global_experts:
            args[-1].append(f"{key}: expected {self.num_global_experts} experts on all ranks, got {there}")
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        gates = ", ".join(f"k={gate.top_k} noise={gate.gate_noise}" for gate in self.gates)
        return f"num_global_experts={self.num_global_experts}, {gates}"


def _seed(seeds: Sequence[int | None] | None, which: int, offset: int = 0) -> None:
    if seeds is not None and which < len(seeds) and (seed := seeds[which]) is not None:
        torch.manual_seed(seed + offset)


def _of_count(count: float) -> dict[str, Any]:
    return {"type": "ffn", "num_experts_per_device": count, "hidden_size_per_expert": 1}
