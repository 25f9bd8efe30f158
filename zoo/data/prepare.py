"""`zoo data prepare`: what it says, where the store goes, and when there is nothing to do."""

from pathlib import Path

from zoo import hub
from zoo.data import check_data, load_data, store
from zoo.errors import ZooError


def prepare_data(
    data: str, size: tuple[int, int], out: str | None, workers: int, skip_broken: bool, progress: bool
) -> Path:
    """Make the store of a data set, unless it is there already.

    Args:
        data: DATA specification.
        size: (height, width) of the stored images.
        out: folder of the store; None takes one under `$ZOO_HOME` that is named after the data.

    Returns:
        The folder, which is DATA from then on.

    Raises:
        ZooError: another thing lies there, or as `zoo.data.store.prepare`.
    """
    spec = check_data(data)
    if spec.path is not None and (spec.path / store.INDEX).is_file():
        raise ZooError(f"{data} is prepared already; use it as --data {data}.")
    source = {"name": spec.name, "fingerprint": spec.fingerprint, "counts": spec.counts}
    place = Path(out).expanduser().absolute() if out else hub.store_place(spec.name, spec.fingerprint, size)
    shape = size[0] if size[0] == size[1] else str(list(size)).replace(" ", "")
    following = f"Next: zoo fit METHOD --data {place} --input-size {shape} --name NAME"
    if (place / store.INDEX).is_file():
        index = store.read_index(place)
        if index["source"] != source or index["size"] != list(size):
            raise ZooError(f"{place} holds other data or another size; remove it or name another folder by --out.")
        damaged = store.damaged_blocks(place)
        if damaged:
            raise ZooError(f"{place / damaged[0]} is missing or damaged; remove {place} and prepare the data anew.")
        print(f"{data} is prepared already, and whole, in {place}.\n{following}")
        return place
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise ZooError(f"{place} exists and is no store; name another folder by --out.")
    total = sum(map(sum, spec.counts.values()))
    print(f"Preparing {total:,} images at {size[0]} x {size[1]}: {total * size[0] * size[1] / 1e6:,.0f} MB at 8 bits.")
    from rich.progress import Progress

    with Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task("Decoding", total=total)
        index = store.prepare(
            load_data(spec), source, place, size, workers, skip_broken, lambda done: bar.update(task, completed=done)
        )
    blocks = [block for split in store.SPLITS for block in index["blocks"][split]]
    for name, reason in (broken for block in blocks for broken in block["broken"]):
        print(f"Left out {name}: {reason}")
    if colour := sum(block["colour"] for block in blocks):
        print(f"{colour:,} images are in colour; the store keeps the mean of their channels.")
    kept = sum(map(sum, index["counts"].values()))
    print(f"Stored {kept:,} images in {place}.\n{following}")
    return place
