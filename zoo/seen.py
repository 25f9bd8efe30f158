"""Which images a model has learned from or was chosen by, known again by their pixels under any name and in any place.

A fit notes them in `private/seen.csv`: role, name, and a digest of the decoded pixels above the info bar. An image that
was written anew without loss keeps its digest; one that was resized or compressed anew doesn't.
"""

import csv
import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from rich.progress import track

from zoo import ranks
from zoo.checkpoint import csv_text
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.loader import EpochLoader
from zoo.errors import ZooError
from zoo.image import read_image
from zoo.view import View

FILE = "seen.csv"
LEARNED, CHOSEN, HELD_OUT = "fit", "selection", "held out"  # the last ones had no say in the weights
BATCH = 32  # images that are read at once


class Seen(NamedTuple):
    """What had a say in the weights of a model: names in the fit's own data, and digests."""

    names: set[str]
    digests: set[str]


def digest(image: np.ndarray) -> str:
    """BLAKE2b (128 bits, hex) of an image's size, type and pixels; grey that is stored as colour counts as grey.

    Args:
        image: (H, W) or (H, W, 3), as `zoo.image.read_image` gives it.
    """
    if image.ndim == 3 and (image == image[..., :1]).all():
        image = image[..., 0]
    found = hashlib.blake2b(f"{image.shape} {image.dtype}".encode(), digest_size=16)
    found.update(np.ascontiguousarray(image))
    return found.hexdigest()


def digests(rows: Dataset, view: View, num_workers: int = 0, progress: bool = False) -> list[str]:
    """The digest of each row's image as the view cuts it, "" where it can't be read; processes share the work."""
    loader = EpochLoader(_Digests(rows, view), BATCH, list, num_workers=num_workers)
    batches = track(loader, "Reading images", disable=not progress)
    return ranks.gather_list([found for batch in batches for found in batch])


def note(
    module: AnomalyDataModule, select: str | None, pairs: Iterable[tuple[Any, Any]] = (), progress: bool = False
) -> str:
    """What a fit notes of the images that it has seen, as the text of a CSV file.

    Args:
        module: the fit's own; its test split is what a metric has chosen by, or empty.
        select: rule by which a step was kept; `normal` has looked at the held-out images.
        pairs: of abnormal and clean images, which were learned from too.
    """
    held = CHOSEN if select == "normal" else HELD_OUT
    lines = []
    for role, rows in ((LEARNED, module.train_set), (CHOSEN, module.test_set), (held, module.holdout_set)):
        names = rows.with_format(None)["path"]
        found = digests(rows, module.view, module.num_workers, progress)
        lines += [(role, name, image) for name, image in zip(names, found, strict=True)]
    for source in (source for pair in pairs for source in pair):
        lines.append((LEARNED, "", digest(module.view.without_bar(read_image(source), source))))
    return csv_text(["role", "image", "digest"], lines)


def read_seen(folder: Path) -> Seen | None:
    """What the fit of a model has noted; None where it hasn't, or the model came without what is private.

    Raises:
        ZooError: a file of another kind.
    """
    path = folder / "private" / FILE
    if not path.is_file():
        return None
    try:
        with open(path, encoding="utf-8", newline="") as file:
            used = [line for line in csv.DictReader(file) if line["role"] != HELD_OUT]
        return Seen({line["image"] for line in used} - {""}, {line["digest"] for line in used} - {""})
    except (OSError, UnicodeDecodeError, KeyError, csv.Error) as error:
        raise ZooError(f"{path} can't be read ({error}); fit the model anew.") from error


class _Digests(torch.utils.data.Dataset):
    """Rows of a `datasets` object -> digests."""

    def __init__(self, rows: Dataset, view: View):
        self.rows, self.view = rows, view

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> list[str]:
        return [self._digest(source) for source in self.rows[indices]["image"]]

    def _digest(self, source: Any) -> str:
        try:
            return digest(self.view.without_bar(read_image(source), source))
        except ZooError:  # nothing can be learned from it either
            return ""
