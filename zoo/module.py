"""The one contract of all methods: images in, raw anomaly scores and maps out."""

from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import lightning as L
import numpy as np
import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

from zoo import checkpoint, ranks
from zoo.calibration import Calibration
from zoo.cards import render_card
from zoo.errors import ZooError
from zoo.image import read_image, resize, to_tensor
from zoo.metrics import AnomalyMetrics


class Batch(NamedTuple):
    """Images (B, 1 or 3, H, W) float in [0, 1], their names and, where known, labels (B,), masks and regions of
    interest (B, 1, H, W) bool."""

    image: Tensor
    name: list[str]
    label: Tensor | None = None
    mask: Tensor | None = None
    roi: Tensor | None = None


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
    """

    score: float
    map: np.ndarray
    p_value: float | None = None
    is_anomalous: bool | None = None
    verdict: str = "no threshold"


class AnomalyModule(L.LightningModule):
    """Base of all methods (one file each in `zoo/methods`).

    A subclass has `forward(images, roi=None) -> Scores` and learns in one or both of two ways: by gradient
    (`training_step`, `configure_optimizers`), or by statistics: `observe(batch)` for each batch of normal images, then
    `finish()` once. Its keyword-only `__init__` arguments are plain JSON values: they are the configuration.

    Attributes:
        num_train_images: set before the first `observe`.
        calibration: thresholds from held-out normals, or None.
    """

    method: ClassVar[str]
    memory_options: ClassVar[str] = ""  # options that lower the memory of a fit, as they end a sentence
    channels: ClassVar[int] = 3  # what the network takes; grey is repeated, colour is averaged

    def __init__(self, input_size: int | list[int], seed: int):
        super().__init__()
        if seed < 0:
            raise ZooError(f"--seed is at least 0, not {seed}.")
        self.size = (input_size, input_size) if isinstance(input_size, int) else tuple(input_size)
        if len(self.size) != 2 or min(self.size) < 32:
            raise ZooError(f"--input-size is one number or [height, width] of at least 32 pixels, not {input_size}.")
        self.mean, self.std = (0.5,) * self.channels, (0.5,) * self.channels
        self.num_train_images = 0
        self.calibration: Calibration | None = None
        self.preset: str | None = None
        self.view: dict[str, int | None] = {"resize": None, "crop": None}  # of the data module, in preset original
        self.observed, self.pass_length = 0, 0  # batches of an unfinished pass, and of a whole one
        self.precision = "32-true"
        self.metrics = AnomalyMetrics()
        self.scored: list[tuple[str, int, float]] = []  # (name, label, score) of the last validation or test

    # ---- images in -------------------------------------------------------------------------------------------------

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [0, 1] -> network input (B, channels, *size): resized whole, normalised."""
        images = resize(images.float(), self.size)
        if images.shape[1] != self.channels:
            images = images.expand(-1, 3, -1, -1) if self.channels == 3 else images.mean(1, keepdim=True)
        mean, std = (images.new_tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        return (images - mean) / std

    # ---- learning ----------------------------------------------------------------------------------------------------

    @property
    def learns_by_gradient(self) -> bool:
        return any(parameter.requires_grad for parameter in self.parameters())

    def training_step(self, batch: Batch, index: int) -> Tensor | None:
        with torch.no_grad():
            if batch.name:  # more processes than images
                self.observe(batch)
        self.observed += 1
        if self.observed == self.pass_length:  # before Lightning validates
            self._finish_pass()
        # One process may return nothing; Lightning refuses that of several, and then gets a loss of no parameter.
        return None if self.trainer.world_size == 1 else torch.zeros((), device=self.device, requires_grad=True)

    def configure_optimizers(self) -> Any:
        return None

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if self.learns_by_gradient:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()

    def setup(self, stage: str) -> None:
        if stage != "fit":
            return
        self.forget()
        self.observed = 0
        strategy = self.trainer.strategy
        vars(strategy).pop("configure_ddp", None)
        if isinstance(strategy, DDPStrategy) and not self.learns_by_gradient:
            strategy.configure_ddp = lambda: None  # there is nothing to reduce, and torch's wrapper refuses

    def on_fit_start(self) -> None:
        if len(set(ranks.gather(self.observed))) > 1:
            raise ZooError("Not all processes found the checkpoint; give them one $ZOO_HOME on a shared disk.")
        if self.observed:  # resumed: a checkpoint is read into main memory
            self.load_fit_state(move_data_to_device(self.fit_state(), self.device))

    def on_train_start(self) -> None:
        self.num_train_images = len(self.trainer.train_dataloader.dataset)
        self.pass_length = self.trainer.num_training_batches

    def on_train_batch_start(self, batch: Batch, index: int) -> None:
        """Whatever a step draws from torch's generators is a function of (seed, epoch, step, process)."""
        key = np.random.SeedSequence([self.hparams.seed, self.current_epoch, index, self.global_rank])
        torch.manual_seed(int(key.generate_state(1, np.uint64)[0] >> 1))

    def on_train_epoch_end(self) -> None:
        if self.observed:  # the pass was cut short, by max_steps or a callback
            self._finish_pass()

    on_fit_end = on_train_epoch_end  # resumed where nothing was left to do

    def _finish_pass(self) -> None:
        """Merge what all processes have gathered, learn from it in the first one, and give the result to all."""
        rank, world = ranks.rank_and_world()
        with torch.no_grad():
            if rank == 0:
                for source in range(1, world):
                    self.merge_fit_state(ranks.receive(source, self.device))
                self.finish()
                learned = {name: getattr(self, name) for name in checkpoint.learned_buffers(self)}
                for other in range(1, world):
                    ranks.send((learned, self.private_state()), other)
            else:
                ranks.send(self.fit_state(), 0)
                self.forget()
                learned, private = ranks.receive(0, self.device)
                for name, buffer in learned.items():
                    setattr(self, name, buffer)
                self.load_private_state(private)
        self.observed = 0

    def fit_state(self) -> dict[str, Any]:
        """What `observe` has gathered so far: tensors and plain values for a Lightning checkpoint, not for a model."""
        return {}

    def load_fit_state(self, state: dict[str, Any]) -> None:
        """Take up what `fit_state` gave."""

    def merge_fit_state(self, state: dict[str, Any]) -> None:
        """Add what `fit_state` gave in another process, which saw other images; the last step before `finish`."""

    def forget(self) -> None:
        """Drop what `observe` has gathered; what was learned before stays."""

    def on_save_checkpoint(self, ckpt: dict[str, Any]) -> None:
        rank, world = ranks.rank_and_world()
        state = self.fit_state()
        if rank:
            ranks.send(state, 0)
        others = (ranks.receive(source, self.device) for source in range(1, world) if not rank)
        ckpt["fit_state"] = [state, *(move_data_to_device(other, "cpu") for other in others)]
        ckpt["observed"], ckpt["precision"], ckpt["private"] = self.observed, self.precision, self.private_state()

    def on_load_checkpoint(self, ckpt: dict[str, Any]) -> None:
        self.load_private_state(ckpt["private"])
        if self._trainer is None or self.trainer.state.fn != "fit":
            return
        progress = ckpt["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        now = progress["current"]
        accumulating = now["processed"] % self.trainer.accumulate_grad_batches and not progress["is_last_batch"]
        if now["started"] != now["processed"] or (accumulating and self.learns_by_gradient):
            raise ZooError("This checkpoint was taken in the middle of a step; resume from the one before it.")
        if progress["is_last_batch"] and self.trainer.max_steps != -1:  # there Lightning 2.6 takes one batch too many
            raise ZooError("This checkpoint ends an epoch, where a fit by max_steps doesn't resume; give max_epochs.")
        before = ckpt["hyper_parameters"] | {"precision": ckpt["precision"]}
        now = self.hparams | {"precision": self.precision}
        changed = [key for key, value in before.items() if now.get(key) != value]
        if changed:
            raise ZooError(f"This checkpoint belongs to another configuration ({changed[0]} differs); start anew.")
        rank, world = ranks.rank_and_world()
        if len(ckpt["fit_state"]) != world:
            before = len(ckpt["fit_state"])
            raise ZooError(f"This checkpoint was taken by {before} processes and goes on with as many, not {world}.")
        self.load_fit_state(ckpt["fit_state"][rank])
        self.observed = ckpt["observed"]

    # ---- validation and test -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self.scored = []

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

    def on_validation_epoch_end(self) -> None:
        if self.is_fitted and not self.trainer.sanity_checking:
            self.scored = ranks.gather_list(self.scored)
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
        return [prediction for part in parts for prediction in self._judge(self(part.image, part.roi))]

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

    def _judge(self, scores: Scores) -> list[Prediction]:
        maps = scores.map[:, 0].float().cpu().numpy()  # (B, H, W)
        return [self._verdict(score, map) for score, map in zip(scores.image.tolist(), maps, strict=True)]

    def _verdict(self, score: float, map: np.ndarray) -> Prediction:
        if self.calibration is None:
            return Prediction(score, map)
        anomalous = score >= self.calibration.image_threshold
        words = "anomalous" if anomalous else "normal"
        if not self.calibration.calibrated:
            return Prediction(score, map, verdict=f"{words} (uncalibrated)")
        return Prediction(score, map, self.calibration.p_value(score), anomalous, words)

    # ---- keeping -----------------------------------------------------------------------------------------------------

    def probe(self, batch: Batch) -> None:
        """The part of `observe` that costs the same for each batch: it is timed before a fit."""
        self.observe(batch)

    def estimate_memory(self, num_images: int, world: int = 1) -> int:
        """Bytes that a fit on so many images, in each of so many processes, holds beside the network and one batch.

        The peak of the first process, which merges.
        """
        return 0

    def estimate_seconds(self, num_images: int, scored: int) -> float:
        """Seconds that a fit on so many images, and scoring others, takes beside the network, on this device."""
        return 0.0

    def private_state(self) -> dict[str, Any]:
        """JSON values that stay with the owner (image names): saved under `private/`, never published."""
        return {}

    def load_private_state(self, state: dict[str, Any]) -> None:
        """Take up what `private_state` gave."""

    def config(self) -> dict[str, Any]:
        """What `config.json` holds of this model, but for what `checkpoint.save` adds. No path of this machine."""
        return {
            "zoo_version": metadata.version("zoo"),
            "method": self.method,
            "preset": self.preset,
            "arguments": {k: None if k == "backbone_weights" else v for k, v in self.hparams.items()},
            "preprocessing": {
                "input_size": list(self.size),
                "channels": self.channels,
                "mean": list(self.mean),
                "std": list(self.std),
                "interpolation": "bilinear, antialias",
                **self.view,
            },
            "precision": self.precision,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "backbone": self.features.source if hasattr(self, "features") else None,
        }

    def take_config(self, config: dict[str, Any]) -> None:
        """Take up what `config` gave, after the weights are loaded."""
        self.preset, self.precision = config["preset"], config["precision"]
        self.view = {key: config["preprocessing"][key] for key in ("resize", "crop")}
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
        return checkpoint.save(folder, self, config, extra | {f"private/{k}": v for k, v in private.items()})

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
