"""RIAD: Reconstruction by inpainting for visual anomaly detection (Zavrtanik et al., Pattern Recogn. 2021, no arXiv).

Idea: a network learns to fill in hidden parts of normal images. The cells of a grid fall into three sets, each hidden
in one of three copies; what is filled in is put together and compared with the image, by the magnitude of gradients.

Original code: none was found; read were the ports taikiinoue45/RIAD, blaz-r/RIAD (MIT) and plutoyuxie's (no licence).
Same as in most: U-Net, images in [-1, 1], cells of 2, 4, 8 and 16 pixels, one size drawn for each batch, squared error
+ MSGMS + SSIM, Adam, rate / 10 after 5/6 of the fit; the map is the mean over all sizes, the score its maximum.
Deviations: input is 224 (preset `original` has 256); images are grey; the sets are drawn once, there for each batch, so
that a score depends on nothing but the image; the copies are one batch, with common BatchNorm statistics; MSGMS and
SSIM see [0, 1], as their constants ask; at the edges pixels are repeated, or means are over fewer of them, where ports
put zeros. Two ports stop early by the loss of held-out normals: preset `original` keeps, of ten steps, the one of their
lowest mean map. Preset `lite` maps |x - x_hat| (--residual absolute), not MSGMS.
"""

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.fast import infer
from zoo.nn.maps import masked_to_roi, resize_map
from zoo.nn.precision import full_precision
from zoo.nn.seed import seeded
from zoo.nn.similarity import RESIDUALS, msgms_loss, ssim_distances, unit

SMALLEST = 16  # pixels a side of the smallest image that the U-Net can halve four times

PRESETS = {
    "original": {
        "model": {"input_size": 256},
        "data": {"resize": 256, "batch_size": 4},
        "trainer": {"max_epochs": 300, "select": "normal"},
    },
    "paper224": {"data": {"batch_size": 4}, "trainer": {"max_epochs": 300}},
    "mvtec_steps": {"data": {"batch_size": 4}, "trainer": {"max_steps": 18_000}},  # 300 epochs of 60 steps
    "lite": {
        "model": {"input_size": 128, "width": 16, "cells": [2, 4], "lr": 3e-3, "residual": "absolute", "window": 5},
        "data": {"batch_size": 1},  # many small steps: each image has thousands of hidden pixels
        "trainer": {"max_steps": 2400},
    },
}


class RIAD(AnomalyModule):
    """A U-Net that fills in what was hidden of an image.

    Args:
        input_size: images are resized to this size, or [height, width]; divisible by 16 and by all cells.
        channels: 1 (grey) or 3 (colour) of the images that the network sees.
        cells: sides, in pixels, of the square cells that are hidden; each has a grid of its own.
        sets: into which the cells of a grid are divided; one of them is hidden at a time.
        width: channels of the U-Net's finest maps.
        squared_weight: of the pixels' squared error in the loss.
        gradient_weight: of 1 less the similarity of gradient magnitudes at four scales (MSGMS) in it.
        structure_weight: of 1 less the structural similarity (SSIM) in it.
        lr: learning rate of Adam.
        weight_decay: of Adam.
        milestones: shares of the planned steps after which the learning rate falls to a tenth.
        residual: the map's, before the filter: `gradient`, 1 - MSGMS; `absolute`, |x - x_hat|; `structure`, 1 - SSIM.
        window: side, in pixels of the input size, of the mean filter that smooths the map; odd.
        seed: of the first weights, the sets, the order of the images and the cells drawn.
    """

    method = "riad"

    def __init__(
        self,
        *,
        input_size: int | list[int] = 224,
        channels: int = 1,
        cells: list[int] = [2, 4, 8, 16],  # noqa: B006 - never changed
        sets: int = 3,
        width: int = 64,
        squared_weight: float = 1.0,
        gradient_weight: float = 1.0,
        structure_weight: float = 1.0,
        lr: float = 1e-4,
        weight_decay: float = 1e-5,
        milestones: list[float] = [0.83333],  # noqa: B006 - never changed
        residual: Literal["absolute", "structure", "gradient"] = "gradient",
        window: int = 21,
        seed: int = 0,
    ):
        super().__init__(input_size, seed, channels)
        self.save_hyperparameters()
        if not cells or len(set(cells)) < len(cells) or min(cells) < 1:
            raise ZooError(f"--cells are one or more different sizes of at least 1 pixel, not {cells}.")
        if any(side % step for side in self.size for step in (SMALLEST, *cells)):
            raise ZooError(f"--input-size is divisible by {SMALLEST} and by all --cells {cells}, not {input_size}.")
        most = min(255, (self.size[0] // max(cells)) * (self.size[1] // max(cells)))
        if not 2 <= sets <= most:
            raise ZooError(
                f"--sets is 2 to {most}, for the largest of --cells fits no more often into --input-size, not {sets}."
            )
        if min(squared_weight, gradient_weight, structure_weight) < 0:
            raise ZooError("--squared-weight, --gradient-weight and --structure-weight are at least 0.")
        if lr <= 0 or weight_decay < 0 or not all(0 < share <= 1 for share in milestones):
            raise ZooError("--lr is above 0, --weight-decay at least 0, --milestones are in (0, 1].")
        if width < 1 or window < 1 or window % 2 == 0:
            raise ZooError("--width is at least 1, --window an odd number.")
        if residual not in RESIDUALS:
            raise ZooError(f"--residual is {', '.join(RESIDUALS)}, not {residual}.")
        with seeded(seed, 0):
            self.unet = UNet(channels, width)
        for k in cells:
            with seeded(seed, 1, k):
                grid = self.size[0] // k, self.size[1] // k
                drawn = torch.randperm(grid[0] * grid[1]) % sets  # of equal size, but for one cell
                self.register_buffer(f"sets{k}", drawn.view(grid).byte())  # (H / k, W / k)

    def rebuild(self, x: Tensor, cell: int) -> Tensor:
        """Images (B, C, H, W) in [-1, 1] -> rebuilt ones, each pixel from a copy in which its set was hidden."""
        number = getattr(self, f"sets{cell}").repeat_interleave(cell, 0).repeat_interleave(cell, 1)  # (H, W)
        hidden = number == torch.arange(self.hparams.sets, device=x.device).view(-1, 1, 1, 1)  # (n, 1, H, W)
        if self.training:  # BatchNorm is to see all copies at once
            copies = x[:, None].masked_fill(hidden, 0)  # (B, n, C, H, W)
            filled = self.unet(copies.flatten(0, 1)).unflatten(0, (len(x), -1))
        else:  # else memory counts: one set at a time
            filled = torch.stack([self.unet(x.masked_fill(part, 0)) for part in hidden], 1)  # (B, n, C, H, W)
        return filled.masked_fill(~hidden, 0).sum(1)  # (B, C, H, W)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        h = self.hparams
        x = self.prepare(batch.image)  # (B, C, *size)
        rebuilt = self.rebuild(x, h.cells[int(torch.randint(len(h.cells), ()))])
        real, made = unit(x), unit(rebuilt)
        return self.total_loss(
            squared=h.squared_weight * F.mse_loss(rebuilt, x),
            gradient=h.gradient_weight * msgms_loss(real, made),
            structure=h.structure_weight * ssim_distances(real, made).mean(),
        )

    def configure_optimizers(self) -> dict[str, Any]:
        h = self.hparams
        optimizer = torch.optim.Adam(self.unet.parameters(), h.lr, weight_decay=h.weight_decay, fused=True)
        return self.with_milestones(optimizer, h.milestones, 0.1)

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        x = self.prepare(images)  # (B, C, *size)
        residual = RESIDUALS[self.hparams.residual]
        maps = [residual(unit(x.float()), unit(self.rebuild(x, cell))) for cell in self.hparams.cells]  # (B, 1, *size)
        smooth = mean_filter(torch.stack(maps).mean(0), self.hparams.window)  # (B, 1, *size)
        return Scores(masked_to_roi(smooth, roi).amax((1, 2, 3)), resize_map(smooth, images.shape[-2:]))


class UNet(nn.Module):
    """Images (B, C, H, W) in [-1, 1] -> images alike, float32; H and W are divisible by 16."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        widths = [width, 2 * width, 4 * width, 8 * width, 8 * width]
        upwards = list(pairwise(reversed(widths)))
        self.down = nn.ModuleList([block(channels, width)] + [block(a, b, halve=True) for a, b in pairwise(widths)])
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, 2, 1) for a, b in upwards)
        self.join = nn.ModuleList(block(2 * b, b) for _, b in upwards)
        self.last = nn.Conv2d(width, channels, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for down in self.down:
            x = infer(down, x)  # (B, width, H, W), then half the size each time
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips[:-1]), strict=True):
            x = infer(join, torch.cat([infer(up, x), skip], 1))  # twice the size each time
        with full_precision(x):
            return self.last(x.float()).tanh()


def block(inside: int, outside: int, halve: bool = False) -> nn.Sequential:
    """Two convolutions with BatchNorm and ReLU; the first one may halve the size."""
    first = nn.Conv2d(inside, outside, 4, 2, 1) if halve else nn.Conv2d(inside, outside, 3, 1, 1)
    second = nn.Conv2d(outside, outside, 3, 1, 1)
    return nn.Sequential(
        first, nn.BatchNorm2d(outside), nn.ReLU(inplace=True), second, nn.BatchNorm2d(outside), nn.ReLU(inplace=True)
    )


def mean_filter(maps: Tensor, window: int) -> Tensor:
    """Mean of maps (B, 1, H, W) over the pixels of a window that exist, first along columns, then along rows."""
    half = window // 2
    columns = F.avg_pool2d(maps, (window, 1), 1, (half, 0), count_include_pad=False)
    return F.avg_pool2d(columns, (1, window), 1, (0, half), count_include_pad=False)
