"""compat.deep_ep.ElasticBuffer over gloo: layouts, cached dispatches, combine, errors."""

from __future__ import annotations

import inspect
import os

import pytest

import deepkern.compat.deep_ep as deep_ep
from deepkern.testing import ranks
from tests.compat import elastic_checks as checks
from tests.experts.parallel_checks import assert_passed


@pytest.mark.parametrize(("world", "backend"), [(1, "torch"), (2, "triton"), (3, "torch")])
def test_ranks(world, backend):
    if backend == "triton" and "TRITON_INTERPRET" not in os.environ:
        pytest.skip("Triton kernels are not interpreted here")
    names = [name for name in vars(checks) if name.startswith("check_")]
    assert_passed(ranks.run(world, checks.everything, backend, timeout=240), names)


SIGNATURES = {  # deep_ep/buffers/elastic.py of DeepEP 2.1.0, commit dd758ca
    "__init__": "group num_bytes=None num_cpu_bytes=0 num_max_tokens_per_rank=0 hidden=0 "
    "num_topk=0 use_fp8_dispatch=False deterministic=False allow_hybrid_mode=True "
    "allow_multiple_reduction=True prefer_overlap_with_compute=True sl_idx=3 num_allocated_qps=0 "
    "num_cpu_timeout_secs=300 num_gpu_timeout_secs=100 explicitly_destroy=False",
    "dispatch": "x topk_idx=None topk_weights=None cumulative_local_expert_recv_stats=None "
    "num_experts=None num_max_tokens_per_rank=None expert_alignment=None num_sms=0 num_qps=0 "
    "previous_event=None previous_event_before_epilogue=None async_with_compute_stream=False "
    "allocate_on_comm_stream=False handle=None do_handle_copy=True do_cpu_sync=None "
    "do_expand=False do_zero_padding=False use_tma_aligned_col_major_sf=False",
    "combine": "x handle topk_weights=None bias=None num_sms=0 num_qps=0 previous_event=None "
    "previous_event_before_epilogue=None async_with_compute_stream=False "
    "allocate_on_comm_stream=False",
    "barrier": "use_comm_stream=True with_cpu_sync=False sequential=True",
    "get_theoretical_num_sms": "num_experts num_topk num_scaleout_topk=0 rdma_gbs=0 nvlink_gbs=0 "
    "sm_read_gbs=200 sm_write_gbs=50",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    function = getattr(deep_ep.ElasticBuffer, name)
    parameters = list(inspect.signature(function).parameters.values())[1:]
    got = [p.name + ("" if p.default is p.empty else f"={p.default}") for p in parameters]
    assert got == SIGNATURES[name].split()
