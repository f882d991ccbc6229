"""Inputs, sizes, cost and baseline of mla_decode."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import vllm_cpu
from ..caches import BF16, FP8, FP32, gather_pages, paged_cache
from ..costs import Cost, row_bytes, tensor_bytes
from ..providers import Provider, allow_recompilations, library, prepared
from . import Sizes


def inputs(
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
    cache, table = paged_cache(generator, seqlens, page, R, D, cache_dtype, width)
    q = torch.randn(len(lengths), Sq, H, R + D, generator=generator, device=device).to(dtype)
    return q, cache, table, seqlens, (R + D) ** -0.5, causal, R


SIZES = Sizes(
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
)
EXACT = False


def cost(
    q: Tensor,
    cache: Tensor,
    block_table: Tensor,
    cache_seqlens: Tensor,
    v_head_dim: int,
    result,
    **rest,
) -> Cost:
    """Reads each cached token of a sequence once, however many queries it has."""
    capacity = block_table.shape[1] * cache.shape[1]
    tokens = int(cache_seqlens.clamp(0, capacity).sum())
    flops_per_token = 2 * q.shape[1] * q.shape[2] * (q.shape[3] + v_head_dim)
    moved = tokens * row_bytes(cache) + tensor_bytes(q, block_table, cache_seqlens, result)
    return Cost(moved, tokens * flops_per_token)


def baseline(
    q, cache, block_table, cache_seqlens, softmax_scale, causal=True, v_head_dim=512
) -> tuple[Tensor, None]:
    """Gather the cache, SDPA with the heads as rows."""
    B, Sq, H = q.shape[:3]
    blocks, page = cache.shape[:2]
    keys = gather_pages(cache, block_table, v_head_dim, q.dtype)  # [B, S, R + D]
    position = torch.arange(keys.shape[1], device=q.device)
    limit = cache_seqlens.clamp(0, keys.shape[1]).long()[:, None, None]  # [B, 1, 1]
    if causal:
        limit = limit - (Sq - 1 - torch.arange(Sq, device=q.device)[:, None])
    visible = position < limit  # [B, Sq or 1, S]
    in_table = ((block_table >= 0) & (block_table < blocks)).repeat_interleave(page, 1)
    mask = (visible & in_table[:, None]).expand(B, Sq, -1)  # [B, Sq, S]
    # A masked key may be NaN, and 0 * NaN would be NaN.
    keys = keys.masked_fill(~mask.any(1)[..., None], 0)[:, None]  # [B, 1, S, R + D]
    # All heads attend to the same keys, so they are passed as rows of one head.
    row_mask = mask.repeat_interleave(H, 1)[:, None]  # [B, 1, Sq * H, S]
    out = F.scaled_dot_product_attention(
        q.flatten(1, 2)[:, None], keys, keys[..., :v_head_dim], row_mask, scale=softmax_scale
    )
    out = out.masked_fill(~row_mask.any(-1, keepdim=True), 0)  # nothing to attend to
    return out.view(B, Sq, H, v_head_dim), None


def providers(**arguments) -> list[Provider]:
    q, cache = arguments["q"], arguments["cache"]
    found = [
        Provider("sdpa", f"SDPA in {short(q.dtype)}, the heads as rows, keys gathered before",
                 prepared(lambda: gathered_sdpa(q.dtype, **arguments)), without_lse)
    ]  # fmt: skip
    published = q.dtype == cache.dtype == BF16 and q.shape[3] == 576 and q.shape[1] > 0
    if q.device.type != "cuda":
        if q.dtype != torch.float32:
            about = "SDPA in fp32, the heads as rows, keys gathered before"
            prepare = prepared(lambda: gathered_sdpa(torch.float32, **arguments))
            found.append(Provider("sdpa_fp32", about, prepare, without_lse))
        return found + (vllm_cpu.mla_decode(**arguments) if published else [])
    about = "FlexAttention, compiled, keys gathered before"
    found.append(
        Provider("flex_attention", about, prepared(lambda: flex(**arguments)), flex_outputs)
    )
    if published and cache.shape[1] == 64:
        found += library(
            "flash_mla", "FlashMLA's flash_mla_with_kvcache",
            lambda module: flash_mla(module, **arguments), outputs=flash_mla_outputs,
        )  # fmt: skip
        found += library(
            "flashinfer", "FlashInfer's BatchMLAPagedAttentionWrapper",
            lambda module: flashinfer(module, **arguments), module="flashinfer.mla",
            outputs=lambda out: (out.view(*q.shape[:3], -1), None),
        )  # fmt: skip
    return found


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")


def gathered_sdpa(
    dtype: torch.dtype, q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim,
    **rest,
) -> Callable[[], Tensor]:  # fmt: skip
    """[B, Sq, H, R]; with a mask only if the sequences need one."""
    H, S = q.shape[2], int(cache_seqlens.max()) if len(q) else 0
    keys = gather_pages(cache, block_table, v_head_dim, dtype)[:, :S]
    limit = visible_tokens(q, cache_seqlens, causal)
    mask = torch.arange(S, device=q.device) < limit[..., None]  # [B, Sq, S]
    keys = keys.masked_fill(~mask.any(1)[..., None], 0)[:, None]
    row_mask = None if mask.all() else mask.repeat_interleave(H, 1)[:, None]
    query, shape = q.to(dtype).flatten(1, 2)[:, None], q.shape[:3]

    def call() -> Tensor:
        out = F.scaled_dot_product_attention(
            query, keys, keys[..., :v_head_dim], row_mask, scale=softmax_scale
        )
        return out.view(*shape, v_head_dim)

    return call


def without_lse(out: Tensor) -> tuple[Tensor, None]:
    return out, None


def visible_tokens(q: Tensor, cache_seqlens: Tensor, causal: bool) -> Tensor:
    """How many tokens each query sees: [B, Sq]."""
    later = torch.arange(q.shape[1] - 1, -1, -1, device=q.device)
    return cache_seqlens[:, None] - (later if causal else torch.zeros_like(later))


def flex(
    q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim, **rest
) -> Callable[[], object]:
    """FlexAttention on the absorbed latents: all heads have one key.

    Where torch does not compile it, past its limit of recompilations too, the call raises.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    allow_recompilations()
    keys = gather_pages(cache, block_table, v_head_dim, q.dtype).nan_to_num()[:, None]
    limit = visible_tokens(q, cache_seqlens, causal)
    mask = create_block_mask(
        lambda b, h, query, key: key < limit[b, query],
        len(q), None, q.shape[1], keys.shape[2], device=q.device,
    )  # fmt: skip
    compiled, query = torch.compile(flex_attention, fullgraph=True), q.transpose(1, 2)
    values = keys[..., :v_head_dim]
    return lambda: compiled(
        query, keys, values, block_mask=mask, scale=softmax_scale, enable_gqa=True
    )


def flex_outputs(out: Tensor) -> tuple[Tensor, None]:
    return out.transpose(1, 2), None


def flash_mla(
    module: ModuleType, q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim,
    **rest,
) -> Callable[[], object]:  # fmt: skip
    cache = cache.contiguous()
    metadata = module.get_mla_metadata(cache_seqlens, q.shape[1] * q.shape[2], 1)
    call = module.flash_mla_with_kvcache
    return lambda: call(
        q, cache, block_table, cache_seqlens, v_head_dim, *metadata, softmax_scale, causal
    )


def flash_mla_outputs(result: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """FlashMLA's lse of a query without keys is +inf."""
    out, lse = result
    return out, lse.masked_fill(lse == torch.inf, -torch.inf)


def flashinfer(
    module: ModuleType, q, cache, block_table, cache_seqlens, softmax_scale, causal, v_head_dim,
    **rest,
) -> Callable[[], object]:  # fmt: skip
    (B, Sq, H, W), page, R = q.shape, cache.shape[1], v_head_dim
    pages = (cache_seqlens + page - 1) // page
    position = torch.arange(block_table.shape[1], device=q.device)
    page_list = block_table[position < pages[:, None]]
    wrapper = module.BatchMLAPagedAttentionWrapper(
        torch.empty(128 << 20, dtype=torch.int8, device=q.device)
    )
    wrapper.plan(
        torch.arange(B + 1, dtype=torch.int32, device=q.device) * Sq,
        F.pad(pages.cumsum(0), (1, 0)).int(), page_list, cache_seqlens, H, R, W - R, page, causal,
        softmax_scale, q.dtype, cache.dtype,
    )  # fmt: skip
    parts = [x.contiguous() for whole in (q.flatten(0, 1), cache[:, :, 0])
             for x in whole.split((R, W - R), -1)]  # fmt: skip
    return lambda: wrapper.run(*parts)
