// What a call costs beside its kernel: the same row by softmaxlib_run and by the kernel alone, with
// the job prepared beforehand. Batches of calls take turns; medians over all rounds, in ns a call.
//   softmaxlib_call_overhead [elements ...]   64 unless told
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "kernel_table.hpp"
#include "rows/layout.hpp"
#include "rows/schedule.hpp"

namespace {

using namespace softmaxlib;

constexpr int kRounds = 501, kCalls = 200;

template <class F>
double ns_per_call(F call) {
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) call();
  const std::chrono::duration<double, std::nano> taken = std::chrono::steady_clock::now() - start;
  return taken.count() / kCalls;
}

double median(std::vector<double>& times) {
  std::nth_element(times.begin(), times.begin() + kRounds / 2, times.end());
  return times[kRounds / 2];
}

bool measure(softmaxlib_isa isa, int64_t n) {
  std::vector<float> x(static_cast<size_t>(n)), y(x.size());
  for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13) - 6;
  const softmaxlib_array in = {x.data(), SOFTMAXLIB_F32, 1, &n, nullptr};
  const softmaxlib_array out = {y.data(), SOFTMAXLIB_F32, 1, &n, nullptr};
  const int32_t axis = 0;
  softmaxlib_options options = SOFTMAXLIB_OPTIONS_INIT;
  options.isa = isa;
  size_t scratch = 0;
  if (softmaxlib_scratch_size(SOFTMAXLIB_SOFTMAX, &in, &out, 1, &axis, &options, &scratch) ||
      scratch) {
    fprintf(stderr, "%lld elements need scratch: take fewer\n", static_cast<long long>(n));
    return false;
  }

  Job job;
  if (lay_out(SOFTMAXLIB_SOFTMAX, &in, &out, 1, &axis, options, &job)) return false;
  const Schedule schedule = choose_schedule(SOFTMAXLIB_SOFTMAX, job, options, true);
  job.tile = schedule.tile;
  job.streaming = schedule.streaming;
  job.split = 0;
  job.report = nullptr;
  const KernelEntry& kernel =
      table_of(isa)->kernels[SOFTMAXLIB_SOFTMAX][schedule.kernel][SOFTMAXLIB_F32];

  std::vector<double> alone, whole;
  for (int round = 0; round < kRounds; ++round) {
    alone.push_back(ns_per_call([&] { kernel.run(job, 0, job.rows, nullptr); }));
    whole.push_back(
        ns_per_call([&] { softmaxlib_run(SOFTMAXLIB_SOFTMAX, &in, &out, 1, &axis, &options); }));
  }
  const double a = median(alone), w = median(whole);
  printf("%-8s %6lld  %9.1f  %14.1f  %9.1f   %s\n", softmaxlib_isa_name(isa),
         static_cast<long long>(n), a, w, w - a, kernel.name);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int64_t> sizes;
  for (int i = 1; i < argc; ++i) sizes.push_back(atoll(argv[i]));
  if (sizes.empty()) sizes = {64};
  printf("ISA          n  kernel ns  softmaxlib_run  more, ns   kernel\n");
  bool good = true;
  for (const int64_t n : sizes)
    for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank)
      good &= n > 0 && measure(isa, n);
  return good ? 0 : 1;
}
