// Matmuls of training, float32: y_p = x U_p^T + bias_p, and in the backward pass dx = sum over p of dy_p U_p, where U_p = W_p + scale_p B_p A_p is made
// on the way and never stored. Both are  C[tokens, columns] += A[tokens, depth] B[depth, columns]  with B a part of the U:
//
//              columns of a panel (kMatVectors vectors)
//   row 0      acc  acc        for d in a stretch: the number A[row, d] times the panel's vectors at d
//   row 1      acc  acc ...    kMatRows x kMatVectors accumulators
//
//   for a group of panels
//     for a stretch of the depth
//       pack the group's panels: [panel][d][columns]
//       for a block of tokens: copy its columns of the stretch, so that rows lie close together whatever the stride was
//         for each panel: for each tile of rows

constexpr int64_t kMatDepth = 576;       // of a stretch: long, so that accumulators are seldom written back; a panel streams from the second-level cache
constexpr int64_t kMatTokens = 48;       // rows of a block: with kMatDepth columns 108 KiB, which stay in the second-level cache
constexpr int64_t kMatGroup = 768;       // columns of a group of panels
constexpr int kMatColumns = 16 * kMatVectors;
constexpr int64_t kMatStride = kMatDepth + 16;  // of the copied rows: neighbours fall into different sets of the cache
static_assert((kMatGroup * kMatDepth + kMatTokens * kMatStride + 16 * kMatDepth) <= kMatmulScratch, "the scratch of a thread");

// A[row, d] is a[row * Stride + d], or a[d * Stride + row] where A is transposed.
template <int Rows, int Vectors, int64_t Stride, bool Transposed>
static inline void mat_tile(const float* panel, int64_t depth, const float* a, float* c, int64_t ldc, int columns, const float* bias, bool begin) {
  F acc[Rows * Vectors];
#pragma GCC unroll 32
  for (int i = 0; i < Rows * Vectors; ++i) acc[i] = zero();
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; i < columns; i += 16) prefetch(c + r * ldc + i);
  for (int64_t d = 0; d < depth; ++d, panel += kMatColumns, a += Transposed ? Stride : 1) {
    F b[Vectors];
#pragma GCC unroll 4
    for (int i = 0; i < Vectors; ++i) b[i] = load(panel + 16 * i);
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) {
      const F v = set1(a[Transposed ? r : r * Stride]);
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i) acc[r * Vectors + i] = fma(v, b[i], acc[r * Vectors + i]);
    }
  }
  if (columns == 16 * Vectors) {
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < Vectors; ++i) {
        float* to = c + r * ldc + 16 * i;
        F sum = acc[r * Vectors + i];
        if (!begin) sum = add(load(to), sum);
        else if (bias) sum = add(load(bias + 16 * i), sum);
        store(to, sum);
      }
    return;
  }
  for (int r = 0; r < Rows; ++r)
    for (int i = 0; 16 * i < columns; ++i) {
      float* to = c + r * ldc + 16 * i;
      const int n = columns - 16 * i < 16 ? columns - 16 * i : 16;
      F sum = acc[r * Vectors + i];
      if (!begin) sum = add(load_n(to, n), sum);
      else if (bias) sum = add(load_n(bias + 16 * i, n), sum);
      store_n(to, sum, n);
    }
}

template <int Vectors, int64_t Stride, bool Transposed>
static void mat_rows_of(const float* panel, int64_t depth, const float* a, int64_t rows, float* c, int64_t ldc, int columns, const float* bias, bool begin) {
  constexpr int64_t step = Transposed ? 1 : Stride;
  int64_t t = 0;
  for (; t + kMatRows <= rows; t += kMatRows) mat_tile<kMatRows, Vectors, Stride, Transposed>(panel, depth, a + t * step, c + t * ldc, ldc, columns, bias, begin);
  for (; t + 4 <= rows; t += 4) mat_tile<4, Vectors, Stride, Transposed>(panel, depth, a + t * step, c + t * ldc, ldc, columns, bias, begin);
  for (; t < rows; ++t) mat_tile<1, Vectors, Stride, Transposed>(panel, depth, a + t * step, c + t * ldc, ldc, columns, bias, begin);
}

template <int64_t Stride, bool Transposed = false>
static void mat_rows(const float* panel, int64_t depth, const float* a, int64_t rows, float* c, int64_t ldc, int columns, const float* bias, bool begin) {
  if (columns > 16) return mat_rows_of<kMatVectors, Stride, Transposed>(panel, depth, a, rows, c, ldc, columns, bias, begin);
  mat_rows_of<1, Stride, Transposed>(panel, depth, a, rows, c, ldc, columns, bias, begin);
}

// Columns [first, first + count) of the rows [n, n + Rows) of U, to out [Rows, ldo].
template <class T, int Rows>
static inline void adapted_rows(const Factor& f, int64_t n, int64_t first, int64_t count, float* out, int64_t ldo) {
  const T* w = static_cast<const T*>(f.w.data) + n * f.w.k + first;
  const F scale = set1(f.scale);
  const bool more = f.rank && n + 2 * Rows <= f.w.n;
  each(count, [&](int64_t i, int m) {
    for (int r = 0; r < Rows && more; ++r) prefetch(w + (Rows + r) * f.w.k + i);  // the next ones, far apart, come while these are computed
    F sum[Rows];
    for (int r = 0; r < Rows; ++r) sum[r] = zero();
    const float* b = f.b + n * f.rank;
    for (int64_t j = 0, at = first + i; j < f.rank; ++j, at += f.w.k) {  // without a rank there is no A
      const F v = load_n(f.a + at, m);
#pragma GCC unroll 8
      for (int r = 0; r < Rows; ++r) sum[r] = fma(set1(b[r * f.rank + j]), v, sum[r]);
    }
    for (int r = 0; r < Rows; ++r) {
      const F stored = m == 16 ? load_weights(w + r * f.w.k + i) : load_tail(w + r * f.w.k + i, m);
      store_n(out + r * ldo + i, f.rank ? fma(scale, sum[r], stored) : stored, m);
    }
  });
}

template <class T>
static void adapted_of(const Factor& f, int64_t n, int64_t rows, int64_t first, int64_t count, float* out, int64_t ldo) {
  int64_t r = 0;
  for (; r + 8 <= rows; r += 8) adapted_rows<T, 8>(f, n + r, first, count, out + r * ldo, ldo);
  for (; r < rows; ++r) adapted_rows<T, 1>(f, n + r, first, count, out + r * ldo, ldo);
}

static void adapted(const Factor& f, int64_t n, int64_t rows, int64_t first, int64_t count, float* out, int64_t ldo) {
  switch (f.w.kind) {
    case Kind::F16: return adapted_of<Half>(f, n, rows, first, count, out, ldo);
    case Kind::BF16: return adapted_of<BFloat>(f, n, rows, first, count, out, ldo);
    default: return adapted_of<float>(f, n, rows, first, count, out, ldo);
  }
}

// Rows [n, n + rows) and columns [first, first + depth) of U, transposed: panel[d][row]. rows at most kMatColumns; the others are 0.
static void pack_forward(const Factor& f, int64_t n, int rows, int64_t first, int64_t depth, float* panel, float* scratch) {
  for (int group = 0; group < kMatColumns; group += 16) {
    const int own = rows - group < 16 ? (rows > group ? rows - group : 0) : 16;
    adapted(f, n + group, own, first, depth, scratch, kMatDepth);
    for (int r = own; r < 16; ++r) memset(scratch + r * kMatDepth, 0, size_t(depth) * 4);
    int64_t d = 0;
    for (; d + 16 <= depth; d += 16) transpose16(scratch + d, kMatDepth, panel + d * kMatColumns + group, kMatColumns);
    for (; d < depth; ++d)
      for (int r = 0; r < 16; ++r) panel[d * kMatColumns + group + r] = scratch[r * kMatDepth + d];
  }
}

// Rows [n, n + depth) and columns [first, first + columns) of U: panel[row][column].
static void pack_back(const Factor& f, int64_t n, int64_t depth, int64_t first, int columns, float* panel) {
  if (columns < kMatColumns) memset(panel, 0, size_t(depth) * kMatColumns * 4);
  adapted(f, n, depth, first, columns, panel, kMatColumns);
}

struct MatPanel { int part; int64_t column; int columns; };
static inline MatPanel panel_at(const Matmul& m, int64_t index) {
  if (m.back) {
    const int64_t k = m.factors[0].w.k, column = index * kMatColumns;
    return {0, column, int(k - column < kMatColumns ? k - column : kMatColumns)};
  }
  for (int p = 0;; ++p) {
    const int64_t n = m.factors[p].w.n, own = (n + kMatColumns - 1) / kMatColumns;
    if (index < own) return {p, index * kMatColumns, int(n - index * kMatColumns < kMatColumns ? n - index * kMatColumns : kMatColumns)};
    index -= own;
  }
}

static int64_t matmul_panels(const Matmul& m) {
  int64_t panels = 0;
  for (int p = 0; p < (m.back ? 1 : m.parts); ++p) panels += ((m.back ? m.factors[p].w.k : m.factors[p].w.n) + kMatColumns - 1) / kMatColumns;
  return panels;
}

// The columns of the panels [first, last).
static void matmul(const Matmul& m, int64_t first, int64_t last, float* scratch) {
  float* const packed = scratch;
  float* const rows = packed + kMatGroup * kMatDepth;
  float* const untransposed = rows + kMatTokens * kMatStride;
  for (int64_t group = first; group < last; group += kMatGroup / kMatColumns) {
    const int64_t end = group + kMatGroup / kMatColumns < last ? group + kMatGroup / kMatColumns : last;
    bool begin = true;
    for (int p = 0; p < (m.back ? m.parts : 1); ++p) {
      const int64_t depth = m.back ? m.factors[p].w.n : m.factors[p].w.k;
      for (int64_t d = 0; d < depth; d += kMatDepth, begin = false) {
        const int64_t count = depth - d < kMatDepth ? depth - d : kMatDepth;
        for (int64_t i = group; i < end; ++i) {
          const MatPanel at = panel_at(m, i);
          float* panel = packed + (i - group) * kMatDepth * kMatColumns;
          if (m.back) pack_back(m.factors[p], d, count, at.column, at.columns, panel);
          else pack_forward(m.factors[at.part], at.column, at.columns, d, count, panel, untransposed);
        }
        for (int64_t t = 0; t < m.tokens; t += kMatTokens) {
          const int64_t tokens = m.tokens - t < kMatTokens ? m.tokens - t : kMatTokens;
          for (int64_t r = 0; r < tokens; ++r)
            each(count, [&](int64_t i, int n) { store_n(rows + r * kMatStride + i, load_n(m.x[p] + (t + r) * depth + d + i, n), n); });
          // The rows of the next block come nearer meanwhile: those after these, or the first ones of the next stretch.
          const bool after = t + tokens < m.tokens;
          const float* coming = m.x[p] + (after ? (t + tokens) * depth + d : d + count);
          const int64_t wide = after ? count : depth - d - count < kMatDepth ? depth - d - count : kMatDepth;
          const int64_t next = after && m.tokens - t - tokens < kMatTokens ? m.tokens - t - tokens : m.tokens < kMatTokens ? m.tokens : kMatTokens;
          for (int64_t i = group; i < end; ++i) {
            for (int64_t r = next * (i - group) / (end - group); r < next * (i + 1 - group) / (end - group); ++r)
              for (int64_t j = 0; j < wide; j += 16) prefetch_l2(coming + r * depth + j);
            const MatPanel at = panel_at(m, i);
            const int64_t width = m.back ? m.factors[0].w.k : m.factors[at.part].w.n;
            const float* bias = m.back || !m.factors[at.part].w.bias ? nullptr : m.factors[at.part].w.bias + at.column;
            mat_rows<kMatStride>(packed + (i - group) * kMatDepth * kMatColumns, count, rows, tokens, m.y[at.part] + t * width + at.column, width, at.columns, bias, begin);
          }
        }
      }
    }
  }
}

// out [rows, columns] = thin^T wide, for thin [tokens, rows] with few rows and wide [tokens, ldw]: nothing is packed, wide is read once.
constexpr int kAcrossRows = kMatVectors > 1 ? 16 : kMatRows;  // accumulators
constexpr int64_t kAcrossTokens = 64;                          // whose numbers wait in the nearest cache for the next rows

template <int Rows>
static inline void across_tile(const float* thin, int64_t ldt, const float* wide, int64_t ldw, int64_t tokens, int n, bool more, float* out, int64_t ldo, bool begin) {
  F acc[Rows];
#pragma GCC unroll 16
  for (int r = 0; r < Rows; ++r) acc[r] = begin ? zero() : load_n(out + r * ldo, n);
  for (int64_t t = 0; t < tokens; ++t, thin += ldt, wide += ldw) {
    const F v = n == 16 ? load(wide) : load_n(wide, n);
    if (more) prefetch(wide + 32);
#pragma GCC unroll 16
    for (int r = 0; r < Rows; ++r) acc[r] = fma(set1(thin[r]), v, acc[r]);
  }
  for (int r = 0; r < Rows; ++r) store_n(out + r * ldo, acc[r], n);
}

static void across(const float* thin, int64_t rows, const float* wide, int64_t ldw, int64_t tokens, int64_t columns, float* out, int64_t ldo) {
  for (int64_t t = 0; t < tokens; t += kAcrossTokens) {
    const int64_t count = tokens - t < kAcrossTokens ? tokens - t : kAcrossTokens;
    each(columns, [&](int64_t i, int n) {
      const float* own = thin + t * rows;
      int64_t r = 0;
      for (; r + kAcrossRows <= rows; r += kAcrossRows) across_tile<kAcrossRows>(own + r, rows, wide + t * ldw + i, ldw, count, n, i + 48 <= columns, out + r * ldo + i, ldo, t == 0);
      for (; r + 4 <= rows; r += 4) across_tile<4>(own + r, rows, wide + t * ldw + i, ldw, count, n, i + 48 <= columns, out + r * ldo + i, ldo, t == 0);
      for (; r < rows; ++r) across_tile<1>(own + r, rows, wide + t * ldw + i, ldw, count, n, i + 48 <= columns, out + r * ldo + i, ldo, t == 0);
    });
  }
}
