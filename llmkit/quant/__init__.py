"""Quantized weights: how they are stored (schemes), how their values are chosen (methods), and the linears that use them."""
