"""How pictures become numbers: defaults, copies, and the form in which it is saved."""

import json

import pytest

from svp.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


@pytest.mark.parametrize("crop,side", [((224, 224), 256), ((64, 64), 73), ((32, 48), 54), ((1, 1), 1)])
def test_the_margin_is_timms(crop, side):
    assert Preprocessing(crop).shorter_side == side


def test_a_resize_that_is_given_wins():
    assert Preprocessing((64, 64), resize=64).shorter_side == 64


def test_statistics_are_imagenets_unless_given():
    p = Preprocessing((8, 8))
    assert (p.mean, p.std, p.interpolation, p.exact) == (IMAGENET_MEAN, IMAGENET_STD, "bicubic", False)


def test_a_copy_differs_where_asked_alone():
    p = Preprocessing((8, 8))
    changed = p.but(mean=(0.0, 0.0, 0.0), exact=True)
    assert changed == Preprocessing((8, 8), mean=(0.0, 0.0, 0.0), exact=True) and p == Preprocessing((8, 8))


@pytest.mark.parametrize(
    "p",
    [Preprocessing((8, 16)), Preprocessing((8, 8), resize=9, std=(1.0, 2.0, 3.0), exact=True)],
    ids=["plain", "all"],
)
def test_it_survives_a_file(p):
    assert Preprocessing.from_dict(json.loads(json.dumps(p.as_dict()))) == p
