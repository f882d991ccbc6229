"""Tokens from rank to rank and back, once each, with gradients: one hop of `ExpertParallel`.

A token's row goes to a rank once, however many of its experts are there. With it travel its scales,
the experts it wants and their weights, packed into one row of bytes, so that a hop is one exchange.
On the way back a token's rows are summed in fp32 in the order of the ranks they come from.

Each way is the other's gradient: forth, a row is copied to several ranks; back, several are summed.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..runtime.contract import FP8
from .exchange import DTYPES, Exchange, Transfer
from .expert_dispatch import expert_dispatch, expert_dispatch_backward

ALIGN = 16  # bytes; each part of a packed row starts at a multiple


def pack(parts: list[Tensor]) -> Tensor:
    """Tensors [rows, ...] side by side, as uint8 [rows, width]."""
    shapes = [(part.shape[1], part.dtype) for part in parts]
    packed = parts[0].new_empty((parts[0].shape[0], _starts(shapes)[-1]), dtype=torch.uint8)
    for part, place in zip(parts, unpack(packed, shapes), strict=True):
        place.copy_(part)
    return packed


def unpack(packed: Tensor, shapes: list[tuple[int, torch.dtype]]) -> list[Tensor]:
    """Views of the parts, given their columns and dtypes."""
    return [
        packed[:, start : start + columns * dtype.itemsize].view(dtype)
        for start, (columns, dtype) in zip(_starts(shapes), shapes, strict=False)
    ]


def _starts(shapes: list[tuple[int, torch.dtype]]) -> list[int]:
    # At least 1: of rows of no bytes no view could be taken as another dtype.
    widths = (-(-max(columns * dtype.itemsize, 1) // ALIGN) * ALIGN for columns, dtype in shapes)
    return list(itertools.accumulate(widths, initial=0))


class Link:
    """Where the tokens of one dispatch go, and which rows come from where.

    Args:
        exchange: the ranks.
        target: int32 [T, topk], the rank that owns the expert of each slot, -1 for none.
        same: what all ranks must agree on.
    """

    def __init__(self, exchange: Exchange, target: Tensor, **same: int):
        exchange.begin("dispatch")
        target = target.sort(1).values
        # A rank once, and in ascending order, so that sums go from rank to rank.
        again = torch.zeros_like(target, dtype=torch.bool)
        again[:, 1:] = target[:, 1:] == target[:, :-1]
        self.exchange, self.target = exchange, target.masked_fill(again, -1)
        counts = torch.stack([_count(t, exchange.size) for t in (self.target, target)], 1)
        self.number = exchange.calls
        sent, received = exchange.agree("dispatch", counts, **same)
        self.sent, self.received = [rows for rows, _ in sent], [rows for rows, _ in received]
        self.assigned = sum(assigned for _, assigned in received)
        self.rows: Tensor | None = None  # int32 [T, topk], the row sent, of each target

    def start(self, call: str, parts: list[Tensor]) -> Transfer:
        """Sends each token's row of `parts` [T, ...] to its targets."""
        rows, _, _, _, self.rows = expert_dispatch(
            pack(parts).view(FP8), self.target, self.exchange.size, num_assigned=sum(self.sent)
        )
        return self.exchange.start(call, rows.view(torch.uint8), self.sent, self.received)

    def start_back(self, call: str, parts: list[Tensor]) -> Transfer:
        """Sends `parts` [Σ received, ...] to where the rows came from."""
        return self.exchange.start(call, pack(parts), self.received, self.sent)

    def agree(self, call: str, back: bool, like: Tensor, columns: int, gradients: int) -> None:
        """The headers of a call after the dispatch."""
        self.exchange.begin(call)
        rows = (self.received, self.sent) if back else (self.sent, self.received)
        self.exchange.agree_again(
            call, *rows, like, number_of_the_dispatch=self.number, K=columns,
            dtype=DTYPES.index(like.dtype), gradients_of=gradients,
        )  # fmt: skip


def _count(target: Tensor, size: int) -> Tensor:
    """int64 [size], how often each rank is meant."""
    flat = target.flatten().long()
    counts = torch.zeros(size + 1, dtype=torch.int64, device=target.device)
    return counts.scatter_add_(0, torch.where(flat < 0, size, flat), torch.ones_like(flat))[:size]


class Hop:
    """A step on the way of tokens to their experts: among which ranks, and which expert is where.

    Args:
        exchange: the ranks.
        target: int32 [E], the rank of `exchange` to go to for each expert.
    """

    def __init__(self, exchange: Exchange, target: Tensor):
        self.exchange, self.target = exchange, target

    def targets(self, idx: Tensor) -> Tensor:
        """int32 [T, topk], where to go for each expert of `idx`, -1 for none."""
        if self.target.device != idx.device:
            self.target = self.target.to(idx.device)
        return torch.where(idx < 0, -1, self.target[idx.clamp(min=0)])

    def send(self, x: Tensor, weights: Tensor, idx: Tensor, scale: Tensor | None) -> Sending:
        """Starts x [T, K], fp32 [T, topk], int32 [T, topk] and their scales on their way."""
        return Sending(self, x, weights, idx, scale)


class Sending:
    """Tokens on their way; `wait()` returns x, weights, idx and scale of those that came."""

    def __init__(self, hop: Hop, x: Tensor, weights: Tensor, idx: Tensor, scale: Tensor | None):
        wanted = torch.is_grad_enabled()
        self.link = Link(
            hop.exchange, hop.targets(idx), num_experts=len(hop.target), K=x.shape[1],
            dtype=DTYPES.index(x.dtype), topk=idx.shape[1], x_scale=int(scale is not None),
            gradients_of=(wanted and x.requires_grad) + 2 * (wanted and weights.requires_grad),
        )  # fmt: skip
        parts = [x, idx, weights] if scale is None else [x, idx, weights, scale]
        self.transfer = self.link.start("dispatch", [part.detach() for part in parts])
        self.hop, self.x, self.weights = hop, x, weights
        self.shapes = [(part.shape[1], part.dtype) for part in parts]

    def wait(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        x, weights, idx, scale = Forth.apply(
            self.x, self.weights, self.link, self.transfer, self.shapes
        )
        here = self.hop.targets(idx) == self.hop.exchange.rank
        return x, weights, torch.where(here, idx, -1), scale


def start_return(link: Link, z: Tensor) -> Transfer:
    wanted = int(torch.is_grad_enabled() and z.requires_grad)
    link.agree("combine", True, z, z.shape[1], wanted)
    return link.start_back("combine", [z.detach()])


class Forth(torch.autograd.Function):
    """x [T, K], weights fp32 [T, topk] -> x, weights, idx and scale of the tokens that came."""

    @staticmethod
    def forward(ctx, x, weights, link, transfer, shapes):
        x, idx, weights, *scale = unpack(transfer.wait(), shapes)
        ctx.link, ctx.shapes = link, (shapes[0], shapes[2])
        ctx.set_materialize_grads(False)
        unwanted = zip((x, weights), ctx.needs_input_grad[:2], strict=True)
        ctx.mark_non_differentiable(idx, *scale, *(t for t, wanted in unwanted if not wanted))
        return x, weights, idx, scale[0] if scale else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        link, wanted = ctx.link, ctx.needs_input_grad[:2]
        rows, device = sum(link.received), link.target.device
        parts, shapes = [], []
        for grad, shape, is_wanted in zip(grads[:2], ctx.shapes, wanted, strict=True):
            if is_wanted:  # all ranks send it then, whether it is used here or not
                zeros = torch.zeros((rows, shape[0]), dtype=shape[1], device=device)
                parts.append(zeros if grad is None else grad)
                shapes.append(shape)
        call = "backward of dispatch"
        gradients = wanted[0] + 2 * wanted[1]
        link.agree(call, True, parts[0], parts[0].shape[1], gradients)
        came = unpack(link.start_back(call, parts).wait(), shapes)
        sums = iter([expert_dispatch_backward(part, link.rows) for part in came])
        return *(next(sums) if is_wanted else None for is_wanted in wanted), None, None, None


class Return(torch.autograd.Function):
    """z [Σ received, K] -> [T, K]: each token's rows, summed in fp32 in the order of the ranks."""

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
