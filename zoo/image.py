"""Images from files and memory: decoded at their native depth, checked, turned into tensors, resized.

SEM tools write 8-bit and 16-bit grey, RGB, TIFF and PNG. PIL alone reads 16-bit colour as 8-bit without a word, so TIFF
goes through tifffile and 16-bit colour PNG is decoded in two halves; nothing here ever loses bits or saturates.
`torch` is imported only by the functions that need it.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NoReturn

import numpy as np

from zoo.bombs import MAX_RUNS, check_deflate, check_jpeg, check_png, check_tiff
from zoo.errors import ZooError

if TYPE_CHECKING:
    import PIL.Image
    import tifffile
    import torch

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})  # compare with Path.suffix.lower()
MIN_SIDE = 8  # pixels
MAX_PIXELS = 16384 * 16384  # the largest SEM scans; beyond that a file is a mistake or a decompression bomb
MAX_SAMPLES = 4  # of a pixel: RGB and alpha

_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_DEFLATE = (8, 32946)
_UNBOUNDED = (32773, 34925, 50000)  # PackBits, LZMA, Zstandard: tifffile's own decoders go on as long as data does
_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
# tifffile logs each vendor tag it does not know; without a handler of the application's these lines go to stderr
logging.getLogger("tifffile").addHandler(logging.NullHandler())


def read_image(source: str | os.PathLike | bytes | dict | PIL.Image.Image | np.ndarray) -> np.ndarray:
    """Decode one image without losing depth.

    Args:
        source: a path, the bytes of a file, a dict with "path" and "bytes" (an undecoded `datasets` image), a PIL
            image, or an array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). PNG, JPEG, BMP and TIFF are
            told apart by content.

    Returns:
        (H, W) or (H, W, 3); uint8, uint16 or float32 in native byte order, with the values of the file. 1-bit becomes
        0/255, alpha is dropped, grey palettes become grey, other palettes, CMYK and YCbCr become RGB, 32-bit integers
        that fit 16 bits become uint16. The orientation tag is applied, as every viewer does.

    Raises:
        ZooError: missing, damaged, of several pages, of another format, smaller than 8 or larger than 16384 x 16384
            pixels, not finite, or of a depth that cannot be kept.
    """
    import PIL.Image

    if isinstance(source, dict):
        data, where = source.get("bytes"), source.get("path")
        if data is None and where is None:
            raise ZooError('the image is a dict without "path" and "bytes"; give it one of the two')
        image = _decode(read_bytes(where) if data is None else data, str(where or "the image"))
    elif isinstance(source, str | os.PathLike):
        image = _decode(read_bytes(source), os.fspath(source))
    elif isinstance(source, bytes | bytearray | memoryview):
        image = _decode(bytes(source), "the image")
    elif isinstance(source, PIL.Image.Image):
        image = _read_pil(source, getattr(source, "filename", "") or "the PIL image")
    elif isinstance(source, np.ndarray):
        if source.dtype.kind in "iu" and source.dtype.itemsize > 2 or source.dtype.kind == "i":
            _fail("the array", f"holds {source.dtype}, whose full scale is unknown; convert it to uint8 or uint16")
        image = _check(source, "the array")
    else:
        raise ZooError(
            f"cannot read an image from a {type(source).__name__}; pass a path, a PIL image or a numpy array"
        )
    return image


def read_mask(
    source: str | os.PathLike | bytes | dict | PIL.Image.Image | np.ndarray, lossy: bool = False
) -> np.ndarray:
    """Decode one defect mask.

    A pixel is a defect when it lies above half of the full scale (127 of 255: JPEG masks ring around 0 and 255), or is
    1 in a mask of the labels 0 and 1. Of colour masks the brightest channel counts.

    Args:
        source: as for `read_image`; arrays may also be bool.
        lossy: it is a JPEG, whose low values are no labels but what black became: without a bright pixel it is empty.

    Returns:
        (H, W) bool, True = defect.

    Raises:
        ZooError: as `read_image`; also when the mask is not black but has no pixel above half of the full scale
            (labels such as 0 and 2), for then what is meant cannot be known.
    """
    image = read_image(source)
    if image.ndim == 3:
        image = image.max(axis=2)  # (H, W, 3) -> (H, W)
    half = 0.5 if image.dtype.kind == "f" else np.iinfo(image.dtype).max // 2
    top = image.max()
    if 0 < top <= half and not lossy:
        if top == 1 and image.dtype.kind == "u":
            return image == 1
        where = _name(source)
        _fail(where, f"is a mask with values up to {top:g}, neither 0 and 1 nor black and white; save defects as white")
    return image > half


def image_size(source: str | os.PathLike | bytes | dict | PIL.Image.Image | np.ndarray) -> tuple[int, int]:
    """Height and width of an image as `read_image` would return it; of a file from its head, without decoding it.

    Raises:
        ZooError: as `read_image`, as far as the head tells.
    """
    if isinstance(source, dict):
        where, data = source.get("path"), source.get("bytes")
        source = where if data is None else data
        name = str(where or "the image")
    else:
        name = os.fspath(source) if isinstance(source, str | os.PathLike) else "the image"
    if isinstance(source, str | os.PathLike):
        with _explained(name), open(source, "rb") as file:
            return _size_of(file, name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _size_of(io.BytesIO(source), name)
    return read_image(source).shape[:2]


def _size_of(file: BinaryIO, where: str) -> tuple[int, int]:
    """Height and width of an open file, upright."""
    try:
        if _is_tiff(file):
            with _tiff_page(file, where) as page:
                height, width, orientation = page.imagelength, page.imagewidth, page.tags.valueof(274, 1)
        else:
            image = _open(_without_pixels(file), where)
            height, width, orientation = image.height, image.width, _orientation(image)
    except ZooError:
        raise
    except Exception as error:
        _fail_damaged(where, error)
    return (width, height) if orientation in (5, 6, 7, 8) else (height, width)  # rows are columns


def _without_pixels(file: BinaryIO) -> BinaryIO:
    """A PNG that is head only, so that an orientation behind the pixels is found too; any other file as it is."""
    file.seek(0)
    if file.read(8) != _PNG_MAGIC:
        return file
    check_png(file)
    file.seek(8)
    parts = [_PNG_MAGIC]
    while len(head := file.read(8)) == 8:
        rest = int.from_bytes(head[:4]) + 4
        if head[4:] == b"IDAT":
            file.seek(rest, 1)
        else:
            parts += head, file.read(rest)
    return io.BytesIO(b"".join(parts))


def to_tensor(array: np.ndarray, name: object = None) -> torch.Tensor:
    """Scale a decoded image to [0, 1] by the full scale of its type: uint8 / 255, uint16 / 65535.

    Args:
        array: (H, W) or (H, W, 3), uint8, uint16 or float32, as `read_image` returns it.
        name: what an error calls the image.

    Returns:
        float32 (1, H, W) or (3, H, W).

    Raises:
        ZooError: a float image with values outside of [0, 1]. Its full scale is unknown, and a scale taken from each
            image would make scores incomparable between images.
    """
    import torch

    if array.dtype == np.uint8 or array.dtype == np.uint16:
        array = np.divide(array, np.float32(np.iinfo(array.dtype).max), dtype=np.float32)
    elif array.dtype != np.float32:
        raise ZooError(
            f"{name or 'the image'} has type {array.dtype}; convert it to uint8, uint16 or float32 in [0, 1]"
        )
    elif array.size and not (array.min() >= 0 and array.max() <= 1):
        raise ZooError(
            f"{name or 'the float image'} has float values from {array.min():g} to {array.max():g} and no known "
            "full scale; fit with --intensity percentile, divide all images by one constant so that they lie in "
            "[0, 1], or save them as 16-bit"
        )
    else:
        array = array.copy()
    channels = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)  # (C, H, W)
    return torch.from_numpy(np.ascontiguousarray(channels))


def resize(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Bilinear, antialiased resize of float images (B, C, H, W) to size (h, w); equal sizes return `images` itself."""
    from torch.nn.functional import interpolate

    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return interpolate(images, size=tuple(size), mode="bilinear", align_corners=False, antialias=True)


def resize_mask(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Nearest resize of bool masks (B, 1, H, W) to size (h, w), sampled at pixel centres as PIL's nearest does."""
    import torch
    from torch.nn.functional import interpolate

    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return interpolate(masks.to(torch.uint8), size=tuple(size), mode="nearest-exact").bool()


def _fail(where: str, what: str) -> NoReturn:
    raise ZooError(f"{where} {what}")


def _name(source: object) -> str:
    """What to call a source in an error."""
    if isinstance(source, dict):
        source = source.get("path")
    return str(source) if isinstance(source, str | os.PathLike) else getattr(source, "filename", "") or "the image"


def read_bytes(path: str | os.PathLike) -> bytes:
    """The bytes of a file; ZooError where it is missing, a folder or not readable."""
    with _explained(os.fspath(path)):
        return Path(path).read_bytes()


@contextlib.contextmanager
def _explained(where: str) -> Iterator[None]:
    """Errors of opening and reading a file as ZooErrors."""
    try:
        yield
    except ZooError:
        raise
    except FileNotFoundError:
        _fail(where, "does not exist; check the path")
    except IsADirectoryError:
        _fail(where, "is a folder, not an image; pass the path of a file")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        _fail(where, f"cannot be read ({reason}); check the path and its permissions")


def _decode(data: bytes, where: str) -> np.ndarray:
    """The bytes of a file -> checked array."""
    try:
        if _is_tiff(io.BytesIO(data)):
            return _decode_tiff(data, where)
        image = _open(io.BytesIO(data), where)
        if _is_deep_colour_png(data[:26]):
            return _decode_deep_colour_png(data, where)
        return _read_pil(image, where)
    except ZooError:
        raise
    except Exception as error:  # damaged files raise OSError, SyntaxError, ValueError, struct.error, ...
        _fail_damaged(where, error)


def _is_tiff(file: BinaryIO) -> bool:
    file.seek(0)
    return file.read(4) in _TIFF_MAGIC


def _open(file: BinaryIO, where: str) -> PIL.Image.Image:
    """A PNG, JPEG or BMP, of which the head is read and found to be one image that can be decoded."""
    from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin

    file.seek(0)
    magic = file.read(8)
    file.seek(0)
    if not magic:
        _fail(where, "is empty (0 bytes); copy it again or remove it")
    # The classes are called directly: Image.open refuses more than 179 million pixels, and its limit is a global.
    if magic == _PNG_MAGIC:
        check, plugin = check_png, PngImagePlugin.PngImageFile
    elif magic.startswith(b"\xff\xd8\xff"):
        check, plugin = check_jpeg, JpegImagePlugin.JpegImageFile
    elif magic.startswith(b"BM"):
        check, plugin = None, BmpImagePlugin.BmpImageFile
    else:
        _fail(where, "is not a PNG, JPEG, BMP or TIFF image; convert it to one of these or remove it")
    if check:
        check(file)
        file.seek(0)
    image = plugin(file)
    _check_pil(image, where)
    if image.tile and image.tile[0].codec_name == "bmp_rle" and file.seek(0, 2) > MAX_RUNS:
        _fail(where, f"is a BMP of more than {MAX_RUNS >> 20} MB of run lengths; save it as PNG")
    return image


def _fail_damaged(where: str, error: Exception) -> NoReturn:
    is_cryptic = struct.error in (type(error), type(error.__cause__))  # "unpack_from requires a buffer of ..."
    reason = "" if is_cryptic else " ".join(str(error).split())[:120]
    why = f" ({reason})" if reason else ""
    raise ZooError(f"{where} is damaged or truncated{why}; copy it again or remove it") from error


def _is_deep_colour_png(header: bytes) -> bool:
    """16 bits a channel and more than grey: PIL keeps the high byte only."""
    return header.startswith(_PNG_MAGIC) and header[24:25] == b"\x10" and header[25:26] != b"\0"


def _decode_deep_colour_png(data: bytes, where: str) -> np.ndarray:
    """PIL keeps each high byte, (H, W, 3); read as little-endian, the low byte passes for the high one."""
    from PIL import PngImagePlugin

    halves = []
    for endian in "BL":
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
        tile = image.tile[0]
        if tile.args == "LA;16B":  # four bytes a pixel, grey high, grey low, alpha, alpha: all at once
            image.tile = [tile._replace(args="RGBA")]
            high, low = np.asarray(image)[..., :2].transpose(2, 0, 1)
            return _check(high.astype(np.uint16) << 8 | low, where)
        image.tile = [tile._replace(args=tile.args.replace(";16B", f";16{endian}"))]
        halves.append(np.asarray(image)[..., :3].astype(np.uint16))
    return _check(halves[0] << 8 | halves[1], where)


@contextlib.contextmanager
def _tiff_page(file: BinaryIO, where: str) -> Iterator[tifffile.TiffPage]:
    """The one page of a TIFF, whose head is found to be that of an image that can be decoded."""
    import tifffile

    check_tiff(file)
    file.seek(0)
    with tifffile.TiffFile(file) as tiff:
        pages = [page for page in tiff.pages if not page.is_reduced]  # thumbnails and pyramid levels
        if not pages:
            _fail(where, "is a truncated TIFF; copy it again or remove it")
        if len(pages) > 1:
            _fail(where, f"is a TIFF of {len(pages)} pages (0 to {len(pages) - 1}); save each page as its own file")
        page = pages[0]
        if page.imagedepth != 1 or set(page.axes) - set("YXS"):
            _fail(where, f"is a TIFF of shape {page.shape} (axes {page.axes}); save one plane as its own file")
        _check_size(page.imagelength, page.imagewidth, where)
        if page.samplesperpixel > MAX_SAMPLES:
            _fail(
                where, f"is a TIFF of {page.samplesperpixel} channels; an image is grey or RGB, with alpha or without"
            )
        yield page


def _decode_tiff(data: bytes, where: str) -> np.ndarray:
    try:
        with _tiff_page(io.BytesIO(data), where) as page:
            segments = list(zip(page.dataoffsets, page.databytecounts, strict=True))
            if not page.dataoffsets or any(offset + count > len(data) for offset, count in segments):
                _fail(where, "is a truncated TIFF; copy it again or remove it")
            if page.compression in _DEFLATE:
                strips = (data[offset : offset + count] for offset, count in segments)
                check_deflate(strips, page.nbytes)
            plain = page.photometric in (0, 1, 2) and page.bitspersample in (1, 8, 16, 32, 64)
            plain = plain and page.compression not in _UNBOUNDED
            try:
                array = page.asarray() if plain else None
            except ValueError:  # a compression that needs imagecodecs
                array = None
            if array is None:
                return _decode_tiff_by_pil(data, page, where)
    except ZooError:
        raise
    except Exception as error:  # struct.error, TiffFileError, zlib.error, ...
        _fail_damaged(where, error)
    if page.axes.startswith("S"):  # planes one after the other
        array = np.moveaxis(array, 0, -1)  # (S, H, W) -> (H, W, S)
    if array.ndim == 3 and array.shape[2] == 2:
        array = array[..., 0]  # grey with alpha
    # tifffile itself writes bool arrays as "0 is white" and reads them back unchanged
    if page.photometric == 0 and not (array.dtype == bool and page.software.startswith("tifffile")):
        if array.dtype.kind not in "ub":
            _fail(where, "is a TIFF whose zero is white and whose numbers are not unsigned; save it with zero as black")
        array = ~array
    orientation = page.tags.get("Orientation")
    return _check(_orient(array, orientation.value if orientation else 1), where)


def _decode_tiff_by_pil(data: bytes, page, where: str) -> np.ndarray:
    """Palettes, CMYK and the compressions that tifffile lacks, as far as PIL keeps every bit."""
    from PIL import TiffImagePlugin

    if page.bitspersample > 8 and page.samplesperpixel > 1:
        kind = f"{page.bitspersample}-bit {page.photometric.name} TIFF with {page.compression.name} compression"
        _fail(where, f"is a {kind}, which cannot be read without losing bits; save it uncompressed as grey or RGB")
    with warnings.catch_warnings():
        # "Truncated File Read". Of PIL alone: filters are those of all threads, and a fit decodes in one of its own.
        warnings.filterwarnings("error", category=UserWarning, module=r"PIL\.")
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
        return _read_pil(image, where)


def _read_pil(image: PIL.Image.Image, where: str) -> np.ndarray:
    _check_pil(image, where)
    if _hides_bits(image):
        _fail(where, "is 16-bit colour, of which PIL keeps 8 bits; pass the path of the file instead")
    try:
        image.load()
    except Exception as error:
        _fail_damaged(where, error)
    mode = image.mode
    if mode == "P":
        grey = np.asarray(image.convert("RGB"))
        is_grey = (grey == grey[..., :1]).all()
        array = grey[..., 0] if is_grey else grey
    elif mode == "1":
        array = np.asarray(image.convert("L"))
    elif mode == "I" or mode == "F" or mode == "L" or mode == "RGB" or mode.startswith("I;16"):
        array = np.asarray(image)
    elif mode in ("LA", "La"):
        array = np.asarray(image.convert("LA"))[..., 0]
    elif mode in ("RGBA", "RGBX"):
        array = np.asarray(image)[..., :3]
    elif mode in ("RGBa", "PA", "CMYK", "YCbCr", "LAB", "HSV"):
        array = np.asarray(image.convert("RGBA" if mode == "RGBa" else "RGB"))[..., :3]
    else:
        _fail(where, f"has the PIL mode {mode}; convert it to L, I;16, F or RGB")
    return _check(_orient(array, _orientation(image)), where)


def _check_pil(image: PIL.Image.Image, where: str) -> None:
    if getattr(image, "n_frames", 1) > 1:
        _fail(where, f"holds {image.n_frames} frames; save each frame as its own file")
    _check_size(image.height, image.width, where)


def _orientation(image: PIL.Image.Image) -> int:
    """The orientation tag of an image whose head, or all of it, was read: 1 to 8."""
    import PIL.Image

    exif = image.info.get("exif")
    if exif is None and "Raw profile type exif" in image.info:
        exif = bytes.fromhex("".join(image.info["Raw profile type exif"].split("\n")[3:]))
    if exif:
        check_tiff(io.BytesIO(exif.removeprefix(b"Exif\0\0")))
    return PIL.Image.Image.getexif(image).get(274, 1)  # that of PNG files would decode them first


def _hides_bits(image: PIL.Image.Image) -> bool:
    """A PIL image that stands for 16-bit colour but will be, or was, decoded to 8 bits."""
    if image.mode not in ("RGB", "RGBA"):
        return False
    if image.format == "TIFF" and hasattr(image, "tag_v2"):
        return max(image.tag_v2.get(258, (8,))) > 8
    if image.format != "PNG":
        return False
    if any(";16" in str(tile.args) for tile in getattr(image, "tile", ())):
        return True
    try:  # already loaded: only the file still knows
        with open(getattr(image, "filename", "") or os.devnull, "rb") as file:
            return _is_deep_colour_png(file.read(26))
    except (OSError, TypeError):
        return False


def _orient(array: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the orientation tag (EXIF and TIFF, 274) on (H, W, ...)."""
    if orientation in (5, 6, 7, 8):
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _check_size(height: int, width: int, where: str) -> None:
    if min(height, width) < MIN_SIDE:
        _fail(where, f"is {width} x {height} pixels; an image needs at least {MIN_SIDE} on each side")
    if height * width > MAX_PIXELS:
        _fail(where, f"is {width} x {height} pixels, more than {MAX_PIXELS:,}; cut it into smaller images")


def _check(array: np.ndarray, where: str) -> np.ndarray:
    """Anything decoded -> (H, W) or (H, W, 3), contiguous, uint8, uint16 or float32 in native byte order."""
    if array.ndim == 3 and array.shape[2] in (1, 3, 4):
        array = array[..., 0] if array.shape[2] == 1 else array[..., :3]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] == 3):
        _fail(where, f"has shape {array.shape}; an image is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)")
    _check_size(*array.shape[:2], where)
    kind, itemsize = array.dtype.kind, array.dtype.itemsize
    if kind == "b":
        array = array.astype(np.uint8) * np.uint8(255)
    elif kind == "f":
        with np.errstate(over="ignore"):
            array = array.astype(np.float32)
        if not np.isfinite(array).all():
            _fail(where, "has pixels that are NaN, infinite or beyond float32; replace them by finite values")
    elif kind == "i" or kind == "u" and itemsize > 2:
        low, high = array.min(), array.max()
        if low < 0 or high > 65535:
            _fail(where, f"holds {array.dtype} values from {low} to {high}; rescale by a fixed constant to 0..65535")
        array = array.astype(np.uint8 if itemsize == 1 else np.uint16)
    elif kind == "u":
        array = array.astype(array.dtype.newbyteorder("="), copy=False)
    else:
        _fail(where, f"has pixels of type {array.dtype}; convert them to uint8, uint16 or float32")
    return np.ascontiguousarray(array)
