"""The prepared store: how fast it is made and read, and that a model sees the same in it as in the files.

    python tests/bench/store.py --out tests/bench/store.json

JPEG files of synthetic images, 512 x 512, are written first. Decoded: JPEG to grey at 224 as `zoo data prepare` does
it, against PIL's plain path (a loop: open, convert to L, resize, array), the same files, warm, in turn three times. The
command has two threads on two cores, which the limit is for; thread against thread is told beside it. Made: the whole
store, masks, hashes and writing included. Read: images/s of the data module's training batches at 224. Seen: scores of
one PatchCore from files and store on good and defective images, and how far noise of the rounding's size, uniform
within half a grey level, moves those of the files.
"""

import argparse
import json
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"  # NumPy's products take no thread but the one that decodes

import numpy as np
import torch
from PIL import Image
from sklearn.metrics import roc_auc_score

from zoo.data import load_data, store_writer, synthetic
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.prepare import prepare_data
from zoo.data.rows import read_row
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.image import resize, to_tensor

LEAST = {"decoded_over_pil": 2, "read_per_s": 5000}
MOST = {"second_run_s": 1, "auroc_difference": 0.001, "score_difference_over_noise": 1.5}


def write(root, images, tested):
    for split, count in ("train/good", images), ("test/good", tested):
        (root / split).mkdir(parents=True)
        for i in range(count):
            image, _ = synthetic.render(i + 10**6 * (split == "test/good"), size=512)
            Image.fromarray(image).save(root / split / f"{i:05d}.jpg", quality=85)
    for kind in ("test/bad", "ground_truth/bad"):
        (root / kind).mkdir(parents=True)
    for i in range(tested):
        kind = synthetic.KINDS[i % len(synthetic.KINDS)]
        image, mask = synthetic.render(2 * 10**6 + i, size=512, kind=kind)
        Image.fromarray(image).save(root / "test" / "bad" / f"{i:05d}.jpg", quality=85)
        Image.fromarray(mask).save(root / "ground_truth" / "bad" / f"{i:05d}.png")


def plain_path(files, threads):
    """Images/s of PIL."""

    def decode(file):
        with Image.open(file) as image:
            return np.asarray(image.convert("L").resize((224, 224), Image.BILINEAR))

    begin = time.perf_counter()
    if threads == 1:
        for file in files:
            decode(file)
    else:
        with ThreadPoolExecutor(threads) as pool:
            for _ in pool.map(decode, files):
                pass
    return len(files) / (time.perf_counter() - begin)


def zoo_path(rows, threads):
    """Images/s of what fills a store."""
    begin = time.perf_counter()
    for _ in store_writer._decoded(rows, (224, 224), threads, False):
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


def with_noise(model, root):
    """Scores of the files at 224 where each pixel moves by up to half a grey level, uniformly at random."""
    rng, found = np.random.default_rng(0), []
    for row in load_data(str(root))["test"]:
        image = resize(to_tensor(read_row(row)[0], row["path"])[None], (224, 224))[0, 0].numpy()  # (224, 224) in [0, 1]
        noise = rng.uniform(-0.5, 0.5, image.shape).astype(np.float32) / 255
        found.append(model.predict((image + noise).clip(0, 1)).score)
    return np.array(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--tested", type=int, default=250, help="good images, and as many defective ones")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"at_least": LEAST, "at_most": MOST, "images": options.images, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        root, place = Path(folder) / "files", Path(folder) / "store"
        write(root, options.images, options.tested)
        files = sorted((root / "train" / "good").iterdir())
        report["file_kb"] = round(sum(file.stat().st_size for file in files) / len(files) / 1000, 1)
        rows = load_data(str(root))["train"]
        plain, decoded = {1: [], 2: []}, {1: [], 2: []}
        for _ in range(3):
            for threads in (1, 2):
                plain[threads].append(plain_path(files[:1000], threads))
                decoded[threads].append(zoo_path(rows.select(range(min(1000, len(rows)))), threads))
        begin = time.perf_counter()
        prepare_data(str(root), (224, 224), str(place), 2, False, False)
        made = (options.images + 2 * options.tested) / (time.perf_counter() - begin)

        def ratio(threads, of_pil):
            return float(np.median([a / b for a, b in zip(decoded[threads], plain[of_pil], strict=True)]))

        report |= {"pil_per_s": plain, "decoded_per_s": decoded, "decoded_over_pil": ratio(2, 1)}
        report |= {"decoded_over_pil_thread_for_thread": {n: ratio(n, n) for n in (1, 2)}, "made_per_s": made}
        begin = time.perf_counter()
        prepare_data(str(root), (224, 224), str(place), 2, False, False)
        report["second_run_s"] = time.perf_counter() - begin
        report["read_per_s"], report["read_passes"] = reading(place)

        model, record = fit("patchcore", str(root), preset="lite", arguments={"bank_size": 5000})
        evaluate(model, str(root), record, {"resize": 224})
        from_files, labels = scores(model)
        evaluate(model, str(place), record)
        from_store, _ = scores(model)
        by_store, by_noise = np.abs(from_store - from_files), np.abs(with_noise(model, root) - from_files)
        aurocs = [roc_auc_score(labels, values) for values in (from_files, from_store)]
        report |= {
            "scored_images": len(labels),
            "image_auroc_files": aurocs[0],
            "image_auroc_store": aurocs[1],
            "auroc_difference": abs(aurocs[0] - aurocs[1]),
            "score_range_files": [float(from_files.min()), float(from_files.max())],
            "score_difference": {"mean": float(by_store.mean()), "max": float(by_store.max())},
            "score_difference_by_noise": {"mean": float(by_noise.mean()), "max": float(by_noise.max())},
            "score_difference_over_noise": float(by_store.mean() / by_noise.mean()),
        }
    failed = [key for key in LEAST if report[key] < LEAST[key]] + [key for key in MOST if report[key] > MOST[key]]
    report |= {"passed": not failed, "failed": failed}
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
