"""Two processes on one machine learn and measure what one does."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks_job
import torch
from kinds import over

from zoo import ranks
from zoo.methods import list_methods, presets
from zoo.metrics import AnomalyMetrics
from zoo.nn.coreset import covering_radius

JOB = Path(ranks_job.__file__)
GATE = ("padim", "patchcore", "cfa", "stfpm", "ganomaly")
METHODS = over(*GATE)
GRADIENT = [m for m in list_methods() if "trainer" in presets(m, "lite")]


def torchrun(*command, timeout=900, fails=False, **env):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command]
    done = subprocess.run(
        launch, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, capture_output=True, text=True, timeout=timeout
    )
    assert bool(done.returncode) == fails, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def methods(request):
    """Those of the tests that are run."""
    given = {
        item.callspec.params.get("method")
        for item in request.session.items
        if item.module is request.module and hasattr(item, "callspec")
    }
    return sorted((given | {"padim", "patchcore", "cfa", "learner"}) - {None})  # these have tests without parameters


@pytest.fixture(scope="module")
def both(methods, tmp_path_factory):
    """What each process of the job has found, by method."""
    out = tmp_path_factory.mktemp("ranks")
    torchrun(str(JOB), str(out), *methods)
    return [torch.load(out / f"rank{r}.pt", weights_only=True) for r in (0, 1)]


@pytest.fixture(scope="module")
def alone(methods):
    """The same fits in this process."""
    models = {}
    for method in methods:
        models[method] = ranks_job.build(method)
        ranks_job.trainer(1).fit(models[method], datamodule=ranks_job.data())
        models[method].eval()
    return models


def model_of(method, state, private):
    model = ranks_job.build(method)
    model.load_state_dict(state)
    model.load_private_state(private)
    return model.eval()


def test_images():
    (batch,) = ranks_job.data(batch_size=99).test_dataloader()
    return batch[0].image


test_images.__test__ = False


def readme_commands():
    """The commands of the README's section on several devices, with the places filled in by the caller."""
    section = (JOB.parents[1] / "README.md").read_text().split("## Long fits")[1].split("\n## ")[0]
    blocks = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line and not line.startswith("#")]


SRUN = {
    "SLURM_JOB_ID": "4242",
    "SLURM_JOB_NAME": "fit",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NNODES": "1",
    "SLURM_NODEID": "0",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
}


ALL = pytest.param(slice(None), marks=pytest.mark.slow, id="all")


@pytest.mark.parametrize("part", [pytest.param(slice(2, 5), id="fit, evaluate and predict by torchrun"), ALL])
def test_commands_of_the_readme(part, mvtec, tmp_path, zoo_home, monkeypatch):
    """Each one runs with two processes and leaves the model, record or list that one process leaves."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    (tmp_path / "data").symlink_to(mvtec)
    (mvtec / "bad").exists() or (mvtec / "bad").symlink_to(mvtec / "test" / "square")
    commands = readme_commands()
    assert len(commands) == 7 and sum("torchrun" in line for line in commands) == 4
    for line in commands[part]:
        line = line.replace("FOLDER", str(tmp_path / "data")).replace("HOST", "127.0.0.1")
        line = line.replace("results", str(tmp_path / "results")).replace("--memory-limit 6GB", "--memory-limit 20GB")
        if " fit " in line:
            line += " --input-size 64" + (" --dims 20" if "padim" in line else " --bank-size 200")
        launches = [(line, {})]
        if "--node-rank 0" in line:
            launches.append((line.replace("--node-rank 0", "--node-rank 1"), {}))
        if line.startswith("srun "):
            line = line.removeprefix("srun ")
            launches = [(line, SRUN | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}) for r in (0, 1)]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        jobs = [subprocess.Popen(shlex.split(command), env=os.environ | env, **pipes) for command, env in launches]
        said = [job.communicate(timeout=900) for job in jobs]
        assert [job.returncode for job in jobs] == [0] * len(jobs), (line, said)
        record = json.loads((zoo_home / "models" / "my-model" / "results.json").read_text())
        if " fit " in line:
            assert record["processes"] == (1 if "--resume --memory" in line else 2), line
            assert sum(out.count("my-model in") for out, _ in said) == 1, said  # only the first process speaks
        if "evaluate" in line:
            assert record["metrics"]["image_auroc"] > 0.9
            scores = (zoo_home / "models" / "my-model" / "private" / "scores.csv").read_text().splitlines()
            assert len(scores) == len(set(scores)) == 13
    rows = json.loads((tmp_path / "results" / "predictions.json").read_text())["images"]
    assert [Path(row["image"]).name for row in rows] == [f"{i:03d}.png" for i in range(6)]
    assert len(list((tmp_path / "results" / "heatmaps").iterdir())) == 6


@pytest.mark.slow
def test_predict_names_the_broken_file_of_another_process(mvtec, tmp_path, zoo_home):
    from zoo.cli import main

    fit = [
        "fit",
        "padim",
        "--preset",
        "lite",
        "--input-size",
        "64",
        "--dims",
        "20",
        "--name",
        "m",
        "--data",
        str(mvtec),
    ]
    assert main(fit) == 0
    for i in range(5):
        shutil.copy(mvtec / "test" / "good" / f"{i:03d}.png", tmp_path / f"{i}.png")
    (tmp_path / "3.png").write_bytes(b"broken")
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    command = [*launch, "zoo", "predict", "m", str(tmp_path), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode != 0 and "3.png" in done.stderr and "--skip-broken" in done.stderr
    skipped = subprocess.run([*command, "--skip-broken"], capture_output=True, text=True)
    assert skipped.returncode == 0, skipped.stderr
    assert skipped.stdout.count("Left out") == 1 and "3.png" in skipped.stdout
    rows = json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]
    assert [Path(row["image"]).name for row in rows] == ["0.png", "1.png", "2.png", "4.png"]


@METHODS
def test_all_processes_hold_the_same_model_and_no_weight_more(both, alone, method):
    states = [found[method]["state"] for found in both]
    assert states[0].keys() == states[1].keys() == alone[method].state_dict().keys()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert both[0][method]["private"] == both[1][method]["private"]


@torch.inference_mode()
def test_padim_scores_as_in_one_process(both, alone):
    found = model_of("padim", both[0]["padim"]["state"], {})
    a, b = found(test_images()), alone["padim"](test_images())
    torch.testing.assert_close(a.image, b.image, rtol=1e-5, atol=0)
    torch.testing.assert_close(a.map, b.map, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_patchcore_covers_all_patches(both, alone):
    found, model = both[0]["patchcore"], alone["patchcore"]
    batches = list(ranks_job.data().train_dataloader())
    patches = torch.cat([model.embed(b.image).permute(0, 2, 3, 1).flatten(0, 2) for b in batches])
    bank = found["state"]["bank"]
    assert bank.shape == model.bank.shape
    assert covering_radius(patches, bank) <= 1.05 * covering_radius(patches, model.bank)
    names = [name for b in batches for name in b.name]
    side = int((len(patches) / len(names)) ** 0.5)
    for vector, (name, row, column) in list(zip(bank, found["private"]["origin"], strict=True))[::37]:
        patch = patches[(names.index(name) * side + row) * side + column]
        torch.testing.assert_close(vector, patch, rtol=1e-4, atol=1e-4)


@over("cfa", among=["cfa", "fastflow"])
def test_a_step_of_two_processes_is_that_of_one_on_the_joined_batch(both, method):
    """By its gradients: what an optimiser makes of those near zero depends on their last bits."""
    watch, model = ranks_job.steps(method, 1)
    for found in both:
        assert found[method]["gradients"].keys() == watch.gradients.keys()
        for name, gradient in watch.gradients.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(found[method]["gradients"][name], gradient, rtol=1e-3, atol=1e-4 * scale)
    if method == "cfa":
        bank = both[0][method]["state"]["bank"]
        assert torch.equal(bank, both[1][method]["state"]["bank"])


def test_the_bank_of_cfa_is_that_of_one_process(both, alone):
    torch.testing.assert_close(both[0]["cfa"]["state"]["bank"], alone["cfa"].bank, rtol=1e-4, atol=1e-5)


@over("cfa", "stfpm", "ganomaly", among=[m for m in GRADIENT if m != "fanogan"])  # a critic's is part of a game
def test_the_loss_falls(both, method):
    for found in both:
        losses = found[method]["losses"]
        assert len(losses) == 12
        assert sum(losses[6:]) < sum(losses[:6])


@METHODS
def test_each_image_is_visited_once(both, method):
    names = [found[method]["names"] for found in both]
    counts = {"fit": 47, "validate": 13, "test": 13, "predict": 13, "predict 2": 2, "predict 3": 3, "predict 4": 4}
    if method not in GRADIENT:
        counts["fit of one"] = 1
    for stage, count in counts.items():
        seen = names[0].get(stage, []) + names[1].get(stage, [])
        assert len(seen) == len(set(seen)) == count, stage
        assert abs(len(names[0][stage]) - len(names[1][stage])) <= 1


@METHODS
def test_metrics_are_those_of_one_process_to_the_last_bit(both, method):
    """Of the same scores: those of an image differ in the last bits with the size of its batch and the threads."""
    suite = AnomalyMetrics()
    for found in both:
        for batch in found[method]["measured"]:
            suite.update(*batch)
    expected = {name: torch.tensor(value).item() for name, value in suite.compute().items()}
    assert both[0][method]["metrics"] == both[1][method]["metrics"] == expected and len(expected) == 7


@METHODS
def test_per_image_scores_are_gathered_in_the_order_of_the_data(both, method):
    model = model_of(method, both[0][method]["state"], both[0][method]["private"])
    ranks_job.trainer(1).test(model, datamodule=ranks_job.data(), verbose=False)
    scored = both[0][method]["scored"]
    assert scored == both[1][method]["scored"]
    for (name, label, score), expected in zip(scored, model.scored, strict=True):
        assert (name, label) == expected[:2] and score == pytest.approx(expected[2], rel=1e-4)


@over(*GATE, "learner", among=[*list_methods(), "learner"])
def test_resumed_as_if_never_stopped(both, method):
    for found in both[:1] if method == "learner" else both:  # BatchNorm's statistics are each process's own
        for name, tensor in found[method]["state"].items():
            assert torch.equal(tensor, found[method]["resumed"][name]), name


@pytest.mark.slow
def test_resume_by_the_command_line_needs_one_home(tmp_path, zoo_home, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    fit = "zoo fit padim --preset lite --input-size 64 --dims 20 --data synthetic:train=200,size=64 --batch-size 2"
    fit += " --checkpoint-minutes 0 --name"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    subprocess.run([*launch, *f"{fit} whole".split()], check=True)
    job = subprocess.Popen([*launch, *f"{fit} ended".split()], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    path = zoo_home / "unfinished" / "ended" / "last.ckpt"
    while not path.exists() and job.poll() is None:
        time.sleep(0.01)
    job.terminate()
    job.wait()
    assert path.exists() and not (zoo_home / "models" / "ended").exists()
    apart = f"[ $RANK = 1 ] && export ZOO_HOME={tmp_path / 'other'}; {fit} ended --resume"
    failed = subprocess.run([*launch, "bash", "-c", apart], capture_output=True, text=True, timeout=900)
    assert failed.returncode != 0 and "on a shared disk" in failed.stderr
    subprocess.run([*launch, *f"{fit} ended --resume".split()], check=True)
    models = [zoo_home / "models" / name / "model.safetensors" for name in ("whole", "ended")]
    assert models[0].read_bytes() == models[1].read_bytes()


@pytest.mark.slow
def test_a_benchmark_by_two_processes(tmp_path):
    """Under torchrun, with a run that fails; then its own two processes go on in the same folder."""
    given = {"padim": {"input_size": 64, "dims": 20}, "stfpm": {"input_size": 64}, "fanogan": {"gan_share": 0.9}}

    def options(*methods):
        chosen = json.dumps({method: given[method] for method in methods})
        about = f"--preset lite --budget 4 --batch-size 5 --seeds 1 --device cpu --out {tmp_path} --arguments"
        data = "synthetic:train=50,good=7,defect=8,size=64"
        return ["benchmark", "--data", data, *about.split(), chosen, "--methods", *methods]

    told = torchrun("--no-python", "zoo", *options("fanogan", "padim"), fails=True)
    assert "1 of 2 runs failed: fanogan-seed0" in told.stderr
    assert "--gan-share" in json.loads((tmp_path / "runs/fanogan-seed0.json").read_text())["failed"]
    subprocess.run(["zoo", *options("padim", "stfpm"), "--devices", "2"], check=True, timeout=900)
    for method in ("padim", "stfpm"):
        record = json.loads((tmp_path / f"runs/{method}-seed0.json").read_text())
        assert record["processes"] == 2 and record["readings"]["full"]["normal"] == 7
        scores = (tmp_path / f"models/{method}-seed0/private/scores.csv").read_text().splitlines()
        assert len(scores) == len(set(scores)) == 1 + 4 + 4
    page = (tmp_path / "index.html").read_text()
    assert all(method in page for method in given) and "2 processes" in page
    # What the first process refuses, all refuse: none waits for it
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    another = ["zoo", *options("padim"), "--select", "last"]
    keep = ["bash", "-c", '"$@"; echo "ended with $?" >&2', "bash", *another]  # else torchrun ends the second one
    refused = subprocess.run([*launch, *keep], capture_output=True, text=True, timeout=900)
    assert refused.stderr.count("whose select is") == refused.stderr.count("ended with 2") == 2, refused.stderr


def test_a_run_that_fails_in_one_process_says_what_that_one_says(mvtec, tmp_path):
    """The second process finds no data where it is; the first one waits for it, and is ended."""
    about = f"--data {mvtec.name} --out {tmp_path} --methods padim --preset lite --seeds 1 --device cpu"
    apart = f"cd {mvtec.parent}; [ $RANK = 1 ] && cd {tmp_path}; zoo benchmark {about}"
    torchrun("--no-python", "bash", "-c", apart, fails=True)
    failed = json.loads((tmp_path / "runs/padim-seed0.json").read_text())["failed"]
    assert mvtec.name in failed and "see logs" not in failed and "asked to end" not in failed


def test_slurm_is_asked_rightly(monkeypatch, capsys):
    from zoo.cli import main

    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    assert main(["list"]) == 2 and "--ntasks-per-node" in capsys.readouterr().err


@pytest.mark.parametrize("method", [m for m in list_methods() if m not in GRADIENT])
def test_one_image_for_two_processes(both, method):
    model = ranks_job.build(method)
    model.load_state_dict(both[1][method]["tiny"])
    assert model.eval()(test_images()).map.isfinite().all()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (0, 1, 1)),
        ({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}, (3, 8, 4)),
        ({"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4"}, (5, 8, 4)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_NAME": "interactive"}, (0, 1, 1)),
        ({"LOCAL_RANK": "1"}, (1, 1, 1)),
    ],
)
def test_who_this_process_is(environment, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranks.launched() == expected


def test_lists_come_back_in_the_order_of_the_data_set(monkeypatch):
    monkeypatch.setattr(ranks, "gather", lambda items: [[0, 3, 6], [1, 4], [2, 5]])
    assert ranks.gather_list([]) == list(range(7))


def test_a_process_leaves_its_group_when_it_ends():
    """Gloo aborts, now and then, a process that ends without leaving; also where Lightning joined."""
    script = """
import atexit
import torch.distributed as dist
atexit.register(lambda: print("still joined" if dist.is_initialized() else "left"))  # the first one runs last
import zoo.ranks
dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
assert zoo.ranks.rank_and_world() == (0, 1) and dist.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "left"), done.stderr


def test_two_processes_calibrate_as_one_does(mvtec, zoo_home):
    from zoo.cli import main

    assert main(["fit", "padim", "--preset", "lite", "--input-size", "64", "--data", str(mvtec), "--name", "m"]) == 0
    calibrate, place = ["calibrate", "m", "--data", str(mvtec), "--false-alarm-rate", "0.2"], zoo_home / "models" / "m"
    assert main(calibrate) == 0
    config, scores = (place / "config.json").read_text(), (place / "private/calibration.csv").read_text()
    said = torchrun("--no-python", "zoo", *calibrate).stdout
    assert said.count("Calibrated m") == 1
    names, found = zip(*(line.split(",")[:2] for line in sorted(scores.splitlines()[1:])), strict=True)
    lines = (place / "private/calibration.csv").read_text().splitlines()[1:]
    other_names, others = zip(*(line.split(",")[:2] for line in sorted(lines)), strict=True)
    assert names == other_names and len(names) == 15 + 6
    assert list(map(float, found)) == pytest.approx(list(map(float, others)), rel=1e-5)
    before, after = json.loads(config)["calibration"], json.loads((place / "config.json").read_text())["calibration"]
    for key in ("image_threshold", "pixel_threshold", "pixel_median"):
        assert before[key] == pytest.approx(after[key], rel=1e-4), key
