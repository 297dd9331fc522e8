#include "rows/layout.hpp"

#include <string.h>

#include "kernel_table.hpp"

namespace softmaxlib {
namespace {

constexpr int kMaxDims = SOFTMAXLIB_MAX_NDIM;

bool is_float(softmaxlib_dtype dtype) {
  return dtype >= SOFTMAXLIB_F32 && dtype <= SOFTMAXLIB_BF16;
}

// a * b for a, b >= 0; false where it leaves the 64-bit range.
bool multiply(int64_t a, int64_t b, int64_t* product) {
  if ((a | b) > INT32_MAX && b != 0 && a > INT64_MAX / b) return false;  // a division is slow
  *product = a * b;
  return true;
}

// A view with its strides filled in.
struct View {
  int ndim;
  const int64_t* shape;
  int64_t strides[kMaxDims];
  int64_t size;  // elements
};

bool make_view(const softmaxlib_array& array, View* view) {
  if (array.ndim < 0 || array.ndim > kMaxDims || (array.ndim && !array.shape)) return false;
  view->ndim = array.ndim;
  view->shape = array.shape;
  int64_t elements = 1, bytes = item_size(array.dtype);
  bool empty = false;
  for (int d = 0; d < array.ndim; ++d) {
    if (array.shape[d] < 0) return false;
    empty |= array.shape[d] == 0;
  }
  for (int d = array.ndim - 1; d >= 0; --d) {
    view->strides[d] = array.strides ? array.strides[d] : bytes;
    if (empty) continue;
    if (!multiply(elements, array.shape[d], &elements) || !multiply(bytes, array.shape[d], &bytes))
      return false;
  }
  view->size = empty ? 0 : elements;
  return true;
}

// The byte range of a view, relative to its data pointer.
struct Range {
  int64_t low, high;
  int64_t span() const { return high - low; }
};
Range range_of(const View& view, int64_t item) {
  Range r = {0, view.size ? item : 0};
  for (int d = 0; view.size && d < view.ndim; ++d) {
    const int64_t reach = (view.shape[d] - 1) * view.strides[d];
    (reach < 0 ? r.low : r.high) += reach;
  }
  return r;
}

// Strides of a view along the dimensions of x, 0 so far; NumPy's rules of broadcasting.
bool broadcast(const View& view, const View& x, Operand operand, Dim* dims) {
  if (view.ndim > x.ndim) return false;
  const int offset = x.ndim - view.ndim;
  for (int d = offset; d < x.ndim; ++d) {
    if (view.shape[d - offset] == 1) continue;
    if (view.shape[d - offset] != x.shape[d]) return false;
    dims[d].stride[operand] = view.strides[d - offset];
  }
  return true;
}

// Positive and finite, by its bits: the caller's mode may take a subnormal for 0.
bool valid_temperature(double t) {
  uint64_t bits;
  memcpy(&bits, &t, sizeof(bits));
  return bits > 0 && bits < 0x7ff0000000000000u;
}
bool valid_temperature(float t) {
  uint32_t bits;
  memcpy(&bits, &t, sizeof(bits));
  return bits > 0 && bits < 0x7f800000u;
}
template <class T>
bool valid_temperature_at(const char* p) {
  T t;
  memcpy(&t, p, sizeof(t));
  return valid_temperature(t);
}

bool valid_temperatures(const softmaxlib_array& array, const View& view) {
  int64_t index[kMaxDims] = {};
  const char* p = static_cast<const char*>(array.data);
  for (int64_t i = 0; i < view.size; ++i) {
    if (!(array.dtype == SOFTMAXLIB_F64 ? valid_temperature_at<double>(p)
                                        : valid_temperature_at<float>(p)))
      return false;
    for (int d = view.ndim - 1; d >= 0; --d) {
      if (++index[d] < view.shape[d]) {
        p += view.strides[d];
        break;
      }
      p -= (view.shape[d] - 1) * view.strides[d];
      index[d] = 0;
    }
  }
  return true;
}

// Appends a dimension, merged with the last one where every operand allows it.
void append(Dim* dims, int* ndim, const Dim& dim) {
  if (dim.size == 1) return;
  if (*ndim) {
    Dim& last = dims[*ndim - 1];
    bool merges = true;
    for (int k = 0; k < kOperands; ++k) merges &= last.stride[k] == dim.size * dim.stride[k];
    if (merges) {
      last.size *= dim.size;
      memcpy(last.stride, dim.stride, sizeof(dim.stride));
      return;
    }
  }
  dims[(*ndim)++] = dim;
}

// One optional operand: base, dtype and strides along x; `error` where it does not broadcast.
softmaxlib_status add_operand(const softmaxlib_array* array, const View& x, Operand operand,
                              softmaxlib_status error, Job* job, View* view, Dim* dims) {
  if (!array) return SOFTMAXLIB_OK;
  if (!make_view(*array, view) || !broadcast(*view, x, operand, dims)) return error;
  if (view->size && !array->data) return SOFTMAXLIB_ERROR_NULL;
  job->base[operand] = static_cast<char*>(array->data);
  job->dtype[operand] = array->dtype;
  return SOFTMAXLIB_OK;
}

}  // namespace

int64_t item_size(softmaxlib_dtype dtype) {
  switch (dtype) {
    case SOFTMAXLIB_BOOL:
    case SOFTMAXLIB_I8:
    case SOFTMAXLIB_U8: return 1;
    case SOFTMAXLIB_F16:
    case SOFTMAXLIB_BF16:
    case SOFTMAXLIB_I16:
    case SOFTMAXLIB_U16: return 2;
    case SOFTMAXLIB_F32:
    case SOFTMAXLIB_I32:
    case SOFTMAXLIB_U32: return 4;
    default: return 8;
  }
}

softmaxlib_status lay_out(softmaxlib_function function, const softmaxlib_array* x_array,
                          const softmaxlib_array* out_array, int32_t naxes, const int32_t* axes,
                          const softmaxlib_options& options, Job* job) {
  if (!x_array || !out_array || (naxes && !axes)) return SOFTMAXLIB_ERROR_NULL;
  if (function < 0 || function >= kFunctions) return SOFTMAXLIB_ERROR_FUNCTION;
  if (x_array->dtype < 0 || x_array->dtype > SOFTMAXLIB_U64 || !is_float(out_array->dtype))
    return SOFTMAXLIB_ERROR_DTYPE;

  View x, out;
  if (!make_view(*x_array, &x) || !make_view(*out_array, &out)) return SOFTMAXLIB_ERROR_SHAPE;
  if ((x.size && !x_array->data) || (out.size && !out_array->data)) return SOFTMAXLIB_ERROR_NULL;

  bool reduced[kMaxDims] = {};
  if (naxes < 0 || naxes > x.ndim) return SOFTMAXLIB_ERROR_AXIS;
  for (int i = 0; i < naxes; ++i) {
    const int axis = axes[i] < 0 ? axes[i] + x.ndim : axes[i];
    if (axis < 0 || axis >= x.ndim || reduced[axis]) return SOFTMAXLIB_ERROR_AXIS;
    reduced[axis] = true;
  }
  for (int d = 0; naxes == 0 && d < x.ndim; ++d) reduced[d] = true;

  Dim dims[kMaxDims];  // of x
  int next = 0;
  for (int d = 0; d < x.ndim; ++d) {
    dims[d] = Dim{x.shape[d], {}};
    dims[d].stride[kX] = x.strides[d];
    if (function == SOFTMAXLIB_LOGSUMEXP && reduced[d]) continue;
    if (next == out.ndim || out.shape[next] != x.shape[d]) return SOFTMAXLIB_ERROR_SHAPE;
    dims[d].stride[kOut] = out.strides[next++];
  }
  if (next != out.ndim) return SOFTMAXLIB_ERROR_SHAPE;

  memset(job->base, 0, sizeof(job->base));
  memset(job->dtype, 0, sizeof(job->dtype));
  job->base[kX] = static_cast<char*>(x_array->data);
  job->base[kOut] = static_cast<char*>(out_array->data);
  job->dtype[kX] = x_array->dtype;
  job->dtype[kOut] = out_array->dtype;

  View view;
  if (options.bias && !is_float(options.bias->dtype)) return SOFTMAXLIB_ERROR_DTYPE;
  if (const softmaxlib_status status =
          add_operand(options.bias, x, kBias, SOFTMAXLIB_ERROR_BIAS, job, &view, dims))
    return status;
  if (options.where && options.where->dtype != SOFTMAXLIB_BOOL) return SOFTMAXLIB_ERROR_DTYPE;
  if (const softmaxlib_status status =
          add_operand(options.where, x, kWhere, SOFTMAXLIB_ERROR_WHERE, job, &view, dims))
    return status;
  job->temperature = options.temperature;
  if (const softmaxlib_array* t = options.temperatures) {
    if (t->dtype != SOFTMAXLIB_F32 && t->dtype != SOFTMAXLIB_F64) return SOFTMAXLIB_ERROR_DTYPE;
    if (const softmaxlib_status status =
            add_operand(t, x, kTemperature, SOFTMAXLIB_ERROR_TEMPERATURE, job, &view, dims))
      return status;
    for (int d = 0; d < x.ndim; ++d)
      if (reduced[d] && x.shape[d] > 1 && dims[d].stride[kTemperature] != 0)
        return SOFTMAXLIB_ERROR_TEMPERATURE;
    if (!valid_temperatures(*t, view)) return SOFTMAXLIB_ERROR_TEMPERATURE;
    job->temperature = 1;
  } else if (!valid_temperature(options.temperature)) {
    return SOFTMAXLIB_ERROR_TEMPERATURE;
  }

  job->function = function;
  job->rows = job->n = 1;
  job->outer_ndim = job->inner_ndim = 0;
  job->in_place = function != SOFTMAXLIB_LOGSUMEXP && job->base[kX] == job->base[kOut] &&
                  job->dtype[kX] == job->dtype[kOut];
  for (int d = 0; d < x.ndim; ++d) {
    Dim dim = dims[d];
    if (x.size ==
        0) {  // nothing is read: sizes and strides may be any, and their products overflow
      dim = Dim{reduced[d] || out.size == 0 ? 0 : dim.size, {}};
      if (out.size) dim.stride[kOut] = dims[d].stride[kOut];
    }
    if (dim.size > 1) job->in_place &= dim.stride[kX] == dim.stride[kOut];
    (reduced[d] ? job->n : job->rows) *= dim.size;
    if (reduced[d]) append(job->inner, &job->inner_ndim, dim);
    else append(job->outer, &job->outer_ndim, dim);
  }
  if (job->inner_ndim == 0) job->inner[job->inner_ndim++] = Dim{1, {}};

  // Two dense arrays whose ranges meet do share elements.
  const int64_t x_item = item_size(x_array->dtype), out_item = item_size(out_array->dtype);
  const Range xr = range_of(x, x_item), outr = range_of(out, out_item);
  if (!job->in_place && x.size && out.size && xr.span() == x.size * x_item &&
      outr.span() == out.size * out_item && job->base[kX] + xr.low < job->base[kOut] + outr.high &&
      job->base[kOut] + outr.low < job->base[kX] + xr.high)
    return SOFTMAXLIB_ERROR_OVERLAP;

  const Dim& row = job->inner[0];
  job->direct =
      job->inner_ndim == 1 && job->dtype[kX] == job->dtype[kOut] &&
      (row.size == 1 || row.stride[kX] == x_item) &&
      (row.size == 1 || function == SOFTMAXLIB_LOGSUMEXP || row.stride[kOut] == out_item) &&
      !options.bias && !options.where && !options.temperatures && options.temperature == 1;
  return SOFTMAXLIB_OK;
}

}  // namespace softmaxlib
