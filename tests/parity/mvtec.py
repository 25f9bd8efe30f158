"""Parity with published figures on MVTec AD, for whoever has that data set and the ImageNet weights.

    python tests/parity/mvtec.py MVTEC_FOLDER
    python tests/parity/mvtec.py MVTEC_FOLDER --methods stfpm --classes bottle carpet --out parity.json

Fits each feature method on each class (a folder with train/good, test and ground_truth), with the hyperparameters, crop
and steps of its original, and prints the mean over the classes beside the published one: image AUROC, pixel AUROC and
PRO, in percent. The published figures are means over all 15 classes; with fewer the verdict is left out. CFA's figure
is the best epoch on the test set, which we don't do: ours is the last one. A fit holds out a tenth of the normals, and
at least 20, for its threshold, so that ours learn from fewer. With `--out` the command goes on where it was stopped.
`--preset lite` tries it where the weights can't be had.
"""

import argparse
import json
from pathlib import Path

from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.run import RunOptions

KEYS = ("image_auroc", "pixel_auroc", "pixel_aupro")
CLASSES = 15
PUBLISHED = {  # percent: image AUROC, pixel AUROC, PRO; None where no figure is known
    "padim": ((95.3, 97.5, 92.1), 0.5, "re-implementations that agree"),
    "patchcore": ((99.2, 98.1, 94.4), 0.5, "official repository, bank of 10 %"),
    "cfa": ((99.3, 98.2, None), 1.0, "official README, resize and crop, best epoch"),
    "stfpm": ((95.5, 97.0, 92.8), 1.0, "official README"),
    "rd4ad": ((98.5, 97.8, 93.9), 1.0, "secondary sources; PRO by image"),
    "fastflow": ((None, 98.1, None), 1.0, "paper, as its re-implementation quotes it"),
    "supersimplenet": ((98.4, 97.5, 91.1), 1.0, "official results, mean of 5 runs"),
}


def measure(method, folder, options):
    """The three metrics of one class, in percent."""
    arguments = {"input_size": options.input_size} if options.input_size else {}
    steps = {"max_steps": options.max_steps} if options.max_steps and method not in ("padim", "patchcore") else None
    run = RunOptions(options.device, say=lambda line: print("   ", line, flush=True))
    model, record = fit(method, str(folder), None, options.preset, arguments, trainer_options=steps, run=run)
    metrics = evaluate(model, str(folder), record, run=run)["metrics"]
    return {key: round(100 * metrics[key], 2) for key in KEYS if key in metrics}


def row(method, found, classes):
    """A line of the table: published, tolerance, ours, verdict."""
    (published, tolerance, source) = PUBLISHED[method]
    cells = [f"{method:<15}"]
    for key, figure in zip(KEYS, published, strict=True):
        values = [by_key[key] for by_key in found.values() if key in by_key]
        ours = sum(values) / len(values) if values else None
        verdict = ""
        if figure is not None and ours is not None and classes == CLASSES:
            verdict = " ok" if ours >= figure - tolerance else " LOW"
        shown = "-" if figure is None else f"{figure:.1f}"
        cells.append(f"{shown:>6} {'-' if ours is None else f'{ours:.2f}':>7}{verdict:<4}")
    return " | ".join([*cells, f"+-{tolerance}", source])


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="MVTec AD, unpacked: one folder a class")
    parser.add_argument("--methods", nargs="+", choices=PUBLISHED, default=list(PUBLISHED))
    parser.add_argument("--classes", nargs="+", help="names of folders; all by default")
    parser.add_argument("--preset", default="original")
    parser.add_argument("--max-steps", type=int, help="for a trial: fewer steps than the original's")
    parser.add_argument("--input-size", type=int, help="for a trial: a smaller input")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="JSON file of all figures, written after each fit")
    options = parser.parse_args(argv)
    folders = [p for p in sorted(options.folder.iterdir()) if (p / "train" / "good").is_dir()]
    folders = [p for p in folders if not options.classes or p.name in options.classes]
    if not folders:
        parser.error(f"{options.folder} has no class folders with train/good")
    report = {"preset": options.preset, "max_steps": options.max_steps, "input_size": options.input_size, "figures": {}}
    if options.out and options.out.exists():
        before = json.loads(options.out.read_text())
        if before | {"figures": {}} != report:
            parser.error(f"{options.out} holds figures of other options; name another file")
        report = before
    for method in options.methods:
        found = report["figures"].setdefault(method, {})
        for folder in folders:
            if folder.name in found:
                continue
            print(f"{method} on {folder.name}", flush=True)
            try:
                found[folder.name] = measure(method, folder, options)
            except ZooError as error:
                print("    left out:", error, flush=True)
                continue
            print("   ", found[folder.name], flush=True)
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{len(folders)} of {CLASSES} classes, preset {options.preset}; published and ours, in percent")
    print(
        " | ".join([f"{'method':<15}", *(f"{key:>18}" for key in KEYS), "tolerance", "source of the published figure"])
    )
    for method in options.methods:
        print(row(method, report["figures"][method], len(report["figures"][method])))


if __name__ == "__main__":
    main()
