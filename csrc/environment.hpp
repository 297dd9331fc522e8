// The floating-point environment in which results are made, whatever the caller's is.
#pragma once

#if defined(__SSE__) || defined(_M_X64)
#include <xmmintrin.h>
#else
#include <fenv.h>
#endif

namespace softmaxlib {
namespace {

// Restores the caller's floating-point environment; inside, rounding to nearest, gradual underflow,
// and no exception is trapped.
class DefaultFloatingPoint {
 public:
  DefaultFloatingPoint(const DefaultFloatingPoint&) = delete;
  DefaultFloatingPoint& operator=(const DefaultFloatingPoint&) = delete;
#if defined(__SSE__) || defined(_M_X64)
  DefaultFloatingPoint() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
  ~DefaultFloatingPoint() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#else
  DefaultFloatingPoint() {
    fegetenv(&saved_);
    fesetenv(FE_DFL_ENV);
  }
  ~DefaultFloatingPoint() { fesetenv(&saved_); }

 private:
  fenv_t saved_;
#endif
};

}  // namespace
}  // namespace softmaxlib
