// The causal depthwise convolution with SiLU, forward and backward, vectorised over channels.
//
//   p_t = bias + sum_k weight_k x_{t - (taps - 1) + k},   y_t = p_t sigmoid(p_t)   (or p_t)
//   q_t = dy_t dy/dp,   dx_t = sum_k weight_k q_{t + (taps - 1) - k},   dweight_k = sum_t q_t x_{t - (taps - 1) + k}
//
// A task is SPAN tokens of one picture, t counts in scan order. It takes them SIDE at a time, side by side along whole rows:
// memory is read and written in runs as long as it has them, and a row is loaded once for all the taps that read it.
// Past, padding, direction and tokens that a block lacks end where rows become pointers. The backward recomputes dy/dp
// unless the forward left it.
#include <vector>

#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {
namespace {

constexpr int TAPS = 4;  // of every published network: their loops unroll

struct Picture {
  const Conv& a;
  const int64_t number;
  float *zeros, *dump;  // a row that reads as nothing, and one for what nobody wants
  Picture(const Conv& args, int64_t picture, float* scratch) : a(args), number(picture), zeros(scratch), dump(scratch + a.channels) {
    std::memset(zeros, 0, sizeof(float) * a.channels);
  }
  bool has(int64_t t) const { return t >= 0 && t < a.length; }
  int64_t token(int64_t t) const { return a.reverse ? a.length - 1 - t : t; }
  const float* row(const Rows& rows, int64_t t) const {
    return has(t) ? rows.data + number * rows.b + token(t) * rows.l : zeros;
  }
  const float* x(int64_t t) const {
    return t < 0 && a.past ? a.past + number * a.past_b + (t + a.taps - 1) * a.channels : row(a.x, t);
  }
  float* y(int64_t t) const { return has(t) ? a.y.data + number * a.y.b + token(t) * a.y.l : dump; }
  int64_t dense(int64_t t) const { return (number * a.length + token(t)) * a.channels; }
};

// What a block reads and writes: `x` begins taps - 1 tokens before it, `q` (made of dy and slope) ends as many after it.
struct Block {
  std::vector<const float*> x, dy, slope;
  float *y[SIDE], *out_slope[SIDE];
  explicit Block(int64_t taps) : x(taps - 1 + SIDE), dy(taps - 1 + SIDE), slope(taps - 1 + SIDE) {}
};

// y and dy/dp (where slopes are asked for) of SIDE tokens.
template <int taps, bool silu, bool slopes>
void forward_block(const Conv& a, const Block& block) {
  const int64_t count = taps ? taps : a.taps;
  ALONG(W, a.channels) {
    Side p, s;
    EACH p[i] = a.bias ? load_part(a.bias + c, left) : vf{};
    for (int64_t k = 0; k < count; ++k) {
      const vf weight = load_part(a.weight + k * a.channels + c, left);
      EACH p[i] += weight * load_part(block.x[i + k] + c, left);
    }
    if (silu) sigmoids(p, s);
    EACH {
      store_part(block.y[i] + c, silu ? p[i] * s[i] : p[i], left);
      if (slopes) store_part(block.out_slope[i] + c, silu ? s[i] * (1.0f + p[i] * (1.0f - s[i])) : splat(1.0f), left);
    }
  });
}

template <int taps>
void forward_block(const Conv& a, const Block& block, bool slopes) {
  (a.silu ? slopes ? forward_block<taps, true, true> : forward_block<taps, true, false>
          : slopes ? forward_block<taps, false, true> : forward_block<taps, false, false>)(a, block);
}

// dx of SIDE tokens, and what they add to dweight and, last, to dbias.
template <int taps, bool accumulate>
void backward_block(const Conv& a, const Block& block, float* dweight) {
  const int64_t count = taps ? taps : a.taps;
  ALONG(W, a.channels) {
    const auto q = [&](int64_t i) { return load_part(block.dy[i] + c, left) * load_part(block.slope[i] + c, left); };
    Side dx;
    EACH dx[i] = accumulate ? load_part(block.y[i] + c, left) : vf{};
    for (int64_t k = 0; k < count; ++k) {
      const vf weight = load_part(a.weight + k * a.channels + c, left);
      EACH dx[i] += weight * q(i + count - 1 - k);
    }
    EACH store_part(block.y[i] + c, dx[i], left);
    if (dweight) {
      Side own;
      EACH own[i] = q(i);
      for (int64_t k = 0; k <= count; ++k) {
        float* at = dweight + k * a.channels + c;
        vf sum = load_part(at, left);
        EACH sum += k < count ? own[i] * load_part(block.x[i + k] + c, left) : own[i];
        store_part(at, sum, left);
      }
    }
  });
}

void backward_block(const Conv& a, const Block& block, float* dweight, bool accumulate) {
  (a.taps == TAPS ? accumulate ? backward_block<TAPS, true> : backward_block<TAPS, false>
                  : accumulate ? backward_block<0, true> : backward_block<0, false>)(a, block, dweight);
}

struct Spans {
  const int64_t each, tasks;
  explicit Spans(const Conv& a) : each((a.length + SPAN - 1) / SPAN), tasks(each * a.batch) {}
};

}  // namespace

int conv_forward(const Conv& a) {
  const Spans spans(a);
  return parallel(spans.tasks, a.threads, 2 * a.channels, [&](int64_t task, float* scratch) {
    const Picture picture(a, task / spans.each, scratch);
    const int64_t first = task % spans.each * SPAN, end = first + SPAN < a.length ? first + SPAN : a.length;
    Block block(a.taps);
    for (int64_t t = first; t < end; t += SIDE) {
      for (int64_t i = 0; i < a.taps - 1 + SIDE; ++i) block.x[i] = picture.x(t - (a.taps - 1) + i);
      EACH {
        block.y[i] = picture.y(t + i);
        block.out_slope[i] = a.slope && picture.has(t + i) ? a.slope + picture.dense(t + i) : picture.dump;
      }
      (a.taps == TAPS ? forward_block<TAPS> : forward_block<0>)(a, block, a.slope != nullptr);
    }
  });
}

int conv_backward(const Conv& a) {
  const Spans spans(a);
  const int64_t ahead = a.taps - 1, kept = SPAN + ahead;
  const int64_t floats = (2 + (a.slope ? 0 : kept + SIDE)) * a.channels;
  return parallel(spans.tasks, a.threads, floats, [&](int64_t task, float* scratch) {
    const int64_t number = task / spans.each, span = task % spans.each;
    const Picture picture(a, number, scratch);
    const int64_t first = span * SPAN, end = first + SPAN < a.length ? first + SPAN : a.length;
    float* own = scratch + 2 * a.channels;  // slopes from `first` on, where the forward left none
    Block block(a.taps);
    for (int64_t t = first; !a.slope && t < end + ahead; t += SIDE) {
      for (int64_t i = 0; i < ahead + SIDE; ++i) block.x[i] = picture.x(t - ahead + i);
      EACH {
        block.y[i] = picture.dump;
        block.out_slope[i] = own + (t + i - first) * a.channels;
      }
      (a.taps == TAPS ? forward_block<TAPS> : forward_block<0>)(a, block, true);
    }
    const auto read = [&](int64_t t) {
      for (int64_t i = 0; i < ahead + SIDE; ++i) {
        const bool inside = picture.has(t + i) && t + i < end + ahead;
        block.dy[i] = inside ? picture.row(a.dy, t + i) : picture.zeros;
        block.slope[i] = !inside ? picture.zeros : a.slope ? a.slope + picture.dense(t + i) : own + (t + i - first) * a.channels;
        block.x[i] = picture.x(t - ahead + i);
      }
    };
    float* dweight = a.dweight ? a.dweight + (span * a.batch + number) * (a.taps + 1) * a.channels : nullptr;
    if (dweight) std::memset(dweight, 0, sizeof(float) * (a.taps + 1) * a.channels);
    for (int64_t t = first; t < end; t += SIDE) {
      read(t);
      EACH block.y[i] = picture.y(t + i);
      backward_block(a, block, dweight, a.accumulate);
    }
    for (int64_t t = -ahead; first == 0 && a.dpast && t < 0; t += SIDE) {  // the past has no q of its own
      read(t);
      EACH block.y[i] = t + i < 0 ? a.dpast + (number * ahead + t + i + ahead) * a.channels : picture.dump;
      backward_block(a, block, nullptr, false);
    }
  });
}

}  // namespace SVP_NS
}  // namespace svp
