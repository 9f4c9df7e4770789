// See training.h.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#include "training.h"

namespace llmkit {
namespace {

struct Product {
  const Kernels& kernels;
  const Linear& w;
  const float* x;
  int64_t tokens;
  float* y;
  QuantizedRows rounded;
  int64_t scratch_size;

  void round(int thread, int threads) const {
    for (int64_t t = tokens * thread / threads; t < tokens * (thread + 1) / threads; ++t) kernels.quantize_row(x + t * w.k, w.k, rounded, t);
  }
  void multiply(int thread, int threads) const {
    const int64_t rows = kernels.tile_rows(w), tiles = (w.n + rows - 1) / rows;
    const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
    if (first == last) return;
    float* own = scratch_of_thread(scratch_size);
    if (w.quantized()) kernels.quantized(w, rounded, tokens, y, w.n, first, last, reinterpret_cast<uint8_t*>(own));
    else kernels.dense(w, x, w.k, tokens, y, w.n, first, last, own);
  }
};

struct Dequantization {
  const Linear& w;
  float* out;

  // The panels of this thread; a panel is read once, 16 rows of 32 columns at a time.
  void work(int thread, int threads) const {
    const int64_t panels = (w.n + 15) / 16, blocks = round_up(w.k, 32) / 32, per_block = 32 / w.group;
    const bool four = w.kind == Kind::Q4;
    int8_t numbers[16] = {};
    for (int i = 0; four && i < 16; ++i) numbers[i] = int8_t(int(w.codebook[i]) - 64);
    for (int64_t panel = panels * thread / threads; panel < panels * (thread + 1) / threads; ++panel) {
      const int rows = int(std::min<int64_t>(16, w.n - panel * 16));
      for (int64_t b = 0; b < blocks; ++b) {
        const uint8_t* codes = static_cast<const uint8_t*>(w.data) + (panel * blocks + b) * (four ? 256 : 512);
        const int8_t* scales = w.scales + (panel * blocks + b) * per_block * 16;
        const int columns = int(std::min<int64_t>(32, w.k - b * 32));
        for (int r = 0; r < rows; ++r) {
          int8_t values[32];
          for (int j = 0; j < (four ? 4 : 8); ++j)
            for (int c = 0; c < 4; ++c) {
              const uint8_t code = codes[j * 64 + r * 4 + c];
              values[4 * j + c] = four ? numbers[code & 15] : int8_t(code);
              if (four) values[16 + 4 * j + c] = numbers[code >> 4];
            }
          float wide[32];
          const float row_scale = w.row_scale[panel * 16 + r];
          for (int half = 0; half < 2; ++half) {
            const float scale = float(scales[half * 16 / w.group * 16 + r]);
            for (int c = 16 * half; c < 16 * half + 16; ++c) wide[c] = float(values[c]) * scale * row_scale;
          }
          std::memcpy(out + (panel * 16 + r) * w.k + b * 32, wide, size_t(columns) * 4);
        }
      }
    }
  }
};

struct MatmulJob {
  const Kernels& kernels;
  const Matmul& job;
  bool by_tokens;

  void work(int thread, int threads) const {
    const int64_t panels = kernels.matmul_panels(job);
    float* own = scratch_of_thread(kMatmulScratch);
    if (!by_tokens) {
      const int64_t first = panels * thread / threads, last = panels * (thread + 1) / threads;
      if (first < last) kernels.matmul(job, first, last, own);
      return;
    }
    const auto bound = [&](int i) { return i == threads ? job.tokens : job.tokens * i / threads / kRowsTogether * kRowsTogether; };
    const int64_t first = bound(thread), tokens = bound(thread + 1) - first;
    if (!tokens) return;
    std::vector<const float*> x;
    std::vector<float*> y;
    for (int p = 0; p < job.parts; ++p) {
      const Linear& w = job.factors[p].w;
      if (job.back || !p) x.push_back(job.x[p] + first * (job.back ? w.n : w.k));
      if (!job.back || !p) y.push_back(job.y[p] + first * (job.back ? w.k : w.n));
    }
    const Matmul part{job.back, job.parts, job.factors, tokens, x.data(), y.data()};
    kernels.matmul(part, 0, panels, own);
  }
  static constexpr int64_t kRowsTogether = 12;  // of the largest tile
};

// Threads that share the columns, whole panels of them, each copy all of x; threads that share the tokens each pack all of U, which
// is far more. A result depends on its row of x and its column alone either way.
bool by_tokens(const Kernels& kernels, int threads, const Matmul& job) { return kernels.matmul_panels(job) < 8 * threads; }

struct AdapterGradientsJob {
  const Kernels& kernels;
  const AdapterGradients& job;
  int64_t ranks;
  float *dxa, *own_dxa;  // [tokens, ranks]; [tokens, rank] of each part, one behind the other
  static constexpr int64_t kColumns = 256;  // at a time

  // dxa [tokens, ranks] = scale dy B, for the tokens of this thread. It is needed whole before dA, so a barrier follows.
  void project_gradients(int thread, int threads) const {
    const int64_t first = job.tokens * thread / threads, tokens = job.tokens * (thread + 1) / threads - first;
    if (!tokens) return;
    float* scratch = scratch_of_thread(kMatmulScratch);
    int64_t before = 0;
    for (int p = 0; p < job.parts; ++p) {
      const Factor& f = job.factors[p];
      Factor b;
      b.w.kind = Kind::F32, b.w.n = f.w.n, b.w.k = f.rank, b.w.data = f.b;
      const float* dy = job.dy[p] + first * f.w.n;
      float* own = own_dxa + job.tokens * before + first * f.rank;
      const Matmul product{true, 1, &b, tokens, &dy, &own};
      kernels.matmul(product, 0, kernels.matmul_panels(product), scratch);
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < f.rank; ++j) dxa[(first + t) * ranks + before + j] = f.scale * own[t * f.rank + j];
      before += f.rank;
    }
  }
  // dA [ranks, k] and dB [n, rank] for the columns of this thread: sums over all tokens, in their order, so no thread count changes a bit.
  void accumulate(int thread, int threads) const {
    int64_t largest = 0, before = 0;
    for (int p = 0; p < job.parts; ++p) largest = std::max(largest, job.factors[p].rank);
    float* transposed = scratch_of_thread(largest * kColumns + job.tokens * largest);
    float* thin = transposed + largest * kColumns;
    const int64_t k = job.factors[0].w.k;
    in_parts(k, thread, threads, [&](int64_t i, int64_t n) { kernels.across(dxa, ranks, job.x + i, k, job.tokens, n, job.da + i, k); });
    for (int p = 0; p < job.parts; ++p) {
      const Factor& f = job.factors[p];
      for (int64_t t = 0; t < job.tokens; ++t) std::memcpy(thin + t * f.rank, job.xa + t * ranks + before, size_t(f.rank) * 4);
      in_parts(f.w.n, thread, threads, [&](int64_t i, int64_t n) {
        kernels.across(thin, f.rank, job.dy[p] + i, f.w.n, job.tokens, n, transposed, kColumns);
        for (int64_t r = 0; r < n; ++r)
          for (int64_t j = 0; j < f.rank; ++j) job.db[p][(i + r) * f.rank + j] = f.scale * transposed[j * kColumns + r];
      });
      before += f.rank;
    }
  }
  template <class Function>
  static void in_parts(int64_t columns, int thread, int threads, Function part) {
    const int64_t vectors = (columns + 15) / 16, last = std::min(columns, vectors * (thread + 1) / threads * 16);
    for (int64_t i = vectors * thread / threads * 16; i < last; i += kColumns) part(i, std::min(kColumns, last - i));
  }
};

struct PackedAttentionJob {
  const Kernels& kernels;
  const PackedAttention& job;
  const std::vector<PackedSequence>& all;
  bool back;
  int64_t scratch_size;
  std::atomic<int64_t> next{0};

  void work() {
    float* own = scratch_of_thread(scratch_size);
    const int64_t units = int64_t(all.size()) * job.kv_heads;
    for (int64_t unit; (unit = next.fetch_add(1)) < units;)
      (back ? kernels.attend_sequence_back : kernels.attend_sequence)(job, all[size_t(unit / job.kv_heads)], unit % job.kv_heads, own);
  }
};

}  // namespace

void attend_packed(const Kernels& kernels, int threads, const PackedAttention& job, const std::vector<PackedSequence>& all, bool back) {
  int64_t longest = 0;
  for (const PackedSequence& sequence : all) longest = std::max(longest, sequence.key_length);
  PackedAttentionJob sequences{kernels, job, all, back, kernels.packed_attention_scratch(job, longest)};
  run_independent(threads, [](void* context, int, int) { static_cast<PackedAttentionJob*>(context)->work(); }, &sequences);
}

void matmul(const Kernels& kernels, int threads, const Matmul& job) {
  MatmulJob products{kernels, job, by_tokens(kernels, threads, job)};
  run_independent(threads, [](void* context, int thread, int of) { static_cast<MatmulJob*>(context)->work(thread, of); }, &products);
}

void adapter_gradients(const Kernels& kernels, int threads, const AdapterGradients& job) {
  int64_t ranks = 0;
  for (int p = 0; p < job.parts; ++p) ranks += job.factors[p].rank;
  Memory memory(size_t(2 * job.tokens * ranks) * 4);
  float* dxa = reinterpret_cast<float*>(memory.data);
  AdapterGradientsJob parts{kernels, job, ranks, dxa, dxa + job.tokens * ranks};
  run_independent(threads, [](void* context, int thread, int of) { static_cast<AdapterGradientsJob*>(context)->project_gradients(thread, of); }, &parts);
  run_independent(threads, [](void* context, int thread, int of) { static_cast<AdapterGradientsJob*>(context)->accumulate(thread, of); }, &parts);
}

void dequantize(int threads, const Linear& w, float* out) {
  Dequantization job{w, out};
  run_independent(threads, [](void* context, int thread, int of) { static_cast<Dequantization*>(context)->work(thread, of); }, &job);
}

void product(const Kernels& kernels, int threads, Linear w, const float* x, int64_t tokens, float* y) {
  uint8_t entries[16];
  if (w.kind == Kind::Q4) {
    for (int i = 0; i < 16; ++i) entries[i] = kernels.signed_dot ? uint8_t(w.codebook[i] - 64) : w.codebook[i];
    w.lookup = entries;
  }
  const int64_t padded = round_up(w.k, 32), groups = padded / 32;
  // Rounded rows in one allocation; every part is a multiple of 64 bytes.
  const int64_t rows = w.quantized() ? round_up(tokens, 16) : 0;
  Memory memory(size_t(rows * (padded + groups * 16 + 4)));
  uint8_t* at = memory.data;
  auto take = [&](int64_t bytes) { uint8_t* begin = at; at += bytes; return begin; };
  QuantizedRows rounded;
  rounded.k_padded = padded;
  rounded.q = reinterpret_cast<int8_t*>(take(rows * padded));
  rounded.exponent = reinterpret_cast<int32_t*>(take(rows * groups * 4));
  rounded.offset = reinterpret_cast<int32_t*>(take(rows * groups * 8));
  rounded.offset32 = reinterpret_cast<int32_t*>(take(rows * groups * 4));
  rounded.start = reinterpret_cast<float*>(take(rows * 4));
  Product job{kernels, w, x, tokens, y, rounded, product_scratch_floats(padded)};
  if (w.quantized()) run_independent(threads, [](void* context, int thread, int of) { static_cast<Product*>(context)->round(thread, of); }, &job);
  run_independent(threads, [](void* context, int thread, int of) { static_cast<Product*>(context)->multiply(thread, of); }, &job);
}

}  // namespace llmkit
