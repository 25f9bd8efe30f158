"""Procedural SEM images of a metal layer, with three kinds of defects and their exact masks.

For tests, the quickstart and machines without data. Everything is a function of (seed, index): an image with a defect
equals its normal twin in each pixel outside of the mask. Lines are signed distance fields, so that ends, gaps and
bridges get the same bright edge and the same shadow.
"""

from __future__ import annotations

import difflib
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from scipy.ndimage import binary_closing, binary_fill_holes, find_objects, gaussian_filter, gaussian_filter1d

from zoo.errors import ZooError

if TYPE_CHECKING:
    import datasets

KINDS = ("particle", "scratch", "bridge")
DEFAULTS = {"train": 100, "good": 30, "defect": 30, "size": 256, "seed": 0}
MIN_SIZE = 32  # pixels; below it the lines are thinner than their edges

_TEST_START = 1 << 32  # test indices begin here, train indices at 0
_CONSEQUENCE = 5.0  # grey levels: smaller changes drown in the shot noise (4 to 7) and stay out of the mask


def render(index: int, seed: int = 0, size: int = 256, kind: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One image of parallel metal lines, brighter than their ground, with shot noise.

    Args:
        index: which image of the stream; not negative.
        seed: which stream; not negative.
        size: side of the square image in pixels, at least 32.
        kind: one of `KINDS`, or None for a normal image.

    Returns:
        image (size, size) uint8 and mask (size, size) bool. The mask holds the changed pixels, with holes and
        cracks filled, and is empty for normal images only.

    Raises:
        ZooError: an unknown kind, or a value out of range.
    """
    if kind is not None and kind not in KINDS:
        raise ZooError(f"unknown defect kind {kind!r}{_nearest(kind, KINDS)}; the kinds are {', '.join(KINDS)}")
    if index < 0 or seed < 0 or size < MIN_SIZE:
        raise ZooError(
            f"synthetic data needs index >= 0, seed >= 0 and size >= {MIN_SIZE}; got {index}, {seed}, {size}"
        )
    streams = np.random.SeedSequence([seed, index]).spawn(3)
    layout_rng, noise_rng, defect_rng = map(np.random.default_rng, streams)

    layout = _Layout(layout_rng, size)
    clean = layout.shade(layout.distance)
    noise = noise_rng.standard_normal((size, size), dtype=np.float32)
    image = _expose(clean, noise)
    mask = np.zeros((size, size), bool)
    if kind is not None:
        changed = _DEFECTS[kind](clean, layout, defect_rng)
        change = np.abs(changed - clean)
        mask = change > min(_CONSEQUENCE, change.max() / 2)  # never empty
        window = find_objects(mask.view(np.uint8))[0]
        mask[window] = binary_fill_holes(mask[window] | binary_closing(mask[window]))
        image[mask] = _expose(changed[mask], noise[mask])
    if layout.horizontal:
        image, mask = image.T, mask.T
    return np.ascontiguousarray(image), np.ascontiguousarray(mask)


def load_synthetic(
    train: int = 100, good: int = 30, defect: int = 30, size: int = 256, seed: int = 0
) -> datasets.DatasetDict:
    """The generator as a data set: splits train and test, columns image, mask, label, path.

    Rows are rendered when they are read, so memory does not depend on the counts. `image` is a (size, size) uint8
    array, `mask` a (size, size) bool array or None for normals, `path` a name such as "test/scratch/00012.png".

    Args:
        train: normal images to train on.
        good: normal images to test on; no image of train is among them.
        defect: images with a defect to test on; the kinds alternate.
        size: side of the images in pixels.
        seed: which stream of images.

    Raises:
        ZooError: a count that is not positive, a size below 32 or a negative seed.
    """
    for key, value in {"train": train, "good": good, "defect": defect, "size": size, "seed": seed}.items():
        _check_option(key, value)
    import datasets

    kinds = [KINDS[i % len(KINDS)] for i in range(defect)]
    rows = {
        "train": [(i, None, f"train/good/{i:05d}.png") for i in range(train)],
        "test": [(_TEST_START + i, None, f"test/good/{i:05d}.png") for i in range(good)]
        + [(_TEST_START + good + i, kind, f"test/{kind}/{i:05d}.png") for i, kind in enumerate(kinds)],
    }
    # What is stored is the recipe of each row; the transform turns it into pixels under the same column names.
    features = datasets.Features(
        image=datasets.Value("int64"),
        mask=datasets.Value("string"),
        label=datasets.ClassLabel(names=["normal", "anomalous"]),
        path=datasets.Value("string"),
    )
    transform = partial(_render_rows, seed=seed, size=size)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [index for index, _, _ in items],
                    "mask": [kind for _, kind, _ in items],
                    "label": [int(kind is not None) for _, kind, _ in items],
                    "path": [path for _, _, path in items],
                },
                features=features,
            ).with_transform(transform)
            for split, items in rows.items()
        }
    )


def parse_options(text: str) -> dict[str, int]:
    """Options of `load_synthetic` from "train=100,size=128"; an empty text gives none.

    Raises:
        ZooError: an unknown or repeated key, or a value that is no integer or out of range.
    """
    options: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (item.strip() for item in part.partition("="))
        if key not in DEFAULTS:
            raise ZooError(
                f"synthetic data has no option {key!r}{_nearest(key, DEFAULTS)}; the options are {', '.join(DEFAULTS)}"
            )
        if key in options:
            raise ZooError(f"synthetic option {key!r} is given twice; keep one of them")
        try:
            options[key] = int(value)
        except ValueError:
            raise ZooError(f"synthetic option {key!r} is {value!r}; write an integer such as {DEFAULTS[key]}") from None
        _check_option(key, options[key])
    return options


def _check_option(key: str, value: int) -> None:
    low = {"seed": 0, "size": MIN_SIZE}.get(key, 1)
    if value < low:
        raise ZooError(f"synthetic option {key!r} is {value}; it must be at least {low}")


def _nearest(word: str, words) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _render_rows(batch: dict[str, list], seed: int, size: int) -> dict[str, list]:
    """The transform of the data set; `batch` holds the recipes of some or all columns."""
    if "image" not in batch:
        return batch
    kinds = batch.get("mask", [None] * len(batch["image"]))
    pairs = [render(index, seed, size, kind) for index, kind in zip(batch["image"], kinds, strict=True)]
    rows = dict(batch, image=[image for image, _ in pairs])
    if "mask" in batch:
        rows["mask"] = [mask if kind else None for (_, mask), kind in zip(pairs, kinds, strict=True)]
    return rows


class _Layout:
    """Vertical lines of one image: geometry as a signed distance (negative inside), and how it is shaded."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.size = size
        self.unit = max(size / 256, 0.5)  # widths of edges and blur are given for 256 pixels
        self.horizontal = rng.random() < 0.5
        pitch = max(size / 10 * np.exp(rng.normal(0, 0.22)), 6.0)
        fill = rng.uniform(0.42, 0.62)

        centres, halves = [], []
        x = -rng.uniform(0, pitch)
        while x < size + pitch:
            wide = rng.uniform(1.6, 2.8) if rng.random() < 0.12 else rng.uniform(0.92, 1.08)
            width, space = pitch * fill * wide, pitch * (1 - fill) * rng.uniform(0.92, 1.12)
            centres.append(x + width / 2)
            halves.append(width / 2)
            x += width + space
        self.centres, self.halves = np.array(centres), np.array(halves)

        self.distance = np.empty((size, size), np.float32)
        level = np.empty(size, np.float32)
        levels = 1 + rng.normal(0, 0.025, len(centres))
        right_edges = self.centres + self.halves
        borders = (right_edges[:-1] + (self.centres - self.halves)[1:]) / 2
        stops = np.clip(np.ceil(np.append(borders, size)), 0, size).astype(int)
        gap_rate = rng.choice([0.0, 0.15, 0.4, 0.7])
        start = 0
        for i, stop in enumerate(stops):
            gaps = self._gaps(rng, pitch) if rng.random() < gap_rate else []
            wander = rng.standard_normal((2, size), dtype=np.float32)
            wander = gaussian_filter1d(wander, 4 * self.unit, axis=1) * (0.8 * self.unit)
            if stop > start:  # (S, columns nearest to line i)
                columns = np.arange(start, stop, dtype=np.float32)[None]
                self.distance[:, start:stop] = self._line(columns, i, gaps, wander)
                level[start:stop] = levels[i]
            start = max(start, stop)

        self.ground, self.metal = rng.uniform(46, 60), rng.uniform(112, 130)
        self.edge = rng.uniform(26, 46)
        self.blur = rng.uniform(0.6, 1.0) * self.unit
        tilt = rng.normal(0, 0.035, 2)
        ramp = np.linspace(-1, 1, size, dtype=np.float32)
        waves = np.cos(np.pi / 2 * np.outer(np.arange(4), ramp + 1)).astype(np.float32)  # (4, S)
        field = waves.T @ rng.normal(0, 0.012, (4, 4)).astype(np.float32) @ waves  # (S, S), slow charging
        tilt = tilt.astype(np.float32)
        self.light = rng.uniform(0.93, 1.07) * (1 + tilt[0] * ramp[:, None] + tilt[1] * ramp + field)
        self.level = level

    def _gaps(self, rng: np.random.Generator, pitch: float) -> list[tuple[float, float]]:
        """One or two breaks along a line, as (centre, half length); what is left between two is no mere dot."""
        first, apart = rng.uniform(0, self.size), rng.uniform(3.5, 9) * pitch
        return [(first + k * apart, rng.uniform(0.2, 0.9) * pitch) for k in range(rng.integers(1, 3))]

    def _line(self, columns: np.ndarray, i: int, gaps: list, wander: np.ndarray) -> np.ndarray:
        """Signed distance to line i with rough edges and round ends, (S, columns)."""
        half = self.halves[i]
        shift, swell = wander[0][:, None], wander[1][:, None] * 0.5
        across = np.abs(columns - np.float32(self.centres[i]) - shift) - np.float32(half) - swell
        if not gaps:
            return across
        rows = np.arange(self.size, dtype=np.float32)
        along = np.max([length - np.abs(rows - centre) for centre, length in gaps], axis=0)[:, None]
        radius = np.float32(half * 0.85)
        corner = np.hypot(np.maximum(across + radius, 0), np.maximum(along + radius, 0))
        return corner + np.minimum(np.maximum(across + radius, along + radius), 0) - radius

    def shade(self, distance: np.ndarray, window: tuple[slice, slice] = np.s_[:, :]) -> np.ndarray:
        """Grey levels before noise: metal on ground, bright inner edge, dark shadow beside it."""
        d = distance[window] / np.float32(self.unit)
        inside = _sigmoid(d * np.float32(-2.2))
        grey = self.ground + (self.metal * self.level[window[1]] - self.ground) * inside
        grey += np.float32(self.edge) * np.exp(-np.square(d + np.float32(1.4)) / np.float32(3.4))
        grey -= np.float32(11) * np.exp(-np.abs(d - np.float32(1.5)) / np.float32(3.0)) * (1 - inside)
        return gaussian_filter(grey * self.light[window], self.blur, truncate=2.5)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _expose(clean: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Shot noise (its variance grows with the signal) and 8 bits."""
    grey = np.maximum(clean, 0)
    return np.clip(np.rint(grey + noise * np.sqrt(0.35 * grey + 4)), 0, 255).astype(np.uint8)


def _particle(clean: np.ndarray, layout: _Layout, rng: np.random.Generator) -> np.ndarray:
    """An irregular grain with a bright rim and texture, lying on lines and ground, with a faint shadow."""
    size, unit = layout.size, layout.unit
    radius = max(size * np.exp(rng.uniform(np.log(0.011), np.log(0.075))), 1.8)
    reach = int(np.ceil(radius * 2 + 5 * unit))
    cy, cx = rng.uniform(0.06 * size, 0.94 * size, 2)
    top, left = max(int(cy) - reach, 0), max(int(cx) - reach, 0)
    window = np.s_[top : min(int(cy) + reach + 1, size), left : min(int(cx) + reach + 1, size)]
    y, x = np.mgrid[window].astype(np.float32)
    y, x = y - np.float32(cy), x - np.float32(cx)

    angle, outline = np.arctan2(y, x), np.float32(1)
    for order, strength in enumerate((0.16, 0.10, 0.07, 0.05), start=2):
        outline = outline + np.float32(rng.normal(0, strength)) * np.cos(order * angle + rng.uniform(0, 2 * np.pi))
    d = (np.hypot(y, x) - np.float32(radius) * np.clip(outline, 0.5, 1.7)) / np.float32(unit)
    inside = _sigmoid(d * np.float32(-2.5))
    texture = gaussian_filter(rng.standard_normal(d.shape, dtype=np.float32), max(radius * 0.16, 0.7))
    texture *= np.float32(rng.uniform(3, 11) / (texture.std() + 1e-6))

    under = clean[window]
    contrast = rng.uniform(22, 75) * (1 if rng.random() < 0.7 else -1)
    body = np.float32(under[d < 0].mean() if (d < 0).any() else under.mean()) + np.float32(contrast)
    lit = np.float32(0.12 * abs(contrast) / max(radius, 1)) * -(x + y)  # brighter towards the detector
    rim = np.float32(rng.uniform(0.2, 0.9) * abs(contrast)) * np.exp(-np.square(d + np.float32(1.2)) / np.float32(3))
    grain = np.clip(body + texture + lit, 12, 215) + rim
    shadow = 1 - np.float32(rng.uniform(0, 0.25)) * np.exp(-np.maximum(d, 0) / np.float32(1.5))
    changed = clean.copy()
    changed[window] = np.clip(under * shadow * (1 - inside) + grain * inside, 8, 235)
    return changed


def _scratch(clean: np.ndarray, layout: _Layout, rng: np.random.Generator) -> np.ndarray:
    """A thin, slightly bent groove (dark) or ridge (bright), fading at both ends, of uneven depth."""
    size, unit = layout.size, layout.unit
    half = size * rng.uniform(0.08, 0.42)
    width = float(rng.uniform(0.6, 1.7) * unit)
    angle = rng.uniform(0, np.pi)
    cy, cx = rng.uniform(0.22 * size, 0.78 * size, 2)
    bend = half * rng.uniform(-0.22, 0.22)
    contrast = rng.uniform(22, 80) * (1 if rng.random() < 0.5 else -1)
    steps = 64
    depth = 1 + 0.55 * gaussian_filter1d(rng.standard_normal(steps), 2.0, mode="nearest") * 2
    sway = gaussian_filter1d(rng.standard_normal(steps), 5.0, mode="nearest") * 2.5 * unit
    ends = np.minimum(1, 6 * (1 - np.abs(np.linspace(-1, 1, steps))))

    y, x = np.ogrid[:size, :size]
    y, x = (y - cy).astype(np.float32), (x - cx).astype(np.float32)
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    u = (x * cos + y * sin) / np.float32(half)  # -1 to 1 along the scratch
    v = y * cos - x * sin  # pixels across it
    near = (np.abs(u) < 1) & (np.abs(v) < abs(bend) + 14 * unit)
    u, v = u[near], v[near]
    node = (u + 1) * 0.5 * (steps - 1)
    offset = v - np.float32(bend) * (1 - np.square(u)) - np.interp(node, np.arange(steps), sway)
    strength = np.interp(node, np.arange(steps), np.clip(depth, 0.35, 1.6) * ends)
    changed = clean.copy()
    groove = contrast * strength * np.exp(-np.square(offset / width) / 2)
    side = -0.25 * contrast * strength * np.exp(-np.square((offset - 2.2 * width) / width) / 2)  # material pushed aside
    changed[near] = np.clip(clean[near] + groove + side, 10, 235)
    return changed


def _bridge(clean: np.ndarray, layout: _Layout, rng: np.random.Generator) -> np.ndarray:
    """Line material across the space between two neighbours: a short, from a hair to a full blob, whole or faint."""
    size, unit = layout.size, layout.unit
    left = layout.centres[:-1] + layout.halves[:-1]
    right = layout.centres[1:] - layout.halves[1:]
    pairs = np.flatnonzero((left > 2) & (right < size - 3))
    i = rng.choice(pairs)
    columns = np.clip(np.rint(layout.centres[i : i + 2]), 0, size - 1).astype(int)
    solid = (layout.distance[:, columns] < -1).all(axis=1)  # rows where both lines are unbroken
    solid[: size // 16] = solid[-(size // 16) :] = False
    row = int(rng.choice(np.flatnonzero(solid))) if solid.any() else size // 2

    gap = right[i] - left[i]
    thinnest, thickest = 1.1 * unit, max(0.55 * gap, 1.6 * unit)
    thickness = float(np.exp(rng.uniform(np.log(thinnest), np.log(thickest))))  # half, at the waist
    flare = rng.uniform(0.0, 0.5)  # wider where it meets the lines
    slant = rng.uniform(-0.25, 0.25)
    reach = int(2 * thickness + 0.3 * gap + 12 * unit)
    window = np.s_[max(row - reach, 0) : min(row + reach, size), columns[0] : columns[1] + 1]
    y, x = np.ogrid[window]
    y, x = y.astype(np.float32), (x.astype(np.float32) - float(left[i] + right[i]) / 2) / float(gap / 2)  # x: -1 to 1
    ragged = gaussian_filter1d(rng.standard_normal((2, x.size), dtype=np.float32), 2 * unit, axis=1) * unit
    middle = float(row) + slant * float(gap / 2) * x + ragged[0]
    waist = thickness * (1 + flare * np.square(x)) + ragged[1] * 0.6
    material = np.abs(y - middle) - waist
    material = np.where(np.abs(x) < 1 + 4 * unit / float(gap), material, np.float32(1e3))

    joined = layout.distance.copy()
    joined[window] = np.minimum(joined[window], material)
    strength = rng.uniform(0.45, 1.0)  # residue of less height looks fainter
    changed = clean.copy()
    changed[window] += strength * (layout.shade(joined, window) - layout.shade(layout.distance, window))
    return changed


_DEFECTS = {"particle": _particle, "scratch": _scratch, "bridge": _bridge}
