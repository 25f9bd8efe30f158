"""A prepared data set: decoded once, grey, at the working size, in memory-mapped blocks that are checked when read.

A store is a folder: `store.json` (what it was made from, its rows, the SHA-256 of each block and of itself) and blocks
of up to 512 images, `train-00000.npy` (N, H, W) uint8 or uint16, with the masks of its defects in
`train-00000.masks.npy` (M, H, W) bool.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from bisect import bisect_right
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.data.rows import features
from zoo.errors import ZooError

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 2
INDEX = "store.json"
OPEN = 128  # blocks of one kind that are mapped at once: each takes a file descriptor
SPLITS = ("train", "test")


def read_index(place: Path) -> dict[str, Any]:
    """The checked `store.json` of a store.

    Raises:
        ZooError: damaged, or of another format.
    """
    path, remedy = place / INDEX, f"remove {place}, then zoo data prepare DATA."
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ZooError(f"{path} is damaged; {remedy}") from error
    if version != FORMAT_VERSION:
        raise ZooError(f"{path} has format version {version}, not {FORMAT_VERSION}; {remedy}")
    if index.pop("sha256", None) != digest(index):
        raise ZooError(f"{path} is damaged; {remedy}")
    return index


def left_out(index: dict[str, Any]) -> list[list[str]]:
    """[name, reason] of each image that can't be read."""
    return [broken for block in blocks_of(index) for broken in block["broken"]]


def load_store(place: Path) -> datasets.DatasetDict:
    """A store as a data set: splits train and test, columns image, mask, label, path; pixels are read on use.

    Raises:
        ZooError: a damaged index; when a block is read, one whose hash differs from the index.
    """
    import datasets

    index = read_index(place)
    splits, columns_of = {}, features(datasets.Value("int64"))
    for split in SPLITS:
        blocks = index["blocks"][split]
        columns: dict[str, list] = {"mask": [], "label": [], "path": []}
        masks = 0  # of the blocks before
        for block in blocks:
            columns["mask"] += [None if number is None else masks + number for number in block["masks"]]
            columns["label"] += block["labels"]
            columns["path"] += block["paths"]
            masks += _masks(block)
        columns["image"] = list(range(len(columns["path"])))
        rows = _Rows(_Stack(place, split, blocks, "npy"), _Stack(place, split, blocks, "masks.npy"))
        splits[split] = datasets.Dataset.from_dict(columns, features=columns_of).with_transform(rows)
    return datasets.DatasetDict(splits)


def blocks_of(index: dict[str, Any]) -> list[dict[str, Any]]:
    return [block for split in SPLITS for block in index["blocks"][split]]


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str | None:
    """SHA-256 of a file; None if there is none."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path, error) from error


def damaged(path: Path) -> ZooError:
    return ZooError(f"{path} is missing or damaged; remove {path.parent}, then zoo data prepare DATA.")


def unreadable(path: Path, error: Exception) -> ZooError:
    return ZooError(f"{path} could not be read ({error}); check its permissions, the disk and ulimit -n.")


class _Rows:
    """The transform of the data set: numbers of images and masks -> arrays."""

    def __init__(self, images: _Stack, masks: _Stack):
        self.stacks = {"image": images, "mask": masks}

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        for column, stack in self.stacks.items():
            if column in batch:
                batch[column] = [None if number is None else stack[number] for number in batch[column]]
        return batch


class _Stack:
    """The arrays of all blocks of one kind, one after the other; each block is mapped and checked on first use."""

    def __init__(self, place: Path, split: str, blocks: list[dict[str, Any]], ending: str):
        names = [f"{split}-{i:05d}.{ending}" for i in range(len(blocks))]
        kept = [(name, block) for name, block in zip(names, blocks, strict=True) if name in block["sha256"]]
        self.paths = [place / name for name, _ in kept]
        self.hashes = [block["sha256"][name] for name, block in kept]
        counts = [_masks(block) if "masks" in ending else len(block["paths"]) for _, block in kept]
        self.starts = [0, *np.cumsum(counts).tolist()]
        self.maps: dict[int, np.ndarray] = {}
        # A byte a block, shared with forked workers: each epoch has new ones, which need not hash all again.
        self.checked = mmap.mmap(-1, max(len(kept), 1))

    def __getitem__(self, number: int) -> np.ndarray:
        block = bisect_right(self.starts, number) - 1
        if block not in self.maps:
            if len(self.maps) == OPEN:
                del self.maps[next(iter(self.maps))]
            self.maps[block] = self._map(block)
        return np.array(self.maps[block][number - self.starts[block]])

    def _map(self, block: int) -> np.ndarray:
        path = self.paths[block]
        if not self.checked[block]:
            if file_hash(path) != self.hashes[block]:
                raise damaged(path)
            self.checked[block] = 1
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise unreadable(path, error) from error

    def __getstate__(self) -> dict[str, Any]:
        """For another process: it maps the blocks itself."""
        return self.__dict__ | {"maps": {}, "checked": self.checked[:]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.checked = mmap.mmap(-1, len(state["checked"]))
        self.checked[:] = state["checked"]


def _masks(block: dict[str, Any]) -> int:
    return sum(number is not None for number in block["masks"])
