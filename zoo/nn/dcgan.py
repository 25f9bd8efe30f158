"""Encoder and decoder of DCGAN (Radford et al. 2015, arXiv 1511.06434), for square images of a power of two.

No convolution has a bias; weights start as N(0, 0.02), those of BatchNorm as N(1, 0.02).
"""

import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn.precision import full_precision

SMALLEST = 4  # positions a side of the smallest maps


class Encoder(nn.Module):
    """Images (B, C, S, S) in [-1, 1] -> maps (B, width * S / 8, 4, 4) -> codes (B, code, 1, 1), float32.

    Args:
        size: S, a power of two.
        channels: C.
        width: channels of the first maps, which have half the images' size; each further halving doubles them.
        code: channels of what comes out.
    """

    def __init__(self, size: int, channels: int, width: int, code: int):
        super().__init__()
        blocks = [nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)]
        for _ in range(halvings(size) - 1):
            blocks += [nn.Conv2d(width, 2 * width, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * width), nn.LeakyReLU(0.2)]
            width *= 2
        self.maps = nn.Sequential(*blocks)
        self.code = nn.Conv2d(width, code, SMALLEST, bias=False)
        self.apply(start)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.maps(images)
        with full_precision(maps):  # codes are compared: their last digits count
            return self.code(maps.float())


class Decoder(nn.Sequential):
    """Codes (B, code, 1, 1) -> images (B, C, S, S) in [-1, 1]; the encoder's mirror image."""

    def __init__(self, size: int, channels: int, width: int, code: int):
        wide = width << halvings(size) - 1
        blocks = [nn.ConvTranspose2d(code, wide, SMALLEST, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        while wide > width:
            blocks += [nn.ConvTranspose2d(wide, wide // 2, 4, 2, 1, bias=False), nn.BatchNorm2d(wide // 2), nn.ReLU()]
            wide //= 2
        super().__init__(*blocks, nn.ConvTranspose2d(width, channels, 4, 2, 1, bias=False), nn.Tanh())
        self.apply(start)


def adversarial_loss(real: Tensor, fake: Tensor) -> Tensor:
    """A discriminator's: half the binary cross-entropies of its logits for real images (to 1) and fake ones (to 0)."""
    return (F.softplus(-real.float()).mean() + F.softplus(fake.float()).mean()) / 2


def is_power_of_two(size: int) -> bool:
    return not size & (size - 1)


def halvings(size: int) -> int:
    """How often a size is halved down to 4."""
    return (size // SMALLEST).bit_length() - 1


def start(module: nn.Module) -> None:
    """Give a layer its first weights."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.normal_(module.weight, 0, 0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1, 0.02)
        nn.init.zeros_(module.bias)
