from pathlib import Path

import numpy as np
import pytest

from svp.data.sources import open_data, picture_files
from svp.errors import SvpError


def test_digits_are_the_1797_scans():
    data = open_data("digits")
    assert data.sizes == {"train": 1077, "val": 360, "test": 360} and data.classes == tuple("0123456789")
    assert not data.may_flip and data.resize == "exact" and data.notes == ()
    names = {part.name(i) for part in data.parts.values() for i in range(len(part))}
    assert len(names) == 1797
    values, labels = data.pixels("train")
    assert values.shape == (1077, 64) and np.array_equal(labels, data.train.labels)
    picture = np.asarray(data.train.picture(5))
    assert picture.shape == (8, 8, 3) and (picture == picture[..., :1]).all()
    assert np.abs(picture[..., 0] / 255 - values[5].reshape(8, 8) / 16).max() <= 0.5 / 255 + 1e-9
    counts = np.bincount(data.test.labels)
    assert counts.min() >= 34 and counts.max() <= 37
    assert data.hash() == open_data("digits", seed=7).hash()  # the split is fixed


def test_digits_split_is_the_stated_one():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    others, test = train_test_split(np.arange(1797), test_size=0.2, random_state=0, stratify=labels)
    train, val = train_test_split(others, test_size=0.25, random_state=0, stratify=labels[others])
    data = open_data("digits")
    for name, index in (("train", train), ("val", val), ("test", test)):
        part = data.split(name)
        assert [part.name(i) for i in range(len(part))] == [f"digits/{k}" for k in index]


@pytest.mark.parametrize("wrong,words,hint", [
    ("nothing", "no folder, named 'nothing'", "folder:DIR"), ("digit", "named 'digit'", "did you mean digits?"),
    ("foldr:x", "named 'foldr:x'", "did you mean folder:x?"), ("folder:", "names no folder", "folder:path"),
    ("", "named ''", "digits"), ("x" * 300, "File name too long", "check the path"), ("a\0b/c", "does not exist", "nearest"),
    ("http://example.org/a", "is a URL; URLs are not fetched", "download it"),
])  # fmt: skip
def test_sources_that_are_none(wrong, words, hint):
    with pytest.raises(SvpError) as caught:
        open_data(wrong)
    assert words in caught.value.problem and hint in caught.value.hint


def test_a_missing_folder_names_its_nearest_parent(tmp_path):
    (tmp_path / "flowers").mkdir()
    with pytest.raises(SvpError) as caught:
        open_data(tmp_path / "flowrs")
    assert caught.value.problem == f"{tmp_path}/flowrs does not exist" and caught.value.kind == "data"
    assert f"did you mean {tmp_path}/flowers?" in caught.value.hint
    with pytest.raises(SvpError, match="does not exist") as caught:
        open_data(f"folder:{tmp_path}/a/b/c")
    assert caught.value.hint == f"the nearest folder that exists is {tmp_path}"


@pytest.mark.parametrize("name,hint", [("pets.zip", "unpack it first"), ("notes.txt", "folder:DIR")])
def test_a_file_is_no_folder(tmp_path, name, hint):
    (tmp_path / name).write_text("x")
    with pytest.raises(SvpError, match="is a file, expected a folder") as caught:
        open_data(tmp_path / name)
    assert hint in caught.value.hint and caught.value.kind == "data"


def test_options_are_checked(tmp_path):
    with pytest.raises(SvpError, match="on_bad_image is 'ignore', expected error or skip"):
        open_data("digits", on_bad_image="ignore")
    with pytest.raises(SvpError, match="no protocol 'vtb'"):
        open_data("digits", protocol="vtb")


# -- pictures to label -------------------------------------------------------------------------------------------------


def test_files_and_folders_are_expanded_in_order(tree, paint, monkeypatch):
    root = tree({"b": 1, "a10": 1, "a2": 2, ".hidden": 1})
    (root / "a2" / "notes.txt").write_text("x")
    (root / ".DS_Store").write_text("x")
    single = paint(root / "odd.dat" / "x.png").rename(root / "picture")  # no extension, named itself
    (root / "odd.dat").rmdir()
    monkeypatch.chdir(root)
    found = picture_files([root, "b/0.png", single])
    assert [str(p.relative_to(root)) if p.is_absolute() else str(p) for p in found] == [
        "a2/0.png", "a2/1.png", "a10/0.png", "b/0.png", "picture", "b/0.png", "picture",
    ]  # fmt: skip
    assert all(isinstance(p, Path) for p in found)


@pytest.mark.parametrize("address", ["http://x.org/a.jpg", "https://x.org/a.jpg", "s3://b/a.jpg", "file:///a.jpg"])
def test_urls_are_not_fetched(address):
    with pytest.raises(SvpError, match="URLs are not fetched") as caught:
        picture_files([address])
    assert address in caught.value.problem and caught.value.kind == "usage"


def test_what_cannot_be_labelled_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for wrong, words in ((tmp_path / "no.jpg", "does not exist"), (tmp_path / "empty", "holds no pictures")):
        with pytest.raises(SvpError, match=words) as caught:
            picture_files([wrong])
        assert str(wrong) in caught.value.problem and caught.value.kind == "data"
    with pytest.raises(SvpError, match="no pictures were given"):
        picture_files([])
    with pytest.raises(SvpError, match="does not exist"):
        picture_files(["x" * 400])
