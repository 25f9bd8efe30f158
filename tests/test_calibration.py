"""Stated false-alarm rates: the bound against scipy's, regions against brute force, and the way from fit to verdict."""

import csv
import json
import math
import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

import zoo
from zoo import checkpoint
from zoo.calibration import Calibration, allowed_above, calibrated, check_normals, normals_needed, supported_rate
from zoo.calibration import threshold as threshold_of
from zoo.cli import main
from zoo.errors import ZooError
from zoo.hub import model_place
from zoo.regions import LOWEST, Region, find_regions, region_level, region_mask
from zoo.seen import digest

RATES = (0.001, 0.01, 0.025, 0.05, 0.1, 0.3, 0.5, 0.9)


def float32s(values):
    return sorted(np.asarray(values, np.float32).tolist())


# ---- the bound -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("n", [1, 5, 20, 58, 59, 298, 299, 300, 472, 473, 1000, 5000])
def test_as_many_may_lie_above_as_the_binomial_allows(n, rate):
    allowed = allowed_above(n, rate)
    assert -1 <= allowed < n
    if allowed >= 0:
        # Of n draws the (allowed + 1)-th largest has, of the uniform distribution, a Beta share above it.
        assert stats.beta(allowed + 1, n - allowed).cdf(rate) >= 0.95 - 1e-12
    assert stats.binom(n, rate).cdf(allowed + 1) > 0.05  # one more would be too many


def test_299_normals_state_one_percent():
    assert normals_needed(0.01) == 299 and allowed_above(299, 0.01) == 0 and allowed_above(298, 0.01) == -1
    assert [normals_needed(rate) for rate in (0.05, 0.001)] == [59, 2995]
    assert allowed_above(473, 0.01) == 1  # the next one in tables of nonparametric tolerance limits


def test_a_tiny_rate_is_refused_without_ado():
    assert normals_needed(1e-9) == 2_995_732_273  # ln 0.05 / ln(1 - 1e-9), rounded up
    with pytest.raises(ZooError, match="takes 2,995,732,273 normal images, and there are 10"):
        check_normals(10, 1e-9)


@pytest.mark.parametrize("rate", RATES)
def test_no_fewer_normals_do(rate):
    n = normals_needed(rate)
    assert (1 - rate) ** n <= 0.05 < (1 - rate) ** (n - 1)


def test_the_supported_rate_works_and_is_the_lowest_of_three_digits():
    for n in [*range(1, 400), 999, 2994, 25_000]:
        rate = supported_rate(n)
        exact = 1 - 0.05 ** (1 / n)
        assert allowed_above(n, rate) >= 0 and exact <= rate <= exact * 1.01
        assert float(f"{rate:g}") == rate  # as it is printed


def test_too_few_are_told_what_they_support():
    with pytest.raises(ZooError) as caught:
        check_normals(20, 0.01)
    assert "takes 299" in str(caught.value) and "are 20" in str(caught.value)
    offered = float(str(caught.value).split("--false-alarm-rate ")[1].split(",")[0])
    check_normals(20, offered)
    with pytest.raises(ZooError):
        check_normals(20, offered - 0.001)


def test_ties_and_neighbours_stay_below():
    values = float32s([1.0] * 400)
    found = threshold_of(values, 0.01)
    assert not np.any(np.asarray(values, np.float32) >= found)  # as numpy compares a float32 map with a number
    assert np.float32(found) == np.nextafter(np.float32(1), np.float32(2)) >= found
    rng = np.random.default_rng(0)
    values = float32s(rng.integers(0, 5, 1000))
    allowed = allowed_above(1000, 0.1)
    found = threshold_of(values, 0.1)
    assert sum(v >= found for v in values) <= allowed < sum(v >= math.nextafter(math.floor(found), -1) for v in values)


@pytest.mark.parametrize("steps", [None, 7, 100])
def test_the_rate_holds_in_a_simulation(steps):
    """1,000 draws from a known distribution, continuous or tied: the true rate is exceeded in 5 % of them at most."""
    rng, rate, n = np.random.default_rng(1), 0.05, 93
    exceeded = 0
    for _ in range(1000):
        draws = rng.exponential(size=n) if steps is None else np.floor(rng.exponential(size=n) * steps) / steps
        found = threshold_of(float32s(draws), rate)
        reach = found if steps is None else math.ceil(found * steps) / steps
        exceeded += math.exp(-reach) > rate  # share of the exponential distribution at or above it
    assert exceeded <= 64
    if steps is None:  # the bound is not slack: 93 draws with one above reach 5 % almost exactly
        assert allowed_above(n, rate) == 1 and exceeded >= 30


def test_p_values_are_counts():
    rng = np.random.default_rng(2)
    scores, levels = float32s(rng.integers(0, 30, 100)), float32s(rng.normal(size=100))
    found = calibrated(scores[::-1], levels[::-1], 0.05, 0.0, 1, "32-true")
    assert found.scores == scores and found.levels == levels
    for value in (-1.0, 0.0, 12.0, 12.5, scores[-1], 99.0):
        assert found.p_value(value) == (1 + np.sum(np.array(scores) >= value)) / 101
        assert found.region_p_value(value) == (1 + np.sum(np.array(levels) >= value)) / 101
    assert found.in_words(99.0) == "fewer than 1 in 101 normal images score as high"
    assert found.in_words(scores[0]) == "100 of 100 normal images score as high"
    assert found.promise() == "at most 5 % of normal images, with 95 % confidence, from 100 normals"


def test_another_rate_needs_only_what_is_stored():
    rng = np.random.default_rng(3)
    scores, levels = rng.normal(size=(2, 400)).astype(np.float32).tolist()
    found = calibrated(scores, levels, 0.01, -1.0, 4, "bf16-mixed")
    stored = Calibration(**json.loads(checkpoint.dump(found.to_dict())))
    assert stored == found
    assert stored.at_rate(0.1) == calibrated(scores, levels, 0.1, -1.0, 4, "bf16-mixed")
    with pytest.raises(ZooError, match="takes 2,995"):
        stored.at_rate(0.001)


@pytest.mark.parametrize(
    "wrong",
    [
        {"scores": [2.0, 1.0]},
        {"scores": [1.0, math.nan]},
        {"scores": ["a", "b"]},
        {"levels": [1.0]},
        {"pixel_threshold": math.inf},
        {"false_alarm_rate": None},
    ],
)
def test_a_damaged_calibration_is_refused(wrong):
    found = calibrated([1.0, 2.0], [1.0, 2.0], 0.8, 0.0, 1, "32-true")
    with pytest.raises((ValueError, TypeError)):
        replace(found, **wrong)


# ---- regions ---------------------------------------------------------------------------------------------------------


def brute_level(map, min_area):
    """By trying each value of the map as a threshold."""
    for t in np.unique(map[map > -np.inf])[::-1]:
        labels, count = ndimage.label(map >= t, np.ones((3, 3)))
        if count and np.bincount(labels.ravel())[1:].max() >= min_area:
            return float(t)
    return LOWEST


def maps():
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(17, 23))
    yield noise
    yield ndimage.gaussian_filter(noise, 2)
    yield rng.integers(0, 4, (12, 12)).astype(float)  # ties
    yield np.where(rng.random((20, 20)) < 0.5, rng.normal(size=(20, 20)), -np.inf)  # a region of interest
    yield np.eye(9) + rng.normal(size=(9, 9)) * 1e-3  # a diagonal: connected by its corners
    yield np.zeros((8, 8))
    yield np.full((8, 8), -np.inf)


@pytest.mark.parametrize("min_area", [1, 2, 3, 7, 9, 30, 64, 100, 400])
def test_level_is_that_of_brute_force(min_area):
    for map in maps():
        map = map.astype(np.float32)
        assert region_level(map, min_area) == brute_level(map, min_area)


@pytest.mark.parametrize("min_area", [1, 3, 10])
def test_regions_are_those_that_are_labelled(min_area):
    for map in maps():
        map = map.astype(np.float32)
        for t in np.quantile(map[map > -np.inf], [0.5, 0.8, 0.95]) if (map > -np.inf).any() else [0.0]:
            labels, count = ndimage.label(map >= t, np.ones((3, 3)))
            expected = [labels == i for i in range(1, count + 1) if np.sum(labels == i) >= min_area]
            found = find_regions(map, t, min_area)
            assert [r.peak for r in found] == sorted((map[part].max() for part in expected), reverse=True)
            assert sorted(r.area for r in found) == sorted(part.sum() for part in expected)
            for region in found:
                (part,) = [part for part in expected if part[region.position]]
                rows, columns = np.nonzero(part)
                box = (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
                assert region.box == box and region.area == part.sum() and map[region.position] == region.peak
                assert region.level == brute_level(np.where(part, map, -np.inf), min_area) >= np.float32(t)
            mask = np.any(expected, axis=0) if expected else np.zeros(map.shape, bool)
            assert np.array_equal(region_mask(map, t, min_area), mask)
            assert bool(found) == (region_level(map, min_area) >= np.float32(t))


def test_a_region_is_described_in_nm_where_they_are_known():
    region = Region(12, (1, 2, 4, 8), 3.5, (2, 5), 3.0, 0.01)
    about = region.described()
    assert json.loads(checkpoint.dump(about)) == about and "area_nm2" not in about
    assert region.described(2.5) == about | {"area_nm2": 75.0, "height_nm": 7.5, "width_nm": 15.0}


# ---- from fit to verdict ---------------------------------------------------------------------------------------------


def run(*argv):
    return main([str(a) for a in argv])


def tile(rng, defect=False):
    """Stripes (64, 64) of uint8 in a phase of their own, with or without a bright square."""
    image = np.tile(np.where((np.arange(64) + rng.integers(16)) % 16 < 8, 150, 70), (64, 1))
    image = image + rng.normal(0, 6, (64, 64))
    if defect:
        y, x = rng.integers(8, 40, 2)
        image[y : y + 14, x : x + 14] = 245
    return np.clip(image, 0, 255).astype(np.uint8)


def write(folder, count, seed, defect=False):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        Image.fromarray(tile(rng, defect)).save(folder / f"{seed}-{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The fit's own data: 44 + 30 normals (20 of the first are held out) and 6 defects to test on."""
    root = tmp_path_factory.mktemp("own") / "data"
    write(root / "train/good", 44, 1)
    write(root / "test/good", 30, 2)
    write(root / "test/square", 6, 3, defect=True)
    return root


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    return write(tmp_path_factory.mktemp("other") / "normals", 70, 4)


FIT = ("fit", "padim", "--preset", "lite", "--input-size", 64, "--dims", 40, "--name", "m")


@pytest.fixture(scope="module")
def fitted(data, tmp_path_factory):
    """A model's folder, fitted by the command line, to be copied."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        assert run(*FIT, "--data", data) == 0
    return home / "models/m"


@pytest.fixture
def model(fitted):
    place = model_place("m")
    shutil.copytree(fitted, place)
    return place


def record_of(place):
    return json.loads((place / "results.json").read_text())["calibration"]


def test_verdicts_with_a_stated_rate(model, data, others, tmp_path, capsys):
    weights = (model / "model.safetensors").read_bytes()
    assert run("calibrate", "m", "--data", others, "--false-alarm-rate", 0.05, "--min-area", 4) == 0
    promise = "at most 5 % of normal images, with 95 % confidence, from 70 normals"
    assert promise in capsys.readouterr().out
    assert (model / "model.safetensors").read_bytes() == weights
    found = zoo.from_pretrained("m").calibration
    reference = zoo.from_pretrained("m").predict(sorted(others.iterdir()))
    assert found.scores == pytest.approx(sorted(p.score for p in reference), rel=1e-5)
    assert found.levels == pytest.approx(sorted(region_level(p.map, 4) for p in reference), rel=1e-5)
    assert found.image_threshold == np.nextafter(np.float32(found.scores[-1]), np.float32(np.inf))  # none of 70 above
    assert found.precision == "32-true" and found.min_area == 4
    median = np.median(np.concatenate([p.map.ravel() for p in reference]))
    assert found.pixel_median == pytest.approx(median, rel=1e-3)
    about = record_of(model)
    assert about["normals"] == 70 and about["checked"] and about["repeated"] == about["broken"] == 0
    assert about["data"]["name"] == "normals" and about["false_alarm_rate"] == 0.05
    card = " ".join((model / "README.md").read_text().split())
    assert "Calibrated on 70 distinct normal images of `normals`" in card and "at most 5 %" in card
    assert "a region of 4 pixels or more" in card and "uncalibrated" not in card

    assert run("predict", "m", data / "test", "--out", tmp_path / "out") == 0
    assert promise in capsys.readouterr().out
    rows = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    with open(tmp_path / "out/predictions.csv") as file:
        lines = list(csv.DictReader(file))
    for row, line in zip(rows, lines, strict=True):
        defect = "square" in row["image"]
        assert row["is_anomalous"] == (row["score"] >= found.image_threshold)
        assert row["p_value"] == (1 + sum(s >= row["score"] for s in found.scores)) / 71
        assert row["verdict"].startswith("anomalous" if row["is_anomalous"] else "normal")
        assert int(line["num_regions"]) == len(row["regions"]) and line["is_anomalous"] == str(row["is_anomalous"])
        mask = np.asarray(Image.open(tmp_path / "out" / row["mask"])) > 0
        assert mask.sum() == sum(region["area"] for region in row["regions"])
        assert all(a["peak"] >= b["peak"] for a, b in pairwise(row["regions"]))
        for region in row["regions"]:
            assert region["area"] >= 4 and region["level"] >= found.pixel_threshold
            assert region["p_value"] == (1 + sum(level >= region["level"] for level in found.levels)) / 71
        if defect:
            assert row["is_anomalous"] and row["regions"]
            assert "fewer than 1 in 71 normal images" in row["verdict"]
    assert sum(row["is_anomalous"] for row in rows) <= 6 + 5


def test_another_rate_without_the_data(model, others, capsys):
    assert run("calibrate", "m", "--false-alarm-rate", 0.1) == 2
    assert "never calibrated" in capsys.readouterr().err
    assert run("calibrate", "m", "--data", others, "--false-alarm-rate", 0.05) == 0
    first = zoo.from_pretrained("m").calibration
    assert run("calibrate", "m", "--false-alarm-rate", 0.2) == 0
    second = zoo.from_pretrained("m").calibration
    assert second == first.at_rate(0.2) and second.image_threshold < first.image_threshold
    assert record_of(model)["false_alarm_rate"] == 0.2 and record_of(model)["data"]["name"] == "normals"
    assert "at most 20 %" in (model / "README.md").read_text()
    (model / "results.json").unlink()
    assert run("calibrate", "m", "--false-alarm-rate", 0.2) == 0
    assert "at most 20 %" in (model / "README.md").read_text()
    capsys.readouterr()
    assert run("calibrate", "m", "--false-alarm-rate", 0.01) == 2
    assert "takes 299 normal images, and there are 70" in capsys.readouterr().err
    assert run("calibrate", "m", "--false-alarm-rate", 0.1, "--min-area", 5) == 2
    assert "give --data with --min-area" in capsys.readouterr().err
    assert zoo.from_pretrained("m").calibration == second


@pytest.mark.parametrize("rate", ["0", "1", "1.5", "-0.1", ".nan"])
def test_a_rate_is_a_share(model, others, rate, capsys):
    assert run("calibrate", "m", "--data", others, f"--false-alarm-rate={rate}") == 2
    assert "between 0 and 1" in capsys.readouterr().err


def test_what_is_missing_is_said(model, others, capsys):
    assert run("calibrate", "m", "--data", others) == 2
    assert "--false-alarm-rate 0.01" in capsys.readouterr().err
    assert run("calibrate", "m", "--data", others, "--false-alarm-rate", 0.05, "--min-area", 0) == 2
    assert "--min-area is at least 1" in capsys.readouterr().err
    assert run("calibrate", "m", "--data", others, "--false-alarm-rate", 0.05, "--min-area", 5000) == 2
    assert "more than these images have pixels" in capsys.readouterr().err
    assert run("calibrate", "m", "--data", others / "nowhere", "--false-alarm-rate", 0.05) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not zoo.from_pretrained("m").calibration.calibrated


def test_of_the_fits_own_data_only_what_it_has_not_seen(model, data):
    assert run("calibrate", "m", "--data", data, "--false-alarm-rate", 0.06) == 0
    with open(model / "private/calibration.csv") as file:
        names = {row["image"] for row in csv.DictReader(file)}
    with open(model / "private/seen.csv") as file:
        seen = list(csv.DictReader(file))
    held = {row["image"] for row in seen if row["role"] == "held out"}
    assert len(held) == 20 and len(seen) == 44
    assert names == held | {path.relative_to(data).as_posix() for path in (data / "test/good").iterdir()}


def test_images_of_the_fit_are_refused_under_any_name(model, data, others, tmp_path, capsys):
    with open(model / "private/seen.csv") as file:
        learned = [row["image"] for row in csv.DictReader(file) if row["role"] == "fit"]
    folder = shutil.copytree(others, tmp_path / "mixed")
    Image.open(data / learned[0]).convert("RGB").save(folder / "new.tif")
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.05) == 2
    error = capsys.readouterr().err
    assert "1 of these normal images" in error and "new.tif" in error and error.count("\n") == 1
    assert run("calibrate", "m", "--data", data / "train/good", "--false-alarm-rate", 0.05) == 2
    assert "24 of these normal images" in capsys.readouterr().err
    assert not zoo.from_pretrained("m").calibration.calibrated
    (folder / "new.tif").unlink()
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.05) == 0


def test_a_model_without_its_list_takes_other_data_only(model, data, others, capsys):
    shutil.rmtree(model / "private")
    assert run("calibrate", "m", "--data", data, "--false-alarm-rate", 0.1) == 2
    assert "fitted on this data" in capsys.readouterr().err
    assert run("calibrate", "m", "--data", others, "--false-alarm-rate", 0.05) == 0
    assert "can't be checked" in capsys.readouterr().out
    assert not record_of(model)["checked"] and "could not be checked" in (model / "README.md").read_text()


def test_copies_count_once_and_broken_images_not_at_all(model, others, tmp_path, capsys):
    folder = shutil.copytree(others, tmp_path / "copies")
    for i, path in enumerate(sorted(folder.iterdir())[:5]):
        Image.open(path).save(folder / f"again-{i}.bmp")
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.05) == 0
    assert "5 images are copies" in capsys.readouterr().out
    assert record_of(model)["normals"] == 70 and record_of(model)["repeated"] == 5
    (folder / "broken.png").write_bytes(next(others.iterdir()).read_bytes()[:200])
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.05) == 2
    assert "broken.png" in capsys.readouterr().err
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.05, "--skip-broken") == 0
    assert "Left out" in capsys.readouterr().out
    assert record_of(model)["normals"] == 70 and record_of(model)["broken"] == 1


def test_too_few_and_none(model, others, tmp_path, capsys):
    folder = tmp_path / "few"
    folder.mkdir()
    for path in sorted(others.iterdir())[:20]:
        shutil.copy(path, folder)
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.01) == 2
    assert "and there are 20: give more, or take --false-alarm-rate 0.14" in capsys.readouterr().err
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.14) == 0
    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    assert run("calibrate", "m", "--data", folder, "--false-alarm-rate", 0.95, "--skip-broken") == 2
    assert "normal image" in capsys.readouterr().err


def test_what_a_selection_has_looked_at_is_seen(data, tmp_path, capsys):
    steps = ("--preset", "lite", "--input-size", 64, "--max-steps", 2, "--batch-size", 8, "--data", data)
    assert run("fit", "stfpm", *steps, "--name", "by-metric", "--select", "image_auroc") == 0
    assert run("fit", "stfpm", *steps, "--name", "by-normals", "--select", "normal") == 0
    capsys.readouterr()
    assert run("calibrate", "by-metric", "--data", data, "--false-alarm-rate", 0.1) == 0
    with open(model_place("by-metric") / "private/calibration.csv") as file:
        names = [row["image"] for row in csv.DictReader(file)]
    half = {line for line in (model_place("by-metric") / "private/selection.csv").read_text().split()[1:]}
    assert len(names) == 20 + 15 and not half & set(names)
    assert run("calibrate", "by-normals", "--data", data, "--false-alarm-rate", 0.1) == 0
    assert record_of(model_place("by-normals"))["normals"] == 30  # the test normals alone
    folder = tmp_path / "chosen"
    folder.mkdir()
    for name in half:
        shutil.copy(data / name, folder)
    assert run("calibrate", "by-metric", "--data", folder, "--false-alarm-rate", 0.2) == 2
    assert f"{len(half)} of these normal images" in capsys.readouterr().err


def test_a_store_of_the_fits_data_is_the_fits_data(model, data, tmp_path):
    assert run("data", "prepare", data, "--size", 64, "--out", tmp_path / "store") == 0
    assert run("calibrate", "m", "--data", tmp_path / "store", "--false-alarm-rate", 0.06) == 0
    assert record_of(model)["normals"] == 50


def test_the_precision_of_the_calibration_is_that_of_predict(model, data, others, tmp_path, capsys):
    args = ("calibrate", "m", "--data", others, "--false-alarm-rate", 0.05, "--precision", "bf16-mixed")
    assert run(*args) == 0
    loaded = zoo.from_pretrained("m")
    assert loaded.precision == loaded.calibration.precision == record_of(model)["precision"] == "bf16-mixed"
    prediction = loaded.predict(sorted(others.iterdir())[0])
    assert min(abs(prediction.score - score) for score in loaded.calibration.scores) < 1e-4 * prediction.score
    capsys.readouterr()
    assert run("predict", "m", data / "test/good", "--out", tmp_path / "o", "--precision", "32-true") == 0
    assert "the rate was stated in bf16-mixed, not in 32-true" in capsys.readouterr().out


def test_models_of_before_regions_load(model):
    config = json.loads((model / "config.json").read_text())
    old = ("scores", "image_threshold", "pixel_threshold", "pixel_median", "calibrated")
    config["calibration"] = {key: config["calibration"][key] for key in old}
    (model / "config.json").write_text(json.dumps(config))
    loaded = zoo.from_pretrained("m")
    assert loaded.calibration.levels == [] and loaded.calibration.min_area == 1
    prediction = loaded.predict(tile(np.random.default_rng(9)))
    assert prediction.regions is None and prediction.p_value is None and "uncalibrated" in prediction.verdict
    config["calibration"]["surprise"] = 1
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match="calibration"):
        zoo.from_pretrained("m")


def test_what_lies_outside_of_the_region_of_interest_makes_no_region(model, others):
    from zoo.calibrate import score_normals
    from zoo.module import Batch

    run("calibrate", "m", "--data", others, "--false-alarm-rate", 0.05)
    loaded = zoo.from_pretrained("m")
    image = torch.from_numpy(tile(np.random.default_rng(3), defect=True) / np.float32(255))[None, None]
    found = loaded(image).map[0, 0]
    roi = torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    y, x = divmod(int(found.argmax()), 64)
    roi[..., : y - 3, :] = True  # above the peak of the defect
    (whole,) = loaded.predict_step(Batch(image, ["a"]), 0)
    (inside,) = loaded.predict_step(Batch(image, ["a"], roi=roi), 0)
    assert whole.regions[0].position == (y, x)
    assert all(region.box[2] <= y - 3 for region in inside.regions)
    ((_, _, level),) = score_normals(loaded, [Batch(image, ["a"], roi=roi)]).rows
    assert level == pytest.approx(float(found[: y - 3].max()))


def test_a_digest_is_of_what_is_seen():
    rng = np.random.default_rng(5)
    image = rng.integers(0, 255, (9, 12), np.uint8)
    assert digest(image) == digest(np.repeat(image[..., None], 3, axis=2)) == digest(np.asfortranarray(image))
    other = image.copy()
    other[0, 0] ^= 1
    shapes = [image.reshape(12, 9), image.astype(np.uint16), other, image[::-1]]
    assert len({digest(image), *map(digest, shapes)}) == 5
