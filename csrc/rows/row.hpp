// A row as the algorithms see it: passes over it, one after the other, each over its blocks in
// order or in parallel. What a pass computes per element is in terms.hpp and the kernels; this file
// knows only how to walk, split and merge.
#pragma once

#include <stdint.h>

#include "environment.hpp"
#include "job.hpp"
#include "macros.hpp"
#include "math/exp.hpp"
#include "rows/combined.hpp"
#include "rows/stage.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Where row `index` starts in every operand, and the step to the next row.
class Rows {
 public:
  Rows(const Job& job, int64_t row) : job_(job) {
    for (int64_t& o : place_.offset) o = 0;
    for (int d = job.outer_ndim - 1; d >= 0; --d) {
      index_[d] = row % job.outer[d].size;
      row /= job.outer[d].size;
      for (int k = 0; k < kOperands; ++k) place_.offset[k] += index_[d] * job.outer[d].stride[k];
    }
  }
  void next() {
    for (int d = job_.outer_ndim - 1; d >= 0; --d) {
      const Dim& dim = job_.outer[d];
      const bool wraps = ++index_[d] == dim.size;
      for (int k = 0; k < kOperands; ++k)
        place_.offset[k] += wraps ? dim.stride[k] - dim.size * dim.stride[k] : dim.stride[k];
      if (!wraps) return;
      index_[d] = 0;
    }
  }
  const Place& place() const { return place_; }

 private:
  const Job& job_;
  Place place_;
  int64_t index_[SOFTMAXLIB_MAX_NDIM];
};

// Sources: where a pass reads its arguments.

template <class D>
struct Contiguous {
  const D* p;
  using V = typename vector_of<D>::type;
  using Value = V;
  V load(int64_t i) const {
    prefetch(reinterpret_cast<const char*>(p + i) + kPrefetchBytes);
    return SOFTMAX_ISA::load(p + i);
  }
  V load_n(int64_t i, int n, typename V::elem fill) const {
    return SOFTMAX_ISA::load_n(p + i, n, fill);
  }
  Contiguous at(int64_t i) const { return {p + i}; }
};

// The row less its maximum, for magnitudes beyond kSafe; exact where the result is not 0.
template <class D>
struct Shifted {
  const D* p;
  typename vector_of<D>::type::elem shift;
  using V = typename vector_of<D>::type;
  using Value = V;
  V load(int64_t i) const { return SOFTMAX_ISA::load(p + i) - V::set1(shift); }
  V load_n(int64_t i, int n, typename V::elem fill) const {
    return SOFTMAX_ISA::load_n(p + i, n, fill) - V::set1(shift);
  }
  Shifted at(int64_t i) const { return {p + i, shift}; }
};

template <class T>
struct Staged {
  const T *hi, *lo;
  using V = typename vector_of<T>::type;
  using Value = Pair<V>;
  Value load(int64_t i) const { return {SOFTMAX_ISA::load(hi + i), SOFTMAX_ISA::load(lo + i)}; }
  Value load_n(int64_t i, int n, T fill) const {
    return {SOFTMAX_ISA::load_n(hi + i, n, fill), SOFTMAX_ISA::load_n(lo + i, n, T(0))};
  }
  Staged at(int64_t i) const { return {hi + i, lo + i}; }
};

// A sum as an unevaluated sum of two doubles (Knuth's two-sum), in units of 2^(reference - bias).
struct Total {
  double sum = 0, error = 0;
  int reference = -kSafeReference;

  void add(double x) {
    const double s = sum + x;
    const double tail = s - sum;
    error += (sum - (s - tail)) + (x - tail);
    sum = s;
  }
  void raise(int to) {
    if (to <= reference) return;
    sum = scale_down(sum, reference - to);
    error = scale_down(error, reference - to);
    reference = to;
  }
  void merge(Total other) {
    raise(other.reference);
    other.raise(reference);
    add(other.sum);
    error += other.error;
  }
  double value() const { return sum + error; }
};

// 1 / total, correct to the last place or so.
inline double reciprocal(const Total& total) {
  const double r = 1.0 / total.sum;
  return r - r * (r * total.error);
}

// A function of map() takes one vector, or F::kAtOnce in arrays.
template <class F>
constexpr auto at_once(int) -> decltype(F::kAtOnce) {
  return F::kAtOnce;
}
template <class F>
constexpr int at_once(long) {
  return 2;
}
template <class F, class X, class V, int N>
SOFTMAXLIB_INLINE auto apply(const F& f, const X (&x)[N], V (&y)[N]) -> decltype(F::kAtOnce,
                                                                                 void()) {
  f(x, y);
}
template <class F, class X, class V>
SOFTMAXLIB_INLINE void apply(const F& f, const X (&x)[2], V (&y)[2]) {
  for (int j = 0; j < 2; ++j) y[j] = f(x[j]);
}

template <class D>
class Row {
 public:
  using V = typename vector_of<D>::type;
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr int kChunk = kVectorsPerChunk * kLanes;
  static constexpr int64_t kBlock = int64_t{kVectorsPerBlock} * kLanes;

  Row(const Job& job, const Place& place, char* scratch, int32_t* one_block)
      : job_(job),
        place_(place),
        x_(reinterpret_cast<const D*>(job.base[kX] + place.offset[kX])),
        y_(reinterpret_cast<D*>(job.base[kOut] + place.offset[kOut])),
        n_(job.causal ? visible(job, place) : job.n),
        combines_(job.linear) {
    results_ = reinterpret_cast<BlockResult*>(scratch);
    references_ = blocks() > 1 ? reinterpret_cast<int32_t*>(results_ + (job.split ? blocks() : 0))
                               : one_block;
  }

  int64_t size() const { return n_; }
  int64_t blocks() const { return (n_ + kBlock - 1) / kBlock; }
  bool direct() const { return job_.direct; }
  bool contiguous() const { return job_.direct || job_.linear; }
  bool in_place() const { return job_.in_place; }

  // One more term of the sum; -inf: none.
  double sink() const { return row_operand(job_, place_, kSink, -INFINITY); }

  // How many terms the sum has, the sink too; 2 stands for more.
  int64_t terms() const {
    int64_t seen = sink() != -INFINITY;
    if (!job_.base[kWhere]) return min_of(seen + n_, 2);
    for (int64_t i = 0; i < n_ && seen < 2; i += kChunk) {
      const int64_t n = min_of(n_ - i, kChunk);
      for_runs(job_, place_, kWhere, i, n,
               [&](const char* p, int64_t stride, int64_t, int64_t count) {
                 for (int64_t j = 0; j < count && seen < 2; ++j) seen += p[j * stride] != 0;
               });
    }
    return seen;
  }

  // From here on the passes see x - maximum.
  void shift_by(double maximum) {
    shift_ = maximum;
    shifted_ = true;
    // One that is no T, of a sink or of another chunk, is subtracted as rows with options do it.
    combines_ =
        job_.linear || (job_.direct && static_cast<double>(static_cast<T>(maximum)) != maximum);
  }
  bool shifted() const { return shifted_; }
  double shift() const { return shift_; }

  // A row with options whose arguments leave the range of double is computed in a coarser unit.
  void go_far() { far_ = true; }
  Affine affine() const { return affine_of(job_, place_, shift_, far_); }

  // visit(source, first element, count) over [start, stop), in pieces of whole chunks.
  template <class F>
  void read(int64_t start, int64_t stop, F visit) const {
    if (combines_) {
      const Terms<V> terms(job_, place_, affine());
      visit(Combined<D>{x_ + start, &terms, start}, start, stop - start);
    } else if (!job_.direct) {
      Stage<D> stage;
      const Arguments<V> arguments(affine());
      for (int64_t i = start; i < stop; i += kChunk) {
        const int n = static_cast<int>(stop - i < kChunk ? stop - i : kChunk);
        stage.fetch(job_, place_, i, n, arguments);
        visit(Staged<T>{stage.hi, stage.lo}, i, n);
      }
    } else if (shifted_) {
      visit(Shifted<D>{x_ + start, static_cast<T>(shift_)}, start, stop - start);
    } else {
      visit(Contiguous<D>{x_ + start}, start, stop - start);
    }
  }

  // visit(source, destination, first element, count); `masked` is the result where `where` is
  // false.
  template <class F>
  void read_write(int64_t start, int64_t stop, T masked, F visit) const {
    if (!contiguous()) {
      Stage<D> stage;
      const Arguments<V> arguments(affine());
      const D fill = narrow_one<D>(masked);
      for (int64_t i = start; i < stop; i += kChunk) {
        const int n = static_cast<int>(stop - i < kChunk ? stop - i : kChunk);
        stage.fetch(job_, place_, i, n, arguments);
        visit(Staged<T>{stage.hi, stage.lo}, stage.y, i, n);
        stage.put(job_, place_, i, n, fill);
      }
    } else {
      read_write_contiguous(start, stop, visit);
    }
  }

  // The same where it writes to out itself: `masked` is what visit() makes of -inf.
  template <class F>
  void read_write_contiguous(int64_t start, int64_t stop, F visit) const {
    if (combines_) {
      const Terms<V> terms(job_, place_, affine());
      visit(Combined<D>{x_ + start, &terms, start}, y_ + start, start, stop - start);
    } else if (shifted_)
      visit(Shifted<D>{x_ + start, static_cast<T>(shift_)}, y_ + start, start, stop - start);
    else visit(Contiguous<D>{x_ + start}, y_ + start, start, stop - start);
  }

  // The maximum of a staged row as a double. Reads x.
  double staged_max() const {
    double top = -INFINITY;
    Stage<D> stage;
    const Affine unshifted = affine_of(job_, place_, 0, far_);
    for (int64_t i = 0; i < n_; i += kChunk) {
      const int n = static_cast<int>(min_of(n_ - i, kChunk));
      const double z = stage.largest(job_, place_, i, n, unshifted);
      top = z > top ? z : top;
    }
    return top;
  }

  // run(block, start, stop) for every block, in parallel where the job says so.
  template <class F>
  void for_blocks(F run) const {
    if (!job_.split) return run_blocks(0, blocks(), run);
    struct Call {
      const Row* row;
      F* run;
    } call{this, &run};
    job_.parallel_for(
        job_.parallel_context, job_.split,
        [](void* argument, int64_t i) {
          const DefaultFloatingPoint environment;
          const Call& c = *static_cast<Call*>(argument);
          const int64_t all = c.row->blocks(), tasks = c.row->job_.split;
          c.row->run_blocks(all / tasks * i + min_of(all % tasks, i),
                            all / tasks * (i + 1) + min_of(all % tasks, i + 1), *c.run);
          stream_fence();
        },
        &call);
  }

  // The results of all blocks, merged in order whatever the order of their computation.
  // compute(start, stop) -> R, merge(R&, R); R converts to and from BlockResult. before: what they
  // are merged into.
  template <class R, class Compute>
  R reduce_blocks(Compute compute, const R* before = nullptr) const {
    R all = before ? *before : R();
    if (!job_.split) {
      run_blocks(0, blocks(), [&](int64_t b, int64_t start, int64_t stop) {
        const R one = compute(start, stop);
        if (b == 0 && !before) all = one;
        else all.merge(one);
      });
      return all;
    }
    for_blocks(
        [&](int64_t b, int64_t start, int64_t stop) { results_[b] = compute(start, stop).pack(); });
    for (int64_t b = 0; b < blocks(); ++b) {
      if (b == 0 && !before) all = R::unpack(results_[b]);
      else all.merge(R::unpack(results_[b]));
    }
    return all;
  }

  // The reference exponent under which a chunk was stored; element: the chunk's first.
  int32_t& reference_of_chunk(int64_t element) const { return references_[element / kChunk]; }

  // y = f(x), elementwise.
  template <class F>
  void map(T masked, F f) const {
    for_blocks([&](int64_t, int64_t start, int64_t stop) {
      read_write(start, stop, masked, [&](auto source, D* y, int64_t, int64_t n) {
        map_elements(source, y, n, contiguous() && job_.streaming, f);
      });
    });
  }

  // visit(y, first element, count, streaming) for every chunk of y; contiguous rows only.
  template <class F>
  void map_stored(F visit) const {
    for_blocks([&](int64_t, int64_t start, int64_t stop) {
      for (int64_t i = start; i < stop; i += kChunk)
        visit(y_ + i, i, stop - i < kChunk ? stop - i : kChunk, job_.streaming);
    });
  }

  void fill(T value, T masked) const {
    map(masked, [value](auto) { return V::set1(value); });
    if (!job_.linear || !job_.base[kWhere]) return;
    const char* where = job_.base[kWhere] + place_.offset[kWhere];
    const D narrow = narrow_one<D>(masked);
    for (int64_t i = 0; i < n_; ++i)
      if (!where[i]) memcpy(y_ + i, &narrow, sizeof(D));
  }

  // What the row does not see.
  void fill_beyond(T masked) const { fill_from(n_, masked); }

  // Elements [first, job.n) of y; x is not read.
  void fill_from(int64_t first, T value) const {
    const D narrow = narrow_one<D>(value);
    if (first == job_.n) return;
    for_runs(job_, place_, kOut, first, job_.n - first,
             [&](char* p, int64_t stride, int64_t, int64_t count) {
               int64_t j = 0;
               for (; stride == sizeof(D) && j + kLanes <= count; j += kLanes)
                 store(reinterpret_cast<D*>(p) + j, V::set1(value));
               for (; j < count; ++j) memcpy(p + j * stride, &narrow, sizeof(D));
             });
  }

  // The one element of logsumexp's result.
  void put_first(T value) const {
    const D narrow = narrow_one<D>(value);
    memcpy(y_, &narrow, sizeof(D));
  }

  // y = f(x) for n contiguous elements, with streaming stores from the first aligned vector on.
  template <class Source, class F>
  static void map_elements(Source x, D* y, int64_t n, bool streaming, F f) {
    // A copy of f: the loop's own stays in registers only if its address goes nowhere.
    const auto some = [x, y, f](int64_t i, int64_t count) SOFTMAXLIB_NOINLINE_LAMBDA {
      store_n(y + i, f(x.load_n(i, static_cast<int>(count), T(0))), static_cast<int>(count));
    };
    int64_t i = 0;
    constexpr int64_t kItem = sizeof(D), kVector = kItem * kLanes;
    const int64_t past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y)) % kVector;
    streaming &= past % kItem == 0;
    if (streaming && past) {
      i = (kVector - past) / kItem < n ? (kVector - past) / kItem : n;
      some(0, i);
    }
    constexpr int kAtOnce = at_once<F>(0);
    for (; i + kAtOnce * kLanes <= n; i += kAtOnce * kLanes) {
      typename Source::Value v[kAtOnce];
      V r[kAtOnce];
      for (int j = 0; j < kAtOnce; ++j) v[j] = x.load(i + j * kLanes);
      apply(f, v, r);
      for (int j = 0; j < kAtOnce; ++j)
        if (streaming) stream(y + i + j * kLanes, r[j]);
        else store(y + i + j * kLanes, r[j]);
    }
    for (; i < n; i += kLanes) some(i, n - i < kLanes ? n - i : kLanes);
  }

 private:
  static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  template <class F>
  void run_blocks(int64_t first_block, int64_t last_block, F&& run) const {
    for (int64_t b = first_block; b < last_block; ++b)
      run(b, b * kBlock, min_of((b + 1) * kBlock, n_));
  }

  // Elements up to column i + causal_offset.
  static int64_t visible(const Job& job, const Place& place) {
    const int64_t i = place.offset[kQuery], offset = job.causal_offset;
    if (offset >= job.n - 1 - i) return job.n;
    return offset < -i ? 0 : i + offset + 1;
  }

  const Job& job_;
  const Place& place_;
  const D* x_;
  D* y_;
  int64_t n_;
  bool combines_;  // the source is Combined
  double shift_ = 0;
  bool shifted_ = false, far_ = false;
  BlockResult* results_;
  int32_t* references_;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
