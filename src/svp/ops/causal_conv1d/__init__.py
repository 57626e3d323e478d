"""The short causal depthwise convolution: one public function, its kernels, and causal_conv1d's calling form."""

from __future__ import annotations

import torch
from torch import Tensor

from svp.errors import SvpError
from svp.ops.dispatch import Kernel, pick

KERNELS = (  # the fastest first; the last row answers everywhere
    Kernel("triton", "svp.ops.causal_conv1d.triton:conv", "cuda", (torch.float32, torch.bfloat16, torch.float16)),
    Kernel("cpu", "svp.ops.causal_conv1d.cpu:conv", "cpu", (torch.float32, torch.bfloat16, torch.float16)),
    Kernel("reference", "svp.ops.causal_conv1d.reference:conv"),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    past: Tensor | None = None,
    reverse: bool = False,
    kernel: str = "auto",
) -> Tensor:
    """Each channel convolved with its own taps, looking back only.

        y_t = act(bias + sum_k weight_k x_{t - (taps - 1) + k})

    x           (b, l, e)            any strides
    weight      (e, taps)            the last tap multiplies the current token
    bias        (e,)                 or None
    activation  None or "silu"
    past        (1|b, e, taps - 1)   the tokens before the first, or None for zeros
    reverse     the same over the reversed order (an anti-causal convolution); past then follows the last token
    returns     (b, l, e)            in the dtype of x
    Raises SvpError for shapes that do not belong together and for a named kernel that cannot answer.
    Source: repository Dao-AILab/causal-conv1d, causal_conv1d_ref.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2]:
        raise SvpError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}, expected x (b, l, e) and weight (e, taps)"
        )
    b, _, e = x.shape
    if activation not in (None, "silu", "swish"):
        raise SvpError(f"activation is {activation!r}, expected None or 'silu'", kind="usage")
    if bias is not None and bias.shape != (e,):
        raise SvpError(f"bias is {tuple(bias.shape)}, expected ({e},)")
    if past is not None and past.shape not in ((1, e, weight.shape[1] - 1), (b, e, weight.shape[1] - 1)):
        raise SvpError(f"past is {tuple(past.shape)}, expected (1, {e}, {weight.shape[1] - 1}) or ({b}, …)")
    return pick(KERNELS, kernel, x)(x, weight, bias, activation is not None, past, reverse)


def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | str | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False, final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """`causal_conv1d` in the layout of the package of that name: x (b, e, l), weight (e, taps) -> (b, e, l).

    initial_states (b, e, taps - 1); the activation is also taken as fourth argument, where old versions had it.
    Raises SvpError for seq_idx and final_states_out, which are not offered.
    """
    if isinstance(seq_idx, str):
        activation, seq_idx = seq_idx, None
    if seq_idx is not None or final_states_out is not None:
        raise SvpError("seq_idx and final_states_out are not offered", "run each sequence on its own")
    y = causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation, past=initial_states).transpose(1, 2)
    if not return_final_states:
        return y
    taps = weight.shape[1]
    before = x.new_zeros(len(x), x.shape[1], taps - 1) if initial_states is None else initial_states
    return y, torch.cat([before, x], dim=2)[:, :, x.shape[2] :]
