"""On a GPU the host waits for nothing that it can do without. Marked `gpu`: what only a GPU can tell."""

import contextlib
import warnings
from itertools import pairwise
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from gpu_reads import Pretended, Reads, pretended_gpu

from zoo.callbacks import Finite, Losses, MaxSteps
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.learning import LOOK
from zoo.methods import create_model, list_methods
from zoo.metrics import AnomalyMetrics
from zoo.module import Batch
from zoo.nn.coreset import StreamingCoreset, covering_radius, greedy_coreset, nearest
from zoo.trainer import Bar

SMALL = {
    "fanogan": {"width": 4, "critic_steps": 2},
    "ganomaly": {"width": 8},
    "iad_inpainting": {"width": 8},
    "padim": {"dims": 20},
    "patchcore": {"bank_size": 60},
    "riad": {"width": 4},
}
METHODS = pytest.mark.parametrize("method", list_methods())
DATA = "synthetic:train=40,good=8,defect=8,size=80"
SEARCHES = {"patchcore": 1}  # reads of a batch that is scored: float64 takes over where float32 has lost too much


def build(method):
    return create_model(method, "lite", **({"input_size": 64} | SMALL.get(method, {})))


def images(n, size=(80, 80), seed=0):
    return torch.rand(n, 1, *size, generator=torch.Generator().manual_seed(seed))


def learned(method):
    """A model that can score, whatever it has learned."""
    model = build(method).eval()
    if hasattr(model, "observe"):
        model.num_train_images = 6
        with torch.no_grad():
            model.observe(Batch(images(6, seed=1), list("abcdef")))
            model.finish()
    return model


def data(batch_size=4):
    return AnomalyDataModule(load_data(DATA), input_size=(64, 64), batch_size=batch_size, hold_out=0)


def trainer_of(*callbacks, accelerator="cpu", **options):
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    return L.Trainer(accelerator=accelerator, max_epochs=1, devices=1, callbacks=list(callbacks), **quiet, **options)


# ---- on any machine: what would be waited for ------------------------------------------------------------------------


class PerBatch(L.Callback):
    """What is read from each batch of a fit, a test or a prediction to the next, by Lightning too."""

    def __init__(self, reads):
        self.reads, self.starts = reads, []

    def on_train_batch_start(self, *_):
        self.starts.append(len(self.reads.found))

    on_test_batch_start = on_predict_batch_start = on_train_batch_start

    @property
    def batches(self):
        """But for the last one, after which there is more to read."""
        return [self.reads.found[a:b] for a, b in pairwise(self.starts)]


@METHODS
def test_a_fit_reads_nothing_from_batch_to_batch(method):
    """But in every tenth step, and where it ends: losses, gradients, and what else may go wrong."""
    totals, length = [], {}
    for count in (4, 8):
        model = build(method)
        model.plan = {"max_steps": 16}  # of which eight are taken: half of the phases'
        with Reads() as reads:
            watch = PerBatch(reads)
            watches = [MaxSteps(1000), Finite(1000), Losses(1000, print), watch]
            trainer_of(*watches, limit_train_batches=count).fit(model, datamodule=data())
        length[count] = len(watch.starts)
        assert not any(watch.batches[1:]), watch.batches
        totals.append(len(reads.found))
    assert length == {4: 4, 8: 8} and LOOK > 8
    assert totals[0] == totals[1] or method == "patchcore", reads.found  # its coreset is of twice the patches


@METHODS
def test_scores_are_read_when_all_batches_are_scored(method):
    model = learned(method)
    with Reads() as reads:
        watch = PerBatch(reads)
        trainer_of(watch).test(model, datamodule=data(), verbose=False)
    assert [len(found) for found in watch.batches] == 3 * [SEARCHES.get(method, 0)], watch.batches
    assert len(model.scored) == 16 and len(reads.found) > 4  # the metrics are


@METHODS
def test_a_prediction_is_read_once_a_batch(method):
    """Its map, and its score, which is there by then."""
    model = learned(method)
    with Reads() as reads:
        watch = PerBatch(reads)
        found = trainer_of(watch).predict(model, datamodule=data())
    assert [len(found) for found in watch.batches] == 3 * [2 + SEARCHES.get(method, 0)], watch.batches
    assert len([one for batch in found for one in batch]) == 16
    with Reads() as reads:
        model.predict(list(images(8)), batch_size=4)
    assert len(reads.found) == 2 * (2 + SEARCHES.get(method, 0)), reads.found


def test_reads_are_found():
    """Of what is on the device, and not of what is on the host."""
    with Reads() as reads:
        here, there = torch.rand(3), torch.rand(3, device=torch.device("cpu"))
        float(here.max()), here[here > 0], here.tolist(), bool((here.numpy() > 0).all())
        assert not reads.found
        float(there.max()), there[there > 0], there.tolist(), int((here.to("cpu") * there).sum())
        bool(there.cpu().sum() > 0)
    assert [line.split()[0] for line in reads.found] == ["__float__", "__getitem__", "tolist", "__int__", "cpu"]


@METHODS
@pytest.mark.parametrize("tile", [None, 64])
def test_scoring_on_a_pretended_gpu(method, tile):
    """Neither reads nor copies, of constants for example, with and without a region of interest."""
    model = learned(method)
    with torch.no_grad(), model.seen_in_tiles(tile), pretended_gpu(model), Pretended() as found:
        batch = torch.empty(2, 1, 80, 80, device="cuda")
        roi = torch.empty_like(batch, dtype=torch.bool)
        for region in (None, roi):
            scores = model.score_images(batch, region)
            assert scores.image.is_cuda and scores.map.is_cuda and scores.map.shape == (2, 1, 80, 80)
    calls = 2 if tile is None else 4  # tiles of an image go together
    assert len(found.reads) == calls * SEARCHES.get(method, 0), found.reads
    assert not found.copies, found.copies


@METHODS
def test_a_loss_on_a_pretended_gpu(method):
    model = learned(method)
    if not model.learns_by_gradient:
        pytest.skip("learns statistics alone")
    if not model.automatic_optimization:
        pytest.skip("its losses need a Trainer; `test_a_fit_reads_nothing_from_batch_to_batch` has it")
    with pretended_gpu(model), Pretended() as found:
        loss = model.train().training_step(Batch(torch.empty(2, 1, 80, 80, device="cuda"), ["a", "b"]), 0)
    assert loss.is_cuda and not found.reads, found.reads
    assert not found.copies, found.copies


def test_the_bar_reads_losses_once_a_second(monkeypatch):
    now = [10.0]
    monkeypatch.setattr("zoo.trainer.time.monotonic", lambda: now[0])
    monkeypatch.setattr("zoo.trainer.TQDMProgressBar.get_metrics", lambda *_: {"version": 1})
    bar, shown = Bar(), []
    for now[0] in (10.0, 10.5, 10.9, 11.0, 11.5):
        shown.append(bar.get_metrics(None, SimpleNamespace(told={"loss": torch.tensor(now[0])})))
    assert [one["loss"] for one in shown] == [10.0, 10.0, 10.0, 11.0, 11.0] and shown[0]["version"] == 1


def test_metrics_of_held_batches_are_those_of_each(mvtec, monkeypatch):
    """However many pixels are held, of images of unequal sizes, with masks or without."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for i, side in enumerate((24, 24, 32, 24, 32)):
        maps = torch.randn(3, 1, side, side, generator=generator)
        mask = None if i == 1 else maps + torch.randn(maps.shape, generator=generator) > 1.5
        label = torch.zeros(3).long() if mask is None else mask.flatten(1).any(1).long() * torch.tensor([1, 0, 1])
        mask = None if mask is None else mask & label.bool()[:, None, None, None]
        roi = torch.rand(maps.shape, generator=generator) > 0.2 if i == 3 else None
        batches.append((maps.amax((1, 2, 3)), maps, label, mask, roi))
    each, together = AnomalyMetrics(), AnomalyMetrics()
    for batch in batches:
        each.update(*batch)
    together.update_all(batches)
    assert each.compute() == together.compute() and len(each.compute()) == 7
    found = []
    for held in (1, 2**22):
        monkeypatch.setattr("zoo.module.HELD", held)
        model = learned("stfpm")
        (metrics,) = trainer_of().test(model, datamodule=data(), verbose=False)
        found.append((metrics, model.scored, model.unmarked))
    assert found[0] == found[1]


# ---- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu():
    """A GPU that computes in float32 proper, as the CPU does."""
    if not torch.cuda.is_available():
        pytest.skip("there is no GPU here")
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


@contextlib.contextmanager
def sync_mode(mode):
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@METHODS
def test_scores_and_maps_are_those_of_the_cpu(method, gpu):
    model, batch, roi = learned(method), images(4), torch.ones(4, 1, 80, 80, dtype=torch.bool)
    roi[..., :30] = False
    with torch.inference_mode():
        here = [model(batch, region) for region in (None, roi)]
        model.to(gpu)
        there = [model(batch.to(gpu), None if region is None else region.to(gpu)) for region in (None, roi)]
    for a, b in zip(here, there, strict=True):
        spread = float(a.map.max() - a.map.min())
        torch.testing.assert_close(b.map.cpu(), a.map, rtol=1e-3, atol=1e-3 * spread)
        torch.testing.assert_close(b.image.cpu(), a.image, rtol=1e-3, atol=1e-3 * spread)


@pytest.mark.gpu
@METHODS
def test_scoring_waits_for_nothing(method, gpu):
    model, batch = learned(method).to(gpu), images(4).to(gpu)
    with torch.inference_mode():
        model(batch)  # libraries are loaded, and algorithms chosen
        if method not in SEARCHES:
            with sync_mode("error"):
                model(batch)
        with warnings.catch_warnings(record=True) as caught, sync_mode("warn"):
            warnings.simplefilter("always")
            model(batch)
    waits = [w for w in caught if "synchroniz" in str(w.message)]
    assert len(waits) <= SEARCHES.get(method, 0)


@pytest.mark.gpu
@METHODS
def test_steps_wait_for_nothing(method, gpu):
    """Those between two looks, the first ones apart, in which libraries are loaded and optimisers begin."""

    class Strict(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            torch.cuda.set_sync_debug_mode("error" if 2 <= index < 7 else "default")

        def on_train_batch_end(self, *_):
            torch.cuda.set_sync_debug_mode("default")

    model = build(method)
    model.plan = {"max_steps": 16}
    try:
        watches = [MaxSteps(1000), Finite(1000), Losses(1000, print), Strict()]
        trainer_of(*watches, accelerator="gpu", limit_train_batches=8).fit(model, datamodule=data())
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_metrics_on_the_device_are_those_of_the_cpu(gpu):
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(8, 1, 64, 64, generator=generator)
    mask = maps + torch.randn(maps.shape, generator=generator) > 2
    mask[:4] = False
    here, there = AnomalyMetrics(), AnomalyMetrics().to(gpu)
    for metrics in (here, there):
        given = (maps.amax((1, 2, 3)), maps, mask.flatten(1).any(1), mask)
        metrics.update(*(x.to(metrics.device) for x in given))
    assert here.compute() == there.compute()


def vectors(n, d=64, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 3


@pytest.mark.gpu
def test_coresets_cover_as_those_of_the_cpu_do(gpu):
    found = vectors(20_000)
    here, radius = greedy_coreset(found, 500, start=0)
    there, other = greedy_coreset(found.to(gpu), 500, start=0)
    assert other == pytest.approx(radius, rel=1e-5)
    assert covering_radius(found, found[there.cpu()]) == pytest.approx(covering_radius(found, found[here]), rel=1e-5)
    stream = StreamingCoreset(300, 1200)
    for part in found.to(gpu).split(3000):
        stream.add(part, torch.zeros(len(part), 1, dtype=torch.int64, device=gpu))
    bank, _ = stream.finish()
    assert covering_radius(found, bank.cpu()) <= stream.radius_bound


@pytest.mark.gpu
@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_the_cpu_in_bounded_memory(k, gpu):
    bank, queries = vectors(9000), torch.cat([vectors(5000, seed=1), vectors(9000)[:50]])  # the last are copies
    here, there = nearest(queries, bank, k), nearest(queries.to(gpu), bank.to(gpu), k)
    torch.testing.assert_close(there[0].cpu(), here[0], rtol=1e-5, atol=1e-5)
    assert (there[1].cpu() == here[1]).float().mean() > 0.999 and not there[0][-50:, 0].any()
    large, many = torch.randn(100_000, 256, device=gpu), torch.randn(20_000, 256, device=gpu)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nearest(many, large, k)
    assert torch.cuda.max_memory_allocated() - before < 200 * 2**20  # all distances would take 8 GB
