"""The house protocol and the paper's, against scikit-learn on the images that each of them means."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score, precision_recall_curve, roc_auc_score

from zoo import checkpoint
from zoo.cards import render_card
from zoo.cli import main
from zoo.data import load_data
from zoo.data.halves import halves
from zoo.fit import fit
from zoo.hub import from_pretrained, model_place
from zoo.image import read_image, read_mask
from zoo.protocol import evaluate_by, load_last_weights
from zoo.run import RunOptions

DATA = "synthetic:train=60,good=9,defect=14,size=64"
SMALL = {"padim": {"dims": 20}, "stfpm": {}}


def fitted(method, data, name=None, **trainer):
    arguments = {"input_size": 64} | SMALL[method]
    return fit(method, str(data), name, "lite", arguments, {"batch_size": 10}, trainer, RunOptions())


def looked_at(model, data, rows):
    """Labels, image scores, masks and maps of test images, by the model's own predict."""
    test = load_data(str(data))["test"]
    found = [(row["label"], model.predict(row["image"]), row["mask"]) for row in (test[i] for i in rows)]
    masks = [np.zeros(p.map.shape, bool) if mask is None else read_mask(mask) for _, p, mask in found]
    labels, scores = np.array([label for label, *_ in found]), np.array([p.score for _, p, _ in found])
    return labels, scores, np.stack(masks).ravel(), np.stack([p.map for _, p, _ in found]).ravel()


def best_threshold(targets, scores):
    precision, recall, thresholds = precision_recall_curve(targets, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return np.float32(thresholds[f1[:-1].argmax()])


def same_metrics(metrics, labels, scores, masks, maps):
    """Of images as `looked_at` gives them."""
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=2e-6)
    assert metrics["image_ap"] == pytest.approx(average_precision_score(labels, scores), abs=2e-6)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(masks, maps), abs=2e-6)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(masks, maps), abs=1e-4)


def split_rows(data):
    plain = load_data(str(data))["test"].with_format(None)
    return halves(list(plain["label"]), list(plain["path"]))


def test_house_reads_both_halves_and_the_last_step():
    model, record = fitted("stfpm", DATA, "m", max_steps=6, select="image_auroc")
    selection = record["training"]["selection"]
    assert selection["step"] < 6, "the test needs a step that is not the last one"
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate_by("house", model, DATA, record)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    val, held_out = split_rows(DATA)
    readings = found["readings"]
    assert [readings[k]["normal"] for k in ("held_out", "full", "last")] == [5, 9, 5]
    same_metrics(readings["held_out"]["metrics"], *looked_at(model, DATA, held_out))
    same_metrics(readings["full"]["metrics"], *looked_at(model, DATA, range(23)))
    assert "too good" in readings["full"]["about"] and "half" in readings["held_out"]["about"]
    assert found["metrics"] == {key: readings["held_out"]["metrics"][key] for key in found["metrics"]}
    # F1 at the thresholds that are best on val
    seen, reported = looked_at(model, DATA, val), looked_at(model, DATA, held_out)
    for level, at in ("image", 0), ("pixel", 2):
        threshold = best_threshold(seen[at], seen[at + 1])
        assert found["protocol"]["val_thresholds"][level] == pytest.approx(threshold, rel=1e-5)
        expected = f1_score(reported[at], reported[at + 1] >= threshold)
        assert readings["held_out"]["metrics"][f"{level}_f1_at_val"] == pytest.approx(expected, abs=1e-3)
    assert selection["value"] == pytest.approx(roc_auc_score(*seen[:2]), abs=1e-6)
    # the last step is that of a fit in which nothing was chosen
    last, _ = fitted("stfpm", DATA, max_steps=6)
    same_metrics(readings["last"]["metrics"], *looked_at(last, DATA, held_out))
    # and it comes with a model from its folder, to whoever asks
    loaded = from_pretrained("m")
    assert not loaded.last_weights
    load_last_weights(loaded, model_place("m"))
    assert evaluate_by("house", loaded, DATA, record)["readings"] == readings
    card = render_card(model.config(), found)
    assert all(reading["about"] in card for reading in readings.values())


def test_what_takes_no_steps_or_keeps_its_last_one(mvtec):
    model, record = fitted("padim", mvtec)
    found = evaluate_by("house", model, str(mvtec), record)
    assert set(found["readings"]) == {"held_out", "full"} and found["readings"]["full"]["about"] == "full test set"
    model, record = fitted("stfpm", mvtec, max_steps=3)
    found = evaluate_by("house", model, str(mvtec), record)["readings"]
    shared = found["last"]["metrics"].keys()
    assert found["last"]["metrics"] == {key: found["held_out"]["metrics"][key] for key in shared}
    assert "image_f1_at_val" not in shared and not model.last_weights


def test_paper_reads_all_at_224_with_nearest_masks(mvtec):
    """Images and masks resized here by PIL, which does the same as torch with antialias, and nearest at centres."""
    model, record = fitted("padim", mvtec)
    found = evaluate_by("paper", model, str(mvtec), record)
    assert found["eval_size"] == [224, 224] and list(found["readings"]) == ["full"]
    metrics = found["readings"]["full"]["metrics"]
    assert "pixel_pro_dfr200" in metrics and "image_f1_at_val" not in metrics
    labels, scores, masks, maps = [], [], [], []
    for row in load_data(str(mvtec))["test"]:
        array = Image.fromarray(read_image(row["image"]).astype(np.float32) / 255)
        image = torch.from_numpy(np.asarray(array.resize((224, 224), Image.Resampling.BILINEAR)).copy())
        found = model.predict(image.clamp(0, 1)[None])
        mask = np.zeros((96, 96), bool) if row["mask"] is None else read_mask(row["mask"])
        mask = np.asarray(Image.fromarray(mask.astype(np.uint8)).resize((224, 224), Image.Resampling.NEAREST))
        labels.append(row["label"])
        scores.append(found.score)
        masks.append(mask > 0)
        maps.append(found.map)
    scored = np.array(scores), np.stack(masks).ravel(), np.stack(maps).ravel()
    assert metrics["image_auroc"] == pytest.approx(roc_auc_score(labels, scored[0]), abs=1e-4)
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(*scored[1:]), abs=1e-4)
    assert metrics["pixel_ap"] == pytest.approx(average_precision_score(*scored[1:]), abs=1e-3)


def test_evaluate_by_protocol_from_the_command_line(mvtec, capsys):
    fitted("padim", mvtec, "m")
    assert main(["evaluate", "m", "--data", str(mvtec), "--protocol", "house"]) == 0
    out = capsys.readouterr().out
    assert "held-out half" in out and "full test set" in out and "dfr200" in out
    record = json.loads((model_place("m") / checkpoint.RECORD).read_text())
    assert record["protocol"]["halves_seed"] == 0 and record["test_data"]["normal"] == 3
    assert main(["evaluate", "m", "--data", str(mvtec)]) == 0  # without, as ever
    record = json.loads((model_place("m") / checkpoint.RECORD).read_text())
    assert "readings" not in record and "protocol" not in record and record["test_data"]["normal"] == 6


def test_mistakes_get_a_sentence(mvtec, tmp_path, capsys):
    fitted("padim", mvtec, "m")
    few = tmp_path / "few"
    shutil.copytree(mvtec / "train", few / "train")
    for kind in ("good", "square"):
        (few / "test" / kind).mkdir(parents=True)
        shutil.copy(mvtec / "test" / kind / "000.png", few / "test" / kind)
    assert main(["evaluate", "m", "--data", str(few), "--protocol", "house"]) == 2
    assert "two normal and two anomalous" in capsys.readouterr().err
    (model_place("m") / checkpoint.LAST).write_bytes(b"broken")
    assert main(["evaluate", "m", "--data", str(mvtec), "--protocol", "house"]) == 2
    assert "last.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 3])
def test_an_evaluation_that_is_asked_to_end_does_not_pass_for_done(batch, mvtec, monkeypatch, capsys):
    """SIGTERM in the first and in the last batch of three."""
    model, _ = fitted("padim", mvtec, "m")
    forward, seen = type(model).forward, []

    def asked(self, *arguments):
        seen.append(1)
        if len(seen) == batch:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *arguments)

    monkeypatch.setattr(type(model), "forward", asked)
    assert main(["evaluate", "m", "--data", str(mvtec), "--batch-size", "4"]) == 2
    assert len(seen) == batch and "The evaluation was asked to end" in capsys.readouterr().err
    assert "metrics" not in json.loads((model_place("m") / checkpoint.RECORD).read_text())
