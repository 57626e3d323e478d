// One vector of floats per instruction-set level, and the few functions of it that the kernels need.
// SVP_LEVEL 2: AVX-512 (16 lanes), 1: AVX2 + FMA (8), 0: whatever the compiler has, NEON on arm64 included (4).
#pragma once
#include <cstdint>
#include <cstring>
#if SVP_LEVEL > 0
#include <immintrin.h>
#endif

#define SVP_INLINE static inline __attribute__((always_inline))

#if SVP_LEVEL == 2
#define SVP_NS level_2
constexpr int W = 16;
#elif SVP_LEVEL == 1
#define SVP_NS level_1
constexpr int W = 8;
#else
#define SVP_NS level_0
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

SVP_INLINE vf load(const float* p) {
  vf v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
SVP_INLINE void store(float* p, vf v) { std::memcpy(p, &v, sizeof v); }
SVP_INLINE vf splat(float x) { return x - vf{}; }

// The first `count` lanes; the others read as zero and are not written.
SVP_INLINE vf load_part(const float* p, int64_t count) {
  if (count >= W) return load(p);
  vf v = {};
  if (count > 0) std::memcpy(&v, p, count * sizeof(float));
  return v;
}
SVP_INLINE void store_part(float* p, vf v, int64_t count) {
  if (count >= W) store(p, v);
  else if (count > 0) std::memcpy(p, &v, count * sizeof(float));
}

SVP_INLINE float sum(vf v) {  // in a fixed order
  float s = 0;
  for (int half = W / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) v[i] += v[i + half];
  s = v[0];
  return s;
}

SVP_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

// 2^r for r in [0, 1): relative error 7.5e-8 before rounding, by a minimax polynomial of our own.
SVP_INLINE vf exp2_fraction(vf r) {
  vf p = r * 0x1.ec32100000000p-10f + 0x1.26900e0000000p-7f;
  p = r * p + 0x1.c954460000000p-5f;
  p = r * p + 0x1.ebd5a80000000p-3f;
  p = r * p + 0x1.62e4f60000000p-1f;
  return r * p + 0x1.fffffe0000000p-1f;
}

// 2^t; below 2^-126 zero (AVX-512: gradual), from 2^128 on infinity.
SVP_INLINE vf exp2v(vf t) {
#if SVP_LEVEL == 2
  const vf r = (vf)_mm512_reduce_ps((__m512)t, 0x09);  // t - floor(t)
  return (vf)_mm512_scalef_ps((__m512)exp2_fraction(r), (__m512)t);
#else
  const vi tiny = t < splat(-126.0f);
  t = select(t > splat(128.0f), splat(128.0f), t);
  t = select(tiny, splat(-126.0f), t);
#if SVP_LEVEL == 1
  const vf whole = (vf)_mm256_floor_ps((__m256)t);
  const vi power = (vi)_mm256_cvttps_epi32((__m256)whole);
#else
  vf whole = __builtin_convertvector(__builtin_convertvector(t, vi), vf);
  whole -= select(whole > t, splat(1.0f), vf{});
  const vi power = __builtin_convertvector(whole, vi);
#endif
  const vf scale = (vf)((power + 127) << 23);
  return select(tiny, vf{}, exp2_fraction(t - whole) * scale);
#endif
}

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

SVP_INLINE vf expv(vf x) { return exp2v(x * LOG2E); }

// log(1 + w) for w in [0, 1], relatively exact: 2 atanh(s), s = w / (2 + w) <= 1/3.
SVP_INLINE vf log1p_unit(vf w) {
  const vf s = w / (w + 2.0f), q = s * s;
  vf p = q * (2.0f / 15) + (2.0f / 13);
  p = q * p + (2.0f / 11);
  p = q * p + (2.0f / 9);
  p = q * p + (2.0f / 7);
  p = q * p + (2.0f / 5);
  p = q * p + (2.0f / 3);
  return s * (q * p + 2.0f);
}

SVP_INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }

// softplus(x) = max(x, 0) + log1p(exp(-|x|)); above 20 this is x to the last bit, as torch has it. slope: its derivative.
SVP_INLINE vf softplus(vf x, vf* slope = nullptr) {
  const vf w = expv(-absolute(x));
  const vi positive = x > vf{};
  if (slope) *slope = select(positive, splat(1.0f), w) / (w + 1.0f);
  return select(positive, x, vf{}) + log1p_unit(w);
}

SVP_INLINE vf sigmoid(vf x) { return 1.0f / (expv(-x) + 1.0f); }
