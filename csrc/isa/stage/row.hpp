// A row as the algorithms see it: passes over it, one after the other, each over its blocks in
// order or in parallel. What a pass computes per element is in terms.hpp and the kernels; this file
// knows only how to walk, split and merge.
#pragma once

#include <stdint.h>

#include "environment.hpp"
#include "isa/macros.hpp"
#include "isa/math/exp.hpp"
#include "isa/stage/combined.hpp"
#include "isa/stage/stage.hpp"
#include "job.hpp"
#include "registry/registry.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Sources: where a pass reads its arguments.

template <class D>
struct Contiguous {
  const D* p;
  int64_t ahead = tuning.prefetch_distance;
  using V = typename vector_of<D>::type;
  using Value = V;
  V load(int64_t i) const {
    prefetch(reinterpret_cast<const char*>(p + i) + ahead);
    return SOFTMAX_ISA::load(p + i);
  }
  V load_n(int64_t i, int n, typename V::elem fill) const {
    return SOFTMAX_ISA::load_n(p + i, n, fill);
  }
  Contiguous at(int64_t i) const { return {p + i}; }
  bool is_at(const void* y) const { return p == y; }
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
  bool is_at(const void* y) const { return hi == y; }
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

// y = f(x) for n contiguous elements, with streaming stores from the first aligned vector on.
template <class Source, class D, class F>
inline void map_elements(Source x, D* y, int64_t n, bool streaming, F f) {
  using V = typename vector_of<D>::type;
  constexpr int kLanes = V::lanes;
  // A copy of f: the loop's own stays in registers only if its address goes nowhere.
  const auto some = [x, y, f](int64_t i, int64_t count) SOFTMAXLIB_NOINLINE_LAMBDA {
    store_n(y + i, f(x.load_n(i, static_cast<int>(count), typename V::elem(0))),
            static_cast<int>(count));
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

// Where a row waits that was brought there with others, its arguments as hi + lo (without scale and
// bias: hi alone, lo is NULL). Its results replace them.
template <class T>
struct InTile {
  T *hi, *lo;
};

// Of a row whose results are written while the next one is summed, so that memory is read and
// written at the same time (kernels/pipelined.hpp).
template <class T>
class Results;
template <class T>
class Beside;
template <class T>
struct Neighbours {
  Beside<T>* beside;  // done while this row is summed
  Results<T>* own;    // this row's are to go there
  T* terms;  // where terms wait instead of in y: each chunk's after those of the row before
};

// T: the arithmetic's type. Rows of it are read and written where they are, or in a tile; all
// others through a Stage.
template <class T_>
class Row {
 public:
  using T = T_;
  using V = typename vector_of<T>::type;
  static constexpr int kLanes = V::lanes;
  static constexpr int kChunk = kVectorsPerChunk * kLanes;
  static constexpr int64_t kBlock = int64_t{kVectorsPerBlock} * kLanes;

  Row(const Job& job, const Place& place, char* scratch, int32_t* one_block,
      const InTile<T>* tile = nullptr, Neighbours<T> neighbours = {})
      : job_(job),
        place_(place),
        x_(reinterpret_cast<const T*>(job.base[kX] + place.offset[kX])),
        y_(reinterpret_cast<T*>(job.base[kOut] + place.offset[kOut])),
        n_(visible_elements(job, place)),
        reads_x_(job.direct && job.dtype[kX] == kOwnDtype<T>),
        writes_y_((job.direct || job.linear) && job.dtype[kOut] == kOwnDtype<T>),
        tile_(tile),
        neighbours_(neighbours) {
    if (tile) {
      x_ = tile->hi;
      reads_x_ = job.elements_of_x;
      if (!job.reduces) y_ = tile->hi, writes_y_ = true;
    }
    results_ = reinterpret_cast<BlockResult*>(scratch);
    references_ = blocks() > 1 ? reinterpret_cast<int32_t*>(results_ + (job.split ? blocks() : 0))
                               : one_block;
  }

  int64_t size() const { return n_; }
  int64_t blocks() const { return (n_ + kBlock - 1) / kBlock; }
  bool has_elements_of_x() const { return job_.elements_of_x; }
  bool streams() const { return writes_y_ && !tile_ && job_.streaming; }
  // From element i of y on to the next line, where they are streamed.
  int64_t elements_to_line(int64_t i) const {
    const int64_t item = item_size(job_.dtype[kOut]);
    if (!job_.streaming || tile_ || !is_contiguous(job_, kOut, item)) return 0;
    const char* const y = job_.base[kOut] + place_.offset[kOut] + i * item;
    const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(y) % 64);
    return past ? (64 - past) / item : 0;
  }
  // Whether results replace what later passes read.
  bool in_place() const { return job_.in_place || tile_; }
  bool is_masked() const { return job_.base[kWhere]; }
  bool has_bias() const { return job_.base[kBias] || job_.base[kSlope]; }

  // One more term of the sum; -inf: none.
  double sink() const { return row_operand(job_, place_, kSink, -INFINITY); }

  // How many terms the sum has, the sink too; 2 stands for more.
  int64_t terms() const {
    int64_t seen = sink() != -INFINITY;
    if (!job_.base[kWhere]) return min_of(seen + n_, 2);
    return seen + count_visible(job_, place_, n_, 2 - seen);
  }

  // From here on the passes see x - maximum.
  void shift_by(Pair<double> maximum) {
    shift_ = maximum;
    shifted_ = true;
  }
  // By that of a streaming state.
  void shift_roughly_by(double maximum) {
    shift_by({maximum, 0});
    is_rough_ = true;
  }
  bool shifted() const { return shifted_; }
  double shift() const { return in_unit_of_one(shift_.hi); }

  // A row with options whose arguments leave the range of double is computed in a coarser unit.
  void go_far() { far_ = true; }
  bool is_far() const { return far_; }
  // The sink in that unit, and less the shift.
  SOFTMAXLIB_NOINLINE double far_sink() const {
    return far_ ? scale_down(sink(), -affine().coarse) : sink();
  }
  double shifted_sink() const { return in_unit_of_one(far_sink() - shift_.hi); }
  Affine affine() const {
    Affine result = affine_of(job_, place_, shift_, far_);
    result.is_rough = is_rough_;
    return result;
  }

  // visit(source, first element, count) over [start, stop), in pieces of whole chunks.
  template <class F>
  void read(int64_t start, int64_t stop, F visit) const {
    Stage<T> stage;
    with_pieces(start, stop, true, stage, visit);
  }

  // visit(source, destination, first element, count). What it makes of -inf is the result where
  // `where` is false. writes: else the destination is NULL.
  template <class F>
  void read_write(int64_t start, int64_t stop, F visit, bool writes = true) const {
    Stage<T> stage;
    with_pieces(start, stop, writes_y_ || !writes, stage, [&](auto source, int64_t i, int64_t n) {
      visit(source, !writes ? nullptr : writes_y_ ? y_ + i : stage.y, i, n);
      if (writes && !writes_y_) stage.put(job_, place_, i, static_cast<int>(n));
    });
  }

  // visit(source, where terms wait, first element, count) over [start, stop).
  template <class F>
  void read_store(int64_t start, int64_t stop, F visit) const {
    Stage<T> stage;
    with_pieces(start, stop, true, stage,
                [&](auto source, int64_t i, int64_t n) { visit(source, waiting() + i, i, n); });
  }

  // The maximum of a staged row. Reads x.
  Pair<double> staged_max() const {
    Pair<double> top = {-INFINITY, 0};
    Stage<T> stage;
    const Affine unshifted = affine_of(job_, place_, {0, 0}, far_);
    for (int64_t i = 0; i < n_; i += kChunk) {
      const int n = static_cast<int>(min_of(n_ - i, kChunk));
      top = stage.largest(job_, place_, i, n, unshifted, top);
    }
    return top;
  }

  // run(block, start, stop) for every block, in parallel where the job says so.
  template <class F>
  void for_blocks(F run) const {
    if (!job_.split) return run_blocks(0, blocks(), run);
    struct Blocks {
      const Row* row;
      F* run;
    } all_blocks{this, &run};
    job_.parallel_for(
        job_.parallel_context, job_.split,
        [](void* argument, int64_t i) {
          const DefaultFloatingPoint environment;
          const Blocks& c = *static_cast<Blocks*>(argument);
          const int64_t all = c.row->blocks(), tasks = c.row->job_.split;
          c.row->run_blocks(all / tasks * i + min_of(all % tasks, i),
                            all / tasks * (i + 1) + min_of(all % tasks, i + 1), *c.run);
          stream_fence();
        },
        &all_blocks);
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
  void map(F f) const {
    if (neighbours_.own) return neighbours_.own->set(*this, f, map_part<F>);
    for_blocks([&](int64_t, int64_t start, int64_t stop) { map_part<F>(*this, f, start, stop); });
  }

  // f(row, terms that wait, the first element, count) brings them to y, likewise.
  template <class F>
  void map_stored(F f) const {
    if (neighbours_.own) return neighbours_.own->set(*this, f, map_stored_part<F>);
    for_blocks(
        [&](int64_t, int64_t start, int64_t stop) { map_stored_part<F>(*this, f, start, stop); });
  }

  SOFTMAXLIB_NOINLINE void fill(T value, T masked) const {
    if (neighbours_.own) neighbours_.own->cancel();
    if (!job_.base[kWhere]) return fill_from(0, value, n_);
    alignas(64) T y[kChunk];
    uint8_t seen[kChunk];
    for (int64_t i = 0; i < n_; i += kChunk) {
      const int64_t n = min_of(n_ - i, kChunk);
      gather_visible(job_, place_, i, n, seen);
      for (int64_t j = 0; j < n; ++j) y[j] = seen[j] ? value : masked;
      put(i, n, y);
    }
  }

  // What is done while this one is summed; NULL: nothing.
  Beside<T>* beside() const { return neighbours_.beside; }
  // Once it is the row before.
  void stand_alone() {
    neighbours_.beside = nullptr;
    neighbours_.own = nullptr;
  }

  // What the row does not see.
  void fill_beyond(T masked) const { fill_from(n_, masked, job_.n); }

  // Elements [first, stop) of y; x is not read.
  SOFTMAXLIB_NOINLINE void fill_from(int64_t first, T value, int64_t stop) const {
    if (first == stop) return;
    alignas(64) T y[kChunk];
    for (int64_t i = 0; i < kChunk && i < stop - first; i += kLanes) store(y + i, V::set1(value));
    for (int64_t i = first; i < stop; i += kChunk) put(i, min_of(stop - i, kChunk), y);
  }

  // Terms that wait become results by a scale.
  void put_scaled(int64_t start, int64_t n, const T* terms, T scale) const {
    if (writes_y_)
      map_elements(Contiguous<T>{terms}, y_ + start, n, streams(),
                   [scale](V v) { return v * V::set1(scale); });
    else scatter_elements(job_, place_, start, n, terms, job_.streaming, scale);
  }

  // Results of elements [start, start + n), which `y` has.
  SOFTMAXLIB_NOINLINE void put(int64_t start, int64_t n, const T* y) const {
    if (tile_) {
      memcpy(y_ + start, y, static_cast<size_t>(n) * sizeof(T));
      return;
    }
    scatter_elements(job_, place_, start, n, y);
  }

  // The one element of logsumexp's result.
  void put_first(T value) const {
    put_as(job_.dtype[kOut], reinterpret_cast<char*>(y_), static_cast<double>(value));
  }

 private:
  double in_unit_of_one(double x) const {
    for (int left = far_ ? affine().coarse : 0; left > 0; left -= 1000)
      x *= power_of_two(left < 1000 ? left : 1000);
    return x;
  }

  // visit(source, first element, count); whole: elements that lie in memory as arguments are one
  // piece.
  template <class F>
  void with_pieces(int64_t start, int64_t stop, bool whole, Stage<T>& stage, F visit) const {
    if (job_.elements_of_x && !shifted_) {
      const int64_t most = whole && reads_x_ ? stop - start : kChunk;
      for (int64_t i = start; i < stop; i += most) {
        const int64_t n = min_of(stop - i, most);
        if (!reads_x_) stage.fetch(job_, place_, i, static_cast<int>(n));
        visit(Contiguous<T>{reads_x_ ? x_ + i : stage.hi}, i, n);
      }
      return;
    }
    const Affine of_row = affine();
    const bool has_low = job_.has_low || shifted_;
    for (int64_t i = start; i < stop; i += kChunk) {
      const int64_t n = min_of(stop - i, kChunk);
      Staged<T> source = {stage.hi, stage.lo};
      // A tile has no arguments in a coarser unit.
      if (tile_ && !shifted_ && !far_)
        source = {tile_->hi + i, tile_->lo ? tile_->lo + i : nullptr};
      else stage.fetch(job_, place_, i, static_cast<int>(n), of_row, has_low);
      if (has_low) visit(source, i, n);
      else visit(Contiguous<T>{source.hi, 0}, i, n);
    }
  }

  static int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }

  // Terms wait in y, where there is no other place for them.
  T* waiting() const { return neighbours_.terms ? neighbours_.terms : y_; }

  template <class F>
  static SOFTMAXLIB_NOINLINE void map_part(const Row& row, const F& f, int64_t start,
                                           int64_t stop) {
    row.read_write(start, stop, [&](auto source, T* y, int64_t, int64_t n) {
      map_elements(source, y, n, row.streams(), f);
    });
  }
  template <class F>
  static SOFTMAXLIB_NOINLINE void map_stored_part(const Row& row, const F& f, int64_t start,
                                                  int64_t stop) {
    for (int64_t i = start, n; i < stop; i += n) {
      n = min_of(stop - i, kChunk - i % kChunk);
      f(row, row.waiting() + i, i, n);
    }
  }

  template <class F>
  void run_blocks(int64_t first_block, int64_t last_block, F&& run) const {
    for (int64_t b = first_block; b < last_block; ++b)
      run(b, b * kBlock, min_of((b + 1) * kBlock, n_));
  }

  const Job& job_;
  const Place& place_;
  const T* x_;
  T* y_;
  int64_t n_;
  bool reads_x_, writes_y_;  // where they are
  const InTile<T>* tile_;    // NULL: in none
  Neighbours<T> neighbours_;
  Pair<double> shift_ = {0, 0};
  bool shifted_ = false, far_ = false, is_rough_ = false;
  BlockResult* results_;
  int32_t* references_;
};

// What is left to do of a row, part after part.
template <class T>
class Results {
 public:
  Results() = default;
  Results(const Results&) = delete;

  // part(row, f, start, stop) is to be done of a row.
  template <class F>
  void set(const Row<T>& row, const F& f, void (*part)(const Row<T>&, const F&, int64_t, int64_t)) {
    static_assert(sizeof(F) <= sizeof(f_), "there is room for it");
    memcpy(static_cast<void*>(f_), &f, sizeof(f));
    memcpy(static_cast<void*>(row_), &row, sizeof(row));
    this->row().stand_alone();
    done_ = 0;
    part_ = reinterpret_cast<void (*)()>(part);
    run_ = [](const Results& r, int64_t start, int64_t stop) {
      using Part = void (*)(const Row<T>&, const F&, int64_t, int64_t);
      reinterpret_cast<Part>(r.part_)(r.row(), *reinterpret_cast<const F*>(r.f_), start, stop);
    };
  }
  void cancel() { run_ = nullptr; }

  // So many elements more, and what is left of a line that is streamed.
  void write_next(int64_t count) {
    if (!run_ || done_ == row().size()) return;
    int64_t stop = done_ + count;
    stop += row().elements_to_line(stop);
    if (stop > row().size()) stop = row().size();
    run_(*this, done_, stop);
    done_ = stop;
  }
  void finish() {
    if (run_) write_next(row().size() - done_);
    run_ = nullptr;
  }

 private:
  Row<T>& row() { return *reinterpret_cast<Row<T>*>(row_); }
  const Row<T>& row() const { return *reinterpret_cast<const Row<T>*>(row_); }

  alignas(64) unsigned char f_[512];
  alignas(64) unsigned char row_[sizeof(Row<T>)];
  int64_t done_ = 0;
  void (*part_)() = nullptr;
  void (*run_)(const Results& r, int64_t start, int64_t stop) = nullptr;
};

// Fetches the elements, biases and mask of a row, so many bytes before they are read.
class OperandsAhead {
 public:
  OperandsAhead(const Job& job, const Place& place, bool with_x, int64_t bytes) {
    if (with_x) add(job, place, kX, bytes);
    add(job, place, kBias, bytes);
    add(job, place, kWhere, bytes);
  }
  // Those of the elements from i on.
  SOFTMAXLIB_INLINE void fetch(int64_t i, int64_t count) const {
    for (int k = 0; k < count_; ++k)
      for (int64_t at = i * item_[k]; at < (i + count) * item_[k]; at += 64) fetch_(first_[k] + at);
  }

 private:
  void add(const Job& job, const Place& place, Operand k, int64_t bytes) {
    const int64_t item = k == kWhere ? 1 : item_size(job.dtype[k]);
    if (!job.base[k] || !is_contiguous(job, k, item)) return;
    first_[count_] = job.base[k] + place.offset[k] + bytes;
    item_[count_++] = item;
  }

  const FetchAhead fetch_ = FetchAhead();
  const char* first_[3];
  int64_t item_[3];
  int count_ = 0;
};

// While a row is summed the row before is written, and what comes next is fetched: both all the
// time, not in turns, since neither can be faster than the memory.
template <class T>
class Beside {
 public:
  // Loads from x itself fetch, where that is best for a row alone.
  Beside(const Job& job, const Place& place, Results<T>* before)
      : before_(before), ahead_(job, place, !job.direct || tuning.second_level, kFetchAhead) {}
  SOFTMAXLIB_NOINLINE void go_on(int64_t elements) {
    before_->write_next(elements);
    ahead_.fetch(done_, elements);
    done_ += elements;
  }

 private:
  Results<T>* const before_;
  const OperandsAhead ahead_;
  int64_t done_ = 0;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
