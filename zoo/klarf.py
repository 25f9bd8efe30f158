"""Regions as a KLARF 1.2 file, the text in which inspection tools hand their defects on to yield management.

Each image is taken as a die: image i of the lists, from 0, is die (i, 0) of a row of dies. A defect is a region; its
XREL and YREL are the middle of the region's box, in micrometres from the lower left corner of the whole image, y
upwards; XSIZE and YSIZE are the box, DSIZE its longer side, and DEFECTAREA the area of the region itself. DiePitch is
the largest image. The sample is the least circle that the row fits into: where on a wafer they lie, images don't tell.

All defects are in one DefectList, which any reader takes whole. Which file an image is, predictions.csv tells by its
number: the format's pictures are those of a multi-page TIFF, which images of a folder are not.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from zoo.checkpoint import write_text
from zoo.errors import ZooError

COLUMNS = (
    *("DEFECTID", "XREL", "YREL", "XINDEX", "YINDEX", "XSIZE", "YSIZE", "DEFECTAREA", "DSIZE"),
    *("CLASSNUMBER", "TEST", "CLUSTERNUMBER", "ROUGHBINNUMBER", "FINEBINNUMBER"),
)
BEGINNING = "FileVersion"
CLASSES = ("Unclassified", "Anomaly")  # by number; regions are of the last one
UM2_PER_CM2 = 1e8


@dataclass(frozen=True)
class Labels:
    """What a file says of the sample, in quotes.

    Raises:
        ZooError: a text that can't stand in quotes there.
    """

    lot: str = "unknown"
    wafer: str = "unknown"
    device: str = "unknown"
    step: str = "unknown"

    def __post_init__(self) -> None:
        for label in fields(self):
            text = getattr(self, label.name)
            if not text.strip() or not text.isprintable() or '"' in text or ";" in text:
                raise ZooError(
                    f"The {label.name} of a KLARF file is a text without quotes and semicolons, not {text!r}."
                )


def check_place(path: Path) -> None:
    """Raises ZooError for a place where something else lies than an earlier KLARF file."""
    if path.is_dir():
        raise ZooError(f"--klarf {path} is a folder; name a file in it.")
    try:
        with open(path, "rb") as file:
            is_klarf = file.read(len(BEGINNING)) == BEGINNING.encode()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ZooError(f"--klarf {path} can't be written ({error.strerror}); name another file.") from error
    if not is_klarf:
        raise ZooError(f"--klarf {path} is there and is no KLARF file; name another one, and it is kept.")


def check_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Whether all images can be stated in a KLARF file, which has no way to tell that one was not inspected.

    Raises:
        ZooError: no image; some without a pixel size; some without regions, as no rate was stated for their size.
    """
    if not rows:
        raise ZooError("No KLARF file is written, as no image could be read; the lists tell why.")
    if unsized := [row["image"] for row in rows if row["pixel_nm"] is None]:
        raise ZooError(
            f"No KLARF file is written: the size of a pixel is not known of {_some(unsized)}; give --pixel-nm with the "
            "same command (all other results are written)."
        )
    if unjudged := [row["image"] for row in rows if row["regions"] is None]:
        raise ZooError(
            f"No KLARF file is written: there are no regions of {_some(unjudged)} as no rate was stated for images of "
            "that size; leave them out, or calibrate with images of that size (all other results are written)."
        )


def write_klarf(
    path: Path, rows: Sequence[dict[str, Any]], labels: Labels, setup: str, station: tuple[str, str]
) -> None:
    """Write a KLARF 1.2 file.

    Args:
        path: of the file.
        rows: of predictions.json, each with `regions`, `pixel_nm`, `size` and `looked_at`.
        setup: what the images were inspected by: the name of the model.
        station: its method and the start of its weights' SHA-256, as model and number of the inspection station.

    Raises:
        ZooError: as `check_rows`; a place that can't be written.
    """
    check_rows(rows)
    now = datetime.now().strftime("%m-%d-%Y %H:%M:%S")
    lines = [*_head(rows, labels, now, _safe(setup), station), *_defects(rows), *_summary(rows)]
    write_text(path, "\n".join(lines) + "\n")


def _head(
    rows: Sequence[dict[str, Any]], labels: Labels, now: str, setup: str, station: tuple[str, str]
) -> Iterator[str]:
    pitch = [max(row["size"][side] * _um(row) for row in rows) for side in (1, 0)]  # x, y
    row_of_dies = (len(rows) * pitch[0], pitch[1])
    yield f"{BEGINNING} 1 2;"
    yield f"FileTimestamp {now};"
    yield 'InspectionStationID "zoo" "{}" "{}";'.format(*map(_safe, station))
    yield "SampleType WAFER;"
    yield f"ResultTimestamp {now};"
    yield f'LotID "{labels.lot}";'
    yield f"SampleSize 1 {max(1, math.ceil(math.hypot(*row_of_dies) / 1000))};"  # diameter in mm
    yield f'DeviceID "{labels.device}";'
    yield f'SetupID "{setup}" {now};'
    yield f'StepID "{labels.step}";'
    yield "SampleOrientationMarkType NOTCH;"
    yield "OrientationMarkLocation DOWN;"
    yield f"DiePitch {_numbers(*pitch)};"
    yield f"DieOrigin {_numbers(0, 0)};"
    yield f'WaferID "{labels.wafer}";'
    yield "Slot 1;"
    yield f"SampleCenterLocation {_numbers(*(side / 2 for side in row_of_dies))};"
    yield f"ClassLookup {len(CLASSES)}"
    yield from _ended(f' {number} "{name}"' for number, name in enumerate(CLASSES))
    yield "InspectionTest 1;"
    yield f"SampleTestPlan {len(rows)}"
    yield from _ended(f" {die} 0" for die in range(len(rows)))
    yield f"AreaPerTest {_numbers(_area(rows))};"  # um^2, without info bars and what is ignored


def _defects(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    yield f"DefectRecordSpec {len(COLUMNS)} {' '.join(COLUMNS)};"
    found = [(die, row, region) for die, row in enumerate(rows) for region in row["regions"]]
    if found:
        yield "DefectList"
        yield from _ended(_record(number, *defect) for number, defect in enumerate(found, start=1))
    else:
        yield "DefectList;"


def _record(number: int, die: int, row: dict[str, Any], region: dict[str, Any]) -> str:
    """A line with the values of `COLUMNS`."""
    (top, left, bottom, right), um = region["box"], _um(row)
    x, y = (left + right) / 2 * um, (row["size"][0] - (top + bottom) / 2) * um
    width, height = (right - left) * um, (bottom - top) * um
    sizes = _numbers(width, height, region["area"] * um**2, max(width, height))
    return f" {number} {_numbers(x, y)} {die} 0 {sizes} {len(CLASSES) - 1} 1 0 0 0"


def _summary(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    defects, dies = sum(len(row["regions"]) for row in rows), sum(bool(row["regions"]) for row in rows)
    density = defects * UM2_PER_CM2 / _area(rows)  # per cm^2
    yield "SummarySpec 5 TESTNO NDEFECT DEFDENSITY NDIE NDEFDIE;"
    yield "SummaryList"
    yield f" 1 {defects} {_numbers(density)} {len(rows)} {dies};"
    yield "EndOfFile;"


def _area(rows: Sequence[dict[str, Any]]) -> float:
    """What was looked at, in um^2."""
    return sum(row["looked_at"] * _um(row) ** 2 for row in rows)


def _um(row: dict[str, Any]) -> float:
    """Side of a pixel."""
    return row["pixel_nm"] / 1000


def _numbers(*values: float) -> str:
    return " ".join(f"{value:.10e}" for value in values)


def _ended(lines: Iterator[str]) -> Iterator[str]:
    """The lines of a list, the last one with the semicolon that ends it."""
    *most, last = lines
    yield from most
    yield f"{last};"


def _safe(text: str) -> str:
    """Without what ends a text or a line of the format."""
    return re.sub(r'[\x00-\x1f\x7f";]', "_", text)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,} images, such as {names[0]},"
