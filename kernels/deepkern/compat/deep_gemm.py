"""DeepGEMM's FP8 products and attention logits under DeepGEMM's names, computed by deepkern.

    import deepkern.compat.deep_gemm as deep_gemm

Names, arguments, their order and defaults are those of DeepGEMM 2.6.1, csrc/apis/gemm.hpp
(https://github.com/deepseek-ai/DeepGEMM); keywords and names of earlier releases are taken too.
In all functions

- `a` and `b` are (FP8 data, scale). Scales are fp32 with any strides, or int32 with four UE8M0
  exponents each, which are unpacked. b's are per 128x128 or per 1x128; their shape says which.
- `d` is bf16, fp16 or fp32, is written in place and may have any strides. deepkern's ops return a
  new tensor, which is copied into `d`: one more pass over it.
- `c` is added in fp32 before the one rounding. It may be `d`, and of another dtype than `d`.
- Any shape will do, 0 included; groups need no alignment.
- `recipe` is (1, 128, 128) or (1, 1, 128); `recipe_a` (1, 128), `recipe_b` that or (128, 128).
- `compiled_dims` and `disable_ue8m0_cast` have no effect: one compiled kernel serves all M, and
  fp32 scales are used as they are on every GPU.

TypeError and ValueError name the function and the argument; where they speak of `a_scale` and
`b_scale`, those are `a[1]` and `b[1]` as deepkern's op gets them, rows of K.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import matmul
from ..quant.fp8 import BLOCK
from ..runtime import arch
from ..runtime.contract import check_that
from . import deep_gemm_utils as utils
from .deep_gemm_attention import *  # noqa: F403
from .deep_gemm_operands import (
    Operand,
    check,
    check_recipe,
    group_of_rows,
    older_names,
    pair,
    rows_of_k,
    side_by_side,
)
from .deep_gemm_utils import *  # noqa: F403
from .deep_gemm_utils import ceil_div

testing = utils  # DeepGEMM keeps calc_diff there


def fp8_gemm_nt(
    a: Operand, b: Operand, d: Tensor, c: Tensor | None = None, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    """d = a @ b.T (+ c): a [M, K], b [N, K], c and d [M, N]."""
    multiply("nt", a, b, d, c, (recipe, recipe_a, recipe_b))


def fp8_gemm_nn(
    a: Operand, b: Operand, d: Tensor, c: Tensor | None = None, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    """d = a @ b (+ c): b [K, N] with scales [K/128, N/128] or [K/128, N]."""
    multiply("nn", a, b, d, c, (recipe, recipe_a, recipe_b))


def fp8_gemm_tn(
    a: Operand, b: Operand, d: Tensor, c: Tensor | None = None, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "mn", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    """d = a.T @ b (+ c): a [K, M] with scales [K/128, M], b as for `fp8_gemm_nn`."""
    multiply("tn", a, b, d, c, (recipe, recipe_a, recipe_b))


def fp8_gemm_tt(
    a: Operand, b: Operand, d: Tensor, c: Tensor | None = None, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "mn", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    """d = a.T @ b.T (+ c): a as for `fp8_gemm_tn`, b [N, K]."""
    multiply("tt", a, b, d, c, (recipe, recipe_a, recipe_b))


def multiply(
    layout: str, a: Operand, b: Operand, d: Tensor, c: Tensor | None, recipes: tuple
) -> None:
    """The product of two matrices that lie as `layout` says."""
    dims = ({"n": "[M, K]", "t": "[K, M]"}[layout[0]], {"n": "[K, N]", "t": "[N, K]"}[layout[1]])
    operands = rows_of_k(f"fp8_gemm_{layout}", a, b, dims, recipes,
                         d=(d, "real [M, N] strided"), c=(c, "real [M, N]"))  # fmt: skip
    d.copy_(matmul.fp8_gemm_nt(*operands, d.dtype, c))


@older_names(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nt_contiguous(
    a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False, ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:  # fmt: skip
    """d[m] = a[m] @ b[group of m].T: a [M, K], b [G, N, K], d [M, N].

    grouped_layout: int32 [M], the group of each row, ascending, -1 for none. With `use_psum_layout`
    int32 [G], the row after each group's last; a group then begins where the one before ends,
    rounded up to a multiple of `get_mk_alignment_for_contiguous_layout()`.
    Rows of no group become zeros, so `ensure_zero_padding` has no effect, nor has
    `expected_m_for_psum_layout`. DeepGEMM goes by the first of 128 rows; here each counts for
    itself.
    """
    multiply_rows("nt", a, b, d, grouped_layout, use_psum_layout, (recipe, recipe_a, recipe_b))


@older_names(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nn_contiguous(
    a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False, ensure_zero_padding: bool = True,
) -> None:  # fmt: skip
    """d[m] = a[m] @ b[group of m]: b [G, K, N], its scale turned alike; the rest as above."""
    multiply_rows("nn", a, b, d, grouped_layout, use_psum_layout, (recipe, recipe_a, recipe_b))


def multiply_rows(
    layout: str, a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor, psum: bool,
    recipes: tuple,
) -> None:  # fmt: skip
    """The products of groups of rows, with matrices that lie as `layout` says."""
    dims = ("[M, K]", {"n": "[G, K, N]", "t": "[G, N, K]"}[layout[1]])
    operands = rows_of_k(
        f"m_grouped_fp8_gemm_{layout}_contiguous", a, b, dims, recipes,
        d=(d, "real [M, N] strided"),
        grouped_layout=(grouped_layout, "int32 [G]" if psum else "int32 [M]"),
    )  # fmt: skip
    index = group_of_rows(grouped_layout, d.shape[0]) if psum else grouped_layout
    d.copy_(matmul.m_grouped_fp8_gemm_nt_contiguous(*operands, index, d.dtype))


def m_grouped_fp8_gemm_nt_masked(
    a: Operand, b: Operand, d: Tensor, masked_m: Tensor, expected_m: int, recipe=None,
    recipe_a=None, recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    """d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T: a [G, M, K], b [G, N, K], d [G, M, N].

    masked_m: int32 [G]. Rows of `d` from masked_m[g] on become zeros. `expected_m` steers speed.
    """
    operands = rows_of_k(
        "m_grouped_fp8_gemm_nt_masked", a, b, ("[G, M, K]", "[G, N, K]"),
        (recipe, recipe_a, recipe_b), d=(d, "real [G, M, N] strided"),
        masked_m=(masked_m, "int32 [G]"),
    )  # fmt: skip
    d.copy_(matmul.m_grouped_fp8_gemm_nt_masked(*operands, masked_m, d.dtype, expected_m))


@older_names(ks="ks_cpu", ks_tensor="grouped_layout")
def k_grouped_fp8_gemm_tn_contiguous(
    a: Operand, b: Operand, d: Tensor, ks_cpu: Sequence[int], grouped_layout: Tensor,
    c: Tensor | None = None, recipe=(1, 1, 128), compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:  # fmt: skip
    """d[g] = a[rows of g].T @ b[rows of g] (+ c[g]): a [K, M], b [K, N], c and d fp32 [G, M, N].

    ks_cpu: the number of rows of each group, on the host; grouped_layout: the same, int32 [G] on
    the device. Any length will do, 0 included; groups that begin at no multiple of 16 are read
    slowly. Scales are fp32 [S, M] and [S, N], one per 128x1, and each group begins with a new one:
    S is the sum of ceil(k / 128), or more. Nothing is read back from the device.
    """
    multiply_columns("tn", a, b, d, ks_cpu, grouped_layout, c, recipe, use_psum_layout)


@older_names(ks="ks_cpu", ks_tensor="grouped_layout")
def k_grouped_fp8_gemm_nt_contiguous(
    a: Operand, b: Operand, d: Tensor, ks_cpu: Sequence[int], grouped_layout: Tensor,
    c: Tensor | None = None, recipe=(1, 1, 128), compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:  # fmt: skip
    """As above, but `a` holds, one group after the other, contiguous matrices [M, k], `b` [N, k].

    Scales are fp32 [M, S] and [N, S]. The matrices are copied side by side first.
    """
    multiply_columns("nt", a, b, d, ks_cpu, grouped_layout, c, recipe, use_psum_layout)


def multiply_columns(
    layout: str, a: Operand, b: Operand, d: Tensor, ks: Sequence[int], lengths: Tensor,
    c: Tensor | None, recipe: Sequence[int], psum: bool,
) -> None:  # fmt: skip
    """The products of groups of K: rows as they lie ("tn"), or matrix after matrix ("nt")."""
    function = f"k_grouped_fp8_gemm_{layout}_contiguous"
    check_that(function, "use_psum_layout", not psum, "False", psum)
    check_recipe(function, "recipe", recipe, ((1, 1, BLOCK),))
    pairs = pair(function, "a", a), pair(function, "b", b)
    rules = {"d": (d, "fp32 [G, M, N] strided"), "c": (c, "fp32 [G, M, N]"),
             "grouped_layout": (lengths, "int32 [G]")}  # fmt: skip
    for name, rows, (data, scale) in zip("ab", "MN", pairs, strict=True):
        if layout == "tn":
            rules[f"{name}[0]"] = (data, f"fp8 [K, {rows}] strided")
            rules[f"{name}[1]"] = (scale, f"fp32 [S, {rows}] strided")
        else:
            rules[f"{name}[0]"] = (data.flatten(), "fp8 [_]")
            rules[f"{name}[1]"] = (scale, f"fp32 [{rows}, S] strided")
    check(function, rules)
    check_that(function, "ks_cpu", ks is not None, "the length of each group", ks)
    G, K, S = d.shape[0], sum(ks), sum(ceil_div(k, BLOCK) for k in ks)
    check_that(function, "ks_cpu", len(ks) == G, f"{G} lengths", ks)
    operands = []
    for name, rows, (data, scale) in zip("ab", d.shape[1:], pairs, strict=True):
        expected, got = f"{K} x {rows} values for ks_cpu = {list(ks)}", tuple(data.shape)
        check_that(function, f"{name}[0]", data.numel() == K * rows, expected, f"shape {got}")
        if layout == "tn":
            data, scale = data.mT, scale.mT
        else:
            data = side_by_side(data, rows, ks)
        expected, blocks = f"{S} along K for ks_cpu = {list(ks)}", scale.shape[1]
        check_that(function, f"{name}[1]", blocks >= S, expected, blocks)
        operands += [data, scale]
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    d.copy_(matmul.k_grouped_fp8_gemm_nt(*operands, offsets, c))


# Names of earlier releases.
fp8_m_grouped_gemm_nt_masked = m_grouped_fp8_gemm_nt_masked


def gemm_fp8_fp8_bf16_nt(lhs: Operand, rhs: Operand, out: Tensor) -> None:
    """`fp8_gemm_nt`."""
    fp8_gemm_nt(lhs, rhs, out)


def m_grouped_gemm_fp8_fp8_bf16_nt_contiguous(
    lhs: Operand, rhs: Operand, out: Tensor, m_indices: Tensor
) -> None:
    """`m_grouped_fp8_gemm_nt_contiguous`."""
    m_grouped_fp8_gemm_nt_contiguous(lhs, rhs, out, m_indices)


def m_grouped_gemm_fp8_fp8_bf16_nt_masked(
    lhs: Operand, rhs: Operand, out: Tensor, masked_m: Tensor, expected_m: int
) -> None:
    """`m_grouped_fp8_gemm_nt_masked`."""
    m_grouped_fp8_gemm_nt_masked(lhs, rhs, out, masked_m, expected_m)


_settings = {"num_sms": 0, "tc_util": 0, "pdl": False}


def set_num_sms(new_num_sms: int) -> None:
    """Remembered, without effect: the products use all of the GPU."""
    _settings["num_sms"] = new_num_sms


def get_num_sms() -> int:
    """What was set, or the GPU's number of multiprocessors; an H200's where there is no GPU."""
    if not torch.cuda.is_available():
        return _settings["num_sms"] or arch.of(torch.device("cpu")).units
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return _settings["num_sms"] or gpu.multi_processor_count


def set_tc_util(new_tc_util: int) -> None:
    """Remembered, without effect."""
    _settings["tc_util"] = new_tc_util


def get_tc_util() -> int:
    """What was set, or 100."""
    return _settings["tc_util"] or 100


def set_pdl(new_enable_pdl: bool) -> None:
    """Remembered, without effect."""
    _settings["pdl"] = new_enable_pdl


def get_pdl() -> bool:
    """What was set, or False."""
    return _settings["pdl"]


# What DeepGEMM has and deepkern has not, by a part of the name; the first that fits counts.
MISSING = {
    "mega_moe": "expert layer that spans GPUs in one kernel",
    "fp4": "FP4 data",
    "bf16": "product of bf16 matrices; torch.matmul computes them",
    "cublaslt": "cuBLASLt; torch.matmul calls it",
    "einsum": "einsum",
    "hc_prenorm": "product for hyper-connections",
    "skip_head_mid": "product that leaves a gap in each head",
    "k_grouped_mn_major": "packed scales for groups of K; k_grouped_fp8_gemm_* take fp32 ones",
    "wgrad": "product of this name; fp8_gemm_nt and k_grouped_fp8_gemm_nt_contiguous add to c",
    "set_": "such setting",
}


def __getattr__(name: str):
    for part, what in MISSING.items():
        if part in name:
            raise AttributeError(f"{__name__}.{name}: deepkern has no {what}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
