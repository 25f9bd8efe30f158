"""What a result means, in words that need no statistics."""

from typing import Any

from zoo.calibration import Calibration
from zoo.module import AnomalyModule, Prediction

RARE = 0.05  # up to such a share of normal images


def rarity(known: Calibration, score: float) -> str:
    """How many of the normal images that it was calibrated on score as high."""
    n, above = len(known.scores), known.above(score)
    if not above:
        return f"None of {n:,} normal images scores this high."
    if above == n:
        return f"All {n:,} normal images score this high."
    if 3 * above > n:
        return f"{'Most' if 2 * above > n else 'Many'} normal images score this high ({above:,} of {n:,})."
    return f"About 1 in {n / above:,.0f} normal images scores this high ({above:,} of {n:,})."


def headline(prediction: Prediction) -> str:
    """The verdict in a word or two."""
    if prediction.verdict.endswith("(uncalibrated)"):
        return f"{prediction.verdict.partition(' ')[0].capitalize()}, provisionally"
    if prediction.verdict.startswith("anomalous"):
        return "Anomalous"
    if prediction.regions:
        return "Normal as a whole"
    return "Normal" if prediction.verdict.startswith("normal") else "No verdict"


def meaning(prediction: Prediction, known: Calibration | None) -> str:
    """What follows from it, at a stated rate."""
    if known is None or not known.calibrated:
        return ""
    rate, many = known.false_alarm_rate, len(prediction.regions or ())
    side, other = ("above", "though") if prediction.is_anomalous else ("below", "and")
    text = (
        f"The score is {side} the threshold of {known.image_threshold:.5g}, which at most {100 * rate:.4g} % of normal "
    )
    text += f"images reach ({100 * known.confidence:.4g} % confidence)"
    if not many:
        return f"{text}, {other} no single place stands out."
    places = f"{'one place stands' if many == 1 else f'{many} places stand'} out"
    places += ", which normal images rarely show" if rate <= RARE else ""
    return f"{text}; {'' if prediction.is_anomalous else 'but '}{places}."


def regions(count: int) -> str:
    """The title of a list of regions."""
    return {0: "No region stands out", 1: "1 region stands out"}.get(count, f"{count:,} regions stand out")


def no_rate(model: AnomalyModule, size: tuple[int, int], name: str) -> str:
    """Why no false-alarm rate is stated of an image (height, width) as the model sees it, and what helps."""
    known, remedy = model.calibration, f"zoo calibrate {name} --data NORMALS --false-alarm-rate 0.01"
    if known is None:
        return f"The model has no threshold, so it gives a score and no verdict. To set one: {remedy}"
    if not known.calibrated:
        return (
            f"No rate is stated: the threshold comes from {len(known.scores):,} held-out normal images and "
            f"promises nothing. To state a rate: {remedy}"
        )
    if known.precision == model.precision:
        sizes = ", ".join(f"{width} × {height}" for height, width in known.sizes)
        return (
            f"No rate holds: the model was calibrated on images of {sizes} pixels, and this one has {size[1]} × "
            f"{size[0]}. Cut it to that size, or calibrate the model with images of this one."
        )
    return f"No rate holds: the model was calibrated in {known.precision}, not in {model.precision}."


def label(name: str, config: dict[str, Any] | None) -> str:
    """A model in a line, for lists of them.

    Args:
        config: its configuration, where it is at hand.
    """
    if config is None:
        return name
    known = config["calibration"]
    return name if known and known["calibrated"] else f"{name} (not calibrated)"
