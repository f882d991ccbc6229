// deepkern._C: native ops, registered through the stable ABI of torch, so that one build works with
// torch 2.11 or newer and Python 3.10 or newer.
//
// The namespace `deepkern_native` has the names and the schemas of the Python ops.
// torch.ops.deepkern_native.X on CPU tensors is the `cpu` backend of torch.ops.deepkern.X;
// cpu/X.cpp registers it. On CUDA tensors it is the `cuda` backend (sm90/ops.cpp), if nvcc compiled
// csrc/sm90. An op without a kernel for a device is not available there.
#include <torch/csrc/stable/library.h>

#include "python_module.h"

STABLE_TORCH_LIBRARY(deepkern_native, m) {
  m.def("cast_back(Tensor q, Tensor scale, int[] block, ScalarType out_dtype) -> Tensor");
  m.def("cast_per_block(Tensor x, str scale_format=\"fp32\") -> (Tensor, Tensor)");
  m.def(
      "cast_per_channel(Tensor x, str scale_format=\"fp32\", Tensor? group_offsets=None, "
      "bool transpose=False, str scale_layout=\"row\") -> (Tensor, Tensor)");
  m.def(
      "cast_per_token(Tensor x, str scale_format=\"fp32\", str scale_layout=\"row\") -> "
      "(Tensor, Tensor)");
  m.def(
      "expert_combine(Tensor y, Tensor topk_weights, Tensor handle, Tensor? shared=None) "
      "-> Tensor");
  m.def(
      "expert_combine_backward(Tensor grad, Tensor y, Tensor topk_weights, Tensor "
      "handle) -> (Tensor, Tensor)");
  m.def(
      "expert_dispatch(Tensor x, Tensor topk_idx, int num_experts, Tensor? x_scale=None, "
      "int alignment=1, str? cast=None, int? num_assigned=None) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor)");
  m.def("expert_dispatch_backward(Tensor grad, Tensor handle) -> Tensor");
  m.def("expert_load(Tensor topk_idx, int num_experts) -> Tensor");
  m.def(
      "fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, ScalarType "
      "out_dtype=15, Tensor? c=None) -> Tensor");
  m.def("gemm_nt(Tensor a, Tensor b, ScalarType? out_dtype=None) -> Tensor");
  m.def(
      "hadamard_cast(Tensor x, float scale=1.0, str scale_format=\"fp32\") -> (Tensor, "
      "Tensor)");
  m.def("hadamard_transform(Tensor x, float scale=1.0) -> Tensor");
  m.def(
      "indexer_cache_append(Tensor k, Tensor(a!) cache, Tensor slot_mapping, str "
      "scale_format=\"fp32\") -> ()");
  m.def(
      "k_grouped_fp8_gemm_nt(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, Tensor "
      "group_offsets, Tensor? c=None) -> Tensor");
  m.def(
      "m_grouped_fp8_gemm_nt_contiguous(Tensor a, Tensor a_scale, Tensor b, Tensor "
      "b_scale, Tensor group_index, ScalarType out_dtype=15) -> Tensor");
  m.def(
      "m_grouped_fp8_gemm_nt_masked(Tensor a, Tensor a_scale, Tensor b, Tensor b_scale, "
      "Tensor masked_m, ScalarType out_dtype=15, int? expected_m=None) -> Tensor");
  m.def(
      "m_grouped_gemm_nt_contiguous(Tensor a, Tensor b, Tensor group_index, ScalarType? "
      "out_dtype=None) -> Tensor");
  m.def(
      "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, "
      "Tensor)");
  m.def(
      "merge_states_backward(Tensor grad_out, Tensor grad_lse, Tensor out_a, Tensor "
      "lse_a, Tensor out_b, Tensor lse_b) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "mla_cache_append(Tensor latent, Tensor k_rope, Tensor(a!) cache, Tensor "
      "slot_mapping, Tensor? norm_weight=None, Tensor? positions=None, Tensor? "
      "cos_sin=None, float eps=1e-6) -> ()");
  m.def(
      "mla_cache_gather(Tensor cache, Tensor block_table, Tensor cu_seqlens, int "
      "total_tokens, int v_head_dim=512, Tensor? starts=None, ScalarType out_dtype=15) "
      "-> Tensor");
  m.def(
      "mla_decode(Tensor q, Tensor cache, Tensor block_table, Tensor cache_seqlens, "
      "float softmax_scale, bool causal=True, int v_head_dim=512) -> (Tensor, Tensor)");
  m.def(
      "mla_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor "
      "cu_seqlens_k, float softmax_scale, bool causal=True) -> (Tensor, Tensor)");
  m.def(
      "mla_prefill_backward(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, "
      "Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, float softmax_scale, bool "
      "causal=True, Tensor? grad_lse=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "mla_sparse_decode(Tensor q, Tensor cache, Tensor indices, float softmax_scale, "
      "Tensor? topk_length=None, Tensor? attn_sink=None, int v_head_dim=512) -> (Tensor, "
      "Tensor)");
  m.def(
      "mla_sparse_prefill(Tensor q, Tensor kv, Tensor indices, float softmax_scale, int "
      "v_head_dim=512, Tensor? attn_sink=None, Tensor? topk_length=None) -> (Tensor, "
      "Tensor, Tensor)");
  m.def(
      "mla_sparse_prefill_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor "
      "kv, Tensor indices, Tensor out, Tensor lse, float softmax_scale, Tensor? "
      "attn_sink=None, Tensor? topk_length=None) -> (Tensor, Tensor, Tensor)");
  m.def(
      "moe_forward(Tensor x, Tensor topk_weights, Tensor topk_idx, Tensor w13, Tensor "
      "w13_scale, Tensor w2, Tensor w2_scale) -> Tensor");
  m.def(
      "moe_forward_backward(Tensor grad, Tensor topk_weights, Tensor topk_idx, Tensor "
      "gate_up, Tensor gate_up_scale, Tensor w13, Tensor w13_scale, Tensor w2, Tensor "
      "w2_scale) -> (Tensor, Tensor)");
  m.def(
      "mqa_logits(Tensor q, Tensor kv, Tensor kv_scale, Tensor weights, Tensor starts, "
      "Tensor ends) -> Tensor");
  m.def(
      "paged_mqa_logits(Tensor q, Tensor cache, Tensor weights, Tensor context_lens, "
      "Tensor block_table, int max_context_len) -> Tensor");
  m.def(
      "rmsnorm_cast(Tensor x, Tensor weight, float eps=1e-6, Tensor? residual=None, str "
      "scale_format=\"fp32\", str scale_layout=\"row\") -> (Tensor, Tensor, Tensor, "
      "Tensor)");
  m.def(
      "route_topk(Tensor logits, Tensor? bias=None, int topk=8, int num_groups=1, int "
      "topk_groups=1, str score=\"sigmoid\", str group_score=\"top2\", bool "
      "normalize=True, float scale=1.0) -> (Tensor, Tensor)");
  m.def(
      "route_topk_backward(Tensor grad_weights, Tensor logits, Tensor idx, str "
      "score=\"sigmoid\", bool normalize=True, float scale=1.0) -> Tensor");
  m.def(
      "sequence_balance_loss(Tensor logits, Tensor topk_idx, str score=\"sigmoid\", "
      "float alpha=0.0001) -> Tensor");
  m.def(
      "sequence_balance_loss_backward(Tensor grad, Tensor logits, Tensor topk_idx, str "
      "score=\"sigmoid\", float alpha=0.0001) -> Tensor");
  m.def("swiglu(Tensor gate_up) -> Tensor");
  m.def(
      "swiglu_cast(Tensor gate_up, Tensor? weights=None, float? limit=None, str "
      "scale_format=\"fp32\", str scale_layout=\"row\") -> (Tensor, Tensor)");
  m.def(
      "swiglu_cast_backward(Tensor grad, Tensor gate_up, Tensor? gate_up_scale=None, "
      "Tensor? weights=None, float? limit=None) -> (Tensor, Tensor, Tensor)");
  m.def("topk_indices(Tensor logits, int k, Tensor? lengths=None) -> Tensor");
  m.def("update_expert_bias(Tensor bias, Tensor load, float rate=0.001) -> Tensor");
}

DEEPKERN_EMPTY_PYTHON_MODULE(_C)
