// A plan does what softmaxlib_run does, from many threads at once.
#include <thread>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

struct Plan {
  softmaxlib_plan* p = nullptr;
  ~Plan() { softmaxlib_plan_destroy(p); }
};

void run_backwards(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = count; i-- > 0;) task(argument, i);
}

struct Scratch {
  explicit Scratch(size_t bytes) : memory(bytes + 64, 0) {}
  void* data() { return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64); }
  std::vector<char> memory;
};

TEST(Plan, RunsAsTheCallDoes) {
  for (const softmaxlib_isa isa : isas())
    for (const softmaxlib_function function : functions())
      for (const softmaxlib_dtype dtype : kFloatTypes)
        for (const int64_t n : {1, 9, 64, 700, 40000})
          for (const bool in_place : {false, true})
            for (const bool with_options : {false, true}) {
              if (in_place && function == SOFTMAXLIB_LOGSUMEXP) continue;
              if (isa == SOFTMAXLIB_ISA_SCALAR && n == 40000 && dtype != SOFTMAXLIB_F32) continue;
              const int64_t rows = 5, item = item_size_of(dtype);
              const int64_t shape[] = {rows, n}, per_row[] = {rows, 1};
              std::vector<char> x;
              for (uint32_t r = 0; r < rows; ++r) {
                const auto row = encode_all(make_row(Pattern::kWide, n, dtype, r), dtype);
                x.insert(x.end(), row.begin(), row.end());
              }
              const double temperatures[] = {1, 2, 0.5, 3, 4};
              const float sinks[] = {1, 2, 3, 4, 5};
              softmaxlib_array t = {const_cast<double*>(temperatures), SOFTMAXLIB_F64, 2, per_row,
                                    nullptr};
              softmaxlib_array s = {const_cast<float*>(sinks), SOFTMAXLIB_F32, 2, per_row, nullptr};
              Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
              if (with_options) o.temperatures = &t, o.sinks = &s;
              softmaxlib_array xa = {x.data(), dtype, 2, shape, nullptr};
              std::vector<char> want(
                  static_cast<size_t>(rows * result_elements(function, n) * item));
              softmaxlib_array ya = {want.data(), dtype, function == SOFTMAXLIB_LOGSUMEXP ? 1 : 2,
                                     shape, nullptr};
              const int32_t axis = -1;
              ASSERT_EQ(run_array(function, xa, ya, 1, &axis, o), SOFTMAXLIB_OK);

              xa.data = ya.data = t.data = s.data = nullptr;
              o.num_threads = 3;
              Plan plan;
              ASSERT_EQ(softmaxlib_plan_create(function, &xa, &ya, 1, &axis, &o, &plan.p),
                        SOFTMAXLIB_OK);
              Scratch scratch(softmaxlib_plan_scratch_size(plan.p));
              std::vector<char> y(want.size(), 0x11);
              if (in_place) y = x;
              softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
              softmaxlib_buffers b = SOFTMAXLIB_BUFFERS_INIT;
              b.x = in_place ? y.data() : x.data();
              b.out = y.data();
              b.temperatures = temperatures;
              b.sinks = sinks;
              b.scratch = scratch.data();
              b.scratch_size = softmaxlib_plan_scratch_size(plan.p);
              b.report = &report;
              if (n % 2) b.parallel_for = run_backwards;
              ASSERT_EQ(softmaxlib_plan_run(plan.p, &b), SOFTMAXLIB_OK);
              ASSERT_EQ(y, want) << kFunctionNames[function] << " " << kDtypeNames[dtype] << " "
                                 << n << " in place " << in_place;
              ASSERT_EQ(report.isa, isa);
            }
}

TEST(Plan, FromManyThreads) {
  const int64_t n = 3000, rows = 4, shape[] = {rows, n};
  const softmaxlib_array described = {nullptr, SOFTMAXLIB_F32, 2, shape, nullptr};
  const int32_t axis = 1;
  Plan plan;
  ASSERT_EQ(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &described, &described, 1, &axis, nullptr,
                                   &plan.p),
            SOFTMAXLIB_OK);
  std::vector<int> bad(4, 0);
  std::vector<std::thread> threads;
  for (size_t k = 0; k < bad.size(); ++k)
    threads.emplace_back([&, k] {
      std::vector<char> x;
      for (uint32_t r = 0; r < rows; ++r) {
        const auto row = encode_all(
            make_row(Pattern::kWide, n, SOFTMAXLIB_F32, r + 10 * static_cast<uint32_t>(k)),
            SOFTMAXLIB_F32);
        x.insert(x.end(), row.begin(), row.end());
      }
      std::vector<char> want(x.size()), y(x.size());
      run_rows(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, x.data(), want.data(), rows, n, Options());
      Scratch scratch(softmaxlib_plan_scratch_size(plan.p));
      softmaxlib_buffers b = SOFTMAXLIB_BUFFERS_INIT;
      b.x = x.data();
      b.out = y.data();
      b.scratch = scratch.data();
      b.scratch_size = softmaxlib_plan_scratch_size(plan.p);
      for (int i = 0; i < 200; ++i) bad[k] += softmaxlib_plan_run(plan.p, &b) || y != want;
    });
  for (auto& t : threads) t.join();
  EXPECT_EQ(bad, std::vector<int>(4, 0));
}

TEST(Plan, Errors) {
  const int64_t n = 100000, two[] = {2, 2};
  const softmaxlib_array row = {nullptr, SOFTMAXLIB_F32, 1, &n, nullptr};
  const softmaxlib_array square = {nullptr, SOFTMAXLIB_F32, 2, two, nullptr};
  const softmaxlib_array bias = {nullptr, SOFTMAXLIB_F32, 1, &n, nullptr};
  softmaxlib_plan* plan = nullptr;
  EXPECT_EQ(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &row, &row, 0, nullptr, nullptr, nullptr),
            SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_plan_create(99, &row, &row, 0, nullptr, nullptr, &plan),
            SOFTMAXLIB_ERROR_FUNCTION);
  EXPECT_EQ(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &row, &square, 0, nullptr, nullptr, &plan),
            SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(plan, nullptr);
  softmaxlib_plan_destroy(nullptr);
  EXPECT_EQ(softmaxlib_plan_scratch_size(nullptr), 0u);

  Options o;
  o.algorithm = SOFTMAXLIB_TWO_PASS_RELOAD;
  o.bias = &bias;
  Plan biased;
  ASSERT_EQ(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &row, &row, 0, nullptr, &o, &biased.p),
            SOFTMAXLIB_OK);
  o.bias = nullptr;
  Plan reload;
  ASSERT_EQ(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &row, &row, 0, nullptr, &o, &reload.p),
            SOFTMAXLIB_OK);
  std::vector<float> x(static_cast<size_t>(2 * n)), y(static_cast<size_t>(n));
  softmaxlib_buffers b = SOFTMAXLIB_BUFFERS_INIT;
  EXPECT_EQ(softmaxlib_plan_run(nullptr, &b), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_plan_run(reload.p, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_plan_run(reload.p, &b), SOFTMAXLIB_ERROR_NULL);
  b.x = x.data();
  b.out = y.data();
  EXPECT_EQ(softmaxlib_plan_run(biased.p, &b), SOFTMAXLIB_ERROR_NULL) << "bias is missing";
  ASSERT_GT(softmaxlib_plan_scratch_size(reload.p), 0u);
  EXPECT_EQ(softmaxlib_plan_run(reload.p, &b), SOFTMAXLIB_ERROR_SCRATCH);
  b.out = x.data() + 5;
  EXPECT_EQ(softmaxlib_plan_run(reload.p, &b), SOFTMAXLIB_ERROR_OVERLAP);
  b.struct_size = 7;
  EXPECT_EQ(softmaxlib_plan_run(reload.p, &b), SOFTMAXLIB_ERROR_STRUCT_SIZE);
}

}  // namespace
}  // namespace softmaxlib::test
