"""Example images: one without and one of each kind of defect, of the built-in synthetic set."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from zoo.data import synthetic
from zoo.markup import picture

WORDS = {"mousebite": "mouse bite", "missing_via": "missing via"}  # of kinds whose names are two
THUMBNAIL = 112  # pixels
INDEX = 7_000_000  # of the first one, far from those that anybody fits or tests on


class Example(NamedTuple):
    """An image file with what is to be seen in it."""

    path: Path
    caption: str
    thumbnail: str  # a data URI


def write_examples(folder: Path) -> list[Example]:
    """Draw the examples into a folder, as 16-bit TIFFs."""
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, kind in enumerate((None, *synthetic.KINDS)):
        image, _ = synthetic.render(INDEX + number, kind=kind, bits=16)
        path = folder / f"{kind or 'normal'}.tif"
        temporary = path.with_name(f".{path.name}")
        Image.fromarray(image).save(temporary, format="tiff")
        temporary.replace(path)
        shown = np.repeat((image >> 8).astype(np.uint8)[..., None], 3, axis=2)  # (H, W, 3)
        found.append(Example(path, WORDS.get(kind, kind or "normal"), picture(shown, THUMBNAIL)))
    return found


def buttons(examples: Sequence[Example]) -> str:
    """The examples as HTML, a button each, which tells its number by `data-example`."""
    shown = ((number, html.escape(one.caption), one.thumbnail) for number, one in enumerate(examples))
    made = (
        f'<button type="button" data-example="{number}"><img src="{picture}" alt=""><span>{caption}</span></button>'
        for number, caption, picture in shown
    )
    return f'<div class="examples">{"".join(made)}</div>'
