"""Section 8: two processes of one thread each against one process of two threads, on the same work.

One method of each kind, with preset lite: padim adds up statistics, patchcore gathers a bank, stfpm follows gradients.
Timed, in a fresh process without its imports, are a fit and an evaluation of the same folder, through what `zoo fit`
and `zoo evaluate` call; two processes are started by torchrun and speak over gloo. Steps of stfpm take 8 images
together: a process has 4 of them. Overhead is the time of two over that of one; there is no peer in it.

Results are compared where they are promised to be equal: the statistics and metrics of padim, the scored images of all.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

METHODS = ("padim", "patchcore", "stfpm")
WANTED = 1.5  # times as long at most
EQUAL = 1e-3  # of padim's metrics; the sums of two processes are rounded in another order


def write_images(folder, count, masks=None):
    """Grey texture with noise, 224 x 224; with a bright spot, if there is a folder for its mask."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    if masks:
        masks.mkdir(parents=True)
    y, x = np.mgrid[:224, :224]
    for i in range(count):
        rng = np.random.default_rng([i, masks is not None])
        coarse = Image.fromarray(rng.integers(40, 215, (14, 14), dtype=np.uint8)).resize((224, 224), Image.BICUBIC)
        pixels = np.asarray(coarse) + rng.normal(0, 8, (224, 224))
        if masks:
            row, column = rng.integers(30, 194, 2)
            spot = (y - row) ** 2 + (x - column) ** 2 < 144
            pixels[spot] += 60
            Image.fromarray(spot.astype(np.uint8) * 255).save(masks / f"{i:04d}.png")
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{i:04d}.png")


def job(method, data, steps):
    """What each process does; the first one prints the result."""
    from zoo.evaluation import evaluate
    from zoo.fit import fit
    from zoo.ranks import launched

    rank, world, _ = launched()
    options = {"arguments": {"bank_size": 1000}} if method == "patchcore" else {}
    options |= {"trainer_options": {"max_steps": int(steps)}} if method == "stfpm" else {}
    begin = time.perf_counter()
    model, record = fit(method, data, preset="lite", data_options={"batch_size": 8 // world}, **options)
    fitted = time.perf_counter() - begin
    record = evaluate(model, data, record, data_options={"batch_size": 8})
    result = {"fit": fitted, "seconds": time.perf_counter() - begin, "metrics": record["metrics"]}
    result |= {"processes": record["processes"], "scored": sorted(name for name, *_ in model.scored)}
    if rank == 0:
        print(json.dumps(result), flush=True)


def launch(python, processes, threads, *arguments):
    command = [python] + (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] * (processes == 2))
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, __file__, *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def section(pythons, quick=False):
    train, test, steps, rounds = (48, 8, 6, 1) if quick else (200, 40, 100, 3)
    rows, notes = [], []
    with tempfile.TemporaryDirectory() as place:
        root = Path(place, "data")
        write_images(root / "train" / "good", train)
        write_images(root / "test" / "good", test)
        write_images(root / "test" / "spot", test, root / "ground_truth" / "spot")
        for method in METHODS:
            one, two = [], []
            for _ in range(rounds):
                one.append(launch(pythons["ours"], 1, 2, method, str(root), str(steps)))
                two.append(launch(pythons["ours"], 2, 1, method, str(root), str(steps)))
            for key, what in ("seconds", "fit and evaluation"), ("fit", "fit alone"):
                a, b = (statistics.median(answer[key] for answer in answers) for answers in (one, two))
                name = f"{method}, {what}: two processes over one, {b:.1f} s over {a:.1f} s"
                rows.append({"name": name, "ours": b / a, "peer": None, "unit": "times"})
                rows[-1] |= {"ratio": WANTED * a / b, "wanted": 1}
            notes.append(compared(method, one[-1], two[-1]))
    return {"rows": rows, "notes": notes}


def compared(method, one, two):
    """A note on the largest difference of a metric; RuntimeError where equality is promised and isn't there."""
    if one["scored"] != two["scored"] or (one["processes"], two["processes"]) != (1, 2):
        raise RuntimeError(f"{method}: two processes have not scored the images of one")
    apart = {name: abs(two["metrics"][name] - value) for name, value in one["metrics"].items()}
    worst = max(apart, key=apart.get)
    if method == "padim" and apart[worst] > EQUAL:
        raise RuntimeError(f"{method}: {worst} of two processes is {apart[worst]} from that of one")
    return (
        f"{method}: the same images are scored; no metric of two processes is more than {apart[worst]:.4f} from one's."
    )


if __name__ == "__main__":
    job(*sys.argv[1:])
