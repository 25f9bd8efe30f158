"""PatchCore: Towards Total Recall in Industrial Anomaly Detection (Roth et al., CVPR 2022, arXiv 2106.08265).

Idea: keep a memory bank of patch features of normal images, thinned to a coreset that covers them all. The anomaly
score of a patch is its distance to the nearest vector of the bank.

Original code: amazon-science/patchcore-inspection (Apache-2.0). Same as there: 3x3 neighbourhoods of the layers of
stride 8 and 16, adaptively pooled to 1024 values; squared distances; image score = maximum over the raw patch scores,
before any smoothing; map bilinear, sigma 4. The paper's re-weighting (eq. 7), absent there, is an option.
Deviations: channels are pooled before the coarser layer is resized (the two steps commute, it is cheaper); the greedy
coreset is exact and of fixed size, through a bounded working set, so memory does not grow with the number of images
(`coreset_ratio` and `project_to` give the original's choice); input is 224 without the original's centre crop (preset
`original` has it).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from zoo.errors import ZooError
from zoo.module import AnomalyModule, Batch, Evidence, Scores
from zoo.nn.coreset import StreamingCoreset, estimate_search, greedy_coreset, nearest
from zoo.nn.fast import is_fast
from zoo.nn.features import FeatureExtractor
from zoo.nn.maps import masked_to_roi, resize_map, smooth_map
from zoo.nn.precision import full_precision
from zoo.tiles import Tile, tiles_of

UNKNOWN = ("", 0, 0)  # origin of vectors of a model that came without names

PRESETS = {
    "original": {
        "model": {"coreset_ratio": 0.1, "project_to": 128},
        "data": {"resize": 256, "crop": 224},
    },
    "paper224": {"data": {"train_fraction": 0.5}},
    "lite": {"model": {"backbone": "tf_efficientnet_lite0", "embedding": "concat"}},
}


class PatchCore(AnomalyModule):
    """A memory bank of normal patches and the distance to it.

    Args:
        backbone: timm name of the frozen feature extractor, with its weight tag.
        backbone_weights: local safetensors file of its weights; None takes the published ones.
        layers: indices of the backbone's feature levels; None takes those of stride 8 and 16.
        input_size: images are resized to this size, or [height, width].
        embedding: official (each patch adaptively pooled to 1024 values) or concat (3x3 mean of all channels).
        bank_size: vectors in the memory bank.
        working_set: candidates held during the fit, in multiples of bank_size.
        coreset_ratio: keep this share of all patches instead of bank_size; holds all of them in memory.
        project_to: choose the coreset in a random projection to so many values; only with coreset_ratio.
        score: image score as the maximum of the patch scores, or reweighted as in the paper's equation 7.
        neighbours: the nearest bank vectors whose distances are averaged.
        reweight_neighbours: bank vectors around the nearest one that enter the re-weighting.
        sigma: of the Gaussian that smooths the map, in pixels of the input size.
        seed: of the coreset's start and projection.
    """

    method = "patchcore"
    memory_options = " or --bank-size"

    def __init__(
        self,
        *,
        backbone: str = "wide_resnet50_2.tv_in1k",
        backbone_weights: str | None = None,
        layers: list[int] | None = None,
        input_size: int | list[int] = 224,
        embedding: Literal["official", "concat"] = "official",
        bank_size: int = 10000,
        working_set: int = 4,
        coreset_ratio: float | None = None,
        project_to: int | None = None,
        score: Literal["max", "reweighted"] = "max",
        neighbours: int = 1,
        reweight_neighbours: int = 9,
        sigma: float = 4.0,
        seed: int = 0,
    ):
        super().__init__(input_size, seed)
        self.save_hyperparameters()
        if coreset_ratio is not None and not 0 < coreset_ratio <= 1:
            raise ZooError(f"--coreset-ratio lies in (0, 1], not {coreset_ratio}.")
        if project_to is not None and coreset_ratio is None:
            raise ZooError("--project-to needs --coreset-ratio: the bank of fixed size is chosen without projection.")
        if min(bank_size, neighbours, reweight_neighbours) < 1 or working_set < 2:
            raise ZooError("--bank-size and the numbers of neighbours are at least 1, --working-set at least 2.")
        if sigma <= 0 or (project_to is not None and project_to < 1):
            raise ZooError("--sigma is above 0 and --project-to at least 1.")
        self.features = FeatureExtractor(backbone, (8, 16), layers, backbone_weights)
        self.mean, self.std = self.features.mean, self.features.std
        self.width = 1024 if embedding == "official" else sum(self.features.channels)
        self.register_buffer("bank", torch.empty(0, self.width))  # (M, D)
        self.origin: list[tuple[str, int, int]] = []  # image name, row, column of each vector of the bank
        self.names: list[str] = []  # of the images seen
        self.stream = StreamingCoreset(bank_size, working_set * bank_size, seed)
        self.kept: list[tuple[Tensor, Tensor]] = []  # all vectors and their source (image, row, column), for a ratio
        self.recalled = 0  # size of the bank that is gone on from, which the new one keeps, for a ratio

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W) -> patch vectors on the grid of the first layer (B, D, h, w)."""
        maps = [m.float() for m in self.features(self.prepare(images))]
        pool = self._pool_official if self.hparams.embedding == "official" else _pool_mean
        pooled = [pool(m) for m in maps]
        joined = [resize_map(m, pooled[0].shape[-2:]) for m in pooled]
        if self.hparams.embedding == "concat":
            return torch.cat(joined, 1)
        stacked = torch.stack(joined, 1).flatten(1, 2)  # (B, layers * 1024, h, w)
        return _pool_channels(stacked, self.width)

    def _pool_official(self, features: Tensor) -> Tensor:
        """(B, C, h, w) -> the 3x3 neighbourhood of each position, its C * 9 values pooled to 1024 (B, 1024, h, w)."""
        patches = F.unfold(features, 3, padding=1).unflatten(2, features.shape[-2:])  # (B, C * 9, h, w)
        return _pool_channels(patches, self.width)

    def observe(self, batch: Batch) -> None:
        maps = self.embed(batch.image)
        b, _, h, w = maps.shape
        vectors = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
        first = len(self.names)
        self.names += batch.name
        sides = (first, first + b), (0, h), (0, w)  # of image, row and column
        source = torch.cartesian_prod(*(torch.arange(*side, device=vectors.device) for side in sides))  # (B h w, 3)
        if self.hparams.coreset_ratio is None:
            with full_precision(vectors):
                self.stream.add(vectors, source)
        else:
            self.kept.append((vectors, source))

    def finish(self) -> None:
        if self.hparams.coreset_ratio is None:
            self.bank, source = self.stream.finish()
        else:
            vectors, source = self._joined()
            size = self.recalled or max(1, round(self.hparams.coreset_ratio * len(vectors)))
            chosen, _ = greedy_coreset(vectors, size, seed=self.hparams.seed, project_to=self.hparams.project_to)
            self.bank, source = vectors[chosen], source[chosen]
        self.origin = [(self.names[image], row, column) for image, row, column in source.tolist()]
        self.forget()

    def recall(self, share: float | None = None) -> None:
        """The bank's vectors become the first candidates; with a share, so much of the bank at most."""
        bank, origin, most = self.bank, self.origin or [UNKNOWN] * len(self.bank), len(self.bank)
        if share is not None:
            size = self.hparams.bank_size if self.hparams.coreset_ratio is None else len(bank)
            most = min(most, max(1, round(share * size)))
        if most < len(bank):
            chosen, _ = greedy_coreset(bank, most, seed=self.hparams.seed)
            bank, origin = bank[chosen], [origin[i] for i in chosen.tolist()]
        self.names = list(dict.fromkeys(name for name, *_ in origin))
        number = {name: i for i, name in enumerate(self.names)}
        source = torch.tensor([[number[name], row, column] for name, row, column in origin]).to(bank.device)
        if self.hparams.coreset_ratio is None:
            with full_precision(bank):
                self.stream.add(bank, source)
        else:
            self.kept, self.recalled = [(bank, source)], len(self.bank)

    def exclude(self, name: str) -> None:
        """Take the vectors of an image, if there are any, out of the bank.

        Raises:
            ZooError: none would be left.
        """
        kept = [i for i, (image, *_) in enumerate(self.origin) if image != name]
        if not kept:
            raise ZooError(f"All vectors of the bank are of {name}; add other images first.")
        self.bank, self.origin = self.bank[kept], [self.origin[i] for i in kept]

    def forget(self) -> None:
        self.names, self.kept, self.recalled = [], [], 0
        self.stream = StreamingCoreset(self.stream.size, self.stream.working_set, self.hparams.seed)

    def _joined(self) -> tuple[Tensor, Tensor]:
        """All vectors (N, D) and sources (N, 3), each part freed as it is copied."""
        count, (vectors, source) = sum(len(part) for part, _ in self.kept), self.kept[0]
        vectors, source = vectors.new_empty(count, vectors.shape[1]), source.new_empty(count, source.shape[1])
        while self.kept:
            part, origin = self.kept.pop()
            vectors[count - len(part) : count], source[count - len(part) : count] = part, origin
            count -= len(part)
        return vectors, source

    def forward(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        maps = self.embed(images)
        b, _, h, w = maps.shape
        vectors = maps.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
        with full_precision(vectors):
            distance, index = nearest(
                vectors, self.bank, min(self.hparams.neighbours, len(self.bank)), is_fast()
            )  # (B h w, k)
        patch = distance.square().mean(1).view(b, 1, h, w)
        inside = masked_to_roi(patch, roi).flatten(1)  # (B, h w)
        image = inside.amax(1)
        if self.hparams.score == "reweighted":
            highest = inside.argmax(1) + torch.arange(b, device=patch.device) * h * w  # (B,)
            image = self._reweight(vectors[highest], index[highest, 0])
        smooth = smooth_map(patch, self.size, self.hparams.sigma)  # (B, 1, *size)
        return Scores(image, resize_map(smooth, images.shape[-2:]))

    def _reweight(self, vectors: Tensor, index: Tensor) -> Tensor:
        """Equation 7: the distance of each vector (B, D) to its nearest of the bank, index (B,), weighted -> (B,).

        The weight is small where the bank vector has close company that is just as near.
        """
        count = min(self.hparams.reweight_neighbours, len(self.bank))
        _, around = nearest(self.bank[index], self.bank, count)  # (B, count), the bank vector itself first
        distance = (vectors[:, None] - self.bank[around]).norm(dim=2)  # (B, count)
        return (1 - distance.softmax(1)[:, 0]) * (vectors - self.bank[index]).norm(dim=1)

    @torch.inference_mode()
    def nearest_normal(self, image: Tensor, places: Sequence[tuple[int, int]]) -> list[Evidence] | None:
        if not self.origin:
            return None
        size = tuple(image.shape[-2:])
        tiles = tiles_of(size, self.view.tile or max(size))
        grids: dict[int, Tensor] = {}  # (D, h, w) of each tile that is asked for
        found = []
        for row, column in places:
            number, tile = next((i, tile) for i, tile in enumerate(tiles) if tile.knows(row, column))
            if number not in grids:
                with self.autocast():
                    grids[number] = self.embed(image[..., tile.rows, tile.columns].to(self.device))[0]
            found.append(self._nearest_of(grids[number], tile, row, column))
        return found

    def _nearest_of(self, grid: Tensor, tile: Tile, row: int, column: int) -> Evidence:
        """Of the vector in the grid (D, h, w) of a tile that stands for a place in the image."""
        (h, w), (top, left) = grid.shape[-2:], (tile.rows.start, tile.columns.start)
        height, width = tile.rows.stop - top, tile.columns.stop - left
        y, x = (row - top) * h // height, (column - left) * w // width
        vector = grid[:, y, x][None]  # (1, D)
        with full_precision(vector):
            distance, index = nearest(vector, self.bank, 1)
        name, j, i = self.origin[int(index)]
        cell = (top + y * height / h, left + x * width / w, top + (y + 1) * height / h, left + (x + 1) * width / w)
        return Evidence(name, (j / h, i / w, (j + 1) / h, (i + 1) / w), cell, float(distance))

    def probe(self, batch: Batch) -> None:
        self.embed(batch.image)

    def estimate_memory(self, num_images: int, world: int = 1) -> int:
        if self.hparams.coreset_ratio is None:
            return self.stream.estimate_bytes(self.width, world)
        held = 4 * self.width + 24 + 16 + 4 * (self.hparams.project_to or 0)  # vectors, sources, bounds, projections
        return int(world * num_images * self._patches() * (held + 8 * self.width * self.hparams.coreset_ratio))

    def estimate_seconds(self, num_images: int, scored: int) -> float:
        device, patches, bank = self.bank.device, self._patches(), self.hparams.bank_size
        if self.hparams.coreset_ratio is not None:  # one reduction of all patches
            bank = round(self.hparams.coreset_ratio * num_images * patches)
            width = self.hparams.project_to or self.width
            learning = 4 * estimate_search(num_images * patches, bank, width, device)
        else:
            learning = self.stream.estimate_seconds(num_images * patches, self.width, device)
        return learning + estimate_search(scored * patches, bank, self.width, device)

    def _patches(self) -> int:
        """Of one image."""
        stride = self.features.strides[0]
        return (self.size[0] // stride) * (self.size[1] // stride)

    def fit_state(self) -> dict[str, Any]:
        state = {"names": self.names, "kept": self.kept, "recalled": self.recalled}
        return state | {"stream": self.stream.state_dict()}

    def load_fit_state(self, state: dict[str, Any]) -> None:
        self.names, self.kept, self.recalled = state["names"], state["kept"], state.get("recalled", 0)
        self.stream.load_state_dict(state["stream"])

    def merge_fit_state(self, state: dict[str, Any]) -> None:
        shift = torch.tensor([len(self.names), 0, 0])  # their images come after ours
        self.names = self.names + state["names"]
        self.kept += [(vectors, source + shift.to(source)) for vectors, source in state["kept"]]
        other = StreamingCoreset(1, 1)
        other.load_state_dict(state["stream"])
        self.stream.merge(other, shift)

    def private_state(self) -> dict[str, Any]:
        return {"origin": self.origin}

    def load_private_state(self, state: dict[str, Any]) -> None:
        self.origin = [tuple(place) for place in state["origin"]]


def _pool_channels(x: Tensor, width: int) -> Tensor:
    """Adaptive average pooling along the channels: (B, C, h, w) -> (B, width, h, w)."""
    return F.adaptive_avg_pool3d(x[:, None], (width, *x.shape[-2:]))[:, 0]


def _pool_mean(features: Tensor) -> Tensor:
    """Mean of each channel over the 3x3 neighbourhood (B, C, h, w), zeros outside counted."""
    return F.avg_pool2d(features, 3, stride=1, padding=1)
