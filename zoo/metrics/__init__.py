"""Metrics on raw anomaly scores of any range, exact under any batching and any number of processes."""

from zoo.metrics.curves import AUPRO, AUROC, PRODFR200, AveragePrecision, F1Max
from zoo.metrics.suite import AnomalyMetrics

__all__ = ["AUPRO", "AUROC", "AnomalyMetrics", "AveragePrecision", "F1Max", "PRODFR200"]
