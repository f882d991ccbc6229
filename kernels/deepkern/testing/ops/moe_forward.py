"""Inputs, sizes, cost and baseline of moe_forward."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import Cost, tensor_bytes
from ..providers import FP8_TOLERANCE, Provider, library, prepared
from ..random_inputs import small_integers
from ..routing import V3_LAYER, V3_TOKENS, expert_weights, indices, valid_experts, zipf_indices
from . import Sizes, cast_back, expert_combine, expert_dispatch, swiglu_cast

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
V3_BATCHES = [{"T": T, **V3_LAYER, "skewed": skewed} for T in V3_TOKENS for skewed in (False, True)]


def inputs(
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
    """`b_rows`: rows of a weight that one scale covers, 128 or 1.

    The layer casts sums to FP8. Where fp32 and float64 round a sum differently, about one FP8 code
    in 1e5 is off by one, an error of 1/16. To compare implementations, the sums before a cast are
    exact here: small integers, and scales that are powers of 2.
    """
    x = small_integers(generator, T, K).to(dtype)
    weights = torch.rand(T, topk, generator=generator, device=x.device)
    idx = zipf_indices(generator, T, E, topk) if skewed else indices(generator, T, E, topk, none)
    return x, weights, idx, *expert_weights(generator, E, K, I, b_rows)


SIZES = Sizes(
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
)
EXACT = False
FP8_PRODUCT = True


def cost(
    topk_idx: Tensor, w13: Tensor, w13_scale: Tensor, w2: Tensor, w2_scale: Tensor, **rest
) -> Cost:
    """Without the weights of experts that have no rows, and without intermediate results."""
    experts = valid_experts(topk_idx, len(w13))
    read = len(experts.unique())
    weights = sum(tensor_bytes(w[0]) * read for w in (w13, w13_scale, w2, w2_scale))
    flops = 2 * experts.numel() * (w13[0].numel() + w2[0].numel())
    return Cost(tensor_bytes(topk_idx, rest) + weights, flops, fp8=True)


def baseline(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale) -> Tensor:
    """Expert by expert: index, dequantize, F.linear; SiLU, cast, F.linear; index_add."""
    q, scale, group_index, _, handle = expert_dispatch.baseline(x, topk_idx, len(w13), cast="fp32")
    gate_up = grouped_linear(q, scale, w13, w13_scale, group_index, x.dtype)
    y = grouped_linear(*swiglu_cast.baseline(gate_up), w2, w2_scale, group_index, x.dtype)
    return expert_combine.baseline(y, topk_weights, handle)


def grouped_linear(a, a_scale, b, b_scale, group_index, dtype: torch.dtype) -> Tensor:
    """Each row times its group's matrix, both dequantized to `dtype`."""
    out = a.new_zeros((len(a), b.shape[1]), dtype=dtype)
    rows = 1 if b_scale.shape[1] == b.shape[1] else 128
    for g in group_index[group_index >= 0].unique().tolist():
        row = (group_index == g).nonzero()[:, 0]
        x = cast_back.baseline(a.view(torch.uint8)[row].view(FP8), a_scale[row], (1, 128), dtype)
        out[row] = F.linear(x, cast_back.baseline(b[g], b_scale[g], (rows, 128), dtype))
    return out


def providers(**arguments) -> list[Provider]:
    """Other libraries need bf16, V3's grid of 128 and one scale per 128x128."""
    x, w13, w13_scale = (arguments[name] for name in ("x", "w13", "w13_scale"))
    E, rows, K = w13.shape
    grid = K % 128 == 0 and rows % 256 == 0 and w13_scale.shape[1] * 128 == rows
    if x.dtype != torch.bfloat16 or not grid:
        return []
    about = "F.grouped_mm in bf16, weights dequantized before, no cast to FP8"
    prepare = prepared(lambda: _grouped_mm(**arguments))
    found = [Provider("grouped_mm", about, prepare, tolerance=FP8_TOLERANCE)]
    if not x.is_cuda:
        return found
    return [
        *found,
        *library("vllm", "vLLM's fused_experts", lambda module: _vllm(module, **arguments),
                 module="vllm.model_executor.layers.fused_moe", tolerance=FP8_TOLERANCE),
        *library("deep_gemm", "DeepGEMM's products in deepkern's layer",
                 lambda module: _deep_gemm(module, **arguments), tolerance=FP8_TOLERANCE),
    ]  # fmt: skip


def _grouped_mm(x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale) -> Callable[[], Tensor]:
    wide13, wide2 = (cast_back.baseline(w, s, (128, 128), x.dtype)
                     for w, s in ((w13, w13_scale), (w2, w2_scale)))  # fmt: skip

    def layer() -> Tensor:
        rows, _, _, counts, handle = expert_dispatch.baseline(x, topk_idx, len(w13))
        offsets = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(rows, wide13.mT, offs=offsets).chunk(2, 1)
        y = F.grouped_mm(F.silu(gate) * up, wide2.mT, offs=offsets)
        return expert_combine.baseline(y, topk_weights, handle)

    return layer


def _vllm(
    module: ModuleType, x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale
) -> Callable[[], Tensor]:
    config = importlib.import_module(f"{module.__name__}.config").fp8_w8a8_moe_quant_config(
        w1_scale=w13_scale, w2_scale=w2_scale, block_shape=[128, 128]
    )
    idx = topk_idx.int()
    return lambda: module.fused_experts(x, w13, w2, topk_weights, idx, quant_config=config)


def _deep_gemm(
    module: ModuleType, x, topk_weights, topk_idx, w13, w13_scale, w2, w2_scale
) -> Callable[[], Tensor]:
    """Experts start at multiples of 128 rows."""
    import deepkern

    def multiply(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, index: Tensor) -> Tensor:
        out = torch.empty(len(a), b.shape[1], dtype=x.dtype, device=x.device)
        module.m_grouped_fp8_gemm_nt_contiguous((a, a_scale), (b, b_scale), out, index)
        return out

    def layer() -> Tensor:
        q, scale, index, _, handle = deepkern.expert_dispatch(
            x, topk_idx, len(w13), None, 128, "fp32"
        )
        h = deepkern.swiglu_cast(multiply(q, scale, w13, w13_scale, index))
        y = multiply(*h, w2, w2_scale, index)
        return deepkern.expert_combine(y, topk_weights, handle)

    return layer
