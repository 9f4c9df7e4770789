// Elementary functions and what works on one row: exp, activations, norms.

// e^x, relative error 2e-7; exactly 1 at 0 and exactly 0 below -87.3 (Cephes expf's reduction and polynomial). NaN of NaN: of two
// numbers without an order, min and max give the second.
static inline F exp(F x) {
  F limited = max(set1(-87.3f), min(set1(88.0f), x));
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
  F limited = max(set1(-20.0f), min(set1(20.0f), x));
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

// The gradient of rms_norm: with r = 1 / rms(x), dx = r (w dy) - x r^3 mean(w dy x).
static void rms_norm_back(const float* x, const float* weight, float eps, const float* dy, int64_t n, float* dx) {
  F squares = zero(), products = zero();
  each(n, [&](int64_t i, int m) {
    const F v = load_n(x + i, m);
    squares = fma(v, v, squares);
    products = fma(mul(load_n(weight + i, m), load_n(dy + i, m)), v, products);
  });
  const float r = 1.0f / sqrtf(hsum(squares) / float(n) + eps);
  const F factor = set1(r), less = set1(-r * r * r * hsum(products) / float(n));
  each(n, [&](int64_t i, int m) {
    store_n(dx + i, fma(load_n(x + i, m), less, mul(factor, mul(load_n(weight + i, m), load_n(dy + i, m)))), m);
  });
}

// One head, in place or not: the pairs (i, i + half) of n numbers turn, back by the opposite angles.
static void rotate(const float* x, const float* cos, const float* sin, int64_t half, int64_t n, bool back, float* out) {
  const F sign = set1(back ? -1.0f : 1.0f);
  each(half, [&](int64_t i, int m) {
    const F a = load_n(x + i, m), b = load_n(x + half + i, m), c = load_n(cos + i, m), s = mul(load_n(sin + i, m), sign);
    store_n(out + i, fma(c, a, mul(sub(zero(), s), b)), m);
    store_n(out + half + i, fma(c, b, mul(s, a)), m);
  });
  if (out != x) memcpy(out + 2 * half, x + 2 * half, size_t(n - 2 * half) * 4);
}

static void gate(const float* gate, const float* up, int64_t n, float* out) {
  each(n, [&](int64_t i, int m) { store_n(out + i, mul(act(kSilu, load_n(gate + i, m)), load_n(up + i, m)), m); });
}
// The gradients of silu(gate) * up: with s the logistic function of gate, silu' = s (1 + gate (1 - s)).
static void gate_back(const float* gate, const float* up, const float* dh, int64_t n, float* dgate, float* dup) {
  each(n, [&](int64_t i, int m) {
    const F g = load_n(gate + i, m), d = load_n(dh + i, m), one = set1(1.0f);
    const F s = div(one, add(one, exp(sub(zero(), g))));
    store_n(dup + i, mul(d, mul(g, s)), m);
    store_n(dgate + i, mul(mul(d, load_n(up + i, m)), mul(s, fma(g, sub(one, s), one))), m);
  });
}
