"""How far metrics would move with other test images of the same kind: bootstrap intervals over images."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from zoo.errors import ZooError
from zoo.metrics import ranking

FINE, COARSE = 256, 64  # bins for each factor of e in rank, in the table of all images and in that of one
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
        An int64 array (n, 4) an image: key, negatives, positives, region weight (`zoo.metrics.ranking`), highest key
        first. Pixels of neighbouring ranks share a row, as `_bins` has it: a table of 512 x 512 pixels takes 18 kB.
    """
    masks = torch.zeros_like(maps, dtype=torch.bool) if masks is None else masks
    tables = []
    for i in range(len(maps)):
        map, mask, part = maps[i], masks[i], None if valid is None else valid[i]  # (1, H, W)
        empty = torch.zeros(0, 4, dtype=torch.int64, device=maps.device)
        rows, shift = ranking.add([empty], 0, map, mask, part, ranking.region_weights(mask, part))
        table = ranking.merge(torch.cat(rows), shift)[0].cpu().numpy()[::-1]  # (N, 4)
        starts = np.flatnonzero(np.diff(_bins(table[:, 1] + table[:, 2], COARSE), prepend=-1))
        middle = (starts + np.append(starts[1:], len(table))) // 2
        sums = np.add.reduceat(table[:, 1:], starts) if len(table) else table[:, 1:]
        tables.append(np.column_stack([table[middle, 0], sums]))
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

    An interval of a maximum (F1) lies somewhat high. Pixel metrics are those of `image_tables`, exact to some
    thousandths, where the draws themselves scatter by as much.

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
        ZooError: all images are of one class, or fewer than two draws.

    Source: Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13 (percentile intervals).
    """
    if replicates < 2:
        raise ZooError(f"A bootstrap needs at least 2 draws, not {replicates}.")
    labels = np.asarray(labels)
    if len(np.unique(labels)) < 2:
        raise ZooError("Intervals need both classes, normal and anomalous images.")
    keys = ranking.order_keys(torch.tensor(scores)).long().numpy()
    own = [np.array([[key, not label, label, 0]], dtype=np.int64) for key, label in zip(keys, labels, strict=True)]
    found = _resampled(own, _draws(labels, replicates, seed), IMAGE)
    if tables is not None:  # images without any pixel of a defect are a class of their own: no draw lacks such pixels
        classes = labels + np.array([table[:, 2].any() for table in tables])
        found |= _resampled(tables, _draws(classes, replicates, seed), PIXEL)
    ends = [(1 - level) / 2, (1 + level) / 2]
    return {name: np.quantile(values, ends).tolist() for name, values in found.items()}


def _bins(counts: np.ndarray, resolution: int) -> np.ndarray:
    """The bin (n,) of each distinct score, highest first, that has so many pixels: small at the top, ever wider below.

    Wide in rank, not in score, so that bins mean the same on any range. A few scores have a bin each.
    """
    if len(counts) <= 8 * resolution:
        return np.arange(len(counts))
    above = counts.cumsum() - counts  # pixels of higher scores
    return np.ceil(resolution * np.log1p(above / resolution)).astype(np.int64)


def _draws(classes: np.ndarray, replicates: int, seed: int) -> np.ndarray:
    """How often each image is drawn, (R, n)."""
    rng = np.random.default_rng(seed)
    drawn = np.zeros((replicates, len(classes)), np.int64)
    for kind in np.unique(classes):
        (rows,) = np.nonzero(classes == kind)
        drawn[:, rows] = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), replicates)
    return drawn


def _resampled(
    tables: Sequence[np.ndarray], drawn: np.ndarray, metrics: dict[str, Callable[[Tensor], float]]
) -> dict[str, list[float]]:
    """Each metric of each draw: the tables of the images that were drawn, added up."""
    rows = np.concatenate(tables)  # (N, 4)
    image = np.repeat(np.arange(len(tables)), [len(table) for table in tables])
    _, place = np.unique(-rows[:, 0], return_inverse=True)  # highest first
    counts = np.bincount(place, rows[:, 1] + rows[:, 2])
    column = np.unique(_bins(counts, FINE), return_inverse=True)[1][place]
    bins = column.max() + 1
    columns = [csr_array((rows[:, i], (image, column)), shape=(len(tables), bins)) for i in (1, 2, 3)]
    found: dict[str, list[float]] = {name: [] for name in metrics}
    step = max(CHUNK // (3 * bins), 1)
    for first in range(0, len(drawn), step):
        sums = np.stack([drawn[first : first + step] @ part for part in columns], -1)  # (r, bins, 3)
        for counts in sums:
            seen = counts.any(1)
            ranks = -np.flatnonzero(seen)  # keys: the first bin is the highest
            table = torch.from_numpy(np.column_stack([ranks, counts[seen]])[::-1].copy())  # (k, 4)
            for name, metric in metrics.items():
                found[name].append(metric(table))
    return found
