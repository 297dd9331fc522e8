// What statuses mean, as one sentence each.
#include "softmaxlib/softmaxlib.h"

extern "C" const char* softmaxlib_status_text(softmaxlib_status status) {
  switch (status) {
    case SOFTMAXLIB_OK: return "ok";
    case SOFTMAXLIB_ERROR_NULL: return "a required pointer is NULL";
    case SOFTMAXLIB_ERROR_STRUCT_SIZE: return "struct_size is none that this version knows";
    case SOFTMAXLIB_ERROR_FUNCTION: return "unknown function";
    case SOFTMAXLIB_ERROR_DTYPE: return "a dtype is unknown or not allowed for its argument";
    case SOFTMAXLIB_ERROR_SHAPE: return "the shapes of x and out are invalid or do not match";
    case SOFTMAXLIB_ERROR_AXIS: return "an axis is out of range or repeated";
    case SOFTMAXLIB_ERROR_TEMPERATURE:
      return "temperature must be positive and finite, broadcast against x, and not vary along the "
             "axis";
    case SOFTMAXLIB_ERROR_BIAS: return "bias does not broadcast against x";
    case SOFTMAXLIB_ERROR_WHERE: return "where does not broadcast against x";
    case SOFTMAXLIB_ERROR_ALGORITHM: return "unknown algorithm";
    case SOFTMAXLIB_ERROR_ISA: return "unknown ISA";
    case SOFTMAXLIB_ERROR_ISA_UNSUPPORTED: return "the ISA is not compiled in or this CPU lacks it";
    case SOFTMAXLIB_ERROR_STORE: return "unknown store kind";
    case SOFTMAXLIB_ERROR_THREADS: return "the number of threads is out of range";
    case SOFTMAXLIB_ERROR_SCRATCH: return "scratch is NULL, not 64-byte aligned, or too small";
    case SOFTMAXLIB_ERROR_OVERLAP:
      return "a result overlaps another array without being that array";
    case SOFTMAXLIB_ERROR_MEMORY: return "out of memory or threads";
    case SOFTMAXLIB_ERROR_SCALE:
      return "scale must be positive and finite, broadcast against x, not vary along the axis, and "
             "not be given per row beside temperatures";
    case SOFTMAXLIB_ERROR_CAUSAL:
      return "causal and alibi_slopes need one axis, and query_axis must be another one of x";
    case SOFTMAXLIB_ERROR_ALIBI:
      return "alibi_slopes must broadcast against x and not vary along the axis";
    case SOFTMAXLIB_ERROR_SINK: return "sinks must broadcast against x and not vary along the axis";
    case SOFTMAXLIB_ERROR_STATE:
      return "a state is of another version, function or dtype, or was never begun";
    case SOFTMAXLIB_ERROR_K: return "k or top_k is negative or exceeds the length of the axis";
    case SOFTMAXLIB_ERROR_SAMPLING: return "top_p must be in (0, 1], min_p in [0, 1]";
    case SOFTMAXLIB_ERROR_UNIFORMS:
      return "uniforms must be numbers in [0, 1), in the shape of x without the axis";
    case SOFTMAXLIB_ERROR_TARGET: return "a target or index is no element of the axis";
    case SOFTMAXLIB_ERROR_LOSS:
      return "label_smoothing must be in [0, 1], weights finite and not negative, gradient_scale "
             "finite";
    default: return "unknown status";
  }
}
