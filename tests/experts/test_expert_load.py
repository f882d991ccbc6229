"""expert_load: against a Counter, hostile indices, the counts of dispatch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import deepkern
from deepkern.testing import ops
from deepkern.testing.routing import indices

HOSTILE = [-1, -2, -(2**31), -(2**63), 2**63 - 1, 2**32, 2**32 + 1, 100]


@pytest.mark.parametrize("name", ["torch", "triton"])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_against_a_counter(name, data):
    E, topk = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 4))
    expert = st.integers(0, E - 1) | st.sampled_from(HOSTILE)
    rows = data.draw(st.lists(st.lists(expert, min_size=topk, max_size=topk), max_size=9))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    topk_idx = torch.tensor(rows, dtype=torch.int64, device=device).view(len(rows), topk)
    with deepkern.backend(name):
        load = deepkern.expert_load(topk_idx, E)
    counts = Counter(e for row in rows for e in row)
    assert load.dtype == torch.int32 and load.tolist() == [counts[e] for e in range(E)]


def test_equals_dispatch_counts(backend, generator):
    """Several chunks; strided rows of int32."""
    topk_idx = indices(generator, 300, 20, 4).clamp(-5, 30).int()[:, 1:3]
    load = deepkern.expert_load(topk_idx, 20)
    x = torch.zeros(300, 1, device=load.device)
    assert torch.equal(load, deepkern.expert_dispatch(x, topk_idx, 20)[3])


def test_bad_num_experts(backend, device):
    with pytest.raises(ValueError, match="expert_load: num_experts: expected at least 1, got 0"):
        deepkern.expert_load(torch.zeros(2, 1, device=device).long(), 0)


@pytest.mark.gpu
@pytest.mark.parametrize("size", ops.sizes("expert_load").gpu, ids=str)
def test_gpu_sizes(backend, size, generator):
    args = ops.inputs("expert_load", generator, **size)
    want = deepkern.reference.expert_load(*args)
    assert torch.equal(deepkern.expert_load(*args), want)
