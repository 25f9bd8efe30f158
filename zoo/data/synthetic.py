"""Procedural SEM images of a chip's metal layer, with seven kinds of defects and their exact masks.

For tests, the quickstart and machines without data. Everything is a function of (seed, index): an image with a defect
equals its normal twin in each pixel outside of the mask. A layout (`zoo.data.layout`) is drawn as a signed distance
field (`zoo.data.scene`), so that ends, gaps and bridges (`zoo.data.defects`) get the same edge, shadow and focus.
"""

from __future__ import annotations

import difflib
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_closing, binary_fill_holes, find_objects, gaussian_filter

from zoo.data.defects import DEFECTS
from zoo.data.rows import LABELS
from zoo.data.scene import LOOKS, NOMINAL, Scene
from zoo.errors import ZooError

if TYPE_CHECKING:
    import datasets

KINDS = tuple(DEFECTS)
STYLES = tuple(LOOKS)
DEFAULTS = {
    "train": 100,
    "good": 30,
    "defect": 30,
    "train_defect": 0,
    "size": 256,
    "seed": 0,
    "style": "metal",
    "bits": 8,
    "bar": 0,
}
MIN_SIZE = 32  # pixels; below it the lines are thinner than their edges
FIELD = {"metal": 2000, "fine": 1000}  # nm from side to side of images of 128 pixels or more

_CHOICES = {"style": STYLES, "bits": (8, 16), "bar": (0, 1)}
_TEST_START = 1 << 32  # test indices begin here, train indices at 0
_CONSEQUENCE = 4.0  # grey levels: smaller changes drown in the shot noise (3 to 8), fade out and leave the mask


def render(
    index: int,
    seed: int = 0,
    size: int = 256,
    kind: str | None = None,
    style: str = "metal",
    bits: int = 8,
    bar: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """One image of a routed metal layer, grey lines with bright edges on a darker ground.

    Args:
        index: which image of the stream; not negative.
        seed: which stream; not negative.
        size: side of the square image in pixels, at least 32.
        kind: one of `KINDS`, or None for a normal image.
        style: one of `STYLES`: "fine" has a finer pitch and less contrast.
        bits: 8, or 16 for the same scene with 257 times as many levels.
        bar: whether an info bar with a scale covers the bottom twelfth; the image above it stays the same.

    Returns:
        image (size, size) uint8 or uint16 and mask (size, size) bool. The mask holds the changed pixels, with holes
        and cracks filled, and is empty for normal images only.

    Raises:
        ZooError: an unknown kind, style or number of bits, or a value out of range.
    """
    if kind is not None and kind not in KINDS:
        raise ZooError(f"unknown defect kind {kind!r}{_nearest(kind, KINDS)}; the kinds are {', '.join(KINDS)}")
    for key, value in {"style": style, "bits": bits, "bar": bar}.items():
        _check_option(key, value)
    if index < 0 or seed < 0 or size < MIN_SIZE:
        raise ZooError(
            f"synthetic data needs index >= 0, seed >= 0 and size >= {MIN_SIZE}; got {index}, {seed}, {size}"
        )
    scene = Scene(index, seed, size, style)
    clean = scene.develop()
    image = scene.expose(clean, bits)
    mask = np.zeros((size, size), bool)
    if kind is not None:
        window, changed = DEFECTS[kind](scene, clean)
        change, found = _consequence(changed - clean[window], scene.scale)
        clean[window] += change
        image[window] = np.where(found, scene.expose(clean, bits, window), image[window])
        mask[window] = found
    if bar:
        height = size // 12
        image[-height:] = _info_bar(size, height, FIELD[style] / (NOMINAL * scene.scale), scene.look.noise, bits)
        mask[-height:] = False
    return image, mask


def _consequence(change: np.ndarray, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """A change (H, W) that fades out where it is faint, and where it is seen: without slits, holes and whiskers."""
    size = gaussian_filter(np.abs(change), scale, truncate=2)
    least = max(min(_CONSEQUENCE, size.max() / 3), 0.12 * size.max())  # so that something is seen, and no wide halo
    found = size > least
    box = find_objects(found.astype(np.uint8))[0]
    found[box] = binary_fill_holes(found[box] | binary_closing(found[box], iterations=max(round(4 * scale), 1)))
    change = change * np.clip(size / least - 0.5, 0, 1)
    return np.copysign(np.maximum(np.abs(change), found), change), found  # by one level at least


def load_synthetic(
    train: int = 100,
    good: int = 30,
    defect: int = 30,
    train_defect: int = 0,
    size: int = 256,
    seed: int = 0,
    style: str = "metal",
    bits: int = 8,
    bar: int = 0,
) -> datasets.DatasetDict:
    """The generator as a data set: splits train and test, columns image, mask, label, path.

    Rows are rendered when they are read, so memory does not depend on the counts. `image` is a (size, size) uint8 (or
    uint16) array, `mask` a (size, size) bool array or None for normals, `path` a name such as "test/scratch/00012.png".

    Args:
        train: normal images to train on.
        good: normal images to test on; no image of train is among them.
        defect: images with a defect to test on; the kinds alternate.
        train_defect: others with a defect in the split train, for methods that learn from labelled defects.
        size: side of the images in pixels.
        seed: which stream of images.
        style, bits, bar: as in `render`.

    Raises:
        ZooError: a count that is not positive, a size below 32, a negative seed, an unknown style or number of bits.
    """
    counts = {"train": train, "good": good, "defect": defect, "train_defect": train_defect}
    look = {"size": size, "seed": seed, "style": style, "bits": bits, "bar": bar}
    for key, value in (counts | look).items():
        _check_option(key, value)
    import datasets

    kinds, known = ([KINDS[i % len(KINDS)] for i in range(count)] for count in (defect, train_defect))
    rows = {
        "train": [(i, None, f"train/good/{i:05d}.png") for i in range(train)]
        + [(train + i, kind, f"train/{kind}/{i:05d}.png") for i, kind in enumerate(known)],
        "test": [(_TEST_START + i, None, f"test/good/{i:05d}.png") for i in range(good)]
        + [(_TEST_START + good + i, kind, f"test/{kind}/{i:05d}.png") for i, kind in enumerate(kinds)],
    }
    # What is stored is the recipe of each row; the transform turns it into pixels under the same column names.
    features = datasets.Features(
        image=datasets.Value("int64"),
        mask=datasets.Value("string"),
        label=datasets.ClassLabel(names=LABELS),
        path=datasets.Value("string"),
    )
    transform = partial(_render_rows, **look)
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict(
                {
                    "image": [index for index, _, _ in items],
                    "mask": [kind for _, kind, _ in items],
                    "label": [int(kind is not None) for _, kind, _ in items],
                    "path": [path for _, _, path in items],
                },
                features=features,
            ).with_transform(transform)
            for split, items in rows.items()
        }
    )


def parse_options(text: str) -> dict[str, int | str]:
    """Options of `load_synthetic` from "train=100,size=128,style=fine"; an empty text gives none.

    Raises:
        ZooError: an unknown or repeated key, or a value that is of no use for it.
    """
    options: dict[str, int | str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = (item.strip() for item in part.partition("="))
        if key not in DEFAULTS:
            raise ZooError(
                f"synthetic data has no option {key!r}{_nearest(key, DEFAULTS)}; the options are {', '.join(DEFAULTS)}"
            )
        if key in options:
            raise ZooError(f"synthetic option {key!r} is given twice; keep one of them")
        try:
            options[key] = type(DEFAULTS[key])(value)
        except ValueError:
            raise ZooError(f"synthetic option {key!r} is {value!r}; write an integer such as {DEFAULTS[key]}") from None
        _check_option(key, options[key])
    return options


def _check_option(key: str, value: int | str) -> None:
    if key in _CHOICES:
        known = [str(item) for item in _CHOICES[key]]
        if value not in _CHOICES[key]:
            near = _nearest(str(value), known)
            raise ZooError(f"synthetic option {key!r} is {value!r}{near}; it must be one of {', '.join(known)}")
        return
    low = {"seed": 0, "train_defect": 0, "size": MIN_SIZE}.get(key, 1)
    if value < low:
        raise ZooError(f"synthetic option {key!r} is {value}; it must be at least {low}")


def _nearest(word: str, words) -> str:
    close = difflib.get_close_matches(word, list(words), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _render_rows(batch: dict[str, list], **look: Any) -> dict[str, list]:
    """The transform of the data set; `batch` holds the recipes of some or all columns."""
    if "image" not in batch:
        return batch
    kinds = batch.get("mask", [None] * len(batch["image"]))
    pairs = [render(index, kind=kind, **look) for index, kind in zip(batch["image"], kinds, strict=True)]
    rows = dict(batch, image=[image for image, _ in pairs])
    if "mask" in batch:
        rows["mask"] = [mask if kind else None for (_, mask), kind in zip(pairs, kinds, strict=True)]
    return rows


def _info_bar(size: int, height: int, nm: float, noise: float, bits: int) -> np.ndarray:
    """Dark strip (height, size) with the conditions of the exposure and a scale; `nm` is the size of a pixel."""
    length = max((n for n in (10, 20, 50, 100, 200, 500) if n / nm < 0.3 * size), default=10)
    strip = Image.new("L", (size, height), 12)
    draw = ImageDraw.Draw(strip)
    font = ImageFont.load_default(max(0.5 * height, 5))
    middle, end = height / 2, size - height / 3
    text = f"{length} nm"
    start = end - draw.textlength(text, font) - height / 4 - length / nm
    draw.text((end, middle), text, 235, font, anchor="rm")
    draw.line([(start, middle), (start + length / nm, middle)], 235, max(height // 12, 1))
    for tick in (start, start + length / nm):
        draw.line([(tick, height * 0.3), (tick, height * 0.7)], 235, max(height // 20, 1))
    volts = 1 + int(9 * noise)
    for text in (f"SE  {volts}.0 kV  WD {2 + 4 * noise:.1f} mm", f"{volts} kV"):
        if height / 3 + draw.textlength(text, font) < start - height / 3:
            draw.text((height / 3, middle), text, 200, font, anchor="lm")
            break
    levels = np.asarray(strip)
    return levels if bits == 8 else levels.astype(np.uint16) * 257
