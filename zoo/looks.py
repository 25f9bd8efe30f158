"""How images look to a model that scores them: five facts of the picture, and the mean of its frozen features.

They are what drifts on an SEM: brightness and contrast of the detector, charging (shading), dose (noise) and focus
(sharpness). All are of what the model sees: above the info bar, on the grey scale of its set, outside ignore masks.
"""

import math
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from zoo.module import AnomalyModule, Batch
from zoo.nn.features import FeatureExtractor

FACTS = ("brightness", "contrast", "shading", "noise", "sharpness")

NEAR, FAR = 2, 4  # pixels, of the differences by which sharpness is told
GRID = 64  # places a side at which shading is told
_TINY = 1e-6


def facts(images: Tensor, roi: Tensor | None = None) -> Tensor:
    """Facts (B, 5) of images, in the order of `FACTS`; each depends on its own image alone.

    - brightness: mean of the grey levels; contrast: their standard deviation;
    - shading: how far the plane that fits them best rises from side to side;
    - noise: standard deviation by second differences (Immerkaer, "Fast noise variance estimation", Comput. Vis. Image
      Underst. 64, 1996), which lines and slopes hardly touch;
    - sharpness: mean squared difference of pixels 2 apart over that of pixels 4 apart, without the part of the noise
      (a ratio of structure functions): about a half at sharp steps, a quarter where all is smooth, of any contrast.

    Args:
        images: (B, 1 or 3, H, W) in [0, 1]; colour counts as its mean.
        roi: (B, 1, H, W) bool, what is looked at; what has no pixels to be told by is 0.
    """
    grey = images.float().mean(1, keepdim=True)  # (B, 1, H, W)
    inside = None if roi is None else roi.float()
    brightness = _mean(grey, inside)
    away = grey - brightness.view(-1, 1, 1, 1)
    contrast = _mean(away.square(), inside).sqrt()
    noise = _noise(grey, inside)
    near, far = ((_squared_difference(grey, inside, apart) - 4 * noise.square()).clamp(min=0) for apart in (NEAR, FAR))
    sharpness = torch.where(far > _TINY, near / far.clamp(min=_TINY), 0)
    return torch.stack([brightness, contrast, _shading(away, inside), noise, sharpness], 1)


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    """Means (B,) of (B, 1, H, W), weighted or not."""
    if weights is None:
        return values.mean((1, 2, 3))
    return (values * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp(min=_TINY)


def _noise(grey: Tensor, inside: Tensor | None) -> Tensor:
    if min(grey.shape[-2:]) < 3:
        return grey.new_zeros(len(grey))
    second = grey.diff(n=2, dim=-1).diff(n=2, dim=-2).abs()  # (B, 1, H - 2, W - 2)
    whole = None if inside is None else 1 - F.max_pool2d(1 - inside, 3, stride=1)
    return math.sqrt(math.pi / 2) / 6 * _mean(second, whole)


def _squared_difference(grey: Tensor, inside: Tensor | None, apart: int) -> Tensor:
    """Mean square (B,) of the difference of pixels so far apart, across and down together."""
    total = grey.new_zeros(len(grey))
    for dim in (-1, -2):
        if grey.shape[dim] > apart:
            squares = (_from(grey, apart, dim) - _until(grey, apart, dim)).square()
            both = None if inside is None else _from(inside, apart, dim) * _until(inside, apart, dim)
            total += _mean(squares, both)
    return total


def _from(images: Tensor, start: int, dim: int) -> Tensor:
    return images.narrow(dim, start, images.shape[dim] - start)


def _until(images: Tensor, end: int, dim: int) -> Tensor:
    return images.narrow(dim, 0, images.shape[dim] - end)


def _shading(away: Tensor, inside: Tensor | None) -> Tensor:
    """Rise (B,) from side to side of the plane that fits grey levels (B, 1, H, W), their mean taken off, best.

    It is fitted to the means of a grid.
    """
    grid = [min(side, GRID) for side in away.shape[-2:]]
    weights = torch.ones_like(away[..., : grid[0], : grid[1]])
    if inside is not None:
        weights, away = F.adaptive_avg_pool2d(inside, grid), away * inside
    levels = F.adaptive_avg_pool2d(away, grid) / weights.clamp(min=_TINY)
    places = [torch.linspace(-0.5, 0.5, side, device=away.device) for side in grid]
    places = [place.expand_as(levels) for place in (places[0][:, None], places[1])]
    places = [place - _mean(place, weights).view(-1, 1, 1, 1) for place in places]
    squares = torch.stack([torch.stack([_mean(a * b, weights) for b in places], -1) for a in places], -1)  # (B, 2, 2)
    products = torch.stack([_mean(place * levels, weights) for place in places], -1)  # (B, 2)
    slopes = torch.linalg.pinv(squares, hermitian=True, rtol=1e-3) @ products[..., None]  # (B, 2, 1)
    return slopes[..., 0].norm(dim=1)


class Onlooker:
    """Within it, each image that a model scores is looked at too; its features are those of the scoring itself.

    Features are means over the positions of each layer's channels, over all tiles of an image that is seen in tiles,
    weighted by what is looked at there. Methods without a frozen backbone have none.
    """

    def __init__(self, model: AnomalyModule):
        self.model, self.roi = model, None
        self.parts: list[tuple[Tensor, Tensor]] = []  # of each forward: means (b, D), and shares looked at (b,)
        self.handles: list[Any] = []

    def __enter__(self) -> Self:
        backbone = getattr(self.model, "features", None)
        if isinstance(backbone, FeatureExtractor):
            self.handles = [
                self.model.register_forward_pre_hook(self._begin),
                backbone.register_forward_hook(self._pool),
            ]
        return self

    def __exit__(self, *_: Any) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, _: Any, arguments: tuple[Any, ...]) -> None:
        self.roi = arguments[1] if len(arguments) > 1 else None

    def _pool(self, _: Any, arguments: tuple[Tensor], layers: list[Tensor]) -> None:
        if self.roi is None:
            means, shares = [layer.float().mean((2, 3)) for layer in layers], layers[0].new_ones(len(layers[0]))
        else:
            roi = self.roi.float()  # (b, 1, h, w)
            shares, means = roi.mean((1, 2, 3)), []
            for layer in layers:  # (b, C, h', w')
                weights = F.adaptive_avg_pool2d(roi, layer.shape[-2:])
                total = weights.sum((2, 3)).clamp(min=_TINY)  # (b, 1)
                means.append((layer.float() * weights).sum((2, 3)) / total)
        self.parts.append((torch.cat(means, 1), shares.float()))

    def looks(self, batch: Batch) -> list[np.ndarray]:
        """Facts and features (5 + D,) float32 of each image of a batch that was just scored."""
        found = [facts(batch.image, batch.roi)]
        if self.parts:
            means, shares = (torch.cat(part) for part in zip(*self.parts, strict=True))
            self.parts = []
            tiles = len(means) // len(batch.image)  # those of an image follow each other
            shares = shares.view(-1, tiles, 1)
            means = (means.view(len(shares), tiles, -1) * shares).sum(1) / shares.sum(1).clamp(min=_TINY)
            found.append(means)
        return list(torch.cat(found, 1).cpu().numpy())
