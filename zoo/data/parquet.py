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
from zoo.data.store import SPLITS, digest, file_hash
from zoo.errors import ZooError

if TYPE_CHECKING:
    import datasets

FORMAT_VERSION = 1
INDEX = "zoo.json"
COLUMNS = ("image", "mask", "label", "path")


def read_index(place: Path) -> dict[str, Any]:
    """The checked `zoo.json` of a folder of parquet files.

    Raises:
        ZooError: damaged, or of another format.
    """
    path, remedy = place / INDEX, "write the folder anew: zoo data export DATA --out FOLDER."
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ZooError(f"{path} is damaged; {remedy}") from error
    if version != FORMAT_VERSION:
        raise ZooError(f"{path} has format version {version}, not {FORMAT_VERSION}; {remedy}")
    if index.pop("sha256", None) != digest(index):
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
    for name, sha256 in index["files"].items():
        if name.startswith("data/") and file_hash(place / name) != sha256:  # not pairs, which are another configuration
            raise ZooError(f"{place / name} is missing or damaged; write or download it anew.")
    features = datasets.Features(
        image=datasets.Image(decode=False),
        mask=datasets.Image(decode=False),
        label=datasets.ClassLabel(names=["normal", "anomalous"]),
        path=datasets.Value("string"),
    )
    files = {s: [str(place / name) for name in index["files"] if name.startswith(f"data/{s}-")] for s in SPLITS}
    kept = {split: names for split, names in files.items() if sum(index["counts"][split])}
    with _quiet_datasets():
        found = datasets.load_dataset(
            "parquet",
            data_files=kept,
            columns=list(COLUMNS),  # boxes and whatever else there is stay in the files
            features=features,
            cache_dir=str(hub.registry().parent / "datasets"),
        )
    empty = datasets.Dataset.from_dict({name: [] for name in COLUMNS}, features=features)
    return datasets.DatasetDict({split: found.get(split, empty) for split in SPLITS})


def parse_repo(text: str) -> tuple[str, str | None]:
    """Repository and revision of `ORG/NAME[@REV]`.

    Raises:
        ZooError: another form.
    """
    match = re.fullmatch(r"([\w.-]+/[\w.-]+)(?:@(\S+))?", text)
    if not match:
        raise ZooError(f"hub:{text} is no repository; write hub:ORG/NAME or hub:ORG/NAME@REVISION.")
    return match[1], match[2]


def fetch(repo: str, revision: str | None, whole: bool) -> Path:
    """The snapshot of a repository in the hub's cache, from the cache alone with `HF_HUB_OFFLINE=1`.

    Args:
        whole: with its images; else `zoo.json` alone, as far as a check needs it.

    Returns:
        Its folder, called by the commit.

    Raises:
        ZooError: no such repository or revision, no access, no network, or no data set that the zoo has exported.
    """
    from huggingface_hub import errors, snapshot_download

    patterns = [INDEX, "data/*.parquet"] if whole else [INDEX]
    at = f"{repo}@{revision}" if revision else repo
    try:
        with _quiet_hub(not whole):
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
