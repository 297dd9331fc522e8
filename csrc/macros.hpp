// The few compiler attributes in use.
#pragma once

#if defined(__GNUC__)
#define SOFTMAXLIB_NOINLINE __attribute__((noinline))
#define SOFTMAXLIB_INLINE_LAMBDA __attribute__((always_inline))
#define SOFTMAXLIB_UNLIKELY(x) __builtin_expect(!!(x), 0)
#else
#define SOFTMAXLIB_NOINLINE __declspec(noinline)
#define SOFTMAXLIB_INLINE_LAMBDA
#define SOFTMAXLIB_UNLIKELY(x) (x)
#endif
