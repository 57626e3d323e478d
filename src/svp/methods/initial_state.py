"""Initial-state tuning: the state before the first token is trained (arXiv 2410.09016)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from svp.methods.base import Method
from svp.options import option
from svp.seams import Scan


class InitialState(Method):
    """h_0 (e, n) for each direction of each block, and with `conv` the inputs of the convolution before the first token.

    Both start at zero: the frozen network. The effect of h_0 decays along the sequence with exp(sum delta A). Neither is
    decayed, as published. Published on language models; on Vim adapted. A ViT has no state.
    Ours: a state for each direction.
    Left out: a random start of the state, which is not the frozen network.
    Source: arXiv 2410.09016 and 2503.03499; repository furiosa-ai/ssm-peft, SelectiveScanWithInitState.
    """

    @dataclass(frozen=True)
    class Options:
        state: bool = option(True, "train the state before the first token")
        conv: bool = option(False, "train the convolution's inputs before the first token")

    paper = "arXiv 2410.09016 (ICML 2025), 2503.03499"
    params_formula = "state: k depth e n; conv: k depth e (taps - 1)"
    default_lr = 1e-2

    @classmethod
    def unfit(cls, site, opt):
        if not all(block.n for block in site.blocks):
            return "it sets the state of a scan, which this network does not have"
        if opt.conv and any(
            b.k == 2 and f"layers.{i}.mixer.conv1d_b.weight" not in site.weights for i, b in enumerate(site.blocks)
        ):
            return "conv=true gives each direction a past of its convolution, and both directions of this network share one"
        return None if opt.state or opt.conv else "neither state nor conv is to be trained"

    @classmethod
    def label(cls, site, opt):
        return "initial_state_vim"

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.h0 = nn.ParameterList(torch.zeros(1, b.k, b.e, b.n) for b in site.blocks if opt.state)
        self.past = nn.ParameterList(torch.zeros(1, b.k, b.e, b.taps - 1) for b in site.blocks if opt.conv)

    def memory(self, i, w):
        return Scan(h0=self.h0[i] if self.opt.state else None, past=self.past[i] if self.opt.conv else None)

    def groups(self):
        return {"h0.*": {"decay_scale": 0.0}, "past.*": {"decay_scale": 0.0}}  # as published: no decay
