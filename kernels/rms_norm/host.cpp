// RMS norms of rows on the host.

#include <cmath>

#include "../host/threads.h"
#include "../host/vectors.h"

namespace heddle {
namespace {

// x [rows, width], rows `step` elements apart; out without gaps. With a residual, their sum goes to `total` first.
template <class T>
void norm(const T* x, int64_t step, const T* residual, int64_t residual_step, T* total, const T* weight, T* out,
          int64_t rows, int64_t width, float eps, float offset, bool cast_first) {
  for_each(rows, threads_for(rows * width), [&](int64_t row) {
    const T* in = x + row * step;
    if (residual) {
      T* sum = total + row * width;
      for (int64_t d = 0; d < width; d += W) {
        Vec added = load_up_to(in + d, width - d) + load_up_to(residual + row * residual_step + d, width - d);
        store_up_to(sum + d, added, width - d);
      }
      in = sum;
    }
    Vec squares{};
    for (int64_t d = 0; d < width; d += W) {
      Vec value = load_up_to(in + d, width - d);
      squares += value * value;
    }
    float factor = 1.0f / std::sqrt(sum(squares) / width + eps);
    for (int64_t d = 0; d < width; d += W) {
      Vec normed = load_up_to(in + d, width - d) * factor;
      if (cast_first && sizeof(T) == 2) {  // to the type of x, as most families do before they weigh
        T rounded[W];
        store(rounded, normed);
        normed = load(rounded);
      }
      store_up_to(out + row * width + d, normed * (load_up_to(weight + d, width - d) + offset), width - d);
    }
  });
}

}  // namespace
}  // namespace heddle

extern "C" void heddle_rms_norm(const void* x, int64_t step, const void* residual, int64_t residual_step, void* total,
                                const void* weight, void* out, int64_t rows, int64_t width, float eps, float offset,
                                int cast_first, int is_bfloat16) {
  using namespace heddle;
  if (is_bfloat16)
    norm((const BFloat16*)x, step, (const BFloat16*)residual, residual_step, (BFloat16*)total, (const BFloat16*)weight,
         (BFloat16*)out, rows, width, eps, offset, cast_first);
  else
    norm((const float*)x, step, (const float*)residual, residual_step, (float*)total, (const float*)weight, (float*)out,
         rows, width, eps, offset, cast_first);
}
