// A model as a plan: sizes and pointers, checked once; then whole steps of many sequences in one call.
#pragma once
#include <array>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace llmkit {

struct Norm {
  bool present = false, layer = false;  // layer: mean and bias (GPT-2); otherwise root mean square
  std::vector<float> weight, bias;
};

// y += scale * B (A x), for the tokens of sequences that carry the adapter.
struct LowRank {
  int64_t rank = 0;
  std::vector<float> a, b;  // [rank, in_features], and transposed [rank, out_features]; b already scaled
};

// The linears of a layer. Their names, as `AttentionConfig.params` and `MLPConfig.params` in config.py give them, stand in plan.cpp.
enum Slot : int { kQ, kK, kV, kO, kGate, kUp, kDown, kSlots };

struct Layer {
  Linear linears[kSlots];
  Norm before_attention, after_attention, before_mlp, after_mlp, q_norm, k_norm;
  int rope = -1;         // index of the rotary frequencies; -1: none
  int group = 0;         // of the cache
  int64_t window = 0;    // 0: none
  float attention_scale = 1;
};

// The slot, or the norm, of a name; throws std::invalid_argument where the native step has none of that name.
int slot_of(const std::string& name);
Norm& norm_of(Layer& layer, const std::string& name);

struct Adapter {
  std::vector<LowRank> linears;  // layer * kSlots + slot; rank 0: none
};

struct Config {
  int64_t vocab = 0, hidden = 0, intermediate = 0, heads = 0, kv_heads = 0, head_dim = 0, max_positions = 0;
  int activation = kSilu;
  float eps = 1e-6f, attention_softcap = 0, final_softcap = 0, embedding_multiplier = 1, residual_multiplier = 1, logits_scaling = 1;
  bool norm_before_heads = false;  // q and k norm over all heads at once (OLMo 2)
  Kind cache = Kind::F16;
  std::vector<int64_t> windows;  // one per cache group, 0: none
};

// Rotary frequencies of one kind: sets [count, half + 1], radians per position and at the end the factor on cos and sin.
struct Rotary {
  const float* sets = nullptr;
  int64_t count = 0, half = 0;
  const int32_t* of_sequence = nullptr;  // which set each sequence uses
};

struct Step {
  int64_t tokens = 0, sequences = 0, rows = 0;
  const int32_t *ids = nullptr, *positions = nullptr, *sequence_of = nullptr, *wanted = nullptr;  // wanted: [rows] tokens whose result is asked for
  std::vector<const int32_t*> tables;  // per group [sequences, table_width]
  std::vector<int64_t> widths;
  std::vector<Rotary> rotary;
  const int32_t* adapters = nullptr;  // per sequence, -1: none; or null
  bool hidden_only = false;
  float* out = nullptr;  // [rows, vocab | hidden]
};

class Plan {
 public:
  Plan(const Kernels* kernels, int threads) : kernels_(kernels), threads_(threads) {}
  Config config;
  Linear embedding, head;
  std::vector<float> positions_table;  // learned positions [max_positions, hidden], or empty
  Norm final_norm;
  std::vector<Layer> layers;
  std::vector<Adapter> adapters;

  // Throws std::invalid_argument where sizes do not fit together.
  void check() const;
  void finish();  // after `check`: what is derived once
  // Throws std::invalid_argument for bad input, std::bad_alloc. Returns false where `interrupted` said so between layers.
  // Steps of several threads wait for each other.
  bool step(const Step& step, bool (*interrupted)(void*), void* context);
  // The index of the adapter for `step`; waits for a step that runs. Throws std::invalid_argument where it does not fit.
  int64_t add(Adapter adapter);
  bool busy() const { return stepping_process_ != 0; }
  const Kernels& kernels() const { return *kernels_; }
  int threads() const { return threads_; }
  int64_t block_bytes(int group) const;

 private:
  friend struct StepRun;
  void reserve(int group, int64_t block);
  const Kernels* kernels_;
  const int threads_;
  std::vector<KVStorage> storage_;                     // per layer
  struct Cache { std::vector<std::unique_ptr<Memory>> segments; std::vector<uint8_t*> pointers; };  // null: not yet used
  std::vector<Cache> caches_;                          // per group
  std::deque<std::array<uint8_t, 16>> signed_codebooks_;  // one per linear
  std::unique_ptr<Memory> scratch_;
  std::shared_ptr<Pool> pool_;
  int64_t process_ = 0;  // that started the pool
  std::mutex stepping_;
  std::atomic<int64_t> stepping_process_{0};  // 0: no step runs
};

}  // namespace llmkit
