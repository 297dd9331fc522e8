// Rows that come in chunks: the sum of a row's terms between calls, as softmaxlib_state. What one
// call on the whole row does is cut into update (its sum) and scale (its last pass).
//
// Chunks join the blocks of their row one by one, as if the row went on. A chunk or a state whose
// maximum is beyond kSafe keeps its sum less that maximum: its shift. Sums of different shifts meet
// under that of the first, or of the larger one where they are far apart, by a factor that is a
// (mantissa, exponent) pair, too.
#pragma once

#include "isa/kernels/log_softmax.hpp"
#include "isa/kernels/stablemax.hpp"
#include "isa/stage/each_row.hpp"
#include "registry/table.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

static_assert(-kSafeReference == kNoReference, "begin() knows it");

template <class Sum>
inline Sum sum_in(const softmaxlib_state& s) {
  return Sum::unpack({s.sum, s.error, s.largest, s.largest_low, s.reference, {}});
}
template <class Sum>
inline void keep(const Sum& sum, double shift, softmaxlib_state& s) {
  const BlockResult packed = sum.pack();
  s.sum = packed.sum, s.error = packed.error, s.reference = packed.reference;
  s.largest = packed.held_hi, s.largest_low = packed.held_lo;
  s.shift = shift;
}

inline void note_special(double top, softmaxlib_state& s) {
  const uint8_t special = top != top ? 2 : top > 0 ? 1 : 0;
  if (special > s.special) s.special = special;
}

template <class F>
inline bool is_empty(const RowSum<F>& s) {
  return s.sum == 0;
}
template <class F>
inline bool is_empty(const RowRest<F>& s) {
  return s.sum == 0 && s.held_hi == -INFINITY;
}

// x rounded to T. A call, since g++ 12 loses the rounding of a pair of these for AVX-512.
template <class T>
SOFTMAXLIB_NOINLINE double rounded_to(double x) {
  return static_cast<double>(static_cast<T>(x));
}

// What a row keeps out of its sum, moved.
template <class F>
inline void move_held(RowSum<F>&, double) {}
template <class F>
inline void move_held(RowRest<F>& s, double by) {
  using T = typename F::V::elem;
  const double hi = s.held_hi + by, tail = hi - s.held_hi;
  const double lo = ((s.held_hi - (hi - tail)) + (by - tail)) + s.held_lo;
  s.held_hi = rounded_to<T>(hi);
  s.held_lo = rounded_to<T>((hi - s.held_hi) + lo);
}

// sum times e^by, where by is at most 1024 and a little.
template <class Sum>
inline Sum moved(Sum sum, double by) {
  if (!(by > -0x1p20)) return Sum();
  const double turns = by * kLog2E + 0x1.8p52 - 0x1.8p52;
  const double factor =
      one_term<Exp<f64x8>>(by, 0, static_cast<int>(turns)) * power_of_two(-Exp<f64x8>::kBias);
  sum.sum *= factor;
  sum.error *= factor;
  sum.reference += static_cast<int>(turns);
  move_held(sum, by);
  return sum;
}

template <class Sum>
SOFTMAXLIB_NOINLINE void merge_sums(Sum other, double shift, softmaxlib_state& state) {
  Sum mine = sum_in<Sum>(state);
  if (is_empty(other)) return;
  if (is_empty(mine)) return keep(other, shift, state);
  if (shift != state.shift) {
    // The sum so far moves only to where it must: each time costs a rounding of all of it.
    if (shift + other.reference * kLn2Hi > state.shift + 1024) {
      mine = moved(mine, state.shift - shift);
      state.shift = shift;
    } else {
      other = moved(other, shift - state.shift);
    }
  }
  mine.merge(other);
  keep(mine, state.shift, state);
}

// ---- The four kinds of sums: each computes its own and knows whether it is one.

struct SoftmaxState {
  template <class D>
  using Sum = RowSum<Exp<typename Row<D>::V>>;
  static constexpr bool kShifts = true;
  template <class D>
  static Sum<D> compute(const Row<D>& row, Known known, const Sum<D>* before) {
    return sum_of<Exp<typename Row<D>::V>>(row, known, before);
  }
  template <class D>
  static void write(const Row<D>& row, const Sum<D>& total) {
    write_of(row, total);
  }
  template <class D>
  static double logarithm(const Sum<D>& total, double shift) {
    return shift + log_of(total.value(), total.reference - Exp<typename Row<D>::V>::kBias);
  }
  static constexpr double kMasked = 0;

  // log(value 2^exponent)
  static double log_of(double value, int exponent) {
    uint64_t field;
    memcpy(&field, &value, sizeof(field));
    const int e = static_cast<int>(field >> 52) - 1023;  // no subnormal gets here
    field = (field & 0x000fffffffffffffu) | 0x3ff0000000000000u;
    memcpy(&value, &field, sizeof(value));
    const Pair<double> log_value = log1p_pair(value - 1);
    const double k = e + exponent;
    return (k * LogConstants<f64x8>::kLn2Hi + log_value.hi) +
           (k * LogConstants<f64x8>::kLn2Lo + log_value.lo);
  }
};

struct LogSoftmaxState {
  template <class D>
  using Sum = RowRest<LogExp<D>>;
  static constexpr bool kShifts = true;
  template <class D>
  static Sum<D> compute(const Row<D>& row, Known known, const Sum<D>* before) {
    return rest_of<LogExp<D>>(row, known, before);
  }
  template <class D>
  static void write(const Row<D>& row, const Sum<D>& rest) {
    write_log_softmax(row, log_sum_of<D>(rest, log_rest_of_row<D>(rest)));
  }
  template <class D>
  static double logarithm(const Sum<D>& rest, double shift) {
    const Pair<double> log_rest = log1p_pair(first(log_rest_of_row<D>(rest).ratio));
    return logsumexp_of({rest.held_hi, rest.held_lo, log_rest}, shift);
  }
  static constexpr double kMasked = -INFINITY;
};

struct StablemaxState {
  template <class D>
  using Sum = RowSum<Stable<typename Row<D>::V>>;
  static constexpr bool kShifts = false;
  template <class D>
  static Sum<D> compute(const Row<D>& row, Known known, const Sum<D>* before) {
    return sum_of<Stable<typename Row<D>::V>>(row, known, before);
  }
  template <class D>
  static void write(const Row<D>& row, const Sum<D>& total) {
    write_of(row, total);
  }
  template <class D>
  static double logarithm(const Sum<D>& total, double) {
    return SoftmaxState::log_of(total.value(), total.reference);
  }
  static constexpr double kMasked = 0;
};

struct LogStablemaxState {
  template <class D>
  using Sum = RowRest<Stable<typename Row<D>::V>>;
  static constexpr bool kShifts = false;
  template <class D>
  static Sum<D> compute(const Row<D>& row, Known known, const Sum<D>* before) {
    return rest_of<Stable<typename Row<D>::V>>(row, known, before);
  }
  template <class D>
  static void write(const Row<D>& row, const Sum<D>& rest) {
    write_log_stablemax(row, rest);
  }
  template <class D>
  static double logarithm(const Sum<D>& rest, double) {
    return SoftmaxState::log_of(rest.value() + s_of_held(rest), rest.reference);
  }
  static constexpr double kMasked = -INFINITY;
};

// Of a function.
template <Element kElement, Finish kFinish>
struct StateOf;
template <>
struct StateOf<Element::exp, Finish::ratio> {
  using type = SoftmaxState;
};
template <>
struct StateOf<Element::exp, Finish::logarithm> {
  using type = LogSoftmaxState;
};
template <>
struct StateOf<Element::exp, Finish::log_sum> {
  using type = LogSoftmaxState;
};
template <>
struct StateOf<Element::stable, Finish::ratio> {
  using type = StablemaxState;
};
template <>
struct StateOf<Element::stable, Finish::logarithm> {
  using type = LogStablemaxState;
};

// ---- What is done to states.

// The sum of a chunk by itself, and its shift; false where it has none.
template <class Kind, class D, class Sum>
inline bool chunk_alone(Row<D> row, softmaxlib_state& state, Sum* chunk) {
  const auto compute = [&](Known known) { return Kind::template compute<D>(row, known, nullptr); };
  if constexpr (Kind::kShifts) {
    *chunk = compute(Known{});
    if (usable(*chunk)) return true;
    const double top = exact_max_of(row).hi;  // a state has room for one number
    if (!finite(top)) return note_special(logsumexp_of_invalid(row, top), state), false;
    if (row.is_far()) return note_special(NAN, state), false;  // no double is its shift
    row.shift_roughly_by(top);
    *chunk = compute(Known{});
    if (usable(*chunk) && finite(chunk->sum)) return merge_sums(*chunk, top, state), false;
    return note_special(NAN, state), false;
  } else {
    *chunk = in_range<D>(compute);
    const double sum = chunk->sum + s_of_held(*chunk);
    if (!finite(sum)) note_special(sum, state);
    return finite(sum);
  }
}

template <class Kind, class D>
inline void update_state(const Row<D>& row, softmaxlib_state& state) {
  using Sum = typename Kind::template Sum<D>;
  const int64_t terms = row.terms() + state.count;
  state.count = static_cast<int64_t>(terms < 2 ? terms : 2);
  if (state.shift == 0) {
    const Sum before = sum_in<Sum>(state);
    const Sum total = Kind::template compute<D>(row, Known{}, &before);
    bool stands;
    if constexpr (Kind::kShifts) {
      stands = usable(total);
    } else {
      const double sum = total.sum + s_of_held(total);
      stands =
          finite(sum) && stable_reference<typename Row<D>::V>(sum) == 0 && total.reference == 0;
    }
    if (stands) return keep(total, 0, state);
  }
  Sum chunk;
  if (chunk_alone<Kind>(row, state, &chunk)) merge_sums(chunk, 0, state);
}

template <class Kind, class D>
inline void scale_by_state(Row<D> row, const softmaxlib_state& state) {
  using T = typename Row<D>::T;
  const auto total = sum_in<typename Kind::template Sum<D>>(state);
  const T masked = static_cast<T>(Kind::kMasked);
  if (state.special || is_empty(total)) return row.fill(static_cast<T>(NAN), masked);
  if (state.count == 1) return row.fill(static_cast<T>(Kind::kMasked == 0 ? 1 : 0), masked);
  if (state.shift != 0) row.shift_roughly_by(state.shift);
  Kind::template write<D>(row, total);
}

inline softmaxlib_state& state_of(const Job& job, const Place& place) {
  return *reinterpret_cast<softmaxlib_state*>(job.base[kState] + place.offset[kState]);
}

template <class Kind, class D>
void update_states(const Job& job, int64_t start, int64_t stop, char* scratch) {
  for_each_row<D>(job, start, stop, scratch, [&](const Row<D>& row, const Place& place) {
    update_state<Kind>(row, state_of(job, place));
  });
}

template <class Kind, class D>
void scale_by_states(const Job& job, int64_t start, int64_t stop, char* scratch) {
  for_each_row<D>(job, start, stop, scratch, [&](const Row<D>& row, const Place& place) {
    scale_by_state<Kind>(row, state_of(job, place));
    if (job.causal) row.fill_beyond(static_cast<typename Row<D>::T>(Kind::kMasked));
  });
}

template <class Kind, class D>
void merge_states(softmaxlib_state* into, const softmaxlib_state* from, int64_t rows) {
  const DefaultFloatingPoint environment;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t terms = into[r].count + from[r].count;
    into[r].count = terms < 2 ? terms : 2;
    if (from[r].special > into[r].special) into[r].special = from[r].special;
    merge_sums(sum_in<typename Kind::template Sum<D>>(from[r]), from[r].shift, into[r]);
  }
}

template <class Kind, class D>
void finish_states(const softmaxlib_state* states, double* log_sums, int64_t rows) {
  const DefaultFloatingPoint environment;
  for (int64_t r = 0; r < rows; ++r) {
    const auto total = sum_in<typename Kind::template Sum<D>>(states[r]);
    if (states[r].special) log_sums[r] = states[r].special == 1 ? INFINITY : NAN;
    else if (is_empty(total)) log_sums[r] = -INFINITY;
    else log_sums[r] = Kind::template logarithm<D>(total, states[r].shift);
  }
}

// All that states of one function take.
template <class Kind>
inline StateKernels state_kernels() {
  return {{update_states<Kind, float>, update_states<Kind, double>},
          {scale_by_states<Kind, float>, scale_by_states<Kind, double>},
          {merge_states<Kind, float>, merge_states<Kind, double>},
          {finish_states<Kind, float>, finish_states<Kind, double>}};
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
