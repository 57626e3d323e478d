"""Looking for pictures below a folder: what counts as one, what is passed over, where links lead."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from svp.data.pictures import EXTENSIONS, FOREIGN_EXTENSIONS, is_picture_start, shown
from svp.data.splits import natural_sorted
from svp.errors import SvpError

IGNORED = ("__macosx", "thumbs.db", "desktop.ini")  # beside all that begins with a dot


@dataclass
class Walk:
    """Walks below folders and counts what it passes over.

    skip   a file that cannot be read is listed in `bad`, path and why, instead of being an error
    """

    skip: bool = False
    hidden: int = 0
    others: int = 0
    outside: int = 0
    told: list[str] = field(default_factory=list)
    bad: dict[str, str] = field(default_factory=dict)

    def folders(self, folder: Path) -> list[str]:
        """Names of the folders inside, in natural order."""
        return natural_sorted([p.name for p in self.listed(folder) if p.is_dir()])

    def pictures(self, folder: Path) -> list[str]:
        """All pictures in a folder and below, in natural order; links are followed, a loop is an error."""
        found = self._below(folder, tuple(_identity(above) for above in (folder, *folder.absolute().parents)))
        order = natural_sorted([os.path.relpath(path, folder) for path in found])
        return [os.path.join(folder, name) for name in order]

    def loose(self, folder: Path) -> list[Path]:
        """The pictures in a folder itself."""
        return [p for p in self.listed(folder) if p.is_file() and _is_picture(p)]

    def listed(self, folder: Path, count: bool = False) -> list[Path]:
        """What a folder holds, hidden entries left out (and counted, if asked)."""
        try:
            entries = sorted(folder.iterdir())
        except PermissionError as err:
            raise SvpError(
                f"{shown(folder)} cannot be read: no permission", f"chmod u+rx {shown(folder)}", "data"
            ) from err
        except OSError as err:
            raise SvpError(f"{shown(folder)} cannot be read: {err.strerror}", "check the folder", "data") from err
        plain = [p for p in entries if not p.name.startswith(".") and p.name.lower() not in IGNORED]
        self.hidden += (len(entries) - len(plain)) if count else 0
        return plain

    def count_file(self, path: Path) -> None:
        """Count a file that lies beside class folders."""
        if _is_picture(path):
            self.outside += 1
        else:
            self.others += 1

    def notes(self) -> list[str]:
        kinds = (
            (self.hidden, "hidden files and folders"),
            (self.others, "files that are no pictures"),
            (self.outside, "pictures outside of any class folder"),
        )
        return [f"ignored: {count} {what}" for count, what in kinds if count] + self.told

    def _below(self, folder: Path, above: tuple[tuple[int, int], ...]) -> list[str]:
        found: list[str] = []
        for entry in self.listed(folder, count=True):
            try:
                if entry.is_dir():
                    here = _identity(entry)
                    if here in above:
                        self._refuse(
                            entry, f"{shown(entry)} is a link that leads back to a folder above it", "remove the link"
                        )
                    else:
                        found += self._below(entry, (*above, here))
                elif not entry.exists():
                    self._refuse(entry, f"{shown(entry)} is a broken link", "remove it")
                elif _is_picture(entry):
                    found.append(str(entry))
                else:
                    self.others += 1
            except OSError as err:  # a link that points to itself, a device that went away
                self._refuse(entry, f"{shown(entry)} cannot be read: {err.strerror or err}", "remove it")
        return found

    def _refuse(self, path: Path, problem: str, hint: str) -> None:
        if not self.skip:
            raise SvpError(problem, hint, "data")
        self.bad[str(path)] = problem


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def _is_picture(path: Path) -> bool:
    """By its extension; without one, by how it begins."""
    ending = path.suffix.lower()
    if ending or not path.is_file():
        return path.is_file() and ending in (*EXTENSIONS, *FOREIGN_EXTENSIONS)
    try:
        with path.open("rb") as f:
            return is_picture_start(f.read(12))
    except OSError:
        return False
