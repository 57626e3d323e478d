"""The ops against the published code's numbers, in both precisions and through the drop-in forms."""

import pytest
import torch

from support import assert_close, cases, golden, precisions, starting
from svp.ops import causal_conv1d_fn, selective_scan_fn


@pytest.fixture(autouse=True)
def kernel(request, monkeypatch):
    """SVP_KERNEL for the drop-in forms, which have no argument for it."""
    if "kernel" in request.fixturenames and hasattr(request.node, "callspec"):
        monkeypatch.setenv("SVP_KERNEL", request.node.callspec.params["kernel"])


def leaves(tensors, dtype):
    return {name: t.to(dtype).requires_grad_() for name, t in starting(tensors, "in.").items()}


def compare_grads(tensors, inputs, tolerance):
    wanted = starting(tensors, "grad.")
    assert wanted.keys() == inputs.keys()
    for name, want in wanted.items():
        assert_close(inputs[name].grad, want, f"d{name}", tolerance)


@pytest.mark.parametrize("dtype,kernel,tolerance,grad_tolerance", precisions("vim"))
@pytest.mark.parametrize("case", cases("vim", "scan_*"))
def test_scan(case, dtype, kernel, tolerance, grad_tolerance):
    config, tensors = golden("vim", case)
    inputs = leaves(tensors, dtype)
    args = dict(inputs)
    if "A_re" in args:
        args["A"] = torch.complex(args.pop("A_re"), args.pop("A_im"))
    out, last = selective_scan_fn(**args, delta_softplus=config["delta_softplus"], return_last_state=True)
    assert_close(out, tensors["out"], "out", tolerance)
    if out.dtype == torch.float32 or "last_state" in tensors:
        parts = {"last_state": last} if "last_state" in tensors else {}
    else:
        parts = {"last_state_re": last.real, "last_state_im": last.imag}
    for name, got in parts.items():
        assert_close(got, tensors[name], name, tolerance)
    (out * tensors["loss_weight"].to(dtype)).sum().backward()
    compare_grads(tensors, inputs, grad_tolerance)


@pytest.mark.parametrize("dtype,kernel,tolerance,grad_tolerance", precisions("vim"))
@pytest.mark.parametrize("case", cases("vim", "conv_*"))
def test_conv(case, dtype, kernel, tolerance, grad_tolerance):
    config, tensors = golden("vim", case)
    inputs = leaves(tensors, dtype)
    out = causal_conv1d_fn(**inputs, activation=config["activation"])
    assert_close(out, tensors["out"], "out", tolerance)
    (out * tensors["loss_weight"].to(dtype)).sum().backward()
    compare_grads(tensors, inputs, grad_tolerance)
