"""Inputs, sizes, cost and baseline of mla_prefill."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import Cost, tensor_bytes
from ..providers import Provider, library, prepared
from . import Sizes

BF16 = torch.bfloat16


def inputs(
    generator: Generator,
    lengths: tuple[int, ...] | list[int],
    lengths_k: tuple[int, ...] | list[int] | None = None,
    H: int = 16,
    Hk: int | None = None,
    Dqk: int = 192,
    Dv: int = 128,
    dtype: torch.dtype = BF16,
    causal: bool = True,
    unused: int = 0,
) -> tuple:
    """`unused` rows before the first and after the last sequence are NaN."""
    device = generator.device
    tensors, boundaries = [], []
    for ragged, widths in ((lengths, ((H, Dqk),)), (lengths_k, ((Hk, Dqk), (Hk, Dv)))):
        ragged = lengths if ragged is None else ragged
        edges = [unused]
        for length in ragged:
            edges.append(edges[-1] + length)
        boundaries.append(torch.tensor(edges, dtype=torch.int32, device=device))
        for heads, width in widths:
            shape = edges[-1] + unused, H if heads is None else heads, width
            x = torch.randn(shape, generator=generator, device=device).to(dtype)
            x[:unused] = torch.nan
            x[edges[-1] :] = torch.nan
            tensors.append(x)
    return *tensors, *boundaries, Dqk**-0.5, causal


SIZES = Sizes(
    small=[
        {"lengths": (70, 0, 129), "H": 3, "unused": 2},
        {"lengths": (9, 40), "lengths_k": (70, 0), "H": 4, "Hk": 2, "Dqk": 40, "Dv": 24},
        {
            "lengths": (33, 5),
            "lengths_k": (20, 50),
            "H": 2,
            "Hk": 1,
            "Dqk": 24,
            "Dv": 16,
            "dtype": torch.float32,
            "causal": False,
            "unused": 1,
        },
        {"lengths": (20,), "H": 1, "Dqk": 64, "Dv": 64, "dtype": torch.float16},
        {"lengths": ()},
        {"lengths": (0, 0), "H": 2, "unused": 3},
        {"lengths": (4,), "lengths_k": (0,), "H": 2},
        {"lengths": (4,), "H": 0},
    ],
    cpu=[{"lengths": (512,), "H": 8}],
    gpu=[
        {"lengths": (2048,) * 4, "H": 128},
        {"lengths": (8192,), "H": 128},
        {"lengths": (16384,), "H": 128},
        {"lengths": (8192,), "H": 128, "causal": False},
        {"lengths": (8192,), "H": 64, "Hk": 8, "Dqk": 128},
    ],
    inspect=[
        {"lengths": (4096,)},
        {"lengths": (4096,), "causal": False},
        {"lengths": (4096,), "Dqk": 128},
        {"lengths": (1024,), "dtype": torch.float32},
    ],
)
EXACT = False


def cost(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, **rest) -> Cost:
    pairs = visible_pairs(q, k, cu_seqlens_q, cu_seqlens_k, causal)
    moved = tensor_bytes(q, k, v, cu_seqlens_q, cu_seqlens_k, rest)
    return Cost(moved, 2 * q.shape[1] * (q.shape[2] + v.shape[2]) * pairs)


def baseline(
    q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal=True
) -> tuple[Tensor, None]:
    """SDPA, sequence by sequence."""
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    for rows, keys in sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal):
        out[rows] = sdpa(q[rows], k[keys], v[keys], softmax_scale, causal)
    return out, None


def visible_pairs(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool) -> int:
    """Pairs of a query and a key that it sees, for one head, all sequences together."""
    lengths = [cu.clamp(0, x.shape[0]).cummax(0).values.diff() for cu, x in ((cu_q, q), (cu_k, k))]
    pairs = 0
    for Lq, Lk in zip(*(x.tolist() for x in lengths), strict=True):
        rows = min(Lq, Lk)  # the last of them sees Lk keys, the one before it one key less
        pairs += rows * Lk - rows * (rows - 1) // 2 if causal else Lq * Lk
    return pairs


def sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal) -> list[tuple[slice, slice]]:
    """(rows of q that see a key, rows of k) of every sequence; reads the lengths back."""
    slices = []
    for cu, x in ((cu_seqlens_q, q), (cu_seqlens_k, k)):
        edges = cu.clamp(0, x.shape[0]).cummax(0).values.tolist()
        slices.append(list(zip(edges, edges[1:], strict=False)))
    pairs = []
    for (q0, q1), (k0, k1) in zip(*slices, strict=True):
        q0 = max(q0, q1 - (k1 - k0)) if causal else q0
        if q0 < q1 and k0 < k1 and q.shape[1]:
            pairs.append((slice(q0, q1), slice(k0, k1)))
    return pairs


def sdpa(q, k, v, softmax_scale, causal) -> Tensor:
    """One sequence, [Lq, H, Dqk] -> [Lq, H, Dv]."""
    square = causal and q.shape[0] == k.shape[0]  # otherwise is_causal aligns the wrong ends
    mask = None if square or not causal else causal_mask(q, k)
    grouped = q.shape[1] != k.shape[1]
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=square, scale=softmax_scale, enable_gqa=grouped
    )
    return out[0].transpose(0, 1)


def causal_mask(q, k) -> Tensor:
    """Which keys each query sees, aligned at the ends: [Lq, Lk]."""
    Lq, Lk = q.shape[0], k.shape[0]
    return torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).tril(Lk - Lq)


def providers(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal, **rest) -> list[Provider]:
    args = q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
    found = []
    if v.shape[2] < q.shape[2]:  # the flash kernel of PyTorch requires keys and values of one width
        about = "SDPA, sequence by sequence, values padded before to the width of keys"
        found.append(Provider("sdpa_padded", about, prepared(lambda: padded_sdpa(*args)), only_out))
    if q.dtype == torch.float32 or max(q.shape[2], v.shape[2]) > 256 or not q.is_cuda:
        return found
    return found + library(
        "flash_attn", "FlashAttention-2's flash_attn_varlen_func, values padded before",
        lambda module: flash_attention(module, *args),
        outputs=lambda out: only_out(out[..., : v.shape[2]]),
    )  # fmt: skip


def only_out(out: Tensor) -> tuple[Tensor, None]:
    return out, None


def padded_sdpa(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal) -> Callable:
    padded = F.pad(v, (0, q.shape[2] - v.shape[2]))
    pairs = sequences(q, k, cu_seqlens_q, cu_seqlens_k, causal)

    def call() -> Tensor:
        out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
        for rows, keys in pairs:
            got = sdpa(q[rows], k[keys], padded[keys], softmax_scale, causal)
            out[rows] = got[..., : v.shape[2]]
        return out

    return call


def flash_attention(
    module: ModuleType, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal
) -> Callable:
    padded = F.pad(v, (0, q.shape[2] - v.shape[2]))
    longest = [int(cu.diff().max()) for cu in (cu_seqlens_q, cu_seqlens_k)]
    return lambda: module.flash_attn_varlen_func(
        q, k, padded, cu_seqlens_q, cu_seqlens_k, *longest,
        softmax_scale=softmax_scale, causal=causal,
    )  # fmt: skip
