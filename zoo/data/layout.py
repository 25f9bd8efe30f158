"""The routing of a metal layer for the synthetic generator: which bars and vias lie where, in pixels; its geometry.

Nets live on an uneven grid of nodes, tracks by columns; a node belongs to one net at most, so that nets never touch.
The grid is larger than the picture, which shows a part of the layer: most lines run on beyond its border.
Vias lie at more than half of the ends of lines, and some in between; other ends have theirs in the layer below.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Window = tuple[slice, slice]


@dataclass(frozen=True)
class Bar:
    """A straight piece of metal with rounded ends.

    Attributes:
        axis: the image axis it runs along (0: rows, a vertical line).
        start, stop: where its ends are along that axis, pixels.
        centre, half: its middle and half its width across, pixels.
        radius: of its corners, pixels.
        level: brightness of its metal, around 1.
        joint: None if it touches no other; else it meets bars drawn before, and their inner corners are filled as
            lithography does: at its side -1 or 1 across, or all around (0).
    """

    axis: int
    start: float
    stop: float
    centre: float
    half: float
    radius: float
    level: float
    joint: int | None


@dataclass(frozen=True)
class Via:
    """A contact to the next layer: centre and radius in pixels, brightness around 1; `end` if a line ends there."""

    y: float
    x: float
    radius: float
    level: float
    end: bool


@dataclass(frozen=True)
class Rules:
    """What a layer looks like: the design rules of one image.

    Attributes:
        pitch: typical distance between tracks, pixels.
        fill: width of a line over the pitch.
        skip: chance to leave a node free where a line could begin.
        reach: mean length of a line, nodes.
        via: radius of a via over half the width of a line.
        uneven: how far widths and distances of tracks differ, 0 to 1.
        dumbbells, combs, bends, power, hollow: how many of these pieces of the router are tried.
    """

    pitch: float
    fill: float
    skip: float
    reach: float
    via: float
    uneven: float
    dumbbells: int
    combs: int
    bends: int
    power: int
    hollow: int


def route(rng: np.random.Generator, size: int, axis: int, rules: Rules) -> tuple[list[Bar], list[Via]]:
    """A layer of size x size pixels whose lines run mostly along `axis`; it has a free via and two lines in sight."""
    router = _Router(rng, size, axis, rules)
    router.pair()
    router.bare = rng.uniform(0.2, 0.65)
    for draw, times in (
        (router.dumbbell, rules.dumbbells),
        (router.comb, rules.combs),
        (router.bend, rules.bends),
        (router.power, rules.power),
        (router.hollow, rules.hollow),
    ):
        for _ in range(times):
            draw()
    router.fill()
    bars = sorted(router.bars, key=lambda bar: bar.joint is not None)
    return bars, [via for via in router.vias if all(-via.radius < at < size + via.radius for at in (via.y, via.x))]


def _ticks(rng: np.random.Generator, size: int, step: float, low: float, high: float) -> np.ndarray:
    """Uneven grid positions from more than a step before 0 to as far beyond `size`."""
    steps = step * rng.uniform(low, high, int(size / (step * low)) + 9)
    ticks = np.cumsum(steps) - step * rng.uniform(3, 4.5)
    return ticks[: np.searchsorted(ticks, size + rng.uniform(1.2, 2.5) * step) + 1]


class _Router:
    """Nets on a grid of tracks (K, across the main direction) by columns (J, along it)."""

    def __init__(self, rng: np.random.Generator, size: int, axis: int, rules: Rules):
        self.rng, self.size, self.axis, self.rules = rng, size, axis, rules
        self.half = rules.pitch * rules.fill / 2
        self.tracks = _ticks(rng, size, rules.pitch, 1 - 0.08 * rules.uneven, 1 + 0.3 * rules.uneven)  # (K,)
        self.columns = _ticks(rng, size, rules.pitch, 1.15, 1.75)  # (J,)
        self.used = np.zeros((len(self.tracks), len(self.columns)), bool)
        self.bare = 0.0  # share of the ends without a via
        self.round = rng.uniform(0.8, 1.0)  # radius of an end over half the width
        self.bars: list[Bar] = []
        self.vias: list[Via] = []

    # -- pieces

    def _style(self) -> tuple[float, float]:
        """Half width and level of a new net."""
        width = self.rng.choice([1.0, 1.0, 1.0, 0.88, 1.12]) if self.rules.uneven > 0.5 else 1.0
        width = min(width, 0.7 / self.rules.fill)  # lines stay apart
        return self.half * width * self.rng.uniform(0.97, 1.03), self.rng.normal(1, 0.03)

    def _via(self, along: float, across: float, main: bool, half: float, end: bool) -> None:
        y, x = (along, across) if (self.axis == 0) == main else (across, along)
        y, x = (y, x) + self.rng.uniform(-0.14, 0.14, 2) * self.half  # layers do not lie exactly on each other
        radius = self.rules.via * min(half, 1.3 * self.half) * np.clip(self.rng.normal(1, 0.07), 0.8, 1.2)
        self.vias.append(Via(float(y), float(x), radius, self.rng.uniform(0.8, 1.1), end))

    def _bar(self, main: bool, centre, start, stop, net, ends=(True, True), joint=None) -> None:
        """A bar from node to node, along the main direction or across it; `ends` says which are free."""
        half, level = net
        tails = []
        slack = min(0.35 * (stop - start) / self.rules.pitch, 0.7) * self.rules.uneven  # ends of tracks do not line up
        for end, sign, place in zip(ends, (-1, 1), (start, stop), strict=True):
            place -= sign * self.rng.uniform(-0.1, max(slack, 0.1)) * self.rules.pitch * end
            if end and self.rng.random() >= self.bare:
                self._via(place, centre, main, half, True)
            tails.append(place + sign * half * (self.rng.uniform(1.0, 1.25) if end else 1.0))
        axis = self.axis if main else 1 - self.axis
        radius = half * (self.round if any(ends) else 0.95)
        self.bars.append(Bar(axis, tails[0], tails[1], centre, half, radius, level, joint))

    def _node(self) -> tuple[int, int]:
        """A track and a column in sight."""
        ticks = (self.tracks, self.columns)
        k, j = (self.rng.choice(np.flatnonzero((tick > 0) & (tick < self.size))) for tick in ticks)
        return int(k), int(j)

    def _run(self, k: int, first: int, last: int, net, ends=(True, True)) -> None:
        self.used[k, first : last + 1] = True
        self._bar(True, self.tracks[k], self.columns[first], self.columns[last], net, ends)
        if last - first > 2 and self.rng.random() < 0.1:
            j = self.rng.integers(first + 1, last)
            self._via(self.columns[j], self.tracks[k], True, net[0], False)

    # -- nets

    def pair(self) -> None:
        """Two neighbours near the middle, one of which ends in sight: a bridge, an open or a missing via can happen."""
        between = (self.tracks[1:] + self.tracks[:-1]) / 2
        k = int(np.argmin(np.abs(between - self.size * self.rng.uniform(0.42, 0.58))))
        seen = np.flatnonzero((self.columns > 0.12 * self.size) & (self.columns < 0.85 * self.size))
        j = int(self.rng.choice(seen)) if seen.size else int(np.argmin(np.abs(self.columns - self.size / 2)))
        last = len(self.columns) - 1
        ends = (0, j) if self.rng.random() < 0.5 else (j, last)
        long = (0, last) if self.rng.random() < 0.5 else ends
        lines = [ends, long] if self.rng.random() < 0.5 else [long, ends]
        for offset, (first, stop) in enumerate(lines):
            self._run(k + offset, first, stop, self._style())

    def power(self) -> None:
        """A line of two to four tracks' width from side to side."""
        wide = int(self.rng.choice([2, 2, 2, 3]))
        k, _ = self._node()
        if self.used[k : k + wide].any():
            return
        self.used[k : k + wide] = True
        low, high = self.tracks[k], self.tracks[k + wide - 1]
        level = self.rng.normal(1, 0.02)
        start, stop = self.columns[0] - self.rules.pitch, self.columns[-1] + self.rules.pitch
        net = ((high - low) / 2 + self.half * self.rng.uniform(0.2, 1.1), level)
        self._bar(True, (low + high) / 2, start, stop, net, (False, False))

    def hollow(self) -> None:
        """An empty region; its nodes count as used."""
        tall, wide = (int(n * self.rng.uniform(0.1, 0.25)) for n in self.used.shape)
        k, j = self._node()
        self.used[max(k - tall, 0) : k + tall + 1, max(j - wide, 0) : j + wide + 1] = True

    def dumbbell(self) -> None:
        """Two pads joined by a line, in the main direction; one of them at least in sight."""
        length = int(self.rng.integers(3, 6))
        k, j = self._node()
        low, high = (j, j + length) if self.rng.random() < 0.5 else (j - length, j)
        if low < 1 or high + 2 > len(self.columns) or self.used[k - 1 : k + 2, low - 1 : high + 2].any():
            return
        for end in (low, high):
            self.used[k - 1 : k + 2, end - 1 : end + 2] = True
        half, level = self._style()
        self._run(k, low, high, (half, level), (False, False))
        pad = 0.85 * min(self.tracks[k] - self.tracks[k - 1], self.tracks[k + 1] - self.tracks[k])
        for column in (self.columns[low], self.columns[high]):
            ends = column - pad, column + pad
            self.bars.append(Bar(self.axis, *ends, self.tracks[k], pad, 0.5 * pad, level, 0))
            self._via(column, self.tracks[k], True, 1.3 * self.half, True)

    def bend(self) -> None:
        """An L: along a track, then across at a column in sight."""
        rng, columns = self.rng, len(self.columns)
        k, j = self._node()
        far = int(np.clip(k + rng.choice([-1, 1]) * rng.integers(2, 6), 0, len(self.tracks) - 1))
        low, high = sorted((k, far))
        side, end = int(rng.choice([-1, 1])), j
        while 0 <= end + side < columns and not self.used[k, end + side] and abs(end - j) < self.rules.reach:
            end += side
        if high - low < 2 or abs(end - j) < 2 or self.used[low : high + 1, j].any():
            return
        net = self._style()
        self.used[low : high + 1, j] = True
        self._run(k, min(j, end), max(j, end), net, (side < 0, side > 0))
        self._bar(False, self.columns[j], self.tracks[low], self.tracks[high], net, (k == high, k == low), side)

    def comb(self) -> None:
        """Fingers on every second track, joined by a spine in sight at one end; lines lie between them."""
        rng, columns = self.rng, len(self.columns)
        span, length, side = 2 * int(rng.integers(1, 3)), int(rng.integers(3, 9)), int(rng.choice([-1, 1]))
        k, spine = self._node()
        low, high = sorted((spine, spine + side * length))
        block = self.used[k : k + span + 1, max(low, 0) : high + 1]
        if k + span >= len(self.tracks) or low < 0 or high >= columns or block.any():
            return
        net = self._style()
        inner = (low + 1, high) if side > 0 else (low, high - 1)
        for track in range(k, k + span + 1):
            if (track - k) % 2 == 0:
                self._run(track, low, high, net, (side < 0, side > 0))
            else:
                self._run(track, *inner, self._style())
        self.used[k : k + span + 1, spine] = True
        ends = self.tracks[k], self.tracks[k + span]
        self._bar(False, self.columns[spine], *ends, net, (False, False), side)

    def fill(self) -> None:
        """Lines along all tracks, wherever nodes are free."""
        columns = len(self.columns)
        for k in range(len(self.tracks)):
            j = 0
            while j < columns:
                if self.used[k, j] or self.rng.random() < self.rules.skip:
                    j += 1
                    continue
                last = j
                while last + 1 < columns and not self.used[k, last + 1] and self.rng.random() > 1 / self.rules.reach:
                    last += 1
                if last == j:
                    j += 1
                    continue
                self._run(k, j, last, self._style())
                j = last + 1


def join(first: np.ndarray, second: np.ndarray, corner: float, out: np.ndarray | None = None) -> np.ndarray:
    """Union of two signed distances whose inner corners are rounded with this radius."""
    least, corner = np.minimum(first, second), np.float32(corner)
    round_ = corner - np.hypot(np.maximum(corner - first, 0), np.maximum(corner - second, 0))
    return np.minimum(least, np.where(least < corner, round_, least), out=out)


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
