"""Expert parallelism: the experts of a layer are distributed over ranks; tokens are sent to them.

    rows, scale, group_index, counts, handle = ep.dispatch(x, topk_idx, topk_weights, x_scale)
    y = ...                                      # this rank's experts, over rows sorted by expert
    out = ep.combine(y, handle)                  # [T, K], weighted and summed

Parallelization: a token's row is sent once to each rank that owns experts of it (links.py), and
`expert_dispatch` sorts the received rows by expert. In combine, a rank weights and sums its
rows of a token (`expert_combine`) and returns one row; the rows of all ranks are summed in fp32 in
rank order. With nodes there are two such hops: to the rank with the same local rank on each node
that owns experts of the token, and from there within the node. A token crosses between two nodes
once.

Limit: the interconnect. For each rank that a token goes to, K bytes of FP8 or 2·K of bf16 are sent,
and 8·topk bytes of indices and weights. Receive sizes depend on the data: each dispatch waits on
the host for the row counts of all ranks, in one exchange.

Source: the DeepSeek-V3 report (arXiv 2412.19437), section 3.2; DeepEP's interface.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..runtime.contract import Contract, check_that
from .checks import check_divisors, check_indices, check_ints, check_type
from .exchange import Exchange
from .expert_combine import expert_combine
from .expert_dispatch import expert_dispatch
from .links import Hop, Link, Return, start_return
from .peer_memory import connect

MAX_TIMEOUT = 300.0  # seconds, the default if the group's own timeout is longer

DISPATCH = Contract(
    "ExpertParallel.dispatch",
    optional=("x_scale",),
    x="real|fp8 [T, K]",
    topk_idx="int64|int32 [T, topk]",
    topk_weights="real [T, topk] strided",
    x_scale="fp32 [T, K/128] strided",
)
COMBINE = Contract("ExpertParallel.combine", y="real [rows, K]")


@dataclass(frozen=True)
class DispatchHandle:
    """The state of a `dispatch` that `combine` needs."""

    owner: ExpertParallel
    links: tuple[Link, ...]
    rows: Tensor  # int32 [received tokens, topk], the row of each slot, -1 for none on this rank
    weights: Tensor  # fp32 [received tokens, topk]
    num_rows: int  # rows that `dispatch` returned


class Pending:
    """A call in progress; `wait()` completes it and returns its result."""

    def __init__(self, finish: Callable):
        self._finish, self._result = finish, None

    def wait(self):
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._result = finish()
        return self._result


class ExpertParallel:
    """Dispatch and combine over the ranks of a torch.distributed group, gloo or NCCL.

        ep = deepkern.ExpertParallel(None, num_experts=256, ranks_per_node=8)
        rows, scale, group_index, counts, handle = ep.dispatch(x, topk_idx, topk_weights, x_scale)
        out = ep.combine(experts(rows, scale, group_index), handle)

    All ranks construct it with the same arguments and then make the same calls in the same order,
    also ranks without tokens (T = 0). Rank r owns the experts `local_experts`: E / size
    consecutive experts, one more on the first E % size ranks.

    Args:
        group: the ranks: a process group, a DeviceMesh of one dimension, or one of two, (nodes,
            ranks per node). None is the group of all ranks.
        num_experts: E.
        ranks_per_node: consecutive ranks of the group on one node. Tokens then go in two hops, and
            cross between two nodes once. All ranks of the group must construct the object at the
            same time. Not allowed with a DeviceMesh, whose second dimension states it.
        timeout: seconds that a call may wait for other ranks; by default the timeout of the group,
            at most 300.
        peer_buffer: bytes of memory on this GPU, equal on all ranks, to which the other ranks write
            their rows in place of an all_to_all: for ranks that share NVLink or one GPU
            (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1). With two hops, the hop within the node
            uses it. A rank can send 1 / (2 · ranks) of it to another rank at a time. At most two
            calls may be pending, and each waits on the host for its rows.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
        ExpertParallelError: from `dispatch`, `combine` and their gradients: another rank did not
            answer in time, has ended, or made another call or the call with other arguments. The
            message names the group and those ranks. The object cannot be used afterwards.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | DeviceMesh | None,
        num_experts: int,
        ranks_per_node: int | None = None,
        timeout: float | None = None,
        peer_buffer: int = 0,
    ):
        name = "ExpertParallel"
        check_ints(name, num_experts=num_experts, peer_buffer=peer_buffer)
        check_that(name, "num_experts", num_experts >= 1, "at least 1", num_experts)
        check_that(name, "timeout", timeout is None or timeout > 0, "more than 0", timeout)
        groups, shape, position = _groups(name, group, ranks_per_node, timeout)
        exchanges = [Exchange(g, timeout or limit_of(g).total_seconds()) for g in groups]
        if peer_buffer:
            has_cuda = torch.cuda.is_available()
            check_that(name, "peer_buffer", has_cuda, "0 without a GPU", peer_buffer)
            exchanges[-1].memory = connect(groups[-1], peer_buffer, exchanges[-1].timeout)
        size = shape[0] * shape[1]
        rank = position[0] * shape[1] + position[1]
        per_rank, remainder = divmod(num_experts, size)
        start = [r * per_rank + min(r, remainder) for r in range(size + 1)]
        self.num_experts, self.size, self.rank = num_experts, size, rank
        self.local_experts = range(start[rank], start[rank + 1])
        owner = torch.repeat_interleave(
            torch.arange(size, dtype=torch.int32), torch.tensor(start).diff()
        )
        targets = [owner] if len(exchanges) == 1 else [owner // shape[1], owner % shape[1]]
        self.hops = [Hop(e, target) for e, target in zip(exchanges, targets, strict=True)]

    def __repr__(self) -> str:
        hops = " then ".join(str(hop.exchange) for hop in self.hops)
        return f"ExpertParallel({hops}, num_experts={self.num_experts})"

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        x_scale: Tensor | None = None,
        alignment: int = 1,
        async_op: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, DispatchHandle] | Pending:
        """Sends tokens to the ranks of their experts; returns the received ones by expert.

        Args:
            x: bf16, fp16, fp32 or float8_e4m3fn [T, K]; T may differ between ranks, K may not.
            topk_idx: int64 or int32 [T, topk], experts of all ranks. Indices outside
                [0, num_experts) are ignored. Duplicates are allowed.
            topk_weights: real [T, topk]; sent along with the tokens, for `combine`.
            x_scale: fp32 [T, ceil(K / 128)], any strides: the scales of an FP8 `x`.
            alignment: each expert's first row is a multiple of it.
            async_op: start the first hop and return a `Pending`, whose `wait()` returns the tuple.
                Wait for calls in the order in which they were made.

        Returns:
            x: [rows, K] in the dtype of `x`, sorted by expert, within an expert by (source rank,
                token, slot), as `expert_dispatch` sorts the tokens of all ranks; with two hops by
                (local rank of the source, node, token, slot).
            scale: fp32 [rows, ceil(K / 128)], or None without `x_scale`.
            group_index: int32 [rows], the expert of each row minus `local_experts.start`; -1 for
                rows that alignment adds, whose x and scale are 0.
            tokens_per_expert: int32 [len(local_experts)].
            handle: for `combine`.

        The gradients go to a real `x` and to `topk_weights`, by an exchange in the other direction.
        All ranks must then run their backward pass, also ranks without tokens.

        Raises:
            TypeError, ValueError: an argument violates the rules above.
            ExpertParallelError: another rank is missing or out of step.
        """
        name = "ExpertParallel.dispatch"
        DISPATCH.check(
            {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights, "x_scale": x_scale}
        )
        check_ints(name, alignment=alignment)
        check_that(name, "alignment", alignment >= 1, "at least 1", alignment)
        self._check_device(name, "x", x)
        if os.environ.get("DEEPKERN_DEBUG") == "1":
            check_indices(name, "topk_idx", topk_idx, self.num_experts)
        valid = (topk_idx >= 0) & (topk_idx < self.num_experts)
        idx = torch.where(valid, topk_idx, -1).int()
        weights = topk_weights.float()
        sending = self.hops[0].send(x, weights, idx, x_scale)

        def finish():
            tokens, links = sending.wait(), [sending.link]
            for hop in self.hops[1:]:
                sending_on = hop.send(*tokens)
                tokens = sending_on.wait()
                links.append(sending_on.link)
            return self._sort(*tokens, alignment, links)

        return Pending(finish) if async_op else finish()

    def combine(
        self, y: Tensor, handle: DispatchHandle, async_op: bool = False
    ) -> Tensor | Pending:
        """Weights and sums the experts' rows of each token, on the rank it came from.

        Args:
            y: bf16, fp16 or fp32 [rows, K], the experts' outputs for the rows of `dispatch`. K may
                differ from that of `x`, but not between ranks.
            handle: from `dispatch`; it may be used several times.
            async_op: as for `dispatch`.

        Returns:
            [T, K] in the dtype of `y`; 0 for a token without experts. Each rank sums its own rows
            of a token in fp32 in the order of the slots and rounds to that dtype, in which the sum
            is sent; the sums of the ranks are added in fp32 in rank order and rounded again.

        Raises:
            TypeError, ValueError: an argument violates the rules above.
            ExpertParallelError: another rank is missing or out of step.
        """
        name = "ExpertParallel.combine"
        expected = "a DispatchHandle of this object"
        check_type(name, "handle", handle, (DispatchHandle,), expected)
        if handle.owner is not self:
            raise TypeError(f"{name}: handle: expected {expected}, got one of {handle.owner}")
        COMBINE.check({"y": y})
        rows = f"the dispatch's {handle.num_rows} rows"
        check_that(name, "y", y.shape[0] == handle.num_rows, rows, y.shape[0])
        device = f"device {handle.rows.device} (that of the dispatch)"
        check_that(name, "y", y.device == handle.rows.device, device, y.device)
        z = expert_combine(y, handle.weights, handle.rows)
        links = list(handle.links)
        link = links.pop()
        transfer = start_return(link, z)

        def finish():
            out = Return.apply(z, link, transfer)
            for earlier in reversed(links):
                out = Return.apply(out, earlier, start_return(earlier, out))
            return out

        return Pending(finish) if async_op else finish()

    def _sort(
        self,
        x: Tensor,
        weights: Tensor,
        idx: Tensor,
        scale: Tensor | None,
        alignment: int,
        links: list[Link],
    ):
        """Sorts the received tokens by expert: the result of `dispatch`."""
        E = len(self.local_experts)
        local_idx = torch.where(idx < 0, -1, idx - self.local_experts.start)
        x, scale, group_index, counts, rows = expert_dispatch(
            x, local_idx, max(E, 1), scale, alignment, num_assigned=links[-1].assigned
        )
        handle = DispatchHandle(self, tuple(links), rows, weights, x.shape[0])
        return x, scale, group_index, counts[:E], handle

    def _check_device(self, name: str, argument: str, tensor: Tensor) -> None:
        try:
            self.hops[0].exchange.group._get_backend(tensor.device)
        except RuntimeError:
            expected = f"a tensor on a device that {self.hops[0].exchange} serves"
            check_that(name, argument, False, expected, tensor.device)


def _groups(name: str, group, ranks_per_node: int | None, timeout: float | None):
    """The groups of the hops, (nodes, ranks per node), and this rank's (node, local rank)."""
    if isinstance(group, DeviceMesh):
        check_that(name, "group", group.ndim <= 2, "a mesh of 1 or 2 dimensions", group)
        check_that(
            name, "ranks_per_node", ranks_per_node is None, "None with a mesh", ranks_per_node
        )
        shape, position = tuple(group.shape), group.get_coordinate()
        if group.ndim == 1:
            shape, position = (1, *shape), (0, *position)
        return [group.get_group(d) for d in range(group.ndim)], shape, position
    group = dist.group.WORLD if group is None else group
    if not isinstance(group, dist.ProcessGroup):
        expected = "a ProcessGroup that this rank is in or a DeviceMesh"
        raise TypeError(f"{name}: group: expected {expected}, got {group!r}")
    size, rank = group.size(), group.rank()
    if ranks_per_node is None:
        return [group], (1, size), (0, rank)
    check_ints(name, ranks_per_node=ranks_per_node)
    check_divisors(name, ("ranks_per_node", ranks_per_node, size))
    nodes = size // ranks_per_node
    ranks = torch.tensor(dist.get_process_group_ranks(group)).view(nodes, ranks_per_node)
    node, local_rank = divmod(rank, ranks_per_node)
    limit = limit_of(group) if timeout is None else timedelta(seconds=timeout)
    groups = [
        dist.new_group(members.tolist(), limit, use_local_synchronization=True, group_desc=text)
        for members, text in (
            (ranks[:, local_rank], f"local rank {local_rank} of each node"),
            (ranks[node], f"node {node}"),
        )
    ]
    return groups, (nodes, ranks_per_node), (node, local_rank)


def limit_of(group: dist.ProcessGroup) -> timedelta:
    """The time that a call may wait: the timeout of the group, at most MAX_TIMEOUT."""
    options = group._get_backend(group._device_types[0]).options
    return min(options._timeout, timedelta(seconds=MAX_TIMEOUT))
