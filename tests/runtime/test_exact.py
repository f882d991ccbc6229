"""runtime/exact.py: what the interpreter cannot show of kernels that promise the reference's bits.

The formulas themselves are tested in tests/experts/test_score.py and by the ops' own tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from deepkern.reference import exact

ROOT = Path(__file__).parent.parent.parent
COMPILE = """
import re, sys, torch, deepkern
from bench import compiling
from deepkern.runtime.arch import ARCHS
from deepkern.testing import inputs
for size in inputs.sizes(sys.argv[1]).inspect:
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
def test_compiled_kernel_has_no_other_arithmetic(name, needs):
    """Neither fused multiply-adds nor approximations."""
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


def test_sum_of_pairs_has_its_order():
    """In fp32, 2^24 + 1 is 2^24: the ones count only where they meet each other first."""
    big = 2.0**24
    assert exact.sum_pairs(torch.tensor([[big, 0.0, 1.0, 1.0]])).item() == big + 2
    assert exact.sum_pairs(torch.tensor([[big, 1.0, 1.0, 0.0]])).item() == big
