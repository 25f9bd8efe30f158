"""A result as a part of the page: pictures, and verdict, regions and mask at each false-alarm rate that can be chosen.

All is in the page at once, so that its controls answer at once and the server keeps nothing of an image.
"""

import base64
import io
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
from matplotlib import colormaps
from PIL import Image

from zoo import plots
from zoo.calibration import Calibration, supported_rate
from zoo.demo import words
from zoo.errors import ZooError
from zoo.evidence import Pair
from zoo.markup import cropped, outline, picture, region_words
from zoo.module import AnomalyModule, Brought, Prediction, judge

COLOURS = ("inferno", "viridis", "cividis", "magma")  # perceptually uniform, and told apart by the colour-blind
RATES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)  # to choose from, as far as the normals support them
SIDE = 1024  # pixels of a picture in the page, at most
REGIONS = 20  # outlined and listed
MANY = 200  # regions, beyond which a rate says nothing of an image and is not offered


@dataclass
class Look:
    """An image, and what a model says of it.

    Attributes:
        file: the image's name, as its owner calls it.
        name, model: the model.
        brought, prediction: as the model gave them.
        pairs: evidence for the places that `places` gave, or None.
        seconds: that it took.
    """

    file: str
    name: str
    model: AnomalyModule
    brought: Brought
    prediction: Prediction
    pairs: list[Pair] | None = None
    seconds: float = 0.0

    @property
    def seen(self) -> tuple[int, int]:
        """Height and width of what the model saw: the image above its info bar."""
        return tuple(self.brought.image.shape[-2:])

    @property
    def known(self) -> Calibration | None:
        """The thresholds, as far as they hold for this image."""
        return self.model.thresholds(self.seen)

    def at(self, rate: float | None = None) -> "Answer":
        """What the score and the map say at a rate, or the stated one, without a further look at the image.

        Raises:
            ZooError: a rate where none holds, or that the model's normals don't support.
        """
        known, prediction, seen = self.known, self.prediction, self.brought.looked_at()
        if rate is not None:
            if known is None or not known.calibrated:
                raise ZooError(words.no_rate(self.model, self.seen, self.name))
            known = known.at_rate(rate)
            prediction = judge(prediction.score, prediction.map, known, seen)._replace(pixel_nm=prediction.pixel_nm)
        return Answer(prediction, known, None if known is None else plots.mask(prediction.map, known) & seen)


class Answer(NamedTuple):
    """A verdict at a rate: the prediction, the thresholds, and the pixels of its regions (H, W); None without any."""

    prediction: Prediction
    known: Calibration | None
    mask: np.ndarray | None


def places(look: Look, most: int = 3) -> list[tuple[int, int]]:
    """(row, column) of what evidence is worth: the first regions, or where the map is highest."""
    regions = (look.prediction.regions or [])[:most]
    map = look.prediction.map
    return [region.position for region in regions] or [tuple(int(i) for i in np.unravel_index(map.argmax(), map.shape))]


def rates_of(known: Calibration | None) -> list[float]:
    """The rates that can be chosen, ascending, the stated one among them; empty where none is stated."""
    if known is None or not known.calibrated:
        return []
    least = supported_rate(len(known.scores))
    return sorted({rate for rate in RATES if rate >= least} | {known.false_alarm_rate})


def figures(look: Look, answer: Answer) -> dict[str, Any]:
    """An answer as plain JSON values; thresholds that state no rate are there, the rate is not."""
    prediction, known = answer.prediction, answer.known
    regions, states = prediction.regions, known is not None and known.calibrated
    about = {"image": look.file, "model": look.name, "method": look.model.method, "score": prediction.score}
    about |= {"p_value": prediction.p_value, "is_anomalous": prediction.is_anomalous, "verdict": prediction.verdict}
    about |= {"in_words": _in_words(look, answer), "size": list(prediction.map.shape)}
    about |= {"pixel_nm": prediction.pixel_nm, "false_alarm_rate": known.false_alarm_rate if states else None}
    about |= {"image_threshold": known.image_threshold if known else None}
    about |= {"pixel_threshold": known.pixel_threshold if known else None}
    about |= {"regions": None if regions is None else [one.described(prediction.pixel_nm) for one in regions]}
    return about


def render(looks: list[Look]) -> str:
    """The results as HTML, beside each other."""
    return _template("viewer.html.j2").render(results=[_result(look) for look in looks], colours=COLOURS)


def colour_tables() -> dict[str, str]:
    """The 256 colours of each map as one string of hexadecimal digits, six a colour."""
    levels = np.linspace(0, 1, 256)
    return {name: (255 * colormaps[name](levels)[:, :3] + 0.5).astype(np.uint8).tobytes().hex() for name in COLOURS}


# ---- parts of a result -----------------------------------------------------------------------------------------------


def _result(look: Look) -> dict[str, Any]:
    brought, prediction, known = look.brought, look.prediction, look.known
    rates, nm = rates_of(known), prediction.pixel_nm
    level = _level(prediction.map, look.model.calibration)
    height, width = prediction.map.shape
    about = {"file": look.file, "stem": Path(look.file).stem or "image", "model": look.name}
    about |= {"height": height, "width": width, "map_height": level.shape[0], "map_width": level.shape[1]}
    about |= {"score": f"{prediction.score:.6g}", "seconds": f"{look.seconds:.2f} s", "depth": _depth(brought.array)}
    about |= {"p_value": None if prediction.p_value is None else f"{prediction.p_value:.3g}"}
    about |= {"pixel": None if nm is None else f"{nm:.4g} nm"}
    about |= {"image": picture(plots.grey8(look.model.view.shown(brought.array)), SIDE), "level": _png(level)}
    about["scale"] = _scale(look.model.calibration)
    about["pairs"] = [_pair(*both) for both in zip(look.pairs, places(look), strict=True)] if look.pairs else []
    answers = [(rate, look.at(rate)) for rate in rates] or [(None, look.at())]
    stated = known.false_alarm_rate if rates else None
    answers = [(rate, one) for rate, one in answers if rate == stated or len(one.prediction.regions) <= MANY]
    about["rates"] = [_shown(look, answer, rate == stated) for rate, answer in answers]
    offered = [rate for rate, _ in answers]
    about |= {"rate_index": offered.index(stated), "rate_words": _percent(stated)}
    about["all_rates"] = "|".join(map(_percent, offered))
    return about


def _shown(look: Look, answer: Answer, is_stated: bool) -> dict[str, Any]:
    """What changes with the false-alarm rate."""
    prediction, known, mask = answer
    kind = {True: "bad", False: "notable" if prediction.regions else "good", None: "open"}[prediction.is_anomalous]
    about = {"stated": is_stated, "kind": kind, "headline": words.headline(prediction), "regions": None, "more": 0}
    states = known is not None and known.calibrated
    about |= {"rarity": words.rarity(known, prediction.score) if states else "", "outlines": []}
    about["meaning"] = words.meaning(prediction, known) or words.no_rate(look.model, look.seen, look.name)
    about["json"] = _data("application/json", json.dumps(figures(look, answer), indent=1).encode())
    about["mask"] = None if mask is None else _png(mask)
    if prediction.regions is not None:
        regions = [region.described(prediction.pixel_nm) for region in prediction.regions]
        shown = list(enumerate(regions[:REGIONS], start=1))
        about["regions"] = [region_words(number, region, prediction.pixel_nm) for number, region in shown]
        about["outlines"] = [outline(number, region, mask, mask.shape) for number, region in shown]
        about["more"] = max(len(regions) - REGIONS, 0)
        about["regions_title"] = words.regions(len(regions))
    return about


def _in_words(look: Look, answer: Answer) -> str:
    prediction, known, _ = answer
    if known is None or not known.calibrated:
        return words.no_rate(look.model, look.seen, look.name)
    return f"{words.rarity(known, prediction.score)} {words.meaning(prediction, known)}"


def _pair(pair: Pair, place: tuple[int, int]) -> dict[str, Any]:
    row, column = place
    about = {"where": f"At x {column}, y {row}", "distance": f"{pair.distance:.4g}", "found": cropped(pair.found)}
    return about | {"normal": pair.normal and cropped(pair.normal)}


def _scale(known: Calibration | None) -> str:
    if known is None:
        return "The colours span this image's own map: without a threshold, those of two images can't be compared."
    return (
        "The scale is fixed by normal images, not by this one: it begins at their median pixel, has the pixel "
        "threshold in its middle, and what is hotter is more opaque."
    )


def _level(map: np.ndarray, known: Calibration | None) -> np.ndarray:
    """The map on the scale of the normals, uint8 (h, w) of at most `SIDE` pixels."""
    image = Image.fromarray((255 * plots.heat(map, known) + 0.5).astype(np.uint8))
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR)
    return np.asarray(image)


def _depth(array: np.ndarray) -> str:
    bits = {"uint8": "8 bits", "uint16": "16 bits", "float32": "float"}[array.dtype.name]
    return f"{bits}, colour" if array.ndim == 3 else bits


def _percent(rate: float | None) -> str:
    return "" if rate is None else f"{100 * rate:.3g} %"


def _png(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return _data("image/png", file.getvalue())


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((files("zoo.demo") / name).read_text(encoding="utf-8"))
