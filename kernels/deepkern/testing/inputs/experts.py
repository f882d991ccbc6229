"""Inputs of the experts ops."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ... import reference
from ...experts.route_topk import ROUTING
from . import Sizes
from .quant import values

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
V2 = {"score": "softmax", "group_score": "max", "normalize": False, "scale": 16.0}
V3 = ROUTING["deepseek-v3"]


def route_topk(
    generator: Generator,
    T: int,
    E: int,
    topk: int = 8,
    num_groups: int = 1,
    topk_groups: int = 1,
    score: str = "sigmoid",
    group_score: str = "top2",
    normalize: bool = True,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    biased: bool = True,
) -> tuple:
    """Logits in steps of 1/8, so that a token has equal scores to choose between."""
    device = generator.device
    logits = torch.randn(T, E, generator=generator, device=device) * 3
    logits = (logits * 8).round() / 8
    bias = torch.randn(E, generator=generator, device=device) * 0.1 if biased else None
    rule = topk, num_groups, topk_groups, score, group_score, normalize, scale
    return logits.to(dtype), bias, *rule


def route_topk_backward(generator: Generator, T: int, E: int, topk: int = 8, **rule) -> tuple:
    """Some indices are none of the experts'."""
    logits, _, topk, _, _, score, _, normalize, scale = route_topk(generator, T, E, topk, **rule)
    grad_weights = torch.randn(T, topk, generator=generator, device=generator.device)
    idx = torch.rand(T, E, generator=generator, device=generator.device).argsort(1)[:, :topk]
    idx = torch.where(idx == 0, -1, idx)
    return grad_weights, logits, idx.contiguous(), score, normalize, scale


def indices(generator: Generator, T: int, E: int, topk: int, none: float = 0.1) -> Tensor:
    """int64 [T, topk]: experts of unequal popularity, a part `none` of them out of range."""
    device = generator.device
    draw = torch.rand(T, topk, generator=generator, device=device)
    idx = (draw * draw * E).long().clamp(max=E - 1)
    out = torch.tensor([-1, E, -(2**63), 2**63 - 1, 2**32], device=device)
    wrong = out[torch.randint(len(out), (T, topk), generator=generator, device=device)]
    return torch.where(torch.rand(T, topk, generator=generator, device=device) < none, wrong, idx)


def expert_dispatch(
    generator: Generator,
    T: int,
    E: int,
    topk: int,
    K: int,
    alignment: int = 1,
    dtype: torch.dtype = BF16,
    scaled: bool | None = None,
    none: float = 0.1,
    cast: str | None = None,
    skewed: bool = False,
) -> tuple[Tensor, Tensor, int, Tensor | None, int, str | None]:
    """Every row of `x` starts with its own number, so that no two rows are alike."""
    x = values(generator, T, K, dtype=torch.float32)
    if K:
        x[:, 0] = torch.arange(T, device=x.device) % 256
    scale = torch.rand(T, -(-K // 128), generator=generator, device=x.device)
    scale = scale if (dtype == FP8 if scaled is None else scaled) else None
    x = x.clamp(-448, 448).to(dtype)
    idx = zipf(generator, T, E, topk) if skewed else indices(generator, T, E, topk, none)
    return x, idx, E, scale, alignment, cast


def rows_and_handle(
    generator: Generator, T: int, topk: int, K: int, dtype: torch.dtype, none: float
) -> tuple[Tensor, Tensor]:
    """y [T·topk, K] and a handle into it that names each row at most once."""
    device = generator.device
    y = values(generator, T * topk, K, dtype=dtype)
    handle = torch.rand(T * topk, generator=generator, device=device).argsort().view(T, topk)
    out = torch.tensor([-1, T * topk, -(2**31), 2**31 - 1], device=device)
    wrong = out[torch.randint(len(out), (T, topk), generator=generator, device=device)]
    unused = torch.rand(T, topk, generator=generator, device=device) < none
    return y, torch.where(unused, wrong, handle).int()


def expert_dispatch_backward(
    generator: Generator, T: int, topk: int, K: int, dtype: torch.dtype = BF16, none: float = 0.1
) -> tuple[Tensor, Tensor]:
    return rows_and_handle(generator, T, topk, K, dtype, none)


def expert_combine(
    generator: Generator,
    T: int,
    topk: int,
    K: int,
    dtype: torch.dtype = BF16,
    none: float = 0.1,
    shared: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """`shared`: the dtype of the shared expert's output, if given."""
    y, handle = rows_and_handle(generator, T, topk, K, dtype, none)
    args = y, torch.rand(T, topk, generator=generator, device=y.device), handle
    return args if shared is None else (*args, values(generator, T, K, dtype=shared))


def expert_combine_backward(
    generator: Generator, T: int, topk: int, K: int, dtype: torch.dtype = BF16, none: float = 0.1
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad = values(generator, T, K, dtype=dtype)
    return grad, *expert_combine(generator, T, topk, K, dtype, none)[:3]


def expert_load(
    generator: Generator, T: int, E: int, topk: int, none: float = 0.1
) -> tuple[Tensor, int]:
    return indices(generator, T, E, topk, none), E


def update_expert_bias(generator: Generator, E: int, rate: float = 0.001) -> tuple:
    """Loads of which some are the mean."""
    bias = torch.randn(E, generator=generator, device=generator.device)
    load = torch.randint(99, 102, (E,), generator=generator, device=generator.device)
    return bias, load, rate


def sequence_balance_loss(
    generator: Generator, B: int, S: int, E: int, topk: int, score: str = "sigmoid",
    dtype: torch.dtype = torch.float32, none: float = 0.1,
) -> tuple:  # fmt: skip
    logits = torch.randn(B, S, E, generator=generator, device=generator.device) * 3
    return logits.to(dtype), indices(generator, B * S, E, topk, none).view(B, S, topk), score, 1e-4


def sequence_balance_loss_backward(generator: Generator, **size) -> tuple:
    grad = torch.rand(1, generator=generator, device=generator.device) + 0.5
    return grad, *sequence_balance_loss(generator, **size)


# The layer casts sums to FP8. Where fp32 rounds a sum otherwise than float64, one in some 1e5 codes
# is its neighbour, an error of a sixteenth. So that implementations can be held to each other all
# the same, sums in front of a cast are exact here: small integers, and scales that are powers of 2.


def moe_forward(
    generator: Generator,
    T: int,
    E: int,
    topk: int,
    K: int,
    I: int,
    dtype: torch.dtype = BF16,
    none: float = 0.1,
    b_rows: int = 128,
    skewed: bool = False,
) -> tuple[Tensor, ...]:
    """`b_rows`: how many rows of a weight one scale covers, 128 or 1."""
    x = integers(generator, T, K).to(dtype)
    weights = torch.rand(T, topk, generator=generator, device=x.device)
    idx = zipf(generator, T, E, topk) if skewed else indices(generator, T, E, topk, none)
    return x, weights, idx, *expert_weights(generator, E, K, I, b_rows)


def integers(generator: Generator, M: int, K: int) -> Tensor:
    """fp32 [M, K] from -7 to 7, with a 7 in each block: its FP8 scale is 2^-6."""
    x = torch.randint(-7, 8, (M, K), generator=generator, device=generator.device).float()
    x[:, ::128] = 7.0
    return x


def zipf(generator: Generator, T: int, E: int, topk: int) -> Tensor:
    """int64 [T, topk]: distinct experts, expert e drawn in proportion to 1 / (e + 1)."""
    popularity = 1.0 / torch.arange(1, E + 1, device=generator.device)
    return torch.multinomial(popularity.expand(T, E), topk, generator=generator)


def expert_weights(
    generator: Generator, E: int, K: int, I: int, b_rows: int = 128
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w13, w13_scale, w2, w2_scale that bring values of size 4 to about 1.

    The codes are drawn, not cast from real numbers, of which V3's layer has 45 GB.
    """
    device = generator.device

    def matrix(N: int, K: int) -> tuple[Tensor, Tensor]:
        code = torch.randint(256, (E, N, K), generator=generator, device=device, dtype=torch.uint8)
        code = code.bitwise_and_(0x86).bitwise_or_(0x38)  # 1, 1.25, 1.5 or 1.75, and its negative
        shape = (E, N if b_rows == 1 else -(-N // 128), -(-K // 128))
        exponent = torch.randint(-1, 2, shape, generator=generator, device=device)
        return code.view(FP8), 2.0 ** (exponent - round(math.log2(4 * max(K, 1) ** 0.5)))

    return *matrix(2 * I, K), *matrix(K, I)


def moe_forward_backward(
    generator: Generator, T: int, E: int, topk: int, K: int, I: int, dtype: torch.dtype = BF16,
    none: float = 0.1,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients as small as they are, but for float16, which could not hold them."""
    _, weights, idx, *w = moe_forward(generator, T, E, topk, K, I, dtype, none)
    gate_up = torch.randn(T * topk, 2 * I, generator=generator, device=idx.device)
    grad = integers(generator, T, K) * 2.0 ** (-12 if dtype == torch.float16 else -24)
    return grad.to(dtype), weights, idx, *reference.cast_per_token(gate_up), *w


V3_TOKENS = (1, 8, 32, 128, 512, 2048, 8192)
V3_LAYER = {"E": 256, "topk": 8, "K": 7168, "I": 2048, "none": 0.0}
V3_BATCHES = [{"T": T, **V3_LAYER, "skewed": skewed} for T in V3_TOKENS for skewed in (False, True)]
BALANCE = Sizes(
    small=[
        {"B": 3, "S": 37, "E": 10, "topk": 3},
        {"B": 2, "S": 5, "E": 256, "topk": 8, "score": "softmax", "dtype": BF16},
        {"B": 1, "S": 70, "E": 64, "topk": 6, "score": "sqrtsoftplus"},
        {"B": 2, "S": 1, "E": 1, "topk": 1, "dtype": torch.float16},
        {"B": 0, "S": 4, "E": 8, "topk": 2},
        {"B": 2, "S": 0, "E": 8, "topk": 2},
        {"B": 2, "S": 4, "E": 8, "topk": 0},
    ],
    cpu=[{"B": 2, "S": 512, "E": 256, "topk": 8}],
    gpu=[{"B": 4, "S": 4096, "E": 256, "topk": 8}],
    inspect=[
        {"B": 4, "S": 4096, "E": 256, "topk": 8},
        {"B": 4, "S": 4096, "E": 160, "topk": 6, "score": "softmax"},
        {"B": 4, "S": 4096, "E": 256, "topk": 6, "score": "sqrtsoftplus"},
    ],
)
SIZES = {
    "expert_load": Sizes(
        small=[
            {"T": 200, "E": 20, "topk": 3},
            {"T": 3, "E": 1, "topk": 1},
            {"T": 0, "E": 8, "topk": 2},
            {"T": 3, "E": 8, "topk": 0},
        ],
        cpu=[{"T": 8192, "E": 256, "topk": 8}],
        gpu=[{"T": 8192, "E": 256, "topk": 8}],
        inspect=[{"T": 8192, "E": 256, "topk": 8}],
    ),
    "update_expert_bias": Sizes(
        small=[{"E": 10}, {"E": 1500, "rate": 0.1}, {"E": 1}, {"E": 0}],
        cpu=[{"E": 256}],
        gpu=[{"E": 256}],
        inspect=[{"E": 256}],
    ),
    "sequence_balance_loss": BALANCE,
    "sequence_balance_loss_backward": BALANCE,
    "moe_forward": Sizes(
        small=[
            {"T": 6, "E": 4, "topk": 3, "K": 256, "I": 128},
            {"T": 7, "E": 5, "topk": 2, "K": 200, "I": 72},
            {"T": 9, "E": 4, "topk": 2, "K": 144, "I": 144, "b_rows": 1},
            {"T": 3, "E": 20, "topk": 3, "K": 130, "I": 100, "dtype": torch.float16},
            {"T": 3, "E": 2, "topk": 2, "K": 128, "I": 64, "dtype": torch.float32},
            {"T": 0, "E": 4, "topk": 2, "K": 128, "I": 128},
            {"T": 3, "E": 4, "topk": 0, "K": 128, "I": 128},
            {"T": 3, "E": 4, "topk": 2, "K": 128, "I": 0},
            {"T": 3, "E": 4, "topk": 2, "K": 0, "I": 128},
        ],
        cpu=[{"T": T, "E": 16, "topk": 4, "K": 512, "I": 256, "none": 0.0} for T in (1, 64)],
        gpu=V3_BATCHES,
        inspect=[
            {"T": 32, "E": 32, "topk": 8, "K": 7168, "I": 2048},
            {"T": 4096, "E": 32, "topk": 8, "K": 7168, "I": 2048},
        ],
    ),
    "moe_forward_backward": Sizes(
        small=[
            {"T": 6, "E": 4, "topk": 3, "K": 256, "I": 128},
            {"T": 5, "E": 5, "topk": 2, "K": 200, "I": 72, "dtype": torch.float32},
            {"T": 3, "E": 9, "topk": 3, "K": 130, "I": 100, "dtype": torch.float16},
            {"T": 0, "E": 4, "topk": 2, "K": 128, "I": 128},
            {"T": 3, "E": 4, "topk": 2, "K": 128, "I": 0},
        ],
        cpu=[{"T": 64, "E": 16, "topk": 4, "K": 512, "I": 256, "none": 0.0}],
        gpu=[{"T": 4096, "E": 32, "topk": 8, "K": 7168, "I": 2048, "none": 0.0}],
        inspect=[{"T": 4096, "E": 32, "topk": 8, "K": 7168, "I": 2048}],
    ),
    "route_topk": Sizes(
        small=[
            {"T": 9, "E": 256, **V3},
            {"T": 70, "E": 10, "topk": 3, "num_groups": 5, "topk_groups": 2, **V2, "dtype": BF16},
            {"T": 5, "E": 160, "topk": 6, "num_groups": 8, "topk_groups": 3, "score": "softmax"},
            {"T": 33, "E": 64, "topk": 6, "score": "sqrtsoftplus", "biased": False},
            {"T": 3, "E": 1, "topk": 1, "dtype": torch.float16},
            {"T": 0, "E": 8, "topk": 2},
        ],
        cpu=[{"T": 512, "E": 256, **V3}],
        gpu=[{"T": T, "E": 256, **V3} for T in V3_TOKENS],
        inspect=[
            {"T": 4096, "E": 256, **V3},
            {"T": 4096, "E": 160, "topk": 6, "num_groups": 8, "topk_groups": 3, **V2},
            {"T": 4096, "E": 384, "topk": 6, "score": "sqrtsoftplus", "scale": 1.5},
            {"T": 4096, "E": 64, "topk": 6, **V2, "biased": False},
        ],
    ),
    "route_topk_backward": Sizes(
        small=[
            {"T": 9, "E": 256, "scale": 2.5},
            {"T": 20, "E": 10, "topk": 3, **V2, "dtype": BF16},
            {"T": 4, "E": 100, "topk": 6, "score": "softmax"},
            {"T": 6, "E": 64, "topk": 6, "score": "sqrtsoftplus", "dtype": torch.float16},
            {"T": 0, "E": 8, "topk": 2},
        ],
        cpu=[{"T": 512, "E": 256, "scale": 2.5}],
        gpu=[{"T": 4096, "E": 256, "scale": 2.5}],
        inspect=[
            {"T": 4096, "E": 256, "scale": 2.5},
            {"T": 4096, "E": 160, "topk": 6, **V2},
            {"T": 4096, "E": 384, "topk": 6, "score": "sqrtsoftplus"},
        ],
    ),
    "expert_dispatch": Sizes(
        small=[
            {"T": 20, "E": 10, "topk": 3, "K": 256, "alignment": 2, "scaled": True},
            {"T": 37, "E": 10, "topk": 3, "K": 300, "alignment": 4, "dtype": FP8},
            {"T": 200, "E": 40, "topk": 2, "K": 64},
            {"T": 5, "E": 1, "topk": 1, "K": 1, "dtype": torch.float32, "scaled": True},
            {"T": 3, "E": 256, "topk": 8, "K": 1100, "alignment": 2, "dtype": torch.float16},
            {"T": 9, "E": 6, "topk": 3, "K": 1300, "alignment": 2, "cast": "fp32"},
            {"T": 5, "E": 6, "topk": 9, "K": 100, "dtype": torch.float32, "cast": "ue8m0"},
            {"T": 0, "E": 8, "topk": 2, "K": 128},
            {"T": 4, "E": 8, "topk": 2, "K": 0, "dtype": FP8},
            {"T": 4, "E": 8, "topk": 0, "K": 16},
        ],
        cpu=[{"T": 512, "E": 256, "topk": 8, "K": 7168, "dtype": FP8, "none": 0.0}],
        gpu=[
            {"T": T, "E": 256, "topk": 8, "K": 7168, "none": 0.0, "skewed": skewed, **form}
            for T in V3_TOKENS
            for skewed in (False, True)
            for form in ({"dtype": FP8}, {"cast": "ue8m0"})
        ]
        + [{"T": 4096, "E": 256, "topk": 8, "K": 7168, "alignment": 128, "none": 0.5}],
        inspect=[
            {"T": 4096, "E": 256, "topk": 8, "K": 7168, "dtype": FP8},
            {"T": 4096, "E": 64, "topk": 6, "K": 2048},
            {"T": 4096, "E": 256, "topk": 8, "K": 7168, "cast": "fp32"},
        ],
    ),
    "expert_dispatch_backward": Sizes(
        small=[
            {"T": 11, "topk": 3, "K": 300},
            {"T": 5, "topk": 9, "K": 1030, "dtype": torch.float32},
            {"T": 0, "topk": 2, "K": 16},
            {"T": 2, "topk": 0, "K": 16},
        ],
        cpu=[{"T": 512, "topk": 8, "K": 7168, "none": 0.0}],
        gpu=[{"T": 4096, "topk": 8, "K": 7168, "none": 0.0}],
        inspect=[{"T": 4096, "topk": 8, "K": 7168}],
    ),
    "expert_combine": Sizes(
        small=[
            {"T": 11, "topk": 3, "K": 300, "shared": BF16},
            {"T": 5, "topk": 9, "K": 1030, "dtype": torch.float32},
            {"T": 9, "topk": 1, "K": 7, "dtype": torch.float16, "none": 0.5},
            {"T": 0, "topk": 2, "K": 16},
            {"T": 3, "topk": 2, "K": 0},
            {"T": 2, "topk": 0, "K": 16, "shared": torch.float32},
        ],
        cpu=[{"T": 512, "topk": 8, "K": 7168, "none": 0.0}],
        gpu=[{"T": T, "topk": 8, "K": 7168, "none": 0.0} for T in V3_TOKENS]
        + [{"T": 4096, "topk": 8, "K": 7168, "none": 0.0, "shared": BF16}],
        inspect=[
            {"T": 4096, "topk": 8, "K": 7168},
            {"T": 4096, "topk": 6, "K": 2048, "shared": BF16},
        ],
    ),
    "expert_combine_backward": Sizes(
        small=[
            {"T": 11, "topk": 3, "K": 300},
            {"T": 5, "topk": 9, "K": 1030, "dtype": torch.float32},
            {"T": 0, "topk": 2, "K": 16},
            {"T": 3, "topk": 2, "K": 0},
            {"T": 2, "topk": 0, "K": 16},
        ],
        cpu=[{"T": 512, "topk": 8, "K": 7168, "none": 0.0}],
        gpu=[{"T": 4096, "topk": 8, "K": 7168, "none": 0.0}],
        inspect=[{"T": 4096, "topk": 8, "K": 7168}],
    ),
}
