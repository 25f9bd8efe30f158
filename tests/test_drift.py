"""Drift: tests against scipy's and direct formulas, and from files to the sentence, with and without a drift."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, stats

import zoo
from zoo import reference, twosample
from zoo.calibrate import Normals
from zoo.calibration import calibrated
from zoo.cli import main
from zoo.data.synthetic import render
from zoo.drift import LEAST, compare, drift
from zoo.errors import ZooError
from zoo.hub import model_place
from zoo.looks import FACTS, Onlooker, facts
from zoo.methods import create_model
from zoo.module import Batch
from zoo.reference import Reference, read_reference, write_reference
from zoo.seen import digest
from zoo.tiles import tiles_of
from zoo.twosample import energy_test, holm

SIZE, RATE = 128, 0.05


def run(*argv):
    return main([str(a) for a in argv])


# ---- what a picture looks like ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pictures():
    """Four synthetic images (4, 1, 64, 60) in [0, 1]."""
    images = [render(i, seed=3, size=64)[0][:, :60] for i in range(4)]
    return torch.from_numpy(np.stack(images)[:, None] / np.float32(255))


def fact(images, what, roi=None):
    return facts(images, roi)[:, FACTS.index(what)].numpy()


def test_facts_are_those_of_direct_formulas(pictures):
    found = facts(pictures).numpy()
    for image, (brightness, contrast, shading, noise, sharpness) in zip(
        pictures[:, 0].double().numpy(), found, strict=True
    ):
        assert brightness == pytest.approx(image.mean(), rel=1e-5) and contrast == pytest.approx(image.std(), rel=1e-5)
        y, x = np.mgrid[-0.5:0.5:64j, -0.5:0.5:60j]
        plane, *_ = np.linalg.lstsq(np.stack([y.ravel(), x.ravel(), np.ones(y.size)], 1), image.ravel())
        assert shading == pytest.approx(np.hypot(*plane[:2]), rel=1e-3, abs=1e-5)
        second = ndimage.convolve(image, np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]]))[1:-1, 1:-1]
        sigma = np.sqrt(np.pi / 2) / 6 * np.abs(second).mean()
        assert noise == pytest.approx(sigma, rel=1e-4)
        near, far = (
            np.mean((image[k:] - image[:-k]) ** 2) + np.mean((image[:, k:] - image[:, :-k]) ** 2) - 4 * sigma**2
            for k in (2, 4)
        )
        assert sharpness == pytest.approx(near / far, rel=1e-4)


def test_facts_tell_what_they_are_called(pictures):
    rng = torch.Generator().manual_seed(0)
    flat = 0.5 + 0.03 * torch.randn(1, 1, 200, 200, generator=rng)
    assert fact(flat, "noise") == pytest.approx(0.03, rel=0.03)
    assert np.allclose(fact(0.5 * pictures + 0.2, "sharpness"), fact(pictures, "sharpness"), rtol=1e-3)
    blurred = torch.from_numpy(ndimage.gaussian_filter(pictures.numpy(), (0, 0, 1, 1)))
    assert (fact(blurred, "sharpness") < 0.9 * fact(pictures, "sharpness")).all()
    ramp = torch.linspace(0.2, 0.6, 100).expand(1, 3, 80, 100)
    assert fact(ramp, "shading") == pytest.approx(0.4, rel=0.02) and fact(ramp, "sharpness") == pytest.approx(0.25)


def test_facts_are_of_one_image_and_of_what_is_looked_at(pictures):
    assert torch.allclose(facts(pictures)[1:2], facts(pictures[1:2]), atol=1e-6)
    roi = torch.zeros_like(pictures, dtype=torch.bool)
    roi[..., :40] = True
    other = torch.where(roi, pictures, torch.rand(1))
    assert torch.equal(facts(other, roi), facts(pictures, roi))
    inside, cut = facts(other, roi), facts(pictures[..., :40])
    for i, what in enumerate(FACTS):
        if what != "shading":  # from side to side of the whole image
            assert torch.allclose(inside[:, i], cut[:, i], rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (3, 3), (5, 1), (40, 40)])
def test_tiny_and_constant_images_have_facts_too(size):
    for images in (torch.rand(2, 1, *size), torch.full((2, 3, *size), 0.25)):
        found = facts(images)
        assert found.shape == (2, len(FACTS)) and found.isfinite().all()
    none = facts(torch.rand(1, 1, *size), torch.zeros(1, 1, *size, dtype=torch.bool))
    assert (none == 0).all()


def test_features_are_those_of_the_scoring(model):
    module = zoo.from_pretrained("m").eval()
    images = torch.rand(3, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    batch = Batch(images, ["a", "b", "c"])
    with torch.inference_mode(), Onlooker(module) as watch:
        module.score_images(batch.image)
        found = np.stack(watch.looks(batch))
    expected = torch.cat([m.mean((2, 3)) for m in module.features(module.prepare(images))], 1)
    assert np.allclose(found[:, len(FACTS) :], expected, atol=1e-5)
    assert np.allclose(found[:, : len(FACTS)], facts(images), atol=1e-6)
    assert not module._forward_pre_hooks and not module.features._forward_hooks


def test_features_of_tiles_are_weighted_by_what_is_looked_at(model):
    module = zoo.from_pretrained("m").eval()
    module.view = replace(module.view, tile=64)
    images = torch.rand(2, 1, 100, 64, generator=torch.Generator().manual_seed(2))
    roi = torch.ones_like(images, dtype=torch.bool)
    roi[0, :, 50:] = False  # the second tile's core: nothing of it is looked at
    with torch.inference_mode(), Onlooker(module) as watch:
        module.score_images(images, roi)
        found = np.stack(watch.looks(Batch(images, ["a", "b"], roi=roi)))[:, len(FACTS) :]
    tiles = tiles_of((100, 64), 64)
    assert len(tiles) == 2 and tiles[1].core[0].start + tiles[1].rows.start == 50

    def of(image, tile):
        core = torch.zeros(1, 1, 64, 64)
        core[0, 0, *tile.core] = 1
        means = []
        for layer in module.features(module.prepare(image[None, :, tile.rows, tile.columns])):
            weights = torch.nn.functional.adaptive_avg_pool2d(core, layer.shape[-2:])
            means.append((layer * weights).sum((2, 3)) / weights.sum())
        return torch.cat(means, 1)[0].numpy()

    assert np.allclose(found[0], of(images[0], tiles[0]), atol=1e-5)
    assert np.allclose(found[1], (of(images[1], tiles[0]) + of(images[1], tiles[1])) / 2, atol=1e-5)


def test_a_method_without_backbone_has_the_facts_alone():
    module = create_model("ganomaly", preset="lite", input_size=32).eval()
    batch = Batch(torch.rand(2, 1, 40, 40), ["a", "b"])
    with torch.inference_mode(), Onlooker(module) as watch:
        module.score_images(batch.image)
        assert np.stack(watch.looks(batch)).shape == (2, len(FACTS))


# ---- tests of two samples --------------------------------------------------------------------------------------------


def test_holm_is_holms():
    assert np.allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(0)
    for _ in range(50):
        p_values = rng.random(6) ** 3
        adjusted = holm(p_values)
        for level in (0.005, 0.05, 0.3):
            rejected, left = set(), sorted(range(6), key=lambda i: p_values[i])
            while left and p_values[left[0]] <= level / len(left):  # step by step, as in the paper
                rejected.add(left.pop(0))
            assert {i for i in range(6) if adjusted[i] <= level} == rejected


def test_the_energy_test_is_scipys_in_one_dimension(monkeypatch):
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=25), rng.normal(0.6, 1, size=15)
    expected = stats.permutation_test(
        (a, b), stats.energy_distance, n_resamples=2000, alternative="greater", rng=np.random.default_rng(2)
    ).pvalue
    assert 0.01 < expected < 0.3
    assert energy_test(a[:, None], b[:, None]) == pytest.approx(expected, abs=0.02)


def test_the_energy_test_keeps_its_level_with_few_images_of_many_channels(monkeypatch):
    monkeypatch.setattr(twosample, "PERMUTATIONS", 199)
    rng = np.random.default_rng(3)
    mixing = rng.normal(size=(200, 200))
    p_values = [energy_test(*np.split(rng.normal(size=(60, 200)) @ mixing, [40]), seed=i) for i in range(200)]
    assert np.mean(np.array(p_values) <= 0.05) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)
    assert stats.kstest(p_values, "uniform").pvalue > 0.001
    shifted = rng.normal(size=(20, 200)) + np.linspace(0, 3, 200)
    assert energy_test(rng.normal(size=(40, 200)), shifted) == 1 / 200


@pytest.mark.parametrize("constant", [True, False])
def test_features_without_spread_are_no_difference(constant):
    a = np.full((10, 3), 0.5) if constant else np.tile([0.1, 0.2], (10, 1)) + np.eye(10)[:, :1]
    assert energy_test(a, a) == 1.0


# ---- verdicts --------------------------------------------------------------------------------------------------------


def normals(scores, looks=None, shapes=None):
    scores = np.asarray(scores, np.float32).tolist()
    rows = [(f"{i}.png", score, score) for i, score in enumerate(scores)]
    looks = np.zeros((len(scores), len(FACTS)), np.float32) if looks is None else looks
    return Normals(rows, None, [], looks, shapes=shapes or [(64, 64)] * len(scores))


def known(seed=0, n=300, rate=RATE):
    scores = np.random.default_rng(seed).normal(size=n).astype(np.float32).tolist()
    return calibrated(scores, scores, rate, 0.0, 1, "32-true")


def test_exceedances_are_held_against_the_binomial_distribution():
    calibration = known()
    low, high = calibration.scores[0], calibration.image_threshold
    spread = calibration.scores[:: len(calibration.scores) // 60][:60]
    for count in (0, 1, 3, 7, 14):
        scores = [high] * count + [min(score, high - 1e-3) for score in spread][count:]
        found = compare(calibration, None, normals(scores))
        image, region = found.exceedances
        tail = sum(stats.binom.pmf(k, 60, RATE) for k in range(count, 61))
        assert image.count == region.count == count and image.p_value == pytest.approx(min(1, 2 * tail))
        assert image.upper == pytest.approx(stats.beta.ppf(0.95, count + 1, 60 - count))
        assert (found.verdict == "not trusted") == (2 * tail < 0.005)
    assert "14 of 60 recent normal images are called anomalous" in found.sentence and "at most 5 %" in found.sentence
    assert compare(calibration, None, normals([low] * 59 + [high])).exceedances[0].in_words().startswith("1 of 60")


def test_scores_are_compared_by_kolmogorov_and_smirnov():
    calibration = known()
    scores = np.random.default_rng(1).normal(-0.8, 1, 80).astype(np.float32)
    found = compare(calibration, None, normals(scores))
    (shift,) = found.shifts
    assert shift.p_value == pytest.approx(stats.ks_2samp(calibration.scores, scores).pvalue)
    assert found.verdict == "doubtful" and "scores are" in found.sentence and "lower" in found.sentence
    assert "zoo calibrate NAME --data DATA --false-alarm-rate 0.05" in found.sentence


def test_what_has_shifted_is_named_with_its_change():
    rng = np.random.default_rng(2)
    before, now = (rng.normal(0.5, 0.02, size=(n, len(FACTS))).astype(np.float32) for n in (300, 60))
    now[:, 0] *= 0.88
    now[:, 3] += 0.06 * np.tile([1, -1], 30)
    kept = Reference(set(), before, np.zeros((300, 0), np.float32))
    found = compare(known(), kept, normals(rng.normal(size=60), now))
    assert [shift.what for shift in found.shifts if shift.found] == ["brightness", "noise"]
    assert "brightness is 12 % lower and noise is" in found.sentence
    assert found.shifts[1].before == pytest.approx(np.median(before[:, 0]))


def test_nothing_has_changed_in_most_checks():
    """Of 300 checks of the same distribution 1 % may say otherwise; here with half a dozen facts and features."""
    rng, alarms = np.random.default_rng(4), 0
    for i in range(150):
        looks = rng.normal(size=(360, len(FACTS))).astype(np.float32)
        kept = Reference(set(), looks[:300], np.zeros((300, 0), np.float32))
        found = compare(known(i), kept, normals(rng.normal(size=60), looks[300:]))
        alarms += found.verdict != "trusted"
    assert alarms <= 1.5 + 3 * np.sqrt(1.5)


def test_few_images_are_too_few_unless_something_is_found():
    calibration, rng = known(), np.random.default_rng(5)
    found = compare(calibration, None, normals(rng.normal(0, 0.5, LEAST - 1)))
    assert found.verdict == "too few" and f"give at least {LEAST}, or better 59" in found.sentence
    assert compare(calibration, None, normals(rng.normal(0, 0.9, LEAST))).verdict == "trusted"
    assert compare(calibration, None, normals([9.0] * 6)).verdict == "not trusted"


def test_images_of_other_sizes_are_a_finding():
    calibration = replace(known(), sizes=[[64, 64]])
    scores = np.random.default_rng(6).normal(size=40)
    some = compare(calibration, None, normals(scores, shapes=[(64, 64)] * 30 + [(48, 96)] * 10))
    assert some.verdict == "doubtful" and some.images == 30
    assert "10 of 40 images are of 96 x 48 pixels, unlike the calibrated ones (64 x 64)" in some.sentence
    none = compare(calibration, None, normals(scores, shapes=[(48, 96)] * 40))
    assert none.verdict == "not trusted" and "all 40 images" in none.sentence and none.exceedances == []
    assert compare(replace(calibration, sizes=[]), None, normals(scores, shapes=[(9, 9)] * 40)).images == 40


# ---- what is kept ----------------------------------------------------------------------------------------------------


def test_the_reference_is_bounded_and_of_one_calibration(tmp_path, monkeypatch):
    looks = np.random.default_rng(0).normal(size=(50, len(FACTS) + 7)).astype(np.float32)
    digests = [digest(np.full((2, 2), i, np.uint8)) for i in range(50)]
    monkeypatch.setattr(reference, "LARGEST", 20)
    calibration = known()
    write_reference(tmp_path, calibration, digests, looks)
    kept = read_reference(tmp_path, calibration)
    assert kept.digests == set(digests) and kept.facts.shape == (20, 5) and kept.features.shape == (20, 7)
    rows = [np.flatnonzero((looks[:, :5] == row).all(1))[0] for row in kept.facts]
    assert sorted(set(rows)) == rows and np.allclose(kept.features, looks[rows, 5:], rtol=1e-3)
    assert read_reference(tmp_path, calibration.at_rate(0.2)) is not None
    assert read_reference(tmp_path, known(seed=1)) is None and read_reference(tmp_path / "other", calibration) is None
    path = tmp_path / "private" / reference.FILE
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ZooError, match="calibrate the model anew"):
        read_reference(tmp_path, calibration)


# ---- from files to the sentence --------------------------------------------------------------------------------------


def write(folder, seed, count, change=lambda image: image, size=SIZE, kind=None):
    """16-bit TIFFs."""
    folder.mkdir(parents=True)
    for i in range(count):
        image = change(render(i, seed=seed, size=size, bits=16, kind=kind)[0].astype(np.float64))
        Image.fromarray(np.clip(image, 0, 65535).astype(np.uint16)).save(folder / f"{seed}-{i:03d} ü.tif")
    return folder


def stripes(image):
    """Diagonal ones in its middle, which no layout has."""
    y, x = np.indices(image.shape)
    return np.where((np.maximum(abs(y - 64), abs(x - 64)) < 25), 60000 * ((x + y) // 6 % 2), image)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A registry with a model m, its calibration images, and recent ones with and without a change."""
    root = tmp_path_factory.mktemp("drift")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(root / "home"))
        fit = write(root / "fit", 0, 60)
        calibration = write(root / "calibration", 1, 100)
        arguments = ("--preset", "lite", "--input-size", 64, "--dims", 30, "--hold-out", 20)
        assert run("fit", "padim", *arguments, "--data", fit, "--name", "m") == 0
        shutil.copytree(root / "home/models/m", root / "home/models/uncalibrated")
        assert run("calibrate", "m", "--data", calibration, "--false-alarm-rate", RATE) == 0
        write(root / "same", 2, 50)
        write(root / "darker", 2, 50, lambda image: 0.85 * image)
        write(root / "defects", 3, 30, stripes)
    return root


@pytest.fixture
def model(made, zoo_home):
    shutil.copytree(made / "home/models", zoo_home / "models")
    return model_place("m")


def test_the_same_again_is_trusted(model, made, tmp_path, capsys):
    out = tmp_path / "new folder" / "drift.json"
    assert run("drift", "m", "--data", made / "same", "--out", out, "--fail-on", "drift") == 0
    said = capsys.readouterr().out.splitlines()
    assert (
        said[-1].startswith("The threshold can be trusted, as far as so few images tell: ")
        and said[-1].count(". ") == 0
    )
    found = json.loads(out.read_text())
    assert found["verdict"] == "trusted" and found["sentence"] == said[-1] and found["images"] == 50
    assert [shift["what"] for shift in found["shifts"]] == ["scores", *FACTS, "features"]
    assert found["weights_sha256"] == json.loads((model / "config.json").read_text())["weights_sha256"]
    assert found["versions"]["zoo"] and found["data"]["name"] == "same" and str(made) not in out.read_text()
    module = zoo.from_pretrained("m")
    for row in found["rows"][:3]:
        assert module.predict(made / "same" / row["image"]).score == pytest.approx(row["score"], rel=1e-5)
    assert sorted(path.name for path in out.parent.iterdir()) == ["drift.json"]


def test_darker_images_are_found(model, made, capsys):
    assert run("drift", "m", "--data", made / "darker") == 0
    said = capsys.readouterr().out
    assert "brightness is 1" in said and " % lower" in said and "shifted" in said
    assert "threshold is doubtful" in said or "no longer be trusted" in said
    assert run("drift", "m", "--data", made / "darker", "--fail-on", "drift") == 1


def test_more_alarms_than_stated_are_found(model, made, capsys):
    assert run("calibrate", "m", "--false-alarm-rate", 0.2) == 0
    assert run("drift", "m", "--data", made / "defects", "--fail-on", "drift") == 1
    sentence = capsys.readouterr().out.splitlines()[-1]
    assert sentence.startswith("The threshold can no longer be trusted: ") and "where at most 20 % may be" in sentence
    assert sentence.endswith("zoo calibrate m --data DATA --false-alarm-rate 0.2.")


def test_images_that_the_model_knows_are_left_out(model, made, tmp_path, capsys):
    folder = shutil.copytree(made / "same", tmp_path / "mixed")
    for i, path in enumerate([*sorted((made / "calibration").iterdir())[:7], *sorted((made / "fit").iterdir())]):
        Image.open(path).save(folder / f"again-{i}.png")
    Image.open(next(iter(sorted((made / "same").iterdir())))).save(folder / "copy.png")
    assert run("drift", "m", "--data", folder) == 0
    said = capsys.readouterr().out
    assert "7 images are left out: the model was calibrated on them." in said
    assert "40 images are left out: the fit or the selection has seen them." in said
    assert "1 image is a copy of another one" in said
    assert " of 70 recent" in said  # the 20 that the fit held out are new to the calibration
    assert run("drift", "m", "--data", made / "calibration") == 2
    assert "no normal image that is new" in capsys.readouterr().err


def test_without_a_reference_scores_alone_are_compared(model, made, capsys):
    assert run("calibrate", "m", "--false-alarm-rate", 0.1) == 0  # leaves it alone
    kept = model / "private" / reference.FILE
    found = drift(zoo.from_pretrained("m"), str(made / "same"))
    assert len(found.shifts) == 7 and found.notes == [] and found.false_alarm_rate == 0.1
    kept.unlink()
    capsys.readouterr()
    assert run("drift", "m", "--data", made / "darker") == 0
    said = capsys.readouterr().out
    assert "Only scores were compared" in said and "zoo calibrate m --data DATA --false-alarm-rate 0.1 keeps" in said
    assert "brightness" not in said
    shutil.rmtree(model / "private")
    assert run("drift", "m", "--data", made / "same") == 0
    assert "can't be checked" in capsys.readouterr().out


def test_defects_are_not_looked_at(model, made, tmp_path, capsys):
    shutil.copytree(made / "same", tmp_path / "data/good")
    shutil.copytree(made / "defects", tmp_path / "data/bad")
    assert run("drift", "m", "--data", tmp_path / "data") == 0
    assert " of 50 recent" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "data/good")
    assert run("drift", "m", "--data", tmp_path / "data") == 2
    assert "good" in capsys.readouterr().err


def test_broken_images_stop_it_or_are_left_out(model, made, tmp_path, capsys):
    folder = shutil.copytree(made / "same", tmp_path / "broken")
    (folder / "broken.tif").write_bytes(b"nothing")
    assert run("drift", "m", "--data", folder) == 2
    assert "broken.tif" in capsys.readouterr().err
    assert run("drift", "m", "--data", folder, "--skip-broken", "--out", tmp_path / "o.json") == 0
    assert json.loads((tmp_path / "o.json").read_text())["left_out"]["broken"] == 1


def test_ignore_masks_that_the_rate_was_stated_without_are_told_of(model, made, tmp_path, capsys):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[:40] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert run("drift", "m", "--data", made / "same", "--ignore", tmp_path / "mask.png") == 0
    assert "stated without the ignore masks" in capsys.readouterr().out


def test_images_of_other_sizes_are_told_of(model, tmp_path, capsys):
    write(tmp_path / "small", 4, 4, size=96)
    assert run("drift", "m", "--data", tmp_path / "small", "--fail-on", "drift") == 1
    said = capsys.readouterr().out
    assert "all 4 images are of 96 x 96 pixels, unlike the calibrated ones (128 x 128)" in said


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["m"], "zoo drift m --data DATA"),
        (["nobody", "--data", "synthetic"], "zoo fit METHOD"),
        (["uncalibrated", "--data", "synthetic"], "zoo calibrate uncalibrated --data DATA --false-alarm-rate"),
        (["m", "--data", "/nowhere/at/all"], "/nowhere"),
        (["m", "--data", "synthetic", "--out", "found.csv"], ".json"),
        (["m", "--data", "synthetic", "--fail-on", "anything"], "--fail-on"),
        (["m", "--data", "synthetic", "--precision", "bf16-mixed"], "stated in 32-true"),
        (["m", "--data", "synthetic", "--batch-size", "0"], "--batch-size"),
        (["m", "--data", "synthetic", "--num-workers", "-1"], "--num-workers"),
        (["m", "--data", "synthetic", "--tile", "64"], "no option --tile"),
        (["m", "--data", "synthetic", "--ignore", "nowhere.png"], "nowhere.png"),
    ],
)
def test_mistakes_are_one_sentence(model, argv, words, capsys):
    assert run("drift", *argv) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("zoo: ") and captured.err.count("\n") == 1 and words in captured.err


def test_the_record_of_the_simulation_holds_what_is_promised():
    report = json.loads((Path(__file__).parent / "bench/drift.json").read_text(encoding="utf-8"))
    assert set(report["methods"]) == {"padim", "ganomaly"}
    for found in report["methods"].values():
        nothing = [of["drift"] for of in found["by_change"]["nothing"].values()]
        draws = report["null_draws"] * len(nothing)
        assert draws == 1000 and np.mean(nothing) <= report["level"] + 2 * np.sqrt(0.01 * 0.99 / draws)
    strict = known(rate=report["rate"])
    high, low = strict.image_threshold, strict.scores[0]
    for n, of in report["alarms"].items():
        for count, found in ((of["count"] - 1, False), (of["count"], True)):
            image, _ = compare(strict, None, normals([high] * count + [low] * (int(n) - count))).exceedances
            assert image.found == found
        assert of["5%"] == pytest.approx(1 - stats.binom(int(n), 0.05).cdf(of["count"] - 1), abs=1e-3)
