"""The steps of `moe_forward` and its backward pass, on the rows of all experts.

Rows are sorted by expert without gaps, so rows without a token are the last ones. No step writes
them, and `multiply` skips them.

Parallelization of the two kernels: one program moves BLOCK values between [T, topk] and [rows].

Limit: launch latency. 12 bytes are moved per assignment.

Source: `moe_forward.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..arithmetic import cdiv
from ..matmul.m_grouped import choose_m_grouped_tile, launch_m_grouped_gemm
from ..quant.swiglu_cast import launch_swiglu_cast
from ..runtime.contract import FP8
from ..runtime.tiles import GemmTile
from .expert_dispatch import copy_to_rows
from .rows import place_rows

BLOCK = 1024  # assignments per program


class ExpertRows(NamedTuple):
    """The assignments of tokens to experts, as rows sorted by expert."""

    group_index: Tensor  # int32 [rows], the expert of each row, -1 for rows without a token
    handle: Tensor  # int32 [T, topk], the row of each assignment, -1 for none
    group_bounds: Tensor  # int32 [2, E], the row range of each expert, see `rows.place_rows`

    @classmethod
    def from_indices(cls, topk_idx: Tensor, E: int) -> ExpertRows:
        """The rows of topk_idx [T, topk]; its indices outside [0, E) have none."""
        shapes = (topk_idx.numel(),), topk_idx.shape, (2, E)
        rows = cls(*(topk_idx.new_empty(shape, dtype=torch.int32) for shape in shapes))
        tokens_per_expert = topk_idx.new_empty(E, dtype=torch.int32)
        place_rows(topk_idx, 1, rows.group_index, tokens_per_expert, rows.handle, rows.group_bounds)
        return rows

    def dispatch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Casts x real [T, K] to FP8 and copies it to rows: [rows, K] and its scales."""
        q, scale = self._new_fp8(x, x.shape[1])
        copy_to_rows(x, None, q, scale, self.group_index, self.handle, "fp32", clear=False)
        return q, scale

    def multiply(
        self, a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype
    ) -> Tensor:
        """a [rows, K] times b[e] [N, K] of each row's expert -> [rows, N]."""
        out = a.new_empty((len(a), b.shape[1]), dtype=dtype)
        tile = choose_gemm_tile(a, b, b_scale)
        launch_m_grouped_gemm(
            a, a_scale, b, b_scale, out, tile, self.group_index, self.group_bounds
        )
        return out

    def activate(self, gate_up: Tensor) -> tuple[Tensor, Tensor]:
        """gate_up [rows, 2I] -> silu(gate) * up in FP8 [rows, I] and its scales."""
        q, scale = self._new_fp8(gate_up, gate_up.shape[1] // 2)
        launch_swiglu_cast(gate_up, None, None, q, scale, group_index=self.group_index)
        return q, scale

    def scatter_to_rows(self, values: Tensor) -> Tensor:
        """values real [T, topk] -> fp32 [rows], each value at its assignment's row."""
        out = values.new_empty(len(self.group_index), dtype=torch.float32)
        moe_forward_backward_scatter_kernel[self._grid()](
            values, self.handle, out, self.handle.numel(), *values.shape[1:], values.stride(0),
            BLOCK=BLOCK,
        )  # fmt: skip
        return out

    def gather_from_rows(self, values: Tensor, out: Tensor, factor: float) -> None:
        """Writes factor * values fp32 [rows] to out fp32 [T, topk]; 0 where there is no row."""
        moe_forward_backward_gather_kernel[self._grid()](
            values, self.handle, out, self.handle.numel(), factor, BLOCK=BLOCK
        )

    def _grid(self) -> tuple[int]:
        return (cdiv(self.handle.numel(), BLOCK),)

    def _new_fp8(self, like: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        rows = len(self.group_index)
        q = like.new_empty((rows, columns), dtype=FP8)
        return q, like.new_empty((rows, -(-columns // 128)), dtype=torch.float32)


def choose_gemm_tile(a: Tensor, b: Tensor, b_scale: Tensor) -> GemmTile:
    """The GEMM tile for rows `a`, on the assumption that each expert of `b` has equally many."""
    return choose_m_grouped_tile(a, b, b_scale, -(-len(a) // len(b)))


@triton.jit(do_not_specialize=["count"])
def moe_forward_backward_scatter_kernel(
    values_ptr,  # real [T, topk]
    handle_ptr,  # int32 [T, topk], contiguous: the row of each assignment, -1 for none
    out_ptr,  # fp32 [rows], written
    count,  # T * topk
    topk,
    values_stride,  # elements between rows of values
    BLOCK: tl.constexpr,  # assignments per program
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(handle_ptr + i, mask=i < count, other=-1)
    values_tile = values_ptr + (i // topk).to(tl.int64) * values_stride + i % topk
    value = tl.load(values_tile, mask=row >= 0)
    tl.store(out_ptr + row, value.to(tl.float32), mask=row >= 0)


@triton.jit(do_not_specialize=["count"])
def moe_forward_backward_gather_kernel(
    values_ptr,  # fp32 [rows]
    handle_ptr,  # int32 [T, topk], contiguous: the row of each assignment, -1 for none
    out_ptr,  # fp32 [T, topk], contiguous, written
    count,  # T * topk
    factor,  # fp32
    BLOCK: tl.constexpr,  # assignments per program
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(handle_ptr + i, mask=i < count, other=-1)
    value = tl.load(values_ptr + row, mask=row >= 0, other=0.0)
    tl.store(out_ptr + i, value * factor, mask=i < count)
