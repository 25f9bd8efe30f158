"""MIIC, the data set of the paper, through `datasets`: from the folder as its owner ships it, or its archives.

Huang et al., ICIP 2021; DR-NTU (Data), DOI 10.21979/N9/WBLTFI. `MIIC(data_dir=...)` is a builder as that library knows
them; `load_miic` gives the same rows without a copy on disk. Nothing of MIIC comes with the zoo.
"""

import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import datasets

from zoo.data import archives
from zoo.data.miic_layout import FOLDERS, PAIRS, TEST_PAIRS, Layout, files_digest, scan
from zoo.data.miic_truth import png, read_boxes, read_masks
from zoo.data.rows import features
from zoo.data.terms import show_terms, terms_of
from zoo.errors import ZooError
from zoo.image import read_image
from zoo.paths import absolute
from zoo.ranks import launched

Rows = dict[str, list[dict[str, Any]]]  # by split
_log = logging.getLogger(__name__)


class MIIC(datasets.GeneratorBasedBuilder):
    """`MIIC(data_dir=FOLDER).download_and_prepare()`, then `.as_dataset()`; nothing is downloaded.

    Configuration `default`: splits train and test with columns image, mask (lossless, 0 and 255; None of normal
    images), label (0 normal, 1 anomalous), path (relative, unique) and boxes (column, row, width, height in pixels,
    counted from 0). `inpainting` (`config_name="inpainting"`): columns abnormal, normal and path, in the same splits.
    Images are decoded once when it is made, and the log names those that can't be: their rows are there all the same.

    Args:
        data_dir: the folder that holds Anomaly_train and Anomaly_test; archives in it are unpacked there.

    Raises:
        ZooError: as `zoo.data.archives.unpack` and `zoo.data.miic_layout.scan`.
    """

    BUILDER_CONFIGS = [
        datasets.BuilderConfig(name="default", version="1.0.0", description="images, masks and boxes"),
        datasets.BuilderConfig(name="inpainting", version="1.0.0", description="pairs of abnormal and normal images"),
    ]
    DEFAULT_CONFIG_NAME = "default"

    def __init__(self, *args: Any, data_dir: str | os.PathLike, **options: Any):
        root = absolute(data_dir)
        archives.unpack(root, FOLDERS, lambda line: _log.warning("%s", line))
        self.layout = scan(root)
        # The library's own cache key is the name of the folder alone: what changed in it would not be noticed.
        key = f"{self.layout.name}-{files_digest(self.layout)[:16]}"
        super().__init__(*args, data_dir=str(root), hash=key, **options)

    def _info(self) -> datasets.DatasetInfo:
        columns = _pair_features(True) if self.config.name == "inpainting" else box_features(decode=True)
        if self.layout.name == "miic-replica":
            return datasets.DatasetInfo(description="An imitation of MIIC's layout.", features=columns)
        return datasets.DatasetInfo(
            description="SEM images of integrated circuits, with defects to be found by learning from normal ones.",
            features=columns,
            homepage="https://doi.org/10.21979/N9/WBLTFI",
            license=terms_of(self.layout.name),
        )

    def _split_generators(self, manager: Any) -> list[datasets.SplitGenerator]:
        rows = _pairs(self.layout) if self.config.name == "inpainting" else _rows(self.layout, boxes=True)
        if not rows:
            example = f"{PAIRS}/x_abnormal_1.jpg and x_normal_1.jpg"
            raise ZooError(f"{self.layout.root} has no pairs such as {example} without a test image.")
        return [datasets.SplitGenerator(name, gen_kwargs={"rows": found}) for name, found in rows.items()]

    def _generate_examples(self, rows: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
        with ThreadPoolExecutor() as pool:
            for row, reason in zip(rows, pool.map(_damage, rows), strict=True):
                if reason:
                    _log.warning("%s", reason)
                yield row["path"], row


def load_miic(root: str | os.PathLike, boxes: bool = False) -> datasets.DatasetDict:
    """MIIC's folder as a data set: splits train and test, columns image, mask, label, path; images stay paths.

    What is not as it should be is told by the log.

    Args:
        root: the folder, unpacked.
        boxes: whether there is a column of them too.

    Raises:
        ZooError: as `scan`.
    """
    return _dataset(_rows(scan(root), boxes), box_features() if boxes else features())


def load_pairs(root: str | os.PathLike) -> datasets.DatasetDict:
    """The pairs for inpainting: columns abnormal, normal and path; splits train and test, as far as they are there."""
    return _dataset(_pairs(scan(root)), _pair_features())


def box_features(decode: bool = False) -> datasets.Features:
    """Columns of the set with boxes; `decode` for images as PIL's, else as paths or bytes."""
    box = datasets.List(datasets.Value("int32"), length=4)
    return features(datasets.Image(decode=decode), boxes=datasets.List(box))


def _pair_features(decode: bool = False) -> datasets.Features:
    image = datasets.Image(decode=decode)
    return datasets.Features(abnormal=image, normal=image, path=datasets.Value("string"))


def _dataset(rows: Rows, columns: datasets.Features) -> datasets.DatasetDict:
    return datasets.DatasetDict(
        {split: datasets.Dataset.from_list(found, features=columns) for split, found in rows.items()}
    )


def _rows(layout: Layout, boxes: bool) -> Rows:
    """Terms are shown at first use, and what is odd goes to the log, from the first of several processes."""
    show_terms(layout.name)
    masks, notes = read_masks(layout)
    found: dict[str, Any] = {}
    if boxes:
        found, source = read_boxes(layout, masks)
        notes.append(source)
    if not launched()[0]:
        for note in (*layout.notes, *notes):
            _log.warning("%s", note)
    rows: Rows = {}
    for split, items in layout.splits.items():
        rows[split] = []
        for item in items:
            # A mask that can't be read stays a file, so that reading its row names it.
            mask = {"bytes": png(masks[item.name])} if item.name in masks else item.mask
            row = {"image": item.path, "mask": mask, "label": item.label, "path": item.name}
            rows[split].append(row | ({"boxes": found.get(item.name, [])} if boxes else {}))
    return rows


def _pairs(layout: Layout) -> Rows:
    """Splits without a pair are left out."""
    show_terms(layout.name)
    folders = {"train": PAIRS, "test": TEST_PAIRS}
    return {
        split: [{"abnormal": str(a), "normal": str(n), "path": f"{folders[split]}/{a.name}"} for a, n in pairs]
        for split, pairs in layout.pairs.items()
        if pairs
    }


def _damage(row: dict[str, Any]) -> str | None:
    """Why an image of a row can't be read."""
    for column in {"image", "mask", "abnormal", "normal"} & row.keys():
        if isinstance(row[column], str):  # a mask that could be read is none
            try:
                read_image(row[column])
            except ZooError as error:
                return str(error)
    return None
