// What verify and bench ask of a leaf: its exp over every float, and the machine's speed limits.
#pragma once

#include <math.h>

#include "internal.hpp"
#include "isa/math/exp.hpp"
#include "isa/sum/terms.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

// Distance from the exact value in units of its last place as a float; 0 for equal specials.
inline double ulp_distance(double actual, double exact) {
  if (actual != actual || exact != exact)
    return (actual != actual) == (exact != exact) ? 0 : INFINITY;
  if (actual == exact) return 0;
  int exponent;
  frexp(exact, &exponent);
  exponent = exponent - 24 < -149 ? -149 : exponent - 24;
  return ldexp(fabs(actual - exact), -exponent);
}

inline void store_wide(f32x16 term, double* y) {
  store(y, widen_low(term));
  store(y + 8, widen_high(term));
}
inline void store_wide(Pair<f32x16> term, double* y) {
  store(y, widen_low(term.hi) + widen_low(term.lo));
  store(y + 8, widen_high(term.hi) + widen_high(term.lo));
}

// Vectors of consecutive floats, each under the reference that its first lane would give it.
template <bool kAccurate>
inline ExpSweep sweep_exp(uint32_t start, uint64_t count) {
  using E = Exp<f32x16, kAccurate ? Use::kExact : Use::kResults>;
  ExpSweep result = {0, start, 0};
  for (uint64_t done = 0; done < count; done += 16) {
    const uint32_t from = start + static_cast<uint32_t>(done);
    const int n = count - done < 16 ? static_cast<int>(count - done) : 16;
    uint32_t x_bits[16];
    float x[16];
    double y[16];
    for (int i = 0; i < 16; ++i) x_bits[i] = from + static_cast<uint32_t>(i < n ? i : 0);
    memcpy(x, x_bits, sizeof(x));
    const int reference = reference_of<f32x16>(x[0]);
    store_wide(E(reference)(load(x)), y);
    for (int i = 0; i < n; ++i) {
      uint64_t y_bits = 0;
      if (y[i] == y[i]) memcpy(&y_bits, y + i, sizeof(y_bits));
      result.checksum = (result.checksum ^ y_bits) * 0x100000001b3u + x_bits[i];
      const double wide = static_cast<double>(x[i]);
      if (wide > kSafe || wide < -kSafe) continue;  // such a row is computed less its maximum
      // e^x 2^(bias - reference), in the kernel's own terms: below its floor it is 0.
      const double t = (wide - reference * kLn2Hi) - reference * kLn2Lo;
      const double exact = t < -(E::kBias + 126) * kLn2Hi ? 0 : ldexp(exp(t), E::kBias);
      if (exact == 0 && y[i] < 0x1p-125) continue;
      const double distance = ulp_distance(y[i], exact);
      if (distance > result.max_ulp) result.max_ulp = distance, result.worst = x_bits[i];
    }
  }
  return result;
}

inline ExpSweep run_exp_sweep(bool accurate, uint32_t start, uint64_t count) {
  const DefaultFloatingPoint environment;
  return accurate ? sweep_exp<true>(start, count) : sweep_exp<false>(start, count);
}

inline void run_roofline(Roofline kind, const void* x, void* y, size_t bytes) {
  const float* from = static_cast<const float*>(x);
  const int64_t n = static_cast<int64_t>(bytes / sizeof(float));
  if (kind == Roofline::kRead) {
    f32x16 s[4];
    for (auto& v : s) v = f32x16::set1(0);
    for (int64_t i = 0; i + 64 <= n; i += 64)
      for (int j = 0; j < 4; ++j) s[j] = from_bits(bits(s[j]) ^ bits(load(from + i + 16 * j)));
    volatile float sink = first(from_bits(bits(s[0]) ^ bits(s[1]) ^ bits(s[2]) ^ bits(s[3])));
    (void)sink;
    return;
  }
  const Contiguous<float> source = {from};
  float* const to = static_cast<float*>(y);
  if (kind == Roofline::kScale) {
    map_elements(source, to, n, false, [](f32x16 v) { return v * f32x16::set1(3); });
  } else if (kind == Roofline::kTriad) {
    const int64_t half = n / 32 * 16;
    for (int64_t i = 0; i < half; i += 16)
      store(to + i, fma(load(from + half + i), f32x16::set1(3), load(from + i)));
  } else {
    map_elements(source, to, n, kind == Roofline::kStreamingCopy, [](f32x16 v) { return v; });
  }
  stream_fence();
}

inline void run_pass_alone(Pass pass, bool streaming, const float* x, float* y, int64_t n,
                           char* scratch) {
  const DefaultFloatingPoint environment;
  using E = Exp<f32x16>;
  Job job = {};
  job.base[kX] = reinterpret_cast<char*>(const_cast<float*>(x));
  job.base[kOut] = reinterpret_cast<char*>(y);
  job.n = n;
  job.rows = 1;
  job.elements_of_x = job.direct = true;
  job.streaming = streaming;
  const Place place = {};
  int32_t one_block[kVectorsPerBlock / kVectorsPerChunk] = {};
  const Row<float> row(job, place, scratch, one_block);
  RowSum<E> total;
  total.sum = 1;
  total.reference = 0;
  volatile double sink = 0;  // or the compiler drops a pass that only reads
  switch (pass) {
    case Pass::kMax: sink = max_of_row(row); break;
    case Pass::kSum: sink = sum_of<E>(row).sum; break;
    case Pass::kSumKnown: sink = sum_of<E>(row, Known{0}).sum; break;
    case Pass::kStore: sink = store_of<E>(row).sum; break;
    case Pass::kStoreKnown: sink = store_of<E>(row, Known{0}).sum; break;
    case Pass::kWrite: write_of(row, total); break;
    case Pass::kScale: scale_stored(row, total); break;
  }
  (void)sink;
  stream_fence();
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
