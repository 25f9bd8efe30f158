"""Similarity of two images: of structure (SSIM, Wang et al. 2004) and of gradient magnitude (Xue et al. 2014,
arXiv 1308.3052), the latter at one scale and at several."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from zoo.nn.maps import resize_map
from zoo.nn.precision import full_precision

C = 0.0026  # for intensities in [0, 1]: 170 / 255^2; it goes with their range squared
SCALES = 4  # of the multi-scale form: full size, half, quarter, eighth


def unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (images + 1) / 2


def ssim_distances(images: Tensor, others: Tensor) -> Tensor:
    """1 - SSIM of images (B, C, H, W) in [0, 1], by an 11 x 11 Gaussian of sigma 1.5: float32, of the same shape.

    In doubles, because differences of squares are nothing for TF32.
    """
    with full_precision(images):
        _, similar = structural_similarity_index_measure(
            others.double(), images.double(), data_range=1.0, return_full_image=True
        )
        return 1 - similar.float()


def gradient_magnitude(grey: Tensor) -> Tensor:
    """Of images (B, 1, H, W), by Prewitt's filter / 3, edge pixels repeated: (B, 1, H, W), at least 1e-6.

    Sums of shifted images: a convolution would be rounded by mixed precision, on some devices always.
    """
    x = F.pad(grey, (1, 1, 1, 1), mode="replicate")  # (B, 1, H + 2, W + 2)
    across, down = x[..., 2:] - x[..., :-2], x[..., 2:, :] - x[..., :-2, :]  # (B, 1, H + 2, W), (B, 1, H, W + 2)
    across = (across[..., :-2, :] + across[..., 1:-1, :] + across[..., 2:, :]) / 3
    down = (down[..., :-2] + down[..., 1:-1] + down[..., 2:]) / 3
    return torch.sqrt(across.square() + down.square() + 1e-12)  # a root of zero has no gradient


def gms_distance(grey: Tensor, other: Tensor) -> Tensor:
    """1 - GMS of images (B, 1, H, W) in [0, 1]: (B, 1, H, W) in [0, 1), 0 where the magnitudes are equal.

    GMS = (2 g h + C) / (g^2 + h^2 + C) of the magnitudes g and h; 1 less that is written without its rounding.
    """
    g, h = gradient_magnitude(grey), gradient_magnitude(other)
    return (g - h).square() / (g.square() + h.square() + C)


def msgms_distances(images: Tensor, others: Tensor) -> list[Tensor]:
    """1 - GMS of images (B, channels, H, W) in [0, 1], as grey ones, float32: (B, 1, H / 2^s, W / 2^s) a scale s."""
    a, b = (x.float().mean(1, keepdim=True) for x in (images, others))  # (B, 1, H, W)
    found = [gms_distance(a, b)]
    for _ in range(SCALES - 1):
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
        found.append(gms_distance(a, b))
    return found


def msgms_loss(images: Tensor, others: Tensor) -> Tensor:
    """Mean over the scales of the mean of 1 - GMS; images as in `msgms_distances`."""
    return torch.stack([d.mean() for d in msgms_distances(images, others)]).mean()


def msgms_map(images: Tensor, others: Tensor) -> Tensor:
    """1 - GMS, each scale resized to the images' size, averaged: (B, 1, H, W); images as in `msgms_distances`."""
    maps = [resize_map(d, images.shape[-2:]) for d in msgms_distances(images, others)]
    return torch.stack(maps).mean(0)


def absolute(images: Tensor, others: Tensor) -> Tensor:
    """|x - y| of images (B, C, S, S), mean over the channels: (B, 1, S, S)."""
    return (images - others).abs().mean(1, keepdim=True)


def structure(images: Tensor, others: Tensor) -> Tensor:
    """1 - SSIM of images (B, C, S, S) in [0, 1], mean over the channels: (B, 1, S, S)."""
    return ssim_distances(images, others).mean(1, keepdim=True)


RESIDUALS = {"absolute": absolute, "structure": structure, "gradient": msgms_map}
