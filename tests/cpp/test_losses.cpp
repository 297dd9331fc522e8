// Cross-entropy, its gradient and selected log-probabilities against extended precision, between
// pages that fault; reductions; gradients scaled afterwards; the same bytes on every ISA and in
// every floating-point mode of the caller; statuses.
#include <xmmintrin.h>

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
              const Real of_p = i == target ? std::expm1(log_p[j]) : std::exp(log_p[j]);
              const Real d = values[j] > -kInf ? of_p * slope : 0;  // a class that cannot be: 0
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
  // Arrays of no elements share none, wherever they are said to be.
  const int64_t none[] = {2, 0}, steps[] = {4, 4};
  float sums[2];
  auto no_indices = array_of(x, SOFTMAXLIB_I64, 2, none),
       no_y = array_of(x, SOFTMAXLIB_F32, 2, none);
  no_indices.strides = no_y.strides = steps;
  const auto sa = array_of(sums, SOFTMAXLIB_F32, 1, taken);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &no_indices, &no_y, &sa, 1, &o), SOFTMAXLIB_OK);
  EXPECT_NEAR(sums[0], 3.4076059, 1e-6);  // log(e + e^2 + e^3)
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, nullptr, &ya, nullptr, 1, &o), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_take_log_softmax(&xa, &ia, &ya, nullptr, -3, &o), SOFTMAXLIB_ERROR_AXIS);
}

// ---- Reductions

// (rows, n) logits with a label each, and everything a reduction writes.
struct Reduction {
  int64_t rows, n, shape[2];
  std::vector<double> x, losses, grad, weight;
  std::vector<int64_t> target;
  softmaxlib_loss_options loss = SOFTMAXLIB_LOSS_OPTIONS_INIT;
  Options o;
  double total[1] = {-7};  // of any dtype
  softmaxlib_dtype total_type = SOFTMAXLIB_F64;

  Reduction(int64_t rows_, int64_t n_, uint32_t seed)
      : rows(rows_),
        n(n_),
        shape{rows_, n_},
        x(make_row(Pattern::kNormal, rows_ * n_, SOFTMAXLIB_F64, seed)),
        losses(static_cast<size_t>(rows_), -7),
        grad(x.size(), -7),
        target(losses.size()) {
    for (int64_t r = 0; r < rows; ++r) target[static_cast<size_t>(r)] = r * 7 % n;
  }
  softmaxlib_status run(softmaxlib_reduction reduction) {
    const auto xa = array_of(x.data(), SOFTMAXLIB_F64, 2, shape),
               ta = array_of(target.data(), SOFTMAXLIB_I64, 1, shape),
               la = array_of(losses.data(), SOFTMAXLIB_F64, 1, shape),
               ga = array_of(grad.data(), SOFTMAXLIB_F64, 2, shape),
               sum = array_of(total, total_type, 0, nullptr);
    loss.reduction = reduction;
    loss.total = &sum;
    loss.weight = weight.empty() ? nullptr : weight.data();
    return softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &xa, &ta, &la, &ga, 1, &loss, &o);
  }
  Real result() const { return decode(total_type, reinterpret_cast<const char*>(total)); }
};

TEST(LossReduction, TotalsInEveryDtype) {
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    Reduction r(9, 5, 3);
    r.target[4] = -100;
    r.weight = {1, 0.5, 2, 0, 3};
    ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_NONE), SOFTMAXLIB_OK);
    EXPECT_EQ(r.total[0], -7);
    const auto losses = r.losses, grad = r.grad;
    r.total_type = dtype;
    ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_SUM), SOFTMAXLIB_OK);
    EXPECT_EQ(r.losses, losses);
    EXPECT_EQ(r.grad, grad);
    const Format f = format_of(dtype);
    Real sum = 0, weights = 0;
    for (const double loss : losses) sum += loss;
    EXPECT_EQ(r.result(), round_to(static_cast<double>(sum), f)) << kDtypeNames[dtype];
    // The rest of the memory is as it was.
    const double untouched = -7;
    EXPECT_EQ(memcmp(reinterpret_cast<char*>(r.total) + f.item,
                     reinterpret_cast<const char*>(&untouched) + f.item,
                     sizeof(double) - static_cast<size_t>(f.item)),
              0);

    ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
    for (const int64_t t : r.target)
      if (t >= 0) weights += r.weight[static_cast<size_t>(t)];
    EXPECT_NEAR(static_cast<double>(r.result() / (sum / weights)), 1,
                std::ldexp(1.1, -f.digits) + 0x1p-50);
    for (size_t i = 0; i < grad.size(); ++i)
      EXPECT_NEAR(r.grad[i] * static_cast<double>(weights), grad[i], 1e-15);
    EXPECT_EQ(r.losses[4], 0);
  }
}

TEST(LossReduction, OfNothingIsNaN) {
  Reduction r(3, 4, 1);
  for (int64_t& t : r.target) t = -100;
  ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
  EXPECT_TRUE(std::isnan(r.total[0]));
  EXPECT_EQ(r.grad, std::vector<double>(r.grad.size(), 0));
  ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_SUM), SOFTMAXLIB_OK);
  EXPECT_EQ(r.total[0], 0);
  // Labels of weight 0 do not count either.
  r.target = {0, 1, 0};
  r.weight = {0, 0, 1, 1};
  ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
  EXPECT_TRUE(std::isnan(r.total[0]));
  for (const double g : r.grad) EXPECT_TRUE(std::isnan(g));
  // No rows.
  for (const auto reduction : {SOFTMAXLIB_REDUCTION_SUM, SOFTMAXLIB_REDUCTION_MEAN}) {
    Reduction none(0, 4, 1);
    ASSERT_EQ(none.run(static_cast<softmaxlib_reduction>(reduction)), SOFTMAXLIB_OK);
    if (reduction == SOFTMAXLIB_REDUCTION_SUM) EXPECT_EQ(none.total[0], 0);
    else EXPECT_TRUE(std::isnan(none.total[0]));
  }
}

// The unit of the labels' weights cancels, wherever in the range they are; other classes' weights
// may carry the mean beyond it.
TEST(LossReduction, WeightsOfAnySize) {
  Reduction plain(3, 3, 2);
  plain.weight = {1, 1, 1};
  ASSERT_EQ(plain.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
  for (const double size : {1e-300, 1e-200, 1e120, 1e300, 5e-324}) {
    Reduction r(3, 3, 2);
    r.weight = {size, size, size};
    ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
    EXPECT_NEAR(r.total[0], plain.total[0], 4e-16 * plain.total[0]) << size;
    for (size_t i = 0; i < r.grad.size(); ++i)
      EXPECT_NEAR(r.grad[i], plain.grad[i], 1e-15 * std::abs(plain.grad[i])) << size;
  }
  Reduction r(1, 3, 2);
  r.weight = {1e-200, 1e120, 1};
  r.loss.label_smoothing = 0.1;
  ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
  EXPECT_EQ(r.total[0], kInf);
  r.target[0] = 1;  // a label of the largest weight
  ASSERT_EQ(r.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
  EXPECT_TRUE(std::isfinite(r.total[0]) && r.total[0] > 0);
  // A sum beyond the range, and its mean within.
  Reduction large(4, 3, 2);
  large.weight = {1.5e308, 1.5e308, 1.5e308};
  ASSERT_EQ(large.run(SOFTMAXLIB_REDUCTION_SUM), SOFTMAXLIB_OK);
  EXPECT_EQ(large.total[0], kInf);
  ASSERT_EQ(large.run(SOFTMAXLIB_REDUCTION_MEAN), SOFTMAXLIB_OK);
  EXPECT_TRUE(std::isfinite(large.total[0]) && large.total[0] > 0);
}

void backwards(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = count; i-- > 0;) task(argument, i);
}

// Losses in memory of any order, shared out among any number of threads, on any ISA.
TEST(LossReduction, SameBitsHoweverItIsDone) {
  constexpr int64_t kRows = 300, kColumns = 70;
  for (const auto reduction : {SOFTMAXLIB_REDUCTION_SUM, SOFTMAXLIB_REDUCTION_MEAN}) {
    std::vector<double> first;
    for (const softmaxlib_isa isa : isas())
      for (const int32_t threads : {1, 3, 8})
        for (const int64_t stride : {8, 24, -8}) {
          Reduction r(kRows, kColumns, 4);
          r.weight.assign(kColumns, 0);
          for (size_t i = 0; i < r.weight.size(); ++i) r.weight[i] = static_cast<double>(i % 5);
          r.loss.label_smoothing = 0.1;
          r.o.isa = isa;
          r.o.num_threads = threads;
          r.o.parallel_for = backwards;
          std::vector<double> memory(3 * kRows, -7);
          softmaxlib_array la = array_of(memory.data(), SOFTMAXLIB_F64, 1, r.shape);
          la.strides = &stride;
          if (stride < 0) la.data = memory.data() + kRows - 1;
          const auto xa = array_of(r.x.data(), SOFTMAXLIB_F64, 2, r.shape),
                     ta = array_of(r.target.data(), SOFTMAXLIB_I64, 1, r.shape),
                     ga = array_of(r.grad.data(), SOFTMAXLIB_F64, 2, r.shape),
                     sum = array_of(r.total, SOFTMAXLIB_F64, 0, nullptr);
          r.loss.weight = r.weight.data();
          r.loss.reduction = static_cast<softmaxlib_reduction>(reduction);
          r.loss.total = &sum;
          ASSERT_EQ(
              softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &xa, &ta, &la, &ga, 1, &r.loss, &r.o),
              SOFTMAXLIB_OK);
          std::vector<double> all = r.grad;
          all.push_back(r.total[0]);
          for (int64_t i = 0; i < kRows; ++i)
            all.push_back(*reinterpret_cast<double*>(static_cast<char*>(la.data) + i * stride));
          if (first.empty()) first = all;
          EXPECT_EQ(all, first) << softmaxlib_isa_name(isa) << " threads " << threads << " stride "
                                << stride;
        }
  }
}

TEST(LossReduction, SaysWhatIsWrong) {
  const int64_t two = 2, ones[] = {1, 1, 1};
  Reduction r(3, 4, 1);
  const auto xa = array_of(r.x.data(), SOFTMAXLIB_F64, 2, r.shape),
             ta = array_of(r.target.data(), SOFTMAXLIB_I64, 1, r.shape),
             la = array_of(r.losses.data(), SOFTMAXLIB_F64, 1, r.shape),
             ga = array_of(r.grad.data(), SOFTMAXLIB_F64, 2, r.shape);
  const auto run = [&](const softmaxlib_array* total, const softmaxlib_array& losses) {
    r.loss.reduction = SOFTMAXLIB_REDUCTION_MEAN;
    r.loss.total = total;
    return softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &xa, &ta, &losses, &ga, 1, &r.loss, &r.o);
  };
  const auto good = array_of(r.total, SOFTMAXLIB_F64, 0, nullptr);
  const auto with = [&](const void* data, softmaxlib_dtype dtype, int32_t ndim,
                        const int64_t* shape) {
    const auto total = array_of(data, dtype, ndim, shape);
    return run(&total, la);
  };
  const auto grad_before = r.grad, losses_before = r.losses;
  EXPECT_EQ(run(nullptr, la), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(with(nullptr, SOFTMAXLIB_F64, 0, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(with(r.total, SOFTMAXLIB_F64, 1, &two), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(with(r.total, SOFTMAXLIB_F64, 1, nullptr), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(with(r.total, SOFTMAXLIB_F64, -1, ones), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(with(r.total, SOFTMAXLIB_F64, SOFTMAXLIB_MAX_NDIM + 1, ones), SOFTMAXLIB_ERROR_SHAPE);
  for (const int32_t bad : {-1, int32_t{SOFTMAXLIB_BOOL}, int32_t{SOFTMAXLIB_I64}, 99})
    EXPECT_EQ(with(r.total, bad, 0, nullptr), SOFTMAXLIB_ERROR_DTYPE);
  for (const softmaxlib_dtype narrow : {SOFTMAXLIB_F32, SOFTMAXLIB_F16, SOFTMAXLIB_BF16})
    EXPECT_EQ(run(&good, array_of(r.losses.data(), narrow, 1, r.shape)), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(with(r.losses.data() + 2, SOFTMAXLIB_F64, 0, nullptr), SOFTMAXLIB_ERROR_OVERLAP);
  EXPECT_EQ(with(r.grad.data() + 5, SOFTMAXLIB_F32, 0, nullptr), SOFTMAXLIB_ERROR_OVERLAP);
  for (const int32_t bad : {-1, 3, INT32_MAX}) {
    r.loss.reduction = bad;
    EXPECT_EQ(r.run(bad), SOFTMAXLIB_ERROR_LOSS);
  }
  EXPECT_EQ(r.total[0], -7);
  EXPECT_EQ(r.grad, grad_before);
  EXPECT_EQ(r.losses, losses_before);
  EXPECT_EQ(with(r.total, SOFTMAXLIB_F64, 3, ones), SOFTMAXLIB_OK);
}

// ---- Gradients scaled afterwards

softmaxlib_status scale(const softmaxlib_array& x, const softmaxlib_array& factors,
                        const softmaxlib_array& out, const Options& o) {
  return softmaxlib_scale_rows(&x, &factors, &out, &o);
}

// Factors along any axes, x of any dtype, results in every dtype.
TEST(ScaleRows, BroadcastsAndConverts) {
  constexpr int64_t kShape[] = {3, 5, 40};
  constexpr size_t kSize = 3 * 5 * 40;
  const int64_t factor_shapes[][3] = {{3, 1, 1}, {1, 5, 1},  {1, 1, 40},
                                      {3, 5, 1}, {3, 5, 40}, {1, 1, 1}};
  for (const softmaxlib_isa isa : isas())
    for (int32_t from = SOFTMAXLIB_F32; from <= SOFTMAXLIB_U64; ++from)
      for (const softmaxlib_dtype to : kFloatTypes)
        for (const softmaxlib_dtype of_factors : kFloatTypes)
          for (const auto& shape : factor_shapes) {
            std::vector<double> x(kSize), factors;
            for (size_t i = 0; i < kSize; ++i) x[i] = static_cast<double>(i % 100);
            for (int64_t i = 0; i < shape[0] * shape[1] * shape[2]; ++i)
              factors.push_back(static_cast<double>(i % 9 - 4) / 3);
            const auto x_bytes = encode_all(x, from),
                       factor_bytes = encode_all(factors, of_factors);
            std::vector<char> y(kSize * static_cast<size_t>(item_size_of(to)));
            ASSERT_EQ(
                scale(array_of(x_bytes.data(), from, 3, kShape),
                      array_of(factor_bytes.data(), of_factors, 3, shape),
                      array_of(y.data(), to, 3, kShape), Options(isa, SOFTMAXLIB_ALGORITHM_AUTO)),
                SOFTMAXLIB_OK);
            const auto got = decode_all(y.data(), kSize, to);
            for (size_t i = 0; i < kSize; ++i) {
              const int64_t at[] = {static_cast<int64_t>(i) / 200, static_cast<int64_t>(i) / 40 % 5,
                                    static_cast<int64_t>(i) % 40};
              int64_t k = 0;
              for (int d = 0; d < 3; ++d) k = k * shape[d] + (shape[d] > 1 ? at[d] : 0);
              const Real exact =
                  decode(from, x_bytes.data() + i * static_cast<size_t>(item_size_of(from))) *
                  decode(of_factors,
                         factor_bytes.data() + static_cast<size_t>(k) *
                                                   static_cast<size_t>(item_size_of(of_factors)));
              ASSERT_LE(std::abs(got[i] - exact), 0.501L * ulp_of(exact, format_of(to)))
                  << kDtypeNames[from] << " to " << kDtypeNames[to] << " element " << i;
            }
          }
}

TEST(ScaleRows, ZerosStayZero) {
  const int64_t n = 37;
  for (const softmaxlib_isa isa : isas())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const double factor : {kInf, -kInf, kNaN, 0.0})
        for (const int64_t factors : {int64_t{1}, n}) {
          std::vector<double> x(static_cast<size_t>(n), 0);
          x[3] = 2, x[5] = -0.0, x[36] = kNaN;
          auto y = encode_all(x, dtype);
          const auto f = encode_all(std::vector<double>(static_cast<size_t>(n), factor), dtype);
          const auto ya = array_of(y.data(), dtype, 1, &n);
          ASSERT_EQ(scale(ya, array_of(f.data(), dtype, 1, &factors), ya,
                          Options(isa, SOFTMAXLIB_ALGORITHM_AUTO)),
                    SOFTMAXLIB_OK);
          const auto got = decode_all(y.data(), n, dtype);
          for (size_t i = 0; i < got.size(); ++i) {
            if (i == 3) EXPECT_TRUE(factor != factor ? std::isnan(got[i]) : got[i] == 2 * factor);
            else if (i == 36) EXPECT_TRUE(std::isnan(got[i]));
            else EXPECT_EQ(got[i], 0) << factor;
          }
        }
}

// In place with ones: not even written to, so it may be memory that cannot be.
TEST(ScaleRows, OnesTouchNothingInPlace) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* const memory =
      mmap(nullptr, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(memory, MAP_FAILED);
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    const int64_t shape[] = {4, 100}, rows[] = {4, 1};
    ASSERT_EQ(mprotect(memory, page, PROT_READ | PROT_WRITE), 0);
    const auto x = encode_all(make_row(Pattern::kNormal, 400, dtype, 1), dtype);
    memcpy(memory, x.data(), x.size());
    ASSERT_EQ(mprotect(memory, page, PROT_READ), 0);
    const auto xa = array_of(memory, dtype, 2, shape);
    for (const softmaxlib_dtype of_factors : kFloatTypes) {
      const auto ones = encode_all(std::vector<double>(4, 1), of_factors);
      EXPECT_EQ(scale(xa, array_of(ones.data(), of_factors, 2, rows), xa, Options()),
                SOFTMAXLIB_OK);
    }
    EXPECT_EQ(memcmp(memory, x.data(), x.size()), 0);
  }
  munmap(memory, page);
}

TEST(ScaleRows, SaysWhatIsWrong) {
  const int64_t n = 4, wrong = 3, deep[] = {1, 4};
  float x[4] = {1, 2, 3, 4}, y[4] = {-7, -7, -7, -7}, f[4] = {1, 2, 3, 4};
  const auto xa = array_of(x, SOFTMAXLIB_F32, 1, &n), ya = array_of(y, SOFTMAXLIB_F32, 1, &n),
             fa = array_of(f, SOFTMAXLIB_F32, 1, &n);
  EXPECT_EQ(softmaxlib_scale_rows(nullptr, &fa, &ya, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_scale_rows(&xa, nullptr, &ya, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_scale_rows(&xa, &fa, nullptr, nullptr), SOFTMAXLIB_ERROR_NULL);
  const Options o;
  EXPECT_EQ(scale(xa, array_of(f, SOFTMAXLIB_F32, 1, &wrong), ya, o), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(scale(xa, array_of(f, SOFTMAXLIB_F32, 2, deep), ya, o), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(scale(xa, fa, array_of(y, SOFTMAXLIB_F32, 1, &wrong), o), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(scale(xa, array_of(f, SOFTMAXLIB_I32, 1, &n), ya, o), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(scale(xa, fa, array_of(y, SOFTMAXLIB_I32, 1, &n), o), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(scale(xa, ya, ya, o), SOFTMAXLIB_ERROR_OVERLAP);
  EXPECT_EQ(scale(xa, fa, array_of(x + 1, SOFTMAXLIB_F32, 1, &wrong), o), SOFTMAXLIB_ERROR_SHAPE);
  const auto part = array_of(x, SOFTMAXLIB_F32, 1, &wrong);
  EXPECT_EQ(scale(part, array_of(f, SOFTMAXLIB_F32, 1, &wrong),
                  array_of(x + 1, SOFTMAXLIB_F32, 1, &wrong), o),
            SOFTMAXLIB_ERROR_OVERLAP);
  for (const float v : y) EXPECT_EQ(v, -7);
  EXPECT_EQ(scale(xa, fa, ya, o), SOFTMAXLIB_OK);
  EXPECT_EQ(y[3], 16);
}

// ---- The caller's floating-point mode

// Losses with every reduction, gradients and scaled ones: the same bits whatever the caller rounds,
// flushes or traps, and the mode is the caller's again afterwards.
TEST(LossMode, IgnoresTheCallersMxcsr) {
  constexpr int64_t kRows = 3, kColumns = 150;
  constexpr int64_t kShape[] = {kRows, kColumns}, kFactors[] = {kRows, 1};
  constexpr size_t kSize = kRows * kColumns;
  const unsigned saved = _mm_getcsr();
  const unsigned settings[] = {
      saved | 0x8040u,               // flush to zero, denormals are zero
      (saved & ~0x6000u) | 0x2000u,  // round down
      (saved & ~0x6000u) | 0x4000u,  // round up
      saved | 0x6000u | 0x8040u,     // truncate, flushing too
      saved & ~0x1f80u,              // every exception is trapped
  };
  for (const softmaxlib_isa isa : isas())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const Pattern pattern : {Pattern::kNormal, Pattern::kSubnormalResults, Pattern::kTiny,
                                    Pattern::kMasked, Pattern::kEveryMagnitude}) {
        std::vector<double> values = make_row(pattern, kSize, dtype, 4);
        values[kColumns + 3] = kNaN;  // a row without a distribution
        const auto x = encode_all(values, dtype);
        const auto grad = encode_all(make_row(Pattern::kEveryMagnitude, kSize, dtype, 5), dtype);
        // Subnormals among weights and factors; an argument is subnormal, too.
        std::vector<double> weight(kColumns, 5e-324), factors = {5e-324, 3, 1e-310};
        weight[2] = 1e-300, weight[4] = 0;
        const int64_t target[kRows] = {2, 5, 149};
        const auto call_all = [&](unsigned setting) {
          const size_t bytes = x.size();
          std::vector<char> y(bytes, 0x11), out(4 * bytes + 64, 0x22);
          run_rows(SOFTMAXLIB_SOFTMAX, dtype, x.data(), y.data(), kRows, kColumns, Options());
          double losses[kRows] = {}, total[3] = {};
          Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
          const auto xa = array_of(x.data(), dtype, 2, kShape),
                     ga = array_of(grad.data(), dtype, 2, kShape),
                     ya = array_of(y.data(), dtype, 2, kShape),
                     ta = array_of(target, SOFTMAXLIB_I64, 1, kShape),
                     la = array_of(losses, SOFTMAXLIB_F64, 1, kShape),
                     fa = array_of(factors.data(), SOFTMAXLIB_F64, 2, kFactors);
          softmaxlib_array oa = array_of(out.data(), dtype, 2, kShape);
          const auto next = [&] { oa.data = static_cast<char*>(oa.data) + bytes; };
          softmaxlib_array sum = array_of(total, SOFTMAXLIB_F64, 0, nullptr);
          softmaxlib_loss_options l = SOFTMAXLIB_LOSS_OPTIONS_INIT;
          l.weight = weight.data();
          l.label_smoothing = 5e-324;
          l.total = &sum;
          softmaxlib_status status[5];
          _mm_setcsr(setting);
          for (int i = 0; i < 3; ++i) {
            l.reduction = i;
            sum.data = total + i;
            status[i] = softmaxlib_cross_entropy(i == 1 ? SOFTMAXLIB_STABLEMAX : SOFTMAXLIB_SOFTMAX,
                                                 &xa, &ta, &la, &oa, 1, &l, &o);
          }
          next();
          status[3] = softmaxlib_scale_rows(&ga, &fa, &oa, &o);
          next();
          const int32_t axis = 1;
          status[4] = softmaxlib_backward(SOFTMAXLIB_SOFTMAX, &ga, &xa, &ya, &oa, 1, &axis, &o);
          // Its flags, too: nothing was computed in the caller's mode.
          const unsigned after = _mm_getcsr();
          _mm_setcsr(saved);
          EXPECT_EQ(after, setting);
          for (const softmaxlib_status s : status) EXPECT_EQ(s, SOFTMAXLIB_OK);
          for (const double* p : {losses, total})
            out.insert(out.end(), reinterpret_cast<const char*>(p),
                       reinterpret_cast<const char*>(p + 3));
          return out;
        };
        const auto wanted = call_all(saved);
        for (const unsigned setting : settings)
          ASSERT_EQ(call_all(setting), wanted) << softmaxlib_isa_name(isa) << " "
                                               << kDtypeNames[dtype] << std::hex << " " << setting;
      }
}

}  // namespace
}  // namespace softmaxlib::test
