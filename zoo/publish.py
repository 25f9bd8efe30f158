"""Publish a model: what of its folder may be seen, put into a repository on the hub in one commit.

Nothing of `private/` leaves the machine. The name of a folder of images stays here too, unless it is asked for. A card
ends with a digest of its own text: one that was edited on the hub no longer fits it, and is kept.
"""

import getpass
import hashlib
import io
import json
import logging
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlparse

from zoo import checkpoint
from zoo.card_data import PRIVATE, eval_results, learned_from, lineage, public_name
from zoo.cards import render_card
from zoo.checkpoint import CARD, CONFIG, RECORD, WEIGHTS
from zoo.errors import ZooError
from zoo.hub import REPO
from zoo.methods import METHODS

EVALUATION = ".eval_results/zoo.yaml"
PUBLIC = (WEIGHTS, CONFIG, CARD, RECORD, EVALUATION)
_SIGNED = re.compile(r"\n<!-- Written by the zoo\. SHA-256 of the text above: ([0-9a-f]{64}) -->\n\Z")
_PLACE = re.compile(
    r"""(?<![\w/.~\])>-])/(?!/)[\w.~-]+/[^\s"')]*"""  # /a/b, also behind a colon
    r"""|(?<=["'\s])/[A-Za-z][\w.-]+"""  # /a
    r"""|file:/+\S+|(?<![\w~])~/[\w.]\S*"""
    r"""|(?<!\w)[A-Za-z]:\\{1,2}\w[^\s"']*|\\{2,4}[\w.-]+\\[^\s"']*"""  # of Windows, a share
)
# Names of machines and users that are words of a record, or give nobody away.
COMMON = {"root", "user", "admin", "localhost", "cuda", "full", "house", "mean", "none", "normal", "paper", "synthetic"}
SILENCE = 30.0  # seconds in which a hub says nothing before an upload is given up

log = logging.getLogger(__name__)


class Published(NamedTuple):
    """Where a model is on the hub: page, commit, the files that were uploaded (none: it had them), who sees it."""

    url: str
    commit: str
    uploaded: list[str]
    private: bool


def stage(
    folder: str | Path,
    out: str | Path,
    repo: str | None = None,
    data_names: bool = False,
    is_open: Callable[[str, str], bool] = lambda repo, kind: False,
) -> Path:
    """Write what of a model's folder is public into another one, which is a model's folder itself.

    Args:
        folder: of a fitted model.
        out: its place; a model that is already there is replaced.
        repo: `ORG/NAME` that its card is for; None: a folder.
        data_names: name folders of images and data sets as they are called; else they are "private images".
        is_open: whether anybody may see `ORG/NAME`, a "dataset" or a "model" on the hub, which then keeps its name.

    Raises:
        ZooError: damaged weights; a place of this machine or the name of an image in what would be public.
    """
    folder, out = Path(folder), Path(out)
    config, record = checkpoint.read_config(folder), checkpoint.read_record(folder)
    if any(0 in shape for shape in config["learned"].values()):
        raise ZooError(f"The {config['method']} in {folder} has learned nothing yet; fit it first.")
    checkpoint.read_header(folder / WEIGHTS)
    checkpoint.check_weights(folder, config)
    checkpoint.check_place(out)
    record = record if data_names else _without_names(record, is_open)
    texts = {CONFIG: checkpoint.dump(config), CARD: signed(render_card(config, record or None, repo))}
    texts |= {RECORD: checkpoint.dump(record)} if record else {}
    found = eval_results(config, record, repo) if record and repo else None
    texts |= {EVALUATION: found} if found else {}
    _check_public(texts, _image_names(folder))
    with checkpoint.replacing(out) as temporary:
        for name, text in texts.items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, encoding="utf-8")
        try:
            os.link((folder / WEIGHTS).resolve(), temporary / WEIGHTS)  # it is replaced, never written to
        except OSError:
            shutil.copyfile(folder / WEIGHTS, temporary / WEIGHTS)
    return out


def publish(
    folder: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    tag: str | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    commit_message: str | None = None,
    data_names: bool = False,
    overwrite_card: bool = False,
    replace: bool = False,
    say: Callable[[str], None] = log.warning,
) -> Published:
    """Put a model into a repository on the hub, which is made where there is none; the same content is put there once.

    Args:
        folder: of a fitted model.
        repo: `ORG/NAME`.
        private: make a new repository that only its owners see.
        tag: for the commit, such as `v1`; a tag that is there already is not moved.
        token: as for the hub's client; None: that of `HF_TOKEN` or `hf auth login`.
        branch: to commit to, made from the main one where there is none.
        commit_message: its first line; None: "Publish METHOD".
        data_names: see `stage`.
        overwrite_card: replace a card that was edited on the hub; else it is kept.
        replace: take the place of a model of another method, or of something else; else that is refused.
        say: is told what the user did not ask for.

    Raises:
        ZooError: no such model, or one that has learned nothing; something private in what would be published; no
            answer, no right to write; a repository that is public already, has the tag, or holds something else.
            Nothing is uploaded then, unless it is the tag alone that the hub refuses.
    """
    from zoo.remote import is_open

    check_target(repo, tag)
    _check_public({"The message of the commit": commit_message or ""})
    with tempfile.TemporaryDirectory() as place, _explained(repo), _client():
        hub = _Hub(repo, token, branch)
        staged = stage(folder, Path(place) / "model", repo, data_names, cache(is_open))
        hub.open(private)
        if not replace:
            hub.check_same(checkpoint.read_config(staged)["method"], Path(place))
        if _was_edited_here(Path(folder)):
            say(f"The card in {folder} is not that of its record, or of an older zoo; published is that of its record.")
        files = {name: staged / name for name in PUBLIC if (staged / name).is_file()}
        if CARD in hub.files and not overwrite_card and is_edited(hub.text(CARD, Path(place))):
            del files[CARD]
            say(
                f"The card of {repo} was edited on the hub and is kept: what it says may be of other weights or "
                "another threshold; --overwrite-card (overwrite_card=True) replaces it."
            )
        changed = [name for name, path in files.items() if not hub.has(name, path)]
        stale = [EVALUATION] if EVALUATION in hub.files and EVALUATION not in files else []
        hub.check_tag(tag, bool(changed or stale))
        if changed or stale:
            method = checkpoint.read_config(staged)["method"]
            hub.commit({name: files[name] for name in changed}, stale, commit_message or f"Publish {method}")
        hub.tag(tag)
        return Published(f"{hub.endpoint}/{repo}", hub.head, changed, hub.private)


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


def _was_edited_here(folder: Path) -> bool:
    """Whether the card of a model's folder is none that its record gives."""
    path = folder / CARD
    card = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    known = checkpoint.read_config(folder), checkpoint.read_record(folder) or None
    return bool(card) and is_edited(card) and card != render_card(*known)


def _without_names(record: dict[str, Any], is_open: Callable[[str, str], bool]) -> dict[str, Any]:
    """A record in which data and models that not everybody may see have no names of their own."""
    record = json.loads(json.dumps(record))
    for parent in lineage(record):
        parent.pop("name", None)
        if not is_open(parent.get("hub", "").partition("@")[0], "model"):
            parent.pop("hub", None)
    learned, calibration = learned_from(record), record.get("calibration", {})
    for data in (*learned, record.get("test_data"), calibration.get("data")):
        if not data or public_name(data) or ("hub" in data and is_open(data["hub"].partition("@")[0], "dataset")):
            continue
        data.pop("hub", None)
        data |= {"name": PRIVATE} | ({"pairs_of": PRIVATE} if "pairs_of" in data else {})
    return record


def _check_public(texts: dict[str, str], images: Iterable[str] = ()) -> None:
    """Raises ZooError for a place of this machine, its or its user's name, or that of an image that was seen."""
    machine = "|".join(map(re.escape, _own_names()))
    for file, text in texts.items():
        if found := _PLACE.search(text):
            raise ZooError(f"{file} has a place of this machine in it ({found[0]}); nothing was published.")
        if file == CARD:  # of the same names, between words that may be anybody's
            continue
        if image := next((name for name in images if name in text), None):
            raise ZooError(f"{file} has the name of an image in it ({image}); nothing was published.")
        if machine and (found := re.search(rf"(?<![\w-])(?:{machine})(?![\w-])", text)):
            raise ZooError(f"{file} names this machine or its user ({found[0]}); nothing was published.")


def _own_names() -> list[str]:
    """Of this machine and its user, where they tell something."""
    names = [socket.gethostname()]
    with suppress(KeyError, OSError):  # in a container a user may have none
        names.append(getpass.getuser())
    return [name for name in names if len(name) > 3 and name not in COMMON]


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
        head: commit of the branch.
        files: SHA-256, or git's SHA-1, of each public file that it has.
        private: whether its owners alone see it.
    """

    def __init__(self, repo: str, token: str | bool | None, branch: str | None):
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            raise ZooError(f"{repo} can't be published to in offline mode; unset HF_HUB_OFFLINE.")
        self.repo, self.api, self.endpoint = repo, HfApi(token=token), constants.ENDPOINT
        self.branch, self.head, self.files, self.private = branch, "", {}, False

    def open(self, private: bool | None) -> None:
        """Look at the repository, or make it."""
        from huggingface_hub import errors
        from huggingface_hub.hf_api import RepoFile

        from zoo.remote import PATIENCE, TIMEOUT, within

        try:
            info = within(PATIENCE, lambda: self.api.model_info(self.repo, timeout=TIMEOUT))
        except errors.RepositoryNotFoundError:
            self.api.create_repo(self.repo, private=private, exist_ok=True)
            info = self.api.model_info(self.repo)
        if self.branch:
            self.api.create_branch(self.repo, branch=self.branch, exist_ok=True)
            info = self.api.model_info(self.repo, revision=self.branch)
        if private and not info.private:
            raise ZooError(f"{self.repo} is public; make it private on its page first, or publish to another one.")
        self.head, self.private = info.sha, bool(info.private)
        tree = partial(self.api.list_repo_tree, self.repo, recursive=True, revision=self.head)
        found = within(2 * PATIENCE, lambda: list(tree()))  # the client would try for minutes
        ours = [file for file in found if isinstance(file, RepoFile) and file.path in PUBLIC]
        self.files = {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in ours}

    def text(self, name: str, place: Path) -> str:
        """A file of the repository."""
        path = self.api.hf_hub_download(self.repo, name, revision=self.head, cache_dir=place / "cache")
        return Path(path).read_text(encoding="utf-8", errors="replace")

    def check_same(self, method: str, place: Path) -> None:
        """Raises ZooError where the repository holds something else than a model of this method."""
        if CONFIG not in self.files:
            return
        try:
            held = json.loads(self.text(CONFIG, place))["method"]
        except (ValueError, KeyError, TypeError, RecursionError):
            held = None
        if held != method:
            what = f"a model of {held}" if held in METHODS else "something else than a model of the zoo"
            raise ZooError(
                f"{self.repo} holds {what}, and this is one of {method}: publish to another repository, or take its "
                "place by --replace (replace=True)."
            )

    def has(self, name: str, path: Path) -> bool:
        """Whether it has a file with this content, by SHA-256 (large files) or as git names it."""
        known = self.files.get(name)
        if known is None or len(known) == 64:
            return known is not None and known == checkpoint.file_sha256(path)
        data = path.read_bytes()
        return known == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def check_tag(self, tag: str | None, will_change: bool) -> None:
        refs = self.api.list_repo_refs(self.repo) if tag else None
        known = {ref.name: ref.target_commit for ref in refs.tags} if refs else {}
        if refs and tag in [ref.name for ref in refs.branches]:
            raise ZooError(f"{tag} is a branch of {self.repo}; give the tag another name.")
        if tag in known and (will_change or known[tag] != self.head):
            raise ZooError(f"{self.repo} has a tag {tag} already, at commit {known[tag][:7]}; take another one.")

    def commit(self, files: dict[str, Path], stale: list[str], message: str) -> None:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        from zoo.remote import without_bars

        with ExitStack() as stack:
            add = [CommitOperationAdd(name, self._content(path, stack)) for name, path in files.items()]
            operations = [*add, *map(CommitOperationDelete, stale)]
            if WEIGHTS not in files:
                stack.enter_context(without_bars())
            where = {"revision": self.branch, "parent_commit": self.head}
            done = self.api.create_commit(self.repo, operations, commit_message=message, **where)
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
    from huggingface_hub.utils import get_session

    from zoo.remote import quiet

    session = get_session()
    before, session.timeout = session.timeout, SILENCE
    try:
        with quiet():
            yield
    finally:
        session.timeout = before


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
