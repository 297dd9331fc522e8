// What the benchmark and the verifier need from the kernels beside the C interface. Not installed.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "softmaxlib/softmaxlib.h"

namespace softmaxlib {

// Every float whose bits are in [first, first + count), through the exp of the float32 kernels and,
// accurate, of the logarithmic ones, against the C library's double exp.
struct ExpSweep {
  double max_ulp;
  uint32_t worst;     // bits of the input with the largest error
  uint64_t checksum;  // of all outputs: the same on every ISA
};
bool exp_sweep(softmaxlib_isa isa, bool accurate, uint32_t first, uint64_t count, ExpSweep* result);

// The machine's own speed limits, with the ISA's widest loads and stores.
enum class Roofline : int32_t { kRead, kCopy, kStreamingCopy };
bool roofline(softmaxlib_isa isa, Roofline kind, const void* x, void* y, size_t bytes);

}  // namespace softmaxlib
