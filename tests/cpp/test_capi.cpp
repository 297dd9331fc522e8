// The C interface: every status, scratch to the byte, sizes of structs, texts.
#include <xmmintrin.h>

#include <set>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

// A valid call that each test spoils in one place.
struct Call {
  std::vector<float> x = std::vector<float>(12, 0.5f), y = std::vector<float>(12);
  int64_t shape[2] = {3, 4};
  int32_t axis = 1;
  softmaxlib_array xa = {x.data(), SOFTMAXLIB_F32, 2, shape, nullptr};
  softmaxlib_array ya = {y.data(), SOFTMAXLIB_F32, 2, shape, nullptr};
  softmaxlib_function function = SOFTMAXLIB_SOFTMAX;
  Options o;

  softmaxlib_status run() {
    size_t bytes = 12345;
    const auto query = softmaxlib_scratch_size(function, &xa, &ya, 1, &axis, &o, &bytes);
    const auto status = softmaxlib_run(function, &xa, &ya, 1, &axis, &o);
    if (status != SOFTMAXLIB_ERROR_SCRATCH) {
      EXPECT_EQ(query, status) << "query and call disagree";
    }
    if (query) {
      EXPECT_EQ(bytes, 0u);
    }
    return status;
  }
  template <class Spoil>
  softmaxlib_status after(Spoil spoil) {
    spoil(*this);
    return run();
  }
};

TEST(CApi, ValidCall) {
  Call call;
  EXPECT_EQ(call.run(), SOFTMAXLIB_OK);
  for (const float p : call.y) EXPECT_FLOAT_EQ(p, 0.25f);
  // No options at all.
  call.y.assign(12, 0);
  EXPECT_EQ(softmaxlib_run(SOFTMAXLIB_SOFTMAX, &call.xa, &call.ya, 1, &call.axis, nullptr),
            SOFTMAXLIB_OK);
  for (const float p : call.y) EXPECT_FLOAT_EQ(p, 0.25f);
  // No axes: one distribution over the whole array.
  EXPECT_EQ(softmaxlib_run(SOFTMAXLIB_SOFTMAX, &call.xa, &call.ya, 0, nullptr, nullptr),
            SOFTMAXLIB_OK);
  for (const float p : call.y) EXPECT_FLOAT_EQ(p, 1.0f / 12);
}

TEST(CApi, Null) {
  Call call;
  const auto run = [&](const softmaxlib_array* x, const softmaxlib_array* y, const int32_t* axes) {
    return softmaxlib_run(SOFTMAXLIB_SOFTMAX, x, y, 1, axes, nullptr);
  };
  EXPECT_EQ(run(nullptr, &call.ya, &call.axis), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(run(&call.xa, nullptr, &call.axis), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(run(&call.xa, &call.ya, nullptr), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(softmaxlib_scratch_size(0, &call.xa, &call.ya, 1, &call.axis, nullptr, nullptr),
            SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(Call().after([](Call& c) { c.xa.data = nullptr; }), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(Call().after([](Call& c) { c.ya.data = nullptr; }), SOFTMAXLIB_ERROR_NULL);
  // An empty array needs no memory.
  EXPECT_EQ(Call().after([](Call& c) { c.shape[0] = 0, c.xa.data = c.ya.data = nullptr; }),
            SOFTMAXLIB_OK);
  EXPECT_EQ(softmaxlib_pool_create(1, nullptr), SOFTMAXLIB_ERROR_NULL);
  softmaxlib_pool_destroy(nullptr);
}

TEST(CApi, StructSize) {
  for (const size_t size :
       {size_t{0}, sizeof(softmaxlib_options) - 8, sizeof(softmaxlib_options) + 8})
    EXPECT_EQ(Call().after([&](Call& c) { c.o.struct_size = size; }), SOFTMAXLIB_ERROR_STRUCT_SIZE);
  softmaxlib_report report = {};
  EXPECT_EQ(Call().after([&](Call& c) { c.o.report = &report; }), SOFTMAXLIB_ERROR_STRUCT_SIZE);
}

TEST(CApi, UnknownEnumerators) {
  const auto status = [](auto spoil) { return Call().after(spoil); };
  for (const int32_t bad : {-1, 5, 1000, INT32_MAX, INT32_MIN}) {
    EXPECT_EQ(status([=](Call& c) { c.function = bad; }), SOFTMAXLIB_ERROR_FUNCTION);
    EXPECT_EQ(status([=](Call& c) { c.o.algorithm = bad; }), SOFTMAXLIB_ERROR_ALGORITHM);
    EXPECT_EQ(status([=](Call& c) { c.o.isa = bad; }), SOFTMAXLIB_ERROR_ISA);
    EXPECT_EQ(status([=](Call& c) { c.o.store = bad; }), SOFTMAXLIB_ERROR_STORE);
  }
  EXPECT_EQ(status([](Call& c) { c.o.num_threads = -1; }), SOFTMAXLIB_ERROR_THREADS);
  softmaxlib_pool* pool;
  for (const int32_t bad : {0, -1, 1 << 20})
    EXPECT_EQ(softmaxlib_pool_create(bad, &pool), SOFTMAXLIB_ERROR_THREADS);
  for (const softmaxlib_isa isa :
       {SOFTMAXLIB_ISA_SCALAR, SOFTMAXLIB_ISA_AVX2, SOFTMAXLIB_ISA_AVX512}) {
    const auto all = isas();
    const bool here = std::find(all.begin(), all.end(), isa) != all.end();
    EXPECT_EQ(status([=](Call& c) { c.o.isa = isa; }),
              here ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_ISA_UNSUPPORTED);
  }
}

TEST(CApi, Dtypes) {
  const int64_t one = 1;
  double value = 1;
  for (const int32_t bad : {-1, 13, INT32_MAX}) {
    EXPECT_EQ(Call().after([=](Call& c) { c.xa.dtype = bad; }), SOFTMAXLIB_ERROR_DTYPE);
    EXPECT_EQ(Call().after([=](Call& c) { c.ya.dtype = bad; }), SOFTMAXLIB_ERROR_DTYPE);
  }
  for (int32_t t = SOFTMAXLIB_F32; t <= SOFTMAXLIB_U64; ++t) {
    const bool is_float = t <= SOFTMAXLIB_BF16;
    const softmaxlib_array option = {&value, t, 1, &one, nullptr};
    if (!is_float) {
      EXPECT_EQ(Call().after([=](Call& c) { c.ya.dtype = t; }), SOFTMAXLIB_ERROR_DTYPE);
    }
    EXPECT_EQ(Call().after([&](Call& c) { c.o.bias = &option; }),
              is_float ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_DTYPE);
    EXPECT_EQ(Call().after([&](Call& c) { c.o.where = &option; }),
              t == SOFTMAXLIB_BOOL ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_DTYPE);
    if (t != SOFTMAXLIB_F64 && t != SOFTMAXLIB_F32) {
      EXPECT_EQ(Call().after([&](Call& c) { c.o.temperatures = &option; }), SOFTMAXLIB_ERROR_DTYPE);
    }
  }
}

TEST(CApi, Shapes) {
  int64_t other[] = {3, 5}, huge[] = {int64_t{1} << 40, int64_t{1} << 40};
  std::vector<int64_t> many(100, 1);
  EXPECT_EQ(Call().after([](Call& c) { c.xa.ndim = -1; }), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([](Call& c) { c.xa.shape = nullptr; }), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([](Call& c) { c.ya.ndim = 1; }), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([](Call& c) { c.shape[0] = -1; }), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([&](Call& c) { c.ya.shape = other; }), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([&](Call& c) { c.xa.shape = c.ya.shape = huge; }), SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([&](Call& c) { c.xa.shape = many.data(), c.xa.ndim = 65; }),
            SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([](Call& c) { c.function = SOFTMAXLIB_LOGSUMEXP; }),
            SOFTMAXLIB_ERROR_SHAPE);
  EXPECT_EQ(Call().after([](Call& c) { c.function = SOFTMAXLIB_LOGSUMEXP, c.ya.ndim = 1; }),
            SOFTMAXLIB_OK);
  EXPECT_EQ(Call().after([&](Call& c) {
    c.xa.shape = c.ya.shape = many.data(), c.xa.ndim = c.ya.ndim = 64;
  }),
            SOFTMAXLIB_OK);
}

TEST(CApi, Axes) {
  for (const int32_t bad : {2, -3, INT32_MAX, INT32_MIN})
    EXPECT_EQ(Call().after([=](Call& c) { c.axis = bad; }), SOFTMAXLIB_ERROR_AXIS) << bad;
  Call call;
  const int32_t twice[] = {1, -1}, three[] = {0, 1, 0};
  EXPECT_EQ(softmaxlib_run(0, &call.xa, &call.ya, 2, twice, nullptr), SOFTMAXLIB_ERROR_AXIS);
  EXPECT_EQ(softmaxlib_run(0, &call.xa, &call.ya, 3, three, nullptr), SOFTMAXLIB_ERROR_AXIS);
  EXPECT_EQ(softmaxlib_run(0, &call.xa, &call.ya, -1, three, nullptr), SOFTMAXLIB_ERROR_AXIS);
}

TEST(CApi, Temperature) {
  for (const double bad : {0.0, -0.0, -1.0, kInf, -kInf, kNaN}) {
    EXPECT_EQ(Call().after([=](Call& c) { c.o.temperature = bad; }), SOFTMAXLIB_ERROR_TEMPERATURE);
    double values[] = {1, bad, 1};
    const int64_t shape[] = {3, 1};
    const softmaxlib_array t = {values, SOFTMAXLIB_F64, 2, shape, nullptr};
    EXPECT_EQ(Call().after([&](Call& c) { c.o.temperatures = &t; }), SOFTMAXLIB_ERROR_TEMPERATURE);
  }
  float values[12];
  std::fill(values, values + 12, 2.0f);
  const int64_t along[] = {4}, wrong[] = {2, 1}, deep[] = {1, 1, 1}, rows[] = {3, 1};
  const softmaxlib_array bad[] = {{values, SOFTMAXLIB_F32, 1, along, nullptr},
                                  {values, SOFTMAXLIB_F32, 2, wrong, nullptr},
                                  {values, SOFTMAXLIB_F32, 3, deep, nullptr}};
  for (const softmaxlib_array& t : bad)
    EXPECT_EQ(Call().after([&](Call& c) { c.o.temperatures = &t; }), SOFTMAXLIB_ERROR_TEMPERATURE);
  const softmaxlib_array good = {values, SOFTMAXLIB_F32, 2, rows, nullptr};
  // The scalar is ignored where there is an array.
  EXPECT_EQ(Call().after([&](Call& c) { c.o.temperatures = &good, c.o.temperature = -1; }),
            SOFTMAXLIB_OK);
}

// Whether a temperature is valid does not depend on the caller's floating-point environment.
TEST(CApi, TemperatureUnderFlushToZero) {
  Call call;
  call.o.temperature = 1e-310;
  EXPECT_EQ(call.run(), SOFTMAXLIB_OK);
  const auto wanted = call.y;
  const unsigned saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8040u);
  const auto status = softmaxlib_run(call.function, &call.xa, &call.ya, 1, &call.axis, &call.o);
  _mm_setcsr(saved);
  EXPECT_EQ(status, SOFTMAXLIB_OK);
  EXPECT_EQ(call.y, wanted);
}

TEST(CApi, BiasAndWhere) {
  float values[12] = {};
  const int64_t bad[] = {3, 3}, deep[] = {1, 3, 4}, negative[] = {-1};
  for (const auto& [ndim, shape] :
       {std::pair<int32_t, const int64_t*>{2, bad}, {3, deep}, {1, negative}}) {
    const softmaxlib_array bias = {values, SOFTMAXLIB_F32, ndim, shape, nullptr};
    const softmaxlib_array where = {values, SOFTMAXLIB_BOOL, ndim, shape, nullptr};
    EXPECT_EQ(Call().after([&, b = &bias](Call& c) { c.o.bias = b; }), SOFTMAXLIB_ERROR_BIAS);
    EXPECT_EQ(Call().after([&, w = &where](Call& c) { c.o.where = w; }), SOFTMAXLIB_ERROR_WHERE);
  }
}

// What is written may be an array that is read under it, and must else be apart from all others.
TEST(CApi, OverlapInOtherCalls) {
  std::vector<float> memory(64, 0.25f);
  const int64_t shape[] = {3, 4};
  const int32_t axis = 1;
  const auto at = [&](int64_t i) {
    return softmaxlib_array{memory.data() + i, SOFTMAXLIB_F32, 2, shape, nullptr};
  };
  const auto grad = at(0), y = at(16), out = at(32);
  const auto backward = [&](const softmaxlib_array& g, const softmaxlib_array& to) {
    return softmaxlib_backward(SOFTMAXLIB_SOFTMAX, &g, nullptr, &y, &to, 1, &axis, nullptr);
  };
  EXPECT_EQ(backward(grad, out), SOFTMAXLIB_OK);
  EXPECT_EQ(backward(grad, grad), SOFTMAXLIB_OK);
  EXPECT_EQ(backward(grad, y), SOFTMAXLIB_OK);
  EXPECT_EQ(backward(grad, at(1)), SOFTMAXLIB_ERROR_OVERLAP) << "out begins inside of grad";
  EXPECT_EQ(backward(at(33), out), SOFTMAXLIB_ERROR_OVERLAP) << "grad begins inside of out";
  const int64_t turned[] = {4, 12};
  auto other = grad;
  other.strides = turned;
  EXPECT_EQ(backward(grad, other), SOFTMAXLIB_ERROR_OVERLAP) << "in another order";

  double uniforms[3] = {.1, .5, .9};
  alignas(8) int64_t indices[12] = {};
  const auto x = softmaxlib_array{indices, SOFTMAXLIB_F32, 2, shape, nullptr};
  const auto u = softmaxlib_array{uniforms, SOFTMAXLIB_F64, 1, shape, nullptr};
  const auto drawn = [&](void* to) {
    return softmaxlib_array{to, SOFTMAXLIB_I64, 1, shape, nullptr};
  };
  const auto sample = [&](const softmaxlib_array& to) {
    return softmaxlib_sample(&x, &u, &to, 1, nullptr, nullptr);
  };
  EXPECT_EQ(sample(drawn(indices + 6)), SOFTMAXLIB_OK);
  EXPECT_EQ(sample(drawn(indices + 5)), SOFTMAXLIB_ERROR_OVERLAP);
  EXPECT_EQ(sample(drawn(uniforms)), SOFTMAXLIB_ERROR_OVERLAP);
  const int64_t one[] = {3, 1};
  float weights[3];
  const auto w = softmaxlib_array{weights, SOFTMAXLIB_F32, 2, one, nullptr};
  const auto best = [&](void* to) { return softmaxlib_array{to, SOFTMAXLIB_I64, 2, one, nullptr}; };
  const auto topk = [&](const softmaxlib_array& to) {
    return softmaxlib_topk_softmax(&x, &w, &to, 1, 0, nullptr);
  };
  EXPECT_EQ(topk(best(indices + 6)), SOFTMAXLIB_OK);
  EXPECT_EQ(topk(best(indices + 5)), SOFTMAXLIB_ERROR_OVERLAP);
}

// Every call says which kernel ran, in a report that it fills in completely.
TEST(CApi, EveryCallReports) {
  const int64_t shape[] = {3, 4}, taken[] = {3, 2};
  float x[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, y[12], z[12] = {}, sums[3], two[6];
  double uniforms[3] = {.1, .5, .9}, losses[3];
  int64_t indices[6] = {0, 1, 2, 3, 0, 1}, drawn[3];
  const int32_t axis = 1;
  const auto of = [](void* data, softmaxlib_dtype dtype, int32_t ndim, const int64_t* dims) {
    return softmaxlib_array{data, dtype, ndim, dims, nullptr};
  };
  const auto xa = of(x, SOFTMAXLIB_F32, 2, shape), ya = of(y, SOFTMAXLIB_F32, 2, shape),
             za = of(z, SOFTMAXLIB_F32, 2, shape), la = of(sums, SOFTMAXLIB_F32, 1, shape),
             ua = of(uniforms, SOFTMAXLIB_F64, 1, shape), da = of(drawn, SOFTMAXLIB_I64, 1, shape),
             ea = of(losses, SOFTMAXLIB_F64, 1, shape), ia = of(indices, SOFTMAXLIB_I64, 2, taken),
             ca = of(indices, SOFTMAXLIB_I64, 1, shape), wa = of(two, SOFTMAXLIB_F32, 2, taken);
  for (const softmaxlib_isa isa : isas()) {
    softmaxlib_report report;
    softmaxlib_options o = SOFTMAXLIB_OPTIONS_INIT;
    o.isa = isa;
    o.report = &report;
    const auto reports = [&](softmaxlib_status status, const std::string& kernel) {
      EXPECT_EQ(status, SOFTMAXLIB_OK) << kernel;
      EXPECT_EQ(report.isa, isa) << kernel;
      EXPECT_EQ(report.tasks, 1) << kernel;
      EXPECT_EQ(report.store, SOFTMAXLIB_STORE_PLAIN) << kernel;
      EXPECT_EQ(report.kernel, kernel);
      report = {sizeof report, 99, 99, 99, 99, "of an earlier call"};
    };
    report = {sizeof report, 99, 99, 99, 99, "of an earlier call"};
    for (const Function& f : kFunctionInfo) {
      const auto& result = softmaxlib::reduces(f.code) ? la : ya;
      const std::string name = f.name;
      ASSERT_EQ(softmaxlib_run(f.code, &xa, &result, 1, &axis, &o), SOFTMAXLIB_OK);
      EXPECT_EQ(std::string(report.kernel).substr(0, name.size() + 1), name + "_");
      const auto& grad = softmaxlib::reduces(f.code) ? la : xa;
      reports(softmaxlib_backward(f.code, &grad, &xa, &result, &za, 1, &axis, &o),
              name + "_backward_f32");
      softmaxlib_state states[3];
      softmaxlib_state_begin(f.code, SOFTMAXLIB_F32, 3, states);
      reports(softmaxlib_state_update(&xa, states, 1, &axis, &o), name + "_state_update_f32");
      if (!softmaxlib::reduces(f.code))
        reports(softmaxlib_state_scale(&xa, &za, states, 1, &axis, &o), name + "_state_scale_f32");
    }
    reports(softmaxlib_sample(&xa, &ua, &da, 1, nullptr, &o), "sample_f32");
    reports(softmaxlib_topk_softmax(&xa, &wa, &ia, 1, 0, &o), "topk_softmax_f32");
    reports(softmaxlib_take_log_softmax(&xa, &ia, &wa, nullptr, 1, &o), "take_log_softmax_f32");
    reports(softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &xa, &ca, &ea, nullptr, 1, nullptr, &o),
            "cross_entropy_f32");
    reports(softmaxlib_cross_entropy(SOFTMAXLIB_STABLEMAX, &xa, &xa, &ea, &za, 1, nullptr, &o),
            "stablemax_cross_entropy_f32");
    reports(softmaxlib_scale_rows(&xa, &xa, &za, &o), "scale_rows_f32");
    reports(softmaxlib_orthogonal_gradient(&xa, &ya, &za, 1, &o), "orthogonal_gradient_f32");
  }
}

TEST(CApi, Overlap) {
  std::vector<float> memory(32, 0.5f);
  const auto at = [&](int64_t x, int64_t y) {
    return Call().after(
        [&](Call& c) { c.xa.data = memory.data() + x, c.ya.data = memory.data() + y; });
  };
  EXPECT_EQ(at(0, 0), SOFTMAXLIB_OK);
  EXPECT_EQ(at(0, 1), SOFTMAXLIB_ERROR_OVERLAP);
  EXPECT_EQ(at(1, 0), SOFTMAXLIB_ERROR_OVERLAP);
  EXPECT_EQ(at(11, 0), SOFTMAXLIB_ERROR_OVERLAP);
  EXPECT_EQ(at(12, 0), SOFTMAXLIB_OK);
  EXPECT_EQ(at(0, 12), SOFTMAXLIB_OK);
  // The same memory, but another order of its elements.
  const int64_t strides[] = {4, 12};
  EXPECT_EQ(Call().after([&](Call& c) { c.ya.data = c.xa.data, c.ya.strides = strides; }),
            SOFTMAXLIB_ERROR_OVERLAP);
}

// A serial parallel_for, to make a call that needs scratch.
void serially(void*, int64_t count, softmaxlib_task task, void* argument) {
  for (int64_t i = 0; i < count; ++i) task(argument, i);
}

TEST(CApi, Scratch) {
  const int64_t n = 5 * 65536 + 3;
  std::vector<float> x(static_cast<size_t>(n), 0.25f), y(x.size());
  Call call;
  call.shape[0] = 1, call.shape[1] = n;
  call.xa.data = x.data(), call.ya.data = y.data();
  for (const int32_t threads : {1, 2}) {
    call.o = Options();
    call.o.algorithm = SOFTMAXLIB_TWO_PASS_RELOAD;
    call.o.num_threads = threads;
    call.o.parallel_for = serially;
    size_t bytes = 0;
    ASSERT_EQ(softmaxlib_scratch_size(0, &call.xa, &call.ya, 1, &call.axis, &call.o, &bytes),
              SOFTMAXLIB_OK);
    ASSERT_GT(bytes, 0u);
    std::vector<char> memory(bytes + 128);
    char* scratch = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    call.o.scratch = scratch, call.o.scratch_size = bytes;
    EXPECT_EQ(call.run(), SOFTMAXLIB_OK);
    call.o.scratch_size = bytes - 1;
    EXPECT_EQ(call.run(), SOFTMAXLIB_ERROR_SCRATCH);
    call.o.scratch_size = 0;
    EXPECT_EQ(call.run(), SOFTMAXLIB_ERROR_SCRATCH);
    call.o.scratch = nullptr, call.o.scratch_size = bytes;
    EXPECT_EQ(call.run(), SOFTMAXLIB_ERROR_SCRATCH);
    call.o.scratch = scratch + 8;
    EXPECT_EQ(call.run(), SOFTMAXLIB_ERROR_SCRATCH);
  }
  // Small calls need none.
  size_t bytes = 1;
  Call small;
  EXPECT_EQ(softmaxlib_scratch_size(0, &small.xa, &small.ya, 1, &small.axis, nullptr, &bytes),
            SOFTMAXLIB_OK);
  EXPECT_EQ(bytes, 0u);
}

// A call that fails writes nothing.
TEST(CApi, ErrorsLeaveOutAlone) {
  Call call;
  call.y.assign(12, -7);
  call.o.temperature = -1;
  EXPECT_EQ(call.run(), SOFTMAXLIB_ERROR_TEMPERATURE);
  EXPECT_EQ(call.y, std::vector<float>(12, -7));
}

TEST(CApi, EmptyArrays) {
  softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
  EXPECT_EQ(Call().after([&](Call& c) { c.shape[1] = 0, c.o.report = &report; }), SOFTMAXLIB_OK);
  EXPECT_NE(report.kernel, nullptr);
  // logsumexp over nothing: -inf.
  Call call;
  call.function = SOFTMAXLIB_LOGSUMEXP, call.ya.ndim = 1, call.shape[1] = 0;
  EXPECT_EQ(call.run(), SOFTMAXLIB_OK);
  for (int i = 0; i < 3; ++i) EXPECT_EQ(call.y[static_cast<size_t>(i)], -INFINITY);
}

// Integers at the ends of their range, converted to double.
TEST(CApi, IntegersAsDoubles) {
  const int64_t n = 3;
  const uint64_t x[] = {UINT64_MAX, UINT64_MAX - 4096, 0};
  double y[3];
  const softmaxlib_array xa = {const_cast<uint64_t*>(x), SOFTMAXLIB_U64, 1, &n, nullptr};
  const softmaxlib_array ya = {y, SOFTMAXLIB_F64, 1, &n, nullptr};
  for (const softmaxlib_isa isa : isas()) {
    Options o(isa, SOFTMAXLIB_ALGORITHM_AUTO);
    ASSERT_EQ(softmaxlib_run(SOFTMAXLIB_SOFTMAX, &xa, &ya, 0, nullptr, &o), SOFTMAXLIB_OK);
    EXPECT_EQ(y[0], 1);
    EXPECT_EQ(y[1], 0);
    EXPECT_EQ(y[2], 0);
  }
}

TEST(CApi, Texts) {
  std::set<std::string> texts;
  for (softmaxlib_status s = SOFTMAXLIB_OK; s <= SOFTMAXLIB_ERROR_MEMORY; ++s) {
    ASSERT_NE(softmaxlib_status_text(s), nullptr);
    EXPECT_TRUE(texts.insert(softmaxlib_status_text(s)).second)
        << "twice: " << softmaxlib_status_text(s);
  }
  EXPECT_NE(softmaxlib_status_text(-1), nullptr);
  EXPECT_FALSE(texts.count(softmaxlib_status_text(9999)));
  const std::string version = std::to_string(SOFTMAXLIB_VERSION_MAJOR) + "." +
                              std::to_string(SOFTMAXLIB_VERSION_MINOR) + "." +
                              std::to_string(SOFTMAXLIB_VERSION_PATCH);
  EXPECT_EQ(softmaxlib_version(), version);
  EXPECT_GT(strlen(softmaxlib_compiler()), 0u);
}

TEST(CApi, Isas) {
  ASSERT_FALSE(isas().empty());
  EXPECT_EQ(isas().back(), SOFTMAXLIB_ISA_SCALAR);
  EXPECT_EQ(softmaxlib_isa_available(-1), SOFTMAXLIB_ISA_AUTO);
  EXPECT_EQ(softmaxlib_isa_compiled(-1), SOFTMAXLIB_ISA_AUTO);
  EXPECT_EQ(softmaxlib_isa_compiled(100), SOFTMAXLIB_ISA_AUTO);
  EXPECT_EQ(softmaxlib_isa_name(SOFTMAXLIB_ISA_AUTO), nullptr);
  EXPECT_EQ(softmaxlib_isa_name(99), nullptr);
  EXPECT_GE(softmaxlib_cache_size(1), 0);
  EXPECT_EQ(softmaxlib_cache_size(0), 0);
  EXPECT_EQ(softmaxlib_cache_size(9), 0);
  // The default is the best.
  softmaxlib_report report = SOFTMAXLIB_REPORT_INIT;
  Call call;
  call.o.report = &report;
  EXPECT_EQ(call.run(), SOFTMAXLIB_OK);
  EXPECT_EQ(report.isa, isas().front());
}

// An option whose data is missing. Last: where this is not seen, the call crashes.
TEST(CApi, OptionsWithoutData) {
  const int64_t row[] = {4}, one[] = {1};
  const softmaxlib_array bias = {nullptr, SOFTMAXLIB_F32, 1, row, nullptr};
  const softmaxlib_array where = {nullptr, SOFTMAXLIB_BOOL, 1, row, nullptr};
  const softmaxlib_array temperatures = {nullptr, SOFTMAXLIB_F32, 1, one, nullptr};
  EXPECT_EQ(Call().after([&](Call& c) { c.o.bias = &bias; }), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(Call().after([&](Call& c) { c.o.where = &where; }), SOFTMAXLIB_ERROR_NULL);
  EXPECT_EQ(Call().after([&](Call& c) { c.o.temperatures = &temperatures; }),
            SOFTMAXLIB_ERROR_NULL);
}

}  // namespace
}  // namespace softmaxlib::test
