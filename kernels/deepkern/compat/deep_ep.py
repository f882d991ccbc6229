"""DeepEP's `Buffer` under its name, over deepkern's expert parallelism.

    import deepkern.compat.deep_ep as deep_ep

Names, arguments, their order and what is returned are those of DeepEP 2.1's `Buffer` (its V1
interface, deep_ep/buffers/legacy.py, https://github.com/deepseek-ai/DeepEP). It runs on any
torch.distributed group, gloo on CPUs included: any hidden size, any number of ranks, several on one
GPU, ranks without tokens. docs/experts.md has a table of what differs. In short: no buffers, SMs or
queue pairs to size; calls are complete when they return on a CPU, and in stream order on a GPU, so
events and `async_finish` have nothing to add; row counts are read on the host, also where DeepEP
does not (`num_worst_tokens`, low latency), so that nothing here goes into a CUDA graph.

A rank that dies or falls out of step gives the others `deepkern.ExpertParallelError`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..experts.exchange import DTYPES, Exchange
from ..experts.expert_combine import expert_combine
from ..experts.expert_dispatch import expert_dispatch_backward
from ..experts.expert_parallel import limit_of
from ..experts.links import Link, unpack
from ..quant.cast_per_token import cast_per_token
from ..runtime.contract import Contract, check_that
from .deep_ep_slots import Slots, as_bytes
from .deep_ep_types import Config, EventHandle, EventOverlap

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

topk_idx_t = torch.int64

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
    """DeepEP's tuple, in whose place and order callers may look, and what deepkern keeps."""

    link: Link
    rows: Tensor | None = None  # low latency: int32 [tokens, num_topk], where each slot's row is
    buffer: Tensor | None = None  # low latency: what get_next_low_latency_combine_buffer gave


class Buffer:
    """Dispatch and combine among the ranks of `group`, a torch.distributed group.

    All arguments but `group` are taken for the sake of their callers and steer nothing.
    """

    num_sms: int = 20

    def __init__(
        self, group: dist.ProcessGroup, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0,
        low_latency_mode: bool = False, num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True, allow_mnnvl: bool = False,
        explicitly_destroy: bool = False, enable_shrink: bool = False, comm=None,
    ) -> None:  # fmt: skip
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"Buffer: group: expected a torch.distributed ProcessGroup that this "
                            f"rank is in, got {group!r}")  # fmt: skip
        if enable_shrink:
            raise NotImplementedError("Buffer: enable_shrink: there is no masking of ranks")
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode, self.enable_shrink = low_latency_mode, enable_shrink
        self.explicitly_destroy = explicitly_destroy
        self._exchange = Exchange(group, limit_of(group).total_seconds())

    def destroy(self) -> None:
        """There is nothing to release."""

    @staticmethod
    def is_sm90_compiled() -> bool:
        """DeepEP's callers ask this to learn whether FP8 travels. It does."""
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
        """One for any number of ranks."""
        return Config(Buffer.num_sms)

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """One for any number of ranks."""
        return Config(Buffer.num_sms)

    def get_comm_stream(self) -> torch.Stream:
        """The current stream: all work is on it."""
        return torch.cuda.current_stream() if torch.cuda.is_available() else torch.cpu.Stream()

    @torch.no_grad()
    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:  # fmt: skip
        """How many tokens go to each rank and expert, and which token to which rank.

        Returns:
            num_tokens_per_rank int32 [num_ranks]; None (DeepEP: counts of RDMA ranks);
            num_tokens_per_expert int32 [num_experts]; is_token_in_rank bool [num_tokens,
            num_ranks]; an event. Indices outside [0, num_experts) count for none.
        """
        LAYOUT.check({"topk_idx": topk_idx})
        _wait(previous_event)
        per_rank = self._experts_per_rank("get_dispatch_layout", num_experts)
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
        """Sends each token to the ranks that `is_token_in_rank` [num_tokens, num_ranks] names.

        Args:
            x: real [num_tokens, hidden], or (FP8, fp32 scales [num_tokens, ceil(hidden / 128)]).
            handle: of an earlier dispatch, to send other rows the same way; then no topk.
            topk_idx, topk_weights: int64 and fp32 [num_tokens, num_topk], which travel along.
            num_worst_tokens: pad what is returned to so many rows (index -1, zeros).

        Returns:
            recv_x (a tuple if `x` is one): rows sorted by (source rank, token); recv_topk_idx:
            local numbers of experts, -1 for those elsewhere; recv_topk_weights: 0 there; the number
            of rows of each local expert, rounded up to `expert_alignment`, a list; a handle; an
            event. With `handle`, None for the four in between.
        """
        name = "Buffer.dispatch"
        x, scales = x if isinstance(x, tuple) else (x, None)
        DISPATCH.check(
            {"x": x, "x_scales": scales, "topk_idx": topk_idx, "topk_weights": topk_weights}
        )
        _wait(previous_event)
        data = [x] if scales is None else [x, scales]
        if handle is not None:
            check_that(name, "topk_idx", topk_idx is None, "None with a handle", "a tensor")
            return self._dispatch_again(name, data, handle)

        given = topk_idx is not None
        check_that(name, "topk_weights", given == (topk_weights is not None), "given with topk_idx",
                   "one of the two")  # fmt: skip
        check_that(name, "expert_alignment", expert_alignment >= 1, "at least 1", expert_alignment)
        self._check_layout(name, x, is_token_in_rank, num_tokens_per_expert)
        num_experts = num_tokens_per_expert.shape[0]
        per_rank = self._experts_per_rank("dispatch", num_experts)
        token = torch.arange(x.shape[0], dtype=torch.int32, device=x.device)[:, None]
        parts = [*data, token]
        if given:
            valid = (topk_idx >= 0) & (topk_idx < num_experts)
            parts += [torch.where(valid, topk_idx, -1).int(), topk_weights]
        ranks = torch.arange(self.group_size, dtype=torch.int32, device=x.device)
        link = Link(
            self._exchange, torch.where(is_token_in_rank, ranks, -1), num_experts=num_experts,
            K=x.shape[1], dtype=DTYPES.index(x.dtype), x_scale=int(scales is not None),
            topk=topk_idx.shape[1] if given else 0,
        )  # fmt: skip
        transfer = link.start("dispatch", parts)
        counts = self._counts(num_tokens_per_expert)
        came = [part.contiguous() for part in unpack(transfer.wait(), _shapes(parts))]
        handle = Handle((self._prefix(link, x.device), None, None, came[len(data)].flatten(),
                         is_token_in_rank, None))  # fmt: skip
        handle.link = link
        idx = weights = None
        if given:
            idx, weights = came[-2:]
            here = (idx >= self.rank * per_rank) & (idx < (self.rank + 1) * per_rank)
            idx = torch.where(here, idx - self.rank * per_rank, -1).to(topk_idx.dtype)
            weights = torch.where(here, weights, 0.0)
        came = came[: len(data)]
        per_expert = [-(-c // expert_alignment) * expert_alignment for c in counts]
        if num_worst_tokens:
            came, per_expert = _padded(name, came, num_worst_tokens), []
            if given:
                (idx,) = _padded(name, [idx], num_worst_tokens, -1)
                (weights,) = _padded(name, [weights], num_worst_tokens)
        return _as_given(came), idx, weights, per_expert, handle, EventOverlap(EventHandle())

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
        """Other rows the way of an earlier dispatch."""
        _check_handle(name, handle)
        x, link = data[0], handle.link
        rows = len(link.target)
        check_that(name, "x", len(x) == rows, f"{rows} tokens, as in the handle's dispatch", len(x))
        link.agree("dispatch", False, x, x.shape[1], 0)
        transfer = link.start("dispatch", data)
        received = [part.contiguous() for part in unpack(transfer.wait(), _shapes(data))]
        return _as_given(received), None, None, None, None, EventOverlap(EventHandle())

    @torch.no_grad()
    def combine(
        self, x: Tensor, handle: Handle, topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        """Sums a token's rows over the ranks, without weights: in fp32, in the order of the ranks.

        Args:
            x: real [num_recv_tokens, hidden], a row for each that `dispatch` returned.
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
        biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
        shape = (len(handle.link.target), x.shape[1])
        for b in biases:
            check_that(name, "bias", b.shape == shape, f"shape {shape}", tuple(b.shape))
        _wait(previous_event)
        data = [x] if topk_weights is None else [x, topk_weights]
        handle.link.agree("combine", True, x, x.shape[1], 0)
        came = unpack(handle.link.start_back("combine", data).wait(), _shapes(data))
        if biases:
            total = expert_dispatch_backward(came[0].float(), handle.link.rows)
            for b in biases:
                total += b
            total = total.to(x.dtype)
        else:
            total = expert_dispatch_backward(came[0], handle.link.rows)
        weights = None
        if topk_weights is not None:
            weights = expert_dispatch_backward(came[1], handle.link.rows)
        return total, weights, EventOverlap(EventHandle())

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """There is no buffer to clean."""

    @torch.no_grad()
    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        dispatch_wait_recv_cost_stats: Tensor | None = None, use_fp8: bool = True,
        round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False,
    ):  # fmt: skip
        """Sends tokens into slots: num_max_dispatch_tokens_per_rank · num_ranks for each expert.

        Args:
            x: real [num_tokens, hidden]. topk_idx: [num_tokens, num_topk], -1 for none.
            cumulative_local_expert_recv_stats: int32 [num_local_experts], to which recv_count is
                added. `dispatch_wait_recv_cost_stats` is left as it is.
            use_fp8: cast to FP8 before sending; `round_scale`: by powers of two; `use_ue8m0`:
                return four exponents to an int32.
            return_recv_hook: the rows are there only after a call of `hook`.

        Returns:
            recv_x: [num_local_experts, slots, hidden], with FP8 (it, scales [num_local_experts,
            slots, ceil(hidden / 128)]), column-major; an expert's rows come first, sorted by
            (source rank, token, slot), zeros follow. recv_count: int32 [num_local_experts]. A
            handle: (source tokens [num_local_experts, slots], int64 [num_local_experts, num_ranks]:
            first row << 32 | rows, and three numbers). An event. hook.
        """
        name = "Buffer.low_latency_dispatch"
        LL_DISPATCH.check({"x": x, "topk_idx": topk_idx})
        E = self._experts_per_rank("low_latency_dispatch", num_experts)
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
            *data, token, idx = unpack(transfer.wait(), _shapes(parts))
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
        """Weights and sums the rows of each token.

        The weights travel to the experts' ranks first; each returns one row for a token, in the
        dtype of `x`, its own rows summed in fp32 (DeepEP: a row for each expert).

        Args:
            x: real [num_local_experts, slots, hidden], any strides, as `low_latency_dispatch` gave
                rows; with `zero_copy` the buffer of `get_next_low_latency_combine_buffer` instead.
            topk_idx, topk_weights: int64 and fp32 [num_tokens, num_topk]; an index of -1 now leaves
                that slot out.
            use_logfmt: has no effect: rows travel in the dtype of `x`.
            out: [num_tokens, hidden], written to and returned if given.

        Returns:
            [num_tokens, hidden] in the dtype of `x`, an event, hook.
        """
        name = "Buffer.low_latency_combine"
        _check_handle(name, handle, low_latency=True)
        if zero_copy:
            expected = "False, or a buffer taken before"
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
        (weights_here,) = unpack(transfer.wait(), _shapes([weights]))
        z = expert_combine(x.reshape(-1, x.shape[2]), weights_here, handle.rows)
        link.agree("combine", True, z, z.shape[1], 0)
        transfer = link.start_back("combine", [z])
        if out is None:
            out = x.new_empty((len(topk_idx), x.shape[2]))

        def hook() -> None:
            (rows,) = unpack(transfer.wait(), _shapes([z]))
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

    def _experts_per_rank(self, name: str, num_experts: int) -> int:
        fits = num_experts >= 1 and num_experts % self.group_size == 0
        check_that(f"Buffer.{name}", "num_experts", fits, f"a multiple of {self.group_size} ranks",
                   num_experts)  # fmt: skip
        return num_experts // self.group_size

    def _counts(self, per_expert: Tensor) -> list[int]:
        """The rows of each local expert, from what each rank has for it."""
        share = per_expert.int().view(self.group_size, -1).contiguous().view(torch.uint8)
        ones = [1] * self.group_size
        came = self._exchange.start("dispatch", share, ones, ones).wait()
        return came.view(torch.int32).sum(0).tolist()

    def _prefix(self, link: Link, device: torch.device) -> Tensor:
        """int32 [ranks, ranks]: [i, r] = rows from ranks 0..i to r; -1 unless r is this rank."""
        size = self.group_size
        prefix = torch.full((size, size), -1, dtype=torch.int32, device=device)
        prefix[:, self.rank] = torch.tensor(link.received, dtype=torch.int32).cumsum(0)
        return prefix


def _shapes(parts: list[Tensor]) -> list[tuple[int, torch.dtype]]:
    return [(part.shape[1], part.dtype) for part in parts]


def _as_given(data: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    return data[0] if len(data) == 1 else tuple(data)


def _wait(event: EventOverlap | None) -> None:
    if event is not None:
        event.current_stream_wait()


def _nothing() -> None:
    """The hook of a call that is complete."""


def _padded(name: str, tensors: list[Tensor], rows: int, value: int = 0) -> list[Tensor]:
    for t in tensors:
        expected = f"at least the {len(t)} that came"
        check_that(name, "num_worst_tokens", len(t) <= rows, expected, rows)
    pads = [as_bytes(t).new_full((rows - len(t), t.shape[1]), value) for t in tensors]
    return [torch.cat([as_bytes(t), p]).view(t.dtype) for t, p in zip(tensors, pads, strict=True)]


def _check_handle(name: str, handle: object, low_latency: bool = False) -> None:
    if not isinstance(handle, Handle) or (len(handle) == 5) != low_latency:
        which = "low_latency_dispatch" if low_latency else "dispatch"
        raise TypeError(f"{name}: handle: expected one that {which} returned, got {type(handle)}")
