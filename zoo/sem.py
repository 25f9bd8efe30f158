"""What an SEM tool adds to its images: the size of a pixel in its tags, and the info bar at the bottom.

The tags are read by the published facts of each format (tag numbers, keys, units): Zeiss 34118 (SmartSEM), FEI and
Thermo 34680 and 34682 (INI text), Phenom 34683 (XML), TESCAN 50431 or an .hdr beside the image, Hitachi and JEOL a .txt
beside it. The resolution that every TIFF has is not read: SEM tools write the dots per inch of a screen there. A tag
that is damaged, or that speaks of an image of another width (it was cut or resized later), says nothing.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from zoo.errors import ZooError
from zoo.image import read_bytes, read_image

if TYPE_CHECKING:
    import PIL.Image

    Source = str | os.PathLike | bytes | dict | PIL.Image.Image | np.ndarray

TALLEST = 0.25  # of the image's height: what is higher is no info bar
LOWEST = 7  # rows: below it no text can be read
_NM = {"pm": 1e-3, "nm": 1.0, "um": 1e3, "µm": 1e3, "μm": 1e3, "mm": 1e6, "m": 1e9}
_PHENOM_SIDE = r'<pixel(Width|Height)\s+unit="([^"]*)"\s*>\s*([^<\s]+)'
_TEXT_BYTES = 1 << 16  # no text beside an image is longer


class Sem(NamedTuple):
    """An image and what its tool says of it."""

    image: np.ndarray  # (H, W) or (H, W, 3) uint8, uint16 or float32
    pixel_nm: float | None  # side of a pixel; None where unknown, or where pixels are not square
    bar: int  # first row of the info bar as the tags say; H where they say none or nothing
    vendor: str | None


class _Told(NamedTuple):
    """What tags say, before it is held against the image."""

    vendor: str
    x: float | None = None  # nm
    y: float | None = None
    size: tuple[int, int] | None = None  # (width, height) of the scan, without the bar
    strip: int | None = None  # height of the bar


def read_sem(source: Source) -> Sem:
    """Decode one image and read what its tool noted: the size of a pixel and where the info bar begins.

    Args:
        source: as for `zoo.image.read_image`. Tags are read from paths and bytes, texts beside the image from paths.

    Returns:
        Sem. `pixel_nm` is None where x and y differ by more than 0.5 % (tilt-corrected scans), as no one number holds.
        An image that its orientation tag turns has no bar from the tags, as these speak of the stored rows.

    Raises:
        ZooError: as `read_image`. Damaged or unknown tags never raise.
    """
    path, data = _file_of(source)
    if data is None:
        image = read_image(source)
        return Sem(image, None, len(image), None)
    image = read_image({"path": path, "bytes": data})
    height, width = image.shape[:2]
    told, turned = None, False
    with contextlib.suppress(Exception):  # whatever tags hold, the image counts
        told, turned = _from_tiff(data)
    if told is None and path is not None:
        with contextlib.suppress(Exception):
            told = _from_text(Path(path))
    if told is None:
        return Sem(image, None, height, None)
    if told.size is not None and told.size[0] != width:
        return Sem(image, None, height, told.vendor)
    rows = told.strip or (height - told.size[1] if told.size is not None else 0)
    known = not turned and 0 < rows <= TALLEST * height
    return Sem(image, _square(told.x, told.y), height - rows if known else height, told.vendor)


def _file_of(source: Source) -> tuple[str | None, bytes | None]:
    """Path and bytes of what is a file, read once."""
    if isinstance(source, bytes | bytearray | memoryview):
        return None, bytes(source)
    if isinstance(source, str | os.PathLike):
        return os.fspath(source), read_bytes(source)
    if isinstance(source, dict):
        path, data = source.get("path"), source.get("bytes")
        if data is None and path is not None:
            data = read_bytes(path)
        return path and os.fspath(path), data
    return None, None


def _square(x: float | None, y: float | None) -> float | None:
    """The side of a pixel, where both sides are one number; NaN fails each comparison."""
    if x is None or not 0 < x < np.inf:
        return None
    return x if y is None or abs(x - y) <= 0.005 * x else None


def _number(value: object) -> float | None:
    try:
        return float(str(value).strip().replace(",", "."))
    except ValueError:
        return None


def _metres(value: object) -> float | None:
    """Metres -> nm."""
    number = _number(value)
    return None if number is None else 1e9 * number


def _lengths(text: str) -> list[float]:
    """Lengths with a unit in a text, as "2.5um" or "12.3 nm 9.2 nm" -> nm."""
    found = re.findall(r"(\d+(?:[.,]\d+)?(?:[eE][+-]?\d+)?)\s*(pm|nm|um|µm|μm|mm|m)\b", text)
    return [_number(value) * _NM[unit] for value, unit in found]


def _size(text: str) -> tuple[int, int] | None:
    """ "1280x960", "1024 * 768" or "1280 960" -> (width, height)."""
    found = re.search(r"(\d+)\s*[xX*\s]\s*(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def _from_tiff(data: bytes) -> tuple[_Told | None, bool]:
    """What the tags of a TIFF say, and whether its orientation tag turns it."""
    import tifffile

    if data[:2] not in (b"II", b"MM"):
        return None, False
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page = file.pages[0]
        orientation = page.tags.get(274)
        turned = orientation is not None and orientation.value != 1
        told = None
        with contextlib.suppress(Exception):
            if page.is_sem:
                told = _zeiss(file.sem_metadata, page.imagewidth)
            elif page.is_fei:
                told = _fei(file.fei_metadata)
            elif 34683 in page.tags:
                told = _phenom(_tag_text(page.tags[34683].value))
            elif 50431 in page.tags:
                told = _tescan(_tag_text(page.tags[50431].value))
    return told, turned


def _tag_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")  # in which binary data is a text too


def _zeiss(tags: dict, width: int) -> _Told:
    """The named size, or number 3 of the unnamed ones: metres of a pixel of a screen of 1024. No tag has the bar."""
    size = _size(tags["dp_image_store"][1]) if "dp_image_store" in tags else None
    named = tags.get("ap_image_pixel_size", ())
    if len(named) == 3 and named[2] in _NM:
        return _Told("Zeiss", _number(named[1]) * _NM[named[2]], size=size)
    unnamed = tags.get("", ())
    return _Told("Zeiss", _metres(unnamed[3] * 1024 / width) if len(unnamed) > 3 else None, size=size)


def _fei(tags: dict) -> _Told:
    """Metres; ResolutionY is the scan's height, to which the bar is added."""
    scan, image = tags.get("Scan", {}), tags.get("Image", {})
    known = "ResolutionX" in image and "ResolutionY" in image
    size = (int(image["ResolutionX"]), int(image["ResolutionY"])) if known else None
    strip = None if known else int(tags.get("PrivateFei", {}).get("DatabarHeight", 0))
    return _Told("FEI", _metres(scan.get("PixelWidth")), _metres(scan.get("PixelHeight")), size, strip)


def _phenom(text: str) -> _Told | None:
    sides = {axis: _lengths(" ".join(found[::-1])) for axis, *found in re.findall(_PHENOM_SIDE, text)}
    strip = re.search(r"<databarHeight>\s*(\d+)", text)
    if not sides and strip is None:
        return None
    x, y = ((sides.get(axis) or [None])[0] for axis in ("Width", "Height"))
    return _Told("FEI", x, y, strip=int(strip[1]) if strip else None)


def _tescan(text: str) -> _Told | None:
    """key=value lines, in the tag after binary data; metres."""
    values = dict(re.findall(r"(PixelSizeX|PixelSizeY|ImageStripSize)\s*=\s*([-+.,\deE]+)", text))
    if not values:
        return None
    strip = int(_number(values.get("ImageStripSize", 0)))
    return _Told("TESCAN", _metres(values.get("PixelSizeX")), _metres(values.get("PixelSizeY")), strip=strip)


def _hitachi(text: str) -> _Told:
    values = dict(re.findall(r"^\s*(PixelSize|DataSize)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
    return _Told("Hitachi", _number(values.get("PixelSize")), size=_size(values.get("DataSize", "")))


def _jeol(text: str) -> _Told:
    """Field of view over width, else the length of the scale over its pixels; the size is that of the scan."""
    values = dict(re.findall(r"^\s*\$+(\w+)[ \t]+(.*?)\s*$", text, re.MULTILINE))
    size = _size(values.get("CM_IMAGE_SIZE", values.get("CM_FULL_SIZE", "")))
    field = _lengths(values.get("CM_FIELD_OF_VIEW", ""))
    if len(field) == 2 and size:
        return _Told("JEOL", field[0] / size[0], field[1] / size[1], size)
    marker, pixels = _lengths(values.get("SM_MICRON_MARKER", "")), _number(values.get("SM_MICRON_BAR"))
    return _Told("JEOL", marker[0] / pixels if marker and pixels else None, size=size)


def _from_text(path: Path) -> _Told | None:
    """What a text beside the image says: image.txt, and of TESCAN image.hdr or image-tif.hdr."""
    for end in (".txt", ".TXT"):
        text = _read_text(path.with_suffix(end))
        if "[SemImageFile]" in text:
            return _hitachi(text)
        if "$CM_" in text or "$SM_" in text:
            return _jeol(text)
    for name in (f"{path.stem}{path.suffix.replace('.', '-')}.hdr", f"{path.stem}.hdr"):
        told = _tescan(_read_text(path.with_name(name)))
        if told is not None:
            return told
    return None


def _read_text(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return _text_of(file.read(_TEXT_BYTES))
    except OSError:
        return ""


def _text_of(value: bytes) -> str:
    """UTF-16 with or without its mark, UTF-8, or what a Western or Japanese tool writes."""
    if value[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return value.decode("utf-16", "replace")
    if value[1:8:2] == b"\0\0\0\0":
        return value.decode("utf-16-le", "replace")
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return value.replace(b"\x83\xca", b"u").decode("latin-1")  # micro in Shift JIS


def find_bar(image: np.ndarray) -> int:
    """The first row of an info bar, found by its content; H where there is none.

    A bar is a band over the full width at the bottom: one constant level, which noise never keeps, with text on it. It
    begins in one row, or with a separating line, and has margins of its level at its top and bottom. What fails one of
    these is image: a bar that is missed costs less than image that is lost. A bar of the level that the image above is
    full of (saturated, binarised) is found with a separating line only. Limits and misses: tests/bench/bars.py.

    Args:
        image: (H, W) or (H, W, 3), as `read_image` returns it.
    """
    height, width = image.shape[:2]
    part = image[-int(TALLEST * height) - 1 :, :: max(width // 2048, 1)]
    part = (part if part.ndim == 2 else part.max(axis=2)).astype(np.float32)  # (R, W)
    levels, counts = np.unique(part[-max(4, height // 50) :], return_counts=True)
    away = np.abs(part - levels[counts.argmax()])
    eight = image.dtype == np.uint8
    # JPEG rings around text and at the border: 12 levels; where these hold much of the image too, fewer
    for near in (12, 3, 0) if eight else (0,):
        top = _top_of_bar(part, away, near, same=1 if eight else 0)
        if top is not None:
            return int(height - len(part) + top)
    return height


def _top_of_bar(part: np.ndarray, away: np.ndarray, near: float, same: float) -> int | None:
    """First row of the bar in the lowest rows of an image (R, W), from the distances to the bar's level (R, W)."""
    ground, ink = away <= near, away > 0.2 * np.ptp(part)  # (R, W)
    share = np.append(ground.mean(axis=1), 0)  # (R + 1,)
    middle = np.median(part, axis=1, keepdims=True)
    apart = np.abs(part - middle)
    line = ((apart <= near).mean(axis=1) >= 0.95) & ((apart <= same).mean(axis=1) >= 0.4)  # (R,) rows of one level,
    line &= np.median(ink, axis=1) > 0  # which is not the bar's
    clear = np.maximum(share[:-1], share[1:])
    starts = (share[1:-1] >= 0.5) & (clear[1:] >= 0.9) & (line[:-1] | (clear[1:] - share[:-2] >= 0.4))
    for first in np.flatnonzero(starts) + 1:
        if _is_bar(ground[first:], ink[first:], away[first:] <= same, line[first:]):
            return _edge(share, line & (np.abs(middle[:, 0] - middle[first - 1]) <= near), first)
    return None


def _edge(share: np.ndarray, line: np.ndarray, first: int) -> int:
    """The row of the sharpest change at the first row of a bar's level, with the separating line above it."""
    lines = int(np.argmin(np.append(line[:first][::-1], False)))
    if 0 < lines <= max((len(line) - first) // 20, 3):  # what is thicker is image
        return first - lines
    return first + int(share[first + 1] - share[first] > share[first] - share[first - 1])


def _is_bar(ground: np.ndarray, ink: np.ndarray, constant: np.ndarray, line: np.ndarray) -> bool:
    """Whether rows (N, W) down to the image's end have the margin, the constant level and the text of a bar."""
    share = ground.mean(axis=1)
    return (
        len(ground) >= LOWEST
        and constant.mean() >= 0.4
        and ((share >= 0.35) | line).mean() >= 0.95
        and share[-max(len(share) // 6, 3) :].max() >= 0.85
        and 0.004 <= ink.mean() <= 0.5
        and (np.diff(ink, axis=1).sum(axis=1) >= 12).sum() >= max(4, 0.1 * len(ink))  # rows that cut through text
        and (ground.mean(axis=0) >= 0.2).mean() >= 0.97  # no line of a layout goes through all
    )


def bar_of_set(sources: Sequence[Source]) -> int:
    """Rows of the one info bar of images of one tool: as their tags say, else by content where nearly all agree.

    Args:
        sources: some images of the set, each as for `read_image`; one is in memory at a time.

    Returns:
        Rows, counted from the bottom. Those that differ by at most two are one bar, the highest one. It is 0 where less
        than a quarter of the images show a bar.

    Raises:
        ZooError: bars of several heights, images with and without, or, with a bar, images of several sizes; also as
            `read_image`.
    """
    seen = [_look(source, f"image {i}") for i, source in enumerate(sources)]
    with_bar = [one for one in seen if one.rows]
    if not with_bar or (not any(one.told for one in seen) and len(with_bar) < len(seen) / 4):
        return 0
    remedy = "fit one set for each, or see all rows by --info-bar none"
    for one in seen:
        if one.size != seen[0].size:
            sides = [f"{x.name} is {x.size[1]} x {x.size[0]} pixels" for x in (seen[0], one)]
            raise ZooError(f"images of several sizes have an info bar: {' and '.join(sides)}; {remedy}")
    usual = sorted(one.rows for one in with_bar)[len(with_bar) // 2]
    agree = [one for one in with_bar if abs(one.rows - usual) <= 2]
    others = [one for one in seen if one not in agree]
    if any(one.told for one in others) or len(agree) < 0.75 * len(seen):
        one = others[0]
        raise ZooError(
            f"the info bar is not the same in all images: {agree[0].name} has one of {agree[0].rows} rows and "
            f"{one.name} {f'one of {one.rows}' if one.rows else 'none'}; {remedy}"
        )
    return max(one.rows for one in agree)


class _Looked(NamedTuple):
    name: str
    size: tuple[int, int]  # (height, width)
    rows: int
    told: bool  # by tags


def _look(source: Source, name: str) -> _Looked:
    sem = read_sem(source)
    height, width = sem.image.shape[:2]
    told = sem.bar < height
    path = source.get("path") if isinstance(source, dict) else source
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else name
    return _Looked(name, (height, width), height - (sem.bar if told else int(find_bar(sem.image))), told)
