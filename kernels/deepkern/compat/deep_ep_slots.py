"""The slots that DeepEP's low-latency dispatch fills: so many rows for each local expert."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..experts.expert_dispatch import expert_dispatch
from ..experts.links import Link
from ..runtime.contract import FP8, check_that


class Slots:
    """What `low_latency_dispatch` returns, to be filled when the rows are there."""

    def __init__(self, E: int, slots: int, hidden: int, like: Tensor, use_ue8m0: bool):
        device = like.device
        dtype = torch.uint8 if like.dtype == FP8 else like.dtype
        self.x = torch.zeros((E * slots, hidden), dtype=dtype, device=device).view(like.dtype)
        blocks, dtype = -(-hidden // 128), torch.float32
        if use_ue8m0:
            blocks, dtype = -(-blocks // 4), torch.int32
        # Column-major, as TMA would take them.
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
        """Puts rows into their slots; how many came [E, ranks], and the place of each [T, topk]."""
        (E, slots), size, device = self.sources.shape, link.exchange.size, x.device
        rank = torch.arange(size, dtype=torch.int32, device=device)
        rank = rank.repeat_interleave(torch.tensor(link.received, device=device))
        origin = torch.stack([token.flatten(), rank], 1).view(torch.float32)  # bits, to be moved
        how = {"num_assigned": link.assigned}
        x, scale, expert, count, rows = expert_dispatch(x, local, E, scale, **how)
        origin = expert_dispatch(origin, local, E, **how)[0].view(torch.int32)
        most = int(count.max())
        check_that(name, "topk_idx", most <= slots, "no expert twice in a row", f"{most} rows")
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
        place = torch.cat([place, place.new_full((1,), -1)])  # the last for "no row": -1
        return counts.view(E, size), place[rows.long()].int()


def packed_exponents(scale: Tensor) -> Tensor:
    """Powers of two fp32 [rows, blocks] -> int32 [rows, ceil(blocks / 4)] of four UE8M0 each."""
    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
    return F.pad(exponents, (0, -exponents.shape[1] % 4)).view(torch.int32)


def as_bytes(x: Tensor) -> Tensor:
    """FP8 as uint8, which torch indexes and joins; other dtypes as they are."""
    return x.view(torch.uint8) if x.dtype == FP8 else x
