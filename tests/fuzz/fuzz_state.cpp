// Streaming states: rows in chunks of any sizes, some of them merged, each update on another ISA;
// the states' bytes are the same whatever ISA made them, results are near those of one call and
// within the reference's bounds for it. States of arbitrary bytes are refused or taken, never a
// crash.
#include "reference.hpp"

namespace softmaxlib::fuzz {
namespace {

using States = std::vector<softmaxlib_state>;

struct Stream : Call {
  softmaxlib_function function;
  softmaxlib_dtype to;
  std::vector<int64_t> cuts;  // where chunks end, the last at the end of the axis
  std::vector<bool> merged;   // has a state of its own, merged in
  size_t axis;

  std::string description() const {
    std::string s = "function " + std::to_string(function) + " to dtype " + std::to_string(to) +
                    ", chunks end at";
    for (size_t i = 0; i < cuts.size(); ++i)
      s += " " + std::to_string(cuts[i]) + (merged[i] ? " (merged)" : "");
    return s + ", " + text();
  }
};

void draw_stream(Input& in, Stream* s) {
  s->function = static_cast<softmaxlib_function>(in.below(5));
  s->to = static_cast<softmaxlib_dtype>(in.below(4));
  draw_call(in, true, false, in.one_in(2) ? static_cast<softmaxlib_dtype>(in.below(13)) : s->to, s);
  // A chunk's bias and mask would have to be cut as well; what is per row stays.
  s->options.bias = s->options.where = nullptr;
  s->operands.erase(std::remove_if(s->operands.begin(), s->operands.end(),
                                   [](const Operand& o) { return !o.per_row; }),
                    s->operands.end());
  s->axis = static_cast<size_t>(std::find(s->reduced.begin(), s->reduced.end(), true) -
                                s->reduced.begin());
  const int64_t n = s->shape[s->axis];
  const int64_t step = in.one_in(4) ? SOFTMAXLIB_STATE_CHUNK : 1 + in.below(400);
  for (int64_t at = 0; s->cuts.size() < 12;) {
    at = std::min(n, at + (in.one_in(8) ? 0 : step * (1 + in.below(3))));
    s->cuts.push_back(at);
    if (at == n) break;
  }
  s->cuts.back() = n;
  for (size_t i = 0; i < s->cuts.size(); ++i) s->merged.push_back(in.one_in(3));
}

softmaxlib_isa isa_of(size_t turn) {
  int32_t count = 0;
  while (softmaxlib_isa_available(count)) ++count;
  return softmaxlib_isa_available(static_cast<int32_t>(turn % static_cast<size_t>(count)));
}

// The part of x between two cuts, as a view; shape and strides are kept by the caller.
softmaxlib_array part_of(const Stream& s, const Array& array, int64_t from, int64_t to,
                         Shape* shape, Shape* strides) {
  *shape = array.shape();
  *strides = array.all_strides();
  (*shape)[s.axis] = to - from;
  Shape first(array.shape().size(), 0);
  first[s.axis] = from;
  return {array.at(first), array.dtype(), static_cast<int32_t>(shape->size()), shape->data(),
          strides->data()};
}

void require_ok(softmaxlib_status status, const char* what) {
  if (status) fail(std::string(what) + ": " + softmaxlib_status_text(status));
}

States update(const Stream& s, int64_t rows, size_t first_isa) {
  States states(static_cast<size_t>(rows)), other(states.size());
  require_ok(softmaxlib_state_begin(s.function, s.to, rows, states.data()), "begin");
  int64_t from = 0;
  for (size_t i = 0; i < s.cuts.size(); from = s.cuts[i++]) {
    softmaxlib_options o = s.options;
    o.isa = isa_of(first_isa + i);
    const OfferedScratch scratch(s.cuts[i] - from, i, &o);
    Shape shape, strides;
    const softmaxlib_array x = part_of(s, *s.x, from, s.cuts[i], &shape, &strides);
    if (s.merged[i])
      require_ok(softmaxlib_state_begin(s.function, s.to, rows, other.data()), "begin");
    softmaxlib_state* const into = s.merged[i] ? other.data() : states.data();
    require_ok(softmaxlib_state_update(&x, into, 1, s.axes.data(), &o), "update");
    if (s.merged[i]) require_ok(softmaxlib_state_merge(rows, states.data(), other.data()), "merge");
  }
  return states;
}

// Bits of floats in their order.
int64_t ordered(const char* p, softmaxlib_dtype dtype) {
  const int64_t item = item_size(dtype);
  uint64_t bits = 0;
  memcpy(&bits, p, static_cast<size_t>(item));
  const uint64_t sign = uint64_t{1} << (8 * item - 1);
  return bits & sign ? -static_cast<int64_t>(bits & ~sign) : static_cast<int64_t>(bits);
}

// Results by two roads, each within the contract's bounds: as far apart at most as both together.
// A state has no room for a row with arguments beyond the range of double, and says NaN.
void check_near(const std::vector<char>& got, const std::vector<char>& wanted,
                softmaxlib_dtype dtype, const std::vector<bool>& may_be_nan, int64_t columns) {
  static constexpr int64_t kInfinity[] = {0x7f800000, 0x7ff0000000000000, 0x7c00, 0x7f80};
  const auto item = static_cast<size_t>(item_size(dtype));
  const int64_t most = item == 2 ? 2 : 10;
  for (size_t i = 0; i < got.size(); i += item) {
    const int64_t a = ordered(&got[i], dtype), b = ordered(&wanted[i], dtype);
    const bool nan = std::abs(a) > kInfinity[dtype];
    if (nan && may_be_nan[i / item / static_cast<size_t>(columns)]) continue;
    if (nan ? std::abs(b) > kInfinity[dtype] : std::abs(a - b) <= most) continue;
    fail("element " + std::to_string(i / item) + " (others, queries, columns) is " +
         std::to_string(a - b) + " units of the last place from that of one call");
  }
}

// The logarithm of a sum has the bound of logsumexp, or for the sums of the others that of their
// results.
void check_log_sums(const Stream& s, const Plain& plain, const std::vector<double>& log_sums) {
  const softmaxlib_dtype inside = test::arithmetic_of(s.to);
  const Real ulps = bound_of_any(
      s.function == SOFTMAXLIB_LOG_SOFTMAX ? SOFTMAXLIB_LOGSUMEXP : s.function, inside);
  for_plain_rows(plain, [&](int64_t number, int64_t other, int64_t query) {
    const ReferenceRow row =
        row_of(s.function, s.to, *plain.x, plain.options, plain.columns(), other, query);
    if (!row.judged || row.beyond) return;
    const Distribution d = test::distribution_of(s.function, row.z, row.in);
    const Real want = d.valid() && is_stablemax(s.function) ? d.log_stable_sum() : d.log_sum();
    const Real tolerance =
        d.valid() ? tolerance_of_log_sum(ulps, want, inside) + doubt_of_sum(row, d) : 0;
    require_near(log_sums[static_cast<size_t>(number)], want, tolerance, SOFTMAXLIB_F64,
                 std::string("sum of ") + test::kFunctionNames[s.function], number);
  });
}

void check_valid(const Stream& s) {
  const Plain plain(s);
  const States states = update(s, plain.rows(), 0);
  for (size_t turn = 1; isa_of(turn) != isa_of(0); ++turn) {
    const States again = update(s, plain.rows(), turn);
    require(states.empty() ||
                !memcmp(states.data(), again.data(), states.size() * sizeof(softmaxlib_state)),
            "states differ by the ISAs that made them");
  }
  std::vector<double> log_sums(states.size());
  log_sums.reserve(1);
  require_ok(softmaxlib_state_finish(plain.rows(), states.data(), log_sums.data()), "finish");
  check_log_sums(s, plain, log_sums);
  if (s.function == SOFTMAXLIB_LOGSUMEXP) return;

  const softmaxlib_dtype to = s.to;
  std::vector<char> wanted(static_cast<size_t>(size_of(s.shape) * item_size(to)));
  wanted.reserve(1);
  const softmaxlib_array y = {wanted.data(), to, 3, plain.shape, nullptr};
  require_ok(softmaxlib_run(s.function, plain.x, &y, 1, &Plain::kAxis, &plain.options), "run");

  Input plainest(nullptr, 0);
  Array out(plainest, to, s.shape, Elements::kOwnMemory);
  int64_t from = 0;
  for (size_t i = 0; i < s.cuts.size(); from = s.cuts[i++]) {
    softmaxlib_options o = s.options;
    o.isa = isa_of(i);
    const OfferedScratch scratch(s.cuts[i] - from, i, &o);
    Shape shape, strides, out_shape, out_strides;
    const softmaxlib_array x = part_of(s, *s.x, from, s.cuts[i], &shape, &strides);
    const softmaxlib_array part = part_of(s, out, from, s.cuts[i], &out_shape, &out_strides);
    require_ok(softmaxlib_state_scale(&x, &part, states.data(), 1, s.axes.data(), &o), "scale");
  }
  const std::vector<char> got = s.plain_copy(out);
  std::vector<bool> may_be_nan(states.size());
  for_plain_rows(plain, [&](int64_t number, int64_t other, int64_t query) {
    const ReferenceRow row =
        row_of(s.function, to, *plain.x, plain.options, plain.columns(), other, query);
    may_be_nan[static_cast<size_t>(number)] = row.beyond;
  });
  check_near(got, wanted, to, may_be_nan, plain.columns());
  check_values(s.function, plain, got.data(), to);
}

// One state of any bytes, or a real one with some of them changed.
void check_any_bytes(Input& in) {
  softmaxlib_state states[2];
  const auto function = static_cast<softmaxlib_function>(in.below(5));
  const auto dtype = static_cast<softmaxlib_dtype>(in.below(4));
  require_ok(softmaxlib_state_begin(function, dtype, 2, states), "begin");
  float x[2] = {1, 2}, y[2];
  const int64_t n = 2;
  const softmaxlib_array xa = {x, SOFTMAXLIB_F32, 1, &n, nullptr};
  softmaxlib_array ya = {y, SOFTMAXLIB_F32, 1, &n, nullptr};
  if (in.one_in(2)) require_ok(softmaxlib_state_update(&xa, states, 0, nullptr, nullptr), "update");
  auto* const bytes = reinterpret_cast<unsigned char*>(states);
  for (int64_t changes = in.below(6); changes > 0; --changes)
    bytes[in.below(sizeof(states))] = static_cast<unsigned char>(in.bytes(1));
  if (in.one_in(4))
    for (unsigned char& byte : *reinterpret_cast<unsigned char(*)[sizeof(states)]>(bytes))
      byte = static_cast<unsigned char>(in.bytes(1));
  describe = [&states] {
    std::string s = "two states:";
    char hex[4];
    for (const softmaxlib_state& state : states)
      for (size_t i = 0; i < sizeof(state); ++i) {
        snprintf(hex, sizeof(hex), "%s%02x", i % 8 ? "" : " ",
                 reinterpret_cast<const unsigned char*>(&state)[i]);
        s += hex;
      }
    return s + "\n";
  };
  double log_sums[2];
  softmaxlib_state copy = states[0];
  require(known(softmaxlib_state_finish(2, states, log_sums)), "finish: unknown status");
  require(known(softmaxlib_state_merge(1, &copy, states + 1)), "merge: unknown status");
  require(known(softmaxlib_state_scale(&xa, &ya, states, 0, nullptr, nullptr)),
          "scale: unknown status");
  require(known(softmaxlib_state_update(&xa, states, 0, nullptr, nullptr)),
          "update: unknown status");
}

}  // namespace
}  // namespace softmaxlib::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace softmaxlib::fuzz;
  Input in(data, size);
  if (in.one_in(4)) {
    check_any_bytes(in);
  } else {
    Stream stream;
    draw_stream(in, &stream);
    describe = [&stream] { return stream.description(); };
    check_valid(stream);
  }
  describe = nullptr;
  return 0;
}
