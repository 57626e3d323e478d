"""One picture of any kind to upright RGB, or a sentence that names the file."""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from svp.errors import SvpError

ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND"}  # within the last TAIL bytes
TAIL = 64
MAX_PIXELS = 178_956_970  # Pillow's own limit: a larger header is taken for a decompression bomb
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "DIB", "TIFF", "PPM", "AVIF", "JPEG2000", "ICO", "TGA")
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".tga",
    ".jfif", ".jp2", ".apng",
)  # fmt: skip
RAW = (".cr2", ".cr3", ".nef", ".arw", ".dng", ".raf", ".orf", ".rw2", ".pef", ".srw")
FOREIGN_EXTENSIONS = (
    ".heic",
    ".heif",
    ".svg",
    ".pdf",
    ".psd",
    ".eps",
    *RAW,
)  # pictures, but not read: named, not ignored
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")
STARTS = {  # how files begin that are no picture here; compared without regard to case
    b"%pdf": "a PDF document", b"<svg": "an SVG drawing", b"<!doctype svg": "an SVG drawing", b"<!doctype": "a web page",
    b"<html": "a web page", b"8bps": "a Photoshop file", b"%!ps": "a PostScript file", b"pk\x03\x04": "a ZIP archive",
    b"fujifilmccd-raw": "a RAW photograph", b"iiu\x00": "a RAW photograph", b"iiro": "a RAW photograph",
    b"version https://git-lfs": "a Git LFS pointer, the picture itself was not fetched",
}  # fmt: skip
TIFF_STARTS = (b"II*\x00", b"MM\x00*")
MAGIC = {b"\xff\xd8\xff": "JPEG", b"\x89PNG": "PNG", b"GIF8": "GIF", b"BM": "BMP", **dict.fromkeys(TIFF_STARTS, "TIFF")}
CONVERT = "convert it to PNG or JPEG"
SKIP = "remove it, or leave bad pictures out with --on-bad-image skip"
UPRIGHT = {  # EXIF orientation -> what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Look:
    """What a picture's header says: upright size, and in words what reading it will change."""

    width: int
    height: int
    changes: tuple[str, ...] = ()


def read_picture(source: str | os.PathLike | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file's path, or encoded bytes with a name for messages -> upright RGB picture, 8 bits a channel.

    EXIF rotation is applied; transparent pixels lie on white; 16-bit values are scaled, not clipped; float and 32-bit
    values are stretched between their extremes; of several frames the first is taken; the content decides, not the
    extension. Colour profiles are ignored, as in the pictures that backbones were trained on.
    Raises SvpError (kind "data") naming the file when it is none, is damaged, or has more than max_pixels pixels.
    """
    with _opened(source, name, max_pixels) as picture:
        kind = picture.format
        picture.load()
        turn = UPRIGHT.get(_orientation(picture))
        return to_rgb(picture if turn is None else picture.transpose(turn), kind)


def look(source: str | os.PathLike | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Look:
    """The header alone, and whether the file ends as its kind does; raises as `read_picture` does.

    Only a file that does not is decoded: it is cut off, or carries something behind the picture.
    """
    with _opened(source, name, max_pixels) as picture:
        if _may_be_cut(source, picture.format):
            picture.load()
        orientation = _orientation(picture)
        changes = [_mode_words(picture)]
        changes += ["turned upright (EXIF)"] if orientation in UPRIGHT else []
        changes += ["first of several frames"] if getattr(picture, "is_animated", False) else []
        lies = orientation in (5, 6, 7, 8) and picture.format != "TIFF"  # whose size Pillow gives upright
        size = picture.size[::-1] if lies else picture.size
        return Look(*size, tuple(words for words in changes if words))


def shown(path: str | os.PathLike) -> str:
    """A path as a message can print it: line breaks and bytes that are no text are escaped."""
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def is_picture_start(start: bytes) -> bool:
    """Whether a file's first 12 bytes are those of a common picture format."""
    return start.startswith(tuple(MAGIC)) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def _may_be_cut(source: str | os.PathLike | bytes, kind: str | None) -> bool:
    """Whether the last bytes are not those that a whole file of this kind ends with."""
    if kind not in ENDS:
        return False
    if isinstance(source, bytes):
        return ENDS[kind] not in source[-TAIL:]
    with open(source, "rb") as stream:
        stream.seek(max(0, os.path.getsize(source) - TAIL))
        return ENDS[kind] not in stream.read()


# -- opening -----------------------------------------------------------------------------------------------------------


@contextmanager
def _opened(source: str | os.PathLike | bytes, name: str, max_pixels: int) -> Iterator[Image.Image]:
    """Pillow's picture, not yet decoded; whatever goes wrong inside the block becomes a sentence with the name."""
    name = name or (shown(source) if not isinstance(source, bytes) else "the picture")
    limit = min(max_pixels, 2 * (Image.MAX_IMAGE_PIXELS or MAX_PIXELS))
    start = b""
    try:
        with _quiet, _stream(source, name) as stream:
            start = stream.read(512)
            _refuse_foreign(start, name)
            stream.seek(0)
            with Image.open(stream, formats=_formats()) as picture:
                if picture.width * picture.height > limit:
                    raise Image.DecompressionBombError(f"{picture.width * picture.height} pixels")
                yield picture
    except (SvpError, MemoryError):
        raise
    except Image.DecompressionBombError as err:
        count = int((re.findall(r"(\d+) pixels", str(err)) or ["0"])[0])
        problem = f"{name} has {count:,} pixels by its header, at most {limit:,} are read"
        raise SvpError(problem, "make the picture smaller, or remove it", "data") from err
    except UnidentifiedImageError as err:
        if start[4:8] == b"ftyp" and b"avif" in start[8:32] and "AVIF" not in _formats():
            raise SvpError(
                f"{name} is an AVIF picture, which this Pillow cannot read", "pip install -U pillow", "env"
            ) from err
        kind = next((kind for magic, kind in MAGIC.items() if start.startswith(magic)), None)
        what = (
            f"is damaged: it begins as {kind} but has no valid header" if kind else "is not a picture of a known format"
        )
        raise SvpError(f"{name} {what}", SKIP, "data") from err
    except (
        Exception
    ) as err:  # Pillow's plug-ins raise kinds of their own: OSError, SyntaxError, struct.error, zlib.error …
        reason = str(err).strip().split("\n")[0] or type(err).__name__
        raise SvpError(f"{name} is damaged: {reason}", SKIP, "data") from err


def _stream(source: str | os.PathLike | bytes, name: str) -> AbstractContextManager[Any]:
    if isinstance(source, bytes):
        if not source:
            raise SvpError(f"{name} is empty (0 bytes)", SKIP, "data")
        return io.BytesIO(source)
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            raise SvpError(f"{name} is not a regular file", "give a picture file", "data")
        if not status.st_size:
            raise SvpError(f"{name} is empty (0 bytes)", SKIP, "data")
        return open(source, "rb")
    except FileNotFoundError as err:
        raise SvpError(f"{name} does not exist", "check the path", "data") from err
    except PermissionError as err:
        raise SvpError(f"{name} cannot be read: no permission", f"chmod u+r {name}", "data") from err
    except OSError as err:
        of_machine = err.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # no fault of the picture
        hint, kind = ("ulimit -n 4096, or fewer --workers", "env") if of_machine else ("check the path", "data")
        raise SvpError(f"{name[:200]} cannot be read: {err.strerror or err}", hint, kind) from err


def _refuse_foreign(start: bytes, name: str) -> None:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((words for begin, words in STARTS.items() if text.startswith(begin)), None)
    if text.startswith(b"<?xml"):
        kind = "an SVG drawing" if b"<svg" in text else "an XML file"
    if start[4:8] == b"ftyp" and b"avif" not in start[8:32] and any(brand in start[8:32] for brand in HEIC_BRANDS):
        kind = "a HEIC photograph"
    if start[4:12] == b"ftypcrx ":
        kind = "a RAW photograph"
    raw = name.lower().endswith(RAW) or start[8:10] == b"CR"
    if raw and start.startswith(TIFF_STARTS):  # Pillow would take the small preview inside for the picture
        kind = "a RAW photograph"
    if kind:
        raise SvpError(f"{name} is {kind}, which is not read as a picture", CONVERT, "data")


@cache
def _formats() -> tuple[str, ...]:
    """The formats that are read: Pillow knows more, among them one that starts another program (PostScript)."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged EXIF block says nothing about the orientation; the pixels are whole
        return 1


class _Quiet:
    """Pillow's warnings about odd metadata kept silent while any thread is inside; damage still raises.

    `warnings.catch_warnings` alone is not safe among threads: the first to enter saves, the last to leave restores.
    """

    def __init__(self) -> None:
        self.lock, self.inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self.lock:
            self.inside += 1
            if self.inside == 1:
                self.saved = warnings.catch_warnings()
                self.saved.__enter__()
                warnings.filterwarnings("ignore", module=r"PIL\.")

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.inside -= 1
            if self.inside == 0:
                self.saved.__exit__(None, None, None)


_quiet = _Quiet()


# -- colours -----------------------------------------------------------------------------------------------------------


def to_rgb(picture: Image.Image, kind: str | None = None) -> Image.Image:
    """Any mode of Pillow -> RGB on white; kind is the file format where it is known."""
    if _is_wide(picture.mode):
        return _narrowed(picture, kind)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _is_wide(mode: str) -> bool:
    return mode.startswith("I;16") or mode in ("I", "F")


def _is_stretched(mode: str, kind: str | None) -> bool:
    return mode == "F" or (mode == "I" and kind not in ("PNG", "PPM"))  # those two scale their 16 bits themselves


def _narrowed(picture: Image.Image, kind: str | None) -> Image.Image:
    """16-bit grey / 257; floats and 32-bit integers between their extremes; a value named transparent becomes white."""
    values = np.asarray(picture).astype(np.float64)
    hidden = picture.info.get("transparency")
    grey = _stretched(values) if _is_stretched(picture.mode, kind) else values / 257
    grey = np.clip(np.round(grey), 0, 255).astype(np.uint8)
    if isinstance(hidden, int):
        grey[values == hidden] = 255
    return Image.fromarray(grey).convert("RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    """Finite values from 0 to 255, the others 0; a constant picture becomes black."""
    finite = np.isfinite(values)
    low, high = (values[finite].min(), values[finite].max()) if finite.any() else (0.0, 0.0)
    return np.where(finite, (np.where(finite, values, low) - low) / ((high - low) or 1.0) * 255, 0.0)


def _mode_words(picture: Image.Image) -> str:
    mode = picture.mode
    if _is_wide(mode):
        return "stretched from wide values" if _is_stretched(mode, picture.format) else "16-bit"
    if picture.has_transparency_data:
        return "laid on white (transparency)"
    return {"RGB": "", "L": "grey", "P": "palette", "1": "1-bit"}.get(mode, mode)
