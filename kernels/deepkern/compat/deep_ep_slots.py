"""Outputs of DeepEP's low-latency dispatch: a fixed number of row slots per local expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepkern import expert_dispatch

from ..experts.links import Link
from ..runtime.contract import FP8, check_that


class Slots:
    """The tensors that `low_latency_dispatch` returns; `fill` writes them when the rows arrive.

    Args:
        E: local experts.
        slots: rows per expert.
        hidden: columns.
        like: a tensor of the device and dtype of the rows.
        use_ue8m0: scales of FP8 rows are int32 with four exponents each.
    """

    def __init__(self, E: int, slots: int, hidden: int, like: Tensor, use_ue8m0: bool):
        device = like.device
        dtype = torch.uint8 if like.dtype == FP8 else like.dtype
        self.x = torch.zeros((E * slots, hidden), dtype=dtype, device=device).view(like.dtype)
        blocks, dtype = -(-hidden // 128), torch.float32
        if use_ue8m0:
            blocks, dtype = -(-blocks // 4), torch.int32
        # Column-major, which TMA requires.
        scales = torch.zeros((E, blocks, slots), dtype=dtype, device=device).transpose(1, 2)
        self.scales = scales if like.dtype == FP8 else None
        self.sources = torch.full((E, slots), -1, dtype=torch.int32, device=device)
        self.count = torch.zeros(E, dtype=torch.int32, device=device)
        self.use_ue8m0 = use_ue8m0

    def result(self) -> Tensor | tuple[Tensor, Tensor]:
        x = self.x.view(*self.sources.shape, self.x.shape[1])
        return x if self.scales is None else (x, self.scales)

    def fill(
        self, name: str, link: Link, local: Tensor, token: Tensor, x: Tensor,
        scale: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Write received rows to their slots.

        Args:
            name: the calling function, for errors.
            link: of the dispatch.
            local: int32 [T, topk], the local expert of each slot of a received token, -1 for none.
            token: int32 [T, 1], the token's index on its source rank.
            x, scale: [T, hidden] and fp32 [T, ceil(hidden / 128)].

        Returns:
            int64 [E, ranks], the rows of each expert from each rank; int32 [T, topk], the index of
            each row in [E * slots], -1 for none.
        """
        (E, slots), size, device = self.sources.shape, link.exchange.size, x.device
        rank = torch.arange(size, dtype=torch.int32, device=device)
        rank = rank.repeat_interleave(torch.tensor(link.received, device=device))
        origin = torch.stack([token.flatten(), rank], 1).view(torch.float32)  # moved as bits
        assigned = {"num_assigned": link.assigned}
        x, scale, expert, count, rows = expert_dispatch(x, local, E, scale, **assigned)
        origin = expert_dispatch(origin, local, E, **assigned)[0].view(torch.int32)
        most = int(count.max())
        check_that(name, "topk_idx", most <= slots, "distinct experts per token", f"{most} rows")
        expert = expert.long()
        slot = torch.arange(len(expert), device=device) - (count.cumsum(0) - count)[expert]
        place = expert * slots + slot
        as_bytes(self.x)[place] = as_bytes(x)
        self.sources.view(-1)[place] = origin[:, 0]
        if scale is not None:
            self.scales[expert, slot] = packed_exponents(scale) if self.use_ue8m0 else scale
        self.count.copy_(count)
        counts = torch.zeros(E * size, dtype=torch.int64, device=device)
        counts.scatter_add_(0, expert * size + origin[:, 1], torch.ones_like(expert))
        place = torch.cat([place, place.new_full((1,), -1)])  # index -1 (no row) reads -1
        return counts.view(E, size), place[rows.long()].int()


def packed_exponents(scale: Tensor) -> Tensor:
    """fp32 powers of two [rows, blocks] -> int32 [rows, ceil(blocks / 4)], four UE8M0 in each."""
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return F.pad(exponents, (0, -exponents.shape[1] % 4)).view(torch.int32)


def as_bytes(x: Tensor) -> Tensor:
    """FP8 as uint8, which torch can index and concatenate; other dtypes unchanged."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
