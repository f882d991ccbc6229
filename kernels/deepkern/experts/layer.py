"""The steps of the expert layer, on the rows of all experts.

Rows are sorted by expert without gaps, so those of no token are the last ones. No step touches
these, and `multiply` spends no arithmetic on them either.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..matmul.m_grouped import choose_m_grouped_tile, launch_m_grouped_gemm
from ..quant.swiglu_cast import launch_swiglu_cast as write
from ..runtime.contract import FP8
from ..runtime.tiles import GemmTile
from .expert_dispatch import copy
from .placement import place


class Rows(NamedTuple):
    """The rows of all experts, in order, as the steps of the layer take them."""

    group_index: Tensor  # int32 [rows], the expert of each; -1 for those at the end, of no token
    handle: Tensor  # int32 [T, topk], the row of each assignment
    extent: Tensor  # int32 [2, E], where each expert's rows lie

    @classmethod
    def of(cls, topk_idx: Tensor, E: int) -> Rows:
        empty = (topk_idx.new_empty(shape, dtype=torch.int32)
                 for shape in ((topk_idx.numel(),), topk_idx.shape, (2, E)))  # fmt: skip
        rows = cls(*empty)
        place(topk_idx, 1, rows.group_index, topk_idx.new_empty(E, dtype=torch.int32),
              rows.handle, rows.extent)  # fmt: skip
        return rows

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x real [T, K] -> FP8 [rows, K] and its scales."""
        q, scale = self.new_fp8(x, x.shape[1])
        copy(x, None, q, scale, self.group_index, self.handle, "fp32", clear=False)
        return q, scale

    def multiply(
        self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """a [rows, K] times each row's b [N, K] -> [rows, N]; what is in no group stays as is."""
        out = a.new_empty((len(a), b.shape[1]), dtype=dtype)
        t = tile_of_rows(a, b, b_scale)
        launch_m_grouped_gemm(a, a_scale, b, b_scale, out, t, self.group_index, self.extent)
        return out

    def activate(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """gate_up [rows, 2I] -> silu(gate) * up in FP8 [rows, I] and its scales."""
        q, scale = self.new_fp8(gate_up, gate_up.shape[1] // 2)
        write(gate_up, None, None, q, scale, group_index=self.group_index)
        return q, scale

    def spread(self, values: Tensor) -> Tensor:
        """values real [T, topk], each in its row: fp32 [rows]."""
        out = values.new_empty(len(self.group_index), dtype=torch.float32)
        spread_kernel[self._grid()](
            values, self.handle, out, self.handle.numel(), *values.shape[1:], values.stride(0),
            BLOCK=1024,
        )  # fmt: skip
        return out

    def collect(self, values: Tensor, out: Tensor, factor: float) -> None:
        """factor * values fp32 [rows], to each assignment its row's: out fp32 [T, topk]."""
        collect_kernel[self._grid()](
            values, self.handle, out, self.handle.numel(), factor, BLOCK=1024
        )  # fmt: skip

    def _grid(self) -> tuple[int]:
        return (cdiv(self.handle.numel(), 1024),)

    def new_fp8(self, like: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        rows = len(self.group_index)
        q = like.new_empty((rows, columns), dtype=FP8)
        return q, like.new_empty((rows, -(-columns // 128)), dtype=torch.float32)


def tile_of_rows(a: Tensor, b: Tensor, b_scale: Tensor) -> GemmTile:
    """The tile for rows `a` that are spread evenly over the experts `b`."""
    return choose_m_grouped_tile(a, b, b_scale, -(-len(a) // len(b)))


@triton.jit(do_not_specialize=["count"])
def spread_kernel(values_ptr, handle_ptr, out_ptr, count, topk, values_row, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(handle_ptr + i, mask=i < count, other=-1)
    value = tl.load(values_ptr + (i // topk).to(tl.int64) * values_row + i % topk, mask=row >= 0)
    tl.store(out_ptr + row, value.to(tl.float32), mask=row >= 0)


@triton.jit(do_not_specialize=["count"])
def collect_kernel(values_ptr, handle_ptr, out_ptr, count, factor, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(handle_ptr + i, mask=i < count, other=-1)
    value = tl.load(values_ptr + row, mask=row >= 0, other=0.0)
    tl.store(out_ptr + i, value * factor, mask=i < count)
