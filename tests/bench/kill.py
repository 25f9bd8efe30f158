"""Kill fits with signal 9 at random moments, resume them, and compare with fits that were never stopped.

    python tests/bench/kill.py --kills 20 --out tests/bench/kill.json

Two epochs of 8 batches with shuffling, a checkpoint after each batch, for each method and a small one that learns by
gradient (tests/learner.py). Compared are the images of each batch, every tensor of the final state, bit for bit, and,
where there is a bank, the origin of its vectors. After each kill the checkpoint on disk is read.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from test_resume import kill_and_resume, same_results, seen, start_job

from zoo.methods import list_methods


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    random.seed(options.seed)
    report = {"kills": options.kills, "methods": {}}
    for method in [*list_methods(), "learner"]:
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "whole"
            job = start_job(method, whole)
            job.stdout.readline()
            begin = time.perf_counter()
            assert job.wait() == 0
            duration = time.perf_counter() - begin
            rows = []
            for i in count():
                if sum(row["was_running"] for row in rows) == options.kills:
                    break
                killed, delay = Path(folder) / str(i), random.uniform(0, duration)
                running = kill_and_resume(method, killed, delay)
                same_results(killed, whole)
                lines = len((killed / "seen.jsonl").read_text().splitlines())
                rows.append(
                    {"seconds": round(delay, 3), "was_running": running, "done_twice": lines - len(seen(whole))}
                )
            report["methods"][method] = {
                "equal": len(rows),
                "running": sum(r["was_running"] for r in rows),
                "runs": rows,
            }
            print(method, report["methods"][method], flush=True)
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
