// Rotary embedding on the host: queries and keys of a step in one call.

#include "../host/threads.h"
#include "../host/vectors.h"

namespace heddle {
namespace {

enum Pairing { HALVES, INTERLEAVED, ADJACENT };  // host.py

// Heads of `depth` elements; of head h of token t, element d is x[t * token + h * head + d]. Results lie without gaps.
// angles: cosines and sines of pair i of a token, `angle_step` from one pair to the next.
template <class T, class A>
void rotate(const T* x, int64_t token_step, int64_t head_step, const A* cosines, const A* sines, int64_t angle_token,
            int64_t angle_step, T* out, int64_t tokens, int64_t heads, int64_t depth, int64_t pairing) {
  int64_t half = depth / 2, apart = pairing == HALVES ? half : 1, stride = pairing == HALVES ? 1 : 2;
  int64_t to_apart = pairing == ADJACENT ? 1 : half, to_stride = pairing == ADJACENT ? 2 : 1;
  for_each(tokens, threads_for(2 * tokens * heads * depth), [&](int64_t token) {
    for (int64_t head = 0; head < heads; ++head) {
      const T* in = x + token * token_step + head * head_step;
      T* to = out + (token * heads + head) * depth;
      for (int64_t i = 0; i < half; ++i) {
        float cosine = widened(cosines[token * angle_token + i * angle_step]);
        float sine = widened(sines[token * angle_token + i * angle_step]);
        float a = widened(in[i * stride]), b = widened(in[i * stride + apart]);
        narrowed(to + i * to_stride, a * cosine - b * sine);
        narrowed(to + i * to_stride + to_apart, b * cosine + a * sine);
      }
    }
  });
}

struct Rope {
  const void *query, *key, *cosines, *sines;
  void *query_out, *key_out;
  int64_t query_token, query_head, key_token, key_head, angle_token, angle_step;
  int64_t tokens, query_heads, key_heads, depth, pairing;
};

template <class T, class A>
void rope(const Rope& it) {
  rotate((const T*)it.query, it.query_token, it.query_head, (const A*)it.cosines, (const A*)it.sines, it.angle_token,
         it.angle_step, (T*)it.query_out, it.tokens, it.query_heads, it.depth, it.pairing);
  rotate((const T*)it.key, it.key_token, it.key_head, (const A*)it.cosines, (const A*)it.sines, it.angle_token,
         it.angle_step, (T*)it.key_out, it.tokens, it.key_heads, it.depth, it.pairing);
}

}  // namespace
}  // namespace heddle

extern "C" void heddle_rope(const heddle::Rope* it, int is_bfloat16, int angles_are_bfloat16) {
  using heddle::BFloat16;
  if (!is_bfloat16) return heddle::rope<float, float>(*it);
  angles_are_bfloat16 ? heddle::rope<BFloat16, BFloat16>(*it) : heddle::rope<BFloat16, float>(*it);
}
