"""Which normal images of a data set a model has not seen: those that may judge it."""

from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict

from zoo import checkpoint
from zoo.calibration import TooFewNormals
from zoo.data import DataSpec
from zoo.errors import ZooError
from zoo.run import RunOptions
from zoo.seen import FILE, digests, read_seen
from zoo.view import View


class Unseen(NamedTuple):
    """Distinct normal images that had no say in a model's weights.

    Attributes:
        parts: their rows, split by split.
        digests: of each by its name; "" of one that can't be read.
        repeated: how many copies of them were left out.
        seen: how many were left out as the fit or the selection has seen them, under this name or another one.
        known: how many were left out as they were known already.
        checked: whether their content could be held against what the model has seen.
        own: whether they are of the data that the model was fitted on.
    """

    parts: list[Dataset]
    digests: dict[str, str]
    repeated: int
    seen: int
    known: int
    checked: bool
    own: bool


def unseen_normals(
    data: DatasetDict,
    spec: DataSpec,
    folder: Path | None,
    view: View,
    num_workers: int,
    run: RunOptions,
    known: Collection[str] | None = None,
) -> Unseen:
    """The distinct normal images of a data set, without what the fit of a model or its selection has seen.

    Args:
        folder: the model's own; None: what it has seen can't be checked.
        known: digests of images to leave out as well. Where they are given, data that the model was not fitted on may
            hold images that it has seen, which are left out too.

    Raises:
        ZooError: there is none (`TooFewNormals`); or, without `known`, others' data some of which the model has seen.
    """
    seen, own = read_seen(folder) if folder else None, folder is not None and _is_own(spec, folder)
    if seen is None and own:
        raise ZooError(
            f"The model was fitted on this data and has no private/{FILE} to tell on which images; give it others."
        )
    if seen is None:
        run.say(f"Whether the model has seen these images can't be checked: it has no private/{FILE}.")
    checked = seen is not None and _parents_are_known(folder)
    if seen is not None and not checked:
        run.say(f"Whether a model that this one goes on from has seen them can't be checked: it had no private/{FILE}.")
    names, contents = seen or (set(), set())
    parts, kept, again, taken, repeated, by_name, before = [], {}, [], set(), 0, 0, 0
    for rows in data.values():
        normals = _normals(rows)
        rows = _without(normals, names if own else set())
        by_name += len(normals) - len(rows)
        found = digests(rows, view, num_workers, run.progress)
        again += [name for name, content in zip(_names(rows), found, strict=True) if content in contents]
        fresh = [row for row, content in enumerate(found) if content not in contents]
        new = [row for row in fresh if not (found[row] and found[row] in (known or ()))]
        first = [row for row in new if _is_first(found[row], taken)]
        part = rows.select(first)
        parts.append(part)
        kept |= zip(_names(part), (found[row] for row in first), strict=True)
        before += len(fresh) - len(new)
        repeated += len(new) - len(first)
    if again and not own and known is None:
        raise ZooError(
            f"{len(again):,} of these normal images had a say in the model's weights (such as {again[0]}): give images "
            "that it hasn't seen, or the fit's own --data, of which it takes what was held out."
        )
    if not kept:
        what = "that the model hasn't seen" if known is None else "that is new to the model"
        raise TooFewNormals(f"--data {spec.name} has no normal image {what}; add some.")
    _say_left_out(run, len(again) + (by_name if known is not None else 0), before, repeated, own and known is None)
    return Unseen(parts, kept, repeated, by_name + len(again), before, checked, own)


def _say_left_out(run: RunOptions, again: int, before: int, repeated: int, renamed: bool) -> None:
    if again:
        under = "under other names, the fit" if renamed else "the fit"
        run.say(f"{_images(again)} left out: {under} or the selection has seen {'it' if again == 1 else 'them'}.")
    if before:
        run.say(f"{_images(before)} left out: the model was calibrated on {'it' if before == 1 else 'them'}.")
    if repeated:
        copies = "a copy of another one" if repeated == 1 else "copies of others"
        run.say(f"{_images(repeated)} {copies}; each counts once.")


def _images(count: int) -> str:
    return "1 image is" if count == 1 else f"{count:,} images are"


def _normals(rows: Dataset) -> Dataset:
    labels = rows.with_format(None)["label"]
    return rows.select([i for i, label in enumerate(labels) if not label])


def _without(rows: Dataset, names: set[str]) -> Dataset:
    return rows.select([i for i, name in enumerate(_names(rows)) if name not in names])


def _names(rows: Dataset) -> list[str]:
    return rows.with_format(None)["path"]


def _is_first(content: str, taken: set[str]) -> bool:
    """Whether an image comes for the first time, as one that can't be read always does: scoring it will tell."""
    is_first = not content or content not in taken
    taken.add(content)
    return is_first


def _parents_are_known(folder: Path) -> bool:
    return checkpoint.read_record(folder).get("parent", {}).get("checked", True)


def _is_own(spec: DataSpec, folder: Path) -> bool:
    """Whether a model was fitted on this data, or another form of it."""
    about = checkpoint.read_record(folder).get("train_data", {})
    return bool({about.get("fingerprint"), about.get("origin")} & {spec.fingerprint, spec.origin})
