"""Names that DeepGEMM, FlashMLA and DeepEP export and deepkern does not have.

Each table maps a name to the reason and the alternative. The lists of exported names were read from

- DeepGEMM 2.8.0, deep_gemm/__init__.py of commit 0274ad7, and the names of 2.6.1 (commit 54e2261),
  deep_gemm/utils included
- FlashMLA, flash_mla/__init__.py of commit 136b361
- DeepEP 2.1.0, deep_ep/__init__.py, buffers/legacy.py and buffers/elastic.py of commit dd758ca

A module or class raises `UnsupportedName` for a name in its table. That is an AttributeError, so
`hasattr` and `getattr(module, name, default)` work.
"""

from __future__ import annotations

from collections.abc import Callable


class UnsupportedName(AttributeError):
    """A name of the original library that deepkern lacks; the message gives an alternative."""


def by_name(reasons: dict[str, str]) -> dict[str, str]:
    """{reason: "name name ..."} -> {name: reason}."""
    return {name: reason for reason, names in reasons.items() for name in names.split()}


def module_getattr(module: str, table: dict[str, str]) -> Callable[[str], object]:
    """`__getattr__` of a module that refuses the names of `table` with their reason."""

    def __getattr__(name: str) -> object:
        if name in table:
            raise UnsupportedName(f"{module}.{name}: deepkern does not have {table[name]}")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return __getattr__


class _PartialMeta(type):
    """`PartialClass`'s behaviour for names that are read from the class itself."""

    def __getattr__(cls, name: str) -> object:
        raise _missing(cls, name)


class PartialClass(metaclass=_PartialMeta):
    """Base of a class with part of the original's members; `UNSUPPORTED` has the others."""

    UNSUPPORTED: dict[str, str] = {}

    def __getattr__(self, name: str) -> object:
        raise _missing(type(self), name)


def _missing(cls: type[PartialClass], name: str) -> AttributeError:
    if name in cls.UNSUPPORTED:
        reason = cls.UNSUPPORTED[name]
        return UnsupportedName(f"{cls.__name__}.{name}: deepkern does not have {reason}")
    return AttributeError(f"{cls.__name__!r} has no attribute {name!r}")


DEEP_GEMM = by_name(
    {
        "GEMMs of FP4 operands; cast to FP8 and call the function named fp8_gemm": """
            fp4_gemm_nt fp8_fp4_gemm_nt fp8_fp4_gemm_nn fp8_fp4_gemm_tn fp8_fp4_gemm_tt
            m_grouped_fp4_gemm_nt_contiguous m_grouped_fp4_gemm_nt_masked
            m_grouped_fp8_fp4_gemm_nt_contiguous m_grouped_fp8_fp4_gemm_nn_contiguous
            m_grouped_fp8_fp4_gemm_nt_masked k_grouped_fp4_gemm_nt_contiguous
            cublaslt_nvfp4_gemm_nt""",
        "FP4 casts; use the casts to FP8": """
            per_token_cast_to_fp4 transpose_packed_fp4 cast_back_from_fp4""",
        "logits of FP4 operands; use fp8_mqa_logits and fp8_paged_mqa_logits": """
            fp8_fp4_mqa_logits fp8_fp4_paged_mqa_logits""",
        "the sparse indexer of V4.1; use fp8_mqa_logits and deepkern.topk_indices": """
            fp8_fp4_sparse_mqa_logits fp8_fp4_paged_sparse_mqa_logits
            get_sparse_mqa_logits_metadata get_paged_sparse_mqa_logits_metadata""",
        "a schedule of fp8_mqa_logits; call fp8_mqa_logits without one": """
            get_mqa_logits_metadata""",
        "GEMMs of bf16 operands; use torch.matmul": """
            bf16_gemm_nt bf16_gemm_nn bf16_gemm_tn bf16_gemm_tt""",
        "grouped GEMMs of bf16 operands; use torch.matmul on each group": """
            m_grouped_bf16_gemm_nt_contiguous m_grouped_bf16_gemm_nn_contiguous
            m_grouped_bf16_gemm_nt_masked k_grouped_bf16_gemm_tn_contiguous
            bf16_m_grouped_gemm_nt_masked""",
        "cuBLASLt calls; use torch.matmul, which calls it": """
            cublaslt_gemm_nt cublaslt_gemm_nn cublaslt_gemm_tn cublaslt_gemm_tt""",
        "symmetric batched products; use torch.bmm": "batched_syrk batched_symm",
        "einsum; use torch.einsum on dequantized operands": "einsum fp8_einsum",
        "an expert layer in one kernel across GPUs; use deepkern.moe_forward on one GPU and "
        "deepkern.ExpertParallel across GPUs": """
            SymmBuffer SM90SymmBuffer get_symm_buffer_for_mega_moe
            get_symm_buffer_for_sm90_mega_moe transform_weights_for_mega_moe
            transform_weights_for_mega_moe_sm90 get_block_m_for_mega_moe
            fp8_fp4_mega_moe fp8_mega_moe fp4_fp4_mega_moe bf16_mega_moe mega""",
        "a router fused with its GEMM; use torch.matmul and deepkern.route_topk": """
            bf16_mega_gate get_bf16_mega_gate_config""",
        "hyper-connections; use torch": "mega_mhc tf32_hc_prenorm_gemm",
        "a GEMM that leaves a gap in each head of d; use fp8_gemm_nt and copy": """
            fp8_gemm_nt_skip_head_mid""",
        "packed scales of groups along K; pass fp32 scales to k_grouped_fp8_gemm_*": """
            get_k_grouped_mn_major_tma_aligned_packed_ue8m0_tensor""",
        "separate UE8M0 conversions; use per_token_cast_to_fp8(use_ue8m0=True, "
        "use_packed_ue8m0=True) and transform_sf_into_required_layout": """
            ceil_to_ue8m0 pack_ue8m0_to_int unpack_ue8m0_from_int""",
        "settings of a JIT compiler; tiles are chosen by a cost model, see deepkern.explain": """
            set_ignore_compile_dims set_block_size_multiple_of""",
        "DeepGEMM's Triton kernels for A100; the functions of this module run on sm_80": "legacy",
        "process group helpers; use torch.distributed": "init_dist uneven_all_gather",
        "a function of this name; use fp8_gemm_nt and k_grouped_fp8_gemm_nt_contiguous with c": """
            wgrad_gemm_fp8_fp8_fp32_nt k_grouped_wgrad_gemm_fp8_fp8_fp32_nt""",
    }
)

FLASH_MLA = by_name(
    {
        "norm, RoPE, attention and cast in one kernel for V4.1; use flash_mla_sparse_fwd or "
        "flash_mla_with_kvcache, then deepkern.cast_per_token": "fused_norm_rope_attn_rope_cast",
    }
)

DEEP_EP = by_name(
    {
        "NCCL and JIT initialization, and needs none": """
            find_cuda_home find_nccl_root check_nccl_so init_jit""",
        "detection of NVLink and RDMA domains; pass ranks_per_node to deepkern.ExpertParallel": """
            get_physical_domain_size""",
    }
)

DEEP_EP_BUFFER = by_name(
    {
        "a communication buffer to view; use dispatch and combine": "get_local_buffer_tensor",
        "separate calls between nodes; use dispatch and combine, or deepkern.ExpertParallel with "
        "ranks_per_node": "internode_dispatch internode_combine",
        "masking of ranks; a failed rank raises deepkern.ExpertParallelError on the others": """
            low_latency_update_mask_buffer low_latency_query_mask_buffer
            low_latency_clean_mask_buffer""",
    }
)

DEEP_EP_ELASTIC = by_name(
    {
        "detection of NVLink and RDMA domains; pass ranks_per_node to deepkern.ExpertParallel": """
            get_physical_domain_size""",
        "Engram storage; keep the entries on each rank": """
            get_engram_storage_size_hint engram_write engram_fetch""",
        "pipeline-parallel transfers; use torch.distributed.send and recv": """
            get_pp_buffer_size_hint pp_set_config pp_send pp_recv""",
        "all-gather and reduce-scatter sessions; use torch.distributed.all_gather_into_tensor": """
            get_agrs_num_max_session_bytes get_agrs_buffer_size_hint create_agrs_session
            destroy_agrs_session agrs_new_session agrs_set_config agrs_get_inplace_tensor
            all_gather""",
    }
)
