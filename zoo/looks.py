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

_SECOND = ((1, -2, 1), (-2, 4, -2), (1, -2, 1))  # blind to lines and slopes
_SMOOTH = ((1, 2, 1), (2, 4, 2), (1, 2, 1))
_SOBEL = ((-1, 0, 1), (-2, 0, 2), (-1, 0, 1))
_TINY = 1e-6


def facts(images: Tensor, roi: Tensor | None = None) -> Tensor:
    """Facts (B, 5) of images, in the order of `FACTS`; each depends on its own image alone.

    - brightness: mean of the grey levels; contrast: their standard deviation;
    - shading: how far the plane that fits them best rises from side to side;
    - noise: standard deviation by second differences (Immerkaer, "Fast noise variance estimation", Comput. Vis. Image
      Underst. 64, 1996), which lines and slopes hardly touch;
    - sharpness: mean gradient (Sobel, as in Tenengrad, a focus measure; see Pertuz et al., Pattern Recognit. 46, 2013)
      of the slightly smoothed image over its contrast, in 1/pixel: neither brightness nor contrast changes it.

    Args:
        images: (B, 1 or 3, H, W) in [0, 1]; colour counts as its mean.
        roi: (B, 1, H, W) bool, what is looked at; of an image without any, all facts are 0.
    """
    grey = images.float().mean(1, keepdim=True)  # (B, 1, H, W)
    inside = torch.ones_like(grey) if roi is None else roi.float()
    brightness = _mean(grey, inside)
    away = grey - brightness.view(-1, 1, 1, 1)
    contrast = _mean(away.square(), inside).sqrt()
    noise = math.sqrt(math.pi / 2) / 6 * _mean(_filtered(grey, _SECOND).abs(), _eroded(inside, 1))
    smooth = _filtered(grey, _SMOOTH) / 16
    across, down = (_filtered(smooth, kernel) / 8 for kernel in (_SOBEL, tuple(zip(*_SOBEL, strict=True))))
    gradient = _mean(torch.hypot(across, down), _eroded(inside, 2))
    sharpness = torch.where(contrast > _TINY, gradient / contrast.clamp(min=_TINY), 0)
    return torch.stack([brightness, contrast, _shading(away, inside), noise, sharpness], 1)


def _mean(values: Tensor, weights: Tensor) -> Tensor:
    """Weighted means (B,) of (B, 1, H, W)."""
    return (values * weights).sum((1, 2, 3)) / weights.sum((1, 2, 3)).clamp(min=_TINY)


def _filtered(images: Tensor, kernel: tuple[tuple[int, ...], ...]) -> Tensor:
    """Images (B, 1, H, W), the border repeated, filtered by 3 x 3 numbers."""
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), images.new_tensor(kernel)[None, None])


def _eroded(inside: Tensor, by: int) -> Tensor:
    """What lies farther than so many pixels from what is not looked at."""
    return 1 - F.max_pool2d(1 - inside, 2 * by + 1, stride=1, padding=by)


def _shading(away: Tensor, inside: Tensor) -> Tensor:
    """Rise (B,) from side to side of the plane that fits grey levels (B, 1, H, W), their mean taken off, best."""
    down, across = (torch.linspace(-0.5, 0.5, side, device=away.device) for side in away.shape[-2:])
    places = [place.expand_as(away) for place in (down[:, None], across)]
    places = [place - _mean(place, inside).view(-1, 1, 1, 1) for place in places]
    squares = torch.stack([torch.stack([_mean(a * b, inside) for b in places], -1) for a in places], -1)  # (B, 2, 2)
    products = torch.stack([_mean(place * away, inside) for place in places], -1)  # (B, 2)
    slopes = torch.linalg.pinv(squares, hermitian=True, rtol=1e-3) @ products[..., None]  # (B, 2, 1)
    return slopes[..., 0].norm(dim=1)


class Watch:
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
