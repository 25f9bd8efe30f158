"""What a model sees of an image: without its info bar, on the intensity scale of its set, whole or by tiles.

The constants are those of the set that a model is fitted on, and are stored with it. Nothing is measured on a single
image, but where the bar begins in one of a size that the set didn't have.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_type_hints

import numpy as np

from zoo.errors import ZooError
from zoo.forms import misfit, quoted
from zoo.image import image_size, read_image, resize, resize_mask, to_tensor
from zoo.sem import Sem, bar_of_set, find_bar, read_sem

if TYPE_CHECKING:
    from torch import Tensor

INFO_BARS, INTENSITIES = ("auto", "none"), ("full", "percentile", "keep")
SAMPLE = 32  # images of a set that are looked at
PIXELS = 2**16  # of each of them
TAILS = 0.001  # share of the pixels below and above the percentiles
MARGIN = 0.1  # of their distance, on both sides: what is a little brighter than all normals is still told from white
LEAST_TILE = 32  # pixels
LARGEST = 2**14  # side in pixels to which images are resized


@cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(View)


class Viewed(NamedTuple):
    """One image as a model sees it: image (1, C, h, w) in [0, 1], mask and region of interest (1, 1, h, w) bool."""

    image: Tensor
    mask: Tensor | None
    roi: Tensor | None


@dataclass(frozen=True)
class View:
    """How images are brought before a model; plain JSON values.

    Attributes:
        resize: side to which images are resized first, or None (of presets, for parity runs).
        crop: side of the central square that is cut out then, or None.
        info_bar: "auto" leaves info bars out, "none" sees them.
        bars: (height, width, rows of its info bar) of each size of image in the set that was looked at.
        low, high: what becomes 0 and 1, in full scales of integers or in the values of `floats`; None: the full scale.
        floats: the set holds float images, which are taken by their values.
        tile: side in pixels of the tiles in which larger images are seen, or None.
    """

    resize: int | None = None
    crop: int | None = None
    info_bar: Literal["auto", "none"] = "none"
    bars: tuple[tuple[int, int, int], ...] = ()
    low: float | None = None
    high: float | None = None
    floats: bool = False
    tile: int | None = None

    def __post_init__(self) -> None:
        for name, kind in _kinds().items():
            if misfit(getattr(self, name), kind):
                raise ZooError(f"{name} of a view can't be {quoted(getattr(self, name))}.")
        if self.tile is not None and self.tile < LEAST_TILE:
            raise ZooError(f"--tile is at least {LEAST_TILE} pixels, not {self.tile}.")
        if self.tile and (self.crop or self.resize):
            raise ZooError("--tile doesn't go with resized or cropped images; take another preset than original.")
        if not all(side is None or 1 <= side <= LARGEST for side in (self.resize, self.crop)):
            raise ZooError(f"--resize and --crop are 1 to {LARGEST} pixels, not {self.resize} and {self.crop}.")
        if not all(0 <= rows < height and width > 0 for height, width, rows in self.bars):
            raise ZooError("An info bar is lower than its image.")
        if (self.low is None) != (self.high is None) or (self.low is not None and not self.low < self.high < math.inf):
            raise ZooError(f"low is below high, and neither alone: not {self.low} and {self.high}.")
        if self.floats and self.low is None:
            raise ZooError("Float images have a scale: low and high.")
        object.__setattr__(self, "bars", tuple(tuple(bar) for bar in self.bars))  # of JSON they are lists

    @classmethod
    def stored(cls, preprocessing: dict[str, Any]) -> View:
        """The view in a model's configuration; before there were views there were resize and crop alone.

        Raises:
            ValueError: other keys that are missing, for which a default might give other scores; or values of no view.
        """
        given = {key: preprocessing[key] for key in _kinds() if key in preprocessing}
        if given.keys() not in (_kinds().keys(), {"resize", "crop"}):
            raise ValueError(f"preprocessing {min(_kinds().keys() - given.keys())!r} is missing")
        return cls(**given)

    def native(self) -> View:
        """As images are predicted: not resized first, unless they are cropped then."""
        return self if self.crop else replace(self, resize=None)

    def with_bars(self, bars: Sequence[Sequence[int]]) -> View:
        """With the bars of what a prepared set was made from; images of a size that both have are looked at anew."""
        sizes = Counter(tuple(bar[:2]) for bar in (*self.bars, *bars))
        return replace(self, bars=tuple(bar for bar in (*self.bars, *bars) if sizes[tuple(bar[:2])] == 1))

    def bar_rows(self, array: np.ndarray, source: Any = None) -> int:
        """Rows of the info bar at the bottom of an image: those of its size in the set, of its tags, or as they look.

        Args:
            array: decoded (H, W) or (H, W, 3).
            source: what it was read from, with the vendor's tags, or `Sem`.
        """
        known = self._known_rows(array.shape[:2])
        if known is not None:
            return known
        bar = (source if isinstance(source, Sem) else read_sem(array if source is None else source)).bar
        return len(array) - (bar if bar < len(array) else find_bar(array))

    def say_bars(self, say: Callable[[str], None]) -> None:
        """Tell a line for each size of image with an info bar."""
        for height, width, rows in self.bars:
            if rows:
                say(f"An info bar, the last {rows} rows of images of {width} x {height}, is left out.")

    def _known_rows(self, size: tuple[int, int]) -> int | None:
        if self.info_bar == "none":
            return 0
        return next((rows for *known, rows in self.bars if tuple(known) == tuple(size)), None)

    def size(self, source: Any) -> tuple[int, int]:
        """Height and width of an image as `see` gives it (without resize and crop), mostly from the head of its file.

        Raises:
            ZooError: it can't be read.
        """
        height, width = image_size(source)
        rows = self._known_rows((height, width))
        return height - (self.bar_rows(read_image(source), source) if rows is None else rows), width

    def tensor(self, array: np.ndarray, name: object = None) -> Tensor:
        """A decoded image -> float32 (C, H, W) in [0, 1]; values beyond the scale of the set become 0 and 1.

        Raises:
            ZooError: a float image that has another scale than the set.
        """
        import torch

        if self.floats:
            if array.dtype != np.float32:
                raise ZooError(
                    f"{name or 'The image'} has integers, and the model knows float images by their values; save it as "
                    "those that the model was fitted on."
                )
            image = torch.from_numpy(array.copy())
            image = image[None] if image.ndim == 2 else image.movedim(-1, 0)
        else:
            if self.low is not None and array.dtype == np.float32 and (array.min() < 0 or array.max() > 1):
                raise ZooError(
                    f"{name or 'The image'} has float values beyond [0, 1], and the model knows images of integers; "
                    "save it as those that the model was fitted on."
                )
            image = to_tensor(array, name)
        return image if self.low is None else ((image - self.low) / (self.high - self.low)).clamp_(0, 1)

    def without_bar(self, array: np.ndarray, source: Any = None) -> np.ndarray:
        """The rows of a decoded image above its info bar; the arguments are those of `bar_rows`."""
        return array[: len(array) - self.bar_rows(array, source)]

    def off_scale(self, image: Tensor) -> float:
        """Share of the pixels of what `tensor` or `see` gave that lie beyond the scale of the set."""
        return float(((image == 0) | (image == 1)).float().mean())

    def shown(self, array: np.ndarray) -> np.ndarray:
        """A whole decoded image (H, W) or (H, W, 3) on the scale of the set, for display."""
        if self.low is None:
            return array
        image = self.tensor(array).numpy()  # (C, H, W)
        return image[0] if len(image) == 1 else image.transpose(1, 2, 0)

    def see(
        self,
        array: np.ndarray,
        name: str,
        source: Any = None,
        mask: np.ndarray | None = None,
        ignored: np.ndarray | None = None,
    ) -> Viewed:
        """Bring a decoded image before the model.

        Args:
            array: (H, W) or (H, W, 3).
            source: as for `bar_rows`.
            mask: of its defects, (H, W) bool.
            ignored: what is not to be looked at, (H, W) bool.

        Raises:
            ZooError: masks of another size, nothing left to look at, a crop that doesn't fit, or as `tensor`.
        """
        import torch

        if ignored is not None and ignored.shape != array.shape[:2]:
            raise ZooError(
                f"The ignore mask of {name} has another size than its image ({_size(ignored)} against {_size(array)}); "
                "draw one of the same size."
            )
        kept = slice(len(array) - self.bar_rows(array, source))  # rows above the info bar
        image = self.tensor(array[kept], name)[None]  # (1, C, h, w)
        masks = (mask, None if ignored is None else ~ignored)
        masks = [None if m is None else torch.from_numpy(m[kept])[None, None] for m in masks]  # (1, 1, h, w)
        if self.resize is not None:
            size = (self.resize, self.resize)
            image, masks = resize(image, size), [None if m is None else resize_mask(m, size) for m in masks]
        if self.crop is not None:
            image, *masks = (None if m is None else _center_crop(m, self.crop) for m in (image, *masks))
        mask, roi = masks
        if roi is not None and not roi.any():
            raise ZooError(f"The ignore mask of {name} leaves nothing to look at; it is white where to ignore.")
        return Viewed(image, mask, roi)


def look_at(view: View, images: Sequence[Any], info_bar: str, intensity: str) -> View:
    """Complete a view by what a set of images shows: their info bars, and percentiles of their pixels.

    Args:
        view: what is known.
        images: of the set, as `zoo.image.read_image` takes them; some `SAMPLE` of them suffice.
        info_bar: "auto" or "none".
        intensity: "full" keeps the full scale of integers; "percentile" takes the 0.1 % and 99.9 % percentiles of all
            their pixels together, and a tenth more on both sides, as black and white of all images; "keep" leaves the
            view's own, of a model that is fine-tuned.

    Raises:
        ZooError: another word, bars of several heights, images of a single grey, or floats and integers together.
    """
    if info_bar not in INFO_BARS or intensity not in INTENSITIES:
        known = f"--info-bar is {' or '.join(INFO_BARS)} and --intensity {' or '.join(INTENSITIES)}"
        raise ZooError(f"{known}; not {info_bar} and {intensity}.")
    if not images:
        return view
    if info_bar == "auto":
        sizes = defaultdict(list)
        for image in images:
            sizes[image_size(image)].append(image)
        bars = [(*size, bar_of_set(found)) for size, found in sorted(sizes.items())]
        view = replace(view, info_bar="auto", bars=tuple(bars))
    if intensity == "percentile":
        return _on_percentiles(view, images)
    return view if intensity == "keep" else replace(view, low=None, high=None, floats=False)


def _on_percentiles(view: View, images: Sequence[Any]) -> View:
    pixels, kinds, rng = [], set(), np.random.default_rng(0)
    for source in images:
        array = read_image(source)
        values = view.without_bar(array, source).ravel()
        values = values[rng.integers(len(values), size=PIXELS)]  # an even step would see some columns of a layout alone
        kinds.add(values.dtype.kind)
        full = 1 if values.dtype.kind == "f" else np.iinfo(values.dtype).max
        pixels.append(values.astype(np.float64) / full)
    low, high = np.quantile(np.concatenate(pixels), (TAILS, 1 - TAILS))
    floats = "f" in kinds
    if floats and len(kinds) > 1:
        raise ZooError("The images are partly integers and partly floats, of other scales; save all in one way.")
    if not high > low:
        raise ZooError("--intensity percentile: the images are of a single grey; take --intensity full.")
    margin = MARGIN * (high - low)
    return replace(view, low=float(low - margin), high=float(high + margin), floats=floats)


def _size(array: np.ndarray) -> str:
    return f"{array.shape[1]} x {array.shape[0]}"


def sample(count: int) -> list[int]:
    """Which of so many images are looked at: evenly spread, as a set is often in the order of its lots."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, SAMPLE))})


def _center_crop(images: Tensor, size: int) -> Tensor:
    """The central square of (1, C, H, W)."""
    if size > min(images.shape[-2:]):
        raise ZooError(f"A crop of {size} pixels doesn't fit into an image of {tuple(images.shape[-2:])}.")
    top, left = (images.shape[-2] - size) // 2, (images.shape[-1] - size) // 2
    return images[..., top : top + size, left : left + size]
