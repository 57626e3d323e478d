"""Training from words: the run folder, the table, the dry run, several methods and seeds, signals."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import svp as package
from svp.backbones.checkpoints import save_backbone


def test_a_run_and_its_table(svp, config, tmp_path):
    told = svp("train", "--config", config, "-s", "hidden=4", "--epochs", "1", "--out", tmp_path / "run")
    assert told.code == 0
    heads, _, line = told.out.splitlines()
    assert heads.split()[:4] == ["method", "trained", "test", "%"] and line.split()[0] == "svp"
    for words in ("trains 1 epoch on 24 train / 9 val / 12 test pictures", "epoch   1/1", "epoch 1 is kept", "numbers train",
                  "(95 %, Wilson)", f"next: svp predict {tmp_path / 'run'} PICTURE"):  # fmt: skip
        assert words in told.err
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.yaml", "metrics.jsonl", "model", "predictions.csv", "result.json"}


def test_a_finished_run_prints_its_table_again(svp, trained, config):
    words = ("train", "--config", config, "-s", "hidden=4", "--epochs", "2", "--out", trained)
    before = (trained / "result.json").read_bytes()
    told = svp(*words)
    assert told.code == 0 and "holds this run already" in told.err and told.out.splitlines()[2].startswith("svp ")
    assert (trained / "result.json").read_bytes() == before
    told = svp(*words, "--lr", "0.5")
    assert told.code == 2 and "other settings" in told.err and "recipe.lr" in told.err


def test_a_damaged_result_is_overwritten(svp, config, tmp_path):
    words = ("train", "--config", config, "--method", "linear", "--epochs", "1", "--out", tmp_path / "run", "-q")
    assert svp(*words).code == 0
    (tmp_path / "run" / "result.json").write_text("{")
    told = svp(*words)
    assert told.code == 1 and "--overwrite" in told.err
    assert svp(*words, "--overwrite").code == 0


def test_what_may_change_in_a_run_that_goes_on(svp, trained, config):
    """Device and workers; neither the compiler nor determinism, which move numbers."""
    words = ("train", "--config", config, "-s", "hidden=4", "--epochs", "2", "--out", trained)
    assert svp(*words, "--workers", "1").code == 0
    for flag in ("--deterministic", "--compile"):
        told = svp(*words, flag)
        assert told.code == 2 and f"machine.{flag[2:]}: False -> True" in told.err


def test_a_config_of_a_run_repeats_it(svp, trained, tmp_path):
    told = svp("train", "--config", trained / "config.yaml", "--out", tmp_path / "again", "-q")
    assert told.code == 0 and told.err == ""
    first, again = (json.loads((f / "result.json").read_text()) for f in (trained, tmp_path / "again"))
    for key in ("timing", "git"):
        first.pop(key), again.pop(key)
    assert first == again


def test_a_repetition_says_that_weights_or_pictures_have_changed(svp, loose, tmp_path):
    data = loose.parent / "changing"
    shutil.copytree(loose, data)
    net = package.create_backbone("vim_tiny", depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=16)
    save_backbone(net, tmp_path / "net.safetensors")
    wide = dict(depth=2, embed_dim=16, d_state=4, patch_size=8)
    net = package.create_backbone(
        "vim_tiny", weights=tmp_path / "net.safetensors", img_size=24, pos_resize="repo", **wide
    )
    run = package.fit(
        package.adapt(net, "linear", num_classes=3),
        f"folder:{data}",
        recipe=package.Recipe(epochs=1),
        out=tmp_path / "run",
    )
    repeat = ("train", "--config", tmp_path / "run" / "config.yaml", "--out")
    told = svp(*repeat, tmp_path / "same")
    assert told.code == 0 and "not those of" not in told.err
    again = json.loads((tmp_path / "same" / "result.json").read_text())
    assert (
        again["val_accuracy"] == run.val_accuracy
        and "pos_resize: repo" in (tmp_path / "same" / "config.yaml").read_text()
    )
    next((data / "red").iterdir()).unlink()
    with torch.no_grad():
        net.norm_f.weight.mul_(2)
    other = package.create_backbone("vim_tiny", img_size=16, seed=1, **wide)
    save_backbone(other, tmp_path / "net.safetensors")
    told = svp(*repeat, tmp_path / "other")
    assert told.code == 0
    assert f"the weights are not those of {tmp_path / 'run' / 'config.yaml'}: this is another run" in told.err
    assert "the pictures are not those of" in told.err
    told = svp(*repeat, tmp_path / "typed", "--weights", tmp_path / "net.safetensors")
    assert "weights are not" not in told.err and "the pictures are not those of" in told.err


def test_several_methods_and_seeds_stand_in_one_table(svp, config, tmp_path):
    words = ("--method", "linear,svp:published", "-s", "svp.hidden=4", "--seeds", "0,1", "--epochs", "1")
    told = svp("train", "--config", config, *words, "--out", tmp_path / "many", "--json")
    assert told.code == 0, told.err
    found = json.loads(told.out)
    assert [line["method"] for line in found["table"]] == ["linear", "svp:published"]
    assert all(len(line["accuracy"]) == 2 and line["half_width_95"] is not None for line in found["table"])
    assert [run["seed"] for run in found["runs"]] == [0, 1, 0, 1]
    folders = {path.name for path in (tmp_path / "many").iterdir()}
    assert folders == {"linear-s0", "linear-s1", "svp-published-s0", "svp-published-s1"}


def test_a_dry_run_keeps_nothing_and_shows_where_values_are_from(svp, config, tmp_path):
    out = tmp_path / "dry"
    told = svp("train", "--config", config, "--dry-run", "-s", "hidden=4", "--lr", "0.5", "--epochs", "0", "--out", out)
    assert told.code == 0 and not out.exists() and "Nothing was kept" in told.out
    rows = [line.split() for line in told.out.splitlines()]
    assert ["svp.hidden", "4", "given"] in rows and ["svp.prompt_cls", "false", "default"] in rows
    assert ["recipe.lr", "0.5", "command", "line"] in rows and ["out", str(out)] in rows
    told = svp("train", "--config", config, "--dry-run", "-s", "hidden=4", "--json")
    assert json.loads(told.out)["trainable"] > 0
    told = svp("train", "--config", config, "--dry-run", "--method", "linear,bitfit", "--json")
    assert [row["method"] for row in json.loads(told.out)] == ["linear", "bitfit"]


@pytest.mark.parametrize(
    "second,reason", [("lora -s lora.rnak=4", "did you mean rank"), ("prefix_tuning", "attention")]
)
def test_a_method_that_cannot_be_built_is_said_before_another_trains(svp, config, tmp_path, second, reason):
    told = svp(
        "train",
        "--config",
        config,
        "--method",
        f"linear,{second}".split()[0],
        *second.split()[1:],
        "--out",
        tmp_path / "r",
    )
    assert told.code == 2 and reason in told.err and not (tmp_path / "r").exists()


def test_what_was_selected_on_test_says_so(svp, config, tmp_path):
    words = ("--protocol", "svp-released", "--method", "linear", "--epochs", "1", "--out", tmp_path / "run")
    told = svp("train", "--config", config, *words)
    assert "test % (selected on test)" in told.out
    assert "of the epoch that is best on test" in (tmp_path / "run" / "model" / "README.md").read_text()
    told = svp("train", "--config", config, *words, "--json")
    assert json.loads(told.out)["table"][0]["selection"] == "test_best"


@pytest.mark.parametrize(
    "words,code,problem,hint",
    [
        ([], 2, "no SOURCE was given", "svp train digits"),
        (["digts"], 1, "named 'digts'", "did you mean digits?"),
        (["digits", "--method", "svq"], 2, "there is no method 'svq'", "did you mean svp?"),
        (["digits", "--method", "svp:papr"], 2, "no preset of svp named 'papr'", "did you mean paper?"),
        (["digits", "--method", "svp,svp"], 2, "named twice", "--method"),
        (
            ["digits", "--method", "svp,linear", "-s", "hidden=3"],
            2,
            "which of linear, svp is meant?",
            "-s svp.hidden=…",
        ),
        (["digits", "-s", "hidden"], 2, "is not OPTION=VALUE", "-s hidden=32"),
        (["digits", "-s", "lora.rank=2"], 2, "lora is not among the methods svp", "-s svp.rank=…"),
        (["digits", "-r", "epoch=3"], 2, "named 'epoch'", "did you mean epochs?"),
        (["digits", "-r", "epochs=3", "--epochs", "4"], 2, "disagree", "give one"),
        (["digits", "--recipe", "svp-dt"], 2, "there is no recipe 'svp-dt'", "svp-dtd"),
        (["digits", "--seed", "0", "--seeds", "1,2"], 2, "exclude each other", "--seeds"),
        (["digits", "--resume", "--overwrite"], 2, "exclude each other", "--resume continues"),
        (["digits", "--seed", "18446744073709551616"], 2, "is not in the range", "--help"),
        (["digits", "--epochs", "0"], 2, "trains nothing", "--dry-run"),
        (["digits", "--lr", "-1"], 2, "not a finite number above 0", "--help"),
        (["digits", "--seeds", "0,0"], 2, "a seed twice", "--help"),
        (["digits", "--config", "nowhere.yaml"], 2, "nowhere.yaml cannot be read", "path"),
    ],
)
def test_what_is_refused_before_anything_is_built(svp, words, code, problem, hint):
    told = svp("train", *words)
    first, second = told.err.splitlines()
    assert told.code == code and problem in first and hint in second and told.out == ""


@pytest.mark.parametrize(
    "text,line,problem",
    [
        ("source: digits\nsorce: x\n", 2, "there is no setting 'sorce'"),
        ("source: digits\nseed: 0\nseed: 1\n", 3, "the key 'seed' stands twice"),
        ("source: digits\nseed: one\n", 2, "seed is 'one', expected whole numbers"),
        ("source: digits\nrecipe: {epoch: 3}\n", 2, "named 'epoch'"),
        ("source: digits\nbackbone: [1]\n", 2, "backbone is"),
        ("source: digits\non: 1\n", 1, "there is no setting 'True'"),
        ("source: digits\nseeds: []\n", 2, "expected whole numbers from 0, at least one"),
        ("source: digits\nseed: 18446744073709551616\n", 2, "expected whole numbers"),
        ("source: digits\nmethods: [{name: 5, options: {}}]\n", 2, "methods is"),
        ("source: digits\nimg_size: [64]\n", 2, "img_size is '[64]', expected a whole number"),
        ("source: digits\nhead: big\n", 2, "head is 'big', expected linear or two_linear or method"),
        ("source: digits\nreading: fast\n", 2, "reading is 'fast', expected on_bad_image"),
        ("source: digits\nmachine: {workers: -1}\n", 2, "expected device and workers"),
        ("source: digits\ndata: 3\n", 2, "data is '3'"),
        (
            "source: digits\nbackbone: {name: vim_nano, weights: default, kernel: auto, img_size: [64, 64], overrides: {trust_pickle: true}}\n",
            2,
            "backbone is",
        ),
        (
            "source: digits\nbackbone: {name: vim_nano, weights: x, kernel: auto, img_size: 64, overrides: {}}\n",
            2,
            "backbone is",
        ),
        ("source: digits\nprotocol: 3\n", 2, "protocol is '3', expected a name"),
    ],
)
def test_a_wrong_config_names_file_and_line(svp, tmp_path, text, line, problem):
    (tmp_path / "my.yaml").write_text(text)
    told = svp("train", "--config", tmp_path / "my.yaml")
    assert (
        told.code == 2
        and problem in told.err
        and f"my.yaml, {'recipe from ' * ('recipe' in text)}line {line}" in told.err
    )


def test_another_backbone_takes_nothing_of_the_configs(svp, trained, photos):
    words = ("--config", trained / "config.yaml", "--backbone", "vit_nano", "--weights", "none", "--method", "linear")
    told = svp("train", f"folder:{photos}", *words, "--dry-run", "--json")
    found = json.loads(told.out)["backbone"]
    assert told.code == 0 and found["overrides"] == {} and found["img_size"] == [64, 64]


def test_a_config_may_say_off_as_yaml_does(svp, config, tmp_path):
    (tmp_path / "my.yaml").write_text(Path(config).read_text() + "amp: off\n")
    told = svp("train", "--config", tmp_path / "my.yaml", "--method", "linear", "--dry-run", "--json")
    assert json.loads(told.out)["amp"] == "off"


@pytest.mark.slow
@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_that_can_be_resumed(config, tmp_path, number, code):
    out = tmp_path / "run"
    words = ["train", "--config", str(config), "-s", "hidden=4", "--epochs", "200", "--out", str(out)]
    command = [sys.executable, "-m", "svp", *words]
    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    ) as running:
        for line in running.stderr:
            if line.startswith("epoch   2/200"):
                running.send_signal(number)
    assert running.returncode == code and (out / "checkpoint").is_dir() and not (out / "result.json").exists()


@pytest.mark.parametrize("method", ["ilm_vp", "vp:published"])
def test_a_config_of_a_method_with_its_own_head_repeats_it(svp, config, tmp_path, method):
    words = ("train", "--config", config, "--method", method, "--epochs", "1", "--out", tmp_path / "run", "-q")
    assert svp(*words).code == 0
    told = svp("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again", "-q")
    assert told.code == 0, told.err
    config_file = tmp_path / "run" / "config.yaml"
    config_file.write_text(
        "".join(line for line in config_file.read_text().splitlines(True) if "embeddings" not in line)
    )
    assert svp(*words).code == 0  # written before there was such an option, whose default it had
