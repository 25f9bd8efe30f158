"""FastFlow's parts against autograd, loops and direct formulas."""

import math

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch.autograd.functional import jacobian

from zoo.data import load_data
from zoo.data.rows import read_row
from zoo.errors import ZooError
from zoo.methods import create_model, presets
from zoo.methods.fastflow import Flow, FlowStep
from zoo.module import Batch
from zoo.nn.features import architecture_only
from zoo.nn.seed import seeded

SHAPES = [(4, 3, 2), (5, 2, 3)]  # (C, H, W), the second with halves of 3 and 2


def images(n, channels=1, height=64, width=64, seed=0):
    return torch.rand(n, channels, height, width, generator=torch.Generator().manual_seed(seed))


def stirred(module):
    """In double precision, all parameters moved, so that no scale is 1 and no offset 0."""
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.7 * torch.randn_like(parameter)
    return module


@pytest.fixture
def flow(request):
    """Of channels (the parameter), stirred."""
    with seeded(7):
        return stirred(Flow(request.param, 8, 1.0))


@pytest.fixture(scope="module")
def model():
    return create_model("fastflow", "lite", input_size=[64, 96]).eval()


def log_det_by_autograd(module, x):
    """log |det dz/dx| of one x (C, H, W)."""
    matrix = jacobian(lambda v: module(v.view(1, *x.shape))[0].flatten(), x.flatten())  # (CHW, CHW)
    return torch.linalg.slogdet(matrix)[1]


# ---- the flow ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", SHAPES)
def test_log_determinant_of_a_step(shape, kernel):
    with seeded(1):
        step, x = stirred(FlowStep(shape[0], kernel, 1.0)), torch.randn(3, *shape, dtype=torch.float64)
    expected = torch.stack([log_det_by_autograd(step, one) for one in x])
    torch.testing.assert_close(step(x)[1], expected, rtol=1e-9, atol=1e-9)
    assert len(expected.unique()) == 3  # the coupling's share depends on x


@pytest.mark.parametrize("shape", SHAPES)
def test_log_determinant_of_the_global_affine_map(shape):
    """With a silent subnet nothing else is left."""
    with seeded(2):
        step, x = stirred(FlowStep(shape[0], 3, 1.0)), torch.randn(1, *shape, dtype=torch.float64)
    for parameter in step.subnet.parameters():
        torch.nn.init.zeros_(parameter)
    factor = 0.1 * torch.log1p(torch.exp(0.5 * step.raw_scale.detach())) / 0.5  # (C, 1, 1)
    direct = shape[1] * shape[2] * factor.log().sum()
    torch.testing.assert_close(step(x)[1][0], direct, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(step(x)[1][0], log_det_by_autograd(step, x[0]), rtol=1e-9, atol=1e-9)
    z = (x * factor + step.offset)[:, step.permutation]
    torch.testing.assert_close(step(x)[0], z)


@pytest.mark.parametrize(("flow", "shape"), [(s[0], s) for s in SHAPES], indirect=["flow"])
def test_log_determinant_and_inverse_of_a_whole_flow(flow, shape):
    with seeded(3):
        x = torch.randn(2, *shape, dtype=torch.float64)
    z, log_det = flow(x)
    assert z.shape == x.shape and log_det.shape == (2,)
    torch.testing.assert_close(log_det, torch.stack([log_det_by_autograd(flow, one) for one in x]), rtol=1e-8, atol=0)
    torch.testing.assert_close(flow.inverse(z), x, rtol=0, atol=1e-8)


def test_inverse_restores_real_features(model):
    """In float32, of a flow as it is initialised and of one that has moved."""
    maps = model.features(model.prepare(images(2)))
    for norm, flow, m in zip(model.norms, model.flows, maps, strict=True):
        x = norm(m)
        with torch.no_grad():
            torch.testing.assert_close(flow.inverse(flow(x)[0]), x, rtol=0, atol=1e-5)
    with seeded(4), torch.no_grad():
        moved = Flow(24, 8, 1.0)
        for parameter in moved.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        x = torch.randn(2, 24, 16, 24)
        z = moved(x)[0]
        assert (z.sort(1).values - x.sort(1).values).abs().max() > 0.1
        torch.testing.assert_close(moved.inverse(z), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("channels", [6, 7])
def test_a_step_by_hand(channels):
    """Every operation written out, position by position in the coupling."""
    with seeded(5):
        step, x = FlowStep(channels, 3, 0.5), torch.randn(2, channels, 4, 5)
    half = math.ceil(channels / 2)
    x1, x2 = x[:, :half], x[:, half:]
    first, second = step.subnet[0], step.subnet[2]
    assert first.weight.shape == (half // 2, half, 3, 3)
    assert second.weight.shape == (2 * (channels // 2), half // 2, 3, 3)
    hidden = F.conv2d(x1, first.weight, first.bias, padding=1).clamp(min=0)
    out = 0.1 * F.conv2d(hidden, second.weight, second.bias, padding=1)
    assert out.shape[2:] == x.shape[2:]
    a_s, a_t = out[:, : channels // 2], out[:, channels // 2 :]
    y2 = x2 * torch.exp(2.0 * torch.tanh(a_s)) + a_t
    z, log_det = step(x)
    y = torch.empty_like(z)
    y[:, step.permutation] = z  # z_i = y_p(i); the global map is still the identity
    assert torch.equal(y[:, :half], x1)
    torch.testing.assert_close(y[:, half:], y2)
    assert (y[:, half:] - x2).abs().max() > 1e-3
    torch.testing.assert_close(log_det, (2.0 * torch.tanh(a_s)).sum((1, 2, 3)))


def test_initial_map_is_exactly_one(model):
    for flow in model.flows:
        for step in flow.steps:
            assert torch.equal(step.scale(), torch.ones_like(step.raw_scale))
            assert torch.equal(step.offset, torch.zeros_like(step.offset))


def test_kernels_alternate(model):
    for flow in model.flows:
        sizes = [(step.subnet[0].kernel_size, step.subnet[2].kernel_size) for step in flow.steps]
        assert sizes == [((3, 3), (3, 3)), ((1, 1), (1, 1))] * 4


# ---- permutations ------------------------------------------------------------------------------------------------


def permutations(model):
    return [step.permutation for flow in model.flows for step in flow.steps]


def test_permutations_are_hard_stored_and_all_different(model):
    found = permutations(model)
    for p, channels in zip(found, [24] * 8 + [40] * 8 + [112] * 8, strict=True):
        assert p.dtype == torch.int64 and sorted(p.tolist()) == list(range(channels))
    assert len({tuple(p.tolist()) for p in found}) == 24
    stored = [k for k in model.state_dict() if k.endswith("permutation")]
    assert len(stored) == 24
    assert not any(p.shape == (c, c) for c in (24, 40, 112) for p in model.flows.state_dict().values())


def test_reload_brings_the_permutations_and_with_them_the_scores(model):
    other = create_model("fastflow", "lite", input_size=[64, 96], seed=1).eval()
    assert not any(torch.equal(a, b) for a, b in zip(permutations(model), permutations(other), strict=True))
    assert not torch.equal(other(images(2)).map, model(images(2)).map)
    other.load_state_dict(model.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(permutations(model), permutations(other), strict=True))
    assert torch.equal(other(images(2)).map, model(images(2)).map)


def test_initialisation_follows_the_seed(model):
    torch.manual_seed(99)  # global state must not matter
    again = create_model("fastflow", "lite", input_size=[64, 96])
    for (name, a), b in zip(model.state_dict().items(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# ---- the whole ---------------------------------------------------------------------------------------------------


def count_flow(channels, steps):
    """Parameters of steps on an even number of channels: two convolutions, scale and offset."""
    half, total = channels // 2, 0
    for kernel in (3, 1) * (steps // 2):
        total += kernel**2 * half * half + half + kernel**2 * half * channels + channels + 2 * channels
    return total


def test_parameters_on_wide_resnet50():
    with architecture_only():
        at_224, at_256 = create_model("fastflow"), create_model("fastflow", "original", flow_steps=2)
    widths = (256, 512, 1024)
    for model, steps, norms in ((at_224, 8, 2_809_856), (at_256, 2, 3_670_016)):
        flows = sum(count_flow(width, steps) for width in widths)
        assert [p.numel() for p in model.norms.parameters()] == [
            c * (model.size[0] // s) ** 2 for c, s in zip(widths, (4, 8, 16), strict=True) for _ in range(2)
        ]
        assert sum(p.numel() for p in model.norms.parameters()) == norms
        assert sum(p.numel() for p in model.flows.parameters()) == flows
        assert sum(p.numel() for p in model.learned_parameters()) == flows + norms
    assert sum(p.numel() for p in at_224.flows.parameters()) == 41_337_856
    assert at_224.hparams.backbone == "wide_resnet50_2.racm_in1k" and at_256.size == (256, 256)


def test_norms_take_the_shape_of_odd_inputs():
    model = create_model("fastflow", "lite", input_size=[97, 61], flow_steps=1).eval()
    assert [tuple(n.normalized_shape) for n in model.norms] == [(24, 25, 16), (40, 13, 8), (112, 7, 4)]
    scores = model(images(2, 3, 50, 33))
    assert scores.map.shape == (2, 1, 50, 33) and scores.map.isfinite().all()


def z_by_hand(model, batch):
    """LayerNorm written out, then the flow: [(z, log_det)]."""
    out = []
    for m, norm, flow in zip(model.features(model.prepare(batch)), model.norms, model.flows, strict=True):
        mean = m.mean((1, 2, 3), keepdim=True)
        variance = (m - mean).square().mean((1, 2, 3), keepdim=True)
        out.append(flow((m - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias))
    return out


@pytest.fixture(scope="module")
def moved():
    """A model whose parameters have left their initial values."""
    model = create_model("fastflow", "lite", input_size=[64, 96]).eval()
    with seeded(6), torch.no_grad():
        for parameter in model.learned_parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("norm_log_det", [False, True])
def test_loss_by_hand(moved, monkeypatch, norm_log_det):
    monkeypatch.setitem(moved.hparams, "norm_log_det", norm_log_det)
    batch = images(3)
    expected = []
    for (z, log_det), norm in zip(z_by_hand(moved, batch), moved.norms, strict=True):
        z, log_det = z.detach().double().numpy(), log_det.detach().numpy()
        if norm_log_det:
            log_det = log_det + np.linalg.slogdet(np.diag(norm.weight.detach().numpy().ravel()))[1]
        by_image = [0.5 * (z[i] ** 2).sum() - log_det[i] for i in range(3)]
        expected.append(sum(by_image) / 3)
    parts = {}
    total = moved.total_loss
    monkeypatch.setattr(moved, "total_loss", lambda **given: parts.update(given) or total(**given))
    loss = moved.training_step(Batch(batch, ["a", "b", "c"]), 0)
    assert list(parts) == ["stage1", "stage2", "stage3"]
    assert [p.item() for p in parts.values()] == pytest.approx(expected, rel=1e-5)
    assert loss.item() == pytest.approx(sum(expected), rel=1e-5) and loss.dtype == torch.float32
    assert loss.item() > 1e3  # a sum over channels and positions, not a mean


def test_score_and_map_by_hand(moved):
    batch = images(2, 1, 80, 50, seed=3)
    batch[:, :, 20:40, 10:30] = 1
    grid = torch.zeros(2, 1, 64, 96)
    for z, _ in z_by_hand(moved, batch):
        p = torch.zeros(2, 1, *z.shape[2:])
        for channel in z.detach().unbind(1):
            p[:, 0] += channel**2 / z.shape[1]
        grid += F.interpolate(-torch.exp(-0.5 * p), (64, 96), mode="bilinear", align_corners=False) / 3
    with torch.inference_mode():
        scores = moved(batch)
    expected = F.interpolate(grid, (80, 50), mode="bilinear", align_corners=False)
    torch.testing.assert_close(scores.map, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.image, grid.flatten(1).max(1).values, rtol=0, atol=1e-5)
    assert scores.map.min() >= -1 and scores.map.max() <= 0
    assert scores.map.max() - scores.map.min() > 0.05


def test_the_map_rises_with_distance_from_the_origin(model):
    """An unlikely z everywhere gives 0, the likeliest one -1."""
    copy = create_model("fastflow", "lite", input_size=64, flow_steps=1).eval()
    with torch.no_grad():
        for norm in copy.norms:
            norm.weight.zero_()
        for flow in copy.flows:
            torch.nn.init.zeros_(flow.steps[0].subnet[2].weight)
            torch.nn.init.zeros_(flow.steps[0].subnet[2].bias)
    assert torch.equal(copy(images(1)).map, torch.full((1, 1, 64, 64), -1.0))
    with torch.no_grad():
        for norm in copy.norms:
            norm.bias.fill_(30.0)
    assert float(copy(images(1)).image) == pytest.approx(0, abs=1e-12)


def test_only_what_lies_inside_is_scored(moved):
    batch, roi = images(2), torch.zeros(2, 1, 64, 64, dtype=torch.bool)
    roi[:, :, :20, 40:] = True
    with torch.inference_mode():
        part, whole = moved(batch, roi), moved(batch)
        assert torch.equal(moved(batch, torch.ones_like(roi)).image, whole.image)
    assert torch.equal(part.map, whole.map)
    grid = moved(batch).map.detach()
    near = grid[..., :20, 40:].amax((1, 2, 3))
    assert (part.image <= whole.image).all() and (part.image >= near - 1e-6).all()
    assert (part.image < whole.image).any()


def test_bfloat16_changes_the_subnets_alone(moved):
    batch = images(2)
    exact = moved.transform(batch)
    with torch.autocast("cpu", torch.bfloat16):
        rough = moved.transform(batch)
        loss = moved.training_step(Batch(batch, ["a", "b"]), 0)
        scores = moved(batch)
    assert {t.dtype for pair in rough for t in pair} == {torch.float32}
    assert loss.dtype == scores.map.dtype == scores.image.dtype == torch.float32
    assert any(not torch.equal(a, b) for (a, _), (b, _) in zip(exact, rough, strict=True))  # autocast did something
    torch.testing.assert_close(scores.map, moved(batch).map, rtol=0, atol=0.02)
    assert float(loss) == pytest.approx(float(moved.training_step(Batch(batch, ["a", "b"]), 0)), rel=5e-3)


def test_log_determinant_is_summed_in_float32_under_bfloat16(moved):
    """From what the subnets put out, in bfloat16, on: sums of bfloat16 would be off by some thousandths."""
    flow, x = moved.flows[0], torch.randn(2, 24, 16, 24, generator=torch.Generator().manual_seed(1))
    outputs = []
    hooks = [step.subnet.register_forward_hook(lambda *given: outputs.append(given[-1])) for step in flow.steps]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        log_det = flow(x)[1]
    for hook in hooks:
        hook.remove()
    assert len(outputs) == 8 and {out.dtype for out in outputs} == {torch.bfloat16}
    expected = sum(2 * torch.tanh(0.1 * out.double()[:, :12]).sum((1, 2, 3)) for out in outputs)
    expected += sum(16 * 24 * step.scale().double().log().sum() for step in flow.steps)
    torch.testing.assert_close(log_det.double(), expected, rtol=1e-5, atol=1e-3)


# ---- learning ----------------------------------------------------------------------------------------------------


def test_optimiser_holds_what_is_learned(model):
    optimizer = model.configure_optimizers()
    assert isinstance(optimizer, torch.optim.Adam) and len(optimizer.param_groups) == 1
    group = optimizer.param_groups[0]
    assert {id(p) for p in group["params"]} == {id(p) for m in (model.norms, model.flows) for p in m.parameters()}
    default = create_model("fastflow", backbone="tf_efficientnet_lite0", input_size=64).configure_optimizers()
    group = default.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-3, 1e-5, (0.9, 0.999))


def test_a_counted_gain_stays(tiles):
    """Without its log-determinant the gain shrinks step by step; with it, normalised features keep their scale."""
    gains = {}
    for counted in (False, True):
        model = create_model("fastflow", "lite", input_size=64, flow_steps=2, norm_log_det=counted)
        optimizer = model.configure_optimizers()
        for step in range(60):
            batch = tiles[0][torch.arange(4 * step, 4 * step + 4) % 30]
            optimizer.zero_grad()
            model.training_step(Batch(batch, ["?"] * 4), step).backward()
            optimizer.step()
        gains[counted] = float(torch.cat([norm.weight.flatten() for norm in model.norms]).abs().mean())
    assert gains[False] < 0.93 and abs(gains[True] - 1) < 0.4 * (1 - gains[False]), gains


def test_presets():
    original, paper, steps = (presets("fastflow", name) for name in ("original", "paper224", "mvtec_steps"))
    assert original["model"] == {"input_size": 256} and original["data"]["resize"] == 256
    assert "crop" not in original["data"]
    for preset in (original, paper, steps):
        assert preset["data"]["batch_size"] == 32
    assert original["trainer"] == paper["trainer"] == {"max_epochs": 500}
    assert steps["trainer"] == {"max_steps": 500 * (240 // 32)} and "model" not in paper and "model" not in steps


@pytest.mark.parametrize("wrong", [{"flow_steps": 0}, {"hidden_ratio": 0.0}, {"lr": 0.0}, {"weight_decay": -1.0}])
def test_bad_values_are_told(wrong):
    with pytest.raises(ZooError, match=f"--{next(iter(wrong)).replace('_', '-')}"):
        create_model("fastflow", "lite", input_size=64, **wrong)


@pytest.fixture(scope="module")
def tiles(mvtec):
    """Normal training images (30, 1, 96, 96), then 6 normal and 6 anomalous test images with their labels."""
    data = load_data(str(mvtec))

    def stack(split):
        return torch.stack([torch.tensor(read_row(row)[0]) for row in split])[:, None].float() / 255

    return stack(data["train"]), stack(data["test"]), list(data["test"]["label"])


@pytest.fixture(scope="module")
def learned(tiles):
    """Model, its parts of the loss on fixed images before and after 40 steps, and its state before."""
    train, _, _ = tiles
    model = create_model("fastflow", "lite", input_size=96, flow_steps=4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    before = parts_of(model, train[24:])
    optimizer = model.configure_optimizers()
    model.train()
    for step in range(40):
        batch = train[:24][torch.arange(8 * step, 8 * step + 8) % 24]
        optimizer.zero_grad()
        model.training_step(Batch(batch, ["?"] * 8), step).backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.isfinite().all() for p in model.learned_parameters())
        optimizer.step()
    return model, before, parts_of(model, train[24:]), state


@torch.no_grad()
def parts_of(model, batch):
    return [float((0.5 * (z**2).sum((1, 2, 3)) - d).mean()) for z, d in model.transform(batch)]


def test_each_part_of_the_loss_falls(learned):
    _, before, after, _ = learned
    assert all(b < 0.6 * a for a, b in zip(before, after, strict=True)), (before, after)


def test_trained_beats_untrained(learned, tiles):
    model, (_, test, labels) = learned[0], tiles
    untrained = create_model("fastflow", "lite", input_size=96, flow_steps=4)
    with torch.inference_mode():
        trained, chance = (roc_auc_score(labels, m.eval()(test).image) for m in (model, untrained))
    assert trained > 0.95 and trained > chance, (trained, chance)


def test_only_what_is_learned_has_moved(learned):
    model, _, _, state = learned
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, state[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert not any(name.startswith("features") or name.endswith("permutation") for name in moved)
    model.train()
    assert not any(m.training for m in model.features.modules())
    assert all(m.training for m in [*model.norms.modules(), *model.flows.modules()])


def test_a_trainer_logs_the_parts_and_the_gain(tiles):
    model = create_model("fastflow", "lite", input_size=64, flow_steps=1, norm_log_det=False)
    batches = [Batch(tiles[0][i : i + 8], ["?"] * 8) for i in (0, 8)]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    options = dict(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, log_every_n_steps=1)
    trainer = L.Trainer(**options, enable_progress_bar=False, enable_model_summary=False)
    trainer.fit(model, loader)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged["loss"] == pytest.approx(sum(logged[f"loss_stage{i}"] for i in (1, 2, 3)), rel=1e-5)
    gains = [np.abs(norm.weight.detach().numpy()).mean() for norm in model.norms]
    assert np.mean(gains) < logged["gain"] < 1  # the latter is that before the last step
