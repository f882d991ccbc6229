"""The MoE layer in one op: dispatch, FP8 gate/up GEMM, SwiGLU, FP8 down GEMM, weighted combine.

    a[row], a_scale = cast_per_token(x[t])                              row = handle[t, j]
    gate_up[row]    = a[row] · w13[e]ᵀ                                  e = topk_idx[t, j]
    h[row], h_scale = cast_per_token(silu(gate) * up)
    out[t]          = Σ_j topk_weights[t, j] · (h[row] · w2[e]ᵀ)

The weights are applied last, in fp32: applied earlier, they would be rounded in the cast of h.
gate_up and the outputs of the down GEMM are rounded to the dtype of x. All sums are in fp32.

Parallelization: eight launches, none of which waits for the host. `expert_dispatch_count_kernel`,
`expert_dispatch_scan_kernel` and `expert_dispatch_place_kernel` sort the assignments and find each
expert's row range (`rows.py`). `expert_dispatch_copy_kernel` casts each token once and writes its
rows. Then follow `m_grouped_fp8_gemm_nt_kernel`, `swiglu_cast_kernel`, again the GEMM, and
`expert_combine_kernel`, which sums in the order of the slots. The GEMMs loop over the tiles of each
expert's rows (`matmul/m_grouped.py`), so experts without rows and rows without an expert cost
nothing. With few rows per expert, as in decoding, tiles are narrow and B is the left operand; with
many rows they are wide. The choice depends on shapes alone, and all tiles give a row the same bits
(`runtime/tiles.py`). With gradients the layer runs op by op, to save gate_up.

Limit: in decoding, reading the weights of the experts that have rows; in large batches, the tensor
cores.

Backward: the same steps in reverse, with gradients cast to FP8 as in `fp8_linear`, scaled by 2^48
(reason there). The row's weight is applied to the gradient after w2; the weight's own gradient is
<gradient · w2, h>. So neither h · w2ᵀ nor h is saved, only gate_up, in FP8.

    g[row]       = grad[t] · w2[e]                                      without the weight
    grad_weights = <g[row], silu(gate) * up>
    grad_x[t]    = Σ_j (weight · swiglu'(gate_up; g))[row] · w13[e]

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3; the gradient of a weight
without its expert's output is SonicMoE's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..matmul.block_scaled_gemm import check_b_scale
from ..matmul.fp8_linear import GRAD_SCALE
from ..matmul.m_grouped_fp8_gemm_nt_contiguous import m_grouped_fp8_gemm_nt_contiguous
from ..quant.cast_per_token import cast_per_token
from ..quant.swiglu_cast import launch_swiglu_cast_backward, swiglu_cast
from ..runtime.contract import check_that
from ..runtime.op import op
from .checks import check_assignments, check_indices
from .expert_combine import expert_combine, sum_rows
from .expert_dispatch import expert_dispatch
from .layer import ExpertRows, choose_gemm_tile

WEIGHTS = {
    "w13": "fp8 [E, J, K] strided",
    "w13_scale": "fp32 [E, _, K/128] strided",
    "w2": "fp8 [E, K, I] strided",
    "w2_scale": "fp32 [E, _, I/128] strided",
}


@op(x="real [T, K]", topk_weights="real [T, topk]", topk_idx="int64|int32 [T, topk]", **WEIGHTS)
def moe_forward(
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
) -> Tensor:
    """Computes the MoE layer: dispatch, FP8 gate/up GEMM, SwiGLU, FP8 down GEMM, weighted combine.

        w13, w13_scale = deepkern.cast_per_block(w13_bf16)                # [E, 2I, K]
        w2, w2_scale = deepkern.cast_per_block(w2_bf16)                   # [E, K, I]
        out = deepkern.moe_forward(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale)

    Args:
        x: bf16, fp16 or fp32 [T, K]; rows may be strided. Cast to FP8 with one scale per 1x128.
        topk_weights: real [T, topk]; rows may be strided. Applied in fp32 to the experts' outputs.
        topk_idx: int64 or int32 [T, topk]; indices outside [0, E) are ignored (use -1).
            Duplicates are allowed.
        w13: float8_e4m3fn [E, 2I, K], the gate projection (I rows), then the up projection.
        w13_scale: fp32 [E, ceil(2I / 128), ceil(K / 128)], one per 128x128, counted over all 2I
            rows; or [E, 2I, ceil(K / 128)], one per 1x128.
        w2: float8_e4m3fn [E, K, I], the down projection.
        w2_scale: fp32 [E, ceil(K / 128), ceil(I / 128)], or [E, K, ceil(I / 128)].

    Returns:
        [T, K] in the dtype of `x`; 0 for a token without experts.

    gate_up and the experts' outputs are rounded to the dtype of `x`; silu(gate) * up is cast to FP8
    from fp32, with one scale per 1x128. Weights and scales may have any strides. FP8 weights whose
    layout the target cannot read (K or I not a multiple of 16) are copied in every call.

    Memory in addition to arguments and result, with R = T * topk and s bytes per value of `x`:
    R * (8 + max(K + 4 ceil(K/128) + 2 I s, 2 I s + I + 4 ceil(I/128), I + 4 ceil(I/128) + K s))
    + 8 E bytes: 16.5 KB per assignment in DeepSeek-V3.

    The gradient goes to `x` and `topk_weights` and requires scales per 128x128, see
    `moe_forward_backward`. DEEPKERN_DEBUG=1 raises for an index outside [-1, E).

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    name = "moe_forward"
    check_weights(name, w13, w13_scale, w2, w2_scale)
    check_assignments(name, "topk_idx", topk_idx)
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return x.new_empty(x.shape)


def check_weights(name: str, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> None:
    """The rules of w13 and w2 that the contract cannot state."""
    E, rows, I = *w13.shape[:2], w2.shape[2]
    check_that(name, "w13", E >= 1, "at least 1 expert", E)
    expected = f"2I = {2 * I} rows, [gate, up] for w2's I = {I}"
    check_that(name, "w13", rows == 2 * I, expected, f"shape {tuple(w13.shape)}")
    check_b_scale(name, w13, w13_scale, "w13_scale")
    check_b_scale(name, w2, w2_scale, "w2_scale")


@moe_forward.op.register_debug_check
def check_contents(x: Tensor, topk_weights: Tensor, topk_idx: Tensor, w13: Tensor, *_) -> None:
    """For DEEPKERN_DEBUG=1: every index is an expert or -1."""
    check_indices("moe_forward", "topk_idx", topk_idx, len(w13))


@moe_forward.op.register_launcher("triton")
def _launch_triton(
    x: Tensor, topk_weights: Tensor, topk_idx: Tensor,
    w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor,
) -> Tensor:  # fmt: skip
    out = moe_forward.op.allocate(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale)
    if topk_idx.numel() == 0 or w13.numel() == 0:
        return out.zero_()
    rows = ExpertRows.from_indices(topk_idx, len(w13))
    a = rows.dispatch(x)
    gate_up = rows.multiply(*a, w13, w13_scale, x.dtype)
    del a  # before h is allocated: lowers peak memory
    h = rows.activate(gate_up)
    del gate_up
    y = rows.multiply(*h, w2, w2_scale, x.dtype)
    return sum_rows(y, topk_weights, rows.handle, out)


@moe_forward.op.register_tile
def choose_tile(
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
) -> str:
    """The tiles of the two GEMMs of a launch with these arguments."""
    rows = topk_idx.numel()
    a, h = (w.new_empty((rows, w.shape[2]), device="meta") for w in (w13, w2))
    w13_tile, w2_tile = choose_gemm_tile(a, w13, w13_scale), choose_gemm_tile(h, w2, w2_scale)
    return f"w13 {w13_tile}; w2 {w2_tile}"


@op(
    grad="real [T, K]",
    topk_weights="real [T, topk]",
    topk_idx="int64|int32 [T, topk]",
    gate_up="fp8 [rows, J]",
    gate_up_scale="fp32 [rows, J/128]",
    **WEIGHTS,
)
def moe_forward_backward(
    grad: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of `moe_forward` with respect to `x` and `topk_weights`.

        grad_x, grad_weights = deepkern.moe_forward_backward(
            grad, topk_weights, topk_idx, *deepkern.cast_per_token(gate_up), w13, w13_scale,
            w2, w2_scale)

    Args:
        grad: bf16, fp16 or fp32 [T, K], of the output.
        topk_weights, topk_idx, w13, w2: as in the forward pass.
        gate_up: float8_e4m3fn [T * topk, 2I], the gates and ups of each row in the order of
            `expert_dispatch`, cast by `cast_per_token`.
        gate_up_scale: fp32 [T * topk, ceil(2I / 128)].
        w13_scale, w2_scale: as in the forward pass, one per 128x128.

    Returns:
        grad_x: [T, K] in the dtype of `grad`.
        grad_weights: fp32 [T, topk]; 0 where there is no expert.

    `grad` is cast per token for the GEMM with w2, and the gradient of gate_up for the GEMM with
    w13, both scaled by 2^48 (reason in `fp8_linear`). Between GEMMs, values are bf16, or fp32 if
    `grad` is fp32. The GEMMs read w13 and w2 transposed. Targets that read FP8 in one order only
    (sm_89 and later) copy each weight once, which takes as much memory as the weight.

    Raises:
        TypeError, ValueError: an argument violates the rules above.
    """
    name = "moe_forward_backward"
    check_weights(name, w13, w13_scale, w2, w2_scale)
    check_blocks(name, w13, w13_scale, w2, w2_scale)
    rows = check_assignments(name, "topk_idx", topk_idx)
    check_that(name, "gate_up", len(gate_up) == rows, f"{rows} rows", tuple(gate_up.shape))
    # Fake kernel: allocates the outputs; the launcher of a backend computes them.
    return grad.new_empty(grad.shape), grad.new_empty(topk_idx.shape, dtype=torch.float32)


def check_blocks(name: str, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor) -> None:
    """Scales can be transposed with their matrix only if they are one per 128x128."""
    for argument, w, scale in (("w13_scale", w13, w13_scale), ("w2_scale", w2, w2_scale)):
        blocks = -(-w.shape[1] // 128)
        expected = f"one per 128x128 for a gradient, so {blocks} rows"
        check_that(name, argument, scale.shape[1] == blocks, expected, tuple(scale.shape))


@moe_forward_backward.op.register_launcher("triton")
def _launch_backward_triton(
    grad: Tensor, topk_weights: Tensor, topk_idx: Tensor, gate_up: Tensor, gate_up_scale: Tensor,
    w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    grad_x, grad_weights = moe_forward_backward.op.allocate(
        grad, topk_weights, topk_idx, gate_up, gate_up_scale, w13, w13_scale, w2, w2_scale
    )
    if topk_idx.numel() == 0 or w13.numel() == 0:
        return grad_x.zero_(), grad_weights.zero_()
    rows = ExpertRows.from_indices(topk_idx, len(w13))
    wide = torch.float32 if grad.dtype == torch.float32 else torch.bfloat16
    a = rows.dispatch((grad.float() if grad.dtype == torch.float16 else grad) * GRAD_SCALE)
    grad_h = rows.multiply(*a, w2.mT, w2_scale.mT, wide)
    del a
    grad_gate_up = torch.empty_like(gate_up, dtype=wide)
    weights = rows.scatter_to_rows(topk_weights)
    grad_row_weights = torch.empty_like(weights)
    outputs = grad_gate_up, None, grad_row_weights
    launch_swiglu_cast_backward(
        grad_h, gate_up, gate_up_scale, weights, None, outputs, rows.group_index
    )
    rows.gather_from_rows(grad_row_weights, grad_weights, 1 / GRAD_SCALE)
    del grad_h
    q, scale = cast_per_token.op.launcher("triton")(grad_gate_up, "fp32", "row")
    del grad_gate_up
    y = rows.multiply(q, scale / GRAD_SCALE, w13.mT, w13_scale.mT, wide)
    return sum_rows(y, None, rows.handle, grad_x), grad_weights


def forward_with_gate_up(
    x: Tensor,
    topk_weights: Tensor,
    topk_idx: Tensor,
    w13: Tensor,
    w13_scale: Tensor,
    w2: Tensor,
    w2_scale: Tensor,
    alignment: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """`moe_forward` op by op, with the same bits: (out, gate_up in FP8, its scale).

    gate_up is in the order of `expert_dispatch` with this alignment; the backward pass needs it.
    """
    multiply = m_grouped_fp8_gemm_nt_contiguous.op.overload
    q, scale, group_index, _, handle = expert_dispatch.op.overload(
        x, topk_idx, len(w13), None, alignment, "fp32"
    )
    gate_up = multiply(q, scale, w13, w13_scale, group_index, x.dtype)
    y = multiply(*swiglu_cast.op.overload(gate_up), w2, w2_scale, group_index, x.dtype)
    out = expert_combine.op.overload(y, topk_weights, handle)
    return out, *cast_per_token.op.overload(gate_up)


@moe_forward.op.register_autograd
class MoeForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale):
        args = x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale
        if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
            return moe_forward.op.overload(*args)
        moe_forward.op.allocate(*args)  # for its checks
        check_blocks("moe_forward", *args[3:])
        out, *gate_up = forward_with_gate_up(*args)
        ctx.save_for_backward(topk_weights, topk_idx, *gate_up, *args[3:])
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        topk_weights, *rest = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        grad_x, grad_weights = moe_forward_backward.op.overload(grad, topk_weights, *rest)
        return grad_x, grad_weights.to(topk_weights.dtype), *[None] * 5
