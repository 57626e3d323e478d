// What a gate shared by several scans hands down to each; the formula is at `Gate`.
#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {

int gate(const Gate& a) {
  const int64_t pieces = (a.length + ROWS - 1) / ROWS;
  return parallel(a.batch * pieces, a.threads, 0, [&](int64_t task, float*) {
    const int64_t picture = task / pieces, first = task % pieces * ROWS;
    const int64_t end = first + ROWS < a.length ? first + ROWS : a.length;
    for (int64_t t = first; t < end; ++t) {
      const auto row = [&](const Rows& rows) { return rows.data + picture * rows.b + t * rows.l; };
      const float *dout = row(a.dout), *z = row(a.z);
      const int64_t dense = (picture * a.length + t) * a.channels;
      for (int64_t c = 0; c < a.channels; c += W) {
        const int64_t left = a.channels - c;
        const vf zt = load_part(z + c, left), s = sigmoid(zt, decay(zt)), g = load_part(dout + c, left) * a.scale;
        store_part(a.dy + dense + c, g * (zt * s), left);
        store_part(a.gate + dense + c, g * (s * (1.0f + zt * (1.0f - s))), left);
      }
    }
  });
}

}  // namespace SVP_NS
}  // namespace svp
