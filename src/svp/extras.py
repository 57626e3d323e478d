"""Packages that only some features need."""

from __future__ import annotations

import importlib
from types import ModuleType

from svp.errors import SvpError


def need(package: str, *, extra: str, why: str) -> ModuleType:
    """Import `package`, or say in one sentence which extra brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise SvpError(
            f'{why} needs the package "{package}"', f'pip install "svp-vision[{extra}]"', kind="env"
        ) from err
