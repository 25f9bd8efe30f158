"""From the scores of held-out normal images to thresholds, verdicts and p-values."""

import math
from bisect import bisect_left
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Calibration:
    """What a model knows of normal images that it was not fitted on.

    Attributes:
        scores: their image scores, ascending.
        image_threshold: a score at or above it is called anomalous.
        pixel_threshold: the same for one pixel of the map; also the middle of the colour scale.
        pixel_median: of all their maps; the lower end of the colour scale.
        calibrated: False for the default thresholds of a fit, which state no false-alarm rate.
    """

    scores: list[float]
    image_threshold: float
    pixel_threshold: float
    pixel_median: float
    calibrated: bool = False

    def p_value(self, score: float) -> float:
        """(1 + number of normals that score at least as high) / (n + 1), in (0, 1]."""
        return (1 + len(self.scores) - bisect_left(self.scores, score)) / (len(self.scores) + 1)

    def to_dict(self) -> dict:
        return asdict(self)


def default_calibration(scores: list[float], pixel_threshold: float, pixel_median: float) -> Calibration:
    """Thresholds of a fit, not calibrated: at most 1 % of the held-out images reach the image threshold.

    Below 100 held-out images none does: it lies just above their maximum.
    """
    scores = sorted(scores)
    threshold = math.nextafter(scores[-1 - len(scores) // 100], math.inf)
    return Calibration(scores, threshold, pixel_threshold, pixel_median)
