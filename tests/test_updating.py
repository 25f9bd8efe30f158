"""Statistics that images are added to and taken from equal those of a fit on the images that are left."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from zoo.calibrate import calibrate
from zoo.data import load_data
from zoo.errors import ZooError
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.image import read_image
from zoo.nn.coreset import greedy_coreset, nearest

SMALL = {"padim": {"dims": 12}, "patchcore": {"bank_size": 60}, "cfa": {}}
SIZE = 64


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """30 normal images in a folder, and 8 others."""
    root = tmp_path_factory.mktemp("images")
    rows = load_data(f"synthetic:train=38,good=1,defect=1,size={SIZE}")["train"]
    for i, row in enumerate(rows):
        place = root / ("lot/good" if i < 30 else "more")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(read_image(row["image"])).save(place / f"{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def homes(images, tmp_path_factory):
    """method -> the folder of a model of 30 images, 10 of which were held out; cfa with a trained descriptor."""
    found = {}
    for method, arguments in SMALL.items():
        home = tmp_path_factory.mktemp(method)
        training = {"max_steps": 4} if method == "cfa" else {}
        arguments = {"input_size": SIZE} | arguments
        options = {"hold_out": 10}
        fit(method, str(images / "lot"), "lot", "lite", arguments, options, training, home=home)
        found[method] = home / "models" / "lot"
    return found


METHODS = pytest.mark.parametrize("method", SMALL)
SUMS = pytest.mark.parametrize("method", ["padim", "cfa"])


def more(images):
    return sorted((images / "more").glob("*.png"))


def learned(folder):
    """Names of the images that its fit has learned from."""
    lines = (folder / "private/seen.csv").read_text().splitlines()[1:]
    return [line.split(",")[1] for line in lines if line.startswith("fit,")]


def tensor(paths):
    return torch.stack([torch.from_numpy(read_image(path) / np.float32(255))[None] for path in paths])


@torch.no_grad()
def expected(model, paths):
    """What the statistics of these images are, by a direct formula."""
    if model.method == "padim":
        x = model.embed(tensor(paths)).double().numpy()  # (P, n, d)
        eye = model.hparams.ridge * np.eye(model.dims)
        return x.mean(1), np.stack([np.cov(one, rowvar=False) + eye for one in x])
    torch.manual_seed(5)
    descriptor = type(model)(**dict(model.hparams)).descriptor  # as it was before its training
    return model.describe(tensor(paths), descriptor).double().mean(0).flatten(1).T.numpy(), None


def found(model):
    if model.method == "padim":
        return model.center.numpy(), np.linalg.inv((model.whitening.mT @ model.whitening).double().numpy())
    return model.bank.numpy(), None


def check_equal(model, paths):
    for own, reference in zip(found(model), expected(model, paths), strict=True):
        if reference is not None:
            np.testing.assert_allclose(own, reference, atol=2e-4 * np.abs(reference).max())


@SUMS
def test_sums_with_further_images_and_without_some(method, homes, images):
    model, names = from_pretrained(homes[method]), learned(homes[method])
    paths = [images / "lot" / name for name in names]
    check_equal(model, paths)
    model.update(more(images), batch_size=3)
    check_equal(model, paths + more(images))
    model.update(remove=[names[3], str(paths[7])])  # by its name in the data, which is looked up, and by its file
    rest = [path for i, path in enumerate(paths) if i not in (3, 7)] + more(images)
    check_equal(model, rest)
    assert model.stands_for == len(rest) == 26
    with pytest.raises(AssertionError):
        check_equal(model, paths)


@SUMS
def test_an_image_is_taken_out_once_and_only_if_it_was_learned(method, homes, images):
    model, name = from_pretrained(homes[method]), learned(homes[method])[0]
    model.update(remove=name)
    for wrong in (name, str(more(images)[0])):
        with pytest.raises(ZooError, match="no image that this model knows as learned from"):
            model.update(remove=wrong)
    other = learned(homes[method])[1]
    model.update(remove=[other, other, str(images / "lot" / other)])  # the same one, thrice
    assert model.stands_for == 18 and model.record["updates"][-1] == {"added": 0, "removed": 1}
    model.update(str(images / "lot" / other))  # and back again
    for twice in ([more(images)[0]] * 2, [images / "lot" / other]):
        with pytest.raises(ZooError, match="would be learned twice"):
            model.update(twice)
    assert model.stands_for == 19
    model.update()
    assert len(model.record["updates"]) == 3
    with pytest.raises(ZooError, match="no image nothing.png"):
        model.update(remove="nothing.png")
    model.folder = None
    with pytest.raises(ZooError, match="give the path of the file"):
        model.update(remove="nothing.png")


def test_a_bank_keeps_its_size_and_covers_what_is_new(homes, images):
    model = from_pretrained(homes["patchcore"])
    assert len(model.bank) == 60
    with torch.no_grad():
        new = model.embed(tensor(more(images))).permute(0, 2, 3, 1).flatten(0, 2)
    before = nearest(new, model.bank)[0].mean()
    everything = torch.cat([model.bank, new])
    model.update(more(images), batch_size=len(new))
    chosen, _ = greedy_coreset(everything, 60, seed=model.hparams.seed)
    assert torch.equal(model.bank.sort(0).values, everything[chosen].sort(0).values)
    assert nearest(new, model.bank)[0].mean() < before
    grid = SIZE // 8
    for vector, (name, row, column) in zip(model.bank, model.origin, strict=True):
        path = next(path for path in [*more(images), *(images / "lot/good").iterdir()] if str(path).endswith(name))
        with torch.no_grad():
            own = model.embed(tensor([path]))[0, :, row, column]
        torch.testing.assert_close(vector, own, atol=1e-4, rtol=1e-4)
        assert row < grid and column < grid


def test_an_image_leaves_a_bank_by_any_form_of_its_name(homes, images):
    names = {name for name, *_ in from_pretrained(homes["patchcore"]).origin}
    name = sorted(names)[0]
    for form in (name, name.rpartition("/")[2], str(images / "lot" / name)):
        model = from_pretrained(homes["patchcore"])
        kept = [vector for vector, (image, *_) in zip(model.bank, model.origin, strict=True) if image != name]
        model.update(remove=form)
        assert {image for image, *_ in model.origin} == names - {name}
        assert torch.equal(model.bank.sort(0).values, torch.stack(kept).sort(0).values)
    absent = sorted(set(learned(homes["patchcore"])) - names)  # all of its patches are near those of others
    for image in absent[:1]:
        model.update(remove=image)
    with pytest.raises(ZooError, match="no vector of an image nothing.png, only of others such as"):
        model.update(remove="nothing.png")


@METHODS
def test_what_can_not_be_learned_changes_nothing(method, homes, images, tmp_path):
    model = from_pretrained(homes[method])
    before, private = {k: v.clone() for k, v in model.state_dict().items()}, model.private_state()
    (tmp_path / "broken.png").write_bytes(b"no image")
    for arguments in (
        {"images": [more(images)[0], tmp_path / "broken.png"], "batch_size": 1},
        {"images": more(images), "names": ["one"]},
        {"images": more(images), "remove": ["nothing.png"]},
    ):
        with pytest.raises(ZooError):
            model.update(**arguments)
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
        assert model.private_state() == private and model.calibration is not None
    name = learned(homes[method])[0]
    if method == "patchcore":
        name = model.origin[0][0]
    with pytest.raises(ZooError):
        model.update([tmp_path / "broken.png"], remove=[name])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model.private_state() == private


@METHODS
def test_an_updated_model_is_kept_and_knows_its_images(method, homes, images, tmp_path):
    model = from_pretrained(homes[method])
    model.record = model.record | {"metrics": {"image_auroc": 1.0}, "test_data": model.record["train_data"]}
    model.update(more(images))
    assert model.calibration is None and "metrics" not in model.record
    assert model.record["updates"] == [{"added": 8, "removed": 0}]
    scores = [p.score for p in model.predict(more(images))]
    again = from_pretrained(model.save_pretrained(tmp_path / "again"))
    assert [p.score for p in again.predict(more(images))] == scores
    assert again.predict(more(images)[0]).verdict == "no threshold"
    assert "8 normal images were added since" in (tmp_path / "again/README.md").read_text()
    with pytest.raises(ZooError, match="8 of these normal images had a say"):
        calibrate(again, str(images / "more"), 0.3, folder=again.folder)
    again.update(remove=[str(path) for path in more(images)])  # what was added can be taken out again
    assert again.record["updates"][1] == {"added": 0, "removed": 8}


def test_tensors_arrays_and_tiles(homes, images):
    by_path, by_array, by_tensor = (from_pretrained(homes["padim"]) for _ in range(3))
    by_path.update(more(images))
    by_array.update([read_image(path) for path in more(images)], names=[f"n{i}" for i in range(8)])
    by_tensor.update(tensor(more(images)))
    assert torch.equal(by_path.whitening, by_array.whitening)
    torch.testing.assert_close(by_path.center, by_tensor.center)
    tiled = from_pretrained(homes["padim"])
    large = np.block([[read_image(path) for path in more(images)[:4]]])  # four tiles side by side
    with tiled.seen_in_tiles(SIZE):
        tiled.update([large])
    four = from_pretrained(homes["padim"])
    four.update(more(images)[:4])
    torch.testing.assert_close(tiled.center, four.center)
    assert tiled.stands_for == four.stands_for == 24


def test_methods_without_statistics_and_untrained_ones(images, tmp_path):
    from zoo.methods import create_model

    with pytest.raises(ZooError, match="learns by gradient alone"):
        create_model("stfpm", "lite", input_size=SIZE).update(more(images))
    with pytest.raises(ZooError, match="has learned nothing yet"):
        create_model("padim", "lite", input_size=SIZE, dims=5).update(more(images))


def test_it_is_known_how_many_images_a_model_is_of(homes, images, tmp_path):
    model = from_pretrained(homes["padim"])
    assert model.stands_for == 20
    shutil.copytree(homes["padim"], tmp_path / "old")  # as a model of an older zoo
    config = json.loads((tmp_path / "old/config.json").read_text())
    del config["stands_for"]
    (tmp_path / "old/config.json").write_text(json.dumps(config))
    with pytest.raises(ZooError, match="isn't recorded how many images"):
        from_pretrained(tmp_path / "old").update(more(images))
    (tmp_path / "old/config.json").write_text(json.dumps(config | {"stands_for": -1}))
    with pytest.raises(ZooError, match="stands_for, a number of images, is above 0"):
        from_pretrained(tmp_path / "old")
