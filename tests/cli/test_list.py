"""Tables of what there is, and the page of each thing."""

import json

import pytest

from svp.cli.list import KINDS
from svp.registry import list_backbones, list_methods


@pytest.mark.parametrize("kind", KINDS)
def test_tables_for_people_and_for_programs(svp, kind):
    told, rows = svp("list", kind), json.loads(svp("list", kind, "--json").out)
    names = [next(iter(row.values())) for row in rows]
    assert told.code == 0 and names and all(f"\n{name} " in told.out for name in names)
    assert svp("list", kind.rstrip("s")).out == told.out


def test_every_method_and_backbone_is_there(svp):
    assert [row["method"] for row in json.loads(svp("list", "methods", "--json").out)] == list_methods()
    assert [row["backbone"] for row in json.loads(svp("list", "backbones", "--json").out)] == list_backbones()


def test_sizes_are_read_without_importing(svp):
    rows = {row["backbone"]: row for row in json.loads(svp("list", "backbones", "--json").out)}
    assert rows["vim_small_stride8"]["sizes"] == "embed_dim 384, stride 8"
    assert rows["vim_small"]["weights"] == "published"


def every_name():
    return [(kind, next(iter(row.values()))) for kind, (table, _) in KINDS.items() for row in table()]


@pytest.mark.parametrize("kind,name", every_name())
def test_every_name_has_a_page(svp, kind, name):
    told = svp("list", kind, name)
    page = json.loads(svp("list", kind, name, "--json").out)
    assert told.code == 0 and page[kind.rstrip("s")] == name and page["use"] in told.out
    assert all(next(iter(row.values())) in told.out for row in page.get("options", []))


def test_the_page_of_a_method(svp):
    page = json.loads(svp("list", "methods", "svp", "--json").out)
    hidden = next(row for row in page["options"] if row["option"] == "hidden")
    assert hidden["default"] == 64 and hidden["type"] == "integer or one of relative" and hidden["what it does"]
    assert "2412.08947" in page["paper"] and "G (d² + d)" in page["numbers that train"]
    assert any(line.startswith("svp:published") for line in page["presets"])


@pytest.mark.parametrize(
    "method,vim,vit",
    [
        ("svp", "direct", "direct"), ("ssf", "adapted (label ssf_vim)", "direct"), ("lora", "direct", "direct"),
        ("sa2vp", "refused: its attention between picture and prompts", "direct"), ("sdt", "adapted (label sdt_vim)", "refused: it tunes"),
        ("partial", "direct", "adapted (label partial_vit), preset tokens"),
    ],
)  # fmt: skip
def test_the_page_of_a_method_says_where_it_acts(svp, method, vim, vit):
    page = json.loads(svp("list", "methods", method, "--json").out)
    assert page["on Vim"].startswith(vim) and page["on a ViT"].startswith(vit)


def test_the_page_of_a_backbone_counts_without_making_it(svp):
    page = json.loads(svp("list", "backbones", "vim_nano", "--json").out)
    assert page["numbers"].startswith("1,991,240")


def test_wildcards_narrow_the_table(svp):
    told = svp("list", "backbones", "vim_small*")
    assert told.out.count("\nvim_") == 2
    told = svp("list", "methods", "x*")
    assert told.code == 2 and "no method matches 'x*'" in told.err


@pytest.mark.parametrize(
    "words,problem,hint",
    [
        (["methods", "svq"], "there is no method 'svq'", "did you mean svp?; `svp list methods` shows all"),
        (["recips"], "there is no list of 'recips'", "did you mean recipes?"),
        ([], "what shall be listed?", "svp list methods"),
    ],
)
def test_unknown_names(svp, words, problem, hint):
    told = svp("list", *words)
    assert told.code == 2 and problem in told.err and hint in told.err
