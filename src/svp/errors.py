"""The one exception a user sees, and the help for mistyped names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_CODES = {"usage": 2}  # every other kind exits with 1


class SvpError(Exception):
    """A problem explained to the person who caused it: `problem` says what is wrong, `hint` what to type.

    kind is one of "usage" (exit 2), "data", "artefact", "env", "run" (exit 1).
    """

    def __init__(self, problem: str, hint: str = "", kind: str = "run"):
        super().__init__(f"{problem}\nhint: {hint}" if hint else problem)
        self.problem, self.hint, self.kind = problem, hint, kind

    def __reduce__(self):  # crosses from a data worker to the main process whole
        return (type(self), (self.problem, self.hint, self.kind))

    @property
    def exit_code(self) -> int:
        return EXIT_CODES.get(self.kind, 1)


def nearest(name: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names most like `name`, best first; empty when nothing is close."""
    known = list(known)
    lower = {k.lower(): k for k in known}
    found = [lower[k] for k in difflib.get_close_matches(name.lower(), lower, n=limit, cutoff=0.6)]
    return found or [k for k in known if name.lower() in k.lower()][:limit]


def unknown(what: str, name: str, known: Iterable[str], listing: str = "") -> SvpError:
    """The error for a name that is not in a table: its nearest relatives, and where all are listed."""
    known = list(known)
    close = nearest(name, known)
    meant = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}" if len(known) <= 20 else ""
    hint = "; ".join(part for part in (meant, f"`{listing}` shows all" if listing else "") if part)
    return SvpError(f"there is no {what} '{name}'", hint, kind="usage")
