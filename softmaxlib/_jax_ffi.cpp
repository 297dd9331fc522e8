// softmaxlib as custom calls of XLA on CPUs; softmaxlib/jax.py compiles this when it is first used.
//
// vmap gives operands that it does not map an axis of length 1 (expand_dims): axes count from the
// end, and operands are broadcast here. An operand without elements stands for one not given.
#include <softmaxlib/softmaxlib.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Axes = ffi::Span<const int32_t>;
using Buffer = ffi::AnyBuffer;
using Result = ffi::Result<Buffer>;

// The class Call of _jax_calls.py.
struct Call {
  int32_t function;
  Axes axes;
  double temperature;
  int32_t isa;
  int32_t threads;

  Axes reduced() const { return function == SOFTMAXLIB_LOGSUMEXP ? axes : Axes(); }
};

softmaxlib_dtype dtype_of(ffi::DataType type) {
  switch (type) {
    case ffi::F32: return SOFTMAXLIB_F32;
    case ffi::F64: return SOFTMAXLIB_F64;
    case ffi::F16: return SOFTMAXLIB_F16;
    case ffi::BF16: return SOFTMAXLIB_BF16;
    case ffi::PRED: return SOFTMAXLIB_BOOL;
    default: return -1;  // refused by the library
  }
}

bool contains(Axes axes, size_t ndim, size_t d) {
  return std::any_of(axes.begin(), axes.end(),
                     [=](int32_t axis) { return int64_t(ndim) + axis == int64_t(d); });
}

// The shape of x: along the axes its own, else that of the result, which has every axis of vmap.
std::vector<int64_t> whole_shape(const Buffer& x, const Buffer& result, Axes axes) {
  const auto dims = x.dimensions();
  std::vector<int64_t> shape(dims.begin(), dims.end());
  for (size_t d = 0; d < shape.size(); ++d)
    if (!contains(axes, shape.size(), d)) shape[d] = result.dimensions()[d];
  return shape;
}

// A buffer as an array of the whole shape, repeated where its length is 1, without the axes that it
// lost to a reduction.
class View {
 public:
  View(const Buffer& buffer, const std::vector<int64_t>& whole, Axes lost = {})
      : given_(buffer.element_count() > 0) {
    const auto own = buffer.dimensions();
    if (own.size() == whole.size()) {
      int64_t stride = int64_t(ffi::ByteWidth(buffer.element_type()));
      for (size_t d = own.size(); d-- > 0; stride *= own[d]) {
        if (contains(lost, own.size(), d)) continue;
        shape_.insert(shape_.begin(), whole[d]);
        strides_.insert(strides_.begin(), own[d] == whole[d] ? stride : 0);
      }
    }
    array_ = {buffer.untyped_data(), dtype_of(buffer.element_type()), int32_t(shape_.size()),
              shape_.data(), strides_.data()};
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  const softmaxlib_array* get() const { return &array_; }
  const softmaxlib_array* if_given() const { return given_ ? &array_ : nullptr; }

 private:
  bool given_;
  std::vector<int64_t> shape_, strides_;
  softmaxlib_array array_;
};

// The tasks of one call, taken one by one by whoever is free.
class Tasks {
 public:
  Tasks(int64_t count, softmaxlib_task task, void* argument)
      : count_(count), task_(task), argument_(argument) {}

  void work() {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) {
      task_(argument_, i);
      const std::lock_guard<std::mutex> lock(mutex_);
      if (++done_ == count_) all_done_.notify_one();
    }
  }

  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    all_done_.wait(lock, [this] { return done_ == count_; });
  }

 private:
  const int64_t count_;
  const softmaxlib_task task_;
  void* const argument_;
  std::atomic<int64_t> next_{0};
  int64_t done_ = 0;
  std::mutex mutex_;
  std::condition_variable all_done_;
};

// XLA's pool takes tasks and never waits, and this call may itself be on one of its threads: the
// caller works too, and waits only for tasks that some thread has begun.
struct Threads {
  ffi::ThreadPool pool;
  int32_t count;

  static void parallel_for(void* context, int64_t count, softmaxlib_task task, void* argument) {
    auto& threads = *static_cast<Threads*>(context);
    const auto tasks = std::make_shared<Tasks>(count, task, argument);
    for (int64_t helpers = std::min<int64_t>(count, threads.count) - 1; helpers > 0; --helpers)
      threads.pool.Schedule([tasks] { tasks->work(); });
    tasks->work();
    tasks->wait();
  }
};

class Options : public softmaxlib_options {
 public:
  Options(const ffi::ThreadPool& pool, const Call& call, const View& its_where,
          const View& its_temperatures)
      : softmaxlib_options(SOFTMAXLIB_OPTIONS_INIT),
        threads_{pool, int32_t(std::min<int64_t>(call.threads, pool.num_threads()))} {
    isa = call.isa;
    num_threads = threads_.count;
    parallel_for = Threads::parallel_for;
    parallel_context = &threads_;
    temperature = call.temperature;
    temperatures = its_temperatures.if_given();
    where = its_where.if_given();
  }
  Options(const Options&) = delete;
  Options& operator=(const Options&) = delete;

 private:
  Threads threads_;
};

ffi::Error error_of(softmaxlib_status status) {
  if (status == SOFTMAXLIB_OK) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(softmaxlib_status_text(status));
}

ffi::Error forward(ffi::ThreadPool pool, Call call, Buffer x, Buffer where, Buffer temperatures,
                   Result y) {
  const auto whole = whole_shape(x, *y, call.axes);
  const View x_view(x, whole), y_view(*y, whole, call.reduced());
  const View where_view(where, whole), temperature_view(temperatures, whole);
  Options options(pool, call, where_view, temperature_view);

  const int32_t naxes = int32_t(call.axes.size());
  std::unique_ptr<void, void (*)(void*)> scratch(nullptr, std::free);
  softmaxlib_status status =
      softmaxlib_scratch_size(call.function, x_view.get(), y_view.get(), naxes, call.axes.begin(),
                              &options, &options.scratch_size);
  if (status == SOFTMAXLIB_OK && options.scratch_size > 0) {
    // XLA has a scratch allocator for GPUs only. aligned_alloc takes whole multiples of 64.
    options.scratch_size = (options.scratch_size + 63) / 64 * 64;
    scratch.reset(std::aligned_alloc(64, options.scratch_size));
    if (!scratch) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "no memory for scratch");
    options.scratch = scratch.get();
  }
  if (status == SOFTMAXLIB_OK)
    status = softmaxlib_run(call.function, x_view.get(), y_view.get(), naxes, call.axes.begin(),
                            &options);
  return error_of(status);
}

ffi::Error backward(ffi::ThreadPool pool, Call call, Buffer grad, Buffer x, Buffer y, Buffer where,
                    Buffer temperatures, Result out) {
  const auto whole = whole_shape(x, *out, call.axes);
  const View grad_view(grad, whole, call.reduced()), y_view(y, whole, call.reduced());
  const View x_view(x, whole), out_view(*out, whole);
  const View where_view(where, whole), temperature_view(temperatures, whole);
  const Options options(pool, call, where_view, temperature_view);
  return error_of(softmaxlib_backward(call.function, grad_view.get(), x_view.get(), y_view.get(),
                                      out_view.get(), int32_t(call.axes.size()), call.axes.begin(),
                                      &options));
}

}  // namespace

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(Call, ffi::StructMember<int32_t>("function"),
                                      ffi::StructMember<Axes>("axes"),
                                      ffi::StructMember<double>("temperature"),
                                      ffi::StructMember<int32_t>("isa"),
                                      ffi::StructMember<int32_t>("threads"));

namespace {
auto call() { return ffi::Ffi::Bind().Ctx<ffi::ThreadPool>().Attrs<Call>(); }
}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmaxlib_jax_forward, forward,
                              call()
                                  .Arg<Buffer>()  // x
                                  .Arg<Buffer>()  // where
                                  .Arg<Buffer>()  // temperatures
                                  .Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmaxlib_jax_backward, backward,
                              call()
                                  .Arg<Buffer>()  // grad
                                  .Arg<Buffer>()  // x
                                  .Arg<Buffer>()  // y
                                  .Arg<Buffer>()  // where
                                  .Arg<Buffer>()  // temperatures
                                  .Ret<Buffer>());
