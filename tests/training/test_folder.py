"""The run folder: one owner, nothing half written, nothing foreign touched."""

import errno
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from svp.errors import SvpError
from svp.training.folder import RunFolder, to_json

SETTINGS = {
    "svp_version": "0.1",
    "source": "digits",
    "recipe": {"lr": 1e-3, "betas": (0.9, 0.999)},
    "machine": {"workers": 0},
}


def opened(path, settings=SETTINGS, **how):
    with RunFolder(path).opened(settings, **how) as folder:
        return folder


def test_a_new_folder_gets_its_settings(tmp_path):
    folder = opened(tmp_path / "a" / "b")
    assert folder.settings()["recipe"] == {"lr": 1e-3, "betas": [0.9, 0.999]}
    assert folder.result() is None and sorted(os.listdir(folder.path)) == ["config.yaml"]


def test_a_half_run_wants_resume_or_overwrite(tmp_path):
    opened(tmp_path)
    with pytest.raises(SvpError, match="unfinished run") as err:
        opened(tmp_path)
    assert err.value.kind == "usage" and "--resume" in err.value.hint
    opened(tmp_path, resume=True)
    opened(tmp_path, overwrite=True)


def test_other_settings_are_refused_but_those_of_the_machine(tmp_path):
    opened(tmp_path)
    opened(tmp_path, {**SETTINGS, "machine": {"workers": 4}}, resume=True)
    with pytest.raises(SvpError, match=r"recipe\.lr: 0\.001 -> 0\.01") as err:
        opened(tmp_path, {**SETTINGS, "recipe": {"lr": 1e-2, "betas": (0.9, 0.999)}}, resume=True)
    assert err.value.kind == "usage" and "--out" in err.value.hint
    opened(tmp_path, {**SETTINGS, "seed": 3}, overwrite=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(SvpError, match="holds no run to resume") as err:
        opened(tmp_path / "new", resume=True)
    assert err.value.kind == "artefact"


def test_foreign_content_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(SvpError, match=r"thesis\.tex"):
            opened(tmp_path, **how)
    folder = tmp_path / "run"
    opened(folder)
    (folder / "notes.txt").write_text("mine")
    opened(folder, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["model", "eval", "checkpoint", "result.json"])
def test_things_of_the_user_may_have_our_names(tmp_path, name):
    """A project folder with a model/ of its own: without config.yaml nothing in it is a run's."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "mine.txt").write_text("years of work")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(SvpError, match=f"holds other things \\({name}\\) and is no run folder"):
            opened(tmp_path, **how)
    assert (tmp_path / name / "mine.txt").read_text() == "years of work"


@pytest.mark.parametrize("text", ["learning_rate: 3\nmodel: mine\n", "a: [\n", "", "source: x\nrecipe: {}\n"])
def test_a_config_of_another_program_makes_no_run_folder(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    for name in ("model", "checkpoint", "eval"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("years of work")
    for how in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(SvpError, match=r"holds other things \(config.yaml\) and is no run folder"):
            opened(tmp_path, **how)
    assert len(list(tmp_path.rglob("mine.txt"))) == 3 and (tmp_path / "config.yaml").read_text() == text


def test_what_a_kill_leaves_of_a_clearing_is_a_run_folder(tmp_path, monkeypatch):
    with RunFolder(tmp_path).opened(SETTINGS) as folder:
        folder.write("result.json", "{}")
        (tmp_path / "model").mkdir()
    monkeypatch.setattr(shutil, "rmtree", lambda path: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        folder.clear()
    monkeypatch.undo()
    assert not (tmp_path / "result.json").exists() and (tmp_path / "config.yaml").exists()
    opened(tmp_path, overwrite=True)
    assert not (tmp_path / "model").exists()


def test_a_start_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(SvpError, match="no such"), RunFolder(tmp_path / "run").opened(SETTINGS) as folder:
        folder.log({"epoch": 1})
        raise SvpError("no such method")
    assert not (tmp_path / "run").exists()


def test_a_file_in_the_way_and_a_path_too_long(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SvpError, match="cannot be made") as err:
        opened(tmp_path / "file")
    assert err.value.kind == "env"
    with pytest.raises(SvpError, match="File name too long"):
        opened(tmp_path / ("x" * 300))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(SvpError, match="Permission denied"):
        opened(tmp_path / "run")


def test_a_second_process_is_refused(tmp_path):
    code = (
        "import sys\nfrom svp.errors import SvpError\nfrom svp.training.folder import RunFolder\n"
        "try:\n    with RunFolder(sys.argv[1]).opened({}): pass\nexcept SvpError as err: print(err.problem)\n"
    )
    with RunFolder(tmp_path).opened(SETTINGS):
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=env)
        assert "is in use by another process" in done.stdout and str(os.getpid()) in done.stdout
        with pytest.raises(SvpError, match="in use"):  # nor a second run of this process
            opened(tmp_path)
    opened(tmp_path, resume=True)


@pytest.mark.parametrize("code, words", [(errno.ENOSPC, "No space left"), (errno.EROFS, "Read-only")])
def test_a_full_disk_leaves_the_former_file(tmp_path, monkeypatch, code, words):
    with RunFolder(tmp_path).opened(SETTINGS) as folder:
        folder.save_snapshot(b"first", b"best", 1)

        def full(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(SvpError, match=words) as err:
            folder.save_snapshot(b"second", b"better", 2)
        monkeypatch.undo()
        assert err.value.kind == "env"
        assert folder.snapshot_file().read_bytes() == b"first" and folder.best_file(1).read_bytes() == b"best"
        assert not list(tmp_path.rglob("*.new"))
        folder.save_snapshot(b"second", b"better", 2)
        assert sorted(os.listdir(tmp_path / "checkpoint")) == ["best-2.pt", "state.pt"]


def test_a_result_is_the_last_word(tmp_path):
    with RunFolder(tmp_path).opened(SETTINGS) as folder:
        folder.save_snapshot(b"state", None, 0)
        folder.finish({"test_accuracy": 0.5})
        assert not (tmp_path / "checkpoint").exists()
    with RunFolder(tmp_path).opened(SETTINGS) as folder:
        assert folder.result() == {"test_accuracy": 0.5}
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(SvpError, match="is damaged"):
        opened(tmp_path)


def test_the_log_forgets_what_a_snapshot_did_not_see(tmp_path):
    with RunFolder(tmp_path).opened(SETTINGS) as folder:
        size = folder.log({"epoch": 1})
        folder.log({"epoch": 2})
        folder.cut_log(size)
        folder.log({"epoch": 2, "loss": float("nan"), "more": [1.0, float("inf")]})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"epoch": 1}, {"epoch": 2, "loss": None, "more": [1.0, None], "not_finite": ["loss", "more.1"]}]


def test_json_is_plain():
    assert to_json({"a": (1, 2), "b": {"c": float("-inf")}}) == '{"a": [1, 2], "b": {"c": null}, "not_finite": ["b.c"]}'


def test_predictions_are_sorted_guesses(tmp_path):
    with RunFolder(tmp_path).opened(SETTINGS) as folder:
        chances = np.array([[0.1, 0.7, 0.2], [0.5, 0.25, 0.25]])
        folder.write_predictions(["a,b.png", "c.png"], np.array([1, 2]), chances, ("x", "y", "z"))
        lines = (tmp_path / "predictions.csv").read_text().splitlines()
    assert lines == [
        "picture,label,guess1,probability1,guess2,probability2,guess3,probability3",
        '"a,b.png",y,y,0.700000,z,0.200000,x,0.100000',
        "c.png,z,x,0.500000,y,0.250000,z,0.250000",
    ]
