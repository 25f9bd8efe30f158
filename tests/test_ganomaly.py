"""GANomaly against counts, binary cross-entropy and distances by an independent formula."""

import copy

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.methods import create_model
from zoo.methods.ganomaly import PRESETS, GANomaly
from zoo.nn.dcgan import adversarial_loss, start
from zoo.nn.seed import seeded

DATA = "synthetic:train=60,good=9,defect=14,size=64"


def build(**arguments):
    return GANomaly(**({"input_size": 64, "width": 8, "latent": 5} | arguments))


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def count(module):
    return sum(p.numel() for p in module.parameters())


def train(model, *callbacks, epochs=1, **options):
    data = AnomalyDataModule(load_data(DATA), input_size=model.size, batch_size=10)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, datamodule=data, **options)
    return trainer


@pytest.mark.parametrize(
    ("size", "encoder", "discriminator"), [(256, 48.0e6, 44.7e6), (64, 3.6e6, 2.8e6)], ids=["256", "64"]
)
def test_parameters_of_the_original(size, encoder, discriminator):
    """As published for three channels; exactly: 16 weights a pair of channels, 2 a channel with BatchNorm."""
    with torch.device("meta"):
        model = GANomaly(input_size=size, channels=3)
    widths = [3, *(64 * 2**i for i in range(size.bit_length() - 3))]
    trunk = sum(16 * a * b for a, b in zip(widths, widths[1:], strict=False)) + 2 * sum(widths[2:])
    assert count(model.discriminator) == trunk + 16 * widths[-1] == pytest.approx(discriminator, rel=0.02)
    assert count(model.generator.encoder1) == count(model.generator.encoder2) == trunk + 1600 * widths[-1]
    assert count(model.generator.decoder) == trunk + 1600 * widths[-1] + 2 * 64 + 2 * widths[-1] - 2 * widths[-1]
    assert count(model.generator.decoder) == pytest.approx(encoder, rel=0.02)


def test_layers_are_dcgans():
    model = build(input_size=128)
    maps = [m for m in model.discriminator.maps.modules() if isinstance(m, nn.Conv2d)]
    assert [m.out_channels for m in maps] == [8, 16, 32, 64, 128]  # 64, 32, 16, 8 and 4 positions a side
    assert all((m.kernel_size, m.stride, m.padding, m.bias) == ((4, 4), (2, 2), (1, 1), None) for m in maps)
    assert not any(
        isinstance(m, nn.BatchNorm2d) for m in model.discriminator.maps[0]
    )  # none after the first convolution
    ups = [m for m in model.generator.decoder.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert [m.out_channels for m in ups] == [128, 64, 32, 16, 8, 1] and isinstance(
        model.generator.decoder.last[-1], nn.Tanh
    )
    x = random(2, 1, 128, 128)
    assert model.discriminator.maps(x).shape == (2, 128, 4, 4)
    rebuilt, code, again = model.generator(x)
    assert rebuilt.shape == x.shape and code.shape == again.shape == (2, 5, 1, 1)
    assert rebuilt.abs().max() <= 1


def test_first_weights():
    model = build(width=64)
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d) and module.weight.numel() > 10_000:
            assert float(module.weight.std()) == pytest.approx(0.02, rel=0.05)
        if isinstance(module, nn.BatchNorm2d):
            assert float(module.weight.mean()) == pytest.approx(1, abs=0.02) and module.weight.std() > 0
            assert not module.bias.any()
    same, other = build(width=64), build(width=64, seed=1)
    for a, b, c in zip(model.parameters(), same.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b) and (not torch.equal(a, c) or not a.any())


def test_generators_loss_by_its_formula():
    model = build(adversarial_weight=2.0).eval()
    parts = {}
    model.total_loss = lambda **given: parts.update(given) or sum(given.values())
    x = 2 * random(3, 1, 64, 64) - 1
    rebuilt, code, again = model.generator(x)
    model.generator_loss(x, rebuilt, code, again)
    a, b = (model.discriminator.maps(v).detach().double().numpy() for v in (x, rebuilt))
    assert float(parts["adversarial"].detach()) == pytest.approx(2 * np.mean((a - b) ** 2), rel=1e-5)
    pixels = np.abs(x.double().numpy() - rebuilt.detach().double().numpy())
    assert float(parts["contextual"].detach()) == pytest.approx(50 * pixels.mean(), rel=1e-5)
    codes = (code - again).detach().double().numpy()
    assert float(parts["latent"].detach()) == pytest.approx(np.mean(codes**2), rel=1e-5)


def test_discriminators_loss_is_half_of_both_cross_entropies():
    logits = 4 * random(2, 5, 1, 1, 1) - 2
    real, fake = torch.sigmoid(logits)
    cross = F.binary_cross_entropy
    expected = 0.5 * (cross(real, torch.ones_like(real)) + cross(fake, torch.zeros_like(fake)))
    torch.testing.assert_close(adversarial_loss(*logits), expected)


def test_one_step_is_one_of_each_adam():
    """Against both networks trained by hand: the discriminator judges what was rebuilt before the generator's step."""
    model = build()
    hand = copy.deepcopy(model).train()
    hand.trainer = None
    seen = []

    class First(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append(batch.image.clone())

        def on_train_batch_end(self, trainer, module, *_):
            assert module.steps_taken == 1 and trainer.global_step == 2
            trainer.should_stop = True

    train(model, First())
    adams = [
        torch.optim.Adam(part.parameters(), 2e-4, betas=(0.5, 0.999)) for part in (hand.generator, hand.discriminator)
    ]
    x = 2 * seen[0] - 1
    rebuilt, code, again = hand.generator(x)
    features = (hand.discriminator.maps(rebuilt) - hand.discriminator.maps(x)).square().mean()
    (features + 50 * (x - rebuilt).abs().mean() + (code - again).square().mean()).backward()
    adams[0].step()
    hand.discriminator.zero_grad()
    real, fake = hand.discriminator(x), hand.discriminator(rebuilt.detach())
    bce = F.binary_cross_entropy_with_logits
    ((bce(real, torch.ones_like(real)) + bce(fake, torch.zeros_like(fake))) / 2).backward()
    adams[1].step()
    for (name, a), b in zip(model.named_parameters(), hand.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6, msg=name)


def test_a_discriminator_that_has_won_starts_anew(monkeypatch):
    """With weights drawn from the seed and the step, after each step that is looked at and counts as collapsed."""
    monkeypatch.setattr("zoo.methods.ganomaly.COLLAPSED", 1e9)
    monkeypatch.setattr("zoo.methods.ganomaly.LOOK", 3)
    model = build()
    train(model)  # 4 steps
    expected = build().discriminator
    with seeded(0, 1 + 3):
        expected.apply(start)
    for (name, a), b in zip(model.discriminator.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_discriminator_in_the_race_is_left_alone(monkeypatch):
    monkeypatch.setattr("zoo.methods.ganomaly.start", None)  # to call it would fail
    model = build()
    train(model)


def test_score_is_the_distance_of_the_codes_and_the_map_that_of_the_pixels():
    model = build(channels=3).eval()
    images = random(2, 3, 80, 48)
    with torch.no_grad():
        scores = model(images)
        x = model.prepare(images)
        rebuilt, code, again = model.generator(x)
    assert x.min() >= -1 and x.max() <= 1 and x.shape == (2, 3, 64, 64)
    expected = np.mean((code.double().numpy() - again.double().numpy()) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(scores.image.numpy(), expected, rtol=1e-4)
    error = (x - rebuilt).abs().mean(1, keepdim=True)
    torch.testing.assert_close(
        scores.map, F.interpolate(error, (80, 48), mode="bilinear", align_corners=False), rtol=1e-5, atol=1e-6
    )


def test_images_are_seen_from_minus_1_to_1_with_one_channel():
    model = build()
    assert model.channels == 1 and model.config()["preprocessing"]["channels"] == 1
    assert torch.equal(model.prepare(torch.zeros(1, 1, 64, 64)), torch.full((1, 1, 64, 64), -1.0))
    assert torch.equal(model.prepare(torch.ones(1, 3, 64, 64)), torch.ones(1, 1, 64, 64))


def test_tests_use_running_statistics():
    """An image's score doesn't depend on its batch, and scoring changes nothing."""
    model = build().eval()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    batch = random(4, 1, 64, 64)
    with torch.no_grad():
        together, alone = model(batch).image, torch.cat([model(image[None]).image for image in batch])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"input_size": 224}, "--input-size is a power of two .64, 128, 256., not 224"),
        ({"input_size": [64, 128]}, "--input-size is a power of two"),
        ({"contextual_weight": -1.0}, "--contextual-weight"),
        ({"lr": 0.0}, "--lr"),
        ({"beta1": 1.0}, "--beta1"),
        ({"channels": 2}, "--channels is 1"),
    ],
)
def test_mistakes_get_a_sentence(wrong, match):
    with pytest.raises(ZooError, match=match):
        GANomaly(**wrong)


def test_accumulation_is_refused():
    with pytest.raises(ZooError, match="leave --accumulate out"):
        fit("ganomaly", DATA, preset="lite", trainer_options={"max_steps": 2, "accumulate": 2})


@pytest.mark.parametrize("moment", [(0, 2), (1, 1)])
def test_resume_in_the_middle_of_an_epoch(moment, tmp_path):
    """Both networks, both optimisers and the count of steps go on."""

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if (trainer.current_epoch, index) == moment:
                trainer.save_checkpoint(tmp_path / "x.ckpt")
                raise KeyboardInterrupt

    whole, resumed = build(), build()
    train(whole, epochs=2)
    with pytest.raises(SystemExit):
        train(build(), Save(), epochs=2)
    train(resumed, epochs=2, ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    assert resumed.steps_taken == whole.steps_taken == 8
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_presets():
    signature = GANomaly.__init__.__kwdefaults__
    assert signature["input_size"] == 256 and signature["latent"] == 100 and signature["channels"] == 1
    assert (signature["lr"], signature["beta1"]) == (2e-4, 0.5)
    assert [signature[f"{part}_weight"] for part in ("adversarial", "contextual", "latent")] == [1, 50, 1]
    assert PRESETS["original"]["data"]["batch_size"] == 64 and PRESETS["original"]["trainer"]["max_epochs"] == 15


@pytest.mark.slow  # test_registry.py fits it as long, and asks it to find defects
def test_training_teaches_to_rebuild_and_finds_defects(mvtec):
    """A bright square is found untrained too, by a map that is the image itself: what counts is what is rebuilt."""
    small = {"input_size": 32, "lr": 5e-4, "latent_weight": 50.0}  # codes that learn in so few steps
    untrained = create_model("ganomaly", "lite", **small).eval()
    trained, _ = fit("ganomaly", str(mvtec), preset="lite", arguments=small, trainer_options={"max_steps": 150})
    data = AnomalyDataModule(load_data(str(mvtec)), input_size=(32, 32))
    images = next(iter(data.holdout_dataloader()))[0].image  # normal, and not seen by the fit
    with torch.no_grad():
        before, after = (model(images).map.mean() for model in (untrained, trained))
    assert after < 0.5 * before
    metrics = evaluate(trained, str(mvtec))["metrics"]
    assert metrics["image_auroc"] > 0.9 and metrics["pixel_ap"] > 0.9


def test_region_of_interest():
    """What lies outside of it is replaced by what the generator makes of it."""
    model = build().eval()
    batch = random(8, 1, 64, 64)
    roi = torch.zeros(8, 1, 64, 64, dtype=torch.bool)
    roi[..., :32] = True
    with torch.no_grad():
        whole, part, everything = model(batch), model(batch, roi), model(batch, torch.ones_like(roi))
        x = 2 * batch - 1
        mixed = torch.where(roi, x, model.generator(x)[0])
        again = model((mixed + 1) / 2)
    assert torch.equal(whole.image, everything.image) and torch.equal(whole.map, part.map)
    torch.testing.assert_close(part.image, torch.minimum(whole.image, again.image), rtol=1e-4, atol=1e-7)
    assert (part.image < whole.image).any()
