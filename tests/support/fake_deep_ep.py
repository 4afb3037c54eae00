"""A stand-in for the package deep_ep on gloo ranks of one node: its signatures, its checks, and what its calls mean.

Signatures and checks are those of DeepEP 1.2.1 (``deep_ep/buffer.py`` at commit 9af0e0d), stricter in two
points: what ``async_finish`` leaves under way is NaN or nonsense until the event is waited for, and dispatch and
combine need buffers of different sizes.
``calls`` has what was called, with which arguments.
"""

from __future__ import annotations

import functools
import sys

import torch
import torch.distributed as dist

__version__ = "1.2.1"
topk_idx_t = torch.int64

calls = []  # of this process since `install`: (method, number of positional arguments with self, names of the others)


def _noted(method):
    @functools.wraps(method)
    def call(*args, **kwargs):
        calls.append((method.__qualname__, len(args), tuple(kwargs)))
        return method(*args, **kwargs)

    return call


def install():
    """Be what ``import deep_ep`` finds in this process."""
    sys.modules["deep_ep"] = sys.modules[__name__]
    calls.clear()


def uninstall():
    """Let there be no deep_ep."""
    sys.modules.pop("deep_ep", None)


class Config:
    def __init__(
        self,
        num_sms=20,
        num_max_nvl_chunked_send_tokens=6,
        num_max_nvl_chunked_recv_tokens=256,
        num_max_rdma_chunked_send_tokens=6,
        num_max_rdma_chunked_recv_tokens=256,
    ):
        self.num_sms, self.room = num_sms, num_max_nvl_chunked_recv_tokens + num_max_nvl_chunked_send_tokens
        assert num_max_nvl_chunked_send_tokens < num_max_nvl_chunked_recv_tokens
        assert num_max_rdma_chunked_send_tokens <= num_max_rdma_chunked_recv_tokens // 2

    @_noted
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return -(-self.num_sms // 2 * num_ranks * self.room * (hidden_bytes + 2048) // 128) * 128

    @_noted
    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0  # up to eight ranks


class EventOverlap:
    def __init__(self, event=None, extra_tensors=None):
        self.event, self.extra_tensors = event, extra_tensors

    @_noted
    def current_stream_wait(self):
        assert self.event is not None, "no event: the call was not asynchronous"
        self.event()
        self.event = lambda: None  # an event may be waited for again


class Buffer:
    num_sms = 20
    made = 0  # of this process

    @_noted
    def __init__(
        self,
        group,
        num_nvl_bytes=0,
        num_rdma_bytes=0,
        low_latency_mode=False,
        num_qps_per_rank=24,
        allow_nvlink_for_low_latency_mode=True,
        allow_mnnvl=False,
        explicitly_destroy=False,
        comm=None,
    ):
        assert isinstance(group, dist.ProcessGroup)
        assert num_nvl_bytes % 128 == 0
        assert num_rdma_bytes % 128 == 0
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        sizes = [None] * self.group_size
        dist.all_gather_object(sizes, (num_nvl_bytes, num_rdma_bytes), group)  # as handles are: a collective
        assert len(set(sizes)) == 1
        Buffer.made += 1

    @staticmethod
    @_noted
    def get_dispatch_config(num_ranks):
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, 24 if num_ranks == 2 else 6, 256, 6, 128)

    @staticmethod
    @_noted
    def get_combine_config(num_ranks):
        assert num_ranks in (2, 4, 8), f"Unsupported number of EP ranks: {num_ranks}"
        return Config(Buffer.num_sms, {2: 10, 4: 9, 8: 4}[num_ranks], 256, 6, 128)

    @_noted
    def get_dispatch_layout(
        self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        assert topk_idx.dim() == 2
        assert topk_idx.is_contiguous()
        assert topk_idx.dtype == topk_idx_t
        assert num_experts > 0
        assert num_experts % self.group_size == 0
        assert ((topk_idx >= -1) & (topk_idx < num_experts)).all()
        _emulated(async_finish=async_finish, previous_event=previous_event, allocate=allocate_on_comm_stream)
        in_rank = self._in_rank(topk_idx, num_experts)
        chosen = topk_idx[topk_idx >= 0]
        per_expert = torch.bincount(chosen, minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, EventOverlap()

    def _in_rank(self, topk_idx, num_experts):
        ranks = torch.where(topk_idx >= 0, topk_idx // (num_experts // self.group_size), -1)
        return (ranks.unsqueeze(2) == torch.arange(self.group_size)).any(1)

    @_noted
    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        num_worst_tokens=0,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self._check(x, config or self.get_dispatch_config(self.group_size))
        _emulated(worst=num_worst_tokens, previous_event=previous_event, allocate=allocate_on_comm_stream)
        ranks = self.group_size
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            prefix, _, _, source, in_rank, _ = handle
            assert x.shape[0] == in_rank.shape[0]
            received = self._received(prefix)
            (rows,), event = self._under_way([self._rows_out(x, in_rank, received)], async_finish)
            assert rows.shape[0] == source.shape[0]
            return rows, None, None, None, None, event
        assert num_tokens_per_rdma_rank is None
        assert num_tokens_per_rank.dtype == num_tokens_per_expert.dtype == torch.int32
        assert num_tokens_per_rank.shape == (ranks,)
        num_experts = num_tokens_per_expert.shape[0]
        assert num_experts % ranks == 0
        assert num_experts // ranks <= 1024
        assert is_token_in_rank.dtype == torch.bool
        assert is_token_in_rank.shape == (x.shape[0], ranks)
        assert is_token_in_rank.is_contiguous()
        assert topk_idx.dtype == topk_idx_t
        assert topk_weights.dtype == torch.float32
        assert topk_idx.shape == topk_weights.shape
        assert topk_idx.shape[0] == x.shape[0]
        assert topk_idx.shape[1] <= 32
        assert topk_idx.is_contiguous()
        assert topk_weights.is_contiguous()
        assert torch.equal(is_token_in_rank, self._in_rank(topk_idx, num_experts))
        assert torch.equal(num_tokens_per_rank, is_token_in_rank.sum(0).int())
        sent = is_token_in_rank.sum(0)
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=self.group)
        everyone = [torch.empty_like(sent) for _ in range(ranks)]
        dist.all_gather(everyone, sent, group=self.group)
        prefix = torch.stack(everyone).cumsum(0).int()  # [i][j]: from ranks up to i to rank j
        each = num_experts // ranks
        moved = [self._rows_out(t, is_token_in_rank, received.tolist()) for t in (x, topk_idx, topk_weights)]
        local = moved[1] - self.rank * each
        here = (local >= 0) & (local < each) & (moved[1] >= 0)
        moved[1], moved[2] = local.masked_fill(~here, -1), moved[2].masked_fill(~here, 0)
        counts = torch.bincount(moved[1][here], minlength=each)
        aligned = (-(-counts // expert_alignment) * expert_alignment).tolist()
        source = self._rows_out(torch.arange(x.shape[0]).int().unsqueeze(1), is_token_in_rank, received.tolist())
        send_head = torch.where(is_token_in_rank, is_token_in_rank.cumsum(0) - 1, -1).int()
        channels = torch.zeros(ranks, 1, dtype=torch.int32)
        handle = (prefix, channels, channels, source.squeeze(1), is_token_in_rank, send_head)
        (rows, ids, weights), event = self._under_way(moved, async_finish)
        return rows, ids, weights, aligned, handle, event

    @_noted
    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        bias=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        self._check(x, config or self.get_combine_config(self.group_size))
        assert x.dtype == torch.bfloat16
        _emulated(bias=bias, previous_event=previous_event, allocate=allocate_on_comm_stream)
        prefix, _, _, source, in_rank, send_head = handle
        assert x.shape[0] == source.shape[0]
        assert send_head.shape == in_rank.shape
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32
            assert topk_weights.dim() == 2
            assert topk_weights.is_contiguous()
            assert topk_weights.shape[0] == x.shape[0]
        sums = [None if t is None else self._sum_back(t, in_rank, prefix) for t in (x, topk_weights)]
        there = [each for each in sums if each is not None]
        there, event = self._under_way(there, async_finish)
        return there[0], there[1] if len(there) > 1 else None, event

    def _check(self, x, config):
        assert x.dim() == 2
        assert x.is_contiguous()
        row = x.shape[1] * x.element_size()
        assert row % 16 == 0
        assert row // 16 % 2 == 0, "TMA takes a row in two halves"
        assert config.get_nvl_buffer_size_hint(row, self.group_size) <= self.num_nvl_bytes, "buffers are too small"

    def _received(self, prefix):
        column = prefix[:, self.rank].tolist()
        return [now - before for now, before in zip(column, [0, *column], strict=False)]

    def _rows_out(self, rows, in_rank, received):
        """Every token's row to each of its ranks."""
        order = torch.cat([in_rank[:, rank].nonzero().flatten() for rank in range(self.group_size)])
        return self._exchange(rows[order], in_rank.sum(0).tolist(), received)

    def _sum_back(self, rows, in_rank, prefix):
        """Rows to where they came from, added up in float32, rounded once."""
        back = self._exchange(rows, self._received(prefix), in_rank.sum(0).tolist())
        sums, first = torch.zeros(in_rank.shape[0], rows.shape[1]), 0
        for rank in range(self.group_size):
            tokens = in_rank[:, rank].nonzero().flatten()
            sums[tokens] += back[first : first + len(tokens)].float()
            first += len(tokens)
        return sums.to(rows.dtype)

    def _exchange(self, rows, sent, received):
        out = torch.empty(sum(received), rows.shape[1], dtype=rows.dtype)
        bytes_of = lambda t: t.contiguous().view(torch.uint8)  # noqa: E731
        dist.all_to_all_single(bytes_of(out), bytes_of(rows), received, sent, group=self.group)
        return out

    def _under_way(self, results, async_finish):
        """What a call returns, which has come when the event was waited for."""
        if not async_finish:
            return results, EventOverlap()
        nonsense = [torch.full_like(t, float("nan") if t.is_floating_point() else 7777) for t in results]

        def arrive():
            with torch.no_grad():
                for there, result in zip(nonsense, results, strict=True):
                    there.detach().copy_(result)

        return nonsense, EventOverlap(arrive)


def _emulated(**given):
    assert not any(given.values()), f"not emulated: {given}"
