"""A benchmark: each method and seed in a process of its own, one record a run, whatever is interrupted or fails.

A folder holds `benchmark.json` (what is compared, and how), `halves.json` (the halves of the test set), and for each
run `runs/<method>-seed<k>.json` (its record, written last), pictures beside it, `logs/` (what it said) and its model
under `models/`. A run with a record is done; any other is started again and goes on where it was.
"""

import json
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zoo import hub
from zoo.checkpoint import dump, write_text
from zoo.errors import ZooError
from zoo.launch import Launcher
from zoo.methods import method_id
from zoo.paths import locked
from zoo.plan import FORMAT_VERSION, Plan, jobs_of, run_key, run_name
from zoo.reasons import reason

INDEX = "benchmark.json"
RESULTS = {"readings", "metrics", "cost"}  # what a record of a run has that did not fail
LOOK = 2.0  # seconds between looks at runs that another benchmark does
PATIENCE = 120  # seconds for another benchmark to write what concerns both


def run_benchmark(plan: Plan, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Do all runs that have no record yet, one after the other; a run that fails leaves its reason and is passed over.

    Several benchmarks may work in a folder, one a GPU: each passes over what another one is doing, and comes back to it
    in the end. Under torchrun or srun each process does this in step, and starts its share of each run.

    Args:
        say: told a line at a time.

    Returns:
        The records by name, those of failed runs too: they have `failed`, the reason.

    Raises:
        ZooError: a mistake in the plan, or another benchmark in the folder.
    """
    launcher = Launcher(plan.devices)
    index, jobs = launcher.first(partial(jobs_of, plan))
    launcher.first(partial(_open, plan, index))
    with _writable(plan.out), _sigterm_as_interrupt():
        missing = [job for job in jobs if not is_done(read_record(plan.out, job["name"]), job["key"])]
        missing = launcher.agree(missing)
        done = len(jobs) - len(missing)
        before = f", {done} of them done before" if done else ""
        say(f"{len(jobs)} run{'s' * (len(jobs) > 1)} on {index['common']['data']['name']}{before}.")
        say(f"What they tell is in {plan.out / 'logs'}.")
        took: dict[str, float] = {}  # seconds of a method's last run
        for job, left in _claimed(plan.out, missing, launcher, say):
            time_left = _time_left(took, [each["method"] for each in left])
            number = len(jobs) - len(left) + 1
            method = job["method"].replace("_", "-")
            say(f"[{number} of {len(jobs)}] {method}, seed {job['seed']}{time_left} ...")
            begin = time.monotonic()
            why = _run(job, plan.out, launcher)
            took[job["method"]] = time.monotonic() - begin
            record = read_record(plan.out, job["name"])
            if is_done(record, job["key"]):
                say(f"    image ROC {record['metrics']['image_auroc']:.4f} ({took[job['method']]:.0f} s)")
            elif launcher.rank == 0:
                failed = {"failed": why, "method": job["method"], "seed": job["seed"]}
                failed["benchmark"] = {"key": job["key"], "name": job["name"]}
                write_text(_record_place(plan.out, job["name"]), dump(failed))
                say(f"    failed: {why}")
    return {job["name"]: read_record(plan.out, job["name"]) for job in jobs}


def _open(plan: Plan, index: dict[str, Any]) -> None:
    """Make the folder and write its index, or refuse to."""
    if plan.out.exists() and not plan.out.is_dir():
        raise ZooError(f"--out {plan.out} is a file; name a folder.")
    if plan.figure_method:
        check_figure_method(plan.figure_method, joined(plan.out, index)["methods"])
    with alone(plan.out):
        write_text(plan.out / INDEX, dump(joined(plan.out, index)))


def _claimed(
    out: Path, jobs: Sequence[dict[str, Any]], launcher: Launcher, say: Callable[[str], None]
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """The jobs that no other benchmark does, each with what is left; it is held until the next one is asked for."""
    left, before, told = list(jobs), {job["name"]: _changed(out, job["name"]) for job in jobs}, False
    while left:
        theirs = len(left)
        for job in list(left):
            with ExitStack() as held:
                if launcher.agree(launcher.rank == 0 and not _hold(out, job["name"], held)):
                    continue
                theirs -= 1
                done = is_done(read_record(out, job["name"]), job["key"])
                if not launcher.agree(done or _changed(out, job["name"]) != before[job["name"]]):  # by another one
                    launcher.first(partial(_look_at_checkpoint, hub.unfinished_place(job["name"], out), say))
                    yield job, left
                left.remove(job)
        if left and theirs == len(left):
            if not told:
                say(f"Another benchmark does the {len(left)} left; waiting for it.")
                told = True
            time.sleep(LOOK)


def _hold(out: Path, name: str, held: ExitStack) -> bool:
    """Take a run for this benchmark, unless another one has."""
    try:
        held.enter_context(FileLock(out / "runs" / f".{name}.claim").acquire(timeout=0))
        return True
    except Timeout:
        return False


def _look_at_checkpoint(path: Path, say: Callable[[str], None]) -> None:
    if path.is_file():
        from zoo.resume import drop_unusable  # loads torch and Lightning

        drop_unusable(path, say)


def _changed(out: Path, name: str) -> int | None:
    """When the record of a run was written."""
    place = _record_place(out, name)
    return place.stat().st_mtime_ns if place.is_file() else None


def _run(job: dict[str, Any], out: Path, launcher: Launcher) -> str:
    """Run a job; why it failed, if it did: what the first process says that has failed and was not ended."""
    log = out / "logs" / (f"{job['name']}.log" if not launcher.rank else f"{job['name']}-rank{launcher.rank}.log")
    code, was_ended = launcher.run(job, log)
    why = reason(log, code, _places(job)) if code else ""
    failed = [told for told in launcher.gather((was_ended, "; see logs" in why, why)) if told[2]]
    # One that others have left alone fails as well, of a lost connection: a sentence goes before what nobody foresaw.
    return min(failed, key=lambda told: told[:2])[2] if failed else f"left no record; see logs/{log.name}"


def _time_left(took: dict[str, float], methods: Sequence[str]) -> str:
    """What the runs to come will take, once each of their methods has run."""
    if not set(methods) <= took.keys():
        return ""
    seconds = sum(took[method] for method in methods)
    return f", about {seconds / 3600:.1f} h left" if seconds > 5400 else f", about {max(seconds / 60, 1):.0f} min left"


def read_index(out: Path) -> dict[str, Any]:
    """The checked `benchmark.json` of a folder; {} where there is none.

    Raises:
        ZooError: damaged, or of another format.
    """
    path = out / INDEX
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        version = index["format_version"]
        if version == FORMAT_VERSION:
            (
                index["common"]["data"]["name"],
                [how["preset"] for how in index["methods"].values()],
                index["seeds"].items(),
            )
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ZooError(f"{path} is damaged; name another folder by --out.") from error
    if version != FORMAT_VERSION:
        raise ZooError(f"{path} has format version {version}, not {FORMAT_VERSION}; name another folder by --out.")
    return index


def joined(out: Path, index: dict[str, Any]) -> dict[str, Any]:
    """The index that a folder has, with methods that are new to it.

    Raises:
        ZooError: the folder holds a benchmark of something else.
    """
    found = read_index(out)
    if not found:
        return index
    seeds = found.get("seeds", {})
    kept = {method for method in index["methods"].keys() & found["methods"].keys() if _has_work(out, method, seeds)}
    pairs = [("", found["common"], index["common"])]
    pairs += [(f" of {method}", found["methods"][method], index["methods"][method]) for method in sorted(kept)]
    for of, before, now in pairs:
        for key, value in now.items():
            if before.get(key) != value and not (key == "contents" and _now_there(before, value)):
                pair = (before.get(key), value) if key != "data" else (before[key]["name"], value["name"])
                was, asked = map(json.dumps, pair)
                asked = "with the same images" if was == asked else asked
                raise ZooError(
                    f"{out} holds a benchmark whose {key.replace('_', '-')}{of} is {was}, not {asked}; take the same, "
                    "or another folder by --out."
                )
    return found | {
        "methods": found["methods"] | index["methods"],
        "seeds": seeds | {method: max(count, seeds.get(method, 0)) for method, count in index["seeds"].items()},
    }


def _has_work(out: Path, method: str, seeds: dict[str, int]) -> bool:
    """Whether a run of a method has left more than its failure: a model, or the checkpoint of a fit."""
    names = [run_name(method, seed) for seed in range(seeds.get(method, 0))]
    return any(hub.model_place(name, out).exists() or hub.unfinished_place(name, out).exists() for name in names)


def _now_there(before: dict[str, Any], contents: dict[str, str | None]) -> bool:
    """Whether contents of arguments differ only in what was missing when the benchmark began."""
    known = before.get("contents", {})
    return known.keys() == contents.keys() and all(known[name] in (None, value) for name, value in contents.items())


def check_figure_method(name: str, methods: Collection[str]) -> str:
    """The id of the method that Figure 1 is to show.

    Raises:
        ZooError: there is no such method, or it is not one of these.
    """
    method = method_id(name)
    if method not in methods:
        known = ", ".join(sorted(each.replace("_", "-") for each in methods))
        raise ZooError(f"--figure-method {name} is not one of the methods that are compared: {known}.")
    return method


def read_record(out: Path, name: str) -> dict[str, Any]:
    """The record of a run; {} where there is none, or another file: damaged, of something else, or a copy."""
    try:
        record = json.loads(_record_place(out, name).read_text(encoding="utf-8"))
        own = record["benchmark"]["name"] == name == run_name(record["method"], record["seed"])
        whole = "failed" in record or RESULTS <= record.keys()
        return record if own and whole and isinstance(record["benchmark"]["key"], str) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def read_records(out: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an index's runs, failed ones too, in the order of methods and seeds."""
    found = filter(None, (read_record(out, path.stem) for path in sorted((out / "runs").glob("*.json"))))
    known = []
    for record in found:
        method, seed = record["method"], record["seed"]
        how = index["methods"].get(method)
        if how and record["benchmark"]["key"] == run_key(index["common"], method, how, seed):
            known.append(record)
    return sorted(known, key=lambda record: (record["method"], record["seed"]))


def _record_place(out: Path, name: str) -> Path:
    return out / "runs" / f"{name}.json"


def is_done(record: dict[str, Any], key: str) -> bool:
    """Whether this is the record of a finished run of that configuration."""
    return record.get("benchmark", {}).get("key") == key and "failed" not in record


def _places(job: dict[str, Any]) -> list[str]:
    """What a run was given that may be a place of this machine."""
    return [job["data"], job["out"], *(value for value in job["arguments"].values() if isinstance(value, str))]


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Of several benchmarks in a folder one at a time, for what concerns them all; it takes seconds."""
    with _writable(out):
        (out / "runs").mkdir(parents=True, exist_ok=True)
        held = f"Another benchmark holds {out}; see what it does, or name another folder by --out."
        with locked(out / ".lock", PATIENCE, held):
            yield


@contextmanager
def _writable(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ZooError(f"{out} could not be written ({error}); runs with a record are kept.") from error


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """A benchmark that is asked to end asks its run to end, which keeps a checkpoint."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
