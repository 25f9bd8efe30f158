"""A fit that is killed at any moment and started again: python kill_job.py METHOD FOLDER; done when FOLDER/done.pt is.

Each batch that is done adds a line to FOLDER/seen.jsonl: epoch, batch, names.
"""

import json
import sys
from pathlib import Path

import lightning as L
import torch
from test_resume import build

from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.resume import Unfinished, WholeFiles


class Log(L.Callback):
    def __init__(self, path):
        self.path = path

    def on_train_start(self, *_):
        print("ready", flush=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        with open(self.path, "a") as file:
            file.write(json.dumps([trainer.current_epoch, index, batch.name]) + "\n")


def main(method, folder):
    torch.set_num_threads(1)
    path, model = folder / "last.ckpt", build(method)
    data = AnomalyDataModule(load_data("synthetic:train=60,size=32"), input_size=(32, 32), batch_size=5, seed=3)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[Log(folder / "seen.jsonl"), Unfinished(path, 0)],
        plugins=[WholeFiles()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, ckpt_path=path if path.exists() else None, weights_only=True)
    torch.save({"state": model.state_dict(), "private": model.private_state()}, folder / "done.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
