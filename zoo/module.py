"""The one contract of all methods: images in, raw anomaly scores and maps out."""

from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo import checkpoint, ranks
from zoo.calibration import Calibration
from zoo.cards import render_card
from zoo.errors import ZooError
from zoo.image import read_image, resize, to_tensor
from zoo.learning import Batch, LearningModule
from zoo.metrics import AnomalyMetrics
from zoo.metrics.bootstrap import image_tables
from zoo.regions import Region, find_regions


class Scores(NamedTuple):
    """Raw scores (B,) and maps (B, 1, H, W), float32, higher = more anomalous, never rescaled by image or batch."""

    image: Tensor
    map: Tensor


class Prediction(NamedTuple):
    """What `predict` says of one image.

    Attributes:
        score: raw image score, higher = more anomalous.
        map: raw anomaly map, float32 (H, W), at the image's own size.
        p_value: share of normal images that score as high; None until the model is calibrated.
        is_anomalous: the calibrated verdict; None until the model is calibrated.
        verdict: the same in words; before calibration it applies the fit's default threshold and says so.
        regions: what reaches the calibrated pixel threshold, by falling peak; None until the model is calibrated.
    """

    score: float
    map: np.ndarray
    p_value: float | None = None
    is_anomalous: bool | None = None
    verdict: str = "no threshold"
    regions: list[Region] | None = None


class AnomalyModule(LearningModule):
    """Base of all methods (one file each in `zoo/methods`).

    A subclass has `forward(images, roi=None) -> Scores` and learns in one or both of two ways: by gradient
    (`training_step`, `configure_optimizers`), or by statistics: `observe(batch)` for each batch of normal images, then
    `finish()` once. Its keyword-only `__init__` arguments are plain JSON values: they are the configuration.

    Attributes:
        num_train_images: set before the first `observe`.
        calibration: thresholds from held-out normals, or None.
    """

    method: ClassVar[str]
    score_forms: ClassVar[tuple[str, ...]] = ()  # values of its argument `score`, of a method that has several
    local_arguments: ClassVar[tuple[str, ...]] = ("backbone_weights",)  # paths of this machine, which are not kept
    channels: int = 3  # what the network takes; grey is repeated, colour is averaged

    def __init__(self, input_size: int | list[int], seed: int, channels: int | None = None):
        super().__init__()
        self.channels = channels or self.channels
        if self.channels not in (1, 3):
            raise ZooError(f"--channels is 1 (grey) or 3 (colour), not {channels}.")
        if seed < 0:
            raise ZooError(f"--seed is at least 0, not {seed}.")
        self.size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if len(self.size) != 2 or min(self.size) < 32:
            raise ZooError(f"--input-size is one number or [height, width] of at least 32 pixels, not {input_size}.")
        self.mean, self.std = (0.5,) * self.channels, (0.5,) * self.channels
        self.calibration: Calibration | None = None
        self.preset: str | None = None
        self.selection: dict[str, Any] | None = None  # metric, data, seed and size of what chose the weights
        self.view: dict[str, int | None] = {"resize": None, "crop": None}  # of the data module, in preset original
        self.metrics = AnomalyMetrics()
        self.scored: list[tuple[str, int, float]] = []  # (name, label, score) of the last validation or test
        self.unmarked: list[str] = []  # anomalous ones without a defect pixel in their masks, as scored
        self.tables: list[np.ndarray] | None = None  # of its images' pixels, where somebody asks for them by a list

    # ---- images in -------------------------------------------------------------------------------------------------

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [0, 1] -> network input (B, channels, *size): resized whole, normalised."""
        images = resize(images.float(), self.size)
        if images.shape[1] != self.channels:
            images = images.expand(-1, 3, -1, -1) if self.channels == 3 else images.mean(1, keepdim=True)
        mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    # ---- validation and test -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self.scored, self.unmarked = [], []
        self.tables = None if self.tables is None else []

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to score with: what a pass learns is empty before it."""
        return all(buffer.numel() for buffer in self.buffers(recurse=False))

    def validation_step(self, batch: Batch | list[Batch], index: int) -> None:
        if not self.is_fitted:  # Lightning validates within the first pass
            return
        for part in [batch] if isinstance(batch, Batch) else batch:  # a list: one batch for each image size
            scores = self(part.image, part.roi)
            self.metrics.update(scores.image, scores.map, part.label, part.mask, part.roi)
            self.scored += zip(part.name, part.label.tolist(), scores.image.tolist(), strict=True)
            if part.mask is not None:
                empty = part.label.bool() & ~part.mask.flatten(1).any(1)
                self.unmarked += [name for name, is_empty in zip(part.name, empty.tolist(), strict=True) if is_empty]
            if self.tables is not None:
                self.tables += image_tables(scores.map, part.mask, part.roi)

    def on_validation_epoch_end(self) -> None:
        if self.is_fitted and not self.trainer.sanity_checking:
            self.scored, self.unmarked = ranks.gather_list(self.scored), ranks.gather_list(self.unmarked)
            self.tables = None if self.tables is None else ranks.gather_list(self.tables)
            self.log_dict(self.metrics.compute())  # the same in all processes: the tables were merged

    def on_test_epoch_start(self) -> None:
        self._require_fit()
        self.on_validation_epoch_start()

    def on_predict_epoch_start(self) -> None:
        self._require_fit()

    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    def predict_step(self, batch: Batch | list[Batch], index: int) -> list[Prediction]:
        parts = [batch] if isinstance(batch, Batch) else batch
        return [prediction for part in parts for prediction in self._judge(self(part.image, part.roi), part.roi)]

    # ---- prediction --------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def predict(self, images: Any, batch_size: int = 8) -> Prediction | list[Prediction]:
        """Score images of any size and bit depth.

        Args:
            images: a path, PIL image, array (H, W) or (H, W, 3) of 8 or 16 bits, or tensor (C, H, W); a list of
                these, or a stacked (N, ...) array or tensor, gives a list.
            batch_size: images of equal size that go through the network at once.

        Raises:
            ZooError: an image that can't be read, named; a model that knows cropped images only (preset original).
        """
        if self.view["crop"]:
            raise ZooError("This model was fitted on cropped images, for parity runs; fit it with another preset.")
        self._require_fit()
        if not _is_many(images):
            return self.predict([images])[0]
        was_training = self.training
        self.eval()
        try:
            found: list[Prediction] = []
            group: list[Tensor] = []
            for source in images:
                image = _as_image(source)
                if group and (len(group) == batch_size or image.shape != group[0].shape):
                    found += self._predict(group)
                    group = []
                group.append(image)
            return found + self._predict(group)
        finally:
            self.train(was_training)

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise ZooError(f"This {self.method} has learned nothing yet; fit it first.")

    def _predict(self, group: list[Tensor]) -> list[Prediction]:
        """Images of one shape."""
        if not group:
            return []
        with self.autocast():
            return self._judge(self(torch.stack(group).to(self.device)))

    def autocast(self) -> torch.autocast:
        """The precision in which the model was fitted and calibrated, for a forward outside of a Trainer."""
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def _judge(self, scores: Scores, roi: Tensor | None = None) -> list[Prediction]:
        maps = scores.map[:, 0].float().cpu().numpy()  # (B, H, W)
        inside = [None] * len(maps) if roi is None else roi[:, 0].cpu().numpy()
        return [self._verdict(*parts) for parts in zip(scores.image.tolist(), maps, inside, strict=True)]

    def _verdict(self, score: float, map: np.ndarray, roi: np.ndarray | None = None) -> Prediction:
        if self.calibration is None:
            return Prediction(score, map)
        anomalous = score >= self.calibration.image_threshold
        words = "anomalous" if anomalous else "normal"
        if not self.calibration.calibrated:
            return Prediction(score, map, verdict=f"{words} (uncalibrated)")
        counted = map if roi is None else np.where(roi, map, -np.inf)  # (H, W)
        regions = find_regions(counted, self.calibration.pixel_threshold, self.calibration.min_area)
        regions = [region._replace(p_value=self.calibration.region_p_value(region.level)) for region in regions]
        verdict = f"{words} ({self.calibration.in_words(score)})"
        return Prediction(score, map, self.calibration.p_value(score), anomalous, verdict, regions)

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def kept_arguments(self) -> dict[str, Any]:
        """The configuration, without paths of this machine."""
        return {name: None if name in self.local_arguments else value for name, value in self.hparams.items()}

    def further_sources(self) -> dict[str, Any]:
        """What a fit learns from beside the data set, for the record: numbers by name, no paths."""
        return {}

    def config(self) -> dict[str, Any]:
        """What `config.json` holds of this model, but for what `checkpoint.save` adds. No path of this machine."""
        return {
            "zoo_version": metadata.version("zoo"),
            "method": self.method,
            "preset": self.preset,
            "arguments": self.kept_arguments(),
            "preprocessing": {
                "input_size": list(self.size),
                "channels": self.channels,
                "mean": list(self.mean),
                "std": list(self.std),
                "interpolation": "bilinear, antialias",
                **self.view,
            },
            "precision": self.precision,
            "selection": self.selection,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "backbone": self.features.source if hasattr(self, "features") else None,
        }

    def take_config(self, config: dict[str, Any]) -> None:
        """Take up what `config` gave, after the weights are loaded."""
        self.preset, self.precision = config["preset"], config["precision"]
        self.view = {key: config["preprocessing"][key] for key in ("resize", "crop")}
        self.selection = config.get("selection")  # models of before there was a selection
        self.calibration = Calibration(**config["calibration"]) if config["calibration"] else None
        if hasattr(self, "features"):
            self.features.source = config["backbone"]

    def save_pretrained(
        self, folder: str | Path, record: dict[str, Any] | None = None, private: dict[str, str] | None = None
    ) -> Path:
        """Write the model as a folder: weights, configuration, card, record and what is private.

        Args:
            folder: its place; a model that is already there is replaced, all at once.
            record: the results that the card states.
            private: further text files by name, kept under `private/`.

        Raises:
            ZooError: something else than a model lies there, or it can't be written.
        """
        config = self.config()
        extra = {checkpoint.CARD: render_card(config, record)}
        if record:
            extra[checkpoint.RECORD] = checkpoint.dump(record)
        private = {"state.json": checkpoint.dump(self.private_state())} | (private or {})
        extra |= {f"private/{k}": v for k, v in private.items()}
        return checkpoint.save(folder, self, config, extra, self.last_weights)

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Buffers whose size is learnt (a memory bank) take the stored shape."""
        for name, buffer in self._buffers.items():
            stored = state.get(prefix + name)
            if buffer is not None and stored is not None and stored.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(stored.shape)
        super()._load_from_state_dict(state, prefix, *args)


def _is_many(images: Any) -> bool:
    if isinstance(images, list | tuple):
        return True
    if isinstance(images, Tensor):
        return images.ndim == 4
    return isinstance(images, np.ndarray) and images.ndim == 4


def _as_image(source: Any) -> Tensor:
    """Any one image -> float (1 or 3, H, W) in [0, 1]."""
    if not isinstance(source, Tensor):
        return to_tensor(read_image(source), source if isinstance(source, str | Path) else None)
    if source.ndim == 2:
        source = source[None]
    if source.ndim != 3 or source.shape[0] not in (1, 3):
        raise ZooError(f"An image tensor has shape (1 or 3, H, W), not {tuple(source.shape)}.")
    source = source.detach().float() if source.is_floating_point() else source
    return to_tensor(read_image(source.movedim(0, -1).cpu().numpy()))
