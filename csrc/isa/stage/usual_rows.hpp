// Arguments of rows as most calls have them: elements, bias and mask contiguous within a row, or
// the rows side by side; of a dtype that converts to the arithmetic's type, which is done as they
// are read; and a factor of a usual size. The arguments are those that combine() of stage.hpp
// gives, made without a look at each: a loop gathers whether any of them needs more than that, and
// tells once, at its end. Those, and all other rows, go the way of combined.hpp.
#pragma once

#include "isa/stage/stage.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Where the elements or biases of rows are, of a dtype that converts to T. step: bytes from a row
// to the next; 0: all rows have the same. ahead: how many bytes before they are read elements are
// fetched.
template <class T>
struct UsualElements {
  const char* p = nullptr;  // NULL: none
  softmaxlib_dtype dtype = kOwnDtype<T>;
  int64_t step = 0, ahead = kFetchAhead;

  void set(const T* own, int64_t elements_to_next = 0) {
    *this = UsualElements();
    p = reinterpret_cast<const char*>(own);
    step = elements_to_next * static_cast<int64_t>(sizeof(T));
  }
};

// Some rows. Other steps are in elements.
template <class T>
struct UsualRows {
  UsualElements<T> x, bias;
  const uint8_t* where = nullptr;  // NULL: all
  int64_t where_step = 0;
  const T *factor_hi = nullptr, *factor_lo = nullptr;  // NULL: 1
  int64_t factor_step = 0;
  // Set for rows that lie side by side, of which a vector is computed at once. Then what this
  // struct calls row r is element r of all of them, n is how many rows they are, and each lane has
  // its own factor.
  bool is_across = false;
};

// Gives rows the factor that all of them have.
template <class V>
inline void set_factor(UsualRows<typename V::elem>& rows, const Arguments<V>& arguments) {
  if (arguments.hi == 1 && arguments.lo == 0) return;
  rows.factor_hi = &arguments.hi;
  rows.factor_lo = &arguments.lo;
}

// The bits of a number without its sign, and those of the largest number below kLargestLow.
template <class V>
struct LowBits;
template <>
struct LowBits<f32x16> {
  static constexpr uint32_t kMagnitude = 0x7fffffffu, kLargest = 0x3b7fffffu;
};
template <>
struct LowBits<f64x8> {
  static constexpr uint64_t kMagnitude = 0x7fffffffffffffffu, kLargest = 0x3eafffffffffffffu;
};

// One vector of them, with the options that a row has. kNone: some elements or biases are -inf.
template <class V, bool kScaled, bool kBias, bool kWhere, bool kNone>
struct UsualArguments {
  using T = typename V::elem;
  using Int = typename V::Int;
  Pair<V> factor;

  // bad: gathers low parts that are too large, infinite or NaN.
  SOFTMAXLIB_INLINE Pair<V> operator()(V x, V bias, typename V::Mask in,
                                       typename V::Seen& bad) const {
    const V none = V::set1(static_cast<T>(-INFINITY)), zero = V::set1(0);
    if constexpr (kWhere) x = keep(in, x);
    if constexpr (kWhere && kBias) bias = keep(in, bias);
    Pair<V> z = {x, zero};
    if constexpr (kScaled) {
      z.hi = x * factor.hi;
      z.lo = fma(x, factor.lo, fms(x, factor.hi, z.hi));
    }
    if constexpr (kBias) {
      const V product = z.hi;
      z.hi = product + bias;
      const V tail = z.hi - product, error = (product - (z.hi - tail)) + (bias - tail);
      z.lo = kScaled ? z.lo + error : error;
    }
    if constexpr (kNone) z.lo = select(eq(kBias ? min(x, bias) : x, none), zero, z.lo);
    if constexpr (kScaled || kBias) {
      const Int left =
          Int::set1(LowBits<V>::kLargest) - (bits(z.lo) & Int::set1(LowBits<V>::kMagnitude));
      see_differences(bad, left, Int::set1(0));
    }
    if constexpr (kWhere) z.hi = select(in, z.hi, none);
    return z;
  }
};

// Less than a vector of elements. Only those of the own type are read inline: a row has but one
// such end, and the loops below are compiled many times.
template <class V>
SOFTMAXLIB_NOINLINE V few_halves(softmaxlib_dtype dtype, const char* p, int n) {
  return load_some(dtype, p, n, V());
}
template <class V, class T = typename V::elem>
SOFTMAXLIB_INLINE V few_of(const UsualElements<T>& of, const char* p, int n) {
  if (of.dtype != kOwnDtype<T>) return few_halves<V>(of.dtype, p, n);
  return load_n(reinterpret_cast<const T*>(p), n, 0);
}

// The arguments of so many rows of n elements, `pitch` apart in hi and lo. Whole vectors are
// written, -inf beyond the end. lo: not written where the rows have neither a factor nor a bias.
// False, and the results are of no use, where these are not arguments as usual.
template <class V, bool kScaled, bool kBias, bool kWhere, bool kNone, class T = typename V::elem>
SOFTMAXLIB_NOINLINE bool combine_usual(const UsualRows<T>& of, int rows, int64_t n, T* hi, T* lo,
                                       int64_t pitch) {
  constexpr int64_t kLanes = V::lanes;
  constexpr T kLane[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const FetchAhead fetch;
  typename V::Seen bad;
  const V zero = V::set1(0);
  const auto all = eq(zero, zero);
  // Vectors follow each other in a row; or, where they are all of it, from row to row.
  const bool down = of.is_across && n == kLanes && pitch == kLanes;
  const int64_t vectors = down ? rows : n / kLanes;
  const UsualElements<T> of_x = of.x, of_bias = of.bias;
  const int64_t x_next = down ? of_x.step : kLanes * float_item(of_x.dtype);
  const int64_t bias_next = down ? of_bias.step : kLanes * float_item(of_bias.dtype);
  const int64_t where_next = down ? of.where_step : kLanes;
  for (int r = 0; r < (down ? 1 : rows); ++r) {
    const char* x = of_x.p + r * of_x.step;
    const char* bias = kBias ? of_bias.p + r * of_bias.step : nullptr;
    const uint8_t* where = kWhere ? of.where + r * of.where_step : nullptr;
    T *to = hi + r * pitch, *low = kScaled || kBias ? lo + r * pitch : nullptr;
    UsualArguments<V, kScaled, kBias, kWhere, kNone> argument = {};
    if constexpr (kScaled) {
      const T* const factor = of.factor_hi + r * of.factor_step;
      const T* const rest = of.factor_lo + r * of.factor_step;
      if (of.is_across) argument.factor = {load(factor), load(rest)};
      else argument.factor = {V::set1(*factor), V::set1(*rest)};
    }
    for (int64_t i = 0; i < vectors; ++i) {
      V b = zero;
      auto in = all;
      fetch(x + of_x.ahead);
      if constexpr (kBias) {
        fetch(bias + of_bias.ahead);
        b = load_some(of_bias.dtype, bias, kLanes, zero);
        bias += bias_next;
      }
      if constexpr (kWhere) {
        in = load_mask(where, zero);
        where += where_next;
      }
      const Pair<V> z = argument(load_some(of_x.dtype, x, kLanes, zero), b, in, bad);
      x += x_next;
      store(to, z.hi);
      to += kLanes;
      if constexpr (kScaled || kBias) {
        store(low, z.lo);
        low += kLanes;
      }
    }
    const int left = static_cast<int>(n % kLanes);
    if (left == 0) continue;
    const auto there = gt(V::set1(static_cast<T>(left)), load(kLane));
    V b = zero;
    auto in = there;
    if constexpr (kBias) b = few_of<V>(of_bias, bias, left);
    if constexpr (kWhere) {
      uint8_t bytes[kLanes] = {};
      for (int j = 0; j < left; ++j) bytes[j] = where[j];
      in = load_mask(bytes, zero);
    }
    const Pair<V> z = argument(few_of<V>(of_x, x, left), b, in, bad);
    store(to, select(there, z.hi, V::set1(static_cast<T>(-INFINITY))));
    if constexpr (kScaled || kBias) store(low, z.lo);
  }
  return !(kScaled || kBias) || !any_from_bit<sizeof(T) * 8 - 1>(bad);
}

// Knows which of these loops a call takes.
template <class V>
class UsualCombiner {
 public:
  using T = typename V::elem;

  // False where rows have to go the other way; then x, which may be in hi, is no longer there.
  bool operator()(const UsualRows<T>& of, int rows, int64_t n, T* hi, T* lo, int64_t pitch) {
    if constexpr (!kHasManyRows) return false;
    const int options =
        (of.factor_hi ? kScaled : 0) | (of.bias.p ? kBias : 0) | (of.where ? kWhere : 0);
    if (options == 0) return false;  // of a row less a maximum that is 0
    if (options == kWhere)
      for (int64_t i = 0; lo && i < rows * (rows > 1 ? pitch : n); i += V::lanes)
        store(lo + i, V::set1(0));
    if (!sees_none_) {
      if (kLoops<false>[options](of, rows, n, hi, lo, pitch)) return true;
      sees_none_ = true;  // from now on
      if (of.x.p == reinterpret_cast<const char*>(hi)) return false;
    }
    return kLoops<true>[options](of, rows, n, hi, lo, pitch);
  }

 private:
  using Loop = bool (*)(const UsualRows<T>& of, int rows, int64_t n, T* hi, T* lo, int64_t pitch);
  enum { kScaled = 1, kBias = 2, kWhere = 4 };
  template <bool kNone>
  static constexpr Loop kLoops[8] = {nullptr,
                                     combine_usual<V, 1, 0, 0, kNone>,
                                     combine_usual<V, 0, 1, 0, kNone>,
                                     combine_usual<V, 1, 1, 0, kNone>,
                                     combine_usual<V, 0, 0, 1, false>,
                                     combine_usual<V, 1, 0, 1, kNone>,
                                     combine_usual<V, 0, 1, 1, kNone>,
                                     combine_usual<V, 1, 1, 1, kNone>};

  bool sees_none_ = false;  // some element or bias was -inf
};

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
