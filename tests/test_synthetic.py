"""The generator: deterministic, plausible, and with masks that hold exactly what a defect changed."""

import subprocess
import sys

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter, label
from sklearn.metrics import roc_auc_score
from torch.utils.data import DataLoader

from zoo.data.layout import Rules, route
from zoo.data.synthetic import FIELD, KINDS, load_synthetic, parse_options, render
from zoo.errors import ZooError


def test_deterministic():
    image, mask = render(7, seed=3, size=96, kind="scratch")
    again, mask_again = render(7, seed=3, size=96, kind="scratch")
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(mask, mask_again)
    assert image.dtype == np.uint8 and mask.dtype == bool and image.shape == mask.shape == (96, 96)
    assert not np.array_equal(image, render(8, seed=3, size=96, kind="scratch")[0])
    assert not np.array_equal(image, render(7, seed=4, size=96, kind="scratch")[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("size", "style"),
    [(32, "metal"), (64, "metal"), (100, "metal"), (256, "metal"), (32, "fine"), (100, "fine"), (256, "fine")],
)
def test_a_mask_is_the_difference_to_the_normal_twin(kind, size, style):
    for index in range(40 if style == "metal" else 20):
        normal, nothing = render(index, size=size, style=style)
        image, mask = render(index, size=size, kind=kind, style=style)
        assert not nothing.any()
        assert mask.any() and mask.mean() < 0.2
        np.testing.assert_array_equal(image[~mask], normal[~mask])
        assert (image[mask] != normal[mask]).mean() > 0.85


def test_what_visibly_changed_is_in_the_mask():
    """A threshold on the smoothed difference, far above zero, finds the same place."""
    for kind in KINDS:
        for index in range(10):
            normal, _ = render(index)
            image, mask = render(index, kind=kind)
            changed = np.abs(gaussian_filter(image.astype(float) - normal, 1.0))
            assert mask[changed > 6].mean() > 0.6 if (changed > 6).any() else mask.any()


def test_defects_range_from_hard_to_easy():
    for kind in KINDS:
        areas, contrasts = [], []
        for index in range(40):
            normal, _ = render(index)
            image, mask = render(index, kind=kind)
            areas.append(mask.sum())
            contrasts.append(np.abs(image[mask].astype(int) - normal[mask]).mean())
        assert np.quantile(areas, 0.9) > 2 * np.quantile(areas, 0.1), kind
        assert np.quantile(contrasts, 0.9) > 1.4 * np.quantile(contrasts, 0.1), kind
        assert min(areas) >= 10, kind


def pieces(image, threshold):
    """Connected pieces of metal, specks aside."""
    found, _ = label(gaussian_filter(image.astype(float), 1.0) > threshold)
    return np.count_nonzero(np.bincount(found.ravel())[1:] > 30)


@pytest.mark.parametrize("kind, change", [("bridge", -1), ("open", 1)])
def test_bridges_join_and_opens_part_lines(kind, change):
    hits = []
    for index in range(40):
        normal, image = render(index)[0], render(index, kind=kind)[0]
        hits.append((pieces(image, 92) - pieces(normal, 92)) * change > 0)
    assert np.mean(hits) >= 0.75  # lines that meet or end beyond the border hide some


def test_a_missing_via_leaves_its_line_and_less_light():
    for index in range(30):
        normal, _ = render(index)
        image, mask = render(index, kind="missing_via")
        rows, columns = np.nonzero(mask)
        tall, wide = np.ptp(rows) + 1, np.ptp(columns) + 1
        assert mask.sum() > 0.5 * tall * wide and max(tall, wide) < 1.6 * min(tall, wide)  # a dot
        assert normal[mask].mean() - image[mask].mean() > 8
        deepest = np.argmax(gaussian_filter(normal.astype(float) - image, 1.0))
        smooth = gaussian_filter(normal.astype(float), 1.0)
        assert smooth.flat[deepest] > np.quantile(smooth, 0.7)  # where a via shone


def test_each_layout_has_a_free_via_and_neighbours():
    for seed in range(100):
        rng = np.random.default_rng(seed)
        rules = Rules(
            pitch=rng.uniform(20, 46), fill=0.6, skip=0.5, reach=2.0, via=0.6, uneven=1.0,
            dumbbells=2, combs=2, bends=4, power=1, hollow=1,
        )  # fmt: skip
        bars, vias = route(rng, 128, seed % 2, rules)
        assert any(via.end and 0 < via.y < 128 and 0 < via.x < 128 for via in vias)
        long = [bar for bar in bars if bar.axis == seed % 2 and 0 < bar.centre < 128]
        assert len(long) >= 2
        assert min(bar.half for bar in bars) > 4


def upward(profile):
    """Where a profile crosses its middle upwards."""
    middle = (np.quantile(profile, 0.05) + np.quantile(profile, 0.9)) / 2
    return np.flatnonzero(np.diff((profile > middle).astype(int)) == 1)


def pitch(images):
    """Median distance of lines across the main direction of each image, pixels."""
    apart = []
    for image in images:
        image = image if image.mean(0).std() > image.mean(1).std() else image.T
        for band in np.array_split(image, 8):
            apart.extend(np.diff(upward(np.convolve(band.mean(0), np.ones(5) / 5, "valid"))))
    return np.median(apart)


def test_looks_like_a_metal_layer():
    images = np.stack([render(index, size=512)[0] for index in range(60)]).astype(float)
    assert abs(images.mean() - 94.1) < 5
    assert abs(images.std() - 41.3) < 3
    assert ((images >= 34) & (images <= 192)).mean() > 0.985
    histogram, _ = np.histogram(images, bins=16, range=(0, 256))
    assert histogram[5:7].min() < 0.5 * min(histogram[3:5].max(), histogram[7:10].max())  # ground and metal
    directions = [image.mean(0).std() > image.mean(1).std() for image in images]
    assert 0.3 < np.mean(directions) < 0.7
    assert 42 < pitch(images) < 60
    assert images.mean((1, 2)).std() > 6  # variety
    fine = np.stack([render(index, size=512, style="fine")[0] for index in range(20)]).astype(float)
    assert pitch(fine) < 0.65 * pitch(images)
    assert fine.std() < 0.8 * images.std()


def test_edges_are_brighter_than_what_they_enclose():
    """Across a wide line, light falls from its edges to its middle, and rises from the ground to them."""
    found = []
    for index in range(30):
        image = render(index, size=512)[0].astype(float)
        smooth = gaussian_filter(image, 1.5)
        ground, metal = np.quantile(smooth, [0.2, 0.75])
        found.append(np.quantile(smooth, 0.97) > metal + 0.15 * (metal - ground))
    assert np.mean(found) > 0.8


def test_plain_numbers_do_not_find_defects():
    """As the bench does on 1,000 images; here on fewer and smaller ones."""
    rows = load_synthetic(train=1, good=140, defect=140, size=128)["test"]
    rows = list(rows)
    labels, images = [row["label"] for row in rows], np.stack([row["image"] for row in rows]).astype(float)
    energy = np.square(np.diff(images, axis=1)).mean((1, 2)) + np.square(np.diff(images, axis=2)).mean((1, 2))
    flat = images.reshape(len(images), -1)
    for numbers in (flat.mean(1), flat.std(1), flat.min(1), flat.max(1), energy):
        assert 0.38 < roc_auc_score(labels, numbers) < 0.62


def test_sixteen_bits_show_the_same_scene_between_the_levels():
    for kind in (None, "particle"):
        image, mask = render(5, size=128, kind=kind)
        deep, deep_mask = render(5, size=128, kind=kind, bits=16)
        assert deep.dtype == np.uint16
        np.testing.assert_array_equal(mask, deep_mask)
        assert np.abs(deep / 257 - image).max() <= 0.501
        assert len(np.unique(deep)) > 20 * len(np.unique(image))


@pytest.mark.parametrize("style", ["metal", "fine"])
def test_the_info_bar_has_a_scale_of_the_written_length(style):
    normal, _ = render(4, size=512, style=style)
    image, _ = render(4, size=512, style=style, bar=True)
    height = 512 // 12
    np.testing.assert_array_equal(image[:-height], normal[:-height])
    line = image[-height // 2 - 1] > 200
    runs = np.diff(np.flatnonzero(np.diff(np.concatenate([[False], line, [False]]).astype(int))))[::2]
    nm = {"metal": 500, "fine": 200}[style]
    assert abs(runs.max() - nm * 512 / FIELD[style]) <= 2
    assert image[-height:].min() < 20
    for kind in KINDS:
        image, mask = render(3, size=100, kind=kind, style=style, bar=True, bits=16)
        assert image.dtype == np.uint16 and mask.any() and not mask[-(100 // 12) :].any()


def test_load_synthetic():
    data = load_synthetic(train=5, good=4, defect=9, size=64, seed=2)
    assert {split: rows.num_rows for split, rows in data.items()} == {"train": 5, "test": 13}
    for rows in data.values():
        assert rows.column_names == ["image", "mask", "label", "path"]
        assert rows.features["label"].names == ["normal", "anomalous"]
    row = data["train"][3]
    assert row["image"].dtype == np.uint8 and row["image"].shape == (64, 64)
    assert row["mask"] is None and row["label"] == 0 and row["path"] == "train/good/00003.png"
    np.testing.assert_array_equal(row["image"], render(3, seed=2, size=64)[0])

    test = list(data["test"])
    assert [row["label"] for row in test] == [0] * 4 + [1] * 9
    assert [row["path"].split("/")[1] for row in test[4:]] == [KINDS[i % 7] for i in range(9)]
    assert test[5]["path"] == "test/scratch/00001.png"
    assert all(row["mask"].dtype == bool and row["mask"].any() for row in test[4:])
    paths = [row["path"] for rows in data.values() for row in rows]
    assert len(set(paths)) == 18
    pixels = {row["image"].tobytes() for rows in data.values() for row in rows}
    assert len(pixels) == 18
    deep = load_synthetic(train=1, good=1, defect=1, size=64, style="fine", bits=16, bar=1)["test"][1]["image"]
    np.testing.assert_array_equal(deep, render((1 << 32) + 1, 0, 64, "particle", "fine", 16, True)[0])
    indices = [set(rows.with_format(None)["image"]) for rows in data.values()]
    assert not indices[0] & indices[1]


def test_labelled_defects_to_learn_from():
    plain = load_synthetic(train=5, good=3, defect=14, size=64)
    data = load_synthetic(train=5, good=3, defect=14, train_defect=7, size=64)
    assert data["train"]["label"] == [0] * 5 + [1] * 7
    assert [path.split("/")[1] for path in data["train"]["path"][5:]] == list(KINDS)
    shown = [row["image"].tobytes() for split in data.values() for row in split]
    assert len(set(shown)) == len(shown)  # no image twice
    assert all(row["mask"].any() for row in data["train"].select(range(5, 12)))
    before = [row["image"].tobytes() for split in plain.values() for row in split]
    assert before == shown[:5] + shown[12:]


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
    assert parse_options("style=fine,bits=16,bar=1") == {"style": "fine", "bits": 16, "bar": 1}
    for text, match in {
        "trian=5": "no option 'trian' .did you mean 'train'.*train, good, defect, train_defect, size, seed",
        "5": "no option '5'",
        "train": "write an integer",
        "train=many": "'train' is 'many'",
        "train=1.5": "write an integer",
        "good=0": "at least 1",
        "defect=-3": "at least 1",
        "size=16": "at least 32",
        "seed=-1": "at least 0",
        "train=1,train=2": "given twice",
        "style=fin": "'fin' .did you mean 'fine'.*one of metal, fine",
        "bits=12": "one of 8, 16",
        "bits=deep": "write an integer such as 8",
        "bar=2": "one of 0, 1",
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
    with pytest.raises(ZooError, match="'style' is 'fime' .did you mean 'fine'"):
        render(0, style="fime")
    with pytest.raises(ZooError, match="'bits' is 12"):
        load_synthetic(bits=12)


def test_import_costs_neither_torch_nor_datasets():
    code = "import sys, zoo.data.synthetic; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
