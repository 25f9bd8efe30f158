"""Score the images of a folder as they arrive, each once, into a ledger that outlasts any stop."""

import errno
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.arrivals import TRIES, Arrivals, File, shown
from zoo.data.ignore import IgnoreMasks
from zoo.errors import ZooError
from zoo.inference import COLUMNS, OFF_SCALE, Found, row_of
from zoo.ledger import Ledger, writing

if TYPE_CHECKING:  # torch is imported on use
    from zoo.module import AnomalyModule, Brought, Prediction

STEP = 0.1  # seconds after which a stop is noticed
UNUSABLE = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST}  # no picture can have that name


class Watch:
    """Looks at a folder and scores what is new in it.

    Args:
        model: on its device, in its precision and tiles.
        arrivals: of the folder.
        ledger: of what is done; it takes what is done here.
        batch_size: images that are scored together, where so many have come.
        ignore: masks by the names of images, relative to the folder.
        say: takes one line of text: name, score and verdict of each image, with tabs between them.
    """

    def __init__(
        self,
        model: "AnomalyModule",
        arrivals: Arrivals,
        ledger: Ledger,
        batch_size: int,
        ignore: IgnoreMasks | None,
        say: Callable[[str], None],
    ) -> None:
        self.model, self.arrivals, self.ledger = model, arrivals, ledger
        self.batch_size, self.ignore, self.say = batch_size, ignore, say
        self.scored = 0

    def run(self, interval: float, once: bool, stopped: Callable[[], bool]) -> None:
        """Look every `interval` seconds until `stopped`; or `once`: until what is there now is done.

        Raises:
            ZooError: results can't be written; `once`, and the folder can't be read.
        """
        there: set[str] | None = None  # once: at the first look
        while not stopped():
            ready = self.arrivals.look(once, there)
            waiting = self.arrivals.waiting
            there = set(waiting) if once and there is None else there
            try:
                with writing(self.ledger.out):
                    for start in range(0, len(ready), self.batch_size):
                        if not stopped():
                            self._score(ready[start : start + self.batch_size], stopped)
            finally:
                self.ledger.write_table()
            if once and all(each.is_hopeless() for each in waiting.values()):
                for path in waiting:
                    self.say(f"{shown(self.arrivals.relative(path))} still changes or can't be read: left for later.")
                break
            _pause(min(interval, self.arrivals.settle) if once else interval, stopped)

    def _score(self, paths: list[str], stopped: Callable[[], bool]) -> None:
        """Read settled files and score those that are new; between two images a stop is heeded."""
        files = [file for path in paths if (file := self._read(path))]
        images = [(file, image) for file in files if (image := self._decoded(file))]
        try:
            predictions = self.model.predict_brought([image for _, image in images], self.batch_size)
        except (ZooError, MemoryError, RuntimeError) as error:  # of one of them, such as one that is too large
            if len(images) == 1:
                self._note(images[0][0], _broken(str(error).partition("\n")[0] or "memory is full"))
            else:
                for file, _ in images:
                    self._score([file.path], stopped)
            return
        for (file, image), prediction in zip(images, predictions, strict=True):
            if stopped():
                break
            self._note(file, self._row(file, image, prediction))
            self._tell_misfit(file, image, prediction)

    def _read(self, path: str) -> File | None:
        """A file whose bytes are new under its name."""
        file = self.arrivals.read(path)
        if file is None or not self.ledger.has(path, file.sha256):
            return file
        self.ledger.touched(path, file.stamp)
        self.arrivals.done(path)
        return None

    def _decoded(self, file: File) -> "Brought | None":
        """The image of a file. One that can't be decoded may be half-written; after some tries it is broken."""
        name = self.arrivals.relative(file.path)
        try:
            ignored = self.ignore.of(name) if self.ignore else None
            if self.ignore and ignored is None:  # of later ones nothing is said
                self.arrivals.tell("ignore", f"{shown(name)} has no ignore mask and is looked at as a whole.")
            return self.model.bring({"path": file.path, "bytes": file.data}, ignored)
        except ZooError as error:
            if self.arrivals.waiting[file.path].tried() >= TRIES:
                self._note(file, _broken(str(error)))
            return None

    def _row(self, file: File, image: "Brought", prediction: "Prediction") -> dict[str, Any]:
        name = self.ledger.free_name(self.arrivals.relative(file.path))
        try:
            return row_of(name, Path(file.path), image, prediction, self.model, self.ledger.out)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            return _broken(f"no picture can have its name, {error.strerror}; rename it")

    def _note(self, file: File, row: dict[str, Any]) -> None:
        known = self.model.thresholds()
        row |= {"image": file.path, **file.stamp._asdict(), "sha256": file.sha256}
        row |= {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        row |= {"threshold": None if known is None else known.image_threshold}
        self.ledger.append(row)
        self.arrivals.done(file.path)
        self.scored += row["score"] is not None
        score = "-" if row["score"] is None else f"{row['score']:.6g}"
        self.say(f"{shown(self.arrivals.relative(file.path))}\t{score}\t{shown(row['verdict'])}")

    def _tell_misfit(self, file: File, image: "Brought", prediction: "Prediction") -> None:
        """Of the first image of a size, or of intensities, that the model doesn't know."""
        known, view, name = self.model.thresholds(), self.model.view, shown(file.path)
        if known is not None and known.calibrated and prediction.is_anomalous is None:
            self.arrivals.tell("size", *Found(other_size=[name]).lines(self.model))
        if view.low is not None and view.off_scale(image.image) > OFF_SCALE:
            self.arrivals.tell("scale", *Found(off_scale=[name]).lines(self.model))


def _broken(reason: str) -> dict[str, Any]:
    """The row of an image without a score."""
    return dict.fromkeys((*COLUMNS, "pixel_nm", "regions", "size", "looked_at", "peak")) | {
        "verdict": f"broken ({reason.rstrip('.')})"
    }


def _pause(seconds: float, stopped: Callable[[], bool]) -> None:
    end = time.monotonic() + seconds
    while not stopped() and (left := end - time.monotonic()) > 0:
        time.sleep(min(STEP, left))
