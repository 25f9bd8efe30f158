"""The contract seen from outside: what predict takes, and what it gives."""

import numpy as np
import pytest
import torch
from PIL import Image

import zoo
from zoo.calibration import calibrated, default_calibration
from zoo.errors import ZooError
from zoo.fit import fit


@pytest.fixture(scope="module")
def model(mvtec):
    return fit("padim", str(mvtec), preset="lite", arguments={"input_size": 64, "dims": 10})[0]


def test_every_form_of_an_image_gives_the_same(model, mvtec):
    path = mvtec / "test/square/000.png"
    array = np.array(Image.open(path))
    forms = [
        path,
        str(path),
        Image.open(path),
        array,
        array.astype(np.uint16) * 257,
        torch.from_numpy(array)[None],
        torch.from_numpy(array / np.float32(255)),
        array.astype(np.float32) / np.float32(255),
    ]
    first = model.predict(path)
    assert first.map.shape == array.shape and first.map.dtype == np.float32 and isinstance(first.score, float)
    for form in forms:
        prediction = model.predict(form)
        np.testing.assert_allclose(prediction.map, first.map, rtol=1e-5)
        assert prediction.score == pytest.approx(first.score, rel=1e-5)
    rgb = model.predict(np.repeat(array[..., None], 3, axis=2))
    np.testing.assert_allclose(rgb.map, first.map, rtol=1e-3)


def test_one_in_one_out_list_in_list_out(model):
    image = np.full((70, 50), 90, np.uint8)
    assert isinstance(model.predict(image), zoo.Prediction)
    assert isinstance(model.predict([image]), list) and model.predict([]) == []
    mixed = model.predict([image, np.full((64, 64, 3), 90, np.uint8), image, image], batch_size=2)
    assert [p.map.shape for p in mixed] == [(70, 50), (64, 64), (70, 50), (70, 50)]
    assert (
        len(model.predict(torch.rand(3, 1, 64, 64))) == 3
        and len(model.predict(np.zeros((2, 64, 64, 3), np.uint8))) == 2
    )
    with pytest.raises(ZooError, match="shape"):
        model.predict(torch.rand(2, 64, 64))


def test_predict_leaves_the_mode_alone(model):
    model.train()
    model.predict(np.zeros((64, 64), np.uint8))
    assert model.training
    model.eval()


def test_broken_file_is_named(model, tmp_path):
    (tmp_path / "x.png").write_bytes(b"nothing")
    with pytest.raises(ZooError, match="x.png"):
        model.predict(tmp_path / "x.png")


def test_verdict_before_and_after_calibration(model, mvtec):
    prediction = model.predict(mvtec / "test/square/000.png")
    assert prediction.is_anomalous is None and prediction.p_value is None
    assert prediction.verdict == "anomalous (uncalibrated)"
    before = model.calibration
    try:
        levels = [score - 1 for score in before.scores]
        model.calibration = calibrated(before.scores, levels, 0.2, before.pixel_median, 1, "32-true")
        prediction = model.predict(mvtec / "test/square/000.png")
        assert prediction.is_anomalous is True
        assert prediction.verdict == "anomalous (fewer than 1 in 16 normal images score as high)"
        assert prediction.p_value == prediction.regions[0].p_value == pytest.approx(1 / 16)
    finally:
        model.calibration = before


@pytest.mark.parametrize("n", [20, 99, 100, 250, 1000])
def test_default_threshold_and_p_value(n):
    rng = np.random.default_rng(n)
    scores = rng.normal(size=n)
    found = default_calibration(scores.tolist(), 1.0, 0.0)
    assert np.mean(scores >= found.image_threshold) <= 0.01
    assert np.sum(scores >= found.image_threshold) == n // 100
    assert np.nextafter(found.image_threshold, -np.inf) in scores
    for s in (-9.0, 0.0, 9.0, scores[0]):
        assert found.p_value(s) == (1 + np.sum(scores >= s)) / (n + 1)


def test_heldout_thresholds_are_those_of_the_heldout_images(model, mvtec):
    from zoo.data import load_data
    from zoo.data.datamodule import AnomalyDataModule

    module = AnomalyDataModule(load_data(str(mvtec)), seed=model.hparams.seed)
    scores, pixels = [], []
    for group in module.holdout_dataloader():
        for part in group:
            with torch.inference_mode():
                found = model(part.image)
            scores += found.image.tolist()
            pixels.append(found.map.flatten().numpy())
    assert model.calibration.scores == sorted(scores)
    pixels = np.concatenate(pixels)
    expected = np.quantile(pixels, 0.999, method="inverted_cdf")
    assert model.calibration.pixel_threshold == pytest.approx(expected, rel=2**-16)
    median = np.quantile(pixels, 0.5, method="inverted_cdf")
    assert model.calibration.pixel_median == pytest.approx(median, rel=2**-16)


def test_input_size_may_be_oblong(mvtec):
    model, _ = fit("padim", str(mvtec), preset="lite", arguments={"input_size": [64, 96], "dims": 10})
    assert model.predict(np.zeros((50, 80), np.uint8)).map.shape == (50, 80)
    with pytest.raises(ZooError, match="--input-size"):
        zoo.create_model("padim", "lite", input_size=[64])


def test_bfloat16_features_finish_in_float32(mvtec):
    from zoo.run import RunOptions

    model, record = fit(
        "patchcore",
        str(mvtec),
        preset="lite",
        arguments={"input_size": 64, "bank_size": 50},
        run=RunOptions(precision="bf16-mixed"),
    )
    assert model.bank.dtype == torch.float32 and record["precision"] == "bf16-mixed"
    assert model.config()["precision"] == "bf16-mixed"
    prediction = model.predict(np.full((64, 64), 90, np.uint8))
    assert np.isfinite(prediction.score) and prediction.map.dtype == np.float32


def test_tensors_are_checked_as_files_are(model):
    good = torch.rand(1, 64, 64)
    for wrong in (good * 255, good.masked_fill(good > 0.99, torch.nan)):
        with pytest.raises(ZooError):
            model.predict(wrong)


def test_float_file_without_scale_is_named(model, tmp_path):
    import tifffile

    tifffile.imwrite(tmp_path / "wafer.tif", np.full((64, 64), 4000, np.float32))
    with pytest.raises(ZooError, match="wafer.tif"):
        model.predict(tmp_path / "wafer.tif")


def test_preset_original_is_evaluated_as_it_was_fitted(mvtec, tmp_path):
    from zoo.evaluation import evaluate

    model, record = fit(
        "padim", str(mvtec), "parity", "lite", {"input_size": 64, "dims": 10}, {"resize": 96, "crop": 64}
    )
    assert evaluate(zoo.from_pretrained("parity"), str(mvtec), record)["eval_size"] == [64, 64]
    with pytest.raises(ZooError, match="cropped"):
        model.predict(np.zeros((96, 96), np.uint8))
    with pytest.raises(ZooError, match="crop of 200"):
        fit("padim", str(mvtec), None, "lite", {"input_size": 64, "dims": 10}, {"crop": 200})
