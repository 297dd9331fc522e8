// Indices drawn from softmax(x) by inversion, and the k largest elements of a row: from x itself,
// as often as it takes, without a sorted or normalized copy.
//
// "Larger" orders elements by value, then by index, the smaller index first; a filter keeps the
// elements from the largest to some last one. That last one is found digit by digit of the value's
// bits (radix selection), by counts (top_k) or by masses (top_p).
#pragma once

#include "isa/kernels/state.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Unsigned integers in the order of doubles.
inline uint64_t key_of(double x) {
  constexpr uint64_t kSign = uint64_t{1} << 63;
  x = x + 0.0;  // -0 is 0
  uint64_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return bits & kSign ? ~bits : bits | kSign;
}

// A row as a distribution: weights e^x in units of its own.
template <class D>
class Distribution {
 public:
  using V = typename Row<D>::V;
  using T = typename Row<D>::T;
  using E = Exp<V>;

  explicit Distribution(const Row<D>& row) : plain_(row), row_(row), total_(sum_of<E>(row_)) {
    if (!usable(total_)) {
      const Pair<double> top = exact_max_of(row_);
      if (finite(top.hi)) {
        row_.shift_by(top);
        shifts_ =
            row.has_bias() || row_.is_far() || !finite(static_cast<double>(static_cast<T>(top.hi)));
        total_ = sum_of<E>(row_);
      }
    }
    valid_ = usable(total_) && total_.sum > 0;
  }

  bool valid() const { return valid_; }
  const RowSum<E>& total() const { return total_; }
  // Less than the whole double tells values apart.
  bool has_floats() const { return plain_.has_elements_of_x() && sizeof(T) == 4; }

  // f(first element, count, values, what they leave, weights) for every chunk, until it returns
  // true. Values are not shifted, which would round some of them to one, but where x would be lost
  // in a large bias, or a small temperature carries them out of the range.
  template <class F>
  void for_chunks(F f) const {
    visit_chunks(
        [](void* of, int64_t start, int n, const T* value, const T* low, const T* weight) {
          return (*static_cast<F*>(of))(start, n, value, low, weight);
        },
        &f);
  }

 private:
  // Once compiled, whatever is done with chunks.
  using Visit = bool (*)(void* f, int64_t start, int n, const T* value, const T* low,
                         const T* weight);
  SOFTMAXLIB_NOINLINE void visit_chunks(Visit visit, void* f) const {
    constexpr int kChunk = Row<D>::kChunk;
    alignas(64) T value[kChunk], low[kChunk], weight[kChunk];
    const E exp(total_.reference);
    for (int64_t start = 0; start < row_.size(); start += kChunk) {
      const int64_t stop = row_.size() - start < kChunk ? row_.size() : start + kChunk;
      (shifts_ ? row_ : plain_).read(start, stop, [&](auto x, int64_t, int64_t n) {
        for (int64_t i = 0; i < n; i += V::lanes) {
          const Pair<V> v = to_pair(load_up_to(x, i, n - i));
          store(value + i, v.hi);
          store(low + i, v.lo);
          if (!row_.shifted()) store(weight + i, exp(v));
        }
      });
      if (row_.shifted())
        row_.read(start, stop, [&](auto x, int64_t, int64_t n) {
          for (int64_t i = 0; i < n; i += V::lanes)
            store(weight + i, exp(to_pair(load_up_to(x, i, n - i))));
        });
      if (visit(f, start, static_cast<int>(stop - start), value, low, weight)) return;
    }
  }

  Row<D> plain_, row_;
  RowSum<E> total_;
  bool valid_, shifts_ = false;
};

// The elements down to a value, and of those equal to it the first so many.
struct Kept {
  double least = -INFINITY;
  int64_t ties = INT64_MAX;

  // Whether one that comes after `seen` of the equal ones is kept.
  bool takes(double x, int64_t& seen) const { return x > least || (x == least && seen++ < ties); }
};

// One number of what may be two; of doubles the second decides nothing.
template <class T>
inline double whole(T value, T low) {
  return sizeof(T) == 8 ? value : static_cast<double>(value) + static_cast<double>(low);
}

// The fewest largest elements whose weights add up to `goal`; counts: the `goal` largest, each of
// which weighs 1.
template <class D>
SOFTMAXLIB_NOINLINE Kept select_largest(const Distribution<D>& row, double goal, bool counts) {
  using T = typename Row<D>::T;
  // Weights are read through a pointer that does not move if each is 1: loops have no branch.
  constexpr T kOne = 1;
  const int step = counts ? 0 : 1;
  constexpr int kDigit = 11;
  // Sign, exponent and the 23 bits of a float's fraction; the others are all alike.
  const int bits = row.has_floats() ? 35 : 64;
  double mass[1 << kDigit];
  double above = 0;  // of the elements larger than all those with the prefix
  uint64_t prefix = 0;
  for (int known = 0; known < bits;) {
    const int digit = bits - known < kDigit ? bits - known : kDigit;
    const int shift = 64 - known - digit;
    const int digits = 1 << digit;
    for (int d = 0; d < digits; ++d) mass[d] = 0;
    const auto add = [=, &mass](int64_t, int n, const T* value, const T* low, const T* weight) {
      const T* const w = counts ? &kOne : weight;
      for (int i = 0; i < n; ++i) {
        const uint64_t key = key_of(whole(value[i], low[i])) >> shift;
        if (known == 0 || key >> digit == prefix)
          mass[key & static_cast<uint64_t>(digits - 1)] += static_cast<double>(w[i * step]);
      }
      return false;
    };
    row.for_chunks(add);
    // The lowest that has any, should rounding leave the sum short of the goal.
    int last = -1;
    for (int d = digits - 1; d >= 0 && !(last >= 0 && above + mass[last] >= goal); --d) {
      if (mass[d] == 0) continue;
      if (last >= 0) above += mass[last];
      last = d;
    }
    prefix = prefix << digit | static_cast<uint64_t>(last);
    known += digit;
  }
  double each = 0;  // of the elements with that value
  Kept kept;
  row.for_chunks([&](int64_t, int n, const T* value, const T* low, const T* weight) {
    for (int i = 0; i < n && each == 0; ++i) {
      const double x = whole(value[i], low[i]);
      if (key_of(x) >> (64 - bits) == prefix)
        kept.least = x, each = counts ? 1 : static_cast<double>(weight[i]);
    }
    return each != 0;
  });
  const double ties = (goal - above) / each;
  kept.ties = ties < 0x1p62 ? static_cast<int64_t>(ties) : INT64_MAX - 1;
  kept.ties += static_cast<double>(kept.ties) < ties || kept.ties < 1;
  return kept;
}

// f(index, weight) for the kept elements of at least some weight, until it returns true.
template <class D, class F>
inline void for_kept(const Distribution<D>& row, Kept kept, double least, F f) {
  using T = typename Row<D>::T;
  int64_t seen = 0;
  row.for_chunks(
      [=, &f, &seen](int64_t start, int n, const T* value, const T* low, const T* weight) {
        int64_t so_far = seen;
        for (int i = 0; i < n; ++i) {
          const double w = static_cast<double>(weight[i]);
          if (kept.takes(whole(value[i], low[i]), so_far) && w >= least && f(start + i, w))
            return true;
        }
        seen = so_far;
        return false;
      });
}

// The index at which the running sum of the weights that the filter leaves exceeds the share u of
// them all; -1 where there is no distribution.
template <class D>
inline int64_t sample_row(const Row<D>& row, double u, const softmaxlib_filter& filter) {
  const Distribution<D> distribution(row);
  if (!distribution.valid()) return -1;
  const auto sum_of_kept = [&](Kept kept, double least) {
    double sum = 0;
    for_kept(distribution, kept, least, [&](int64_t, double w) { return sum += w, false; });
    return sum;
  };

  Kept kept;
  const bool counts = filter.top_k > 0 && filter.top_k < row.size();
  if (counts) kept = select_largest(distribution, static_cast<double>(filter.top_k), true);
  if (filter.top_p < 1) {
    const Kept fewer = select_largest(distribution, filter.top_p * sum_of_kept(kept, 0), false);
    if (fewer.least > kept.least || (fewer.least == kept.least && fewer.ties < kept.ties))
      kept = fewer;
  }
  double least = 0;
  if (filter.min_p > 0) {
    for_kept(distribution, Kept(), 0, [&](int64_t, double w) {
      least = w > least ? w : least;
      return false;
    });
    least *= filter.min_p;
  }
  const double goal = u * sum_of_kept(kept, least);

  // As the same sum ends there, it exceeds its share unless that rounds to the whole.
  int64_t drawn = -1;
  double sum = 0;
  for_kept(distribution, kept, least, [&](int64_t index, double w) {
    sum += w;
    if (w > 0) drawn = index;
    return sum > goal;
  });
  return drawn;
}

template <class D>
void sample_rows(const Job& job, int64_t start, int64_t stop, char* scratch) {
  for_each_row<D>(job, start, stop, scratch, [&](const Row<D>& row, const Place& place) {
    double u;
    memcpy(&u, job.base[kUniform] + place.offset[kUniform], sizeof(u));
    const int64_t index = sample_row(row, u, *job.filter);
    memcpy(job.base[kIndices] + place.offset[kIndices], &index, sizeof(index));
  });
}

// The next of the largest elements of a row, so many at a time.
template <class D>
class Largest {
 public:
  using T = typename Row<D>::T;
  static constexpr int kAtOnce = 128;

  struct Element {
    T value, low, weight;
    int64_t index;

    bool is_larger_than(const Element& e) const {
      // A low part may be larger than what the high ones differ by.
      const T difference = value == e.value ? low - e.low : (value - e.value) + (low - e.low);
      return difference != 0 ? difference > 0 : index < e.index;
    }
  };

  explicit Largest(const Distribution<D>& row) : row_(row) {}

  // The next `count` of them, largest first.
  const Element* next(int count) {
    const Element last = count_ ? element_[count_ - 1] : Element{0, 0, 0, -1};
    const bool first = count_ == 0;
    count_ = 0;
    row_.for_chunks([&](int64_t start, int n, const T* value, const T* low, const T* weight) {
      for (int i = 0; i < n; ++i) {
        const Element e = {value[i], low[i], weight[i], start + i};
        if (count_ == count && !e.is_larger_than(element_[count - 1])) continue;
        if (!first && !last.is_larger_than(e)) continue;
        int at = count_ < count ? count_++ : count - 1;
        for (; at > 0 && e.is_larger_than(element_[at - 1]); --at) element_[at] = element_[at - 1];
        element_[at] = e;
      }
      return false;
    });
    return element_;
  }

 private:
  const Distribution<D>& row_;
  Element element_[kAtOnce];
  int count_ = 0;
};

template <class D>
inline void topk_of_row(const Row<D>& row, const TopK& top, softmaxlib_dtype dtype, char* weights,
                        char* indices) {
  using T = typename Row<D>::T;
  const Distribution<D> distribution(row);
  const auto put = [&](int64_t rank, T weight, int64_t index) {
    put_as(dtype, weights + rank * top.weight_stride, static_cast<double>(weight));
    memcpy(indices + rank * top.index_stride, &index, sizeof(index));
  };
  if (!distribution.valid()) {
    // As softmax: 0 where nothing takes part.
    const T weight = static_cast<T>(row.terms() == 0 ? 0 : NAN);
    for (int64_t i = 0; i < top.k; ++i) put(i, weight, i);
    return;
  }
  // f(rank, element) for the k largest.
  const auto for_largest = [&](auto f) {
    Largest<D> largest(distribution);
    for (int64_t rank = 0; rank < top.k; rank += Largest<D>::kAtOnce) {
      const int64_t left = top.k - rank;
      const int count = static_cast<int>(left < Largest<D>::kAtOnce ? left : Largest<D>::kAtOnce);
      const auto* element = largest.next(count);
      for (int i = 0; i < count; ++i) f(rank + i, element[i]);
    }
  };
  Total total = distribution.total();
  if (top.renormalize) {
    Total sum;
    sum.reference = total.reference;
    for_largest([&](int64_t, const auto& e) { sum.add(static_cast<double>(e.weight)); });
    total = sum;
  }
  const auto scale = static_cast<T>(reciprocal(total));
  const bool alone = top.renormalize ? top.k == 1 : row.terms() == 1;
  for_largest([&](int64_t rank, const auto& e) {
    const T weight = e.weight * scale;
    put(rank, alone && weight > 0 ? T(1) : weight, e.index);
  });
}

template <class D>
void topk_of_rows(const Job& job, int64_t start, int64_t stop, char* scratch) {
  for_each_row<D>(job, start, stop, scratch, [&](const Row<D>& row, const Place& place) {
    topk_of_row(row, *job.top, job.dtype[kOut], job.base[kOut] + place.offset[kOut],
                job.base[kIndices] + place.offset[kIndices]);
  });
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
