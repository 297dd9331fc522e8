// What attention adds: scale, causal rows, ALiBi, sinks. Each against the plain options that say
// the same (a mask, a bias, one more column), bit for bit where the arithmetic is the same.
#include "support.hpp"

namespace softmaxlib::test {
namespace {

constexpr int64_t kHeads = 3, kQueries = 7;
constexpr int64_t kPerHead[] = {kHeads, 1, 1};
// Of the test that runs: rows in lanes, in batches, and of more than a chunk.
constexpr int64_t kNumbersOfKeys[] = {20, 100, 1100};
int64_t keys = 0, all_scores = 0, shape_of_scores[] = {kHeads, kQueries, 0};
constexpr int32_t kAxis = 2;

softmaxlib_array array_of(const void* data, softmaxlib_dtype dtype, const int64_t* shape,
                          int32_t ndim = 3) {
  return {const_cast<void*>(data), dtype, ndim, shape, nullptr};
}

std::vector<char> scores(softmaxlib_dtype dtype) {
  std::vector<char> x;
  for (uint32_t r = 0; r < kHeads * kQueries; ++r) {
    const Pattern pattern = r % 5 == 3 ? Pattern::kFarAbove : Pattern::kWide;
    const auto row = encode_all(make_row(pattern, keys, dtype, r), dtype);
    x.insert(x.end(), row.begin(), row.end());
  }
  return x;
}

std::vector<char> run_on(softmaxlib_function function, softmaxlib_dtype dtype,
                         const std::vector<char>& x, const Options& o) {
  const bool reduces = function == SOFTMAXLIB_LOGSUMEXP;
  const int64_t n = reduces ? kHeads * kQueries : all_scores;
  std::vector<char> y(static_cast<size_t>(n * item_size_of(dtype)), 0x11);
  EXPECT_EQ(run_array(function, array_of(x.data(), dtype, shape_of_scores),
                      array_of(y.data(), dtype, shape_of_scores, reduces ? 2 : 3), 1, &kAxis, o),
            SOFTMAXLIB_OK)
      << describe(o);
  return y;
}

struct Attention : testing::TestWithParam<std::tuple<softmaxlib_isa, int64_t>> {
  Attention() {
    keys = shape_of_scores[2] = std::get<1>(GetParam());
    all_scores = kHeads * kQueries * keys;
  }
  static softmaxlib_isa isa() { return std::get<0>(GetParam()); }
};

// Runs f(function, dtype, x, Options on this ISA) for all functions and dtypes.
template <class F>
void for_all(softmaxlib_isa isa, F f) {
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    const std::vector<char> x = scores(dtype);
    for (const softmaxlib_function function : functions()) {
      SCOPED_TRACE(std::string(kFunctionNames[function]) + " " + kDtypeNames[dtype]);
      f(function, dtype, x, Options(isa, SOFTMAXLIB_ALGORITHM_AUTO));
    }
  }
}

TEST_P(Attention, CausalIsAMask) {
  for_all(isa(), [](auto function, auto dtype, const auto& x, Options o) {
    for (const int64_t offset :
         {int64_t{0}, int64_t{-3}, keys - 5, keys / 2, keys, INT64_MAX, INT64_MIN}) {
      std::vector<uint8_t> mask(static_cast<size_t>(kQueries * keys));
      for (int64_t i = 0; i < kQueries; ++i)
        for (int64_t j = 0; j < keys; ++j)
          mask[static_cast<size_t>(i * keys + j)] =
              static_cast<long double>(j) <= static_cast<long double>(i) + offset;
      const auto where = array_of(mask.data(), SOFTMAXLIB_BOOL, shape_of_scores + 1, 2);
      Options masked = o, causal = o;
      masked.where = &where;
      causal.causal = 1;
      causal.causal_offset = offset;
      EXPECT_TRUE(run_on(function, dtype, x, causal) == run_on(function, dtype, x, masked))
          << offset;
    }
  });
}

TEST_P(Attention, AlibiIsABias) {
  for_all(isa(), [](auto function, auto dtype, const auto& x, Options o) {
    const float slopes[] = {0.5f, 0.0625f, 0.3f};
    constexpr int64_t kOffset = 20;
    std::vector<double> bias(static_cast<size_t>(all_scores));
    for (int64_t h = 0; h < kHeads; ++h)
      for (int64_t i = 0; i < kQueries; ++i)
        for (int64_t j = 0; j < keys; ++j)
          bias[static_cast<size_t>((h * kQueries + i) * keys + j)] =
              double{slopes[h]} * static_cast<double>(j - i - kOffset);
    const auto bias_array = array_of(bias.data(), SOFTMAXLIB_F64, shape_of_scores);
    const auto slope_array = array_of(slopes, SOFTMAXLIB_F32, kPerHead);
    Options biased = o;
    biased.bias = &bias_array;
    o.alibi_slopes = &slope_array;
    o.causal_offset = kOffset;
    EXPECT_TRUE(run_on(function, dtype, x, o) == run_on(function, dtype, x, biased));
  });
}

TEST_P(Attention, ScaleIsOneOverTemperature) {
  for_all(isa(), [](auto function, auto dtype, const auto& x, Options o) {
    Options divided = o;
    divided.temperature = 8;
    o.scale = 0.125;
    EXPECT_TRUE(run_on(function, dtype, x, o) == run_on(function, dtype, x, divided));

    const double scales[] = {0.125, 2, 1}, temperatures[] = {8, 0.5, 1};
    const auto scale_array = array_of(scales, SOFTMAXLIB_F64, kPerHead);
    const auto temperature_array = array_of(temperatures, SOFTMAXLIB_F64, kPerHead);
    o.scale = 4;  // replaced by those of the rows
    o.scales = &scale_array;
    divided.temperatures = &temperature_array;
    EXPECT_TRUE(run_on(function, dtype, x, o) == run_on(function, dtype, x, divided));

    // Both: x scale / temperature.
    o = Options(o.isa, SOFTMAXLIB_ALGORITHM_AUTO);
    o.scale = 0.5;
    o.temperature = 4;
    divided.temperatures = nullptr;
    EXPECT_TRUE(run_on(function, dtype, x, o) == run_on(function, dtype, x, divided));
  });
}

// A sink is one more column, whose own result is left out.
TEST_P(Attention, SinkIsAColumn) {
  for_all(isa(), [](auto function, auto dtype, const auto& x, Options o) {
    if (dtype == SOFTMAXLIB_F16 || dtype == SOFTMAXLIB_BF16) return;  // rounding hides all
    const Format format = format_of(dtype);
    const int64_t item = item_size_of(dtype);
    for (const double sink : {3.0, -kInf, 45.5, 1e6, -1e6, 49900.0, kInf, kNaN}) {
      const float sinks[] = {static_cast<float>(sink), static_cast<float>(sink),
                             static_cast<float>(sink)};
      const auto sink_array = array_of(sinks, SOFTMAXLIB_F32, kPerHead);
      o.sinks = &sink_array;
      for (const softmaxlib_algorithm algorithm : algorithms_of(function, dtype)) {
        o.algorithm = algorithm;
        const auto got = run_on(function, dtype, x, o);
        const int64_t n = result_elements(function, keys);
        for (int64_t r = 0; r < kHeads * kQueries; ++r) {
          const char* row = x.data() + r * keys * item;
          std::vector<char> longer(row, row + keys * item);
          longer.resize(longer.size() + static_cast<size_t>(item));
          encode(sink, dtype, longer.data() + keys * item);
          const auto want =
              row_result(function, dtype, longer, Options(o.isa, SOFTMAXLIB_ALGORITHM_AUTO));
          for (int64_t i = 0; i < n; i += 53) {
            const Real a = decode(dtype, got.data() + (r * n + i) * item);
            const Real b = decode(dtype, want.data() + i * item);
            ASSERT_TRUE(a == b || (a != a && b != b) || std::fabs(a - b) / ulp_of(b, format) <= 8)
                << sink << " row " << r << " element " << i;
          }
        }
      }
    }
  });
}

// A row whose every column is masked is the sink's alone.
TEST_P(Attention, SinkAlone) {
  const float x[] = {-INFINITY, -INFINITY, 1, 2};
  const float sink = 0.5f;
  const int64_t shape[] = {2, 2}, one = 1;
  const int32_t axis = 1;
  const uint8_t visible[] = {1, 1, 0, 0};
  const auto where = array_of(visible, SOFTMAXLIB_BOOL, shape, 2);
  const auto sinks = array_of(&sink, SOFTMAXLIB_F32, &one, 1);
  Options o(isa(), SOFTMAXLIB_ALGORITHM_AUTO);
  o.where = &where;
  o.sinks = &sinks;
  float y[4], sums[2];
  const auto x_array = array_of(x, SOFTMAXLIB_F32, shape, 2);
  ASSERT_EQ(
      run_array(SOFTMAXLIB_SOFTMAX, x_array, array_of(y, SOFTMAXLIB_F32, shape, 2), 1, &axis, o),
      SOFTMAXLIB_OK);
  for (const float v : y) EXPECT_EQ(v, 0);
  ASSERT_EQ(run_array(SOFTMAXLIB_LOGSUMEXP, x_array, array_of(sums, SOFTMAXLIB_F32, shape, 1), 1,
                      &axis, o),
            SOFTMAXLIB_OK);
  for (const float v : sums) EXPECT_EQ(v, sink);
}

// What used to go wrong: x overwritten before the sink was looked at, shifts and maxima that are no
// floats, a sink that is -inf taken for a term.
TEST_P(Attention, SinksThatAreHardToHold) {
  const int64_t n = 4, one = 1;
  for (const bool in_place : {false, true})
    for (const softmaxlib_algorithm algorithm :
         {SOFTMAXLIB_ALGORITHM_AUTO, SOFTMAXLIB_THREE_PASS_RELOAD, SOFTMAXLIB_TWO_PASS_RELOAD,
          SOFTMAXLIB_TWO_PASS}) {
      float x[] = {1, 2, 3, 4}, y[4];
      const double sink = 5e4;
      const auto sinks = array_of(&sink, SOFTMAXLIB_F64, &one, 1);
      Options o(isa(), algorithm);
      o.sinks = &sinks;
      const int32_t axis = 0;
      const auto out = array_of(in_place ? x : y, SOFTMAXLIB_F32, &n, 1);
      ASSERT_EQ(run_array(SOFTMAXLIB_SOFTMAX, array_of(x, SOFTMAXLIB_F32, &n, 1), out, 1, &axis, o),
                SOFTMAXLIB_OK);
      for (const float v : in_place ? x : y) EXPECT_EQ(v, 0) << algorithm << in_place;
    }

  const struct {
    softmaxlib_function function;
    float x;
    double sink, want;
  } kCases[] = {{SOFTMAXLIB_SOFTMAX, 1e6f, 1e6 + 0.03, 0.49250056243},
                {SOFTMAXLIB_SOFTMAX, 7.5f, -kInf, 1},
                {SOFTMAXLIB_SOFTMAX, 1e30f, 1.00000002e30, 0},
                {SOFTMAXLIB_SOFTMAX, 1e30f, 1e30, 1},
                {SOFTMAXLIB_LOG_SOFTMAX, 999.99994f, 1000.00002, -0.69318769}};
  for (const auto& c : kCases) {
    float y = 0;
    const auto sinks = array_of(&c.sink, SOFTMAXLIB_F64, &one, 1);
    Options o(isa(), SOFTMAXLIB_ALGORITHM_AUTO);
    o.sinks = &sinks;
    const int32_t axis = 0;
    ASSERT_EQ(run_array(c.function, array_of(&c.x, SOFTMAXLIB_F32, &one, 1),
                        array_of(&y, SOFTMAXLIB_F32, &one, 1), 1, &axis, o),
              SOFTMAXLIB_OK);
    EXPECT_NEAR(y, c.want, 2e-7) << c.x;
  }
}

// One visible column has the probability 1, however it came to be alone.
TEST_P(Attention, OneColumn) {
  for_all(isa(), [](auto function, auto dtype, const auto& x, Options o) {
    if (function != SOFTMAXLIB_SOFTMAX && function != SOFTMAXLIB_STABLEMAX) return;
    o.causal = 1;
    const auto y = run_on(function, dtype, x, o);
    for (int64_t h = 0; h < kHeads; ++h) {
      const char* row = y.data() + h * kQueries * keys * item_size_of(dtype);
      EXPECT_EQ(decode(dtype, row), 1);
      EXPECT_EQ(decode(dtype, row + item_size_of(dtype)), 0);
    }
  });
}

TEST(AttentionErrors, EachHasItsStatus) {
  float x[6] = {1, 2, 3, 4, 5, 6}, y[6];
  const int64_t shape[] = {2, 3}, wrong[] = {2, 3}, many = 5;
  const double ones[6] = {1, 1, 1, 1, 1, 1}, zeros[6] = {};
  const auto xa = array_of(x, SOFTMAXLIB_F32, shape, 2), ya = array_of(y, SOFTMAXLIB_F32, shape, 2);
  const auto varies = array_of(ones, SOFTMAXLIB_F64, wrong, 2);
  const auto too_many = array_of(ones, SOFTMAXLIB_F64, &many, 1);
  const int64_t column[] = {2, 1};
  const auto zero = array_of(zeros, SOFTMAXLIB_F64, column, 2);
  const auto fine = array_of(ones, SOFTMAXLIB_F64, column, 2);
  const auto ints = array_of(ones, SOFTMAXLIB_I64, column, 2);
  const int32_t axes[] = {1, 0};
  const auto status = [&](auto change, int32_t naxes = 1) {
    Options o;
    change(o);
    return softmaxlib_run(SOFTMAXLIB_SOFTMAX, &xa, &ya, naxes, axes, &o);
  };
  for (const double bad : {0.0, -1.0, kInf, kNaN})
    EXPECT_EQ(status([&](Options& o) { o.scale = bad; }), SOFTMAXLIB_ERROR_SCALE) << bad;
  EXPECT_EQ(status([&](Options& o) { o.scales = &varies; }), SOFTMAXLIB_ERROR_SCALE);
  EXPECT_EQ(status([&](Options& o) { o.scales = &zero; }), SOFTMAXLIB_ERROR_SCALE);
  EXPECT_EQ(status([&](Options& o) { o.scales = o.temperatures = &fine; }), SOFTMAXLIB_ERROR_SCALE);
  EXPECT_EQ(status([&](Options& o) { o.scales = &ints; }), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(status([&](Options& o) { o.temperatures = &zero; }), SOFTMAXLIB_ERROR_TEMPERATURE);
  EXPECT_EQ(status([&](Options& o) { o.alibi_slopes = &varies; }), SOFTMAXLIB_ERROR_ALIBI);
  EXPECT_EQ(status([&](Options& o) { o.alibi_slopes = &ints; }), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(status([&](Options& o) { o.sinks = &varies; }), SOFTMAXLIB_ERROR_SINK);
  EXPECT_EQ(status([&](Options& o) { o.sinks = &too_many; }), SOFTMAXLIB_ERROR_SINK);
  EXPECT_EQ(status([&](Options& o) { o.sinks = &ints; }), SOFTMAXLIB_ERROR_DTYPE);
  for (const int32_t axis : {1, -1, 2, -3})
    EXPECT_EQ(status([&](Options& o) { o.causal = 1, o.query_axis = axis; }),
              SOFTMAXLIB_ERROR_CAUSAL)
        << axis;
  EXPECT_EQ(status([&](Options& o) { o.causal = 1; }, 2), SOFTMAXLIB_ERROR_CAUSAL);
  EXPECT_EQ(status([&](Options& o) { o.causal = 1; }), SOFTMAXLIB_OK);
}

// A caller that was compiled before the struct grew.
TEST(AttentionErrors, OlderStruct) {
  const float x[] = {1, 2, 3};
  float y[3], want[3];
  const int64_t n = 3;
  const auto xa = array_of(x, SOFTMAXLIB_F32, &n, 1);
  auto ya = array_of(want, SOFTMAXLIB_F32, &n, 1);
  Options o;
  o.temperature = 2;
  ASSERT_EQ(softmaxlib_run(SOFTMAXLIB_SOFTMAX, &xa, &ya, 0, nullptr, &o), SOFTMAXLIB_OK);
  o.struct_size = offsetof(softmaxlib_options, scale);
  memset(static_cast<void*>(&o.scale), 0xff, sizeof(o) - o.struct_size);  // not there
  ya.data = y;
  ASSERT_EQ(softmaxlib_run(SOFTMAXLIB_SOFTMAX, &xa, &ya, 0, nullptr, &o), SOFTMAXLIB_OK);
  EXPECT_EQ(memcmp(y, want, sizeof(y)), 0);
  for (const size_t size : {size_t{0}, o.struct_size - 8, sizeof(o) + 8}) {
    o.struct_size = size;
    EXPECT_EQ(softmaxlib_run(SOFTMAXLIB_SOFTMAX, &xa, &ya, 0, nullptr, &o),
              SOFTMAXLIB_ERROR_STRUCT_SIZE);
  }
}

INSTANTIATE_TEST_SUITE_P(Isas, Attention,
                         testing::Combine(testing::ValuesIn(isas()),
                                          testing::ValuesIn(kNumbersOfKeys)),
                         [](const auto& run) {
                           return softmaxlib_isa_name(std::get<0>(run.param)) + std::string("_") +
                                  std::to_string(std::get<1>(run.param));
                         });

}  // namespace
}  // namespace softmaxlib::test
