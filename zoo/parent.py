"""The model that another one goes on from: what it has seen, what a record says of it, and what stays private."""

import csv
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import DatasetDict

from zoo import checkpoint, hub
from zoo.checkpoint import csv_text
from zoo.errors import ZooError
from zoo.run import RunOptions
from zoo.seen import FILE, HELD_OUT, digests, read_seen
from zoo.view import View

DATA = "data.txt"  # in `private/`: the DATA of the fit, on this machine
PREFIXED = re.compile(r"[\w.-]+@[0-9a-f]{8}:")
BEFORE = "before"  # role of images that a model before has seen, whose weight in this one may be another
EARLIER = "earlier.json"  # in `private/`: DATA of the models before, by the prefix of their images' names
KEPT = ("name", "fingerprint", "origin", "hub", "terms", "images", "defects", "inpainting_pairs", "pairs_of")


@dataclass(frozen=True)
class Parent:
    """A fitted model's folder, from which a fit goes on.

    Attributes:
        folder: of the model.
        config, record: of it; the record tells of images that were taken out before the fit.
        share: weight of its statistics, see `LearningModule.parent_share`.
        removed: names of images that were taken out before the fit.
        notes: what it has seen, as `zoo.seen.note` gives it; None: as its folder has it.
    """

    folder: Path
    config: dict[str, Any]
    record: dict[str, Any]
    share: float | None = None
    removed: tuple[str, ...] = ()
    notes: str | None = None

    @property
    def name(self) -> str:
        return hub.name_of(self.folder)

    @property
    def data(self) -> str | None:
        """The DATA that it was fitted on, on this machine; None where that isn't known."""
        return data_of(self.folder, "")[0]

    def plan(self) -> dict[str, Any]:
        """What a resumed fit must have in common with the one that was interrupted."""
        return {"parent": self.config["weights_sha256"], "parent_share": self.share, "removed": list(self.removed)}

    def described(self) -> dict[str, Any]:
        """What a record says of it: the SHA-256 of its weights, and what these were learned from."""
        learned = self.record.get("train_data", {})
        about = {"weights_sha256": self.config["weights_sha256"], "name": self.name}
        if hub.is_cached(self.folder):
            repo = self.folder.parents[1].name.removeprefix("models--").replace("--", "/")
            about["hub"] = f"{repo}@{self.folder.name}"
        if updates := self.record.get("updates"):
            about["updates"] = updates
        if learned:
            about["train_data"] = {key: learned[key] for key in KEPT if key in learned}
        return about | {"checked": self._lines() is not None and self.record.get("parent", {}).get("checked", True)}

    def ancestors(self) -> list[dict[str, Any]]:
        """The models that it went on from itself, the nearest first."""
        parent = self.record.get("parent")
        return [parent, *self.record.get("ancestors", [])] if parent else []

    def unseen(self, data: DatasetDict, run: RunOptions) -> DatasetDict:
        """The data without the training images that had a say in its weights; how many is said.

        Raises:
            ZooError: there are no others.
        """
        if (known := read_seen(self.folder)) is None:
            run.say(f"Whether {self.name} has learned from these images can't be checked: it has no private/{FILE}.")
            return data
        train = data["train"]
        found = digests(train, View.stored(self.config["preprocessing"]), progress=run.progress)
        fresh = [row for row, content in enumerate(found) if content not in known.digests]
        if not fresh:
            raise ZooError(f"{self.name} has learned from all {len(found):,} of these images; give it others.")
        if left := len(found) - len(fresh):
            run.say(f"{left:,} images are left out: {self.name} has learned from them already.")
        return DatasetDict(data | {"train": train.select(fresh)})

    def private(self, seen: str) -> dict[str, str]:
        """The private files of a model that goes on from it.

        Args:
            seen: what its own fit has seen, as `zoo.seen.note` gives it; to that come the parent's images, by their
                content alone, as names mean images of one DATA.
        """
        lines = [[BEFORE, "", content] for role, _, content in self._lines() or [] if role != HELD_OUT]
        own = list(csv.reader(io.StringIO(seen)))
        before = self.folder / "private" / EARLIER
        earlier = checkpoint.read_json(before)
        earlier |= {self.prefix: self.data} if self.data else {}
        return {FILE: csv_text(own[0], [*own[1:], *lines]), EARLIER: json.dumps(earlier, indent=1) + "\n"}

    @property
    def prefix(self) -> str:
        """What tells the names of its images from those of the DATA that is gone on with."""
        name = re.sub(r"[^\w.-]", "_", self.name)
        return f"{name}@{self.config['weights_sha256'][:8]}:"

    def named(self, image: str) -> str:
        """The name of an image that it has seen, as a model that goes on from it knows it."""
        return image if PREFIXED.match(image) or not image else f"{self.prefix}{image}"

    def _lines(self) -> list[list[str]] | None:
        """Role, name and digest of each image that it noted; None where it has no notes."""
        if self.notes is None and read_seen(self.folder) is None:
            return None
        notes = (self.folder / "private" / FILE).read_text(encoding="utf-8") if self.notes is None else self.notes
        return list(csv.reader(io.StringIO(notes)))[1:]


def data_of(folder: Path, image: str) -> tuple[str | None, str]:
    """The DATA that an image of a model is in, and its name there; None where that isn't known.

    Args:
        folder: of the model.
        image: as the model knows it; one of a model before has a prefix.
    """
    place, found = folder / "private", PREFIXED.match(image)
    if found:
        return checkpoint.read_json(place / EARLIER).get(found[0]), image[found.end() :]
    path = place / DATA
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None, image
