"""Models on the Hugging Face hub, or on a mirror of it (`HF_ENDPOINT`), by its own client and in its own cache.

The hub is asked once and briefly which commit a name stands for. Files are then fetched by commit, the configuration
first, and the cache's note of what a branch or tag stands for moves when all are there: a download that fails leaves an
earlier one as it was. Where there is no answer, the cache serves.
"""

import logging
import math
import re
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, ModelCard, constants, errors, get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    get_session,
    validate_repo_id,
)
from huggingface_hub.utils import logging as client_log

from zoo.checkpoint import CARD, CONFIG, LARGEST, RECORD, WEIGHTS, read_config, write_text
from zoo.errors import ZooError
from zoo.naming import METRICS

PATIENCE = 3.0  # seconds that the hub has to say which commit a name stands for
TIMEOUT = 2.5  # seconds of one request
SAYS_NO = (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.DisabledRepoError)
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
LIBRARY = "zoo"  # of cards: by it a repository is known as one of ours

log = logging.getLogger(__name__)


class NotThere(ZooError):
    """The hub has no such repository or revision, or doesn't show it."""


class Listing(NamedTuple):
    """What a repository holds at a commit: size in bytes and SHA-256 of each file, None where the hub doesn't tell."""

    commit: str
    files: dict[str, tuple[int | None, str | None]]


def fetch(
    repo: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Path:
    """The folder of a model in the hub's cache, after a download if it is not there; arguments as the hub's client has.

    Args:
        repo: `ORG/NAME`.
        revision: branch, tag or commit; None: the main branch. A whole commit that is cached is not asked for.

    Raises:
        ZooError: not there, no access, no answer and nothing cached; no model of the zoo, or weights that are not those
            of its configuration.
    """
    try:
        validate_repo_id(repo)
    except errors.HFValidationError:
        raise ZooError(f"{repo!r} is no name of a repository on the hub; it is ORG/NAME.") from None
    cache = _Cache(repo, Path(cache_dir or constants.HF_HUB_CACHE).expanduser())
    cached = None if force_download else cache.find(revision)
    if cached and cached.name == revision:
        return cached
    if local_files_only or constants.HF_HUB_OFFLINE:
        if cached:
            return cached
        raise ZooError(_not_at_hand(cache, revision, "HF_HUB_OFFLINE or local_files_only is set"))
    try:
        listing = within(PATIENCE, lambda: _ask(repo, revision, token))
    except SAYS_NO as error:
        if not cached:
            raise NotThere(_refusal(repo, revision, error)) from None
        log.warning("%s Taken is the cached copy of commit %s.", _refusal(repo, revision, error), cached.name[:7])
        return cached
    except (errors.HTTPError, ValueError, TypeError, KeyError, OSError) as error:
        if not cached:
            raise ZooError(_not_at_hand(cache, revision, reason(error))) from error
        log.warning("%s: %s; taken is the cached copy of commit %s.", repo, reason(error), cached.name[:7])
        return cached
    place = cache.snapshot(listing.commit)
    if force_download or not cache.is_whole(place):
        _check_listing(repo, listing)
        _download(repo, listing, token, cache, force_download)
    cache.note(revision, listing.commit)
    return place


class _Cache:
    """A model's place in the cache of the hub's client, as it is laid out there."""

    def __init__(self, repo: str, root: Path):
        self.repo, self.root = repo, root
        self.place = root / f"models--{repo.replace('/', '--')}"

    def snapshot(self, commit: str) -> Path:
        return self.place / "snapshots" / commit

    def is_whole(self, folder: Path) -> bool:
        return all((folder / name).is_file() for name in (CONFIG, WEIGHTS))

    def find(self, revision: str | None) -> Path | None:
        """The whole snapshot of a commit, or of what a branch or tag stood for when it was fetched last."""
        if revision and self.is_whole(self.snapshot(revision)):
            return self.snapshot(revision)
        ref = self._ref(revision)
        folder = self.snapshot(ref.read_text(encoding="utf-8").strip()) if ref.is_file() else None
        if folder and self.is_whole(folder):
            return folder
        if revision not in (None, constants.DEFAULT_REVISION):
            return None
        # Another tool that fetched one file of a newer commit has moved the note of the main branch there.
        whole = [each for each in (self.place / "snapshots").glob("*") if self.is_whole(each)]
        return max(whole, key=lambda each: each.stat().st_mtime, default=None)

    def revisions(self) -> list[str]:
        """Branches, tags and commits of which it has all."""
        refs = sorted(path for path in (self.place / "refs").rglob("*") if path.is_file())
        named = {path.relative_to(self.place / "refs").as_posix(): path.read_text(encoding="utf-8") for path in refs}
        whole = [each.name for each in (self.place / "snapshots").glob("*") if self.is_whole(each)]
        return [name for name, commit in named.items() if commit in whole] or sorted(whole)

    def note(self, revision: str | None, commit: str) -> None:
        """Keep in mind what a branch or tag stands for, as the client does."""
        ref = self._ref(revision)
        if revision != commit and not (ref.is_file() and ref.read_text(encoding="utf-8") == commit):
            write_text(ref, commit)

    def _ref(self, revision: str | None) -> Path:
        return self.place / "refs" / (revision or constants.DEFAULT_REVISION)


def within(seconds: float, call: Callable[[], Any]) -> Any:
    """What a call returns or raises, if that takes no longer; looking up a host's name knows no timeout of its own.

    Raises:
        TimeoutError: it takes longer; it is left to itself.
    """
    found: dict[str, Any] = {}

    def run() -> None:
        try:
            found["value"] = call()
        except BaseException as error:
            found["error"] = error

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if "error" in found:
        raise found["error"]
    if "value" not in found:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return found["value"]


def _ask(repo: str, revision: str | None, token: str | bool | None) -> Listing:
    """What the hub says of a repository; and that it serves files, where it has those of a model."""
    info = HfApi(token=token).model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT)
    files = {file.rfilename: (file.size, file.lfs.sha256 if file.lfs else None) for file in info.siblings or ()}
    if not re.fullmatch(r"[0-9a-f]{40}", info.sha or ""):
        raise ValueError("it named no commit")
    for name in (CONFIG, WEIGHTS):
        if name in files:
            get_hf_file_metadata(hf_hub_url(repo, name, revision=info.sha), token=token, timeout=TIMEOUT)
    return Listing(info.sha, files)


def _check_listing(repo: str, listing: Listing) -> None:
    """Raises ZooError for a repository that is no model of the zoo, as far as the names of its files tell."""
    if CONFIG not in listing.files:
        raise ZooError(f"{repo} is no model of the zoo: it has no {CONFIG}.")
    if WEIGHTS not in listing.files:
        pickle = next((name for name in sorted(listing.files) if name.endswith(PICKLES)), None)
        has = f"{pickle}, which can run code when it is read, and no {WEIGHTS}" if pickle else f"no {WEIGHTS}"
        raise ZooError(f"{repo} has {has}; only safetensors weights are loaded.")
    for name, most in LARGEST.items():
        if (listing.files.get(name, (0, None))[0] or 0) > most:
            raise ZooError(f"{repo} is no model of the zoo: its {name} is larger than {most:,} bytes.")


def _download(repo: str, listing: Listing, token: str | bool | None, cache: _Cache, force: bool) -> None:
    """Fetch the files of a model, the configuration first: it says which weights belong to it.

    Raises:
        ZooError: it is no model of the zoo, has other weights, or the download ends before its end.
    """
    try:
        for name in (CONFIG, RECORD, CARD, WEIGHTS):
            if name in listing.files:
                how = {"revision": listing.commit, "cache_dir": cache.root, "token": token, "force_download": force}
                path = Path(hf_hub_download(repo, name, etag_timeout=TIMEOUT, **how))
            if name == CONFIG:
                named, stored = read_config(path.parent)["weights_sha256"], listing.files[WEIGHTS][1]
                if stored and stored != named:
                    raise ZooError(f"The {WEIGHTS} of {repo} are not the weights that its {CONFIG} names; not fetched.")
    except ZooError:
        raise
    except (errors.HTTPError, ValueError, OSError) as error:
        raise ZooError(f"The download of {repo} failed ({reason(error)}); try again, by the same command.") from error


# ---- what is said ----------------------------------------------------------------------------------------------------


def _not_at_hand(cache: _Cache, revision: str | None, reason: str) -> str:
    repo, known = cache.repo, cache.revisions()
    at, which = (f"{repo}@{revision}", f" --revision {revision}") if revision else (repo, "")
    if reason.endswith(("401", "403")):
        return (
            f"{constants.ENDPOINT} refuses the token ({reason}); to get {at}, log in (hf auth login) or set HF_TOKEN."
        )
    return (
        f"{at} is not in the hub's cache, and {constants.ENDPOINT} can't be asked ({reason}): connect once, name a "
        f"mirror by HF_ENDPOINT, or copy its folder from elsewhere (hf download {repo}{which} --local-dir FOLDER) and "
        "give FOLDER; a commit (ORG/NAME@COMMIT) pins what was fetched once, and is not asked for again"
        + (f"; the cache has {repo}@{', @'.join(known)}." if known else ".")
    )


def _refusal(repo: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no branch, tag or commit {revision!r}; its page lists them."
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is for users who have accepted its terms: do so on its page, and log in (hf auth login)."
    return (
        f"There is no model {repo} on {constants.ENDPOINT}, or it is private: check the name, log in (hf auth login) "
        "or set HF_TOKEN."
    )


def reason(error: Exception) -> str:
    """Why the hub could not be asked or did not do what it was asked, in few words."""
    while getattr(error, "response", None) is None and error.__cause__ is not None:
        error = error.__cause__
    if (response := getattr(error, "response", None)) is not None:
        return f"it answered {response.status_code}"
    text = " ".join(str(error).split())
    return (text or type(error).__name__)[:160].rstrip(".")


# ---- what a namespace has --------------------------------------------------------------------------------------------


class Card(NamedTuple):
    """What a card's metadata says of a model: repository, tags, name of the test data, figures of `METRICS`."""

    repo: str
    tags: list[str]
    data: str | None
    figures: dict[str, float]


def cards_of(namespace: str, token: str | bool | None = None) -> list[Card]:
    """The cards of the zoo's models in a namespace.

    Raises:
        ZooError: the hub can't be asked.
    """
    if constants.HF_HUB_OFFLINE:
        raise ZooError(f"What {namespace} has on the hub can't be asked in offline mode; unset HF_HUB_OFFLINE.")

    def ask() -> list[Card]:
        found = HfApi(token=token).list_models(author=namespace, cardData=True)
        cards = [(info.id, info.card_data or _metadata(info.id, token)) for info in found]
        return [_card(repo, data) for repo, data in cards if data and data.get("library_name") == LIBRARY]

    def answers() -> None:  # without the retries that a list makes
        get_session().get(f"{constants.ENDPOINT}/api/models", params={"author": namespace, "limit": 1}, timeout=TIMEOUT)

    try:
        with quiet():
            within(PATIENCE, answers)
            return sorted(within(2 * PATIENCE, ask), key=lambda card: card.repo)
    except (errors.HTTPError, ValueError, TypeError, OSError) as error:
        raise ZooError(f"{constants.ENDPOINT} can't be asked what {namespace} has ({reason(error)}).") from error


def _metadata(repo: str, token: str | bool | None) -> Any:
    """Of a card that a list of models leaves out; None where there is none, or none that can be read."""
    try:
        with tempfile.TemporaryDirectory() as place:  # in the cache it would move the note of the main branch
            path = hf_hub_download(repo, CARD, cache_dir=place, token=token, etag_timeout=TIMEOUT)
            return ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data
    except (errors.HTTPError, ValueError, TypeError, OSError):
        return None


def _card(repo: str, data: Any) -> Card:
    """Its figures are those of the first part of the test set, by the score that decides."""
    results, figures = data.eval_results or [], {}
    named = {title: key for key, title in METRICS.items()}
    for each in results:
        counts = each.dataset_config == results[0].dataset_config and not each.metric_args
        if counts and each.metric_name in named and _is_number(each.metric_value):
            figures.setdefault(named[each.metric_name], float(each.metric_value))
    name = _shown(results[0].dataset_name) if results else None
    return Card(_shown(repo), [_shown(tag) for tag in data.tags or ()], name, figures)


def _shown(text: Any) -> str:
    """A text from anywhere without what a terminal would obey."""
    return "".join(each for each in str(text) if each.isprintable())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def is_open(repo: str, kind: str) -> bool:
    """Whether somebody without a token may see a "dataset" or a "model"; False where that can't be told, or of ""."""
    try:
        ask = partial(HfApi().repo_info, repo, repo_type=kind, token=False, timeout=TIMEOUT)
        return bool(repo) and not constants.HF_HUB_OFFLINE and not within(PATIENCE, ask).private
    except (errors.HTTPError, ValueError, OSError):  # a name that is told by mistake can't be taken back
        return False


@contextmanager
def without_bars() -> Iterator[None]:
    """Without the progress bars of the hub's client."""
    shown = not are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            enable_progress_bars()


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the hub's client."""
    verbosity = client_log.get_verbosity()
    client_log.set_verbosity_error()
    try:
        yield
    finally:
        client_log.set_verbosity(verbosity)
