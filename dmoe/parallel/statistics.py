"""What is counted over ranks: the loads that the balance loss sees, and metrics when somebody wants to read them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel.collectives import explained, outside_graphs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class LoadOfRanks:
    """Sums loads over the ranks of a group. A copy of a layer counts over the same ranks.

    Args:
        group: the ranks.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group

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
        explained(lambda: dist.all_reduce(counts, group=self.group), "the all-reduce of loads", self.group)
        return counts[:-1], counts[-1].double() / dist.get_world_size(self.group)
