// Rows in chunks: the bits of one call where the chunks are whole blocks, its bounds for any
// others.
#include "support.hpp"

namespace softmaxlib::test {
namespace {

constexpr softmaxlib_function kScaled[] = {SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_LOG_SOFTMAX,
                                           SOFTMAXLIB_STABLEMAX, SOFTMAXLIB_LOG_STABLEMAX};

softmaxlib_array row_of(const void* data, softmaxlib_dtype dtype, const int64_t* n) {
  return {const_cast<void*>(data), dtype, 1, n, nullptr};
}

struct Streamed {
  std::vector<char> y;
  double log_sum;
  softmaxlib_state state;
};

// The row in chunks that end at `cuts`; merging: every chunk has a state of its own, merged in
// order.
Streamed stream_row(softmaxlib_function function, softmaxlib_dtype dtype,
                    const std::vector<char>& x, std::vector<int64_t> cuts, const Options& o,
                    bool merging = false) {
  const int64_t item = item_size_of(dtype);
  Streamed s = {std::vector<char>(x.size(), 0x11), 0, {}};
  EXPECT_EQ(softmaxlib_state_begin(function, dtype, 1, &s.state), SOFTMAXLIB_OK);
  cuts.push_back(static_cast<int64_t>(x.size()) / item);
  const auto for_chunks = [&](auto f) {
    int64_t start = 0;
    for (const int64_t stop : cuts) {
      f(start, stop - start);
      start = stop;
    }
  };
  for_chunks([&](int64_t start, int64_t n) {
    const auto chunk = row_of(x.data() + start * item, dtype, &n);
    softmaxlib_state own = s.state;
    if (merging) {
      EXPECT_EQ(softmaxlib_state_begin(function, dtype, 1, &own), SOFTMAXLIB_OK);
    }
    EXPECT_EQ(softmaxlib_state_update(&chunk, &own, 0, nullptr, &o), SOFTMAXLIB_OK);
    if (merging) {
      EXPECT_EQ(softmaxlib_state_merge(1, &s.state, &own), SOFTMAXLIB_OK);
    } else {
      s.state = own;
    }
  });
  EXPECT_EQ(softmaxlib_state_finish(1, &s.state, &s.log_sum), SOFTMAXLIB_OK);
  if (function == SOFTMAXLIB_LOGSUMEXP) return s;
  for_chunks([&](int64_t start, int64_t n) {
    const auto chunk = row_of(x.data() + start * item, dtype, &n);
    const auto out = row_of(s.y.data() + start * item, dtype, &n);
    EXPECT_EQ(softmaxlib_state_scale(&chunk, &out, &s.state, 0, nullptr, &o), SOFTMAXLIB_OK);
  });
  return s;
}

// NaNs are one.
bool same_values(const std::vector<char>& a, const std::vector<char>& b, softmaxlib_dtype dtype,
                 double ulps) {
  const Format format = format_of(dtype);
  const int64_t item = item_size_of(dtype);
  for (size_t i = 0; i < a.size(); i += static_cast<size_t>(item)) {
    const Real u = decode(dtype, a.data() + i), v = decode(dtype, b.data() + i);
    if (u == v || (u != u && v != v)) continue;
    if (u != u || v != v || std::isinf(u) || std::isinf(v)) return false;
    if (std::fabs(u - v) / std::min(ulp_of(u, format), ulp_of(v, format)) > ulps) return false;
  }
  return true;
}

struct State : testing::TestWithParam<softmaxlib_isa> {};

TEST_P(State, WholeBlocksGiveTheSameBits) {
  const Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const Pattern pattern : {Pattern::kNormal, Pattern::kSpike, Pattern::kMasked,
                                  Pattern::kRising, Pattern::kFalling}) {
      if (GetParam() == SOFTMAXLIB_ISA_SCALAR && dtype == SOFTMAXLIB_F64) continue;  // slow
      const int64_t n = 2 * SOFTMAXLIB_STATE_CHUNK + 777;
      const auto x = encode_all(make_row(pattern, n, dtype, 5), dtype);
      for (const softmaxlib_function function : functions()) {
        const auto want = row_result(function, dtype, x, o);
        for (const auto& cuts :
             std::vector<std::vector<int64_t>>{{},
                                               {SOFTMAXLIB_STATE_CHUNK},
                                               {SOFTMAXLIB_STATE_CHUNK, 2 * SOFTMAXLIB_STATE_CHUNK},
                                               {2 * SOFTMAXLIB_STATE_CHUNK}}) {
          const Streamed got = stream_row(function, dtype, x, cuts, o);
          SCOPED_TRACE(std::string(kFunctionNames[function]) + " " + kDtypeNames[dtype]);
          if (function == SOFTMAXLIB_LOGSUMEXP) {
            std::vector<char> narrow(want.size());
            encode(dtype == SOFTMAXLIB_F64 ? got.log_sum : static_cast<float>(got.log_sum), dtype,
                   narrow.data());
            EXPECT_EQ(narrow, want);
          } else {
            EXPECT_EQ(got.y, want);
          }
        }
      }
    }
}

TEST_P(State, AnyChunksStayWithinTheBounds) {
  const Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  std::mt19937 random(3);
  for (const softmaxlib_dtype dtype : {SOFTMAXLIB_F32, SOFTMAXLIB_F64})
    for (int p = 0; p < static_cast<int>(Pattern::kCount); ++p)
      for (const bool merging : {false, true}) {
        const int64_t n = 2000;
        const auto x = encode_all(make_row(static_cast<Pattern>(p), n, dtype, 7), dtype);
        std::vector<int64_t> cuts;
        for (int i = 0; i < 4; ++i) cuts.push_back(static_cast<int64_t>(random() % (n + 1)));
        std::sort(cuts.begin(), cuts.end());
        for (const softmaxlib_function function : kScaled) {
          const auto want = row_result(function, dtype, x, o);
          const Streamed got = stream_row(function, dtype, x, cuts, o, merging);
          EXPECT_TRUE(same_values(got.y, want, dtype, 6))
              << kFunctionNames[function] << " " << kDtypeNames[dtype] << " pattern " << p
              << (merging ? " merged" : " updated");
        }
        const auto lse = row_result(SOFTMAXLIB_LOGSUMEXP, dtype, x, o);
        for (const softmaxlib_function function : {SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_LOGSUMEXP}) {
          const double got = stream_row(function, dtype, x, cuts, o, merging).log_sum;
          const Real exact = decode(dtype, lse.data());
          if (exact != exact || std::isinf(exact)) continue;
          EXPECT_LE(std::fabs(Real{got} - exact),
                    std::max(Real{3} * ulp_of(exact, format_of(dtype)),
                             Real{dtype == SOFTMAXLIB_F64 ? 0x1p-50 : 0x1p-22}))
              << kFunctionNames[function] << " pattern " << p;
        }
      }
}

// Chunks of which each is far from the others, in every order.
TEST_P(State, FarApart) {
  const Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  for (const softmaxlib_dtype dtype : {SOFTMAXLIB_F32, SOFTMAXLIB_F64}) {
    std::vector<double> tops = {-1e30,   -50000, -32768.5, 0,    32767.5,
                                32768.5, 32770,  50000,    1e30, -kInf};
    for (const double a : tops)
      for (const double b : tops)
        for (const double c : {a, b, 0.0}) {
          const std::vector<double> values = {a, a - 1, a - 2, b, b - 1.5, c - 3, c};
          const auto x = encode_all(values, dtype);
          for (const softmaxlib_function function : kScaled) {
            const auto want = row_result(function, dtype, x, o);
            for (const bool merging : {false, true})
              EXPECT_TRUE(
                  same_values(stream_row(function, dtype, x, {3, 5}, o, merging).y, want, dtype, 6))
                  << kFunctionNames[function] << " " << kDtypeNames[dtype] << " " << a << " " << b
                  << " " << c << (merging ? " merged" : " updated");
          }
        }
  }
}

TEST_P(State, SpecialValues) {
  const Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const auto& values : std::vector<std::vector<double>>{{1, kNaN, 2},
                                                               {kNaN, 1, 2},
                                                               {kInf, 1, 2},
                                                               {1, 2, kInf},
                                                               {-kInf, -kInf, -kInf},
                                                               {-kInf, 4, -kInf},
                                                               {kInf, kNaN, 1},
                                                               {5},
                                                               {-kInf},
                                                               {7e4, kNaN, 1}}) {
      const auto x = encode_all(values, dtype);
      const auto n = static_cast<int64_t>(values.size());
      for (const softmaxlib_function function : kScaled)
        for (const auto& cuts : std::vector<std::vector<int64_t>>{{}, {0}, {n / 2}, {n - 1, n}})
          EXPECT_TRUE(same_values(stream_row(function, dtype, x, cuts, o).y,
                                  row_result(function, dtype, x, o), dtype, 1))
              << kFunctionNames[function] << " " << values[0] << " of " << n;
      const Real want = decode(dtype, row_result(SOFTMAXLIB_LOGSUMEXP, dtype, x, o).data());
      const double got = stream_row(SOFTMAXLIB_LOGSUMEXP, dtype, x, {n / 2}, o).log_sum;
      EXPECT_TRUE(want != want       ? got != got
                  : std::isinf(want) ? Real{got} == want
                                     : std::fabs(got - want) < 0.1)
          << got;
    }
}

// Many rows, strided, with options and threads: as softmaxlib_run on them.
TEST_P(State, RowsWithOptions) {
  const int64_t batch = 3, n = 64, columns = 5, shape[] = {batch, n, columns};
  std::vector<float> x(static_cast<size_t>(batch * n * columns)), want(x.size()), y(x.size());
  const auto values = make_row(Pattern::kWide, static_cast<int64_t>(x.size()), SOFTMAXLIB_F32, 1);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(values[i]);
  const double temperatures[] = {0.5, 2, 3};
  const int64_t per_batch[] = {batch, 1, 1};
  const softmaxlib_array t = {const_cast<double*>(temperatures), SOFTMAXLIB_F64, 3, per_batch,
                              nullptr};
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  o.temperatures = &t;
  const softmaxlib_array xa = {x.data(), SOFTMAXLIB_F32, 3, shape, nullptr};
  const softmaxlib_array wa = {want.data(), SOFTMAXLIB_F32, 3, shape, nullptr};
  const softmaxlib_array ya = {y.data(), SOFTMAXLIB_F32, 3, shape, nullptr};
  const int32_t axis = -2;
  ASSERT_EQ(run_array(SOFTMAXLIB_SOFTMAX, xa, wa, 1, &axis, o), SOFTMAXLIB_OK);
  std::vector<softmaxlib_state> states(static_cast<size_t>(batch * columns));
  ASSERT_EQ(
      softmaxlib_state_begin(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, batch * columns, states.data()),
      SOFTMAXLIB_OK);
  ASSERT_EQ(softmaxlib_state_update(&xa, states.data(), 1, &axis, &o), SOFTMAXLIB_OK);
  ASSERT_EQ(softmaxlib_state_scale(&xa, &ya, states.data(), 1, &axis, &o), SOFTMAXLIB_OK);
  EXPECT_EQ(y, want);
}

// Maxima that rise from chunk to chunk, far from 0: no loss that grows with their number.
TEST_P(State, ManyRisingChunks) {
  constexpr int64_t kChunks = 3000;
  std::vector<double> x;
  for (int64_t i = 0; i < kChunks; ++i) x.push_back(40000 + static_cast<double>(i) / kChunks);
  const auto bytes = encode_all(x, SOFTMAXLIB_F64);
  const Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  std::vector<int64_t> cuts;
  for (int64_t i = 1; i < kChunks; ++i) cuts.push_back(i);
  EXPECT_TRUE(same_values(stream_row(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F64, bytes, cuts, o).y,
                          row_result(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F64, bytes, o), SOFTMAXLIB_F64,
                          6));
}

// A bias can take a maximum between two floats.
TEST_P(State, ShiftsBetweenFloats) {
  const int64_t n = 1;
  const float x = 100000, bias = 0.0039f;
  const auto xa = row_of(&x, SOFTMAXLIB_F32, &n), ba = row_of(&bias, SOFTMAXLIB_F32, &n);
  Options plain(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO), biased = plain;
  biased.bias = &ba;
  softmaxlib_state s;
  ASSERT_EQ(softmaxlib_state_begin(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, 1, &s), SOFTMAXLIB_OK);
  ASSERT_EQ(softmaxlib_state_update(&xa, &s, 0, nullptr, &biased), SOFTMAXLIB_OK);
  ASSERT_EQ(softmaxlib_state_update(&xa, &s, 0, nullptr, &plain), SOFTMAXLIB_OK);
  float y = 0;
  const auto ya = row_of(&y, SOFTMAXLIB_F32, &n);
  ASSERT_EQ(softmaxlib_state_scale(&xa, &ya, &s, 0, nullptr, &plain), SOFTMAXLIB_OK);
  EXPECT_NEAR(y, 1 / (1 + std::exp(double{bias})), 1e-7);
}

TEST_P(State, SinkOfAnEmptyChunk) {
  const int64_t none = 0, one = 1;
  const float x = 0, sink = 3;
  const auto xa = row_of(&x, SOFTMAXLIB_F32, &none), sa = row_of(&sink, SOFTMAXLIB_F32, &one);
  Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
  o.sinks = &sa;
  softmaxlib_state s;
  double log_sum;
  ASSERT_EQ(softmaxlib_state_begin(SOFTMAXLIB_LOGSUMEXP, SOFTMAXLIB_F32, 1, &s), SOFTMAXLIB_OK);
  ASSERT_EQ(softmaxlib_state_update(&xa, &s, 0, nullptr, &o), SOFTMAXLIB_OK);
  ASSERT_EQ(softmaxlib_state_finish(1, &s, &log_sum), SOFTMAXLIB_OK);
  EXPECT_EQ(log_sum, sink);
}

// Which is all that scratch may change.
TEST_P(State, StridedRowsAreFasterWithScratch) {
  constexpr int64_t kN = 1500, kRows = 37;
  std::vector<float> x(kN * kRows), with(x.size()), without(x.size());
  std::mt19937 random(7);
  std::normal_distribution<float> normal(0, 5);
  for (float& v : x) v = normal(random);
  const int64_t shape[] = {kN, kRows};
  const int32_t axis = 0;
  const softmaxlib_array xa = {x.data(), SOFTMAXLIB_F32, 2, shape, nullptr};
  alignas(64) static char scratch[256 * (kN + 64)];
  for (const softmaxlib_function function : {SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_LOG_STABLEMAX}) {
    std::vector<softmaxlib_state> states[2];
    for (const bool has : {false, true}) {
      Options o(GetParam(), SOFTMAXLIB_ALGORITHM_AUTO);
      o.temperature = 0.7;
      o.scratch = has ? scratch : nullptr;
      o.scratch_size = has ? sizeof(scratch) : 0;
      auto& s = states[has];
      s.resize(kRows);
      const softmaxlib_array out = {(has ? with : without).data(), SOFTMAXLIB_F32, 2, shape,
                                    nullptr};
      ASSERT_EQ(softmaxlib_state_begin(function, SOFTMAXLIB_F32, kRows, s.data()), SOFTMAXLIB_OK);
      ASSERT_EQ(softmaxlib_state_update(&xa, s.data(), 1, &axis, &o), SOFTMAXLIB_OK);
      ASSERT_EQ(softmaxlib_state_scale(&xa, &out, s.data(), 1, &axis, &o), SOFTMAXLIB_OK);
    }
    EXPECT_EQ(memcmp(states[0].data(), states[1].data(), kRows * sizeof(softmaxlib_state)), 0);
    EXPECT_EQ(memcmp(with.data(), without.data(), with.size() * sizeof(float)), 0);
  }
}

// What a state of one ISA is, it is on every other.
TEST(StateBytes, SameOnEveryIsa) {
  for (const softmaxlib_dtype dtype : {SOFTMAXLIB_F32, SOFTMAXLIB_F64})
    for (const softmaxlib_function function : functions())
      for (const Pattern pattern : {Pattern::kWide, Pattern::kFarAbove, Pattern::kFarBelow}) {
        const auto x = encode_all(make_row(pattern, 3000, dtype, 2), dtype);
        std::vector<softmaxlib_state> states;
        for (const softmaxlib_isa isa : isas())
          states.push_back(
              stream_row(function, dtype, x, {100, 1777}, Options(isa, SOFTMAXLIB_ALGORITHM_AUTO))
                  .state);
        for (const auto& s : states)
          EXPECT_EQ(memcmp(&s, &states[0], sizeof(s)), 0)
              << kFunctionNames[function] << " " << kDtypeNames[dtype];
      }
}

// Bytes may come from anywhere.
TEST(StateBytes, DamagedOnesAreRefused) {
  softmaxlib_state good;
  ASSERT_EQ(softmaxlib_state_begin(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, 1, &good), SOFTMAXLIB_OK);
  const float x[] = {1, 2};
  const int64_t n = 2;
  const auto array = row_of(x, SOFTMAXLIB_F32, &n);
  const auto refused = [&](auto damage) {
    softmaxlib_state s = good;
    damage(s);
    softmaxlib_state into = good;
    double log_sum;
    return softmaxlib_state_update(&array, &s, 0, nullptr, nullptr) == SOFTMAXLIB_ERROR_STATE &&
           softmaxlib_state_merge(1, &into, &s) == SOFTMAXLIB_ERROR_STATE &&
           softmaxlib_state_finish(1, &s, &log_sum) == SOFTMAXLIB_ERROR_STATE;
  };
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.version = 2; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.function = 77; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.dtype = SOFTMAXLIB_F16; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.special = 3; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.reference = INT32_MIN; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.sum = kNaN; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.sum = -1; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.error = kInf; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.largest = kNaN; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.shift = kInf; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.count = -1; }));
  EXPECT_TRUE(refused([](softmaxlib_state& s) { s.reserved = 1; }));

  softmaxlib_state other;
  ASSERT_EQ(softmaxlib_state_begin(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F64, 1, &other), SOFTMAXLIB_OK);
  EXPECT_EQ(softmaxlib_state_merge(1, &other, &good), SOFTMAXLIB_ERROR_STATE);
  float y[2];
  const auto out = row_of(y, SOFTMAXLIB_F32, &n);
  EXPECT_EQ(softmaxlib_state_scale(&array, &out, &other, 0, nullptr, nullptr),
            SOFTMAXLIB_ERROR_STATE);
  ASSERT_EQ(softmaxlib_state_begin(SOFTMAXLIB_LOGSUMEXP, SOFTMAXLIB_F32, 1, &other), SOFTMAXLIB_OK);
  EXPECT_EQ(softmaxlib_state_scale(&array, &out, &other, 0, nullptr, nullptr),
            SOFTMAXLIB_ERROR_FUNCTION);
  EXPECT_EQ(softmaxlib_state_begin(9, SOFTMAXLIB_F32, 1, &other), SOFTMAXLIB_ERROR_FUNCTION);
  EXPECT_EQ(softmaxlib_state_begin(0, SOFTMAXLIB_I8, 1, &other), SOFTMAXLIB_ERROR_DTYPE);
  EXPECT_EQ(softmaxlib_state_begin(0, SOFTMAXLIB_F32, 1, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_state_begin(0, SOFTMAXLIB_F32, -1, &other), SOFTMAXLIB_ERROR_SHAPE);
}

INSTANTIATE_TEST_SUITE_P(Isas, State, testing::ValuesIn(isas()),
                         [](const auto& run) { return softmaxlib_isa_name(run.param); });

}  // namespace
}  // namespace softmaxlib::test
