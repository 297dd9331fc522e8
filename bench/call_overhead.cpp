// What a call costs beside its kernel: the same row by softmaxlib_run, by a plan, and by the kernel
// alone with the job prepared beforehand. Batches of calls take turns; medians over all rounds, in
// ns a call.
//   softmaxlib_call_overhead [elements ...]   64 unless told
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <chrono>
#include <vector>

#include "host/layout.hpp"
#include "host/schedule.hpp"
#include "registry/table.hpp"

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
  const Given list[] = {{kX, &in, Shape::kOfX, Dtypes::kAny, Access::kReads},
                        {kOut, &out, Shape::kOfX, Dtypes::kFloats, Access::kWrites}};
  if (lay_out(SOFTMAXLIB_SOFTMAX, {1, &axis}, list, SOFTMAXLIB_F32, options, &job) ||
      check_data(&job))
    return false;
  const Schedule schedule = choose_schedule(SOFTMAXLIB_SOFTMAX, job, options, true);
  job.tile = schedule.tile;
  job.streaming = schedule.streaming;
  job.split = 0;
  const NamedKernel kernel =
      kernel_of(*table_of(isa), SOFTMAXLIB_SOFTMAX, schedule.kernel, SOFTMAXLIB_F32);

  softmaxlib_plan* plan = nullptr;
  if (softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &in, &out, 1, &axis, &options, &plan))
    return false;
  std::vector<char> memory(softmaxlib_plan_scratch_size(plan) + 64);
  softmaxlib_buffers buffers = SOFTMAXLIB_BUFFERS_INIT;
  buffers.x = x.data();
  buffers.out = y.data();
  buffers.scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  buffers.scratch_size = softmaxlib_plan_scratch_size(plan);

  std::vector<double> alone, whole, planned;
  for (int round = 0; round < kRounds; ++round) {
    alone.push_back(ns_per_call([&] { kernel.run(job, 0, job.rows, nullptr); }));
    whole.push_back(
        ns_per_call([&] { softmaxlib_run(SOFTMAXLIB_SOFTMAX, &in, &out, 1, &axis, &options); }));
    planned.push_back(ns_per_call([&] { softmaxlib_plan_run(plan, &buffers); }));
  }
  softmaxlib_plan_destroy(plan);
  const double a = median(alone), w = median(whole), p = median(planned);
  printf("%-7s %7lld %8.1f %16.1f %+6.1f %10.1f %+6.1f  %s\n", softmaxlib_isa_name(isa),
         static_cast<long long>(n), a, w, w - a, p, p - a, kernel.name);
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<int64_t> sizes;
  for (int i = 1; i < argc; ++i) sizes.push_back(atoll(argv[i]));
  if (sizes.empty()) sizes = {64};
  printf("ISA           n   kernel   softmaxlib_run   more   plan_run   more  kernel\n");
  bool good = true;
  for (const int64_t n : sizes)
    for (int32_t rank = 0; const softmaxlib_isa isa = softmaxlib_isa_available(rank); ++rank)
      good &= n > 0 && measure(isa, n);
  return good ? 0 : 1;
}
