// A gradient g less its part along the weights w, as one vector of all elements:
//
//   d = g - (w.g / w.w) w,  times |g| / |d| where it is rescaled
//
// One pass sums w.g, w.w and g.g, the last one writes. Between them, where d is so much shorter
// than g that g.g - (w.g)^2 / w.w would lose its digits, a pass sums d.d and what rounding left of
// w.d, which is taken out as well. Everything is in double and rounded once. Sums of floats lose
// less than 2^-46 of the sum of magnitudes; of doubles w.g is compensated with the error of its
// products, the squares from groups on. Doubles whose squares leave the range are scaled by powers
// of two.
#pragma once

#include "isa/kernels/softmax.hpp"
#include "isa/math/stable.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Products of floats are exact in double.
SOFTMAXLIB_INLINE void add_dot(Lanes<f32x16>& lanes, const InLanes<f32x16> (&a)[4],
                               const InLanes<f32x16> (&b)[4]) {
  for (int j = 0; j < 4; ++j)
    lanes.sum = fma(a[j].high, b[j].high, fma(a[j].low, b[j].low, lanes.sum));
}
SOFTMAXLIB_INLINE void add_dot(Lanes<f64x8>& lanes, const InLanes<f64x8> (&a)[4],
                               const InLanes<f64x8> (&b)[4]) {
  for (int j = 0; j < 4; ++j) {
    const f64x8 product = a[j].all * b[j].all;
    lanes.error = lanes.error - fnma(a[j].all, b[j].all, product);
    lanes.add(product);
  }
}
SOFTMAXLIB_INLINE void add_squares(Lanes<f32x16>& lanes, const InLanes<f32x16> (&a)[4]) {
  add_dot(lanes, a, a);
}
SOFTMAXLIB_INLINE void add_squares(Lanes<f64x8>& lanes, const InLanes<f64x8> (&a)[4]) {
  lanes.add(fma(a[1].all, a[1].all, a[0].all * a[0].all) +
            fma(a[3].all, a[3].all, a[2].all * a[2].all));
}

// Units by which each is multiplied; 1, or powers of two.
struct Units {
  double w = 1, g = 1;
};
inline InLanes<f32x16> in_units(f32x16 v, double) { return InLanes<f32x16>::of(v); }
inline InLanes<f64x8> in_units(f64x8 v, double unit) { return {v * f64x8::set1(unit)}; }

// Weights and gradient, element by element.
template <class T>
struct WeightsAndGradient {
  using V = typename vector_of<T>::type;
  struct Value {
    V w, g;
  };
  const T *w, *g;
  int64_t ahead = tuning.prefetch_distance;

  Value load(int64_t i) const {
    prefetch(reinterpret_cast<const char*>(w + i) + ahead);
    prefetch(reinterpret_cast<const char*>(g + i) + ahead);
    return {SOFTMAX_ISA::load(w + i), SOFTMAX_ISA::load(g + i)};
  }
  Value load_n(int64_t i, int n, T fill) const {
    return {SOFTMAX_ISA::load_n(w + i, n, fill), SOFTMAX_ISA::load_n(g + i, n, fill)};
  }
};

// T: the arithmetic's type; arrays of another, or with gaps, pass through chunks.
template <class T>
class OrthogonalGradient {
 public:
  using V = typename vector_of<T>::type;
  using In = InLanes<V>;

  explicit OrthogonalGradient(const Job& job) : job_(job), place_() {
    const int64_t blocks = (job.n + kBlock - 1) / kBlock;
    part_ = (blocks + kMostParts - 1) / kMostParts * kBlock;
    parts_ = (job.n + part_ - 1) / part_;
  }

  void run() {
    Sums s = sum([](In, In g) { return g; });
    if constexpr (sizeof(T) == 8) {
      if (!in_range(s.ww.value()) || !in_range(s.dd.value())) {
        const Largest top = largest();
        if (!finite(top.w) || !finite(top.g)) return fill(NAN);
        units_ = {unit_for(top.w), unit_for(top.g)};
        s = sum([](In, In g) { return g; });
      }
    }
    const double ww = s.ww.value(), gg = s.dd.value();
    if (!finite(ww) || !finite(gg)) return fill(NAN);
    if (!(ww > 0)) {
      units_ = {};
      return write(0, 0, 1);
    }
    const double wd = s.wd.value(), c = wd / ww;
    double low = (fma_scalar(-c, ww, wd) + (tail(s.wd) - c * tail(s.ww))) / ww;
    double dd = gg - c * wd;
    if (!(dd > kShort * gg)) {
      const f64x8 all = f64x8::set1(c);
      s = sum([all](In w, In g) { return less(g, w, all); });
      low = s.wd.value() / ww;
      dd = s.dd.value() - low * s.wd.value();
    }
    const double noise = epsilon();
    if (!(dd > noise * noise * gg)) return fill(0);
    write(c, low, job_.rescale ? sqrt(gg / dd) : 1);
  }

 private:
  static constexpr int64_t kLanes = V::lanes, kGroup = kVectorsPerGroup * kLanes,
                           kChunk = kVectorsPerChunk * kLanes, kBlock = kVectorsPerBlock * kLanes;
  // Runs of whole blocks, the same for any number of threads, summed each by itself.
  static constexpr int64_t kMostParts = 256;
  // The share of g.g from which on g.g - (w.g)^2 / w.w is as good as d.d.
  static constexpr double kShort = sizeof(T) == 8 ? 0.875 : 0x1p-16;

  struct Sums {
    Total wd, ww, dd;
    void merge(const Sums& other) {
      wd.merge(other.wd);
      ww.merge(other.ww);
      dd.merge(other.dd);
    }
  };
  struct Largest {
    double w = 0, g = 0;  // NaN where an element is no number or infinite
    void merge(const Largest& other) {
      w = larger(w, other.w);
      g = larger(g, other.g);
    }
    static double larger(double a, double b) { return a != a || a > b ? a : b; }
  };

  // What value() rounds away.
  static double tail(const Total& total) { return (total.sum - total.value()) + total.error; }
  // Squares of which neither the sum overflows nor, where it counts, an element underflows.
  static bool in_range(double square) { return square >= 0x1p-800 && square <= 0x1p1000; }
  // Takes the largest element to about 2^400; its reciprocal is normal too.
  static double unit_for(double largest) {
    uint64_t bits;
    memcpy(&bits, &largest, sizeof(bits));
    const int k = 400 + 1023 - static_cast<int>(bits >> 52);
    return power_of_two(k < 1022 ? k : 1022);
  }
  // Of the coarser input.
  double epsilon() const {
    constexpr double kEpsilon[] = {0x1p-23, 0x1p-52, 0x1p-10, 0x1p-7};
    const double g = kEpsilon[job_.dtype[kX]], w = kEpsilon[job_.dtype[kWeights]];
    return g > w ? g : w;
  }
  static InLanes<f32x16> less(InLanes<f32x16> g, InLanes<f32x16> w, f64x8 c) {
    return {fnma(c, w.low, g.low), fnma(c, w.high, g.high)};
  }
  static InLanes<f64x8> less(InLanes<f64x8> g, InLanes<f64x8> w, f64x8 c) {
    return {fnma(c, w.all, g.all)};
  }

  // w.d, w.w and d.d with d = of(w, g).
  template <class Of>
  Sums sum(Of of) const {
    return reduce<Sums>([&](const auto& source, int64_t n, Sums& sums) {
      for (int64_t start = 0; start < n; start += kChunk) {
        const int64_t stop = n - start < kChunk ? n : start + kChunk;
        Lanes<V> wd, ww, dd;
        for (int64_t i = start; i < stop; i += kGroup) {
          In w[4], d[4];
          for (int j = 0; j < 4; ++j) {
            const auto v = load_up_to_zeros(source, i + j * kLanes, stop - i - j * kLanes);
            w[j] = in_units(v.w, units_.w);
            d[j] = of(w[j], in_units(v.g, units_.g));
          }
          add_dot(wd, w, d);
          add_squares(ww, w);
          add_squares(dd, d);
        }
        wd.fold_into(sums.wd);
        ww.fold_into(sums.ww);
        dd.fold_into(sums.dd);
      }
    });
  }

  Largest largest() const {
    return reduce<Largest>([](const auto& source, int64_t n, Largest& top) {
      V w = V::set1(0), g = w, nan_w = w, nan_g = w;
      for (int64_t i = 0; i < n; i += kLanes) {
        const auto v = load_up_to_zeros(source, i, n - i);
        w = max(magnitude(v.w).hi, w);
        g = max(magnitude(v.g).hi, g);
        nan_w = nan_w + (v.w - v.w);
        nan_g = nan_g + (v.g - v.g);
      }
      top.merge({static_cast<double>(max_lane(w)) + sum_lanes(nan_w),
                 static_cast<double>(max_lane(g)) + sum_lanes(nan_g)});
    });
  }

  template <class Source>
  SOFTMAXLIB_INLINE static typename Source::Value load_up_to_zeros(const Source& source, int64_t i,
                                                                   int64_t left) {
    if (left >= kLanes) return source.load(i);
    return source.load_n(i, left > 0 ? static_cast<int>(left) : 0, 0);
  }

  // out = (g - (c + low) w) s
  void write(double c, double low, double s) const {
    const f64x8 c_all = f64x8::set1(c), low_all = f64x8::set1(low), s_all = f64x8::set1(s),
                back = f64x8::set1(1 / units_.g);
    const Units units = units_;
    map([=](const auto& v) SOFTMAXLIB_INLINE_LAMBDA {
      const In w = in_units(v.w, units.w);
      const In d = less(less(in_units(v.g, units.g), w, c_all), w, low_all);
      return d.map([=](f64x8 x) { return x * s_all * back; }).value();
    });
  }
  void fill(double value) const {
    map([=](const auto&) SOFTMAXLIB_INLINE_LAMBDA { return V::set1(static_cast<T>(value)); });
  }

  // ---- passes over the parts, which may run in parallel

  // add(source, count, R&) for every piece, merged in order.
  template <class R, class Add>
  R reduce(Add add) const {
    R part[kMostParts];
    for_parts([&](int64_t p, int64_t start, int64_t stop) {
      R one;
      for_pieces(start, stop, [&](const auto& source, int64_t, int64_t n) { add(source, n, one); });
      part[p] = one;
    });
    R all = part[0];
    for (int64_t p = 1; p < parts_; ++p) all.merge(part[p]);
    return all;
  }

  template <class F>
  void map(F f) const {
    for_parts([&](int64_t, int64_t start, int64_t stop) {
      for_pieces(start, stop, [&](const auto& source, int64_t i, int64_t n) {
        if (is_direct()) return map_elements(source, at(kOut) + i, n, job_.streaming, f);
        alignas(64) T y[kChunk];
        map_elements(source, y, n, false, f);
        scatter_elements(job_, place_, i, n, y, job_.streaming);
      });
    });
  }

  // visit(source, first element, count): once if direct, else chunk by chunk.
  template <class F>
  void for_pieces(int64_t start, int64_t stop, F visit) const {
    if (is_direct())
      return visit(WeightsAndGradient<T>{at(kWeights) + start, at(kX) + start}, start,
                   stop - start);
    alignas(64) T w[kChunk], g[kChunk];
    for (int64_t i = start; i < stop; i += kChunk) {
      const int64_t n = stop - i < kChunk ? stop - i : kChunk;
      fetch(kWeights, i, n, w);
      fetch(kX, i, n, g);
      visit(WeightsAndGradient<T>{w, g}, i, n);
    }
  }

  // run(part, start, stop)
  template <class F>
  void for_parts(F run) const {
    struct Parts {
      const OrthogonalGradient* self;
      F* run;
      void some(int64_t first, int64_t last) const {
        for (int64_t p = first; p < last; ++p) {
          const int64_t start = p * self->part_, left = self->job_.n - start;
          (*run)(p, start, left < self->part_ ? self->job_.n : start + self->part_);
        }
        stream_fence();
      }
    } parts{this, &run};
    if (!job_.split) return parts.some(0, parts_);
    job_.parallel_for(
        job_.parallel_context, job_.split,
        [](void* argument, int64_t i) {
          const DefaultFloatingPoint environment;
          const Parts& c = *static_cast<Parts*>(argument);
          const int64_t all = c.self->parts_, tasks = c.self->job_.split;
          c.some(all * i / tasks, all * (i + 1) / tasks);
        },
        &parts);
  }

  bool is_direct() const {
    return job_.direct && job_.dtype[kOut] == (sizeof(T) == 4 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64);
  }
  T* at(Operand k) const { return reinterpret_cast<T*>(job_.base[k]); }
  void fetch(Operand k, int64_t start, int64_t n, T* to) const {
    gather_elements(job_, place_, k, start, n, to);
  }

  const Job& job_;
  const Place place_;
  int64_t part_, parts_;
  Units units_;
};

template <class T>
void orthogonal_gradient(const Job& job, int64_t, int64_t, char*) {
  const DefaultFloatingPoint environment;
  OrthogonalGradient<T>(job).run();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
