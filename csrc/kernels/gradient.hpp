// Vector-Jacobian products. With z = x scale, G the gradient that comes in, y the result:
//
//   softmax        y (G - sum of y G) scale
//   log_softmax    (G - e^log_y sum of G) scale
//   logsumexp      G e^(z - result) scale, without a sum
//   stablemax      y (G - sum of y G) scale / (1 + |z|), as d log s / dz = 1 / (1 + |z|)
//   log_stablemax  (G - e^log_y sum of G) scale / (1 + |z|)
//
// Exactly 0 where y is 0 (log_y -inf) or `where` is false: such elements are not in the sum either,
// whatever G holds there. Sums and products are in double, rounded once; log_softmax of floats
// without temperature subtracts in float: what cancels does so exactly.
#pragma once

#include "kernels/softmax_pipelined.hpp"
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

// a b 2^exponent = value more; more is a power of two, and 1 where value alone is in range.
struct WideProduct {
  double value, more;

  WideProduct(double a, double b, int exponent) {
    constexpr int kMost = 1000;
    int of_a, of_b;
    const double m = split_exponent(a, &of_a) * split_exponent(b, &of_b);
    const int k = of_a + of_b + exponent;
    const int first = k > kMost ? kMost : k < -kMost ? -kMost : k;
    value = m * power_of_two(first);
    more = power_of_two(k - first > -kMost ? k - first : -kMost);
  }
};

// What Exp's results are multiplied by.
template <class V>
inline double exp_unit() {
  return power_of_two(-Exp<V, Use::kExact>::kBias);
}

// e^(hi + lo) in double, under a reference.
SOFTMAXLIB_INLINE InLanes<f32x16> exp_under(Pair<f32x16> x, int reference) {
  const Pair<f32x16> e = Exp<f32x16, Use::kExact>(reference)(x);
  const f64x8 unit = f64x8::set1(exp_unit<f32x16>() * power_of_two(reference));
  return {(widen_low(e.hi) + widen_low(e.lo)) * unit, (widen_high(e.hi) + widen_high(e.lo)) * unit};
}

// `usual`, but f(e^x) where x is so small that the exponential is about to leave the range of
// float: there it is taken under a reference of its own.
template <class X, class F>
SOFTMAXLIB_INLINE InLanes<f32x16> if_small(X x, InLanes<f32x16> usual, F f) {
  constexpr float kSmall = -80;
  constexpr int kReference = -160;
  if (!any(gt(f32x16::set1(kSmall), high(x)))) return usual;
  const InLanes<f32x16> small = f(exp_under(to_pair(x), kReference));
  const InLanes<f32x16> z = InLanes<f32x16>::of(high(x));
  const f64x8 limit = f64x8::set1(static_cast<double>(kSmall));
  return {select(gt(limit, z.low), small.low, usual.low),
          select(gt(limit, z.high), small.high, usual.high)};
}
SOFTMAXLIB_INLINE InLanes<f32x16> exp_wide(Pair<f32x16> x) {
  return if_small(x, exp_under(x, 0), [](InLanes<f32x16> of_small) { return of_small; });
}
SOFTMAXLIB_INLINE InLanes<f64x8> exp_wide(Pair<f64x8> x) {
  return {Exp<f64x8, Use::kExact>(0)(x) * f64x8::set1(exp_unit<f64x8>())};
}

// g - e^x total; e^x as a pair, so that near 1 what it lacks is not lost.
SOFTMAXLIB_INLINE InLanes<f32x16> less_exp(f32x16 g, f32x16 x, double total) {
  const Pair<f32x16> e = Exp<f32x16, Use::kExact>(0)(Pair<f32x16>{x, f32x16::set1(0)});
  const f64x8 t = f64x8::set1(total * exp_unit<f32x16>());
  const InLanes<f32x16> d = {fnma(widen_low(e.lo), t, fnma(widen_low(e.hi), t, widen_low(g))),
                             fnma(widen_high(e.lo), t, fnma(widen_high(e.hi), t, widen_high(g)))};
  return if_small(x, d, [&](InLanes<f32x16> of_small) {
    const f64x8 all = f64x8::set1(total);
    return InLanes<f32x16>{fnma(of_small.low, all, widen_low(g)),
                           fnma(of_small.high, all, widen_high(g))};
  });
}
SOFTMAXLIB_INLINE InLanes<f64x8> less_exp(f64x8 g, f64x8 x, double total) {
  // The unit of the exponential goes to whichever of the two it does not carry below the range.
  const bool is_small = total < 0x1p-900 && total > -0x1p-900;
  const double unit = exp_unit<f64x8>();
  const f64x8 e = Exp<f64x8>(0)(Pair<f64x8>{x, f64x8::set1(0)}) * f64x8::set1(is_small ? unit : 1);
  return {fnma(e, f64x8::set1(is_small ? total : total * unit), g)};
}

// e^z times the gradient that comes in, which is one of the row, and the scale. Where e^z alone is
// below the range of double their product may be in it.
struct RowGradient {
  WideProduct of_double;
  double factor;

  RowGradient(double gradient, const Affine& a)
      : of_double(gradient, a.factor, a.exponent - Exp<f64x8>::kBias), factor(gradient) {}

  SOFTMAXLIB_INLINE InLanes<f32x16> times_exp(Pair<f32x16> z, double scale) const {
    return exp_wide(z) * in_all(factor, f32x16()) * in_all(scale, f32x16());
  }
  SOFTMAXLIB_INLINE InLanes<f64x8> times_exp(Pair<f64x8> z, double) const {
    const f64x8 e = Exp<f64x8>(0)(z);
    return {e * f64x8::set1(of_double.value) * f64x8::set1(of_double.more)};
  }
};

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

// The sum of a row, and what its elements are multiplied by.
struct GradientFactors {
  double sum;       // for logsumexp the gradient that comes in
  Affine affine;    // its shift: logsumexp's result
  double unit = 1;  // of the gradient that comes in, and so of the sum

  // Of doubles the sum, or what it is subtracted from, may leave the range where the result does
  // not. Then all of the row is computed in a smaller unit.
  static constexpr double kSmallUnit = 0x1p-64, kLargeSum = 0x1p960;
  bool needs_smaller_unit() const {
    const double size = sum < 0 ? -sum : sum;
    return unit == 1 && !(size <= kLargeSum);
  }

  // Whether float will do: nothing to multiply by, and the sum in units of an exponential is
  // normal.
  bool is_plain() const {
    const double size = sum < 0 ? -sum : sum;
    return affine.factor == 1 && affine.exponent == 0 && size > 0x1p-64 && size < 0x1p56;
  }
};

// d scale / (1 + |x scale|), d being in the row's unit.
template <class V>
class StableSlope {
 public:
  explicit StableSlope(const GradientFactors& f) {
    const double scale = f.affine.rounded();
    if (scale >= 0x1p-900) {  // d / (1 / scale + |x|), where neither product can leave the range
      const double half = f.unit == 1 ? 1 : 0x1p32;
      before_ = after_ = half;
      plus_ = 1 / scale;
      times_ = 1;
    } else {
      before_ = scale / f.unit;
      plus_ = after_ = 1;
      times_ = scale;
    }
  }
  InLanes<f32x16> operator()(InLanes<f32x16> d, InLanes<f32x16> x) const {
    return {of(d.low, x.low), of(d.high, x.high)};
  }
  InLanes<f64x8> operator()(InLanes<f64x8> d, InLanes<f64x8> x) const { return {of(d.all, x.all)}; }

 private:
  f64x8 of(f64x8 d, f64x8 x) const {
    const f64x8 slope = f64x8::set1(plus_) + magnitude(x).hi * f64x8::set1(times_);
    return d * f64x8::set1(before_) / slope * f64x8::set1(after_);
  }

  double before_, plus_, times_, after_;
};

// Part of a row; S: what its operands are in memory, all contiguous.
template <softmaxlib_function kFunction, class S>
struct GradientPiece {
  using Of = GradientOf<kFunction>;
  using V = typename vector_of<S>::type;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr T kNone = static_cast<T>(Of::kLog ? -INFINITY : 0);

  const S *grad, *y, *x;  // those that the function has
  const uint8_t* where;   // NULL: all

  void add_to(Total& total, int64_t n, double unit) const {
    Lanes<V> lanes;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) {
      // The row before is written meanwhile.
      prefetch(y + i + kVectorsPerChunk * kLanes);
      prefetch(grad + i + kVectorsPerChunk * kLanes);
      if constexpr (Of::kReadsX) prefetch(x + i + kVectorsPerChunk * kLanes);
      add_vector(lanes, i, kLanes, unit);
    }
    if (i < n) add_vector(lanes, i, static_cast<int>(n - i), unit);
    lanes.fold_into(total);
  }

  // out: n elements, streamed from the first aligned vector on; what is left at the ends: to edge.
  template <class D>
  void write(D* out, int64_t n, const GradientFactors& f, Edge<D>* edge) const {
    if constexpr (kFunction == SOFTMAXLIB_LOG_SOFTMAX && sizeof(T) == 4) {
      if (f.is_plain()) {
        const double sum = f.sum * exp_unit<V>();
        const T hi = static_cast<T>(sum), lo = static_cast<T>(sum - static_cast<double>(hi));
        return write_each(out, n, edge, [=](V g, V result, V) SOFTMAXLIB_INLINE_LAMBDA {
          const Pair<V> e = Exp<V, Use::kExact>(0)(Pair<V>{result, V::set1(0)});
          return fnma(e.hi, V::set1(hi), g) - fma(e.lo, V::set1(hi), e.hi * V::set1(lo));
        });
      }
    }
    const double sum = f.sum;
    const double unit = f.unit;
    const WideProduct factor(f.affine.factor, 1 / unit, f.affine.exponent);
    // Of doubles, the power of two in a factor above 1 goes to y first, exactly: that product is in
    // range, the one with the rest may not be. Products of floats are in the range of double
    // anyhow.
    constexpr bool kDouble = sizeof(T) == 8;
    int exponent;
    split_exponent(factor.value, &exponent);
    const double early = !kDouble || Of::kLog || exponent < 1 ? 1 : power_of_two(exponent - 1);
    const InLanes<V> total = in_all(sum, V()), larger = in_all(early, V()),
                     scale = in_all(factor.value / early, V()), more = in_all(factor.more, V());
    const Affine affine = f.affine;
    const StableSlope<V> stable_slope(f);
    const RowGradient row_gradient(sum, f.affine);
    write_each(out, n, edge, [=](V g, V result, V z) SOFTMAXLIB_INLINE_LAMBDA {
      InLanes<V> d;
      g = in_unit(g, unit);
      if constexpr (Of::kReduces)
        return row_gradient.times_exp(combine_wide(z, in_all(0, V()), affine), affine.rounded())
            .value();
      if constexpr (Of::kLog) d = less_exp(g, result, sum);
      else if constexpr (Of::kStable || !kDouble)
        d = InLanes<V>::of(result) * (InLanes<V>::of(g) - total);
      else d = InLanes<V>::of(result) * larger * (InLanes<V>::of(g) - total);
      if constexpr (Of::kStable) return stable_slope(d, InLanes<V>::of(z)).value();
      else if constexpr (kDouble) return (d * scale * more).value();
      else return (d * scale).value();
    });
  }

 private:
  static SOFTMAXLIB_INLINE f32x16 in_unit(f32x16 g, double) { return g; }
  static SOFTMAXLIB_INLINE f64x8 in_unit(f64x8 g, double unit) { return g * f64x8::set1(unit); }
  static V load_some(const S* p, int64_t i, int n, T fill) {
    return n == kLanes ? load(p + i) : load_n(p + i, n, fill);
  }
  // Zeros where an element takes no part.
  V masked(V v, V result, int64_t i, int n) const {
    v = select(eq(result, V::set1(kNone)), V::set1(0), v);
    if (!where) return v;
    if (n == kLanes) return select(load_mask(where + i, v), v, V::set1(0));
    uint8_t bytes[kLanes] = {};
    for (int j = 0; j < n; ++j) bytes[j] = where[i + j];
    return select(load_mask(bytes, v), v, V::set1(0));
  }
  SOFTMAXLIB_INLINE void add_vector(Lanes<V>& lanes, int64_t i, int n, double unit) const {
    const V result = load_some(y, i, n, kNone);
    const V g = masked(in_unit(load_some(grad, i, n, 0), unit), result, i, n);
    if constexpr (Of::kLog) add_values(lanes, g);
    else add_products(lanes, g, result);
  }

  // f(gradient, result, x) of every vector.
  template <class D, class F>
  SOFTMAXLIB_INLINE void write_each(D* out, int64_t n, Edge<D>* edge, F f) const {
    const auto at = [f, piece = *this](int64_t i, int count) SOFTMAXLIB_INLINE_LAMBDA {
      V g = V::set1(0), result = g, z = g;
      if constexpr (!Of::kReduces) {
        g = load_some(piece.grad, i, count, 0);
        result = load_some(piece.y, i, count, 0);
      }
      if constexpr (Of::kReadsX) z = load_some(piece.x, i, count, 0);
      const V d = f(g, result, z);
      const V number = select(eq(d, d), d, V::set1(static_cast<T>(NAN)));  // its sign is not ours
      if constexpr (Of::kReduces) {
        const auto none = eq(z, V::set1(static_cast<T>(-INFINITY)));
        result = select(none, V::set1(0), V::set1(1));
      }
      return piece.masked(number, result, i, count);
    };
    // A copy of at: the loop's own stays in registers only if its address goes nowhere.
    const auto some = [at](int64_t i, int64_t count)
                          SOFTMAXLIB_NOINLINE_LAMBDA { return at(i, static_cast<int>(count)); };
    const bool streaming = edge;
    int64_t i = 0;
    constexpr int64_t kItem = sizeof(D), kVector = kLanes * kItem;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(out)) % kVector;
    if (streaming && past) {
      i = (kVector - past) / kItem;
      edge->end(out, some(0, i), static_cast<int>(i));
    }
    for (; i + kLanes <= n; i += kLanes) {
      const V d = at(i, kLanes);
      if (streaming) stream(out + i, d);
      else store(out + i, d);
    }
    if (i == n) return;
    const int count = static_cast<int>(n - i);
    if (streaming) edge->begin(out + i, some(i, count), count);
    else store_n(out + i, some(i, count), count);
  }
};

// Where operands wait that cannot be read or written in place: a chunk, and what alignment adds.
template <class D>
struct GradientStage {
  using V = typename vector_of<D>::type;
  static constexpr int kSize = (kVectorsPerChunk + 1) * V::lanes;
  alignas(64) typename V::elem grad[kSize], y[kSize], x[kSize];
  alignas(64) D out[kSize];
  uint8_t where[kSize];
};

template <softmaxlib_function kFunction, class D>
class GradientRow {
 public:
  using Of = GradientOf<kFunction>;
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int64_t kChunk = kVectorsPerChunk * V::lanes;

  GradientRow(const Job& job, const Place& place, GradientStage<D>* stage, Edge<D>* edge)
      : job_(&job), place_(place), stage_(stage), factors_{0, affine_of(job, place, {0, 0}), 1} {
    const auto at = reinterpret_cast<uintptr_t>(job.base[kOut] + place.offset[kOut]);
    const int64_t past = static_cast<int64_t>(at) % kVector;
    if (!is_direct() || !job.streaming || job.n < V::lanes || past % kItem) return;
    edge_ = edge;
    head_ = past ? (kVector - past) / kItem : 0;
  }

  // Chunk by chunk, so that this row is read while the one before is written.
  void read_beside(const GradientRow* before) {
    if constexpr (Of::kReduces) {
      factors_.affine.shift = row_operand(*job_, place_, kResult, 0);
      factors_.sum = row_operand(*job_, place_, kGrad, 0);
    }
    sum_up(before);
    if constexpr (!Of::kReduces && sizeof(T) == 8) {
      if (factors_.needs_smaller_unit()) {
        factors_.unit = GradientFactors::kSmallUnit;
        sum_up(nullptr);
      }
    }
  }
  void write() const {
    for (int64_t start = 0; start < job_->n; start += kChunk) write_chunk(start);
  }

 private:
  static constexpr int64_t kItem = sizeof(D), kVector = V::lanes * kItem;

  // Whether all operands are read and written where they are.
  bool is_direct() const {
    return job_->direct && job_->dtype[kOut] == (kItem == 4 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64);
  }

  void sum_up(const GradientRow* before) {
    Total total;
    total.reference = 0;
    for (int64_t start = 0; start < job_->n; start += kChunk) {
      const int64_t n = job_->n - start < kChunk ? job_->n - start : kChunk;
      if constexpr (!Of::kReduces)
        with_piece(start, n, [&](const auto& piece) { piece.add_to(total, n, factors_.unit); });
      if (before) before->write_chunk(start);
    }
    if constexpr (!Of::kReduces) factors_.sum = total.value();
  }

  void write_chunk(int64_t start) const {
    const int64_t end = start + kChunk + head_ < job_->n ? start + kChunk + head_ : job_->n;
    if (start) start += head_;
    const int64_t n = end - start;
    if (n <= 0) return;
    with_piece(start, n, [&](const auto& piece) {
      if (is_direct()) return piece.write(at<D>(kOut) + start, n, factors_, edge_);
      piece.write(stage_->out, n, factors_, static_cast<Edge<D>*>(nullptr));
      for_runs(*job_, place_, kOut, start, n,
               [&](char* p, int64_t stride, int64_t done, int64_t count) {
                 store_all(job_->dtype[kOut], p, stride, count, stage_->out + done);
               });
    });
  }

  template <class S>
  S* at(Operand k) const {
    return reinterpret_cast<S*>(job_->base[k] + place_.offset[k]);
  }
  template <class F>
  void with_piece(int64_t start, int64_t n, F f) const {
    const uint8_t* where = nullptr;
    if (job_->base[kWhere]) {
      for_runs(*job_, place_, kWhere, start, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather<uint8_t>(p, stride, count, stage_->where + done);
               });
      where = stage_->where;
    }
    if (is_direct()) {
      return f(GradientPiece<kFunction, D>{Of::kReduces ? nullptr : at<const D>(kGrad) + start,
                                           Of::kReduces ? nullptr : at<const D>(kResult) + start,
                                           at<const D>(kX) + start, where});
    }
    if (!Of::kReduces) fetch(kGrad, start, n, stage_->grad), fetch(kResult, start, n, stage_->y);
    if (Of::kReadsX) fetch(kX, start, n, stage_->x);
    f(GradientPiece<kFunction, T>{stage_->grad, stage_->y, stage_->x, where});
  }
  void fetch(Operand k, int64_t start, int64_t n, T* to) const {
    for_runs(*job_, place_, k, start, n,
             [&](const char* p, int64_t stride, int64_t done, int64_t count) {
               gather_any(job_->dtype[k], p, stride, count, to + done);
             });
  }

  const Job* job_;
  Place place_;
  GradientStage<D>* stage_;
  Edge<D>* edge_ = nullptr;
  int64_t head_ = 0;
  GradientFactors factors_;
};

template <softmaxlib_function kFunction, class D>
void gradient_rows(const Job& job, int64_t start, int64_t stop, char*) {
  using Row = GradientRow<kFunction, D>;
  const DefaultFloatingPoint environment;
  GradientStage<D> stage;
  Edge<D> edge;
  Rows rows(job, start);
  Row before(job, rows.place(), &stage, &edge);
  before.read_beside(nullptr);
  for (int64_t r = start + 1; r < stop; ++r) {
    rows.next();
    Row row(job, rows.place(), &stage, &edge);
    row.read_beside(&before);
    before = row;
  }
  before.write();
  edge.flush();
  stream_fence();
}

// x times a factor, which is the operand kBias; x itself where that is 0. The product is exact in
// double but for double itself, and rounded once.
template <class V>
SOFTMAXLIB_INLINE V scaled_element(V x, InLanes<V> factor) {
  const V product = (InLanes<V>::of(x) * factor).value();
  const V number =
      select(eq(product, product), product, V::set1(static_cast<typename V::elem>(NAN)));
  return select(eq(x, V::set1(0)), x, number);
}

template <class D>
void scale_rows(const Job& job, int64_t start, int64_t stop, char*) {
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  constexpr int64_t kChunk = kVectorsPerChunk * V::lanes;
  const DefaultFloatingPoint environment;
  alignas(64) T x[kChunk];
  alignas(64) double factors[kChunk];
  alignas(64) D y[kChunk];
  Rows rows(job, start);
  const bool even = job.linear && (job.n == 1 || job.inner[0].stride[kBias] == 0);
  for (int64_t r = start; r < stop; ++r, rows.next()) {
    const Place& place = rows.place();
    if (even) {  // one factor for a contiguous row
      const InLanes<V> factor = in_all(row_operand(job, place, kBias, 1), V());
      map_elements(Contiguous<D>{reinterpret_cast<const D*>(job.base[kX] + place.offset[kX])},
                   reinterpret_cast<D*>(job.base[kOut] + place.offset[kOut]), job.n, job.streaming,
                   [factor](V v) SOFTMAXLIB_INLINE_LAMBDA { return scaled_element(v, factor); });
      continue;
    }
    for (int64_t i = 0; i < job.n; i += kChunk) {
      const int64_t n = job.n - i < kChunk ? job.n - i : kChunk;
      for_runs(job, place, kX, i, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather_any(job.dtype[kX], p, stride, count, x + done);
               });
      for_runs(job, place, kBias, i, n,
               [&](const char* p, int64_t stride, int64_t done, int64_t count) {
                 gather_any(job.dtype[kBias], p, stride, count, factors + done);
               });
      for (int64_t j = n; j % V::lanes; ++j) x[j] = 0, factors[j] = 0;
      for (int64_t j = 0; j < n; j += V::lanes) {
        InLanes<V> factor;
        load_lanes(factors + j, factor);
        store(y + j, scaled_element(load(x + j), factor));
      }
      for_runs(job, place, kOut, i, n, [&](char* p, int64_t stride, int64_t done, int64_t count) {
        for (int64_t j = 0; j < count; ++j) memcpy(p + j * stride, y + done + j, sizeof(D));
      });
    }
  }
  stream_fence();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
