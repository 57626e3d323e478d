import json

import pytest

from svp.data.sources import open_data
from svp.errors import SvpError


def vtab(tree, lists):
    root = tree({"images": 12})
    for name, lines in lists.items():
        (root / name).write_text("\n".join(lines), encoding="utf-8")
    return root


def lines(*labels, start=0):
    return [f"images/{start + i}.png {label}" for i, label in enumerate(labels)]


def test_vtab_lists(tree):
    root = vtab(tree, {"train800.txt": lines(0, 1, 2), "val200.txt": lines(1, 3, start=3), "test.txt": [*lines(0, 2, start=5), ""]})  # fmt: skip
    data = open_data(root)
    assert data.sizes == {"train": 3, "val": 2, "test": 2} and data.classes == ("0", "1", "2", "3")
    assert data.val.labels.tolist() == [1, 3] and data.train.picture(2).size == (12, 10)
    assert "val has classes that train lacks: '3'" in data.notes  # published lists are like that
    joined = open_data(root, protocol="svp-released-vtab")
    assert joined.sizes == {"train": 5, "val": 2, "test": 2}


def test_vtab_with_one_list_for_train_and_val(tree):
    root = vtab(tree, {"train800val200.txt": lines(0, 0, 1, 1), "val200.txt": lines(1, start=3), "test.txt": lines(0, start=5)})  # fmt: skip
    assert open_data(root).sizes == {"train": 2, "val": 2, "test": 1}


@pytest.mark.parametrize("bad,words", [
    ("images/1.png", "line 2 is 'images/1.png', expected 'path label'"), ("images/1.png -1", "line 2 is"),
    ("images/1.png cat", "line 2 is"), ("images/1.png 1.5", "line 2 is"), ("../../x.png 1", "which lies outside"),
    ("/etc/passwd 1", "which lies outside"), ("images/77.png 1", "which cannot be found"),
])  # fmt: skip
def test_vtab_lines_that_are_wrong(tree, bad, words):
    root = vtab(tree, {"train800.txt": ["images/0.png 0", bad, *lines(1, start=4)]})
    with pytest.raises(SvpError) as caught:
        open_data(root)
    assert words in caught.value.problem and caught.value.kind == "data" and caught.value.hint


@pytest.mark.parametrize("source", [".", "../tree", "folder:."])
def test_a_line_leads_out_of_a_folder_however_the_folder_is_named(tree, source, monkeypatch):
    root = vtab(tree, {"train800.txt": ["images/0.png 0", "../x.png 1", *lines(1, start=4)]})
    (root.parent / "x.png").write_bytes((root / "images" / "1.png").read_bytes())
    monkeypatch.chdir(root)
    with pytest.raises(SvpError, match="which lies outside"):
        open_data(source.replace("tree", root.name))


def test_how_many_pictures_are_missing(tree):
    root = vtab(tree, {"train800.txt": ["images/0.png 0", *lines(1, 1, 1, start=50)]})
    with pytest.raises(
        SvpError, match=r"train800\.txt line 2 names .*images/50\.png and 2 more, which cannot be found"
    ):
        open_data(root)


def test_an_empty_list_and_one_that_is_no_text(tree):
    with pytest.raises(SvpError, match="lists no pictures"):
        open_data(vtab(tree, {"train800.txt": []}))
    root = tree({"images": 1})
    (root / "train800.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SvpError, match="is no UTF-8 text"):
        open_data(root)


def fgvc(tree, folder="images", **files):
    root = tree({folder: 12}) if folder else tree({".": 12})
    for split, rows in files.items():
        (root / f"{split}.json").write_text(rows if isinstance(rows, str) else json.dumps(rows), encoding="utf-8")
    return root


@pytest.mark.parametrize("folder", ["images", "Images"])
def test_fgvc_files(tree, folder):
    rows = {"train": {"0.png": 300, "1.png": 295, "2.png": 1010}, "val": {"3.png": 1010}, "test": {"4.png": 295, "5.png": 300}}  # fmt: skip
    data = open_data(fgvc(tree, folder, **rows))
    assert data.sizes == {"train": 3, "val": 1, "test": 2} and data.classes == ("295", "300", "1010")
    assert data.train.labels.tolist() == [1, 0, 2]
    assert data.val.labels.tolist() == [2]  # by the ids of train: val shows one class only
    assert data.train.picture(0).size == (12, 10)


def test_keys_below_the_folder_itself_and_text_ids(tree):
    data = open_data(fgvc(tree, "jpg", train={"jpg/0.png": "002", "jpg/1.png": "001"}, val={"jpg/2.png": "001"}))
    assert data.classes == ("001", "002") and data.train.labels.tolist() == [1, 0]


def test_stanford_cars_spellings_and_its_val_inside_train(tree, paint):
    root = tree({"car_ims": 1})
    for name in ("car_ims/000001.png", "00002.jpg", "images/car_ims/000003.jpg", "000004.jpg"):
        paint(root / name)
    rows = {"car_ims/000001.png": 1, "car_ims/000002.jpg": 2, "car_ims/000003.jpg": 1, "car_ims/000004.jpg": 2}
    (root / "train.json").write_text(json.dumps(rows))
    (root / "val.json").write_text(json.dumps({"car_ims/000003.jpg": 1}))
    data = open_data(root)
    assert data.sizes == {"train": 3, "val": 1, "test": 0}
    assert [data.train.name(i).removeprefix(f"{root}/") for i in range(3)] == [
        "car_ims/000001.png",
        "00002.jpg",
        "000004.jpg",
    ]


@pytest.mark.parametrize("rows,words", [
    ("{", "is no JSON"), ("[1]", "no JSON object"), ("{}", "no JSON object"), ({"0.png": [1]}, "has class [1]"),
    ({"0.png": True}, "has class True"), ({"0.png": 1.5}, "has class 1.5"), ({"../../../x.png": 1, "0.png": 2}, "lies outside"),
    ({"88.png": 1, "0.png": 2, "89.png": 1}, "88.png and 1 more, which cannot be found"),
])  # fmt: skip
def test_fgvc_files_that_are_wrong(tree, rows, words):
    with pytest.raises(SvpError) as caught:
        open_data(fgvc(tree, train=rows))
    assert words in caught.value.problem and caught.value.kind == "data"


def test_a_class_that_train_json_lacks(tree):
    root = fgvc(tree, train={"0.png": 1, "1.png": 2}, test={"2.png": 3})
    with pytest.raises(SvpError, match=r"test\.json: 2\.png has class 3, which train\.json lacks"):
        open_data(root)


@pytest.mark.parametrize("name", ["car_ims//{out}/a.png", "car_ims/x/../../../out/a.png"])
def test_stanford_cars_spellings_stay_inside(name, tree, tmp_path, paint):
    paint(tmp_path / "out" / "a.png")
    root = tree({"car_ims": 2})
    (root / "car_ims" / "x").mkdir()
    rows = {"car_ims/0.png": 1, "car_ims/1.png": 2, name.format(out=tmp_path / "out"): 1}
    (root / "train.json").write_text(json.dumps(rows))
    with pytest.raises(SvpError, match="lies outside"):
        open_data(root)
