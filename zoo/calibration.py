"""From the scores of normal images to thresholds with a stated false-alarm rate, verdicts and p-values.

A calibrated threshold lies just above an order statistic of n normal images that nothing has learned from (Wilks,
"Determination of sample sizes for setting tolerance limits", Ann. Math. Stat. 12, 1941). If more than a share `rate` of
all normal images lay above it, then so few of n would do so with a probability of at most 5 %, whatever the
distribution of the scores, ties included. It takes images that are drawn independently, as later ones will be, and that
differ: of copies, pixel by pixel, one counts.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from functools import cache
from typing import Any, get_type_hints

from zoo.errors import ZooError
from zoo.forms import Precision, misfit, quoted

CONFIDENCE = 0.95  # that the true rate is at most the stated one
FLOAT32_MAX = 3.4028234663852886e38  # maps are float32


class TooFewNormals(ZooError):
    """Normal images that don't support a rate."""


@dataclass(frozen=True)
class Calibration:
    """What a model knows of normal images that it was not fitted on.

    Attributes:
        scores: their image scores, ascending.
        image_threshold: a score at or above it is called anomalous.
        pixel_threshold: the same for one pixel of the map; also the middle of the colour scale.
        pixel_median: of all their maps; the lower end of the colour scale.
        calibrated: False for the default thresholds of a fit, which state no false-alarm rate.
        false_alarm_rate: with `confidence`, at most this share of normal images is called anomalous, and at most this
            share has a region; the two may be other images. None until calibrated.
        confidence: see there.
        levels: of their maps, ascending (`zoo.regions.region_level`); empty until calibrated.
        min_area: pixels that a region has at least.
        precision: that they were scored in; None until calibrated.
        sizes: (height, width) of the images, without info bars, where they are few; else empty.

    Raises:
        ValueError: values that no calibration gives.
    """

    scores: list[float]
    image_threshold: float
    pixel_threshold: float
    pixel_median: float
    calibrated: bool = False
    false_alarm_rate: float | None = None
    confidence: float = CONFIDENCE
    levels: list[float] = field(default_factory=list)
    min_area: int = 1
    precision: Precision | None = None
    sizes: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self):
        for name, kind in _kinds().items():
            if wrong := misfit(getattr(self, name), kind):
                raise ValueError(f"{name} is of the wrong kind{f' ({wrong})' * (wrong != 'it')}")
        numbers = [*self.scores, *self.levels, self.image_threshold, self.pixel_threshold, self.pixel_median]
        if not all(-FLOAT32_MAX <= number < FLOAT32_MAX for number in numbers):
            raise ValueError("a score, level or threshold that is not finite or beyond float32")
        if self.scores != sorted(self.scores) or self.levels != sorted(self.levels):
            raise ValueError("scores and levels are ascending")
        if not (0 < self.confidence < 1 and 0 < (0.5 if self.false_alarm_rate is None else self.false_alarm_rate) < 1):
            raise ValueError("false_alarm_rate and confidence are shares between 0 and 1")
        if self.min_area < 1 or any(side < 1 for size in self.sizes for side in size):
            raise ValueError("min_area and sizes are at least 1 pixel")
        if self.calibrated and (self.false_alarm_rate is None or not 0 < len(self.scores) == len(self.levels)):
            raise ValueError("a calibration has a rate, and a level for each score")

    def above(self, score: float) -> int:
        """How many of the normals score at least as high."""
        return _at_least(self.scores, score)

    def p_value(self, score: float) -> float:
        """(1 + number of normals that score at least as high) / (n + 1), in (0, 1]."""
        return (1 + self.above(score)) / (len(self.scores) + 1)

    def region_p_value(self, level: float) -> float:
        """The same of a region, by the normals that have any region of such a level: it allows for looking anywhere."""
        return (1 + _at_least(self.levels, level)) / (len(self.levels) + 1)

    def in_words(self, score: float) -> str:
        """How many normals score at least as high; where none does, what n of them can tell."""
        n, above = len(self.scores), self.above(score)
        return f"{f'{above:,} of {n:,}' if above else f'fewer than 1 in {n + 1:,}'} normal images score as high"

    def promise(self) -> str:
        """The stated rate in words, once calibrated."""
        share, sure, n = 100 * self.false_alarm_rate, 100 * self.confidence, len(self.scores)
        return f"at most {share:.4g} % of normal images, with {sure:.4g} % confidence, from {n:,} normals"

    def at_rate(self, rate: float) -> "Calibration":
        """The calibration for another rate, from the scores and levels that it holds.

        Raises:
            ZooError: a rate that so few normals can't support.
        """
        image, pixel = (threshold(values, rate) for values in (self.scores, self.levels))
        stated = {"calibrated": True, "false_alarm_rate": rate, "confidence": CONFIDENCE}
        return replace(self, image_threshold=image, pixel_threshold=pixel, **stated)

    def to_dict(self) -> dict:
        return asdict(self)


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(Calibration)


def stored(values: dict[str, Any]) -> Calibration:
    """The calibration that `to_dict` gave; models of before have fewer keys.

    Raises:
        ValueError: unknown or missing keys, values that no calibration gives.
    """
    known = {each.name: each.default is MISSING and each.default_factory is MISSING for each in fields(Calibration)}
    if unknown := values.keys() - known:
        raise ValueError(f"calibration {quoted(min(unknown))} is unknown")
    if missing := [name for name, is_needed in known.items() if is_needed and name not in values]:
        raise ValueError(f"calibration {missing[0]!r} is missing")
    return Calibration(**values)


def default_calibration(scores: list[float], pixel_threshold: float, pixel_median: float) -> Calibration:
    """Thresholds of a fit, not calibrated: at most 1 % of the held-out images reach the image threshold.

    Below 100 held-out images none does: it lies just above their maximum.
    """
    scores = sorted(scores)
    threshold = math.nextafter(scores[-1 - len(scores) // 100], math.inf)
    return Calibration(scores, threshold, pixel_threshold, pixel_median)


def calibrated(
    scores: Sequence[float], levels: Sequence[float], rate: float, pixel_median: float, min_area: int, precision: str
) -> Calibration:
    """Thresholds that hold a stated false-alarm rate; the arguments are as in `Calibration`, in any order.

    Raises:
        ZooError: a rate that so few normals can't support.
    """
    known = Calibration(sorted(scores), 0.0, 0.0, pixel_median, levels=sorted(levels), min_area=min_area)
    return replace(known, precision=precision).at_rate(rate)


def restored(values: dict[str, Any] | None) -> Calibration:
    """The calibration that a model's `config.json` holds.

    Raises:
        ZooError: there is none with a rate, and so no levels to take another one from.
    """
    if not (values and values.get("calibrated")):
        raise ZooError("This model was never calibrated; give it normal images with --data DATA.")
    try:
        return stored(values)
    except ValueError as error:
        raise ZooError(f"The model's calibration is of the wrong kind ({error}); calibrate it anew.") from error


def check_stated(known: Calibration | None, precision: str, name: str) -> None:
    """Whether a model states a rate for scores in this precision.

    Raises:
        ZooError: it doesn't, with what to do.
    """
    if known is None or not known.calibrated:
        raise ZooError(
            f"{name} states no false-alarm rate that images could be held against; calibrate it first: "
            f"zoo calibrate {name} --data DATA --false-alarm-rate 0.01."
        )
    if known.precision != precision:
        raise ZooError(
            f"The rate was stated in {known.precision}, and scores in {precision} tell nothing of it; leave "
            "--precision out, or calibrate anew with it."
        )


def threshold(values: Sequence[float], rate: float) -> float:
    """Such that with 95 % confidence at most a share `rate` of the population lies at or above it.

    Args:
        values: float32 numbers of normal images, ascending.

    Raises:
        ZooError: a rate that so few can't support.
    """
    check_normals(len(values), rate)
    return just_above(values[-1 - allowed_above(len(values), rate)])


def check_normals(n: int, rate: float) -> None:
    """Whether n normals support a rate.

    Raises:
        TooFewNormals: they don't, with the rate that they do support and the number that this one takes.
    """
    if allowed_above(n, rate) < 0:
        are, least = "is 1" if n == 1 else f"are {n:,}", supported_rate(n)
        raise TooFewNormals(
            f"A false-alarm rate of {rate:g} takes {normals_needed(rate):,} normal images, and there {are}: "
            f"give more, or take --false-alarm-rate {least:g}, the lowest for so many."
        )


def allowed_above(n: int, rate: float) -> int:
    """The largest m with P(Bin(n, rate) <= m) <= 5 %: so many of n may lie above a threshold; -1 where n is too few."""
    import numpy as np
    from scipy.special import bdtr

    if n < normals_needed(rate):
        return -1
    return int(np.count_nonzero(bdtr(np.arange(n + 1), n, rate) <= 1 - CONFIDENCE)) - 1


def supported_rate(n: int) -> float:
    """The smallest rate that n normals support, 1 - 0.05^(1/n), rounded up to three digits."""
    rate = -math.expm1(math.log1p(-CONFIDENCE) / n)
    digits = 2 - math.floor(math.log10(rate))
    return math.ceil(rate * 10**digits) / 10**digits


def normals_needed(rate: float) -> int:
    """The fewest normals that support a rate."""
    least = math.log1p(-CONFIDENCE) / math.log1p(-rate)  # (1 - rate)^n = 5 %
    near = round(least)
    return max(1, near if math.isclose(least, near, rel_tol=1e-12) else math.ceil(least))


def check_rate(rate: float) -> float:
    """The rate, if it is one.

    Raises:
        ZooError: it isn't.
    """
    if not 0 < rate < 1:
        raise ZooError(f"--false-alarm-rate is a share between 0 and 1, such as 0.01 for 1 %, not {rate:g}.")
    return rate


def just_above(value: float) -> float:
    """The next float32, for maps are float32 and would meet a next float64 as the value itself."""
    import numpy as np

    return float(np.nextafter(np.float32(value), np.float32(np.inf)))


def _at_least(ascending: Sequence[float], value: float) -> int:
    return len(ascending) - bisect_left(ascending, value)
