"""Our PatchCore and PaDiM beside anomalib's: same images, backbone, input and evaluation size, 1 % coreset.

    python tests/bench/peer_compare.py --deeppcb FOLDER --elpv FOLDER --out tests/bench/peer_compare.json

anomalib's figures come from the record of peer_anomalib.py (which writes the ELPV folder too, by --make-elpv). Ours are
fitted as `zoo fit` does, with a tenth of the normals (at least 20) held out; anomalib's see all of them.
"""

import argparse
import json
import statistics
from pathlib import Path

from zoo.evaluation import evaluate
from zoo.fit import fit

NAMES = {"image_auroc": "image_auroc", "pixel_auroc": "pixel_auroc", "pixel_aupro": "aupro"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deeppcb", type=Path, required=True)
    parser.add_argument("--elpv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    peer = json.loads((Path(__file__).parent / "peer_anomalib.json").read_text())
    report = []
    for run, theirs in peer.items():
        root, size = str(getattr(options, run.split("_")[0])), theirs["size"]
        for method, figures in theirs["methods"].items():
            found = []
            for seed in range(options.seeds):
                arguments = {"input_size": size, "seed": seed}
                if method == "patchcore":
                    arguments |= {"coreset_ratio": 0.01}
                model, record = fit(method, root, preset="lite", arguments=arguments)
                found.append(evaluate(model, root, record, {"resize": size})["metrics"])
            for ours, name in NAMES.items():
                if ours in found[0] and figures.get(name) is not None:
                    values = [metrics[ours] for metrics in found]
                    row = {"data": run, "method": method, "metric": ours, "anomalib_seed_0": round(figures[name], 4)}
                    row |= {"zoo_mean": round(statistics.mean(values), 4), "zoo_seeds": values}
                    report.append(row)
                    print(row, flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
