"""DAM-VP: pictures are clustered by their frozen features, and each cluster has a trained frame (arXiv 2303.08138)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from svp.errors import SvpError
from svp.methods.base import Method, Phase
from svp.methods.vp import framed, size_of
from svp.ops.precision import exactly
from svp.options import option

FRAME = ("up", "down", "left", "right")


class DAMVP(Method):
    """images + frame[c], c the cluster whose mean feature is nearest to that of the unprompted picture.

    Before training, features of at most `sample` augmented training pictures are clustered (average linkage) up to a
    distance: published for a few networks (21 ResNet-50, 31 ViT-B/16 of ImageNet-1k, 10 of 21k).
    head "new" trains a head beside the frames, without weight decay (the paper's SGD gives it a rate of its own, head_lr=0.1,
    which is none for AdamW); "features" trains none: class j reads one of the features that vary most over pictures of noise.
    `meta` starts every frame from a saved one.
    The released code's slip in the momentum's name (momentum 0) is the recipe's, and so is its schedule that overwrites
    the head's rate: without head_lr both share one. A picture costs a second frozen pass.
    Ours: the default distance, of 40 values between the 5th and 95th percentile of all distances the smallest that gives at
    most `max_clusters`; away from 224 pixels the frame is in proportion.
    Left out: testing the best frames with the latest head, as the released code does; here both are the best's. Meta-training
    over several data sets, which is a study over runs (`meta_step` is its step, `meta` reads what it made).
    Source: arXiv 2303.08138; repository shikiw/DAM-VP, task_adapting/adapter.py.
    """

    @dataclass(frozen=True)
    class Options:
        clusters: int | None = option(None, "how many; none: as the distance gives (filled in by training)", low=1)
        threshold: float | None = option(None, "distance up to which clusters are joined; none: by the rule", above=0.0)
        max_clusters: int = option(20, "what the rule allows", low=1)
        sample: int = option(1000, "training pictures that are clustered", low=2)
        size: int | None = option(None, "width of the frame in pixels; none: round(30 side / 224)", low=1)
        head: Literal["new", "features"] = option("new", "a trained head, or chosen features as logits")
        head_lr: float | None = option(None, "the head's own learning rate; none: as all", above=0.0)
        meta: str | None = option(None, "a .safetensors file with the frame to start from, of vp or damvp")

    PRESETS = {"head_free": dict(head="features"), "paper": dict(head_lr=0.1), "published": {}}
    paper = "arXiv 2303.08138 (CVPR 2023)"
    params_formula = "clusters 12 q (side - q), q = size"
    default_lr = 1e-1
    order = -1  # it knows pictures by what nobody has put on them

    @classmethod
    def unfit(cls, site, opt):
        q, side = size_of(site, opt), min(site.img_size)
        return f"size {q} leaves nothing of pictures of {side} pixels" if 2 * q >= side else None

    prototypes: Tensor

    def __init__(self, site, opt, num_classes):
        super().__init__(site, opt, num_classes)
        self.side, self.q, self.d = site.img_size, size_of(site, opt), site.num_features
        self.make_frames(opt.clusters or 1)

    def make_frames(self, count: int) -> None:
        (h, w), q = self.side, self.q
        self.up, self.down = (nn.Parameter(torch.randn(count, 3, q, w)) for _ in range(2))
        self.left, self.right = (nn.Parameter(torch.randn(count, 3, h - 2 * q, q)) for _ in range(2))
        self.register_buffer("prototypes", torch.zeros(count, self.d))

    def make_head(self, site, num_classes):
        return ChosenFeatures(site.num_features, num_classes) if self.opt.head == "features" else None

    def groups(self):
        return {"head.*": {"decay": 0.0, **({"lr": self.opt.head_lr} if self.opt.head_lr else {})}}

    def phases(self, recipe):
        return [Phase(recipe, self.begin)]

    def network(self, images, run):
        return run(self.prompted(images, run))[0]

    def prompted(self, images: Tensor, run) -> Tensor:
        frames = framed(*(getattr(self, part) for part in FRAME)).to(images.dtype)  # (m, 3, H, W)
        if len(frames) == 1:
            return images + frames
        with exactly(images.device.type):  # a cluster is no matter of rounding
            return images + frames[self.nearest(run.frozen(images))]

    def nearest(self, feature: Tensor) -> Tensor:
        """feature (b, d) -> (b,) the cluster of each picture."""
        return torch.cdist(feature.to(self.prototypes.dtype), self.prototypes).argmin(1)

    @torch.no_grad()
    def begin(self, run):
        """Clusters, their prototypes and frames; for logits without a head, which features vary most."""
        like = self.prototypes
        index = torch.randperm(run.size("train"), generator=run.generator)[: self.opt.sample]
        found = [run.features(images) for images, _, _ in run.batches("train", augment=True, index=index)]
        rows = torch.cat(found).cpu().double()
        labels, threshold = partition(rows, self.given)
        count = int(labels.max()) + 1
        self.make_frames(count)
        self.to(like.device, like.dtype)
        self.prototypes.copy_(torch.stack([rows[labels == c].mean(0) for c in range(count)]))
        self.opt = dataclasses.replace(self.opt, clusters=count, threshold=threshold)
        if self.opt.meta:
            for part, t in frame_in(self.opt.meta, {part: getattr(self, part).shape[1:] for part in FRAME}).items():
                getattr(self, part).copy_(t.expand(count, -1, -1, -1))
        if self.opt.head == "features":
            noise = torch.randn(512, 3, *self.side, generator=run.generator)
            features = torch.cat([run.features(part.to(like.device, like.dtype)) for part in noise.split(64)])
            run.model.head.choose(features.std(0, correction=0).argsort(descending=True))


class ChosenFeatures(nn.Module):
    """feature (b, d) -> logits (b, C): C of its entries, in ascending order of their place."""

    index: Tensor

    def __init__(self, d: int, num_classes: int):
        super().__init__()
        if num_classes > d:
            raise SvpError(f"{num_classes} classes cannot be read from {d} features", "head=new", kind="usage")
        self.register_buffer("index", torch.arange(num_classes))

    def choose(self, order: Tensor) -> None:
        """Keep the first of all places in this order."""
        self.index.copy_(order[: len(self.index)].sort().values)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.index]


def partition(rows: Tensor, opt) -> tuple[Tensor, float | None]:
    """Features (n, d) -> (n,) cluster of each, and the distance up to which clusters were joined (None: a given number)."""
    from sklearn.cluster import AgglomerativeClustering

    def fitted(clusters=None, threshold=None):
        return AgglomerativeClustering(clusters, linkage="average", distance_threshold=threshold).fit(rows.numpy())

    threshold = opt.threshold
    if opt.clusters:
        if opt.clusters > len(rows):
            raise SvpError(
                f"{len(rows)} training pictures do not make {opt.clusters} clusters", "fewer clusters", "usage"
            )
        return torch.from_numpy(fitted(clusters=opt.clusters).labels_).long(), threshold
    if threshold is None:
        joined = torch.from_numpy(fitted(threshold=0.0).distances_)  # where two clusters became one, ascending
        low, high = torch.pdist(rows).quantile(rows.new_tensor([0.05, 0.95])).tolist()
        grid = torch.linspace(low, high, 40, dtype=torch.float64).tolist()
        threshold = next((t for t in grid if 1 + int((joined >= t).sum()) <= opt.max_clusters), grid[-1])
    return torch.from_numpy(fitted(threshold=threshold).labels_).long(), threshold


def frame_in(path: str, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The frame that a file holds, of several clusters their mean; raises SvpError when there is none that fits."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = {name.rsplit(".", 1)[-1].removeprefix("pad_"): t for name, t in load_file(path).items()}
        found = {part: tensors[part].mean(0, keepdim=True) for part in shapes}
    except (OSError, SafetensorError, KeyError) as err:
        raise SvpError(f"{path} holds no frame: {err}", "adapter_model.safetensors of vp or damvp", "artefact") from err
    for part, t in found.items():
        if t.shape[1:] != shapes[part]:
            raise SvpError(
                f"{path}: {part} is {tuple(t.shape[1:])}, this frame needs {tuple(shapes[part])}", kind="artefact"
            )
    return found


def meta_step(frame: Tensor, fast: Tensor, size: float) -> Tensor:
    """Outer step of meta-training: a share `size` of the way from the frame to the mean of those trained on m clusters.

    frame (…);  fast (m, …), all clusters of all tasks
    """
    return frame - size * (frame - fast).mean(0)
