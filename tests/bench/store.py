"""The prepared store: how fast it is made and read, and that a model sees the same in it as in the files.

    python tests/bench/store.py --out tests/bench/store.json

JPEG files of synthetic images, 512 x 512, are written first. Decoded: JPEG to grey at 224 as `zoo data prepare` does
it, in two threads, against PIL's plain path in one (open, convert to L, resize, array), the same files, warm, in turn
three times. Made: the whole store, masks, hashes and writing included. Read: images/s of the data module's training
batches at 224. Seen: scores of one PatchCore from files and store on 250 good and 250 defective images.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from zoo.data import load_data, store, synthetic
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.prepare import prepare_data
from zoo.fit import evaluate, fit

LIMITS = {"read_per_s": 5000, "decoded_over_pil": 2, "second_run_s": 1, "auroc_difference": 0.001}


def write(root, images):
    for split, count in ("train/good", images), ("test/good", 250):
        (root / split).mkdir(parents=True)
        for i in range(count):
            image, _ = synthetic.render(i + 10**6 * (split == "test/good"), size=512)
            Image.fromarray(image).save(root / split / f"{i:05d}.jpg", quality=85)
    for kind in ("test/bad", "ground_truth/bad"):
        (root / kind).mkdir(parents=True)
    for i in range(250):
        kind = synthetic.KINDS[i % len(synthetic.KINDS)]
        image, mask = synthetic.render(2 * 10**6 + i, size=512, kind=kind)
        Image.fromarray(image).save(root / "test" / "bad" / f"{i:05d}.jpg", quality=85)
        Image.fromarray(mask).save(root / "ground_truth" / "bad" / f"{i:05d}.png")


def plain_path(files):
    """Images/s of PIL in one process."""
    begin = time.perf_counter()
    for file in files:
        with Image.open(file) as image:
            np.asarray(image.convert("L").resize((224, 224), Image.BILINEAR))
    return len(files) / (time.perf_counter() - begin)


def zoo_path(root):
    """Images/s of what fills a store, with two threads."""
    rows = load_data(str(root))["train"]
    begin = time.perf_counter()
    for _ in store._decoded(rows, (224, 224), 2, False):
        pass
    return len(rows) / (time.perf_counter() - begin)


def reading(place):
    """Images/s of the training batches, the best of three passes."""
    module, rates = AnomalyDataModule(load_data(str(place))), []
    for _ in range(3):
        begin = time.perf_counter()
        count = sum(len(batch.name) for batch in module.train_dataloader())
        rates.append(count / (time.perf_counter() - begin))
    return max(rates), rates


def scores(model):
    return np.array([score for _, _, score in model.scored]), np.array([label for _, label, _ in model.scored])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"limits": LIMITS, "images": options.images, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        root, place = Path(folder) / "files", Path(folder) / "store"
        write(root, options.images)
        files = sorted((root / "train" / "good").iterdir())
        report["file_kb"] = round(sum(file.stat().st_size for file in files) / len(files) / 1000, 1)
        plain, decoded = [], []
        for _ in range(3):
            plain.append(plain_path(files[:1000]))
            decoded.append(zoo_path(root))
        begin = time.perf_counter()
        prepare_data(str(root), (224, 224), str(place), 2, False, False)
        made = (options.images + 500) / (time.perf_counter() - begin)
        ratios = [ours / theirs for ours, theirs in zip(decoded, plain, strict=True)]
        report |= {"pil_per_s": plain, "decoded_per_s": decoded, "decoded_over_pil": float(np.median(ratios))}
        report |= {"made_per_s": made, "made_over_pil": made / float(np.median(plain))}
        begin = time.perf_counter()
        prepare_data(str(root), (224, 224), str(place), 2, False, False)
        report["second_run_s"] = time.perf_counter() - begin
        report["read_per_s"], report["read_passes"] = reading(place)

        model, record = fit("patchcore", str(root), preset="lite", arguments={"bank_size": 5000})
        evaluate(model, str(root), record, {"resize": 224})
        from_files, labels = scores(model)
        evaluate(model, str(place), record)
        from_store, _ = scores(model)
        grey, deviation = _one_level(model, place, from_store)
        aurocs = [roc_auc_score(labels, values) for values in (from_files, from_store)]
        report["seen"] = {
            "image_auroc_files": aurocs[0],
            "image_auroc_store": aurocs[1],
            "auroc_difference": abs(aurocs[0] - aurocs[1]),
            "score_difference_max": float(np.abs(from_files - from_store).max()),
            "score_difference_of_one_level": {"mean": grey, "max": deviation},
            "images": len(labels),
        }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


def _one_level(model, place, scores):
    """How far scores move, mean and max, where each pixel of the stored images moves by -1, 0 or 1 at random."""
    rng, rows = np.random.default_rng(0), load_data(str(place))["test"]
    moved = []
    for i in range(0, len(rows), 5):
        image = rows[i]["image"].astype(int) + rng.integers(-1, 2, (224, 224))
        moved.append(abs(model.predict(image.clip(0, 255).astype(np.uint8)).score - scores[i]))
    return float(np.mean(moved)), float(np.max(moved))


if __name__ == "__main__":
    main()
