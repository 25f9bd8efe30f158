"""What every registered method promises; a new method is tested by being registered."""

import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from sklearn.metrics import roc_auc_score

from zoo.cli import main
from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained, model_place
from zoo.methods import create_model, list_methods, method_class, signature
from zoo.module import AnomalyModule, Batch
from zoo.nn.fast import fast_mode
from zoo.tiles import tiles_of

SIZE = 96
# Beside preset lite and input_size, to be quick.
SMALL = {
    "fanogan": {"input_size": 64, "width": 4, "critic_steps": 1, "gan_lr": 2e-3, "gan_share": 0.4, "encoder_lr": 4e-4},
    "ganomaly": {"input_size": 32, "lr": 5e-4, "latent_weight": 50.0},
    "iad_inpainting": {"input_size": 64, "width": 8},
    "padim": {"dims": 40},
    "patchcore": {"bank_size": 300},
}
# Enough to learn stripes.
STEPS = {
    "cfa": 60,
    "fanogan": 250,
    "fastflow": 40,
    "ganomaly": 150,
    "iad_inpainting": 100,
    "rd4ad": 70,
    "riad": 80,
    "stfpm": 60,
    "supersimplenet": 200,
}
METHODS = pytest.mark.parametrize("method", list_methods())


def small(method):
    return {"input_size": SIZE} | SMALL.get(method, {})


def steps(method):
    return {"max_steps": STEPS[method]} if method in STEPS else {}


@pytest.fixture(scope="module")
def fitted(mvtec):
    """method -> (model, record), each fitted once."""
    return {m: fit(m, str(mvtec), preset="lite", arguments=small(m), trainer_options=steps(m)) for m in list_methods()}


def images(n, channels=1, height=80, width=112, seed=0):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


@METHODS
def test_signature_is_the_configuration(method):
    cls = method_class(method)
    real = inspect.signature(cls.__init__).parameters
    assert {n for n in real if n != "self"} == signature(method).keys()
    for name, option in signature(method).items():
        assert real[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert real[name].default == option.default and real[name].annotation == option.type
        assert option.help.endswith(".") and json.dumps(option.default)
    assert issubclass(cls, AnomalyModule) and cls.method == method
    assert {"seed", "input_size"} <= signature(method).keys()
    presets = importlib.import_module(f"zoo.methods.{method}").PRESETS
    assert {"original", "paper224", "lite"} <= presets.keys()
    for sections in presets.values():
        assert sections.keys() <= {"model", "data", "trainer"}
        assert sections.get("model", {}).keys() <= signature(method).keys()


@METHODS
def test_header_and_readme(method):
    header = importlib.import_module(f"zoo.methods.{method}").__doc__
    assert 6 <= len(header.strip().splitlines()) <= 14
    assert "arXiv" in header and "Deviations" in header
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert f"| `{method.replace('_', '-')}` |" in readme


@METHODS
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(80, 112), (97, 61), (SIZE, SIZE)])
def test_shapes(fitted, method, channels, size):
    model, _ = fitted[method]
    with torch.inference_mode():
        scores = model(images(2, channels, *size))
    assert scores.image.shape == (2,) and scores.map.shape == (2, 1, *size)
    assert scores.image.dtype == scores.map.dtype == torch.float32
    assert scores.map.isfinite().all() and scores.image.isfinite().all()


@METHODS
def test_scores_are_float32_under_mixed_precision(fitted, method):
    model, _ = fitted[method]
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        scores = model(images(2))
    assert scores.image.dtype == scores.map.dtype == torch.float32
    assert scores.map.unique().numel() > 1000  # not rounded to the 256 steps of bfloat16


@METHODS
def test_grey_equals_its_rgb_copy(fitted, method):
    model, _ = fitted[method]
    grey = images(1)
    with torch.inference_mode():
        a, b = model(grey), model(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(a.map, b.map, rtol=1e-4, atol=1e-4)


@METHODS
def test_score_is_independent_of_its_batch(fitted, method):
    model, _ = fitted[method]
    batch = images(5)
    with torch.inference_mode():
        together = model(batch)
        for i in range(5):
            alone = model(batch[i : i + 1])
            torch.testing.assert_close(together.image[i : i + 1], alone.image, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(together.map[i : i + 1], alone.map, rtol=1e-3, atol=1e-4)


@METHODS
def test_fit_is_a_function_of_the_seed(method, mvtec):
    few = {"max_steps": 8} if method in STEPS else {}
    models = []
    for state in (1, 123):  # the global one must not matter
        torch.manual_seed(state)
        models.append(fit(method, str(mvtec), preset="lite", arguments=small(method), trainer_options=few)[0])
    first, again = models
    with torch.inference_mode():
        assert torch.equal(first(images(2)).map, again(images(2)).map)
    assert first.calibration == again.calibration


@METHODS
def test_saved_model_gives_equal_bits(fitted, method, tmp_path):
    model, record = fitted[method]
    folder = model.save_pretrained(tmp_path / "model", record)
    loaded, batch = from_pretrained(folder), images(3)
    with torch.inference_mode():
        a, b = model(batch), loaded(batch)
    assert torch.equal(a.image, b.image) and torch.equal(a.map, b.map)
    assert loaded.hparams == model.hparams and loaded.calibration == model.calibration
    assert loaded.private_state().keys() == model.private_state().keys()
    published = b"".join(p.read_bytes() for p in folder.iterdir() if p.is_file())
    assert b"train/good" not in published and str(tmp_path).encode() not in published


def test_saved_models_give_equal_bits_in_a_new_process(fitted, tmp_path):
    """One process for all: its start takes longer than what it does."""
    batch = images(2)
    torch.save(batch, tmp_path / "in.pt")
    for method, (model, _) in fitted.items():
        model.save_pretrained(tmp_path / method)
    code = (
        "import sys, torch, zoo\n"
        "batch, scores = torch.load('in.pt', weights_only=True), {}\n"
        "for name in sys.argv[1:]:\n"
        "    model = zoo.from_pretrained(name)\n"
        "    with torch.inference_mode(): scores[name] = tuple(model(batch))\n"
        "torch.save(scores, 'out.pt')"
    )
    places = [f"./{method}" for method in fitted]
    subprocess.run([sys.executable, "-c", code, *places], check=True, cwd=tmp_path)
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for method, (model, _) in fitted.items():
        with torch.inference_mode():
            scores = model(batch)
        image, map = found[f"./{method}"]
        assert torch.equal(image, scores.image) and torch.equal(map, scores.map), method


@METHODS
def test_learns_to_rank_a_planted_defect(fitted, method, mvtec):
    model, record = fitted[method]
    record = evaluate(model, str(mvtec), record)
    labels, scores = zip(*((label, score) for _, label, score in model.scored), strict=True)
    assert record["metrics"]["image_auroc"] == pytest.approx(roc_auc_score(labels, scores), abs=1e-6)
    assert record["metrics"]["image_auroc"] > 0.9 and record["metrics"]["pixel_auroc"] > 0.9


@METHODS
def test_frozen_parts_stay_frozen(fitted, method):
    fresh = create_model(method, "lite", **small(method))
    model, _ = fitted[method]
    if not hasattr(model, "features"):
        pytest.skip("no frozen part")
    for (name, a), (_, b) in zip(fresh.features.state_dict().items(), model.features.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    model.train()
    assert not any(m.training for m in model.features.modules())
    assert not any(p.requires_grad for p in model.features.parameters())
    model.eval()


@METHODS
def test_state_of_a_fit_is_flat_in_the_number_of_images(method):
    sizes = []
    for count in (24, 72):
        model = create_model(method, "lite", **small(method))
        if not hasattr(model, "observe"):
            pytest.skip("learns by gradient alone")
        model.eval().num_train_images = count
        for i in range(0, count, 8):
            model.observe(Batch(images(8, seed=i), [f"{i + j}.png" for j in range(8)]))
        sizes.append(tensor_bytes(model.fit_state()))
    assert sizes[1] <= sizes[0] + 64 * 1024


def tensor_bytes(value):
    if isinstance(value, torch.Tensor):
        return value.untyped_storage().nbytes()
    if isinstance(value, dict):
        value = value.values()
    return sum(map(tensor_bytes, value)) if isinstance(value, list | tuple | type({}.values())) else 0


@METHODS
def test_lightning_checkpoint_resumes(fitted, method, mvtec, tmp_path):
    """A plain Trainer with its own checkpoint callback; the file loads without pickle."""
    model = create_model(method, "lite", **small(method))
    data = AnomalyDataModule(load_data(str(mvtec)), input_size=model.size, seed=model.hparams.seed, batch_size=4)
    options = dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer = L.Trainer(**options, enable_model_summary=False)
    trainer.fit(model, datamodule=data)
    path = tmp_path / "last.ckpt"
    trainer.save_checkpoint(path)
    loaded = method_class(method).load_from_checkpoint(path, weights_only=True).eval()
    with torch.inference_mode():
        assert torch.equal(loaded(images(2)).map, model.eval()(images(2)).map)


@METHODS
def test_fits_with_validation_in_a_plain_trainer(method, mvtec):
    """Sanity check, twice within the epoch and at its end: there is something to measure once the pass is over."""
    model = create_model(method, "lite", **small(method))
    data = AnomalyDataModule(load_data(str(mvtec)), input_size=model.size, batch_size=4)
    options = dict(accelerator="cpu", max_epochs=1, logger=False, enable_progress_bar=False)
    trainer = L.Trainer(**options, enable_checkpointing=False, val_check_interval=0.5)
    trainer.fit(model, data.train_dataloader(), data.test_dataloader())
    assert len(model.scored) == 12
    measured, scores = float(trainer.callback_metrics["image_auroc"]), [score for *_, score in model.scored]
    assert measured == pytest.approx(roc_auc_score([label for _, label, _ in model.scored], scores))
    assert measured > 0.9 or method in STEPS  # one epoch teaches a gradient nothing


@METHODS
def test_trains_evaluates_saves_loads_and_predicts_from_the_command_line(method, mvtec, tmp_path):
    options = [f"--{name.replace('_', '-')}={json.dumps(value)}" for name, value in small(method).items()]
    options += ["--max-steps=4"] * (method in STEPS)
    assert main(["fit", method, "--preset", "lite", "--data", str(mvtec), "--name", "cli", *options]) == 0
    assert main(["evaluate", "cli", "--data", str(mvtec)]) == 0
    image = next((mvtec / "test/square").iterdir())
    assert main(["predict", "cli", str(image), "--out", str(tmp_path)]) == 0
    (found,) = json.loads((tmp_path / "predictions.json").read_text())["images"]
    expected = from_pretrained("cli").predict(image)
    assert found["score"] == pytest.approx(expected.score, rel=1e-5) and expected.map.shape == (96, 96)
    assert (tmp_path / "heatmaps" / f"{image.stem}.png").is_file()
    assert "image_auroc" in json.loads((model_place("cli") / "results.json").read_text())["metrics"]


@METHODS
def test_what_is_not_fitted_says_so(method, mvtec):
    model = create_model(method, "lite", **small(method))
    if not hasattr(model, "observe"):
        pytest.skip("scores from the start")
    data = AnomalyDataModule(load_data(str(mvtec)), input_size=model.size)
    with pytest.raises(ZooError, match="fit it first"):
        model.predict(images(1)[0])
    with pytest.raises(ZooError, match="fit it first"):
        L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).test(model, datamodule=data)


@METHODS
def test_region_of_interest_limits_the_image_score(fitted, method):
    model, _ = fitted[method]
    batch = images(2)
    batch[..., 20:60, 70:100] = 1.0  # the hot spot lies on the right
    left = torch.zeros(2, 1, 80, 112, dtype=torch.bool)
    left[..., :40] = True
    with torch.inference_mode():
        whole, part = model(batch), model(batch, left)
        everything = model(batch, torch.ones_like(left))
    assert torch.equal(whole.image, everything.image)
    assert (part.image <= whole.image).all() and (part.image < whole.image).any()


@METHODS
def test_any_method_sees_large_images_in_tiles(fitted, method):
    """Of what fits into a tile nothing changes; else the score is the highest of the tiles' cores."""
    model, _ = fitted[method]
    large, fits = images(2, height=150, width=130), images(1, height=64, width=64)
    with torch.inference_mode(), model.seen_in_tiles(64):
        scores = model.score_images(large)
        again = model.score_images(large[1:])
        assert torch.equal(model.score_images(fits).map, model(fits).map)
        best = []
        for tile in tiles_of((150, 130), 64):
            core = torch.zeros(2, 1, 64, 64, dtype=torch.bool)
            core[:, :, *tile.core] = True
            best.append(model(large[..., tile.rows, tile.columns], core).image)
    assert scores.map.shape == (2, 1, 150, 130) and scores.map.isfinite().all()
    torch.testing.assert_close(scores.image, torch.stack(best).amax(0), rtol=1e-3, atol=1e-4)
    assert torch.equal(scores.image[1:], again.image) and torch.equal(scores.map[1:], again.map)


def test_two_fits_of_one_name_leave_one_model(mvtec):
    for seed in (0, 1):
        fit("padim", str(mvtec), "twice", "lite", small("padim") | {"seed": seed})
    assert from_pretrained("twice").hparams.seed == 1
    assert [p.name for p in model_place("twice").parent.iterdir()] == ["twice"]


@METHODS
def test_the_fast_mode_scores_as_float32_does(fitted, method):
    """Up to what bfloat16 rounds; what that does to figures is measured in tests/bench/fast.py."""
    model, batch = fitted[method][0].eval(), images(4)
    with torch.inference_mode():
        exact = model.score_images(batch)
        with fast_mode(model.device):
            fast = model.score_images(batch)
            single = model.score_images(batch[2:3])
        again = model.score_images(batch)
    assert fast.image.dtype == fast.map.dtype == torch.float32
    for found, wanted in zip(fast, exact, strict=True):
        assert found.isfinite().all() and not found.equal(wanted)
        spread = wanted.max() - wanted.min() + wanted.abs().max()
        assert (found - wanted).abs().max() <= 0.1 * spread
    assert single.image.item() == pytest.approx(fast.image[2].item(), rel=0.02, abs=1e-4)  # independent of its batch
    assert again.image.equal(exact.image) and again.map.equal(exact.map)  # and nothing of the mode stays
