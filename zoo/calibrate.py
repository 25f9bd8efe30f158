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

import numpy as np
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
from zoo.looks import Onlooker
from zoo.metrics import ranking
from zoo.module import AnomalyModule
from zoo.reference import write_reference
from zoo.regions import LOWEST, region_level
from zoo.run import DataOptions, RunOptions, device_of
from zoo.trainer import ending, first_speaks, say_broken
from zoo.unseen import Unseen, unseen_normals
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
) -> tuple[dict[str, Any], "Normals"]:
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
        What the record says of it, and what was found of each image.

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
    unseen = unseen_normals(load_data(spec), spec, folder, model.view, options.num_workers or 0, run)
    _check_enough(unseen, rate)
    model.to(device_of(run.device)).eval()
    model.precision = run.precision
    if options.tile is not None:
        model.view = replace(model.view, tile=options.tile or None)
    ignore = load_ignore(spec, options.ignore, run.say)
    run.say(f"Scoring {sum(map(len, unseen.parts)):,} normal images.")
    with ending("calibration"):
        normals, broken = score_unseen(model, unseen, spec, ignore, options, run, min_area)
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
        "broken": broken,
        "precision": run.precision,
        **({"tile": model.view.tile} if model.view.tile else {}),
        **({"ignored": "what ignore masks cover"} if ignore else {}),
        "seconds": round(time.perf_counter() - start, 2),
        **record.environment(model.device),
    }
    return about, normals


def score_unseen(
    model: AnomalyModule,
    unseen: Unseen,
    spec: DataSpec,
    ignore: IgnoreMasks | None,
    options: DataOptions,
    run: RunOptions,
    min_area: int,
) -> tuple["Normals", int]:
    """Score normal images that a model has not seen, and look at them; how many of them can't be read.

    Raises:
        ZooError: one of them can't be read, or none of them, if that is allowed.
    """
    modules = [_module(rows, model, ignore, options) for rows in unseen.parts]
    loaders = [module.test_dataloader() for module in modules if len(module.test_set)]
    with Onlooker(model) as watch:
        normals = score_normals(model, _shown(loaders, run), min_area, watch)
    for module in modules:
        say_broken(module, run)
    if not normals.rows:
        raise ZooError(f"None of the normal images of --data {spec.name} can be read.")
    digests = [unseen.digests[name] for name, *_ in normals.rows]
    return normals._replace(digests=digests), sum(len(module.broken) for module in modules)


def store_calibration(
    folder: Path,
    found: Calibration,
    about: dict[str, Any],
    normals: "Normals | None" = None,
    view: View | None = None,
) -> None:
    """Put a calibration into a model's folder: configuration with its view, record, card; privately scores and looks.

    The weights are not touched. Each file is replaced at once, and the configuration, which decides, is the first.
    """
    config = checkpoint.read_config(folder) | {"calibration": found.to_dict(), "precision": found.precision}
    config["preprocessing"] |= asdict(view) if view else {}
    result = checkpoint.read_record(folder) | {"calibration": about}
    checkpoint.write_text(folder / checkpoint.CONFIG, checkpoint.dump(config))
    checkpoint.write_text(folder / checkpoint.RECORD, checkpoint.dump(result))
    checkpoint.write_text(folder / checkpoint.CARD, render_card(config, result))
    if normals is not None:
        text = checkpoint.csv_text(["image", "score", "level"], normals.rows)
        checkpoint.write_text(folder / "private" / "calibration.csv", text)
        write_reference(folder, found, normals.digests, normals.looks)


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


def _check_enough(unseen: Unseen, rate: float) -> None:
    try:
        check_normals(sum(map(len, unseen.parts)), rate)
    except TooFewNormals as error:
        if not unseen.own:
            raise
        remedy = f"a fit with --hold-out {normals_needed(rate)} sets as many of its own aside."
        raise TooFewNormals(f"{str(error).rstrip('.')}; {remedy}") from error


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
    """What was found of normal images.

    Attributes:
        rows: name, score and level (`zoo.regions.region_level`) of each.
        table: rank table (n, 4) of their pixels.
        sizes: their (height, width), where these are few.
        looks: (n, 5 + D) of each, as `zoo.looks.Onlooker` gives them, where it watched.
        digests: of each, where they were taken (`zoo.seen.digest`).
        shapes: the (height, width) of each.
    """

    rows: list[tuple[str, float, float]]
    table: torch.Tensor
    sizes: list[list[int]]
    looks: np.ndarray | None = None
    digests: Sequence[str] = ()
    shapes: Sequence[tuple[int, int]] = ()

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
def score_normals(
    model: AnomalyModule, batches: Iterable[Batch], min_area: int = 1, watch: Onlooker | None = None
) -> Normals:
    """Score each process's share of normal images; no map is kept.

    Args:
        model: on its device; scored in its own precision.
        batches: images as they are predicted, of one size in a batch.
        min_area: pixels that a region has at least.
        watch: has been entered; looks at the images too.

    Returns:
        Those of all processes.
    """
    rows: list[tuple[str, float, float]] = []
    shapes: list[tuple[int, int]] = []
    looks: list[np.ndarray] = []
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
        shapes += [tuple(batch.image.shape[-2:])] * len(found)
        looks += watch.looks(batch) if watch else []
        none = torch.zeros_like(scores.map, dtype=torch.bool)
        tables, shift = ranking.add(tables, shift, scores.map, none, batch.roi)
    rows, shapes, looks = (ranks.gather_list(found) for found in (rows, shapes, looks))
    parts = ranks.gather((torch.cat(tables).cpu(), shift))
    if not rows:
        return Normals([], tables[0], [])
    table, _ = ranking.merge(torch.cat([table for table, _ in parts]), max(shift for _, shift in parts))
    sizes = [list(size) for size in sorted(set(shapes))]
    looks = np.stack(looks) if looks else None
    return Normals(rows, table, sizes if len(sizes) <= SIZES else [], looks, shapes=shapes)


def calibrate_on_heldout(
    model: AnomalyModule, module: AnomalyDataModule, device: torch.device
) -> list[tuple[str, float]]:
    """Give a model the default thresholds of held-out normals; returns their names and scores (none: no threshold)."""
    normals = score_normals(model.to(device), chain.from_iterable(module.holdout_dataloader()))
    if normals.rows:
        high, median = normals.quantile(PIXEL_QUANTILE), normals.quantile(0.5)
        model.calibration = default_calibration(normals.scores, high, median)
    return [(name, score) for name, score, _ in normals.rows]
