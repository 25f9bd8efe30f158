"""An imitation of MIIC's folder at any scale, drawn by the synthetic generator, with every trap of the real one.

`python tests/miic_replica.py OUT --train 23888 --normal 1272 --abnormal 116 --size 512 --workers 2` makes one of full
size. Names and folders are those that readers of MIIC agree on; the names of the inpainting pairs are not known, and
what is written here is only what the zoo understands. A file REPLICA at the root, and a comment in each image, say
that no figure of it is MIIC's.
"""

import argparse
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

from zoo.data.miic_layout import MARK
from zoo.data.synthetic import KINDS, render

TRAPS = {
    "leak": "Anomaly_train holds copies of all test images under their names, anomalies included",
    "duplicate": "two training images are copies of test images, under names of their own",
    "pair_leak": "Inpainting_train has test images too, as either side of a pair, and under their names",
    "broken": "a training image is cut off in the middle",
    "empty_mask": "the mask of an abnormal image is black",
    "ringing": "masks are strongly compressed, so that many of their values lie between 0 and 255",
}
TEST_START = 1 << 32  # of the generator's stream, away from the training images
PAIRS_START = 1 << 33


@dataclass
class Truth:
    """What was written, for a test to compare with: names relative to the root, masks as they were drawn."""

    train: list[str] = field(default_factory=list)  # what may be trained on
    normal: list[str] = field(default_factory=list)
    masks: dict[str, np.ndarray] = field(default_factory=dict)  # by abnormal image, (H, W) bool
    boxes: dict[str, list[int]] = field(default_factory=dict)  # column, row, width, height; from 0
    pairs: list[tuple[str, str]] = field(default_factory=list)  # abnormal and normal, without those of `leaking`
    leaking: list[str] = field(default_factory=list)  # abnormal images of pairs that have a test image
    copies: dict[str, str] = field(default_factory=dict)  # training image -> the test image that it is
    broken: list[str] = field(default_factory=list)


def make(
    root: Path,
    train: int = 40,
    normal: int = 10,
    abnormal: int = 8,
    size: int = 96,
    pairs: int = 3,
    test_pairs: int = 2,
    traps: Iterable[str] = tuple(TRAPS),
    seed: int = 0,
    workers: int = 0,
    base: int = 1,
) -> Truth:
    """Write a replica.

    Args:
        root: folder to make.
        train, normal, abnormal: images of each class; at least 5, 2 and 3.
        size: side of the images in pixels.
        pairs, test_pairs: pairs of abnormal and normal images for inpainting.
        traps: which of `TRAPS` are set.
        workers: processes that draw; 0 draws in this one.
        base: from which the MATLAB file counts columns and rows.
    """
    traps, truth = set(traps), Truth()
    assert traps <= TRAPS.keys(), traps
    for folder in ("Anomaly_train", "Inpainting_train", "Inpainting_test"):
        (root / folder).mkdir(parents=True)
    for folder in ("normal_img", "abnormal_img", "abnormal_mask", "abnormal_bbox"):
        (root / "Anomaly_test" / folder).mkdir(parents=True)

    run = _mapper(workers)
    truth.train = [f"Anomaly_train/train_normal_{i + 1:05d}.jpg" for i in range(train)]
    truth.normal = [f"Anomaly_test/normal_img/test_normal_{i + 1:05d}.jpg" for i in range(normal)]
    defects = [f"Anomaly_test/abnormal_img/test_abnormal_{i + 1:05d}.jpg" for i in range(abnormal)]
    draw = partial(_draw, root=root, size=size, seed=seed)
    run(draw, [(i, None, name) for i, name in enumerate(truth.train)])
    run(draw, [(TEST_START + i, None, name) for i, name in enumerate(truth.normal)])
    kinds = [(TEST_START + normal + i, KINDS[i % len(KINDS)], name) for i, name in enumerate(defects)]
    truth.masks = dict(zip(defects, run(draw, kinds), strict=True))

    truth.boxes = {name: _box(mask) for name, mask in truth.masks.items()}
    if "empty_mask" in traps:
        truth.masks[defects[2]] = np.zeros((size, size), bool)
    _write_truth(root, truth, 20 if "ringing" in traps else 95, base)
    truth.pairs = _draw_pairs(root, {"train": pairs, "test": test_pairs}, run, draw)
    _set_traps(root, truth, traps)
    _write_texts(root)
    return truth


def _mapper(workers: int) -> Callable:
    if not workers:
        return lambda function, items: [function(item) for item in items]

    def run(function: Callable, items: list) -> list:
        with ProcessPoolExecutor(workers) as pool:
            return list(pool.map(function, items, chunksize=64))

    return run


def _draw(item: tuple[int, str | None, str], root: Path, size: int, seed: int) -> np.ndarray | None:
    """Render and write one image; its mask where it has a defect."""
    index, kind, name = item
    image, mask = render(index, seed, size, kind)
    Image.fromarray(image).save(root / name, quality=75, comment=MARK)
    return mask if kind else None


def _draw_pairs(root: Path, counts: dict[str, int], run: Callable, draw: Callable) -> list[tuple[str, str]]:
    """Each image with a defect, and the same without it; the noise outside of the defect is the same, too."""
    names, index = [], PAIRS_START
    for split, count in counts.items():
        stem = f"Inpainting_{split}/{split}"
        found = [(f"{stem}_abnormal_{i + 1:05d}.jpg", f"{stem}_normal_{i + 1:05d}.jpg") for i in range(count)]
        run(draw, [(index + i, KINDS[i % len(KINDS)], abnormal) for i, (abnormal, _) in enumerate(found)])
        run(draw, [(index + i, None, normal) for i, (_, normal) in enumerate(found)])
        names, index = names + found, index + count
    return names


def _box(mask: np.ndarray) -> list[int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return [int(columns[0]), int(rows[0]), int(np.ptp(columns)) + 1, int(np.ptp(rows)) + 1]


def _write_truth(root: Path, truth: Truth, quality: int, base: int) -> None:
    """Masks, pictures of the boxes (outlines), and the boxes as MATLAB has them."""
    for name, mask in truth.masks.items():
        stem = Path(name).stem
        _save(root / f"Anomaly_test/abnormal_mask/{stem}_mask.jpg", mask, quality)
        column, row, width, height = truth.boxes[name]
        outline = np.zeros_like(mask)
        outline[row : row + height, column : column + width] = True
        outline[row + 2 : row + height - 2, column + 2 : column + width - 2] = False
        _save(root / f"Anomaly_test/abnormal_bbox/{stem}_bbox.jpg", outline, 95)
    boxes = np.array([truth.boxes[name] for name in sorted(truth.boxes)], float) + [base, base, 0, 0]
    savemat(root / "Anomaly_test/anomalyPosition.mat", {"anomalyPosition": boxes})


def _save(path: Path, mask: np.ndarray, quality: int) -> None:
    Image.fromarray(mask.astype(np.uint8) * 255).save(path, quality=quality, comment=MARK)


def _set_traps(root: Path, truth: Truth, traps: set[str]) -> None:
    if "leak" in traps:
        for name in (*truth.normal, *truth.masks):
            shutil.copyfile(root / name, root / "Anomaly_train" / Path(name).name)
    if "duplicate" in traps:
        truth.copies = {truth.train[1]: truth.normal[0], truth.train[3]: next(iter(truth.masks))}
        for copy, original in truth.copies.items():
            shutil.copyfile(root / original, root / copy)
            truth.train.remove(copy)
    if "pair_leak" in traps:
        defect = next(iter(truth.masks))
        sides = {
            "train_%s_90001": (truth.train[-1], truth.normal[0]),
            "train_%s_90002": (defect, truth.train[-1]),
            Path(truth.normal[0]).stem.replace("normal", "%s"): (truth.train[-2], truth.train[-2]),
        }
        for stem, originals in sides.items():
            names = [f"Inpainting_train/{stem % kind}.jpg" for kind in ("abnormal", "normal")]
            for original, name in zip(originals, names, strict=True):
                shutil.copyfile(root / original, root / name)
            truth.leaking.append(names[0])
    if "broken" in traps:
        truth.broken = [truth.train[1]]
        whole = (root / truth.train[1]).read_bytes()
        (root / truth.train[1]).write_bytes(whole[: len(whole) // 2])


def _write_texts(root: Path) -> None:
    (root / "REPLICA").write_text("An imitation of MIIC's layout, drawn by a generator: no figure of it is MIIC's.\n")
    (root / "readme.txt").write_text("This is a replica of a layout; it holds nothing of MIIC.\n")
    names = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    (root / "MANIFEST.TXT").write_text("\n".join(names) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    for option, default in (("train", 23888), ("normal", 1272), ("abnormal", 116), ("size", 512)):
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--pairs", type=int, help="by default as many for each training image as MIIC has")
    parser.add_argument("--test-pairs", type=int)
    parser.add_argument("--traps", nargs="*", choices=TRAPS, default=list(TRAPS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    options = vars(parser.parse_args())
    for option, share in (("pairs", options["train"] * 1312 / 23888), ("test_pairs", options["normal"] * 135 / 1272)):
        if options[option] is None:
            options[option] = max(int(share), 1)
    written = make(options.pop("out"), **options)
    print(f"{len(written.train):,} images to train on; {len(written.normal):,} normal, {len(written.masks):,} abnormal")
