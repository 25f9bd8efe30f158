"""Where MIIC's defects are: masks out of JPEG files, and boxes out of a MATLAB file or of pictures of them.

What the owner's files look like in detail is not published: polarity of the masks, form and base of the MATLAB file and
kind of the pictures are checked against each other here instead of being guessed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from zoo.data.miic_layout import POSITIONS, Layout, box_images
from zoo.errors import ZooError
from zoo.image import read_image, read_mask

WHITE = 127  # of 255; above it lies a line of a box, as JPEG makes other values than 0 and 255
BETWEEN = 0.02  # share of pixels of no clear colour, above which a picture is no drawing of boxes
SPECK = 4  # pixels of a side, below which what is white is no box
AGREE = 0.5  # intersection over union of boxes, in the median, from which two sources speak of the same defects
Box = tuple[int, int, int, int]  # column and row of the corner, counted from 0, width, height; pixels


class Truth(NamedTuple):
    """Masks (H, W) bool of the abnormal images by their names, without those that can't be read, and remarks."""

    masks: dict[str, np.ndarray]
    notes: list[str]


def read_masks(layout: Layout) -> Truth:
    """The masks by the rule of `read_mask`, at their own size, before anything is resized.

    White is the defect. Where most masks are white over more than half of their pixels, black is: all are inverted, and
    that is said. So is which masks then mark more than half of their image, which is seldom meant. An image whose mask
    is empty stays abnormal, and is counted.
    """
    masks = {}
    for item in layout.splits["test"]:
        if item.mask and (mask := _mask(item.mask)) is not None:
            masks[item.name] = mask
    notes = []
    white = sum(mask.mean() > 0.5 for mask in masks.values())
    if 2 * white > len(masks):
        masks = {name: ~mask for name, mask in masks.items()}
        notes.append(
            f"{white:,} of {len(masks):,} masks are mostly white: all were inverted, so that black is the defect."
        )
    if large := [name for name, mask in masks.items() if mask.mean() > 0.5]:
        notes.append(f"Masks that mark more than half of their image are kept, {len(large):,}: {', '.join(large[:3])}.")
    if empty := [name for name, mask in masks.items() if not mask.any()]:
        notes.append(f"Abnormal images whose mask is empty stay abnormal, {len(empty):,}: {', '.join(empty[:3])}.")
    return Truth(masks, notes)


def png(mask: np.ndarray) -> bytes:
    """A mask (H, W) bool as a PNG file of 0 and 255."""
    file = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(file, format="png")
    return file.getvalue()


def read_boxes(layout: Layout, masks: Mapping[str, np.ndarray]) -> tuple[dict[str, list[Box]], str]:
    """Boxes of the defects by image name, and a sentence about where they come from.

    The MATLAB file is taken where its boxes are those of the pictures (of the masks where there are none), once counted
    from 0 or from 1; else the pictures; else what surrounds each region of the masks.
    """
    from scipy import ndimage

    names = {Path(item.name).stem: item.name for item in layout.splits["test"] if item.label}
    regions = {}
    for name, mask in masks.items():
        regions[name] = _boxes(ndimage.label(mask, np.ones((3, 3)))[0])
    pictures = {names[stem]: _drawn(path) for stem, path in box_images(layout).items()}
    drawn = {name: boxes for name, boxes in pictures.items() if boxes is not None}
    known, source = (drawn, "the box images") if drawn else (regions, "the regions of the masks")
    whole = {name: known.get(name, regions.get(name, [])) for name in names.values()}
    try:
        listed = _listed(layout.root / POSITIONS, [names[stem] for stem in sorted(names)])
    except Exception as error:  # missing, damaged, of another version: scipy has errors of its own for each
        return whole, f"Boxes are those of {source}: {POSITIONS} can't be read ({error})."
    if listed is None:
        return whole, f"Boxes are those of {source}: {POSITIONS} is of a form that is not understood."
    base = _base(listed, {name: boxes for name, boxes in whole.items() if boxes})
    if base is None:
        return whole, f"Boxes are those of {source}, with which {POSITIONS} does not agree."
    shifted = {name: [(c - base, r - base, w, h) for c, r, w, h in boxes] for name, boxes in listed.items()}
    return shifted, f"Boxes are those of {POSITIONS}, counted from {base} as {source} show."


def _mask(path: str) -> np.ndarray | None:
    """(H, W) bool; None if it can't be read (which its row will tell)."""
    try:
        return read_mask(path, lossy=Path(path).suffix.lower() in (".jpg", ".jpeg"))
    except ZooError:
        return None


def _grey(path: str) -> np.ndarray | None:
    """Levels (H, W) of an 8-bit picture of boxes; None of another one."""
    try:
        image = read_image(path)
    except ZooError:
        return None
    image = image.max(axis=2) if image.ndim == 3 else image
    return image if image.dtype == np.uint8 else None


def _drawn(path: str) -> list[Box] | None:
    """Boxes of a picture that has white ones, filled or outlined, on black; None of another picture."""
    from scipy import ndimage

    grey = _grey(path)
    if grey is None or np.mean((grey > 64) & (grey < 192)) > BETWEEN or np.mean(grey > WHITE) > 0.5:
        return None
    filled = ndimage.binary_fill_holes(grey > WHITE)
    return [box for box in _boxes(ndimage.label(filled, np.ones((3, 3)))[0]) if min(box[2:]) >= SPECK] or None


def _boxes(labelled: np.ndarray) -> list[Box]:
    from scipy import ndimage

    return [(x.start, y.start, x.stop - x.start, y.stop - y.start) for y, x in ndimage.find_objects(labelled)]


def _listed(path: Path, names: list[str]) -> dict[str, list[Box]] | None:
    """The MATLAB file's boxes as they are counted there; None where its form is not one of those that are tried.

    One row of column, row, width and height for each image in the order of its names, the same with the image's number
    before it, a struct array of such fields, or a cell for each image with rows of them.
    """
    from scipy.io import loadmat

    for key, value in loadmat(path, squeeze_me=False).items():
        if key.startswith("__"):
            continue
        if value.dtype.names and {"col", "row", "width", "height"} <= set(value.dtype.names):
            fields = [value[field].ravel() for field in ("col", "row", "width", "height")]
            value = np.array([[np.asarray(x).item() for x in row] for row in zip(*fields, strict=True)])
        if value.dtype == object and value.size == len(names):
            cells = [np.asarray(cell, float).reshape(-1, 4) for cell in value.ravel()]
        elif value.dtype.kind in "iuf" and value.shape == (len(names), 4):
            cells = list(value[:, None].astype(float))
        elif value.dtype.kind in "iuf" and value.ndim == 2 and value.shape[1] == 5:
            numbers = [int(Path(name).stem.rsplit("_", 1)[-1]) for name in names]
            if not set(value[:, 0]) <= set(numbers):
                continue
            cells = [value[value[:, 0] == number, 1:].astype(float) for number in numbers]
        else:
            continue
        if all(np.isfinite(cell).all() for cell in cells):
            return {n: [tuple(map(round, b)) for b in c.tolist()] for n, c in zip(names, cells, strict=True)}
    return None


def _base(listed: dict[str, list[Box]], known: dict[str, list[Box]]) -> int | None:
    """0 or 1, from which corners are counted, measured on boxes that are known; None if they are others."""
    hulls = [(_hull(listed[name]), _hull(known[name])) for name in known if listed[name]]
    if not hulls:
        return None
    base = float(np.median([np.subtract(ours, theirs) for ours, theirs in hulls]))
    overlaps = [_overlap([value - base for value in ours], theirs) for ours, theirs in hulls]
    return int(base) if base in (0, 1) and np.median(overlaps) >= AGREE else None


def _hull(boxes: list[Box]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what holds all boxes."""
    left, top, *_ = map(min, zip(*boxes, strict=True))
    return left, top, max(c + w for c, _, w, _ in boxes), max(r + h for _, r, _, h in boxes)


def _overlap(a: list[float], b: tuple[int, int, int, int]) -> float:
    """Intersection over union of two hulls."""
    both = max(min(a[2], b[2]) - max(a[0], b[0]), 0) * max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return both / max(sum(areas) - both, 1e-9)
