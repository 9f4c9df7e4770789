// Sixteen lanes in one zmm register; int8 dot products by AVX-512 VNNI.
#pragma once
constexpr bool kSignedDot = false;
constexpr int kDenseRows = 4, kDenseTokens = 6, kQuantTokens = 4, kQuantPanels = 3, kAccumulators = 24, kFewTokens = 8;
constexpr int kMatRows = 12, kMatVectors = 2;

struct F { __m512 v; };
struct I { __m512i v; };
struct B { __m512i v; };

static inline F zero() { return {_mm512_setzero_ps()}; }
static inline F set1(float x) { return {_mm512_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
static inline void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
static inline F load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
static inline void store_n(float* p, F a, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v); }
static inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
static inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
static inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
static inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
static inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
static inline F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
static inline F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
static inline F abs(F a) { return {_mm512_abs_ps(a.v)}; }
static inline F round_even(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
static inline F scale2(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
static inline F zero_below(F x, float limit, F a) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_NLT_UQ), a.v)};
}
static inline F keep(F a, int first, int last, float other) {
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), __mmask16(((1u << last) - 1) & ~((1u << first) - 1)), a.v)};
}
static inline float hsum(F a) {
  __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_castps512_ps256(_mm512_shuffle_f32x4(a.v, a.v, 0x0e)));
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline float hmax(F a) { return _mm512_reduce_max_ps(a.v); }
static inline F from_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
static inline F from_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
static inline F from_i8(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
static inline void to_f16(uint16_t* p, F a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)); }
static inline void to_i8(int8_t* p, F a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v))); }

static inline I set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
static inline I addi(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
static inline F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
static inline int32_t sum_i8(const int8_t* p) { return _mm512_reduce_add_epi32(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }

// Scales of the rows of a panel for one group, times a power of two: its exponent is added to those that are not 0.
struct Scales { __m512i bits; __mmask16 real; };
static inline Scales load_scales(const int8_t* p) {
  const __m512i bits = _mm512_castps_si512(from_i8(p).v);
  return {bits, _mm512_test_epi32_mask(bits, bits)};
}
static inline F scaled(Scales s, int32_t exponent) {
  return {_mm512_castsi512_ps(_mm512_maskz_add_epi32(s.real, s.bits, _mm512_set1_epi32(exponent)))};
}

static inline B load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
static inline void store_bytes(uint8_t* p, B a) { _mm512_storeu_si512(p, a.v); }
static inline B table16(const uint8_t* p) { return {_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)p))}; }
static inline B low_codes(B table, B w) { return {_mm512_shuffle_epi8(table.v, _mm512_and_si512(w.v, _mm512_set1_epi8(15)))}; }
static inline B high_codes(B table, B w) {
  return {_mm512_shuffle_epi8(table.v, _mm512_and_si512(_mm512_srli_epi16(w.v, 4), _mm512_set1_epi8(15)))};
}
static inline I dot_q4(I acc, B w, int32_t x) { return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(x))}; }
// int8 weights become unsigned by adding 128: the offset is twice that of a zero point of 64
static inline I dot_q8(I acc, B w, int32_t x) {
  return {_mm512_dpbusd_epi32(acc.v, _mm512_xor_si512(w.v, _mm512_set1_epi8(char(0x80))), _mm512_set1_epi32(x))};
}
static inline I start_q8(int32_t offset) { return set1i(2 * offset); }
static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
static inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }

// Eight horizontal sums at once; each adds its lanes in the order of hsum (i with i+8, then i+4, i+2, i+1).
static inline void reduce8(const F* a, float* out) {
  __m256 b[8], c[4], d[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) b[i] = _mm256_add_ps(_mm512_castps512_ps256(a[i].v), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a[i].v), 1)));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)  // four lanes each of a[i], a[i + 4]
    c[i] = _mm256_add_ps(_mm256_permute2f128_ps(b[i], b[i + 4], 0x20), _mm256_permute2f128_ps(b[i], b[i + 4], 0x31));
  for (int i = 0; i < 2; ++i)  // two lanes each of a[2i], a[2i + 1], a[2i + 4], a[2i + 5]
    d[i] = _mm256_add_ps(_mm256_shuffle_ps(c[2 * i], c[2 * i + 1], 0x44), _mm256_shuffle_ps(c[2 * i], c[2 * i + 1], 0xee));
  _mm256_storeu_ps(out, _mm256_add_ps(_mm256_shuffle_ps(d[0], d[1], 0x88), _mm256_shuffle_ps(d[0], d[1], 0xdd)));
}
template <int N> static inline void reduce(const F* acc, float* out) {
#pragma GCC unroll 8
  for (int i = 0; i + 8 <= N; i += 8) reduce8(acc + i, out + i);
  for (int i = N / 8 * 8; i < N; ++i) out[i] = hsum(acc[i]);
}

// out[i][j] = in[j][i] for 16 x 16 numbers; rows ldi and ldo apart.
static inline void transpose16(const float* in, int64_t ldi, float* out, int64_t ldo) {
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * ldi);
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  for (int i = 0; i < 16; i += 4) {  // a[i + c], 128 bits q: column 4 q + c of the rows i .. i + 3
    a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44), a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44), a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const __m512 low = _mm512_shuffle_f32x4(a[c], a[4 + c], 0x88), high = _mm512_shuffle_f32x4(a[c], a[4 + c], 0xdd);
    const __m512 low2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0x88), high2 = _mm512_shuffle_f32x4(a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(out + c * ldo, _mm512_shuffle_f32x4(low, low2, 0x88));
    _mm512_storeu_ps(out + (4 + c) * ldo, _mm512_shuffle_f32x4(high, high2, 0x88));
    _mm512_storeu_ps(out + (8 + c) * ldo, _mm512_shuffle_f32x4(low, low2, 0xdd));
    _mm512_storeu_ps(out + (12 + c) * ldo, _mm512_shuffle_f32x4(high, high2, 0xdd));
  }
}
