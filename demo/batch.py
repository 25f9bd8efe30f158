"""Many images at once: all scored, the most suspicious first, as a gallery, a table and files to take away.

The names of the files are those of strangers. They are shown as they are, but for what can't be seen; pictures get
names that any file system takes, and no path of the server is in anything that is written.
"""

import re
import shutil
import unicodedata
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from zoo import checkpoint
from zoo.arrivals import shown
from zoo.demo.uploads import check
from zoo.errors import ZooError
from zoo.image import read_image
from zoo.inference import OFF_SCALE, Found, caveats, csv_of, json_of
from zoo.inspection import by_suspicion, write_report

if TYPE_CHECKING:
    from zoo.demo.engine import Engine
    from zoo.module import Brought

MOST = 200  # files of a batch
TOTAL = 2**29  # pixels of a batch: its heatmaps take a byte or two of the disk for each, and so does the archive
CHUNK = 4  # images scored before others get their turn
PIXELS = 2**23  # of them together: a larger image goes alone
SIDE = 360  # pixels of a thumbnail, at most
TOO_MUCH = "it takes more than this server can give; try a smaller image"
SCORED, LISTED, REPORTED = 0.85, 0.87, 0.97  # share of the work that is done then


@dataclass(frozen=True)
class Result:
    """What was found in a batch.

    Attributes:
        rows: as predictions.json holds them (`zoo.inference.row_of`), the most suspicious first: by p-value, then by
            falling score. `image` is the visitor's own name of a file.
        broken: (name, reason) of what could not be judged; a reason is a sentence without its full stop.
        thumbnails: (JPEG file, caption) in the order of the rows: the heatmap over the image. Captions are plain text.
        files: `csv`, `json`, `html` and `zip`, which holds the others with all heatmaps and masks.
        lines: sentences for the head of the page, plain text.
    """

    rows: list[dict[str, Any]]
    broken: list[tuple[str, str]]
    thumbnails: list[tuple[Path, str]]
    files: dict[str, Path]
    lines: list[str]


def inspect_batch(
    engine: "Engine", name: str, files: Sequence[str | Path], out: Path
) -> Iterator[tuple[float, str] | Result]:
    """Score uploaded files and write their lists, report and pictures.

    Files of one name are told apart by a number; the folder that they come from, which tells others apart in `zoo
    predict`, is the server's here. What can't be read or scored is listed with the reason and stops nothing else.

    Args:
        engine: has the model.
        name: of the model.
        files: of any names, at most `MOST`; they must stay until the end.
        out: folder of the results and of nothing else. It is removed where the work fails, or the generator is closed
            before it is done.

    Yields:
        How much is done, a share of 1, and that in words; at last the result.

    Raises:
        ZooError: no file or too many, a model that can't be loaded, a disk that refuses.
    """
    if not files:
        raise ZooError("There is nothing to inspect yet; choose some PNG, TIFF, JPEG or BMP files.")
    if len(files) > MOST:
        raise ZooError(f"{len(files):,} files are too many at once; choose up to {MOST}.")
    try:
        yield 0.0, f"Reading {_images(len(files))}"
        batch = _Batch(engine, name, _named(files), Path(out))
        yield from batch.score_all()
        yield from batch.write()
        result = batch.result()
    except BaseException:  # a generator that is closed gets GeneratorExit
        shutil.rmtree(out, ignore_errors=True)
        raise
    yield result


class _Batch:
    """A batch at work; it holds rows, and no map or image for longer than a chunk takes."""

    def __init__(self, engine: "Engine", name: str, files: dict[str, Path], out: Path):
        self.engine, self.name, self.files, self.out = engine, name, files, out
        self.model = engine.model(name)
        self.found = Found()
        self.thumbnails: dict[str, Path] = {}  # by name of the image
        self.pictures: set[str] = set()  # names of heatmaps, folded
        self.written = {"csv": out / "predictions.csv", "json": out / "predictions.json"}
        self.written |= {"html": out / "report.html", "zip": out / "inspection.zip"}

    def score_all(self) -> Iterator[tuple[float, str]]:
        waiting: dict[str, Brought] = {}
        total = 0  # pixels
        for number, (file, path) in enumerate(self.files.items(), start=1):
            try:
                height, width = check(path)
                if total + height * width > TOTAL:
                    raise ZooError(f"a batch takes {TOTAL / 1e6:,.0f} megapixels; inspect it in another one")
                total += height * width
                waiting[file] = self.model.bring(path)
            except ZooError as error:
                self._leave_out(file, str(error))
            except (MemoryError, OSError, RuntimeError):
                self._leave_out(file, TOO_MUCH)
            pixels = sum(image.image[0].numel() for image in waiting.values())
            if number % CHUNK == 0 or pixels >= PIXELS or number == len(self.files):
                if waiting:
                    self._score(waiting)
                waiting = {}
                yield SCORED * number / len(self.files), f"Inspected {number} of {_images(len(self.files))}"

    def _score(self, images: "dict[str, Brought]") -> None:
        try:
            predictions = self.engine.predict(self.name, list(images.values()))
        except (ZooError, MemoryError, RuntimeError) as error:  # of one of them, such as one that is too large
            if len(images) > 1:
                for file, image in images.items():
                    self._score({file: image})
                return
            (file,) = images
            return self._leave_out(file, str(error) if isinstance(error, ZooError) else TOO_MUCH)
        for (file, image), prediction in zip(images.items(), predictions, strict=True):
            picture = _free(_plain(file), "", lambda name: name.casefold() in self.pictures)
            try:
                with _writing():
                    self.found.add(picture, Path(file), image, prediction, self.model, self.out)
                    self.thumbnails[file] = self._thumbnail(picture)
            except MemoryError:
                self.found.rows.pop(picture, None)
                self._leave_out(file, TOO_MUCH)
            self.pictures.add(picture.casefold())  # names that differ by case alone are one to some file systems

    def _thumbnail(self, picture: str) -> Path:
        """The heatmap over the image, small."""
        image = Image.fromarray(read_image(self.out / self.found.rows[picture]["heatmap"]))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        path = self.out / "thumbnails" / f"{picture}.jpg"
        path.parent.mkdir(exist_ok=True)
        image.save(path, "jpeg", quality=88)
        return path

    def _leave_out(self, file: str, reason: str) -> None:
        """An error calls a file by its path, or by its name as it was."""
        path = self.files[file]
        reason = reason.replace(str(path), file)
        if reason.startswith(path.name):
            reason = file + reason.removeprefix(path.name)
        reason = shown(reason.partition("\n")[0]).rstrip(".")
        self.found.broken.append((file, reason if file in reason else f"{file}: {reason}"))

    def rows(self) -> list[dict[str, Any]]:
        return sorted(self.found.rows.values(), key=by_suspicion)

    def write(self) -> Iterator[tuple[float, str]]:
        rows, broken = self.rows(), self.found.broken
        with _writing():
            listed = [row | {"image": harmless(row["image"])} for row in rows]
            checkpoint.write_text(self.written["csv"], csv_of(listed))
            checkpoint.write_text(self.written["json"], json_of(rows, broken, self.model))
        yield LISTED, "Writing the report"
        # Without evidence: its forward passes are not shared, and names of training images may be paths.
        how = {"notes": self._notes(), "broken": broken, "with_evidence": False, "sources": self.files}
        with _writing():
            write_report(self.written["html"], rows, self.model, self.name, **how)
        yield REPORTED, "Packing the results"
        with _writing():
            self._pack(rows)

    def _pack(self, rows: list[dict[str, Any]]) -> None:
        temporary = self.out / ".inspection.part"
        with zipfile.ZipFile(temporary, "w") as archive:
            for kind in ("csv", "json", "html"):
                archive.write(self.written[kind], self.written[kind].name, zipfile.ZIP_DEFLATED)
            for picture in (row[key] for row in rows for key in ("heatmap", "mask") if row[key]):
                archive.write(self.out / picture, picture)  # a PNG is packed already
        temporary.replace(self.written["zip"])

    def result(self) -> Result:
        rows = self.rows()
        thumbnails = [(self.thumbnails[row["image"]], _caption(row)) for row in rows]
        broken = (f"Left out: {reason}." for _, reason in self.found.broken)
        lines = [*self._head(rows), *self._notes(), *broken]
        return Result(rows, self.found.broken, thumbnails, self.written, lines)

    # ---- in words ----------------------------------------------------------------------------------------------------

    def _head(self, rows: list[dict[str, Any]]) -> Iterator[str]:
        """How many are called anomalous, and how many would be without a defect."""
        if not rows:
            yield "No image could be inspected."
            return
        known, total = self.model.thresholds(), len(rows)
        called = sum(row["verdict"].startswith("anomalous") for row in rows)
        counts = "" if known is None else f", {called} called anomalous"
        if more := sum(bool(row["num_regions"]) and not row["is_anomalous"] for row in rows):
            counts += f", {more} more with regions that stand out"
        yield f"{_images(total)} inspected{counts}."
        if stated := sum(row["is_anomalous"] is not None for row in rows):
            many = "the image" if stated == 1 else f"all {stated} images judged by it"
            yield (
                f"False alarms to expect: if {many} were normal, at most about {known.false_alarm_rate * stated:.2g} "
                f"({known.promise()})."
            )

    def _notes(self) -> list[str]:
        """What is to be known of the verdicts, beside their rate."""
        notes, found = list(caveats(self.model, None)), self.found
        if found.other_size:
            sizes = ", ".join(f"{width} × {height}" for height, width in self.model.calibration.sizes)
            notes.append(
                f"Of another size than the {sizes} pixels that the rate was stated for: {_some(found.other_size)}. No "
                "rate holds there, so that the verdict is marked uncalibrated and comes after the others."
            )
        if found.off_scale:
            notes.append(
                f"More than {100 * OFF_SCALE:g} % of the pixels lie beyond the model's black and white: "
                f"{_some(found.off_scale)}. Scores mean little of images that were taken in another way than the "
                "training images."
            )
        return notes


def harmless(name: str) -> str:
    """A file's name for a CSV file, which a spreadsheet doesn't take for a formula: an apostrophe goes before it.

    As OWASP advises ("CSV Injection"): of =, +, - and @, wide ones too, where a cell begins; that is also behind what
    separates cells in some countries. Line breaks and tabs are none in names that are `shown`.
    """
    return re.sub(r"(^|[;,|])(\s*)(?=[=+@＝＋－＠-])", r"\1\2'", name)


@contextmanager
def _writing() -> Iterator[None]:
    """A disk that refuses, without the path that it refuses."""
    try:
        yield
    except (OSError, ZooError) as error:
        raise ZooError("The results could not be written on the server; try again later, or fewer images.") from error


def _named(files: Sequence[str | Path]) -> dict[str, Path]:
    """Files by names that are unique and can be shown."""
    named: dict[str, Path] = {}
    for path in map(Path, files):
        name = Path(shown("".join(" " if each.isspace() else each for each in path.name)))
        named[_free(name.stem, name.suffix, named.__contains__)] = path
    return named


def _free(stem: str, suffix: str, is_taken: Callable[[str], bool]) -> str:
    """The name, with a number where it is taken."""
    name = stem + suffix
    for number in count(2):
        if not is_taken(name):
            return name
        name = f"{stem} ({number}){suffix}"


def _plain(name: str) -> str:
    """What of a file's name any file system takes, before its suffix: short, and neither hidden nor a path."""
    stem = unicodedata.normalize("NFC", Path(name).stem)
    return re.sub(r"[^\w ().-]+", "_", stem)[:50].strip(" .") or "image"


def _caption(row: dict[str, Any]) -> str:
    words = [row["verdict"]]
    if row["p_value"] is not None:
        words = [row["verdict"].partition(" (")[0], f"p = {row['p_value']:.2g}"]
    if row["num_regions"]:
        words.append(f"{row['num_regions']} region{'s' * (row['num_regions'] != 1)}")
    return f"{row['image']}: {', '.join(words)}"


def _images(number: int) -> str:
    return f"{number} image{'s' * (number != 1)}"


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} images, such as {names[0]}"
