"""CFA: Coupled-hypersphere-based Feature Adaptation (Lee et al., IEEE Access 2022, arXiv 2206.04325).

Idea: a 1x1 convolution adapts ImageNet features so that those of normal images crowd within spheres around the vectors
of a small memory bank and away from the spheres of other ones. What lies far from all of the bank is anomalous.

Original code: sungwool/CFA_for_anomaly_localization (no licence; not a line of it was used). Same as there: the bank is
the mean over normal images of what the untrained descriptor gives at each position, built once and never refreshed;
the radius is learned, with weight decay; K = J = 3; a score is the distance weighted by the softmin over three.
Deviations: the mean is exact over all images, where the original averages means of batches; an epoch's last batch is
not dropped, but as large as the others can be; squared distances are clamped at 0 before the root, where the original
may give NaN; its unused second convolution and compression of the bank by k-means (gamma_c > 1) are left out; input is
224 without the original's centre crop (preset `original` has it).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.coreset import nearest
from zoo.nn.fast import infer, is_fast
from zoo.nn.features import FeatureExtractor
from zoo.nn.maps import masked_to_roi, resize_map, smooth_map
from zoo.nn.precision import full_precision
from zoo.nn.seed import seeded

ROWS = 2048  # patches whose distances to the whole bank are held at once, in scoring

PRESETS = {
    "original": {
        "data": {"resize": 256, "crop": 224, "batch_size": 4},
        "trainer": {"max_epochs": 30},
    },
    "paper224": {"data": {"batch_size": 4}, "trainer": {"max_epochs": 30}},
    "mvtec_steps": {"data": {"batch_size": 4}, "trainer": {"max_steps": 1800}},  # 30 epochs of 60 steps
    "lite": {
        "model": {"backbone": "tf_efficientnet_lite0", "lr": 0.002},
        "data": {"batch_size": 4},
        "trainer": {"max_steps": 240},
    },
}


class CFA(AnomalyModule):
    """Features adapted to crowd around a bank of mean patches.

    Args:
        backbone: timm name of the frozen feature extractor, with its weight tag.
        backbone_weights: local safetensors file of its weights; None takes the published ones.
        layers: indices of the backbone's feature levels; None takes those of stride 4, 8 and 16.
        input_size: images are resized to this size, or [height, width].
        gamma_d: the descriptor has this many times fewer channels than the features.
        attracted: nearest bank vectors whose spheres draw a patch in; also those that a score looks at.
        repelled: the next nearest, whose spheres push it out.
        nu: the losses are divided by it.
        alpha: how deep, in squared distance, a patch may lie within the sphere of a repelled vector.
        radius: of the spheres, before it is learned.
        sigma: of the Gaussian that smooths the map, in pixels of the input size.
        lr: learning rate of AdamW, constant.
        weight_decay: of AdamW, the radius included.
        seed: of the descriptor's first weights and the order of the images.
    """

    method = "cfa"

    def __init__(
        self,
        *,
        backbone: str = "wide_resnet50_2.tv_in1k",
        backbone_weights: str | None = None,
        layers: list[int] | None = None,
        input_size: int | list[int] = 224,
        gamma_d: int = 1,
        attracted: int = 3,
        repelled: int = 3,
        nu: float = 1e-3,
        alpha: float = 0.1,
        radius: float = 1e-5,
        sigma: float = 4.0,
        lr: float = 1e-3,
        weight_decay: float = 5e-4,
        seed: int = 1024,
    ):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        if min(gamma_d, attracted, repelled) < 1 or min(nu, sigma, lr) <= 0 or min(alpha, radius, weight_decay) < 0:
            raise ZooError(
                "--gamma-d, --attracted and --repelled are at least 1, --nu, --sigma and --lr above 0, "
                "--alpha, --radius and --weight-decay at least 0."
            )
        self.features = FeatureExtractor(backbone, (4, 8, 16), layers, backbone_weights)
        self.mean, self.std = self.features.mean, self.features.std
        channels = sum(self.features.channels)
        if gamma_d > channels:
            raise ZooError(f"--gamma-d is at most {channels}, the channels of {backbone}, not {gamma_d}.")
        self.descriptor = self._untrained()
        self.radius = nn.Parameter(torch.tensor(radius))
        self.register_buffer("bank", torch.empty(0, channels // gamma_d))  # (P, D) one vector for each position
        self.forget()

    def _untrained(self) -> "Descriptor":
        channels = sum(self.features.channels)
        with seeded(self.hparams.seed, 0):
            return Descriptor(channels + 2, channels // self.hparams.gamma_d, 1)

    def describe(self, images: Tensor, descriptor: nn.Module | None = None) -> Tensor:
        """Images (B, C, H, W) -> patch descriptors on the grid of the first layer (B, D, h, w)."""
        with self.exact_features(images):
            maps = [F.avg_pool2d(m, 3, stride=1, padding=1) for m in self.features(self.prepare(images))]
        grid = maps[0].shape[-2:]
        rows, columns = (torch.linspace(-1, 1, n, device=images.device) for n in grid)
        place = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]  # (1, 2, h, w)
        return infer(descriptor or self.descriptor, [*maps, place])

    @staticmethod
    def exact_features(images: Tensor) -> AbstractContextManager[Any]:
        """In the fast mode they stay in float32: see tests/bench/fast_rounded.json for what rounding costs."""
        return full_precision(images) if is_fast() else nullcontext()

    # ---- the bank: one pass of the untrained descriptor -------------------------------------------------------------

    def observe(self, batch: Batch, sign: int = 1) -> None:
        """Add to the sums over images; with sign -1, take away. A bank that is there was made untrained, too."""
        untrained = self._untrained().to(self.device) if self.bank.numel() else None
        maps = self.describe(batch.image, untrained)
        positions, wanted = maps[0, 0].numel(), self.hparams.attracted + self.hparams.repelled
        if positions < wanted:
            raise ZooError(f"--attracted and --repelled want {wanted} bank vectors; this input size gives {positions}.")
        self.total = self.total + sign * maps.double().sum(0).flatten(1).T  # (P, D)
        self.count += sign * len(maps)

    def finish(self) -> None:
        self.bank = (self.total / self.count).float().contiguous()
        self.stands_for = self.count
        self.forget()

    def recall(self, share: float | None = None) -> None:
        self.count = self.images_before(share)
        self.total = self.count * self.bank.double()

    def fit_state(self) -> dict[str, Any]:
        return {"total": self.total, "count": self.count}

    def load_fit_state(self, state: dict[str, Any]) -> None:
        self.total, self.count = state["total"], state["count"]

    def merge_fit_state(self, state: dict[str, Any]) -> None:
        self.total, self.count = self.total + state["total"], self.count + state["count"]

    def forget(self) -> None:
        self.total, self.count = 0, 0

    # ---- training and scores ----------------------------------------------------------------------------------------

    def nearest(self, vectors: Tensor, count: int) -> Tensor:
        """Squared distances of vectors (N, D) to their nearest in the bank, ascending (N, count), at least 0."""
        with full_precision(vectors):
            centre = self.bank.mean(0)  # numbers near 0 lose fewer digits in the product
            vectors, bank = vectors.float() - centre, self.bank - centre
            square = torch.addmm(bank.square().sum(1), vectors, bank.T, alpha=-2)  # (N, P), without |vectors|^2
            found = square.topk(count, largest=False).values
            return (found + vectors.square().sum(1, keepdim=True)).clamp(min=0)

    def search(self, patches: Tensor) -> Tensor:
        """What `nearest` gives for the patches of images (B, P, D), some at a time: (B P, K)."""
        parts = [part for image in patches for part in image.split(ROWS)]  # never across images
        if is_fast():
            with full_precision(patches):
                found = [nearest(part, self.bank, self.hparams.attracted, fast=True)[0].square() for part in parts]
        else:
            found = [self.nearest(part, self.hparams.attracted) for part in parts]
        return torch.cat(found)

    def training_step(self, batch: Batch, index: int) -> Tensor:
        given = self.hparams
        vectors = self.describe(batch.image).permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
        distance = self.nearest(vectors, given.attracted + given.repelled)
        within, beyond = distance.split([given.attracted, given.repelled], 1)
        square = self.radius**2
        return self.total_loss(
            attraction=F.relu(within - square).mean() / given.nu,
            repulsion=F.relu(square - beyond - given.alpha).mean() / given.nu,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        given = self.hparams
        rates = {"lr": given.lr, "weight_decay": given.weight_decay}
        return torch.optim.AdamW(self.learned_parameters(), **rates, amsgrad=True, fused=True)

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        maps = self.describe(images)
        b, _, h, w = maps.shape
        distance = self.search(maps.flatten(2).mT).sqrt()  # (B P, K)
        scores = distance[:, 0] * F.softmin(distance, dim=1)[:, 0]  # (B P,)
        scores = smooth_map(scores.view(b, 1, h, w), self.size, self.hparams.sigma)  # (B, 1, *size)
        return Scores(masked_to_roi(scores, roi).amax(dim=(1, 2, 3)), resize_map(scores, images.shape[-2:]))


class Descriptor(nn.Conv2d):
    """The 1x1 convolution over levels that are joined on the first one's grid, and over the place (CoordConv).

    Each level is convolved on its own grid, then resized, for the two steps commute: of wide_resnet50_2 a quarter of
    the operations.
    """

    def forward(self, levels: list[Tensor]) -> Tensor:
        """Levels (B, C_i, h_i, w_i) and the place (1, 2, h, w) -> (B, D, h, w)."""
        weights = self.weight.split([level.shape[1] for level in levels], 1)
        first, *coarse = (F.conv2d(level, weight) for level, weight in zip(levels, weights, strict=True))
        return first + sum(resize_map(m, first.shape[-2:]) for m in coarse) + self.bias.view(1, -1, 1, 1)
