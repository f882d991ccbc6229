"""A linear layer whose three GEMMs run in FP8: the forward pass and both gradients.

    out         = cast(x)    · cast(weight)ᵀ + bias         1x128 along K · 128x128
    grad_x      = cast(grad) · cast(weight)                 1x128 along N · 128x128
    grad_weight = cast(grad)ᵀ · cast(x)                     128x1 · 128x1, both along M

This is not an op, but a composition of public ops.

Parallelization: three calls of `fp8_gemm_nt`. The weight is cast once for two of them. The GEMM for
grad_x reads it as a transposed view: its blocks are square, so its scales transpose with it.

Every operand is rounded once, from the real values. The technical report dequantizes the FP8
activations of the forward pass and casts them to 128x1 blocks, which rounds twice. Here the forward
pass casts `x` in both directions. It saves only the cast for grad_weight: 1 byte per value, and one
scale per 128 values.

The casts use at least 1e-4 as the largest magnitude of a block. Gradients are often smaller; that
of a mean loss is inversely proportional to the number of tokens. So `grad` is multiplied by 2^48
before the cast, and its scales are divided by 2^48 after it. Both are exact: gradients that are
large enough without the factor give the same bits.

Limit: many rows are bound by the tensor core. Few rows are bound by reading the weight: 4 bytes per
value from fp32, 1 byte if it is FP8 already.

Source: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..quant.cast_per_block import cast_per_block
from ..quant.cast_per_channel import cast_per_channel
from ..quant.cast_per_token import cast_per_token
from ..runtime.contract import FP8, Contract, check_no_transform, check_that
from .fp8_gemm_nt import fp8_gemm_nt

# Factor of gradients before their cast: the bound 1e-4 of the casts then corresponds to 4e-19.
# bf16 and fp32 gradients overflow from 1e24 on.
GRAD_SCALE = 2.0**48

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
    """Computes `F.linear` with the operands of all three GEMMs in FP8.

    Args:
        x: bf16, fp16 or fp32 [..., K], any strides.
        weight: bf16, fp16 or fp32 [N, K], any strides, cast in every call; or float8_e4m3fn [N, K],
            which has no gradient.
        bias: bf16, fp16 or fp32 [N], added in fp32 before the only rounding, or None (the default).
        weight_scale: fp32 [ceil(N / 128), ceil(K / 128)] for an FP8 weight; None (the default) for
            a real weight.

    Returns:
        [..., N] in the dtype of `x`. Any dimension may be 0.

    The gradients of `weight` and `bias` are summed in fp32 and have the dtypes of these two. For
    them only FP8 values and scales of `x` are saved. There is no second derivative. inf or NaN in a
    block of 128 values of an operand makes every output NaN that the block contributes to.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Example:
        >>> x, weight = torch.randn(4, 16, 512), torch.randn(256, 512, requires_grad=True)
        >>> out = deepkern.fp8_linear(x, weight)
        >>> out.sum().backward()
        >>> out.shape, weight.grad.shape
        (torch.Size([4, 16, 256]), torch.Size([256, 512]))
    """
    check(x, weight, bias, weight_scale)
    rows = contiguous_rows(x.reshape(x.shape[:-1].numel(), x.shape[-1]))
    if torch.is_grad_enabled():
        check_no_transform("fp8_linear")
        out = FP8LinearFunction.apply(rows, weight, bias, weight_scale)
    else:
        out = forward(rows, *quantize_weight(weight, weight_scale), bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def check(x: Tensor, weight: Tensor, bias: Tensor | None, weight_scale: Tensor | None) -> None:
    """Raises TypeError or ValueError: "fp8_linear: argument: expected X, got Y"."""
    CONTRACT.check({"x": x, "weight": weight, "weight_scale": weight_scale, "bias": bias})
    got = "None" if weight_scale is None else f"shape {tuple(weight_scale.shape)}"
    expected = "a scale of the FP8 weight" if weight.dtype == FP8 else f"None with {weight.dtype}"
    valid = (weight.dtype == FP8) == (weight_scale is not None)
    check_that("fp8_linear", "weight_scale", valid, expected, got)


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last dimension, as the casts require; copied only if it has none."""
    return x if x.stride(-1) == 1 else x.contiguous()


def quantize_weight(weight: Tensor, weight_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The weight in FP8 [N, K] and its 128x128 scales; `weight_scale` is that of an FP8 weight."""
    if weight_scale is not None:
        return weight, weight_scale
    return cast_per_block(contiguous_rows(weight))


def forward(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The output [M, N] from x real [M, K] and the weight in FP8 [N, K]."""
    addend = None if bias is None else contiguous_rows(bias).expand(x.shape[0], -1)
    return fp8_gemm_nt(*cast_per_token(x), weight, weight_scale, x.dtype, addend)


class FP8LinearFunction(torch.autograd.Function):
    """`fp8_linear` of x [M, K] with its gradients."""

    @staticmethod
    def forward(ctx, x, weight, bias, weight_scale):
        q = quantize_weight(weight, weight_scale)
        # Save only what the required gradients need.
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
        grad = contiguous_rows(grad)  # [M, N]
        # float32 because the product with GRAD_SCALE overflows float16.
        scaled_grad = (grad.float() if grad.dtype == torch.float16 else grad) * GRAD_SCALE
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            q, scale = cast_per_token(scaled_grad)
            grad_x = fp8_gemm_nt(q, scale / GRAD_SCALE, weight.t(), weight_scale.t(), x_dtype)
        if ctx.needs_input_grad[1] and x is not None:
            q, scale = cast_per_channel(scaled_grad, transpose=True)  # [N, M]
            grad_weight = fp8_gemm_nt(q, scale / GRAD_SCALE, x, x_scale, weight_dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32).to(bias_dtype)
        return grad_x, grad_weight, grad_bias, None


class FP8Linear(nn.Linear):
    """`nn.Linear` that computes with `fp8_linear`.

    The weight is a real parameter (bf16, fp16 or fp32) that every forward pass casts. Or it is
    stored in FP8 with a buffer `weight_scale`, see `from_quantised`. Arguments and initialization
    are those of `nn.Linear`.

    Example:
        >>> layer = deepkern.FP8Linear(512, 256)
        >>> layer(torch.randn(4, 16, 512)).shape
        torch.Size([4, 16, 256])
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
        """Returns a layer that shares the parameters of `linear`.

        Example:
            >>> linear = torch.nn.Linear(512, 256)
            >>> deepkern.FP8Linear.from_linear(linear).weight is linear.weight
            True
        """
        module = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        module.weight, module.bias = linear.weight, linear.bias
        return module.train(linear.training)

    @classmethod
    def from_quantised(
        cls, weight: Tensor, weight_scale: Tensor, bias: Tensor | None = None
    ) -> FP8Linear:
        """Returns a layer with a fixed FP8 weight.

        Args:
            weight: float8_e4m3fn [N, K], from `cast_per_block`.
            weight_scale: fp32 [ceil(N / 128), ceil(K / 128)].
            bias: real [N] or None (the default); trained if it is a Parameter that requires a
                gradient.

        `state_dict()` holds `weight`, `weight_scale` and `bias`. Converting the layer to another
        dtype converts only the bias.

        Raises:
            TypeError, ValueError: a tensor is not as above.

        Example:
            >>> weight, weight_scale = deepkern.cast_per_block(torch.randn(256, 512))
            >>> layer = deepkern.FP8Linear.from_quantised(weight, weight_scale)
            >>> layer(torch.randn(4, 512)).shape
            torch.Size([4, 256])
        """
        CONTRACT.check({"weight": weight, "weight_scale": weight_scale, "bias": bias})
        if weight_scale is None:
            CONTRACT.missing("weight_scale")
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
        """As `nn.Module._apply`, except that an FP8 weight and its scale keep their dtypes."""
        if self.weight_scale is None:
            return super()._apply(fn, recurse)
        quantized = (self.weight, self.weight_scale)

        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            changed = result.dtype != tensor.dtype and any(tensor is t for t in quantized)
            return tensor.to(result.device) if changed else result

        return super()._apply(keep_dtype, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weight={str(self.weight.dtype).removeprefix('torch.')}"
