"""A replica of MIIC's full size through builder, `zoo data prepare`, a PaDiM-lite fit and its evaluation, in one run.

    python tests/bench/miic_scale.py --out tests/bench/miic_scale.json [--folder REPLICA]

The replica (25,276 files in Anomaly_train, 512 x 512, every trap set) is drawn by `tests/miic_replica.py` unless a
folder of it is given. Each step is a process of its own: its wall time and the peak of its resident memory. Figures of
a replica are not MIIC's.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TESTS = Path(__file__).parents[1]
BUILD = """
import sys
from zoo.data.miic import MIIC
builder = MIIC(data_dir=sys.argv[1], cache_dir=sys.argv[2])
builder.download_and_prepare()
data = builder.as_dataset()
print({split: len(rows) for split, rows in data.items()}, data["test"][0]["image"].size, data["test"].features)
"""


def timed(command, home):
    """Seconds of a command and MiB at its peak (at least this process's own, which therefore imports little)."""
    begin = time.perf_counter()
    environment = os.environ | {"ZOO_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed:\n{said}")
    print(said, flush=True)
    return {"seconds": round(time.perf_counter() - begin, 1), "peak_mb": round(usage.ru_maxrss / 1024)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="a replica that is there already")
    parser.add_argument("--out", type=Path, help="JSON record to write")
    options = parser.parse_args()
    report = {"steps": {}}
    zoo = [sys.executable, "-m", "zoo.cli"]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        root = options.folder or Path(folder) / "miic"
        store = str(Path(folder) / "store")
        commands = {
            "replica": [sys.executable, TESTS / "miic_replica.py", root, "--workers", "2"],
            "builder": [sys.executable, "-c", BUILD, root, home / "builder"],
            "prepare": [*zoo, "data", "prepare", f"miic:{root}", "--skip-broken", "--out", store],
            "fit": [*zoo, "fit", "padim", "--preset", "lite", "--data", store, "--name", "replica-padim"],
            "evaluate": [*zoo, "evaluate", "replica-padim", "--data", store],
        }
        if options.folder:
            del commands["replica"]
        for step, command in commands.items():
            report["steps"][step] = timed([str(part) for part in command], home)
            print(step, report["steps"][step], flush=True)
        report["files"] = len(list((root / "Anomaly_train").iterdir()))
        results = json.loads((home / "models/replica-padim/results.json").read_text())
        report["train"], report["test"] = results["train_data"], results["test_data"]
        report["metrics_of_the_replica"] = results["metrics"]
        report |= {key: results["evaluation"][key] for key in ("hardware", "versions")}
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
