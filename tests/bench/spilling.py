"""Run without TRITON_INTERPRET: compiles a small matmul twice, the second time short of registers.

Prints the two records of `bench.assembly` for the target named, as a JSON list.
"""

import json
import sys

import torch
import triton
import triton.language as tl

from bench import assembly
from bench.compiling import compiling
from deepkern.runtime.arch import ARCHS


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, K, BLOCK: tl.constexpr, PLAIN: tl.constexpr):
    row, k = tl.arange(0, BLOCK), tl.arange(0, 64)
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, K, 64):
        a = tl.load(a_ptr + row[:, None] * K + start + k)
        b = tl.load(b_ptr + row[:, None] * K + start + k)
        if PLAIN:
            total += tl.sum(a.to(tl.float32), 1)[:, None] * tl.sum(b.to(tl.float32), 1)
        else:
            total += tl.dot(a, b.T)
    tl.store(c_ptr + row[:, None] * BLOCK + row, total)


if __name__ == "__main__":
    target = ARCHS[sys.argv[1]]
    a = torch.empty(128, 256, dtype=torch.bfloat16)
    c = torch.empty(128, 128)
    # AMD has no option like maxnreg: there, one wavefront cannot hold a 256x256 fp32 tile.
    few = {"BLOCK": 128, "maxnreg": 128}
    if target.backend == "hip":
        few = {"BLOCK": 256, "num_warps": 1}
    with compiling(target) as compiled:
        matmul[(1,)](a, a, c, 256, BLOCK=128, PLAIN=False, num_warps=8)
        matmul[(1,)](a, a, c, 256, PLAIN=False, **few)
        matmul[(1,)](a, a, c, 256, BLOCK=128, PLAIN=True, num_warps=8)
    print(json.dumps([assembly.read(kernel, target) for kernel in compiled]))
