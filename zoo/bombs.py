"""Files that are small and take gigabytes or minutes to decode: found before the decoders see them.

Pillow and tifffile bound much by themselves (texts of a PNG, strips that libtiff decodes); here is what they don't. No
honest file comes near these limits. Each function reads a file without decoding it, in less than a second, raises
ValueError where there is too much of something, and leaves what is merely damaged to the decoders.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from typing import BinaryIO

MAX_PARTS = 4096  # parts of a file beside its pixels; Pillow takes microseconds and 100 bytes for each
MAX_DIRECTORIES = 1024  # of a TIFF: pages, thumbnails, levels of a pyramid
MAX_SCANS = 100  # of a JPEG; a decoder goes over the whole image in each (libtiff has the same limit)
MAX_RUNS = 4 << 20  # bytes of run lengths, which Pillow decodes in Python
MAX_PADDING = 16 << 20  # bytes; tiles may be larger than the image

_EXIF = b"Exif\0\0"
_TYPE_BYTES = (1, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 1, 1, 8, 8, 8)  # of a value of TIFF types 0 to 18


def check_png(file: BinaryIO) -> None:
    """Refuse a PNG of very many chunks that aren't pixels, or of hardly any."""
    file.seek(8)
    parts = 0
    while len(head := file.read(8)) == 8 and head[4:] != b"IEND":
        length = int.from_bytes(head[:4])
        parts += head[4:] != b"IDAT" or length < 256
        if parts > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} chunks beside its pixels")
        file.seek(length + 4, 1)


def check_jpeg(file: BinaryIO) -> None:
    """Refuse a JPEG of very many segments or scans, or whose EXIF data `check_tiff` refuses."""
    data = file.read()
    if data.count(b"\xff\xda") > MAX_SCANS:  # within pixels, ff is followed by 00
        raise ValueError(f"more than {MAX_SCANS} scans")
    at, parts, exif = 2, 0, b""
    while data[at : at + 1] == b"\xff" and (kind := data[at + 1 : at + 2]) != b"\xda":
        parts += 1
        if parts > MAX_PARTS:
            raise ValueError(f"more than {MAX_PARTS} segments")
        if kind == b"\xff":  # padding
            at += 1
            continue
        body = data[at + 4 : at + 2 + int.from_bytes(data[at + 2 : at + 4])]
        if kind == b"\xe1" and body.startswith(_EXIF):  # Pillow joins several of them
            exif += body.removeprefix(_EXIF)
        at += 4 + len(body)
    if exif:
        check_tiff(io.BytesIO(exif))


def check_tiff(file: BinaryIO) -> None:
    """Refuse a TIFF, or EXIF data, of very many directories (or a ring of them) or whose tags share their values."""
    size = file.seek(0, 2)
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    number, entry, offset, start = ("Q", "HHQQ", "Q", 8) if big else ("H", "HHII", "I", 4)
    try:
        (at,) = struct.unpack_from(order + offset, head, start)
        for _ in range(MAX_DIRECTORIES):
            if not at:
                return
            file.seek(at)
            (count,) = struct.unpack(order + number, file.read(struct.calcsize(number)))
            if count > MAX_PARTS:
                raise ValueError(f"more than {MAX_PARTS} tags")
            tags = file.read(count * struct.calcsize(order + entry))
            values = 0
            for _, kind, length, _ in struct.iter_unpack(order + entry, tags):
                values += min(length * (_TYPE_BYTES[kind] if kind < len(_TYPE_BYTES) else 1), size)
            if values > 4 * size:  # the length of one tag may be nonsense
                raise ValueError("tags that are larger than the file")
            (at,) = struct.unpack(order + offset, file.read(struct.calcsize(offset)))
    except struct.error:  # it ends too early
        return
    raise ValueError(f"more than {MAX_DIRECTORIES} pages")


def check_deflate(segments: Iterable[bytes], expected: int) -> None:
    """Refuse compressed strips or tiles that expand to far more than the pixels that they stand for.

    Args:
        expected: bytes of all pixels.
    """
    found = 0
    for segment in segments:
        stream = zlib.decompressobj()
        while segment and not stream.eof:
            found += len(stream.decompress(segment, 1 << 20))
            if found > 4 * expected + MAX_PADDING:
                raise ValueError("strips that expand to more than the image")
            segment = stream.unconsumed_tail
