"""Ranking metrics from a table of bounded size: AUROC, average precision, F1, AUPRO and DFR's PRO.

A *rank table* is an int64 tensor (n, 4). A row is a distinct score: (key, negatives, positives, region weight), where
the key is the float32 score as a 32-bit integer of the same order. When there are more than MAX_KEYS distinct keys,
the low bit of every key is dropped (`shift` counts how often) until they fit. A part of the data never needs a larger
shift than the whole, and dropping one bit and then another is dropping two; so the merged table is a function of the
multiset of (score, target) alone, bit for bit, whatever the batches, their order or the number of processes.

Scores of any floating type are read as float32, NaN is refused, and -0.0 equals +0.0. Up to MAX_KEYS distinct scores
the result is exact. Beyond, scores that agree in all kept bits count as ties: of the 23 bits of mantissa 23 - shift
remain, which costs less than 1e-8 of AUROC and 1e-6 of average precision where the scores fill their range. The one
failing case: a narrow cluster of scores inside a spread of many decades; the spread uses up the keys, and the cluster
becomes one tie. A sigmoid makes such scores, the best in 1 - 1e-6 and the rest down to 1e-8 (average precision was off
by 0.002): rank the logits.
"""

import numpy as np
import torch
import torch.nn.functional as F
from skimage.measure import label
from torch import Tensor

from zoo.errors import ZooError

MAX_KEYS = 2**20  # rows of a merged table: 32 MiB
MAX_ROWS = MAX_KEYS + MAX_KEYS // 4  # rows that may wait in several tables before they are merged: 40 MiB
MAX_TABLES = 64  # tables that may wait
DENSE = 2**22  # possible keys that are counted in place: 32 MiB
CHUNK = 2**21  # scores that are sorted at once: bounds the memory in flight
REGION_WEIGHT = 2**40  # weight of one region, shared among its pixels, in fixed point: integer sums have no order
INFINITY_KEY = 0x7F800000  # the key of +inf; that of -inf is its complement; keys outside are NaN


def order_keys(scores: Tensor) -> Tensor:
    """Map float scores to int32 keys of the same order, any shape; -0.0 and +0.0 share the key 0."""
    bits = (scores.detach().float() + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def key_score(key: int) -> float:
    """Return the smallest float32 score whose key is at least `key`: the inverse of `order_keys`."""
    key = np.int32(max(int(key), ~INFINITY_KEY))
    return float((key ^ ((key >> 31) & np.int32(0x7FFFFFFF))).view(np.float32))


def _sort(keys: Tensor) -> Tensor:
    """Sorted int32 keys (n,); numpy's vectorised sort of values is many times faster than torch's on a CPU."""
    return keys.sort().values if keys.device.type != "cpu" else torch.from_numpy(np.sort(keys.numpy()))


def _select(scores: Tensor, where: Tensor) -> Tensor:
    """scores[where], (n,); again numpy's is many times faster on a CPU."""
    scores = scores.detach()
    if scores.device.type != "cpu" or scores.dtype == torch.bfloat16:  # numpy has no bfloat16
        return scores[where]
    return torch.from_numpy(scores.numpy()[where.numpy()])


def _order(keys: Tensor) -> Tensor:
    """Indices (n,) that sort int32 keys (n,), which come as a few sorted runs: numpy merges these in linear time."""
    if keys.device.type != "cpu":
        return keys.argsort(stable=True)
    return torch.from_numpy(np.argsort(keys.numpy(), kind="stable"))


def _changes(keys: Tensor, shift: int) -> tuple[Tensor, int]:
    """Where another key begins (n - 1,), in sorted ones, and the least shift >= `shift` that leaves MAX_KEYS at most.

    Neighbours x <= y stay distinct without their low s bits exactly when (x ^ y) >> s is not 0.
    """
    change = keys[1:] ^ keys[:-1]
    while torch.count_nonzero(change >> shift) >= MAX_KEYS:
        shift += 1
    return (change >> shift) != 0, shift


def _starts(changes: Tensor) -> Tensor:
    """Index of the first of each of the keys, (m,), where there is one at least."""
    return F.pad(changes.nonzero()[:, 0] + 1, (1, 0))


def merge(rows: Tensor, shift: int) -> tuple[Tensor, int]:
    """Merge rows of any number of tables, in any order, into one sorted table.

    Args:
        rows: int64 (n, 4), tables concatenated; each may have been built at a shift of its own.
        shift: the largest of these shifts.

    Returns:
        The table (m, 4), m <= MAX_KEYS, and its shift.
    """
    return merge_all([rows], shift)


def merge_all(tables: list[Tensor], shift: int) -> tuple[Tensor, int]:
    """`merge` of tables that are not concatenated first, which would take as much memory again."""
    keys = torch.cat([table[:, 0].to(torch.int32) for table in tables])  # (n,)
    if not len(keys):
        return tables[0], shift
    if len(tables) == 1 and len(keys) <= MAX_KEYS and (keys[1:] >> shift > keys[:-1] >> shift).all():
        if keys.equal(keys >> shift << shift):
            return tables[0], shift  # merged already
    order = _order(keys)
    keys = keys[order]
    changes, shift = _changes(keys, shift)
    slot = torch.empty(len(keys), dtype=torch.int32, device=keys.device)  # (n,) row of the merged table
    slot[order] = F.pad(changes.cumsum(0, dtype=torch.int32), (1, 0))
    del order
    keys = keys[_starts(changes)] >> shift << shift  # (m,)
    merged = torch.zeros(len(keys), 4, dtype=torch.int64, device=keys.device)
    merged[:, 0] = keys
    for table, places in zip(tables, slot.split([len(table) for table in tables]), strict=True):
        for part, place in zip(table.split(CHUNK), places.split(CHUNK), strict=True):
            merged[:, 1:].index_add_(0, place.long(), part[:, 1:])  # of int32 it is ten times slower
    return merged, shift


def compact(tables: list[Tensor], shift: int) -> tuple[list[Tensor], int]:
    """Merge a list of tables into one table as soon as they are too many or hold too many rows together."""
    if len(tables) <= MAX_TABLES and sum(map(len, tables)) <= MAX_ROWS:
        return tables, shift
    table, shift = merge_all(tables, shift)
    return [table], shift


def _count(scores: Tensor, column: int, weights: Tensor | None, shift: int) -> tuple[Tensor, int]:
    """Table of scores (n,) of one class, their counts in `column`, their region weights (n,) in column 3."""
    keys = order_keys(scores)
    if not len(keys):
        return torch.zeros(0, 4, dtype=torch.int64, device=scores.device), shift
    low, high = (int(key) for key in torch.aminmax(keys))
    if high > INFINITY_KEY or low < ~INFINITY_KEY:
        raise ZooError("Scores contain NaN and cannot be ranked; find the image or the training step that produced it.")
    low, high = low >> shift, high >> shift
    if high - low < DENSE:  # counting in place takes a third of the time of sorting
        counts = torch.bincount((keys >> shift) - low)
        ordered = counts.nonzero()[:, 0]
        counts, ordered = counts[ordered], (ordered + low).int() << shift
    else:
        ordered, counts = _sort(keys), None
    changes, shift = _changes(ordered, shift)
    starts = _starts(changes)  # (m,)
    distinct = ordered[starts] >> shift << shift
    before = starts if counts is None else F.pad(counts.cumsum(0), (1, 0))[starts]
    table = torch.zeros(len(distinct), 4, dtype=torch.int64, device=scores.device)
    table[:, 0] = distinct
    table[:, column] = F.pad(before, (0, 1), value=len(keys)).diff()
    if weights is not None:
        table[:, 3].index_add_(0, torch.searchsorted(distinct, keys >> shift << shift), weights)
    return table, shift


def add(
    tables: list[Tensor],
    shift: int,
    scores: Tensor,
    targets: Tensor,
    valid: Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[list[Tensor], int]:
    """Add scores to a list of tables; nothing is changed in place.

    Args:
        tables: at least one rank table (n_i, 4), on the device of the scores.
        shift: number of low bits dropped so far.
        scores: float, any shape; higher is more anomalous.
        targets: bool, shape of `scores`; True is abnormal.
        valid: bool, shape of `scores`; where it is False a score doesn't count.
        weights: int64 (p,), `region_weights` of the p valid abnormal scores in row-major order.

    Returns:
        The tables, at most MAX_ROWS rows together, and the shift.

    Raises:
        ZooError: a score that counts is NaN.
    """
    negatives = ~targets if valid is None else ~targets & valid
    positives = targets if valid is None else targets & valid
    for column, where in (1, negatives), (2, positives):
        chunks = _select(scores, where).split(CHUNK)  # of (n,)
        shares = [None] * len(chunks) if column == 1 or weights is None else weights.split(CHUNK)
        for chunk, share in zip(chunks, shares, strict=True):
            table, shift = _count(chunk, column, share, shift)
            tables, shift = compact([*tables, table], shift)
    return tables, shift


def region_weights(masks: Tensor, valid: Tensor | None = None) -> Tensor:
    """Weigh abnormal pixels so that each 8-connected region of each mask weighs the same, whatever its area.

    Args:
        masks: bool (B, H, W), True on defects.
        valid: bool (B, H, W). A region that it cuts stays one region, with the area that is left.

    Returns:
        int64 (p,): REGION_WEIGHT / area of its region, rounded, for each of the p valid pixels of the masks, row-major.
    """
    counts = masks if valid is None else masks & valid
    weights = [torch.zeros(0, dtype=torch.int64)]
    for mask, count in zip(masks.cpu().numpy(), counts.cpu().numpy(), strict=True):  # (H, W)
        if count.any():
            regions = label(mask, connectivity=2)[count]  # (p_i,)
            area = np.maximum(np.bincount(regions), 1)
            weights.append(torch.from_numpy(((REGION_WEIGHT + area // 2) // area)[regions]))
    return torch.cat(weights).to(masks.device)


def _descend(table: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Keys, false positives, true positives and region weight at score >= key, each (n,), from the highest key down."""
    key, negatives, positives, weight = table.cpu().numpy()[::-1].T  # views: a copy would be as large as the state
    for name, present in ("normal (negative)", negatives.any()), ("abnormal (positive)", positives.any()):
        if not present:
            raise ZooError(
                f"Ranking metrics need both classes, but no {name} image or pixel was given; "
                "evaluate on data that has both."
            )
    return key, negatives.cumsum(), positives.cumsum(), weight.cumsum()


def auroc(table: Tensor) -> float:
    """Area under the ROC curve of a merged table: P(s+ > s-) + P(s+ = s-) / 2.

    Raises:
        ZooError: one class only.

    Source: Fawcett, "An introduction to ROC analysis" (2006), section 7; ties count half.
    """
    _, fp, tp, _ = _descend(table)
    return float(np.trapezoid(np.append(0, tp) / tp[-1], np.append(0, fp) / fp[-1]))


def average_precision(table: Tensor) -> float:
    """Average precision of a merged table: sum over thresholds of (R_n - R_{n-1}) P_n, without interpolation.

    Raises:
        ZooError: one class only.

    Source: scikit-learn's `average_precision_score`, the number that the field reports as AP or AUPR.
    """
    _, fp, tp, _ = _descend(table)
    return float(np.sum(np.diff(tp, prepend=0) / tp[-1] * (tp / (tp + fp))))


def f1_max(table: Tensor) -> tuple[float, float]:
    """Largest F1 over all distinct thresholds t of the prediction score >= t, and that t.

    The threshold is chosen on the scores that it is judged on, so this is an upper bound, not an operating point.

    Raises:
        ZooError: one class only.
    """
    key, fp, tp, _ = _descend(table)
    f1 = 2 * tp / (tp + fp + tp[-1])
    best = int(f1.argmax())
    return float(f1[best]), key_score(key[best])


def f1_at(table: Tensor, threshold: float) -> float:
    """F1 of the prediction score >= threshold, a threshold that was chosen elsewhere.

    Raises:
        ZooError: one class only.
    """
    key, fp, tp, _ = _descend(table)
    called = int(np.count_nonzero(key >= int(order_keys(torch.tensor(threshold)))))  # rows
    return float(2 * tp[called - 1] / (tp[called - 1] + fp[called - 1] + tp[-1])) if called else 0.0


def aupro(table: Tensor, limit: float = 0.3) -> float:
    """Normalised area under the per-region overlap curve up to a false-positive rate.

    The per-region overlap is the mean over regions of the part of a region that is found; the false-positive rate is
    over all normal pixels. Both are exact at every distinct threshold and linear in between.

    Args:
        table: merged table whose abnormal pixels carry `region_weights`.
        limit: false-positive rate in (0, 1] where the area ends.

    Raises:
        ZooError: one class only, or a limit outside (0, 1].

    Source: Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 2021), section 5.2.
    """
    if not 0 < limit <= 1:
        raise ZooError(f"AUPRO's limit is a false-positive rate in (0, 1], not {limit}.")
    _, fp, _, weight = _descend(table)
    fpr = np.append(0, fp) / fp[-1]  # (n + 1,)
    pro = np.append(0, weight) / weight[-1]
    end = int(np.searchsorted(fpr, limit, side="right"))  # points before it have fpr <= limit
    if end < len(fpr):
        pro_limit = pro[end - 1] + (pro[end] - pro[end - 1]) * (limit - fpr[end - 1]) / (fpr[end] - fpr[end - 1])
        fpr, pro = np.append(fpr[:end], limit), np.append(pro[:end], pro_limit)
    return float(np.trapezoid(pro, fpr) / limit)


def pro_dfr200(table: Tensor, steps: int = 200, limit: float = 0.3) -> float:
    """The per-region overlap of DFR's recipe, under its own name: neither exact nor comparable with `aupro`.

    Of thresholds equally spaced from the highest score down to the lowest, those with a false-positive rate of at most
    `limit` are kept; then overlap and rate are each stretched to [0, 1] before the area is taken. Stretching divides by
    the overlap at the cut, and of heavy-tailed scores few thresholds are kept, so the number depends on the scale of
    the scores. Much code computes it, with 200 steps or more, and calls it PRO.

    Args:
        table: merged table whose abnormal pixels carry `region_weights`.
        steps: thresholds.
        limit: false-positive rate.

    Returns:
        The area, or NaN where the recipe divides by zero: all kept thresholds have one rate or one overlap.

    Raises:
        ZooError: one class only.

    Source: Yang et al., "DFR: Deep Feature Reconstruction" (2020), its code; score > threshold, as there.
    """
    key, fp, _, weight = _descend(table)
    clipped = np.clip(key, ~INFINITY_KEY, INFINITY_KEY).astype(np.int32)
    scores = (clipped ^ ((clipped >> 31) & np.int32(0x7FFFFFFF))).view(np.float32).astype(np.float64)  # descending
    thresholds = scores[0] - np.arange(steps) * ((scores[0] - scores[-1]) / steps)
    called = np.searchsorted(-scores, -thresholds)  # (steps,) rows with score > threshold
    fpr, pro = (np.append(0, sums)[called] / sums[-1] for sums in (fp, weight))
    fpr, pro = fpr[fpr <= limit], pro[fpr <= limit]
    if not np.ptp(fpr) or not np.ptp(pro):
        return float("nan")
    fpr, pro = ((values - values.min()) / np.ptp(values) for values in (fpr, pro))
    return float(np.trapezoid(pro, fpr))
