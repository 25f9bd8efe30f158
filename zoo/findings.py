"""What the two questions of a check find: images that reach a threshold, and quantities that have shifted."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from zoo.calibration import CONFIDENCE, Calibration
from zoo.looks import FACTS
from zoo.reference import Reference, as_kept
from zoo.twosample import energy_test, holm

LEVEL = 0.01  # at most this share of checks says otherwise where nothing has changed: three or four a year at one a day


class Exceedance(NamedTuple):
    """How many recent images reach a threshold.

    Attributes:
        what: what they are then, as it follows "is" or "are".
        count, images: so many of so many.
        p_value: of as many, if the true rate were the stated one; adjusted for there being two thresholds.
        upper: the true rate is at most this, with 95 % confidence (Clopper and Pearson, Biometrika 26, 1934).
    """

    what: str
    count: int
    images: int
    p_value: float
    upper: float

    @property
    def found(self) -> bool:
        return self.p_value < LEVEL / 2

    def in_words(self) -> str:
        verb = "is" if self.count == 1 else "are"
        return f"{self.count:,} of {self.images:,} recent normal images {verb} {self.what}"


class Shift(NamedTuple):
    """A quantity of recent images against the same of the calibrated ones.

    Attributes:
        what: scores, features or one of `zoo.looks.FACTS`.
        before, now: medians of calibrated and of recent images; None of features, which are many.
        p_value: of so different samples from one distribution, adjusted for the number of quantities.
    """

    what: str
    before: float | None
    now: float | None
    p_value: float

    @property
    def found(self) -> bool:
        return self.p_value < LEVEL / 2

    def in_words(self) -> str:
        if self.before is None:
            return "the features of the images have shifted"
        verb = "are" if self.what == "scores" else "is"
        change = (self.now - self.before) / max(abs(self.before), 1e-6)
        if abs(change) < 0.005:
            return f"{self.what} {verb} spread otherwise"
        share = self.what != "scores" and self.before > 1e-6  # scores have a unit of their own, and any zero
        size = f"{100 * abs(change):.0f} % " if share else ""
        return f"{self.what} {verb} {size}{'higher' if change > 0 else 'lower'}"


def exceedances_of(known: Calibration, scores: Sequence[float], levels: Sequence[float]) -> list[Exceedance]:
    """How many images reach the image threshold, and how many the map's, against the stated rate.

    The binomial tests are exact and of one side: the threshold promises at most the rate.
    """
    counts = [int(np.sum(np.asarray(scores) >= known.image_threshold))]
    counts += [int(np.sum(np.asarray(levels) >= known.pixel_threshold))]
    n, rate = len(scores), known.false_alarm_rate
    p_values = holm([stats.binomtest(count, n, rate, alternative="greater").pvalue for count in counts])
    uppers = [stats.binomtest(count, n, alternative="less").proportion_ci(CONFIDENCE).high for count in counts]
    found = zip(("called anomalous", "shown with a region"), counts, p_values.tolist(), uppers, strict=True)
    return [Exceedance(what, count, n, p_value, float(upper)) for what, count, p_value, upper in found]


def shifts_of(
    known: Calibration, reference: Reference | None, scores: Sequence[float], looks: np.ndarray
) -> list[Shift]:
    """Scores, facts and features of images against those of the calibrated ones, as far as these were kept.

    Numbers are compared by Kolmogorov's and Smirnov's test, which sees a wider spread as well as another median,
    features by `zoo.twosample.energy_test`.
    """
    found = [("scores", known.scores, scores)]
    if reference is not None:
        facts, features = as_kept(looks)
        found += [(what, reference.facts[:, i], facts[:, i]) for i, what in enumerate(FACTS)]
    p_values = [stats.ks_2samp(before, now).pvalue for _, before, now in found]
    medians = [(what, float(np.median(before)), float(np.median(now))) for what, before, now in found]
    if reference is not None and reference.features.shape[1]:
        p_values.append(energy_test(reference.features, features))
        medians.append(("features", None, None))
    return [Shift(*median, p_value) for median, p_value in zip(medians, holm(p_values).tolist(), strict=True)]
