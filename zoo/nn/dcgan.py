"""Encoder and decoder of DCGAN (Radford et al. 2015, arXiv 1511.06434), for square images of a power of two.

No convolution has a bias; weights start as N(0, 0.02), those of BatchNorm as N(1, 0.02).
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.nn.fast import infer
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
        first = nn.Sequential(nn.Conv2d(channels, width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2))
        wide = [width << level for level in range(halvings(size))]
        self.maps = nn.Sequential(first, *(halve(a, b) for a, b in pairwise(wide)))
        self.code = nn.Conv2d(wide[-1], code, SMALLEST, bias=False)
        self.apply(start)

    def forward(self, images: Tensor) -> Tensor:
        return self.encode(infer(self.maps, images))

    def encode(self, maps: Tensor) -> Tensor:
        """Maps (B, width * S / 8, 4, 4) -> codes (B, code, 1, 1)."""
        with full_precision(maps):  # codes are compared: their last digits count
            return self.code(maps.float())

    def levels(self, images: Tensor) -> list[Tensor]:
        """All maps: (B, width, S / 2, S / 2), (B, 2 * width, S / 4, S / 4), ... (B, width * S / 8, 4, 4)."""
        return list(accumulate(self.maps, lambda maps, block: infer(block, maps), initial=images))[1:]


class Decoder(nn.Module):
    """Codes (B, code, 1, 1) -> images (B, C, S, S) in [-1, 1], float32; the encoder's mirror image.

    Args:
        size, channels, width, code: as the encoder's.
        skips: of the encoder's levels, from the finest on, so many are joined to the decoder's maps of their size.
    """

    def __init__(self, size: int, channels: int, width: int, code: int, skips: int = 0):
        super().__init__()
        wide = [width << level for level in range(halvings(size))]
        first = nn.Sequential(nn.ConvTranspose2d(code, wide[-1], SMALLEST, bias=False), *normed(wide[-1]))
        joined = [2 * w if level < skips else w for level, w in enumerate(wide)]
        doublings = [double(a, b) for a, b in zip(joined[:0:-1], wide[-2::-1], strict=True)]
        last = nn.Sequential(nn.ConvTranspose2d(joined[0], channels, 4, 2, 1, bias=False), nn.Tanh())
        self.first, self.blocks, self.last, self.skips = first, nn.ModuleList(doublings), last, skips
        self.apply(start)

    def forward(self, codes: Tensor, levels: Sequence[Tensor] = ()) -> Tensor:
        """`levels` are the encoder's; needed where there are skips."""
        x = infer(self.first, codes)  # (B, width * S / 8, 4, 4)
        for level, block in zip(range(len(self.blocks), 0, -1), self.blocks, strict=True):
            x = infer(block, torch.cat([x, levels[level]], 1) if level < self.skips else x)  # twice the size
        if self.skips:
            x = torch.cat([x, levels[0]], 1)  # (B, 2 * width, S / 2, S / 2)
        with full_precision(x):
            return self.last(x.float())


def halve(before: int, after: int) -> nn.Sequential:
    """Maps (B, before, h, w) -> (B, after, h / 2, w / 2)."""
    return nn.Sequential(nn.Conv2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.LeakyReLU(0.2))


def double(before: int, after: int) -> nn.Sequential:
    """Maps (B, before, h, w) -> (B, after, 2 h, 2 w)."""
    return nn.Sequential(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), *normed(after))


def normed(channels: int) -> tuple[nn.Module, nn.Module]:
    return nn.BatchNorm2d(channels), nn.ReLU()


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
