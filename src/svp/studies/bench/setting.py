"""What one measurement is of: a network, a method, a size, a machine's part; and the step that every row takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.backbones.base import Backbone
from svp.backbones.create import create_backbone
from svp.errors import SvpError
from svp.model import AdaptedModel, MethodSpec, adapt
from svp.ops.precision import wide
from svp.training.machine import autocast

CLASSES = 200
PROMPTS = 50  # of the ViT that is measured beside us


@dataclass(frozen=True)
class Setting:
    """Picklable and plain, so that a process of its own can build the same rows again."""

    backbone: str = "vim_small"
    method: str = "svp"
    options: dict[str, Any] = field(default_factory=dict)
    img_size: int = 224
    batch_size: int = 8
    threads: int = 1
    device: str = "cpu"
    amp: str = "off"
    kernel: str = "auto"
    overrides: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> Setting:
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def spec(self) -> MethodSpec:
        return self.method, dict(self.options)

    @property
    def uses_cpu_time(self) -> bool:
        """Whether CPU time is what counts: one thread of this processor does all the work."""
        return self.device == "cpu" and self.threads == 1

    def network(self) -> Backbone:
        """The frozen Vim, its weights random: no speed depends on them."""
        net = create_backbone(self.backbone, img_size=self.img_size, kernel=self.kernel, **self.overrides)
        if net.family != "vim":
            raise SvpError(
                f"{net.name} is no Vision Mamba: the ViT of its width is measured beside a Vim anyway",
                "--backbone vim_small; svp list backbones", "usage",
            )  # fmt: skip
        for p in net.parameters():
            p.requires_grad_(False)
        return net if next(net.parameters()).is_meta else net.to(self.device)

    def shape(self) -> Backbone:
        """The same without memory behind its tensors: sizes and sites."""
        with torch.device("meta"):
            return self.network()

    def adapted(self, net: Backbone) -> AdaptedModel:
        return adapt(net, self.spec, num_classes=CLASSES, probe=False).to(self.device).train()

    def pictures(self) -> tuple[Tensor, Tensor]:
        """Random images (b, 3, H, W) and labels (b,), the same for every row."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.img_size, self.img_size, generator=generator)
        labels = torch.randint(CLASSES, (self.batch_size,), generator=generator)
        return images.to(self.device), labels.to(self.device)


class Step:
    """One row's training step (forward, loss, backward) and inference, on the pictures of a setting.

    model    holds what trains; forward: how pictures become logits, where that is not the call of the model
    around   called with True before a training step and with False after it
    """

    def __init__(
        self,
        setting: Setting,
        model: nn.Module,
        forward: Callable[[Tensor], Tensor] | None = None,
        around: Callable[[bool], object] = lambda begins: None,
    ):
        self.model, self.forward, self.around = model, model if forward is None else forward, around
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.images, self.labels = setting.pictures()
        self.precision = lambda: autocast(torch.device(setting.device), setting.amp)

    def train(self) -> Tensor:
        for p in self.trained.values():
            p.grad = None
        self.around(True)
        try:
            with self.precision():
                logits = self.forward(self.images)
            F.cross_entropy(wide(logits), self.labels).backward()
        finally:
            self.around(False)
        return logits.detach()

    def infer(self) -> Tensor:
        with torch.inference_mode(), self.precision():
            return self.forward(self.images)
