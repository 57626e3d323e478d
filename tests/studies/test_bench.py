"""What is measured: the floor's products by the formulas, rows that are checked, ratios, memory, sweep and data path."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from svp.data.sources import open_data
from svp.errors import SvpError
from svp.model import adapt
from svp.seams import Stack
from svp.studies.bench import measure, peers, products, sweep
from svp.studies.bench.check import check
from svp.studies.bench.feeding import beside, draw_pictures, feeding, probe
from svp.studies.bench.measure import compare, measured
from svp.studies.bench.memory import memory_bytes
from svp.studies.bench.peers import PEERS, Peer, Plugged, PromptedVit
from svp.studies.bench.run import bench, chosen
from svp.studies.bench.setting import CLASSES, Setting, Step

TINY = Setting(
    backbone="vim_tiny", img_size=16, batch_size=2, overrides=dict(depth=2, embed_dim=16, d_state=4, patch_size=8)
)


def sized(name, method="svp", **options):
    """An adapted network without memory behind its tensors."""
    return adapt(Setting(backbone=name).shape(), method, num_classes=CLASSES, probe=False, **options)


# -- the floor ---------------------------------------------------------------------------------------------------------


def test_products_of_vim_small_are_those_of_the_formulas():
    """Multiply-adds per token and block: in_proj, x_proj and dt_proj of both directions, out_proj; SVP's two generators."""
    model = sized("vim_small")
    counts = products.counts(model)
    assert counts["mac_per_token_and_block"] == 589_824 + 86_016 + 36_864 + 294_912 == 1_007_616
    assert counts["method_mac_per_token_and_block"] == 49_152 + 147_456
    assert counts["tokens"] == 197 and counts["exponentials"] == 197 * 24 * 24_576
    backbone, prompts = 1_007_616 * 197 * 24, (49_152 + 147_456) * 196 * 24  # the class token is not prompted
    assert products.mac(products.inference(model, 8)) == 8 * backbone
    below = (384 * 64 + 384 * 384) * 196  # the first prompters read what is frozen
    whole = 2 * backbone + 3 * prompts - below
    assert products.mac(products.training(model, 8)) == 8 * whole
    assert round(whole / 1e9, 1) == 12.3


def test_products_are_what_a_step_multiplies():
    """Counted by torch while a step runs, beside those of the head; SVP's generators also read the class token."""
    model = TINY.adapted(TINY.network())
    seams = Stack(
        [model.method, Plugged(model.backbone, lambda u, delta, A, B, C, D: u * delta * (B * C).sum(-1, True))]
    )
    images, labels = TINY.pictures()
    with FlopCounterMode(display=False) as counted:
        F.cross_entropy(model.head(model.backbone.features(images, seams)), labels).backward()
    found = {str(op): count for op, count in counted.get_flop_counts()["Global"].items()}
    multiplied = sum(found.get(op, 0) for op in ("aten.mm", "aten.addmm", "aten.bmm"))
    head = 3 * TINY.batch_size * 16 * CLASSES
    needed = products.training(model, TINY.batch_size)
    patches = model.backbone.grid[0] * model.backbone.grid[1]
    done = [p._replace(rows=p.rows // patches * (patches + 1)) if p.is_method else p for p in needed]
    assert multiplied == 2 * (products.mac(done) + head)


@pytest.mark.parametrize(
    "options", [{}, {"layers": (1,)}, {"cross": False}, {"inner": False, "cross_kind": "bottleneck"}], ids=str
)
def test_products_follow_the_options_of_svp(options):
    model = TINY.but(options=options).adapted(TINY.network())
    listed = products.training(model, 2)
    kinds = {
        kind: [p for p in listed if p.kind == kind] for kind in (products.FORWARD, products.INPUT, products.WEIGHT)
    }
    assert all(p.is_method for p in kinds[products.WEIGHT])
    if options.get("layers") == (1,):  # nothing below block 1 needs a gradient
        assert all(not p.name.startswith("layers.0") for p in kinds[products.INPUT])
    products.Floor(model, listed).run()


def test_other_methods_have_the_backbone_s_products_and_a_probe_no_gradient():
    lora, linear = sized("vim_tiny", "lora"), sized("vim_tiny", "linear")
    assert products.mac(products.training(lora, 1)) == 2 * products.mac(products.inference(lora, 1))
    assert products.training(linear, 1) == products.inference(linear, 1)


# -- the rows ----------------------------------------------------------------------------------------------------------


def available():
    return [row for row, peer in PEERS.items() if peer.by_default and peer.missing(TINY) is None]


def test_every_row_computes_what_the_reference_does():
    found = check(TINY, available())
    assert [c["row"] for c in found] == available() and all(c["error"] < 1e-5 for c in found)


@pytest.mark.parametrize("method", ["lora", "vpt", "e2vpt"])
def test_other_methods_can_be_measured(method):
    """Those with dropout draw masks of their own in each row."""
    assert check(TINY.but(method=method), ["ours", "checkpointed"])


@pytest.mark.parametrize("row, like", [("pscan", "ours"), ("vpt", "vpt"), ("vit", "vit")])
def test_a_wrong_row_is_refused(row, like, monkeypatch):
    build = PEERS[like].build

    def wrong(setting):
        step = build(setting)
        forward = step.forward
        step.forward = lambda images: forward(images) * 1.001
        return step

    monkeypatch.setitem(peers.PEERS, row, Peer("wrong", wrong))
    with pytest.raises(SvpError, match=rf"{row} is wrong: .* is off by \d\.\de-03 of its largest entry"):
        check(TINY, [row])


def test_a_gradient_that_is_missing_is_wrong(monkeypatch):
    build = PEERS["ours"].build

    def frozen(setting):
        step = build(setting)
        forward = step.forward
        step.forward = lambda images: forward(images).detach().requires_grad_()
        return step

    monkeypatch.setitem(peers.PEERS, "pscan", Peer("no gradient", frozen))
    with pytest.raises(SvpError, match=r"pscan is wrong: the gradient of .* is off by inf"):
        check(TINY, ["ours", "pscan"])


def test_the_vit_of_vim_small_is_deit_small():
    import timm

    sizes = peers.twin_sizes(Setting())
    with torch.device("meta"):
        net = PromptedVit(sizes).net
        deit = timm.create_model("deit_small_patch16_224", num_classes=0)
    ours = {name: p.shape for name, p in net.named_parameters()}
    assert ours == {name: p.shape for name, p in deit.named_parameters()}


def test_what_is_missing_is_left_out_with_a_reason_or_refused_by_name():
    rows, left_out = chosen(TINY, None)
    assert rows == available() and "compiled" not in rows
    assert {row["row"] for row in left_out} <= {"pscan", "mamba_ssm"} and all(row["reason"] for row in left_out)
    assert chosen(TINY, ["vit", "ours"])[0] == ["ours", "vit"]
    with pytest.raises(SvpError, match="ors"):
        chosen(TINY, ["ors"])
    if any(row["row"] == "mamba_ssm" for row in left_out):
        with pytest.raises(SvpError, match="the row mamba_ssm cannot be measured: "):
            chosen(TINY, ["mamba_ssm"])


def test_what_cannot_be_measured_is_said_before_anything_is(monkeypatch):
    monkeypatch.setattr("svp.studies.bench.run.check", None)
    with pytest.raises(SvpError, match="img_size"):
        bench(TINY, sizes=[(16, 2), (4, 2)], threads=[1])
    with pytest.raises(SvpError, match="nowhere"):
        bench(TINY, sizes=[(16, 2)], threads=[1], source="nowhere/")


def test_a_vit_is_no_backbone_to_measure():
    with pytest.raises(SvpError, match="is no Vision Mamba"):
        Setting(backbone="vit_nano").network()


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_a_run_has_every_row_and_ratio(monkeypatch):
    monkeypatch.setattr(measure, "MOST_ROUNDS", 1)
    found = measured(TINY, ["ours", "reference", "vit"], seconds=1, with_memory=False)
    assert [(line["row"], line["what"]) for line in found["rows"]] == [
        ("ours", "train"), ("vit", "train"), ("ours", "infer"), ("vit", "infer"), ("reference", "train"), ("reference", "infer"),
    ]  # fmt: skip
    assert found["counts_cpu_time"] and found["tokens"] == 5
    for line in found["rows"]:
        best = line["cpu_seconds"]["min"]
        assert line["images_per_second"] == pytest.approx(2 / best)
        assert line["over_floor"] == pytest.approx(best / found["floor"][line["what"]]["cpu_seconds"]["min"])
        assert line["memory_bytes"] is None
    assert found["floor"]["train"]["gmac_per_image"] > found["floor"]["infer"]["gmac_per_image"]
    json.dumps(found)


def test_ratios_are_of_the_same_kind_of_step():
    seconds = {"ours": 2.0, "vit": 1.0}
    table = [
        {"row": row, "what": what, "cpu_seconds": {"min": s * k}, "memory_bytes": int(100 * s)}
        for row, s in seconds.items() for what, k in (("train", 3), ("infer", 1))
    ]  # fmt: skip
    compare(table, {what: {"cpu_seconds": {"min": 0.5}} for what in ("train", "infer")}, Setting(batch_size=4))
    ours = {line["what"]: line for line in table if line["row"] == "ours"}
    assert ours["train"]["speed_over_vit"] == 0.5 and ours["train"]["over_floor"] == 12.0
    assert ours["infer"]["images_per_second"] == 2.0 and ours["infer"]["memory_over_vit"] == 2.0


def test_a_slow_row_that_runs_on_some_blocks_says_so(monkeypatch):
    monkeypatch.setattr(measure, "timed", lambda call, device: (1.0, 0.5))
    for line in measure.slow(TINY, "reference", 2, seconds=4.0):
        assert line["of_blocks"] == 1 and line["seconds"]["min"] == 2.0 and line["cpu_seconds"]["min"] == 1.0
    for line in measure.slow(TINY, "reference", 2, seconds=8.0):
        assert "of_blocks" not in line and line["seconds"]["min"] == 1.0


def test_a_plain_scan_that_would_fill_the_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(measure, "MOST_ROUNDS", 1)
    monkeypatch.setattr(measure, "memory_of_machine", lambda: 1000)
    found = measured(TINY, ["ours", "reference"], seconds=1, with_memory=False)
    assert {line["row"] for line in found["rows"]} == {"ours"}
    assert found["left_out"] == [
        {"row": "reference", "reason": "one block of a plain scan would fill this machine's memory"}
    ]


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own():
    big = TINY.but(img_size=64, batch_size=64)  # (64, 65, 32) float32: half a MiB a tensor
    found = memory_bytes(big, "ours")
    assert found["train"] > 4 << 20 and found["infer"] > 0
    assert memory_bytes(TINY.but(backbone="vim_none"), "ours") == {"infer": None, "train": None}


# -- sweep and pictures ------------------------------------------------------------------------------------------------


def test_a_sweep_keeps_the_tokens_of_a_batch(monkeypatch):
    monkeypatch.setattr(measure, "MOST_ROUNDS", 1)
    runs = sweep.sweep(TINY, (32, 16), seconds=1, with_memory=False)
    assert [(run["tokens"], run["batch_size"]) for run in runs] == [(5, 3), (17, 1)]
    points = sweep.series(runs, "ours", "train", "seconds_per_token")
    assert [t for t, _ in points] == [5, 17] and all(v > 0 for _, v in points)
    assert sweep.series(runs, "vit", "train", "memory_bytes_per_token") == []


def test_growth_is_the_largest_over_the_smallest():
    assert sweep.growth([(1, 2.0), (2, 3.0)]) == 1.5
    assert sweep.growth([]) is None


def run_of(tokens, per_token):
    lines = [
        {"row": row, "what": "train", "seconds_per_token": k * per_token, "memory_bytes_per_token": None}
        for k, row in enumerate(sweep.ROWS, 1)
    ]
    return {"tokens": tokens, "batch_size": 3200 // tokens, "img_size": 16, "rows": lines}


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_the_plot_is_written(kind, tmp_path):
    path = tmp_path / f"tokens.{kind}"
    sweep.draw([run_of(197, 1e-5), run_of(785, 2e-5)], str(path))
    assert path.read_bytes()[:4] in (b"\x89PNG", b"<?xm", b"%PDF")


@pytest.mark.parametrize(
    "path, words", [("tokens.txt", "ends with .png, .svg, .pdf"), ("none/tokens.png", "folder of --plot")]
)
def test_a_plot_that_cannot_be_written_is_refused_before_anything_is_measured(path, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SvpError, match=words):
        sweep.check_plot(path)


def test_pictures_are_drawn_decoded_and_mixed(monkeypatch, tmp_path):
    import svp.studies.bench.feeding as file

    monkeypatch.setattr(file, "PICTURES", 10)
    monkeypatch.setattr(file, "cpus", lambda: 1)
    found = feeding(TINY, None, step_rate=10.0)
    assert {(r["workers"], r["decoded"]) for r in found["rows"]} == {
        (w, d) for w in (0, 1) for d in ("each time", "once")
    }
    assert all(r["pictures_per_second"] > 0 and 0 <= r["step_waits"] < 1 for r in found["rows"])
    json.dumps(found)
    draw_pictures(tmp_path)
    assert feeding(TINY, open_data(tmp_path), None)["source"] == "given"


def test_a_step_waits_for_slow_pictures():
    assert beside(100.0, 100.0, 0)["step_waits"] == 0.5  # they take turns
    assert beside(100.0, 100.0, 2)["step_waits"] == 0.0
    assert beside(25.0, 100.0, 2)["step_waits"] == 0.75
    assert beside(25.0, None, 0)["step_waits"] is None


def test_kept_features_save_the_backbone():
    found = probe(TINY, seconds=1)
    assert found["kept"]["images_per_second"] > found["computed"]["images_per_second"]
    assert 1 < found["times_faster"] <= found["epochs"]


def test_a_step_leaves_gradients_of_what_trains_alone():
    step: Step = PEERS["checkpointed"].build(TINY)
    step.train()
    assert all(p.grad is not None for p in step.trained.values())
    assert all(p.grad is None for p in step.model.backbone.parameters())
    assert not step.model.backbone.grad_checkpointing
    assert step.infer().shape == (2, CLASSES)
