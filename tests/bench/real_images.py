"""All methods, with preset lite, on the synthetic set, DeepPCB (circuit boards) and ELPV (solar cells).

    python tests/bench/real_images.py synthetic deeppcb elpv --folder FOLDER --out tests/bench/real_images.json
    python tests/bench/real_images.py deeppcb --folder FOLDER --sizes 448 --methods rd4ad --out FILE

Images are seen at 224 pixels, by methods without a backbone at 128 or 64. Runs are added to the record, in place of
those of the same data, size and method; each has a process of its own, so that its peak memory is its own. ELPV needs
`pip install -e ".[elpv]"` (CC BY-NC-SA): fitted on 300 functional monocrystalline cells, tested on the other functional
ones against those that are surely defective (probability 1). DeepPCB's folder is MVTec-style with masks.
Beside them stand plain numbers of an image, which learn nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from zoo.data import load_data
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.image import read_image
from zoo.methods import list_methods
from zoo.naming import METRICS
from zoo.run import RunOptions

NAMES = {"synthetic": "synthetic", "deeppcb": "DeepPCB", "elpv": "ELPV"}
SIZES = {"fanogan": 64, "ganomaly": 128, "iad_inpainting": 128, "riad": 128}  # else 224
SYNTHETIC = "synthetic:train=300,good=100,defect=105,size=224"


def write_elpv(root):
    """The ELPV split as an MVTec-style folder."""
    from elpv_dataset.utils import load_dataset

    images, probability, kinds = load_dataset()
    mono = kinds == "mono"
    good = np.random.default_rng(0).permutation(np.flatnonzero(mono & (probability == 0)))
    splits = {
        "train/good": good[:300],
        "test/good": good[300:],
        "test/defect": np.flatnonzero(mono & (probability == 1)),
    }
    for folder, chosen in splits.items():
        (root / folder).mkdir(parents=True)
        for i in chosen:
            Image.fromarray(images[i]).save(root / folder / f"{i:04d}.png")
    return root


def plain_numbers(data):
    """AUROC, or 1 - AUROC where that is higher, of the plain numbers of a test image."""
    test = load_data(data)["test"]
    labels = list(test.with_format(None)["label"])
    images = [read_image(row["image"]).astype(float) for row in test]
    numbers = {
        "mean": [i.mean() for i in images],
        "std": [i.std() for i in images],
        "min": [i.min() for i in images],
        "max": [i.max() for i in images],
        "gradient": [np.mean(np.square(np.gradient(i))) for i in images],
    }
    found = {name: roc_auc_score(labels, values) for name, values in numbers.items()}
    return {name: round(max(a, 1 - a), 4) for name, a in found.items()}


def run_one(method, data, size, extra, out):
    """Fit and evaluate in this process."""
    say = RunOptions(say=lambda line: print("   ", line, flush=True))
    model, record = fit(method, data, preset="lite", arguments={"input_size": size} | extra, run=say)
    record = evaluate(model, data, record)
    image = np.zeros((size, size), np.uint8)
    model.predict([image] * 3, batch_size=1)
    begin = time.perf_counter()
    model.predict([image] * 20, batch_size=1)
    record["ms_per_image"] = round((time.perf_counter() - begin) / 20 * 1000, 1)  # a batch of one, size x size
    out.write_text(json.dumps(record))


def table(report):
    """Lines of Markdown, one for each run: what the README shows."""
    head = [*METRICS.values(), "fit s", "ms/image", "peak MB"]
    lines = [f"| data | input | method | {' | '.join(head)} |", "|---" * (len(head) + 3) + "|"]
    for data, found in report.items():
        for run in found["runs"]:
            figures = [f"{run['metrics'][key]:.3f}" if key in run["metrics"] else "-" for key in METRICS]
            cost = f"{run['seconds']['fit']:.0f} | {run['ms_per_image']:.0f} | {run['peak_memory_mb']:.0f}"
            size = run["configuration"]["model"]["input_size"]
            lines.append(f"| {NAMES[data]} | {size} | `{run['method']}` | {' | '.join(figures)} | {cost} |")
    return "\n".join(lines)


def run_all(options, data, source, temporary, report):
    """Each method on one data set, in a process of its own; the report grows by each."""
    found = report.setdefault(data, {"runs": []})
    found["plain_numbers"] = plain_numbers(source)
    print(data, found["plain_numbers"], flush=True)
    for method in options.methods:
        for size in options.sizes or [SIZES.get(method, 224)]:
            print(data, size, method, flush=True)
            one = temporary / "record.json"
            command = [sys.executable, __file__, "--one", one, source, method, str(size), *options.set]
            subprocess.run(command, check=True)
            record = json.loads(one.read_text())
            found["runs"] = [run for run in found["runs"] if key_of(run) != key_of(record)] + [record]
            found["runs"].sort(key=lambda run: key_of(run)[::-1])
            if options.out:
                options.out.write_text(json.dumps(report, indent=1) + "\n")


def main():
    if sys.argv[1:2] == ["--one"]:
        out, source, method, size, *pairs = sys.argv[2:]
        extra = {name: json.loads(value) for name, value in (pair.split("=", 1) for pair in pairs)}
        return run_one(method, source, int(size), extra, Path(out))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", choices=NAMES)
    parser.add_argument("--folder", type=Path, help="of DeepPCB")
    parser.add_argument("--sizes", type=int, nargs="+", help="pixels; as above by default")
    parser.add_argument("--methods", nargs="+", default=list_methods())
    parser.add_argument("--set", nargs="*", default=[], help="further arguments, name=JSON")
    parser.add_argument("--out", type=Path, help="record that the runs are added to")
    options = parser.parse_args()
    report = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    if "deeppcb" in options.data and not options.folder:
        parser.error("deeppcb needs --folder")
    with tempfile.TemporaryDirectory() as temporary:
        for data in options.data:
            source = {"synthetic": SYNTHETIC, "deeppcb": str(options.folder)}.get(data)
            run_all(options, data, source or str(write_elpv(Path(temporary) / data)), Path(temporary), report)
    print(table(report))


def key_of(run):
    return run["method"], run["configuration"]["model"]["input_size"]


if __name__ == "__main__":
    main()
