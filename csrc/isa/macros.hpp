// The few compiler attributes in use, and an option that may not be.
#pragma once

#if defined(__FAST_MATH__)
#error "the arithmetic needs -fno-fast-math"
#endif

#if defined(__GNUC__)
#define SOFTMAXLIB_NOINLINE __attribute__((noinline))
#define SOFTMAXLIB_INLINE_LAMBDA __attribute__((always_inline))
#define SOFTMAXLIB_NOINLINE_LAMBDA __attribute__((noinline))
#define SOFTMAXLIB_UNLIKELY(x) __builtin_expect(!!(x), 0)
#define SOFTMAXLIB_LIKELY(x) __builtin_expect(!!(x), 1)
#define SOFTMAXLIB_PREFETCH(p) __builtin_prefetch(p, 0, 2)  // into the second level
#define SOFTMAXLIB_NO_UNROLL _Pragma("GCC unroll 1")
#else
#define SOFTMAXLIB_NO_UNROLL
#define SOFTMAXLIB_NOINLINE __declspec(noinline)
#define SOFTMAXLIB_INLINE_LAMBDA
#define SOFTMAXLIB_NOINLINE_LAMBDA
#define SOFTMAXLIB_UNLIKELY(x) (x)
#define SOFTMAXLIB_LIKELY(x) (x)
#define SOFTMAXLIB_PREFETCH(p) static_cast<void>(p)
#endif

// Element functions: in line where vectors are registers, calls where they are arrays in memory.
#if defined(SOFTMAXLIB_VECTORS_IN_MEMORY) && defined(__GNUC__)
#define SOFTMAXLIB_INLINE __attribute__((noinline, unused))
#elif defined(SOFTMAXLIB_VECTORS_IN_MEMORY)
#define SOFTMAXLIB_INLINE SOFTMAXLIB_NOINLINE
#elif defined(__GNUC__)
#define SOFTMAXLIB_INLINE inline __attribute__((always_inline))
#else
#define SOFTMAXLIB_INLINE inline
#endif
