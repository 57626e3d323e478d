"""Adapters of other programs into adapters of this package, and back: released.py the SVP authors' code, peft.py peft."""

from svp.convert.peft import convert_from_peft, convert_to_peft, is_peft, load_peft, save_peft
from svp.convert.released import convert_adapter, is_published_adapter, load_published

__all__ = [
    "convert_adapter", "convert_from_peft", "convert_to_peft", "is_peft", "is_published_adapter", "load_peft",
    "load_published", "save_peft",
]  # fmt: skip
