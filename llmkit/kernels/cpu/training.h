// What training asks of the kernels: products, attention of packed sequences, the numbers of quantized matrices. The arrays are the caller's.
#pragma once
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace llmkit {

// One product by itself: y [tokens, n] = x [tokens, k] W^T + bias, with the arithmetic of a step. Throws std::bad_alloc.
void product(const Kernels& kernels, int threads, Linear w, const float* x, int64_t tokens, float* y);

// The products of training (kernels.h), `x` and `y` as it says. Throws std::bad_alloc.
void matmul(const Kernels& kernels, int threads, const Matmul& job);

// The gradients of adapters (kernels.h). Throws std::bad_alloc.
void adapter_gradients(const Kernels& kernels, int threads, const AdapterGradients& job);

// Attention of all these packed sequences (no padding, no cache), forward or backward; no two have a key in common. Throws std::bad_alloc.
void attend_packed(const Kernels& kernels, int threads, const PackedAttention& job, const std::vector<PackedSequence>& all, bool back);

// The numbers of a quantized matrix, out [n, k].
void dequantize(int threads, const Linear& w, float* out);

}  // namespace llmkit

struct PyMethodDef;
PyMethodDef* training_functions();
