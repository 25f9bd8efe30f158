"""DATA, one thing everywhere: a specification string -> a `datasets` object with splits train and test.

Columns: image (encoded or array), mask (or None), label (0 normal, 1 anomalous), path (a name unique in the set).
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.checkpoint import write_text
from zoo.data import folder, miic_layout, parquet, store, synthetic
from zoo.data.ignore import FOLDER as IGNORED
from zoo.data.ignore import IgnoreMasks
from zoo.data.terms import show_terms
from zoo.errors import ZooError
from zoo.pairs import Pair
from zoo.paths import absolute, user_path

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

SOURCE = "source.txt"  # in a store: the DATA that it was made from
SYNTHETIC_VERSION = 4  # to be raised when the generator draws other images from the same options
FORMS = "synthetic[:k=v,...], miic:DIR, hub:ORG/NAME[@REV], or a path to a folder (of images, prepared, or exported)"
RESERVED = ("miic", "miic-partial", "miic-replica", "synthetic")  # names in records that no folder of images may have


@dataclass(frozen=True)
class DataSpec:
    """A checked specification; the images are not opened yet.

    Attributes:
        kind: synthetic, miic, hub, store, parquet or folder.
        name: as it may be published: the specification, that of `RESERVED` which fits MIIC's layout, or a folder's own
            name without its place.
        fingerprint: SHA-256 over names, labels and sizes (or the options of a generator), the same on each machine.
        counts: images by split and label: {"train": [normal, anomalous], "test": [...]}.
        options: of the generator, or `repo` and `revision` (a commit) of the hub.
        origin: fingerprint of what a store or an export was made from; else the same as `fingerprint`.
        pairs: paths of the set's own pairs of abnormal and clean images to train on, where they are files.
    """

    kind: str
    name: str
    fingerprint: str
    counts: dict[str, list[int]]
    options: dict[str, Any] | None = None
    path: Path | None = None
    source: str | None = None
    pairs: tuple[Pair, ...] = ()

    @property
    def origin(self) -> str:
        return self.source or self.fingerprint


def check_data(spec: str) -> DataSpec:
    """Check a DATA specification as far as that goes without opening an image; imports neither torch nor datasets.

    Raises:
        ZooError: no such folder or repository, no known layout, an unknown option, a missing mask, each named.
    """
    kind, _, rest = spec.partition(":")
    if kind == "synthetic":
        return _check_synthetic(spec, rest)
    if root := miic_folder(spec):
        layout = miic_layout.scan(root)
        identity, counts = folder.fingerprint(layout.splits), _counts(layout.splits)
        return DataSpec("miic", layout.name, identity, counts, path=layout.root, pairs=tuple(layout.pairs["train"]))
    if kind == "hub" and not Path(spec).exists():
        repo, revision = parquet.parse_repo(_needed(rest, "hub:ORG/NAME"))
        place = parquet.fetch(repo, revision)
        return _check_parquet("hub", place, {"repo": repo, "revision": place.name})
    path = user_path(spec)
    if (path / store.INDEX).is_file():
        index = store.read_index(path)
        source = index["source"]["fingerprint"]
        return DataSpec("store", index["name"], index["fingerprint"], index["counts"], path=path, source=source)
    if (path / parquet.INDEX).is_file():
        return _check_parquet("parquet", path, None)
    if ":" in spec and not path.exists():
        raise ZooError(f"There is no data {spec}; DATA is {FORMS}.")
    splits = folder.scan(path)
    name = path.resolve().name
    name = f"folder {name}" if name.casefold().partition(":")[0] in RESERVED else name
    return DataSpec("folder", name, folder.fingerprint(splits), _counts(splits), path=path)


def load_data(spec: str | DataSpec) -> "DatasetDict":
    """The `datasets.DatasetDict` of a DATA specification; images stay where they are until they are read.

    Raises:
        ZooError: as `check_data`; a damaged file of parquet.
    """
    spec = check_data(spec) if isinstance(spec, str) else spec
    show_terms(spec.name)  # of a copy, a store or an export too
    if spec.kind == "synthetic":
        return synthetic.load_synthetic(**spec.options)
    if spec.kind == "miic":
        from zoo.data.miic import load_miic

        return load_miic(spec.path)
    if spec.kind in ("hub", "parquet"):
        return parquet.load_parquet(_place(spec, "data/*.parquet"))
    return store.load_store(spec.path) if spec.kind == "store" else folder.load_folder(spec.path)


def image_of(data: str, name: str) -> Any:
    """One image of a DATA specification by its name, encoded or as an array.

    Raises:
        ZooError: as `load_data`, or there is no image of this name.
    """
    for rows in load_data(data).values():
        names = rows.with_format(None)["path"]
        if name in names:
            return rows[names.index(name)]["image"]
    raise ZooError(f"{data} has no image {name}.")


def load_pairs(spec: DataSpec) -> list[Pair]:
    """The set's own pairs of abnormal and clean images to train on; none where it has none at hand.

    Those of a parquet form are in memory: 76 MB for as many as MIIC has. Those of a store are in the folder that it was
    made from, as long as that is there and unchanged.

    Raises:
        ZooError: a damaged file of parquet.
    """
    if spec.kind in ("hub", "parquet"):
        return parquet.load_pairs(_place(spec, f"{parquet.PAIRS}*.parquet"))
    source = _source(spec) if spec.kind == "store" else spec
    return list(source.pairs) if source else []


def encoded(spec: DataSpec, rows: "Dataset") -> list[Any]:
    """The images of some rows as files or bytes, those of a store as the files that it was made from."""
    source = _source(spec) if spec.kind == "store" else None
    return [source.path / name for name in rows["path"]] if source else rows["image"]


def load_ignore(
    spec: DataSpec, place: str | None, say: Callable[[str], None] = lambda line: None
) -> IgnoreMasks | None:
    """The ignore masks that are asked for, else those in a folder of images, else none; how many is said.

    Raises:
        ZooError: as `IgnoreMasks`, and masks of which none fits an image of the set.
    """
    if place is None and spec.kind == "folder" and (spec.path / IGNORED).is_dir():
        place = spec.path / IGNORED
    if place is None:
        return None
    masks = IgnoreMasks(place)
    masks.check([name for rows in load_data(spec).values() for name in rows.with_format(None)["path"]], say)
    return masks


def keep_source(spec: DataSpec, store_folder: Path) -> None:
    """Let a store know which folder of MIIC it was made from, on this machine, for the sake of its pairs."""
    if spec.kind == "miic":
        write_text(store_folder / SOURCE, f"miic:{spec.path}\n")


def _source(spec: DataSpec) -> DataSpec | None:
    """What a store was made from, if it is known, there, and still the same."""
    mark = spec.path / SOURCE
    try:
        source = check_data(mark.read_text(encoding="utf-8").strip()) if mark.is_file() else None
    except ZooError:
        return None
    return source if source and source.fingerprint == spec.origin else None


def files_digest(spec: DataSpec, further: bool = False) -> str | None:
    """A digest of the times of a data set's files, on this machine alone; None where it isn't files of images.

    Args:
        further: of MIIC's boxes and pairs too, besides images and masks.
    """
    if spec.kind == "miic":
        layout = miic_layout.scan(spec.path)
        if further:
            return miic_layout.files_digest(layout)
        return folder.times_digest(layout.root, folder.paths_of(layout.splits))
    if spec.kind == "folder":
        return folder.times_digest(absolute(spec.path), folder.paths_of(folder.scan(spec.path)))
    return None


def located(spec: str) -> str:
    """DATA as it is found from any working folder of this machine: with its path, if it has one, absolute."""
    if root := miic_folder(spec):
        return f"miic:{root}"
    path = user_path(spec)
    return str(absolute(path)) if path.exists() else spec


def miic_folder(spec: str) -> Path | None:
    """DIR of `miic:DIR`, absolute; None if DATA is another thing.

    Raises:
        ZooError: it names nothing, or a user who isn't there.
    """
    kind, _, rest = spec.partition(":")
    return absolute(_needed(rest, "miic:DIR")) if kind == "miic" and not Path(spec).exists() else None


def _place(spec: DataSpec, pattern: str) -> Path:
    """The folder of a parquet form, with the files of a pattern where it comes from the hub."""
    return parquet.fetch(**spec.options, pattern=pattern) if spec.kind == "hub" else spec.path


def _check_synthetic(spec: str, rest: str) -> DataSpec:
    options = synthetic.DEFAULTS | synthetic.parse_options(rest)
    text = json.dumps([SYNTHETIC_VERSION, options], sort_keys=True)
    counts = {"train": [options["train"], options["train_defect"]], "test": [options["good"], options["defect"]]}
    return DataSpec("synthetic", spec, hashlib.sha256(text.encode()).hexdigest(), counts, options)


def _check_parquet(kind: str, place: Path, options: dict[str, Any] | None) -> DataSpec:
    index = parquet.read_index(place)
    identity, source = parquet.fingerprint(index), index["fingerprint"]
    return DataSpec(kind, index["name"], identity, index["counts"], options, place, source)


def _counts(splits: dict[str, list[folder.Item]]) -> dict[str, list[int]]:
    return {split: [sum(item.label == label for item in items) for label in (0, 1)] for split, items in splits.items()}


def _needed(rest: str, form: str) -> str:
    if not rest:
        raise ZooError(f"--data {form.partition(':')[0]}: names nothing; write {form}. DATA is {FORMS}.")
    return rest
