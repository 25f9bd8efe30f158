"""What the demo shows of a result: words, figures, pictures, and all of it at each rate that can be chosen."""

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import tifffile
from PIL import Image

import zoo
from zoo import plots
from zoo.calibration import Calibration
from zoo.cli import main
from zoo.demo import words
from zoo.demo.viewer import COLOURS, Look, colour_tables, figures, places, rates_of, render
from zoo.errors import ZooError
from zoo.module import Prediction

NAME = '<img src=x onerror=alert(1)>".tif'


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def model(mvtec, tmp_path_factory):
    """Calibrated for 20 %."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        fit = ("fit", "patchcore", "--preset", "lite", "--input-size", 64, "--bank-size", 300, "--data", mvtec)
        assert run(*fit, "--name", "m") == 0
        assert run("calibrate", "m", "--data", mvtec, "--false-alarm-rate", 0.2) == 0
        return zoo.from_pretrained("m")


@pytest.fixture(scope="module")
def look(model, mvtec, tmp_path_factory):
    """At a defect in 16 bits, with an evil name and a known pixel size."""
    image = np.asarray(Image.open(mvtec / "test/square/001.png")).astype(np.uint16) * 257
    text = "\r\n".join(["0"] * 3 + ["AP_IMAGE_PIXEL_SIZE", "Image Pixel Size = 25.0 nm", ""])
    path = tmp_path_factory.mktemp("image") / "a.tif"
    tifffile.imwrite(path, image, extratags=[(34118, "s", 0, text, True)])
    brought = model.bring(path)
    return Look(NAME, "m", model, brought, model.predict_brought([brought])[0])


def normal(model, mvtec, name="m"):
    brought = model.bring(mvtec / "test/good/000.png")
    return Look("good.png", name, model, brought, model.predict_brought([brought])[0])


class Page(HTMLParser):
    """Balanced tags with attributes, and texts."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text = [], [], ""
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("img", "input", "path", "rect"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def links(self, ending):
        return [about["href"] for tag, about in self.tags if tag == "a" and about["download"].endswith(ending)]


def content(uri):
    return base64.b64decode(uri.partition("base64,")[2])


# ---- words -----------------------------------------------------------------------------------------------------------


def known(scores, rate=0.1, threshold=50.0):
    scores = sorted(scores)
    return Calibration(scores, threshold, 1.0, 0.0, True, rate, levels=scores, precision="32-true")


@pytest.mark.parametrize(
    "score, text",
    [
        (1000, "None of 400 normal images scores this high."),
        (399, "About 1 in 400 normal images scores this high (1 of 400)."),
        (396, "About 1 in 100 normal images scores this high (4 of 400)."),
        (300, "About 1 in 4 normal images scores this high (100 of 400)."),
        (100, "Most normal images score this high (300 of 400)."),
        (240, "Many normal images score this high (160 of 400)."),
        (-5, "All 400 normal images score this high."),
    ],
)
def test_rarity_counts_normals(score, text):
    assert words.rarity(known(map(float, range(400))), score) == text


def prediction(anomalous, regions):
    verdict = "anomalous (...)" if anomalous else "normal (...)"
    return Prediction(1.0, np.zeros((8, 8)), 0.1, anomalous, verdict, [None] * regions)


def test_the_verdict_says_what_score_and_regions_say():
    rate = known([1.0] * 30)
    said = {
        (anomalous, n): words.meaning(prediction(anomalous, n), rate) for anomalous in (False, True) for n in (0, 1, 3)
    }
    assert len(set(said.values())) == 6 and all("10 %" in text for text in said.values())
    assert "one place stands out" in said[True, 1] and "3 places stand out" in said[False, 3]
    assert words.headline(prediction(True, 0)) == "Anomalous" and words.headline(prediction(False, 0)) == "Normal"
    assert words.headline(prediction(False, 1)) == "Normal as a whole"
    assert words.headline(Prediction(1.0, np.zeros((8, 8)))) == "No verdict"


def test_why_there_is_no_rate(model, mvtec):
    said = words.no_rate(model, (100, 64), "m")
    assert "96 × 96" in said and "64 × 100" in said  # width first
    bare = zoo.from_pretrained(model.folder)
    bare.calibration = None
    assert "no threshold" in words.no_rate(bare, (96, 96), "m") and "zoo calibrate m" in words.no_rate(
        bare, (9, 9), "m"
    )


# ---- figures and rates -----------------------------------------------------------------------------------------------


def test_figures_are_those_of_predict(look):
    told, prediction = figures(look, look.at()), look.prediction
    assert json.loads(json.dumps(told)) == told
    assert told["score"] == prediction.score and told["p_value"] == prediction.p_value
    assert told["is_anomalous"] is True and told["image"] == NAME and told["size"] == [96, 96]
    assert told["pixel_nm"] == 25 and told["false_alarm_rate"] == 0.2
    areas = [region.area for region in prediction.regions]
    assert [region["area"] for region in told["regions"]] == areas and areas
    assert told["regions"][0]["area_nm2"] == areas[0] * 625


def test_another_rate_is_as_if_it_had_been_stated(look, model, mvtec):
    """Against a model that was calibrated for that rate, and looks again."""
    for one in (look, normal(model, mvtec)):
        for rate in rates_of(model.calibration):
            other = zoo.from_pretrained(model.folder)
            other.calibration = model.calibration.at_rate(rate)
            again = other.predict_brought([one.brought])[0]
            found, _, mask = one.at(rate)
            assert (found.is_anomalous, found.verdict, found.p_value) == (
                again.is_anomalous,
                again.verdict,
                again.p_value,
            )
            assert found.regions == again.regions
            assert np.array_equal(mask, plots.mask(again.map, other.calibration))


def test_rates_are_those_that_the_normals_support(model):
    rates = rates_of(known(map(float, range(299)), rate=0.07))
    assert rates == [0.01, 0.02, 0.05, 0.07, 0.1, 0.2]  # 299 normals support 1 %, and the stated one is among them
    assert rates_of(None) == []
    assert rates_of(model.calibration)[-1] == 0.2


def test_evidence_is_asked_for_where_the_map_is_highest(look, model, mvtec):
    assert places(look) == [region.position for region in look.prediction.regions][:3]
    one = normal(model, mvtec)
    quiet = Look("x", "m", model, one.brought, one.prediction._replace(regions=[]))
    row, column = places(quiet)[0]
    assert quiet.prediction.map[row, column] == quiet.prediction.map.max()


# ---- the page --------------------------------------------------------------------------------------------------------


def test_a_result_holds_all_rates_and_nothing_else_is_needed(look, model):
    text = render([look])
    page, rates = Page(text), rates_of(model.calibration)
    assert "<img src=x" not in text and NAME in page.text
    sources = [about.get("src") or about.get("href") for tag, about in page.tags if tag in ("img", "a")]
    assert all(source.startswith("data:") for source in sources) and "://" not in text
    answers = [about for tag, about in page.tags if tag == "div" and about.get("class", "").startswith("answer")]
    assert len(answers) == len(rates) and ["hidden" in about for about in answers] == [rate != 0.2 for rate in rates]
    files = [json.loads(content(uri)) for uri in page.links(".json")]
    assert [told["false_alarm_rate"] for told in files] == rates
    assert files == [figures(look, look.at(rate)) for rate in rates]
    masks = [np.asarray(Image.open(io.BytesIO(content(uri)))) for uri in page.links("-mask.png")]
    assert all(np.array_equal(mask, look.at(rate).mask) for mask, rate in zip(masks, rates, strict=True))
    assert masks[-1].any()


def test_the_scale_is_that_of_the_normals(look, model, mvtec):
    """Levels are of the calibration's scale, whatever the image: a quiet image stays dark."""
    for one in (look, normal(model, mvtec)):
        (level,) = re.findall(r'data-map="([^"]+)"', render([one]))
        level = np.asarray(Image.open(io.BytesIO(content(level)))).astype(float) / 255
        known = model.calibration
        wanted = (one.prediction.map - known.pixel_median) / (2 * (known.pixel_threshold - known.pixel_median))
        assert np.abs(level - wanted.clip(0, 1)).max() < 0.51 / 255 + 1e-6


def test_two_results_stand_beside_each_other(look, model, mvtec):
    page = Page(render([look, normal(model, mvtec, "other")]))
    labels = [about["aria-label"] for tag, about in page.tags if tag == "article"]
    assert labels == [f"Result of m for {NAME}", "Result of other for good.png"]


def test_a_model_without_a_rate_says_so(look, model, mvtec, tmp_path):
    shutil.copytree(model.folder, tmp_path / "copy")
    bare = zoo.from_pretrained(tmp_path / "copy")
    bare.calibration = None
    one = normal(bare, mvtec)
    page = Page(render([one]))
    assert "no threshold" in page.text and "No verdict" in page.text and not page.links("-mask.png")
    assert figures(one, one.at())["regions"] is None and one.at().mask is None
    other = Image.fromarray(np.full((80, 64), 99, np.uint8))
    brought = model.bring(other)
    wide = Look("wide.png", "m", model, brought, model.predict_brought([brought])[0])
    page = Page(render([wide]))
    assert "calibrated on images of 96 × 96 pixels" in page.text and len(page.links(".json")) == 1
    assert figures(wide, wide.at())["false_alarm_rate"] is None  # it holds for another size
    with pytest.raises(ZooError, match="No rate holds"):
        wide.at(0.2)


def test_colours_are_perceptually_uniform():
    """Lightness (CIE L*) rises evenly, and so for those who don't see red or green (Viénot 1999) too."""
    from skimage.color import rgb2lab

    sees_no_green = np.array([[0.2928, 0.7072, 0.0], [0.2928, 0.7072, 0.0], [-0.0223, 0.0223, 1.0]])
    assert set(colour_tables()) == set(COLOURS)
    for digits in colour_tables().values():
        rgb = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(256, 3) / 255
        for colours in (
            rgb,
            np.clip(np.where(rgb > 0.04045, ((rgb + 0.055) / 1.055) ** 2.4, rgb / 12.92) @ sees_no_green.T, 0, 1)
            ** (1 / 2.4),
        ):
            lightness = rgb2lab(colours[None])[0, :, 0]
            assert (np.diff(lightness[::8]) > 0).all()
