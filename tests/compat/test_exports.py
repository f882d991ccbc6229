"""The names that DeepGEMM, FlashMLA and DeepEP export: each exists, or says what to use instead.

The lists are the names (no code) of the public files at the versions below.
"""

from __future__ import annotations

import pytest

from deepkern.compat import deep_ep, deep_gemm, flash_mla
from deepkern.compat.unsupported import UnsupportedName

EXPORTS = {
    # deep_gemm/__init__.py and deep_gemm/utils, version 2.8.0, commit 0274ad7
    deep_gemm: """
        set_num_sms get_num_sms set_tc_util get_tc_util set_ignore_compile_dims
        set_block_size_multiple_of set_pdl get_pdl use_deterministic_algorithms
        cublaslt_gemm_nt cublaslt_gemm_nn cublaslt_gemm_tn cublaslt_gemm_tt cublaslt_nvfp4_gemm_nt
        batched_syrk batched_symm
        fp8_fp4_gemm_nt fp8_fp4_gemm_nn fp8_fp4_gemm_tn fp8_fp4_gemm_tt
        m_grouped_fp8_fp4_gemm_nt_contiguous m_grouped_fp8_fp4_gemm_nn_contiguous
        m_grouped_fp8_fp4_gemm_nt_masked
        fp4_gemm_nt fp8_gemm_nt fp8_gemm_nn fp8_gemm_tn fp8_gemm_tt fp8_gemm_nt_skip_head_mid
        m_grouped_fp4_gemm_nt_contiguous m_grouped_fp8_gemm_nt_contiguous
        m_grouped_fp8_gemm_nn_contiguous m_grouped_fp4_gemm_nt_masked m_grouped_fp8_gemm_nt_masked
        k_grouped_fp4_gemm_nt_contiguous k_grouped_fp8_gemm_nt_contiguous
        k_grouped_fp8_gemm_tn_contiguous
        bf16_gemm_nt bf16_gemm_nn bf16_gemm_tn bf16_gemm_tt
        m_grouped_bf16_gemm_nt_contiguous m_grouped_bf16_gemm_nn_contiguous
        m_grouped_bf16_gemm_nt_masked k_grouped_bf16_gemm_tn_contiguous
        bf16_mega_gate get_bf16_mega_gate_config einsum fp8_einsum
        fp8_fp4_mqa_logits get_mqa_logits_metadata get_paged_mqa_logits_metadata
        get_sparse_mqa_logits_metadata get_paged_sparse_mqa_logits_metadata
        fp8_fp4_sparse_mqa_logits fp8_fp4_paged_sparse_mqa_logits fp8_fp4_paged_mqa_logits
        fp8_mqa_logits fp8_paged_mqa_logits mega_mhc tf32_hc_prenorm_gemm
        transform_sf_into_required_layout get_block_m_for_mega_moe
        SymmBuffer SM90SymmBuffer get_symm_buffer_for_mega_moe get_symm_buffer_for_sm90_mega_moe
        transform_weights_for_mega_moe transform_weights_for_mega_moe_sm90
        fp8_fp4_mega_moe fp8_mega_moe fp4_fp4_mega_moe bf16_mega_moe
        testing utils legacy mega
        get_tma_aligned_size get_mn_major_tma_aligned_tensor
        get_mn_major_tma_aligned_packed_ue8m0_tensor
        get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor
        set_mk_alignment_for_contiguous_layout get_mk_alignment_for_contiguous_layout
        get_theoretical_mk_alignment_for_contiguous_layout
        get_m_alignment_for_contiguous_layout get_k_alignment_for_contiguous_layout
        ceil_div align ceil_to_ue8m0 pack_ue8m0_to_int unpack_ue8m0_from_int
        per_token_cast_to_fp8 per_channel_cast_to_fp8 per_block_cast_to_fp8
        per_custom_dims_cast_to_fp8 per_token_cast_to_fp4 transpose_packed_fp4 cast_back_from_fp4
        init_dist uneven_all_gather
        """
    # of earlier releases: 2.6.1, commit 54e2261, and 1.0
    """
        fp8_m_grouped_gemm_nt_masked bf16_m_grouped_gemm_nt_masked
        gemm_fp8_fp8_bf16_nt m_grouped_gemm_fp8_fp8_bf16_nt_contiguous
        m_grouped_gemm_fp8_fp8_bf16_nt_masked
        wgrad_gemm_fp8_fp8_fp32_nt k_grouped_wgrad_gemm_fp8_fp8_fp32_nt
        get_col_major_tma_aligned_tensor
        """,
    # flash_mla/__init__.py, commit 136b361
    flash_mla: """
        get_mla_metadata flash_mla_with_kvcache flash_attn_varlen_func
        flash_attn_varlen_qkvpacked_func flash_attn_varlen_kvpacked_func flash_mla_sparse_fwd
        fused_norm_rope_attn_rope_cast
        """,
    # deep_ep/__init__.py, version 2.1.0, commit dd758ca
    deep_ep: """
        Buffer ElasticBuffer EPHandle EventOverlap EventHandle Config topk_idx_t
        get_physical_domain_size get_logical_domain_size
        find_cuda_home find_nccl_root check_nccl_so init_jit
        """,
    # deep_ep/buffers/legacy.py
    deep_ep.Buffer: """
        destroy is_sm90_compiled set_num_sms capture get_low_latency_rdma_size_hint
        get_comm_stream get_local_buffer_tensor get_dispatch_config get_combine_config
        get_dispatch_layout dispatch combine internode_dispatch internode_combine
        clean_low_latency_buffer low_latency_dispatch low_latency_combine
        low_latency_update_mask_buffer low_latency_query_mask_buffer low_latency_clean_mask_buffer
        get_next_low_latency_combine_buffer
        """,
    # deep_ep/buffers/elastic.py
    deep_ep.ElasticBuffer: """
        destroy get_buffer_size_hint get_engram_storage_size_hint get_pp_buffer_size_hint
        get_agrs_num_max_session_bytes get_agrs_buffer_size_hint barrier capture get_comm_stream
        get_physical_domain_size get_logical_domain_size engram_write engram_fetch pp_set_config
        pp_send pp_recv create_agrs_session destroy_agrs_session agrs_new_session agrs_set_config
        agrs_get_inplace_tensor all_gather get_theoretical_num_sms get_theoretical_num_qps
        dispatch combine
        """,
}
CASES = [
    pytest.param(owner, name, id=f"{owner.__name__.removeprefix('deepkern.compat.')}-{name}")
    for owner, names in EXPORTS.items()
    for name in names.split()
]


@pytest.mark.parametrize(("owner", "name"), CASES)
def test_name_exists_or_says_what_to_use(owner, name):
    try:
        value = getattr(owner, name)
    except UnsupportedName as error:
        assert not hasattr(owner, name)
        message = str(error)
        assert f"{owner.__name__}.{name}: deepkern does not have " in message
        reason = message.split("deepkern does not have ")[1]
        assert "; " in reason or "and needs none" in reason
    else:
        assert value is not None


@pytest.mark.parametrize("owner", [deep_gemm, flash_mla, deep_ep], ids=lambda m: m.__name__)
def test_unknown_name(owner):
    with pytest.raises(AttributeError, match="has no attribute 'fp8_gem_nt'") as caught:
        owner.fp8_gem_nt  # noqa: B018
    assert type(caught.value) is AttributeError


def test_unknown_method():
    with pytest.raises(AttributeError, match="'ElasticBuffer' has no attribute 'send'"):
        deep_ep.ElasticBuffer.send  # noqa: B018


def test_deterministic_algorithms_are_accepted():
    assert deep_gemm.use_deterministic_algorithms(True) is None
    assert deep_gemm.use_deterministic_algorithms(False) is None
