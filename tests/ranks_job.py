"""What tests/test_ranks.py launches with torchrun: fits and evaluations by a plain Trainer, results into a folder."""

import sys
from pathlib import Path

import lightning as L
import torch
from learner import Learner

from zoo import ranks
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.methods import create_model

SIZE = 64
SMALL = {
    "fanogan": {"width": 2},
    "ganomaly": {"width": 4},
    "iad_inpainting": {"width": 4},
    "padim": {"dims": 30},
    "patchcore": {"bank_size": 200, "working_set": 2},
    "riad": {"width": 2},
}
TRAIN, TEST = 67, (7, 6)  # 20 are held out


class Seen(L.Callback):
    """Names that this process has seen by stage."""

    def __init__(self):
        self.names = {}

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.names.setdefault("fit", []).extend(batch.name)

    def _note(self, stage, parts):
        for part in parts:
            self.names.setdefault(stage, []).extend(part.name)

    def on_validation_batch_end(self, trainer, module, outputs, batch, *_):
        self._note("validate", batch)

    def on_test_batch_end(self, trainer, module, outputs, batch, *_):
        self._note("test", batch)

    def on_predict_batch_end(self, trainer, module, outputs, batch, *_):
        self._note("predict", batch)
        assert len(outputs) == sum(len(part.name) for part in batch)


def build(method):
    if method == "learner":
        return Learner(input_size=SIZE)
    return create_model(method, "lite", input_size=SIZE, **SMALL.get(method, {}))


def data(train=TRAIN, test=TEST, batch_size=4):
    found = load_data(f"synthetic:train={train},good={test[0]},defect={test[1]},size={SIZE}")
    return AnomalyDataModule(found, input_size=(SIZE, SIZE), batch_size=batch_size, seed=0)


def trainer(devices, *callbacks):
    return L.Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_epochs=1,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


class Save(L.Callback):
    def __init__(self, path, after):
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if index + 1 == self.after:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def record(metrics):
    """A list that takes down what the metrics are given from now on."""
    batches, update = [], metrics.update

    def noting(*batch):
        batches.append(batch)
        update(*batch)

    metrics.update = noting
    return batches


class Steps(L.Callback):
    """The loss of each step, and the gradients of the first one."""

    def __init__(self):
        self.losses, self.gradients = [], {}

    def on_after_backward(self, trainer, module):
        if not self.losses:
            self.gradients = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}

    def on_train_batch_end(self, trainer, module, *_):
        self.losses.append(float(trainer.callback_metrics["loss"]))


def steps(method, devices):
    """Twelve steps on 18 images, 6 a step whatever the number of processes."""
    watch, model = Steps(), build(method)
    run = trainer(devices, watch)
    run.fit_loop.max_epochs = 4
    run.fit(model, datamodule=data(train=36, batch_size=8 // devices))
    return watch, model


def main(out, *methods):
    rank, world, _ = ranks.launched()
    results = {}
    for method in methods:
        seen, module, model = Seen(), data(), build(method)
        trainer(world, seen).fit(model, datamodule=module)
        trainer(world, seen).validate(model, dataloaders=module.test_dataloader(), verbose=False)
        measured = record(model.metrics)
        (metrics,) = trainer(world, seen).test(model, datamodule=module, verbose=False)
        trainer(world, seen).predict(model, datamodule=module)
        scored = list(model.scored)
        for count in (1, 2, 3):  # fewer images than processes, and not a multiple of them
            alone = Seen()
            few = data(test=(count, 1)).test_dataloader()
            trainer(world, alone).predict(model, dataloaders=few)
            seen.names[f"predict {count + 1}"] = alone.names.get("predict", [])
        one = AnomalyDataModule(load_data(f"synthetic:train=1,good=1,defect=1,size={SIZE}"))
        tiny, only = build(method), Seen()
        watch = None
        if tiny.learns_by_gradient:
            watch, _ = steps(method, world)
        else:
            trainer(world, only).fit(tiny, datamodule=one)  # one image, two processes
        seen.names["fit of one"] = only.names.get("fit", [])

        path = out / f"{method}.ckpt"
        trainer(world, Save(path, 3)).fit(build(method), datamodule=data())
        resumed = build(method)
        trainer(world).fit(resumed, datamodule=data(), ckpt_path=path, weights_only=True)

        results[method] = {
            "state": model.state_dict(),
            "private": model.private_state(),
            "resumed": resumed.state_dict(),
            "names": seen.names,
            "metrics": metrics,
            "measured": measured,
            "scored": scored,
            "tiny": tiny.state_dict(),
            "losses": watch and watch.losses,
            "gradients": watch and watch.gradients,
        }
    torch.save(results, out / f"rank{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
