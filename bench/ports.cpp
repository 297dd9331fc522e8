// The hot loops of the kernels, each in a function of its own, for bench/ports.py: it compiles this
// file to assembly and asks llvm-mca what other CPUs would make of it. Nothing here is ever run.
#define SOFTMAX_ISA SOFTMAXLIB_PORTS_ISA
#include SOFTMAXLIB_PORTS_LEAF

#include "isa/kernels/gradient.hpp"
#include "isa/kernels/log_softmax.hpp"
#include "isa/kernels/stablemax.hpp"
#include "registry/table.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

template <class T, class F, bool kHold, bool kStore, bool kSpared>
double sum_of_row(const T* x, T* y, int64_t n, int reference, int32_t* references) {
  BlockState<typename F::V> state;
  state.total.reference = reference;
  PieceSum<F, kHold, kStore, Contiguous<T>> sum({x}, y, state);
  sum.template run<kSpared>(n, references, NothingBeside());
  return state.total.value();
}

template <class T>
using VectorOf = typename vector_of<T>::type;

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib

using namespace softmaxlib;
using namespace softmaxlib::SOFTMAX_ISA;

// In line, whatever else calls what is called here.
#define FLAT __attribute__((flatten))

extern "C" {

// A sum of exponentials whose reference is known to do, and one whose arguments are in the window.
FLAT double known_sum(const float* x, int64_t n, int reference) {
  return sum_of_row<float, Exp<f32x16>, false, false, true>(x, nullptr, n, reference, nullptr);
}
FLAT double sum(const float* x, int64_t n, int reference) {
  return sum_of_row<float, Exp<f32x16>, false, false, false>(x, nullptr, n, reference, nullptr);
}
// The same where exponentials stay in y.
FLAT double store_sum(const float* x, float* y, int64_t n, int reference, int32_t* references) {
  return sum_of_row<float, Exp<f32x16>, false, true, false>(x, y, n, reference, references);
}
FLAT double log_sum(const float* x, int64_t n, int reference) {
  using F = Exp<f32x16, Use::kLogarithms>;
  return sum_of_row<float, F, true, false, false>(x, nullptr, n, reference, nullptr);
}
FLAT double stable_sum(const float* x, int64_t n) {
  return sum_of_row<float, Stable<f32x16>, false, false, true>(x, nullptr, n, 0, nullptr);
}
FLAT double sum_f64(const double* x, int64_t n, int reference) {
  return sum_of_row<double, Exp<f64x8>, false, false, false>(x, nullptr, n, reference, nullptr);
}

// Results: computed again, or from what waits in y.
FLAT void write(const float* x, float* y, int64_t n, int reference, float scale) {
  map_elements(Contiguous<float>{x}, y, n, false,
               Scaled<Exp<f32x16>>{Exp<f32x16>(reference), scale});
}
FLAT void scale(float* y, int64_t n, float by) {
  map_elements(Contiguous<float>{y}, y, n, false, [by](f32x16 v) { return v * f32x16::set1(by); });
}
FLAT void log_write(const float* x, float* y, int64_t n, const LogSum* sum) {
  const LogSoftmaxOf<f32x16> log_softmax(*sum);
  map_elements(Contiguous<float>{x}, y, n, false,
               [log_softmax](f32x16 v) { return log_softmax(v); });
}
FLAT void write_f64(const double* x, double* y, int64_t n, int reference, double scale) {
  map_elements(Contiguous<double>{x}, y, n, false,
               Scaled<Exp<f64x8>>{Exp<f64x8>(reference), scale});
}

// Gradients: a row's sum, and its results in float.
FLAT double gradient_sum(const float* g, const float* y, int64_t n) {
  const GradientPiece<false, f32x16, true> row = {g, y, nullptr};
  return sum_lanes(row.quick_sum(n).sum);
}
FLAT void gradient_write(const float* g, const float* y, float* out, int64_t n, float hi, float lo,
                         float part) {
  const GradientPiece<false, f32x16, true> row = {g, y, nullptr};
  const ElementGradient<false, f32x16>::Plain element(f32x16::set1(hi), f32x16::set1(lo),
                                                      f32x16::set1(part), f32x16::set1(1));
  for (int64_t i = 0; i < n; i += 16) store(out + i, row.results(i, 16, element));
}

}  // extern "C"
