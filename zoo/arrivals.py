"""The image files of a folder that have arrived whole and are not known yet.

The folder is listed again and again, which works on network shares too. A file is read when it has kept its size and
time for a while, by this machine's own clock, so that neither a wrong clock nor a time in the future matters.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from zoo.data.ignore import FOLDER as IGNORED
from zoo.errors import ZooError
from zoo.image import EXTENSIONS
from zoo.inference import MASK_FOLDERS, SPLITS
from zoo.ledger import LINES, Stamp

TRIES = 10  # of a file that keeps its size and time, before nothing more is hoped for
BLANK = 4096  # zero bytes at the end of a file that are waited for longer, or 1/32 of it, if that is more
RESULTS = (LINES, "predictions.json")  # what marks a folder of them


class File(NamedTuple):
    """A file that was read whole."""

    path: str
    stamp: Stamp
    sha256: str
    data: bytes


@dataclass
class Waiting:
    """A file that is not done: as it was last seen, since when (monotonic seconds), and how it was tried so far."""

    stamp: Stamp
    since: float
    tries: int = 0  # to take it as it is now
    changes: int = 0

    def tried(self) -> int:
        """Note that it couldn't be taken; it is due again after the time in which a file settles."""
        self.tries, self.since = self.tries + 1, time.monotonic()
        return self.tries

    def is_hopeless(self) -> bool:
        """Whether a run that is to end leaves it for the next one."""
        return max(self.tries, self.changes) >= TRIES


class Arrivals:
    """What comes into a folder.

    Args:
        folder: absolute; see `images_below` for what counts.
        settle: seconds for which a file keeps its size and time before it is read.
        knows: whether a file of that path and stamp is done.
        say: takes one line of text.

    Attributes:
        waiting: files that are not done, by path.
    """

    def __init__(
        self, folder: Path, settle: float, knows: Callable[[str, Stamp], bool], say: Callable[[str], None]
    ) -> None:
        self.folder, self.settle, self.knows, self.say = folder, settle, knows, say
        self.waiting: dict[str, Waiting] = {}
        self._told: set[str] = set()

    def look(self, once: bool = False, among: set[str] | None = None) -> list[str]:
        """List the folder; returns the files that have settled and are not known, the oldest first.

        Args:
            once: there is no later look that a folder which can't be read could wait for.
            among: paths that count; None: all.

        Raises:
            ZooError: `once`, and the folder can't be read.
        """
        waiting: dict[str, Waiting] = {}
        try:
            for path, stamp in images_below(self.folder, self._tell_unreadable):
                if not self.knows(path, stamp) and (among is None or path in among):
                    waiting[path] = self._seen(path, stamp)
        except OSError as error:
            if once:
                raise ZooError(f"{self.folder} can't be read ({error.strerror}); see that it is there.") from error
            self.tell("folder", f"{shown(self.folder)} can't be read now ({error.strerror}); waiting for it.")
            return []
        if "folder" in self._told:
            self._told.remove("folder")
            self.say(f"{shown(self.folder)} is there again.")
        self.waiting = waiting
        now = time.monotonic()
        ready = [path for path, each in waiting.items() if now - each.since >= self.settle]
        return sorted(ready, key=lambda path: (waiting[path].stamp.mtime_ns, path))

    def read(self, path: str) -> File | None:
        """A file of the last look; None where it has vanished, changes still, or can't be read now."""
        waiting = self.waiting[path]
        try:
            with open(path, "rb") as file:  # a share tells the true size of a file that is opened
                before = Stamp.of(os.fstat(file.fileno()))
                data = file.read()
                after = Stamp.of(os.fstat(file.fileno()))
        except FileNotFoundError:
            self.done(path)
            return None
        except OSError as error:
            waiting.tried()
            self.tell(path, f"{shown(self.relative(path))} can't be read ({error.strerror}); that is tried again.")
            return None
        if not waiting.stamp == before == after or len(data) != after.num_bytes:
            self._seen(path, after)
            return None
        if data.endswith(bytes(max(BLANK, len(data) // 32))) and waiting.tried() < TRIES:
            return (
                None  # a copy that lays out the whole file first, as those of Windows do, looks like this for a while
            )
        return File(path, after, hashlib.sha256(data).hexdigest(), data)

    def done(self, path: str) -> None:
        """Nothing more is to be done about a file as it was last seen."""
        del self.waiting[path]

    def relative(self, path: str) -> str:
        return Path(path).relative_to(self.folder).as_posix()

    def tell(self, key: str, line: str) -> None:
        """Say a line, once a key."""
        if key not in self._told:
            self._told.add(key)
            self.say(line)

    def _seen(self, path: str, stamp: Stamp) -> Waiting:
        """What is known of a file that waits, begun anew where it has changed."""
        known = self.waiting.get(path)
        if known is None or known.stamp != stamp:
            known = Waiting(stamp, time.monotonic(), changes=0 if known is None else known.changes + 1)
            self.waiting[path] = known
        return known

    def _tell_unreadable(self, place: str, error: OSError) -> None:
        self.tell(place, f"{shown(place)} can't be read ({error.strerror}); what is in it is left out until it can.")


def images_below(folder: Path, unreadable: Callable[[str, OSError], None]) -> Iterator[tuple[str, Stamp]]:
    """Path and stamp of each image file below a folder, by the rules of `zoo.inference.find_images`.

    Left out are hidden and temporary names (`.x`, `~x`), mask folders, and folders that hold results, of this watch or
    of another one.

    Args:
        unreadable: told of a folder below that can't be read.

    Raises:
        OSError: the folder itself can't be read.
    """
    is_set = any((folder / name).is_dir() for name in SPLITS)
    top, masks = str(folder), {IGNORED, *(MASK_FOLDERS if is_set else ())}
    places = [top]
    while places:
        place = places.pop()
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    if entry.name.startswith((".", "~")):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        if not (place == top and entry.name in masks) and not _holds_results(entry.path):
                            places.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                        with contextlib.suppress(FileNotFoundError):
                            yield entry.path, Stamp.of(entry.stat())
        except OSError as error:
            if place == top:
                raise
            if not isinstance(error, FileNotFoundError):
                unreadable(place, error)


def _holds_results(place: str) -> bool:
    return any(os.path.exists(os.path.join(place, name)) for name in RESULTS)


def shown(name: object) -> str:
    """A name of a file as it may stand in a line: no line break, no tab, nothing that a terminal obeys."""
    text = str(name)
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
