"""Steps a second of the methods that learn by gradient, ours and the peer's, in turns.

Both sides run their LightningModule under the same plain `lightning.Trainer` without loggers, bars and checkpoints, in
float32, on the same batches of random images in memory: training step, backward pass and optimiser of each, from the
first batch's start to the last one's end. Same backbone (random weights, which change no time), layers and input size;
the peer's pre-processing is off, ours is in the step. GANomaly takes 256 x 256 on both sides, in three channels.

The bound is what a step computes in convolutions and products of matrices (torch's FlopCounterMode over our training
step and backward pass), at the rate of the machine: that of one 3 x 3 convolution of 256 channels on 28 x 28 positions,
forward and backward, in channels_last, measured in the same process. "of_bound" is our time over that of the bound.
"""

import statistics
import time
from types import SimpleNamespace
from typing import Any

from sides import in_turns, median_of, serve

WIDE, THIN = "wide_resnet50_2", "resnet18"
# of ours, and of the peer's; layers are of stride 4, 8 and 16 (SuperSimpleNet: 8 and 16) on both sides
METHODS = {
    "stfpm": (THIN, {}, "Stfpm", {"backbone": THIN}),
    "rd4ad": (WIDE, {}, "ReverseDistillation", {"backbone": WIDE, "pre_trained": False}),
    "fastflow": (WIDE, {}, "Fastflow", {"backbone": WIDE, "pre_trained": False}),
    "supersimplenet": (WIDE, {}, "Supersimplenet", {"backbone": WIDE}),
    "cfa": (WIDE, {}, "Cfa", {"backbone": WIDE}),
    "ganomaly": (None, {"channels": 3}, "Ganomaly", {}),
}


def section(pythons: dict[str, str], quick: bool, methods: list[str] | None = None) -> dict[str, Any]:
    rows = []
    for method in methods or METHODS:
        request = {"method": method, "batch": 2 if quick else 8, "steps": 2 if quick else 4}
        found = in_turns(pythons, "fit.py", 1 if quick else 3, **request)
        ours, peer = (1 / median_of(found[side], "seconds") for side in ("ours", "peer"))
        row = {"name": method, "ours": ours, "peer": peer, "ratio": ours / peer, "unit": "steps/s", "wanted": 2.0}
        gflop, rate = found["ours"][0]["gflop"], median_of(found["ours"], "gflops")
        row |= {"gflop": gflop, "gflop_per_s": rate, "of_bound": rate / ours / gflop}
        rows.append(row)
    return {"rows": rows, "notes": ["Where the ratio is below 2, of_bound at most 1.2 will do."]}


def ours(method: str, batch: int, steps: int) -> dict[str, Any]:
    import torch

    from zoo import Batch, create_model
    from zoo.nn.features import architecture_only

    backbone, options, _, _ = METHODS[method]
    torch.manual_seed(0)
    with architecture_only():
        module = create_model(method, **options, **({"backbone": backbone} if backbone else {}))
    images = torch.rand(batch, 3, *module.size)
    batches = [Batch(images, [str(i) for i in range(batch)])] * (steps + 1)
    seconds = _seconds(module, batches)
    return {"seconds": seconds, "gflop": _gflop(module, batches[0]), "gflops": _rate(batch)}


def peer(method: str, batch: int, steps: int) -> dict[str, Any]:
    import timm
    import torch
    import torchvision

    original = timm.create_model
    timm.create_model = lambda *names, **how: original(*names, **(how | {"pretrained": False}))  # none at hand
    torchvision.models.get_model_weights = lambda name: SimpleNamespace(DEFAULT=None)
    from anomalib import models
    from anomalib.data import ImageBatch

    _, _, name, options = METHODS[method]
    torch.manual_seed(0)
    off = dict.fromkeys(("post_processor", "evaluator", "visualizer"), False)
    off |= {"pre_processor": True} if method == "ganomaly" else {"pre_processor": False}  # it asks that for the size
    module = getattr(models, name)(**options, **off)
    module.setup = lambda stage=None: None
    side = 256 if method == "ganomaly" else 224
    images = torch.randn(batch, 3, side, side)
    labels = torch.zeros(batch, dtype=torch.bool)
    batches = [ImageBatch(image=images, gt_label=labels) for _ in range(steps + 1)]
    timm.create_model = original
    return {"seconds": _seconds(module, batches)}


def _seconds(module: Any, batches: list[Any]) -> float:
    """A step's, the median of all but the first, which allocates."""
    import lightning as L
    from torch.utils.data import DataLoader

    class Clock(L.Callback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_train_batch_start(self, *_: Any) -> None:
            self.start = time.perf_counter()

        def on_train_batch_end(self, *_: Any) -> None:
            self.times.append(time.perf_counter() - self.start)

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            return DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)

    clock = Clock()
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", devices=1, callbacks=[clock], num_sanity_val_steps=0, **off)
    trainer.fit(module, datamodule=Data())
    return statistics.median(clock.times[1:])


def _gflop(module: Any, batch: Any) -> float:
    """Of convolutions and products in a step, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        _seconds(module, [batch] * 2)
    return counter.get_total_flops() / 2 / 1e9


def _rate(batch: int) -> float:
    """GFLOP/s of a convolution that suits the machine, forward and backward."""
    import torch

    conv = torch.nn.Conv2d(256, 256, 3, padding=1).to(memory_format=torch.channels_last)
    x = torch.rand(batch, 256, 28, 28).contiguous(memory_format=torch.channels_last).requires_grad_()
    times = []
    for _ in range(12):
        start = time.perf_counter()
        conv(x).sum().backward()
        times.append(time.perf_counter() - start)
    return 3 * 2 * batch * 28 * 28 * 256 * 256 * 9 / min(times) / 1e9


SIDES = {"ours": ours, "peer": peer}

if __name__ == "__main__":
    serve(SIDES)
