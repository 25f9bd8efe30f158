"""The seven kinds of defects of the synthetic set: each changes a window of a scene's clean image."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter, gaussian_filter1d

from zoo.data.layout import Bar, Window, around, join, offsets, on_axis, sigmoid
from zoo.data.scene import SMALLEST, Scene, stretch


def _particle(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """An irregular grain with a bright rim and texture, lying on lines and ground, with a shadow at one side."""
    rng, px = scene.defect, scene.scale
    radius = scene.field * np.exp(rng.uniform(*np.log((0.028, 0.08))))
    cy, cx = place(scene)
    window = around(cy, cx, 2.2 * radius + 14 * px, scene.size)
    d = _blob(rng, window, cy, cx, radius, 0.11) / np.float32(px)
    under = clean[window]
    inside = sigmoid(d * np.float32(-1.6 / scene.look.focus))
    rough = gaussian_filter(rng.standard_normal(d.shape, dtype=np.float32), max(radius * 0.14, 0.7))
    rough *= np.float32(rng.uniform(8, 22) / (rough.std() + 1e-6))
    y, x = offsets(window, cy, cx)
    lit = np.float32(rng.uniform(6, 18) / radius) * -(x + y)  # brighter towards the detector
    low, high = limits(clean)
    side = rng.choice([-0.6, 1, 1])
    body = np.mean(under, dtype=np.float64) + side * rng.uniform(48, 88)
    rim = np.float32(rng.uniform(0.5, 1.0) * scene.look.edge)
    rim = rim * np.exp(-np.square((d + np.float32(1.6)) / np.float32(0.8 + 0.7 * scene.look.focus)))
    grain = np.clip(np.float32(np.clip(body, low + 8, high)) + rough + lit, low, high) + rim
    away = np.exp(-np.maximum(d, 0) / np.float32(rng.uniform(3, 7))) * sigmoid((x + y) / np.float32(radius / 3))
    shade = np.float32(rng.uniform(0.15, 0.45)) * away * sigmoid(d)
    return window, np.maximum(under * (1 - shade), np.minimum(low - 4, under)) * (1 - inside) + grain * inside


def _scratch(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A thin, curved groove (dark, with a bright rim) or ridge (bright), deeper in places and thin at its ends."""
    rng, px = scene.defect, scene.scale
    half = scene.field * np.exp(rng.uniform(*np.log((0.2, 0.42))))
    width = np.exp(rng.uniform(*np.log((1.7, 3.0)))) * px
    contrast = np.exp(rng.uniform(*np.log((80, 140)))) * rng.choice([-1, 1])
    angle, bend = rng.uniform(0, np.pi), half * rng.uniform(0.1, 0.45) * rng.choice([-1, 1])
    cy, cx = place(scene, 0.15)
    nodes = np.linspace(-1, 1, 96)
    depth = np.clip(1 + 1.2 * gaussian_filter1d(rng.standard_normal(96), 3.0), 0.4, 1.4)
    depth *= np.clip(4 * (1 - np.abs(nodes)), 0, 1)
    sway = gaussian_filter1d(rng.standard_normal(96), 6.0) * 4 * px
    window = around(cy, cx, half + abs(bend) / 2 + 16 * px, scene.size)
    y, x = offsets(window, cy, cx)
    u = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) / np.float32(half)  # -1 to 1 along it
    v = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))  # pixels across it
    near = (np.abs(u) < 1) & (np.abs(v) < abs(bend) / 2 + 20 * px)
    u, v = u[near], v[near]
    off = (v - bend * (0.5 - np.square(u)) - np.interp(u, nodes, sway)) / (width * np.interp(u, nodes, 0.5 + depth / 2))
    rim = rng.uniform(0.3, 0.8) * (contrast < 0)
    profile = np.exp(-np.square(off) / 2) - rim * np.exp(-np.square(off - rng.choice([-2.3, 2.3])) / 2)
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
    thick = np.exp(rng.uniform(np.log(8 * px), np.log(max(1.2 * gap, 12 * px))))  # half
    y, x = on_axis(axis, along, (start + stop) / 2)
    window = around(y, x, gap / 2 + thick + 20 * px, scene.size)
    t, c = on_axis(axis, *offsets(window, y, x))  # along the lines and across them
    flank = rng.standard_normal((2, c.size), dtype=np.float32)  # the two sides of the bridge, each ragged in its way
    flank = 6 * gaussian_filter1d(flank, 5 * px) + gaussian_filter1d(flank[::-1], 2 * px)
    flank = np.maximum(thick + np.float32(1.6 * px) * flank, 2.5 * px).reshape(2, *c.shape)
    middle = np.float32(rng.uniform(-0.35, 0.35)) * c
    beyond = np.abs(c) - np.float32(gap / 2 + 5 * px)  # it ends inside of the lines
    sides = np.maximum(t - middle - flank[0], middle - t - flank[1])
    material = (np.maximum(sides, beyond) / np.float32(px)).astype(np.float32)
    joined = join(scene.distance[window], material, 5.0)
    changed = reshaped(scene, clean, window, joined, rng.uniform(0.7, 1.0))
    new = sigmoid(-material) * sigmoid(scene.distance[window])
    return window, tinted(scene, clean, changed, new, rng.uniform(0.4, 1.9))


def _open(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A ragged break of a line, narrower than the spaces that were drawn; residue may be left in it."""
    rng, px = scene.defect, scene.scale
    bar, along = spot(scene, 0.5 * scene.look.pitch, 0.45 * scene.look.pitch)
    y, x = on_axis(bar.axis, along, tilted(scene, bar, along))
    gap = np.exp(rng.uniform(np.log(7 * px), np.log(max(0.58 * scene.look.pitch, 14 * px))))  # half
    window = around(y, x, bar.half + gap + 28 * px, scene.size)
    t, c = on_axis(bar.axis, *offsets(window, y, x))
    ragged = rng.standard_normal((2, c.size), dtype=np.float32)
    ragged = gaussian_filter1d(ragged, 2.5 * px) * np.float32(6 * px) + gaussian_filter1d(ragged, 7 * px) * 14 * px
    curved = np.float32(rng.uniform(-0.3, 0.5) * gap) * np.minimum(np.square(c / np.float32(bar.half)), 1)
    tips = np.maximum(t - ragged[0].reshape(c.shape), ragged[1].reshape(c.shape) - t)
    near = tips - np.maximum(np.float32(gap) + curved, np.float32(3 * px))
    beside = np.abs(c) - np.float32(bar.half + 6 * px)
    cut = np.hypot(np.maximum(near, 0), np.maximum(beside, 0)) + np.minimum(np.maximum(near, beside), 0)
    cut /= np.float32(px)
    changed = carved(scene, clean, window, cut, rng.uniform(0.9, 1.0), rng.uniform(1.0, 2.2), 4 + 0.12 * gap / px)
    rubble = gaussian_filter(rng.standard_normal(cut.shape, dtype=np.float32), max(4 * px, 0.6))
    rubble = np.clip(rubble / rubble.std() - np.float32(0.4), 0, 2)
    rubble *= sigmoid(-cut - 1) * sigmoid(-scene.distance[window])  # where metal was
    return window, tinted(scene, clean, changed, rubble, rng.uniform(0.2, 1.4))


def _mousebite(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """Metal missing or thinned at one edge of a line, a third to two thirds of its width, or at both edges: necking."""
    rng, px = scene.defect, scene.scale
    bar, along = spot(scene, 0.45 * scene.look.pitch, 0.3 * scene.look.pitch)
    middle, sides = tilted(scene, bar, along), [(-1,), (1,), (-1, 1)][rng.integers(3)]
    deep = 2 * bar.half * rng.uniform(0.33, 0.7) / len(sides)
    radius = min(max(deep * rng.uniform(1.0, 2.2), 4 * px), 0.14 * min(scene.field / SMALLEST, 1.0) * scene.field)
    y, x = on_axis(bar.axis, along, middle)
    window = around(y, x, bar.half + 2 * radius + 28 * px, scene.size)
    cut = np.float32(1e3)
    for side in sides:
        cy, cx = on_axis(bar.axis, along + rng.uniform(-3, 3) * px, middle + side * (bar.half + radius - deep))
        cut = np.minimum(cut, _blob(rng, window, cy, cx, radius, 0.07) / np.float32(px))
    across = on_axis(bar.axis, *offsets(window, y, x))[1]
    cut = np.maximum(cut, np.abs(across) / np.float32(px) - np.float32(bar.half / px + 6))  # of this line alone
    return window, carved(scene, clean, window, cut, rng.uniform(0.6, 1.0), rng.uniform(0.2, 1.9), 4.5)


def _missing_via(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A via that is not there, or that was not filled: a small hole in the metal."""
    rng, look = scene.defect, scene.look
    seen = [via for via in scene.vias if in_sight(scene, via.y, via.x)]
    near = min(scene.vias, key=lambda via: np.hypot(via.y - scene.size / 2, via.x - scene.size / 2))
    ends = [via for via in seen if via.end] or seen or [near]
    chosen = ends[rng.integers(len(ends))]
    window, dot = scene.dot(chosen)
    under = clean[window] - dot
    if rng.random() < 0.1:
        return window, under
    radius = min(rng.uniform(1.05, 1.5) * chosen.radius, 0.43 * look.pitch * look.fill)
    d = _blob(rng, window, *scene.seat(chosen), radius, 0.06) / np.float32(scene.scale)
    soft = np.float32(0.6 + 0.5 * look.focus)
    hole = np.float32(rng.uniform(0.7, 1.2) * look.metal) * sigmoid(-d / soft)
    rim = np.float32(rng.uniform(0.7, 1.6) * look.edge) * np.exp(-np.square((d - 1) / (1 + soft)))
    low, high = limits(clean)
    return window, np.clip(under + rim - hole, np.minimum(low, under), np.maximum(high, under))


def _stain(scene: Scene, clean: np.ndarray) -> tuple[Window, np.ndarray]:
    """A film of residue: large, soft, cloudy, mostly darker; it veils what lies under it."""
    rng, px = scene.defect, scene.scale
    radius = scene.field * np.exp(rng.uniform(*np.log((0.085, 0.155))))
    cy, cx = place(scene)
    window = around(cy, cx, 1.8 * radius + 24 * px, scene.size)
    d = _blob(rng, window, cy, cx, radius, 0.2) / np.float32(px)
    film = sigmoid(-d / np.float32(rng.uniform(3, 7) * min(scene.field / SMALLEST, 1.0)))
    tall, wide = d.shape
    cloud = stretch(stretch(rng.standard_normal((12, 12), dtype=np.float32), tall).T, wide).T
    film *= np.clip(1 + np.float32(0.25 / (cloud.std() + 1e-6)) * cloud, 0.3, 1.6)
    contrast = np.exp(rng.uniform(*np.log((30, 58)))) * rng.choice([-1, -1, -1, 1])
    veil = np.float32(rng.uniform(0.5, 0.95)) * np.minimum(film, 1)
    (low, high), under = limits(clean), clean[window]
    veiled = under + veil * (gaussian_filter(under, rng.uniform(3, 6) * px, truncate=2.5) - under)
    veiled *= 1 + np.float32(contrast / np.mean(clean[::5, ::5])) * film
    return window, np.clip(veiled, np.minimum(low, under), np.maximum(high, under))


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
    low, high = np.quantile(clean[::5, ::5], (0.002, 0.994))
    return float(low), float(high)


def place(scene: Scene, reach: float = 0.05) -> tuple[float, float]:
    """A random centre (y, x), above the info bar."""
    return tuple(scene.defect.uniform(reach * scene.size, (high - reach) * scene.size) for high in (0.92, 1.0))


def in_sight(scene: Scene, y: float, x: float) -> bool:
    return 0.04 * scene.size < y < 0.88 * scene.size and 0.04 * scene.size < x < 0.96 * scene.size


def spot(scene: Scene, widest: float, length: float) -> tuple[Bar, float]:
    """A bar at most `widest` pixels in half width, and a place along it in sight, alone for `length` to either side."""
    size = scene.size
    seen = [bar for bar in scene.bars if min(bar.stop, size) - max(bar.start, 0) > 2 * length and bar.half <= widest]
    bars = [bar for bar in seen if 0.04 * size < bar.centre < 0.96 * size] or scene.bars
    for _ in range(200):
        bar = bars[scene.defect.integers(len(bars))]
        low, high = max(bar.start, 0) + length, min(bar.stop, size) - length
        along = float(np.clip(scene.defect.uniform(low, max(low, high)), 0, size - 1))
        places = np.clip(along + length * np.arange(-1, 2), 0, size - 1).astype(int)
        middle = int(np.clip(round(tilted(scene, bar, along)), 0, size - 1))
        depth = -scene.distance[on_axis(bar.axis, places, middle)] * scene.scale
        if in_sight(scene, *on_axis(bar.axis, along, bar.centre)) and (np.abs(depth / bar.half - 1) < 0.3).all():
            break
    return bar, along


def tilted(scene: Scene, bar: Bar, along: float) -> float:
    """Where the middle of a bar is, across, at a place along it."""
    return bar.centre + (1 if bar.axis == 0 else -1) * scene.look.tilt * (along - scene.size / 2)


def space(scene: Scene) -> tuple[int, float, int, int]:
    """Between two neighbours: their axis, a place along them, and pixels across where one ends and one begins.

    Both lines go on for 0.35 of the pitch to either side of the place, if such a place was found.
    """
    pitch, found = scene.look.pitch, None
    steps = np.arange(-0.35, 0.36, 0.35)[:, None] * pitch  # (3, 1)
    for _ in range(200):
        bar, along = spot(scene, np.inf, 0.0)
        side, edge = scene.defect.choice([-1, 1]), bar.half - scene.scale
        path = tilted(scene, bar, along) + side * np.arange(edge, edge + 1.4 * pitch, max(scene.scale, 0.5))  # (N,)
        path = np.clip(path, 0, scene.size - 1).astype(int)
        places = np.clip(along + steps, 0, scene.size - 1).astype(int)
        metal = scene.distance[on_axis(bar.axis, places, path[None])] < 0  # (3, N)
        first = int(np.argmin(metal[1]))  # in the space, if there is one
        if not metal[1, first] and metal[1, first:].any():
            last = first + int(np.argmax(metal[1, first:]))
            found = bar.axis, along, int(path[max(first - 1, 0)]), int(path[last])
            solid = metal[:, max(first - 4, 0)] & metal[:, min(last + 4, len(path) - 1)]
            if solid.all() and not metal[:, (first + last) // 2].any():
                return found
    return found or (bar.axis, along, int(path[0]), int(path[len(path) // 3]))


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
    scene: Scene, clean: np.ndarray, window: Window, cut: np.ndarray, strength: float, shine: float, reach: float
) -> np.ndarray:
    """Without the metal where the distance `cut` is negative; torn edges shine as far as `reach`."""
    distance = scene.distance[window]
    changed = reshaped(scene, clean, window, -join(-distance, cut, 3.0), strength)
    torn = sigmoid(-distance) * sigmoid(cut) * np.exp(-np.square(cut / np.float32(reach)))
    return tinted(scene, clean, changed, torn, shine)


def _blob(rng: np.random.Generator, window: Window, cy: float, cx: float, radius: float, uneven: float) -> np.ndarray:
    """Signed distance in pixels, nearly, to an irregular round outline."""
    y, x = offsets(window, cy, cx)
    stretch = np.exp(rng.normal(0, uneven))
    turn = rng.uniform(0, np.pi)
    y, x = x * np.sin(turn) + y * np.cos(turn), x * np.cos(turn) - y * np.sin(turn)
    y, x = (y * stretch).astype(np.float32), (x / stretch).astype(np.float32)
    angle, outline = np.arctan2(y, x), np.float32(1)
    for order in range(2, 8):
        strength = rng.normal(0, 2 * uneven / order)
        outline = outline + np.float32(strength) * np.cos(order * angle + np.float32(rng.uniform(0, 2 * np.pi)))
    return np.hypot(y, x) - np.float32(radius) * np.clip(outline, 0.6, 1.5)
