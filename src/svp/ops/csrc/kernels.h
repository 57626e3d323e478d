// What the levels share: the arguments of each kernel, and the table of functions that a level fills.
#pragma once
#include <cstdint>

namespace svp {

constexpr int64_t T = 16;           // tokens between two stored states; python's cpu.py must agree
constexpr int64_t BLOCK = 256;      // channels of one task at most; fixed, so results do not depend on the threads

// A tensor (b, l, …): its rows lie `b` and `l` floats apart, `g` the groups; the last axis is dense.
struct Rows {
  const float* data;
  int64_t b, l, g;
};

struct ScanForward {
  Rows u, delta, B, C;              // u, delta (b, l, e); B, C (b, l, g, n)
  const float* A2;                  // (n, e)  A log2(e): kernels know powers of two only
  const float* D;                   // (e)     or null
  const float* delta_bias;          // (e)     or null
  const float* h0;                  // (b, n, e) with h0_b floats between pictures, or null
  int64_t h0_b;
  float* y;                         // (b, l, e) dense
  float* states;                    // (b, chunks, n, e) the state before each chunk of T tokens, or null
  float* last;                      // (b, n, e)
  int64_t batch, length, channels, groups, n;
  int softplus, reverse, threads;
};

struct ScanBackward {
  Rows u, delta, B, C, dy;
  const float* A2;
  const float* D;
  const float* delta_bias;
  const float* states;
  const float* dlast;               // (b, n, e) or null
  float* du;                        // (b, l, e)
  float* ddelta;                    // (b, l, e)  with respect to delta as given
  float* dB;                        // (blocks, b, l, n) each task's share; the caller adds them up in order
  float* dC;
  float* dA;                        // (b, n, e) each picture's share, or null when A is frozen
  float* dh0;                       // (b, n, e) or null
  int64_t batch, length, channels, groups, n;
  int softplus, reverse, threads;
};

struct Conv {
  Rows x, dy;                       // (b, l, e); dy in the backward pass
  const float* weight;              // (taps, e)
  const float* bias;                // (e) or null
  const float* past;                // (b, taps - 1, e) with past_b floats between pictures, or null
  int64_t past_b;
  float* y;                         // (b, l, e): y forward, dx backward
  float* dweight;                   // (b, taps + 1, e) each picture's share, the bias last; or null when frozen
  float* dpast;                     // (b, taps - 1, e) or null
  int64_t batch, length, channels, taps;
  int silu, reverse, threads;
};

// Channels of the first task of a group, and how many tasks a group has.
inline int64_t blocks_of(int64_t channels, int64_t groups) {
  const int64_t size = channels / groups;
  return (size + BLOCK - 1) / BLOCK;
}

struct Level {
  int (*scan_forward)(const ScanForward&);
  int (*scan_backward)(const ScanBackward&);
  int (*conv_forward)(const Conv&);
  int (*conv_backward)(const Conv&);
};

namespace level_0 { int scan_forward(const ScanForward&); int scan_backward(const ScanBackward&);
                    int conv_forward(const Conv&); int conv_backward(const Conv&); }
namespace level_1 { int scan_forward(const ScanForward&); int scan_backward(const ScanBackward&);
                    int conv_forward(const Conv&); int conv_backward(const Conv&); }
namespace level_2 { int scan_forward(const ScanForward&); int scan_backward(const ScanBackward&);
                    int conv_forward(const Conv&); int conv_backward(const Conv&); }

}  // namespace svp
