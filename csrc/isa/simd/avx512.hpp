// The AVX-512 leaf (F, BW, DQ, VL): one zmm register is the virtual vector.
#pragma once

#if !defined(__AVX512F__) || !defined(__AVX512BW__) || !defined(__AVX512DQ__) || \
    !defined(__AVX512VL__)
#error "simd/avx512.hpp needs AVX-512 F, BW, DQ and VL"
#endif

#include <immintrin.h>
#include <stdint.h>

#include "isa/macros.hpp"
#include "isa/storage.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

constexpr int kInStep = 4;
constexpr bool kHasStreamingStores = true;
constexpr bool kHasManyRows = true;

struct f32x16 {
  using elem = float;
  static constexpr int lanes = 16;
  struct Int {
    __m512i v;
    static Int set1(uint32_t x) { return {_mm512_set1_epi32(static_cast<int>(x))}; }
  };
  struct Seen {
    __m512i v = _mm512_setzero_si512();
  };
  struct Mask {
    __mmask16 v;
  };
  __m512 v;
  static f32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
};

struct f64x8 {
  using elem = double;
  static constexpr int lanes = 8;
  struct Int {
    __m512i v;
    static Int set1(uint64_t x) { return {_mm512_set1_epi64(static_cast<long long>(x))}; }
  };
  struct Seen {
    __m512i v = _mm512_setzero_si512();
  };
  struct Mask {
    __mmask8 v;
  };
  __m512d v;
  static f64x8 set1(double x) { return {_mm512_set1_pd(x)}; }
};

inline f32x16 operator+(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
inline f32x16 operator-(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline f32x16 operator*(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline f32x16 operator/(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline f32x16 fnma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
inline f32x16 fms(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmsub_ps(a.v, b.v, c.v)}; }
inline f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
inline f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
inline f32x16::Mask gt(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline f32x16::Mask eq(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline f32x16::Mask load_mask(const uint8_t* p, f32x16) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm_test_epi8_mask(bytes, bytes)};
}
inline bool any(f32x16::Mask m) { return m.v != 0; }
inline bool all(f32x16::Mask m) { return m.v == 0xffff; }
inline f32x16 select(f32x16::Mask m, f32x16 a, f32x16 b) {
  return {_mm512_mask_blend_ps(m.v, b.v, a.v)};
}
inline f32x16 keep(f32x16::Mask m, f32x16 a) { return {_mm512_maskz_mov_ps(m.v, a.v)}; }
inline f32x16::Int bits(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
inline f32x16 from_bits(f32x16::Int a) { return {_mm512_castsi512_ps(a.v)}; }
inline f32x16::Int operator+(f32x16::Int a, f32x16::Int b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline f32x16::Int operator-(f32x16::Int a, f32x16::Int b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline f32x16::Int operator&(f32x16::Int a, f32x16::Int b) { return {_mm512_and_si512(a.v, b.v)}; }
inline f32x16::Int operator^(f32x16::Int a, f32x16::Int b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline void see_differences(f32x16::Seen& seen, f32x16::Int a, f32x16::Int b) {
  seen.v = _mm512_ternarylogic_epi32(seen.v, a.v, b.v, 0xf6);  // seen | (a ^ b)
}
template <int K>
inline bool any_from_bit(f32x16::Seen seen) {
  return _mm512_test_epi32_mask(seen.v, _mm512_set1_epi32(static_cast<int>(~0u << K))) != 0;
}
template <int K>
inline f32x16::Int shl(f32x16::Int a) {
  return {_mm512_slli_epi32(a.v, K)};
}
template <int K>
inline f32x16::Int shr(f32x16::Int a) {
  return {_mm512_srli_epi32(a.v, K)};
}
inline float first(f32x16 a) { return _mm512_cvtss_f32(a.v); }

inline f64x8 operator+(f64x8 a, f64x8 b) { return {_mm512_add_pd(a.v, b.v)}; }
inline f64x8 operator-(f64x8 a, f64x8 b) { return {_mm512_sub_pd(a.v, b.v)}; }
inline f64x8 operator*(f64x8 a, f64x8 b) { return {_mm512_mul_pd(a.v, b.v)}; }
inline f64x8 operator/(f64x8 a, f64x8 b) { return {_mm512_div_pd(a.v, b.v)}; }
inline f64x8 fma(f64x8 a, f64x8 b, f64x8 c) { return {_mm512_fmadd_pd(a.v, b.v, c.v)}; }
inline f64x8 fnma(f64x8 a, f64x8 b, f64x8 c) { return {_mm512_fnmadd_pd(a.v, b.v, c.v)}; }
inline f64x8 fms(f64x8 a, f64x8 b, f64x8 c) { return {_mm512_fmsub_pd(a.v, b.v, c.v)}; }
inline f64x8 max(f64x8 a, f64x8 b) { return {_mm512_max_pd(a.v, b.v)}; }
inline f64x8 min(f64x8 a, f64x8 b) { return {_mm512_min_pd(a.v, b.v)}; }
inline f64x8::Mask gt(f64x8 a, f64x8 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)}; }
inline f64x8::Mask eq(f64x8 a, f64x8 b) { return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)}; }
inline f64x8::Mask load_mask(const uint8_t* p, f64x8) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return {static_cast<__mmask8>(_mm_test_epi8_mask(bytes, bytes))};
}
inline bool any(f64x8::Mask m) { return m.v != 0; }
inline bool all(f64x8::Mask m) { return m.v == 0xff; }
inline f64x8 select(f64x8::Mask m, f64x8 a, f64x8 b) {
  return {_mm512_mask_blend_pd(m.v, b.v, a.v)};
}
inline f64x8 keep(f64x8::Mask m, f64x8 a) { return {_mm512_maskz_mov_pd(m.v, a.v)}; }
inline f64x8::Int bits(f64x8 a) { return {_mm512_castpd_si512(a.v)}; }
inline f64x8 from_bits(f64x8::Int a) { return {_mm512_castsi512_pd(a.v)}; }
inline f64x8::Int operator+(f64x8::Int a, f64x8::Int b) { return {_mm512_add_epi64(a.v, b.v)}; }
inline f64x8::Int operator-(f64x8::Int a, f64x8::Int b) { return {_mm512_sub_epi64(a.v, b.v)}; }
inline f64x8::Int operator&(f64x8::Int a, f64x8::Int b) { return {_mm512_and_si512(a.v, b.v)}; }
inline f64x8::Int operator^(f64x8::Int a, f64x8::Int b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline void see_differences(f64x8::Seen& seen, f64x8::Int a, f64x8::Int b) {
  seen.v = _mm512_ternarylogic_epi64(seen.v, a.v, b.v, 0xf6);  // seen | (a ^ b)
}
template <int K>
inline bool any_from_bit(f64x8::Seen seen) {
  return _mm512_test_epi64_mask(seen.v, _mm512_set1_epi64(static_cast<long long>(~0ull << K))) != 0;
}
template <int K>
inline f64x8::Int shl(f64x8::Int a) {
  return {_mm512_slli_epi64(a.v, K)};
}
template <int K>
inline f64x8::Int shr(f64x8::Int a) {
  return {_mm512_srli_epi64(a.v, K)};
}
inline double first(f64x8 a) { return _mm512_cvtsd_f64(a.v); }

// Folds halves until one lane is left: 8-4-2-1.
inline double sum_lanes(f64x8 a) {
  const __m256d four = _mm256_add_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
}
inline double max_lane(f64x8 a) {
  const __m256d four = _mm256_max_pd(_mm512_castpd512_pd256(a.v), _mm512_extractf64x4_pd(a.v, 1));
  const __m128d two = _mm_max_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
  return _mm_cvtsd_f64(_mm_max_sd(two, _mm_unpackhi_pd(two, two)));
}
inline f64x8 widen_low(f32x16 a) { return {_mm512_cvtps_pd(_mm512_castps512_ps256(a.v))}; }
inline f64x8 widen_high(f32x16 a) { return {_mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1))}; }
inline f32x16 narrow(f64x8 low, f64x8 high) {
  return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm512_cvtpd_ps(low.v)),
                             _mm512_cvtpd_ps(high.v), 1)};
}
inline double sum_lanes(f32x16 a) { return sum_lanes(widen_low(a) + widen_high(a)); }
inline float max_lane(f32x16 a) {
  const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// Eight entries, twice, so that the low three bits of a lane pick one.
struct Table8 {
  __m512i v;
};
inline Table8 load_table8(const uint32_t* p) {
  return {_mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline f32x16::Int lookup(Table8 t, f32x16::Int index) {
  return {_mm512_permutexvar_epi32(index.v, t.v)};
}

template <class S>
struct vector_of {
  using type = f32x16;
};
template <>
struct vector_of<double> {
  using type = f64x8;
};

inline __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1u << n) - 1u); }

inline f32x16 widen(__m256i h, const f16*) { return {_mm512_cvtph_ps(h)}; }
inline f32x16 widen(__m256i h, const bf16*) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
SOFTMAXLIB_INLINE __m256i narrow(f32x16 a, f16*) {
  return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
SOFTMAXLIB_INLINE __m256i narrow(f32x16 a, bf16*) {
  const __m512i i = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(i, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(i, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  const __m512i kept = _mm512_mask_or_epi32(rounded, nan, i, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16));
}

inline f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline f64x8 load(const double* p) { return {_mm512_loadu_pd(p)}; }
template <class S>
inline f32x16 load(const S* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), p);
}
inline f32x16 load_n(const float* p, int n, float fill) {
  return {_mm512_mask_loadu_ps(_mm512_set1_ps(fill), first_lanes(n), p)};
}
inline f64x8 load_n(const double* p, int n, double fill) {
  return {_mm512_mask_loadu_pd(_mm512_set1_pd(fill), static_cast<__mmask8>(first_lanes(n)), p)};
}
template <class S>
inline f32x16 load_n(const S* p, int n, float fill) {
  const f32x16 v = widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), p);
  return {_mm512_mask_blend_ps(first_lanes(n), _mm512_set1_ps(fill), v.v)};
}

inline void store(float* p, f32x16 v) { _mm512_storeu_ps(p, v.v); }
inline void store(double* p, f64x8 v) { _mm512_storeu_pd(p, v.v); }
template <class S>
SOFTMAXLIB_INLINE void store(S* p, f32x16 v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
inline void store_n(float* p, f32x16 v, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), v.v); }
inline void store_n(double* p, f64x8 v, int n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), v.v);
}
template <class S>
inline void store_n(S* p, f32x16 v, int n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v, p));
}
inline void stream(float* p, f32x16 v) { _mm512_stream_ps(p, v.v); }
inline void stream(double* p, f64x8 v) { _mm512_stream_pd(p, v.v); }
template <class S>
SOFTMAXLIB_INLINE void stream(S* p, f32x16 v) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow(v, p));
}
inline void stream_fence() { _mm_sfence(); }
SOFTMAXLIB_INLINE void prefetch(const void* p) {
  _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0);
}

template <int kQuad>
SOFTMAXLIB_INLINE __m128 quad_of(f32x16 a) {
  return _mm512_extractf32x4_ps(a.v, kQuad);
}
// The quads of a b, added one after the other.
template <int kRows>
SOFTMAXLIB_INLINE void store_quads(float* p, f32x16 a, f32x16 b) {
  const __m128 two =
      _mm_fmadd_ps(quad_of<1>(a), quad_of<1>(b), _mm_mul_ps(quad_of<0>(a), quad_of<0>(b)));
  if (kRows == 2) _mm_storeu_ps(p, two);
  const __m128 third = kRows == 2 ? _mm_mul_ps(quad_of<2>(a), quad_of<2>(b))
                                  : _mm_fmadd_ps(quad_of<2>(a), quad_of<2>(b), two);
  _mm_storeu_ps(p + 4 * (kRows - 1), _mm_fmadd_ps(quad_of<3>(a), quad_of<3>(b), third));
}
SOFTMAXLIB_INLINE void store_quads(double* p, f64x8 a, f64x8 b, bool is_first) {
  const __m256d low = _mm512_castpd512_pd256(a.v), by = _mm512_castpd512_pd256(b.v);
  const __m256d first =
      is_first ? _mm256_mul_pd(low, by) : _mm256_fmadd_pd(low, by, _mm256_loadu_pd(p));
  _mm256_storeu_pd(
      p, _mm256_fmadd_pd(_mm512_extractf64x4_pd(a.v, 1), _mm512_extractf64x4_pd(b.v, 1), first));
}

// The quarters of four vectors as 4 x 4 matrices.
inline void transpose_quarters(__m512 (&v)[4]) {
  const __m512d a = _mm512_castps_pd(_mm512_unpacklo_ps(v[0], v[1]));
  const __m512d b = _mm512_castps_pd(_mm512_unpackhi_ps(v[0], v[1]));
  const __m512d c = _mm512_castps_pd(_mm512_unpacklo_ps(v[2], v[3]));
  const __m512d d = _mm512_castps_pd(_mm512_unpackhi_ps(v[2], v[3]));
  v[0] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
  v[1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
  v[2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
  v[3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
}

inline void load_columns(const float* p, int64_t stride, f32x16 (&column)[4]) {
  const auto row = [=](int r) { return _mm_loadu_ps(p + r * stride); };
  __m512 v[4];
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm512_castps128_ps512(row(i));
    v[i] = _mm512_insertf32x4(v[i], row(4 + i), 1);
    v[i] = _mm512_insertf32x4(v[i], row(8 + i), 2);
    v[i] = _mm512_insertf32x4(v[i], row(12 + i), 3);
  }
  transpose_quarters(v);
  for (int i = 0; i < 4; ++i) column[i].v = v[i];
}
inline void load_columns(const double* p, int64_t stride, f64x8 (&column)[4]) {
  const auto rows = [=](int low, int high) {
    return _mm512_insertf64x4(_mm512_castpd256_pd512(_mm256_loadu_pd(p + low * stride)),
                              _mm256_loadu_pd(p + high * stride), 1);
  };
  const __m512d v[4] = {rows(0, 2), rows(1, 3), rows(4, 6), rows(5, 7)};
  const __m512d a = _mm512_unpacklo_pd(v[0], v[1]), b = _mm512_unpackhi_pd(v[0], v[1]);
  const __m512d c = _mm512_unpacklo_pd(v[2], v[3]), d = _mm512_unpackhi_pd(v[2], v[3]);
  column[0].v = _mm512_shuffle_f64x2(a, c, 0x88);
  column[1].v = _mm512_shuffle_f64x2(b, d, 0x88);
  column[2].v = _mm512_shuffle_f64x2(a, c, 0xdd);
  column[3].v = _mm512_shuffle_f64x2(b, d, 0xdd);
}

inline void store_columns(float* p, int64_t stride, const f32x16 (&column)[4]) {
  __m512 v[4] = {column[0].v, column[1].v, column[2].v, column[3].v};
  transpose_quarters(v);
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(p + i * stride, _mm512_castps512_ps128(v[i]));
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(p + (4 + i) * stride, _mm512_extractf32x4_ps(v[i], 1));
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(p + (8 + i) * stride, _mm512_extractf32x4_ps(v[i], 2));
  for (int i = 0; i < 4; ++i) _mm_storeu_ps(p + (12 + i) * stride, _mm512_extractf32x4_ps(v[i], 3));
}
inline void store_columns(double* p, int64_t stride, const f64x8 (&column)[4]) {
  const __m512d even[2] = {_mm512_unpacklo_pd(column[0].v, column[1].v),
                           _mm512_unpacklo_pd(column[2].v, column[3].v)};
  const __m512d odd[2] = {_mm512_unpackhi_pd(column[0].v, column[1].v),
                          _mm512_unpackhi_pd(column[2].v, column[3].v)};
  const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
  const __m512i high = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const __m512d v[4] = {
      _mm512_permutex2var_pd(even[0], low, even[1]), _mm512_permutex2var_pd(odd[0], low, odd[1]),
      _mm512_permutex2var_pd(even[0], high, even[1]), _mm512_permutex2var_pd(odd[0], high, odd[1])};
  for (int i = 0; i < 4; i += 2) {
    double* const q = p + 2 * i * stride;
    _mm256_storeu_pd(q, _mm512_castpd512_pd256(v[i]));
    _mm256_storeu_pd(q + stride, _mm512_castpd512_pd256(v[i + 1]));
    _mm256_storeu_pd(q + 2 * stride, _mm512_extractf64x4_pd(v[i], 1));
    _mm256_storeu_pd(q + 3 * stride, _mm512_extractf64x4_pd(v[i + 1], 1));
  }
}

inline void load_columns(const float* p, int64_t stride, f32x16 (&column)[8]) {
  const auto rows = [=](int low, int high) {
    return _mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p + low * stride)),
                              _mm256_loadu_ps(p + high * stride), 1);
  };
  __m512 a[4] = {rows(0, 4), rows(1, 5), rows(2, 6), rows(3, 7)};
  __m512 b[4] = {rows(8, 12), rows(9, 13), rows(10, 14), rows(11, 15)};
  transpose_quarters(a);
  transpose_quarters(b);
  for (int i = 0; i < 4; ++i) {
    column[i].v = _mm512_shuffle_f32x4(a[i], b[i], 0x88);
    column[4 + i].v = _mm512_shuffle_f32x4(a[i], b[i], 0xdd);
  }
}
inline void store_columns(float* p, int64_t stride, const f32x16 (&column)[8]) {
  const __m512i low = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  __m512 a[4], b[4];
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_permutex2var_ps(column[i].v, low, column[4 + i].v);
    b[i] = _mm512_permutex2var_ps(column[i].v, high, column[4 + i].v);
  }
  transpose_quarters(a);
  transpose_quarters(b);
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(p + i * stride, _mm512_castps512_ps256(a[i]));
    _mm256_storeu_ps(p + (4 + i) * stride, _mm512_extractf32x8_ps(a[i], 1));
  }
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(p + (8 + i) * stride, _mm512_castps512_ps256(b[i]));
    _mm256_storeu_ps(p + (12 + i) * stride, _mm512_extractf32x8_ps(b[i], 1));
  }
}
inline void load_columns(const double* p, int64_t stride, f64x8 (&column)[8]) {
  f64x8 low[4], high[4];
  load_columns(p, stride, low);
  load_columns(p + 4, stride, high);
  for (int i = 0; i < 4; ++i) column[i] = low[i], column[4 + i] = high[i];
}
inline void store_columns(double* p, int64_t stride, const f64x8 (&column)[8]) {
  const f64x8 low[4] = {column[0], column[1], column[2], column[3]};
  const f64x8 high[4] = {column[4], column[5], column[6], column[7]};
  store_columns(p, stride, low);
  store_columns(p + 4, stride, high);
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
