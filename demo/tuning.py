"""Fine-tuning by a visitor: normal images and a model of the page in, a private model in the local registry out.

The work is done by a process of its own (`zoo.demo.tuning_job`), so that neither a cancel, a crash nor a lack of memory
touches the server. It works in a hidden folder of the registry, from which the finished model is moved to its name in
one step; that folder, with the copies of the images, is removed whatever happens.
"""

import json
import logging
import math
import os
import queue
import re
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zoo import checkpoint, hub
from zoo.calibration import supported_rate
from zoo.errors import ZooError
from zoo.image import EXTENSIONS
from zoo.reasons import publishable

LEAST, MOST = 10, 100  # different images of a job
FILES = 200  # of a job, copies of the same image among them
TICK = 0.5  # seconds between two looks at a job
PATIENCE = 60.0  # seconds without a look, after which whoever started a job is taken to be gone
USUAL = {"checking": 6.0, "learning": 10.0, "calibrating": 5.0}  # seconds, where nothing better is known
BANDS = {"waiting": (0.0, 0.0), "checking": (0.0, 0.15), "learning": (0.15, 0.85), "calibrating": (0.85, 0.99)}
EXPLAINED = (
    "Half of the images are learned from. The other half has no say in what is learned and sets the threshold, with "
    "the lowest false-alarm rate that so many images can promise; methods that learn in steps choose the best one by a "
    "quarter of the first half. The uploads are deleted when the job ends; the model keeps no picture of them."
)
STEP = re.compile(r"Step (\d+) of (\d+): .*?([\d.e+-]+) steps/s")

_turn = threading.Semaphore(1)  # one job at a time: the memory is that of one more model
_taken: set[Path] = set()  # places of models under way
_look = threading.Lock()  # at them
_log = logging.getLogger(__name__)


class Cancelled(ZooError):
    """A job that was cancelled; nothing of it is left."""


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        stage: "waiting" (for another visitor's job), "checking", "learning", "calibrating" or "done".
        share: of the whole way, in [0, 1]; it never falls.
        line: the same in words, with the time that is left where it is known.
    """

    stage: str
    share: float
    line: str


@dataclass(frozen=True)
class Summary:
    """What became of a job.

    Attributes:
        name, base, method: of the new model, the one that it went on from, and both.
        learned: images that the weights are of.
        chosen: further ones, by which the best step was chosen.
        apart: those that set the threshold.
        unchanged: no step was better than the model as it was.
        rate: false-alarm rate of the threshold, in (0, 1).
        promise: the rate in words.
    """

    name: str
    base: str
    method: str
    learned: int
    chosen: int
    apart: int
    unchanged: bool
    rate: float
    promise: str

    def in_words(self) -> str:
        best = f", {self.chosen} chose the best step" if self.chosen else ""
        text = (
            f"{self.name} is ready. {self.method.replace('_', '-')} went on from {self.base} with {self.learned} images"
            f"{best}, and {self.apart} others set the threshold. False alarms: {self.promise}."
        )
        if self.unchanged:
            text += f" No step was better than {self.base} as it was, so that only the threshold is new."
        return f"{text} The uploads are deleted."


def split(count: int) -> tuple[int, int]:
    """How many of so many different images are learned from, and how many are set apart for the threshold."""
    return count // 2, count - count // 2


def offer(count: int) -> str:
    """What so many images give, in a sentence for the page."""
    learned, apart = split(count)
    rate = f"{100 * supported_rate(apart):.3g}"
    return f"Of {count} images, {learned} are learned from and {apart} can promise a false-alarm rate of {rate} %."


class Tuning:
    """One job.

    Args:
        files: images of any form that `zoo.image.read_image` takes, named as the visitor named them.
        base: name of the model to go on from, which stays as it is.
        name: of the new model; a model that exists is never replaced.
        device: as for the commands.
        bases: names that may be gone on from; None: those of the local registry.
        max_steps: of methods that learn in steps; None: as usual.

    Attributes:
        summary: once the job is done.
        pid: of the process that works, once there is one.
    """

    def __init__(
        self,
        files: Sequence[Path],
        base: str,
        name: str,
        device: str = "auto",
        *,
        bases: Collection[str] | None = None,
        max_steps: int | None = None,
    ):
        self.files, self.base, self.name, self.device = [Path(file) for file in files], base, name, str(device)
        self.bases, self.max_steps = bases, max_steps
        self.summary: Summary | None = None
        self._cancelled, self._over, self._hold = threading.Event(), threading.Event(), threading.RLock()
        self._looked = time.monotonic()
        self._child: subprocess.Popen | None = None
        self._lock: FileLock | None = None
        self._reserved: Path | None = None
        self._has_turn = False
        self._base = ""
        self._names: dict[str, str] = {}  # of the copies, and what their visitor calls them
        self._work: Path | None = None

    @property
    def pid(self) -> int | None:
        return self._child and self._child.pid

    def cancel(self) -> None:
        """End the job, from any thread: `run` raises `Cancelled`. A job that is done stays done."""
        with self._hold:
            if self.summary is None:
                self._cancelled.set()
                self._close()

    def run(self) -> Iterator[Progress]:
        """Do the job; what it has come to, at least each second, the last time with the `summary`.

        Closing the iterator ends the job, and so does leaving it alone for a minute.

        Raises:
            ZooError: whatever hinders it, in a sentence without a place of this machine.
            Cancelled: by `cancel`.
        """
        try:
            place, base = self._begin()
            threading.Thread(target=self._watch, name="fine-tuning watch", daemon=True).start()
            meter = Meter(len(self.files))
            yield from self._wait(meter)
            meter.enter("checking", f"Starting, and checking {len(self.files)} images")
            yield meter.progress()
            self._bring(base)
            yield from self._follow(meter)
            self._keep(place, meter.done)
        except Exception as error:
            if self._cancelled.is_set():
                raise Cancelled("The fine-tuning was cancelled; nothing of it is left.") from None
            if isinstance(error, ZooError):
                raise
            _log.exception("A fine-tuning failed.")
            raise ZooError("The fine-tuning failed for a reason of the server's; try again later.") from None
        finally:
            self._close()
        yield Progress("done", 1.0, self.summary.in_words())

    # ---- one after the other -----------------------------------------------------------------------------------------

    def _begin(self) -> tuple[Path, Path]:
        """The places of the new model, which is reserved, and of the one that it goes on from."""
        self._check()
        count, name = len(self.files), self.name.strip()
        if count < LEAST:
            raise ZooError(f"Fine-tuning takes at least {LEAST} normal images, and there are {count}; add some.")
        if count > FILES:
            raise ZooError(f"Fine-tuning takes at most {MOST} normal images, and there are {count}; leave some out.")
        try:
            place = Path(os.path.abspath(hub.model_place(name)))
        except ZooError:
            raise ZooError(
                "The name of a model has up to 96 letters, digits, '.', '_' and '-', and the first one is a letter or "
                "digit; give the new one such a name."
            ) from None
        bases = hub.list_models() if self.bases is None else self.bases
        if self.base not in bases:
            raise ZooError("The model to go on from is none of those that are here; choose one of them.")
        try:
            base = Path(os.path.abspath(hub.find_model(self.base)))
            self._base = hub.name_of(base)  # what was given may be a folder
            checkpoint.check_place(place)  # an empty folder, or nothing, where it can be written
        except ZooError as error:
            if os.path.lexists(place):
                raise _name_taken(place) from None
            raise ZooError(self._told(str(error))) from None
        with _look:
            if place in _taken or os.path.lexists(place):
                raise _name_taken(place)
            _taken.add(place)
            self._reserved = place
        return place, base

    def _wait(self, meter: "Meter") -> Iterator[Progress]:
        """Until no other job is under way."""
        meter.enter("waiting", "Waiting for another fine-tuning to end")
        while True:
            with self._hold:
                self._check()
                self._has_turn = _turn.acquire(blocking=False)
            if self._has_turn:
                return
            yield meter.progress()
            time.sleep(TICK)

    def _bring(self, base: Path) -> None:
        """Copy the images under plain names, and start the process that works."""
        sweep()
        root = self._reserved.parent / ".tuning"
        root.mkdir(parents=True, exist_ok=True)
        with self._hold:
            self._check()
            self._work = root / secrets.token_hex(8)
            self._lock = FileLock(f"{self._work}.lock", thread_local=False)  # which a server that is killed lets go of
            self._lock.acquire(timeout=0)
            (self._work / "images").mkdir(parents=True)
        for file in self.files:
            self._check()
            copy = _plain(file, self._names)
            self._names[copy] = _shown(file)
            try:
                shutil.copyfile(file, self._work / "images" / copy)
            except OSError:
                self._check()
                raise ZooError(f"{_shown(file)} can't be read any more; upload the images again.") from None
        job = {"base": str(base), "name": self._reserved.name, "device": self.device, "max_steps": self.max_steps}
        job |= {"files": list(self._names), "least": LEAST, "most": MOST}
        (self._work / "job.json").write_text(json.dumps(job), encoding="utf-8")
        with self._hold, open(self._work / "log", "wb") as log:
            self._check()
            self._child = subprocess.Popen(
                [sys.executable, "-m", "zoo.demo.tuning_job", str(self._work)],
                stdin=subprocess.PIPE,  # open until the end: a child that finds it closed knows that its server is gone
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # a group of its own, which is ended as a whole
            )

    def _follow(self, meter: "Meter") -> Iterator[Progress]:
        """Until the process has ended well."""
        lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        threading.Thread(target=_read, args=(self._child, lines), name="fine-tuning", daemon=True).start()
        line: bytes | None = b""
        while line is not None:
            self._check()
            with suppress(queue.Empty):
                line = lines.get(timeout=TICK)
                meter.hear(line or b"{}")
            yield meter.progress()
        code = self._child.wait()
        self._check()
        if meter.error:
            raise ZooError(self._told(meter.error))
        if code or not meter.done:
            log = (self._work / "log").read_text(encoding="utf-8", errors="replace")[-4000:]
            _log.error("A fine-tuning ended with code %s. %s", code, log)
            raise ZooError(_why(code))

    def _keep(self, place: Path, done: dict[str, Any]) -> None:
        """Move the model to its name, unless somebody else has taken it meanwhile."""
        with self._hold:
            self._check()
            try:
                (self._work / "home" / "models" / place.name).rename(place)
            except OSError:
                if place.exists():
                    raise _name_taken(place) from None
                raise
            self.summary = Summary(name=place.name, base=self._base, **done)

    # ---- whatever happens --------------------------------------------------------------------------------------------

    def _check(self) -> None:
        self._looked = time.monotonic()
        if self._cancelled.is_set():
            raise Cancelled("")

    def _watch(self) -> None:
        """Cancel a job that nobody looks at any more."""
        while not self._over.wait(TICK):
            if time.monotonic() - self._looked > PATIENCE:
                self.cancel()

    def _close(self) -> None:
        """Leave nothing behind; it may be called again and again."""
        with self._hold:
            if self._child:
                _end(self._child)
            if self._work:
                shutil.rmtree(self._work, ignore_errors=True)
            if self._lock:
                _let_go(self._lock)
            if self._has_turn:
                _turn.release()
                self._has_turn = False
            with _look:
                _taken.discard(self._reserved)
            self._over.set()

    def _told(self, text: str) -> str:
        """A sentence for the visitor: files by their own names, no place of this machine, no option of the commands."""
        shown = {name: name for name in (self._base, self.name) if name} | self._names
        marks = {copy: f"\0{i}\0" for i, copy in enumerate(shown)}
        each = "|".join(re.escape(copy) for copy in sorted(marks, key=len, reverse=True))
        places = rf"(?:{re.escape(str(self._work))}/)?/?(?:[\w.-]+/)*"
        text = re.sub(rf"{places}(?<![\w.-])({each})(?![\w-])", lambda found: marks[found[1]], text.rstrip("."))
        text = "; ".join(part for part in text.split("; ") if "--" not in part and "zoo " not in part)
        text = publishable(text, [str(self._work)] if self._work else [])
        for copy, mark in marks.items():
            text = text.replace(mark, shown[copy])
        return f"{text or 'The fine-tuning failed; try other images or another model'}."


@dataclass
class Meter:
    """What the process says -> progress, which never falls and moves on between two words of it."""

    files: int
    stage: str = "waiting"
    words: str = ""
    begun: float = 0.0
    share: float = 0.0
    by_steps: bool = False  # of which it says a line each tenth
    steps: tuple[int, int, float, float] | None = None  # done, of, a second, and when that was
    error: str = ""
    done: dict[str, Any] = field(default_factory=dict)

    def enter(self, stage: str, words: str) -> None:
        self.stage, self.words, self.begun, self.steps = stage, words, time.monotonic(), None

    def hear(self, line: bytes) -> None:
        """A line of the process: JSON, or what some library says."""
        try:
            said = json.loads(line)
        except ValueError:
            return
        if not isinstance(said, dict):
            return
        if "stage" in said:
            self.enter(said["stage"], said["words"])
            self.by_steps = said.get("by_steps", False)
        if found := STEP.match(said.get("line", "")):
            self.steps = int(found[1]), int(found[2]), float(found[3]), time.monotonic()
        self.error, self.done = said.get("error", self.error), said.get("done", self.done)

    def progress(self) -> Progress:
        low, high = BANDS[self.stage]
        now, words = time.monotonic(), self.words
        if self.steps:
            step, of, speed, then = self.steps
            reached = min(step + (now - then) * speed, step + of / 10, of)
            part = reached / of
            left = (of - reached) / speed if speed else math.nan
            words += f": step {step} of {of}" + (f", about {_duration(left)} left" if math.isfinite(left) else "")
        else:
            part = 1 - math.exp((self.begun - now) / USUAL.get(self.stage, 1.0))
            part /= 10 if self.by_steps else 1
            words += f", for {now - self.begun:.0f} s" if now - self.begun >= 1 else ""
        self.share = max(self.share, low + part * (high - low))
        return Progress(self.stage, self.share, f"{words}.")


def sweep() -> None:
    """Remove what servers that were killed have left behind, images of visitors above all."""
    for path in (hub.registry() / ".tuning").glob("*.lock"):
        lock = FileLock(path, thread_local=False)
        with suppress(Timeout, OSError):
            lock.acquire(timeout=0)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            _let_go(lock)


def _let_go(lock: FileLock) -> None:
    if lock.is_locked:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _read(child: subprocess.Popen, lines: "queue.SimpleQueue[bytes | None]") -> None:
    """The lines of a process into a queue, None at their end."""
    with suppress(ValueError, OSError), child.stdout:
        for line in child.stdout:
            lines.put(line)
    lines.put(None)


def _end(child: subprocess.Popen) -> None:
    """End a process with all that it has started: it has nothing worth saving."""
    if child.poll() is None:
        with suppress(OSError):
            os.killpg(child.pid, signal.SIGKILL) if hasattr(os, "killpg") else child.kill()
    child.wait()
    with suppress(OSError):
        child.stdin.close()


def _name_taken(place: Path) -> ZooError:
    return ZooError(f"There is a model {place.name} already; choose another name.")


def _why(code: int) -> str:
    if code in (-signal.SIGTERM, -signal.SIGINT):
        return "The fine-tuning was ended by the server; try again later."
    if code < 0:
        return (
            "The fine-tuning was ended by the machine, most likely for want of memory; try fewer or smaller images, or "
            "another model."
        )
    return "The fine-tuning failed for a reason of the server's; try again later, or another model."


def _plain(file: Path, names: Collection[str]) -> str:
    """A name for the copy of a file: its stem as far as that is plain, and no other copy's."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-.")[:60] or "image"
    suffix = file.suffix.lower() if file.suffix.lower() in EXTENSIONS else ".png"  # it is told by its content
    taken = {name.lower() for name in names}  # some disks know no case
    tried = (f"{stem}{mark}{suffix}" for mark in ("", *(f"-{i}" for i in range(2, FILES + 2))))
    return next(name for name in tried if name.lower() not in taken)


def _shown(file: Path) -> str:
    """The name of a visitor's file in a sentence."""
    name = "".join(character for character in file.name if character.isprintable())
    return name if len(name) <= 80 else f"{name[:60]}...{name[-15:]}"


def _duration(seconds: float) -> str:
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{max(round(seconds), 1)} s"
