"""A test set in two halves: one to select on, one to report on, never the same."""

import hashlib
from collections import Counter, defaultdict

from datasets import Dataset, DatasetDict

from zoo.errors import ZooError

SEED = 0  # published: the same halves for everyone


def halves(labels: list[int], names: list[str], seed: int = SEED) -> tuple[list[int], list[int]]:
    """Rows of the validation half and of the reported half, stratified by label and kind of defect.

    Args:
        labels: 0 normal, 1 anomalous.
        names: unique, such as "test/scratch/3.png", of kind scratch. Their order does not matter; one that is missing
            moves one other image of its stratum at most.

    Returns:
        Two sorted lists of row numbers; of an odd number in a stratum the reported half has one more.
    """
    kinds = [kind_of(name) for name in names]
    sizes = Counter(kinds)
    strata = defaultdict(list)
    for row, (label, kind) in enumerate(zip(labels, kinds, strict=True)):
        strata[label, kind if sizes[kind] > 1 else ""].append(row)  # kinds of one image are pooled
    validation: list[int] = []
    for key in sorted(strata):
        rows = sorted(strata[key], key=lambda row: _draw(names[row], seed))
        validation += rows[: len(rows) // 2]
    chosen = set(validation)
    return sorted(validation), [row for row in range(len(names)) if row not in chosen]


def _draw(name: str, seed: int) -> bytes:
    """A number that depends on name and seed alone."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()


def kind_of(name: str) -> str:
    """The kind of defect that an image's name tells: "test/scratch/3.png" -> "scratch"; of MIIC the folder."""
    return name.removeprefix("test/").removeprefix("Anomaly_test/").split("/")[0]


def validation_half(data: DatasetDict, metric: str, seed: int = SEED) -> DatasetDict:
    """The training split, and the half of the test split that a selection by a metric may see.

    Raises:
        ZooError: that half lacks a class, or masks for a metric of pixels.
    """
    test = data["test"].select(_halves(data["test"], seed)[0])
    if len(set(test.with_format(None)["label"])) < 2:
        raise ZooError("--select METRIC needs two normal and two anomalous test images; take --select normal or last.")
    plain = test.with_format(None)
    unmasked = any(mask is None for mask, label in zip(plain["mask"], plain["label"], strict=True) if label)
    if unmasked and metric.startswith("pixel"):
        raise ZooError(f"--select {metric} needs masks of all defects; add them, or take --select image_ap.")
    return DatasetDict(train=data["train"], test=test)


def part_of_test(data: DatasetDict, part: str, seed: int = SEED) -> DatasetDict:
    """A part of the test split, without training images: `val`, `held_out` (no selection has seen it) or `full`.

    Raises:
        ZooError: a half that lacks a class.
    """
    test, none = data["test"], data["train"].select([])
    if part == "full":
        return DatasetDict(train=none, test=test)
    half = test.select(_halves(test, seed)[("val", "held_out").index(part)])
    if len(set(half.with_format(None)["label"])) < 2:
        raise ZooError("Halves of the test images need two normal and two anomalous ones; add some.")
    return DatasetDict(train=none, test=half)


def named_halves(test: Dataset, seed: int = SEED) -> dict[str, list[str]]:
    """The names of the test images in the halves `val` and `held_out`."""
    names = list(test.with_format(None)["path"])
    parts = zip(("val", "held_out"), _halves(test, seed), strict=True)
    return {part: [names[row] for row in rows] for part, rows in parts}


def _halves(test: Dataset, seed: int) -> tuple[list[int], list[int]]:
    plain = test.with_format(None)
    return halves(list(plain["label"]), list(plain["path"]), seed)
