"""Whether a stated false-alarm rate holds: real scores of several methods, drawn 1,000 times.

Each method is fitted on some synthetic normal images and scores 4,000 others, which are taken for all there are. Of
these 299 or 1,000 are drawn, with replacement; zoo.calibration sets thresholds for a rate of 1 %; and the true rate is
the share of the 4,000 at or above them. It may exceed 1 % in 5 % of the draws: 6.4 % with two standard errors of 1,000
draws. For comparison, the 99 % quantile of the same draws, which many take for a threshold.

python tests/bench/false_alarms.py --out tests/bench/false_alarms.json
"""

import argparse
import json
import time
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict

from zoo.calibrate import score_normals
from zoo.calibration import calibrated
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.fit import fit
from zoo.record import environment

METHODS = {
    "padim": ({"input_size": 64}, None),
    "patchcore": ({"input_size": 64, "bank_size": 500}, None),
    "stfpm": ({"input_size": 64}, {"max_steps": 60}),
    "ganomaly": ({"input_size": 64}, {"max_steps": 60}),
}
FITTED, POPULATION = "synthetic:train=200,size=64,seed=0", "synthetic:train=4000,size=64,seed=1"
RATE, DRAWS, SIZES, MIN_AREA, LIMIT = 0.01, 1000, (299, 1000), 9, 0.064


def population(method: str) -> tuple[np.ndarray, np.ndarray]:
    """Scores and levels (N,) of the images that are taken for all there are."""
    arguments, steps = METHODS[method]
    model, _ = fit(method, FITTED, preset="lite", arguments=arguments, trainer_options=steps)
    rows = load_data(POPULATION)["train"]
    module = AnomalyDataModule(DatasetDict(train=rows.select([]), test=rows))
    normals = score_normals(model, chain.from_iterable(module.test_dataloader()), MIN_AREA)
    return np.array(normals.scores), np.array(normals.levels)


def draw(scores: np.ndarray, levels: np.ndarray, n: int, seed: int) -> dict[str, dict[str, float]]:
    """Of image scores and of regions: the share of draws whose true rate exceeds the stated one, and the mean rate."""
    rng = np.random.default_rng(seed)
    rates = {"image": [], "region": [], "image, 99 % quantile": []}
    for _ in range(DRAWS):
        rows = rng.integers(len(scores), size=n)
        found = calibrated(scores[rows].tolist(), levels[rows].tolist(), RATE, 0.0, MIN_AREA, "32-true")
        rates["image"].append(np.mean(scores >= found.image_threshold))
        rates["region"].append(np.mean(levels >= found.pixel_threshold))
        rates["image, 99 % quantile"].append(np.mean(scores >= np.quantile(scores[rows], 1 - RATE)))
    return {
        level: {"exceeding": round(np.mean(np.array(found) > RATE), 4), "mean_rate": round(np.mean(found), 5)}
        for level, found in rates.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    about = {"rate": RATE, "draws": DRAWS, "limit": LIMIT, "min_area": MIN_AREA}
    report = about | {"fitted": FITTED, "population": POPULATION, "methods": {}}
    for method in options.methods:
        start = time.perf_counter()
        scores, levels = population(method)
        found = {str(n): draw(scores, levels, n, seed=n) for n in SIZES}
        held = all(of[level]["exceeding"] <= LIMIT for of in found.values() for level in ("image", "region"))
        distinct = {"image": len(np.unique(scores)), "region": len(np.unique(levels))}
        seconds = round(time.perf_counter() - start, 1)
        report["methods"][method] = {"by_n": found, "held": held, "distinct": distinct, "seconds": seconds}
        print(method, json.dumps(report["methods"][method]), flush=True)
    report |= environment(torch.device("cpu"))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
