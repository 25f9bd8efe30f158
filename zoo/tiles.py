"""Large images in overlapping tiles: scored tile by tile, in memory that doesn't depend on the method, and blended."""

import math
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor

Box = tuple[slice, slice]  # rows and columns
Scoring = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]

OVERLAP = 0.25  # of a tile's side, at least, between neighbours
TILE_BATCH = 8  # tiles scored at once


def corners(length: int, tile: int, overlap: float = OVERLAP) -> list[int]:
    """Where tiles begin that cover a side evenly, the first at 0 and the last ending at the end."""
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / ((1 - overlap) * tile)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def boxes(size: tuple[int, int], tile: int, overlap: float = OVERLAP) -> list[Box]:
    """Rows and columns of the tiles of an image (H, W); a side that is shorter than a tile is taken whole."""
    sides = [[slice(start, min(start + tile, length)) for start in corners(length, tile, overlap)] for length in size]
    return list(product(*sides))


def by_tiles(score: Scoring, images: Tensor, roi: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """Scores and maps of images that are seen in tiles.

    The score of an image is the highest of its tiles', those apart that the region of interest leaves out. The map is
    the mean of the tiles' maps where they overlap, weighted by a ramp that falls to nothing at a tile's edge, for there
    a network has seen padding instead of the image. An image that fits into one tile is scored as it is.

    Args:
        score: (B, C, h, w) and region of interest (B, 1, h, w) or None -> scores (B,) and maps (B, 1, h, w).
        images: (B, C, H, W).
        roi: (B, 1, H, W) bool or None.
        tile: side in pixels.

    Returns:
        Scores (B,) and maps (B, 1, H, W), float32.
    """
    size = tuple(images.shape[-2:])
    if max(size) <= tile:
        return score(images, roi)
    places = boxes(size, tile)
    regions = [None] * len(images) if roi is None else roi.split(1)
    found = [_blended(score, image, region, places) for image, region in zip(images.split(1), regions, strict=True)]
    scores, maps = zip(*found, strict=True)
    return torch.stack(scores), torch.cat(maps)


def _blended(score: Scoring, image: Tensor, roi: Tensor | None, places: list[Box]) -> tuple[Tensor, Tensor]:
    """Of one image (1, C, H, W): score () and map (1, 1, H, W)."""
    total = image.new_zeros(1, 1, *image.shape[-2:])
    weights = torch.zeros_like(total)
    best = []
    ramp = _ramp(image[0, :, *places[0]].shape[-2:]).to(total)  # all tiles have one size
    for first in range(0, len(places), TILE_BATCH):
        some = places[first : first + TILE_BATCH]
        cut = torch.cat([image[..., rows, columns] for rows, columns in some])  # (b, C, h, w)
        inside = None if roi is None else torch.cat([roi[..., rows, columns] for rows, columns in some])
        scores, maps = score(cut, inside)
        seen = torch.ones_like(scores, dtype=torch.bool) if inside is None else inside.flatten(1).any(1)
        best.append(scores.masked_fill(~seen, -torch.inf).amax())
        for (rows, columns), found in zip(some, maps, strict=True):
            total[0, :, rows, columns] += ramp * found
            weights[0, :, rows, columns] += ramp
    return torch.stack(best).amax(), total.div_(weights)


def _ramp(size: tuple[int, int]) -> Tensor:
    """Weights (h, w) of a tile's pixels: 1 inside, falling linearly over the overlap towards its edges, never 0."""
    sides = []
    for length in size:
        pixel = torch.arange(length, dtype=torch.float64) + 0.5
        sides.append((torch.minimum(pixel, length - pixel) / (OVERLAP * length)).clamp(max=1))
    return sides[0][:, None] * sides[1]
