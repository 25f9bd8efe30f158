"""What an image of the synthetic set shows before its defect: a layout, drawn, lit and recorded as a SEM does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from scipy.special import ndtri

from zoo.data.layout import Bar, Rules, Via, route

Window = tuple[slice, slice]

NOMINAL = 512  # pixels: lengths of the look are given for images of this side
SMALLEST = 128  # images of a smaller side show a part of the field instead of ever thinner lines
_REACH = 16.0  # nominal pixels: no edge is seen from farther away
_STRIP = 64  # rows shaded at a time: what stays in the cache costs less
_FINE = 16  # entries of an edge profile a nominal pixel


@dataclass(frozen=True)
class Style:
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


LOOKS = {
    "metal": Style(),
    "fine": Style(
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


class Look:
    """The values of one image: how its layout is drawn, lit and recorded; lengths in pixels of the image."""

    def __init__(self, even: _Even, style: Style, scale: float, field: float):
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


def stretch(nodes: np.ndarray, size: int, rows: slice = slice(None)) -> np.ndarray:
    """Linear interpolation (N, M) -> (size, M), or some rows of it; no matrix product, which would start threads."""
    place = np.linspace(0, len(nodes) - 1, size, dtype=np.float32)[rows]
    first = np.minimum(place.astype(np.intp), len(nodes) - 2)
    low, step = nodes[first], nodes[first + 1]
    step -= low
    step *= (place - first)[:, None]
    step += low
    return step


@lru_cache(maxsize=1)
def _normal() -> np.ndarray:
    """Normally distributed numbers by their 16-bit rank: five times as fast as drawing them."""
    return ndtri((np.arange(1 << 16) + 0.5) / (1 << 16)).astype(np.float32)


class Scene:
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
        self.scale = max(size / NOMINAL, SMALLEST / NOMINAL)  # pixels a nominal pixel
        self.field = max(size, min(SMALLEST, 3 * size // 2))  # pixels that the sizes of defects refer to
        self.look = Look(_Even(index, seed), LOOKS[style], self.scale, size / self.scale)
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
        (join if bar.joint else np.minimum)(distance[window], across, out=distance[window])

    def _light(self, rng: np.random.Generator) -> None:
        """Slow drift, darker ground between dense lines, faint texture, and rows that differ a little."""
        size = self.size
        nodes = min(int(size / self.scale / 4) + 1, size)
        pick = np.linspace(0, size - 1, nodes).astype(int)
        metal = (self.distance[np.ix_(pick, pick)] < 0).astype(np.float32)  # (N, N)
        ramp = np.linspace(-1, 1, nodes, dtype=np.float32)
        waves = np.cos(np.pi / 2 * np.outer(np.arange(3), ramp + 1)).astype(np.float32)  # (3, N)
        drift = np.einsum("in,ij,jm->nm", waves, rng.normal(0, 0.022, (3, 3)).astype(np.float32), waves)
        charge = gaussian_filter(metal - metal.mean(), 6, mode="nearest", truncate=3)
        charge *= np.float32(rng.uniform(-0.14, 0.02))
        mottle = rng.standard_normal((nodes, nodes), dtype=np.float32) * np.float32(rng.uniform(0.008, 0.03))
        rows = gaussian_filter1d(rng.standard_normal(size, dtype=np.float32), 5 * self.scale) * 2
        rows += rng.standard_normal(size, dtype=np.float32)
        self.rows = 1 + rows[:, None] * np.float32(rng.uniform(0.001, 0.006))  # (S, 1)
        self.smooth = np.ascontiguousarray(stretch((drift + charge + mottle).T, size).T)  # (N, S)

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
        light = stretch(self.smooth, self.size, rows)
        light += self.rows[rows]
        light *= np.float32(self.look.gain)
        grey *= light
        return grey

    def dot(self, via: Via) -> tuple[Window, np.ndarray]:
        """Window and grey levels of a via: a soft disc."""
        turn, middle = self.look.tilt, self.size / 2
        y, x = via.y - turn * (via.x - middle), via.x + turn * (via.y - middle)
        window = around(y, x, 2.2 * via.radius, self.size)
        rows, columns = offsets(window, y, x)
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


def join(first: np.ndarray, second: np.ndarray, out: np.ndarray | None = None, corner: float = 6.0) -> np.ndarray:
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


def on_axis(axis: int, along, across):
    """(y, x) of what is given along and across a line, and back."""
    return (along, across) if axis == 0 else (across, along)


def around(y: float, x: float, reach: float, size: int) -> Window:
    """The part of the image within `reach` of a point; at least one pixel."""
    starts = [min(max(int(centre - reach), 0), size - 1) for centre in (y, x)]
    stops = [min(max(int(centre + reach) + 2, 1), size) for centre in (y, x)]
    return tuple(slice(start, max(stop, start + 1)) for start, stop in zip(starts, stops, strict=True))


def offsets(window: Window, y: float, x: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows (H, 1) and columns (1, W) of a window, from a point."""
    rows, columns = (np.arange(side.start, side.stop, dtype=np.float32) for side in window)
    return rows[:, None] - np.float32(y), columns[None] - np.float32(x)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * np.tanh(0.5 * x)
