"""What users see: the public names, what a first import and a help page cost, timm's registry, entry points."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

import svp

ROOT = Path(__file__).parents[1]
NAMES = [  # what everybody uses
    "create_backbone", "adapt", "load", "predict", "AdaptedModel", "Prediction", "open_data", "fit", "evaluate", "Recipe",
    "Run", "SvpError", "ops", "list_backbones", "list_methods", "list_tasks", "list_protocols", "list_recipes",
]  # fmt: skip
# what is returned, and what others build on
EXTENDING = ["Backbone", "Method", "Phase", "Seams", "Protocol", "Split", "Splits", "Evaluation"]
OPS = ["causal_conv1d", "causal_conv1d_fn", "selective_scan", "selective_scan_fn"]
HEAVY = ["torch", "torchvision", "timm", "scipy", "sklearn", "matplotlib", "pyarrow", "transformers"]
VERBS = ["train", "eval", "predict", "list", "doctor", "bench", "convert"]


def python(code: str, *argv: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=120)


# -- names -------------------------------------------------------------------------------------------------------------


def test_public_names_are_the_promised_ones():
    assert sorted(svp.__all__) == sorted(NAMES + EXTENDING)
    assert set(svp.__all__) <= set(dir(svp))
    assert sorted(svp.ops.__all__) == sorted(OPS)


@pytest.mark.parametrize("name", sorted(NAMES + EXTENDING))
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(svp, name)
    assert value.__doc__ and value.__doc__.strip().split("\n")[0].strip(), f"svp.{name} has no docstring"


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(svp.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname or alias.name for node in block.body for alias in node.names}
    assert seen == set(svp.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        _ = svp.adopt


def test_the_version_is_that_of_the_installed_package():
    try:
        wanted = importlib.metadata.version("svp-vision")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is on the path only, not installed")
    assert svp.__version__ == wanted


# -- what a start costs ------------------------------------------------------------------------------------------------

START = """
import json, sys, time
begin = time.process_time()
{action}
sys.stdout.flush()
print(json.dumps({{"seconds": time.process_time() - begin, "modules": sorted({{m.split(".")[0] for m in sys.modules}})}}),
      file=sys.stderr)
"""
RUN = "from svp.cli.main import run; code = run(sys.argv[1:])"


def cost(action: str, *argv: str) -> tuple[dict, str, str]:
    """({"seconds" of CPU, "modules"}, stdout, the rest of stderr) of an action in a fresh process."""
    ran = python(START.format(action=action), *argv)
    assert ran.returncode == 0, ran.stderr
    *said, last = ran.stderr.strip().split("\n")
    return json.loads(last), ran.stdout, "\n".join(said)


def test_importing_the_package_loads_nothing_heavy():
    found, _, _ = cost("import svp")
    assert not set(HEAVY) & set(found["modules"])
    assert found["seconds"] < 0.25


@pytest.mark.parametrize("argv", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_is_fast_and_loads_no_torch(argv):
    found, text, _ = cost(RUN, *argv)
    assert text.startswith("svp" if "--version" in argv else "Usage: svp")
    assert not set(HEAVY) & set(found["modules"])
    assert found["seconds"] < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_help_pages_have_examples(verb):
    _, text, _ = cost(RUN, verb, "--help")
    assert "Examples:" in text and f"  svp {verb} " in text.split("Examples:")[1] + " "


@pytest.mark.parametrize(
    "argv",
    [["trian"], ["train", "digits", "--methd", "svp"], ["train", "digits", "--epochs", "ten"], ["train"], ["train", "digits", "-r", "epoch=3"]],
    ids=" ".join,
)  # fmt: skip
def test_usage_errors_are_fast_and_say_what_to_type(argv):
    found, text, said = cost(RUN + "; assert code == 2, code", *argv)
    assert text == ""
    lines = said.split("\n")
    assert lines[0].startswith("error: ") and lines[1].startswith("hint: ") and len(lines) == 2, said
    assert not set(HEAVY) & set(found["modules"])
    assert found["seconds"] < 0.5


@pytest.mark.parametrize("argv", [["list", "methods"], ["list", "backbones"]], ids=" ".join)
def test_names_are_listed_without_torch(argv):
    found, text, _ = cost(RUN + "; assert code == 0, code", *argv)
    for name in getattr(svp, f"list_{argv[1]}")():
        assert name in text
    assert not set(HEAVY) & set(found["modules"])
    assert found["seconds"] < 1.0


# -- other packages ----------------------------------------------------------------------------------------------------

MAKE = "net = {create}('vim_nano', pretrained=False, num_classes=3); assert net.num_classes == 3; print(type(net).__name__)"


@pytest.mark.parametrize(
    "code",
    [
        f"import svp, timm; {MAKE.format(create='timm.create_model')}",
        f"import svp, importlib.util as u; u.find_spec('timm'); import timm; {MAKE.format(create='timm.create_model')}",
        f"import timm, svp; {MAKE.format(create='timm.create_model')}",
        f"import svp; from timm.models import create_model; {MAKE.format(create='create_model')}",
    ],
    ids=["svp first", "looked for first", "timm first", "from timm.models"],
)
def test_timm_knows_our_backbones_in_every_order(code):
    ran = python(code)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "Vim"


def test_entry_points_of_others_are_documented_as_they_are_read():
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    from svp.registry import ROOMS

    for folder in ROOMS:
        assert f'[project.entry-points."svp.{folder}"]' in page
