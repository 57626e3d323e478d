"""A tiny network on generated pictures, trained through the command line once for all tests of the verbs."""

from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from svp.cli.main import run

CLASSES = ("blue", "green", "red")
TINY = """
source: {source}
backbone:
  name: vim_tiny
  weights: none
  kernel: auto
  img_size: [16, 16]
  overrides: {{depth: 2, embed_dim: 16, d_state: 4, patch_size: 8}}
"""


@dataclass
class Answer:
    """What a command line left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def svp(capsys):
    """Runs words as `svp` does, in this process."""

    def call(*words):
        code = run([str(word) for word in words])
        told = capsys.readouterr()
        assert "Traceback" not in told.err
        return Answer(code, told.out, told.err)

    return call


def draw(folder, count, seed):
    """Pictures folder/CLASS/i.png: noise with one channel brighter."""
    generator = np.random.default_rng(seed)
    for k, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = generator.integers(0, 160, (20, 20, 3))
            pixels[:, :, 2 - k] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")


def tiny(path, source):
    """A config file of a Vim of two blocks, 16 wide, for 16 x 16 pixels."""
    path.write_text(TINY.format(source=source))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Three classes with train, val and test folders."""
    folder = tmp_path_factory.mktemp("photos")
    for seed, (split, count) in enumerate((("train", 8), ("val", 3), ("test", 4))):
        draw(folder / split, count, seed)
    return folder


@pytest.fixture(scope="session")
def loose(tmp_path_factory):
    """The same without a validation and a test split."""
    folder = tmp_path_factory.mktemp("loose")
    draw(folder / "all", 6, 7)
    return folder / "all"


@pytest.fixture(scope="session")
def config(tmp_path_factory, photos):
    return tiny(tmp_path_factory.mktemp("config") / "tiny.yaml", f"folder:{photos}")


@pytest.fixture(scope="session")
def trained(tmp_path_factory, config):
    """A finished run of method svp."""
    folder = tmp_path_factory.mktemp("runs") / "svp"
    assert run(["train", "--config", str(config), "-s", "hidden=4", "--epochs", "2", "--out", str(folder), "-q"]) == 0
    return folder
