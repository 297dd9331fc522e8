// The contract's accuracy table, with its numbers.
#include <stdio.h>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

// The best ISA; test_kernels shows that the others return the same bits.
Errors measure(softmaxlib_function function, softmaxlib_dtype dtype,
               const std::vector<double>& row) {
  Errors errors;
  const auto x = encode_all(row, dtype);
  const auto y = row_result(function, dtype, x, Options());
  const int64_t n = static_cast<int64_t>(row.size());
  EXPECT_TRUE(accurate(function, dtype, exact_row(function, decode_all(x.data(), n, dtype)),
                       decode_all(y.data(), result_elements(function, n), dtype), &errors));
  return errors;
}

std::vector<double> logits(int64_t n, double sigma, uint32_t seed) {
  std::vector<double> row = make_row(Pattern::kNormal, n, SOFTMAXLIB_F64, seed);
  for (double& x : row) x *= sigma;
  return row;
}

TEST(Accuracy, NormalLogits) {
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes) {
      Errors worst;
      Real worst_mean = 0;
      for (const double sigma : {0.1, 1.0, 5.0, 30.0, 100.0})
        for (const int64_t n : {100, 1000, 20000, 300000}) {
          if (n > 20000 && (sigma != 5 || dtype != SOFTMAXLIB_F32)) continue;
          const Errors e = measure(function, dtype, logits(n, sigma, static_cast<uint32_t>(n)));
          worst.worst = std::max(worst.worst, e.worst);
          worst_mean = std::max(worst_mean, e.mean());
          if (function == SOFTMAXLIB_SOFTMAX) {
            // Of one row: the error of its sum is in all of them.
            EXPECT_LE(e.mean(), dtype == SOFTMAXLIB_F64 ? 2 : 1) << sigma << " " << n;
          }
        }
      printf("  %-14s %-5s max %.3f ULP, mean at most %.3f\n", kFunctionNames[function],
             kDtypeNames[dtype], static_cast<double>(worst.worst), static_cast<double>(worst_mean));
    }
}

TEST(Accuracy, LongRowSumsToOne) {
  const int64_t n = int64_t{1} << 22;
  const auto row = logits(n, 5, 1);
  const auto x = encode_all(row, SOFTMAXLIB_F32);
  const auto y = row_result(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x, Options());
  Real sum = 0;
  for (const Real p : decode_all(y.data(), n, SOFTMAXLIB_F32)) sum += p;
  EXPECT_NEAR(static_cast<double>(sum), 1, 1e-6);
  Errors errors;
  EXPECT_TRUE(accurate(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32,
                       exact_row(SOFTMAXLIB_SOFTMAX, decode_all(x.data(), n, SOFTMAXLIB_F32)),
                       decode_all(y.data(), n, SOFTMAXLIB_F32), &errors));
  EXPECT_LE(errors.mean(), 1);
}

// One element ahead of the others by every gap: the logarithms are near 0, relative accuracy stays.
TEST(Accuracy, Saturation) {
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const double top : {0.0, 3.75, -200.0, 1000.0})
        for (double gap = 0; gap < 800; gap = gap * 1.07 + 0.01)
          for (const int64_t n : {2, 5, 33}) {
            std::vector<double> row(static_cast<size_t>(n), top - gap);
            row[static_cast<size_t>(n / 2)] = top;
            measure(function, dtype, row);
            ASSERT_FALSE(HasFailure()) << "gap " << gap << " top " << top;
          }
}

// logsumexp where the maximum and the logarithm of the sum cancel.
TEST(Accuracy, LogSumExpNearZero) {
  std::mt19937_64 random(8);
  std::uniform_real_distribution<double> off(-1e-3, 1e-3);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (int64_t n = 1; n < 600; ++n) {
      std::vector<double> row(static_cast<size_t>(n));
      for (double& x : row) x = off(random) - std::log(static_cast<double>(n));
      measure(SOFTMAXLIB_LOGSUMEXP, dtype, row);
      ASSERT_FALSE(HasFailure()) << n;
    }
}

// StableMax of arguments at both ends of the range, whose sums or terms leave it.
TEST(Accuracy, StableMaxRange) {
  for (const softmaxlib_function function : {SOFTMAXLIB_STABLEMAX, SOFTMAXLIB_LOG_STABLEMAX})
    for (const softmaxlib_dtype dtype : kFloatTypes) {
      const double big = format_of(dtype).largest;
      for (const int64_t n : {2, 17, 3000})
        for (const double scale : {1.0, 0.5, 1e-3, 1e-6, 0x1p-60})
          for (const int signs : {1, -1, 0}) {
            std::vector<double> row = make_row(Pattern::kNormal, n, SOFTMAXLIB_F64, 6);
            for (double& x : row) {
              x = std::min(std::max(x, -3.0), 3.0) / 3 * big * scale;
              if (signs) x = signs * std::fabs(x);
            }
            measure(function, dtype, row);
            ASSERT_FALSE(HasFailure()) << "n " << n << " scale " << scale << " signs " << signs;
          }
    }
}

// The bounds stated in math/exp.hpp, in 1024 places over all floats; softmaxlib verify has them
// all.
TEST(Accuracy, ExpAlone) {
  for (const bool precise : {false, true})
    for (uint32_t place = 0; place < 1024; ++place) {
      const uint32_t first = place << 22 | (place * 2654435761u & 0x3ff000u);
      uint64_t checksum = 0;
      for (const softmaxlib_isa isa : isas()) {
        ExpSweep sweep;
        ASSERT_TRUE(exp_sweep(isa, precise, first, 4096, &sweep));
        ASSERT_LE(sweep.max_ulp, precise ? 0.15 : 1.18) << std::hex << sweep.worst;
        if (isa == isas().front()) checksum = sweep.checksum;
        ASSERT_EQ(sweep.checksum, checksum) << softmaxlib_isa_name(isa) << std::hex << first;
      }
    }
}

}  // namespace
}  // namespace softmaxlib::test
