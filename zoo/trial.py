"""One run of a benchmark, in a process of its own: fit or go on, evaluate, time, draw, and write the record last."""

import json
import os
import shutil
import signal
import statistics
import sys
import threading
import time
import traceback
from contextlib import nullcontext
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zoo import checkpoint, gallery, hub
from zoo.benchmark import is_done, read_record
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.halves import SEED, named_halves, part_of_test
from zoo.errors import ZooError
from zoo.evaluation import store_evaluation
from zoo.fit import fit
from zoo.module import AnomalyModule
from zoo.paths import locked
from zoo.protocol import PAPER_SIZE, evaluate_by, load_last_weights
from zoo.ranks import launched
from zoo.reasons import SENTENCE, UNFORESEEN
from zoo.run import RunOptions, device_of
from zoo.view import View

TIMED, WARMED = 20, 3  # images
PATIENCE = 600  # seconds for a process that an earlier benchmark has left behind: it is about to end


def run(job: dict[str, Any]) -> None:
    """Do what is left to do of a run.

    Args:
        job: as `zoo.benchmark` makes it; with the record written, it is done.
    """
    out, name, first = Path(job["out"]), job["name"], launched()[0] == 0
    options = RunOptions(job["device"], 1, job["precision"], say=partial(print, flush=True))
    held = "An earlier benchmark's process still works on this run; try again when it is gone."
    with locked(out / "runs" / f".{name}.lock", PATIENCE, held) if first else nullcontext():
        if launched()[1] == 1 and is_done(read_record(out, name), job["key"]):  # by the process that held the lock
            return
        if first:
            _of_this_run(job, out)
            halves = checkpoint.dump({"seed": SEED} | named_halves(load_data(job["data"])["test"]))
            checkpoint.write_text(out / "halves.json", halves)
        model, record = _fitted(job, out, options)
        data_options = {key: job["data_options"].get(key) for key in ("num_workers", "skip_broken")}
        data_options |= {"batch_size": record["configuration"]["data"]["batch_size"]}
        record = evaluate_by(job["protocol"], model, job["data"], record, data_options, options, job["bootstrap"])
        if first:
            place = hub.model_place(name, out)
            model.to(device_of(job["device"]))
            record["cost"] = _cost(job, model, place)
            store_evaluation(place, model, record)
            if model.calibration:
                threshold = record["protocol"].get("val_thresholds", {}).get("image")
                gallery.draw(out / "runs" / name, model, job["data"], _view(job, model), threshold)
            record["benchmark"] = {"key": job["key"], "name": name, "date": datetime.now(UTC).date().isoformat()}
            checkpoint.write_text(out / "runs" / f"{name}.json", checkpoint.dump(record))


def _of_this_run(job: dict[str, Any], out: Path) -> None:
    """Drop the model and the checkpoint that a run of this name left behind, if it had another configuration."""
    mark, name = out / "runs" / f".{job['name']}.key", job["name"]
    if mark.is_file() and mark.read_text(encoding="utf-8") == job["key"]:
        return
    shutil.rmtree(hub.model_place(name, out), ignore_errors=True)
    shutil.rmtree(hub.unfinished_place(name, out).parent, ignore_errors=True)
    checkpoint.write_text(mark, job["key"])


def _fitted(job: dict[str, Any], out: Path, options: RunOptions) -> tuple[AnomalyModule, dict[str, Any]]:
    """The model of an earlier process that got so far, or a new one, begun anew or where it was interrupted."""
    place = hub.model_place(job["name"], out)
    if (place / checkpoint.CONFIG).is_file():
        model = hub.from_pretrained(place)
        load_last_weights(model, place)
        return model, checkpoint.read_record(place)
    return fit(
        job["method"],
        job["data"],
        job["name"],
        job["preset"],
        job["arguments"] | {"seed": job["seed"]},
        job["data_options"],
        job["trainer"],
        options,
        resume=True,
        home=out,
    )


def _view(job: dict[str, Any], model: AnomalyModule) -> View:
    """How images are brought before the model when it is evaluated."""
    paper = replace(model.view, resize=PAPER_SIZE, crop=None, tile=None)
    return paper if job["protocol"] == "paper" else model.view


@torch.inference_mode()
def _cost(job: dict[str, Any], model: AnomalyModule, place: Path) -> dict[str, Any]:
    """Median milliseconds of scoring one image that is in memory, alone in its batch; and the size of the weights."""
    module = AnomalyDataModule(part_of_test(load_data(job["data"]), "full"), view=_view(job, model))
    names, scored = module.test_set.with_format(None)["path"], {name for name, *_ in model.scored}
    rows = [row for row, name in enumerate(names) if name in scored]  # those that can be read
    images = [module.test_image(row).image.to(model.device) for row in rows[:TIMED]]
    seconds = []
    for image in [*images[:WARMED], *images]:
        begin = time.perf_counter()
        with model.autocast():
            model.score_images(image).image.tolist()  # waits for the device
        seconds.append(time.perf_counter() - begin)
    return {
        "ms_per_image": round(1000 * statistics.median(seconds[len(images[:WARMED]) :]), 2),
        "image_size": list(images[0].shape[-2:]),
        "checkpoint_mb": round((place / checkpoint.WEIGHTS).stat().st_size / 2**20, 2),
    }


def _end_with_parent() -> None:
    """End as by SIGTERM, checkpoint included, when the benchmark is gone: its end of the pipe to stdin is closed."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when the process ends
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, daemon=True).start()


def main(text: str) -> int:
    """Run a job given as JSON; the last line on stderr says why it failed, as `zoo.reasons` reads it."""
    _end_with_parent()
    try:
        run(json.loads(text))
        return 0
    except ZooError as error:
        print(f"{SENTENCE}{' '.join(str(error).split())}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        traceback.print_exc()
        print(f"{UNFORESEEN}{type(error).__name__}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
