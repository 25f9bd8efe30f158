"""FastFlow's loss with and without the log-determinant of its LayerNorms, at growing numbers of steps.

    python tests/bench/fastflow_norm.py --out tests/bench/fastflow_norm.json

The loss of the original leaves the gain of the LayerNorms out of the log-determinant, so that a smaller gain lowers it
for free. What that does to the gain and to detection is measured on the synthetic set, with the original's rate.
"""

import argparse
import json
from pathlib import Path

import torch

from zoo.evaluation import evaluate
from zoo.fit import fit

DATA = "synthetic:train=150,good=60,defect=63,size=128"
METRICS = ("image_auroc", "pixel_ap")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[200, 800, 1600])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    runs = []
    for counted in (False, True):
        for steps in options.steps:
            arguments = {"input_size": 128, "lr": 1e-3, "norm_log_det": counted}
            model, record = fit(
                "fastflow", DATA, preset="lite", arguments=arguments, trainer_options={"max_steps": steps}
            )
            gain = torch.cat([norm.weight.flatten() for norm in model.norms]).abs().mean()
            metrics = evaluate(model, DATA, record)["metrics"]
            run = {"norm_log_det": counted, "steps": steps, "gain": round(float(gain), 4)}
            runs.append(run | {key: round(metrics[key], 4) for key in METRICS})
            print(json.dumps(runs[-1]), flush=True)
            if options.out:
                options.out.write_text(json.dumps({"data": DATA, "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
