"""The routing of a metal layer for the synthetic generator: which bars and vias lie where, in pixels.

Nets live on an uneven grid of nodes, tracks by columns; a node belongs to one net at most, so that nets never touch.
Each end of a line inside of the image carries a via, as a line that ends without one would connect nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Bar:
    """A straight piece of metal with rounded ends.

    Attributes:
        axis: the image axis it runs along (0: rows, a vertical line).
        start, stop: where its ends are along that axis, pixels.
        centre, half: its middle and half its width across, pixels.
        radius: of its corners, pixels.
        level: brightness of its metal, around 1.
        joint: whether it meets bars drawn before, with corners that lithography fills.
    """

    axis: int
    start: float
    stop: float
    centre: float
    half: float
    radius: float
    level: float
    joint: bool


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
        bends: lines with a corner that are tried.
        dumbbells: pairs of pads that are tried.
        power: wide lines that are tried.
        hollow: share of the image kept free of lines.
        via: radius of a via over half the width of a line.
        uneven: how far widths and distances of tracks differ, 0 to 1.
    """

    pitch: float
    fill: float
    skip: float
    reach: float
    bends: int
    dumbbells: int
    power: int
    hollow: float
    via: float
    uneven: float


def route(rng: np.random.Generator, size: int, axis: int, rules: Rules) -> tuple[list[Bar], list[Via]]:
    """A layer of size x size pixels whose lines run mostly along `axis`; it has a free via and two lines in sight."""
    router = _Router(rng, size, axis, rules)
    router.pair()
    for _ in range(rules.power):
        router.power()
    if rules.hollow:
        router.hollow()
    for _ in range(rules.dumbbells):
        router.dumbbell()
    for _ in range(rules.bends):
        router.bend()
    router.fill()
    return sorted(router.bars, key=lambda bar: bar.joint), router.vias


def _ticks(rng: np.random.Generator, size: int, step: float, low: float, high: float) -> np.ndarray:
    """Uneven grid positions from before 0 to beyond `size`."""
    steps = step * rng.uniform(low, high, int(size / (step * low)) + 4)
    ticks = np.cumsum(steps) - step * rng.uniform(1.2, 2.2)
    return ticks[: np.searchsorted(ticks, size + 0.6 * step) + 1]


class _Router:
    """Nets on a grid of tracks (K, across the main direction) by columns (J, along it)."""

    def __init__(self, rng: np.random.Generator, size: int, axis: int, rules: Rules):
        self.rng, self.size, self.axis, self.rules = rng, size, axis, rules
        self.half = rules.pitch * rules.fill / 2
        self.tracks = _ticks(rng, size, rules.pitch, 1 - 0.08 * rules.uneven, 1 + 0.3 * rules.uneven)  # (K,)
        self.columns = _ticks(rng, size, rules.pitch, 1.15, 1.75)  # (J,)
        self.used = np.zeros((len(self.tracks), len(self.columns)), bool)
        self.bars: list[Bar] = []
        self.vias: list[Via] = []

    # -- pieces

    def _style(self) -> tuple[float, float]:
        """Half width and level of a new net."""
        width = self.rng.choice([1.0, 1.0, 1.0, 0.88, 1.12]) if self.rules.uneven > 0.5 else 1.0
        width = min(width, 0.7 / self.rules.fill)  # lines stay apart
        return self.half * width * self.rng.uniform(0.97, 1.03), self.rng.normal(1, 0.02)

    def _via(self, along: float, across: float, main: bool, half: float, end: bool) -> None:
        y, x = (along, across) if (self.axis == 0) == main else (across, along)
        radius = self.rules.via * min(half, 1.3 * self.half) * self.rng.normal(1, 0.04)
        self.vias.append(Via(y, x, radius, self.rng.uniform(0.8, 1.1), end))

    def _bar(self, main: bool, centre, start, stop, net, ends=(True, True), radius=0.95) -> None:
        """A bar from node to node, along the main direction or across it; `ends` says which get a via."""
        half, level = net
        tails = []
        slack = min(0.35 * (stop - start) / self.rules.pitch, 0.7) * self.rules.uneven  # ends of tracks do not line up
        for end, sign, place in zip(ends, (-1, 1), (start, stop), strict=True):
            place -= sign * self.rng.uniform(-0.1, max(slack, 0.1)) * self.rules.pitch * end
            if end:
                self._via(place, centre, main, half, True)
            tails.append(place + sign * half * (self.rng.uniform(1.0, 1.25) if end else 1.0))
        axis = self.axis if main else 1 - self.axis
        self.bars.append(Bar(axis, tails[0], tails[1], centre, half, radius * half, level, not main))

    def _run(self, k: int, first: int, last: int, net, ends=(True, True)) -> None:
        self.used[k, first : last + 1] = True
        self._bar(True, self.tracks[k], self.columns[first], self.columns[last], net, ends)
        if last - first > 2 and self.rng.random() < 0.15:
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
        k = int(self.rng.integers(0, max(len(self.tracks) - wide, 1)))
        block = self.used[k : k + wide]
        if len(block) < wide or block.any():
            return
        block[:] = True
        low, high = self.tracks[k], self.tracks[k + wide - 1]
        level = self.rng.normal(1, 0.02)
        start, stop = self.columns[0] - self.rules.pitch, self.columns[-1] + self.rules.pitch
        net = ((high - low) / 2 + self.half * self.rng.uniform(0.2, 1.1), level)
        self._bar(True, (low + high) / 2, start, stop, net, (False, False))

    def hollow(self) -> None:
        """An empty region; its nodes count as used."""
        share = np.sqrt(self.rules.hollow)
        tall, wide = (max(int(round(n * share * self.rng.uniform(0.7, 1.3))), 1) for n in self.used.shape)
        k = self.rng.integers(0, max(len(self.tracks) - tall, 0) + 1)
        j = self.rng.integers(0, max(len(self.columns) - wide, 0) + 1)
        self.used[k : k + tall, j : j + wide] = True

    def dumbbell(self) -> None:
        """Two pads joined by a line, in the main direction."""
        length = int(self.rng.integers(2, 5))
        if len(self.tracks) < 4 or len(self.columns) < length + 3:
            return
        k = int(self.rng.integers(1, len(self.tracks) - 1))
        j = int(self.rng.integers(1, len(self.columns) - length - 1))
        if self.used[k - 1 : k + 2, j - 1 : j + length + 2].any():
            return
        for end in (j, j + length):
            self.used[k - 1 : k + 2, end - 1 : end + 2] = True
        half, level = self._style()
        room = min(self.tracks[k] - self.tracks[k - 1], self.tracks[k + 1] - self.tracks[k])
        pad = room * self.rng.uniform(0.76, 0.9)
        round_ = 0.5 if self.rules.uneven < 0.4 else 0.9
        self._run(k, j, j + length, (half * self.rng.uniform(0.7, 0.9), level), (False, False))
        for column in (self.columns[j], self.columns[j + length]):
            long = pad * self.rng.uniform(0.75, 0.95)
            bar = Bar(
                self.axis, column - long, column + long, self.tracks[k], pad, round_ * min(pad, long), level, True
            )
            self.bars.append(bar)
            self._via(column, self.tracks[k], True, 1.3 * self.half, True)

    def bend(self) -> None:
        """An L: along a track, then across at a column."""
        rng, columns = self.rng, len(self.columns)
        k, j = int(rng.integers(0, len(self.tracks))), int(rng.integers(0, columns))
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
        self._bar(False, self.columns[j], self.tracks[low], self.tracks[high], net, (k == high, k == low))

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
