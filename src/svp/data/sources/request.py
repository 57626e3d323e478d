"""What a source is asked for, and the folder it is asked for in."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from svp.data.pictures import MAX_PIXELS, shown
from svp.data.protocols import DEFAULT, Protocol
from svp.errors import SvpError, nearest

COUNTED = 1000  # a label below needs no proof that it numbers a class
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar")


@dataclass(frozen=True)
class Request:
    """The source as it was typed, what follows its kind (a path), and how it is to be opened.

    whole  to be measured, not trained on: see `open_whole`
    """

    source: str
    rest: str = ""
    protocol: Protocol = DEFAULT
    seed: int = 0
    skip: bool = False
    max_pixels: int = MAX_PIXELS
    whole: bool = False

    @property
    def reading(self) -> dict[str, object]:
        return {"on_bad_image": "skip" if self.skip else "error", "max_pixels": self.max_pixels, "seed": self.seed}

    def folder(self) -> Path:
        """The folder that is meant, or an error with its nearest existing parent."""
        path = Path(self.rest).expanduser()
        try:
            if path.is_dir():
                os.scandir(path).close()  # may it be listed,
                os.stat(os.path.join(path, "."))  # and looked into?
                return path
            if path.exists():
                hint = "unpack it first" if path.suffix.lower() in ARCHIVES else "folder:DIR with DIR/class/picture.jpg"
                raise SvpError(f"{shown(path)} is a file, expected a folder", hint, "data")
            parent = next(p for p in path.absolute().parents if p.is_dir())
            siblings = [p.name for p in parent.iterdir() if p.is_dir()]
        except PermissionError as err:
            raise SvpError(f"{shown(path)} cannot be read: no permission", f"chmod u+rx {shown(path)}", "data") from err
        except (OSError, ValueError) as err:
            reason = getattr(err, "strerror", None) or str(err)
            raise SvpError(
                f"{shown(path)[:200]} is no path that can be read: {reason}", "check the path", "data"
            ) from err
        close = nearest(path.name, siblings) if parent == path.absolute().parent else []
        meant = f"did you mean {shown(parent / close[0])}? " if close else ""
        raise SvpError(
            f"{shown(path)} does not exist", f"{meant}the nearest folder that exists is {shown(parent)}", "data"
        )
