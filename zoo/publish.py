"""Publish a model: what of its folder may be seen, put into a repository on the hub in one commit.

Nothing of `private/` leaves the machine. The name of a folder of images stays here too, unless it is asked for. A card
ends with a digest of its own text: one that was edited on the hub no longer fits it, and is kept.
"""

import hashlib
import io
import json
import logging
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from zoo import checkpoint
from zoo.card_data import PRIVATE, eval_results, public_name
from zoo.cards import render_card
from zoo.checkpoint import CARD, CONFIG, RECORD, WEIGHTS
from zoo.errors import ZooError
from zoo.hub import REPO

EVALUATION = ".eval_results/zoo.yaml"
PUBLIC = (WEIGHTS, CONFIG, CARD, RECORD, EVALUATION)
_SIGNED = re.compile(r"\n<!-- Written by the zoo\. SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z")
_PLACE = re.compile(
    r"(?<![\w.:/-])(?:/(?:home|Users|root|mnt|media|tmp|var|scratch|srv|opt)/|[A-Za-z]:\\\\?\w)[^\s\"']*"
)

SILENCE = 30.0  # seconds in which a hub says nothing before an upload is given up

log = logging.getLogger(__name__)


class Published(NamedTuple):
    """Where a model is on the hub: page, commit, and the files that were uploaded (none: it had them already)."""

    url: str
    commit: str
    uploaded: list[str]


def stage(
    folder: str | Path,
    out: str | Path,
    repo: str | None = None,
    data_names: bool = False,
    is_open: Callable[[str], bool] = lambda repo: False,
) -> Path:
    """Write what of a model's folder is public into another one, which is a model's folder itself.

    Args:
        folder: of a fitted model.
        out: its place; a model that is already there is replaced.
        repo: `ORG/NAME` that its card is for; None: a folder.
        data_names: name folders of images and data sets as they are called; else they are "private images".
        is_open: whether anybody may see a data set `ORG/NAME` on the hub, which then keeps its name.

    Raises:
        ZooError: damaged weights; a place of this machine or the name of an image in what would be public.
    """
    folder, out = Path(folder), Path(out)
    config, record = checkpoint.read_config(folder), checkpoint.read_record(folder)
    checkpoint.read_header(folder / WEIGHTS)
    checkpoint.check_weights(folder, config)
    checkpoint.check_place(out)
    record = record if data_names else _without_names(record, is_open)
    texts = {CONFIG: checkpoint.dump(config), CARD: signed(render_card(config, record or None, repo))}
    texts |= {RECORD: checkpoint.dump(record)} if record else {}
    found = eval_results(config, record, repo) if record and repo else None
    texts |= {EVALUATION: found} if found else {}
    _check_public(folder, texts)
    with checkpoint.replacing(out) as temporary:
        for name, text in texts.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        shutil.copyfile(folder / WEIGHTS, temporary / WEIGHTS)
    return out


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    tag: str | None = None,
    token: str | bool | None = None,
    commit_message: str | None = None,
    data_names: bool = False,
    overwrite_card: bool = False,
    say: Callable[[str], None] = log.warning,
) -> Published:
    """Put a model into a repository on the hub, which is made where there is none; the same content is put there once.

    Args:
        folder: of a fitted model.
        repo: `ORG/NAME`.
        private: make a new repository that only its owners see.
        tag: for the commit, such as `v1`; a tag that is there already is not moved.
        token: as for the hub's client; None: that of `HF_TOKEN` or `hf auth login`.
        commit_message: its first line; None: "Publish METHOD".
        data_names: see `stage`.
        overwrite_card: replace a card that was edited on the hub; else it is kept.
        say: is told what the user did not ask for.

    Raises:
        ZooError: no such model, no answer, no right to write, a repository that is public already or has the tag;
            something private in what would be published. Nothing is uploaded then.
    """
    check_target(repo, tag)
    with tempfile.TemporaryDirectory() as place, _explained(repo), _client():
        hub = _Hub(repo, token)
        staged = stage(folder, Path(place) / "model", repo, data_names, hub.is_open)
        hub.open(private)
        files = {name: staged / name for name in PUBLIC if (staged / name).is_file()}
        if CARD in hub.files and not overwrite_card and is_edited(text := hub.card(Path(place))):
            del files[CARD]
            if text != (staged / CARD).read_text(encoding="utf-8"):
                say(
                    f"The card of {repo} was edited on the hub and is kept, so its figures may be those of other "
                    "weights; --overwrite-card (overwrite_card=True) replaces it."
                )
        changed = [name for name, path in files.items() if not hub.has(name, path)]
        stale = [EVALUATION] if EVALUATION in hub.files and EVALUATION not in files else []
        hub.check_tag(tag, bool(changed or stale))
        if changed or stale:
            method = checkpoint.read_config(staged)["method"]
            hub.commit({name: files[name] for name in changed}, stale, commit_message or f"Publish {method}")
        hub.tag(tag)
        return Published(f"{hub.endpoint}/{repo}", hub.head, changed)


def check_target(repo: str, tag: str | None = None) -> None:
    """Raises ZooError for what can't be the name of a repository or a tag; asks nobody."""
    if not REPO.fullmatch(repo) or len(repo) > 96 or ".." in repo or "--" in repo:
        raise ZooError(f"{repo!r} is no repository to publish to; name one as ORG/NAME.")
    if tag is not None and (not re.fullmatch(r"[A-Za-z0-9][\w.-]*", tag) or ".." in tag or tag.endswith(".lock")):
        raise ZooError(f"{tag!r} is no tag; take letters, digits, '.', '_' and '-', such as v1.")


# ---- what is public --------------------------------------------------------------------------------------------------


def signed(card: str) -> str:
    """A card with the digest of its text at its end."""
    text = card.rstrip("\n") + "\n"
    return f"{text}\n<!-- Written by the zoo. SHA-256 of the text above: {_sha256(text.encode())} -->\n"


def is_edited(card: str) -> bool:
    """Whether a card is not as the zoo has written it."""
    match = _SIGNED.search(card)
    return match is None or match[1] != _sha256(card[: match.start()].encode())


def _without_names(record: dict[str, Any], is_open: Callable[[str], bool]) -> dict[str, Any]:
    """A record in which data that not everybody may see has no name of its own."""
    record = json.loads(json.dumps(record))
    for data in (record.get("train_data"), record.get("test_data"), record.get("calibration", {}).get("data")):
        if not data or public_name(data) or ("hub" in data and is_open(data["hub"].partition("@")[0])):
            continue
        data.pop("hub", None)
        data |= {"name": PRIVATE} | ({"pairs_of": PRIVATE} if "pairs_of" in data else {})
    return record


def _check_public(folder: Path, texts: dict[str, str]) -> None:
    """Raises ZooError for a place of this machine, or the name of an image that the model has seen."""
    names = _image_names(folder)
    for file, text in texts.items():
        if found := _PLACE.search(text) or re.search(re.escape(str(Path.home())) + r"[/\\]\S*", text):
            raise ZooError(f"{file} has a place of this machine in it ({found[0]}); nothing was published.")
        if file in (CONFIG, RECORD) and (image := next((name for name in names if name in text), None)):
            raise ZooError(f"{file} has the name of an image in it ({image}); nothing was published.")


def _image_names(folder: Path) -> set[str]:
    """Of the images that the folder's private files speak of."""
    import csv

    names: set[str] = set()
    for path in (folder / "private").glob("*.csv"):
        with open(path, encoding="utf-8", newline="") as file:
            names |= {Path(line["image"]).name for line in csv.DictReader(file) if line.get("image")}
    return {name for name in names if len(name) > 4}


# ---- the repository -------------------------------------------------------------------------------------------------


class _Hub:
    """A repository as it is, and as it becomes.

    Attributes:
        head: commit of the main branch.
        files: SHA-256, or git's SHA-1, of each public file that it has.
    """

    def __init__(self, repo: str, token: str | bool | None):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise ZooError(f"{repo} can't be published to in offline mode; unset HF_HUB_OFFLINE.")
        self.repo, self.api, self.endpoint = repo, HfApi(token=token), constants.ENDPOINT
        self.head, self.files = "", {}

    def open(self, private: bool | None) -> None:
        """Look at the repository, or make it."""
        from huggingface_hub import errors

        from zoo.remote import PATIENCE, TIMEOUT, within

        try:
            info = within(PATIENCE, lambda: self.api.model_info(self.repo, timeout=TIMEOUT))
        except errors.RepositoryNotFoundError:
            self.api.create_repo(self.repo, private=bool(private), exist_ok=True)
            info = self.api.model_info(self.repo)
        if private and not info.private:
            raise ZooError(f"{self.repo} is public; make it private on its page first, or publish to another one.")
        self.head = info.sha
        found = self.api.get_paths_info(self.repo, list(PUBLIC), revision=self.head)
        self.files = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in found}

    def is_open(self, data: str) -> bool:
        """Whether a data set is there for somebody without a token."""
        from huggingface_hub.errors import HTTPError

        from zoo.remote import TIMEOUT

        try:
            return not self.api.dataset_info(data, token=False, timeout=TIMEOUT).private
        except (HTTPError, ValueError):  # a name that is told by mistake can't be taken back
            return False

    def card(self, place: Path) -> str:
        path = self.api.hf_hub_download(self.repo, CARD, revision=self.head, cache_dir=place / "cache")
        return Path(path).read_text(encoding="utf-8", errors="replace")

    def has(self, name: str, path: Path) -> bool:
        data, known = path.read_bytes(), self.files.get(name)
        return known in (_sha256(data), hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest())

    def check_tag(self, tag: str | None, will_change: bool) -> None:
        known = {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo).tags} if tag else {}
        if tag in known and (will_change or known[tag] != self.head):
            raise ZooError(f"{self.repo} has a tag {tag} already, at commit {known[tag][:7]}; take another one.")

    def commit(self, files: dict[str, Path], stale: list[str], message: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with ExitStack() as stack:
            add = [CommitOperationAdd(name, self._content(path, stack)) for name, path in files.items()]
            operations = [*add, *map(CommitOperationDelete, stale)]
            done = self.api.create_commit(self.repo, operations, commit_message=message, parent_commit=self.head)
        self.head = done.oid

    def _content(self, path: Path, stack: ExitStack) -> str | io.BufferedReader:
        """A path, which the client takes to the hub by Xet; an open file, which any mirror takes."""
        if (urlparse(self.endpoint).hostname or "").endswith("huggingface.co"):
            return str(path)
        return stack.enter_context(open(path, "rb"))

    def tag(self, tag: str | None) -> None:
        if tag:
            self.api.create_tag(self.repo, tag=tag, revision=self.head, exist_ok=True)


@contextmanager
def _client() -> Iterator[None]:
    """The hub's client with an end to its patience, and without its warning that an open file doesn't go by Xet."""
    from huggingface_hub.utils import get_session, logging

    session, verbosity = get_session(), logging.get_verbosity()
    before, session.timeout = session.timeout, SILENCE
    logging.set_verbosity_error()
    try:
        yield
    finally:
        session.timeout = before
        logging.set_verbosity(verbosity)


@contextmanager
def _explained(repo: str) -> Iterator[None]:
    """The client's errors in one sentence."""
    from huggingface_hub import constants, errors

    from zoo.remote import reason

    try:
        yield
    except ZooError:
        raise
    except (errors.HTTPError, errors.LocalTokenNotFoundError, ValueError, KeyError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = {
            401: "log in (hf auth login) or set HF_TOKEN to a token that may write",
            403: f"the token may not write to {repo.partition('/')[0]}; take one that may",
            404: "the repository is gone, or the token may not see it",
            412: "somebody else has changed it meanwhile; publish again",
        }.get(status, "try again; what is there already is not uploaded twice")
        where = f"Publishing to {repo} on {constants.ENDPOINT} failed"
        raise ZooError(f"{where} ({reason(error)}): {remedy}.") from error


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
