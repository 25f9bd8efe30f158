"""RD4AD: Anomaly Detection via Reverse Distillation from One-Class Embedding (Deng, Li, CVPR 2022, arXiv 2201.10703).

Idea: a frozen encoder's three levels are squeezed into one small code, from which a decoder, a mirrored ResNet, learns
to restore them on normal images. Where an anomaly did not fit through, restored and encoded features point apart.

Original code: hq-deng/RD4AD (MIT). Same as there: the loss is 1 - cosine of whole flattened maps (the paper has it by
position), the map sums the levels' cosine distances by position, enlarged with aligned corners; sigma 4; score = max.
Deviations: all widths follow from the backbone's channels, which gives the original for wide_resnet50_2; where sizes
do not halve evenly, maps are cut to the encoder's sizes, or their edge is repeated; the unused layer4 and 1x1
convolution are left out; input is 224 (preset `original` has 256); the map is brought to the image's own size; preset
`lite` doubles the learning rate.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.fast import infer
from zoo.nn.features import FeatureExtractor
from zoo.nn.maps import gaussian_blur, masked_to_roi, resize_map
from zoo.nn.seed import seeded

DEPTHS = (3, 4, 6)  # blocks of each stage of the decoder, from the code up; the bottleneck has the first's

PRESETS = {
    "original": {
        "model": {"input_size": 256},
        "data": {"resize": 256, "batch_size": 16},
        "trainer": {"max_epochs": 200},
    },
    "paper224": {"data": {"batch_size": 16}, "trainer": {"max_epochs": 200}},
    "mvtec_steps": {"data": {"batch_size": 16}, "trainer": {"max_steps": 3000}},  # 200 epochs of ceil(240 / 16)
    "lite": {
        "model": {"backbone": "tf_efficientnet_lite0", "lr": 0.01},
        "data": {"batch_size": 8},
        "trainer": {"max_steps": 300},
    },
}


class RD4AD(AnomalyModule):
    """A decoder that restores the features of normal images from a small code, and its error by cosine.

    Args:
        backbone: timm name of the frozen encoder, with its weight tag.
        backbone_weights: local safetensors file of its weights; None takes the published ones.
        layers: indices of three feature levels, each of twice the stride of the one before; None takes 4, 8 and 16.
        input_size: images are resized to this size, or [height, width].
        lr: of Adam, constant.
        beta1: decay of Adam's mean of the gradient.
        beta2: decay of Adam's mean of the squared gradient.
        sigma: of the Gaussian that smooths the map, in pixels of the input size.
        seed: of the initial weights and the order of the images.
    """

    method = "rd4ad"

    def __init__(
        self,
        *,
        backbone: str = "wide_resnet50_2.tv_in1k",
        backbone_weights: str | None = None,
        layers: list[int] | None = None,
        input_size: int | list[int] = 224,
        lr: float = 0.005,
        beta1: float = 0.5,
        beta2: float = 0.999,
        sigma: float = 4.0,
        seed: int = 111,
    ):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        if min(lr, sigma) <= 0 or not (0 <= beta1 < 1 and 0 <= beta2 < 1):
            raise ZooError("--lr and --sigma are above 0, --beta1 and --beta2 lie in [0, 1).")
        self.features = FeatureExtractor(backbone, (4, 8, 16), layers, backbone_weights)
        self.mean, self.std = self.features.mean, self.features.std
        strides = self.features.strides
        if strides != [strides[0], 2 * strides[0], 4 * strides[0]]:
            raise ZooError(f"RD4AD takes three --layers whose strides double, not strides {strides} of {backbone}.")
        if max(self.size) <= 2 * strides[2]:  # BatchNorm can't learn from one position of one image
            raise ZooError(f"--input-size is above {2 * strides[2]} for {backbone}: the code needs two positions.")
        with seeded(seed, 0):
            self.bottleneck = Bottleneck(self.features.channels)
            self.decoder = Decoder(self.features.channels)
            for module in [*self.bottleneck.modules(), *self.decoder.modules()]:
                if isinstance(module, nn.Conv2d):  # transposed ones keep torch's default, as in the original
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def restore(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Images (B, C, H, W) -> the encoder's levels and the restored ones, each (B, C_i, h_i, w_i), float32."""
        encoded = self.features(self.prepare(images))
        decoded = infer(self.decoder, infer(self.bottleneck, encoded), [m.shape[-2:] for m in encoded])
        return [m.float() for m in encoded], [m.float() for m in decoded]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        levels = zip(*self.restore(batch.image), strict=True)
        losses = [(1 - F.cosine_similarity(e.flatten(1), d.flatten(1))).mean() for e, d in levels]
        return self.total_loss(layer1=losses[0], layer2=losses[1], layer3=losses[2])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        betas = (self.hparams.beta1, self.hparams.beta2)
        return torch.optim.Adam(self.learned_parameters(), self.hparams.lr, betas, fused=True)

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        levels = zip(*self.restore(images), strict=True)
        distances = [1 - F.cosine_similarity(e, d)[:, None] for e, d in levels]  # (B, 1, h_i, w_i)
        maps = sum(F.interpolate(m, self.size, mode="bilinear", align_corners=True) for m in distances)
        maps = gaussian_blur(maps, self.hparams.sigma)  # (B, 1, *size)
        return Scores(masked_to_roi(maps, roi).amax(dim=(1, 2, 3)), resize_map(maps, images.shape[-2:]))


class Bottleneck(nn.Module):
    """Three levels -> one code: they meet on the third one's grid, and blocks squeeze them to a quarter of it."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        c1, c2, c3 = channels
        self.layer1 = nn.Sequential(*_halve(c1, c2), *_halve(c2, c3))
        self.layer2 = nn.Sequential(*_halve(c2, c3))
        same = [Block(2 * c3, 2 * c3) for _ in range(DEPTHS[0] - 1)]
        self.blocks = nn.Sequential(Block(3 * c3, 2 * c3, "down"), *same)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        layer1, layer2, layer3 = maps  # (B, C_i, h_i, w_i)
        size = layer3.shape[-2:]
        joined = torch.cat([_cut(self.layer1(layer1), size), _cut(self.layer2(layer2), size), layer3], 1)
        return self.blocks(joined)  # (B, 3 C_3, h_3, w_3) -> (B, 2 C_3, h_3 / 2, w_3 / 2), rounded up


class Decoder(nn.Module):
    """The encoder mirrored: from the code, each stage doubles the grid and restores one level, the third one first."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        outputs = channels[::-1]
        inputs = [2 * outputs[0], *outputs[:-1]]
        self.stages = nn.ModuleList(
            nn.Sequential(Block(i, o, "up"), *(Block(o, o) for _ in range(depth - 1)))
            for i, o, depth in zip(inputs, outputs, DEPTHS, strict=True)
        )

    def forward(self, code: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Code (B, 2 C_3, h, w) -> levels (B, C_i, *sizes[i]), the first one first."""
        levels, x = [], code
        for stage, size in zip(self.stages, reversed(sizes), strict=True):
            x = _cut(stage(x), size)
            levels.append(x)
        return levels[::-1]


class Block(nn.Module):
    """ResNet's bottleneck block (B, inputs, h, w) -> (B, outputs, h', w'), half as wide within.

    Its second convolution changes the grid: 3x3 of stride 2 down, transposed 2x2 of stride 2 up.
    """

    def __init__(self, inputs: int, outputs: int, step: Literal["same", "down", "up"] = "same"):
        super().__init__()
        width = outputs // 2
        if step == "up":
            middle = nn.ConvTranspose2d(width, width, 2, 2, bias=False)
            shortcut = nn.ConvTranspose2d(inputs, outputs, 2, 2, bias=False)
        else:
            stride = 2 if step == "down" else 1
            middle = nn.Conv2d(width, width, 3, stride, 1, bias=False)
            shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
        self.residual = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            middle,
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity() if step == "same" else nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.residual(x) + self.shortcut(x))


def _halve(inputs: int, outputs: int) -> list[nn.Module]:
    """(B, inputs, h, w) -> (B, outputs, h / 2, w / 2), rounded up."""
    return [nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]


def _cut(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, C, h, w) -> (B, C, *size): what is too much at the lower right is cut off, what lacks there is repeated.

    Nothing is to be done where the grids are even, as at 224 or 256. Then odd ones round up on the way down, so that
    there is too much on the way up; backbones without padding (Inception) round down.
    """
    if maps.shape[-2:] == size:
        return maps
    height, width = size
    lacking = (0, max(width - maps.shape[-1], 0), 0, max(height - maps.shape[-2], 0))
    return F.pad(maps[..., :height, :width], lacking, mode="replicate")
