"""Token exchange shared by DeepEP's two buffers: receive packed rows, sum rows over the ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from deepkern import expert_dispatch_backward

from ..experts.exchange import Exchange, Transfer
from ..experts.expert_parallel import limit_of
from ..experts.links import Link, unpack
from ..runtime.contract import check_that
from .deep_ep_types import EventHandle, EventOverlap


def connect(name: str, group: dist.ProcessGroup, timeout: float | None = None) -> Exchange:
    """The exchange of `group`, whose calls wait for at most `timeout` seconds."""
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"{name}: group: expected a torch.distributed ProcessGroup that this rank "
                        f"is in, got {group!r}")  # fmt: skip
    limit = limit_of(group).total_seconds()
    return Exchange(group, limit if timeout is None else min(limit, timeout))


def columns(parts: list[Tensor]) -> list[tuple[int, torch.dtype]]:
    """(columns, dtype) of each part [rows, columns] of a packed row."""
    return [(part.shape[1], part.dtype) for part in parts]


def receive(transfer: Transfer, parts: list[Tensor]) -> list[Tensor]:
    """Wait for the rows of `transfer` and split them into contiguous parts like `parts`."""
    return [part.contiguous() for part in unpack(transfer.wait(), columns(parts))]


def sum_over_ranks(
    name: str, link: Link, x: Tensor, topk_weights: Tensor | None,
    bias: Tensor | tuple[Tensor, Tensor] | None, dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Return rows to their source ranks and sum them there, in fp32 and in rank order.

    Args:
        name: the calling function, for errors.
        link: of the dispatch.
        x: real [rows received by the dispatch, hidden].
        topk_weights: fp32 [rows received, num_topk] or None, summed in the same way.
        bias: None, or one or two real [num_tokens, hidden], added in fp32 before the rounding.
        dtype: of the result.

    Returns:
        [num_tokens, hidden] in `dtype`, and fp32 [num_tokens, num_topk] or None.
    """
    biases = [] if bias is None else [bias] if isinstance(bias, Tensor) else list(bias)
    shape = (len(link.target), x.shape[1])
    for b in biases:
        check_that(name, "bias", b.shape == shape, f"shape {shape}", tuple(b.shape))
    parts = [x] if topk_weights is None else [x, topk_weights]
    link.agree("combine", True, x, x.shape[1], 0)
    received = unpack(link.start_back("combine", parts).wait(), columns(parts))
    if biases or dtype != x.dtype:
        out = expert_dispatch_backward(received[0].float(), link.rows)
        for b in biases:
            out += b
        out = out.to(dtype)
    else:
        out = expert_dispatch_backward(received[0], link.rows)
    if topk_weights is None:
        return out, None
    return out, expert_dispatch_backward(received[1], link.rows)


def experts_per_rank(name: str, num_experts: int, num_ranks: int) -> int:
    fits = num_experts >= 1 and num_experts % num_ranks == 0
    check_that(name, "num_experts", fits, f"a multiple of {num_ranks} ranks", num_experts)
    return num_experts // num_ranks


def as_given(data: list[Tensor]) -> Tensor | tuple[Tensor, Tensor]:
    """[x] -> x and [x, scales] -> (x, scales), as callers pass them."""
    return data[0] if len(data) == 1 else tuple(data)


def wait_for(event: EventOverlap | EventHandle | None) -> None:
    if event is not None:
        event.current_stream_wait()
