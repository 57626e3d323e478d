// One vector of floats per instruction-set level, and the few functions of it that the kernels need.
// SVP_LEVEL 2: AVX-512 (16 lanes), 1: AVX2 + FMA (8), 0: whatever the compiler has, NEON on arm64 included (4).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
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

SVP_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

SVP_INLINE vf larger(vf a, vf b) {  // a NaN in b stays one
#if SVP_LEVEL == 1
  return (vf)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select(a > b, a, b);
#endif
}
SVP_INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7fffffff); }
SVP_INLINE bool any(vi mask) {
  int64_t parts[W / 2], some = 0;
  std::memcpy(parts, &mask, sizeof mask);
  for (int64_t part : parts) some |= part;
  return some != 0;
}

// 2^t, exact at 0. t = k + r with k the nearest multiple of 1 / PARTS: 2^k by table and exponent, 2^r - 1 by a minimax
// polynomial of our own whose error vanishes with r, so that a slow state forgets at the right pace.
#if SVP_LEVEL == 2
constexpr int PARTS = 16;  // polynomial 2e-9
alignas(64) static const float ROOTS[16] = {
    0x1.000000p+0f, 0x1.0b5586p+0f, 0x1.172b84p+0f, 0x1.2387a6p+0f, 0x1.306fe0p+0f, 0x1.3dea64p+0f, 0x1.4bfdaep+0f, 0x1.5ab07ep+0f,
    0x1.6a09e6p+0f, 0x1.7a1148p+0f, 0x1.8ace54p+0f, 0x1.9c4918p+0f, 0x1.ae89fap+0f, 0x1.c199bep+0f, 0x1.d5818ep+0f, 0x1.ea4afap+0f};

SVP_INLINE vf exp2v(vf t) {  // t finite; underflow is gradual
  constexpr float SHIFT = 0x1.8p+23f / PARTS;  // its last bit is 1 / PARTS
  const vf shifted = t + SHIFT, k = shifted - SHIFT, r = t - k;
  const vf root = (vf)_mm512_permutexvar_ps((__m512i)shifted, (__m512)load(ROOTS));
  const vf p = ((r * 0x1.c6acdap-5f + 0x1.ebfff4p-3f) * r + 0x1.62e430p-1f) * r;
  return (vf)_mm512_scalef_ps((__m512)(p * root + root), (__m512)k);
}
SVP_INLINE vf exp2_near(vf t) { return exp2v(t); }
SVP_INLINE vf exp2_below(vf t) { return exp2v(t); }
#else
#if SVP_LEVEL == 1
constexpr int PARTS = 8;  // polynomial 2.6e-8
alignas(32) static const int32_t ROOTS[8] = {  // mantissa of 2^(i / 8), with i << 20 taken out
    0x000000, 0x1b95c2, 0x3837f0, 0x15fed7, 0x7504f3, 0x15672a, 0x3744fd, 0x1ac0c7};
#else
constexpr int PARTS = 1;  // polynomial 4e-9
#endif

SVP_INLINE vf exp2_near(vf t) {  // for |t| <= 126; a NaN stays one
  constexpr float SHIFT = (0x1.8p+23f + 127 * PARTS) / PARTS;  // its last bit is 1 / PARTS; 127: the exponent's bias
  const vf shifted = t + SHIFT, r = t - (shifted - SHIFT);
#if SVP_LEVEL == 1
  const vi root = (vi)_mm256_permutevar8x32_epi32((__m256i)load((const float*)ROOTS), (__m256i)shifted);
  const vf scale = (vf)(root ^ ((vi)shifted << 20));
  const vf p = (r * 0x1.c6b0e2p-5f + 0x1.ec0c1ep-3f) * r + 0x1.62e430p-1f;
#else
  const vf scale = (vf)((vi)shifted << 23);
  vf p = r * 0x1.415fcap-13f + 0x1.5f0934p-10f;
  p = r * p + 0x1.3b2dfap-7f;
  p = r * p + 0x1.c6af7ap-5f;
  p = r * p + 0x1.ebfbdcp-3f;
  p = r * p + 0x1.62e430p-1f;
#endif
  return p * (r * scale) + scale;
}
SVP_INLINE vf exp2_below(vf t) { return exp2_near(larger(splat(-126.0f), t)); }  // for t <= 126
SVP_INLINE vf exp2v(vf t) {  // 2^-126 stands for all that is less, infinity for 2^128 and more; a NaN stays one
  const vi high = t > splat(126.0f);
  const vf low = exp2_below(select(high, select(t > splat(128.5f), splat(126.0f), t - 2.0f), t));
  return low * select(high, splat(4.0f), splat(1.0f));
}
#endif

constexpr float LOG2E = 1.44269504088896341f, LN2 = 0.693147180559945309f;

SVP_INLINE vf reciprocal(vf x) {  // of a finite number from 1 on
#if SVP_LEVEL == 2
  const vf y = (vf)_mm512_rcp14_ps((__m512)x);
  return y * (1.0f - x * y) + y;
#elif SVP_LEVEL == 1
  const vf y = (vf)_mm256_rcp_ps((__m256)x);
  return y * (1.0f - x * y) + y;
#else
  return 1.0f / x;
#endif
}

// log(1 + w) for w in [0, 1], relatively exact.
SVP_INLINE vf log1p_unit(vf w) {
#if SVP_LEVEL == 2  // 2 atanh(s), s = w / (2 + w) <= 1/3
  const vf s = w * reciprocal(w + 2.0f), q = s * s;
  vf p = q * (2.0f / 15) + (2.0f / 13);
  p = q * p + (2.0f / 11);
  p = q * p + (2.0f / 9);
  p = q * p + (2.0f / 7);
  p = q * p + (2.0f / 5);
  p = q * p + (2.0f / 3);
  return s * (q * p + 2.0f);
#else  // a minimax polynomial, 5e-9: the quotient costs more than its shorter series saves
  const vf q = w * w;  // even and odd powers apart: two chains half as long
  vf even = q * -0x1.a93364p-9f - 0x1.d29cc8p-5f, odd = q * 0x1.453f0cp-6f + 0x1.b2535ep-4f;
  even = q * even - 0x1.397562p-3f;
  odd = q * odd + 0x1.92f696p-3f;
  even = q * even - 0x1.ff0f88p-3f;
  odd = q * odd + 0x1.554c80p-2f;
  even = q * even - 0x1.ffffbep-2f;
  return q * (w * odd + even) + w;
#endif
}

// What softplus and sigmoid of x are made of: exp(-|x|).
SVP_INLINE vf decay(vf x) { return exp2_below(absolute(x) * -LOG2E); }

// max(x, 0) + log1p(exp(-|x|)); above 20 this is x to the last bit, as torch has it. Its derivative is the sigmoid.
SVP_INLINE vf softplus(vf x, vf decay_x) { return larger(vf{}, x) + log1p_unit(decay_x); }
SVP_INLINE vf sigmoid(vf x, vf decay_x) {
  return select(x > vf{}, splat(1.0f), decay_x) * reciprocal(decay_x + 1.0f);
}

// A few vectors side by side, each step for all of them before the next: a chain of operations as long as softplus leaves a
// processor nothing to overlap it with.
constexpr int SIDE = 4;
typedef vf Side[SIDE];
#define EACH for (int i = 0; i < SIDE; ++i)

// body(c, left) from every `step` floats on; left, how many there are, is a constant except at the end.
template <int step, typename Body>
SVP_INLINE void along(int64_t count, Body body) {
  int64_t c = 0;
  for (; c + step <= count; c += step) body(c, std::integral_constant<int64_t, step>());
  if (c < count) body(c, count - c);
}
#define ALONG(step, count) along<step>(count, [&](int64_t c, auto left) __attribute__((always_inline))

constexpr std::integral_constant<int64_t, SIDE * W> WHOLE;

template <typename Left>
SVP_INLINE void load_side(const float* p, Left left, Side& x) {
  EACH x[i] = load_part(p + i * W, left - i * W);
}
template <typename Left>
SVP_INLINE void store_side(float* p, const Side& x, Left left) {
  EACH store_part(p + i * W, x[i], left - i * W);
}
SVP_INLINE void sigmoids(const Side& x, Side& s) {
  EACH s[i] = decay(x[i]);
  EACH s[i] = sigmoid(x[i], s[i]);
}
// gate = dout silu'(z), and dy = dout silu(z) in the place of dout.
template <typename Left>
SVP_INLINE void gates(const float* z, Left left, Side& dy, Side& gate) {
  Side zt, s;
  load_side(z, left, zt);
  sigmoids(zt, s);
  EACH {
    gate[i] = dy[i] * s[i] * (1.0f + zt[i] * (1.0f - s[i]));
    dy[i] *= zt[i] * s[i];
  }
}

// The lanes' sum of `count` vectors, in an order fixed by W alone.
SVP_INLINE void sum_rows(const float* rows, int64_t count, float* sums) {
  int64_t i = 0;
#if SVP_LEVEL == 2
  const auto pairs = [](__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); };
  const auto fours = [&](const float* p) {  // in each 128 bits the part of four sums
    const __m512d ab = (__m512d)pairs(_mm512_load_ps(p), _mm512_load_ps(p + 16));
    const __m512d cd = (__m512d)pairs(_mm512_load_ps(p + 32), _mm512_load_ps(p + 48));
    return _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  };
  const auto fold = [](__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  };
  for (; i + 16 <= count; i += 16) {
    const float* p = rows + i * W;
    _mm512_storeu_ps(sums + i, fold(fold(fours(p), fours(p + 64)), fold(fours(p + 128), fours(p + 192))));
  }
#elif SVP_LEVEL == 1
  for (; i + 8 <= count; i += 8) {
    const auto row = [&](int k) { return (__m256)load(rows + (i + k) * W); };
    const auto fours = [&](int k) {  // in each 128 bits the part of four sums
      return _mm256_hadd_ps(_mm256_hadd_ps(row(k), row(k + 1)), _mm256_hadd_ps(row(k + 2), row(k + 3)));
    };
    const __m256 a = fours(0), b = fours(4);
    store(sums + i, (vf)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31)));
  }
#endif
  for (; i < count; ++i) {
    vf v = load(rows + i * W);
    for (int half = W / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) v[lane] += v[lane + half];
    sums[i] = v[0];
  }
}
