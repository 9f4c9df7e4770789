// One step of a plan: many threads, one phase after another.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

#include "plan.h"

namespace llmkit {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

struct Range { int64_t first, last; };
Range share(int64_t total, int thread, int threads) { return {total * thread / threads, total * (thread + 1) / threads}; }

// Cosine and sine, taken in float64 (Cephes' reduction and polynomials, for angles below 2^31) and rounded once: what the C libraries
// give for a float32 differs in the last bit.
void cos_sin(float angle, float* cosine, float* sine) {
  const double x = angle, whole = 0x1.8p52, shifted = x * 0x1.45f306dc9c883p-1 + whole, n = shifted - whole;  // n quarter turns
  const double r = ((x - n * 0x1.921fb4p0) - n * 0x1.4442dp-24) - n * 0x1.8469898cc517p-48, z = r * r;
  double s = 1.58962301576546568060e-10, c = -1.13585365213876817300e-11;
  for (double f : {-2.50507477628578072866e-8, 2.75573136213857245213e-6, -1.98412698295895385996e-4, 8.33333333332211858878e-3, -1.66666666666666307295e-1}) s = s * z + f;
  for (double f : {2.08757008419747316778e-9, -2.75573141792967388112e-7, 2.48015872888517045348e-5, -1.38888888888730564116e-3, 4.16666666666665929218e-2}) c = c * z + f;
  s = r + r * z * s;
  c = 1 - 0.5 * z + z * z * c;
  uint64_t quarter;
  std::memcpy(&quarter, &shifted, 8);
  *cosine = float(quarter & 1 ? (quarter & 2 ? s : -s) : (quarter & 2 ? -c : c));
  *sine = float(quarter & 1 ? (quarter & 2 ? -c : c) : (quarter & 2 ? -s : s));
}

}  // namespace

// Tokens of one sequence: rows [first, last) of the step.
struct SequenceRows { int64_t first, last; int32_t sequence; };

struct AttentionItem { const SequenceRows* span; int64_t token, tokens, kv_head; int64_t first_split, last_split; int64_t partial; };

struct Buffer { float* data; int64_t ld; float* row(int64_t i) const { return data + i * ld; } };

// What the threads of one step share. All run `work`; a phase ends at a barrier, and between two barriers no thread writes what
// another reads. Activations are float32 rows [tokens, columns], the leading dimension rounded up to 16 floats (a cache line).
struct StepRun {
  Plan& plan;
  const Step& step;
  Pool& pool;
  bool (*interrupted)(void*);
  void* context;
  const Kernels& kernels;
  const Config& c;
  const int threads;

  std::vector<SequenceRows> spans;
  std::vector<AttentionItem> items;
  bool split = false;
  bool gathered = false;  // after the last attention: only the rows whose logits are asked for go on
  // A cache line each: every thread adds to `next` all the time, and a neighbour on the same line would wait for it.
  struct alignas(64) AlignedCounter { std::atomic<int64_t> value{0}; };
  AlignedCounter next;                      // tiles given out one by one since the step began; never reset, which would take a barrier
  std::vector<AlignedCounter> phase_start;  // its value when the phase began, as each thread computes it
  bool stopped = false;

  Buffer x, h, delta, q, k, v, attended, gate, up, rotary;
  QuantizedRows quantized;
  float* low_rank = nullptr;  // [tokens, kSlots, rank]
  int64_t max_rank = 0;
  float *scratch = nullptr, *partial_out = nullptr;
  Partial* partials = nullptr;
  int64_t scratch_size = 0;

  StepRun(Plan& p, const Step& s, Pool& pl, bool (*i)(void*), void* ctx)
      : plan(p), step(s), pool(pl), interrupted(i), context(ctx), kernels(*p.kernels_), c(p.config), threads(pl.threads()), phase_start(size_t(threads)) {}

  void prepare();
  void work(int thread);

 private:
  void barrier() { pool.barrier().wait(); }
  template <class Function> void dynamic_tiles(int thread, int64_t parts, int64_t own, Function function);
  void add_residual_and_norm(int thread, const Norm* after, const Norm* before, bool add, const Layer* layer, std::initializer_list<int> slots);
  void normalise(const Norm& norm, const float* in, float* out, int64_t n) const {
    if (norm.layer) kernels.layer_norm(in, norm.weight.data(), norm.bias.data(), c.eps, n, out);
    else kernels.rms_norm(in, norm.weight.data(), c.eps, n, out);
  }
  int64_t rows() const { return gathered ? step.rows : step.tokens; }
  int64_t token(int64_t row) const { return gathered ? step.wanted[row] : row; }
  const Adapter* adapter(int64_t row) const {
    const int32_t index = step.adapters ? step.adapters[step.sequence_of[token(row)]] : -1;
    return index < 0 ? nullptr : &plan.adapters[size_t(index)];
  }
  // The end of the run of rows from `row` on that have its adapter.
  int64_t run_end(int64_t row, int64_t last) const {
    const Adapter* a = adapter(row);
    while (++row < last && adapter(row) == a) {}
    return row;
  }
  const LowRank& term(const Adapter& a, const Layer& layer, int slot) const { return a.linears[size_t(&layer - plan.layers.data()) * kSlots + size_t(slot)]; }
  void quantize_activations(int64_t row, const float* values, const Layer& layer, std::initializer_list<int> slots);
  void project_to_rank(int thread, const Buffer& in, const Layer& layer, std::initializer_list<int> slots);
  struct Target { int slot; Buffer out; };
  void product(int thread, const Layer& layer, const Buffer& in, std::initializer_list<Target> targets);
  void product(const Linear& w, const Buffer& in, int64_t tokens, const Buffer& out, int64_t first, int64_t last, float* own);
  void add_adapter_terms(const Layer& layer, int slot, const Buffer& out, int64_t first, int64_t last);
  int64_t tiles(const Linear& w) const { return w.present() ? (w.n + kernels.tile_rows(w) - 1) / kernels.tile_rows(w) : 0; }
  int64_t own_tiles(const Linear& w, int64_t count, int64_t tokens) const;
  void rotate(int thread, const Layer& layer);
  void gather_logit_rows(int thread);
  void attend(int thread, const Layer& layer, size_t index);
  void attend_item(const AttentionItem& item, const Layer& layer, size_t index, int64_t first, int64_t last, Partial* state, float* out, float* mine);
  void write_attended(const AttentionItem& item, const Partial* state, const float* out);
};

void StepRun::prepare() {
  const int64_t tokens = step.tokens;
  auto need = [](bool ok, const std::string& what) { if (!ok) refuse(what); };
  need(tokens > 0 && step.sequences > 0, "the step is empty");
  need(step.rows >= 0 && step.rows <= tokens, "more rows are asked for than there are tokens");
  for (int64_t i = 0; i < step.rows; ++i) need(step.wanted[i] >= 0 && step.wanted[i] < tokens, "row " + std::to_string(step.wanted[i]) + " is not in the step");
  for (int64_t t = 0; t < tokens; ++t) {
    need(step.ids[t] >= 0 && step.ids[t] < c.vocab, "token id " + std::to_string(step.ids[t]) + " is not in the vocabulary");
    need(step.positions[t] >= 0 && step.positions[t] < INT32_MAX && (plan.positions_table.empty() || step.positions[t] < c.max_positions), "position " + std::to_string(step.positions[t]) + " is out of range");
    const int32_t s = step.sequence_of[t];
    need(s >= 0 && s < step.sequences, "sequence " + std::to_string(s) + " has no block table");
    if (t && step.sequence_of[t - 1] == s) need(step.positions[t] == step.positions[t - 1] + 1, "the positions of a sequence have a gap");
    if (t == 0 || step.sequence_of[t - 1] != s) spans.push_back({t, t + 1, s});
    else spans.back().last = t + 1;
    if (step.adapters) need(step.adapters[s] >= -1 && step.adapters[s] < int64_t(plan.adapters.size()), "adapter " + std::to_string(step.adapters[s]) + " does not exist");
  }
  need(step.tables.size() == c.windows.size(), "the step has the wrong number of block tables");
  for (size_t g = 0; g < c.windows.size(); ++g) {
    for (const SequenceRows& span : spans) {
      const int64_t first = step.positions[span.first], last = step.positions[span.last - 1];
      const int64_t oldest = c.windows[g] ? std::max<int64_t>(0, first - c.windows[g] + 1) : 0;
      need(last / BLOCK < step.widths[g], "position " + std::to_string(last) + " is beyond its block table");
      for (int64_t b = oldest / BLOCK; b <= last / BLOCK; ++b) {
        const int32_t id = step.tables[g][span.sequence * step.widths[g] + b];
        need(id >= 0 && id < (1 << 28), "block " + std::to_string(b) + " of a sequence is not there");
        plan.reserve(int(g), id);
      }
    }
  }
  int64_t rotary_size = 0;
  for (const Rotary& r : step.rotary) {
    need(2 * r.half <= c.head_dim && r.half > 0, "the rotary frequencies do not fit the heads");
    for (int64_t s = 0; s < step.sequences; ++s) need(r.of_sequence[s] >= 0 && r.of_sequence[s] < r.count, "a set of rotary frequencies is missing");
    rotary_size += 2 * r.half;
  }
  for (const Layer& layer : plan.layers) need(layer.rope < int(step.rotary.size()), "the rotary frequencies of a layer are missing");

  // Attention work: a tile of tokens of one sequence and one kv head; split along the keys only where there are too few tiles.
  const int64_t group = c.heads / c.kv_heads, tile = std::max<int64_t>(1, std::min(TILE_ROWS / group, tokens * c.kv_heads / (4 * threads)));
  int64_t longest = 0;
  for (const SequenceRows& span : spans) {
    longest = std::max<int64_t>(longest, step.positions[span.last - 1] + 1);
    for (int64_t t = span.last; t > span.first;) {  // the longest first
      const int64_t begin = std::max(span.first, t - tile);
      for (int64_t head = 0; head < c.kv_heads; ++head) items.push_back({&span, begin, t - begin, head, 0, step.positions[t - 1] / SPLIT + 1, 0});
      t = begin;
    }
  }
  split = threads > 1 && longest > SPLIT && int64_t(items.size()) < 4 * threads;
  int64_t partial_rows = 0;
  if (split)
    for (AttentionItem& item : items) {
      item.partial = partial_rows;
      partial_rows += item.last_split * item.tokens * group;
    }

  for (const Adapter& a : plan.adapters)
    for (const LowRank& l : a.linears) max_rank = std::max(max_rank, l.rank);

  // One allocation holds all that the step needs.
  const int64_t widest = std::max({c.hidden, c.heads * c.head_dim, c.intermediate}), padded = round_up(c.head_dim, 16);
  std::vector<std::pair<void**, int64_t>> wants;
  auto floats = [&](Buffer& b, int64_t columns) {
    b.ld = round_up(columns, 16);
    wants.push_back({reinterpret_cast<void**>(&b.data), tokens * b.ld * 4});
  };
  floats(x, c.hidden); floats(h, c.hidden); floats(delta, c.hidden);
  floats(q, c.heads * c.head_dim); floats(k, c.kv_heads * c.head_dim); floats(v, c.kv_heads * c.head_dim); floats(attended, c.heads * c.head_dim);
  floats(gate, c.intermediate); floats(up, c.intermediate); floats(rotary, std::max<int64_t>(1, rotary_size));
  const int64_t kp = round_up(widest, 32);
  wants.push_back({reinterpret_cast<void**>(&quantized.q), tokens * kp});
  wants.push_back({reinterpret_cast<void**>(&quantized.exponent), tokens * kp / 32 * 4});
  wants.push_back({reinterpret_cast<void**>(&quantized.start), tokens * 4});
  wants.push_back({reinterpret_cast<void**>(&quantized.offset), tokens * kp / 16 * 4});
  wants.push_back({reinterpret_cast<void**>(&quantized.offset32), tokens * kp / 32 * 4});
  wants.push_back({reinterpret_cast<void**>(&low_rank), tokens * kSlots * max_rank * 4});
  // Per thread: unpacked weights, or attention over one tile.
  const int64_t tile_rows = std::max<int64_t>(TILE_ROWS, group);
  scratch_size = round_up(std::max(product_scratch_floats(kp), int64_t(kAttendScratch) + 2 * tile_rows * (padded + 4)), 64);
  wants.push_back({reinterpret_cast<void**>(&scratch), threads * scratch_size * 4});
  wants.push_back({reinterpret_cast<void**>(&partials), partial_rows * int64_t(sizeof(Partial))});
  wants.push_back({reinterpret_cast<void**>(&partial_out), partial_rows * padded * 4});
  int64_t total = 0;
  for (auto& want : wants) total += round_up(want.second, 64);
  if (!plan.scratch_ || int64_t(plan.scratch_->bytes) < total) {
    plan.scratch_.reset();
    plan.scratch_ = std::make_unique<Memory>(size_t(total));
  }
  uint8_t* at = plan.scratch_->data;
  for (auto& want : wants) {
    *want.first = at;
    at += round_up(want.second, 64);
  }
}

// Rounds a complete row [columns] to int8 once for all quantized linears that read it (q, k and v; gate and up).
void StepRun::quantize_activations(int64_t row, const float* values, const Layer& layer, std::initializer_list<int> slots) {
  bool any = false;
  int64_t columns = 0;
  for (int slot : slots) any |= layer.linears[slot].quantized(), columns = std::max(columns, layer.linears[slot].k);
  if (any) {
    QuantizedRows rounded = quantized;
    rounded.k_padded = round_up(columns, 32);
    kernels.quantize_row(values, columns, rounded, row);
  }
}

// x A^T [rows, rank] for the thread's own rows, all complete. Neighbouring rows with one adapter go through A together.
void StepRun::project_to_rank(int thread, const Buffer& in, const Layer& layer, std::initializer_list<int> slots) {
  if (!step.adapters) return;
  const Range mine = share(rows(), thread, threads);
  for (int64_t t = mine.first, end; t < mine.last; t = end) {
    const Adapter* a = adapter(t);
    end = run_end(t, mine.last);
    if (!a) continue;
    for (int slot : slots) {
      const LowRank& low = term(*a, layer, slot);
      if (!low.rank) continue;
      Linear down;
      down.n = low.rank, down.k = layer.linears[slot].k, down.data = low.a.data();
      const int64_t tile = kernels.tile_rows(down);
      kernels.dense(down, in.row(t), in.ld, end - t, low_rank + (t * kSlots + slot) * max_rank, kSlots * max_rank, 0, (low.rank + tile - 1) / tile,
                    scratch + thread * scratch_size);
    }
  }
}

// x += residual_multiplier * delta, then h = norm(x), the input of the next sublayer. `after` norms the sublayer's result first (Gemma 2,
// OLMo 2). Rows are complete within one thread, so neither sum needs a barrier of its own.
void StepRun::add_residual_and_norm(int thread, const Norm* after, const Norm* before, bool add, const Layer* layer, std::initializer_list<int> slots) {
  const Range mine = share(rows(), thread, threads);
  for (int64_t t = mine.first; t < mine.last; ++t) {
    if (add) {
      if (after && after->present) normalise(*after, delta.row(t), delta.row(t), c.hidden);
      kernels.add_scaled(x.row(t), delta.row(t), c.residual_multiplier, c.hidden);
    }
    if (!layer) continue;
    if (before->present) normalise(*before, x.row(t), h.row(t), c.hidden);
    else std::memcpy(h.row(t), x.row(t), size_t(c.hidden) * 4);
    quantize_activations(t, h.row(t), *layer, slots);
  }
  if (layer) project_to_rank(thread, h, *layer, slots);
}

// Runs function(first, last) over the tiles of a phase: every thread has `own` of them to itself, and the others go one by one to whoever
// is free. Each thread asks once more than it gets a tile, so the counter ends at others + threads and all know it without a barrier.
template <class Function>
void StepRun::dynamic_tiles(int thread, int64_t parts, int64_t own, Function function) {
  if (own) function(thread * own, (thread + 1) * own);
  std::atomic<int64_t>& begin = phase_start[size_t(thread)].value;
  const int64_t before = begin.load(std::memory_order_relaxed), others = parts - own * threads;
  for (int64_t i; (i = next.value.fetch_add(1, std::memory_order_relaxed) - before) < others;) function(parts - others + i, parts - others + i + 1);
  begin.store(before + others + threads, std::memory_order_relaxed);
}

// Threads do not get equally far, so some tiles wait for the first that is done. Dense weights and many tokens are another matter: the
// tokens are read once for all tiles of a piece.
int64_t StepRun::own_tiles(const Linear& w, int64_t count, int64_t tokens) const {
  return threads == 1 || (tokens > 8 && !w.quantized()) ? count / threads : count * 3 / 4 / threads;
}

// The rows of the tiles [first, last) of w.
void StepRun::product(const Linear& w, const Buffer& in, int64_t tokens, const Buffer& out, int64_t first, int64_t last, float* own) {
  if (w.quantized()) {
    QuantizedRows rounded = quantized;
    rounded.k_padded = round_up(w.k, 32);
    kernels.quantized(w, rounded, tokens, out.data, out.ld, first, last, reinterpret_cast<uint8_t*>(own));
  } else {
    kernels.dense(w, in.data, in.ld, tokens, out.data, out.ld, first, last, own);
  }
}

// Adds the low-rank terms of the columns [first, last).
void StepRun::add_adapter_terms(const Layer& layer, int slot, const Buffer& out, int64_t first, int64_t last) {
  for (int64_t t = 0, end; t < rows(); t = end) {
    const Adapter* a = adapter(t);
    end = run_end(t, rows());
    if (!a) continue;
    const LowRank& low = term(*a, layer, slot);
    const float* reduced = low_rank + (t * kSlots + slot) * max_rank;
    if (low.rank) kernels.add_low_rank(low.b.data(), layer.linears[slot].n, low.rank, reduced, kSlots * max_rank, end - t, out.row(t), out.ld, first, last);
  }
}

void StepRun::product(int thread, const Layer& layer, const Buffer& in, std::initializer_list<Target> targets) {
  int64_t count = 0;
  for (const Target& target : targets) count += tiles(layer.linears[target.slot]);
  dynamic_tiles(thread, count, own_tiles(layer.linears[targets.begin()->slot], count, rows()), [&](int64_t first, int64_t last) {
    for (const Target& target : targets) {
      const Linear& w = layer.linears[target.slot];
      const int64_t here = tiles(w), from = std::max<int64_t>(first, 0), to = std::min(last, here);
      first -= here, last -= here;
      if (from >= to) continue;
      product(w, in, rows(), target.out, from, to, scratch + thread * scratch_size);
      if (step.adapters) add_adapter_terms(layer, target.slot, target.out, from * kernels.tile_rows(w), std::min(w.n, to * kernels.tile_rows(w)));
    }
  });
}

// Norms the heads of q and k, rotates them by their positions (RoPE) and writes k and v into the cache: it holds rotated keys.
void StepRun::rotate(int thread, const Layer& layer) {
  // Heads of one token are independent, unless a norm goes over all of them.
  const int64_t parts = c.norm_before_heads ? 1 : c.kv_heads, kv_heads = c.kv_heads / parts, group = c.heads / c.kv_heads;
  const Range mine = share(step.tokens * parts, thread, threads);
  int64_t half = 0, begin = 0;
  if (layer.rope >= 0) {
    half = step.rotary[size_t(layer.rope)].half;
    for (int r = 0; r < layer.rope; ++r) begin += 2 * step.rotary[size_t(r)].half;
  }
  for (int64_t i = mine.first; i < mine.last; ++i) {
    const int64_t t = i / parts, kv_head = i % parts * kv_heads, position = step.positions[t];
    const float* table = rotary.row(t) + begin;
    auto heads = [&](const Norm& norm, float* row, int64_t count) {
      if (norm.present && c.norm_before_heads) normalise(norm, row, row, count * c.head_dim);
      for (int64_t h = 0; h < count; ++h, row += c.head_dim) {
        if (norm.present && !c.norm_before_heads) normalise(norm, row, row, c.head_dim);
        kernels.rotate(row, table, table + half, half, c.head_dim, false, row);
      }
    };
    heads(layer.q_norm, q.row(t) + kv_head * group * c.head_dim, kv_heads * group);
    heads(layer.k_norm, k.row(t) + kv_head * c.head_dim, kv_heads);
    const size_t g = size_t(layer.group);
    const int32_t block = step.tables[g][step.sequence_of[t] * step.widths[g] + position / BLOCK];
    for (int64_t h = kv_head; h < kv_head + kv_heads; ++h)
      kernels.store_kv(plan.storage_[size_t(&layer - plan.layers.data())], h, block, position % BLOCK, k.row(t) + h * c.head_dim, v.row(t) + h * c.head_dim);
  }
}

// All query rows of an item over its splits [first, last); state and out hold a row each.
void StepRun::attend_item(const AttentionItem& item, const Layer& layer, size_t index, int64_t first, int64_t last, Partial* state, float* out, float* mine) {
  const int64_t group = c.heads / c.kv_heads, padded = round_up(c.head_dim, 16), rows = item.tokens * group;
  const size_t g = size_t(layer.group);
  AttentionArgs args{&plan.storage_[index], step.tables[g] + item.span->sequence * step.widths[g], c.heads, layer.attention_scale, c.attention_softcap, layer.window};
  Partial part[TILE_ROWS];
  float* part_out = mine + kAttendScratch;
  for (int64_t begin = 0; begin < rows; begin += TILE_ROWS) {
    const int count = int(std::min<int64_t>(TILE_ROWS, rows - begin));
    const float* queries[TILE_ROWS];
    int32_t positions[TILE_ROWS];
    for (int r = 0; r < count; ++r) {
      const int64_t token = item.token + (begin + r) / group;
      queries[r] = q.row(token) + (item.kv_head * group + (begin + r) % group) * c.head_dim;
      positions[r] = step.positions[token];
      state[begin + r] = {-INFINITY, 0};
    }
    for (int64_t s = first; s < last; ++s) {
      kernels.attend(args, item.kv_head, queries, positions, count, s, part, part_out, padded, mine);
      for (int r = 0; r < count; ++r) kernels.merge(&state[begin + r], out + (begin + r) * padded, &part[r], part_out + r * padded, padded);
    }
  }
}

void StepRun::write_attended(const AttentionItem& item, const Partial* state, const float* out) {
  const int64_t group = c.heads / c.kv_heads, padded = round_up(c.head_dim, 16);
  for (int64_t r = 0; r < item.tokens * group; ++r) {
    float* to = attended.row(item.token + r / group) + (item.kv_head * group + r % group) * c.head_dim;
    const float inverse = 1.0f / state[r].sum;
    for (int64_t d = 0; d < c.head_dim; ++d) to[d] = out[r * padded + d] * inverse;
  }
}

void StepRun::attend(int thread, const Layer& layer, size_t index) {
  const int64_t group = c.heads / c.kv_heads, padded = round_up(c.head_dim, 16);
  float* mine = scratch + thread * scratch_size;
  const int64_t tile_rows = std::max<int64_t>(TILE_ROWS, group);
  float* out = mine + kAttendScratch + TILE_ROWS * padded;
  Partial* state = reinterpret_cast<Partial*>(out + tile_rows * padded);
  if (!split) {
    dynamic_tiles(thread, int64_t(items.size()), 0, [&](int64_t i, int64_t) {
      const AttentionItem& item = items[size_t(i)];
      const int64_t oldest = layer.window ? std::max<int64_t>(0, step.positions[item.token] - layer.window + 1) : 0;
      attend_item(item, layer, index, oldest / SPLIT, item.last_split, state, out, mine);
      write_attended(item, state, out);
    });
    barrier();
    return;
  }
  int64_t total = 0;
  for (const AttentionItem& item : items) total += item.last_split;
  dynamic_tiles(thread, total, 0, [&](int64_t i, int64_t) {
    size_t which = 0;
    int64_t s = i;
    while (s >= items[which].last_split) s -= items[which++].last_split;
    const AttentionItem& item = items[which];
    const int64_t at = item.partial + s * item.tokens * group;
    const int64_t oldest = layer.window ? std::max<int64_t>(0, step.positions[item.token] - layer.window + 1) : 0;
    if ((s + 1) * SPLIT <= oldest) for (int64_t r = 0; r < item.tokens * group; ++r) partials[at + r] = {-INFINITY, 0};
    else attend_item(item, layer, index, s, s + 1, partials + at, partial_out + at * padded, mine);
  });
  barrier();
  const Range part = share(int64_t(items.size()), thread, threads);
  for (int64_t i = part.first; i < part.last; ++i) {
    const AttentionItem& item = items[size_t(i)];
    const int64_t rows = item.tokens * group;
    for (int64_t r = 0; r < rows; ++r) {
      state[r] = {-INFINITY, 0};
      for (int64_t s = 0; s < item.last_split; ++s) {
        const int64_t at = item.partial + s * rows + r;
        kernels.merge(&state[r], out + r * padded, &partials[at], partial_out + at * padded, padded);
      }
    }
    write_attended(item, state, out);
  }
  barrier();
}

// After the last attention only rows that logits are asked for matter, of a prefill mostly 1 of 512: gather them [step.rows, hidden], into
// buffers that are free by now, so that the last feed-forward and the head cost no more than a decode step.
void StepRun::gather_logit_rows(int thread) {
  const Range mine = share(step.rows, thread, threads);
  for (int64_t r = mine.first; r < mine.last; ++r) {
    std::memcpy(h.row(r), x.row(step.wanted[r]), size_t(c.hidden) * 4);
    std::memcpy(q.row(r), attended.row(step.wanted[r]), size_t(c.heads * c.head_dim) * 4);
  }
  barrier();
  if (thread == 0) {
    std::swap(x, h);
    std::swap(attended, q);
    gathered = true;
  }
  barrier();
}

void StepRun::work(int thread) {
  Range mine = share(step.tokens, thread, threads);
  for (int64_t t = mine.first; t < mine.last; ++t) {
    kernels.embed_row(plan.embedding, step.ids[t], x.row(t));
    if (c.embedding_multiplier != 1)
      for (int64_t i = 0; i < c.hidden; ++i) x.row(t)[i] *= c.embedding_multiplier;
    if (!plan.positions_table.empty()) kernels.add_scaled(x.row(t), plan.positions_table.data() + step.positions[t] * c.hidden, 1, c.hidden);
    float* table = rotary.row(t);
    for (const Rotary& r : step.rotary) {
      const float* set = r.sets + r.of_sequence[step.sequence_of[t]] * (r.half + 1);
      for (int64_t d = 0; d < r.half; ++d) {
        cos_sin(float(step.positions[t]) * set[d], &table[d], &table[r.half + d]);
        table[d] *= set[r.half];
        table[r.half + d] *= set[r.half];
      }
      table += 2 * r.half;
    }
  }
  const Norm* after = nullptr;  // of the sublayer whose result still waits in `delta`
  for (size_t index = 0; index < plan.layers.size(); ++index) {
    const Layer& layer = plan.layers[index];
    add_residual_and_norm(thread, after, &layer.before_attention, index > 0, &layer, {kQ, kK, kV});
    if (thread == 0) stopped = interrupted && interrupted(context);
    barrier();
    if (stopped) return;
    product(thread, layer, h, {{kQ, q}, {kK, k}, {kV, v}});
    barrier();
    rotate(thread, layer);
    barrier();
    const bool last = index + 1 == plan.layers.size();
    if (last && !step.rows) return;
    attend(thread, layer, index);
    if (last && step.rows < step.tokens) {
      gather_logit_rows(thread);
      mine = share(rows(), thread, threads);
    }
    for (int64_t t = mine.first; t < mine.last; ++t) quantize_activations(t, attended.row(t), layer, {kO});
    project_to_rank(thread, attended, layer, {kO});
    barrier();
    product(thread, layer, attended, {{kO, delta}});
    barrier();
    const bool gated = layer.linears[kGate].present();
    if (gated) add_residual_and_norm(thread, &layer.after_attention, &layer.before_mlp, true, &layer, {kGate, kUp});
    else add_residual_and_norm(thread, &layer.after_attention, &layer.before_mlp, true, &layer, {kUp});
    barrier();
    product(thread, layer, h, {{kGate, gate}, {kUp, up}});
    barrier();
    const Buffer& inner = gated ? gate : up;
    for (int64_t t = mine.first; t < mine.last; ++t) {
      kernels.activate(c.activation, inner.row(t), gated ? up.row(t) : nullptr, c.intermediate);
      quantize_activations(t, inner.row(t), layer, {kDown});
    }
    project_to_rank(thread, inner, layer, {kDown});
    barrier();
    product(thread, layer, inner, {{kDown, delta}});
    barrier();
    after = &layer.after_mlp;
  }
  add_residual_and_norm(thread, after, nullptr, true, nullptr, {});
  barrier();
  // Only the rows that are asked for go through the head.
  const Linear& head = plan.head.present() ? plan.head : plan.embedding;
  const Range asked = share(step.rows, thread, threads);
  for (int64_t r = asked.first; r < asked.last; ++r) {
    float* to = step.hidden_only ? step.out + r * c.hidden : h.row(r);
    normalise(plan.final_norm, x.row(gathered ? r : step.wanted[r]), to, c.hidden);
    if (!step.hidden_only && head.quantized()) {
      QuantizedRows rounded = quantized;
      rounded.k_padded = round_up(c.hidden, 32);
      kernels.quantize_row(to, c.hidden, rounded, r);
    }
  }
  if (step.hidden_only) return;
  barrier();
  dynamic_tiles(thread, tiles(head), own_tiles(head, tiles(head), step.rows), [&](int64_t first, int64_t last) {
    product(head, h, step.rows, {step.out, c.vocab}, first, last, scratch + thread * scratch_size);
    if (c.logits_scaling == 1 && c.final_softcap == 0) return;
    const int64_t tile = kernels.tile_rows(head), begin = first * tile, count = std::min(c.vocab, last * tile) - begin;
    for (int64_t r = 0; r < step.rows; ++r) {
      float* row = step.out + r * c.vocab + begin;
      if (c.logits_scaling != 1)
        for (int64_t i = 0; i < count; ++i) row[i] /= c.logits_scaling;
      if (c.final_softcap != 0) kernels.softcap(row, c.final_softcap, count);
    }
  });
}

namespace {

struct StepInProgress {
  std::atomic<int64_t>& process;
  explicit StepInProgress(std::atomic<int64_t>& p) : process(p) { process = process_id(); }
  ~StepInProgress() { process = 0; }
};

}  // namespace

int64_t Plan::add(Adapter adapter) {
  std::lock_guard<std::mutex> lock(stepping_);
  adapters.push_back(std::move(adapter));
  try {
    check();
  } catch (...) {
    adapters.pop_back();
    throw;
  }
  return int64_t(adapters.size()) - 1;
}

bool Plan::step(const Step& step, bool (*interrupted)(void*), void* context) {
  // After a fork in the middle of a step the lock is held by a thread that stayed behind, and the cache may be half grown.
  const int64_t process = stepping_process_;
  if (process && process != process_id()) throw std::runtime_error("The process was forked while this model computed. Load it again in the new process");
  std::lock_guard<std::mutex> lock(stepping_);
  const StepInProgress stepping(stepping_process_);
  if (process_ != process_id()) {
    pool_.reset();
    pool_ = pool_of(threads_);
    process_ = process_id();
  }
  StepRun run(*this, step, *pool_, interrupted, context);
  run.prepare();
  pool_->run([](void* self, int thread) { static_cast<StepRun*>(self)->work(thread); }, &run);
  return !run.stopped;
}

}  // namespace llmkit
