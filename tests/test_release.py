"""A release from the first run to the last upload, and its way across an air gap."""

import contextlib
import io
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import READ, STRANGER
from miic_replica import make

from zoo import hub as names
from zoo import release
from zoo.calibration import restored
from zoo.cli import main
from zoo.data import DataSpec, load_data
from zoo.errors import ZooError
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.importing import import_models
from zoo.plan import Plan, jobs_of
from zoo.run import RunOptions

pytestmark = pytest.mark.usefixtures("runs_here")
SIZES = {"padim": {"input_size": 64, "dims": 20}, "stfpm": {"input_size": 64}}
PUBLIC = {"model.safetensors", "config.json", "README.md", "results.json"}
PADIM, STFPM = "miic-replica-padim", "miic-replica-stfpm"


def command(data, out, *more, methods=("stfpm", "padim"), seeds=2):
    given = {method: SIZES[method] for method in methods}
    about = ["--data", data, "--to", "fab", "--out", out, "--methods", *methods, "--seeds", seeds, "--budget", 40]
    how = ["--preset", "lite", "--batch-size", 10, "--device", "cpu", "--false-alarm-rate", 0.1]
    return [str(part) for part in ["release", *about, *how, "--arguments", json.dumps(given), *more]]


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(runs_here, tmp_path_factory):
    """A release that was killed in the middle of a fit, and again between two models, and was gone on with."""
    root = tmp_path_factory.mktemp("release")
    make(root / "data", train=60, normal=10, abnormal=8, size=64, traps=())
    data, out = f"miic:{root / 'data'}", root / "out"
    log = out / "work/logs/stfpm-seed0.log"
    launch = [sys.executable, "-m", "zoo.cli", *command(data, out)]
    job = subprocess.Popen(launch, stdout=subprocess.DEVNULL)
    while not (log.is_file() and "Step 8 of 40" in log.read_text()):
        assert job.poll() is None
        time.sleep(0.05)
    job.kill()
    job.wait()

    def killed(folder, place, repo, **how):
        if "padim" in repo:
            raise KeyboardInterrupt
        return stage(folder, place, repo, **how)

    stage, said = release.stage, io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(release, "stage", killed)
        assert main(command(data, out)) == 130
        first, runs = contents(out / "models"), contents(out / "work/runs")
        assert {name.split("/")[0] for name in first} == {STFPM}
        (out / f"models/.{PADIM}.1-2").mkdir()  # as a kill in the midst of writing leaves it
        patch.setattr(release, "stage", stage)
        with contextlib.redirect_stdout(said):
            assert main(command(data, out)) == 0
    assert not list((out / "models").glob(".*")) and not list((out / "work/ready").glob(".*"))
    assert first.items() <= contents(out / "models").items() and runs == contents(out / "work/runs")
    return {"data": data, "out": out, "root": root, "said": said.getvalue()}


def test_a_release_that_is_killed_goes_on_to_the_same_models(made, tmp_path):
    """The weights are those of a fit that nothing has interrupted."""
    options = {"batch_size": 10}
    for method, name in (("padim", PADIM), ("stfpm", STFPM)):
        trainer = {"max_steps": 40, "select": "image_auroc"} if method == "stfpm" else {}
        arguments = SIZES[method] | {"seed": 0}
        fitted, _ = fit(method, made["data"], None, "lite", arguments, options, trainer, RunOptions("cpu"))
        released = from_pretrained(made["out"] / "models" / name)
        own = fitted.state_dict()
        assert own.keys() == released.state_dict().keys()
        assert all(torch.equal(value, own[key]) for key, value in released.state_dict().items())
    assert "Going on after" in (made["out"] / "work/logs/stfpm-seed0.log").read_text()


def test_what_is_released_is_public_and_says_what_was_measured(made):
    folders = sorted((made["out"] / "models").iterdir())
    assert [folder.name for folder in folders] == [PADIM, STFPM]  # a replica's are not MIIC's
    stems = {Path(name).stem for split in load_data(made["data"]).values() for name in split.with_format(None)["path"]}
    for folder in folders:
        method = folder.name.rsplit("-", 1)[1]
        assert PUBLIC <= set(contents(folder)) and not (folder / "private").exists()
        record = json.loads((folder / "results.json").read_text())
        runs = [json.loads((made["out"] / f"work/runs/{method}-seed{seed}.json").read_text()) for seed in (0, 1)]
        assert record["metrics"] == runs[0]["metrics"] and record["seeds"]["count"] == 2
        for key, (mean, deviation) in record["seeds"]["metrics"].items():
            values = [run["metrics"][key] for run in runs]
            assert mean == pytest.approx(np.mean(values), abs=1e-6)
            assert deviation == pytest.approx(statistics.stdev(values), abs=1e-6)
        assert record["seeds"]["metrics"].keys() == record["metrics"].keys()
        assert (
            record["intervals"]["draws"] == 1000 and record["intervals"]["metrics"].keys() == record["metrics"].keys()
        )
        text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".md", ".json", ".yaml"))
        assert not [stem for stem in stems if stem in text] and str(made["root"]) not in text


def test_models_are_calibrated_where_the_images_are_enough(made):
    """20 held out and 10 of the test: 29 support 10 %. A metric has chosen stfpm's step by half of the latter."""
    config = json.loads((made["out"] / f"models/{PADIM}/config.json").read_text())
    found = restored(config["calibration"])
    assert len(found.scores) == 30 and found.false_alarm_rate == 0.1
    above = 30 - np.searchsorted(found.scores, found.image_threshold)
    assert above == 0  # of 30 none may lie above: 0.9 ** 30 = 4.2 %, and one more would be 18 %
    assert "30 normal images" in from_pretrained(made["out"] / "models" / PADIM).predict(np.zeros((64, 64))).verdict
    config = json.loads((made["out"] / f"models/{STFPM}/config.json").read_text())
    assert not config["calibration"]["calibrated"]
    seen = re.search(rf"rate: {STFPM}\. .* takes 29 normal images, and there are (\d+): .*", made["said"])
    assert 20 <= int(seen[1]) < 29 and "--hold-out" not in seen[0]


def test_without_yes_nothing_goes_anywhere(made, capsys, hub):
    before = contents(made["out"])
    assert main(command(made["data"], made["out"])) == 0
    said = capsys.readouterr().out
    assert not hub.requests and contents(made["out"]) == before
    for name in (PADIM, STFPM):
        size = (made["out"] / "models" / name / "model.safetensors").stat().st_size
        assert f"Would go to fab/{name}: model.safetensors {size / 1e6:.1f} MB, README.md " in said
    again = re.search(r"to push: zoo (release .* --yes)\n", said)[1]
    assert "--data" in again and "Nothing was pushed" in said and str(made["out"] / "models") in said


def test_a_failing_repository_is_passed_over_and_the_same_command_goes_on(made, tmp_path, monkeypatch, capsys, hub):
    before = contents(made["out"])
    hub.fail(f"{PADIM}/commit", 500)
    assert main(command(made["data"], made["out"], "--yes", "--tag", "v1", "--private")) == 2
    told = capsys.readouterr()
    assert f"1 failed: fab/{PADIM}; the same command tries them again." in told.err
    assert f"fab/{STFPM}" in told.out and "model.safetensors" in hub.files(f"fab/{STFPM}")
    assert main(command(made["data"], made["out"], "--yes", "--tag", "v1")) == 0
    for name in (PADIM, STFPM):
        folder, there = made["out"] / "models" / name, hub.files(f"fab/{name}", "v1")
        assert {path: data for path, data in there.items() if path != ".gitattributes"} == contents(folder)
        assert hub.repos[f"models/fab/{name}"]["private"]
        model = from_pretrained(f"fab/{name}")
        image = np.random.default_rng(0).random((64, 64))
        kept = from_pretrained(made["out"] / f"work/models/{name.split('-')[-1]}-seed0")
        assert np.array_equal(model.predict(image).map, kept.predict(image).map)
    hub.requests.clear()
    assert main(command(made["data"], made["out"], "--yes", "--tag", "v1")) == 0  # all of it is there
    assert not hub.paths("PUT") and not [path for path in hub.paths("POST") if "/commit/" in path]
    assert contents(made["out"]) == before


@pytest.mark.parametrize(
    "case, expected",
    [
        ("no token", "takes nothing without a token"),
        ("reader", "may only read"),
        ("stranger", "may not write to fab (it answered 403)"),
        ("--to nobody", "may not write to nobody on http://127.0.0.1:"),
        ("unknown", "it answered 401"),
        ("down", "it answered 503"),
        ("gone", "can't be pushed to"),
        ("hangs", "can't be pushed to"),
        ("offline", "in offline mode"),
        ("torchrun", "without torchrun or srun"),
        ("--prefix miic", "is for models of MIIC, and these are of miic-replica"),
        ("--prefix MIIC-x", "is for models of MIIC"),
        ("--prefix a--b", "letters, digits and single dashes"),
        ("--to a/b", "a user or an organisation on the hub"),
        ("--tag v^1", "is no tag"),
        ("--false-alarm-rate 2", "between 0 and 1"),
        ("--preset original", "for parity runs"),
        ("--methods padin", "did you mean padim"),
        ("--seeds 0", "--seeds is at least 1"),
        ("--budget 0", "--budget is a number"),
    ],
)
def test_what_can_be_wrong_is_said_before_the_work(made, tmp_path, monkeypatch, capsys, hub, case, expected):
    more = ["--yes", *(case.split() if case.startswith("--") else [])]
    tokens = {"reader": READ, "stranger": STRANGER, "unknown": "hf_unknown"}
    if case in tokens:
        monkeypatch.setenv("HF_TOKEN", tokens[case])
    elif case == "no token":
        monkeypatch.delenv("HF_TOKEN")
    elif case == "down":
        hub.fail("whoami", 503)
    elif case == "torchrun":
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("WORLD_SIZE", "2")
    elif case == "hangs":
        monkeypatch.setattr(release, "TIMEOUT", 0.2)
        hub.hang("whoami")
    elif case == "gone":
        hub.close()
    elif case == "offline":
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert main(command(made["data"], tmp_path / "out", *more, methods=["padim"])) == 2
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_name_of_a_private_folder_is_not_made_public(tmp_path, capsys, hub, mvtec):
    assert main(command(mvtec, tmp_path / "out", "--yes", methods=["padim"])) == 2
    assert "The name of the data tiles would be public" in capsys.readouterr().err


def test_a_hub_without_users_is_asked_in_the_end(made, capsys, hub):
    hub.fail("whoami", 404)
    assert main(command(made["data"], made["out"], "--yes")) == 0
    assert "doesn't tell whether the token may write to fab" in capsys.readouterr().out
    assert set(hub.repos) == {f"models/fab/{PADIM}", f"models/fab/{STFPM}"}


def test_a_hub_that_tells_of_no_organisation_is_tried(made, capsys, hub):
    class Untold(tuple):
        def __iter__(self):
            return iter(())

    hub.orgs = Untold(hub.orgs)
    assert main(command(made["data"], made["out"], "--yes", "--to", "maker")) == 0  # the user's own
    assert main(command(made["data"], made["out"], "--yes")) == 0
    assert set(hub.repos) == {f"models/{org}/{name}" for org in ("maker", "fab") for name in (PADIM, STFPM)}


def test_an_upload_whose_answer_is_lost_is_not_made_twice(made, capsys, hub):
    hub.lose(f"{STFPM}/commit")
    assert main(command(made["data"], made["out"], "--yes", "--tag", "v1")) == 2
    assert f"1 failed: fab/{STFPM}" in capsys.readouterr().err
    before = hub.commits(f"fab/{STFPM}")
    assert main(command(made["data"], made["out"], "--yes", "--tag", "v1")) == 0
    assert hub.commits(f"fab/{STFPM}") == before and "model.safetensors" in hub.files(f"fab/{STFPM}", "v1")


def test_draws_for_intervals_are_no_part_of_a_runs_key(made):
    how = {"methods": ["padim"], "out": made["out"], "preset": "lite", "device": "cpu"}
    plans = [Plan(made["data"], bootstrap=draws, **how) for draws in (0, 1000)]
    (index, jobs), (other, drawn) = map(jobs_of, plans)
    assert index == other and [job["key"] for job in jobs] == [job["key"] for job in drawn]
    assert {job["bootstrap"] for job in jobs} == {0} and {job["bootstrap"] for job in drawn} == {1000}


def test_a_method_whose_run_fails_is_held_back(made, tmp_path, capsys):
    out = tmp_path / "out"
    weights = {"padim": SIZES["padim"] | {"backbone_weights": str(tmp_path / "none.safetensors")}}
    more = ["--arguments", json.dumps(weights)]
    assert main(command(made["data"], out, *more, methods=["padim"], seeds=1)) == 2
    told = capsys.readouterr()
    assert f"{PADIM} is held back" in told.out and "1 failed: padim-seed0" in told.err
    assert not (out / "models").exists()


# ---- on the other side -----------------------------------------------------------------------------------------------


@pytest.fixture
def carried(made, tmp_path):
    return Path(shutil.copytree(made["out"] / "models", tmp_path / "carried"))


def quiet(line):
    raise AssertionError(line)


def test_a_set_is_imported_and_predicts_the_same(made, carried, capsys, tmp_path):
    (carried / PADIM / "secret.txt").write_text("private")
    record = json.loads((carried / PADIM / "results.json").read_text())
    record["train_data"]["terms"] = "for research only"
    (carried / PADIM / "results.json").write_text(json.dumps(record))
    (carried / PADIM / ".eval_results").mkdir(exist_ok=True)
    (carried / PADIM / ".eval_results/more.yaml").write_text("[]")
    (carried / PADIM / ".eval_results/more.py").write_text("")
    assert main(["import", str(carried)]) == 0
    said = capsys.readouterr().out
    assert f"Imported {PADIM}, {STFPM} into {names.registry()}" in said and "learned from: for research only" in said
    assert [str(name) for name in names.list_models()] == [PADIM, STFPM]
    images = [np.random.default_rng(seed).random((70, 60)) for seed in range(3)]
    for name in (PADIM, STFPM):
        there = from_pretrained(made["out"] / "models" / name).predict(images)
        here = from_pretrained(name).predict(images)
        for a, b in zip(there, here, strict=True):
            assert a.score == b.score and np.array_equal(a.map, b.map) and a.verdict == b.verdict
    expected = contents(carried / PADIM)
    del expected["secret.txt"], expected[".eval_results/more.py"]
    assert contents(names.registry() / PADIM) == expected
    assert len(list(names.registry().iterdir())) == 2  # nothing temporary is left


def test_what_is_there_is_left_alone_unless_it_may_be_replaced(made, carried, capsys):
    said = []
    assert import_models(str(carried / PADIM), False, quiet) == [PADIM]
    assert import_models(str(carried / PADIM), False, said.append) == []
    assert said == [f"{PADIM} is there already, of the same weights; it is left alone."]
    shutil.rmtree(carried / PADIM)
    shutil.copytree(carried / STFPM, carried / PADIM)
    before = contents(names.registry() / PADIM)
    assert main(["import", str(carried)]) == 2
    assert "is another model, of other weights; --replace" in capsys.readouterr().err
    assert contents(names.registry() / PADIM) == before and [str(n) for n in names.list_models()] == [PADIM]
    assert main(["import", str(carried), "--replace"]) == 0
    assert from_pretrained(PADIM).method == "stfpm"


def damage(folder, case):
    """Damages a model; returns what must be said of it."""
    weights, config = folder / "model.safetensors", folder / "config.json"
    if case == "flipped":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
        return "SHA-256 differs"
    if case == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
        return str(weights)
    if case == "no weights":
        weights.unlink()
        return "has no model.safetensors"
    if case == "no config":
        config.unlink()
        return "has no config.json"
    if case == "newer":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"format_version": 99}))
        return "format version 99"
    if case == "other method":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"method": "cfa"}))
        return str(folder)
    if case == "unreadable record":
        (folder / "results.json").write_text("{")
        return "results.json is damaged"
    if case == "endless card":
        os.truncate(folder / "README.md", 2**33)  # of holes, which take no room here
        return "README.md is larger than 8,388,608 bytes"
    if case == "fifo":
        (folder / "README.md").unlink()
        os.mkfifo(folder / "README.md")
        return "is no file"
    outside = folder.parents[1] / "outside"
    if case == "link":
        outside.write_text("a secret of this machine")
        (folder / "README.md").unlink()
        (folder / "README.md").symlink_to(outside)
    elif case == "linked folder":
        folder.rename(outside)
        folder.symlink_to(outside)
    elif case == "linked yaml":
        outside.mkdir()
        (outside / "a.yaml").write_text("secret: 1")
        shutil.rmtree(folder / ".eval_results", ignore_errors=True)
        (folder / ".eval_results").symlink_to(outside)
    return "is a link to another place, which is not followed"


CASES = ["flipped", "cut", "no weights", "no config", "newer", "other method", "unreadable record", "endless card"]


@pytest.mark.parametrize("case", [*CASES, "fifo", "link", "linked folder", "linked yaml"])
def test_a_damaged_or_treacherous_model_is_refused_and_none_is_taken(carried, capsys, case):
    expected = damage(carried / STFPM, case)
    assert main(["import", str(carried)]) == 2
    said = capsys.readouterr().err
    assert expected in said and len(said.splitlines()) == 1 and str(names.registry()) not in said
    assert not names.registry().exists() or not list(names.registry().iterdir())


def test_one_model_by_its_folder_or_by_its_repository(made, carried, tmp_path, capsys, hub):
    (tmp_path / "empty").mkdir()
    assert main(["import", str(tmp_path / "empty")]) == 2
    assert "no folder of models" in capsys.readouterr().err
    assert main(["import", str(made["out"])]) == 0  # the folder of a release as a whole
    assert [str(name) for name in names.list_models()] == [PADIM, STFPM]
    for name in (PADIM, STFPM):
        shutil.rmtree(names.registry() / name)
    hub.edit(f"fab/{PADIM}", contents(carried / PADIM))
    assert main(["import", f"fab/{PADIM}"]) == 0
    assert [str(name) for name in names.list_models()] == [PADIM]
    assert not any(path.is_symlink() for path in (names.registry() / PADIM).rglob("*"))
    (names.registry() / PADIM).rename(carried / PADIM.replace("-", "_"))
    assert main(["import", str(carried)]) == 2
    assert f"have the same name {PADIM}; rename one" in capsys.readouterr().err
    local = tmp_path / "downloaded"
    env = os.environ | {"HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    get = "from huggingface_hub.cli.hf import main; main()"
    arguments = ["download", f"fab/{PADIM}", "--local-dir", str(local)]
    subprocess.run([sys.executable, "-c", get, *arguments], env=env, check=True, capture_output=True)
    assert import_models(str(local), False, quiet) == ["downloaded"]
    assert contents(names.registry() / "downloaded") == contents(carried / PADIM)


def test_a_data_set_on_the_hub_names_models_where_anybody_may_see_it(monkeypatch):
    options = {"repo": "lab/lot-7", "revision": "0" * 40}
    spec = DataSpec("hub", "lot 7", "f" * 64, {"train": [9, 0], "test": [2, 2]}, options)
    planned = release.Release(Plan("hub:lab/lot-7", ["padim"], Path("out")), "fab", push=True)
    monkeypatch.setattr("zoo.remote.is_open", lambda repo, kind: (repo, kind) == ("lab/lot-7", "dataset"))
    assert release._prefix(planned, spec) == "lot-7" and release._is_open(spec)
    monkeypatch.setattr("zoo.remote.is_open", lambda repo, kind: False)
    with pytest.raises(ZooError, match="would be public; say by --prefix"):
        release._prefix(planned, spec)
