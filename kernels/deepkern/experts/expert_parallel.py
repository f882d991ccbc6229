"""Expert parallelism: the experts of a layer live on several ranks, and tokens travel to them.

    rows, scale, group_index, counts, handle = ep.dispatch(x, topk_idx, topk_weights, x_scale)
    y = ...                                      # this rank's experts, over rows sorted by expert
    out = ep.combine(y, handle)                  # [T, K], weighted and summed

Cut: a token's row goes to each rank that has experts of it, once (links.py); `expert_dispatch`
sorts the rows that came by expert. On the way back a rank weights and sums the rows of a token it
has (`expert_combine`) and returns one row, and those of all ranks are summed in fp32 in the order
of the ranks. With nodes there are two such hops: to the rank of the same place in each node that
has experts of the token, and from there within the node; a token crosses between two nodes once.

What limits the speed is the wire: K bytes of FP8, or 2·K of bf16, and 8·topk bytes of indices and
weights, for each rank a token goes to. A sparse exchange has to know how much comes: each dispatch
waits on the host for the row counts of all ranks, in one exchange.

Sources: the DeepSeek-V3 report (arXiv 2412.19437), section 3.2; DeepEP's interface.
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
from .exchange import Exchange
from .expert_combine import expert_combine
from .expert_dispatch import check_contents, expert_dispatch
from .links import Hop, Link, Return, start_return
from .peer_memory import connect

TIMEOUT = 300.0  # seconds, where the group's own is longer

DISPATCH = Contract(
    "ExpertParallel.dispatch",
    optional=("topk_weights", "x_scale"),
    x="real|fp8 [T, K]",
    topk_idx="int64|int32 [T, topk]",
    topk_weights="real [T, topk] strided",
    x_scale="fp32 [T, K/128] strided",
)
COMBINE = Contract("ExpertParallel.combine", y="real [rows, K]")


@dataclass(frozen=True)
class DispatchHandle:
    """What `combine` needs to know of a `dispatch`."""

    owner: ExpertParallel
    links: tuple[Link, ...]
    rows: Tensor  # int32 [tokens that came, topk], the row of each, -1 for none here
    weights: Tensor  # fp32 [tokens that came, topk]
    num_rows: int  # of the dispatched rows


class Pending:
    """The outcome of a call that is under way; `wait()` completes the call and returns it."""

    def __init__(self, finish: Callable):
        self._finish, self._outcome = finish, None

    def wait(self):
        if self._finish is not None:
            finish, self._finish = self._finish, None
            self._outcome = finish()
        return self._outcome


class ExpertParallel:
    """Dispatch and combine over the ranks of a torch.distributed group, gloo or NCCL.

    All ranks make it with the same arguments and then call it in step, ranks without tokens too
    (T = 0). Rank r owns the experts `local_experts`: E / size each, in order, the first E % size
    ranks one more.

    Args:
        group: the ranks: a process group, a DeviceMesh of one dimension, or one of two, (nodes,
            ranks per node). None is the group of all ranks.
        num_experts: E.
        ranks_per_node: the ranks of a group lie so many to a node, in order. Tokens then go in two
            hops, and cross between two nodes once. All ranks of the group must make the object at
            the same time. A DeviceMesh of two dimensions says so itself.
        timeout: seconds that a call may wait for other ranks; by default as long as the group
            itself would, at most 300.
        peer_buffer: bytes of memory on this GPU, the same on all ranks, into which the others write
            their rows themselves, in place of an all_to_all: for ranks that share NVLink or one GPU
            (TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES=1). Of two hops, the one within the node goes
            through it. A rank may send another one 1 / (2 · ranks) of it at a time. At most two
            calls may be under way, and each waits on the host for its rows.

    Raises:
        ValueError, TypeError: an argument is not as above.
        ExpertParallelError: from `dispatch`, `combine` and their gradients: another rank did not
            answer in time, has ended, or is at another call or was given something else; the
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
        share, more = divmod(num_experts, size)
        start = [r * share + min(r, more) for r in range(size + 1)]
        self.num_experts, self.size, self.rank = num_experts, size, rank
        self.local_experts = range(start[rank], start[rank + 1])
        owner = torch.repeat_interleave(
            torch.arange(size, dtype=torch.int32), torch.tensor(start).diff()
        )
        targets = [owner] if len(exchanges) == 1 else [owner // shape[1], owner % shape[1]]
        self._hops = [Hop(e, target) for e, target in zip(exchanges, targets, strict=True)]

    def __repr__(self) -> str:
        hops = " then ".join(str(hop.exchange) for hop in self._hops)
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
        """Sends tokens to the ranks of their experts; returns those that came here, by expert.

        Args:
            x: bf16, fp16, fp32 or float8_e4m3fn [T, K]; T differs between ranks, K does not.
            topk_idx: int64 or int32 [T, topk], experts of all ranks. Whatever is not in
                [0, num_experts) is no expert. An expert may come twice.
            topk_weights: real [T, topk]; they travel along, for `combine`.
            x_scale: fp32 [T, ceil(K / 128)], any strides: the scales of an FP8 `x`.
            alignment: the rows of each expert start at a multiple of this.
            async_op: return at once, with the rows of the first hop under way, a `Pending` whose
                `wait()` returns the tuple. Calls are waited for in the order they were made.

        Returns:
            x: [rows, K] in the dtype of `x`, sorted by expert, within an expert by (rank it came
                from, token, slot), as `expert_dispatch` would give them for all tokens together;
                after two hops by (place in the node, node, token, slot).
            scale: fp32 [rows, ceil(K / 128)], or None without `x_scale`.
            group_index: int32 [rows], the expert of each row, counted from `local_experts`; -1 and
                zeros in x and scale for rows that alignment adds.
            tokens_per_expert: int32 [len(local_experts)].
            handle: for `combine`.

        The gradients go to a real `x` and to `topk_weights`, by an exchange the other way. All
        ranks must then run their backward pass, those without tokens too.
        """
        name = "ExpertParallel.dispatch"
        for argument, tensor in (("x", x), ("topk_idx", topk_idx), ("topk_weights", topk_weights)):
            if tensor is None:
                raise TypeError(f"{name}: {argument}: expected a Tensor, got None")
        DISPATCH.check(
            {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights, "x_scale": x_scale}
        )
        check_that(name, "alignment", alignment >= 1, "at least 1", alignment)
        self._check_device(name, "x", x)
        if os.environ.get("DEEPKERN_DEBUG") == "1":
            check_contents(x, topk_idx, self.num_experts)
        valid = (topk_idx >= 0) & (topk_idx < self.num_experts)
        idx = torch.where(valid, topk_idx, -1).int()
        weights = topk_weights.float()
        sending = self._hops[0].send(x, weights, idx, x_scale)

        def finish():
            tokens, links = sending.wait(), [sending.link]
            for hop in self._hops[1:]:
                further = hop.send(*tokens)
                tokens = further.wait()
                links.append(further.link)
            return self._sort(*tokens, alignment, links)

        return Pending(finish) if async_op else finish()

    def combine(
        self, y: Tensor, handle: DispatchHandle, async_op: bool = False
    ) -> Tensor | Pending:
        """Weights and sums the experts' rows of each token, on the rank it came from.

        Args:
            y: bf16, fp16 or fp32 [rows, K], what the experts made of `dispatch`'s rows. K may be
                another than that of `x`, but the same on all ranks.
            handle: from `dispatch`; it may be used again.
            async_op: as for `dispatch`.

        Returns:
            [T, K] in the dtype of `y`, which is also what travels: each rank sums its own rows of a
            token in fp32 in the order of the slots and rounds, the sums of the ranks are added in
            fp32 in the order of the ranks and rounded again. 0 for a token without experts.
        """
        name = "ExpertParallel.combine"
        if not isinstance(handle, DispatchHandle) or handle.owner is not self:
            raise TypeError(f"{name}: handle: expected one that this object's dispatch returned, "
                            f"got {type(handle).__name__}")  # fmt: skip
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
            for before in reversed(links):
                out = Return.apply(out, before, start_return(before, out))
            return out

        return Pending(finish) if async_op else finish()

    def _sort(
        self, x: Tensor, weights: Tensor, idx: Tensor, scale: Tensor | None, alignment: int,
        links: list[Link],
    ):  # fmt: skip
        """The tokens that came, by expert."""
        E = len(self.local_experts)
        here = torch.where(idx < 0, -1, idx - self.local_experts.start)
        x, scale, group_index, counts, rows = expert_dispatch(
            x, here, max(E, 1), scale, alignment, num_assigned=links[-1].assigned
        )
        handle = DispatchHandle(self, tuple(links), rows, weights, x.shape[0])
        return x, scale, group_index, counts[:E], handle

    def _check_device(self, name: str, argument: str, tensor: Tensor) -> None:
        try:
            self._hops[0].exchange.group._get_backend(tensor.device)
        except RuntimeError:
            expected = f"a tensor on a device that {self._hops[0].exchange} serves"
            check_that(name, argument, False, expected, tensor.device)


def _groups(name: str, group, ranks_per_node: int | None, timeout: float | None):
    """The groups of the hops, (nodes, ranks per node), and this rank's place in them."""
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
    fits = ranks_per_node >= 1 and size % ranks_per_node == 0
    check_that(name, "ranks_per_node", fits, f"a divisor of {size}", ranks_per_node)
    nodes = size // ranks_per_node
    ranks = torch.tensor(dist.get_process_group_ranks(group)).view(nodes, ranks_per_node)
    node, place = divmod(rank, ranks_per_node)
    limit = limit_of(group) if timeout is None else timedelta(seconds=timeout)
    groups = [
        dist.new_group(members.tolist(), limit, use_local_synchronization=True, group_desc=what)
        for members, what in (
            (ranks[:, place], f"place {place} of each node"), (ranks[node], f"node {node}"),
        )
    ]  # fmt: skip
    return groups, (nodes, ranks_per_node), (node, place)


def limit_of(group: dist.ProcessGroup) -> timedelta:
    """How long a call may wait: as the group says, but at most TIMEOUT."""
    options = group._get_backend(group._device_types[0]).options
    return min(options._timeout, timedelta(seconds=TIMEOUT))
