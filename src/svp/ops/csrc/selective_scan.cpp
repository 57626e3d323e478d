// The selective scan, forward and backward, vectorised over channels.
//
//   h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t          delta = softplus(delta + delta_bias)
//   y_t = C_t h_t + D u_t
//
// with g_t = dL/dh_t:
//   g_t   = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
//   dx_t  = sum_n g_t B_t                                     x = delta u
//   dd_t  = dx_t u_t + sum_n g_t h_{t-1} exp(delta_t A) A
//   dB_t  = sum_e g_t x_t,   dC_t = sum_e dy_t h_t,   dA = sum_t g_t h_{t-1} exp(delta_t A) delta_t
//
// A task is one picture and one block of channels. It walks chunks of T tokens; within a chunk, tiles of V vectors. The
// recurrence of a tile runs S states at a time, so that S x V states stay in registers and B, C are broadcast from memory.
// Everything a recurrence reads was loaded by the prologue into scratch: a cold load inside it would cost its latency
// every step. The forward keeps the state before each chunk; the backward recomputes the chunk from it.
#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {
namespace {

#if SVP_LEVEL == 2
constexpr int V = 4;  // 4 states x 4 vectors = 16 of 32 registers
#define FOR_V(M, s) M(s, 0) M(s, 1) M(s, 2) M(s, 3)
#else
constexpr int V = 2;  // 4 states x 2 vectors = 8 of 16 registers
#define FOR_V(M, s) M(s, 0) M(s, 1)
#endif
#define FOR_1(M) FOR_V(M, 0)
#define FOR_4(M) FOR_V(M, 0) FOR_V(M, 1) FOR_V(M, 2) FOR_V(M, 3)
constexpr int TILE = V * W;

constexpr int64_t padded(int64_t channels) { return (channels + TILE - 1) / TILE * TILE; }

// Where a task works: its channels [first, first + count) and the group they belong to.
struct Place {
  int64_t picture, group, first, count, block;
};

Place place(int64_t task, int64_t channels, int64_t groups) {
  const int64_t per_group = blocks_of(channels, groups), size = channels / groups;
  const int64_t picture = task / (groups * per_group), rest = task % (groups * per_group);
  const int64_t group = rest / per_group, block = rest % per_group;
  const int64_t start = block * BLOCK;
  return {picture, group, group * size + start, size - start < BLOCK ? size - start : BLOCK, block};
}

// delta with its bias and softplus, x = delta u, of one tile and chunk; slope (or null) is softplus'.
SVP_INLINE void prologue(const Rows& u, const Rows& delta, const float* delta_bias, bool with_softplus, const Place& at,
                         int64_t offset, const int64_t* token, int64_t steps, float* d, float* x, float* us, float* slope) {
  for (int v = 0; v < V; ++v) {
    const int64_t channel = at.first + offset + v * W, left = at.count - offset - v * W;
    const vf bias = delta_bias ? load_part(delta_bias + channel, left) : vf{};
    for (int64_t t = 0; t < steps; ++t) {
      vf dt = load_part(delta.data + at.picture * delta.b + token[t] * delta.l + channel, left) + bias;
      const vf ut = load_part(u.data + at.picture * u.b + token[t] * u.l + channel, left);
      vf s = splat(1.0f);
      if (with_softplus) dt = softplus(dt, slope ? &s : nullptr);
      store(d + t * TILE + v * W, dt);
      store(x + t * TILE + v * W, dt * ut);
      store(us + t * TILE + v * W, ut);
      if (slope) store(slope + t * TILE + v * W, s);
    }
  }
}

// (n, e) rows of the block into a padded, aligned copy: tail lanes become zero.
void copy_rows(const float* source, int64_t stride, int64_t rows, int64_t first, int64_t count, float* target, int64_t width) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < width; c += W)
      store(target + row * width + c, source ? load_part(source + row * stride + first + c, count - c) : vf{});
}

void write_rows(const float* source, int64_t width, int64_t rows, float* target, int64_t stride, int64_t first, int64_t count) {
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t c = 0; c < count; c += W) store_part(target + row * stride + first + c, load(source + row * width + c), count - c);
}

// -- forward ----------------------------------------------------------------------------------------------------------

// `width` floats between the states of h and A2 (rows of a block); b, c: rows of B, C for each step, at the first state.
#define LOAD_H(s, v) vf h##s##v = load(h + s * width + v * W);
#define STORE_H(s, v) store(h + s * width + v * W, h##s##v);
#define STEP(s, v)                                            \
  {                                                           \
    const vf a = exp2v(d##v * load(A2 + s * width + v * W));  \
    h##s##v = a * h##s##v + x##v * bt[s];                     \
    y##v += h##s##v * ct[s];                                  \
  }
#define LOAD_DXY(s, v)                           \
  const vf d##v = load(d + t * TILE + v * W);    \
  const vf x##v = load(x + t * TILE + v * W);    \
  vf y##v = load(y + t * TILE + v * W);
#define STORE_Y(s, v) store(y + t * TILE + v * W, y##v);

#define FORWARD(NAME, FOR)                                                                                           \
  void NAME(int64_t steps, int64_t width, const float* A2, const float* const* b, const float* const* c, int64_t n0, \
            const float* d, const float* x, float* y, float* h) {                                                    \
    FOR(LOAD_H)                                                                                                      \
    for (int64_t t = 0; t < steps; ++t) {                                                                            \
      const float *bt = b[t] + n0, *ct = c[t] + n0;                                                                  \
      FOR_1(LOAD_DXY)                                                                                                \
      FOR(STEP)                                                                                                      \
      FOR_1(STORE_Y)                                                                                                 \
    }                                                                                                                \
    FOR(STORE_H)                                                                                                     \
  }
FORWARD(forward_1, FOR_1)
FORWARD(forward_4, FOR_4)

// -- backward ---------------------------------------------------------------------------------------------------------

// Pass A, forward in time: keeps a_t and h_{t-1} of the chunk, sums dC.
#define KEEP(s, v)                                                  \
  {                                                                 \
    const vf a = exp2v(d##v * load(A2 + s * width + v * W));        \
    store(as + (t * S + s) * TILE + v * W, a);                      \
    store(hs + (t * S + s) * TILE + v * W, h##s##v);                \
    h##s##v = a * h##s##v + x##v * bt[s];                           \
    sum_##s += h##s##v * g##v;                                      \
  }
#define LOAD_DXG(s, v)                         \
  const vf d##v = load(d + t * TILE + v * W);  \
  const vf x##v = load(x + t * TILE + v * W);  \
  const vf g##v = load(dy + t * TILE + v * W);
#define LOAD_SUM(s) vf sum_##s = load(acc + (t * n + n0 + s) * W);
#define STORE_SUM(s) store(acc + (t * n + n0 + s) * W, sum_##s);

// Pass B, backward in time: carries g, sums dB, dx, dd and, when asked for, dA.
#define LOAD_G(s, v) vf g##s##v = load(g + s * width + v * W);
#define STORE_G(s, v) store(g + s * width + v * W, g##s##v);
#define BACK(s, v)                                              \
  {                                                             \
    g##s##v += dy##v * ct[s];                                   \
    dx##v += g##s##v * bt[s];                                   \
    sum_##s += g##s##v * x##v;                                  \
    g##s##v *= load(as + (t * S + s) * TILE + v * W);           \
    const vf gh = g##s##v * load(hs + (t * S + s) * TILE + v * W); \
    dd##v += gh * load(A2 + s * width + v * W);                 \
    if (with_A) {                                               \
      float* p = dA + s * width + v * W;                        \
      store(p, load(p) + gh * load(d + t * TILE + v * W));      \
    }                                                           \
  }
#define LOAD_BACK(s, v)                          \
  const vf x##v = load(x + t * TILE + v * W);    \
  const vf dy##v = load(dy + t * TILE + v * W);  \
  vf dx##v = load(dx + t * TILE + v * W);        \
  vf dd##v = load(dd + t * TILE + v * W);
#define STORE_BACK(s, v)                   \
  store(dx + t * TILE + v * W, dx##v);     \
  store(dd + t * TILE + v * W, dd##v);

#define SUMS_1(M) M(0)
#define SUMS_4(M) M(0) M(1) M(2) M(3)

#define BACKWARD(NAME, STATES, FOR, SUMS)                                                                               \
  void NAME##_keep(int64_t steps, int64_t width, const float* A2, const float* const* b, int64_t n0, int64_t n,         \
                   const float* d, const float* x, const float* dy, float* h, float* as, float* hs, float* acc) {       \
    constexpr int S = STATES;                                                                                           \
    FOR(LOAD_H)                                                                                                         \
    for (int64_t t = 0; t < steps; ++t) {                                                                               \
      const float* bt = b[t] + n0;                                                                                      \
      FOR_1(LOAD_DXG)                                                                                                   \
      SUMS(LOAD_SUM)                                                                                                    \
      FOR(KEEP)                                                                                                         \
      SUMS(STORE_SUM)                                                                                                   \
    }                                                                                                                   \
  }                                                                                                                     \
  template <bool with_A>                                                                                                \
  void NAME##_back(int64_t steps, int64_t width, const float* A2, const float* const* b, const float* const* c,         \
                   int64_t n0, int64_t n, const float* d, const float* x, const float* dy, const float* as,             \
                   const float* hs, float* g, float* acc, float* dx, float* dd, float* dA) {                            \
    constexpr int S = STATES;                                                                                           \
    (void)d, (void)dA;                                                                                                  \
    FOR(LOAD_G)                                                                                                         \
    for (int64_t t = steps - 1; t >= 0; --t) {                                                                          \
      const float *bt = b[t] + n0, *ct = c[t] + n0;                                                                     \
      FOR_1(LOAD_BACK)                                                                                                  \
      SUMS(LOAD_SUM)                                                                                                    \
      FOR(BACK)                                                                                                         \
      SUMS(STORE_SUM)                                                                                                   \
      FOR_1(STORE_BACK)                                                                                                 \
    }                                                                                                                   \
    FOR(STORE_G)                                                                                                        \
  }
BACKWARD(backward_1, 1, FOR_1, SUMS_1)
BACKWARD(backward_4, 4, FOR_4, SUMS_4)

// The tokens of a chunk in scan order, and their rows of B and C.
struct Chunk {
  int64_t token[T];
  const float* b[T];
  const float* c[T];
  int64_t steps;
  template <typename Args>
  Chunk(const Args& a, const Place& at, int64_t chunk) {
    steps = a.length - chunk * T < T ? a.length - chunk * T : T;
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t k = chunk * T + t;
      token[t] = a.reverse ? a.length - 1 - k : k;
      b[t] = a.B.data + at.picture * a.B.b + token[t] * a.B.l + at.group * a.B.g;
      c[t] = a.C.data + at.picture * a.C.b + token[t] * a.C.l + at.group * a.C.g;
    }
  }
};

}  // namespace

int scan_forward(const ScanForward& a) {
  const int64_t e = a.channels, n = a.n, chunks = (a.length + T - 1) / T;
  const int64_t tasks = a.batch * a.groups * blocks_of(e, a.groups);
  const int64_t floats = 2 * n * padded(BLOCK) + 4 * T * TILE;
  return parallel(tasks, a.threads, floats, [&](int64_t task, float* scratch) {
    const Place at = place(task, e, a.groups);
    const int64_t width = padded(at.count);
    float *A2 = scratch, *h = A2 + n * width, *d = h + n * width, *x = d + T * TILE, *u = x + T * TILE, *y = u + T * TILE;
    copy_rows(a.A2, e, n, at.first, at.count, A2, width);
    copy_rows(a.h0 ? a.h0 + at.picture * a.h0_b : nullptr, e, n, at.first, at.count, h, width);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Chunk now(a, at, chunk);
      if (a.states) write_rows(h, width, n, a.states + (at.picture * chunks + chunk) * n * e, e, at.first, at.count);
      for (int64_t c = 0; c < at.count; c += TILE) {
        prologue(a.u, a.delta, a.delta_bias, a.softplus, at, c, now.token, now.steps, d, x, u, nullptr);
        for (int v = 0; v < V; ++v) {
          const vf D = a.D ? load_part(a.D + at.first + c + v * W, at.count - c - v * W) : vf{};
          for (int64_t t = 0; t < now.steps; ++t) store(y + t * TILE + v * W, D * load(u + t * TILE + v * W));
        }
        int64_t s = 0;
        for (; s + 4 <= n; s += 4) forward_4(now.steps, width, A2 + s * width + c, now.b, now.c, s, d, x, y, h + s * width + c);
        for (; s < n; ++s) forward_1(now.steps, width, A2 + s * width + c, now.b, now.c, s, d, x, y, h + s * width + c);
        for (int64_t t = 0; t < now.steps; ++t) {
          float* row = a.y + (at.picture * a.length + now.token[t]) * e + at.first + c;
          for (int v = 0; v < V; ++v) store_part(row + v * W, load(y + t * TILE + v * W), at.count - c - v * W);
        }
      }
    }
    write_rows(h, width, n, a.last + at.picture * n * e, e, at.first, at.count);
  });
}

int scan_backward(const ScanBackward& a) {
  const int64_t e = a.channels, n = a.n, chunks = (a.length + T - 1) / T, blocks = blocks_of(e, a.groups);
  const int64_t tasks = a.batch * a.groups * blocks;
  const int64_t floats = 4 * n * padded(BLOCK) + 7 * T * TILE + 2 * T * 4 * TILE + 2 * T * n * W;
  return parallel(tasks, a.threads, floats, [&](int64_t task, float* scratch) {
    const Place at = place(task, e, a.groups);
    const int64_t width = padded(at.count), tile = T * TILE;
    float *A2 = scratch, *h = A2 + n * width, *g = h + n * width, *dA = g + n * width;
    float *d = dA + n * width, *x = d + tile, *u = x + tile, *slope = u + tile, *dy = slope + tile, *dx = dy + tile;
    float *dd = dx + tile, *as = dd + tile, *hs = as + 4 * tile, *accB = hs + 4 * tile, *accC = accB + T * n * W;
    copy_rows(a.A2, e, n, at.first, at.count, A2, width);
    copy_rows(a.dlast ? a.dlast + at.picture * n * e : nullptr, e, n, at.first, at.count, g, width);
    copy_rows(nullptr, 0, n, 0, 0, dA, width);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const Chunk now(a, at, chunk);
      copy_rows(a.states + (at.picture * chunks + chunk) * n * e, e, n, at.first, at.count, h, width);
      std::memset(accB, 0, sizeof(float) * 2 * T * n * W);
      for (int64_t c = 0; c < at.count; c += TILE) {
        prologue(a.u, a.delta, a.delta_bias, a.softplus, at, c, now.token, now.steps, d, x, u, slope);
        for (int64_t t = 0; t < now.steps; ++t) {
          const float* row = a.dy.data + at.picture * a.dy.b + now.token[t] * a.dy.l + at.first + c;
          for (int v = 0; v < V; ++v) store(dy + t * TILE + v * W, load_part(row + v * W, at.count - c - v * W));
        }
        std::memset(dx, 0, sizeof(float) * 2 * tile);
        for (int64_t s = 0; s < n;) {
          const int64_t o = s * width + c;
          if (s + 4 <= n) {
            backward_4_keep(now.steps, width, A2 + o, now.b, s, n, d, x, dy, h + o, as, hs, accC);
            if (a.dA) backward_4_back<true>(now.steps, width, A2 + o, now.b, now.c, s, n, d, x, dy, as, hs, g + o, accB, dx, dd, dA + o);
            else backward_4_back<false>(now.steps, width, A2 + o, now.b, now.c, s, n, d, x, dy, as, hs, g + o, accB, dx, dd, dA + o);
            s += 4;
          } else {
            backward_1_keep(now.steps, width, A2 + o, now.b, s, n, d, x, dy, h + o, as, hs, accC);
            if (a.dA) backward_1_back<true>(now.steps, width, A2 + o, now.b, now.c, s, n, d, x, dy, as, hs, g + o, accB, dx, dd, dA + o);
            else backward_1_back<false>(now.steps, width, A2 + o, now.b, now.c, s, n, d, x, dy, as, hs, g + o, accB, dx, dd, dA + o);
            s += 1;
          }
        }
        for (int v = 0; v < V; ++v) {
          const int64_t left = at.count - c - v * W;
          const vf D = a.D ? load_part(a.D + at.first + c + v * W, left) : vf{};
          for (int64_t t = 0; t < now.steps; ++t) {
            const int64_t k = t * TILE + v * W, row = (at.picture * a.length + now.token[t]) * e + at.first + c + v * W;
            const vf dxt = load(dx + k);
            store_part(a.du + row, dxt * load(d + k) + D * load(dy + k), left);
            store_part(a.ddelta + row, load(slope + k) * (dxt * load(u + k) + load(dd + k) * LN2), left);
          }
        }
      }
      for (int64_t t = 0; t < now.steps; ++t) {
        const int64_t row = ((at.block * a.batch + at.picture) * a.length + now.token[t]) * a.groups + at.group;
        for (int64_t s = 0; s < n; ++s) {
          a.dB[row * n + s] = sum(load(accB + (t * n + s) * W));
          a.dC[row * n + s] = sum(load(accC + (t * n + s) * W));
        }
      }
    }
    if (a.dA) write_rows(dA, width, n, a.dA + at.picture * n * e, e, at.first, at.count);
    if (a.dh0) write_rows(g, width, n, a.dh0 + at.picture * n * e, e, at.first, at.count);
  });
}

}  // namespace SVP_NS
}  // namespace svp
