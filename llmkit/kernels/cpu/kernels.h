// What an instruction set provides: one table of functions, chosen at run time (see dispatch.cpp).
//
// Two kinds of weights meet one kind of activation, float32 rows:
//   dense      row-major [n, k] float32, float16 or bfloat16, used in place as the checkpoint stores them
//   quantized  panels of 16 rows (see llmkit/kernels/format.py), multiplied with activations rounded to int8
//
// Bitwise batch invariance: a result depends on its row of activations and its row of weights only. Every function here
// adds in an order fixed by k alone, whatever the tile, the number of tokens or the thread.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

namespace llmkit {

enum class Kind : int { F32 = 0, F16 = 1, BF16 = 2, Q4 = 3, Q8 = 4 };

// y = x W^T + bias. Pointers into arrays that Python owns.
struct Linear {
  Kind kind = Kind::F32;
  int64_t n = 0, k = 0;                // out_features, in_features
  const void* data = nullptr;          // dense: [n, k]; quantized: codes [panels, k_blocks, 256 | 512]
  const int8_t* scales = nullptr;      // [panels, k_padded / group, 16]
  const float* row_scale = nullptr;    // [panels * 16]
  const float* bias = nullptr;         // [n]
  int group = 32;                      // 16 or 32
  const uint8_t* codebook = nullptr;   // 16 entries in 0..127, meaning entry - 64
  const uint8_t* lookup = nullptr;     // the same as the dot product takes them: as they are, or signed (Kernels::signed_dot)
  bool present() const { return data != nullptr; }
  bool quantized() const { return kind == Kind::Q4 || kind == Kind::Q8; }
};

constexpr int64_t kMaxPanels = 3;    // whose codes are unpacked at a time
constexpr int kLeastExponent = -100;  // of a group's scale: smaller numbers are 0

// Rows of activations rounded to int8 in groups of 32: x = q * 2^e. `exponent` is e where a float32 has it, `start` where sums
// begin: 0, or NaN where a number of the row is infinite or none. `offset` is -64 times the sum of 16 or 32 integers: with it an
// unsigned dot product over codebook entries comes out as if their zero point, 64, had been subtracted.
struct QuantizedRows {
  int64_t k_padded = 0;   // multiple of 32
  int8_t* q = nullptr;          // [rows, k_padded]
  int32_t* exponent = nullptr;  // [rows, k_padded / 32], e * 2^23
  float* start = nullptr;       // [rows]
  int32_t* offset = nullptr;    // [rows, k_padded / 16]
  int32_t* offset32 = nullptr;  // [rows, k_padded / 32]
};

// Keys and values of one layer in blocks of 16 positions. Blocks lie in segments of SEGMENT, which are never moved; within one, a head
// is a stream, and a sequence mostly has a run of blocks:
//   keys   [kv_head][block of the segment][head_dim][16]        position fastest: 16 scores at a time
//   values [kv_head][block of the segment][16][head_dim_padded]
// kind: F32, F16 or Q8 (int8 with one float32 scale per position and head, [kv_head][block of the segment][16]).
constexpr int BLOCK = 16;       // positions per cache block
constexpr int SEGMENT = 16;     // blocks

struct KVStorage {
  Kind kind = Kind::F32;
  int64_t kv_heads = 0, dim = 0, dim_padded = 0;
  uint8_t* const* segments = nullptr;  // each holds all layers of a cache group
  int64_t keys = 0, values = 0, key_scales = 0, value_scales = 0;  // byte of a segment at which those of this layer begin

  template <class T> T* keys_of(int64_t head, int64_t block) const { return at<T>(keys, dim * BLOCK, head, block); }
  template <class T> T* values_of(int64_t head, int64_t block) const { return at<T>(values, BLOCK * dim_padded, head, block); }
  float* key_scales_of(int64_t head, int64_t block) const { return at<float>(key_scales, BLOCK, head, block); }
  float* value_scales_of(int64_t head, int64_t block) const { return at<float>(value_scales, BLOCK, head, block); }

 private:
  template <class T> T* at(int64_t begin, int64_t count, int64_t head, int64_t block) const {
    return reinterpret_cast<T*>(segments[block / SEGMENT] + begin) + (head * SEGMENT + block % SEGMENT) * count;
  }
};

struct AttentionArgs {
  const KVStorage* cache;
  const int32_t* table;    // block ids of the sequence
  int64_t heads;           // query heads
  float scale, softcap;    // softcap 0: none
  int64_t window;          // 0: none
};

constexpr int CHUNK = 128;      // keys between two corrections of the running maximum
constexpr int SPLIT = 512;      // keys that one thread takes of a long context; fixed, so results do not depend on the threads
constexpr int TILE_ROWS = 24;   // query rows that share one pass over the keys
constexpr int kMaxHeadDim = 1024;

// The state of attention over some keys for one query row: maximum, sum of exponentials, weighted values.
struct Partial { float maximum, sum; };

// U = w + scale B A, dense; A [rank, k] and B [n, rank], or rank 0. See matmul.inl.
struct Factor {
  Linear w;
  const float *a = nullptr, *b = nullptr;
  int64_t rank = 0;
  float scale = 1;
};
// Forward: y[p] [tokens, n of p] = x[0] [tokens, k] U_p^T + bias_p. Back: y[0] [tokens, k] = sum over p of x[p] [tokens, n of p] U_p.
struct Matmul {
  bool back;
  int parts;
  const Factor* factors;
  int64_t tokens;
  const float* const* x;
  float* const* y;
};
// The gradients of adapters (rank at least 1) on one input x [tokens, k], from dy[p] [tokens, n of p] and xa = x A^T of all [tokens, ranks].
// The adapters of q, k and v share x, so one pass over it serves all of them:
// da [ranks, k], scale_p (dy_p B_p)^T x of each part below each other; db[p] [n of p, rank of p] = scale_p dy_p^T xa_p.
struct AdapterGradients {
  int parts;
  const Factor* factors;  // b, rank and scale of each, and of w the sizes
  int64_t tokens;
  const float *x, *xa;
  const float* const* dy;
  float* da;
  float* const* db;
};
// Attention of packed sequences in training, without a cache: rows [tokens, heads | kv_heads, dim], lse [tokens, heads]. See attention_back.inl.
struct PackedAttention {
  int64_t heads, kv_heads, dim, window;  // window 0: none
  float scale;
  const float *q, *k, *v;
  float *out, *lse;
  const float* dout;    // back: of out, which is read then, as lse is
  float *dq, *dk, *dv;
};
// Query rows [begin, begin + length), and their keys [key_begin, key_begin + key_length): the last `length` of them are the queries'
// own, and what stands before them (a shared prefix) is visible to all.
struct PackedSequence { int64_t begin, length, key_begin, key_length; };
constexpr int64_t kMatmulScratch = 1 << 19;  // floats

struct Kernels {
  const char* name;
  bool signed_dot;
  // Products of `tokens` rows x [tokens, ldx] with the weight rows of the tiles [first, last), each of so many rows; y [tokens, ldy].
  int64_t (*tile_rows)(const Linear& w);
  void (*dense)(const Linear& w, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last, float* scratch);
  void (*quantized)(const Linear& w, const QuantizedRows& x, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last, uint8_t* scratch);
  // y += x B for the columns [first, last) of B [rank, n], for rows x [tokens, ldx] and y [tokens, ldy].
  void (*add_low_rank)(const float* b, int64_t n, int64_t rank, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last);
  int64_t (*matmul_panels)(const Matmul& m);
  void (*matmul)(const Matmul& m, int64_t first, int64_t last, float* scratch);  // the columns of panels [first, last)
  // out [rows, ldo] = thin^T wide, for some columns of wide [tokens, ldw]; thin [tokens, rows] has few rows.
  void (*across)(const float* thin, int64_t rows, const float* wide, int64_t ldw, int64_t tokens, int64_t columns, float* out, int64_t ldo);
  int64_t (*packed_attention_scratch)(const PackedAttention& a, int64_t key_length);  // floats
  void (*attend_sequence)(const PackedAttention& a, const PackedSequence& sequence, int64_t kv_head, float* scratch);
  void (*attend_sequence_back)(const PackedAttention& a, const PackedSequence& sequence, int64_t kv_head, float* scratch);
  void (*quantize_row)(const float* x, int64_t k, const QuantizedRows& out, int64_t row);
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t n, float* out);
  void (*rms_norm_back)(const float* x, const float* weight, float eps, const float* dy, int64_t n, float* dx);
  void (*rotate)(const float* x, const float* cos, const float* sin, int64_t half, int64_t n, bool back, float* out);  // one head; out may be x
  void (*gate)(const float* gate, const float* up, int64_t n, float* out);  // silu(gate) * up
  void (*gate_back)(const float* gate, const float* up, const float* dh, int64_t n, float* dgate, float* dup);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out);
  void (*add_scaled)(float* x, const float* y, float factor, int64_t n);           // x += factor * y
  void (*activate)(int activation, float* gate, const float* up, int64_t n);       // gate = act(gate) * up; up null: no gate
  void (*softcap)(float* x, float cap, int64_t n);                                 // cap * tanh(x / cap)
  void (*embed_row)(const Linear& table, int64_t row, float* out);
  void (*store_kv)(const KVStorage& cache, int64_t head, int64_t block, int64_t slot, const float* k, const float* v);  // k, v [dim]
  // Query rows `rows` (at most TILE_ROWS; row r has query vector q[r] and position positions[r]) of one kv head over the
  // keys of split `split`: state and out[r] [dim_padded].
  void (*attend)(const AttentionArgs& args, int64_t kv_head, const float* const* q, const int32_t* positions, int rows, int64_t split,
                 Partial* state, float* out, int64_t ldo, float* scratch);
  void (*merge)(Partial* total, float* out, const Partial* part, const float* part_out, int64_t dim);  // out, part_out [dim_padded]
};

constexpr int64_t kQueryStride = kMaxHeadDim + 16;  // of the copied queries: neighbours fall into different sets of the cache
constexpr size_t kAttendScratch = size_t(TILE_ROWS) * (CHUNK + kQueryStride) + 64;  // floats
inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// A band of dense weights is at most 2^17 floats (but never less than 8 rows). A row does not begin in the set of the cache where the
// one before began.
inline int64_t dense_band_stride(int64_t k) { return round_up(k, 16) + 16; }
inline int64_t dense_band_floats(int64_t k) { return dense_band_stride(k) * 8 > (1 << 17) ? dense_band_stride(k) * 8 : 1 << 17; }
// The scratch of a product, k a multiple of 32: a band of dense weights and behind it the accumulators of its rows for a tile of at
// most 8 tokens; or the unpacked codes of some panels.
inline int64_t product_scratch_floats(int64_t k) {
  const int64_t dense = dense_band_floats(k) + 8 * 16 * ((1 << 17) / 1536 + 8), codes = kMaxPanels * 16 * k / 4;
  return dense > codes ? dense : codes;
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();      // null where the compiler or the processor's family does not have it
const Kernels* avxvnni_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();
const Kernels* neon_i8mm_kernels();
std::vector<const Kernels*> supported_kernels();                          // by this processor, the best first
const Kernels* choose_kernels(const char* wanted, const char** problem);  // wanted null: the best

enum Activation : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

}  // namespace llmkit
