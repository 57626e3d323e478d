"""Our backbones under timm's `create_model`; imported when timm is (see svp/__init__.py)."""

from __future__ import annotations

from typing import Any

from timm.models import is_model, register_model

from svp.backbones.create import create_backbone
from svp.registry import BACKBONES

RENAMED = {
    "in_chans": 3,
    "features_only": False,
    "scriptable": None,
    "exportable": None,
    "pretrained_cfg_overlay": None,
}


def _register(name: str) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> Any:
        for key, only in RENAMED.items():
            if kwargs.pop(key, only) not in (only, None):
                raise ValueError(f"{name} takes {key}={only} only")
        for key in ("pretrained_cfg", "cache_dir"):
            kwargs.pop(key, None)
        num_classes = kwargs.pop("num_classes", None)
        net = create_backbone(name, weights="default" if pretrained else None, **kwargs)
        if num_classes is not None and num_classes != net.num_classes:
            net.reset_classifier(num_classes)
        return net.train()

    build.__name__, build.__module__ = name, __name__
    build.__doc__ = f"{name} of svp, as svp.create_backbone makes it."
    globals()[name] = build
    register_model(build)


for _name in BACKBONES.entries():
    if not is_model(_name):  # timm's own ViTs stay timm's
        _register(_name)
