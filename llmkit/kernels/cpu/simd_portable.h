// Sixteen lanes in plain C++: the meaning of every operation, and the way on processors without a file of their own.
#pragma once
#include <math.h>
#include <cstdint>
#include <string.h>

constexpr bool kSignedDot = true;   // codes enter the dot product as entry - 64, so no offset is needed
constexpr int kDenseRows = 2, kDenseTokens = 2, kQuantTokens = 2, kQuantPanels = 1, kAccumulators = 4, kFewTokens = 1;
constexpr int kMatRows = 4, kMatVectors = 1;

struct F { float v[16]; };
struct I { int32_t v[16]; };
struct B { uint8_t v[64]; };

#define LANES for (int i = 0; i < 16; ++i)
static inline F zero() { F r; LANES r.v[i] = 0; return r; }
static inline F set1(float x) { F r; LANES r.v[i] = x; return r; }
static inline F load(const float* p) { F r; LANES r.v[i] = p[i]; return r; }
static inline void store(float* p, F a) { LANES p[i] = a.v[i]; }
static inline F load_n(const float* p, int n) { F r; LANES r.v[i] = i < n ? p[i] : 0; return r; }
static inline void store_n(float* p, F a, int n) { for (int i = 0; i < n; ++i) p[i] = a.v[i]; }
static inline F add(F a, F b) { LANES a.v[i] += b.v[i]; return a; }
static inline F sub(F a, F b) { LANES a.v[i] -= b.v[i]; return a; }
static inline F mul(F a, F b) { LANES a.v[i] *= b.v[i]; return a; }
static inline F div(F a, F b) { LANES a.v[i] /= b.v[i]; return a; }
static inline F fma(F a, F b, F c) { LANES a.v[i] = fmaf(a.v[i], b.v[i], c.v[i]); return a; }
static inline F max(F a, F b) { LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline F min(F a, F b) { LANES a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
static inline F abs(F a) { LANES a.v[i] = fabsf(a.v[i]); return a; }
static inline F round_even(F a) { LANES a.v[i] = nearbyintf(a.v[i]); return a; }
// a * 2^n for integers n in -126..127; NaN of NaN
static inline F scale2(F a, F n) {
  LANES { int32_t bits = (int32_t(n.v[i] >= -126 ? n.v[i] : 0) + 127) << 23; float f; memcpy(&f, &bits, 4); a.v[i] *= f; }
  return a;
}
static inline F zero_below(F x, float limit, F a) { LANES a.v[i] = x.v[i] < limit ? 0 : a.v[i]; return a; }
// lanes first <= i < last of a, `other` elsewhere
static inline F keep(F a, int first, int last, float other) { LANES a.v[i] = i >= first && i < last ? a.v[i] : other; return a; }
static inline float hsum(F a) {
  for (int h = 8; h; h /= 2) for (int i = 0; i < h; ++i) a.v[i] += a.v[i + h];
  return a.v[0];
}
static inline float hmax(F a) { float m = a.v[0]; LANES m = a.v[i] > m ? a.v[i] : m; return m; }

static inline float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 1023, bits;
  if (exponent == 31) bits = sign | 0x7f800000 | mantissa << 13;
  else if (exponent) bits = sign | (exponent + 112) << 23 | mantissa << 13;
  else { float f = float(mantissa) * 0x1p-24f; memcpy(&bits, &f, 4); bits |= sign; }
  float f; memcpy(&f, &bits, 4); return f;
}
static inline uint16_t float_to_half(float f) {  // to nearest, ties to even
  uint32_t bits; memcpy(&bits, &f, 4);
  uint16_t sign = uint16_t(bits >> 16 & 0x8000); bits &= 0x7fffffff;
  if (bits >= 0x7f800000) return uint16_t(sign | 0x7c00 | (bits > 0x7f800000 ? 0x200 : 0));
  if (bits >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (bits < 0x38800000) { float a; memcpy(&a, &bits, 4); return uint16_t(sign | int(nearbyintf(a * 0x1p24f))); }
  bits += 0xc8000fff + (bits >> 13 & 1);  // rebias 127 -> 15 and round
  return uint16_t(sign | bits >> 13);
}
static inline F from_f16(const uint16_t* p) { F r; LANES r.v[i] = half_to_float(p[i]); return r; }
static inline F from_bf16(const uint16_t* p) { F r; LANES { uint32_t b = uint32_t(p[i]) << 16; memcpy(&r.v[i], &b, 4); } return r; }
static inline F from_i8(const int8_t* p) { F r; LANES r.v[i] = p[i]; return r; }
static inline void to_f16(uint16_t* p, F a) { LANES p[i] = float_to_half(a.v[i]); }
static inline void to_i8(int8_t* p, F a) { LANES p[i] = int8_t(fabsf(a.v[i]) < 128 ? nearbyintf(a.v[i]) : 0); }  // within -127..127, or infinite, or no number

static inline I set1i(int32_t x) { I r; LANES r.v[i] = x; return r; }
static inline I addi(I a, I b) { LANES a.v[i] += b.v[i]; return a; }
static inline F to_float(I a) { F r; LANES r.v[i] = float(a.v[i]); return r; }
static inline int32_t sum_i8(const int8_t* p) { int32_t s = 0; LANES s += p[i]; return s; }  // of 16

// Scales of the rows of a panel for one group, times a power of two: its exponent is added to those that are not 0.
struct Scales { F value; };
static inline Scales load_scales(const int8_t* p) { return {from_i8(p)}; }
static inline F scaled(const Scales& s, int32_t exponent) {
  F r = s.value;
  LANES if (r.v[i] != 0) { uint32_t bits; memcpy(&bits, &r.v[i], 4); bits += uint32_t(exponent); memcpy(&r.v[i], &bits, 4); }
  return r;
}

static inline B load_bytes(const uint8_t* p) { B r; memcpy(r.v, p, 64); return r; }
static inline void store_bytes(uint8_t* p, B a) { memcpy(p, a.v, 64); }
static inline B table16(const uint8_t* p) { B r; for (int i = 0; i < 64; ++i) r.v[i] = p[i % 16]; return r; }
static inline B low_codes(B table, B w) { for (auto& c : w.v) c = table.v[c & 15]; return w; }
static inline B high_codes(B table, B w) { for (auto& c : w.v) c = table.v[c >> 4]; return w; }
static inline I dot_portable(I acc, B w, int32_t x) {
  int8_t q[4]; memcpy(q, &x, 4);
  LANES for (int c = 0; c < 4; ++c) acc.v[i] += int32_t(int8_t(w.v[4 * i + c])) * q[c];
  return acc;
}
static inline I dot_q4(I acc, B w, int32_t x) { return dot_portable(acc, w, x); }
static inline I dot_q8(I acc, B w, int32_t x) { return dot_portable(acc, w, x); }
static inline I start_q8(int32_t) { return set1i(0); }
static inline void prefetch(const void*) {}     // into the first-level cache
static inline void prefetch_l2(const void*) {}  // into the second: the first has few buffers for what is on its way, and loads need them
template <int N> static inline void reduce(const F* acc, float* out) { for (int i = 0; i < N; ++i) out[i] = hsum(acc[i]); }
#undef LANES

static inline void transpose16(const float* in, int64_t ldi, float* out, int64_t ldo) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[i * ldo + j] = in[j * ldi + i];
}
