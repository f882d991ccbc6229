"""Run without TRITON_INTERPRET: launches through Triton's own launcher, with its C parts replaced.

Prints a JSON object: what each launch raised, or null.
"""

import json
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

import deepkern
from bench.compiling import compiling
from deepkern.runtime.arch import ARCHS


class Pair(NamedTuple):
    out: torch.Tensor
    tile: TensorDescriptor


@triton.jit
def tuple_kernel(pair):
    tl.store(pair.out + tl.arange(0, 64), tl.sum(pair.tile.load([0, 0]), 0))


@triton.jit
def separate_kernel(out, tile):
    tl.store(out + tl.arange(0, 64), tl.sum(tile.load([0, 0]), 0))


def raised(launch) -> str | None:
    """The error of a launch for sm_90, as "Type: text"."""
    try:
        with compiling(ARCHS["sm_90"]):
            launch()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def gemm(a: torch.Tensor) -> str | None:
    """The error of fp8_gemm_nt with `a` [M, K]."""
    M, K = a.shape
    b = torch.zeros(256, K, dtype=torch.float8_e4m3fn)
    scale, b_scale = torch.ones(M, -(-K // 128)), torch.ones(2, -(-K // 128))
    launch = deepkern.fp8_gemm_nt.op.launcher("triton")
    return raised(lambda: launch(a, scale, b, b_scale, torch.bfloat16, None))


if __name__ == "__main__":
    x = torch.zeros(64, 64)
    out = torch.zeros(64)
    overlapping = TensorDescriptor(x, [64, 64], [16, 1], [64, 64])
    descriptor = TensorDescriptor(x, [64, 64], [64, 1], [64, 64])
    fp8 = torch.zeros(64 * 256, dtype=torch.float8_e4m3fn)
    print(json.dumps({
        "separate": raised(lambda: separate_kernel[(1,)](out, descriptor)),
        "in a tuple": raised(lambda: tuple_kernel[(1,)](Pair(out, descriptor))),
        "overlapping": raised(lambda: separate_kernel[(1,)](out, overlapping)),
        "gemm contiguous": gemm(fp8.view(64, 256)),
        "gemm expanded": gemm(fp8[:256].expand(64, 256)),
        "gemm sliding": gemm(fp8.as_strided((64, 256), (128, 1))),
        "gemm one row": gemm(fp8.as_strided((1, 256), (8, 1))),
    }))  # fmt: skip
