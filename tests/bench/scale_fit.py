"""Fit on a MIIC-sized set, 23,888 images at 224, by the command line: time, peak memory and what was said beforehand.

    python tests/bench/scale_fit.py --methods patchcore padim --out tests/bench/scale_fit.json

`--preset lite`; PatchCore's bank holds 10,000 vectors of 152 numbers, chosen from 18.7 million. Seconds are those of
the whole command: import, rendering the synthetic images, features, statistics, scores of 2,654 held-out images.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time
from pathlib import Path

LIMITS = {"peak_gb": 6, "minutes": 40, "estimate_within": 0.25}


def fit(method, images, options):
    """Seconds, peak resident bytes and record of `zoo fit`, its own process and nothing else."""
    data = f"synthetic:train={round(images / 0.9)},size=224"  # a tenth is held out
    command = ["zoo", "fit", method, "--preset", "lite", "--data", data, "--name", "scale", *options]
    with tempfile.TemporaryDirectory() as home:
        start = time.perf_counter()
        process = subprocess.Popen(command, env=os.environ | {"ZOO_HOME": home}, stdout=subprocess.PIPE, text=True)
        said = process.stdout.readline().strip()
        process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        assert status == 0
        record = json.loads((Path(home) / "models" / "scale" / "results.json").read_text())
    peak, estimate = usage.ru_maxrss / 1024, record["estimate"]
    spent = record["seconds"]["fit"] + record["seconds"]["held_out"]
    return {
        "images": record["train_data"]["images"],
        "said": said,
        "seconds": round(seconds, 1),
        "seconds_of": record["seconds"],
        "peak_mb": round(peak, 1),
        "estimate": estimate,
        "time_estimate_over_time": round(estimate["seconds"] / spent, 3),
        "memory_estimate_over_peak": round(estimate["memory_mb"] / peak, 3),
        "hardware": record["hardware"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["patchcore", "padim"])
    parser.add_argument("--images", type=int, default=23_888)
    parser.add_argument("--out", type=Path)
    args, options = parser.parse_known_args()
    report = {"limits": LIMITS, "options": options, "methods": {}}
    for method in args.methods:
        report["methods"][method] = fit(method, args.images, options)
        print(method, report["methods"][method], flush=True)
        if args.out:
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    within = LIMITS["estimate_within"]
    for method, found in report["methods"].items():
        assert found["peak_mb"] < 1000 * LIMITS["peak_gb"] and found["seconds"] < 60 * LIMITS["minutes"], method
        assert (
            abs(found["memory_estimate_over_peak"] - 1) < within and abs(found["time_estimate_over_time"] - 1) < within
        )


if __name__ == "__main__":
    main()
