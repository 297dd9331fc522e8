// Every operation of every leaf against the scalar leaf, and the scalar leaf against the C library.
#include "leaf_table.hpp"
#include "support.hpp"

namespace softmaxlib::test {

#define SOFTMAXLIB_ISA_ENTRY(name, isa, features) LeafTable leaf_table_##name();
#include "isas.def"
#undef SOFTMAXLIB_ISA_ENTRY

namespace {

struct Leaf {
  const char* name;
  LeafTable table;
};

// Only leaves that this CPU can run: making a table runs code of its unit.
std::vector<Leaf> leaves() {
  std::vector<Leaf> found;
  const auto available = isas();
#define SOFTMAXLIB_ISA_ENTRY(name, isa, features)                            \
  if (std::find(available.begin(), available.end(), isa) != available.end()) \
    found.push_back({ #name, leaf_table_##name() });
#include "isas.def"
#undef SOFTMAXLIB_ISA_ENTRY
  return found;
}
LeafTable scalar() { return leaf_table_scalar(); }

struct alignas(64) Vector {
  unsigned char bytes[kVectorBytes] = {};
};

constexpr float kSpecial32[] = {0.0f,
                                -0.0f,
                                1.0f,
                                -1.0f,
                                0.5f,
                                1.5f,
                                3.0f,
                                0x1p-149f,
                                -0x1p-149f,
                                0x1.fffffcp-127f,
                                0x1p-126f,
                                -0x1p-126f,
                                0x1.fffffep127f,
                                -0x1.fffffep127f,
                                0x1p24f,
                                0x1.000002p0f,
                                0x1.fffffep-1f,
                                INFINITY,
                                -INFINITY,
                                NAN,
                                -NAN,
                                88.7f,
                                -103.9f,
                                0x1p-75f,
                                65504.0f};

// Special values, random bits, and numbers near each other, in turn.
template <class T, class Bits>
Vector draw(std::mt19937_64& random) {
  Vector v;
  for (size_t i = 0; i < kVectorBytes / sizeof(T); ++i) {
    const Bits raw = static_cast<Bits>(random());
    T x = bits_to<T>(raw);
    const uint64_t choice = random();
    if (choice % 4 == 0) x = static_cast<T>(kSpecial32[choice / 4 % std::size(kSpecial32)]);
    if (choice % 4 == 1) x = static_cast<T>(static_cast<int64_t>(random()) >> (choice / 4 % 60));
    memcpy(v.bytes + i * sizeof(T), &x, sizeof(T));
  }
  return v;
}
Vector draw(Kind kind, std::mt19937_64& random) {
  return kind == Kind::kF64 ? draw<double, uint64_t>(random) : draw<float, uint32_t>(random);
}

template <class T>
bool equal_numbers(const Vector& a, const Vector& b) {
  for (size_t i = 0; i < kVectorBytes; i += sizeof(T)) {
    T x, y;
    memcpy(&x, a.bytes + i, sizeof(T));
    memcpy(&y, b.bytes + i, sizeof(T));
    if (memcmp(&x, &y, sizeof(T)) && (x == x || y == y)) return false;
  }
  return true;
}
bool equal(Kind kind, const Vector& a, const Vector& b) {
  if (kind == Kind::kF32) return equal_numbers<float>(a, b);
  if (kind == Kind::kF64) return equal_numbers<double>(a, b);
  return !memcmp(a.bytes, b.bytes, kVectorBytes);
}

TEST(Leaf, OperationsMatchScalar) {
  const LeafTable expected = scalar();
  ASSERT_GT(expected.count, 60);
  for (const Leaf& leaf : leaves()) {
    ASSERT_EQ(leaf.table.count, expected.count);
    for (int o = 0; o < expected.count; ++o) {
      const LeafOp& op = leaf.table.ops[o];
      std::mt19937_64 random(static_cast<uint64_t>(o));
      for (int round = 0; round < 20000; ++round) {
        const Vector a = draw(op.argument, random);
        // Equal and nearly equal arguments matter to comparisons and differences.
        const Vector b = round % 8 ? draw(op.argument, random) : a;
        const Vector c = draw(op.argument, random);
        Vector actual, wanted;
        op.apply(a.bytes, b.bytes, c.bytes, actual.bytes);
        expected.ops[o].apply(a.bytes, b.bytes, c.bytes, wanted.bytes);
        ASSERT_TRUE(equal(op.result, actual, wanted))
            << leaf.name << " " << op.name << " round " << round;
      }
    }
  }
}

const LeafOp& find(const LeafTable& table, const char* name, Kind kind) {
  for (int i = 0; i < table.count; ++i)
    if (!strcmp(table.ops[i].name, name) && table.ops[i].argument == kind) return table.ops[i];
  abort();
}

// The scalar leaf means what C means.
TEST(Leaf, ScalarMatchesC) {
  std::mt19937_64 random(3);
  const LeafTable t = scalar();
  using Plain = float (*)(float, float, float);
  const struct {
    const char* name;
    Plain f;
  } plain[] = {{"+", [](float a, float b, float) { return a + b; }},
               {"-", [](float a, float b, float) { return a - b; }},
               {"*", [](float a, float b, float) { return a * b; }},
               {"/", [](float a, float b, float) { return a / b; }},
               {"max", [](float a, float b, float) { return a > b ? a : b; }},
               {"min", [](float a, float b, float) { return a < b ? a : b; }},
               {"gt and select", [](float a, float b, float c) { return a > b ? b : c; }},
               {"eq and select", [](float a, float b, float c) { return a == b ? b : c; }},
               {"gt and keep", [](float a, float b, float c) { return a > b ? c : 0; }},
               {"fms", [](float a, float b, float c) { return fmaf(a, b, -c); }},
               {"fnma", [](float a, float b, float c) { return fmaf(-a, b, c); }}};
  for (const auto& p : plain) {
    for (int round = 0; round < 5000; ++round) {
      const Vector a = draw(Kind::kF32, random), b = draw(Kind::kF32, random);
      const Vector c = draw(Kind::kF32, random);
      Vector actual, wanted;
      find(t, p.name, Kind::kF32).apply(a.bytes, b.bytes, c.bytes, actual.bytes);
      for (size_t i = 0; i < kVectorBytes; i += 4) {
        float x, y, z;
        memcpy(&x, a.bytes + i, 4), memcpy(&y, b.bytes + i, 4), memcpy(&z, c.bytes + i, 4);
        const float r = p.f(x, y, z);
        memcpy(wanted.bytes + i, &r, 4);
      }
      ASSERT_TRUE(equal(Kind::kF32, actual, wanted)) << p.name;
    }
  }
}

// Triples at which a fused multiply-add done in double goes wrong: c half way between floats less
// the product's tail, results at the edge of the subnormals, cancellation.
void adversarial(std::mt19937_64& random, float* a, float* b, float* c) {
  const auto number = [&](int low, int high) {
    const uint64_t r = random();
    const float m = bits_to<float>(0x3f800000u | static_cast<uint32_t>(r & 0x7fffffu));
    const int e = low + static_cast<int>((r >> 24) % static_cast<uint64_t>(high - low + 1));
    return static_cast<float>(std::ldexp(r >> 63 ? -m : m, e));
  };
  const auto few_bits = [&](float x) {
    return bits_to<float>(bits_to<uint32_t>(x) & ~((1u << random() % 23) - 1u));
  };
  switch (random() % 7) {
    case 0: *a = number(-10, 10), *b = number(-10, 10), *c = number(-40, 40); break;
    case 1:  // cancellation, exact or all but
      *a = number(-60, 60), *b = number(-60, 60), *c = -(*a * *b);
      if (random() % 2) *c = std::nextafterf(*c, 0.0f);
      break;
    case 2:  // subnormal results
      *a = number(-80, -60), *b = number(-80, -60), *c = number(-149, -120);
      break;
    case 3:  // products of few bits against a tiny or large addend: half-way cases
      *a = few_bits(number(-5, 5)), *b = few_bits(number(-5, 5));
      *c = few_bits(number(-60, 60));
      break;
    case 4: {  // a b exactly half a unit of c, and a bit beside it
      const int e = static_cast<int>(random() % 200) - 100;
      *c = number(e, e);
      *a = static_cast<float>(std::ldexp(1.0, e - 24 - e / 2)),
      *b = static_cast<float>(std::ldexp(1.0, e / 2));
      if (random() % 2) *a = -*a;
      if (random() % 3 == 0) *a = std::nextafterf(*a, random() % 2 ? 0.0f : kSpecial32[12]);
      break;
    }
    case 5: {  // half a unit of c less or more than a double beside c can show
      const bool subnormal = random() % 2;
      const int e = subnormal ? -126 : static_cast<int>(random() % 200) - 100;
      *c = subnormal ? bits_to<float>(static_cast<uint32_t>(random() & 0x807fffffu)) : number(e, e);
      const float tail = random() % 2 ? 0x1p-23f : 0x1p-12f;
      *a = static_cast<float>(std::ldexp(1.0f + tail, -60));
      *b = static_cast<float>(std::ldexp(1.0f - tail, (subnormal ? -150 : e - 24) + 60));
      if (random() % 2) *a = -*a;
      break;
    }
    default:  // overflow, and half a subnormal unit
      *a = number(60, 64), *b = number(60, 64), *c = number(100, 127);
      if (random() % 2) *a = number(-76, -74), *b = number(-76, -74), *c = number(-149, -126);
  }
}

TEST(Leaf, FmaIsFused) {
  std::mt19937_64 random(11);
  std::vector<const LeafOp*> ops;
  for (const Leaf& leaf : leaves()) ops.push_back(&find(leaf.table, "fma", Kind::kF32));
  for (int round = 0; round < 500000; ++round) {
    alignas(64) float a[16], b[16], c[16], wanted[16], actual[16];
    for (int i = 0; i < 16; ++i) {
      adversarial(random, a + i, b + i, c + i);
      wanted[i] = fmaf(a[i], b[i], c[i]);
    }
    for (const LeafOp* op : ops) {
      op->apply(a, b, c, actual);
      for (int i = 0; i < 16; ++i)
        ASSERT_EQ(bits_to<uint32_t>(actual[i]), bits_to<uint32_t>(wanted[i]))
            << std::hexfloat << a[i] << " " << b[i] << " " << c[i];
    }
  }
}

TEST(Leaf, FmaOfDoublesIsFused) {
  std::mt19937_64 random(12);
  for (const Leaf& leaf : leaves()) {
    const LeafOp& op = find(leaf.table, "fma", Kind::kF64);
    for (int round = 0; round < 50000; ++round) {
      alignas(64) double a[8], b[8], c[8], actual[8];
      for (int i = 0; i < 8; ++i) {
        a[i] = std::ldexp(1.0 + static_cast<double>(random() >> 12) * 0x1p-52,
                          static_cast<int>(random() % 40));
        b[i] = std::ldexp(1.0 + static_cast<double>(random() >> 12) * 0x1p-52,
                          static_cast<int>(random() % 40));
        c[i] = -a[i] * b[i];
      }
      op.apply(a, b, c, actual);
      for (int i = 0; i < 8; ++i) ASSERT_EQ(actual[i], std::fma(a[i], b[i], c[i])) << leaf.name;
    }
  }
}

// load and store of all n, at every misalignment, against faulting pages on both sides.
TEST(Leaf, MemoryAccess) {
  Arena memory(1);
  std::mt19937_64 random(5);
  for (const Leaf& leaf : leaves()) {
    for (int s = 0; s < 4; ++s) {
      const LeafStorage& actual = leaf.table.storages[s];
      const LeafStorage& wanted = scalar().storages[s];
      const Kind kind = actual.dtype == SOFTMAXLIB_F64 ? Kind::kF64 : Kind::kF32;
      const size_t item = static_cast<size_t>(actual.item);
      for (int n = 0; n <= actual.lanes; ++n) {
        for (const Against side : {Against::kFront, Against::kBack}) {
          for (const size_t gap : {size_t{0}, size_t{1}, item, 3 * item}) {
            const std::string where = std::string(leaf.name) + " " + kDtypeNames[actual.dtype] +
                                      " n " + std::to_string(n) + " gap " + std::to_string(gap);
            const size_t bytes = static_cast<size_t>(n) * item;
            char* p = memory.place(bytes, side, gap);
            for (size_t i = 0; i < bytes; ++i) p[i] = static_cast<char>(random());
            std::vector<char> copy(p, p + bytes);
            copy.resize(kVectorBytes);
            for (const double fill : {-kInf, 0.0, 2.5}) {
              Vector a, b;
              actual.load_n(p, n, fill, a.bytes);
              wanted.load_n(copy.data(), n, fill, b.bytes);
              ASSERT_TRUE(equal(kind, a, b)) << where;
              if (n < actual.lanes) continue;
              actual.load(p, a.bytes);
              ASSERT_TRUE(equal(kind, a, b)) << where;
            }
            const Vector v = draw(kind, random);
            std::vector<char> expected(kVectorBytes);
            wanted.store_n(expected.data(), v.bytes, actual.lanes);
            const auto check = [&] {
              // NaN payloads aside.
              for (int i = 0; i < n; ++i) {
                const char *got = p + static_cast<size_t>(i) * item,
                           *want = expected.data() + static_cast<size_t>(i) * item;
                const Real x = decode(actual.dtype, got), y = decode(actual.dtype, want);
                ASSERT_TRUE((x != x && y != y) || !memcmp(got, want, item))
                    << where << " lane " << i;
              }
              ASSERT_TRUE(memory.intact()) << where;
            };
            actual.store_n(p, v.bytes, n);
            check();
            if (n < actual.lanes) continue;
            memset(p, 0, bytes);
            actual.store(p, v.bytes);
            check();
            if (reinterpret_cast<uintptr_t>(p) % bytes) continue;
            memset(p, 0, bytes);
            actual.stream(p, v.bytes);
            check();
          }
        }
      }
    }
  }
}

// Columns of rows that lie apart, one after the other, in each other, and backwards; against
// faulting pages on both sides.
TEST(Leaf, Columns) {
  Arena memory(1 << 14);
  std::mt19937_64 random(6);
  for (const Leaf& leaf : leaves()) {
    for (int s = 0; s < 4; ++s) {
      const LeafColumns& op = leaf.table.columns[s];
      const int64_t item = op.item, width = op.columns * item;
      for (const int64_t stride : {int64_t{op.columns}, int64_t{op.columns - 1}, int64_t{1},
                                   int64_t{op.columns + 5}, int64_t{100}, int64_t{-op.columns}})
        for (const Against side : {Against::kFront, Against::kBack})
          for (const int64_t gap : {int64_t{0}, int64_t{1}, item}) {
            if (op.columns == 8 && std::abs(stride) < 8) continue;
            SCOPED_TRACE(std::string(leaf.name) + " of " + std::to_string(item) + " bytes, " +
                         std::to_string(op.columns) + " stride " + std::to_string(stride));
            const int64_t span = std::abs(stride) * (op.lanes - 1) * item + width;
            char* const low =
                memory.place(static_cast<size_t>(span), side, static_cast<size_t>(gap));
            const int64_t first = stride < 0 ? span - width : 0;
            for (int64_t i = 0; i < span; ++i) low[i] = static_cast<char>(random());
            std::vector<char> wanted(low, low + span);
            std::vector<Vector> columns(static_cast<size_t>(op.columns));
            op.load(low + first, stride, columns.data());
            const auto in_column = [&](int64_t r, int64_t j) {
              return columns[static_cast<size_t>(j)].bytes + r * item;
            };
            for (int64_t r = 0; r < op.lanes; ++r)
              for (int64_t j = 0; j < op.columns; ++j)
                ASSERT_FALSE(memcmp(in_column(r, j), low + first + (r * stride + j) * item,
                                    static_cast<size_t>(item)))
                    << "row " << r << " column " << j;
            for (Vector& v : columns)
              for (unsigned char& byte : v.bytes) byte = static_cast<unsigned char>(random());
            for (int64_t r = 0; r < op.lanes; ++r)
              for (int64_t j = 0; j < op.columns; ++j)
                memcpy(wanted.data() + first + (r * stride + j) * item, in_column(r, j),
                       static_cast<size_t>(item));
            op.store(low + first, stride, columns.data());
            ASSERT_FALSE(memcmp(low, wanted.data(), wanted.size()));
            ASSERT_TRUE(memory.intact());
          }
    }
  }
}

// All 65536 patterns of both formats of 16 bits, read as exactly the number they stand for.
TEST(Leaf, LoadsEveryHalf) {
  for (const Leaf& leaf : leaves()) {
    for (const int s : {SOFTMAXLIB_F16, SOFTMAXLIB_BF16}) {
      const LeafStorage& storage = leaf.table.storages[s];
      for (uint32_t first = 0; first < 65536; first += 16) {
        uint16_t halves[16];
        alignas(64) float values[16];
        for (uint32_t i = 0; i < 16; ++i) halves[i] = static_cast<uint16_t>(first + i);
        storage.load(halves, values);
        for (int i = 0; i < 16; ++i) {
          const double wanted = from_half(halves[i], s == SOFTMAXLIB_F16 ? 5 : 8);
          if (wanted != wanted) ASSERT_NE(values[i], values[i]) << leaf.name << " " << halves[i];
          else
            ASSERT_EQ(bits_to<uint32_t>(values[i]), bits_to<uint32_t>(static_cast<float>(wanted)))
                << leaf.name << " " << kDtypeNames[s] << " " << halves[i];
        }
      }
    }
  }
}

// Stores round to nearest even: every half, the points half way to the next, and a float to either
// side of these; then random bits.
TEST(Leaf, StoresNearestHalf) {
  std::vector<float> values = {INFINITY,         -INFINITY, NAN,      -NAN,
                               65519.996f,       65520.0f,  65536.0f, 0x1.fffffep127f,
                               -0x1.fffffep127f, 0x1p-149f, 0x1p-25f, 0x1.000002p-25f};
  for (const int exponent_bits : {5, 8}) {
    for (int h = 0; h < 0x8000; ++h) {
      const double x = from_half(static_cast<uint16_t>(h), exponent_bits);
      const double next = from_half(static_cast<uint16_t>(h + 1), exponent_bits);
      if (!std::isfinite(x) || !std::isfinite(next)) continue;
      const float middle = static_cast<float>((x + next) / 2);
      for (const float v : {static_cast<float>(x), middle, std::nextafterf(middle, -INFINITY),
                            std::nextafterf(middle, INFINITY)}) {
        values.push_back(v);
        values.push_back(-v);
      }
    }
  }
  std::mt19937_64 random(9);
  for (int i = 0; i < 500000; ++i)
    values.push_back(bits_to<float>(static_cast<uint32_t>(random())));
  while (values.size() % 16) values.push_back(0);

  for (const int s : {SOFTMAXLIB_F16, SOFTMAXLIB_BF16}) {
    std::vector<uint16_t> wanted;
    for (const float v : values)
      wanted.push_back(to_half(static_cast<double>(v), s == SOFTMAXLIB_F16 ? 5 : 8));
    for (const Leaf& leaf : leaves()) {
      for (size_t i = 0; i < values.size(); i += 16) {
        uint16_t halves[16];
        leaf.table.storages[s].store(halves, values.data() + i);
        for (size_t j = 0; j < 16; ++j) {
          const float v = values[i + j];
          if (v != v)
            ASSERT_TRUE(std::isnan(from_half(halves[j], s == SOFTMAXLIB_F16 ? 5 : 8))) << leaf.name;
          else
            ASSERT_EQ(halves[j], wanted[i + j])
                << leaf.name << " " << kDtypeNames[s] << " " << std::hexfloat << v;
        }
      }
    }
  }
}

// The reference itself, at points known by heart.
TEST(Leaf, ReferenceOfHalves) {
  EXPECT_EQ(to_half(1.0, 5), 0x3c00);
  EXPECT_EQ(to_half(-2.0, 5), 0xc000);
  EXPECT_EQ(to_half(65504, 5), 0x7bff);
  EXPECT_EQ(to_half(65520, 5), 0x7c00);
  EXPECT_EQ(to_half(0x1p-24, 5), 0x0001);
  EXPECT_EQ(to_half(0x1p-14, 5), 0x0400);
  EXPECT_EQ(to_half(0x1p-25, 5), 0x0000);
  EXPECT_EQ(to_half(1.0, 8), 0x3f80);
  EXPECT_EQ(to_half(0x1.01p0, 8), 0x3f80);
  EXPECT_EQ(to_half(0x1.03p0, 8), 0x3f82);
  EXPECT_EQ(from_half(0x0001, 8), 0x1p-133);
}

}  // namespace
}  // namespace softmaxlib::test
