// The compiled half of the Python package: NumPy arrays in, the C interface, the GIL released.
// What the arguments mean and whether they fit is decided in softmaxlib/_api.py; the plainest calls
// do not get that far.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <vector>

#if !defined(_WIN32)
#include <pthread.h>
#endif

#include "bits.hpp"
#include "internal.hpp"
#include "python/kept_results.hpp"
#include "registry/registry.hpp"

namespace py = pybind11;

namespace {

// ---- threads ------------------------------------------------------------------------------------

using Pool = std::shared_ptr<softmaxlib_pool>;

// One pool for the process, made when first needed and replaced by a larger one when a call asks
// for more threads; whoever still uses the old one keeps it alive.
struct PoolSlot {
  std::mutex mutex;
  Pool pool;
  int32_t threads = 0;

  // size: how many threads it has.
  Pool acquire(int32_t wanted, int32_t* size) {
    const std::lock_guard<std::mutex> lock(mutex);
    softmaxlib_pool* grown = nullptr;
    if (threads < wanted && softmaxlib_pool_create(wanted, &grown) == SOFTMAXLIB_OK) {
      pool = Pool(grown, softmaxlib_pool_destroy);
      threads = wanted;
    }
    *size = threads;
    return pool;
  }
};

// Never destroyed: at exit there is nothing to join, so nothing to hang on.
alignas(PoolSlot) unsigned char pool_slot_storage[sizeof(PoolSlot)];

PoolSlot& pool_slot() { return *std::launder(reinterpret_cast<PoolSlot*>(pool_slot_storage)); }

// Also what a forked child does first: its copy of the mutex may be held by a thread that it lacks.
void reset_pool_slot() { new (pool_slot_storage) PoolSlot; }

struct SharedTasks {
  softmaxlib_task task;
  void* argument;
  int64_t count;
  std::atomic<int64_t> next{0};

  static void drain(void* self, int64_t) {
    auto& tasks = *static_cast<SharedTasks*>(self);
    for (int64_t i; (i = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;)
      tasks.task(tasks.argument, i);
  }
};

// A softmaxlib_parallel_for whose context is the number of threads, at most so many of the pool's.
void parallel_for(void* context, int64_t count, softmaxlib_task task, void* argument) {
  const int32_t threads = *static_cast<const int32_t*>(context);
  SharedTasks tasks{task, argument, count};
  Pool pool;
  int32_t size = 0;
  try {
    pool = pool_slot().acquire(threads, &size);
  } catch (...) {  // no memory for the shared_ptr: run serially
  }
  if (pool && size == threads)  // its threads keep to their own tasks
    softmaxlib_pool_parallel_for(pool.get(), count, task, argument);
  else if (pool)
    softmaxlib_pool_parallel_for(pool.get(), std::min<int64_t>(threads, count), SharedTasks::drain,
                                 &tasks);
  else SharedTasks::drain(&tasks, 0);
}

// Not py::gil_scoped_release: at interpreter exit a daemon thread is unwound out of
// PyEval_RestoreThread, which terminates the process when it happens in a destructor.
template <class Work>
auto without_gil(Work work) {
  PyThreadState* state = PyEval_SaveThread();
  const auto result = work();
  PyEval_RestoreThread(state);
  return result;
}

// ---- arguments ----------------------------------------------------------------------------------

void check(softmaxlib_status status) {
  if (status == SOFTMAXLIB_OK) return;
  PyObject* type = status == SOFTMAXLIB_ERROR_DTYPE    ? PyExc_TypeError
                   : status == SOFTMAXLIB_ERROR_MEMORY ? PyExc_MemoryError
                                                       : PyExc_ValueError;
  PyErr_SetString(type, softmaxlib_status_text(status));
  throw py::error_already_set();
}

constexpr int kMaxNdim = SOFTMAXLIB_MAX_NDIM;

// Owns its shape and strides: another Python thread may reshape the array while the GIL is
// released.
class ArrayView {
 public:
  ArrayView(const py::array& source, int32_t dtype) {
    if (source.ndim() > kMaxNdim) check(SOFTMAXLIB_ERROR_SHAPE);
    std::copy_n(source.shape(), source.ndim(), shape_);
    std::copy_n(source.strides(), source.ndim(), strides_);
    array_ = {const_cast<void*>(source.data()), dtype, static_cast<int32_t>(source.ndim()), shape_,
              strides_};
  }
  ArrayView(const ArrayView&) = delete;
  ArrayView& operator=(const ArrayView&) = delete;

  const softmaxlib_array* get() const { return &array_; }

 private:
  int64_t shape_[kMaxNdim];
  int64_t strides_[kMaxNdim];
  softmaxlib_array array_;
};

const softmaxlib_array* get(const std::optional<ArrayView>& view) {
  return view ? view->get() : nullptr;
}

struct AlignedDelete {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t{64}); }
};

// Memory for one call, from what the last one of this thread left: new pages cost more than many a
// call. It belongs to whoever holds it, since a prepared call may run in another thread.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (size_ > spare().size && size_ <= kMostSpare) spare() = {std::move(memory_), size_};
  }
  bool reserve(size_t bytes) {
    if (bytes <= size_) return true;
    Block block = std::move(spare());
    spare() = {};
    if (block.size < bytes)
      block = {Memory(::operator new(bytes, std::align_val_t{64}, std::nothrow)), bytes};
    if (!block.memory) return false;
    memory_ = std::move(block.memory);
    size_ = block.size;
    return true;
  }
  void* get() const { return memory_.get(); }
  size_t size() const { return size_; }

 private:
  using Memory = std::unique_ptr<void, AlignedDelete>;
  struct Block {
    Memory memory;
    size_t size = 0;
  };
  static constexpr size_t kMostSpare = size_t{1} << 25;
  static Block& spare() {
    thread_local Block block;
    return block;
  }

  Memory memory_;
  size_t size_ = 0;
};

// Of the last call in this thread that succeeded.
thread_local softmaxlib_report last_report = {sizeof(softmaxlib_report), 0, 0, 0, 0, nullptr};

// A call of softmaxlib_run with the scratch it needs; runs, also repeatedly, without the GIL.
class Run {
 public:
  Run(softmaxlib_function function, const softmaxlib_array* x, const softmaxlib_array* out,
      int32_t naxes, const int32_t* axes, const softmaxlib_options& options)
      : function_(function), x_(x), out_(out), naxes_(naxes), axes_(axes), options_(options) {
    if (options_.num_threads > 1) {
      options_.parallel_for = parallel_for;
      options_.parallel_context = &options_.num_threads;
    }
    report_.struct_size = sizeof report_;
    options_.report = &report_;
    options_.scratch = small_scratch_;
    options_.scratch_size = sizeof small_scratch_;
  }
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  softmaxlib_status operator()() {
    softmaxlib_status status = attempt();
    if (status == SOFTMAXLIB_ERROR_SCRATCH && (status = reserve()) == SOFTMAXLIB_OK)
      status = attempt();
    return status;
  }
  // Allocates what the calls to come need.
  softmaxlib_status reserve() {
    size_t bytes = 0;
    const softmaxlib_status status =
        softmaxlib_scratch_size(function_, x_, out_, naxes_, axes_, &options_, &bytes);
    if (status || bytes <= options_.scratch_size) return status;
    if (!scratch_.reserve(bytes)) {
      options_.scratch_size = bytes;  // for the message
      return SOFTMAXLIB_ERROR_MEMORY;
    }
    options_.scratch = scratch_.get();
    options_.scratch_size = scratch_.size();
    return SOFTMAXLIB_OK;
  }
  void raise_if(softmaxlib_status status) const {
    if (status != SOFTMAXLIB_ERROR_MEMORY) return check(status);
    PyErr_Format(PyExc_MemoryError, "cannot allocate %zu bytes of scratch memory",
                 options_.scratch_size);
    throw py::error_already_set();
  }
  void finish(softmaxlib_status status) const {
    raise_if(status);
    last_report = report_;
  }

 private:
  softmaxlib_status attempt() const {
    return softmaxlib_run(function_, x_, out_, naxes_, axes_, &options_);
  }

  softmaxlib_function function_;
  const softmaxlib_array* x_;
  const softmaxlib_array* out_;
  int32_t naxes_;
  const int32_t* axes_;
  softmaxlib_options options_;
  softmaxlib_report report_{};
  Scratch scratch_;
  alignas(64) unsigned char small_scratch_[4096];  // most calls need no more
};

// ---- functions ----------------------------------------------------------------------------------

void run(int32_t function, const py::array& x, const py::array& out, int32_t x_dtype,
         int32_t out_dtype, const py::tuple& axes, double temperature,
         const std::optional<py::array>& temperatures, const std::optional<py::array>& bias,
         int32_t bias_dtype, const std::optional<py::array>& where, int32_t algorithm, int32_t isa,
         int32_t store, int32_t num_threads) {
  int32_t axis[kMaxNdim];
  if (axes.size() > kMaxNdim) check(SOFTMAXLIB_ERROR_AXIS);
  for (size_t i = 0; i < axes.size(); ++i) axis[i] = axes[i].cast<int32_t>();

  const ArrayView x_view(x, x_dtype), out_view(out, out_dtype);
  std::optional<ArrayView> temperatures_view, bias_view, where_view;
  if (temperatures) temperatures_view.emplace(*temperatures, SOFTMAXLIB_F64);
  if (bias) bias_view.emplace(*bias, bias_dtype);
  if (where) where_view.emplace(*where, SOFTMAXLIB_BOOL);

  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.algorithm = algorithm;
  options.isa = isa;
  options.store = store;
  options.num_threads = num_threads;
  options.temperature = temperature;
  options.temperatures = get(temperatures_view);
  options.bias = get(bias_view);
  options.where = get(where_view);

  Run call(function, x_view.get(), out_view.get(), static_cast<int32_t>(axes.size()), axis,
           options);
  call.finish(without_gil([&] { return call(); }));
}

// What the calls below share: temperatures, ISA and threads.
softmaxlib_options options_of(double temperature, const std::optional<ArrayView>& temperatures,
                              int32_t isa, const int32_t& num_threads) {
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.temperature = temperature;
  options.temperatures = get(temperatures);
  options.isa = isa;
  options.num_threads = num_threads;
  if (num_threads > 1) {
    options.parallel_for = parallel_for;
    options.parallel_context = const_cast<int32_t*>(&num_threads);
  }
  return options;
}

// Scratch for rows of x that are strided, as softmaxlib.h has it for calls that need none.
void offer_scratch(const ArrayView& x, int32_t axis, softmaxlib_options& options,
                   Scratch& scratch) {
  constexpr int64_t kFew = 64, kMost = int64_t{1} << 28;
  const softmaxlib_array& array = *x.get();
  if (axis < 0) axis += array.ndim;
  if (axis < 0 || axis >= array.ndim || array.ndim < 2 || array.shape[axis] <= 1) return;
  const int64_t n = array.shape[axis], threads = std::max(options.num_threads, 1);
  int64_t least = array.strides[axis];
  for (int32_t d = 0; d < array.ndim; ++d)
    if (array.shape[d] > 1) least = std::min(least, array.strides[d]);
  if (array.strides[axis] == least || n < kFew || n > kMost / (256 * threads)) return;
  if (!scratch.reserve(static_cast<size_t>(256 * (n + 64) * threads))) return;
  options.scratch = scratch.get();
  options.scratch_size = scratch.size();
}

// Calls f with options that report to last_kernel().
template <class F>
void run_reported(softmaxlib_options& options, F f) {
  softmaxlib_report report = {sizeof report, SOFTMAXLIB_ISA_AUTO, 0, 0, 0, nullptr};
  options.report = &report;
  check(without_gil(f));
  last_report = report;
}

void sample(const py::array& x, const py::array& uniforms, const py::array& indices,
            int32_t x_dtype, int32_t axis, double temperature,
            const std::optional<py::array>& temperatures, int64_t top_k, double top_p, double min_p,
            int32_t isa, int32_t num_threads) {
  const ArrayView x_view(x, x_dtype), uniforms_view(uniforms, SOFTMAXLIB_F64),
      indices_view(indices, SOFTMAXLIB_I64);
  std::optional<ArrayView> temperatures_view;
  if (temperatures) temperatures_view.emplace(*temperatures, SOFTMAXLIB_F64);
  auto options = options_of(temperature, temperatures_view, isa, num_threads);
  softmaxlib_filter filter = SOFTMAXLIB_FILTER_INIT;
  filter.top_k = top_k;
  filter.top_p = top_p;
  filter.min_p = min_p;
  Scratch scratch;
  offer_scratch(x_view, axis, options, scratch);
  run_reported(options, [&] {
    return softmaxlib_sample(x_view.get(), uniforms_view.get(), indices_view.get(), axis, &filter,
                             &options);
  });
}

void topk_softmax(const py::array& x, const py::array& weights, const py::array& indices,
                  int32_t x_dtype, int32_t dtype, int32_t axis, bool renormalize,
                  double temperature, const std::optional<py::array>& temperatures, int32_t isa,
                  int32_t num_threads) {
  const ArrayView x_view(x, x_dtype), weights_view(weights, dtype),
      indices_view(indices, SOFTMAXLIB_I64);
  std::optional<ArrayView> temperatures_view;
  if (temperatures) temperatures_view.emplace(*temperatures, SOFTMAXLIB_F64);
  auto options = options_of(temperature, temperatures_view, isa, num_threads);
  Scratch scratch;
  offer_scratch(x_view, axis, options, scratch);
  run_reported(options, [&] {
    return softmaxlib_topk_softmax(x_view.get(), weights_view.get(), indices_view.get(), axis,
                                   renormalize, &options);
  });
}

void backward(int32_t function, const py::array& grad, const py::array& x, const py::array& y,
              const py::array& out, int32_t grad_dtype, int32_t x_dtype, int32_t y_dtype,
              int32_t out_dtype, const py::tuple& axes, double temperature,
              const std::optional<py::array>& temperatures, const std::optional<py::array>& where,
              int32_t isa, int32_t num_threads) {
  int32_t axis[kMaxNdim];
  if (axes.size() > kMaxNdim) check(SOFTMAXLIB_ERROR_AXIS);
  for (size_t i = 0; i < axes.size(); ++i) axis[i] = axes[i].cast<int32_t>();
  const ArrayView grad_view(grad, grad_dtype), x_view(x, x_dtype), y_view(y, y_dtype),
      out_view(out, out_dtype);
  std::optional<ArrayView> temperatures_view, where_view;
  if (temperatures) temperatures_view.emplace(*temperatures, SOFTMAXLIB_F64);
  if (where) where_view.emplace(*where, SOFTMAXLIB_BOOL);
  auto options = options_of(temperature, temperatures_view, isa, num_threads);
  options.where = get(where_view);
  run_reported(options, [&] {
    return softmaxlib_backward(function, grad_view.get(), x_view.get(), y_view.get(),
                               out_view.get(), static_cast<int32_t>(axes.size()), axis, &options);
  });
}

void orthogonal_gradient(const py::array& grad, const py::array& weights, const py::array& out,
                         int32_t grad_dtype, int32_t weights_dtype, int32_t out_dtype, bool rescale,
                         int32_t isa, int32_t num_threads) {
  const ArrayView grad_view(grad, grad_dtype), weights_view(weights, weights_dtype),
      out_view(out, out_dtype);
  auto options = options_of(1, {}, isa, num_threads);
  run_reported(options, [&] {
    return softmaxlib_orthogonal_gradient(grad_view.get(), weights_view.get(), out_view.get(),
                                          rescale, &options);
  });
}

// losses: of dtype, or with a reduction of float64; total and grad: of dtype.
void cross_entropy(int32_t activation, const py::array& x, const py::array& target,
                   const py::array& losses, const std::optional<py::array>& total,
                   const std::optional<py::array>& grad, int32_t x_dtype, int32_t target_dtype,
                   int32_t dtype, int32_t axis, double label_smoothing, int32_t reduction,
                   const std::optional<py::array>& weight, int64_t ignore_index, double temperature,
                   const std::optional<py::array>& temperatures,
                   const std::optional<py::array>& where, int32_t isa, int32_t num_threads) {
  const ArrayView x_view(x, x_dtype), target_view(target, target_dtype),
      losses_view(losses, reduction == SOFTMAXLIB_REDUCTION_NONE ? dtype : SOFTMAXLIB_F64);
  std::optional<ArrayView> total_view, grad_view, temperatures_view, where_view;
  if (total) total_view.emplace(*total, dtype);
  if (grad) grad_view.emplace(*grad, dtype);
  if (temperatures) temperatures_view.emplace(*temperatures, SOFTMAXLIB_F64);
  if (where) where_view.emplace(*where, SOFTMAXLIB_BOOL);
  auto options = options_of(temperature, temperatures_view, isa, num_threads);
  options.where = get(where_view);
  softmaxlib_loss_options loss = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  loss.ignore_index = ignore_index;
  loss.label_smoothing = label_smoothing;
  loss.weight = weight ? static_cast<const double*>(weight->data()) : nullptr;
  loss.reduction = reduction;
  loss.total = get(total_view);
  Scratch scratch;
  offer_scratch(x_view, axis, options, scratch);
  run_reported(options, [&] {
    return softmaxlib_cross_entropy(activation, x_view.get(), target_view.get(), losses_view.get(),
                                    get(grad_view), axis, &loss, &options);
  });
}

// out = x, of any dtype, in its own floating dtype, whatever the caller's floating-point mode.
void convert(const py::array& x, const py::array& out, int32_t x_dtype, int32_t out_dtype) {
  static constexpr double kOne = 1;
  const ArrayView x_view(x, x_dtype), out_view(out, out_dtype);
  const softmaxlib_array one = {const_cast<double*>(&kOne), SOFTMAXLIB_F64, 0, nullptr, nullptr};
  check(without_gil(
      [&] { return softmaxlib_scale_rows(x_view.get(), &one, out_view.get(), nullptr); }));
}

void take_log_softmax(const py::array& x, const py::array& indices, const py::array& out,
                      const std::optional<py::array>& logsumexp, int32_t x_dtype, int32_t dtype,
                      int32_t axis, double temperature,
                      const std::optional<py::array>& temperatures,
                      const std::optional<py::array>& where, int32_t isa, int32_t num_threads) {
  const ArrayView x_view(x, x_dtype), indices_view(indices, SOFTMAXLIB_I64), out_view(out, dtype);
  std::optional<ArrayView> sums_view, temperatures_view, where_view;
  if (logsumexp) sums_view.emplace(*logsumexp, dtype);
  if (temperatures) temperatures_view.emplace(*temperatures, SOFTMAXLIB_F64);
  if (where) where_view.emplace(*where, SOFTMAXLIB_BOOL);
  auto options = options_of(temperature, temperatures_view, isa, num_threads);
  options.where = get(where_view);
  Scratch scratch;
  offer_scratch(x_view, axis, options, scratch);
  run_reported(options, [&] {
    return softmaxlib_take_log_softmax(x_view.get(), indices_view.get(), out_view.get(),
                                       get(sums_view), axis, &options);
  });
}

py::tuple last_report_tuple() {
  return py::make_tuple(last_report.isa, last_report.algorithm, last_report.store,
                        last_report.tasks, last_report.kernel ? last_report.kernel : "");
}

// What a call on arrays of this layout would run; nothing is read, so nothing has to be there.
py::dict explain(int32_t function, int32_t x_dtype, int32_t out_dtype,
                 const std::vector<int64_t>& shape, const std::vector<int64_t>& out_shape,
                 const std::vector<int64_t>& strides, const std::vector<int32_t>& axes,
                 bool in_place, int32_t algorithm, int32_t isa, int32_t num_threads) {
  using namespace py::literals;
  const softmaxlib_array x = {reinterpret_cast<void*>(intptr_t{1} << 20), x_dtype,
                              static_cast<int32_t>(shape.size()), shape.data(), strides.data()};
  softmaxlib_array out = {reinterpret_cast<void*>(intptr_t{1} << 60), out_dtype,
                          static_cast<int32_t>(out_shape.size()), out_shape.data(), nullptr};
  if (in_place) out = x;
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.algorithm = algorithm;
  options.isa = isa;
  options.num_threads = num_threads;
  options.parallel_for = parallel_for;
  softmaxlib::Explanation e{};
  check(softmaxlib::explain(function, &x, &out, static_cast<int32_t>(axes.size()), axes.data(),
                            &options, &e));
  return py::dict("isa"_a = e.isa, "kernel"_a = e.kernel, "why_kernel"_a = e.why_kernel,
                  "stores"_a = e.streaming ? "streaming" : "plain", "why_stores"_a = e.why_stores,
                  "split"_a = e.split, "tasks"_a = e.tasks, "why_tasks"_a = e.why_tasks,
                  "rows"_a = e.rows, "n"_a = e.n, "scratch_bytes"_a = e.scratch);
}

// Nanoseconds of one of `repeats` calls of work, back to back.
template <class Work>
double time_calls(int64_t repeats, Work work) {
  if (repeats < 1) throw py::value_error("repeats must be at least 1");
  return without_gil([&] {
    using Clock = std::chrono::steady_clock;
    const auto start = Clock::now();
    for (int64_t i = 0; i < repeats; ++i) work();
    const std::chrono::duration<double, std::nano> elapsed = Clock::now() - start;
    return elapsed.count() / static_cast<double>(repeats);
  });
}

double time_run(int32_t function, const py::array& x, const py::array& out, int32_t dtype,
                int32_t algorithm, int32_t isa, int32_t store, int32_t num_threads, int64_t repeats,
                int32_t axis) {
  const ArrayView x_view(x, dtype), out_view(out, dtype);
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.algorithm = algorithm;
  options.isa = isa;
  options.store = store;
  options.num_threads = num_threads;
  Run call(function, x_view.get(), out_view.get(), 1, &axis, options);
  call.raise_if(call.reserve());
  softmaxlib_status status = SOFTMAXLIB_OK;
  const double nanoseconds = time_calls(repeats, [&] { status = std::max(status, call()); });
  check(status);
  return nanoseconds;
}

double time_roofline(int32_t kind, int32_t isa, const py::array& x, const py::array& out,
                     int64_t repeats) {
  const void* from = x.data();
  void* to = const_cast<void*>(out.data());
  const auto bytes = static_cast<size_t>(std::min(x.nbytes(), out.nbytes()));
  bool known = true;
  const double nanoseconds = time_calls(repeats, [&] {
    known &= softmaxlib::roofline(isa, static_cast<softmaxlib::Roofline>(kind), from, to, bytes);
  });
  if (!known) throw py::value_error("unknown kind of roofline, or an ISA that cannot run here");
  return nanoseconds;
}

double time_pass(int32_t pass, int32_t isa, const py::array& x, const py::array& out,
                 bool streaming, int64_t repeats) {
  const auto from = static_cast<const float*>(x.data());
  const auto to = static_cast<float*>(const_cast<void*>(out.data()));
  const int64_t n = std::min(x.nbytes(), out.nbytes()) / static_cast<int64_t>(sizeof(float));
  const size_t bytes = softmaxlib::pass_scratch(n);
  Scratch scratch;
  if (!scratch.reserve(bytes + 64)) throw std::bad_alloc();
  std::memset(scratch.get(), 0, bytes);
  bool known = true;
  const double nanoseconds = time_calls(repeats, [&] {
    known &= softmaxlib::run_pass(isa, static_cast<softmaxlib::Pass>(pass), streaming, from, to, n,
                                  scratch.get());
  });
  if (!known) throw py::value_error("an ISA that cannot run here");
  return nanoseconds;
}

py::tuple exp_sweep(int32_t isa, bool accurate, uint32_t first, uint64_t count) {
  softmaxlib::ExpSweep sweep{};
  if (!without_gil([&] { return softmaxlib::exp_sweep(isa, accurate, first, count, &sweep); }))
    throw py::value_error("exp_sweep cannot run: bad range, or an ISA that cannot run here");
  return py::make_tuple(sweep.max_ulp, sweep.worst, sweep.checksum);
}

py::tuple isa_names(softmaxlib_isa (*ranked)(int32_t)) {
  py::list names;
  for (int32_t rank = 0; ranked(rank) != SOFTMAXLIB_ISA_AUTO; ++rank)
    names.append(softmaxlib_isa_name(ranked(rank)));
  return py::tuple(names);
}

// ---- plain calls --------------------------------------------------------------------------------

// What Python code has found out, so that a call need not ask it again.
struct Known {
  int32_t isa = -1;             // for calls whose context names none; -1: not known yet
  int32_t process_threads = 0;  // likewise; 0: never set
  int32_t default_threads = 0;  // and then these; 0: not known yet
  int32_t bfloat16 = -1;        // NumPy's number of the type of ml_dtypes; -1: never met
};
Known known;

// A call on so few elements keeps the GIL. On any ISA it ends long before the 5 ms after which
// threads take turns; giving the GIL away takes about as long as a short row, and getting it back
// from a thread that computes up to those 5 ms.
constexpr py::ssize_t kFewElements = 1 << 14;

using Numpy = py::detail::npy_api;
constexpr int kNumpyHalf = 23, kNumpyBool = 0;

// The dtype of an aligned C-contiguous numpy.ndarray of native floats; -1: something else.
int32_t plain_dtype(PyObject* object) {
  if (Py_TYPE(object) != Numpy::get().PyArray_Type_) return -1;
  const auto array = py::reinterpret_borrow<py::array>(object);
  constexpr int kPlain = Numpy::NPY_ARRAY_C_CONTIGUOUS_ | Numpy::NPY_ARRAY_ALIGNED_;
  if ((array.flags() & kPlain) != kPlain) return -1;
  const py::dtype dtype = array.dtype();
  if (dtype.byteorder() != '=') return -1;
  if (dtype.num() == Numpy::NPY_FLOAT_) return SOFTMAXLIB_F32;
  if (dtype.num() == Numpy::NPY_DOUBLE_) return SOFTMAXLIB_F64;
  if (dtype.num() == kNumpyHalf) return SOFTMAXLIB_F16;
  return dtype.num() == known.bfloat16 ? SOFTMAXLIB_BF16 : -1;
}

// Whether the result can go straight to out: of its dtype and shape, writeable without a warning,
// and x itself or apart from it.
bool takes_result(const py::object& out, const py::array& x, int32_t dtype, bool reduces, int ndim,
                  const py::ssize_t* shape) {
  if (plain_dtype(out.ptr()) != dtype) return false;
  const auto array = py::reinterpret_borrow<py::array>(out);
  constexpr int kWarnOnWrite = std::numeric_limits<int>::min();
  if ((array.flags() & (Numpy::NPY_ARRAY_WRITEABLE_ | kWarnOnWrite)) != Numpy::NPY_ARRAY_WRITEABLE_)
    return false;
  if (array.ndim() != ndim || !std::equal(shape, shape + ndim, array.shape())) return false;
  const auto to = static_cast<const char*>(array.data()), from = static_cast<const char*>(x.data());
  return (to == from && !reduces) || to + array.nbytes() <= from || from + x.nbytes() <= to;
}

// The value of a ContextVar of small integers; `otherwise` where it is 0, its default.
int32_t chosen(PyObject* variable, int32_t otherwise) {
  PyObject* value = nullptr;
  if (PyContextVar_Get(variable, nullptr, &value) != 0) throw py::error_already_set();
  const long number = PyLong_AsLong(py::reinterpret_steal<py::object>(value).ptr());
  return number ? static_cast<int32_t>(number) : otherwise;
}

bool is_text(PyObject* object, const char* text) {
  return PyUnicode_CheckExact(object) && PyUnicode_CompareWithASCIIString(object, text) == 0;
}

// Those of _api._evaluate.
struct Arguments {
  PyObject *function, *x, *axis, *temperature, *bias, *where, *dtype, *out, *algorithm, *keepdims;

  // But for those that go with every element or row.
  bool options_are_defaults() const { return dtype == Py_None && is_text(algorithm, "auto"); }
};

// A valid temperature for all rows; 0: something else.
double plain_temperature(PyObject* object) {
  if (!PyFloat_CheckExact(object)) return 0;
  const double temperature = PyFloat_AS_DOUBLE(object);
  return softmaxlib::is_positive_finite(temperature) ? temperature : 0;
}

// The dtype of a C-contiguous numpy.ndarray of bool; -1: something else.
int32_t plain_mask(PyObject* object) {
  if (Py_TYPE(object) != Numpy::get().PyArray_Type_) return -1;
  const auto mask = py::reinterpret_borrow<py::array>(object);
  const bool is_mask =
      (mask.flags() & Numpy::NPY_ARRAY_C_CONTIGUOUS_) && mask.dtype().num() == kNumpyBool;
  return is_mask ? SOFTMAXLIB_BOOL : -1;
}

// What elements and rows have beside x, as contiguous arrays of any shape. The library broadcasts
// them; where it refuses one, Python says why.
class PlainOptions {
 public:
  // False: Python has to look at one of these.
  bool set(PyObject* temperature, PyObject* bias, PyObject* where, int ndim,
           softmaxlib_options& options) {
    options.temperature = plain_temperature(temperature);
    if (options.temperature == 0) {
      const int32_t dtype = plain_dtype(temperature);
      if (dtype != SOFTMAXLIB_F32 && dtype != SOFTMAXLIB_F64) return false;
      if (py::reinterpret_borrow<py::array>(temperature).size() == 1) return false;  // that of all
      options.temperature = 1;
      if (!(options.temperatures = view(temperature, dtype, ndim))) return false;
    }
    if (bias != Py_None && !(options.bias = view(bias, plain_dtype(bias), ndim))) return false;
    return where == Py_None || (options.where = view(where, plain_mask(where), ndim));
  }
  bool any() const { return count_ > 0; }
  bool is_apart_from(const py::object& out) const {
    const auto to = py::reinterpret_borrow<py::array>(out);
    const auto* const first = static_cast<const char*>(to.data());
    return std::all_of(arrays_, arrays_ + count_, [&](const Array& array) {
      const auto* const data = static_cast<const char*>(array.view.data);
      return data + array.bytes <= first || first + to.nbytes() <= data;
    });
  }

 private:
  struct Array {
    softmaxlib_array view;
    int64_t shape[kMaxNdim];
    py::ssize_t bytes;
  };
  const softmaxlib_array* view(PyObject* object, int32_t dtype, int most) {
    if (dtype < 0) return nullptr;
    const auto source = py::reinterpret_borrow<py::array>(object);
    const auto ndim = static_cast<int>(source.ndim());
    if (ndim > most) return nullptr;
    Array& array = arrays_[count_++];
    std::copy_n(source.shape(), ndim, array.shape);
    array.bytes = source.nbytes();
    array.view = {const_cast<void*>(source.data()), dtype, ndim, array.shape, nullptr};
    return &array.view;
  }

  Array arrays_[3];
  int count_ = 0;
};

// What the function that with_plain_calls makes has at hand.
enum Held { kEvaluate, kChosenIsa, kChosenThreads };

// ISA and threads of a call; false: Python has to find them out.
bool choose(PyObject* held, softmaxlib_options& options) {
  options.isa = chosen(PyTuple_GET_ITEM(held, kChosenIsa), known.isa);
  options.num_threads =
      chosen(PyTuple_GET_ITEM(held, kChosenThreads),
             known.process_threads ? known.process_threads : known.default_threads);
  return options.isa >= 0 && options.num_threads != 0;
}

// The same of a call that run_plainly() makes.
bool choose_all(PyObject* held, softmaxlib_options& options) {
  if (!choose(held, options)) return false;
  if (options.num_threads > 1) {
    options.parallel_for = parallel_for;
    options.parallel_context = &options.num_threads;
  }
  return true;
}

// Runs a call on so many elements, whose report is the last one if it succeeds. Its results have no
// owner meanwhile: a daemon thread that is unwound at exit must not free them.
template <class Work>
softmaxlib_status run_plainly(softmaxlib_options& options, py::ssize_t size,
                              std::initializer_list<py::object*> results, Work call) {
  softmaxlib_report report = {sizeof report, SOFTMAXLIB_ISA_AUTO, 0, 0, 0, nullptr};
  options.report = &report;
  PyObject* held_back[2] = {};
  size_t count = 0;
  for (py::object* result : results) held_back[count++] = result->release().ptr();
  const softmaxlib_status status = size <= kFewElements ? call() : without_gil(call);
  count = 0;
  for (py::object* result : results)
    *result = py::reinterpret_steal<py::object>(held_back[count++]);
  if (status == SOFTMAXLIB_OK) last_report = report;
  return status;
}

// An axis from 0, or kAll; kNotPlain: anything but None and an int in range.
constexpr int32_t kAll = -1, kNotPlain = -2;
int32_t plain_axis(PyObject* axis, int ndim) {
  if (axis == Py_None) return kAll;
  if (!PyLong_CheckExact(axis)) return kNotPlain;
  int overflow = 0;
  const long index = PyLong_AsLongAndOverflow(axis, &overflow);
  if (overflow || index < -ndim || index >= ndim) return kNotPlain;
  return static_cast<int32_t>(index < 0 ? index + ndim : index);
}

py::object owned(PyObject* created) {
  if (!created) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(created);
}

// Memory as NumPy takes it, large blocks on huge pages and kept for the next result.
py::object new_array(py::dtype dtype, int ndim, const py::ssize_t* shape) {
  const Numpy& numpy = Numpy::get();
  size_t bytes = static_cast<size_t>(dtype.itemsize());
  for (int d = 0; d < ndim; ++d) bytes *= static_cast<size_t>(shape[d]);
  const kept_results::Scope scope(bytes);
  return owned(numpy.PyArray_NewFromDescr_(numpy.PyArray_Type_, dtype.release().ptr(), ndim, shape,
                                           nullptr, nullptr, 0, nullptr));
}

// What _api._evaluate returns, for plain arrays. No object: a call that needs more care, or an
// error message.
py::object call_plainly(PyObject* held, const Arguments& args) {
  const int32_t dtype = plain_dtype(args.x);
  if (dtype < 0 || !args.options_are_defaults() || !PyBool_Check(args.keepdims)) return {};
  const auto x = py::reinterpret_borrow<py::array>(args.x);
  const auto ndim = static_cast<int>(x.ndim());
  const py::ssize_t size = x.size();
  if (ndim == 0 || ndim > kMaxNdim || size == 0) return {};
  const int32_t axis = plain_axis(args.axis, ndim);
  if (axis == kNotPlain) return {};

  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  PlainOptions given;
  if (!given.set(args.temperature, args.bias, args.where, ndim, options)) return {};
  if (!choose(held, options)) return {};

  // The shapes of x (another thread may reshape it while the GIL is released), of the result, and
  // of that without the axes of length 1 that keepdims keeps.
  const auto function = static_cast<softmaxlib_function>(PyLong_AsLong(args.function));
  const bool reduces = softmaxlib::reduces(function);
  int64_t x_shape[kMaxNdim], rows_shape[kMaxNdim];
  py::ssize_t shape[kMaxNdim];
  int rows_ndim = 0, result_ndim = 0;
  for (int d = 0; d < ndim; ++d) {
    x_shape[d] = x.shape(d);
    const bool reduced = reduces && (axis == kAll || axis == d);
    if (!reduced) rows_shape[rows_ndim++] = x_shape[d];
    if (!reduced || args.keepdims == Py_True) shape[result_ndim++] = reduced ? 1 : x.shape(d);
  }

  const auto out = py::reinterpret_borrow<py::object>(args.out);
  if (!out.is_none() &&
      !(takes_result(out, x, dtype, reduces, result_ndim, shape) && given.is_apart_from(out)))
    return {};
  py::object result = out.is_none() ? new_array(x.dtype(), result_ndim, shape) : out;
  void* to = py::detail::array_proxy(result.ptr())->data;

  const softmaxlib_array from_array = {const_cast<void*>(x.data()), dtype, ndim, x_shape, nullptr};
  const softmaxlib_array to_array = {to, dtype, rows_ndim, rows_shape, nullptr};
  Run call(function, &from_array, &to_array, axis == kAll ? 0 : 1, &axis, options);
  // The result has no owner meanwhile: a daemon thread that is unwound at exit must not free it.
  PyObject* const held_back = result.release().ptr();
  const softmaxlib_status status =
      size <= kFewElements ? call() : without_gil([&] { return call(); });
  result = py::reinterpret_steal<py::object>(held_back);
  if (status != SOFTMAXLIB_OK && given.any()) return {};
  call.finish(status);
  const bool is_scalar = out.is_none() && result_ndim == 0;
  return is_scalar ? owned(PyObject_GetItem(result.ptr(), py::tuple().ptr())) : result;
}

// Those of _gradients._evaluate.
struct GradientArguments {
  PyObject *function, *grad, *y, *axis, *temperature, *where, *out;
};

// What it returns, likewise, for the functions whose gradient needs no x.
py::object call_gradient_plainly(PyObject* held, const GradientArguments& args) {
  const int32_t dtype = plain_dtype(args.y);
  if (dtype < 0 || plain_dtype(args.grad) != dtype) return {};
  const auto grad = py::reinterpret_borrow<py::array>(args.grad);
  const auto y = py::reinterpret_borrow<py::array>(args.y);
  const auto ndim = static_cast<int>(y.ndim());
  const py::ssize_t size = y.size();
  if (ndim == 0 || ndim > kMaxNdim || size == 0) return {};
  if (grad.ndim() != ndim || !std::equal(y.shape(), y.shape() + ndim, grad.shape())) return {};
  const int32_t axis = plain_axis(args.axis, ndim);
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  PlainOptions given;
  if (axis == kNotPlain || !choose_all(held, options)) return {};
  if (!given.set(args.temperature, Py_None, args.where, ndim, options)) return {};
  int64_t shape[kMaxNdim];
  std::copy_n(y.shape(), ndim, shape);
  const auto out = py::reinterpret_borrow<py::object>(args.out);
  const auto takes = [&](const py::array& from) {
    return takes_result(out, from, dtype, false, ndim, y.shape());
  };
  if (!out.is_none() && !(takes(grad) && takes(y) && given.is_apart_from(out))) return {};
  py::object result = out.is_none() ? new_array(y.dtype(), ndim, y.shape()) : out;
  const auto view = [&](PyObject* array) {
    return softmaxlib_array{py::detail::array_proxy(array)->data, dtype, ndim, shape, nullptr};
  };
  const softmaxlib_array from = view(args.grad), of = view(args.y), to = view(result.ptr());
  const auto function = static_cast<softmaxlib_function>(PyLong_AsLong(args.function));
  const softmaxlib_status status = run_plainly(options, size, {&result}, [&] {
    return softmaxlib_backward(function, &from, &of, &of, &to, axis == kAll ? 0 : 1, &axis,
                               &options);
  });
  if (status != SOFTMAXLIB_OK && given.any()) return {};
  check(status);
  return result;
}

// Those of _losses._evaluate.
struct LossArguments {
  PyObject *logits, *target, *axis, *activation, *label_smoothing, *weight, *ignore_index,
      *reduction, *temperature, *where, *return_grad, *out, *grad_out;

  // But for the temperature, the reduction and what is returned.
  bool options_are_defaults() const {
    return weight == Py_None && where == Py_None && out == Py_None && grad_out == Py_None &&
           PyFloat_CheckExact(label_smoothing) &&
           softmaxlib::bits_of(PyFloat_AS_DOUBLE(label_smoothing)) == 0;
  }
};

// Whether these are classes: contiguous native int64, one for each row along the last axis.
bool are_plain_classes(PyObject* object, int ndim, const py::ssize_t* shape) {
  if (Py_TYPE(object) != Numpy::get().PyArray_Type_) return false;
  const auto target = py::reinterpret_borrow<py::array>(object);
  constexpr int kPlain = Numpy::NPY_ARRAY_C_CONTIGUOUS_ | Numpy::NPY_ARRAY_ALIGNED_;
  const py::dtype dtype = target.dtype();
  return (target.flags() & kPlain) == kPlain && dtype.kind() == 'i' && dtype.itemsize() == 8 &&
         dtype.byteorder() == '=' && target.ndim() == ndim - 1 &&
         std::equal(shape, shape + ndim - 1, target.shape());
}

// What it returns, likewise, for classes of rows along the last axis.
py::object call_loss_plainly(PyObject* held, const LossArguments& args) {
  const int32_t dtype = plain_dtype(args.logits);
  if (dtype < 0 || !args.options_are_defaults() || !PyBool_Check(args.return_grad)) return {};
  const auto x = py::reinterpret_borrow<py::array>(args.logits);
  const auto ndim = static_cast<int>(x.ndim());
  const py::ssize_t size = x.size();
  if (ndim == 0 || ndim > kMaxNdim || size == 0) return {};
  const int32_t axis = plain_axis(args.axis, ndim);
  if (axis != ndim - 1 || !are_plain_classes(args.target, ndim, x.shape())) return {};
  const bool stable = is_text(args.activation, "stablemax");
  if (!stable && !is_text(args.activation, "softmax")) return {};

  softmaxlib_loss_options loss = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  int overflow = 0;
  if (!PyLong_CheckExact(args.ignore_index)) return {};
  loss.ignore_index = PyLong_AsLongLongAndOverflow(args.ignore_index, &overflow);
  if (is_text(args.reduction, "mean")) loss.reduction = SOFTMAXLIB_REDUCTION_MEAN;
  else if (is_text(args.reduction, "sum")) loss.reduction = SOFTMAXLIB_REDUCTION_SUM;
  else if (!is_text(args.reduction, "none")) return {};
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.temperature = plain_temperature(args.temperature);
  if (overflow || options.temperature == 0 || !choose_all(held, options)) return {};

  int64_t shape[kMaxNdim];
  std::copy_n(x.shape(), ndim, shape);
  const bool reduces = loss.reduction != SOFTMAXLIB_REDUCTION_NONE;
  const auto rows = static_cast<size_t>(size / x.shape(ndim - 1));
  const std::unique_ptr<double[]> terms(reduces ? new (std::nothrow) double[rows] : nullptr);
  if (reduces && !terms) return {};
  const bool returns_grad = args.return_grad == Py_True;
  py::object result = new_array(x.dtype(), reduces ? 0 : ndim - 1, x.shape()), grad;
  if (returns_grad) grad = new_array(x.dtype(), ndim, x.shape());
  const auto view = [&](PyObject* array, int32_t of, int dimensions) {
    return softmaxlib_array{py::detail::array_proxy(array)->data, of, dimensions, shape, nullptr};
  };
  const softmaxlib_array from = view(args.logits, dtype, ndim),
                         classes = view(args.target, SOFTMAXLIB_I64, ndim - 1),
                         to = view(result.ptr(), dtype, reduces ? 0 : ndim - 1);
  const softmaxlib_array of_rows = {terms.get(), SOFTMAXLIB_F64, ndim - 1, shape, nullptr};
  const softmaxlib_array grad_to =
      returns_grad ? view(grad.ptr(), dtype, ndim) : softmaxlib_array{};
  loss.total = reduces ? &to : nullptr;
  const softmaxlib_status status = run_plainly(options, size, {&result, &grad}, [&] {
    return softmaxlib_cross_entropy(stable ? SOFTMAXLIB_STABLEMAX : SOFTMAXLIB_SOFTMAX, &from,
                                    &classes, reduces ? &of_rows : &to,
                                    returns_grad ? &grad_to : nullptr, axis, &loss, &options);
  });
  if (status != SOFTMAXLIB_OK) return {};  // Python says what is wrong, and where
  if (to.ndim == 0) result = owned(PyObject_GetItem(result.ptr(), py::tuple().ptr()));
  return grad ? py::object(py::make_tuple(result, grad)) : result;
}

// A plain call, or else Python's.
template <class Arguments, py::object (*kPlainly)(PyObject*, const Arguments&)>
PyObject* call_plainly_or_evaluate(PyObject* held, PyObject* const* args, Py_ssize_t nargs) {
  Arguments arguments;
  try {
    if (static_cast<size_t>(nargs) * sizeof *args == sizeof arguments) {
      std::memcpy(&arguments, args, sizeof arguments);
      if (py::object result = kPlainly(held, arguments)) return result.release().ptr();
    }
  } catch (py::error_already_set& error) {
    error.restore();
    return nullptr;
  }
  return PyObject_Vectorcall(PyTuple_GET_ITEM(held, kEvaluate), args, static_cast<size_t>(nargs),
                             nullptr);
}

// _api._evaluate or _gradients._evaluate with a short cut. Not through pybind11, whose dispatcher
// takes longer than a call.
template <class Arguments, py::object (*kPlainly)(PyObject*, const Arguments&)>
py::object with_short_cut(const py::object& evaluate, const py::object& chosen_isa,
                          const py::object& chosen_threads) {
  static PyMethodDef method = {"evaluate",
                               reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(
                                   call_plainly_or_evaluate<Arguments, kPlainly>)),
                               METH_FASTCALL, nullptr};
  const py::tuple held = py::make_tuple(evaluate, chosen_isa, chosen_threads);
  return py::reinterpret_steal<py::object>(PyCFunction_NewEx(&method, held.ptr(), nullptr));
}

// ---- DLPack -------------------------------------------------------------------------------------

// The stable part of DLPack's ABI (github.com/dmlc/dlpack), for the one dtype NumPy cannot import.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;  // in elements; may be NULL: C order
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* manager;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kDLCPU = 1;
constexpr uint8_t kDLBfloat = 4;

// The tensor's memory as uint16, kept alive by the array.
py::array bfloat16_from_dlpack(const py::object& producer) {
  const py::object capsule = producer.attr("__dlpack__")();
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
  if (!managed) throw py::error_already_set();
  const DLTensor& tensor = managed->tensor;
  if (tensor.device_type != kDLCPU) throw py::type_error("the tensor is not in CPU memory");
  if (tensor.code != kDLBfloat || tensor.bits != 16 || tensor.lanes != 1)
    throw py::type_error("the tensor is not bfloat16");

  const py::array::ShapeContainer shape(tensor.shape, tensor.shape + tensor.ndim);
  py::array::StridesContainer strides;
  if (tensor.strides) {
    strides = py::array::StridesContainer(tensor.strides, tensor.strides + tensor.ndim);
    for (auto& stride : *strides) stride *= sizeof(uint16_t);
  }
  if (PyCapsule_SetName(capsule.ptr(), "used_dltensor") != 0) throw py::error_already_set();
  const py::capsule owner(managed, [](void* memory) {
    auto* owned = static_cast<DLManagedTensor*>(memory);
    if (owned->deleter) owned->deleter(owned);
  });
  return py::array(py::dtype::of<uint16_t>(), shape, strides,
                   static_cast<const char*>(tensor.data) + tensor.byte_offset, owner);
}

}  // namespace

#define PyInit__core initialize_core  // PyInit__core itself comes first: see below
PYBIND11_MODULE(_core, m) {
  using namespace py::literals;
  if (std::strcmp(softmaxlib_version(), SOFTMAXLIB_VERSION_STRING) != 0)
    throw py::import_error("softmaxlib._core is of version " SOFTMAXLIB_VERSION_STRING
                           ", the library that it found of version " +
                           std::string(softmaxlib_version()));
  reset_pool_slot();
#if !defined(_WIN32)
  pthread_atfork(nullptr, nullptr, reset_pool_slot);
  pthread_atfork([] { kept_results::keeper().lock(); }, [] { kept_results::keeper().unlock(); },
                 [] { kept_results::keeper().unlock(); });
#endif

  // The C header's codes by the names that Python uses.
  py::dict functions, dtypes;
  for (const softmaxlib::Function& f : softmaxlib::kFunctionInfo) functions[f.name] = f.code;
  for (const softmaxlib::Dtype& d : softmaxlib::kDtypeInfo) dtypes[d.numpy] = d.code;
  m.attr("functions") = functions;
  m.attr("dtypes") = dtypes;
  m.attr("algorithms") = py::dict("auto"_a = int{SOFTMAXLIB_ALGORITHM_AUTO},
                                  "three_pass_recompute"_a = int{SOFTMAXLIB_THREE_PASS_RECOMPUTE},
                                  "three_pass_reload"_a = int{SOFTMAXLIB_THREE_PASS_RELOAD},
                                  "two_pass"_a = int{SOFTMAXLIB_TWO_PASS},
                                  "two_pass_reload"_a = int{SOFTMAXLIB_TWO_PASS_RELOAD});
  m.attr("isas") =
      py::dict("auto"_a = int{SOFTMAXLIB_ISA_AUTO}, "avx512"_a = int{SOFTMAXLIB_ISA_AVX512},
               "avx2"_a = int{SOFTMAXLIB_ISA_AVX2}, "scalar"_a = int{SOFTMAXLIB_ISA_SCALAR});
  m.attr("stores") =
      py::dict("auto"_a = int{SOFTMAXLIB_STORE_AUTO}, "plain"_a = int{SOFTMAXLIB_STORE_PLAIN},
               "streaming"_a = int{SOFTMAXLIB_STORE_STREAMING});
  m.attr("reductions") =
      py::dict("none"_a = int{SOFTMAXLIB_REDUCTION_NONE}, "sum"_a = int{SOFTMAXLIB_REDUCTION_SUM},
               "mean"_a = int{SOFTMAXLIB_REDUCTION_MEAN});
  m.attr("rooflines") =
      py::dict("read"_a = static_cast<int>(softmaxlib::Roofline::kRead),
               "copy"_a = static_cast<int>(softmaxlib::Roofline::kCopy),
               "streaming_copy"_a = static_cast<int>(softmaxlib::Roofline::kStreamingCopy),
               "scale"_a = static_cast<int>(softmaxlib::Roofline::kScale),
               "triad"_a = static_cast<int>(softmaxlib::Roofline::kTriad));
  m.attr("passes") = py::dict("max"_a = static_cast<int>(softmaxlib::Pass::kMax),
                              "sum"_a = static_cast<int>(softmaxlib::Pass::kSum),
                              "sum_known"_a = static_cast<int>(softmaxlib::Pass::kSumKnown),
                              "store"_a = static_cast<int>(softmaxlib::Pass::kStore),
                              "store_known"_a = static_cast<int>(softmaxlib::Pass::kStoreKnown),
                              "write"_a = static_cast<int>(softmaxlib::Pass::kWrite),
                              "scale"_a = static_cast<int>(softmaxlib::Pass::kScale));
  m.def("run", &run, "function"_a, "x"_a, "out"_a, "x_dtype"_a, "out_dtype"_a, "axes"_a,
        "temperature"_a, "temperatures"_a, "bias"_a, "bias_dtype"_a, "where"_a, "algorithm"_a,
        "isa"_a, "store"_a, "num_threads"_a);
  m.def("sample", &sample, "x"_a, "uniforms"_a, "indices"_a, "x_dtype"_a, "axis"_a, "temperature"_a,
        "temperatures"_a, "top_k"_a, "top_p"_a, "min_p"_a, "isa"_a, "num_threads"_a);
  m.def("topk_softmax", &topk_softmax, "x"_a, "weights"_a, "indices"_a, "x_dtype"_a, "dtype"_a,
        "axis"_a, "renormalize"_a, "temperature"_a, "temperatures"_a, "isa"_a, "num_threads"_a);
  m.def("backward", &backward, "function"_a, "grad"_a, "x"_a, "y"_a, "out"_a, "grad_dtype"_a,
        "x_dtype"_a, "y_dtype"_a, "out_dtype"_a, "axes"_a, "temperature"_a, "temperatures"_a,
        "where"_a, "isa"_a, "num_threads"_a);
  m.def("orthogonal_gradient", &orthogonal_gradient, "grad"_a, "weights"_a, "out"_a, "grad_dtype"_a,
        "weights_dtype"_a, "out_dtype"_a, "rescale"_a, "isa"_a, "num_threads"_a);
  m.def("cross_entropy", &cross_entropy, "activation"_a, "x"_a, "target"_a, "losses"_a, "total"_a,
        "grad"_a, "x_dtype"_a, "target_dtype"_a, "dtype"_a, "axis"_a, "label_smoothing"_a,
        "reduction"_a, "weight"_a, "ignore_index"_a, "temperature"_a, "temperatures"_a, "where"_a,
        "isa"_a, "num_threads"_a);
  m.def("convert", &convert, "x"_a, "out"_a, "x_dtype"_a, "out_dtype"_a);
  m.def("take_log_softmax", &take_log_softmax, "x"_a, "indices"_a, "out"_a, "logsumexp"_a,
        "x_dtype"_a, "dtype"_a, "axis"_a, "temperature"_a, "temperatures"_a, "where"_a, "isa"_a,
        "num_threads"_a);
  m.def("explain", &explain, "function"_a, "x_dtype"_a, "out_dtype"_a, "shape"_a, "out_shape"_a,
        "strides"_a, "axes"_a, "in_place"_a, "algorithm"_a, "isa"_a, "num_threads"_a);
  m.def(
      "with_kept_memory",
      [](size_t nbytes, const py::function& make) {
        const kept_results::Scope scope(nbytes);
        return make();
      },
      "nbytes"_a, "make"_a);
  m.def("last_report", &last_report_tuple);
  m.def("with_plain_calls", &with_short_cut<Arguments, call_plainly>, "evaluate"_a, "chosen_isa"_a,
        "chosen_threads"_a);
  m.def("with_plain_losses", &with_short_cut<LossArguments, call_loss_plainly>, "evaluate"_a,
        "chosen_isa"_a, "chosen_threads"_a);
  m.def("with_plain_gradients", &with_short_cut<GradientArguments, call_gradient_plainly>,
        "evaluate"_a, "chosen_isa"_a, "chosen_threads"_a);
  py::class_<Known>(m, "Known")
      .def_readwrite("isa", &Known::isa)
      .def_readwrite("process_threads", &Known::process_threads)
      .def_readwrite("default_threads", &Known::default_threads)
      .def_readwrite("bfloat16", &Known::bfloat16);
  m.attr("known") = py::cast(&known, py::return_value_policy::reference);
  m.def("time_run", &time_run, "function"_a, "x"_a, "out"_a, "dtype"_a, "algorithm"_a, "isa"_a,
        "store"_a, "num_threads"_a, "repeats"_a, "axis"_a = -1);
  m.def("time_roofline", &time_roofline, "kind"_a, "isa"_a, "x"_a, "out"_a, "repeats"_a);
  m.def("time_pass", &time_pass, "pass_"_a, "isa"_a, "x"_a, "out"_a, "streaming"_a, "repeats"_a);
  m.def("exp_sweep", &exp_sweep, "isa"_a, "accurate"_a, "first"_a, "count"_a);
  m.def("isas_compiled", [] { return isa_names(softmaxlib_isa_compiled); });
  m.def("isas_available", [] { return isa_names(softmaxlib_isa_available); });
  m.def("cache_sizes", [] {
    return py::make_tuple(softmaxlib_cache_size(1), softmaxlib_cache_size(2),
                          softmaxlib_cache_size(3));
  });
  m.def("version", &softmaxlib_version);
  m.def("compiler", &softmaxlib_compiler);
  m.def("bfloat16_from_dlpack", &bfloat16_from_dlpack, "producer"_a);
}
#undef PyInit__core

// In a sub-interpreter pybind11 would wait for ever for a lock that this thread holds.
extern "C" PYBIND11_EXPORT PyObject* PyInit__core() {
  if (PyInterpreterState_Get() == PyInterpreterState_Main()) return initialize_core();
  PyErr_SetString(PyExc_ImportError, "softmaxlib runs in the main interpreter of a process only");
  return nullptr;
}
