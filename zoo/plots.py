"""Pictures: heatmap overlays on a scale that the held-out normals fix, masks, and the paper's Figure 1."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from PIL import Image
from skimage.segmentation import find_boundaries

from zoo.calibration import Calibration
from zoo.regions import region_mask

COLOURS = colormaps["inferno"]  # perceptually uniform
ROWS = 256  # coloured at once: colours take 32 bytes a pixel


def grey8(image: np.ndarray) -> np.ndarray:
    """An image (H, W) or (H, W, 3) of any depth as uint8 (H, W, 3), for display: its full scale, never stretched."""
    scale = {"uint8": 1, "uint16": 1 / 257, "float32": 255}[image.dtype.name]
    view = np.clip(image * scale, 0, 255).astype(np.uint8)
    return view if view.ndim == 3 else np.repeat(view[..., None], 3, axis=2)


def heat(map: np.ndarray, calibration: Calibration | None) -> np.ndarray:
    """A raw map (H, W) on [0, 1]: 0 at the median normal pixel, 0.5 at the pixel threshold.

    Without calibration there is no scale that images share, so the map's own range is taken.
    """
    if calibration is None:
        low, high = float(map.min()), float(map.max())
    else:
        low = calibration.pixel_median
        high = low + 2 * (calibration.pixel_threshold - low)
    return np.clip((map - low) / max(high - low, 1e-12), 0, 1)


def overlay(image: np.ndarray, map: np.ndarray, calibration: Calibration | None, opacity: float = 0.6) -> np.ndarray:
    """Heatmap over the image, uint8 (H, W, 3): the hotter, the more opaque."""
    level = heat(map, calibration)
    pixels = grey8(image).copy()  # (H, W, 3)
    for first in range(0, len(map), ROWS):
        rows = slice(first, first + ROWS)
        colour = COLOURS(level[rows])[..., :3] * 255
        weight = opacity * level[rows, :, None]
        pixels[rows] = (1 - weight) * pixels[rows] + weight * colour
    return pixels


def mask(map: np.ndarray, calibration: Calibration) -> np.ndarray:
    """Pixels of regions at or above the pixel threshold, bool (H, W)."""
    return region_mask(map, calibration.pixel_threshold, calibration.min_area)


def outline(image: np.ndarray, region: np.ndarray, colour: Sequence[int] = (0, 200, 255)) -> np.ndarray:
    """The image as uint8 (H, W, 3) with a line around a region (H, W)."""
    view = grey8(image).copy()
    view[find_boundaries(region, mode="outer")] = colour
    return view


def save_png(path: Path, array: np.ndarray) -> None:
    """Write uint8 or bool pixels under a temporary name and rename."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    Image.fromarray(array.astype(np.uint8) * 255 if array.dtype == bool else array).save(temporary, format="png")
    temporary.replace(path)


def figure1(rows: Sequence[dict[str, Any]], calibration: Calibration, path: Path) -> None:
    """The paper's Figure 1: one row a defect with a normal image, the defect outlined, heatmap and predicted mask.

    Args:
        rows: dicts with `normal`, `defective` (H, W), `truth` (H, W) bool, `map` (H, W), and `label`, set beside.
        calibration: fixes colour scale and mask threshold.
        path: PNG to write.
    """
    titles = ("normal", "defective, outlined", "heatmap", "predicted mask")
    figure = Figure(figsize=(8, 2.1 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 4, squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        shown = (
            grey8(row["normal"]),
            outline(row["defective"], row["truth"]),
            overlay(row["defective"], row["map"], calibration),
            mask(row["map"], calibration),
        )
        for axis, picture in zip(line, shown, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=1 if picture.dtype == bool else 255)
            axis.set(xticks=[], yticks=[], frame_on=False)
        line[0].set_ylabel(row["label"], fontsize=10)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    _save_figure(figure, path)


def figure2(rows: Sequence[tuple[str, bool, dict[str, tuple[float, float | None]]]], path: Path, title: str) -> None:
    """The paper's Figure 2: bars of F1 by method, of images and of pixels, with the spread over seeds.

    Args:
        rows: name, whether it is our own figure (the paper's are hatched), and by key mean and deviation, of which
            `image_f1_max` and `pixel_f1_max` are drawn, where they are there.
        path: PNG to write.
        title: which reading of the test set it shows.
    """
    figure = Figure(figsize=(max(4.5, 1.5 + 0.75 * len(rows)), 4.6), layout="constrained")
    axis = figure.subplots()
    for offset, (key, label) in enumerate((("image_f1_max", "image"), ("pixel_f1_max", "pixel"))):
        for place, (_, own, values) in enumerate(rows):
            if key not in values:
                continue
            mean, deviation = values[key]
            axis.bar(
                place + 0.4 * offset - 0.2,
                mean,
                0.38,
                yerr=deviation,
                color=COLOURS(0.35 + 0.4 * offset),
                hatch=None if own else "//",
                alpha=1 if own else 0.5,
                label=label if own and label not in axis.get_legend_handles_labels()[1] else None,
                capsize=3,
            )
    axis.set_xticks(range(len(rows)), [name for name, *_ in rows], rotation=40, ha="right")
    axis.set_xlim(-0.6, len(rows) - 0.4)
    axis.set_ylabel("F1 at its best threshold")
    axis.set_ylim(0, 1)
    axis.set_title(textwrap.fill(title, int(11 * figure.get_figwidth())), fontsize=9)
    figure.legend(loc="outside upper left", ncols=2, frameon=False)
    _save_figure(figure, path)


def _save_figure(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)
