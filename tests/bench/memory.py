"""Peak memory of a fit on 200 and on 2,000 images, each in a fresh process, the median of three.

python tests/bench/memory.py --out tests/bench/memory.json
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from zoo.methods import list_methods

LIMITS = {"growth_mb": 64, "peak_at_200_mb": 2048}


def peak_mb(method, images, size):
    """Peak resident memory in MiB of `zoo fit` on so many synthetic images, its own process and nothing else."""
    options = ["--preset", "lite", "--data", f"synthetic:train={images},size={size}", "--name", "memory"]
    if method == "patchcore":
        options += ["--bank-size", "5000"]
    code = f"import sys, resource; from zoo.cli import main; code = main({['fit', method, *options]!r}); " + (
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024); sys.exit(code)"
    )
    with tempfile.TemporaryDirectory() as home:
        run = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"ZOO_HOME": home},
            check=True,
            capture_output=True,
            text=True,
        )
    return int(run.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list_methods())
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {"limits": LIMITS, "image_size": options.size, "repeats": options.repeats, "methods": {}}
    for method in options.methods:
        peaks = {n: [peak_mb(method, n, options.size) for _ in range(options.repeats)] for n in (200, 2000)}
        few, many = (statistics.median(peaks[n]) for n in (200, 2000))
        report["methods"][method] = {"peaks_mb": peaks, "peak_at_200_mb": few, "growth_mb": many - few}
        print(method, report["methods"][method], flush=True)
    report["child_peak_mb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
