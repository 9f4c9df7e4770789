"""The kernels: quantized weights and the native code that multiplies with them. No torch is imported.

`NativeBackend` runs whole steps in C++ on the processor; where it cannot (`native_problem` says why), PyTorch does.
"""

from llmkit.kernels.backend import NativeBackend, native_problem

__all__ = ["NativeBackend", "native_problem"]
