"""Regions of an anomaly map: 8-connected pixels at or above a threshold, at least so many of them.

The level of a map is the highest threshold at which it has a region: for regions of a single pixel its maximum. So a
map has a region at a threshold if and only if its level reaches it, and thresholds come from levels of normal images.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # numpy and scipy are imported on use: the command line reads this module's names first
    import numpy as np

LOWEST = -3.4028234663852886e38  # float32: the level of a map that has too few pixels for a region


class Region(NamedTuple):
    """A region of a map.

    Attributes:
        area: in pixels.
        box: (top, left, bottom, right) in pixels, the last two exclusive.
        peak: highest value in it.
        position: (row, column) of the peak.
        level: highest threshold at which a region of the smallest area is left of it; `peak` if that is one pixel.
        p_value: share of normal images with any region of such a level; None until the model is calibrated.
    """

    area: int
    box: tuple[int, int, int, int]
    peak: float
    position: tuple[int, int]
    level: float
    p_value: float | None = None

    def described(self, pixel_nm: float | None = None) -> dict[str, Any]:
        """As JSON: the fields, and sizes in nm where the side of a pixel is known."""
        about = {"area": self.area, "box": list(self.box), "peak": self.peak, "position": list(self.position)}
        about |= {"level": self.level, "p_value": self.p_value}
        if pixel_nm is not None:
            top, left, bottom, right = self.box
            sizes = {"area_nm2": self.area * pixel_nm**2}
            sizes |= {"height_nm": (bottom - top) * pixel_nm, "width_nm": (right - left) * pixel_nm}
            about |= {key: float(f"{size:.6g}") for key, size in sizes.items()}
        return about


def find_regions(map: "np.ndarray", threshold: float, min_area: int = 1) -> list[Region]:
    """The regions of a map, by falling peak.

    Args:
        map: float (H, W); -inf where nothing counts.
        threshold: a pixel at or above it belongs to a region.
        min_area: pixels that a region has at least.
    """
    import numpy as np
    from scipy import ndimage

    labels, areas = _labelled(map >= threshold)
    found = []
    for label, box in enumerate(ndimage.find_objects(labels), start=1):
        if areas[label] < min_area:
            continue
        values = np.where(labels[box] == label, map[box], -np.inf)  # (h, w)
        row, column = np.unravel_index(values.argmax(), values.shape)
        (top, bottom), (left, right) = ((side.start, side.stop) for side in box)
        level = region_level(values, min_area)
        position = (int(top + row), int(left + column))
        found.append(Region(int(areas[label]), (top, left, bottom, right), float(values.max()), position, level))
    return sorted(found, key=lambda region: -region.peak)


def region_mask(map: "np.ndarray", threshold: float, min_area: int = 1) -> "np.ndarray":
    """Pixels (H, W) bool that belong to a region; the arguments are those of `find_regions`."""
    above = map >= threshold
    if min_area == 1:
        return above
    labels, areas = _labelled(above)
    return (areas >= min_area)[labels]


def region_level(map: "np.ndarray", min_area: int = 1) -> float:
    """The highest t for which {map >= t} has a region of this area; LOWEST if there are too few pixels above -inf.

    A full square of that area is a region, so that the level is at least the best square's minimum. Only what lies at
    or above that is looked at, each part by itself: little, in most maps.

    Args:
        map: float (H, W); -inf where nothing counts.
        min_area: pixels that a region has at least.
    """
    import numpy as np
    from scipy import ndimage

    if min_area == 1:
        return max(float(map.max()), LOWEST)
    side = math.ceil(math.sqrt(min_area))
    low = max(float(ndimage.minimum_filter(map, side, mode="constant", cval=-np.inf).max()), LOWEST)
    labels, areas = _labelled(map >= low)
    parts = [(i, box) for i, box in enumerate(ndimage.find_objects(labels), start=1) if areas[i] >= min_area]
    return max((_level_within(np.where(labels[b] == i, map[b], -np.inf), min_area) for i, b in parts), default=LOWEST)


def _level_within(map: "np.ndarray", min_area: int) -> float:
    """The level of a map (h, w) whose finite pixels are one region, by bisection over their values."""
    import numpy as np

    values = np.sort(map[map > -np.inf])[::-1]  # falling
    low, high = min_area - 1, len(values) - 1  # at the last one the region is whole
    while low < high:
        middle = (low + high) // 2
        if _labelled(map >= values[middle])[1].max() >= min_area:
            high = middle
        else:
            low = middle + 1
    return float(values[low])


def _labelled(above: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Numbers (H, W) of 8-connected parts from 1 on, and their areas by number, that of 0 (no part) being 0."""
    import numpy as np
    from scipy import ndimage

    labels, _ = ndimage.label(above, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    return labels, areas
