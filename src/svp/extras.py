"""What is installed: versions, and packages that only some features need."""

from __future__ import annotations

import importlib
import importlib.metadata
from types import ModuleType

from svp.errors import SvpError


def version(distribution: str) -> str | None:
    """The installed version, read without importing anything; None: absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def own_version() -> str:
    """That of this package, or "source" where it is only on the path."""
    return version("svp-vision") or "source"


def need(package: str, *, extra: str, why: str) -> ModuleType:
    """Import `package`, or say in one sentence which extra brings it."""
    try:
        return importlib.import_module(package)
    except ImportError as err:
        raise SvpError(
            f'{why} needs the package "{package}"', f'pip install "svp-vision[{extra}]"', kind="env"
        ) from err
