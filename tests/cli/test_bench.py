"""`svp bench`: tables and JSON of a tiny network, and a sentence for what cannot be measured."""

import json

import pytest

from svp.cli.bench import pages
from svp.studies.bench import measure
from svp.studies.bench.peers import PEERS, Peer

TINY = (
    "bench",
    "--backbone",
    "vim_nano",
    "--img-size",
    "16",
    "-b",
    "2",
    "--seconds",
    "1",
    "--no-memory",
    "--threads",
    "1",
)
ROW = {"row", "what", "seconds", "cpu_seconds", "images_per_second", "over_floor", "speed_over_vit", "memory_bytes", "memory_over_vit"}  # fmt: skip
SPREAD = {"min", "median", "all"}


@pytest.fixture(autouse=True)
def one_round(monkeypatch):
    monkeypatch.setattr(measure, "MOST_ROUNDS", 1)


@pytest.fixture
def measured(svp):
    told = svp(*TINY, "--only", "ours,vit", "--json", "--no-data")
    assert told.code == 0, told.err
    return json.loads(told.out)


def test_json_holds_every_value_and_where_it_is_from(measured):
    assert set(measured) == {
        "asked",
        "machine",
        "versions",
        "git",
        "checks",
        "left_out",
        "runs",
        "sweep",
        "data",
        "probe",
    }
    assert {"cpu", "cores", "device", "level", "threads"} <= set(measured["machine"])
    assert measured["asked"]["img_size"] == [16] and measured["versions"]["torch"]
    assert [c["row"] for c in measured["checks"]] == ["ours", "vit"]
    (run,) = measured["runs"]
    assert {(line["row"], line["what"]) for line in run["rows"]} == {
        (r, w) for r in ("ours", "vit") for w in ("train", "infer")
    }
    for line in run["rows"]:
        assert set(line) == ROW
        assert set(line["seconds"]) == set(line["cpu_seconds"]) == SPREAD and len(line["seconds"]["all"]) == 1
    for floor in run["floor"].values():
        assert floor["gmac_per_image"] > 0 and floor["scan_seconds"] > 0 and set(floor["seconds"]) == SPREAD
    assert run["counts"]["tokens"] == run["tokens"] == 5


def test_the_tables_say_what_was_measured(measured):
    head, train, infer = pages(measured)
    assert "largest errors against float64: ours" in head
    assert train.startswith("training step, 16 px (5 tokens), batch 2, 1 thread") and infer.startswith("inference, ")
    for text in (train, infer):
        rows = text.split("\n")
        assert rows[1].split()[:3] == ["row", "CPU", "time"] and "memory" not in rows[1]
        assert [row.split()[0] for row in rows[3:]] == ["ours", "vit", "floor", "floor:"]


def test_quick_has_a_sweep_and_a_plot_when_asked(svp, tmp_path):
    told = svp(*TINY, "--quick", "--sweep", "16,24", "--plot", tmp_path / "tokens.png")
    assert told.code == 0, told.err
    assert (tmp_path / "tokens.png").read_bytes()[:4] == b"\x89PNG"
    assert "time a token, largest over smallest: ours " in told.out and "pictures of" not in told.out


def test_rows_on_some_blocks_are_marked(measured):
    measured["runs"][0]["rows"][0]["of_blocks"] = 1
    assert any(
        line.startswith("ours   ~") or "ours  ~" in line.replace("   ", "  ") for line in pages(measured)[1].split("\n")
    )


def test_a_loader_that_is_slower_is_named(measured):
    slow = {"workers": 2, "decoded": "each time", "pictures_per_second": 5.0, "step_waits": 0.5}
    measured["data"] = [{"img_size": 16, "source": "drawn here", "step_images_per_second": 10.0, "rows": [slow]}]
    assert "the loader is slower than the step with 2 workers, decoded each time" in pages(measured)[3]


def test_no_speed_for_a_wrong_answer(svp, monkeypatch):
    def wrong(setting):
        step = PEERS["ours"].build(setting)
        forward = step.forward
        step.forward = lambda images: 1.01 * forward(images)
        return step

    monkeypatch.setitem(PEERS, "checkpointed", Peer("wrong", wrong))
    told = svp(*TINY, "--only", "ours,checkpointed")
    assert told.code == 1 and told.out == ""
    assert "error: checkpointed is wrong: " in told.err and "hint: svp doctor" in told.err


@pytest.mark.parametrize(
    "words, code, problem",
    [
        (["--backbone", "vim_smal"], 2, "there is no backbone 'vim_smal'"),
        (["--backbone", "vit_nano"], 2, "vit_nano is no Vision Mamba"),
        (["--method", "sv"], 2, "there is no method 'sv'"),
        (["--method", "svp:none"], 2, "method svp has no preset 'none'"),
        (["--only", "our"], 2, "there is no row 'our'"),
        (["--only", "mamba_ssm"], 1, "the row mamba_ssm cannot be measured"),
        (["--img-size", "224,x"], 2, "'224,x' is not a list of sizes"),
        (["--img-size", "0"], 2, "'0' is not a list of sizes"),
        (["--img-size", "16,24", "-b", "1,2,3"], 2, "--img-size names 2 sizes, --batch-size 3 (1,2,3)"),
        (["--threads", "0"], 2, "'0' is not a list of numbers"),
        (["--seconds", "0"], 2, "0 is not a finite number above 0"),
        (["--device", "tpu"], 2, "tpu"),
        (["--amp", "fp16", "--device", "cpu"], 1, "precision fp16 needs a GPU"),
        (["--plot", "tokens.txt"], 2, "--plot is tokens.txt"),
        (["--plot", "nowhere/tokens.png"], 2, "the folder of --plot nowhere/tokens.png does not exist"),
        (["nowhere/"], 1, "nowhere"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_said_in_one_sentence(svp, words, code, problem):
    told = svp(*TINY, *words)
    lines = [line for line in told.err.strip().split("\n") if line.startswith(("error: ", "hint: "))]
    assert told.code == code and told.out == "", told.err
    assert lines[0].startswith("error: ") and problem in lines[0] and len(lines) <= 2
