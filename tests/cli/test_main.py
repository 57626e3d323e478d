"""The group of verbs: quick help, hints for what was meant, exit codes."""

import os
import resource
import subprocess
import sys

import pytest

from svp.cli.main import VERBS, run
from svp.errors import SvpError

HEAVY = ("torch", "torchvision", "timm", "sklearn", "matplotlib", "pyarrow")
QUICK = [["--help"], ["--version"], ["list", "methods"], ["list", "backbones", "vim*"], ["list", "methods", "svq"],
         ["trian"], ["train"], ["train", "digits", "--metod", "svp"], ["train", "digits", "--lr", "nan"],
         ["train", "digits", "epochs=10"], ["train", "digits", "--method", "svq"], ["train", "digits", "-r", "epoch=1"],
         ["train", "digits", "--epochs", "0"], ["eval"], ["predict", "run"], ["predict", "run", "a.jpg", "--csv", "--json"],
         ["convert", "a.pth"], *([verb, "--help"] for verb in VERBS)]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_examples(svp, verb):
    page = svp(verb, "--help")
    assert page.code == 0 and page.err == ""
    assert "\n  RUN\n" not in page.out and "\n  IN\n" not in page.out  # only options have rows
    assert page.out.startswith("Usage: svp " + verb) and f"\n  svp {verb}" in page.out.split("Examples:")[1]


def test_the_group_lists_all_verbs(svp):
    page = svp("--help")
    assert all(f"  {verb} " in page.out for verb in VERBS)


def test_help_and_usage_errors_load_nothing_heavy():
    code = f"import sys\nfrom svp.cli.main import run\nfor words in {QUICK}:\n    run(words)\n    found = set({HEAVY}) & set(sys.modules)\n    assert not found, (words, found)"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]


@pytest.mark.parametrize(
    "words", [["--help"], ["train", "--help"], ["list", "methods"], ["train", "digits", "--metod", "x"]]
)
def test_they_take_less_than_half_a_second(words):
    def seconds():
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "svp", *words], capture_output=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime  # of the CPU: others may be busy

    assert min(seconds() for _ in range(3)) < 0.5


@pytest.mark.parametrize(
    "typed,meant", [("trian", "svp train"), ("test", "svp eval"), ("models", "svp list backbones")]
)
def test_a_mistyped_verb_gets_a_hint(svp, typed, meant):
    told = svp(typed)
    assert told.code == 2 and told.err == f"error: there is no verb '{typed}'\nhint: {meant}\n"


@pytest.mark.parametrize(
    "words,problem,hint",
    [
        (["train", "digits", "--metod", "svp"], "there is no option --metod of svp train", "did you mean --method"),
        (["train", "digits", "epochs=10"], "epochs=10 is not understood", "--epochs 10, or -r epochs=10"),
        (["eval", "run", "digits", "split=val"], "split=val is not understood", "use --split val"),
        (["eval", "run", "digits", "epochs=10"], "epochs=10 is not understood", "svp eval --help"),
        (["train", "digits", "--lr", "inf"], "inf is not a finite number", "svp train --help"),
        (["predict", "run"], "missing argument 'IMAGE|FOLDER...'", "svp predict --help"),
    ],
)
def test_wrong_usage_is_two_lines_and_exit_code_2(svp, words, problem, hint):
    told = svp(*words)
    assert told.code == 2 and told.out == ""
    first, second = told.err.splitlines()
    assert first.startswith("error: ") and problem in first and second.startswith("hint: ") and hint in second


def raising(monkeypatch, err):
    def broken():
        raise err

    monkeypatch.setitem(__import__("svp.cli.list", fromlist=["KINDS"]).KINDS, "methods", (broken, broken))


@pytest.mark.parametrize(
    "err,code,words",
    [
        (SvpError("no", "do", "data"), 1, "error: no\nhint: do\n"),
        (SvpError("no", "do", "usage"), 2, "error: no\nhint: do\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (RuntimeError("operator torchvision::nms does not exist"), 1, "do not belong together"),
        (ModuleNotFoundError("No module named 'timm'", name="timm"), 1, "the package timm is not installed"),
    ],
)
def test_trouble_becomes_an_exit_code(svp, monkeypatch, err, code, words):
    raising(monkeypatch, err)
    told = svp("list", "methods")
    assert told.code == code and words in told.err and told.out == ""


def test_a_mistake_of_ours_is_one_line_with_the_traceback_in_a_file(svp, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    raising(monkeypatch, ZeroDivisionError("1 / 0"))
    told = svp("list", "methods")
    assert told.code == 1 and "ZeroDivisionError in svp itself: 1 / 0" in told.err
    (report,) = tmp_path.iterdir()
    assert str(report) in told.err and "Traceback" in report.read_text()


def test_debug_shows_the_traceback(monkeypatch, capsys):
    raising(monkeypatch, SvpError("no"))
    assert run(["--debug", "list", "methods"], is_debug=True) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_reader_that_went_away_is_no_error():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "svp", "list", "recipes"], stdout=writing, stderr=subprocess.PIPE, text=True
    )
    os.close(writing)
    assert done.returncode == 0 and "Error" not in done.stderr and "Traceback" not in done.stderr


def test_without_words_the_page_is_shown(svp):
    told = svp()
    assert told.code == 2 and told.out == "" and told.err.startswith("Usage: ") and len(told.err.splitlines()) > 10
