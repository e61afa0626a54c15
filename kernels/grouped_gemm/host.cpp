// A mixture's experts on the host: the threads share expert places and columns, each weight is read where it lies.

#include <algorithm>
#include <vector>

#include "../gated/activation.h"
#include "../host/products.h"
#include "../host/threads.h"

namespace heddle {
namespace {

constexpr int64_t NONE = -1;  // no activation: products as they are

// Row i of the tiles is row (pairs[i] / in_divisor) of x if gathers, else row i; it goes to row pairs[i] of out if
// scatters, else to row i. Steps are in elements.
struct Grouped {
  const void *x, *stack, *bias;  // stack [places, columns, depth], or [places, depth, columns] if transposed
  void* out;
  int64_t x_step, out_step, place_step, weight_step;
  int64_t depth, columns;
  const int32_t *tiles, *pairs;
  int64_t num_tiles, in_divisor;
  int64_t gathers, scatters, transposed, interleaved;
  int64_t act;  // of gate and up, which are the columns; out then has half of them. NONE: gathered products are float32
  float alpha, limit;
};

constexpr int ROWS = 64;       // that are computed together
constexpr int COLUMNS = 64;    // of a piece of work

// One piece: rows of a tile, by some columns of its place's matrix.
template <class T>
struct Piece {
  const Grouped& it;
  const T* weights;  // of the place
  const T* bias;
  float *in, *products;  // scratch: [ROWS, depth], [ROWS, COLUMNS]

  void run(int64_t first, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t row = first; row < first + rows; row += ROWS) some_rows(row, std::min<int64_t>(ROWS, first + rows - row), begin, end);
  }

  void some_rows(int64_t first, int64_t rows, int64_t begin, int64_t end) {
    for (int64_t row = 0; row < rows; ++row) {
      int64_t at = it.gathers ? it.pairs[first + row] / it.in_divisor : first + row;
      const T* from = (const T*)it.x + at * it.x_step;
      for (int64_t k = 0; k < it.depth; ++k) in[row * it.depth + k] = widened(from[k]);
    }
    if (it.act == NONE) {
      multiply(rows, begin, end - begin, 1, products);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < end - begin; c += W)
          put(first + row, begin + c, load(products + row * COLUMNS + c), end - begin - c);
      return;
    }
    Activation activation{it.act, it.alpha, it.limit};
    int64_t count = end - begin, half = it.columns / 2;  // so many gates, and as many ups
    float* ups = products + COLUMNS / 2;
    multiply(rows, it.interleaved ? 2 * begin : begin, count, it.interleaved ? 2 : 1, products);
    multiply(rows, it.interleaved ? 2 * begin + 1 : half + begin, count, it.interleaved ? 2 : 1, ups);
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < count; c += W)
        put(first + row, begin + c, activated(activation, load(products + row * COLUMNS + c), load(ups + row * COLUMNS + c)), count - c);
  }

  void put(int64_t row, int64_t column, Vec value, int64_t count) {
    int64_t to = it.scatters ? it.pairs[row] : row;
    if (it.act == NONE && it.gathers)  // to which something is added before the activation
      store_up_to((float*)it.out + to * it.out_step + column, value, count);
    else
      store_up_to((T*)it.out + to * it.out_step + column, value, count);
  }

  // out[row * COLUMNS + i] = in[row] . column first + i * step of the matrix, and its bias.
  void multiply(int64_t rows, int64_t first, int64_t count, int64_t step, float* out) {
    if (it.transposed) {
      by_rows_of_weights(rows, first, count, step, out);
    } else {
      int64_t row = 0;
      for (int64_t c = 0; c < count; c += W / 4)
        for (row = 0; row + 4 <= rows; row += 4) dot<4>(row, first, c, count, step, out);
      for (; row + 2 <= rows; row += 2)
        for (int64_t c = 0; c < count; c += W / 2) dot<2>(row, first, c, count, step, out);
      for (; row < rows; ++row)
        for (int64_t c = 0; c < count; c += W) dot<1>(row, first, c, count, step, out);
    }
    if (bias)
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t c = 0; c < count; ++c) out[row * COLUMNS + c] += widened(bias[first + c * step]);
  }

  template <int M>
  void dot(int64_t row, int64_t first, int64_t c, int64_t count, int64_t step, float* out) {
    constexpr int N = W / M;
    const float* x[M];
    const T* w[N];
    for (int m = 0; m < M; ++m) x[m] = in + (row + m) * it.depth;
    for (int n = 0; n < N; ++n) w[n] = weights + (first + std::min(c + n, count - 1) * step) * it.weight_step;
    float found[W];
    store(found, dots<M>(x, w, it.depth));
    for (int m = 0; m < M; ++m)
      std::copy_n(found + m * N, std::min<int64_t>(N, count - c), out + (row + m) * COLUMNS + c);
  }

  void by_rows_of_weights(int64_t rows, int64_t first, int64_t count, int64_t step, float* out) {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t c = 0; c < count; c += W) store(out + row * COLUMNS + c, Vec{});
    for (int64_t k = 0; k < it.depth; ++k) {
      float line[COLUMNS];
      const T* from = weights + k * it.weight_step + first;
      for (int64_t c = 0; c < count; ++c) line[c] = widened(from[c * step]);
      for (int64_t row = 0; row < rows; ++row) {
        float left = in[row * it.depth + k];
        for (int64_t c = 0; c < count; ++c) out[row * COLUMNS + c] += left * line[c];
      }
    }
  }
};

template <class T>
void grouped(const Grouped& it) {
  int64_t columns = it.act == NONE ? it.columns : it.columns / 2, chunk = it.act == NONE ? COLUMNS : COLUMNS / 2;
  int64_t chunks = (columns + chunk - 1) / chunk, rows = 0;
  for (int64_t tile = 0; tile < it.num_tiles; ++tile) rows += it.tiles[tile * 3 + 2];
  for_each(it.num_tiles * chunks, threads_for(rows * it.columns * it.depth), [&](int64_t index) {
    static thread_local std::vector<float> scratch;
    scratch.resize(ROWS * (it.depth + COLUMNS) + W);
    const int32_t* tile = it.tiles + index / chunks * 3;
    const T* bias = it.bias ? (const T*)it.bias + tile[0] * it.columns : nullptr;
    Piece<T> piece{it, (const T*)it.stack + tile[0] * it.place_step, bias, scratch.data(), scratch.data() + ROWS * it.depth};
    int64_t begin = index % chunks * chunk;
    piece.run(tile[1], tile[2], begin, std::min(columns, begin + chunk));
  });
}

// out[t] = sum over k of weights[t, k] * rows[t * choices + k]; 0 for a token without places. Then what is beside, unless null.
template <class T>
void combine(const T* rows, const float* weights, const int32_t* places, T* out, const T* beside, int64_t only_own, int64_t tokens,
             int64_t choices, int64_t width) {
  for_each(tokens, threads_for(tokens * choices * width), [&](int64_t token) {
    bool adds = beside && (!only_own || places[(token + 1) * choices - 1] < 0);
    for (int64_t d = 0; d < width; d += W) {
      Vec sum{};
      for (int64_t k = 0; k < choices; ++k)
        if (places[token * choices + k] >= 0)
          sum += weights[token * choices + k] * load_up_to(rows + (token * choices + k) * width + d, width - d);
      if (adds) sum += load_up_to(beside + token * width + d, width - d);
      store_up_to(out + token * width + d, sum, width - d);
    }
  });
}

}  // namespace
}  // namespace heddle

extern "C" void heddle_grouped(const heddle::Grouped* it, int is_bfloat16) {
  is_bfloat16 ? heddle::grouped<heddle::BFloat16>(*it) : heddle::grouped<float>(*it);
}

extern "C" void heddle_combine(const void* rows, const float* weights, const int32_t* places, void* out, const void* beside,
                               int64_t only_own, int64_t tokens, int64_t choices, int64_t width, int is_bfloat16) {
  using heddle::BFloat16;
  if (is_bfloat16)
    heddle::combine((const BFloat16*)rows, weights, places, (BFloat16*)out, (const BFloat16*)beside, only_own, tokens, choices, width);
  else
    heddle::combine((const float*)rows, weights, places, (float*)out, (const float*)beside, only_own, tokens, choices, width);
}
