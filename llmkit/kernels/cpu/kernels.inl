// The kernels, written once over the sixteen lanes of a simd_*.h; each isa_*.cpp includes both inside a namespace of its own.

// -- elementary functions ---------------------------------------------------------------------------------------------

// e^x, relative error 2e-7; exactly 1 at 0 and exactly 0 below -87.3 (Cephes expf's reduction and polynomial).
static inline F exp(F x) {
  F limited = max(min(x, set1(88.0f)), set1(-87.3f));
  F n = round_even(mul(limited, set1(1.44269504f)));
  F r = fma(n, set1(-0.693359375f), limited);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(mul(r, r), p, r), set1(1.0f));
  return zero_below(x, -87.3f, scale2(p, n));
}
static inline F tanh(F x) {  // 1 - 2 / (e^2x + 1)
  F limited = max(min(x, set1(20.0f)), set1(-20.0f));
  return sub(set1(1.0f), div(set1(2.0f), add(exp(add(limited, limited)), set1(1.0f))));
}
static float exp1(float x) { float out[16]; store(out, exp(set1(x))); return out[0]; }

static inline F act(int activation, F x) {
  switch (activation) {
    case kSilu: return div(x, add(set1(1.0f), exp(sub(zero(), x))));
    case kGeluTanh: {
      F inner = mul(set1(0.7978845608f), fma(mul(mul(x, x), x), set1(0.044715f), x));
      return mul(mul(set1(0.5f), x), add(set1(1.0f), tanh(inner)));
    }
    case kRelu: return max(x, zero());
    default: {  // gelu by the error function: rare, so the standard library's will do
      float v[16];
      store(v, x);
      for (float& e : v) e = 0.5f * e * (1.0f + erff(e * 0.70710678f));
      return load(v);
    }
  }
}

// Applies f to x[0..n), sixteen at a time.
template <class Function>
static inline void each(int64_t n, Function f) {
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) f(i, 16);
  if (i < n) f(i, int(n - i));
}

static void add_scaled(float* x, const float* y, float factor, int64_t n) {
  each(n, [&](int64_t i, int m) { store_n(x + i, fma(set1(factor), load_n(y + i, m), load_n(x + i, m)), m); });
}
static void activate(int activation, float* gate, const float* up, int64_t n) {
  each(n, [&](int64_t i, int m) {
    F a = act(activation, load_n(gate + i, m));
    store_n(gate + i, up ? mul(a, load_n(up + i, m)) : a, m);
  });
}
static void softcap(float* x, float cap, int64_t n) {
  each(n, [&](int64_t i, int m) { store_n(x + i, mul(set1(cap), tanh(div(load_n(x + i, m), set1(cap)))), m); });
}
static void rms_norm(const float* x, const float* weight, float eps, int64_t n, float* out) {
  F squares = zero();
  each(n, [&](int64_t i, int m) { F v = load_n(x + i, m); squares = fma(v, v, squares); });
  F factor = set1(1.0f / sqrtf(hsum(squares) / float(n) + eps));
  each(n, [&](int64_t i, int m) { store_n(out + i, mul(mul(load_n(x + i, m), factor), load_n(weight + i, m)), m); });
}
static void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t n, float* out) {
  F sum = zero();
  each(n, [&](int64_t i, int m) { sum = add(sum, load_n(x + i, m)); });
  const float mean = hsum(sum) / float(n);
  F squares = zero();
  each(n, [&](int64_t i, int m) { F v = keep(sub(load_n(x + i, m), set1(mean)), 0, m, 0.0f); squares = fma(v, v, squares); });
  F factor = set1(1.0f / sqrtf(hsum(squares) / float(n) + eps));
  each(n, [&](int64_t i, int m) {
    store_n(out + i, fma(mul(sub(load_n(x + i, m), set1(mean)), factor), load_n(weight + i, m), load_n(bias + i, m)), m);
  });
}

// -- dense products ---------------------------------------------------------------------------------------------------
//
// Lane i of an accumulator adds the products of columns i, i + 16, i + 32, ... and the lanes are added at the end, so every
// product has one order of additions, whatever the tile. A tile reads each weight and each activation once:
//
//              w row 0   w row 1   w row 2   w row 3
//   x row 0    acc       acc       acc       acc
//   x row 1    acc       acc       acc       acc      ... kDenseTokens x kDenseRows accumulators
//
// The activations of a tile stay in the first-level cache while a band of weights streams from the second:
//
//   for a band of weight rows (half of the second-level cache; 16-bit weights are widened here, once for all tokens)
//     for a tile of tokens
//       for a stretch of columns (accumulators wait in `scratch` between stretches)
//         for each tile of rows in the band

template <class T> static inline F load_weights(const T* p);
template <> inline F load_weights(const float* p) { return load(p); }
struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };
template <> inline F load_weights(const Half* p) { return from_f16(&p->bits); }
template <> inline F load_weights(const BFloat* p) { return from_bf16(&p->bits); }
template <class T> static inline F load_tail(const T* p, int n) {
  T part[16] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load_weights(part);
}

// Threads share a product by tiles of this many weight rows.
constexpr int kTile = 2 * kGemvRows;
constexpr int64_t kStretch = 1536;     // columns
constexpr int64_t kBand = 1 << 17;     // weights

// Adds columns [0, k) to the accumulators of a tile; `saved` holds them before and after, or null: begin with zeros, end with sums.
template <class T, int Tokens, int Rows>
static inline void dense_tile(const T* w, int64_t ldw, int64_t k, const float* x, int64_t ldx, bool begin, bool end, float* saved, float* sums) {
  F acc[Tokens * Rows];
  if (begin) {
#pragma GCC unroll 32
    for (int i = 0; i < Tokens * Rows; ++i) acc[i] = zero();
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < Tokens * Rows; ++i) acc[i] = load(saved + 16 * i);
  }
  const int64_t whole = k & ~int64_t(15);
  for (int64_t i = 0; i < whole; i += 16) {
    F weights[Rows];
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) {
      weights[r] = load_weights(w + r * ldw + i);
      if (Tokens == 1) prefetch(w + (r + Rows) * ldw + i);
    }
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t) {
      F v = load(x + t * ldx + i);
#pragma GCC unroll 32
      for (int r = 0; r < Rows; ++r) acc[t * Rows + r] = fma(v, weights[r], acc[t * Rows + r]);
    }
  }
  if (whole < k) {
    const int n = int(k - whole);
    F weights[Rows];
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) weights[r] = load_tail(w + r * ldw + whole, n);
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t) {
      F v = load_n(x + t * ldx + whole, n);
#pragma GCC unroll 32
      for (int r = 0; r < Rows; ++r) acc[t * Rows + r] = fma(v, weights[r], acc[t * Rows + r]);
    }
  }
  if (end) {
    reduce<Tokens * Rows>(acc, sums);
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < Tokens * Rows; ++i) store(saved + 16 * i, acc[i]);
  }
}

template <int Tokens, int Rows>
static inline void put(const Linear& w, const float* sums, int64_t row, float* y, int64_t ldy) {
  for (int t = 0; t < Tokens; ++t)
    for (int r = 0; r < Rows; ++r) y[t * ldy + row + r] = w.bias ? sums[t * Rows + r] + w.bias[row + r] : sums[t * Rows + r];
}

// A tile of tokens and the rows [first, last) of a band that begins at row `first` of w.
template <class T, int Tokens>
static void dense_band(const Linear& w, const T* band, int64_t first, int64_t last, const float* x, int64_t ldx, float* y, int64_t ldy, float* saved) {
  float sums[Tokens * kDenseRows];
  for (int64_t k = 0; k < w.k; k += kStretch) {
    const bool begin = k == 0, end = k + kStretch >= w.k;
    const int64_t columns = end ? w.k - k : kStretch;
    const T* rows = band + k;
    float* waiting = saved;
    int64_t row = first;
    for (; row + kDenseRows <= last; row += kDenseRows, rows += kDenseRows * w.k, waiting += Tokens * kDenseRows * 16) {
      dense_tile<T, Tokens, kDenseRows>(rows, w.k, columns, x + k, ldx, begin, end, waiting, sums);
      if (end) put<Tokens, kDenseRows>(w, sums, row, y, ldy);
    }
    for (; row < last; ++row, rows += w.k, waiting += Tokens * 16) {
      dense_tile<T, Tokens, 1>(rows, w.k, columns, x + k, ldx, begin, end, waiting, sums);
      if (end) put<Tokens, 1>(w, sums, row, y, ldy);
    }
  }
}

template <class T>
static void dense_tokens(const Linear& w, const T* band, int64_t first, int64_t last, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy,
                         float* saved) {
  int64_t t = 0;
  for (; t + kDenseTokens <= tokens; t += kDenseTokens) dense_band<T, kDenseTokens>(w, band, first, last, x + t * ldx, ldx, y + t * ldy, ldy, saved);
  for (; t + 2 <= tokens; t += 2) dense_band<T, 2>(w, band, first, last, x + t * ldx, ldx, y + t * ldy, ldy, saved);
  for (; t < tokens; ++t) dense_band<T, 1>(w, band, first, last, x + t * ldx, ldx, y + t * ldy, ldy, saved);
}

template <class T>
static void dense_of(const Linear& w, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last, float* scratch) {
  const T* data = static_cast<const T*>(w.data);
  const int64_t begin = first * kTile, end = last * kTile < w.n ? last * kTile : w.n;
  int64_t row = begin;
  if (tokens == 1) {
    float sums[kGemvRows];
    for (; row + kGemvRows <= end; row += kGemvRows) {
      dense_tile<T, 1, kGemvRows>(data + row * w.k, w.k, w.k, x, ldx, true, true, nullptr, sums);
      put<1, kGemvRows>(w, sums, row, y, ldy);
    }
    for (; row < end; ++row) {
      dense_tile<T, 1, 1>(data + row * w.k, w.k, w.k, x, ldx, true, true, nullptr, sums);
      put<1, 1>(w, sums, row, y, ldy);
    }
    return;
  }
  const int64_t rows = kBand / w.k / kDenseRows * kDenseRows > kDenseRows ? kBand / w.k / kDenseRows * kDenseRows : kDenseRows;
  float* saved = scratch + dense_band_floats(w.k);
  for (; row < end; row += rows) {
    const int64_t stop = row + rows < end ? row + rows : end;
    const T* band = data + row * w.k;
    if (sizeof(T) < 4 && tokens >= kDenseTokens) {
      each((stop - row) * w.k, [&](int64_t i, int m) { store_n(scratch + i, m == 16 ? load_weights(band + i) : load_tail(band + i, m), m); });
      dense_tokens<float>(w, scratch, row, stop, x, ldx, tokens, y, ldy, saved);
    } else {
      dense_tokens<T>(w, band, row, stop, x, ldx, tokens, y, ldy, saved);
    }
  }
}

static void dense(const Linear& w, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last, float* scratch) {
  switch (w.kind) {
    case Kind::F16: return dense_of<Half>(w, x, ldx, tokens, y, ldy, first, last, scratch);
    case Kind::BF16: return dense_of<BFloat>(w, x, ldx, tokens, y, ldy, first, last, scratch);
    default: return dense_of<float>(w, x, ldx, tokens, y, ldy, first, last, scratch);
  }
}

static int64_t tile_rows(const Linear& w) { return w.quantized() ? 16 * kQuantPanels : kTile; }

// -- quantized products -----------------------------------------------------------------------------------------------
//
// Lane r of a register belongs to row r of a panel. One 64-byte load holds four columns of each row; the four int8
// activations of those columns are broadcast to all lanes, and a dot product of four adds into each lane's int32.

// The scale of a group is the power of two, 2^e, with which its largest number comes to lie between 64 and 127: it then
// enters a product as an addition to the exponents of the weights' scales, beside the multipliers, not through them.
static void quantize_row(const float* x, int64_t k, const QuantizedRows& out, int64_t row) {
  int8_t* q = out.q + row * out.k_padded;
  F odd = zero();  // stays so unless a number is infinite or none
  for (int64_t g = 0; g * 32 < out.k_padded; ++g) {
    const int64_t left = k - g * 32;
    F a = left >= 16 ? load(x + g * 32) : load_n(x + g * 32, int(left));
    F b = left >= 32 ? load(x + g * 32 + 16) : left > 16 ? load_n(x + g * 32 + 16, int(left - 16)) : zero();
    odd = fma(b, zero(), fma(a, zero(), odd));
    const float largest = hmax(max(abs(a), abs(b)));
    uint32_t bits;
    memcpy(&bits, &largest, 4);
    int32_t e = int32_t((bits + 0x1ffff) >> 23) - 133;  // the least e with largest <= 127 * 2^e
    e = e < kLeastExponent ? kLeastExponent : e;
    bits = uint32_t(127 - e) << 23;
    float inverse;
    memcpy(&inverse, &bits, 4);
    to_i8(q + g * 32, mul(a, set1(inverse)));
    to_i8(q + g * 32 + 16, mul(b, set1(inverse)));
    const int32_t low = -64 * sum_i8(q + g * 32), high = -64 * sum_i8(q + g * 32 + 16);
    out.exponent[row * (out.k_padded / 32) + g] = e * (1 << 23);
    out.offset[row * (out.k_padded / 16) + 2 * g] = low;
    out.offset[row * (out.k_padded / 16) + 2 * g + 1] = high;
    out.offset32[row * (out.k_padded / 32) + g] = low + high;
  }
  out.start[row] = hsum(odd) != 0 ? NAN : 0;  // integers would hide it
}

static inline int32_t four(const int8_t* q) { int32_t x; memcpy(&x, q, 4); return x; }

// Group after group: integers are exact, so only this float32 chain has an order, and it is that of the groups.
static inline F finish(F acc, I sums, Scales scales, int32_t exponent) { return fma(to_float(sums), scaled(scales, exponent), acc); }

#ifndef LLMKIT_I8MM  // simd_neon.h has its own
// Two neighbouring loads of codes, put into the order in which `group_sums` takes them.
static inline void pair(B&, B&) {}

// Adds one group: lane r of sums[t][p] += codes of row r of panel p (from byte `at`) times the activations of token t.
template <int Tokens, int Panels, int Group, bool Eight>
static inline void group_sums(const uint8_t* const* w, int64_t at, const int8_t* q, int64_t ldq, I (*sums)[Panels]) {
#pragma GCC unroll 8
  for (int j = 0; j < Group / 4; ++j) {
    B codes[Panels];
    for (int p = 0; p < Panels; ++p) codes[p] = load_bytes(w[p] + at + 64 * j);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const int32_t four_columns = four(q + t * ldq + 4 * j);
      for (int p = 0; p < Panels; ++p) sums[t][p] = Eight ? dot_q8(sums[t][p], codes[p], four_columns) : dot_q4(sums[t][p], codes[p], four_columns);
    }
  }
}
#endif

// Codes [k_padded / 4][64] of one panel in the order in which the product reads them, looked up in the codebook.
static void unpack(const uint8_t* codes, int64_t blocks, B table, uint8_t* out) {
  for (int64_t b = 0; b < blocks; ++b, codes += 256, out += 512)
    for (int j = 0; j < 4; j += 2) {
      const B first = load_bytes(codes + 64 * j), second = load_bytes(codes + 64 * (j + 1));
      B low[2] = {low_codes(table, first), low_codes(table, second)}, high[2] = {high_codes(table, first), high_codes(table, second)};
      pair(low[0], low[1]);
      pair(high[0], high[1]);
      for (int i = 0; i < 2; ++i) store_bytes(out + 64 * (j + i), low[i]), store_bytes(out + 64 * (j + 4 + i), high[i]);
    }
}

static_assert(kQuantPanels <= kMaxPanels);
constexpr int64_t kFewPasses = 6;
constexpr int64_t kAhead = 4096;       // bytes of codes fetched before they are used

// The sums of all groups become `rows` numbers of y.
static inline void put_panel(const Linear& w, int64_t panel, F acc, int rows, float* y) {
  const F scale = load(w.row_scale + panel * 16);
  store_n(y, w.bias ? fma(acc, scale, load_n(w.bias + panel * 16, rows)) : mul(acc, scale), rows);
}

// Rows [16 panel, 16 (panel + Panels)) of y for `Tokens` tokens, from unpacked codes.
template <int Tokens, int Panels, int Group, bool Eight>
static void quant_tile(const Linear& w, int64_t panel, const uint8_t* const* codes, const QuantizedRows& x, int64_t token, float* y, int64_t ldy) {
  const int64_t groups = x.k_padded / Group, blocks = x.k_padded / 32;
  const int8_t* q = x.q + token * x.k_padded;
  const int32_t* exponents = x.exponent + token * blocks;
  const int32_t* offsets = Group == 32 ? x.offset32 + token * blocks : x.offset + token * 2 * blocks;
  const int8_t* scales[Panels];
  int rows[Panels];
  F acc[Tokens][Panels];
  for (int p = 0; p < Panels; ++p) {
    scales[p] = w.scales + (panel + p) * groups * 16;
    rows[p] = int(w.n - (panel + p) * 16 < 16 ? w.n - (panel + p) * 16 : 16);
    for (int t = 0; t < Tokens; ++t) acc[t][p] = set1(x.start[token + t]);
  }
  for (int64_t g = 0; g < groups; ++g) {
    I sums[Tokens][Panels];
    for (int t = 0; t < Tokens; ++t)
      for (int p = 0; p < Panels; ++p) sums[t][p] = Eight ? start_q8(offsets[t * groups + g]) : set1i(kSignedDot ? 0 : offsets[t * groups + g]);
    group_sums<Tokens, Panels, Group, Eight>(codes, g * Group * 16, q + g * Group, x.k_padded, sums);
    for (int p = 0; p < Panels; ++p) {
      const Scales s = load_scales(scales[p] + g * 16);
      for (int t = 0; t < Tokens; ++t) acc[t][p] = finish(acc[t][p], sums[t][p], s, exponents[t * blocks + g * Group / 32]);
    }
  }
  for (int p = 0; p < Panels; ++p)
    for (int t = 0; t < Tokens; ++t) put_panel(w, panel + p, acc[t][p], rows[p], y + (token + t) * ldy + (panel + p) * 16);
}

// The tokens [token, token + count), count at most Tokens, in one tile of just that size.
template <int Tokens, int Panels, int Group, bool Eight>
static void quant_rest(int64_t count, const Linear& w, int64_t panel, const uint8_t* const* codes, const QuantizedRows& x, int64_t token, float* y,
                       int64_t ldy) {
  if constexpr (Tokens > 0) {
    if (count == Tokens) quant_tile<Tokens, Panels, Group, Eight>(w, panel, codes, x, token, y, ldy);
    else quant_rest<Tokens - 1, Panels, Group, Eight>(count, w, panel, codes, x, token, y, ldy);
  }
}

template <int Panels, int Group, bool Eight>
static void quant_tokens(const Linear& w, int64_t panel, const uint8_t* const* codes, const QuantizedRows& x, int64_t tokens, float* y, int64_t ldy) {
  int64_t t = 0;
  for (; t + kQuantTokens <= tokens; t += kQuantTokens) quant_tile<kQuantTokens, Panels, Group, Eight>(w, panel, codes, x, t, y, ldy);
  quant_rest<kQuantTokens - 1, Panels, Group, Eight>(tokens - t, w, panel, codes, x, t, y, ldy);
}

// A few tokens: codes are looked up on the way and used once for each.
template <int Tokens, int Group>
static void q4_few(const Linear& w, const QuantizedRows& x, int64_t token, float* y, int64_t ldy, int64_t first_panel, int64_t last_panel) {
  const B table = table16(w.lookup);
  const int64_t blocks = x.k_padded / 32, ldo = Group == 32 ? blocks : 2 * blocks;
  const int8_t* q = x.q + token * x.k_padded;
  const int32_t* exponents = x.exponent + token * blocks;
  const int32_t* offsets = Group == 32 ? x.offset32 + token * blocks : x.offset + token * 2 * blocks;
  for (int64_t panel = first_panel; panel < last_panel; ++panel) {
    const uint8_t* codes = static_cast<const uint8_t*>(w.data) + panel * blocks * 256;
    const int8_t* scales = w.scales + panel * (x.k_padded / Group) * 16;
    F acc[Tokens];
    for (int t = 0; t < Tokens; ++t) acc[t] = set1(x.start[token + t]);
    for (int64_t b = 0; b < blocks; ++b, codes += 256) {
      I low[Tokens], high[Tokens];
#pragma GCC unroll 8
      for (int t = 0; t < Tokens; ++t) {
        low[t] = set1i(kSignedDot ? 0 : offsets[t * ldo + (Group == 32 ? b : 2 * b)]);
        high[t] = set1i(kSignedDot || Group == 32 ? 0 : offsets[t * ldo + 2 * b + 1]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        prefetch(codes + 64 * j + kAhead);
        const B c = load_bytes(codes + 64 * j), first = low_codes(table, c), second = high_codes(table, c);
        const int8_t* four_columns = q + b * 32 + 4 * j;
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
          low[t] = dot_q4(low[t], first, four(four_columns + t * x.k_padded));
          high[t] = dot_q4(high[t], second, four(four_columns + t * x.k_padded + 16));
        }
      }
      if (Group == 32) {
        const Scales s = load_scales(scales + b * 16);
        for (int t = 0; t < Tokens; ++t) acc[t] = finish(acc[t], addi(low[t], high[t]), s, exponents[t * blocks + b]);
      } else {
        const Scales one = load_scales(scales + 2 * b * 16), two = load_scales(scales + (2 * b + 1) * 16);
        for (int t = 0; t < Tokens; ++t)
          acc[t] = finish(finish(acc[t], low[t], one, exponents[t * blocks + b]), high[t], two, exponents[t * blocks + b]);
      }
    }
    const int rows = int(w.n - panel * 16 < 16 ? w.n - panel * 16 : 16);
    for (int t = 0; t < Tokens; ++t) put_panel(w, panel, acc[t], rows, y + (token + t) * ldy + panel * 16);
  }
}

template <int Tokens, int Group>
static void q4_rest(int64_t count, const Linear& w, const QuantizedRows& x, int64_t token, float* y, int64_t ldy, int64_t first_panel, int64_t last_panel) {
  if constexpr (Tokens > 0) {
    if (count == Tokens) q4_few<Tokens, Group>(w, x, token, y, ldy, first_panel, last_panel);
    else q4_rest<Tokens - 1, Group>(count, w, x, token, y, ldy, first_panel, last_panel);
  }
}

template <int Group, bool Eight>
static void quantized_of(const Linear& w, const QuantizedRows& x, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last, uint8_t* scratch) {
  const int64_t panels = (w.n + 15) / 16, blocks = x.k_padded / 32;
  const int64_t begin = first * kQuantPanels, end = last * kQuantPanels < panels ? last * kQuantPanels : panels;
  if (!Eight && tokens <= kFewTokens) return q4_rest<kFewTokens, Group>(tokens, w, x, 0, y, ldy, begin, end);
  if (!Eight && tokens <= kFewPasses * kFewTokens) {  // unpacking would cost more than to look the codes up for each
    for (int64_t panel = begin; panel < end; ++panel) {
      int64_t t = 0;
      for (; t + kFewTokens <= tokens; t += kFewTokens) q4_few<kFewTokens, Group>(w, x, t, y, ldy, panel, panel + 1);
      q4_rest<kFewTokens - 1, Group>(tokens - t, w, x, t, y, ldy, panel, panel + 1);
    }
    return;
  }
  const B table = Eight ? B{} : table16(w.lookup);
  for (int64_t panel = begin; panel < end;) {
    const int count = end - panel >= kQuantPanels ? kQuantPanels : 1;
    const uint8_t* codes[kQuantPanels];
    for (int p = 0; p < count; ++p) {
      if (Eight) {
        codes[p] = static_cast<const uint8_t*>(w.data) + (panel + p) * blocks * 512;
      } else {
        unpack(static_cast<const uint8_t*>(w.data) + (panel + p) * blocks * 256, blocks, table, scratch + p * blocks * 512);
        codes[p] = scratch + p * blocks * 512;
      }
    }
    if (count == kQuantPanels) quant_tokens<kQuantPanels, Group, Eight>(w, panel, codes, x, tokens, y, ldy);
    else quant_tokens<1, Group, Eight>(w, panel, codes, x, tokens, y, ldy);
    panel += count;
  }
}

static void quantized(const Linear& w, const QuantizedRows& x, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last, uint8_t* scratch) {
  if (w.kind == Kind::Q8) quantized_of<32, true>(w, x, tokens, y, ldy, first, last, scratch);
  else if (w.group == 16) quantized_of<16, false>(w, x, tokens, y, ldy, first, last, scratch);
  else quantized_of<32, false>(w, x, tokens, y, ldy, first, last, scratch);
}

static void embed_row(const Linear& w, int64_t row, float* out) {
  if (w.kind == Kind::F32) {
    memcpy(out, static_cast<const float*>(w.data) + row * w.k, size_t(w.k) * 4);
  } else if (!w.quantized()) {
    const uint16_t* p = static_cast<const uint16_t*>(w.data) + row * w.k;
    each(w.k, [&](int64_t i, int m) {
      uint16_t part[16] = {};
      memcpy(part, p + i, size_t(m) * 2);
      store_n(out + i, w.kind == Kind::F16 ? from_f16(part) : from_bf16(part), m);
    });
  } else {
    const int64_t padded = round_up(w.k, 32), panel = row / 16, lane = row % 16;
    const int block = w.kind == Kind::Q4 ? 256 : 512;
    const uint8_t* codes = static_cast<const uint8_t*>(w.data) + panel * (padded / 32) * block;
    const int8_t* scales = w.scales + panel * (padded / w.group) * 16;
    for (int64_t i = 0; i < w.k; ++i) {
      const int64_t column = i % 32, j = column / 4;
      float value;
      if (w.kind == Kind::Q4) {
        const uint8_t byte = codes[i / 32 * 256 + j % 4 * 64 + lane * 4 + column % 4];
        value = float(int(w.codebook[j < 4 ? byte & 15 : byte >> 4]) - 64);
      } else {
        value = float(int8_t(codes[i / 32 * 512 + j * 64 + lane * 4 + column % 4]));
      }
      out[i] = value * float(scales[i / w.group * 16 + lane]) * w.row_scale[row];
    }
  }
}

// -- the cache and attention ------------------------------------------------------------------------------------------

// One head of one position as the cache keeps it: float32, float16 or int8 with the scale that is returned.
static float narrow(Kind kind, const float* x, int64_t n, void* out) {
  if (kind == Kind::F32) {
    memcpy(out, x, size_t(n) * 4);
    return 1;
  }
  if (kind == Kind::F16) {
    const F limit = set1(65504.0f), lowest = set1(-65504.0f);  // what no half can hold would become infinite
    each(n, [&](int64_t i, int m) {
      uint16_t part[16];
      to_f16(part, min(max(load_n(x + i, m), lowest), limit));
      memcpy(static_cast<uint16_t*>(out) + i, part, size_t(m) * 2);
    });
    return 1;
  }
  F largest = zero();
  each(n, [&](int64_t i, int m) { largest = max(largest, abs(load_n(x + i, m))); });
  const float most = hmax(largest);
  const F inverse = set1(most > 0 ? 127.0f / most : 0.0f);
  each(n, [&](int64_t i, int m) {
    int8_t part[16];
    to_i8(part, mul(load_n(x + i, m), inverse));
    memcpy(static_cast<int8_t*>(out) + i, part, size_t(m));
  });
  return most / 127.0f;
}

// k, v: [kv_heads, dim] of one position, into slot `slot` of block `block`. Keys are stored position fastest.
template <class T>
static void store_heads(const KVStorage& c, int64_t block, int64_t slot, const float* k, const float* v) {
  T one[kMaxHeadDim];
  for (int64_t h = 0; h < c.kv_heads; ++h, k += c.dim, v += c.dim) {
    T* keys = c.keys_of<T>(h, block) + slot;
    const float key_scale = narrow(c.kind, k, c.dim, one);
    for (int64_t d = 0; d < c.dim; ++d) keys[d * BLOCK] = one[d];
    const float value_scale = narrow(c.kind, v, c.dim, c.values_of<T>(h, block) + slot * c.dim_padded);
    if (c.kind == Kind::Q8) c.key_scales_of(h, block)[slot] = key_scale, c.value_scales_of(h, block)[slot] = value_scale;
  }
}
static void store_kv(const KVStorage& c, int64_t block, int64_t slot, const float* k, const float* v) {
  if (c.kind == Kind::F32) store_heads<float>(c, block, slot, k, v);
  else if (c.kind == Kind::F16) store_heads<uint16_t>(c, block, slot, k, v);
  else store_heads<int8_t>(c, block, slot, k, v);
}

struct Int8 { int8_t bits; };
template <> inline F load_weights(const Int8* p) { return from_i8(&p->bits); }

// scores[r][16 b + j] = q[r] . key j of block b, for `Rows` query rows and `Blocks` blocks.
template <class T, int Rows, int Blocks>
static inline void score_blocks(const T* const* keys, int64_t dim, const float* const* q, float* scores, const F* factors) {
  F acc[Rows][Blocks];
  for (auto& row : acc) for (F& a : row) a = zero();
  for (int64_t d = 0; d < dim; ++d) {
    F key[Blocks];
#pragma GCC unroll 8
    for (int b = 0; b < Blocks; ++b) {
      key[b] = load_weights(keys[b] + d * BLOCK);
      prefetch_l2(keys[b] + (d + Blocks * dim) * BLOCK);  // the blocks of a sequence mostly follow one another
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const F query = set1(q[r][d]);
#pragma GCC unroll 8
      for (int b = 0; b < Blocks; ++b) acc[r][b] = fma(query, key[b], acc[r][b]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int b = 0; b < Blocks; ++b) store(scores + r * CHUNK + b * BLOCK, mul(acc[r][b], factors[b]));
}

// out[r] += weights[r][j] * value j over `keys` keys, columns [d, d + 16 Parts).
template <class T, int Rows, int Parts>
static inline void add_values(const T* const* values, int keys, int64_t dim_padded, int64_t d, const float* weights, float* out, int64_t ldo) {
  F acc[Rows][Parts];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < Parts; ++p) acc[r][p] = load(out + r * ldo + d + 16 * p);
  for (int j = 0; j < keys; ++j) {
    const T* from = values[j / BLOCK] + (j % BLOCK) * dim_padded + d;
    F value[Parts];
#pragma GCC unroll 8
    for (int p = 0; p < Parts; ++p) {
      value[p] = load_weights(from + 16 * p);
      prefetch_l2(from + 16 * p + 2 * BLOCK * dim_padded);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const F weight = set1(weights[r * CHUNK + j]);
#pragma GCC unroll 8
      for (int p = 0; p < Parts; ++p) acc[r][p] = fma(weight, value[p], acc[r][p]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < Parts; ++p) store(out + r * ldo + d + 16 * p, acc[r][p]);
}

// Flash attention (arXiv:2205.14135) over the keys of one split. The running maximum is corrected once per CHUNK keys at
// positions that are multiples of CHUNK, so a row sees the same operations whatever rows share its tile; keys that a row
// may not see get the weight 0, which changes nothing.
template <class T, int Rows>
static void attend_rows(const AttentionArgs& a, int64_t kv_head, const float* const* q, const int32_t* positions, int64_t split, Partial* state,
                        float* out, int64_t ldo, float* scratch) {
  const KVStorage& c = *a.cache;
  constexpr int kBlocks = Rows * 4 <= kAccumulators ? 4 : Rows * 2 <= kAccumulators ? 2 : 1;  // also runs of 16 columns of the values
  float* weights = scratch;  // [Rows, CHUNK]
  int64_t newest = positions[0], oldest = positions[0];
  for (int r = 1; r < Rows; ++r) newest = positions[r] > newest ? positions[r] : newest, oldest = positions[r] < oldest ? positions[r] : oldest;
  const int64_t visible = a.window ? (oldest - a.window + 1 > 0 ? oldest - a.window + 1 : 0) : 0;  // the first key that some row sees
  F sums[Rows];
  for (int r = 0; r < Rows; ++r) {
    state[r].maximum = -INFINITY;
    sums[r] = zero();
    for (int64_t d = 0; d < c.dim_padded; d += 16) store(out + r * ldo + d, zero());
  }
  const int64_t end = (split + 1) * SPLIT < newest + 1 ? (split + 1) * SPLIT : newest + 1;
  int64_t start = split * SPLIT;
  if (visible > start) start = visible / CHUNK * CHUNK;
  for (int64_t chunk = start; chunk < end; chunk += CHUNK) {
    const int count = int(end - chunk < CHUNK ? end - chunk : CHUNK), stop = (count + BLOCK - 1) / BLOCK;
    const int skipped = visible > chunk ? int(visible - chunk) / BLOCK : 0;  // blocks behind the window may be gone
    const T *key_blocks[CHUNK / BLOCK], *value_blocks[CHUNK / BLOCK];
    F factors[CHUNK / BLOCK];
    for (int b = skipped; b < stop; ++b) {
      const int32_t block = a.table[chunk / BLOCK + b];
      key_blocks[b] = c.keys_of<T>(kv_head, block);
      value_blocks[b] = c.values_of<T>(kv_head, block);
      factors[b] = c.kind == Kind::Q8 ? mul(set1(a.scale), load(c.key_scales_of(kv_head, block))) : set1(a.scale);
    }
    for (int b = 0; b < skipped; ++b)
      for (int r = 0; r < Rows; ++r) store(weights + r * CHUNK + b * BLOCK, set1(-INFINITY));
    int scored = skipped;
    for (; scored + kBlocks <= stop; scored += kBlocks)
      score_blocks<T, Rows, kBlocks>(key_blocks + scored, c.dim, q, weights + scored * BLOCK, factors + scored);
    for (; scored < stop; ++scored)
      score_blocks<T, Rows, 1>(key_blocks + scored, c.dim, q, weights + scored * BLOCK, factors + scored);
    for (int r = 0; r < Rows; ++r) {
      float* w = weights + r * CHUNK;
      F largest = set1(-INFINITY);
      for (int b = 0; b * BLOCK < count; ++b) {
        const int64_t key = chunk + b * BLOCK, last = positions[r] + 1 - key, first = a.window ? positions[r] - a.window + 1 - key : 0;
        F s = load(w + b * BLOCK);
        if (a.softcap != 0 && b >= skipped) s = mul(set1(a.softcap), tanh(div(s, set1(a.softcap))));
        if (last < BLOCK || first > 0)
          s = keep(s, first > 0 ? (first < BLOCK ? int(first) : BLOCK) : 0, last > 0 ? (last < BLOCK ? int(last) : BLOCK) : 0, -INFINITY);
        store(w + b * BLOCK, s);
        largest = max(largest, s);
      }
      const float before = state[r].maximum, chunk_max = hmax(largest);
      const float now = before > chunk_max ? before : chunk_max;
      if (now == -INFINITY) {  // nothing visible yet
        for (int b = 0; b * BLOCK < count; ++b) store(w + b * BLOCK, zero());
        continue;
      }
      if (now != before) {
        const F correction = set1(exp1(before - now));
        sums[r] = mul(sums[r], correction);
        for (int64_t d = 0; d < c.dim_padded; d += 16) store(out + r * ldo + d, mul(load(out + r * ldo + d), correction));
        state[r].maximum = now;
      }
      for (int b = 0; b * BLOCK < count; ++b) {
        F e = exp(sub(load(w + b * BLOCK), set1(now)));
        sums[r] = add(sums[r], e);
        if (c.kind == Kind::Q8 && b >= skipped) {
          e = mul(e, load(c.value_scales_of(kv_head, a.table[chunk / BLOCK + b])));
        }
        store(w + b * BLOCK, e);
      }
    }
    const int64_t run = 16 * kBlocks, wide = c.dim_padded / run * run;
    for (int64_t d = 0; d < c.dim_padded; d += d < wide ? run : 16) {
      const T* const* from = value_blocks + skipped;
      const float* w = weights + skipped * BLOCK;
      const int seen = count - skipped * BLOCK;
      if (d < wide) add_values<T, Rows, kBlocks>(from, seen, c.dim_padded, d, w, out, ldo);
      else add_values<T, Rows, 1>(from, seen, c.dim_padded, d, w, out, ldo);
    }
  }
  for (int r = 0; r < Rows; ++r) state[r].sum = hsum(sums[r]);
}

template <class T>
static void attend_of(const AttentionArgs& a, int64_t kv_head, const float* const* q, const int32_t* positions, int rows, int64_t split,
                      Partial* state, float* out, int64_t ldo, float* scratch) {
  switch (rows) {
    case 1: return attend_rows<T, 1>(a, kv_head, q, positions, split, state, out, ldo, scratch);
    case 2: return attend_rows<T, 2>(a, kv_head, q, positions, split, state, out, ldo, scratch);
    case 3: return attend_rows<T, 3>(a, kv_head, q, positions, split, state, out, ldo, scratch);
    case 4: return attend_rows<T, 4>(a, kv_head, q, positions, split, state, out, ldo, scratch);
    case 5: return attend_rows<T, 5>(a, kv_head, q, positions, split, state, out, ldo, scratch);
    case 6: return attend_rows<T, 6>(a, kv_head, q, positions, split, state, out, ldo, scratch);
    case 7: return attend_rows<T, 7>(a, kv_head, q, positions, split, state, out, ldo, scratch);
    default: return attend_rows<T, TILE_ROWS>(a, kv_head, q, positions, split, state, out, ldo, scratch);
  }
}

static void attend(const AttentionArgs& a, int64_t kv_head, const float* const* q, const int32_t* positions, int rows, int64_t split, Partial* state,
                   float* out, int64_t ldo, float* scratch) {
  switch (a.cache->kind) {
    case Kind::F32: return attend_of<float>(a, kv_head, q, positions, rows, split, state, out, ldo, scratch);
    case Kind::F16: return attend_of<Half>(a, kv_head, q, positions, rows, split, state, out, ldo, scratch);
    default: return attend_of<Int8>(a, kv_head, q, positions, rows, split, state, out, ldo, scratch);
  }
}

// Adds a later split to the total. A split in which nothing was visible leaves every bit as it is.
static void merge(Partial* total, float* out, const Partial* part, const float* part_out, int64_t dim) {
  if (part->maximum == -INFINITY) return;
  if (total->maximum == -INFINITY) {
    *total = *part;
    memcpy(out, part_out, size_t(dim) * 4);
    return;
  }
  const float maximum = total->maximum > part->maximum ? total->maximum : part->maximum;
  const float a = exp1(total->maximum - maximum), b = exp1(part->maximum - maximum);
  total->sum = fmaf(part->sum, b, total->sum * a);
  total->maximum = maximum;
  for (int64_t d = 0; d < dim; d += 16) store(out + d, fma(load(part_out + d), set1(b), mul(load(out + d), set1(a))));
}

static const Kernels kTable = {KERNELS_NAME, kSignedDot, tile_rows, dense, quantized, quantize_row, rms_norm, layer_norm, add_scaled, activate, softcap, embed_row, store_kv, attend, merge};
