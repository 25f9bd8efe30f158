"""MIIC's folder as its owner ships it: what is trained on, what is tested, and what is odd about it.

    Anomaly_train/*.jpg                   train_normal_*, and copies of all test images, anomalies included
    Anomaly_test/normal_img/*.jpg
    Anomaly_test/abnormal_img/*.jpg
    Anomaly_test/abnormal_mask/*_mask.jpg
    Anomaly_test/abnormal_bbox/*_bbox.jpg, anomalyPosition.mat
    Inpainting_train/*.jpg, Inpainting_test/*.jpg    pairs of abnormal and normal images

Names are `<split>_<class>_<number>`. No image is decoded here, and neither torch nor datasets is imported.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from zoo.data import archives
from zoo.data.folder import Item
from zoo.errors import ZooError
from zoo.image import EXTENSIONS
from zoo.pairs import abnormal_and_clean

TRAIN, TEST, PAIRS, TEST_PAIRS = FOLDERS = ("Anomaly_train", "Anomaly_test", "Inpainting_train", "Inpainting_test")
NORMAL, ABNORMAL = f"{TEST}/normal_img", f"{TEST}/abnormal_img"
MASKS, BOXES, POSITIONS = f"{TEST}/abnormal_mask", f"{TEST}/abnormal_bbox", f"{TEST}/anomalyPosition.mat"
COUNTS = {"training": 23_888, "normal test": 1_272, "abnormal test": 116}  # the paper prints 1,274 normals
REPLICA = "REPLICA"  # a file of this name at the root: an imitation, whose figures are not MIIC's
_NAME = re.compile(r"(train|test)_(normal|abnormal)_\d+")


class Layout(NamedTuple):
    """What a folder holds.

    Attributes:
        root: absolute.
        name: "miic", or "miic-replica" for an imitation that says so.
        splits: images of train and test, sorted by name.
        pairs: folder of training pairs for inpainting, where their names are understood.
        notes: sentences about what is not as it should be.
    """

    root: Path
    name: str
    splits: dict[str, list[Item]]
    pairs: Path | None
    notes: list[str]


class _File(NamedTuple):
    name: str  # relative to the root, with slashes
    path: str
    size: int
    mtime_ns: int

    @property
    def stem(self) -> str:
        return self.name.rsplit("/", 1)[-1].rsplit(".", 1)[0]


def scan(root: str | os.PathLike) -> Layout:
    """List MIIC's images and prove that none is both trained on and tested.

    Trained on is what is called `train_normal_*`, less each name that the test folders have too and each file whose
    bytes are those of a test image: such a copy is taken out of training, never out of the test set, so that figures
    stay comparable and honest. It is named in the notes. A copy that was encoded anew is not found.

    Raises:
        ZooError: a folder is missing, packed or empty, an image lies in the folder of another class, a mask is
            missing or fits no image.
    """
    root = Path(os.path.abspath(Path(root).expanduser()))
    _check_folders(root)
    normals, defects = _images(root, NORMAL), _images(root, ABNORMAL)
    _check_classes(root, normals, "normal")
    _check_classes(root, defects, "abnormal")
    masks = _by_stem(root, MASKS, "_mask", {file.stem for file in defects})
    if masks and (missing := next((file for file in defects if file.stem not in masks), None)):
        raise ZooError(f"{missing.path} has no mask in {root / MASKS}; unpack {TEST} again or add it")
    train, notes = _training(root, [*normals, *defects])
    if defects and not masks:
        notes.append(f"{MASKS} holds no masks: nothing can be said about pixels.")
    notes += _miscounted({"training": train, "normal test": normals, "abnormal test": defects})
    pairs = _pairs(root, [*normals, *defects], notes)
    splits = {
        "train": [Item(file.path, file.name, 0, None) for file in train],
        "test": [Item(file.path, file.name, 1, masks.get(file.stem)) for file in defects]
        + [Item(file.path, file.name, 0, None) for file in normals],
    }
    splits = {split: sorted(items, key=lambda item: item.name) for split, items in splits.items()}
    return Layout(root, "miic-replica" if (root / REPLICA).is_file() else "miic", splits, pairs, notes)


def box_images(layout: Layout) -> dict[str, str]:
    """Stem of an abnormal image -> path of the picture of its boxes.

    Raises:
        ZooError: a picture that belongs to no image.
    """
    stems = {Path(item.name).stem for item in layout.splits["test"] if item.label}
    return _by_stem(layout.root, BOXES, "_bbox", stems)


def files_hash(root: Path) -> str:
    """SHA-256 (hex) of names, sizes and modification times of all files below a folder, for caches on this machine."""
    lines = []
    for here, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = os.path.join(here, name)
            status = os.stat(path, follow_symlinks=False)
            lines.append((os.path.relpath(path, root), status.st_size, status.st_mtime_ns))
    return hashlib.sha256("\n".join(map(repr, lines)).encode()).hexdigest()


def _check_folders(root: Path) -> None:
    if not root.is_dir():
        raise ZooError(f"miic:{root} is not a folder; give the one that holds {TRAIN} and {TEST}, or MIIC's archives")
    missing = [name for name in (TRAIN, NORMAL, ABNORMAL) if not (root / name).is_dir()]
    if not missing:
        return
    if packed := archives.packed(root, (TRAIN, TEST)):
        names = " and ".join(path.name for path in packed.values())
        raise ZooError(f"{root} holds {names}, not unpacked; unpack: zoo data prepare miic:{root}")
    near = [root.parent, *(path for path in sorted(root.glob("*")) if path.is_dir())]
    found = next((path for path in near if (path / TRAIN).is_dir() and (path / TEST).is_dir()), None)
    hint = f"did you mean miic:{found}?" if found else f"MIIC's folder holds {TRAIN} and {TEST}, or their archives"
    raise ZooError(f"{root / missing[0]} does not exist; {hint}")


def _images(root: Path, folder: str) -> list[_File]:
    """The images of one folder, sorted by name; none if there is no such folder."""
    try:
        with os.scandir(root / folder) as listing:
            entries = [e for e in listing if not e.name.startswith(".") and e.is_file()]
            statuses = [entry.stat() for entry in entries]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ZooError(f"{root / folder} cannot be listed ({error.strerror}); check its permissions") from None
    return sorted(
        _File(f"{folder}/{entry.name}", entry.path, status.st_size, status.st_mtime_ns)
        for entry, status in zip(entries, statuses, strict=True)
        if os.path.splitext(entry.name)[1].lower() in EXTENSIONS
    )


def _check_classes(root: Path, files: list[_File], wanted: str) -> None:
    """By the class in the name, as a pattern such as *normal_* also fits abnormal."""
    if not files:
        folder = root / (NORMAL if wanted == "normal" else ABNORMAL)
        raise ZooError(f"{folder} holds no images; unpack {TEST} again")
    for file in files:
        if (match := _NAME.fullmatch(file.stem)) and match[2] != wanted:
            raise ZooError(f"{file.path} is called {match[2]} among {wanted} images; move it to where it belongs")


def _by_stem(root: Path, folder: str, ending: str, stems: set[str]) -> dict[str, str]:
    """Stem of an image -> path of what is called `<stem><ending>`, never by two sorted lists."""
    found = {}
    for file in _images(root, folder):
        stem = file.stem.removesuffix(ending)
        if stem not in stems:
            raise ZooError(f"{file.path} belongs to no image in {root / ABNORMAL}; rename or remove it")
        found[stem] = file.path
    return found


def _training(root: Path, tested: list[_File]) -> tuple[list[_File], list[str]]:
    """The images to train on, and what is to be said about the others."""
    names, notes = {file.stem for file in tested}, []
    files = _images(root, TRAIN)
    parsed = {file: match and match.groups() for file in files for match in [_NAME.fullmatch(file.stem)]}
    train = [file for file in files if parsed[file] == ("train", "normal") and file.stem not in names]
    odd = [file for file in files if parsed[file] is None or parsed[file] == ("train", "abnormal")]
    if odd:
        verb = "files are" if len(odd) > 1 else "file is"
        notes.append(f"{len(odd):,} {verb} left out of training, not called train_normal_<number>: {_few(odd)}.")
    copies = _copies(train, tested)
    if copies:
        pairs = [f"{file.name} of {other.name}" for file, other in copies.items()]
        more = f" and {len(pairs) - 5:,} more" if len(pairs) > 5 else ""
        notes.append(f"Left out of training, being copies of test images: {', '.join(pairs[:5])}{more}.")
    train = [file for file in train if file not in copies]
    if not train:
        hint = f"the first of its {len(files):,} images is {files[0].name}" if files else "it holds no images"
        raise ZooError(f"{root / TRAIN} has no train_normal_<number> that is no test image; {hint}")
    return train, notes


def _copies(files: list[_File], tested: list[_File]) -> dict[_File, _File]:
    """Files with the bytes of a test image; only those of equal size are read."""
    by_size = defaultdict(list)
    for file in tested:
        by_size[file.size].append(file)
    copies = {}
    for file in files:
        same = [other for other in by_size.get(file.size, ()) if _content(*other[1:]) == _content(*file[1:])]
        if same:
            copies[file] = same[0]
    return copies


@lru_cache(maxsize=1 << 16)
def _content(path: str, size: int, mtime_ns: int) -> bytes:
    """SHA-256 of a file as it was at that time, read once a process."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError as error:
        raise ZooError(f"{path} cannot be read ({error.strerror}); restore it") from None


def _miscounted(found: dict[str, list[_File]]) -> list[str]:
    notes = []
    for kind, files in found.items():
        if difference := len(files) - COUNTS[kind]:
            more = f"{abs(difference):,} {'more' if difference > 0 else 'fewer'}"
            notes.append(f"There are {len(files):,} {kind} images, {more} than MIIC's {COUNTS[kind]:,}.")
    return notes


def _pairs(root: Path, tested: list[_File], notes: list[str]) -> Path | None:
    if archives.packed(root, [PAIRS]):
        notes.append(f"{PAIRS} is not unpacked; zoo data prepare miic:{root} does it.")
    files = _images(root, PAIRS)
    if copies := _copies(files, tested):
        notes.append(f"{len(copies):,} images of {PAIRS} are test images too: {_few(copies)}.")
    if abnormal_and_clean(root / PAIRS):
        return root / PAIRS
    if files:
        notes.append(f"{PAIRS} has no pairs by name, abnormal and normal, and is left aside: {_few(files)}.")
    return None


def _few(files: Iterable[_File]) -> str:
    names = [file.name for file in files]
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")
