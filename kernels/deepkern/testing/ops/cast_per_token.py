"""Inputs, sizes, cost and baseline of cast_per_token."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ..costs import each_tensor_once
from ..providers import Provider, library
from ..random_inputs import values
from . import Sizes

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def inputs(
    generator: Generator,
    M: int,
    K: int,
    G: int | None = None,
    dtype: torch.dtype = BF16,
    scale_format: str = "fp32",
    scale_layout: str = "row",
) -> tuple[Tensor, str, str]:
    shape = (M, K) if G is None else (G, M, K)
    return values(generator, *shape, dtype=dtype), scale_format, scale_layout


SIZES = Sizes(
    small=[
        {"M": 33, "K": 300},
        {"M": 1, "K": 128, "dtype": torch.float32, "scale_format": "ue8m0"},
        {"M": 70, "K": 129, "dtype": torch.float16},
        {"M": 33, "K": 130, "scale_layout": "column"},
        {"M": 5, "K": 200, "G": 3, "scale_layout": "column"},
        {"M": 0, "K": 128},
        {"M": 3, "K": 0},
        {"M": 0, "K": 128, "scale_layout": "column"},
    ],
    cpu=[{"M": 512, "K": 7168}],
    gpu=[
        {"M": 4096, "K": 7168},
        {"M": 64, "K": 7168},
        {"M": 8192, "K": 2048},
        {"M": 4096, "K": 7168, "scale_layout": "column"},
    ],
    inspect=[{"M": 4096, "K": 7168}, {"M": 4096, "K": 7168, "scale_layout": "column"}],
)
EXACT = True
cost = each_tensor_once


def baseline(
    x: Tensor, scale_format: str = "fp32", scale_layout: str = "row"
) -> tuple[Tensor, Tensor]:
    """amax, divide and cast, op by op."""
    K = x.shape[-1]
    blocks = F.pad(x, (0, -K % 128)).unflatten(-1, (-1, 128)).float()
    scale = block_scale(blocks.abs().amax(-1), scale_format)
    q = (blocks / scale[..., None]).clamp(-448, 448).to(FP8)
    return q.flatten(-2)[..., :K], with_layout(scale, scale_layout)


def block_scale(amax: Tensor, scale_format: str) -> Tensor:
    """The scale of blocks whose largest magnitude is `amax`."""
    scale = amax.clamp(min=1e-4) / 448
    if scale_format == "ue8m0":
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    # A block with NaN or inf has scale NaN.
    return torch.where(amax.isfinite(), scale, torch.nan)


def with_layout(scale: Tensor, layout: str) -> Tensor:
    """The scales stored by row or by column."""
    return scale if layout == "row" else scale.mT.contiguous().mT


def providers(x, scale_format, scale_layout, **rest) -> list[Provider]:
    if not x.is_cuda or x.dim() != 2 or x.shape[1] % 128:
        return []
    power_of_2, column = scale_format == "ue8m0", scale_layout == "column"
    found = library(
        "vllm", "vLLM's per_token_group_quant_fp8",
        lambda module: lambda: module.per_token_group_quant_fp8(
            x, 128, use_ue8m0=power_of_2, column_major_scales=column
        ),
        module="vllm.model_executor.layers.quantization.utils.fp8_utils",
    )  # fmt: skip
    return found + library(
        "transformer_engine", "Transformer Engine's Float8BlockQuantizer, 1x128",
        lambda module: transformer_engine(module, x, power_of_2, 1),
        module="transformer_engine.pytorch",
        outputs=lambda got: (got._rowwise_data.view(FP8), got._rowwise_scale_inv.t()[: len(x)]),
    )  # fmt: skip


def transformer_engine(
    module: ModuleType, x: Tensor, power_of_2: bool, dimensions: int
) -> Callable[[], object]:
    """A cast with one scale per 1x128 (`dimensions` 1) or 128x128 (2)."""
    import transformer_engine_torch

    quantizer = module.Float8BlockQuantizer(
        transformer_engine_torch.DType.kFloat8E4M3, rowwise=True, columnwise=False,
        amax_epsilon=0.0, force_pow_2_scales=power_of_2, block_scaling_dim=dimensions,
    )  # fmt: skip
    return lambda: quantizer(x)
