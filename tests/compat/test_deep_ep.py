"""compat.deep_ep.Buffer over gloo: the checks of DeepEP's tests, and ranks without tokens."""

from __future__ import annotations

import inspect
import os

import pytest

import deepkern.compat.deep_ep as deep_ep
from deepkern.testing import ranks
from tests.compat import deep_ep_checks as checks
from tests.experts.parallel_checks import assert_passed


@pytest.mark.parametrize(("world", "backend"), [(1, "torch"), (2, "triton"), (3, "torch")])
def test_ranks(world, backend):
    if backend == "triton" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton kernels are not interpreted here")
    names = [name for name in vars(checks) if name.startswith("check_")]
    assert_passed(ranks.run(world, checks.everything, backend, timeout=240), names)


def test_signatures():
    """The arguments, their order and defaults, as in deep_ep/buffers/legacy.py of DeepEP 2.1."""
    want = {
        "dispatch": "x handle=None num_tokens_per_rank=None num_tokens_per_rdma_rank=None "
        "is_token_in_rank=None num_tokens_per_expert=None topk_idx=None topk_weights=None "
        "expert_alignment=1 num_worst_tokens=0 config=None previous_event=None async_finish=False "
        "allocate_on_comm_stream=False",
        "combine": "x handle topk_weights=None bias=None config=None previous_event=None "
        "async_finish=False allocate_on_comm_stream=False",
        "get_dispatch_layout": "topk_idx num_experts previous_event=None async_finish=False "
        "allocate_on_comm_stream=False",
        "low_latency_dispatch": "x topk_idx num_max_dispatch_tokens_per_rank num_experts "
        "cumulative_local_expert_recv_stats=None dispatch_wait_recv_cost_stats=None use_fp8=True "
        "round_scale=False use_ue8m0=False async_finish=False return_recv_hook=False",
        "low_latency_combine": "x topk_idx topk_weights handle use_logfmt=False zero_copy=False "
        "async_finish=False return_recv_hook=False out=None combine_wait_recv_cost_stats=None",
        "__init__": "group num_nvl_bytes=0 num_rdma_bytes=0 low_latency_mode=False "
        "num_qps_per_rank=24 allow_nvlink_for_low_latency_mode=True allow_mnnvl=False "
        "explicitly_destroy=False enable_shrink=False comm=None",
    }
    for name, arguments in want.items():
        parameters = list(inspect.signature(getattr(deep_ep.Buffer, name)).parameters.values())[1:]
        got = [p.name + ("" if p.default is p.empty else f"={p.default}") for p in parameters]
        assert got == arguments.split()
