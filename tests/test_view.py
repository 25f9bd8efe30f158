"""What a model sees: images without their info bar, on their set's intensity scale, without what masks ignore."""

import json
import shutil

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image, ImageDraw
from sklearn.metrics import average_precision_score, roc_auc_score

from zoo.cli import main
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.ignore import IgnoreMasks
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.image import image_size, read_image, resize
from zoo.inference import find_ignore, find_images
from zoo.methods import create_model
from zoo.run import RunOptions
from zoo.view import View, look_at

TINY = {"preset": "lite", "arguments": {"input_size": 64, "dims": 10}}
BAR = 40  # rows of the info bars below


def pattern(rng, size=(280, 320)):
    """A layout of lines with noise, 16 bits in the lower fifth of the scale, as a dim detector gives them."""
    stripes = np.tile(np.where(np.arange(size[1]) % 16 < 8, 9000, 4000), (size[0], 1))
    return np.clip(np.roll(stripes, rng.integers(16), axis=1) + rng.normal(0, 400, size), 0, 65535).astype(np.uint16)


def with_bar(image, text="10.0kV x50.0k SE(M) 1.00um"):
    """The image with a black info bar of text and scale below it."""
    strip = Image.new("L", (image.shape[1], BAR), 0)
    draw = ImageDraw.Draw(strip)
    draw.text((8, 12), text, fill=255, font_size=16)
    draw.line([(240, 20), (300, 20)], fill=255, width=2)
    bar = np.asarray(strip).astype(np.float64) / 255 * np.iinfo(image.dtype).max
    return np.vstack([image, bar.astype(image.dtype)])


@pytest.fixture(scope="module")
def tiffs(tmp_path_factory):
    """A flat folder of 40 unlabelled 16-bit TIFFs with info bars; and one more normal image and a defect."""
    root, rng = tmp_path_factory.mktemp("lot"), np.random.default_rng(0)
    (root / "normal").mkdir()
    for i in range(40):
        tifffile.imwrite(root / f"normal/{i:02d}.tif", with_bar(pattern(rng)))
    good, bad = pattern(rng), pattern(rng)
    bad[100:140, 100:140] = 20000
    tifffile.imwrite(root / "good.tif", with_bar(good))
    tifffile.imwrite(root / "bad.tif", with_bar(bad))
    return root


@pytest.fixture(scope="module")
def dim(tiffs):
    """PaDiM on these, on the scale of their percentiles, and what the fit said."""
    said = []
    options = {"intensity": "percentile"}
    model, record = fit("padim", str(tiffs / "normal"), **TINY, data_options=options, run=RunOptions(say=said.append))
    return model, record, " ".join(said)


@pytest.fixture
def calibrated(tiffs, zoo_home):
    """Model m of the registry: fitted on these with a scale, and with a stated rate."""
    data = str(tiffs / "normal")
    small = ["--input-size", "64", "--dims", "10", "--intensity", "percentile"]
    assert main(["fit", "padim", "--preset", "lite", "--data", data, "--name", "m", *small]) == 0
    assert main(["calibrate", "m", "--data", data, "--false-alarm-rate", "0.14"]) == 0


# ---- info bars -------------------------------------------------------------------------------------------------------


def test_the_bar_of_a_set_is_found_said_and_left_out(dim, tiffs):
    model, record, said = dim
    assert model.view.bars == ((280 + BAR, 320, BAR),)
    assert f"the last {BAR} rows of images of 320 x {280 + BAR}, is left out" in said
    module = AnomalyDataModule(load_data(str(tiffs / "normal")), view=model.view)
    assert next(iter(module.train_dataloader())).image.shape[-2:] == (280, 320)


def test_what_the_bar_says_does_not_matter(dim, tiffs, tmp_path):
    model, image = dim[0], tifffile.imread(tiffs / "good.tif")
    other = with_bar(image[:280], "5.0kV x90.0k BSE 400nm")
    assert not np.array_equal(other, image)
    found, again = model.predict([image, other])
    assert found.score == again.score and np.array_equal(found.map, again.map)
    assert found.map.shape == (280 + BAR, 320)
    assert (found.map[280:] == found.map[:280].min()).all()


def test_images_without_the_bar_and_of_another_size_are_seen_whole(dim, tiffs):
    """The same content without its bar has the same score; a size that the set didn't have is looked at itself."""
    image = tifffile.imread(tiffs / "bad.tif")
    with_, without = dim[0].predict(image), dim[0].predict(image[:280])
    assert with_.score == without.score and np.array_equal(with_.map[:280], without.map)
    wider = with_bar(np.hstack([image[:280], image[:280]]))
    assert (dim[0].predict(wider).map[280:] == dim[0].predict(wider).map.min()).all()


def test_bars_can_be_kept(tiffs):
    model, _ = fit("padim", str(tiffs / "normal"), **TINY, data_options={"info_bar": "none"})
    image = tifffile.imread(tiffs / "good.tif")
    other = with_bar(image[:280], "WWWWWWWWWWWWWWWWWWWW")
    assert model.view.bars == () and model.predict(image).score != model.predict(other).score


def test_masks_lose_the_rows_of_the_bar_too(tmp_path):
    rng = np.random.default_rng(0)
    for folder, count in (("good", 24), ("bad", 3)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            image = pattern(rng)
            image[50:90, 60:100] += np.uint16(20000 * (folder == "bad"))
            tifffile.imwrite(tmp_path / folder / f"{i}.tif", with_bar(image))
    mask = np.zeros((280 + BAR, 320), np.uint8)
    mask[50:90, 60:100] = 255
    (tmp_path / "masks").mkdir()
    for i in range(3):
        Image.fromarray(mask).save(tmp_path / f"masks/{i}.png")
    model, _ = fit("padim", str(tmp_path), **TINY)
    metrics = evaluate(model, str(tmp_path))["metrics"]
    test = load_data(str(tmp_path))["test"]
    maps = np.concatenate([model.predict(row["image"]["path"]).map[:280].ravel() for row in test])
    truth = np.concatenate([(mask[:280] > 0).ravel() & bool(row["label"]) for row in test])
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(truth, maps), abs=1e-4)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(truth, maps), abs=1e-4)


def test_mixed_sets_are_refused_with_both_ways_out(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "good").mkdir()
    for i in range(40):
        image = pattern(rng)
        tifffile.imwrite(tmp_path / f"good/{i:02d}.tif", with_bar(image[:240]) if i % 2 else image)
    with pytest.raises(ZooError, match=r"--info-bar none"):
        fit("padim", str(tmp_path), **TINY)
    model, _ = fit("padim", str(tmp_path), **TINY, data_options={"info_bar": "none"})
    assert model.view.info_bar == "none"


def test_words_that_are_none():
    for words in (("top", "full"), ("auto", "minmax")):
        with pytest.raises(ZooError, match="--info-bar is auto or none and --intensity full or percentile"):
            look_at(View(), [], *words)


def test_built_in_images_have_no_bar():
    images = [row["image"] for row in load_data("synthetic:train=32,good=1,defect=1")["train"]]
    assert look_at(View(), images, "auto", "full").bars == ((256, 256, 0),)


# ---- intensity -------------------------------------------------------------------------------------------------------


def test_percentiles_are_those_of_all_pixels_above_the_bars(dim, tiffs):
    model, _, said = dim
    module = AnomalyDataModule(load_data(str(tiffs / "normal")), input_size=(64, 64))
    pixels = np.concatenate([read_image(row["image"])[:280].ravel() / 65535 for row in module.train_set])
    low, high = np.quantile(pixels, (0.001, 0.999))
    margin = 0.1 * (high - low)  # of each side
    assert model.view.low == pytest.approx(low - margin, rel=0.02)
    assert model.view.high == pytest.approx(high + margin, rel=0.02)
    assert "of the full scale, from percentiles" in said


def test_the_scale_is_the_sets_and_never_an_images(dim):
    """Twice as bright stays twice as bright, and what is beyond the scale is black or white."""
    view = dim[0].view
    values = np.array([[view.low, view.high, (view.low + view.high) / 2, 1.0]]) * 65535
    seen = view.tensor(values.round().astype(np.uint16))[0, 0]
    np.testing.assert_allclose(seen, [0, 1, 0.5, 1], atol=1e-3)
    dark, bright = (view.tensor(np.full((8, 8), value, np.uint16)).mean() for value in (4000, 8000))
    assert bright - dark == pytest.approx(4000 / 65535 / (view.high - view.low), rel=1e-4)


def test_the_scale_is_stored_with_the_model(dim, tiffs, tmp_path):
    model = dim[0]
    model.save_pretrained(tmp_path / "m")
    stored = json.loads((tmp_path / "m/config.json").read_text())["preprocessing"]
    assert stored["low"] == model.view.low and stored["bars"] == [[320, 320, BAR]]
    card = (tmp_path / "m/README.md").read_text()
    assert f"without the info bar, the last {BAR} rows of 320 x 320" in card and "(white) of the full scale" in card
    loaded = from_pretrained(tmp_path / "m")
    assert loaded.view == model.view
    assert loaded.predict(tiffs / "bad.tif").score == model.predict(tiffs / "bad.tif").score


def test_a_model_of_before_there_were_views_still_loads(dim, tmp_path):
    dim[0].save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    for key in ("info_bar", "bars", "low", "high", "floats", "tile"):
        del config["preprocessing"][key]
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    assert from_pretrained(tmp_path / "m").view == View()


def float_folder(root, scale):
    (root / "good").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for i in range(24):
        tifffile.imwrite(root / f"good/{i}.tif", (pattern(rng, (96, 96)) * scale).astype(np.float32))
    return str(root)


def test_float_images_without_a_full_scale_need_percentiles(tmp_path):
    data = float_folder(tmp_path / "counts", 0.5)
    with pytest.raises(ZooError, match="--intensity percentile"):
        fit("padim", data, **TINY)
    model, _ = fit("padim", data, **TINY, data_options={"intensity": "percentile"})
    assert model.view.floats and model.view.high > 1 and model.view.tensor(np.float32([[1e9] * 8] * 8)).max() == 1
    image = tifffile.imread(tmp_path / "counts/good/0.tif")
    assert np.isfinite(model.predict(image).score)
    with pytest.raises(ZooError, match="float images by their values"):
        model.predict(image.astype(np.uint16))
    unit, _ = fit("padim", float_folder(tmp_path / "unit", 1 / 65535), **TINY)
    assert not unit.view.floats and unit.view.low is None


def test_what_percentiles_refuse(tmp_path):
    grey = [np.full((64, 64), 77, np.uint8)] * 3
    with pytest.raises(ZooError, match="single grey"):
        look_at(View(), grey, "none", "percentile")
    mixed = [
        np.linspace(0, 9, 4096, dtype=np.float32).reshape(64, 64),
        np.arange(4096, dtype=np.uint16).reshape(64, 64),
    ]
    with pytest.raises(ZooError, match="partly integers"):
        look_at(View(), mixed, "none", "percentile")


# ---- ignore masks ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def square(mvtec):
    return fit("padim", str(mvtec), **TINY)[0]


def ignore_file(path, rows=slice(0, 48), size=(96, 96)):
    mask = np.zeros(size, np.uint8)
    mask[rows] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask).save(path)
    return str(path)


def test_metrics_leave_out_what_is_ignored(square, mvtec, tmp_path):
    """Against scikit-learn over the pixels that are left."""
    place = ignore_file(tmp_path / "upper.png")
    record = evaluate(square, str(mvtec), data_options={"ignore": place})
    test = load_data(str(mvtec))["test"]
    plain = [square.predict(row["image"]["path"]).map[48:].ravel() for row in test]
    truth = [
        (np.asarray(Image.open(row["mask"]["path"])) > 0)[48:].ravel() if row["mask"] else np.zeros(48 * 96)
        for row in test
    ]
    expected = roc_auc_score(np.concatenate(truth).astype(bool), np.concatenate(plain))
    assert record["metrics"]["pixel_auroc"] == pytest.approx(expected, abs=1e-4)
    assert record["test_data"]["ignored"]
    assert record["test_data"].get("unmarked", 0) == sum(
        not t.any() for t, row in zip(truth, test, strict=True) if row["label"]
    )


def test_scores_do_not_look_at_what_is_ignored(square, mvtec):
    path = next(row["image"]["path"] for row in load_data(str(mvtec))["test"] if row["label"])
    mask = np.asarray(Image.open(str(mvtec / "ground_truth/square" / (path.split("/")[-1][:-4] + "_mask.png")))) > 0
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    hidden = np.zeros((96, 96), bool)
    hidden[max(rows[0] - 16, 0) : rows[-1] + 17, max(columns[0] - 16, 0) : columns[-1] + 17] = True
    whole, partly = square.predict(path), square.predict(path, ignore=hidden)
    assert partly.score < whole.score and partly.map[hidden].max() == partly.map[~hidden].min()
    assert np.array_equal(partly.map[~hidden], whole.map[~hidden])
    several = square.predict([path, path], ignore=[None, hidden])
    assert [p.score for p in several] == pytest.approx([whole.score, partly.score], rel=1e-5)


def test_masks_by_name_and_the_folder_beside_the_images(square, mvtec, tmp_path):
    """A mask of each image's name; a folder `ignore` in the data needs no option."""
    data = tmp_path / "data"
    shutil.copytree(mvtec, data)
    for i in range(3):
        ignore_file(data / f"ignore/test/square/{i:03d}_mask.png", slice(0, 96 - 8 * i)) if i else None
    found = evaluate(square, str(data))
    by_hand = evaluate(square, str(mvtec), data_options={"ignore": str(data / "ignore")})
    assert found["metrics"] == by_hand["metrics"] != evaluate(square, str(mvtec))["metrics"]
    masks = IgnoreMasks(data / "ignore")
    assert masks.of("test/square/001.png").sum() == 88 * 96 and masks.of("test/square/000.png") is None


def test_the_default_threshold_is_of_what_is_looked_at(mvtec, tmp_path):
    whole = fit("padim", str(mvtec), **TINY)[0].calibration
    half = fit("padim", str(mvtec), **TINY, data_options={"ignore": ignore_file(tmp_path / "upper.png")})[0].calibration
    assert all(a <= b for a, b in zip(half.scores, whole.scores, strict=True)) and half.scores != whole.scores


def test_what_ignore_masks_refuse(square, mvtec, tmp_path):
    image = str(next((mvtec / "test/good").iterdir()))
    with pytest.raises(ZooError, match="no such file or folder"):
        IgnoreMasks(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ZooError, match="holds no masks"):
        IgnoreMasks(tmp_path / "empty")
    ignore_file(tmp_path / "twice/a.png"), ignore_file(tmp_path / "twice/a_mask.png")
    with pytest.raises(ZooError, match="masks of one image"):
        IgnoreMasks(tmp_path / "twice")
    ignore_file(tmp_path / "others/x/y.png")
    with pytest.raises(ZooError, match="no mask there fits"):
        evaluate(square, str(mvtec), data_options={"ignore": str(tmp_path / "others")})
    with pytest.raises(ZooError, match="another size than its image"):
        square.predict(image, ignore=np.zeros((50, 96), bool))
    with pytest.raises(ZooError, match="leaves nothing to look at"):
        square.predict(image, ignore=np.ones((96, 96), bool))
    with pytest.raises(ZooError, match="1 masks for 2 images"):
        square.predict([image, image], ignore=[None])


# ---- files and the command line --------------------------------------------------------------------------------------


def test_the_size_of_a_file_is_that_of_what_is_read(tmp_path):
    rng = np.random.default_rng(0)
    grey = rng.integers(0, 255, (40, 56), dtype=np.uint8)
    Image.fromarray(grey).save(tmp_path / "a.png")
    Image.fromarray(grey).save(tmp_path / "a.bmp")
    exif = Image.Exif()
    exif[274] = 6  # turned by a right angle
    Image.fromarray(grey).save(tmp_path / "a.jpg", exif=exif)
    tifffile.imwrite(tmp_path / "a.tif", grey.astype(np.uint16) * 257)
    tifffile.imwrite(tmp_path / "b.tif", np.float32(grey))
    tifffile.imwrite(tmp_path / "c.tif", grey, extratags=[(274, "H", 1, 8, True)])
    for path in tmp_path.iterdir():
        assert image_size(path) == read_image(path).shape[:2], path
        assert image_size({"path": None, "bytes": path.read_bytes()}) == read_image(path).shape[:2]
    assert image_size(grey) == (40, 56) and image_size(tmp_path / "a.jpg") == (56, 40)
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    with pytest.raises(ZooError, match="damaged"):
        image_size(tmp_path / "broken.png")


def test_predict_writes_whole_maps_and_takes_masks_and_tiles(tiffs, tmp_path, zoo_home, capsys):
    data = str(tiffs / "normal")
    fit_ = ["fit", "padim", "--preset", "lite", "--data", data, "--name", "m", "--input-size", "64", "--dims", "10"]
    assert main([*fit_, "--intensity", "percentile"]) == 0
    out = tmp_path / "out"
    assert main(["predict", "m", str(tiffs / "bad.tif"), str(tiffs / "good.tif"), "--out", str(out)]) == 0
    rows = {row["image"].split("/")[-1]: row for row in json.loads((out / "predictions.json").read_text())["images"]}
    assert rows["bad.tif"]["score"] > rows["good.tif"]["score"]
    picture = np.asarray(Image.open(out / "heatmaps/bad.png"))
    assert picture.shape == (280 + BAR, 320, 3)
    assert picture[:280].mean() > 60  # shown on the scale of the set, not as the fifth of 16 bits that it is

    ignore = ignore_file(tmp_path / "ignore.png", slice(90, 150), (280 + BAR, 320))
    assert main(["predict", "m", str(tiffs / "bad.tif"), "--out", str(out), "--ignore", ignore]) == 0
    (row,) = json.loads((out / "predictions.json").read_text())["images"]
    assert row["score"] < rows["bad.tif"]["score"]
    capsys.readouterr()
    assert main(["predict", "m", str(tiffs / "bad.tif"), "--out", str(out), "--tile", "128"]) == 0
    assert "--tile is not that of the model" in capsys.readouterr().out
    assert main(["predict", "m", str(tiffs / "bad.tif"), "--out", str(out), "--tile", "7"]) == 2
    assert "--tile is at least 32" in capsys.readouterr().err
    assert main([*fit_, "--intensity", "minmax"]) == 2 and main([*fit_, "--info-bar", "top"]) == 2


def test_from_tiffs_with_bars_to_verdicts_with_a_rate_in_three_commands(tiffs, tmp_path, zoo_home, capsys):
    """As the README says it; each command names the next one."""
    data, rate = str(tiffs / "normal"), "0.14"  # 20 held-out images support no lower one
    small = ["--input-size", "64", "--dims", "10"]
    assert (
        main(["fit", "padim", "--preset", "lite", "--data", data, "--name", "lot", *small, "--intensity", "percentile"])
        == 0
    )
    following = f"zoo calibrate lot --data {data} --false-alarm-rate {rate}"
    assert f"Next: {following}" in capsys.readouterr().out
    assert main(following.split()[1:]) == 0
    assert "Next: zoo predict lot PATH" in capsys.readouterr().out
    assert (
        main(["predict", "lot", str(tiffs / "bad.tif"), str(tiffs / "good.tif"), "--out", str(tmp_path / "out")]) == 0
    )
    assert "at most 14 % of normal images, with 95 % confidence, from 20 normals" in capsys.readouterr().out
    bad, good = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    assert bad["is_anomalous"] and not good["is_anomalous"] and bad["p_value"] == 1 / 21
    (top, left, bottom, right) = bad["regions"][0]["box"]
    assert top < 140 and bottom > 100 and left < 140 and right > 100 and bottom <= 280

    assert main(["calibrate", "lot", "--data", data, "--false-alarm-rate", "0.01"]) == 2
    assert "--false-alarm-rate 0.14, the lowest for so many; a fit with --hold-out 299" in capsys.readouterr().err


def test_a_copy_under_another_bar_is_known_again(dim, tiffs, tmp_path, zoo_home, capsys):
    """What is above the bar counts, so that an image that was saved anew with another bar is no new one."""
    data = str(tiffs / "normal")
    assert (
        main(["fit", "padim", "--preset", "lite", "--data", data, "--name", "m", "--input-size", "64", "--dims", "10"])
        == 0
    )
    (tmp_path / "copies").mkdir()
    for path in (tiffs / "normal").iterdir():
        tifffile.imwrite(
            tmp_path / f"copies/copy-{path.name}", with_bar(tifffile.imread(path)[:280], "2.0kV x10.0k BSE 5um")
        )
    capsys.readouterr()
    assert main(["calibrate", "m", "--data", str(tmp_path / "copies"), "--false-alarm-rate", "0.2"]) == 2
    assert "20 of these normal images had a say in the model's weights" in capsys.readouterr().err


def test_what_is_ignored_has_no_say_in_a_rate(mvtec, tmp_path, zoo_home):
    data, ignore = str(mvtec), ignore_file(tmp_path / "upper.png")
    assert (
        main(["fit", "padim", "--preset", "lite", "--data", data, "--name", "m", "--input-size", "64", "--dims", "10"])
        == 0
    )
    assert main(["calibrate", "m", "--data", data, "--false-alarm-rate", "0.15", "--ignore", ignore]) == 0
    model = from_pretrained("m")
    good = sorted((mvtec / "test/good").iterdir())
    lower = [float(model.predict(path).map[48:].max()) for path in good]
    assert all(np.isclose(level, model.calibration.levels, rtol=1e-5).any() for level in lower)
    ignored = model.predict(good, ignore=np.arange(96)[:, None].repeat(96, 1) < 48)
    assert all(np.isclose(one.score, model.calibration.scores, rtol=1e-5).any() for one in ignored)


def test_sizes_in_nm_where_the_file_tells(tiffs, tmp_path, zoo_home):
    """Zeiss' tag: 2.5 nm a pixel; regions have their sizes in nm."""
    data = str(tiffs / "normal")
    assert (
        main(["fit", "padim", "--preset", "lite", "--data", data, "--name", "m", "--input-size", "64", "--dims", "10"])
        == 0
    )
    assert main(["calibrate", "m", "--data", data, "--false-alarm-rate", "0.14"]) == 0
    text = "\r\n".join(["0"] * 3 + ["AP_IMAGE_PIXEL_SIZE", "Image Pixel Size = 2.500 nm", ""])
    image = tifffile.imread(tiffs / "bad.tif")
    tifffile.imwrite(tmp_path / "zeiss.tif", image, extratags=[(34118, "s", 0, text, True)])
    found = from_pretrained("m").predict(tmp_path / "zeiss.tif")
    assert found.pixel_nm == pytest.approx(2.5)
    assert main(["predict", "m", str(tmp_path / "zeiss.tif"), "--out", str(tmp_path / "out")]) == 0
    (row,) = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
    region = row["regions"][0]
    assert row["pixel_nm"] == pytest.approx(2.5) and region["area_nm2"] == pytest.approx(region["area"] * 6.25)
    assert region["width_nm"] == pytest.approx(2.5 * (region["box"][3] - region["box"][1]))
    assert from_pretrained("m").predict(tiffs / "bad.tif").pixel_nm is None


def test_zoo_data_prepare_leaves_the_bar_out(tiffs, tmp_path, zoo_home):
    """A store keeps images without their bars; what a model sees of both is the same but for the resizing."""
    assert main(["data", "prepare", str(tiffs / "normal"), "--size", "64", "--out", str(tmp_path / "store")]) == 0
    stored = load_data(str(tmp_path / "store"))["train"]
    row = stored[0]
    image = read_image(load_data(str(tiffs / "normal"))["train"][0]["image"])[:280]
    expected = resize(torch.from_numpy(image.astype(np.float32))[None, None], (64, 64))[0, 0].numpy()
    np.testing.assert_allclose(np.asarray(read_image(row["image"]), dtype=np.float32), expected, atol=1)
    again = ["data", "prepare", str(tiffs / "normal"), "--size", "64", "--out", str(tmp_path / "store")]
    assert main(again) == 0 and main([*again, "--info-bar", "none"]) == 2


# ---- together --------------------------------------------------------------------------------------------------------


def test_percentiles_see_all_columns_and_channels():
    """Lines of a pitch that divides the image's width, and a colour, would hide from an even step."""
    lines = np.full((1024, 1024), 20000, np.uint16)
    lines[:, 5::16] = 50000
    view = look_at(View(), [lines], "none", "percentile")
    assert view.low < 20000 / 65535 and view.high > 50000 / 65535
    colour = np.zeros((768, 1024, 3), np.uint8)
    colour[..., 0], colour[..., 2] = 99, 250
    assert look_at(View(), [colour], "none", "percentile").high > 250 / 255


def test_no_rate_is_stated_for_images_of_another_size(calibrated, tiffs, tmp_path, capsys):
    image = tifffile.imread(tiffs / "good.tif")
    tifffile.imwrite(tmp_path / "half.tif", image[:200, :200])
    assert from_pretrained("m").predict(image).is_anomalous is False
    other = from_pretrained("m").predict(image[:200, :200])
    assert other.is_anomalous is other.p_value is other.regions is None and other.verdict.endswith("(uncalibrated)")
    assert main(["predict", "m", str(tmp_path / "half.tif"), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "the rate was stated for images of 320 x 280 pixels" in out and "confidence" not in out


def test_a_broken_file_costs_no_result_of_before(calibrated, tiffs, tmp_path, capsys):
    out, broken = tmp_path / "out", tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0nothing")
    assert main(["predict", "m", str(tiffs / "good.tif"), "--out", str(out)]) == 0
    before = (out / "predictions.json").read_bytes()
    assert main(["predict", "m", str(broken), "--out", str(out)]) == 2
    assert "--skip-broken" in capsys.readouterr().err
    assert (out / "predictions.json").read_bytes() == before
    assert main(["predict", "m", str(tiffs / "bad.tif"), str(broken), "--out", str(out)]) == 2
    (row,) = json.loads((out / "predictions.json").read_text())["images"]  # in the same batch, and done
    assert row["image"].endswith("bad.tif")


def test_images_beyond_the_scale_are_told_of(calibrated, tiffs, tmp_path, capsys):
    bright = tifffile.imread(tiffs / "good.tif").astype(np.uint32) * 6
    tifffile.imwrite(tmp_path / "bright.tif", bright.clip(0, 65535).astype(np.uint16))
    assert (
        main(["predict", "m", str(tmp_path / "bright.tif"), str(tiffs / "good.tif"), "--out", str(tmp_path / "o")]) == 0
    )
    out = capsys.readouterr().out
    assert f"Of {tmp_path / 'bright.tif'} more than 10 % of the pixels lie beyond the model's" in out


def test_a_model_of_a_store_knows_the_bars_of_the_originals(tiffs, tmp_path, zoo_home):
    assert main(["data", "prepare", str(tiffs / "normal"), "--size", "64", "--out", str(tmp_path / "store")]) == 0
    model, _ = fit("padim", str(tmp_path / "store"), **TINY)
    assert set(model.view.bars) == {(64, 64, 0), (280 + BAR, 320, BAR)}
    image = tifffile.imread(tiffs / "good.tif")
    assert model.predict(image).score == model.predict(with_bar(image[:280], "another")).score
    kept = ["data", "prepare", str(tiffs / "normal"), "--size", "64", "--out", str(tmp_path / "kept")]
    assert main([*kept, "--info-bar", "none"]) == 0
    assert fit("padim", str(tmp_path / "kept"), **TINY)[0].view.info_bar == "none"
    assert View(info_bar="auto", bars=((64, 64, 0),)).with_bars([[64, 64, 9]]).bars == ()


def test_masks_of_a_folder_are_found_from_inside_it(mvtec, tmp_path, zoo_home):
    data = tmp_path / "data"
    shutil.copytree(mvtec / "test", data / "test")
    ignore_file(data / "test/ignore/square/000.png")
    inside = data / "test/square"
    images = find_images([inside], tmp_path / "out")
    for place in (None, str(data / "test/ignore")):
        masks = find_ignore(place, [inside], images)
        assert [name for name in images if masks.of(name) is not None] == ["000"]


def test_a_tensor_is_a_mask_too(square, mvtec):
    image = sorted((mvtec / "test/square").iterdir())[0]
    hidden = np.arange(96)[:, None].repeat(96, 1) < 48
    assert square.predict(image, ignore=torch.from_numpy(hidden)).score == square.predict(image, ignore=hidden).score


def test_the_mask_picture_leaves_out_what_is_ignored(calibrated, tiffs, tmp_path):
    """Also where all that is looked at is anomalous, so that the map's lowest value is."""
    ignore = ignore_file(tmp_path / "ignore.png", slice(0, 280), (280 + BAR, 320))
    mask = np.asarray(Image.open(ignore)).copy()
    mask[110:130, 110:130] = 0
    Image.fromarray(mask).save(ignore)
    args = ["predict", "m", str(tiffs / "bad.tif"), "--out", str(tmp_path / "o"), "--ignore", ignore]
    assert main(args) == 0
    (row,) = json.loads((tmp_path / "o/predictions.json").read_text())["images"]
    picture = np.asarray(Image.open(tmp_path / "o" / row["mask"])) > 0
    assert 0 < picture.sum() == sum(region["area"] for region in row["regions"]) <= 400


def test_a_score_that_is_no_number_is_no_verdict(square):
    with pytest.raises(ZooError, match="no number to judge by"):
        square._verdict(float("nan"), np.zeros((8, 8), np.float32))


def test_float_images_are_not_broken_before_their_scale_is_known(tmp_path):
    data = float_folder(tmp_path / "counts", 0.5)
    (tmp_path / "counts/good/bad.tif").write_bytes(b"II*\0")
    model, record = fit("padim", data, **TINY, data_options={"intensity": "percentile", "skip_broken": True})
    assert record["train_data"]["broken"] == 1 and model.view.floats


def test_thresholds_are_of_images_as_they_are_predicted(mvtec, tmp_path, zoo_home):
    """A preset that resizes images first is evaluated so; held-out and calibrated images keep their size."""
    module = AnomalyDataModule(load_data(str(mvtec)), view=View(resize=64))
    sizes = [
        {tuple(part.image.shape[-2:]) for parts in loader for part in parts}
        for loader in (module.holdout_dataloader(), module.test_dataloader())
    ]
    assert sizes == [{(96, 96)}, {(64, 64)}]
    model, record = fit("padim", str(mvtec), "m", **TINY, data_options={"resize": 64})
    assert main(["calibrate", "m", "--data", str(mvtec), "--false-alarm-rate", "0.15"]) == 0
    known = from_pretrained("m").calibration
    maps = [from_pretrained("m").predict(path).map for path in sorted((mvtec / "test/good").iterdir())]
    assert known.sizes == [[96, 96]] and evaluate(model, str(mvtec))["eval_size"] == [64, 64]
    assert all(np.isclose(map.max(), known.levels, rtol=1e-5).any() for map in maps)


def test_pairs_are_learned_from_without_their_bar(dim, tiffs):
    model = create_model("iad_inpainting", "lite", input_size=64)
    model.view = dim[0].view
    image = tifffile.imread(tiffs / "good.tif")
    tifffile.imwrite(tiffs / "other.tif", with_bar(image[:280], "something else"))
    assert torch.equal(model.read(tiffs / "good.tif"), model.read(tiffs / "other.tif"))
