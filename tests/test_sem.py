"""Tags as the tools write them are read, and an info bar is found at its row, or not at all."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from bench.bars import COLOURS, KINDS, draw_bar, hard, through_jpeg
from PIL import Image

from zoo.data.synthetic import render
from zoo.errors import ZooError
from zoo.sem import bar_of_set, find_bar, read_sem

BOARDS = Path(__file__).parents[2] / "shared" / "data" / "deeppcb_small"
RNG = np.random.default_rng(0)
SCAN = RNG.integers(0, 256, (96, 128), dtype=np.uint8)
WITH_BAR = np.concatenate([SCAN, np.zeros((8, 128), np.uint8)])  # 104 rows


def tiff(tag=None, value=b"", image=SCAN, byteorder="<", orientation=1):
    """A TIFF with one vendor tag: ASCII from str, bytes as they are."""
    kind = "s" if isinstance(value, str) else "B"
    tags = [(tag, kind, 0 if kind == "s" else len(value), value, True)] if tag else []
    tags += [(274, "H", 1, orientation, True)] if orientation != 1 else []
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, image, byteorder=byteorder, extratags=tags, metadata=None)
    return buffer.getvalue()


def zeiss(*, named=None, unnamed=2.5e-9, store="128 * 96"):
    """SmartSEM: numbers without names, the 4th metres of a pixel at a width of 1024; then a name above each value."""
    lines = ["0", "0", "0", str(unnamed), "1", "DP_IMAGE_STORE", f"Store resolution = {store}"]
    lines += ["AP_IMAGE_PIXEL_SIZE", f"Image Pixel Size = {named}"] if named else []
    return "\r\n".join([*lines, "AP_MAG", "Mag = 100.00 K X", ""])


def fei(*, width="2.0345e-009", height="2.0345e-009", size="ResolutionX=128\r\nResolutionY=96\r\n", databar=8):
    return (
        f"[User]\r\nDate=03/12/2019\r\n\r\n[Scan]\r\nInternalScan=true\r\nPixelWidth={width}\r\nPixelHeight={height}\r\n\r\n"
        f"[Image]\r\n{size}\r\n[PrivateFei]\r\nBitShift=0\r\nDatabarHeight={databar}\r\n"
    )


def tescan(x="4.1e-008", y="4.1e-008", strip=8):
    text = f"[MAIN]\r\nImageStripSize={strip}\r\nPixelSizeX={x}\r\nPixelSizeY={y}\r\n[SEM]\r\nHV=15000.0\r\n"
    return b"\x01\x00\x00\x00\x02\x00\x00\x00\xff\xd8\xff\x93\xe0\xff\xd9" + text.encode()


PHENOM = (
    '<?xml version="1.0"?><FeiImage><databarHeight>8</databarHeight>'
    '<pixelWidth unit="um">0.0125</pixelWidth><pixelHeight unit="um">0.0125</pixelHeight></FeiImage>'
)


@pytest.mark.parametrize("byteorder", ["<", ">"])
@pytest.mark.parametrize(
    ("tag", "value", "image", "vendor", "pixel_nm", "bar"),
    [
        (34118, zeiss(named="26.37 nm"), SCAN, "Zeiss", 26.37, 96),
        (34118, zeiss(named="558.2 pm"), SCAN, "Zeiss", 0.5582, 96),
        (34118, zeiss(named="1.117 µm").encode("cp1252"), SCAN, "Zeiss", 1117, 96),
        (34118, zeiss(), SCAN, "Zeiss", 2.5 * 1024 / 128, 96),
        (34118, zeiss(named="26.37 nm"), WITH_BAR, "Zeiss", 26.37, 96),
        (34682, fei(), WITH_BAR, "FEI", 2.0345, 96),
        (34680, fei(), WITH_BAR, "FEI", 2.0345, 96),
        (34682, fei(), SCAN, "FEI", 2.0345, 96),  # saved without its bar
        (34682, fei(size="", databar=8), WITH_BAR, "FEI", 2.0345, 96),
        (34683, PHENOM, WITH_BAR, "FEI", 12.5, 96),
        (50431, tescan(), WITH_BAR, "TESCAN", 41, 96),
        (50431, tescan(strip=0), SCAN, "TESCAN", 41, 96),
        # pixels that are not square have no one size; within a rounding they have
        (34682, fei(height="2.6e-009"), WITH_BAR, "FEI", None, 96),
        (34682, fei(height="2.0349e-009"), WITH_BAR, "FEI", 2.0345, 96),
        # cut or resized later: of another width than the tags say
        (34118, zeiss(named="26.37 nm", store="1024 * 768"), SCAN, "Zeiss", None, 96),
        (34682, fei(size="ResolutionX=256\r\nResolutionY=96\r\n"), WITH_BAR, "FEI", None, 104),
        # values that are none
        (34682, fei(width="0"), WITH_BAR, "FEI", None, 96),
        (34682, fei(width="nan"), WITH_BAR, "FEI", None, 96),
        (34682, fei(size="", databar=90), WITH_BAR, "FEI", 2.0345, 104),
        (50431, tescan(x="-4e-8", strip=-3), WITH_BAR, "TESCAN", None, 104),
        (34118, "AP_MAG\r\nMag = 10", SCAN, "Zeiss", None, 96),
        # damaged
        (34118, b"\x00\xff\xfe\x81\x8d", SCAN, "Zeiss", None, 96),
        (34682, "[Image]\r\nResolutionX=many\r\nResolutionY=\r\n", WITH_BAR, None, None, 104),
        (34683, "<xml", WITH_BAR, None, None, 104),
        (50431, b"\xff\xd8\xff\x00" * 9, WITH_BAR, None, None, 104),
    ],
)
def test_tags(tag, value, image, vendor, pixel_nm, bar, byteorder):
    if isinstance(value, str) and not value.isascii():
        value = value.encode()
    sem = read_sem(tiff(tag, value, image, byteorder))
    np.testing.assert_array_equal(sem.image, image)
    assert sem.vendor == vendor and sem.bar == bar
    assert sem.pixel_nm == (None if pixel_nm is None else pytest.approx(pixel_nm, rel=1e-9))


def test_grey_palettes_as_older_tools_write_them():
    ramp = np.repeat(np.arange(256, dtype=np.uint16)[None] * 257, 3, axis=0)
    buffer = io.BytesIO()
    tags = [(34118, "s", 0, zeiss(named="26.37 nm"), True)]
    tifffile.imwrite(buffer, SCAN, photometric="palette", colormap=ramp, extratags=tags, metadata=None)
    sem = read_sem(buffer.getvalue())
    np.testing.assert_array_equal(sem.image, SCAN)
    assert sem[1:] == (26.37, 96, "Zeiss")


def test_a_turned_image_has_no_bar_from_the_tags():
    upside_down = read_sem(tiff(34682, fei(), WITH_BAR, orientation=3))
    assert upside_down.bar == 104 and upside_down.pixel_nm == pytest.approx(2.0345)
    np.testing.assert_array_equal(upside_down.image, WITH_BAR[::-1, ::-1])
    assert read_sem(tiff(34682, fei(), WITH_BAR, orientation=6))[1:] == (None, 128, "FEI")


HITACHI = "[SemImageFile]\r\nInstructName=SU8230\r\nDataSize=128x96\r\nPixelSize=9.921875\r\nMagnification=10000\r\n"
JEOL = "$CM_FORMAT JEOL/SEM\r\n$CM_MAG 5000\r\n$CM_FULL_SIZE 128 96\r\n$$SM_MICRON_BAR 40\r\n$$SM_MICRON_MARKER {}\r\n"
JEOL_FIELD = (
    "$CM_LABEL \r\n$CM_IMAGE_SIZE 128 96\r\n$CM_FIELD_OF_VIEW {0} {1}\r\n$SM_MICRON_BAR 7\r\n$SM_MICRON_MARKER 1nm\r\n"
)


@pytest.mark.parametrize(
    ("beside", "text", "vendor", "pixel_nm", "bar"),
    [
        ("a.txt", HITACHI.encode(), "Hitachi", 9.921875, 96),
        ("a.txt", HITACHI.encode("utf-16"), "Hitachi", 9.921875, 96),
        ("a.txt", HITACHI.encode("utf-16-le"), "Hitachi", 9.921875, 96),
        ("a.TXT", HITACHI.replace("9.921875", "9,921875").encode(), "Hitachi", 9.921875, 96),
        ("a.txt", HITACHI.replace("128x96", "256x192").encode(), "Hitachi", None, 104),
        ("a.txt", HITACHI.replace("PixelSize", "Pixel").encode(), "Hitachi", None, 96),
        ("a.txt", JEOL.format("1um").encode(), "JEOL", 25, 96),
        ("a.txt", JEOL.format("100nm").encode(), "JEOL", 2.5, 96),
        ("a.txt", JEOL.format("1µm").encode("latin-1"), "JEOL", 25, 96),
        ("a.txt", JEOL.format("1μm").encode("shift-jis"), "JEOL", 25, 96),
        ("a.txt", JEOL.format("none").encode(), "JEOL", None, 96),
        ("a.txt", JEOL.replace("BAR 40", "BAR 0").format("1um").encode(), "JEOL", None, 96),
        ("a.txt", JEOL_FIELD.format("1.28µm", "0.96µm").encode(), "JEOL", 10, 96),
        ("a.txt", JEOL_FIELD.format("1.28µm", "1.92µm").encode(), "JEOL", None, 96),
        ("a-png.hdr", tescan()[15:], "TESCAN", 41, 96),
        ("a.hdr", tescan()[15:], "TESCAN", 41, 96),
        ("a.txt", b"0 0.5 0.5 0.1 0.1\n", None, None, 104),  # labels of a detector
        ("a.txt", b"", None, None, 104),
        ("b.txt", HITACHI.encode(), None, None, 104),
    ],
)
def test_texts_beside_the_image(beside, text, vendor, pixel_nm, bar, tmp_path):
    Image.fromarray(WITH_BAR).save(tmp_path / "a.png")
    (tmp_path / beside).write_bytes(text)
    sem = read_sem(tmp_path / "a.png")
    np.testing.assert_array_equal(sem.image, WITH_BAR)
    assert sem.vendor == vendor and sem.bar == bar
    assert sem.pixel_nm == (None if pixel_nm is None else pytest.approx(pixel_nm, rel=1e-9))


def test_tags_go_before_texts_and_all_kinds_of_sources_are_read(tmp_path):
    data = tiff(34682, fei(), WITH_BAR)
    path = tmp_path / "a.tif"
    path.write_bytes(data)
    path.with_suffix(".txt").write_text(HITACHI)
    for source in (path, str(path), data, {"path": str(path)}, {"path": str(path), "bytes": data}, {"bytes": data}):
        assert read_sem(source)[1:] == (pytest.approx(2.0345), 96, "FEI")
    for source in (WITH_BAR, Image.open(path), {"path": None, "bytes": tiff(image=WITH_BAR)}):
        assert read_sem(source)[1:] == (None, 104, None)
    with pytest.raises(ZooError, match=r"none\.tif does not exist"):
        read_sem(tmp_path / "none.tif")
    with pytest.raises(ZooError, match='without "path" and "bytes"'):
        read_sem({})
    with pytest.raises(ZooError, match="from a int"):
        read_sem(3)


def test_float_images_keep_their_values():
    counts = RNG.normal(2000, 300, (40, 50)).astype(np.float32)
    np.testing.assert_array_equal(read_sem(tiff(34682, fei(size=""), counts)).image, counts)


def scenes(boards):
    for seed in range(3):
        yield render(seed, size=512)[0]
        yield render(seed, size=512, style="fine", bits=16)[0][:400]
    image = render(7, size=640)[0]
    yield np.stack([image] * 3, axis=2)[:480]  # (H, W, 3)
    yield (render(8, size=512)[0] / 255).astype(np.float32)
    if boards and BOARDS.is_dir():
        yield from (np.asarray(Image.open(path))[:500] for path in sorted((BOARDS / "train/good").iterdir())[:2])


@pytest.mark.parametrize("colour", COLOURS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_bar_is_found_at_its_row(kind, colour):
    boards = colour in ("dark", "light")  # these are black and white: where a bar of their levels begins is not seen
    for seed, image in enumerate(scenes(boards)):
        rows = 24 + 5 * seed
        bar = draw_bar(image.shape[1], rows, kind, *COLOURS[colour], seed=seed)
        bar = bar[..., None] if image.ndim == 3 else bar
        full = {"u1": 1, "u2": 257, "f4": np.float32(1 / 255)}[image.dtype.str[1:]]
        whole = np.concatenate([image, np.broadcast_to(bar, (rows, *image.shape[1:])).astype(image.dtype) * full])
        assert whole.dtype == image.dtype
        assert find_bar(whole) == len(image)
        assert find_bar(image) == len(image)  # and no bar without one
        assert find_bar(whole[:, ::-1]) == len(image) and find_bar(whole[::-1]) == len(whole)


@pytest.mark.parametrize("quality", [95, 85, 70])
def test_a_bar_is_found_in_jpegs(quality):
    for seed in range(6):
        image = render(seed, size=512)[0]
        bar = draw_bar(512, 30 + 7 * seed, KINDS[seed % len(KINDS)], *list(COLOURS.values())[seed % 4], seed=seed)
        assert abs(find_bar(through_jpeg(np.concatenate([image, bar]), quality)) - 512) <= 1
        assert find_bar(through_jpeg(image, quality)) == 512


@pytest.mark.parametrize("size", [128, 256, 512])
def test_the_bar_of_the_synthetic_set_is_found(size):
    for index in range(4):
        for style in ("metal", "fine"):
            image, _ = render(index, size=size, style=style, bar=True)
            assert find_bar(image) == size - size // 12


def test_no_bar_where_there_is_none():
    for name, image in hard(24, seed=1):
        assert find_bar(image) == len(image), name
    vertical = np.where(np.arange(256) % 16 < 6, 255, 0).astype(np.uint8) * np.ones((256, 1), np.uint8)
    vertical[230:240] = 0  # a cut through all lines, and they go on below
    for image in (vertical, np.zeros((64, 64), np.uint8), np.full((8, 8), 7, np.uint16), np.eye(9, dtype=np.float32)):
        assert find_bar(image) == len(image)


def with_bar(index, rows=40, size=256):
    return np.concatenate([render(index, size=size)[0], draw_bar(size, rows, "line of text", seed=index)])


def plain(index, size=256):
    return render(index, size=size)[0]


def test_the_bar_of_a_set():
    assert bar_of_set([with_bar(i) for i in range(5)]) == 40
    assert bar_of_set([with_bar(0)]) == 40 and bar_of_set([]) == 0
    assert bar_of_set([plain(i) for i in range(5)]) == 0
    assert bar_of_set([plain(0), plain(1, 128)]) == 0  # several sizes are no matter without a bar
    missed = np.concatenate([with_bar(0)[:256], np.zeros((40, 256), np.uint8)])  # nothing is written in one of eight
    assert bar_of_set([missed, *(with_bar(i) for i in range(1, 8))]) == 40
    one_row_less = np.concatenate([plain(9), plain(9)[:1], with_bar(9, 39)[256:]])
    assert bar_of_set([with_bar(0), one_row_less, with_bar(2)]) == 40
    odd = [np.concatenate([plain(i), plain(i)[:40]]) for i in range(8)]
    assert bar_of_set([with_bar(0), *odd]) == 0


def test_the_tags_say_the_bar_of_a_set(tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.tif").write_bytes(tiff(34682, fei(), WITH_BAR))  # black, without text: not found by content
    paths = sorted(tmp_path.iterdir())
    assert find_bar(WITH_BAR) == 104 and bar_of_set(paths) == 8
    other = np.concatenate([SCAN[:92], np.zeros((12, 128), np.uint8)])
    (tmp_path / "3.tif").write_bytes(tiff(34682, fei(size="ResolutionX=128\r\nResolutionY=92\r\n"), other))
    with pytest.raises(ZooError, match=r"0\.tif has one of 8 rows and .*3\.tif one of 12; fit one set for each"):
        bar_of_set([*paths, tmp_path / "3.tif"])


def test_mixed_sets_are_named():
    with pytest.raises(ZooError, match=r"image 0 is 256 x 296 pixels and image 1 is 256 x 316 pixels; fit one set"):
        bar_of_set([with_bar(0), with_bar(1, 60)])
    lower = np.concatenate([plain(1), plain(1)[:15], with_bar(1, 25)[256:]])
    with pytest.raises(ZooError, match="has one of 40 rows and image 1 one of 25|one of 25 rows and image 0 one of 40"):
        bar_of_set([with_bar(0), lower])
    without = np.concatenate([plain(2), plain(2)[:40]])
    with pytest.raises(ZooError, match="image 0 has one of 40 rows and image 1 none; fit one set for each"):
        bar_of_set([with_bar(0), without])


def test_import_costs_no_torch():
    code = "import sys, zoo.sem; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
