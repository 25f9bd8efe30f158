"""A benchmark: each method and seed in a process of its own, one record a run, whatever is interrupted or fails.

A folder holds `benchmark.json` (what is compared, and how), `halves.json` (the halves of the test set), and for each
run `runs/<method>-seed<k>.json` (its record, written last), pictures beside it, `logs/` (what it said) and its model
under `models/`. A run with a record is done; any other is started again and goes on where it was.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from zoo.checkpoint import dump, write_text
from zoo.data import DataSpec, check_data
from zoo.errors import ZooError
from zoo.methods import method_id, presets, signature
from zoo.ranks import launched
from zoo.run import plan_training

FORMAT_VERSION = 1
INDEX = "benchmark.json"
DEFAULT_SELECT = "image_auroc"
ONE_PASS_PRESETS = {"mvtec_steps": "paper224"}  # what methods without steps take where a preset is about steps


@dataclass
class Plan:
    """What a benchmark compares, and how.

    `budget` is a number of optimiser steps for each method that takes steps ("300"), or a share of what the preset has
    for it ("10%"). `arguments` are values of a method's own arguments by method. `batch_size` None takes the preset's.
    """

    data: str
    methods: list[str]
    out: Path
    seeds: int = 3
    preset: str | None = None
    budget: str | None = None
    protocol: str = "house"
    select: str = DEFAULT_SELECT
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    batch_size: int | None = None
    num_workers: int | None = None
    skip_broken: bool = False
    device: str = "auto"
    devices: int = 1
    precision: str = "32-true"


def trainer_options(method: str, preset: str, budget: str | None, select: str) -> dict[str, Any]:
    """How a method is trained in a benchmark; {} for one that learns in a single pass.

    Raises:
        ZooError: a budget or selection of no use.
    """
    planned = presets(method, preset).get("trainer")
    share = re.fullmatch(r"(\d+(?:\.\d+)?)%", budget or "")
    if budget and not (share or re.fullmatch(r"\d+", budget)) or (share and not float(share[1])):
        raise ZooError(
            f"--budget is a number of steps such as 300, or a share of the preset's such as 10%; not {budget}."
        )
    if planned is None:
        return {}
    given: dict[str, Any] = {"select": select}
    if share:
        key = "max_steps" if planned.get("max_steps") else "max_epochs"
        given[key] = max(1, round(planned[key] * float(share[1]) / 100))
    elif budget:
        given["max_steps"] = int(budget)
    plan_training(method, preset, given)
    return given


def jobs_of(plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The index of a benchmark and its runs, seed by seed, checked as far as that goes without an image.

    Raises:
        ZooError: a mistake in the plan.
    """
    if plan.seeds < 1:
        raise ZooError(f"--seeds is at least 1, not {plan.seeds}.")
    spec = check_data(plan.data)
    _check_counts(plan, spec)
    common = {
        "data": {"name": spec.name, "fingerprint": spec.fingerprint},
        **{key: getattr(plan, key) for key in ("preset", "budget", "protocol", "select", "precision", "devices")},
        **{key: getattr(plan, key) for key in ("batch_size", "skip_broken")},
    }
    methods: dict[str, dict[str, Any]] = {}
    arguments = {method_id(name): values for name, values in plan.arguments.items()}
    for method in dict.fromkeys(method_id(name) for name in plan.methods):
        preset = _preset(method, plan.preset, arguments.get(method, {}))
        unknown = arguments.get(method, {}).keys() - (signature(method).keys() - {"seed"})
        if unknown:
            raise ZooError(f"{method} has no argument {min(unknown)!r} to benchmark with; see zoo fit {method} --help.")
        trainer = trainer_options(method, preset, plan.budget, plan.select)
        methods[method] = {"preset": preset, "arguments": _placeless(arguments.get(method, {})), "trainer": trainer}
    if others := arguments.keys() - methods.keys():
        raise ZooError(f"--arguments speaks of {min(others)}, which --methods leaves out.")
    jobs = [
        _job(plan, common, method, how, seed) | {"arguments": arguments.get(method, {})}
        for seed in range(plan.seeds)
        for method, how in methods.items()
    ]
    return {"format_version": FORMAT_VERSION, "common": common, "methods": methods}, jobs


def _placeless(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments as a record may tell them: of a file its name, not its place."""
    return {
        name: os.path.basename(value) if isinstance(value, str) and os.path.isabs(value) else value
        for name, value in arguments.items()
    }


def _check_counts(plan: Plan, spec: DataSpec) -> None:
    if not spec.counts["train"][0]:
        raise ZooError(f"--data {plan.data} has no normal images to fit on; put some into train/good or good.")
    if min(spec.counts["test"]) < 2:
        raise ZooError(f"--data {plan.data} needs two normal and two anomalous test images, for two halves.")


def _preset(method: str, preset: str | None, arguments: dict[str, Any]) -> str:
    """The preset that a method takes, whose weights can be had where none is named."""
    if preset is None:
        from zoo.fit import choose_preset

        try:
            return choose_preset(method, None, arguments)
        except ZooError as error:
            reason = str(error).split(";")[0]
            raise ZooError(f"{reason}; take zoo benchmark --preset lite, or --methods without {method}.") from None
    other = ONE_PASS_PRESETS.get(preset)
    if other and "trainer" not in presets(method, other):
        return other
    presets(method, preset)
    return preset


def _job(plan: Plan, common: dict[str, Any], method: str, how: dict[str, Any], seed: int) -> dict[str, Any]:
    options = {"num_workers": plan.num_workers, "skip_broken": plan.skip_broken}
    options |= {"batch_size": plan.batch_size} if plan.batch_size else {}
    return how | {
        "method": method,
        "seed": seed,
        "name": f"{method.replace('_', '-')}-seed{seed}",
        "key": run_key(common, method, how, seed),
        "data": plan.data,
        "data_options": options,
        "protocol": plan.protocol,
        "device": plan.device,
        "precision": plan.precision,
        "out": str(plan.out),
    }


def run_key(common: dict[str, Any], method: str, how: dict[str, Any], seed: int) -> str:
    """What a record and the configuration that it belongs to have in common."""
    return hashlib.sha256(json.dumps([common, method, how, seed], sort_keys=True).encode()).hexdigest()[:16]


def run_benchmark(plan: Plan, say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Do all runs that have no record yet, one after the other; a run that fails leaves its reason and is passed over.

    Under torchrun or srun each process starts its share of each run.

    Args:
        say: told a line at a time.

    Returns:
        The records by name, those of failed runs too: they have `failed`, the reason.

    Raises:
        ZooError: a mistake in the plan, another benchmark in the folder, or one that works there right now.
    """
    index, jobs = jobs_of(plan)
    first = launched()[0] == 0
    with _alone(plan.out, first), _sigterm_as_interrupt():
        if first:
            write_text(plan.out / INDEX, dump(joined(plan.out, index)))
        missing = [job for job in jobs if not is_done(read_record(plan.out, job["name"]), job["key"])]
        done = len(jobs) - len(missing)
        say(
            f"{len(jobs)} runs on {index['common']['data']['name']}"
            + f", {done} of them done before" * bool(done)
            + "."
        )
        for number, job in enumerate(missing, done + 1):
            say(f"[{number} of {len(jobs)}] {job['method']}, seed {job['seed']} ...")
            begin = time.monotonic()
            code = _launch(job, plan, number)
            record = read_record(plan.out, job["name"])
            if is_done(record, job["key"]):
                say(f"    image ROC {record['metrics']['image_auroc']:.4f} ({time.monotonic() - begin:.0f} s)")
            elif first:
                reason = _reason(_log(plan.out, job["name"]), code, job)
                failed = {"failed": reason, "method": job["method"], "seed": job["seed"]}
                failed["benchmark"] = {"key": job["key"], "name": job["name"]}
                write_text(plan.out / "runs" / f"{job['name']}.json", dump(failed))
                say(f"    failed: {reason}")
    return {job["name"]: read_record(plan.out, job["name"]) for job in jobs}


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


def _launch(job: dict[str, Any], plan: Plan, number: int) -> int:
    """Run a job in a process of its own, or in several; the exit code."""
    command = [sys.executable, "-m", "zoo.trial", json.dumps(job)]
    if plan.devices > 1:
        command[1:2] = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(plan.devices), "-m"]
    # torchrun's processes meet once; those that these start meet again, under another number
    apart = {"TORCHELASTIC_RESTART_COUNT": str(number)} if launched()[1] > 1 else {}
    log = _log(plan.out, job["name"])
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as said:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env=os.environ | apart
        )
        try:
            return child.wait()
        except BaseException:
            child.terminate()
            child.wait()
            raise
        finally:
            child.stdin.close()  # open until then: a child whose benchmark is gone finds it closed, and ends


def _log(out: Path, name: str) -> Path:
    rank = launched()[0]
    return out / "logs" / (f"{name}.log" if not rank else f"{name}-rank{rank}.log")


def _reason(log: Path, code: int, job: dict[str, Any]) -> str:
    """Why a run failed, in a sentence without a place of this machine."""
    lines = [
        line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.startswith("zoo: ")
    ]
    if lines:
        own = [value for value in job["arguments"].values() if isinstance(value, str)]
        return publishable(lines[0].removeprefix("zoo: "), [job["data"], job["out"], *own])
    if code < 0:
        return f"ended by {signal.Signals(-code).name}" + ": out of memory?" * (code == -signal.SIGKILL)
    return f"ended with code {code}; see logs/{log.name}"


def publishable(text: str, places: Sequence[str]) -> str:
    """A text in which absolute paths are cut down to their last part."""
    known = [os.path.abspath(place) for place in places]
    for place in sorted([*known, os.path.expanduser("~"), os.getcwd(), sys.prefix], key=len, reverse=True):
        if len(place) > 1:
            text = text.replace(place, os.path.basename(place))
    return re.sub(r"(?<![\w.:/])/(?:[^\s/:;,'\"()]+/)*([^\s/:;,'\"()]+)", r"\1", text)


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
