// The two ends of kernels that compute many short rows at once over tiles: contiguous elements of
// the arithmetic's own type, one row after the other. A Stager fills a tile from whatever the
// operands are: strided or transposed, of another dtype, with scale, bias, ALiBi, mask or a causal
// end. A Sender brings results to wherever they belong. Both are chosen once per call; no kernel is
// compiled for a storage, a layout or an option.
#pragma once

#include <stdint.h>
#include <string.h>

#include "isa/stage/combined.hpp"
#include "isa/stage/row.hpp"
#include "isa/sum/batch.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Rows that lie side by side, an element apart, are transposed a square of so many at a time.
template <class V>
struct Square {
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  alignas(64) T at[kLanes][kLanes];

  // Row r of what is here becomes columns of `to`, `pitch` apart.
  SOFTMAXLIB_INLINE void put_transposed(T* to, int64_t pitch, int columns) const {
    for (int c = 0; c < columns; c += 8) {
      V block[8];
      load_columns(at[0] + c, kLanes, block);
      for (int k = 0; k < 8 && c + k < columns; ++k) store(to + (c + k) * pitch, block[k]);
    }
  }
};

// Elements of as many rows as a vector has lanes, `stride` apart, become columns: vectors, `pitch`
// apart. Of rows of less than four, up to three beyond are read.
template <class V, class T = typename V::elem>
SOFTMAXLIB_NOINLINE void rows_to_columns(const T* x, int64_t stride, int n, T* to, int64_t pitch) {
  const auto block = [=](int j, auto& columns, int count) SOFTMAXLIB_INLINE_LAMBDA {
    load_columns(x + j, stride, columns);
    for (int k = 0; k < count; ++k) store(to + (j + k) * pitch, columns[k]);
  };
  int j = 0;
  for (V eight[8]; j + 8 <= n; j += 8) block(j, eight, 8);
  V four[4];
  for (; j + 4 <= n; j += 4) block(j, four, 4);
  if (j < n) block(n < 4 ? 0 : n - 4, four, n < 4 ? n : 4);
}
// The other way round, times a factor per row. Up to three beyond are written, in order.
template <class V, class T = typename V::elem>
SOFTMAXLIB_NOINLINE void columns_to_rows(const T* columns, int64_t pitch, int n, V factor, T* y,
                                         int64_t stride) {
  const auto block = [=](int j, auto& of, int count) SOFTMAXLIB_INLINE_LAMBDA {
    for (int k = 0; k < count; ++k) of[k] = load(columns + (j + k) * pitch) * factor;
    store_columns(y + j, stride, of);
  };
  int j = 0;
  for (V eight[8]; j + 8 <= n; j += 8) block(j, eight, 8);
  V four[4] = {factor, factor, factor, factor};
  for (; j + 4 <= n; j += 4) block(j, four, 4);
  if (j < n) block(n < 4 ? 0 : n - 4, four, n < 4 ? n : 4);
}

// Rows that lie side by side, an element apart, in squares: some elements of a vector of rows, of
// the rows beside them, and then the next elements. So memory is read and written in pieces as wide
// as there are rows, not a line at a time from every place where an element is.
template <class V, class F>
SOFTMAXLIB_INLINE void for_squares(int rows, int64_t n, F f) {
  for (int64_t i = 0; i < n; i += V::lanes)
    for (int r = 0; r < rows; r += V::lanes)
      f(r, rows - r < V::lanes ? rows - r : V::lanes, i,
        static_cast<int>(n - i < V::lanes ? n - i : V::lanes));
}
// A tile has at most so many vectors of rows: kTileVectors (job.hpp), or those of a batch of
// RowsToColumns (lanes.hpp).
constexpr int kSquares = 32;

// Vectors across rows are fetched so many elements before they are read.
constexpr int64_t kElementsAhead = 16;

// How the rows of an operand of a float dtype lie in memory.
struct Access {
  int64_t item = 0;     // bytes of an element; 0: not of a float dtype
  bool fits = false;    // vectors of it convert to the arithmetic's type
  bool along = false;   // contiguous within a row
  bool across = false;  // rows lie side by side: for those of one element either may be said

  SOFTMAXLIB_NOINLINE Access(const Job& job, Operand k) {
    if (!job.base[k] || job.dtype[k] > SOFTMAXLIB_BF16) return;
    item = float_item(job.dtype[k]);
    // Doubles for rows of floats, or the other way round, are gathered one by one.
    fits = (job.dtype[k] == SOFTMAXLIB_F64) == (job.dtype[kOut] == SOFTMAXLIB_F64);
    if (!fits || job.inner_ndim != 1) return;
    const Dim& row = job.inner[0];
    const Dim* const beside = job.outer_ndim ? &job.outer[job.outer_ndim - 1] : nullptr;
    along = row.size == 1 || row.stride[k] == item;
    across = (!along || row.size == 1) && beside && beside->stride[k] == item;
  }
};

// How many elements there are from p up to the next line of memory; 0 where p is at one, or where
// no element begins at one.
inline int64_t elements_to_line(const char* p, int64_t item) {
  const auto past = static_cast<int64_t>(reinterpret_cast<uintptr_t>(p) % 64);
  return past % item == 0 && past != 0 ? (64 - past) / item : 0;
}

// Whether a factor is all that arguments are beside the elements of x.
inline bool is_only_scaled(const Job& job) {
  return !job.elements_of_x && !job.base[kBias] && !job.base[kWhere] && !job.base[kSlope];
}

// Elements of one operand on their way into tiles, as they are.
template <class V>
class Reader {
 public:
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr int64_t kItem = sizeof(T);

  Reader(const Job& job, Operand k) : job_(job), operand_(k), access_(job, k) {}

  Operand operand() const { return operand_; }
  const Access& access() const { return access_; }
  // Whether no tile is needed.
  bool is_in_place() const { return access_.along && access_.item == kItem; }
  const T* in_place(const Place& place) const { return reinterpret_cast<const T*>(at(place)); }

  // The first rows of a run to `to`, `pitch` elements apart. Up to a vector is written beyond.
  SOFTMAXLIB_NOINLINE void copy(const RowRun& run, int rows, T* to, int64_t pitch) const {
    Place place = run.place;
    if (access_.across) return transpose(at(place), rows, to, pitch);
    const int64_t step = run.step.stride[operand_];
    for (int r = 0; r < rows; ++r, place.offset[operand_] += step) {
      if (access_.along) {
        convert(at(place), job_.n, to + r * pitch);
        continue;
      }
      gather_elements(job_, place, operand_, 0, job_.n, to + r * pitch);
    }
  }
  // Contiguous elements, n of them; and again from `step` bytes further on, to `pitch` further on.
  SOFTMAXLIB_NOINLINE void convert(const char* p, int64_t n, T* to, int64_t times = 1,
                                   int64_t step = 0, int64_t pitch = 0) const {
    if (step == n * access_.item && pitch == n) n *= times, times = 1;
    with_storage(job_.dtype[operand_], V(), [&](const auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
      constexpr int64_t kVector = kLanes * sizeof(*storage);
      const FetchAhead fetch;
      // Vectors across rows. The element that is read so many later is too far for the hardware to
      // foresee.
      for (; n == kLanes && times > 0; --times, p += step, to += pitch) {
        fetch(p + kElementsAhead * step);
        store(to, load(reinterpret_cast<decltype(storage)>(p)));
      }
      for (; times > 0; --times, p += step, to += pitch) {
        const auto* const from = reinterpret_cast<decltype(storage)>(p);
        int64_t i = 0;
        for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
          fetch(reinterpret_cast<const char*>(from + i) + kFetchAhead);
          if (kVector > 32) fetch(reinterpret_cast<const char*>(from + i) + kFetchAhead + 64);
          const V a = load(from + i), b = load(from + i + kLanes);
          store(to + i, a);
          store(to + i + kLanes, b);
        }
        if (i + kLanes <= n) store(to + i, load(from + i)), i += kLanes;
        if (i < n) store(to + i, load_n(from + i, static_cast<int>(n - i), 0));
      }
    });
  }
  // Vectors across rows, so many beside each other: n elements of each, the first vector's to
  // `first`, the next to `second`, and so on.
  SOFTMAXLIB_NOINLINE void convert_side_by_side(const char* p, int vectors, T* first,
                                                const T* second, int64_t n) const {
    const int64_t stride = job_.inner[0].stride[operand_], apart = second - first;
    with_storage(job_.dtype[operand_], V(), [&](const auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
      for (int64_t j = 0; j < n; ++j, p += stride, first += kLanes) {
        const auto* const from = reinterpret_cast<decltype(storage)>(p);
        for (int v = 0; v < vectors; ++v) store(first + v * apart, load(from + v * kLanes));
      }
    });
  }

 private:
  const char* at(const Place& place) const { return job_.base[operand_] + place.offset[operand_]; }
  void transpose(const char* x, int rows, T* to, int64_t pitch) const {
    Square<V> square;
    const int64_t stride = job_.inner[0].stride[operand_];
    with_storage(job_.dtype[operand_], V(), [&](const auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
      using From = decltype(storage);
      const FetchAhead fetch;
      for_squares<V>(rows, job_.n, [&](int r, int some, int64_t i, int count) {
        const char* p = x + r * access_.item + i * stride;
        if (some == kLanes)
          for (int j = 0; j < count; ++j, p += stride) {
            fetch(p + kElementsAhead * stride);  // too far for the hardware to foresee
            store(square.at[j], load(reinterpret_cast<From>(p)));
          }
        else
          for (int j = 0; j < count; ++j, p += stride)
            store(square.at[j], load_n(reinterpret_cast<From>(p), some, 0));
        square.put_transposed(to + r * pitch + i, pitch, some);
      });
    });
  }

  const Job& job_;
  const Operand operand_;
  const Access access_;
};

template <class V>
class Stager {
 public:
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;
  static constexpr int64_t kItem = sizeof(T), kChunk = kVectorsPerChunk * kLanes;
  static constexpr int64_t kFarPitch = 32768;  // elements; rows so long leave the caches

  SOFTMAXLIB_NOINLINE explicit Stager(const Job& job)
      : job_(job),
        x_(job, kX),
        bias_(job, kBias),
        arguments_(affine_of(job, RowRun(job, 0).place, {0, 0})),
        is_usual_(kHasManyRows && GatheredOptions<V>::has_usual_bias(job) &&
                  (job.base[kScale] || arguments_.is_usual)) {}

  const Reader<V>& x() const { return x_; }  // elements as they are

  // The first rows of a run to hi, `pitch` elements apart, with -inf up to the pitch; with options,
  // what hi lacks to lo. visible[r]: how many elements take part in row r, as far as 2.
  SOFTMAXLIB_NOINLINE void fetch(const RowRun& run, int rows, T* hi, T* lo, int64_t pitch,
                                 int* visible) {
    if (!job_.elements_of_x && is_across(run) && fetch_across(run, rows, hi, lo, pitch, visible))
      return;
    if (!job_.elements_of_x && fetch_usual(run, rows, hi, lo, pitch, visible)) return;
    Place place = run.place;
    if (!x_.is_in_place()) x_.copy(run, rows, hi, pitch);
    Factors factors;
    for (int r = 0; r < rows; ++r) {
      if (job_.base[kScale] && r % kLanes == 0)
        factors = factors_of(run, r, rows - r < kLanes ? rows - r : kLanes);
      const int seen =
          finish(place, factors, r % kLanes, hi + r * pitch, lo ? lo + r * pitch : nullptr, pitch);
      if (visible) visible[r] = seen;
      for (int k = 0; k < kOperands; ++k) place.offset[k] += run.step.stride[k];
    }
  }

  // Where a factor is all that x gets: the elements of rows, which are returned so far apart; and
  // the factors of up to a vector of rows, false where one of these is not usual.
  int64_t fetch_elements(const RowRun& run, int rows, T* to, int64_t pitch) const {
    const Access& x = x_.access();
    if (x.along && run.step.stride[kX] == job_.n * x.item) {  // without gaps
      x_.convert(job_.base[kX] + run.place.offset[kX], rows * job_.n, to);
      return job_.n;
    }
    x_.copy(run, rows, to, pitch);
    return pitch;
  }
  SOFTMAXLIB_NOINLINE bool factors(const RowRun& run, int first, int rows, Pair<V>& to) const {
    if (!job_.base[kScale]) {
      to = {V::set1(arguments_.hi), V::set1(arguments_.lo)};
      return arguments_.is_usual;
    }
    const Factors of = factors_of(run, first, rows);
    InLanes<V> hi, lo;
    load_lanes(of.hi, hi);
    load_lanes(of.lo, lo);
    to.hi = hi.value();
    to.lo = ((hi - InLanes<V>::of(to.hi)) + lo).value();
    return of.are_usual;
  }

  // Whether the rows of a run follow each other without gaps in all their operands, so that they
  // are staged as if they were one.
  SOFTMAXLIB_NOINLINE bool is_even(const RowRun& run) const {
    const auto follow = [&](Operand k, int64_t item) {
      const int64_t along = job_.inner[0].stride[k], across = run.step.stride[k];
      return job_.inner_ndim == 1 && across == job_.n * item && (job_.n == 1 || along == item);
    };
    const bool same_bias = job_.inner_ndim == 1 && run.step.stride[kBias] == 0 &&
                           (job_.n == 1 || job_.inner[0].stride[kBias] == 0);
    return x_.access().along && follow(kX, x_.access().item) && !job_.causal &&
           !job_.base[kScale] && !job_.base[kSlope] &&
           (!job_.base[kBias] || same_bias || follow(kBias, item_of_bias())) &&
           (!job_.base[kWhere] || follow(kWhere, 1));
  }
  // Whether vectors across the rows of a run are read where they are, in all operands.
  SOFTMAXLIB_NOINLINE bool is_across(const RowRun& run) const {
    const auto crosses = [&](Operand k, int64_t item) {
      const int64_t across = run.step.stride[k];
      return !job_.base[k] || across == item || across == 0;
    };
    return x_.access().across && !job_.causal && !job_.base[kSlope] &&
           crosses(kBias, item_of_bias()) && crosses(kWhere, 1);
  }
  // Elements [j, j + count) of up to a vector of the rows from `first` on, a vector each: at most a
  // group. factor: of each row, where each has its own; if one of these needs more than the short
  // computation, the result is false. lo may be NULL.
  SOFTMAXLIB_NOINLINE bool fetch_strip(const RowRun& run, const Pair<V>& factor, int first,
                                       int rows, int64_t j, int count, T* hi, T* lo) {
    if (is_usual_ && usual_strip(run, factor, first, rows, j, count, hi, lo)) return true;
    if (job_.base[kScale]) return false;
    Terms<V> terms(job_, run.place, arguments_);
    for (int k = 0; k < count; ++k) {
      const Pair<V> z = across(run, terms, first, rows, j + k);
      store(hi + k * kLanes, z.hi);
      if (lo) store(lo + k * kLanes, z.lo);
    }
    return true;
  }

  // The first rows of an even run, one after the other.
  SOFTMAXLIB_NOINLINE void fetch_even(const RowRun& run, int rows, T* hi, T* lo, int* visible) {
    const int64_t n = rows * job_.n;
    const char* const x = job_.base[kX] + run.place.offset[kX];
    if (job_.elements_of_x) {
      x_.convert(x, n, hi);
    } else {
      const bool as_it_is = x_.is_in_place();
      const T* const elements = as_it_is ? reinterpret_cast<const T*>(x) : hi;
      const auto* const where =
          reinterpret_cast<const uint8_t*>(job_.base[kWhere] + run.place.offset[kWhere]);
      const bool same_bias = job_.base[kBias] && run.step.stride[kBias] == 0;
      bool usual = is_usual_ && options_.are_in_place(job_) && !same_bias;
      if (usual) {
        UsualRows<T> row;
        row.x.p = x, row.x.dtype = job_.dtype[kX];
        set_factor(row, arguments_);
        options_.gather_into(row, job_, run.place, 0, n);
        usual = usual_(row, 1, n, hi, lo, 0);
      }
      if (!usual) {
        if (!as_it_is) x_.convert(x, n, hi);
        Terms<V> terms(job_, run.place, arguments_);
        if (!same_bias) terms.bias_is_constant = false;
        else terms.set_constant(row_operand(job_, run.place, kBias, 0));
        combine_all<T>({elements, &terms, 0}, n, hi, lo);
      }
      for (int r = 0; visible && r < rows; ++r)
        visible[r] = job_.base[kWhere] ? count_seen(where + r * job_.n, job_.n)
                                       : static_cast<int>(job_.n < 2 ? job_.n : 2);
    }
  }

 private:
  // Biases that are those of columns, around column j, for rows whose biases begin at `row`.
  void fetch_columns(int64_t row, int64_t j) {
    const int64_t column = j / kColumns * kColumns;
    if (SOFTMAXLIB_UNLIKELY(row != columns_row_ || column != column_))
      fetch_columns_from(row, column);
  }
  SOFTMAXLIB_NOINLINE void fetch_columns_from(int64_t row, int64_t column) {
    const int64_t n = job_.n - column < kColumns ? job_.n - column : kColumns;
    const int64_t stride = job_.inner[0].stride[kBias];
    gather_any(job_.dtype[kBias], job_.base[kBias] + row + column * stride, stride, n, columns_);
    for (int64_t i = 0; i < n; ++i) Terms<V>::split(columns_[i], columns_hi_ + i, columns_lo_ + i);
    columns_row_ = row;
    column_ = column;
  }
  // Element j of up to a vector of the rows from `first` on.
  SOFTMAXLIB_INLINE Pair<V> across(const RowRun& run, Terms<V>& terms, int first, int rows,
                                   int64_t j) {
    const auto at = [&](Operand k) {
      return job_.base[k] + run.place.offset[k] + first * run.step.stride[k] +
             j * job_.inner[0].stride[k];
    };
    if (job_.base[kBias]) {
      terms.bias = at(kBias);
      if (run.step.stride[kBias] == 0) {
        fetch_columns(run.place.offset[kBias], j);
        terms.bias_is_constant = true;
        terms.constant_hi = columns_hi_[j % kColumns];
        terms.constant = columns_[j % kColumns];
        terms.constant_lo = columns_lo_[j % kColumns];
      } else {
        terms.bias_is_constant = false;
      }
    }
    if (job_.base[kWhere]) {
      terms.where = reinterpret_cast<const uint8_t*>(at(kWhere));
      if (run.step.stride[kWhere] == 0) {
        if (!*terms.where) return {V::set1(static_cast<T>(-INFINITY)), V::set1(0)};
        terms.where = nullptr;
      }
    }
    alignas(64) T elements[kLanes];
    const T* x = reinterpret_cast<const T*>(at(kX));
    if (x_.access().item != Reader<V>::kItem) {
      store(elements, load_some(job_.dtype[kX], at(kX), rows, V()));
      x = elements;
    }
    const Combined<T> source = {x, &terms, 0};
    return rows == kLanes ? source.load(0) : source.load_n(0, rows, 0);
  }
  // The same where they are as usual: a row of UsualRows is an element of all rows.
  bool usual_strip(const RowRun& run, const Pair<V>& factor, int first, int rows, int64_t j,
                   int count, T* hi, T* lo) {
    const Dim& row = job_.inner[0];
    const auto at = [&](Operand k) {
      return job_.base[k] + run.place.offset[k] + first * run.step.stride[k] + j * row.stride[k];
    };
    const auto elements = [&](Operand k) {
      UsualElements<T> there;
      there.p = at(k), there.dtype = job_.dtype[k], there.step = row.stride[k];
      // Of long rows the elements that are read next, of short ones rows further on.
      if (job_.n > kColumns) there.ahead = kElementsAhead * there.step;
      return there;
    };
    alignas(64) T biases[kColumns * kLanes], factor_hi[kLanes], factor_lo[kLanes];
    uint8_t seen[kColumns * kLanes];
    UsualRows<T> of;
    of.is_across = true;
    const bool own = job_.base[kScale];
    if (own || arguments_.hi != 1 || arguments_.lo != 0) {
      store(factor_hi, own ? factor.hi : V::set1(arguments_.hi));
      store(factor_lo, own ? factor.lo : V::set1(arguments_.lo));
      of.factor_hi = factor_hi, of.factor_lo = factor_lo;
    }
    if (job_.base[kBias] && run.step.stride[kBias] == 0) {
      fetch_columns(run.place.offset[kBias], j);
      for (int i = 0; i < count; ++i)
        store(biases + i * kLanes, V::set1(columns_hi_[(j + i) % kColumns]));
      of.bias.set(biases, kLanes);
    } else if (job_.base[kBias]) {
      if (!bias_.fits) return false;
      of.bias = elements(kBias);
    }
    if (job_.base[kWhere]) {
      of.where = reinterpret_cast<const uint8_t*>(at(kWhere)), of.where_step = row.stride[kWhere];
      if (run.step.stride[kWhere] == 0) {
        for (int i = 0; i < count; ++i)
          memset(seen + i * kLanes, of.where[i * of.where_step] != 0, kLanes);
        of.where = seen, of.where_step = kLanes;
      }
    }
    of.x = elements(kX);
    return usual_(of, count, rows, hi, lo, kLanes);
  }
  // The factors of up to a vector of rows that each have their own, as affine_of() gives them.
  struct Factors {
    alignas(64) double hi[kLanes], lo[kLanes];
    double usual[kLanes];  // 1; or 0: has to ask affine_of()
    bool are_usual;        // all of them
  };
  SOFTMAXLIB_NOINLINE Factors factors_of(const RowRun& run, int first, int rows) const {
    constexpr double kMost = sizeof(T) == 4 ? 0x1p60 : 0x1p400;
    Factors of;
    const char* p = job_.base[kScale] + run.place.offset[kScale] + first * run.step.stride[kScale];
    const int64_t step = run.step.stride[kScale];
    double some[kLanes];
    const double* own = reinterpret_cast<const double*>(p);
    if (rows < kLanes || step != int64_t{sizeof(double)} || job_.dtype[kScale] != SOFTMAXLIB_F64) {
      for (double& x : some) x = 1;
      gather_any(job_.dtype[kScale], p, step, rows, some);
      own = some;
    }
    const f64x8 zero = f64x8::set1(0), one = f64x8::set1(1);
    f64x8 all = one;
    for (int r = 0; r < kLanes; r += f64x8::lanes) {
      const f64x8 a = job_.divides ? f64x8::set1(job_.scale) : load(own + r);
      const f64x8 b = job_.divides ? load(own + r) : f64x8::set1(job_.temperature), q = a / b;
      f64x8 usual = one;
      const f64x8 numbers[] = {a, b, q};
      for (const f64x8 x : numbers) {
        usual = select(gt(f64x8::set1(kMost), x), usual, zero);
        usual = select(gt(x, f64x8::set1(1 / kMost)), usual, zero);
      }
      store(of.hi + r, q);
      store(of.lo + r, fma(zero - q, b, a) / b);
      store(of.usual + r, usual);
      all = min(all, usual);
    }
    of.are_usual = !any(gt(one, all));
    return of;
  }

  // The same of rows that are as usual; false where they are not. lo may be NULL.
  SOFTMAXLIB_NOINLINE bool fetch_usual(const RowRun& run, int rows, T* hi, T* lo, int64_t pitch,
                                       int* visible) {
    if (!is_usual_ || job_.causal) return false;
    const int64_t n = job_.n;
    const auto low = [lo](int64_t i) { return lo ? lo + i : nullptr; };
    const bool x_in_place = x_.access().along;
    if (!x_in_place) x_.copy(run, rows, hi, pitch);
    UsualRows<T> of;
    of.where_step = run.step.stride[kWhere];
    set_factor(of, arguments_);
    alignas(64) T factor_hi[kLanes], factor_lo[kLanes];
    // Several rows at once, or parts of one.
    const bool together = options_.are_in_place(job_);
    const int most = together ? kLanes : 1;
    const int64_t part = together ? n : kChunk;
    Place place = run.place;
    for (int r = 0, some; r < rows; r += some) {
      some = rows - r < most ? rows - r : most;
      if (job_.base[kScale]) {
        Pair<V> factor;
        if (!factors(run, r, some, factor)) return false;
        store(factor_hi, factor.hi);
        store(factor_lo, factor.lo);
        of.factor_hi = factor_hi, of.factor_lo = factor_lo, of.factor_step = 1;
      }
      int seen = 0;  // of one row
      for (int64_t i = 0; i < n; i += part) {
        const int64_t count = n - i < part ? n - i : part, at = r * pitch + i;
        of.x.set(hi + at, pitch);
        if (x_in_place) {
          of.x.p = job_.base[kX] + place.offset[kX] + i * x_.access().item;
          of.x.dtype = job_.dtype[kX];
          of.x.step = run.step.stride[kX];
        }
        options_.gather_into(of, job_, place, i, count);
        of.bias.step = run.step.stride[kBias];
        if (!usual_(of, some, count, hi + at, low(at), pitch)) return false;
        if (!visible || !of.where) continue;
        if (!together) seen += seen < 2 ? count_seen(of.where, count) : 0;
        for (int j = 0; together && j < some; ++j)
          visible[r + j] = count_seen(of.where + j * of.where_step, n);
      }
      for (int j = 0; visible && j < some; ++j) {
        if (!of.where) visible[r + j] = static_cast<int>(n < 2 ? n : 2);
        else if (!together) visible[r] = seen < 2 ? seen : 2;
      }
      for (int k = 0; k < kOperands; ++k) place.offset[k] += some * run.step.stride[k];
    }
    pad(rows, hi, lo, pitch);
    return true;
  }

  // The first `count` rows of squares, and beyond these what is no argument, to `rows` rows.
  void put_arguments(Square<V>& his, Square<V>& los, int count, int rows, T* hi, T* lo,
                     int64_t pitch) const {
    // A store to memory that is in no cache waits for it, and so do all that follow. So the lines
    // that the next squares go to are fetched, where a tile is that large.
    for (int r = 0; pitch > kFarPitch && r < rows; ++r) {
      prefetch(reinterpret_cast<const char*>(hi + r * pitch + kLanes));
      if (lo) prefetch(reinterpret_cast<const char*>(lo + r * pitch + kLanes));
    }
    for (int j = count; j < kLanes; ++j) {
      store(his.at[j], V::set1(static_cast<T>(-INFINITY)));
      store(los.at[j], V::set1(0));
    }
    his.put_transposed(hi, pitch, rows);
    if (lo) los.put_transposed(lo, pitch, rows);
  }
  // From the end of rows, rounded up to a vector, to the pitch.
  void pad(int rows, T* hi, T* lo, int64_t pitch) const {
    const int64_t end = (job_.n + kLanes - 1) / kLanes * kLanes;
    for (int r = 0; r < rows; ++r)
      for (int64_t i = r * pitch + end; i < (r + 1) * pitch; i += kLanes) {
        store(hi + i, V::set1(static_cast<T>(-INFINITY)));
        if (lo) store(lo + i, V::set1(0));
      }
  }

  // The same of rows that lie side by side in all operands; false as fetch_strip() is.
  SOFTMAXLIB_NOINLINE bool fetch_across(const RowRun& run, int rows, T* hi, T* lo, int64_t pitch,
                                        int* visible) {
    const V none = V::set1(static_cast<T>(-INFINITY)), zero = V::set1(0);
    Pair<V> factor[kSquares];
    for (int r = 0; job_.base[kScale] && r < rows; r += kLanes)
      if (!factors(run, r, rows - r < kLanes ? rows - r : kLanes, factor[r / kLanes])) return false;
    const bool counts = visible && job_.base[kWhere];
    Square<V> his, los;
    V seen[kSquares];
    for (V& s : seen) s = zero;
    bool good = true;
    for_squares<V>(rows, job_.n, [&](int r, int some, int64_t i, int count) {
      good = good && fetch_strip(run, factor[r / kLanes], r, some, i, count, his.at[0], los.at[0]);
      V& s = seen[r / kLanes];
      for (int j = 0; counts && j < count; ++j)
        s = s + select(eq(load(his.at[j]), none), zero, V::set1(1));
      put_arguments(his, los, count, some, hi + r * pitch + i, lo ? lo + r * pitch + i : nullptr,
                    pitch);
    });
    if (!good) return false;
    pad(rows, hi, lo, pitch);
    for (int r = 0; visible && r < rows; r += kLanes) {
      T counts_of[kLanes];
      store(counts_of, counts ? seen[r / kLanes] : V::set1(static_cast<T>(job_.n)));
      for (int j = 0; j < kLanes && r + j < rows; ++j)
        visible[r + j] = counts_of[j] < 2 ? static_cast<int>(counts_of[j]) : 2;
    }
    return true;
  }

  // Completes a row of the tile; returns how many elements take part, as far as 2.
  int finish(const Place& place, const Factors& factors, int r, T* hi, T* lo, int64_t pitch) {
    const int64_t n = visible_elements(job_, place);
    int visible = n < 2 ? static_cast<int>(n) : 2;
    const T* x = hi;
    if (x_.is_in_place()) x = x_.in_place(place);
    const V none = V::set1(static_cast<T>(-INFINITY)), zero = V::set1(0);
    int64_t i = 0;
    if (!job_.elements_of_x) {
      int64_t seen = 0;
      for (; i < n; i += kChunk) {
        const int64_t some = n - i < kChunk ? n - i : kChunk;
        Terms<V> terms(job_, place,
                       job_.base[kScale] ? arguments_of(place, factors, r) : arguments_);
        options_.gather_into(terms, job_, place, i, some);
        combine_all<T>({x + i, &terms, i}, some, hi + i, lo ? lo + i : nullptr);
        if (terms.where && seen < 2) seen += count_seen(terms.where + (i - terms.where_from), some);
      }
      i = (n + kLanes - 1) / kLanes * kLanes;
      for (int64_t j = i; lo && j < pitch; j += kLanes) store(lo + j, zero);
      if (job_.base[kWhere]) visible = seen < 2 ? static_cast<int>(seen) : 2;
    } else {
      for (; x != hi && i + kLanes <= n; i += kLanes) store(hi + i, load(x + i));
      if (x == hi) i = n / kLanes * kLanes;
      if (i < n) {
        const int left = static_cast<int>(n - i);
        store(hi + i, load_n(x + i, left, static_cast<T>(-INFINITY)));
        i += kLanes;
      }
    }
    for (; i < pitch; i += kLanes) store(hi + i, none);
    return visible;
  }
  Arguments<V> arguments_of(const Place& place, const Factors& factors, int r) const {
    if (factors.usual[r] == 0) return Arguments<V>(affine_of(job_, place, {0, 0}));
    return Arguments<V>({factors.hi[r], factors.lo[r], 0, 0, 0, 0, false});
  }
  int64_t item_of_bias() const { return item_size(job_.dtype[kBias]); }
  static int count_seen(const uint8_t* where, int64_t n) {
    int64_t seen = 0;
    for (int64_t i = 0; i < n && seen < 2; ++i) seen += where[i] != 0;
    return static_cast<int>(seen);
  }

  const Job& job_;
  const Reader<V> x_;
  const Access bias_;
  const Arguments<V> arguments_;  // of all rows, but where each has its own factor
  const bool is_usual_;           // so that UsualRows may have them
  GatheredOptions<V> options_;
  UsualCombiner<V> usual_;
  static constexpr int64_t kColumns = kVectorsPerGroup * kLanes;
  int64_t columns_row_ = 0, column_ = -1;  // whose biases are here; -1: none
  double columns_[kColumns];
  T columns_hi_[kColumns], columns_lo_[kColumns];
};

template <class V>
class Sender {
 public:
  using T = typename V::elem;
  static constexpr int kLanes = V::lanes;

  SOFTMAXLIB_NOINLINE explicit Sender(const Job& job)
      : job_(job), out_(job, kOut), own_(true), f16_(true), bf16_(true) {
    const auto at = reinterpret_cast<uintptr_t>(job.base[kOut]);
    posts_ = job.streaming && out_.along && at % static_cast<size_t>(out_.item) == 0;
    for (int d = 0; posts_ && d < job.outer_ndim; ++d)
      posts_ = job.outer[d].stride[kOut] % out_.item == 0;
    // Of halves a vector is half a line, and the other half would come too late.
    streams_ = job.streaming && out_.across && out_.item == sizeof(T) &&
               (job.n == 1 || job.inner[0].stride[kOut] % 64 == 0);
  }

  const Access& access() const { return out_; }
  // Rows that lie side by side are sent together.
  bool sends_squares() const { return out_.across; }

  // Whether results have to lie in a row of their own.
  bool collects() const { return posts_ || !out_.along || out_.item != sizeof(T); }
  // Whether rows without gaps between them can be sent as one.
  bool takes_rows() const { return out_.along; }
  // One row, times scale. Reads up to a vector more on either side.
  void put(char* y, const T* e, T scale) {
    if (out_.along) put_adjacent(y, e, job_.n, scale);
    else scatter(y, e, V::set1(scale));
  }
  // Any number of results that follow each other in memory.
  SOFTMAXLIB_NOINLINE void put_adjacent(char* y, const T* e, int64_t n, T scale = 1) {
    const V factor = V::set1(scale);
    with_storage(job_.dtype[kOut], V(), [&](auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
      auto* const to = reinterpret_cast<decltype(storage)>(y);
      if (posts_) {
        auto& outbox = outbox_of(storage);
        if (y != next_) {
          if (next_) outbox.finish();
          outbox.start(to);
        }
        outbox.put(e, n, factor);
        next_ = y + n * out_.item;
        return;
      }
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(to + i, load(e + i) * factor);
      if (i < n) store_n(to + i, load(e + i) * factor, static_cast<int>(n - i));
    });
  }
  // Rows that lie side by side, times a scale each. scale: NULL: 1.
  SOFTMAXLIB_NOINLINE void put_squares(char* y, const T* e, int64_t pitch, int rows,
                                       const T* scale) {
    alignas(64) T elements[kLanes][kTileVectors * kLanes];
    const int64_t stride = job_.inner[0].stride[kOut];
    with_storage(job_.dtype[kOut], V(), [&](auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
      using To = decltype(storage);
      for (int64_t i = 0; i < job_.n; i += kLanes) {
        for (int r = 0; r < rows; r += 8) {
          const T* const from = e + r * pitch + i;
          V block[8];
          for (int k = 0; k < 8; ++k)
            block[k] = r + k < rows ? load(from + k * pitch) * V::set1(scale ? scale[r + k] : T(1))
                                    : V::set1(0);
          store_columns(elements[0] + r, kTileVectors * kLanes, block);
        }
        for (int j = 0; j < kLanes && i + j < job_.n; ++j, y += stride) {
          To const to = reinterpret_cast<To>(y);
          const bool streams = streams_ && reinterpret_cast<uintptr_t>(y) % 64 == 0;
          int r = 0;
          for (; r + kLanes <= rows; r += kLanes)
            if (streams) stream(to + r, load(elements[j] + r));
            else store(to + r, load(elements[j] + r));
          if (r < rows) store_n(to + r, load(elements[j] + r), rows - r);
        }
      }
    });
  }
  // n elements of up to a vector of rows that lie side by side. results(j, some, to) makes those
  // from element j on, `some` being a number that the compiler knows: kAtOnce, or 1 of the last.
  template <int kAtOnce, class Results>
  SOFTMAXLIB_INLINE void put_strip(char* y, int rows, int n, Results results) {
    constexpr int kGroup = kVectorsPerGroup * kLanes;
    alignas(64) T copy[kGroup * kLanes];
    const bool streams = streams_ && rows == kLanes && reinterpret_cast<uintptr_t>(y) % 64 == 0;
    const bool is_direct = rows == kLanes && out_.item == sizeof(T);
    const int64_t stride = job_.inner[0].stride[kOut];
    const int64_t step = is_direct ? stride : kLanes * int64_t{sizeof(T)};
    for (int from = 0, end; from < n; from = end) {
      end = is_direct || n - from <= kGroup ? n : from + kGroup;
      char* to = is_direct ? y : reinterpret_cast<char*>(copy);
      const auto put = [&](int j, auto some) SOFTMAXLIB_INLINE_LAMBDA {
        V v[some];
        results(j, some, v);
        for (int k = 0; k < some; ++k, to += step)
          if (streams) stream(reinterpret_cast<T*>(to), v[k]);
          else store(reinterpret_cast<T*>(to), v[k]);
      };
      int j = from;
      for (; j + kAtOnce <= end; j += kAtOnce) put(j, Elements<kAtOnce>());
      if constexpr (kAtOnce > 1)
        for (; j < end; ++j) put(j, Elements<1>());
      if (!is_direct) put_columns(y + from * stride, rows, copy, kLanes, end - from);
    }
  }
  // Strips beside each other, of whole vectors of the arithmetic's own type.
  template <class... Result>
  SOFTMAXLIB_INLINE void put_strips(char* y, const Result&... results) {
    const int64_t stride = job_.inner[0].stride[kOut];
    const int n = static_cast<int>(job_.n);
    const bool streams = streams_ && reinterpret_cast<uintptr_t>(y) % 64 == 0 && stride % 64 == 0;
    for (int j = 0; j < n; ++j, y += stride) {
      T* to = reinterpret_cast<T*>(y);
      const auto put = [&](V result) SOFTMAXLIB_INLINE_LAMBDA {
        if (streams) stream(to, result);
        else store(to, result);
        to += kLanes;
      };
      (put(results(j)), ...);
    }
  }
  // Some elements of rows that lie side by side: strips of a tile, `pitch` apart.
  SOFTMAXLIB_NOINLINE void put_columns(char* y, int rows, const T* columns, int64_t pitch,
                                       int64_t count) const {
    const int64_t stride = job_.inner[0].stride[kOut];
    with_storage(job_.dtype[kOut], V(), [&](auto* storage) SOFTMAXLIB_INLINE_LAMBDA {
      for (int64_t j = 0; j < count; ++j, y += stride, columns += pitch) {
        auto* const to = reinterpret_cast<decltype(storage)>(y);
        int r = 0;
        for (; r + kLanes <= rows; r += kLanes) store(to + r, load(columns + r));
        if (r < rows) store_n(to + r, load(columns + r), rows - r);
      }
    });
  }
  // Before somebody else writes results, and at the end.
  SOFTMAXLIB_NOINLINE void finish() {
    if (next_)
      with_storage(job_.dtype[kOut], V(), [&](auto* storage) { outbox_of(storage).finish(); });
    next_ = nullptr;
  }

 private:
  Outbox<T>& outbox_of(T*) { return own_; }
  Outbox<f16>& outbox_of(f16*) { return f16_; }
  Outbox<bf16>& outbox_of(bf16*) { return bf16_; }

  SOFTMAXLIB_NOINLINE void scatter(char* y, const T* e, V factor) {
    Place place = {};
    place.offset[kOut] = y - job_.base[kOut];
    alignas(64) T results[kLanes];
    for (int64_t i = 0; i < job_.n; i += kLanes) {
      store(results, load(e + i) * factor);
      scatter_elements(job_, place, i, job_.n - i < kLanes ? job_.n - i : kLanes, results);
    }
  }

  const Job& job_;
  const Access out_;
  bool posts_, streams_;
  const char* next_ = nullptr;  // where the outbox goes on; NULL: nothing is in it
  Outbox<T> own_;
  Outbox<f16> f16_;
  Outbox<bf16> bf16_;
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
