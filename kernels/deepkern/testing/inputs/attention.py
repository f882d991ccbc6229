"""Inputs of the attention ops."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from deepkern import reference

from . import Sizes

BF16 = torch.bfloat16
FP8_BYTES = torch.uint8
ABSENT = 2147480000  # what stands in unused entries of a block table


def empty_cache(
    generator: Generator, blocks: int, page: int, R: int, D: int, dtype: torch.dtype = BF16
) -> Tensor:
    """A cache in which every token is NaN, its pages one token apart in memory."""
    width = R + 4 * -(-R // 128) + 2 * D if dtype == FP8_BYTES else R + D
    fill = 0xFF if dtype == FP8_BYTES else torch.nan  # bytes of ones are NaN in each of its types
    cache = torch.full((blocks, page + 1, 1, width), fill, dtype=dtype, device=generator.device)
    return cache[:, :page]


def rope_table(positions: int, D: int, device: torch.device) -> Tensor:
    """fp32 [positions, D] = [cos | sin] of the usual D/2 frequencies."""
    exponent = torch.arange(0, D, 2, device=device, dtype=torch.float64) / max(D, 1)
    angles = torch.arange(positions, device=device)[:, None] * 10000.0**-exponent
    return torch.cat((angles.cos(), angles.sin()), dim=1).float()


def mla_cache_append(
    generator: Generator,
    T: int,
    R: int = 512,
    D: int = 64,
    page: int = 64,
    dtype: torch.dtype = BF16,
    cache_dtype: torch.dtype = BF16,
    norm: bool = True,
    rope: bool = True,
) -> tuple:
    device = generator.device
    scale = torch.exp2(torch.randn(T, 1, generator=generator, device=device).mul_(2))
    latent = (torch.randn(T, R, generator=generator, device=device) * scale).to(dtype)
    k_rope = torch.randn(T, D, generator=generator, device=device).to(dtype)
    blocks = -(-T // page) + 1
    cache = empty_cache(generator, blocks, page, R, D, cache_dtype)
    slot = torch.randperm(blocks * page, generator=generator, device=device)[:T]
    slot[1::7] = -1
    weight = 1 + 0.1 * torch.randn(R, generator=generator, device=device)
    positions = torch.randint(0, 4 * T + 1, (T,), generator=generator, device=device)
    table = rope_table(4 * T + 1, D, device) if rope else None
    return (
        latent,
        k_rope,
        cache,
        slot,
        weight.to(dtype) if norm else None,
        positions if rope else None,
        table,
    )


def paged(
    generator: Generator,
    lengths: Tensor,
    page: int,
    R: int,
    D: int,
    dtype: torch.dtype = BF16,
    width: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A cache of `lengths` random tokens in shuffled pages, NaN elsewhere, and its table."""
    device = generator.device
    pages = (lengths.long() + page - 1) // page
    total, P = int(pages.sum()), max(int(pages.max()) if len(pages) else 0, width or 1)
    cache = empty_cache(generator, total + 1, page, R, D, dtype)
    order = torch.randperm(total + 1, generator=generator, device=device).int()[:total]
    table = torch.full((len(lengths), P), ABSENT, dtype=torch.int32, device=device)
    table[torch.arange(P, device=device) < pages[:, None]] = order
    token = torch.arange(P * page, device=device)
    slot = table.repeat_interleave(page, dim=1).long() * page + token % page
    slot = slot[token < lengths[:, None]]
    n = slot.numel()
    latent = torch.randn(n, R, generator=generator, device=device)
    k_rope = torch.randn(n, D, generator=generator, device=device)
    reference.mla_cache_append(latent, k_rope, cache, slot)
    return cache, table


def mla_decode(
    generator: Generator,
    lengths: tuple[int, ...] | list[int],
    Sq: int = 1,
    H: int = 16,
    R: int = 512,
    D: int = 64,
    page: int = 64,
    dtype: torch.dtype = BF16,
    cache_dtype: torch.dtype = BF16,
    causal: bool = True,
    width: int | None = None,
    batch: int = 1,
) -> tuple:
    """`batch` times the sequences of `lengths`."""
    device = generator.device
    lengths = tuple(lengths) * batch
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    cache, table = paged(generator, seqlens, page, R, D, cache_dtype, width)
    q = torch.randn(len(lengths), Sq, H, R + D, generator=generator, device=device).to(dtype)
    return q, cache, table, seqlens, (R + D) ** -0.5, causal, R


def mla_cache_gather(
    generator: Generator,
    lengths: tuple[int, ...] | list[int],
    taken: tuple[int, ...] | None = None,
    R: int = 512,
    D: int = 64,
    page: int = 64,
    cache_dtype: torch.dtype = BF16,
    out_dtype: torch.dtype = BF16,
    more: int = 0,
) -> tuple:
    """The last `taken` tokens of each sequence (by default all, from 0 on), and `more` rows."""
    device = generator.device
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=device)
    cache, table = paged(generator, seqlens, page, R, D, cache_dtype)
    kept = lengths if taken is None else taken
    counts = torch.tensor((0, *kept), dtype=torch.int32, device=device)
    starts = None if taken is None else seqlens - counts[1:]
    offsets = counts.cumsum(0, dtype=torch.int32)
    return cache, table, offsets, sum(kept) + more, R, starts, out_dtype


def merge_states(
    generator: Generator,
    lead: tuple[int, ...],
    S: int,
    H: int,
    D: int,
    dtype: torch.dtype = BF16,
    empty: bool = True,
) -> tuple:
    """Two results; with `empty`, some queries of each saw nothing, and NaN stands there."""
    states = []
    for _ in range(2):
        out = torch.randn(*lead, S, H, D, generator=generator, device=generator.device).to(dtype)
        lse = torch.randn(*lead, H, S, generator=generator, device=generator.device) * 3
        if empty:
            nothing = torch.rand(lse.shape, generator=generator, device=generator.device) < 0.3
            lse = lse.masked_fill(nothing, -torch.inf)
            out = out.masked_fill(nothing.mT[..., None], torch.nan)
        states += [out, lse]
    return tuple(states)


def merge_states_backward(generator: Generator, lead, S, H, D, dtype=BF16, empty=True) -> tuple:
    device = generator.device
    grad_out = torch.randn(*lead, S, H, D, generator=generator, device=device).to(dtype)
    grad_lse = torch.randn(*lead, H, S, generator=generator, device=device)
    return grad_out, grad_lse, *merge_states(generator, lead, S, H, D, dtype, empty)


def mla_prefill(
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
    """`unused` rows before the first and past the last sequence are NaN."""
    device = generator.device
    made, boundaries = [], []
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
            made.append(x)
    return *made, *boundaries, Dqk**-0.5, causal


def mla_prefill_backward(
    generator: Generator, lengths: tuple[int, ...] | list[int], from_lse: bool = False, **size
) -> tuple:
    """`from_lse`: a gradient of lse as well."""
    q, k, v, *rest = mla_prefill(generator, lengths, **size)
    (T, H, _), Dv, device = q.shape, v.shape[2], q.device
    grad_out = torch.randn(T, H, Dv, generator=generator, device=device).to(q.dtype)
    grad_lse = torch.randn(H, T, generator=generator, device=device) if from_lse else None
    out, lse = torch.ops.deepkern.mla_prefill(q, k, v, *rest)
    return grad_out, q, k, v, out, lse, *rest, grad_lse


FP32 = {"dtype": torch.float32, "cache_dtype": torch.float32}
FP8 = {"cache_dtype": FP8_BYTES}

MERGED = Sizes(
    small=[
        {"lead": (2,), "S": 3, "H": 5, "D": 20},
        {"lead": (), "S": 9, "H": 3, "D": 128, "dtype": torch.float32},
        {"lead": (2, 1), "S": 1, "H": 2, "D": 600, "dtype": torch.float16},
        {"lead": (3,), "S": 0, "H": 4, "D": 16},
        {"lead": (), "S": 2, "H": 2, "D": 0},
    ],
    cpu=[{"lead": (), "S": 512, "H": 16, "D": 128}],
    gpu=[
        {"lead": (128,), "S": 1, "H": 128, "D": 512, "empty": False},
        {"lead": (), "S": 8192, "H": 128, "D": 128, "empty": False},
    ],
    inspect=[
        {"lead": (128,), "S": 1, "H": 128, "D": 512},
        {"lead": (), "S": 8192, "H": 128, "D": 128},
    ],
)

SIZES = {
    "merge_states": MERGED,
    "merge_states_backward": MERGED,
    "mla_cache_gather": Sizes(
        small=[
            {"lengths": (5, 0, 9), "taken": (3, 0, 9), "R": 64, "D": 16, "page": 4, "more": 3},
            {"lengths": (7, 20), "R": 192, "D": 8, "page": 16, **FP8},
            {"lengths": (7, 2), "R": 130, "D": 6, "page": 3, **FP8, "out_dtype": torch.float32},
            {"lengths": (5,), "R": 600, "D": 3, "page": 2, "cache_dtype": torch.float32},
            {"lengths": (3, 1), "R": 16, "D": 0, "page": 1, "out_dtype": torch.float16},
            {"lengths": (), "R": 16, "D": 4},
            {"lengths": (), "R": 16, "D": 4, "more": 3},
        ],
        cpu=[{"lengths": (1024,) * 4}, {"lengths": (1024,) * 4, **FP8}],
        gpu=[{"lengths": (4096,) * 16}, {"lengths": (4096,) * 16, **FP8}],
        inspect=[
            {"lengths": (4096,) * 2},
            {"lengths": (4096,) * 2, "taken": (2048,) * 2, **FP8},
        ],
    ),
    "mla_cache_append": Sizes(
        small=[
            {"T": 11},
            {"T": 9, **FP8},
            {"T": 5, "R": 130, "D": 6, "page": 3, **FP8, "dtype": torch.float32},
            {"T": 6, "R": 48, "D": 16, "page": 1, **FP32},
            {"T": 3, "norm": False, "rope": False, "dtype": torch.float16},
            {"T": 0},
        ],
        cpu=[{"T": 512}, {"T": 512, **FP8}],
        gpu=[{"T": 128}, {"T": 8192}, {"T": 8192, **FP8}],
        inspect=[{"T": 8192}, {"T": 8192, **FP8}],
    ),
    "mla_decode": Sizes(
        small=[
            {"lengths": (37, 0, 1), "Sq": 2, "H": 3, "R": 64, "D": 16, "page": 16},
            {"lengths": (700, 90), "H": 2, "R": 32, "D": 16, "page": 53, **FP32},
            {"lengths": (70,), "Sq": 1, "H": 16},
            {"lengths": (65,), "Sq": 1, "H": 9, **FP8},
            {"lengths": (3, 20), "Sq": 4, "H": 5, "R": 130, "D": 6, "page": 2, **FP8},
            {"lengths": (5, 9, 12, 30), "H": 1, "R": 64, "D": 0, "page": 1, "causal": False},
            {"lengths": ()},
            {"lengths": (4,), "H": 0},
            {"lengths": (0, 0), "H": 2, "R": 32, "D": 16},
        ],
        cpu=[{"lengths": (1024,) * 4, "H": 16}],
        gpu=[
            {"lengths": (8192,), "H": 128},
            {"lengths": (65536,), "H": 16},
            {"lengths": (65536,), "H": 128},
            {"lengths": (65536,), "H": 16, **FP8},
            {"lengths": (4096,), "batch": 32, "H": 16, "Sq": 4},
            {"lengths": (4096,), "batch": 32, "H": 64, "Sq": 2},
            {"lengths": (16384,), "batch": 32, "H": 64},
            {"lengths": (16384,), "batch": 32, "H": 64, **FP8},
            {"lengths": (65536,), "batch": 32, "H": 16},
            {"lengths": (1024,), "batch": 128, "H": 16},
            {"lengths": (1024, 16384), "batch": 64, "H": 16},
            {"lengths": (4096,), "batch": 128, "H": 16},
            {"lengths": (4096,), "batch": 128, "H": 16, **FP8},
            {"lengths": (4096,), "batch": 128, "H": 128},
            {"lengths": (8192,), "batch": 128, "H": 128},
            {"lengths": (8192,), "batch": 128, "H": 128, **FP8},
        ],
        inspect=[
            {"lengths": (4096,), "H": 16},
            {"lengths": (4096,), "H": 32},
            {"lengths": (4096,), "H": 128},
            {"lengths": (4096,), "H": 16, **FP8},
        ],
    ),
    "mla_prefill": Sizes(
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
    ),
    "mla_prefill_backward": Sizes(
        small=[
            {"lengths": (40, 0, 70), "H": 2, "unused": 2, "from_lse": True},
            {"lengths": (80, 9), "lengths_k": (60, 0), "H": 4, "Hk": 2, "Dqk": 40, "Dv": 24},
            {
                "lengths": (33, 5),
                "lengths_k": (20, 50),
                "H": 4,
                "Hk": 1,
                "Dqk": 24,
                "Dv": 16,
                "dtype": torch.float32,
                "causal": False,
                "unused": 1,
                "from_lse": True,
            },
            {"lengths": (20,), "H": 1, "Dqk": 64, "Dv": 64, "dtype": torch.float16},
            {"lengths": ()},
            {"lengths": (0, 0), "H": 2, "unused": 3},
            {"lengths": (4,), "lengths_k": (0,), "H": 2},
            {"lengths": (0,), "lengths_k": (4,), "H": 2},
            {"lengths": (4,), "H": 0, "Hk": 2},
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
            {"lengths": (4096,), "Dqk": 128},
            {"lengths": (1024,), "dtype": torch.float32},
        ],
    ),
}
