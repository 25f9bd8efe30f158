"""STFPM: Student-Teacher Feature Pyramid Matching for anomaly detection (Wang et al., BMVC 2021, arXiv 2103.04257).

Idea: a student network learns to give the features of a frozen, pretrained teacher of the same architecture, on normal
images only. Where an image is anomalous the student has never learned to follow, and the two differ.

Original code: gdwang08/STFPM (GPL-3.0; not a line of it was used). Same as there: features of three layers, normalised
along the channels; loss = sum over layers of the mean squared distance, without the paper's factor 1/2; map = product
over layers of their squared distances, at the first layer's size; image score = the map's maximum; SGD with rate 0.4.
Deviations: input is 224 (preset `original` has 256); the last step is kept by default. The original's rule, the lowest
mean map of held-out normals, is in preset `original`: on a tenth (at least 20) of them instead of a fifth, ten times a
fit instead of each epoch. The batches of an epoch are of equal size, within one image; the map is brought to the
image's own size.
"""

from math import prod

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.features import FeatureExtractor, intermediates
from zoo.nn.maps import masked_to_roi, resize_map
from zoo.nn.seed import seeded

PRESETS = {
    "original": {
        "model": {"input_size": 256},
        "data": {"resize": 256, "batch_size": 32},
        "trainer": {"max_epochs": 100, "select": "normal"},
    },
    "paper224": {"data": {"batch_size": 32}, "trainer": {"max_epochs": 100}},
    "mvtec_steps": {"data": {"batch_size": 32}, "trainer": {"max_steps": 800}},  # 100 epochs of 8 steps
    "lite": {
        "model": {"backbone": "tf_efficientnet_lite0"},
        "data": {"batch_size": 8},
        "trainer": {"max_steps": 300},
    },
}


class STFPM(AnomalyModule):
    """A student that follows its teacher on normal images.

    Args:
        backbone: timm name of the teacher, with its weight tag; the student has the same architecture.
        backbone_weights: local safetensors file of the teacher's weights; None takes the published ones.
        layers: indices of the backbone's feature levels; None takes those of stride 4, 8 and 16.
        input_size: images are resized to this size, or [height, width].
        lr: learning rate of SGD, constant.
        momentum: of SGD.
        weight_decay: of SGD.
        seed: of the student's first weights and the order of the images.
    """

    method = "stfpm"

    def __init__(
        self,
        *,
        backbone: str = "resnet18.tv_in1k",
        backbone_weights: str | None = None,
        layers: list[int] | None = None,
        input_size: int | list[int] = 224,
        lr: float = 0.4,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        seed: int = 0,
    ):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        if lr <= 0 or weight_decay < 0 or not 0 <= momentum < 1:
            raise ZooError("--lr is above 0, --weight-decay at least 0 and --momentum in [0, 1).")
        self.features = FeatureExtractor(backbone, (4, 8, 16), layers, backbone_weights)
        self.mean, self.std = self.features.mean, self.features.std
        if max(self.size) <= self.features.strides[-1]:
            raise ZooError(f"--input-size is above {self.features.strides[-1]}: BatchNorm needs two positions.")
        with seeded(seed, 0):
            self.student = Student(backbone, self.features.indices, self.size)

    def distances(self, images: Tensor) -> list[Tensor]:
        """Images (B, C, H, W) -> squared distance of teacher and student at each position, (B, 1, h_i, w_i) a layer.

        The features have unit length, so that it lies in [0, 4].
        """
        images = self.prepare(images)
        pairs = zip(self.features(images), self.student(images), strict=True)
        units = ((F.normalize(teacher.float()), F.normalize(student.float())) for teacher, student in pairs)
        return [(teacher - student).square().sum(1, keepdim=True) for teacher, student in units]

    def training_step(self, batch: Batch, index: int) -> Tensor:
        return self.total_loss(**{f"layer{i}": d.mean() for i, d in enumerate(self.distances(batch.image), 1)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        given = self.hparams
        return torch.optim.SGD(
            self.learned_parameters(), given.lr, given.momentum, weight_decay=given.weight_decay, fused=True
        )

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        distances = self.distances(images)
        grid = distances[0].shape[-2:]  # of the first layer, the finest
        maps = resize_map(prod(resize_map(d, grid) for d in distances), self.size)  # (B, 1, *size)
        return Scores(masked_to_roi(maps, roi).amax(dim=(1, 2, 3)), resize_map(maps, images.shape[-2:]))


class Student(nn.Module):
    """The backbone with random weights, up to the last layer that is used; learns, its BatchNorm too."""

    def __init__(self, backbone: str, indices: list[int], size: tuple[int, int]):
        super().__init__()
        self.indices = indices
        self.trunk = timm.create_model(backbone, pretrained=False)
        self.trunk.prune_intermediate_layers(indices, prune_norm=True, prune_head=True)
        for norm in self.trunk.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.reset_parameters()  # to 1, also where timm starts residual branches at 0; the original doesn't
        self.eval()
        torch.stack([m.sum() for m in self(torch.zeros(1, 3, *size))]).sum().backward()
        for parameter in self.parameters():  # what no wanted layer depends on, as in branched backbones
            parameter.requires_grad_(parameter.grad is not None)
            parameter.grad = None
        self.train()

    def forward(self, images: Tensor) -> list[Tensor]:
        return intermediates(self.trunk, images, self.indices)
