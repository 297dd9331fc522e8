// How fast the machine moves bytes: rows like those of STREAM, and what the others are measured
// against.
#include <algorithm>
#include <chrono>
#include <map>
#include <tuple>

#include "bench.hpp"

namespace softmaxlib::bench {
namespace {

// One pass over an array or both, in as many parts as the library makes.
struct Stream {
  softmaxlib_isa isa;
  Roofline kind;
  int64_t bytes;
  int32_t threads;
  bool in_place = false;

  int64_t parts() const { return threads > 1 ? 4 * threads : 1; }
  int64_t edge(int64_t i) const { return i == parts() ? bytes : i * bytes / parts() / 64 * 64; }
  void part(int64_t i) const {
    const int64_t from = edge(i);
    roofline(isa, kind, (in_place ? y() : x()) + from, y() + from,
             static_cast<size_t>(edge(i + 1) - from));
  }
  void operator()() const {
    if (threads == 1) return part(0);
    Stream self = *this;
    softmaxlib_pool_parallel_for(
        pool(), parts(), [](void* s, int64_t i) { static_cast<Stream*>(s)->part(i); }, &self);
  }
};

double median_seconds(const std::function<void()>& call, const Case& c) {
  using Clock = std::chrono::steady_clock;
  const auto timed = [&](int64_t repeats) {
    if (c.cold()) evict(c.bytes);
    const Clock::time_point start = Clock::now();
    for (int64_t i = 0; i < repeats; ++i) call();
    return std::chrono::duration<double>(Clock::now() - start).count() /
           static_cast<double>(repeats);
  };
  timed(1);
  constexpr double kSample = 1e-3;
  const int64_t repeats =
      c.cold() ? 1 : std::max<int64_t>(1, static_cast<int64_t>(kSample / timed(1)));
  std::vector<double> samples;
  for (int i = 0; i < 15; ++i) samples.push_back(timed(repeats));
  std::nth_element(samples.begin(), samples.begin() + 7, samples.end());
  return samples[7];
}

}  // namespace

double seconds_of(Floor floor, const Case& c) {
  static std::map<std::tuple<Floor, int64_t, int32_t, bool>, double> known;
  double& least = known[{floor, c.bytes, c.threads, c.cold()}];
  if (least > 0) return least;
  const auto pass = [&](Roofline kind) {
    return Stream{SOFTMAXLIB_ISA_AUTO, kind, c.bytes, c.threads, floor == Floor::kInPlace};
  };
  const Stream read = pass(Roofline::kRead), plain = pass(Roofline::kCopy),
               streaming = pass(Roofline::kStreamingCopy);
  if (floor == Floor::kRead) return least = median_seconds(read, c);
  const auto with = [&](const Stream& copy) {
    return median_seconds(
        [&] {
          if (floor == Floor::kReadThenCopy) read();
          copy();
        },
        c);
  };
  return least = std::min(with(plain), with(streaming));
}

void register_stream() {
  struct {
    const char* name;
    Roofline kind;
    int64_t halves;  // of an array, that it moves
  } const rows[] = {{"read", Roofline::kRead, 2},
                    {"copy", Roofline::kCopy, 4},
                    {"scale", Roofline::kScale, 4},
                    {"triad", Roofline::kTriad, 3},
                    {"streaming_copy", Roofline::kStreamingCopy, 4}};
  for (const auto& row : rows)
    for (const softmaxlib_isa isa : isas()) {
      if (row.kind == Roofline::kStreamingCopy && !has_streaming_stores(isa)) continue;
      for (const Case& c : cases(sizeof(float))) {
        const int64_t n = c.bytes / int64_t{sizeof(float)};
        const Work work = {n, c.bytes / 2 * row.halves, 0, Floor::kNone};
        const Stream stream = {isa, row.kind, c.bytes, c.threads};
        add(std::string("stream/") + row.name + "/" + softmaxlib_isa_name(isa) + tail_of(c, n), c,
            [=](benchmark::State& state) {
              fill_x(SOFTMAXLIB_F32);
              run(state, c, work, stream);
            });
      }
    }
}

}  // namespace softmaxlib::bench
