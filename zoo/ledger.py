"""What a watch has done: one JSON line an image, appended whole, and the same lines as a CSV file.

The ledger alone decides what is done. A line is on the disk after the image's pictures are; what a kill or a power loss
leaves of a line is cut off at the next start, and that image is done again. A file is known by its path, size and time
of change and, where one of the latter differs, by the SHA-256 of its bytes, so that a file that was only touched or
copied over itself is not scored again.
"""

import contextlib
import csv
import json
import os
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from zoo.errors import ZooError
from zoo.inference import COLUMNS

REMEDY = "remove that line, or name another folder by --out."
LINES, TIMES, TABLE = "predictions.jsonl", ".times.jsonl", "predictions.csv"


class Stamp(NamedTuple):
    """By what a file is known without being read: bytes, and nanoseconds of its last change."""

    num_bytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "Stamp":
        return cls(stat.st_size, stat.st_mtime_ns)


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Within it a disk that refuses is a ZooError."""
    try:
        yield
    except BrokenPipeError:  # of who reads what is said
        raise
    except OSError as error:
        raise ZooError(
            f"{out} can't be written ({error.strerror}); see to that or name another --out, and start again: what is "
            "done is kept."
        ) from error


class Ledger:
    """The lines of a folder, of one model.

    Args:
        out: the folder, which exists.
        settings: what makes scores comparable (weights, precision, tile), plain JSON values; each line has them.
        say: takes one line of text.

    Raises:
        ZooError: lines of other settings or of no ledger; lists of `zoo predict`, which it would mix with.
    """

    def __init__(self, out: Path, settings: dict[str, Any], say: Callable[[str], None]):
        self.out, self.settings, self.say = out, settings, say
        self.known: dict[str, tuple[Stamp, bytes]] = {}  # by path: as it was last seen, and digest
        self.names: set[str] = set()  # of pictures
        self._in_table: int | None = None  # bytes of the lines that the table has; None: it is to be written anew
        self._table_failed = False
        if not (out / LINES).exists() and (out / "predictions.json").exists():
            raise ZooError(f"{out} holds the results of zoo predict; name another folder by --out.")
        for row in self._read(LINES):
            if {key: row.get(key) for key in settings} != settings:
                raise ZooError(
                    f"{out} holds scores of another model, precision or tile, which these would mix with; name another "
                    "folder by --out."
                )
            self._take(row)
        (out / LINES).touch()  # by it others know what this folder holds
        for row in self._read(TIMES):
            if row["image"] in self.known and self.has(row["image"], row["sha256"]):
                self._take(row)

    def knows(self, path: str, stamp: Stamp) -> bool:
        """Whether a file is done, as far as it can be told without reading it."""
        return path in self.known and self.known[path][0] == stamp

    def has(self, path: str, sha256: str) -> bool:
        """Whether these bytes of a file are done."""
        return path in self.known and self.known[path][1] == bytes.fromhex(sha256)

    def free_name(self, relative: str) -> str:
        """The name of an image's pictures: that of its file, as `zoo predict` has it, unless an earlier line has it."""
        later = (f"{relative}-{number}" for number in count(2))
        return next(name for name in chain((relative.rpartition(".")[0], relative), later) if name not in self.names)

    def append(self, row: dict[str, Any]) -> None:
        """Note an image: `row` has `image`, `num_bytes`, `mtime_ns`, `sha256` and the keys of `COLUMNS`.

        Raises:
            OSError: the disk refuses; nothing is noted then.
        """
        for key in ("heatmap", "mask"):
            if row[key] is not None:
                _sync(self.out / row[key])
                _sync_folder((self.out / row[key]).parent)
        _append(self.out / LINES, row | self.settings)
        self._take(row)

    def touched(self, path: str, stamp: Stamp) -> None:
        """Note that the bytes of a file that is done have another time, so that they needn't be read again."""
        row = {"image": path, **stamp._asdict(), "sha256": self.known[path][1].hex()}
        _append(self.out / TIMES, row)
        self._take(row)

    def write_table(self) -> None:
        """Bring predictions.csv up to the lines. Where it is held by another program, that is done later."""
        table, part = self.out / TABLE, self.out / f".{TABLE}.part"
        how = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
        try:
            if self._in_table is not None and table.exists():
                with open(table, "a", **how) as file:
                    self._in_table = self._tabulate(file, self._in_table)
            else:
                with open(part, "w", **how) as file:
                    csv.writer(file, lineterminator="\n").writerow(COLUMNS)
                    end = self._tabulate(file, 0)
                part.replace(table)
                self._in_table = end
            self._table_failed = False
        except OSError as error:
            self._in_table = None
            if not self._table_failed:
                self.say(f"{table} can't be written now ({error.strerror}); that is tried again. {LINES} is complete.")
            self._table_failed = True

    def _tabulate(self, file: TextIO, start: int) -> int:
        """Write the lines from a byte on as rows; returns where they end."""
        writer = csv.writer(file, lineterminator="\n")
        with open(self.out / LINES, "rb") as source:
            source.seek(start)
            for line in source:
                row = json.loads(line)
                writer.writerow(["" if row[key] is None else row[key] for key in COLUMNS])
            return source.tell()

    def _take(self, row: dict[str, Any]) -> None:
        self.known[row["image"]] = Stamp(row["num_bytes"], row["mtime_ns"]), bytes.fromhex(row["sha256"])
        if row.get("heatmap") is not None:
            self.names.add(row["heatmap"].removeprefix("heatmaps/").removesuffix(".png"))

    def _read(self, name: str) -> Iterator[dict[str, Any]]:
        """The rows of a file; what a write that was cut short has left at its end is cut off."""
        path, end, torn = self.out / name, 0, False
        if not path.exists():
            return
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if torn:
                    raise ZooError(f"{path} is damaged in line {number - 1}; {REMEDY}")
                torn = not line.endswith(b"\n") or b"\0" in line  # zeros: what a power loss leaves of a block
                if not torn:
                    end += len(line)
                    yield _row_of(line, f"{path} is damaged in line {number}")
        if torn:
            os.truncate(path, end)
            if name == LINES:
                self.say(f"The last line of {path} was cut short by a stop; it is dropped, and its image done again.")


def _row_of(line: bytes, otherwise: str) -> dict[str, Any]:
    """The row of a line; ZooError for a line of somebody else."""
    try:
        row = json.loads(line)
        is_ours = isinstance(row["image"], str) and bytes.fromhex(row["sha256"])
        is_ours = is_ours and all(type(row[key]) is int for key in Stamp._fields)
        if not is_ours or ("verdict" in row and not row.keys() >= set(COLUMNS)):
            raise ValueError("no row of a watch")
        return row
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ZooError(f"{otherwise}; {REMEDY}") from error


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a line, whole and on the disk, or nothing."""
    rest = memoryview((json.dumps(row, allow_nan=False) + "\n").encode())
    is_new = not path.exists()
    with open(path, "ab", buffering=0) as file:
        end = file.tell()
        try:
            while rest:
                rest = rest[file.write(rest) :]
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise
    if is_new:
        _sync_folder(path.parent)


def _sync_folder(path: Path) -> None:
    """The names in a folder are on the disk, where that can be asked for; some shares can't."""
    with contextlib.suppress(OSError):
        _sync(path)


def _sync(path: Path) -> None:
    """The bytes of a file are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
