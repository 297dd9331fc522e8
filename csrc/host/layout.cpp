#include "host/layout.hpp"

#include <string.h>

#include "bits.hpp"

namespace softmaxlib {
namespace {

constexpr int kMaxDims = SOFTMAXLIB_MAX_NDIM;
constexpr int64_t kMostElements = INT64_MAX / 64;  // their bytes, in any dtype, are an int64_t

// a * b for a, b >= 0; false where it leaves the 64-bit range.
bool multiply(int64_t a, int64_t b, int64_t* product) {
  if ((a | b) > INT32_MAX && b != 0 && a > INT64_MAX / b) return false;  // a division is slow
  *product = a * b;
  return true;
}

// An array with its strides filled in, and the memory it takes.
struct Extent {
  int ndim;
  const int64_t* shape;
  int64_t strides[kMaxDims];
  int64_t size;  // elements
  bool repeats;  // shows some of them more than once
  Range range;
};

// Adds (size - 1) stride to the range; false where that, or size stride, leaves the 64-bit range.
bool reach(int64_t size, int64_t stride, Range* range) {
  int64_t far = 0;
  if (size == 1) return true;
  if (stride == INT64_MIN) return false;
  const int64_t step = stride < 0 ? -stride : stride;
  if (!multiply(size, step, &far)) return false;
  far -= step;
  if (stride < 0) {
    if (range->low < INT64_MIN + far) return false;
    range->low -= far;
  } else {
    if (range->high > INT64_MAX - far) return false;
    range->high += far;
  }
  return true;
}

bool extent_of(const softmaxlib_array& array, Extent* extent) {
  if (array.ndim < 0 || array.ndim > kMaxDims || (array.ndim && !array.shape)) return false;
  extent->ndim = array.ndim;
  extent->shape = array.shape;
  int64_t elements = 1, bytes = item_size(array.dtype);
  bool empty = false;
  for (int d = 0; d < array.ndim; ++d) {
    if (array.shape[d] < 0) return false;
    empty |= array.shape[d] == 0;
  }
  for (int d = array.ndim - 1; d >= 0; --d) {
    extent->strides[d] = array.strides ? array.strides[d] : bytes;
    if (empty) continue;
    if (!multiply(elements, array.shape[d], &elements) || !multiply(bytes, array.shape[d], &bytes))
      return false;
  }
  extent->size = empty ? 0 : elements;
  extent->range = {0, empty ? 0 : item_size(array.dtype)};
  extent->repeats = false;
  for (int d = 0; !empty && d < array.ndim; ++d) {
    if (!reach(array.shape[d], extent->strides[d], &extent->range)) return false;
    extent->repeats |= array.shape[d] > 1 && extent->strides[d] == 0;
  }
  return true;
}

// Strides of an array along the dimensions of x, 0 so far; NumPy's rules of broadcasting.
bool broadcast(const Extent& extent, const Extent& x, Operand operand, Dim* dims) {
  if (extent.ndim > x.ndim) return false;
  const int offset = x.ndim - extent.ndim;
  for (int d = offset; d < x.ndim; ++d) {
    if (extent.shape[d - offset] == 1) continue;
    if (extent.shape[d - offset] != x.shape[d]) return false;
    dims[d].stride[operand] = extent.strides[d - offset];
  }
  return true;
}

// Whether so many scales are valid, each `stride` bytes from the one before.
template <class T>
bool are_valid_scales(const char* p, int64_t stride, int64_t count) {
  bool valid = true;
  for (int64_t i = 0; i < count; ++i, p += stride) {
    T t;
    memcpy(&t, p, sizeof(t));
    valid &= is_positive_finite(t);
  }
  return valid;
}

// Those of all rows, each read once.
bool valid_scales(const Job& job) {
  // Dimension 0 has one element; the last is checked in one loop.
  int64_t size[kMaxDims + 1] = {1}, stride[kMaxDims + 1] = {}, index[kMaxDims + 1] = {};
  int last = 0;
  for (int d = 0; d < job.outer_ndim; ++d) {
    if (job.outer[d].stride[kScale] == 0) continue;
    size[++last] = job.outer[d].size;
    stride[last] = job.outer[d].stride[kScale];
  }
  const auto are_valid =
      job.dtype[kScale] == SOFTMAXLIB_F64 ? are_valid_scales<double> : are_valid_scales<float>;
  const char* p = job.base[kScale];
  for (int d = 0; d >= 0;) {
    if (!are_valid(p, stride[last], size[last])) return false;
    for (d = last - 1; d >= 0; --d) {
      p += stride[d];
      if (++index[d] < size[d]) break;
      p -= size[d] * stride[d];
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

bool has_dtype(const Given& given) {
  const softmaxlib_dtype dtype = given.array->dtype;
  switch (given.dtypes) {
    case Dtypes::kAny: return is_dtype(dtype);
    case Dtypes::kFloats: return is_float(dtype);
    case Dtypes::kF64: return dtype == SOFTMAXLIB_F64;
    case Dtypes::kI64: return dtype == SOFTMAXLIB_I64;
    default: return true;  // the library's own
  }
}

// Whether two arrays are the same elements in the same order: dimensions of one element are none.
bool have_same_layout(const Extent& a, const Extent& b) {
  for (int i = 0, j = 0;; ++i, ++j) {
    while (i < a.ndim && a.shape[i] == 1) ++i;
    while (j < b.ndim && b.shape[j] == 1) ++j;
    if (i == a.ndim || j == b.ndim) return i == a.ndim && j == b.ndim;
    if (a.shape[i] != b.shape[j] || a.strides[i] != b.strides[j]) return false;
  }
}

// What lay_out works on.
struct Draft {
  Job* job;
  Extent x;
  bool reduced[kMaxDims];
  Dim dims[kMaxDims];  // of x

  void take(Operand operand, const softmaxlib_array& array) {
    job->base[operand] = static_cast<char*>(array.data);
    job->dtype[operand] = array.dtype;
    job->given |= 1u << operand;
  }

  // Of the shape of x, or of that without the axes.
  bool fits(Operand operand, const Extent& extent, bool per_row) {
    int next = 0;
    for (int d = 0; d < x.ndim; ++d) {
      if (per_row && reduced[d]) continue;
      if (next == extent.ndim || extent.shape[next] != x.shape[d]) return false;
      dims[d].stride[operand] = extent.strides[next++];
    }
    return next == extent.ndim;
  }

  // extent: filled in.
  bool add(const Given& given, Extent* extent) {
    if (!extent_of(*given.array, extent)) return false;
    const bool per_row = given.shape == Shape::kPerRow;
    if (given.shape == Shape::kBroadcast ? !broadcast(*extent, x, given.operand, dims)
                                         : !fits(given.operand, *extent, per_row))
      return false;
    take(given.operand, *given.array);
    job->per_row |= uint32_t{per_row} << given.operand;
    return true;
  }

  // An optional operand that broadcasts to x; `error` where it does not, or should be constant
  // along the axes and is not.
  softmaxlib_status add(Operand operand, const softmaxlib_array* array, bool right_dtype,
                        bool constant, softmaxlib_status error) {
    if (!array) return SOFTMAXLIB_OK;
    if (!right_dtype) return SOFTMAXLIB_ERROR_DTYPE;
    Extent extent;
    if (!extent_of(*array, &extent) || !broadcast(extent, x, operand, dims)) return error;
    for (int d = 0; constant && d < x.ndim; ++d)
      if (reduced[d] && x.shape[d] > 1 && dims[d].stride[operand] != 0) return error;
    take(operand, *array);
    return SOFTMAXLIB_OK;
  }
};

bool is(const softmaxlib_array* array, softmaxlib_dtype a, softmaxlib_dtype b) {
  return array && (array->dtype == a || array->dtype == b);
}

// What stands for rows in attention: where they end, and how far they are from a column.
softmaxlib_status add_queries(Axes axes, const softmaxlib_options& o, Draft* draft) {
  Job& job = *draft->job;
  job.causal = o.causal != 0;
  job.causal_offset = o.causal_offset;
  if (!job.causal && !o.alibi_slopes) return SOFTMAXLIB_OK;
  const int ndim = draft->x.ndim;
  const int32_t axis = o.query_axis < 0 ? o.query_axis + ndim : o.query_axis;
  if (axes.count != 1 || axis < 0 || axis >= ndim || draft->reduced[axis])
    return SOFTMAXLIB_ERROR_CAUSAL;
  draft->dims[axis].stride[kQuery] = 1;
  return SOFTMAXLIB_OK;
}

softmaxlib_status add_options(const softmaxlib_options& o, Draft* draft) {
  Job& job = *draft->job;
  if (const softmaxlib_status s = draft->add(kBias, o.bias, o.bias && is_float(o.bias->dtype),
                                             false, SOFTMAXLIB_ERROR_BIAS))
    return s;
  if (const softmaxlib_status s =
          draft->add(kWhere, o.where, is(o.where, SOFTMAXLIB_BOOL, SOFTMAXLIB_BOOL), false,
                     SOFTMAXLIB_ERROR_WHERE))
    return s;
  if (o.temperatures && o.scales) return SOFTMAXLIB_ERROR_SCALE;
  job.divides = o.temperatures;
  const softmaxlib_array* scales = o.temperatures ? o.temperatures : o.scales;
  if (const softmaxlib_status s =
          draft->add(kScale, scales, is(scales, SOFTMAXLIB_F32, SOFTMAXLIB_F64), true,
                     o.temperatures ? SOFTMAXLIB_ERROR_TEMPERATURE : SOFTMAXLIB_ERROR_SCALE))
    return s;
  job.temperature = o.temperatures ? 1 : o.temperature;
  job.scale = o.scales ? 1 : o.scale;
  if (!is_positive_finite(job.temperature)) return SOFTMAXLIB_ERROR_TEMPERATURE;
  if (!is_positive_finite(job.scale)) return SOFTMAXLIB_ERROR_SCALE;
  if (const softmaxlib_status s =
          draft->add(kSlope, o.alibi_slopes, is(o.alibi_slopes, SOFTMAXLIB_F32, SOFTMAXLIB_F64),
                     true, SOFTMAXLIB_ERROR_ALIBI))
    return s;
  return draft->add(kSink, o.sinks, o.sinks && is_float(o.sinks->dtype), true,
                    SOFTMAXLIB_ERROR_SINK);
}

}  // namespace

softmaxlib_status lay_out(softmaxlib_function function, Axes axes, GivenList list,
                          softmaxlib_dtype storage, const softmaxlib_options& options, Job* job) {
  const softmaxlib_array* const x_array = list.first->array;
  if (!x_array || (axes.count && !axes.axes)) return SOFTMAXLIB_ERROR_NULL;
  if (!is_function(function)) return SOFTMAXLIB_ERROR_FUNCTION;
  for (const Given& given : list)
    if (given.array && !has_dtype(given)) return SOFTMAXLIB_ERROR_DTYPE;

  Draft draft;
  draft.job = job;
  Extent& x = draft.x;
  if (!extent_of(*x_array, &x)) return SOFTMAXLIB_ERROR_SHAPE;

  memset(draft.reduced, 0, sizeof(draft.reduced));
  if (axes.count < 0 || axes.count > x.ndim) return SOFTMAXLIB_ERROR_AXIS;
  for (int i = 0; i < axes.count; ++i) {
    const int32_t named = axes.axes[i];
    const int32_t axis = named < 0 && named >= -x.ndim ? named + x.ndim : named;
    if (axis < 0 || axis >= x.ndim || draft.reduced[axis]) return SOFTMAXLIB_ERROR_AXIS;
    draft.reduced[axis] = true;
  }
  for (int d = 0; axes.count == 0 && d < x.ndim; ++d) draft.reduced[d] = true;

  memset(job->base, 0, sizeof(job->base));
  memset(job->dtype, 0, sizeof(job->dtype));
  job->given = job->per_row = 0;
  job->in_place = false;
  job->filter = nullptr;
  job->top = nullptr;
  job->loss = nullptr;
  job->function = function;
  job->dtype[kOut] = storage;
  for (int d = 0; d < x.ndim; ++d) {
    draft.dims[d] = Dim{x.shape[d], {}};
    draft.dims[d].stride[kX] = x.strides[d];
  }
  draft.take(kX, *x_array);
  Extent out = {};
  for (const Given& given : list) {
    Extent extent;
    if (given.array && given.operand != kX &&
        !draft.add(given, given.operand == kOut ? &out : &extent))
      return given.shape_error;
  }
  job->reduces = !job_has(*job, kOut) || (job->per_row >> kOut & 1);
  if (const softmaxlib_status s = add_queries(axes, options, &draft)) return s;
  if (const softmaxlib_status s = add_options(options, &draft)) return s;

  constexpr uint32_t kPerRowAlways = 1u << kScale | 1u << kSlope | 1u << kSink | 1u << kQuery;
  const uint32_t per_row = job->per_row | kPerRowAlways;
  bool no_rows = false;
  for (int d = 0; d < x.ndim; ++d) no_rows |= !draft.reduced[d] && x.shape[d] == 0;

  job->rows = job->n = 1;
  job->outer_ndim = job->inner_ndim = 0;
  job->same_layout = !job->reduces && job->dtype[kX] == job->dtype[kOut];
  for (int d = 0; d < x.ndim; ++d) {
    Dim& dim = draft.dims[d];
    // What is empty is not read, and its strides may be any: their products would overflow.
    for (int k = 0; x.size == 0 && k < kOperands; ++k)
      if (no_rows || !(per_row >> k & 1)) dim.stride[k] = 0;
    if (dim.size > 1) job->same_layout &= dim.stride[kX] == dim.stride[kOut];
    int64_t& count = draft.reduced[d] ? job->n : job->rows;
    if (!multiply(count, dim.size, &count) || count > kMostElements) return SOFTMAXLIB_ERROR_SHAPE;
    if (draft.reduced[d]) append(job->inner, &job->inner_ndim, dim);
    else append(job->outer, &job->outer_ndim, dim);
  }
  if (job->inner_ndim == 0) job->inner[job->inner_ndim++] = Dim{1, {}};

  const int64_t x_item = item_size(x_array->dtype), out_item = item_size(job->dtype[kOut]);
  job->range[kX] = x.range;
  job->range[kOut] = out.range;
  job->dense = x.size && out.size && !x.repeats && job->range[kX].span() == x.size * x_item &&
               job->range[kOut].span() == out.size * out_item;

  job->has_low = options.bias || options.alibi_slopes || job_has(*job, kScale) ||
                 !is_one(job->temperature) || !is_one(job->scale);
  job->elements_of_x = !job->has_low && !options.where;
  const Dim& row = job->inner[0];
  const auto steps = [&row](Operand k, int64_t step) {
    return row.size == 1 || row.stride[k] == step;
  };
  job->plain = job->elements_of_x && !job->causal && !options.sinks;
  const bool contiguous = job->inner_ndim == 1 && job->dtype[kX] == job->dtype[kOut] &&
                          steps(kX, x_item) && (job->reduces || steps(kOut, out_item));
  job->direct = contiguous && job->elements_of_x;
  job->linear =
      contiguous && !job->elements_of_x && (!options.where || steps(kWhere, 1)) &&
      (!options.bias || row.stride[kBias] == 0 || steps(kBias, item_size(job->dtype[kBias])));
  return SOFTMAXLIB_OK;
}

softmaxlib_status check_data(Job* job) {
  job->in_place = false;
  if (job->rows == 0) return SOFTMAXLIB_OK;
  const uint32_t needed = job->n ? job->given : job->per_row | (job->reduces ? 1u << kSink : 0);
  for (int k = 0; k < kOperands; ++k)
    if ((job->given & needed) >> k & 1 && !job->base[k]) return SOFTMAXLIB_ERROR_NULL;
  const char *x = job->base[kX], *out = job->base[kOut];
  const bool writes_out = job->given >> kOut & 1;
  job->in_place = writes_out && job->same_layout && x == out;
  // Two dense arrays whose ranges meet do share elements.
  if (writes_out && !job->in_place && job->dense &&
      x + job->range[kX].low < out + job->range[kOut].high &&
      out + job->range[kOut].low < x + job->range[kX].high)
    return SOFTMAXLIB_ERROR_OVERLAP;
  if (job->base[kScale] && !valid_scales(*job))
    return job->divides ? SOFTMAXLIB_ERROR_TEMPERATURE : SOFTMAXLIB_ERROR_SCALE;
  return SOFTMAXLIB_OK;
}

bool are_apart(GivenList list) {
  for (const Given& written : list)
    for (const Given& other : list) {
      const bool known = written.operand == kOut && other.operand == kX;
      if (written.access != Access::kWrites || &written == &other || known || !written.array ||
          !other.array)
        continue;
      if (overlap(*written.array, *other.array, other.access == Access::kReadsUnder)) return false;
    }
  return true;
}

bool overlap(const softmaxlib_array& a, const softmaxlib_array& b, bool unless_same) {
  Extent va, vb;
  if (!extent_of(a, &va) || !extent_of(b, &vb) || va.size == 0 || vb.size == 0) return false;
  const auto is_dense = [](const softmaxlib_array& array, const Extent& extent) {
    return !extent.repeats && extent.range.span() == extent.size * item_size(array.dtype);
  };
  const char *pa = static_cast<const char*>(a.data), *pb = static_cast<const char*>(b.data);
  if (!is_dense(a, va) || !is_dense(b, vb) || pa + va.range.low >= pb + vb.range.high ||
      pb + vb.range.low >= pa + va.range.high)
    return false;
  return !(unless_same && pa == pb && a.dtype == b.dtype && have_same_layout(va, vb));
}

}  // namespace softmaxlib
