// Each pass of softmax alone, as the paper times them: one row of floats, one thread, warm.
#include <string.h>

#include "bench.hpp"

namespace softmaxlib::bench {

void register_passes() {
  struct {
    const char* name;
    Pass pass;
    int64_t moved;  // arrays
    Floor floor;
    bool streams;
  } const passes[] = {{"max", Pass::kMax, 1, Floor::kRead, false},
                      {"sum", Pass::kSum, 1, Floor::kRead, false},
                      {"sum_known_max", Pass::kSumKnown, 1, Floor::kRead, false},
                      {"store", Pass::kStore, 2, Floor::kCopy, false},
                      {"store_known_max", Pass::kStoreKnown, 2, Floor::kCopy, false},
                      {"write", Pass::kWrite, 2, Floor::kCopy, true},
                      {"scale", Pass::kScale, 2, Floor::kInPlace, true}};
  for (const auto& p : passes)
    for (const softmaxlib_isa isa : isas())
      for (const bool streaming : {false, true}) {
        if (streaming && !(p.streams && has_streaming_stores(isa))) continue;
        for (const Case& c : cases(sizeof(float))) {
          if (c.cold() || c.threads > 1) continue;
          const int64_t n = c.bytes / int64_t{sizeof(float)};
          const Work work = {n, p.moved * c.bytes, 0, p.floor};
          const Pass pass = p.pass;
          add(std::string("pass/") + p.name + "/f32/" + softmaxlib_isa_name(isa) +
                  (streaming ? "/streaming" : "/plain") + tail_of(c, n),
              c, [=](benchmark::State& state) {
                fill_x(SOFTMAXLIB_F32);
                memcpy(y(), x(), static_cast<size_t>(c.bytes));  // for the pass that reads y
                Scratch scratch(pass_scratch(n));
                const float* const from = reinterpret_cast<const float*>(x());
                float* const to = reinterpret_cast<float*>(y());
                run(state, c, work,
                    [&] { run_pass(isa, pass, streaming, from, to, n, scratch.data()); });
              });
        }
      }
}

}  // namespace softmaxlib::bench
