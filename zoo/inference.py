"""Predict over files and folders: overlays, masks, a CSV and a JSON file, written as the images are done."""

import errno
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import checkpoint, ranks
from zoo.data.ignore import FOLDER as IGNORED
from zoo.data.ignore import IgnoreMasks
from zoo.errors import ZooError
from zoo.image import EXTENSIONS
from zoo.paths import user_path
from zoo.run import RunOptions, device_of

if TYPE_CHECKING:  # imported on use: paths are checked before torch is loaded
    from zoo.module import AnomalyModule, Brought, Prediction

SPLITS, MASK_FOLDERS = ("good", "bad", "train", "test"), ("masks", "ground_truth", "train_masks")  # of a data set
OFF_SCALE = 0.1  # of an image's pixels beyond the black and white of its set, where percentiles left out 0.2 %
COLUMNS = ("image", "score", "p_value", "is_anomalous", "verdict", "num_regions", "heatmap", "mask")


def find_images(paths: Sequence[str | Path], out: Path) -> dict[str, Path]:
    """Files, and all images below folders, by the name, relative and unique, that their results get.

    Left out are hidden files and folders, `out`, where earlier results may lie, and the masks of a data set.

    Raises:
        ZooError: a path that doesn't exist, or no image at all.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir() and path.resolve() == out.resolve():
            raise ZooError(f"--out {out} is the folder that is read; name another one.")
        if path.is_dir():
            files = [
                f
                for f in sorted(path.rglob("*"))
                if f.suffix.lower() in EXTENSIONS and out.resolve() not in f.resolve().parents
            ]
            masks = (*(MASK_FOLDERS if any((path / split).is_dir() for split in SPLITS) else ()), IGNORED)
            inside = {file: file.relative_to(path).parts for file in files}
            files = [f for f in files if inside[f][0] not in masks and not any(p[0] == "." for p in inside[f])]
            if not files:
                raise ZooError(f"{path} holds no images ({', '.join(sorted(EXTENSIONS))}).")
            named = [(file.relative_to(path), file) for file in files]
        elif path.is_file():
            named = [(Path(path.name), path)]
        else:
            raise ZooError(f"There is no file or folder {path}; check the path.")
        for relative, file in named:
            # a.png and a.tif, or the same name from two folders, keep their results apart
            names = [relative.with_suffix("").as_posix(), relative.as_posix(), f"{file.parent.name}-{relative.name}"]
            names += [f"{relative.as_posix()}-{len(found)}"]
            found[next(name for name in names if name not in found)] = file
    return found


def find_ignore(place: str | None, paths: Sequence[str | Path], images: dict[str, Path]) -> IgnoreMasks | None:
    """The ignore masks that are asked for, else those in a folder `ignore` in or beside the one folder that is scored.

    Raises:
        ZooError: as `IgnoreMasks`, and masks of which none fits an image.
    """
    if len(paths) == 1:
        place = ignore_place(place, Path(paths[0]).resolve())
    if place is None:
        return None
    masks = IgnoreMasks(place)
    masks.check(list(images), print)
    return masks


def ignore_place(place: str | Path | None, folder: Path) -> str | Path | None:
    """Where the masks of a folder of images are: `ignore` in or beside it, if none are asked for; None: nowhere."""
    beside = folder.parent / IGNORED if place is None else user_path(place)
    if place is None and (folder / IGNORED).is_dir():
        return folder / IGNORED
    if folder.is_dir() and (beside / folder.name).is_dir():  # of data/good it is data/ignore/good
        return beside / folder.name
    return place


def check_out(out: Path) -> None:
    """Raises ZooError for a folder that results can't be written to, or that holds those of a watch."""
    way = (out.absolute(), *out.absolute().parents)
    missing = [each for each in way if not each.exists()]
    place = way[len(missing)]
    if not place.is_dir():
        raise ZooError(f"--out {out}: {place} is a file; name a folder.")
    if (out / "predictions.jsonl").exists():
        raise ZooError(f"{out} holds the results of zoo watch; name another folder by --out.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ZooError(f"--out {out} can't be written ({error.strerror}); name another folder.") from error
    for each in missing:  # nothing is left where nothing is scored
        each.rmdir()


@dataclass
class Found:
    """What was done, by a process of its share or by all together: rows by name, and images that are to be told of."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    broken: list[tuple[str, str]] = field(default_factory=list)  # (path, reason) of what is left out
    other_size: list[str] = field(default_factory=list)  # than the rate was stated for
    off_scale: list[str] = field(default_factory=list)  # pixels beyond the black and white of the set

    def add(
        self, name: str, path: Path, image: "Brought", prediction: "Prediction", model: "AnomalyModule", out: Path
    ) -> None:
        """Take an image that is done; arguments as of `row_of`."""
        self.rows[name] = row_of(name, path, image, prediction, model, out)
        known = model.thresholds()
        if known is not None and known.calibrated and prediction.is_anomalous is None:
            self.other_size.append(str(path))
        if model.view.low is not None and model.view.off_scale(image.image) > OFF_SCALE:
            self.off_scale.append(str(path))

    def lines(self, model: "AnomalyModule", with_broken: bool = True) -> Iterator[str]:
        """What is said of them."""
        yield from (f"Left out: {reason}" for _, reason in self.broken if with_broken)
        if self.other_size:
            sizes = ", ".join(f"{width} x {height}" for height, width in model.calibration.sizes)
            yield (
                f"Uncalibrated are {_some(self.other_size)}: the rate was stated for images of {sizes} pixels; "
                "calibrate with such images, or see larger ones by --tile."
            )
        if self.off_scale:
            yield (
                f"Of {_some(self.off_scale)} more than {100 * OFF_SCALE:g} % of the pixels lie beyond the model's "
                "black and white: were they taken as its training images were?"
            )


def predict_files(
    model: "AnomalyModule",
    images: dict[str, Path],
    out: Path,
    batch_size: int,
    skip_broken: bool,
    run: RunOptions,
    ignore: IgnoreMasks | None = None,
    tile: int | None = None,
    pixel_nm: float | None = None,
) -> Found:
    """Score files and write `heatmaps/`, `masks/`, predictions.csv and predictions.json into a folder.

    Processes that were launched together (torchrun, srun) share the files; the first one writes the lists.

    Args:
        images: as from `find_images`.
        batch_size: files read and scored together.
        skip_broken: list an image that can't be read with the reason, instead of stopping.
        ignore: masks of what is not looked at, by the names of `images`.
        tile: as for `AnomalyModule.predict`.
        pixel_nm: side of a pixel in nm of the images whose files don't tell it.

    Returns:
        What was done, with one row an image, as `row_of` gives it, in the order of `images`.

    Raises:
        ZooError: a broken image, named; what was done before is written, or if that is nothing, nothing is.
    """
    from zoo.trainer import ending

    check_out(out)

    rank, world = ranks.connect()
    model.to(device_of(run.device))
    model.precision = run.precision
    own, failure = Found(), None
    with model.seen_in_tiles(tile):
        try:
            share, progress = dict(list(images.items())[rank::world]), run.progress and not rank
            with ending("scoring"):
                _predict_files(model, share, out, batch_size, ignore, skip_broken, progress, own, pixel_nm)
        except BaseException as error:  # whatever stops it, what was done is listed
            failure = error
        parts = ranks.gather((own, None if failure is None else str(failure) or repr(failure)))
        found = Found(*(_joined([getattr(part, key.name) for part, _ in parts]) for key in fields(Found)))
        found.rows = {name: found.rows[name] for name in images if name in found.rows}
        for line in found.lines(model):
            run.say(line)
        reasons = [reason for _, reason in parts if reason is not None]
        if rank == 0 and (found.rows or not reasons):  # else an earlier run's lists stay
            rows = list(found.rows.values())
            checkpoint.write_text(out / "predictions.csv", csv_of(rows))
            checkpoint.write_text(out / "predictions.json", json_of(rows, found.broken, model, ignore is not None))
    if failure is not None:
        raise failure
    if reasons:
        raise ZooError(reasons[0])
    return found


def closing_lines(model: "AnomalyModule", rows: list[dict[str, Any]], out: Path, tile: int | None) -> Iterator[str]:
    """What is said when all is scored: how many are called anomalous, and with what right."""
    known, called = model.calibration, "without verdicts"
    stated = any(row["is_anomalous"] is not None for row in rows)
    if known:
        called = f"{sum(row['verdict'].startswith('anomalous') for row in rows)} called anomalous"
    if stated:
        called += f" ({known.promise()})"
    if more := sum(bool(row["num_regions"]) and not row["is_anomalous"] for row in rows):
        called += f", {more} more with regions"
    yield f"Scored {len(rows)} image{'s' * (len(rows) != 1)}, {called}; results are in {out}."
    yield from caveats(model, tile)


def caveats(model: "AnomalyModule", tile: int | None) -> Iterator[str]:
    """Why verdicts state no rate, if they don't."""
    known = model.calibration
    if not known:
        yield "The model has no threshold: its fit held no images out, or was stopped before it scored them."
    elif known.calibrated and known.precision != model.precision:
        yield f"The verdicts are uncalibrated: the rate was stated in {known.precision}, not in {model.precision}."
    elif tile is not None and (tile or None) != model.view.tile:
        yield "The verdicts are uncalibrated: --tile is not that of the model, so its threshold is of other scores."
    elif not known.calibrated:
        yield "The verdicts are uncalibrated: the threshold comes from a few held-out normals, no rate is stated."


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """The text of predictions.csv, in the order of the rows (`row_of`)."""
    return checkpoint.csv_text(COLUMNS, [["" if row[key] is None else row[key] for key in COLUMNS] for row in rows])


def json_of(
    rows: Sequence[dict[str, Any]],
    broken: Sequence[tuple[str, str]],
    model: "AnomalyModule",
    ignore_masks: bool = False,
) -> str:
    """The text of predictions.json.

    Args:
        rows: as `row_of` gives them.
        broken: (path, reason) of images that are left out.
        model: that has scored them, as it has seen them (`seen_in_tiles`).
        ignore_masks: whether something was ignored.
    """
    about = {"ignore_masks": ignore_masks, "tile": model.view.tile, "images": list(rows)}
    about["broken"] = [{"image": path, "reason": reason} for path, reason in broken]
    return checkpoint.dump({"method": model.method, "calibration": _thresholds(model)} | about)


def _thresholds(model: "AnomalyModule") -> dict[str, Any] | None:
    """The calibration without its scores, as far as it holds."""
    known = model.thresholds()
    if known is None:
        return None
    kept = {key: value for key, value in known.to_dict().items() if key not in ("scores", "levels")}
    return kept | {"normals": len(known.scores)}


def _predict_files(
    model: "AnomalyModule",
    images: dict[str, Path],
    out: Path,
    batch_size: int,
    ignore: IgnoreMasks | None,
    skip_broken: bool,
    progress: bool,
    found: Found,
    pixel_nm: float | None,
) -> None:
    """Score this process's files; `found` fills as they are done."""
    from rich.progress import track

    names = list(images)
    size = 1 if model.view.tile else batch_size
    chunks = [names[i : i + size] for i in range(0, len(names), size)]
    for chunk in track(chunks, "Scoring", disable=not progress):
        brought, failure = {}, None
        for name in chunk:
            try:
                image = model.bring(images[name], ignore.of(name) if ignore else None)
                brought[name] = image._replace(pixel_nm=pixel_nm if image.pixel_nm is None else image.pixel_nm)
            except ZooError as error:
                found.broken += [(str(images[name]), str(error))] if skip_broken else []
                if not skip_broken:
                    failure = error
                    break
        predictions = model.predict_brought(brought.values(), batch_size)
        for (name, image), prediction in zip(brought.items(), predictions, strict=True):
            found.add(name, images[name], image, prediction, model, out)
        if failure is not None:
            raise ZooError(f"{str(failure).rstrip('.')}; --skip-broken leaves such images out") from failure


def row_of(
    name: str, path: Path, image: "Brought", prediction: "Prediction", model: "AnomalyModule", out: Path
) -> dict[str, Any]:
    """What the lists say of an image; its heatmap and its mask are written on the way.

    Args:
        name: relative and unique, as from `find_images`; the pictures are `heatmaps/NAME.png` and `masks/NAME.png`.
        path: of the image's file, as the lists name it.
        image: as `AnomalyModule.bring` gave it.
        prediction: of that image, as `AnomalyModule.predict_brought` gave it.
        out: folder of the pictures.

    Returns:
        The keys of `COLUMNS`, `pixel_nm` and `regions`; `size` (height, width), `looked_at`, so many of its pixels, and
        `peak` (row, column), where its map is highest. Plain JSON values; without any threshold there is no mask.
    """
    import numpy as np

    from zoo import plots

    regions = prediction.regions
    row = {"image": str(path), "score": prediction.score, "p_value": prediction.p_value}
    row |= {"is_anomalous": prediction.is_anomalous, "verdict": prediction.verdict, "pixel_nm": prediction.pixel_nm}
    row["regions"] = None if regions is None else [region.described(prediction.pixel_nm) for region in regions]
    row["num_regions"] = None if regions is None else len(regions)
    looked_at, map = image.looked_at(), prediction.map
    peak = np.unravel_index(map.argmax(), map.shape)
    row |= {"size": list(map.shape), "looked_at": int(looked_at.sum()), "peak": [int(i) for i in peak]}
    row |= {"heatmap": f"heatmaps/{name}.png", "mask": None}
    shown = plots.overlay(model.view.shown(image.array), map, model.calibration)
    plots.save_png(out / row["heatmap"], shown)
    if model.calibration:
        row["mask"] = f"masks/{name}.png"
        plots.save_png(out / row["mask"], plots.mask(map, model.calibration) & looked_at)
    return row


def _joined(parts: list[Any]) -> Any:
    """Lists, or dicts, of all processes as one."""
    if isinstance(parts[0], dict):
        return {key: value for part in parts for key, value in part.items()}
    return [value for part in parts for value in part]


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names):,} images, such as {names[0]}"
