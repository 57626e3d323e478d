"""Functions of tensors: what is computed. Channel-last (b, l, e); the `_fn` forms take (b, e, l) as other packages do."""

from svp.ops.causal_conv1d import causal_conv1d, causal_conv1d_fn
from svp.ops.selective_scan import selective_scan, selective_scan_fn

__all__ = ["causal_conv1d", "causal_conv1d_fn", "selective_scan", "selective_scan_fn"]
