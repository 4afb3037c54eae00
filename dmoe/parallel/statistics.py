"""What is counted over ranks: the loads that the balance loss sees, and metrics when somebody wants to read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dmoe.parallel.collectives import all_gather, all_reduce, outside_graphs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoadOfRanks:
    """Sums loads over ranks. A copy of a layer counts over the same ranks.

    Args:
        *groups: the ranks; or the dimensions of a grid of ranks, one group of this rank for each.
    """

    def __init__(self, *groups: ProcessGroup) -> None:
        self.groups = groups

    @property
    def num_ranks(self) -> int:
        """Ranks that are counted over."""
        return math.prod(dist.get_world_size(group) for group in self.groups)

    def __deepcopy__(self, memo: Any) -> LoadOfRanks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError(
            "LoadOfRanks: a process group cannot be written to a file or sent to another process; save the layer's "
            "state_dict(), and give a new layer its loss_group"
        )

    @outside_graphs
    def sum(self, tokens_per_expert: Tensor, num_tokens: Tensor | int) -> tuple[Tensor, Tensor]:
        """Assignments of each expert over all ranks, and the mean number of tokens of a rank.

        The host waits for nothing (with gloo, which works on the host, for the sum).

        Args:
            tokens_per_expert: this rank's, ``(E,)`` integer.
            num_tokens: this rank's tokens that count, a number or scalar integer.

        Returns:
            ``(E,)`` int64, and a float64 scalar.
        """
        counts = torch.empty(tokens_per_expert.shape[0] + 1, dtype=torch.int64, device=tokens_per_expert.device)
        counts[:-1] = tokens_per_expert
        counts[-1] = num_tokens
        self.add_up(counts)
        return counts[:-1], counts[-1].double() / self.num_ranks

    @outside_graphs
    def gather(self, tensor: Tensor) -> tuple[Tensor, int]:
        """Every rank's tensor, of one shape, as ``(W, ...)`` in the order of the ranks, and this rank's place in it."""
        everyone, here, stride = tensor.contiguous().unsqueeze(0), 0, 1
        for group in self.groups:
            size = dist.get_world_size(group)
            parts = everyone.new_empty((size * len(everyone), *everyone.shape[1:]))
            all_gather(parts, everyone, "the gathering of routing", group)
            everyone = parts
            here, stride = here + dist.get_rank(group) * stride, stride * size
        return everyone, here

    def bytes_gathered(self, tensor: Tensor) -> int:
        """Bytes that this rank sends to others in :meth:`gather`."""
        total, copies = 0, 1
        for group in self.groups:
            size = dist.get_world_size(group)
            total, copies = total + (size - 1) * copies * tensor.nbytes, copies * size
        return total

    def add_up(self, counts: Tensor) -> None:
        """Sum over the ranks, in place."""
        all_reduce(counts, "loads", *self.groups)


def move_selection_bias(router: nn.Module, told: LoadOfRanks | None, ep_groups: Sequence[ProcessGroup]) -> None:
    """Move a router's selection bias by the load of all ranks that train it, on which it is to stay the same.

    Args:
        router: with :class:`dmoe.routing.Router`'s methods; or an adapter that has it inside.
        told: the ranks that somebody named; None where nobody did.
        ep_groups: of an expert-parallel layer, the dimensions of its grid; empty otherwise.

    Raises:
        ValueError: nobody said which ranks train the layer, and there are more than the layer knows of.
    """
    inner: Any = next(module for module in router.modules() if hasattr(module, "update_selection_bias"))
    load = getattr(inner, "load_since_update", None)
    if load is not None:
        ranks = LoadOfRanks(*ep_groups) if told is None else told
        world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if told is None and ranks.num_ranks < world:
            raise ValueError(
                f"update_selection_bias: expected to know which of the {world} ranks train this layer, whose biases "
                "would drift apart otherwise: call dmoe.update_selection_bias(model, group), with "
                "torch.distributed.group.WORLD if all do; or wrap the model by dmoe.parallel.data_parallel, or build "
                "the layer with loss_group"
            )
        # Where the bias is: NCCL takes nothing that lies on the host.
        inner.load_since_update = load = load.to(getattr(inner, "selection_bias", load).device)
        ranks.add_up(load)
    inner.update_selection_bias()
