"""The report of scored images, its evidence, and exit codes for scripts."""

import base64
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy.spatial.distance import cdist

import zoo
from zoo import cli, evidence, inspection, markup
from zoo.cli import main
from zoo.data import load_data
from zoo.methods import create_model
from zoo.module import AnomalyModule, Batch
from zoo.tiles import tiles_of

NAMES = {"square": '<b>&"x.png', "tif": "über 16 bit.tif"}
VOID = {"meta", "img", "br"}


def run(*arguments):
    return main([str(argument) for argument in arguments])


class Page(HTMLParser):
    """What a browser would see: balanced tags, the links, texts by id of the element around them, tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.tags, self.tables, self.text, self.by_id = [], [], set(), [], "", {}
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action")]
        if tag not in VOID:
            self.open.append((tag, dict(attributes).get("id")))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        tags = [tag for tag, _ in self.open]
        if "td" in tags or "th" in tags:
            self.tables[-1][-1][-1] += data
        for _, name in self.open:
            self.by_id[name] = self.by_id.get(name, "") + data


@pytest.fixture(scope="module")
def home(mvtec, tmp_path_factory):
    """A registry with `m`, calibrated, and `uncalibrated`."""
    home = tmp_path_factory.mktemp("home")
    fit = ("fit", "patchcore", "--preset", "lite", "--input-size", 64, "--bank-size", 300, "--data", mvtec, "--name")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        assert run(*fit, "uncalibrated") == 0
        shutil.copytree(home / "models/uncalibrated", home / "models/m")
        assert run("calibrate", "m", "--data", mvtec, "--false-alarm-rate", 0.2) == 0
    return home


@pytest.fixture(autouse=True)
def registry(home, monkeypatch):
    monkeypatch.setenv("ZOO_HOME", str(home))


@pytest.fixture(scope="module")
def scored(mvtec, home, tmp_path_factory):
    """Two defects under other names, three normals and a broken file, scored: the folder of the results."""
    place = tmp_path_factory.mktemp("scored")
    images = place / "images"
    shutil.copytree(mvtec / "test/good", images, ignore=lambda _, names: sorted(names)[3:])
    shutil.copy(mvtec / "test/square/000.png", images / NAMES["square"])
    text = "\r\n".join(["0"] * 3 + ["AP_IMAGE_PIXEL_SIZE", "Image Pixel Size = 25.0 nm", ""])
    image = np.asarray(Image.open(mvtec / "test/square/001.png")).astype(np.uint16) * 257
    tifffile.imwrite(images / NAMES["tif"], image, extratags=[(34118, "s", 0, text, True)])
    (images / "broken.png").write_bytes(b"no image")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        assert run("predict", "m", images, "--out", place / "out", "--report", "--skip-broken") == 0
    return place / "out"


def rows_of(out):
    return json.loads((out / "predictions.json").read_text())["images"]


def page_of(out):
    return Page((out / "report.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(scored):
    text = (scored / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(link.startswith(("data:image/", "#")) for link in page.links) and len(page.links) > 10
    assert "://" not in text and "url(" not in text and "@import" not in text
    assert not page.tags & {"script", "link", "iframe", "object", "b"}
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert {link[1:] for link in page.links if link[0] == "#"} <= page.by_id.keys()


def test_names_are_escaped(scored):
    text = (scored / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in text and text.count("&lt;b&gt;&amp;&#34;x.png") == 4  # title, two pictures, table
    page = Page(text)
    assert NAMES["square"] in page.text and NAMES["tif"] in page.text


def test_the_table_is_that_of_predictions_json(scored):
    """By p-value; ties by falling score."""
    rows = {row["image"]: row for row in rows_of(scored)}
    head, *lines = page_of(scored).tables[-1]
    assert head == ["no.", "image", "score", "p-value", "regions", "verdict"]
    assert {line[1] for line in lines} == rows.keys()
    for number, (_, image, score, p_value, regions, verdict) in enumerate(lines, start=1):
        row = rows[image]
        assert lines[number - 1][0] == str(number)
        assert float(score) == pytest.approx(row["score"], rel=1e-5)
        assert float(p_value) == pytest.approx(row["p_value"], rel=1e-3)
        assert int(regions) == row["num_regions"] and row["verdict"].startswith(verdict)
    order = [(rows[line[1]]["p_value"], -rows[line[1]]["score"]) for line in lines]
    assert order == sorted(order) and all(name in lines[0][1] + lines[1][1] for name in NAMES.values())


def test_regions_are_those_of_predictions_json(scored):
    page = page_of(scored)
    ranked = sorted(rows_of(scored), key=lambda row: (row["p_value"], -row["score"]))
    tables = iter(page.tables[:-1])
    for row in (row for row in ranked if row["regions"]):
        head, *lines = next(tables)
        assert head[:3] == ["no.", "peak at x, y (px)", "size (px)"] and len(lines) == row["num_regions"]
        for number, (line, region) in enumerate(zip(lines, row["regions"], strict=True), start=1):
            (top, left, bottom, right), (y, x) = region["box"], region["position"]
            assert line[:3] == [str(number), f"{x}, {y}", f"{right - left} × {bottom - top}"]
            *sizes, peak, p_value = line[3:]
            assert float(peak) == pytest.approx(region["peak"], rel=1e-5)
            assert float(p_value) == pytest.approx(region["p_value"], rel=1e-3)
            if row["pixel_nm"] is None:
                assert sizes == [str(region["area"])]
                continue
            size, unit = sizes[0].rsplit(" ", 1)
            scale = {"nm": 1, "µm": 1000}[unit]
            width, height = (float(side) * scale for side in size.split(" × "))
            assert (width, height) == pytest.approx((region["width_nm"], region["height_nm"]), rel=1e-3)
            area, unit = sizes[2].rsplit(" ", 1)
            assert float(area.replace(",", "")) * scale**2 == pytest.approx(region["area_nm2"], rel=1e-3)
    assert next(tables, None) is None and any(row["pixel_nm"] for row in ranked)


def test_the_head_states_the_rate_and_what_to_expect_of_it(scored, home):
    page, rows = page_of(scored), rows_of(scored)
    assert page.by_id["scored"] == "5" and page.by_id["unread"] == "1"
    assert page.by_id["called"] == str(sum(row["is_anomalous"] for row in rows))
    assert page.by_id["regions"] == str(sum(bool(row["regions"]) for row in rows))
    known = zoo.from_pretrained("m").calibration
    assert known.promise() in page.text and page.by_id["expected"] == "≤ 1"  # a fifth of five
    config = json.loads((home / "models/m/config.json").read_text())
    assert config["weights_sha256"] in page.text and f"{known.image_threshold:.6g}" in page.text
    assert "broken.png is not a PNG" in page.text
    (broken,) = json.loads((scored / "predictions.json").read_text())["broken"]
    assert broken["image"].endswith("broken.png") and "is not a PNG" in broken["reason"]


def test_pictures_are_the_image_and_its_overlay(scored, mvtec):
    text = (scored / "report.html").read_text(encoding="utf-8")
    article = next(part for part in text.split("<article")[1:] if "&lt;b&gt;" in part)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)" alt="(image|heatmap)', article)
    shown = {what: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data, what in pictures}
    assert (shown["image"][..., 0] == np.asarray(Image.open(mvtec / "test/square/000.png"))).all()
    (row,) = (row for row in rows_of(scored) if NAMES["square"] in row["image"])
    assert (shown["heatmap"] == np.asarray(Image.open(scored / row["heatmap"]))).all()


def test_outlines_go_around_regions():
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    mask[10, 30] = mask[0, 0] = False
    region = {"box": [10, 30, 20, 50], "position": [15, 40]}
    found = markup.outline(3, region, mask, (40, 60))
    points = np.array([[float(v) for v in point.split()] for point in re.split("[ML]", found["path"][:-1])[1:]])
    assert (points.min(0) == (30, 10)).all() and (points.max(0) == (50, 20)).all() and found["number"] == 3
    x, y = points.T  # the area that the line encloses; at corners it cuts an eighth of a pixel
    area = abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2
    assert area == pytest.approx(mask.sum(), abs=2)
    assert markup.outline(3, region, None, (40, 60))["path"] == "M30 10H50V20H30Z"


def test_many_images_have_few_pictures(scored, tmp_path, monkeypatch):
    monkeypatch.setattr(inspection, "SHOWN", 2)
    model, page = zoo.from_pretrained("m"), tmp_path / "report.html"
    inspection.write_report(page, rows_of(scored), model, "m", with_evidence=False)  # without the heatmaps beside it
    text = page.read_text(encoding="utf-8")
    assert text.count("<article") == 2 and "the other 3 are in the" in text
    assert len(Page(text).tables[-1]) == 6 and "heatmap is no longer at its place" in text
    assert "Normal patches are not shown" in text


# ---- evidence --------------------------------------------------------------------------------------------------------


def test_the_nearest_normal_patch_is_that_of_a_search():
    model = create_model("patchcore", "lite", input_size=64, bank_size=50).eval()
    images = torch.rand(4, 1, 80, 96, generator=torch.Generator().manual_seed(0))
    model.observe(Batch(images, [f"{i}.png" for i in range(4)]))
    model.finish()
    image = torch.rand(1, 1, 80, 96, generator=torch.Generator().manual_seed(1))
    grid = model.embed(image)[0].detach()  # (D, 8, 8): of 10 x 12 pixels each
    places = [(0, 0), (79, 95), (35, 50), (40, 47)]
    for place, found in zip(places, model.nearest_normal(image, places), strict=True):
        row, column = place[0] // 10, place[1] // 12
        distance = cdist(grid[:, row, column][None].double(), model.bank.double())[0]
        name, *origin = model.origin[distance.argmin()]
        assert found.name == name and found.distance == pytest.approx(distance.min(), rel=1e-4)
        assert found.box == pytest.approx((origin[0] / 8, origin[1] / 8, (origin[0] + 1) / 8, (origin[1] + 1) / 8))
        assert found.cell == (row * 10, column * 12, row * 10 + 10, column * 12 + 12)
    for name, row, column in model.origin[:10]:  # each patch in the bank is its own nearest
        (found,) = model.nearest_normal(images[int(name[0])][None], [(row * 10 + 5, column * 12 + 6)])
        assert found.name == name and found.distance < 1e-2
        assert found.box[:2] == pytest.approx((row / 8, column / 8))
    model.origin = []
    assert model.nearest_normal(image, places) is None
    assert create_model("padim", "lite", input_size=64).nearest_normal(image, places) is None


@pytest.mark.parametrize("tile", [None, 64])
def test_crops_are_of_the_training_image(tile, mvtec, tmp_path, monkeypatch):
    """Of a training image the nearest patch is its own: both crops show the same; so in tiles."""
    if tile:
        monkeypatch.setenv("ZOO_HOME", str(tmp_path))
        fit = ("fit", "patchcore", "--preset", "lite", "--input-size", 64, "--bank-size", 200, "--tile", tile)
        assert run(*fit, "--data", mvtec, "--name", "m") == 0
    model = zoo.from_pretrained("m")
    training, data = evidence.TrainingImages(model), load_data(str(mvtec))["train"]
    files = dict(zip(data["path"], data["image"], strict=True))
    tiles = tiles_of((96, 96), tile or 96)
    cell, checked = (tile or 96) / 8, 0
    for name, row, column in model.origin[::4]:
        image = model.bring(files[name])
        middle = (int((row + 0.5) * cell), int((column + 0.5) * cell))
        places = [(t.rows.start + middle[0], t.columns.start + middle[1]) for t in tiles]
        places = [place for t, place in zip(tiles, places, strict=True) if t.knows(*place)]
        pairs = [pair for pair in evidence.pairs(model, training, image, places) if pair.distance < 1e-2]
        for pair in pairs:
            assert pair.name == name and (pair.found.pixels == pair.normal.pixels).all()
            assert pair.found.box == pytest.approx(pair.normal.box)
            checked += 1
    assert checked >= 10


def test_crops_keep_to_the_image():
    model = create_model("patchcore", "lite", input_size=64)
    image = np.arange(96 * 96, dtype=np.uint16).reshape(96, 96)
    crop = evidence._crop(model, image, (0, 84, 12, 96))  # at the upper right corner
    assert crop.pixels.shape == (84, 84, 3) and crop.box == (0, 72, 12, 84)
    assert (crop.pixels[..., 0] == image[:84, 12:] // 257).all()


def test_the_report_shows_evidence_and_does_without(scored, mvtec, tmp_path, monkeypatch):
    page = page_of(scored)
    assert page.text.count("at distance") >= 5 and page.text.count("train/good/") >= 5
    assert "not at hand" not in page.text
    monkeypatch.setenv("ZOO_HOME", str(tmp_path))
    shutil.copytree(mvtec, tmp_path / "set")
    fit = ("fit", "patchcore", "--preset", "lite", "--input-size", 64, "--bank-size", 200, "--name", "m")
    assert run(*fit, "--data", tmp_path / "set") == 0
    command = ("predict", "m", mvtec / "test/square/000.png", "--out", tmp_path / "out", "--report")
    for path in (tmp_path / "set/train/good").iterdir():  # other images under the same names
        Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
    assert run(*command) == 0
    assert "at distance" in (page := page_of(tmp_path / "out").text) and "The training image is not at hand." in page
    shutil.rmtree(tmp_path / "set")
    assert run(*command) == 0
    assert "The training image is not at hand." in page_of(tmp_path / "out").text
    shutil.rmtree(tmp_path / "models/m/private")
    assert run(*command) == 0
    page = page_of(tmp_path / "out").text
    assert "came without the notes of its training images" in page and "at distance" not in page


# ---- verdicts and exit codes -----------------------------------------------------------------------------------------


def test_a_report_without_a_rate_says_how_to_get_one(mvtec, tmp_path):
    assert run("predict", "uncalibrated", mvtec / "test", "--out", tmp_path, "--report") == 0
    page = page_of(tmp_path)
    assert "No false-alarm rate is stated" in page.text
    assert "zoo calibrate uncalibrated --data DATA --false-alarm-rate 0.01" in page.text
    scores = [float(line[2]) for line in page.tables[-1][1:]]
    assert len(scores) == 12 and scores == sorted(scores, reverse=True) and len(page.tables) == 1
    assert "expected" not in page.by_id and "regions" not in page.by_id


def test_exit_codes(mvtec, tmp_path, capsys):
    good, bad = tmp_path / "good", mvtec / "test/square"
    rows = []
    assert run("predict", "m", mvtec / "test/good", "--out", tmp_path / "all") == 0
    rows = [row for row in rows_of(tmp_path / "all") if not (row["is_anomalous"] or row["regions"])]
    good.mkdir()
    for row in rows[:2]:
        shutil.copy(row["image"], good)

    def predict(*arguments, model="m"):
        return run("predict", model, *arguments, "--out", tmp_path / "out", "--report")

    for what in ("anomalies", "regions"):
        assert predict(good, "--fail-on", what) == 0
        assert predict(good, bad, "--fail-on", what) == 1
        assert len(rows_of(tmp_path / "out")) == len(rows[:2]) + 6 and (tmp_path / "out/report.html").is_file()
        assert f"Exit code 1, as --fail-on {what} asks for: 6 images" in capsys.readouterr().out
    assert predict(good, bad) == 0
    assert predict(bad, "--fail-on", "anomalies", model="uncalibrated") == 1
    assert "The verdicts are uncalibrated" in capsys.readouterr().out

    (good / "broken.png").write_bytes(b"no image")  # it is not known to be fine
    assert predict(good, "--skip-broken") == 0
    assert predict(good, "--skip-broken", "--fail-on", "anomalies") == 2
    assert "1 could not be judged" in (error := capsys.readouterr().err) and "broken.png" in error
    assert predict(good, bad, "--skip-broken", "--fail-on", "anomalies") == 1
    assert predict(good, "--fail-on", "anomalies") == 2


def test_a_name_of_no_encoding_and_memory_that_is_full(mvtec, tmp_path, capsys, monkeypatch):
    odd = os.fsencode(tmp_path / "in") + b"/bad\xff.png"
    (tmp_path / "in").mkdir()
    shutil.copy(os.fsencode(mvtec / "test/square/000.png"), odd)
    assert run("predict", "m", tmp_path / "in", "--out", tmp_path / "out", "--report") == 0
    assert "bad\\udcff.png" in (tmp_path / "out/predictions.csv").read_text()
    assert (tmp_path / "out/report.html").is_file() and (tmp_path / "out/predictions.json").is_file()
    capsys.readouterr()

    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(AnomalyModule, "predict_brought", full)
    assert run("predict", "m", tmp_path / "in", "--out", tmp_path / "full") == 2
    assert capsys.readouterr().err == "zoo: The device's memory is full; lower --batch-size.\n"


@pytest.mark.parametrize("command", ["predict", "watch"])
def test_places_that_can_not_be_written_end_with_2_before_a_model_is_loaded(command, mvtec, tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file/x", "/proc/x", tmp_path / "file"):
        where = (
            (mvtec / "test", "--name", "m") if command == "watch" else ("m", mvtec / "test", "--fail-on", "anomalies")
        )
        assert run(command, *where, "--out", out) == 2
        assert (error := capsys.readouterr().err).startswith("zoo: ") and error.count("\n") == 1
    if command == "predict":
        assert run("predict", "m", mvtec / "test", "--out", mvtec / "test") == 2
        assert "is the folder that is read" in capsys.readouterr().err
        assert run("predict", "m", tmp_path / "nothing.png", "--out", tmp_path / "a/b/c") == 2
        assert not (tmp_path / "a").exists()


def test_a_mistake_of_ours_is_no_anomaly(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "list", lambda argv: 1 / 0)
    assert run("list") == 2 and "ZeroDivisionError" in capsys.readouterr().err


def test_other_sizes_have_no_regions_to_fail_on(mvtec, tmp_path, capsys):
    image = np.asarray(Image.open(mvtec / "test/good/000.png"))
    Image.fromarray(image[:80]).save(tmp_path / "small.png")
    command = ("predict", "m", tmp_path / "small.png", "--out", tmp_path / "out", "--fail-on")
    for what in ("regions", "anomalies"):
        assert run(*command, what) == 2
        assert "1 could not be judged, such as" in capsys.readouterr().err
