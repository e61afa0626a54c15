// Vectors of floats, as wide as the machine's, in GCC's and Clang's own notation: no instruction set is named here.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define HEDDLE_MASKS
#include <immintrin.h>
#endif

namespace heddle {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats in a vector
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float Vec __attribute__((vector_size(W * 4)));
typedef int32_t VecInt __attribute__((vector_size(W * 4)));
typedef uint32_t VecBits __attribute__((vector_size(W * 4)));
typedef uint16_t VecHalf __attribute__((vector_size(W * 2)));

struct BFloat16 {
  uint16_t bits;
};

#define ALWAYS inline __attribute__((always_inline))

ALWAYS Vec all(float value) { return Vec{} + value; }

// -- memory: W elements, as float32 whatever their type ---

ALWAYS Vec load(const float* from) {
  Vec out;
  std::memcpy(&out, from, sizeof out);
  return out;
}

ALWAYS Vec load(const BFloat16* from) {
  VecHalf half;
  std::memcpy(&half, from, sizeof half);
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}

ALWAYS void store(float* to, Vec value) { std::memcpy(to, &value, sizeof value); }

ALWAYS void store(BFloat16* to, Vec value) {  // to the nearest, ties to even, as torch rounds
  VecBits bits = (VecBits)value;
  VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  VecBits quiet = (bits >> 16) | 0x40;  // NaN must stay NaN
  VecHalf half = __builtin_convertvector(value == value ? rounded : quiet, VecHalf);
  std::memcpy(to, &half, sizeof half);
}

ALWAYS float widened(float value) { return value; }

ALWAYS float widened(BFloat16 value) {
  uint32_t bits = (uint32_t)value.bits << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

ALWAYS void narrowed(float* to, float value) { *to = value; }

ALWAYS void narrowed(BFloat16* to, float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  to->bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : (bits >> 16) | 0x40;
}

// The first `count` < W elements; the others are 0. LoRA's ranks are often less than W, so this is called a lot: where
// there are instructions that leave elements out they are named after all, and half a vector is moved in one piece.
#ifdef HEDDLE_MASKS
ALWAYS Vec load_some(const float* from, int count) { return (Vec)_mm512_maskz_loadu_ps((1u << count) - 1, from); }

ALWAYS Vec load_some(const BFloat16* from, int count) {
  VecHalf half = (VecHalf)_mm256_maskz_loadu_epi16((1u << count) - 1, from);
  return (Vec)(__builtin_convertvector(half, VecBits) << 16);
}

ALWAYS void store_some(float* to, Vec value, int count) {
  _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)value);
}

ALWAYS void store_some(BFloat16* to, Vec value, int count) {
  BFloat16 padded[W];
  store(padded, value);
  std::memcpy(to, padded, count * sizeof(BFloat16));
}
#else
template <class T>
ALWAYS Vec load_some(const T* from, int count) {
  T padded[W] = {};
  if (count == W / 2)
    std::memcpy(padded, from, W / 2 * sizeof(T));
  else
    std::memcpy(padded, from, count * sizeof(T));
  return load(padded);
}

template <class T>
ALWAYS void store_some(T* to, Vec value, int count) {
  T padded[W];
  store(padded, value);
  std::memcpy(to, padded, count * sizeof(T));
}
#endif

template <class T>
ALWAYS Vec load_up_to(const T* from, int count) {
  return count >= W ? load(from) : load_some(from, count);
}

template <class T>
ALWAYS void store_up_to(T* to, Vec value, int count) {
  count >= W ? store(to, value) : store_some(to, value, count);
}

// -- lanes ---

ALWAYS VecInt lanes() {  // 0, 1, 2, ...
  VecInt out;
  for (int i = 0; i < W; ++i) out[i] = i;
  return out;
}

#ifdef __clang__
template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountTo : CountTo<N - 1, N - 1, I...> {};
template <int... I>
struct CountTo<0, I...> {
  static ALWAYS Vec low(Vec a, Vec b) { return __builtin_shufflevector(a, b, (I % 2 ? W + I / 2 : I / 2)...); }
  static ALWAYS Vec high(Vec a, Vec b) {
    return __builtin_shufflevector(a, b, (I % 2 ? W + W / 2 + I / 2 : W / 2 + I / 2)...);
  }
};
ALWAYS Vec interleave_low(Vec a, Vec b) { return CountTo<W>::low(a, b); }
ALWAYS Vec interleave_high(Vec a, Vec b) { return CountTo<W>::high(a, b); }
#else
ALWAYS Vec interleave_low(Vec a, Vec b) {  // a0 b0 a1 b1 ... of the lower halves
  VecInt at = lanes();
  return __builtin_shuffle(a, b, at / 2 + (at % 2) * W);
}

ALWAYS Vec interleave_high(Vec a, Vec b) {  // the same of the upper halves
  VecInt at = lanes();
  return __builtin_shuffle(a, b, at / 2 + (at % 2) * W + W / 2);
}
#endif

// W vectors to their transpose, in place.
ALWAYS void transpose(Vec (&rows)[W]) {
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Vec out[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      out[2 * i] = interleave_low(rows[i], rows[i + W / 2]);
      out[2 * i + 1] = interleave_high(rows[i], rows[i + W / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = out[i];
  }
}

// The sum of each of W vectors: lane i is that of rows[i].
template <int N = W>
ALWAYS Vec sums(const Vec* rows) {
  if constexpr (N == 1) {
    return rows[0];
  } else {
    Vec half[N / 2];
#pragma GCC unroll 16
    for (int i = 0; i < N / 2; ++i)
      half[i] = interleave_low(rows[i], rows[i + N / 2]) + interleave_high(rows[i], rows[i + N / 2]);
    return sums<N / 2>(half);
  }
}

ALWAYS float sum(Vec value) {
  float out = 0;
  for (int i = 0; i < W; ++i) out += value[i];
  return out;
}

ALWAYS float largest(Vec value) {
  float out = value[0];
  for (int i = 1; i < W; ++i) out = value[i] > out ? value[i] : out;
  return out;
}

// -- functions ---

// e^x to 2 units in the last place; 0 below -87.3 and for -infinity; NaN stays NaN. x is at most 88.
ALWAYS Vec exp(Vec x) {
  Vec in = x;
  x = x < -87.3f ? all(-87.3f) : x;
  Vec shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the fraction is rounded away
  Vec n = shifted - 12582912.0f;
  Vec r = x - n * 0.693359375f + n * 2.12194440e-4f;  // log 2 in two parts
  Vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  Vec power = (Vec)(((VecInt)shifted << 23) + 0x3f800000);  // 2^n, out of the bits of the rounded number
  Vec out = p * power;
  return in < -87.3f ? Vec{} : out;
}

ALWAYS Vec at_most(Vec x, float limit) { return x > limit ? all(limit) : x; }
ALWAYS Vec at_least(Vec x, float limit) { return x < limit ? all(limit) : x; }

// 0 below -87: what it would be there a large factor would not make small (silu of -1e38 is 0).
ALWAYS Vec sigmoid(Vec x) {
  Vec out = 1.0f / (1.0f + exp(at_most(-x, 87.0f)));
  return x < -87.0f ? Vec{} : out;
}

ALWAYS Vec tanh(Vec x) {
  Vec size = x < 0 ? -x : x;
  Vec e = exp(-2.0f * size);
  // near 0 the difference would cancel: there the odd series is as exact
  Vec squared = x * x;
  Vec series = size * (1.0f + squared * (-0.33333333f + squared * (0.13333333f + squared * -0.05396825f)));
  Vec out = size < 0.2f ? series : (1.0f - e) / (1.0f + e);
  return x < 0 ? -out : out;
}

}  // namespace heddle
