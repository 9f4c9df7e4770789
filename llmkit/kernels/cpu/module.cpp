// llmkit.kernels.cpu._native: the plan as a Python object. Arrays come in through the buffer protocol and stay referenced.
#include <chrono>

#include "plan.h"
#include "python.h"
#include "training.h"

namespace {

struct PlanObject {
  PyObject_HEAD
  Plan* plan;
  std::vector<View>* views;
};

// A copy: what a step has checked stays as it is, whatever other threads do to the array.
template <class T>
std::vector<T> numbers(PyObject* object, const char* name) {
  View view(object);
  const int64_t count = view.count<T>();
  const T* data = view.as<T>(count, name);
  return std::vector<T>(data, data + count);
}
std::vector<float> floats(PyObject* object) { return numbers<float>(object, "an array of floats"); }
std::vector<int32_t> integers(PyObject* object, int64_t count, const char* name) {
  std::vector<int32_t> out = numbers<int32_t>(object, name);
  if (int64_t(out.size()) != count) throw std::invalid_argument(std::string(name) + " has " + std::to_string(out.size()) + " entries, not " + std::to_string(count));
  return out;
}

// (weight, bias) or None
Norm norm(PyObject* object) {
  Norm out;
  if (object == Py_None) return out;
  out.present = true;
  out.weight = floats(item(object, 0));
  out.layer = item(object, 1) != Py_None;
  if (out.layer) out.bias = floats(item(object, 1));
  return out;
}

std::string text(PyObject* object) {
  Py_ssize_t size = 0;
  const char* characters = PyUnicode_Check(object) ? PyUnicode_AsUTF8AndSize(object, &size) : nullptr;
  if (!characters) {
    PyErr_Clear();
    throw std::invalid_argument("a name of the plan is not a text");
  }
  return std::string(characters, size_t(size));
}

// Calls f(name, value) for the entries of a dict.
template <class Function>
void each(PyObject* dict, Function f) {
  if (!PyDict_Check(dict)) throw std::invalid_argument("a part of the plan is not a dict");
  PyObject *name, *value;
  for (Py_ssize_t at = 0; PyDict_Next(dict, &at, &name, &value);) f(text(name), value);
}

// Plan(kernels, threads, config, layers): see llmkit/kernels/plan.py
PyObject* plan_new(PyTypeObject* type, PyObject* args, PyObject*) {
  return guarded([&]() -> PyObject* {
    const char* wanted = nullptr;
    int threads = 0;
    PyObject *config, *layers;
    if (!PyArg_ParseTuple(args, "ziO!O!", &wanted, &threads, &PyDict_Type, &config, &PyList_Type, &layers)) throw PythonError();
    const Kernels& kernels = chosen_kernels(wanted);
    check_threads(threads);
    auto plan = std::make_unique<Plan>(&kernels, threads);
    auto views = std::make_unique<std::vector<View>>();
    Config& c = plan->config;
    auto whole = [&](const char* name) { return integer(entry(config, name)); };
    auto real = [&](const char* name) { return float(number(entry(config, name))); };
    c.vocab = whole("vocab_size"), c.hidden = whole("hidden_size"), c.intermediate = whole("intermediate_size");
    c.heads = whole("num_heads"), c.kv_heads = whole("num_kv_heads"), c.head_dim = whole("head_dim");
    c.max_positions = whole("max_position_embeddings");
    const int64_t activation = whole("activation");
    c.activation = activation >= 0 && activation < 256 ? int(activation) : -1;
    c.eps = real("norm_eps"), c.attention_softcap = real("attn_logit_softcapping"), c.final_softcap = real("final_logit_softcapping");
    c.embedding_multiplier = real("embedding_multiplier"), c.residual_multiplier = real("residual_multiplier"), c.logits_scaling = real("logits_scaling");
    c.norm_before_heads = whole("norm_before_heads") != 0;
    const int64_t cache = whole("cache");
    if (cache != int64_t(Kind::F32) && cache != int64_t(Kind::F16) && cache != int64_t(Kind::Q8)) throw std::invalid_argument("the cache is of an unknown kind");
    c.cache = Kind(cache);
    PyObject* windows = entry(config, "windows");
    if (!PyTuple_Check(windows)) throw std::invalid_argument("the windows are not a tuple");
    for (Py_ssize_t i = 0; i < PyTuple_Size(windows); ++i) c.windows.push_back(integer(item(windows, i)));
    plan->embedding = linear(entry(config, "embedding"), *views, "the embedding");
    plan->head = linear(entry(config, "head"), *views, "the head");
    plan->final_norm = norm(entry(config, "final_norm"));
    if (PyObject* table = entry(config, "positions_table"); table != Py_None) plan->positions_table = floats(table);
    for (Py_ssize_t i = 0; i < PyList_Size(layers); ++i) {
      PyObject* from = PyList_GetItem(layers, i);
      if (!from || !PyDict_Check(from)) throw std::invalid_argument("a layer is not a dict");
      Layer layer;
      each(entry(from, "linears"), [&](const std::string& name, PyObject* part) { layer.linears[slot_of(name)] = linear(part, *views, name.c_str()); });
      each(entry(from, "norms"), [&](const std::string& name, PyObject* part) { norm_of(layer, name) = norm(part); });
      const int64_t rope = integer(entry(from, "rope")), group = integer(entry(from, "group"));
      if (rope < -1 || rope > 255 || group < 0 || group > 255) throw std::invalid_argument("a layer has no such rotation or cache group");
      layer.rope = int(rope), layer.group = int(group), layer.window = integer(entry(from, "window"));
      layer.attention_scale = float(number(entry(from, "attention_scale")));
      plan->layers.push_back(std::move(layer));
    }
    plan->check();
    plan->finish();
    auto allocate = reinterpret_cast<allocfunc>(PyType_GetSlot(type, Py_tp_alloc));
    PyObject* self = allocate(type, 0);
    if (!self) throw PythonError();
    reinterpret_cast<PlanObject*>(self)->plan = plan.release();
    reinterpret_cast<PlanObject*>(self)->views = views.release();
    return self;
  });
}

void plan_dealloc(PyObject* self) {
  PlanObject* object = reinterpret_cast<PlanObject*>(self);
  if (!object->plan->busy()) {  // an interpreter that ends drops what daemon threads still compute with, a fork what others did
    delete object->plan;
    delete object->views;
  }
  PyTypeObject* type = Py_TYPE(self);
  reinterpret_cast<freefunc>(PyType_GetSlot(type, Py_tp_free))(self);
  Py_DECREF(type);
}

unsigned long main_thread = 0;

// Looks for Ctrl-C while a long step runs; the caller of `step` is thread 0 and has given the GIL away. Only Python's main thread hears
// signals, and another one must not ask: where the interpreter is ending, taking the GIL ends the thread, in the middle of the step.
struct Watch {
  PyThreadState* thread = nullptr;
  const bool hears = PyThread_get_thread_ident() == main_thread;
  bool failed = false;
  std::chrono::steady_clock::time_point last = std::chrono::steady_clock::now();
  static bool look(void* self) {
    Watch& w = *static_cast<Watch*>(self);
    if (!w.hears) return false;
    const auto now = std::chrono::steady_clock::now();
    if (now - w.last < std::chrono::milliseconds(50)) return false;
    w.last = now;
    PyEval_RestoreThread(w.thread);
    w.failed = PyErr_CheckSignals() != 0;
    w.thread = PyEval_SaveThread();
    return w.failed;
  }
};

// step(tokens, positions, sequences, tables, rotary, adapters, rows, hidden, out)
PyObject* plan_step(PyObject* self, PyObject* args) {
  return guarded([&]() -> PyObject* {
    Plan& plan = *reinterpret_cast<PlanObject*>(self)->plan;
    PyObject *tokens, *positions, *sequences, *tables, *rotary, *adapters, *rows, *out;
    int hidden;
    if (!PyArg_ParseTuple(args, "OOOO!O!OOpO", &tokens, &positions, &sequences, &PyList_Type, &tables, &PyList_Type, &rotary, &adapters, &rows, &hidden, &out))
      throw PythonError();
    Step step;
    const std::vector<int32_t> ids = numbers<int32_t>(tokens, "tokens");
    step.tokens = int64_t(ids.size());
    const std::vector<int32_t> at = integers(positions, step.tokens, "positions"), sequence_of = integers(sequences, step.tokens, "sequences");
    step.ids = ids.data(), step.positions = at.data(), step.sequence_of = sequence_of.data();
    std::vector<std::vector<int32_t>> held;
    held.reserve(size_t(PyList_Size(tables) + PyList_Size(rotary)));
    for (Py_ssize_t i = 0; i < PyList_Size(tables); ++i) {  // (array [sequences, width], sequences)
      PyObject* pair = PyList_GetItem(tables, i);
      const int64_t count = integer(item(pair, 1));
      held.push_back(numbers<int32_t>(item(pair, 0), "a block table"));
      const int64_t total = int64_t(held.back().size());
      if (count < 1 || total % count || (i && step.sequences != count)) throw std::invalid_argument("the block tables do not fit together");
      step.sequences = count;
      step.tables.push_back(held.back().data());
      step.widths.push_back(total / count);
    }
    std::vector<std::vector<float>> sets;
    for (Py_ssize_t i = 0; i < PyList_Size(rotary); ++i) {  // (sets [count, half + 1], count, set of each sequence)
      PyObject* triple = PyList_GetItem(rotary, i);
      sets.push_back(floats(item(triple, 0)));
      Rotary r;
      r.count = integer(item(triple, 1));
      const int64_t total = int64_t(sets.back().size());
      if (r.count < 1 || total % r.count) throw std::invalid_argument("the rotary frequencies do not fit together");
      r.half = total / r.count - 1;
      r.sets = sets.back().data();
      held.push_back(integers(item(triple, 2), step.sequences, "rotary sets"));
      r.of_sequence = held.back().data();
      step.rotary.push_back(r);
    }
    std::vector<int32_t> chosen;
    if (adapters != Py_None) chosen = integers(adapters, step.sequences, "adapters"), step.adapters = chosen.data();
    const std::vector<int32_t> wanted = numbers<int32_t>(rows, "rows");
    step.rows = int64_t(wanted.size());
    step.wanted = wanted.data();
    step.hidden_only = hidden != 0;
    const View result(out, true);
    step.out = result.as<float>(step.rows * (hidden ? plan.config.hidden : plan.config.vocab), "the result");
    Watch watch;
    bool complete = false;
    std::exception_ptr problem;
    watch.thread = PyEval_SaveThread();
    try {
      complete = plan.step(step, &Watch::look, &watch);
    } catch (const std::exception&) {
      problem = std::current_exception();
    }
    PyEval_RestoreThread(watch.thread);
    if (problem) std::rethrow_exception(problem);
    if (!complete) throw PythonError();
    Py_RETURN_NONE;
  });
}

// add_adapter([(layer, name of the linear, rank, A, B), ...]) -> index for `step`
PyObject* plan_add_adapter(PyObject* self, PyObject* list) {
  return guarded([&]() -> PyObject* {
    Plan& plan = *reinterpret_cast<PlanObject*>(self)->plan;
    if (!PyList_Check(list)) throw std::invalid_argument("an adapter is a list");
    Adapter adapter;
    adapter.linears.resize(plan.layers.size() * kSlots);
    for (Py_ssize_t i = 0; i < PyList_Size(list); ++i) {
      PyObject* part = PyList_GetItem(list, i);
      const int64_t layer = integer(item(part, 0)), rank = integer(item(part, 2));
      if (layer < 0 || layer >= int64_t(plan.layers.size()) || rank < 1 || rank > 4096) throw std::invalid_argument("an adapter names a linear that is not there");
      LowRank& low = adapter.linears[size_t(layer) * kSlots + size_t(slot_of(text(item(part, 1))))];
      low.rank = rank;
      low.a = floats(item(part, 3));
      const std::vector<float> b = floats(item(part, 4));
      const size_t columns = size_t(rank), rows = b.size() / columns;
      low.b.resize(b.size());
      for (size_t n = 0; n < rows; ++n)
        for (size_t r = 0; r < columns; ++r) low.b[r * rows + n] = b[n * columns + r];
    }
    int64_t index = 0;
    released([&] { index = plan.add(std::move(adapter)); });
    return PyLong_FromLongLong(index);
  });
}

PyObject* plan_block_bytes(PyObject* self, PyObject* group) {
  return guarded([&]() -> PyObject* {
    Plan& plan = *reinterpret_cast<PlanObject*>(self)->plan;
    const int64_t g = integer(group);
    if (g < 0 || g >= int64_t(plan.config.windows.size())) throw std::invalid_argument("there is no cache group " + std::to_string(g));
    return PyLong_FromLongLong(plan.block_bytes(int(g)));
  });
}
PyObject* plan_kernels(PyObject* self, void*) { return PyUnicode_FromString(reinterpret_cast<PlanObject*>(self)->plan->kernels().name); }
PyObject* plan_threads(PyObject* self, void*) { return PyLong_FromLong(reinterpret_cast<PlanObject*>(self)->plan->threads()); }

PyMethodDef plan_methods[] = {
    {"step", plan_step, METH_VARARGS, nullptr},
    {"add_adapter", plan_add_adapter, METH_O, nullptr},
    {"block_bytes", plan_block_bytes, METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyGetSetDef plan_attributes[] = {
    {"kernels", plan_kernels, nullptr, nullptr, nullptr},
    {"threads", plan_threads, nullptr, nullptr, nullptr},
    {nullptr, nullptr, nullptr, nullptr, nullptr},
};
PyType_Slot plan_slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(plan_new)},
    {Py_tp_dealloc, reinterpret_cast<void*>(plan_dealloc)},
    {Py_tp_methods, plan_methods},
    {Py_tp_getset, plan_attributes},
    {0, nullptr},
};
PyType_Spec plan_spec = {"llmkit.kernels.cpu._native.Plan", sizeof(PlanObject), 0, Py_TPFLAGS_DEFAULT, plan_slots};

PyObject* available(PyObject*, PyObject*) {
  return guarded([&]() -> PyObject* {
    PyObject* names = PyList_New(0);
    if (!names) throw PythonError();
    for (const Kernels* kernels : supported_kernels()) {
      PyObject* text = PyUnicode_FromString(kernels->name);
      if (!text || PyList_Append(names, text) != 0) { Py_XDECREF(text); Py_DECREF(names); throw PythonError(); }
      Py_DECREF(text);
    }
    return names;
  });
}
PyObject* cores(PyObject*, PyObject*) { return PyLong_FromLong(physical_cores()); }

PyMethodDef functions[] = {
    {"available", available, METH_NOARGS, nullptr},
    {"physical_cores", cores, METH_NOARGS, nullptr},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, functions, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
  PyObject* threading = PyImport_ImportModule("threading");
  PyObject* main = threading ? PyObject_CallMethod(threading, "main_thread", nullptr) : nullptr;
  PyObject* identity = main ? PyObject_GetAttrString(main, "ident") : nullptr;
  if (identity) main_thread = PyLong_AsUnsignedLong(identity);
  Py_XDECREF(identity);
  Py_XDECREF(main);
  Py_XDECREF(threading);
  if (PyErr_Occurred()) return nullptr;
  PyObject* module = PyModule_Create(&definition);
  if (!module) return nullptr;
  PyObject* type = PyType_FromSpec(&plan_spec);
  if (!type || PyModule_AddObjectRef(module, "Plan", type) != 0) {
    Py_XDECREF(type);
    Py_DECREF(module);
    return nullptr;
  }
  Py_DECREF(type);
  if (PyModule_AddFunctions(module, training_functions()) != 0) {
    Py_DECREF(module);
    return nullptr;
  }
  return module;
}
