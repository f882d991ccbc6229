"""DeepEP's V1 `Buffer` over deepkern's expert parallelism; see deep_ep.py for the differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from deepkern import cast_per_token, expert_combine, expert_dispatch_backward

from ..experts.exchange import DTYPES
from ..experts.links import Link, unpack
from ..runtime.contract import Contract, check_that
from .deep_ep_exchange import (
    as_given,
    columns,
    connect,
    experts_per_rank,
    receive,
    sum_over_ranks,
    wait_for,
)
from .deep_ep_slots import Slots, as_bytes
from .deep_ep_types import Config, EventHandle, EventOverlap
from .unsupported import DEEP_EP_BUFFER, PartialClass

LAYOUT = Contract("Buffer.get_dispatch_layout", topk_idx="int64|int32 [num_tokens, num_topk]")
DISPATCH = Contract(
    "Buffer.dispatch",
    optional=("x_scales", "topk_idx", "topk_weights"),
    x="real|fp8 [num_tokens, hidden]",
    x_scales="fp32 [num_tokens, hidden/128] strided",
    topk_idx="int64|int32 [num_tokens, num_topk]",
    topk_weights="fp32 [num_tokens, num_topk]",
)
COMBINE = Contract(
    "Buffer.combine",
    optional=("topk_weights",),
    x="real [num_recv_tokens, hidden]",
    topk_weights="fp32 [num_recv_tokens, _]",
)
LL_DISPATCH = Contract(
    "Buffer.low_latency_dispatch",
    x="real [num_tokens, hidden]",
    topk_idx="int64|int32 [num_tokens, num_topk]",
)
LL_COMBINE = Contract(
    "Buffer.low_latency_combine",
    x="real [num_local_experts, slots, hidden] strided",
    topk_idx="int64|int32 [num_tokens, num_topk]",
    topk_weights="fp32 [num_tokens, num_topk]",
)


class Handle(tuple):
    """DeepEP's tuple, in DeepEP's order, with the state that deepkern needs as attributes."""

    link: Link
    rows: Tensor | None = None  # low latency: int32 [tokens, num_topk], the row of each slot
    buffer: Tensor | None = None  # low latency: from get_next_low_latency_combine_buffer


class Buffer(PartialClass):
    """Dispatch and combine among the ranks of `group`, a torch.distributed group.

    All other arguments are accepted and have no effect, except `enable_shrink=True`, which raises
    NotImplementedError.

        buffer = Buffer(torch.distributed.group.WORLD)
        layout = buffer.get_dispatch_layout(topk_idx, num_experts)
    """

    UNSUPPORTED = DEEP_EP_BUFFER
    num_sms: int = 20

    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0,
        low_latency_mode: bool = False, num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
        explicitly_destroy: bool = False, enable_shrink: bool = False, comm=None,
    ) -> None:  # fmt: skip
        exchange = connect("Buffer", group)
        if enable_shrink:
            raise NotImplementedError("Buffer: enable_shrink: deepkern cannot mask ranks")
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        self.explicitly_destroy = explicitly_destroy
        self._exchange = exchange

    def destroy(self) -> None:
        """A no-op: no buffer is reserved."""

    @staticmethod
    def is_sm90_compiled() -> bool:
        """True: FP8 rows are supported."""
        return True

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        check_that("Buffer.set_num_sms", "new_num_sms", new_num_sms % 2 == 0, "an even number",
                   new_num_sms)  # fmt: skip
        Buffer.num_sms = new_num_sms

    @staticmethod
    def capture() -> EventOverlap:
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """0: no buffer is reserved."""
        return 0

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The same for any number of ranks."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The same for any number of ranks."""
        return Config(Buffer.num_sms)

    def get_comm_stream(self) -> torch.Stream:
        """The current stream, which all work is on."""
        return torch.cuda.current_stream() if torch.cuda.is_available() else torch.cpu.Stream()

    @torch.no_grad()
    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:  # fmt: skip
        """Count the tokens for each rank and expert.

        Returns:
            num_tokens_per_rank: int32 [num_ranks].
            None (DeepEP: the counts of RDMA ranks).
            num_tokens_per_expert: int32 [num_experts].
            is_token_in_rank: bool [num_tokens, num_ranks].
            event: EventOverlap.
        Indices outside [0, num_experts) are ignored.
        """
        LAYOUT.check({"topk_idx": topk_idx})
        wait_for(previous_event)
        per_rank = experts_per_rank("Buffer.get_dispatch_layout", num_experts, self.group_size)
        T, device = topk_idx.shape[0], topk_idx.device
        valid = (topk_idx >= 0) & (topk_idx < num_experts)
        expert = torch.where(valid, topk_idx, num_experts).long()
        per_expert = torch.zeros(num_experts + 1, dtype=torch.int32, device=device)
        ones = torch.ones(expert.numel(), dtype=torch.int32, device=device)
        per_expert.scatter_add_(0, expert.flatten(), ones)
        in_rank = torch.zeros((T, self.group_size + 1), dtype=torch.bool, device=device)
        in_rank.scatter_(1, torch.where(valid, expert // per_rank, self.group_size), True)
        in_rank = in_rank[:, :-1].contiguous()
        per_token = in_rank.sum(0, dtype=torch.int32)
        return per_token, None, per_expert[:-1], in_rank, EventOverlap(EventHandle())

    @torch.no_grad()
    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], handle: Handle | None = None,
        num_tokens_per_rank: Tensor | None = None, num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None, num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
        expert_alignment: int = 1, num_worst_tokens: int = 0, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ):  # fmt: skip
        """Send each token to the ranks that `is_token_in_rank` [num_tokens, num_ranks] names.

        Args:
            x: real [num_tokens, hidden], or (FP8, fp32 scales [num_tokens, ceil(hidden / 128)]).
            handle: of an earlier dispatch, to send other rows to the same ranks, without topk_idx.
            topk_idx, topk_weights: int64 and fp32 [num_tokens, num_topk], sent with the rows.
            num_worst_tokens: pad the results to this number of rows (index -1, zeros).

        Returns:
            recv_x: rows sorted by (source rank, token); a tuple if `x` is one.
            recv_topk_idx: [rows, num_topk], the local expert, -1 for experts of other ranks.
            recv_topk_weights: [rows, num_topk], 0 for experts of other ranks.
            num_recv_tokens_per_expert_list: rows of each local expert, rounded up to a multiple of
                `expert_alignment`.
            handle, event.
        With `handle`, the results between recv_x and event are None.
        """
        name = "Buffer.dispatch"
        x, scales = x if isinstance(x, tuple) else (x, None)
        DISPATCH.check(
            {"x": x, "x_scales": scales, "topk_idx": topk_idx, "topk_weights": topk_weights}
        )
        wait_for(previous_event)
        data = [x] if scales is None else [x, scales]
        if handle is not None:
            check_that(name, "topk_idx", topk_idx is None, "None with a handle", "a tensor")
            return self._dispatch_again(name, data, handle)

        has_topk = topk_idx is not None
        both = has_topk == (topk_weights is not None)
        check_that(name, "topk_weights", both, "given with topk_idx", "one of the two")
        check_that(name, "expert_alignment", expert_alignment >= 1, "at least 1", expert_alignment)
        self._check_layout(name, x, is_token_in_rank, num_tokens_per_expert)
        num_experts = num_tokens_per_expert.shape[0]
        per_rank = experts_per_rank(name, num_experts, self.group_size)
        token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)[:, None]
        parts = [*data, token]
        if has_topk:
            valid = (topk_idx >= 0) & (topk_idx < num_experts)
            parts += [torch.where(valid, topk_idx, -1).int(), topk_weights]
        ranks = torch.arange(self.group_size, dtype=torch.int32, device=x.device)
        link = Link(
            self._exchange, torch.where(is_token_in_rank, ranks, -1), num_experts=num_experts,
            K=x.shape[1], dtype=DTYPES.index(x.dtype), x_scale=int(scales is not None),
            topk=topk_idx.shape[1] if has_topk else 0,
        )  # fmt: skip
        transfer = link.start("dispatch", parts)
        counts = self._counts(num_tokens_per_expert)
        received = receive(transfer, parts)
        handle = Handle((self._prefix(link, x.device), None, None, received[len(data)].flatten(),
                         is_token_in_rank, None))  # fmt: skip
        handle.link = link
        idx = weights = None
        if has_topk:
            idx, weights = received[-2:]
            is_local = (idx >= self.rank * per_rank) & (idx < (self.rank + 1) * per_rank)
            idx = torch.where(is_local, idx - self.rank * per_rank, -1).to(topk_idx.dtype)
            weights = torch.where(is_local, weights, 0.0)
        rows = received[: len(data)]
        per_expert = [-(-c // expert_alignment) * expert_alignment for c in counts]
        if num_worst_tokens:
            rows, per_expert = _padded(name, rows, num_worst_tokens), []
            if has_topk:
                (idx,) = _padded(name, [idx], num_worst_tokens, -1)
                (weights,) = _padded(name, [weights], num_worst_tokens)
        return as_given(rows), idx, weights, per_expert, handle, EventOverlap(EventHandle())

    def _check_layout(self, name: str, x: Tensor, is_token_in_rank, num_tokens_per_expert) -> None:
        for argument, value in (("is_token_in_rank", is_token_in_rank),
                                ("num_tokens_per_expert", num_tokens_per_expert)):  # fmt: skip
            if value is None:
                raise TypeError(f"{name}: {argument}: expected a Tensor, got None")
        shape = (x.shape[0], self.group_size)
        fits = is_token_in_rank.shape == shape and is_token_in_rank.dtype == torch.bool
        got = f"{is_token_in_rank.dtype} of shape {tuple(is_token_in_rank.shape)}"
        check_that(name, "is_token_in_rank", fits, f"bool of shape {shape}", got)

    def _dispatch_again(self, name: str, data: list[Tensor], handle: Handle):
        """Send other rows to the ranks of an earlier dispatch."""
        _check_handle(name, handle)
        x, link = data[0], handle.link
        rows = len(link.target)
        check_that(name, "x", len(x) == rows, f"{rows} tokens, as in the handle's dispatch", len(x))
        link.agree("dispatch", False, x, x.shape[1], 0)
        transfer = link.start("dispatch", data)
        return (
            as_given(receive(transfer, data)),
            None,
            None,
            None,
            None,
            EventOverlap(EventHandle()),
        )

    @torch.no_grad()
    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        """Sum a token's rows over the ranks, without weights, in fp32 and in rank order.

        Args:
            x: real [num_recv_tokens, hidden], one row for each row that `dispatch` returned.
            topk_weights: fp32 [num_recv_tokens, num_topk], summed in the same way.
            bias: one or two [num_tokens, hidden], added in fp32 before the one rounding.

        Returns:
            [num_tokens, hidden] in the dtype of `x`; the summed weights or None; an event.
        """
        name = "Buffer.combine"
        _check_handle(name, handle)
        COMBINE.check({"x": x, "topk_weights": topk_weights})
        rows = sum(handle.link.received)
        check_that(name, "x", x.shape[0] == rows, f"{rows} rows, as dispatched", x.shape[0])
        wait_for(previous_event)
        out, weights = sum_over_ranks(name, handle.link, x, topk_weights, bias, x.dtype)
        return out, weights, EventOverlap(EventHandle())

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """A no-op: no buffer is reserved."""

    @torch.no_grad()
    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None, use_fp8: bool = True,
        round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False,
    ):  # fmt: skip
        """Send tokens to num_max_dispatch_tokens_per_rank * num_ranks slots per expert.

        Args:
            x: real [num_tokens, hidden]. topk_idx: [num_tokens, num_topk], -1 for none.
            cumulative_local_expert_recv_stats: int32 [num_local_experts]; recv_count is added to
                it. `dispatch_wait_recv_cost_stats` is not written.
            use_fp8: cast to FP8 before sending.
            round_scale: scales are powers of two.
            use_ue8m0: return int32 scales, four exponents in each.
            return_recv_hook: the rows arrive only when `hook` is called.

        Returns:
            recv_x: [num_local_experts, slots, hidden]; with FP8 a pair with column-major scales
                [num_local_experts, slots, ceil(hidden / 128)]. An expert's rows are sorted by
                (source rank, token, slot); zeros follow.
            recv_count: int32 [num_local_experts].
            handle: (source tokens [num_local_experts, slots], int64 [num_local_experts, num_ranks]
                with first row << 32 | rows, num_max_dispatch_tokens_per_rank, hidden, num_experts).
            event, hook.
        """
        name = "Buffer.low_latency_dispatch"
        LL_DISPATCH.check({"x": x, "topk_idx": topk_idx})
        E = experts_per_rank(name, num_experts, self.group_size)
        most = num_max_dispatch_tokens_per_rank
        check_that(name, "x", len(x) <= most, f"at most {most} tokens", len(x))
        fits = round_scale or not use_ue8m0
        check_that(name, "use_ue8m0", fits, "False without round_scale", True)
        data = list(cast_per_token(x, "ue8m0" if round_scale else "fp32")) if use_fp8 else [x]
        valid = (topk_idx >= 0) & (topk_idx < num_experts)
        idx = torch.where(valid, topk_idx, -1).int()
        token = torch.arange(len(x), dtype=torch.int32, device=x.device)[:, None]
        parts = [*data, token, idx]
        link = Link(self._exchange, torch.where(valid, idx // E, -1), K=x.shape[1],
                    dtype=DTYPES.index(data[0].dtype), topk=idx.shape[1])  # fmt: skip
        transfer = link.start("dispatch", parts)
        slots = most * self.group_size
        out = Slots(E, slots, x.shape[1], data[0], use_ue8m0)
        ranges = torch.zeros((E, self.group_size), dtype=torch.int64, device=x.device)
        handle = Handle((out.sources, ranges, most, x.shape[1], num_experts))
        handle.link = link

        def hook() -> None:
            *data, token, idx = unpack(transfer.wait(), columns(parts))
            local = torch.where((idx // E == self.rank) & (idx >= 0), idx - self.rank * E, -1)
            counts, handle.rows = out.fill(name, link, local, token, *data)
            ranges.copy_((counts.cumsum(1) - counts) << 32 | counts)
            if cumulative_local_expert_recv_stats is not None:
                cumulative_local_expert_recv_stats.add_(out.count)

        if not return_recv_hook:
            hook()
        event = EventOverlap(EventHandle())
        return out.result(), out.count, handle, event, hook if return_recv_hook else _nothing

    @torch.no_grad()
    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: Handle,
        use_logfmt: bool = False, zero_copy: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False, out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable]:  # fmt: skip
        """Sum the weighted rows of each token.

        The weights are sent to the experts' ranks first. Each rank sums its rows of a token in fp32
        and returns one row in the dtype of `x` (DeepEP returns one row per expert).

        Args:
            x: real [num_local_experts, slots, hidden], any strides, in the slots of
                `low_latency_dispatch`. Ignored with `zero_copy`, which reads the buffer of
                `get_next_low_latency_combine_buffer`.
            topk_idx, topk_weights: int64 and fp32 [num_tokens, num_topk]; slots with a negative
                index are ignored.
            use_logfmt: has no effect; rows are sent in the dtype of `x`.
            out: [num_tokens, hidden], written and returned if given.

        Returns:
            [num_tokens, hidden] in the dtype of `x`, an event, hook.
        """
        name = "Buffer.low_latency_combine"
        _check_handle(name, handle, low_latency=True)
        if zero_copy:
            expected = "False, or an earlier get_next_low_latency_combine_buffer(handle)"
            check_that(name, "zero_copy", handle.buffer is not None, expected, True)
            x = handle.buffer
        LL_COMBINE.check({"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights})
        shape = (*handle[0].shape, handle[3])
        check_that(name, "x", x.shape == shape, f"shape {shape}", tuple(x.shape))
        link = handle.link
        slots = tuple(link.target.shape)
        check_that(name, "topk_idx", topk_idx.shape == slots, f"shape {slots}, as dispatched",
                   tuple(topk_idx.shape))  # fmt: skip
        weights = topk_weights.masked_fill(topk_idx < 0, 0.0)
        link.agree("dispatch", False, weights, weights.shape[1], 0)
        transfer = link.start("dispatch", [weights])
        (weights_here,) = unpack(transfer.wait(), columns([weights]))
        z = expert_combine(x.reshape(-1, x.shape[2]), weights_here, handle.rows)
        link.agree("combine", True, z, z.shape[1], 0)
        transfer = link.start_back("combine", [z])
        if out is None:
            out = x.new_empty((len(topk_idx), x.shape[2]))

        def hook() -> None:
            (rows,) = unpack(transfer.wait(), columns([z]))
            out.copy_(expert_dispatch_backward(rows, link.rows))

        if not return_recv_hook:
            hook()
        return out, EventOverlap(EventHandle()), hook if return_recv_hook else _nothing

    def get_next_low_latency_combine_buffer(self, handle: Handle) -> Tensor:
        """bf16 [num_local_experts, slots, hidden], for `low_latency_combine(zero_copy=True)`."""
        _check_handle("Buffer.get_next_low_latency_combine_buffer", handle, low_latency=True)
        shape = (*handle[0].shape, handle[3])
        handle.buffer = torch.zeros(shape, dtype=torch.bfloat16, device=handle[0].device)
        return handle.buffer

    def _counts(self, per_expert: Tensor) -> list[int]:
        """The rows of each local expert, summed over the ranks; per_expert: [num_experts]."""
        sent = per_expert.int().view(self.group_size, -1).contiguous().view(torch.uint8)
        ones = [1] * self.group_size
        received = self._exchange.start("dispatch", sent, ones, ones).wait()
        return received.view(torch.int32).sum(0).tolist()

    def _prefix(self, link: Link, device: torch.device) -> Tensor:
        """int32 [ranks, ranks]: [i, r] = rows from ranks 0..i to r; -1 if r is another rank."""
        size = self.group_size
        prefix = torch.full((size, size), -1, dtype=torch.int32, device=device)
        prefix[:, self.rank] = torch.tensor(link.received, dtype=torch.int32).cumsum(0)
        return prefix


def _nothing() -> None:
    """The hook of a complete call."""


def _padded(name: str, tensors: list[Tensor], rows: int, value: int = 0) -> list[Tensor]:
    for t in tensors:
        expected = f"at least the {len(t)} rows received"
        check_that(name, "num_worst_tokens", len(t) <= rows, expected, rows)
    pads = [as_bytes(t).new_full((rows - len(t), t.shape[1]), value) for t in tensors]
    return [torch.cat([as_bytes(t), p]).view(t.dtype) for t, p in zip(tensors, pads, strict=True)]


def _check_handle(name: str, handle: object, low_latency: bool = False) -> None:
    if not isinstance(handle, Handle) or (len(handle) == 5) != low_latency:
        which = "low_latency_dispatch" if low_latency else "dispatch"
        raise TypeError(f"{name}: handle: expected one that {which} returned, got {type(handle)}")
