"""The seven kinds of defects of the synthetic set: each changes a window of a scene's clean image."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from zoo.data.layout import Bar
from zoo.data.scene import SMALLEST, Scene, Window, around, join, offsets, on_axis, sigmoid, stretch


def _particle(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """An irregular grain with a bright rim and texture, lying on lines and ground, with a shadow at one side."""
    rng, px = scene.defect, scene.scale
    radius = scene.field * np.exp(rng.uniform(*np.log((0.028, 0.08))))
    cy, cx = place(scene)
    window = around(cy, cx, 2.2 * radius + 8 * px, scene.size)
    d = _blob(rng, window, cy, cx, radius, 0.11) / np.float32(px)
    under = clean[window]
    inside = sigmoid(d * np.float32(-1.6 / scene.look.focus))
    rough = gaussian_filter(rng.standard_normal(d.shape, dtype=np.float32), max(radius * 0.14, 0.7))
    rough *= np.float32(rng.uniform(8, 24) / (rough.std() + 1e-6))
    y, x = offsets(window, cy, cx)
    lit = np.float32(rng.uniform(4, 14) / radius) * -(x + y)  # brighter towards the detector
    low, high = limits(clean)
    body = np.mean(under, dtype=np.float64) + rng.choice([-1, 1]) * rng.uniform(38, 85)
    rim = np.float32(rng.uniform(0.2, 0.8) * scene.look.edge) * np.exp(-np.abs(d + 2) / np.float32(2.5))
    grain = np.clip(np.float32(np.clip(body, low, high)) + rough + lit + rim, low, high)
    shade = (
        np.float32(rng.uniform(0.05, 0.3)) * np.exp(-np.maximum(d, 0) / 4) * sigmoid((x + y) / np.float32(radius / 2))
    )
    return window, np.maximum(under * (1 - shade), np.minimum(low, under)) * (1 - inside) + grain * inside


def _scratch(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A thin, slightly bent groove (dark) or ridge (bright) of uneven depth, with material pushed aside."""
    rng, px = scene.defect, scene.scale
    half = scene.field * np.exp(rng.uniform(*np.log((0.15, 0.38))))
    width = np.exp(rng.uniform(*np.log((2.2, 4.4)))) * px
    contrast = np.exp(rng.uniform(*np.log((45, 95)))) * rng.choice([-1, 1])
    angle, bend = rng.uniform(0, np.pi), half * rng.uniform(-0.3, 0.3)
    cy, cx = place(scene, 0.15)
    nodes = np.linspace(-1, 1, 96)
    depth = np.clip(1 + 1.4 * gaussian_filter1d(rng.standard_normal(96), 2.0), 0.3, 1.7)
    depth *= np.minimum(1, 5 * (1 - np.abs(nodes)))
    sway = gaussian_filter1d(rng.standard_normal(96), 5.0) * 4 * px
    window = around(cy, cx, half + abs(bend) + 16 * px, scene.size)
    y, x = offsets(window, cy, cx)
    u = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) / np.float32(half)  # -1 to 1 along it
    v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))  # pixels across it
    near = (np.abs(u) < 1) & (np.abs(v) < abs(bend) + 24 * px)
    u, v = u[near], v[near]
    off = (v - bend * (0.5 - np.square(u)) - np.interp(u, nodes, sway)) / width
    profile = np.exp(-np.square(off) / 2) - 0.3 * np.exp(-np.square(off - 2.4) / 2)
    (low, high), changed = limits(clean), clean[window].copy()
    under = changed[near]
    moved = under + contrast * np.interp(u, nodes, depth) * profile
    changed[near] = np.clip(moved, np.minimum(low, under), np.maximum(high, under))
    return window, changed


def _bridge(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """Line material across the space between two neighbours: a short, from a hair to a full blob, whole or faint."""
    rng, px = scene.defect, scene.scale
    axis, along, start, stop = space(scene)
    gap = max(abs(stop - start), 2)
    thick = np.exp(rng.uniform(np.log(5 * px), np.log(max(1.0 * gap, 8 * px))))  # half, at the waist
    flare, slant = rng.uniform(0.1, 0.8), rng.uniform(-0.3, 0.3)
    y, x = on_axis(axis, along, (start + stop) / 2)
    window = around(y, x, gap + 2 * thick + 12 * px, scene.size)
    t, c = on_axis(axis, *offsets(window, y, x))  # along the lines and across them
    c = c / np.float32(gap / 2)  # -1 to 1 from line to line
    ragged = gaussian_filter1d(rng.standard_normal((2, c.size), dtype=np.float32), 3 * px) * np.float32(1.6 * px)
    waist = thick * (1 + flare * np.minimum(np.square(c), 1.5)) + ragged[0].reshape(c.shape)
    middle = slant * gap / 2 * c + ragged[1].reshape(c.shape)
    beyond = (np.abs(c) - 1) * (gap / 2) - 3 * px
    material = np.maximum(np.abs(t - middle) - waist, beyond) / np.float32(px)
    joined = join(scene.distance[window], material.astype(np.float32))
    changed = reshaped(scene, clean, window, joined, rng.uniform(0.6, 1.0))
    return window, tinted(scene, clean, changed, sigmoid(-material), rng.uniform(0.3, 1.3))


def _open(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A ragged break of a line, narrower than the spaces that were drawn; residue may be left in it."""
    rng, px = scene.defect, scene.scale
    bar, along = spot(scene, 0.5 * scene.look.pitch, 0.45 * scene.look.pitch)
    y, x = on_axis(bar.axis, along, tilted(scene, bar, along))
    gap = np.exp(rng.uniform(np.log(6.0 * px), np.log(max(0.32 * scene.look.pitch, 9.0 * px))))  # half
    window = around(y, x, bar.half + gap + 32 * px, scene.size)
    t, c = on_axis(bar.axis, *offsets(window, y, x))
    ragged = gaussian_filter1d(rng.standard_normal((2, c.size), dtype=np.float32), 3 * px) * np.float32(3.5 * px)
    curved = np.float32(rng.uniform(0.0, 0.5) * gap) * np.minimum(np.square(c / np.float32(bar.half)), 1)
    near = np.abs(t - ragged[0].reshape(c.shape)) - np.float32(gap) - curved - ragged[1].reshape(c.shape)
    beside = np.abs(c) - np.float32(bar.half + 4 * px)
    cut = np.hypot(np.maximum(near, 0), np.maximum(beside, 0)) + np.minimum(np.maximum(near, beside), 0)
    cut /= np.float32(px)
    strength, shine, halo = rng.uniform(0.75, 1.0), rng.uniform(0.6, 1.8), rng.uniform(0.0, 1.4)
    return window, carved(scene, clean, window, cut, strength, shine, halo)


def _mousebite(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """Missing metal at one edge of a line, or at both: necking."""
    rng, px = scene.defect, scene.scale
    bar, along = spot(scene, np.inf, 0.2 * scene.look.pitch)
    middle, half = tilted(scene, bar, along), min(bar.half, 0.35 * scene.look.pitch)
    deep = half * rng.uniform(0.75, 1.7)
    both = rng.random() < 0.35
    sides = (-1, 1) if both else (rng.choice([-1, 1]),)
    deep *= 0.65 if both else 1.0
    radius = min(max(deep * rng.uniform(0.7, 1.5), 4 * px), 0.14 * shrunk(scene) * scene.field)
    y, x = on_axis(bar.axis, along, middle)
    window = around(y, x, bar.half + 2 * radius + 32 * px, scene.size)
    cut = np.float32(1e3)
    for side in sides:
        cy, cx = on_axis(bar.axis, along + both * rng.uniform(-2, 2) * px, middle + side * (bar.half + radius - deep))
        cut = np.minimum(cut, _blob(rng, window, cy, cx, radius, 0.1) / np.float32(px))
    return window, carved(scene, clean, window, cut, 1.0, rng.uniform(0.2, 1.2), rng.uniform(0.2, 1.1))


def _missing_via(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A via at the end of a line that is not there, or that was not filled: a dark hole."""
    seen = [via for via in scene.vias if in_sight(scene, via.y, via.x)]
    ends = [via for via in seen if via.end] or seen or scene.vias
    chosen = ends[scene.defect.integers(len(ends))]
    hole, dot = scene.dot(chosen)
    window, halo = scene.dot(replace(chosen, radius=(1 + 1.2 * shrunk(scene)) * chosen.radius))
    changed = clean.copy()
    changed[hole] -= dot * np.float32(scene.defect.uniform(1.6, 4.6))
    changed[window] -= halo * np.float32(scene.defect.uniform(0.1, 1.1))
    low, high = limits(clean)
    return window, np.clip(changed[window], np.minimum(low, clean[window]), np.maximum(high, clean[window]))


def _stain(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A film of residue: soft, irregular, darker or brighter, with a faint border where it dried."""
    rng = scene.defect
    radius = scene.field * np.exp(rng.uniform(*np.log((0.05, 0.14))))
    cy, cx = place(scene)
    window = around(cy, cx, 2.6 * radius, scene.size)
    d = _blob(rng, window, cy, cx, radius, 0.2) / np.float32(radius)
    soft = np.float32(rng.uniform(0.04, 0.14))
    film = sigmoid(-d / soft) + np.float32(rng.uniform(0.3, 1.2)) * np.exp(-np.square(d / soft) / 2)
    tall, wide = d.shape
    cloud = stretch(stretch(rng.standard_normal((12, 12), dtype=np.float32), tall).T, wide).T
    film *= 1 + np.float32(0.25 / (cloud.std() + 1e-6)) * cloud
    contrast = np.exp(rng.uniform(*np.log((34, 72)))) * rng.choice([-1, 1], p=[0.6, 0.4])
    (low, high), under = limits(clean), clean[window]
    grey = np.mean(under, dtype=np.float64)
    thick = np.float32(contrast) * film + np.float32(0.4 * abs(contrast) / grey) * film * (grey - under)  # it veils
    return window, np.clip(under + thick, np.minimum(low, under), np.maximum(high, under))


DEFECTS = {
    "particle": _particle,
    "scratch": _scratch,
    "bridge": _bridge,
    "open": _open,
    "mousebite": _mousebite,
    "missing_via": _missing_via,
    "stain": _stain,
}


def limits(clean: np.ndarray) -> tuple[float, float]:
    """Grey levels that a defect does not exceed, since the image itself reaches beyond them."""
    low, high = np.quantile(clean[::5, ::5], (0.004, 0.985))
    return float(low), float(high)


def place(scene: Scene, reach: float = 0.05) -> tuple[float, float]:
    """A random centre (y, x), above the info bar."""
    return tuple(scene.defect.uniform(reach * scene.size, (high - reach) * scene.size) for high in (0.92, 1.0))


def in_sight(scene: Scene, y: float, x: float) -> bool:
    return 0.04 * scene.size < y < 0.88 * scene.size and 0.04 * scene.size < x < 0.96 * scene.size


def spot(scene: Scene, widest: float, length: float) -> tuple[Bar, float]:
    """A bar at most `widest` pixels in half width, and a place along it with `length` metal before and after."""
    bars = [bar for bar in scene.bars if bar.half <= widest]
    for _ in range(200):
        bar = bars[scene.defect.integers(len(bars))]
        low, high = max(bar.start + length, 0), min(bar.stop - length, scene.size)
        along = scene.defect.uniform(low, max(low, high))
        if low <= high and in_sight(scene, *on_axis(bar.axis, along, bar.centre)):
            return bar, along
    return bar, float(np.clip(along, 0.1 * scene.size, 0.85 * scene.size))


def tilted(scene: Scene, bar: Bar, along: float) -> float:
    """Where the middle of a bar is, across, at a place along it."""
    return bar.centre + (1 if bar.axis == 0 else -1) * scene.look.tilt * (along - scene.size / 2)


def space(scene: Scene) -> tuple[int, float, int, int]:
    """Between two neighbours: their axis, a place along them, and pixels across where one ends and one begins."""
    step, pitch = max(scene.scale, 0.5), scene.look.pitch
    for _ in range(200):
        bar, along = spot(scene, np.inf, 0.0)
        side, edge = scene.defect.choice([-1, 1]), bar.half - scene.scale
        path = tilted(scene, bar, along) + side * np.arange(edge, edge + 1.4 * pitch, step)
        path = np.clip(path, 0, scene.size - 1).astype(int)
        metal = scene.distance[on_axis(bar.axis, np.full(len(path), int(along)), path)] < 0
        first = int(np.argmin(metal))  # in the space, if there is one
        if not metal[first] and metal[first:].any():
            return bar.axis, along, int(path[max(first - 1, 0)]), int(path[first + np.argmax(metal[first:])])
    return bar.axis, along, int(path[0]), int(path[len(path) // 3])


def reshaped(scene: Scene, clean: np.ndarray, window: Window, distance: np.ndarray, strength: float) -> np.ndarray:
    """The window of the clean image with another geometry, seen as strongly as given."""
    rows, columns = window
    whole = scene.distance[rows].copy()
    whole[:, columns] = distance
    change = scene.shade(whole, rows)[:, columns] - scene.shade(scene.distance[rows], rows)[:, columns]
    return clean[window] + np.float32(strength) * change


def tinted(scene: Scene, clean: np.ndarray, changed: np.ndarray, where: np.ndarray, strength: float) -> np.ndarray:
    """A changed window that shines, in units of the edges' brightness, as torn or redeposited metal does."""
    low, high = limits(clean)
    bright = changed + np.float32(strength * scene.look.edge) * where.astype(np.float32)
    return np.clip(bright, np.minimum(low, changed), np.maximum(high, changed))


def carved(
    scene: Scene, clean: np.ndarray, window: Window, cut: np.ndarray, strength: float, shine: float, halo: float
) -> np.ndarray:
    """Without the metal where the distance `cut` is negative: torn edges shine, and around them it is darker."""
    distance = scene.distance[window]
    changed = reshaped(scene, clean, window, -join(-distance, cut), strength)
    changed = tinted(scene, clean, changed, sigmoid(-distance) * np.exp(-np.abs(cut) / 4), shine)
    return tinted(scene, clean, changed, np.exp(-np.square(np.maximum(cut, 0) / (14 * shrunk(scene)))), -halo)


def shrunk(scene: Scene) -> float:
    """How much less than the nominal field the defects of a small image may fill, up to 1."""
    return min(scene.field / SMALLEST, 1.0)


def _blob(rng: np.random.Generator, window: Window, cy: float, cx: float, radius: float, uneven: float) -> np.ndarray:
    """Signed distance in pixels, nearly, to an irregular round outline."""
    y, x = offsets(window, cy, cx)
    stretch = np.exp(rng.normal(0, 0.15))
    turn = rng.uniform(0, np.pi)
    y, x = x * np.sin(turn) + y * np.cos(turn), x * np.cos(turn) - y * np.sin(turn)
    y, x = (y * stretch).astype(np.float32), (x / stretch).astype(np.float32)
    angle, outline = np.arctan2(y, x), np.float32(1)
    for order in range(2, 8):
        strength = rng.normal(0, 2 * uneven / order)
        outline = outline + np.float32(strength) * np.cos(order * angle + np.float32(rng.uniform(0, 2 * np.pi)))
    return np.hypot(y, x) - np.float32(radius) * np.clip(outline, 0.6, 1.5)
