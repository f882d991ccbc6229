"""DeepGEMM's FP8 GEMMs and attention logits, computed by deepkern.

    import deepkern.compat.deep_gemm as deep_gemm

Names, arguments, their order and defaults are those of DeepGEMM 2.6.1, csrc/apis/gemm.hpp
(https://github.com/deepseek-ai/DeepGEMM). Keywords and names of earlier releases are accepted too.
A name of DeepGEMM 2.8.0 that is missing here raises an AttributeError with the alternative; see
unsupported.py. In all functions

- `a` and `b` are (FP8 data, scale). Scales are fp32 with any strides, or int32 with four UE8M0
  exponents each, which are unpacked. Scales of `b` are per 128x128 or per 1x128, by their shape.
- `d` is bf16, fp16 or fp32, is written in place and may have any strides. deepkern's ops return a
  new tensor, which is copied into `d`: one more pass over it.
- `c` is added in fp32 before the one rounding. It may be `d` itself or have another dtype.
- Any shape is supported, 0 included; groups need no alignment.
- `recipe` is (1, 128, 128) or (1, 1, 128); `recipe_a` is (1, 128); `recipe_b` is (1, 128) or
  (128, 128).
- `compiled_dims` and `disable_ue8m0_cast` have no effect: one compiled kernel serves all M, and
  fp32 scales are used unchanged on every GPU.

TypeError and ValueError name the function and the argument. `a_scale` and `b_scale` in a message
are `a[1]` and `b[1]` as deepkern's op receives them: [rows, K/128].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import deepkern

from ..quant.fp8 import BLOCK
from ..runtime import arch
from ..runtime.contract import check_that
from . import deep_gemm_utils as utils
from .deep_gemm_attention import *  # noqa: F403
from .deep_gemm_operands import (
    Operand,
    check,
    check_recipe,
    concatenate_groups,
    group_of_rows,
    older_names,
    pair,
    rows_of_k,
)
from .deep_gemm_utils import *  # noqa: F403
from .deep_gemm_utils import ceil_div
from .unsupported import DEEP_GEMM, module_getattr

testing = utils  # calc_diff is in deep_gemm.testing
__getattr__ = module_getattr(__name__, DEEP_GEMM)


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
    """d = a @ b (+ c), with `a` transposed if layout[0] is "t" and `b` if layout[1] is "t"."""
    dims = ({"n": "[M, K]", "t": "[K, M]"}[layout[0]], {"n": "[K, N]", "t": "[N, K]"}[layout[1]])
    operands = rows_of_k(f"fp8_gemm_{layout}", a, b, dims, recipes,
                         d=(d, "real [M, N] strided"), c=(c, "real [M, N]"))  # fmt: skip
    d.copy_(deepkern.fp8_gemm_nt(*operands, d.dtype, c))


@older_names(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nt_contiguous(
    a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False, ensure_zero_padding: bool = True,
    expected_m_for_psum_layout: int | None = None,
) -> None:  # fmt: skip
    """d[m] = a[m] @ b[group of m].T: a [M, K], b [G, N, K], d [M, N].

    grouped_layout: int32 [M], the group of each row, ascending, -1 for none. With `use_psum_layout`
    int32 [G], the row after each group's last; a group then starts at the end of the previous one,
    rounded up to a multiple of `get_mk_alignment_for_contiguous_layout()`.
    Rows without a group become zeros. `ensure_zero_padding` and `expected_m_for_psum_layout` have
    no effect. DeepGEMM reads the group of every 128th row; deepkern reads that of each row.
    """
    multiply_rows("nt", a, b, d, grouped_layout, use_psum_layout, (recipe, recipe_a, recipe_b))


@older_names(m_indices="grouped_layout")
def m_grouped_fp8_gemm_nn_contiguous(
    a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor, recipe=None, recipe_a=None,
    recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
    use_psum_layout: bool = False, ensure_zero_padding: bool = True,
) -> None:  # fmt: skip
    """d[m] = a[m] @ b[group of m]: b [G, K, N] with scales [G, K/128, N/128]; else as above."""
    multiply_rows("nn", a, b, d, grouped_layout, use_psum_layout, (recipe, recipe_a, recipe_b))


def multiply_rows(
    layout: str, a: Operand, b: Operand, d: Tensor, grouped_layout: Tensor, psum: bool,
    recipes: tuple,
) -> None:  # fmt: skip
    """d[m] = a[m] @ b[group of m], with `b` transposed if layout[1] is "t"."""
    dims = ("[M, K]", {"n": "[G, K, N]", "t": "[G, N, K]"}[layout[1]])
    operands = rows_of_k(
        f"m_grouped_fp8_gemm_{layout}_contiguous", a, b, dims, recipes,
        d=(d, "real [M, N] strided"),
        grouped_layout=(grouped_layout, "int32 [G]" if psum else "int32 [M]"),
    )  # fmt: skip
    index = group_of_rows(grouped_layout, d.shape[0]) if psum else grouped_layout
    d.copy_(deepkern.m_grouped_fp8_gemm_nt_contiguous(*operands, index, d.dtype))


def m_grouped_fp8_gemm_nt_masked(
    a: Operand, b: Operand, d: Tensor, masked_m: Tensor, expected_m: int, recipe=None,
    recipe_a=None, recipe_b=None, compiled_dims: str = "nk", disable_ue8m0_cast: bool = False,
) -> None:  # fmt: skip
    """d[g, :masked_m[g]] = a[g, :masked_m[g]] @ b[g].T: a [G, M, K], b [G, N, K], d [G, M, N].

    masked_m: int32 [G]. Rows of `d` from masked_m[g] on become zeros. `expected_m`: the typical
    masked_m, a hint for the choice of the tile.
    """
    operands = rows_of_k(
        "m_grouped_fp8_gemm_nt_masked", a, b, ("[G, M, K]", "[G, N, K]"),
        (recipe, recipe_a, recipe_b), d=(d, "real [G, M, N] strided"),
        masked_m=(masked_m, "int32 [G]"),
    )  # fmt: skip
    d.copy_(deepkern.m_grouped_fp8_gemm_nt_masked(*operands, masked_m, d.dtype, expected_m))


@older_names(ks="ks_cpu", ks_tensor="grouped_layout")
def k_grouped_fp8_gemm_tn_contiguous(
    a: Operand, b: Operand, d: Tensor, ks_cpu: Sequence[int], grouped_layout: Tensor,
    c: Tensor | None = None, recipe=(1, 1, 128), compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:  # fmt: skip
    """d[g] = a[rows of g].T @ b[rows of g] (+ c[g]): a [K, M], b [K, N], c and d fp32 [G, M, N].

    ks_cpu: the number of rows of each group, on the host; grouped_layout: the same, int32 [G] on
    the device. Any length is supported, 0 included; groups that do not start at a multiple of 16
    are read slowly. Scales are fp32 [S, M] and [S, N], one per 128x1, and blocks restart at each
    group: S is at least the sum of ceil(k / 128). Nothing is read back from the device.
    """
    multiply_columns("tn", a, b, d, ks_cpu, grouped_layout, c, recipe, use_psum_layout)


@older_names(ks="ks_cpu", ks_tensor="grouped_layout")
def k_grouped_fp8_gemm_nt_contiguous(
    a: Operand, b: Operand, d: Tensor, ks_cpu: Sequence[int], grouped_layout: Tensor,
    c: Tensor | None = None, recipe=(1, 1, 128), compiled_dims: str = "mn",
    use_psum_layout: bool = False,
) -> None:  # fmt: skip
    """As above, but `a` is the concatenation of contiguous matrices [M, k], and `b` of [N, k].

    Scales are fp32 [M, S] and [N, S]. The matrices are copied to [M, K] and [N, K] first.
    """
    multiply_columns("nt", a, b, d, ks_cpu, grouped_layout, c, recipe, use_psum_layout)


def multiply_columns(
    layout: str, a: Operand, b: Operand, d: Tensor, ks: Sequence[int], lengths: Tensor,
    c: Tensor | None, recipe: Sequence[int], psum: bool,
) -> None:  # fmt: skip
    """d[g] = product over group g of K: layout "tn" is [K, rows], "nt" one matrix per group."""
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
            data = concatenate_groups(data, rows, ks)
        expected, blocks = f"{S} along K for ks_cpu = {list(ks)}", scale.shape[1]
        check_that(function, f"{name}[1]", blocks >= S, expected, blocks)
        operands += [data, scale]
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    d.copy_(deepkern.k_grouped_fp8_gemm_nt(*operands, offsets, c))


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
    """Stored, without effect: the GEMMs use the whole GPU."""
    _settings["num_sms"] = new_num_sms


def get_num_sms() -> int:
    """The number set, or the GPU's number of SMs (that of an H200 without a GPU)."""
    if not torch.cuda.is_available():
        return _settings["num_sms"] or arch.of(torch.device("cpu")).num_sms
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    return _settings["num_sms"] or gpu.multi_processor_count


def set_tc_util(new_tc_util: int) -> None:
    """Stored, without effect."""
    _settings["tc_util"] = new_tc_util


def get_tc_util() -> int:
    """The value set, or 100."""
    return _settings["tc_util"] or 100


def set_pdl(new_enable_pdl: bool) -> None:
    """Stored, without effect."""
    _settings["pdl"] = new_enable_pdl


def get_pdl() -> bool:
    """The value set, or False."""
    return _settings["pdl"]


def use_deterministic_algorithms(enabled: bool) -> None:
    """Accepted, without effect: deepkern's ops are always deterministic and batch-invariant."""
