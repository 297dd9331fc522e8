// Element types that exist in memory only; arithmetic on them is float.
#pragma once

#include <stdint.h>

namespace softmaxlib {

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

}  // namespace softmaxlib
