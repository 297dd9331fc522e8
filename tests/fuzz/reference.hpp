// What a plain call must return: the definitions in extended precision, independent of the
// library's own arithmetic, within the bounds that header, docstrings and docs/numerics.md state.
//
// What is judged, and how far:
// - Operands are decoded exactly; x is converted to the arithmetic's dtype (float, or double where
//   out is F64), as every docstring says. Arguments are made in 113 bits.
// - float: arguments may be off by 2^-48 of |x scale / temperature| + |bias| + |ALiBi|, a pair of
//   floats. The documents call that far below the last place, which it is up to some 2^20; beyond,
//   the bound is widened by just that.
// - double: exact, up to |x / temperature| + |bias| = 2^50 in every element of the row that counts;
//   beyond, off by 2^-51 of that sum.
// - Where an element's doubt is more than a binade or so, only that results are in [0, 1] and add
// up
//   to 1 is judged.
// - An argument beyond the range of double, or for stablemax beyond the range of the arithmetic,
//   counts as infinite. Where only a part of it (x scale / temperature, without the bias) is
//   beyond, the row is not judged.
// - f32 results are held to the bounds of "any row at all": 7, 5, 3.
#pragma once

#include <cmath>
#include <set>

#include "call.hpp"
#include "exact.hpp"

namespace softmaxlib::fuzz {

using test::decode;
using test::Distribution;
using test::Format;
using test::format_of;
using test::is_logarithm;
using test::is_stablemax;
using test::kInf;
using test::kNaN;
using test::Real;
using test::ulp_of;
using test::Wide;

inline bool is_half(softmaxlib_dtype dtype) {
  return dtype == SOFTMAXLIB_F16 || dtype == SOFTMAXLIB_BF16;
}
inline Real unit_of(softmaxlib_dtype dtype) {  // of relative errors: an ULP of 1
  return std::ldexp(Real{1}, 1 - format_of(dtype).digits);
}

// ---- Comparisons.

// `ulps` of the last place of `scale` in the arithmetic of `dtype`, rounded to it once more where
// that is a half.
inline Real tolerance_of(Real ulps, Real scale, softmaxlib_dtype dtype) {
  scale = std::fabs(scale);
  const Real of_half = is_half(dtype) ? (0.5L + 0x1p-10L) * ulp_of(scale, format_of(dtype)) : 0;
  return of_half > 0 ? of_half : ulps * ulp_of(scale, format_of(dtype));
}

inline std::string context;  // DEV
inline std::string text_of(Real x) {
  char text[64];
  snprintf(text, sizeof(text), "%.21Lg (%La)", x, x);
  return text;
}

// Whether a result is within `tolerance` of what it should be; past the largest number, infinite.
inline bool is_near(Real got, Real want, Real tolerance, softmaxlib_dtype dtype) {
  if (want != want || got != got) return want != want && got != got;
  if (got == want) return true;
  if (std::isinf(want)) return false;
  if (std::isinf(got)) {
    const Format f = format_of(dtype);
    return (got > 0) == (want > 0) &&
           std::fabs(want) + tolerance >= f.largest + ulp_of(f.largest, f) / 2;
  }
  return std::fabs(got - want) <= tolerance;
}
inline void require_near(Real got, Real want, Real tolerance, softmaxlib_dtype dtype,
                         const std::string& what, int64_t row, int64_t column = -1) {
  if (is_near(got, want, tolerance, dtype)) return;
  if (getenv("GO")) {  // DEV
    static std::set<std::string> seen;
    if (seen.insert(what + context).second)
      printf("MISMATCH %s %s row %lld col %lld got %s want %s ulps %.4Lg tol %.4Lg | %s\n", what.c_str(),
             test::kDtypeNames[dtype], (long long)row, (long long)column, text_of(got).c_str(),
             text_of(want).c_str(), std::fabs(got - want) / ulp_of(want, format_of(dtype)),
             tolerance / ulp_of(want, format_of(dtype)), context.c_str());
    return;
  }
  fail("value of " + what + ", row " + std::to_string(row) +
       (column < 0 ? "" : ", column " + std::to_string(column)) + ": got " + text_of(got) +
       ", want " + text_of(want) + ", off by " +
       text_of(std::fabs(got - want) / ulp_of(want, format_of(dtype))) + " ULP of " +
       test::kDtypeNames[dtype] + ", tolerance " +
       text_of(tolerance / ulp_of(want, format_of(dtype))));
}

// ---- Plain arrays: (others, queries, columns), contiguous or constant along columns.

struct Index {
  int64_t other, query, column;
};
inline const char* address(const softmaxlib_array& a, const Index& i) {
  return static_cast<const char*>(a.data) + i.other * a.strides[0] + i.query * a.strides[1] +
         i.column * a.strides[2];
}
inline Real value_at(const softmaxlib_array* a, const Index& i, Real missing) {
  return a ? decode(a->dtype, address(*a, i)) : missing;
}

// ---- Rows of arguments.

struct ReferenceRow {
  std::vector<Wide> z;
  std::vector<bool> in;
  std::vector<Real> doubt;  // of z, in units of the logarithm of its term
  Wide sink = -kInf;
  Real temperature = 1;  // DEV
  Real factor = 1;  // of x: scale / temperature
  bool judged = true;

  int64_t size() const { return static_cast<int64_t>(z.size()); }
  int64_t terms() const { return std::count(in.begin(), in.end(), true) + (sink != -kInf); }
};

inline ReferenceRow row_of(softmaxlib_function function, softmaxlib_dtype to,
                           const softmaxlib_array& x, const softmaxlib_options& o, int64_t columns,
                           int64_t other, int64_t query) {
  const bool wide = to == SOFTMAXLIB_F64, stablemax = is_stablemax(function);
  const Real range = wide        ? test::format_of(SOFTMAXLIB_F64).largest
                     : stablemax ? test::format_of(SOFTMAXLIB_F32).largest
                                 : Real{kInf};
  ReferenceRow row;
  const Index first = {other, query, 0};
  const Real temperature = value_at(o.temperatures, first, o.temperature);
  const Real scale = value_at(o.scales, first, o.scale);
  row.sink = value_at(o.sinks, first, -kInf);
  row.factor = scale / temperature;
  row.temperature = temperature;  // DEV
  const double slope = static_cast<double>(value_at(o.alibi_slopes, first, 0));
  for (int64_t c = 0; c < columns; ++c) {
    const Index i = {other, query, c};
    const bool sees = !o.causal || static_cast<Wide>(c - query) <= static_cast<Wide>(o.causal_offset);
    row.in.push_back(sees && value_at(o.where, i, 1) != 0);
    const Wide product = Wide{test::converted(value_at(&x, i, 0), to)} * scale / temperature;
    // Rounded to double, as documented.
    const double distance = static_cast<double>(c - query) - static_cast<double>(o.causal_offset);
    const double alibi = o.alibi_slopes ? slope * distance : 0;
    const Real bias = value_at(o.bias, i, 0);
    Wide z = product + bias + alibi;
    const Real size = std::fabs(static_cast<Real>(product)) + std::fabs(bias) + std::fabs(alibi);
    Real doubt = !(size < kInf)   ? 0
                 : !wide          ? size * 0x1p-48L
                 : size > 0x1p50L ? size * 0x1p-51L
                                  : 0;
    if (stablemax && doubt > 0) doubt /= 1 + std::fabs(static_cast<Real>(z));
    row.doubt.push_back(doubt);
    if (row.in.back() && product - product == 0) {
      const bool finite = z - z == 0, beyond = finite && (z > range || z < -range);
      if (!beyond && (product > range || product < -range || (finite && size > range)))
        row.judged = false;
      if (beyond) z = z > 0 ? kInf : -kInf;
    }
    row.z.push_back(z);
  }
  return row;
}

// How far the logarithm of the row's sum may be off, for arguments that are.
inline Real doubt_of_sum(const ReferenceRow& row, const Distribution& d) {
  Real most = 0;
  for (size_t i = 0; i < row.z.size(); ++i)
    if (row.in[i] && row.z[i] + row.doubt[i] > d.largest() - 800)
      most = std::max(most, row.doubt[i]);
  return most;
}
constexpr Real kMostDoubt = 0.5L;

// ---- Functions of rows.

// The bound for any row at all, in ULP of the arithmetic.
inline Real bound_of_any(softmaxlib_function function, softmaxlib_dtype dtype) {
  if (dtype == SOFTMAXLIB_F64) return 5;
  if (is_stablemax(function)) return 4;
  return function == SOFTMAXLIB_SOFTMAX ? 7 : function == SOFTMAXLIB_LOG_SOFTMAX ? 5 : 3;
}
// Of a logarithm of a sum: in ULP of what is at least 1, and a half is rounded once more.
inline Real tolerance_of_log_sum(Real ulps, Real want, softmaxlib_dtype dtype) {
  const Real size = std::max(std::fabs(want), Real{1});
  const Real inside = ulps * ulp_of(size, format_of(test::arithmetic_of(dtype)));
  return is_half(dtype) ? inside + ulp_of(want, format_of(dtype)) / 2 : inside;
}

// y: the row's results, decoded.
inline void check_row(softmaxlib_function function, softmaxlib_dtype dtype, const ReferenceRow& row,
                      const std::vector<Real>& y, const char* what, int64_t number) {
  if (!row.judged) return;
  { Real it = 1 / row.temperature, ff = row.factor; auto bad = [](Real v){ return v > 0x1.fffffffffffffp1023L || v < 0x1p-1022L; };
    if (bad(it) || bad(ff)) context += " EXTREME"; }  // DEV
  const Distribution d = test::distribution_of(function, row.z, row.in, row.sink);
  const Real bound = bound_of_any(function, dtype),
             sum_doubt = d.valid() ? doubt_of_sum(row, d) : 0;
  if (function == SOFTMAXLIB_LOGSUMEXP) {
    const Real want = d.log_sum();
    Real tolerance = 0;
    if (std::isfinite(want)) tolerance = tolerance_of_log_sum(bound, want, dtype) + sum_doubt;
    return require_near(y[0], want, tolerance, dtype, what, number);
  }
  const std::vector<Real> exact = test::exact_row(function, row.z, row.in, row.sink);
  const bool alone = row.terms() == 1;
  Real total = 0, slack = 0;
  for (size_t i = 0; i < y.size(); ++i) {
    const Real want = exact[i], doubt = row.in[i] ? row.doubt[i] + sum_doubt : 0;
    const auto column = static_cast<int64_t>(i);
    if (!std::isfinite(want) || alone) {
      require_near(y[i], want, 0, dtype, what, number, column);
      continue;
    }
    const Real tolerance = tolerance_of(bound, want, dtype);
    if (is_logarithm(function)) {
      require_near(y[i], want, tolerance + doubt, dtype, what, number, column);
      continue;
    }
    if (doubt < kMostDoubt)
      require_near(y[i], want, tolerance + want * std::expm1(doubt), dtype, what, number, column);
    else require_near(y[i], 0.5L, 0.5L + unit_of(dtype), dtype, what, number, column);
    total += y[i];
    slack += tolerance_of(bound, y[i], dtype);
  }
  if (is_logarithm(function) || !d.valid() || alone || row.sink != -kInf) return;
  require_near(total, 1, slack + 0x1p-60L, dtype, std::string(what) + ", sum of probabilities",
               number);
}

// All rows of a plain call; y: its results, one after the other.
template <class F>
void for_plain_rows(const Plain& plain, F f) {
  for (int64_t other = 0; other < plain.shape[0]; ++other)
    for (int64_t query = 0; query < plain.shape[1]; ++query)
      f(other * plain.shape[1] + query, other, query);
}
inline void check_values(softmaxlib_function function, const Plain& plain, const char* y,
                         softmaxlib_dtype dtype) {
  const int64_t each = function == SOFTMAXLIB_LOGSUMEXP ? 1 : plain.columns();
  for_plain_rows(plain, [&](int64_t number, int64_t other, int64_t query) {
    context = "T " + text_of(plain.options.temperature) + " scale " + text_of(plain.options.scale) + " x " + test::kDtypeNames[plain.x->dtype] + (plain.options.bias ? " bias" : "") + (plain.options.alibi_slopes ? " alibi" : "") + (plain.options.temperatures ? " Ts" : "") + (plain.options.scales ? " scales" : "")+ (plain.options.sinks ? " sinks" : "") + " n " + std::to_string(plain.columns());
    check_row(function, dtype,
              row_of(function, dtype, *plain.x, plain.options, plain.columns(), other, query),
              test::decode_all(y + number * each * test::item_size_of(dtype), each, dtype),
              test::kFunctionNames[function], number);
  });
}

}  // namespace softmaxlib::fuzz
