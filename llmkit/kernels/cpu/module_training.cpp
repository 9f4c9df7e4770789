// llmkit.kernels.cpu._native: the functions of training.
#include "python.h"
#include "training.h"

namespace {

const float* floats(std::vector<View>& views, PyObject* object, int64_t count, const char* name) {
  views.emplace_back(object);
  return views.back().as<float>(count, name);
}
float* written(std::vector<View>& views, PyObject* object, int64_t count, const char* name) {
  views.emplace_back(object, true);
  return views.back().as<float>(count, name);
}

// The arguments of a function that works row by row: the first array says how many rows there are.
struct Rows {
  const char* wanted = nullptr;
  int threads = 0;
  int64_t count = -1;
  std::vector<View> views;

  int64_t width(PyObject* object) const {
    const int64_t n = View(object).count<float>();
    if (n < 1) throw std::invalid_argument("the rows are empty");
    return n;
  }
  const float* given(PyObject* object, int64_t n, const char* name) { return floats(views, object, n, name); }
  const float* rows(PyObject* object, int64_t n, const char* name) {
    if (count < 0) count = View(object).count<float>() / n;
    return given(object, count * n, name);
  }
  float* result(PyObject* object, int64_t n, const char* name) { return written(views, object, count * n, name); }
  template <class Function>
  PyObject* run(Function row) {
    const Kernels& kernels = chosen_kernels(wanted);
    check_threads(threads);
    struct Job { const Kernels& kernels; const Function& row; int64_t count; } job{kernels, row, count};
    released([&] {
      run_independent(
          threads,
          [](void* context, int thread, int of) {
            const Job& j = *static_cast<Job*>(context);
            for (int64_t i = j.count * thread / of; i < j.count * (thread + 1) / of; ++i) j.row(j.kernels, i);
          },
          &job);
    });
    Py_RETURN_NONE;
  }
};

// product(kernels, threads, linear, x, out)
PyObject* one_product(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    const char* wanted = nullptr;
    int threads = 0;
    PyObject *weight, *x, *out;
    if (!PyArg_ParseTuple(args, "ziOOO", &wanted, &threads, &weight, &x, &out)) throw PythonError();
    const Kernels& kernels = chosen_kernels(wanted);
    check_threads(threads);
    std::vector<View> views;
    const Linear w = linear(weight, views, "the weight");
    if (!w.present()) throw std::invalid_argument("there is no weight");
    View from(x), to(out, true);
    const int64_t tokens = from.count<float>() / w.k;
    const float* rows = from.as<float>(tokens * w.k, "x");
    float* result = to.as<float>(tokens * w.n, "the result");
    if (!tokens) Py_RETURN_NONE;
    released([&] { product(kernels, threads, w, rows, tokens, result); });
    Py_RETURN_NONE;
  });
}

// matmul(kernels, threads, back, factors, x, y): factors [(linear, A | None, B | None, scale)], x and y tuples of arrays (kernels.h)
PyObject* matmul_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    const char* wanted = nullptr;
    int threads = 0, back = 0;
    PyObject *parts, *from, *to;
    if (!PyArg_ParseTuple(args, "zipO!O!O!", &wanted, &threads, &back, &PyTuple_Type, &parts, &PyTuple_Type, &from, &PyTuple_Type, &to)) throw PythonError();
    const Kernels& kernels = chosen_kernels(wanted);
    check_threads(threads);
    const Py_ssize_t count = PyTuple_Size(parts);
    if (count < 1 || PyTuple_Size(from) != (back ? count : 1) || PyTuple_Size(to) != (back ? 1 : count))
      throw std::invalid_argument("the numbers of factors and of arrays do not fit together");
    std::vector<View> views;
    std::vector<Factor> factors;
    for (Py_ssize_t p = 0; p < count; ++p) {
      PyObject* part = item(parts, p);
      Factor f;
      f.w = linear(item(part, 0), views, "a weight");
      if (!f.w.present() || f.w.quantized()) throw std::invalid_argument("a weight is not dense");
      if (p && f.w.k != factors[0].w.k) throw std::invalid_argument("the weights have different numbers of columns");
      if (item(part, 1) != Py_None) {
        views.emplace_back(item(part, 1));
        f.rank = views.back().count<float>() / f.w.k;
        f.a = views.back().as<float>(f.rank * f.w.k, "A");
        views.emplace_back(item(part, 2));
        f.b = views.back().as<float>(f.w.n * f.rank, "B");
        f.scale = float(number(item(part, 3)));
      }
      factors.push_back(f);
    }
    views.emplace_back(item(from, 0));
    const int64_t tokens = views.back().count<float>() / (back ? factors[0].w.n : factors[0].w.k);
    std::vector<const float*> x;
    std::vector<float*> y;
    for (Py_ssize_t p = 0; p < PyTuple_Size(from); ++p) {
      views.emplace_back(item(from, p));
      x.push_back(views.back().as<float>(tokens * (back ? factors[size_t(p)].w.n : factors[0].w.k), "x"));
    }
    for (Py_ssize_t p = 0; p < PyTuple_Size(to); ++p) {
      views.emplace_back(item(to, p), true);
      y.push_back(views.back().as<float>(tokens * (back ? factors[0].w.k : factors[size_t(p)].w.n), "y"));
    }
    if (!tokens) Py_RETURN_NONE;
    const Matmul job{back != 0, int(count), factors.data(), tokens, x.data(), y.data()};
    released([&] { matmul(kernels, threads, job); });
    Py_RETURN_NONE;
  });
}

// learn(kernels, threads, ((B, n, rank, scale), ...), x, xa, (dy, ...), dA, (dB, ...)): parts without an adapter are left out (kernels.h)
PyObject* learn_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    const char* wanted = nullptr;
    int threads = 0;
    PyObject *parts, *x, *xa, *dy, *da, *db;
    if (!PyArg_ParseTuple(args, "ziO!OOO!OO!", &wanted, &threads, &PyTuple_Type, &parts, &x, &xa, &PyTuple_Type, &dy, &da, &PyTuple_Type, &db)) throw PythonError();
    const Kernels& kernels = chosen_kernels(wanted);
    check_threads(threads);
    const Py_ssize_t count = PyTuple_Size(parts);
    if (count < 1 || PyTuple_Size(dy) != count || PyTuple_Size(db) != count) throw std::invalid_argument("the numbers of factors and of arrays do not fit together");
    std::vector<View> views;
    std::vector<Factor> factors(static_cast<size_t>(count));
    std::vector<const float*> gradients;
    std::vector<float*> found;
    int64_t ranks = 0;
    for (Py_ssize_t p = 0; p < count; ++p) {
      Factor& f = factors[size_t(p)];
      PyObject* sizes = item(parts, p);  // (B, n, rank, scale)
      f.w.n = integer(item(sizes, 1)), f.rank = integer(item(sizes, 2)), f.scale = float(number(item(sizes, 3)));
      if (f.w.n < 1 || f.w.n > (int64_t(1) << 31) || f.rank < 1 || f.rank > 65536) throw std::invalid_argument("an adapter has an impossible shape");
      f.b = floats(views, item(sizes, 0), f.w.n * f.rank, "B");
      ranks += f.rank;
    }
    views.emplace_back(xa);
    const int64_t tokens = views.back().count<float>() / ranks;
    AdapterGradients job{int(count), factors.data(), tokens, nullptr, views.back().as<float>(tokens * ranks, "x A^T"), nullptr, nullptr, nullptr};
    if (!tokens) throw std::invalid_argument("there are no tokens to learn from");
    views.emplace_back(x);
    const int64_t k = views.back().count<float>() / tokens;
    if (k < 1 || k > (int64_t(1) << 31)) throw std::invalid_argument("x has an impossible shape");
    job.x = views.back().as<float>(tokens * k, "x");
    for (Factor& f : factors) f.w.k = k;
    for (Py_ssize_t p = 0; p < count; ++p) {
      const Factor& f = factors[size_t(p)];
      gradients.push_back(floats(views, item(dy, p), tokens * f.w.n, "dy"));
      found.push_back(written(views, item(db, p), f.w.n * f.rank, "dB"));
    }
    job.da = written(views, da, ranks * k, "dA");
    job.dy = gradients.data(), job.db = found.data();
    released([&] { adapter_gradients(kernels, threads, job); });
    Py_RETURN_NONE;
  });
}

// attend(kernels, threads, (heads, kv_heads, dim, window, scale), lengths, key_lengths, q, k, v, out, lse, None | (dout, dq, dk, dv))
PyObject* attend_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    const char* wanted = nullptr;
    int threads = 0;
    PyObject *sizes, *own, *all, *q, *k, *v, *out, *lse, *gradients;
    if (!PyArg_ParseTuple(args, "ziOOOOOOOOO", &wanted, &threads, &sizes, &own, &all, &q, &k, &v, &out, &lse, &gradients)) throw PythonError();
    const Kernels& kernels = chosen_kernels(wanted);
    check_threads(threads);
    PackedAttention a{};
    a.heads = integer(item(sizes, 0)), a.kv_heads = integer(item(sizes, 1)), a.dim = integer(item(sizes, 2)), a.window = integer(item(sizes, 3));
    a.scale = float(number(item(sizes, 4)));
    if (a.kv_heads < 1 || a.heads < 1 || a.heads > 65536 || a.heads % a.kv_heads || a.dim < 1 || a.dim > kMaxHeadDim || a.window < 0)
      throw std::invalid_argument("the heads have an impossible shape");
    constexpr int64_t most = int64_t(1) << 31;  // of all sequences: times 65536 heads of kMaxHeadDim numbers it is still an int64
    std::vector<PackedSequence> sequences;
    int64_t tokens = 0, positions = 0;
    if (!PyTuple_Check(own) || !PyTuple_Check(all) || PyTuple_Size(own) != PyTuple_Size(all))
      throw std::invalid_argument("the lengths are no two tuples of one size");
    for (Py_ssize_t i = 0; i < PyTuple_Size(own); ++i) {
      const PackedSequence sequence{tokens, integer(item(own, i)), positions, integer(item(all, i))};
      if (sequence.length < 1 || sequence.key_length < sequence.length || sequence.key_length > most - positions)
        throw std::invalid_argument("a sequence has an impossible length");
      sequences.push_back(sequence);
      tokens += sequence.length;
      positions += sequence.key_length;
    }
    if (!tokens) Py_RETURN_NONE;
    std::vector<View> views;
    const bool back = gradients != Py_None;
    const int64_t queries = tokens * a.heads * a.dim, keys = positions * a.kv_heads * a.dim;
    a.q = floats(views, q, queries, "q");
    a.k = floats(views, k, keys, "k");
    a.v = floats(views, v, keys, "v");
    a.out = back ? const_cast<float*>(floats(views, out, queries, "the result")) : written(views, out, queries, "the result");
    a.lse = back ? const_cast<float*>(floats(views, lse, tokens * a.heads, "lse")) : written(views, lse, tokens * a.heads, "lse");
    if (back) {
      a.dout = floats(views, item(gradients, 0), queries, "dout");
      a.dq = written(views, item(gradients, 1), queries, "dq");
      a.dk = written(views, item(gradients, 2), keys, "dk");
      a.dv = written(views, item(gradients, 3), keys, "dv");
    }
    released([&] { attend_packed(kernels, threads, a, sequences, back); });
    Py_RETURN_NONE;
  });
}

// lend(parallel, thread, threads): the addresses of three functions of an OpenMP runtime; or 0, 0, 0: none is shared
PyObject* share_openmp_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    unsigned long long parallel = 0, thread = 0, threads = 0;
    if (!PyArg_ParseTuple(args, "KKK", &parallel, &thread, &threads)) throw PythonError();
    if (!parallel != !thread || !parallel != !threads) throw std::invalid_argument("of three functions some are missing");
    OpenMP runtime;
    runtime.parallel = reinterpret_cast<decltype(runtime.parallel)>(uintptr_t(parallel));
    runtime.thread = reinterpret_cast<decltype(runtime.thread)>(uintptr_t(thread));
    runtime.threads = reinterpret_cast<decltype(runtime.threads)>(uintptr_t(threads));
    share_openmp(runtime);
    Py_RETURN_NONE;
  });
}

// dequantize(threads, linear, out)
PyObject* dequantize_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    int threads = 0;
    PyObject *weight, *out;
    if (!PyArg_ParseTuple(args, "iOO", &threads, &weight, &out)) throw PythonError();
    check_threads(threads);
    std::vector<View> views;
    const Linear w = linear(weight, views, "the weight");
    if (!w.present() || !w.quantized()) throw std::invalid_argument("the weight is not quantized");
    View to(out, true);
    float* result = to.as<float>(w.n * w.k, "the result");
    released([&] { dequantize(threads, w, result); });
    Py_RETURN_NONE;
  });
}

// The functions below work row by row; x [rows, n] and the like are float32.

// norm(kernels, threads, x, weight, eps, y)
PyObject* norm_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    Rows r;
    PyObject *x, *weight, *y;
    float eps = 0;
    if (!PyArg_ParseTuple(args, "ziOOfO", &r.wanted, &r.threads, &x, &weight, &eps, &y)) throw PythonError();
    const int64_t n = r.width(weight);
    const float *in = r.rows(x, n, "x"), *w = r.given(weight, n, "the weight");
    float* out = r.result(y, n, "the result");
    return r.run([&](const Kernels& k, int64_t i) { k.rms_norm(in + i * n, w, eps, n, out + i * n); });
  });
}

// norm_back(kernels, threads, x, weight, eps, dy, dx)
PyObject* norm_back_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    Rows r;
    PyObject *x, *weight, *dy, *dx;
    float eps = 0;
    if (!PyArg_ParseTuple(args, "ziOOfOO", &r.wanted, &r.threads, &x, &weight, &eps, &dy, &dx)) throw PythonError();
    const int64_t n = r.width(weight);
    const float *in = r.rows(x, n, "x"), *w = r.given(weight, n, "the weight"), *grad = r.rows(dy, n, "dy");
    float* out = r.result(dx, n, "dx");
    return r.run([&](const Kernels& k, int64_t i) { k.rms_norm_back(in + i * n, w, eps, grad + i * n, n, out + i * n); });
  });
}

// rotate(kernels, threads, heads, dim, x, cos, sin, back, y): x and y [rows, heads, dim], cos and sin [rows, rotary_dim]: the second half
// of cos is the first again, that of sin its negative
PyObject* rotate_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    Rows r;
    long long heads = 0, dim = 0;
    int back = 0;
    PyObject *x, *cos, *sin, *y;
    if (!PyArg_ParseTuple(args, "ziLLOOOpO", &r.wanted, &r.threads, &heads, &dim, &x, &cos, &sin, &back, &y)) throw PythonError();
    if (heads < 1 || dim < 1 || heads > 65536 || dim > kMaxHeadDim) throw std::invalid_argument("the heads have an impossible shape");
    const int64_t n = heads * dim;
    const float* in = r.rows(x, n, "x");
    const int64_t rotary_dim = r.count ? r.width(cos) / r.count : 0;
    if (rotary_dim > dim || rotary_dim % 2) throw std::invalid_argument("the rotary dimension is impossible");
    const float *c = r.rows(cos, rotary_dim, "cos"), *s = r.rows(sin, rotary_dim, "sin");
    float* out = r.result(y, n, "the result");
    return r.run([&](const Kernels& k, int64_t i) {
      for (int64_t h = 0; h < heads; ++h) k.rotate(in + i * n + h * dim, c + i * rotary_dim, s + i * rotary_dim + rotary_dim / 2, rotary_dim / 2, dim, back != 0, out + i * n + h * dim);
    });
  });
}

// gate(kernels, threads, n, gate, up, h): h = silu(gate) * up
PyObject* gate_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    Rows r;
    long long n = 0;
    PyObject *gate, *up, *h;
    if (!PyArg_ParseTuple(args, "ziLOOO", &r.wanted, &r.threads, &n, &gate, &up, &h)) throw PythonError();
    if (n < 1) throw std::invalid_argument("the rows are empty");
    const float *g = r.rows(gate, n, "gate"), *u = r.rows(up, n, "up");
    float* out = r.result(h, n, "the result");
    return r.run([&](const Kernels& k, int64_t i) { k.gate(g + i * n, u + i * n, n, out + i * n); });
  });
}

// gate_back(kernels, threads, n, gate, up, dh, dgate, dup)
PyObject* gate_back_of(PyObject*, PyObject* args) {
  return guarded([&]() -> PyObject* {
    Rows r;
    long long n = 0;
    PyObject *gate, *up, *dh, *dgate, *dup;
    if (!PyArg_ParseTuple(args, "ziLOOOOO", &r.wanted, &r.threads, &n, &gate, &up, &dh, &dgate, &dup)) throw PythonError();
    if (n < 1) throw std::invalid_argument("the rows are empty");
    const float *g = r.rows(gate, n, "gate"), *u = r.rows(up, n, "up"), *grad = r.rows(dh, n, "dh");
    float *to_gate = r.result(dgate, n, "dgate"), *to_up = r.result(dup, n, "dup");
    return r.run([&](const Kernels& k, int64_t i) { k.gate_back(g + i * n, u + i * n, grad + i * n, n, to_gate + i * n, to_up + i * n); });
  });
}

PyMethodDef functions[] = {
    {"dequantize", dequantize_of, METH_VARARGS, nullptr},
    {"product", one_product, METH_VARARGS, nullptr},
    {"matmul", matmul_of, METH_VARARGS, nullptr},
    {"learn", learn_of, METH_VARARGS, nullptr},
    {"attend", attend_of, METH_VARARGS, nullptr},
    {"norm", norm_of, METH_VARARGS, nullptr},
    {"norm_back", norm_back_of, METH_VARARGS, nullptr},
    {"rotate", rotate_of, METH_VARARGS, nullptr},
    {"gate", gate_of, METH_VARARGS, nullptr},
    {"gate_back", gate_back_of, METH_VARARGS, nullptr},
    {"lend", share_openmp_of, METH_VARARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PyMethodDef* training_functions() { return functions; }
