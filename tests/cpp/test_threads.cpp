// The same bits however the work is spread, and a pool that survives what callers do to it.
#include <sys/wait.h>

#include <atomic>
#include <thread>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

// Ways to run tasks; each counts them, so that no test passes without any.
struct Spread {
  softmaxlib_parallel_for parallel_for;
  const char* name;
};

std::atomic<int64_t> tasks_run{0};

void reversed(void*, int64_t count, softmaxlib_task task, void* argument) {
  tasks_run += count;
  for (int64_t i = count; i-- > 0;) task(argument, i);
}
void thread_per_task(void*, int64_t count, softmaxlib_task task, void* argument) {
  tasks_run += count;
  std::vector<std::thread> threads;
  for (int64_t i = 0; i < count; ++i) threads.emplace_back(task, argument, i);
  for (std::thread& thread : threads) thread.join();
}
void pooled(void* pool, int64_t count, softmaxlib_task task, void* argument) {
  tasks_run += count;
  softmaxlib_pool_parallel_for(pool, count, task, argument);
}

class Pool {
 public:
  explicit Pool(int32_t threads) {
    EXPECT_EQ(softmaxlib_pool_create(threads, &pool_), SOFTMAXLIB_OK);
  }
  ~Pool() { softmaxlib_pool_destroy(pool_); }
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;
  softmaxlib_pool* get() const { return pool_; }

 private:
  softmaxlib_pool* pool_ = nullptr;
};

std::vector<char> make_rows(Pattern pattern, int64_t rows, int64_t n, softmaxlib_dtype dtype) {
  std::vector<char> x;
  for (int64_t r = 0; r < rows; ++r) {
    const auto row = encode_all(make_row(pattern, n, dtype, static_cast<uint32_t>(r)), dtype);
    x.insert(x.end(), row.begin(), row.end());
  }
  return x;
}

// Of rows of n floats.
std::vector<char> serial_softmax(const std::vector<char>& x, int64_t rows, int64_t n) {
  std::vector<char> y(x.size());
  EXPECT_EQ(run_rows(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x.data(), y.data(), rows, n, Options()),
            SOFTMAXLIB_OK);
  return y;
}

class Threads : public testing::TestWithParam<softmaxlib_function> {};

TEST_P(Threads, SameBits) {
  const softmaxlib_function function = GetParam();
  const Spread spreads[] = {{pooled, "pool"}, {reversed, "reversed"}, {thread_per_task, "threads"}};
  const Pool two(2), five(5);
  size_t turn = 0;
  int spread_rows = 0, split_rows = 0;  // calls that really were parallel, one way and the other
  for (const softmaxlib_dtype dtype : kFloatTypes) {
    const int64_t block = block_elements(dtype);
    const struct {
      int64_t rows, n;
    } shapes[] = {
        {1, 4 * block - 5}, {3, 4 * block + 1}, {1, 20 * block + 7}, {7, 20011}, {300, 501}};
    for (const auto& shape : shapes)
      for (const Pattern pattern : {Pattern::kWide, Pattern::kSteep, Pattern::kMasked}) {
        if (shape.n > 5 * block && pattern != Pattern::kSteep) continue;
        const auto x = make_rows(pattern, shape.rows, shape.n, dtype);
        const size_t bytes = static_cast<size_t>(result_elements(function, shape.n) * shape.rows *
                                                 item_size_of(dtype));
        std::vector<char> wanted(bytes);
        ASSERT_EQ(
            run_rows(function, dtype, x.data(), wanted.data(), shape.rows, shape.n, Options()),
            SOFTMAXLIB_OK);
        for (const softmaxlib_isa isa : isas())
          for (const softmaxlib_algorithm algorithm : algorithms_of(function, dtype))
            for (const int32_t threads : {2, 5}) {
              const Spread& spread = spreads[turn++ % 3];
              softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
              Options o(isa, algorithm,
                        turn % 2 ? SOFTMAXLIB_STORE_PLAIN : SOFTMAXLIB_STORE_STREAMING);
              o.num_threads = threads;
              o.parallel_for = spread.parallel_for;
              o.parallel_context = threads == 2 ? two.get() : five.get();
              o.report = &report;
              std::vector<char> y(bytes);
              tasks_run = 0;
              ASSERT_EQ(run_rows(function, dtype, x.data(), y.data(), shape.rows, shape.n, o),
                        SOFTMAXLIB_OK);
              ASSERT_TRUE(same_bits(y, wanted, dtype))
                  << spread.name << " " << describe(o) << " rows " << shape.rows << " n "
                  << shape.n;
              ASSERT_TRUE(report.tasks == 1 || tasks_run >= report.tasks);
              (report.tasks > 1 && shape.rows > 1 ? spread_rows : split_rows) += report.tasks > 1;
              ASSERT_EQ(report.isa, isa);
            }
      }
  }
  const auto least = 5 * static_cast<int64_t>(isas().size());
  EXPECT_GT(spread_rows, least);
  EXPECT_GT(split_rows, least);
}

// In place and with options, split over blocks.
TEST_P(Threads, InPlaceAndOptions) {
  const softmaxlib_function function = GetParam();
  if (function == SOFTMAXLIB_LOGSUMEXP) GTEST_SKIP() << "has no place of its own";
  const Pool pool(2);
  for (const softmaxlib_dtype dtype : kFloatTypes)
    for (const bool options : {false, true})
      for (const softmaxlib_algorithm algorithm : algorithms_of(function, dtype)) {
        const int64_t n = 20 * block_elements(dtype) + 77;
        const auto x = make_rows(Pattern::kSteep, 1, n, dtype);
        std::vector<char> wanted(x.size());
        const float bias = 0.75f;
        const int64_t one = 1;
        const softmaxlib_array bias_array = {const_cast<float*>(&bias), SOFTMAXLIB_F32, 1, &one,
                                             nullptr};
        Options o(SOFTMAXLIB_ISA_AUTO, algorithm);
        if (options) o.bias = &bias_array, o.temperature = 1.5;
        ASSERT_EQ(run_rows(function, dtype, x.data(), wanted.data(), 1, n, o), SOFTMAXLIB_OK);
        o.num_threads = 2;
        o.parallel_for = pooled;
        o.parallel_context = pool.get();
        auto y = x;
        ASSERT_EQ(run_rows(function, dtype, y.data(), y.data(), 1, n, o), SOFTMAXLIB_OK);
        ASSERT_TRUE(same_bits(y, wanted, dtype)) << describe(o) << " options " << options;
      }
}

INSTANTIATE_TEST_SUITE_P(Functions, Threads, testing::ValuesIn(functions()),
                         [](const auto& test) { return std::string(kFunctionNames[test.param]); });

TEST(Pool, RunsEveryTaskOnce) {
  for (const int32_t threads : {1, 2, 5}) {
    const Pool pool(threads);
    for (const int64_t count : {0, 1, 2, 3, 100, 1000}) {
      std::vector<std::atomic<int>> times(static_cast<size_t>(count));
      softmaxlib_pool_parallel_for(
          pool.get(), count,
          [](void* a, int64_t i) {
            ++(*static_cast<std::vector<std::atomic<int>>*>(a))[static_cast<size_t>(i)];
          },
          &times);
      for (const auto& t : times) ASSERT_EQ(t, 1);
    }
  }
}

TEST(Pool, NullRunsSerially) {
  std::vector<int64_t> order;
  softmaxlib_pool_parallel_for(
      nullptr, 4, [](void* a, int64_t i) { static_cast<std::vector<int64_t>*>(a)->push_back(i); },
      &order);
  EXPECT_EQ(order, (std::vector<int64_t>{0, 1, 2, 3}));
}

// Several callers at once share one pool.
TEST(Pool, ConcurrentCalls) {
  const Pool pool(3);
  const int64_t n = 20011, rows = 8;
  const auto x = make_rows(Pattern::kWide, rows, n, SOFTMAXLIB_F32);
  const auto wanted = serial_softmax(x, rows, n);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller)
    callers.emplace_back([&] {
      std::vector<char> y(x.size());
      for (int round = 0; round < 10; ++round) {
        Options o;
        o.num_threads = 3;
        o.parallel_for = softmaxlib_pool_parallel_for;
        o.parallel_context = pool.get();
        const auto status =
            run_rows(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x.data(), y.data(), rows, n, o);
        if (status || y != wanted) ++wrong;
      }
    });
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

// A task that calls the pool it runs on.
TEST(Pool, NestedCalls) {
  const Pool pool(2);
  struct Nested {
    softmaxlib_pool* pool;
    std::atomic<int> count{0};
  } nested{pool.get()};
  softmaxlib_pool_parallel_for(
      pool.get(), 4,
      [](void* argument, int64_t) {
        softmaxlib_pool_parallel_for(
            static_cast<Nested*>(argument)->pool, 5,
            [](void* inner, int64_t) { ++static_cast<Nested*>(inner)->count; }, argument);
      },
      &nested);
  EXPECT_EQ(nested.count, 20);
}

// Threads that end at once after a call, some of them while others still use the pool; it outlives
// the thread that made it.
TEST(Pool, CallersComeAndGo) {
  const int64_t n = 20011, rows = 8;
  const auto x = make_rows(Pattern::kWide, rows, n, SOFTMAXLIB_F32);
  const auto wanted = serial_softmax(x, rows, n);
  softmaxlib_pool* pool = nullptr;
  std::thread([&] { EXPECT_EQ(softmaxlib_pool_create(3, &pool), SOFTMAXLIB_OK); }).join();
  std::atomic<int> right{0}, running{0};
  constexpr int kCallers = 60;
  for (int caller = 0; caller < kCallers; ++caller) {
    while (running >= 4) std::this_thread::yield();
    ++running;
    std::thread([&] {
      Options o;
      o.num_threads = 3;
      o.parallel_for = softmaxlib_pool_parallel_for;
      o.parallel_context = pool;
      std::vector<char> y(x.size());
      right += !run_rows(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x.data(), y.data(), rows, n, o) &&
               y == wanted;
      --running;
    }).detach();
  }
  while (running) std::this_thread::yield();
  EXPECT_EQ(right, kCallers);
  std::thread([&] { softmaxlib_pool_destroy(pool); }).join();
}

#if !defined(__SANITIZE_THREAD__)
// Children forked while another thread's call is on the pool: they compute, and end.
TEST(Pool, ForkWhileBusy) {
  const Pool pool(3);
  const int64_t n = 20011, rows = 8;
  const auto x = make_rows(Pattern::kWide, rows, n, SOFTMAXLIB_F32);
  const auto wanted = serial_softmax(x, rows, n);
  Options o;
  o.num_threads = 3;
  o.parallel_for = softmaxlib_pool_parallel_for;
  o.parallel_context = pool.get();
  std::atomic<bool> stop{false};
  std::thread busy([&] {
    std::vector<char> y(x.size());
    while (!stop) run_rows(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x.data(), y.data(), rows, n, o);
  });
  const int64_t shape[] = {rows, n};
  std::vector<char> y(x.size());
  const softmaxlib_array xa = {const_cast<char*>(x.data()), SOFTMAXLIB_F32, 2, shape, nullptr};
  const softmaxlib_array ya = {y.data(), SOFTMAXLIB_F32, 2, shape, nullptr};
  const int32_t axis = 1;
  for (int i = 0; i < 30; ++i) {
    const pid_t child = fork();
    if (child == 0) {  // nothing here allocates: another thread may have held malloc's locks
      alarm(20);
      const auto status = softmaxlib_run(SOFTMAXLIB_SOFTMAX, &xa, &ya, 1, &axis, &o);
      softmaxlib_pool_destroy(pool.get());
      _exit(status == SOFTMAXLIB_OK && y == wanted ? 0 : 1);
    }
    int status = -1;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
  }
  stop = true;
  busy.join();
}

// A child forked after first use computes, and ends.
TEST(Pool, Fork) {
  const Pool pool(3);
  const int64_t n = 20011, rows = 8;
  const auto x = make_rows(Pattern::kWide, rows, n, SOFTMAXLIB_F32);
  Options o;
  o.num_threads = 3;
  o.parallel_for = softmaxlib_pool_parallel_for;
  o.parallel_context = pool.get();
  std::vector<char> wanted(x.size()), y(x.size());
  ASSERT_EQ(run_rows(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x.data(), wanted.data(), rows, n, o),
            SOFTMAXLIB_OK);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    const auto status =
        run_rows(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x.data(), y.data(), rows, n, o);
    softmaxlib_pool_destroy(pool.get());
    _exit(status == SOFTMAXLIB_OK && y == wanted ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status;
}
#endif

}  // namespace
}  // namespace softmaxlib::test
