"""What an image of the synthetic set shows before its defect: a layout, drawn, lit and recorded as a SEM does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from scipy.ndimage import convolve1d, gaussian_filter, gaussian_filter1d
from scipy.special import ndtri

from zoo.data.layout import Bar, Rules, Via, Window, around, join, offsets, route, sigmoid

NOMINAL = 512  # pixels: lengths of the look are given for images of this side
SMALLEST = 128  # images of a smaller side show a part of the field instead of ever thinner lines
_REACH = 16.0  # nominal pixels: no edge is seen from farther away
_STRIP = 64  # rows shaded at a time: what stays in the cache costs less
_FINE = 16  # entries of an edge profile a nominal pixel


@dataclass(frozen=True)
class Style:
    """What distinguishes a style; ranges are (low, high), lengths in nominal pixels, levels of 0 to 255."""

    pitch: tuple[float, float] = (41.0, 59.0)
    fill: tuple[float, float] = (0.54, 0.66)
    ground: tuple[float, float] = (45.0, 65.0)
    metal: tuple[float, float] = (62.0, 76.0)  # above the ground
    edge: tuple[float, float] = (38.0, 54.0)  # above the metal, in focus
    shadow: tuple[float, float] = (4.0, 14.0)  # below the ground
    focus: tuple[float, float] = (0.9, 1.8)
    via: tuple[float, float] = (22.0, 50.0)
    noise: tuple[float, float] = (0.1, 0.36)  # variance of the shot noise per level


LOOKS = {
    "metal": Style(),
    "fine": Style(
        pitch=(19.0, 34.0),
        fill=(0.42, 0.56),
        ground=(78.0, 100.0),
        metal=(32.0, 49.0),
        edge=(18.0, 36.0),
        shadow=(6.0, 16.0),
        focus=(0.6, 1.4),
        via=(-44.0, -20.0),
        noise=(0.2, 0.6),
    ),
}


class _Even:
    """Numbers in [0, 1), one after the other: each is spread evenly over the images of any run of indices.

    The additive recurrence of Richtmyer: number n of image i is (offset_n + i sqrt(prime_n)) mod 1. So small sets
    have as much variety as large ones, and the looks of two sets differ little by chance.
    Primes whose root times seven is nearly whole are left out, since kinds of defects come back every seven images.
    """

    PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 37, 41, 43, 59, 61, 67, 73, 79, 83, 97, 101, 103, 107, 109, 113)

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
        contrast = min(0.7 + 2.4 * even(), 1.0)  # one image in eight has less
        metal = even(*style.metal)
        self.ground = even(*style.ground) + 0.5 * (1 - contrast) * metal + even(-4, 5)
        self.metal = contrast * metal
        self.edge = contrast * even(*style.edge)
        self.shadow = contrast * even(*style.shadow)
        self.tail = even(3.5, 7.0)  # how far an edge shines into the metal
        self.focus = np.exp(even(*np.log(style.focus)))
        self.via = contrast * even(*style.via)
        self.via_size = even(0.5, 0.74)
        self.rim = even(-0.3, 0.25)  # of vias over their brightness; a darker core where negative
        self.noise = np.exp(even(*np.log(style.noise))) * min(scale, 1.0)  # a larger pixel gathers more electrons
        self.density, self.character = even(), even()
        self.gain = even(0.92, 1.08)
        self.tilt = even(-0.006, 0.006)  # rotation of the stage, radians
        self.rough = np.exp(even(*np.log((0.15, 0.4)))) * scale
        self.wave = np.exp(even(*np.log((2.5, 12.0))))  # how long the waves of rough edges are
        self.smear = even(-0.5, 0.5)  # which side of a line is brighter
        self.uneven = even()
        self.corner = 0.6 * self.pitch * self.fill / 2 / scale  # inner radius of corners, nominal
        self.drift = even(0.008, 0.032)
        self.charge = max(even(-0.14, 0.24), 0.0)  # of the ground beside metal, along the scan

    def rules(self, rng: np.random.Generator) -> Rules:
        """Design rules: from long parallel lines to short pieces with many corners."""
        kind = self.character
        return Rules(
            pitch=self.pitch,
            fill=self.fill,
            skip=0.005 + 0.03 * self.density**2,
            reach=(12.0 if kind < 0.08 else 40.0 if kind < 0.6 else 80.0) * np.exp(rng.normal(0, 0.25)),
            via=self.via_size,
            uneven=self.uneven,
            dumbbells=3 * (0.32 <= kind < 0.42),
            combs=3 * (0.42 <= kind < 0.48),
            bends=2 * (0.08 <= kind < 0.32),
            power=int(rng.random() < 0.35),
            hollow=int(rng.random() < 0.15),
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


@lru_cache(maxsize=6)
def _texture(size: int, sigma: float) -> np.ndarray:
    """Normally distributed numbers (size, size), smoothed by sigma: filtered once, then used in parts."""
    noise = np.random.default_rng(0).standard_normal((size, size), dtype=np.float32)
    smooth = gaussian_filter(noise, sigma, mode="wrap")
    return smooth / smooth.std()


def _part(rng: np.random.Generator, size: int, sigma: float) -> np.ndarray:
    """A random part (size, size) of a texture, turned at random."""
    y, x, turn = rng.integers(0, (256, 256, 8))
    part = _texture(size + 256, sigma)[y : y + size, x : x + size]
    part = part[:: 1 - 2 * (turn & 1), :: 1 - (turn & 2)]
    return part.T if turn & 4 else part


class Scene:
    """One image before its defect: geometry as a signed distance in nominal pixels (negative inside), look and noise.

    Attributes:
        distance: (S, S) float32, at most `_REACH`.
        contrast: (S, S) float32, metal above ground.
        ripple: (S, S) float32, how the brightness of edges varies.
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
            for row, length in zip(rough, (look.wave, 4 * look.wave), strict=True)
        )
        wander *= look.rough / wander.std()
        for bar in self.bars:
            self._draw_bar(bar, wander, rng)
        slow, fast = rng.standard_normal((2, size), dtype=np.float32)
        slow = gaussian_filter1d(slow, 4) * np.float32(rng.uniform(0, 3.8))  # of unit strength at most
        jitter = (slow + fast) * np.float32(rng.uniform(0.04, 0.2))
        for strip in _strips(size):
            self.distance[strip] -= jitter[strip, None] * _slope(self.distance[strip])
        sigma = float(rng.choice([1.4, 2.2, 3.6]))
        self.contrast += np.float32(rng.uniform(1, 3)) * _part(rng, size, sigma * self.scale)
        self.ripple = np.float32(1) + np.float32(rng.uniform(0.1, 0.25)) * _part(rng, size, 5 * self.scale)

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
        if bar.joint is not None:
            self._fillet(distance[window], across, t - np.float32((start + stop) / 2), c0, bar)
        np.minimum(distance[window], across, out=distance[window])

    def _fillet(self, first: np.ndarray, second: np.ndarray, t: np.ndarray, c0: int, bar: Bar) -> None:
        """Round the corners between what is there (T, C) and a bar that meets it; of a bend, the inner one only."""
        inner = np.s_[:, :]
        if bar.joint:
            rows = slice(*np.searchsorted(t, np.array((-1, 1)) * ((bar.stop - bar.start) / 2 - bar.half)))
            split = min(max(int(bar.centre) - c0, 0), first.shape[1])
            inner = np.s_[rows, split:] if bar.joint > 0 else np.s_[rows, :split]
        join(first[inner], second[inner], out=first[inner], corner=self.look.corner)

    def _light(self, rng: np.random.Generator) -> None:
        """Slow drift, darker ground between dense lines and where the beam comes from metal, mottle, uneven rows."""
        size, look = self.size, self.look
        nodes = min(int(size / self.scale / 4) + 1, size)
        pick = np.linspace(0, size - 1, nodes).astype(int)
        metal = (self.distance[np.ix_(pick, pick)] < 0).astype(np.float32)  # (N, N)
        ramp = np.linspace(-1, 1, nodes, dtype=np.float32)
        waves = np.cos(np.pi / 2 * np.outer(np.arange(3), ramp + 1)).astype(np.float32)  # (3, N)
        drift = np.einsum("in,ij,jm->nm", waves, rng.normal(0, look.drift, (3, 3)).astype(np.float32), waves)
        charge = gaussian_filter(metal - metal.mean(), 6, mode="nearest", truncate=3)
        charge *= np.float32(rng.uniform(-0.14, 0.02))
        if look.charge:
            after = np.exp(-np.arange(24) / rng.uniform(4, 14)) * (np.arange(24) > 0)
            after = np.concatenate([np.zeros(23), after / after.sum()]).astype(np.float32)
            charge -= np.float32(look.charge) * convolve1d(metal, after, axis=1, mode="nearest") * (1 - metal)
        mottle = gaussian_filter(rng.standard_normal((nodes, nodes), dtype=np.float32), rng.uniform(1.5, 4), truncate=2)
        mottle *= np.float32(rng.uniform(0.01, 0.04)) / mottle.std()
        rows = gaussian_filter1d(rng.standard_normal(size, dtype=np.float32), 5 * self.scale) * 2
        rows += rng.standard_normal(size, dtype=np.float32)
        self.rows = 1 + rows[:, None] * np.float32(rng.uniform(0.001, 0.01))  # (S, 1)
        self.smooth = np.ascontiguousarray(stretch((drift + charge + mottle).T, size).T)  # (N, S)

    @cached_property
    def profiles(self) -> tuple[np.ndarray, np.ndarray]:
        """Over the distance to an edge, -_REACH to _REACH: share of metal, and what edge and shadow add; in focus."""
        look, d = self.look, np.arange(-_REACH * _FINE, _REACH * _FINE + 1) / _FINE
        crest = np.exp(-np.square((d + 1.2) / 0.9) / 2) * 1.4 * look.edge
        tail = np.exp(np.minimum(d, 0) / look.tail) * (d < 0) * 0.25 * look.edge
        dark = np.exp(-np.maximum(d, 0) / 6) * (d >= 0) * look.shadow * (1 - np.square(d / _REACH))
        sigma = look.focus * _FINE
        added = gaussian_filter1d(crest + tail - dark, sigma, mode="nearest")
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
        sided *= self.ripple[rows]
        sided *= added.take(place, mode="clip")
        grey += sided
        grey += np.float32(self.look.ground)
        light = stretch(self.smooth, self.size, rows)
        light += self.rows[rows]
        light *= np.float32(self.look.gain)
        grey *= light
        return grey

    def seat(self, via: Via) -> tuple[float, float]:
        """Where a via is (y, x) on the turned stage."""
        turn, middle = self.look.tilt, self.size / 2
        return via.y - turn * (via.x - middle), via.x + turn * (via.y - middle)

    def dot(self, via: Via) -> tuple[Window, np.ndarray]:
        """Window and grey levels of a via: a disc, in some images with a brighter rim or a darker core."""
        look, (y, x) = self.look, self.seat(via)
        window = around(y, x, 1.4 * via.radius + (10 + 2 * look.focus) * self.scale, self.size)
        d = (np.hypot(*offsets(window, y, x)) - np.float32(via.radius)) / np.float32(self.scale)  # nominal
        soft = np.float32(0.8 + 0.5 * look.focus)
        disc = sigmoid(d / -soft)
        disc += np.float32(abs(look.rim)) * np.exp(-np.square((d + 1) / (1 + soft)))
        if look.rim < 0:
            disc -= np.float32(1.4 * abs(look.rim)) * sigmoid((d + np.float32(0.5 * via.radius / self.scale)) / -soft)
        return window, np.float32(look.via * via.level) * disc

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


def _slope(field: np.ndarray) -> np.ndarray:
    """Change from left to right: half the difference of the two neighbours, 0 at the border."""
    slope = np.empty_like(field)
    np.subtract(field.ravel()[2:], field.ravel()[:-2], out=slope.ravel()[1:-1])  # a flat view is several times faster
    slope[:, 0] = slope[:, -1] = 0
    slope *= np.float32(0.5)
    return slope


def _strips(size: int) -> list[slice]:
    return [slice(start, min(start + _STRIP, size)) for start in range(0, size, _STRIP)]
