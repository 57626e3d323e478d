"""Packages of extras: imported where they are there, asked for in one sentence where they are not."""

import math

import pytest

from svp.errors import SvpError
from svp.extras import need


def test_what_is_there_is_imported():
    assert need("math", extra="demo", why="the demo") is math


def test_what_is_missing_is_asked_for():
    with pytest.raises(SvpError, match='the demo needs the package "no_such_package"') as err:
        need("no_such_package", extra="demo", why="the demo")
    assert err.value.hint == 'pip install "svp-vision[demo]"' and err.value.kind == "env"
    assert isinstance(err.value.__cause__, ImportError)
