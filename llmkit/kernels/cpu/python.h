// What both halves of the Python module share: arrays through the buffer protocol, checked numbers, exceptions.
#pragma once
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030B0000
#include <Python.h>

#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"

namespace {

using namespace llmkit;

struct PythonError {};  // an exception is set already

// A buffer that lives as long as this object does.
class View {
 public:
  View(PyObject* object, bool writable = false) {
    if (PyObject_GetBuffer(object, &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) throw PythonError();
  }
  View(View&& other) noexcept : view_(other.view_) { other.view_.obj = nullptr; }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() { if (view_.obj && Py_IsInitialized()) PyBuffer_Release(&view_); }  // a thread may be unwound when the interpreter has gone
  int64_t bytes() const { return view_.len; }
  template <class T> T* as(int64_t count, const char* name) const {
    if (view_.len % int64_t(sizeof(T)) || view_.len / int64_t(sizeof(T)) != count)
      throw std::invalid_argument(std::string(name) + " has " + std::to_string(view_.len) + " bytes, not " + std::to_string(sizeof(T)) + " x " + std::to_string(count));
    if (reinterpret_cast<uintptr_t>(view_.buf) % alignof(T)) throw std::invalid_argument(std::string(name) + " is not aligned");
    return static_cast<T*>(view_.buf);
  }
  template <class T> int64_t count() const { return view_.len / int64_t(sizeof(T)); }

 private:
  Py_buffer view_{};
};

// Only true tuples, ints and floats: no code of an object's own runs between two looks at borrowed references.
PyObject* item(PyObject* tuple, Py_ssize_t i) {
  if (!PyTuple_Check(tuple)) throw std::invalid_argument("a part of the plan is not a tuple");
  PyObject* found = PyTuple_GetItem(tuple, i);
  if (!found) throw PythonError();
  return found;
}
PyObject* entry(PyObject* dict, const char* name) {
  PyObject* found = PyDict_GetItemString(dict, name);
  if (!found) throw std::invalid_argument(std::string("the plan has no ") + name);
  return found;
}
int64_t integer(PyObject* object) {
  if (!PyLong_Check(object)) throw std::invalid_argument("a number of the plan is not an int");
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}
double number(PyObject* object) {
  if (!PyFloat_Check(object) && !PyLong_Check(object)) throw std::invalid_argument("a number of the plan is not a float");
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

// (kind, n, k, data, scales, row_scale, bias, group, codebook), or None
Linear linear(PyObject* object, std::vector<View>& views, const char* name) {
  Linear w;
  if (object == Py_None) return w;
  const int64_t kind = integer(item(object, 0));
  if (kind < 0 || kind > int64_t(Kind::Q8)) throw std::invalid_argument(std::string(name) + " is of an unknown kind");
  w.kind = Kind(kind);
  w.n = integer(item(object, 1));
  w.k = integer(item(object, 2));
  const int64_t group = integer(item(object, 7));
  if (w.n < 1 || w.k < 1 || w.n > (int64_t(1) << 31) || w.k > (int64_t(1) << 31) || (group != 16 && group != 32))
    throw std::invalid_argument(std::string(name) + " has an impossible shape");
  w.group = int(group);
  auto keep = [&](Py_ssize_t i) -> View& {
    views.emplace_back(item(object, i));
    return views.back();
  };
  if (w.quantized()) {
    const int64_t panels = (w.n + 15) / 16, padded = round_up(w.k, 32);
    w.data = keep(3).as<uint8_t>(panels * (padded / 32) * (w.kind == Kind::Q4 ? 256 : 512), name);
    w.scales = keep(4).as<int8_t>(panels * (padded / w.group) * 16, name);
    w.row_scale = keep(5).as<float>(panels * 16, name);
    if (w.kind == Kind::Q4) {
      w.codebook = keep(8).as<uint8_t>(16, name);
      for (int i = 0; i < 16; ++i)
        if (w.codebook[i] > 127) throw std::invalid_argument(std::string(name) + " has a codebook entry beyond 127");
    }
  } else if (w.kind == Kind::F32) {
    w.data = keep(3).as<float>(w.n * w.k, name);
  } else {
    w.data = keep(3).as<uint16_t>(w.n * w.k, name);
  }
  if (item(object, 6) != Py_None) w.bias = keep(6).as<float>(w.n, name);
  return w;
}

template <class Function>
PyObject* guarded(Function function) {
  try {
    return function();
  } catch (const PythonError&) {
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

const Kernels& chosen_kernels(const char* wanted) {
  const char* problem = nullptr;
  const Kernels* kernels = choose_kernels(wanted, &problem);
  if (!kernels) throw std::invalid_argument(std::string("kernels '") + (wanted ? wanted : "") + "' are " + problem);
  return *kernels;
}
void check_threads(int threads) {
  if (threads < 1 || threads > 1024) throw std::invalid_argument("threads is " + std::to_string(threads) + "; it must be between 1 and 1024");
}

// Runs f without the GIL: it may wait for a step that wants it before it ends.
template <class Function>
void released(Function f) {
  std::exception_ptr problem;
  PyThreadState* thread = PyEval_SaveThread();
  try {
    f();
  } catch (const std::exception&) {
    problem = std::current_exception();
  }
  PyEval_RestoreThread(thread);
  if (problem) std::rethrow_exception(problem);
}

}  // namespace
