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
#include <string>
#include <type_traits>
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
  double label_smoothing;
  int64_t ignore_index;
  int32_t reduction;
  int32_t ndim;  // of x, without the axes of vmap

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

std::vector<int64_t> dims_of(const Buffer& buffer) {
  const auto dims = buffer.dimensions();
  return std::vector<int64_t>(dims.begin(), dims.end());
}

int64_t product(const std::vector<int64_t>& shape) {
  int64_t result = 1;
  for (const int64_t n : shape) result *= n;
  return result;
}

// The shape of x: along the axes its own, else that of the result, which has every axis of vmap.
std::vector<int64_t> whole_shape(const Buffer& x, const Buffer& result, Axes axes) {
  std::vector<int64_t> shape = dims_of(x);
  for (size_t d = 0; d < shape.size(); ++d)
    if (!contains(axes, shape.size(), d)) shape[d] = result.dimensions()[d];
  return shape;
}

// A buffer as an array of the whole shape, repeated where its length is 1, without the axes that it
// lost to a reduction.
class View {
 public:
  View(const Buffer& buffer, const std::vector<int64_t>& whole, Axes lost = {})
      : View(buffer, buffer.untyped_data(), dtype_of(buffer.element_type()),
             ffi::ByteWidth(buffer.element_type()), whole, lost) {}

  // Its elements are elsewhere, of another type.
  View(const Buffer& buffer, void* data, softmaxlib_dtype dtype, size_t item,
       const std::vector<int64_t>& whole, Axes lost)
      : given_(buffer.element_count() > 0) {
    const auto own = buffer.dimensions();
    if (own.size() == whole.size()) {
      int64_t stride = int64_t(item);
      for (size_t d = own.size(); d-- > 0; stride *= own[d]) {
        if (contains(lost, own.size(), d)) continue;
        shape_.insert(shape_.begin(), whole[d]);
        strides_.insert(strides_.begin(), own[d] == whole[d] ? stride : 0);
      }
    }
    array_ = {data, dtype, int32_t(shape_.size()), shape_.data(), strides_.data()};
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;

  const softmaxlib_array* get() const { return &array_; }

  // What is at this place, in C order, of its first axes.
  softmaxlib_array at(int64_t place, size_t axes) const {
    auto* data = static_cast<char*>(array_.data);
    for (size_t d = axes; d-- > 0; place /= shape_[d]) data += place % shape_[d] * strides_[d];
    return {data, array_.dtype, array_.ndim - int32_t(axes), array_.shape + axes,
            array_.strides + axes};
  }

  const softmaxlib_array* if_given() const { return given_ ? &array_ : nullptr; }

 private:
  bool given_;
  std::vector<int64_t> shape_, strides_;
  softmaxlib_array array_;
};

template <class From>
std::vector<int64_t> integers_of(const Buffer& buffer) {
  const From* first = static_cast<const From*>(buffer.untyped_data());
  std::vector<int64_t> result(first, first + buffer.element_count());
  if (std::is_same<From, uint64_t>::value)  // beyond any class, as it was
    std::replace_if(result.begin(), result.end(), [](int64_t i) { return i < 0; }, INT64_MAX);
  return result;
}

// What the library takes as 64 bits, and JAX may have as fewer.
std::vector<int64_t> integers(const Buffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::S8: return integers_of<int8_t>(buffer);
    case ffi::S16: return integers_of<int16_t>(buffer);
    case ffi::S32: return integers_of<int32_t>(buffer);
    case ffi::U8: return integers_of<uint8_t>(buffer);
    case ffi::U16: return integers_of<uint16_t>(buffer);
    case ffi::U32: return integers_of<uint32_t>(buffer);
    case ffi::U64: return integers_of<uint64_t>(buffer);
    default: return integers_of<int64_t>(buffer);
  }
}

// Converted by the library: in XLA's threads a subnormal number is 0.
std::vector<double> doubles(const Buffer& buffer) {
  const auto count = int64_t(buffer.element_count());
  std::vector<double> result(buffer.element_count());
  const double one = 1;
  const softmaxlib_array from = {buffer.untyped_data(), dtype_of(buffer.element_type()), 1, &count,
                                 nullptr};
  const softmaxlib_array to = {result.data(), SOFTMAXLIB_F64, 1, &count, nullptr};
  const softmaxlib_array factor = {const_cast<double*>(&one), SOFTMAXLIB_F64, 0, nullptr, nullptr};
  if (count > 0) softmaxlib_scale_rows(&from, &factor, &to, nullptr);
  return result;
}

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
  Options(const ffi::ThreadPool& pool, const Call& call)
      : softmaxlib_options(SOFTMAXLIB_OPTIONS_INIT),
        threads_{pool, int32_t(std::min<int64_t>(call.threads, pool.num_threads()))} {
    isa = call.isa;
    num_threads = threads_.count;
    parallel_for = Threads::parallel_for;
    parallel_context = &threads_;
    temperature = call.temperature;
  }
  Options(const ffi::ThreadPool& pool, const Call& call, const View& its_where,
          const View& its_temperatures)
      : Options(pool, call) {
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

ffi::Error wrong_class(const std::vector<int64_t>& classes, int64_t n, int64_t ignored) {
  for (size_t row = 0; row < classes.size(); ++row)
    if ((classes[row] < 0 || classes[row] >= n) && classes[row] != ignored)
      return ffi::Error::InvalidArgument("target of row " + std::to_string(row) + " is " +
                                         std::to_string(classes[row]) + "; it must be in [0, " +
                                         std::to_string(n) + ") or ignore_index");
  return error_of(SOFTMAXLIB_ERROR_TARGET);
}

ffi::Error cross_entropy(ffi::ThreadPool pool, const Call& call, const Buffer& x,
                         const Buffer& target, const Buffer& weight, const Buffer& where,
                         const Buffer& temperatures, Buffer losses, const Buffer* grad) {
  std::vector<int64_t> whole = dims_of(x);
  const size_t mapped = whole.size() - size_t(call.ndim);
  std::copy_n(losses.dimensions().begin(), mapped, whole.begin());
  const int32_t axis = call.axes[0];
  const int64_t n = whole[whole.size() + size_t(int64_t(axis))];
  const View x_view(x, whole), where_view(where, whole), temperature_view(temperatures, whole);
  const View grad_view(grad ? *grad : x, whole);

  const bool probabilities = dtype_of(target.element_type()) >= 0;
  auto classes = probabilities ? std::vector<int64_t>() : integers(target);
  const View labels(target, classes.data(), SOFTMAXLIB_I64, sizeof(int64_t), whole, call.axes);
  const View shares(target, whole);

  softmaxlib_loss_options loss_options = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  loss_options.label_smoothing = call.label_smoothing;
  loss_options.ignore_index = call.ignore_index;
  loss_options.reduction = call.reduction;
  const std::vector<double> weights = doubles(weight);
  if (!weights.empty() && int64_t(weights.size()) != n)
    return ffi::Error::InvalidArgument("weight is one for each class: vmap cannot map it");
  if (!weights.empty()) loss_options.weight = weights.data();

  // A reduction is of each element of vmap by itself; else these are so many more rows.
  const bool reduces = call.reduction != SOFTMAXLIB_REDUCTION_NONE;
  const size_t axes = reduces ? mapped : 0;
  std::vector<int64_t> rows(whole.begin() + int64_t(mapped), whole.end());
  rows.erase(rows.end() + axis);
  std::vector<double> terms(reduces ? size_t(product(rows)) : 0);
  const softmaxlib_array term_array = {terms.data(), SOFTMAXLIB_F64, int32_t(rows.size()),
                                       rows.data(), nullptr};
  const View losses_view(losses, reduces ? dims_of(losses) : whole, reduces ? Axes() : call.axes);

  Options options(pool, call);
  const int64_t elements = product({whole.begin(), whole.begin() + int64_t(axes)});
  for (int64_t place = 0; place < elements; ++place) {
    const auto x_part = x_view.at(place, axes), grad_part = grad_view.at(place, axes);
    const auto target_part = probabilities ? shares.at(place, axes) : labels.at(place, axes);
    const auto loss_part = losses_view.at(place, axes);
    softmaxlib_array where_part, temperature_part;
    if (where_view.if_given()) options.where = &(where_part = where_view.at(place, axes));
    if (temperature_view.if_given())
      options.temperatures = &(temperature_part = temperature_view.at(place, axes));
    loss_options.total = reduces ? &loss_part : nullptr;
    const softmaxlib_status status = softmaxlib_cross_entropy(
        call.function, &x_part, &target_part, reduces ? &term_array : &loss_part,
        grad ? &grad_part : nullptr, axis, &loss_options, &options);
    if (status == SOFTMAXLIB_ERROR_TARGET) return wrong_class(classes, n, call.ignore_index);
    if (status != SOFTMAXLIB_OK) return error_of(status);
  }
  return ffi::Error::Success();
}

ffi::Error losses_alone(ffi::ThreadPool pool, Call call, Buffer x, Buffer target, Buffer weight,
                        Buffer where, Buffer temperatures, Result losses) {
  return cross_entropy(pool, call, x, target, weight, where, temperatures, *losses, nullptr);
}

ffi::Error losses_and_gradient(ffi::ThreadPool pool, Call call, Buffer x, Buffer target,
                               Buffer weight, Buffer where, Buffer temperatures, Result losses,
                               Result grad) {
  return cross_entropy(pool, call, x, target, weight, where, temperatures, *losses, &*grad);
}

// The gradient of a loss times that of what follows it, in the memory of the first.
ffi::Error scale(ffi::ThreadPool pool, Call call, Buffer x, Buffer factors, Result out) {
  const auto whole = dims_of(*out);
  const View x_view(x, whole), factor_view(factors, whole), out_view(*out, whole);
  const Options options(pool, call);
  return error_of(softmaxlib_scale_rows(x_view.get(), factor_view.get(), out_view.get(), &options));
}

ffi::Error take(ffi::ThreadPool pool, Call call, Buffer x, Buffer indices, Buffer where,
                Buffer temperatures, Result out) {
  const auto whole = whole_shape(x, *out, call.axes);
  const auto taken = dims_of(*out);
  const int64_t n = whole[whole.size() + size_t(int64_t(call.axes[0]))];
  std::vector<int64_t> places = integers(indices);
  for (int64_t& place : places)
    if (place < 0) place += n;
  const View place_view(indices, places.data(), SOFTMAXLIB_I64, sizeof(int64_t), taken, {});
  const View x_view(x, whole), out_view(*out, taken);
  const View where_view(where, whole), temperature_view(temperatures, whole);
  const Options options(pool, call, where_view, temperature_view);
  return error_of(softmaxlib_take_log_softmax(x_view.get(), place_view.get(), out_view.get(),
                                              nullptr, call.axes[0], &options));
}

}  // namespace

XLA_FFI_REGISTER_STRUCT_ATTR_DECODING(
    Call, ffi::StructMember<int32_t>("function"), ffi::StructMember<Axes>("axes"),
    ffi::StructMember<double>("temperature"), ffi::StructMember<int32_t>("isa"),
    ffi::StructMember<int32_t>("threads"), ffi::StructMember<double>("label_smoothing"),
    ffi::StructMember<int64_t>("ignore_index"), ffi::StructMember<int32_t>("reduction"),
    ffi::StructMember<int32_t>("ndim"));

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

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmaxlib_jax_losses, losses_alone,
                              call()
                                  .Arg<Buffer>()  // x
                                  .Arg<Buffer>()  // target
                                  .Arg<Buffer>()  // weight
                                  .Arg<Buffer>()  // where
                                  .Arg<Buffer>()  // temperatures
                                  .Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmaxlib_jax_losses_and_gradient, losses_and_gradient,
                              call()
                                  .Arg<Buffer>()  // x
                                  .Arg<Buffer>()  // target
                                  .Arg<Buffer>()  // weight
                                  .Arg<Buffer>()  // where
                                  .Arg<Buffer>()  // temperatures
                                  .Ret<Buffer>()
                                  .Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmaxlib_jax_scale, scale,
                              call()
                                  .Arg<Buffer>()  // x
                                  .Arg<Buffer>()  // factors
                                  .Ret<Buffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(softmaxlib_jax_take, take,
                              call()
                                  .Arg<Buffer>()  // x
                                  .Arg<Buffer>()  // indices
                                  .Arg<Buffer>()  // where
                                  .Arg<Buffer>()  // temperatures
                                  .Ret<Buffer>());
