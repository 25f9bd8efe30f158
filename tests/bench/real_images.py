"""PaDiM and PatchCore on real images: DeepPCB (printed circuit boards) and ELPV (solar cells), against plain numbers.

    python tests/bench/real_images.py --deeppcb FOLDER --elpv --out tests/bench/real_images.json

The committed record has ELPV at --sizes 224 alone, from a run of its own. ELPV needs `pip install -e ".[elpv]"` (CC
BY-NC-SA): fitted on 300 functional monocrystalline cells, tested on the other functional ones against those that are
surely defective (probability 1). DeepPCB's folder is MVTec-style with masks.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.metrics import roc_auc_score

from zoo.fit import evaluate, fit
from zoo.image import read_image
from zoo.methods import list_methods


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


def plain_numbers(root):
    """AUROC, or 1 - AUROC where that is higher, of the plain numbers of a test image."""
    paths = sorted((root / "test").glob("*/*"))
    labels = [path.parent.name != "good" for path in paths]
    images = [read_image(path).astype(float) for path in paths]
    numbers = {
        "mean": [i.mean() for i in images],
        "std": [i.std() for i in images],
        "min": [i.min() for i in images],
        "max": [i.max() for i in images],
        "gradient": [np.mean(np.square(np.gradient(i))) for i in images],
    }
    found = {name: roc_auc_score(labels, values) for name, values in numbers.items()}
    return {name: round(max(a, 1 - a), 4) for name, a in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deeppcb", type=Path)
    parser.add_argument("--elpv", action="store_true")
    parser.add_argument("--sizes", type=int, nargs="+", default=[224, 448])
    parser.add_argument("--methods", nargs="+", default=list_methods())
    parser.add_argument("--set", nargs="*", default=[], help="further arguments, name=JSON")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    extra = {k: json.loads(v) for k, v in (pair.split("=", 1) for pair in options.set)}
    with tempfile.TemporaryDirectory() as temporary:
        sets = {"deeppcb": options.deeppcb} if options.deeppcb else {}
        if options.elpv:
            sets["elpv"] = write_elpv(Path(temporary) / "elpv")
        report = {}
        for name, root in sets.items():
            report[name] = {"plain_numbers": plain_numbers(root), "runs": []}
            print(name, report[name]["plain_numbers"], flush=True)
            for size in options.sizes:
                for method in options.methods:
                    model, record = fit(method, str(root), preset="lite", arguments={"input_size": size} | extra)
                    record = evaluate(model, str(root), record)
                    report[name]["runs"].append(record)
                    print(name, size, method, record["seconds"], record["metrics"], flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
