"""From patch scores to an anomaly map: resizing and Gaussian smoothing, shared by all feature methods."""

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.nn.precision import full_precision


def gaussian_blur(maps: Tensor, sigma: float) -> Tensor:
    """Smooth maps (B, 1, H, W) as `scipy.ndimage.gaussian_filter` does: truncated at 4 sigma, edge pixels mirrored.

    In float32 under any mixed precision, which would round what convolutions give.
    """
    radius = int(4 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    maps = maps.float()
    kernel = (kernel / kernel.sum()).to(maps)
    rows = _mirror(maps.shape[-2], radius, maps.device)
    columns = _mirror(maps.shape[-1], radius, maps.device)
    with full_precision(maps):
        maps = F.conv2d(maps[..., rows, :], kernel.view(1, 1, -1, 1))
        return F.conv2d(maps[..., columns], kernel.view(1, 1, 1, -1))


def _mirror(size: int, radius: int, device: torch.device) -> Tensor:
    """Indices -radius .. size + radius - 1, reflected at the edges with the edge pixel repeated."""
    index = torch.arange(-radius, size + radius, device=device) % (2 * size)
    return torch.where(index < size, index, 2 * size - 1 - index)


def resize_map(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (B, 1, h, w) -> (B, 1, H, W)."""
    return maps if maps.shape[-2:] == size else F.interpolate(maps, size, mode="bilinear", align_corners=False)


def masked_to_roi(scores: Tensor, roi: Tensor | None) -> Tensor:
    """Scores (B, 1, h, w) with -inf wherever the region of interest (B, 1, H, W) covers no part of the position."""
    if roi is None:
        return scores
    covered = F.adaptive_max_pool2d(roi.to(scores.dtype), scores.shape[-2:]) > 0  # (B, 1, h, w)
    return scores.masked_fill(~covered, -torch.inf)
