// Low-rank products of many adapters on the host: all rows, slices and adapters of a site in one call.
//
// Two passes with all threads: every adapter's rows are taken to its rank (shrink), then back to the columns of its slice
// (expand). What lies between is a few numbers a row.

#include <algorithm>
#include <cstring>
#include <vector>

#include "../host/products.h"
#include "../host/threads.h"

namespace heddle {
namespace {

// Numbers of a table's row (site.py, Field).
struct Entry {
  int64_t a, b, gain, rank, scale_bits, next, a_stride, b_stride;

  float scale() const {
    float out;
    int32_t bits = (int32_t)scale_bits;
    std::memcpy(&out, &bits, sizeof out);
    return out;
  }
};

// A tile is three numbers: adapter slot, or slot * experts + expert, then its first row and how many rows it has.
// Row i of y is rows_out[i] and that of x rows_in[i] / in_divisor; without them, both are i.
struct Lora {
  void *y, *x;
  int64_t y_step, x_step, depth;  // steps in elements from row to row; columns of x that a slice reads
  const Entry* table;             // [slots + 1, slices]
  int64_t table_step;             // entries from slot to slot
  const int32_t* tiles;
  int64_t num_tiles;
  const int32_t* offsets;  // [slices + 1]
  int64_t slices;
  int64_t own_inputs, transposed;
  const void* bias;
  int64_t experts;
  const int32_t *rows_in, *rows_out;
  int64_t in_divisor;
  int64_t y_is_float;  // whatever x is
};

constexpr int COLUMNS = 4 * W;  // that are expanded together
constexpr int A_CHUNK = 4;      // of those: a piece of work

// A slice of a tile: the rows of one adapter.
struct Piece {
  const Entry* entry;
  int64_t expert, first, rows, slice, shrunk;  // shrunk: where its [rows, rank] lie
};

template <class T, class Y>
struct Site {
  const Lora& it;

  const T* a(const Piece& of) const { return (const T*)of.entry->a + of.expert * of.entry->a_stride; }
  const T* b(const Piece& of) const { return (const T*)of.entry->b + of.expert * of.entry->b_stride; }

  const T* x(const Piece& of, int64_t row) const {
    int64_t at = it.rows_in ? it.rows_in[of.first + row] / it.in_divisor : of.first + row;
    return (const T*)it.x + at * it.x_step + (it.own_inputs ? of.slice * it.depth : 0);
  }

  Y* y(const Piece& of, int64_t row) const {
    int64_t at = it.rows_out ? it.rows_out[of.first + row] : of.first + row;
    return (Y*)it.y + at * it.y_step + it.offsets[of.slice];
  }

  int64_t width(const Piece& of) const { return it.offsets[of.slice + 1] - it.offsets[of.slice]; }

  // -- shrink ---

  void shrink(const Piece& of, float* out) const {
    if (it.transposed) {
      for (int64_t row = 0; row < of.rows; ++row) shrink_by_columns(of, row, out + row * of.entry->rank);
      return;
    }
    int64_t row = 0;
    for (; row + 4 <= of.rows; row += 4) shrink_rows<4>(of, row, out);
    for (; row + 2 <= of.rows; row += 2) shrink_rows<2>(of, row, out);
    for (; row < of.rows; ++row) shrink_rows<1>(of, row, out);
  }

  template <int M>
  void shrink_rows(const Piece& of, int64_t row, float* out) const {
    constexpr int N = W / M;
    int64_t rank = of.entry->rank;
    const T* rows[M];
    for (int m = 0; m < M; ++m) rows[m] = x(of, row + m);
    for (int64_t r = 0; r < rank; r += N) {
      const T* w[N];
      for (int n = 0; n < N; ++n) w[n] = a(of) + std::min(r + n, rank - 1) * it.depth;
      float products[W];
      store(products, dots<M>(rows, w, it.depth) * of.entry->scale());
      for (int m = 0; m < M; ++m)
        std::copy_n(products + m * N, std::min<int64_t>(N, rank - r), out + (row + m) * rank + r);
    }
  }

  void shrink_by_columns(const Piece& of, int64_t row, float* out) const {  // a [in, rank]
    int64_t rank = of.entry->rank;
    const T* in = x(of, row);
    for (int64_t r = 0; r < rank; r += W) {
      int64_t count = std::min<int64_t>(W, rank - r);
      Vec acc{};
      for (int64_t k = 0; k < it.depth; ++k) acc += widened(in[k]) * load_up_to(a(of) + k * rank + r, count);
      store_up_to(out + r, acc * of.entry->scale(), count);
    }
  }

  // -- expand ---

  // Columns [begin, end) of the slice, `end - begin` at most COLUMNS; wide [rank, COLUMNS] is scratch.
  void expand(const Piece& of, const float* shrunk, int64_t begin, int64_t end, float* wide) const {
    int64_t rank = of.entry->rank;
    for (int64_t column = begin; column < end; column += W) gather(of, column, std::min(end, column + W), wide + column - begin);
    int64_t row = 0;
    for (; row + 4 <= of.rows; row += 4) expand_rows<4>(of, shrunk + row * rank, row, begin, end, wide);
    for (; row < of.rows; ++row) expand_rows<1>(of, shrunk + row * rank, row, begin, end, wide);
  }

  // out[r * COLUMNS] = b of these columns, for each of the rank's dimensions; 0 behind the last column.
  void gather(const Piece& of, int64_t column, int64_t end, float* out) const {
    int64_t rank = of.entry->rank, count = end - column;
    if (it.transposed) {
      for (int64_t r = 0; r < rank; ++r) store(out + r * COLUMNS, load_up_to(b(of) + r * width(of) + column, count));
      return;
    }
    for (int64_t r = 0; r < rank; r += W) {
      Vec square[W];
      int64_t ranks = std::min<int64_t>(W, rank - r);
      for (int i = 0; i < W; ++i)
        square[i] = i < count ? load_up_to(b(of) + (column + i) * rank + r, ranks) : Vec{};
      transpose(square);
      for (int i = 0; i < ranks; ++i) store(out + (r + i) * COLUMNS, square[i]);
    }
  }

  template <int M>
  void expand_rows(const Piece& of, const float* shrunk, int64_t row, int64_t begin, int64_t end, const float* wide) const {
    Vec acc[M][4] = {};
    add_product<M, 4>(acc, shrunk, of.entry->rank, wide, COLUMNS, of.entry->rank);
    for (int m = 0; m < M; ++m) {
      Y* out = y(of, row + m);
      for (int v = 0; v < 4; ++v) {
        int64_t column = begin + v * W, count = std::min<int64_t>(W, end - column);
        if (count <= 0) break;
        Vec sum = load_up_to(out + column, count) + acc[m][v];
        if (of.entry->gain) sum = gained(of, sum, column, count);
        store_up_to(out + column, sum, count);
      }
    }
  }

  Vec gained(const Piece& of, Vec y, int64_t column, int64_t count) const {
    Vec gain = load_up_to((const float*)of.entry->gain + column, count);
    Vec held = it.bias ? load_up_to((const T*)it.bias + it.offsets[of.slice] + column, count) : Vec{};
    return gain * (y - held) + held;
  }
};

std::vector<Piece> pieces_of(const Lora& it, int64_t& size, int64_t& work) {
  std::vector<Piece> pieces;
  for (int64_t tile = 0; tile < it.num_tiles; ++tile) {
    const int32_t* at = it.tiles + tile * 3;
    int64_t slot = it.experts ? at[0] / it.experts : at[0], expert = it.experts ? at[0] % it.experts : 0;
    for (int64_t slice = 0; slice < it.slices; ++slice) {
      const Entry* entry = it.table + slot * it.table_step + slice;
      if (entry->rank == 0 && entry->gain == 0) continue;
      pieces.push_back({entry, expert, at[1], at[2], slice, size});
      size += at[2] * entry->rank;
      work += at[2] * entry->rank * (it.depth + it.offsets[slice + 1] - it.offsets[slice]);
    }
  }
  return pieces;
}

template <class T, class Y>
void lora(const Lora& it) {
  int64_t size = 0, work = 0;
  std::vector<Piece> pieces = pieces_of(it, size, work);
  if (pieces.empty()) return;
  Site<T, Y> site{it};
  std::vector<float> shrunk(size);
  int threads = threads_for(2 * work);  // small products are that much slower
  for_each(pieces.size(), threads, [&](int64_t index) { site.shrink(pieces[index], shrunk.data() + pieces[index].shrunk); });
  int64_t widest = 0;
  for (int64_t slice = 0; slice < it.slices; ++slice)
    widest = std::max<int64_t>(widest, it.offsets[slice + 1] - it.offsets[slice]);
  int64_t chunks = (widest + A_CHUNK * COLUMNS - 1) / (A_CHUNK * COLUMNS);
  for_each(pieces.size() * chunks, threads, [&](int64_t index) {
    static thread_local std::vector<float> wide;
    const Piece& of = pieces[index / chunks];
    wide.resize(of.entry->rank * COLUMNS);
    int64_t begin = index % chunks * A_CHUNK * COLUMNS, end = std::min(site.width(of), begin + A_CHUNK * COLUMNS);
    for (; begin < end; begin += COLUMNS)
      site.expand(of, shrunk.data() + of.shrunk, begin, std::min<int64_t>(end, begin + COLUMNS), wide.data());
  });
}

}  // namespace
}  // namespace heddle

extern "C" void heddle_lora(const heddle::Lora* it, int is_bfloat16) {
  using heddle::BFloat16;
  if (!is_bfloat16) return heddle::lora<float, float>(*it);
  it->y_is_float ? heddle::lora<BFloat16, float>(*it) : heddle::lora<BFloat16, BFloat16>(*it);
}
