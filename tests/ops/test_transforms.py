"""What looks inside an op, or comes back to it later: forward-mode derivatives, torch.func, export, autocast, forks."""

import os
import subprocess
import sys

import pytest
import torch

from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.ops import causal_conv1d, native, selective_scan
from svp.ops.add_norm import Term, add_norm
from svp.ops.mixer import Direction, mixer

compiled = pytest.mark.skipif(not native.available, reason=native.reason)
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch asks for it in jvp


def scan_inputs(b=2, l=9, e=6, n=4):
    g = torch.Generator().manual_seed(0)
    u, delta = torch.randn(b, l, e, generator=g), torch.rand(b, l, e, generator=g)
    return (
        u,
        delta,
        -torch.rand(e, n, generator=g),
        torch.randn(b, l, n, generator=g),
        torch.randn(b, l, n, generator=g),
    )


def direction(e=6, n=4, r=3, taps=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    return Direction(
        torch.randn(e, taps, generator=g), torch.randn(e, generator=g), torch.randn(r + 2 * n, e, generator=g), None,
        torch.randn(e, r, generator=g), torch.randn(e, generator=g), -torch.rand(e, n, generator=g), torch.randn(e, generator=g),
    )  # fmt: skip


OPS = {
    "scan": lambda x, kernel: selective_scan(x, *scan_inputs()[1:], kernel=kernel),
    "conv": lambda x, kernel: causal_conv1d(x, torch.full((6, 4), 0.3), kernel=kernel),
    "mixer": lambda x, kernel: mixer(torch.cat([x, x], -1), direction(), direction(seed=1), kernel=kernel),
    "add_norm": lambda x, kernel: add_norm(x, None, torch.ones(6), 1e-5, kernel=kernel)[0],
}


@pytest.mark.parametrize("name", OPS)
def test_forward_derivatives_are_those_of_the_reference(name):
    x = scan_inputs()[0]
    tangent = torch.ones_like(x)
    _, want = torch.func.jvp(lambda x: OPS[name](x, "reference"), (x,), (tangent,))
    _, got = torch.func.jvp(lambda x: OPS[name](x, "auto"), (x,), (tangent,))
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(got, want)


@compiled
def test_a_named_kernel_says_that_it_has_none():
    x = scan_inputs()[0]
    with pytest.raises(SvpError, match=r"torch\.func or forward-mode derivatives look inside"):
        torch.func.jvp(lambda x: OPS["scan"](x, "cpu"), (x,), (x,))


def test_torch_func_on_a_whole_network():
    net = create_backbone("vim_tiny", depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=16, num_classes=3)
    images = torch.randn(2, 3, 16, 16)
    leaf = images.clone().requires_grad_()
    net(leaf).square().sum().backward()
    got = torch.func.grad(lambda images: net(images).square().sum())(images)
    torch.testing.assert_close(got, leaf.grad, rtol=1e-4, atol=1e-5)
    every = torch.vmap(lambda image: net(image[None])[0])(images)
    torch.testing.assert_close(every, net(images), rtol=1e-4, atol=1e-5)


@compiled
@pytest.mark.parametrize("name", ["scan", "mixer"])
def test_a_backward_after_nothing_was_kept_is_an_error(name):
    """An export under no_grad fixes that no states are kept; the program may still be trained."""

    class Net(torch.nn.Module):
        def forward(self, x):
            return OPS[name](x, "cpu")

    x = scan_inputs()[0]
    with torch.no_grad():
        exported = torch.export.export(Net(), (x,)).module()
    leaf = x.clone().requires_grad_()
    with pytest.raises(SvpError, match="the forward kept nothing for a backward"):
        exported(leaf).sum().backward()


def test_a_gradient_that_never_comes_is_none():
    class Cut(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            return None

    x = scan_inputs()[0].requires_grad_()
    (Cut.apply(OPS["mixer"](x, "auto")).sum() + 0 * x.sum()).backward()
    assert not x.grad.any()


WRONG = {  # what a kernel would read beyond
    "conv": (5, 4), "conv_bias": (1,), "x_proj": (8, 6), "x_proj_bias": (3,), "dt_proj": (6, 2), "dt_bias": (1,),
    "A": (6, 3), "D": (1,), "h0": (3, 6, 4), "past": (1, 6, 4), "offset": (1, 4), "bias": (7,),
}  # fmt: skip


@pytest.mark.parametrize("kernel", ["auto", "reference"])
@pytest.mark.parametrize("name", WRONG)
def test_tensors_of_other_shapes_are_refused(name, kernel):
    x = scan_inputs()[0]
    for k in (0, 1):
        pair = [direction(), direction(seed=1)]
        pair[k] = pair[k]._replace(**{name: torch.zeros(WRONG[name])})
        with pytest.raises(SvpError, match="expected"):
            mixer(torch.cat([x, x], -1), *pair, kernel=kernel)


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_scales_and_positions_of_add_norm_are_checked(kernel):
    x, one = scan_inputs()[0], torch.ones(6)
    for scale in (torch.ones(3), torch.ones(2, 1, 1), torch.tensor(1.0)):
        with pytest.raises(SvpError, match=r"expected \(6,\) or \(1,\)"):
            add_norm(x, None, one, 1e-5, terms=(Term(x, scale),), kernel=kernel)
    for skip in ((-1,), (9,)):
        with pytest.raises(SvpError, match="expected positions from 0 to 8"):
            add_norm(x, None, one, 1e-5, terms=(Term(x, one),), skip=skip, kernel=kernel)


@compiled
def test_another_default_dtype_does_no_harm():
    x = scan_inputs()[0]
    want = OPS["mixer"](x, "cpu")
    native._kept.__dict__.clear()
    torch.set_default_dtype(torch.float64)
    try:
        pair = [Direction(*(None if t is None else t.float() for t in direction(seed=k))) for k in (0, 1)]
    finally:
        torch.set_default_dtype(torch.float32)
    torch.set_default_dtype(torch.float64)
    try:
        got = mixer(torch.cat([x, x], -1), *pair, kernel="cpu")
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(OPS["mixer"](x, "cpu"), want)


@compiled
def test_a_backward_inside_autocast_stays_in_float32():
    x = scan_inputs()[0]

    def grad_of(inside):
        pair = [direction(), direction(seed=1)]
        pair[0].x_proj.requires_grad_(), pair[0].dt_proj.requires_grad_()
        y = mixer(torch.cat([x, x], -1), *pair, kernel="cpu").square().sum()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            y.backward()
        return pair[0].x_proj.grad, pair[0].dt_proj.grad

    for got, want in zip(grad_of(True), grad_of(False), strict=True):
        assert torch.equal(got, want)


FORK = """
import os, sys, torch
torch.set_num_threads(2)
from svp.backbones.create import create_backbone
net = create_backbone("vim_tiny", depth=2, embed_dim=64, d_state=4, patch_size=8, img_size=64, num_classes=3)
images = torch.randn(8, 3, 64, 64)
want = net(images)
want.sum().backward()
pid = os.fork()
if pid == 0:
    got = net(images)
    got.sum().backward()
    os._exit(0 if torch.allclose(got, want, rtol=1e-4, atol=1e-5) else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_runs_a_whole_network():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = subprocess.run([sys.executable, "-c", FORK], env=environment, timeout=100, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
