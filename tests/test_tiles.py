"""Large images in tiles: what covers them, what a blended map is, and whole fits and predictions that way."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.cli import main
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained, model_place
from zoo.methods import create_model
from zoo.run import RunOptions
from zoo.tiles import TILE_BATCH, by_tiles, corners, tiles_of
from zoo.view import View

TINY = {"preset": "lite", "arguments": {"input_size": 64, "dims": 10}}
REACH = 3  # pixels that the filter below sees in each direction


def local(images, roi=None):
    """A method that sees a window of 7 x 7 pixels, zeros beyond the edge, and takes the maximum."""
    maps = torch.nn.functional.avg_pool2d(images.mean(1, keepdim=True), 2 * REACH + 1, 1, REACH)
    inside = maps if roi is None else maps.masked_fill(~roi, -torch.inf)
    return inside.amax((1, 2, 3)), maps


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def near_an_edge(size, tile, reach):
    """Pixels within `reach` of an edge of a tile that is not the image's; (H, W) bool."""
    near = []
    for length in size:
        inner = [e for c in corners(length, tile) for e in (c, c + tile) if 0 < e < length]
        pixel, found = torch.arange(length), torch.zeros(length, dtype=torch.bool)
        for edge in inner:
            found |= (pixel >= edge - reach) & (pixel < edge + reach)
        near.append(found)
    return near[0][:, None] | near[1]


@pytest.mark.parametrize("length", [40, 63, 64, 65, 100, 1000, 4096])
def test_tiles_cover_a_side_evenly_and_overlap_by_a_quarter(length):
    starts = corners(length, 64)
    assert starts[0] == 0 and (starts[-1] + 64 == length or length < 64)
    steps = np.diff(starts)
    assert len(starts) == 1 or (steps.max() <= 48 and steps.max() - steps.min() <= 1)
    assert len(starts) == 1 + max(0, -(-(length - 64) // 48))  # no more than it takes


@pytest.mark.parametrize("size", [(64, 64), (100, 257), (30, 300), (129, 128)])
def test_cores_part_the_image_and_lie_inside(size):
    seen = np.zeros(size, int)
    for tile in tiles_of(size, 64):
        inside = np.zeros((tile.rows.stop - tile.rows.start, tile.columns.stop - tile.columns.start), int)
        inside[tile.core] = 1
        seen[tile.rows, tile.columns] += inside
    assert (seen == 1).all()


def test_an_image_that_fits_is_scored_as_it_is():
    images = noise(2, 1, 60, 64)
    scores, maps = by_tiles(local, images, None, 64)
    assert torch.equal(scores, local(images)[0]) and torch.equal(maps, local(images)[1])


@pytest.mark.parametrize("size", [(100, 200), (64, 301), (40, 150)])
def test_the_blended_map_is_the_whole_one_away_from_edges(size):
    """Beyond the reach of the filter nothing differs but the rounding of a weighted mean; nearer, zeros were seen."""
    images = noise(2, 3, *size)
    whole, (_, tiled) = local(images)[1], by_tiles(local, images, None, 64)
    near = near_an_edge(size, 64, REACH)
    assert near.any() and not near.all()
    torch.testing.assert_close(tiled[..., ~near], whole[..., ~near], rtol=1e-6, atol=1e-7)
    assert not torch.allclose(tiled[..., near], whole[..., near], rtol=1e-6)


def test_the_score_is_that_of_the_whole_image():
    """Its maximum, of places that one tile each answers for: no core comes near an edge, so equality is exact."""
    images = noise(3, 1, 150, 222)
    assert torch.equal(by_tiles(local, images, None, 64)[0], local(images)[0])
    dark = -images  # zeros beyond the edges are now higher than everything: only the image's own edges may count
    assert torch.equal(by_tiles(local, dark, None, 64)[0], local(dark)[0])


def test_a_region_of_interest_reaches_the_tiles():
    images, roi = noise(2, 1, 150, 150), torch.zeros(2, 1, 150, 150, dtype=torch.bool)
    roi[0, 0, 100:120, 30:50] = True
    scores, _ = by_tiles(local, images, roi, 64)
    assert scores[0] == local(images)[1][0, 0, 100:120, 30:50].max() and scores[1] == -torch.inf


def test_some_tiles_at_once_whatever_the_size():
    seen = []

    def score(images, roi):
        seen.append(tuple(images.shape))
        return local(images, roi)

    by_tiles(score, noise(1, 1, 1024, 1024), None, 64)
    assert max(n for n, *_ in seen) == TILE_BATCH and {shape[1:] for shape in seen} == {(1, 64, 64)}
    assert sum(n for n, *_ in seen) == len(tiles_of((1024, 1024), 64))


def test_the_same_network_in_tiles_and_as_a_whole():
    """PatchCore with Lite0 at one scale: tiles of 192 and the whole of 384 agree where no edge is in view.

    What lies 80 pixels away adds next to nothing to a feature; nearer, the difference is small but there.
    """
    model = create_model("patchcore", "lite", input_size=192, bank_size=200)
    data = load_data("synthetic:train=24,good=1,defect=1,size=384")
    module = AnomalyDataModule(data, input_size=(192, 192), batch_size=8, view=View(tile=192))
    model.num_train_images = module.num_train_images
    assert module.num_train_images == 4 * module.num_images
    with torch.inference_mode():
        for batch in module.train_dataloader():
            model.observe(batch)
        model.finish()
        images = torch.cat([part.image for groups in module.test_dataloader() for part in groups])
        model.eval().view = View(tile=192)
        tiled = model.score_images(images)
        model.view, model.size = View(), (384, 384)
        whole = model.score_images(images)
    error = (tiled.map - whole.map).abs()[:, 0] / whole.map.std()
    near = near_an_edge((384, 384), 192, 80)
    assert (~near).sum() >= 4 * 16**2 and error[:, ~near].max() < 1e-3
    assert 1e-2 < error[:, near].mean() < 0.5
    torch.testing.assert_close(tiled.image, whole.image, rtol=0.05, atol=0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Folder of 24 + 4 normals and 4 defects, 150 x 200, whose defect is small against the image."""
    root = tmp_path_factory.mktemp("data") / "wide"
    rng = np.random.default_rng(0)
    stripes = np.tile(np.where(np.arange(200) % 16 < 8, 150, 70), (150, 1))
    for folder, count in (("train/good", 24), ("test/good", 4), ("test/square", 4)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            image = stripes + rng.normal(0, 6, stripes.shape)
            if folder == "test/square":
                image[60:76, 90:106] = rng.normal(220, 25, (16, 16))
            Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / folder / f"{i}.png")
    mask = np.zeros((150, 200), np.uint8)
    mask[60:76, 90:106] = 255
    (root / "ground_truth/square").mkdir(parents=True)
    for i in range(4):
        Image.fromarray(mask).save(root / f"ground_truth/square/{i}_mask.png")
    return root


@pytest.fixture(scope="module")
def fitted(wide, tmp_path_factory):
    said = []
    home = tmp_path_factory.mktemp("home")
    model, record = fit(
        "padim", str(wide), "m", **TINY, data_options={"tile": 64}, run=RunOptions(say=said.append), home=home
    )
    return model, record, said, home


def test_a_fit_learns_from_tiles(fitted, wide):
    model, record, said, _ = fitted
    assert record["train_data"]["images"] == 12 and record["train_data"]["held_out"] == 12
    assert record["train_data"]["tiles"] == 12 * 3 * 4 and "in 144 tiles" in " ".join(said)
    found = evaluate(model, str(wide))
    assert found["tile"] == 64 and found["eval_size"] == "native"
    assert found["metrics"]["image_auroc"] == 1 and found["metrics"]["pixel_auroc"] > 0.95


def test_tiles_of_a_fit_cover_each_image_once_with_its_pixels(wide):
    module = AnomalyDataModule(load_data(str(wide)), input_size=(64, 64), batch_size=5, view=View(tile=64))
    batches = list(module.train_dataloader())
    images = {row["path"]: np.asarray(Image.open(row["image"]["path"])) for row in module.train_set}
    assert sum(len(batch.name) for batch in batches) == 144 == len(module.train_dataloader().dataset)
    places = [(t.rows, t.columns) for t in tiles_of((150, 200), 64, overlap=0)]
    for batch in batches:
        assert batch.image.shape[1:] == (1, 64, 64)
        for name, image in zip(batch.name, batch.image, strict=True):
            values = (image[0] * 255).round().numpy().astype(np.uint8)
            assert any(np.array_equal(values, images[name][place]) for place in places)


def test_an_image_is_decoded_about_once_an_epoch(wide, monkeypatch):
    """Tiles are shuffled among those of some images, which are kept."""
    module = AnomalyDataModule(load_data(str(wide)), input_size=(64, 64), batch_size=6, view=View(tile=64))
    images, seen = module.train_items.images, []
    monkeypatch.setattr(type(images), "__getitem__", lambda self, i: seen.append(i) or self._item(self.dataset[i]))
    loader = module.train_dataloader()
    names = [name for batch in loader for name in batch.name]
    assert sorted(seen) == list(range(12)) and len(names) == 144
    assert len(set(names[:96])) == 8 and len(set(names[:12])) > 3  # of eight images, mixed
    loader.set_epoch(1)
    assert [name for batch in loader for name in batch.name] != names


def test_the_papers_protocol_sees_whole_images(fitted, wide):
    seen = []
    model = fitted[0]
    hook = model.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[-2:])))
    record = evaluate(model, str(wide), data_options={"resize": 224, "crop": None})
    hook.remove()
    assert set(seen) == {(224, 224)} and "tile" not in record and record["eval_size"] == [224, 224]


def test_predict_sees_tiles_as_the_fit_did_unless_told_otherwise(fitted, wide):
    model = fitted[0]
    path = str(wide / "test/square/0.png")
    own, same, whole, other = (model.predict(path, tile=tile) for tile in (None, 64, 0, 96))
    assert own.map.shape == whole.map.shape == (150, 200)
    assert own.score == same.score and np.array_equal(own.map, same.map)
    assert len({own.score, whole.score, other.score}) == 3
    peak = np.unravel_index(own.map.argmax(), own.map.shape)
    assert 56 <= peak[0] < 80 and 86 <= peak[1] < 110
    assert model.view.tile == 64 and other.verdict.endswith("(uncalibrated)")
    assert [p.score for p in model.predict([path] * 2)] == [own.score] * 2


def test_a_saved_model_remembers_its_tiles(fitted, wide):
    loaded = from_pretrained(model_place("m", fitted[3]))
    path = str(wide / "test/square/1.png")
    assert loaded.view == fitted[0].view and loaded.predict(path).score == fitted[0].predict(path).score


def test_a_rate_stated_in_tiles_holds_in_them(wide, tmp_path, zoo_home, capsys):
    """Calibrated with --tile, a model sees tiles from then on; its scores are those of `predict`."""
    fit_ = [
        "fit",
        "padim",
        "--preset",
        "lite",
        "--data",
        str(wide),
        "--name",
        "m",
        "--input-size",
        "64",
        "--dims",
        "10",
    ]
    assert main(fit_) == 0
    with_tiles = ["calibrate", "m", "--data", str(wide), "--false-alarm-rate", "0.2", "--tile", "96"]
    assert main(with_tiles) == 0
    model = from_pretrained("m")
    assert model.view.tile == 96 and len(model.calibration.scores) == 12 + 4  # held-out and tested normals
    found = model.predict(str(wide / "test/square/0.png"))
    assert found.is_anomalous and found.regions
    assert model.predict(str(wide / "test/square/0.png"), tile=0).is_anomalous is None
    scores = [model.predict(str(wide / f"test/good/{i}.png")).score for i in range(4)]
    assert set(scores) <= set(model.calibration.scores)
    record = json.loads((zoo_home / "models/m/results.json").read_text())
    assert record["calibration"]["tile"] == 96 and "tile" not in record["train_data"]


def test_images_of_mixed_sizes_and_small_ones(tmp_path, fitted):
    """A side that is shorter than a tile is taken whole."""
    for i, size in enumerate(((150, 200), (40, 130), (64, 64), (70, 30), *[(100, 100)] * 20)):
        (tmp_path / "good").mkdir(exist_ok=True)
        pixels = np.random.default_rng(i).integers(50, 200, size, dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"good/{i}.png")
    model, record = fit("padim", str(tmp_path), **TINY, data_options={"tile": 64})
    assert record["train_data"]["tiles"] > record["train_data"]["images"]
    for size in ((64, 64), (30, 70), (40, 300)):
        assert model.predict(np.zeros(size, np.uint8)).map.shape == size


def test_what_tiles_refuse(wide):
    for tile, text in ((0, "leave it out"), (8, "at least 32"), (-4, "at least 32")):
        with pytest.raises(ZooError, match=f"--tile.*{text}"):
            fit("padim", str(wide), **TINY, data_options={"tile": tile})
    with pytest.raises(ZooError, match="another preset than original"):
        View(resize=256, crop=224, tile=64)
