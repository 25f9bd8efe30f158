"""Predict over files and folders: overlays, masks, a CSV and a JSON file, written as the images are done."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import checkpoint, ranks
from zoo.data.ignore import FOLDER as IGNORED
from zoo.data.ignore import IgnoreMasks
from zoo.errors import ZooError
from zoo.image import EXTENSIONS
from zoo.run import RunOptions, device_of

if TYPE_CHECKING:  # imported on use: paths are checked before torch is loaded
    from zoo.module import AnomalyModule

MASK_FOLDERS = ("masks", "ground_truth", "train_masks")  # beside the images of a data set
COLUMNS = ("image", "score", "p_value", "is_anomalous", "verdict", "num_regions", "heatmap", "mask")


def find_images(paths: Sequence[str | Path], out: Path) -> dict[str, Path]:
    """Files, and all images below folders, by the name, relative and unique, that their results get.

    Left out are hidden files and folders, `out`, where earlier results may lie, and the masks of a data set.

    Raises:
        ZooError: a path that doesn't exist, or no image at all.
    """
    found: dict[str, Path] = {}
    for path in map(Path, paths):
        if path.is_dir():
            files = [
                f
                for f in sorted(path.rglob("*"))
                if f.suffix.lower() in EXTENSIONS and out.resolve() not in f.resolve().parents
            ]
            masks = (
                MASK_FOLDERS if any((path / sibling).is_dir() for sibling in ("good", "bad", "train", "test")) else ()
            )
            masks = (*masks, IGNORED)
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
    """The ignore masks that are asked for, else those in the folder `ignore` of the one folder that is scored.

    Raises:
        ZooError: as `IgnoreMasks`, and masks of which none fits an image.
    """
    if place is None and len(paths) == 1 and (Path(paths[0]) / IGNORED).is_dir():
        place = Path(paths[0]) / IGNORED
    if place is None:
        return None
    masks = IgnoreMasks(place)
    masks.check(list(images))
    return masks


def predict_files(
    model: "AnomalyModule",
    images: dict[str, Path],
    out: Path,
    batch_size: int,
    skip_broken: bool,
    run: RunOptions,
    ignore: IgnoreMasks | None = None,
    tile: int | None = None,
) -> list[dict[str, Any]]:
    """Score files and write `heatmaps/`, `masks/`, predictions.csv and predictions.json into a folder.

    Processes that were launched together (torchrun, srun) share the files; the first one writes the lists.

    Args:
        images: as from `find_images`.
        batch_size: files read and scored together.
        skip_broken: list an image that can't be read with the reason, instead of stopping.
        ignore: masks of what is not looked at, by the names of `images`.
        tile: as for `AnomalyModule.predict`.

    Returns:
        One row an image, with the keys of `COLUMNS`, `pixel_nm` and `regions`, in the order of `images`.

    Raises:
        ZooError: a broken image, named; what was done before is written.
    """
    if out.exists() and not out.is_dir():
        raise ZooError(f"--out {out} is a file; name a folder.")
    rank, world = ranks.connect()
    model.to(device_of(run.device))
    model.precision = run.precision
    rows: dict[str, dict[str, Any]] = {}
    broken: list[str] = []
    failure: BaseException | None = None
    try:
        share = dict(list(images.items())[rank::world])
        left_out, progress = broken if skip_broken else None, run.progress and not rank
        with model.seen_in_tiles(tile):
            _predict_files(model, share, out, batch_size, ignore, left_out, progress, rows)
    except BaseException as error:  # whatever stops it, what was done is listed
        failure = error
    parts = ranks.gather((rows, broken, None if failure is None else str(failure) or repr(failure)))
    rows = {name: row for part, *_ in parts for name, row in part.items()}
    done = [rows[name] for name in images if name in rows]
    for _, reasons, _ in parts:
        for reason in reasons:
            run.say(f"Left out: {reason}")
    if rank == 0:
        lines = [["" if row[key] is None else row[key] for key in COLUMNS] for row in done]
        checkpoint.write_text(out / "predictions.csv", checkpoint.csv_text(COLUMNS, lines))
        thresholds = model.calibration.to_dict() if model.calibration else {}
        thresholds = {key: value for key, value in thresholds.items() if key not in ("scores", "levels")}
        report = {"method": model.method, "calibration": thresholds or None, "images": done}
        checkpoint.write_text(out / "predictions.json", checkpoint.dump(report))
    if failure is not None:
        raise failure
    for *_, reason in parts:
        if reason is not None:
            raise ZooError(reason)
    return done


def _predict_files(
    model: "AnomalyModule",
    images: dict[str, Path],
    out: Path,
    batch_size: int,
    ignore: IgnoreMasks | None,
    broken: list[str] | None,
    progress: bool,
    rows: dict[str, dict[str, Any]],
) -> None:
    """Score this process's files; `rows` fills as they are done, `broken` with reasons unless it is None."""
    from rich.progress import track

    from zoo import plots

    names = list(images)
    size = 1 if model.view.tile else batch_size
    chunks = [names[i : i + size] for i in range(0, len(names), size)]
    for chunk in track(chunks, "Scoring", disable=not progress):
        brought = {}
        for name in chunk:
            try:
                brought[name] = model.bring(images[name], ignore.of(name) if ignore else None)
            except ZooError as error:
                if broken is None:
                    raise ZooError(f"{str(error).rstrip('.')}; --skip-broken leaves it out") from error
                broken.append(str(error))
        predictions = model.predict_brought(brought.values(), batch_size)
        for (name, image), prediction in zip(brought.items(), predictions, strict=True):
            row = {"image": str(images[name]), "score": prediction.score, "p_value": prediction.p_value}
            row |= {"is_anomalous": prediction.is_anomalous, "verdict": prediction.verdict}
            row["pixel_nm"], regions = prediction.pixel_nm, prediction.regions
            row["regions"] = None if regions is None else [region.described(prediction.pixel_nm) for region in regions]
            row["num_regions"] = None if regions is None else len(regions)
            row |= {"heatmap": f"heatmaps/{name}.png", "mask": None}
            shown = plots.overlay(model.view.shown(image.array), prediction.map, model.calibration)
            plots.save_png(out / row["heatmap"], shown)
            if model.calibration:
                row["mask"] = f"masks/{name}.png"
                plots.save_png(out / row["mask"], plots.mask(prediction.map, model.calibration))
            rows[name] = row
