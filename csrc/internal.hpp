// What the benchmark and the verifier need from the kernels beside the C interface. Not installed.
// Exported by the library of a wheel alone, under a version that no other module asks for
// (cmake/softmaxlib_python.map.in).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "softmaxlib/softmaxlib.h"

namespace softmaxlib {

// How softmaxlib_run would run, and why; nothing is read or written.
struct Explanation {
  softmaxlib_isa isa;
  softmaxlib_algorithm algorithm;
  const char* kernel;
  const char* why_kernel;
  bool streaming;
  const char* why_stores;
  bool split;
  int64_t tasks;
  const char* why_tasks;
  int64_t rows, n, scratch;  // scratch: bytes in all
};
SOFTMAXLIB_API softmaxlib_status explain(softmaxlib_function function, const softmaxlib_array* x,
                                         const softmaxlib_array* out, int32_t naxes,
                                         const int32_t* axes, const softmaxlib_options* options,
                                         Explanation* explanation);

// Every float whose bits are in [first, first + count), through the exp of the float32 kernels and,
// accurate, of the logarithmic ones, against the C library's double exp.
struct ExpSweep {
  double max_ulp;
  uint32_t worst;     // bits of the input with the largest error
  uint64_t checksum;  // of all outputs: the same on every ISA
};
SOFTMAXLIB_API bool exp_sweep(softmaxlib_isa isa, bool accurate, uint32_t first, uint64_t count,
                              ExpSweep* result);

// The machine's own speed limits, with the ISA's widest loads and stores: STREAM's copy, scale and
// triad (y = x + 3 z, where z is the second half of x and y as long), and a read alone.
enum class Roofline : int32_t { kRead, kCopy, kStreamingCopy, kScale, kTriad };
SOFTMAXLIB_API bool roofline(softmaxlib_isa isa, Roofline kind, const void* x, void* y,
                             size_t bytes);

// One pass of softmax alone over a row of n floats, as the paper times them. A known maximum spares
// kSumKnown and kStoreKnown the two-pass sum's check. scratch: pass_scratch(n) bytes, 64-byte
// aligned, zero at first.
enum class Pass : int32_t { kMax, kSum, kSumKnown, kStore, kStoreKnown, kWrite, kScale };
SOFTMAXLIB_API size_t pass_scratch(int64_t n);
SOFTMAXLIB_API bool run_pass(softmaxlib_isa isa, Pass pass, bool streaming, const float* x,
                             float* y, int64_t n, void* scratch);

}  // namespace softmaxlib
