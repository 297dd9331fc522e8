// A fuzz target without libFuzzer, for any compiler: files of inputs, or random inputs of a seed.
//   fuzz_run_random [--seconds=S] [--seed=N] [FILE...]
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <iterator>

#include "fuzz.hpp"

namespace {

std::vector<uint8_t> input;

// Keeps the input of a crash, as libFuzzer does.
void keep_input(int signal) {
  const int file = open("crash-input", O_CREAT | O_TRUNC | O_WRONLY, 0644);
  if (file < 0 || write(file, input.data(), input.size()) < 0) _exit(1);
  const char text[] = "the input is in ./crash-input\n";
  if (write(2, text, sizeof(text) - 1) < 0) _exit(1);
  raise(signal);
}

}  // namespace

int main(int argc, char** argv) {
  double seconds = 5;
  uint64_t seed = 1;
  std::vector<const char*> files;
  for (int i = 1; i < argc; ++i)
    if (!strncmp(argv[i], "--seconds=", 10)) seconds = atof(argv[i] + 10);
    else if (!strncmp(argv[i], "--seed=", 7)) seed = strtoull(argv[i] + 7, nullptr, 10);
    else files.push_back(argv[i]);
  struct sigaction action = {};
  action.sa_handler = keep_input;
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  for (const int s : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT}) sigaction(s, &action, nullptr);

  for (const char* name : files) {
    std::ifstream file(name, std::ios::binary);
    input.assign(std::istreambuf_iterator<char>(file), {});
    printf("%s: %zu bytes\n", name, input.size());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  if (!files.empty()) return 0;
  std::mt19937_64 random(seed);
  const auto stop = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  int64_t inputs = 0;
  for (; std::chrono::steady_clock::now() < stop; ++inputs) {
    input.resize(random() % 160);
    for (uint8_t& byte : input) byte = static_cast<uint8_t>(random());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  printf("%lld inputs of seed %llu, no finding\n", static_cast<long long>(inputs),
         static_cast<unsigned long long>(seed));
}
