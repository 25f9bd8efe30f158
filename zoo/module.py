"""The one contract of all methods: images in, raw anomaly scores and maps out."""

import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from zoo import checkpoint, ranks
from zoo.calibration import Calibration, stored
from zoo.cards import render_card
from zoo.errors import ZooError
from zoo.forms import quoted
from zoo.image import read_mask, resize
from zoo.learning import Batch, LearningModule
from zoo.metrics import AnomalyMetrics
from zoo.metrics.bootstrap import image_tables
from zoo.nn.fast import fast_mode, forget_twins
from zoo.nn.transfer import sent
from zoo.regions import Region, find_regions
from zoo.sem import read_sem
from zoo.tiles import by_tiles
from zoo.view import View

HELD = 2**22  # pixels of maps that wait on the device to be measured together: 16 MB
_VIEW = {field.name for field in fields(View)}


class Scores(NamedTuple):
    """Raw scores (B,) and maps (B, 1, H, W), float32, higher = more anomalous, never rescaled by image or batch."""

    image: Tensor
    map: Tensor


class Brought(NamedTuple):
    """One image of any source, decoded, and as the model sees it.

    Attributes:
        array: (H, W) or (H, W, 3), as it was read.
        image: (C, h, w) in [0, 1]; h is less than H where an info bar is left out.
        roi: region of interest (1, h, w) bool, or None for all of it.
        pixel_nm: side of a pixel in nm, where the file tells.
    """

    array: np.ndarray
    image: Tensor
    roi: Tensor | None
    pixel_nm: float | None

    def looked_at(self) -> np.ndarray:
        """What of the array counts, (H, W) bool: neither the info bar nor what is ignored."""
        seen = np.zeros(self.array.shape[:2], dtype=bool)
        seen[: self.image.shape[-2]] = True if self.roi is None else self.roi[0].numpy()
        return seen


class Prediction(NamedTuple):
    """What `predict` says of one image.

    Attributes:
        score: raw image score, higher = more anomalous.
        map: raw anomaly map, float32 (H, W), at the image's own size (of a Trainer's `predict`, at that of the batch);
            where nothing was looked at (info bar, ignore mask) it has its lowest value.
        p_value: share of normal images that score as high; None until the model is calibrated, and for an image of
            another size, in another precision or in other tiles than the calibrated ones.
        is_anomalous: the calibrated verdict; None likewise.
        verdict: the same in words; before calibration it applies the fit's default threshold and says so.
        regions: what reaches the calibrated pixel threshold, by falling peak; None until the model is calibrated.
        pixel_nm: side of a pixel in nm, where the image's file tells.
    """

    score: float
    map: np.ndarray
    p_value: float | None = None
    is_anomalous: bool | None = None
    verdict: str = "no threshold"
    regions: list[Region] | None = None
    pixel_nm: float | None = None


class Evidence(NamedTuple):
    """What of the training images comes nearest to a place in an image.

    Attributes:
        name: of the training image, as its data set calls it.
        box: (top, left, bottom, right) of its patch, in shares of the height and width of what the fit saw: the image
            above the info bar, or one of its tiles.
        cell: (top, left, bottom, right) of the patch around the place, in pixels of the image.
        distance: between the two, as the method measures it.
    """

    name: str
    box: tuple[float, float, float, float]
    cell: tuple[float, float, float, float]
    distance: float


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
    surprises_by: ClassVar[str] = "mean map"  # what `surprise` gives
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
        self.folder: Path | None = None  # that it was loaded from, or saved to by its fit
        self.record: dict[str, Any] | None = None  # of its fit and evaluation, which its card states
        self.notes: dict[str, str] = {}  # private files of a model that was updated
        self.selection: dict[str, Any] | None = None  # metric, data, seed and size of what chose the weights
        self.view, self._other_tiles = View(), False
        self.metrics = AnomalyMetrics()
        self.scored: list[tuple[str, int, float]] = []  # (name, label, score) of the last validation or test
        self.held: list[tuple[Batch, Scores]] = []  # scored, without their images, and not measured yet
        self.unmarked: list[str] = []  # anomalous ones without a defect pixel in their masks, as scored
        self.tables: list[np.ndarray] | None = None  # of its images' pixels, where somebody asks for them by a list

    # ---- images in -------------------------------------------------------------------------------------------------

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 1 or 3, H, W) in [0, 1] -> network input (B, channels, *size): resized whole, normalised."""
        images = resize(images.float(), self.size)
        if images.shape[1] != self.channels:
            images = images.expand(-1, 3, -1, -1) if self.channels == 3 else images.mean(1, keepdim=True)
        # Filled on the device: a tensor made from a list would be copied there, and the host would wait for it.
        mean, std = (torch.stack([images.new_full((1, 1), x) for x in v], 1)[..., None] for v in (self.mean, self.std))
        return (images - mean) / std  # by (1, channels, 1, 1)

    def score_images(self, images: Tensor, roi: Tensor | None = None) -> Scores:
        """`forward` of images (B, 1 or 3, H, W) as the view brings them: by tiles where they are larger than its tile.

        Args:
            roi: (B, 1, H, W) bool, region of interest; the score of an image doesn't look outside.
        """
        return self(images, roi) if self.view.tile is None else Scores(*by_tiles(self, images, roi, self.view.tile))

    def nearest_normal(self, image: Tensor, places: Sequence[tuple[int, int]]) -> list[Evidence] | None:
        """For places in an image, the normal patch that each is nearest to, from the training images.

        Args:
            image: (1, C, H, W) as `bring` gives it.
            places: (row, column) in its pixels.

        Returns:
            One for each place; None of a method that keeps no patches of images, or of a model that came without
            `private/`, where it is noted which ones they were.
        """
        return None

    def surprise(self, batch: Batch) -> tuple[Tensor, int | Tensor]:
        """How unlike what was learned normal images look: sum and number of values, here the pixels of their maps.

        `--select normal` keeps the step whose mean is lowest on held-out normal images.
        """
        maps = self.score_images(batch.image, batch.roi).map.double()  # (B, 1, H, W)
        if batch.roi is None:
            return maps.sum(), maps.numel()
        return maps.where(batch.roi, 0).sum(), batch.roi.sum()

    # ---- validation and test -----------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        self.metrics.reset()
        self.scored, self.unmarked, self.held = [], [], []
        self.tables = None if self.tables is None else []

    @property
    def is_fitted(self) -> bool:
        """Whether there is something to score with: what a pass learns is empty before it."""
        return all(buffer.numel() for buffer in self.buffers(recurse=False))

    def validation_step(self, batch: Batch | list[Batch], index: int) -> None:
        if not self.is_fitted:  # Lightning validates within the first pass
            return
        for part in [batch] if isinstance(batch, Batch) else batch:  # a list: one batch for each image size
            scores = self.score_images(part.image, part.roi)
            self.held.append((part._replace(image=None), scores))
        if sum(scores.map.numel() for _, scores in self.held) >= HELD:
            self._measure_held()

    def _measure_held(self) -> None:
        """Take the batches that are held into metrics and lists: here the host waits for the device."""
        held, self.held = self.held, []
        self.metrics.update_all([(*scores, part.label, part.mask, part.roi) for part, scores in held])
        for part, scores in held:
            self.scored += zip(part.name, part.label.tolist(), scores.image.tolist(), strict=True)
            if part.mask is not None:
                marked = part.mask if part.roi is None else part.mask & part.roi
                empty = part.label.bool() & ~marked.flatten(1).any(1)
                self.unmarked += [name for name, is_empty in zip(part.name, empty.tolist(), strict=True) if is_empty]
            if self.tables is not None:
                self.tables += image_tables(scores.map, part.mask, part.roi)

    def on_validation_epoch_end(self) -> None:
        if self.held:
            self._measure_held()
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
        found = [(part, self.score_images(part.image, part.roi)) for part in parts]
        return [prediction for part, scores in found for prediction in self._judge(scores, part.roi)]

    # ---- prediction --------------------------------------------------------------------------------------------------

    def predict(
        self, images: Any, batch_size: int = 8, ignore: Any = None, tile: int | None = None
    ) -> Prediction | list[Prediction]:
        """Score images of any size and bit depth.

        Args:
            images: a path, PIL image, array (H, W) or (H, W, 3) of 8 or 16 bits, or tensor (C, H, W); a list of
                these, or a stacked (N, ...) array or tensor, gives a list.
            batch_size: images of equal size that go through the network at once; of images in tiles it is one.
            ignore: what is not to be looked at: a mask (H, W) for all images, or a list of one mask or None for each;
                a mask is a bool array or tensor, or whatever `zoo.image.read_mask` takes, white where to ignore.
            tile: side in pixels of the tiles in which larger images are seen; None does as in the fit, 0 sees images as
                a whole. Verdicts are uncalibrated where it is not that of the calibration.

        Raises:
            ZooError: an image that can't be read, named; a model that knows cropped images only (preset original).
        """
        many = list(images) if _is_many(images) else [images]
        masks = ignore if isinstance(ignore, list | tuple) else [ignore] * len(many)
        if len(masks) != len(many):
            raise ZooError(f"ignore has {len(masks)} masks for {len(many)} images; give one or None for each.")
        with self.seen_in_tiles(tile):
            brought = (self.bring(image, mask) for image, mask in zip(many, masks, strict=True))
            found = self.predict_brought(brought, batch_size)
        return found if _is_many(images) else found[0]

    def bring(self, source: Any, ignore: Any = None) -> Brought:
        """One image of any source as the model sees it; arguments and errors are those of `predict`."""
        if isinstance(source, Tensor):
            source = _array_of(source)
        sem = read_sem(source)
        is_path = isinstance(source, str | Path)
        ignore = ignore.cpu().numpy() if isinstance(ignore, Tensor) else ignore
        ignored = ignore if ignore is None or _is_mask(ignore) else read_mask(ignore)
        name = str(source) if is_path else "the image"
        image, _, roi = self.view.native().see(sem.image, name, sem, ignored=ignored)
        return Brought(sem.image, image[0], None if roi is None else roi[0], sem.pixel_nm)

    @torch.inference_mode()
    def predict_brought(self, images: Iterable[Brought], batch_size: int = 8) -> list[Prediction]:
        """Predictions of images that `bring` gave, of which as many as make a batch are held at once."""
        if self.view.crop:
            raise ZooError("This model was fitted on cropped images, for parity runs; fit it with another preset.")
        self._require_fit()
        was_training = self.training
        self.eval()
        try:
            found: list[Prediction] = []
            group: list[Brought] = []
            for image in images:
                full = len(group) == (1 if self.view.tile else batch_size)
                if group and (full or image.image.shape != group[0].image.shape):
                    found += self._predict(group)
                    group = []
                group.append(image)
            return found + self._predict(group)
        finally:
            self.train(was_training)

    @contextmanager
    def seen_in_tiles(self, tile: int | None) -> Iterator[None]:
        """Images are seen in other tiles than those of the fit for a while; the calibration doesn't hold then.

        Args:
            tile: side in pixels; None changes nothing, 0 sees images as a whole.
        """
        view = self.view
        if tile is not None and (tile or None) != view.tile:
            self.view, self._other_tiles = replace(view, tile=tile or None), True
        try:
            yield
        finally:
            self.view, self._other_tiles = view, False

    def _require_fit(self) -> None:
        if not self.is_fitted:
            raise ZooError(f"This {self.method} has learned nothing yet; fit it first.")

    def _predict(self, group: list[Brought]) -> list[Prediction]:
        """Images of one shape."""
        if not group:
            return []
        images, roi = torch.stack([one.image for one in group]), None
        if any(one.roi is not None for one in group):
            whole = torch.ones_like(images[0, :1], dtype=torch.bool)
            roi = torch.stack([whole if one.roi is None else one.roi for one in group])
        with self.autocast():
            inside = None if roi is None else sent(roi, self.device)
            scores = self.score_images(sent(images, self.device), inside)
        found = self._judge(scores, roi, [len(one.array) for one in group])
        return [one._replace(pixel_nm=brought.pixel_nm) for one, brought in zip(found, group, strict=True)]

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the model was fitted and calibrated, for a forward outside of a Trainer."""
        if self.precision == "fast":
            return fast_mode(self.device)
        half = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(self.precision)
        return torch.autocast(self.device.type, half, enabled=half is not None)

    def thresholds(self, size: tuple[int, int] | None = None) -> Calibration | None:
        """The calibration as far as it holds: in another precision, in other tiles, or of an image of another size
        (height, width; None: of one that was calibrated) it states no rate."""
        known = self.calibration
        if known is None or not known.calibrated:
            return known
        other_size = size is not None and known.sizes and list(size) not in known.sizes
        if other_size or self._other_tiles or known.precision != self.precision:
            return replace(known, calibrated=False)
        return known

    def _judge(self, scores: Scores, roi: Tensor | None, heights: Sequence[int] | None = None) -> list[Prediction]:
        maps = scores.map[:, 0].float().cpu().numpy()  # (B, h, w)
        inside = [None] * len(maps) if roi is None else roi[:, 0].cpu().numpy()  # (B, h, w)
        heights = heights or [maps.shape[1]] * len(maps)
        found = []
        for score, map, region, height in zip(scores.image.tolist(), maps, inside, heights, strict=True):
            found.append(self._verdict(score, map, region)._replace(map=_whole(map, region, height)))
        return found

    def _verdict(self, score: float, map: np.ndarray, roi: np.ndarray | None = None) -> Prediction:
        if not math.isfinite(score):
            raise ZooError(f"An image has the score {score}, which is no number to judge by; take --precision 32-true.")
        return judge(score, map, self.thresholds(map.shape), roi)

    # ---- learning further --------------------------------------------------------------------------------------------

    def update(
        self, images: Any = (), remove: Any = (), *, names: Sequence[str] | None = None, batch_size: int = 8
    ) -> None:
        """Learn further normal images, or take images out, without a refit: of `padim`, `patchcore` and `cfa`.

        Arguments and errors are those of `zoo.updating.update`.
        """
        from zoo.updating import update

        update(self, images, remove, names, batch_size)

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
                **asdict(self.view),
            },
            "precision": self.precision,
            "selection": self.selection,
            "stands_for": self.stands_for,
            "calibration": self.calibration.to_dict() if self.calibration else None,
            "backbone": self.features.source if hasattr(self, "features") else None,
        }

    def take_config(self, config: dict[str, Any]) -> None:
        """Take up what `config` gave.

        Raises:
            ValueError: preprocessing that is not this module's, or unknown; a calibration of another kind.
        """
        given = config["preprocessing"]
        own = {key: value for key, value in self.config()["preprocessing"].items() if key not in _VIEW}
        if other := [key for key in given.keys() - _VIEW | own.keys() if given.get(key) != own.get(key)]:
            what = f"preprocessing {quoted(min(other))}"
            raise ValueError(f"{what} is missing, unknown, or not that of the method and its arguments")
        self.view = View.stored(given)
        self.preset, self.precision, self.selection = config["preset"], config["precision"], config.get("selection")
        self.stands_for = config.get("stands_for")
        if self.stands_for is not None and not 0 < self.stands_for < math.inf:
            raise ValueError("stands_for, a number of images, is above 0")
        self.calibration = None if config["calibration"] is None else stored(config["calibration"])
        if hasattr(self, "features"):
            self.features.source = config["backbone"]

    def save_pretrained(
        self,
        folder: str | Path,
        record: dict[str, Any] | None = None,
        private: dict[str, str] | None = None,
        *,
        push_to_hub: bool = False,
        repo_id: str | None = None,
        **how: Any,
    ) -> Path:
        """Write the model as a folder: weights, configuration, card, record and what is private.

        Args:
            folder: its place; a model that is already there is replaced, all at once.
            record: the results that the card states; None: those that it was loaded with, or that its fit gave.
            private: further text files by name, kept under `private/`.
            push_to_hub: publish it too, to `repo_id`, with the arguments `how` of `push_to_hub`.

        Raises:
            TypeError: arguments that it doesn't know.
            ZooError: something else than a model lies there, or it can't be written.
        """
        if how and not push_to_hub:
            raise TypeError(f"save_pretrained() takes {min(how)!r} with push_to_hub=True alone")
        config, record = self.config(), record or self.record
        checkpoint.check_record(record or {})
        extra = {checkpoint.CARD: render_card(config, record)}
        if record:
            extra[checkpoint.RECORD] = checkpoint.dump(record)
        private = {"state.json": checkpoint.dump(self.private_state())} | self.notes | (private or {})
        extra |= {f"private/{k}": v for k, v in private.items()}
        place = checkpoint.save(folder, self, config, extra, self.last_weights)
        if push_to_hub:
            self.push_to_hub(repo_id or place.name, **how)
        return place

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None, **how: Any) -> Self:
        """`zoo.from_pretrained` of a model of this class; arguments and errors are those."""
        from zoo.hub import from_pretrained

        model = from_pretrained(name, revision, **how)
        if not isinstance(model, cls):
            raise ZooError(f"{name} is a model of {model.method}; load it with zoo.from_pretrained({str(name)!r}).")
        return model

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        branch: str | None = None,
        tag: str | None = None,
        data_names: bool = False,
        overwrite_card: bool = False,
        replace: bool = False,
    ) -> Any:
        """Publish the model, as it is in memory and with its record, to a repository `ORG/NAME` on the hub.

        Arguments, result and errors are those of `zoo.publish.publish`.
        """
        from zoo.publish import publish

        how = {"private": private, "token": token, "branch": branch, "tag": tag, "commit_message": commit_message}
        with tempfile.TemporaryDirectory() as place:
            folder = self.save_pretrained(Path(place) / "model", private=self._known_images() | self.notes)
            how |= {"data_names": data_names, "overwrite_card": overwrite_card, "replace": replace}
            return publish(folder, repo_id, **how)

    def _known_images(self) -> dict[str, str]:
        """What its folder notes of images by name, none of which may be published."""
        notes = (self.folder / "private").glob("*.csv") if self.folder else ()
        return {path.name: path.read_text(encoding="utf-8") for path in notes}

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Buffers whose size is learnt (a memory bank) take the stored shape."""
        forget_twins(self)
        for name, buffer in self._buffers.items():
            stored = state.get(prefix + name)
            if buffer is not None and stored is not None and stored.shape != buffer.shape:
                self._buffers[name] = buffer.new_empty(stored.shape)
        super()._load_from_state_dict(state, prefix, *args)


def judge(score: float, map: np.ndarray, known: Calibration | None, roi: np.ndarray | None = None) -> Prediction:
    """What a score and a map say by these thresholds.

    Args:
        map: float32 (H, W).
        known: as far as it holds for this image (`AnomalyModule.thresholds`), or at another rate (`at_rate`).
        roi: (H, W) bool, region of interest, outside of which there are no regions.
    """
    if known is None:
        return Prediction(score, map)
    anomalous = score >= known.image_threshold
    words = "anomalous" if anomalous else "normal"
    if not known.calibrated:
        return Prediction(score, map, verdict=f"{words} (uncalibrated)")
    counted = map if roi is None else np.where(roi, map, -np.inf)  # (H, W)
    regions = find_regions(counted, known.pixel_threshold, known.min_area)
    regions = [region._replace(p_value=known.region_p_value(region.level)) for region in regions]
    return Prediction(score, map, known.p_value(score), anomalous, f"{words} ({known.in_words(score)})", regions)


def _is_many(images: Any) -> bool:
    if isinstance(images, list | tuple):
        return True
    if isinstance(images, Tensor):
        return images.ndim == 4
    return isinstance(images, np.ndarray) and images.ndim == 4


def _is_mask(mask: Any) -> bool:
    return isinstance(mask, np.ndarray) and mask.dtype == bool


def _array_of(image: Tensor) -> np.ndarray:
    """A tensor (H, W) or (1 or 3, H, W) -> array (H, W, C), in [0, 1] or of its integers."""
    image = image[None] if image.ndim == 2 else image
    if image.ndim != 3 or image.shape[0] not in (1, 3):
        raise ZooError(f"An image tensor has shape (1 or 3, H, W), not {tuple(image.shape)}.")
    image = image.detach().float() if image.is_floating_point() else image
    return image.movedim(0, -1).cpu().numpy()


def _whole(map: np.ndarray, roi: np.ndarray | None, height: int) -> np.ndarray:
    """The map (h, w) of what was looked at -> (H, w), with its lowest value everywhere else."""
    lowest = map.min() if roi is None else map[roi].min()
    map = map if roi is None else np.where(roi, map, lowest)
    return map if len(map) == height else np.pad(map, ((0, height - len(map)), (0, 0)), constant_values=lowest)
