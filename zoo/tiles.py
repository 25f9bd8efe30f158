"""Large images in overlapping tiles: scored some tiles at a time, whatever the image's size, and blended into one map.

A network pads what lies beyond a tile's edge, so that its map is wrong there, as far as it sees. Two things keep that
out of the result: where tiles overlap, their maps are blended with weights that fall to nothing at an edge; and the
score of an image looks at each place in one tile alone, that in which it lies farther from an edge.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from zoo.nn.transfer import sent

OVERLAP = 0.25  # of a tile's side, at least, between neighbours
TILE_BATCH = 8  # tiles scored at once

Scoring = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]


class Tile(NamedTuple):
    """Rows and columns in the image, and those of them, counted in the tile, that no other tile knows better."""

    rows: slice
    columns: slice
    core: tuple[slice, slice]

    def knows(self, row: int, column: int) -> bool:
        """Whether a place of the image lies in the core."""
        places = zip((row, column), (self.rows, self.columns), self.core, strict=True)
        return all(core.start <= place - side.start < core.stop for place, side, core in places)


def corners(length: int, tile: int, overlap: float = OVERLAP) -> list[int]:
    """Where tiles begin that cover a side evenly, the first at 0 and the last ending at the end."""
    if length <= tile:
        return [0]
    count = math.ceil((length - tile) / ((1 - overlap) * tile)) + 1
    return [round(i * (length - tile) / (count - 1)) for i in range(count)]


def tiles_of(size: tuple[int, int], tile: int, overlap: float = OVERLAP) -> list[Tile]:
    """The tiles of an image (H, W); a side that is shorter than a tile is taken whole."""
    sides = []
    for length in size:
        starts, end = corners(length, tile, overlap), min(tile, length)
        meet = [0, *((a + b + end) // 2 for a, b in zip(starts, starts[1:], strict=False)), length]  # mid-overlap
        cores = [slice(meet[i] - start, meet[i + 1] - start) for i, start in enumerate(starts)]
        sides.append([(slice(start, start + end), core) for start, core in zip(starts, cores, strict=True)])
    return [Tile(rows, columns, (top, left)) for (rows, top), (columns, left) in product(*sides)]


def by_tiles(score: Scoring, images: Tensor, roi: Tensor | None, tile: int) -> tuple[Tensor, Tensor]:
    """Scores and maps of images that are seen in tiles; an image that fits into one tile is scored as it is.

    The score of an image is the highest of its tiles', each with its core as region of interest. The map is the mean of
    the tiles' maps, weighted by a ramp over the overlap.

    A map so made is that of the whole image (of a network that sees it at the same scale) wherever no edge of a tile is
    within the network's field of view. `tests/bench/tiles.py` measures how far that goes, and what is left nearer.

    Args:
        score: images (B, C, h, w), region of interest (B, 1, h, w) bool or None -> scores (B,), maps (B, 1, h, w).
        images: (B, C, H, W).
        roi: (B, 1, H, W) bool or None.
        tile: side in pixels.

    Returns:
        Scores (B,), -inf where the region of interest is empty, and maps (B, 1, H, W).
    """
    size = tuple(images.shape[-2:])
    if max(size) <= tile:
        return score(images, roi)
    tiles = tiles_of(size, tile)
    regions = [None] * len(images) if roi is None else roi.split(1)
    found = [_blended(score, image, region, tiles) for image, region in zip(images.split(1), regions, strict=True)]
    scores, maps = zip(*found, strict=True)
    return torch.stack(scores), torch.cat(maps)


def _blended(score: Scoring, image: Tensor, roi: Tensor | None, tiles: list[Tile]) -> tuple[Tensor, Tensor]:
    """Of one image (1, C, H, W): score () and map (1, 1, H, W)."""
    total, weights = (image.new_zeros(image.shape[-2:]) for _ in range(2))  # (H, W)
    best = [image.new_full((1,), -torch.inf)]
    ramp = None
    for first in range(0, len(tiles), TILE_BATCH):
        some = tiles[first : first + TILE_BATCH]
        cut = torch.cat([image[..., tile.rows, tile.columns] for tile in some])  # (b, C, h, w)
        core = torch.cat([_core(tile, cut, roi) for tile in some])  # (b, 1, h, w)
        scores, maps = score(cut, core)
        best.append(scores.float().where(core.flatten(1).any(1), -torch.inf))  # (b,)
        ramp = sent(_ramp(maps.shape[-2:]).to(total.dtype), total.device) if ramp is None else ramp  # of one size
        for tile, found in zip(some, maps[:, 0], strict=True):
            total[tile.rows, tile.columns] += ramp * found
            weights[tile.rows, tile.columns] += ramp
    return torch.cat(best).amax(), total.div_(weights)[None, None]


def _core(tile: Tile, cut: Tensor, roi: Tensor | None) -> Tensor:
    """The part (1, 1, h, w) of a tile that the score looks at."""
    core = torch.zeros_like(cut[:1, :1], dtype=torch.bool)
    core[0, 0, *tile.core] = True
    return core if roi is None else core & roi[..., tile.rows, tile.columns]


def _ramp(size: tuple[int, int]) -> Tensor:
    """Weights (h, w) of a tile's pixels: 1 inside, falling linearly over the overlap towards its edges, never 0."""
    sides = []
    for length in size:
        pixel = torch.arange(length, dtype=torch.float64) + 0.5
        sides.append((torch.minimum(pixel, length - pixel) / (OVERLAP * length)).clamp(max=1))
    return sides[0][:, None] * sides[1]
