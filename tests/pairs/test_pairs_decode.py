"""Decoding against Pillow, and every kind of broken picture."""

import io
import struct
import zlib

import numpy as np
import pytest
import simplejpeg
from pairs_made import picture
from PIL import Image, ImageOps

from cutline.errors import DataError
from cutline.pairs import BadPicture
from cutline.pairs.decode import decode
from cutline.pairs.headers import HEAD, picture_size


def by_pillow(data: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


def saved(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_agrees_with_pillow(form, mode):
    data = picture(3, form, (61, 37), mode)
    got = decode(data)
    assert (got.shape, got.dtype) == ((37, 61, 3), np.uint8)
    assert got.flags.c_contiguous
    np.testing.assert_allclose(got.astype(int), by_pillow(data), atol=3 if form == "JPEG" else 0)


@pytest.mark.parametrize("min_size", [None, 1, 40, 64, 96, 127, 128, 200, 5000])
def test_scaled_decoding_is_the_smallest_that_suffices(min_size):
    """n/8 of 600 × 256 for n = 1 … 8: the short side must reach min_size, and one n less must not."""
    got = decode(picture(0, size=(600, 256)), min_size=min_size)
    sides = [(-(-256 * n // 8), -(-600 * n // 8)) for n in range(1, 9)]
    expected = next((s for s in sides if s[0] >= (min_size or 256)), sides[-1])
    assert got.shape[:2] == expected


def test_scaled_decoding_keeps_the_picture():
    data = picture(0, size=(512, 256))
    small = np.asarray(Image.fromarray(decode(data)).resize((128, 64), Image.Resampling.BOX)).astype(int)
    assert np.abs(decode(data, min_size=64).astype(int) - small).mean() < 2


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(form, orientation):
    exif = Image.Exif()
    exif[0x010F], exif[0x0112] = "maker", orientation
    data = picture(5, form, (40, 24), exif=exif)
    np.testing.assert_allclose(decode(data).astype(int), by_pillow(data), atol=3)
    assert decode(data).shape == ((40, 24, 3) if orientation >= 5 else (24, 40, 3))
    height, width, _ = decode(data).shape
    assert picture_size(data[:HEAD], lambda at, n: data[at : at + n]) == (width, height)


def test_cmyk_comes_out_in_the_right_colours():
    for data in (picture(2, "JPEG", (32, 32), "CMYK", quality=95), picture(2, "TIFF", (32, 32), "CMYK")):
        assert np.abs(decode(data).astype(int) - decode(picture(2, "PNG", (32, 32)))).mean() < 6
    red = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG")
    assert tuple(decode(red)[8, 8]) > (240, 10, 10)
    assert decode(red)[8, 8, 1:].max() < 15


def test_sixteen_bits_are_scaled_and_not_clipped():
    ramp = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)
    for form in ("PNG", "TIFF"):
        got = decode(saved(Image.fromarray(ramp), form))
        np.testing.assert_array_equal(got[..., 0], np.rint(ramp / 257).astype(np.uint8))
    rgb = b"".join(b"\0" + struct.pack(">9H", *([0, 32768, 65535] * 3)) for _ in range(2))  # Pillow cannot write this
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 3, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rgb)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n"
    png += b"".join(struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in chunks)
    assert decode(png).tolist() == [[[0, 128, 255]] * 3] * 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_laid_over_white(mode):
    image = Image.new("RGBA", (8, 8), (200, 200, 200, 0))
    image.paste((10, 10, 10, 255), (0, 0, 4, 8))
    data = saved(image.convert("LA").convert("RGBA").quantize(4) if mode == "P" else image.convert(mode), "PNG")
    got = decode(data)
    assert got[4, 6].tolist() == [255, 255, 255]
    assert got[4, 1].tolist() == [10, 10, 10]


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    for form in ("GIF", "WEBP"):
        data = saved(frames[0], form, save_all=True, append_images=frames[1:], duration=100, lossless=True)
        assert decode(data)[0, 0].tolist() == [255, 0, 0] or form == "WEBP"
        np.testing.assert_allclose(decode(data)[0, 0], [255, 0, 0], atol=4)


def reason(data: bytes) -> str:
    with pytest.raises(BadPicture) as e:
        decode(data)
    assert isinstance(e.value, DataError)
    return e.value.reason


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.5, 0.9])
def test_truncated_pictures_raise(form, part):
    options = {"progressive": True} if form == "JPEG" and part == 0.5 else {}
    data = picture(1, form, (200, 160), **options)
    assert reason(data[: int(len(data) * part)]) in ("truncated", "broken")


def test_a_jpeg_missing_only_its_end_mark_is_truncated():
    assert reason(picture(1, size=(200, 160))[:-2]) == "truncated"


def test_a_cmyk_jpeg_that_is_cut_off_raises_too():
    data = picture(1, size=(200, 160), mode="CMYK")
    assert reason(data[: len(data) // 2]) == "truncated"


def test_broken_bytes_have_reasons(monkeypatch):
    assert reason(b"") == "empty"
    assert reason(b"<html>not found</html>") == "not a picture"
    assert reason(b"\xff\xd8\xff" + bytes(100)) in ("broken", "not a picture", "truncated")
    flipped = bytearray(picture(0, "PNG", (64, 64)))
    flipped[60] ^= 0xFF
    assert reason(bytes(flipped)) == "broken"
    assert reason(saved(Image.fromarray(np.zeros((4, 4), np.float32)), "TIFF")) == "broken"


def test_decompression_bombs_are_refused_before_decoding(monkeypatch):
    huge = bytearray(picture(0))
    at = huge.find(b"\xff\xc0")
    huge[at + 5 : at + 9] = struct.pack(">HH", 20_000, 20_000)
    assert reason(bytes(huge)) == "bomb"
    png = bytearray(picture(0, "PNG"))
    for side in (11_000, 60_000):  # over our limit, and over Pillow's own
        png[16:24] = struct.pack(">II", side, side)
        png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))
        assert reason(bytes(png)) == "bomb"


def test_a_mislabelled_picture_is_decoded_by_its_content():
    np.testing.assert_array_equal(decode(picture(4, "PNG")), by_pillow(picture(4, "PNG")))


def test_damaged_but_whole_jpegs_decode_as_pillow_does():
    """Junk between the segments makes libjpeg warn; the picture is there."""
    data = picture(6, size=(64, 64))
    junk = data[:20] + b"\0\0" + data[20:]
    with pytest.raises(ValueError, match="xtraneous"):
        simplejpeg.decode_jpeg(junk)
    assert decode(junk).shape == (64, 64, 3)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM"])
def test_kinds_are_told_by_the_first_bytes(form):
    from cutline.pairs.headers import kind_of

    assert kind_of(picture(0, form)[:32]) == form.lower()
    assert kind_of(b"text") is None
