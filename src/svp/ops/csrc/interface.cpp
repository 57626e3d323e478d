// The plain C interface: raw pointers in, 0 or an error number out; the level is chosen once and can be forced.
#include "kernels.h"

using namespace svp;

#define SVP_API extern "C" __attribute__((visibility("default")))

namespace {

constexpr int ABI = 5;  // python's native.py must agree

bool has(int level) {
#if defined(SVP_HAS_LEVEL_2)
  if (level == 2)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl");
#endif
#if defined(SVP_HAS_LEVEL_1)
  if (level == 1) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return level == 0;
}

int best() {
#if defined(SVP_HAS_LEVEL_1)
  __builtin_cpu_init();  // this runs before main
#endif
  return has(2) ? 2 : has(1) ? 1 : 0;
}

int current = best();

#define SVP_TABLE(LEVEL) \
  Level { LEVEL::scan_forward, LEVEL::scan_backward, LEVEL::conv_forward, LEVEL::conv_backward, \
          LEVEL::gate, LEVEL::add_norm_forward, LEVEL::add_norm_backward, LEVEL::exponentials }

Level functions() {
#if defined(SVP_HAS_LEVEL_2)
  if (current == 2) return SVP_TABLE(level_2);
#endif
#if defined(SVP_HAS_LEVEL_1)
  if (current == 1) return SVP_TABLE(level_1);
#endif
  return SVP_TABLE(level_0);
}

}  // namespace

SVP_API int svp_abi() { return ABI; }
SVP_API int svp_isa() { return current; }
SVP_API int svp_set_isa(int level) {
  if (!has(level)) return 1;
  current = level;
  return 0;
}

SVP_API int svp_scan_forward(const Scan* a) { return functions().scan_forward(*a); }
SVP_API int svp_scan_backward(const Scan* a) { return functions().scan_backward(*a); }
SVP_API int svp_conv_forward(const Conv* a) { return functions().conv_forward(*a); }
SVP_API int svp_conv_backward(const Conv* a) { return functions().conv_backward(*a); }
SVP_API int svp_gate(const Gate* a) { return functions().gate(*a); }
SVP_API int svp_add_norm_forward(const AddNorm* a) { return functions().add_norm_forward(*a); }
SVP_API int svp_add_norm_backward(const AddNorm* a) { return functions().add_norm_backward(*a); }

// p (count, a multiple of 64) becomes 2^-p, over and over: the rate of exponentials, for the benchmark's floor.
SVP_API int svp_exponentials(float* p, int64_t count, int64_t rounds) {
  functions().exponentials(p, count, rounds);
  return 0;
}
