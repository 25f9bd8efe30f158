"""Layouts of folders, the pairing of masks, and a sentence for each mistake."""

import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from zoo.data.folder import fingerprint, load_folder, scan
from zoo.errors import ZooError


def make(root, *names):
    """Empty files (scan opens none); a trailing slash makes a folder."""
    for name in names:
        path = root / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    return root


def names(items):
    return [item.name for item in items]


def masks(root, items):
    return {item.name: item.mask and os.path.relpath(item.mask, root) for item in items}


MVTEC = (
    "train/good/000.png",
    "train/good/001.PNG",
    "train/good/Thumbs.db",
    "train/good/.hidden.png",
    "train/good/lot7/000.png",
    "test/good/000.png",
    "test/scratch/000.png",
    "test/scratch/001.jpg",
    "test/stain/000.tif",
    "ground_truth/scratch/000_mask.png",
    "ground_truth/scratch/001.PNG",
    "license.txt",
)


def test_mvtec(tmp_path):
    root = make(tmp_path, *MVTEC)
    splits = scan(root)
    assert list(splits) == ["train", "test"]
    assert names(splits["train"]) == ["train/good/000.png", "train/good/001.PNG", "train/good/lot7/000.png"]
    assert [item.label for item in splits["test"]] == [0, 1, 1, 1]
    assert masks(root, splits["test"]) == {
        "test/good/000.png": None,
        "test/scratch/000.png": "ground_truth/scratch/000_mask.png",
        "test/scratch/001.jpg": "ground_truth/scratch/001.PNG",
        "test/stain/000.tif": None,
    }
    assert all(os.path.isabs(item.path) and os.path.isfile(item.path) for item in splits["test"])


def test_mvtec_without_test(tmp_path):
    assert scan(make(tmp_path, "train/good/0.png")) == {
        "train": [(str(tmp_path / "train/good/0.png"), "train/good/0.png", 0, None)],
        "test": [],
    }


def test_flat(tmp_path):
    splits = scan(make(tmp_path, "b.png", "a.TIFF", "notes.txt", ".c.png", "empty/"))
    assert names(splits["train"]) == ["a.TIFF", "b.png"] and splits["test"] == []


def test_plain_without_bad(tmp_path):
    splits = scan(make(tmp_path, "good/a.png", "good/lot/b.bmp"))
    assert names(splits["train"]) == ["good/a.png", "good/lot/b.bmp"] and splits["test"] == []


def test_plain_holds_out_a_stable_fifth(tmp_path):
    root = make(tmp_path, *(f"good/{i:03d}.png" for i in range(500)), "bad/x.jpg", "bad/y.jpg", "masks/x_mask.png")
    with pytest.raises(ZooError, match=r"y\.jpg has no mask.*add .*masks/y_mask\.png"):
        scan(root)
    make(root, "masks/y.png")
    before = scan(root)
    assert masks(root, before["test"][:2]) == {"bad/x.jpg": "masks/x_mask.png", "bad/y.jpg": "masks/y.png"}
    tested = {item.name for item in before["test"] if item.label == 0}
    assert 70 <= len(tested) <= 130 and not tested & set(names(before["train"]))
    assert len(tested) + len(before["train"]) == 500

    make(root, *(f"good/new{i}.png" for i in range(100)))
    after = scan(root)
    still = {item.name for item in after["test"] if item.label == 0 and "new" not in item.name}
    assert still == tested
    moved = shutil.copytree(root, tmp_path / "elsewhere" / "copy")
    assert names(scan(moved)["test"]) == names(after["test"])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_plain_with_few_normals_fills_both_splits(tmp_path, count):
    splits = scan(make(tmp_path, *(f"good/{i}.png" for i in range(count)), "bad/x.png"))
    assert splits["train"] and {item.label for item in splits["test"]} == {0, 1}
    assert all(item.mask is None for item in splits["test"])


def test_masks_in_subfolders(tmp_path):
    root = make(
        tmp_path,
        "good/0.png",
        "good/1.png",
        *("bad/a/7.png", "bad/b/7.png", "bad/c/9.png", "bad/5.png"),
        *("masks/a/7_mask.png", "masks/b/7.png", "masks/9.png", "masks/bad/5_mask.png"),
    )
    found = {name: mask for name, mask in masks(root, scan(root)["test"]).items() if mask}
    assert found == {
        "bad/5.png": "masks/bad/5_mask.png",
        "bad/a/7.png": "masks/a/7_mask.png",
        "bad/b/7.png": "masks/b/7.png",
        "bad/c/9.png": "masks/9.png",
    }


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (["empty/"], "holds no images .*MVTec-style .*plain"),
        (["notes.txt"], "holds no images"),
        (["lot1/a.png"], r"no known layout \(it holds lot1/a\.png\).*MVTec-style.*plain"),
        (["bottle/train/good/a.png"], "did you mean .*bottle"),
        (["a.png", "defects/b.png"], "beside a folder of images, defects"),
        (["train/good/"], "train/good holds no images"),
        (["train/good/a.txt", "test/good/a.png"], "train/good holds no images"),
        (["train/", "test/scratch/a.png"], "train/good holds no images"),
        (["train/good/a.png", "train_masks/bad/b.png"], r"train_masks/bad/b\.png is a mask without.*train/bad"),
        (["train/a.png"], r"train/a\.png is in no class.*train/good"),
        (["train/good/a.png", "test/b.png"], r"test/b\.png is in no class"),
        (["train/good/a.png", "good/a.png"], "ambiguous"),
        (["good/"], "good holds no images"),
        (["good/a.png", "scratch/b.png"], r"scratch/b\.png is in a folder that is none of .*bad"),
        (["good/a.png", "bad/b.png"], "one image.*add normal images"),
        (["good/a.png", "good/b.png", "masks/x.png"], r"masks/x\.png is a mask without an image"),
        (
            ["good/a.png", "bad/wafer12.png", "masks/wafer21_mask.png"],
            r"wafer21_mask\.png.*rename it after bad/wafer12",
        ),
        (["good/a.png", "bad/x.png", "bad/x.jpg", "masks/x.png"], r"masks/x\.png fits both bad/x\.jpg and bad/x\.png"),
        (["good/a.png", "bad/a/x.png", "bad/b/x.png", "masks/x.png"], r"fits both bad/a/x\.png and bad/b/x\.png"),
        (["good/a.png", "bad/a/x.png", "masks/b/x.png"], r"masks/b/x\.png is a mask without an image"),
        (["good/a.png", "bad/x.png", "masks/x.png", "masks/x_mask.png"], r"bad/x\.png has two masks"),
        (["train/good/a.png", "test/dent/b.png", "ground_truth/bent/b.png"], "test/bent does not exist"),
        (["Anomaly_train/train_normal_00001.jpg"], "use miic:"),
    ],
    ids=range(23),
)
def test_mistakes_get_a_sentence(tmp_path, files, match):
    with pytest.raises(ZooError, match=match) as caught:
        scan(make(tmp_path, *files))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_labelled_defects_to_train_on_have_masks_of_their_own(tmp_path):
    files = ["train/good/a.png", "train/dent/b.png", "train/hole/c.png", "train_masks/dent/b_mask.png"]
    splits = scan(make(tmp_path, *files, "test/good/a.png", "test/dent/b.png"))
    found = {item.name: (item.label, item.mask and item.mask.rpartition("/")[2]) for item in splits["train"]}
    assert found == {
        "train/good/a.png": (0, None),
        "train/dent/b.png": (1, "b_mask.png"),
        "train/hole/c.png": (1, None),
    }
    assert [(item.name, item.mask) for item in splits["test"]] == [("test/dent/b.png", None), ("test/good/a.png", None)]


def test_missing_folder_and_file(tmp_path):
    make(tmp_path, "wafers/good/a.png", "wafers/a.png")
    with pytest.raises(ZooError, match="wafer does not exist; did you mean .*wafers"):
        scan(tmp_path / "wafer")
    with pytest.raises(ZooError, match="waffers/good does not exist; did you mean .*wafers"):
        scan(tmp_path / "waffers" / "good")
    with pytest.raises(ZooError, match="is a file"):
        scan(tmp_path / "wafers" / "a.png")


def test_links(tmp_path):
    root = make(tmp_path / "data", "good/a.png")
    make(tmp_path / "other", "b.png")
    (root / "good" / "lot").symlink_to(tmp_path / "other")
    (root / "good" / "loop").symlink_to(root / "good")
    assert names(scan(root)["train"]) == ["good/a.png", "good/lot/b.png"]


def test_relative_root(tmp_path, monkeypatch):
    make(tmp_path, "good/a.png")
    monkeypatch.chdir(tmp_path)
    assert scan(".") == scan(tmp_path)


def test_load_folder(tmp_path):
    root = make(tmp_path, "train/good/", "test/scratch/", "ground_truth/scratch/")
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    for name in ("train/good/a.png", "test/scratch/b.png", "ground_truth/scratch/b.png"):
        Image.fromarray(grey).save(root / name)
    data = load_folder(root)
    columns = ["image", "mask", "label", "path"]
    assert data["train"].column_names == columns and data["test"].column_names == columns
    assert data["train"][0] == {
        "image": {"bytes": None, "path": str(root / "train/good/a.png")},
        "mask": None,
        "label": 0,
        "path": "train/good/a.png",
    }
    assert data["test"][0]["mask"] == {"bytes": None, "path": str(root / "ground_truth/scratch/b.png")}
    assert data["test"].features["label"].names == ["normal", "anomalous"]
    assert not data["train"].cache_files

    empty = load_folder(root / "train" / "good")["test"]
    assert empty.num_rows == 0 and empty.features == data["test"].features


def test_fingerprint(tmp_path):
    root = make(tmp_path / "a", *MVTEC)
    before = fingerprint(scan(root))
    assert len(before) == 64 and int(before, 16)
    copy = shutil.copytree(root, tmp_path / "b" / "c")
    os.utime(copy / "train/good/000.png", (0, 0))
    splits = scan(copy)
    assert fingerprint(splits) == before
    assert fingerprint({split: items[::-1] for split, items in reversed(splits.items())}) == before

    for change in ("train/good/000.png", "ground_truth/scratch/000_mask.png"):
        (copy / change).write_bytes(b"x")
        assert fingerprint(scan(copy)) != before
        (copy / change).write_bytes(b"")
    assert fingerprint(scan(copy)) == before
    (copy / "train/good/000.png").rename(copy / "train/good/002.png")
    assert fingerprint(scan(copy)) != before
    with pytest.raises(ZooError, match=r"000\.png cannot be read"):
        fingerprint(splits)


def test_scan_is_quick_and_light(tmp_path):
    (tmp_path / "good").mkdir()
    for i in range(5000):
        (tmp_path / "good" / f"{i}.jpg").touch()
    start = time.process_time()
    assert len(scan(tmp_path)["train"]) == 5000
    assert time.process_time() - start < 0.5
    code = "import sys, zoo.data.folder; sys.exit('torch' in sys.modules or 'datasets' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
