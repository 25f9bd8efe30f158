"""A benchmark: each method and seed in a process of its own, one record a run, whatever is interrupted or fails.

A folder holds `benchmark.json` (what is compared, and how), `halves.json` (the halves of the test set), and for each
run `runs/<method>-seed<k>.json` (its record, written last), pictures beside it, `logs/` (what it said) and its model
under `models/`. A run with a record is done; any other is started again and goes on where it was.
"""

import json
import signal
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zoo.checkpoint import dump, write_text
from zoo.errors import ZooError
from zoo.launch import Launcher
from zoo.methods import method_id
from zoo.plan import FORMAT_VERSION, Plan, jobs_of, run_key
from zoo.ranks import launched
from zoo.reasons import reason

INDEX = "benchmark.json"


def run_benchmark(plan: Plan, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Do all runs that have no record yet, one after the other; a run that fails leaves its reason and is passed over.

    Under torchrun or srun each process does this in step, and starts its share of each run.

    Args:
        say: told a line at a time.

    Returns:
        The records by name, those of failed runs too: they have `failed`, the reason.

    Raises:
        ZooError: a mistake in the plan, another benchmark in the folder, or one that works there right now.
    """
    index, jobs = jobs_of(plan)
    if plan.figure_method:
        check_figure_method(
            plan.figure_method, index["methods"].keys() | read_index(plan.out).get("methods", {}).keys()
        )
    first = launched()[0] == 0
    with _alone(plan.out, first), _sigterm_as_interrupt():
        if first:
            write_text(plan.out / INDEX, dump(joined(plan.out, index)))
        launcher = Launcher(plan.devices)
        missing = [job for job in jobs if not is_done(read_record(plan.out, job["name"]), job["key"])]
        missing = launcher.agree(missing)
        done = len(jobs) - len(missing)
        before = f", {done} of them done before" if done else ""
        say(f"{len(jobs)} run{'s' * (len(jobs) > 1)} on {index['common']['data']['name']}{before}.")
        say(f"What they tell is in {plan.out / 'logs'}.")
        took: dict[str, float] = {}  # seconds of a method's last run
        for number, job in enumerate(missing, done + 1):
            left = _time_left(took, [job["method"] for job in missing[number - done - 1 :]])
            say(f"[{number} of {len(jobs)}] {job['method']}, seed {job['seed']}{left} ...")
            begin = time.monotonic()
            code = launcher.run(job, _log(plan.out, job["name"]))
            took[job["method"]] = time.monotonic() - begin
            record = read_record(plan.out, job["name"])
            if is_done(record, job["key"]):
                say(f"    image ROC {record['metrics']['image_auroc']:.4f} ({took[job['method']]:.0f} s)")
            elif first:
                why = reason(_log(plan.out, job["name"]), code, _places(job))
                failed = {"failed": why, "method": job["method"], "seed": job["seed"]}
                failed["benchmark"] = {"key": job["key"], "name": job["name"]}
                write_text(plan.out / "runs" / f"{job['name']}.json", dump(failed))
                say(f"    failed: {why}")
    return {job["name"]: read_record(plan.out, job["name"]) for job in jobs}


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
    except (ValueError, KeyError, TypeError, OSError) as error:
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
    pairs = [("", found["common"], index["common"])]
    pairs += [(f" of {m}", found["methods"][m], how) for m, how in index["methods"].items() if m in found["methods"]]
    for of, before, now in pairs:
        for key, value in now.items():
            if before.get(key) != value:
                key, was = key.replace("_", "-"), json.dumps(before.get(key))
                raise ZooError(
                    f"{out} holds a benchmark with another {key}{of}, {was}; take the same, or another folder by --out."
                )
    return found | {"methods": found["methods"] | index["methods"]}


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
    """The record of a run; {} where there is none that can be read."""
    try:
        return json.loads((out / "runs" / f"{name}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def read_records(out: Path, index: dict[str, Any]) -> list[dict[str, Any]]:
    """The records of an index's runs, failed ones too, in the order of methods and seeds."""
    found = [read_record(out, path.stem) for path in sorted((out / "runs").glob("*.json"))]
    known = []
    for record in found:
        method, seed = record.get("method"), record.get("seed")
        how = index["methods"].get(method)
        if how and record["benchmark"]["key"] == run_key(index["common"], method, how, seed):
            known.append(record)
    return sorted(known, key=lambda record: (record["method"], record["seed"]))


def is_done(record: dict[str, Any], key: str) -> bool:
    """Whether this is the record of a finished run of that configuration."""
    return record.get("benchmark", {}).get("key") == key and "failed" not in record


def _log(out: Path, name: str) -> Path:
    rank = launched()[0]
    return out / "logs" / (f"{name}.log" if not rank else f"{name}-rank{rank}.log")


def _places(job: dict[str, Any]) -> list[str]:
    """What a run was given that may be a place of this machine."""
    return [job["data"], job["out"], *(value for value in job["arguments"].values() if isinstance(value, str))]


@contextmanager
def _alone(out: Path, first: bool) -> Iterator[None]:
    """One benchmark at a time in a folder; of several processes the first one sees to it."""
    if not first:
        yield
        return
    if out.exists() and not out.is_dir():
        raise ZooError(f"--out {out} is a file; name a folder.")
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        with FileLock(out / ".lock").acquire(timeout=0):  # let go of by a process that is killed
            yield
    except Timeout:
        raise ZooError(f"Another benchmark works in {out}; wait for it, or name another folder by --out.") from None
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
