// One product by itself, for training: y = x W^T + bias with the arithmetic of a step.
#include <algorithm>

#include "plan.h"

namespace llmkit {
namespace {

struct Product {
  const Kernels& kernels;
  const Linear& w;
  const float* x;
  int64_t tokens;
  float* y;
  QuantizedRows rounded;
  float* scratch;
  int64_t scratch_size;
  Pool& pool;

  void work(int thread) {
    const int threads = pool.threads();
    if (w.quantized()) {
      for (int64_t t = tokens * thread / threads; t < tokens * (thread + 1) / threads; ++t) kernels.quantize_row(x + t * w.k, w.k, rounded, t);
      pool.barrier().wait();
    }
    const int64_t rows = kernels.tile_rows(w), tiles = (w.n + rows - 1) / rows;
    const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
    float* own = scratch + thread * scratch_size;
    if (first == last) return;
    if (w.quantized()) kernels.quantized(w, rounded, tokens, y, w.n, first, last, reinterpret_cast<uint8_t*>(own));
    else kernels.dense(w, x, w.k, tokens, y, w.n, first, last, own);
  }
};

}  // namespace

void product(const Kernels& kernels, int threads, Linear w, const float* x, int64_t tokens, float* y) {
  uint8_t entries[16];
  if (w.kind == Kind::Q4) {
    for (int i = 0; i < 16; ++i) entries[i] = kernels.signed_dot ? uint8_t(w.codebook[i] - 64) : w.codebook[i];
    w.lookup = entries;
  }
  const std::shared_ptr<Pool> pool = pool_of(threads);
  const int64_t padded = round_up(w.k, 32), scratch = round_up(product_scratch_floats(padded), 64);
  // Rounded rows, then the scratch of each thread, in one allocation; every part is a multiple of 64 bytes.
  const int64_t rows = w.quantized() ? round_up(tokens, 16) : 0, groups = padded / 32;
  Memory memory(size_t(rows * (padded + groups * 16 + 4) + threads * scratch * 4));
  uint8_t* at = memory.data;
  auto take = [&](int64_t bytes) { uint8_t* begin = at; at += bytes; return begin; };
  float* own = reinterpret_cast<float*>(take(threads * scratch * 4));
  QuantizedRows rounded;
  rounded.k_padded = padded;
  rounded.q = reinterpret_cast<int8_t*>(take(rows * padded));
  rounded.exponent = reinterpret_cast<int32_t*>(take(rows * groups * 4));
  rounded.offset = reinterpret_cast<int32_t*>(take(rows * groups * 8));
  rounded.offset32 = reinterpret_cast<int32_t*>(take(rows * groups * 4));
  rounded.start = reinterpret_cast<float*>(take(rows * 4));
  Product job{kernels, w, x, tokens, y, rounded, own, scratch, *pool};
  pool->run([](void* context, int thread) { static_cast<Product*>(context)->work(thread); }, &job);
}

}  // namespace llmkit
