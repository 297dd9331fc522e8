// Not a byte read or written beyond either end of any array: all of them lie between pages that
// fault, flush against one or so many bytes away, in every kernel, with every option.
#include "support.hpp"

namespace softmaxlib::test {
namespace {

struct Case {
  softmaxlib_function function;
  softmaxlib_dtype from, to;
  int64_t rows, n;
  int axis;                                             // of (rows, n) or (n, rows)
  int64_t step;                                         // elements of x from one to the next
  bool in_place, bias, where, temperatures, attention;  // the last: causal, slopes, sinks
  softmaxlib_dtype bias_type;
};

std::string describe(const Case& c) {
  return std::string(kFunctionNames[c.function]) + " " + kDtypeNames[c.from] + " to " +
         kDtypeNames[c.to] + ", " + std::to_string(c.rows) + " rows of " + std::to_string(c.n) +
         ", axis " + std::to_string(c.axis) + ", step " + std::to_string(c.step) +
         (c.in_place ? ", in place" : "") + (c.bias ? ", bias" : "") + (c.where ? ", where" : "") +
         (c.temperatures ? ", temperatures" : "") + (c.attention ? ", attention" : "");
}

class Guard : public testing::Test {
 protected:
  // Calls with every array at both ends of its memory, `gap` bytes away, for all gaps; the results
  // are those of the scalar leaf far from all ends.
  void check(const Case& c, softmaxlib_algorithm algorithm) {
    SCOPED_TRACE(describe(c));
    const bool reduces = c.function == SOFTMAXLIB_LOGSUMEXP;
    const int64_t sizes[] = {c.axis ? c.rows : c.n, c.axis ? c.n : c.rows};
    const int64_t elements = c.rows * c.n, out_elements = reduces ? c.rows : elements;
    const int64_t from_item = item_size_of(c.from), to_item = item_size_of(c.to);
    const int64_t x_strides[] = {sizes[1] * c.step * from_item, c.step * from_item};
    const auto values = make_row(Pattern::kNormal, elements * c.step, SOFTMAXLIB_F16, 3);
    auto x = encode_all(values, c.from);
    x.resize(static_cast<size_t>(((elements - 1) * c.step + 1) * from_item));
    const auto bias = encode_all(make_row(Pattern::kTiny, c.n, c.bias_type, 4), c.bias_type);
    std::vector<char> where(static_cast<size_t>(elements));
    for (size_t i = 0; i < where.size(); ++i) where[i] = i % 5 != 2;
    std::vector<double> t(static_cast<size_t>(c.rows), 1.5);
    const auto temperatures = encode_all(t, SOFTMAXLIB_F64);
    const auto slopes = encode_all(t, SOFTMAXLIB_F32), sinks = encode_all(t, c.bias_type);

    const auto run = [&](const Options& base, char* px, char* py, const char* pb, const char* pw,
                         const char* pt, const char* pl, const char* pi) {
      Options o = base;
      const auto view = [](const char* p, softmaxlib_dtype dtype, int32_t ndim,
                           const int64_t* shape) {
        return softmaxlib_array{const_cast<char*>(p), dtype, ndim, shape, nullptr};
      };
      softmaxlib_array xa = view(px, c.from, 2, sizes);
      xa.strides = x_strides;
      softmaxlib_array ya = view(py, c.to, reduces ? 1 : 2, reduces ? &c.rows : sizes);
      if (c.in_place) ya.strides = x_strides;
      const int64_t along[] = {c.axis ? 1 : c.n, c.axis ? c.n : 1};
      const int64_t across[] = {c.axis ? c.rows : 1, c.axis ? 1 : c.rows};
      const softmaxlib_array ba = view(pb, c.bias_type, 2, along);
      const softmaxlib_array wa = view(pw, SOFTMAXLIB_BOOL, 2, sizes);
      const softmaxlib_array ta = view(pt, SOFTMAXLIB_F64, 2, across);
      if (c.bias) o.bias = &ba;
      if (c.where) o.where = &wa;
      if (c.temperatures) o.temperatures = &ta;
      const softmaxlib_array la = view(pl, SOFTMAXLIB_F32, 2, across);
      const softmaxlib_array ia = view(pi, c.bias_type, 2, across);
      if (c.attention) {
        o.causal = 1;
        o.causal_offset = c.n / 2;
        o.query_axis = 1 - c.axis;
        o.alibi_slopes = c.bias ? nullptr : &la;
        o.sinks = &ia;
      }
      const int32_t axis = c.axis;
      return run_array(c.function, xa, ya, 1, &axis, o);
    };

    const size_t out_bytes = c.in_place ? x.size() : static_cast<size_t>(out_elements * to_item);
    std::vector<char> wanted(out_bytes);
    if (c.in_place) wanted = x;
    auto plain_x = x;
    ASSERT_EQ(run(Options(SOFTMAXLIB_ISA_SCALAR, SOFTMAXLIB_TWO_PASS),
                  c.in_place ? wanted.data() : plain_x.data(), wanted.data(), bias.data(),
                  where.data(), temperatures.data(), slopes.data(), sinks.data()),
              SOFTMAXLIB_OK);
    for (const softmaxlib_isa isa : isas())
      for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING})
        for (size_t gap = 0; gap < 64; ++gap)
          for (const Against side : {Against::kFront, Against::kBack}) {
            const auto place = [&](Arena& arena, const std::vector<char>& bytes, size_t at) {
              return static_cast<char*>(
                  memcpy(arena.place(bytes.size(), side, at % 64), bytes.data(), bytes.size()));
            };
            // Each its own way, so that nothing lines up by chance; all flush at 0.
            char* px = place(xs_, x, gap);
            char* py = c.in_place ? px : ys_.place(out_bytes, side, 7 * gap % 64);
            const char* pb = place(biases_, bias, 3 * gap);
            const char* pw = place(wheres_, where, 5 * gap);
            const char* pt = place(temperatures_, temperatures, 9 * gap);
            const char* pl = place(slopes_, slopes, 11 * gap);
            const char* pi = place(sinks_, sinks, 13 * gap);
            const Options o(isa, algorithm, store);
            ASSERT_EQ(run(o, px, py, pb, pw, pt, pl, pi), SOFTMAXLIB_OK);
            ASSERT_FALSE(memcmp(py, wanted.data(), out_bytes))
                << test::describe(o) << " gap " << gap;
            ASSERT_TRUE(c.in_place || !memcmp(px, x.data(), x.size())) << "x was written to";
            ASSERT_TRUE(xs_.intact() && ys_.intact() && biases_.intact() && wheres_.intact() &&
                        temperatures_.intact() && slopes_.intact() && sinks_.intact())
                << test::describe(o) << " gap " << gap;
          }
  }

  Arena xs_{1 << 20}, ys_{1 << 20}, biases_{1 << 14}, wheres_{1 << 17}, temperatures_{1 << 13},
      slopes_{1 << 13}, sinks_{1 << 13};
};

// Every length of tail for one row, and lengths around the ends of groups and chunks.
TEST_F(Guard, EveryTail) {
  std::vector<int64_t> lengths;
  for (int64_t n = 1; n <= 65; ++n) lengths.push_back(n);
  for (const int64_t n : {127, 129, 511, 513, 1023, 1025, 1030}) lengths.push_back(n);
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes) {
      int turn = 0;
      const auto algorithms = algorithms_of(function, dtype);
      for (const int64_t n : lengths) {
        const auto algorithm = algorithms[static_cast<size_t>(turn++) % algorithms.size()];
        const bool in_place = turn % 3 == 0 && function != SOFTMAXLIB_LOGSUMEXP;
        check({function, dtype, dtype, 1, n, 1, 1, in_place, false, false, false, false, dtype},
              algorithm);
        if (HasFatalFailure()) return;
      }
    }
}

// Many rows at once, as `auto` runs them: short rows, columns, tiles.
TEST_F(Guard, ManyRows) {
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const int axis : {1, 0})
        for (const int64_t n : {1, 3, 16, 33, 64, 100, 260})
          for (const int64_t rows : {2, 17, 40}) {
            const bool in_place = (n + rows + axis) % 3 == 0 && function != SOFTMAXLIB_LOGSUMEXP;
            check({function, dtype, dtype, rows, n, axis, 1, in_place, false, false, false, false,
                   dtype},
                  SOFTMAXLIB_ALGORITHM_AUTO);
            if (HasFatalFailure()) return;
          }
}

// Rows that pass through a stage: strided x, other dtypes, bias, where, temperatures, and what
// attention adds.
TEST_F(Guard, Operands) {
  constexpr softmaxlib_dtype kFrom[] = {SOFTMAXLIB_F32,  SOFTMAXLIB_F64,  SOFTMAXLIB_F16,
                                        SOFTMAXLIB_BF16, SOFTMAXLIB_BOOL, SOFTMAXLIB_I8,
                                        SOFTMAXLIB_U16,  SOFTMAXLIB_I32,  SOFTMAXLIB_I64};
  int turn = 0;
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype to : kFloatTypes)
      for (const int64_t n : {1, 7, 15, 16, 17, 31, 63, 65, 1025})
        for (const int mask : {0, 1, 2, 4, 7, 8, 9, 15}) {
          const softmaxlib_dtype from = kFrom[static_cast<size_t>(turn) % std::size(kFrom)];
          const bool in_place = from == to && turn % 2 && function != SOFTMAXLIB_LOGSUMEXP;
          check({function, from, to, 1 + turn % 3, n, turn % 2, 1 + turn % 4, in_place,
                 bool(mask & 1), bool(mask & 2), bool(mask & 4), bool(mask & 8),
                 kFloatTypes[turn % 4]},
                turn % 5 ? SOFTMAXLIB_ALGORITHM_AUTO : SOFTMAXLIB_TWO_PASS);
          if (HasFatalFailure()) return;
          ++turn;
        }
}

// Gradients: each operand by itself, out also in the place of grad, streamed and not.
TEST_F(Guard, Gradients) {
  Arena grads(1 << 17), results(1 << 17);
  int turn = 0;
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype to : kFloatTypes)
      for (const int64_t n : {1, 7, 16, 33, 100, 1024, 1040, 2100}) {
        ++turn;
        const bool reduces = function == SOFTMAXLIB_LOGSUMEXP, masks = turn % 3 == 1;
        const softmaxlib_dtype from = turn % 4 ? to : kFloatTypes[turn / 4 % 4];
        const bool in_place = from == to && !reduces && turn % 2;
        const int64_t rows = 3, shape[] = {rows, n};
        const int32_t axis = 1, ndim = reduces ? 1 : 2;
        const int64_t elements = rows * n, seen = reduces ? rows : elements;
        const auto x = encode_all(make_row(Pattern::kNormal, elements, from, 3), from);
        const auto y = encode_all(make_row(Pattern::kTiny, seen, to, 4), to);
        const auto grad = encode_all(make_row(Pattern::kNormal, seen, from, 5), from);
        std::vector<char> where(static_cast<size_t>(elements));
        for (size_t i = 0; i < where.size(); ++i) where[i] = i % 5 != 2;
        const size_t bytes = static_cast<size_t>(elements * item_size_of(to));
        const auto run = [&](Options o, const char* pg, const char* px, const char* py,
                             const char* pw, char* out) {
          const auto view = [&](const char* p, softmaxlib_dtype dtype, int32_t dims) {
            return softmaxlib_array{const_cast<char*>(p), dtype, dims, shape, nullptr};
          };
          const softmaxlib_array ga = view(pg, from, ndim), xa = view(px, from, 2),
                                 ya = view(py, to, ndim), oa = view(out, to, 2),
                                 wa = view(pw, SOFTMAXLIB_BOOL, 2);
          if (masks) o.where = &wa;
          return softmaxlib_backward(function, &ga, &xa, &ya, &oa, 1, &axis, &o);
        };
        std::vector<char> wanted(bytes);
        ASSERT_EQ(run(Options(SOFTMAXLIB_ISA_SCALAR, SOFTMAXLIB_ALGORITHM_AUTO), grad.data(),
                      x.data(), y.data(), where.data(), wanted.data()),
                  SOFTMAXLIB_OK);
        for (const softmaxlib_isa isa : isas())
          for (const auto store : {SOFTMAXLIB_STORE_PLAIN, SOFTMAXLIB_STORE_STREAMING})
            for (size_t gap = 0; gap < 64; ++gap)
              for (const Against side : {Against::kFront, Against::kBack}) {
                const auto place = [&](Arena& arena, const std::vector<char>& from_bytes,
                                       size_t at) {
                  return static_cast<char*>(memcpy(arena.place(from_bytes.size(), side, at % 64),
                                                   from_bytes.data(), from_bytes.size()));
                };
                char* const pg = place(grads, grad, gap);
                const char* const px = place(xs_, x, 3 * gap);
                const char* const py = place(results, y, 5 * gap);
                const char* const pw = place(wheres_, where, 7 * gap);
                char* const out = in_place ? pg : ys_.place(bytes, side, 9 * gap % 64);
                const Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO, store);
                ASSERT_EQ(run(o, pg, px, py, pw, out), SOFTMAXLIB_OK);
                ASSERT_FALSE(memcmp(out, wanted.data(), bytes))
                    << kFunctionNames[function] << " " << kDtypeNames[to] << " rows of " << n
                    << " gap " << gap << ": " << test::describe(o);
                ASSERT_TRUE(grads.intact() && xs_.intact() && results.intact() &&
                            wheres_.intact() && (in_place || ys_.intact()))
                    << kFunctionNames[function] << " rows of " << n << " gap " << gap;
                ASSERT_FALSE(memcmp(px, x.data(), x.size())) << "x was written to";
                ASSERT_TRUE(in_place || !memcmp(pg, grad.data(), grad.size()));
              }
      }
}

}  // namespace
}  // namespace softmaxlib::test
