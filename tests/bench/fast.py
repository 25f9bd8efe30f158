"""Whether the fast mode may be used: what it moves, beside float32, for each method on synthetic and on real images.

    python tests/bench/fast.py --boards FOLDER --out tests/bench/fast.json [--methods ...]

Each method (preset lite, 100 steps) is fitted in float32 once a data set: on 100 synthetic images, and on normal boards
of DeepPCB (an MVTec-style folder with masks), half of whose normal test images are kept for thresholds. The same model
then scores the same images in float32 and in the fast mode. Accepted is what moves the AUROC of images and of pixels by
at most max(0.002, two standard errors of a paired bootstrap over images), and at most 0.5 % of the verdicts, each mode
with the threshold of its own normals at `zoo calibrate`'s rate, 1 % (at 5 % for the record). Images are seen at 224
pixels, by methods without a backbone at 128 or 64. Runs are added to the
record. fast_rounded.json is that of CFA on commit 6ac2aa3, where its features were in bfloat16 too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from zoo import record
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.fit import fit
from zoo.methods import list_methods, presets
from zoo.nn.fast import has_bfloat16

SIZES = {"fanogan": 64, "ganomaly": 64, "iad_inpainting": 128, "riad": 64}  # else 224
SYNTHETIC = "synthetic:train={train},good={good},defect=300,size=224"
TRAIN, NORMALS, GOOD = 100, 299, 300
RATES = (0.01, 0.05)
MOST_AUROC, MOST_VERDICTS = 0.002, 0.005
REPLICATES = 200
STEPS = 100  # of methods that learn in steps
STRIDE = 4  # of the pixels that are compared


def scored(model, rows, precision):
    """Image scores (N,), every fourth pixel of the maps (N, P), labels (N,) and masks (N, P) of the rows."""
    model.precision = precision
    module = AnomalyDataModule({"train": rows, "test": rows}, input_size=model.size, batch_size=8, view=model.view)
    module.setup("test")
    scores, maps, labels, masks = [], [], [], []
    with torch.inference_mode(), model.autocast():
        for batch in module.test_dataloader():
            for part in [batch] if hasattr(batch, "image") else batch:
                found = model.score_images(part.image)
                scores.append(found.image)
                labels.append(part.label)
                mask = torch.zeros_like(found.map, dtype=torch.bool) if part.mask is None else part.mask
                maps.append(found.map[..., ::STRIDE, ::STRIDE].flatten(1))
                masks.append(mask[..., ::STRIDE, ::STRIDE].flatten(1))
    return [torch.cat(x).numpy() for x in (scores, maps, labels, masks)]


def threshold(normals, rate):
    """Reached by so large a share of new normal images at most, on average."""
    return np.sort(normals)[min(int(np.ceil((1 - rate) * (len(normals) + 1))), len(normals)) - 1]


def moved(score, exact, fast, draws):
    """By how much a figure `score(scores, index)` differs between the modes, and the standard error of that."""
    every = np.arange(len(exact))
    difference = score(fast, every) - score(exact, every)
    errors = [score(fast, index) - score(exact, index) for index in draws]
    return float(difference), float(np.std(errors))


def compare(model, normals, tests):
    exact_normals, *_ = scored(model, normals, "32-true")
    fast_normals, *_ = scored(model, normals, "fast")
    exact, exact_maps, labels, masks = scored(model, tests, "32-true")
    fast, fast_maps, *_ = scored(model, tests, "fast")
    random = np.random.default_rng(0)
    draws = [random.integers(0, len(labels), len(labels)) for _ in range(REPLICATES)]
    image, image_error = moved(lambda x, i: roc_auc_score(labels[i], x[i]), exact, fast, draws)
    pixel, pixel_error = moved(
        lambda x, i: roc_auc_score(masks[i].ravel(), x[i].ravel()), exact_maps, fast_maps, draws[:20]
    )
    changed = [
        float(((exact >= threshold(exact_normals, rate)) != (fast >= threshold(fast_normals, rate))).mean())
        for rate in RATES
    ]
    return {
        "image_auroc": float(roc_auc_score(labels, exact)),
        "image_moved": image,
        "image_error": image_error,
        "pixel_auroc": float(roc_auc_score(masks.ravel(), exact_maps.ravel())),
        "pixel_moved": pixel,
        "pixel_error": pixel_error,
        "verdicts_changed": dict(zip(map(str, RATES), changed, strict=True)),
        "tests": len(labels),
        "normals": len(exact_normals),
        "scores_moved": float(np.median(np.abs(fast - exact) / exact.std())),  # in standard deviations
        "accepted": bool(
            abs(image) <= max(MOST_AUROC, 2 * image_error)
            and abs(pixel) <= max(MOST_AUROC, 2 * pixel_error)
            and changed[0] <= MOST_VERDICTS
        ),
    }


def run(method, data, boards):
    arguments = {"input_size": SIZES.get(method, 224)}
    home = Path(tempfile.mkdtemp())
    if data == "synthetic":
        place, normals, good = SYNTHETIC.format(train=TRAIN, good=NORMALS + GOOD), NORMALS, None
        tests = load_data(place)["test"]
        label = np.array(tests["label"])
        good = np.flatnonzero(label == 0)
        normals = tests.select(good[:normals])
        tests = tests.select([*good[len(normals) :], *np.flatnonzero(label == 1)])
    else:
        place = str(boards)
        tests = load_data(place)["test"]
        label = np.array(tests["label"])
        good = np.flatnonzero(label == 0)
        normals = tests.select(good[::2])
        tests = tests.select(sorted([*good[1::2], *np.flatnonzero(label == 1)]))
    steps = {"max_steps": STEPS} if presets(method, "lite").get("trainer") else {}
    model, _ = fit(method, place, preset="lite", arguments=arguments, trainer_options=steps, home=home)
    return compare(model.eval(), normals, tests)


def table(runs):
    """Lines of Markdown: what the README shows."""
    head = [
        "method",
        "data",
        "image ROC",
        "moved by (s.e.)",
        "pixel ROC",
        "moved by (s.e.)",
        "verdicts changed",
        "accepted",
    ]
    lines = [head, ["---"] * len(head)]
    for method, found in runs.items():
        for data, run in found.items():
            cells = [f"`{method.replace('_', '-')}`", data]
            for level in ("image", "pixel"):
                cells.append(f"{run[f'{level}_auroc']:.3f}")
                cells.append(f"{run[f'{level}_moved']:+.4f} ({run[f'{level}_error']:.4f})")
            changed = round(run["verdicts_changed"][str(RATES[0])] * run["tests"])
            lines.append([*cells, f"{changed} of {run['tests']}", "yes" if run["accepted"] else "**no**"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def unmeasured(runs):
    return ", ".join(f"`{method.replace('_', '-')}`" for method in list_methods() if method not in runs)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--boards", type=Path, help="folder of DeepPCB")
    parser.add_argument("--methods", nargs="+", choices=list_methods(), default=list_methods())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, required=True, help="record that the runs are added to")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.methods[0], options.one, options.boards)))
        return
    runs = json.loads(options.out.read_text())["runs"] if options.out.exists() else {}
    for method in options.methods:
        for data in ["synthetic", *(["boards"] if options.boards else [])]:
            command = [sys.executable, __file__, "--one", data, "--methods", method, "--out", options.out]
            command += ["--boards", options.boards] if options.boards else []
            said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            runs.setdefault(method, {})[data] = json.loads(said.splitlines()[-1])
            print(method, data, runs[method][data], flush=True)
            about = {"bfloat16": has_bfloat16(torch.device("cpu")), **record.environment(torch.device("cpu"))}
            options.out.write_text(json.dumps({"runs": dict(sorted(runs.items())), **about}, indent=1) + "\n")


if __name__ == "__main__":
    main()
