// softmax and log_softmax as XLA custom calls on CPUs, through XLA's typed FFI.
#include <softmaxlib/softmaxlib.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <optional>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

std::optional<softmaxlib_dtype> dtype_of(const ffi::AnyBuffer& x) {
  switch (x.element_type()) {
    case ffi::F32: return SOFTMAXLIB_F32;
    case ffi::F64: return SOFTMAXLIB_F64;
    case ffi::F16: return SOFTMAXLIB_F16;
    case ffi::BF16: return SOFTMAXLIB_BF16;
    default: return std::nullopt;
  }
}

// The tasks of one call, taken one by one by whoever is free.
class Tasks {
 public:
  Tasks(int64_t count, softmaxlib_task task, void* argument)
      : count_(count), task_(task), argument_(argument) {}

  void work() {
    for (int64_t i; (i = next_.fetch_add(1)) < count_;) {
      task_(argument_, i);
      std::lock_guard<std::mutex> lock(mutex_);
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

// XLA's pool only takes tasks and never waits, and this call may itself be on one of its threads.
// So the caller works too, and waits for no task but those that some thread has begun; a helper
// that the pool starts too late finds nothing left, but still its share of Tasks.
void parallel_for(void* context, int64_t count, softmaxlib_task task, void* argument) {
  auto& pool = *static_cast<ffi::ThreadPool*>(context);
  const auto tasks = std::make_shared<Tasks>(count, task, argument);
  for (int64_t helpers = std::min(count, pool.num_threads()) - 1; helpers > 0; --helpers)
    pool.Schedule([tasks] { tasks->work(); });
  tasks->work();
  tasks->wait();
}

template <softmaxlib_function function>
ffi::Error run(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::Result<ffi::AnyBuffer> y,
               int32_t axis) {
  const auto dtype = dtype_of(x);
  if (!dtype || y->element_type() != x.element_type())
    return ffi::Error::InvalidArgument(
        "softmaxlib: x must be float32, float64, float16 or bfloat16, and the result as x");
  const auto array = [&dtype](const ffi::AnyBuffer& buffer) {
    const auto shape = buffer.dimensions();
    return softmaxlib_array{buffer.untyped_data(), *dtype, int32_t(shape.size()), shape.begin(),
                            nullptr};
  };
  const softmaxlib_array in = array(x), out = array(*y);

  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.num_threads = int32_t(pool.num_threads());
  options.parallel_for = parallel_for;
  options.parallel_context = &pool;
  std::unique_ptr<void, void (*)(void*)> scratch(nullptr, std::free);
  softmaxlib_status status =
      softmaxlib_scratch_size(function, &in, &out, 1, &axis, &options, &options.scratch_size);
  if (status == SOFTMAXLIB_OK && options.scratch_size > 0) {
    // XLA has a scratch allocator for GPUs only. aligned_alloc takes whole multiples of 64.
    options.scratch_size = (options.scratch_size + 63) / 64 * 64;
    scratch.reset(std::aligned_alloc(64, options.scratch_size));
    if (!scratch) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "softmaxlib: no memory");
    options.scratch = scratch.get();
  }
  if (status == SOFTMAXLIB_OK) status = softmaxlib_run(function, &in, &out, 1, &axis, &options);
  if (status == SOFTMAXLIB_OK) return ffi::Error::Success();
  return ffi::Error::InvalidArgument(softmaxlib_status_text(status));
}

const auto binding = [] {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<int32_t>("axis");
};

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_softmax, run<SOFTMAXLIB_SOFTMAX>, binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_log_softmax, run<SOFTMAXLIB_LOG_SOFTMAX>, binding());
