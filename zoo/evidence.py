"""Evidence: what was found, beside the normal patch of the training images that is nearest to it.

A training image is looked up by its name in the DATA that the fit has noted in `private/`, and shown only if it still
has the pixels that the fit saw. Where it isn't at hand, its name alone is told: a report never fails for want of it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from zoo import plots
from zoo.data import load_data
from zoo.errors import ZooError
from zoo.image import read_image
from zoo.module import AnomalyModule, Evidence
from zoo.parent import data_of
from zoo.seen import digest, read_seen
from zoo.tiles import Tile, tiles_of

CELLS = 7  # side of a crop, in patches of the method's grid: the one in question with what is around it

UNKNOWN = "an image of a model before, which came without names"
Box = tuple[float, float, float, float]  # (top, left, bottom, right) in pixels


class Crop(NamedTuple):
    """A part of an image for display, uint8 (h, w, 3), and the box of the patch in it."""

    pixels: np.ndarray
    box: Box


class Pair(NamedTuple):
    """A place in an image beside the nearest normal patch, whose crop is None where its image isn't at hand."""

    found: Crop
    normal: Crop | None
    name: str  # of the training image
    distance: float


class TrainingImages:
    """The images that a model was fitted on, by name, as far as they are still there."""

    def __init__(self, model: AnomalyModule):
        self.model, self.sets = model, {}  # DATA -> its rows by name
        try:
            seen = read_seen(model.folder) if model.folder else None
        except ZooError:
            seen = None
        self.digests = seen and seen.digests

    def read(self, name: str) -> np.ndarray | None:
        """An image above its info bar, as the fit saw it; None where it isn't there, or is another one by now."""
        try:
            source = name if Path(name).is_file() else self._source(name)  # of an update, a path
            image = self.model.view.without_bar(read_image(source), source)
        except Exception:  # it was moved, is damaged, is on another machine: there is no evidence then
            return None
        return image if self.digests is None or digest(image) in self.digests else None

    def _source(self, name: str) -> Any:
        data, known = data_of(self.model.folder, name)
        if data not in self.sets:
            splits = load_data(data).values()
            named = ((split, split.with_format(None)["path"]) for split in splits)
            self.sets[data] = {path: (split, i) for split, paths in named for i, path in enumerate(paths)}
        split, row = self.sets[data][known]
        return split[row]["image"]


def pairs(
    model: AnomalyModule, training: TrainingImages, image: Any, places: Sequence[tuple[int, int]]
) -> list[Pair] | None:
    """Evidence for places in an image.

    Args:
        image: as `model.bring` gives it.
        places: (row, column) in its pixels.

    Returns:
        One for each place; None where the model has none, see `AnomalyModule.nearest_normal`.
    """
    height, width = image.image.shape[-2:]
    places = [(min(row, height - 1), min(column, width - 1)) for row, column in places]
    found = model.nearest_normal(image.image[None], places)
    if found is None:
        return None
    array = image.array[:height]
    crops = ((_crop(model, array, one.cell), _normal(model, training, one)) for one in found)
    return [Pair(*both, one.name or UNKNOWN, one.distance) for both, one in zip(crops, found, strict=True)]


def _normal(model: AnomalyModule, training: TrainingImages, evidence: Evidence) -> Crop | None:
    image = training.read(evidence.name)
    if image is None:
        return None
    size = image.shape[:2]
    tiles = tiles_of(size, _fitted_tile(model) or max(size), overlap=0)
    tile = tiles[0] if len(tiles) == 1 else _which(model, image, tiles, evidence)
    return None if tile is None else _crop(model, image, _box_in(tile, evidence))


def _which(model: AnomalyModule, image: np.ndarray, tiles: list[Tile], evidence: Evidence) -> Tile | None:
    """The tile that a patch was taken from: there the nearest normal patch is itself, at the least distance."""
    candidates = []
    with model.seen_in_tiles(0):  # a tile is seen as a whole
        for number, tile in enumerate(tiles):
            part = model.view.tensor(np.ascontiguousarray(image[tile.rows, tile.columns]))
            top, left, bottom, right = _box_in(tile, evidence)
            place = (int((top + bottom) / 2) - tile.rows.start, int((left + right) / 2) - tile.columns.start)
            (found,) = model.nearest_normal(part[None], [place])
            if (found.name, found.box) == (evidence.name, evidence.box):
                candidates.append((found.distance, number))
    return tiles[min(candidates)[1]] if candidates else None


def _fitted_tile(model: AnomalyModule) -> int | None:
    """Of the fit, whatever images are seen in now."""
    data = (model.record or {}).get("configuration", {}).get("data", {})
    return data["tile"] if "tile" in data else model.view.tile


def _box_in(tile: Tile, evidence: Evidence) -> Box:
    """The patch of a training image, in its pixels."""
    height, width = tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start
    top, left, bottom, right = evidence.box
    rows, columns = (tile.rows.start + side * height for side in (top, bottom)), (left, right)
    (top, bottom), (left, right) = rows, (tile.columns.start + side * width for side in columns)
    return top, left, bottom, right


def _crop(model: AnomalyModule, image: np.ndarray, box: Box) -> Crop:
    """What is around a patch, moved inside where it would reach over an edge."""
    top, left, bottom, right = box
    sides = []
    for low, high, length in ((top, bottom, image.shape[0]), (left, right, image.shape[1])):
        side = min(round(CELLS * (high - low)), length)
        start = min(max(round((low + high - side) / 2), 0), length - side)
        sides.append(slice(start, start + max(side, 1)))
    y, x = (side.start for side in sides)
    pixels = plots.grey8(model.view.shown(np.ascontiguousarray(image[sides[0], sides[1]])))
    return Crop(pixels, (top - y, left - x, bottom - y, right - x))
