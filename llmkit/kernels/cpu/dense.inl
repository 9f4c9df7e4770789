// Dense products: weights as the checkpoint stores them, float32 arithmetic.
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
//   for a band of weight rows (half of the second-level cache; 16-bit weights are upcast here, once for all tokens)
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

constexpr int kTile = 16;              // weight rows, by which threads share a product
constexpr int64_t kStretch = 1536;     // columns
constexpr int64_t kBand = 1 << 17;     // weights
constexpr int kFar = 1 << 13;          // bytes of weights that are on their way into the second-level cache while a single token meets them

// Adds columns [0, k) to the accumulators of a tile; `saved` holds them before and after, or null: begin with zeros, end with sums.
// far: at least kFar bytes of rows follow on this one.
template <class T, int Tokens, int Rows>
static inline void dense_tile(const T* w, int64_t ldw, int64_t k, const float* x, int64_t ldx, bool begin, bool end, float* saved, float* sums, bool far = false) {
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
    const T* row = w + i;  // moves from row to row: more pointers than there are registers would be loaded again each time
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r, row += ldw) weights[r] = load_weights(row);
    if (Tokens * Rows == 1 && far) prefetch_l2(reinterpret_cast<const char*>(w + i) + kFar);
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
static inline void store_tile(const Linear& w, float* sums, int64_t row, float* y, int64_t ldy) {
  if (w.bias)
    for (int i = 0; i < Tokens * Rows; ++i) sums[i] += w.bias[row + i % Rows];
  for (int t = 0; t < Tokens; ++t) memcpy(y + t * ldy + row, sums + t * Rows, Rows * sizeof(float));
}

// A tile of tokens and the rows [first, last) of a band that begins at row `first` of w.
template <class T, int Tokens>
static void dense_band(const Linear& w, const T* band, int64_t ldw, int64_t first, int64_t last, const float* x, int64_t ldx, float* y, int64_t ldy,
                       float* saved) {
  float sums[Tokens * kDenseRows];
  const int64_t stretches = (w.k + kStretch - 1) / kStretch, stretch = round_up((w.k + stretches - 1) / stretches, 16);
  for (int64_t k = 0; k < w.k; k += stretch) {
    const bool begin = k == 0, end = k + stretch >= w.k;
    const int64_t columns = end ? w.k - k : stretch;
    const T* rows = band + k;
    float* waiting = saved;
    int64_t row = first;
    for (; row + kDenseRows <= last; row += kDenseRows, rows += kDenseRows * ldw, waiting += Tokens * kDenseRows * 16) {
      dense_tile<T, Tokens, kDenseRows>(rows, ldw, columns, x + k, ldx, begin, end, waiting, sums);
      if (end) store_tile<Tokens, kDenseRows>(w, sums, row, y, ldy);
    }
    for (; row < last; ++row, rows += ldw, waiting += Tokens * 16) {
      dense_tile<T, Tokens, 1>(rows, ldw, columns, x + k, ldx, begin, end, waiting, sums);
      if (end) store_tile<Tokens, 1>(w, sums, row, y, ldy);
    }
  }
}

template <class T>
static void dense_tokens(const Linear& w, const T* band, int64_t ldw, int64_t first, int64_t last, const float* x, int64_t ldx, int64_t tokens, float* y,
                         int64_t ldy, float* saved) {
  int64_t t = 0;
  for (; t + kDenseTokens <= tokens; t += kDenseTokens) dense_band<T, kDenseTokens>(w, band, ldw, first, last, x + t * ldx, ldx, y + t * ldy, ldy, saved);
  for (; t + 2 <= tokens; t += 2) dense_band<T, 2>(w, band, ldw, first, last, x + t * ldx, ldx, y + t * ldy, ldy, saved);
  for (; t < tokens; ++t) dense_band<T, 1>(w, band, ldw, first, last, x + t * ldx, ldx, y + t * ldy, ldy, saved);
}

template <class T>
static void dense_of(const Linear& w, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last, float* scratch) {
  const T* data = static_cast<const T*>(w.data);
  const int64_t begin = first * kTile, end = last * kTile < w.n ? last * kTile : w.n;
  int64_t row = begin;
  if (tokens == 1) {  // row after row: nothing is faster than one stream
    for (float sum; row < end; ++row) {
      const bool far = (end - row - 1) * w.k * int64_t(sizeof(T)) >= kFar;
      dense_tile<T, 1, 1>(data + row * w.k, w.k, w.k, x, ldx, true, true, nullptr, &sum, far);
      store_tile<1, 1>(w, &sum, row, y, ldy);
    }
    return;
  }
  const int64_t ld = dense_band_stride(w.k), rows = kBand / ld / kDenseRows * kDenseRows > kDenseRows ? kBand / ld / kDenseRows * kDenseRows : kDenseRows;
  float* saved = scratch + dense_band_floats(w.k);
  for (; row < end; row += rows) {
    const int64_t stop = row + rows < end ? row + rows : end;
    const T* band = data + row * w.k;
    if (sizeof(T) < 4 && tokens >= kDenseTokens) {
      for (int64_t r = 0; r < stop - row; ++r)
        each(w.k, [&](int64_t i, int m) { store_n(scratch + r * ld + i, m == 16 ? load_weights(band + r * w.k + i) : load_tail(band + r * w.k + i, m), m); });
      dense_tokens<float>(w, scratch, ld, row, stop, x, ldx, tokens, y, ldy, saved);
    } else {
      dense_tokens<T>(w, band, w.k, row, stop, x, ldx, tokens, y, ldy, saved);
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

// Low-rank terms: sums over the rank in its order, a lane for each output, so that a result depends on nothing else.
template <int Tokens, int Vectors>
static inline void low_rank_tile(const float* b, int64_t n, int64_t rank, const float* x, int64_t ldx, float* y, int64_t ldy) {
  F acc[Tokens * Vectors];
#pragma GCC unroll 32
  for (int i = 0; i < Tokens * Vectors; ++i) acc[i] = zero();
  for (int64_t r = 0; r < rank; ++r, b += n) {
    F row[Vectors];
#pragma GCC unroll 32
    for (int i = 0; i < Vectors; ++i) row[i] = load(b + 16 * i);
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t) {
      F v = set1(x[t * ldx + r]);
#pragma GCC unroll 32
      for (int i = 0; i < Vectors; ++i) acc[t * Vectors + i] = fma(v, row[i], acc[t * Vectors + i]);
    }
  }
  for (int t = 0; t < Tokens; ++t)
    for (int i = 0; i < Vectors; ++i) store(y + t * ldy + 16 * i, add(load(y + t * ldy + 16 * i), acc[t * Vectors + i]));
}

template <int Vectors>
static inline void low_rank_columns(const float* b, int64_t n, int64_t rank, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy) {
  int64_t t = 0;
  for (; t + 4 <= tokens; t += 4) low_rank_tile<4, Vectors>(b, n, rank, x + t * ldx, ldx, y + t * ldy, ldy);
  for (; t < tokens; ++t) low_rank_tile<1, Vectors>(b, n, rank, x + t * ldx, ldx, y + t * ldy, ldy);
}

static void add_low_rank_rows(const float* b, int64_t n, int64_t rank, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last) {
  int64_t i = first;
  for (; i + 32 <= last; i += 32) low_rank_columns<2>(b + i, n, rank, x, ldx, tokens, y + i, ldy);
  for (; i + 16 <= last; i += 16) low_rank_columns<1>(b + i, n, rank, x, ldx, tokens, y + i, ldy);
  const int rest = int(last - i);
  for (int64_t t = 0; rest && t < tokens; ++t) {
    F acc = zero();
    for (int64_t r = 0; r < rank; ++r) acc = fma(set1(x[t * ldx + r]), load_n(b + r * n + i, rest), acc);
    float* row = y + t * ldy + i;
    store_n(row, add(load_n(row, rest), acc), rest);
  }
}

static void add_low_rank(const float* b, int64_t n, int64_t rank, const float* x, int64_t ldx, int64_t tokens, float* y, int64_t ldy, int64_t first, int64_t last) {
  constexpr int64_t kRows = 16;  // of y, which stay in the second-level cache beside b
  for (int64_t t = 0; t < tokens; t += kRows)
    add_low_rank_rows(b, n, rank, x + t * ldx, ldx, tokens - t < kRows ? tokens - t : kRows, y + t * ldy, ldy, first, last);
}
