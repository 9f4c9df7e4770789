// The cache and attention over it.

// One head of one position as the cache keeps it: float32, float16 or int8 with the scale that is returned.
static float encode_head(Kind kind, const float* x, int64_t n, void* out) {
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

// k, v: [dim] of one head and position, into slot `slot` of block `block`. Keys are stored position fastest.
template <class T>
static void store_head(const KVStorage& c, int64_t head, int64_t block, int64_t slot, const float* k, const float* v) {
  T one[kMaxHeadDim];
  T* keys = c.keys_of<T>(head, block) + slot;
  const float key_scale = encode_head(c.kind, k, c.dim, one);
  for (int64_t d = 0; d < c.dim; ++d) keys[d * BLOCK] = one[d];
  const float value_scale = encode_head(c.kind, v, c.dim, c.values_of<T>(head, block) + slot * c.dim_padded);
  if (c.kind == Kind::Q8) c.key_scales_of(head, block)[slot] = key_scale, c.value_scales_of(head, block)[slot] = value_scale;
}
static void store_kv(const KVStorage& c, int64_t head, int64_t block, int64_t slot, const float* k, const float* v) {
  if (c.kind == Kind::F32) store_head<float>(c, head, block, slot, k, v);
  else if (c.kind == Kind::F16) store_head<uint16_t>(c, head, block, slot, k, v);
  else store_head<int8_t>(c, head, block, slot, k, v);
}

struct Int8 { int8_t bits; };
template <> inline F load_weights(const Int8* p) { return from_i8(&p->bits); }

// scores[r][16 b + j] = q[r] . key j of block b, for `Rows` query rows and `Blocks` blocks.
template <class T, int Rows, int Blocks>
static inline void score_blocks(const T* const* keys, int64_t dim, const float* q, float* scores, const F* factors) {
  F acc[Rows][Blocks];
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 32
    for (int b = 0; b < Blocks; ++b) acc[r][b] = zero();
  for (int64_t d = 0; d < dim; ++d) {
    F key[Blocks];
#pragma GCC unroll 32
    for (int b = 0; b < Blocks; ++b) {
      key[b] = load_weights(keys[b] + d * BLOCK);
      prefetch_l2(keys[b] + (d + Blocks * dim) * BLOCK);  // the blocks of a sequence mostly follow one another
    }
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) {
      const F query = set1(q[r * kQueryStride + d]);
#pragma GCC unroll 32
      for (int b = 0; b < Blocks; ++b) acc[r][b] = fma(query, key[b], acc[r][b]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 32
    for (int b = 0; b < Blocks; ++b) store(scores + r * CHUNK + b * BLOCK, mul(acc[r][b], factors[b]));
}

// out[r] += weights[r][j] * value j over `keys` keys, columns [d, d + 16 Parts).
template <class T, int Rows, int Parts>
static inline void add_values(const T* const* values, int keys, int64_t dim_padded, int64_t d, const float* weights, float* out, int64_t ldo) {
  F acc[Rows][Parts];
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 32
    for (int p = 0; p < Parts; ++p) acc[r][p] = load(out + r * ldo + d + 16 * p);
  for (int j = 0; j < keys; ++j) {
    const T* from = values[j / BLOCK] + (j % BLOCK) * dim_padded + d;
    F value[Parts];
#pragma GCC unroll 32
    for (int p = 0; p < Parts; ++p) {
      value[p] = load_weights(from + 16 * p);
      prefetch_l2(from + 16 * p + 2 * BLOCK * dim_padded);
    }
#pragma GCC unroll 32
    for (int r = 0; r < Rows; ++r) {
      const F weight = set1(weights[r * CHUNK + j]);
#pragma GCC unroll 32
      for (int p = 0; p < Parts; ++p) acc[r][p] = fma(weight, value[p], acc[r][p]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 32
    for (int p = 0; p < Parts; ++p) store(out + r * ldo + d + 16 * p, acc[r][p]);
}

// So many query rows are computed together: all of a key's numbers are converted and multiplied for them at once.
constexpr int kRowsTogether = kAccumulators;
template <int Rows> constexpr int kWide = Rows * 4 <= kAccumulators ? 4 : Rows * 2 <= kAccumulators ? 2 : 1;  // blocks of keys, runs of 16 columns of values

// The scores of `Rows` rows for the blocks [first, last).
template <class T, int Rows>
static void score_rows(const T* const* keys, int first, int last, int64_t dim, const float* q, float* scores, const F* factors) {
  constexpr int kBlocks = kWide<Rows>;
  for (; first + kBlocks <= last; first += kBlocks) score_blocks<T, Rows, kBlocks>(keys + first, dim, q, scores + first * BLOCK, factors + first);
  for (; first < last; ++first) score_blocks<T, Rows, 1>(keys + first, dim, q, scores + first * BLOCK, factors + first);
}

template <class T, int Rows>
static void add_rows(const T* const* values, int keys, int64_t dim_padded, const float* weights, float* out, int64_t ldo) {
  constexpr int kParts = kWide<Rows>;
  int64_t d = 0;
  for (; d + 16 * kParts <= dim_padded; d += 16 * kParts) add_values<T, Rows, kParts>(values, keys, dim_padded, d, weights, out, ldo);
  for (; d < dim_padded; d += 16) add_values<T, Rows, 1>(values, keys, dim_padded, d, weights, out, ldo);
}

// function(Count<n>, first) for parts of n rows, as equal as they can be, none larger than kRowsTogether.
template <int Rows> struct Count { static constexpr int value = Rows; };
template <int Rows, class Function>
static void with_count(int rows, Function function) {
  if constexpr (Rows > 0) {
    if (rows == Rows) function(Count<Rows>());
    else with_count<Rows - 1>(rows, function);
  }
}
template <class Function>
static void in_parts(int rows, Function function) {
  const int parts = (rows + kRowsTogether - 1) / kRowsTogether;
  for (int i = 0; i < parts; ++i) {
    const int first = rows * i / parts;
    with_count<kRowsTogether>(rows * (i + 1) / parts - first, [&](auto count) { function(count, first); });
  }
}

// Flash attention (arXiv:2205.14135) over the keys of one split. The running maximum is corrected once per CHUNK keys at
// positions that are multiples of CHUNK, so a row sees the same operations whatever rows share its tile; keys that a row
// may not see get the weight 0, which changes nothing.
template <class T>
static void attend_of(const AttentionArgs& a, int64_t kv_head, const float* const* q, const int32_t* positions, int rows, int64_t split,
                      Partial* state, float* out, int64_t ldo, float* scratch) {
  const KVStorage& c = *a.cache;
  float *weights = scratch, *queries = scratch + TILE_ROWS * CHUNK;  // [rows, CHUNK], [rows, kQueryStride]
  for (int r = 0; r < rows; ++r) memcpy(queries + r * kQueryStride, q[r], size_t(c.dim) * 4);
  int64_t newest = positions[0], oldest = positions[0];
  for (int r = 1; r < rows; ++r) newest = positions[r] > newest ? positions[r] : newest, oldest = positions[r] < oldest ? positions[r] : oldest;
  const int64_t visible = a.window ? (oldest - a.window + 1 > 0 ? oldest - a.window + 1 : 0) : 0;  // the first key that some row sees
  F sums[TILE_ROWS];
  for (int r = 0; r < rows; ++r) {
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
      for (int r = 0; r < rows; ++r) store(weights + r * CHUNK + b * BLOCK, set1(-INFINITY));
    in_parts(rows, [&](auto part, int first) {
      score_rows<T, decltype(part)::value>(key_blocks, skipped, stop, c.dim, queries + first * kQueryStride, weights + first * CHUNK, factors);
    });
    for (int r = 0; r < rows; ++r) {
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
    in_parts(rows, [&](auto part, int first) {
      add_rows<T, decltype(part)::value>(value_blocks + skipped, count - skipped * BLOCK, c.dim_padded, weights + first * CHUNK + skipped * BLOCK, out + first * ldo, ldo);
    });
  }
  for (int r = 0; r < rows; ++r) state[r].sum = hsum(sums[r]);
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
