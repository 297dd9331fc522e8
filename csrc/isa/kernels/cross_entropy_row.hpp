// Cross-entropy and its gradient from the same sums, without a log-probability array; selected
// log-probabilities. With p = s / sum of s, s = e^z or StableMax's s(z), z = x scale, and class
// weights q, of which Q is the sum:
//
//   loss = sum of q_j (-log p_j),  gradient_j = (Q p_j - q_j) scale (log s)'(z_j)
//
// Nothing is lost where p_j is nearly 1: the largest element stays out of the sum, rest is that of
// the others, and 1 - p_j = r / (1 + r) with r = rest / s(largest); log p_j = -log1p(r).
#pragma once

#include "isa/kernels/gradient_element.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// z - (hi + lo), no bit lost that counts.
inline Pair<f32x16> less_held(Pair<f32x16> z, InLanes<f32x16> hi, InLanes<f32x16> lo) {
  const InLanes<f32x16> held = hi + lo;
  const InLanes<f32x16> d = (InLanes<f32x16>::of(z.hi) - held) + InLanes<f32x16>::of(z.lo);
  const f32x16 high = d.value();
  return finite_pair(high, (d - InLanes<f32x16>::of(high)).value());
}
inline Pair<f64x8> less_held(Pair<f64x8> z, InLanes<f64x8> hi, InLanes<f64x8> lo) {
  const f64x8 held = hi.all, d = z.hi - held, tail = d - z.hi;
  return finite_pair(d, ((z.hi - (d - tail)) - (held + tail)) + (z.lo - lo.all));
}

inline Pair<f64x8> low_half(Pair<f32x16> z) { return {widen_low(z.hi), widen_low(z.lo)}; }
inline Pair<f64x8> high_half(Pair<f32x16> z) { return {widen_high(z.hi), widen_high(z.lo)}; }
template <class F>
inline InLanes<f32x16> map_halves(Pair<f32x16> z, F f) {
  return {f(low_half(z)), f(high_half(z))};
}
template <class F>
inline InLanes<f64x8> map_halves(Pair<f64x8> z, F f) {
  return {f(z)};
}

// ---- The two kinds of p, each of one row: log p, s(z) / s(largest), (log s)'(z); and as a
// function of z in T, (p factor - q) (log s)', if that keeps to the range of T.

template <class V>
inline bool is_normal_in(double x) {
  constexpr bool kFloat = sizeof(typename V::elem) == 4;
  const double size = x < 0 ? -x : x;
  return size >= (kFloat ? 0x1p-126 : 0x1p-1022) && size <= (kFloat ? 0x1p100 : 0x1p1000);
}

template <class D>
class SoftmaxOf {
 public:
  using V = typename Row<D>::V;
  using T = typename Row<D>::T;
  using Rest = RowRest<LogExp<D>>;

  template <class Finish, class Invalid>
  static void compute(const Row<D>& row, Finish finish, Invalid invalid) {
    with_rest(
        row, false, [&](const Row<D>& r, const Rest& rest) { finish(r, SoftmaxOf(rest), rest); },
        invalid);
  }
  explicit SoftmaxOf(const Rest& rest) : SoftmaxOf(rest, log_rest_of_row<D>(rest)) {}
  SoftmaxOf(const Rest& rest, const LogRest<V>& log_rest)
      : ratio(first(log_rest.ratio)),
        log_p(log_sum_of<D>(rest, log_rest)),
        hi_(rest.held_hi),
        lo_(rest.held_lo),
        reference_(rest.reference),
        sum_(first(log_rest.of_held) * (1 + ratio)) {}

  const double ratio;
  const LogSoftmaxOf<V> log_p;

  InLanes<V> relative(Pair<V> z) const {
    return exp_wide(less_held(z, in_all(hi_, V()), in_all(lo_, V())));
  }
  InLanes<V> slope(Pair<V>) const { return in_all(1, V()); }
  bool fits(double factor) const { return fits(factor, scale(factor)); }
  static bool fits(double factor, double scale) {
    // A small p is lost in T before a large factor would make it normal.
    constexpr double kLargest = sizeof(T) == 4 ? 0x1p20 : 0x1p60;
    return factor == 0 || (is_normal_in<V>(scale) && factor < kLargest && factor > -kLargest);
  }
  static constexpr double kUnit = sizeof(T) == 4 ? 0x1p34 : 1;  // of e^M in that of gradients
  static_assert(LogRest<f32x16>::E::kBias - Exp<f32x16>::kBias == 34, "kUnit");
  auto gradient(double factor) const {
    using E = Exp<V>;
    return Scaled<E>{E(reference_), static_cast<T>(scale(factor))};
  }
  auto gradient(double factor, double q) const {
    return [p = gradient(factor), q = static_cast<T>(q)](auto z)
               SOFTMAXLIB_INLINE_LAMBDA { return p(z) - V::set1(q); };
  }

 private:
  double scale(double factor) const { return kUnit / sum_ * factor; }

  double hi_, lo_;
  int reference_;
  double sum_;  // in the units of LogRest
};

template <class D>
class StablemaxOf {
 public:
  using V = typename Row<D>::V;
  using T = typename Row<D>::T;
  using Rest = RowRest<Stable<V>>;

  template <class Finish, class Invalid>
  static void compute(const Row<D>& row, Finish finish, Invalid invalid) {
    const Rest rest = in_range<D>([&](Known known) { return rest_of<Stable<V>>(row, known); });
    const double s_held = s_of_held(rest), sum = s_held + rest.sum;
    if (positive_finite(sum)) finish(row, StablemaxOf(rest, s_held), rest);
    else invalid(row, sum == 0 ? -INFINITY : NAN);
  }
  StablemaxOf(const Rest& rest, double s_held)
      : ratio(rest.value() / s_held),
        log_p(rest, s_held),
        reference_(rest.reference),
        s_held_(s_held) {}

  const double ratio;
  const LogStablemaxOf<V> log_p;

  InLanes<V> relative(Pair<V> z) const {
    const Stable<f64x8> stable(reference_);
    const f64x8 held = f64x8::set1(s_held_);
    return map_halves(z, [&](Pair<f64x8> half) { return stable(half) / held; });
  }
  InLanes<V> slope(Pair<V> z) const {
    return map_halves(z, [](Pair<f64x8> half) {
      const Pair<f64x8> a = magnitude(normalized(half));
      return f64x8::set1(1) / ((f64x8::set1(1) + a.hi) + a.lo);
    });
  }
  // s(z) / (1 + |z|) is 1 for z >= 0, else 1 / (1 - z)^2.
  bool fits(double factor) const { return factor == 0 || is_normal_in<V>(scale(factor)); }
  auto gradient(double factor) const {
    return [k = static_cast<T>(scale(factor))](auto argument) SOFTMAXLIB_INLINE_LAMBDA {
      const auto z = normalized(argument);
      const V u = one_over_slope(z);
      return select(gt(V::set1(0), high(z)), V::set1(k) / u / u, V::set1(k));
    };
  }
  auto gradient(double factor, double q) const {
    return [p = gradient(factor), q = static_cast<T>(q)](auto z)
               SOFTMAXLIB_INLINE_LAMBDA { return p(z) - V::set1(q) / one_over_slope(z); };
  }

 private:
  template <class X>
  static SOFTMAXLIB_INLINE V one_over_slope(X z) {
    const Pair<V> a = magnitude(normalized(z));
    return (V::set1(1) + a.hi) + a.lo;
  }
  double scale(double factor) const {
    return factor * power_of_two(-reference_) / (s_held_ * (1 + ratio));
  }

  int reference_;
  double s_held_;
};

// ---- Targets

inline bool is_visible(const Job& job, const Place& place, int64_t element) {
  uint8_t visible = 1;
  if (job.base[kWhere]) gather_visible(job, place, element, 1, &visible);
  return visible != 0;
}

// One element of a row, in lane 0.
template <class D>
inline Pair<typename Row<D>::V> element_of(const Row<D>& row, int64_t i) {
  Pair<typename Row<D>::V> z;
  row.read(i, i + 1, [&](auto x, int64_t, int64_t) { z = to_pair(load_up_to(x, 0, 1)); });
  return z;
}

// The weights q of a row's classes, a chunk at a time.
template <class D>
class ClassWeights {
 public:
  using V = typename Row<D>::V;
  using T = typename Row<D>::T;
  static constexpr int kChunk = Row<D>::kChunk;

  // target: -1 with probabilities. weight_sum: of all classes.
  ClassWeights(const Job& job, const Place& place, int64_t target, double weight_sum)
      : job_(job), place_(place), target_(target) {
    const Loss& loss = *job.loss;
    keep_ = 1 - loss.smoothing;
    spread_ = loss.smoothing / static_cast<double>(job.n);
    if (job.base[kWhere] && loss.smoothing > 0) spread_ = loss.smoothing / count_visible();
    if (!job.base[kWhere] && !loss.probabilities) {
      sum_ = spread_ * weight_sum + keep_ * weight_of(*job.loss, target);
      return;
    }
    Total total;
    total.reference = 0;
    for (int64_t i = 0; i < job.n; i += kChunk) {
      const int n = static_cast<int>(job.n - i < kChunk ? job.n - i : kChunk);
      fetch(i, n);
      Lanes<f64x8> lanes;
      for (int j = 0; j < n; j += f64x8::lanes) lanes.add(load(q + j));
      lanes.fold_into(total);
    }
    sum_ = total.value();
  }

  double sum() const { return sum_; }

  // Elements [start, start + n) to q and visible; zeros up to whole vectors.
  SOFTMAXLIB_NOINLINE void fetch(int64_t start, int n) {
    const int padded = (n + 15) / 16 * 16;
    if (job_.base[kWhere]) {
      uint8_t where[kChunk];
      gather_visible(job_, place_, start, n, where);
      for (int i = 0; i < n; ++i) visible[i] = where[i] ? T(1) : T(0);
      for (int i = 0; i < n; ++i) q[i] = where[i] ? spread_ : 0;
    } else {
      for (int i = 0; i < n; ++i) visible[i] = 1;
      for (int i = 0; i < n; ++i) q[i] = spread_;
    }
    for (int i = n; i < padded; ++i) q[i] = visible[i] = 0;
    if (job_.loss->probabilities) {
      double p[kChunk];
      gather_elements(job_, place_, kTarget, start, n, p);
      for (int i = 0; i < n; ++i) q[i] += keep_ * p[i];
    } else if (target_ >= start && target_ < start + n) {
      q[target_ - start] += keep_;
    }
    if (job_.loss->weight)
      for (int i = 0; i < n; ++i) q[i] *= weight_of(*job_.loss, start + i);
  }

  alignas(64) double q[kChunk + 16];
  alignas(64) T visible[kChunk + 16];  // 1 or 0

 private:
  double count_visible() const {
    return static_cast<double>(softmaxlib::count_visible(job_, place_, job_.n, job_.n));
  }

  const Job& job_;
  const Place& place_;
  int64_t target_;
  double keep_, spread_, sum_;
};

// ---- Rows

inline f64x8 product_or_zero(f64x8 q, f64x8 y) { return select(eq(q, f64x8::set1(0)), q, q * y); }
inline f64x8 sum_of_products(InLanes<f32x16> q, InLanes<f32x16> y) {
  return product_or_zero(q.low, y.low) + product_or_zero(q.high, y.high);
}
inline f64x8 sum_of_products(InLanes<f64x8> q, InLanes<f64x8> y) {
  return product_or_zero(q.all, y.all);
}

template <class P, class D>
class CrossEntropyRow {
 public:
  using V = typename Row<D>::V;
  using T = typename Row<D>::T;

  CrossEntropyRow(const Job& job, const Row<D>& row, const Place& place, double weight_sum)
      : job_(job), loss_(*job.loss), row_(row), place_(place), weight_sum_(weight_sum) {
    if (!loss_.writes) return;
    const Affine affine = affine_of(job, place, {0, 0});
    const WideProduct factor(loss_.scale, affine.factor, loss_.exponent + affine.exponent);
    factor_ = factor.value;
    more_ = factor.more;
  }

  // The loss; writes the gradient where that is asked for.
  double run() {
    int64_t target = -1;
    if (!loss_.probabilities) {
      memcpy(&target, job_.base[kIndices] + place_.offset[kIndices], sizeof(target));
      if (target == loss_.ignore_index) {
        if (loss_.writes) row_.fill_from(0, 0, job_.n);
        return 0;
      }
      // Checked before, but the caller's memory may have changed since.
      if (target < 0 || target >= job_.n) return NAN;
    }
    if (job_.n == 0) return 0;
    double result = NAN;
    P::compute(
        row_,
        [&](const Row<D>& row, const P& p, const auto& rest) {
          const double weight = target >= 0 ? weight_of(loss_, target) : 1;
          const bool even = target >= 0 && !loss_.weight && !job_.base[kWhere];
          const auto fits = [&](double by) { return !loss_.writes || (more_ == 1 && p.fits(by)); };
          if (target >= 0 && loss_.smoothing == 0 && fits(weight * factor_)) {
            result = of_class(row, p, rest, target, weight);
          } else if (even) {  // the loss is the same, whatever becomes of the gradient
            result = of_smoothed(row, p, rest, target, loss_.writes && fits(factor_));
            if (!fits(factor_)) of_all(row, p, rest, target);
          } else {
            result = of_all(row, p, rest, target);
          }
        },
        [&](const Row<D>& row, double) {
          if (row.terms() == 0) {  // no class: infinite, if any should be one
            // Before the gradient is written, which may be where the target is.
            const double q = ClassWeights<D>(job_, place_, target, weight_sum_).sum();
            result = q > 0 ? INFINITY : q;
          }
          if (loss_.writes) row.fill(static_cast<T>(NAN), 0);
        });
    return result == result ? result : static_cast<double>(NAN);
  }

 private:
  template <class Rest>
  static bool is_held(Pair<V> z, const Rest& rest) {
    return static_cast<double>(first(z.hi)) == rest.held_hi &&
           static_cast<double>(first(z.lo)) == rest.held_lo;
  }
  static double first_of(InLanes<V> x) { return static_cast<double>(first(low_of(x))); }
  static f64x8 low_of(InLanes<f32x16> x) { return x.low; }
  static f64x8 low_of(InLanes<f64x8> x) { return x.all; }

  // 1 - p
  template <class Rest>
  double share_of_others(const P& p, const Rest& rest, Pair<V> z) const {
    return (is_held(z, rest) ? p.ratio : (1 + p.ratio) - first_of(p.relative(z))) / (1 + p.ratio);
  }

  template <class Rest>
  double of_class(const Row<D>& row, const P& p, const Rest& rest, int64_t target, double weight) {
    const Pair<V> z = element_of(row, target);
    if (loss_.writes) {
      const double g = 0 - share_of_others(p, rest, z) * weight * factor_ * first_of(p.slope(z));
      const bool counts = is_possible(target);  // before x is written to
      row.map(p.gradient(weight * factor_));
      if (counts) put(target, static_cast<T>(g));
    }
    return product_or_zero(weight, minus_log(p, z));
  }

  // A class and a share of all, which are alike.
  template <class Rest>
  double of_smoothed(const Row<D>& row, const P& p, const Rest& rest, int64_t target, bool writes) {
    const double n = static_cast<double>(row.size()), q = loss_.smoothing / n;
    const double keep = 1 - loss_.smoothing, sum = q * n + keep, c = factor_;
    const Pair<V> z = element_of(row, target);
    const auto f = p.gradient(sum * c, q * c);
    Total total;
    total.reference = 0;
    const auto add = [&](auto x, D* y, int64_t start, int64_t size) {
      for (int64_t i = 0; i < size; i += Row<D>::kChunk) {
        const int64_t count = size - i < Row<D>::kChunk ? size - i : Row<D>::kChunk;
        const auto chunk = x.at(i);
        Impossible impossible;
        if (y) find_impossible(chunk, start + i, count, &impossible);
        Lanes<V> lanes;
        int64_t j = 0;
        for (; j + V::lanes <= count; j += V::lanes)
          lanes.add(widen_sum(V::set1(0) - p.log_p(chunk.load(j))));
        if (j < count) {  // nothing beyond the end
          T end[V::lanes];
          store(end, V::set1(0) - p.log_p(load_up_to(chunk, j, count - j)));
          lanes.add(widen_sum(load_n(end, static_cast<int>(count - j), T(0))));
        }
        lanes.fold_into(total);
        if (!y) continue;
        map_elements(chunk, y + i, count, row.streams(), f);
        impossible.clear(y + i, count);
      }
    };
    double g = 0;
    bool counts = false;
    if (writes) {
      // sum p - q - keep by way of 1 - p, where p is nearly 1; of a small p that would cancel. A
      // label that keeps nothing is a class like any other.
      const double others = share_of_others(p, rest, z);
      const double difference = others < 0.5
                                    ? q * (n - 1) - sum * others
                                    : sum * (first_of(p.relative(z)) / (1 + p.ratio)) - (q + keep);
      g = difference * c * first_of(p.slope(z));
      // Before x is written to. An only class has p = 1, and nothing to gain.
      counts = (keep > 0 || job_.n == 1) && is_possible(target);
    }
    row.read_write(0, row.size(), add, writes);
    if (counts) put(target, static_cast<T>(g));
    return product_or_zero(q, sum_of(total)) + product_or_zero(keep, minus_log(p, z));
  }

  // The gradient of a class of logit -inf is 0, whatever share of the target it has. That is for x
  // and its bias to say, as they are given: a finite argument, too, becomes -inf where a small
  // temperature, or the row's maximum, carries it out of the range.
  struct Impossible {
    bool any = false;
    uint8_t at[Row<D>::kChunk];

    void clear(D* y, int64_t n) const {
      for (int64_t i = 0; any && i < n; ++i)
        if (at[i]) y[i] = 0;
    }
  };
  SOFTMAXLIB_NOINLINE void find_impossible(int64_t start, int64_t n, Impossible* found) const {
    T x[Row<D>::kChunk];
    double bias[Row<D>::kChunk];
    gather_elements(job_, place_, kX, start, n, x);
    for (int64_t i = 0; i < n; ++i) found->at[i] = x[i] == -static_cast<T>(INFINITY);
    if (job_.base[kBias]) {
      gather_elements(job_, place_, kBias, start, n, bias);
      for (int64_t i = 0; i < n; ++i) found->at[i] |= bias[i] == -INFINITY;
    }
    found->any = true;
  }
  // The same where some argument of a chunk is -inf, as few are.
  template <class X>
  void find_impossible(X chunk, int64_t start, int64_t n, Impossible* found) const {
    V low = V::set1(0);
    int64_t j = 0;
    for (; j + V::lanes <= n; j += V::lanes) low = min(low, high(chunk.load(j)));
    if (j < n) low = min(low, high(chunk.load_n(j, static_cast<int>(n - j), T(0))));
    if (any(eq(low, V::set1(static_cast<T>(-INFINITY))))) find_impossible(start, n, found);
  }
  // Whether a label can be one: `where` may exclude it, too.
  bool is_possible(int64_t target) const {
    Impossible found;
    find_impossible(target, 1, &found);
    return !found.at[0] && is_visible(job_, place_, target);
  }

  static double minus_log(const P& p, Pair<V> z) {
    return 0 - static_cast<double>(first(p.log_p(z)));
  }
  static double sum_of(const Total& total) { return finite(total.sum) ? total.value() : total.sum; }

  void put(int64_t element, T value) { row_.put(element, 1, &value); }

  template <class Rest>
  double of_all(const Row<D>& row, const P& p, const Rest& rest, int64_t target) {
    ClassWeights<D> weights(job_, place_, target, weight_sum_);
    Total total;
    total.reference = 0;
    const auto add = [&](auto x, D* y, int64_t start, int64_t n) {
      for (int64_t i = 0; i < n; i += Row<D>::kChunk) {
        const int64_t stop = n - i < Row<D>::kChunk ? n : i + Row<D>::kChunk;
        weights.fetch(start + i, static_cast<int>(stop - i));
        Impossible impossible;
        if (y) find_impossible(x.at(i), start + i, stop - i, &impossible);
        Lanes<V> lanes;
        for (int64_t j = i; j < stop; j += V::lanes) {
          const Pair<V> z = to_pair(load_up_to(x, j, stop - j));
          InLanes<V> q;
          load_lanes(weights.q + (j - i), q);
          lanes.add(sum_of_products(q, InLanes<V>::of(V::set1(0) - p.log_p(z))));
          if (!y) continue;
          const V g = select(eq(load(weights.visible + (j - i)), V::set1(0)), V::set1(0),
                             gradient(p, rest, z, q, weights.sum()));
          if (stop - j >= V::lanes) store(y + j, g);
          else store_n(y + j, g, static_cast<int>(stop - j));
        }
        if (y) impossible.clear(y + i, stop - i);
        lanes.fold_into(total);
      }
    };
    row.read_write(0, row.size(), add, loss_.writes);
    return sum_of(total);
  }

  template <class Rest>
  V gradient(const P& p, const Rest& rest, Pair<V> z, InLanes<V> q, double sum) const {
    const InLanes<V> all = in_all(sum, V()), one = in_all(factor_, V()) * p.slope(z);
    const InLanes<V> share = p.relative(z) * in_all(1 / (1 + p.ratio), V());
    const InLanes<V> more = in_all(more_, V());
    V g = ((all * share - q) * one * more).value();
    if (p.ratio < 1) {  // 1 - p of the largest is more accurate than p
      const InLanes<V> others = in_all(sum * (p.ratio / (1 + p.ratio)), V());
      const V of_largest = (((all - q) - others) * one * more).value();
      const auto hi = eq(z.hi, V::set1(static_cast<T>(rest.held_hi)));
      const auto lo = eq(z.lo, V::set1(static_cast<T>(rest.held_lo)));
      g = select(hi, select(lo, of_largest, g), g);
    }
    return select(eq(g, g), g, V::set1(static_cast<T>(NAN)));
  }

  const Job& job_;
  const Loss& loss_;
  const Row<D>& row_;
  const Place& place_;
  double weight_sum_;
  double factor_ = 0, more_ = 1;  // of the gradient: their product
};

inline double sum_of_weights(const Job& job) {
  if (!job.loss->weight) return static_cast<double>(job.n);
  Total total;
  total.reference = 0;
  for (int64_t i = 0; i < job.n; ++i) total.add(weight_of(*job.loss, i));
  return total.value();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
