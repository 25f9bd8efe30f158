"""What training adds: the same model before and after a fit by gradient, on made images, three seeds.

    python tests/bench/learning.py --out tests/bench/learning.json

Untrained, a method has its first weights (and CFA its bank, which is made before training). Beside image AUROC and
pixel average precision stands pixel AUROC, which proves little: an untrained CFA can have a high one already.

Methods without a backbone learn from pixels, and more slowly: they get more images, and are tested on more, so that
chance tells less. f-AnoGAN is shown stripes, in which a square that is turned by 90 degrees is planted: its greys are
those of its surroundings. On the synthetic set it stays at chance: its generator makes sharp layouts, but of 128
numbers not the one that it is shown, so that what it rebuilds differs everywhere.

Of scores that know nothing the image AUROC has mean 1/2 and variance (n + m + 1) / (12 n m) for n normal and m
anomalous images (Mann and Whitney 1947): the mean of three seeds must exceed 1/2 by two deviations of such a mean.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.methods import create_model, list_methods, presets, signature

# Pixels, else 128, which is small for the first three; `lite` of the others has networks for 64.
SIZES = {"cfa": 224, "rd4ad": 224, "supersimplenet": 160, "fanogan": 64, "ganomaly": 64}
PLANTED = ("fanogan",)  # are shown stripes
STEPS = {"supersimplenet": 1000}  # else those of `lite`
IMAGES = {"train": 150, "good": 60, "defect": 63}
OF_PIXELS = {"train": 600, "good": 300, "defect": 301}  # for methods without a backbone
METRICS = ("image_auroc", "pixel_ap", "pixel_auroc", "pixel_aupro")
METHODS = [method for method in list_methods() if "trainer" in presets(method, "lite")]


def untrained(method, data, size, seed):
    """A model as it is before its first step."""
    model = create_model(method, "lite", input_size=size, seed=seed).eval()
    if hasattr(model, "observe"):
        module = AnomalyDataModule(load_data(data), input_size=model.size, seed=seed)
        with torch.no_grad():
            for batch in module.train_dataloader():
                model.observe(batch)
            model.finish()
    return model


def plant(folder, size, seed, train, good, defect):
    """An MVTec-style folder of noisy vertical stripes at any place; in defects a square of them is turned."""
    rng = np.random.default_rng(seed)

    def stripes():
        return np.tile(np.where((np.arange(size) + rng.integers(16)) % 16 < 8, 150, 70), (size, 1))

    def write(image, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.astype(np.uint8)).save(path)

    def noisy(image):
        return (image + rng.normal(0, 6, image.shape)).clip(0, 255)

    for split, count in (("train/good", train), ("test/good", good)):
        for i in range(count):
            write(noisy(stripes()), folder / split / f"{i:04d}.png")
    for i in range(defect):
        image, mask = stripes(), np.zeros((size, size))
        y, x = rng.integers(0, size - 24, 2)
        place = slice(y, y + 24), slice(x, x + 24)
        image[place], mask[place] = stripes().T[place], 255
        write(noisy(image), folder / "test/turned" / f"{i:04d}.png")
        write(mask, folder / "ground_truth/turned" / f"{i:04d}_mask.png")
    return folder


def compare(method, seed, folder):
    """Metrics before and after a fit with preset lite, and the parts of the loss in its first and last tenth.

    `folder` is an empty one, for images.
    """
    size = SIZES.get(method, 128)
    counts = IMAGES if "backbone" in signature(method) else OF_PIXELS
    data = "synthetic:" + ",".join(f"{key}={n}" for key, n in (counts | {"size": size, "seed": seed}).items())
    if method in PLANTED:
        data = str(plant(Path(folder), size, seed, **counts))
    before = evaluate(untrained(method, data, size, seed), data)["metrics"]
    arguments = {"input_size": size, "seed": seed}
    options = {"max_steps": STEPS[method]} if method in STEPS else None
    model, record = fit(method, data, preset="lite", arguments=arguments, trainer_options=options)
    after = evaluate(model, data, record)["metrics"]
    losses = record["training"]["losses"]
    first = {key: value for row in reversed(losses) for key, value in row.items()}  # a later phase has its own parts
    n, m = counts["good"], counts["defect"]
    return {
        "method": method,
        "seed": seed,
        "size": size,
        "data": "stripes" if method in PLANTED else "synthetic",
        "images": counts,
        "steps": record["training"]["steps"],
        "fit_seconds": record["seconds"]["fit"],
        "chance_deviation": round(((n + m + 1) / (12 * n * m)) ** 0.5, 4),  # of the image AUROC
        "untrained": {key: round(before[key], 4) for key in METRICS},
        "trained": {key: round(after[key], 4) for key in METRICS},
        "loss": {key: [first[key], losses[-1][key]] for key in losses[-1] if key.startswith("loss")},
    }


def key_of(run):
    return run["method"], run["seed"], run["data"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, help="record that the runs are added to")
    options = parser.parse_args()
    runs = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    for method in options.methods:
        for seed in options.seeds:
            with tempfile.TemporaryDirectory() as folder:
                run = compare(method, seed, folder)
            print(json.dumps(run), flush=True)
            runs = [other for other in runs if key_of(other) != key_of(run)] + [run]
            if options.out:
                options.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
