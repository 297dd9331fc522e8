// The C interface of streaming states.
#include "api/call.hpp"

static_assert(sizeof(softmaxlib_state) == 64, "the layout is part of the interface");

namespace softmaxlib {
namespace {

// Whether bytes, wherever they come from, are a state that arithmetic can take.
bool is_state(const softmaxlib_state& s) {
  return s.version == SOFTMAXLIB_STATE_VERSION && s.function < kFunctions &&
         (s.dtype == SOFTMAXLIB_F32 || s.dtype == SOFTMAXLIB_F64) && s.special <= 2 &&
         s.reference >= -100000 && s.reference <= 100000 && is_finite_not_negative(s.sum) &&
         is_finite(s.error) && (is_finite(s.largest) || is_negative_infinity(s.largest)) &&
         is_finite(s.largest_low) && is_finite(s.shift) && s.count >= 0 && s.count <= 2 &&
         s.reserved == 0;
}

bool are_states(const softmaxlib_state* states, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r)
    if (!is_state(states[r]) || states[r].function != states[0].function ||
        states[r].dtype != states[0].dtype)
      return false;
  return true;
}

// One state per row of x, in C order.
struct StateArray {
  int64_t shape[SOFTMAXLIB_MAX_NDIM], strides[SOFTMAXLIB_MAX_NDIM];
  softmaxlib_array array;

  softmaxlib_status set(const softmaxlib_array& x, const softmaxlib_state* states, int32_t naxes,
                        const int32_t* axes, softmaxlib_dtype dtype) {
    if (x.ndim < 0 || x.ndim > SOFTMAXLIB_MAX_NDIM || (x.ndim && !x.shape))
      return SOFTMAXLIB_ERROR_SHAPE;
    if (naxes < 0 || naxes > x.ndim) return SOFTMAXLIB_ERROR_AXIS;
    if (naxes && !axes) return SOFTMAXLIB_ERROR_NULL;
    for (int32_t i = 0; i < naxes; ++i)  // or there would seem to be more rows than states
      if (axes[i] < -x.ndim || axes[i] >= x.ndim) return SOFTMAXLIB_ERROR_AXIS;
    int32_t ndim = 0;
    for (int32_t d = 0; d < x.ndim; ++d) {
      bool named = naxes == 0;
      for (int32_t i = 0; i < naxes; ++i) named |= axes[i] == d || axes[i] == d - x.ndim;
      if (!named) shape[ndim++] = x.shape[d];
    }
    rows = 1;
    for (int32_t d = ndim - 1; d >= 0; --d) {
      if (shape[d] < 0 || rows > INT64_MAX / 64 / (shape[d] ? shape[d] : 1))
        return SOFTMAXLIB_ERROR_SHAPE;
      strides[d] = rows * static_cast<int64_t>(sizeof(softmaxlib_state));
      rows *= shape[d];
    }
    array = {const_cast<softmaxlib_state*>(states), dtype, ndim, shape, strides};
    return SOFTMAXLIB_OK;
  }
  int64_t rows;
};

// Adds x to states; or, where there is an out, computes it under them.
softmaxlib_status run_states(const softmaxlib_array* x, const softmaxlib_array* out,
                             const softmaxlib_state* states, int32_t naxes, const int32_t* axes,
                             const softmaxlib_options* options) {
  Call call(options);
  if (!call.is_good()) return call.status();
  if (!x) return SOFTMAXLIB_ERROR_NULL;
  StateArray of_rows;
  if (const softmaxlib_status status = of_rows.set(*x, states, naxes, axes, SOFTMAXLIB_F64))
    return status;
  if (of_rows.rows == 0) return SOFTMAXLIB_OK;
  if (!states) return SOFTMAXLIB_ERROR_NULL;
  if (!are_states(states, of_rows.rows)) return SOFTMAXLIB_ERROR_STATE;
  const softmaxlib_function function = states->function;
  const softmaxlib_dtype arithmetic = states->dtype;
  call.require(!out || !reduces(function), SOFTMAXLIB_ERROR_FUNCTION);
  call.require(!out || arithmetic_of(out->dtype) == arithmetic, SOFTMAXLIB_ERROR_STATE);
  if (out) call.options.change().sinks = nullptr;  // in the sum already

  // Halves are read as they are.
  const bool as_half = is_half(x->dtype) && arithmetic == SOFTMAXLIB_F32;
  const Given list[] = {x_of(x),
                        {kOut, out, Shape::kOfX, Dtypes::kFloats, Access::kWrites},
                        {kState, &of_rows.array, Shape::kPerRow, Dtypes::kStates, Access::kReads}};
  call.lay_out(function, {naxes, axes}, list, as_half ? x->dtype : arithmetic);
  call.check_data(list);
  if (!call.is_good()) return call.status();
  const Job& job = call.job;
  if (job.n == 0 && (out || !job_has(job, kSink))) return SOFTMAXLIB_OK;
  return call.run((out ? scale_of : update_of)(call.table(), function, job.dtype[kOut]),
                  share_rows(job, *call.options, true));
}

}  // namespace
}  // namespace softmaxlib

extern "C" {

softmaxlib_status softmaxlib_state_begin(softmaxlib_function function, softmaxlib_dtype dtype,
                                         int64_t rows, softmaxlib_state* states) {
  using namespace softmaxlib;
  if (!is_function(function)) return SOFTMAXLIB_ERROR_FUNCTION;
  if (dtype < SOFTMAXLIB_F32 || dtype > SOFTMAXLIB_BF16) return SOFTMAXLIB_ERROR_DTYPE;
  if (rows < 0) return SOFTMAXLIB_ERROR_SHAPE;
  if (rows && !states) return SOFTMAXLIB_ERROR_NULL;
  for (int64_t r = 0; r < rows; ++r) {
    states[r] = {};
    states[r].version = SOFTMAXLIB_STATE_VERSION;
    states[r].function = static_cast<uint8_t>(function);
    states[r].dtype = static_cast<uint8_t>(arithmetic_of(dtype));
    states[r].reference = kNoReference;
    states[r].largest = -INFINITY;
  }
  return SOFTMAXLIB_OK;
}

softmaxlib_status softmaxlib_state_update(const softmaxlib_array* x, softmaxlib_state* states,
                                          int32_t naxes, const int32_t* axes,
                                          const softmaxlib_options* options) {
  return softmaxlib::run_states(x, nullptr, states, naxes, axes, options);
}

softmaxlib_status softmaxlib_state_scale(const softmaxlib_array* x, const softmaxlib_array* out,
                                         const softmaxlib_state* states, int32_t naxes,
                                         const int32_t* axes, const softmaxlib_options* options) {
  if (!out) return SOFTMAXLIB_ERROR_NULL;
  return softmaxlib::run_states(x, out, states, naxes, axes, options);
}

softmaxlib_status softmaxlib_state_merge(int64_t rows, softmaxlib_state* into,
                                         const softmaxlib_state* from) {
  using namespace softmaxlib;
  if (rows < 0) return SOFTMAXLIB_ERROR_SHAPE;
  if (rows == 0) return SOFTMAXLIB_OK;
  if (!into || !from) return SOFTMAXLIB_ERROR_NULL;
  if (!are_states(into, rows) || !are_states(from, rows) || into->function != from->function ||
      into->dtype != from->dtype)
    return SOFTMAXLIB_ERROR_STATE;
  table_of(SOFTMAXLIB_ISA_AUTO)->states[into->function].merge[into->dtype](into, from, rows);
  return SOFTMAXLIB_OK;
}

softmaxlib_status softmaxlib_state_finish(int64_t rows, const softmaxlib_state* states,
                                          double* log_sums) {
  using namespace softmaxlib;
  if (rows < 0) return SOFTMAXLIB_ERROR_SHAPE;
  if (rows == 0) return SOFTMAXLIB_OK;
  if (!states || !log_sums) return SOFTMAXLIB_ERROR_NULL;
  if (!are_states(states, rows)) return SOFTMAXLIB_ERROR_STATE;
  table_of(SOFTMAXLIB_ISA_AUTO)
      ->states[states->function]
      .finish[states->dtype](states, log_sums, rows);
  return SOFTMAXLIB_OK;
}

}  // extern "C"
