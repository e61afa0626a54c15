// Paged attention on the host: every key and value is read where it lies in the cache, and softmax is online.
//
// Decodes of few heads go through `Decode`: key by key out of the blocks, nothing is copied. Everything else goes through
// `Tile`: queries of several tokens and heads against tiles of keys, which are transposed once for all of them.

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../host/products.h"
#include "../host/threads.h"

namespace heddle {
namespace {

// Steps are in elements. Sequences are as in a DeviceBatch.
struct Attention {
  void *query, *out, *keys, *values;  // query [T, Hq, D]; out [T, Hq, Dv] without gaps; caches [blocks, size, Hkv, ..]
  int64_t query_token, query_head;    // steps
  int64_t key_block, key_token, key_head;
  int64_t value_block, value_token, value_head;
  const int32_t *query_starts, *kv_lens, *tables;
  int64_t table_step, sequences, block_size;
  int64_t heads, kv_heads, depth, width;  // Hq, Hkv, D, Dv
  int64_t window, chunk;                  // 0: none
  const float* sinks;                     // [Hq] or null
  float scale, softcap;                   // softcap 0: none
};

constexpr int KEYS = 64;       // of a tile
constexpr int WIDE_KEYS = 32;  // of a tile where heads are wide, so that it stays in a core's cache
constexpr int WIDE = 256;
constexpr int64_t SCRATCH = 32768;  // elements of a tile's queries: with as many sums they leave room in a core's cache
constexpr float NONE = -std::numeric_limits<float>::infinity();

// A part of the work: of one sequence, tokens [first, end) of the step and heads [head, head_end) of the cache.
struct Task {
  int64_t sequence, first, end, head, head_end, cost;
  bool decodes;
};

struct Sequence {
  const int32_t* table;
  int64_t keys, position;  // how many keys it has; the position of its first new token
  int64_t start;           // its first row of the query
};

Sequence sequence(const Attention& it, int64_t index) {
  int64_t start = it.query_starts[index], count = it.query_starts[index + 1] - start, keys = it.kv_lens[index];
  return {it.tables + index * it.table_step, keys, keys - count, start};
}

int64_t first_key(const Attention& it, int64_t position) {
  int64_t first = it.window ? std::max<int64_t>(0, position - it.window + 1) : 0;
  return it.chunk ? std::max(first, position / it.chunk * it.chunk) : first;
}

template <class T>
const T* at(const void* cache, const Sequence& of, int64_t key, int64_t block_size, int64_t block, int64_t token) {
  return (const T*)cache + of.table[key / block_size] * block + key % block_size * token;
}

// Softmax so far over the keys of one query: the largest score, the sum of exponentials relative to it.
struct Online {
  float largest, sum;
};

Online begin(const Attention& it, int64_t head) {
  if (it.sinks) return {it.sinks[head], 1.0f};
  return {NONE, 0.0f};
}

// Turn `count` scores (padded to whole vectors) into weights, those before `begin` into 0. Returns what everything before
// must be multiplied by.
ALWAYS float soften(const Attention& it, float* scores, int count, Online& so_far, int begin = 0) {
  Vec most = all(NONE);
  for (int j = 0; j < count; j += W) {
    Vec s = load(scores + j) * it.scale;
    if (it.softcap) s = tanh(s / it.softcap) * it.softcap;
    if (j + W > count) s = lanes() < count - j ? s : all(NONE);
    if (j < begin) s = lanes() < begin - j ? all(NONE) : s;
    store(scores + j, s);
    most = s > most ? s : most;
  }
  float next = std::max(so_far.largest, largest(most));
  if (next == NONE) next = 0;  // nothing seen yet; what is not a number shows in the weights
  float shrink = so_far.largest == next ? 1.0f : std::exp(so_far.largest - next);
  Vec total{};
  for (int j = 0; j < count; j += W) {
    Vec weight = exp(load(scores + j) - next);
    store(scores + j, weight);
    total += weight;
  }
  so_far = {next, so_far.sum * shrink + sum(total)};
  return shrink;
}

// -- one new token, few query heads to a key head -------------------------------------------------------------------

template <class T>
struct Decode {
  const Attention& it;
  const Sequence of;
  std::vector<float>& scratch;

  void run(int64_t head, int64_t head_end) {
    int64_t group = it.heads / it.kv_heads, rows = (head_end - head) * group;
    scratch.resize(rows * it.width + rows * it.depth + (group + 4) * KEYS);
    float *sums = scratch.data(), *queries = sums + rows * it.width, *scores = queries + rows * it.depth;
    std::fill(sums, sums + rows * it.width, 0.0f);
    Online softs[256];
    for (int64_t row = 0; row < rows; ++row) {
      softs[row] = begin(it, head * group + row);
      const T* query = (const T*)it.query + of.start * it.query_token + (head * group + row) * it.query_head;
      for (int64_t d = 0; d < it.depth; ++d) queries[row * it.depth + d] = widened(query[d]);
    }
    for (int64_t key = first_key(it, of.position); key < of.keys; key += KEYS) {
      int count = std::min<int64_t>(KEYS, of.keys - key);
      const T *key_rows[KEYS], *value_rows[KEYS];
      locate(key, count, key_rows, value_rows);
      for (int64_t h = head; h < head_end; ++h) {
        int64_t row = (h - head) * group;
        score(key_rows, count, h, queries + row * it.depth, group, scores);
        for (int64_t g = 0; g < group; ++g) {
          float shrink = soften(it, scores + g * KEYS, count, softs[row + g]);
          if (shrink != 1.0f) scale(sums + (row + g) * it.width, shrink);
        }
        weigh(value_rows, count, h, scores, group, sums + row * it.width);
      }
    }
    T* out = (T*)it.out + (of.start * it.heads + head * group) * it.width;
    for (int64_t row = 0; row < rows; ++row) {
      float whole = 1.0f / softs[row].sum;
      for (int64_t d = 0; d < it.width; d += W)
        store(out + row * it.width + d, load(sums + row * it.width + d) * whole);
    }
  }

  void locate(int64_t key, int count, const T** key_rows, const T** value_rows) {
    for (int j = 0; j < count; ++j) {
      key_rows[j] = at<T>(it.keys, of, key + j, it.block_size, it.key_block, it.key_token);
      value_rows[j] = at<T>(it.values, of, key + j, it.block_size, it.value_block, it.value_token);
    }
    for (int j = count; j < KEYS; ++j) key_rows[j] = key_rows[count - 1];  // read, and left out
  }

  void score(const T* const* key_rows, int count, int64_t head, const float* queries, int64_t rows, float* scores) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) score_rows<4>(key_rows, count, head, queries + row * it.depth, scores + row * KEYS);
    for (; row + 2 <= rows; row += 2) score_rows<2>(key_rows, count, head, queries + row * it.depth, scores + row * KEYS);
    for (; row < rows; ++row) score_rows<1>(key_rows, count, head, queries + row * it.depth, scores + row * KEYS);
  }

  template <int M>
  void score_rows(const T* const* key_rows, int count, int64_t head, const float* queries, float* scores) {
    constexpr int N = W / M;
    const float* x[M];
    for (int m = 0; m < M; ++m) x[m] = queries + m * it.depth;
    for (int j = 0; j < count; j += N) {
      const T* w[N];
      for (int n = 0; n < N; ++n) w[n] = key_rows[j + n] + head * it.key_head;
      float products[W];
      store(products, dots<M>(x, w, it.depth));
      for (int m = 0; m < M; ++m) std::copy(products + m * N, products + m * N + N, scores + m * KEYS + j);
    }
  }

  void scale(float* row, float factor) {
    for (int64_t d = 0; d < it.width; d += W) store(row + d, load(row + d) * factor);
  }

  void weigh(const T* const* value_rows, int count, int64_t head, const float* weights, int64_t rows, float* sums) {
    int64_t row = 0;
    for (; row + 4 <= rows; row += 4) weigh_rows<4>(value_rows, count, head, weights + row * KEYS, sums + row * it.width);
    for (; row + 2 <= rows; row += 2) weigh_rows<2>(value_rows, count, head, weights + row * KEYS, sums + row * it.width);
    for (; row < rows; ++row) weigh_rows<1>(value_rows, count, head, weights + row * KEYS, sums + row * it.width);
  }

  template <int M>
  void weigh_rows(const T* const* value_rows, int count, int64_t head, const float* weights, float* sums) {
    int64_t d = 0;
    for (; d + 4 * W <= it.width; d += 4 * W) weigh_part<M, 4>(value_rows, count, head, d, weights, sums);
    for (; d < it.width; d += W) weigh_part<M, 1>(value_rows, count, head, d, weights, sums);
  }

  template <int M, int V>
  void weigh_part(const T* const* value_rows, int count, int64_t head, int64_t d, const float* weights, float* sums) {
    Vec acc[M][V];
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = load(sums + m * it.width + d + v * W);
    for (int j = 0; j < count; ++j) {
      const T* value = value_rows[j] + head * it.value_head + d;
      for (int v = 0; v < V; ++v) {
        Vec right = load(value + v * W);
        for (int m = 0; m < M; ++m) acc[m][v] += weights[m * KEYS + j] * right;
      }
    }
    for (int m = 0; m < M; ++m)
      for (int v = 0; v < V; ++v) store(sums + m * it.width + d + v * W, acc[m][v]);
  }
};

// -- several tokens, or many query heads to a key head --------------------------------------------------------------

template <class T>
struct Tile {
  const Attention& it;
  const Sequence of;
  std::vector<float>& scratch;

  // Row r is token first + r / group of the step, and query head head * group + r % group.
  void run(int64_t first, int64_t end, int64_t head) {
    int64_t group = it.heads / it.kv_heads, rows = (end - first) * group, padded = (rows + 3) / 4 * 4;
    int64_t most = it.depth > WIDE ? WIDE_KEYS : KEYS, width = (it.width + W - 1) / W * W;
    scratch.resize(padded * (it.depth + KEYS + width) + most * (it.depth + width) + 2 * W);
    float* queries = scratch.data();
    float *scores = queries + padded * it.depth, *sums = scores + padded * KEYS, *keys = sums + padded * width,
          *values = keys + most * it.depth;
    std::fill(queries, scores, 0.0f);
    std::fill(sums, keys, 0.0f);
    std::vector<Online> softs(rows);
    for (int64_t row = 0; row < rows; ++row) {
      int64_t token = first + row / group, query_head = head * group + row % group;
      softs[row] = begin(it, query_head);
      const T* query = (const T*)it.query + token * it.query_token + query_head * it.query_head;
      for (int64_t d = 0; d < it.depth; ++d) queries[row * it.depth + d] = widened(query[d]);
    }
    int64_t last = of.position + end - 1 - of.start;
    for (int64_t key = first_key(it, of.position + first - of.start); key <= last; key += most) {
      int count = std::min<int64_t>(most, last + 1 - key);
      take_keys(key, count, most, head, keys);
      take_values(key, count, head, values, width);
      // rows come in order of position: the first ones may be before all keys of the tile
      int64_t unseen = std::max<int64_t>(0, key - of.position - first + of.start) * group / 4 * 4;
      for (int64_t row = unseen; row < padded; row += 4)
        for (int64_t j = 0; j < most;) j += score(queries + row * it.depth, keys + j, most, scores + row * KEYS + j, j);
      for (int64_t row = unseen; row < rows; ++row) {
        int64_t position = of.position + first - of.start + row / group;
        soften_row(key, count, position, scores + row * KEYS, softs[row], sums + row * width, width);
      }
      for (int64_t row = unseen; row < padded; row += 4)
        for (int64_t d = 0; d < width;) d += weigh(scores + row * KEYS, values + d, count, sums + row * width + d, width, d);
    }
    for (int64_t row = 0; row < rows; ++row) {
      int64_t token = first + row / group, query_head = head * group + row % group;
      T* out = (T*)it.out + (token * it.heads + query_head) * it.width;
      float whole = 1.0f / softs[row].sum;
      for (int64_t d = 0; d < it.width; d += W)
        store_up_to(out + d, load(sums + row * width + d) * whole, it.width - d);
    }
  }

  // keys [D, most]: of each dimension, the keys of the tile; 0 behind the last.
  void take_keys(int64_t key, int count, int64_t most, int64_t head, float* keys) {
    for (int64_t j = 0; j < most; j += W) {
      const T* rows[W];
      int there = std::max<int64_t>(0, std::min<int64_t>(W, count - j));
      for (int i = 0; i < there; ++i)
        rows[i] = at<T>(it.keys, of, key + j + i, it.block_size, it.key_block, it.key_token) + head * it.key_head;
      for (int64_t d = 0; d < it.depth; d += W) {
        Vec square[W];
        int width = std::min<int64_t>(W, it.depth - d);
        for (int i = 0; i < W; ++i) square[i] = i < there ? load_up_to(rows[i] + d, width) : Vec{};
        transpose(square);
        for (int i = 0; i < width; ++i) store(keys + (d + i) * most + j, square[i]);
      }
    }
  }

  void take_values(int64_t key, int count, int64_t head, float* values, int64_t width) {
    for (int j = 0; j < count; ++j) {
      const T* row = at<T>(it.values, of, key + j, it.block_size, it.value_block, it.value_token) + head * it.value_head;
      for (int64_t d = 0; d < width; d += W) store(values + j * width + d, load_up_to(row + d, it.width - d));
    }
  }

  // Scores of 4 rows; returns of how many keys.
  int64_t score(const float* queries, const float* keys, int64_t most, float* scores, int64_t j) {
    return j + 4 * W <= most ? score_part<4>(queries, keys, most, scores) : score_part<1>(queries, keys, most, scores);
  }

  template <int V>
  int64_t score_part(const float* queries, const float* keys, int64_t most, float* scores) {
    Vec acc[4][V] = {};
    add_product<4, V>(acc, queries, it.depth, keys, most, it.depth);
    for (int m = 0; m < 4; ++m)
      for (int v = 0; v < V; ++v) store(scores + m * KEYS + v * W, acc[m][v]);
    return V * W;
  }

  // Weights of the keys [key, key + count) for a query at this position, 0 for those that it does not see.
  void soften_row(int64_t key, int count, int64_t position, float* scores, Online& soft, float* sums, int64_t width) {
    int64_t begin = std::max<int64_t>(0, first_key(it, position) - key), end = std::min<int64_t>(count, position + 1 - key);
    if (begin >= end) return (void)std::fill(scores, scores + KEYS, 0.0f);
    float shrink = soften(it, scores, end, soft, begin);
    std::fill(scores + end, scores + KEYS, 0.0f);
    if (shrink != 1.0f)
      for (int64_t d = 0; d < width; d += W) store(sums + d, load(sums + d) * shrink);
  }

  // Adds the weighted values to 4 rows; returns how many columns were done.
  int64_t weigh(const float* weights, const float* values, int count, float* sums, int64_t width, int64_t d) {
    if (d + 4 * W <= width) return weigh_part<4>(weights, values, count, sums, width);
    return weigh_part<1>(weights, values, count, sums, width);
  }

  template <int V>
  int64_t weigh_part(const float* weights, const float* values, int count, float* sums, int64_t width) {
    Vec acc[4][V];
    for (int m = 0; m < 4; ++m)
      for (int v = 0; v < V; ++v) acc[m][v] = load(sums + m * width + v * W);
    add_product<4, V>(acc, weights, KEYS, values, width, count);
    for (int m = 0; m < 4; ++m)
      for (int v = 0; v < V; ++v) store(sums + m * width + v * W, acc[m][v]);
    return V * W;
  }
};

// -- who does what ------------------------------------------------------------------------------------------------

template <class T>
void attend(const Attention& it, const Task& task) {
  static thread_local std::vector<float> scratch;
  Sequence of = sequence(it, task.sequence);
  if (task.decodes) return Decode<T>{it, of, scratch}.run(task.head, task.head_end);
  for (int64_t head = task.head; head < task.head_end; ++head) Tile<T>{it, of, scratch}.run(task.first, task.end, head);
}

template <class T>
void attention(const Attention& it) {
  int64_t group = it.heads / it.kv_heads, rows = std::min<int64_t>(256, SCRATCH / it.depth),
          at_once = std::max<int64_t>(1, rows / group);
  bool by_key = group <= 8 && it.heads <= 256 && it.width % W == 0;
  int64_t most_threads = omp_get_max_threads();
  std::vector<Task> tasks;
  int64_t work = 0;
  for (int64_t s = 0; s < it.sequences; ++s) {
    int64_t start = it.query_starts[s], end = it.query_starts[s + 1], keys = it.kv_lens[s];
    if (keys == 0) {
      std::fill((T*)it.out + start * it.heads * it.width, (T*)it.out + end * it.heads * it.width, T{});
      continue;
    }
    bool decodes = end - start == 1 && by_key;
    // where there are enough sequences, all heads of one: a token's keys of all heads are next to each other
    int64_t heads = decodes && it.sequences >= 4 * most_threads ? it.kv_heads : 1;
    for (int64_t first = start; first < end; first += at_once) {
      int64_t until = std::min(end, first + at_once), position = keys - end + until - 1;
      int64_t seen = position + 1 - first_key(it, position - (until - 1 - first));
      for (int64_t head = 0; head < it.kv_heads; head += heads) {
        int64_t cost = (until - first) * group * heads * seen * (it.depth + it.width);
        tasks.push_back({s, first, until, head, std::min(it.kv_heads, head + heads), cost, decodes});
        work += cost;
      }
    }
  }
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.cost > b.cost; });
  for_each(tasks.size(), threads_for(work), [&](int64_t index) { attend<T>(it, tasks[index]); });
}

}  // namespace
}  // namespace heddle

extern "C" void heddle_paged_attention(const heddle::Attention* it, int is_bfloat16) {
  is_bfloat16 ? heddle::attention<heddle::BFloat16>(*it) : heddle::attention<float>(*it);
}
