"""Publish from one environment, load in a clean one by name, compare bit for bit; then again with the server gone.

    python tests/bench/hub.py --out tests/bench/hub.json

Each method is fitted with few steps on an imitation of MIIC, and published by `zoo publish` to the tests' own hub,
which runs in a process of its own. The second environment is a new one, with the wheel alone; it knows the server's
address and the namespace, and lies away from the checkout. Compared are scores and maps of images of several sizes and
depths, by SHA-256.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
SCORE = """
import hashlib, json, sys, time
import numpy as np
begin = time.perf_counter()
import zoo
found = {}
for name in sys.argv[1:]:
    start = time.perf_counter()
    model = zoo.from_pretrained(name)
    seconds = time.perf_counter() - start
    rng, images = np.random.default_rng(0), []
    for i, shape in enumerate([(96, 96), (120, 77), (64, 200)]):
        images.append(rng.integers(0, 2**16 if i else 256, shape, dtype=np.uint16 if i else np.uint8))
    said = model.predict(images)
    digest = hashlib.sha256(b"".join(np.float64(one.score).tobytes() + one.map.tobytes() for one in said)).hexdigest()
    found[name] = {"sha256": digest, "seconds": round(seconds, 2)}
print(json.dumps(found))
"""
LOST = """
import time
import huggingface_hub, zoo.remote
start = time.perf_counter()
try:
    zoo.from_pretrained("miic-nothing")
except zoo.ZooError as error:
    print(f"{time.perf_counter() - start:.2f}", error)
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = round_trip(Path(folder), options.methods)
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1, sort_keys=True) + "\n")


def round_trip(place, methods):
    from zoo.methods import list_methods

    methods = [method.replace("_", "-") for method in methods or list_methods()]
    names = [f"miic-{method}" for method in methods]
    clean = clean_environment(place)
    run(
        [
            sys.executable,
            ROOT / "tests/miic_replica.py",
            place / "replica",
            *"--train 60 --normal 30 --traps leak ringing".split(),
        ]
    )
    with hub(place) as (server, common):
        ours = common | {"ZOO_HOME": str(place / "home"), "HF_HOME": str(place / "hf")}
        for method, name in zip(methods, names, strict=True):
            fit = ["fit", method, "--preset", "lite", "--data", f"miic:{place}/replica", "--name", name]
            run(["zoo", *fit, *([] if method in ("padim", "patchcore") else ["--max-steps", "4"])], ours)
            run(["zoo", "publish", name, "--to", f"fab/{name}"], ours)
            print(name, flush=True)
        before = json.loads(run([sys.executable, "-c", SCORE, *names], ours))
        theirs = common | {"ZOO_HOME": str(place / "other-home"), "HF_HOME": str(place / "other-hf")}
        theirs |= {"ZOO_NAMESPACE": "fab"}
        first = json.loads(run([clean, "-c", SCORE, *names], theirs, place))
        server.terminate()
        server.wait()
        gone = json.loads(run([clean, "-c", SCORE, *names], theirs, place))
        lost = run([clean, "-c", LOST], theirs, place)
    models = {
        name: {
            "equal": before[name]["sha256"] == first[name]["sha256"],
            "equal_with_the_server_gone": before[name]["sha256"] == gone[name]["sha256"],
            "seconds_to_load": [found[name]["seconds"] for found in (first, gone)],
        }
        for name in names
    }
    seconds, _, sentence = lost.partition(" ")
    return {"models": models, "uncached": {"seconds": float(seconds), "says": sentence.strip()}}


def clean_environment(place):
    """The Python of a new environment with the wheel of this checkout."""
    run([sys.executable, "-m", "build", "--wheel", "--outdir", place / "dist", ROOT])
    run([sys.executable, "-m", "venv", place / "venv"])
    python = place / "venv/bin/python"
    run([python, "-m", "pip", "install", "-q", *(place / "dist").glob("*.whl")])
    return python


class hub:
    """The server in a process of its own, and what every process needs to know of it."""

    def __init__(self, place):
        self.place = place

    def __enter__(self):
        command = [sys.executable, ROOT / "tests/hub_server.py", "0", self.place / "hub"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        url = self.process.stdout.readline().strip()
        return self.process, {"HF_ENDPOINT": url, "HF_TOKEN": "hf_write", "HF_HUB_OFFLINE": "0"}

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()


def run(command, variables=None, cwd=None):
    bins = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        list(map(str, command)), env=os.environ | bins | (variables or {}), cwd=cwd, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:300]}\n{done.stdout}\n{done.stderr}")
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{time.perf_counter() - start:.0f} s")
