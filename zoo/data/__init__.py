"""DATA, one thing everywhere: a specification string -> a `datasets` object with splits train and test.

Columns: image (encoded or array), mask (or None), label (0 normal, 1 anomalous), path (a name unique in the set).
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.data import folder, store, synthetic
from zoo.errors import ZooError

if TYPE_CHECKING:
    from datasets import DatasetDict

SYNTHETIC_VERSION = 4  # to be raised when the generator draws other images from the same options
FORMS = "synthetic[:k=v,...] or a path to a folder (of images, or prepared)"


@dataclass(frozen=True)
class DataSpec:
    """A checked specification; the images are not opened yet.

    Attributes:
        name: as it may be published: the specification, or a folder's own name without its place.
        fingerprint: SHA-256 over names, labels and sizes (or the options of a generator).
        counts: images by split and label: {"train": [normal, anomalous], "test": [...]}.
        origin: fingerprint of what a store was prepared from; else the same as `fingerprint`.
    """

    name: str
    fingerprint: str
    counts: dict[str, list[int]]
    options: dict[str, Any] | None
    path: Path | None
    source: str | None = None

    @property
    def origin(self) -> str:
        return self.source or self.fingerprint


def check_data(spec: str) -> DataSpec:
    """Check a DATA specification as far as that goes without opening an image; imports neither torch nor datasets.

    Raises:
        ZooError: no such folder, no known layout, an unknown option, a missing mask, each named.
    """
    kind, _, rest = spec.partition(":")
    if kind == "synthetic":
        options = synthetic.DEFAULTS | synthetic.parse_options(rest)
        text = json.dumps([SYNTHETIC_VERSION, options], sort_keys=True)
        defects = options["defect"]
        counts = {"train": [options["train"], options["train_defect"]], "test": [options["good"], defects]}
        return DataSpec(spec, hashlib.sha256(text.encode()).hexdigest(), counts, options, None)
    if kind in ("miic", "hub") and not Path(spec).exists():
        raise ZooError(f"--data {spec}: this version reads {FORMS}.")
    path = Path(spec).expanduser()
    if (path / store.INDEX).is_file():
        index = store.read_index(path)
        return DataSpec(
            index["name"], index["fingerprint"], index["counts"], None, path, index["source"]["fingerprint"]
        )
    splits = folder.scan(path)
    counts = {
        split: [sum(item.label == label for item in items) for label in (0, 1)] for split, items in splits.items()
    }
    return DataSpec(path.resolve().name, folder.fingerprint(splits), counts, None, path)


def load_data(spec: str | DataSpec) -> "DatasetDict":
    """The `datasets.DatasetDict` of a DATA specification; images stay where they are until they are read.

    Raises:
        ZooError: as `check_data`.
    """
    spec = check_data(spec) if isinstance(spec, str) else spec
    if spec.path is None:
        return synthetic.load_synthetic(**spec.options)
    return store.load_store(spec.path) if (spec.path / store.INDEX).is_file() else folder.load_folder(spec.path)
