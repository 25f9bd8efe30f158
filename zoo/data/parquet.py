"""A data set as parquet files, on disk or in a repository of the hub: bytes embedded, images as they were encoded.

A folder of `zoo.json` (name, fingerprint, counts, SHA-256 of each file and of itself), `data/<split>-*.parquet` and,
for readers, `README.md`, `halves.json` and pairs for inpainting where there are some. `zoo.data.export` writes it;
`datasets.load_dataset` reads it, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo import hub
from zoo.data.rows import features
from zoo.data.store import SPLITS, digest, file_hash
from zoo.errors import ZooError
from zoo.pairs import Pair

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 1
INDEX = "zoo.json"
COLUMNS = ("image", "mask", "label", "path")
PAIRS = "inpainting/train-"  # of abnormal and clean images: how their files begin
_FILE = re.compile(r"(data|inpainting)/(train|test)-\d{5}-of-\d{5}\.parquet")


def read_index(place: Path) -> dict[str, Any]:
    """The checked `zoo.json` of a folder of parquet files.

    Raises:
        ZooError: damaged, of another format, or one that no export writes, such as files elsewhere.
    """
    path, remedy = place / INDEX, "write the folder anew: zoo data export DATA --out FOLDER."
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZooError(f"{path} is damaged; {remedy}") from error
    if version != FORMAT_VERSION:
        raise ZooError(f"{path} has format version {version}, not {FORMAT_VERSION}; {remedy}")
    if index.pop("sha256", None) != digest(index) or not _is_sound(index):
        raise ZooError(f"{path} is damaged; {remedy}")
    return index


def fingerprint(index: dict[str, Any]) -> str:
    """SHA-256 (hex) of what was exported and of each file; the same wherever the folder lies."""
    return digest([FORMAT_VERSION, *(index[key] for key in ("name", "fingerprint", "counts", "files"))])


def load_parquet(place: Path) -> datasets.DatasetDict:
    """The folder as a data set: splits train and test, columns image, mask, label, path; images stay encoded.

    `datasets` keeps its own copy, which it maps into memory, under `$ZOO_HOME/datasets`.

    Raises:
        ZooError: a file that is missing or differs from its SHA-256.
    """
    import datasets

    index = read_index(place)
    files = {split: checked_files(place, index, f"data/{split}-") for split in SPLITS}
    kept = {split: [str(path) for path in paths] for split, paths in files.items() if sum(index["counts"][split])}
    with _quiet_datasets():
        found = datasets.load_dataset(
            "parquet",
            data_files=kept,
            columns=list(COLUMNS),  # boxes and whatever else there is stay in the files
            features=features(),
            cache_dir=str(hub.registry().parent / "datasets"),
        )
    empty = datasets.Dataset.from_dict({name: [] for name in COLUMNS}, features=features())
    return datasets.DatasetDict({split: found.get(split, empty) for split in SPLITS})


def load_pairs(place: Path) -> list[Pair]:
    """The pairs to train on, each image a dict of "path" and "bytes"; none if it has none.

    Raises:
        ZooError: a file that is missing or differs from its SHA-256.
    """
    import pyarrow.parquet as pq

    pairs: list[Pair] = []
    for path in checked_files(place, read_index(place), PAIRS):
        columns = pq.read_table(path, columns=["abnormal", "normal"]).to_pydict()
        pairs += zip(columns["abnormal"], columns["normal"], strict=True)
    return pairs


def checked_files(place: Path, index: dict[str, Any], beginning: str = "") -> list[Path]:
    """The files of an index whose names begin so, each read and compared with its SHA-256.

    Raises:
        ZooError: one is missing or damaged.
    """
    names = [name for name in index["files"] if name.startswith(beginning)]
    for name in names:
        if file_hash(place / name) != index["files"][name]:
            raise ZooError(f"{place / name} is missing or damaged; write or download it anew.")
    return [place / name for name in names]


def _is_sound(index: dict[str, Any]) -> bool:
    """Whether it has what is read of it, and names no file outside of its folder."""
    counts, files = index.get("counts"), index.get("files")
    if not isinstance(counts, dict) or not isinstance(files, dict) or not all(map(_FILE.fullmatch, files)):
        return False
    for split in SPLITS:
        found = counts.get(split)
        if not isinstance(found, list) or len(found) != 2 or any(type(n) is not int or n < 0 for n in found):
            return False
    return all(isinstance(text, str) for text in (index.get("name"), index.get("fingerprint"), *files.values()))


def parse_repo(text: str) -> tuple[str, str | None]:
    """Repository and revision of `ORG/NAME[@REV]`.

    Raises:
        ZooError: another form.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", text)
    if not match:
        raise ZooError(f"hub:{text} is no repository; write hub:ORG/NAME or hub:ORG/NAME@REVISION.")
    return match[1], match[2]


def fetch(repo: str, revision: str | None, pattern: str | None = None) -> Path:
    """The snapshot of a repository in the hub's cache, from the cache alone with `HF_HUB_OFFLINE=1`.

    Args:
        pattern: of the files that are wanted besides `zoo.json`; None where a check needs that one alone.

    Returns:
        Its folder, called by the commit.

    Raises:
        ZooError: no such repository or revision, no access, no network, or no data set that the zoo has exported.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = [INDEX, pattern] if pattern else [INDEX]
    at = f"{repo}@{revision}" if revision else repo
    try:
        with _quiet_hub(not pattern):
            place = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns)
    except errors.RevisionNotFoundError:
        raise ZooError(f"hub:{at}: the repository has no revision {revision}; look it up on its page.") from None
    except errors.RepositoryNotFoundError:
        raise ZooError(f"hub:{at}: there is no such data set, or you have no access; log in: hf auth login.") from None
    except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError):
        raise ZooError(f"hub:{at} is not in the cache, and the hub can't be asked; go online once.") from None
    except (errors.HTTPError, errors.HFValidationError, OSError) as error:
        raise ZooError(f"hub:{at} can't be had ({' '.join(str(error).split())[:200]}); try again later.") from error
    if not (Path(place) / INDEX).is_file():
        raise ZooError(f"hub:{at} has no {INDEX}; the zoo reads what zoo data export DATA --push {repo} writes.")
    return Path(place)


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    import datasets

    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


@contextmanager
def _quiet_hub(quiet: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if not quiet or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
