"""The report of scored images: one HTML page that needs nothing else, to be read, printed and passed on.

It is made from the rows that predictions.json holds and the pictures beside them, image by image: the memory it takes
doesn't grow with their number.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from zoo import checkpoint, evidence, plots
from zoo.errors import ZooError
from zoo.image import read_image, read_mask
from zoo.markup import cropped, outline, picture, region_words
from zoo.module import AnomalyModule, Brought

SHOWN = 100  # images with pictures; the table has all of them
REGIONS = 20  # of an image, outlined and listed
PLACES = 3  # of an image, with evidence


def write_report(
    path: Path,
    rows: Sequence[dict[str, Any]],
    model: AnomalyModule,
    name: str,
    *,
    notes: Sequence[str] = (),
    broken: Sequence[tuple[str, str]] = (),
    ignore_masks: bool = False,
    with_evidence: bool = True,
    sources: Mapping[str, Path] | None = None,
) -> None:
    """Write the report of scored images, which needs no other file.

    Args:
        path: of the page, in the folder of the rows' heatmaps and masks.
        rows: as predictions.json holds them (`zoo.inference.row_of`), in any order; their images are read again.
        model: that has scored them, as it has seen them (`seen_in_tiles`).
        name: what the model is called.
        notes: sentences for its head.
        broken: (path, reason) of images that couldn't be read.
        ignore_masks: whether something was ignored.
        with_evidence: show the nearest normal patches where the method has them; it takes a forward pass an image.
        sources: the file of each image, by what the rows call it; None: that is its path.

    Raises:
        ZooError: the page can't be written.
    """
    rows = sorted(rows, key=by_suspicion)
    training = evidence.TrainingImages(model) if with_evidence and keeps_patches(model) else None
    about = {"head": _head(rows, model, name), "notes": notes, "broken": broken, "rows": map(_line, rows)}
    about |= {"settings": _settings(model, name, ignore_masks), "count": len(rows), "shown": min(len(rows), SHOWN)}
    about |= {"evidence": _about_evidence(model, with_evidence), "scale": _scale(), "name": name}
    about["calibration"] = model.calibration
    files = [row["image"] if sources is None else sources[row["image"]] for row in rows[:SHOWN]]
    shown = enumerate(zip(rows, files, strict=False), start=1)
    about["images"] = (_section(i, row, file, model, path.parent, training) for i, (row, file) in shown)
    _write(path, _template().generate(about))


def keeps_patches(model: AnomalyModule) -> bool:
    """Whether its method can tell the nearest normal patch."""
    return type(model).nearest_normal is not AnomalyModule.nearest_normal


def by_suspicion(row: dict[str, Any]) -> tuple[bool, float, float]:
    """Key by which rows are sorted: the lowest p-value first; ties, and then what has none, by falling score."""
    return row["p_value"] is None, row["p_value"] or 0.0, -row["score"]


# ---- the head --------------------------------------------------------------------------------------------------------


def _head(rows: Sequence[dict[str, Any]], model: AnomalyModule, name: str) -> dict[str, Any]:
    """When, how many, and what is promised of them."""
    known = model.thresholds()
    stated = sum(row["is_anomalous"] is not None for row in rows)
    called = sum(_called(row) for row in rows)
    head = {"when": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"), "images": len(rows), "stated": stated}
    head |= {"called": called if model.calibration else None, "method": model.method.replace("_", "-")}
    head["regions"] = sum(bool(row["num_regions"]) for row in rows) if stated else None
    head["promise"] = known.promise() if stated else None
    head["expected"] = f"{known.false_alarm_rate * stated:.2g}" if stated else None
    head["remedy"] = f"zoo calibrate {name} --data DATA --false-alarm-rate 0.01"
    return head


def _called(row: dict[str, Any]) -> bool:
    return row["verdict"].startswith("anomalous")


def _settings(model: AnomalyModule, name: str, ignore_masks: bool) -> dict[str, str]:
    view, known = model.view, model.thresholds()
    weights = checkpoint.read_config(model.folder)["weights_sha256"] if model.folder else "not saved"
    scale = "full scale" if view.low is None else f"{view.low:.4g} to {view.high:.4g}"
    settings = {"Model": name, "Method": model.method.replace("_", "-"), "Weights, SHA-256": weights}
    settings |= {"zoo": version("zoo"), "Precision": model.precision}
    settings["Tiles"] = f"{view.tile} px" if view.tile else "whole images"
    settings["Info bar"] = "left out" if view.info_bar == "auto" else "seen as part of the image"
    settings["Intensity"] = scale if view.low is None or view.floats else f"{scale} of full scale"
    settings["Ignore masks"] = "yes" if ignore_masks else "none"
    if known is None:
        return settings | {"Thresholds": "none"}
    settings["Image threshold"] = f"{known.image_threshold:.6g}"
    settings["Pixel threshold"] = f"{known.pixel_threshold:.6g}"
    settings["Smallest region"] = f"{known.min_area} px"
    settings["False-alarm rate"] = "none stated"
    if known.calibrated:
        sure = f"with {100 * known.confidence:.4g} % confidence"
        settings["False-alarm rate"] = f"{100 * known.false_alarm_rate:.4g} % at most, {sure}"
    return settings | {"Normal images behind the thresholds": f"{len(known.scores):,}"}


def _about_evidence(model: AnomalyModule, wanted: bool) -> str | None:
    """Why there is none, in a sentence; None where there is."""
    if not keeps_patches(model):
        return f"The method {model.method.replace('_', '-')} keeps no normal patches to show beside what was found."
    if wanted and not getattr(model, "origin", True):
        return "This copy of the model came without the notes of its training images, so no normal patches are shown."
    return None if wanted else "Normal patches are not shown beside what was found."


def _scale() -> str:
    """The colours of the heatmaps, as stops of a CSS gradient."""
    colours = (plots.COLOURS(level)[:3] for level in np.linspace(0, 1, 9))
    return ", ".join("rgb({:.0f} {:.0f} {:.0f})".format(*(255 * np.array(colour))) for colour in colours)


# ---- an image --------------------------------------------------------------------------------------------------------


def _line(row: dict[str, Any]) -> dict[str, Any]:
    """What is said of an image, in words and figures."""
    path = Path(row["image"])
    place = "" if path.parent == Path(".") else f"{path.parent}{os.sep}"
    p_value = "" if row["p_value"] is None else f"{row['p_value']:.4g}"
    about = {"file": path.name, "place": place, "score": f"{row['score']:.6g}", "p_value": p_value}
    about |= {"verdict": row["verdict"], "called": _called(row), "judged": row["verdict"] != "no threshold"}
    return about | {"num_regions": row["num_regions"]}


def _section(
    number: int,
    row: dict[str, Any],
    file: str | Path,
    model: AnomalyModule,
    folder: Path,
    training: evidence.TrainingImages | None,
) -> dict[str, Any]:
    """An image with its pictures; one that has gone since it was scored has its heatmap alone."""
    (height, width), nm = row["size"], row["pixel_nm"]
    regions = list(enumerate(row["regions"] or [], start=1))
    about = _line(row) | {"number": number, "height": height, "width": width, "image": None, "evidence": []}
    about["pixel"] = None if nm is None else f"{nm:.4g} nm"
    about["has_regions"], about["more"] = row["regions"] is not None, max(len(regions) - REGIONS, 0)
    about["regions"] = [region_words(i, region, nm) for i, region in regions[:REGIONS]]
    brought = _brought(file, model)
    if brought is not None:
        about["image"] = picture(plots.grey8(model.view.shown(brought.array)))
        if training is not None:
            about["evidence"] = _evidence(row, brought, model, training)
    about["overlay"] = _read(read_image, folder / row["heatmap"], picture)
    mask = _read(read_mask, folder / row["mask"]) if row["mask"] and regions else None
    about["outlines"] = [outline(i, region, mask, (height, width)) for i, region in regions[:REGIONS]]
    return about


def _brought(path: str | Path, model: AnomalyModule) -> Brought | None:
    try:
        return model.bring(path)
    except ZooError:
        return None


def _read(read: Any, path: Path, then: Any = lambda array: array) -> Any:
    """A picture that was written before; None where it is gone."""
    try:
        return then(read(path))
    except ZooError:
        return None


def _evidence(
    row: dict[str, Any], image: Brought, model: AnomalyModule, training: evidence.TrainingImages
) -> list[dict[str, Any]]:
    """Of the first regions, or where the map is highest."""
    places = [region["position"] for region in (row["regions"] or [])[:PLACES]]
    found = evidence.pairs(model, training, image, places or [row["peak"]])
    shown = []
    for number, pair in enumerate(found or [], start=1):
        about = {"number": number if places else None, "name": pair.name, "distance": f"{pair.distance:.4g}"}
        about |= {"found": cropped(pair.found), "normal": pair.normal and cropped(pair.normal)}
        shown.append(about)
    return shown


# ---- the page --------------------------------------------------------------------------------------------------------


def _write(path: Path, pieces: Iterator[str]) -> None:
    """Piece by piece under a temporary name, then renamed."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.writelines(pieces)
        temporary.replace(path)
    except OSError as error:
        raise ZooError(f"{path} could not be written ({error}); nothing was changed.") from error
    finally:
        temporary.unlink(missing_ok=True)


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((files("zoo.hub_cards") / "inspection.html.j2").read_text(encoding="utf-8"))
