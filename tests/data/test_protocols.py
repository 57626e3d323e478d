import pytest

from svp.data.protocols import DEFAULT, PROTOCOLS, protocol_named
from svp.errors import SvpError
from svp.options import describe


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_row_is_named_sourced_and_fits_together(name):
    row = protocol_named(name)
    assert row.name == name and row.source and row == PROTOCOLS[name]


def test_rows_say_what_differs():
    assert DEFAULT.differences() == {} and DEFAULT.select == "val" and DEFAULT.val_fraction == 0.2
    assert PROTOCOLS["svp-paper"].differences() == {"resize_ratio": 0.875}
    assert PROTOCOLS["svp-released"].differences() == {
        "val_fraction": 0.0,
        "select": "test_best",
        "resize_ratio": 0.875,
    }
    assert all(row.help for row in describe(type(DEFAULT)))


def test_changes_are_checked():
    assert protocol_named("default", val_fraction=0.5).val_fraction == 0.5
    assert protocol_named(DEFAULT, val_seed=3).val_seed == 3
    with pytest.raises(SvpError, match="no protocol 'defualt'") as err:
        protocol_named("defualt")
    assert "default" in err.value.hint and err.value.kind == "usage"
    for wrong in (dict(train_on_val=True), dict(val_fraction=0.0)):
        with pytest.raises(SvpError, match="but chooses the epoch on it"):
            protocol_named("default", **wrong)
    with pytest.raises(SvpError, match="val_fraction"):
        protocol_named("default", val_fraction=0.95)
