"""The table over all methods: order of work, the rate chosen on validation, nothing left out without a word."""

import argparse
import importlib
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

import svp

ROOT = Path(__file__).parents[1]


def module(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture(scope="module")
def table():
    return module(ROOT / "benchmarks" / "methods_table.py")


def facts(cell, val=0.2, test=0.1, **more):
    return {
        **cell._asdict(), "label": cell.method, "options": {cell.method: {}}, "preset": None, "lr_used": 1e-2 * cell.factor, "val_accuracy": val,
        "test_accuracy": test, "trainable": {"total": 1234}, "epochs": 10, "recipe": {"lr": 1e-2 * cell.factor, "epochs": 10},
        "data": {"hash": "h", "sizes": {"train": 10, "val": 4, "test": 5}, "notes": []}, "classes": 4, "seed": 0,
        "img_size": [32, 32], "source": "parquet:flowers", "versions": {"torch": "2"}, "git": "abc", "images_per_cpu_second": 9.5,
        "timing": {"device": "cpu", "peak_memory_bytes": 2**20, "seconds": 5.0, "threads": 1}, **more,
    }  # fmt: skip


def keep(table, out, *rows):
    for cell, values in rows:
        cell.place(out).parent.mkdir(parents=True, exist_ok=True)
        table.write(table.facts_file(cell.place(out)), values)


def test_every_method_at_its_own_rate_comes_first(table):
    work, methods = table.cells(), svp.list_methods()
    assert len(work) == len(set(work)) == 2 * 3 * len(methods)
    assert [c.factor for c in work[: 2 * len(methods)]] == [1.0] * 2 * len(methods)
    assert {c.method for c in work[: len(methods)]} == set(methods) and work[0].method == "linear"


def test_only_names_backbones_and_methods(table):
    work = table.cells()
    assert {c[:2] for c in table.narrowed(work, "vit_nano,svp,vpt")} == {("vit_nano", "svp"), ("vit_nano", "vpt")}
    assert {c.backbone for c in table.narrowed(work, "svp")} == {"vit_nano", "vim_nano"}
    with pytest.raises(SystemExit, match="svq"):
        table.narrowed(work, "svq")


def test_what_is_done_refused_or_failed_is_not_run_again(table, tmp_path):
    a, b, c = (table.Cell("vit_nano", name, 1.0) for name in ("svp", "sdt", "vpt"))
    keep(table, tmp_path, (a, facts(a)), (b, {"refused": "no scan"}), (c, {"failed": "nan"}))
    work = [cell._replace(factor=f) for cell in (a, b, c) for f in table.FACTORS]
    left = list(table.todo(work, argparse.Namespace(out=tmp_path, retry=False)))
    assert left == [cell for cell in work if cell.method != "sdt" and cell.factor != 1]
    assert c in list(table.todo(work, argparse.Namespace(out=tmp_path, retry=True)))


def test_the_rate_is_chosen_on_validation_and_everything_is_said(table, tmp_path, monkeypatch):
    own, high, low = (table.Cell("vit_nano", "svp", f) for f in table.FACTORS)
    refused, broken = table.Cell("vit_nano", "sdt", 1.0), table.Cell("vit_nano", "vpt", 1.0)
    keep(table, tmp_path, (own, facts(own, 0.3, 0.2)), (high, facts(high, 0.2, 0.9)), (low, facts(low, 0.3, 0.4)),
         (refused, {"refused": "no scan"}), (broken, {**broken._asdict(), "failed": "the loss is nan\nhint: less"}))  # fmt: skip
    own.place(tmp_path).mkdir()
    epochs = ("{}", *(json.dumps({"epoch": k, "timing": {"seconds": s}}) for k, s in ((1, 5.0), (2, 10.0), (3, 900.0))))
    (own.place(tmp_path) / "metrics.jsonl").write_text("\n".join(epochs) + "\n")
    work = [c for c in table.cells(("vit_nano",)) if c.method in ("svp", "sdt", "vpt", "linear")]
    found = table.report(work, tmp_path)
    best = next(row for row in found["rows"] if row["method"] == "svp")
    assert (best["test_accuracy"], best["factor"], best["rates_done"]) == (0.2, 1.0, 3)  # the first of equals
    assert len(found["runs"]) == 4 and found["shared"]["recipe"] == {"epochs": 10}
    tables = module(ROOT / "docs" / "tables.py")
    (tmp_path / "methods.json").write_text(json.dumps(found))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.table("methods-vit_nano")
    assert "| `svp` | 20.0 | 30.0 | 1,234 | 10 | 1 | 5 | 10 | 0.01 | 3 of 3 |" in text
    assert "3 of 9 runs are done" in text and "chance is 25.0 %" in text
    assert "Refused: `sdt` (no scan)." in text and "Failed: `vpt` at x1 (the loss is nan)." in text
    assert "Not run yet: `linear`." in text and tables.table("methods-vim_nano") == ""


@pytest.mark.slow
def test_a_run_in_a_process_of_its_own(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where the new process finds it, too
    table = importlib.import_module("methods_table")
    opt = argparse.Namespace(source="digits", out=tmp_path, img_size=16, epochs=1, seed=0, threads=1, retry=False)
    work = [table.Cell("vit_nano", name, 1.0) for name in ("linear", "sdt")]
    table.run_all(work, opt)
    done, refused = (cell.facts(tmp_path) for cell in work)
    assert done["val_accuracy"] > 0.1 and done["images_per_cpu_second"] > 0 and done["recipe"]["lr"] == 1e-2
    assert "scans of Vim" in refused["refused"]
    assert capsys.readouterr().out.count("\n") == 2
    assert table.report(work, tmp_path)["rows"][0]["rates_done"] == 1


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is not there on Windows")
def test_a_killed_table_leaves_no_run_behind(tmp_path):
    """A run that lived on would hold its folder, and the next start would find it in use."""
    words = ["digits", str(tmp_path), "--only", "vit_nano,svp", "--epochs", "1000"]
    parent = subprocess.Popen([sys.executable, str(ROOT / "benchmarks" / "methods_table.py"), *words])
    wait_for((tmp_path / "vit_nano" / "svp" / "x1").exists)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    if not children.exists():
        parent.kill()
        pytest.skip("this system does not list the children of a process")
    pids = [int(pid) for pid in children.read_text().split()]
    assert any(alive(pid) for pid in pids)
    parent.kill()
    parent.wait()
    wait_for(lambda: not any(alive(pid) for pid in pids))


def alive(pid):
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, seconds=120):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.2)
