"""SuperSimpleNet: Unifying Unsupervised and Supervised Learning (Rolih et al., ICPR 2024, arXiv 2408.03143).

Idea: anomalies are made by noise on the adapted features of normal images, within blobs of Perlin noise. One head
learns to find the noisy positions, a second one, which sees the first one's answer, whether the image has any.

Original code: blaz-r/SuperSimpleNet (MIT), its ICPR version. Same as there: features on a grid twice as fine as that of
stride 8, an adaptor, both heads and their losses, three groups of AdamW, rates lowered after whole epochs.
Deviations: the image score is the logit, not its sigmoid, which would tie high scores; the map's blur has 33 taps, not
25; the Perlin grid has at least 64 points a side (for small images); input is 224 (preset `original` has 256). With
`supervised` all settings stay (there: Perlin threshold 0.6, flips, clipped gradients and no stop-gradient), a position
is a defect if any of its pixels is, and images with a label alone train the classification; there all have masks.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.fast import infer
from zoo.nn.features import FeatureExtractor
from zoo.nn.maps import masked_to_roi, resize_map, smooth_map
from zoo.nn.perlin import perlin_noise
from zoo.nn.precision import full_precision
from zoo.nn.seed import seeded

HIDDEN = 1024  # channels within the segmentation head
FOUND = 128  # channels within the classification head
OCTAVES = 6  # a Perlin lattice has 1, 2, 4, ... or 32 cells a side
FINEST = 64  # points a side of the grid on which Perlin noise is drawn, at least

PRESETS = {
    "original": {
        "model": {"input_size": 256},
        "data": {"resize": 256, "batch_size": 32},
        "trainer": {"max_epochs": 300},
    },
    "paper224": {"data": {"batch_size": 32}, "trainer": {"max_epochs": 300}},
    "mvtec_steps": {"data": {"batch_size": 32}, "trainer": {"max_steps": 2400}},  # 300 epochs of ceil(240 / 32)
    "lite": {
        "model": {
            "backbone": "tf_efficientnet_lite0",
            # The second head learns what noise looks like unless it sees the first one's answer well: small features,
            # logits of a wide margin, and a rate that gets it away from its first weights in so few steps.
            "feature_scale": 0.02,
            "margin": 15.0,
            "noise_std": 0.06,  # half of the adapted features' standard deviation: weaker noise teaches nothing
            "perlin_threshold": 0.4,  # small blobs: the mean over the image must not give the noise away
            "segmentation_lr": 2e-3,
            "classification_lr": 1e-2,
            "milestones": [0.5, 0.7, 0.9],  # so few steps settle only at lower rates
        },
        "data": {"batch_size": 1},  # many small steps: the heads need more of them than of images
        "trainer": {"max_steps": 500},
    },
}


class SuperSimpleNet(AnomalyModule):
    """Adapted features, a head that finds anomalous positions and one that judges the image.

    Args:
        backbone: timm name of the frozen feature extractor, with its weight tag.
        backbone_weights: local safetensors file of its weights; None takes the published ones.
        layers: indices of the backbone's feature levels, the finest first; None takes those of stride 8 and 16.
        input_size: images are resized to this size, or [height, width].
        supervised: learn from labelled defects too, by their masks or, where these lack, by the label alone.
        feature_scale: factor on the backbone's features, for those that are far larger than the original's.
        noise_std: of the Gaussian noise on adapted features that stands for an anomaly.
        perlin_threshold: Perlin noise in [-1, 1] above it is anomalous.
        empty_share: of the images to which no noise is added.
        margin: that the hinge loss asks of the logits of normal and anomalous positions.
        focal_gamma: exponent of both focal losses.
        adaptor_lr: of AdamW, for the adaptor.
        segmentation_lr: of AdamW, for the segmentation head.
        classification_lr: of AdamW, for the classification head.
        adaptor_weight_decay: of AdamW, for the adaptor.
        head_weight_decay: of AdamW, for both heads.
        milestones: shares of the planned epochs after which all learning rates fall.
        lr_factor: by which they fall at each milestone.
        sigma: of the Gaussian that smooths the map, in pixels of the input size.
        seed: of the initial weights, the order of the images and the noise.
    """

    method, surprises_by = "supersimplenet", "loss"

    def __init__(
        self,
        *,
        backbone: str = "wide_resnet50_2.tv_in1k",
        backbone_weights: str | None = None,
        layers: list[int] | None = None,
        input_size: int | list[int] = 224,
        supervised: bool = False,
        feature_scale: float = 1.0,
        noise_std: float = 0.015,
        perlin_threshold: float = 0.2,
        empty_share: float = 0.5,
        margin: float = 0.5,
        focal_gamma: float = 4.0,
        adaptor_lr: float = 1e-4,
        segmentation_lr: float = 2e-4,
        classification_lr: float = 2e-4,
        adaptor_weight_decay: float = 0.01,
        head_weight_decay: float = 1e-5,
        milestones: list[float] = [0.8, 0.9],  # noqa: B006 - never changed
        lr_factor: float = 0.4,
        sigma: float = 4.0,
        seed: int = 42,
    ):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        if min(adaptor_lr, segmentation_lr, classification_lr, lr_factor, feature_scale, noise_std, sigma) <= 0:
            raise ZooError(
                "The three learning rates, --lr-factor, --feature-scale, --noise-std and --sigma are above 0."
            )
        if min(adaptor_weight_decay, head_weight_decay, margin, focal_gamma) < 0:
            raise ZooError("Both weight decays, --margin and --focal-gamma are at least 0.")
        if not (-1 <= perlin_threshold < 1 and 0 <= empty_share < 1 and all(0 < share <= 1 for share in milestones)):
            raise ZooError("--perlin-threshold is in [-1, 1), --empty-share in [0, 1), --milestones are in (0, 1].")
        self.features = FeatureExtractor(backbone, (8, 16), layers, backbone_weights)
        self.mean, self.std = self.features.mean, self.features.std
        width = sum(self.features.channels)
        with seeded(seed, 0):
            self.adaptor = Adaptor(width, width, 1)
            self.segmentation = SegmentationHead(width)
            self.classification = ClassificationHead(width)
            for parameter in self.learned_parameters():
                if parameter.ndim > 1:  # biases and BatchNorm keep torch's defaults, as in the original
                    nn.init.xavier_normal_(parameter)

    @property
    def uses_defects(self) -> bool:
        return self.hparams.supervised

    def adapt(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> adapted features (B, D, h, w), on a grid twice as fine as the first layer's."""
        maps = [self.hparams.feature_scale * m.float() for m in self.features(self.prepare(images))]
        grid = [2 * side for side in maps[0].shape[-2:]]
        return infer(self.adaptor, maps, grid).float()  # bfloat16 rounds weak noise away

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self.total_loss(**self.losses(batch))

    def surprise(self, batch: Batch) -> tuple[Tensor, int]:
        """By the loss, with the same noise each time: the map of normal images alone falls without end."""
        with seeded(self.hparams.seed, 1):
            return len(batch.image) * sum(self.losses(batch).values()).double(), len(batch.image)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """The parts of the loss: noisy features are to be told from others, at each position and in the whole."""
        adapted = self.adapt(batch.image)
        defects, unlocated = self.labelled_defects(batch, adapted.shape[-2:])
        adapted, defects, unlocated = (torch.cat([x, x]) for x in (adapted, defects, unlocated))  # 2B
        located = ~unlocated[:, None, None, None]  # (2B, 1, 1, 1)
        noisy = self.draw_masks(adapted) & ~defects & located  # (2B, 1, h, w)
        logits, found = self.judge(adapted + self.hparams.noise_std * torch.randn_like(adapted) * noisy)
        score = self.classification.score(found, logits, torch.ones_like(noisy))
        target = noisy | defects
        focal = focal_loss(logits, target, self.hparams.focal_gamma)
        normal, anomalous = F.relu(self.hparams.margin + logits), F.relu(self.hparams.margin - logits)
        whole = focal_loss(score, target.flatten(1).any(1) | unlocated, self.hparams.focal_gamma)
        return {
            "focal": mean_where(focal, located.expand_as(focal)),
            "hinge": mean_where(normal, ~target & located) + mean_where(anomalous, target & located),
            "classification": whole.mean(),
        }

    def labelled_defects(self, batch: Batch, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Positions of known defects (B, 1, h, w), and which images (B,) are anomalous, nobody knows where."""
        blank = torch.zeros_like(batch.image[:, :1])  # (B, 1, H, W)
        labelled = self.hparams.supervised and batch.label is not None
        anomalous = batch.label.bool() if labelled else blank[:, 0, 0, 0].bool()  # (B,)
        mask = blank if batch.mask is None else batch.mask.float()
        # A position is a defect if any of its pixels is: the smallest defects would vanish otherwise.
        defects = (F.adaptive_max_pool2d(mask, grid) > 0) & anomalous[:, None, None, None]
        return defects, anomalous & ~defects.flatten(1).any(1)

    def draw_masks(self, adapted: Tensor) -> Tensor:
        """Where features (N, D, h, w) get noise: blobs (N, 1, h, w) bool, empty for the share of images without."""
        count, grid, device = len(adapted), adapted.shape[-2:], adapted.device
        cells = 2 ** torch.randint(OCTAVES, (count, 2))  # of the lattice, down and across
        size = [max(FINEST, 1 << (side - 1).bit_length()) for side in grid]  # the power of two from each side up
        noise = resize_map(perlin_noise(cells, size, device)[:, None], grid)  # (N, 1, h, w)
        noisy = torch.rand(count, 1, 1, 1, device=device) >= self.hparams.empty_share
        return (noise > self.hparams.perlin_threshold) & noisy

    def judge(self, adapted: Tensor) -> tuple[Tensor, Tensor]:
        """Adapted features (B, D, h, w) -> logits (B, 1, h, w) and what the classification head finds (B, 128, h, w).

        No gradient flows from the second one through the logits.
        """
        logits = self.segmentation(adapted)
        return logits, self.classification(adapted, logits.detach())

    def configure_optimizers(self) -> dict[str, Any]:
        """Three groups, whose rates fall together."""
        h = self.hparams
        groups = [
            (self.adaptor, h.adaptor_lr, h.adaptor_weight_decay),
            (self.segmentation, h.segmentation_lr, h.head_weight_decay),
            (self.classification, h.classification_lr, h.head_weight_decay),
        ]
        named = [{"params": list(part.parameters()), "lr": lr, "weight_decay": decay} for part, lr, decay in groups]
        optimizer = torch.optim.AdamW(named, fused=True)
        return self.with_milestones(optimizer, h.milestones, h.lr_factor)

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        logits, found = self.judge(self.adapt(images))
        inside = masked_to_roi(logits, roi) > -torch.inf  # (B, 1, h, w)
        whole = self.classification.score(found, logits, torch.ones_like(inside))
        # What is pooled over a part may score higher than the whole; a region can only take suspicion away.
        image = torch.minimum(whole, self.classification.score(found, logits, inside))
        image = image.where(inside.flatten(1).any(1), -torch.inf)
        maps = smooth_map(logits, self.size, self.hparams.sigma)  # (B, 1, *size)
        return Scores(image, resize_map(maps, images.shape[-2:]))


class Adaptor(nn.Conv2d):
    """The 1x1 convolution over levels that are joined on a finer grid and averaged over 3x3 positions.

    Each level is convolved on its own grid, for the steps commute: of wide_resnet50_2 an eighth of the operations.
    """

    def forward(self, levels: list[Tensor], grid: Sequence[int]) -> Tensor:
        """Levels (B, C_i, h_i, w_i) -> (B, D, *grid)."""
        weights = self.weight.split([level.shape[1] for level in levels], 1)
        adapted = (F.conv2d(level, weight) for level, weight in zip(levels, weights, strict=True))
        joined = sum(F.interpolate(m, grid, mode="bilinear", align_corners=True) for m in adapted)
        return F.avg_pool2d(joined, 3, stride=1, padding=1) + self.bias.view(1, -1, 1, 1)


class SegmentationHead(nn.Module):
    """Adapted features (B, D, h, w) -> logits of their positions (B, 1, h, w), float32."""

    def __init__(self, width: int):
        super().__init__()
        self.hidden = nn.Sequential(
            nn.Conv2d(width, HIDDEN, 1), nn.BatchNorm2d(HIDDEN), nn.LeakyReLU(0.2, inplace=True)
        )
        self.last = nn.Conv2d(HIDDEN, 1, 1, bias=False)

    def forward(self, adapted: Tensor) -> Tensor:
        hidden = infer(self.hidden, adapted)
        with full_precision(hidden):
            return self.last(hidden.float())


class ClassificationHead(nn.Module):
    """Adapted features (B, D, h, w) and logits (B, 1, h, w) -> what tells of anomalies (B, 128, h, w), to be scored."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(width + 1, FOUND, 5, padding=2), nn.BatchNorm2d(FOUND), nn.ReLU(inplace=True)
        )
        self.last = nn.Linear(2 * FOUND + 2, 1)

    def forward(self, adapted: Tensor, logits: Tensor) -> Tensor:
        return infer(self.conv, torch.cat([adapted, logits], 1))

    def score(self, found: Tensor, logits: Tensor, inside: Tensor) -> Tensor:
        """Logits of the images (B,), float32, from what lies inside (B, 1, h, w)."""
        with full_precision(found):
            pooled = [*_pool(found.float(), inside), *_pool(logits.detach(), inside)]
            return self.last(torch.cat(pooled, 1))[:, 0]  # (B, 128 + 128 + 1 + 1) -> (B,)


def _pool(x: Tensor, inside: Tensor) -> tuple[Tensor, Tensor]:
    """Maximum and mean (B, C) of (B, C, h, w) over the positions inside (B, 1, h, w)."""
    count = inside.sum((2, 3)).clamp(min=1)
    return x.masked_fill(~inside, -torch.inf).amax((2, 3)), (x * inside).sum((2, 3)) / count


def focal_loss(logits: Tensor, target: Tensor, gamma: float) -> Tensor:
    """-(1 - p)^gamma log p of each element, where p is the probability given to its target, bool."""
    wrong = torch.where(target, -logits, logits)  # the logit of 1 - p
    return wrong.sigmoid() ** gamma * F.softplus(wrong)


def mean_where(values: Tensor, where: Tensor) -> Tensor:
    """Mean of the values at the chosen places; 0 if there are none, with a gradient of 0."""
    return (values * where).sum() / where.sum().clamp(min=1)
