"""The process of a fine-tuning by a visitor of the demo: python -m zoo.demo.tuning_job WORK.

WORK holds `job.json` and `images/`; the model is made in `home/`. What is done is told on stdout, a JSON object a line:
a stage with words, a line of the fit, an error in a sentence, or what was done.
"""

import json
import os
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

GRACE = 2.0  # seconds in which a process notices that its server is gone
NICE = 10  # answers to other visitors come first
PIXELS = 2**26  # of a batch at most: images of SEM tools may be large
LEARNED, APART = "uploaded-images", "uploaded-images-set-apart"  # as a card calls them


def main(work: Path) -> int:
    """Do a job; the exit code, 2 for a mistake that was told in a sentence."""
    channel, sys.stdout = sys.stdout, sys.stderr  # what libraries print goes into the log
    end = _end_with_server(work)

    def tell(**said: Any) -> None:
        try:
            print(json.dumps(said), file=channel, flush=True)
        except BrokenPipeError:
            end.join()

    _be_modest()
    from zoo.errors import ZooError

    try:
        tell(done=_do(work, json.loads((work / "job.json").read_text(encoding="utf-8")), tell))
        return 0
    except ZooError as error:
        tell(error=" ".join(str(error).split()))
    except MemoryError:
        tell(error="Memory is full; try fewer or smaller images, or another model")
    except Exception:
        end.join(GRACE)  # it may be that the images are just being removed
        raise
    return 2


def _end_with_server(work: Path) -> threading.Thread:
    """End, and remove the images, when the server is gone: its end of the pipe to stdin is closed."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would be held when the process ends
            pass
        if hasattr(os, "fork"):
            with suppress(OSError):  # no process more is to be had: the images go all the same
                _end_all()
        shutil.rmtree(work, ignore_errors=True)
        os._exit(1)

    end = threading.Thread(target=wait, daemon=True)
    end.start()
    return end


def _end_all() -> None:
    """Come back in a process of its own, once the others have ended: the fit would write into what is removed."""
    worker = os.getpid()
    if os.fork():
        signal.pause()  # until it is killed
    os.setsid()
    with suppress(OSError):
        os.killpg(worker, signal.SIGKILL)  # decoding processes too
    with suppress(OSError):
        os.kill(worker, signal.SIGKILL)  # where it leads no group
    while os.getppid() == worker:
        time.sleep(0.01)


def _be_modest() -> None:
    """Let the server go first, in time and in memory."""
    if hasattr(os, "nice"):
        os.nice(NICE)
    with suppress(OSError):  # Linux ends this process, not the server, where memory runs out
        Path("/proc/self/oom_score_adj").write_text("1000")


def _do(work: Path, job: dict[str, Any], tell: Any) -> dict[str, Any]:
    from zoo import checkpoint
    from zoo.calibrate import calibrate, store_calibration
    from zoo.calibration import supported_rate
    from zoo.demo.tuning import split
    from zoo.finetune import finetune
    from zoo.parent import DATA
    from zoo.run import RunOptions, plan_finetuning

    base = Path(job["base"])
    config = checkpoint.read_config(base)
    found, largest = _distinct(work / "images", base, config, job)
    learned, apart = split(len(found))
    for number, path in enumerate(found):
        folder = work / (LEARNED if number < learned else APART) / "good"
        folder.mkdir(parents=True, exist_ok=True)
        path.rename(folder / path.name)
    by_steps = plan_finetuning(config["method"], {}) is not None
    held = max(1, learned // 4) if by_steps else 0
    size = {"batch_size": _batch_size(config, largest)}
    steps = {"max_steps": job["max_steps"]} if by_steps else {}
    run = RunOptions(job["device"], precision=config["precision"], say=lambda line: tell(line=line))
    tell(stage="learning", words=f"Learning from {learned - held} images", by_steps=by_steps)
    model, record = finetune(
        base,
        str(work / LEARNED),
        job["name"],
        data_options=size | {"hold_out": held},
        trainer_options=steps,
        run=run,
        checkpoint_minutes=float("inf"),
        home=work / "home",
    )
    tell(stage="calibrating", words=f"Measuring the {apart} images that were set apart")
    rate = supported_rate(apart)
    about, normals = calibrate(model, str(work / APART), rate, folder=model.folder, data_options=size, run=run)
    store_calibration(model.folder, model.calibration, about, normals, model.view)
    (model.folder / "private" / DATA).unlink(missing_ok=True)  # where the images were, which are about to be deleted
    return {
        "method": model.method,
        "learned": record["train_data"]["images"],
        "chosen": held,
        "apart": apart,
        "unchanged": by_steps and record.get("training", {}).get("selection", {}).get("step") == 0,
        "rate": rate,
        "promise": model.calibration.promise(),
    }


def _distinct(folder: Path, base: Path, config: dict[str, Any], job: dict[str, Any]) -> tuple[list[Path], int]:
    """The different images that the model has not learned from, by their content in no order; pixels of the largest.

    Raises:
        ZooError: one can't be read, or there are too few or too many.
    """
    from zoo.errors import ZooError
    from zoo.seen import digest, read_seen
    from zoo.sem import read_sem
    from zoo.view import View

    view, known = View.stored(config["preprocessing"]).native(), read_seen(base)
    different, left, copies, broken, largest = {}, 0, 0, [], 0
    for path in (folder / name for name in job["files"]):
        try:
            sem = read_sem(path)
            view.see(sem.image, str(path), sem)  # as the model would: of another scale, it can't
        except ZooError as error:
            broken.append(str(error).rstrip("."))
            continue
        content = digest(view.without_bar(sem.image, sem))
        largest = max(largest, sem.image.size)
        left += known is not None and content in known.digests
        copies += content in different
        if known is None or content not in known.digests:
            different.setdefault(content, path)
    if broken:
        more = f"; {len(broken) - 1} more can't be read either" if len(broken) > 1 else ""
        raise ZooError(f"{broken[0]}{more}")
    if not job["least"] <= len(different) <= job["most"]:
        notes = f", {copies} of the files being copies of others" if copies else ""
        notes += f", {left} being of those that the model has learned from already" if left else ""
        few = len(different) < job["least"]
        limit = f"at least {job['least']}" if few else f"at most {job['most']}"
        cure = "add some" if few else "leave some out"
        what = f"different normal images, and there are {len(different)}"
        raise ZooError(f"Fine-tuning takes {limit} {what}{notes}; {cure}")
    return [different[content] for content in sorted(different)], largest


def _batch_size(config: dict[str, Any], pixels: int) -> int:
    """As the preset has it, less where images are so large that a batch of them would fill the memory."""
    from zoo.methods import presets
    from zoo.run import BATCH

    preset = presets(config["method"], config["preset"]) if config["preset"] else {}
    return max(1, min(preset.get("data", {}).get("batch_size", BATCH), PIXELS // pixels))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
