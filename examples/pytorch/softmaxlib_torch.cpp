// The operators softmaxlib::softmax and softmaxlib::log_softmax for PyTorch on CPUs, written
// against torch's stable ABI: one binary serves torch 2.10 and later.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 10) << 48))
#include <softmaxlib/softmaxlib.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

softmaxlib_dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return SOFTMAXLIB_F32;
    case ScalarType::Double: return SOFTMAXLIB_F64;
    case ScalarType::Half: return SOFTMAXLIB_F16;
    case ScalarType::BFloat16: return SOFTMAXLIB_BF16;
    default: STD_TORCH_CHECK(false, "softmaxlib: x must be float32, float64, float16 or bfloat16");
  }
}

// A tensor as softmaxlib sees it: torch counts strides in elements, softmaxlib in bytes.
struct View {
  View(const Tensor& x, void* data) : array{data, dtype_of(x), int32_t(x.dim()), nullptr, nullptr} {
    array.shape = x.sizes().data();
    for (int64_t stride : x.strides()) strides.push_back(stride * int64_t(x.element_size()));
    array.strides = strides.data();
  }
  View(const View&) = delete;

  std::vector<int64_t> strides;
  softmaxlib_array array;
};

void parallel_for(void*, int64_t count, softmaxlib_task task, void* argument) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) task(argument, i);
  });
}

void check(softmaxlib_status status) {
  STD_TORCH_CHECK(status == SOFTMAXLIB_OK, "softmaxlib: ", softmaxlib_status_text(status));
}

Tensor run(softmaxlib_function function, const Tensor& x, int64_t dim) {
  Tensor y = torch::stable::empty_like(x);
  const View in(x, const_cast<void*>(x.const_data_ptr())), out(y, y.mutable_data_ptr());
  const int32_t axes = x.dim() > 0;  // a scalar has none, but torch lets dim be 0 or -1
  STD_TORCH_CHECK(axes ? -x.dim() <= dim && dim < x.dim() : dim == 0 || dim == -1,
                  "softmaxlib: dim is ", dim, ", x has ", x.dim(), " dimensions");
  const auto axis = int32_t(dim);

  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.num_threads = int32_t(torch::stable::get_num_threads());
  options.parallel_for = parallel_for;
  check(softmaxlib_scratch_size(function, &in.array, &out.array, axes, &axis, &options,
                                &options.scratch_size));
  std::optional<Tensor> scratch;  // from torch's allocator, which aligns to 64 bytes
  if (options.scratch_size > 0) {
    scratch = torch::stable::empty({int64_t(options.scratch_size)}, ScalarType::Byte);
    options.scratch = scratch->mutable_data_ptr();
  }
  check(softmaxlib_run(function, &in.array, &out.array, axes, &axis, &options));
  return y;
}

Tensor softmax(const Tensor& x, int64_t dim) { return run(SOFTMAXLIB_SOFTMAX, x, dim); }
Tensor log_softmax(const Tensor& x, int64_t dim) { return run(SOFTMAXLIB_LOG_SOFTMAX, x, dim); }

}  // namespace

STABLE_TORCH_LIBRARY(softmaxlib, library) {
  library.def("softmax(Tensor x, int dim) -> Tensor");
  library.def("log_softmax(Tensor x, int dim) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(softmaxlib, CPU, library) {
  library.impl("softmax", TORCH_BOX(&softmax));
  library.impl("log_softmax", TORCH_BOX(&log_softmax));
}
