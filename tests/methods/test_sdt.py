"""SDT: two phases, alone and in a run that is resumed."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from methods.nets import net_of, stirred
from svp.model import adapt, load
from svp.training.loop import fit
from svp.training.recipe import Recipe
from training.small import RECIPE, crash_at, splits
from training.small import model as small_model


def test_sdt_trains_in_two_phases(images):
    model = adapt(net_of("vim"), "sdt", num_classes=3, freeze_channels=0.8, freeze_states=0.5, warmup_epochs=3)
    method, count = model.method, model.num_trainable()

    first, second = method.phases(Recipe(epochs=7))
    assert first.recipe.epochs == 3 and second.recipe.epochs == 7
    before = method.mask(0).clone()
    stirred(model)
    first.begin(None)
    model.probe()
    optimizer = torch.optim.AdamW(model.trainable_parameters(), lr=1e-2)
    F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
    optimizer.step()
    second.begin(None)
    model.probe()
    assert model.num_trainable() == count and not torch.equal(method.mask(0), before)
    assert all(not p.any() for p in method.parameters())
    assert all(int(method.mask(j).sum()) == 6 * 2 and int(method.mask(j).any(0).sum()) == 6 for j in range(4))
    other = adapt(net_of("vim"), "sdt", num_classes=3, freeze_channels=0.8, freeze_states=0.5)
    stirred(model)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(other(images), model(images))


def test_what_stands_beside_it_starts_again_after_the_warm_up():
    methods = [("sdt", dict(freeze_channels=0.8, freeze_states=0.5)), ("lora", dict(rank=2))]
    model = adapt(net_of("vim"), methods, num_classes=3)
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    run = SimpleNamespace(model=model)
    first, second = model.method.phases(Recipe(epochs=2))
    first.begin(run)
    stirred(model)
    second.begin(run)
    assert all(torch.equal(p, start[name]) for name, p in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 9])  # in the warm-up, and after the choice
def test_sdt_in_a_whole_run_that_is_resumed(step, tmp_path):
    options = dict(freeze_channels=0.8, freeze_states=0.5, warmup_epochs=2)
    recipe = RECIPE.but(epochs=2, lr=3e-2)
    whole = small_model("sdt", **options)
    assert fit(whole, splits(), recipe=recipe).result["epochs"] == 4
    assert any(p.any() for p in whole.method.A) and not len(whole.method.warm)
    with crash_at(step):
        fit(small_model("sdt", **options), splits(), recipe=recipe, out=tmp_path, checkpoint_seconds=0)
    resumed = small_model("sdt", **options)
    fit(resumed, splits(), recipe=recipe, out=tmp_path, resume=True)
    for (name, a), (_, b) in zip(resumed.state_dict().items(), whole.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    again = load(tmp_path, backbone=whole.backbone)
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(again.eval()(x), whole.eval()(x))
