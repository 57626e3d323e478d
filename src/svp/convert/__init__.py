"""Files of other programs into files of this package: released.py adapters of the SVP authors' code, peft.py peft's (and back),
weights.py backbones."""

from svp.convert.peft import convert_from_peft, convert_to_peft, is_peft, load_peft, save_peft
from svp.convert.released import convert_adapter, is_published_adapter, load_published
from svp.convert.weights import convert_checkpoint

__all__ = [
    "convert_adapter", "convert_checkpoint", "convert_from_peft", "convert_to_peft", "is_peft", "is_published_adapter",
    "load_peft", "load_published", "save_peft",
]  # fmt: skip
