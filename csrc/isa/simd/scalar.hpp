// The portable leaf: the 64-byte virtual vector as a plain array. It defines what every operation
// of a leaf means (see README.md here); the compiler may vectorize it with what the target has.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#define SOFTMAXLIB_VECTORS_IN_MEMORY 1
#include "isa/macros.hpp"
#include "isa/storage.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

constexpr int kInStep = 1;
constexpr bool kHasStreamingStores = false;
constexpr bool kHasManyRows = false;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define SOFTMAXLIB_HAS_FMA 1
#else
#define SOFTMAXLIB_HAS_FMA 0
#endif

// The product is exact in double; rounding the sum to odd makes the second rounding, to float, the
// only one that counts (Boldo and Melquiond, 2008).
inline float emulated_fma(float a, float b, float c) {
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = static_cast<double>(c);
  const double sum = product + addend;
  const double tail = sum - product;
  const double error = (product - (sum - tail)) + (addend - tail);
  uint64_t bits = bit_cast<uint64_t>(sum);
  if ((error > 0 || error < 0) && !(bits & 1))
    bits += (bits ^ bit_cast<uint64_t>(error)) >> 63 ? uint64_t(-1) : 1;
  return static_cast<float>(bit_cast<double>(bits));
}

// 16 at once, in a form that compilers vectorize: a double sum that is not half way between two
// floats rounds as the exact sum does; the rare others go one by one.
SOFTMAXLIB_NOINLINE void fma_lanes(float* a, const float* b, const float* c, int n) {
#if SOFTMAXLIB_HAS_FMA
  for (int i = 0; i < n; ++i) a[i] = __builtin_fmaf(a[i], b[i], c[i]);
#else
  float result[16];
  uint32_t suspect = 0;
  for (int i = 0; i < n; ++i) {
    const double sum =
        static_cast<double>(a[i]) * static_cast<double>(b[i]) + static_cast<double>(c[i]);
    const uint32_t low = static_cast<uint32_t>(bit_cast<uint64_t>(sum));
    result[i] = static_cast<float>(sum);
    const uint32_t magnitude = bit_cast<uint32_t>(result[i]) & 0x7fffffffu;
    suspect |= (low & 0x1fffffffu) == 0x10000000u;
    suspect |= (magnitude <= 0x00800000u) & (sum != 0);  // subnormal or so: other halves
  }
  if (SOFTMAXLIB_UNLIKELY(suspect))
    for (int i = 0; i < n; ++i) result[i] = emulated_fma(a[i], b[i], c[i]);
  memcpy(a, result, static_cast<size_t>(n) * sizeof(float));
#endif
}

SOFTMAXLIB_NOINLINE void fma_lanes(double* a, const double* b, const double* c, int n) {
#if defined(__GNUC__)
  for (int i = 0; i < n; ++i) a[i] = __builtin_fma(a[i], b[i], c[i]);
#else
  for (int i = 0; i < n; ++i) a[i] = ::fma(a[i], b[i], c[i]);
#endif
}

inline float widen1(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

inline float widen1(f16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  // Moved to float's field, a finite half is 2^112 too small; an exact product repairs that.
  const float scaled = bit_cast<float>(magnitude << 13) * 0x1p112f;
  const uint32_t special = 0x7f800000u | (magnitude & 0x3ffu) << 13;
  return bit_cast<float>(sign | (magnitude >= 0x7c00u ? special : bit_cast<uint32_t>(scaled)));
}

inline void narrow1(float x, float& out) { out = x; }
inline void narrow1(double x, double& out) { out = x; }

inline void narrow1(float x, bf16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out.bits = static_cast<uint16_t>((x == x ? rounded : bits | 0x400000u) >> 16);
}

inline void narrow1(float x, f16& out) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x7f800000u) {
    half = magnitude > 0x7f800000u ? 0x7e00u | ((magnitude >> 13) & 0x3ffu) : 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Subnormal half: adding 1/2 moves its last place to float's last place, rounded by the adder.
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    if (half > 0x7c00u) half = 0x7c00u;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

inline float widen1(float x) { return x; }
inline double widen1(double x) { return x; }

// Operations are small functions that the compiler vectorizes one by one, not inlined: 16 lanes of
// scalar code in line, a hundred times per kernel, would make this the largest leaf by far.
template <class T, class Bits, int N>
struct Vector {
  using elem = T;
  static constexpr int lanes = N;

  struct Int {
    Bits lane[N];
    static Int set1(Bits x) {
      Int r;
      for (int i = 0; i < N; ++i) r.lane[i] = x;
      return r;
    }
    SOFTMAXLIB_NOINLINE friend Int operator+(const Int& a, const Int& b) {
      return zip(a, b, [](Bits x, Bits y) { return x + y; });
    }
    SOFTMAXLIB_NOINLINE friend Int operator-(const Int& a, const Int& b) {
      return zip(a, b, [](Bits x, Bits y) { return x - y; });
    }
    SOFTMAXLIB_NOINLINE friend Int operator&(const Int& a, const Int& b) {
      return zip(a, b, [](Bits x, Bits y) { return x & y; });
    }
    SOFTMAXLIB_NOINLINE friend Int operator^(const Int& a, const Int& b) {
      return zip(a, b, [](Bits x, Bits y) { return x ^ y; });
    }
  };
  struct Seen {
    Bits all = 0;
    SOFTMAXLIB_NOINLINE friend void see_differences(Seen& seen, const Int& a, const Int& b) {
      for (int i = 0; i < N; ++i) seen.all |= a.lane[i] ^ b.lane[i];
    }
  };

  struct Mask {
    bool lane[N];
  };

  T lane[N];

  static Vector set1(T x) {
    Vector r;
    for (int i = 0; i < N; ++i) r.lane[i] = x;
    return r;
  }

  template <class R, class F>
  static R zip(const R& a, const R& b, F f) {
    R r;
    for (int i = 0; i < N; ++i) r.lane[i] = f(a.lane[i], b.lane[i]);
    return r;
  }
  template <class F>
  static Mask compare(const Vector& a, const Vector& b, F f) {
    Mask m;
    for (int i = 0; i < N; ++i) m.lane[i] = f(a.lane[i], b.lane[i]);
    return m;
  }

  SOFTMAXLIB_NOINLINE friend Vector operator+(const Vector& a, const Vector& b) {
    return zip(a, b, [](T x, T y) { return x + y; });
  }
  SOFTMAXLIB_NOINLINE friend Vector operator-(const Vector& a, const Vector& b) {
    return zip(a, b, [](T x, T y) { return x - y; });
  }
  SOFTMAXLIB_NOINLINE friend Vector operator*(const Vector& a, const Vector& b) {
    return zip(a, b, [](T x, T y) { return x * y; });
  }
  SOFTMAXLIB_NOINLINE friend Vector operator/(const Vector& a, const Vector& b) {
    return zip(a, b, [](T x, T y) { return x / y; });
  }
  SOFTMAXLIB_NOINLINE friend Vector fma(const Vector& a, const Vector& b, const Vector& c) {
    Vector r = a;
    fma_lanes(r.lane, b.lane, c.lane, N);
    return r;
  }
  SOFTMAXLIB_NOINLINE friend Vector fnma(const Vector& a, const Vector& b, const Vector& c) {
    Vector r = a;
    for (int i = 0; i < N; ++i) r.lane[i] = -r.lane[i];
    fma_lanes(r.lane, b.lane, c.lane, N);
    return r;
  }
  SOFTMAXLIB_NOINLINE friend Vector fms(const Vector& a, const Vector& b, const Vector& c) {
    Vector r = a, minus = c;
    for (int i = 0; i < N; ++i) minus.lane[i] = -minus.lane[i];
    fma_lanes(r.lane, b.lane, minus.lane, N);
    return r;
  }
  SOFTMAXLIB_NOINLINE friend Vector max(const Vector& a, const Vector& b) {
    return zip(a, b, [](T x, T y) { return x > y ? x : y; });
  }
  SOFTMAXLIB_NOINLINE friend Vector min(const Vector& a, const Vector& b) {
    return zip(a, b, [](T x, T y) { return x < y ? x : y; });
  }
  SOFTMAXLIB_NOINLINE friend Mask gt(const Vector& a, const Vector& b) {
    return compare(a, b, [](T x, T y) { return x > y; });
  }
  SOFTMAXLIB_NOINLINE friend Mask eq(const Vector& a, const Vector& b) {
    return compare(a, b, [](T x, T y) { return x == y; });
  }
  SOFTMAXLIB_NOINLINE friend Mask load_mask(const uint8_t* p, const Vector&) {
    Mask m;
    for (int i = 0; i < N; ++i) m.lane[i] = p[i] != 0;
    return m;
  }
  SOFTMAXLIB_NOINLINE friend bool any(const Mask& m) {
    bool found = false;
    for (int i = 0; i < N; ++i) found |= m.lane[i];
    return found;
  }
  SOFTMAXLIB_NOINLINE friend bool all(const Mask& m) {
    bool each = true;
    for (int i = 0; i < N; ++i) each &= m.lane[i];
    return each;
  }
  SOFTMAXLIB_NOINLINE friend Vector select(const Mask& m, const Vector& a, const Vector& b) {
    Vector r;
    for (int i = 0; i < N; ++i) r.lane[i] = m.lane[i] ? a.lane[i] : b.lane[i];
    return r;
  }
  SOFTMAXLIB_NOINLINE friend Vector keep(const Mask& m, const Vector& a) {
    Vector r;
    for (int i = 0; i < N; ++i) r.lane[i] = m.lane[i] ? a.lane[i] : 0;
    return r;
  }
  friend Int bits(const Vector& a) { return bit_cast<Int>(a); }
  friend Vector from_bits(const Int& a) { return bit_cast<Vector>(a); }
  friend T first(const Vector& a) { return a.lane[0]; }
  SOFTMAXLIB_NOINLINE friend T max_lane(Vector a) {
    for (int half = N / 2; half; half /= 2)
      for (int i = 0; i < half; ++i)
        a.lane[i] = a.lane[i] > a.lane[i + half] ? a.lane[i] : a.lane[i + half];
    return a.lane[0];
  }
  SOFTMAXLIB_NOINLINE friend double sum_lanes(const Vector& a) {
    double s[N];
    for (int i = 0; i < N; ++i) s[i] = static_cast<double>(a.lane[i]);
    for (int half = N / 2; half; half /= 2)
      for (int i = 0; i < half; ++i) s[i] += s[i + half];
    return s[0];
  }
};

template <int K, class Int>
SOFTMAXLIB_NOINLINE Int shl(Int a) {
  for (auto& lane : a.lane) lane <<= K;
  return a;
}
template <int K, class Int>
SOFTMAXLIB_NOINLINE Int shr(Int a) {
  for (auto& lane : a.lane) lane >>= K;
  return a;
}

template <int K, class Seen>
inline bool any_from_bit(const Seen& seen) {
  return seen.all >> K != 0;
}

using f32x16 = Vector<float, uint32_t, 16>;
using f64x8 = Vector<double, uint64_t, 8>;

struct Table8 {
  uint32_t entry[8];
};
inline Table8 load_table8(const uint32_t* p) {
  Table8 t;
  memcpy(t.entry, p, sizeof(t.entry));
  return t;
}
SOFTMAXLIB_NOINLINE f32x16::Int lookup(const Table8& t, f32x16::Int index) {
  for (auto& lane : index.lane) lane = t.entry[lane & 7u];
  return index;
}

SOFTMAXLIB_NOINLINE f64x8 widen_low(const f32x16& a) {
  f64x8 r;
  for (int i = 0; i < 8; ++i) r.lane[i] = static_cast<double>(a.lane[i]);
  return r;
}
SOFTMAXLIB_NOINLINE f64x8 widen_high(const f32x16& a) {
  f64x8 r;
  for (int i = 0; i < 8; ++i) r.lane[i] = static_cast<double>(a.lane[i + 8]);
  return r;
}

SOFTMAXLIB_NOINLINE f32x16 narrow(const f64x8& low, const f64x8& high) {
  f32x16 r;
  for (int i = 0; i < 8; ++i) {
    r.lane[i] = static_cast<float>(low.lane[i]);
    r.lane[i + 8] = static_cast<float>(high.lane[i]);
  }
  return r;
}

template <class S>
struct vector_of {
  using type = f32x16;
};
template <>
struct vector_of<double> {
  using type = f64x8;
};

template <class S>
SOFTMAXLIB_NOINLINE typename vector_of<S>::type load_n(const S* p, int n,
                                                       typename vector_of<S>::type::elem fill) {
  using V = typename vector_of<S>::type;
  V r = V::set1(fill);
  for (int i = 0; i < n; ++i) {
    S x;
    memcpy(&x, p + i, sizeof(S));
    r.lane[i] = widen1(x);
  }
  return r;
}
template <class S>
inline typename vector_of<S>::type load(const S* p) {
  return load_n(p, vector_of<S>::type::lanes, 0);
}
template <class S>
SOFTMAXLIB_NOINLINE void store_n(S* p, const typename vector_of<S>::type& v, int n) {
  for (int i = 0; i < n; ++i) {
    S x;
    narrow1(v.lane[i], x);
    memcpy(p + i, &x, sizeof(S));
  }
}
template <class S>
inline void store(S* p, const typename vector_of<S>::type& v) {
  store_n(p, v, vector_of<S>::type::lanes);
}
template <class S>
inline void stream(S* p, const typename vector_of<S>::type& v) {
  store(p, v);
}
inline void stream_fence() {}
inline void prefetch(const void*) {}

template <class T>
SOFTMAXLIB_NOINLINE void add_quad(T* sum, const T* a, const T* b, bool is_first) {
  T x[4];
  memcpy(x, a, sizeof(x));
  if (is_first)
    for (int i = 0; i < 4; ++i) x[i] *= b[i];
  else fma_lanes(x, b, sum, 4);
  memcpy(sum, x, sizeof(x));
}
template <int kRows>
inline void store_quads(float* p, const f32x16& a, const f32x16& b) {
  for (int i = 0; i < 16; i += 4)
    add_quad(p + i * kRows / 16 * 4, a.lane + i, b.lane + i, i % (16 / kRows) == 0);
}
inline void store_quads(double* p, const f64x8& a, const f64x8& b, bool is_first) {
  add_quad(p, a.lane, b.lane, is_first);
  add_quad(p, a.lane + 4, b.lane + 4, false);
}

template <class V, int N>
SOFTMAXLIB_NOINLINE void load_columns(const typename V::elem* p, int64_t stride, V (&column)[N]) {
  for (int r = 0; r < V::lanes; ++r) {
    typename V::elem row[N];
    memcpy(row, p + r * stride, sizeof(row));
    for (int j = 0; j < N; ++j) column[j].lane[r] = row[j];
  }
}
template <class V, int N>
SOFTMAXLIB_NOINLINE void store_columns(typename V::elem* p, int64_t stride, const V (&column)[N]) {
  for (int r = 0; r < V::lanes; ++r) {
    typename V::elem row[N];
    for (int j = 0; j < N; ++j) row[j] = column[j].lane[r];
    memcpy(p + r * stride, row, sizeof(row));
  }
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
