"""A linear layer whose three products run in FP8: forward, and both gradients.

    out         = cast(x)    · cast(weight)ᵀ + bias         1x128 along K · 128x128
    grad_x      = cast(grad) · cast(weight)                 1x128 along N · 128x128
    grad_weight = cast(grad)ᵀ · cast(x)                     128x1 · 128x1, both along M

Not an op but a composition of the public ones. Every operand is rounded from the real values once:
where the report turns the FP8 activations of the forward pass into 128x1 blocks by way of real
numbers, a second rounding, the forward pass here casts `x` both ways while it is at hand. The copy
for the weight's gradient is all that is kept of `x`, one byte a value and a scale per 128.

The casts clamp a block's largest magnitude from below, at 1e-4, and gradients are mostly smaller:
that of a mean loss shrinks with the number of tokens. So `grad` is cast 2^48 times as large and the
scales are taken back by as much, both exactly: gradients that are large enough give the same bits.

Cut: three calls of `fp8_gemm_nt`. The weight is cast once for two of them, and the gradient of `x`
reads it as a transposed view: its blocks are square, so its scales transpose with it. With many
rows the products limit the speed, with few the reading of the weight, 4 bytes a value from fp32 and
1 where it is FP8 already.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..quant.cast_per_block import cast_per_block
from ..quant.cast_per_channel import cast_per_channel
from ..quant.cast_per_token import cast_per_token
from ..runtime.contract import FP8, Contract, check_that
from .fp8_gemm_nt import fp8_gemm_nt

# 1e-4 becomes 4e-19, and a bf16 or fp32 gradient overflows from 1e24 on.
LIFT = 2.0**48

CONTRACT = Contract(
    "fp8_linear",
    optional=("weight_scale", "bias"),
    x="real [..., K] strided",
    weight="real|fp8 [N, K] strided",
    weight_scale="fp32 [N/128, K/128] strided",
    bias="real [N] strided",
)


def fp8_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    """`F.linear` with the operands of all three products in FP8.

    Args:
        x: bf16, fp16 or fp32 [..., K], any strides.
        weight: bf16, fp16 or fp32 [N, K], any strides, cast in every call; or float8_e4m3fn [N, K],
            which gets no gradient.
        bias: bf16, fp16 or fp32 [N], added in fp32 before the one rounding.
        weight_scale: fp32 [ceil(N / 128), ceil(K / 128)], with an FP8 weight and only then.

    Returns:
        [..., N] in the dtype of `x`. Any shape, no rows included.

    The gradients of `weight` and `bias` are summed in fp32 and come in the dtypes of those two. Of
    `x` only FP8 values and scales are kept for them. There is no second derivative. inf or NaN in a
    block of 128 values of an operand makes NaN of all that it is multiplied into.

    Raises:
        TypeError, ValueError: an argument is not as above.
    """
    check(x, weight, bias, weight_scale)
    rows = rows_contiguous(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    if torch.is_grad_enabled():
        out = FP8LinearFunction.apply(rows, weight, bias, weight_scale)
    else:
        out = forward(rows, *quantised(weight, weight_scale), bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def check(x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> None:
    for name, tensor in (("x", x), ("weight", weight)):  # the contract takes None for left out
        if tensor is None:
            raise TypeError(f"fp8_linear: {name}: expected a Tensor, got None")
    CONTRACT.check({"x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias})
    got = "None" if weight_scale is None else f"shape {tuple(weight_scale.shape)}"
    expected = "a scale of the FP8 weight" if weight.dtype == FP8 else f"None with {weight.dtype}"
    fits = (weight.dtype == FP8) == (weight_scale is not None)
    check_that("fp8_linear", "weight_scale", fits, expected, got)


def rows_contiguous(x: Tensor) -> Tensor:
    """`x` as the casts take it: rows may lie anywhere, the values of one side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def quantised(weight: Tensor, weight_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight in FP8 and its 128x128 scales."""
    if weight_scale is not None:
        return weight, weight_scale
    return cast_per_block(rows_contiguous(weight))


def forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """x real [M, K], the weight in FP8 -> [M, N]."""
    addend = None if bias is None else rows_contiguous(bias).expand(x.shape[0], -1)
    return fp8_gemm_nt(*cast_per_token(x), weight, weight_scale, x.dtype, addend)


class FP8LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, weight_scale):
        q = quantised(weight, weight_scale)
        # What the gradients asked for need, and no more.
        for_x = q if ctx.needs_input_grad[0] else (None, None)
        for_weight = (None, None)
        if ctx.needs_input_grad[1] and weight.dtype != FP8:
            for_weight = cast_per_channel(x, transpose=True)
        ctx.save_for_backward(*for_x, *for_weight)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return forward(x, *q, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        weight, weight_scale, x, x_scale = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        grad = rows_contiguous(grad)  # [M, N]
        lifted = (grad.float() if grad.dtype == torch.float16 else grad) * LIFT
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            q, scale = cast_per_token(lifted)
            grad_x = fp8_gemm_nt(q, scale / LIFT, weight.t(), weight_scale.t(), x_dtype)
        if ctx.needs_input_grad[1] and x is not None:
            q, scale = cast_per_channel(lifted, transpose=True)  # [N, M]
            grad_weight = fp8_gemm_nt(q, scale / LIFT, x, x_scale, weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None


class FP8Linear(nn.Linear):
    """`nn.Linear` that computes with `fp8_linear`.

    The weight is real (bf16, fp16 or fp32, trained as any other) and cast in every forward pass; or
    it stays in FP8 with a buffer `weight_scale`, see `from_quantised`. The arguments are those of
    `nn.Linear`, and so is the initialisation.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("weight_scale", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> FP8Linear:
        """A layer that shares the parameters of `linear`."""
        module = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        return module.train(linear.training)

    @classmethod
    def from_quantised(
        cls, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
    ) -> FP8Linear:
        """A layer whose weight is and stays in FP8, and is not trained.

        Args:
            weight: float8_e4m3fn [N, K], as `cast_per_block` gives it.
            weight_scale: fp32 [ceil(N / 128), ceil(K / 128)].
            bias: real [N] or None; trained if it is a Parameter that requires a gradient.

        `state_dict()` holds `weight`, `weight_scale` and `bias`. Moving the layer to another dtype
        moves the bias alone.

        Raises:
            TypeError, ValueError: a tensor is not as above.
        """
        CONTRACT.check({"weight": weight, "weight_scale": weight_scale, "bias": bias})
        if weight.dtype != FP8:
            raise TypeError(f"fp8_linear: weight: expected dtype {FP8}, got {weight.dtype}")
        N, K = weight.shape
        module = cls(K, N, bias=False, device="meta")
        module.weight = nn.Parameter(weight, requires_grad=False)
        module.weight_scale = weight_scale
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias, requires_grad=False)
        module.bias = bias
        return module

    def forward(self, x: Tensor) -> Tensor:
        return fp8_linear(x, self.weight, self.bias, self.weight_scale)

    def _apply(self, fn, recurse: bool = True):
        """As in every module, but that no change of dtype reaches an FP8 weight and its scale."""
        if self.weight_scale is None:
            return super()._apply(fn, recurse)
        kept = (self.weight, self.weight_scale)

        def but_no_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            changed = moved.dtype != tensor.dtype and any(tensor is t for t in kept)
            return tensor.to(moved.device) if changed else moved

        return super()._apply(but_no_dtype, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={str(self.weight.dtype).removeprefix('torch.')}"
