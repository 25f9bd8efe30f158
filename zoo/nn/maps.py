"""From patch scores to an anomaly map: resizing and Gaussian smoothing, shared by all feature methods."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.precision import full_precision


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Smooth maps (B, 1, H, W) as `scipy.ndimage.gaussian_filter` does: truncated at 4 sigma, edge pixels mirrored.

    In float32 under any mixed precision, which would round what products give.
    """
    return smooth_map(maps, maps.shape[-2:], sigma)


def smooth_map(maps: Tensor, size: tuple[int, int], sigma: float) -> Tensor:
    """Maps (B, 1, h, w) -> (B, 1, H, W): `resize_map`, then `gaussian_blur`.

    Both are linear along rows and along columns: a product with one matrix a side takes less than half the time that
    the resizing and two convolutions take (224 x 224 of 56 x 56, CPU), of eight maps a tenth.
    """
    rows, columns = (
        _smoothing(before, after, sigma, maps.device) for before, after in zip(maps.shape[-2:], size, strict=True)
    )
    with full_precision(maps):
        return rows @ maps.float() @ columns.T  # (H, h) (B, 1, h, w) (w, W)


def _smoothing(before: int, after: int, sigma: float, device: torch.device) -> Tensor:
    """The matrix (after, before) that resizes a row of so many values and smooths it."""
    radius = int(4 * sigma + 0.5)
    offset = torch.arange(-radius, radius + 1, device=device)  # (taps,)
    kernel = torch.exp(-0.5 * (offset.double() / sigma) ** 2)
    seen = (torch.arange(after, device=device)[:, None] + offset) % (2 * after)  # (after, taps)
    seen = torch.where(seen < after, seen, 2 * after - 1 - seen)  # reflected at the edges, the edge pixel repeated
    matrix = torch.zeros(after, after, dtype=torch.float64, device=device)
    matrix = matrix.scatter_add(1, seen, (kernel / kernel.sum()).expand(after, -1))
    if before != after:
        unit = torch.eye(before, dtype=torch.float64, device=device)[None]  # each row a unit vector
        matrix = matrix @ F.interpolate(unit, after, mode="linear", align_corners=False)[0].T
    return matrix.float()


def resize_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (B, 1, h, w) -> (B, 1, H, W)."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def masked_to_roi(scores: Tensor, roi: Tensor | None) -> Tensor:
    """Scores (B, 1, h, w) with -inf wherever the region of interest (B, 1, H, W) covers no part of the position."""
    if roi is None:
        return scores
    covered = F.adaptive_max_pool2d(roi.to(scores.dtype), scores.shape[-2:]) > 0  # (B, 1, h, w)
    return scores.masked_fill(~covered, -torch.inf)
