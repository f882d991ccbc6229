"""The paged cache of the indexer's keys, in the public layout of DeepSeek-V3.2.

A cache is uint8 [blocks, page, 1, D + 4], but its last dimension is only a count: the bytes of a
page are first the keys of all its tokens, then their scales.

    bytes of a page                      contents
    0 ... page * D - 1                   D e4m3 values of token 0, then of token 1, ...
    page * D ... page * (D + 4) - 1      an fp32 scale of token 0, of token 1, ...

A token's D values share one scale. The flat slot `block * page + offset` names a token. Pages may
be strided, their bytes lie together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_that


def check_pages(op: str, cache: Tensor, D: int) -> None:
    """Raises ValueError unless `cache` has pages of tokens of D values, each page contiguous."""
    page, width = cache.shape[1], cache.shape[3]
    check_that(op, "cache", width == D + 4, f"last dimension {D + 4} ({D} values and a scale)",
               f"shape {tuple(cache.shape)}")  # fmt: skip
    check_that(op, "cache", cache.numel() == 0 or page == 1 or cache.stride(1) == width,
               "contiguous pages", f"strides {cache.stride()}")  # fmt: skip
    check_that(op, "cache", page * width < 2**31, "pages of fewer than 2**31 bytes",
               f"shape {tuple(cache.shape)}")  # fmt: skip


def page_parts(cache: Tensor, values_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of the values [blocks, page * D] and the scales: fp32 [blocks, page], or their bytes
    where they are not aligned."""
    blocks, page, _, width = cache.shape
    bytes_of = cache.as_strided((blocks, page * width), (cache.stride(0), 1))
    values, scales = bytes_of.split((page * (width - 4), page * 4), 1)
    if all(n % 4 == 0 for n in (cache.storage_offset(), cache.stride(0), page * (width - 4))):
        scales = scales.view(torch.float32)
    return values.view(values_dtype), scales
