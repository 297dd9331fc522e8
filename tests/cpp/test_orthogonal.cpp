// The orthogonal gradient through the C door: the formula in extended precision, the same bits on
// every ISA and in any order of tasks, not a byte beyond an array, and what is refused.
#include <cfenv>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

int64_t tasks_run = 0;
void reversed(void*, int64_t count, softmaxlib_task task, void* argument) {
  tasks_run += count;
  for (int64_t i = count; i-- > 0;) task(argument, i);
}

softmaxlib_array array_of(const void* data, softmaxlib_dtype dtype, const int64_t& n) {
  return {const_cast<void*>(data), dtype, 1, &n, nullptr};
}

softmaxlib_status project(const char* grad, const char* weights, char* out, softmaxlib_dtype dtype,
                          int64_t n, int32_t rescale, const softmaxlib_options* options) {
  const auto g = array_of(grad, dtype, n), w = array_of(weights, dtype, n),
             o = array_of(out, dtype, n);
  return softmaxlib_orthogonal_gradient(&g, &w, &o, rescale, options);
}

// Weights, and a gradient of which `along` times the weights is a part.
struct Vectors {
  softmaxlib_dtype dtype;
  int64_t n;
  std::vector<char> weights, grad;

  Vectors(softmaxlib_dtype d, int64_t count, double along) : dtype(d), n(count) {
    const auto w = make_row(Pattern::kNormal, n, d, 1);
    auto g = make_row(Pattern::kNormal, n, d, 2);
    for (size_t i = 0; i < g.size(); ++i) g[i] += along * w[i];
    weights = encode_all(w, d);
    grad = encode_all(g, d);
  }
  std::vector<char> projected(int32_t rescale, const softmaxlib_options* options) const {
    std::vector<char> out(grad.size(), 0x11);
    EXPECT_EQ(project(grad.data(), weights.data(), out.data(), dtype, n, rescale, options),
              SOFTMAXLIB_OK);
    return out;
  }
};

struct Orthogonal : testing::TestWithParam<softmaxlib_isa> {
  Options options{GetParam(), SOFTMAXLIB_ALGORITHM_AUTO};
};

TEST_P(Orthogonal, IsTheFormula) {
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const int64_t n : {2, 17, 100, 1025, 40000})
      for (const double along : {0.0, 1.0, -20.0})
        for (const int32_t rescale : {0, 1}) {
          const Vectors v(dtype, n, along);
          const auto w = decode_all(v.weights.data(), n, dtype),
                     g = decode_all(v.grad.data(), n, dtype);
          Real wg = 0, ww = 0, gg = 0, dd = 0;
          for (size_t i = 0; i < w.size(); ++i)
            wg += w[i] * g[i], ww += w[i] * w[i], gg += g[i] * g[i];
          std::vector<Real> d(w.size());
          for (size_t i = 0; i < d.size(); ++i) d[i] = g[i] - wg / ww * w[i], dd += d[i] * d[i];
          const Real s = rescale ? std::sqrt(gg / dd) : 1, length = std::sqrt(gg / ww);
          const auto out = v.projected(rescale, &options);
          const auto got = decode_all(out.data(), n, dtype);
          for (size_t i = 0; i < d.size(); ++i) {
            const Real scale = (std::fabs(g[i]) + std::fabs(w[i]) * length) * s;
            const Real bound = (dtype == SOFTMAXLIB_F64 ? 4 : 1) * ulp_of(scale, format_of(dtype));
            ASSERT_LE(std::fabs(got[i] - d[i] * s), bound)
                << kDtypeNames[dtype] << " n " << n << " along " << along << " element " << i;
          }
        }
}

TEST_P(Orthogonal, SameBitsHoweverItRuns) {
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const int64_t n : {1000, 70000, 400001})
      for (const double along : {0.5, 1e4}) {
        const Vectors v(dtype, n, dtype == SOFTMAXLIB_F16 ? along / 2 : along);
        const auto want = v.projected(1, nullptr);
        softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
        Options o = options;
        o.report = &report;
        for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING})
          for (const int32_t threads : {1, 3, 64}) {
            o.store = store;
            o.num_threads = threads;
            o.parallel_for = threads > 1 ? reversed : nullptr;
            tasks_run = 0;
            ASSERT_TRUE(same_bits(v.projected(1, &o), want, dtype)) << describe(o);
            ASSERT_EQ(report.isa, GetParam());
            ASSERT_EQ(report.kernel, std::string("orthogonal_gradient_") + kDtypeNames[dtype]);
            ASSERT_EQ(report.tasks > 1, threads > 1 && n >= 65536);
            ASSERT_EQ(tasks_run % report.tasks, 0);
            ASSERT_EQ(tasks_run > 0, report.tasks > 1);
          }
        // The caller's rounding is not ours.
        std::fesetround(FE_UPWARD);
        const auto upward = v.projected(1, &options);
        EXPECT_EQ(std::fegetround(), FE_UPWARD);
        std::fesetround(FE_TONEAREST);
        ASSERT_TRUE(same_bits(upward, want, dtype));
      }
}

TEST_P(Orthogonal, NotAByteBeyond) {
  Arena grads(1 << 15), weights(1 << 15), outs(1 << 15);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const int64_t n : {1, 7, 15, 16, 17, 33, 63, 64, 65, 127, 1025})
      for (const bool streaming : {false, true}) {
        const Vectors v(dtype, n, 0.5);
        const auto want = v.projected(1, nullptr);
        Options o = options;
        o.store = streaming ? SOFTMAXLIB_STORE_STREAMING : SOFTMAXLIB_STORE_PLAIN;
        for (size_t gap = 0; gap < 64; ++gap)
          for (const Against side : {Against::kFront, Against::kBack})
            for (const bool in_place : {false, true}) {
              char* const g = grads.place(v.grad.size(), side, gap);
              char* const w = weights.place(v.weights.size(), side, 3 * gap % 64);
              memcpy(g, v.grad.data(), v.grad.size());
              memcpy(w, v.weights.data(), v.weights.size());
              char* const out = in_place ? g : outs.place(v.grad.size(), side, 7 * gap % 64);
              ASSERT_EQ(project(g, w, out, dtype, n, 1, &o), SOFTMAXLIB_OK);
              ASSERT_FALSE(memcmp(out, want.data(), want.size())) << kDtypeNames[dtype] << " " << n;
              ASSERT_TRUE(in_place || !memcmp(g, v.grad.data(), v.grad.size()));
              ASSERT_FALSE(memcmp(w, v.weights.data(), v.weights.size()));
              ASSERT_TRUE(grads.intact() && weights.intact() && (in_place || outs.intact()));
            }
      }
}

TEST_P(Orthogonal, Strided) {
  constexpr int64_t kRows = 40, kColumns = 37;
  const int64_t shape[] = {kRows, kColumns};
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    const Vectors v(dtype, kRows * kColumns, 0.5);
    const auto want = v.projected(1, nullptr);
    const int64_t item = item_size_of(dtype);
    // Gradient by columns, weights backwards with gaps, the result with gaps.
    const int64_t g_strides[] = {item, kRows * item},
                  w_strides[] = {-2 * kColumns * item, -2 * item},
                  o_strides[] = {3 * kColumns * item, 3 * item};
    std::vector<char> g(v.grad.size()), w(2 * v.grad.size()), out(3 * v.grad.size(), 0x22);
    char* const w_first = w.data() + (2 * kRows * kColumns - 1) * item;
    for (int64_t r = 0; r < kRows; ++r)
      for (int64_t c = 0; c < kColumns; ++c) {
        const int64_t from = (r * kColumns + c) * item;
        memcpy(g.data() + r * g_strides[0] + c * g_strides[1], v.grad.data() + from,
               static_cast<size_t>(item));
        memcpy(w_first + r * w_strides[0] + c * w_strides[1], v.weights.data() + from,
               static_cast<size_t>(item));
      }
    const softmaxlib_array ga = {g.data(), dtype, 2, shape, g_strides},
                           wa = {w_first, dtype, 2, shape, w_strides},
                           oa = {out.data(), dtype, 2, shape, o_strides};
    ASSERT_EQ(softmaxlib_orthogonal_gradient(&ga, &wa, &oa, 1, &options), SOFTMAXLIB_OK);
    for (int64_t i = 0; i < kRows * kColumns; ++i) {
      ASSERT_FALSE(
          memcmp(out.data() + 3 * i * item, want.data() + i * item, static_cast<size_t>(item)));
      for (int64_t b = item; b < 3 * item; ++b)
        ASSERT_EQ(out[static_cast<size_t>(3 * i * item + b)], 0x22);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, Orthogonal, testing::ValuesIn(isas()),
                         [](const auto& tested) { return softmaxlib_isa_name(tested.param); });

TEST(OrthogonalErrors, AreStatuses) {
  float x[8] = {1, 2, 3, 4, 5, 6, 7, 8}, y[8];
  double wide[8] = {1, 1};
  const int64_t n = 4, other = 3, negative = -1, none = 0;
  const auto a = array_of(x, SOFTMAXLIB_F32, n), o = array_of(y, SOFTMAXLIB_F32, n);
  const auto call = [&](const softmaxlib_array& grad, const softmaxlib_array& weights,
                        const softmaxlib_array& out) {
    return softmaxlib_orthogonal_gradient(&grad, &weights, &out, 1, nullptr);
  };
  EXPECT_EQ(call(a, a, o), SOFTMAXLIB_OK);
  EXPECT_EQ(softmaxlib_orthogonal_gradient(nullptr, &a, &o, 1, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_orthogonal_gradient(&a, nullptr, &o, 1, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_orthogonal_gradient(&a, &a, nullptr, 1, nullptr), SOFTMAXLIB_ERROR_NULL);
  const auto nowhere = array_of(nullptr, SOFTMAXLIB_F32, n);
  EXPECT_EQ(call(nowhere, a, o), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(call(a, nowhere, o), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(call(a, a, nowhere), SOFTMAXLIB_ERROR_NULL);
  const auto integers = array_of(x, SOFTMAXLIB_I32, n), doubles = array_of(wide, SOFTMAXLIB_F64, n);
  EXPECT_EQ(call(integers, a, o), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(call(a, integers, o), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(call(a, a, integers), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(call(a, array_of(x, 99, n), o), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(call(doubles, a, o), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(call(a, doubles, o), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(call(a, a, doubles), SOFTMAXLIB_OK);
  for (const int64_t& bad : {other, negative}) {
    EXPECT_EQ(call(array_of(x, SOFTMAXLIB_F32, bad), a, o), SOFTMAXLIB_ERROR_SHAPE);
    EXPECT_EQ(call(a, array_of(x, SOFTMAXLIB_F32, bad), o), SOFTMAXLIB_ERROR_SHAPE);
    EXPECT_EQ(call(a, a, array_of(y, SOFTMAXLIB_F32, bad)), SOFTMAXLIB_ERROR_SHAPE);
  }
  EXPECT_EQ(call(a, a, array_of(x + 1, SOFTMAXLIB_F32, n)), SOFTMAXLIB_ERROR_OVERLAP);
  const auto empty = array_of(nullptr, SOFTMAXLIB_F32, none);
  EXPECT_EQ(call(empty, empty, empty), SOFTMAXLIB_OK);
  Options options;
  options.struct_size = 3;
  EXPECT_EQ(softmaxlib_orthogonal_gradient(&a, &a, &o, 1, &options), SOFTMAXLIB_ERROR_STRUCT_SIZE);
  options = Options();
  options.isa = 77;
  EXPECT_EQ(softmaxlib_orthogonal_gradient(&a, &a, &o, 1, &options), SOFTMAXLIB_ERROR_ISA);
}

}  // namespace
}  // namespace softmaxlib::test
