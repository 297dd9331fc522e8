// Vector-Jacobian products. With z = x scale, G the gradient that comes in, y the result:
//
//   softmax        y (G - sum of y G) scale
//   log_softmax    (G - e^log_y sum of G) scale
//   logsumexp      G e^(z - result) scale, without a sum
//   stablemax      y (G - sum of y G) scale / (1 + |z|), as d log s / dz = 1 / (1 + |z|)
//   log_stablemax  (G - e^log_y sum of G) scale / (1 + |z|)
//
// Exactly 0 where y is 0 (log_y -inf) or `where` is false: such elements are not in the sum either,
// whatever G holds there. Sums and products are in double, rounded once.
#pragma once

#include "kernels/state.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <softmaxlib_function kFunction>
struct GradientOf {
  static constexpr bool kReduces = kFunction == SOFTMAXLIB_LOGSUMEXP;
  static constexpr bool kLog =
      kFunction == SOFTMAXLIB_LOG_SOFTMAX || kFunction == SOFTMAXLIB_LOG_STABLEMAX;
  static constexpr bool kStable =
      kFunction == SOFTMAXLIB_STABLEMAX || kFunction == SOFTMAXLIB_LOG_STABLEMAX;
  static constexpr bool kReadsX = kStable || kReduces;
};

// e^(hi + lo) in double.
inline InLanes<f32x16> exp_wide(Pair<f32x16> x) {
  using E = Exp<f32x16, true>;
  const Pair<f32x16> e = E(0)(x);
  const f64x8 unit = f64x8::set1(power_of_two(-E::kBias));
  return {(widen_low(e.hi) + widen_low(e.lo)) * unit, (widen_high(e.hi) + widen_high(e.lo)) * unit};
}
inline InLanes<f64x8> exp_wide(Pair<f64x8> x) {
  using E = Exp<f64x8>;
  return {E(0)(x) * f64x8::set1(power_of_two(-E::kBias))};
}

// x scale - shift, no bit lost that counts.
inline Pair<f32x16> moved_argument(f32x16 x, const Affine& a) {
  return combine(x, {f64x8::set1(0), f64x8::set1(0)}, a);
}
inline Pair<f64x8> moved_argument(f64x8 x, const Affine& a) {
  const Pair<f64x8> z = combine(x, {f64x8::set1(0)}, {a.scale, a.scale_lo, 0});
  const f64x8 shift = f64x8::set1(a.shift), d = z.hi - shift, tail = d - z.hi;
  return finite_pair(d, ((z.hi - (d - tail)) - (shift + tail)) + z.lo);
}

inline void add_products(Lanes<f32x16>& lanes, f32x16 a, f32x16 b) {
  lanes.add(widen_low(a) * widen_low(b) + widen_high(a) * widen_high(b));
}
inline void add_products(Lanes<f64x8>& lanes, f64x8 a, f64x8 b) {
  const f64x8 product = a * b;
  lanes.error = lanes.error + fma(a, b, f64x8::set1(0) - product);
  lanes.add(product);
}
inline void add_values(Lanes<f32x16>& lanes, f32x16 a) { lanes.add(widen_low(a) + widen_high(a)); }
inline void add_values(Lanes<f64x8>& lanes, f64x8 a) { lanes.add(a); }

// One row; S: what its operands are in memory, all contiguous from `start` on.
template <softmaxlib_function kFunction, class S>
struct GradientPiece {
  using Of = GradientOf<kFunction>;
  using V = typename vector_of<S>::type;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;

  const S *grad, *y, *x;  // those that the function has
  const uint8_t* where;   // NULL: all

  static V load_some(const S* p, int64_t i, int64_t n, T fill) {
    return n - i >= kLanes ? load(p + i) : load_n(p + i, static_cast<int>(n - i), fill);
  }
  // Whether each lane takes part, with zeros elsewhere.
  V masked(V v, V result, int64_t i, int64_t n) const {
    const T none = static_cast<T>(Of::kLog ? -INFINITY : 0);
    v = select(eq(result, V::set1(none)), V::set1(0), v);
    return visible(v, i, n);
  }
  V visible(V v, int64_t i, int64_t n) const {
    if (!where) return v;
    uint8_t bytes[kLanes] = {};
    const int64_t count = n - i < kLanes ? n - i : kLanes;
    for (int64_t j = 0; j < count; ++j) bytes[j] = where[i + j];
    return select(load_mask(bytes, v), v, V::set1(0));
  }

  void add_to(Total& total, int64_t n) const {
    Lanes<V> lanes;
    for (int64_t i = 0; i < n; i += kLanes) {
      const V result = load_some(y, i, n, static_cast<T>(Of::kLog ? -INFINITY : 0));
      const V g = masked(load_some(grad, i, n, 0), result, i, n);
      if constexpr (Of::kLog) add_values(lanes, g);
      else add_products(lanes, g, result);
    }
    lanes.fold_into(total);
  }

  // sum: of the row; for logsumexp the gradient that comes in. affine.shift: logsumexp's result.
  template <class D>
  void write(D* out, int64_t n, double sum, const Affine& affine) const {
    const InLanes<V> total = in_all(sum, V()), scale = in_all(affine.scale, V());
    for (int64_t i = 0; i < n; i += kLanes) {
      InLanes<V> d;
      V result = V::set1(1);
      if constexpr (Of::kReduces) {
        const V v = load_some(x, i, n, 0);
        d = total * exp_wide(moved_argument(v, affine));
        result = select(eq(v, V::set1(static_cast<T>(-INFINITY))), V::set1(0), V::set1(1));
      } else {
        result = load_some(y, i, n, 0);
        const auto g = InLanes<V>::of(load_some(grad, i, n, 0));
        if constexpr (Of::kLog) {
          d = g - exp_wide(Pair<V>{result, V::set1(0)}) * total;
        } else {
          d = InLanes<V>::of(result) * (g - total);
        }
      }
      d = d * scale;
      if constexpr (Of::kStable) {
        d = over_one_plus_magnitude(d, InLanes<V>::of(load_some(x, i, n, 0)) * scale);
      }
      V v = narrowed(d);
      v = select(eq(v, v), v, V::set1(static_cast<T>(NAN)));  // NaNs have signs of their own
      v = masked_out(v, result, i, n);
      if (n - i >= kLanes) store(out + i, v);
      else store_n(out + i, v, static_cast<int>(n - i));
    }
  }

 private:
  V masked_out(V v, V result, int64_t i, int64_t n) const {
    if constexpr (Of::kReduces) return visible(select(eq(result, V::set1(0)), result, v), i, n);
    else return masked(v, result, i, n);
  }
  static f64x8 divided(f64x8 d, f64x8 z) { return d / (f64x8::set1(1) + magnitude(z).hi); }
  static InLanes<f32x16> over_one_plus_magnitude(InLanes<f32x16> d, InLanes<f32x16> z) {
    return {divided(d.low, z.low), divided(d.high, z.high)};
  }
  static InLanes<f64x8> over_one_plus_magnitude(InLanes<f64x8> d, InLanes<f64x8> z) {
    return {divided(d.all, z.all)};
  }
  static f32x16 narrowed(InLanes<f32x16> d) { return narrow(d.low, d.high); }
  static f64x8 narrowed(InLanes<f64x8> d) { return d.all; }
};

template <softmaxlib_function kFunction, class D>
class GradientRow {
 public:
  using Of = GradientOf<kFunction>;
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int kChunk = kVectorsPerChunk * V::lanes;

  GradientRow(const Job& job, const Place& place) : job_(job), place_(place) {}

  void run() {
    Affine affine = affine_of(job_, place_, 0);
    double sum = 0;
    if constexpr (Of::kReduces) {
      affine.shift = row_operand(job_, place_, kResult, 0);
      sum = row_operand(job_, place_, kGrad, 0);
    } else {
      Total total;
      total.reference = 0;
      for_chunks([&](const auto& piece, int64_t, int64_t n) { piece.add_to(total, n); });
      sum = total.value();
    }
    for_chunks([&](const auto& piece, int64_t start, int64_t n) {
      if (job_.direct) {
        piece.write(at<D>(kOut) + start, n, sum, affine);
      } else {
        piece.write(out_, n, sum, affine);
        for_runs(job_, place_, kOut, start, n,
                 [&](char* p, int64_t stride, int64_t done, int64_t count) {
                   for (int64_t i = 0; i < count; ++i)
                     memcpy(p + i * stride, out_ + done + i, sizeof(D));
                 });
      }
    });
  }

 private:
  template <class S>
  S* at(Operand k) const {
    return reinterpret_cast<S*>(job_.base[k] + place_.offset[k]);
  }
  // f(piece, first element, count) for every chunk.
  template <class F>
  void for_chunks(F f) {
    for (int64_t start = 0; start < job_.n; start += kChunk) {
      const int64_t n = job_.n - start < kChunk ? job_.n - start : kChunk;
      const uint8_t* where = nullptr;
      if (job_.base[kWhere]) {
        for_runs(job_, place_, kWhere, start, n,
                 [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                   gather<uint8_t>(p, stride, count, where_ + done);
                 });
        where = where_;
      }
      if (job_.direct) {
        f(GradientPiece<kFunction, D>{Of::kReduces ? nullptr : at<const D>(kGrad) + start,
                                      Of::kReduces ? nullptr : at<const D>(kResult) + start,
                                      at<const D>(kX) + start, where},
          start, n);
      } else {
        if (!Of::kReduces) fetch(kGrad, start, n, grad_), fetch(kResult, start, n, y_);
        if (Of::kReadsX) fetch(kX, start, n, x_);
        f(GradientPiece<kFunction, T>{grad_, y_, x_, where}, start, n);
      }
    }
  }
  void fetch(Operand k, int64_t start, int64_t n, T* to) const {
    for_runs(job_, place_, k, start, n,
             [&](const char* p, int64_t stride, int64_t done, int64_t count) {
               gather_any(job_.dtype[k], p, stride, count, to + done);
             });
  }

  const Job& job_;
  const Place& place_;
  alignas(64) T grad_[kChunk], y_[kChunk], x_[kChunk];
  alignas(64) D out_[kChunk];
  uint8_t where_[kChunk];
};

template <softmaxlib_function kFunction, class D>
void gradient_rows(const Job& job, int64_t start, int64_t stop, char*) {
  const DefaultFloatingPoint environment;
  Rows rows(job, start);
  for (int64_t r = start; r < stop; ++r, rows.next())
    GradientRow<kFunction, D>(job, rows.place()).run();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
