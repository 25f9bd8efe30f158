"""Whether two samples come from one distribution: numbers, vectors, and several such tests at once."""

from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist

COMPONENTS = 32  # principal components of the features that are compared
PERMUTATIONS = 2999  # the smallest p-value is 1 in 3,000: far enough below a seventh of half a percent
LARGEST = 1000  # vectors of a sample, for the matrix of their distances


def energy_test(a: np.ndarray, b: np.ndarray, seed: int = 0) -> float:
    """p-value of two samples of vectors being from one distribution, by their energy distance and permutations.

    The distance (Szekely and Rizzo, "Testing for equal distributions in high dimension", InterStat 5, 2004) is taken
    between the whitened principal components of both samples together. These don't know which vector is of which
    sample, so that the test keeps its level for any number of vectors and channels; of components that are fitted to
    one sample alone the other one would seem to lie farther out.

    Args:
        a, b: (n, D) and (m, D); of more than `LARGEST` so many are drawn.
        seed: of the permutations.

    Returns:
        (1 + number of permutations of at least that distance) / (1 + `PERMUTATIONS`).
    """
    rng = np.random.default_rng(seed)
    a, b = (rows[np.sort(rng.permutation(len(rows))[:LARGEST])].astype(np.float64) for rows in (a, b))
    points = whitened(np.concatenate([a, b]))
    distances = cdist(points, points).astype(np.float32)  # (N, N)
    n, m = len(a), len(b)
    labels = np.repeat(np.float32([0, 1]), (n, m))
    sides = np.concatenate([labels[None], rng.permuted(np.tile(labels, (PERMUTATIONS, 1)), axis=1)])  # (P + 1, N)
    all_sums = distances.sum(1, dtype=np.float64)  # (N,)
    within_b = np.einsum("pn,pn->p", sides @ distances, sides, dtype=np.float64)
    to_b = sides @ all_sums  # from all to b
    between = to_b - within_b
    within_a = all_sums.sum() - to_b - between
    energy = 2 * between / (n * m) - within_a / n**2 - within_b / m**2  # (P + 1,)
    return float(np.mean(energy >= energy[0] - 1e-6 * distances.mean()))  # but for rounding


def whitened(points: np.ndarray, components: int = COMPONENTS) -> np.ndarray:
    """The first principal components (N, k) of standardised vectors (N, D), each of unit variance."""
    points = points - points.mean(0)
    spread = points.std(0)
    varied = spread > 1e-6 * spread.max()
    if not varied.any():
        return points[:, :1]
    left, sizes, _ = np.linalg.svd(points[:, varied] / spread[varied], full_matrices=False)
    kept = np.flatnonzero(sizes[:components] > 1e-3 * sizes[0])
    return left[:, kept] * np.sqrt(len(points))


def holm(p_values: Sequence[float]) -> np.ndarray:
    """p-values adjusted for there being several: rejecting those below a level errs, in any of them, at that level.

    Holm, "A simple sequentially rejective multiple test procedure", Scand. J. Stat. 6, 1979.
    """
    order = np.argsort(p_values)
    raised = np.asarray(p_values, float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(np.maximum.accumulate(raised), 1)
    return adjusted
