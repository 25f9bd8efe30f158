"""Perlin noise (Perlin 1985, "An image synthesizer"; smoothed as in 2002), for masks of random blobs."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from zoo.nn.transfer import sent


def perlin_noise(cells: Tensor, size: Sequence[int], device: torch.device | None = None) -> Tensor:
    """Gradient noise in [-1, 1] on lattices of so many cells down and across (N, 2), seen at (N, *size) points.

    The largest number of cells has to be known: draw them on the host, which would have to wait for another device.

    At each corner of a cell stands a random unit vector. A point takes from the four corners around it the products of
    these vectors with its offset from them, weighted by nearness.
    """
    corners = int(cells.max()) + 1
    cells = sent(cells, device or cells.device)
    angle = 2 * math.pi * torch.rand(len(cells), corners, corners, device=cells.device)
    y, x = (torch.arange(n, device=cells.device) * cells[:, i, None] / n for i, n in enumerate(size))  # (N, H), (N, W)
    row, column = y.long(), x.long()
    image = torch.arange(len(cells), device=cells.device)[:, None, None]
    total = torch.zeros((), device=cells.device)
    for down, across in itertools.product((0, 1), (0, 1)):
        dy, dx = (y - row - down)[:, :, None], (x - column - across)[:, None, :]  # (N, H, 1), (N, 1, W)
        direction = angle[image, (row + down)[:, :, None], (column + across)[:, None, :]]  # (N, H, W)
        total = total + _fade(dy) * _fade(dx) * (direction.cos() * dy + direction.sin() * dx)
    return math.sqrt(2) * total


def _fade(offset: Tensor) -> Tensor:
    """Weight of a corner: 1 at the corner, 0 at distance 1, with two smooth derivatives (a quintic)."""
    near = 1 - offset.abs()
    return near**3 * (near * (6 * near - 15) + 10)
