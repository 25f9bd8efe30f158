"""The columns of a data set, and a row decoded; without torch, so that preparing a store starts at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.errors import ZooError
from zoo.image import read_image, read_mask

if TYPE_CHECKING:
    import datasets

LABELS = ["normal", "anomalous"]


def features(image: Any = None, **more: Any) -> datasets.Features:
    """The columns image, mask, label and path.

    Args:
        image: feature of an image and of its mask; None for files that stay encoded.
        more: further columns.
    """
    import datasets

    image = datasets.Image(decode=False) if image is None else image
    label, path = datasets.ClassLabel(names=LABELS), datasets.Value("string")
    return datasets.Features(image=image, mask=image, label=label, path=path, **more)


def read_row(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Image (H, W) or (H, W, 3), mask (H, W) bool or None, and name of a row.

    Raises:
        ZooError: it can't be read, or the two differ in size.
    """
    image = read_image(row["image"])
    mask = None if row["mask"] is None else read_mask(row["mask"])
    if mask is not None and mask.shape != image.shape[:2]:
        raise ZooError(
            f"The mask of {row['path']} has another size than its image ({mask.shape} against {image.shape[:2]}); "
            "redraw it."
        )
    return image, mask, row["path"]
