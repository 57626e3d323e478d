// What the gate of a sum of scans hands down, vectorised over channels; the formula is at `Gate`.
#include "kernels.h"
#include "threads.h"
#include "vec.h"

namespace svp {
namespace SVP_NS {

int gate_backward(const Gate& a) {
  const int64_t pieces = (a.length + ROWS - 1) / ROWS;
  return parallel(a.batch * pieces, a.threads, 0, [&](int64_t task, float*) {
    const int64_t picture = task / pieces, first = task % pieces * ROWS;
    const int64_t end = first + ROWS < a.length ? first + ROWS : a.length;
    for (int64_t t = first; t < end; ++t) {
      const auto row = [&](const auto& rows) { return rows.data + picture * rows.b + t * rows.l; };
      const float *dout = row(a.dout), *z = row(a.z), *y = row(a.y);
      float *dz = row(a.dz), *dy = a.dy + (picture * a.length + t) * a.channels;
      for (int64_t c = 0; c < a.channels; c += W) {
        const int64_t left = a.channels - c;
        const vf zt = load_part(z + c, left), s = sigmoid(zt, decay(zt)), g = load_part(dout + c, left) * a.scale;
        store_part(dz + c, g * load_part(y + c, left) * (s * (1.0f + zt * (1.0f - s))), left);
        store_part(dy + c, g * (zt * s), left);
      }
    }
  });
}

}  // namespace SVP_NS
}  // namespace svp
