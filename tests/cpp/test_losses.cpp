// Cross-entropy, its gradient and selected log-probabilities against extended precision, between
// pages that fault; the same bytes on every ISA; statuses.
#include "support.hpp"

namespace softmaxlib::test {
namespace {

softmaxlib_array array_of(const void* data, softmaxlib_dtype dtype, int32_t ndim,
                          const int64_t* shape) {
  return {const_cast<void*>(data), dtype, ndim, shape, nullptr};
}

struct Losses : testing::TestWithParam<softmaxlib_isa> {};

// How far a result may be from the exact one, in units of its last place or of `scale`'s.
void expect_near(Real got, Real want, Real scale, Real ulps, const Format& f, const char* what) {
  if (got == want) return;
  EXPECT_LE(std::abs(got - want), ulps * ulp_of(scale, f))
      << what << ": got " << static_cast<double>(got) << ", want " << static_cast<double>(want);
}

TEST_P(Losses, AgreeWithExtendedPrecision) {
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  constexpr int64_t kMost = 3000;
  Arena x_memory(kMost * 8), grad_memory(kMost * 8), loss_memory(8);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const Pattern pattern :
         {Pattern::kNormal, Pattern::kWide, Pattern::kTies, Pattern::kTwoValues, Pattern::kSpike,
          Pattern::kMasked, Pattern::kFarAbove, Pattern::kFarBelow, Pattern::kIntegers})
      for (const int64_t n : {1, 2, 17, 100, 3000})
        for (const bool is_stable : {false, true}) {
          const Format f = format_of(dtype);
          const auto x = encode_all(make_row(pattern, n, dtype, 5), dtype);
          const auto values = decode_all(x.data(), n, dtype);
          const auto top = std::max_element(values.begin(), values.end()) - values.begin();
          if (values[static_cast<size_t>(top)] == -kInf) continue;
          const auto log_p =
              exact_row(is_stable ? SOFTMAXLIB_LOG_STABLEMAX : SOFTMAXLIB_LOG_SOFTMAX, values);
          for (const int64_t target : {int64_t{top}, n / 2}) {
            const size_t bytes = x.size();
            char* const xp = x_memory.place(bytes, Against::kBack);
            char* const gp = grad_memory.place(bytes, Against::kBack);
            char* const lp = loss_memory.place(8, Against::kBack);
            memcpy(xp, x.data(), bytes);
            const auto xa = array_of(xp, dtype, 1, &n), ga = array_of(gp, dtype, 1, &n),
                       ta = array_of(&target, SOFTMAXLIB_I64, 0, nullptr),
                       la = array_of(lp, SOFTMAXLIB_F64, 0, nullptr);
            const auto activation = is_stable ? SOFTMAXLIB_STABLEMAX : SOFTMAXLIB_SOFTMAX;
            ASSERT_EQ(softmaxlib_cross_entropy(activation, &xa, &ta, &la, &ga, 0, nullptr, &o),
                      SOFTMAXLIB_OK);
            EXPECT_TRUE(x_memory.intact() && grad_memory.intact() && loss_memory.intact());
            EXPECT_EQ(memcmp(xp, x.data(), bytes), 0);
            const Real want = -log_p[static_cast<size_t>(target)];
            Real loss = 0;
            loss = decode(SOFTMAXLIB_F64, lp);
            expect_near(loss, want, want, dtype == SOFTMAXLIB_F64 ? 8 : 4,
                        format_of(arithmetic_of(dtype)), "loss");
            const auto grad = decode_all(gp, n, dtype);
            for (int64_t i = 0; i < n; ++i) {
              const auto j = static_cast<size_t>(i);
              const Real slope = is_stable ? 1 / (1 + std::abs(values[j])) : 1;
              const Real d = (i == target ? std::expm1(log_p[j]) : std::exp(log_p[j])) * slope;
              // A half is rounded once more than the float that it comes from.
              expect_near(grad[j], d, d, item_size_of(dtype) == 2 ? 0.51L : 8, f, "gradient");
            }
          }
        }
}

TEST_P(Losses, SmoothedOnesAgreeWithTheirProbabilities) {
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  const int64_t n = 1100;  // more than a chunk
  const auto x = encode_all(make_row(Pattern::kNormal, n, SOFTMAXLIB_F64, 2), SOFTMAXLIB_F64);
  std::vector<double> q(n, 0.25 / static_cast<double>(n)), grad(n), same(n);
  const int64_t target = 1050;
  q[target] += 0.75;
  double loss = 0, same_loss = 0;
  const auto xa = array_of(x.data(), SOFTMAXLIB_F64, 1, &n),
             ga = array_of(grad.data(), SOFTMAXLIB_F64, 1, &n),
             sa = array_of(same.data(), SOFTMAXLIB_F64, 1, &n),
             qa = array_of(q.data(), SOFTMAXLIB_F64, 1, &n),
             ta = array_of(&target, SOFTMAXLIB_I64, 0, nullptr),
             la = array_of(&loss, SOFTMAXLIB_F64, 0, nullptr),
             ma = array_of(&same_loss, SOFTMAXLIB_F64, 0, nullptr);
  softmaxlib_loss_options l = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  l.gradient_scale = 3;
  ASSERT_EQ(softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &xa, &qa, &la, &ga, -1, &l, &o),
            SOFTMAXLIB_OK);
  l.label_smoothing = 0.25;
  ASSERT_EQ(softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &xa, &ta, &ma, &sa, -1, &l, &o),
            SOFTMAXLIB_OK);
  EXPECT_NEAR(loss, same_loss, 1e-14 * loss);
  for (size_t i = 0; i < grad.size(); ++i)
    EXPECT_NEAR(grad[i], same[i], 1e-15 * std::abs(grad[i]) + 1e-17);
}

TEST_P(Losses, SelectTheBitsOfLogSoftmax) {
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  const int64_t n = 5000, k = 4;
  const int64_t indices[] = {0, 4999, 17, 17};
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    const auto item = static_cast<size_t>(item_size_of(dtype));
    const auto x = encode_all(make_row(Pattern::kMasked, n, dtype, 3), dtype);
    const auto all = row_result(SOFTMAXLIB_LOG_SOFTMAX, dtype, x, o);
    const auto sum = row_result(SOFTMAXLIB_LOGSUMEXP, dtype, x, o);
    std::vector<char> y(k * item), s(item);
    const auto xa = array_of(x.data(), dtype, 1, &n), ya = array_of(y.data(), dtype, 1, &k),
               ia = array_of(indices, SOFTMAXLIB_I64, 1, &k),
               sa = array_of(s.data(), dtype, 0, nullptr);
    ASSERT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, &sa, 0, &o), SOFTMAXLIB_OK);
    for (size_t i = 0; i < k; ++i)
      EXPECT_EQ(memcmp(&y[i * item], &all[static_cast<size_t>(indices[i]) * item], item), 0);
    EXPECT_EQ(s, sum);
  }
}

INSTANTIATE_TEST_SUITE_P(Isa, Losses, testing::ValuesIn(isas()),
                         [](const auto& isa) { return softmaxlib_isa_name(isa.param); });

// Strided, with options, threads and any ISA: the same bytes.
TEST(LossBits, DoNotDependOnHow) {
  const int64_t rows = 40, n = 4000, shape[] = {rows, n};
  const int64_t strides[] = {4, rows * 4};  // of columns
  std::vector<float> x(static_cast<size_t>(rows * n)), turned(x.size());
  const auto values = make_row(Pattern::kWide, rows * n, SOFTMAXLIB_F32, 4);
  std::vector<int64_t> target(static_cast<size_t>(rows));
  std::vector<double> weight(static_cast<size_t>(n));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<double>(i % 7) / 4;
  for (int64_t r = 0; r < rows; ++r) {
    target[static_cast<size_t>(r)] = r % 5 == 4 ? -100 : 97 * r;
    for (int64_t i = 0; i < n; ++i)
      turned[static_cast<size_t>(i * rows + r)] = x[static_cast<size_t>(r * n + i)] =
          static_cast<float>(values[static_cast<size_t>(r * n + i)]);
  }
  softmaxlib_pool* pool = nullptr;
  ASSERT_EQ(softmaxlib_pool_create(3, &pool), SOFTMAXLIB_OK);
  for (const softmaxlib_function activation : {SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_STABLEMAX})
    for (const double smoothing : {0.0, 0.1}) {
      std::vector<double> first_losses;
      std::vector<float> first;
      for (const softmaxlib_isa isa : isas())
        for (const bool turns : {false, true})
          for (const bool explicit_ones : {false, true})
            for (const softmaxlib_store store :
                 {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING}) {
              Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
              o.store = store;
              o.num_threads = turns ? 3 : 1;
              o.parallel_for = softmaxlib_pool_parallel_for;
              o.parallel_context = pool;
              const uint8_t one = 1;
              const auto wa = array_of(&one, SOFTMAXLIB_BOOL, 0, nullptr);
              if (explicit_ones) o.where = &wa;
              softmaxlib_loss_options l = SOFTMAXLIB_LOSS_OPTIONS_INIT;
              l.label_smoothing = smoothing;
              l.weight = weight.data();
              std::vector<double> losses(static_cast<size_t>(rows), -1);
              std::vector<float> grad(x.size(), -1), result(x.size());
              softmaxlib_array xa = array_of(turns ? turned.data() : x.data(), SOFTMAXLIB_F32, 2,
                                             shape),
                               ga = array_of(grad.data(), SOFTMAXLIB_F32, 2, shape);
              if (turns) xa.strides = ga.strides = strides;
              const auto ta = array_of(target.data(), SOFTMAXLIB_I64, 1, shape),
                         la = array_of(losses.data(), SOFTMAXLIB_F64, 1, shape);
              ASSERT_EQ(softmaxlib_cross_entropy(activation, &xa, &ta, &la, &ga, 1, &l, &o),
                        SOFTMAXLIB_OK);
              for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < n; ++i)
                  result[static_cast<size_t>(r * n + i)] =
                      grad[static_cast<size_t>(turns ? i * rows + r : r * n + i)];
              if (first.empty()) first = result, first_losses = losses;
              EXPECT_EQ(losses, first_losses) << softmaxlib_isa_name(isa);
              EXPECT_EQ(memcmp(result.data(), first.data(), first.size() * 4), 0)
                  << softmaxlib_isa_name(isa) << " turned " << turns << " where " << explicit_ones
                  << " store " << store << " smoothing " << smoothing;
            }
    }
  softmaxlib_pool_destroy(pool);
}

TEST(LossStatus, SaysWhatIsWrong) {
  const int64_t n = 3, shape[] = {2, 3};
  float x[6] = {1, 2, 3, 4, 5, 6}, grad[6];
  double losses[2] = {-1, -1}, weight[] = {1, 1, 1};
  int64_t target[] = {0, 2};
  const auto xa = array_of(x, SOFTMAXLIB_F32, 2, shape),
             ga = array_of(grad, SOFTMAXLIB_F32, 2, shape),
             ta = array_of(target, SOFTMAXLIB_I64, 1, shape),
             la = array_of(losses, SOFTMAXLIB_F64, 1, shape),
             wrong = array_of(losses, SOFTMAXLIB_F64, 1, &n);
  softmaxlib_loss_options l = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  Options o(SOFTMAXLIB_ISA_AUTO, SOFTMAXLIB_ALGORITHM_AUTO);
  const auto run = [&](const softmaxlib_array* t, const softmaxlib_array* loss, int32_t axis = 1) {
    return softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &xa, t, loss, &ga, axis, &l, &o);
  };
  EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_OK);
  EXPECT_EQ(run(nullptr, &la), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(run(&ta, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(run(&ta, &wrong), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(run(&la, &la), SOFTMAXLIB_ERROR_SHAPE);  // probabilities
  EXPECT_EQ(run(&ta, &ta), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(run(&ta, &la, 2), SOFTMAXLIB_ERROR_AXIS);
  EXPECT_EQ(softmaxlib_cross_entropy(SOFTMAXLIB_LOG_SOFTMAX, &xa, &ta, &la, nullptr, 1, &l, &o),
            SOFTMAXLIB_ERROR_FUNCTION);
  for (const int64_t bad : {int64_t{3}, int64_t{-1}, INT64_MIN, INT64_MAX}) {
    target[1] = bad;
    EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_ERROR_TARGET);
    l.ignore_index = bad;
    EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_OK);
    EXPECT_EQ(losses[1], 0);
    l.ignore_index = -100;
  }
  target[1] = 2;
  l.weight = weight;
  for (const double bad : {-1.0, kInf, kNaN, -5e-324}) {
    weight[2] = bad;
    EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_ERROR_LOSS);
  }
  weight[2] = -0.0;
  EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_OK);
  for (const double bad : {-0.1, 1.1, kNaN}) {
    l.label_smoothing = bad;
    EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_ERROR_LOSS);
  }
  l.label_smoothing = 0;
  l.gradient_scale = kInf;
  EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_ERROR_LOSS);
  l.gradient_scale = 1;
  l.struct_size = 3;
  EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_ERROR_STRUCT_SIZE);
  l.struct_size = sizeof(l);
  o.causal = 1;
  EXPECT_EQ(run(&ta, &la), SOFTMAXLIB_ERROR_CAUSAL);
  o.causal = 0;

  const auto in_x = array_of(x, SOFTMAXLIB_F64, 1, shape);
  EXPECT_EQ(run(&ta, &in_x), SOFTMAXLIB_ERROR_OVERLAP);
  const auto over = array_of(grad, SOFTMAXLIB_I64, 1, shape);
  memcpy(grad, target, sizeof(target));
  EXPECT_EQ(run(&over, &la), SOFTMAXLIB_ERROR_OVERLAP);
  const float p[7] = {0.5, 0.5, 0, 0, 1, 0, 0};
  memcpy(grad, p, sizeof(grad));
  EXPECT_EQ(run(&ga, &la), SOFTMAXLIB_OK);  // grad is the probabilities
  EXPECT_NEAR(grad[0], 0.0900306 - 0.5, 1e-6);

  const int64_t taken[] = {2, 2};
  int64_t indices[] = {0, 1, 2, 3};
  float y[4];
  const auto ia = array_of(indices, SOFTMAXLIB_I64, 2, taken),
             ya = array_of(y, SOFTMAXLIB_F32, 2, taken);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, nullptr, 1, &o), SOFTMAXLIB_ERROR_TARGET);
  indices[3] = -1;
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, nullptr, 1, &o), SOFTMAXLIB_ERROR_TARGET);
  indices[3] = 0;
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, nullptr, 1, &o), SOFTMAXLIB_OK);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &xa, nullptr, 1, &o), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, &la, 1, &o), SOFTMAXLIB_ERROR_DTYPE);
  const auto in_y = array_of(y + 1, SOFTMAXLIB_F32, 1, taken);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, &in_y, 1, &o), SOFTMAXLIB_ERROR_OVERLAP);
  const auto over_x = array_of(x + 2, SOFTMAXLIB_F32, 2, taken);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &over_x, nullptr, 1, &o),
            SOFTMAXLIB_ERROR_OVERLAP);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, nullptr, &ya, nullptr, 1, &o), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, nullptr, -3, &o), SOFTMAXLIB_ERROR_AXIS);
}

}  // namespace
}  // namespace softmaxlib::test
