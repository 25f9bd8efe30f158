"""A release: methods trained and evaluated on a data set, and of each the model of seed 0, ready to be published.

A folder holds `work/`, a benchmark (`zoo.benchmark`) with all that is private, and `models/NAME`, what is public of a
model: the set that a machine without a hub is given (`zoo.importing`), and that a hub gets. What is done is not done
again: the same command goes on after a kill, and ends with the same files.
"""

import hashlib
import os
import re
import shlex
import shutil
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zoo import checkpoint, hub
from zoo.benchmark import read_record, run_benchmark
from zoo.calibration import TooFewNormals, check_rate
from zoo.card_data import public_name
from zoo.checkpoint import RECORD, WEIGHTS, dump, read_json, replacing, write_text
from zoo.data import RESERVED, DataSpec, check_data
from zoo.data.terms import terms_of
from zoo.errors import ZooError
from zoo.methods import method_id, presets
from zoo.paths import locked
from zoo.plan import Plan, preset_of, run_name
from zoo.publish import check_target, publish, stage
from zoo.ranks import launched
from zoo.run import RunOptions

WORK, MODELS = "work", "models"
DRAWS = 1000  # of the test images, for the intervals of a published record
MARK = Path("private", "release.json")  # in a model that is made ready: what it was made from
PATIENCE = 600  # seconds for another release in the folder to write a model
TIMEOUT = 4  # seconds of the one question to the hub before the work


@dataclass
class Release:
    """What is to be released, and where to.

    Attributes:
        plan: of the runs; its `out` is `work` in the folder of the release.
        org: user or organisation on the hub.
        prefix: of the models' names; None: by the name of the data set.
        rate: false-alarm rate that each model is calibrated for, where there are normal images enough.
        push: upload; else it is only said what would be.
        private: make new repositories private.
        tag: of the commits.
    """

    plan: Plan
    org: str
    prefix: str | None = None
    rate: float = 0.01
    push: bool = False
    private: bool = False
    tag: str | None = None

    @property
    def out(self) -> Path:
        return self.plan.out.parent


def run_release(release: Release, say: Callable[[str], None]) -> dict[str, str]:
    """Do what is left to do of a release, from the first run to the last upload.

    A method that fails, and a repository that can't be written, are passed over and named in the end.

    Args:
        say: told a line at a time.

    Returns:
        Why not, by what has failed: a run, a model or a repository; empty if nothing has.

    Raises:
        ZooError: a mistake in the arguments, before anything is run.
    """
    names = check_release(release, say)
    records = run_benchmark(release.plan, say)
    failed = {name: record["failed"] for name, record in records.items() if "failed" in record}
    ready: dict[str, Path] = {}
    uncalibrated: dict[str, list[str]] = {}
    for method, name in names.items():
        runs = [run_name(method, seed) for seed in range(release.plan.seeds)]
        if failed.keys() & set(runs):
            say(f"{name} is held back until all of its runs have succeeded.")
            continue
        try:
            ready[name], why = _staged(release, method, name, runs, say)
        except ZooError as error:
            failed[name] = str(error)
            continue
        if why:
            uncalibrated.setdefault(why, []).append(name)
    for why, which in uncalibrated.items():
        say(f"Without a false-alarm rate: {', '.join(which)}. {why}")
    say(f"{len(ready)} of {len(names)} models are in {release.out / MODELS}.")
    for name, folder in ready.items():
        repo = f"{release.org}/{name}"
        if not release.push:
            say(f"Would go to {repo}: {', '.join(_files(folder))}")
            continue
        try:
            done = publish(folder, repo, private=release.private or None, tag=release.tag, say=say)
            say(f"{done.url}: {', '.join(done.uploaded) or 'has all of it already'}")
        except ZooError as error:
            failed[repo] = str(error)
    return failed


# ---- before the work -------------------------------------------------------------------------------------------------


def check_release(release: Release, say: Callable[[str], None]) -> dict[str, str]:
    """The names of the models by method; whatever can be wrong is found before days of training.

    Raises:
        ZooError: it is.
    """
    if launched()[1] > 1:
        raise ZooError("zoo release is started without torchrun or srun; --devices N shares each of its runs.")
    if "/" in release.org:
        raise ZooError(f"--to is a user or an organisation on the hub, such as ORG, not {release.org}.")
    plan, spec = release.plan, check_data(release.plan.data)
    check_rate(release.rate)
    methods = list(dict.fromkeys(map(method_id, plan.methods)))
    prefix = _prefix(release, spec)
    names = {method: f"{prefix}-{method.replace('_', '-')}" for method in methods}
    for method, name in names.items():
        hub.model_place(name)
        check_target(f"{release.org}/{name}", release.tag)
        _check_predicts(method, plan.preset)
    for folder in (release.out, plan.out, release.out / MODELS):
        if folder.exists() and not folder.is_dir():
            raise ZooError(f"{folder} is a file; name another folder by --out.")
    for place in (release.out / MODELS / name for name in names.values()):
        if place.exists():
            checkpoint.check_place(place)
    if release.push:
        check_access(release.org, next(iter(names.values())), release.private, say)
    return names


def _prefix(release: Release, spec: DataSpec) -> str:
    """What the names of the models begin with; that of MIIC is for MIIC alone.

    Raises:
        ZooError: no name; MIIC's, or a name that may be private.
    """
    own = _slug(spec.name.partition(":")[0])  # of the built-in set without its options
    prefix = own if release.prefix is None else _slug(release.prefix)
    if not prefix or (release.prefix is not None and prefix != release.prefix.lower().replace("_", "-")):
        raise ZooError(f"--prefix is letters, digits and single dashes, such as fab7; not {release.prefix or own!r}.")
    if prefix.split("-")[0] == "miic" and not (prefix == own and spec.name in RESERVED):
        raise ZooError(f"--prefix {prefix} is for models of MIIC, and these are of {spec.name}; give another one.")
    if release.push and release.prefix is None and not (public_name({"name": spec.name}) or _is_open(spec)):
        raise ZooError(f"The name of the data {spec.name} would be public; say by --prefix what to call the models.")
    return prefix


def _is_open(spec: DataSpec) -> bool:
    """Whether anybody may see the data on the hub."""
    from zoo.remote import is_open

    return spec.kind == "hub" and is_open(spec.options["repo"], "dataset")


def _slug(name: str) -> str:
    """A name in small letters, digits and single dashes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:48].strip("-")


def _check_predicts(method: str, preset: str | None) -> None:
    """Raises ZooError for a preset that is for parity runs alone: its models refuse to predict."""
    name = preset_of(method, preset)
    if presets(method, name).get("data", {}).get("crop"):
        raise ZooError(f"--preset {name} of {method} cuts images to their centre, for parity runs; take paper224.")


def check_access(org: str, name: str, private: bool, say: Callable[[str], None]) -> None:
    """Ask the hub once whether the token may write to a namespace; where it tells of none, try by making a repository.

    Raises:
        ZooError: it may not, or the hub doesn't answer.
    """
    from huggingface_hub import constants, errors
    from huggingface_hub.utils import build_hf_headers, get_session, get_token

    from zoo.remote import reason, within

    where = constants.ENDPOINT
    if constants.HF_HUB_OFFLINE:
        raise ZooError(f"{where} can't be pushed to in offline mode; unset HF_HUB_OFFLINE, or leave out --yes.")
    if not get_token():
        raise ZooError(f"{where} takes nothing without a token: set HF_TOKEN, or log in (hf auth login).")

    def ask() -> Any:
        headers = build_hf_headers(token=True)
        answer = get_session().get(f"{where}/api/whoami-v2", headers=headers, timeout=TIMEOUT)
        if answer.status_code == 404:  # a mirror that knows no users
            return None
        answer.raise_for_status()
        return answer.json()

    try:
        about = within(TIMEOUT + 1, ask)
    except (errors.HTTPError, ValueError, OSError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        remedy = "the token is not known there; take another one" if status == 401 else "nothing was run; try again"
        raise ZooError(f"{where} can't be pushed to ({reason(error)}): {remedy}.") from error
    if about is None:
        say(f"{where} doesn't tell whether the token may write to {org}; it will be seen in the end.")
        return
    if about.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ZooError(f"The token of {about.get('name')} may only read; take one that may write to {org}.")
    roles = {each.get("name"): each.get("roleInOrg") for each in about.get("orgs", [])} | {about.get("name"): "admin"}
    if org not in roles and len(roles) == 1:
        _try(f"{org}/{name}", private)
    elif org not in roles or roles[org] == "read":
        writable = ", ".join(name for name, role in roles.items() if name and role != "read")
        raise ZooError(f"The token may not write to {org} on {where}, but to {writable}; take another one, or --to.")


def _try(repo: str, private: bool) -> None:
    """Make the repository that a model will go to, empty."""
    from huggingface_hub import HfApi, errors

    from zoo.remote import TIMEOUT, reason, within

    try:
        within(3 * TIMEOUT, lambda: HfApi().create_repo(repo, private=private or None, exist_ok=True))
    except (errors.HTTPError, ValueError, OSError) as error:
        raise ZooError(
            f"The token may not write to {repo.partition('/')[0]} ({reason(error)}); take another one, or --to."
        ) from error


# ---- models that can be published ------------------------------------------------------------------------------------


def _staged(
    release: Release, method: str, name: str, runs: Sequence[str], say: Callable[[str], None]
) -> tuple[Path, str | None]:
    """The public folder of a method's model, written anew; and why it is not calibrated, if it is not."""
    held = f"Another release works in {release.out}; try again when it has ended."
    with locked(release.plan.out / f".{name}.release", PATIENCE, held):
        for place in (release.out / MODELS / name, release.plan.out / "ready" / method):
            for left in place.parent.glob(f".{place.name}.*"):  # by one that was killed
                shutil.rmtree(left, ignore_errors=True)
        ready, why = _ready(release, method, runs, say)
        repo, spec = f"{release.org}/{name}", check_data(release.plan.data)
        return stage(ready, release.out / MODELS / name, repo, is_open=lambda repo, kind: _is_open(spec)), why


def _ready(release: Release, method: str, runs: Sequence[str], say: Callable[[str], None]) -> tuple[Path, str | None]:
    """The model of seed 0, calibrated, with what the other seeds say in its record; made once of the same records."""
    out = release.plan.out
    source, ready = hub.model_place(runs[0], out), out / "ready" / method
    records = [read_record(out, run) for run in runs]
    made_from = {"rate": release.rate} | {run: _digest(dump(each)) for run, each in zip(runs, records, strict=True)}
    mark = read_json(ready / MARK)
    if mark.get("from") != made_from:
        mark = {"from": made_from, "uncalibrated": _make_ready(release, source, ready, records, say)}
        write_text(ready / MARK, dump(mark))
    return ready, mark["uncalibrated"]


def _make_ready(
    release: Release, source: Path, ready: Path, records: Sequence[dict[str, Any]], say: Callable[[str], None]
) -> str | None:
    """Copy a model with the figures of all seeds, and calibrate the copy; why not, where the normals are too few."""
    why = None
    with replacing(ready) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True, copy_function=_link)
        result = checkpoint.read_record(source)
        if len(records) > 1:
            result["seeds"] = seeds_of(records)
        write_text(temporary / RECORD, dump(result))
        try:
            _calibrate(release, source, temporary, result, say)
        except TooFewNormals as error:
            why = str(error.__cause__ or error)  # without the remedy of a single fit
    return why


def seeds_of(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many seeds there are, and of each metric mean and sample standard deviation over them."""
    values = {key: [record["metrics"][key] for record in records] for key in records[0]["metrics"]}
    spread = {key: [round(statistics.fmean(of), 6), round(statistics.stdev(of), 6)] for key, of in values.items()}
    return {"count": len(records), "metrics": spread}


def _calibrate(
    release: Release, source: Path, folder: Path, result: dict[str, Any], say: Callable[[str], None]
) -> None:
    """Give a copy of a model thresholds from normals of the release's own data that it has not seen."""
    from zoo.calibrate import calibrate, store_calibration

    plan, model = release.plan, hub.from_pretrained(source)
    options = {"num_workers": plan.num_workers, "skip_broken": plan.skip_broken}
    options |= {"batch_size": result["configuration"]["data"]["batch_size"]}
    run = RunOptions(plan.device, 1, plan.precision, say=say)
    about, rows = calibrate(model, plan.data, release.rate, folder=source, data_options=options, run=run)
    store_calibration(folder, model.calibration, about, rows, model.view)


def _link(source: str, target: str) -> None:
    """A second name of a file that is replaced and never written to; a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# ---- what is said ----------------------------------------------------------------------------------------------------


def _files(folder: Path) -> list[str]:
    """Files with their sizes, the weights first."""
    paths = sorted((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.name != WEIGHTS)
    return [f"{path.relative_to(folder).as_posix()} {_size(path.stat().st_size)}" for path in paths]


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def closing_lines(release: Release, argv: Sequence[str]) -> list[str]:
    """What a release ends with: where the set is, its terms, and the command that is next."""
    lines = [f"For a machine without a hub: copy {release.out / MODELS} there, and zoo import it."]
    if terms := terms_of(check_data(release.plan.data).name):
        lines.append(f"Terms of the data that they were learned from: {terms}")
    if not release.push:
        lines.append(f"Nothing was pushed; to push: {shlex.join(['zoo', 'release', *argv, '--yes'])}")
    return lines
