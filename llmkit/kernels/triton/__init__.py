"""Quantized weights on a CUDA GPU, in Triton. Imported only where it is used; ImportError where Triton is not installed.

Written for, and tested in, Triton's interpreter on a CPU (TRITON_INTERPRET=1) and by compiling for CUDA; not yet measured on a GPU.
"""

from llmkit.kernels.triton.matmul import dequantize, linear, rows

__all__ = ["dequantize", "linear", "rows"]
