"""fit: what it learns, what it promises (resume, workers, accumulation, cached features), what it says of trouble."""

import json
import os
import signal
from dataclasses import asdict

import numpy as np
import pytest
import torch

from svp.backbones import vim
from svp.data.protocols import protocol_named
from svp.data.splits import Splits
from svp.errors import SvpError
from svp.methods.base import Phase
from svp.model import adapt, load
from svp.training import loop, machine
from svp.training.evaluate import evaluate
from svp.training.loop import fit
from svp.training.recipe import Recipe
from svp.training.rehearsal import rehearse
from training.small import RECIPE, Crash, at_step, crash_at, model, splits


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setattr(machine, "git_revision", lambda: None)  # the tree may change while tests run
    monkeypatch.setattr(machine.gc, "collect", lambda: 0)  # half of the time of a run as small as these


def numbers(result):
    """Of a run, what must not differ between two equal ones."""
    return {k: v for k, v in result.items() if k != "timing"}


def log_of(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "timing"} for line in lines]


def tensors(net):
    return {k: v.clone() for k, v in net.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# -- a run -------------------------------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_it_promises(tmp_path):
    events, net, data = [], model("svp"), splits()
    frozen = {k: v.clone() for k, v in net.backbone.state_dict().items()}
    state = torch.get_rng_state()
    run = fit(
        net,
        data,
        recipe=RECIPE.but(epochs=8, augment="none", lr=3e-2),
        out=tmp_path / "run",
        report=events.append,
    )
    assert run.test_accuracy > 0.9 and run.folder == tmp_path / "run"
    assert sorted(os.listdir(run.folder)) == ["config.yaml", "metrics.jsonl", "model", "predictions.csv", "result.json"]
    assert json.loads((run.folder / "result.json").read_text()) == run.result
    assert [e["kind"] for e in events if e["kind"] != "batch"] == ["start", *["epoch"] * 8, "end"]
    assert torch.equal(state, torch.get_rng_state())
    assert_same(frozen, dict(net.backbone.state_dict()))
    assert not net.training and net.drop_path == 0
    again = load(run.folder, backbone=net.backbone)
    assert_same(tensors(net), tensors(again))
    assert again.classes == data.classes
    assert evaluate(again, data).accuracy == run.test_accuracy
    assert "protocol:" in (run.folder / "config.yaml").read_text()
    assert "svp" in run.table() and f"{100 * run.test_accuracy:.1f} %" in run.table()
    keys = "method options backbone weights fingerprint source protocol recipe seed classes epochs selected_epoch " \
           "val_accuracy test_accuracy test_mean_class_accuracy last_val_accuracy trainable backbone_parameters data " \
           "versions git kernel timing"  # fmt: skip
    assert set(keys.split()) <= set(run.result)


def test_a_finished_run_is_read_back(tmp_path):
    first = model("svp")
    run = fit(first, splits(), recipe=RECIPE, out=tmp_path)
    second = model("svp")
    again = fit(second, splits(), recipe=RECIPE, out=tmp_path)
    assert again.result == run.result
    assert_same(tensors(first), tensors(second))
    with pytest.raises(SvpError, match="other settings"):
        fit(model("svp"), splits(), recipe=RECIPE.but(lr=1e-3), out=tmp_path)


def test_seeds_decide():
    """That of the start values, and that of training."""

    def run(start, seed):
        net = model("svp", seed=start)
        return numbers(fit(net, splits(), recipe=RECIPE, seed=seed).result), tensors(net)

    result, state = run(0, 0)
    again, equal = run(0, 0)
    assert again == result
    assert_same(equal, state)
    for other in (run(1, 0), run(0, 1)):
        assert [name for name, value in other[1].items() if torch.equal(value, state[name])] == []


def test_the_rate_is_the_methods_own_unless_given():
    assert fit(model("full"), splits(), recipe=Recipe(epochs=1)).result["lr_used"] == 5e-4
    assert fit(model("lora", rank=4), splits(), recipe=Recipe(epochs=1)).result["lr_used"] == 3e-3
    several = model([("lora", {"rank": 4}), ("svp", {"hidden": 4})])
    assert loop.default_lr(several.method) == 3e-3


def test_the_best_epoch_is_kept_and_test_seen_once(monkeypatch):
    seen = []
    real = loop.Training.measure
    monkeypatch.setattr(loop.Training, "measure", lambda self, name: seen.append(name) or real(self, name))
    run = fit(model("svp"), splits(), recipe=RECIPE)
    assert seen == ["val"] * 3 + ["test"]
    assert 1 <= run.result["selected_epoch"] <= 3
    seen.clear()
    data = splits()
    run = fit(model("svp"), data.but(protocol=data.protocol.but(select="test_best"), val=data.test), recipe=RECIPE)
    assert seen == ["test"] * 4 and run.val_accuracy is None and run.result["selection"] == "test_best"


def saved(data, root):
    """The same pictures in class folders."""
    for part in data.parts.values():
        for i, label in enumerate(part.labels):
            path = root / data.classes[label] / f"{part.name(i).replace('/', '-')}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            part.picture(i).save(path)
    return str(root)


@pytest.mark.parametrize("from_source", [False, True])
def test_without_test_validation_is_reported_and_that_is_said_once(from_source, tmp_path):
    events, data = [], splits(test=0)
    data = saved(data, tmp_path / "pets") if from_source else data
    run = fit(model("linear"), data, recipe=RECIPE, out=tmp_path / "run", report=events.append)
    assert run.test_accuracy is None and run.val_accuracy is not None
    told = [e["text"] for e in events if e["kind"] == "note"]
    for notes in (told, run.result["data"]["notes"]):
        assert [note for note in notes if "test" in note] == ["there is no test split: validation is what is reported"]
    lines = (tmp_path / "run" / "predictions.csv").read_text().splitlines()
    assert len(lines) == 1 + run.result["data"]["sizes"]["val"]


# -- equal runs --------------------------------------------------------------------------------------------------------

BUSY = RECIPE.but(
    mixup=0.8, cutmix=1.0, drop_path=0.2, ema=0.5, clip_grad=1.0, crop_scale=(0.3, 1.0), accumulate=2, batch_size=6
)
KINDS = {
    "svp": ("svp", RECIPE), "svp, all on": ("svp", BUSY), "dropout": (("svp", {"dropout": 0.3, "hidden": 4}), RECIPE),
    "cached features": ("linear", RECIPE.but(augment="none")), "full": ("full", RECIPE.but(lr=1e-3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_resumes_to_the_same_numbers(kind, tmp_path):
    method, recipe = KINDS[kind]
    whole = model(method)
    want = fit(whole, splits(), recipe=recipe, out=tmp_path / "whole", checkpoint_seconds=0)
    steps = 3 * (4 if recipe is not BUSY else 3)
    for last in (1, steps // 2, steps // 2 + 1, steps):
        with crash_at(last):
            fit(model(method), splits(), recipe=recipe, out=tmp_path / "half", checkpoint_seconds=0, resume=last > 1)
    resumed = model(method)
    got = fit(resumed, splits(), recipe=recipe, out=tmp_path / "half", checkpoint_seconds=0, resume=True)
    assert numbers(got.result) == numbers(want.result)
    assert got.result["features_cached"] == (kind == "cached features")
    assert_same(tensors(resumed), tensors(whole))
    assert log_of(tmp_path / "half") == log_of(tmp_path / "whole")
    files = ("predictions.csv", "model/adapter_model.safetensors")
    assert all((tmp_path / "half" / f).read_bytes() == (tmp_path / "whole" / f).read_bytes() for f in files)


def test_a_crash_in_validation_loses_nothing(tmp_path, monkeypatch):
    want = fit(model("svp"), splits(), recipe=RECIPE)
    real = loop.Training.measure

    def measure(self, name):
        if self.progress.total_steps == 8:
            raise Crash
        return real(self, name)

    monkeypatch.setattr(loop.Training, "measure", measure)
    with pytest.raises(Crash):
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, checkpoint_seconds=0)
    monkeypatch.setattr(loop.Training, "measure", real)
    got = fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, resume=True)
    assert numbers(got.result) == numbers(want.result)
    assert [line["lr"] for line in log_of(tmp_path) if "val_loss" in line][1] < 1e-2


@pytest.mark.parametrize("method", ["svp", "linear"])
def test_workers_change_nothing(method):
    recipe = RECIPE.but(crop_scale=(0.3, 1.0))
    runs = []
    for workers in (0, 1, 2):
        net = model(method)
        runs.append((numbers(fit(net, splits(), recipe=recipe, workers=workers).result), tensors(net)))
    for result, state in runs[1:]:
        assert result == runs[0][0]
        assert_same(state, runs[0][1])


@pytest.mark.parametrize("whole, parts", [(16, [(8, 2), (2, 8)]), (15, [(5, 3)])])
def test_accumulation_takes_exact_means(whole, parts):
    """30 pictures: equal to one batch a step up to rounding; of 16, the last step has 14 in batches of 8 and 6."""
    states = []
    for batch, accumulate in ((whole, 1), *parts):
        net = model("svp")
        recipe = RECIPE.but(batch_size=batch, accumulate=accumulate, lr_per=0, optimizer="sgd", epochs=2, lr=0.1)
        fit(net, splits(), recipe=recipe)
        states.append(tensors(net))
    for other in states[1:]:
        for name, value in states[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-6, msg=name)


def test_cached_features_give_the_numbers_of_uncached(monkeypatch):
    recipe = RECIPE.but(augment="none", label_smoothing=0.0)
    cached, plain = model("linear"), model("linear")
    first = fit(cached, splits(), recipe=recipe)
    monkeypatch.setattr(loop.Training, "caches_features", lambda self: False)
    second = fit(plain, splits(), recipe=recipe)
    assert first.result["features_cached"] and not second.result["features_cached"]
    for name, value in tensors(plain).items():
        torch.testing.assert_close(tensors(cached)[name], value, rtol=1e-4, atol=1e-5)
    assert first.test_accuracy == second.test_accuracy


def test_chance_before_the_head_forbids_the_cache():
    for changes in (dict(augment="crop"), dict(drop_path=0.1), dict(mixup=0.8)):
        run = fit(model("linear"), splits(), recipe=RECIPE.but(epochs=1, **{"augment": "none", **changes}))
        assert not run.result["features_cached"]


def test_recomputed_blocks_give_the_same_numbers_and_the_backbone_its_setting_back(monkeypatch):
    ran, run = [], vim.Block.__call__
    monkeypatch.setattr(vim.Block, "__call__", lambda self, *args: ran.append(net.training) or run(self, *args))
    found = []
    for recompute in (False, True):
        ran.clear()
        net = model()
        result = fit(net, splits(), recipe=RECIPE.but(grad_checkpointing=recompute)).result
        assert ran.count(True) == 12 * 2 * (1 + recompute) and ran.count(False) == 4 * 2  # steps, looks at val and test
        assert not net.backbone.grad_checkpointing
        found.append((result["val_accuracy"], result["test_accuracy"], tensors(net)))
    assert found[0][:2] == found[1][:2]
    assert_same(found[0][2], found[1][2])


def test_blocks_are_dropped_in_steps_alone(monkeypatch):
    seen, net = set(), model("svp")
    monkeypatch.setattr(vim, "drop_path", lambda x, rate: seen.add((net.training, rate)) or x)
    fit(net, splits(), recipe=RECIPE.but(epochs=1, drop_path=0.2))
    assert seen == {(True, 0.2), (False, 0.0)}


def test_the_average_is_what_is_saved():
    recipe = RECIPE.but(epochs=1, augment="none")
    plain, still = model("svp"), model("svp")
    fit(plain, splits(), recipe=recipe)
    start = tensors(still)
    fit(still, splits(), recipe=recipe.but(ema=1.0))  # an average that never moves
    assert_same(tensors(still), start)
    assert not torch.equal(plain.head.weight, still.head.weight)


# -- methods that look at data -----------------------------------------------------------------------------------------


def test_phases_begin_with_a_look_at_the_data(tmp_path):
    """A method whose second phase grows a tensor of a size that the first phase's training decides."""
    seen = []

    def prepare(net):
        method = net.method

        def begin(run):
            images, _, index = next(run.batches("train"))
            assert images.shape == (30, 3, 16, 16) and index.tolist() == list(range(30))
            some = [
                (index.tolist(), len(images))
                for images, _, index in run.batches("train", index=torch.tensor([4, 2, 2]))
            ]
            assert some == [([4, 2, 2], 3)] and run.size() == 30 and run.size("val") == 12
            assert run.features(images).shape == (30, 16)
            assert [x.stream.shape for x in run.block_inputs(images[:2])] == [(2, 5, 16)] * 2
            draw = torch.rand(1, generator=run.generator).item()
            seen.append((draw, method.beta["0"].sum().item()))
            method.register_buffer("mask", torch.full((3,), method.beta["0"].sum().item()))

        method.phases = lambda recipe: [Phase(recipe.but(epochs=2)), Phase(recipe.but(epochs=2, lr=3e-3), begin)]
        return net

    whole = prepare(model("svp"))
    want = fit(whole, splits(), recipe=RECIPE, out=tmp_path / "whole")
    assert want.result["epochs"] == 4
    assert sum("val_loss" in line for line in log_of(tmp_path / "whole")) == 4
    with crash_at(11):
        fit(prepare(model("svp")), splits(), recipe=RECIPE, out=tmp_path / "half", checkpoint_seconds=0)
    resumed = prepare(model("svp"))
    got = fit(resumed, splits(), recipe=RECIPE, out=tmp_path / "half", resume=True)
    assert numbers(got.result) == numbers(want.result)
    assert_same(tensors(resumed), tensors(whole))
    assert len(set(seen)) == 1 and len(seen) == 3  # undisturbed, before the crash, on resuming


# -- trouble -----------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops(tmp_path, monkeypatch):
    real = loop.Criterion.forward

    def forward(self, logits, target):
        return real(self, logits, target) * (float("inf") if len(os.listdir(tmp_path)) and step["n"] > 5 else 1.0)

    step = {"n": 0}
    told = loop.Training.tell_step
    monkeypatch.setattr(loop.Criterion, "forward", forward)
    monkeypatch.setattr(loop.Training, "tell_step", lambda self, *a: step.update(n=step["n"] + 1) or told(self, *a))
    with pytest.raises(SvpError) as err:
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, checkpoint_seconds=0)
    assert "the loss is inf at step 7 (epoch 2, learning rate 0.00" in err.value.problem
    assert "last good checkpoint is kept" in err.value.problem
    assert "--lr 0.001" in err.value.hint and "clip_grad" in err.value.hint
    assert (tmp_path / "checkpoint" / "state.pt").is_file() and not (tmp_path / "result.json").exists()


def test_a_spoiled_state_is_not_saved(tmp_path):
    def spoil(run):
        run.model.head.weight.data.fill_(float("nan"))

    with pytest.raises(SvpError, match="loss is nan at step 6"), at_step(5, spoil):
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, checkpoint_seconds=0)
    state = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    assert state["progress"]["total_steps"] == 4 and state["model"]["head.weight"].isfinite().all()


@pytest.mark.parametrize("kind, raised", [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_signals_save_and_are_delivered_again(kind, raised, tmp_path):
    want = fit(model("svp"), splits(), recipe=RECIPE)
    handled = []

    def handler(number, frame):
        handled.append(number)
        raise raised(number)

    before = signal.signal(kind, handler)
    try:
        with pytest.raises(raised), at_step(6, lambda run: signal.raise_signal(kind)):
            fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, checkpoint_seconds=1e9)
        assert handled == [kind] and signal.getsignal(kind) is handler
    finally:
        signal.signal(kind, before)
    state = torch.load(tmp_path / "checkpoint" / "state.pt", weights_only=True)
    assert state["progress"]["total_steps"] == 6
    got = fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, resume=True)
    assert numbers(got.result) == numbers(want.result)


def test_memory_that_runs_out_is_explained(tmp_path, monkeypatch):
    def hungry(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TB")

    net = model("svp")
    monkeypatch.setattr(type(net), "forward", hungry)
    with pytest.raises(SvpError) as err:
        fit(net, splits(), recipe=RECIPE, out=tmp_path)
    assert "memory ran out on cpu with batch_size 8 of 16 x 16 pixels" in err.value.problem
    assert "--batch-size 4 --accumulate 2" in err.value.hint
    assert (tmp_path / "checkpoint" / "state.pt").is_file()


def test_memory_that_runs_out_in_an_evaluation_is_explained(tmp_path, monkeypatch):
    forward = type(model("svp")).forward

    def hungry(self, images):
        if not self.training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TB")
        return forward(self, images)

    monkeypatch.setattr(type(model("svp")), "forward", hungry)
    with pytest.raises(SvpError) as err:
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path)
    assert "with eval_batch_size 64 of 16 x 16 pixels" in err.value.problem
    assert "-r eval_batch_size=32 gives the same numbers" in err.value.hint and "--batch-size" not in err.value.hint


@pytest.mark.parametrize("batch_size,mixup,halved", [(8, 0.0, True), (7, 0.0, False), (8, 0.8, True), (6, 0.8, False)])
def test_a_half_batch_is_advised_where_it_trains_the_same(batch_size, mixup, halved, monkeypatch):
    def hungry(self, images):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 TB")

    monkeypatch.setattr(type(model("svp")), "forward", hungry)
    with pytest.raises(SvpError) as err:
        fit(model("svp"), splits(), recipe=RECIPE.but(batch_size=batch_size, mixup=mixup))
    same = "steps by as many pictures" if mixup else "trains the same"
    assert (same in err.value.hint) == halved and "grad_checkpointing" in err.value.hint


def test_tensors_that_the_last_step_has_ruined_are_no_result(tmp_path):
    """Only what is measured shows it: the loss is that before the step."""
    with pytest.raises(SvpError, match="the val loss is nan at step 1") as err:
        fit(model("svp"), splits(train=8), recipe=RECIPE.but(epochs=1, lr=1e38, warmup=0.0), out=tmp_path / "a")
    assert "--lr 1e+37" in err.value.hint and not (tmp_path / "a").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", ["svp", "linear"])
def test_a_network_of_another_precision_trains(dtype, method, tmp_path):
    net = model(method).backbone.to(dtype)
    adapted = adapt(net, method, num_classes=3, probe=False)
    run = fit(adapted, splits(), recipe=RECIPE.but(augment="none"), out=tmp_path)
    assert {p.dtype for p in adapted.parameters()} == {dtype} and run.result["features_cached"] == (method == "linear")
    again = evaluate(load(tmp_path, backbone=net), splits(), workers=0)
    assert again.accuracy == run.test_accuracy
    with pytest.raises(SvpError, match="images are float16, vim_tiny is"):
        adapted(torch.zeros(1, 3, 16, 16, dtype=torch.float16))


def test_a_second_source_is_prepared_as_a_first():
    first, other = splits(resize="exact"), splits()
    one, two = model("svp"), model("svp")
    fit(one, first, recipe=RECIPE.but(epochs=1))
    assert one.preprocessing.exact
    for adapted in (one, two):
        fit(adapted, other, recipe=RECIPE.but(epochs=1))
    assert one.preprocessing == two.preprocessing and not two.preprocessing.exact


def test_a_finished_run_is_read_where_another_precision_is_the_default(tmp_path, monkeypatch):
    first = fit(model("svp"), splits(), recipe=RECIPE.but(epochs=1), amp="bf16", out=tmp_path)
    assert fit(model("svp"), splits(), recipe=RECIPE.but(epochs=1), out=tmp_path).result == first.result
    with pytest.raises(SvpError, match="amp: bf16 -> off"):
        fit(model("svp"), splits(), recipe=RECIPE.but(epochs=1), amp="off", out=tmp_path)


def test_numbers_of_numpy_are_seeds(tmp_path):
    assert fit(model("svp"), splits(), recipe=RECIPE.but(epochs=1), seed=np.int64(3), out=tmp_path).result["seed"] == 3


@pytest.mark.parametrize("field", [dict(erase=0.5), dict(color_jitter=0.3), dict(auto_augment="rand-m9-mstd0.5-inc1")])
def test_augmentation_that_would_do_nothing_is_refused(field):
    with pytest.raises(SvpError, match="it would do nothing") as err:
        fit(model("svp"), splits(), recipe=RECIPE.but(**field))
    assert err.value.hint == "-r augment=timm"


@pytest.mark.parametrize("policy", ["foo", "randm9", "rand-m9-mstd0.5-inc1x"])
def test_a_policy_that_timm_does_not_know(policy):
    with pytest.raises(SvpError, match=f"auto_augment is '{policy}', which is no policy"):
        fit(model("svp"), splits(), recipe=RECIPE.but(augment="timm", auto_augment=policy))


def test_gradients_that_were_left_are_no_part_of_the_first_step():
    fresh, used = model("svp"), model("svp")
    for p in used.parameters():
        p.grad = torch.ones_like(p)
    for net in (fresh, used):
        fit(net, splits(), recipe=RECIPE.but(epochs=1))
    assert_same(tensors(fresh), tensors(used))


def test_names_that_are_no_text_are_written_and_read_back(tmp_path):
    """A folder of an old archive: bytes of Latin-1 for a class."""
    classes = ("caf\udce9", "green", "red")
    data = splits()
    data = Splits("old\udce9", data.train, data.val, data.test, classes)
    run = fit(model("svp"), data, recipe=RECIPE.but(epochs=1), out=tmp_path / "run")
    again = fit(model("svp"), data, recipe=RECIPE.but(epochs=1), out=tmp_path / "run")
    assert again.result == json.loads(json.dumps(run.result))
    assert load(tmp_path / "run").classes == classes
    assert "caf\\xe9" in (tmp_path / "run" / "model" / "README.md").read_text()


def test_test_that_stands_in_for_validation_is_scored_once():
    data, turned = splits(), model("svp")
    data = Splits(
        "generated", data.train, data.test, data.test, ("blue", "green", "red"), protocol=protocol_named("svp-released")
    )
    turned.classes = ("red", "green", "blue")
    assert fit(turned, data, recipe=RECIPE.but(epochs=1)).result["val_accuracy"] is None


def test_a_rehearsal_counts_all_phases():
    assert rehearse(model("sdt"), splits(), recipe=RECIPE.but(epochs=3))["steps"] == 4 * (1 + 3)


def test_an_error_of_ours_is_not_dressed_up(monkeypatch):
    def wrong(self, images):
        raise RuntimeError("sizes differ")

    net = model("svp")
    monkeypatch.setattr(type(net), "forward", wrong)
    with pytest.raises(RuntimeError, match="sizes differ"):
        fit(net, splits(), recipe=RECIPE)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(epochs=0), "epochs is 0"),
        (dict(lr=float("nan")), "finite"),
        (dict(batch_size=64, drop_last=True), "has 30 training pictures, a step takes 64"),
        (dict(mixup=1.0, batch_size=7), "batch_size 7 is odd"),
        (dict(amp="fp16"), "fp16 needs a GPU"),
    ],
)
def test_what_cannot_be_trained_is_said_before_anything_is_written(changes, said, tmp_path):
    recipe = Recipe(**{**asdict(RECIPE), **changes})  # as a program may build it: unchecked
    with pytest.raises(SvpError) as err:
        fit(model("svp"), splits(), recipe=recipe, out=tmp_path / "run", device="cpu")
    assert said in str(err.value) and not (tmp_path / "run").exists()


def test_other_doors(tmp_path):
    with pytest.raises(SvpError, match="3 classes, generated has 2"):
        fit(model("svp"), splits().but(classes=("blue", "green")), recipe=RECIPE)
    with pytest.raises(SvpError, match="no recipe 'fast'"):
        fit(model("svp"), splits(), recipe="fast")
    with pytest.raises(SvpError, match="no device 'quantum'") as err:
        fit(model("svp"), splits(), recipe=RECIPE, device="quantum")
    assert err.value.kind == "usage"
    if not torch.cuda.is_available():
        with pytest.raises(SvpError, match="cuda is not available") as err:
            fit(model("svp"), splits(), recipe=RECIPE, device="cuda")
        assert err.value.kind == "env"
    data = splits(test=0)
    with pytest.raises(SvpError, match="no test split"):
        fit(model("svp"), data.but(protocol=data.protocol.but(select="test_best")), recipe=RECIPE)


def test_a_large_batch_and_a_strange_rate_are_noted():
    notes = []
    fit(model("svp"), splits(), recipe=RECIPE.but(epochs=1, batch_size=64, lr=1e-9), report=notes.append)
    text = " ".join(e["text"] for e in notes if e["kind"] == "note")
    assert "batch_size 64 is larger than the 30" in text and "1e-09 is far from" in text


@pytest.mark.parametrize("amp, dtype", [("bf16", torch.bfloat16), ("off", torch.float32)])
def test_bf16_runs_on_the_cpu(amp, dtype):
    seen, net = set(), model("svp")
    net.head.register_forward_hook(lambda module, args, out: seen.add((net.training, out.dtype)))
    run = fit(net, splits(), recipe=RECIPE.but(epochs=1), amp=amp, device="cpu")
    assert run.result["amp"] == amp and seen == {(True, dtype), (False, dtype)}
    assert {p.dtype for p in net.parameters()} == {torch.float32}


def test_classes_in_another_order_train_the_same_model():
    data = splits()
    turned = splits().but(classes=("red", "green", "blue"))
    for part in (turned.train, turned.val, turned.test):
        part.labels = 2 - part.labels
    runs = []
    for given in (data, turned):
        net = model("svp")
        net.classes = data.classes
        runs.append((fit(net, given, recipe=RECIPE), tensors(net)))
    assert_same(runs[0][1], runs[1][1])
    assert runs[0][0].test_accuracy == runs[1][0].test_accuracy
    assert turned.train.labels[0] == 2  # the caller's stay


def test_processes_must_divide_a_batch(monkeypatch):
    monkeypatch.setattr(machine, "join_team", lambda device: machine.Team(0, 3))
    with pytest.raises(SvpError, match="batch_size 8 does not divide by 3 processes") as err:
        fit(model("svp"), splits(), recipe=RECIPE)
    assert err.value.hint == "--batch-size 9"


def crash_after_an_epoch(event):
    if event["kind"] == "epoch":
        raise Crash


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path):
    whole = model("svp")
    fit(whole, splits(), recipe=RECIPE)
    with crash_at(5):
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, checkpoint_seconds=0)
    path = tmp_path / "checkpoint" / "state.pt"
    torch.save({**torch.load(path, weights_only=True), "options": {"svp": {}}}, path)
    half = model("svp")
    fit(half, splits(), recipe=RECIPE, out=tmp_path, resume=True)
    assert_same(tensors(whole), tensors(half))


def test_a_damaged_checkpoint_is_named(tmp_path):
    with pytest.raises(Crash):
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, checkpoint_seconds=0, report=crash_after_an_epoch)
    state = tmp_path / "checkpoint" / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(SvpError, match=r"state\.pt cannot be read") as err:
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, resume=True)
    assert err.value.kind == "artefact" and "--overwrite" in err.value.hint
    fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, overwrite=True)


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    with pytest.raises(Crash):
        fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, report=crash_after_an_epoch)
    got = fit(model("svp"), splits(), recipe=RECIPE, out=tmp_path, resume=True)
    assert numbers(got.result) == numbers(fit(model("svp"), splits(), recipe=RECIPE).result)
    assert len(log_of(tmp_path)) == 3


def test_deterministic_algorithms_are_set_and_put_back():
    seen = []
    fit(
        model("svp"), splits(), recipe=RECIPE.but(epochs=1), deterministic=True,
        report=lambda e: seen.append(torch.are_deterministic_algorithms_enabled()),
    )  # fmt: skip
    assert all(seen) and not torch.are_deterministic_algorithms_enabled()


def test_a_rehearsal_changes_nothing():
    net, data = model("svp"), splits()
    before, preprocessing = tensors(net), net.preprocessing
    plan = rehearse(net, data, recipe=RECIPE.but(epochs=0, mixup=0.8))
    assert plan["steps_per_epoch"] == 4 and plan["steps"] == 0 and plan["loss"] > 0 and plan["recipe"]["lr"] == 1e-2
    assert_same(tensors(net), before)
    assert net.preprocessing is preprocessing and all(p.grad is None for p in net.parameters())


def test_published_augmentation_with_workers():
    recipe = RECIPE.but(
        epochs=1,
        augment="timm",
        auto_augment="rand-m9-mstd0.5-inc1",
        erase=0.5,
        color_jitter=0.3,
        mixup=0.8,
        cutmix=1.0,
    )
    states = []
    for workers in (0, 2):
        net = model("svp")
        fit(net, splits(), recipe=recipe, workers=workers)
        states.append(tensors(net))
    assert_same(*states)
