"""A row of a batch has the same bits as alone, in compiled form."""

from __future__ import annotations

import pytest
import torch

import deepkern
from deepkern.testing import compare, ops

# The arguments with one row for each row of the outputs.
ROWS = {
    "cast_per_token": ("x",),
    "fp8_gemm_nt": ("a", "a_scale", "c"),
    "gemm_nt": ("a",),
    "m_grouped_gemm_nt_contiguous": ("a", "group_index"),
    "mla_decode": ("q", "block_table", "cache_seqlens"),
    "rmsnorm_cast": ("x", "residual"),
    "route_topk": ("logits",),
    "swiglu": ("gate_up",),
    "swiglu_cast": ("gate_up", "weights"),
    "topk_indices": ("logits", "lengths"),
}


def call(name: str, arguments: dict, target: str, seed: int) -> tuple:
    """The outputs on copies of the arguments: some ops write their inputs."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments.values()]
    with deepkern.backend("triton"), deepkern.compiled(target, seed=seed):
        return compare.as_tuple(getattr(torch.ops.deepkern, name)(*copies))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_90", pytest.param("sm_120", marks=pytest.mark.proof)])
@pytest.mark.parametrize("name", ROWS)
def test_row_bits_independent_of_batch(name, target, generator, seed):
    args = ops.inputs(name, generator, **ops.sizes(name).small[0])
    arguments = ops.by_name(name, deepkern.OPS[name].positional(args))
    together = call(name, arguments, target, seed)
    count = len(arguments[ROWS[name][0]])
    for row in {0, count // 2, count - 1}:
        own = {
            key: value[row : row + 1] if key in ROWS[name] and value is not None else value
            for key, value in arguments.items()
        }
        alone = call(name, own, target, seed + 1)
        for i, (a, b) in enumerate(zip(alone, together, strict=True)):
            if isinstance(a, torch.Tensor) and len(a) == 1:
                compare.assert_bitwise(a, b[row : row + 1], f"{name} output {i}, row {row}")
