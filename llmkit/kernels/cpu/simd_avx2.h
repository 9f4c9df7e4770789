// Sixteen lanes in two ymm registers; int8 dot products by AVX-VNNI or, before it, by maddubs and madd.
#pragma once
constexpr bool kSignedDot = false;
constexpr int kDenseRows = 3, kDenseTokens = 2, kQuantTokens = 2, kQuantPanels = 1, kAccumulators = 6, kFewTokens = 1;
constexpr int kMatRows = 6, kMatVectors = 1;

struct F { __m256 a, b; };
struct I { __m256i a, b; };
struct B { __m256i a, b; };

static inline F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
static inline F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
static inline F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
static inline void store(float* p, F x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
static inline __m256i lanes_below(int n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
static inline F load_n(const float* p, int n) {
  return n >= 16 ? load(p) : F{_mm256_maskload_ps(p, lanes_below(n)), n > 8 ? _mm256_maskload_ps(p + 8, lanes_below(n - 8)) : _mm256_setzero_ps()};
}
static inline void store_n(float* p, F x, int n) {
  if (n >= 16) return store(p, x);
  _mm256_maskstore_ps(p, lanes_below(n), x.a);
  if (n > 8) _mm256_maskstore_ps(p + 8, lanes_below(n - 8), x.b);
}
static inline F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
static inline F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
static inline F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
static inline F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
static inline F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
static inline F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
static inline F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
static inline F abs(F x) { const __m256 m = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff)); return {_mm256_and_ps(x.a, m), _mm256_and_ps(x.b, m)}; }
static inline __m256 round_half(__m256 x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline F round_even(F x) { return {round_half(x.a), round_half(x.b)}; }
static inline __m256 power2(__m256 n) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23)); }
static inline F scale2(F x, F n) { return {_mm256_mul_ps(x.a, power2(n.a)), _mm256_mul_ps(x.b, power2(n.b))}; }
static inline F zero_below(F x, float limit, F y) {
  const __m256 l = _mm256_set1_ps(limit);
  return {_mm256_and_ps(y.a, _mm256_cmp_ps(x.a, l, _CMP_NLT_UQ)), _mm256_and_ps(y.b, _mm256_cmp_ps(x.b, l, _CMP_NLT_UQ))};
}
static inline F keep(F x, int first, int last, float other) {
  const __m256 o = _mm256_set1_ps(other);
  auto mask = [&](int shift) { return _mm256_castsi256_ps(_mm256_andnot_si256(lanes_below(first - shift), lanes_below(last - shift))); };
  return {_mm256_blendv_ps(o, x.a, mask(0)), _mm256_blendv_ps(o, x.b, mask(8))};
}
static inline float hsum(F x) {
  __m256 h = _mm256_add_ps(x.a, x.b);
  __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_add_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
static inline float hmax(F x) {
  __m256 h = _mm256_max_ps(x.a, x.b);
  __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  q = _mm_max_ps(q, _mm_movehl_ps(q, q));
  return _mm_cvtss_f32(_mm_max_ss(q, _mm_movehdup_ps(q)));
}
static inline F from_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
static inline __m256 upcast_bf16(const uint16_t* p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
static inline F from_bf16(const uint16_t* p) { return {upcast_bf16(p), upcast_bf16(p + 8)}; }
static inline F from_i8(const int8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
static inline void to_f16(uint16_t* p, F x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, _MM_FROUND_TO_NEAREST_INT));
}
static inline void to_i8(int8_t* p, F x) {
  const __m256i pairs = _mm256_packs_epi32(_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b));  // a0-3 b0-3 a4-7 b4-7
  const __m256i ordered = _mm256_permute4x64_epi64(pairs, 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(ordered), _mm256_extracti128_si256(ordered, 1)));
}

static inline I set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
static inline I addi(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
static inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
static inline int32_t sum_i8(const int8_t* p) {
  const __m128i offset = _mm_xor_si128(_mm_loadu_si128((const __m128i*)p), _mm_set1_epi8(char(0x80)));
  const __m128i s = _mm_sad_epu8(offset, _mm_setzero_si128());
  return _mm_cvtsi128_si32(s) + _mm_extract_epi16(s, 4) - 16 * 128;
}

// Scales of the rows of a panel for one group, times a power of two: its exponent is added to those that are not 0.
struct Scales { I bits, real; };
static inline Scales load_scales(const int8_t* p) {
  const F f = from_i8(p);
  const __m256i a = _mm256_castps_si256(f.a), b = _mm256_castps_si256(f.b), none = _mm256_setzero_si256();
  const __m256i all = _mm256_set1_epi32(-1);
  return {{a, b}, {_mm256_xor_si256(_mm256_cmpeq_epi32(a, none), all), _mm256_xor_si256(_mm256_cmpeq_epi32(b, none), all)}};
}
static inline F scaled(const Scales& s, int32_t exponent) {
  const __m256i e = _mm256_set1_epi32(exponent);
  return {_mm256_castsi256_ps(_mm256_and_si256(_mm256_add_epi32(s.bits.a, e), s.real.a)),
          _mm256_castsi256_ps(_mm256_and_si256(_mm256_add_epi32(s.bits.b, e), s.real.b))};
}

static inline B load_bytes(const uint8_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))}; }
static inline void store_bytes(uint8_t* p, B x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 32), x.b); }
static inline B table16(const uint8_t* p) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return {t, t};
}
static inline B low_codes(B t, B w) {
  const __m256i m = _mm256_set1_epi8(15);
  return {_mm256_shuffle_epi8(t.a, _mm256_and_si256(w.a, m)), _mm256_shuffle_epi8(t.b, _mm256_and_si256(w.b, m))};
}
static inline B high_codes(B t, B w) { return low_codes(t, {_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
#ifdef LLMKIT_AVXVNNI
static inline I dot_q4(I acc, B w, int32_t x) {
  const __m256i q = _mm256_set1_epi32(x);
  return {_mm256_dpbusd_avx_epi32(acc.a, w.a, q), _mm256_dpbusd_avx_epi32(acc.b, w.b, q)};
}
static inline I dot_q8(I acc, B w, int32_t x) {
  const __m256i m = _mm256_set1_epi8(char(0x80));
  return dot_q4(acc, {_mm256_xor_si256(w.a, m), _mm256_xor_si256(w.b, m)}, x);
}
static inline I start_q8(int32_t offset) { return set1i(2 * offset); }
#else
static inline __m256i dot_pairs(__m256i acc, __m256i u, __m256i s) {  // u at most 127, so two products fit into int16
  return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(u, s), _mm256_set1_epi16(1)));
}
static inline I dot_q4(I acc, B w, int32_t x) {
  const __m256i q = _mm256_set1_epi32(x);
  return {dot_pairs(acc.a, w.a, q), dot_pairs(acc.b, w.b, q)};
}
static inline I dot_q8(I acc, B w, int32_t x) {  // |w| * (x with the sign of w)
  const __m256i q = _mm256_set1_epi32(x);
  return {dot_pairs(acc.a, _mm256_abs_epi8(w.a), _mm256_sign_epi8(q, w.a)), dot_pairs(acc.b, _mm256_abs_epi8(w.b), _mm256_sign_epi8(q, w.b))};
}
static inline I start_q8(int32_t) { return set1i(0); }
#endif
static inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
static inline void prefetch_l2(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T1); }
template <int N> static inline void reduce(const F* acc, float* out) { for (int i = 0; i < N; ++i) out[i] = hsum(acc[i]); }

static inline void transpose16(const float* in, int64_t ldi, float* out, int64_t ldo) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) out[i * ldo + j] = in[j * ldi + i];
}
