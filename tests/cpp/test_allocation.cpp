// No memory is asked for while a call runs; where a pool is made, a lack of it is a status.
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/wait.h>

#include <atomic>
#include <thread>

#include "support.hpp"

// Every allocation of the process passes here: operator new and the C library's own included.
namespace {
std::atomic<bool> counting{false};
std::atomic<int64_t> allocations{0}, outstanding{0};
std::atomic<int64_t> fail_from{INT64_MAX}, fail_to{INT64_MAX};  // the n-th since the count began

bool refused() {
  if (!counting) return false;
  const int64_t n = allocations++;
  if (n < fail_from || n >= fail_to) return false;
  errno = ENOMEM;
  return true;
}
void* counted(void* p) {
  if (counting && p) ++outstanding;
  return p;
}
}  // namespace

extern "C" {
void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

void* malloc(size_t n) { return refused() ? nullptr : counted(__libc_malloc(n)); }
void* calloc(size_t n, size_t size) {
  return refused() ? nullptr : counted(__libc_calloc(n, size));
}
void* realloc(void* p, size_t n) {
  if (refused()) return nullptr;
  return p ? __libc_realloc(p, n) : counted(__libc_realloc(p, n));
}
void* memalign(size_t a, size_t n) { return refused() ? nullptr : counted(__libc_memalign(a, n)); }
void* aligned_alloc(size_t a, size_t n) { return memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) { return (*p = memalign(a, n)) ? 0 : ENOMEM; }
void free(void* p) {
  if (counting && p) --outstanding;
  __libc_free(p);
}
}

namespace softmaxlib::test {
namespace {

// Counts from here to the end of its life.
class Count {
 public:
  explicit Count(int64_t first_failure = INT64_MAX, int64_t failures = 0) {
    fail_from = first_failure;
    fail_to = first_failure + failures;
    allocations = outstanding = 0;
    counting = true;
  }
  ~Count() { stop(); }
  Count(const Count&) = delete;
  Count& operator=(const Count&) = delete;
  static void stop() { counting = false; }
};

softmaxlib_status run_counted(softmaxlib_function function, const softmaxlib_array& x,
                              const softmaxlib_array& out, int32_t axis, const Options& options,
                              int64_t* asked) {
  Options o = options;
  size_t bytes = 0;
  if (const auto s = softmaxlib_scratch_size(function, &x, &out, 1, &axis, &o, &bytes)) return s;
  void* scratch = aligned_alloc(64, (bytes + 64) / 64 * 64);
  o.scratch = scratch;
  o.scratch_size = bytes;
  softmaxlib_status status;
  {
    const Count count;
    size_t again = 0;
    status = softmaxlib_scratch_size(function, &x, &out, 1, &axis, &o, &again);
    if (!status) status = softmaxlib_run(function, &x, &out, 1, &axis, &o);
    *asked = allocations;
  }
  softmaxlib_plan* plan = nullptr;
  if (!status) status = softmaxlib_plan_create(function, &x, &out, 1, &axis, &o, &plan);
  free(scratch);
  if (status) return status;
  softmaxlib_buffers b = SOFTMAXLIB_BUFFERS_INIT;
  b.scratch_size = softmaxlib_plan_scratch_size(plan);
  b.scratch = aligned_alloc(64, (b.scratch_size + 64) / 64 * 64);
  b.x = x.data, b.out = out.data;
  if (o.bias) b.bias = o.bias->data, b.where = o.where->data, b.temperatures = o.temperatures->data;
  b.parallel_for = o.parallel_for;
  b.parallel_context = o.parallel_context;
  {
    const Count count;
    status = softmaxlib_plan_run(plan, &b);
    *asked += allocations;
  }
  free(b.scratch);
  softmaxlib_plan_destroy(plan);
  return status;
}

// Stays the first: the first call of a process.
TEST(Allocation, NoneInTheFirstCall) {
  float x[64] = {1, 2, 3}, y[64];
  const int64_t n = 64;
  const softmaxlib_array xa = {x, SOFTMAXLIB_F32, 1, &n, nullptr};
  const softmaxlib_array ya = {y, SOFTMAXLIB_F32, 1, &n, nullptr};
  softmaxlib_status status;
  int64_t asked;
  {
    const Count count;
    status = softmaxlib_run(SOFTMAXLIB_SOFTMAX, &xa, &ya, 0, nullptr, nullptr);
    asked = allocations;
  }
  ASSERT_EQ(status, SOFTMAXLIB_OK);
  EXPECT_EQ(asked, 0);
}

TEST(Allocation, TheCountCounts) {
  static int* volatile p;  // or the compiler leaves both out
  int64_t asked, kept;
  {
    const Count count;
    p = new int;
    kept = outstanding;
    delete p;
    p = static_cast<int*>(aligned_alloc(64, 64));
    free(p);
    kept += 10 * outstanding;
    asked = allocations;
  }
  EXPECT_EQ(asked, 2);
  EXPECT_EQ(kept, 1);
}

TEST(Allocation, NoneInAnyCall) {
  softmaxlib_pool* pool = nullptr;
  ASSERT_EQ(softmaxlib_pool_create(3, &pool), SOFTMAXLIB_OK);
  const struct {
    int64_t rows, n;
    int32_t axis;
  } shapes[] = {{3, 7, 1},   {200, 48, 1},  {9, 300, 1},    {5, 3000, 1},   {1, 40000, 1},
                {64, 40, 0}, {3000, 50, 0}, {300000, 1, 0}, {1, 300000, 1}, {5, 70000, 1}};
  std::vector<std::string> kernels;
  int parallel = 0;
  for (const softmaxlib_function function : functions())
    for (const softmaxlib_dtype dtype : kFloatTypes)
      for (const auto& s : shapes)
        for (const int variant : {0, 1, 2, 3}) {  // plain, in place, options, converted
          const bool reduces = function == SOFTMAXLIB_LOGSUMEXP;
          if (variant == 1 && reduces) continue;
          const softmaxlib_dtype from = variant == 3 ? SOFTMAXLIB_I16 : dtype;
          const auto values = make_row(Pattern::kWide, s.rows * s.n, SOFTMAXLIB_F16, 1);
          auto x = encode_all(values, from);
          std::vector<char> y(values.size() * 8);
          const int64_t shape[] = {s.rows, s.n}, one = 1;
          const softmaxlib_array xa = {x.data(), from, 2, shape, nullptr};
          const softmaxlib_array ya = {variant == 1 ? x.data() : y.data(), dtype, reduces ? 1 : 2,
                                       reduces ? shape + 1 - s.axis : shape, nullptr};
          std::vector<uint8_t> mask(static_cast<size_t>(s.n), 1);
          double temperature = 2;
          const softmaxlib_array where = {mask.data(), SOFTMAXLIB_BOOL, 1, shape + 1, nullptr};
          const softmaxlib_array scalar = {&temperature, SOFTMAXLIB_F64, 1, &one, nullptr};
          for (const bool threads : {false, true})
            for (const softmaxlib_algorithm algorithm :
                 {SOFTMAXLIB_ALGORITHM_AUTO, SOFTMAXLIB_THREE_PASS_RELOAD}) {
              softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
              Options o(SOFTMAXLIB_ISA_AUTO, algorithm);
              if (variant == 2) o.where = &where, o.bias = o.temperatures = &scalar;
              if (threads) {
                o.num_threads = 3;
                o.parallel_for = softmaxlib_pool_parallel_for;
                o.parallel_context = pool;
              }
              o.report = &report;
              int64_t asked = -1;
              ASSERT_EQ(run_counted(function, xa, ya, s.axis, o, &asked), SOFTMAXLIB_OK);
              ASSERT_EQ(asked, 0) << kFunctionNames[function] << " " << kDtypeNames[dtype] << " "
                                  << s.rows << " x " << s.n << " variant " << variant << " by "
                                  << report.kernel;
              kernels.push_back(report.kernel);
              parallel += report.tasks > 1;
            }
        }
  softmaxlib_pool_destroy(pool);
  EXPECT_GT(parallel, 100);
  for (const char* schedule : {"in_lanes", "batched", "pipelined", "columns"})
    EXPECT_TRUE(test::isas().front() == SOFTMAXLIB_ISA_SCALAR ||  // which has none of them
                std::any_of(kernels.begin(), kernels.end(),
                            [&](const std::string& name) {
                              return name.find(schedule) != std::string::npos;
                            }))
        << schedule;
}

TEST(Allocation, NoneInStatesGradientsAndSampling) {
  softmaxlib_pool* pool = nullptr;
  ASSERT_EQ(softmaxlib_pool_create(3, &pool), SOFTMAXLIB_OK);
  Options o;
  o.num_threads = 3;
  o.parallel_for = softmaxlib_pool_parallel_for;
  o.parallel_context = pool;
  constexpr int64_t kRows = 5, kColumns = 60000, kTop = 3;
  const int64_t shape[] = {kRows, kColumns}, top_shape[] = {kRows, kTop};
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    const auto x = encode_all(make_row(Pattern::kWide, kRows * kColumns, SOFTMAXLIB_F16, 1), dtype);
    std::vector<char> y(x.size()), weights(8 * kRows * kTop);
    std::vector<softmaxlib_state> states(kRows), others(kRows);
    std::vector<double> numbers(kRows, 0.5);
    std::vector<int64_t> indices(kRows * kTop);
    const softmaxlib_array xa = {const_cast<char*>(x.data()), dtype, 2, shape, nullptr};
    const softmaxlib_array ya = {y.data(), dtype, 2, shape, nullptr};
    const softmaxlib_array na = {numbers.data(), SOFTMAXLIB_F64, 1, shape, nullptr};
    const softmaxlib_array ia = {indices.data(), SOFTMAXLIB_I64, 1, shape, nullptr};
    const softmaxlib_array wa = {weights.data(), dtype, 2, top_shape, nullptr};
    const softmaxlib_array ta = {indices.data(), SOFTMAXLIB_I64, 2, top_shape, nullptr};
    const softmaxlib_filter filter = {sizeof(filter), 50, 0.9, 0.01};
    const int32_t axis = 1;
    softmaxlib_status s[11] = {};
    int64_t asked;
    {
      const Count count;
      for (auto* const to : {&states, &others}) {
        s[0] |= softmaxlib_state_begin(SOFTMAXLIB_SOFTMAX, dtype, kRows, to->data());
        s[1] |= softmaxlib_state_update(&xa, to->data(), 1, &axis, &o);
      }
      s[2] = softmaxlib_state_scale(&xa, &ya, states.data(), 1, &axis, &o);
      s[3] = softmaxlib_state_merge(kRows, states.data(), others.data());
      s[4] = softmaxlib_sample(&xa, &na, &ia, axis, nullptr, &o);
      s[5] = softmaxlib_sample(&xa, &na, &ia, axis, &filter, &o);
      s[6] = softmaxlib_topk_softmax(&xa, &wa, &ta, axis, 0, &o);
      s[7] = softmaxlib_topk_softmax(&xa, &wa, &ta, axis, 1, &o);
      s[8] = softmaxlib_state_finish(kRows, states.data(), numbers.data());
      s[9] = softmaxlib_orthogonal_gradient(&ya, &xa, &ya, 1, &o);
      for (const softmaxlib_function function : functions()) {
        const softmaxlib_array& of_row = function == SOFTMAXLIB_LOGSUMEXP ? na : xa;
        s[10] |= softmaxlib_backward(function, &of_row, &xa, &of_row, &ya, 1, &axis, &o);
      }
      asked = allocations;
    }
    for (const softmaxlib_status status : s) ASSERT_EQ(status, SOFTMAXLIB_OK);
    EXPECT_EQ(asked, 0) << kDtypeNames[dtype];
  }
  softmaxlib_pool_destroy(pool);
}

TEST(Allocation, PlanWithoutMemory) {
  const int64_t n = 64;
  const softmaxlib_array a = {nullptr, SOFTMAXLIB_F32, 1, &n, nullptr};
  softmaxlib_plan* plan = nullptr;
  softmaxlib_status failed, made;
  int64_t asked, kept;
  {
    const Count count(0, 1);
    failed = softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &a, &a, 0, nullptr, nullptr, &plan);
  }
  EXPECT_EQ(failed, SOFTMAXLIB_ERROR_MEMORY);
  ASSERT_EQ(plan, nullptr);
  {
    const Count count;
    made = softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &a, &a, 0, nullptr, nullptr, &plan);
    asked = allocations;
    softmaxlib_plan_destroy(plan);
    kept = outstanding;
  }
  EXPECT_EQ(made, SOFTMAXLIB_OK);
  EXPECT_EQ(asked, 1);
  EXPECT_EQ(kept, 0);
}

int64_t resident_bytes() {
  long pages = 0;
  FILE* const file = fopen("/proc/self/statm", "r");
  if (!file || fscanf(file, "%*d %ld", &pages) != 1) abort();
  fclose(file);
  return pages * sysconf(_SC_PAGESIZE);
}

// Many small calls, and pools that come and go: memory stays as it is.
TEST(Allocation, Soak) {
  const auto work = [](int pools) {
    const int64_t shape[] = {4, 16};
    float x[64] = {1, 2, 3}, y[64];
    const softmaxlib_array xa = {x, SOFTMAXLIB_F32, 2, shape, nullptr};
    const softmaxlib_array ya = {y, SOFTMAXLIB_F32, 2, shape, nullptr};
    Options o;
    o.num_threads = 3;
    o.parallel_for = softmaxlib_pool_parallel_for;
    for (int i = 0; i < pools; ++i) {
      softmaxlib_pool* pool = nullptr;
      ASSERT_EQ(softmaxlib_pool_create(3, &pool), SOFTMAXLIB_OK);
      o.parallel_context = pool;
      for (int call = 0; call < 5000; ++call) {
        const int32_t axis = call % 2;
        o.temperature = 1 + call % 3;
        ASSERT_EQ(softmaxlib_run(call % 5 ? SOFTMAXLIB_SOFTMAX : SOFTMAXLIB_LOG_SOFTMAX, &xa, &ya,
                                 1, &axis, &o),
                  SOFTMAXLIB_OK);
      }
      softmaxlib_pool_destroy(pool);
    }
  };
  work(20);
  const int64_t before = resident_bytes();
  work(200);
  EXPECT_LT(resident_bytes() - before, 1 << 18);
}

// A pool made while the n-th request for memory fails, and with it `failures` in a row: no pool, an
// error, and nothing left behind.
void make_pools(int64_t failures) {
  for (const bool warm : {false, true})
    for (int64_t n = 0;; ++n) {
      softmaxlib_pool* pool = nullptr;
      softmaxlib_status status;
      int64_t kept, asked;
      {
        const Count count(n, failures);
        status = softmaxlib_pool_create(4, &pool);
        fail_from = fail_to = INT64_MAX;
        asked = allocations;
        softmaxlib_pool_destroy(pool);
        kept = outstanding;
      }
      if (warm) {
        ASSERT_EQ(kept, 0) << "leaked where allocation " << n << " of " << asked << " fails";
      }
      if (status == SOFTMAXLIB_OK) {
        ASSERT_LE(asked, n);
        ASSERT_GE(n, 3) << "a pool needs some";
        break;
      }
      ASSERT_EQ(status, SOFTMAXLIB_ERROR_MEMORY);
      ASSERT_EQ(pool, nullptr);
    }
}
TEST(Allocation, PoolWithoutOneAllocation) { make_pools(1); }
TEST(Allocation, PoolWithoutMemory) { make_pools(1 << 20); }

// Threads whose stacks find no room.
TEST(Allocation, PoolWithoutRoomForThreads) {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit limit = {rlim_t{1} << 28, rlim_t{1} << 28};
    softmaxlib_pool* pool = nullptr;
    if (setrlimit(RLIMIT_AS, &limit)) _exit(2);
    if (softmaxlib_pool_create(1000, &pool) != SOFTMAXLIB_ERROR_MEMORY || pool) _exit(3);
    _exit(softmaxlib_pool_create(2, &pool) == SOFTMAXLIB_OK && pool ? 0 : 4);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}

}  // namespace
}  // namespace softmaxlib::test
