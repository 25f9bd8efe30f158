"""Calibrate a model: thresholds with a stated false-alarm rate, from normal images that had no say in its weights.

The default thresholds of a fit are made here as well, from the normals that it held out.
"""

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset, DatasetDict
from rich.progress import track

from zoo import checkpoint, ranks, record
from zoo.calibration import (
    Calibration,
    TooFewNormals,
    calibrated,
    check_normals,
    check_rate,
    default_calibration,
    normals_needed,
    restored,
)
from zoo.cards import render_card
from zoo.data import DataSpec, check_data, load_data, load_ignore
from zoo.data.datamodule import HOLDOUT_BATCH, AnomalyDataModule
from zoo.data.ignore import IgnoreMasks
from zoo.errors import ZooError
from zoo.evaluation import described
from zoo.learning import Batch
from zoo.metrics import ranking
from zoo.module import AnomalyModule
from zoo.regions import LOWEST, region_level
from zoo.run import DataOptions, RunOptions, device_of
from zoo.seen import FILE, digests, read_seen
from zoo.trainer import ending, first_speaks, say_broken
from zoo.view import View

PIXEL_QUANTILE = 0.999
SIZES = 16  # of calibrated images, to be told from others; where there are more, any size may come
PIXEL_SHIFT = 7  # bits of a pixel's score that its quantiles do without: exact to 2^-16 of the value, in a small table


def calibrate(
    model: AnomalyModule,
    data: str,
    rate: float,
    min_area: int = 1,
    folder: Path | None = None,
    data_options: dict[str, Any] | None = None,
    run: RunOptions | None = None,
) -> tuple[dict[str, Any], list[tuple[str, float, float]]]:
    """Give a model thresholds of which each calls at most a share of the normal images anomalous, with 95 % confidence.

    Taken are the distinct normal images of the data. Of the data that the model was fitted on, only those which neither
    fit nor selection has seen; other data must not have any that one of them has.

    Args:
        model: fitted; it is scored in the precision of the run and in its tiles, which it keeps.
        data: DATA specification.
        rate: the share, in (0, 1).
        min_area: pixels that a region of the map has at least, to count as one.
        folder: the model's own, which knows what it has seen; None: that can't be checked.
        data_options: fields of `DataOptions`.

    Returns:
        What the record says of it, and name, score and level (`zoo.regions.region_level`) of each image.

    Raises:
        ZooError: images that the model has seen; one that can't be read; fewer than the rate takes (`TooFewNormals`).
    """
    run, start = first_speaks(run or RunOptions(precision=model.precision)), time.perf_counter()
    check_rate(rate)
    if not model.is_fitted:
        raise ZooError(f"This {model.method} has learned nothing yet; fit it first.")
    if model.view.crop:
        raise ZooError("This model was fitted on cropped images, for parity runs; fit it with another preset.")
    ranks.connect()
    spec, options = check_data(data), DataOptions(**(data_options or {}))
    unseen = _unseen(load_data(spec), spec, folder, model.view, options.num_workers or 0, run)
    _check_enough(unseen, rate)
    model.to(device_of(run.device)).eval()
    model.precision = run.precision
    if options.tile is not None:
        model.view = replace(model.view, tile=options.tile or None)
    ignore = load_ignore(spec, options.ignore, run.say)
    modules = [_module(rows, model, ignore, options) for rows in unseen.parts]
    loaders = [module.test_dataloader() for module in modules if len(module.test_set)]
    with ending("calibration"):
        normals = score_normals(model, _shown(loaders, run), min_area)
    for module in modules:
        say_broken(module, run)
    if not normals.rows:
        raise ZooError(f"None of the normal images of --data {spec.name} can be read.")
    found = calibrated(normals.scores, normals.levels, rate, normals.quantile(0.5), min_area, run.precision)
    if found.pixel_threshold <= LOWEST / 2:
        raise ZooError(f"--min-area {min_area} is more than these images have pixels; lower it.")
    model.calibration = found = replace(found, sizes=normals.sizes)
    about = {
        "normals": len(normals.rows),
        **_stated(found),
        "data": described(spec),
        "checked": unseen.checked,
        "repeated": unseen.repeated,
        "broken": sum(len(module.broken) for module in modules),
        "precision": run.precision,
        **({"tile": model.view.tile} if model.view.tile else {}),
        **({"ignored": "what ignore masks cover"} if ignore else {}),
        "seconds": round(time.perf_counter() - start, 2),
        **record.environment(model.device),
    }
    return about, normals.rows


def store_calibration(
    folder: Path,
    found: Calibration,
    about: dict[str, Any],
    rows: Sequence[tuple[str, float, float]] | None = None,
    view: View | None = None,
) -> None:
    """Put a calibration into a model's folder: configuration with its view, record, card and per-image scores.

    The weights are not touched. Each file is replaced at once, and the configuration, which decides, is the first.
    """
    config = checkpoint.read_config(folder) | {"calibration": found.to_dict(), "precision": found.precision}
    config["preprocessing"] |= asdict(view) if view else {}
    result = checkpoint.read_record(folder) | {"calibration": about}
    checkpoint.write_text(folder / checkpoint.CONFIG, checkpoint.dump(config))
    checkpoint.write_text(folder / checkpoint.RECORD, checkpoint.dump(result))
    checkpoint.write_text(folder / checkpoint.CARD, render_card(config, result))
    if rows is not None:
        text = checkpoint.csv_text(["image", "score", "level"], rows)
        checkpoint.write_text(folder / "private" / "calibration.csv", text)


def change_rate(folder: Path, rate: float) -> Calibration:
    """State another rate for a model that was calibrated, from the scores that its folder holds.

    Raises:
        ZooError: it was never calibrated; a rate that its normals can't support.
    """
    found = restored(checkpoint.read_config(folder)["calibration"]).at_rate(check_rate(rate))
    about = checkpoint.read_record(folder).get("calibration", {})
    store_calibration(folder, found, about and about | _stated(found))
    return found


def _stated(found: Calibration) -> dict[str, float]:
    return {key: getattr(found, key) for key in ("false_alarm_rate", "confidence", "min_area")}


# ---- what is scored --------------------------------------------------------------------------------------------------


class _Unseen(NamedTuple):
    """Normal images by split, how many copies of them were left out, whether their content could be checked, and
    whether they are of the data that the model was fitted on."""

    parts: list[Dataset]
    repeated: int
    checked: bool
    own: bool


def _check_enough(unseen: _Unseen, rate: float) -> None:
    try:
        check_normals(sum(map(len, unseen.parts)), rate)
    except TooFewNormals as error:
        if not unseen.own:
            raise
        remedy = f"a fit with --hold-out {normals_needed(rate)} sets as many of its own aside."
        raise TooFewNormals(f"{str(error).rstrip('.')}; {remedy}") from error


def _unseen(
    data: DatasetDict, spec: DataSpec, folder: Path | None, view: View, num_workers: int, run: RunOptions
) -> _Unseen:
    """The distinct normal images of a data set, without what the fit of a model or its selection has seen.

    Raises:
        ZooError: there is none; or the data are others than the fit's, and some of them have been seen.
    """
    seen, own = read_seen(folder) if folder else None, folder is not None and _is_own(spec, folder)
    if seen is None and own:
        raise ZooError(
            f"The model was fitted on this data and has no private/{FILE} to tell on which images; give it others."
        )
    if seen is None:
        run.say(f"Whether the model has seen these images can't be checked: it has no private/{FILE}.")
    names, contents = seen or (set(), set())
    parts, known, taken, repeated = [], [], set(), 0
    for rows in data.values():
        rows = _normals(rows, names if own else set())
        found = digests(rows, view, num_workers, run.progress)
        known += [name for name, content in zip(_names(rows), found, strict=True) if content in contents]
        fresh = [row for row, content in enumerate(found) if content not in contents]
        kept = [row for row in fresh if _is_first(found[row], taken)]
        parts.append(rows.select(kept))
        repeated += len(fresh) - len(kept)
    if known and not own:
        raise ZooError(
            f"{len(known):,} of these normal images had a say in the model's weights (such as {known[0]}): give images "
            "that it hasn't seen, or the fit's own --data, of which it takes what was held out."
        )
    if not sum(map(len, parts)):
        raise TooFewNormals(f"--data {spec.name} has no normal image that the model hasn't seen; add some.")
    if known:
        run.say(f"{len(known):,} images are left out: under other names, the fit or the selection has seen them.")
    if repeated:
        run.say(f"{repeated:,} images are copies of others; each counts once.")
    return _Unseen(parts, repeated, seen is not None, own)


def _normals(rows: Dataset, seen: set[str]) -> Dataset:
    """The normal images without those of these names."""
    labels = rows.with_format(None)["label"]
    pairs = zip(_names(rows), labels, strict=True)
    return rows.select([i for i, (name, label) in enumerate(pairs) if not label and name not in seen])


def _names(rows: Dataset) -> list[str]:
    return rows.with_format(None)["path"]


def _is_first(content: str, taken: set[str]) -> bool:
    """Whether an image comes for the first time, as one that can't be read always does: scoring it will tell."""
    is_first = not content or content not in taken
    taken.add(content)
    return is_first


def _is_own(spec: DataSpec, folder: Path) -> bool:
    """Whether a model was fitted on this data, or another form of it."""
    about = checkpoint.read_record(folder).get("train_data", {})
    return bool({about.get("fingerprint"), about.get("origin")} & {spec.fingerprint, spec.origin})


def _module(rows: Dataset, model: AnomalyModule, ignore: IgnoreMasks | None, options: DataOptions) -> AnomalyDataModule:
    data = DatasetDict(train=rows.select([]), test=rows)
    loading = options.loading() | {"batch_size": min(options.batch_size, HOLDOUT_BATCH)}  # they may be large
    return AnomalyDataModule(data, input_size=model.size, view=model.view.native(), ignore=ignore, **loading)


def _shown(loaders: list[Iterable[list[Batch]]], run: RunOptions) -> Iterable[Batch]:
    """The batches of all, with a progress bar."""
    total = sum(map(len, loaders))
    groups = track(chain.from_iterable(loaders), "Scoring normals", total=total, disable=not run.progress)
    return chain.from_iterable(groups)


# ---- scores of normal images -----------------------------------------------------------------------------------------


class Normals(NamedTuple):
    """Name, score and level of normal images, the rank table (n, 4) of their pixels, and their (height, width)."""

    rows: list[tuple[str, float, float]]
    table: torch.Tensor
    sizes: list[list[int]]

    @property
    def scores(self) -> list[float]:
        return [score for _, score, _ in self.rows]

    @property
    def levels(self) -> list[float]:
        return [level for _, _, level in self.rows]

    def quantile(self, share: float) -> float:
        """The smallest pixel score that at least this share of the pixels doesn't exceed."""
        below = self.table[:, 1].cumsum(0)  # (n,)
        rank = torch.tensor(math.ceil(share * int(below[-1])), device=below.device)
        return ranking.key_score(int(self.table[torch.searchsorted(below, rank), 0]))


@torch.inference_mode()
def score_normals(model: AnomalyModule, batches: Iterable[Batch], min_area: int = 1) -> Normals:
    """Score each process's share of normal images; no map is kept.

    Args:
        model: on its device; scored in its own precision.
        batches: images as they are predicted, of one size in a batch.
        min_area: pixels that a region has at least.

    Returns:
        Those of all processes.
    """
    rows: list[tuple[str, float, float]] = []
    sizes: set[tuple[int, ...]] = set()
    tables, shift = [torch.zeros(0, 4, dtype=torch.int64, device=model.device)], PIXEL_SHIFT
    for batch in batches:
        batch = batch.to(model.device)
        with model.autocast():
            scores = model.score_images(batch.image, batch.roi)
        maps = scores.map if batch.roi is None else scores.map.masked_fill(~batch.roi, -torch.inf)
        levels = [region_level(map, min_area) for map in maps[:, 0].cpu().numpy()]
        found = list(zip(batch.name, scores.image.tolist(), levels, strict=True))
        if bad := next((name for name, *numbers in found if not all(map(math.isfinite, numbers))), None):
            raise ZooError(f"{bad} has a score that is no finite number; fit or calibrate with --precision 32-true.")
        rows += found
        sizes.add(tuple(batch.image.shape[-2:]))
        none = torch.zeros_like(scores.map, dtype=torch.bool)
        tables, shift = ranking.add(tables, shift, scores.map, none, batch.roi)
    rows, parts = ranks.gather_list(rows), ranks.gather((torch.cat(tables).cpu(), shift, sizes))
    if not rows:
        return Normals([], tables[0], [])
    table, _ = ranking.merge(torch.cat([table for table, *_ in parts]), max(shift for _, shift, _ in parts))
    all_sizes = sorted(set().union(*(sizes for *_, sizes in parts)))
    return Normals(rows, table, [list(size) for size in all_sizes] if len(all_sizes) <= SIZES else [])


def calibrate_on_heldout(
    model: AnomalyModule, module: AnomalyDataModule, device: torch.device
) -> list[tuple[str, float]]:
    """Give a model the default thresholds of held-out normals; returns their names and scores (none: no threshold)."""
    normals = score_normals(model.to(device), chain.from_iterable(module.holdout_dataloader()))
    if normals.rows:
        high, median = normals.quantile(PIXEL_QUANTILE), normals.quantile(0.5)
        model.calibration = default_calibration(normals.scores, high, median)
    return [(name, score) for name, score, _ in normals.rows]
