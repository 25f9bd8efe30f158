"""FastFlow: Unsupervised Anomaly Detection and Localization via 2D Normalizing Flows (Yu et al., arXiv 2111.07677).

Idea: an invertible convolutional network learns to turn the feature maps of normal images into Gaussian noise. Where
what comes out is unlikely as noise, the features are unlikely for a normal image.

No official code is known; the widely used re-implementation is gathierry/FastFlow (Apache-2.0). Same as there: layers
of stride 4, 8, 16, each with a trainable LayerNorm over (C, H, W) and 8 steps that alternate 3x3 and 1x1 convolutions;
each step a coupling, a global affine map and a fixed permutation of channels; loss summed over channels and positions,
without the LayerNorm's Jacobian; the map, never smoothed, is the mean of -exp(-|z|^2 / 2C) over the layers.
Deviations: permutations are stored as indices, not matrices; loss and log-determinants stay in float32 under any mixed
precision; an epoch's last batch is kept, however small; the image score, which that code lacks, is the maximum of the
map; input is 224 (preset `original` has 256). As the LayerNorm's gain is missing from the loss, shrinking it lowers the
loss for free, in the end to a model that finds nothing; `norm_log_det` counts it, by default in preset `lite` only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.fast import infer
from zoo.nn.features import FeatureExtractor
from zoo.nn.maps import masked_to_roi, resize_map
from zoo.nn.seed import seeded

DAMPING = 0.1  # of what the subnets put out
CLAMP = 2.0  # bounds the coupling's log-scale
RAW_ONE = 2 * math.log(math.exp(5) - 1)  # 0.1 softplus(RAW_ONE, beta=0.5) = 1

PRESETS = {
    "original": {
        "model": {"input_size": 256},
        "data": {"resize": 256, "batch_size": 32},
        "trainer": {"max_epochs": 500},
    },
    "paper224": {"data": {"batch_size": 32}, "trainer": {"max_epochs": 500}},
    "mvtec_steps": {"data": {"batch_size": 32}, "trainer": {"max_steps": 3500}},  # 500 epochs of floor(240 / 32)
    "lite": {
        "model": {"backbone": "tf_efficientnet_lite0", "lr": 0.002, "norm_log_det": True},
        "data": {"batch_size": 8},
        "trainer": {"max_steps": 200},
    },
}


class FastFlow(AnomalyModule):
    """Normalizing flows over feature maps, one for each layer.

    Args:
        backbone: timm name of the frozen feature extractor, with its weight tag.
        backbone_weights: local safetensors file of its weights; None takes the published ones.
        layers: indices of the backbone's feature levels; None takes those of stride 4, 8 and 16.
        input_size: images are resized to this size, or [height, width].
        flow_steps: steps of each flow, 3x3 convolutions in the first and then in turn with 1x1.
        hidden_ratio: channels within a step's subnet, in multiples of the half that enters it.
        norm_log_det: count the gain of the LayerNorms in the log-determinant too, so that it can't shrink for free.
        lr: of Adam, constant.
        weight_decay: of Adam, on all that is learned.
        seed: of the initial weights, the permutations and the order of the images.
    """

    method = "fastflow"

    def __init__(
        self,
        *,
        backbone: str = "wide_resnet50_2.racm_in1k",
        backbone_weights: str | None = None,
        layers: list[int] | None = None,
        input_size: int | list[int] = 224,
        flow_steps: int = 8,
        hidden_ratio: float = 1.0,
        norm_log_det: bool = False,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        seed: int = 0,
    ):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        if flow_steps < 1 or hidden_ratio <= 0:
            raise ZooError("--flow-steps is at least 1, --hidden-ratio above 0.")
        if lr <= 0 or weight_decay < 0:
            raise ZooError("--lr is above 0, --weight-decay at least 0.")
        self.features = FeatureExtractor(backbone, (4, 8, 16), layers, backbone_weights)
        self.mean, self.std = self.features.mean, self.features.std
        shapes = [m.shape[1:] for m in self.features(torch.zeros(1, 3, *self.size))]  # (C, h, w) of each layer
        self.norms = nn.ModuleList(nn.LayerNorm(shape) for shape in shapes)
        with seeded(seed, 0):
            self.flows = nn.ModuleList(Flow(shape[0], flow_steps, hidden_ratio) for shape in shapes)

    def transform(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Images (B, C, H, W) -> z (B, C_i, h_i, w_i) and the flow's log-determinant (B,) of each layer, float32."""
        maps = self.features(self.prepare(images))
        return [flow(norm(m.float())) for m, norm, flow in zip(maps, self.norms, self.flows, strict=True)]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        losses = [(0.5 * z.square().sum((1, 2, 3)) - log_det).mean() for z, log_det in self.transform(batch.image)]
        if self.hparams.norm_log_det:
            losses = [loss - n.weight.abs().log().sum() for loss, n in zip(losses, self.norms, strict=True)]
        loss = self.total_loss(**{f"stage{i}": loss for i, loss in enumerate(losses, 1)})
        self.tell(gain=torch.stack([n.weight.abs().mean() for n in self.norms]).mean())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        given = self.hparams
        return torch.optim.Adam(self.learned_parameters(), given.lr, weight_decay=given.weight_decay, fused=True)

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        densities = [torch.exp(-0.5 * z.square().mean(1, keepdim=True)) for z, _ in self.transform(images)]
        maps = -torch.stack([resize_map(p, self.size) for p in densities]).mean(0)  # (B, 1, *size) in [-1, 0]
        return Scores(masked_to_roi(maps, roi).amax(dim=(1, 2, 3)), resize_map(maps, images.shape[-2:]))


class Flow(nn.Module):
    """Steps one after the other: x (B, C, H, W) -> z of the same shape, and the log-determinant (B,) of dz / dx."""

    def __init__(self, channels: int, steps: int, hidden_ratio: float):
        super().__init__()
        self.steps = nn.ModuleList(FlowStep(channels, 1 if i % 2 else 3, hidden_ratio) for i in range(steps))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for step in self.steps:
            x, log_det = step(x)
            total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for step in reversed(self.steps):
            z = step.inverse(z)
        return z


class FlowStep(nn.Module):
    """Affine coupling, then a global affine map of each channel, then a fixed permutation of the channels.

    The first half of the channels stays; from it a subnet finds scale and shift of the second.
    """

    def __init__(self, channels: int, kernel: int, hidden_ratio: float):
        super().__init__()
        self.halves = (channels - channels // 2, channels // 2)
        first, second = self.halves
        hidden = max(1, int(hidden_ratio * first))
        self.subnet = nn.Sequential(
            nn.Conv2d(first, hidden, kernel, padding="same"),
            nn.ReLU(),
            nn.Conv2d(hidden, 2 * second, kernel, padding="same"),
        )
        self.raw_scale = nn.Parameter(torch.full((channels, 1, 1), RAW_ONE))
        self.offset = nn.Parameter(torch.zeros(channels, 1, 1))
        self.register_buffer("permutation", torch.randperm(channels))  # (C,) int64

    def scale(self) -> Tensor:
        """Of the global affine map (C, 1, 1), always above 0."""
        return 0.1 * F.softplus(self.raw_scale, beta=0.5)

    def coupling(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        """First half of the channels -> log-scale and shift of the second, in the precision of what flows."""
        scale, shift = (DAMPING * infer(self.subnet, x1).to(x1.dtype)).chunk(2, 1)
        return CLAMP * scale.tanh(), shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> z of the same shape, and the log-determinant (B,) of dz / dx."""
        x1, x2 = x.split(self.halves, 1)
        log_scale, shift = self.coupling(x1)
        scale = self.scale()
        y = torch.cat([x1, x2 * log_scale.exp() + shift], 1)
        log_det = log_scale.sum((1, 2, 3)) + x[0, 0].numel() * scale.log().sum()
        return (y * scale + self.offset).index_select(1, self.permutation), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """z (B, C, H, W) -> the x that `forward` made it from."""
        y = (z.index_select(1, self.permutation.argsort()) - self.offset) / self.scale()
        y1, y2 = y.split(self.halves, 1)
        log_scale, shift = self.coupling(y1)
        return torch.cat([y1, (y2 - shift) * (-log_scale).exp()], 1)
