"""Expert choices, rows and weights for the tests and benchmarks of the experts ops."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..experts.route_topk import ROUTING
from .random_inputs import values

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
V2 = {"score": "softmax", "group_score": "max", "normalize": False, "scale": 16.0}
V3 = ROUTING["deepseek-v3"]
V3_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
V3_LAYER = {"E": 256, "topk": 8, "K": 7168, "I": 2048, "none": 0.0}


def indices(generator: Generator, T: int, E: int, topk: int, none: float = 0.1) -> Tensor:
    """int64 [T, topk]: experts of unequal popularity; a fraction `none` of them is out of range."""
    device = generator.device
    draw = torch.rand(T, topk, generator=generator, device=device)
    idx = (draw * draw * E).long().clamp(max=E - 1)
    outside = torch.tensor([-1, E, -(2**63), 2**63 - 1, 2**32], device=device)
    wrong = outside[torch.randint(len(outside), (T, topk), generator=generator, device=device)]
    return torch.where(torch.rand(T, topk, generator=generator, device=device) < none, wrong, idx)


def zipf_indices(generator: Generator, T: int, E: int, topk: int) -> Tensor:
    """int64 [T, topk]: distinct experts, expert e drawn in proportion to 1 / (e + 1)."""
    popularity = 1.0 / torch.arange(1, E + 1, device=generator.device)
    return torch.multinomial(popularity.expand(T, E), topk, generator=generator)


def rows_and_handle(
    generator: Generator, T: int, topk: int, K: int, dtype: torch.dtype, none: float
) -> tuple[Tensor, Tensor]:
    """y [T * topk, K] and a handle into it that names each row at most once."""
    device = generator.device
    y = values(generator, T * topk, K, dtype=dtype)
    handle = torch.rand(T * topk, generator=generator, device=device).argsort().view(T, topk)
    outside = torch.tensor([-1, T * topk, -(2**31), 2**31 - 1], device=device)
    wrong = outside[torch.randint(len(outside), (T, topk), generator=generator, device=device)]
    unused = torch.rand(T, topk, generator=generator, device=device) < none
    return y, torch.where(unused, wrong, handle).int()


def expert_weights(
    generator: Generator, E: int, K: int, I: int, b_rows: int = 128
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w13, w13_scale, w2, w2_scale that bring values of size 4 to about 1.

    The codes are drawn and not cast from real numbers, which would take 45 GB for V3's layer.
    """
    device = generator.device

    def matrix(N: int, K: int) -> tuple[Tensor, Tensor]:
        code = torch.randint(256, (E, N, K), generator=generator, device=device, dtype=torch.uint8)
        code = code.bitwise_and_(0x86).bitwise_or_(0x38)  # 1, 1.25, 1.5 or 1.75, and its negative
        shape = (E, N if b_rows == 1 else -(-N // 128), -(-K // 128))
        exponent = torch.randint(-1, 2, shape, generator=generator, device=device)
        return code.view(FP8), 2.0 ** (exponent - round(math.log2(4 * max(K, 1) ** 0.5)))

    return *matrix(2 * I, K), *matrix(K, I)


def router_scores(logits: Tensor, score: str) -> Tensor:
    """fp32 scores of all experts in plain PyTorch."""
    logits = logits.float()
    if score == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if score == "sigmoid" else F.softplus(logits).sqrt()


def valid_experts(topk_idx: Tensor, num_experts: int) -> Tensor:
    """The experts of all assignments whose index is in range, one after the other."""
    return topk_idx[(topk_idx >= 0) & (topk_idx < num_experts)]
