"""Labels for people, as CSV and as JSON; names from standard input; pictures that cannot be read."""

import csv
import io
import json
import shutil
import sys

import pytest


@pytest.fixture
def pictures(photos, tmp_path):
    """Two good pictures and a broken one."""
    for name in ("blue", "red"):
        (tmp_path / f"{name}, or so.png").write_bytes((photos / "test" / name / "0.png").read_bytes())
    (tmp_path / "broken.png").write_bytes(b"hello")
    return tmp_path


def test_a_line_a_picture(svp, trained, photos):
    told = svp("predict", trained, photos / "test")
    lines = told.out.splitlines()
    assert told.code == 0 and len(lines) == 12 and told.err == ""
    assert lines[0].split()[0].endswith("%") and lines[0].endswith("0.png")


def test_the_k_best(svp, trained, photos):
    one = photos / "test" / "red" / "0.png"
    assert "(then " in svp("predict", trained, one, "--top", "2").out
    best = json.loads(svp("predict", trained / "model", one, "--json").out)[0]["top"]
    assert len(best) == 3 and abs(sum(row["probability"] for row in best) - 1) < 1e-5
    assert best == sorted(best, key=lambda row: -row["probability"])


def test_the_labels_are_those_of_the_run(svp, trained, photos):
    told = json.loads(svp("predict", trained, photos / "test", "--json").out)
    rows = list(csv.DictReader(io.StringIO((trained / "predictions.csv").read_text())))
    found = {p["path"]: (p["label"], pytest.approx(p["probability"], abs=2e-6)) for p in told}
    assert len(rows) == len(told) == 12
    assert {row["picture"]: (row["guess1"], float(row["probability1"])) for row in rows} == found


def test_csv_survives_commas(svp, trained, pictures):
    told = svp("predict", trained, pictures, "--csv", "--top", "2", "--on-bad-image", "skip")
    rows = list(csv.DictReader(io.StringIO(told.out)))
    assert [row["picture"] for row in rows] == [str(pictures / "blue, or so.png"), str(pictures / "red, or so.png")]
    assert set(rows[0]) == {"picture", "label", "probability", "label2", "probability2"}
    assert "1 of 3 pictures were left out:\n  " in told.err and "broken.png" in told.err


def test_a_broken_picture_stops_unless_it_may_be_skipped(svp, trained, pictures):
    told = svp("predict", trained, pictures)
    assert told.code == 1 and "broken.png is not a picture" in told.err and "--on-bad-image skip" in told.err
    told = svp("predict", trained, pictures, "--json", "--on-bad-image", "skip")
    found = json.loads(told.out)
    assert told.code == 0 and [p["label"] is None for p in found] == [False, True, False]
    assert "broken.png" in found[1]["error"]
    told = svp("predict", trained, pictures / "broken.png", "--on-bad-image", "skip")
    assert told.code == 1 and "none of the 1 pictures can be read" in told.err and told.out == ""


@pytest.mark.skipif(sys.platform == "win32", reason="links need a right of their own there")
def test_a_broken_link_stops_unless_it_may_be_skipped(svp, trained, photos, tmp_path):
    shutil.copy(photos / "test" / "red" / "0.png", tmp_path / "red.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    told = svp("predict", trained, tmp_path)
    assert told.code == 1 and "gone.png is a broken link" in told.err and told.out == ""
    told = svp("predict", trained, tmp_path, "--json", "--on-bad-image", "skip")
    found = {p["path"]: p for p in json.loads(told.out)}
    assert told.code == 0 and found[str(tmp_path / "red.png")]["label"]
    assert (
        "is a broken link" in found[str(tmp_path / "gone.png")]["error"] and "1 of 2 pictures were left out" in told.err
    )


def stdin(monkeypatch, content):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


def test_names_from_standard_input(svp, trained, pictures, monkeypatch):
    names = [pictures / "blue, or so.png", pictures / "red, or so.png"]
    stdin(monkeypatch, "\n".join(map(str, names)).encode() + b"\r\n\n")
    told = svp("predict", trained, "-", "--json")
    assert told.err == ""
    found = json.loads(told.out)
    assert [p["path"] for p in found] == list(map(str, names))
    stdin(monkeypatch, b"\n")
    told = svp("predict", trained, "-")
    assert told.code == 2 and "standard input names no pictures" in told.err


@pytest.mark.parametrize(
    "images,code,problem",
    [
        (["https://example.org/a.jpg"], 2, "URLs are not fetched"),
        (["nowhere.jpg"], 1, "nowhere.jpg does not exist"),
        (["a.jpg", "--csv", "--json"], 2, "--csv and --json exclude each other"),
        (["a.jpg", "--top", "0"], 2, "0 is not in the range"),
    ],
)
def test_what_is_refused(svp, trained, images, code, problem):
    told = svp("predict", trained, *images)
    assert told.code == code and problem in told.err and told.out == ""


def test_an_adapter_that_is_no_run(svp, trained, photos, tmp_path):
    shutil.copytree(trained / "model", tmp_path / "mine")
    assert svp("predict", tmp_path / "mine", photos / "test" / "red").code == 0
    (tmp_path / "mine" / "adapter_config.json").write_text('{"format": 1, "backbone": {"name": "vim_tiny"}}')
    told = svp("predict", tmp_path / "mine", photos / "test" / "red")
    assert told.code == 1 and "adapter_config.json: the field 'img_size' is missing or wrong" in told.err
