// The activation between two products, for rows that hold both gates and ups.

#include <algorithm>

#include "../host/threads.h"
#include "activation.h"

namespace heddle {
namespace {

// products [rows, 2 * inner], `step` elements from row to row -> out [rows, inner].
template <class P, class T>
void gated(const P* products, int64_t step, T* out, int64_t rows, int64_t inner, bool interleaved, Activation activation) {
  for_each(rows, threads_for(8 * rows * inner), [&](int64_t row) {
    const P* in = products + row * step;
    for (int64_t c = 0; c < inner; c += W) {
      int64_t count = std::min<int64_t>(W, inner - c);
      Vec gate{}, up{};
      if (interleaved) {
        for (int i = 0; i < count; ++i) {
          gate[i] = widened(in[2 * (c + i)]);
          up[i] = widened(in[2 * (c + i) + 1]);
        }
      } else {
        gate = load_up_to(in + c, count);
        up = load_up_to(in + inner + c, count);
      }
      store_up_to(out + row * inner + c, activated(activation, gate, up), count);
    }
  });
}

}  // namespace
}  // namespace heddle

extern "C" void heddle_gated(const void* products, int64_t step, void* out, int64_t rows, int64_t inner, int interleaved,
                             int64_t act, float alpha, float limit, int products_are_bfloat16, int out_is_bfloat16) {
  using namespace heddle;
  Activation activation{act, alpha, limit};
  if (products_are_bfloat16)
    gated((const BFloat16*)products, step, (BFloat16*)out, rows, inner, interleaved, activation);
  else if (out_is_bfloat16)
    gated((const float*)products, step, (BFloat16*)out, rows, inner, interleaved, activation);
  else
    gated((const float*)products, step, (float*)out, rows, inner, interleaved, activation);
}
