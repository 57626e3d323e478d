"""Linear probing: a new head on the frozen feature."""

from svp.methods.base import Method


class Linear(Method):
    """Nothing of the backbone is touched, so features are computed once when nothing random touches the pictures."""

    paper = "the common baseline; arXiv 2412.08947 Table 1, row Linear"
    params_formula = "0 (+ head)"
    default_lr = 1e-2
