import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svp.data.protocols import PROTOCOLS
from svp.data.splits import Arrays, Files, Part, Splits, by_protocol, natural_sorted, stratified_cut
from svp.errors import SvpError

CLASSES = tuple("abcdef")


def arrays(labels, seed=0):
    labels = np.asarray(labels)
    pixels = np.random.default_rng(seed).integers(0, 256, (len(labels), 2, 2, 3), dtype=np.uint8)
    return Arrays(pixels, labels, [f"{seed}-{i}" for i in range(len(labels))])


@settings(max_examples=60)
@given(
    counts=st.lists(st.integers(2, 40), min_size=1, max_size=6), fraction=st.floats(0.01, 0.9), seed=st.integers(0, 99)
)
def test_the_cut_is_stratified_and_seeded(counts, fraction, seed):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    train, val = stratified_cut(labels, fraction, seed, CLASSES, "x")
    assert sorted([*train, *val]) == list(range(len(labels)))
    for k, count in enumerate(counts):
        inside = int((labels[val] == k).sum())
        assert 1 <= inside <= count - 1 and abs(inside - fraction * count) <= 1
    again = stratified_cut(labels, fraction, seed, CLASSES, "x")
    assert np.array_equal(train, again[0]) and np.array_equal(val, again[1])


def test_another_seed_cuts_elsewhere():
    labels = np.repeat([0, 1], 50)
    cuts = [stratified_cut(labels, 0.2, (0, seed), CLASSES, "x")[1].tolist() for seed in range(3)]
    assert len({tuple(cut) for cut in cuts}) == 3


def test_a_class_with_one_picture_cannot_be_cut():
    with pytest.raises(
        SvpError, match="flowers has 1 picture of class 'b'; training and validation need one each"
    ) as err:
        stratified_cut(np.array([0, 0, 1]), 0.2, 0, CLASSES, "flowers")
    assert err.value.kind == "data" and "'b'" in err.value.hint


@given(st.lists(st.text(st.sampled_from("aAbB10 2²é"), max_size=8), max_size=12))
def test_natural_order_is_a_total_order(names):
    once = natural_sorted(names)
    assert natural_sorted(once[::-1]) == once and sorted(once) == sorted(names)


def test_natural_order_is_that_of_people():
    names = ["Zebra", "apple", "class10", "class2", "class02", "1", "10", "9"]
    assert natural_sorted(names) == ["1", "9", "10", "apple", "class02", "class2", "class10", "Zebra"]


def test_a_part_is_its_pictures_of_several_splits():
    first, second = arrays([0, 1, 2]), arrays([3, 4], seed=1)
    part = Part(first, second, index=[4, 0, 3, 2])
    assert part.labels.tolist() == [4, 0, 3, 2] and [part.name(i) for i in range(4)] == ["1-1", "0-0", "1-0", "0-2"]
    assert np.array_equal(part.picture(0), second.picture(1)) and part.digest(3) == first.digest(2)
    nested = Part(part, index=[2])
    assert nested.name(0) == "1-0" and nested.size_bytes(0) == 12 and nested.look(0).width == 2


def test_the_hash_sees_content_labels_and_splits_but_no_order(tmp_path, paint):
    paths = [str(paint(tmp_path / f"{i}.png", i)) for i in range(4)]

    def hash_of(order, labels=(0, 1, 0, 1), root=str(tmp_path), **other):
        files = Files([paths[i] for i in order], [labels[i] for i in order], root)
        return Splits("x", files, files, None, ("a", "b"), **other).hash()

    first = hash_of(range(4))
    assert first == hash_of([2, 0, 3, 1]) and len(first) == 64
    assert first == hash_of(range(4), notes=("said",), may_flip=False)
    assert first != hash_of(range(4), labels=(1, 1, 0, 0)) and first != hash_of(range(3))
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in paths:
        shutil.copy(path, moved)
    paths = [str(moved / f"{i}.png") for i in range(4)]
    assert first == hash_of(range(4), root=str(moved))  # the same pictures in another place


def splits(val=None, test=None, **changes):
    made = Splits("src", arrays([0, 1] * 10), val, test, ("a", "b"), protocol=PROTOCOLS["default"].but(**changes))
    return by_protocol(made, seed=1)


def test_protocol_default_cuts_where_there_is_none():
    cut = splits()
    assert cut.sizes == {"train": 16, "val": 4, "test": 0} and "cut stratified (seed 1)" in cut.notes[0]
    own = arrays([0, 1], 1)
    assert splits(own).val is own and not splits(own).notes


def test_protocols_that_choose_on_test():
    val, test = arrays([0, 1], 1), arrays([0, 1, 1], 2)
    released = splits(None, test, select="test_best", val_fraction=0.0)
    assert released.sizes == {"train": 20, "val": 3, "test": 3} and released.val is test and released.notes
    joined = splits(val, test, select="test_best", train_on_val=True)
    assert joined.sizes["train"] == 22 and joined.val is test and joined.train.name(20) == "1-0"
    with pytest.raises(SvpError, match="chooses the epoch on test, and src has no test split"):
        splits(val, None, select="test_best")


def test_a_split_by_name():
    cut = splits()
    assert cut.split("train") is cut.train
    with pytest.raises(SvpError, match="src has no test split"):
        cut.split("test")
