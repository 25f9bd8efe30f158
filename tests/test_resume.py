"""A fit that was stopped and goes on equals one that never was, for statistics and gradients alike."""

import json
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import lightning as L
import pytest
import torch
from kinds import over
from learner import Learner
from lightning.pytorch.callbacks import ModelCheckpoint

from zoo.cli import main
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.methods import create_model, list_methods

BATCHES = 8
SMALL = {
    "patchcore": {"bank_size": 20, "working_set": 2},
    "padim": {"dims": 10},
    "rd4ad": {"input_size": 64},  # its code needs two positions
    "fanogan": {"input_size": 64, "width": 2},
    "ganomaly": {"width": 2},
    "iad_inpainting": {"width": 2},
    "riad": {"width": 2},
}


def build(method):
    if method == "learner":
        return Learner()
    return create_model(method, "lite", **({"input_size": 32} | SMALL.get(method, {})))


class Watch(L.Callback):
    """Notes the images seen and saves or stops where it is told to: (epoch, batches done), or "end" of the epoch."""

    def __init__(self, path=None, moment=None, stop=False):
        self.path, self.moment, self.stop, self.seen = path, moment, stop, []

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.seen += batch.name
        self._at(trainer, (trainer.current_epoch, index + 1))

    def on_train_epoch_end(self, trainer, module):
        self._at(trainer, (trainer.current_epoch, "end"))

    def _at(self, trainer, moment):
        if moment == self.moment:
            trainer.save_checkpoint(self.path)
            if self.stop:
                raise KeyboardInterrupt


def load(spec):
    data = load_data(spec)
    data.fingerprint = spec
    return data


@pytest.fixture(scope="module")
def data():
    return load("synthetic:train=60,size=32")


def run(method, data, epochs=1, watch=None, workers=0, batch_size=5, accumulate=1, keep=None, max_steps=-1, **options):
    module = AnomalyDataModule(
        data, input_size=(32, 32), batch_size=batch_size, num_workers=workers, seed=3, fingerprint=data.fingerprint
    )
    assert len(module.train_dataloader()) == -(-40 // batch_size)
    watch, model = watch or Watch(), build(method)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        max_steps=max_steps,
        accumulate_grad_batches=accumulate,
        callbacks=[watch, keep] if keep else [watch],
        logger=False,
        enable_checkpointing=keep is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    torch.manual_seed(random.randrange(1 << 30))  # global state must not matter
    try:
        trainer.fit(model, datamodule=module, **options)
    except SystemExit:  # what Lightning makes of an interrupt
        pass
    return model, watch.seen


def same(a, b):
    states = a.state_dict(), b.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert a.private_state() == b.private_state()


EACH = [*list_methods(), "learner"]
_WHOLE = {}


def whole(method, data, epochs):
    if (method, epochs) not in _WHOLE:
        _WHOLE[method, epochs] = run(method, data, epochs)
    return _WHOLE[method, epochs]


@over("padim", "patchcore", "cfa", "fanogan", "learner", among=EACH)
@pytest.mark.parametrize("moment", [1, 3, 7, 8, "end"])
def test_stopped_and_resumed(method, moment, data, tmp_path):
    expected, names = whole(method, data, 1)
    assert len(names) == len(set(names)) == 40
    first = run(method, data, watch=Watch(tmp_path / "x.ckpt", (0, moment), stop=True))[1]
    model, then = run(method, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert first + then == names and len(first) == 5 * (8 if moment == "end" else moment)
    same(model, expected)


@over("padim", "patchcore", "fanogan", "learner", among=EACH)
@pytest.mark.parametrize("moment", [(0, "end"), (1, 3), (1, 8), (1, "end"), (2, 1)])
def test_resumed_in_a_later_epoch(method, moment, data, tmp_path):
    expected, names = whole(method, data, 3)
    first = run(method, data, 3, watch=Watch(tmp_path / "x.ckpt", moment, stop=True))[1]
    model, then = run(method, data, 3, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert first + then == names and names[:40] != names[40:80]
    same(model, expected)


@pytest.mark.parametrize("method", ["padim", "learner"])
def test_workers_that_read_ahead_lose_nothing(method, data, tmp_path):
    expected, names = whole(method, data, 3)
    first = run(method, data, 3, Watch(tmp_path / "x.ckpt", (1, 3), stop=True), workers=2)[1]
    model, then = run(method, data, 3, workers=2, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert first + then == names
    same(model, expected)


@over("padim", "patchcore")
def test_a_second_fit_starts_anew(method, data, tmp_path):
    """What an interrupted fit has gathered in a model doesn't count twice."""
    module = AnomalyDataModule(data, input_size=(32, 32), batch_size=5, seed=3)
    model, options = build(method), dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    if model.learns_by_gradient:
        pytest.skip("goes on from its weights")
    with pytest.raises(SystemExit):
        L.Trainer(**options, callbacks=[Watch(tmp_path / "x.ckpt", (0, 3), stop=True)]).fit(model, datamodule=module)
    L.Trainer(**options, enable_checkpointing=False).fit(model, datamodule=module)
    same(model, whole(method, data, 1)[0])


def test_gradients_that_are_still_accumulated_are_not_lost_silently(data, tmp_path):
    path = tmp_path / "x.ckpt"
    expected = run("learner", data, 2, accumulate=3)[0]
    for moment in ((0, 6), (0, 8), (1, 3)):  # the last batch of an epoch is a step in any case
        run("learner", data, 2, Watch(path, moment, stop=True), accumulate=3)
        same(run("learner", data, 2, accumulate=3, ckpt_path=path, weights_only=True)[0], expected)
    run("learner", data, 2, Watch(path, (0, 4), stop=True), accumulate=3)
    with pytest.raises(ZooError, match="middle of a step"):
        run("learner", data, 2, accumulate=3, ckpt_path=path)


@over("padim", "ganomaly", "learner", among=EACH)
@pytest.mark.parametrize("options", [{"every_n_train_steps": 3}, {"every_n_train_steps": 8}, {"every_n_epochs": 1}])
def test_lightnings_own_checkpoints(method, options, data, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{epoch}-{step}", save_top_k=-1, **options)
    expected, names = run(method, data, 2, keep=keep)
    paths = sorted(tmp_path.glob("*.ckpt"))
    if expected.automatic_optimization:  # else Lightning counts the steps of each optimiser
        assert len(paths) == 16 // options.get("every_n_train_steps", 8)
    assert paths
    for path in paths:
        model, then = run(method, data, 2, ckpt_path=path, weights_only=True)
        assert names[len(names) - len(then) :] == then
        same(model, expected)


@over("patchcore", "learner", among=EACH)
def test_max_steps(method, data, tmp_path):
    """A pass that it cuts short is learned from; at the end of an epoch Lightning would not go on rightly."""
    if not build(method).automatic_optimization:
        pytest.skip("Lightning counts the steps of each optimiser; `fit` counts batches")
    keep = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=1)
    expected, names = run(method, data, -1, keep=keep, max_steps=11)
    assert len(names) == 55
    for step in (3, 9, 11):
        model, then = run(method, data, -1, max_steps=11, ckpt_path=tmp_path / f"step={step}.ckpt", weights_only=True)
        assert names[5 * step :] == then
        same(model, expected)
    with pytest.raises(ZooError, match="give max_epochs"):
        run(method, data, -1, max_steps=11, ckpt_path=tmp_path / "step=8.ckpt", weights_only=True)


def _progress(content):
    return content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]


def test_a_resume_is_refused_where_it_would_not_be_exact(data, tmp_path):
    path = tmp_path / "x.ckpt"
    run("padim", data, watch=Watch(path, (0, 3)))
    with pytest.raises(ZooError, match="other images"):
        run("padim", data, batch_size=4, ckpt_path=path)
    with pytest.raises(ZooError, match="other images"):
        run("padim", load("synthetic:train=60,size=32,seed=1"), ckpt_path=path)
    for change, match in [
        (lambda content: content["hyper_parameters"].update(ridge=0.5), "ridge"),
        (lambda content: content.update(precision="bf16-mixed"), "precision"),
        (lambda content: content["fit_state"].append({}), "2 processes"),
        (lambda content: _progress(content).update(started=4), "middle of a step"),
    ]:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "changed.ckpt")
        with pytest.raises(ZooError, match=match):
            run("padim", data, ckpt_path=tmp_path / "changed.ckpt")


def start_job(method, folder):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, Path(__file__).with_name("kill_job.py"), method, folder]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


def seen(folder):
    """Names by (epoch, batch); a batch that was done again after a kill counts as it was done last."""
    lines = [json.loads(line) for line in (folder / "seen.jsonl").read_text().splitlines()]
    return {(epoch, batch): names for epoch, batch, names in lines}


def kill_and_resume(method, folder, delay):
    """Kill a fit `delay` seconds after it began, let it go on here, and return whether it was still running."""
    import kill_job

    job = start_job(method, folder)
    job.stdout.readline()  # ready
    time.sleep(delay)
    job.send_signal(signal.SIGKILL)
    was_running = job.wait() == -signal.SIGKILL
    for path in folder.glob("last.ckpt"):
        torch.load(path, weights_only=True)  # whole, whenever the kill came
    kill_job.main(method, folder)
    return was_running


def same_results(folder, expected):
    one, other = (torch.load(f / "done.pt", weights_only=True) for f in (folder, expected))
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in other["state"])
    assert one["private"] == other["private"] and seen(folder) == seen(expected)


@over("patchcore", "learner", among=EACH)
def test_killed_and_resumed(method, tmp_path):
    """The short form of tests/bench/kill.py."""
    import kill_job

    (tmp_path / "whole").mkdir()
    kill_job.main(method, tmp_path / "whole")
    assert kill_and_resume(method, tmp_path / "killed", random.uniform(0.02, 0.3))
    same_results(tmp_path / "killed", tmp_path / "whole")


def catches(pid, number):
    """Whether a process has a handler for a signal, as Linux tells."""
    (caught,) = re.findall(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(caught, 16) >> number - 1 & 1


@pytest.mark.parametrize("end", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_command_line_resumes(end, tmp_path, zoo_home, capsys):
    command = ["fit", "patchcore", "--preset", "lite", "--data", "synthetic:train=120,size=64"]
    command += ["--input-size", "64", "--bank-size", "200", "--batch-size", "2"]
    assert main([*command, "--name", "whole"]) == 0
    path = zoo_home / "unfinished" / "ended" / "last.ckpt"
    minutes = "0" if end == signal.SIGKILL else "5"  # SIGTERM leaves time to write one
    ended = subprocess.Popen(
        ["zoo", *command, "--name", "ended", "--checkpoint-minutes", minutes],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    ended.stdout.readline()
    while ended.poll() is None and not (path.exists() if end == signal.SIGKILL else catches(ended.pid, end)):
        time.sleep(0.01)
    ended.send_signal(end)
    _, said = ended.communicate()
    assert path.exists() and ended.returncode != 0
    if end == signal.SIGTERM:
        assert ended.returncode == 2 and "--resume" in said and said.count("\n") == 1
    assert main([*command, "--name", "ended", "--resume"]) == 0
    models = [zoo_home / "models" / name / "model.safetensors" for name in ("whole", "ended")]
    assert models[0].read_bytes() == models[1].read_bytes() and not path.exists()
    assert json.loads((models[1].parent / "results.json").read_text())["resumed"] is True
    assert "Going on after batch" in capsys.readouterr().out


def test_what_resume_says(capsys, zoo_home):
    fit = "fit padim --preset lite --input-size 32 --dims 10 --data synthetic:train=40,size=32 --name m".split()
    assert main([*fit, "--resume"]) == 0 and "from the beginning" in capsys.readouterr().out
    path = zoo_home / "unfinished" / "m" / "last.ckpt"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"half")
    assert main([*fit, "--resume"]) == 2 and "damaged" in capsys.readouterr().err
    assert main(fit) == 0 and "will be given up" in capsys.readouterr().out and not path.exists()
