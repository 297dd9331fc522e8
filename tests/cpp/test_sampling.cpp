// Sampling and top-k against a sort, element by element; the same result on every ISA.
#include <numeric>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

softmaxlib_array array_of(const void* data, softmaxlib_dtype dtype, int32_t ndim,
                          const int64_t* shape) {
  return {const_cast<void*>(data), dtype, ndim, shape, nullptr};
}

struct Filter : softmaxlib_filter {
  Filter(int64_t k, double p, double m) : softmaxlib_filter(SOFTMAXLIB_FILTER_INIT) {
    top_k = k, top_p = p, min_p = m;
  }
};

// Where running sums of the filtered distribution end, by a stable sort in extended precision.
std::vector<Real> ends_of(const std::vector<Real>& x, const Filter& f) {
  const size_t n = x.size();
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] > x[b]; });
  std::vector<Real> weight(n);
  for (size_t i = 0; i < n; ++i) weight[i] = std::exp(x[i] - x[order[0]]);
  size_t kept = f.top_k > 0 ? std::min(n, static_cast<size_t>(f.top_k)) : n;
  Real all = 0, sum = 0;
  for (size_t i = 0; i < kept; ++i) all += weight[order[i]];
  if (f.top_p < 1)
    for (size_t i = 0; i < kept; ++i)
      if ((sum += weight[order[i]]) >= Real{f.top_p} * all) kept = i + 1;
  std::vector<bool> in(n);
  for (size_t i = 0; i < kept; ++i) in[order[i]] = weight[order[i]] >= Real{f.min_p};
  std::vector<Real> ends(n);
  Real end = 0;
  for (size_t i = 0; i < n; ++i) ends[i] = end += in[i] ? weight[i] : 0;
  for (Real& e : ends) e /= end;
  return ends;
}

struct Sampling : testing::TestWithParam<softmaxlib_isa> {};

TEST_P(Sampling, InvertsTheDistribution) {
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kTies, Pattern::kTwoValues,
                                  Pattern::kMasked, Pattern::kIntegers, Pattern::kFarAbove})
      for (const int64_t n : {1, 5, 100, 3000})
        for (const Filter& filter :
             {Filter(0, 1, 0), Filter(3, 1, 0), Filter(0, 0.6, 0), Filter(0, 1, 0.2),
              Filter(40, 0.91, 0.01), Filter(1, 0.5, 0.5), Filter(n, 1, 1), Filter(0, 1e-9, 0)}) {
          const auto x = encode_all(make_row(pattern, n, dtype, 3), dtype);
          const auto values = decode_all(x.data(), n, dtype);
          if (*std::max_element(values.begin(), values.end()) == -kInf) continue;
          const auto ends = ends_of(values, filter);
          constexpr int64_t kDraws = 60;
          std::vector<double> uniforms(kDraws);
          std::vector<int64_t> drawn(kDraws, -7);
          for (int64_t i = 0; i < kDraws; ++i)
            uniforms[static_cast<size_t>(i)] = static_cast<double>(i) / kDraws;
          const int64_t shape[] = {kDraws, n}, strides[] = {0, item_size_of(dtype)};
          softmaxlib_array xa = array_of(x.data(), dtype, 2, shape);
          xa.strides = strides;  // the same row again and again
          const auto ua = array_of(uniforms.data(), SOFTMAXLIB_F64, 1, shape);
          const auto ia = array_of(drawn.data(), SOFTMAXLIB_I64, 1, shape);
          ASSERT_EQ(softmaxlib_sample(&xa, &ua, &ia, 1, &filter, &o), SOFTMAXLIB_OK);
          for (size_t i = 0; i < kDraws; ++i) {
            const auto j = static_cast<size_t>(drawn[i]);
            ASSERT_LT(j, values.size());
            const Real slack = 1e-5L;  // the weights are floats
            const Real start = j ? ends[j - 1] : 0;
            ASSERT_GT(ends[j] - start, 0) << "an element without weight or filtered out";
            ASSERT_LE(start - slack, Real{uniforms[i]});
            ASSERT_GE(ends[j] + slack, Real{uniforms[i]})
                << kDtypeNames[dtype] << " n " << n << " k " << filter.top_k << " p "
                << filter.top_p << " m " << filter.min_p << " u " << uniforms[i];
          }
        }
}

TEST_P(Sampling, TopKIsAStableSort) {
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kTies, Pattern::kTwoValues,
                                  Pattern::kMasked, Pattern::kRising, Pattern::kFarBelow})
      for (const int64_t n : {1, 8, 64, 700})
        for (const int64_t k : {int64_t{0}, int64_t{1}, int64_t{3}, int64_t{130}, n}) {
          if (k > n) continue;
          const int64_t item = item_size_of(dtype);
          const auto x = encode_all(make_row(pattern, n, dtype, 3), dtype);
          const auto values = decode_all(x.data(), n, dtype);
          if (*std::max_element(values.begin(), values.end()) == -kInf) continue;
          std::vector<int64_t> order(static_cast<size_t>(n));
          std::iota(order.begin(), order.end(), int64_t{0});
          std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return values[static_cast<size_t>(a)] > values[static_cast<size_t>(b)];
          });
          order.resize(static_cast<size_t>(k));
          std::vector<char> weights(static_cast<size_t>((k + 1) * item));
          std::vector<int64_t> indices(static_cast<size_t>(k + 1), -7);
          const auto xa = array_of(x.data(), dtype, 1, &n);
          const auto wa = array_of(weights.data(), dtype, 1, &k);
          const auto ia = array_of(indices.data(), SOFTMAXLIB_I64, 1, &k);
          ASSERT_EQ(softmaxlib_topk_softmax(&xa, &wa, &ia, 0, 0, &o), SOFTMAXLIB_OK);
          EXPECT_EQ(indices.back(), -7);
          indices.pop_back();
          ASSERT_EQ(indices, order) << kDtypeNames[dtype] << " n " << n << " k " << k;
          // The weights are the bits of softmax.
          const auto all = row_result(SOFTMAXLIB_SOFTMAX, dtype, x, o);
          for (int64_t i = 0; i < k; ++i)
            ASSERT_EQ(
                memcmp(weights.data() + i * item, all.data() + order[static_cast<size_t>(i)] * item,
                       static_cast<size_t>(item)),
                0)
                << kDtypeNames[dtype] << " n " << n << " rank " << i;

          // Renormalized: the softmax of the k.
          ASSERT_EQ(softmaxlib_topk_softmax(&xa, &wa, &ia, 0, 1, &o), SOFTMAXLIB_OK);
          std::vector<char> chosen;
          for (const int64_t i : order)
            chosen.insert(chosen.end(), x.data() + i * item, x.data() + (i + 1) * item);
          if (k == 0) continue;
          const auto want = row_result(SOFTMAXLIB_SOFTMAX, dtype, chosen, o);
          for (int64_t i = 0; i < k; ++i) {
            const Real a = decode(dtype, weights.data() + i * item),
                       b = decode(dtype, want.data() + i * item);
            ASSERT_LE(std::fabs(a - b) / ulp_of(b, format_of(dtype)), 5);
          }
        }
}

TEST_P(Sampling, RowsWithoutADistribution) {
  const float x[] = {1, NAN, 2, INFINITY, 1, 0, -INFINITY, -INFINITY, -INFINITY, 1, 2, 3};
  const int64_t shape[] = {4, 3}, k_shape[] = {4, 2};
  const double u[] = {0.5, 0.5, 0.5, 0};
  int64_t drawn[4], indices[8];
  float weights[8];
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  const auto xa = array_of(x, SOFTMAXLIB_F32, 2, shape);
  const auto ua = array_of(u, SOFTMAXLIB_F64, 1, shape);
  const auto da = array_of(drawn, SOFTMAXLIB_I64, 1, shape);
  ASSERT_EQ(softmaxlib_sample(&xa, &ua, &da, -1, nullptr, &o), SOFTMAXLIB_OK);
  EXPECT_EQ(std::vector<int64_t>(drawn, drawn + 4), (std::vector<int64_t>{-1, -1, -1, 0}));
  const auto wa = array_of(weights, SOFTMAXLIB_F32, 2, k_shape);
  const auto ia = array_of(indices, SOFTMAXLIB_I64, 2, k_shape);
  ASSERT_EQ(softmaxlib_topk_softmax(&xa, &wa, &ia, -1, 0, &o), SOFTMAXLIB_OK);
  for (int i = 0; i < 6; ++i) {
    EXPECT_NE(weights[i], weights[i]);
    EXPECT_EQ(indices[i], i % 2);
  }
  EXPECT_EQ(indices[6], 2);
  EXPECT_EQ(indices[7], 1);
}

// Neighbours that a temperature rounds to one float, and what a shift does, stay apart.
TEST_P(Sampling, NeighboursStayApart) {
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  std::mt19937 random(5);
  const Filter greedy(1, 1, 0);
  for (int i = 0; i < 3000; ++i) {
    const float a = std::uniform_real_distribution<float>(1, 9)(random);
    const float x[] = {a, std::nextafter(a, 100.0f), 1};
    const int64_t n = 3, two = 2, none = 1;
    o.temperature = i % 2 ? 1.3 : 0.7;
    const double u = 0.5;
    int64_t drawn = -7, indices[2];
    float weights[2];
    const auto xa = array_of(x, SOFTMAXLIB_F32, 1, &n);
    const auto ua = array_of(&u, SOFTMAXLIB_F64, 0, &none),
               da = array_of(&drawn, SOFTMAXLIB_I64, 0, &none);
    ASSERT_EQ(softmaxlib_sample(&xa, &ua, &da, 0, &greedy, &o), SOFTMAXLIB_OK);
    ASSERT_EQ(drawn, 1) << a;
    const auto wa = array_of(weights, SOFTMAXLIB_F32, 1, &two),
               ia = array_of(indices, SOFTMAXLIB_I64, 1, &two);
    ASSERT_EQ(softmaxlib_topk_softmax(&xa, &wa, &ia, 0, 0, &o), SOFTMAXLIB_OK);
    ASSERT_EQ(indices[0], 1);
    ASSERT_GE(weights[0], weights[1]);
  }
  const float far[] = {1e6f, 1, 1.01f};
  const int64_t n = 3;
  int64_t indices[3];
  float weights[3];
  o.temperature = 1;
  const auto xa = array_of(far, SOFTMAXLIB_F32, 1, &n),
             wa = array_of(weights, SOFTMAXLIB_F32, 1, &n),
             ia = array_of(indices, SOFTMAXLIB_I64, 1, &n);
  ASSERT_EQ(softmaxlib_topk_softmax(&xa, &wa, &ia, 0, 0, &o), SOFTMAXLIB_OK);
  EXPECT_EQ(std::vector<int64_t>(indices, indices + 3), (std::vector<int64_t>{0, 2, 1}));
}

// Strided, with options, threads and any ISA: one result.
TEST(SamplingBits, DoNotDependOnHow) {
  const int64_t rows = 70, n = 2500, shape[] = {rows, n}, columns[] = {n, rows}, k = 9,
                top[] = {rows, k}, top_columns[] = {k, rows};
  std::vector<float> x(static_cast<size_t>(rows * n)), turned(x.size());
  const auto values = make_row(Pattern::kWide, rows * n, SOFTMAXLIB_F32, 4);
  std::vector<double> u(static_cast<size_t>(rows));
  std::mt19937_64 random(1);
  for (double& v : u) v = std::uniform_real_distribution<double>(0, 1)(random);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < n; ++i)
      turned[static_cast<size_t>(i * rows + r)] = x[static_cast<size_t>(r * n + i)] =
          static_cast<float>(values[static_cast<size_t>(r * n + i)]);
  softmaxlib_pool* pool = nullptr;
  ASSERT_EQ(softmaxlib_pool_create(3, &pool), SOFTMAXLIB_OK);
  const Filter filter(200, 0.8, 1e-3);
  std::vector<int64_t> first;
  std::vector<float> first_weights;
  for (const softmaxlib_isa isa : isas())
    for (const bool turns : {false, true})
      for (const int32_t threads : {1, 3}) {
        Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
        o.temperature = 12;
        o.num_threads = threads;
        o.parallel_for = softmaxlib_pool_parallel_for;
        o.parallel_context = pool;
        std::vector<int64_t> drawn(static_cast<size_t>(rows));
        std::vector<int64_t> indices(static_cast<size_t>(rows * k));
        std::vector<float> weights(indices.size());
        const auto xa =
            array_of(turns ? turned.data() : x.data(), SOFTMAXLIB_F32, 2, turns ? columns : shape);
        const auto ua = array_of(u.data(), SOFTMAXLIB_F64, 1, shape);
        const auto da = array_of(drawn.data(), SOFTMAXLIB_I64, 1, shape);
        const int32_t axis = turns ? 0 : 1;
        ASSERT_EQ(softmaxlib_sample(&xa, &ua, &da, axis, &filter, &o), SOFTMAXLIB_OK);
        if (first.empty()) first = drawn;
        EXPECT_EQ(drawn, first) << softmaxlib_isa_name(isa);

        const auto wa = array_of(weights.data(), SOFTMAXLIB_F32, 2, turns ? top_columns : top);
        const auto ia = array_of(indices.data(), SOFTMAXLIB_I64, 2, turns ? top_columns : top);
        ASSERT_EQ(softmaxlib_topk_softmax(&xa, &wa, &ia, axis, 1, &o), SOFTMAXLIB_OK);
        if (turns) {
          const auto given = weights;
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t i = 0; i < k; ++i)
              weights[static_cast<size_t>(r * k + i)] = given[static_cast<size_t>(i * rows + r)];
        }
        if (first_weights.empty()) first_weights = weights;
        EXPECT_TRUE(weights == first_weights) << softmaxlib_isa_name(isa);
      }
  softmaxlib_pool_destroy(pool);
}

TEST(SamplingErrors, EachHasItsStatus) {
  const float x[] = {1, 2, 3, 4, 5, 6};
  double u[] = {0.5, 0.25};
  int64_t drawn[6];
  float weights[6];
  const int64_t shape[] = {2, 3}, wrong[] = {3}, k_shape[] = {2, 4}, two[] = {2, 2};
  const auto xa = array_of(x, SOFTMAXLIB_F32, 2, shape);
  const auto ua = array_of(u, SOFTMAXLIB_F64, 1, shape);
  const auto da = array_of(drawn, SOFTMAXLIB_I64, 1, shape);
  const auto sample = [&](Filter f) { return softmaxlib_sample(&xa, &ua, &da, 1, &f, nullptr); };
  EXPECT_EQ(sample(Filter(0, 1, 0)), SOFTMAXLIB_OK);
  EXPECT_EQ(sample(Filter(-1, 1, 0)), SOFTMAXLIB_ERROR_K);
  for (const double p : {0.0, -1.0, 1.5, kNaN})
    EXPECT_EQ(sample(Filter(0, p, 0)), SOFTMAXLIB_ERROR_SAMPLING) << p;
  for (const double m : {-0.5, 1.5, kNaN})
    EXPECT_EQ(sample(Filter(0, 1, m)), SOFTMAXLIB_ERROR_SAMPLING) << m;
  for (const double bad : {1.0, -0.25, kNaN, kInf}) {
    u[1] = bad;
    EXPECT_EQ(sample(Filter(0, 1, 0)), SOFTMAXLIB_ERROR_UNIFORMS) << bad;
  }
  u[1] = 0;
  const int64_t one = 1;
  const auto number = array_of(u, SOFTMAXLIB_F64, 1, &one);
  Options o;
  o.causal = 1;
  EXPECT_EQ(softmaxlib_sample(&xa, &ua, &da, 1, nullptr, &o), SOFTMAXLIB_ERROR_CAUSAL);
  o.causal = 0;
  o.alibi_slopes = &number;
  EXPECT_EQ(softmaxlib_sample(&xa, &ua, &da, 1, nullptr, &o), SOFTMAXLIB_ERROR_ALIBI);
  o.alibi_slopes = nullptr;
  o.sinks = &number;
  EXPECT_EQ(softmaxlib_sample(&xa, &ua, &da, 1, nullptr, &o), SOFTMAXLIB_ERROR_SINK);
  const auto three = array_of(u, SOFTMAXLIB_F64, 1, wrong);
  EXPECT_EQ(softmaxlib_sample(&xa, &three, &da, 1, nullptr, nullptr), SOFTMAXLIB_ERROR_UNIFORMS);
  EXPECT_EQ(softmaxlib_sample(&xa, &ua, &xa, 1, nullptr, nullptr), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(softmaxlib_sample(&xa, &ua, &da, 2, nullptr, nullptr), SOFTMAXLIB_ERROR_AXIS);
  EXPECT_EQ(softmaxlib_sample(&xa, &ua, nullptr, 1, nullptr, nullptr), SOFTMAXLIB_ERROR_NULL);

  const auto topk = [&](const int64_t* ws, const int64_t* is, int32_t axis) {
    const auto wa = array_of(weights, SOFTMAXLIB_F32, 2, ws);
    const auto ia = array_of(drawn, SOFTMAXLIB_I64, 2, is);
    return softmaxlib_topk_softmax(&xa, &wa, &ia, axis, 0, nullptr);
  };
  EXPECT_EQ(topk(two, two, 1), SOFTMAXLIB_OK);
  EXPECT_EQ(topk(k_shape, k_shape, 1), SOFTMAXLIB_ERROR_K);
  EXPECT_EQ(topk(two, shape, 1), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(topk(two, two, 0), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(topk(two, two, 5), SOFTMAXLIB_ERROR_AXIS);
}

INSTANTIATE_TEST_SUITE_P(Isas, Sampling, testing::ValuesIn(isas()),
                         [](const auto& run) { return softmaxlib_isa_name(run.param); });

}  // namespace
}  // namespace softmaxlib::test
