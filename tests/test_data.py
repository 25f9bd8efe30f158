"""The data module: what is fitted on, held out and tested, and what odd folders do."""

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.data import check_data, load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.data.loader import EpochLoader
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.run import RunOptions
from zoo.view import View

TINY = {"preset": "lite", "arguments": {"input_size": 64, "dims": 10}}


def write(path, size=(64, 64), colour=False, value=100, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if colour else size
    noise = np.random.default_rng(seed).normal(value, 10, shape).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).save(path)


def names(loader):
    return [name for batch in loader for part in ([batch] if hasattr(batch, "image") else batch) for name in part.name]


def test_splits_are_disjoint_and_seeded(mvtec):
    data = load_data(str(mvtec))
    modules = [AnomalyDataModule(data, seed=s) for s in (0, 0, 1)]
    train, held = (set(names(loader)) for loader in (modules[0].train_dataloader(), modules[0].holdout_dataloader()))
    assert len(train) == len(held) == 15 and not train & held
    assert held == set(names(modules[1].holdout_dataloader())) != set(names(modules[2].holdout_dataloader()))
    assert len(names(modules[0].test_dataloader())) == 12


@pytest.mark.parametrize(("count", "held"), [(1, 0), (2, 1), (30, 15), (60, 20), (400, 40)])
def test_share_held_out(count, held):
    module = AnomalyDataModule(load_data(f"synthetic:train={count},size=32"))
    assert len(module.holdout_set) == held and module.num_train_images == count - held


def test_train_fraction_is_exact_and_seeded():
    data = load_data("synthetic:train=200,size=32")
    module = AnomalyDataModule(data, train_fraction=0.5)
    assert module.num_train_images + len(module.holdout_set) == 100
    assert names(module.holdout_dataloader()) == names(AnomalyDataModule(data, train_fraction=0.5).holdout_dataloader())


def indices(loader):
    return [index for batch in loader for index in batch]


def epoch_loader(size, batch_size=4, **options):
    return EpochLoader(range(size), batch_size, list, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_order_is_a_function_of_seed_and_epoch(workers):
    loader = epoch_loader(50, seed=3, num_workers=workers)
    first = indices(loader)
    loader.set_epoch(1)
    second = indices(loader)
    assert sorted(first) == sorted(second) == list(range(50)) and first != second
    torch.manual_seed(9)
    np.random.seed(9)
    again = epoch_loader(50, seed=3, num_workers=workers)
    assert indices(again) == first
    again.load_state_dict({"epoch": 1, "taken": 5})
    assert len(again) == 13 and indices(again) == second[20:]
    assert indices(again) == second  # only once
    again.load_state_dict({"epoch": 0, "taken": 13})  # a whole epoch
    assert indices(again) == second


@pytest.mark.parametrize("workers", [0, 2])
def test_state_counts_what_was_handed_out(workers):
    loader = epoch_loader(50, seed=3, num_workers=workers)
    seen = []
    for batch in loader:
        seen += batch
        if len(seen) >= 12:
            break
    assert loader.state_dict() == {"epoch": 0, "taken": 3}
    again = epoch_loader(50, seed=3)
    again.load_state_dict(loader.state_dict())
    assert seen + indices(again) == indices(epoch_loader(50, seed=3))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 12, 17])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_ranks_share_without_repeats(world, size, batch_size, monkeypatch):
    seen, lengths = [], set()
    for rank in range(world):
        monkeypatch.setattr("zoo.data.loader.rank_and_world", lambda rank=rank: (rank, world))
        loader = epoch_loader(size, batch_size, seed=0)
        batches = list(loader)
        assert len(batches) == len(loader) and max(map(len, batches)) <= batch_size
        lengths.add(len(batches))
        seen += indices(batches)
    assert sorted(seen) == list(range(size)) and len(lengths) == 1


def test_mixed_sizes_and_channels(tmp_path):
    for i in range(8):
        write(tmp_path / f"train/good/{i}.png", size=[(64, 64), (80, 48)][i % 2], colour=i % 3 == 0, seed=i)
    write(tmp_path / "test/good/a.png", size=(70, 90), seed=50)
    write(tmp_path / "test/bad/b.png", size=(50, 60), colour=True, value=200, seed=51)
    write(tmp_path / "ground_truth/bad/b.png", size=(50, 60), value=250)
    model, record = fit("padim", str(tmp_path), **TINY)
    assert record["train_data"]["images"] == 4
    assert "pixel_aupro" in evaluate(model, str(tmp_path), record)["metrics"]


def test_mixed_sizes_in_a_batch_are_resized_as_the_network_does(tmp_path):
    """A batch of unequal images gives the network the same input as each image alone."""
    from zoo.methods import create_model

    for i in range(4):
        write(tmp_path / f"train/good/{i}.png", size=(64 + 16 * i, 64), seed=i)
    model = create_model("padim", "lite", input_size=64, dims=10)
    module = AnomalyDataModule(load_data(str(tmp_path)), input_size=model.size)
    (batch,) = module.train_dataloader()
    together = model.prepare(batch.image)
    for name, row in zip(batch.name, together, strict=True):
        grey = np.asarray(Image.open(tmp_path / name), dtype=np.float32) / 255
        alone = model.prepare(torch.from_numpy(grey)[None, None])[0]
        torch.testing.assert_close(row, alone, rtol=0, atol=1e-6)


def test_one_image_fits_without_threshold(tmp_path):
    write(tmp_path / "good/a.png")
    model, record = fit("padim", str(tmp_path), **TINY)
    assert record["train_data"] | {"images": 1, "held_out": 0} == record["train_data"]
    prediction = model.predict(tmp_path / "good/a.png")
    assert model.calibration is None and prediction.is_anomalous is None and prediction.verdict == "no threshold"


def test_flat_folder_and_no_test_split(tmp_path):
    for i in range(4):
        write(tmp_path / f"{i}.png", seed=i)
    model, _ = fit("padim", str(tmp_path), **TINY)
    with pytest.raises(ZooError, match="no test images"):
        evaluate(model, str(tmp_path))


def test_one_class_in_the_test_split(tmp_path):
    for i in range(4):
        write(tmp_path / f"train/good/{i}.png", seed=i)
    write(tmp_path / "test/good/0.png", seed=9)
    model, _ = fit("padim", str(tmp_path), **TINY)
    with pytest.raises(ZooError, match="no anomalous test images"):
        evaluate(model, str(tmp_path))


def test_empty_folder(tmp_path):
    with pytest.raises(ZooError):
        check_data(str(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_image_stops_the_fit_with_its_name(tmp_path, workers):
    for i in range(6):
        write(tmp_path / f"good/{i}.png", seed=i)
    (tmp_path / "good/3.png").write_bytes((tmp_path / "good/3.png").read_bytes()[:300])
    with pytest.raises(ZooError, match="3.png") as caught:
        fit("padim", str(tmp_path), **TINY, data_options={"num_workers": workers})
    assert "\n" not in str(caught.value)


def test_broken_image_is_left_out_and_listed(tmp_path):
    from zoo.hub import model_place

    for i in range(6):
        write(tmp_path / f"good/{i}.png", seed=i)
    (tmp_path / "good/3.png").write_bytes(b"no image")
    said = []

    _, record = fit(
        "padim", str(tmp_path), "m", **TINY, data_options={"skip_broken": True}, run=RunOptions(say=said.append)
    )
    assert (
        record["train_data"]["broken"] == 1 and record["train_data"]["images"] + record["train_data"]["held_out"] == 5
    )
    assert "3.png" in (model_place("m") / "private/broken.csv").read_text() and any("3.png" in line for line in said)


def test_mask_of_another_size_is_named(tmp_path):
    write(tmp_path / "train/good/0.png")
    write(tmp_path / "test/good/0.png", seed=2)
    write(tmp_path / "test/hole/x.png", seed=3)
    write(tmp_path / "ground_truth/hole/x.png", size=(32, 32), value=250)
    model, _ = fit("padim", str(tmp_path), **TINY)
    with pytest.raises(ZooError, match="test/hole/x.png"):
        evaluate(model, str(tmp_path))


def test_16_bit_reaches_the_network(tmp_path):
    """16-bit values that differ below 8 bits arrive as different numbers."""
    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) + 20000
    (tmp_path / "good").mkdir()
    for i in range(2):
        Image.fromarray(ramp).save(tmp_path / f"good/{i}.tif")
    module = AnomalyDataModule(load_data(str(tmp_path)), input_size=(64, 64))
    (batch,) = module.train_dataloader()
    np.testing.assert_allclose(batch.image[0, 0].numpy(), ramp / 65535, rtol=0, atol=1e-7)
    assert batch.image[0, 0].unique().numel() == 64 * 64


def test_as_many_normals_are_held_out_as_are_wanted(mvtec):
    data = load_data(str(mvtec))
    for wanted in (0, 7, 29):
        module = AnomalyDataModule(data, hold_out=wanted)
        assert len(module.holdout_set) == wanted and module.num_train_images == 30 - wanted
    for wanted, text in ((30, "30 leaves nothing of 30"), (-1, "is at least 0")):
        with pytest.raises(ZooError, match=f"--hold-out {text}"):
            AnomalyDataModule(data, hold_out=wanted)


def test_preset_original_crops_image_and_mask(mvtec):
    module = AnomalyDataModule(load_data(str(mvtec)), view=View(resize=64, crop=56))
    for group in module.test_dataloader():
        for part in group:
            assert part.image.shape[-2:] == (56, 56) and (part.mask is None or part.mask.shape[-2:] == (56, 56))


def test_unknown_specifications_list_the_forms():
    for spec in ("hug:org/name", "mic:/data", "miic:", "hub:"):
        with pytest.raises(ZooError, match=r"synthetic.*miic:DIR.*hub:ORG/NAME.*path"):
            check_data(spec)


def test_fingerprint_follows_the_data(mvtec):
    assert check_data(str(mvtec)).fingerprint == check_data(f"{mvtec}/").fingerprint
    assert check_data("synthetic:seed=1").fingerprint != check_data("synthetic").fingerprint


def test_a_plain_trainer_and_dataloader_will_do(mvtec):
    """The contract needs no data module of ours: any DataLoader of Batches."""
    import lightning as L
    from torch.utils.data import DataLoader

    from zoo import Batch, create_model

    images = torch.rand(12, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    rows = [(images[i], f"{i}.png", i % 2, images[i] > 0.9) for i in range(12)]

    def collate(items):
        image, name, label, mask = zip(*items, strict=True)
        mask = torch.stack(mask) & (torch.tensor(label).view(-1, 1, 1, 1) > 0)
        return Batch(torch.stack(image), list(name), torch.tensor(label), mask)

    loader = DataLoader(rows, 5, collate_fn=collate)
    model = create_model("padim", "lite", input_size=64, dims=10)
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)
    assert model.num_train_images == 12 and len(model.center) == 256
    (metrics,) = trainer.test(model, loader, verbose=False)
    assert len(metrics) == 7
    assert sum(len(part) for part in trainer.predict(model, loader)) == 12


class Counting(torch.utils.data.Dataset):
    """Notes what was asked for, and breaks at one item."""

    def __init__(self, breaks=None):
        self.made, self.breaks = [], breaks

    def __len__(self):
        return 10

    def __getitem__(self, index):
        self.made.append(index)
        if index == self.breaks:
            raise ZooError(f"{index} is broken")
        return index


def test_one_batch_is_made_ahead_and_only_what_was_handed_out_counts():
    data = Counting()
    loader = EpochLoader(data, 2, list)
    batches = iter(loader)
    assert next(batches) == [0, 1] and loader.state_dict()["taken"] == 1
    batches.close()  # waits for what is under way
    assert set(data.made) <= {0, 1, 2, 3}
    loader.load_state_dict({"epoch": 0, "taken": 1})
    assert list(loader) == [[2, 3], [4, 5], [6, 7], [8, 9]]


def test_a_broken_image_stops_where_it_comes():
    seen = []
    with pytest.raises(ZooError, match="5 is broken"):
        for batch in EpochLoader(Counting(breaks=5), 2, list):
            seen += batch
    assert seen == [0, 1, 2, 3]
