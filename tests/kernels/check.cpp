// Every instruction set of this processor against the portable one, bit for bit, those of training against exact arithmetic too, and
// whole steps of a small model in every way of cutting them. Linked with the kernels alone, without Python: one source for native runs, emulators and sanitizers.
//
//   check           all that this processor runs; prints a line "NAME CHECKS DIGEST" for each. The digest of all results is the
//                   same on every processor. What differs is named on standard error, and the exit status is 1.
//   check names     only their names
//   check avxvnni   these, whether or not the processor announces them
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <numeric>
#include <string>
#include <vector>

#include "plan.h"
#include "training.h"

using namespace llmkit;

namespace {

struct Random {
  uint64_t state;
  uint32_t bits() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 32); }
  int64_t below(int64_t n) { return int64_t(bits() % uint64_t(n)); }
  float unit() { return float(int32_t(bits())) * 0x1p-31f; }  // -1..1
  std::vector<float> floats(int64_t n, float factor = 1) {
    std::vector<float> out(static_cast<size_t>(n));
    for (float& x : out) x = unit() * factor;
    return out;
  }
};

// -- one function at a time -------------------------------------------------------------------------------------------

struct Matrix {
  Linear w;
  std::vector<uint8_t> data, codebook, signed_codebook;
  std::vector<int8_t> scales;
  std::vector<float> row_scale, bias;
  Linear of(const Kernels& kernels) const {
    Linear found = w;
    found.lookup = (kernels.signed_dot ? signed_codebook : codebook).data();
    return found;
  }
};

Matrix matrix(Random& random, Kind kind, int64_t n, int64_t k, int group = 32, bool biased = false, float factor = 1) {
  Matrix m;
  m.w.kind = kind, m.w.n = n, m.w.k = k, m.w.group = group;
  const int64_t panels = (n + 15) / 16, padded = round_up(k, 32);
  if (m.w.quantized()) {
    m.data.resize(size_t(panels * padded / 32 * (kind == Kind::Q4 ? 256 : 512)));
    for (uint8_t& code : m.data) code = kind == Kind::Q4 ? uint8_t(random.bits()) : uint8_t(random.below(255) - 127);
    for (int64_t i = 0; i < panels * padded / group * 16; ++i) m.scales.push_back(int8_t(random.below(255) - 127));
    m.row_scale = random.floats(panels * 16, factor / 4096);
    for (int i = 0; i < 16; ++i) m.codebook.push_back(uint8_t(i == 15 ? 127 : 8 * i)), m.signed_codebook.push_back(uint8_t(m.codebook.back() - 64));
    m.w.scales = m.scales.data(), m.w.row_scale = m.row_scale.data(), m.w.codebook = m.codebook.data();
  } else {
    m.data.resize(size_t(n * k * (kind == Kind::F32 ? 4 : 2)));
    for (int64_t i = 0; i < n * k; ++i) {
      const float x = random.unit() * factor;
      uint32_t bits;
      std::memcpy(&bits, &x, 4);
      const uint16_t half = kind == Kind::BF16 ? uint16_t(bits >> 16) : uint16_t((bits >> 16 & 0x8000) | (8 + random.below(6)) << 10 | random.below(1024));
      if (kind == Kind::F32) std::memcpy(&m.data[size_t(4 * i)], &x, 4);
      else std::memcpy(&m.data[size_t(2 * i)], &half, 2);
    }
  }
  if (biased) m.bias = random.floats(n), m.w.bias = m.bias.data();
  m.w.data = m.data.data();
  return m;
}

double stored(const Linear& w, int64_t i) {
  if (w.kind == Kind::F32) return double(static_cast<const float*>(w.data)[i]);
  const uint32_t bits = static_cast<const uint16_t*>(w.data)[i], wide = bits << 16;
  float number;
  std::memcpy(&number, &wide, 4);
  return w.kind == Kind::BF16 ? double(number) : std::ldexp((bits >> 15 ? -1.0 : 1.0) * (1024 + bits % 1024), int(bits >> 10 & 31) - 25);
}

// Room for so many floats and no more, in which nothing may be read before it is written.
std::vector<float> unwritten(int64_t n) { return std::vector<float>(size_t(n), NAN); }

struct Rounded {
  std::vector<int8_t> q;
  std::vector<float> start;
  std::vector<int32_t> exponent, offset, offset32;
  QuantizedRows rows;
  Rounded(const Kernels& kernels, const std::vector<float>& x, int64_t tokens, int64_t k) {
    const int64_t padded = round_up(k, 32);
    q.resize(size_t(tokens * padded)), exponent.resize(size_t(tokens * padded / 32)), start.resize(size_t(tokens));
    offset.resize(size_t(tokens * padded / 16)), offset32.resize(size_t(tokens * padded / 32));
    rows = {padded, q.data(), exponent.data(), start.data(), offset.data(), offset32.data()};
    for (int64_t t = 0; t < tokens; ++t) kernels.quantize_row(x.data() + t * k, k, rows, t);
  }
};

class Checker {
 public:
  explicit Checker(const Kernels& kernels) : kernels_(kernels) {}
  int checks = 0, failures = 0;
  uint64_t digest = 14695981039346656037u;  // FNV-1a

  void same(const std::string& what, const void* expected, const void* found, size_t bytes, bool digested = true) {
    ++checks;
    const uint8_t *a = static_cast<const uint8_t*>(expected), *b = static_cast<const uint8_t*>(found);
    for (size_t i = 0; digested && i < bytes; ++i) digest = (digest ^ b[i]) * 1099511628211u;
    if (!bytes || std::memcmp(a, b, bytes) == 0) return;
    size_t at = 0;
    while (a[at] == b[at]) ++at;
    float x = 0, y = 0;
    if (at / 4 * 4 + 4 <= bytes) std::memcpy(&x, a + at / 4 * 4, 4), std::memcpy(&y, b + at / 4 * 4, 4);
    if (++failures <= 20) std::fprintf(stderr, "%s: %s differs at byte %zu of %zu (as floats %.9g, %.9g)\n", kernels_.name, what.c_str(), at, bytes, double(x), double(y));
  }

  // `run` fills `count` floats by the portable kernels and by those that are checked.
  void compare(const std::string& what, int64_t count, const std::function<void(const Kernels&, float*)>& run, bool digested = true) {
    std::vector<float> expected(static_cast<size_t>(count)), found(static_cast<size_t>(count));
    run(*portable_kernels(), expected.data());
    run(kernels_, found.data());
    same(what, expected.data(), found.data(), size_t(count) * 4, digested);
  }

  // Against exact arithmetic, relative to the largest number, or to terms of this size that cancel each other.
  void near(const std::string& what, const std::vector<double>& exact, const float* found, double terms = 0) {
    double largest = terms, furthest = 0;
    for (size_t i = 0; i < exact.size(); ++i) {
      const double away = std::fabs(exact[i] - double(found[i]));
      largest = std::max(largest, std::fabs(exact[i]));
      if (!(away <= furthest)) furthest = away;  // what is no number stays
    }
    ++checks;
    if (!(furthest <= 1e-5 * largest) && ++failures <= 20) std::fprintf(stderr, "%s: %s is wrong by %.3g of %.3g\n", kernels_.name, what.c_str(), furthest, largest);
  }

  void elementwise() {
    Random random{1};
    for (int64_t n : {1, 7, 15, 16, 17, 33, 64, 77}) {
      const std::string at = " of " + std::to_string(n);
      const std::vector<float> x = random.floats(n, 30), y = random.floats(n, 3), bias = random.floats(n);
      auto on_copy = [&](const char* name, const std::function<void(const Kernels&, float*)>& run, bool digested = true) {
        compare(name + at, n, [&](const Kernels& k, float* out) { std::memcpy(out, x.data(), size_t(n) * 4), run(k, out); }, digested);
      };
      on_copy("add_scaled", [&](const Kernels& k, float* out) { k.add_scaled(out, y.data(), 0.37f, n); });
      on_copy("softcap", [&](const Kernels& k, float* out) { k.softcap(out, 12.5f, n); });
      for (int activation : {kSilu, kGelu, kGeluTanh, kRelu}) {  // gelu is the standard library's erf: not the same everywhere
        on_copy("activate, gated", [&](const Kernels& k, float* out) { k.activate(activation, out, y.data(), n); }, activation != kGelu);
        on_copy("activate", [&](const Kernels& k, float* out) { k.activate(activation, out, nullptr, n); }, activation != kGelu);
      }
      compare("rms_norm" + at, n, [&](const Kernels& k, float* out) { k.rms_norm(x.data(), y.data(), 1e-5f, n, out); });
      compare("layer_norm" + at, n, [&](const Kernels& k, float* out) { k.layer_norm(x.data(), y.data(), bias.data(), 1e-5f, n, out); });
      gradients(at, n, random.floats(n, 8), y, bias);
    }
    // Where exp over- and underflows, and what is no number: the answer may be anything, but not undefined.
    const std::vector<float> extreme = {0, -0.0f, 87, -87, 88.5f, -88.5f, 1e30f, -1e30f, INFINITY, -INFINITY, 1e-30f, -1e-42f};
    for (int activation : {kSilu, kGeluTanh, kRelu})
      compare("activate, extreme", int64_t(extreme.size()), [&](const Kernels& k, float* out) {
        std::memcpy(out, extreme.data(), extreme.size() * 4);
        k.activate(activation, out, nullptr, int64_t(extreme.size()));
      }, false);
    const std::vector<float> ones(extreme.size(), 1);
    compare("gate, extreme", 3 * int64_t(extreme.size()), [&](const Kernels& k, float* out) {
      const int64_t n = int64_t(extreme.size());
      k.gate(extreme.data(), ones.data(), n, out);
      k.gate_back(extreme.data(), ones.data(), ones.data(), n, out + n, out + 2 * n);
    }, false);
  }

  void products() {
    Random random{2};
    struct Form { Kind kind; int group; };
    for (const Form form : {Form{Kind::F32, 32}, {Kind::F16, 32}, {Kind::BF16, 32}, {Kind::Q4, 32}, {Kind::Q4, 16}, {Kind::Q8, 32}})
      for (int64_t n : {1, 15, 37, 96})
        for (int64_t k : {1, 16, 47, 130, 1600})
          for (int64_t tokens : {1, 2, 3, 5, 13}) {
            if (k == 1600 && n != 15) continue;
            const Matrix m = matrix(random, form.kind, n, k, form.group, (n + tokens) % 2 == 0);
            const std::vector<float> x = random.floats(tokens * k, 5);
            const std::string what = "product, kind " + std::to_string(int(form.kind)) + ", " + std::to_string(n) + " x " + std::to_string(k) + ", tokens " + std::to_string(tokens);
            compare(what, tokens * (n + 3), [&](const Kernels& kernels, float* out) { multiply(kernels, m, x, tokens, out, n + 3); });
            compare("embedding", k, [&](const Kernels& kernels, float* out) { kernels.embed_row(m.of(kernels), n - 1, out); });
          }
    const std::vector<float> odd = {0, INFINITY, -INFINITY, NAN, 1e38f, -1e38f, 1e-42f};
    for (float bad : odd)
      for (size_t at : {0, 20, 35, 39}) {
        std::vector<float> x(40, 1);
        x[at] = bad;
        const Rounded rounded(kernels_, x, 1, 40);
        const bool hidden = !std::isfinite(bad) && !std::isnan(rounded.start[0]);
        same("what is no number", "n", hidden ? "y" : "n", 1);
      }
  }

  void rounding() {
    Random random{3};
    for (int64_t k : {1, 16, 31, 64, 79, 600}) {
      const std::vector<float> x = random.floats(3 * k, 100);
      const Rounded expected(*portable_kernels(), x, 3, k), found(kernels_, x, 3, k);
      same("rounded activations", expected.q.data(), found.q.data(), found.q.size());
      same("exponents of activations", expected.exponent.data(), found.exponent.data(), found.exponent.size() * 4);
      same("offsets", expected.offset.data(), found.offset.data(), found.offset.size() * 4);
      same("offsets of 32", expected.offset32.data(), found.offset32.data(), found.offset32.size() * 4);
    }
  }

  void attention() {
    Random random{4};
    for (Kind kind : {Kind::F32, Kind::F16, Kind::Q8})
      for (int64_t dim : {1, 20, 80})
        for (int64_t window : {0, 37}) attention(random, kind, dim, window, dim == 20 ? 2.0f : 0.0f);
  }

  void training_products() {
    Random random{7};
    std::vector<Product> all = {{13, 16, {800, 9}, Kind::F16, 3}, {49, 1200, {17}, Kind::BF16, 16}, {61, 805, {4, 600, 20}, Kind::F32, 0}};
    for (int64_t tokens = 1; tokens <= 61; ++tokens) {
      constexpr int64_t ranks[] = {0, 3, 16};
      Product one{tokens, 1 + random.below(99), {}, Kind(random.below(3)), ranks[random.below(3)]};
      for (int64_t parts = 1 + random.below(3); parts; --parts) one.n.push_back(1 + random.below(70));
      all.push_back(one);
    }
    for (const Product& one : all)
      for (bool back : {false, true}) training_product(random, one, back);
  }

  void learning() {
    Random random{9};
    learning(random, 1, 1, {{1, 1}});
    learning(random, 70, 300, {{33, 16}, {70, 5}, {17, 1}});
    learning(random, 130, 40, {{530, 37}});
  }

  void sequences() {
    Random random{8};
    sequences(random, {1, 1, 8, 0}, {{1, 0}});
    sequences(random, {4, 2, 20, 0}, {{1, 0}, {1, 1}, {2, 0}, {61, 5}});
    sequences(random, {2, 1, 33, 7}, {{100, 0}, {3, 90}});
    sequences(random, {6, 2, 64, 0}, {{230, 0}, {1, 192}, {50, 200}});
    sequences(random, {2, 1, 256, 0}, {{49, 0}, {13, 40}});
    sequences(random, {1, 1, 200, 60}, {{250, 0}, {1, 300}, {5, 57}});
    sequences(random, {3, 3, 100, 1}, {{60, 3}});
    sequences(random, {2, 2, 8, 400}, {{420, 0}, {30, 390}});
  }

 private:
  // x [n] within -8..8, where the logistic function is far from its ends
  void gradients(const std::string& at, int64_t n, const std::vector<float>& x, const std::vector<float>& y, const std::vector<float>& dy) {
    auto checked = [&](const std::string& what, const std::vector<double>& exact, const std::function<void(const Kernels&, float*)>& run) {
      std::vector<float> found = unwritten(int64_t(exact.size()));
      run(kernels_, found.data());
      near(what + at, exact, found.data(), 1);
      compare(what + at, int64_t(exact.size()), run);
    };
    double squares = 0, products = 0;
    for (size_t i = 0; i < x.size(); ++i) squares += double(x[i]) * double(x[i]), products += double(x[i]) * double(y[i]) * double(dy[i]);
    const double r = 1 / std::sqrt(squares / double(n) + 1e-5);
    std::vector<double> dx, h, gates, ups;
    for (size_t i = 0; i < x.size(); ++i) {
      const double s = 1 / (1 + std::exp(-double(x[i]))), d = double(dy[i]);
      dx.push_back(r * double(y[i]) * d - r * r * r * double(x[i]) * products / double(n));
      h.push_back(double(x[i]) * s * double(y[i]));
      gates.push_back(d * double(y[i]) * s * (1 + double(x[i]) * (1 - s)));
      ups.push_back(d * double(x[i]) * s);
    }
    gates.insert(gates.end(), ups.begin(), ups.end());
    checked("rms_norm_back", dx, [&](const Kernels& k, float* out) { k.rms_norm_back(x.data(), y.data(), 1e-5f, dy.data(), n, out); });
    checked("gate", h, [&](const Kernels& k, float* out) { k.gate(x.data(), y.data(), n, out); });
    checked("gate_back", gates, [&](const Kernels& k, float* out) { k.gate_back(x.data(), y.data(), dy.data(), n, out, out + n); });
    for (int64_t half : {n / 2, n / 4})
      for (bool back : {false, true}) {
        const std::vector<float> cos(y.begin(), y.begin() + half), sin(dy.begin(), dy.begin() + half);
        std::vector<double> exact(x.begin(), x.end());
        for (int64_t i = 0; i < half; ++i) {
          const double a = double(x[size_t(i)]), b = double(x[size_t(half + i)]), c = double(cos[size_t(i)]), s = (back ? -1 : 1) * double(sin[size_t(i)]);
          exact[size_t(i)] = c * a - s * b, exact[size_t(half + i)] = c * b + s * a;
        }
        checked("rotate", exact, [&](const Kernels& k, float* out) { k.rotate(x.data(), cos.data(), sin.data(), half, n, back, out); });
        checked("rotate in place", exact, [&](const Kernels& k, float* out) {
          std::memcpy(out, x.data(), x.size() * 4);
          k.rotate(out, cos.data(), sin.data(), half, n, back, out);
        });
      }
  }

  struct Product {
    int64_t tokens, k;
    std::vector<int64_t> n;
    Kind kind;
    int64_t rank;
  };

  void training_product(Random& random, const Product& one, bool back) {
    const int64_t tokens = one.tokens, k = one.k;
    std::vector<Matrix> weights;
    std::vector<std::vector<float>> a, b, x;
    std::vector<int64_t> widths;  // of y
    for (int64_t n : one.n) {
      weights.push_back(matrix(random, one.kind, n, k, 32, (n + tokens) % 2 == 0));
      a.push_back(random.floats(one.rank * k)), b.push_back(random.floats(n * one.rank));
      if (back || x.empty()) x.push_back(random.floats(tokens * (back ? n : k)));
      if (!back || widths.empty()) widths.push_back(back ? k : n);
    }
    std::vector<Factor> factors;
    std::vector<std::vector<double>> exact;
    for (int64_t width : widths) exact.emplace_back(size_t(tokens * width));
    for (size_t p = 0; p < weights.size(); ++p) {
      const Linear& w = weights[p].w;
      factors.push_back({w, one.rank ? a[p].data() : nullptr, one.rank ? b[p].data() : nullptr, one.rank, 0.7f});
      for (int64_t i = 0; i < w.n * k; ++i) {
        const int64_t row = i / k, column = i % k;
        double u = 0;
        for (int64_t j = 0; j < one.rank; ++j) u += double(b[p][size_t(row * one.rank + j)]) * double(a[p][size_t(j * k + column)]);
        u = stored(w, i) + double(0.7f) * u;
        for (int64_t t = 0; t < tokens; ++t)
          if (back) exact[0][size_t(t * k + column)] += double(x[p][size_t(t * w.n + row)]) * u;
          else exact[p][size_t(t * w.n + row)] += double(x[0][size_t(t * k + column)]) * u + (w.bias && !column ? double(w.bias[row]) : 0.0);
      }
    }
    auto run = [&](const Kernels& kernels, int threads) {
      std::vector<std::vector<float>> y;
      std::vector<const float*> from;
      std::vector<float*> to;
      for (const std::vector<float>& rows : x) from.push_back(rows.data());
      for (int64_t width : widths) y.push_back(unwritten(tokens * width));
      for (std::vector<float>& rows : y) to.push_back(rows.data());
      const Matmul job{back, int(weights.size()), factors.data(), tokens, from.data(), to.data()};
      if (threads) matmul(kernels, threads, job);
      const int64_t panels = threads ? 0 : kernels.matmul_panels(job);
      for (int64_t part = 0; part < 2 && panels; ++part) {  // as two threads share it
        std::vector<float> scratch = unwritten(kMatmulScratch);
        if (part || panels > 1) kernels.matmul(job, panels / 2 * part, part ? panels : panels / 2, scratch.data());
      }
      return y;
    };
    const std::vector<std::vector<float>> expected = run(*portable_kernels(), 0), found = run(kernels_, 0), threaded = run(kernels_, 3);
    const std::string what = std::string(back ? "product back" : "product of training") + ", kind " + std::to_string(int(one.kind)) + ", k " + std::to_string(k) +
                             ", n " + std::to_string(one.n[0]) + ", rank " + std::to_string(one.rank) + ", tokens " + std::to_string(tokens);
    for (size_t p = 0; p < exact.size(); ++p) {
      same(what, expected[p].data(), found[p].data(), found[p].size() * 4);
      same(what + ", three threads", found[p].data(), threaded[p].data(), found[p].size() * 4);
      near(what, exact[p], found[p].data());
    }
  }

  // Adapters of so many outputs and ranks on one input.
  void learning(Random& random, int64_t tokens, int64_t k, const std::vector<std::pair<int64_t, int64_t>>& sizes) {
    std::vector<std::vector<float>> b, dy;
    std::vector<Factor> factors(sizes.size());
    std::vector<const float*> gradients;
    int64_t ranks = 0;
    for (size_t p = 0; p < sizes.size(); ++p) {
      const auto [n, rank] = sizes[p];
      b.push_back(random.floats(n * rank)), dy.push_back(random.floats(tokens * n));
      factors[p].w.n = n, factors[p].w.k = k, factors[p].b = b[p].data(), factors[p].rank = rank, factors[p].scale = 0.5f + float(p);
      gradients.push_back(dy[p].data());
      ranks += rank;
    }
    const std::vector<float> x = random.floats(tokens * k), xa = random.floats(tokens * ranks);
    std::vector<std::vector<double>> exact = {std::vector<double>(size_t(ranks * k))};
    int64_t before = 0;
    for (const Factor& f : factors) {
      const size_t p = size_t(&f - factors.data());
      exact.emplace_back(size_t(f.w.n * f.rank));
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t j = 0; j < f.rank; ++j) {
          double dxa = 0;
          for (int64_t n = 0; n < f.w.n; ++n) {
            const double grad = double(f.scale) * double(dy[p][size_t(t * f.w.n + n)]);
            dxa += grad * double(b[p][size_t(n * f.rank + j)]);
            exact.back()[size_t(n * f.rank + j)] += grad * double(xa[size_t(t * ranks + before + j)]);
          }
          for (int64_t i = 0; i < k; ++i) exact[0][size_t((before + j) * k + i)] += dxa * double(x[size_t(t * k + i)]);
        }
      before += f.rank;
    }
    auto run = [&](const Kernels& kernels, int threads) {
      std::vector<std::vector<float>> found;
      std::vector<float*> db;
      for (const std::vector<double>& numbers : exact) found.push_back(unwritten(int64_t(numbers.size())));
      for (size_t p = 0; p < sizes.size(); ++p) db.push_back(found[p + 1].data());
      adapter_gradients(kernels, threads, {int(sizes.size()), factors.data(), tokens, x.data(), xa.data(), gradients.data(), found[0].data(), db.data()});
      return found;
    };
    const std::vector<std::vector<float>> expected = run(*portable_kernels(), 1), found = run(kernels_, 1), threaded = run(kernels_, 3);
    for (size_t i = 0; i < exact.size(); ++i) {
      const std::string what = "learning, k " + std::to_string(k) + ", tokens " + std::to_string(tokens);
      same(what, expected[i].data(), found[i].data(), found[i].size() * 4);
      same(what + ", three threads", found[i].data(), threaded[i].data(), found[i].size() * 4);
      near(what, exact[i], found[i].data());
    }
  }

  // Documents of so many queries after so many other keys.
  void sequences(Random& random, PackedAttention a, const std::vector<std::pair<int64_t, int64_t>>& lengths) {
    std::vector<PackedSequence> all;
    int64_t tokens = 0, keys = 0;
    for (const auto& [length, earlier] : lengths) {
      all.push_back({tokens, length, keys, earlier + length});
      tokens += length, keys += earlier + length;
    }
    const int64_t ldq = a.heads * a.dim, ldk = a.kv_heads * a.dim;
    const std::vector<float> q = random.floats(tokens * ldq, 3), k = random.floats(keys * ldk), v = random.floats(keys * ldk), dout = random.floats(tokens * ldq);
    a.scale = 0.3f, a.q = q.data(), a.k = k.data(), a.v = v.data(), a.dout = dout.data();
    const char* const names[] = {"the result", "lse", "dq", "dk", "dv"};
    const int64_t sizes[] = {tokens * ldq, tokens * a.heads, tokens * ldq, keys * ldk, keys * ldk};

    std::vector<double> exact[5];
    for (int i = 0; i < 5; ++i) exact[i].resize(size_t(sizes[i]));
    auto dot = [&](const float* x, const float* y) { return std::inner_product(x, x + a.dim, y, 0.0, std::plus<>(), [](float s, float t) { return double(s) * double(t); }); };
    for (const PackedSequence& sequence : all)
      for (int64_t t = sequence.begin; t < sequence.begin + sequence.length; ++t)
        for (int64_t head = 0; head < a.heads; ++head) {
          const int64_t last = sequence.key_begin + sequence.key_length - sequence.length + t - sequence.begin;
          const int64_t first = a.window ? std::max(sequence.key_begin, last + 1 - a.window) : sequence.key_begin, own = t * ldq + head * a.dim;
          auto key = [&](int64_t at) { return at * ldk + head / (a.heads / a.kv_heads) * a.dim; };
          std::vector<double> p;
          double sum = 0, delta = 0;
          for (int64_t s = first; s <= last; ++s) p.push_back(std::exp(double(a.scale) * dot(&q[size_t(own)], &k[size_t(key(s))]))), sum += p.back();
          exact[1][size_t(t * a.heads + head)] = std::log(sum);
          for (int64_t s = first; s <= last; ++s) {
            p[size_t(s - first)] /= sum;
            delta += p[size_t(s - first)] * dot(&dout[size_t(own)], &v[size_t(key(s))]);
          }
          for (int64_t s = first; s <= last; ++s) {
            const double here = p[size_t(s - first)], ds = double(a.scale) * here * (dot(&dout[size_t(own)], &v[size_t(key(s))]) - delta);
            for (int64_t d = 0; d < a.dim; ++d) {
              const size_t mine = size_t(own + d), theirs = size_t(key(s) + d);
              exact[0][mine] += here * double(v[theirs]), exact[2][mine] += ds * double(k[theirs]);
              exact[3][theirs] += ds * double(q[mine]), exact[4][theirs] += here * double(dout[mine]);
            }
          }
        }

    auto run = [&](const Kernels& kernels, int threads) {
      std::vector<std::vector<float>> found;
      for (int64_t size : sizes) found.push_back(unwritten(size));
      PackedAttention job = a;
      job.out = found[0].data(), job.lse = found[1].data(), job.dq = found[2].data(), job.dk = found[3].data(), job.dv = found[4].data();
      for (bool back : {false, true}) {
        if (threads) attend_packed(kernels, threads, job, all, back);
        for (const PackedSequence& sequence : all)
          for (int64_t head = 0; head < a.kv_heads && !threads; ++head) {
            std::vector<float> scratch = unwritten(kernels.packed_attention_scratch(job, sequence.key_length));
            (back ? kernels.attend_sequence_back : kernels.attend_sequence)(job, sequence, head, scratch.data());
          }
      }
      return found;
    };
    const std::vector<std::vector<float>> expected = run(*portable_kernels(), 0), found = run(kernels_, 0), threaded = run(kernels_, 3);
    for (size_t i = 0; i < 5; ++i) {  // the logarithm is the standard library's: not the same everywhere
      const std::string what = "sequences, dim " + std::to_string(a.dim) + ", window " + std::to_string(a.window) + ": " + names[i];
      same(what, expected[i].data(), found[i].data(), found[i].size() * 4, i == 0);
      same(what + ", three threads", found[i].data(), threaded[i].data(), found[i].size() * 4, false);
      near(what, exact[i], found[i].data(), 1);
    }
  }

  static void multiply(const Kernels& kernels, const Matrix& m, const std::vector<float>& x, int64_t tokens, float* y, int64_t ldy) {
    const Linear w = m.of(kernels);
    const int64_t tiles = (w.n + kernels.tile_rows(w) - 1) / kernels.tile_rows(w);
    std::vector<float> scratch(static_cast<size_t>(product_scratch_floats(round_up(w.k, 32))));
    const Rounded rows(*portable_kernels(), x, tokens, w.k);
    for (int64_t part = 0; part < 2; ++part) {  // as two threads share it
      const int64_t first = tiles * part / 2, last = tiles * (part + 1) / 2;
      if (first == last) continue;
      if (w.quantized()) kernels.quantized(w, rows.rows, tokens, y, ldy, first, last, reinterpret_cast<uint8_t*>(scratch.data()));
      else kernels.dense(w, x.data(), w.k, tokens, y, ldy, first, last, scratch.data());
    }
  }

  void attention(Random& random, Kind kind, int64_t dim, int64_t window, float cap) {
    constexpr int64_t kv_heads = 2, length = SPLIT + 40, blocks = (length + BLOCK - 1) / BLOCK;
    const int64_t padded = round_up(dim, 16), bytes = kind == Kind::F32 ? 4 : kind == Kind::F16 ? 2 : 1;
    const std::vector<float> k = random.floats(length * kv_heads * dim), v = random.floats(length * kv_heads * dim), q = random.floats(TILE_ROWS * dim, 4);
    std::vector<int32_t> table(static_cast<size_t>(blocks));
    for (int64_t b = 0; b < blocks; ++b) table[size_t(b)] = int32_t(b * 7 % blocks);
    const std::string what = "attention, cache " + std::to_string(int(kind)) + ", dim " + std::to_string(dim) + ", window " + std::to_string(window);
    constexpr int64_t segments = (blocks + SEGMENT - 1) / SEGMENT, heads = SEGMENT * kv_heads * BLOCK;
    const int64_t size = heads * ((dim + padded) * bytes + 2 * 4);
    std::vector<uint8_t> caches[2];
    std::vector<float> outs[2];
    const Kernels* both[2] = {portable_kernels(), &kernels_};
    for (int side = 0; side < 2; ++side) {
      const Kernels& kernels = *both[side];
      caches[side].resize(size_t(segments * size));
      uint8_t* pointers[segments];
      for (int64_t s = 0; s < segments; ++s) pointers[s] = caches[side].data() + s * size;
      KVStorage storage;
      storage.kind = kind, storage.kv_heads = kv_heads, storage.dim = dim, storage.dim_padded = padded, storage.segments = pointers;
      storage.values = heads * dim * bytes;
      storage.key_scales = storage.values + heads * padded * bytes;
      storage.value_scales = storage.key_scales + heads * 4;
      for (int64_t p = 0; p < length; ++p)
        for (int64_t h = 0; h < kv_heads; ++h)
          kernels.store_kv(storage, h, table[size_t(p / BLOCK)], p % BLOCK, k.data() + (p * kv_heads + h) * dim, v.data() + (p * kv_heads + h) * dim);
      std::vector<float> scratch(kAttendScratch + 64);
      for (int rows = 1; rows <= TILE_ROWS; ++rows)
        for (int64_t last : {int64_t(3), length - 1}) {
          const AttentionArgs args{&storage, table.data(), 4, 0.3f, cap, window};
          const float* queries[TILE_ROWS];
          int32_t positions[TILE_ROWS];
          for (int r = 0; r < rows; ++r) queries[r] = q.data() + r * dim, positions[r] = int32_t(std::max<int64_t>(0, last - rows + 1 + r));
          std::vector<float> out(size_t(rows * padded)), part(size_t(rows * padded));
          std::vector<Partial> total(size_t(rows), {-INFINITY, 0}), state(static_cast<size_t>(rows));
          for (int64_t split = window ? std::max<int64_t>(0, positions[0] - window + 1) / SPLIT : 0; split <= last / SPLIT; ++split) {
            kernels.attend(args, 1, queries, positions, rows, split, state.data(), part.data(), padded, scratch.data());
            for (int r = 0; r < rows; ++r) kernels.merge(&total[size_t(r)], out.data() + r * padded, &state[size_t(r)], part.data() + r * padded, padded);
          }
          outs[side].insert(outs[side].end(), out.begin(), out.end());
          for (const Partial& p : total) outs[side].push_back(p.maximum), outs[side].push_back(p.sum);
        }
    }
    same(what + ": cache", caches[0].data(), caches[1].data(), caches[0].size());
    same(what, outs[0].data(), outs[1].data(), outs[0].size() * 4);
  }

  const Kernels& kernels_;
};

// -- whole steps ------------------------------------------------------------------------------------------------------

// Two layers of odd sizes: grouped queries, a sliding window, q/k norms, soft caps, biases, partial rotation, an adapter.
struct Model {
  static constexpr int64_t vocab = 45, hidden = 40, intermediate = 72, heads = 6, kv_heads = 2, dim = 10, window = 20, rank = 3;
  std::vector<Matrix> matrices;  // embedding, head, then seven per layer
  std::vector<float> frequencies{1, 0.3f, 0.05f, 0.9f};
  Plan plan;

  Model(const Kernels& kernels, int threads, Kind kind, int group, Kind cache) : plan(&kernels, threads) {
    Random random{5};
    auto norm = [&](int64_t n) {
      Norm out;
      out.present = true, out.weight = random.floats(n);
      return out;
    };
    Config& c = plan.config;
    c.vocab = vocab, c.hidden = hidden, c.intermediate = intermediate, c.heads = heads, c.kv_heads = kv_heads, c.head_dim = dim, c.max_positions = 4096;
    c.attention_softcap = 5, c.final_softcap = 30, c.cache = cache, c.windows = {0, window};
    const int64_t n[kSlots] = {heads * dim, kv_heads * dim, kv_heads * dim, hidden, intermediate, intermediate, hidden};
    const int64_t k[kSlots] = {hidden, hidden, hidden, heads * dim, hidden, hidden, intermediate};
    matrices.reserve(2 + 2 * kSlots);
    auto add = [&](int64_t rows, int64_t columns, bool biased) { return matrices.emplace_back(matrix(random, kind, rows, columns, group, biased)).w; };
    plan.embedding = add(vocab, hidden, false);
    plan.head = add(vocab, hidden, false);
    plan.final_norm = norm(hidden);
    Adapter adapter;
    for (int l = 0; l < 2; ++l) {
      Layer layer;
      for (int s = 0; s < kSlots; ++s) {
        layer.linears[s] = add(n[s], k[s], s < kO);
        adapter.linears.push_back(s == kUp ? LowRank{} : LowRank{rank, random.floats(rank * k[s], 0.3f), random.floats(n[s] * rank, 0.3f)});
      }
      layer.before_attention = norm(hidden), layer.before_mlp = norm(hidden), layer.after_mlp = norm(hidden);
      layer.q_norm = norm(dim), layer.k_norm = norm(dim);
      layer.rope = l - 1, layer.group = l, layer.window = l ? window : 0, layer.attention_scale = 0.3f;
      plan.layers.push_back(std::move(layer));
    }
    plan.adapters.push_back(std::move(adapter));
    plan.check();
    plan.finish();
  }
};

struct Text { std::vector<int32_t> ids; int32_t adapter; };

// Logits of all tokens of all texts, each text in steps of `next(text)` tokens, those of all texts in one step.
std::vector<std::vector<float>> logits(Model& model, const std::vector<Text>& texts, const std::function<int64_t(size_t)>& next) {
  std::vector<std::vector<float>> out(texts.size());
  std::vector<int64_t> done(texts.size());
  const int64_t width = 64, sequences = int64_t(texts.size());
  std::vector<int32_t> tables(size_t(sequences * width)), adapters, sets(texts.size(), 0);
  std::iota(tables.begin(), tables.end(), 3);
  for (const Text& text : texts) adapters.push_back(text.adapter);
  for (;;) {
    std::vector<int32_t> ids, positions, sequence_of;
    for (size_t s = 0; s < texts.size(); ++s) {
      const int64_t count = std::min(next(s), int64_t(texts[s].ids.size()) - done[s]);
      for (int64_t i = 0; i < count; ++i) {
        ids.push_back(texts[s].ids[size_t(done[s])]);
        positions.push_back(int32_t(done[s]++));
        sequence_of.push_back(int32_t(s));
      }
    }
    if (ids.empty()) return out;
    std::vector<int32_t> wanted(ids.size());
    std::iota(wanted.begin(), wanted.end(), 0);
    std::vector<float> rows(ids.size() * size_t(Model::vocab));
    Step step;
    step.tokens = step.rows = int64_t(ids.size()), step.sequences = sequences;
    step.ids = ids.data(), step.positions = positions.data(), step.sequence_of = sequence_of.data(), step.wanted = wanted.data();
    step.tables = {tables.data(), tables.data()}, step.widths = {width, width};
    step.rotary = {{model.frequencies.data(), 1, 3, sets.data()}};
    step.adapters = adapters.data(), step.out = rows.data();
    model.plan.step(step, nullptr, nullptr);
    for (size_t t = 0; t < ids.size(); ++t)
      out[size_t(sequence_of[t])].insert(out[size_t(sequence_of[t])].end(), rows.begin() + int64_t(t) * Model::vocab, rows.begin() + int64_t(t + 1) * Model::vocab);
  }
}

void steps(Checker& checker, const Kernels& kernels, Kind kind, int group, Kind cache, int64_t longest) {
  Random random{6};
  std::vector<Text> texts;
  for (int64_t length : {longest, int64_t(1), int64_t(33)}) {
    texts.push_back({{}, texts.size() == 2 ? 0 : -1});
    for (int64_t i = 0; i < length; ++i) texts.back().ids.push_back(int32_t(random.below(Model::vocab)));
  }
  const std::string what = "steps, weights " + std::to_string(int(kind)) + ", cache " + std::to_string(int(cache)) + ": ";
  auto all = [&](const char* how, const std::vector<std::vector<float>>& expected, const std::vector<std::vector<float>>& found) {
    for (size_t s = 0; s < texts.size(); ++s) checker.same(what + how, expected[s].data(), found[s].data(), expected[s].size() * 4, false);
  };
  auto run = [&](const Kernels& by, int threads, const std::function<int64_t(size_t)>& next) {
    Model model(by, threads, kind, group, cache);
    return logits(model, texts, next);
  };
  std::vector<std::vector<float>> alone;  // each text in one step of its own
  for (const Text& text : texts) {
    Model model(kernels, 1, kind, group, cache);
    alone.push_back(logits(model, {text}, [](size_t) { return 4096; })[0]);
    for (float x : alone.back())
      if (!std::isfinite(x)) checker.same(what + "not finite", "a", "b", 1, false);
  }
  all("the portable kernels", run(*portable_kernels(), 1, [](size_t) { return 4096; }), alone);
  all("one token at a time", alone, run(kernels, 1, [](size_t) { return 1; }));
  all("three threads", alone, run(kernels, 3, [](size_t) { return 4096; }));
  all("three threads, pieces", alone, run(kernels, 3, [&](size_t) { return 1 + random.below(9); }));
}

bool check(const Kernels& kernels) {
  Checker checker(kernels);
  checker.elementwise();
  checker.rounding();
  checker.products();
  checker.attention();
  checker.training_products();
  checker.learning();
  checker.sequences();
  for (Kind cache : {Kind::F32, Kind::F16, Kind::Q8}) {
    for (Kind kind : {Kind::F32, Kind::F16, Kind::BF16, Kind::Q4, Kind::Q8}) steps(checker, kernels, kind, 32, cache, 41);
    steps(checker, kernels, Kind::Q4, 16, cache, SPLIT + 30);
  }
  std::printf("%s %d %016llx\n", kernels.name, checker.checks, static_cast<unsigned long long>(checker.digest));
  return checker.failures == 0;
}

}  // namespace

int main(int count, char** words) {
  const std::string wanted = count > 1 ? words[1] : "";
  std::vector<const Kernels*> all = supported_kernels();
  if (wanted == "avxvnni") all = {avxvnni_kernels()};
  bool good = true;
  for (const Kernels* kernels : all) {
    if (wanted == "names") std::printf("%s\n", kernels->name);
    else good &= check(*kernels);
  }
  return good ? 0 : 1;
}
