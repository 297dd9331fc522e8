// Which kernel runs: the first ISA of the list that this CPU has, unless the caller names one.
#include <array>
#include <utility>

#include "host/cpu.hpp"
#include "registry/table.hpp"

namespace softmaxlib {

#define SOFTMAXLIB_ISA_ENTRY(name, isa, features) \
  KernelTable make_table_##name(const Tuning& tuning);
#include "isas.def"
#undef SOFTMAXLIB_ISA_ENTRY

namespace {

struct Entry {
  const char* name;
  softmaxlib_isa isa;
  uint32_t features;
  KernelTable (*make)(const Tuning& tuning);
};

constexpr Entry kEntries[] = {
#define SOFTMAXLIB_ISA_ENTRY(name, isa, features) {#name, isa, features, make_table_##name},
#include "isas.def"
#undef SOFTMAXLIB_ISA_ENTRY
};
constexpr int kCount = sizeof(kEntries) / sizeof(kEntries[0]);

bool runs(const Entry& entry) {
  static const uint32_t features = cpu_features();
  return (features & entry.features) == entry.features;
}

struct Tables {
  KernelTable table[kCount];
  Tables() : table() {
    for (int i = 0; i < kCount; ++i)
      if (runs(kEntries[i])) table[i] = kEntries[i].make(tuning_of_cpu());
  }
};

}  // namespace

const KernelTable* table_of(softmaxlib_isa isa) {
  static const Tables tables;
  for (int i = 0; i < kCount; ++i)
    if ((isa == SOFTMAXLIB_ISA_AUTO || isa == kEntries[i].isa) && runs(kEntries[i]))
      return &tables.table[i];
  return nullptr;
}

namespace {

// "stem_storage" for every storage, as reports want it: a string that stays.
struct Names {
  char of[kStorages][48] = {};

  constexpr explicit Names(const char* first, const char* second = nullptr) {
    for (int s = 0; s < kStorages; ++s) {
      int at = append(of[s], 0, first);
      if (second) at = append(of[s], append(of[s], at, "_"), second);
      append(of[s], append(of[s], at, "_"), kDtypeInfo[s].name);
    }
  }
  static constexpr int append(char* to, int at, const char* text) {
    while (*text) to[at++] = *text++;
    return at;
  }
};

constexpr int kRegistered = sizeof(kRegistry) / sizeof(kRegistry[0]);
template <int... kIndices>
constexpr std::array<Names, kRegistered> names_of_registry(
    std::integer_sequence<int, kIndices...>) {
  return {Names(kRegistry[kIndices].function_name, kRegistry[kIndices].schedule_name)...};
}
constexpr std::array<Names, kRegistered> kRegistryNames =
    names_of_registry(std::make_integer_sequence<int, kRegistered>());

constexpr Names kCallNames[] = {
#define SOFTMAXLIB_KERNEL(function, algorithm, storages)
#define SOFTMAXLIB_ROWS_KERNEL(function, schedule, algorithm)
#define SOFTMAXLIB_CALL(name, kernel) Names(#name),
#include "registry/kernels.def"
#undef SOFTMAXLIB_KERNEL
#undef SOFTMAXLIB_ROWS_KERNEL
#undef SOFTMAXLIB_CALL
};

#define SOFTMAXLIB_FUNCTION(name, NAME, element, finish) \
  {Names(#name, "backward"), Names(#name, "state_update"), Names(#name, "state_scale")},
constexpr Names kFunctionNames[][3] = {
#include "registry/functions.def"
};
#undef SOFTMAXLIB_FUNCTION

}  // namespace

NamedKernel kernel_of(const KernelTable& table, softmaxlib_function function, int schedule,
                      softmaxlib_dtype storage) {
  const Registered* const r = registered(function, schedule, storage);
  const auto at = static_cast<size_t>(r - kRegistry);
  return {table.run[function][schedule][storage], kRegistryNames[at].of[storage], r->algorithm};
}
NamedKernel kernel_of(const KernelTable& table, registry::OtherCall call,
                      softmaxlib_dtype storage) {
  return {table.others[call][storage], kCallNames[call].of[storage], SOFTMAXLIB_ALGORITHM_AUTO};
}
NamedKernel backward_of(const KernelTable& table, softmaxlib_function function,
                        softmaxlib_dtype storage) {
  return {table.backward[function][storage], kFunctionNames[function][0].of[storage],
          SOFTMAXLIB_ALGORITHM_AUTO};
}
NamedKernel update_of(const KernelTable& table, softmaxlib_function function,
                      softmaxlib_dtype storage) {
  return {table.states[function].update[storage], kFunctionNames[function][1].of[storage],
          SOFTMAXLIB_ALGORITHM_AUTO};
}
NamedKernel scale_of(const KernelTable& table, softmaxlib_function function,
                     softmaxlib_dtype storage) {
  return {table.states[function].scale[storage], kFunctionNames[function][2].of[storage],
          SOFTMAXLIB_ALGORITHM_AUTO};
}

bool exp_sweep(softmaxlib_isa isa, bool accurate, uint32_t first, uint64_t count,
               ExpSweep* result) {
  const KernelTable* table = table_of(isa);
  if (table) *result = table->exp_sweep(accurate, first, count);
  return table != nullptr;
}

bool roofline(softmaxlib_isa isa, Roofline kind, const void* x, void* y, size_t bytes) {
  const KernelTable* table = table_of(isa);
  if (table) table->roofline(kind, x, y, bytes);
  return table != nullptr;
}

size_t pass_scratch(int64_t n) {
  return static_cast<size_t>(scratch_bytes(n, SOFTMAXLIB_F32, false, true));
}

bool run_pass(softmaxlib_isa isa, Pass pass, bool streaming, const float* x, float* y, int64_t n,
              void* scratch) {
  const KernelTable* table = table_of(isa);
  if (table) table->pass(pass, streaming, x, y, n, static_cast<char*>(scratch));
  return table != nullptr;
}

}  // namespace softmaxlib

extern "C" {

softmaxlib_isa softmaxlib_isa_compiled(int32_t rank) {
  using namespace softmaxlib;
  return rank >= 0 && rank < kCount ? kEntries[rank].isa : SOFTMAXLIB_ISA_AUTO;
}

softmaxlib_isa softmaxlib_isa_available(int32_t rank) {
  using namespace softmaxlib;
  for (const Entry& entry : kEntries)
    if (runs(entry) && rank-- == 0) return entry.isa;
  return SOFTMAXLIB_ISA_AUTO;
}

const char* softmaxlib_isa_name(softmaxlib_isa isa) {
  switch (isa) {
    case SOFTMAXLIB_ISA_SCALAR: return "scalar";
    case SOFTMAXLIB_ISA_AVX2: return "avx2";
    case SOFTMAXLIB_ISA_AVX512: return "avx512";
    default: return nullptr;
  }
}

int64_t softmaxlib_cache_size(int32_t level) { return softmaxlib::cache_size(level); }

const char* softmaxlib_version(void) { return SOFTMAXLIB_VERSION_STRING; }

const char* softmaxlib_compiler(void) { return SOFTMAXLIB_COMPILER_STRING; }

}  // extern "C"
