import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile, ImageOps

from svp.data.pictures import look, read_picture, shown
from svp.errors import SvpError

# what `read_picture` says of the awkward files: the upright size, or a part of the sentence
AWKWARD = {
    "UPPER.JPG": (96, 64), "animated.gif": (100, 100), "apng.png": (128, 64), "bad_exif.jpg": (200, 200),
    "bad_photoshop_block.jpg": (200, 200), "bg_outside_palette.gif": (1, 1),
    "bomb.gif": "has 4,364,696,535 pixels by its header, at most 178,956,970 are read",
    "broken.png": "begins as PNG but has no valid header", "broken_data.png": "is damaged: unrecognized data stream",
    "cmyk.jpg": (100, 100), "exif_rot3.jpg": (128, 128), "exif_rot5.webp": (128, 128), "exif_rot6.jpg": (128, 128),
    "exif_rot6_photo.jpg": (231, 308), "exif_rot8.jpg": (128, 128), "gray.jpg": (128, 128), "gray16.pgm": (128, 128),
    "gray16.tif": (64, 64), "gray16_trns.png": (64, 64), "gray_alpha_apng.png": (128, 64),
    "huge_1bit.png": "has 400,000,000 pixels by its header", "icc_late.jpg": (10, 10), "idat_after_end.png": (128, 128),
    "indexed.png": (290, 442), "lab.tif": (128, 128), "multipage.tiff": (10, 10),
    "negative_size.ppm": "is not a picture of a known format", "no_extension": (96, 64), "no_palette.gif": (1, 1),
    "one_row.png": (1, 500), "onebit.tif": (256, 4), "palette_trns.png": (64, 64), "plain.webp": (128, 128),
    "png_named.jpg": (96, 64), "progressive.jpg": (320, 213), "qtables16.jpg": (128, 128), "rgb16.tiff": (100, 40),
    "rgba.png": (162, 150), "rgba32.bmp": (127, 64), "rle8.bmp": (128, 128),
    "text.png": "is not a picture of a known format", "truncated.jpg": "is damaged: image file is truncated",
    "truncated.tga": "is damaged: image file is truncated", "zero.jpg": "is empty (0 bytes)",
}  # fmt: skip


def test_every_awkward_file_has_an_answer(shared):
    assert {path.name for path in (shared / "data/awkward").iterdir()} - {"README.md"} == set(AWKWARD)


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_file(shared, name):
    path, want = shared / "data/awkward" / name, AWKWARD[name]
    before = (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))
    if isinstance(want, str):
        with pytest.raises(SvpError) as caught:
            read_picture(path)
        assert want in caught.value.problem and str(path) in caught.value.problem and caught.value.kind == "data"
        assert "\n" not in caught.value.problem
    else:
        picture = read_picture(path)
        assert (picture.mode, picture.size) == ("RGB", want)
        seen = look(path)
        assert (seen.width, seen.height) == want
    assert before == (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, list(warnings.filters))


@pytest.mark.parametrize(
    "name", ["exif_rot3.jpg", "exif_rot5.webp", "exif_rot6.jpg", "exif_rot8.jpg", "lab.tif", "gray16.pgm"]
)
def test_the_same_person_whatever_the_file(shared, name):
    """All of these show one photograph; turned or scaled wrongly they would be far from it (mean error above 40)."""
    plain = np.asarray(read_picture(shared / "data/awkward/plain.webp").convert("L"), dtype=float)
    found = np.asarray(read_picture(shared / "data/awkward" / name).convert("L"), dtype=float)
    assert np.abs(found - plain).mean() < 8


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tiff", "webp"])
def test_orientation_is_applied_once(tmp_path, paint, orientation, ending):
    picture = Image.open(paint(tmp_path / "plain.png", size=(24, 16)))
    exif = picture.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{ending}"
    picture.save(path, exif=exif, **({"lossless": True} if ending == "webp" else {}))
    with Image.open(path) as opened:
        want = ImageOps.exif_transpose(opened).convert("RGB")
    assert np.array_equal(read_picture(path), want)
    assert (look(path).width, look(path).height) == want.size


def test_transparent_pixels_lie_on_white(tmp_path):
    values = np.zeros((1, 3, 4), dtype=np.uint8)
    values[0, :, 0], values[0, :, 3] = 200, (0, 128, 255)  # a red that is hidden, half seen, seen
    Image.fromarray(values, "RGBA").save(tmp_path / "alpha.png")
    assert np.asarray(read_picture(tmp_path / "alpha.png"))[0].tolist() == [
        [255, 255, 255],
        [227, 127, 127],
        [200, 0, 0],
    ]


def test_transparent_values_lie_on_white(tmp_path):
    grey = Image.fromarray(np.array([[7, 90]], dtype=np.uint8))
    grey.save(tmp_path / "grey.png", transparency=7)
    grey.convert("RGB").save(tmp_path / "rgb.png", transparency=(7, 7, 7))
    wide = Image.fromarray(np.array([[300, 257 * 90]], dtype=np.uint16))
    wide.save(tmp_path / "wide.png", transparency=300)
    palette = grey.convert("P")
    palette.save(tmp_path / "palette.png", transparency=palette.getpixel((0, 0)))
    for name in ("grey", "rgb", "wide", "palette"):
        assert np.asarray(read_picture(tmp_path / f"{name}.png"))[0].tolist() == [[255] * 3, [90] * 3], name


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, ending):
    values = np.array([[0, 257, 257 * 128, 65535]], dtype=np.uint16)
    path = tmp_path / f"wide.{ending}"
    Image.fromarray(values).save(path)
    assert np.asarray(read_picture(path))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("values,want", [
    ([[-1.0, 0.0, 1.0]], [0, 128, 255]), ([[5.0, 5.0]], [0, 0]), ([[0.0, float("nan"), 2.0]], [0, 0, 255]),
    ([[0.0, float("inf"), 2.0]], [0, 0, 255]),
])  # fmt: skip
def test_floats_are_stretched(tmp_path, values, want):
    path = tmp_path / "float.tiff"
    Image.fromarray(np.array(values, dtype=np.float32)).save(path)
    assert np.asarray(read_picture(path))[0, :, 0].tolist() == want
    assert "stretched from wide values" in look(path).changes


def test_wide_integers_are_stretched(tmp_path):
    Image.fromarray(np.array([[-10, 0, 10]], dtype=np.int32)).save(tmp_path / "wide.tiff")
    assert np.asarray(read_picture(tmp_path / "wide.tiff"))[0, :, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I", "F", "I;16"]
)
def test_every_mode_becomes_rgb(mode):
    from svp.data.pictures import to_rgb

    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "two.gif", save_all=True, append_images=frames[1:])
    assert read_picture(tmp_path / "two.gif").getpixel((0, 0)) == (255, 0, 0)
    assert "first of several frames" in look(tmp_path / "two.gif").changes


def test_content_wins_over_the_extension(tmp_path, paint):
    png = paint(tmp_path / "a.png")
    for name in ("a.jpg", "a.nef", "a.heic", "a"):
        (tmp_path / name).write_bytes(png.read_bytes())
        assert np.array_equal(read_picture(tmp_path / name), read_picture(png))


FOREIGN = {
    "doc.pdf": (b"%PDF-1.7", "a PDF document"),
    "a.svg": (b"<svg xmlns='x'/>", "an SVG drawing"),
    "b.svg": (b"\xef\xbb\xbf<?xml version='1.0'?>\n<svg/>", "an SVG drawing"),
    "page.jpg": (b"\n<!DOCTYPE html><html>", "a web page"),
    "data.jpg": (b"<?xml version='1.0'?><feed/>", "an XML file"),
    "photo.heic": (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "a HEIC photograph"),
    "photo.jpg": (b"\x00\x00\x00\x18ftypmif1\x00\x00\x00\x00mif1heic", "a HEIC photograph"),
    "canon.cr2": (b"II*\x00\x10\x00\x00\x00CR\x02\x00", "a RAW photograph"),
    "canon.cr3": (b"\x00\x00\x00\x18ftypcrx \x00\x00\x00\x01", "a RAW photograph"),
    "nikon.NEF": (b"MM\x00*\x00\x00\x00\x08", "a RAW photograph"),
    "fuji.raf": (b"FUJIFILMCCD-RAW 0201", "a RAW photograph"),
    "layers.psd": (b"8BPS\x00\x01", "a Photoshop file"),
    "print.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "a PostScript file"),
    "pack.png": (b"PK\x03\x04", "a ZIP archive"),
    "pointer.png": (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_kinds_are_named(tmp_path, name):
    content, words = FOREIGN[name]
    (tmp_path / name).write_bytes(content + bytes(200))
    for read in (read_picture, look):
        with pytest.raises(SvpError, match=words) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in caught.value.problem and "PNG or JPEG" in caught.value.hint


def test_bomb_is_refused_by_its_header(tmp_path):
    """60000 x 60000 pixels in 60 bytes: told before anything is decoded."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"x") + chunk(b"IEND", b"")
    with pytest.raises(SvpError, match=r"bomb\.png has 3,600,000,000 pixels by its header, at most 178,956,970"):
        read_picture(bomb, "bomb.png")


def test_the_limit_can_be_lowered(tmp_path, paint):
    path = paint(tmp_path / "a.png", size=(12, 10))
    assert read_picture(path, max_pixels=120).size == (12, 10)
    with pytest.raises(SvpError, match="has 120 pixels by its header, at most 119 are read"):
        read_picture(path, max_pixels=119)


@settings(max_examples=300)
@given(
    kind=st.sampled_from(["png", "jpeg", "gif", "webp", "tiff", "bmp", "ppm", "tga", "ico"]),
    damage=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    cut=st.integers(0, 2000),
)
def test_damaged_bytes_are_a_picture_or_a_sentence(kind, damage, cut):
    stream = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(noise).save(stream, kind)
    content = bytearray(stream.getvalue()[: 2000 - cut])
    for place, value in damage:
        if place < len(content):
            content[place] = value
    for read in (look, read_picture):
        try:
            read(bytes(content), "x", max_pixels=10_000)
        except SvpError as err:
            assert err.problem.startswith("x ") and "\n" not in err.problem and err.kind == "data"


def test_missing_unreadable_and_irregular_files(tmp_path, paint, monkeypatch):
    with pytest.raises(SvpError, match="does not exist"):
        read_picture(tmp_path / "no.jpg")
    with pytest.raises(SvpError, match="is not a regular file"):
        read_picture(tmp_path)
    with pytest.raises(SvpError, match="cannot be read"):
        read_picture("x" * 300)

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    path = paint(tmp_path / "a.png")
    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(SvpError, match=r"a\.png cannot be read: no permission"):
        read_picture(path)


def test_names_that_cannot_be_printed_are_escaped():
    assert shown(b"a\xff\nb.png".decode("utf-8", "surrogateescape")) == r"a\xff\nb.png"
    assert shown("Ä 😀.png") == "Ä 😀.png"


def test_threads_read_together_and_leave_no_trace(shared):
    """Warnings stay as they were although many threads silence Pillow's at the same moment."""
    path = shared / "data/awkward/bad_exif.jpg"
    want, before, wrong = np.asarray(read_picture(path)), list(warnings.filters), []

    def work():
        for _ in range(20):
            if not np.array_equal(read_picture(path), want):
                wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong and list(warnings.filters) == before
