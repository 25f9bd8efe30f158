"""The quickstart: the whole way from images to a model, its numbers and a picture, on built-in data."""

import time
from pathlib import Path

import numpy as np

from zoo import hub, plots
from zoo.data import load_data
from zoo.data.synthetic import KINDS
from zoo.evaluation import evaluate, store_evaluation
from zoo.fit import fit
from zoo.run import RunOptions
from zoo.tables import console, metric_table

DATA = "synthetic:train=120,good=35,defect=35,size=256"
NAME = "sem-patchcore"


def quickstart(out: Path, run: RunOptions) -> None:
    """Fit PatchCore on synthetic SEM images, evaluate and save it, draw Figure 1 and say what to do next.

    Args:
        out: folder for `figure1.png` and sample images.
    """
    start = time.perf_counter()
    run.say(f"Built-in synthetic SEM set: {DATA}")
    model, record = fit("patchcore", DATA, NAME, "lite", {"bank_size": 5000}, run=run)
    record = evaluate(model, DATA, record, run=run)
    store_evaluation(hub.find_model(NAME), model, record)
    console().print(metric_table(record))

    test = load_data(DATA)["test"]
    normals = [np.asarray(test[i]["image"]) for i in range(len(KINDS))]  # the test split begins with its normals
    defects = {kind: next(row for row in test if f"/{kind}/" in row["path"]) for kind in KINDS}
    rows = []
    for normal, (kind, row) in zip(normals, defects.items(), strict=True):
        image = np.asarray(row["image"])
        plots.save_png(out / "samples" / f"{kind}.png", image)
        truth = np.asarray(row["mask"]) > 0
        found = model.predict(image).map
        rows.append({"label": kind, "normal": normal, "defective": image, "truth": truth, "map": found})
    plots.save_png(out / "samples" / "normal.png", normals[0])
    plots.figure1(rows, model.calibration, out / "figure1.png")
    run.say(
        f"Model {NAME} is in {hub.find_model(NAME)}, the picture in {out / 'figure1.png'} "
        f"({time.perf_counter() - start:.0f} s in all).\n\nNext:\n"
        f"  zoo predict {NAME} {out / 'samples'} --out {out / 'results'}\n"
        f"  zoo fit patchcore --preset lite --data FOLDER --name my-model     # your images: FOLDER/good, FOLDER/bad\n"
        f"  zoo list"
    )
