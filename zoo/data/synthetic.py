"""Procedural SEM images of a chip's metal layer, with seven kinds of defects and their exact masks.

For tests, the quickstart and machines without data. Everything is a function of (seed, index): an image with a defect
equals its normal twin in each pixel outside of the mask. The layout (`zoo.data.layout`) becomes a signed distance
field, so that ends, gaps and bridges get the same bright edge, the same shadow and the same focus.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_closing, binary_fill_holes, gaussian_filter, gaussian_filter1d
from scipy.special import ndtri

from zoo.data.layout import Bar, Rules, Via, route
from zoo.errors import ZooError

if TYPE_CHECKING:
    import datasets

KINDS = ("particle", "scratch", "bridge", "open", "mousebite", "missing_via", "stain")
STYLES = ("metal", "fine")
DEFAULTS = {
    "train": 100,
    "good": 30,
    "defect": 30,
    "size": 256,
    "seed": 0,
    "style": "metal",
    "bits": 8,
    "bar": 0,
}
MIN_SIZE = 32  # pixels; below it the lines are thinner than their edges
FIELD = {"metal": 2000, "fine": 1000}  # nm from side to side of images of 128 pixels or more

Window = tuple[slice, slice]

_CHOICES = {"style": STYLES, "bits": (8, 16), "bar": (0, 1)}
_NOMINAL = 512  # pixels: lengths of the look are given for images of this side
_SMALLEST = 128  # images of a smaller side show a part of the field instead of ever thinner lines
_TEST_START = 1 << 32  # test indices begin here, train indices at 0
_CONSEQUENCE = 5.0  # grey levels: smaller changes drown in the shot noise (3 to 8) and stay out of the mask
_REACH = 16.0  # nominal pixels: no edge is seen from farther away
_STRIP = 64  # rows shaded at a time: what stays in the cache costs less
_FINE = 16  # entries of an edge profile a nominal pixel


def render(
    index: int,
    seed: int = 0,
    size: int = 256,
    kind: str | None = None,
    style: str = "metal",
    bits: int = 8,
    bar: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One image of a routed metal layer, grey lines with bright edges on a darker ground.

    Args:
        index: which image of the stream; not negative.
        seed: which stream; not negative.
        size: side of the square image in pixels, at least 32.
        kind: one of `KINDS`, or None for a normal image.
        style: one of `STYLES`: "fine" has a finer pitch and less contrast.
        bits: 8, or 16 for the same scene with 257 times as many levels.
        bar: whether an info bar with a scale covers the bottom twelfth; the image above it stays the same.

    Returns:
        image (size, size) uint8 or uint16 and mask (size, size) bool. The mask holds the changed pixels, with holes
        and cracks filled, and is empty for normal images only.

    Raises:
        ZooError: an unknown kind, style or number of bits, or a value out of range.
    """
    if kind is not None and kind not in KINDS:
        raise ZooError(f"unknown defect kind {kind!r}{_nearest(kind, KINDS)}; the kinds are {', '.join(KINDS)}")
    for key, value in {"style": style, "bits": bits, "bar": bar}.items():
        _check_option(key, value)
    if index < 0 or seed < 0 or size < MIN_SIZE:
        raise ZooError(
            f"synthetic data needs index >= 0, seed >= 0 and size >= {MIN_SIZE}; got {index}, {seed}, {size}"
        )
    scene = _Scene(index, seed, size, style)
    clean = scene.develop()
    image = scene.expose(clean, bits)
    mask = np.zeros((size, size), bool)
    if kind is not None:
        window, changed = _DEFECTS[kind](scene, clean)
        change = np.abs(changed - clean[window])
        found = change > min(_CONSEQUENCE, change.max() / 2)  # never empty
        found = binary_fill_holes(found | binary_closing(found))
        clean[window] = changed
        image[window] = np.where(found, scene.expose(clean, bits, window), image[window])
        mask[window] = found
    if bar:
        height = size // 12
        image[-height:] = _info_bar(size, height, FIELD[style] / (_NOMINAL * scene.scale), scene.look.noise, bits)
        mask[-height:] = False
    return image, mask


def load_synthetic(
    train: int = 100,
    good: int = 30,
    defect: int = 30,
    size: int = 256,
    seed: int = 0,
    style: str = "metal",
    bits: int = 8,
    bar: int = 0,
) -> datasets.DatasetDict:
    """The generator as a data set: splits train and test, columns image, mask, label, path.

    Rows are rendered when they are read, so memory does not depend on the counts. `image` is a (size, size) uint8 (or
    uint16) array, `mask` a (size, size) bool array or None for normals, `path` a name such as "test/scratch/00012.png".

    Args:
        train: normal images to train on.
        good: normal images to test on; no image of train is among them.
        defect: images with a defect to test on; the kinds alternate.
        size: side of the images in pixels.
        seed: which stream of images.
        style, bits, bar: as in `render`.

    Raises:
        ZooError: a count that is not positive, a size below 32, a negative seed, an unknown style or number of bits.
    """
    counts = {"train": train, "good": good, "defect": defect}
    look = {"size": size, "seed": seed, "style": style, "bits": bits, "bar": bar}
    for key, value in (counts | look).items():
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
    transform = partial(_render_rows, **look)
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


def parse_options(text: str) -> dict[str, int | str]:
    """Options of `load_synthetic` from "train=100,size=128,style=fine"; an empty text gives none.

    Raises:
        ZooError: an unknown or repeated key, or a value that is of no use for it.
    """
    options: dict[str, int | str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (item.strip() for item in part.partition("="))
        if key not in DEFAULTS:
            raise ZooError(
                f"synthetic data has no option {key!r}{_nearest(key, DEFAULTS)}; the options are {', '.join(DEFAULTS)}"
            )
        if key in options:
            raise ZooError(f"synthetic option {key!r} is given twice; keep one of them")
        try:
            options[key] = type(DEFAULTS[key])(value)
        except ValueError:
            raise ZooError(f"synthetic option {key!r} is {value!r}; write an integer such as {DEFAULTS[key]}") from None
        _check_option(key, options[key])
    return options


def _check_option(key: str, value: int | str) -> None:
    if key in _CHOICES:
        known = [str(item) for item in _CHOICES[key]]
        if value not in _CHOICES[key]:
            near = _nearest(str(value), known)
            raise ZooError(f"synthetic option {key!r} is {value!r}{near}; it must be one of {', '.join(known)}")
        return
    low = {"seed": 0, "size": MIN_SIZE}.get(key, 1)
    if value < low:
        raise ZooError(f"synthetic option {key!r} is {value}; it must be at least {low}")


def _nearest(word: str, words) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _render_rows(batch: dict[str, list], **look: Any) -> dict[str, list]:
    """The transform of the data set; `batch` holds the recipes of some or all columns."""
    if "image" not in batch:
        return batch
    kinds = batch.get("mask", [None] * len(batch["image"]))
    pairs = [render(index, kind=kind, **look) for index, kind in zip(batch["image"], kinds, strict=True)]
    rows = dict(batch, image=[image for image, _ in pairs])
    if "mask" in batch:
        rows["mask"] = [mask if kind else None for (_, mask), kind in zip(pairs, kinds, strict=True)]
    return rows


@dataclass(frozen=True)
class _Style:
    """What distinguishes a style; ranges are (low, high), lengths in nominal pixels, levels of 0 to 255."""

    pitch: tuple[float, float] = (41.0, 61.0)
    fill: tuple[float, float] = (0.54, 0.67)
    ground: tuple[float, float] = (47.0, 69.0)
    metal: tuple[float, float] = (56.0, 78.0)  # above the ground
    edge: tuple[float, float] = (50.0, 76.0)  # above the metal
    shadow: tuple[float, float] = (4.0, 14.0)  # below the ground
    decay: tuple[float, float] = (2.4, 4.6)
    focus: tuple[float, float] = (1.0, 1.7)
    via: tuple[float, float] = (42.0, 60.0)
    noise: tuple[float, float] = (0.12, 0.34)  # variance of the shot noise per level


_LOOKS = {
    "metal": _Style(),
    "fine": _Style(
        pitch=(19.0, 34.0),
        fill=(0.42, 0.56),
        ground=(78.0, 100.0),
        metal=(34.0, 52.0),
        edge=(30.0, 56.0),
        shadow=(6.0, 16.0),
        decay=(1.6, 2.6),
        focus=(0.8, 1.3),
        via=(-44.0, -20.0),
        noise=(0.2, 0.6),
    ),
}


class _Even:
    """Numbers in [0, 1), one after the other: each is spread evenly over the images of any run of indices.

    The additive recurrence of Richtmyer: number n of image i is (offset_n + i sqrt(prime_n)) mod 1. So small sets
    have as much variety as large ones, and the looks of two sets differ little by chance.
    """

    PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)

    def __init__(self, index: int, seed: int):
        offsets = np.random.default_rng([seed, 1]).random(len(self.PRIMES))
        self.numbers = iter((offsets + index * (np.sqrt(self.PRIMES) % 1)) % 1)

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        return low + (high - low) * float(next(self.numbers))


class _Look:
    """The values of one image: how its layout is drawn, lit and recorded; lengths in pixels of the image."""

    def __init__(self, even: _Even, style: _Style, scale: float, field: float):
        self.pitch = min(np.exp(even(*np.log(style.pitch))), 0.36 * field) * scale
        self.axis = int(even() < 0.5)
        self.fill = even(*style.fill)
        self.ground = even(*style.ground)
        self.metal = even(*style.metal)
        self.edge = even(*style.edge)
        self.shadow = even(*style.shadow)
        self.decay = even(*style.decay)
        self.focus = even(*style.focus)
        self.via = even(*style.via)
        self.noise = even(*style.noise) * min(scale, 1.0)  # a larger pixel gathers more electrons
        self.density, self.character = even(), even()
        self.gain = even(0.92, 1.08)
        self.tilt = even(-0.006, 0.006)  # rotation of the stage, radians
        self.rough = even(0.15, 0.4) * scale
        self.smear = even(-0.4, 0.4)  # which side of a line is brighter
        self.uneven = even()
        self.via_size = even(0.64, 0.8)

    def rules(self, rng: np.random.Generator) -> Rules:
        """Design rules: from long parallel lines to short pieces with many corners."""
        kind = self.character
        return Rules(
            pitch=self.pitch,
            fill=self.fill,
            skip=0.01 + 0.12 * self.density**2,
            reach=(3.5 if kind < 0.1 else 7.0 if kind < 0.6 else 30.0) * np.exp(rng.normal(0, 0.25)),
            bends=int(rng.poisson(4)) * (kind < 0.75),
            dumbbells=int(rng.poisson(4)) * (0.05 < kind < 0.3),
            power=int(rng.random() < 0.35),
            hollow=float(rng.random() < 0.25) * rng.uniform(0.06, 0.2),
            via=self.via_size,
            uneven=self.uneven,
        )


def _between(size: int, nodes: int) -> np.ndarray:
    """Linear interpolation from nodes to pixels (size, nodes)."""
    place = np.linspace(0, nodes - 1, size)[:, None] - np.arange(nodes)
    return np.maximum(1 - np.abs(place), 0).astype(np.float32)


@lru_cache(maxsize=8)
def _grid(size: int, nodes: int) -> tuple[np.ndarray, np.ndarray]:
    """Linear interpolation from nodes to pixels (size, nodes), and a Gaussian over nodes (nodes, nodes)."""
    apart = np.subtract.outer(np.arange(nodes), np.arange(nodes))
    near = np.exp(-np.square(apart / 6.0) / 2)
    return _between(size, nodes), (near / near.sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=1)
def _normal() -> np.ndarray:
    """Normally distributed numbers by their 16-bit rank: five times as fast as drawing them."""
    return ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)


class _Scene:
    """One image before its defect: geometry as a signed distance in nominal pixels (negative inside), look and noise.

    Attributes:
        distance: (S, S) float32, at most `_REACH`.
        contrast: (S, S) float32, metal above ground.
        grain: (S, S) uint16, the noise.
        defect: random stream of the defect.
    """

    def __init__(self, index: int, seed: int, size: int, style: str):
        streams = np.random.SeedSequence([seed, index]).spawn(4)
        layout, look, noise, self.defect = (np.random.Generator(np.random.SFC64(stream)) for stream in streams)
        self.size = size
        self.scale = max(size / _NOMINAL, _SMALLEST / _NOMINAL)  # pixels a nominal pixel
        self.field = max(size, min(_SMALLEST, 3 * size // 2))  # pixels that the sizes of defects refer to
        self.look = _Look(_Even(index, seed), _LOOKS[style], self.scale, size / self.scale)
        self.bars, self.vias = route(layout, size, self.look.axis, self.look.rules(layout))
        self._draw(look)
        self._light(look)
        self.grain = noise.integers(0, 1 << 16, (size, size), dtype=np.uint16)  # ranks of a normal distribution

    def _draw(self, rng: np.random.Generator) -> None:
        size, look = self.size, self.look
        self.distance = np.full((size, size), _REACH, np.float32)
        self.contrast = np.full((size, size), look.metal, np.float32)
        rough = rng.standard_normal((2, 3 * size + 512), dtype=np.float32)
        wander = sum(
            gaussian_filter1d(row, length * self.scale) * length**0.7
            for row, length in zip(rough, (3, 14), strict=True)
        )
        wander *= look.rough / wander.std()
        for bar in self.bars:
            self._draw_bar(bar, wander, rng)
        jitter = rng.standard_normal(size, dtype=np.float32) * np.float32(rng.uniform(0.04, 0.2))
        for strip in _strips(size):
            self.distance[strip] -= jitter[strip, None] * _slope(self.distance[strip])

    def _draw_bar(self, bar: Bar, wander: np.ndarray, rng: np.random.Generator) -> None:
        """Signed distance to a bar with rough edges and round ends, joined to what is there."""
        size, margin, middle = self.size, _REACH * self.scale, self.size / 2
        turn = self.look.tilt if bar.axis == 0 else -self.look.tilt
        shift = -turn * (bar.centre - middle)
        start, stop = bar.start + shift, bar.stop + shift
        sway = abs(turn) * size / 2 + margin
        t0, t1 = max(int(start - margin), 0), min(int(stop + margin) + 1, size)
        c0, c1 = max(int(bar.centre - bar.half - sway), 0), min(int(bar.centre + bar.half + sway) + 1, size)
        starts = rng.integers(0, len(wander) - size, 2)
        if t0 >= t1 or c0 >= c1:
            return
        t = np.arange(t0, t1, dtype=np.float32)
        left, right = (wander[s : s + t1 - t0] for s in starts)
        centre = np.float32(bar.centre) + np.float32(turn) * (t - np.float32(middle)) + (left + right) / 2
        half = np.float32(bar.half) + (right - left) / 2
        along = np.abs(t - np.float32((start + stop) / 2)) - np.float32((stop - start) / 2)  # (T,)
        unit = np.float32(1 / self.scale)
        across = np.empty((t1 - t0, c1 - c0), np.float32, order="CF"[bar.axis])  # (T, C), as the image lies in memory
        np.subtract(np.arange(c0, c1, dtype=np.float32) * unit, (centre * unit)[:, None], out=across)
        np.abs(across, out=across)
        across -= (half * unit)[:, None]
        round_off = np.float32(bar.radius) * unit
        along *= unit
        tails = np.flatnonzero(along > -round_off)
        for tail in np.split(tails, np.flatnonzero(np.diff(tails) > 1) + 1):
            if tail.size:
                end = np.s_[tail[0] : tail[-1] + 1]
                a, b = across[end] + round_off, along[end, None] + round_off
                outer = np.hypot(np.maximum(a, 0), np.maximum(b, 0))
                across[end] = outer + np.minimum(np.maximum(a, b), 0) - round_off
        window = np.s_[t0:t1, c0:c1]
        distance, contrast = (field if bar.axis == 0 else field.T for field in (self.distance, self.contrast))
        inner = int(margin - 4 * self.scale)  # neighbours are farther away
        contrast[t0 + inner * (t0 > 0) : t1, c0 + inner * (c0 > 0) : c1] = self.look.metal * bar.level
        (_join if bar.joint else np.minimum)(distance[window], across, out=distance[window])

    def _light(self, rng: np.random.Generator) -> None:
        """Slow drift, darker ground between dense lines, faint texture, and rows that differ a little."""
        size = self.size
        nodes = min(int(size / self.scale / 4) + 1, size)
        up, near = _grid(size, nodes)
        pick = np.linspace(0, size - 1, nodes).astype(int)
        metal = (self.distance[np.ix_(pick, pick)] < 0).astype(np.float32)  # (N, N)
        ramp = np.linspace(-1, 1, nodes, dtype=np.float32)
        waves = np.cos(np.pi / 2 * np.outer(np.arange(3), ramp + 1)).astype(np.float32)  # (3, N)
        drift = waves.T @ rng.normal(0, 0.022, (3, 3)).astype(np.float32) @ waves
        charge = near @ (metal - metal.mean()) @ near.T * np.float32(rng.uniform(-0.14, 0.02))
        mottle = rng.standard_normal((nodes, nodes), dtype=np.float32) * np.float32(rng.uniform(0.008, 0.03))
        rows = gaussian_filter1d(rng.standard_normal(size, dtype=np.float32), 5 * self.scale) * 2
        rows += rng.standard_normal(size, dtype=np.float32)
        self.rows = 1 + rows[:, None] * np.float32(rng.uniform(0.001, 0.006))  # (S, 1)
        self.smooth = (drift + charge + mottle) @ up.T  # (N, S)

    @cached_property
    def profiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Over the distance to an edge, -_REACH to _REACH: share of metal, and what edge and shadow add; in focus."""
        look, d = self.look, np.arange(-_REACH * _FINE, _REACH * _FINE + 1) / _FINE
        bright = np.exp(np.minimum(d, 0) / look.decay) * (d < 0) * look.edge
        dark = np.exp(-np.maximum(d, 0) / (1.7 * look.decay)) * (d >= 0) * look.shadow * (1 - np.square(d / _REACH))
        sigma = look.focus * _FINE
        added = gaussian_filter1d(bright - dark, sigma, mode="nearest")
        return gaussian_filter1d((d < 0) * 1.0, sigma).astype(np.float32), added.astype(np.float32)

    def develop(self) -> np.ndarray:
        """Grey levels before noise (S, S)."""
        grey = np.empty_like(self.distance)
        for strip in _strips(self.size):
            grey[strip] = self.shade(self.distance[strip], strip)
        for via in self.vias:
            window, dot = self.dot(via)
            grey[window] += dot
        return grey

    def shade(self, distance: np.ndarray, rows: slice) -> np.ndarray:
        """Grey levels of whole rows without vias: metal on ground, bright edges with shadows beside them."""
        share, added = self.profiles
        place = ((distance + np.float32(_REACH)) * np.float32(_FINE)).astype(np.intp)
        grey = share.take(place, mode="clip")
        grey *= self.contrast[rows]
        sided = _slope(distance)
        sided *= np.float32(self.look.smear * self.scale)
        sided += 1
        sided *= added.take(place, mode="clip")
        grey += sided
        grey += np.float32(self.look.ground)
        light = _grid(self.size, len(self.smooth))[0][rows] @ self.smooth
        light += self.rows[rows]
        light *= np.float32(self.look.gain)
        grey *= light
        return grey

    def dot(self, via: Via) -> tuple[Window, np.ndarray]:
        """Window and grey levels of a via: a soft disc."""
        turn, middle = self.look.tilt, self.size / 2
        y, x = via.y - turn * (via.x - middle), via.x + turn * (via.y - middle)
        window = _window(y, x, 2.2 * via.radius, self.size)
        rows, columns = _offsets(window, y, x)
        r = (np.square(rows) + np.square(columns)) * np.float32(via.radius**-2)
        return window, np.float32(self.look.via * via.level) / (1 + r * r * r)

    def expose(self, grey: np.ndarray, bits: int, window: Window | None = None) -> np.ndarray:
        """Shot noise (its variance grows with the signal), saturation and digits; of a window or all."""
        if window is None:
            image = np.empty(grey.shape, np.uint8 if bits == 8 else np.uint16)
            for strip in _strips(self.size):
                image[strip] = self.expose(grey, bits, np.s_[strip, :])
            return image
        grain = _normal().take(self.grain[window[0]], mode="clip")
        grain[:, 1:] += np.float32(0.35) * grain[:, :-1]  # the detector is slower than the beam
        grey = grey[window]
        value = np.sqrt(np.maximum(grey, 0) * np.float32(self.look.noise) + 3)
        value *= grain[:, window[1]]
        value += grey
        np.clip(value, 0, 255, out=value)
        if bits == 16:
            value *= 257
        return np.rint(value, out=value).astype(np.uint8 if bits == 8 else np.uint16)

    def limits(self, clean: np.ndarray) -> tuple[float, float]:
        """Grey levels that a defect does not exceed, since the image itself reaches beyond them."""
        low, high = np.quantile(clean[::5, ::5], (0.004, 0.985))
        return float(low), float(high)

    def place(self, reach: float = 0.05) -> tuple[float, float]:
        """A random centre (y, x), above the info bar."""
        return tuple(self.defect.uniform(reach * self.size, (high - reach) * self.size) for high in (0.92, 1.0))

    def seen(self, y: float, x: float) -> bool:
        return 0.04 * self.size < y < 0.88 * self.size and 0.04 * self.size < x < 0.96 * self.size

    def spot(self, widest: float, length: float) -> tuple[Bar, float]:
        """A bar at most `widest` pixels in half width, and a place along it with `length` metal before and after."""
        bars = [bar for bar in self.bars if bar.half <= widest]
        for _ in range(200):
            bar = bars[self.defect.integers(len(bars))]
            low, high = max(bar.start + length, 0), min(bar.stop - length, self.size)
            along = self.defect.uniform(low, max(low, high))
            if low <= high and self.seen(*_on(bar.axis, along, bar.centre)):
                return bar, along
        return bar, float(np.clip(along, 0.1 * self.size, 0.85 * self.size))

    def tilted(self, bar: Bar, along: float) -> float:
        """Where the middle of a bar is, across, at a place along it."""
        return bar.centre + (1 if bar.axis == 0 else -1) * self.look.tilt * (along - self.size / 2)

    def space(self) -> tuple[int, float, int, int]:
        """Between two neighbours: their axis, a place along them, and pixels across where one ends and one begins."""
        step, pitch = max(self.scale, 0.5), self.look.pitch
        for _ in range(200):
            bar, along = self.spot(np.inf, 0.0)
            side, edge = self.defect.choice([-1, 1]), bar.half - self.scale
            path = self.tilted(bar, along) + side * np.arange(edge, edge + 1.4 * pitch, step)
            path = np.clip(path, 0, self.size - 1).astype(int)
            metal = self.distance[_on(bar.axis, np.full(len(path), int(along)), path)] < 0
            first = int(np.argmin(metal))  # in the space, if there is one
            if not metal[first] and metal[first:].any():
                return bar.axis, along, int(path[max(first - 1, 0)]), int(path[first + np.argmax(metal[first:])])
        return bar.axis, along, int(path[0]), int(path[len(path) // 3])

    def reshaped(self, clean: np.ndarray, window: Window, distance: np.ndarray, strength: float) -> np.ndarray:
        """The window of the clean image with another geometry, seen as strongly as given."""
        rows, columns = window
        whole = self.distance[rows].copy()
        whole[:, columns] = distance
        change = self.shade(whole, rows)[:, columns] - self.shade(self.distance[rows], rows)[:, columns]
        return clean[window] + np.float32(strength) * change

    def tinted(self, clean: np.ndarray, changed: np.ndarray, where: np.ndarray, strength: float) -> np.ndarray:
        """A changed window that shines, in units of the edges' brightness, as torn or redeposited metal does."""
        low, high = self.limits(clean)
        bright = changed + np.float32(strength * self.look.edge) * where.astype(np.float32)
        return np.clip(bright, np.minimum(low, changed), np.maximum(high, changed))

    def carved(
        self, clean: np.ndarray, window: Window, cut: np.ndarray, strength: float, shine: float, halo: float
    ) -> np.ndarray:
        """Without the metal where the distance `cut` is negative: torn edges shine, and around them it is darker."""
        distance = self.distance[window]
        changed = self.reshaped(clean, window, -_join(-distance, cut), strength)
        changed = self.tinted(clean, changed, _sigmoid(-distance) * np.exp(-np.abs(cut) / 4), shine)
        return self.tinted(clean, changed, np.exp(-np.square(np.maximum(cut, 0) / 14)), -halo)


def _particle(scene: _Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """An irregular grain with a bright rim and texture, lying on lines and ground, with a shadow at one side."""
    rng, px = scene.defect, scene.scale
    radius = scene.field * np.exp(rng.uniform(*np.log((0.028, 0.08))))
    cy, cx = scene.place()
    window = _window(cy, cx, 2.2 * radius + 8 * px, scene.size)
    d = _blob(rng, window, cy, cx, radius, 0.11) / np.float32(px)
    under = clean[window]
    inside = _sigmoid(d * np.float32(-1.6 / scene.look.focus))
    rough = gaussian_filter(rng.standard_normal(d.shape, dtype=np.float32), max(radius * 0.14, 0.7))
    rough *= np.float32(rng.uniform(8, 24) / (rough.std() + 1e-6))
    y, x = _offsets(window, cy, cx)
    lit = np.float32(rng.uniform(4, 14) / radius) * -(x + y)  # brighter towards the detector
    low, high = scene.limits(clean)
    body = np.mean(under, dtype=np.float64) + rng.choice([-1, 1]) * rng.uniform(38, 85)
    rim = np.float32(rng.uniform(0.2, 0.8) * scene.look.edge) * np.exp(-np.abs(d + 2) / np.float32(2.5))
    grain = np.clip(np.float32(np.clip(body, low, high)) + rough + lit + rim, low, high)
    shade = (
        np.float32(rng.uniform(0.05, 0.3)) * np.exp(-np.maximum(d, 0) / 4) * _sigmoid((x + y) / np.float32(radius / 2))
    )
    return window, np.maximum(under * (1 - shade), np.minimum(low, under)) * (1 - inside) + grain * inside


def _scratch(scene: _Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A thin, slightly bent groove (dark) or ridge (bright) of uneven depth, with material pushed aside."""
    rng, px = scene.defect, scene.scale
    half = scene.field * np.exp(rng.uniform(*np.log((0.15, 0.38))))
    width = np.exp(rng.uniform(*np.log((2.2, 4.4)))) * px
    contrast = np.exp(rng.uniform(*np.log((45, 95)))) * rng.choice([-1, 1])
    angle, bend = rng.uniform(0, np.pi), half * rng.uniform(-0.3, 0.3)
    cy, cx = scene.place(0.15)
    nodes = np.linspace(-1, 1, 96)
    depth = np.clip(1 + 1.4 * gaussian_filter1d(rng.standard_normal(96), 2.0), 0.3, 1.7)
    depth *= np.minimum(1, 5 * (1 - np.abs(nodes)))
    sway = gaussian_filter1d(rng.standard_normal(96), 5.0) * 4 * px
    window = _window(cy, cx, half + abs(bend) + 16 * px, scene.size)
    y, x = _offsets(window, cy, cx)
    u = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) / np.float32(half)  # -1 to 1 along it
    v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))  # pixels across it
    near = (np.abs(u) < 1) & (np.abs(v) < abs(bend) + 24 * px)
    u, v = u[near], v[near]
    off = (v - bend * (0.5 - np.square(u)) - np.interp(u, nodes, sway)) / width
    profile = np.exp(-np.square(off) / 2) - 0.3 * np.exp(-np.square(off - 2.4) / 2)
    (low, high), changed = scene.limits(clean), clean[window].copy()
    under = changed[near]
    moved = under + contrast * np.interp(u, nodes, depth) * profile
    changed[near] = np.clip(moved, np.minimum(low, under), np.maximum(high, under))
    return window, changed


def _bridge(scene: _Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """Line material across the space between two neighbours: a short, from a hair to a full blob, whole or faint."""
    rng, px = scene.defect, scene.scale
    axis, along, start, stop = scene.space()
    gap = max(abs(stop - start), 2)
    thick = np.exp(rng.uniform(np.log(5 * px), np.log(max(1.0 * gap, 8 * px))))  # half, at the waist
    flare, slant = rng.uniform(0.1, 0.8), rng.uniform(-0.3, 0.3)
    y, x = _on(axis, along, (start + stop) / 2)
    window = _window(y, x, gap + 2 * thick + 12 * px, scene.size)
    t, c = _on(axis, *_offsets(window, y, x))  # along the lines and across them
    c = c / np.float32(gap / 2)  # -1 to 1 from line to line
    ragged = gaussian_filter1d(rng.standard_normal((2, c.size), dtype=np.float32), 3 * px) * np.float32(1.6 * px)
    waist = thick * (1 + flare * np.minimum(np.square(c), 1.5)) + ragged[0].reshape(c.shape)
    middle = slant * gap / 2 * c + ragged[1].reshape(c.shape)
    beyond = (np.abs(c) - 1) * (gap / 2) - 3 * px
    material = np.maximum(np.abs(t - middle) - waist, beyond) / np.float32(px)
    joined = _join(scene.distance[window], material.astype(np.float32))
    changed = scene.reshaped(clean, window, joined, rng.uniform(0.6, 1.0))
    return window, scene.tinted(clean, changed, _sigmoid(-material), rng.uniform(0.3, 1.3))


def _open(scene: _Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A ragged break of a line, narrower than the spaces that were drawn; residue may be left in it."""
    rng, px = scene.defect, scene.scale
    bar, along = scene.spot(0.5 * scene.look.pitch, 0.45 * scene.look.pitch)
    y, x = _on(bar.axis, along, scene.tilted(bar, along))
    gap = np.exp(rng.uniform(np.log(6.0 * px), np.log(max(0.32 * scene.look.pitch, 9.0 * px))))  # half
    window = _window(y, x, bar.half + gap + 32 * px, scene.size)
    t, c = _on(bar.axis, *_offsets(window, y, x))
    ragged = gaussian_filter1d(rng.standard_normal((2, c.size), dtype=np.float32), 3 * px) * np.float32(3.5 * px)
    curved = np.float32(rng.uniform(0.0, 0.5) * gap) * np.minimum(np.square(c / np.float32(bar.half)), 1)
    near = np.abs(t - ragged[0].reshape(c.shape)) - np.float32(gap) - curved - ragged[1].reshape(c.shape)
    beside = np.abs(c) - np.float32(bar.half + 4 * px)
    cut = np.hypot(np.maximum(near, 0), np.maximum(beside, 0)) + np.minimum(np.maximum(near, beside), 0)
    cut /= np.float32(px)
    strength, shine, halo = rng.uniform(0.75, 1.0), rng.uniform(0.6, 1.8), rng.uniform(0.4, 1.4)
    return window, scene.carved(clean, window, cut, strength, shine, halo)


def _mousebite(scene: _Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """Missing metal at one edge of a line, or at both: necking."""
    rng, px = scene.defect, scene.scale
    bar, along = scene.spot(np.inf, 0.2 * scene.look.pitch)
    middle, half = scene.tilted(bar, along), min(bar.half, 0.35 * scene.look.pitch)
    deep = half * rng.uniform(0.75, 1.7)
    both = rng.random() < 0.35
    sides = (-1, 1) if both else (rng.choice([-1, 1]),)
    deep *= 0.65 if both else 1.0
    radius = max(deep * rng.uniform(0.7, 1.5), 4 * px)
    y, x = _on(bar.axis, along, middle)
    window = _window(y, x, bar.half + 2 * radius + 32 * px, scene.size)
    cut = np.float32(1e3)
    for side in sides:
        cy, cx = _on(bar.axis, along + both * rng.uniform(-2, 2) * px, middle + side * (bar.half + radius - deep))
        cut = np.minimum(cut, _blob(rng, window, cy, cx, radius, 0.1) / np.float32(px))
    return window, scene.carved(clean, window, cut, 1.0, rng.uniform(0.2, 1.2), rng.uniform(0.2, 1.1))


def _missing_via(scene: _Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A via at the end of a line that is not there, or that was not filled: a dark hole."""
    seen = [via for via in scene.vias if scene.seen(via.y, via.x)]
    ends = [via for via in seen if via.end] or seen or scene.vias
    chosen = ends[scene.defect.integers(len(ends))]
    hole, dot = scene.dot(chosen)
    window, halo = scene.dot(replace(chosen, radius=2.2 * chosen.radius))
    changed = clean.copy()
    changed[hole] -= dot * np.float32(scene.defect.uniform(1.6, 4.6))
    changed[window] -= halo * np.float32(scene.defect.uniform(0.1, 1.1))
    low, high = scene.limits(clean)
    return window, np.clip(changed[window], np.minimum(low, clean[window]), np.maximum(high, clean[window]))


def _stain(scene: _Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A film of residue: soft, irregular, darker or brighter, with a faint border where it dried."""
    rng = scene.defect
    radius = scene.field * np.exp(rng.uniform(*np.log((0.05, 0.14))))
    cy, cx = scene.place()
    window = _window(cy, cx, 2.6 * radius, scene.size)
    d = _blob(rng, window, cy, cx, radius, 0.2) / np.float32(radius)
    soft = np.float32(rng.uniform(0.04, 0.14))
    film = _sigmoid(-d / soft) + np.float32(rng.uniform(0.3, 1.2)) * np.exp(-np.square(d / soft) / 2)
    tall, wide = (_between(side, 12) for side in d.shape)
    cloud = tall @ rng.standard_normal((12, 12), dtype=np.float32) @ wide.T
    film *= 1 + np.float32(0.25 / (cloud.std() + 1e-6)) * cloud
    contrast = np.exp(rng.uniform(*np.log((34, 72)))) * rng.choice([-1, 1], p=[0.6, 0.4])
    (low, high), under = scene.limits(clean), clean[window]
    grey = np.mean(under, dtype=np.float64)
    thick = np.float32(contrast) * film + np.float32(0.4 * abs(contrast) / grey) * film * (grey - under)  # it veils
    return window, np.clip(under + thick, np.minimum(low, under), np.maximum(high, under))


_DEFECTS = {
    "particle": _particle,
    "scratch": _scratch,
    "bridge": _bridge,
    "open": _open,
    "mousebite": _mousebite,
    "missing_via": _missing_via,
    "stain": _stain,
}


def _blob(rng: np.random.Generator, window: Window, cy: float, cx: float, radius: float, uneven: float) -> np.ndarray:
    """Signed distance in pixels, nearly, to an irregular round outline."""
    y, x = _offsets(window, cy, cx)
    stretch = np.exp(rng.normal(0, 0.15))
    turn = rng.uniform(0, np.pi)
    y, x = x * np.sin(turn) + y * np.cos(turn), x * np.cos(turn) - y * np.sin(turn)
    y, x = (y * stretch).astype(np.float32), (x / stretch).astype(np.float32)
    angle, outline = np.arctan2(y, x), np.float32(1)
    for order in range(2, 8):
        strength = rng.normal(0, 2 * uneven / order)
        outline = outline + np.float32(strength) * np.cos(order * angle + np.float32(rng.uniform(0, 2 * np.pi)))
    return np.hypot(y, x) - np.float32(radius) * np.clip(outline, 0.6, 1.5)


def _join(first: np.ndarray, second: np.ndarray, out: np.ndarray | None = None, corner: float = 6.0) -> np.ndarray:
    """Union of two signed distances whose inner corners are filled a little, as lithography does."""
    rest = np.maximum(np.float32(corner) - np.abs(first - second), 0)
    return np.subtract(np.minimum(first, second), np.square(rest) * np.float32(0.25 / corner), out=out)


def _slope(field: np.ndarray) -> np.ndarray:
    """Change from left to right: half the difference of the two neighbours, 0 at the border."""
    slope = np.empty_like(field)
    np.subtract(field.ravel()[2:], field.ravel()[:-2], out=slope.ravel()[1:-1])  # a flat view is several times faster
    slope[:, 0] = slope[:, -1] = 0
    slope *= np.float32(0.5)
    return slope


def _strips(size: int) -> list[slice]:
    return [slice(start, min(start + _STRIP, size)) for start in range(0, size, _STRIP)]


def _on(axis: int, along, across):
    """(y, x) of what is given along and across a line, and back."""
    return (along, across) if axis == 0 else (across, along)


def _window(y: float, x: float, reach: float, size: int) -> Window:
    """The part of the image within `reach` of a point; at least one pixel."""
    starts = [min(max(int(centre - reach), 0), size - 1) for centre in (y, x)]
    stops = [min(max(int(centre + reach) + 2, 1), size) for centre in (y, x)]
    return tuple(slice(start, max(stop, start + 1)) for start, stop in zip(starts, stops, strict=True))


def _offsets(window: Window, y: float, x: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows (H, 1) and columns (1, W) of a window, from a point."""
    rows, columns = (np.arange(side.start, side.stop, dtype=np.float32) for side in window)
    return rows[:, None] - np.float32(y), columns[None] - np.float32(x)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)


def _info_bar(size: int, height: int, nm: float, noise: float, bits: int) -> np.ndarray:
    """Dark strip (height, size) with the conditions of the exposure and a scale; `nm` is the size of a pixel."""
    length = max((n for n in (10, 20, 50, 100, 200, 500) if n / nm < 0.3 * size), default=10)
    strip = Image.new("L", (size, height), 12)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(max(0.5 * height, 5))
    middle, end = height / 2, size - height / 3
    text = f"{length} nm"
    start = end - draw.textlength(text, font) - height / 4 - length / nm
    draw.text((end, middle), text, 235, font, anchor="rm")
    draw.line([(start, middle), (start + length / nm, middle)], 235, max(height // 12, 1))
    for tick in (start, start + length / nm):
        draw.line([(tick, height * 0.3), (tick, height * 0.7)], 235, max(height // 20, 1))
    volts = 1 + int(9 * noise)
    for text in (f"SE  {volts}.0 kV  WD {2 + 4 * noise:.1f} mm", f"{volts} kV"):
        if height / 3 + draw.textlength(text, font) < start - height / 3:
            draw.text((height / 3, middle), text, 200, font, anchor="lm")
            break
    levels = np.asarray(strip)
    return levels if bits == 8 else levels.astype(np.uint16) * 257
