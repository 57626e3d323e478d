// The causal depthwise convolution with SiLU, forward and backward, vectorised over channels.
//
//   p_t = bias + sum_k weight_k x_{t - (taps - 1) + k},   y_t = p_t sigmoid(p_t)   (or p_t)
//   q_t = dy_t dy/dp,   dx_t = sum_k weight_k q_{t + (taps - 1) - k},   dweight_k = sum_t q_t x_{t - (taps - 1) + k}
//
// A task is one picture and one tile of channels; t counts in scan order. The backward recomputes p.
#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {
namespace {

constexpr int TILE = 64;      // channels of one task
constexpr int64_t STEP = 32;  // tokens whose q is kept at a time
constexpr int64_t AHEAD = 8;  // tokens between asking for a row and reading it
constexpr int64_t TAPS = 4;   // of every published network; others take the slower way

struct Tile {
  const Conv& a;
  int64_t picture, first, count;
  Tile(const Conv& args, int64_t task) : a(args) {
    const int64_t tiles = (args.channels + TILE - 1) / TILE;
    picture = task / tiles;
    first = task % tiles * TILE;
    count = args.channels - first < TILE ? args.channels - first : TILE;
  }
  bool is_fast(int64_t t) const { return t >= TAPS - 1 && a.taps == TAPS && count == TILE; }
  void prefetch(const Rows& rows, int64_t t) const {
    if (t < 0 || t >= a.length) return;
    const float* row = rows.data + picture * rows.b + token(t) * rows.l + first;
    for (int64_t c = 0; c < TILE; c += 16) __builtin_prefetch(row + c, 0, 2);
  }
  int64_t token(int64_t t) const { return a.reverse ? a.length - 1 - t : t; }
  // x at scan position t >= -(taps - 1), lanes from channel c of the tile
  inline __attribute__((always_inline)) vf x(int64_t t, int64_t c) const {
    if (t >= 0) return load_part(a.x.data + picture * a.x.b + token(t) * a.x.l + first + c, count - c);
    if (!a.past) return vf{};
    return load_part(a.past + picture * a.past_b + (t + a.taps - 1) * a.channels + first + c, count - c);
  }
};

// p at position t of W channels. FAST: the taps are TAPS, no past is needed and all lanes exist.
template <bool FAST>
SVP_INLINE vf taps_at(const Tile& tile, const float* weight, const float* bias, int64_t t, int64_t c) {
  vf p = load(bias + c);
  if (FAST) {
    const int64_t back = tile.a.reverse ? tile.a.x.l : -tile.a.x.l;  // floats to the token before, in scan order
    const float* x = tile.a.x.data + tile.picture * tile.a.x.b + tile.token(t) * tile.a.x.l + tile.first + c;
    for (int64_t k = 0; k < TAPS; ++k) p += load(weight + k * TILE + c) * load(x + (TAPS - 1 - k) * back);
  } else {
    const int64_t K = tile.a.taps;
    for (int64_t k = 0; k < K; ++k) p += load(weight + k * TILE + c) * tile.x(t - (K - 1) + k, c);
  }
  return p;
}

void copy_weight(const Tile& tile, float* weight, float* bias) {
  for (int64_t c = 0; c < TILE; c += W) {
    for (int64_t k = 0; k < tile.a.taps; ++k)
      store(weight + k * TILE + c, load_part(tile.a.weight + k * tile.a.channels + tile.first + c, tile.count - c));
    store(bias + c, tile.a.bias ? load_part(tile.a.bias + tile.first + c, tile.count - c) : vf{});
  }
}

}  // namespace

int conv_forward(const Conv& a) {
  const int64_t tasks = a.batch * ((a.channels + TILE - 1) / TILE);
  return parallel(tasks, a.threads, (a.taps + 1) * TILE, [&](int64_t task, float* scratch) {
    const Tile tile(a, task);
    float *weight = scratch, *bias = weight + a.taps * TILE;
    copy_weight(tile, weight, bias);
    for (int64_t t = 0; t < a.length; ++t) {
      float* row = a.y + (tile.picture * a.length + tile.token(t)) * a.channels + tile.first;
      tile.prefetch(a.x, t + AHEAD);
      if (tile.is_fast(t)) {
        for (int64_t c = 0; c < TILE; c += W) {
          const vf p = taps_at<true>(tile, weight, bias, t, c);
          store(row + c, a.silu ? p * sigmoid(p, decay(p)) : p);
        }
      } else {
        for (int64_t c = 0; c < tile.count; c += W) {
          const vf p = taps_at<false>(tile, weight, bias, t, c);
          store_part(row + c, a.silu ? p * sigmoid(p, decay(p)) : p, tile.count - c);
        }
      }
    }
  });
}

namespace {

// q = dL/dp at position t, and the sums of dweight and dbias when they are asked for.
template <bool FAST>
SVP_INLINE void backward_row(const Tile& tile, const float* weight, const float* bias, int64_t t, float* q, float* sums) {
  const Conv& a = tile.a;
  const float* row = a.dy.data + tile.picture * a.dy.b + tile.token(t) * a.dy.l + tile.first;
  for (int64_t c = 0; c < (FAST ? TILE : tile.count); c += W) {
    vf dp = FAST ? load(row + c) : load_part(row + c, tile.count - c);
    if (a.silu) {
      const vf p = taps_at<FAST>(tile, weight, bias, t, c), s = sigmoid(p, decay(p));
      dp *= s * (1.0f + p * (1.0f - s));
    }
    store(q + c, dp);
    if (!a.dweight) continue;
    for (int64_t k = 0; k < a.taps; ++k) {
      float* sum = sums + k * TILE + c;
      store(sum, load(sum) + dp * tile.x(t - (a.taps - 1) + k, c));
    }
    store(sums + a.taps * TILE + c, load(sums + a.taps * TILE + c) + dp);
  }
}

}  // namespace

int conv_backward(const Conv& a) {
  const int64_t K = a.taps, tasks = a.batch * ((a.channels + TILE - 1) / TILE);
  return parallel(tasks, a.threads, (2 * (K + 1) + STEP + K) * TILE, [&](int64_t task, float* scratch) {
    const Tile tile(a, task);
    float *weight = scratch, *bias = weight + K * TILE, *sums = bias + TILE, *q = sums + (K + 1) * TILE;
    copy_weight(tile, weight, bias);
    std::memset(sums, 0, sizeof(float) * (K + 1 + STEP + K) * TILE);
    // q holds positions [from, from + STEP + K - 1): a chunk and the K - 1 positions after it, walked from the end
    for (int64_t from = (a.length - 1) / STEP * STEP; from >= 0; from -= STEP) {
      const int64_t to = from + STEP < a.length ? from + STEP : a.length;
      for (int64_t t = from; t < to; ++t) {
        tile.prefetch(a.x, t - STEP);
        tile.prefetch(a.dy, t - STEP);
        tile.prefetch({a.y, a.length * a.channels, a.channels, 0}, t - STEP);
        if (tile.is_fast(t)) backward_row<true>(tile, weight, bias, t, q + (t - from) * TILE, sums);
        else backward_row<false>(tile, weight, bias, t, q + (t - from) * TILE, sums);
      }
      // dx of the chunk; at the very start also that of the past
      for (int64_t t = from > 0 || !a.dpast ? from : 1 - K; t < to; ++t) {
        float* row = t >= 0 ? a.y + (tile.picture * a.length + tile.token(t)) * a.channels + tile.first
                            : a.dpast + (tile.picture * (K - 1) + t + K - 1) * a.channels + tile.first;
        const float* ahead = q + (t + (K - 1) - from) * TILE;
        if (t >= 0 && K == TAPS && tile.count == TILE) {
          for (int64_t c = 0; c < TILE; c += W) {
            vf dx = {};
            for (int64_t k = 0; k < TAPS; ++k) dx += load(weight + k * TILE + c) * load(ahead - k * TILE + c);
            store(row + c, dx);
          }
          continue;
        }
        for (int64_t c = 0; c < tile.count; c += W) {
          vf dx = {};
          for (int64_t k = 0; k < K && t + (K - 1) - k >= 0; ++k)
            dx += load(weight + k * TILE + c) * load(ahead - k * TILE + c);
          store_part(row + c, dx, tile.count - c);
        }
      }
      std::memmove(q + STEP * TILE, q, sizeof(float) * (K - 1) * TILE);  // the next chunk looks ahead into this one
    }
    if (a.dweight)
      for (int64_t k = 0; k <= K; ++k)
        for (int64_t c = 0; c < tile.count; c += W)
          store_part(a.dweight + (tile.picture * (K + 1) + k) * a.channels + tile.first + c, load(sums + k * TILE + c), tile.count - c);
  });
}

}  // namespace SVP_NS
}  // namespace svp
