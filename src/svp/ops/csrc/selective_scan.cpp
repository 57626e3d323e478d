// The selective scan, forward and backward, vectorised over channels.
//
//   h_t = exp(delta_t A) h_{t-1} + (delta_t u_t) B_t          delta = softplus(delta + delta_bias)
//   y_t = C_t (h_t + offset) + D u_t + bias,   out_t = y_t silu(z_t)
//
// with dy_t = dout_t silu(z_t) and g_t = dL/dh_t:
//   g_t   = C_t dy_t + exp(delta_{t+1} A) g_{t+1}
//   dx_t  = sum_n g_t B_t                                     x = delta u
//   dd_t  = dx_t u_t + sum_n g_t h_{t-1} exp(delta_t A) A
//   dB_t  = sum_e g_t x_t,   dC_t = sum_e dy_t (h_t + offset),   dA = sum_t g_t h_{t-1} exp(delta_t A) delta_t
//
// A task is one picture and up to PANELS panels of channels. It walks chunks of T tokens, and in a chunk its panels. The
// recurrence runs S states of V vectors at a time, so that S x V states stay in registers and B, C are broadcast from
// memory. What a recurrence reads was put into scratch by the prologue (a cold load inside it would cost its latency
// every step), and the prologue's rows were asked for while the panel before was computed. The forward keeps the state
// before each chunk; the backward recomputes the chunk from it. One state alone has a walk of its own, below.
// t counts in scan order: direction is a matter of `token`.
#include <initializer_list>

#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {
namespace {

#if SVP_LEVEL == 2
constexpr int V = 1;  // what a recurrence of 64 tokens keeps of more channels would leave the first cache
#define FOR_V(M, s) M(s, 0)
#elif defined(__aarch64__)
constexpr int V = 4;  // 4 states x 4 vectors = 16 of 32 registers
#define FOR_V(M, s) M(s, 0) M(s, 1) M(s, 2) M(s, 3)
#else
constexpr int V = 2;  // 4 states x 2 vectors = 8 of 16 registers
#define FOR_V(M, s) M(s, 0) M(s, 1)
#endif
#define FOR_1(M) FOR_V(M, 0)
#define FOR_4(M) FOR_V(M, 0) FOR_V(M, 1) FOR_V(M, 2) FOR_V(M, 3)
#define SUMS_1(M) M(0)
#define SUMS_4(M) M(0) M(1) M(2) M(3)
constexpr int TILE = V * W;                // channels of a recurrence
constexpr int64_t PLANE = T * PANEL;       // floats of one quantity of a panel and chunk
static_assert(PANEL % (SIDE * W) == 0 && SIDE * W % TILE == 0, "a panel is made of whole steps, a step of whole tiles");

// -- where a task works -----------------------------------------------------------------------------------------------

int64_t panels_of(int64_t channels) { return (channels + PANEL - 1) / PANEL; }
int64_t blocks_of(int64_t channels) { return (panels_of(channels) + PANELS - 1) / PANELS; }

struct Place {
  int64_t picture, group, block;  // block counts over all groups' channels alike
  int64_t first, end;             // its panels, counted within the group
  int64_t channel, size;          // of the group: first channel and how many
  int64_t panels;                 // of the whole group

  Place(const Scan& a, int64_t task) {
    size = a.channels / a.groups;
    panels = panels_of(size);
    const int64_t blocks = blocks_of(size);
    picture = task / (a.groups * blocks);
    group = task / blocks % a.groups;
    block = task % blocks;
    first = block * panels / blocks;
    end = (block + 1) * panels / blocks;
    channel = group * size;
  }
  int64_t from(int64_t panel) const { return channel + panel * PANEL; }  // its first channel
  int64_t count(int64_t panel) const { return size - panel * PANEL < PANEL ? size - panel * PANEL : PANEL; }
};

int64_t tasks_of(const Scan& a) { return a.batch * a.groups * blocks_of(a.channels / a.groups); }

// The tokens of a chunk in scan order, and their rows of B and C.
struct Chunk {
  int64_t token[T];
  const float* b[T];
  const float* c[T];
  int64_t steps;

  Chunk(const Scan& a, const Place& at, int64_t chunk) {
    steps = a.length - chunk * T < T ? a.length - chunk * T : T;
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t k = chunk * T + t;
      token[t] = a.reverse ? a.length - 1 - k : k;
      b[t] = a.B.data + at.picture * a.B.b + token[t] * a.B.l + at.group * a.B.g;
      c[t] = a.C.data + at.picture * a.C.b + token[t] * a.C.l + at.group * a.C.g;
    }
  }
};

SVP_INLINE const float* row_of(const Rows& rows, const Place& at, int64_t token, int64_t channel) {
  return rows.data + at.picture * rows.b + token * rows.l + channel;
}
SVP_INLINE float* row_of(const OutRows& rows, const Place& at, int64_t token, int64_t channel) {
  return rows.data + at.picture * rows.b + token * rows.l + channel;
}
SVP_INLINE float* row_of(float* dense, const Scan& a, const Place& at, int64_t token, int64_t channel) {
  return dense + (at.picture * a.length + token) * a.channels + channel;
}

bool gated(const Scan& a) { return a.z.data || a.gate.data; }

// Asks for COUNT channels of a row before they are needed; WHAT says of which tensors.
enum { FORWARD_ROWS, BACKWARD_ROWS };
template <int WHAT, int64_t COUNT = PANEL>
SVP_INLINE void prefetch(const Scan& a, const Place& at, int64_t token, int64_t channel) {
  const auto ask = [](const float* p) {
    for (int64_t c = 0; c < COUNT; c += 16) __builtin_prefetch(p + c, 0, 2);
  };
  const auto ask_to_write = [](const float* p) {
    for (int64_t c = 0; c < COUNT; c += 16) __builtin_prefetch(p + c, 1, 2);
  };
  ask(row_of(a.u, at, token, channel));
  ask(row_of(a.delta, at, token, channel));
  if (a.z.data) ask(row_of(a.z, at, token, channel));
  if (WHAT == FORWARD_ROWS) {
    ask_to_write(row_of(a.y, a, at, token, channel));
    if (a.add.data) ask(row_of(a.add, at, token, channel));
  } else {
    ask(row_of(a.dy, at, token, channel));
    ask_to_write(row_of(a.du, a, at, token, channel));
    ask_to_write(row_of(a.ddelta, a, at, token, channel));
    if (a.gate.data) ask(row_of(a.gate, at, token, channel));
    if (gated(a)) ask_to_write(row_of(a.dz, at, token, channel));
  }
}

void copy(float* target, const float* source, int64_t floats) { std::memcpy(target, source, sizeof(float) * floats); }
void clear(float* target, int64_t floats) { std::memset(target, 0, sizeof(float) * floats); }

// (e, n) from a panel's first channel on -> (n, PANEL) in scratch, lanes beyond `count` zero; and back
void gather(const float* source, int64_t n, int64_t count, float* panel) {
  clear(panel, n * PANEL);
  for (int64_t c = 0; source && c < count; ++c)
    for (int64_t s = 0; s < n; ++s) panel[s * PANEL + c] = source[c * n + s];
}
void scatter(const float* panel, int64_t n, int64_t count, float* target) {
  for (int64_t c = 0; c < count; ++c)
    for (int64_t s = 0; s < n; ++s) target[c * n + s] = panel[s * PANEL + c];
}
// A log2(e), since the kernels know powers of two only; bounded, since their exponential wants finite arguments
void scale_A(float* A, int64_t floats) {
  for (int64_t i = 0; i < floats; i += W) {
    vf v = load(A + i) * LOG2E;
    v = select(v < splat(-1e20f), splat(-1e20f), v);
    store(A + i, select(v > splat(1e20f), splat(1e20f), v));
  }
}
void gather_A2(const float* A, int64_t n, int64_t count, float* panel) {
  gather(A, n, count, panel);
  scale_A(panel, n * PANEL);
}

// -- forward ----------------------------------------------------------------------------------------------------------

// x becomes the step size softplus(x), or stays; with SLOPE also its derivative.
template <bool SLOPE>
SVP_INLINE void step_sizes(const Scan& a, Side& x, Side& slope) {
  if (!a.softplus) {
    if (SLOPE) EACH slope[i] = splat(1.0f);
    return;
  }
  Side w;
  EACH w[i] = decay(x[i]);
  if (SLOPE) EACH slope[i] = sigmoid(x[i], w[i]);
  EACH x[i] = softplus(x[i], w[i]);
}

template <typename Left>
SVP_INLINE void load_weights(const float* weights, int64_t channel, Left left, Side& x) {
  if (weights) load_side(weights + channel, left, x);
  else EACH x[i] = vf{};
}

// d, x = delta u and y = D u + bias of a panel and chunk; reach: each channel's largest |d|.
void forward_prologue(const Scan& a, const Place& at, const Chunk& now, int64_t panel, float* d, float* x, float* y,
                      float* reach) {
  ALONG(SIDE * W, at.count(panel)) {  // lanes beyond the last channel read as zero
    const int64_t channel = at.from(panel) + c;
    Side delta_bias, D, bias, most = {}, dt, slope;
    load_weights(a.delta_bias, channel, left, delta_bias);
    load_weights(a.D, channel, left, D);
    load_weights(a.bias, channel, left, bias);
    for (int64_t t = 0; t < now.steps; ++t) {
      const float* u = row_of(a.u, at, now.token[t], channel);
      load_side(row_of(a.delta, at, now.token[t], channel), left, dt);
      EACH dt[i] += delta_bias[i];
      step_sizes<false>(a, dt, slope);
      EACH {
        const int64_t o = t * PANEL + c + i * W;
        const vf ut = load_part(u + i * W, left - i * W);
        store(d + o, dt[i]);
        store(x + o, dt[i] * ut);
        store(y + o, D[i] * ut + bias[i]);
        most[i] = larger(absolute(dt[i]), most[i]);
      }
    }
    store_side(reach + c, most, WHOLE);
  });
}

// y += C_t offset
void read_offset(const Chunk& now, int64_t n, const float* offset, float* y) {
  for (int64_t t = 0; t < now.steps; ++t)
    for (int64_t c = 0; c < PANEL; c += W) {
      vf sum = load(y + t * PANEL + c);
      for (int64_t s = 0; s < n; ++s) sum += load(offset + s * PANEL + c) * now.c[t][s];
      store(y + t * PANEL + c, sum);
    }
}

// y becomes (y + add) scale silu(z); add and z may be null.
template <typename Left>
SVP_INLINE void finish(const Scan& a, const float* add, const float* z, Left left, Side& y) {
  if (add) EACH y[i] += load_part(add + i * W, left - i * W);
  if (!z) return;
  Side zt, s;
  load_side(z, left, zt);
  sigmoids(zt, s);
  EACH y[i] *= zt[i] * s[i] * a.scale;
}

void forward_epilogue(const Scan& a, const Place& at, const Chunk& now, int64_t panel, const float* y) {
  for (int64_t t = 0; t < now.steps; ++t) {
    const int64_t token = now.token[t], channel = at.from(panel);
    const float* add = a.add.data ? row_of(a.add, at, token, channel) : nullptr;
    const float* z = a.z.data ? row_of(a.z, at, token, channel) : nullptr;
    float* out = row_of(a.y, a, at, token, channel);
    ALONG(SIDE * W, at.count(panel)) {
      Side yt;
      load_side(y + t * PANEL + c, WHOLE, yt);
      finish(a, add ? add + c : nullptr, z ? z + c : nullptr, left, yt);
      store_side(out + c, yt, left);
    });
  }
}

// Whether exp2_near will do for all arguments d A2 of S states in a chunk. (AVX-512 has one exponential for all.)
template <int S>
SVP_INLINE bool is_near(const float* A2, const float* reach) {
  vi far = {};
  if (SVP_LEVEL < 2)
    for (int s = 0; s < S; ++s)
      for (int v = 0; v < TILE; v += W) far |= absolute(load(A2 + s * PANEL + v)) * load(reach + v) > splat(126.0f);
  return !any(far);
}
template <bool NEAR>
SVP_INLINE vf exp2_of(vf t) { return NEAR ? exp2_near(t) : exp2v(t); }

// The recurrence of S states: A2, h at the first of them, b and c likewise from n0 on.
#define LOAD_H(s, v) vf h##s##v = load(h + s * PANEL + v * W);
#define STORE_H(s, v) store(h + s * PANEL + v * W, h##s##v);
#define STEP(s, v)                                            \
  {                                                           \
    const vf a = exp2_of<NEAR>(d##v * load(A2 + s * PANEL + v * W));\
    h##s##v = a * h##s##v + x##v * bt[s];                     \
    y##v += h##s##v * ct[s];                                  \
  }
#define LOAD_DXY(s, v)                            \
  const vf d##v = load(d + t * PANEL + v * W);    \
  const vf x##v = load(x + t * PANEL + v * W);    \
  vf y##v = load(y + t * PANEL + v * W);
#define STORE_Y(s, v) store(y + t * PANEL + v * W, y##v);

#define FORWARD(NAME, FOR)                                                                                             \
  template <bool NEAR>\
  void NAME(const Chunk& now, int64_t n0, const float* A2, const float* d, const float* x, float* y, float* h) {       \
    FOR(LOAD_H)                                                                                                        \
    for (int64_t t = 0; t < now.steps; ++t) {                                                                          \
      const float *bt = now.b[t] + n0, *ct = now.c[t] + n0;                                                            \
      FOR_1(LOAD_DXY)                                                                                                  \
      FOR(STEP)                                                                                                        \
      FOR_1(STORE_Y)                                                                                                   \
    }                                                                                                                  \
    FOR(STORE_H)                                                                                                       \
  }
FORWARD(forward_1, FOR_1)
FORWARD(forward_4, FOR_4)

void forward_task(const Scan& a, int64_t task, float* scratch) {
  const Place at(a, task);
  const int64_t e = a.channels, n = a.n, chunks = (a.length + T - 1) / T, states = n * PANEL;
  float *A2 = scratch, *h = A2 + PANELS * states, *offset = h + PANELS * states;
  float *d = offset + PANELS * states, *x = d + PLANE, *y = x + PLANE, *reach = y + PLANE;
  clear(d, 3 * PLANE);
  for (int64_t p = at.first; p < at.end; ++p) {
    const int64_t channel = at.from(p), count = at.count(p), k = (p - at.first) * states;
    gather_A2(a.A + channel * n, n, count, A2 + k);
    gather(a.h0 ? a.h0 + at.picture * a.h0_b + channel * n : nullptr, n, count, h + k);
    if (a.offset) gather(a.offset + channel * n, n, count, offset + k);
  }
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Chunk now(a, at, chunk);
    for (int64_t p = at.first; p < at.end; ++p) {
      const int64_t k = (p - at.first) * states, next = p + 1 < at.end ? at.from(p + 1) : at.from(at.first);
      const int64_t ahead = p + 1 < at.end ? 0 : a.reverse ? -T : T;  // tokens from this panel's to the next one's
      if (a.states)
        copy(a.states + ((at.picture * chunks + chunk) * at.panels * a.groups + at.group * at.panels + p) * states, h + k, states);
      forward_prologue(a, at, now, p, d, x, y, reach);
      if (a.offset) read_offset(now, n, offset + k, y);
      int64_t asked = 0;
      for (int64_t c = 0, count = at.count(p); c < count; c += TILE) {
        for (int64_t s = 0; s < n;) {
          if (asked < now.steps) {
            for (const int64_t until = asked + 4; asked < until && asked < now.steps; ++asked) {
              const int64_t token = now.token[asked] + ahead;
              if (token >= 0 && token < a.length) prefetch<FORWARD_ROWS>(a, at, token, next);
            }
          }
          const int64_t o = k + s * PANEL + c;
          if (s + 4 <= n) {
            const auto run = is_near<4>(A2 + o, reach + c) ? forward_4<true> : forward_4<false>;
            run(now, s, A2 + o, d + c, x + c, y + c, h + o);
            s += 4;
          } else {
            const auto run = is_near<1>(A2 + o, reach + c) ? forward_1<true> : forward_1<false>;
            run(now, s, A2 + o, d + c, x + c, y + c, h + o);
            s += 1;
          }
        }
      }
      forward_epilogue(a, at, now, p, y);
    }
  }
  for (int64_t p = at.first; a.last && p < at.end; ++p)
    scatter(h + (p - at.first) * states, n, at.count(p), a.last + (at.picture * e + at.from(p)) * n);
}

// -- backward ---------------------------------------------------------------------------------------------------------

// What the backward keeps of a panel and chunk, each (T, PANEL).
struct Planes {
  float *d, *x, *u, *slope, *dy, *dx, *dd, *y, *gate, *reach;  // slope: softplus', gate: dout silu'(z)
  static constexpr int64_t FLOATS = 9 * PLANE + PANEL;
  explicit Planes(float* p) {
    for (float** plane : {&d, &x, &u, &slope, &dy, &dx, &dd, &y, &gate, &reach}) *plane = p, p += PLANE;
  }
};

void backward_prologue(const Scan& a, const Place& at, const Chunk& now, int64_t panel, const Planes& k) {
  ALONG(SIDE * W, at.count(panel)) {
    const int64_t channel = at.from(panel) + c;
    Side delta_bias, D, bias, most = {}, dt, slope, dy, gate;
    load_weights(a.delta_bias, channel, left, delta_bias);
    load_weights(a.D, channel, left, D);
    load_weights(a.bias, channel, left, bias);
    for (int64_t t = 0; t < now.steps; ++t) {
      const float* u = row_of(a.u, at, now.token[t], channel);
      load_side(row_of(a.delta, at, now.token[t], channel), left, dt);
      EACH dt[i] += delta_bias[i];
      step_sizes<true>(a, dt, slope);
      load_side(row_of(a.dy, at, now.token[t], channel), left, dy);
      if (a.z.data) gates(row_of(a.z, at, now.token[t], channel), left, dy, gate);
      if (a.gate.data) load_side(row_of(a.gate, at, now.token[t], channel), left, gate);
      EACH {
        const int64_t o = t * PANEL + c + i * W;
        const vf ut = load_part(u + i * W, left - i * W);
        store(k.d + o, dt[i]);
        store(k.x + o, dt[i] * ut);
        store(k.u + o, ut);
        store(k.slope + o, slope[i]);
        store(k.dy + o, dy[i]);
        store(k.dx + o, vf{});
        store(k.dd + o, vf{});
        if (gated(a)) {
          store(k.gate + o, gate[i]);
          store(k.y + o, D[i] * ut + bias[i]);
        }
        most[i] = larger(absolute(dt[i]), most[i]);
      }
    }
    store_side(k.reach + c, most, WHOLE);
  });
}

void backward_epilogue(const Scan& a, const Place& at, const Chunk& now, int64_t panel, const Planes& k) {
  ALONG(W, at.count(panel)) {
    const int64_t channel = at.from(panel) + c;
    const vf D = a.D ? load_part(a.D + channel, left) : vf{};
    vf sum_D = {}, sum_delta = {}, sum_dy = {};
    for (int64_t t = 0; t < now.steps; ++t) {
      const int64_t o = t * PANEL + c, token = now.token[t];
      const vf dx = load(k.dx + o), ut = load(k.u + o), dy = load(k.dy + o);
      const vf ddelta = load(k.slope + o) * (dx * ut + load(k.dd + o) * LN2);
      store_part(row_of(a.du, a, at, token, channel), dx * load(k.d + o) + D * dy, left);
      store_part(row_of(a.ddelta, a, at, token, channel), ddelta, left);
      if (gated(a)) {
        float* dz = row_of(a.dz, at, token, channel);
        store_part(dz, load(k.y + o) * load(k.gate + o) + (a.add_dz ? load_part(dz, left) : vf{}), left);
      }
      sum_D += dy * ut;
      sum_delta += ddelta;
      sum_dy += dy;
    }
    const auto add = [&](float* total, vf part) {
      if (!total) return;
      float* p = total + at.picture * a.channels + channel;
      store_part(p, load_part(p, left) + part, left);
    };
    add(a.dD, sum_D);
    add(a.ddelta_bias, sum_delta);
    add(a.dbias, sum_dy);
  });
}

// The offset's own part: dC += dy offset, doffset += C dy.
void backward_offset(const Chunk& now, int64_t n, const float* offset, const float* dy, float* accC, float* doffset) {
  for (int64_t t = 0; t < now.steps; ++t)
    for (int64_t c = 0; c < PANEL; c += W) {
      const vf dyt = load(dy + t * PANEL + c);
      for (int64_t s = 0; s < n; ++s) {
        float *sum = accC + (t * n + s) * W, *o = doffset + s * PANEL + c;
        store(sum, load(sum) + dyt * load(offset + s * PANEL + c));
        store(o, load(o) + dyt * now.c[t][s]);
      }
    }
}

// Pass A, forward in time: keeps a_t and h_{t-1} of the chunk, sums dC and, for the gate, y.
#define KEEP(s, v)                                                  \
  {                                                                 \
    const vf a = exp2_of<NEAR>(d##v * load(A2 + s * PANEL + v * W));      \
    store(as + (t * S + s) * TILE + v * W, a);                      \
    store(hs + (t * S + s) * TILE + v * W, h##s##v);                \
    h##s##v = a * h##s##v + x##v * bt[s];                           \
    sum_##s += h##s##v * dy##v;                                     \
  }
#define LOAD_KEEP(s, v)                               \
  const vf d##v = load(k.d + c + t * PANEL + v * W);  \
  const vf x##v = load(k.x + c + t * PANEL + v * W);  \
  const vf dy##v = load(k.dy + c + t * PANEL + v * W);
// y of the gate, after the rest of a token: with it in registers, too, there would be too few
#define READ_1(s, v) \
  if (GATED) store(k.y + c + t * PANEL + v * W, load(k.y + c + t * PANEL + v * W) + h0##v * ct[0]);
#define READ_4(s, v)                                                    \
  if (GATED)                                                            \
    store(k.y + c + t * PANEL + v * W, load(k.y + c + t * PANEL + v * W) + h0##v * ct[0] + h1##v * ct[1] + h2##v * ct[2] + h3##v * ct[3]);
#define LOAD_SUM(s) vf sum_##s = load(acc + (t * n + n0 + s) * W);
#define STORE_SUM(s) store(acc + (t * n + n0 + s) * W, sum_##s);

// Pass B, backward in time: carries g, sums dB, dx, dd and, when asked for, dA.
#define LOAD_G(s, v) vf g##s##v = load(g + s * PANEL + v * W);
#define STORE_G(s, v) store(g + s * PANEL + v * W, g##s##v);
#define BACK(s, v)                                                 \
  {                                                                \
    g##s##v += dy##v * ct[s];                                      \
    dx##v += g##s##v * bt[s];                                      \
    sum_##s += g##s##v * x##v;                                     \
    g##s##v *= load(as + (t * S + s) * TILE + v * W);              \
    const vf gh = g##s##v * load(hs + (t * S + s) * TILE + v * W); \
    dd##v += gh * load(A2 + s * PANEL + v * W);                    \
    if (with_A) {                                                  \
      float* p = dA + s * PANEL + v * W;                           \
      store(p, load(p) + gh * load(k.d + c + t * PANEL + v * W));  \
    }                                                              \
  }
#define LOAD_BACK(s, v)                                 \
  const vf x##v = load(k.x + c + t * PANEL + v * W);    \
  const vf dy##v = load(k.dy + c + t * PANEL + v * W);  \
  vf dx##v = load(k.dx + c + t * PANEL + v * W);        \
  vf dd##v = load(k.dd + c + t * PANEL + v * W);
#define STORE_BACK(s, v)                         \
  store(k.dx + c + t * PANEL + v * W, dx##v);    \
  store(k.dd + c + t * PANEL + v * W, dd##v);

#define BACKWARD(NAME, STATES, FOR, SUMS, READ)                                                                               \
  template <bool NEAR, bool GATED>                                                                                                 \
  void NAME##_keep(const Chunk& now, int64_t n0, int64_t n, const float* A2, const Planes& k, int64_t c, float* h,      \
                   float* as, float* hs, float* acc) {                                                                  \
    constexpr int S = STATES;                                                                                           \
    FOR(LOAD_H)                                                                                                         \
    for (int64_t t = 0; t < now.steps; ++t) {                                                                           \
      const float *bt = now.b[t] + n0, *ct = now.c[t] + n0;                                                             \
      (void)ct;                                                                                                         \
      FOR_1(LOAD_KEEP)                                                                                                  \
      SUMS(LOAD_SUM)                                                                                                    \
      FOR(KEEP)                                                                                                         \
      SUMS(STORE_SUM)                                                                                                   \
      FOR_1(READ)                                                                                                       \
    }                                                                                                                   \
  }                                                                                                                     \
  template <bool with_A>                                                                                                \
  void NAME##_back(const Chunk& now, int64_t n0, int64_t n, const float* A2, const Planes& k, int64_t c, float* g,      \
                   const float* as, const float* hs, float* acc, float* dA) {                                           \
    constexpr int S = STATES;                                                                                           \
    (void)dA;                                                                                                           \
    FOR(LOAD_G)                                                                                                         \
    for (int64_t t = now.steps - 1; t >= 0; --t) {                                                                      \
      const float *bt = now.b[t] + n0, *ct = now.c[t] + n0;                                                             \
      FOR_1(LOAD_BACK)                                                                                                  \
      SUMS(LOAD_SUM)                                                                                                    \
      FOR(BACK)                                                                                                         \
      SUMS(STORE_SUM)                                                                                                   \
      FOR_1(STORE_BACK)                                                                                                 \
    }                                                                                                                   \
    FOR(STORE_G)                                                                                                        \
  }
BACKWARD(backward_1, 1, FOR_1, SUMS_1, READ_1)
BACKWARD(backward_4, 4, FOR_4, SUMS_4, READ_4)

constexpr int64_t KEPT = T * 4 * TILE;  // floats of a_t, and of h_{t-1}, of one recurrence

template <bool GATED, bool with_A>
void backward_task(const Scan& a, int64_t task, float* scratch) {
  const Place at(a, task);
  const int64_t e = a.channels, n = a.n, chunks = (a.length + T - 1) / T, states = n * PANEL;
  float *A2 = scratch, *g = A2 + PANELS * states, *dA = g + PANELS * states, *offset = dA + PANELS * states;
  float *doffset = offset + PANELS * states, *h = doffset + PANELS * states, *as = h + states, *hs = as + KEPT;
  float *accB = hs + KEPT, *accC = accB + T * n * W;
  const Planes planes(accC + T * n * W);
  clear(dA, PANELS * states);
  clear(doffset, PANELS * states);
  clear(planes.d, Planes::FLOATS);
  for (int64_t p = at.first; p < at.end; ++p) {
    const int64_t channel = at.from(p), count = at.count(p), k = (p - at.first) * states;
    gather_A2(a.A + channel * n, n, count, A2 + k);
    gather(a.dlast ? a.dlast + (at.picture * e + channel) * n : nullptr, n, count, g + k);
    if (a.offset) gather(a.offset + channel * n, n, count, offset + k);
    for (float* total : {a.dD, a.ddelta_bias, a.dbias})
      if (total) clear(total + at.picture * e + channel, count);
  }
  for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
    const Chunk now(a, at, chunk);
    clear(accB, 2 * T * n * W);
    for (int64_t p = at.first; p < at.end; ++p) {
      const int64_t k = (p - at.first) * states, next = p + 1 < at.end ? at.from(p + 1) : at.from(at.first);
      const int64_t ahead = p + 1 < at.end ? 0 : a.reverse ? T : -T;
      copy(h, a.states + ((at.picture * chunks + chunk) * at.panels * a.groups + at.group * at.panels + p) * states, states);
      backward_prologue(a, at, now, p, planes);
      if (a.offset) {
        if (GATED) read_offset(now, n, offset + k, planes.y);
        backward_offset(now, n, offset + k, planes.dy, accC, doffset + k);
      }
      int64_t asked = 0;
      for (int64_t c = 0, count = at.count(p); c < count; c += TILE) {
        for (int64_t s = 0; s < n;) {
          for (const int64_t until = asked + 4; asked < until && asked < now.steps; ++asked) {
            const int64_t token = now.token[asked] + ahead;
            if (token >= 0 && token < a.length) prefetch<BACKWARD_ROWS>(a, at, token, next);
          }
          const int64_t o = s * PANEL + c;
          if (s + 4 <= n) {
            const bool near = is_near<4>(A2 + k + o, planes.reach + c);
            const auto keep = near ? backward_4_keep<true, GATED> : backward_4_keep<false, GATED>;
            keep(now, s, n, A2 + k + o, planes, c, h + o, as, hs, accC);
            backward_4_back<with_A>(now, s, n, A2 + k + o, planes, c, g + k + o, as, hs, accB, dA + k + o);
            s += 4;
          } else {
            const bool near = is_near<1>(A2 + k + o, planes.reach + c);
            const auto keep = near ? backward_1_keep<true, GATED> : backward_1_keep<false, GATED>;
            keep(now, s, n, A2 + k + o, planes, c, h + o, as, hs, accC);
            backward_1_back<with_A>(now, s, n, A2 + k + o, planes, c, g + k + o, as, hs, accB, dA + k + o);
            s += 1;
          }
        }
      }
      backward_epilogue(a, at, now, p, planes);
    }
    for (int64_t t = 0; t < now.steps; ++t) {
      const int64_t row = ((at.block * a.batch + at.picture) * a.length + now.token[t]) * a.groups + at.group;
      sum_rows(accB + t * n * W, n, a.dB + row * n);
      sum_rows(accC + t * n * W, n, a.dC + row * n);
    }
  }
  for (int64_t p = at.first; p < at.end; ++p) {
    const int64_t k = (p - at.first) * states, count = at.count(p), o = (at.picture * e + at.from(p)) * n;
    if (a.dA) scatter(dA + k, n, count, a.dA + o);
    if (a.doffset) scatter(doffset + k, n, count, a.doffset + o);
    if (a.dh0) scatter(g + k, n, count, a.dh0 + o);
  }
}

// -- one state --------------------------------------------------------------------------------------------------------

// With one state there is no loop over states that would pay for the prologue's scratch, and neighbouring channels are as
// independent as states are. So a task walks along each token's row of its channels and does all at once, SIDE vectors at a
// time; the state is one more row, in the nearest cache.

constexpr int64_t ROW = PANELS * PANEL;  // floats of a row in scratch

// What the tokens of a task share: rows in scratch, zero beyond `count` and where nothing was given.
struct Weights {
  float *A2, *D, *delta_bias, *bias, *offset;
  static constexpr int64_t FLOATS = 5 * ROW;
  int64_t channel, count;
  bool falling;  // delta A <= 0 whatever the token

  Weights(const Scan& a, const Place& at, float* p) {
    for (float** row : {&A2, &D, &delta_bias, &bias, &offset}) *row = p, p += ROW;
    channel = at.from(at.first);
    count = at.from(at.end - 1) + at.count(at.end - 1) - channel;
    clear(A2, FLOATS);
    put(a.A, A2), put(a.D, D), put(a.delta_bias, delta_bias), put(a.bias, bias), put(a.offset, offset);
    scale_A(A2, ROW);
    falling = a.softplus;
    for (int64_t c = 0; c < count; ++c) falling = falling && A2[c] <= 0;
  }
  void put(const float* source, float* row) const {
    if (source) copy(row, source + channel, count);
  }
};

// The token two steps later, or -1. Its row is asked for bit by bit: all at once would have to wait for each other.
SVP_INLINE int64_t soon_after(const Scan& a, int64_t token) {
  token += a.reverse ? -2 : 2;
  return token >= 0 && token < a.length ? token : -1;
}

// delta, exp(delta A) and with SLOPE delta's derivative, of the channels from c on.
template <bool FALLING, bool SLOPE, typename Left>
SVP_INLINE void pace(const Scan& a, const Weights& w, const float* delta, int64_t c, Left left, Side& d, Side& f, Side& slope) {
  load_side(delta + c, left, d);
  EACH d[i] += load(w.delta_bias + c + i * W);
  step_sizes<SLOPE>(a, d, slope);
  EACH {
    const vf t = d[i] * load(w.A2 + c + i * W);
    f[i] = FALLING ? exp2_below(t) : exp2v(t);
  }
}

// Where the state before a chunk is kept: the task's panels lie side by side.
float* kept(const Scan& a, const Place& at, int64_t chunk) {
  const int64_t chunks = (a.length + T - 1) / T;
  return a.states + ((at.picture * chunks + chunk) * at.panels * a.groups + at.group * at.panels + at.first) * PANEL;
}

template <bool FALLING>
void forward_one(const Scan& a, const Place& at, const Weights w, float* h) {
  for (int64_t chunk = 0; chunk * T < a.length; ++chunk) {
    const Chunk now(a, at, chunk);
    if (a.states) copy(kept(a, at, chunk), h, (at.end - at.first) * PANEL);
    for (int64_t t = 0; t < now.steps; ++t) {
      const int64_t token = now.token[t];
      const float bt = now.b[t][0], ct = now.c[t][0];
      const float *delta = row_of(a.delta, at, token, w.channel), *u = row_of(a.u, at, token, w.channel);
      const float* add = a.add.data ? row_of(a.add, at, token, w.channel) : nullptr;
      const float* z = a.z.data ? row_of(a.z, at, token, w.channel) : nullptr;
      float* out = row_of(a.y, a, at, token, w.channel);
      const int64_t soon = soon_after(a, token);
      ALONG(SIDE * W, w.count) {
        if (soon >= 0) prefetch<FORWARD_ROWS, SIDE * W>(a, at, soon, w.channel + c);
        Side dt, f, y, slope;
        pace<FALLING, false>(a, w, delta, c, left, dt, f, slope);
        EACH {
          const int64_t o = c + i * W;
          const vf ut = load_part(u + o, left - i * W), ht = f[i] * load(h + o) + dt[i] * ut * bt;
          store(h + o, ht);
          y[i] = (ht + load(w.offset + o)) * ct + (load(w.D + o) * ut + load(w.bias + o));
        }
        finish(a, add ? add + c : nullptr, z ? z + c : nullptr, left, y);
        store_side(out + c, y, left);
      });
    }
  }
}

void forward_task_one(const Scan& a, int64_t task, float* scratch) {
  const Place at(a, task);
  const Weights w(a, at, scratch);
  float* h = scratch + Weights::FLOATS;
  clear(h, ROW);
  w.put(a.h0 ? a.h0 + at.picture * a.h0_b : nullptr, h);
  (w.falling ? forward_one<true> : forward_one<false>)(a, at, w, h);
  if (a.last) copy(a.last + at.picture * a.channels + w.channel, h, w.count);
}

// What the backward recomputes of a chunk, each (T, ROW); h: h_{t-1}, and one row more.
struct Kept {
  float *d, *slope, *a, *h;
  static constexpr int64_t FLOATS = (4 * T + 1) * ROW;
  explicit Kept(float* p) {
    for (float** rows : {&d, &slope, &a, &h}) *rows = p, p += T * ROW;
  }
};

template <bool FALLING>
void recompute_one(const Scan& a, const Place& at, const Weights w, const Chunk& now, const Kept k) {
  for (int64_t t = 0; t < now.steps; ++t) {
    const int64_t token = now.token[t];
    const float bt = now.b[t][0];
    const float *delta = row_of(a.delta, at, token, w.channel), *u = row_of(a.u, at, token, w.channel);
    const int64_t soon = soon_after(a, token);
    ALONG(SIDE * W, w.count) {
      if (soon >= 0) prefetch<BACKWARD_ROWS, SIDE * W>(a, at, soon, w.channel + c);
      Side dt, f, slope;
      pace<FALLING, true>(a, w, delta, c, left, dt, f, slope);
      EACH {
        const int64_t o = t * ROW + c + i * W;
        store(k.d + o, dt[i]);
        store(k.slope + o, slope[i]);
        store(k.a + o, f[i]);
        store(k.h + o + ROW, f[i] * load(k.h + o) + dt[i] * load_part(u + c + i * W, left - i * W) * bt);
      }
    });
  }
}

// From the chunk's last token to its first: carries g; sums (2, T, W): each token's dB and dC, not yet added over lanes.
void back_one(const Scan& a, const Place& at, const Weights w, const Chunk& now, const Kept k, float* g, float* sums) {
  const auto total = [&](float* share) { return share ? share + at.picture * a.channels + w.channel : nullptr; };
  float *dA = total(a.dA), *doffset = total(a.doffset), *dD = total(a.dD), *dbias = total(a.dbias);
  float* ddelta_bias = total(a.ddelta_bias);
  for (int64_t t = now.steps - 1; t >= 0; --t) {
    const int64_t token = now.token[t];
    const float bt = now.b[t][0], ct = now.c[t][0];
    const float *dout = row_of(a.dy, at, token, w.channel), *u = row_of(a.u, at, token, w.channel);
    const float* z = a.z.data ? row_of(a.z, at, token, w.channel) : nullptr;
    const float* gate = a.gate.data ? row_of(a.gate, at, token, w.channel) : nullptr;
    float *du = row_of(a.du, a, at, token, w.channel), *ddelta = row_of(a.ddelta, a, at, token, w.channel);
    float* dz = gated(a) ? row_of(a.dz, at, token, w.channel) : nullptr;
    vf sumB = {}, sumC = {};
    ALONG(SIDE * W, w.count) {
      Side dy, gates_of_z;
      load_side(dout + c, left, dy);
      if (z) gates(z + c, left, dy, gates_of_z);
      if (gate) load_side(gate + c, left, gates_of_z);
      EACH {
        const int64_t row = c + i * W, o = t * ROW + row, rest = left - i * W;
        const auto add = [&](float* sum, vf part) __attribute__((always_inline)) {
          if (sum) store_part(sum + row, load_part(sum + row, rest) + part, rest);
        };
        const vf dt = load(k.d + o), ut = load_part(u + row, rest), read = load(k.h + o + ROW) + load(w.offset + row);
        const vf gt = load(g + row) + dy[i] * ct, dx = gt * bt, ga = gt * load(k.a + o), gh = ga * load(k.h + o);
        const vf into = load(k.slope + o) * (dx * ut + gh * load(w.A2 + row) * LN2);
        store(g + row, ga);
        sumB += gt * (dt * ut);
        sumC += dy[i] * read;
        store_part(du + row, dx * dt + load(w.D + row) * dy[i], rest);
        store_part(ddelta + row, into, rest);
        if (dz) {
          const vf y = read * ct + (load(w.D + row) * ut + load(w.bias + row));
          store_part(dz + row, y * gates_of_z[i] + (a.add_dz ? load_part(dz + row, rest) : vf{}), rest);
        }
        add(dA, gh * dt);
        add(doffset, dy[i] * ct);
        add(dD, dy[i] * ut);
        add(dbias, dy[i]);
        add(ddelta_bias, into);
      }
    });
    store(sums + t * W, sumB);
    store(sums + (T + t) * W, sumC);
  }
}

void backward_task_one(const Scan& a, int64_t task, float* scratch) {
  const Place at(a, task);
  const Weights w(a, at, scratch);
  float *g = scratch + Weights::FLOATS, *sums = g + ROW;
  const Kept k(sums + 2 * T * W);
  const int64_t here = at.picture * a.channels + w.channel;
  clear(g, ROW);
  w.put(a.dlast ? a.dlast + at.picture * a.channels : nullptr, g);
  for (float* total : {a.dA, a.doffset, a.dD, a.dbias, a.ddelta_bias})
    if (total) clear(total + here, w.count);
  for (int64_t chunk = (a.length + T - 1) / T - 1; chunk >= 0; --chunk) {
    const Chunk now(a, at, chunk);
    copy(k.h, kept(a, at, chunk), (at.end - at.first) * PANEL);
    (w.falling ? recompute_one<true> : recompute_one<false>)(a, at, w, now, k);
    back_one(a, at, w, now, k, g, sums);
    float each[2 * T];
    sum_rows(sums, now.steps, each);
    sum_rows(sums + T * W, now.steps, each + T);
    for (int64_t t = 0; t < now.steps; ++t) {
      const int64_t row = ((at.block * a.batch + at.picture) * a.length + now.token[t]) * a.groups + at.group;
      a.dB[row] = each[t];
      a.dC[row] = each[T + t];
    }
  }
  if (a.dh0) copy(a.dh0 + here, g, w.count);
}

}  // namespace

int scan_forward(const Scan& a) {
  const bool one = a.n == 1;
  const int64_t floats = one ? Weights::FLOATS + ROW : 3 * PANELS * a.n * PANEL + 3 * PLANE + PANEL;
  const auto task = one ? forward_task_one : forward_task;
  return parallel(tasks_of(a), a.threads, floats, [&](int64_t index, float* scratch) { task(a, index, scratch); });
}

int scan_backward(const Scan& a) {
  const bool one = a.n == 1;
  const int64_t floats = one ? Weights::FLOATS + ROW + 2 * T * W + Kept::FLOATS
                             : (5 * PANELS + 1) * a.n * PANEL + 2 * KEPT + 2 * T * a.n * W + Planes::FLOATS;
  const auto task = one        ? backward_task_one
                    : gated(a) ? (a.dA ? backward_task<true, true> : backward_task<true, false>)
                               : (a.dA ? backward_task<false, true> : backward_task<false, false>);
  return parallel(tasks_of(a), a.threads, floats, [&](int64_t index, float* scratch) { task(a, index, scratch); });
}

void exponentials(float* p, int64_t count, int64_t rounds) {
  for (int64_t round = 0; round < rounds; ++round)
    for (int64_t i = 0; i < count; i += 4 * W)
      for (int64_t j = i; j < i + 4 * W; j += W) store(p + j, exp2_near(-load(p + j)));
}

}  // namespace SVP_NS
}  // namespace svp
