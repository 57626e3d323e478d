"""What every backbone shares: weights by name, seams, logits as timm has them, a fingerprint."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp.errors import SvpError, unknown
from svp.ops.dispatch import transformed
from svp.ops.precision import exactly
from svp.preprocessing import Preprocessing
from svp.seams import Seams, Site, Tokens, Weights

if TYPE_CHECKING:
    from svp.backbones.checkpoints import Report

PLAIN = Seams()
UNPREPARED = 20.0  # never negative and above this: pixel values that nobody has normalised


class Backbone(nn.Module):
    """A published network as a pure function of (images, weights by name, seams).

    Its modules hold the published tensors under the published names; nothing in them is ever swapped. Subclasses give
    `run_blocks`, `site` and the sizes; images are (b, 3, H, W), prepared as `preprocessing` says.
    """

    family: ClassVar[str] = ""
    name: str
    img_size: tuple[int, int]
    grid: tuple[int, int]
    num_features: int
    num_classes: int
    depth: int
    preprocessing: Preprocessing
    head: nn.Module
    kernel: str = "auto"
    grad_checkpointing: bool = False
    stored_positions: str | None = None  # digest of the file's position table when it was resized on loading
    weights_from: str = "random"
    seed: int = 0  # of what was drawn
    pos_resize: str = "middle"  # how its position table is resized where it was made for another picture size
    overrides: Mapping[str, Any] = MappingProxyType({})  # keywords beside those of its name
    report: Report | None = None  # what became of every key of its file

    # -- the function --------------------------------------------------------------------------------------------------

    def forward(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) -> logits (b, num_classes) of the source head."""
        return self.forward_head(self.forward_features(images))

    def features(self, images: Tensor, seams: Seams | None = None, drop_path: float = 0.0) -> Tensor:
        """images (b, 3, H, W) -> feature (b, d).

        With seams the network is frozen: its tensors are detached, replaced as the seams say, and take no gradient.
        drop_path is the rate of the last block in this call (0 in evaluation).
        """
        w = self.in_force(seams)
        seams = seams or PLAIN
        return seams.network(images, Run(self, w, seams, drop_path))

    def run_blocks(
        self, images: Tensor, w: Weights, seams: Seams, side: Tensor | None, drop_path: float, pooled_only: bool = False
    ) -> Tokens:
        """images (b, 3, H, W) -> the tokens after the last norm, x (b, l, d); pooled_only: at least those that are pooled."""
        raise NotImplementedError

    def pooled(self, tokens: Tokens, w: Weights) -> Tensor:
        """Normed tokens -> feature (b, d), with the weights in force."""
        return self.pool(tokens.x, tokens.cls, tokens.patches)

    def last_norm(self, x: Tensor, w: Weights) -> Tensor:
        """The norm after the last block, (b, l, d) -> (b, l, d), with the weights in force."""
        raise NotImplementedError

    def checkpointed(self, seams: Seams, tokens: Tokens, i: int, block: Any) -> Tokens:
        """Block i; with gradient checkpointing its activations are recomputed in the backward pass, only its input is kept."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return seams.block(tokens, i, block)
        from torch.utils.checkpoint import checkpoint

        return checkpoint(seams.block, tokens, i, block, use_reentrant=False)

    def pool(self, x: Tensor, cls: tuple[int, ...], patches: Tensor | None = None) -> Tensor:
        """The mean of the class tokens, or of the picture's where there are none: (b, l, d) -> (b, d)."""
        if len(cls) == 1:
            return x[:, cls[0]]
        if cls:
            return x[:, list(cls)].mean(1)
        return x.mean(1) if patches is None or len(patches) == x.shape[1] else x[:, patches].mean(1)

    def in_force(self, seams: Seams | None) -> Weights:
        """published name -> tensor, as this call uses it."""
        if seams is None:
            return dict(self.named_parameters())
        w = {name: p.detach() for name, p in self.named_parameters() if not name.startswith("head.")}
        if seams.acts("weights"):
            with exactly(next(iter(w.values())).device.type):  # a change is as exact as its weight
                changed = seams.weights(w)
            known = self.site_slots()
            for name in changed:
                if name not in w and name not in known:
                    raise unknown(f"tensor of {self.name} to replace named", name, [*w, *known])
            w.update(changed)
        return w

    def check_images(self, images: Tensor, any_size: bool = False) -> None:
        """One sentence for a tensor that is not (b, 3, H, W) of this backbone's size, or of any."""
        size = self.img_size
        if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3:
            shape = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
            channels_last = isinstance(images, Tensor) and images.dim() == 4 and images.shape[3] == 3
            hint = (
                "images are (b, H, W, 3): permute(0, 3, 1, 2)"
                if channels_last
                else "stack pictures: torch.stack([...])"
            )
            raise SvpError(f"images are {shape}, expected (b, 3, {size[0]}, {size[1]})", hint)
        if not any_size and tuple(images.shape[2:]) != size:
            h, w = images.shape[2:]
            hint = f'create_backbone("{self.name}", img_size=({h}, {w})), or resize the pictures to {size}'
            raise SvpError(f"images are {h} x {w} pixels, this {self.name} takes {size[0]} x {size[1]}", hint)
        if not images.is_floating_point():
            dtype = str(images.dtype).removeprefix("torch.")
            raise SvpError(
                f"images are {dtype}, expected floating point", "images.float() / 255, then minus mean, over std"
            )
        own = next(self.parameters())
        device = own.device
        if images.dtype != own.dtype and not torch.is_autocast_enabled(device.type):
            theirs, ours = (str(t.dtype).removeprefix("torch.") for t in (images, own))
            raise SvpError(f"images are {theirs}, {self.name} is {ours}", f"images.to(torch.{ours})")
        if images.device != device:
            raise SvpError(f"images are on {images.device}, {self.name} is on {device}", f"images.to('{device}')")
        opaque = images.requires_grad or torch.compiler.is_compiling() or transformed()
        if device.type == "cpu" and not opaque:  # a GPU would wait
            low, high = (float(end) for end in torch.aminmax(images.detach())) if images.numel() else (0.0, 0.0)
            if low >= 0 and high > UNPREPARED:
                raise SvpError(
                    f"images hold values from {low:g} to {high:g}, expected prepared ones (about -2 to 3)",
                    "images / 255, then minus mean, over std; model.predict(paths) prepares pictures itself",
                )

    # -- what methods may know -----------------------------------------------------------------------------------------

    def site(self) -> Site:
        """Sizes and views of the frozen tensors for a method to build its parameters from."""
        raise NotImplementedError

    def site_slots(self) -> frozenset[str]:
        """Bias slots that the published network left empty and a method may fill."""
        return frozenset()

    def fingerprint(self) -> str:
        """sha256 over the sorted (name, shape, float32 bytes): the identity of what an adapter was trained on.

        A position table that was resized on loading counts as the file has it, so that the picture size does not matter.
        """
        digest = hashlib.sha256()
        for name, p in sorted(self.state_dict().items()):
            stored = self.stored_positions if name == "pos_embed" else None
            digest.update(f"{name} {stored or tensor_digest(p)}".encode())
        return digest.hexdigest()

    # -- timm's protocol -----------------------------------------------------------------------------------------------

    def forward_features(self, images: Tensor) -> Tensor:
        """images (b, 3, H, W) -> normed tokens (b, l, d)."""
        self.check_images(images)
        return self.run_blocks(images, self.in_force(None), PLAIN, None, self.drop_path_now).x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normed tokens (b, l, d) -> logits (b, num_classes), or the feature (b, d) with pre_logits."""
        feature = self.pool(x, self.cls_positions)
        return feature if pre_logits else self.head(feature)

    @property
    def cls_positions(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def position_rows(self) -> tuple[int, ...]:
        """The rows of the position table that belong to no patch."""
        return self.cls_positions

    @property
    def drop_path_now(self) -> float:
        """The rate of timm's `drop_path_rate`, in training mode."""
        return getattr(self, "drop_path_rate", 0.0) if self.training else 0.0

    @property
    def head_hidden_size(self) -> int:
        return self.num_features

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head of random weights; 0 classes: none. The feature stays what it is: global_pool must agree."""
        pool = "token" if self.cls_positions else "avg"
        if global_pool not in (None, "", pool):
            raise SvpError(f"global_pool {global_pool!r} is not offered by {self.name}", f'use "{pool}"', kind="usage")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        if num_classes:
            nn.init.normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)
            self.head.to(next(self.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        p = self.preprocessing
        return {
            "architecture": self.name,
            "num_classes": self.num_classes,
            "input_size": (3, *self.img_size),
            "fixed_input_size": True,
            "interpolation": p.interpolation,
            "crop_pct": max(p.crop) / p.shorter_side,
            "mean": p.mean,
            "std": p.std,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }


class Run:
    """What seams.network gets as `run`: the network with the weights in force."""

    def __init__(self, net: Backbone, w: Weights, seams: Seams, drop_path: float):
        self.net, self.w, self.seams, self.drop_path = net, w, seams, drop_path

    def __call__(self, images: Tensor, side: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        self.net.check_images(images)
        seams = self.seams
        nobody_reads = not seams.acts("branch") and (seams.acts_before_blocks or not seams.acts("block"))
        tokens = self.net.run_blocks(images, self.w, seams, side, self.drop_path, pooled_only=nobody_reads)
        return self.net.pooled(tokens, self.w), tokens.side

    def norm(self, x: Tensor) -> Tensor:
        return self.net.last_norm(x, self.w)

    @torch.no_grad()
    def frozen(self, images: Tensor) -> Tensor:
        """The feature (b, d) of the network alone, whatever acts on it now."""
        return self.net.features(images, PLAIN)


_SEEDING = threading.RLock()  # start values are drawn from torch's one generator: one thread at a time


@contextlib.contextmanager
def drawn_from(seed: int) -> Iterator[None]:
    """What is drawn inside follows from the seed; afterwards the global generators, GPUs' included, are as they were."""
    gpus = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with _SEEDING, torch.random.fork_rng(devices=gpus):
        reseed(seed)
        yield


def reseed(seed: int) -> None:
    """torch.manual_seed of the generators that are there; on a GPU that nobody has used yet it would act later."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def tensor_digest(t: Tensor) -> str:
    """sha256 over shape and float32 bytes."""
    values = t.detach().to("cpu", torch.float32).contiguous()
    return hashlib.sha256(str(tuple(t.shape)).encode() + values.numpy().tobytes()).hexdigest()


def linear(module: nn.Module, w: Weights, name: str, x: Tensor, bias: bool = True) -> Tensor:
    """x (b, l, d_in) -> (b, l, d_out) with the weights in force under `name`.

    A hook on the module, or a foreign wrapper in its place, acts too: then the module itself is called (with its bias,
    whatever `bias` says). A weight or bias cannot be replaced by a method and wrapped by somebody else at once: SvpError.
    """
    if is_plain(module):
        # as one matrix: how torch multiplies three axes depends on what requires a gradient, and with it the last bit
        y = F.linear(x.flatten(0, -2), w[f"{name}.weight"], w.get(f"{name}.bias") if bias else None)
        return y.unflatten(0, x.shape[:-1])
    own = dict(module.named_parameters(recurse=False))
    for leaf in ("weight", "bias") if "weight" in own else ():  # a foreign wrapper without one keeps to itself
        ours, in_force = own.get(leaf), w.get(f"{name}.{leaf}")
        if in_force is not None and (ours is None or in_force.data_ptr() != ours.data_ptr()):
            raise SvpError(
                f"{name} carries a hook or wrapper and a method replaces its {leaf}",
                "remove the hook, or use another method",
            )
    return module(x)


def is_plain(module: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether calling the module is nothing but its own map: it is of this kind, and nobody has hooked or wrapped it."""
    hooks = (
        module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks,
    )  # fmt: skip
    return type(module) is kind and not any(hooks) and "forward" not in vars(module)


def beside(y: Tensor, x: Tensor, extra: dict[str, Callable[[Tensor], Tensor]], name: str) -> Tensor:
    """y plus the term that a method put next to the layer `name`, computed from the layer's input x."""
    term = extra.get(name)
    return y if term is None else y + term(x).to(y.dtype)


def drop_path(x: Tensor, rate: float) -> Tensor:
    """Stochastic depth: a picture's branch (b, …) is kept with probability 1 - rate and then divided by it."""
    if rate == 0.0:
        return x
    keep = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return x * (keep.to(x.dtype) / (1 - rate))


def by_block(w: Weights, prefix: str = "layers.") -> list[Weights]:
    """Weights by published name -> one dictionary a block, its names without `layers.{i}.`"""
    found: dict[int, Weights] = {}
    for name, tensor in w.items():
        if name.startswith(prefix):
            index, _, rest = name[len(prefix) :].partition(".")
            found.setdefault(int(index), {})[rest] = tensor
    return [found[i] for i in sorted(found)]


def pair(size: Any) -> tuple[int, int]:
    """64 -> (64, 64); (48, 32) stays."""
    try:
        h, w = size if isinstance(size, (tuple, list)) else (size, size)
        return operator.index(h), operator.index(w)
    except (TypeError, ValueError) as err:
        raise SvpError(
            f"img_size is {size!r}, expected pixels: an integer or (height, width)", "img_size=224", "usage"
        ) from err


def grid_of(img_size: tuple[int, int], patch: int, stride: int) -> tuple[int, int]:
    """(h, w) patches of a picture; raises SvpError where none fits or pixels would be left over."""
    for side in img_size:
        if side < patch or (side - patch) % stride:
            below = (side - patch) // stride * stride + patch if side >= patch else patch
            near = f"{below} or {below + stride}" if side >= patch else f"{patch}"
            raise SvpError(f"img_size is {side} pixels, patches of {patch} with stride {stride} do not fill it",
                           f"the nearest sizes that do: {near}", kind="usage")  # fmt: skip
    if max(img_size) > 4096:
        tokens = ((img_size[0] - patch) // stride + 1) * ((img_size[1] - patch) // stride + 1)
        raise SvpError(f"img_size is {max(img_size)} pixels, at most 4096 ({tokens:,} tokens a picture)",
                       f"a smaller size, for example --img-size {patch + 216 // stride * stride}", kind="usage")  # fmt: skip
    h, w = ((side - patch) // stride + 1 for side in img_size)
    return h, w
