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

    Both are linear along rows and along columns: a product with one matrix a side takes a tenth of the time that the
    resizing and two convolutions take (224 x 224 of 56 x 56, CPU).
    """
    rows, columns = (
        _smoothing(before, after, sigma, maps.device) for before, after in zip(maps.shape[-2:], size, strict=True)
    )
    with full_precision(maps):
        return rows @ maps.float() @ columns.T  # (H, h) (B, 1, h, w) (w, W)


def _smoothing(before: int, after: int, sigma: float, device: torch.device) -> Tensor:
    """The matrix (after, before) that resizes a row of so many values and smooths it."""
    radius = int(4 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1, dtype=torch.float64, device=device)
    kernel = torch.exp(-0.5 * (x / sigma) ** 2)
    resized = torch.eye(before, dtype=torch.float64, device=device)
    if before != after:
        resized = F.interpolate(resized[None], after, mode="linear", align_corners=False)[0]  # (before, after)
    mirrored = resized[:, _mirror(after, radius, device)]  # (before, after + 2 radius)
    smooth = F.conv1d(mirrored[:, None], (kernel / kernel.sum()).view(1, 1, -1))  # (before, 1, after)
    return smooth[:, 0].T.float()


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
