import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from svp.data.sources import open_data
from svp.data.transforms import Augmentation, Pictures, train_transform
from svp.errors import SvpError
from svp.preprocessing import Preprocessing


def encoded(seed, size=(9, 7)):
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "png")
    return stream.getvalue()


def write(path, labels, classes=("ant", "bee", "cow"), contents=None, rows=2, start=0, **columns):
    """A file of the Hugging Face layout, `rows` to a row group; columns replace or (None) remove its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = contents or [encoded(start + i) for i in range(len(labels))]
    made = {
        "image": pa.array([{"bytes": c, "path": f"{i}.png"} for i, c in enumerate(contents)]),
        "label": pa.array(labels, pa.int64()),
    } | columns
    table = pa.table({name: column for name, column in made.items() if column is not None})
    if classes:
        features = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=rows)


def refused(folder):
    with pytest.raises(SvpError) as caught:
        open_data(f"parquet:{folder}")
    assert caught.value.kind == "data" and caught.value.hint and "\n" not in caught.value.problem
    return caught.value.problem


def test_shards_and_row_groups_are_read_in_order(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", [0, 1, 2, 0, 1])
    write(tmp_path / "train-00001-of-00002.parquet", [2, 1, 0], start=5)
    write(tmp_path / "validation-00000-of-00001.parquet", [0, 1, 2], start=20)
    write(tmp_path / "test-00000-of-00001.parquet", [2, 2], start=30)
    data = open_data(tmp_path)  # a bare folder that holds Parquet files
    assert data.sizes == {"train": 8, "val": 3, "test": 2} and data.classes == ("ant", "bee", "cow")
    assert data.train.labels.tolist() == [0, 1, 2, 0, 1, 2, 1, 0]
    for i in range(8):
        assert np.array_equal(data.train.picture(i), Image.open(io.BytesIO(encoded(i))))
    assert data.train.name(6).endswith("train-00001-of-00002.parquet row 1 (1.png)")
    assert "test lacks 2 of the 3 training classes" in data.notes
    copy = pickle.loads(pickle.dumps(data))
    assert copy.hash() == data.hash() and np.array_equal(copy.test.picture(1), data.test.picture(1))


@pytest.mark.parametrize("name", ["valid-0.parquet", "val.parquet", "validation-a.parquet"])
def test_other_names_of_validation(tmp_path, name):
    write(tmp_path / "train.parquet", [0, 1, 2])
    write(tmp_path / name, [0, 1], start=9)
    assert open_data(tmp_path).sizes == {"train": 3, "val": 2, "test": 0}


def test_files_in_the_sub_folder_data(tmp_path):
    write(tmp_path / "data" / "train-0.parquet", [0, 1] * 3)
    assert open_data(f"parquet:{tmp_path}").sizes == {"train": 4, "val": 2, "test": 0}


def test_classes_without_names_are_numbers(tmp_path):
    write(tmp_path / "train-0.parquet", [0, 3, 0, 3], classes=None)
    assert open_data(tmp_path).classes == ("0", "1", "2", "3")


def test_a_label_of_a_narrow_type_and_no_path(tmp_path):
    image = pa.array([{"bytes": encoded(i)} for i in range(4)])
    write(tmp_path / "train-0.parquet", [0] * 4, image=image, label=pa.array([0, 1, 0, 1], pa.int8()))
    data = open_data(tmp_path)
    assert data.num_classes == 3 and data.train.name(0).endswith("train-0.parquet row 2")


def test_signs_are_not_mirrored(tmp_path):
    write(tmp_path / "my_GTSRB_signs" / "train-0.parquet", [0, 1] * 3)
    data = open_data(tmp_path / "my_GTSRB_signs")
    assert not data.may_flip and "pictures are not mirrored: the folder's name speaks of gtsrb" in data.notes


def test_no_training_file(tmp_path):
    assert "it has no Parquet files" in refused(tmp_path)
    write(tmp_path / "test-0.parquet", [0, 1])
    assert refused(tmp_path) == f"{tmp_path} has no train-*.parquet; it has test-0.parquet"


@pytest.mark.parametrize("content", [b"", b"hello", b"PAR1" + bytes(50) + b"PAR1"])
def test_no_parquet_file(tmp_path, content):
    (tmp_path / "train-0.parquet").write_bytes(content)
    assert "train-0.parquet is no whole Parquet file" in refused(tmp_path)


def test_a_file_cut_off_in_the_middle(tmp_path):
    path = tmp_path / "train-0.parquet"
    write(path, [0, 1] * 20)
    path.write_bytes(path.read_bytes()[:-20])
    assert "is no whole Parquet file" in refused(tmp_path)


@pytest.mark.parametrize("column", ["image", "label"])
def test_a_missing_column(tmp_path, column):
    write(tmp_path / "train-0.parquet", [0, 1], **{column: None}, other=pa.array([1, 2]))
    assert f"has no column '{column}'; its columns: " in refused(tmp_path) and "other" in refused(tmp_path)


@pytest.mark.parametrize("columns,words", [
    (dict(label=pa.array(["a", "b"])), "column label is string, expected whole numbers"),
    (dict(label=pa.array([0.5, 1.0])), "column label is double"), (dict(image=pa.array(["a", "b"])), "column image is string"),
    (dict(image=pa.array([{"path": "a"}, {"path": "b"}])), "expected {bytes, path}"),
])  # fmt: skip
def test_columns_of_a_wrong_type(tmp_path, columns, words):
    write(tmp_path / "train-0.parquet", [0, 1], **columns)
    assert words in refused(tmp_path)


@pytest.mark.parametrize("labels,words", [
    ([0, 1, 3, 3], "row 2 (2.png) has label 3, expected 0…2 (and 1 more rows)"), ([0, -1, 1], "row 1 (1.png) has label -1"),
    ([0, 1, None], "row 2 (2.png) has label -1"),
])  # fmt: skip
def test_labels_out_of_range(tmp_path, labels, words):
    write(tmp_path / "train-0.parquet", labels)
    assert words in refused(tmp_path)


def test_files_that_name_different_classes(tmp_path):
    write(tmp_path / "train-0.parquet", [0, 1])
    write(tmp_path / "test-0.parquet", [0, 1], classes=("x", "y"))
    assert "name different classes" in refused(tmp_path)


def test_a_class_that_train_lacks(tmp_path):
    write(tmp_path / "train-0.parquet", [0, 1, 0, 1])
    write(tmp_path / "test-0.parquet", [0, 2], start=9)
    assert "test has classes that train lacks: 'cow'" in refused(tmp_path)


def test_one_class_and_none(tmp_path):
    write(tmp_path / "train-0.parquet", [1, 1])
    assert "it has only 'bee'" in refused(tmp_path)
    write(tmp_path / "train-0.parquet", [], image=pa.array([], pa.struct({"bytes": pa.binary()})))
    assert "holds no pictures" in refused(tmp_path)
    write(tmp_path / "test-0.parquet", [0, 1])
    assert "it has none" in refused(tmp_path)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_an_empty_split_is_none(tmp_path, split):
    write(tmp_path / "train-0.parquet", [0, 1] * 6)
    write(tmp_path / f"{split}-0.parquet", [], image=pa.array([], pa.struct({"bytes": pa.binary()})))
    data = open_data(tmp_path)
    assert data.test is None and len(data.val) > 0
    assert f"{'val' if split == 'validation' else split} holds no pictures" in data.notes


def test_a_broken_picture_names_its_row(tmp_path):
    contents = [encoded(0), b"", encoded(2)[:100], encoded(3), encoded(4), encoded(5)]
    write(tmp_path / "train-0.parquet", [0, 1, 0, 1, 0, 1], contents=contents)
    assert refused(tmp_path) == f"{tmp_path}/train-0.parquet row 1 (1.png) is empty (0 bytes)"
    data = open_data(tmp_path, on_bad_image="skip")
    assert data.sizes["train"] + data.sizes["val"] == 4 and len(data.skipped) == 2


SETS = ("tiny_imagenet", "flowers102", "cifar100", "eurosat", "gtsrb", "cifar10", "dtd10")


@pytest.mark.parametrize("name", SETS)
def test_shared_sets(shared, name):
    """Counts and classes as their README states them."""
    counts = {
        "tiny_imagenet": (80000, 10000, 0, 200), "flowers102": (1020, 1020, 6145, 102), "cifar100": (10000, 0, 5000, 100),
        "eurosat": (4000, 1000, 2000, 10), "gtsrb": (3708, 0, 1619, 43), "cifar10": (4000, 0, 2000, 10),
        "dtd10": (400, 400, 400, 10),
    }  # fmt: skip
    data = open_data(f"parquet:{shared}/data/{name}")
    train, val, test, classes = counts[name]
    assert data.num_classes == classes and data.sizes["test"] == test and data.may_flip == (name != "gtsrb")
    assert data.sizes["train"] + data.sizes["val"] == train + val and (not val or data.sizes["val"] == val)
    picture = Pictures(data.train, train_transform(Preprocessing((32, 32)), Augmentation()))[len(data.train) - 1]
    assert picture[0].shape == (3, 32, 32)


def test_known_twins_of_the_shared_sets_are_found(shared):
    notes = [
        note for name in ("tiny_imagenet", "cifar100") for note in open_data(f"parquet:{shared}/data/{name}").notes
    ]
    told = [note for note in notes if note.startswith("identical")]
    assert told[0].startswith("identical pictures in train and val: 6 of 10000") and len(told) == 2
