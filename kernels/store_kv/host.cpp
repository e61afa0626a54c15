// Rows into the paged cache: what each token leaves at its KV slot.

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace heddle {
namespace {

constexpr int64_t AHEAD = 8;   // tokens whose place in the cache is asked for before it is written: blocks lie far apart
constexpr int64_t LINE = 64;  // bytes

// rows [tokens, heads, ..]: `head_bytes` of each head. Steps are in bytes. Tokens with a negative slot are left out.
struct Rows {
  const char* from;
  int64_t from_token, from_head;
  char* cache;
  int64_t cache_block, cache_token, cache_head;
  const int64_t* slots;
  int64_t tokens, heads, head_bytes, block_size;

  char* place(int64_t token) const {
    return cache + slots[token] / block_size * cache_block + slots[token] % block_size * cache_token;
  }

  void ask_for(int64_t token) const {
    if (token >= tokens || slots[token] < 0) return;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t byte = 0; byte < head_bytes; byte += LINE)
        __builtin_prefetch(place(token) + head * cache_head + byte, 1);
  }

  void write() const {
    for (int64_t token = 0; token < std::min(AHEAD, tokens); ++token) ask_for(token);
    for (int64_t token = 0; token < tokens; ++token) {
      ask_for(token + AHEAD);
      if (slots[token] < 0) continue;
      for (int64_t head = 0; head < heads; ++head)
        std::memcpy(place(token) + head * cache_head, from + token * from_token + head * from_head, head_bytes);
    }
  }
};

}  // namespace
}  // namespace heddle

extern "C" void heddle_store(const char* rows, int64_t row_token, int64_t row_head, char* cache, int64_t cache_block,
                             int64_t cache_token, int64_t cache_head, const int64_t* slots, int64_t tokens, int64_t heads,
                             int64_t head_bytes, int64_t block_size) {
  heddle::Rows{rows, row_token, row_head, cache, cache_block, cache_token, cache_head, slots, tokens, heads, head_bytes,
               block_size}
      .write();
}
