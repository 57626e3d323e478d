import os
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from svp.data.sources import open_data
from svp.data.sources.checks import upscale_note
from svp.errors import SvpError
from svp.preprocessing import Preprocessing

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX file system")


def names(split):
    return [os.path.basename(split.name(i)) for i in range(len(split))]


def refused(source, **options):
    with pytest.raises(SvpError) as caught:
        open_data(source, **options)
    assert caught.value.kind == "data" and caught.value.hint and "\n" not in caught.value.problem
    return caught.value


# -- what works --------------------------------------------------------------------------------------------------------


def test_class_folders(tree):
    root = tree({"cat": 10, "Dog": 5, "class10": 2, "class2": 2})
    before = sorted(root.rglob("*"))
    data = open_data(root)
    assert data.classes == ("cat", "class2", "class10", "Dog") and data.test is None and data.may_flip
    assert data.sizes == {"train": 14, "val": 5, "test": 0}
    assert np.bincount(data.val.labels).tolist() == [2, 1, 1, 1]
    assert not {data.train.name(i) for i in range(14)} & {data.val.name(i) for i in range(5)}
    assert "layout: class/picture" in data.notes
    assert any("validation: 5 of 19 training pictures, cut stratified (seed 0)" in note for note in data.notes)
    assert sorted(root.rglob("*")) == before
    assert data.train.picture(0).size == (12, 10)


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Validation"])
def test_split_folders(tree, val):
    root = tree({"train/a": 3, "train/b": 2, f"{val}/a": 1, f"{val}/b": 1, "test/b": 2})
    data = open_data(f"folder:{root}")
    assert data.sizes == {"train": 5, "val": 2, "test": 2} and data.test.labels.tolist() == [1, 1]
    assert "test lacks 1 of the 2 training classes" in data.notes and "layout: train/class/picture" in data.notes


def test_what_is_not_used_is_told(tree, paint):
    root = tree({"train/a": 5, "train/b": 5, "extra/c": 2})
    (root / "test").mkdir()
    paint(root / "train" / "loose.png"), paint(root / "train" / "loose2.png")
    notes = open_data(root).notes
    assert "ignored: 2 pictures outside of any class folder" in notes and f"{root}/test holds no pictures" in notes
    assert "ignored: the folders extra beside train" in notes


def test_train_and_test_without_validation(tree):
    data = open_data(tree({"train/a": 5, "train/b": 5, "test/a": 1, "test/b": 1}))
    assert data.sizes == {"train": 8, "val": 2, "test": 2}


def test_a_class_may_be_called_train(tree):
    assert open_data(tree({"plane": 3, "train": 3})).classes == ("plane", "train")


def test_the_cut_follows_the_seed_not_the_file_system(tree, tmp_path, monkeypatch):
    root = tree({"a": 20, "b": 20})
    first, again, other = (open_data(root, seed=seed) for seed in (0, 0, 1))
    assert names(first.val) == names(again.val) != names(other.val)
    assert first.hash() == again.hash() != other.hash()
    from pathlib import Path

    plain = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(plain(self))))
    assert open_data(root).hash() == first.hash()


def test_sub_folders_belong_to_their_class_and_hidden_ones_to_nobody(tree):
    root = tree({"a/more/deep": 2, "a": 2, "b": 4, "a/.ipynb_checkpoints": 3, "__MACOSX/a": 2})
    for name in (".DS_Store", "a/.DS_Store", "b/Thumbs.db", "b/readme.txt", "list.csv"):
        (root / name).write_text("x")
    data = open_data(root)
    assert data.sizes["train"] + data.sizes["val"] == 8 and data.classes == ("a", "b")
    assert "ignored: 5 hidden files and folders" in data.notes
    assert "ignored: 2 files that are no pictures" in data.notes


def test_any_extension_and_none(tree, paint):
    root = tree({"a": 1, "b": 2})
    for ending in ("JPG", "jpeg", "bmp", "gif", "webp", "tif", "ppm"):
        paint(root / "a" / f"x.{ending}")
    paint(root / "a" / "y.png").rename(root / "a" / "y")
    data = open_data(root)
    assert data.sizes["train"] + data.sizes["val"] == 11


@POSIX
def test_strange_names(tree, paint):
    root = tree({"a": 2, "b": 2})
    odd = [b"with space.png", "😀.png".encode(), b"line\nbreak.png", b"not\xfftext.png", b"x" * 251 + b".png"]
    source = paint(root / "a" / "0.png")
    for name in odd:
        shutil.copy(source, os.path.join(os.fsencode(root), b"a", name))
    data = open_data(root)
    assert data.sizes["train"] + data.sizes["val"] == 9 and len(data.hash()) == 64
    shown = [part.name(i) for part in (data.train, data.val) for i in range(len(part))]
    assert any(r"line\nbreak.png" in n for n in shown) and any(r"not\xfftext.png" in n for n in shown)
    assert all(n.isprintable() and n.encode("utf-8") for n in shown)
    assert all(part.picture(i).size == (12, 10) for part in (data.train, data.val) for i in range(len(part)))


@POSIX
def test_links_are_followed(tree, tmp_path):
    root = tree({"a": 2, "b": 2})
    extra = tree({"more": 2}, tmp_path / "elsewhere")
    (root / "a" / "first").symlink_to(extra / "more")
    (root / "b" / "second").symlink_to(extra / "more")  # twice the same folder is no loop
    data = open_data(root)
    assert data.sizes["train"] + data.sizes["val"] == 8


def test_what_was_converted_is_told(tree, paint):
    root = tree({"a": 2, "b": 2})
    paint(root / "a" / "grey.png", mode="L"), paint(root / "a" / "cmyk.jpg", mode="CMYK")
    Image.new("RGBA", (3, 3)).save(root / "b" / "alpha.png"), Image.new("RGBA", (3, 3)).save(root / "b" / "beta.png")
    notes = open_data(root).notes
    assert "pictures converted to RGB: 1 CMYK, 1 grey, 2 laid on white (transparency)" in notes


def test_identical_pictures_are_counted(tree):
    root = tree({"train/a": 3, "train/b": 2, "val/a": 1, "val/b": 1, "test/a": 1, "test/b": 1})
    for i in range(4):
        shutil.copy(root / "train/a/0.png", root / f"test/b/same{i}.png")
    note = next(note for note in open_data(root).notes if note.startswith("identical"))
    assert note.startswith("identical pictures in train and test: 4 of 6 in test") and note.count("same") == 3


def test_a_tiny_picture_works_and_is_worth_a_word(tree, paint):
    root = tree({"a": 2, "b": 2})
    paint(root / "a" / "dot.png", size=(1, 1)), paint(root / "b" / "thin.png", size=(3, 2000))
    data = open_data(root)
    assert upscale_note(data, Preprocessing((64, 64), resize=64)) == (
        "enlarged more than 8 times: 2 pictures (the smallest has 1 x 1 pixels)"
    )
    assert upscale_note(data, Preprocessing((8, 8), resize=8)) == ""


def test_protocols_change_the_splits(tree):
    root = tree({"train/a": 5, "train/b": 5, "test/a": 1, "test/b": 2})
    released = open_data(root, protocol="svp-released")
    assert released.sizes == {"train": 10, "val": 3, "test": 3} and released.protocol.select == "test_best"
    with pytest.raises(SvpError, match="has no test split"):
        open_data(root / "train", protocol="svp-released")


# -- what does not -----------------------------------------------------------------------------------------------------


def test_an_empty_folder(tmp_path):
    assert ".jpg" in refused(tmp_path).problem and "holds no pictures" in refused(tmp_path).problem


def test_a_flat_folder(tree):
    root = tree({"a": 3}) / "a"
    err = refused(root)
    assert "holds 3 pictures but no class folders" in err.problem
    assert "DIR/class/picture.jpg" in err.hint and "svp predict" in err.hint


def test_one_class(tree):
    assert "at least two classes in train, it has only 'a'" in refused(tree({"a": 3})).problem


def test_a_folder_around_the_folder(tree):
    root = tree({"outer/a": 3, "outer/b": 3})
    assert f"did you mean folder:{root}/outer?" in refused(root).hint


def test_a_class_folder_without_pictures(tree):
    root = tree({"a": 3, "b": 2})
    (root / "empty").mkdir()
    assert refused(root).problem == f"the class folder {root}/empty holds no pictures"


@pytest.mark.parametrize("split", ["val", "test"])
def test_classes_that_train_lacks(tree, split):
    root = tree({"train/a": 3, "train/b": 3, f"{split}/a": 1, f"{split}/c": 1, f"{split}/d": 1})
    err = refused(root)
    assert err.problem == f"{root}/{split} has classes that train lacks: c, d" and "a, b" in err.hint


def test_too_few_pictures_to_cut(tree):
    err = refused(tree({"lily": 4, "rose": 1}))
    assert "has 1 picture of class 'rose'; training and validation need one each" in err.problem


def test_splits_without_train(tree):
    assert "has val and test but no train folder" in refused(tree({"val/a": 1, "test/a": 1})).problem


def test_two_folders_for_one_split(tree):
    root = tree({"train/a": 2, "train/b": 2, "val/a": 1, "validation/a": 1})
    assert "has val and validation, which are one split" in refused(root).problem


def test_parquet_files_are_named(tmp_path):
    (tmp_path / "train-0.parquet").write_bytes(b"x")
    assert refused(f"folder:{tmp_path}").hint == f"parquet:{tmp_path}"


BROKEN = {
    "zero.jpg": (b"", "is empty (0 bytes)"), "text.jpg": (b"hello", "is not a picture of a known format"),
    "cut.png": (b"\x89PNG\r\n\x1a\n", "begins as PNG but has no valid header"), "a.svg": (b"<svg/>", "is an SVG drawing"),
    "b.heic": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00", "is a HEIC photograph"), "c.pdf": (b"%PDF-1.7", "is a PDF"),
    "d.nef": (b"MM\x00*\x00\x00\x00\x08", "is a RAW photograph"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_bad_file_is_found_at_the_door(tree, name):
    root = tree({"a": 3, "b": 3})
    content, words = BROKEN[name]
    (root / "a" / name).write_bytes(content)
    err = refused(root)
    assert str(root / "a" / name) in err.problem and words in err.problem


def test_bad_files_are_left_out_when_asked(tree):
    root = tree({"a": 3, "b": 3})
    for name, (content, _) in BROKEN.items():
        (root / "a" / name).write_bytes(content)
    cut = root / "b" / "2.png"
    cut.write_bytes(cut.read_bytes()[:200])  # its header is whole: only decoding finds it
    data = open_data(root, on_bad_image="skip")
    assert data.sizes["train"] + data.sizes["val"] == 5 and len(data.skipped) == len(BROKEN) + 1
    assert all(any(str(root / "a" / name) in line for line in data.skipped) for name in BROKEN)
    assert all(part.picture(i) for part in (data.train, data.val) for i in range(len(part)))


def test_nothing_but_bad_files(tree):
    root = tree({"a": 3, "b": 3})
    for path in root.rglob("*.png"):
        path.write_bytes(b"x")
    problem = refused(root, on_bad_image="skip").problem
    assert "none of the 6 train pictures" in problem and problem.count("is not a picture") == 3


def test_a_class_of_which_nothing_is_left(tree):
    root = tree({"a": 3, "b": 1})
    (root / "b" / "0.png").write_bytes(b"x")
    assert "no training picture of class 'b' can be read" in refused(root, on_bad_image="skip").problem


@POSIX
@pytest.mark.parametrize("kind", ["loop", "itself", "broken"])
def test_links_that_lead_nowhere(tree, kind):
    root = tree({"a": 3, "b": 3})
    link = root / "a" / "link"
    link.symlink_to({"loop": root, "itself": link, "broken": root / "gone"}[kind])
    assert str(link) in refused(root).problem
    data = open_data(root, on_bad_image="skip")
    assert data.sizes["train"] + data.sizes["val"] == 6 or kind == "loop"
    assert any(str(link) in line for line in data.skipped)


@POSIX
def test_what_may_not_be_read(tree, monkeypatch):
    root = tree({"a": 3, "b": 3})
    plain = open

    def guarded(path, *rest, **options):
        if str(path) == f"{root}/a/1.png":
            raise PermissionError(13, "Permission denied")
        return plain(path, *rest, **options)

    monkeypatch.setattr("builtins.open", guarded)
    err = refused(root)
    assert err.problem == f"{root}/a/1.png cannot be read: no permission" and "chmod" in err.hint


@POSIX
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read(tree):
    root = tree({"a": 3, "b": 3})
    (root / "a").chmod(0)
    try:
        assert f"{root}/a cannot be read: no permission" in refused(root).problem
    finally:
        (root / "a").chmod(0o755)


def test_a_source_that_may_not_be_read(tree, monkeypatch):
    root = tree({"a": 3, "b": 3})

    def forbidden(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", forbidden)
    assert refused(root).problem == f"{root} cannot be read: no permission"


@POSIX
def test_a_pipe_named_like_a_picture_does_not_hang(tree):
    root = tree({"a": 3, "b": 3})
    os.mkfifo(root / "a" / "pipe.png")
    assert open_data(root).sizes["train"] == 4


def test_awkward_files_as_a_class(tree, shared):
    """A folder of everything difficult: with skip it opens, and each bad file is listed once."""
    root = tree({"plain": 4})
    (root / "awkward").mkdir()
    for path in (shared / "data/awkward").iterdir():
        shutil.copyfile(path, root / "awkward" / path.name)
    data = open_data(root, on_bad_image="skip")
    assert data.sizes["train"] + data.sizes["val"] == 4 + 35 and len(data.skipped) == 9
    assert "ignored: 1 files that are no pictures" in data.notes


def test_pictures_that_mean_something_else_when_mirrored(tmp_path, tree):
    root = tree({"a": 2, "b": 2}).rename(tmp_path / "GTSRB-small")
    data = open_data(root)
    assert not data.may_flip and "pictures are not mirrored: the folder's name speaks of gtsrb" in data.notes
