"""DAM-VP's clusters, frames, head-free logits and meta step against the published code."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from support import assert_close, golden, starting
from svp.errors import SvpError
from svp.methods.damvp import DAMVP, FRAME, ChosenFeatures, frame_in, meta_step, partition
from svp.seams import BlockSite, Site


def site_of(side, d):
    return Site("any", (BlockSite(d),), {}, frozenset(), (side, side), 4, (4, 4), (0,), d, (0,) * 3, (1,) * 3)


class Told:
    """A run whose pictures are the golden file's representations, seven to a batch; it remembers which were asked for."""

    def __init__(self, t):
        self.rows, self.generator, self.asked = t["rep"], torch.Generator().manual_seed(0), []

    def size(self, split):
        return len(self.rows)

    def batches(self, split, augment, index):
        assert split == "train" and augment
        for part in index.split(7):
            self.asked += part.tolist()
            yield self.rows[part], None, part

    def features(self, images):
        return images


def begun(t, **options):
    """The method after its look at the data, and the run that it looked at."""
    method, run = DAMVP(site_of(16, t["rep"].shape[1]), DAMVP.Options(**options), 2).double(), Told(t)
    method.begin(run)
    return method, run


def test_published_clusters():
    config, t = golden("prompts", "damvp_prompt")
    labels, threshold = partition(t["rep"], DAMVP.Options(threshold=config["distance_threshold"]))
    assert threshold == 18.0
    together = labels[:, None] == labels[None]
    assert torch.equal(together, t["labels"][:, None] == t["labels"][None])

    method, run = begun(t, threshold=config["distance_threshold"], size=config["prompt_size"])
    assert sorted(run.asked) == list(range(len(t["rep"])))  # each once
    assert method.opt.clusters == len(method.up) == len(t["prototypes"]) == 4 and method.opt.threshold == 18.0
    order = torch.cdist(t["prototypes"], method.prototypes).argmin(1)
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert_close(method.prototypes[order], t["prototypes"], "prototypes")
    assert torch.equal(method.nearest(t["rep"]), order[t["labels"]])
    few, run = begun(t, clusters=2, sample=5)
    assert len(set(run.asked)) == len(run.asked) == 5 and len(few.prototypes) == 2


def test_published_frames():
    config, t = golden("prompts", "damvp_prompt")
    method = DAMVP(site_of(16, 10), DAMVP.Options(clusters=4, size=config["prompt_size"]), 2).double()
    method.prototypes.copy_(t["prototypes"])
    for part in FRAME:
        getattr(method, part).data = torch.cat([t[f"param.{c}.pad_{part}"] for c in range(4)])
    x = t["x"].requires_grad_()
    y = method.prompted(x, SimpleNamespace(frozen=lambda images: images.detach().flatten(1) @ t["proj"]))
    assert_close(y, t["y"], "y")
    (y * t["w"]).sum().backward()
    assert_close(x.grad, t["grad_x"], "dx")
    for part in FRAME:
        for c in range(4):
            got = getattr(method, part).grad[c]
            want = t.get(f"grad.{c}.pad_{part}")  # none for the cluster without a picture
            assert_close(got, torch.zeros_like(got) if want is None else want[0], f"d{part}.{c}")


def test_published_logits_without_a_head():
    config, t = golden("prompts", "damvp_rep2logit")
    head = ChosenFeatures(t["rep"].shape[1], config["num_classes"])
    head.choose(t["active_order"])
    assert_close(head(t["rep"]), t["logits"], "logits")
    with pytest.raises(SvpError, match="11 classes cannot be read from 10 features"):
        ChosenFeatures(10, 11)


def test_published_meta_step():
    config, t = golden("prompts", "damvp_reptile")
    for part in FRAME:
        fast = [t[f"fast.{task}.{c}.pad_{part}"] for task, count in enumerate(config["clusters"]) for c in range(count)]
        assert_close(
            meta_step(t[f"before.pad_{part}"], torch.stack(fast), config["meta_step_size"]),
            t[f"after.pad_{part}"],
            part,
        )


def test_the_rule_allows_few_clusters_and_a_number_is_kept():
    rows = torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for most in (3, 20):
        labels, threshold = partition(rows, DAMVP.Options(max_clusters=most))
        assert 1 <= labels.max() + 1 <= most and threshold > 0
    assert partition(rows, DAMVP.Options(clusters=7))[0].max() == 6
    with pytest.raises(SvpError, match="60 training pictures do not make 61 clusters"):
        partition(rows, DAMVP.Options(clusters=61))


def test_a_saved_frame(tmp_path):
    _, t = golden("prompts", "damvp_reptile")
    shapes = {part: t[f"before.pad_{part}"].shape[1:] for part in FRAME}
    save_file(starting(t, "before."), tmp_path / "published.safetensors")
    save_file(
        {f"method.{part}": torch.cat([t[f"before.pad_{part}"]] * 2) for part in FRAME}, tmp_path / "ours.safetensors"
    )
    for name in ("published", "ours"):
        for part, found in frame_in(str(tmp_path / f"{name}.safetensors"), shapes).items():
            assert_close(found, t[f"before.pad_{part}"], part)
    with pytest.raises(SvpError, match="holds no frame"):
        frame_in(str(tmp_path / "missing.safetensors"), shapes)
    with pytest.raises(SvpError, match=r"up is \(3, 3, 16\), this frame needs \(3, 4, 16\)"):
        frame_in(str(tmp_path / "ours.safetensors"), {**shapes, "up": (3, 4, 16)})
