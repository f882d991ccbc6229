"""The arithmetic of the kernels (deepkern/arithmetic.py) in plain PyTorch, with the same bits.

Each step is rounded to float32, in the same order. exp splits the factor 2^n differently; both
splits round once. torch.exp, torch.rsqrt and torch.sum are not used, because their last place
differs between machines.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def exp(x: Tensor) -> Tensor:
    """e^x for x <= 0 in float32: x = n ln 2 + r, a polynomial in r, times 2^n."""
    x = torch.where(x < -104.0, -104.0, x)
    shifted = x * 1.44269502 + 12582912.0
    n = shifted - 12582912.0
    r = (x - n * 0.693359375) - n * -2.12194442e-4
    p = r * 1.98756912e-4 + 1.39819994e-3
    p = p * r + 8.33345205e-3
    p = p * r + 4.16657962e-2
    p = p * r + 0.166666657
    p = p * r + 0.5
    value = (p * (r * r) + r) + 1.0
    exponent = shifted.view(torch.int32) - 0x4B400000
    half = exponent >> 1
    value = value * ((half + 127) << 23).view(torch.float32)
    return value * ((exponent - half + 127) << 23).view(torch.float32)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + e^-x) for any float32 x."""
    e = exp(-x.abs())
    return torch.where(x >= 0, 1.0, e) / (e + 1.0)


def sum_pairs(x: Tensor) -> Tensor:
    """Sum over the last dimension (keepdim): adds neighbours, then neighbouring sums, and so on."""
    n = x.shape[-1]
    x = F.pad(x, (0, (1 << max(n - 1, 0).bit_length()) - n))
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x


def inverse_rms(squares: Tensor, count: int, eps: float) -> Tensor:
    """1 / sqrt(squares / count + eps); squares: float32, each a sum of `count` squares."""
    # Divide by a tensor: torch replaces division by a number by multiplication with its inverse.
    mean = squares / torch.full_like(squares, count)
    # sqrt in float64 and a cast round correctly; torch's fp32 sqrt is 1 ulp off on some CPUs.
    root = (mean + torch.full_like(mean, eps)).double().sqrt().float()
    return torch.ones_like(root) / root
