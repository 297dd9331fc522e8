// The AVX2 leaf (AVX2, FMA, F16C): two ymm registers are the virtual vector.
#pragma once

#if !defined(__AVX2__) || (!defined(_MSC_VER) && (!defined(__FMA__) || !defined(__F16C__)))
#error "simd/avx2.hpp needs AVX2, FMA and F16C"
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "isa/macros.hpp"
#include "isa/storage.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

constexpr int kInStep = 1;

// GCC would gather operations on a value at the end of a loop, and spill what they need until then.
#if defined(__GNUC__)
#define SOFTMAXLIB_NOT_LATER(v) __asm__("" : "+x"(v))
#else
#define SOFTMAXLIB_NOT_LATER(v) static_cast<void>(v)
#endif
constexpr bool kHasStreamingStores = true;
constexpr bool kHasManyRows = true;

struct f32x16 {
  using elem = float;
  static constexpr int lanes = 16;
  struct Int {
    __m256i a, b;
    static Int set1(uint32_t x) {
      const __m256i v = _mm256_set1_epi32(static_cast<int>(x));
      return {v, v};
    }
  };
  struct Seen {
    __m256i v = _mm256_setzero_si256();
  };
  struct Mask {
    __m256 a, b;
  };
  __m256 a, b;
  static f32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
};

struct f64x8 {
  using elem = double;
  static constexpr int lanes = 8;
  struct Int {
    __m256i a, b;
    static Int set1(uint64_t x) {
      const __m256i v = _mm256_set1_epi64x(static_cast<long long>(x));
      return {v, v};
    }
  };
  struct Seen {
    __m256i v = _mm256_setzero_si256();
  };
  struct Mask {
    __m256d a, b;
  };
  __m256d a, b;
  static f64x8 set1(double x) { return {_mm256_set1_pd(x), _mm256_set1_pd(x)}; }
};

inline f32x16 operator+(f32x16 x, f32x16 y) {
  return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)};
}
inline f32x16 operator-(f32x16 x, f32x16 y) {
  return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)};
}
inline f32x16 operator*(f32x16 x, f32x16 y) {
  return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)};
}
inline f32x16 operator/(f32x16 x, f32x16 y) {
  return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)};
}
inline f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
  return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
inline f32x16 fnma(f32x16 x, f32x16 y, f32x16 z) {
  return {_mm256_fnmadd_ps(x.a, y.a, z.a), _mm256_fnmadd_ps(x.b, y.b, z.b)};
}
inline f32x16 fms(f32x16 x, f32x16 y, f32x16 z) {
  return {_mm256_fmsub_ps(x.a, y.a, z.a), _mm256_fmsub_ps(x.b, y.b, z.b)};
}
inline f32x16 max(f32x16 x, f32x16 y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline f32x16 min(f32x16 x, f32x16 y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline f32x16::Mask gt(f32x16 x, f32x16 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
inline f32x16::Mask eq(f32x16 x, f32x16 y) {
  return {_mm256_cmp_ps(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_EQ_OQ)};
}
inline f32x16::Mask load_mask(const uint8_t* p, f32x16) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i a = _mm256_cvtepu8_epi32(bytes), b = _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8));
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a, zero)),
          _mm256_castsi256_ps(_mm256_cmpgt_epi32(b, zero))};
}
inline bool any(f32x16::Mask m) { return _mm256_movemask_ps(_mm256_or_ps(m.a, m.b)) != 0; }
inline bool all(f32x16::Mask m) { return _mm256_movemask_ps(_mm256_and_ps(m.a, m.b)) == 0xff; }
inline f32x16 select(f32x16::Mask m, f32x16 x, f32x16 y) {
  return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}
inline f32x16 keep(f32x16::Mask m, f32x16 x) {
  return {_mm256_and_ps(m.a, x.a), _mm256_and_ps(m.b, x.b)};
}
inline f32x16::Int bits(f32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline f32x16 from_bits(f32x16::Int x) {
  return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)};
}
inline f32x16::Int operator+(f32x16::Int x, f32x16::Int y) {
  return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)};
}
inline f32x16::Int operator-(f32x16::Int x, f32x16::Int y) {
  return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)};
}
inline f32x16::Int operator&(f32x16::Int x, f32x16::Int y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
inline f32x16::Int operator^(f32x16::Int x, f32x16::Int y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
inline void see_differences(f32x16::Seen& seen, f32x16::Int x, f32x16::Int y) {
  const __m256i a = _mm256_xor_si256(x.a, y.a), b = _mm256_xor_si256(x.b, y.b);
  seen.v = _mm256_or_si256(seen.v, _mm256_or_si256(a, b));
  SOFTMAXLIB_NOT_LATER(seen.v);
}
template <int K>
inline bool any_from_bit(f32x16::Seen seen) {
  return !_mm256_testz_si256(seen.v, _mm256_set1_epi32(static_cast<int>(~0u << K)));
}
template <int K>
inline f32x16::Int shl(f32x16::Int x) {
  return {_mm256_slli_epi32(x.a, K), _mm256_slli_epi32(x.b, K)};
}
template <int K>
inline f32x16::Int shr(f32x16::Int x) {
  return {_mm256_srli_epi32(x.a, K), _mm256_srli_epi32(x.b, K)};
}
inline float first(f32x16 x) { return _mm256_cvtss_f32(x.a); }

inline f64x8 operator+(f64x8 x, f64x8 y) {
  return {_mm256_add_pd(x.a, y.a), _mm256_add_pd(x.b, y.b)};
}
inline f64x8 operator-(f64x8 x, f64x8 y) {
  return {_mm256_sub_pd(x.a, y.a), _mm256_sub_pd(x.b, y.b)};
}
inline f64x8 operator*(f64x8 x, f64x8 y) {
  return {_mm256_mul_pd(x.a, y.a), _mm256_mul_pd(x.b, y.b)};
}
inline f64x8 operator/(f64x8 x, f64x8 y) {
  return {_mm256_div_pd(x.a, y.a), _mm256_div_pd(x.b, y.b)};
}
inline f64x8 fma(f64x8 x, f64x8 y, f64x8 z) {
  return {_mm256_fmadd_pd(x.a, y.a, z.a), _mm256_fmadd_pd(x.b, y.b, z.b)};
}
inline f64x8 fnma(f64x8 x, f64x8 y, f64x8 z) {
  return {_mm256_fnmadd_pd(x.a, y.a, z.a), _mm256_fnmadd_pd(x.b, y.b, z.b)};
}
inline f64x8 fms(f64x8 x, f64x8 y, f64x8 z) {
  return {_mm256_fmsub_pd(x.a, y.a, z.a), _mm256_fmsub_pd(x.b, y.b, z.b)};
}
inline f64x8 max(f64x8 x, f64x8 y) { return {_mm256_max_pd(x.a, y.a), _mm256_max_pd(x.b, y.b)}; }
inline f64x8 min(f64x8 x, f64x8 y) { return {_mm256_min_pd(x.a, y.a), _mm256_min_pd(x.b, y.b)}; }
inline f64x8::Mask gt(f64x8 x, f64x8 y) {
  return {_mm256_cmp_pd(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_pd(x.b, y.b, _CMP_GT_OQ)};
}
inline f64x8::Mask eq(f64x8 x, f64x8 y) {
  return {_mm256_cmp_pd(x.a, y.a, _CMP_EQ_OQ), _mm256_cmp_pd(x.b, y.b, _CMP_EQ_OQ)};
}
inline f64x8::Mask load_mask(const uint8_t* p, f64x8) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  const __m256i zero = _mm256_setzero_si256();
  const __m256i a = _mm256_cvtepu8_epi64(bytes), b = _mm256_cvtepu8_epi64(_mm_srli_si128(bytes, 4));
  return {_mm256_castsi256_pd(_mm256_cmpgt_epi64(a, zero)),
          _mm256_castsi256_pd(_mm256_cmpgt_epi64(b, zero))};
}
inline bool any(f64x8::Mask m) { return _mm256_movemask_pd(_mm256_or_pd(m.a, m.b)) != 0; }
inline bool all(f64x8::Mask m) { return _mm256_movemask_pd(_mm256_and_pd(m.a, m.b)) == 0xf; }
inline f64x8 select(f64x8::Mask m, f64x8 x, f64x8 y) {
  return {_mm256_blendv_pd(y.a, x.a, m.a), _mm256_blendv_pd(y.b, x.b, m.b)};
}
inline f64x8 keep(f64x8::Mask m, f64x8 x) {
  return {_mm256_and_pd(m.a, x.a), _mm256_and_pd(m.b, x.b)};
}
inline f64x8::Int bits(f64x8 x) { return {_mm256_castpd_si256(x.a), _mm256_castpd_si256(x.b)}; }
inline f64x8 from_bits(f64x8::Int x) {
  return {_mm256_castsi256_pd(x.a), _mm256_castsi256_pd(x.b)};
}
inline f64x8::Int operator+(f64x8::Int x, f64x8::Int y) {
  return {_mm256_add_epi64(x.a, y.a), _mm256_add_epi64(x.b, y.b)};
}
inline f64x8::Int operator-(f64x8::Int x, f64x8::Int y) {
  return {_mm256_sub_epi64(x.a, y.a), _mm256_sub_epi64(x.b, y.b)};
}
inline f64x8::Int operator&(f64x8::Int x, f64x8::Int y) {
  return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)};
}
inline f64x8::Int operator^(f64x8::Int x, f64x8::Int y) {
  return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)};
}
inline void see_differences(f64x8::Seen& seen, f64x8::Int x, f64x8::Int y) {
  const __m256i a = _mm256_xor_si256(x.a, y.a), b = _mm256_xor_si256(x.b, y.b);
  seen.v = _mm256_or_si256(seen.v, _mm256_or_si256(a, b));
  SOFTMAXLIB_NOT_LATER(seen.v);
}
template <int K>
inline bool any_from_bit(f64x8::Seen seen) {
  return !_mm256_testz_si256(seen.v, _mm256_set1_epi64x(static_cast<long long>(~0ull << K)));
}
template <int K>
inline f64x8::Int shl(f64x8::Int x) {
  return {_mm256_slli_epi64(x.a, K), _mm256_slli_epi64(x.b, K)};
}
template <int K>
inline f64x8::Int shr(f64x8::Int x) {
  return {_mm256_srli_epi64(x.a, K), _mm256_srli_epi64(x.b, K)};
}
inline double first(f64x8 x) { return _mm256_cvtsd_f64(x.a); }

// Folds halves until one lane is left: 8-4-2-1.
inline double sum_lanes(f64x8 x) {
  const __m256d four = _mm256_add_pd(x.a, x.b);
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline double max_lane(f64x8 x) {
  const __m256d four = _mm256_max_pd(x.a, x.b);
  const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}
inline f64x8 widen(__m256 x) {
  return {_mm256_cvtps_pd(_mm256_castps256_ps128(x)), _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1))};
}
inline f64x8 widen_low(f32x16 x) { return widen(x.a); }
inline f64x8 widen_high(f32x16 x) { return widen(x.b); }
inline f32x16 narrow(f64x8 low, f64x8 high) {
  return {_mm256_set_m128(_mm256_cvtpd_ps(low.b), _mm256_cvtpd_ps(low.a)),
          _mm256_set_m128(_mm256_cvtpd_ps(high.b), _mm256_cvtpd_ps(high.a))};
}
inline double sum_lanes(f32x16 x) { return sum_lanes(widen_low(x) + widen_high(x)); }
inline float max_lane(f32x16 x) {
  const __m256 eight = _mm256_max_ps(x.a, x.b);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

struct Table8 {
  __m256i v;
};
inline Table8 load_table8(const uint32_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
}
inline f32x16::Int lookup(Table8 t, f32x16::Int index) {
  return {_mm256_permutevar8x32_epi32(t.v, index.a), _mm256_permutevar8x32_epi32(t.v, index.b)};
}

template <class S>
struct vector_of {
  using type = f32x16;
};
template <>
struct vector_of<double> {
  using type = f64x8;
};

inline __m256i first_lanes32(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i first_lanes64(int n) {
  return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3));
}

inline __m256 widen(__m128i h, const f16*) { return _mm256_cvtph_ps(h); }
inline __m256 widen(__m128i h, const bf16*) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
SOFTMAXLIB_INLINE __m128i narrow(__m256 x, f16*) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SOFTMAXLIB_INLINE __m128i narrow(__m256 x, bf16*) {
  const __m256i i = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(i, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(i, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(i, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}

inline f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline f64x8 load(const double* p) { return {_mm256_loadu_pd(p), _mm256_loadu_pd(p + 4)}; }
template <class S>
inline f32x16 load(const S* p) {
  return {widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), p),
          widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)), p)};
}
inline f32x16 load_n(const float* p, int n, float fill) {
  const __m256i low = first_lanes32(n), high = first_lanes32(n - 8);
  const __m256 other = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(other, _mm256_maskload_ps(p, low), _mm256_castsi256_ps(low)),
          _mm256_blendv_ps(other, _mm256_maskload_ps(p + 8, high), _mm256_castsi256_ps(high))};
}
inline f64x8 load_n(const double* p, int n, double fill) {
  const __m256i low = first_lanes64(n), high = first_lanes64(n - 4);
  const __m256d other = _mm256_set1_pd(fill);
  return {_mm256_blendv_pd(other, _mm256_maskload_pd(p, low), _mm256_castsi256_pd(low)),
          _mm256_blendv_pd(other, _mm256_maskload_pd(p + 4, high), _mm256_castsi256_pd(high))};
}
template <class S>
inline f32x16 load_n(const S* p, int n, float fill) {
  S copy[16] = {};
  memcpy(copy, p, static_cast<size_t>(n) * sizeof(S));
  const f32x16 v = load(copy);
  const __m256 other = _mm256_set1_ps(fill);
  return {_mm256_blendv_ps(other, v.a, _mm256_castsi256_ps(first_lanes32(n))),
          _mm256_blendv_ps(other, v.b, _mm256_castsi256_ps(first_lanes32(n - 8)))};
}

inline void store(float* p, f32x16 v) {
  _mm256_storeu_ps(p, v.a);
  _mm256_storeu_ps(p + 8, v.b);
}
inline void store(double* p, f64x8 v) {
  _mm256_storeu_pd(p, v.a);
  _mm256_storeu_pd(p + 4, v.b);
}
template <class S>
SOFTMAXLIB_INLINE void store(S* p, f32x16 v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(v.a, p));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow(v.b, p));
}
inline void store_n(float* p, f32x16 v, int n) {
  _mm256_maskstore_ps(p, first_lanes32(n), v.a);
  _mm256_maskstore_ps(p + 8, first_lanes32(n - 8), v.b);
}
inline void store_n(double* p, f64x8 v, int n) {
  _mm256_maskstore_pd(p, first_lanes64(n), v.a);
  _mm256_maskstore_pd(p + 4, first_lanes64(n - 4), v.b);
}
template <class S>
inline void store_n(S* p, f32x16 v, int n) {
  S copy[16];
  store(copy, v);
  memcpy(p, copy, static_cast<size_t>(n) * sizeof(S));
}
inline void stream(float* p, f32x16 v) {
  _mm256_stream_ps(p, v.a);
  _mm256_stream_ps(p + 8, v.b);
}
inline void stream(double* p, f64x8 v) {
  _mm256_stream_pd(p, v.a);
  _mm256_stream_pd(p + 4, v.b);
}
template <class S>
SOFTMAXLIB_INLINE void stream(S* p, f32x16 v) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrow(v.a, p));
  _mm_stream_si128(reinterpret_cast<__m128i*>(p + 8), narrow(v.b, p));
}
inline void stream_fence() { _mm_sfence(); }
SOFTMAXLIB_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

// The quads of a b, added one after the other; the first to `sum` or, where that is NULL, to none.
SOFTMAXLIB_INLINE __m128 fold_quads(__m256 a, __m256 b, const __m128* sum) {
  const __m128 first = _mm256_castps256_ps128(a), by = _mm256_castps256_ps128(b);
  return _mm_fmadd_ps(_mm256_extractf128_ps(a, 1), _mm256_extractf128_ps(b, 1),
                      sum ? _mm_fmadd_ps(first, by, *sum) : _mm_mul_ps(first, by));
}
template <int kRows>
SOFTMAXLIB_INLINE void store_quads(float* p, f32x16 a, f32x16 b) {
  const __m128 two = fold_quads(a.a, b.a, nullptr);
  if (kRows == 2) _mm_storeu_ps(p, two);
  _mm_storeu_ps(p + 4 * (kRows - 1), fold_quads(a.b, b.b, kRows == 2 ? nullptr : &two));
}
SOFTMAXLIB_INLINE void store_quads(double* p, f64x8 a, f64x8 b, bool is_first) {
  const __m256d first =
      is_first ? _mm256_mul_pd(a.a, b.a) : _mm256_fmadd_pd(a.a, b.a, _mm256_loadu_pd(p));
  _mm256_storeu_pd(p, _mm256_fmadd_pd(a.b, b.b, first));
}

// The halves of four registers as 4 x 4 matrices.
SOFTMAXLIB_INLINE void transpose_halves(__m256 (&v)[4]) {
  const __m256d a = _mm256_castps_pd(_mm256_unpacklo_ps(v[0], v[1]));
  const __m256d b = _mm256_castps_pd(_mm256_unpackhi_ps(v[0], v[1]));
  const __m256d c = _mm256_castps_pd(_mm256_unpacklo_ps(v[2], v[3]));
  const __m256d d = _mm256_castps_pd(_mm256_unpackhi_ps(v[2], v[3]));
  v[0] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, c));
  v[1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, c));
  v[2] = _mm256_castpd_ps(_mm256_unpacklo_pd(b, d));
  v[3] = _mm256_castpd_ps(_mm256_unpackhi_pd(b, d));
}

SOFTMAXLIB_INLINE void load_columns8(const float* p, int64_t stride, __m256 (&v)[4]) {
  for (int i = 0; i < 4; ++i)
    v[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p + i * stride)),
                                _mm_loadu_ps(p + (4 + i) * stride), 1);
  transpose_halves(v);
}
SOFTMAXLIB_INLINE void load_columns4(const double* p, int64_t stride, __m256d (&v)[4]) {
  const auto rows = [=](int low, int high, int at) {
    return _mm256_insertf128_pd(_mm256_castpd128_pd256(_mm_loadu_pd(p + low * stride + at)),
                                _mm_loadu_pd(p + high * stride + at), 1);
  };
  for (int i = 0; i < 4; i += 2) {
    const __m256d even = rows(0, 2, i), odd = rows(1, 3, i);
    v[i] = _mm256_unpacklo_pd(even, odd);
    v[i + 1] = _mm256_unpackhi_pd(even, odd);
  }
}
SOFTMAXLIB_INLINE void store_columns8(float* p, int64_t stride, __m256 (&v)[4]) {
  transpose_halves(v);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(p + i * stride, _mm256_castps256_ps128(v[i]));
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(p + (4 + i) * stride, _mm256_extractf128_ps(v[i], 1));
}
SOFTMAXLIB_INLINE void store_columns4(double* p, int64_t stride, const __m256d (&v)[4]) {
  const __m256d even[2] = {_mm256_unpacklo_pd(v[0], v[1]), _mm256_unpacklo_pd(v[2], v[3])};
  const __m256d odd[2] = {_mm256_unpackhi_pd(v[0], v[1]), _mm256_unpackhi_pd(v[2], v[3])};
  _mm256_storeu_pd(p, _mm256_permute2f128_pd(even[0], even[1], 0x20));
  _mm256_storeu_pd(p + stride, _mm256_permute2f128_pd(odd[0], odd[1], 0x20));
  _mm256_storeu_pd(p + 2 * stride, _mm256_permute2f128_pd(even[0], even[1], 0x31));
  _mm256_storeu_pd(p + 3 * stride, _mm256_permute2f128_pd(odd[0], odd[1], 0x31));
}

SOFTMAXLIB_INLINE void load_four_columns(const float* p, int64_t stride, f32x16* column) {
  __m256 a[4], b[4];
  load_columns8(p, stride, a);
  load_columns8(p + 8 * stride, stride, b);
  for (int i = 0; i < 4; ++i) column[i] = {a[i], b[i]};
}
SOFTMAXLIB_INLINE void load_four_columns(const double* p, int64_t stride, f64x8* column) {
  __m256d a[4], b[4];
  load_columns4(p, stride, a);
  load_columns4(p + 4 * stride, stride, b);
  for (int i = 0; i < 4; ++i) column[i] = {a[i], b[i]};
}
SOFTMAXLIB_INLINE void store_four_columns(float* p, int64_t stride, const f32x16* column) {
  __m256 a[4] = {column[0].a, column[1].a, column[2].a, column[3].a};
  __m256 b[4] = {column[0].b, column[1].b, column[2].b, column[3].b};
  store_columns8(p, stride, a);
  store_columns8(p + 8 * stride, stride, b);
}
SOFTMAXLIB_INLINE void store_four_columns(double* p, int64_t stride, const f64x8* column) {
  store_columns4(p, stride, {column[0].a, column[1].a, column[2].a, column[3].a});
  store_columns4(p + 4 * stride, stride, {column[0].b, column[1].b, column[2].b, column[3].b});
}

template <class V>
SOFTMAXLIB_INLINE void load_columns(const typename V::elem* p, int64_t stride, V (&column)[4]) {
  load_four_columns(p, stride, column);
}
template <class V>
SOFTMAXLIB_INLINE void load_columns(const typename V::elem* p, int64_t stride, V (&column)[8]) {
  load_four_columns(p, stride, column);
  load_four_columns(p + 4, stride, column + 4);
}
template <class V>
SOFTMAXLIB_INLINE void store_columns(typename V::elem* p, int64_t stride, const V (&column)[4]) {
  store_four_columns(p, stride, column);
}
template <class V>
SOFTMAXLIB_INLINE void store_columns(typename V::elem* p, int64_t stride, const V (&column)[8]) {
  store_four_columns(p, stride, column);
  store_four_columns(p + 4, stride, column + 4);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
