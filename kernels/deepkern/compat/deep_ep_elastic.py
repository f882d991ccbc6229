"""DeepEP's V2 `ElasticBuffer` over deepkern's expert parallelism. Differences: see deep_ep.py."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from deepkern import expert_combine, expert_dispatch

from ..experts.exchange import DTYPES
from ..experts.links import Link
from ..runtime.contract import Contract, check_that
from .deep_ep_exchange import (
    as_given,
    connect,
    experts_per_rank,
    receive,
    sum_over_ranks,
    wait_for,
)
from .deep_ep_types import EventHandle, EventOverlap
from .deep_gemm_utils import get_mn_major_tma_aligned_tensor
from .unsupported import DEEP_EP_ELASTIC, PartialClass

DISPATCH = Contract(
    "ElasticBuffer.dispatch",
    optional=("x_scales", "topk_idx", "topk_weights"),
    x="real|fp8 [num_tokens, hidden]",
    x_scales="fp32 [num_tokens, hidden/128] strided",
    topk_idx="int64|int32 [num_tokens, num_topk]",
    topk_weights="fp32 [num_tokens, num_topk]",
)
COMBINE = Contract(
    "ElasticBuffer.combine",
    optional=("topk_weights",),
    x="real [num_recv_tokens, hidden]",
    topk_weights="fp32 [...]",
)


@dataclass
class EPHandle:
    """The layout of one `ElasticBuffer.dispatch`, for `combine` and for cached dispatches.

    Attributes with DeepEP's names and meaning (R = tokens received, E = local experts):
        recv_src_metadata: int32 [R, 2], or [R, 2 + num_topk] with do_expand. Columns: source rank *
            num_max_tokens_per_rank + token, the token's index in [0, R), then the rows of its
            experts in the expanded layout, -1 for none.
        psum_num_recv_tokens_per_scaleup_rank: int32 [num_ranks], inclusive prefix sum.
        psum_num_recv_tokens_per_expert: int32 [E], inclusive prefix sum of the aligned counts; with
            do_expand the end of each expert's rows without its padding.
        num_recv_tokens_per_expert_list: the aligned counts, on the host.
        num_unaligned_recv_tokens_per_expert: int32 [E], or None without do_expand.
        dst_buffer_slot_idx: int32 [num_tokens, num_topk], the sent row of each slot, -1 for none.
        token_metadata_at_forward, channel_linked_list: None; there is one hop.

    Attributes of deepkern: `link`; `local_idx`, int32 [R, num_topk], the local expert of each slot
    of a received token, -1 for none.
    """

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int
    num_expanded_tokens: int
    num_recv_tokens_per_expert_list: list[int]
    psum_num_recv_tokens_per_scaleup_rank: Tensor
    psum_num_recv_tokens_per_expert: Tensor
    num_unaligned_recv_tokens_per_expert: Tensor | None
    recv_src_metadata: Tensor
    dst_buffer_slot_idx: Tensor
    token_metadata_at_forward: None = None
    channel_linked_list: None = None
    link: Link = field(kw_only=True, repr=False)
    local_idx: Tensor = field(kw_only=True, repr=False)


class ElasticBuffer(PartialClass):
    """Dispatch and combine among the ranks of `group`, a torch.distributed group.

        buffer = ElasticBuffer(group, num_max_tokens_per_rank=4096, hidden=7168)
        rows, idx, weights, handle, _ = buffer.dispatch(x, topk_idx, topk_weights, num_experts=256)
        y, _, _ = buffer.combine(run_experts(rows, idx, weights), handle)

    Args:
        group: the ranks. All ranks call the methods in the same order.
        num_max_tokens_per_rank: default of `dispatch`.
        allow_multiple_reduction: True rounds a rank's sum of a token's expanded rows to their dtype
            before the sum over the ranks; False sends it in fp32, for a single rounding.
        num_cpu_timeout_secs: the longest wait of a call for other ranks, in seconds.
        The others are accepted and have no effect, except `num_cpu_bytes`, which must be 0.
    """

    UNSUPPORTED = DEEP_EP_ELASTIC

    def __init__(
        self, group: dist.ProcessGroup, num_bytes: int | None = None, num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0,
        use_fp8_dispatch: bool = False, deterministic: bool = False,
        allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True, sl_idx: int = 3, num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300, num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:  # fmt: skip
        self._exchange = connect("ElasticBuffer", group, num_cpu_timeout_secs)
        check_that("ElasticBuffer", "num_cpu_bytes", num_cpu_bytes == 0, "0", num_cpu_bytes)
        self.group, self.rank_idx, self.num_ranks = group, group.rank(), group.size()
        self.num_bytes = num_bytes or 0
        self.num_max_tokens_per_rank = num_max_tokens_per_rank
        self.deterministic = True
        self.allow_hybrid_mode = allow_hybrid_mode
        self.allow_multiple_reduction = allow_multiple_reduction
        self.prefer_overlap_with_compute = prefer_overlap_with_compute
        self.num_allocated_qps = num_allocated_qps
        self.explicitly_destroy = explicitly_destroy
        self.num_scaleout_ranks, self.num_scaleup_ranks = self.get_logical_domain_size()
        self.scaleout_rank_idx, self.scaleup_rank_idx = 0, self.rank_idx

    def destroy(self) -> None:
        """A no-op: no buffer is reserved."""

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup, num_max_tokens_per_rank: int, hidden: int, num_topk: int = 0,
        use_fp8_dispatch: bool = False, allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
    ) -> int:  # fmt: skip
        """0: no buffer is reserved."""
        return 0

    @staticmethod
    def capture() -> EventHandle:
        return EventHandle()

    def get_comm_stream(self) -> torch.Stream:
        """The current stream, which all work is on."""
        return torch.cuda.current_stream() if torch.cuda.is_available() else torch.cpu.Stream()

    def get_logical_domain_size(self) -> tuple[int, int]:
        """(1, num_ranks): tokens go from rank to rank in one hop."""
        return 1, self.num_ranks

    def get_theoretical_num_sms(
        self, num_experts: int, num_topk: int, num_scaleout_topk: int = 0, rdma_gbs: float = 0,
        nvlink_gbs: float = 0, sm_read_gbs: float = 200, sm_write_gbs: float = 50,
    ) -> int:  # fmt: skip
        """0, which `dispatch` and `combine` accept: the number of SMs has no effect."""
        return 0

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """0, which `dispatch` and `combine` accept: there are no queue pairs."""
        return 0

    def barrier(
        self, use_comm_stream: bool = True, with_cpu_sync: bool = False, sequential: bool = True
    ) -> None:
        """Wait for all ranks of the group."""
        dist.barrier(self.group)
        if with_cpu_sync and torch.cuda.is_available():
            torch.cuda.synchronize()

    @torch.no_grad()
    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None, num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None, expert_alignment: int | None = None,
        num_sms: int = 0, num_qps: int = 0, previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None, do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None, do_expand: bool = False, do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Tensor | tuple[Tensor, Tensor], Tensor | None, Tensor | None, EPHandle,
               EventOverlap]:  # fmt: skip
        """Send each token to the ranks of its experts, once to each rank.

        Args:
            x: real [num_tokens, hidden], or (FP8, fp32 scales [num_tokens, ceil(hidden / 128)]).
            topk_idx: int64 or int32 [num_tokens, num_topk]; indices outside [0, num_experts) are
                ignored. None with `handle`.
            topk_weights: fp32 [num_tokens, num_topk], on all ranks or on none.
            cumulative_local_expert_recv_stats: int32 [local experts]; the counts are added to it.
            num_experts: a multiple of the number of ranks.
            num_max_tokens_per_rank: an upper bound of num_tokens, the same on all ranks; by default
                that of the constructor.
            expert_alignment: the rows of each expert start at a multiple of this in the expanded
                layout.
            handle: of an earlier dispatch, to send other rows in the same layout.
            do_handle_copy: the handle has a copy of `topk_idx`.
            do_expand: return one row per token and expert, sorted by expert.
            use_tma_aligned_col_major_sf: return column-major scales with 16-byte aligned columns.
            The others have no effect: padding rows are always zero, and counts are always exact.

        Returns:
            recv_x: [R, hidden] sorted by (source rank, token), a tuple with scales if `x` is one.
                With do_expand [rows, hidden] sorted by (expert, source rank, token, slot).
            recv_topk_idx: [R, num_topk], the local expert, -1 for experts of other ranks. None with
                do_expand.
            recv_topk_weights: fp32 [R, num_topk], 0 for experts of other ranks; with do_expand
                [rows]. None without `topk_weights`.
            handle: `handle` if given.
            event: EventOverlap.
        """
        name = "ElasticBuffer.dispatch"
        x, scales = x if isinstance(x, tuple) else (x, None)
        DISPATCH.check(
            {"x": x, "x_scales": scales, "topk_idx": topk_idx, "topk_weights": topk_weights}
        )
        wait_for(previous_event)
        wait_for(previous_event_before_epilogue)
        data = [x] if scales is None else [x, scales]
        if handle is None:
            expected = "a Tensor without a handle"
            if topk_idx is None:
                raise TypeError(f"{name}: topk_idx: expected {expected}, got None")
            if num_experts is None:
                raise TypeError(f"{name}: num_experts: expected an int without a handle, got None")
            limit = num_max_tokens_per_rank or self.num_max_tokens_per_rank
            alignment = 1 if expert_alignment is None else expert_alignment
            check_that(name, "expert_alignment", alignment >= 1, "at least 1", alignment)
            idx = topk_idx.clone() if do_handle_copy else topk_idx
            received, weights, handle = self._send(
                name, data, idx, topk_weights, num_experts, limit, alignment, num_sms, do_expand
            )
        else:
            check_that(name, "topk_idx", topk_idx is None, "None with a handle", "a tensor")
            self._check_cached(name, handle, num_experts, expert_alignment, num_max_tokens_per_rank)
            received, weights = self._send_again(name, data, topk_weights, handle)
        if cumulative_local_expert_recv_stats is not None:
            counts = _count(handle.local_idx, handle.num_experts // self.num_ranks)
            cumulative_local_expert_recv_stats.add_(counts)
        recv_idx = None if handle.do_expand else handle.local_idx.to(handle.topk_idx.dtype)
        if handle.do_expand:
            received, weights = _expand(handle, received, weights)
        elif weights is not None:
            weights = weights.masked_fill(handle.local_idx < 0, 0.0)
        if use_tma_aligned_col_major_sf and scales is not None:
            received[1] = get_mn_major_tma_aligned_tensor(received[1])
        return as_given(received), recv_idx, weights, handle, EventOverlap(EventHandle())

    def _send(
        self, name: str, data: list[Tensor], topk_idx: Tensor, topk_weights: Tensor | None,
        num_experts: int, limit: int, alignment: int, num_sms: int, do_expand: bool,
    ) -> tuple[list[Tensor], Tensor | None, EPHandle]:  # fmt: skip
        """Exchange counts and rows: the received data, weights [R, num_topk], and the handle."""
        x, size = data[0], self.num_ranks
        E = experts_per_rank(name, num_experts, size)
        check_that(name, "num_max_tokens_per_rank", len(x) <= limit, f"at least {len(x)}", limit)
        valid = (topk_idx >= 0) & (topk_idx < num_experts)
        idx = torch.where(valid, topk_idx, -1).int()
        first = self.rank_idx * limit
        token = torch.arange(first, first + len(x), dtype=torch.int32, device=x.device)[:, None]
        link = Link(
            self._exchange, torch.where(valid, idx // E, -1), num_experts=num_experts,
            K=x.shape[1], dtype=DTYPES.index(x.dtype), x_scale=len(data) - 1, topk=idx.shape[1],
        )  # fmt: skip
        parts = [*data, token, idx]
        parts += [] if topk_weights is None else [topk_weights]
        received = receive(link.start("dispatch", parts), parts)
        weights = received.pop() if topk_weights is not None else None
        *received, token, idx = received
        local = torch.where((idx >= 0) & (idx // E == self.rank_idx), idx - self.rank_idx * E, -1)
        counts = _count(local, E)
        aligned = [-(-count // alignment) * alignment for count in counts.tolist()]
        ends = torch.tensor(aligned, dtype=torch.int32, device=x.device).cumsum(0).int()
        if do_expand:
            ends += counts - torch.tensor(aligned, dtype=torch.int32, device=x.device)
        per_rank = torch.tensor(link.received, dtype=torch.int32, device=x.device)
        index = torch.arange(len(token), dtype=torch.int32, device=x.device)[:, None]
        handle = EPHandle(
            do_expand=do_expand, num_experts=num_experts, expert_alignment=alignment,
            num_max_tokens_per_rank=limit, num_sms=num_sms, topk_idx=topk_idx,
            num_recv_tokens=len(token), num_expanded_tokens=sum(aligned),
            num_recv_tokens_per_expert_list=aligned,
            psum_num_recv_tokens_per_scaleup_rank=per_rank.cumsum(0).int(),
            psum_num_recv_tokens_per_expert=ends,
            num_unaligned_recv_tokens_per_expert=counts if do_expand else None,
            recv_src_metadata=torch.cat([token, index], 1), dst_buffer_slot_idx=link.rows,
            link=link, local_idx=local,
        )  # fmt: skip
        return received, weights, handle

    def _send_again(
        self, name: str, data: list[Tensor], topk_weights: Tensor | None, handle: EPHandle
    ) -> tuple[list[Tensor], Tensor | None]:
        """Exchange rows in the layout of an earlier dispatch."""
        x, link = data[0], handle.link
        rows = len(link.target)
        check_that(name, "x", len(x) == rows, f"{rows} tokens, as in the handle's dispatch", len(x))
        parts = data if topk_weights is None else [*data, topk_weights]
        link.agree("dispatch", False, x, x.shape[1], 0)
        received = receive(link.start("dispatch", parts), parts)
        weights = received.pop() if topk_weights is not None else None
        return received, weights

    def _check_cached(
        self, name: str, handle: object, num_experts: int | None, expert_alignment: int | None,
        num_max_tokens_per_rank: int | None,
    ) -> None:  # fmt: skip
        _check_handle(name, handle)
        for argument, value in (
            ("num_experts", num_experts), ("expert_alignment", expert_alignment),
            ("num_max_tokens_per_rank", num_max_tokens_per_rank),
        ):  # fmt: skip
            expected = getattr(handle, argument)
            check_that(name, argument, value in (None, expected),
                       f"{expected}, as in the handle's dispatch", value)  # fmt: skip

    @torch.no_grad()
    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None, num_sms: int = 0, num_qps: int = 0,
        previous_event: EventHandle | None = None,
        previous_event_before_epilogue: EventHandle | None = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        """Sum a token's rows over the ranks, without weights, in fp32 and in rank order.

        Args:
            x: real, one row for each row that `dispatch` returned: [R, hidden], or with do_expand
                [rows, hidden]. A rank sums its expanded rows of a token in slot order.
            handle: from `dispatch`.
            topk_weights: as `dispatch` returned them, fp32 [R, num_topk] or with do_expand [rows];
                summed in the same way.
            bias: one or two real [num_tokens, hidden], added in fp32 before the one rounding.

        Returns:
            [num_tokens, hidden] in the dtype of `x`; fp32 [num_tokens, num_topk] or None; an event.
        """
        name = "ElasticBuffer.combine"
        _check_handle(name, handle)
        COMBINE.check({"x": x, "topk_weights": topk_weights})
        wait_for(previous_event)
        wait_for(previous_event_before_epilogue)
        rows = handle.num_expanded_tokens if handle.do_expand else handle.num_recv_tokens
        check_that(name, "x", len(x) == rows, f"{rows} rows, as dispatched", len(x))
        shape = (rows,) if handle.do_expand else tuple(handle.local_idx.shape)
        if topk_weights is not None:
            check_that(name, "topk_weights", topk_weights.shape == shape, f"shape {shape}",
                       tuple(topk_weights.shape))  # fmt: skip
        dtype = x.dtype
        if handle.do_expand:
            slots = handle.recv_src_metadata[:, 2:].contiguous()  # int32 [R, num_topk]
            ones = torch.ones(slots.shape, device=x.device)
            x = expert_combine(x if self.allow_multiple_reduction else x.float(), ones, slots)
            if topk_weights is not None:
                padded = torch.cat([topk_weights, topk_weights.new_zeros(1)])
                topk_weights = padded[slots.long()]  # -1 (no row) reads the zero
        out, weights = sum_over_ranks(name, handle.link, x, topk_weights, bias, dtype)
        return out, weights, EventOverlap(EventHandle())


def _count(local_idx: Tensor, E: int) -> Tensor:
    """int32 [E], how often each local expert is in `local_idx`, in which -1 is none."""
    expert = torch.where(local_idx < 0, E, local_idx).flatten().long()
    counts = torch.zeros(E + 1, dtype=torch.int32, device=local_idx.device)
    return counts.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))[:E]


def _expand(
    handle: EPHandle, data: list[Tensor], weights: Tensor | None
) -> tuple[list[Tensor], Tensor | None]:
    """One row per token and expert, sorted by expert: data [rows, ...] and weights [rows]."""
    E, rows = len(handle.num_recv_tokens_per_expert_list), handle.num_expanded_tokens
    x, scales, _, _, slots = expert_dispatch(
        data[0], handle.local_idx, E, data[1] if len(data) > 1 else None,
        handle.expert_alignment, num_assigned=handle.link.assigned,
    )  # fmt: skip
    handle.recv_src_metadata = torch.cat([handle.recv_src_metadata[:, :2], slots], 1)
    expanded = [part[:rows] for part in (x, scales) if part is not None]
    if weights is None:
        return expanded, None
    row = torch.where(slots < 0, rows, slots).flatten().long()  # no row: behind the last
    return expanded, weights.new_zeros(rows + 1).scatter_(0, row, weights.flatten())[:rows]


def _check_handle(name: str, handle: object) -> None:
    if not isinstance(handle, EPHandle):
        expected = "an EPHandle that ElasticBuffer.dispatch returned"
        raise TypeError(f"{name}: handle: expected {expected}, got {type(handle).__name__}")
