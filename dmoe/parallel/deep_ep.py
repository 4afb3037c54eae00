"""The package deep_ep as a transport: its buffers, dispatch and combine, without autograd and without experts.

Written for the class ``Buffer`` of DeepEP 1.2.1, which DeepEP 2.1.0 still has beside its new ``ElasticBuffer``; of its
kernels for the normal case (NVLink inside a node, RDMA between nodes), not those for low latency. One call sends each
token once to each rank of its experts, with its choices and their weights; another one adds up what comes back. The
package is looked for when a layer is built, not when dmoe is imported.
"""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from dmoe.parallel.agreement import check_agreement
from dmoe.parallel.collectives import explained

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

DTYPE = torch.bfloat16  # the one that combine adds up
ROW_MULTIPLE = 16  # numbers: rows are cut in two halves of 16 bytes' multiples
MOST_CHOICES = 32  # of one token: one for each thread of a warp


@dataclass(frozen=True)
class Sent:
    """What is known of tokens on their way, beside them.

    Attributes:
        choices: their experts counted among this rank's, ``(R', K)``, -1 for those of other ranks; to be read after
            ``event``.
        per_expert: assignments of each expert here.
        rows_sent: rows to each rank, this one included.
        handle: where rows came from, for the way back.
        event: see :func:`wait_for`.
    """

    choices: Tensor
    per_expert: tuple[int, ...]
    rows_sent: tuple[int, ...]
    handle: Any
    event: Any


class DeepEP:
    """The ranks of a group with their communication buffers, which all layers of the group share.

    Buffers are made by the first dispatch, and larger ones by one with wider rows: their size depends on the width
    alone, so that all ranks make them at the same time.

    Args:
        group: the ranks.

    Raises:
        ImportError: there is no deep_ep, or it cannot be imported.
        ValueError: so many ranks that DeepEP has no kernels for them.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group, self.num_ranks = group, dist.get_world_size(group)
        self._package = _package()
        kind = self._package.Buffer
        try:
            self._configs = kind.get_dispatch_config(self.num_ranks), kind.get_combine_config(self.num_ranks)
        except AssertionError as error:
            raise ValueError(
                f"MoE: transport: expected 'all_to_all' with {self.num_ranks} ranks in ep_group, got 'deep_ep', which "
                f"has no kernels for these: {error}"
            ) from error
        self._buffer: Any = None
        self._agreed: set[tuple[str, ...]] = set()

    @classmethod
    def of(cls, group: ProcessGroup) -> DeepEP:
        """The one of a group; it is made anew when the last dispatcher that had it is gone."""
        found = _BY_GROUP.get(group)
        if found is None:
            found = _BY_GROUP[group] = cls(group)
        return found

    def agree(self, fields: dict[str, Any]) -> None:
        """Ask the other ranks, once for such values, whether their rows are of the same kind.

        Raises:
            ValueError: on every rank, when they are not.
        """
        kind = tuple(map(repr, fields.values()))
        if kind not in self._agreed:
            check_agreement("dispatch", fields, self.group, {})
            self._agreed.add(kind)

    def dispatch(self, x: Tensor, choices: Tensor, weights: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Sent]:
        """Send each token to the ranks of its experts; the host waits for the number of rows that come here.

        Args:
            x: ``(T, H)`` bfloat16, H a multiple of 16.
            choices: ``(T, K)`` integer in [0, E]; E or more for none.
            weights: ``(T, K)`` float32.
            num_experts: E of all ranks, a multiple of these.

        Returns:
            The rows that will come to this rank, ``(R', H)``, their weights, ``(R', K)`` float32, and what else is
            known of them. All are to be read after the event.

        Raises:
            RuntimeError: what DeepEP says, of ranks that did not come above all.
        """
        buffer = self._buffer_for(x)
        ids = choices.to(getattr(self._package, "topk_idx_t", torch.int64))
        ids = ids.masked_fill(choices >= num_experts, -1).contiguous()
        per_rank, per_node, per_expert, in_rank, _ = self._explained(
            functools.partial(buffer.get_dispatch_layout, ids, num_experts), "layout"
        )
        rows, choices, weights, received, handle, event = self._explained(
            functools.partial(
                buffer.dispatch,
                x.contiguous(),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_node,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=ids,
                topk_weights=weights.contiguous(),
                config=self._configs[0],
                async_finish=True,
            ),
            "dispatch",
        )
        # The host has waited in there for all that the layout needs: reading it costs no wait of its own.
        return rows, weights, Sent(choices, tuple(received), tuple(per_rank.tolist()), handle, event)

    def dispatch_again(self, x: Tensor, handle: Any) -> tuple[Tensor, Any]:
        """Other rows ``(T, H)`` the way of an earlier dispatch, and the event of their arrival.

        Raises:
            RuntimeError: see :meth:`dispatch`.
        """
        call = functools.partial(
            self._buffer_for(x).dispatch, x.contiguous(), handle=handle, config=self._configs[0], async_finish=True
        )
        rows, _, _, _, _, event = self._explained(call, "dispatch of gradients")
        return rows, event

    def combine(self, y: Tensor, handle: Any, weights: Tensor | None = None) -> tuple[Tensor, Tensor | None, Any]:
        """Sums over the ranks of each token, ``(T, H)``, those of weights ``(T, K)``, and the event of both.

        Args:
            y: ``(R', H)`` bfloat16, in the order in which rows came.
            handle: of the dispatch that brought them.
            weights: ``(R', K)`` float32, 0 for choices of other ranks; or None.

        Raises:
            RuntimeError: see :meth:`dispatch`.
        """
        weights = None if weights is None else weights.contiguous()
        call = functools.partial(
            self._buffer_for(y).combine,
            y.contiguous(),
            handle,
            topk_weights=weights,
            config=self._configs[1],
            async_finish=True,
        )
        sums, weights, event = self._explained(call, "combine")
        return sums, weights, event

    def _buffer_for(self, x: Tensor) -> Any:
        """The buffers, large enough for rows as wide as these."""
        row_bytes, size = x.shape[1] * x.element_size(), [0, 0]
        for config in self._configs:
            size[0] = max(size[0], config.get_nvl_buffer_size_hint(row_bytes, self.num_ranks))
            size[1] = max(size[1], config.get_rdma_buffer_size_hint(row_bytes, self.num_ranks))
        held = self._buffer
        if held is None or held.num_nvl_bytes < size[0] or held.num_rdma_bytes < size[1]:
            self._buffer = held = None  # the memory of the old ones first; handles hold none of it
            self._buffer = self._explained(functools.partial(self._package.Buffer, self.group, *size), "buffers")
        return self._buffer

    def _explained(self, call: Any, what: str) -> Any:
        return explained(call, f"DeepEP's {what}", self.group)


# Buffers are of a group, not of a layer, and go with the last layer.
_BY_GROUP: WeakValueDictionary[Any, DeepEP] = WeakValueDictionary()


def wait_for(event: Any) -> None:
    """Let the current stream wait for what a call has started; the host does not."""
    event.current_stream_wait()


def _package() -> Any:
    """The package.

    Raises:
        ImportError: there is none, or none that can be used here.
    """
    try:
        package = importlib.import_module("deep_ep")
        package.Buffer.get_dispatch_layout  # noqa: B018 - is it this package at all?
    except Exception as error:  # it also asserts things about NCCL and CUDA when it is imported
        raise ImportError(
            "MoE: transport: expected 'all_to_all' without the package deep_ep (github.com/deepseek-ai/DeepEP, 1.2.1 "
            f"or 2.1.0), which cannot be imported here, got 'deep_ep'. Python says: {type(error).__name__}: {error}"
        ) from error
    return package
