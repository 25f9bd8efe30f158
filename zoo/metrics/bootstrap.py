"""How far metrics would move with other test images of the same kind: bootstrap intervals over images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from zoo.errors import ZooError
from zoo.metrics import ranking

SHIFT = 16  # low bits of a pixel's score that its intervals do without: 8 significant bits remain
CHUNK = 2**24  # numbers of resampled tables that are held at once

IMAGE = {
    "image_auroc": ranking.auroc,
    "image_f1_max": lambda t: ranking.f1_max(t)[0],
    "image_ap": ranking.average_precision,
}
PIXEL = {
    "pixel_auroc": ranking.auroc,
    "pixel_f1_max": lambda table: ranking.f1_max(table)[0],
    "pixel_ap": ranking.average_precision,
    "pixel_aupro": ranking.aupro,
}


def image_tables(maps: Tensor, masks: Tensor | None, valid: Tensor | None) -> list[np.ndarray]:
    """A rank table of the pixels of each image, which `intervals` resamples.

    Args:
        maps: float (B, 1, H, W).
        masks: bool (B, 1, H, W), True on defects; None for images without any.
        valid: bool (B, 1, H, W); where it is False a pixel doesn't count. None: all count.

    Returns:
        An int64 array (n, 4) an image: key, negatives, positives, region weight (`zoo.metrics.ranking`); scores are
        rounded down to 8 significant bits, so that a table has some hundred rows.
    """
    masks = torch.zeros_like(maps, dtype=torch.bool) if masks is None else masks
    tables = []
    for i in range(len(maps)):
        map, mask, part = maps[i], masks[i], None if valid is None else valid[i]  # (1, H, W)
        empty = torch.zeros(0, 4, dtype=torch.int64, device=maps.device)
        rows, shift = ranking.add([empty], SHIFT, map, mask, part, ranking.region_weights(mask, part))
        tables.append(ranking.merge(torch.cat(rows), shift)[0].cpu().numpy())
    return tables


def intervals(
    labels: Sequence[int],
    scores: Sequence[float],
    tables: Sequence[np.ndarray] | None,
    replicates: int,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, list[float]]:
    """Percentile intervals of the metrics of a test set, by drawing as many images with replacement, class by class.

    The classes keep their sizes, so that no draw lacks one. Pixels follow their image: those of one image are not
    independent of each other.

    Args:
        labels: 0 normal, 1 anomalous, of n images.
        scores: of the images.
        tables: as `image_tables` gives them, in the same order; None leaves the pixel metrics out.
        replicates: how often images are drawn.
        seed: of the draws, which depend on nothing but it and the labels.
        level: share of the draws that an interval holds.

    Returns:
        [low, high] by metric.

    Raises:
        ZooError: all images are of one class, or less than two draws.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (percentile intervals).
    """
    if replicates < 2:
        raise ZooError(f"A bootstrap needs at least 2 draws, not {replicates}.")
    drawn = _draws(np.asarray(labels), replicates, seed)  # (R, n)
    keys = ranking.order_keys(torch.tensor(scores)).long().numpy()
    normal = np.asarray(labels) == 0
    own = [np.array([[key, n, not n, 0]], dtype=np.int64) for key, n in zip(keys, normal, strict=True)]
    found = _resampled(own, drawn, IMAGE)
    if tables is not None:
        found |= _resampled(tables, drawn, PIXEL)
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {name: np.quantile(values, ends).tolist() for name, values in found.items()}


def _draws(labels: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """How often each image is drawn, (R, n)."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros((replicates, len(labels)), np.int64)
    for label in (0, 1):
        (rows,) = np.nonzero(labels == label)
        if not len(rows):
            raise ZooError("Intervals need both classes, normal and anomalous images.")
        drawn[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), replicates)
    return drawn


def _resampled(
    tables: Sequence[np.ndarray], drawn: np.ndarray, metrics: dict[str, Callable[[Tensor], float]]
) -> dict[str, list[float]]:
    """Each metric of each draw: the tables of the images that were drawn, added up."""
    rows = np.concatenate(tables)  # (N, 4)
    keys, column = np.unique(rows[:, 0], return_inverse=True)
    image = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    columns = [csr_array((rows[:, i], (image, column)), shape=(len(tables), len(keys))) for i in (1, 2, 3)]
    found: dict[str, list[float]] = {name: [] for name in metrics}
    step = max(CHUNK // (3 * len(keys)), 1)
    for first in range(0, len(drawn), step):
        sums = np.stack([drawn[first : first + step] @ part for part in columns], -1)  # (r, keys, 3)
        for counts in sums:
            seen = counts.any(1)
            table = torch.from_numpy(np.column_stack([keys[seen], counts[seen]]))  # (k, 4)
            for name, metric in metrics.items():
                found[name].append(metric(table))
    return found
