"""The scan as an operator of torch.library: arguments, shapes and derivative, the same for every compiled kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from svp.errors import SvpError

INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? h0, "
    "Tensor? offset, Tensor? bias"
)
FLAGS = "bool softplus, bool reverse"
GRADS = "Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor ddelta_bias, Tensor dh0, Tensor doffset, Tensor dbias"  # fmt: skip


class Wanted(NamedTuple):
    """Which gradients to compute beside du, ddelta, dB, dC and dz: a frozen backbone needs none of them."""

    A: bool
    D: bool
    delta_bias: bool
    h0: bool
    offset: bool
    bias: bool


def declare(name: str, saved_shape: Callable[[Tensor, Tensor, Tensor], tuple[int, ...]]) -> Library:
    """Defines svp::NAME and svp::NAME_backward, for which a kernel then brings the implementations.

    saved_shape(u, A, B) is that of the states which the forward keeps, in float32; they are empty when `save` is False.
    Gradients that are not wanted are empty, the others have the dtype of their input.
    """
    lib = Library("svp", "FRAGMENT")
    lib.define(f"{name}({INPUTS}, {FLAGS}, bool save) -> (Tensor y, Tensor last, Tensor states)")
    lib.define(
        f"{name}_backward(Tensor dy, Tensor? dlast, Tensor states, {INPUTS}, {FLAGS}, bool[6] needs) -> ({GRADS})"
    )

    def fake(u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse, save):
        b, l, e = u.shape
        return u.new_empty(b, l, e), A.new_empty(b, e, A.shape[1]), A.new_empty(saved_shape(u, A, B) if save else (0,))

    def fake_backward(
        dy, dlast, states, u, delta, A, B, C, D, z, delta_bias, h0, offset, bias, softplus, reverse, needs
    ):
        b, l, e = u.shape
        n, wanted = A.shape[1], Wanted(*needs)

        def one(like: Tensor, shape: tuple, asked: bool = True) -> Tensor:
            return like.new_empty(shape if asked else (0,))

        return (
            one(u, (b, l, e)), one(delta, (b, l, e)), one(A, (e, n), wanted.A), one(B, B.shape), one(C, C.shape),
            one(A, (e,), wanted.D), one(u if z is None else z, (b, l, e), z is not None),
            one(A, (e,), wanted.delta_bias), one(A, (b, e, n), wanted.h0), one(A, (e, n), wanted.offset),
            one(A, (e,), wanted.bias),
        )  # fmt: skip

    def derivative(ctx, dy, dlast, _):
        states, *inputs = ctx.saved_tensors
        u, h0 = inputs[0], inputs[8]
        kept(u, states)
        asked = ctx.needs_input_grad
        wanted = Wanted(*(asked[i] for i in (2, 5, 7, 8, 9, 10)))
        dy = torch.zeros_like(u) if dy is None else dy
        grads = getattr(torch.ops.svp, f"{name}_backward")(dy, dlast, states, *inputs, *ctx.flags, wanted)
        grads = [grad if asked[i] else None for i, grad in enumerate(grads)]
        if wanted.h0 and h0.shape[0] == 1:
            grads[8] = grads[8].sum(0, keepdim=True)
        return *grads, None, None, None

    def no_second(ctx, *grads):
        raise SvpError("second derivatives of the scan are not offered by this kernel", 'kernel="reference" has them')

    register_fake(f"svp::{name}", fake, lib=lib)
    register_fake(f"svp::{name}_backward", fake_backward, lib=lib)
    register_autograd(f"svp::{name}", derivative, setup_context=_keep, lib=lib)
    register_autograd(f"svp::{name}_backward", no_second, lib=lib)
    return lib


def same_groups(B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Both (b, l, g, n) with one number of groups."""
    if B.shape[2] == C.shape[2]:
        return B, C
    g = math.lcm(B.shape[2], C.shape[2])
    return B.repeat_interleave(g // B.shape[2], dim=2), C.repeat_interleave(g // C.shape[2], dim=2)


def is_recorded(*inputs: Tensor | None) -> bool:
    """Whether a backward may come, for which the states are kept."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)


def kept(u: Tensor, states: Tensor) -> None:
    """Raises SvpError where the forward kept no states: it was traced where no backward was to come, for example exported."""
    if u.numel() and not states.numel():
        raise SvpError("the forward kept nothing for a backward", "record or export it with gradients enabled", "usage")


def _keep(ctx, inputs, output):
    *tensors, softplus, reverse, _ = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.flags = softplus, reverse
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
