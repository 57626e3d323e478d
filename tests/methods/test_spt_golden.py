"""SPT's start values against the published prompt generator: its features and uniform draws are given."""

import pytest
import torch

from support import assert_close, cases, golden
from svp.methods.spt import SPT, k_means, pooled
from svp.seams import BlockSite, Site, Tokens

KINDS = {"random": "random", "shallow_random": "random", "mean_pooling": "mean", "max_pooling": "max"}


class Told:
    """A run whose pictures are the golden file's features, six channels on 4 x 4 places, two to a batch."""

    def __init__(self, t, depth, site):
        self.t, self.depth, self.generator = t, depth, torch.Generator().manual_seed(0)
        self.model = self.backbone = self
        self.site = lambda: site

    def size(self, split):
        return len(self.t["feat0"])

    def batches(self, split, augment, index):
        for self.now in index.split(2):
            yield self.t["feat0"][self.now].transpose(1, 2).unflatten(2, (4, 4)), None, self.now

    def block_inputs(self, images):
        streams = [self.t[f"feat{max(i, 1)}"][self.now] for i in range(self.depth)]
        places = torch.arange(1, 17)
        return [Tokens(x, None, (0,), places, places[:0], (4, 4)) for x in streams]


@pytest.mark.parametrize("case", cases("prompts", "spt_init_*"))
def test_published_start(case):
    config, t = golden("prompts", case)
    depth, d, count = config["depth"], config["D"], config["num_prompts"]
    weights = {"patch_embed.proj.weight": torch.eye(d, dtype=torch.float64)[:, :, None, None]}
    blocks = (BlockSite(d, kinds=("attn", "mlp"), heads=1),) * depth
    site = Site("told", blocks, weights, frozenset(), (4, 4), 1, (4, 4), (0,), d, (0,) * 3, (1,) * 3)
    opt = SPT.Options(num_tokens=count, deep=config["deep"], prototypes=KINDS[config["type"]], pick="random")
    assert SPT.unfit(site, opt) is None
    method, run = SPT(site, opt, 2).double(), Told(t, depth, site)
    method.pictures = lambda run: torch.arange(run.size("train"))
    method.rows = lambda size, count, i, run: t[f"noise{i}"].argsort()[:count]
    method.begin(run)
    assert_close(method.prompts, t["prompt"], "prompts", 1e-12)


def test_rows_are_where_they_were_drawn_from():
    """Our own draws: each prompt is a token of the features, the pool's size is that of the draw, centres are finite."""
    _, t = golden("prompts", "spt_init_mean_pooling_P6")
    blocks = (BlockSite(6, kinds=("attn", "mlp"), heads=1),) * 4
    weights = {"patch_embed.proj.weight": torch.eye(6, dtype=torch.float64)[:, :, None, None]}
    site = Site("told", blocks, weights, frozenset(), (4, 4), 1, (4, 4), (0,), 6, (0,) * 3, (1,) * 3)
    for kind, pool in (
        ("random", lambda x: x),
        ("mean", lambda x: pooled(x, 6, "mean")),
        ("max", lambda x: pooled(x, 6, "max")),
    ):
        method = SPT(site, SPT.Options(num_tokens=6, prototypes=kind, pick="random", replacement=True), 2).double()
        method.begin(Told(t, 4, site))
        for i in range(4):
            rows = pool(t[f"feat{i}"][:, -16:]).flatten(0, 1)
            assert torch.cdist(method.prompts[i].detach(), rows).min(1).values.max() < 1e-6
    for kind in ("mean", "kmeans"):
        method = SPT(site, SPT.Options(num_tokens=6, prototypes=kind, sample=1.0), 2).double()
        before = method.prompts.detach().clone()
        method.begin(Told(t, 4, site))
        assert method.prompts.isfinite().all() and not torch.equal(method.prompts, before)


def test_centres_of_clear_groups():
    rows = torch.tensor([[0.0, 0.0], [0.2, 0.0], [9.0, 9.0], [9.0, 9.2]])
    found = k_means(rows, 2, torch.Generator().manual_seed(0))
    assert sorted(found.sum(1).tolist()) == pytest.approx([0.1, 18.1])
    assert len(k_means(rows, 7, torch.Generator())) == 4
