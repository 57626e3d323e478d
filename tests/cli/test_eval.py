"""Scores of a run: those it reported, per class, as JSON and as a picture."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

import svp as package


def result(folder):
    return json.loads((folder / "result.json").read_text())


def test_an_untouched_run_scores_what_it_reported(svp, trained):
    told = svp("eval", trained, "--json")
    scores = json.loads(told.out)
    assert told.code == 0 and scores["accuracy"] == result(trained)["test_accuracy"]
    assert scores["mean_class_accuracy"] == result(trained)["test_mean_class_accuracy"]
    assert scores["ece"] == result(trained)["test_ece"] and scores["split"] == "test" and scores["pictures"] == 12
    assert [row["pictures"] for row in scores["classes"]] == [4, 4, 4] and sum(map(sum, scores["confusion"])) == 12
    assert scores["skipped"] == [] and "reported" not in told.err
    with Image.open(scores["picture"]) as picture:
        assert picture.format == "PNG" and picture.width > 300
    assert json.loads((trained / "eval" / "test.json").read_text())["accuracy"] == scores["accuracy"]
    assert sorted(p.name for p in (trained / "eval").iterdir()) == ["test-confusion.png", "test.json"]


def test_the_table_and_the_model_folder(svp, trained, tmp_path):
    told = svp("eval", trained / "model", "--out", tmp_path / "scores", "--split", "val")
    assert told.code == 0 and told.out.startswith("svp on vim_tiny, val of folder:")
    assert "9 pictures, 3 classes" in told.out and "calibration error" in told.out and "top-5" not in told.out
    assert [line.split()[0] for line in told.out.splitlines()[-3:]] == ["blue", "green", "red"]
    assert (tmp_path / "scores" / "val-confusion.png").is_file() and "val-confusion.png" in told.err


def test_another_source_is_matched_by_class_names(svp, trained, photos, tmp_path):
    shutil.copytree(photos / "test", tmp_path / "new" / "test")
    shutil.copytree(photos / "train", tmp_path / "new" / "train")
    shutil.copytree(photos / "val", tmp_path / "new" / "val")
    told = svp("eval", trained, f"folder:{tmp_path / 'new'}", "--json", "--out", tmp_path / "out")
    assert json.loads(told.out)["accuracy"] == result(trained)["test_accuracy"]
    (tmp_path / "new" / "train" / "red").rename(tmp_path / "new" / "train" / "pink")
    for split in ("val", "test"):
        (tmp_path / "new" / split / "red").rename(tmp_path / "new" / split / "pink")
    told = svp("eval", trained, f"folder:{tmp_path / 'new'}", "--out", tmp_path / "out")
    assert told.code == 1 and "pink" in told.err and told.out == ""


def test_without_a_test_split_validation_is_measured_and_said(svp, config, loose, tmp_path):
    words = ("train", f"folder:{loose}", "--config", config, "--method", "linear", "--epochs", "1")
    assert svp(*words, "--out", tmp_path / "run", "-q").code == 0
    told = svp("eval", tmp_path / "run", "--json")
    scores = json.loads(told.out)
    assert "has no test split: validation is measured" in told.err and scores["split"] == "val"
    assert scores["accuracy"] == result(tmp_path / "run")["val_accuracy"]
    told = svp("eval", tmp_path / "run", "--split", "test")
    assert told.code == 1 and "has no test split" in told.err


def test_new_pictures_are_all_measured(svp, trained, photos, tmp_path):
    """Nothing is cut off; one class, one picture, or test/ alone is enough."""
    shutil.copytree(photos / "train", tmp_path / "new")
    count = len(list((tmp_path / "new").rglob("*.png")))
    told = svp("eval", trained, tmp_path / "new", "--out", tmp_path / "out", "--json")
    scores = json.loads(told.out)
    assert sum(row["pictures"] for row in scores["classes"]) == count and scores["split"] == "test"
    assert "the epoch was selected" not in told.err
    shutil.rmtree(tmp_path / "new" / "red")
    for path in sorted((tmp_path / "new" / "blue").iterdir())[1:]:
        path.unlink()
    shutil.rmtree(tmp_path / "new" / "green")
    told = svp("eval", trained, tmp_path / "new", "--out", tmp_path / "out", "--json")
    assert [row["pictures"] for row in json.loads(told.out)["classes"]] == [1, 0, 0]
    (tmp_path / "alone").mkdir()
    shutil.copytree(photos / "test", tmp_path / "alone" / "test")
    told = svp("eval", trained, tmp_path / "alone", "--out", tmp_path / "out", "--json")
    assert json.loads(told.out)["accuracy"] == result(trained)["test_accuracy"]
    told = svp("eval", trained, tmp_path / "alone", "--out", tmp_path / "out", "--split", "test")
    assert told.code == 1 and "no train folder" in told.err  # as it would be trained on


def test_a_run_is_measured_as_it_read_its_pictures(svp, config, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "mine")
    (tmp_path / "mine" / "test" / "red" / "x.png").write_bytes(b"nothing")
    words = ("train", tmp_path / "mine", "--config", config, "--method", "linear", "--epochs", "1")
    assert svp(*words, "--on-bad-image", "skip", "--max-pixels", "1000", "--out", tmp_path / "run", "-q").code == 0
    told = svp("eval", tmp_path / "run", "--json")
    assert told.code == 0 and json.loads(told.out)["accuracy"] == result(tmp_path / "run")["test_accuracy"]
    told = svp("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again", "-q", "--json")
    assert told.code == 0 and json.loads(told.out)["runs"][0]["data"] == result(tmp_path / "run")["data"]
    told = svp("eval", tmp_path / "run", "--on-bad-image", "error")
    assert told.code == 1 and "x.png" in told.err


def test_the_run_s_own_pictures_that_moved_are_split_as_in_training(svp, config, loose, tmp_path):
    words = ("train", f"folder:{loose}", "--config", config, "--method", "linear", "--epochs", "1")
    assert svp(*words, "--out", tmp_path / "run", "-q").code == 0
    shutil.copytree(loose, tmp_path / "moved")
    told = svp("eval", tmp_path / "run", tmp_path / "moved", "--json", "--out", tmp_path / "out")
    scores = json.loads(told.out)
    assert scores["split"] == "val" and scores["accuracy"] == result(tmp_path / "run")["val_accuracy"]
    assert "the epoch was selected" in told.err


def test_an_adapter_without_a_run_measures_all_that_it_is_given(svp, trained, photos, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "adapter")
    shutil.copytree(photos / "train", tmp_path / "newer")
    told = svp("eval", tmp_path / "adapter", tmp_path / "newer", "--json")
    scores = json.loads(told.out)
    assert scores["pictures"] == 24 and "validation" not in told.err and "newer" in scores["scores"]


def test_draws_of_evaluation_are_those_of_the_run(svp, config, tmp_path):
    words = (
        "train",
        "--config",
        config,
        "--method",
        "vp",
        "-s",
        "kind=random_patch",
        "-s",
        "random_at_eval=true",
        "-s",
        "size=5",
    )
    assert svp(*words, "--seed", "3", "--lr", "5", "--epochs", "1", "--out", tmp_path / "run", "-q").code == 0
    told = svp("eval", tmp_path / "run", "--json")
    assert json.loads(told.out)["loss"] and "reported" not in told.err
    assert json.loads(told.out)["ece"] == result(tmp_path / "run")["test_ece"]


def test_the_validation_split_is_the_one_that_was_cut(svp, trained, config, loose, tmp_path):
    """With a seed of its own; a model that is asked about other pictures would know many of them from training."""
    data = package.open_data(f"folder:{loose}", seed=3)
    net = package.create_backbone("vim_tiny", depth=2, embed_dim=16, d_state=4, patch_size=8, img_size=16)
    model = package.adapt(net, "linear", num_classes=3, classes=data.classes)
    run = package.fit(model, data, recipe=package.Recipe(epochs=1), out=tmp_path / "run")
    told = svp("eval", tmp_path / "run", "--json")
    assert json.loads(told.out)["accuracy"] == run.val_accuracy and "not the same" not in told.err
    told = svp("train", "--config", tmp_path / "run" / "config.yaml", "--out", tmp_path / "again", "-q")
    assert result(tmp_path / "again")["data"] == run.result["data"] and "not those of" not in told.err


def test_scores_of_other_pictures_stand_beside_the_run_s(svp, trained, photos, tmp_path):
    assert svp("eval", trained, "-q").code == 0
    own = (trained / "eval" / "test.json").read_text()
    shutil.copytree(photos / "train", tmp_path / "newer pictures")
    told = svp("eval", trained, tmp_path / "newer pictures")
    assert told.code == 0 and str(trained / "eval" / "newer-pictures") in told.err
    assert (trained / "eval" / "test.json").read_text() == own
    shutil.rmtree(trained / "eval" / "newer-pictures")


def test_bad_pictures_of_a_measured_folder_are_left_out(svp, trained, photos, tmp_path):
    shutil.copytree(photos / "test", tmp_path / "new")
    for path in (tmp_path / "new" / "red").iterdir():
        path.write_bytes(b"nothing")
    told = svp("eval", trained, tmp_path / "new", "--on-bad-image", "skip", "--json", "--out", tmp_path / "out")
    assert told.code == 0 and [row["pictures"] for row in json.loads(told.out)["classes"]][2] == 0
    assert "pictures were left out" in told.err


def test_other_numbers_than_the_run_reported_are_said(svp, trained, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    changed = {**result(copy), "test_accuracy": 0.123}
    (copy / "result.json").write_text(json.dumps(changed))
    told = svp("eval", copy)
    assert told.code == 0 and "the run itself reported 12.3 %" in told.err


def test_python_does_the_same(trained, photos):
    net = package.create_backbone("vim_tiny", img_size=16, depth=2, embed_dim=16, d_state=4, patch_size=8)
    scores = package.evaluate(package.load(trained, net), f"folder:{photos}")
    assert scores.accuracy == result(trained)["test_accuracy"]


@pytest.mark.parametrize(
    "words,code,problem",
    [
        (["nowhere"], 1, "nowhere does not exist"),
        (["{empty}"], 1, "holds no trained run"),
        (["{half}"], 1, "holds a run that has not finished"),
        (["{runs}"], 2, "holds 1 runs: svp"),
        (["{run}", "folder:nowhere"], 1, "nowhere does not exist"),
        (["{run}", "--device", "cuda:99"], 1, "cuda:99 is not available"),
        (["{run}", "--weights", "nowhere.pth"], 1, "the checkpoint nowhere.pth does not exist"),
        (["{run}", "--kernel", "fast"], 2, "'fast' is not one of"),
        (["{run}", "--out", "{file}/x"], 1, "cannot be made"),
    ],
)
def test_what_cannot_be_measured(svp, trained, tmp_path, words, code, problem):
    half = tmp_path / "half"
    (tmp_path / "empty").mkdir()
    half.mkdir()
    (half / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "file").write_text("")
    places = {
        "empty": tmp_path / "empty",
        "half": half,
        "runs": trained.parent,
        "run": trained,
        "file": tmp_path / "file",
    }
    told = svp("eval", *(word.format(**places) for word in words))
    assert told.code == code and problem in told.err and "hint: " in told.err and told.out == ""


def test_pictures_that_have_come_since_training_are_said(svp, config, loose, tmp_path):
    """Whatever split they fall into, others have moved with them."""
    loose = Path(shutil.copytree(loose, tmp_path / "loose"))
    words = ("train", f"folder:{loose}", "--config", config, "--method", "linear", "--epochs", "1")
    assert svp(*words, "--out", tmp_path / "run", "-q").code == 0
    assert "have changed since training" not in svp("eval", tmp_path / "run").err
    first = next(loose.rglob("*.png"))
    shutil.copy(first, first.with_name("new.png"))
    for source in ([], [f"folder:{loose}"], [f"folder:{loose}/"]):
        told = svp("eval", tmp_path / "run", *source, "--out", tmp_path / "out")
        assert (
            told.code == 0
            and "have changed since training: some that are measured may have been trained on" in told.err
        )
    shutil.copytree(loose, tmp_path / "elsewhere")
    told = svp("eval", tmp_path / "run", f"folder:{tmp_path / 'elsewhere'}", "--out", tmp_path / "out")
    assert "have changed since training" not in told.err


def test_what_is_left_out_is_said_however_quiet(svp, config, photos, tmp_path):
    shutil.copytree(photos, tmp_path / "photos")
    for bad in sorted((tmp_path / "photos" / "test").rglob("*.png"))[:2]:
        bad.write_bytes(bad.read_bytes()[:60])
    words = ("train", f"folder:{tmp_path / 'photos'}", "--config", config, "--method", "linear", "--epochs", "1", "-q")
    told = svp(*words, "--on-bad-image", "skip", "--out", tmp_path / "run")
    assert told.code == 0 and "2 pictures were left out" in told.err
    told = svp("eval", tmp_path / "run", "-q")
    assert told.code == 0 and "2 pictures were left out" in told.err and str(bad) in told.err
    assert len(json.loads((tmp_path / "run" / "eval" / "test.json").read_text())["skipped"]) == 2
