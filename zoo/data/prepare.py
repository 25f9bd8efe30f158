"""`zoo data prepare`: what it says, where the store goes, and when there is nothing to do."""

import contextlib
import os
from pathlib import Path
from typing import Any

from zoo import hub
from zoo.data import archives, check_data, files_digest, keep_source, load_data, miic_folder, store, store_writer
from zoo.data.ignore import FOLDER as IGNORED
from zoo.data.miic_layout import FOLDERS
from zoo.errors import ZooError
from zoo.image import read_image
from zoo.paths import user_path
from zoo.view import View, look_at, sample


def prepare_data(
    data: str,
    size: tuple[int, int],
    out: str | None,
    workers: int,
    skip_broken: bool,
    progress: bool,
    info_bar: str = "auto",
) -> Path:
    """Make the store of a data set, unless it is there already.

    Args:
        data: DATA specification.
        size: (height, width) of the stored images.
        out: folder of the store; None takes one under `$ZOO_HOME` that is named after the data.
        info_bar: "auto" leaves info bars out, "none" keeps them.

    Returns:
        The folder, which is DATA from then on.

    Raises:
        ZooError: another thing lies there, a mount point, or as `zoo.data.store_writer.prepare`.
    """
    if root := miic_folder(data):
        archives.unpack(root, FOLDERS, print)
    spec = check_data(data)
    if spec.kind == "store":
        raise ZooError(f"{data} is prepared already; use it as --data {data}.")
    source = {"name": spec.name, "fingerprint": spec.origin, "counts": spec.counts, "files": files_digest(spec)}
    view = _look(load_data(spec)["train"], info_bar)
    if info_bar == "none":
        source["info_bar"] = info_bar
    if any(rows for *_, rows in view.bars):
        source["bars"] = [list(bar) for bar in view.bars]
        view.say_bars(print)
    place = user_path(out) if out else hub.store_place(spec.name, spec.fingerprint, size)
    place = Path(os.path.realpath(place))  # a link stays one, whatever it leads to
    shape = size[0] if size[0] == size[1] else str(list(size)).replace(" ", "")
    following = f"Next: zoo fit METHOD --data {place} --input-size {shape} --name NAME"
    if index := store_writer.find(place, source, size, skip_broken):
        keep_source(spec, place)  # it may have moved
        _print_left_out(index)
        print(f"{data} is prepared already, and whole, in {place}.\n{following}")
        return place
    if place.is_mount():
        raise ZooError(f"{place} is a mount point, which can't be replaced; name a folder inside it by --out.")
    if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
        raise ZooError(f"{place} exists and is no store; name another folder by --out.")
    total = sum(map(sum, spec.counts.values()))
    megabytes = total * size[0] * size[1] / 1e6
    print(
        f"Preparing {total:,} images at {size[0]} x {size[1]}: {megabytes:,.0f} MB, twice that where they have 16 bits."
    )
    from rich.progress import Progress

    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Decoding", total=total)
        index = store_writer.prepare(
            load_data(spec),
            source,
            place,
            size,
            workers,
            skip_broken,
            lambda done: bar.update(task, completed=done),
            view,
        )
    keep_source(spec, place)
    _print_left_out(index)
    if spec.kind == "folder" and (spec.path / IGNORED).is_dir():
        print(f"The masks in {spec.path / IGNORED} are not kept; draw some at the stored size, for --ignore.")
    if colour := sum(block["colour"] for split in store.SPLITS for block in index["blocks"][split]):
        print(f"{colour:,} images are in colour; the store keeps the mean of their channels.")
    if emptied := sum(block.get("emptied", 0) for block in store.blocks_of(index)):
        print(f"{emptied:,} defects are too small to be seen in their masks at this size; their images stay anomalous.")
    kept = sum(map(sum, index["counts"].values()))
    print(f"Stored {kept:,} images in {place}.\n{following}")
    return place


def _look(rows: Any, info_bar: str) -> View:
    """The info bars of a set's training images; what can't be read is told later, in its turn."""
    images = []
    for row in sample(len(rows)):
        with contextlib.suppress(ZooError):
            read_image(image := rows[row]["image"])
            images.append(image)
    return look_at(View(), images, info_bar, "full")


def _print_left_out(index: dict[str, Any]) -> None:
    for name, reason in store.left_out(index):
        print(f"Left out {name}: {reason}")
