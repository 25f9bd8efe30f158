"""PaDiM: a Patch Distribution Modeling framework (Defard et al., ICPR workshops 2021, arXiv 2011.08785).

Idea: at every position of the feature grid the features of normal images follow one Gaussian. The anomaly score of a
patch is its Mahalanobis distance to the Gaussian of its own position.

No official code is known; the widely used re-implementation is xiahaifeng1995/PaDiM-Anomaly-Detection-Localization
(Apache-2.0). Same as there: layers of stride 4, 8, 16 joined by nearest upsampling, one random subset of channels,
covariance with N - 1 plus 0.01 I, map smoothed with sigma 4, image score = its maximum.
Deviations: moments are summed in one pass, in float64, so that memory does not grow with the number of images and their
order or sharing among processes does not matter; the inverse is kept as a triangular factor; input is 224 without that
code's centre crop (preset `original` has it).
"""

import logging
import math
import time
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Scores
from zoo.nn.features import FeatureExtractor
from zoo.nn.maps import masked_to_roi, resize_map, smooth_map
from zoo.nn.precision import full_precision

BLOCKS = 4  # block rows in which the symmetric products are kept

log = logging.getLogger("zoo")

PRESETS = {
    "original": {"data": {"resize": 256, "crop": 224}},
    "paper224": {},
    "lite": {"model": {"backbone": "tf_efficientnet_lite0", "dims": 100}},
}


class PaDiM(AnomalyModule):
    """A Gaussian for each position of the feature grid.

    Args:
        backbone: timm name of the frozen feature extractor, with its weight tag.
        backbone_weights: local safetensors file of its weights; None takes the published ones.
        layers: indices of the backbone's feature levels; None takes those of stride 4, 8 and 16.
        input_size: images are resized to this size, or [height, width].
        dims: random channels kept out of all layers' channels; capped at their number.
        ridge: added to the diagonal of each covariance.
        sigma: of the Gaussian that smooths the map, in pixels of the input size.
        seed: draws the channels.
    """

    method = "padim"
    memory_options = " or --dims"

    def __init__(
        self,
        *,
        backbone: str = "wide_resnet50_2.tv_in1k",
        backbone_weights: str | None = None,
        layers: list[int] | None = None,
        input_size: int | list[int] = 224,
        dims: int = 550,
        ridge: float = 0.01,
        sigma: float = 4.0,
        seed: int = 1024,
    ):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        self.features = FeatureExtractor(backbone, (4, 8, 16), layers, backbone_weights)
        self.mean, self.std = self.features.mean, self.features.std
        total = sum(self.features.channels)
        if dims < 1 or min(ridge, sigma) <= 0:
            raise ZooError("--dims is at least 1, --ridge and --sigma are above 0.")
        self.dims = min(dims, total)
        if self.dims < dims:
            log.warning("--dims %d is capped at %d, the channels of %s.", dims, total, backbone)
            self.hparams.dims = total
        chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[: self.dims]
        self.register_buffer("subset", chosen.sort().values)  # (d,)
        self.shares: list[int] = []  # channels of each layer in the subset, once they are asked for
        self.register_buffer("center", torch.empty(0, self.dims))  # (P, d) mean of each position
        self.register_buffer("whitening", torch.empty(0, self.dims, self.dims))  # (P, d, d): W^T W = covariance^-1
        self.grid: tuple[int, int] | None = None
        self.count = 0
        self.moments: list[Tensor] = []  # of each part of the positions: flat sums of x and x x^T, in float64

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> chosen channels of all layers, by position of the first layer's grid (P, B, d)."""
        maps = self.features(self.prepare(images))
        self.grid = tuple(maps[0].shape[-2:])
        begins = accumulate([0, *self.features.channels])
        self.shares = self.shares or self._shares()
        layers = zip(maps, self.subset.split(self.shares), begins, strict=False)
        chosen = [m[:, index - begin].float() for m, index, begin in layers if len(index)]  # (B, d_i, h_i, w_i)
        joined = torch.cat([F.interpolate(m, self.grid, mode="nearest") for m in chosen], 1)  # (B, d, h, w)
        return joined.flatten(2).permute(2, 0, 1).contiguous()

    def _shares(self) -> list[int]:
        """Channels that are chosen of each layer; the subset is sorted."""
        ends = torch.tensor([0, *self.features.channels]).cumsum(0)
        return torch.searchsorted(self.subset.cpu(), ends).diff().tolist()

    def observe(self, batch: Batch, sign: int = 1) -> None:
        """Add to the sums over images of x and of x x^T; with sign -1, take away."""
        x = self.embed(batch.image)  # (P, B, d)
        parts = x.split(self._part())
        if not self.moments:
            self.moments = [self._zeros(part) for part in parts]
        self.count += sign * x.shape[1]
        for part, sums in zip(parts, self.moments, strict=True):
            self._add(part, sums, sign)

    def _part(self) -> int:
        """Positions that share a tensor: 40 MB of sums, so that the memory goes back to the system when it is freed."""
        return math.ceil(8e6 / self.dims**2)

    def _zeros(self, x: Tensor) -> Tensor:
        """Sums over no images of a part (p, B, d): (p, d) and block rows, flat."""
        return x.new_zeros(len(x) * sum(math.prod(shape) for shape in self._shapes()), dtype=torch.float64)

    def _shapes(self) -> list[tuple[int, ...]]:
        """Of one position's sums: of x (d,) and of the block rows (r, c) of x x^T down to the diagonal: 5/8 of it."""
        ends = [round(self.dims * (i + 1) / BLOCKS) for i in range(BLOCKS)]
        return [(self.dims,), *((end - first, end) for first, end in zip([0, *ends], ends, strict=False))]

    def _views(self, sums: Tensor) -> list[Tensor]:
        """Flat sums of a part -> (p, d) and block rows (p, r, c), sharing its memory."""
        shapes = self._shapes()
        count = len(sums) // sum(map(math.prod, shapes))
        flat = sums.split([count * math.prod(shape) for shape in shapes])
        return [x.view(count, *shape) for x, shape in zip(flat, shapes, strict=True)]

    def _add(self, part: Tensor, sums: Tensor, sign: int = 1) -> None:
        part = part.double()  # (p, B, d)
        total, *rows = self._views(sums)
        total += sign * part.sum(1)
        end = 0
        for row in rows:
            first, end = end, row.shape[2]
            row.baddbmm_(part[..., first:end].mT, part[..., :end], alpha=sign)

    def finish(self) -> None:
        """Sums -> means and whitening factors, some positions at a time; the sums are freed on the way."""
        device = self.moments[0].device
        positions = sum(len(self._views(sums)[0]) for sums in self.moments)
        self.center = torch.empty(positions, self.dims, device=device)
        self.whitening = torch.empty(positions, self.dims, self.dims, device=device)
        some, first = math.ceil(2e6 / self.dims**2), 0  # positions at a time: 16 MB a matrix
        while self.moments:
            total, *rows = self._views(self.moments.pop(0))
            for chunk in torch.arange(len(total), device=device).split(some):
                where = slice(first, first + len(chunk))
                self.center[where], self.whitening[where] = self._learn(total[chunk], [row[chunk] for row in rows])
                first += len(chunk)
        self.stands_for = self.count
        self.forget()

    def _learn(self, total: Tensor, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Sums of some positions -> means (p, d) and W = L^-1 (p, d, d), where L L^T is the covariance."""
        eye = torch.eye(self.dims, dtype=torch.float64, device=total.device)
        mean = total / self.count
        lower = torch.cat([F.pad(row, (0, self.dims - row.shape[2])) for row in rows], 1)  # (p, d, d)
        scatter = lower.sub_(torch.einsum("pi,pj->pij", total, mean))
        factor = torch.linalg.cholesky(scatter / max(self.count - 1, 1) + self.hparams.ridge * eye)  # reads the lower
        return mean, torch.linalg.solve_triangular(factor, eye, upper=False)

    def recall(self, share: float | None = None) -> None:
        """Means and whitening factors -> the sums that give them, as far as float32 has kept these."""
        self.count = self.images_before(share)
        freedom = 1 - 1 / self.stands_for if self.stands_for else 1  # of a covariance, a share of its images
        eye = torch.eye(self.dims, dtype=torch.float64, device=self.center.device)
        for center, whitening in zip(*(x.split(self._part()) for x in (self.center, self.whitening)), strict=True):
            self.moments.append(self._zeros(center))
            total, *rows = self._views(self.moments[-1])
            total += self.count * center.double()  # (p, d)
            for where in torch.arange(len(center), device=center.device).split(math.ceil(2e6 / self.dims**2)):
                factor = torch.linalg.solve_triangular(whitening[where].double(), eye, upper=False)  # (q, d, d)
                covariance = factor @ factor.mT - self.hparams.ridge * eye
                mean = center[where].double()
                lower = self.count * freedom * covariance + self.count * torch.einsum("pi,pj->pij", mean, mean)
                end = 0
                for row in rows:
                    first, end = end, row.shape[2]
                    row[where] = lower[:, first:end, :end]

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        x = (self.embed(images) - self.center[:, None]).mT  # (P, d, B)
        with full_precision(x):
            distance = torch.bmm(self.whitening, x).norm(dim=1)  # (P, B)
        maps = distance.T.unflatten(1, (1, *self.grid))  # (B, 1, h, w)
        maps = smooth_map(maps, self.size, self.hparams.sigma)  # (B, 1, *size)
        return Scores(masked_to_roi(maps, roi).amax(dim=(1, 2, 3)), resize_map(maps, images.shape[-2:]))

    def probe(self, batch: Batch) -> None:
        """With the sums of one part for all of them."""
        parts = self.embed(batch.image).split(self._part())
        sums = self._zeros(parts[0])
        for part in parts:
            self._add(part, sums if len(part) == len(parts[0]) else self._zeros(part))

    def estimate_memory(self, num_images: int, world: int = 1) -> int:
        """The sums, of all processes in a checkpoint; what is learned takes their place."""
        return world * 8 * self._positions() * sum(map(math.prod, self._shapes()))

    def estimate_seconds(self, num_images: int, scored: int) -> float:
        """Of the factors; all else is in the pass."""
        begin = time.perf_counter()
        eye = torch.eye(self.dims, dtype=torch.float64, device=self.subset.device)
        factor = torch.linalg.cholesky(eye.expand(8, -1, -1))
        float(torch.linalg.solve_triangular(factor, eye, upper=False)[0, 0, 0])  # waits for the device
        return (time.perf_counter() - begin) * self._positions() / 8

    def _positions(self) -> int:
        stride = self.features.strides[0]
        return (self.size[0] // stride) * (self.size[1] // stride)

    def fit_state(self) -> dict[str, Any]:
        return {"count": self.count, "moments": self.moments}

    def load_fit_state(self, state: dict[str, Any]) -> None:
        self.count, self.moments = state["count"], state["moments"]

    def merge_fit_state(self, state: dict[str, Any]) -> None:
        self.count += state["count"]
        for mine, theirs in zip(self.moments, state["moments"], strict=False):  # none where no image was seen
            mine += theirs

    def forget(self) -> None:
        self.count, self.moments = 0, []

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """The triangular factor is stored packed: half the file."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        row, column = torch.tril_indices(self.dims, self.dims, device=self.whitening.device)
        destination[f"{prefix}whitening"] = self.whitening[:, row, column]  # (P, d (d + 1) / 2)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        packed = state[f"{prefix}whitening"]
        self.whitening = packed.new_zeros(len(packed), self.dims, self.dims, device=self.whitening.device)
        end = 0
        for row in range(self.dims):  # straight into the buffer: it may be gigabytes
            first, end = end, end + row + 1
            self.whitening[:, row, : row + 1] = packed[:, first:end]
        self.shares = []
        super()._load_from_state_dict(state | {f"{prefix}whitening": self.whitening}, prefix, *args)
