"""What makes IAD+Inpainting, re-interpreted, detect: its choices, one changed at a time, on the synthetic set.

    python tests/bench/iad_ablation.py --steps 1000 --out tests/bench/iad_ablation.json

Each fit has preset `lite` but for its steps and what its row names; `plain` is the form with which the work began, a
GANomaly of one encoder that inpaints. The choice is made on the validation half of the test set, by the mean of image
AUROC and pixel average precision; the reported half stands beside it. Of 50 normal and 52 anomalous images an AUROC has
a standard deviation of 0.06: less is no win, and decides nothing. Each model's residuals are compared and smoothed in
three ways.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from sklearn.metrics import average_precision_score, roc_auc_score

from zoo.data import load_data
from zoo.data.halves import halves
from zoo.fit import fit
from zoo.methods.iad_inpainting import RESIDUALS

DATA = "synthetic:train=300,good=100,defect=105,size=128"
OLD = ["rectangle", "stroke", "patch", "perlin"]
# With the corruptions of old, one to an image: the form before.
PLAIN = {"skips": 0, "reconstruction_share": 0.5, "adversarial_weight": 1.0, "corrupted_share": 0.75}
FITS = {
    "lite": {},
    "plain": PLAIN | {"corruptions": OLD, "corruptions_per_image": 1},
    "no skips": {"skips": 0},
    "all skips": {"skips": 5},
    "adversarial 1": {"adversarial_weight": 1.0},
    "no latent": {"latent_weight": 0.0},
    "half reconstruction": {"reconstruction_share": 0.5},
    "one corruption": {"corruptions_per_image": 1},
    "no shifts": {"corruptions": OLD},
}


def judged(model, test):
    """Metrics by half of the test set, score or residual, and sigma."""
    rows, names = list(test), list(test.with_format(None)["path"])
    label = np.array(test.with_format(None)["label"])
    masks = np.stack([row["mask"] if row["mask"] is not None else np.zeros_like(row["image"], bool) for row in rows])
    parts = dict(zip(("validation", "reported"), halves(label.tolist(), names), strict=True))
    found = {half: {} for half in parts}

    def note(key, metric, values, truth):
        for half, chosen in parts.items():
            value = metric(truth[chosen].ravel(), values[chosen].ravel())
            found[half].setdefault(key, []).append(round(float(value), 4))

    model.hparams.score = "latent"
    predictions = model.predict([row["image"] for row in rows])
    note("latent", roc_auc_score, np.array([p.score for p in predictions]), label)
    model.hparams.score = "residual"
    for residual in RESIDUALS:
        for sigma in (1.0, 2.0, 4.0):
            model.hparams.residual, model.hparams.sigma = residual, sigma
            predictions = model.predict([row["image"] for row in rows])
            key = f"{residual}, sigma {sigma:g}"
            note(key, roc_auc_score, np.array([p.score for p in predictions]), label)
            note(key, average_precision_score, np.stack([p.map for p in predictions]), masks)
    return found


def key_of(run):
    return run["fit"], run["seed"], run["steps"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", nargs="+", choices=FITS, default=list(FITS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="those of lite by default")
    parser.add_argument("--out", type=Path, help="record that the fits are added to")
    options = parser.parse_args()
    test = load_data(DATA)["test"]
    runs = json.loads(options.out.read_text()) if options.out and options.out.exists() else []
    for name in options.fits:
        for seed in options.seeds:
            steps = {"max_steps": options.steps} if options.steps else None
            model, record = fit(
                "iad_inpainting", DATA, preset="lite", arguments=FITS[name] | {"seed": seed}, trainer_options=steps
            )
            cost = {"steps": record["training"]["steps"], "fit_seconds": record["seconds"]["fit"]}
            run = {"fit": name, "changed": FITS[name], "seed": seed} | cost | judged(model, test)
            print(json.dumps(run), flush=True)
            runs = [other for other in runs if key_of(other) != key_of(run)] + [run]
            if options.out:
                options.out.write_text(json.dumps(runs, indent=1) + "\n")


if __name__ == "__main__":
    main()
