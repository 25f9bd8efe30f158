"""A test set in two halves: one to select on, one to report on, never the same."""

from collections import defaultdict

import numpy as np
from datasets import Dataset, DatasetDict

from zoo.errors import ZooError

SEED = 0  # published: the same halves for everyone


def halves(labels: list[int], names: list[str], seed: int = SEED) -> tuple[list[int], list[int]]:
    """Rows of the validation half and of the reported half, stratified by label and kind of defect.

    Args:
        labels: 0 normal, 1 anomalous.
        names: unique; the folder of a name is its kind. Their order does not matter.

    Returns:
        Two sorted lists of row numbers; of an odd number in a stratum the reported half has one more.
    """
    strata = defaultdict(list)
    for row, (label, name) in enumerate(zip(labels, names, strict=True)):
        strata[label, name.rpartition("/")[0]].append(row)
    validation: list[int] = []
    for key in sorted(strata):
        rows = sorted(strata[key], key=lambda row: names[row])
        order = np.random.default_rng([seed, len(rows)]).permutation(len(rows))
        validation += [rows[i] for i in order[: len(rows) // 2]]
    chosen = set(validation)
    return sorted(validation), [row for row in range(len(names)) if row not in chosen]


def validation_half(data: DatasetDict, seed: int = SEED) -> DatasetDict:
    """The training split, and the half of the test split that a selection may see.

    Raises:
        ZooError: that half lacks a class.
    """
    test = data["test"].select(_halves(data["test"], seed)[0])
    if len(set(test.with_format(None)["label"])) < 2:
        raise ZooError("--select METRIC needs two normal and two anomalous test images; take --select normal or last.")
    return DatasetDict(train=data["train"], test=test)


def reported_half(data: DatasetDict, seed: int = SEED) -> DatasetDict:
    """The half of the test split that no selection has seen; no training images."""
    return DatasetDict(train=data["train"].select([]), test=data["test"].select(_halves(data["test"], seed)[1]))


def _halves(test: Dataset, seed: int) -> tuple[list[int], list[int]]:
    plain = test.with_format(None)
    return halves(list(plain["label"]), list(plain["path"]), seed)
