"""The generator: deterministic, plausible, and with masks that hold exactly what a defect changed."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import label
from torch.utils.data import DataLoader

from zoo.data.synthetic import KINDS, load_synthetic, parse_options, render
from zoo.errors import ZooError


def test_deterministic():
    image, mask = render(7, seed=3, size=96, kind="scratch")
    again, mask_again = render(7, seed=3, size=96, kind="scratch")
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert image.dtype == np.uint8 and mask.dtype == bool and image.shape == mask.shape == (96, 96)
    assert not np.array_equal(image, render(8, seed=3, size=96, kind="scratch")[0])
    assert not np.array_equal(image, render(7, seed=4, size=96, kind="scratch")[0])


@pytest.mark.parametrize("size", [32, 64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_is_the_difference_to_the_normal_twin(kind, size):
    for index in range(40):
        normal, nothing = render(index, size=size)
        image, mask = render(index, size=size, kind=kind)
        assert not nothing.any()
        assert mask.any() and mask.mean() < 0.2
        np.testing.assert_array_equal(image[~mask], normal[~mask])
        assert (image[mask] != normal[mask]).mean() > 0.85


def test_defects_range_from_hard_to_easy():
    for kind in KINDS:
        areas, contrasts = [], []
        for index in range(40):
            normal, _ = render(index)
            image, mask = render(index, kind=kind)
            areas.append(mask.sum())
            contrasts.append(np.abs(image[mask].astype(int) - normal[mask]).mean())
        assert np.quantile(areas, 0.9) > 2 * np.quantile(areas, 0.1)
        assert np.quantile(contrasts, 0.9) > 1.4 * np.quantile(contrasts, 0.1)
        assert min(areas) >= 10


def test_a_bridge_joins_two_lines():
    joined = 0
    for index in range(40):
        normal, _ = render(index)
        image, mask = render(index, kind="bridge")
        before, after = (label(grey > 88)[1] for grey in (normal, np.where(mask, 255, image)))
        joined += after < before
    assert joined >= 30  # noise specks and lines of two contacts hide a few


def test_looks_like_a_metal_layer():
    images = np.stack([render(index)[0] for index in range(100)]).astype(float)
    assert abs(images.mean() - 94) < 6
    assert abs(images.std() - 40) < 5
    low, dark, middle, bright, high = np.quantile(images, [0.001, 0.25, 0.42, 0.75, 0.999])
    assert 20 < low < 50 and 160 < high < 210 and dark < 65 and bright > 115
    histogram, _ = np.histogram(images, bins=16, range=(0, 256))
    assert histogram[5] < 0.5 * min(histogram[3], histogram[7])  # two humps: ground and metal
    directions = [image.mean(0).std() > image.mean(1).std() for image in images]
    assert 0.3 < np.mean(directions) < 0.7
    pitches = []
    for image, vertical in zip(images, directions, strict=True):
        profile = image.mean(0 if vertical else 1)
        pitches.append(256 / max(np.count_nonzero(np.diff(profile > profile.mean())) / 2, 1))
    assert 20 < np.median(pitches) < 36


def test_load_synthetic():
    data = load_synthetic(train=5, good=4, defect=7, size=64, seed=2)
    assert {split: rows.num_rows for split, rows in data.items()} == {"train": 5, "test": 11}
    for rows in data.values():
        assert rows.column_names == ["image", "mask", "label", "path"]
        assert rows.features["label"].names == ["normal", "anomalous"]
    row = data["train"][3]
    assert row["image"].dtype == np.uint8 and row["image"].shape == (64, 64)
    assert row["mask"] is None and row["label"] == 0 and row["path"] == "train/good/00003.png"
    np.testing.assert_array_equal(row["image"], render(3, seed=2, size=64)[0])

    test = list(data["test"])
    assert [row["label"] for row in test] == [0] * 4 + [1] * 7
    assert [row["path"].split("/")[1] for row in test[4:]] == [KINDS[i % 3] for i in range(7)]
    assert test[5]["path"] == "test/scratch/00001.png"
    assert all(row["mask"].dtype == bool and row["mask"].any() for row in test[4:])
    paths = [row["path"] for rows in data.values() for row in rows]
    assert len(set(paths)) == 16
    pixels = {row["image"].tobytes() for rows in data.values() for row in rows}
    assert len(pixels) == 16
    indices = [set(rows.with_format(None)["image"]) for rows in data.values()]
    assert not indices[0] & indices[1]


def test_loaded_rows_can_be_sliced_and_sent_to_workers():
    rows = load_synthetic(train=3, good=1, defect=3, size=32)["test"]
    batch = rows[1:3]
    assert [image.shape for image in batch["image"]] == [(32, 32)] * 2
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    for mine, sent in zip(rows, loader, strict=True):
        np.testing.assert_array_equal(sent["image"], mine["image"])
    assert list(rows["label"]) == [0, 1, 1, 1]
    assert rows.select_columns(["label", "path"])[1] == {"label": 1, "path": "test/particle/00000.png"}
    np.testing.assert_array_equal(rows.select([3])[0]["image"], rows[3]["image"])


def test_counts_cost_no_memory():
    data = load_synthetic(train=200_000, good=1, defect=1)
    assert data["train"].data.nbytes < 20e6
    assert data["train"][199_999]["path"] == "train/good/199999.png"


def test_parse_options():
    assert parse_options("") == {}
    assert parse_options("train=100, size=128,seed=0") == {"train": 100, "size": 128, "seed": 0}
    for text, match in {
        "trian=5": "no option 'trian' .did you mean 'train'.*train, good, defect, size, seed",
        "5": "no option '5'",
        "train": "write an integer",
        "train=many": "'train' is 'many'",
        "train=1.5": "write an integer",
        "good=0": "at least 1",
        "defect=-3": "at least 1",
        "size=16": "at least 32",
        "seed=-1": "at least 0",
        "train=1,train=2": "given twice",
    }.items():
        with pytest.raises(ZooError, match=match):
            parse_options(text)


def test_mistakes():
    with pytest.raises(ZooError, match="unknown defect kind 'scrach' .did you mean 'scratch'"):
        render(0, kind="scrach")
    with pytest.raises(ZooError, match="index >= 0"):
        render(-1)
    with pytest.raises(ZooError, match="at least 1"):
        load_synthetic(train=0)


def test_import_costs_neither_torch_nor_datasets():
    code = "import sys, zoo.data.synthetic; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
