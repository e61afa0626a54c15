// Small matrix products out of registers. All sums are in float32.
#pragma once

#include "vectors.h"

namespace heddle {

// Rows of x times rows of w, both along their contiguous dimension: W dot products at a time.
//
// x: M rows, w: W / M rows, of `depth` elements. Lane m * (W / M) + n of the result is x[m] . w[n]. For every W elements
// of depth that is M + W / M loads and W multiply-adds, with W sums in registers.
template <int M, class X, class T>
ALWAYS Vec dots(const X* const (&x)[M], const T* const (&w)[W / M], int64_t depth) {
  constexpr int N = W / M;
  Vec acc[W] = {};
  int64_t k = 0;
  for (; k + W <= depth; k += W) {
    Vec left[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) left[m] = load(x[m] + k);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      Vec right = load(w[n] + k);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m * N + n] += left[m] * right;
    }
  }
  if (k < depth) {
    int rest = depth - k;
    Vec left[M];
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) left[m] = load_some(x[m] + k, rest);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) {
      Vec right = load_some(w[n] + k, rest);
#pragma GCC unroll 16
      for (int m = 0; m < M; ++m) acc[m * N + n] += left[m] * right;
    }
  }
  return sums(acc);
}

// out[m] += a[m][0..depth) times b[0..depth)[V vectors]: a is broadcast, b read along its rows.
//
// a_step: elements from one of a's rows to the next, b_step: from one of b's. out: M rows of V vectors in registers.
template <int M, int V, class B>
ALWAYS void add_product(Vec (&out)[M][V], const float* a, int64_t a_step, const B* b, int64_t b_step, int64_t depth) {
  for (int64_t k = 0; k < depth; ++k) {
    Vec right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) right[v] = load(b + k * b_step + v * W);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      Vec left = all(a[m * a_step + k]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) out[m][v] += left * right[v];
    }
  }
}

}  // namespace heddle
