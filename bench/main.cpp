// softmaxlib_bench: google-benchmark's own options, one more, and what machine this is.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <fstream>

#include "bench.hpp"

namespace softmaxlib::bench {
namespace {

constexpr char kHelp[] =
    "softmaxlib_bench: speed of every kernel, of each pass alone, and of the machine.\n"
    "bench/README.md says what the names and counters mean.\n"
    "          [--offset=<bytes>]  both arrays start so many bytes past a page (0); NumPy's: 16\n"
    "Defaults that differ from google-benchmark's: --benchmark_min_time=0.02,\n"
    "--benchmark_counters_tabular=true.\n\n";

// What stands after `name` in the first line of a file that starts with it.
std::string first_line(const char* path, const std::string& name = "") {
  std::ifstream file(path);
  for (std::string line; std::getline(file, line);) {
    if (line.compare(0, name.size(), name)) continue;
    line.erase(0, name.size());
    const size_t start = line.find_first_not_of(" \t:");
    return start == std::string::npos ? "unknown" : line.substr(start);
  }
  return "unknown";
}

std::string cache_text(int32_t level, int64_t assumed) {
  const int64_t found = softmaxlib_cache_size(level);
  return std::to_string((found ? found : assumed) >> 10) + " KiB" + (found ? "" : " (assumed)");
}

std::string names_of(softmaxlib_isa (*rank)(int32_t)) {
  std::string names;
  for (int32_t i = 0; const softmaxlib_isa isa = rank(i); ++i)
    names += (i ? " " : "") + std::string(softmaxlib_isa_name(isa));
  return names;
}

// The number of CPUs and the load average are google-benchmark's own lines.
void add_context(const std::string& offset) {
  const Caches assumed = caches();
  const std::pair<const char*, std::string> lines[] = {
      {"cpu", first_line("/proc/cpuinfo", "model name")},
      {"governor", first_line("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")},
      {"cache_l1d", cache_text(1, assumed.l1)},
      {"cache_l2", cache_text(2, assumed.l2)},
      {"cache_l3", cache_text(3, assumed.last)},
      {"page_size", std::to_string(sysconf(_SC_PAGESIZE)) + " bytes"},
      {"transparent_hugepages", first_line("/sys/kernel/mm/transparent_hugepage/enabled")},
      {"compiler", softmaxlib_compiler()},
      {"softmaxlib", softmaxlib_version()},
      {"isas_compiled", names_of(softmaxlib_isa_compiled)},
      {"isas_available", names_of(softmaxlib_isa_available)},
      {"all_threads", std::to_string(all_threads())},
      {"offset", offset + " bytes past a page"},
      {"roofline_share", kFloorText}};
  for (const auto& [key, value] : lines) benchmark::AddCustomContext(key, value);
}

}  // namespace
}  // namespace softmaxlib::bench

int main(int argc, char** argv) {
  using namespace softmaxlib::bench;
  char min_time[] = "--benchmark_min_time=0.02", tabular[] = "--benchmark_counters_tabular=true";
  std::vector<char*> arguments = {argv[0], min_time, tabular};
  std::string offset = "0";
  bool all = true;
  constexpr char kOffset[] = "--offset=";
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--help") fputs(kHelp, stdout);
    if (argument.compare(0, sizeof(kOffset) - 1, kOffset) == 0) {
      offset = argument.substr(sizeof(kOffset) - 1);
      continue;
    }
    for (const char* partial : {"--help", "--benchmark_filter", "--benchmark_list_tests"})
      all &= argument.compare(0, strlen(partial), partial) != 0;
    arguments.push_back(argv[i]);
  }
  char* end;
  const long bytes = strtol(offset.c_str(), &end, 10);
  if (offset.empty() || *end || bytes < 0 || bytes >= 4096 || bytes % 8) {
    fprintf(stderr, "--offset must be a multiple of 8 from 0 to 4088, got %s\n", offset.c_str());
    return 2;
  }
  set_offset(bytes);

  int count = static_cast<int>(arguments.size());
  arguments.push_back(nullptr);
  benchmark::Initialize(&count, arguments.data());
  if (benchmark::ReportUnrecognizedArguments(count, arguments.data())) return 2;
  add_context(offset);
  register_stream();
  register_passes();
  register_kernels();
  register_rows();
  if (all)
    fputs(
        "All of it takes some 15 minutes; --benchmark_filter=REGEX runs a part "
        "(bench/README.md).\n",
        stderr);
  benchmark::RunSpecifiedBenchmarks();
  if (all)
    for (const std::string& name : rows_kernels_that_never_ran())
      fprintf(stderr, "registered, but chosen for none of the shapes: %s\n", name.c_str());
  benchmark::Shutdown();
}
