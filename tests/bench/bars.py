"""How many info bars `zoo.sem.find_bar` finds at the right row, and how many it sees where there is none.

    python tests/bench/bars.py --boards FOLDER --out tests/bench/bars.json

Bars of many kinds are drawn over images: the built-in synthetic set, the photos that come with scikit-image and, with
--boards, DeepPCB (circuit boards, binarised optical pictures), cut to several shapes, some with clipped blacks and
whites. The same images without a bar count the false finds, with blank, saturated and striped ones and the photos, cut
off at many rows.
"""

import argparse
import io
import json
import platform
import time
from collections import Counter
from pathlib import Path

import numpy as np
import skimage.data
from PIL import Image, ImageDraw, ImageFont

from zoo.data.synthetic import STYLES, render
from zoo.sem import find_bar

KINDS = ("line of text", "two lines", "cells", "framed")
COLOURS = {"black": (0, 255), "dark": (24, 235), "white": (255, 0), "light": (225, 20)}  # ground and ink of 255
JPEG = (None, None, 95, 85, 70)  # None: as it is
SIZES = (128, 256, 400, 512, 768, 1024, 2048)
SHARES = (0.03, 0.15)  # of the height
LOWEST = 10  # rows
PHOTOS = sorted(p for p in Path(skimage.data.__file__).parent.iterdir() if p.suffix in (".png", ".jpg"))
LARGE = 400  # rows from which 95 % must be found


def draw_bar(width, height, kind, ground=0, ink=255, seed=0):
    """An info bar (height, width) uint8 as SEM tools draw them."""
    rng = np.random.default_rng(seed)
    strip = Image.new("L", (width, height), ground)
    draw = ImageDraw.Draw(strip)
    volts, far = rng.choice([1, 2, 5, 10]), rng.uniform(2, 9)
    fields = [
        "SE(U)",
        f"{volts}.0kV",
        f"WD {far:.1f}mm",
        f"x{rng.integers(10, 200)}k",
        f"2024-{rng.integers(10, 12)}-07",
    ]
    lines = 1 if kind == "line of text" or height < 24 else 2
    margin = max(height // 8, 2)
    step = 0.68 * width / len(fields)
    letters = max(rng.uniform(0.5, 0.65) * height / lines, 6)
    widest = max(ImageFont.load_default(letters).getlength(field) for field in fields)
    font = ImageFont.load_default(max(letters * min(0.95 * step / widest, 1), 5))
    for row in range(lines):
        y = margin + (height - 2 * margin) * (row + 0.5) / lines
        for i, field in enumerate(fields):
            x = margin + i * step
            text = field if row == 0 else ["det", "HV", "Lot A-12", "mag", "user"][i]
            if draw.textlength(text, font) < step + 2:  # the narrowest bars hold some fields only
                draw.text((x, y), text, ink, font, anchor="lm")
            if kind == "cells" and row == 0 and i:
                draw.line([(x - margin, 0), (x - margin, height)], ink, 1)
    start, end, middle = int(0.7 * width), int(rng.uniform(0.85, 0.97) * width), height // 2
    draw.line([(start, middle), (end, middle)], ink, max(height // 12, 1))
    for x in (start, end):
        draw.line([(x, height // 4), (x, 3 * height // 4)], ink, max(height // 20, 1))
    if kind in ("cells", "framed"):
        thick = int(rng.integers(1, max(height // 20, 1) + 1))
        draw.line([(0, (thick - 1) // 2), (width, (thick - 1) // 2)], ink, thick)
    if kind == "framed":
        draw.rectangle([0, 0, width - 1, height - 1], outline=ink)
    return np.asarray(strip)


def through_jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def clipped(image, rng):
    """Contrast as an operator may leave it: a part of the darks or brights at the end of the scale."""
    low, high = np.quantile(image, [rng.uniform(0, 0.3), rng.uniform(0.7, 1)])
    top = np.iinfo(image.dtype).max
    return (np.clip((image - low) / max(high - low, 1), 0, 1) * top).astype(image.dtype)


def grey(path):
    return np.asarray(Image.open(path).convert("L"))


def backgrounds(count, boards=(), seed=0):
    """(name, image) for images without a bar, of many sizes, some clipped; a quarter boards, a quarter photos."""
    for i in range(count):
        rng = np.random.default_rng([seed, i])
        size = SIZES[int(rng.choice(len(SIZES), p=[0.12, 0.15, 0.2, 0.2, 0.15, 0.12, 0.06]))]
        bits = 16 if rng.random() < 0.3 else 8
        files = {0: boards, 1: PHOTOS}.get(i % 4)
        if files:
            name, image = "boards" if files is boards else "photos", grey(files[i // 4 % len(files)])
            if size < min(image.shape):
                y, x = rng.integers(0, np.subtract(image.shape, size) + 1)
                image = image[y : y + size, x : x + size]
            if rng.random() < 0.5:
                image = image.T
            image = image.astype(np.uint16) * 257 if bits == 16 else image
        else:
            style = STYLES[i % len(STYLES)]
            name, image = f"synthetic {style}", render(int(rng.integers(1 << 20)), size=size, style=style, bits=bits)[0]
        if rng.random() < 0.5:
            image = image[: round(0.75 * len(image))]
        if rng.random() < 0.4:
            name, image = f"{name}, clipped", clipped(image, rng)
        yield name, np.ascontiguousarray(image)


def with_bar(image, seed):
    """The image with a bar below it or over its lowest rows, its first row, and what was drawn."""
    rng = np.random.default_rng([seed, 1])
    kind, colour = KINDS[rng.integers(len(KINDS))], list(COLOURS)[rng.integers(len(COLOURS))]
    rows = max(round(rng.uniform(*SHARES) * len(image)), LOWEST)
    bar = draw_bar(image.shape[1], rows, kind, *COLOURS[colour], seed=seed)
    bar = bar if image.dtype == np.uint8 else bar.astype(np.uint16) * 257
    quality = JPEG[rng.integers(len(JPEG))] if image.dtype == np.uint8 else None
    whole = np.concatenate([image if rng.random() < 0.5 else image[:-rows], bar])
    whole = whole if quality is None else through_jpeg(whole, quality)
    depth = "16 bit" if image.dtype == np.uint16 else "8 bit" if quality is None else f"JPEG {quality}"
    return whole, len(whole) - rows, {"kind": kind, "colour": colour, "depth": depth}


def hard(count, seed=0):
    """Images without a bar that have what a bar has: blank ends, saturated ends, full-width lines, stripes."""
    for i in range(count):
        rng = np.random.default_rng([seed, 2, i])
        size = int(rng.choice([128, 256, 512, 1024]))
        image = render(int(rng.integers(1 << 20)), size=size)[0].astype(float)
        edge = size - int(rng.uniform(*SHARES) * size)
        level = rng.choice([0, 40, 255])
        name = ("blank", "saturated", "line above saturated", "stripes")[i % 4]
        if name == "stripes":
            image = 127 + 127 * np.sign(np.sin(np.arange(size) * rng.uniform(0.05, 0.5)))[:, None] + 0 * image
        else:
            image[edge:] = level
        if name == "line above saturated":
            image[edge - rng.integers(1, 9) : edge] = 255 - level
        noise = rng.normal(0, rng.choice([1, 4, 10]), image.shape) if name != "saturated" else 0
        if rng.random() < 0.5:  # particles
            for y, x in rng.integers(0, size, (30, 2)):
                image[y : y + size // 60 + 1, x : x + size // 60 + 1] = 255 - image[y, x]
        yield name, np.clip(image + noise, 0, 255).astype(np.uint8)


def tally(rows, *keys):
    """{value: [found at the row, within one row, all]} for each key."""
    report = {}
    for key in keys:
        groups = sorted({row[key] for row in rows}, key=str)
        report[key] = {str(g): counts([row for row in rows if row[key] == g]) for g in groups}
    return report


def counts(rows):
    off = [row["off"] for row in rows]
    return {"exact": sum(o == 0 for o in off), "within_1": sum(abs(o) <= 1 for o in off), "of": len(off)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=900)
    parser.add_argument("--seed", type=int, default=1, help="the limits of find_bar were set while looking at 0")
    parser.add_argument("--boards", type=Path, help="folder of DeepPCB with train/good")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    boards = sorted((options.boards / "train/good").glob("*.jpg")) if options.boards else []
    rows, false, clean, seconds = [], Counter(), Counter(), 0.0
    for i, (name, image) in enumerate(backgrounds(options.count, boards, options.seed)):
        whole, first, drawn = with_bar(image, 1_000_000 * options.seed + i)
        start = time.perf_counter()
        row = find_bar(whole)
        seconds += time.perf_counter() - start
        band = "400 rows and more" if len(whole) >= LARGE else "less than 400 rows"
        rows.append({"image": name, "rows": band, "off": int(row) - first, "missed": bool(row == len(whole)), **drawn})
        plain = image if image.dtype != np.uint8 or i % 2 else through_jpeg(image, 90)
        clean[name] += 1
        false[name] += int(find_bar(plain) < len(plain))
    ends = (
        ("photos, cut", image[:end]) for image in map(grey, PHOTOS) for end in range(len(image) // 2, len(image), 9)
    )
    for name, image in (*hard(options.count // 2, options.seed), *ends):
        clean[name] += 1
        false[name] += int(find_bar(image) < len(image))
    large = [row for row in rows if row["rows"].startswith("400")]
    report = {
        "images": {
            "seed": options.seed,
            "bars": len(rows),
            "boards": len(boards),
            "photos": len(PHOTOS),
            "without": sum(clean.values()),
        },
        "all": counts(rows),
        "large": counts(large),
        "large_grey": counts([row for row in large if "boards" not in row["image"]]),
        "missed": sum(row["missed"] for row in rows),
        "wrong_row": sum(abs(row["off"]) > 1 and not row["missed"] for row in rows),
        **tally(rows, "rows", "image", "kind", "colour", "depth"),
        "false_finds": {name: [false[name], clean[name]] for name in sorted(clean)},
        "ms_an_image": round(1000 * seconds / len(rows), 1),
        "python": platform.python_version(),
    }
    print(json.dumps(report, indent=1))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
