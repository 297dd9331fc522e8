// Every kernel of the registry on every ISA: the same bits, the right numbers, no byte out of
// place.
#include <xmmintrin.h>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

// Lengths around every edge of lanes, groups, chunks and blocks.
std::vector<int64_t> small_lengths() {
  std::vector<int64_t> lengths;
  for (int64_t n = 0; n <= 4 * 16 + 1; ++n) lengths.push_back(n);
  return lengths;
}
std::vector<int64_t> edge_lengths(softmaxlib_dtype dtype) {
  const int64_t lanes = dtype == SOFTMAXLIB_F64 ? 8 : 16, block = block_elements(dtype);
  std::vector<int64_t> lengths;
  for (const int64_t edge : {kVectorsPerGroup * lanes, chunk_elements(dtype),
                             2 * chunk_elements(dtype), block, 2 * block, int64_t{65536}})
    for (const int64_t off : {-lanes, int64_t{-1}, int64_t{0}, int64_t{1}, lanes})
      lengths.push_back(edge + off);
  return lengths;
}

// Runs check(function, dtype, algorithm, isa) for every kernel on every ISA.
template <class Check>
void for_kernels(Check check) {
  for (const KernelId& k : kernels())
    for (const softmaxlib_isa isa : isas()) {
      SCOPED_TRACE(k.name + " on " + softmaxlib_isa_name(isa));
      check(k, isa);
      if (testing::Test::HasFatalFailure()) return;
    }
}

// The row's result by one kernel on the scalar leaf.
std::vector<char> baseline(softmaxlib_function function, softmaxlib_dtype dtype,
                           const std::vector<char>& x) {
  return row_result(function, dtype, x,
                    Options(SOFTMAXLIB_ISA_SCALAR, algorithms_of(function, dtype).front()));
}

TEST(Kernels, ForcedKernelReallyRuns) {
  for_kernels([](const KernelId& k, softmaxlib_isa isa) {
    for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING}) {
      softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
      Options o(isa, k.algorithm, store);
      o.report = &report;
      row_result(k.function, k.dtype,
                 encode_all(make_row(Pattern::kNormal, 100, k.dtype, 1), k.dtype), o);
      ASSERT_EQ(report.isa, isa);
      ASSERT_EQ(report.algorithm, k.algorithm);
      ASSERT_EQ(report.kernel, k.name);
      ASSERT_EQ(report.tasks, 1);
      const bool streams = store == SOFTMAXLIB_STORE_STREAMING && isa != SOFTMAXLIB_ISA_SCALAR &&
                           k.function != SOFTMAXLIB_LOGSUMEXP;
      ASSERT_EQ(report.store, streams ? SOFTMAXLIB_STORE_STREAMING : SOFTMAXLIB_STORE_PLAIN);
    }
  });
}

// Same bits over ISAs, algorithms and stores, and those within the contract's bounds.
void check_row(softmaxlib_function function, softmaxlib_dtype dtype, Pattern pattern, int64_t n) {
  SCOPED_TRACE(std::string(kFunctionNames[function]) + " " + kDtypeNames[dtype] + " pattern " +
               std::to_string(static_cast<int>(pattern)) + " n " + std::to_string(n));
  const auto x = encode_all(make_row(pattern, n, dtype, static_cast<uint32_t>(n)), dtype);
  const auto wanted = baseline(function, dtype, x);
  for (const softmaxlib_isa isa : isas())
    for (const softmaxlib_algorithm algorithm : algorithms_of(function, dtype))
      for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING}) {
        const Options o(isa, algorithm, store);
        ASSERT_TRUE(same_bits(row_result(function, dtype, x, o), wanted, dtype)) << describe(o);
      }
  const auto exact = exact_row(function, decode_all(x.data(), n, dtype));
  const auto actual = decode_all(wanted.data(), result_elements(function, n), dtype);
  ASSERT_TRUE(accurate(function, dtype, exact, actual));
}

class Bits : public testing::TestWithParam<softmaxlib_function> {};

TEST_P(Bits, SmallRows) {
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (int p = 0; p < static_cast<int>(Pattern::kCount); ++p)
      for (const int64_t n : small_lengths()) {
        check_row(GetParam(), dtype, static_cast<Pattern>(p), n);
        if (HasFatalFailure()) return;
      }
}

TEST_P(Bits, Edges) {
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    int turn = 0;  // long rows share the patterns among them
    for (const int64_t n : edge_lengths(dtype))
      for (int p = 0; p < static_cast<int>(Pattern::kCount); ++p) {
        if (n > 5000 && (p + turn++) % 4) continue;
        check_row(GetParam(), dtype, static_cast<Pattern>(p), n);
        if (HasFatalFailure()) return;
      }
  }
}

INSTANTIATE_TEST_SUITE_P(Functions, Bits, testing::ValuesIn(functions()),
                         [](const auto& test) { return std::string(kFunctionNames[test.param]); });

// x and out at both ends of memory that ends in faulting pages, at every misalignment.
TEST(Kernels, StayWithinTheirMemory) {
  Arena xs(1 << 16), ys(1 << 16);
  for_kernels([&](const KernelId& k, softmaxlib_isa isa) {
    const size_t item = static_cast<size_t>(item_size_of(k.dtype));
    for (const int64_t n : {1, 7, 8, 15, 16, 17, 31, 33, 65, 1041, 2049}) {
      const auto x = encode_all(make_row(Pattern::kWide, n, k.dtype, 5), k.dtype);
      const auto wanted = baseline(k.function, k.dtype, x);
      std::vector<size_t> gaps = {1, 3};
      for (size_t e = 0; e <= 16; ++e) gaps.push_back(e * item);
      for (const size_t gap : gaps)
        for (const Against side : {Against::kFront, Against::kBack})
          for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING}) {
            char* px = xs.place(x.size(), side, gap);
            memcpy(px, x.data(), x.size());
            // out misaligned like x, or its own way
            char* py = ys.place(wanted.size(), side, gap % 5 ? gap : 0);
            const Options o(isa, k.algorithm, store);
            ASSERT_EQ(run_rows(k.function, k.dtype, px, py, 1, n, o), SOFTMAXLIB_OK);
            ASSERT_TRUE(same_bits(py, wanted.data(), wanted.size(), k.dtype))
                << n << " gap " << gap;
            ASSERT_FALSE(memcmp(px, x.data(), x.size())) << "x was written to";
            ASSERT_TRUE(xs.intact() && ys.intact()) << n << " gap " << gap;
            if (k.function == SOFTMAXLIB_LOGSUMEXP) continue;
            ASSERT_EQ(run_rows(k.function, k.dtype, px, px, 1, n, o), SOFTMAXLIB_OK);
            ASSERT_TRUE(same_bits(px, wanted.data(), wanted.size(), k.dtype)) << n << " in place";
            ASSERT_TRUE(xs.intact()) << n << " in place, gap " << gap;
          }
    }
  });
}

// In place, with rows for which the stored exponentials of a first attempt would be lost.
TEST(Kernels, InPlaceSurvivesASecondAttempt) {
  for_kernels([](const KernelId& k, softmaxlib_isa isa) {
    if (k.function == SOFTMAXLIB_LOGSUMEXP) return;
    for (const int64_t n : {5, 70, 1500, 66000})
      for (const Pattern p : {Pattern::kHuge, Pattern::kFarAbove, Pattern::kFarBelow,
                              Pattern::kSteep, Pattern::kMasked, Pattern::kEveryMagnitude}) {
        auto x = encode_all(make_row(p, n, k.dtype, 9), k.dtype);
        const auto wanted = baseline(k.function, k.dtype, x);
        for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING}) {
          auto y = x;
          ASSERT_EQ(run_rows(k.function, k.dtype, y.data(), y.data(), 1, n,
                             Options(isa, k.algorithm, store)),
                    SOFTMAXLIB_OK);
          ASSERT_TRUE(same_bits(y, wanted, k.dtype)) << n << " pattern " << static_cast<int>(p);
        }
      }
  });
}

// A row's bits do not depend on its neighbours, not on NaN or infinite ones either.
TEST(Kernels, RowsAreIndependent) {
  for_kernels([](const KernelId& k, softmaxlib_isa isa) {
    for (const int64_t n : {1, 3, 17, 130}) {
      std::vector<char> x, wanted;
      constexpr int64_t kRows = 2 * static_cast<int64_t>(Pattern::kCount);
      for (int64_t r = 0; r < kRows; ++r) {
        auto row = make_row(static_cast<Pattern>(r / 2), n, k.dtype, static_cast<uint32_t>(r));
        if (r % 5 == 3) row[static_cast<size_t>(n / 2)] = r % 2 ? kNaN : kInf;
        const auto bytes = encode_all(row, k.dtype);
        const auto y = baseline(k.function, k.dtype, bytes);
        x.insert(x.end(), bytes.begin(), bytes.end());
        wanted.insert(wanted.end(), y.begin(), y.end());
      }
      std::vector<char> y(wanted.size());
      ASSERT_EQ(
          run_rows(k.function, k.dtype, x.data(), y.data(), kRows, n, Options(isa, k.algorithm)),
          SOFTMAXLIB_OK);
      ASSERT_TRUE(same_bits(y, wanted, k.dtype)) << n;
    }
  });
}

// Where rows lie: bytes between two of them in x and in y.
struct Layout {
  int64_t x_gap, y_gap;
  bool in_place, backwards;
};

// The kernels that take many rows at a time, picked by `auto`, against one row at a time: any
// number of rows, next to each other or not, with rows among them that need a path of their own;
// not a byte read or written outside of the rows.
TEST(Kernels, ManyRowsAtOnce) {
  constexpr int64_t kRows = 40;
  Arena xs(1 << 18), ys(1 << 18);
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    const int64_t item = item_size_of(dtype);
    std::vector<std::string> kernels;
    for (const int64_t n : {1,  2,  3,  4,  5,  7,  8,  9,   13,  15,  16,  17,  24,  31,  32,
                            33, 45, 48, 62, 63, 64, 65, 100, 127, 128, 130, 255, 256, 300, 512}) {
      const size_t bytes = static_cast<size_t>(n * item);
      std::vector<char> x, wanted;
      for (int64_t r = 0; r < kRows; ++r) {
        const int kind = static_cast<int>(r % 25 < 8 ? 0 : r % static_cast<int>(Pattern::kCount));
        auto row = make_row(static_cast<Pattern>(kind), n, dtype, static_cast<uint32_t>(r));
        if (r % 13 == 9) row[static_cast<size_t>(r % n)] = r % 2 ? kNaN : kInf;
        if (r % 17 == 11) row.assign(static_cast<size_t>(n), -kInf);
        const auto encoded = encode_all(row, dtype);
        const auto y = baseline(SOFTMAXLIB_SOFTMAX, dtype, encoded);
        x.insert(x.end(), encoded.begin(), encoded.end());
        wanted.insert(wanted.end(), y.begin(), y.end());
      }
      const auto check = [&](softmaxlib_isa isa, softmaxlib_store store, const Layout& layout,
                             int64_t first, int64_t rows, size_t gap) {
        const int64_t x_stride = n * item + layout.x_gap;
        const int64_t y_stride = n * item + (layout.in_place ? layout.x_gap : layout.y_gap);
        const auto row_at = [&](char* p, int64_t stride, int64_t r) {
          return p + (layout.backwards ? rows - 1 - r : r) * stride;
        };
        const auto side = gap % 2 ? Against::kFront : Against::kBack;
        char* const px = xs.place(static_cast<size_t>((rows - 1) * x_stride) + bytes, side, gap);
        char* const py =
            layout.in_place
                ? px
                : ys.place(static_cast<size_t>((rows - 1) * y_stride) + bytes, side, 3 * gap);
        for (int64_t r = 0; r < rows; ++r)
          memcpy(row_at(px, x_stride, r), x.data() + (first + r) * n * item, bytes);
        const int64_t shape[] = {rows, n};
        const int64_t x_strides[] = {layout.backwards ? -x_stride : x_stride, item};
        const int64_t y_strides[] = {layout.backwards ? -y_stride : y_stride, item};
        const softmaxlib_array xa = {row_at(px, x_stride, 0), dtype, 2, shape, x_strides};
        const softmaxlib_array ya = {row_at(py, y_stride, 0), dtype, 2, shape, y_strides};
        const int32_t axis = 1;
        softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
        Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO, store);
        o.report = &report;
        ASSERT_EQ(run_array(SOFTMAXLIB_SOFTMAX, xa, ya, 1, &axis, o), SOFTMAXLIB_OK);
        kernels.push_back(report.kernel);
        for (int64_t r = 0; r < rows; ++r) {
          const int64_t at = (first + r) * n * item;
          ASSERT_TRUE(same_bits(row_at(py, y_stride, r), wanted.data() + at, bytes, dtype))
              << "row " << r << " by " << report.kernel;
          if (layout.in_place) continue;
          ASSERT_FALSE(memcmp(row_at(px, x_stride, r), x.data() + at, bytes)) << "x was written to";
        }
        for (int64_t r = 0; r + 1 < rows; ++r)
          for (int64_t i = n * item; i < y_stride; ++i)
            ASSERT_EQ(py[r * y_stride + i], 0x5a) << "gap";
        ASSERT_TRUE(xs.intact() && ys.intact());
      };
      for (const softmaxlib_isa isa : isas())
        for (const int64_t rows : {1, 2, 7, 8, 9, 15, 16, 17, 33, 40})
          for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING})
            for (const Layout& layout :
                 {Layout{0, 0, false, false}, Layout{0, 0, true, false},
                  Layout{3 * item, 0, false, false}, Layout{0, 5, false, false},
                  Layout{item, item, true, true}, Layout{1, 64, false, true}})
              for (const size_t gap : {size_t{0}, size_t{1}, static_cast<size_t>(4 * item)}) {
                SCOPED_TRACE(std::string(softmaxlib_isa_name(isa)) + " " + kDtypeNames[dtype] +
                             " " + std::to_string(rows) + " rows of " + std::to_string(n) +
                             " gaps " + std::to_string(layout.x_gap) + " " +
                             std::to_string(layout.y_gap) + (layout.in_place ? " in place" : "") +
                             " at " + std::to_string(gap));
                check(isa, store, layout, (rows * 7 + n) % (kRows - rows + 1), rows, gap);
                if (HasFatalFailure()) return;
              }
    }
    for (const char* schedule : {"in_lanes", "batched"})
      ASSERT_TRUE(isas().front() == SOFTMAXLIB_ISA_SCALAR ||  // which has none of them
                  std::any_of(kernels.begin(), kernels.end(),
                              [&](const std::string& name) {
                                return name == std::string("softmax_") + schedule + "_" +
                                                   kDtypeNames[dtype];
                              }))
          << schedule;
  }
}

// The contract's table of special values, with the special element everywhere in turn.
TEST(Kernels, SpecialValues) {
  for_kernels([](const KernelId& k, softmaxlib_isa isa) {
    const bool logarithm =
        k.function == SOFTMAXLIB_LOG_SOFTMAX || k.function == SOFTMAXLIB_LOG_STABLEMAX;
    const bool reduces = k.function == SOFTMAXLIB_LOGSUMEXP;
    const auto result = [&](const std::vector<double>& row) {
      const auto bytes = encode_all(row, k.dtype);
      const auto y = row_result(k.function, k.dtype, bytes, Options(isa, k.algorithm));
      return decode_all(y.data(), static_cast<int64_t>(y.size()) / item_size_of(k.dtype), k.dtype);
    };
    const auto all_nan = [](const std::vector<Real>& y) {
      return std::all_of(y.begin(), y.end(), [](Real v) { return v != v; });
    };
    const auto shown = [&](const std::vector<double>& row) {
      return reduces ? "row of " + std::to_string(row.size())
                     : "elementwise " + std::to_string(row.size());
    };

    // Length 0.
    const auto empty = result({});
    if (reduces) ASSERT_EQ(empty.at(0), -kInf);
    else ASSERT_TRUE(empty.empty());

    // A single finite element.
    for (const double x : {0.0, -0.0, 1.0, -1.0, 88.5, -3e4, 3e4, 1e-7, format_of(k.dtype).largest,
                           -format_of(k.dtype).largest}) {
      const auto y = result({x});
      const Real self = decode(k.dtype, encode_all({x}, k.dtype).data());
      ASSERT_EQ(y.at(0), reduces ? self : Real(logarithm ? 0 : 1)) << x;
    }

    for (const size_t n :
         {size_t{1}, size_t{2}, size_t{16}, size_t{17}, size_t{65}, size_t{1030}}) {
      // All -inf.
      std::vector<double> row(n, -kInf);
      if (reduces) ASSERT_EQ(result(row).at(0), -kInf) << shown(row);
      else ASSERT_TRUE(all_nan(result(row))) << shown(row);

      const size_t step = n > 70 ? 103 : 1;
      for (size_t i = 0; i < n; i += step) {
        // Any +inf; any NaN, of either sign; both; with -inf beside them.
        for (const double background : {0.5, -kInf}) {
          row.assign(n, background);
          row[i] = kInf;
          if (reduces) ASSERT_EQ(result(row).at(0), kInf) << shown(row) << " at " << i;
          else ASSERT_TRUE(all_nan(result(row))) << shown(row) << " at " << i;
          for (const double nan : {kNaN, -kNaN}) {
            row.assign(n, background);
            row[i] = nan;
            ASSERT_TRUE(all_nan(result(row))) << shown(row) << " at " << i;
            row[(i + n / 2) % n] = n > 1 ? kInf : nan;
            ASSERT_TRUE(all_nan(result(row))) << shown(row) << " at " << i;
          }
        }
        // One finite among -inf.
        row.assign(n, -kInf);
        row[i] = -2.5;
        const auto y = result(row);
        if (reduces) {
          ASSERT_EQ(y.at(0), -2.5L);
          continue;
        }
        for (size_t j = 0; j < n; ++j)
          ASSERT_EQ(y[j], j == i ? Real(logarithm ? 0 : 1) : Real(logarithm ? -kInf : 0))
              << i << " " << j;
      }
    }
  });
}

// The caller's floating-point environment neither matters nor changes.
TEST(Kernels, IgnoreTheCallersMxcsr) {
  const unsigned saved = _mm_getcsr();
  const unsigned settings[] = {
      saved | 0x8040u,               // flush to zero, denormals are zero
      (saved & ~0x6000u) | 0x2000u,  // round down
      (saved & ~0x6000u) | 0x4000u,  // round up
      saved | 0x6000u | 0x8040u,     // truncate, flushing too
  };
  for_kernels([&](const KernelId& k, softmaxlib_isa isa) {
    for (const Pattern p :
         {Pattern::kNormal, Pattern::kSubnormalResults, Pattern::kTiny, Pattern::kFarAbove}) {
      const auto x = encode_all(make_row(p, 150, k.dtype, 4), k.dtype);
      const auto wanted = baseline(k.function, k.dtype, x);
      for (const unsigned setting : settings) {
        std::vector<char> y(wanted.size());
        const Options o(isa, k.algorithm);
        const int64_t shape = 150;
        const softmaxlib_array xa = {const_cast<char*>(x.data()), k.dtype, 1, &shape, nullptr};
        const softmaxlib_array ya = {y.data(), k.dtype, k.function == SOFTMAXLIB_LOGSUMEXP ? 0 : 1,
                                     &shape, nullptr};
        _mm_setcsr(setting);
        const auto status = softmaxlib_run(k.function, &xa, &ya, 0, nullptr, &o);
        const unsigned after = _mm_getcsr();
        _mm_setcsr(saved);
        ASSERT_EQ(status, SOFTMAXLIB_OK);
        ASSERT_EQ(after, setting);
        ASSERT_TRUE(same_bits(y, wanted, k.dtype)) << std::hex << setting;
      }
    }
  });
}

}  // namespace
}  // namespace softmaxlib::test
