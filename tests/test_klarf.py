"""KLARF files, read by an independent parser and held against regions whose place is known."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from klarf_reader.klarf import Klarf
from PIL import Image

from zoo.cli import main
from zoo.errors import ZooError
from zoo.klarf import Labels, write_klarf
from zoo.regions import find_regions


def run(*arguments):
    return main([str(argument) for argument in arguments])


def row(image, size=(200, 300), boxes=(), nm=2.5, looked_at=None):
    """A row of predictions.json of an image whose regions are full rectangles (top, left, bottom, right)."""
    map = np.zeros(size, np.float32)
    for i, (top, left, bottom, right) in enumerate(boxes):
        map[top:bottom, left:right] = 10 - i  # the order is that of the boxes
    regions = [region.described(nm) for region in find_regions(map, 1)]
    looked_at = size[0] * size[1] if looked_at is None else looked_at
    return {"image": image, "size": list(size), "looked_at": looked_at, "pixel_nm": nm, "regions": regions}


def written(path, rows, **labels):
    write_klarf(path, rows, Labels(**labels), "my model", ("patchcore", "0123456789ab"))
    return Klarf.load_from_file(path)


def test_positions_and_sizes(tmp_path):
    rows = [
        row("a.png", boxes=[(10, 20, 30, 60), (150, 100, 151, 104)]),
        row("normal.png"),
        row(str(tmp_path / "with space ü.tif"), size=(100, 400), boxes=[(0, 0, 100, 8)], nm=0.4, looked_at=30_000),
    ]
    found = written(tmp_path / "x.klarf", rows, lot="LOT 7", wafer="W3", device="D", step="M1 etch")
    assert found.file_version == 1.2 and found.lot_id == "LOT 7" and found.step_id == "M1 etch"
    assert found.device_id == "D" and found.setup_id.name == "my model"
    assert vars(found.inspection_station_id) == {"mfg": "zoo", "model": "patchcore", "id": "0123456789ab"}
    assert found.sample_plan_test.x == [0, 1, 2] and found.sample_plan_test.y == [0, 0, 0]
    (wafer,) = found.wafers
    assert wafer.id == "W3"
    by_hand = [  # x, y of the middle from the lower left corner, width, height, area; um
        (0, 40 * 0.0025, (200 - 20) * 0.0025, 40 * 0.0025, 20 * 0.0025, 800 * 0.0025**2),
        (0, 102 * 0.0025, (200 - 150.5) * 0.0025, 4 * 0.0025, 1 * 0.0025, 4 * 0.0025**2),
        (2, 4 * 0.0004, 50 * 0.0004, 8 * 0.0004, 100 * 0.0004, 800 * 0.0004**2),
    ]
    assert [defect.id for defect in wafer.defects] == [1, 2, 3]
    for defect, (die, x, y, width, height, area) in zip(wafer.defects, by_hand, strict=True):
        assert (defect.x_index, defect.y_index) == (die, 0)
        numbers = (defect.x_rel, defect.y_rel, defect.x_size, defect.y_size, defect.area, defect.d_size)
        assert numbers == pytest.approx((x, y, width, height, area, max(width, height)), rel=1e-9)
        assert defect.point[0] == pytest.approx((die - 1.5) * 0.75 + x)  # from the middle of the row of dies
        assert (defect.class_number, defect.test_id) == (1, 1)
    assert (found.die_pitch.x, found.die_pitch.y) == pytest.approx((300 * 0.0025, 200 * 0.0025))
    about = wafer.summary
    assert (about.number_of_defects, about.number_of_dies, about.number_of_def_dies) == (3, 3, 2)
    area = 2 * 60_000 * 0.0025**2 + 30_000 * 0.0004**2  # um^2
    assert about.defect_density == pytest.approx(3 / (area * 1e-8), rel=1e-9)
    text = (tmp_path / "x.klarf").read_text(encoding="utf-8")
    assert wafer.tests[0].area == pytest.approx(area) and text.count("DefectList") == 1
    assert text.endswith("EndOfFile;\n")


def test_no_defects(tmp_path):
    found = written(tmp_path / "deep/x.001", [row("a.png"), row("b.png")])
    (wafer,) = found.wafers
    assert wafer.defects == [] and wafer.tests[0].area == pytest.approx(2 * 60_000 * 0.0025**2)
    assert (wafer.summary.number_of_defects, wafer.summary.number_of_dies) == (0, 2)
    assert found.sample_size == 1 and found.lot_id == "unknown"


def test_names_end_no_line_of_the_file(tmp_path):
    write_klarf(tmp_path / "x.klarf", [row("a.png")], Labels(), 'q";\nEndOfFile; x', ("stfpm", "0"))
    text = (tmp_path / "x.klarf").read_text()
    assert 'SetupID "q___EndOfFile_ x" ' in text and text.count("EndOfFile;") == 1


def test_only_a_klarf_file_is_written_over(images, tmp_path, capsys):
    image = images / "b2.png"
    before = image.read_bytes()
    command = ("predict", "m", image, "--out", tmp_path / "out", "--pixel-nm", 4, "--klarf")
    assert run(*command, image) == 2
    assert "is there and is no KLARF file" in capsys.readouterr().err
    assert image.read_bytes() == before and not (tmp_path / "out").exists()
    for _ in range(2):
        assert run(*command, tmp_path / "x.klarf") == 0


@pytest.mark.parametrize("text", ["", " ", 'a"b', "a;b", "a\nb"])
def test_labels_that_end_no_text(text):
    with pytest.raises(ZooError, match="lot of a KLARF file is a text"):
        Labels(lot=text)


def test_what_is_not_known_is_not_made_up(tmp_path):
    path = tmp_path / "x.klarf"
    with pytest.raises(ZooError, match=r"b\.png; give --pixel-nm"):
        written(path, [row("a.png"), row("b.png", nm=None)])
    with pytest.raises(ZooError, match=r"no regions of b\.png as no rate was stated"):
        written(path, [row("a.png"), row("b.png") | {"regions": None}])
    with pytest.raises(ZooError, match="no image could be read"):
        written(path, [])
    assert not path.exists()


@pytest.fixture(scope="module")
def home(mvtec, tmp_path_factory):
    """A registry with `m`, calibrated, and `uncalibrated`."""
    home = tmp_path_factory.mktemp("home")
    fit = ("fit", "padim", "--preset", "lite", "--input-size", 64, "--dims", 20, "--data", mvtec, "--name")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        assert run(*fit, "m") == 0 and run(*fit, "uncalibrated") == 0
        assert run("calibrate", "m", "--data", mvtec, "--false-alarm-rate", 0.4, "--min-area", 4) == 0
    return home


@pytest.fixture
def images(mvtec, tmp_path, home, monkeypatch):
    """Four defects: two TIFFs of 16 bits that tell their pixel size, two PNGs that don't."""
    monkeypatch.setenv("ZOO_HOME", str(home))
    (tmp_path / "images").mkdir()
    text = "\r\n".join(["0"] * 3 + ["AP_IMAGE_PIXEL_SIZE", "Image Pixel Size = 2.500 nm", ""])
    for i, path in enumerate(sorted((mvtec / "test/square").iterdir())[:4]):
        image = np.asarray(Image.open(path))
        if i < 2:
            tags = [(34118, "s", 0, text, True)]
            tifffile.imwrite(tmp_path / f"images/a {i}.tif", image.astype(np.uint16) * 257, extratags=tags)
        else:
            Image.fromarray(image).save(tmp_path / f"images/b{i}.png")
    return tmp_path / "images"


def test_from_the_command_line(images, tmp_path, capsys):
    """The regions of predictions.json, in the order of its images."""
    out, file = tmp_path / "out", tmp_path / "lot.klarf"
    command = ("predict", "m", images, "--out", out, "--klarf", file, "--lot", "L1")
    assert run(*command, "--pixel-nm", 4) == 0
    rows = json.loads((out / "predictions.json").read_text())["images"]
    assert [one["pixel_nm"] for one in rows] == [2.5, 2.5, 4, 4]
    found = Klarf.load_from_file(file)
    defects = iter(found.wafers[0].defects)
    for die, one in enumerate(rows):
        assert one["size"] == [96, 96] and one["regions"]
        for region in one["regions"]:
            defect, (top, left, bottom, right) = next(defects), region["box"]
            um = (2.5, 2.5, 4, 4)[die] / 1000
            middle = ((left + right) / 2 * um, (96 - (top + bottom) / 2) * um)
            assert defect.x_index == die and (defect.x_rel, defect.y_rel) == pytest.approx(middle)
            assert (defect.x_size * 1000, defect.y_size * 1000) == pytest.approx(
                (region["width_nm"], region["height_nm"]), rel=1e-5
            )
    assert next(defects, None) is None and found.lot_id == "L1"
    assert str(file) in capsys.readouterr().out


def test_what_is_not_looked_at_is_no_inspected_area(images, tmp_path):
    mask = np.zeros((96, 96), np.uint8)
    mask[:24] = 255
    Image.fromarray(mask).save(tmp_path / "ignore.png")
    command = ("predict", "m", images / "a 0.tif", "--out", tmp_path / "out", "--klarf", tmp_path / "x.klarf")
    assert run(*command, "--ignore", tmp_path / "ignore.png") == 0
    (one,) = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert one["looked_at"] == 72 * 96
    assert f"AreaPerTest {72 * 96 * 0.0025**2:.10e};" in (tmp_path / "x.klarf").read_text()


def test_a_pixel_size_that_some_files_lack(images, tmp_path, capsys):
    file = tmp_path / "x.klarf"
    assert run("predict", "m", images, "--out", tmp_path / "out", "--report", "--klarf", file) == 2
    assert "2 images, such as" in (error := capsys.readouterr().err) and "--pixel-nm" in error
    assert not file.exists() and (tmp_path / "out/report.html").is_file()
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["images"]) == 4
    assert run("predict", "m", images / "b2.png", "--out", tmp_path / "other", "--klarf", file) == 2
    assert "doesn't tell it; give --pixel-nm" in capsys.readouterr().err and not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("model", "options", "error"),
    [
        ("uncalibrated", ["--klarf", "x"], "zoo calibrate uncalibrated --data DATA --false-alarm-rate 0.01"),
        ("uncalibrated", ["--fail-on", "regions"], "zoo calibrate uncalibrated --data DATA --false-alarm-rate 0.01"),
        ("m", ["--klarf", "x", "--pixel-nm", "0"], "--pixel-nm is the side of a pixel in nm, above 0, not 0"),
        ("m", ["--klarf", "x", "--pixel-nm", "inf"], "--pixel-nm"),
        ("m", ["--klarf", "."], "is a folder"),
        ("m", ["--klarf", "x", "--tile", "48"], "leave out --tile"),
        ("m", ["--klarf", "x", "--precision", "bf16-mixed"], "leave out --precision"),
        ("m", ["--klarf", "x", "--lot", "a;b"], "without quotes and semicolons"),
        ("m", ["--lot", "a"], "give --klarf FILE"),
        ("m", ["--fail-on", "ghosts"], "--fail-on"),
    ],
)
def test_refused_before_an_image_is_read(images, tmp_path, capsys, monkeypatch, model, options, error):
    monkeypatch.chdir(tmp_path)
    assert run("predict", model, images, "--out", tmp_path / "out", *options) == 2
    assert error in capsys.readouterr().err
    assert not (tmp_path / "out").exists() and not Path("x").exists()
