"""A model's `forward` as one graph of plain operators, of any number of images of any size, for exporters to trace.

It gives the same numbers by other means where `forward` looks at its data to choose what to compute, runs a loop over
images, or takes an operator that graphs lack.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

import zoo.methods.patchcore as patchcore
import zoo.nn.similarity as similarity
from zoo.methods.cfa import CFA
from zoo.module import AnomalyModule

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # of torchmetrics' Gaussian


class Graph(nn.Module):
    """Images (N, 1 or 3, H, W) float32 in [0, 1] -> scores (N,) and maps (N, 1, H, W) of a model in eval mode.

    The model itself sees images of its own size alone, so that all within it is of one size.
    """

    def __init__(self, model: AnomalyModule):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        own = resized(images, self.model.size, antialias=True)  # (N, C, *size)
        if self.model.channels == 3:
            count = torch.scalar_tensor(images.shape[1], dtype=torch.int64)
            own = own.index_select(1, torch.arange(3) % count)  # grey three times, or as it is
        else:
            own = own.mean(1, keepdim=True)
        scores = self.model(own)
        return scores.image, resized(scores.map, images.shape[-2:], antialias=False)


@contextmanager
def traceable() -> Iterator[None]:
    """Within it the methods take the forms below, which compute the same and depend on no data."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in STAND_INS]
    try:
        for owner, name, stand_in in STAND_INS:
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, own in before:
            setattr(owner, name, own)


# ---- resizing --------------------------------------------------------------------------------------------------------


def resized(images: Tensor, size: tuple[int, int], antialias: bool) -> Tensor:
    """Bilinear, corners not aligned, as torch does it: images (N, C, H, W) -> (N, C, *size).

    By products with the weights of rows and columns, which all runtimes have; of ONNX' own operator with antialias
    few have any, and onnxruntime's differs more: by 2.5e-5 of the full scale, this one by 1e-6.
    """
    rows, columns = (_weights(old, new, antialias) for old, new in zip(images.shape[-2:], size, strict=True))
    return rows @ (images @ columns.T)


def _weights(old: int, new: int, antialias: bool) -> Tensor:
    """What each of `old` pixels gives to each of `new` ones, (new, old), in the steps of float32 that torch takes."""
    old_side = torch.scalar_tensor(old, dtype=torch.float32)
    scale = old_side / torch.scalar_tensor(new, dtype=torch.float32)
    centre = (torch.arange(new, dtype=torch.float32) + 0.5) * scale  # of each new pixel, among the old ones
    if antialias:  # where pixels are merged, the filter is as wide as a new one
        reach = scale.clamp(min=1.0)
    else:  # beyond the outer pixels' centres nothing is seen but these
        reach, centre = torch.ones(()), torch.minimum(centre.clamp(min=0.5), old_side - 0.5)
    distance = (torch.arange(old, dtype=torch.float32) + 0.5 - centre[:, None]).abs()  # (new, old)
    weights = (1 - distance / reach).clamp(min=0.0)
    return weights / weights.sum(1, keepdim=True)


# ---- stand-ins -------------------------------------------------------------------------------------------------------


def nearest(queries: Tensor, bank: Tensor, k: int = 1, fast: bool = False) -> tuple[Tensor, Tensor]:
    """As `zoo.nn.coreset.nearest`, at once, without its search in doubles and never `fast`: a graph is in float32."""
    centre = bank.mean(0)
    centred = bank - centre
    products = torch.addmm(centred.square().sum(1), queries - centre, centred.T, alpha=-2)  # (Q, M), less |query|^2
    index = products.topk(k, largest=False).indices  # (Q, k)
    square = torch.stack([(queries - bank[column]).square().sum(1) for column in index.T], 1)
    distance, order = square.sqrt().sort(1)
    return distance, index.gather(1, order)


def pool_channels(x: Tensor, width: int) -> Tensor:
    """Adaptive average pooling along the channels: (B, C, h, w) -> (B, width, h, w)."""
    count = x.shape[1]
    windows = [(i * count // width, -(-(i + 1) * count // width)) for i in range(width)]
    first, last = (torch.tensor(ends) for ends in zip(*windows, strict=True))  # (width,) each
    total = torch.zeros(())
    for offset in range(max(end - begin for begin, end in windows)):
        index = first + offset
        inside = (index < last).to(x.dtype).view(-1, 1, 1)
        total = total + x.index_select(1, index.clamp(max=count - 1)) * inside
    return total / (last - first).to(x.dtype).view(-1, 1, 1)


def search(self: CFA, patches: Tensor) -> Tensor:
    """CFA's, of all images at once."""
    return self.nearest(patches.flatten(0, 1), self.hparams.attracted)


def ssim_distances(images: Tensor, others: Tensor) -> Tensor:
    """1 - SSIM of images (B, C, H, W) in [0, 1], in doubles too; the Gaussian is a product with rows and columns."""
    x, y = images.double(), others.double()
    rows, columns = (_gaussian(side) for side in x.shape[-2:])
    x_mean, y_mean, xx, yy, xy = (rows @ (part @ columns.T) for part in (x, y, x * x, y * y, x * y))
    variances = (xx - x_mean**2).clamp(min=0.0) + (yy - y_mean**2).clamp(min=0.0)
    structure = (2 * (xy - x_mean * y_mean) + 0.03**2) / (variances + 0.03**2)
    luminance = (2 * x_mean * y_mean + 0.01**2) / (x_mean**2 + y_mean**2 + 0.01**2)
    return 1 - (structure * luminance).float()


def _gaussian(side: int) -> Tensor:
    """Smooths a side, whose ends are mirrored, the last pixel not repeated: (side, side) float64."""
    offset = torch.arange(-SSIM_RADIUS, SSIM_RADIUS + 1)  # (taps,)
    kernel = torch.exp(-((offset.double() / SSIM_SIGMA) ** 2) / 2)
    seen = (torch.arange(side)[:, None] + offset).abs()  # (side, taps)
    seen = torch.where(seen < side, seen, 2 * (side - 1) - seen)
    weights = torch.zeros(side, side, dtype=torch.float64)
    return weights.scatter_add(1, seen, (kernel / kernel.sum()).expand(side, -1))


STAND_INS = (
    (patchcore, "nearest", nearest),
    (patchcore, "_pool_channels", pool_channels),
    (CFA, "search", search),
    (similarity, "ssim_distances", ssim_distances),
)
