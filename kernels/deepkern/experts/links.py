"""One hop of `ExpertParallel`: tokens go from rank to rank and back, with gradients.

A token's row goes to a rank once, even if several of its experts are on that rank. Its scales, the
indices of its experts and their weights are packed with it into one row of bytes, so that a hop is
one exchange. In combine, a token's rows are summed in fp32 in the order of their ranks.

Each direction is the gradient of the other: forward copies a row to several ranks, return sums
several rows.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..runtime.contract import FP8
from .exchange import DTYPES, Exchange, Transfer
from .expert_dispatch import expert_dispatch, expert_dispatch_backward

ALIGN = 16  # bytes; each column of a packed row starts at a multiple


def pack(columns: list[Tensor]) -> Tensor:
    """Concatenates tensors [rows, n_i] of any dtypes by columns, as uint8 [rows, width]."""
    shapes = [(column.shape[1], column.dtype) for column in columns]
    width = _starts(shapes)[-1]
    packed = columns[0].new_empty((columns[0].shape[0], width), dtype=torch.uint8)
    for column, view in zip(columns, unpack(packed, shapes), strict=True):
        view.copy_(column)
    return packed


def unpack(packed: Tensor, shapes: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Views of the columns of `packed`, given the width in elements and the dtype of each."""
    return [
        packed[:, start : start + n * dtype.itemsize].view(dtype)
        for start, (n, dtype) in zip(_starts(shapes), shapes, strict=False)
    ]


def _starts(shapes: list[tuple[int, torch.dtype]]) -> list[int]:
    # At least 1 byte: a row of 0 bytes cannot be viewed as another dtype.
    widths = (-(-max(n * dtype.itemsize, 1) // ALIGN) * ALIGN for n, dtype in shapes)
    return list(itertools.accumulate(widths, initial=0))


class Link:
    """The routes of one dispatch: the target ranks of each token, and the rows of each rank.

    Args:
        exchange: the ranks.
        target: int32 [T, topk], the rank that owns the expert of each slot, -1 for none.
        same: values that must be equal on all ranks.
    """

    def __init__(self, exchange: Exchange, target: Tensor, **same: int):
        exchange.begin("dispatch")
        target = target.sort(1).values
        # Each rank once, in ascending order: sums go from rank to rank.
        is_repeated = torch.zeros_like(target, dtype=torch.bool)
        is_repeated[:, 1:] = target[:, 1:] == target[:, :-1]
        self.exchange, self.target = exchange, target.masked_fill(is_repeated, -1)
        counts = torch.stack([_count(t, exchange.size) for t in (self.target, target)], 1)
        self.number = exchange.calls
        sent, received = exchange.agree("dispatch", counts, **same)
        self.sent, self.received = [rows for rows, _ in sent], [rows for rows, _ in received]
        self.assigned = sum(assigned for _, assigned in received)
        self.rows: Tensor | None = None  # int32 [T, topk], the sent row of each target

    def start(self, call: str, columns: list[Tensor]) -> Transfer:
        """Sends each token's row of `columns` [T, ...] to its targets."""
        packed, num_sent = pack(columns).view(FP8), sum(self.sent)
        rows, _, _, _, self.rows = expert_dispatch(
            packed, self.target, self.exchange.size, num_assigned=num_sent
        )
        return self.exchange.start(call, rows.view(torch.uint8), self.sent, self.received)

    def start_back(self, call: str, columns: list[Tensor]) -> Transfer:
        """Sends `columns` [sum(received), ...] back to the ranks that the rows came from."""
        return self.exchange.start(call, pack(columns), self.received, self.sent)

    def agree(self, call: str, back: bool, like: Tensor, columns: int, gradients: int) -> None:
        """Exchanges the headers of a call after the dispatch."""
        self.exchange.begin(call)
        rows = (self.received, self.sent) if back else (self.sent, self.received)
        self.exchange.agree_again(
            call, *rows, like, number_of_the_dispatch=self.number, K=columns,
            dtype=DTYPES.index(like.dtype), gradients_of=gradients,
        )  # fmt: skip


def _count(target: Tensor, size: int) -> Tensor:
    """int64 [size], the number of slots with each rank as their target."""
    flat = target.flatten().long()
    counts = torch.zeros(size + 1, dtype=torch.int64, device=target.device)
    return counts.scatter_add_(0, torch.where(flat < 0, size, flat), torch.ones_like(flat))[:size]


class Hop:
    """One exchange between a token and its experts.

    Args:
        exchange: the ranks.
        target: int32 [E], the rank of `exchange` that leads to each expert.
    """

    def __init__(self, exchange: Exchange, target: Tensor):
        self.exchange, self.target = exchange, target

    def targets(self, idx: Tensor) -> Tensor:
        """int32 [T, topk], the target rank of each expert of `idx`, -1 for none."""
        if self.target.device != idx.device:
            self.target = self.target.to(idx.device)
        return torch.where(idx < 0, -1, self.target[idx.clamp(min=0)])

    def send(self, x: Tensor, weights: Tensor, idx: Tensor, scale: Tensor | None) -> Sending:
        """Starts to send x [T, K], weights fp32 [T, topk], idx int32 [T, topk] and scales."""
        return Sending(self, x, weights, idx, scale)


class Sending:
    """Tokens being sent; `wait()` returns x, weights, idx and scale of the received tokens."""

    def __init__(self, hop: Hop, x: Tensor, weights: Tensor, idx: Tensor, scale: Tensor | None):
        has_grad = torch.is_grad_enabled()
        self.link = Link(
            hop.exchange, hop.targets(idx), num_experts=len(hop.target), K=x.shape[1],
            dtype=DTYPES.index(x.dtype), topk=idx.shape[1], x_scale=int(scale is not None),
            gradients_of=(has_grad and x.requires_grad) + 2 * (has_grad and weights.requires_grad),
        )  # fmt: skip
        columns = [x, idx, weights] if scale is None else [x, idx, weights, scale]
        self.transfer = self.link.start("dispatch", [column.detach() for column in columns])
        self.hop, self.x, self.weights = hop, x, weights
        self.shapes = [(column.shape[1], column.dtype) for column in columns]

    def wait(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, weights, idx, scale = Forward.apply(
            self.x, self.weights, self.link, self.transfer, self.shapes
        )
        is_local = self.hop.targets(idx) == self.hop.exchange.rank
        return x, weights, torch.where(is_local, idx, -1), scale


def start_return(link: Link, z: Tensor) -> Transfer:
    """Starts to send z [sum(received), K] back, for `Return`."""
    has_grad = int(torch.is_grad_enabled() and z.requires_grad)
    link.agree("combine", True, z, z.shape[1], has_grad)
    return link.start_back("combine", [z.detach()])


class Forward(torch.autograd.Function):
    """x [T, K], weights fp32 [T, topk] -> x, weights, idx and scale of the received tokens."""

    @staticmethod
    def forward(ctx, x, weights, link, transfer, shapes):
        x, idx, weights, *scale = unpack(transfer.wait(), shapes)
        ctx.link, ctx.shapes = link, (shapes[0], shapes[2])
        ctx.set_materialize_grads(False)
        outputs = zip((x, weights), ctx.needs_input_grad[:2], strict=True)
        ctx.mark_non_differentiable(
            idx, *scale, *(t for t, needs_grad in outputs if not needs_grad)
        )
        return x, weights, idx, scale[0] if scale else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        link, needs_grad = ctx.link, ctx.needs_input_grad[:2]
        rows, device = sum(link.received), link.target.device
        columns, shapes = [], []
        for grad, shape, needed in zip(grads[:2], ctx.shapes, needs_grad, strict=True):
            if needed:  # all ranks send it, whether this rank used the output or not
                zeros = torch.zeros((rows, shape[0]), dtype=shape[1], device=device)
                columns.append(zeros if grad is None else grad)
                shapes.append(shape)
        call = "backward of dispatch"
        gradients = needs_grad[0] + 2 * needs_grad[1]
        link.agree(call, True, columns[0], columns[0].shape[1], gradients)
        received = unpack(link.start_back(call, columns).wait(), shapes)
        sums = iter([expert_dispatch_backward(column, link.rows) for column in received])
        return *(next(sums) if needed else None for needed in needs_grad), None, None, None


class Return(torch.autograd.Function):
    """z [sum(received), K] -> [T, K]: each token's rows, summed in fp32 in rank order."""

    @staticmethod
    def forward(ctx, z, link, transfer):
        ctx.link = link
        (rows,) = unpack(transfer.wait(), [(z.shape[1], z.dtype)])
        return expert_dispatch_backward(rows, link.rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        call = "backward of combine"
        ctx.link.agree(call, False, grad, grad.shape[1], 0)
        (rows,) = unpack(ctx.link.start(call, [grad]).wait(), [(grad.shape[1], grad.dtype)])
        return rows, None, None
