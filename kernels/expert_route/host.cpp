// Choosing and sorting experts on the host: a step has few tokens, and torch's dozen calls cost more than the work.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace heddle {
namespace {

enum Score { SOFTMAX, SIGMOID, SOFTMAX_OF_CHOSEN, GIVEN };  // routing.py, Score
enum GroupScore { MAX, TOP2_SUM };                   // GroupScore

struct Route {
  const float *logits, *bias;  // [T, M]; [M] or null
  const int32_t *expert_map;   // [slots + 1, map_step]
  const int32_t *slots;        // [T] or null
  float* weights;              // [T, K]
  int32_t *places, *pairs, *tiles, *num_tiles;
  int64_t tokens, experts, choices;  // shared ones among the choices, the last
  int64_t shared, only_own, map_step, num_places, tile_rows;
  int64_t score, renormalise, groups, top_groups, group_score;
  float scale;
};

constexpr float NONE = -std::numeric_limits<float>::infinity();

// What is not a number ranks first, as torch has it: an overflow must show, not be left out.
bool before(float a, float b) { return a > b || (std::isnan(a) && !std::isnan(b)); }

void softmax(float* values, int64_t count) {
  float most = *std::max_element(values, values + count), sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i] = std::exp(values[i] - most);
  for (int64_t i = 0; i < count; ++i) values[i] /= sum;
}

// Leaves `ranked` of the best groups only.
void limit(const Route& it, float* ranked, std::vector<float>& group_scores) {
  int64_t size = it.experts / it.groups;
  group_scores.assign(it.groups, 0);
  for (int64_t g = 0; g < it.groups; ++g) {
    float first = NONE, second = NONE;
    for (int64_t i = g * size; i < (g + 1) * size; ++i) {
      if (before(ranked[i], first)) {
        second = first;
        first = ranked[i];
      } else if (before(ranked[i], second)) {
        second = ranked[i];
      }
    }
    group_scores[g] = it.group_score == TOP2_SUM ? first + second : first;
  }
  std::vector<bool> chosen(it.groups);
  for (int64_t n = 0; n < it.top_groups; ++n) {
    int64_t best = -1;
    for (int64_t g = 0; g < it.groups; ++g)
      if (!chosen[g] && (best < 0 || before(group_scores[g], group_scores[best]))) best = g;
    chosen[best] = true;
  }
  for (int64_t g = 0; g < it.groups; ++g)
    if (!chosen[g]) std::fill(ranked + g * size, ranked + (g + 1) * size, NONE);
}

void choose(const Route& it, int64_t token, std::vector<float>& scores, std::vector<float>& ranked, std::vector<float>& of_groups) {
  const float* logits = it.logits + token * it.experts;
  scores.assign(logits, logits + it.experts);
  if (it.score == SOFTMAX) softmax(scores.data(), it.experts);
  if (it.score == SIGMOID)
    for (float& value : scores) value = 1.0f / (1.0f + std::exp(-value));
  ranked = scores;
  if (it.bias)
    for (int64_t i = 0; i < it.experts; ++i) ranked[i] += it.bias[i];
  if (it.groups > 1) limit(it, ranked.data(), of_groups);
  float* weights = it.weights + token * it.choices;
  int32_t* places = it.places + token * it.choices;
  const int32_t* map = it.slots ? it.expert_map + it.slots[token] * it.map_step : nullptr;
  int64_t chosen = it.choices - it.shared;
  std::vector<bool> taken(it.experts);
  for (int64_t k = 0; k < chosen; ++k) {
    int64_t best = -1;
    for (int64_t i = 0; i < it.experts; ++i)
      if (!taken[i] && (best < 0 || before(ranked[i], ranked[best]))) best = i;
    taken[best] = true;
    weights[k] = scores[best];
    places[k] = map ? map[best] : best;
  }
  float sum = 0;
  if (it.score == SOFTMAX_OF_CHOSEN) {
    softmax(weights, chosen);
  } else if (it.renormalise) {
    for (int64_t k = 0; k < chosen; ++k) sum += weights[k];
    for (int64_t k = 0; k < chosen; ++k) weights[k] /= sum + 1e-20f;
  }
  for (int64_t k = 0; k < chosen; ++k) weights[k] *= it.scale;
  for (int64_t i = 0; i < it.shared; ++i) {
    int64_t place = map ? map[it.experts + i] : it.experts + i;
    weights[chosen + i] = 1;
    places[chosen + i] = it.only_own && place < it.experts + it.shared ? -1 : place;
  }
}

}  // namespace
}  // namespace heddle

// Pairs in order of place and, within one, of number; tiles of at most tile_rows pairs of one place.
extern "C" void heddle_expert_route(const heddle::Route* route) {
  const heddle::Route& it = *route;
  std::vector<float> scores, ranked, of_groups;
  for (int64_t token = 0; token < it.tokens; ++token) heddle::choose(it, token, scores, ranked, of_groups);
  std::vector<int32_t> starts(it.num_places + 1);
  int64_t pairs = it.tokens * it.choices;
  for (int64_t pair = 0; pair < pairs; ++pair)
    if (it.places[pair] >= 0) ++starts[it.places[pair] + 1];
  int32_t tiles = 0;
  for (int64_t place = 0; place < it.num_places; ++place) {
    int32_t count = starts[place + 1];
    starts[place + 1] += starts[place];
    for (int64_t row = 0; row < count; row += it.tile_rows) {
      int32_t tile[3] = {(int32_t)place, (int32_t)(starts[place] + row), (int32_t)std::min(it.tile_rows, count - row)};
      std::copy_n(tile, 3, it.tiles + 3 * tiles++);
    }
  }
  *it.num_tiles = tiles;
  for (int64_t pair = 0; pair < pairs; ++pair)
    if (it.places[pair] >= 0) it.pairs[starts[it.places[pair]]++] = pair;
}
