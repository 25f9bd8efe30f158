"""Parts of a page that shows what was found: pictures as data URIs, outlines as SVG paths, regions in words.

The report (`zoo.inspection`) and the demo fill their templates with them.
"""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage
from skimage.measure import approximate_polygon, find_contours

from zoo.evidence import Crop

SIDE = 512  # pixels of a picture, at most
LOSSLESS = 192  # side up to which a picture is PNG; JPEG beyond


def region_words(number: int, region: dict[str, Any], nm: float | None) -> dict[str, Any]:
    """A region (`zoo.regions.Region.described`) in words, in pixels and, where a pixel's side in nm is known, in nm."""
    (top, left, bottom, right), (row, column) = region["box"], region["position"]
    about = {"number": number, "x": column, "y": row, "width": right - left, "height": bottom - top}
    about |= {"area": region["area"], "peak": f"{region['peak']:.6g}", "p_value": f"{region['p_value']:.4g}"}
    if nm is not None:
        unit, scale, square = ("µm", 1e3, "µm²") if max(right - left, bottom - top) * nm >= 1000 else ("nm", 1, "nm²")
        about["size"] = f"{_plain((right - left) * nm / scale)} × {_plain((bottom - top) * nm / scale)} {unit}"
        about["real_area"] = f"{_plain(region['area'] * (nm / scale) ** 2)} {square}"
    return about


def _plain(value: float) -> str:
    """Four digits that count, without an exponent."""
    return f"{float(f'{value:.4g}'):,.10g}"


def cropped(crop: Crop) -> dict[str, Any]:
    """A crop as a data URI, with its size and the box of its patch in pixels."""
    (height, width), (top, left, bottom, right) = crop.pixels.shape[:2], crop.box
    box = {"x": f"{left:.2f}", "y": f"{top:.2f}", "width": f"{right - left:.2f}", "height": f"{bottom - top:.2f}"}
    return {"picture": picture(crop.pixels, LOSSLESS), "width": width, "height": height, "box": box}


def picture(pixels: np.ndarray, side: int = SIDE) -> str:
    """uint8 (H, W, 3) -> a data URI, of at most so many pixels a side."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    shown = np.asarray(image)
    if (shown == shown[..., :1]).all():
        image = image.convert("L")
    kind, how = ("png", {}) if max(image.size) <= LOSSLESS else ("jpeg", {"quality": 88})
    file = io.BytesIO()
    image.save(file, kind, optimize=True, **how)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def outline(number: int, region: dict[str, Any], mask: np.ndarray | None, size: tuple[int, int]) -> dict[str, Any]:
    """The line around a region as an SVG path, and where its number stands, in pixels of the image."""
    (top, left, bottom, right), (height, width) = region["box"], size
    path = f"M{left} {top}H{right}V{bottom}H{left}Z"
    if mask is not None and mask.shape == (height, width):
        labels, _ = ndimage.label(mask[top:bottom, left:right], np.ones((3, 3)))
        own = np.pad(labels == labels[region["position"][0] - top, region["position"][1] - left], 1)
        lines = [approximate_polygon(line, max(size) / 800) for line in find_contours(own.astype(float), 0.5)]
        shift = (top - 0.5, left - 0.5)  # of the padding, and of a pixel's middle
        path = "".join(_closed(line + shift) for line in lines) or path
    text = max(size) / 26
    y = top - 0.3 * text if top > 1.3 * text else min(bottom + text, height - 0.2 * text)
    places = {"x": f"{min(left, width - text):.1f}", "y": f"{y:.1f}", "text": f"{text:.1f}"}
    return {"number": number, "path": path} | places


def _closed(line: np.ndarray) -> str:
    """(n, 2) rows and columns, the last one the first again -> a part of an SVG path."""
    return "M" + "L".join(f"{column:.1f} {row:.1f}" for row, column in line[:-1]) + "Z"
