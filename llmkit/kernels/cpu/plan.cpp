// A model as a plan: what is checked and derived once, and the room for its cache.
#include "plan.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace llmkit {
namespace {

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

const char* const kNames[kSlots] = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"};

const struct { const char* name; Norm Layer::*norm; } kNorms[] = {
    {"before_mixer", &Layer::before_attention}, {"after_mixer", &Layer::after_attention},
    {"before_feed_forward", &Layer::before_mlp}, {"after_feed_forward", &Layer::after_mlp},
    {"self_attn.q_norm", &Layer::q_norm}, {"self_attn.k_norm", &Layer::k_norm},
};

int64_t element_bytes(Kind kind) { return kind == Kind::F32 ? 4 : kind == Kind::F16 ? 2 : 1; }

}  // namespace

int slot_of(const std::string& name) {
  for (int slot = 0; slot < kSlots; ++slot)
    if (name == kNames[slot]) return slot;
  refuse("there is no linear " + name + " in the native step");
}

Norm& norm_of(Layer& layer, const std::string& name) {
  for (const auto& known : kNorms)
    if (name == known.name) return layer.*known.norm;
  refuse("there is no norm " + name + " in the native step");
}

void Plan::check() const {
  const Config& c = config;
  auto positive = [](int64_t v, const char* name) { if (v < 1 || v > (int64_t(1) << 31)) refuse(std::string(name) + " is " + std::to_string(v)); };
  positive(c.vocab, "vocab_size"); positive(c.hidden, "hidden_size"); positive(c.intermediate, "intermediate_size");
  positive(c.heads, "num_heads"); positive(c.kv_heads, "num_kv_heads"); positive(c.head_dim, "head_dim");
  if (c.head_dim > kMaxHeadDim) refuse("head_dim is " + std::to_string(c.head_dim) + "; the kernels have room for " + std::to_string(kMaxHeadDim));
  if (c.activation < kSilu || c.activation > kRelu) refuse("the activation is of an unknown kind");
  for (int64_t window : c.windows)
    if (window < 0) refuse("a window is " + std::to_string(window));
  if (c.heads % c.kv_heads) refuse("num_heads is not a multiple of num_kv_heads");
  if (layers.empty()) refuse("there are no layers");
  auto shaped = [](const Linear& w, int64_t n, int64_t k, const std::string& name) {
    if (w.present() && (w.n != n || w.k != k))
      refuse(name + " is " + std::to_string(w.n) + " x " + std::to_string(w.k) + ", not " + std::to_string(n) + " x " + std::to_string(k));
    if (w.quantized() && w.group != 32 && !(w.kind == Kind::Q4 && w.group == 16)) refuse(name + " has groups of " + std::to_string(w.group));
  };
  auto sized = [](const Norm& norm, int64_t n, const std::string& name) {
    if (norm.present && (int64_t(norm.weight.size()) != n || (norm.layer && int64_t(norm.bias.size()) != n))) refuse(name + " has the wrong size");
  };
  if (!embedding.present()) refuse("there is no embedding");
  shaped(embedding, c.vocab, c.hidden, "the embedding");
  shaped(head, c.vocab, c.hidden, "the head");
  if (!final_norm.present) refuse("there is no final norm");
  sized(final_norm, c.hidden, "the final norm");
  if (!positions_table.empty() && int64_t(positions_table.size() / size_t(c.hidden)) != c.max_positions) refuse("the table of positions has the wrong size");
  const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& l = layers[i];
    const std::string name = "layer " + std::to_string(i) + ": ";
    const int64_t n[kSlots] = {q, kv, kv, c.hidden, c.intermediate, c.intermediate, c.hidden};
    const int64_t k[kSlots] = {c.hidden, c.hidden, c.hidden, q, c.hidden, c.hidden, c.intermediate};
    for (int s = 0; s < kSlots; ++s) {
      if (!l.linears[s].present() && s != kGate) refuse(name + kNames[s] + " is missing");
      shaped(l.linears[s], n[s], k[s], name + kNames[s]);
    }
    for (const Norm* norm : {&l.before_attention, &l.after_attention, &l.before_mlp, &l.after_mlp}) sized(*norm, c.hidden, name + "a norm");
    sized(l.q_norm, c.norm_before_heads ? q : c.head_dim, name + "q_norm");
    sized(l.k_norm, c.norm_before_heads ? kv : c.head_dim, name + "k_norm");
    if (l.group < 0 || l.group >= int(c.windows.size()) || c.windows[size_t(l.group)] != l.window) refuse(name + "the cache group does not fit its window");
  }
  for (const Adapter& adapter : adapters) {
    if (adapter.linears.size() != layers.size() * kSlots) refuse("an adapter has the wrong number of linears");
    for (size_t i = 0; i < adapter.linears.size(); ++i) {
      const LowRank& a = adapter.linears[i];
      const Linear& w = layers[i / kSlots].linears[i % kSlots];
      if (a.rank && (!w.present() || int64_t(a.a.size()) != a.rank * w.k || int64_t(a.b.size()) != a.rank * w.n)) refuse("an adapter does not fit its layer");
    }
  }
}

void Plan::finish() {
  auto set = [this](Linear& w) {
    if (w.kind != Kind::Q4) return;
    w.lookup = w.codebook;
    if (!kernels_->signed_dot) return;
    std::array<uint8_t, 16>& entries = signed_codebooks_.emplace_back();
    for (size_t i = 0; i < 16; ++i) entries[i] = uint8_t(w.codebook[i] - 64);
    w.lookup = entries.data();
  };
  set(embedding);
  set(head);
  for (Layer& layer : layers)
    for (Linear& w : layer.linears) set(w);
  storage_.resize(layers.size());
  for (KVStorage& s : storage_) {
    s.kind = config.cache;
    s.kv_heads = config.kv_heads;
    s.dim = config.head_dim;
    s.dim_padded = round_up(config.head_dim, 16);
  }
  caches_.resize(config.windows.size());
  std::vector<int64_t> end(config.windows.size());
  for (size_t l = 0; l < layers.size(); ++l) {
    KVStorage& s = storage_[l];
    const int64_t heads = SEGMENT * s.kv_heads * BLOCK, bytes = element_bytes(s.kind), scales = s.kind == Kind::Q8 ? heads * 4 : 0;
    int64_t& at = end[size_t(layers[l].group)];  // every part is a multiple of 64 bytes
    s.keys = at;
    s.values = s.keys + heads * s.dim * bytes;
    s.key_scales = s.values + heads * s.dim_padded * bytes;
    s.value_scales = s.key_scales + scales;
    at = s.value_scales + scales;
  }
}

int64_t Plan::block_bytes(int group) const {
  const int64_t per_head = BLOCK * (config.head_dim + round_up(config.head_dim, 16)) * element_bytes(config.cache) +
                           (config.cache == Kind::Q8 ? 2 * BLOCK * 4 : 0);
  int64_t of_group = 0;
  for (const Layer& layer : layers) of_group += layer.group == group;
  return of_group * config.kv_heads * per_head;
}

// Makes room for a block of a group's cache.
void Plan::reserve(int group, int64_t block) {
  Cache& cache = caches_[size_t(group)];
  const size_t index = size_t(block / SEGMENT);
  if (index < cache.pointers.size() && cache.pointers[index]) return;
  if (index >= cache.pointers.size()) {
    cache.segments.resize(index + 1);
    cache.pointers.resize(index + 1);
    for (size_t l = 0; l < layers.size(); ++l)
      if (layers[l].group == group) storage_[l].segments = cache.pointers.data();
  }
  cache.segments[index] = std::make_unique<Memory>(size_t(SEGMENT * block_bytes(group)));
  cache.pointers[index] = cache.segments[index]->data;
}

}  // namespace llmkit
