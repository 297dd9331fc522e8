// Memory of large results, kept when they are freed for the next result of the same size: pages
// that come fresh from the system cost more than a softmax. NumPy's own allocator is behind it (NEP
// 49), so that huge pages apply and the arrays own their data as any others do.
#pragma once

#include <pybind11/numpy.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

namespace kept_results {

namespace py = pybind11;

// The part of NumPy's C interface (since 1.22) that pybind11 does not know.
struct Allocator {
  void* context;
  void* (*malloc)(void* context, size_t size);
  void* (*calloc)(void* context, size_t count, size_t size);
  void* (*realloc)(void* context, void* memory, size_t size);
  void (*free)(void* context, void* memory, size_t size);
};
struct Handler {
  char name[127];
  uint8_t version;
  Allocator allocator;
};
constexpr const char* kCapsuleName = "mem_handler";

// Below, malloc itself keeps what it gets back.
constexpr size_t kLarge = size_t{1} << 22;
constexpr size_t kDefaultLimit = size_t{1} << 28;
constexpr int kBlocks = 4;

class Keeper {
 public:
  void* take(size_t size) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      for (int i = count_ - 1; i >= 0; --i)
        if (blocks_[i].size == size) return remove(i);
    }
    return numpy.malloc(numpy.context, size);
  }
  void give_back(void* memory, size_t size) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!memory || size < kLarge || size > limit) return numpy.free(numpy.context, memory, size);
    while (count_ == kBlocks || kept_ + size > limit) {
      const size_t oldest = blocks_[0].size;
      numpy.free(numpy.context, remove(0), oldest);
    }
    blocks_[count_++] = {memory, size};
    kept_ += size;
  }

  // Around a fork: or the child's copy may be held for ever by a thread that it lacks.
  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  Allocator numpy{};
  size_t limit = kDefaultLimit;  // bytes, of all blocks

 private:
  void* remove(int i) {
    void* const memory = blocks_[i].memory;
    kept_ -= blocks_[i].size;
    for (--count_; i < count_; ++i) blocks_[i] = blocks_[i + 1];
    return memory;
  }

  struct Block {
    void* memory;
    size_t size;
  };
  std::mutex mutex_;
  Block blocks_[kBlocks] = {};
  int count_ = 0;
  size_t kept_ = 0;
};

// Never destroyed: arrays may outlive everything else.
inline Keeper& keeper() {
  static Keeper* const one = new Keeper;
  return *one;
}

inline size_t limit_from_environment() {
  const char* const text = std::getenv("SOFTMAXLIB_KEPT_BYTES");
  if (!text || !*text) return kDefaultLimit;
  char* end = nullptr;
  errno = 0;
  const unsigned long long bytes = std::strtoull(text, &end, 10);
  if (*end || errno || *text < '0' || *text > '9') {  // strtoull takes blanks and signs
    PyErr_Format(PyExc_ValueError,
                 "environment variable SOFTMAXLIB_KEPT_BYTES: '%s' is not a number of bytes", text);
    throw py::error_already_set();
  }
  return static_cast<size_t>(bytes);
}

// What new arrays of a thread are made with, and ours behind NumPy's.
class NumpyMemory {
 public:
  static NumpyMemory& get() {
    static NumpyMemory* const one = new NumpyMemory;
    return *one;
  }
  // Ours, where results are kept and nobody else's handler is in place; else NULL.
  PyObject* handler() const {
    if (keeper().limit == 0) return nullptr;
    const auto current = py::reinterpret_steal<py::object>(get_());
    const auto* in_place =
        static_cast<const Handler*>(PyCapsule_GetPointer(current.ptr(), kCapsuleName));
    if (!in_place) throw py::error_already_set();
    return std::strcmp(in_place->name, "default_allocator") == 0 ? ours_ : nullptr;
  }
  // The one before, as a new reference.
  PyObject* set(PyObject* handler) const { return set_(handler); }

 private:
  NumpyMemory() {
    keeper().limit = limit_from_environment();
    const py::object capsule =
        py::detail::import_numpy_core_submodule("multiarray").attr("_ARRAY_API");
    void** const api = static_cast<void**>(PyCapsule_GetPointer(capsule.ptr(), nullptr));
    set_ = reinterpret_cast<PyObject* (*)(PyObject*)>(api[304]);
    get_ = reinterpret_cast<PyObject* (*)()>(api[305]);
    const auto current = py::reinterpret_steal<py::object>(get_());
    const auto* numpy =
        static_cast<const Handler*>(PyCapsule_GetPointer(current.ptr(), kCapsuleName));
    if (!numpy) throw py::error_already_set();
    keeper().numpy = numpy->allocator;
    static Handler handler = {
        "softmaxlib",
        1,
        {nullptr, [](void*, size_t size) { return keeper().take(size); },
         [](void*, size_t count, size_t size) {
           const Allocator& n = keeper().numpy;
           return n.calloc(n.context, count, size);
         },
         [](void*, void* memory, size_t size) {
           const Allocator& n = keeper().numpy;
           return n.realloc(n.context, memory, size);
         },
         [](void*, void* memory, size_t size) { keeper().give_back(memory, size); }}};
    ours_ = PyCapsule_New(&handler, kCapsuleName, nullptr);
    if (!ours_) throw py::error_already_set();
  }

  PyObject* (*set_)(PyObject*) = nullptr;
  PyObject* (*get_)() = nullptr;
  PyObject* ours_ = nullptr;
};

// While it lives, new arrays of this context come from the keeper if they are large.
class Scope {
 public:
  explicit Scope(size_t bytes) {
    if (bytes < kLarge) return;
    PyObject* const handler = NumpyMemory::get().handler();
    if (!handler) return;
    before_ = NumpyMemory::get().set(handler);
    if (!before_) throw py::error_already_set();
  }
  ~Scope() {
    if (!before_) return;
    Py_XDECREF(NumpyMemory::get().set(before_));
    Py_DECREF(before_);
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  PyObject* before_ = nullptr;
};

}  // namespace kept_results
