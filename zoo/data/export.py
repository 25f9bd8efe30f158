"""`zoo data export`: a data set as parquet files that a repository of the hub holds, and its upload if wanted."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from zoo import checkpoint
from zoo.data import DataSpec, check_data, files_digest, load_data, parquet
from zoo.data.store import digest, file_hash
from zoo.data.terms import terms_of
from zoo.errors import ZooError
from zoo.image import read_image
from zoo.paths import absolute

if TYPE_CHECKING:
    import datasets

SHARD = 8192  # images a file
GROUP = 128  # rows that are in memory at once
IMAGES = {"image", "mask", "abnormal", "normal"}  # columns
FOLDERS = {"default": "data", "inpainting": "inpainting"}  # of configurations
EXTRAS = CARD, HALVES = "README.md", "halves.json"  # beside the index and the files that it lists


def export_data(data: str, out: str, push: str | None, private: bool, allowed: bool, progress: bool) -> Path:
    """Write a data set as parquet files, bytes of the images embedded, and upload them if a repository is named.

    Args:
        data: DATA specification.
        out: folder to write; it appears when all is done.
        push: repository `ORG/NAME` of the hub; None uploads nothing.
        private: whether the repository is to be private.
        allowed: that the user has said to have the right to share the set.

    Returns:
        The folder, which is DATA as well.

    Raises:
        ZooError: another thing lies there, an upload without the right to it, an image that has gone, or a hub that
            refuses.
    """
    if push:
        _check_push(data, push, allowed)
    spec, place = check_data(data), absolute(out)
    about = {"name": spec.name, "fingerprint": spec.origin, "counts": spec.counts}
    # An image that was written anew may have its old size, and pairs and boxes are in no fingerprint.
    about["made_of"] = digest([spec.kind, spec.fingerprint, files_digest(spec, further=True)])
    if _is_there(place, about):
        print(f"{data} is exported already, and whole, in {place}.")
    else:
        for reason in _write(spec, about, place, progress):
            print(f"Exported as it is, to be left out by --skip-broken where it is read: {reason}")
        print(f"Exported {sum(map(sum, spec.counts.values())):,} images to {place}.")
    if push:
        seen = _push(place, push, private)
        print(f"Uploaded to {push}, which is {seen}.\nNext: zoo fit METHOD --data hub:{push}")
    return place


def _is_there(place: Path, about: dict[str, Any]) -> bool:
    """Whether just this export is there, each file of it checked; False if nothing is."""
    if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
        return False
    if not (place / parquet.INDEX).is_file():
        raise ZooError(f"{place} exists and is something else; name another folder by --out.")
    remedy = f"remove {place} or name another folder by --out."
    try:
        index = parquet.read_index(place)
        parquet.checked_files(place, index)
    except ZooError as error:
        raise ZooError(f"{str(error).partition(';')[0]}; {remedy}") from error
    if {key: index.get(key) for key in about} != about:
        raise ZooError(f"{place} is an export of something else, or of files that have changed since; {remedy}")
    return True


def _write(spec: DataSpec, about: dict[str, Any], place: Path, progress: bool) -> list[str]:
    """Write the folder; says what of it can't be read as an image."""
    from rich.progress import Progress

    configurations = _configurations(spec)
    with checkpoint.replacing(place) as temporary, Progress(disable=not progress, transient=True) as bar:
        task = bar.add_task(
            "Writing", total=sum(len(rows) for data in configurations.values() for rows in data.values())
        )
        names, sizes, broken = [], {}, []
        for name, data in configurations.items():
            (temporary / FOLDERS[name]).mkdir()
            for split, rows in data.items():
                sizes[name, split] = 0
                count = max(-(-len(rows) // SHARD), 1)
                for i in range(count):
                    shard = rows.select(range(i * SHARD, min((i + 1) * SHARD, len(rows))))
                    names.append(f"{FOLDERS[name]}/{split}-{i:05d}-of-{count:05d}.parquet")
                    sizes[name, split] += _write_shard(shard, temporary / names[-1], broken)
                    bar.advance(task, len(shard))
        index = about | {"format_version": parquet.FORMAT_VERSION}
        index["files"] = {name: file_hash(temporary / name) for name in names}
        (temporary / parquet.INDEX).write_text(checkpoint.dump(index | {"sha256": digest(index)}), encoding="utf-8")
        if halved := _halves(configurations["default"]["test"]):
            (temporary / HALVES).write_text(checkpoint.dump(halved), encoding="utf-8")
        (temporary / CARD).write_text(_card(spec, configurations, sizes, halved), encoding="utf-8")
    return broken


def _configurations(spec: DataSpec) -> dict[str, datasets.DatasetDict]:
    """The set itself, and of MIIC boxes and pairs too."""
    if spec.kind != "miic":
        return {"default": load_data(spec)}
    from zoo.data.miic import load_miic, load_pairs

    pairs = load_pairs(spec.path)
    return {"default": load_miic(spec.path, boxes=True)} | ({"inpainting": pairs} if pairs else {})


def _write_shard(rows: datasets.Dataset, path: Path, broken: list[str]) -> int:
    """Write one file, adding to `broken` why an image of it can't be read; bytes of its rows in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _features(rows).arrow_schema  # with what the hub's viewer and load_dataset read of it
    size = 0
    with pq.ParquetWriter(path, schema) as writer:
        for batch in _encoded(rows, broken):
            table = pa.Table.from_pydict(batch, schema=schema)
            writer.write_table(table)
            size += table.nbytes
    return size


def _features(rows: datasets.Dataset) -> datasets.Features:
    """Of the exported columns: images are images, whatever stands for them in memory."""
    import datasets

    return datasets.Features(rows.features | {name: datasets.Image() for name in IMAGES if name in rows.features})


def _encoded(rows: datasets.Dataset, broken: list[str]) -> Iterator[dict[str, list]]:
    """Columns of some rows at a time, images as the bytes of their files."""
    with ThreadPoolExecutor() as pool:
        for first in range(0, len(rows), GROUP):
            batch = dict(rows[first : first + GROUP])
            names = [Path(name).name for name in batch["path"]]
            for column in sorted(batch.keys() & IMAGES):
                broken += filter(None, pool.map(_damage, batch[column], batch["path"]))
                batch[column] = [_file(value, name) for value, name in zip(batch[column], names, strict=True)]
            yield batch


def _damage(value: Any, name: str) -> str | None:
    """Why the file of an image can't be read."""
    if value is None or isinstance(value, np.ndarray):
        return None
    try:
        read_image(value | {"path": value["path"] or name})
    except ZooError as error:
        return str(error)
    return None


def _file(value: Any, name: str) -> dict[str, Any] | None:
    """An image as bytes: those of its file, or a PNG of an array (H, W) of 8 or 16 bits or bool."""
    if value is None:
        return None
    if isinstance(value, np.ndarray):
        file = io.BytesIO()
        Image.fromarray(value.astype(np.uint8) * 255 if value.dtype == bool else value).save(file, format="png")
        return {"bytes": file.getvalue(), "path": f"{Path(name).stem}.png"}
    if value["bytes"] is not None:
        return {"bytes": value["bytes"], "path": None}
    try:
        return {"bytes": Path(value["path"]).read_bytes(), "path": Path(value["path"]).name}
    except OSError as error:
        raise ZooError(f"{value['path']} cannot be read ({error.strerror}); restore it.") from None


def _halves(test: datasets.Dataset) -> dict[str, Any] | None:
    """Names of the half to select on, `val`, and of the half to report on, as every command of the zoo splits them."""
    from zoo.data.halves import SEED, named_halves

    return {"seed": SEED} | named_halves(test) if len(test) else None


def _card(
    spec: DataSpec,
    configurations: dict[str, datasets.DatasetDict],
    sizes: dict[tuple[str, str], int],
    halved: dict[str, Any] | None,
) -> str:
    import datasets
    import jinja2
    from huggingface_hub import DatasetCardData

    about = DatasetCardData(tags=["anomaly-detection"])
    if terms_of(spec.name):
        about.license, about.license_name = "other", "non-commercial-research-only"
    about.configs, infos = [], []
    for name, data in configurations.items():
        kept = {split: rows for split, rows in data.items() if len(rows)}
        patterns = [{"split": split, "path": f"{FOLDERS[name]}/{split}-*"} for split in kept]
        about.configs.append({"config_name": name, "data_files": patterns})
        splits = datasets.SplitDict()
        for split, rows in kept.items():
            splits.add(datasets.SplitInfo(split, num_bytes=sizes[name, split], num_examples=len(rows)))
        features = _features(next(iter(kept.values())))
        info = datasets.DatasetInfo(config_name=name, features=features, splits=splits)
        infos.append({"config_name": name} | info._to_yaml_dict())  # as the library writes them when it pushes
    about.dataset_info = infos
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    template = environment.from_string((files("zoo.hub_cards") / "dataset.md.j2").read_text(encoding="utf-8"))
    return template.render(
        yaml=about.to_yaml().strip(),
        spec=spec,
        terms=terms_of(spec.name),
        halves=halved,
        pairs=sum(len(rows) for rows in configurations.get("inpainting", {}).values()),
    )


def _check_push(data: str, repo: str, allowed: bool) -> None:
    if parquet.parse_repo(repo)[1]:
        raise ZooError(f"--push {repo}: leave the revision out; the upload makes one.")
    if not allowed:
        raise ZooError(
            f"--push uploads every image of {data}; add --i-have-the-right-to-share if its terms of use allow you to."
        )


def _push(place: Path, repo: str, private: bool) -> str:
    """Upload what was written, and nothing else that lies there; says whether it is private or public there."""
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        api.create_repo(repo, repo_type="dataset", private=private, exist_ok=True)
        is_private = api.repo_info(repo, repo_type="dataset").private
        if private and not is_private:  # it was there before
            raise ZooError(f"{repo} is public; make it private on its page, or add --private false.")
        api.upload_folder(
            repo_id=repo,
            folder_path=place,
            repo_type="dataset",
            allow_patterns=[*parquet.read_index(place)["files"], parquet.INDEX, *EXTRAS],
            delete_patterns=["*.parquet", *EXTRAS],  # of an upload before, as far as they aren't replaced
        )
    except (errors.HTTPError, errors.HFValidationError, errors.LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ZooError(f"{repo} refused the upload ({reason}); log in: hf auth login. {place} is kept.") from error
    return "private" if is_private else "public"
