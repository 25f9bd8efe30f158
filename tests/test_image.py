"""Decoding: what was written comes back bit for bit, and what cannot be kept is refused in one sentence."""

import io
import lzma
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageOps

from zoo.errors import ZooError
from zoo.image import image_size, read_image, read_mask, resize, resize_mask, to_tensor

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (20, 30), dtype=np.uint8)
RGB8 = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
GREY16 = RNG.integers(0, 65536, (20, 30), dtype=np.uint16)
RGB16 = RNG.integers(0, 65536, (20, 30, 3), dtype=np.uint16)
FLOAT = RNG.random((20, 30), dtype=np.float32)


def pil_bytes(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def tiff_bytes(array, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, array, **options)
    return buffer.getvalue()


def chunk(kind, body=b""):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def filtered_rows(raw, distance):
    """Rows of bytes (H, N) with the five PNG filters in turn; `distance` is the bytes of a pixel."""
    raw = raw.astype(np.int32)
    left, up, corner = np.zeros_like(raw), np.zeros_like(raw), np.zeros_like(raw)
    left[:, distance:] = raw[:, :-distance]
    up[1:] = raw[:-1]
    corner[1:, distance:] = raw[:-1, :-distance]
    guess = left + up - corner
    near = np.stack([abs(guess - left), abs(guess - up), abs(guess - corner)]).argmin(0)
    paeth = np.choose(near, [left, up, corner])
    predictions = (0, left, up, (left + up) // 2, paeth)
    coded = [(raw - prediction).astype(np.uint8) for prediction in predictions]
    return b"".join(bytes([i % 5]) + coded[i % 5][i].tobytes() for i in range(len(raw)))


def png16_bytes(array, interlaced=False):
    """A 16-bit PNG written by hand: PIL has no writer for colour."""
    height, width = array.shape[:2]
    array = array.reshape(height, width, -1).astype(">u2")
    channels = array.shape[2]
    adam7 = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    passes = [array[y::dy, x::dx] for y, x, dy, dx in adam7] if interlaced else [array]
    pixels = b"".join(
        filtered_rows(np.frombuffer(part.tobytes(), np.uint8).reshape(len(part), -1), 2 * channels) for part in passes
    )

    header = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def assert_same(result, expected):
    assert result.dtype == expected.dtype and result.dtype.isnative and result.flags.c_contiguous
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(
    ("data", "expected"),
    {
        "png L": (pil_bytes(Image.fromarray(GREY8), "PNG"), GREY8),
        "png RGB": (pil_bytes(Image.fromarray(RGB8), "PNG"), RGB8),
        "bmp L": (pil_bytes(Image.fromarray(GREY8), "BMP"), GREY8),
        "bmp RGB": (pil_bytes(Image.fromarray(RGB8), "BMP"), RGB8),
        "png 1": (pil_bytes(Image.fromarray(GREY8 > 99), "PNG"), (GREY8 > 99).astype(np.uint8) * 255),
        "png LA": (pil_bytes(Image.fromarray(np.stack([GREY8, GREY8.T.reshape(20, 30)], 2)), "PNG"), GREY8),
        "png RGBA": (pil_bytes(Image.fromarray(np.dstack([RGB8, GREY8])), "PNG"), RGB8),
        "png I;16": (pil_bytes(Image.fromarray(GREY16), "PNG"), GREY16),
        "png L 16": (png16_bytes(GREY16), GREY16),
        "png RGB 16": (png16_bytes(RGB16), RGB16),
        "png RGBA 16": (png16_bytes(np.dstack([RGB16, GREY16])), RGB16),
        "png LA 16": (png16_bytes(np.dstack([GREY16, RGB16[..., 0]])), GREY16),
        "png RGB 16 interlaced": (png16_bytes(RGB16, interlaced=True), RGB16),
        "tiff L": (tiff_bytes(GREY8), GREY8),
        "tiff 16": (tiff_bytes(GREY16), GREY16),
        "tiff 16 big-endian": (tiff_bytes(GREY16, byteorder=">"), GREY16),
        "tiff 16 BigTIFF": (tiff_bytes(GREY16, bigtiff=True), GREY16),
        "tiff 16 deflate": (tiff_bytes(GREY16, compression="zlib"), GREY16),
        "tiff 16 LZW": (pil_bytes(Image.fromarray(GREY16), "TIFF", compression="tiff_lzw"), GREY16),
        "tiff RGB LZW": (pil_bytes(Image.fromarray(RGB8), "TIFF", compression="tiff_lzw"), RGB8),
        "tiff float LZW": (pil_bytes(Image.fromarray(FLOAT), "TIFF", compression="tiff_lzw"), FLOAT),
        "tiff RGB 16": (tiff_bytes(RGB16, photometric="rgb"), RGB16),
        "tiff RGB 16 planes": (
            tiff_bytes(RGB16.transpose(2, 0, 1).copy(), photometric="rgb", planarconfig="separate"),
            RGB16,
        ),
        "tiff float32": (tiff_bytes(FLOAT), FLOAT),
        "tiff float64": (tiff_bytes(FLOAT.astype(np.float64)), FLOAT),
        "tiff int32": (tiff_bytes(GREY16.astype(np.int32)), GREY16),
        "tiff uint32": (tiff_bytes(GREY16.astype(np.uint32)), GREY16),
        "tiff white is zero": (tiff_bytes(~GREY8, photometric="miniswhite"), GREY8),
        "tiff bool": (tiff_bytes(GREY8 > 99), (GREY8 > 99).astype(np.uint8) * 255),
        "tiff 1": (pil_bytes(Image.fromarray(GREY8 > 99), "TIFF"), (GREY8 > 99).astype(np.uint8) * 255),
    }.values(),
    ids=lambda value: None,
)
def test_files_come_back_bit_exact(data, expected, tmp_path):
    assert_same(read_image(data), expected)
    path = tmp_path / "wrong_suffix.jpg"  # told apart by content
    path.write_bytes(data)
    assert_same(read_image(path), expected)
    assert_same(read_image(str(path)), expected)
    assert_same(read_image({"path": str(path), "bytes": None}), expected)
    assert_same(read_image({"path": None, "bytes": data}), expected)
    for source in (data, path, str(path), {"path": str(path), "bytes": None}, {"path": None, "bytes": data}):
        assert image_size(source) == expected.shape[:2]


def test_lossy_and_colour_spaces_follow_pil():
    jpeg = pil_bytes(Image.fromarray(GREY8), "JPEG")
    assert_same(read_image(jpeg), np.asarray(Image.open(io.BytesIO(jpeg))))
    cmyk = pil_bytes(Image.fromarray(RGB8).convert("CMYK"), "JPEG")
    assert_same(read_image(cmyk), np.asarray(Image.open(io.BytesIO(cmyk)).convert("RGB")))
    ycbcr = Image.fromarray(RGB8).convert("YCbCr")
    assert_same(read_image(ycbcr), np.asarray(ycbcr.convert("RGB")))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_palettes(format):
    grey = Image.fromarray(GREY8).convert("P")
    assert_same(read_image(pil_bytes(grey, format)), GREY8)
    colour = Image.fromarray(RGB8).quantize(16)
    assert_same(read_image(pil_bytes(colour, format)), np.asarray(colour.convert("RGB")))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(orientation):
    exif = Image.Exif()
    exif[274] = orientation
    png = pil_bytes(Image.fromarray(GREY8), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(png))))
    assert_same(read_image(png), expected)
    tiff = tiff_bytes(GREY8, extratags=[(274, "H", 1, orientation, True)])
    assert_same(read_image(tiff), expected)
    assert_same(read_image(Image.open(io.BytesIO(tiff))), expected)
    jpeg = pil_bytes(Image.fromarray(GREY8), "JPEG", exif=exif)
    plain = pil_bytes(Image.fromarray(GREY8), "PNG")
    late = plain[:-12] + chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0")) + plain[-12:]  # behind the pixels
    for data in (png, tiff, jpeg, late):
        assert read_image(data).shape == image_size(data) == expected.shape


def test_pil_images_and_arrays():
    assert_same(read_image(Image.fromarray(GREY8)), GREY8)
    assert_same(read_image(Image.open(io.BytesIO(tiff_bytes(GREY16, byteorder=">")))), GREY16)  # I;16B
    assert_same(read_image(Image.fromarray(GREY16.astype(np.int32))), GREY16)  # I
    assert_same(read_image(Image.fromarray(FLOAT)), FLOAT)
    for array in (GREY8, GREY16, FLOAT, RGB8, RGB16):
        assert_same(read_image(array), array)
    assert_same(read_image(GREY16.astype(">u2")), GREY16)
    assert_same(read_image(GREY8[..., None]), GREY8)
    assert_same(read_image(np.dstack([RGB8, GREY8])), RGB8)
    assert_same(read_image(RGB8[:, ::-1]), RGB8[:, ::-1])
    assert_same(read_image(FLOAT.astype(np.float64)), FLOAT)


@pytest.mark.parametrize("loaded", [False, True])
def test_pil_images_of_16_bit_colour_are_refused(loaded, tmp_path):
    for name, data in {"x.png": png16_bytes(RGB16), "x.tif": tiff_bytes(RGB16, photometric="rgb")}.items():
        (tmp_path / name).write_bytes(data)
        with Image.open(tmp_path / name) as image:
            if loaded:
                image.load()
            with pytest.raises(ZooError, match=f"{name} is 16-bit colour"):
                read_image(image)


def test_thumbnails_are_no_pages():
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(GREY16)
        writer.write(GREY16[::2, ::2], subfiletype=1)
    assert_same(read_image(buffer.getvalue()), GREY16)
    buffer = io.BytesIO()
    with tifffile.TiffWriter(buffer) as writer:
        writer.write(GREY16[::2, ::2], subfiletype=1)
        writer.write(GREY16)
    assert read_image(buffer.getvalue()).shape == image_size(buffer.getvalue()) == GREY16.shape


def truncated(data):
    return data[: len(data) * 2 // 3]


PHOTO = np.kron(GREY8, np.ones((8, 8), np.uint8))
NAN = np.where(FLOAT > 0.9, np.nan, FLOAT)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"is empty \(0 bytes\)"),
        (b"hello, world", "is not a PNG, JPEG, BMP or TIFF"),
        (pil_bytes(Image.fromarray(GREY8), "GIF"), "is not a PNG, JPEG, BMP or TIFF"),
        (b"II*\0", "is damaged"),
        (truncated(pil_bytes(Image.fromarray(PHOTO), "JPEG")), "is damaged or truncated"),
        (truncated(pil_bytes(Image.fromarray(PHOTO), "JPEG", progressive=True)), "is damaged or truncated"),
        (truncated(pil_bytes(Image.fromarray(GREY8), "PNG")), "is damaged or truncated"),
        (truncated(pil_bytes(Image.fromarray(GREY8), "BMP")), "is damaged or truncated"),
        (truncated(png16_bytes(RGB16)), "is damaged or truncated"),
        (truncated(tiff_bytes(GREY16)), "truncated"),
        (truncated(tiff_bytes(GREY16, compression="zlib")), "truncated"),
        (truncated(pil_bytes(Image.fromarray(GREY16), "TIFF", compression="tiff_lzw")), "truncated"),
        (tiff_bytes(np.stack([GREY8] * 3), photometric="minisblack"), r"TIFF of 3 pages \(0 to 2\)"),
        (tiff_bytes(GREY16.astype(np.int32) + 65536), "holds int32 values from .* rescale"),
        (tiff_bytes(GREY16.astype(np.int32) - 40000), "from -"),
        (tiff_bytes(NAN), "NaN"),
        (tiff_bytes(np.where(FLOAT > 0.9, np.inf, FLOAT)), "NaN, infinite"),
        (tiff_bytes(FLOAT.astype(np.float64) * 1e300), "beyond float32"),
        (pil_bytes(Image.fromarray(GREY8[:7]), "PNG"), "is 30 x 7 pixels"),
        (tiff_bytes(GREY8[:, :7]), "is 7 x 20 pixels"),
    ],
    ids=range(20),
)
def test_broken_files_are_named(data, match, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(data)
    with pytest.raises(ZooError, match=match) as caught:
        read_image(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ZooError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ZooError, match="is a folder"):
        read_image(tmp_path)
    with pytest.raises(ZooError, match="cannot be read"):
        read_image("a\0b.png")
    with pytest.raises(ZooError, match="from a int"):
        read_image(3)
    with pytest.raises(ZooError, match='without "path" and "bytes"'):
        read_image({"path": None, "bytes": None})


@pytest.mark.parametrize(
    "array",
    [GREY8[:7], GREY8[0], RGB8.transpose(2, 0, 1), np.zeros((0, 9), np.uint8), GREY16.astype(np.int64), NAN]
    + [GREY8.astype(complex), GREY8.astype(str)],
    ids=range(8),
)
def test_arrays_that_are_no_images(array):
    with pytest.raises(ZooError, match="the array"):
        read_image(array)


def test_large_scans_are_read_and_bombs_are_not():
    header = png16_bytes(GREY16)
    for side, match in ((16384, "damaged"), (16385, "cut it into smaller")):  # the header alone decides
        body = b"IHDR" + struct.pack(">II", side, side) + header[24:29]
        bomb = header[:12] + body + struct.pack(">I", zlib.crc32(body)) + header[33:]
        with pytest.raises(ZooError, match=match):
            read_image(bomb)


def zeros(size):
    """So many zero bytes, deflated: a thousandth of them."""
    packer = zlib.compressobj(9)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(size >> 20)) + packer.flush()


def png_of(side, pixels, before=b"", after=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + chunk(b"IDAT", pixels) + after + chunk(b"IEND")


def tiff_of(side, compression, data, more=(), samples=1):
    """A grey TIFF of one strip written by hand, with further tags (code, type, count), whose values are its data."""
    tags = {256: side, 257: side, 258: 8, 259: compression, 262: 1, 277: samples, 278: side, 279: len(data)}
    start = 8 + 2 + 12 * (len(tags) + 1 + len(more)) + 4
    entries = [(code, 4, 1, value) for code, value in {**tags, 273: start}.items()]
    entries += [(*each, start) for each in more]
    body = b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + body + bytes(4) + data


def shared_values(size, count):
    """EXIF data of tags that all have the same values."""
    body = b"".join(struct.pack("<HHII", 40000 + i, 7, size, 8) for i in range(count))
    return b"II*\0\x08\0\0\0" + struct.pack("<H", count) + body + bytes(4 + size)


def bomb(name):
    """A small file that takes gigabytes, or minutes, without what is checked; and what is said of it."""
    blank = zlib.compress(bytes(65 * 64))
    jpeg = pil_bytes(Image.new("L", (2048, 2048)), "JPEG", progressive=True)
    exif = shared_values(1 << 20, 4000)
    parts = [exif[i : i + 60000] for i in range(0, len(exif), 60000)]
    if name == "png chunks":
        return png_of(64, blank, after=300_000 * chunk(b"prVt")), "4096 chunks"
    if name == "png empty pixels":
        return png_of(64, blank[:1], after=300_000 * chunk(b"IDAT") + chunk(b"IDAT", blank[1:])), "4096 chunks"
    if name == "png exif":
        return png_of(64, blank, before=chunk(b"eXIf", exif)), "larger than the file"
    if name == "png exif as text":
        text = b"\nexif\n0\n" + shared_values(400_000, 4000).hex().encode()
        body = b"Raw profile type exif\0\0" + zlib.compress(text)
        return png_of(64, blank, before=chunk(b"zTXt", body)), "larger than the file"
    if name == "jpeg exif":
        body = b"".join(b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts)
        return jpeg[:2] + body + jpeg[2:], "larger than the file"
    if name == "jpeg scans":
        return jpeg[:-2] + 2000 * jpeg[jpeg.rindex(b"\xff\xda") : -2] + jpeg[-2:], "100 scans"
    if name == "jpeg segments":
        return jpeg[:2] + 1_000_000 * b"\xff\xe5\0\2" + jpeg[2:], "4096 segments"
    if name == "jpeg padding":
        return jpeg[:2] + 8_000_000 * b"\xff" + jpeg[2:], "4096 segments"
    if name == "bmp runs":
        data = pil_bytes(Image.new("L", (64, 64)), "BMP")[:1078] + 2_000_000 * b"\0\2\0\0"
        return data[:30] + struct.pack("<I", 1) + data[34:], "of run lengths"
    if name == "tiff deflate":
        return tiff_of(64, 8, zeros(1 << 29)), "expand to more"
    if name == "tiff tags":
        return tiff_of(64, 5, bytes(1 << 20), [(60000 + i, 7, 1 << 20) for i in range(4000)]), "larger than the file"
    if name == "tiff channels":
        return tiff_of(4096, 1, bytes(999), samples=1000), "1000 channels"
    page = struct.pack("<HHHII", 1, 256, 4, 1, 64)
    if name == "tiff ring":
        return b"II*\0\x08\0\0\0" + page + struct.pack("<I", 8), "1024 pages"
    pages = b"".join(page + struct.pack("<I", 8 + 18 * (i + 1)) for i in range(300_000))
    return b"II*\0\x08\0\0\0" + pages, "1024 pages"


BOMBS = "png chunks,png empty pixels,png exif,png exif as text,jpeg exif,jpeg scans,jpeg segments,jpeg padding,bmp runs"
BOMBS += ",tiff deflate,tiff tags,tiff channels,tiff ring,tiff pages"
TRY = """import resource, sys, time
from zoo.image import image_size, read_image
import PIL.BmpImagePlugin, PIL.JpegImagePlugin, PIL.PngImagePlugin, PIL.TiffImagePlugin, numpy, tifffile
def used(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before, start = used(), time.process_time()
try: (read_image if sys.argv[1] == "read" else image_size)(sys.argv[2])
except ValueError as error: print(error)
print(used() - before, time.process_time() - start)
"""


def tried(what, path):
    """What is said of a file, in MB and seconds beyond the imports."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"  # spares the machine
    command = [sys.executable, "-c", limit + TRY, what, str(path)]
    *said, numbers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return "".join(said), *map(float, numbers.split())


@pytest.mark.parametrize("name", BOMBS.split(","))
def test_bombs_cost_nothing(name, tmp_path):
    path = tmp_path / "bomb"
    data, match = bomb(name)
    path.write_bytes(data)
    assert len(data) < 10 << 20
    said, mb, seconds = tried("read", path)
    assert match in said and said.startswith(f"{path} is ")
    assert mb < 128 and seconds < 5  # CPU seconds; they took 10 and more


def test_the_size_of_a_file_is_read_without_its_pixels(tmp_path):
    path = tmp_path / "large.png"
    path.write_bytes(png_of(16000, zeros(16001 * 16000)))
    assert image_size(path) == (16000, 16000)
    said, mb, seconds = tried("size", path)
    assert not said and mb < 16 and seconds < 0.5
    path.write_bytes(png_of(16385, b""))
    with pytest.raises(ZooError, match="cut it into smaller"):
        image_size(path)
    for data, match in (
        (b"", "is empty"),
        (b"hello", "is not a PNG"),
        (pil_bytes(Image.new("L", (9, 7)), "PNG"), "9 x 7"),
    ):
        path.write_bytes(data)
        with pytest.raises(ZooError, match=match):
            image_size(path)
    with pytest.raises(ZooError, match="of 3 pages"):
        image_size(tiff_bytes(np.stack([GREY8] * 3), photometric="minisblack"))
    with pytest.raises(ZooError, match="does not exist"):
        image_size(tmp_path / "none.png")


@pytest.mark.parametrize("compression", ["packbits", "lzma", "zstd"])
def test_endless_compressions_are_read_by_the_image_size(compression, tmp_path):
    path = tmp_path / "x.tif"
    packed = {"packbits": b"\x81\0" * (4 << 20), "lzma": lzma.compress(bytes(1 << 29), preset=0)}.get(compression, b"")
    path.write_bytes(tiff_of(64, {"packbits": 32773, "lzma": 34925, "zstd": 50000}[compression], packed or b"x"))
    said, mb, seconds = tried("read", path)  # libtiff decodes what the image needs, or can't
    assert mb < 128 and seconds < 5 and (not said or "damaged" in said)


def test_masks():
    truth = np.zeros((40, 40), bool)
    truth[8:24, 16:32] = True
    white = truth.astype(np.uint8) * 255
    for source in (
        white,
        truth,
        truth.astype(np.uint8),  # labels 0 and 1
        truth.astype(np.uint16),
        truth.astype(np.float32),
        truth.astype(np.uint16) * 65535,
        np.dstack([white, 0 * white, 0 * white]),
        Image.fromarray(truth),
        pil_bytes(Image.fromarray(white), "PNG"),
        pil_bytes(Image.fromarray(white), "JPEG", quality=60),
        tiff_bytes(truth),
    ):
        mask = read_mask(source)
        assert mask.dtype == bool and mask.shape == (40, 40)
        np.testing.assert_array_equal(mask, truth)
    assert not read_mask(np.zeros((9, 9), np.uint8)).any()
    assert read_mask(np.full((9, 9), 255, np.uint8)).all()
    np.testing.assert_array_equal(read_mask(np.tile(np.uint8([0, 127, 128, 255]), (8, 2)))[0, :4], [0, 0, 1, 1])
    with pytest.raises(ZooError, match="values up to 2"):
        read_mask(truth.astype(np.uint8) * 2)


def test_to_tensor_is_exact():
    every8 = np.arange(256, dtype=np.uint8).reshape(16, 16)
    every16 = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    assert torch.equal(to_tensor(every8), (torch.arange(256).float() / 255).reshape(1, 16, 16))
    assert torch.equal(to_tensor(every16), (torch.arange(65536).float() / 65535).reshape(1, 256, 256))
    tensor = to_tensor(RGB16)
    assert tensor.shape == (3, 20, 30) and tensor.dtype == torch.float32 and tensor.is_contiguous()
    np.testing.assert_array_equal(tensor[2].numpy(), RGB16[..., 2].astype(np.float32) / np.float32(65535))
    unchanged = to_tensor(FLOAT)
    np.testing.assert_array_equal(unchanged[0].numpy(), FLOAT)
    unchanged.zero_()
    assert FLOAT.any()  # a copy
    for array in (FLOAT + 0.5, FLOAT - 0.5, FLOAT * 255):
        with pytest.raises(ZooError, match="no known full scale"):
            to_tensor(array)
    with pytest.raises(ZooError, match="int64"):
        to_tensor(GREY8.astype(np.int64))


def test_resize():
    images = torch.from_numpy(RGB8).permute(2, 0, 1)[None].float() / 255
    assert resize(images, (20, 30)) is images
    halved = resize(images, (10, 15))
    assert halved.shape == (1, 3, 10, 15)
    reference = Image.fromarray(RGB8[..., 0].astype(np.float32) / 255).resize((15, 10), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(halved[0, 0].numpy(), np.asarray(reference), atol=1e-5)
    masks = torch.from_numpy(GREY8 > 99)[None, None]
    assert resize_mask(masks, (20, 30)) is masks
    for size in ((10, 15), (48, 64)):
        small = resize_mask(masks, size)
        reference = Image.fromarray((GREY8 > 99).astype(np.uint8)).resize(size[::-1], Image.Resampling.NEAREST)
        assert small.dtype == torch.bool
        np.testing.assert_array_equal(small[0, 0].numpy(), np.asarray(reference))


def test_import_costs_no_torch():
    code = "import sys, zoo.image; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
