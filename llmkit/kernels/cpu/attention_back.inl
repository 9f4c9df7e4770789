// Attention in training (FlashAttention-2, arXiv:2307.08691), float32: packed sequences (kernels.h) one after the other, causal, no cache. Scores exist for
// kQueries x kPositions pairs at a time, as rows of the products of matmul.inl; the backward pass computes them again from q, k and the
// logarithm of each row's sum of exponentials:
//
//   P = exp(scale q k^T - lse)     dV = P^T dO     dP = dO V^T     dS = P (dP - rowsum(dO O))     dQ = scale dS K     dK = scale dS^T Q
//
// One thread does one kv head of one sequence with all its query heads, so sums have one order, whatever the threads.

constexpr int64_t kQueries = 48, kPositions = 192;  // whose scores exist at a time
constexpr int64_t kScoreStride = kPositions + 16;
static_assert(kPositions % kMatColumns == 0, "a stretch of positions is whole panels");

struct AttentionScratch {
  float *keys, *values;              // transposed, for products with rows of dim numbers: [panel of positions][dim][columns]
  float *key_rows, *value_rows;      // [stretch of positions][panel of dim][kPositions][columns]
  float *dk, *dv;                    // [positions, dim_padded]
  float *q, *dout;                   // [stretch of dim][kQueries][kScoreStride]
  float *q_rows, *dout_rows;         // [panel of dim][kQueries][columns]
  float *scores, *dscores;           // [kQueries][kScoreStride]
  float *sum;                        // [kQueries, dim_padded]
};

static inline int64_t mat_padded(int64_t n) { return (n + kMatColumns - 1) / kMatColumns * kMatColumns; }

static int64_t packed_attention_scratch(const PackedAttention& a, int64_t length) {
  const int64_t dim = mat_padded(a.dim), positions = (length + kPositions - 1) / kPositions * kPositions;
  const int64_t stretches = (a.dim + kPositions - 1) / kPositions;
  return 6 * (positions + kMatColumns) * dim + (2 * stretches + 2) * kQueries * kScoreStride + 3 * kQueries * dim;
}

static AttentionScratch lay_out_scratch(const PackedAttention& a, int64_t length, float* at) {
  const int64_t dim = mat_padded(a.dim), positions = (length + kPositions - 1) / kPositions * kPositions;
  const int64_t stretches = (a.dim + kPositions - 1) / kPositions;
  auto take = [&](int64_t n) { float* begin = at; at += n; return begin; };
  const int64_t whole = (positions + kMatColumns) * dim, rows = kQueries * kScoreStride;
  AttentionScratch s;
  s.keys = take(whole), s.values = take(whole), s.key_rows = take(whole), s.value_rows = take(whole), s.dk = take(whole), s.dv = take(whole);
  s.q = take(stretches * rows), s.dout = take(stretches * rows), s.scores = take(rows), s.dscores = take(rows);
  s.q_rows = take(kQueries * dim), s.dout_rows = take(kQueries * dim), s.sum = take(kQueries * dim);
  return s;
}

// Rows x [length, ldx] of dim numbers as panels of positions, transposed: [panel][dim][columns]; positions beyond the end are 0.
static void pack_transposed(const float* x, int64_t ldx, int64_t length, int64_t dim, float* panels) {
  for (int64_t t = 0; t < length; t += kMatColumns, panels += dim * kMatColumns) {
    const int64_t own = length - t < kMatColumns ? length - t : kMatColumns;
    if (own < kMatColumns) memset(panels, 0, size_t(dim) * kMatColumns * 4);
    for (int64_t block = 0; block < dim; block += 16)
      for (int64_t r = 0; r < own; ++r)
        for (int64_t d = block; d < block + 16 && d < dim; ++d) panels[d * kMatColumns + r] = x[(t + r) * ldx + d];
  }
}

// The same rows as panels of dim for stretches of `height` positions, times a factor: [stretch][panel][height][columns].
static void pack_rows(const float* x, int64_t ldx, int64_t length, int64_t dim, int64_t height, float factor, float* panels) {
  for (int64_t t = 0; t < length; t += height)
    for (int64_t d = 0; d < dim; d += kMatColumns, panels += height * kMatColumns) {
      const int64_t rows = length - t < height ? length - t : height, own = dim - d < kMatColumns ? dim - d : kMatColumns;
      for (int64_t r = 0; r < rows; ++r) {
        float* to = panels + r * kMatColumns;
        each(own, [&](int64_t i, int n) { store_n(to + i, mul(load_n(x + (t + r) * ldx + d + i, n), set1(factor)), n); });
        for (int64_t i = own; i < kMatColumns; ++i) to[i] = 0;
      }
    }
}

// Rows for the left side of a product: [stretch of dim][row][kScoreStride], times a factor.
static void copy_rows(const float* x, int64_t ldx, int64_t rows, int64_t dim, float factor, float* out) {
  for (int64_t d = 0; d < dim; d += kPositions, out += kQueries * kScoreStride)
    for (int64_t r = 0; r < rows; ++r)
      each(dim - d < kPositions ? dim - d : kPositions,
           [&](int64_t i, int n) { store_n(out + r * kScoreStride + i, mul(load_n(x + r * ldx + d + i, n), set1(factor)), n); });
}

// scores[row][position] = rows . positions, for `count` positions that begin at a panel.
static void mat_scores(const float* rows, int64_t queries, const float* transposed, int64_t dim, int64_t count, float* scores) {
  for (int64_t i = 0; i < count; i += kMatColumns, transposed += dim * kMatColumns)
    for (int64_t d = 0; d < dim; d += kPositions)
      mat_rows<kScoreStride>(transposed + d * kMatColumns, dim - d < kPositions ? dim - d : kPositions, rows + d / kPositions * kQueries * kScoreStride, queries,
               scores + i, kScoreStride, kMatColumns, nullptr, d == 0);
}

struct VisibleKeys { int64_t first, last; };  // of a stretch of positions that begins at `start`, what the query at a position sees
static inline VisibleKeys visible_keys(const PackedAttention& a, int64_t position, int64_t start, int64_t count) {
  const int64_t last = position + 1 - start < count ? position + 1 - start : count;
  const int64_t first = a.window && position + 1 - a.window > start ? position + 1 - a.window - start : 0;
  return {first < last ? first : last, last < 0 ? 0 : last};
}
static inline int64_t first_stretch(const PackedAttention& a, int64_t position) {
  return a.window && position + 1 > a.window ? (position + 1 - a.window) / kPositions * kPositions : 0;
}
static inline int within(int64_t i) { return i < 0 ? 0 : i > 16 ? 16 : int(i); }

static void attend_sequence(const PackedAttention& a, const PackedSequence& sequence, int64_t kv_head, float* scratch) {
  const auto [begin, length, key_begin, key_length] = sequence;
  const int64_t earlier = key_length - length;  // positions before the first query
  const AttentionScratch s = lay_out_scratch(a, key_length, scratch);
  const int64_t dim = mat_padded(a.dim), group = a.heads / a.kv_heads, ldq = a.heads * a.dim, ldk = a.kv_heads * a.dim;
  pack_transposed(a.k + key_begin * ldk + kv_head * a.dim, ldk, key_length, a.dim, s.keys);
  pack_rows(a.v + key_begin * ldk + kv_head * a.dim, ldk, key_length, a.dim, kPositions, 1, s.value_rows);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t query = 0; query < length; query += kQueries) {
      const int64_t queries = length - query < kQueries ? length - query : kQueries, position = earlier + query, end = position + queries;
      const int64_t at = (begin + query) * ldq + head * a.dim;
      float largest[kQueries], total[kQueries];
      for (float& m : largest) m = -INFINITY;
      for (float& t : total) t = 0;
      copy_rows(a.q + at, ldq, queries, a.dim, a.scale, s.q);
      const int64_t first = first_stretch(a, position);
      for (int64_t start = first; start < end; start += kPositions) {
        const int64_t count = end - start < kPositions ? end - start : kPositions;
        mat_scores(s.q, queries, s.keys + start * a.dim, a.dim, count, s.scores);
        for (int64_t r = 0; r < queries; ++r) {
          const VisibleKeys own = visible_keys(a, position + r, start, count);
          float* row = s.scores + r * kScoreStride;
          F most = set1(-INFINITY);
          for (int64_t i = 0; i < count; i += 16) most = max(most, keep(load(row + i), within(own.first - i), within(own.last - i), -INFINITY));
          const float before = largest[r], here = hmax(most), now = before > here ? before : here;  // NaN wins
          F sum = zero();
          if (now == -INFINITY) {  // nothing is visible yet
            for (int64_t i = 0; i < count; i += 16) store(row + i, zero());
          } else {
            for (int64_t i = 0; i < count; i += 16) {
              const F e = exp(sub(keep(load(row + i), within(own.first - i), within(own.last - i), -INFINITY), set1(now)));
              store(row + i, e);
              sum = add(sum, e);
            }
          }
          if (now != before && start != first) {
            const float factor = exp1(before - now);
            total[r] *= factor;
            for (int64_t d = 0; d < dim; d += 16) store(s.sum + r * dim + d, mul(load(s.sum + r * dim + d), set1(factor)));
          }
          largest[r] = now;
          total[r] += hsum(sum);
        }
        const float* values = s.value_rows + start * dim;
        for (int64_t d = 0; d < dim; d += kMatColumns)
          mat_rows<kScoreStride>(values + d * kPositions, count, s.scores, queries, s.sum + d, dim, kMatColumns, nullptr, start == first);
      }
      for (int64_t r = 0; r < queries; ++r) {
        a.lse[(begin + query + r) * a.heads + head] = largest[r] + logf(total[r]);
        float* out = a.out + at + r * ldq;
        each(a.dim, [&](int64_t i, int n) { store_n(out + i, div(load(s.sum + r * dim + i), set1(total[r])), n); });
      }
    }
  }
}

static void attend_sequence_back(const PackedAttention& a, const PackedSequence& sequence, int64_t kv_head, float* scratch) {
  const auto [begin, length, key_begin, key_length] = sequence;
  const int64_t earlier = key_length - length;
  const AttentionScratch s = lay_out_scratch(a, key_length, scratch);
  const int64_t dim = mat_padded(a.dim), group = a.heads / a.kv_heads, ldq = a.heads * a.dim, ldk = a.kv_heads * a.dim;
  const int64_t own_kv = key_begin * ldk + kv_head * a.dim;
  pack_transposed(a.k + own_kv, ldk, key_length, a.dim, s.keys);
  pack_transposed(a.v + own_kv, ldk, key_length, a.dim, s.values);
  pack_rows(a.k + own_kv, ldk, key_length, a.dim, kPositions, 1, s.key_rows);
  memset(s.dk, 0, size_t(key_length * dim) * 4);
  memset(s.dv, 0, size_t(key_length * dim) * 4);
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t query = 0; query < length; query += kQueries) {
      const int64_t queries = length - query < kQueries ? length - query : kQueries, position = earlier + query, end = position + queries;
      const int64_t at = (begin + query) * ldq + head * a.dim;
      copy_rows(a.q + at, ldq, queries, a.dim, a.scale, s.q);
      copy_rows(a.dout + at, ldq, queries, a.dim, 1, s.dout);
      pack_rows(a.q + at, ldq, queries, a.dim, kQueries, a.scale, s.q_rows);
      pack_rows(a.dout + at, ldq, queries, a.dim, kQueries, 1, s.dout_rows);
      float delta[kQueries];
      for (int64_t r = 0; r < queries; ++r) {
        F sum = zero();
        each(a.dim, [&](int64_t i, int n) { sum = fma(load_n(a.out + at + r * ldq + i, n), load_n(a.dout + at + r * ldq + i, n), sum); });
        delta[r] = hsum(sum);
      }
      const int64_t first = first_stretch(a, position);
      for (int64_t start = first; start < end; start += kPositions) {
        const int64_t count = end - start < kPositions ? end - start : kPositions;
        mat_scores(s.q, queries, s.keys + start * a.dim, a.dim, count, s.scores);
        mat_scores(s.dout, queries, s.values + start * a.dim, a.dim, count, s.dscores);
        for (int64_t r = 0; r < queries; ++r) {
          const VisibleKeys own = visible_keys(a, position + r, start, count);
          const F lse = set1(a.lse[(begin + query + r) * a.heads + head]), less = set1(delta[r]);
          for (int64_t i = 0; i < count; i += 16) {
            float *p = s.scores + r * kScoreStride + i, *ds = s.dscores + r * kScoreStride + i;
            const F e = exp(sub(keep(load(p), within(own.first - i), within(own.last - i), -INFINITY), lse));
            store(p, e);
            store(ds, mul(e, sub(load(ds), less)));
          }
        }
        for (int64_t d = 0; d < dim; d += kMatColumns) {
          mat_rows<kScoreStride, true>(s.dout_rows + d * kQueries, queries, s.scores, count, s.dv + start * dim + d, dim, kMatColumns, nullptr, false);
          mat_rows<kScoreStride, true>(s.q_rows + d * kQueries, queries, s.dscores, count, s.dk + start * dim + d, dim, kMatColumns, nullptr, false);
          mat_rows<kScoreStride>(s.key_rows + start * dim + d * kPositions, count, s.dscores, queries, s.sum + d, dim, kMatColumns, nullptr, start == first);
        }
      }
      for (int64_t r = 0; r < queries; ++r)
        each(a.dim, [&](int64_t i, int n) { store_n(a.dq + at + r * ldq + i, mul(load(s.sum + r * dim + i), set1(a.scale)), n); });
    }
  }
  for (int64_t t = 0; t < key_length; ++t)
    each(a.dim, [&](int64_t i, int n) {
      store_n(a.dk + own_kv + t * ldk + i, load(s.dk + t * dim + i), n);
      store_n(a.dv + own_kv + t * ldk + i, load(s.dv + t * dim + i), n);
    });
}
