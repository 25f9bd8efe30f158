"""Making a store (`zoo.data.store`): decode, check, resize and write, block by block, by one process at a time."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from zoo.checkpoint import dump, write_text
from zoo.data.rows import read_row
from zoo.data.store import (
    FORMAT_VERSION,
    INDEX,
    SPLITS,
    blocks_of,
    damaged,
    digest,
    file_hash,
    left_out,
    read_index,
)
from zoo.errors import ZooError
from zoo.paths import locked
from zoo.view import View

if TYPE_CHECKING:
    import datasets

BLOCK, BLOCK_BYTES = 512, 64 * 2**20  # images and their bytes at most; what a run that was killed does again


def find(
    place: Path, source: dict[str, Any], size: tuple[int, int], skip_broken: bool = False
) -> dict[str, Any] | None:
    """The index of a store that is there already, every block checked; None if there is none.

    Raises:
        ZooError: it is of other data or another size, its files have changed since, a block is damaged, or it lacks
            images that can't be read without `skip_broken`.
    """
    if not (place / INDEX).is_file():
        return None
    index = read_index(place)
    _refuse_other(place, index, source, size)
    for block in blocks_of(index):
        for name, sha256 in block["sha256"].items():
            if file_hash(place / name) != sha256:
                raise damaged(place / name)
    if (broken := left_out(index)) and not skip_broken:
        raise ZooError(
            f"{place} lacks {_names(broken)}, which can't be read; take it so by --skip-broken, or replace them and "
            f"remove {place}."
        )
    return index


def prepare(
    data: datasets.DatasetDict,
    source: dict[str, Any],
    place: Path,
    size: tuple[int, int],
    workers: int,
    skip_broken: bool = False,
    tick: Callable[[int], None] = lambda done: None,
    view: View | None = None,
) -> dict[str, Any]:
    """Decode, check, resize and write a data set; a run that was killed goes on with the next block.

    Args:
        data: splits with columns image, mask, label, path.
        source: `name`, `fingerprint` and `counts` of what it is made from, and `files`, a digest of the times of its
            files, or None if it isn't files.
        place: folder of the store; it appears when all is done.
        size: (height, width) of the stored images: bilinear with antialias, rounded to the nearest grey level; masks by
            nearest. Colour is averaged.
        workers: threads that decode.
        skip_broken: leave out images that can't be read, and list them.
        tick: told the images done so far.
        view: leaves info bars out, of images and masks; its bars are part of `source` then.

    Returns:
        The index, as it was written, or as `find` finds it.

    Raises:
        ZooError: an image that can't be read, named, no normal image to train on, a store begun from other images, a
            disk that refuses, another process that does the same, or as `find`.
    """
    partial = place.with_name(f".{place.name}.partial")
    about = {"format_version": FORMAT_VERSION, "source": source, "size": list(size)}
    block_size = _block_size(size)
    with _alone(place):
        if index := find(place, source, size, skip_broken):  # another process has made it meanwhile
            return index
        if place.is_dir():
            place.rmdir()  # empty: what can't be replaced is known now, not when all is decoded
        partial.mkdir(exist_ok=True)
        begun = _json(partial / "source.json") or {}
        if begun != about:
            if any(partial.glob("*-*.json")):  # finished blocks
                _refuse_other(partial, begun, source, size)
            shutil.rmtree(partial)
            partial.mkdir()
            write_text(partial / "source.json", dump(about))
        blocks: dict[str, list[dict[str, Any]]] = {}
        done = 0
        for split in SPLITS:
            rows = data[split]
            parts = [range(first, min(first + block_size, len(rows))) for first in range(0, len(rows), block_size)]
            stems = [partial / f"{split}-{i:05d}" for i in range(len(parts))]
            blocks[split] = [_finished(stem, skip_broken) for stem in stems]
            missing = [i for part, block in zip(parts, blocks[split], strict=True) if block is None for i in part]
            decoded = _decoded(rows.select(missing), view or View(), size, workers, skip_broken)
            for i, (stem, part) in enumerate(zip(stems, parts, strict=True)):
                if blocks[split][i] is None:
                    blocks[split][i] = _write_block(stem, islice(decoded, len(part)))
                done += len(part)
                tick(done)
            if split == "train" and not any(0 in block["labels"] for block in blocks[split]):
                broken = [image for block in blocks[split] for image in block["broken"]]
                shutil.rmtree(partial)
                raise ZooError(
                    f"{source['name']} has no normal image to train on that can be read (left out: {_names(broken)}); "
                    "replace or add some."
                )
        counts = {s: [sum(b["labels"].count(label) for b in blocks[s]) for label in (0, 1)] for s in SPLITS}
        index = about | {"name": source["name"], "counts": counts, "blocks": blocks}
        content = [{key: block[key] for key in ("paths", "labels", "masks", "sha256")} for block in blocks_of(index)]
        identity = {key: source[key] for key in ("name", "fingerprint", "counts")}  # the same on each machine
        index["fingerprint"] = digest([FORMAT_VERSION, identity, size, content])
        write_text(partial / INDEX, dump(index | {"sha256": digest(index)}))
        os.rename(partial, place)
        kept = {INDEX}.union(*(block["sha256"] for block in blocks_of(index)))
        for leftover in [path for path in place.iterdir() if path.name not in kept]:  # what an unfinished store needs
            leftover.unlink()
    return index


def _block_size(size: tuple[int, int]) -> int:
    """Images a block, so that one of 16 bits stays below `BLOCK_BYTES`."""
    return min(max(BLOCK_BYTES // (2 * size[0] * size[1]), 1), BLOCK)


def _refuse_other(place: Path, found: dict[str, Any], source: dict[str, Any], size: tuple[int, int]) -> None:
    """What is there, whole or begun, must be of the same images."""
    remedy, was = f"remove {place} or name another folder by --out.", found.get("source", {})
    kind = "store begun" if place.suffix == ".partial" else "store"
    if found.get("format_version") != FORMAT_VERSION:
        raise ZooError(f"{place} is a {kind} by another version of zoo; {remedy}")
    if found["size"] != list(size) or was | {"files": source["files"]} != source:
        raise ZooError(f"{place} is a {kind} of other data or another size; {remedy}")
    if was["files"] != source["files"]:
        raise ZooError(f"The files of {source['name']} have changed since {place} was made of them; {remedy}")


def _names(broken: list[list[str]]) -> str:
    names = [name for name, _ in broken]
    return ", ".join(names[:5]) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """Nobody else prepares the same store meanwhile; what the disk refuses is told."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        lock = place.with_name(f".{place.name}.lock")
        with locked(lock, 0, f"Another process prepares {place}; wait for it, or name another folder by --out."):
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)  # while it is held: nobody else's
    except OSError as error:
        raise ZooError(f"{place} could not be written ({error}); what is done is kept for the next run.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _finished(stem: Path, skip_broken: bool) -> dict[str, Any] | None:
    """What is known of a block that an earlier run has written, if its files are whole and it may lack images."""
    block = _json(stem.with_suffix(".json"))
    if not block or (block["broken"] and not skip_broken):
        return None
    whole = all(file_hash(stem.with_name(name)) == sha256 for name, sha256 in block["sha256"].items())
    return block if whole else None


def _write_block(stem: Path, decoded: Iterable[tuple]) -> dict[str, Any]:
    images, masks, sha256 = [], [], {}
    block: dict[str, Any] = {"paths": [], "labels": [], "masks": [], "broken": [], "colour": 0, "emptied": 0}
    for path, label, found in decoded:
        if isinstance(found, str):
            block["broken"].append([path, found])
            continue
        image, mask, colour, emptied = found
        block["colour"] += colour
        block["emptied"] += emptied
        block["paths"].append(path)
        block["labels"].append(label)
        block["masks"].append(None if mask is None else len(masks))
        images.append(image)
        if mask is not None:
            masks.append(mask)
    if any(image.dtype == np.uint16 for image in images):
        images = [image if image.dtype == np.uint16 else image.astype(np.uint16) * 257 for image in images]
    for name, arrays in (f"{stem.name}.npy", images), (f"{stem.name}.masks.npy", masks):
        if arrays:
            sha256[name] = _save(stem.with_name(name), arrays)
    block["sha256"] = sha256
    write_text(stem.with_suffix(".json"), dump(block))
    return block


def _save(path: Path, arrays: list[np.ndarray]) -> str:
    """Write arrays of one shape as a file of their stack, which memory needs not hold; its SHA-256."""
    header = io.BytesIO()
    shape = (len(arrays), *arrays[0].shape)
    about = {"descr": np.lib.format.dtype_to_descr(arrays[0].dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, about)
    temporary, sha256 = path.with_name(f".{path.name}"), hashlib.sha256()
    with open(temporary, "wb") as file:
        for part in (header.getvalue(), *arrays):
            file.write(part)
            sha256.update(part)
    temporary.replace(path)
    return sha256.hexdigest()


def _decoded(
    rows: datasets.Dataset, view: View, size: tuple[int, int], workers: int, skip_broken: bool
) -> Iterator[tuple]:
    """(path, label, what `_shrink` makes of it or the reason why it can't be read), in order.

    Threads suffice: decoding and products of matrices let go of Python's lock, and nothing is copied between processes.
    """
    ahead: deque[Future] = deque()
    block_size = _block_size(size)
    step = max(block_size // 32, 1)  # images that a thread decodes at once
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            for first in range(0, len(rows), step):
                chunk = range(first, min(first + step, len(rows)))
                ahead.append(pool.submit(_decode, rows, view, chunk, size, skip_broken))
                if len(ahead) > max(block_size // step, workers):  # while a block is written
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _decode(rows: datasets.Dataset, view: View, chunk: range, size: tuple[int, int], skip_broken: bool) -> list[tuple]:
    columns, found = rows[chunk], []
    for values in zip(*columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        try:
            image, mask, name = read_row(row)
            kept = slice(len(image) - view.bar_rows(image, row["image"]))  # rows above the info bar
            item = _shrink(image[kept], None if mask is None else mask[kept], name, size)
        except ZooError as error:
            if not skip_broken:
                raise ZooError(f"{str(error).rstrip('.')}; or leave such images out by --skip-broken.") from error
            item = str(error)
        found.append((row["path"], row["label"], item))
    return found


def _shrink(array: np.ndarray, mask: np.ndarray | None, name: str, size: tuple[int, int]) -> tuple:
    """Image and mask at the working size, whether there was colour, and whether a defect got lost between pixels."""
    from zoo.image import to_tensor

    deep = array.dtype != np.uint8
    if array.dtype == np.float32:
        array = to_tensor(array, name).movedim(0, -1).numpy() * 65535  # checked to lie in [0, 1]
        array = array[..., 0] if array.shape[2] == 1 else array
    colour = array.ndim == 3 and not all(np.array_equal(array[..., 0], array[..., i]) for i in (1, 2))
    if array.ndim == 3:
        array = array.mean(2) if colour else array[..., 0]
    grey = resize_grey(array.astype(np.float32), size)
    grey = np.rint(grey, out=grey).astype(np.uint16 if deep else np.uint8, order="C")
    emptied = False
    if mask is not None:  # (H, W) -> (h, w), nearest
        rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, mask.shape, strict=True))
        small = mask[rows[:, None], columns]
        mask, emptied = small, bool(mask.any() and not small.any())
    return grey, mask, colour, emptied


def resize_grey(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """`zoo.image.resize` of one grey image (H, W) float32 -> (h, w), equal but for the last bits, in half the time.

    Each pixel that comes out sees a few that go in, so a dozen of them is a small product of matrices.
    """
    for length in size:  # rows, then columns
        if len(image) != length:
            shorter = np.empty((length, image.shape[1]), np.float32)
            for out, seen, weights in _bands(len(image), length):
                np.matmul(weights, image[seen], out=shorter[out])
            image = shorter
        image = image.T
    return image


@lru_cache(maxsize=16)
def _bands(before: int, after: int) -> list[tuple[slice, slice, np.ndarray]]:
    """Pixels that come out, what they see, and the weights of a triangle (bilinear, antialiased when it shrinks)."""
    scale = before / after
    support = max(scale, 1.0)
    centre = (np.arange(after) + 0.5) * scale
    bands = []
    for first in range(0, after, 12):
        middle = centre[first : first + 12, None]
        seen = slice(max(int(middle[0, 0] - support), 0), min(int(middle[-1, 0] + support) + 1, before))
        weights = np.maximum(1 - np.abs(np.arange(seen.start, seen.stop) + 0.5 - middle) / support, 0)
        weights /= weights.sum(1, keepdims=True)
        bands.append((slice(first, first + len(middle)), seen, weights.astype(np.float32)))
    return bands
