"""The ops against the published code's numbers, in both precisions and through the drop-in forms."""

import pytest
import torch

from support import assert_close, cases, golden, precisions, starting
from svp.ops import causal_conv1d, causal_conv1d_fn, selective_scan, selective_scan_fn


@pytest.fixture(autouse=True)
def kernel(request, monkeypatch):
    """SVP_KERNEL for the drop-in forms, which have no argument for it."""
    if "kernel" in request.fixturenames and hasattr(request.node, "callspec"):
        monkeypatch.setenv("SVP_KERNEL", request.node.callspec.params["kernel"])


def leaves(tensors, dtype):
    return {name: t.to(dtype).requires_grad_() for name, t in starting(tensors, "in.").items()}


def compare_grads(tensors, prefix, inputs, tolerance):
    for name, want in starting(tensors, prefix).items():
        if name in inputs:
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
    compare_grads(tensors, "grad.", inputs, grad_tolerance)


@pytest.mark.parametrize("dtype,kernel,tolerance,grad_tolerance", precisions("vim"))
@pytest.mark.parametrize("case", cases("vim", "conv_*"))
def test_conv(case, dtype, kernel, tolerance, grad_tolerance):
    config, tensors = golden("vim", case)
    inputs = leaves(tensors, dtype)
    out = causal_conv1d_fn(**inputs, activation=config["activation"])
    assert_close(out, tensors["out"], "out", tolerance)
    (out * tensors["loss_weight"].to(dtype)).sum().backward()
    compare_grads(tensors, "grad.", inputs, grad_tolerance)


STATE_CASES = [
    "init_state",
    "state_offset_h",
    "state_offset_h_lowrank",
    "state_offset_h_lowrank_ratio2",
    "state_offset_y",
]


@pytest.mark.parametrize("dtype,kernel,tolerance,grad_tolerance", precisions("peft"))
@pytest.mark.parametrize("case", STATE_CASES)
def test_states(case, dtype, kernel, tolerance, grad_tolerance):
    _, tensors = golden("peft", case)
    inputs = leaves(tensors, dtype)
    trained = {name: t.to(dtype).requires_grad_() for name, t in starting(tensors, "param.").items()}
    by_end = {name.rpartition(".")[2]: t for name, t in trained.items()}
    e, n = inputs["A"].shape
    if case == "init_state":
        extra = {"h0": by_end["ssmpeft_init_state"][None]}
    elif case == "state_offset_y":
        extra = {"bias": by_end["default"]}
    elif case == "state_offset_h":
        extra = {"offset": by_end["default"]}
    else:
        extra = {"offset": (by_end["lora_B"] @ by_end["lora_A"]).reshape(e, n)}
    turned = {name: t.transpose(-1, -2) for name, t in inputs.items() if t.dim() == 3}
    y = selective_scan(**{**inputs, **turned}, **extra, delta_softplus=True, kernel=kernel).transpose(1, 2)
    assert_close(y, tensors["out.y"], "y", tolerance)
    (y * tensors["loss_weight"].to(dtype)).sum().backward()
    compare_grads(tensors, "grad.", trained, grad_tolerance)
    compare_grads(tensors, "grad_in.", inputs, grad_tolerance)


@pytest.mark.parametrize("dtype,kernel,tolerance,grad_tolerance", precisions("peft"))
def test_conv_past(dtype, kernel, tolerance, grad_tolerance):
    _, tensors = golden("peft", "conv_init_state")
    x = tensors["in.x"].to(dtype).requires_grad_()
    trained = {name: t.to(dtype).requires_grad_() for name, t in starting(tensors, "param.").items()}
    weight, bias, past = (trained[k] for k in ("base_layer.weight", "base_layer.bias", "ssmpeft_conv_state.default"))
    y = causal_conv1d(x.transpose(1, 2), weight[:, 0], bias, past=past[None], kernel=kernel).transpose(1, 2)
    assert_close(y, tensors["out.y"], "y", tolerance)
    (y * tensors["loss_weight"].to(dtype)).sum().backward()
    compare_grads(tensors, "grad.", trained, grad_tolerance)
    compare_grads(tensors, "grad_in.", {"x": x}, grad_tolerance)
