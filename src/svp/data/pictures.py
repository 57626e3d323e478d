"""One picture of any kind to upright RGB, or a sentence that names the file."""

from __future__ import annotations

import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from svp.errors import SvpError

MAX_PIXELS = 178_956_970  # Pillow's own limit: a larger header is taken for a decompression bomb
EXTENSIONS = (
    ".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".avif",
    ".apng", ".jfif",
)  # fmt: skip
FOREIGN = {  # kinds that are not decoded, by how their files begin
    b"%PDF": "a PDF document", b"<svg": "an SVG drawing", b"<?xml": "an SVG drawing or XML file", b"<!DOC": "a web page",
    b"<html": "a web page", b"II*\x00\x10\x00\x00\x00CR": "a RAW photograph", b"FUJIFILM": "a RAW photograph",
}  # fmt: skip
FOREIGN_EXTENSIONS = {
    ".heic": "HEIC", ".heif": "HEIC", ".svg": "SVG", ".pdf": "PDF", ".cr2": "RAW", ".nef": "RAW", ".arw": "RAW",
    ".dng": "RAW", ".raf": "RAW", ".psd": "Photoshop",
}  # fmt: skip


def read_picture(source: str | os.PathLike | bytes, name: str = "", max_pixels: int = MAX_PIXELS) -> Image.Image:
    """A file's path, or encoded bytes with a name for messages -> upright RGB picture, 8 bits a channel.

    EXIF rotation is applied; transparent pixels lie on white; 16-bit values are scaled, not clipped; float values are
    stretched between their extremes; of several frames the first is taken; the content decides, not the extension.
    Raises SvpError (kind "data") naming the file when it is none, is damaged, or has more than max_pixels pixels.
    """
    name = name or str(source if not isinstance(source, bytes) else "picture")
    content = source if isinstance(source, bytes) else _content(Path(source), name)
    if not content:
        raise SvpError(f"{name} is empty (0 bytes)", SKIP, "data")
    _refuse_foreign(content, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # metadata that Pillow finds odd; damage raises
            with Image.open(io.BytesIO(content)) as opened:
                if opened.width * opened.height > max_pixels:
                    raise Image.DecompressionBombError(f"{opened.width} x {opened.height}")
                upright = _upright(_first_frame(opened))
            return to_rgb(upright)
    except Image.DecompressionBombError as err:
        size = str(err).removeprefix("Image size (").split(",")[0].rstrip(")").split(" pixels")[0]
        raise SvpError(
            f"{name} claims {size} pixels, at most {max_pixels:,} are read", "make the picture smaller", "data"
        ) from err
    except Image.UnidentifiedImageError as err:
        raise SvpError(f"{name} is not a picture: its content is of no known format", SKIP, "data") from err
    except (
        OSError,
        SyntaxError,
        ValueError,
        IndexError,
        EOFError,
        MemoryError,
        OverflowError,
        TypeError,
        KeyError,
    ) as err:
        reason = str(err).strip().split("\n")[0] or type(err).__name__
        raise SvpError(f"{name} is damaged: {reason}", SKIP, "data") from err
    except Exception as err:  # Pillow's plug-ins raise kinds of their own (struct.error, zlib.error)
        raise SvpError(f"{name} is damaged: {type(err).__name__}: {err}", SKIP, "data") from err


SKIP = "remove it, or leave bad pictures out with --on-bad-image skip"


def _content(path: Path, name: str) -> bytes:
    try:
        return path.read_bytes()
    except PermissionError as err:
        raise SvpError(f"{name} cannot be read: no permission", f"chmod u+r {name}", "data") from err
    except OSError as err:
        raise SvpError(f"{name} cannot be read: {err.strerror or err}", "check the path", "data") from err


def _refuse_foreign(content: bytes, name: str) -> None:
    head = content[:64].lstrip()
    kind = next((words for start, words in FOREIGN.items() if head.lower().startswith(start.lower())), None)
    if content[4:8] == b"ftyp" and content[8:12] in (b"heic", b"heix", b"mif1", b"msf1", b"heim", b"hevc"):
        kind = "a HEIC photograph"
    if kind:
        raise SvpError(f"{name} is {kind}, not a picture that is read here", "convert it to PNG or JPEG", "data")


def _first_frame(picture: Image.Image) -> Image.Image:
    if getattr(picture, "n_frames", 1) > 1:
        picture.seek(0)
    picture.load()
    return picture


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture) or picture
    except Exception:  # a damaged EXIF block says nothing about the orientation; the pixels are whole
        return picture


def to_rgb(picture: Image.Image) -> Image.Image:
    """Any mode of Pillow -> RGB on white."""
    mode = picture.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        return _wide(picture)
    if mode == "LAB":
        return _lab(picture)
    if mode == "P" and "transparency" in picture.info:
        picture = picture.convert("RGBA")
    elif mode in ("L", "RGB", "1") and "transparency" in picture.info:
        picture = picture.convert("RGBA") if mode != "1" else picture.convert("L").convert("RGBA")
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _wide(picture: Image.Image) -> Image.Image:
    """16-bit grey, 32-bit integers and floats -> 8 bits, scaled; a value named transparent becomes white."""
    values = np.asarray(picture).astype(np.float64)
    hidden = picture.info.get("transparency")
    blank = values == hidden if isinstance(hidden, int) else None
    if picture.mode == "F" or values.max(initial=0) > 65535 or values.min(initial=0) < 0:
        values = _stretched(values)
    else:
        values = values / 257
    grey = np.clip(np.round(values), 0, 255).astype(np.uint8)
    if blank is not None:
        grey[blank] = 255
    return Image.fromarray(grey, "L").convert("RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    return np.nan_to_num((values - low) / (high - low) * 255) if high > low else np.zeros_like(values)


def _lab(picture: Image.Image) -> Image.Image:
    from PIL import ImageCms

    change: Any = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
    out = ImageCms.applyTransform(picture, change)
    assert out is not None
    return out
