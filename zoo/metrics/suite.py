"""All metrics of an evaluation, from one pass over its scores."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zoo.metrics import ranking
from zoo.metrics.curves import RankMetric, as_masks


class AnomalyMetrics(RankMetric):
    """Image and pixel metrics of a test set, the numbers of every record, table and card.

    All pixels of all images are pooled, normal images included, at the size that they are given in. The four pixel
    metrics share one rank table, so each pixel is sorted once. Memory doesn't grow with the number of images.
    """

    def __init__(self) -> None:
        super().__init__("image", "pixel")
        self.add_state("unmasked", torch.tensor(0), dist_reduce_fx="max")  # 1: an abnormal image came without a mask

    def update(
        self,
        scores_image: Tensor,
        scores_map: Tensor,
        label: Tensor,
        mask: Tensor | None = None,
        roi: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            scores_image: float (B,), any range; higher is more anomalous.
            scores_map: float (B, 1, H, W), any range; H and W may differ between updates.
            label: bool or int (B,); nonzero is abnormal.
            mask: bool (B, 1, H, W), True on defects. None stands for empty masks if the batch is normal; if it is not,
                pixel metrics are no longer possible.
            roi: bool (B, 1, H, W), region of interest; pixels outside don't count. Image scores are taken as they are.

        Raises:
            ZooError: shapes differ, or a score that counts is NaN.
        """
        labels, _ = as_masks(scores_image, label, None)
        self._add("image", scores_image, labels, None)
        if mask is None and labels.any():
            self.unmasked = torch.ones_like(self.unmasked)
            return
        mask = torch.zeros_like(scores_map, dtype=torch.bool) if mask is None else mask
        masks, valid = as_masks(scores_map, mask, roi)
        maps, masks, valid = scores_map[:, 0], masks[:, 0], None if valid is None else valid[:, 0]  # (B, H, W)
        self._add("pixel", maps, masks, valid, ranking.region_weights(masks, valid))

    def update_all(self, batches: Sequence[tuple[Tensor | None, ...]]) -> None:
        """Add batches, each as the arguments of `update`: those of one size together, as a GPU is asked less often."""
        alike: dict[Any, list[tuple[Tensor | None, ...]]] = {}
        for batch in batches:
            _, maps, _, mask, roi = batch
            alike.setdefault((maps.shape[1:], mask is None, roi is None), []).append(batch)
        for some in alike.values():
            self.update(*(None if parts[0] is None else torch.cat(parts) for parts in zip(*some, strict=True)))

    def compute(self) -> dict[str, float]:
        """Return the metrics by name, each in [0, 1].

        The pixel metrics are left out if an abnormal image came without a mask, or no abnormal pixel was seen.

        Raises:
            ZooError: all images are of one class.
        """
        metrics = self._level("image", self._table("image"))
        pixels = self._table("pixel")
        if not self.unmasked and pixels[:, 2].any():
            metrics |= self._level("pixel", pixels) | {"pixel_aupro": ranking.aupro(pixels)}
        return metrics

    def thresholds(self) -> dict[str, float]:
        """The threshold of the highest F1, by level: `image` and, where there are pixel metrics, `pixel`.

        Raises:
            ZooError: all images are of one class.
        """
        return {level: ranking.f1_max(table)[1] for level, table in self._measurable().items()}

    def further(self, thresholds: dict[str, float]) -> dict[str, float]:
        """Metrics that are offered under names of their own beside those of `compute`.

        Args:
            thresholds: by level, as `thresholds` gave them on other images; {} for none.

        Returns:
            `image_f1_at_val` and `pixel_f1_at_val` (F1 of score >= threshold), and `pixel_pro_dfr200`; left out is
            what can't be measured.

        Raises:
            ZooError: all images are of one class.
        """
        tables = self._measurable()
        found = {f"{k}_f1_at_val": ranking.f1_at(tables[k], t) for k, t in thresholds.items() if k in tables}
        if "pixel" in tables and not math.isnan(pro := ranking.pro_dfr200(tables["pixel"])):
            found["pixel_pro_dfr200"] = pro
        return found

    def _measurable(self) -> dict[str, Tensor]:
        """The merged tables of all processes, of the levels that can be measured."""
        with self.sync_context():
            tables = {"image": self._table("image"), "pixel": self._table("pixel")}
            if self.unmasked or not tables["pixel"][:, 2].any():
                del tables["pixel"]
        return tables

    @staticmethod
    def _level(level: str, table: Tensor) -> dict[str, float]:
        return {
            f"{level}_auroc": ranking.auroc(table),
            f"{level}_f1_max": ranking.f1_max(table)[0],
            f"{level}_ap": ranking.average_precision(table),
        }
