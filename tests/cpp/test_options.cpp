// Axes, strides, dtypes and options drawn at random, against an oracle that knows only indices; the
// same bits on every ISA, for every algorithm and however the arrays lie in memory.
#include "indices.hpp"
#include "support.hpp"

namespace softmaxlib::test {
namespace {

// An array somewhere in a watched buffer, with strides of any kind.
class Array {
 public:
  // Logical shape; layout: random order of axes, directions, gaps and odd alignment, or plain.
  Array(softmaxlib_dtype dtype, Shape shape, std::mt19937& random, bool plain)
      : shape_(std::move(shape)), strides_(shape_.size()) {
    const int64_t item = item_size_of(dtype);
    std::vector<size_t> order(shape_.size());
    for (size_t d = 0; d < order.size(); ++d) order[d] = order.size() - 1 - d;
    if (!plain) std::shuffle(order.begin(), order.end(), random);
    int64_t step = item, low = 0;
    for (const size_t d : order) {
      if (!plain && random() % 4 == 0)
        step += static_cast<int64_t>(random() % 3) * item + (random() % 5 == 0);
      strides_[d] = step;
      step *= std::max<int64_t>(shape_[d], 1);
      if (!plain && random() % 3 == 0) {
        low += (std::max<int64_t>(shape_[d], 1) - 1) * strides_[d];
        strides_[d] = -strides_[d];
      }
    }
    const int64_t odd = plain ? 0 : static_cast<int64_t>(random() % 8);
    memory_.assign(static_cast<size_t>(step + odd), kUntouched);
    view_ = {memory_.data() + low + odd, dtype, static_cast<int32_t>(shape_.size()), shape_.data(),
             plain ? nullptr : strides_.data()};
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;

  // Repeats along an axis: every index shows element 0.
  void stretch(size_t axis, int64_t size) {
    shape_[axis] = size;
    strides_[axis] = 0;
    view_.shape = shape_.data();
    view_.strides = strides_.data();
  }

  const softmaxlib_array& view() const { return view_; }
  const Shape& shape() const { return shape_; }
  softmaxlib_dtype dtype() const { return view_.dtype; }
  char* at(const Shape& index) const {
    char* p = static_cast<char*>(view_.data);
    for (size_t d = 0; d < shape_.size(); ++d) p += index[d] * strides_[d];
    return p;
  }
  // The element that broadcasting shows at an index of a larger shape.
  Real seen_at(const Shape& index) const {
    Shape mine(shape_.size());
    for (size_t d = 0; d < shape_.size(); ++d)
      mine[d] = shape_[d] == 1 ? 0 : index[index.size() - shape_.size() + d];
    return decode(view_.dtype, at(mine));
  }
  // Bytes between the elements that a call must leave alone.
  bool only_elements_changed(const std::vector<char*>& elements) {
    std::vector<bool> mine(memory_.size());
    for (const char* p : elements)
      for (int b = 0; b < item_size_of(view_.dtype); ++b)
        mine[static_cast<size_t>(p - memory_.data() + b)] = true;
    for (size_t i = 0; i < memory_.size(); ++i)
      if (!mine[i] && memory_[i] != kUntouched) return false;
    return true;
  }

 private:
  static constexpr char kUntouched = 0x77;
  Shape shape_, strides_;
  std::vector<char> memory_;
  softmaxlib_array view_;
};

template <class Value>
void fill(const Array& array, Value value) {
  for_indices(array.shape(), [&](const Shape& i) { encode(value(), array.dtype(), array.at(i)); });
}

// A shape that broadcasts to x's, constant along `fixed` axes.
Shape broadcastable(const Shape& x, const std::vector<bool>& fixed, std::mt19937& random) {
  Shape shape;
  const size_t skip = x.empty() ? 0 : random() % (x.size() + 1);
  for (size_t d = skip; d < x.size(); ++d)
    shape.push_back(fixed[d] || random() % 3 == 0 ? 1 : x[d]);
  return shape;
}

constexpr softmaxlib_dtype kEveryType[] = {
    SOFTMAXLIB_F32, SOFTMAXLIB_F64, SOFTMAXLIB_F16, SOFTMAXLIB_BF16, SOFTMAXLIB_BOOL,
    SOFTMAXLIB_I8,  SOFTMAXLIB_I16, SOFTMAXLIB_I32, SOFTMAXLIB_I64,  SOFTMAXLIB_U8,
    SOFTMAXLIB_U16, SOFTMAXLIB_U32, SOFTMAXLIB_U64};

struct Problem {
  softmaxlib_function function;
  Shape shape;
  std::vector<int32_t> axes;
  std::vector<bool> reduced;
  const Array *x, *bias, *where, *temperatures;
  double temperature;
  softmaxlib_dtype out;

  Shape out_shape() const {
    Shape s;
    for (size_t d = 0; d < shape.size(); ++d)
      if (function != SOFTMAXLIB_LOGSUMEXP || !reduced[d]) s.push_back(shape[d]);
    return s;
  }

  // The arguments of one row, and which take part; `outer` is the row's index, 0 along the axes.
  std::pair<std::vector<Real>, std::vector<bool>> row(const Shape& outer) const {
    std::vector<Real> values;
    std::vector<bool> in;
    Shape inner = shape;
    for (size_t d = 0; d < shape.size(); ++d)
      if (!reduced[d]) inner[d] = 1;
    for_indices(inner, [&](const Shape& i) {
      Shape index = outer;
      for (size_t d = 0; d < shape.size(); ++d) index[d] += i[d];
      Real z = converted(x->seen_at(index), out);
      z /= temperatures ? temperatures->seen_at(index) : Real{temperature};
      if (bias) z += bias->seen_at(index);
      values.push_back(z);
      in.push_back(!where || where->seen_at(index) != 0);
    });
    return {values, in};
  }
};

// Where each row starts.
template <class F>
void for_rows(const Problem& p, F f) {
  Shape outer = p.shape;
  for (size_t d = 0; d < outer.size(); ++d)
    if (p.reduced[d]) outer[d] = 1;
  for_indices(outer, f);
}

void check(const Problem& p, std::mt19937& random) {
  Options o;
  o.temperature = p.temperature;
  o.bias = p.bias ? &p.bias->view() : nullptr;
  o.where = p.where ? &p.where->view() : nullptr;
  o.temperatures = p.temperatures ? &p.temperatures->view() : nullptr;

  std::vector<char> wanted;
  bool first = true;
  std::vector<softmaxlib_algorithm> algorithms = algorithms_of(p.function, p.out);
  algorithms.push_back(SOFTMAXLIB_ALGORITHM_AUTO);
  algorithms.push_back(SOFTMAXLIB_THREE_PASS_RELOAD);  // or its nearest relative
  for (const softmaxlib_isa isa : isas())
    for (const softmaxlib_algorithm algorithm : algorithms) {
      o.isa = isa;
      o.algorithm = algorithm;
      o.store = static_cast<softmaxlib_store>(random() % 3);
      Array out(p.out, p.out_shape(), random, random() % 3 == 0);
      ASSERT_EQ(run_array(p.function, p.x->view(), out.view(), static_cast<int32_t>(p.axes.size()),
                          p.axes.data(), o),
                SOFTMAXLIB_OK);
      std::vector<char> bytes;
      std::vector<char*> elements;
      for_indices(out.shape(), [&](const Shape& i) {
        elements.push_back(out.at(i));
        bytes.insert(bytes.end(), out.at(i), out.at(i) + item_size_of(p.out));
      });
      ASSERT_TRUE(out.only_elements_changed(elements));
      if (!first) {
        ASSERT_TRUE(same_bits(bytes, wanted, p.out)) << describe(o);
        continue;
      }
      first = false;
      wanted = bytes;

      for_rows(p, [&](const Shape& outer) {
        const auto [values, in] = p.row(outer);
        std::vector<Real> actual;
        if (p.function == SOFTMAXLIB_LOGSUMEXP) {
          Shape index;
          for (size_t d = 0; d < outer.size(); ++d)
            if (!p.reduced[d]) index.push_back(outer[d]);
          actual.push_back(decode(p.out, out.at(index)));
        } else {
          Shape inner = p.shape;
          for (size_t d = 0; d < inner.size(); ++d)
            if (!p.reduced[d]) inner[d] = 1;
          for_indices(inner, [&](const Shape& i) {
            Shape index = outer;
            for (size_t d = 0; d < index.size(); ++d) index[d] += i[d];
            actual.push_back(decode(p.out, out.at(index)));
          });
        }
        ASSERT_TRUE(accurate(p.function, p.out, exact_row(p.function, values, in), actual));
      });
    }
}

void draw_and_check(uint32_t seed, bool special) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal;
  Problem p = {};
  p.function = static_cast<softmaxlib_function>(random() % kFunctions);
  p.out = kFloatTypes[random() % 4];
  const size_t ndim = random() % 5;
  for (size_t d = 0; d < ndim; ++d)
    p.shape.push_back(
        random() % 25 == 0 ? 0 : 1 + static_cast<int64_t>(random() % (ndim > 2 ? 6 : 40)));
  if (ndim && random() % 20 == 0) p.shape[random() % ndim] = 1100;

  p.reduced.assign(ndim, false);
  for (size_t d = 0; d < ndim; ++d)
    if (random() % 2) {
      p.axes.push_back(static_cast<int32_t>(d) - (random() % 2 ? static_cast<int32_t>(ndim) : 0));
      p.reduced[d] = true;
    }
  std::shuffle(p.axes.begin(), p.axes.end(), random);
  if (p.axes.empty()) p.reduced.assign(ndim, true);

  const softmaxlib_dtype x_type =
      random() % 2 ? p.out : kEveryType[random() % std::size(kEveryType)];
  Array x(x_type, p.shape, random, random() % 3 == 0);
  const double scale = x_type >= SOFTMAXLIB_BOOL ? 20 : std::pow(10, normal(random));
  fill(x, [&]() -> double {
    const double v = normal(random) * scale;
    if (x_type < SOFTMAXLIB_BOOL) {
      if (special && random() % 40 == 0) return -kInf;
      if (special && random() % 400 == 0) return random() % 2 ? kNaN : kInf;
    }
    return x_type >= SOFTMAXLIB_U8 || x_type == SOFTMAXLIB_BOOL ? std::fabs(v) : v;
  });
  if (ndim && random() % 6 == 0 && p.shape[0] > 0) x.stretch(0, p.shape[0]);
  p.x = &x;

  p.temperature = 1;
  if (random() % 3 == 0) p.temperature = std::exp(normal(random));
  const std::vector<bool> free(ndim, false);
  Array temperatures(random() % 2 ? SOFTMAXLIB_F32 : SOFTMAXLIB_F64,
                     broadcastable(p.shape, p.reduced, random), random, false);
  fill(temperatures, [&] { return std::exp(normal(random)); });
  if (random() % 3 == 0) p.temperatures = &temperatures;
  Array bias(kFloatTypes[random() % 4], broadcastable(p.shape, free, random), random, false);
  fill(bias, [&] { return special && random() % 10 == 0 ? -kInf : 3 * normal(random); });
  if (random() % 3 == 0) p.bias = &bias;
  Array where(SOFTMAXLIB_BOOL, broadcastable(p.shape, free, random), random, false);
  const uint32_t odds = random() % 4;
  fill(where, [&] { return odds == 3 ? 0.0 : random() % 4 > odds; });
  if (random() % 3 == 0) p.where = &where;

  std::string shape;
  for (size_t d = 0; d < ndim; ++d)
    shape += std::to_string(p.shape[d]) + (p.reduced[d] ? " along, " : ", ");
  SCOPED_TRACE("seed " + std::to_string(seed) + " " + kFunctionNames[p.function] + " " +
               kDtypeNames[x_type] + " to " + kDtypeNames[p.out] + ", shape " + shape +
               "temperature " + std::to_string(p.temperature) + (p.temperatures ? " per row" : "") +
               (p.bias ? ", bias" : "") + (p.where ? ", where" : ""));
  check(p, random);
}

TEST(Options, RandomProblems) {
  for (uint32_t seed = 0; seed < 6000; ++seed) {
    draw_and_check(seed, seed % 2);
    ASSERT_FALSE(HasFailure());
  }
}

// Without options, rows with strides give the bits of contiguous ones.
TEST(Options, StridesKeepTheBits) {
  std::mt19937 random(4);
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const int64_t n : {1, 15, 65, 1041, 3000, 70000})
        for (const Pattern pattern : {Pattern::kWide, Pattern::kSteep, Pattern::kFarAbove,
                                      Pattern::kEveryMagnitude, Pattern::kMasked}) {
          const auto values = make_row(pattern, n, dtype, 3);
          const auto row = encode_all(values, dtype);
          const auto wanted = row_result(function, dtype, row, Options());
          for (const softmaxlib_isa isa : isas()) {
            // The same row along the slow axis of a matrix, backwards in memory.
            const int64_t item = item_size_of(dtype), shape[] = {n, 2};
            std::vector<char> x(static_cast<size_t>(2 * n * item)), y(x.size());
            for (int64_t i = 0; i < n; ++i)
              for (int64_t j = 0; j < 2; ++j)
                memcpy(x.data() + ((n - 1 - i) * 2 + j) * item, row.data() + i * item,
                       static_cast<size_t>(item));
            const int64_t strides[] = {-2 * item, item};
            const int64_t last = 2 * (n - 1) * item;
            const softmaxlib_array xa = {x.data() + last, dtype, 2, shape, strides};
            const bool reduces = function == SOFTMAXLIB_LOGSUMEXP;
            const softmaxlib_array ya =
                reduces ? softmaxlib_array{y.data(), dtype, 1, shape + 1, nullptr}
                        : softmaxlib_array{y.data() + last, dtype, 2, shape, strides};
            const int32_t axis = 0;
            ASSERT_EQ(run_array(function, xa, ya, 1, &axis, Options(isa, SOFTMAXLIB_TWO_PASS)),
                      SOFTMAXLIB_OK);
            for (int64_t i = 0; i < result_elements(function, n); ++i)
              for (int64_t j = 0; j < 2; ++j) {
                const int64_t at = reduces ? j : (n - 1 - i) * 2 + j;
                ASSERT_FALSE(memcmp(y.data() + at * item, wanted.data() + i * item,
                                    static_cast<size_t>(item)))
                    << kFunctionNames[function] << " " << kDtypeNames[dtype] << " n " << n
                    << " pattern " << static_cast<int>(pattern) << " element " << i << " "
                    << softmaxlib_isa_name(isa);
              }
          }
        }
}

// Rows side by side in memory, (planes, n, columns) along n: the bits of contiguous rows, whether
// the results go to the same layout, to a transposed one or onto x, serially or in tasks.
TEST(Options, ColumnsKeepTheBits) {
  constexpr int64_t kPlanes = 2;
  const auto reversed = [](void*, int64_t count, softmaxlib_task task, void* argument) {
    for (int64_t i = count; i-- > 0;) task(argument, i);
  };
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const int64_t n : {1, 2, 17, 300, 1100})
        for (const int64_t columns : {1, 3, 65, 200}) {
          const int64_t item = item_size_of(dtype), size = kPlanes * n * columns;
          const size_t bytes = static_cast<size_t>(item);
          const int64_t results = result_elements(function, n);
          std::vector<char> x(static_cast<size_t>(size * item));
          std::vector<std::vector<char>> wanted;
          for (int64_t p = 0; p < kPlanes; ++p)
            for (int64_t c = 0; c < columns; ++c) {
              const Pattern pattern = static_cast<Pattern>(c % static_cast<int>(Pattern::kCount));
              const auto row =
                  encode_all(make_row(pattern, n, dtype, static_cast<uint32_t>(c + p)), dtype);
              wanted.push_back(row_result(function, dtype, row, Options()));
              for (int64_t i = 0; i < n; ++i)
                memcpy(x.data() + ((p * n + i) * columns + c) * item, row.data() + i * item, bytes);
            }
          for (const softmaxlib_isa isa : isas())
            for (const softmaxlib_algorithm algorithm : algorithms_of(function, dtype))
              for (const int layout : {0, 1, 2}) {  // as x; transposed; x itself
                const bool reduces = function == SOFTMAXLIB_LOGSUMEXP;
                if (reduces && layout == 2) continue;
                auto input = x;
                std::vector<char> y(x.size());
                char* out = layout == 2 ? input.data() : y.data();
                const int64_t shape[] = {kPlanes, n, columns}, reduced[] = {kPlanes, columns};
                int64_t strides[] = {n * columns * item, columns * item, item};
                if (layout == 1) strides[1] = item, strides[2] = n * item;
                const int64_t reduced_strides[] = {columns * item, item};
                const softmaxlib_array xa = {input.data(), dtype, 3, shape, nullptr};
                const softmaxlib_array ya =
                    reduces ? softmaxlib_array{out, dtype, 2, reduced, reduced_strides}
                            : softmaxlib_array{out, dtype, 3, shape, strides};
                Options o(isa, algorithm);
                o.num_threads = layout == 1 ? 3 : 1;
                o.parallel_for = reversed;
                const int32_t axis = 1;
                ASSERT_EQ(run_array(function, xa, ya, 1, &axis, o), SOFTMAXLIB_OK);
                for (int64_t p = 0; p < kPlanes; ++p)
                  for (int64_t c = 0; c < columns; ++c)
                    for (int64_t i = 0; i < results; ++i) {
                      const char* at = reduces
                                           ? out + (p * columns + c) * item
                                           : out + p * strides[0] + i * strides[1] + c * strides[2];
                      const auto& row = wanted[static_cast<size_t>(p * columns + c)];
                      ASSERT_FALSE(memcmp(at, row.data() + i * item, bytes))
                          << kFunctionNames[function] << " " << kDtypeNames[dtype] << " n " << n
                          << " columns " << columns << " layout " << layout << " at " << p << " "
                          << i << " " << c << " " << describe(o);
                    }
              }
        }
}

// Positions left out give 0 or -inf, whatever x holds there; so does a row without any.
TEST(Options, WhereHidesEverything) {
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const softmaxlib_isa isa : isas())
        for (const int64_t n : {1, 5, 70, 1500}) {
          std::vector<double> values = make_row(Pattern::kNormal, n, dtype, 2);
          std::vector<uint8_t> where(static_cast<size_t>(n), 1);
          for (size_t i = 0; i < values.size(); i += 3) {
            where[i] = 0;
            values[i] = i % 2 ? kNaN : kInf;
          }
          for (const bool none : {false, true}) {
            if (none) where.assign(where.size(), 0);
            const auto x = encode_all(values, dtype);
            const softmaxlib_array mask = {where.data(), SOFTMAXLIB_BOOL, 1, &n, nullptr};
            Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
            o.where = &mask;
            const auto y = row_result(function, dtype, x, o);
            ASSERT_TRUE(accurate(function, dtype,
                                 exact_row(function, decode_all(x.data(), n, dtype),
                                           std::vector<bool>(where.begin(), where.end())),
                                 decode_all(y.data(), result_elements(function, n), dtype)))
                << softmaxlib_isa_name(isa) << " n " << n << " none " << none;
          }
        }
}

// Temperatures at both ends of the range; 1 gives the bits of none.
TEST(Options, Temperature) {
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : {SOFTMAXLIB_F32, SOFTMAXLIB_F64}) {
      const auto x = encode_all(make_row(Pattern::kWide, 300, dtype, 2), dtype);
      const auto plain = row_result(function, dtype, x, Options());
      const auto arguments = decode_all(x.data(), 300, dtype);
      for (const double t : {1.0, 0.1, 0.7, 3.0, 1e-3, 1e3, 1e-6, 1e6, 1e-30, 1e30}) {
        Options o;
        o.temperature = t;
        auto z = arguments;
        for (Real& v : z) v /= t;
        for (const softmaxlib_isa isa : isas()) {
          o.isa = isa;
          const auto y = row_result(function, dtype, x, o);
          ASSERT_TRUE(t != 1 || same_bits(y, plain, dtype));
          ASSERT_TRUE(accurate(function, dtype, exact_row(function, z),
                               decode_all(y.data(), result_elements(function, 300), dtype)))
              << "temperature " << t << " on " << softmaxlib_isa_name(isa);
        }
      }
    }
}

// Quotients whose rounding error alone is beyond the range of exp.
TEST(Options, TinyTemperature) {
  for (const softmaxlib_function function :
       {SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_LOG_SOFTMAX, SOFTMAXLIB_LOGSUMEXP})
    for (const Pattern p : {Pattern::kWide, Pattern::kTies, Pattern::kTwoValues})
      for (const double t : {1e-18, 1e-30, 1e-50, 1e-150, 1e-300})
        for (const softmaxlib_isa isa : isas()) {
          const auto x = encode_all(make_row(p, 300, SOFTMAXLIB_F64, 2), SOFTMAXLIB_F64);
          auto z = decode_all(x.data(), 300, SOFTMAXLIB_F64);
          for (Real& v : z) v /= t;
          Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
          o.temperature = t;
          const auto y = row_result(function, SOFTMAXLIB_F64, x, o);
          ASSERT_TRUE(
              accurate(function, SOFTMAXLIB_F64, exact_row(function, z),
                       decode_all(y.data(), result_elements(function, 300), SOFTMAXLIB_F64)))
              << "temperature " << t << " on " << softmaxlib_isa_name(isa);
        }
}

// Rows of one element, of which a factor of all rows and one of their own leave the range together.
TEST(Options, OneElementOfTwoFactors) {
  constexpr int64_t kRows = 40, kShape[] = {kRows, 1};
  const int32_t axis = 1;
  const struct {
    double of_rows, of_all;
    bool divides;
  } factors[] = {{1e-17, 1e20, true}, {1e17, 1e-20, false},   {1e-9, 1e9, true},
                 {1, 1.7e308, true},  {1e30, 5e-324, false},  {0.5, 3, true},
                 {1e300, 1e-5, true}, {1e-300, 1e-300, false}};
  for (const softmaxlib_function function : functions())
    for (const auto& f : factors) {
      std::vector<double> x(kRows), of_rows(kRows, f.of_rows), y(kRows), want(kRows);
      for (int64_t r = 0; r < kRows; ++r) x[static_cast<size_t>(r)] = 1e3 * (r % 3 ? 1.0 : -0.01);
      const auto array = [&](std::vector<double>& of) {
        return softmaxlib_array{of.data(), SOFTMAXLIB_F64, 2, kShape, nullptr};
      };
      const softmaxlib_array from = array(x), own = array(of_rows), to = array(y),
                             wanted = array(want);
      for (const softmaxlib_isa isa : isas()) {
        const auto run = [&](const softmaxlib_array& out, softmaxlib_algorithm algorithm) {
          softmaxlib_array result = out;
          if (function == SOFTMAXLIB_LOGSUMEXP) result.ndim = 1;
          Options o(isa, algorithm);
          (f.divides ? o.temperatures : o.scales) = &own;
          (f.divides ? o.scale : o.temperature) = f.of_all;
          return softmaxlib_run(function, &from, &result, 1, &axis, &o);
        };
        ASSERT_EQ(run(to, SOFTMAXLIB_ALGORITHM_AUTO), SOFTMAXLIB_OK);
        ASSERT_EQ(run(wanted, SOFTMAXLIB_TWO_PASS), SOFTMAXLIB_OK);
        for (size_t r = 0; r < kRows; ++r)
          ASSERT_TRUE(y[r] == want[r] || (y[r] != y[r] && want[r] != want[r]))
              << "function " << function << " factors " << f.of_rows << " and " << f.of_all
              << " on " << softmaxlib_isa_name(isa) << ": " << y[r] << ", not " << want[r];
      }
    }
}

// Rows side by side whose products leave the range of double, which an infinite slope outweighs:
// the same in a tile, where there is scratch for one, as without.
TEST(Options, InfiniteSlopeOfHugeProducts) {
  constexpr int64_t kBeside = 64, kElements = 3, kQueries = 4;
  constexpr int64_t kShape[] = {kQueries, kElements, kBeside}, kRows[] = {kQueries, kBeside};
  const int32_t axis = 1;
  std::vector<float> x(kQueries * kElements * kBeside);
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 7) - 3;
  double slope = kInf, sink = 0.5;
  const softmaxlib_array from = {x.data(), SOFTMAXLIB_F32, 3, kShape, nullptr};
  const softmaxlib_array slopes = {&slope, SOFTMAXLIB_F64, 0, nullptr, nullptr};
  const softmaxlib_array sinks = {&sink, SOFTMAXLIB_F64, 0, nullptr, nullptr};  // no batches
  const std::vector<char> scratch_bytes(1 << 22);
  void* const scratch = const_cast<char*>(
      scratch_bytes.data() + (64 - reinterpret_cast<uintptr_t>(scratch_bytes.data()) % 64) % 64);
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_isa isa : isas()) {
      const bool reduces = function == SOFTMAXLIB_LOGSUMEXP;
      std::vector<float> y[2];
      for (const int in_tile : {0, 1}) {
        y[in_tile].resize(x.size());
        const softmaxlib_array to = {y[in_tile].data(), SOFTMAXLIB_F32, reduces ? 2 : 3,
                                     reduces ? kRows : kShape, nullptr};
        Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
        o.scale = 1.7e308;
        o.temperature = 1e-308;
        o.alibi_slopes = &slopes;
        o.sinks = &sinks;
        o.query_axis = 0;
        o.causal_offset = -1;
        if (in_tile) o.scratch = scratch, o.scratch_size = 1 << 21;
        ASSERT_EQ(softmaxlib_run(function, &from, &to, 1, &axis, &o), SOFTMAXLIB_OK);
      }
      for (size_t i = 0; i < x.size(); ++i)
        ASSERT_TRUE(y[0][i] == y[1][i] || (y[0][i] != y[0][i] && y[1][i] != y[1][i]))
            << "function " << function << " on " << softmaxlib_isa_name(isa) << ": " << y[0][i]
            << " and in a tile " << y[1][i];
    }
}

}  // namespace
}  // namespace softmaxlib::test
