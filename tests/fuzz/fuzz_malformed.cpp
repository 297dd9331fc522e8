// Calls with something wrong in them: an error that is known, out as it was, and never a crash.
#include <limits>

#include "fuzz.hpp"

namespace softmaxlib::fuzz {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// A valid call over (3, 4) floats, with every option, that spoil() makes invalid.
struct Call {
  float x[12] = {}, y[12] = {}, bias_values[12] = {}, temperature_values[3] = {1, 2, 3};
  uint8_t where_values[12] = {};
  int64_t shape[SOFTMAXLIB_MAX_NDIM + 1] = {3, 4}, out_shape[SOFTMAXLIB_MAX_NDIM + 1] = {3, 4};
  int64_t temperature_shape[2] = {3, 1}, strides[2] = {16, 4};
  int32_t axes[2] = {1, 0}, naxes = 1;
  softmaxlib_function function = SOFTMAXLIB_SOFTMAX;
  softmaxlib_array in = {x, SOFTMAXLIB_F32, 2, shape, nullptr};
  softmaxlib_array out = {y, SOFTMAXLIB_F32, 2, out_shape, nullptr};
  softmaxlib_array bias = {bias_values, SOFTMAXLIB_F32, 2, shape, nullptr};
  softmaxlib_array where = {where_values, SOFTMAXLIB_BOOL, 2, shape, nullptr};
  softmaxlib_array temperatures = {temperature_values, SOFTMAXLIB_F32, 2, temperature_shape,
                                   nullptr};
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
  const softmaxlib_array *x_or_null = &in, *out_or_null = &out;
  const int32_t* axes_or_null = axes;
  std::string spoiled;

  Call() { options.report = &report; }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  softmaxlib_array& operand(Input& in_) {
    switch (in_.below(3)) {
      case 0: options.bias = &bias; return bias;
      case 1: options.where = &where; return where;
      default: options.temperatures = &temperatures; return temperatures;
    }
  }
};

// Any number but first, ... last.
int32_t outside(Input& in, int32_t first, int32_t last) {
  static constexpr int32_t kEdges[] = {INT32_MIN, INT32_MIN + 1, -1000, 1000, INT32_MAX};
  switch (in.below(4)) {
    case 0: return first - 1;
    case 1: return last + 1;
    case 2: return in.pick(kEdges);
    default: {
      const auto any = static_cast<int32_t>(static_cast<uint32_t>(in.bytes(4)));
      return any < first || any > last ? any : last + 1;
    }
  }
}
int64_t negative(Input& in) {
  static constexpr int64_t kEdges[] = {-1, -2, INT32_MIN, INT64_MIN + 1, INT64_MIN};
  return in.pick(kEdges);
}

// One mistake, by which alone the call is invalid.
void spoil(Input& in, Call& c) {
  const auto say = [&](const char* what) { c.spoiled = what; };
  switch (in.below(21)) {
    case 0:
      say("x NULL");
      c.x_or_null = nullptr;
      break;
    case 1:
      say("out NULL");
      c.out_or_null = nullptr;
      break;
    case 2:
      say("axes NULL");
      c.axes_or_null = nullptr;
      break;
    case 3:
      say("x.data NULL");
      c.in.data = nullptr;
      break;
    case 4:
      say("out.data NULL");
      c.out.data = nullptr;
      break;
    case 5:
      say("function");
      c.function = outside(in, 0, SOFTMAXLIB_LOG_STABLEMAX);
      break;
    case 6:
      say("x.dtype");
      c.in.dtype = outside(in, 0, SOFTMAXLIB_U64);
      break;
    case 7:
      say("out.dtype");
      c.out.dtype = outside(in, 0, SOFTMAXLIB_BF16);
      break;
    case 8:
      say("ndim");
      (in.one_in(2) ? c.in : c.out).ndim = outside(in, 0, SOFTMAXLIB_MAX_NDIM);
      break;
    case 9:
      say("ndim differs");
      (in.one_in(2) ? c.in : c.out).ndim = 3;
      break;
    case 10:
      say("shape NULL");
      (in.one_in(2) ? c.in : c.out).shape = nullptr;
      break;
    case 11:
      say("negative size");
      (in.one_in(2) ? c.shape : c.out_shape)[in.below(2)] = negative(in);
      break;
    case 12: {
      say("overflow");
      // Elements, bytes, or only their sum over dimensions.
      const int64_t large = int64_t{1} << (31 + in.below(32));
      c.shape[0] = c.out_shape[0] = large;
      c.shape[1] = c.out_shape[1] = INT64_MAX / large + in.below(3);
      break;
    }
    case 13:
      say("sizes differ");
      c.out_shape[in.below(2)] += 1 + in.below(1000);
      break;
    case 14:
      say("axis");
      c.axes[0] = outside(in, -2, 1);
      break;
    case 15:
      say("axis twice");
      c.naxes = 2, c.axes[1] = in.one_in(2) ? -1 : 1;
      break;
    case 16:
      say("naxes");
      c.naxes = outside(in, 0, 2);
      break;
    case 17:
      say("options");
      switch (in.below(6)) {
        case 0:
          c.options.struct_size = sizeof(c.options) * static_cast<size_t>(in.below(2)) + 1 +
                                  static_cast<size_t>(in.below(7));
          break;
        case 1: c.report.struct_size = sizeof(c.report) + 1 + in.bytes(4); break;
        case 2: c.options.algorithm = outside(in, 0, SOFTMAXLIB_TWO_PASS_RELOAD); break;
        case 3: c.options.isa = outside(in, 0, SOFTMAXLIB_ISA_AVX512); break;
        case 4: c.options.store = outside(in, 0, SOFTMAXLIB_STORE_STREAMING); break;
        default:
          c.options.num_threads = static_cast<int32_t>(std::max<int64_t>(negative(in), INT32_MIN));
          break;
      }
      break;
    case 18: {
      say("temperature");
      static constexpr double kBad[] = {
          0, -0.0, -1, kInf, -kInf, -5e-324, std::numeric_limits<double>::quiet_NaN()};
      const double bad = in.pick(kBad);
      if (in.one_in(2)) {
        c.options.temperatures = &c.temperatures;
        c.temperature_values[in.below(3)] = static_cast<float>(bad);
      } else {
        c.options.temperature = bad;
        c.options.temperatures = nullptr;
      }
      break;
    }
    case 19: {
      say("operand");
      softmaxlib_array& a = c.operand(in);
      switch (in.below(5)) {
        case 0: a.data = nullptr; break;
        case 1: a.dtype = outside(in, 0, SOFTMAXLIB_U64); break;
        case 2: a.ndim = outside(in, 0, SOFTMAXLIB_MAX_NDIM); break;
        case 3: a.shape = nullptr; break;
        default: a.shape = c.shape + 1, a.ndim = 2; break;  // (4, 0)
      }
      break;
    }
    default:
      say("overlap");
      c.out.data = c.x + 1 + in.below(2);
      c.in.data = c.x;
      c.shape[0] = c.out_shape[0] = 2;
      break;
  }
}

// What looks wrong and is not: nothing is read there.
void check_empty(Input& in) {
  static constexpr int64_t kSizes[] = {0, 1, 3, int64_t{1} << 31, int64_t{1} << 62, INT64_MAX};
  static constexpr int64_t kStrides[] = {0, 4, -4, INT64_MAX, INT64_MIN, int64_t{1} << 62};
  int64_t shape[4], strides[4];
  const auto ndim = static_cast<int32_t>(1 + in.below(4));
  for (int d = 0; d < ndim; ++d) shape[d] = in.pick(kSizes), strides[d] = in.pick(kStrides);
  shape[in.below(ndim)] = 0;
  const bool given = in.one_in(2);
  const softmaxlib_array a = {nullptr, SOFTMAXLIB_F32, ndim, shape, given ? strides : nullptr};
  int32_t axes[4], naxes = 0;
  for (int32_t d = 0; d < ndim; ++d)
    if (in.one_in(2)) axes[naxes++] = d;
  describe = [=] {
    std::string s = "an empty array, shape and strides:";
    for (int d = 0; d < ndim; ++d)
      s += " " + std::to_string(shape[d]) + ":" + (given ? std::to_string(strides[d]) : "");
    for (int32_t i = 0; i < naxes; ++i) s += (i ? ", " : "; axes ") + std::to_string(axes[i]);
    return s + "\n";
  };
  const auto function = static_cast<softmaxlib_function>(in.bytes(1) & 1 ? SOFTMAXLIB_LOG_STABLEMAX
                                                                         : SOFTMAXLIB_SOFTMAX);
  const softmaxlib_status status = softmaxlib_run(function, &a, &a, naxes, axes, nullptr);
  const bool huge = std::any_of(shape, shape + ndim, [](int64_t n) { return n > INT32_MAX; });
  require(status == SOFTMAXLIB_OK || (huge && status == SOFTMAXLIB_ERROR_SHAPE),
          softmaxlib_status_text(status));

  // Strides of single elements are never taken.
  float x = 1, y = 7;
  const int64_t ones[] = {1, 1, 1, 1};
  const softmaxlib_array one = {&x, SOFTMAXLIB_F32, ndim, ones, strides};
  const softmaxlib_array result = {&y, SOFTMAXLIB_F32, ndim, ones, strides};
  softmaxlib_options o = SOFTMAXLIB_OPTIONS_INIT;
  if (in.one_in(2)) o.temperatures = o.bias = &one;
  require(softmaxlib_run(SOFTMAXLIB_SOFTMAX, &one, &result, naxes, axes, &o) == SOFTMAXLIB_OK,
          "one element is refused");
  require(y == 1, "of one element, softmax is 1");
}

void check_malformed(Input& in) {
  Call c;
  for (float& y : c.y) y = -7;
  for (int64_t i = in.below(3); i > 0; --i) c.operand(in);
  spoil(in, c);
  describe = [&c] { return "a valid call of (3, 4) floats but for: " + c.spoiled + "\n"; };
  float kept[12];
  memcpy(kept, c.y, sizeof(kept));
  const softmaxlib_status status =
      softmaxlib_run(c.function, c.x_or_null, c.out_or_null, c.naxes, c.axes_or_null, &c.options);
  require(status != SOFTMAXLIB_OK, "accepted");
  require(known(status), "the status is unknown");
  require(!memcmp(kept, c.y, sizeof(kept)), "out was written to");
  size_t bytes = 1;
  require(softmaxlib_scratch_size(c.function, c.x_or_null, c.out_or_null, c.naxes, c.axes_or_null,
                                  &c.options, &bytes) == status,
          "softmaxlib_scratch_size says otherwise");
  require(bytes == 0, "scratch for a call that is refused");
}

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  if (in.one_in(4)) check_empty(in);
  else check_malformed(in);
  describe = nullptr;
  return 0;
}
