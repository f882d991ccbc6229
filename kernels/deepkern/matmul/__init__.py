"""Matrix products of FP8 operands."""

from .fp8_gemm_nt import fp8_gemm_nt

__all__ = ["fp8_gemm_nt"]
