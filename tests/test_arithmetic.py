"""deepkern/arithmetic.py: integers against Triton's, and the instructions of compiled kernels.

The floating-point formulas are tested in tests/experts/test_score.py and by the ops' own tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from deepkern.arithmetic import cdiv, next_power_of_2
from deepkern.reference import exact

ROOT = Path(__file__).parent.parent
COMPILE = """
import re, sys, torch, deepkern
from bench import compiling
from deepkern.runtime.arch import ARCHS
from deepkern.testing import ops
for size in ops.sizes(sys.argv[1]).inspect:
    with compiling.compiling(ARCHS["sm_90"]) as kernels, deepkern.backend("triton"):
        op = getattr(torch.ops.deepkern, sys.argv[1])
        op(*compiling.unwritten_arguments(sys.argv[1], size))
    print(*re.findall(r"(\\w+)[.\\w]*f32 ", kernels[0].asm["ptx"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "needs"),
    [
        ("route_topk", {"div", "sqrt"}),
        ("mla_cache_append", {"div", "sqrt"}),
        ("swiglu_cast", {"div"}),
        ("rmsnorm_cast", {"div", "sqrt"}),
    ],
)
def test_compiled_kernel_uses_exact_arithmetic(name, needs):
    """The PTX has no fused multiply-add and no approximate instruction."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    run = subprocess.run(
        [sys.executable, "-c", COMPILE, name], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    used = set(run.stdout.split())
    assert {"add", "mul", *needs} <= used
    assert used <= {"add", "sub", "mul", "div", "sqrt", "neg", "abs", "max", "setp", "selp", "cvt"}


@pytest.mark.parametrize("n", [0, 1, 2, 5, 128, 129])
def test_sum_of_pairs(n):
    x = torch.randint(-1000, 1000, (3, n)).float()  # exact in any order
    assert torch.equal(exact.sum_pairs(x), x.sum(1, keepdim=True))


def test_sum_of_pairs_order():
    """In fp32, 2^24 + 1 is 2^24: the two ones count only if they are added to each other first."""
    big = 2.0**24
    assert exact.sum_pairs(torch.tensor([[big, 0.0, 1.0, 1.0]])).item() == big + 2
    assert exact.sum_pairs(torch.tensor([[big, 1.0, 1.0, 0.0]])).item() == big


@pytest.mark.parametrize("n", [0, 1, 2, 3, 4, 5, 127, 128, 129, 2**31 - 1, 2**31, 2**40 + 1])
def test_integers_equal_those_of_triton(n):
    for by in (1, 2, 3, 128):
        assert cdiv(n, by) == triton.cdiv(n, by)
    # Triton gives 0 for 0; a tile of width 0 does not exist.
    assert next_power_of_2(n) == max(triton.next_power_of_2(n), 1)
