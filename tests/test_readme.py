"""No figure in the README without a record behind it."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = {"deeppcb": "DeepPCB (76 normals)", "elpv": "ELPV (270 normals)"}
METRICS = ("image_auroc", "image_f1_max", "image_ap", "pixel_auroc", "pixel_ap", "pixel_aupro")


def rows(report):
    """The README's table of real images, from the record of bench/real_images.py."""
    lines = []
    for data, found in report.items():
        for run in found["runs"]:
            size = run["configuration"]["model"]["input_size"]
            figures = [f"{run['metrics'][key]:.3f}" if key in run["metrics"] else "-" for key in METRICS]
            lines.append(f"| {NAMES[data]} | {size} | `{run['method']}` | {' | '.join(figures)} |")
    return lines


def test_table_is_that_of_the_record():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    report = json.loads((ROOT / "tests/bench/real_images.json").read_text(encoding="utf-8"))
    expected = rows(report)
    assert expected and all(line in readme for line in expected)
    assert {line for line in readme.splitlines() if line.startswith(tuple(f"| {n}" for n in NAMES.values()))} == set(
        expected
    )
