"""Bootstrap intervals against scikit-learn on the same draws, pixels and all, and what `evaluate` makes of them."""

import json
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from zoo import hub
from zoo.cli import main
from zoo.errors import ZooError
from zoo.metrics import AUPRO
from zoo.metrics.bootstrap import image_tables, intervals


def examples(normals=9, defects=7, side=24):
    """Labels, scores, maps (n, 1, side, side) of 8 significant bits, masks with a square in each defect."""
    rng = np.random.default_rng(5)
    labels = np.array([0] * normals + [1] * defects)
    scores = (rng.normal(size=len(labels)) + labels).astype(np.float32)
    masks = torch.zeros(len(labels), 1, side, side, dtype=torch.bool)
    for i in range(normals, len(labels)):
        y, x, size = rng.integers(0, 12), rng.integers(0, 12), rng.integers(2, 12)
        masks[i, 0, y : y + size, x : x + size] = True
    maps = torch.from_numpy(rng.integers(1, 128, masks.shape).astype(np.float32)) + 60 * masks
    return labels, scores, maps, masks


def f1_max(targets, scores):
    precision, recall, _ = precision_recall_curve(targets, scores)
    return max(2 * p * r / (p + r) for p, r in zip(precision, recall, strict=True) if p + r)


def drawn(labels, seed, replicates):
    """The draws of the docstring, made one by one: class by class, as many as there are."""
    rng = np.random.default_rng(seed)
    counts = np.zeros((replicates, len(labels)), int)
    for label in (0, 1):
        rows = np.flatnonzero(labels == label)
        counts[:, rows] = rng.multinomial(len(rows), [1 / len(rows)] * len(rows), size=replicates)
    return [np.repeat(np.arange(len(labels)), row) for row in counts]


def test_intervals_are_quantiles_of_metrics_on_drawn_images():
    labels, scores, maps, masks = examples()
    found = intervals(labels, scores, image_tables(maps, masks, None), replicates=40, seed=3)
    values = {key: [] for key in found}
    for rows in drawn(labels, 3, 40):
        y, s = labels[rows], scores[rows]
        pixels, truth = maps[rows].flatten().numpy(), masks[rows].flatten().numpy()
        regions = AUPRO()
        regions.update(maps[rows][:, 0], masks[rows][:, 0])
        for key, value in {
            "image_auroc": roc_auc_score(y, s),
            "image_ap": average_precision_score(y, s),
            "image_f1_max": f1_max(y, s),
            "pixel_auroc": roc_auc_score(truth, pixels),
            "pixel_ap": average_precision_score(truth, pixels),
            "pixel_f1_max": f1_max(truth, pixels),
            "pixel_aupro": float(regions.compute()),
        }.items():
            values[key].append(value)
    assert len(values["pixel_ap"]) == 40 and all(low < high for low, high in found.values())
    for key, ends in found.items():
        np.testing.assert_allclose(ends, np.quantile(values[key], [0.025, 0.975]), atol=1e-6, err_msg=key)


def test_interval_of_the_auroc_is_as_wide_as_its_known_deviation():
    """Of one threshold between two values the AUROC is a mean of independent draws: (p + 1 - q) / 2."""
    normals, defects, p, q = 400, 300, 0.8, 0.3  # p of the defects and q of the normals score 1
    labels = np.array([0] * normals + [1] * defects)
    scores = np.concatenate([np.arange(normals) < q * normals, np.arange(defects) < p * defects]).astype(float)
    low, high = intervals(labels, scores, None, replicates=4000)["image_auroc"]
    deviation = math.sqrt(p * (1 - p) / defects + q * (1 - q) / normals) / 2
    assert (low + high) / 2 == pytest.approx((1 + p - q) / 2, abs=0.2 * deviation)
    assert (high - low) / 2 == pytest.approx(1.96 * deviation, rel=0.06)


def test_draws_depend_on_the_seed_alone_and_a_region_cuts():
    labels, scores, maps, masks = examples()
    tables = image_tables(maps, masks, None)
    assert intervals(labels, scores, tables, 20, seed=1) == intervals(labels, scores, tables, 20, seed=1)
    assert intervals(labels, scores, tables, 20, seed=1) != intervals(labels, scores, tables, 20, seed=2)
    valid = torch.ones_like(masks)
    valid[..., :12, :] = False
    for table, mask in zip(image_tables(maps, masks, valid), masks, strict=True):
        assert table[:, 2].sum() == mask[0, 12:].sum() and table[:, 1:3].sum() == 12 * 24


def test_what_has_no_interval_is_refused():
    with pytest.raises(ZooError, match="both classes"):
        intervals([1, 1], [0.0, 1.0], None, 10)
    with pytest.raises(ZooError, match="at least 2"):
        intervals([0, 1], [0.0, 1.0], None, 1)


def test_evaluate_keeps_intervals_and_writes_scores(mvtec, tmp_path, capsys):
    """From the command line, as CSV and as parquet; without --bootstrap there are none left."""
    name = ["--preset", "lite", "--data", str(mvtec), "--name", "tiles", "--input-size", "64"]
    assert main(["fit", "padim", *name]) == 0
    command = ["evaluate", "tiles", "--data", str(mvtec), "--bootstrap", "50"]
    assert main([*command, "--scores", str(tmp_path / "deep/scores.parquet")]) == 0
    folder = hub.find_model("tiles")
    record = json.loads((folder / "results.json").read_text())
    assert record["intervals"]["draws"] == 50 and record["intervals"]["metrics"].keys() == record["metrics"].keys()
    for key, (low, high) in record["intervals"]["metrics"].items():
        assert 0 <= low <= record["metrics"][key] + 1e-3 and record["metrics"][key] - 1e-3 <= high <= 1
    low, high = record["intervals"]["metrics"]["pixel_ap"]
    assert low < high and f"{low:.3f}-{high:.3f}" in capsys.readouterr().out
    assert f"{low:.3f} to {high:.3f}" in (folder / "README.md").read_text()

    rows = Dataset.from_parquet(str(tmp_path / "deep/scores.parquet"))
    assert rows.column_names == ["image", "label", "score"] and len(rows) == 12
    assert roc_auc_score(rows["label"], rows["score"]) == pytest.approx(record["metrics"]["image_auroc"], abs=1e-6)

    assert main([*command[:-1], "0", "--scores", str(tmp_path / "scores.csv")]) == 0
    assert "intervals" not in json.loads((folder / "results.json").read_text())
    assert Dataset.from_csv(str(tmp_path / "scores.csv"))["image"][:] == rows["image"][:]


@pytest.mark.parametrize(
    ("option", "value"), [("--scores", "scores.xlsx"), ("--bootstrap", "1"), ("--bootstrap", "-3")]
)
def test_mistakes_are_answered_before_a_model_is_looked_for(option, value, capsys):
    assert main(["evaluate", "one", "--data", "synthetic", option, value]) == 2
    assert option in capsys.readouterr().err
