// The causal depthwise convolution with SiLU, forward and backward, vectorised over channels.
//
//   p_t = bias + sum_k weight_k x_{t - (taps - 1) + k},   y_t = p_t sigmoid(p_t)   (or p_t)
//   q_t = dy_t dy/dp,   dx_t = sum_k weight_k q_{t + (taps - 1) - k},   dweight_k = sum_t q_t x_{t - (taps - 1) + k}
//
// A task is one picture and one tile of channels; t counts in scan order. It walks chunks of STEP tokens, whose x it first
// copies into scratch: past, padding and direction end there, and rows that lie far apart cannot push each other out of
// the cache. The backward recomputes p.
#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {
namespace {

constexpr int64_t TILE = 64;  // channels of one task
constexpr int64_t STEP = 16;  // tokens of a chunk
constexpr int64_t TAPS = 4;   // of every published network; others take the slower way

struct Tile {
  const Conv& a;
  int64_t picture, first, count, lanes;  // lanes: count, rounded up to whole vectors
  Tile(const Conv& args, int64_t task) : a(args) {
    const int64_t tiles = (args.channels + TILE - 1) / TILE;
    picture = task / tiles;
    first = task % tiles * TILE;
    count = args.channels - first < TILE ? args.channels - first : TILE;
    lanes = (count + W - 1) / W * W;
  }
  int64_t token(int64_t t) const { return a.reverse ? a.length - 1 - t : t; }
  const float* row_of(const Rows& rows, int64_t t) const {
    return rows.data + picture * rows.b + token(t) * rows.l + first;
  }
  float* row_of(const OutRows& rows, int64_t t) const { return rows.data + picture * rows.b + token(t) * rows.l + first; }
  float* slope_of(int64_t t) const { return a.slope + (picture * a.length + token(t)) * a.channels + first; }
  void prefetch(const Rows& rows, int64_t t) const {
    if (t < 0 || t >= a.length) return;
    for (int64_t c = 0; c < TILE; c += 16) __builtin_prefetch(row_of(rows, t) + c, 0, 2);
  }
  // x at scan position t >= -(taps - 1); null: zeros
  const float* x(int64_t t) const {
    if (t >= 0) return row_of(a.x, t);
    return a.past ? a.past + picture * a.past_b + (t + a.taps - 1) * a.channels + first : nullptr;
  }
};

// What a task keeps in scratch, all in rows of TILE.
struct Rooms {
  float *weight, *bias, *x, *p, *w, *sums, *q;  // taps; 1; taps - 1 + STEP; STEP; STEP; taps + 1; STEP + taps - 1
  static int64_t floats(const Conv& a) { return (4 * a.taps + 4 * STEP) * TILE; }
  Rooms(const Tile& tile, float* at) {
    const int64_t K = tile.a.taps;
    weight = at;
    bias = weight + K * TILE;
    x = bias + TILE;
    p = x + (K - 1 + STEP) * TILE;
    w = p + STEP * TILE;
    sums = w + STEP * TILE;
    q = sums + (K + 1) * TILE;
    for (int64_t c = 0; c < tile.lanes; c += W) {
      for (int64_t k = 0; k < K; ++k)
        store(weight + k * TILE + c, load_part(tile.a.weight + k * tile.a.channels + tile.first + c, tile.count - c));
      store(bias + c, tile.a.bias ? load_part(tile.a.bias + tile.first + c, tile.count - c) : vf{});
    }
  }
};

// x of a chunk and of the taps - 1 positions before it.
void read_x(const Tile& tile, const Rooms& r, int64_t from, int64_t to) {
  const int64_t K = tile.a.taps;
  for (int64_t t = from - (K - 1); t < to; ++t) {
    const float* row = tile.x(t);
    for (int64_t c = 0; c < tile.lanes; c += W)
      store(r.x + (t + (K - 1) - from) * TILE + c, row ? load_part(row + c, tile.count - c) : vf{});
  }
}

// The chunk's p, and what its sigmoid is made of.
void convolve(const Tile& tile, const Rooms& r, int64_t from, int64_t to) {
  const int64_t K = tile.a.taps;
  for (int64_t c = 0; c < tile.lanes; c += W) {
    const float *x = r.x + c, *weight = r.weight + c;
    const vf bias = load(r.bias + c);
    float* p = r.p + c;
    if (K == TAPS) {
      const vf w0 = load(weight), w1 = load(weight + TILE), w2 = load(weight + 2 * TILE), w3 = load(weight + 3 * TILE);
      vf x0 = load(x), x1 = load(x + TILE), x2 = load(x + 2 * TILE);
      for (int64_t t = 0; t < to - from; ++t) {
        const vf x3 = load(x + (t + 3) * TILE);
        store(p + t * TILE, bias + w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3);
        x0 = x1, x1 = x2, x2 = x3;
      }
    } else {
      for (int64_t t = 0; t < to - from; ++t) {
        vf sum = bias;
        for (int64_t k = 0; k < K; ++k) sum += load(weight + k * TILE) * load(x + (t + k) * TILE);
        store(p + t * TILE, sum);
      }
    }
  }
  for (int64_t t = 0; tile.a.silu && t < to - from; ++t)
    for (int64_t c = t * TILE; c < t * TILE + tile.lanes; c += W) store(r.w + c, decay(load(r.p + c)));
}

}  // namespace

int conv_forward(const Conv& a) {
  const int64_t tasks = a.batch * ((a.channels + TILE - 1) / TILE);
  return parallel(tasks, a.threads, Rooms::floats(a), [&](int64_t task, float* scratch) {
    const Tile tile(a, task);
    const Rooms r(tile, scratch);
    for (int64_t from = 0; from < a.length; from += STEP) {
      const int64_t to = from + STEP < a.length ? from + STEP : a.length;
      read_x(tile, r, from, to);
      convolve(tile, r, from, to);
      for (int64_t t = from; t < to; ++t) {
        tile.prefetch(a.x, t + STEP);
        float *row = tile.row_of(a.y, t), *slope = a.slope ? tile.slope_of(t) : nullptr;
        for (int64_t c = 0; c < tile.lanes; c += W) {
          const vf p = load(r.p + (t - from) * TILE + c);
          const vf s = a.silu ? sigmoid(p, load(r.w + (t - from) * TILE + c)) : splat(1.0f);
          store_part(row + c, p * s, tile.count - c);
          if (slope) store_part(slope + c, a.silu ? s * (1.0f + p * (1.0f - s)) : s, tile.count - c);
        }
      }
    }
  });
}

namespace {

// q = dL/dp of a chunk: r.p and r.w describe it, or the slope that the forward left.
void backward_activation(const Tile& tile, const Rooms& r, int64_t from, int64_t to) {
  for (int64_t t = from; t < to; ++t) {
    const float* row = tile.row_of(tile.a.dy, t);
    for (int64_t c = 0; c < tile.lanes; c += W) {
      const int64_t o = (t - from) * TILE + c;
      vf dp = load_part(row + c, tile.count - c);
      if (tile.a.slope) {
        dp *= load_part(tile.slope_of(t) + c, tile.count - c);
      } else if (tile.a.silu) {
        const vf p = load(r.p + o), s = sigmoid(p, load(r.w + o));
        dp *= s * (1.0f + p * (1.0f - s));
      }
      store(r.q + o, dp);
    }
  }
}

// Adds a chunk's part of dweight and, last, dbias.
void backward_weight(const Tile& tile, const Rooms& r, int64_t steps) {
  const int64_t K = tile.a.taps;
  for (int64_t c = 0; c < tile.lanes; c += W) {
    for (int64_t k = 0; k <= K; ++k) {
      vf even = load(r.sums + k * TILE + c), odd = {};  // two sums: one would wait for itself
      const float *q = r.q + c, *x = r.x + k * TILE + c;
      for (int64_t t = 0; t < steps; t += 2) {
        even += k < K ? load(q + t * TILE) * load(x + t * TILE) : load(q + t * TILE);
        if (t + 1 < steps) odd += k < K ? load(q + (t + 1) * TILE) * load(x + (t + 1) * TILE) : load(q + (t + 1) * TILE);
      }
      store(r.sums + k * TILE + c, even + odd);
    }
  }
}

// dx = sum_k weight_k q_{t + (taps - 1) - k}: `ahead` is the row of q that the first tap reads, `taps` how many there are
void backward_row(const Tile& tile, const Rooms& r, const float* ahead, int64_t taps, float* row, bool accumulate) {
  for (int64_t c = 0; c < tile.lanes; c += W) {
    vf dx = accumulate ? load_part(row + c, tile.count - c) : vf{};
    for (int64_t k = 0; k < taps; ++k) dx += load(r.weight + k * TILE + c) * load(ahead - k * TILE + c);
    store_part(row + c, dx, tile.count - c);
  }
}

}  // namespace

int conv_backward(const Conv& a) {
  const int64_t K = a.taps, tasks = a.batch * ((a.channels + TILE - 1) / TILE);
  return parallel(tasks, a.threads, Rooms::floats(a), [&](int64_t task, float* scratch) {
    const Tile tile(a, task);
    const Rooms r(tile, scratch);
    std::memset(r.sums, 0, sizeof(float) * (K + 1 + STEP + K - 1) * TILE);  // and q, which follows
    // q holds positions [from, from + STEP + K - 1): a chunk and the K - 1 positions after it, walked from the end
    for (int64_t from = (a.length - 1) / STEP * STEP; from >= 0; from -= STEP) {
      const int64_t to = from + STEP < a.length ? from + STEP : a.length;
      for (int64_t t = from; t < to; ++t) {
        if (a.slope) tile.prefetch({a.slope, a.length * a.channels, a.channels, 0}, t - STEP);
        if (!a.slope || a.dweight) tile.prefetch(a.x, t - STEP);
        tile.prefetch(a.dy, t - STEP);
        tile.prefetch({a.y.data, a.y.b, a.y.l, 0}, t - STEP);
      }
      if (!a.slope || a.dweight) read_x(tile, r, from, to);
      if (!a.slope) convolve(tile, r, from, to);
      backward_activation(tile, r, from, to);
      if (a.dweight) backward_weight(tile, r, to - from);
      const float* ahead = r.q + (K - 1) * TILE;
      for (int64_t t = from; t < to; ++t, ahead += TILE) {
        if (K == TAPS) backward_row(tile, r, ahead, TAPS, tile.row_of(a.y, t), a.accumulate);
        else backward_row(tile, r, ahead, K, tile.row_of(a.y, t), a.accumulate);
      }
      for (int64_t t = 1 - K; from == 0 && a.dpast && t < 0; ++t) {  // the past has no q of its own
        float* row = a.dpast + (tile.picture * (K - 1) + t + K - 1) * a.channels + tile.first;
        backward_row(tile, r, r.q + (t + K - 1) * TILE, t + K, row, false);
      }
      std::memmove(r.q + STEP * TILE, r.q, sizeof(float) * (K - 1) * TILE);  // the next chunk looks ahead into this one
    }
    if (a.dweight)
      for (int64_t k = 0; k <= K; ++k)
        for (int64_t c = 0; c < tile.lanes; c += W) {
          float* row = a.dweight + (tile.picture * (K + 1) + k) * a.channels + tile.first;
          store_part(row + c, load(r.sums + k * TILE + c), tile.count - c);
        }
  });
}

}  // namespace SVP_NS
}  // namespace svp
