// Sixteen lanes in four q registers; int8 dot products by the dot product extension of ARMv8.2, those of tiles by i8mm.
#pragma once
constexpr bool kSignedDot = true;
constexpr int kDenseRows = 2, kDenseTokens = 2, kQuantPanels = 1, kAccumulators = 6, kFewTokens = 1;
constexpr int kMatRows = 6, kMatVectors = 1;
#ifdef LLMKIT_I8MM
constexpr int kQuantTokens = 6;  // 24 accumulators
#else
constexpr int kQuantTokens = 4;
#endif

struct F { float32x4_t v[4]; };
struct I { int32x4_t v[4]; };
struct B { int8x16_t v[4]; };

#define LANES for (int i = 0; i < 4; ++i)
static inline F set1(float x) { F r; LANES r.v[i] = vdupq_n_f32(x); return r; }
static inline F zero() { return set1(0); }
static inline F load(const float* p) { F r; LANES r.v[i] = vld1q_f32(p + 4 * i); return r; }
static inline void store(float* p, F x) { LANES vst1q_f32(p + 4 * i, x.v[i]); }
static inline F load_n(const float* p, int n) {
  if (n >= 16) return load(p);
  float part[16] = {};
  memcpy(part, p, size_t(n) * 4);
  return load(part);
}
static inline void store_n(float* p, F x, int n) {
  if (n >= 16) return store(p, x);
  float part[16];
  store(part, x);
  memcpy(p, part, size_t(n) * 4);
}
static inline F add(F x, F y) { LANES x.v[i] = vaddq_f32(x.v[i], y.v[i]); return x; }
static inline F sub(F x, F y) { LANES x.v[i] = vsubq_f32(x.v[i], y.v[i]); return x; }
static inline F mul(F x, F y) { LANES x.v[i] = vmulq_f32(x.v[i], y.v[i]); return x; }
static inline F div(F x, F y) { LANES x.v[i] = vdivq_f32(x.v[i], y.v[i]); return x; }
static inline F fma(F x, F y, F z) { LANES x.v[i] = vfmaq_f32(z.v[i], x.v[i], y.v[i]); return x; }
static inline F max(F x, F y) { LANES x.v[i] = vbslq_f32(vcgtq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); return x; }
static inline F min(F x, F y) { LANES x.v[i] = vbslq_f32(vcltq_f32(x.v[i], y.v[i]), x.v[i], y.v[i]); return x; }
static inline F abs(F x) { LANES x.v[i] = vabsq_f32(x.v[i]); return x; }
static inline F round_even(F x) { LANES x.v[i] = vrndnq_f32(x.v[i]); return x; }
static inline F scale2(F x, F n) {
  LANES x.v[i] = vmulq_f32(x.v[i], vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23)));
  return x;
}
static inline F zero_below(F x, float limit, F y) {
  LANES y.v[i] = vbslq_f32(vcltq_f32(x.v[i], vdupq_n_f32(limit)), vdupq_n_f32(0), y.v[i]);
  return y;
}
static inline F keep(F x, int first, int last, float other) {
  float v[16];
  store(v, x);
  for (int i = 0; i < 16; ++i) if (i < first || i >= last) v[i] = other;
  return load(v);
}
static inline float hsum(F x) {
  float32x4_t q = vaddq_f32(vaddq_f32(x.v[0], x.v[2]), vaddq_f32(x.v[1], x.v[3]));
  float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
  return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
static inline float hmax(F x) { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x.v[0], x.v[1]), vmaxq_f32(x.v[2], x.v[3]))); }
static inline F from_f16(const uint16_t* p) { F r; LANES r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i))); return r; }
static inline F from_bf16(const uint16_t* p) { F r; LANES r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16)); return r; }
static inline F from_i8(const int8_t* p) {
  const int8x16_t b = vld1q_s8(p);
  const int16x8_t l = vmovl_s8(vget_low_s8(b)), h = vmovl_s8(vget_high_s8(b));
  return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(l))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(l))),
           vcvtq_f32_s32(vmovl_s16(vget_low_s16(h))), vcvtq_f32_s32(vmovl_s16(vget_high_s16(h)))}};
}
static inline void to_f16(uint16_t* p, F x) { LANES vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(x.v[i]))); }
static inline void to_i8(int8_t* p, F x) {
  int16x8_t l = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[0])), vqmovn_s32(vcvtnq_s32_f32(x.v[1])));
  int16x8_t h = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(x.v[2])), vqmovn_s32(vcvtnq_s32_f32(x.v[3])));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(l), vqmovn_s16(h)));
}

static inline I set1i(int32_t x) { I r; LANES r.v[i] = vdupq_n_s32(x); return r; }
static inline I addi(I x, I y) { LANES x.v[i] = vaddq_s32(x.v[i], y.v[i]); return x; }
static inline F to_float(I x) { F r; LANES r.v[i] = vcvtq_f32_s32(x.v[i]); return r; }
static inline int32_t sum_i8(const int8_t* p) { return vaddlvq_s8(vld1q_s8(p)); }

// Scales of the rows of a panel for one group, times a power of two: its exponent is added to those that are not 0.
struct Scales { I bits, real; };
static inline Scales load_scales(const int8_t* p) {
  const F f = from_i8(p);
  Scales s;
  LANES {
    s.bits.v[i] = vreinterpretq_s32_f32(f.v[i]);
    s.real.v[i] = vreinterpretq_s32_u32(vtstq_s32(s.bits.v[i], s.bits.v[i]));
  }
  return s;
}
static inline F scaled(const Scales& s, int32_t exponent) {
  F r;
  LANES r.v[i] = vreinterpretq_f32_s32(vandq_s32(vaddq_s32(s.bits.v[i], vdupq_n_s32(exponent)), s.real.v[i]));
  return r;
}

static inline B load_bytes(const uint8_t* p) { B r; LANES r.v[i] = vld1q_s8((const int8_t*)p + 16 * i); return r; }
static inline void store_bytes(uint8_t* p, B x) { LANES vst1q_s8((int8_t*)p + 16 * i, x.v[i]); }
static inline B table16(const uint8_t* p) { B r; LANES r.v[i] = vld1q_s8((const int8_t*)p); return r; }
static inline B low_codes(B t, B w) { LANES w.v[i] = vqtbl1q_s8(t.v[i], vandq_u8(vreinterpretq_u8_s8(w.v[i]), vdupq_n_u8(15))); return w; }
static inline B high_codes(B t, B w) { LANES w.v[i] = vqtbl1q_s8(t.v[i], vshrq_n_u8(vreinterpretq_u8_s8(w.v[i]), 4)); return w; }
static inline I dot_q4(I acc, B w, int32_t x) {
  const int8x16_t q = vreinterpretq_s8_s32(vdupq_n_s32(x));
  LANES acc.v[i] = vdotq_s32(acc.v[i], w.v[i], q);
  return acc;
}
static inline I dot_q8(I acc, B w, int32_t x) { return dot_q4(acc, w, x); }
static inline I start_q8(int32_t) { return set1i(0); }
#if defined(_MSC_VER) && !defined(__clang__)
static inline void prefetch(const void* p) { __prefetch(p); }
static inline void prefetch_l2(const void* p) { __prefetch2(p, 2); }  // PLDL2KEEP
#else
static inline void prefetch(const void* p) { __builtin_prefetch(p); }
static inline void prefetch_l2(const void* p) { __builtin_prefetch(p, 0, 2); }
#endif
template <int N> static inline void reduce(const F* acc, float* out) { for (int i = 0; i < N; ++i) out[i] = hsum(acc[i]); }

#ifdef LLMKIT_I8MM
// `smmla` multiplies two tokens with two rows, eight columns at a time:
//
//   token t    col 0..7     row r      col 0..7           t * r       t * (r+1)
//   token t+1  col 0..7  x  row r + 1  col 0..7    adds   (t+1) * r   (t+1) * (r+1)    to four lanes
//
// Codes stand by fours of columns; zipped, two loads hold rows 0 and 1, 2 and 3, ..., 14 and 15 with eight columns each.
static inline void pair(B& x, B& y) {
  B out[2];
  LANES {
    const int32x4_t a = vreinterpretq_s32_s8(x.v[i]), b = vreinterpretq_s32_s8(y.v[i]);
    out[i / 2].v[i % 2 * 2] = vreinterpretq_s8_s32(vzip1q_s32(a, b));
    out[i / 2].v[i % 2 * 2 + 1] = vreinterpretq_s8_s32(vzip2q_s32(a, b));
  }
  x = out[0];
  y = out[1];
}

// See kernels.inl; what `sums` held was zero. An odd last token is its own neighbour.
template <int Tokens, int Panels, int Group, bool Eight>
static inline void group_sums(const uint8_t* const* w, int64_t at, const int8_t* q, int64_t ldq, I (*sums)[Panels]) {
  constexpr int kPairs = (Tokens + 1) / 2;
  for (int p = 0; p < Panels; ++p) {
    int32x4_t acc[kPairs][8];
    for (auto& of_pair : acc) for (auto& a : of_pair) a = vdupq_n_s32(0);
#pragma GCC unroll 1
    for (int column = 0; column < Group; column += 8) {
      B first = load_bytes(w[p] + at + 16 * column), second = load_bytes(w[p] + at + 16 * column + 64);
      if (Eight) pair(first, second);  // unpacked codes were paired when they were written
#pragma GCC unroll 4
      for (int t = 0; t < kPairs; ++t) {
        const int8_t* even = q + 2 * t * ldq + column;
        const int8x16_t x = vcombine_s8(vld1_s8(even), vld1_s8(2 * t + 1 < Tokens ? even + ldq : even));
        LANES acc[t][i] = vmmlaq_s32(acc[t][i], x, first.v[i]);
        LANES acc[t][4 + i] = vmmlaq_s32(acc[t][4 + i], x, second.v[i]);
      }
    }
    for (int t = 0; t < Tokens; ++t) LANES {
      const int64x2_t a = vreinterpretq_s64_s32(acc[t / 2][2 * i]), b = vreinterpretq_s64_s32(acc[t / 2][2 * i + 1]);
      sums[t][p].v[i] = vreinterpretq_s32_s64(t % 2 ? vzip2q_s64(a, b) : vzip1q_s64(a, b));
    }
  }
}
#endif
#undef LANES

static inline void transpose16(const float* in, int64_t ldi, float* out, int64_t ldo) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[i * ldo + j] = in[j * ldi + i];
}
