// What the fuzz targets share: bytes to choices, arrays of any layout in watched memory, and the
// text of a call that failed.
#pragma once

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "host/layout.hpp"
#include "indices.hpp"
#include "softmaxlib/softmaxlib.h"

namespace softmaxlib::fuzz {

using test::for_indices;
using test::Shape;
using test::size_of;

// ---- The input as choices, one after the other. Past its end every choice is 0: the plainest.

class Input {
 public:
  Input(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint64_t bytes(int count) {
    uint64_t value = 0;
    for (; count > 0 && left_ > 0; --count, --left_) value = value << 8 | *data_++;
    return value;
  }
  // 0, 1, ... n - 1
  int64_t below(int64_t n) {
    return static_cast<int64_t>(bytes(n <= 256 ? 1 : 4) % static_cast<uint64_t>(n));
  }
  bool one_in(int64_t n) { return below(n) == n - 1; }
  template <class T, size_t N>
  T pick(const T (&from)[N]) {
    return from[below(N)];
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// ---- Failures: the call as text, then an abort, for which libFuzzer keeps the input.

// The text of the call at hand; fuzz.cpp prints it where a sanitizer ends the process, too.
inline std::function<std::string()> describe;

inline void print_call() {
  if (describe) fputs(std::exchange(describe, nullptr)().c_str(), stderr);
}
[[noreturn]] inline void fail(const std::string& what) {
  print_call();
  fprintf(stderr, "FAILED: %s\n", what.c_str());
  abort();
}
inline void require(bool condition, const char* what) {
  if (!condition) fail(what);
}

inline bool known(softmaxlib_status status) {
  return status == SOFTMAXLIB_OK ||
         strcmp(softmaxlib_status_text(status), softmaxlib_status_text(-1)) != 0;
}

// ---- Arrays.

enum class Elements {
  kMayOverlap,  // any strides
  kOwnMemory,   // as an output needs them
};

class Array {
 public:
  Array(Input& in, softmaxlib_dtype dtype, Shape shape, Elements elements)
      : dtype_(dtype), shape_(std::move(shape)), strides_(shape_.size()) {
    const int64_t item = item_size(dtype);
    const bool plain = !in.one_in(2),
               shared = elements == Elements::kMayOverlap && !plain && in.one_in(3);
    explicit_ = !plain || in.one_in(2);
    std::vector<size_t> order(shape_.size());
    for (size_t d = 0; d < order.size(); ++d) order[d] = order.size() - 1 - d;
    if (!plain)
      for (size_t d = order.size(); d > 1; --d)
        std::swap(order[d - 1], order[static_cast<size_t>(in.below(static_cast<int64_t>(d)))]);
    int64_t step = item, low = 0, high = size_of(shape_) ? item : 0;
    for (const size_t d : order) {
      if (shared) {
        strides_[d] = item * (in.below(4) - 1) + in.one_in(8);
      } else {
        if (!plain && in.one_in(4)) step += in.below(4) * item + in.one_in(4);
        strides_[d] = !plain && in.one_in(3) ? -step : step;
        step *= std::max<int64_t>(shape_[d], 1);
      }
      const int64_t reach = (std::max<int64_t>(shape_[d], 1) - 1) * strides_[d];
      if (high) (reach < 0 ? low : high) += reach;
    }
    // Not a byte more than the elements need, but for a start at any address.
    lead_ = plain ? 0 : static_cast<size_t>(in.below(16));
    bytes_ = lead_ + static_cast<size_t>(high - low);
    memory_.reset(static_cast<char*>(malloc(std::max<size_t>(bytes_, 1))));
    memset(memory_.get(), kUntouched, bytes_);
    data_ = memory_.get() + lead_ - low;
  }
  // The same layout again, with its own memory.
  Array(const Array& other)
      : dtype_(other.dtype_),
        shape_(other.shape_),
        strides_(other.strides_),
        explicit_(other.explicit_),
        lead_(other.lead_),
        bytes_(other.bytes_),
        memory_(static_cast<char*>(malloc(std::max<size_t>(bytes_, 1)))),
        data_(memory_.get() + (other.data_ - other.memory_.get())) {
    memcpy(memory_.get(), other.memory_.get(), bytes_);
  }
  Array& operator=(const Array&) = delete;

  const softmaxlib_array* view() const {
    view_ = {data_, dtype_, static_cast<int32_t>(shape_.size()), shape_.data(),
             explicit_ ? strides_.data() : nullptr};
    return &view_;
  }
  softmaxlib_dtype dtype() const { return dtype_; }
  const Shape& shape() const { return shape_; }
  const Shape& all_strides() const { return strides_; }
  bool own_elements() const {                       // as an output needs them
    std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
    for (size_t d = 0; d < shape_.size(); ++d)
      if (shape_[d] > 1) dims.emplace_back(std::abs(strides_[d]), shape_[d]);
    std::sort(dims.begin(), dims.end());
    int64_t reach = item_size(dtype_);
    for (const auto& [stride, size] : dims) {
      if (stride < reach) return false;
      reach += (size - 1) * stride;
    }
    return true;
  }

  // The element that broadcasting shows at an index of an array of this or of a larger shape.
  char* at(const Shape& index) const {
    char* p = data_;
    const size_t missing = index.size() - shape_.size();
    for (size_t d = 0; d < shape_.size(); ++d)
      if (shape_[d] != 1) p += index[missing + d] * strides_[d];
    return p;
  }

  bool same_memory(const Array& other) const {
    return memcmp(memory_.get(), other.memory_.get(), bytes_) == 0;
  }
  // Sets all that belongs to elements, so that what is left are the bytes between them.
  void erase_elements() {
    for_indices(shape_, [&](const Shape& i) {
      memset(at(i), kUntouched, static_cast<size_t>(item_size(dtype_)));
    });
  }

  std::string text(const char* name) const {
    static constexpr const char* kNames[] = {"f32", "f64", "f16", "bf16", "bool", "i8", "i16",
                                             "i32", "i64", "u8",  "u16",  "u32",  "u64"};
    const auto list = [](const Shape& values) {
      std::string text;
      for (const int64_t v : values) text += (text.empty() ? "" : ", ") + std::to_string(v);
      return "(" + text + ")";
    };
    std::string line = std::string(name) + ": " + kNames[dtype_] + " shape " + list(shape_);
    line += explicit_ ? " strides " + list(strides_) : " C-contiguous";
    line += ", data at malloc + " + std::to_string(data_ - memory_.get()) + " of " +
            std::to_string(bytes_) + " bytes:";
    static constexpr size_t kShown = 512;
    char hex[4];
    for (size_t i = lead_; i < std::min(bytes_, kShown); ++i) {
      snprintf(hex, sizeof(hex), "%s%02x", (i - lead_) % 4 ? "" : " ",
               static_cast<unsigned char>(memory_.get()[i]));
      line += hex;
    }
    return line + (bytes_ > kShown ? "...\n" : "\n");
  }

 private:
  static constexpr char kUntouched = 0x5a;
  struct Free {
    void operator()(char* p) const { free(p); }
  };
  softmaxlib_dtype dtype_;
  Shape shape_, strides_;
  bool explicit_;  // strides are passed
  size_t lead_, bytes_;
  std::unique_ptr<char, Free> memory_;
  char* data_;
  mutable softmaxlib_array view_;
};

// ---- Values.

enum class Values {
  kOrdinary,
  kWide,      // beyond every float32 exponential
  kFar,       // around 32,768, where rows are computed less their maximum
  kAnything,  // every magnitude
  kTiny,      // subnormal, or nearly
  kSpecial,   // now and then NaN, infinite, zero
  kMasked,    // many of them -inf
  kEqual,
  kCount
};

// An element as bits. Floats by their fields, so for all formats alike; integers of any width.
inline uint64_t draw(Values kind, softmaxlib_dtype dtype, std::mt19937_64& random) {
  const uint64_t bits = random();
  if (dtype == SOFTMAXLIB_BOOL) return bits & 1;
  if (dtype > SOFTMAXLIB_BOOL)
    return static_cast<uint64_t>(static_cast<int64_t>(bits) >>
                                 (kind == Values::kAnything ? 0 : 59)) &
           (dtype >= SOFTMAXLIB_U8 && kind != Values::kAnything ? 15 : ~uint64_t{0});
  static constexpr int kExponent[] = {8, 11, 5, 8}, kMantissa[] = {23, 52, 10, 7};
  const int mantissa_bits = kMantissa[dtype];
  const uint64_t infinity = (uint64_t{1} << kExponent[dtype]) - 1, bias = infinity / 2;
  const uint64_t sign = bits >> 63, choice = bits >> 32 & 0xff;
  uint64_t mantissa = bits & ((uint64_t{1} << mantissa_bits) - 1), field = bias - 6 + choice % 10;
  bool negative = sign;
  switch (kind) {
    case Values::kWide: field = bias + choice % 10; break;
    case Values::kFar: field = bias + 13 + choice % 4; break;
    case Values::kAnything: field = choice * infinity / 256; break;
    case Values::kTiny: field = choice % 3; break;
    case Values::kSpecial:
      if (choice < 12) {
        field = choice < 4 ? 0 : infinity;
        if (choice % 4) mantissa = 0;
      }
      break;
    case Values::kMasked:
      if (choice < 100) field = infinity, mantissa = 0, negative = true;
      break;
    case Values::kEqual: field = bias + 2, mantissa = 0, negative = false; break;
    default: break;
  }
  if (kind != Values::kSpecial && kind != Values::kMasked) field = std::min(field, infinity - 1);
  return (uint64_t{negative} << kExponent[dtype] | field) << mantissa_bits | mantissa;
}

// Elements drawn by one seed; `positive`: as temperatures, finite and above 0.
inline void fill(Input& in, Array& array, bool positive = false) {
  const Values kind = static_cast<Values>(in.below(static_cast<int64_t>(Values::kCount)));
  std::mt19937_64 random(in.bytes(2));
  const softmaxlib_dtype dtype = array.dtype();
  const auto size = static_cast<size_t>(item_size(dtype));
  const uint64_t sign = uint64_t{1} << (8 * size - 1);
  for_indices(array.shape(), [&](const Shape& i) {
    uint64_t bits =
        draw(positive && kind >= Values::kSpecial ? Values::kOrdinary : kind, dtype, random);
    if (positive) bits = std::max<uint64_t>(bits & ~sign, 1);
    memcpy(array.at(i), &bits, size);  // x86 and aarch64: little-endian
  });
}

}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);
