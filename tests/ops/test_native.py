"""The compiled library: loaded, told its level, called with the right memory; and what the test suite does to that memory."""

import ctypes
import re
from pathlib import Path

import pytest
import torch

import svp.ops
from svp.errors import SvpError
from svp.ops import causal_conv1d, native, selective_scan
from svp.ops.native import Call, Rows, fields

compiled = pytest.mark.skipif(not native.available, reason=native.reason)


class Args(ctypes.Structure):
    _fields_ = fields((Rows, "rows"), (ctypes.c_void_p, "whole other"), (ctypes.c_int64, "count"))


def test_fields_are_named_in_order():
    assert [name for name, _ in Args._fields_] == ["rows", "whole", "other", "count"]


def test_rows_keep_their_strides():
    wide = torch.arange(2 * 3 * 8.0).reshape(2, 3, 8)
    call = Call(Args(count=3))
    call.put(rows=wide[..., 4:], whole=None, other=wide)
    rows = call.args.rows
    assert (rows.data, rows.b, rows.l, rows.g) == (wide.data_ptr() + 16, 24, 8, 0)
    assert call.args.whole is None and call.args.other == wide.data_ptr() and len(call.alive) == 2


def test_groups_have_a_stride_and_a_last_axis_that_is_not_dense_is_copied():
    grouped = torch.zeros(2, 3, 5, 4)
    call = Call(Args())
    call.put(rows=grouped)
    assert (call.args.rows.b, call.args.rows.l, call.args.rows.g) == (60, 20, 4)
    turned = torch.zeros(2, 4, 3).mT
    call.put(rows=turned)
    assert call.args.rows.data != turned.data_ptr() and (call.args.rows.b, call.args.rows.l) == (12, 4)
    assert call.alive[-1].data_ptr() == call.args.rows.data  # the copy lives as long as the call


def test_what_must_be_whole_is_made_whole():
    turned = torch.zeros(4, 3).T
    call = Call(Args())
    call.put(whole=turned)
    assert call.args.whole != turned.data_ptr() and call.alive[-1].is_contiguous()


@compiled
def test_memory_that_cannot_be_had_is_said(monkeypatch):
    monkeypatch.setattr(native.library, "svp_scan_forward", lambda pointer: 1)
    inputs = [torch.rand(1, 2, 3), torch.rand(1, 2, 3), -torch.rand(3, 4), torch.rand(1, 2, 4), torch.rand(1, 2, 4)]
    with pytest.raises(MemoryError, match="scratch memory"):
        selective_scan(*inputs, kernel="cpu")


@compiled
def test_the_fastest_level_is_the_one_in_use():
    assert native.isa() == native.levels()[-1]


@compiled
def test_every_level_can_be_set(isa):
    assert native.isa() == isa and isa in native.LEVELS


def test_without_the_library_there_are_no_levels(monkeypatch):
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "reason", native.NOT_BUILT)
    assert native.isa() == "" and native.levels() == []
    with pytest.raises(SvpError, match="the C\\+\\+ part was not built") as err:
        native.set_isa("generic")
    assert err.value.kind == "env"


def test_little_work_and_a_forked_child_get_one_thread(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert native.threads(torch.empty(19_999)) == 1 and native.threads(torch.empty(20_000)) == 4
    monkeypatch.setattr(native, "_forked", False)
    native._after_fork()
    assert native.threads(torch.empty(20_000)) == 1


def test_memory_is_kept_only_where_the_system_can_be_asked(monkeypatch):
    monkeypatch.setattr(native.sys, "platform", "win32")
    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: pytest.fail("nothing to load here"))
    assert native.keep_freed_memory() is False


# -- the suite's own guard ---------------------------------------------------------------------------------------------


def test_fresh_memory_holds_nan():
    assert torch.zeros(1).new_empty(5).isnan().all() and torch.zeros(1).new_empty((2, 3)).isnan().all()
    assert torch.zeros(1, dtype=torch.long).new_empty(2).shape == (2,)


def test_our_ops_ask_for_memory_where_the_guard_stands():
    for path in Path(svp.ops.__file__).parent.rglob("*.py"):
        asked = re.findall(r"torch\.empty\w*\(", path.read_text())
        # the first only looks at a dtype, the second measures products into memory of its own
        assert not asked or path.name in ("dispatch.py", "floor.py"), path


@compiled
def test_a_kernel_that_forgets_its_output_is_caught(monkeypatch):
    monkeypatch.setattr(Call, "run", lambda self, name: None)
    x = torch.rand(1, 3, 4, requires_grad=True)
    y = causal_conv1d(x, torch.rand(4, 4), kernel="cpu")
    y.sum().backward()
    assert y.isnan().all() and x.grad.isnan().all()
    z = selective_scan(x, x, -torch.rand(4, 2), torch.rand(1, 3, 2), torch.rand(1, 3, 2), kernel="cpu")
    x.grad = None
    z.sum().backward()
    assert z.isnan().all() and x.grad.isnan().all()
