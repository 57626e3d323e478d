"""VP's frames and patches against the published prompters."""

import pytest
import torch

from support import assert_close, golden, starting
from svp.methods.vp import VP
from svp.seams import BlockSite, Site


@pytest.mark.parametrize("case", ["vp_padding", "vp_fixed_patch", "vp_random_patch"])
def test_published_prompters(case):
    config, t = golden("prompts", case)
    side, kind = config["image_size"], case.removeprefix("vp_")
    site = Site("any", (BlockSite(4),), {}, frozenset(), (side, side), 4, (6, 6), (0,), 4, (0,) * 3, (1,) * 3)
    method = VP(site, VP.Options(kind=kind, size=config["prompt_size"]), 2).double()
    params = starting(t, "param.")
    for name, p in params.items():
        getattr(method, name.removeprefix("pad_")).data.copy_(p)
    if kind == "random_patch":
        method.place = lambda: (config["row0"], config["col0"])
    x = t["x"].requires_grad_()
    y = method.network(x, lambda images: (images, None))
    assert_close(y, t["y"], "y")
    (y * t["w"]).sum().backward()
    assert_close(x.grad, t["grad_x"], "dx")
    for name in params:
        assert_close(getattr(method, name.removeprefix("pad_")).grad, t[f"grad.{name}"], f"d{name}")


def test_a_random_place_stays_inside_and_reaches_both_ends():
    site = Site("any", (BlockSite(4),), {}, frozenset(), (8, 8), 4, (2, 2), (0,), 4, (0,) * 3, (1,) * 3)
    method = VP(site, VP.Options(kind="random_patch", size=5), 2)
    found = {method.place() for _ in range(200)}
    assert {row for row, _ in found} == {0, 1, 2, 3} == {column for _, column in found}
    assert method.eval().place() == (1, 1)
    published = VP(site, VP.Options(kind="random_patch", size=5, patch_range="published"), 2)
    assert {published.place()[0] for _ in range(200)} == {0, 1, 2}
    assert torch.equal(
        method.prompt((0, 0)) != 0,
        torch.ones(1, 3, 8, 8).bool() & (torch.arange(8) < 5) & (torch.arange(8)[:, None] < 5),
    )
