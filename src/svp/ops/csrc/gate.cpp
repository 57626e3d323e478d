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
      ALONG(SIDE * W, a.channels) {
        Side dy, gate;
        load_side(dout + c, left, dy);
        EACH dy[i] *= a.scale;
        gates(z + c, left, dy, gate);
        store_side(a.dy + dense + c, dy, left);
        store_side(a.gate + dense + c, gate, left);
      });
    }
  });
}

}  // namespace SVP_NS
}  // namespace svp
