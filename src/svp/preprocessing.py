"""How pictures become the numbers a network was trained on: a fact that backbones state, methods may change and data applies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation: shorter side to `resize` (bicubic), centre crop to `crop`, values in 0…1, minus mean, over std.

    crop    (H, W) pixels; what the network sees
    resize  pixels of the shorter side before the crop, or None: max(crop) / 0.875, rounded down as timm does
    exact   True: resize straight to `crop` without keeping the aspect ratio (no crop)
    """

    crop: tuple[int, int]
    resize: int | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: str = "bicubic"
    exact: bool = False

    @property
    def shorter_side(self) -> int:
        """Pixels of the shorter side after the resize."""
        return self.resize if self.resize is not None else int(max(self.crop) / 0.875)

    def but(self, **changes: Any) -> Preprocessing:
        return replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Preprocessing:
        """Raises ValueError, TypeError or KeyError naming what is no preprocessing."""
        for key, length in (("crop", 2), ("mean", 3), ("std", 3)):
            value = values[key]
            if len(value) != length or not all(isinstance(v, (int, float)) for v in value):
                raise ValueError(f"'preprocessing.{key}'")
        sizes = [*values["crop"], *([] if values.get("resize") is None else [values["resize"]])]
        if not all(isinstance(v, int) and v > 0 for v in sizes):
            raise ValueError("'preprocessing.crop' or 'resize'")
        if values.get("interpolation", "bicubic") not in INTERPOLATIONS:
            raise ValueError("'preprocessing.interpolation'")
        fields: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
        return cls(**fields)
