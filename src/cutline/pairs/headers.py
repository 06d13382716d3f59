"""Width, height and kind of a picture from its first bytes, without decoding it.

`picture_size` follows the segments of a JPEG and the chunks of PNG and WebP, and reads the fixed header fields of GIF
and BMP. It asks for bytes through a callable, so that the tar indexer can serve it from its read window. Sizes are those
of the upright picture: an EXIF orientation that turns the picture by a quarter swaps them, as `cutline.pairs.decode` does
with the pixels.
"""

import struct
from collections.abc import Callable

Read = Callable[[int, int], bytes]  # (offset in the picture, length) -> up to that many bytes
PICTURES = frozenset(
    ["jpg", "jpeg", "jpe", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif"]
)  # extensions, lower case
HEAD = 1024  # bytes that hold the size of nearly every picture
MOST = 2**31 - 1  # pixels of a side that a table can hold
_SIDES = struct.Struct(">HH")
_BARE = frozenset([0x01, *range(0xD0, 0xD9)])  # JPEG markers without a length
_FRAMES = frozenset([*range(0xC0, 0xD0)]) - {0xC4, 0xC8, 0xCC}


def kind_of(head: bytes) -> str | None:
    """By the magic bytes of a picture: jpeg, png, webp, gif, bmp, avif, ppm or tiff; None for anything else."""
    if head[:3] == b"\xff\xd8\xff":
        return "jpeg"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[:4] == b"GIF8":
        return "gif"
    if head[:2] == b"BM":
        return "bmp"
    if head[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    if head[:2] in (b"P5", b"P6"):
        return "ppm"
    return "tiff" if head[:4] in (b"II*\0", b"MM\0*") else None


def picture_size(head: bytes, read: Read) -> tuple[int, int] | None:
    """(width, height) in pixels of the upright picture, or None where the header does not say, or says nonsense.

    head: the first `HEAD` bytes of the picture; read gives what lies further on, which few pictures need.
    """
    size = _told(head, read)
    return size if size and 0 < size[0] <= MOST and 0 < size[1] <= MOST else None


def _told(head: bytes, read: Read) -> tuple[int, int] | None:
    kind = kind_of(head)
    try:
        if kind == "jpeg":
            return _jpeg(head, read)
        if kind == "png":
            width, height = struct.unpack(">II", head[16:24])
            return (height, width) if _turned(head, read, 8, png=True) else (width, height)
        if kind == "gif":
            return struct.unpack("<HH", head[6:10])
        if kind == "bmp":
            width, height = struct.unpack("<ii", head[18:26])
            return width, abs(height)
        if kind == "webp":
            return _webp(head, read)
    except (struct.error, IndexError):  # the bytes end within the header
        return None
    return None


def _jpeg(head: bytes, read: Read) -> tuple[int, int] | None:
    pos, base, turned = 2, 0, False  # head[pos] is byte base + pos of the picture
    while True:
        if pos + 9 > len(head):
            head, base, pos = read(base + pos, HEAD), base + pos, 0
        if head[pos] != 0xFF:
            return None
        marker = head[pos + 1]
        if marker in _FRAMES:
            height, width = _SIDES.unpack_from(head, pos + 5)
            if not (width and height):
                return None
            return (height, width) if turned else (width, height)
        if marker == 0xFF:  # a fill byte
            pos += 1
        elif marker in _BARE:
            pos += 2
        elif marker in (0xD9, 0xDA):
            return None
        else:
            length = head[pos + 2] << 8 | head[pos + 3]
            if marker == 0xE1 and head[pos + 4 : pos + 8] == b"Exif":
                turned = orientation(read(base + pos + 10, min(length, 4096))) >= 5
            pos += 2 + length


def _webp(head: bytes, read: Read) -> tuple[int, int] | None:
    chunk = head[12:16]
    if chunk == b"VP8X":
        width, height = int.from_bytes(head[24:27], "little") + 1, int.from_bytes(head[27:30], "little") + 1
        return (height, width) if head[20] & 8 and _turned(head, read, 12, png=False) else (width, height)
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", head[26:30])
        return width & 0x3FFF, height & 0x3FFF
    if chunk == b"VP8L":
        bits = struct.unpack("<I", head[21:25])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None


def _turned(head: bytes, read: Read, at: int, png: bool) -> bool:
    """Whether the EXIF chunk of a PNG (one before its pixels) or a WebP turns the picture by a quarter.

    at: where the first chunk begins.
    """
    while True:
        chunk = head[at : at + 8] if at + 8 <= len(head) else read(at, 8)
        if len(chunk) < 8:
            return False
        name, length = (chunk[4:], int.from_bytes(chunk[:4], "big")) if png else struct.unpack("<4sI", chunk)
        if name.upper() == b"EXIF":
            return orientation(read(at + 8, min(length, 4096)).removeprefix(b"Exif\0\0")) >= 5
        if name in (b"IDAT", b"IEND"):
            return False
        at += 8 + length + (4 if png else length % 2)  # a checksum; an even length


def orientation(tiff: bytes) -> int:
    """The EXIF orientation, 1–8, from the TIFF block of an Exif segment; 1 where there is none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 10:
        return 1
    start = struct.unpack(order + "I", tiff[4:8])[0]
    if start + 2 > len(tiff):
        return 1
    (count,) = struct.unpack(order + "H", tiff[start : start + 2])
    for at in range(start + 2, min(start + 2 + 12 * count, len(tiff) - 11), 12):
        tag, _, _, value = struct.unpack(order + "HHIH", tiff[at : at + 10])
        if tag == 0x0112:
            return int(value) if 1 <= value <= 8 else 1
    return 1


def jpeg_orientation(data: bytes) -> int:
    """The EXIF orientation, 1–8, of an encoded JPEG; 1 where it has none."""
    at = data.find(b"Exif\0\0", 0, 4096)
    return orientation(data[at + 6 : at + 6 + 4096]) if at > 0 and data.find(b"\xff\xe1", 0, at) > 0 else 1
