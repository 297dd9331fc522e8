// What a plain call must return: the definitions in extended precision, independent of the
// library's own arithmetic, within the bounds that header, docstrings and docs/numerics.md state.
//
// What is judged, and how far:
// - Operands are decoded exactly; x is converted to the arithmetic's dtype (float, or double where
//   out is F64), as every docstring says. Arguments are made in 113 bits.
// - Arguments in float may be off by 2^-48 of |x scale / temperature| + |bias| + |ALiBi|, a pair of
//   floats. The documents call that far below the last place, which it is up to some 2^20; beyond,
//   the bound is widened by just that.
// - Arguments in double are exact up to |x / temperature| + |bias| = 2^50, in every element of the
//   row that counts; beyond, they may be off by 2^-51 of that sum.
// - Rows whose scale / temperature is outside of [2^-1000, 2^1000] are not judged: products in
//   between leave the range of a double. tests/test_short_rows.py has some of them.
// - Where an element's doubt is more than half a unit of its logarithm, only that results are in
//   [0, 1] and add up to 1 is judged.
// - An argument of stablemax beyond the range of the arithmetic counts as infinite. Where only a
//   part of it (x scale / temperature, without the bias) is beyond, the row is not judged.
// - A row of softmax with an argument, or a part of one, beyond the range of double may be NaN, as
//   streaming states have it, or right; its logsumexp is not judged.
// - Results in float32 are held to the bounds of "any row at all": 7, 5, 3.
#pragma once

#include <cmath>

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
    return (got > 0 ? want : -want) + tolerance >= f.largest + ulp_of(f.largest, f) / 2;
  }
  return std::fabs(got - want) <= tolerance;
}
inline void require_near(Real got, Real want, Real tolerance, softmaxlib_dtype dtype,
                         const std::string& what, int64_t row, int64_t column = -1) {
  if (is_near(got, want, tolerance, dtype)) return;
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
  std::vector<bool> impossible;  // -inf as it is given
  std::vector<Real> doubt;       // of z, in units of the logarithm of its term
  Wide sink = -kInf;
  Wide factor = 1;      // of x: scale / temperature
  bool beyond = false;  // an argument of softmax is beyond the range of double
  bool judged = true;

  int64_t size() const { return static_cast<int64_t>(z.size()); }
  int64_t terms() const { return std::count(in.begin(), in.end(), true) + (sink != -kInf); }
};

inline bool is_usual(Wide factor) { return factor >= 0x1p-1000L && factor <= 0x1p1000L; }

inline ReferenceRow row_of(softmaxlib_function function, softmaxlib_dtype to,
                           const softmaxlib_array& x, const softmaxlib_options& o, int64_t columns,
                           int64_t other, int64_t query) {
  const bool wide = to == SOFTMAXLIB_F64, stablemax = is_stablemax(function);
  const Real range = test::format_of(wide || !stablemax ? SOFTMAXLIB_F64 : SOFTMAXLIB_F32).largest;
  ReferenceRow row;
  const Index first = {other, query, 0};
  const Real temperature = value_at(o.temperatures, first, o.temperature);
  const Real scale = value_at(o.scales, first, o.scale);
  row.sink = value_at(o.sinks, first, -kInf);
  if (stablemax && row.sink > range) row.sink = kInf;
  if (stablemax && row.sink < -range) row.sink = -kInf;
  row.factor = Wide{scale} / temperature;
  row.judged = is_usual(row.factor);
  const double slope = static_cast<double>(value_at(o.alibi_slopes, first, 0));
  for (int64_t c = 0; c < columns; ++c) {
    const Index i = {other, query, c};
    const bool sees =
        !o.causal || static_cast<Wide>(c - query) <= static_cast<Wide>(o.causal_offset);
    row.in.push_back(sees && value_at(o.where, i, 1) != 0);
    const Real given = test::converted(value_at(&x, i, 0), to);
    const Wide product = Wide{given} * row.factor;
    // Rounded to double, as documented.
    const double distance = static_cast<double>(c - query) - static_cast<double>(o.causal_offset);
    const double alibi = o.alibi_slopes ? slope * distance : 0;
    const Real bias = value_at(o.bias, i, 0);
    row.impossible.push_back(given == -kInf || bias == -kInf);
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
      const bool in_part = product > range || product < -range || (finite && size > range);
      if (!stablemax) row.beyond |= beyond || in_part;
      else if (beyond) z = z > 0 ? kInf : -kInf;
      else if (in_part) row.judged = false;
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

// What a function of a row must be, element by element.
class Expected {
 public:
  // kept: the elements that take part, of those that the row has.
  Expected(softmaxlib_function function, softmaxlib_dtype dtype, const ReferenceRow& row,
           const std::vector<bool>& kept)
      : function_(function),
        dtype_(dtype),
        row_(row),
        kept_(kept),
        distribution_(test::distribution_of(function, row.z, kept, row.sink)),
        bound_(bound_of_any(function, dtype)),
        doubt_(distribution_.valid() ? doubt_of_sum(row, distribution_) : 0),
        alone_(std::count(kept.begin(), kept.end(), true) + (row.sink != -kInf) == 1) {}

  const Distribution& distribution() const { return distribution_; }
  bool has_one_term() const { return alone_; }

  void check_sum(Real got, const char* what, int64_t row) const {
    const Real want = distribution_.log_sum();
    const Real tolerance =
        std::isfinite(want) ? tolerance_of_log_sum(bound_, want, dtype_) + doubt_ : 0;
    require_near(got, want, tolerance, dtype_, what, row);
  }
  void check(size_t i, Real got, const char* what, int64_t row) const {
    const auto column = static_cast<int64_t>(i);
    const bool logarithm = is_logarithm(function_);
    if (!kept_[i] || !distribution_.valid()) {
      const Real want = kept_[i] ? Real{kNaN} : logarithm ? -Real{kInf} : 0;
      return require_near(got, want, 0, dtype_, what, row, column);
    }
    const Wide z = row_.z[i];
    const Real want = logarithm ? distribution_.log_p(z) : distribution_.p(z);
    if (alone_ || z == -kInf) return require_near(got, want, 0, dtype_, what, row, column);
    const Real tolerance = tolerance_of(bound_, want, dtype_), doubt = row_.doubt[i] + doubt_;
    if (logarithm) return require_near(got, want, tolerance + doubt, dtype_, what, row, column);
    if (doubt > kMostDoubt)
      return require_near(got, 0.5L, 0.5L + unit_of(dtype_), dtype_, what, row, column);
    require_near(got, want, tolerance + want * std::expm1(doubt), dtype_, what, row, column);
  }

 private:
  softmaxlib_function function_;
  softmaxlib_dtype dtype_;
  const ReferenceRow& row_;
  const std::vector<bool>& kept_;
  Distribution distribution_;
  Real bound_, doubt_;
  bool alone_;
};

// Whether a row beyond the range of double is NaN, which it may be.
inline bool may_be_nan(const ReferenceRow& row, const std::vector<Real>& y) {
  return row.beyond && std::any_of(y.begin(), y.end(), [](Real r) { return r != r; });
}

// y: the row's results, decoded.
inline void check_row(softmaxlib_function function, softmaxlib_dtype dtype, const ReferenceRow& row,
                      const std::vector<Real>& y, const char* what, int64_t number) {
  if (!row.judged) return;
  const Expected expected(function, dtype, row, row.in);
  if (function == SOFTMAXLIB_LOGSUMEXP)
    return row.beyond ? void() : expected.check_sum(y[0], what, number);
  if (may_be_nan(row, y)) {
    for (size_t i = 0; i < y.size(); ++i)
      if (row.in[i]) require_near(y[i], kNaN, 0, dtype, what, number, static_cast<int64_t>(i));
    return;
  }
  Wide total = 0;
  Real slack = 0x1p-60L;
  for (size_t i = 0; i < y.size(); ++i) {
    expected.check(i, y[i], what, number);
    total += y[i];
    slack += tolerance_of(bound_of_any(function, dtype), y[i], dtype);
  }
  if (is_logarithm(function) || !expected.distribution().valid() || row.sink != -kInf) return;
  require_near(static_cast<Real>(total), 1, slack, dtype,
               std::string(what) + ", sum of probabilities", number);
}

// The same of some elements.
inline void check_elements(softmaxlib_function function, softmaxlib_dtype dtype,
                           const ReferenceRow& row, const std::vector<bool>& kept,
                           const std::vector<int64_t>& places, const std::vector<Real>& y,
                           const char* what, int64_t number) {
  if (!row.judged || may_be_nan(row, y)) return;
  const Expected expected(function, dtype, row, kept);
  for (size_t i = 0; i < y.size(); ++i)
    expected.check(static_cast<size_t>(places[i]), y[i], what, number);
}

// ---- Losses.

struct LossTarget {
  int64_t label = -1;  // -1: probabilities
  bool ignored = false;
  std::vector<Real> share;  // of every class, before smoothing
  const double* weight;     // NULL: 1
  Real smoothing = 0;

  Real weight_of(size_t j) const { return weight ? weight[j] : 1; }
};

// A row's loss and its gradient times `by`, each with what it may be off by. Where a probability of
// the target is infinite or NaN, or an argument is in doubt by a binade, it is not judged.
struct RowLoss {
  bool judged = true;
  Real loss = 0, tolerance = 0;
  Real logarithms = 0;  // the magnitudes of the -log p that count: what a unit of their weights is
  std::vector<Real> gradient, gradient_tolerance;
};

// 4 ULP of a label's loss are 5 for any row at all; likewise of its gradient. Weights and the
// smoothed share of a class multiply -log p, which has its ULP before they do. A p below the normal
// range has its last place there.
inline RowLoss loss_of(softmaxlib_function activation, softmaxlib_dtype dtype,
                       const ReferenceRow& row, const LossTarget& target, Wide by) {
  RowLoss result;
  const size_t n = row.z.size();
  result.gradient.assign(n, 0);
  result.gradient_tolerance.assign(n, 0);
  if (target.ignored) return result;
  const auto visible = std::count(row.in.begin(), row.in.end(), true);
  const Wide keep = Wide{1} - target.smoothing;
  const Wide spread = visible ? Wide{target.smoothing} / static_cast<Wide>(visible) : Wide{0};
  std::vector<Real> q(n);
  Wide sum = 0, size = 0;
  Real last_places = 0;  // of q, in double: before and after its weight
  int64_t classes = 0;
  for (size_t j = 0; j < n; ++j) {
    const Wide share = keep * target.share[j] + (row.in[j] ? spread : Wide{0});
    q[j] = static_cast<Real>(share * target.weight_of(j));
    if (!(std::fabs(q[j]) < kInf)) result.judged = false;
    sum += q[j];
    size += std::fabs(q[j]);
    classes += q[j] != 0;
    if (q[j] != 0) last_places += std::ldexp(1 + target.weight_of(j), -1074);
  }
  const Real all = static_cast<Real>(sum), all_sizes = static_cast<Real>(size);
  const Distribution d = test::distribution_of(activation, row.z, row.in);
  const auto fill_visible = [&](Real value) {
    for (size_t j = 0; j < n; ++j) result.gradient[j] = row.in[j] ? value : 0;
  };
  if (!d.valid()) {
    result.loss = visible ? Real{kNaN} : all > 0 ? Real{kInf} : 0;
    if (!visible && all < 0) result.judged = false;  // no such probabilities
    fill_visible(kNaN);
    return result;
  }
  const Real sum_doubt = doubt_of_sum(row, d);
  const softmaxlib_dtype inside = test::arithmetic_of(dtype);
  const Format f = format_of(inside);
  const bool wide = inside == SOFTMAXLIB_F64, stablemax = is_stablemax(activation);
  const bool one = classes == 1;
  const Real smallest = std::ldexp(Real{1}, f.lowest);
  Real terms = 0;
  for (size_t j = 0; j < n; ++j) {
    const Real doubt = row.doubt[j] + sum_doubt;
    if (row.in[j] && doubt > kMostDoubt) result.judged = false;
    const Real log_p = row.in[j] ? d.log_p(row.z[j]) : -kInf;
    if (q[j] != 0) {
      result.loss -= q[j] * log_p;
      terms += std::fabs(q[j] * log_p);
      if (log_p == -kInf && std::fabs(q[j]) < 0x1p-1022L) result.judged = false;
      // A double, and so may be its product with the weight.
      const Real last = std::ldexp(1 + target.weight_of(j), -1074);
      if (log_p > -kInf) result.tolerance -= last * log_p;
      if (log_p > -kInf) result.logarithms -= log_p;
      result.tolerance += std::fabs(q[j]) * (doubt + smallest);
      if (one) result.tolerance += std::fabs(q[j]) * ((wide ? 8 : 5) * ulp_of(log_p, f));
    }
    if (!row.in[j] || row.impossible[j]) continue;  // no class, or none that can be: 0
    const Real p = d.p(row.z[j]);
    const Real slope = stablemax ? 1 / (1 + std::fabs(static_cast<Real>(row.z[j]))) : 1;
    const Real factor = static_cast<Real>(by * row.factor) * slope;
    const bool label = one && q[j] != 0;
    // The only class: minus the share of the others.
    const Real size_of_terms = label ? all_sizes * d.others(row.z[j]) : all_sizes * p;
    result.gradient[j] = (label ? -q[j] * d.others(row.z[j]) : all * p - q[j]) * factor;
    const Real scale = (size_of_terms + (label ? 0 : std::fabs(q[j]))) * std::fabs(factor);
    const Real ulps = wide ? 8 : label ? 5 : stablemax ? 7 : 5;
    result.gradient_tolerance[j] = tolerance_of(ulps, scale, dtype) +
                                   (1 + p) * last_places * std::fabs(factor) +
                                   all_sizes * std::fabs(factor) * smallest +
                                   size_of_terms * std::fabs(factor) * std::expm1(doubt);
  }
  if (!one && terms < kInf) result.tolerance += (wide ? 8 : 5) * ulp_of(terms, f);
  if (!(result.tolerance < kInf)) result.tolerance = 0;
  return result;
}

// What rounding to a narrower dtype adds.
inline Real rounding_of(Real value, softmaxlib_dtype to) {
  if (!std::isfinite(value)) return 0;
  return (0.5L + 0x1p-10L) * ulp_of(value, format_of(to));
}

// ---- Gradients.

struct RowGradient {
  std::vector<Real> value, size;  // size: with the magnitude of every term
  std::vector<bool> judged;
};

// grad, y, x: as the arithmetic sees them; of logsumexp one of the first two. y may be any number.
// Not judged are elements where an exponential of y, or of x less y, is beyond e, or where these
// two are so large (2^50, float: 2^20) that their difference is not exact; in double also rows of y
// beyond 1, whose products may leave the range.
inline RowGradient gradient_of(softmaxlib_function function, softmaxlib_dtype dtype,
                               const std::vector<Real>& grad, const std::vector<Real>& x,
                               const std::vector<Real>& y, const std::vector<bool>& in,
                               Wide factor) {
  const size_t n = in.size();
  const bool logarithm = is_logarithm(function), reduces = function == SOFTMAXLIB_LOGSUMEXP;
  RowGradient result = {std::vector<Real>(n), std::vector<Real>(n), std::vector<bool>(n, true)};
  const Real none = logarithm ? -Real{kInf} : 0;
  std::vector<bool> takes_part(n);
  bool number = true, in_range = true;
  Wide sum = 0, size = 0;
  for (size_t i = 0; i < n; ++i) {
    takes_part[i] = in[i] && (reduces ? x[i] != -kInf : y[i] != none);
    if (!takes_part[i] || reduces) continue;
    number &= std::isfinite(grad[i]) && (logarithm || std::isfinite(y[i]));
    in_range &= logarithm || std::fabs(y[i]) <= 1;
    const Wide term = logarithm ? Wide{grad[i]} : Wide{grad[i]} * y[i];
    sum += term;
    size += term < 0 ? -term : term;
  }
  for (size_t i = 0; i < n; ++i) {
    if (!takes_part[i]) continue;
    if (!number) {
      result.value[i] = kNaN;
      continue;
    }
    if (!is_usual(factor)) result.judged[i] = false;
    if (dtype == SOFTMAXLIB_F64 && !in_range) result.judged[i] = false;
    const Wide z = Wide{x[i]} * factor, z_size = z < 0 ? -z : z;
    const Wide slope = is_stablemax(function) ? factor / (1 + z_size) : factor;
    Wide value, terms;
    if (reduces) {
      const Wide power = z - y[0];
      value = terms = grad[0] * test::exp_of(power);
      const auto is_exact = [&](Wide magnitude) {
        return magnitude <= (dtype == SOFTMAXLIB_F64 ? 0x1p50L : 0x1p20L);
      };
      const Real largest = format_of(SOFTMAXLIB_F64).largest;
      // Below, the exponential alone is 0 (docs/numerics.md).
      const Wide least = dtype == SOFTMAXLIB_F64 ? -745 : -235;
      result.judged[i] = is_usual(factor) && power <= 1 && power >= least && value <= largest &&
                         value >= -largest && (is_exact(z_size) || std::isinf(x[i])) &&
                         (is_exact(std::fabs(y[0])) || std::isinf(y[0]));
    } else if (logarithm) {
      const Real e = test::exp_of(y[i]);
      value = grad[i] - e * sum;
      terms = std::fabs(grad[i]) + e * size;
      if (y[i] > 1) result.judged[i] = false;
    } else {
      value = y[i] * (grad[i] - sum);
      terms = std::fabs(y[i]) * (std::fabs(grad[i]) + size);
    }
    result.value[i] = static_cast<Real>(value * slope);
    result.size[i] = std::fabs(static_cast<Real>(terms * slope));
  }
  return result;
}
inline Real gradient_ulps(softmaxlib_function function, softmaxlib_dtype dtype) {
  if (dtype == SOFTMAXLIB_F64) return 8;
  if (function == SOFTMAXLIB_LOGSUMEXP) return 1;
  return function == SOFTMAXLIB_SOFTMAX || function == SOFTMAXLIB_STABLEMAX ? 5 : 4;
}

// ---- The order of a row's elements, and what is drawn from it.

// By value, then by index. In double the library compares what an argument was rounded to; where
// that, or a doubt, may turn two elements round, their order is not judged. What is beyond the
// range of the arithmetic, and has no weight, counts as -inf.
class Order {
 public:
  Order(const ReferenceRow& row, softmaxlib_dtype dtype, bool has_options)
      : row_(row), lowest_(-format_of(test::arithmetic_of(dtype)).largest) {
    for (size_t i = 0; i < row.z.size(); ++i)
      if (row.in[i] && row.z[i] > largest_) largest_ = row.z[i];
    places.resize(row.z.size());
    for (size_t i = 0; i < places.size(); ++i) places[i] = i;
    std::stable_sort(places.begin(), places.end(),
                     [&](size_t a, size_t b) { return value(a) > value(b); });
    for (size_t i = 0; i < places.size(); ++i) {
      const Real size = std::fabs(static_cast<Real>(row.z[i]));
      const bool rounded = has_options && dtype == SOFTMAXLIB_F64;
      const Real smallest = std::ldexp(Real{1}, format_of(test::arithmetic_of(dtype)).lowest);
      slack_.push_back(!has_options || !(size < kInf) ? 0
                       : rounded                      ? size * 0x1p-51L + smallest
                                                      : row.doubt[i] + smallest);
    }
  }

  std::vector<size_t> places;  // largest first

  Wide value(size_t i) const {
    // Of a row whose largest is beyond the range, what is left less that.
    const bool far = largest_ > -lowest_ || largest_ < lowest_;
    const Wide z = row_.z[i], left = far ? z - largest_ : z;
    const bool counts =
        row_.in[i] && ((left >= lowest_ && left <= -lowest_) || z > largest_ - 20000);
    return counts ? z : Wide{-kInf};
  }
  // Whether a comes before b: by value, or of one value.
  bool is_before(size_t a, size_t b) const {
    if (value(a) == value(b)) return a < b || slack_[a] + slack_[b] > 0;
    return value(a) > value(b) || is_close(a, b);
  }
  bool is_close(size_t a, size_t b) const {
    return value(a) > -kInf && value(b) > -kInf && slack_[a] + slack_[b] > 0 &&
           value(a) - value(b) <= slack_[a] + slack_[b] &&
           value(b) - value(a) <= slack_[a] + slack_[b];
  }

 private:
  const ReferenceRow& row_;
  Real lowest_;
  Wide largest_ = -kInf;
  std::vector<Real> slack_;
};

// The index drawn with u. Weights may be off by 2 ULP in float, 5 in double, and by the arguments'
// doubt; where that decides which elements a filter keeps, only that the index is one is judged.
inline void check_draw(const ReferenceRow& row, softmaxlib_dtype dtype, const Order& order,
                       const softmaxlib_filter& filter, Real u, int64_t drawn, int64_t number) {
  if (!row.judged || row.beyond) return;
  const Distribution d = test::distribution_of(SOFTMAXLIB_SOFTMAX, row.z, row.in);
  if (!d.valid())
    return require_near(static_cast<Real>(drawn), -1, 0, SOFTMAXLIB_F64, "draw", number);
  const size_t n = row.z.size(), index = static_cast<size_t>(drawn);
  require(drawn >= 0 && row.in[index] && row.z[index] > -kInf, "drawn: what takes no part");
  const softmaxlib_dtype inside = test::arithmetic_of(dtype);
  const Real doubt = doubt_of_sum(row, d);
  if (doubt > 1e-3L) return;
  const Real off = 8 * (unit_of(inside) * (inside == SOFTMAXLIB_F64 ? 5 : 2) + doubt) +
                   static_cast<Real>(n) * 0x1p-52L;
  std::vector<Real> weight(n);
  for (size_t i = 0; i < n; ++i) weight[i] = row.in[i] ? d.p(row.z[i]) : 0;
  std::vector<bool> kept(n, true);
  bool certain = true;
  const auto keep_first = [&](size_t count) {
    if (count < n) certain &= !order.is_close(order.places[count - 1], order.places[count]);
    for (size_t i = count; i < n; ++i) kept[order.places[i]] = false;
  };
  const auto sum_of_kept = [&] {
    Real sum = 0;
    for (size_t i = 0; i < n; ++i) sum += kept[i] ? weight[i] : 0;
    return sum;
  };
  if (filter.top_k > 0 && filter.top_k < static_cast<int64_t>(n))
    keep_first(static_cast<size_t>(filter.top_k));
  if (filter.top_p < 1) {
    const Real sum = sum_of_kept(), goal = filter.top_p * sum;
    Real above = 0;
    size_t count = 0;
    while (count < n && (count == 0 || above < goal)) {
      above += kept[order.places[count]] ? weight[order.places[count]] : 0;
      ++count;
      certain &= std::fabs(above - goal) > off * sum;
    }
    keep_first(count);
  }
  if (filter.min_p > 0) {
    const Real least = filter.min_p * weight[order.places[0]];
    for (size_t i = 0; i < n; ++i) {
      certain &= std::fabs(weight[i] - least) > off * least;
      if (weight[i] < least) kept[i] = false;
    }
  }
  if (!certain) return;
  require(kept[index], "drawn: what the filter removes");
  Real before = 0;
  for (size_t i = 0; i < index; ++i) before += kept[i] ? weight[i] : 0;
  const Real sum = sum_of_kept(), goal = u * sum;
  if (before <= goal + off * sum && goal <= before + weight[index] + off * sum) return;
  fail("drawn: row " + std::to_string(number) + ", index " + std::to_string(drawn) + " has [" +
       text_of(before / sum) + ", " + text_of((before + weight[index]) / sum) + "), and u is " +
       text_of(u));
}

// ---- All rows of a call.

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
    check_row(function, dtype,
              row_of(function, dtype, *plain.x, plain.options, plain.columns(), other, query),
              test::decode_all(y + number * each * test::item_size_of(dtype), each, dtype),
              test::kFunctionNames[function], number);
  });
}

}  // namespace softmaxlib::fuzz
