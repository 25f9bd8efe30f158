"""AUROC, average precision, F1-max, AUPRO and DFR's PRO as torchmetrics: a thin state around `zoo.metrics.ranking`."""

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from zoo.errors import ZooError
from zoo.metrics import ranking


class RankMetric(Metric):
    """Keeps one rank table a level and merges it exactly across batches, metrics and processes.

    The state of a level is a list of tables (n_i, 4) and the shift of their keys. The list is concatenated and not
    summed when processes meet, since rows of equal place are not rows of equal key; `compute` merges the rows.
    `forward` (not `update`) computes on its batch alone, which therefore must hold both classes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(self, *levels: str) -> None:
        super().__init__()
        self.levels = levels
        for level in levels:
            self.add_state(f"{level}_tables", [], dist_reduce_fx="cat")
            self.add_state(f"{level}_shift", torch.tensor(0), dist_reduce_fx="max")
        self.reset()

    def reset(self) -> None:
        """Forget all scores; an empty table stays, since a process with an empty list could not join a gather."""
        super().reset()
        for level in self.levels:
            getattr(self, f"{level}_tables").append(torch.zeros(0, 4, dtype=torch.int64, device=self.device))

    def _set(self, level: str, tables: list[Tensor], shift: int) -> None:
        setattr(self, f"{level}_tables", tables)
        setattr(self, f"{level}_shift", torch.tensor(shift, device=self.device))

    def _add(
        self, level: str, scores: Tensor, targets: Tensor, valid: Tensor | None, weights: Tensor | None = None
    ) -> None:
        tables, shift = getattr(self, f"{level}_tables"), int(getattr(self, f"{level}_shift"))
        self._set(level, *ranking.add(tables, shift, scores, targets, valid, weights))

    def _table(self, level: str) -> Tensor:
        """The merged table (n, 4), which becomes the state: a second one beside it would double the memory."""
        tables, shift = getattr(self, f"{level}_tables"), int(getattr(self, f"{level}_shift"))
        table, shift = ranking.merge_all([tables] if isinstance(tables, Tensor) else tables, shift)
        self._set(level, [table], shift)
        return table

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        """Keep the list short where torchmetrics joins two states (`forward`, `merge_state`)."""
        super()._reduce_states(incoming_state)
        self._computed = None  # torchmetrics would answer with what it computed before
        for level in self.levels:
            tables, shift = getattr(self, f"{level}_tables"), int(getattr(self, f"{level}_shift"))
            self._set(level, *ranking.compact(tables, shift))


def as_masks(scores: Tensor, targets: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Targets and valid as bool, after a check of the shapes."""
    for name, tensor in ("targets", targets), ("valid", valid):
        if tensor is not None and tensor.shape != scores.shape:
            shapes = f"{tuple(tensor.shape)} and {tuple(scores.shape)}"
            raise ZooError(f"The shapes of {name} and scores differ, {shapes}; resize them to the same size.")
    return targets.bool(), None if valid is None else valid.bool()


class _ScoreMetric(RankMetric):
    """A metric of scores and targets alone: AUROC, AveragePrecision and F1Max can share one state in a collection."""

    def __init__(self) -> None:
        super().__init__("score")

    def update(self, scores: Tensor, targets: Tensor, valid: Tensor | None = None) -> None:
        """Add scores.

        Args:
            scores: float, any shape and range, of images or pixels; higher is more anomalous.
            targets: bool or int of the same shape; nonzero is abnormal.
            valid: bool of the same shape; where it is False a score doesn't count (outside a region of interest).

        Raises:
            ZooError: shapes differ, or a score that counts is NaN.
        """
        self._add("score", scores, *as_masks(scores, targets, valid))


class AUROC(_ScoreMetric):
    """Area under the ROC curve, ties averaged, on raw scores of any range; `compute` raises ZooError on one class.

    Source: see `zoo.metrics.ranking.auroc`.
    """

    def compute(self) -> Tensor:
        return torch.tensor(ranking.auroc(self._table("score")), device=self.device)


class AveragePrecision(_ScoreMetric):
    """Average precision as scikit-learn defines it; `compute` raises ZooError on one class.

    Source: see `zoo.metrics.ranking.average_precision`.
    """

    def compute(self) -> Tensor:
        return torch.tensor(ranking.average_precision(self._table("score")), device=self.device)


class F1Max(_ScoreMetric):
    """F1 at the best threshold on the scores themselves, an upper bound; `compute` raises ZooError on one class.

    Source: see `zoo.metrics.ranking.f1_max`, which also returns the threshold.
    """

    def compute(self) -> Tensor:
        return torch.tensor(ranking.f1_max(self._table("score"))[0], device=self.device)


class _RegionMetric(RankMetric):
    """A metric of anomaly maps against the regions of masks: AUPRO and DFR's PRO."""

    def __init__(self) -> None:
        super().__init__("region")  # a name of its own: its state may never be taken for an AUROC's by a collection

    def update(self, scores: Tensor, targets: Tensor, valid: Tensor | None = None) -> None:
        """Add anomaly maps.

        Args:
            scores: float (B, H, W), maps of any range; sizes may differ between updates.
            targets: bool or int (B, H, W); nonzero is a defect.
            valid: bool (B, H, W); where it is False a pixel doesn't count. A region that it cuts stays one region.

        Raises:
            ZooError: not three dimensions, shapes differ, or a score that counts is NaN.
        """
        if scores.ndim != 3:
            name = type(self).__name__
            raise ZooError(f"{name} takes maps (B, H, W), not {tuple(scores.shape)}; drop the channel dimension.")
        masks, valid = as_masks(scores, targets, valid)
        self._add("region", scores, masks, valid, ranking.region_weights(masks, valid))


class AUPRO(_RegionMetric):
    """Area under the per-region overlap curve over all images, in 8-connected regions of equal weight.

    Args:
        limit: false-positive rate in (0, 1] where the area ends; the field uses 0.3.

    Source: Bergmann et al., "The MVTec Anomaly Detection Dataset" (IJCV 2021), section 5.2.
    """

    def __init__(self, limit: float = 0.3) -> None:
        super().__init__()
        self.limit = limit

    def compute(self) -> Tensor:
        return torch.tensor(ranking.aupro(self._table("region"), self.limit), device=self.device)


class PRODFR200(_RegionMetric):
    """DFR's PRO: 200 equally spaced thresholds, both axes stretched to [0, 1]; only for comparison with papers.

    NaN where that recipe divides by zero. Source: see `zoo.metrics.ranking.pro_dfr200`.
    """

    def compute(self) -> Tensor:
        return torch.tensor(ranking.pro_dfr200(self._table("region")), device=self.device)
