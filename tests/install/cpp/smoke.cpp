// The installed header and library from C++.
#include <softmaxlib/softmaxlib.h>

#include <cmath>
#include <iostream>
#include <numeric>
#include <vector>

int main() {
  const int64_t n = 1000;
  std::vector<double> x(n), y(n);
  for (int64_t i = 0; i < n; ++i) x[static_cast<size_t>(i)] = 0.01 * static_cast<double>(i);
  const softmaxlib_array in = {x.data(), SOFTMAXLIB_F64, 1, &n, nullptr};
  const softmaxlib_array out = {y.data(), SOFTMAXLIB_F64, 1, &n, nullptr};
  const softmaxlib_status status =
      softmaxlib_run(SOFTMAXLIB_SOFTMAX, &in, &out, 0, nullptr, nullptr);
  const double sum = std::accumulate(y.begin(), y.end(), 0.0);
  std::cout << softmaxlib_version() << ": " << softmaxlib_status_text(status) << ", sum " << sum
            << "\n";
  return status != SOFTMAXLIB_OK || std::fabs(sum - 1) > 1e-12;
}
