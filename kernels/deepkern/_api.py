"""The public names of the package, and the import of every op. `deepkern` loads it at first use."""

from __future__ import annotations

from . import reference
from .attention.hadamard_cast import hadamard_cast
from .attention.hadamard_transform import hadamard_transform
from .attention.indexer_cache_append import indexer_cache_append
from .attention.merge_states import merge_states, merge_states_backward
from .attention.mla_cache_append import mla_cache_append
from .attention.mla_cache_gather import mla_cache_gather
from .attention.mla_decode import mla_decode
from .attention.mla_prefill import mla_prefill
from .attention.mla_prefill_backward import mla_prefill_backward
from .attention.mla_sparse_decode import mla_sparse_decode
from .attention.mla_sparse_prefill import mla_sparse_prefill, mla_sparse_prefill_backward
from .attention.mqa_logits import mqa_logits
from .attention.paged_mqa_logits import paged_mqa_logits
from .attention.topk_indices import topk_indices
from .experts.choose_replicas import choose_replicas, nearest_replicas
from .experts.exchange import ExpertParallelError
from .experts.expert_combine import expert_combine, expert_combine_backward
from .experts.expert_dispatch import expert_dispatch, expert_dispatch_backward
from .experts.expert_load import expert_load
from .experts.expert_parallel import ExpertParallel
from .experts.fp8_experts import fp8_experts
from .experts.moe_forward import moe_forward, moe_forward_backward
from .experts.placement_bound import gpu_loads, placement_bound
from .experts.plan_moves import plan_moves
from .experts.rebalance_experts import LoadStatistics, rebalance_experts
from .experts.route_topk import ROUTING, route_topk, route_topk_backward
from .experts.sequence_balance_loss import sequence_balance_loss, sequence_balance_loss_backward
from .experts.update_expert_bias import update_expert_bias
from .matmul.fp8_gemm_nt import fp8_gemm_nt
from .matmul.fp8_linear import FP8Linear, fp8_linear
from .matmul.gemm_nt import gemm_nt
from .matmul.k_grouped_fp8_gemm_nt import k_grouped_fp8_gemm_nt
from .matmul.m_grouped_fp8_gemm_nt_contiguous import m_grouped_fp8_gemm_nt_contiguous
from .matmul.m_grouped_fp8_gemm_nt_masked import m_grouped_fp8_gemm_nt_masked
from .matmul.m_grouped_gemm_nt_contiguous import m_grouped_gemm_nt_contiguous
from .quant.cast_back import cast_back
from .quant.cast_per_block import cast_per_block
from .quant.cast_per_channel import cast_per_channel
from .quant.cast_per_token import cast_per_token
from .quant.rmsnorm_cast import rmsnorm_cast
from .quant.swiglu import swiglu
from .quant.swiglu_cast import swiglu_cast, swiglu_cast_backward
from .runtime.backends import BackendError, Explanation, backend, explain
from .runtime.compiled import compiled, reachable
from .runtime.op import OPS
from .runtime.profile import profiled
from .runtime.ptx_library import KernelFailure

__all__ = [
    "backend",
    "BackendError",
    "cast_back",
    "cast_per_block",
    "cast_per_channel",
    "cast_per_token",
    "choose_replicas",
    "compiled",
    "expert_combine",
    "expert_combine_backward",
    "expert_dispatch",
    "expert_dispatch_backward",
    "expert_load",
    "ExpertParallel",
    "ExpertParallelError",
    "explain",
    "Explanation",
    "fp8_experts",
    "fp8_gemm_nt",
    "fp8_linear",
    "FP8Linear",
    "gemm_nt",
    "gpu_loads",
    "hadamard_cast",
    "hadamard_transform",
    "indexer_cache_append",
    "k_grouped_fp8_gemm_nt",
    "KernelFailure",
    "LoadStatistics",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
    "m_grouped_gemm_nt_contiguous",
    "merge_states",
    "merge_states_backward",
    "mla_cache_append",
    "mla_cache_gather",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_backward",
    "mla_sparse_decode",
    "mla_sparse_prefill",
    "mla_sparse_prefill_backward",
    "moe_forward",
    "moe_forward_backward",
    "mqa_logits",
    "nearest_replicas",
    "OPS",
    "paged_mqa_logits",
    "placement_bound",
    "plan_moves",
    "profiled",
    "reachable",
    "rebalance_experts",
    "reference",
    "rmsnorm_cast",
    "route_topk",
    "route_topk_backward",
    "ROUTING",
    "sequence_balance_loss",
    "sequence_balance_loss_backward",
    "swiglu",
    "swiglu_cast",
    "swiglu_cast_backward",
    "topk_indices",
    "update_expert_bias",
]
