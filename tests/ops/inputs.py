"""What the tests of several ops share: seeded inputs in float64, and outputs with their gradients on any kernel."""

import torch

from support import assert_close
from svp.ops.add_norm import Term, add_norm

OUT, GRAD = 5e-6, 2e-5  # float32 against the float64 reference, relative to the largest entry
LAID = {  # how a tensor may lie in memory; "repeated" changes its numbers too
    "columns of a wider one": lambda t: torch.cat([t.detach(), t], -1)[..., t.shape[-1] :],
    "transposed": lambda t: t.mT.contiguous().mT,
    "repeated": lambda t: t[:1, :1].expand_as(t),
}


def drawn(shapes, seed, leave_out):
    """{name: float64 tensor} of {name: shape}."""
    g = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: t for name, t in made.items() if name not in leave_out}


def scan_inputs(b, l, e, n, groups=1, seed=0, leave_out=()):
    """Of the scan by name; B, C (b, l, n), or (b, l, g, n) for several groups."""
    per_token = (b, l, n) if groups == 1 else (b, l, groups, n)
    shapes = {
        "u": (b, l, e), "delta": (b, l, e), "A": (e, n), "B": per_token, "C": per_token, "D": (e,), "z": (b, l, e),
        "delta_bias": (e,), "h0": (b, e, n), "offset": (e, n), "bias": (e,),
    }  # fmt: skip
    change = {"delta": lambda t: t - 1, "A": lambda t: -torch.exp(t), "delta_bias": lambda t: 0.5 * t}
    return {name: change.get(name, lambda t: t)(t) for name, t in drawn(shapes, seed, leave_out).items()}


def conv_inputs(b, l, e, taps, seed=0, leave_out=()):
    return drawn({"x": (b, l, e), "weight": (e, taps), "bias": (e,), "past": (b, e, taps - 1)}, seed, leave_out)


def sum_inputs(b, l, d, count, scale=(), leave_out=()):
    """Of `sums`, with `count` summands; scale: the shape of each one's, or ()."""
    shapes = {"x": (b, l, d), "residual": (b, l, d), "weight": (d,), **{f"pre{j}": (b, l, d) for j in range(count)}}
    return drawn(shapes | {f"scale{j}": scale for j in range(count) if scale}, 0, leave_out)


def sums(acts, skip=()):
    """add_norm as a function of named tensors: x, weight, residual, and pre and scale of each summand."""

    def op(x, weight, kernel, residual=None, **t):
        terms = tuple(Term(t[f"pre{j}"], t.get(f"scale{j}"), act) for j, act in enumerate(acts))
        return add_norm(x, residual, weight, 1e-5, terms=terms, skip=skip, kernel=kernel)

    return op


def run_with_grads(op, inputs, dtypes, kernel, frozen=(), laid=None, device="cpu", **options):
    """Outputs ("y", "last") and the gradients of a random weighting of them ("du", …); zeros for what gets none.

    dtypes: one, or {name: dtype}. laid: {name: one of LAID's}; "y" says how the gradient of the outputs lies.
    """
    by_name = dtypes if isinstance(dtypes, dict) else dict.fromkeys(inputs, dtypes)
    laid = laid or {}
    leaves = {
        name: t.to(device, by_name[name], copy=True).requires_grad_(name not in frozen) for name, t in inputs.items()
    }
    given = {name: laid[name](t) if name in laid else t for name, t in leaves.items()}
    found = op(**given, kernel=kernel, **options)
    out = dict(zip(("y", "last"), found if isinstance(found, tuple) else (found,), strict=False))
    g = torch.Generator().manual_seed(9)
    weights = {k: torch.randint(-8, 9, t.shape, generator=g).to(device, t.dtype) / 4 for k, t in out.items()}
    if "y" in laid:
        weights["y"] = laid["y"](weights["y"])
    loss = sum((t * weights[k]).sum() for k, t in out.items())
    if loss.requires_grad:
        loss.backward()
    assert all(leaves[name].grad is None for name in frozen)
    grads = {k: torch.zeros_like(t) if t.grad is None else t.grad for k, t in leaves.items() if k not in frozen}
    return {k: t.detach() for k, t in out.items()} | {f"d{k}": t for k, t in grads.items()}


def compare(op, inputs, kernel, frozen=(), dtypes=torch.float32, tolerances=(OUT, GRAD), device="cpu", **options):
    """A kernel against the reference in float64, outputs and gradients; the gradients have the dtypes of their tensors."""
    want = run_with_grads(op, inputs, torch.float64, "reference", frozen, **options)
    got = run_with_grads(op, inputs, dtypes, kernel, frozen, device=device, **options)
    by_name = dtypes if isinstance(dtypes, dict) else dict.fromkeys(inputs, dtypes)
    for name, t in want.items():
        assert name in ("y", "last") or got[name].dtype == by_name[name[1:]], name
        assert_close(got[name].double().cpu(), t, name, tolerances[name not in ("y", "last")])


def compare_halves(op, inputs, kernel, dtype, wide=(), **options):
    """As `compare`, of tensors in half precision but for those in `wide`."""
    rounded = {name: t if name in wide else t.to(dtype).double() for name, t in inputs.items()}
    dtypes = {name: torch.float32 if name in wide else dtype for name in inputs}
    compare(op, rounded, kernel, dtypes=dtypes, tolerances=[4 * torch.finfo(dtype).eps] * 2, **options)
