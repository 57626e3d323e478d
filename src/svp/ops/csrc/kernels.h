// What the levels share: the arguments of each kernel, and the table of functions that a level fills.
#pragma once
#include <cstdint>

namespace svp {

constexpr int64_t T = 64;      // tokens between two stored states; python's cpu.py must agree
constexpr int64_t PANEL = 64;  // channels that lie side by side in scratch and in stored states; cpu.py must agree
constexpr int64_t PANELS = 3;  // of one task at most; fixed, so that sums do not depend on the number of threads

// A tensor (b, l, …): its rows lie `b` and `l` floats apart, `g` the groups; the last axis is dense.
struct Rows {
  const float* data;
  int64_t b, l, g;
};

// The same of a tensor that is written.
struct OutRows {
  float* data;
  int64_t b, l, g;
};

struct Scan {
  Rows u, delta, B, C, z, dy;       // u, delta, z, dy (b, l, e); B, C (b, l, g, n); z may be null; dy: backward only
  Rows add;                         // (b, l, e) or null: added to y before the gate; forward only
  Rows gate;                        // (b, l, e) or null: then dz = gate y, and dy is given as it is without z; backward only
  const float* A;                   // (e, n)
  const float* D;                   // (e)     or null, as all that follow
  const float* delta_bias;          // (e)
  const float* bias;                // (e)
  const float* offset;              // (e, n)
  const float* h0;                  // (b, e, n) with h0_b floats between pictures; forward only
  int64_t h0_b;
  float* states;                    // (b, chunks, panels, n, PANEL) the state before each chunk of T tokens

  float* y;                         // (b, l, e) dense
  float* last;                      // (b, e, n) or null

  const float* dlast;               // (b, e, n)
  float* du;                        // (b, l, e)
  float* ddelta;                    // (b, l, e)  with respect to delta as given
  OutRows dz;                       // (b, l, e), added to what is there with add_dz
  float* dB;                        // (blocks, b, l, g, n) each task's share; the caller adds them up in order
  float* dC;
  float* dA;                        // (b, e, n)  each picture's share; null when frozen, as all that follow
  float* doffset;                   // (b, e, n)
  float* dD;                        // (b, e)
  float* ddelta_bias;               // (b, e)
  float* dbias;                     // (b, e)
  float* dh0;                       // (b, e, n)
  int64_t batch, length, channels, groups, n;
  float scale;                      // out = scale y silu(z); forward only
  int softplus, reverse, add_dz, threads;
};

constexpr int64_t SPAN = 32;  // tokens of a task of the convolution, whose cpu.py must agree

struct Conv {
  Rows x, dy;                       // (b, l, e); dy in the backward pass
  const float* weight;              // (taps, e)
  const float* bias;                // (e) or null
  const float* past;                // (b, taps - 1, e) with past_b floats between pictures, or null
  int64_t past_b;
  OutRows y;                        // (b, l, e): y forward, dx backward
  float* slope;                     // (b, l, e) dense or null: dy/dp, which the forward leaves and the backward then reads
  float* dweight;                   // (spans, b, taps + 1, e) each span's share, the bias last; or null when frozen
  float* dpast;                     // (b, taps - 1, e) or null
  int64_t batch, length, channels, taps;
  int silu, reverse, accumulate, threads;  // accumulate: dx is added to what is there
};

// For Scan's backward where several scans share one gate: dy = dout scale silu(z), gate = dout scale silu'(z).
struct Gate {
  Rows dout, z;                     // (b, l, e)
  float *dy, *gate;                 // (b, l, e) dense
  int64_t batch, length, channels;
  float scale;
  int threads;
};

constexpr int64_t ROWS = 16;  // tokens of a task of the gate and of add_norm, whose cpu.py must agree

struct AddNorm {
  Rows x, residual, pre0, pre1;     // (b, l, d); backward: x is the stream
  Rows dh, dstream;                 // backward only; dstream may be null
  const float *scale0, *scale1;     // (d), or one number where step is 0
  const float* weight;              // (d)
  const int64_t* skip;              // (skips) tokens that get no term
  float *h, *stream;                // (b, l, d) dense, forward
  float* ds;                        // (b, l, d) dense, as dpre
  float *dpre0, *dpre1;
  float *dscale0, *dscale1;         // (tasks, d) each task's share; the caller adds them up in order
  float* dweight;                   // or null when frozen
  int64_t batch, length, width, skips;
  float eps;
  int step0, step1, silu0, silu1, threads;
};

struct Level {
  int (*scan_forward)(const Scan&);
  int (*scan_backward)(const Scan&);
  int (*conv_forward)(const Conv&);
  int (*conv_backward)(const Conv&);
  int (*gate)(const Gate&);
  int (*add_norm_forward)(const AddNorm&);
  int (*add_norm_backward)(const AddNorm&);
  void (*exponentials)(float*, int64_t, int64_t);
};

#define SVP_DECLARE(LEVEL)               \
  namespace LEVEL {                      \
  int scan_forward(const Scan&);         \
  int scan_backward(const Scan&);        \
  int conv_forward(const Conv&);         \
  int conv_backward(const Conv&);        \
  int gate(const Gate&);                 \
  int add_norm_forward(const AddNorm&);  \
  int add_norm_backward(const AddNorm&); \
  void exponentials(float* p, int64_t count, int64_t rounds); \
  }
SVP_DECLARE(level_0)
SVP_DECLARE(level_1)
SVP_DECLARE(level_2)

}  // namespace svp
