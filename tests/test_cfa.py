"""CFA against loops, explicit formulas and scipy."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from zoo.data import load_data
from zoo.data.datamodule import AnomalyDataModule
from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.methods import cfa
from zoo.methods.cfa import CFA, PRESETS
from zoo.module import Batch
from zoo.nn.features import architecture_only

LITE0 = "tf_efficientnet_lite0"


def images(n, size=64, seed=0):
    return torch.rand(n, 1, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    model = CFA(backbone=LITE0, input_size=64)
    with torch.no_grad():
        model.observe(Batch(images(4), list("abcd")))
        model.finish()
    return model


def squares(vectors, bank):
    """(N, P) by loops in double precision."""
    return np.array([[np.sum((v - c) ** 2) for c in bank] for v in vectors])


def test_distances_are_those_of_a_loop(model):
    vectors = torch.randn(6, model.bank.shape[1], generator=torch.Generator().manual_seed(1))
    expected = np.sort(squares(vectors.double().numpy(), model.bank.double().numpy()), 1)[:, :6]
    np.testing.assert_allclose(model.nearest(vectors, 6).detach(), expected, rtol=1e-5)
    copies = model.nearest(model.bank[:5], 3)
    assert (copies >= 0).all() and (copies[:, 0] < 1e-2).all()


@pytest.mark.parametrize("radius", [1e-5, 2.0, 30.0])
def test_losses_and_gradients_by_a_loop(model, radius):
    """K = J = 3 on the descriptors of two images; r^2 beside squared distances, divided by nu."""
    with torch.no_grad():
        model.radius.fill_(radius)
        vectors = model.describe(images(2, seed=3)).permute(0, 2, 3, 1).flatten(0, 2).double().numpy()
    bank = model.bank.double().numpy()
    pull, push, slope, slopes = [], [], 0.0, np.zeros_like(vectors)
    for i, row in enumerate(squares(vectors, bank)):
        order = np.argsort(row)
        for c in order[:3]:
            pull.append(max(row[c] - radius**2, 0))
            slope -= 2 * radius * (pull[-1] > 0)
            slopes[i] += 2 * (vectors[i] - bank[c]) * (pull[-1] > 0)
        for c in order[3:6]:
            push.append(max(radius**2 - row[c] - 0.1, 0))
            slope += 2 * radius * (push[-1] > 0)
            slopes[i] -= 2 * (vectors[i] - bank[c]) * (push[-1] > 0)
    parts, seen = {}, []
    model.total_loss = lambda **given: parts.update(given) or sum(given.values())
    model.descriptor.register_forward_hook(lambda module, args, out: out.retain_grad() or seen.append(out))
    model.training_step(Batch(images(2, seed=3), ["a", "b"]), 0).backward()
    scale = 1 / 1e-3 / len(pull)
    assert float(parts["attraction"].detach()) == pytest.approx(sum(pull) * scale, rel=1e-4, abs=1e-3)
    assert float(parts["repulsion"].detach()) == pytest.approx(sum(push) * scale, rel=1e-4, abs=1e-3)
    assert float(model.radius.grad) == pytest.approx(slope * scale, rel=1e-3, abs=1e-6)
    found = seen[0].grad.permute(0, 2, 3, 1).flatten(0, 2)  # (B h w, D)
    np.testing.assert_allclose(found, slopes * scale, rtol=1e-3, atol=1e-4 * np.abs(slopes * scale).max())
    assert model.bank.grad is None and not model.bank.requires_grad


def test_distances_stay_in_float32_under_autocast(model):
    vectors = torch.randn(6, model.bank.shape[1], generator=torch.Generator().manual_seed(1))
    expected = model.nearest(vectors, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.nearest(vectors, 3), expected)


@torch.no_grad()
def test_scores_by_a_loop_and_the_map_by_scipy(model, monkeypatch):
    monkeypatch.setattr(cfa, "ROWS", 100)  # an image has 256 positions
    batch = images(2, seed=5)
    maps = model.describe(batch)
    grid = []
    for vectors in maps.flatten(2).mT.double().numpy():
        for row in np.sort(squares(vectors, model.bank.double().numpy()), 1)[:, :3]:
            d = np.sqrt(row)
            weights = np.exp(-(d - d[0]))
            grid.append(weights[0] / weights.sum() * d[0])
    grid = torch.tensor(grid).view(2, 1, *maps.shape[-2:])
    rough = F.interpolate(grid, (64, 64), mode="bilinear", align_corners=False)[:, 0].numpy()
    expected = np.stack([gaussian_filter(m, 4) for m in rough])
    scores = model.eval()(batch)
    np.testing.assert_allclose(scores.map[:, 0], expected, rtol=1e-3, atol=1e-4 * expected.max())
    np.testing.assert_allclose(scores.image, expected.max((1, 2)), rtol=1e-3)


@torch.no_grad()
def test_the_bank_is_the_mean_of_the_untrained_descriptor_and_halves_merge():
    whole, one, other = (CFA(backbone=LITE0, input_size=64) for _ in range(3))
    batch = images(5)
    expected = torch.stack([whole.describe(batch[i : i + 1])[0] for i in range(5)]).double().mean(0).flatten(1).T
    for model, part in ((whole, batch), (one, batch[:2]), (other, batch[2:])):
        model.observe(Batch(part, ["x"] * len(part)))
    one.merge_fit_state(other.fit_state())
    for model in (whole, one):
        assert not model.is_fitted
        model.finish()
        torch.testing.assert_close(model.bank.double(), expected, rtol=1e-4, atol=1e-4)
    assert whole.is_fitted and whole.bank.shape == (16 * 16, 24 + 40 + 112)


@torch.no_grad()
def test_descriptor_sees_pooled_layers_and_coordinates():
    model = CFA(backbone=LITE0, input_size=[64, 96])
    seen = []
    model.descriptor.register_forward_pre_hook(lambda module, args: seen.extend(args[0]))
    batch = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
    described = model.describe(batch)
    *levels, place = seen
    assert [tuple(level.shape) for level in levels] == [(1, 24, 16, 24), (1, 40, 8, 12), (1, 112, 4, 6)]
    rows, columns = place[0]
    np.testing.assert_allclose(rows[:, 0], 2 * np.arange(16) / 15 - 1, atol=1e-6)
    np.testing.assert_allclose(columns[3], 2 * np.arange(24) / 23 - 1, atol=1e-6)
    first = model.features(model.prepare(batch))[0][0].numpy()
    padded = np.pad(first, ((0, 0), (1, 1), (1, 1)))
    pooled = sum(padded[:, y : y + 16, x : x + 24] for y in range(3) for x in range(3)) / 9  # padding counts
    np.testing.assert_allclose(levels[0][0], pooled, rtol=1e-4, atol=1e-4)
    joined = torch.cat([F.interpolate(level, (16, 24), mode="bilinear") for level in levels] + [place], 1)
    expected = F.conv2d(joined, model.descriptor.weight, model.descriptor.bias)  # as the paper has it: joined, then 1x1
    torch.testing.assert_close(described, expected, rtol=1e-4, atol=1e-4)


def test_wide_resnet_has_3_2_million_parameters_to_learn():
    with architecture_only():
        model = CFA()
    assert sum(p.numel() for p in model.learned_parameters()) == 1794 * 1792 + 1792 + 1
    assert model.bank.shape == (0, 1792)


def test_narrower_descriptor():
    model = CFA(backbone=LITE0, input_size=64, gamma_d=4)
    assert sum(p.numel() for p in model.learned_parameters()) == 178 * 44 + 44 + 1
    assert model.describe(images(1)).shape == (1, 44, 16, 16) and model.bank.shape == (0, 44)


def test_bank_of_too_few_positions():
    model = CFA(backbone=LITE0, input_size=32, layers=[4])  # stride 32: one position
    with pytest.raises(ZooError, match="want 6 bank vectors; this input size gives 1"):
        model.observe(Batch(images(1, 32), ["a"]))


def test_both_parts_of_the_loss_fall(model):
    """On one batch, from a radius that makes both of them positive."""
    batch, parts = Batch(images(4), list("abcd")), {}
    model.total_loss = lambda **given: parts.update(given) or sum(given.values())
    with torch.no_grad():
        vectors = model.describe(batch.image).permute(0, 2, 3, 1).flatten(0, 2)
        model.radius.copy_(model.nearest(vectors, 6)[:, 2].median().sqrt())
        model.training_step(batch, 0)
    before, optimizer = {name: float(part) for name, part in parts.items()}, model.configure_optimizers()
    for _ in range(20):
        optimizer.zero_grad()
        model.training_step(batch, 0).backward()
        optimizer.step()
    print(before, {name: float(part.detach()) for name, part in parts.items()})
    assert before.keys() == {"attraction", "repulsion"} and min(before.values()) > 1
    assert all(float(parts[name].detach()) < 0.8 * before[name] for name in parts)


def test_optimiser_holds_the_descriptor_and_the_radius(model):
    optimizer = model.configure_optimizers()
    (group,) = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW) and group["amsgrad"]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 5e-4)
    expected = {id(model.radius), *(id(p) for p in model.descriptor.parameters())}
    assert {id(p) for p in group["params"]} == expected


def test_training_moves_descriptor_and_radius_but_neither_bank_nor_features():
    data = AnomalyDataModule(load_data("synthetic:train=40,size=64"), input_size=(64, 64), batch_size=10)
    model = CFA(backbone=LITE0, input_size=64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = CFA(backbone=LITE0, input_size=64)
    with torch.no_grad():
        for batch in data.train_dataloader():
            expected.observe(batch)
        expected.finish()
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    L.Trainer(accelerator="cpu", max_epochs=2, **quiet).fit(model, datamodule=data)
    torch.testing.assert_close(model.bank, expected.bank)  # of the untrained descriptor, two epochs later
    for name, value in model.state_dict().items():
        if name != "bank":
            assert torch.equal(value, before[name]) == name.startswith("features."), name
    assert float(model.radius.detach()) > 1e-5
    assert not any(m.training for m in model.train().features.modules())


def test_presets():
    original, paper = PRESETS["original"], PRESETS["paper224"]
    assert original["data"] == {"resize": 256, "crop": 224, "batch_size": 4}
    assert original["trainer"] == paper["trainer"] == {"max_epochs": 30} and paper["data"] == {"batch_size": 4}
    assert PRESETS["mvtec_steps"]["trainer"]["max_steps"] == 30 * 60  # 240 images, batches of 4


@pytest.mark.parametrize("wrong", [{"lr": 0.0}, {"gamma_d": 0}, {"attracted": 0}, {"alpha": -1.0}, {"gamma_d": 1000}])
def test_mistakes_get_a_sentence(wrong):
    with pytest.raises(ZooError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        CFA(backbone=LITE0, **wrong)


def test_trained_beats_untrained(mvtec):
    """Untrained, its pixel AUROC can be high already; so average precision and the image score are asked."""
    figures = []
    for steps in (1, 60):
        options = dict(arguments={"input_size": 64, "lr": 3e-3}, trainer_options={"max_steps": steps})
        model, record = fit("cfa", str(mvtec), preset="lite", **options)
        figures.append(evaluate(model, str(mvtec), record)["metrics"])
    print([(f["image_auroc"], f["pixel_ap"], f["pixel_auroc"]) for f in figures])
    first, last = record["training"]["losses"][0], record["training"]["losses"][-1]
    assert last["loss_attraction"] < 0.5 * first["loss_attraction"]
    assert figures[1]["image_auroc"] > 0.9 and figures[1]["pixel_ap"] > figures[0]["pixel_ap"] + 0.05
