"""A fit that was stopped and goes on equals one that never was, for statistics and gradients alike."""

import random

import lightning as L
import pytest
import torch
from learner import Learner

from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.methods import create_model, list_methods

BATCHES = 8
SMALL = {"patchcore": {"bank_size": 20, "working_set": 2}, "padim": {"dims": 10}}


def build(method):
    return Learner() if method == "learner" else create_model(method, "lite", input_size=32, **SMALL.get(method, {}))


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


@pytest.fixture(scope="module")
def data():
    return load_data("synthetic:train=60,size=32")


def run(method, data, epochs=1, watch=None, workers=0, batch_size=5, **options):
    module = AnomalyDataModule(data, input_size=(32, 32), batch_size=batch_size, num_workers=workers, seed=3)
    assert len(module.train_dataloader()) == -(-40 // batch_size)
    watch, model = watch or Watch(), build(method)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
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


METHODS = pytest.mark.parametrize("method", [*list_methods(), "learner"])
_WHOLE = {}


def whole(method, data, epochs):
    if (method, epochs) not in _WHOLE:
        _WHOLE[method, epochs] = run(method, data, epochs)
    return _WHOLE[method, epochs]


@METHODS
@pytest.mark.parametrize("moment", [1, 3, 7, 8, "end"])
def test_stopped_and_resumed(method, moment, data, tmp_path):
    expected, names = whole(method, data, 1)
    assert len(names) == len(set(names)) == 40
    first = run(method, data, watch=Watch(tmp_path / "x.ckpt", (0, moment), stop=True))[1]
    model, then = run(method, data, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert first + then == names and len(first) == 5 * (8 if moment == "end" else moment)
    same(model, expected)


@METHODS
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


@METHODS
def test_a_second_fit_starts_anew(method, data, tmp_path):
    """What an interrupted fit has gathered in a model doesn't count twice."""
    module = AnomalyDataModule(data, input_size=(32, 32), batch_size=5, seed=3)
    model, options = build(method), dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    if not hasattr(model, "observe"):
        pytest.skip("goes on from its weights")
    with pytest.raises(SystemExit):
        L.Trainer(**options, callbacks=[Watch(tmp_path / "x.ckpt", (0, 3), stop=True)]).fit(model, datamodule=module)
    L.Trainer(**options, enable_checkpointing=False).fit(model, datamodule=module)
    same(model, whole(method, data, 1)[0])


def _progress(content):
    return content["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]


def test_a_resume_is_refused_where_it_would_not_be_exact(data, tmp_path):
    path = tmp_path / "x.ckpt"
    run("padim", data, watch=Watch(path, (0, 3)))
    with pytest.raises(ZooError, match="other images"):
        run("padim", data, batch_size=4, ckpt_path=path)
    for change, match in [
        (lambda content: content["hyper_parameters"].update(ridge=0.5), "ridge"),
        (lambda content: content["fit_state"].append({}), "2 processes"),
        (lambda content: _progress(content).update(started=4), "middle of a step"),
    ]:
        content = torch.load(path, weights_only=True)
        change(content)
        torch.save(content, tmp_path / "changed.ckpt")
        with pytest.raises(ZooError, match=match):
            run("padim", data, ckpt_path=tmp_path / "changed.ckpt")
