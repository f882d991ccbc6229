"""DeepGEMM's utilities: casts, layouts of scales, alignment, error measure.

`deepkern.compat.deep_gemm` exports these names, also as `utils` and `testing`. deepkern's kernels
take fp32 scales with any strides and groups of any length, so they need none of these layouts; the
functions exist for code that calls them. Names, arguments and defaults are those of DeepGEMM 2.6.1
(https://github.com/deepseek-ai/DeepGEMM, csrc/apis/layout.hpp and deep_gemm/utils).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import deepkern

from ..quant.fp8 import BLOCK
from ..reference.quant import block_scale, row_major, to_e4m3
from ..runtime.contract import Contract, check_choice, check_that

__all__ = [
    "align",
    "calc_diff",
    "ceil_div",
    "get_col_major_tma_aligned_tensor",
    "get_k_alignment_for_contiguous_layout",
    "get_m_alignment_for_contiguous_layout",
    "get_mk_alignment_for_contiguous_layout",
    "get_mn_major_tma_aligned_packed_ue8m0_tensor",
    "get_mn_major_tma_aligned_tensor",
    "get_theoretical_mk_alignment_for_contiguous_layout",
    "get_tma_aligned_size",
    "per_block_cast_to_fp8",
    "per_channel_cast_to_fp8",
    "per_custom_dims_cast_to_fp8",
    "per_token_cast_to_fp8",
    "set_mk_alignment_for_contiguous_layout",
    "transform_sf_into_required_layout",
]


def ceil_div(x: int, y: int) -> int:
    """x / y, rounded up."""
    return -(-x // y)


def align(x: int, y: int) -> int:
    """x, rounded up to a multiple of y."""
    return ceil_div(x, y) * y


def calc_diff(x: Tensor, y: Tensor) -> Tensor:
    """1 - 2Σxy / Σ(x² + y²) in float64, as a 0-d tensor; 0 if x and y are all 0."""
    x, y = x.double(), y.double()
    squares = (x * x + y * y).sum()
    return (x - y).square().sum() / squares.clamp(min=torch.finfo(torch.float64).tiny)


def per_token_cast_to_fp8(
    x: Tensor, use_ue8m0: bool, gran_k: int = 128, use_packed_ue8m0: bool = False
) -> tuple[Tensor, Tensor]:
    """x [m, n] as FP8, and one scale per 1x128: `deepkern.cast_per_token`.

    The scale is fp32 [m, n/128], or with `use_packed_ue8m0` int32 [m, n/512].
    """
    check_choice("per_token_cast_to_fp8", "gran_k", gran_k, (BLOCK,))
    if use_packed_ue8m0:
        check_choice("per_token_cast_to_fp8", "use_ue8m0", use_ue8m0, (True,))
    q, scale = deepkern.cast_per_token(x.contiguous(), _scale_format(use_ue8m0))
    return q, _pack(scale) if use_packed_ue8m0 else scale


def per_channel_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """x [m, n] as FP8, and one scale per 128x1, fp32 [m/128, n]: `deepkern.cast_per_channel`."""
    check_choice("per_channel_cast_to_fp8", "gran_k", gran_k, (BLOCK,))
    return deepkern.cast_per_channel(x.contiguous(), _scale_format(use_ue8m0))


def per_block_cast_to_fp8(x: Tensor, use_ue8m0: bool, gran_k: int = 128) -> tuple[Tensor, Tensor]:
    """x [m, n] as FP8, one scale per 128x128, fp32 [m/128, n/128]: `deepkern.cast_per_block`."""
    check_choice("per_block_cast_to_fp8", "gran_k", gran_k, (BLOCK,))
    return deepkern.cast_per_block(x.contiguous(), _scale_format(use_ue8m0))


def per_custom_dims_cast_to_fp8(
    x: Tensor, dims: Sequence[int], use_ue8m0: bool
) -> tuple[Tensor, Tensor]:
    """x as FP8, and one scale per index of `dims`, over all other dimensions; in plain PyTorch."""
    kept = {dim % x.dim() for dim in dims}
    reduced = [dim for dim in range(x.dim()) if dim not in kept]
    amax = x.float().abs()
    scale = block_scale(amax.amax(reduced, True) if reduced else amax, _scale_format(use_ue8m0))
    return to_e4m3(x.float() * (1 / scale)), scale.squeeze()


def get_tma_aligned_size(x: int, element_size: int) -> int:
    """The number of elements x, rounded up so that x * element_size is a multiple of 16 bytes."""
    return align(x, 16 // element_size)


def get_mn_major_tma_aligned_tensor(sf: Tensor) -> Tensor:
    """`sf` [..., mn, k/128] with strides (..., 1, mn rounded up to a multiple of 4).

    Returns `sf` itself if it has these strides. The padding is zero.
    """
    expected, got = "rank 2 or 3", f"rank {sf.dim()}"
    check_that("get_mn_major_tma_aligned_tensor", "sf", sf.dim() in (2, 3), expected, got)
    mn, blocks = sf.shape[-2:]
    pitch = get_tma_aligned_size(mn, sf.element_size())
    wanted = (pitch * blocks, 1, pitch)[-sf.dim() :]
    if sf.stride() == wanted:
        return sf
    return row_major(F.pad(sf.mT, (0, pitch - mn))).mT[..., :mn, :]


def get_mn_major_tma_aligned_packed_ue8m0_tensor(
    sf: Tensor, psum_layout: Tensor | None = None
) -> Tensor:
    """Scales [..., mn, k/128] as int32 [..., mn, k/512], four exponents each, mn-major.

    A scale is rounded down to a power of two. `psum_layout` has no effect.
    """
    return get_mn_major_tma_aligned_tensor(_pack(sf))


def transform_sf_into_required_layout(
    sf: Tensor,
    mn: int,
    k: int,
    recipe: Sequence[int],
    num_groups: int | None = None,
    is_sfa: bool | None = None,
    disable_ue8m0_cast: bool = False,
    psum_layout: Tensor | None = None,
) -> Tensor:
    """Check a scale's shape; return scales per 1x128 mn-major and those per 128x128 unchanged.

    Args:
        sf: fp32 [mn/rows, k/128]; or int32 [mn, k/512] with four UE8M0 exponents each, which are
            unpacked. With `num_groups`, a leading dimension of that size.
        mn, k: the shape of the operand.
        recipe: (rows of a per scale, rows of b per scale, 128), where `is_sfa` selects a or b, or
            (rows per scale, 128); rows per scale are 1 or 128.
        disable_ue8m0_cast, psum_layout: have no effect. fp32 scales stay fp32 on every GPU.

    Raises:
        TypeError, ValueError: an argument has another type, shape or value.
    """
    name, recipe = "transform_sf_into_required_layout", tuple(recipe)
    check_choice(name, "recipe", recipe, ((1, 128, 128), (1, 1, 128), (1, 128), (128, 128)))
    rows = recipe[0] if is_sfa or len(recipe) == 2 else recipe[1]
    dims = "[_, _]" if num_groups is None else "[G, _, _]"
    Contract(name, sf=f"fp32|int32 {dims} strided").check({"sf": sf})
    sf = unpack(name, "sf", sf, k)
    expected = (ceil_div(mn, rows), ceil_div(k, BLOCK))
    expected = expected if num_groups is None else (num_groups, *expected)
    check_that(name, "sf", sf.shape == expected, f"shape {expected}", f"{tuple(sf.shape)}")
    return get_mn_major_tma_aligned_tensor(sf) if rows == 1 else sf


def unpack(function: str, argument: str, scale: Tensor, k: int) -> Tensor:
    """The fp32 scales of an operand with k columns: int32 scales are unpacked, others returned."""
    if scale.dtype != torch.int32:
        return scale
    blocks, fours = ceil_div(k, BLOCK), scale.shape[-1]
    expected, got = ceil_div(blocks, 4), f"shape {tuple(scale.shape)}"
    check_that(function, argument, fours == expected, f"[..., {expected}] for {k} columns", got)
    return row_major(scale).view(torch.float8_e8m0fnu)[..., :blocks].float()


def _pack(scale: Tensor) -> Tensor:
    """fp32 [..., K/128] -> int32 [..., K/512] of four exponents, the first in the low byte."""
    *lead, blocks = scale.shape
    exponents = F.pad((scale.view(torch.int32) >> 23).to(torch.uint8), (0, -blocks % 4))
    return exponents.flatten().view(torch.int32).view(*lead, ceil_div(blocks, 4))


def _scale_format(use_ue8m0: bool) -> str:
    return "ue8m0" if use_ue8m0 else "fp32"


_alignment = 128  # rows; multiple at which callers start each group


def get_mk_alignment_for_contiguous_layout() -> int:
    """The multiple to which callers pad each group: 128, or the value set last.

    deepkern's GEMMs need no alignment; 128 is for callers that rely on it. Set 1 to save the
    padding, or 16, which keeps groups of K fast to read.
    """
    return _alignment


def set_mk_alignment_for_contiguous_layout(new_value: int) -> None:
    """Set the alignment of groups, which `use_psum_layout` applies to the start of each group."""
    global _alignment
    expected = "at least 1"
    check_that("set_mk_alignment_for_contiguous_layout", "new_value", new_value >= 1, expected,
               new_value)  # fmt: skip
    _alignment = new_value


def get_theoretical_mk_alignment_for_contiguous_layout(expected_m: int | None = None) -> int:
    """32, the smallest that DeepGEMM returns; `expected_m` has no effect."""
    return 32


# Names of other releases.
get_m_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_k_alignment_for_contiguous_layout = get_mk_alignment_for_contiguous_layout
get_col_major_tma_aligned_tensor = get_mn_major_tma_aligned_tensor
