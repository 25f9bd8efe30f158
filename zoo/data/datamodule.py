"""A LightningDataModule over any `datasets` object of the zoo, with a loader that resumes and never repeats."""

import hashlib
import json
from dataclasses import asdict
from itertools import groupby
from typing import Any

import lightning as L
import numpy as np
import torch
from datasets import Dataset, DatasetDict

from zoo.data.holdout import held_out
from zoo.data.ignore import IgnoreMasks
from zoo.data.loader import EpochLoader
from zoo.data.rows import read_row
from zoo.errors import ZooError
from zoo.image import resize, resize_mask
from zoo.module import Batch
from zoo.tiles import Tile, tiles_of
from zoo.view import View, look_at, sample

KEPT = 8  # images that a fit on tiles holds at once: half a gigabyte where they have 4096 x 4096 pixels
HOLDOUT_BATCH = 8  # at most: what was learned is in memory too by then, so the peak of a fit stays that of its pass


class AnomalyDataModule(L.LightningDataModule):
    """Batches of a data set: normals to fit on, normals held out for thresholds, and the test split.

    Args:
        data: splits `train` and `test` with columns image, mask, label, path.
        input_size: (height, width) to which training images of unequal sizes are brought, so that they can be stacked.
        batch_size: images a batch.
        num_workers: processes that decode; None takes them only where there is a GPU to feed.
        train_fraction: share of the training normals that is used, drawn by `seed`.
        hold_out: normals that the fit doesn't see; None takes a tenth, at least 20, at most a half.
        view: how images are brought before the model; with tiles, the fit is given tiles of the training images.
        ignore: masks of what is not looked at when images are scored; a fit sees all of its images.
        skip_broken: leave out images that can't be read (`broken` lists them) instead of stopping.
        use_defects: give the fit the labelled defects of the training split too; none of them is held out.
        seed: of the order of training images, the fraction and the held-out normals.
        fingerprint: of the data set; a fit that is resumed must have the same one.

    Attributes:
        num_images: images that the fit sees.
        num_train_images: the same, or the number of their tiles.
        num_defects: labelled defects in the training split, used or not.
        broken: (name, reason) of each image that was left out.
    """

    def __init__(
        self,
        data: DatasetDict,
        *,
        input_size: tuple[int, int] = (224, 224),
        batch_size: int = 32,
        num_workers: int | None = None,
        train_fraction: float = 1.0,
        hold_out: int | None = None,
        view: View | None = None,
        ignore: IgnoreMasks | None = None,
        skip_broken: bool = False,
        use_defects: bool = False,
        seed: int = 0,
        fingerprint: str = "",
    ):
        super().__init__()
        if not 0 < train_fraction <= 1:
            raise ZooError(f"--train-fraction lies in (0, 1], not {train_fraction}.")
        if batch_size < 1 or (num_workers or 0) < 0:
            raise ZooError("--batch-size is at least 1 and --num-workers at least 0.")
        self.input_size, self.batch_size, self.seed = input_size, batch_size, seed
        self.num_workers = (4 if torch.cuda.is_available() else 0) if num_workers is None else num_workers
        self.view, self.ignore, self.fingerprint = view or View(), ignore, fingerprint
        self.broken: list[tuple[str, str]] = []
        train, self.test_set = data["train"], data["test"]
        labels = _labels(train)
        self.num_defects = int(np.count_nonzero(labels))
        train = train if use_defects else train.select(np.flatnonzero(labels == 0))
        if skip_broken:
            train, self.test_set = self._readable(train), self._readable(self.test_set)
        labels = _labels(train)
        normals, defects = np.flatnonzero(labels == 0), np.flatnonzero(labels)
        if use_defects:
            self.num_defects = len(defects)  # those that can be read
        order = normals[np.random.default_rng(seed).permutation(len(normals))]
        order = order[: max(1, round(train_fraction * len(normals)))]
        held = held_out(len(order), hold_out)
        self.holdout_set = train.select(np.sort(order[:held]))
        self.train_set = train.select(np.sort(np.concatenate([order[held:], defects])))
        self.num_images = len(self.train_set)
        self._items: _Images | _Tiles | None = None

    @property
    def train_items(self) -> "_Images | _Tiles":
        """What the fit sees, one by one: images, or their tiles."""
        if self._items is None:
            images = _Images(self.train_set, self.view)
            self._items = _Tiles(images, self.view.tile) if self.view.tile else images
        return self._items

    @property
    def num_train_images(self) -> int:
        return len(self.train_items)

    def look(self, info_bar: str, intensity: str) -> View:
        """Complete the view by what the training images show, see `zoo.view.look_at`."""
        images = [self.train_set[row]["image"] for row in sample(self.num_images)]
        self.view, self._items = look_at(self.view, images, info_bar, intensity), None
        return self.view

    def train_dataloader(self) -> EpochLoader:
        """Training normals, shuffled by (seed, epoch); images of unequal sizes are resized to `input_size`."""
        if not self.num_train_images:
            raise ZooError("There is no normal image to fit on; put some into train/good or good.")
        return EpochLoader(self.train_items, self.batch_size, self._collate_train, self.seed, self.num_workers)

    def holdout_dataloader(self) -> EpochLoader:
        """Normals that the fit doesn't see, as they would be predicted."""
        return self._loader(self.holdout_set, min(HOLDOUT_BATCH, self.batch_size), self.view.native())

    def test_dataloader(self) -> EpochLoader:
        """The test split in order, at its own size."""
        if not len(self.test_set):
            raise ZooError("The data has no test images; add test/good and test/<kind>, or bad beside good.")
        return self._loader(self.test_set, self.batch_size, self.view)

    predict_dataloader = test_dataloader

    def test_image(self, row: int) -> Batch:
        """One image of the test split, at its own size, whatever the number of processes."""
        return _Images(self.test_set, self.view, self.ignore)[row]

    def _loader(self, dataset: Dataset, batch_size: int, view: View) -> EpochLoader:
        """Whole images to be scored, in order; those that are seen in tiles one by one, as they may be large."""
        batch_size = 1 if self.view.tile else batch_size
        images = _Images(dataset, view, self.ignore)
        return EpochLoader(images, batch_size, group_by_shape, num_workers=self.num_workers)

    def state_dict(self) -> dict[str, str]:
        """What the order of the images depends on, for Lightning's checkpoints."""
        return {"identity": self._identity()}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Check that a checkpoint goes on with the same images in the same order.

        Raises:
            ZooError: it doesn't.
        """
        if state["identity"] != self._identity():
            raise ZooError(
                "The checkpoint was taken on other images, or with another batch size or seed; "
                "go on with the same ones, or start the fit anew."
            )

    def _identity(self) -> str:
        about = [self.fingerprint, self.batch_size, self.seed, asdict(self.view)]
        about += self.train_set.with_format(None)["path"]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

    def _collate_train(self, items: list[Batch]) -> Batch:
        if len({item.image.shape for item in items}) > 1:
            items = [_grey_to_colour(item._replace(image=resize(item.image, self.input_size))) for item in items]
            items = [i._replace(mask=None if i.mask is None else resize_mask(i.mask, self.input_size)) for i in items]
        if any(item.mask is not None for item in items):  # an empty mask: where its defect lies is not known
            blank = torch.zeros_like(items[0].image[:, :1], dtype=torch.bool)
            items = [item._replace(mask=blank) if item.mask is None else item for item in items]
        return _stack(items)

    def _readable(self, dataset: Dataset) -> Dataset:
        good = []
        for i in range(len(dataset)):
            try:
                read_row(dataset[i])
                good.append(i)
            except ZooError as error:
                self.broken.append((dataset[i]["path"], str(error)))
        return dataset.select(good)


class _Images(torch.utils.data.Dataset):
    """Rows of a `datasets` object -> batches of one."""

    def __init__(self, dataset: Dataset, view: View, ignore: IgnoreMasks | None = None):
        self.dataset, self.view, self.ignore = dataset, view, ignore

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Batch:
        return self._item(self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        """Of a batch at once: a `datasets` object takes as long for many rows as for one."""
        rows = self.dataset[indices]
        return [self._item(dict(zip(rows, values, strict=True))) for values in zip(*rows.values(), strict=True)]

    def _item(self, row: dict[str, Any]) -> Batch:
        array, mask, name = read_row(row)
        ignored = self.ignore.of(name) if self.ignore else None
        image, mask, roi = self.view.see(array, name, row["image"], mask, ignored)
        return Batch(image, [name], torch.tensor([row["label"]]), mask, roi)


class _Tiles(torch.utils.data.Dataset):
    """Images -> batches of one tile each; tiles of an image overlap only as far as they must to cover it.

    Some images are kept decoded, and tiles are shuffled among those of so many images.
    """

    def __init__(self, images: _Images, tile: int):
        self.images, self.places = images, []  # (row, tile)
        self.kept: dict[int, Batch] = {}
        for row, source in enumerate(images.dataset["image"]):
            self.places += [(row, place) for place in tiles_of(images.view.size(source), tile, overlap=0)]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Batch:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Batch]:
        return [_cut(self._image(row), tile) for row, tile in (self.places[index] for index in indices)]

    def order(self, rng: np.random.Generator) -> np.ndarray:
        """All tiles at random, those of `KEPT` images after those of others."""
        rows = np.array([row for row, _ in self.places])
        blocks = rng.permutation(len(self.images))[rows] // KEPT
        return np.lexsort((rng.random(len(rows)), blocks))

    def _image(self, row: int) -> Batch:
        if row not in self.kept:
            if len(self.kept) == KEPT:
                del self.kept[next(iter(self.kept))]  # the first that came
            self.kept[row] = self.images[row]
        return self.kept[row]


def _cut(item: Batch, tile: Tile) -> Batch:
    image, mask = (None if m is None else m[..., tile.rows, tile.columns].clone() for m in (item.image, item.mask))
    return item._replace(image=image, mask=mask)


def _labels(dataset: Dataset) -> np.ndarray:
    return np.array(dataset.with_format(None)["label"], dtype=int)


def group_by_shape(items: list[Batch]) -> list[Batch]:
    """One batch for each run of images of the same size, in the order of the items."""
    return [_stack(list(group)) for _, group in groupby(items, key=lambda item: item.image.shape)]


def _stack(items: list[Batch]) -> Batch:
    """Items of one shape -> one batch; a normal image without mask has an empty one if any other has one."""
    if not items:
        return Batch(torch.empty(0, 1, 1, 1), [])
    masks = [item.mask for item in items]
    if any(mask is not None for mask in masks) and _masks_complete(items):
        empty = torch.zeros_like(next(mask for mask in masks if mask is not None))
        mask = torch.cat([empty if mask is None else mask for mask in masks])
    else:
        mask = None
    roi = None
    if any(item.roi is not None for item in items):
        whole = torch.ones_like(items[0].image[:, :1], dtype=torch.bool)
        roi = torch.cat([whole if item.roi is None else item.roi for item in items])
    names = [name for item in items for name in item.name]
    return Batch(torch.cat([i.image for i in items]), names, torch.cat([i.label for i in items]), mask, roi)


def _masks_complete(items: list[Batch]) -> bool:
    return all(item.mask is not None or not item.label.any() for item in items)


def _grey_to_colour(item: Batch) -> Batch:
    return item._replace(image=item.image.expand(-1, 3, -1, -1))
