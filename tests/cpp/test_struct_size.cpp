// Structs that say their own size, of every size that a caller's header might give them, each
// ending where memory does: known sizes are understood, of others nothing but the size is read.
#include <functional>

#include "support.hpp"

namespace softmaxlib::test {
namespace {

// Valid arguments of every entry, and all that they write to.
struct World {
  static constexpr int64_t kRows = 2, kColumns = 3;
  const int64_t shape[2] = {kRows, kColumns};
  const int32_t axis = 1;

  struct Outputs {
    float y[kRows * kColumns], rows[kRows];
    double losses[kRows], total;
    int64_t indices[kRows * kColumns];
    softmaxlib_state states[kRows];
  };
  float x[kRows * kColumns] = {1, 2, 3, 4, 5, 7};
  double uniforms[kRows] = {0.25, 0.75};
  int64_t classes[kRows] = {0, 2}, places[kRows * kColumns] = {0, 1, 2, 2, 1, 0};
  Outputs out, before;

  const softmaxlib_array xa = {x, SOFTMAXLIB_F32, 2, shape, nullptr};
  const softmaxlib_array ya = {out.y, SOFTMAXLIB_F32, 2, shape, nullptr};
  const softmaxlib_array losses = {out.losses, SOFTMAXLIB_F64, 1, shape, nullptr};
  const softmaxlib_array total = {&out.total, SOFTMAXLIB_F64, 0, nullptr, nullptr};
  const softmaxlib_array drawn = {out.indices, SOFTMAXLIB_I64, 1, shape, nullptr};
  const softmaxlib_array largest = {out.indices, SOFTMAXLIB_I64, 2, shape, nullptr};
  const softmaxlib_array ua = {uniforms, SOFTMAXLIB_F64, 1, shape, nullptr};
  const softmaxlib_array ca = {classes, SOFTMAXLIB_I64, 1, shape, nullptr};
  const softmaxlib_array pa = {places, SOFTMAXLIB_I64, 2, shape, nullptr};

  World() {
    memset(static_cast<void*>(&out), 0x5a, sizeof(out));
    EXPECT_EQ(softmaxlib_state_begin(SOFTMAXLIB_SOFTMAX, SOFTMAXLIB_F32, kRows, out.states),
              SOFTMAXLIB_OK);
    memcpy(static_cast<void*>(&before), &out, sizeof(out));
  }
  World(const World&) = delete;
  World& operator=(const World&) = delete;
  bool is_untouched() const { return memcmp(&before, &out, sizeof(out)) == 0; }
};

// A call with one struct of the type in question.
template <class S>
struct Entry {
  const char* name;
  std::function<softmaxlib_status(World&, const S*)> call;
};

// Calls every entry with `valid` cut or lengthened to every size, ended by a page that faults.
template <class S>
void try_sizes(const S& valid, const std::vector<size_t>& known,
               const std::vector<Entry<S>>& entries) {
  Arena memory(sizeof(S) + 8);
  for (const auto& entry : entries)
    for (size_t size = 0; size <= sizeof(S) + 8; ++size) {
      const size_t bytes = std::max(size, sizeof(size_t));
      char* const p = memory.place(bytes, Against::kBack, -bytes % sizeof(size_t));
      memset(p, 0, bytes);
      memcpy(p, &valid, std::min(bytes, sizeof(S)));
      memcpy(p, &size, sizeof(size));
      const std::string given(p, bytes);
      World world;
      const softmaxlib_status status = entry.call(world, reinterpret_cast<const S*>(p));
      const bool is_known = std::find(known.begin(), known.end(), size) != known.end();
      EXPECT_EQ(status, is_known ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_STRUCT_SIZE)
          << entry.name << ", struct_size " << size;
      EXPECT_EQ(world.is_untouched(), !is_known) << entry.name << ", struct_size " << size;
      EXPECT_EQ(std::string(p, bytes), given) << entry.name << ", struct_size " << size;
      EXPECT_TRUE(memory.intact()) << entry.name << ", struct_size " << size;
    }
}

std::vector<Entry<softmaxlib_options>> entries_with_options() {
  using O = const softmaxlib_options*;
  return {
      {"run", [](World& w,
                 O o) { return softmaxlib_run(SOFTMAXLIB_SOFTMAX, &w.xa, &w.ya, 1, &w.axis, o); }},
      {"scratch_size",
       [](World& w, O o) {
         size_t bytes = 77;
         const auto status =
             softmaxlib_scratch_size(SOFTMAXLIB_SOFTMAX, &w.xa, &w.ya, 1, &w.axis, o, &bytes);
         EXPECT_EQ(bytes, 0u);
         w.out.total = status ? w.out.total : 1;
         return status;
       }},
      {"plan_create",
       [](World& w, O o) {
         softmaxlib_plan* plan = nullptr;
         const auto status =
             softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &w.xa, &w.ya, 1, &w.axis, o, &plan);
         EXPECT_EQ(plan == nullptr, status != SOFTMAXLIB_OK);
         softmaxlib_plan_destroy(plan);
         w.out.total = status ? w.out.total : 1;
         return status;
       }},
      {"state_update",
       [](World& w, O o) { return softmaxlib_state_update(&w.xa, w.out.states, 1, &w.axis, o); }},
      {"state_scale",
       [](World& w, O o) {
         return softmaxlib_state_scale(&w.xa, &w.ya, w.out.states, 1, &w.axis, o);
       }},
      {"backward",
       [](World& w, O o) {
         return softmaxlib_backward(SOFTMAXLIB_SOFTMAX, &w.xa, nullptr, &w.xa, &w.ya, 1, &w.axis,
                                    o);
       }},
      {"orthogonal_gradient",
       [](World& w, O o) { return softmaxlib_orthogonal_gradient(&w.xa, &w.xa, &w.ya, 0, o); }},
      {"cross_entropy",
       [](World& w, O o) {
         return softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &w.xa, &w.ca, &w.losses, &w.ya, 1,
                                         nullptr, o);
       }},
      {"scale_rows", [](World& w, O o) { return softmaxlib_scale_rows(&w.xa, &w.xa, &w.ya, o); }},
      {"take_log_softmax",
       [](World& w, O o) {
         return softmaxlib_take_log_softmax(&w.xa, &w.pa, &w.ya, nullptr, 1, o);
       }},
      {"sample",
       [](World& w, O o) { return softmaxlib_sample(&w.xa, &w.ua, &w.drawn, 1, nullptr, o); }},
      {"topk_softmax",
       [](World& w, O o) { return softmaxlib_topk_softmax(&w.xa, &w.ya, &w.largest, 1, 0, o); }},
  };
}

TEST(StructSize, Options) {
  try_sizes<softmaxlib_options>(SOFTMAXLIB_OPTIONS_INIT,
                                {sizeof(softmaxlib_options), offsetof(softmaxlib_options, scale)},
                                entries_with_options());
}

TEST(StructSize, Filter) {
  try_sizes<softmaxlib_filter>(SOFTMAXLIB_FILTER_INIT, {sizeof(softmaxlib_filter)},
                               {{"sample", [](World& w, const softmaxlib_filter* f) {
                                   return softmaxlib_sample(&w.xa, &w.ua, &w.drawn, 1, f, nullptr);
                                 }}});
}

TEST(StructSize, LossOptions) {
  try_sizes<softmaxlib_loss_options>(
      SOFTMAXLIB_LOSS_OPTIONS_INIT,
      {sizeof(softmaxlib_loss_options), offsetof(softmaxlib_loss_options, reduction)},
      {{"cross_entropy", [](World& w, const softmaxlib_loss_options* l) {
          return softmaxlib_cross_entropy(SOFTMAXLIB_SOFTMAX, &w.xa, &w.ca, &w.losses, nullptr, 1,
                                          l, nullptr);
        }}});
}

TEST(StructSize, Buffers) {
  const World plan_of;
  softmaxlib_plan* plan = nullptr;
  ASSERT_EQ(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &plan_of.xa, &plan_of.ya, 1, &plan_of.axis,
                                   nullptr, &plan),
            SOFTMAXLIB_OK);
  const std::vector<float> x = {1, 2, 3, 4, 5, 7};
  std::vector<float> y(x.size());
  softmaxlib_buffers valid = SOFTMAXLIB_BUFFERS_INIT;
  valid.x = x.data();
  valid.out = y.data();
  try_sizes<softmaxlib_buffers>(valid, {sizeof(softmaxlib_buffers)},
                                {{"plan_run", [&](World& w, const softmaxlib_buffers* b) {
                                    std::fill(y.begin(), y.end(), -7.0f);
                                    const auto status = softmaxlib_plan_run(plan, b);
                                    // Its results are in memory that is not the world's.
                                    if (y != std::vector<float>(y.size(), -7.0f)) w.out.total = 1;
                                    return status;
                                  }}});
  softmaxlib_plan_destroy(plan);
}

// The report inside of options and of buffers. Entries that have none do not read beyond its size
// either.
TEST(StructSize, Report) {
  Arena memory(sizeof(softmaxlib_report) + 8);
  const auto with_report = [&](size_t size, auto call) {
    const size_t bytes = std::max(size, sizeof(size_t));
    char* const p = memory.place(bytes, Against::kBack, -bytes % sizeof(size_t));
    memset(p, 0x11, bytes);
    memcpy(p, &size, sizeof(size));
    const std::string given(p, bytes);
    const softmaxlib_status status = call(reinterpret_cast<softmaxlib_report*>(p));
    EXPECT_TRUE(memory.intact()) << "struct_size " << size;
    if (size != sizeof(softmaxlib_report)) {
      EXPECT_EQ(std::string(p, bytes), given) << "struct_size " << size;
    }
    return status;
  };
  for (size_t size = 0; size <= sizeof(softmaxlib_report) + 8; ++size) {
    const softmaxlib_status wanted =
        size == sizeof(softmaxlib_report) ? SOFTMAXLIB_OK : SOFTMAXLIB_ERROR_STRUCT_SIZE;
    for (const auto& entry : entries_with_options()) {
      const std::string name = entry.name;
      World world;
      const softmaxlib_status status = with_report(size, [&](softmaxlib_report* report) {
        Options o;
        o.report = report;
        return entry.call(world, &o);
      });
      if (name == "run" || name == "scratch_size" || name == "orthogonal_gradient") {
        EXPECT_EQ(status, wanted) << name << ", struct_size " << size;
      }
      EXPECT_EQ(world.is_untouched(), status != SOFTMAXLIB_OK) << name << ", struct_size " << size;
    }
    World world;
    softmaxlib_plan* plan = nullptr;
    ASSERT_EQ(softmaxlib_plan_create(SOFTMAXLIB_SOFTMAX, &world.xa, &world.ya, 1, &world.axis,
                                     nullptr, &plan),
              SOFTMAXLIB_OK);
    const softmaxlib_status status = with_report(size, [&](softmaxlib_report* report) {
      softmaxlib_buffers b = SOFTMAXLIB_BUFFERS_INIT;
      b.x = world.x;
      b.out = world.out.y;
      b.report = report;
      return softmaxlib_plan_run(plan, &b);
    });
    softmaxlib_plan_destroy(plan);
    EXPECT_EQ(status, wanted) << "plan_run, struct_size " << size;
    EXPECT_EQ(world.is_untouched(), status != SOFTMAXLIB_OK) << "plan_run, struct_size " << size;
  }
}

}  // namespace
}  // namespace softmaxlib::test
