"""Adapt a pre-trained Vision Mamba or ViT to your own pictures with Selective Visual Prompting."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svp import ops
    from svp.backbones.base import Backbone
    from svp.backbones.create import create_backbone
    from svp.data.protocols import Protocol, list_protocols
    from svp.data.sources import list_tasks, open_data
    from svp.data.splits import Split, Splits
    from svp.errors import SvpError
    from svp.methods.base import Method, Phase
    from svp.model import AdaptedModel, Prediction, adapt, load, predict
    from svp.registry import list_backbones, list_methods
    from svp.seams import Seams
    from svp.training.evaluate import Evaluation, evaluate
    from svp.training.loop import fit
    from svp.training.recipe import Recipe, list_recipes
    from svp.training.run import Run

PUBLIC = {  # name -> the file it lives in; loaded on first use, so that `import svp` costs nothing
    "create_backbone": "svp.backbones.create",
    "adapt": "svp.model",
    "load": "svp.model",
    "predict": "svp.model",
    "AdaptedModel": "svp.model",
    "Prediction": "svp.model",
    "open_data": "svp.data.sources",
    "fit": "svp.training.loop",
    "evaluate": "svp.training.evaluate",
    "Recipe": "svp.training.recipe",
    "Run": "svp.training.run",
    "Evaluation": "svp.training.evaluate",
    "list_backbones": "svp.registry",
    "list_methods": "svp.registry",
    "list_tasks": "svp.data.sources",
    "list_protocols": "svp.data.protocols",
    "list_recipes": "svp.training.recipe",
    "Backbone": "svp.backbones.base",
    "Method": "svp.methods.base",
    "Phase": "svp.methods.base",
    "Seams": "svp.seams",
    "Protocol": "svp.data.protocols",
    "Split": "svp.data.splits",
    "Splits": "svp.data.splits",
    "SvpError": "svp.errors",
}
ROOMS = ("ops",)  # rooms that are used whole: svp.ops.selective_scan
__all__ = [*PUBLIC, *ROOMS]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("svp-vision")
    if name in ROOMS:
        return importlib.import_module(f"svp.{name}")
    if name not in PUBLIC:
        raise AttributeError(f"module 'svp' has no attribute '{name}'")
    value = getattr(importlib.import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*PUBLIC, *ROOMS, "__version__"])


# -- timm.create_model("vim_small") works after `import svp`, which imports neither timm nor torch ----------------------

REGISTRY = "svp.backbones.timm_registry"


class _WhenTimmComes(importlib.abc.MetaPathFinder):
    """Lets timm be imported as ever, then registers our backbones with it and goes away; who only looks for it finds it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm":
            return None
        sys.meta_path.remove(self)  # the search below is timm's own
        try:
            spec = importlib.util.find_spec(name)
        finally:
            sys.meta_path.insert(0, self)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def and_then_register(module: Any) -> None:
            execute(module)
            sys.meta_path.remove(self)
            importlib.import_module(REGISTRY)

        spec.loader.exec_module = and_then_register  # type: ignore[method-assign]
        return spec


if "timm" in sys.modules:
    importlib.import_module(REGISTRY)
else:
    sys.meta_path.insert(0, _WhenTimmComes())
