"""How often `zoo drift` says that something has changed where nothing has, and how often where something has.

A model is fitted on some synthetic normal images, and scores and looks at 2,000 others, which are taken for all there
are. Of these 300 are drawn to calibrate at 1 %, and n others as recent images, so that nothing has changed: anything
but "trusted" (or "too few") is a false alarm of the check, of which 1 % are allowed, 1.6 % with two standard errors of
1,000 draws. Then the recent images are drawn of 300 images of another seed, each with one change.
None of the changes raises the share of false alarms much; how often too many are found is calculated instead.

python tests/bench/drift.py --out tests/bench/drift.json
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from datasets import DatasetDict
from scipy.ndimage import gaussian_filter
from scipy.stats import binom
from torch import Tensor

from zoo.calibrate import Normals, score_normals
from zoo.calibration import calibrated
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.drift import compare
from zoo.findings import LEVEL
from zoo.fit import fit
from zoo.looks import Onlooker
from zoo.record import environment
from zoo.reference import Reference, as_kept

METHODS = {"padim": ({"input_size": 128}, None), "ganomaly": ({"input_size": 64}, {"max_steps": 60})}
FITTED, POPULATION = "synthetic:train=150,size=128,seed=0", "synthetic:train=2000,size=128,seed=1"
RECENT = "synthetic:train=300,size=128,seed=2"
RATE, CALIBRATED, SIZES, NULL_DRAWS, DRAWS = 0.01, 300, (20, 50, 100, 300), 250, 40
TRUE = (0.02, 0.05, 0.1, 0.2)  # rates of false alarms
GENERATOR = torch.Generator().manual_seed(0)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "another seed": lambda images: images,
    "brightness x 0.9": lambda images: 0.9 * images,
    "contrast x 0.9": lambda images: 0.9 * images + 0.1 * images.mean((1, 2, 3), keepdim=True),
    "blur of 0.7 px": lambda images: torch.from_numpy(gaussian_filter(images.numpy(), (0, 0, 0.7, 0.7))),
    "noise of 2 %": lambda images: (images + 0.02 * torch.randn(images.shape, generator=GENERATOR)).clamp(0, 1),
    "shading of 8 %": lambda images: (images + torch.linspace(-0.04, 0.04, images.shape[-1])).clamp(0, 1),
}
FINE = "style=fine"


def looked_at(model, data: str, change: Callable[[Tensor], Tensor] = lambda images: images) -> Normals:
    rows = load_data(data)["train"]
    module = AnomalyDataModule(DatasetDict(train=rows.select([]), test=rows))
    batches = chain.from_iterable(module.test_dataloader())
    with Onlooker(model) as watch:
        return score_normals(model, (batch._replace(image=change(batch.image)) for batch in batches), watch=watch)


def some(normals: Normals, rows: np.ndarray) -> Normals:
    return Normals(
        [normals.rows[row] for row in rows], None, [], normals.looks[rows], shapes=[normals.shapes[row] for row in rows]
    )


def draw(population: Normals, recent: Normals | None, n: int, draws: int) -> dict:
    """Shares of the verdicts, and of the quantities that were found to have shifted."""
    verdicts, shifted = Counter(), Counter()
    for number in range(draws):
        rng = np.random.default_rng([n, number])
        rows = rng.permutation(len(population.rows))
        before = some(population, rows[:CALIBRATED])
        now = rows[CALIBRATED:][:n] if recent is None else rng.permutation(len(recent.rows))[:n]
        known = calibrated(before.scores, before.levels, RATE, 0.0, 1, "32-true")
        reference = Reference(set(), *as_kept(before.looks))
        found = compare(known, reference, some(population if recent is None else recent, now))
        verdicts[found.verdict] += 1
        shifted.update(shift.what for shift in found.shifts if shift.found)
    said = sum(verdicts[verdict] for verdict in ("doubtful", "not trusted")) / draws
    shares = {key: round(count / draws, 4) for key, count in sorted(shifted.items())}
    return {"drift": round(said, 4), "not_trusted": round(verdicts["not trusted"] / draws, 4), "shifted": shares}


def alarms() -> dict:
    """The fewest images above a threshold that a check finds too many, and how often that is so at true rates."""
    found = {}
    for n in SIZES:
        count = next(k for k in range(n + 1) if 2 * binom.sf(k - 1, n, RATE) < LEVEL / 2)  # of two thresholds, Holm
        found[n] = {"count": count} | {f"{rate:.0%}": round(float(binom.sf(count - 1, n, rate)), 3) for rate in TRUE}
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"level": LEVEL, "rate": RATE, "calibrated": CALIBRATED, "null_draws": NULL_DRAWS, "draws": DRAWS}
    report |= {"fitted": FITTED, "population": POPULATION, "recent": RECENT, "alarms": alarms(), "methods": {}}
    for method in options.methods:
        start, (arguments, steps) = time.perf_counter(), METHODS[method]
        model, _ = fit(method, FITTED, preset="lite", arguments=arguments, trainer_options=steps)
        population = looked_at(model, POPULATION)
        recent = {name: looked_at(model, RECENT, change) for name, change in CHANGES.items()}
        recent[FINE] = looked_at(model, f"{RECENT},{FINE}")
        found = {"nothing": {n: draw(population, None, n, NULL_DRAWS) for n in SIZES}}
        print(method, json.dumps(found), flush=True)
        for name, images in recent.items():
            found[name] = {n: draw(population, images, n, DRAWS) for n in SIZES}
            print(method, name, json.dumps(found[name]), flush=True)
        report["methods"][method] = {"by_change": found, "seconds": round(time.perf_counter() - start, 1)}
    report |= environment(torch.device("cpu"))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
