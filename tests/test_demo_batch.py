"""The demo's batch: many files of strangers, ranked, listed and packed, without a path of the server."""

import base64
import csv
import gc
import io
import json
import os
import re
import shutil
import weakref
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

from zoo.cli import main
from zoo.demo import batch
from zoo.demo.batch import Result, harmless, inspect_batch
from zoo.demo.engine import Engine
from zoo.errors import ZooError
from zoo.image import image_size
from zoo.inference import COLUMNS
from zoo.module import AnomalyModule

EVIL = "<img src=x onerror=alert(1)>.png"
FORMULA = '=HYPERLINK("http:evil","a").png'


@pytest.fixture(scope="module")
def home(mvtec, tmp_path_factory):
    """A registry with `m`, calibrated, and `uncalibrated`."""
    home = tmp_path_factory.mktemp("home")
    fit = ["fit", "patchcore", "--preset", "lite", "--input-size", "64", "--bank-size", "200", "--data", str(mvtec)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        assert main([*fit, "--name", "uncalibrated"]) == 0
        shutil.copytree(home / "models/uncalibrated", home / "models/m")
        assert main(["calibrate", "m", "--data", str(mvtec), "--false-alarm-rate", "0.2"]) == 0
    return home


@pytest.fixture(autouse=True)
def registry(home, monkeypatch):
    monkeypatch.setenv("ZOO_HOME", str(home))


@pytest.fixture(scope="module")
def engine(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        engine = Engine(["m", "uncalibrated"], "cpu")
        engine.model("m"), engine.model("uncalibrated")
    return engine


@pytest.fixture(scope="module")
def files(mvtec, tmp_path_factory):
    """Uploads, each in a folder of its own: of several kinds and sizes, broken ones, and names that bite."""
    place, found = tmp_path_factory.mktemp("uploads"), []

    def upload(name, write):
        path = place / f"upload-{len(found)}" / name
        path.parent.mkdir()
        write(path)
        found.append(path)

    def pixels(name):
        return np.asarray(Image.open(mvtec / "test" / name))

    upload("000.png", lambda path: shutil.copy(mvtec / "test/good/000.png", path))
    upload("000.png", lambda path: shutil.copy(mvtec / "test/good/001.png", path))
    upload(EVIL, lambda path: shutil.copy(mvtec / "test/square/000.png", path))
    upload("deep über.tif", lambda path: tifffile.imwrite(path, pixels("square/001.png").astype(np.uint16) * 257))
    upload(FORMULA, lambda path: Image.fromarray(pixels("square/002.png")).convert("RGB").save(path))
    upload("broken.png", lambda path: path.write_bytes(b"no image"))
    upload("cut.png", lambda path: path.write_bytes((mvtec / "test/good/002.png").read_bytes()[:900]))
    upload("000.PNG", lambda path: shutil.copy(mvtec / "test/good/003.png", path))
    upload("other size.jpg", lambda path: Image.fromarray(pixels("good/004.png")[:80]).save(path, quality=95))
    upload("Deep Über.bmp", lambda path: Image.fromarray(pixels("good/005.png")).save(path))
    return found


def run(*arguments):
    """The result, and what was told on the way."""
    *told, result = inspect_batch(*arguments)
    return result, told


@pytest.fixture(scope="module")
def done(engine, files, home, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        return run(engine, "m", files, tmp_path_factory.mktemp("results") / "out")


@pytest.fixture
def result(done):
    return done[0]


class Page(HTMLParser):
    """Cells of tables by row, links and what scripts could stand in, and text."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.links, self.text, self.in_cell = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.links += [value for key, value in attributes if key in ("src", "href") or key.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.rows[-1][-1] += data


def names_of(result):
    return [row["image"] for row in result.rows]


def test_every_readable_file_has_a_row_with_the_model_s_own_figures(result, files, engine):
    model = engine.model("m")
    expected = {path: model.predict(path) for path in files if path.name not in ("broken.png", "cut.png")}
    own = {
        "000.png": files[0],
        "000 (2).png": files[1],
        EVIL: files[2],
        "deep über.tif": files[3],
        FORMULA: files[4],
        "000.PNG": files[7],
        "other size.jpg": files[8],
        "Deep Über.bmp": files[9],
    }
    assert sorted(names_of(result)) == sorted(own)
    for row in result.rows:
        prediction = expected[own[row["image"]]]
        assert row["score"] == pytest.approx(prediction.score, rel=1e-5)
        assert row["p_value"] == prediction.p_value and row["is_anomalous"] == prediction.is_anomalous
        assert row["verdict"] == prediction.verdict
        assert row["num_regions"] == (None if prediction.regions is None else len(prediction.regions))
        assert row["size"] == list(prediction.map.shape)
    assert sum(bool(row["is_anomalous"]) for row in result.rows) >= 3


def test_the_most_suspicious_come_first(result):
    """By insertion into a list that is kept in order: p-values rise, ties fall by score, what has none is last."""
    order = []
    for row in result.rows[::-1]:
        place = 0
        while place < len(order) and before(order[place], row):
            place += 1
        order.insert(place, row)
    assert [row["image"] for row in order] == names_of(result)
    assert set(names_of(result)[:3]) == {EVIL, FORMULA, "deep über.tif"} and names_of(result)[-1] == "other size.jpg"


def before(one, other):
    if (one["p_value"] is None) != (other["p_value"] is None):
        return other["p_value"] is None
    if one["p_value"] != other["p_value"]:
        return one["p_value"] < other["p_value"]
    return one["score"] > other["score"]


def test_all_lists_say_the_same(result):
    told = json.loads(result.files["json"].read_text("utf-8"))
    assert told["images"] == result.rows and told["method"] == "patchcore"
    assert [(each["image"], each["reason"]) for each in told["broken"]] == result.broken
    with open(result.files["csv"], encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert tuple(lines[0]) == COLUMNS and len(lines) == len(result.rows)
    for line, row in zip(lines, result.rows, strict=True):
        assert line["image"].removeprefix("'") == row["image"]
        assert float(line["score"]) == row["score"] and line["verdict"] == row["verdict"]
        assert line["p_value"] == ("" if row["p_value"] is None else str(row["p_value"]))
    page = Page(result.files["html"].read_text("utf-8"))
    listed = page.rows[-len(result.rows) :]
    for (_, name, score, p_value, regions, verdict), row in zip(listed, result.rows, strict=True):
        assert name == row["image"] and float(score) == pytest.approx(row["score"], rel=1e-5)
        assert row["verdict"].startswith(verdict) and verdict
        if row["p_value"] is None:
            assert p_value == regions == ""
        else:
            assert float(p_value) == pytest.approx(row["p_value"], rel=1e-3) and int(regions) == row["num_regions"]


def test_the_report_shows_the_images_and_escapes_names(result, files):
    text = result.files["html"].read_text("utf-8")
    page = Page(text)
    assert "no longer at its place" not in text and text.count("<article") == len(result.rows)
    pictures = [link for link in page.links if link.startswith("data:image/")]
    assert len(pictures) == 2 * len(result.rows)
    assert all(link.startswith(("data:image/", "#")) for link in page.links)
    assert EVIL not in text and "&lt;img src=x onerror=alert(1)&gt;.png" in text and FORMULA in page.text
    article = next(part for part in text.split("<article")[1:] if "&lt;img src=x" in part)
    shown = re.search(r'src="data:image/png;base64,([^"]+)" alt="image', article)[1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(shown))))
    assert (shown == np.asarray(Image.open(files[2]))).all()


def test_no_path_of_the_server_is_told(result, files, tmp_path):
    """Neither in a file, nor in what is packed, nor in a sentence; not even the names of folders."""
    secrets = {str(files[0].parents[1]), str(result.files["zip"].parent.parent), *(path.parent.name for path in files)}
    secrets = [secret.encode() for secret in secrets] + [os.fsencode(tmp_path.parents[1])]
    texts = [path.read_bytes() for path in result.files["zip"].parent.rglob("*") if path.is_file()]
    with zipfile.ZipFile(result.files["zip"]) as archive:
        texts += [archive.read(name) for name in archive.namelist()] + [name.encode() for name in archive.namelist()]
    texts += [repr((result.rows, result.broken, result.lines)).encode()]
    texts += [caption.encode() for _, caption in result.thumbnails]
    assert len(texts) > 40 and not [secret for secret in secrets for text in texts if secret in text]
    assert b"000 (2).png" in result.files["csv"].read_bytes()


def test_the_archive_holds_all_under_names_that_any_system_takes(result):
    out = result.files["zip"].parent
    with zipfile.ZipFile(result.files["zip"]) as archive:
        names = archive.namelist()
        assert archive.testzip() is None and len(names) == len({name.casefold() for name in names})
        assert {"predictions.csv", "predictions.json", "report.html"} <= set(names)
        assert all(re.fullmatch(r"(heatmaps/|masks/)?\w[\w ().-]*\.(png|csv|json|html)", name) for name in names)
        for name in names:
            assert archive.read(name) == (out / name).read_bytes()
    pictures = {row[key] for row in result.rows for key in ("heatmap", "mask")}
    assert pictures < set(names) and len(pictures) == 2 * len(result.rows)
    left = {path.relative_to(out).parts[0] for path in out.rglob("*")}
    assert left == {"heatmaps", "masks", "thumbnails", *(path.name for path in result.files.values())}


def test_thumbnails_are_small_overlays_in_the_order_of_the_rows(result, engine, tmp_path):
    for (path, caption), row in zip(result.thumbnails, result.rows, strict=True):
        overlay = np.asarray(Image.open(result.files["zip"].parent / row["heatmap"]).convert("RGB")).astype(int)
        thumbnail = np.asarray(Image.open(path).convert("RGB")).astype(int)
        assert thumbnail.shape == overlay.shape and np.abs(thumbnail - overlay).mean() < 6
        assert caption.startswith(f"{row['image']}: {row['verdict'].partition(' (')[0]}")
        assert row["p_value"] is None or f"p = {row['p_value']:.2g}" in caption
    large = Image.fromarray(np.random.default_rng(0).integers(0, 255, (500, 900), np.uint8))
    large.save(tmp_path / "large.png")
    ((path, _),) = run(engine, "m", [tmp_path / "large.png"], tmp_path / "out")[0].thumbnails
    assert Image.open(path).size == (360, 200)


def test_sentences(result, engine):
    lines = "\n".join(result.lines)
    called = sum(row["verdict"].startswith("anomalous") for row in result.rows)
    assert f"8 images inspected, {called} called anomalous" in result.lines[0]
    known = engine.model("m").calibration
    assert "all 7 images judged by it were normal, at most about 1.4 " in lines and known.promise() in lines
    assert "Of another size than the 96 × 96 pixels" in lines and "other size.jpg" in lines and "--" not in lines
    assert [name for name, _ in result.broken] == ["broken.png", "cut.png"]
    assert all(name in reason and f"Left out: {reason}." in result.lines for name, reason in result.broken)


def test_progress_rises_to_the_result(done, files):
    told = done[1]
    shares = [share for share, _ in told]
    assert shares == sorted(shares) and shares[0] == 0 and 0.9 < shares[-1] < 1
    assert any(f"of {len(files)} images" in words for _, words in told)


def test_a_model_without_a_rate_ranks_by_score(engine, files, tmp_path):
    result, _ = run(engine, "uncalibrated", files[:4], tmp_path / "out")
    scores = [row["score"] for row in result.rows]
    assert scores == sorted(scores, reverse=True) and all(row["p_value"] is None for row in result.rows)
    assert any("uncalibrated" in line for line in result.lines) and "False alarms" not in "".join(result.lines)


def test_no_file_too_many_and_none_that_can_be_read(engine, files, tmp_path):
    for wrong, words in (([], "nothing to inspect"), (files[:1] * (batch.MOST + 1), "201 files are too many")):
        with pytest.raises(ZooError, match=words):
            next(inspect_batch(engine, "m", wrong, tmp_path / "out"))
    with pytest.raises(ZooError, match="no model"):
        run(engine, "unknown", files[:1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    result, _ = run(engine, "m", files[5:7], tmp_path / "out")
    assert not result.rows and len(result.broken) == 2 and result.lines[0] == "No image could be inspected."
    assert result.files["csv"].read_text() == ",".join(COLUMNS) + "\n"
    assert "broken.png" in result.files["html"].read_text("utf-8")


def test_what_is_refused_is_not_decoded(engine, files, tmp_path, monkeypatch):
    def refuse(path):
        if path == files[2]:
            raise ZooError(f"{path} is too large.")
        return image_size(path)

    read = []
    bring = AnomalyModule.bring
    monkeypatch.setattr(AnomalyModule, "bring", lambda model, path, *more: (read.append(path), bring(model, path))[1])
    monkeypatch.setattr(batch, "check", refuse)
    result, _ = run(engine, "m", files[1:4], tmp_path / "out")
    assert result.broken == [(EVIL, f"{EVIL} is too large")] and len(result.rows) == 2 and files[2] not in read
    assert f"Left out: {EVIL} is too large." in result.lines


def test_pixels_of_a_batch_have_a_limit(engine, files, tmp_path, monkeypatch):
    """What still fits is taken."""
    Image.new("L", (200, 150)).save(tmp_path / "large.png")
    monkeypatch.setattr(batch, "TOTAL", 2 * 96 * 96)
    result, _ = run(engine, "m", [files[0], tmp_path / "large.png", *files[1:3]], tmp_path / "out")
    assert sorted(names_of(result)) == ["000 (2).png", "000.png"]
    assert [name for name, _ in result.broken] == ["large.png", EVIL]
    assert result.lines[-1].startswith(f"Left out: {EVIL}: a batch takes ")


def test_an_image_that_memory_does_not_hold_stops_no_other(engine, files, tmp_path, monkeypatch):
    predict = AnomalyModule.predict_brought

    def full(model, images, batch_size=8):
        if any(image.array.dtype == np.uint16 for image in images):
            raise torch.OutOfMemoryError(f"no room at {tmp_path}")
        return predict(model, images, batch_size)

    monkeypatch.setattr(AnomalyModule, "predict_brought", full)
    result, _ = run(engine, "m", files[1:5], tmp_path / "out")
    assert len(result.rows) == 3 and [name for name, _ in result.broken] == ["deep über.tif"]
    assert "smaller image" in result.lines[-1] and str(tmp_path) not in str(result.broken)


def test_the_work_goes_in_small_parts_and_keeps_no_map(files, engine, tmp_path):
    """Between two parts nothing of the images before is held."""

    class Watched:
        sizes, maps = [], []

        def model(self, name):
            return engine.model(name)

        def predict(self, name, images):
            gc.collect()
            assert not [map for map in self.maps if map() is not None]
            self.sizes.append(len(images))
            found = engine.predict(name, images)
            self.maps += [weakref.ref(one.map) for one in found]
            return found

    watched = Watched()
    result, _ = run(watched, "m", [files[0], files[3]] * 5, tmp_path / "out")
    assert watched.sizes == [4, 4, 2] and len(result.rows) == 10 == len(set(names_of(result)))
    assert "deep über (5).tif" in names_of(result) and len({row["heatmap"] for row in result.rows}) == 10


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_a_cancelled_batch_leaves_nothing(steps, engine, files, tmp_path):
    work = inspect_batch(engine, "m", files[:8], tmp_path / "out")
    for _ in range(steps):
        assert not isinstance(next(work), Result)
    assert (tmp_path / "out").exists() == (steps > 1)
    work.close()
    assert list(tmp_path.iterdir()) == []


def test_a_result_stays_when_its_generator_is_closed(engine, files, tmp_path):
    work = inspect_batch(engine, "m", files[:1], tmp_path / "out")
    while not isinstance(each := next(work), Result):
        pass
    work.close()
    assert all(path.is_file() for path in each.files.values())


def test_a_disk_that_refuses(engine, files, tmp_path, monkeypatch):
    def full(path, text):
        raise ZooError(f"{path} could not be written (no space left)")

    monkeypatch.setattr(batch.checkpoint, "write_text", full)
    with pytest.raises(ZooError, match="could not be written on the server") as error:
        run(engine, "m", files[:1], tmp_path / "out")
    assert str(tmp_path) not in str(error.value) and list(tmp_path.iterdir()) == []


def test_formulas_are_harmless_in_the_csv_file_alone(result):
    line = next(line for line in result.files["csv"].read_text("utf-8").splitlines() if "HYPERLINK" in line)
    assert line.startswith("\"'=HYPERLINK") and FORMULA in names_of(result)
    for name in ("=1+1.png", "+1.png", "-1.png", "@a.png", "  =1.png", "＝1.png"):
        assert harmless(name).lstrip()[0] == "'" and harmless(name).replace("'", "") == name
    assert harmless("a;=1|+2.png") == "a;'=1|'+2.png" and harmless("wafer-3 (+2).png") == "wafer-3 (+2).png"


def test_odd_names(engine, files, tmp_path):
    """As long as a name can be, hidden, of no encoding, with line breaks and marks that turn text around."""
    names = ["x" * 251 + ".png", "ü" * 125 + ".png", ".png", "..png", "a\nb\t=c.png", "\u202egnp.exe.png", "a\\b.png"]
    odd = [tmp_path / str(number) / name for number, name in enumerate([*names, os.fsdecode(b"bad\xff.png")])]
    for path in odd:
        path.parent.mkdir()
        shutil.copy(files[0], path)
    result, _ = run(engine, "m", odd, tmp_path / "out")
    assert not result.broken and len(set(names_of(result))) == len(odd) == len({row["heatmap"] for row in result.rows})
    assert all(name.isprintable() for name in names_of(result)) and "\\u202egnp.exe.png" in names_of(result)
    assert "no longer at its place" not in result.files["html"].read_text("utf-8")
    with zipfile.ZipFile(result.files["zip"]) as archive:
        assert all(re.fullmatch(r"(heatmaps/|masks/)?[\w(][\w ().-]*", name) for name in archive.namelist())


def test_lists_are_built_as_those_of_zoo_predict(result, files, tmp_path):
    """What reads the one reads the other."""
    assert main(["predict", "m", str(files[2]), "--out", str(tmp_path)]) == 0
    with open(tmp_path / "predictions.csv", newline="") as one, open(result.files["csv"], newline="") as other:
        assert next(csv.reader(one)) == next(csv.reader(other))
    one, other = (json.loads(path.read_text()) for path in (tmp_path / "predictions.json", result.files["json"]))
    assert one.keys() == other.keys() and one["calibration"] == other["calibration"]
    (row,), own = one["images"], next(row for row in other["images"] if row["image"] == EVIL)
    assert row["image"] == str(files[2]) and row["heatmap"] != own["heatmap"] and row.keys() == own.keys()
    for key in row.keys() - {"image", "heatmap", "mask", "regions"}:
        assert row[key] == pytest.approx(own[key])
    assert [region["box"] for region in row["regions"]] == [region["box"] for region in own["regions"]]
