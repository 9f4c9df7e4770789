"""The kernels: quantized weights and the native code that multiplies with them. No torch behind this door."""
