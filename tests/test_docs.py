"""Every code block of the documents runs; every link leads somewhere; every table is up to date.

A block of `python` is executed, one of `sh` is run where each line is an `svp` command, both in a folder with a few small
pictures. A block that cannot run is marked: <!-- not run: reason --> on the line above. The blocks of a document run in order
in one process: this file with the document's path as its argument.
"""

import contextlib
import importlib.util
import json
import re
import shlex
import subprocess
import sys
import traceback
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
BLOCK = re.compile(r"(?:<!-- not run: (?P<reason>[^\n]+?) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
RUN = ("python", "sh")
SHOWN = ("text", "toml", "yaml", "json")  # trees, output, files: nothing to run
FASTER = {"train": ["--epochs", "1"]}  # appended: what is typed last wins
KEEP = ("--config", "--dry-run")


def blocks(path):
    """(line, kind, text, reason not to run or None) of every block of a document."""
    text = path.read_text(encoding="utf-8")
    return [(text.count("\n", 0, m.start()) + 1, m["kind"], m["text"], m["reason"]) for m in BLOCK.finditer(text)]


def by_name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_every_block_runs_or_says_why_not(path):
    text = path.read_text(encoding="utf-8")
    assert text.count("\n```") == 2 * len(blocks(path)), "a fence does not begin or end its line"
    for line, kind, content, reason in blocks(path):
        assert kind in RUN + SHOWN, f"{path}:{line}: a block is one of {', '.join(RUN + SHOWN)}, not {kind!r}"
        if kind == "sh" and reason is None:
            strange = [words for words in content.splitlines() if not words.startswith("svp ")]
            assert not strange, f"{path}:{line}: only svp commands are run: {strange}; mark it <!-- not run: reason -->"


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if any(b[1] in RUN and b[3] is None for b in blocks(p))], ids=by_name
)
def test_the_blocks_of(path, tmp_path):
    pictures(tmp_path)
    ran = subprocess.run(
        [sys.executable, __file__, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]


@pytest.mark.slow
def test_the_first_command_of_the_readme(tmp_path):
    """As written but for the install, the epochs and the size."""
    line = next(text for _, kind, text, _ in blocks(ROOT / "README.md") if kind == "sh")
    command = line.strip().split(" && ")[-1]
    assert command.startswith(".venv/bin/svp train digits ")
    words = [*shlex.split(command)[1:], "--epochs", "1", "--img-size", "32", "--out", str(tmp_path / "run")]
    ran = subprocess.run(
        [sys.executable, __file__, "--", *words],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    for method in ("svp", "linear"):
        assert re.search(rf"^{method} +[\d,]+ +\d+\.\d ", ran.stdout, re.M), ran.stdout
    assert "raw pixels, logistic regression" in ran.stdout


def test_continuous_integration_runs_what_the_readme_says():
    said = next(text for _, _, text, _ in blocks(ROOT / "README.md") if "pytest" in text).strip()
    make, install, run = said.split(" && ")
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert make == "python3 -m venv .venv" and '-m venv "$venv"' in script
    for command in (install, run):
        assert command.replace(".venv/bin/", '"$venv/bin/').replace(" ", '" ', 1) in script


@pytest.mark.parametrize("path", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(path):
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if not target.startswith(("http://", "https://")):
            assert (path.parent / target).exists(), f"{path} links to {target}"


def test_every_user_page_is_linked_from_the_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in DOCUMENTS[1:]:
        assert f"({path.relative_to(ROOT)})" in text, f"README.md does not link {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.parent.name == "docs"], ids=by_name)
def test_user_pages_answer_a_question_with_something_to_paste(path):
    first, _, rest = path.read_text(encoding="utf-8").partition("\n")
    assert first.startswith("# ") and first.endswith("?")
    assert rest.lstrip().startswith(("```", "<!-- not run"))


def test_the_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    for path in tables.documents():
        text = path.read_text(encoding="utf-8")
        assert tables.filled(text) == text, f"{path}: python docs/tables.py"


def test_a_results_file_becomes_a_table():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    line = dict(method="svp", split="test", seeds=[0, 1], mean=0.97, half_width_95=0.011, val_accuracy=[0.96, 0.98],
                trained=12345, images_per_second=100.0, memory_bytes=2**20, seconds=9.6)  # fmt: skip
    raw = {**line, "method": "raw", "half_width_95": None, "val_accuracy": [], "trained": None, "seconds": None}
    run = dict(backbone="vim_nano", img_size=[64, 64], source="folder:/home/ann/flowers", epochs=3, seed=0,
               data=dict(sizes=dict(train=1000, val=2, test=3)), versions=dict(svp="0.1.0", torch="2.14"),
               timing=dict(device="cpu", threads=2))  # fmt: skip
    text = tables.results({"table": [line, raw], "runs": [run, {**run, "seed": 1}]})
    assert text.splitlines()[:4] == [
        "| method | trained numbers | test accuracy, % | validation, % |", "| --- | ---: | ---: | ---: |",
        "| svp | 12,345 | 97.0 ± 1.1 | 97.0 |", "| raw | - | 97.0 | - |",
    ]  # fmt: skip
    assert "`folder:flowers/` (1,000 / 2 / 3 pictures), 3 epochs, seeds 0, 1 " in text and "/home" not in text


def test_a_bench_file_is_kept_whole_but_for_digits_and_becomes_tables(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    best = {"min": 1.23456789, "median": 2.0, "all": [1.23456789, 2.0]}
    line = dict(what="train", seconds=best, cpu_seconds=best, images_per_second=6.5, over_floor=2.0, speed_over_vit=0.5,
                memory_bytes=3 * 2**20, memory_over_vit=None)  # fmt: skip
    floor = dict(seconds=best, cpu_seconds=best, scan_seconds=0.5)
    run = dict(img_size=224, batch_size=8, threads=2, counts_cpu_time=False, floor={"train": floor, "infer": floor},
               rows=[{**line, "row": "ours"}, {**line, "row": "reference", "of_blocks": 2, "memory_bytes": None}])  # fmt: skip
    written = tmp_path / "bench.json"
    written.write_text(json.dumps({"checks": [], "runs": [run], "sweep": [], "data": [], "probe": []}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    tables.keep("bench", str(written))
    assert json.loads(written.read_text())["runs"][0]["rows"][0]["seconds"]["all"] == [1.23457, 2.0]
    rows = tables.table("bench-train").splitlines()[2:]
    assert rows == ["| 224 px, batch 8 | 2 | ours | 1.23 | 6.5 | 2.00 | 0.50 | 3 | - |",
                    "| 224 px, batch 8 | 2 | reference | ~1.23 | 6.5 | 2.00 | 0.50 | - | - |"]  # fmt: skip
    assert "| 224 px, batch 8 | 2 | step | 1.23 | 0.5 | 1.23 | 1.00 | 0.71 |" in tables.table("bench-floor")
    assert tables.table("bench-sweep") == tables.table("bench-data") == ""


# -- the folder that the documents speak of, and the process that runs their blocks ------------------------------------


def pictures(folder):
    """flowers/ with two classes, a photo and a folder of others: small pictures made here."""
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)

    def picture(path, colour):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((rng.random((40, 48, 3)) * colour).astype(np.uint8)).save(path)

    for name, colour in (("daisy", (255, 255, 80)), ("rose", (255, 60, 90))):
        for k in range(6):
            picture(folder / "flowers" / name / f"{k}.png", colour)
    picture(folder / "photo.jpg", (255, 60, 90))
    picture(folder / "holiday" / "1.jpg", (255, 255, 80))


def shallow_network():
    """vim_nano with two blocks and random weights in a file, so that blocks take seconds and adapters can name the file."""
    import svp.backbones.create as create
    from svp.backbones.checkpoints import save_backbone
    from svp.backbones.vim import VARIANTS

    VARIANTS["vim_nano"] = {**VARIANTS["vim_nano"], "depth": 2}
    path = Path("vim_nano.safetensors").absolute()
    save_backbone(create.create_backbone("vim_nano"), path)
    shipped = create.shipped_weights
    create.shipped_weights = lambda name: path if name == "vim_nano" else shipped(name)


def main(words):
    shallow_network()
    if words[0] == "--":
        return command(words[1:])
    names = {"__name__": "document"}
    for line, kind, text, reason in blocks(Path(words[0])):
        if kind not in RUN or reason:
            continue
        try:
            if kind == "python":
                exec(compile(text, words[0], "exec"), names)
            else:
                for part in text.splitlines():
                    assert command(faster(shlex.split(part, comments=True)[1:])) == 0, part
        except BaseException:
            traceback.print_exc()
            print(f"in the block at {words[0]}:{line}")
            return 1
    return 0


def faster(words):
    return words if any(flag in words for flag in KEEP) else [*words, *FASTER.get(words[0], [])]


def command(words):
    """The exit code of an svp command; `> FILE` is understood."""
    from svp.cli.main import run

    out = words[words.index(">") + 1] if ">" in words else None
    with contextlib.ExitStack() as stack:
        if out:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(out, "w", encoding="utf-8"))))
        return run(words[: words.index(">")] if out else words)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
