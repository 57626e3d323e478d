"""Recipes: rows, files, and what is said of wrong ones."""

import dataclasses

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from svp.errors import SvpError
from svp.options import build
from svp.training.config import read_yaml, to_yaml
from svp.training.recipe import Recipe, recipe_from, recipe_named, recipes, resolve
from svp.training.recipes.svp_released import RECIPES as RELEASED


def test_every_row_is_checked_and_named():
    for name, row in recipes().items():
        assert row.name == name
        assert build(Recipe, dataclasses.asdict(row.recipe), "the recipe") == row.recipe
        resolve(row.recipe, 1e-2)
    assert {"default", "pretrain-nano", "pretrain-tiny"} <= set(recipes())
    assert len(RELEASED) == 10


def test_released_rates_are_scaled_as_published():
    used = {"svp-cub200": 1.125e-3, "svp-dtd": 1.21875e-3, "svp-dogs": 9.375e-5, "svp-svhn": 2.8125e-3}
    for name, lr in used.items():
        assert recipe_named(name).base_lr == pytest.approx(lr, rel=1e-12)


@pytest.mark.parametrize("row", RELEASED.values(), ids=RELEASED)
def test_released_rows_build_their_method(row):
    from svp.methods.base import options_of
    from svp.registry import method_class

    opt = options_of(method_class(row.method), row.method_options, row.method)
    assert (opt.hidden, opt.cross_source) == (64, "first_half") and row.head in ("linear", "two_linear")
    assert (opt.input_filter == "simam") == (row.name in ("svp-cifar100", "svp-cifar10", "svp-flowers102"))


def test_scaled_rate_counts_accumulated_pictures():
    assert Recipe(lr=1e-3, lr_per=64, batch_size=8, accumulate=4).base_lr == pytest.approx(5e-4)


def test_a_file_starts_from_a_row(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: svp-cub200\nepochs: 3\nlr: 1e-3\naugment: none\n")
    row = recipe_from(path)
    assert row.recipe == recipe_named("svp-cub200").but(epochs=3, lr=1e-3, augment="none")
    assert row.head == "two_linear" and row.method_options["shared_layers"] == 8


def test_a_recipe_survives_its_file(tmp_path):
    path = tmp_path / "all.yaml"
    for row in recipes().values():
        path.write_text(to_yaml(dataclasses.asdict(row.recipe)))
        assert recipe_from(path).recipe == row.recipe


@pytest.mark.parametrize(
    "text, said",
    [
        ("epochs: 3\nlearning_rat: 1\n", "line 2: there is no option of the recipe named 'learning_rat'"),
        ("epochs: 3\nepochs: 4\n", "line 2: the key 'epochs' stands twice"),
        ("epochs: many\n", "line 1: epochs of the recipe is 'many', expected integer"),
        ("lr: .nan\n", "line 1: lr of the recipe is nan"),
        ("lr: -1\n", "above 0.0"),
        ("epochs: [1\n", "line 2"),
        ("epochs:\n\t- 3\n", "tab"),
        ("epochs: &a 3\nbatch_size: *a\n", "line 1: the anchor or alias 'a'"),
        ("a: &x [*x]\n", "anchor"),
        ("- 3\n", "holds list"),
        ("base: defalt\n", "no recipe 'defalt'"),
        ("svp_version: 999.0\nepochs: 3\n", "was written by svp 999.0"),
        ("epochs: 3\n? [1, 2]\n: 3\n", "line"),
        ("\x00", "line 1"),
    ],
)
def test_bad_files_are_one_sentence(tmp_path, monkeypatch, text, said):
    monkeypatch.setattr("svp.extras.version", lambda name: "0.1.0")
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SvpError) as err:
        recipe_from(path)
    assert said in err.value.problem and "bad.yaml" in err.value.problem and err.value.kind == "usage"
    assert "\n" not in err.value.problem


def test_missing_files_and_names(tmp_path):
    for name, said in ((tmp_path / "no.yaml", "cannot be read"), (tmp_path, "cannot be read"), ("svp-cub", "svp-cub")):
        with pytest.raises(SvpError, match=said) as err:
            recipe_from(f"{name}/" if name == tmp_path else name)
        assert err.value.kind == "usage"
    with pytest.raises(SvpError) as err:
        recipe_from("svp-cub20")
    assert "svp-cub200" in err.value.hint


def test_binary_is_no_settings(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(SvpError, match="is not text"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(epochs=0), "epochs is 0"),
        (dict(epochs=-1), "epochs of the recipe is -1"),
        (dict(epochs=2.5), "expected integer"),
        (dict(lr=float("nan")), "finite"),
        (dict(lr=float("inf")), "finite"),
        (dict(lr=0.0), "above 0.0"),
        (dict(batch_size=0), "batch_size"),
        (dict(mixup=0.8, batch_size=33), "batch_size 33 is odd"),
        (dict(cutmix=1.0, batch_size=1), "batch_size 1 is odd"),
        (dict(warmup=5), "of all steps"),
        (dict(schedule="cosine_epoch", warmup=7, warmup_unit="steps"), "cannot last 7 steps"),
        (dict(schedule="timm_epoch", warmup=7, warmup_unit="steps"), "once an epoch"),
        (dict(milestones=(0.7, 0.5)), "milestones of the recipe are 0.7, 0.5, expected ascending shares"),
        (dict(milestones=(0.5, 0.5)), "ascending"),
        (dict(milestones=(0.5, 1.5)), "at most 1.0"),
        (dict(gamma=0.0), "above 0.0"),
        (dict(schedule="cosine_epochs"), "cosine_epoch"),
        (dict(warmup_first="zero"), "start"),
        (dict(betas=(0.9,)), "two"),
        (dict(betas=(0.9, 1.0)), "betas of the recipe are [0.9, 1.0], expected less than 1"),
        (dict(optimizer="adamx"), "adamw"),
    ],
)
def test_bad_values_are_one_sentence(changes, said):
    with pytest.raises(SvpError) as err:
        resolve(Recipe().but(**changes), 1e-2)
    assert said in str(err.value) and err.value.kind == "usage"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.one_of(
        st.text(max_size=60),
        st.dictionaries(
            st.sampled_from(["lr", "epochs", "betas", "amp", "base", "x"]),
            st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=5), st.lists, max_leaves=4),
        ).map(to_yaml),
    )
)
def test_any_text_is_a_recipe_or_one_sentence(tmp_path, text):
    path = tmp_path / "fuzz.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    try:
        assert isinstance(recipe_from(path).recipe, Recipe)
    except SvpError as err:
        assert err.kind == "usage" and "fuzz.yaml" in err.problem
