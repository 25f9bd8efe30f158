"""What the paper's benchmark costs: steps measured on a CPU, and from them an estimate for one GPU.

    python tests/bench/cost.py --out tests/bench/cost.json

Each method with preset paper224 (weights at random: they cost the same) takes a few batches of its own size, in a
process of its own, counted (by torch's formulas: convolutions and products of matrices, backward included) and, after
the first one, timed; where there are phases each is measured, and weighed by its share of the steps. A fit on MIIC is
then the preset's steps over 21,499 images (a tenth of 23,888 is held out), and its time on a GPU is its floating-point
operations over a rate that we assume: an estimate, no measurement. Memory is how far the process grew beyond its
libraries, which is what a GPU has to hold, but for its own libraries.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import lightning as L
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from zoo import record
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.methods import create_model, list_methods, presets
from zoo.nn.features import architecture_only

IMAGES = 21_499  # of MIIC, learned from
RATE = 10e12  # floating-point operations a second that one GPU is assumed to sustain in float32 with TF32
BATCHES = 3
PHASES = {"fanogan": {"gan_share": 0.5}, "iad_inpainting": {"reconstruction_share": 0.5}}  # so that each is measured


class Counter(TorchDispatchMode):
    """Counts as torch's `FlopCounterMode` does, which can't follow a gradient penalty."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if count := flop_registry.get(function._overloadpacket):
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


class Clock(L.Callback):
    """Floating-point operations and seconds of each batch, by phase."""

    def __init__(self):
        self.flops, self.seconds = defaultdict(list), defaultdict(list)

    def on_train_batch_start(self, trainer, module, batch, index):
        self.counter = Counter()
        self.counter.__enter__()
        self.begin = time.perf_counter()

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        seconds = time.perf_counter() - self.begin
        self.counter.__exit__(None, None, None)
        phase = int(module.phase) if module.phases else 0
        self.flops[phase].append(self.counter.total)
        self.seconds[phase].append(seconds)


def measure(method):
    """Figures of a step and of a scored image, in this process."""
    planned = presets(method, "paper224")
    size, fraction = planned.get("data", {}).get("batch_size", 32), planned.get("data", {}).get("train_fraction", 1)
    with architecture_only():
        usual, model = create_model(method, "paper224"), create_model(method, "paper224", **PHASES.get(method, {}))
    batches = BATCHES * 4 if method in PHASES else BATCHES
    data = load_data(f"synthetic:train={2 * (batches + 1) * size},good=1,defect=1,size=224")
    module = AnomalyDataModule(data, input_size=model.size, batch_size=size)
    bare, clock = record.peak_memory_mb(), Clock()
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=1, limit_train_batches=batches, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, datamodule=module)
    trainer_plan = planned.get("trainer", {})
    steps = trainer_plan.get("max_steps") or IMAGES * fraction / size * trainer_plan.get("max_epochs", 1)
    first = next((usual.hparams[name] for name in PHASES.get(method, {})), 1.0)  # share of the first phase
    shares = {phase: first if phase == 0 else 1 - first for phase in clock.flops}
    return {
        "method": method,
        "batch": size,
        "steps": round(steps),
        "flops_a_step": round(sum(share * mean(clock.flops[phase]) for phase, share in shares.items())),
        "seconds_a_step": round(sum(share * mean(clock.seconds[phase][1:]) for phase, share in shares.items()), 3),
        "memory_mb": round(record.peak_memory_mb() - bare),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }


def table(runs):
    """Lines of Markdown: what the README shows. Of the last two columns the sums stand below."""
    head = ["method", "images a step", "steps on MIIC", "s a step here", "TFLOP a step", "memory, GB"]
    head += ["GPU hours, estimate", "with `mvtec_steps`"]
    lines, sums = [head, ["---"] * len(head)], [0.0, 0.0]
    for run in runs:
        hours = [steps * run["flops_a_step"] / RATE / 3600 for steps in (run["steps"], fewer_steps(run))]
        sums = [one + more for one, more in zip(sums, hours, strict=True)]
        measured = [
            f"{run['seconds_a_step']:.2f}",
            f"{run['flops_a_step'] / 1e12:.3f}",
            f"{run['memory_mb'] / 1024:.1f}",
        ]
        about = [f"`{run['method'].replace('_', '-')}`", str(run["batch"]), f"{run['steps']:,}"]
        lines.append([*about, *measured, *map(in_hours, hours)])
    lines.append(["all", *["-"] * 5, *map(in_hours, sums)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fewer_steps(run):
    """Of preset mvtec_steps, or of paper224 where a method has no such preset."""
    try:
        return presets(run["method"], "mvtec_steps")["trainer"]["max_steps"]
    except ZooError:
        return run["steps"]


def in_hours(hours):
    return f"{hours:.0f}" if hours >= 10 else f"{hours:.2g}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=list_methods(), default=list_methods())
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="record that the runs are added to")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.methods[0])))
        return
    runs = json.loads(options.out.read_text())["runs"] if options.out and options.out.exists() else []
    for method in options.methods:
        command = [sys.executable, __file__, "--one", "--methods", method]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        new = json.loads(out.splitlines()[-1])
        print(table([new]).splitlines()[2], flush=True)
        runs = sorted([run for run in runs if run["method"] != method] + [new], key=lambda run: run["method"])
        if options.out:
            report = {"images": IMAGES, "assumed_flops": RATE, "runs": runs, **record.environment(torch.device("cpu"))}
            options.out.write_text(json.dumps(report, indent=1) + "\n")
    print(table(runs))


if __name__ == "__main__":
    main()
