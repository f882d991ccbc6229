"""The paged cache of the indexer's keys, in the public layout of DeepSeek-V3.2.

A cache is uint8 [num_pages, page_size, 1, D + 4]. The last two dimensions do not describe the
layout: the bytes of a page are first the keys of all its tokens, then their scales.

    bytes of a page                                contents
    0 ... page_size * D - 1                        D e4m3 values of token 0, then of token 1, ...
    page_size * D ... page_size * (D + 4) - 1      fp32 scale of token 0, of token 1, ...

The D values of a token have one scale. Token `offset` of page `page` has the flat slot
`page * page_size + offset`. Pages may be strided; the bytes of a page are contiguous.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..runtime.contract import check_that


def check_pages(op: str, cache: Tensor, D: int) -> None:
    """Raises ValueError unless `cache` has contiguous pages of tokens of D values."""
    page_size, width = cache.shape[1], cache.shape[3]
    check_that(op, "cache", width == D + 4, f"last dimension {D + 4} ({D} values and a scale)",
               f"shape {tuple(cache.shape)}")  # fmt: skip
    check_that(op, "cache", cache.numel() == 0 or page_size == 1 or cache.stride(1) == width,
               "contiguous pages", f"strides {cache.stride()}")  # fmt: skip
    check_that(op, "cache", page_size * width < 2**31, "pages of fewer than 2**31 bytes",
               f"shape {tuple(cache.shape)}")  # fmt: skip


def page_views(cache: Tensor, values_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Views of a cache: values [num_pages, page_size * D] and scales fp32 [num_pages, page_size].

    Scales that are not aligned to 4 bytes are returned as bytes [num_pages, page_size * 4].
    """
    num_pages, page_size, _, width = cache.shape
    page_bytes = cache.as_strided((num_pages, page_size * width), (cache.stride(0), 1))
    values, scales = page_bytes.split((page_size * (width - 4), page_size * 4), 1)
    if all(n % 4 == 0 for n in (cache.storage_offset(), cache.stride(0), page_size * (width - 4))):
        scales = scales.view(torch.float32)
    return values.view(values_dtype), scales
