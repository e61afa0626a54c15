"""grouped_gemm: multiply each bucket of rows by its own matrix of a stack."""

from kernels.grouped_gemm.reference import combine, grouped_gemm

__all__ = ["combine", "grouped_gemm"]
