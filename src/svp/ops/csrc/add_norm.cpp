// Between two blocks, forward and backward, a row of channels at a time:
//
//   s = x + residual + sum_j scale_j act_j(pre_j),   h = s r weight,   r = 1 / sqrt(mean(s²) + eps)
//   ds = dstream + r (q - s r² mean(q s)),  q = dh weight
//   dpre_j = ds scale_j act_j',  dscale_j = sum over tokens of ds act_j,  dweight = sum over tokens of dh s r
//
// A task is ROWS tokens of a picture; the sums over tokens are left as one part a task.
#include <cmath>

#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {
namespace {

struct Term {
  Rows pre;
  const float* scale;
  float *dpre, *dscale;
  int step, silu;
};

struct Task {
  const AddNorm& a;
  int64_t picture, first, end, index;
  Task(const AddNorm& args, int64_t task) : a(args), index(task) {
    const int64_t pieces = (args.length + ROWS - 1) / ROWS;
    picture = task / pieces;
    first = task % pieces * ROWS;
    end = first + ROWS < args.length ? first + ROWS : args.length;
  }
  bool skips(int64_t token) const {
    for (int64_t i = 0; i < a.skips; ++i)
      if (a.skip[i] == token) return true;
    return false;
  }
  const float* row(const Rows& rows, int64_t t) const { return rows.data + picture * rows.b + t * rows.l; }
  float* row(float* dense, int64_t t) const { return dense + (picture * a.length + t) * a.width; }
};

int64_t tasks_of(const AddNorm& a) { return a.batch * ((a.length + ROWS - 1) / ROWS); }
Term term_of(const AddNorm& a, int j) {
  return j == 0 ? Term{a.pre0, a.scale0, a.dpre0, a.dscale0, a.step0, a.silu0}
                : Term{a.pre1, a.scale1, a.dpre1, a.dscale1, a.step1, a.silu1};
}
vf scale_at(const Term& term, int64_t c, int64_t left) {
  return term.step ? load_part(term.scale + c, left) : splat(term.scale[0]);
}
double sum_of(vf v) {
  double sum = 0;
  for (int lane = 0; lane < W; ++lane) sum += v[lane];
  return sum;
}

}  // namespace

int add_norm_forward(const AddNorm& a) {
  return parallel(tasks_of(a), a.threads, 0, [&](int64_t index, float*) {
    const Task task(a, index);
    for (int64_t t = task.first; t < task.end; ++t) {
      const float* x = task.row(a.x, t);
      const float* residual = a.residual.data ? task.row(a.residual, t) : nullptr;
      float *stream = task.row(a.stream, t), *h = task.row(a.h, t);
      for (int64_t c = 0; c < a.width; c += W) {
        const int64_t left = a.width - c;
        store_part(stream + c, load_part(x + c, left) + (residual ? load_part(residual + c, left) : vf{}), left);
      }
      for (int j = 0; j < 2; ++j) {
        const Term term = term_of(a, j);
        if (!term.pre.data || task.skips(t)) continue;
        const float* pre = task.row(term.pre, t);
        for (int64_t c = 0; c < a.width; c += W) {
          const int64_t left = a.width - c;
          vf p = load_part(pre + c, left);
          if (term.silu) p *= sigmoid(p, decay(p));
          store_part(stream + c, load_part(stream + c, left) + scale_at(term, c, left) * p, left);
        }
      }
      vf squares = {};
      for (int64_t c = 0; c < a.width; c += W) {
        const vf s = load_part(stream + c, a.width - c);
        squares += s * s;
      }
      const float r = static_cast<float>(1.0 / std::sqrt(sum_of(squares) / a.width + a.eps));
      for (int64_t c = 0; c < a.width; c += W) {
        const int64_t left = a.width - c;
        store_part(h + c, load_part(stream + c, left) * r * load_part(a.weight + c, left), left);
      }
    }
  });
}

int add_norm_backward(const AddNorm& a) {
  return parallel(tasks_of(a), a.threads, 0, [&](int64_t index, float*) {
    const Task task(a, index);
    float* sums[] = {a.dscale0, a.dscale1, a.dweight};
    for (float*& sum : sums)
      if (sum) {
        sum += index * a.width;
        std::memset(sum, 0, sizeof(float) * a.width);
      }
    for (int64_t t = task.first; t < task.end; ++t) {
      const float *s = task.row(a.x, t), *dh = task.row(a.dh, t);
      const float* dstream = a.dstream.data ? task.row(a.dstream, t) : nullptr;
      float* ds = task.row(a.ds, t);
      vf squares = {}, products = {};
      for (int64_t c = 0; c < a.width; c += W) {
        const int64_t left = a.width - c;
        const vf st = load_part(s + c, left);
        squares += st * st;
        products += st * load_part(dh + c, left) * load_part(a.weight + c, left);
      }
      const double mean = sum_of(squares) / a.width + a.eps;
      const float r = static_cast<float>(1.0 / std::sqrt(mean));
      const float inner = static_cast<float>(sum_of(products) / a.width / mean);
      for (int64_t c = 0; c < a.width; c += W) {
        const int64_t left = a.width - c;
        const vf st = load_part(s + c, left), d = load_part(dh + c, left);
        vf total = (d * load_part(a.weight + c, left) - st * inner) * r;
        if (dstream) total += load_part(dstream + c, left);
        store_part(ds + c, total, left);
        if (a.dweight) store_part(sums[2] + c, load_part(sums[2] + c, left) + d * st * r, left);
      }
      for (int j = 0; j < 2; ++j) {
        const Term term = term_of(a, j);
        if (!term.pre.data) continue;
        float* dpre = task.row(term.dpre, t);
        if (task.skips(t)) {
          std::memset(dpre, 0, sizeof(float) * a.width);
          continue;
        }
        const float* pre = task.row(term.pre, t);
        for (int64_t c = 0; c < a.width; c += W) {
          const int64_t left = a.width - c;
          const vf p = load_part(pre + c, left), total = load_part(ds + c, left);
          vf act = p, slope = splat(1.0f);
          if (term.silu) {
            const vf sig = sigmoid(p, decay(p));
            act = p * sig;
            slope = sig * (1.0f + p * (1.0f - sig));
          }
          store_part(dpre + c, total * scale_at(term, c, left) * slope, left);
          store_part(sums[j] + c, load_part(sums[j] + c, left) + total * act, left);
        }
      }
    }
  });
}

}  // namespace SVP_NS
}  // namespace svp
