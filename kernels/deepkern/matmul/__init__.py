"""Matrix products of FP8 operands."""

from .fp8_gemm_nt import fp8_gemm_nt
from .fp8_linear import FP8Linear, fp8_linear
from .k_grouped_fp8_gemm_nt import k_grouped_fp8_gemm_nt
from .m_grouped_fp8_gemm_nt_contiguous import m_grouped_fp8_gemm_nt_contiguous
from .m_grouped_fp8_gemm_nt_masked import m_grouped_fp8_gemm_nt_masked

__all__ = [
    "FP8Linear",
    "fp8_gemm_nt",
    "fp8_linear",
    "k_grouped_fp8_gemm_nt",
    "m_grouped_fp8_gemm_nt_contiguous",
    "m_grouped_fp8_gemm_nt_masked",
]
