// Every kernel of the registry over one row, and what `auto` picks over many.
#include <algorithm>
#include <set>

#include "bench.hpp"
#include "registry/table.hpp"

namespace softmaxlib::bench {
namespace {

// By the paper's tally, in arrays; a sum alone lacks the last pass: a read and a write.
constexpr int64_t kMoved[] = {0, 4, 5, 3, 4};

struct KernelId {
  softmaxlib_function function;
  softmaxlib_algorithm algorithm;
  softmaxlib_dtype dtype;
  const char* algorithm_name;
};

std::string name_of(const KernelId& kernel, softmaxlib_isa isa) {
  return std::string(kFunctionInfo[kernel.function].name) + "/" + kernel.algorithm_name + "/" +
         kDtypeInfo[kernel.dtype].name + "/" + softmaxlib_isa_name(isa);
}

// f(registered kernel, storage) for all of them.
template <class F>
void for_each_kernel(F f) {
  for (const Registered& r : kRegistry)
    for (softmaxlib_dtype dtype = 0; dtype < kStorages; ++dtype)
      if (has_storage(r, dtype)) f(r, dtype);
}

// Kernels of many rows at a time, which only `auto` picks.
std::set<std::string>& rows_kernels_left() {
  static std::set<std::string> left = [] {
    std::set<std::string> all;
    for_each_kernel([&](const Registered& r, softmaxlib_dtype dtype) {
      if (r.schedule >= kAlgorithms)
        all.insert(std::string(r.function_name) + "_" + r.schedule_name + "_" +
                   kDtypeInfo[dtype].name);
    });
    return all;
  }();
  return left;
}

// A call of the library and all that it points to.
class Call {
 public:
  Call(const KernelId& kernel, softmaxlib_isa isa, softmaxlib_store store, int32_t threads,
       std::vector<int64_t> shape, int32_t axis)
      : function_(kernel.function), axis_(axis), shape_(std::move(shape)), out_shape_(shape_) {
    if (softmaxlib::reduces(function_)) out_shape_.erase(out_shape_.begin() + axis);
    x_ = {x(), kernel.dtype, static_cast<int32_t>(shape_.size()), shape_.data(), nullptr};
    out_ = {y(), kernel.dtype, static_cast<int32_t>(out_shape_.size()), out_shape_.data(), nullptr};
    options_.algorithm = kernel.algorithm;
    options_.isa = isa;
    options_.store = store;
    options_.report = &report_;
    if (threads > 1) {
      options_.num_threads = threads;
      options_.parallel_for = softmaxlib_pool_parallel_for;
      options_.parallel_context = pool();
    }
    fill_x(kernel.dtype);
    softmaxlib_scratch_size(function_, &x_, &out_, 1, &axis_, &options_, &options_.scratch_size);
    scratch_ = Scratch(options_.scratch_size);
    options_.scratch = scratch_.data();
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  softmaxlib_status run() { return softmaxlib_run(function_, &x_, &out_, 1, &axis_, &options_); }
  const softmaxlib_report& report() const { return report_; }

 private:
  softmaxlib_function function_;
  int32_t axis_;
  std::vector<int64_t> shape_, out_shape_;
  softmaxlib_array x_, out_;
  softmaxlib_report report_ = SOFTMAXLIB_REPORT_INIT;
  softmaxlib_options options_ = SOFTMAXLIB_OPTIONS_INIT;
  Scratch scratch_;
};

void bench(benchmark::State& state, const Case& c, const Work& work, Call& call,
           const KernelId& kernel) {
  softmaxlib_status status = SOFTMAXLIB_OK;
  run(state, c, work, [&] { status = call.run(); });
  if (status) return state.SkipWithError(softmaxlib_status_text(status));
  const softmaxlib_report& report = call.report();
  if (kernel.algorithm != SOFTMAXLIB_ALGORITHM_AUTO && report.algorithm != kernel.algorithm)
    return state.SkipWithError("another algorithm ran");
  state.counters["tasks"] = report.tasks;
  state.SetLabel(report.kernel);
  rows_kernels_left().erase(report.kernel);
}

}  // namespace

void register_kernels() {
  for_each_kernel([](const Registered& r, softmaxlib_dtype dtype) {
    if (r.schedule >= kAlgorithms) return;
    const KernelId kernel = {r.function, r.algorithm, dtype, r.schedule_name};
    for (const softmaxlib_isa isa : isas())
      for (const softmaxlib_store store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING}) {
        const bool streaming = store == SOFTMAXLIB_STORE_STREAMING;
        const bool reduces = softmaxlib::reduces(kernel.function);
        if (streaming && (reduces || !has_streaming_stores(isa))) continue;
        const std::string name = name_of(kernel, isa) + (streaming ? "/streaming" : "/plain");
        const int64_t item = item_size(kernel.dtype);
        const int64_t moved = kMoved[kernel.algorithm] - (reduces ? 2 : 0);
        for (const Case& c : cases(item)) {
          const int64_t n = c.bytes / item;
          const Work work = {n, moved * c.bytes, (reduces ? 1 : 2) * c.bytes,
                             reduces ? Floor::kRead : Floor::kReadThenCopy};
          add(name + tail_of(c, n), c, [=](benchmark::State& state) {
            Call call(kernel, isa, store, c.threads, {n}, 0);
            bench(state, c, work, call, kernel);
          });
        }
      }
  });
}

void register_rows() {
  struct {
    const char* name;
    std::vector<int64_t> shape;
    int32_t axis;
  } const batches[] = {
      {"65536x8/axis:1", {65536, 8}, 1},        {"65536x64/axis:1", {65536, 64}, 1},
      {"8192x512/axis:1", {8192, 512}, 1},      {"512x32000/axis:1", {512, 32000}, 1},
      {"512x8x4096/axis:1", {512, 8, 4096}, 1}, {"4096x4096/axis:0", {4096, 4096}, 0}};
  for (softmaxlib_function function = 0; function < kFunctions; ++function)
    for (softmaxlib_dtype dtype = 0; dtype < kStorages; ++dtype)
      for (const softmaxlib_isa isa : isas())
        for (const auto& batch : batches)
          for (const int32_t threads : thread_counts()) {
            const KernelId kernel = {function, SOFTMAXLIB_ALGORITHM_AUTO, dtype, "auto"};
            const bool reduces = softmaxlib::reduces(function);
            int64_t n = 1;
            for (const int64_t size : batch.shape) n *= size;
            const Case c = {n * item_size(dtype), "rows", threads};
            const Work work = {n, 0, (reduces ? 1 : 2) * c.bytes,
                               reduces ? Floor::kRead : Floor::kCopy};
            const std::vector<int64_t> shape = batch.shape;
            const int32_t axis = batch.axis;
            add("rows/" + name_of(kernel, isa) + "/" + batch.name +
                    "/threads:" + std::to_string(threads),
                c, [=](benchmark::State& state) {
                  Call call(kernel, isa, SOFTMAXLIB_STORE_AUTO, threads, shape, axis);
                  bench(state, c, work, call, kernel);
                });
          }
}

std::vector<std::string> rows_kernels_that_never_ran() {
  return {rows_kernels_left().begin(), rows_kernels_left().end()};
}

}  // namespace softmaxlib::bench
