"""Inputs, sizes, cost and baseline of fp8_gemm_nt."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from ... import reference
from .. import gemms
from ..costs import Cost, tensor_bytes
from ..providers import Provider, library, prepared
from ..random_inputs import values
from . import Sizes

BF16, F32 = torch.bfloat16, torch.float32


def inputs(
    generator: Generator,
    M: int,
    N: int,
    K: int,
    out_dtype: torch.dtype = BF16,
    c: torch.dtype | None = None,
    b_rows: int = 128,
) -> tuple:
    """`b_rows`: rows of b that one scale covers, 128 or 1; `c`: the dtype of c, if given."""
    a, a_scale = reference.cast_per_token(values(generator, M, K))
    cast = reference.cast_per_block if b_rows == 128 else reference.cast_per_token
    b, b_scale = cast(values(generator, N, K))
    addend = None if c is None else values(generator, M, N, dtype=c)
    return a, a_scale, b, b_scale, out_dtype, addend


def _sizes_for_every_tile() -> list[dict]:
    """Shapes that between them choose every tile that a launch may choose on any architecture.

    Each once as it is common, and once as it takes the most registers: a partial block of K and
    c in fp32.
    """
    worst = {"c": F32, "out_dtype": F32}
    sizes = [{"M": M, "N": N, "K": K} for M in gemms.ROWS for N, K in gemms.LAYERS]
    return gemms.sizes_with_a_new_tile(sizes, 128) + [
        {**size, "K": size["K"] + 16, **worst, "b_rows": b_rows}
        for b_rows in (128, 1)
        for size in gemms.sizes_with_a_new_tile(sizes, b_rows)
    ]


VLLM = "vllm.model_executor.layers.quantization.utils.fp8_utils"
SIZES = Sizes(
    small=[
        {"M": 65, "N": 130, "K": 300, "c": F32},
        {"M": 1, "N": 256, "K": 256, "b_rows": 1, "out_dtype": torch.float16},
        {"M": 7, "N": 129, "K": 127, "c": BF16, "out_dtype": F32},
        {"M": 130, "N": 40, "K": 128, "b_rows": 1, "c": torch.float16},
        {"M": 0, "N": 128, "K": 128},
        {"M": 3, "N": 0, "K": 128},
        {"M": 3, "N": 5, "K": 0},
        {"M": 3, "N": 5, "K": 0, "c": F32},
    ],
    cpu=[{"M": M, "N": N, "K": K} for N, K in ((7168, 2048), (4096, 7168)) for M in (1, 4, 64)],
    gpu=[{"M": M, "N": N, "K": K} for N, K in gemms.V3 for M in (1, 16, 64, 128, 4096)],
    inspect=_sizes_for_every_tile(),
)
EXACT = False
FP8_PRODUCT = True


def cost(a: Tensor, b: Tensor, **rest) -> Cost:
    flops = 2 * a.shape[0] * a.shape[1] * b.shape[0]
    return Cost(tensor_bytes(a, b, rest), flops, fp8=True)


def baseline(a, a_scale, b, b_scale, out_dtype=BF16, c=None) -> Tensor:
    """Dequantize both to bf16, F.linear."""
    out = F.linear(*gemms.dequantize(a, a_scale, b, b_scale, _wide(out_dtype))).to(out_dtype)
    return out if c is None else (out + c).to(out_dtype)


def _wide(out_dtype: torch.dtype) -> torch.dtype:
    """The 16-bit type of the dequantized operands."""
    return BF16 if out_dtype == F32 else out_dtype


def providers(a, a_scale, b, b_scale, out_dtype, c, **rest) -> list[Provider]:
    """c is added after the call, untimed, except by DeepGEMM."""
    wide = _wide(out_dtype)

    def linear(dtype: torch.dtype) -> Callable:
        x, w = (operand.to(dtype) for operand in gemms.dequantize(a, a_scale, b, b_scale, wide))
        return lambda: F.linear(x, w)

    def outputs(out: Tensor) -> tuple[Tensor]:
        return (out.to(out_dtype) if c is None else (out + c).to(out_dtype),)

    bits = str(wide).removeprefix("torch.").replace("bfloat", "bf").replace("float", "fp")
    found = [
        Provider(f"linear_{bits}", f"F.linear in {bits}, operands dequantized before",
                 prepared(lambda: linear(wide)), outputs)
    ]  # fmt: skip
    if a.device.type == "cpu":  # it has no blockwise scaled_mm
        about = f"F.linear in fp32, operands dequantized to {bits} before"
        return [*found, Provider("linear_fp32", about, prepared(lambda: linear(F32)), outputs)]
    args = a, a_scale, b, b_scale, out_dtype
    about = "F.scaled_mm with blockwise scales: cuBLASLt"
    found.append(Provider("scaled_mm", about, prepared(lambda: scaled_mm(*args)), outputs))
    found += library("deep_gemm", "DeepGEMM's fp8_gemm_nt, scales transposed before",
                     lambda module: deep_gemm(module, *args, c))  # fmt: skip
    if b_scale.shape[0] == -(-b.shape[0] // 128) and a.shape[1] % 128 == b.shape[0] % 128 == 0:
        found += library(
            "vllm", "vLLM's Triton block-scaled product", lambda module: vllm(module, *args),
            module=VLLM, outputs=outputs,
        )  # fmt: skip
        found += library(
            "flashinfer", "FlashInfer's gemm_fp8_nt_groupwise (Blackwell only)",
            lambda module: flashinfer(module, *args), module="flashinfer.gemm", outputs=outputs,
        )  # fmt: skip
    return found + library(
        "transformer_engine", "Transformer Engine's general_gemm on Float8BlockwiseQTensors",
        lambda module: transformer_engine(module, *args), module="transformer_engine.pytorch",
        outputs=outputs,
    )  # fmt: skip


def scaled_mm(a, a_scale, b, b_scale, out_dtype) -> Callable[[], Tensor]:
    """cuBLASLt through torch. Scales are column-major; 128x128 scales are padded to 4 along K."""
    from torch.nn.functional import ScalingType

    per_row, per_block = ScalingType.BlockWise1x128, ScalingType.BlockWise128x128
    recipe = per_row if b_scale.shape[0] == b.shape[0] else per_block
    if recipe == per_block:
        y_scale = F.pad(b_scale, (0, -b_scale.shape[1] % 4)).contiguous().t()
    else:
        y_scale = column_major(b_scale)
    x_scale = column_major(a_scale)
    return lambda: F.scaled_mm(
        a, b.t(), x_scale, per_row, y_scale, recipe, output_dtype=out_dtype
    )  # fmt: skip


def transformer_engine(module: ModuleType, a, a_scale, b, b_scale, out_dtype) -> Callable:
    """cuBLASLt through Transformer Engine, on the same bytes and scales (2.3 and later)."""
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    x, w = (transformer_engine_tensor(module, *pair) for pair in ((a, a_scale), (b, b_scale)))
    # Later releases allocate the workspace themselves; 32 MiB is what theirs has on Hopper.
    takes_workspace = "workspace" in inspect.signature(general_gemm).parameters
    workspace = [a.new_empty(32 << 20, dtype=torch.uint8)] if takes_workspace else []
    return lambda: general_gemm(w, x, *workspace, out_dtype=out_dtype)[0]


def transformer_engine_tensor(module: ModuleType, q: Tensor, scale: Tensor):
    """A Float8BlockwiseQTensor; it stores 1x128 scales transposed, and pads rows of scales to 4."""
    import transformer_engine_torch

    per_row = scale.shape[0] == q.shape[0]
    quantizer = module.Float8BlockQuantizer(
        transformer_engine_torch.DType.kFloat8E4M3, rowwise=True, columnwise=False,
        block_scaling_dim=1 if per_row else 2,
    )  # fmt: skip
    out = quantizer.make_empty(q.shape, dtype=BF16, device=q.device)
    out._rowwise_data.copy_(q.view(torch.uint8))
    scale = scale.t() if per_row else scale
    out._rowwise_scale_inv.zero_()[: scale.shape[0], : scale.shape[1]].copy_(scale)
    return out


def column_major(scale: Tensor) -> Tensor:
    return scale.t().contiguous().t()


def deep_gemm(module: ModuleType, a, a_scale, b, b_scale, out_dtype, c) -> Callable:
    d = a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
    a_scale = module.get_mn_major_tma_aligned_tensor(a_scale)
    return lambda: module.fp8_gemm_nt((a, a_scale), (b, b_scale), d, c=c) or d


def vllm(module: ModuleType, a, a_scale, b, b_scale, out_dtype) -> Callable:
    product = module.w8a8_triton_block_scaled_mm
    return lambda: product(a, b, a_scale, b_scale, [128, 128], out_dtype)


def flashinfer(module: ModuleType, a, a_scale, b, b_scale, out_dtype) -> Callable:
    return lambda: module.gemm_fp8_nt_groupwise(
        a, b, a_scale, b_scale, scale_major_mode="K", out_dtype=out_dtype
    )
