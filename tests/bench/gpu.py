"""What the zoo does on a GPU, and whether it does there what it does on a CPU; one line a measurement, pass or FAIL.

    python tests/bench/gpu.py --out tests/bench/gpu.json
    python tests/bench/gpu.py --device cpu --quick --out trial.json

The second command runs the same on the CPU, small, as a trial where there is no GPU. Networks have random weights, as
what they cost doesn't depend on them (preset `lite` has its real ones); images are random too.

Of each method: images/s that are scored, in float32, mixed bfloat16 and the fast mode, at each batch size; how often
the host waits for the device in a scored batch (warnings of `torch.cuda.set_sync_debug_mode`); the most memory; the
largest difference of scores and maps from the CPU's, with TF32 off; steps/s of a Trainer with what a fit has in it, and
its waits between two looks. Of the parts: copies from pinned memory, the search of neighbours in banks of two sizes and
the memory it takes beside them, metrics, and coresets. Exit code 1 tells that a line fails.
"""

import argparse
import copy
import json
import sys
import time
import warnings
from pathlib import Path

import lightning as L
import torch

from zoo import record
from zoo.callbacks import Finite, Losses, MaxSteps
from zoo.learning import LOOK
from zoo.methods import create_model, list_methods
from zoo.metrics import AnomalyMetrics
from zoo.module import Batch
from zoo.nn.coreset import covering_radius, greedy_coreset, nearest
from zoo.nn.features import architecture_only
from zoo.run import RunOptions
from zoo.trainer import make_trainer, quiet

PRECISIONS = ("32-true", "bf16-mixed", "fast")
LEARNED = 16  # images that statistics are learned from
CLOSE = 1e-3  # of the map's spread, between a GPU and a CPU in float32: sums have another order
SEARCH_MB = 256  # that a search may take beside queries and bank
WAITS = {"patchcore": 1}  # of a scored batch: which distances float32 can't tell has to be known
QUICK_MODEL = {"fanogan": {"width": 4}, "padim": {"dims": 20}, "patchcore": {"bank_size": 300}, "riad": {"width": 4}}


class Device:
    """A GPU, or the CPU in a trial, of which there is neither a peak nor a wait to measure."""

    def __init__(self, name):
        self.torch, self.is_gpu = torch.device(name), name.startswith("cuda")

    def sync(self):
        if self.is_gpu:
            torch.cuda.synchronize(self.torch)

    def forget_peak(self):
        self.sync()
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.torch)
            self.base = torch.cuda.memory_allocated(self.torch)

    def peak_mb(self):
        """Most memory since `forget_peak`, and what of it is new, in MiB."""
        if not self.is_gpu:
            return None, None
        peak = torch.cuda.max_memory_allocated(self.torch)
        return round(peak / 2**20, 1), round((peak - self.base) / 2**20, 1)

    def rate(self, function, seconds):
        """Calls a second."""
        for _ in range(3):
            function()
        self.sync()
        begin, count = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for _ in range(4):
                function()
            self.sync()
            count += 4
        return count / (time.perf_counter() - begin)

    def waits(self, function):
        """How often the host waits for the device in a call."""
        if not self.is_gpu:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in caught)


class Table:
    """Lines, printed as they come and kept in a file."""

    def __init__(self, out, about):
        self.out, self.record = out, about | {"lines": []}

    def add(self, name, value, unit, passed=None):
        shown = "-" if value is None else f"{value:.4g}"
        verdict = {None: "    ", True: "pass", False: "FAIL"}[None if value is None else passed]
        print(f"{verdict}  {name:60} {shown:>10} {unit}", flush=True)
        line = {"name": name, "value": value, "unit": unit, "passed": None if value is None else passed}
        self.record["lines"].append(line)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(self.record, indent=1) + "\n")

    @property
    def failed(self):
        return [line["name"] for line in self.record["lines"] if line["passed"] is False]


class Loader:
    """The same batch again and again, in pinned memory where there is a GPU."""

    def __init__(self, batch, count):
        self.batch, self.count, self.dataset = batch, count, range(count * len(batch.name))

    def __len__(self):
        return self.count

    def __iter__(self):
        return iter([self.batch] * self.count)


def images(count, size, seed=0):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(seed))


def batch_of(count, size):
    image = images(count, size)
    return Batch(image.pin_memory() if torch.cuda.is_available() else image, [str(i) for i in range(count)])


def build(method, options):
    arguments = QUICK_MODEL.get(method, {}) | {"input_size": 64} if options.quick else {}
    if options.preset == "lite":
        return create_model(method, "lite", **arguments)
    with architecture_only():
        return create_model(method, options.preset, **arguments)


def learned(method, options, device):
    """A model that can score, in eval mode on the device."""
    model = build(method, options).to(device.torch).eval()
    if hasattr(model, "observe"):
        model.num_train_images = LEARNED
        with torch.no_grad():
            for i, part in enumerate(images(LEARNED, options.size, seed=1).split(8)):
                model.observe(Batch(part.to(device.torch), [f"{i}-{j}" for j in range(len(part))]))
            model.finish()
    return model


@torch.inference_mode()
def scoring(method, model, options, device, table):
    batch = images(4, options.size, seed=2)
    there = model(batch.to(device.torch))
    here = copy.deepcopy(model).cpu()(batch)
    spread = float(here.map.max() - here.map.min())
    apart = float((here.map - there.map.cpu()).abs().max()) / spread
    table.add(f"{method}: maps from the CPU's, over their spread", apart, "", apart <= CLOSE)
    apart = float(((here.image - there.image.cpu()) / here.image).abs().max())
    table.add(f"{method}: scores from the CPU's, relative", apart, "", apart <= CLOSE)
    torch.backends.cudnn.allow_tf32 = True  # torch's own default, for the figures
    for size in options.batches:
        batch = images(size, options.size).to(device.torch)
        for model.precision in PRECISIONS:

            def score(batch=batch):
                with model.autocast():
                    return model(batch)

            device.forget_peak()
            speed = size * device.rate(score, options.seconds)
            table.add(f"{method}: scored, {model.precision}, batch {size}", speed, "images/s")
            table.add(f"{method}: most memory, {model.precision}, batch {size}", device.peak_mb()[0], "MiB")
    full = model(batch).image
    apart = float(((score().image - full) / full).abs().max())  # of the last one, in the fast mode
    table.add(f"{method}: scores of the fast mode from float32's, relative", apart, "")
    model.precision = "32-true"
    waits = device.waits(score)
    table.add(f"{method}: waits in a scored batch", waits, "", waits is not None and waits <= WAITS.get(method, 0))
    torch.backends.cudnn.allow_tf32 = False


class Watch(L.Callback):
    """Seconds and waits of steps; waits are counted between two looks alone."""

    def __init__(self, device):
        self.device, self.waits = device, 0

    def on_train_batch_start(self, trainer, module, batch, index):
        if index == LOOK:
            self.device.sync()
            self.begin, self.first = time.perf_counter(), index
        self.strict = self.device.is_gpu and LOOK < index and index % LOOK not in (0, LOOK - 1)
        if self.strict:
            self.caught = warnings.catch_warnings(record=True)
            self.list = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        if self.strict:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            self.waits += sum("synchroniz" in str(warning.message) for warning in self.list)
        self.last = index

    def on_train_end(self, trainer, module):
        self.device.sync()
        self.speed = (self.last + 1 - self.first) / (time.perf_counter() - self.begin)


def training(method, options, device, table):
    if not build(method, options).learns_by_gradient:
        return
    steps = 2 * LOOK if options.quick else options.steps
    for precision in PRECISIONS:
        model, watch = build(method, options), Watch(device)
        model.plan = {"max_steps": steps}
        device.forget_peak()
        run = RunOptions(device=options.device, precision=precision, progress=False)
        callbacks = [MaxSteps(steps), Finite(10**6), Losses(10**6, lambda line: None), watch]
        with quiet():
            trainer = make_trainer(run, callbacks, max_epochs=1)
            trainer.fit(model, Loader(batch_of(options.train_batch, options.size), steps))
        name = f"{method}: training, {precision}, batch {options.train_batch}"
        table.add(name, watch.speed, "steps/s")
        table.add(f"{name}, most memory", device.peak_mb()[0], "MiB")
        table.add(f"{name}, waits between two looks", watch.waits if device.is_gpu else None, "", watch.waits == 0)


def copies(options, device, table):
    """Of 256 MB: until the host may go on, over the time of the copy."""
    host = torch.zeros(2**20 if options.quick else 2**26)
    for kind, source in ("pageable", host), ("pinned", host.pin_memory() if device.is_gpu else host):
        shares = []
        for _ in range(5):
            device.sync()
            begin = time.perf_counter()
            kept = source.to(device.torch, non_blocking=True)
            free = time.perf_counter() - begin
            device.sync()
            shares.append(free / (time.perf_counter() - begin))
            del kept
        share = sorted(shares)[2] if device.is_gpu else None
        passed = share is not None and share < 0.5 if kind == "pinned" else None
        table.add(f"copy from {kind} memory: share of it that the host waits", share, "", passed)
    method = options.methods[0]
    model, batch = learned(method, options, device), batch_of(options.batches[-1], options.size)
    there = batch.image.to(device.torch)
    with torch.inference_mode():
        alone = device.rate(lambda: model(there), options.seconds)
        fed = device.rate(lambda: model(batch.to(device.torch).image), options.seconds)
    table.add(f"{method}: scored with each batch copied, of the speed without", fed / alone, "")


def vectors(count, width, seed=0):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) + 1


def search(options, device, table):
    """784 patches an image, of a batch of 8."""
    width, queries = (64, vectors(784, 64, 1)) if options.quick else (1536, vectors(6272, 1536, 1))
    there = queries.to(device.torch)
    for size in options.banks:
        bank = vectors(size, width)
        on_device = bank.to(device.torch)
        for k in (1, 9):
            device.forget_peak()
            speed = device.rate(lambda k=k, bank=on_device: nearest(there, bank, k), options.seconds)
            table.add(f"search: {len(queries)} x {size} x {width}, k = {k}", 1000 / speed, "ms")
            _, more = device.peak_mb()
            table.add("    memory beside queries and bank", more, "MiB", more is not None and more <= SEARCH_MB)
        found, expected = nearest(there[:256], on_device)[0].cpu(), nearest(queries[:256], bank)[0]
        apart = float(((found - expected) / expected).abs().max())
        table.add("    distances from the CPU's, relative", apart, "", apart <= 1e-5)
        waits = device.waits(lambda bank=on_device: nearest(there, bank))
        table.add("    waits in a call", waits, "", waits is not None and waits <= 1)


def metrics(options, device, table):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(8 if options.quick else 64, 1, options.size, options.size, generator=generator)
    mask = maps + torch.randn(maps.shape, generator=generator) > 3
    mask[::2] = False
    given = maps.amax((1, 2, 3)), maps, mask.flatten(1).any(1), mask
    found = []
    for place in ("cpu", device.torch):
        parts = zip(*(x.to(place).split(8) for x in given), strict=True)
        measured, batches = AnomalyMetrics().to(place), [(*part, None) for part in parts]
        device.forget_peak()
        begin = time.perf_counter()
        measured.update_all(batches)
        device.sync()
        seconds = time.perf_counter() - begin
        found.append(measured.compute())
    table.add("metrics: an image", 1000 * seconds / len(maps), "ms")
    table.add("metrics: memory beside the maps", device.peak_mb()[1], "MiB")
    apart = max(abs(found[0][name] - found[1][name]) for name in found[0])
    table.add("metrics: largest difference from the CPU's", apart, "", apart == 0 and len(found[1]) == 7)


def coreset(options, device, table):
    """A tenth of a MIIC-like set's patches; the radius is measured on the CPU."""
    count, width, size = (4000, 64, 100) if options.quick else (78_400, 1536, 1568)
    given = vectors(count, width)
    there = given.to(device.torch)
    device.forget_peak()
    begin = time.perf_counter()
    chosen, radius = greedy_coreset(there, size, start=0)
    device.sync()
    table.add(f"coreset: {count} x {width} -> {size}", time.perf_counter() - begin, "s")
    table.add("    memory beside the vectors", device.peak_mb()[1], "MiB")
    apart = abs(covering_radius(given, given[chosen.cpu()]) / radius - 1)
    table.add("    radius from what the CPU measures, relative", apart, "", apart <= 1e-5)
    _, expected = greedy_coreset(given, size, start=0)
    apart = abs(radius / expected - 1)
    table.add("    radius from that of the CPU's coreset, relative", apart, "", apart <= 1e-3)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ..., or cpu for a trial")
    parser.add_argument("--methods", nargs="+", default=list_methods(), choices=list_methods())
    parser.add_argument("--preset", default="paper224", help="of the methods; lite has real weights")
    parser.add_argument("--size", type=int, default=224, help="side of the images")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--train-batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--banks", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--seconds", type=float, default=2.0, help="of each measurement of a speed")
    parser.add_argument("--quick", action="store_true", help="small networks and sets")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("There is no GPU here; --device cpu runs the same on the CPU, as a trial.", file=sys.stderr)
        return 2
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = Device(options.device)
    about = {key: value for key, value in vars(options).items() if key != "out"}
    table = Table(options.out, about | record.environment(device.torch))
    for method in options.methods:
        scoring(method, learned(method, options, device), options, device, table)
        training(method, options, device, table)
    for part in (copies, search, metrics, coreset):
        part(options, device, table)
    print(f"{len(table.failed)} lines fail." if table.failed else "No line fails.")
    return 1 if table.failed else 0


if __name__ == "__main__":
    sys.exit(main())
