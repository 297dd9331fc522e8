// Every operation of the leaf included before this file. No std:: here: see isa/unit.cpp.in.
#pragma once

#include <stdint.h>
#include <string.h>

#include "isa/storage.hpp"
#include "leaf_table.hpp"

namespace softmaxlib {
namespace SOFTMAX_ISA {
namespace {

using test::Kind;
using test::LeafColumns;
using test::LeafOp;
using test::LeafStorage;

template <class V>
constexpr Kind kKind = sizeof(typename V::elem) == 4 ? Kind::kF32 : Kind::kF64;

template <class V>
V get(const void* p) {
  return load(static_cast<const typename V::elem*>(p));
}
template <class V>
typename V::elem get_first(const void* p) {
  typename V::elem x;
  memcpy(&x, p, sizeof(x));
  return x;
}
template <class V>
void put(void* p, V v) {
  store(static_cast<typename V::elem*>(p), v);
}
template <class T>
void put_one(void* p, T x) {
  memcpy(p, &x, sizeof(x));
}

// The operations on a vector type; A, B, C and Y are what their arguments are called below.
#define OP(label, result, expression)                                                      \
  LeafOp {                                                                                 \
    label, kKind<V>, result, [](const void* pa, const void* pb, const void* pc, void* y) { \
      [[maybe_unused]] const V a = get<V>(pa), b = get<V>(pb), c = get<V>(pc);             \
      expression;                                                                          \
    }                                                                                      \
  }
#define SAME(label, expression) OP(label, kKind<V>, put(y, expression))
#define BITS(label, expression) OP(label, Kind::kBits, put(y, from_bits(expression)))

// Whether any of the bits of a that are left differs from those of b and c, from bit K on.
template <int K, class V>
int32_t differ_from(typename V::Int a, typename V::Int b, typename V::Int c) {
  typename V::Seen seen;
  see_differences(seen, a, b);
  see_differences(seen, a, c);
  return static_cast<int32_t>(any_from_bit<K>(seen));
}

template <class V>
struct Ops {
  using Int = typename V::Int;
  static constexpr int kTop = sizeof(typename V::elem) * 8 - 1;
  static constexpr int kMantissa = kTop == 31 ? 23 : 52;
  static constexpr LeafOp kList[] = {
      SAME("+", a + b),
      SAME("-", a - b),
      SAME("*", a* b),
      SAME("/", a / b),
      SAME("fma", fma(a, b, c)),
      SAME("fnma", fnma(a, b, c)),
      SAME("fms", fms(a, b, c)),
      SAME("max", max(a, b)),
      SAME("min", min(a, b)),
      BITS("gt and select", bits(select(gt(a, b), b, c))),
      BITS("gt and keep", bits(keep(gt(a, b), c))),
      BITS("eq and select", bits(select(eq(a, b), b, c))),
      BITS("load_mask", bits(select(load_mask(static_cast<const uint8_t*>(pa), a), b, c))),
      BITS("eq of equals", bits(select(eq(a, a), b, c))),
      OP("any gt", Kind::kBits, put_one(y, static_cast<int32_t>(any(gt(a, b))))),
      OP("any eq", Kind::kBits, put_one(y, static_cast<int32_t>(any(eq(a, b))))),
      OP("all gt", Kind::kBits, put_one(y, static_cast<int32_t>(all(gt(a, b))))),
      OP("all eq", Kind::kBits, put_one(y, static_cast<int32_t>(all(eq(a, a))))),
      OP("none", Kind::kBits, put_one(y, static_cast<int32_t>(any(gt(a, a))))),
      BITS("bits and from_bits", bits(a)),
      BITS("Int +", bits(a) + bits(b)),
      BITS("Int -", bits(a) - bits(b)),
      BITS("Int &", bits(a) & bits(b)),
      BITS("Int ^", bits(a) ^ bits(b)),
      BITS("shl 1", shl<1>(bits(a))),
      BITS("shl mantissa", shl<kMantissa>(bits(a))),
      BITS("shl top", shl<kTop>(bits(a))),
      BITS("shr 1", shr<1>(bits(a))),
      BITS("shr mantissa", shr<kMantissa>(bits(a))),
      BITS("shr top", shr<kTop>(bits(a))),
      OP("differ", Kind::kBits, put_one(y, (differ_from<0, V>(bits(a), bits(b), bits(c))))),
      OP("differ in none", Kind::kBits, put_one(y, (differ_from<0, V>(bits(a), bits(a), bits(a))))),
      OP("differ in sign", Kind::kBits,
         put_one(y, (differ_from<kTop, V>(bits(a), bits(b), bits(c))))),
      OP("differ below", Kind::kBits,
         put_one(y, (differ_from<kTop, V>(shr<1>(bits(a)), shr<1>(bits(b)), shr<1>(bits(c)))))),
      OP("differ above", Kind::kBits,
         put_one(y, (differ_from<8, V>(shr<kMantissa>(bits(a)), shr<kMantissa>(bits(b)),
                                       shr<kMantissa>(bits(c)))))),
      SAME("set1", V::set1(get_first<V>(pa))),
      OP("first", kKind<V>, put_one(y, first(a))),
      OP("max_lane", kKind<V>, put_one(y, max_lane(a))),
      OP("sum_lanes", Kind::kF64, put_one(y, sum_lanes(a))),
  };
};

struct Mixed {
  using V = f32x16;
  static constexpr LeafOp kList[] = {
      OP("widen_low", Kind::kF64, put(y, widen_low(a))),
      OP("widen_high", Kind::kF64, put(y, widen_high(a))),
      OP("store_quads<1>", Kind::kF32, (put(y, c), store_quads<1>(static_cast<float*>(y), a, b))),
      OP("store_quads<2>", Kind::kF32, (put(y, c), store_quads<2>(static_cast<float*>(y), a, b))),
      BITS("lookup", lookup(load_table8(static_cast<const uint32_t*>(pb)), bits(a))),
      BITS("Int::set1", V::Int::set1(0x80000001u) ^ bits(a)),
  };
};

struct Mixed64 {
  using V = f64x8;
  static constexpr LeafOp kList[] = {
      OP("narrow", Kind::kF32, put(y, narrow(a, b))),
      OP("store_quads, first", Kind::kF64,
         (put(y, c), store_quads(static_cast<double*>(y), a, b, true))),
      OP("store_quads, more", Kind::kF64,
         (put(y, c), store_quads(static_cast<double*>(y), a, b, false))),
      BITS("Int::set1", V::Int::set1(0x8000000100000001u) ^ bits(a)),
  };
};

#undef BITS
#undef SAME
#undef OP

template <class S>
constexpr LeafStorage storage(softmaxlib_dtype dtype) {
  using V = typename vector_of<S>::type;
  using T = typename V::elem;
  return {
      dtype,
      sizeof(S),
      V::lanes,
      [](const void* p, void* y) { put(y, load(static_cast<const S*>(p))); },
      [](const void* p, int n, double fill, void* y) {
        put(y, load_n(static_cast<const S*>(p), n, static_cast<T>(fill)));
      },
      [](void* p, const void* v) { store(static_cast<S*>(p), get<V>(v)); },
      [](void* p, const void* v, int n) { store_n(static_cast<S*>(p), get<V>(v), n); },
      [](void* p, const void* v) {
        stream(static_cast<S*>(p), get<V>(v));
        stream_fence();
      },
  };
}

constexpr LeafStorage kStorages[] = {storage<float>(SOFTMAXLIB_F32),
                                     storage<double>(SOFTMAXLIB_F64), storage<f16>(SOFTMAXLIB_F16),
                                     storage<bf16>(SOFTMAXLIB_BF16)};

template <class V, int N>
constexpr LeafColumns columns() {
  using T = typename V::elem;
  return {
      sizeof(T),
      V::lanes,
      N,
      [](const void* p, int64_t stride, void* y) {
        V column[N];
        load_columns(static_cast<const T*>(p), stride, column);
        for (int j = 0; j < N; ++j) put(static_cast<T*>(y) + j * V::lanes, column[j]);
      },
      [](void* p, int64_t stride, const void* v) {
        V column[N];
        for (int j = 0; j < N; ++j) column[j] = get<V>(static_cast<const T*>(v) + j * V::lanes);
        store_columns(static_cast<T*>(p), stride, column);
      },
  };
}

constexpr LeafColumns kColumns[] = {columns<f32x16, 4>(), columns<f32x16, 8>(), columns<f64x8, 4>(),
                                    columns<f64x8, 8>()};

template <int N>
int append(LeafOp* to, int count, const LeafOp (&from)[N]) {
  for (const LeafOp& op : from) to[count++] = op;
  return count;
}

test::LeafTable leaf_table() {
  static LeafOp all[128];
  int count = append(all, 0, Ops<f32x16>::kList);
  count = append(all, count, Ops<f64x8>::kList);
  count = append(all, count, Mixed::kList);
  count = append(all, count, Mixed64::kList);
  return {all, count, kStorages, kColumns};
}

}  // namespace
}  // namespace SOFTMAX_ISA
}  // namespace softmaxlib
