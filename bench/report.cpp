// How a benchmark is timed and what it reports.
#include <algorithm>
#include <chrono>

#include "bench.hpp"

namespace softmaxlib::bench {
namespace {

// Eviction takes longer than what is timed, so their number is fixed: a thousand of the smallest.
int64_t cold_iterations(const Case& c) {
#if defined(__SSE2__)
  return std::clamp<int64_t>((int64_t{8} << 20) / c.bytes, 16, 1000);
#else
  (void)c;
  return 16;
#endif
}

}  // namespace

void run(benchmark::State& state, const Case& c, const Work& work,
         const std::function<void()>& call) {
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  call();
  Seconds total{0};
  if (c.cold()) {
    for (auto _ : state) {
      evict(c.bytes);
      const Clock::time_point start = Clock::now();
      call();
      const Seconds one = Clock::now() - start;
      state.SetIterationTime(one.count());
      total += one;
    }
  } else {
    const Clock::time_point start = Clock::now();
    for (auto _ : state) call();
    total = Clock::now() - start;
  }
  const double seconds = total.count() / static_cast<double>(state.iterations());
  const double per_ns = 1e-9 / seconds;
  state.counters["ns_per_1000"] = 1e3 / per_ns / static_cast<double>(work.elements);
  if (work.moved) state.counters["moved_GB_per_s"] = static_cast<double>(work.moved) * per_ns;
  if (work.algorithmic)
    state.counters["algorithmic_GB_per_s"] = static_cast<double>(work.algorithmic) * per_ns;
  if (work.floor != Floor::kNone)
    state.counters["roofline_share"] = seconds_of(work.floor, c) / seconds;
}

std::string tail_of(const Case& c, int64_t elements) {
  return "/" + c.level + "/n:" + std::to_string(elements) + "/threads:" + std::to_string(c.threads);
}

void add(const std::string& name, const Case& c, std::function<void(benchmark::State&)> body) {
  auto* const added = benchmark::RegisterBenchmark(name.c_str(), std::move(body));
  if (c.cold()) added->UseManualTime()->Iterations(cold_iterations(c));
  else added->UseRealTime();
}

}  // namespace softmaxlib::bench
