"""The convolution as an operator of torch.library: shapes and derivative, the same for every compiled kernel."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import Library, register_autograd, register_fake

from svp.errors import SvpError

INPUTS = "Tensor x, Tensor weight, Tensor? bias, Tensor? past, bool silu, bool reverse"


def declare(name: str) -> Library:
    """Defines svp::NAME and svp::NAME_backward, for which a kernel then brings the implementations.

    needs: whether the gradients of (weight and bias, past) are asked for; dweight (taps + 1, e) has the bias last.
    """
    lib = Library("svp", "FRAGMENT")
    lib.define(f"{name}({INPUTS}) -> Tensor")
    lib.define(f"{name}_backward(Tensor dy, {INPUTS}, bool[2] needs) -> (Tensor dx, Tensor dweight, Tensor dpast)")

    def derivative(ctx, dy):
        x, weight, bias, past = ctx.saved_tensors
        needs = ctx.needs_input_grad
        backward = getattr(torch.ops.svp, f"{name}_backward")
        dx, dweight, dpast = backward(dy, x, weight, bias, past, *ctx.flags, [needs[1] or needs[2], needs[3]])
        if needs[3] and past.shape[0] == 1:
            dpast = dpast.sum(0, keepdim=True)
        grads = dweight[:-1].T if needs[1] else None, dweight[-1].clone() if needs[2] else None
        return dx, *grads, dpast if needs[3] else None, None, None

    register_fake(f"svp::{name}", _fake, lib=lib)
    register_fake(f"svp::{name}_backward", _fake_backward, lib=lib)
    register_autograd(f"svp::{name}", derivative, setup_context=_keep, lib=lib)
    register_autograd(f"svp::{name}_backward", _no_second, lib=lib)
    return lib


def _fake(x, weight, bias, past, silu, reverse):
    return x.new_empty(x.shape)


def _fake_backward(dy, x, weight, bias, past, silu, reverse, needs) -> tuple[Tensor, Tensor, Tensor]:
    b, _, e = x.shape
    taps = weight.shape[1]
    dweight = weight.new_empty((taps + 1, e) if needs[0] else (0,))
    return x.new_empty(x.shape), dweight, weight.new_empty((b, e, taps - 1) if needs[1] else (0,))


def _keep(ctx, inputs, output):
    x, weight, bias, past, silu, reverse = inputs
    ctx.save_for_backward(x, weight, bias, past)
    ctx.flags = silu, reverse


def _no_second(ctx, *grads):
    raise SvpError(
        "second derivatives of the convolution are not offered by this kernel", 'kernel="reference" has them'
    )
