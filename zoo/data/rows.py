"""A row of a data set, decoded; without torch, so that preparing a store starts at once."""

from typing import Any

import numpy as np

from zoo.errors import ZooError
from zoo.image import read_image, read_mask


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
