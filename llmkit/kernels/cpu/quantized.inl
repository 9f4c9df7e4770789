// Quantized products: rows of activations rounded to int8, integer dot products, one float32 chain per result.
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

// The sums of all groups, sum(t), become numbers of y.
template <int Tokens, class Sum>
static inline void store_panel(const Linear& w, int64_t panel, Sum sum, float* y, int64_t ldy) {
  const int64_t row = panel * 16;
  const F scale = load(w.row_scale + row);
  y += row;
  if (!w.bias && row + 16 <= w.n) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) store(y + t * ldy, mul(sum(t), scale));
    return;
  }
  const int rows = int(w.n - row < 16 ? w.n - row : 16);
  const F bias = w.bias ? load_n(w.bias + row, rows) : zero();
#pragma GCC unroll 8
  for (int t = 0; t < Tokens; ++t) store_n(y + t * ldy, w.bias ? fma(sum(t), scale, bias) : mul(sum(t), scale), rows);
}

// Rows [16 panel, 16 (panel + Panels)) of y for `Tokens` tokens, from unpacked codes.
template <int Tokens, int Panels, int Group, bool Eight>
static void quant_tile(const Linear& w, int64_t panel, const uint8_t* const* codes, const QuantizedRows& x, int64_t token, float* y, int64_t ldy) {
  const int64_t groups = x.k_padded / Group, blocks = x.k_padded / 32;
  const int8_t* q = x.q + token * x.k_padded;
  const int32_t* exponents = x.exponent + token * blocks;
  const int32_t* offsets = Group == 32 ? x.offset32 + token * blocks : x.offset + token * 2 * blocks;
  const int8_t* scales[Panels];
  F acc[Tokens][Panels];
#pragma GCC unroll 8
  for (int p = 0; p < Panels; ++p) {
    scales[p] = w.scales + (panel + p) * groups * 16;
    for (int t = 0; t < Tokens; ++t) prefetch(y + (token + t) * ldy + (panel + p) * 16);
#pragma GCC unroll 8
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
#pragma GCC unroll 8
  for (int p = 0; p < Panels; ++p) store_panel<Tokens>(w, panel + p, [&](int t) { return acc[t][p]; }, y + token * ldy, ldy);
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
    store_panel<Tokens>(w, panel, [&](int t) { return acc[t]; }, y + token * ldy, ldy);
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
