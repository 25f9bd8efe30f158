"""f-AnoGAN against closed forms, loops, counts and a watched Trainer."""

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
from zoo.methods.fanogan import PRESETS, FAnoGAN, batch_norm, down, gradient_penalty, layer_norm, up

PARTS = ("generator", "critic", "encoder")
SMALL = {"width": 2, "latent": 3}


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(n=3, side=64, seed=0):
    return torch.rand(n, 1, side, side, generator=torch.Generator().manual_seed(seed))


def shaken(module, seed=0):
    """The module with all parameters and statistics away from where they start, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in module.state_dict().items():
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point():
                value.add_(0.3 * torch.randn(value.shape, generator=generator))
    return module


@pytest.fixture(scope="module")
def model():
    return shaken(FAnoGAN(**SMALL, kappa=0.7)).eval()


# ---- gradient penalty ------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = nn.Parameter(weight)

    def forward(self, x):
        return (self.weight * x).sum(dim=(1, 2, 3))


def test_penalty_of_a_linear_critic():
    """Its gradient is its weight, wherever."""
    critic = Linear(0.2 * noise(2, 5, 5))
    real, fake = noise(4, 2, 5, 5, seed=1), noise(4, 2, 5, 5, seed=2)
    penalty = gradient_penalty(critic, real, fake)
    weight = critic.weight.detach().double().numpy()
    length = np.sqrt((weight**2).sum())
    assert float(penalty.detach()) == pytest.approx((length - 1) ** 2, rel=1e-5)
    penalty.backward()  # through the gradient: 2 (|w| - 1) w / |w|
    np.testing.assert_allclose(critic.weight.grad, 2 * (length - 1) * weight / length, rtol=1e-4)


class Bowl(nn.Module):
    """Its gradient at a point is the point; notes where it is asked."""

    def forward(self, x):
        self.seen = x.detach()
        return x.square().sum(dim=(1, 2, 3)) / 2


def test_penalty_is_taken_at_one_random_point_for_each_pair():
    critic, real, fake = Bowl(), noise(64, 1, 3, 3), noise(64, 1, 3, 3, seed=1)
    torch.manual_seed(0)
    penalty = gradient_penalty(critic, real, fake)
    share = ((critic.seen - real) / (fake - real)).flatten(1)  # (64, 9)
    torch.testing.assert_close(share, share[:, :1].expand(-1, 9), rtol=1e-3, atol=1e-3)
    share = share.median(1).values.sort().values
    assert share[0] >= -1e-4 and share[-1] <= 1 + 1e-4 and (share - torch.linspace(0, 1, 64)).abs().max() < 0.25
    lengths = np.sqrt((critic.seen.double().numpy() ** 2).sum((1, 2, 3)))
    assert float(penalty.detach()) == pytest.approx(((lengths - 1) ** 2).mean(), rel=1e-5)


def test_the_critics_gradient_at_an_image_does_not_depend_on_the_others(model):
    x = noise(3, 1, 64, 64).requires_grad_()
    (together,) = torch.autograd.grad(model.critic(x).sum(), x)
    for i in range(3):
        (alone,) = torch.autograd.grad(model.critic(x[i : i + 1]).sum(), x)
        torch.testing.assert_close(alone[i], together[i], rtol=1e-3, atol=1e-5)
        assert not alone[[j for j in range(3) if j != i]].any()


def test_penalty_is_float32_under_mixed_precision_and_teaches_every_layer(model):
    real, fake = noise(2, 1, 64, 64), noise(2, 1, 64, 64, seed=1)
    torch.manual_seed(0)
    expected = gradient_penalty(model.critic, real, fake)
    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        penalty = gradient_penalty(model.critic, real, fake)
    assert penalty.dtype == torch.float32 and torch.equal(penalty, expected)
    grads = dict(
        zip(
            dict(model.critic.named_parameters()),
            torch.autograd.grad(penalty, list(model.critic.parameters()), allow_unused=True),
            strict=True,
        )
    )
    for name, grad in grads.items():  # a shift at the very end moves no gradient
        assert (grad is not None and bool(grad.any())) or name.endswith("bias"), name


# ---- networks --------------------------------------------------------------------------------------------------------


def normal(x, scale, shift, eps):
    """(B, C, h, w), over C, h and w: by numpy."""
    x = x.double().numpy()
    mean, var = (f(x, axis=(1, 2, 3), keepdims=True) for f in (np.mean, np.var))
    return torch.tensor((x - mean) / np.sqrt(var + eps) * scale[:, None, None] + shift[:, None, None])


def test_layer_norm_is_over_an_image_with_a_scale_a_channel():
    norm, x = shaken(layer_norm(4)), 3 + 2 * noise(2, 4, 3, 5)
    expected = normal(x, *(p.detach().double().numpy() for p in (norm.weight, norm.bias)), 1e-5)
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-4, atol=1e-5)
    assert norm.weight.shape == norm.bias.shape == (4,) and batch_norm(4).eps == 1e-3


def inputs(block, x):
    """Shapes that the convolutions of a block see, by name."""
    seen = {}
    for name, module in block.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: tuple(x[0].shape[1:])}))
    return block(x), list(seen.values())


def test_down_is_norm_relu_conv_twice_then_mean_pooling():
    block, x = shaken(down(3, 5, layer_norm)), noise(2, 3, 8, 6)
    found, shapes = inputs(block, x)
    assert shapes == [(3, 8, 6), (3, 8, 6), (3, 4, 3)]  # pooled after the second one, before the shortcut's
    p = [value.detach().double() for value in block.parameters()]
    scale1, shift1, first, scale2, shift2, second, bias, short, short_bias = p
    h = F.conv2d(normal(x, scale1.numpy(), shift1.numpy(), 1e-5).clamp(min=0), first, padding=1)
    h = F.conv2d(normal(h, scale2.numpy(), shift2.numpy(), 1e-5).clamp(min=0), second, bias, padding=1)
    skip = torch.einsum("oi,bihw->bohw", short[:, :, 0, 0], x.double()) + short_bias[:, None, None]
    pooled = (h + skip).reshape(2, 5, 4, 2, 3, 2).mean((3, 5))  # of a 1 x 1 convolution before or after is one
    torch.testing.assert_close(found.double(), pooled, rtol=1e-4, atol=1e-4)


def test_up_is_norm_relu_twice_the_size_conv_norm_relu_conv():
    block, x = shaken(up(4, 3)).eval(), noise(2, 4, 3, 5)
    found, shapes = inputs(block, x)
    assert shapes == [(4, 6, 10), (3, 6, 10), (4, 6, 10)]  # twice the size before the first one and the shortcut's

    def norm(h, i):
        layer = block.main[i]
        h = (h - layer.running_mean[:, None, None]) / (layer.running_var[:, None, None] + 1e-3).sqrt()
        return h * layer.weight[:, None, None] + layer.bias[:, None, None]

    large = np.repeat(np.repeat(norm(x, 0).clamp(min=0).detach().numpy(), 2, axis=2), 2, axis=3)
    h = F.conv2d(torch.tensor(large), block.main[3].weight, padding=1)
    h = F.conv2d(norm(h, 4).clamp(min=0), block.main[6].weight, block.main[6].bias, padding=1)
    skip = torch.tensor(np.repeat(np.repeat(x.numpy(), 2, axis=2), 2, axis=3))
    skip = torch.einsum("oi,bihw->bohw", block.shortcut[1].weight[:, :, 0, 0], skip)
    skip = skip + block.shortcut[1].bias[:, None, None]
    torch.testing.assert_close(found, h + skip, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "wide"), [(64, (64, 128, 256, 512, 512)), (128, (32, 64, 128, 256, 512, 512))], ids=["64", "128"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_parameters_by_count(side, wide, channels):
    with torch.device("meta"):
        model = FAnoGAN(input_size=side, channels=channels)
    pairs = list(zip(wide, wide[1:], strict=False))
    downs = sum(4 * a + 9 * a * a + (9 * a * b + b) + (a * b + b) for a, b in pairs)
    ups = sum(2 * b + 2 * a + 9 * b * a + (9 * a * a + a) + (b * a + a) for a, b in pairs)
    trunk = (9 * channels + 1) * wide[0] + downs
    expected = {
        "generator": (128 + 1) * 8192 + ups + 2 * wide[0] + (9 * wide[0] + 1) * channels,
        "critic": trunk + 8192 + 1,
        "encoder": trunk + (8192 + 1) * 128,
    }
    assert {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in PARTS} == expected
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == set(PARTS)


@pytest.mark.parametrize("side", [64, 128])
def test_shapes_and_ranges(side):
    model = FAnoGAN(**SMALL, input_size=side, channels=3).eval()
    x = noise(2, 3, side, side)
    with torch.no_grad():
        code = model.encoder(100 * x)
        assert code.shape == (2, 3) and code.abs().max() <= 1
        made = model.generator(100 * noise(2, 3))
        assert made.shape == x.shape and made.abs().max() <= 1
        assert model.critic(x).shape == (2,) and model.critic.features(x).shape == (2, 16 * 8 * 2)
        assert [tuple(h.shape[2:]) for h in walk(model.critic.features[:-1], x)][-1] == (4, 4)
        assert model(images(2)).map.shape == (2, 1, 64, 64)


def walk(layers, x):
    for layer in layers:
        x = layer(x)
        yield x


def test_norms_are_of_the_image_in_the_critic_and_of_the_batch_elsewhere():
    """A gradient penalty for each image has no meaning with BatchNorm."""
    model = FAnoGAN(**SMALL)
    kinds = {part: {type(m).__name__ for m in getattr(model, part).modules() if hasattr(m, "eps")} for part in PARTS}
    assert kinds == {"generator": {"BatchNorm2d"}, "critic": {"GroupNorm"}, "encoder": {"BatchNorm2d"}}
    assert not any(getattr(m, "inplace", False) for m in model.modules())


def test_first_weights_are_uniform_with_glorots_variance_or_twice_it():
    model, other = FAnoGAN(width=16), FAnoGAN(width=16, seed=1)
    checked = 0
    for name, m in model.named_modules():
        if not isinstance(m, nn.Conv2d | nn.Linear):
            continue
        area = m.weight[0, 0].numel() if isinstance(m, nn.Conv2d) else 1
        plain = isinstance(m, nn.Linear) or "shortcut" in name or (m.in_channels == 1)
        bound = ((1 if plain else 2) * 6 / (area * (m.weight.shape[0] + m.weight.shape[1]))) ** 0.5
        largest = float(m.weight.detach().abs().max())
        assert largest <= bound and (m.weight.numel() < 1000 or largest > 0.98 * bound), name
        assert m.bias is None or not m.bias.any()
        assert not torch.equal(m.weight, other.get_submodule(name).weight)
        checked += 1
    assert checked == 3 * 4 * 3 + 2 * 2 + 2  # convolutions of blocks, the others and linear layers
    assert all(map(torch.equal, model.state_dict().values(), FAnoGAN(width=16).state_dict().values()))


# ---- losses and scores -----------------------------------------------------------------------------------------------


def parts_of(model, loss, x):
    """The parts of a loss by name, made with the draws of seed 0."""
    model.told = {}
    torch.manual_seed(0)
    getattr(model, loss)(x)
    return {name: float(value) for name, value in model.told.items()}


def test_losses(model):
    x = noise(4, 1, 64, 64).clamp(-1, 1)
    torch.manual_seed(0)
    made = model.generator(torch.randn(4, 3)).detach()
    real, fake = (model.critic(images).detach().double().numpy() for images in (x, made))
    penalty = 10 * float(gradient_penalty(model.critic, x, made).detach())
    wasserstein = fake.mean() - real.mean()
    expected = {"loss": wasserstein + penalty, "loss_wasserstein": wasserstein, "loss_penalty": penalty}
    assert parts_of(model, "critic_loss", x) == pytest.approx(expected, rel=1e-4)
    assert parts_of(model, "generator_loss", x) == pytest.approx({"generator": -fake.mean()}, rel=1e-5)
    residual, features = by_hand(model, x)
    expected = {
        "loss": (residual + 0.7 * features).mean(),
        "loss_residual": residual.mean(),
        "loss_features": 0.7 * features.mean(),
    }
    assert parts_of(model, "encoder_loss", x) == pytest.approx(expected, rel=1e-4)


def by_hand(model, x):
    """Mean squared distances (B,) of images and of the critic's features, of network inputs (B, C, S, S)."""
    with torch.no_grad():
        again = model.generator(model.encoder(x))
        pairs = [(x, again), tuple(model.critic.features(images) for images in (x, again))]
    return [np.array([np.mean((a - b) ** 2) for a, b in zip(*map(f64, pair), strict=True)]) for pair in pairs]


def f64(x):
    return x.double().numpy()


def test_score_and_map(model):
    x = images()
    residual, features = by_hand(model, 2 * x - 1)
    assert residual.min() > 0.05 and features.min() > 0.05
    with torch.no_grad():
        scores, again = model(x), model.generator(model.encoder(2 * x - 1))
    np.testing.assert_allclose(scores.image, residual + 0.7 * features, rtol=1e-4)
    np.testing.assert_allclose(scores.map, (2 * x - 1 - again).abs(), atol=1e-5)


def test_map_is_the_channels_mean_at_the_images_own_size():
    model, x = shaken(FAnoGAN(**SMALL, channels=3)).eval(), torch.rand(2, 3, 100, 84)
    with torch.no_grad():
        small = F.interpolate(x, (64, 64), mode="bilinear", antialias=True) * 2 - 1
        error = sum((small - model.rebuilt(small))[:, i : i + 1].abs() for i in range(3)) / 3
        expected = F.interpolate(error, (100, 84), mode="bilinear", align_corners=False)
        torch.testing.assert_close(model(x).map, expected, rtol=1e-4, atol=1e-5)


def test_roi_limits_what_is_compared(model):
    x, roi = images(), torch.zeros(3, 1, 64, 64, dtype=torch.bool)
    roi[0, :, :20, 5:30] = True
    roi[1] = True
    with torch.no_grad():
        whole, part, nothing = model(x), model(x, roi), model(x, torch.zeros_like(roi))
        again = model.rebuilt(2 * x - 1)
        seen = torch.where(roi, 2 * x - 1, again)
        features = f64((model.critic.features(seen) - model.critic.features(again)).square().mean(1))
    residual, all_features = by_hand(model, 2 * x - 1)
    error = (f64(2 * x - 1 - again) ** 2)[0, 0, :20, 5:30].sum() / 64**2
    assert float(part.image[0]) == pytest.approx(error + 0.7 * min(features[0], all_features[0]), rel=1e-4)
    assert torch.equal(part.image[1], whole.image[1]) and torch.equal(nothing.image, torch.zeros(3))
    assert part.image[2] == 0 and (part.image <= whole.image).all() and torch.equal(part.map, whole.map)


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(dim=(1, 2, 3))[:, None]


def test_a_region_never_raises_the_score():
    """Features in which the errors of two halves cancel: one half alone would differ by more than both."""
    model = FAnoGAN(**SMALL)
    model.critic.features, model.rebuilt = Mean(), torch.zeros_like
    x, left = torch.full((1, 1, 64, 64), 0.75), torch.zeros(1, 1, 64, 64, dtype=torch.bool)
    x[..., 32:], left[..., :32] = 0.25, True
    assert float(model(x).image) == pytest.approx(0.25) and float(model(x, left).image) == pytest.approx(0.125)


def test_one_pixel_of_a_large_region_counts(model):
    roi = torch.zeros(1, 1, 500, 500, dtype=torch.bool)
    roi[..., 123, 123] = True
    with torch.no_grad():
        assert float(model(images(1, 500), roi).image) > 0


def test_scores_under_bfloat16_keep_the_distances_of_features(model):
    """Images that are rebuilt almost rightly: features in bfloat16 would differ by rounding alone."""
    x = noise(4, 1, 64, 64).clamp(-1, 1)
    near = x + 1e-3 * noise(4, 1, 64, 64, seed=1)
    with torch.no_grad():
        expected = model.distances(x, near)
        with torch.autocast("cpu", torch.bfloat16):
            found = model.distances(x, near)
            scores = model((x + 1) / 2)
    assert all(map(torch.equal, expected, found)) and scores.image.dtype == scores.map.dtype == torch.float32


# ---- the course of a fit ---------------------------------------------------------------------------------------------


def test_flips():
    x = noise(400, 1, 2, 3)
    assert torch.equal(FAnoGAN(**SMALL, flip=0.0).mirrored(x), x)
    assert torch.equal(FAnoGAN(**SMALL, flip=1.0).mirrored(x), torch.stack([row.flip(-1) for row in x]))
    torch.manual_seed(0)
    some = FAnoGAN(**SMALL, flip=0.25).mirrored(x)
    turned = (some == x.flip(-1)).all(dim=(1, 2, 3))
    assert torch.equal(turned, (some != x).any(dim=(1, 2, 3))) and 60 < int(turned.sum()) < 140


class Watch(L.Callback):
    """Notes for each step what moved and what was told; saves at `moment` (batches done) and may stop there."""

    def __init__(self, path=None, moment=None):
        self.path, self.moment, self.moved, self.told, self.steps, self.modes = path, moment, [], [], [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.before = {name: value.clone() for name, value in module.state_dict().items()}
        self.steps.append("")

    def on_before_optimizer_step(self, trainer, module, optimizer):
        learning = {name.split(".")[0] for name, p in module.named_parameters() if p.requires_grad}
        (part,) = learning
        mine = {id(p) for p in getattr(module, part).parameters()}
        assert {id(p) for group in optimizer.param_groups for p in group["params"]} == mine
        assert all(p.grad is not None for p in getattr(module, part).parameters())
        self.steps[-1] += part[0]
        self.modes.append("".join(p[0] for p in PARTS if all(m.training for m in getattr(module, p).modules())))

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        after = module.state_dict()
        self.moved.append({name for name, value in self.before.items() if not torch.equal(value, after[name])})
        self.told.append({name: float(value) for name, value in module.told.items()})
        if module.steps_taken == self.moment:
            trainer.save_checkpoint(self.path)
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def data():
    return load_data("synthetic:train=24,size=64")  # 12 to learn from


def run(data, watch, epochs=2, validate=False, **options):
    """12 images in batches of 2: 6 steps an epoch, the first 5 of them of the GAN."""
    model = FAnoGAN(**SMALL, critic_steps=2, gan_share=0.4, gan_lr=1e-3, encoder_lr=1e-3)
    module = AnomalyDataModule(data, input_size=(64, 64), batch_size=2, seed=3)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=1 / 6 if validate else None,
    )
    loaders = {"train_dataloaders": module.train_dataloader()} if validate else {"datamodule": module}
    if validate:
        loaders["val_dataloaders"] = AnomalyDataModule(
            load_data("synthetic:good=1,defect=1,train=24,size=64"), input_size=(64, 64)
        ).test_dataloader()
    try:
        trainer.fit(model, **loaders, **options)
    except SystemExit:  # what Lightning makes of an interrupt
        pass
    return model


@pytest.fixture(scope="module")
def whole(data):
    """(model, watch) of a fit that nothing stops."""
    watch = Watch()
    return run(data, watch), watch


def test_schedule(whole):
    """The critic's step on each batch, the generator's on each second one, then the encoder alone."""
    model, watch = whole
    assert watch.steps == ["c", "cg", "c", "cg", "c"] + ["e"] * 7 and int(model.phase) == 1
    parameters = {name for name, _ in model.named_parameters()}
    for step, moved in zip(watch.steps, watch.moved, strict=True):
        assert {name.split(".")[0][0] for name in moved & parameters} == set(step)
    assert set(watch.modes[:7]) == {"gce"} and set(watch.modes[7:]) == {"e"}


def test_what_is_told(whole):
    _, watch = whole
    for step, told in zip(watch.steps, watch.told, strict=True):
        parts = ("residual", "features") if step == "e" else ("wasserstein", "penalty")
        assert told.keys() == {"loss", *(f"loss_{p}" for p in parts)} | ({"generator"} if "g" in step else set())
        assert told["loss"] == pytest.approx(sum(told[f"loss_{part}"] for part in parts), rel=1e-5)


@pytest.mark.parametrize("validate", [False, True])
def test_generator_and_critic_stay_as_they_are_while_the_encoder_learns(data, whole, validate):
    """Their statistics too, and whatever mode Lightning asks for."""
    model, watch = whole
    if validate:  # Lightning calls eval and train around it
        watch = Watch()
        model = run(data, watch, validate=True)
        assert set(watch.modes[7:]) == {"e"}
    for moved in watch.moved[6:]:  # the sixth step also notes the switch of the phase
        assert {name.split(".")[0] for name in moved} == {"encoder"}
        assert any(name.endswith("running_mean") for name in moved)
    assert {name.split(".")[0] for name in watch.moved[5]} == {"encoder"} | ({"phase"} & watch.moved[5])
    model.train()
    assert model.encoder.training and not any(m.training for p in PARTS[:2] for m in getattr(model, p).modules())
    assert not any(m.training for m in model.eval().modules())


@pytest.mark.parametrize("moment", [1, 4, 5, 6, 9])
def test_stopped_and_resumed_in_each_stage_and_at_the_switch(data, whole, moment, tmp_path):
    first, path = Watch(tmp_path / "x.ckpt", moment), tmp_path / "x.ckpt"
    run(data, first)
    then = Watch()
    model = run(data, then, ckpt_path=path, weights_only=True)
    assert first.steps + then.steps == whole[1].steps and first.told + then.told == whole[1].told
    expected = whole[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_a_fitted_model_that_is_fitted_again_begins_with_the_gan(data):
    model = FAnoGAN(**SMALL, gan_share=0.5, critic_steps=1)
    model.phase.fill_(1)
    watch = Watch()
    module = AnomalyDataModule(data, input_size=(64, 64), batch_size=6, seed=3)
    options = dict(logger=False, enable_progress_bar=False, enable_checkpointing=False)
    L.Trainer(accelerator="cpu", max_epochs=1, callbacks=[watch], **options).fit(model, datamodule=module)
    assert watch.steps == ["cg", "e"] and watch.modes == ["gce", "gce", "e"]


@pytest.mark.parametrize("share", [0.1, 0.9])
def test_a_fit_too_short_for_one_of_the_networks_is_refused(share):
    """0.1 of 40 steps are fewer than the five of the critic before the generator's first; 0.9 of 4 are all."""
    data = "synthetic:train=60,size=64"
    with pytest.raises(ZooError, match=f"--gan-share {share} of .* leaves generator or encoder none"):
        fit(
            "fanogan",
            data,
            preset="lite",
            arguments={"gan_share": share, "critic_steps": 5, "width": 2},
            trainer_options={"max_steps": 40 if share < 0.5 else 4},
        )


def test_optimisers():
    model = FAnoGAN(**SMALL, gan_lr=3e-4, encoder_lr=2e-5)
    generator, critic, encoder = model.configure_optimizers()
    for optimizer, part in zip((generator, critic, encoder), PARTS, strict=True):
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(p) for p in getattr(model, part).parameters()]
        assert group["lr"] == (2e-5 if part == "encoder" else 3e-4) and group["weight_decay"] == 0
    assert type(generator) is type(critic) is torch.optim.Adam and type(encoder) is torch.optim.RMSprop
    assert generator.param_groups[0]["betas"] == critic.param_groups[0]["betas"] == (0.0, 0.9)
    assert (encoder.param_groups[0]["alpha"], encoder.param_groups[0]["eps"]) == (0.9, 1e-10**0.5)


def test_presets_and_defaults_are_the_originals():
    model = FAnoGAN(**SMALL)
    h = model.hparams
    assert (h.gan_lr, h.encoder_lr, h.critic_steps, h.penalty_weight, h.kappa, h.flip) == (1e-4, 5e-5, 5, 10, 1, 0.5)
    assert h.input_size == 64 and FAnoGAN(width=64).hparams.latent == 128
    for preset in ("original", "paper224"):
        assert PRESETS[preset]["data"] == {"batch_size": 64}
        model.plan = {"max_steps": PRESETS[preset]["trainer"]["max_steps"]}
        assert model.steps_planned == 7 * 374 + 50_000
        assert [model.phase_at(step) for step in (0, 7 * 374 - 1, 7 * 374, 52_617)] == [0, 0, 1, 1]
    assert "model" not in PRESETS["original"] and PRESETS["paper224"]["model"] == {"input_size": 128}


@pytest.mark.parametrize(
    "wrong",
    [
        {"input_size": 224},
        {"input_size": [64, 128]},
        {"input_size": 32},
        {"channels": 2},
        {"width": 3},
        {"width": 0},
        {"latent": 0},
        {"critic_steps": 0},
        {"gan_share": 0.0},
        {"gan_share": 1.0},
        {"flip": 1.5},
        {"penalty_weight": -1.0},
        {"kappa": -0.1},
        {"gan_lr": 0.0},
        {"encoder_lr": -1.0},
    ],
)
def test_mistakes_get_a_sentence(wrong):
    with pytest.raises(ZooError, match=f"--{next(iter(wrong)).replace('_', '-')}") as error:
        FAnoGAN(**SMALL | wrong)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.slow  # test_registry.py fits it as long, and asks it to find defects
def test_training_teaches_to_rebuild_and_finds_defects(mvtec):
    few = {"critic_steps": 1, "gan_lr": 2e-3, "gan_share": 0.4, "encoder_lr": 2e-4}  # it learns in so few steps
    options = dict(arguments=few, data_options={"batch_size": 4}, trainer_options={"max_steps": 250})
    trained, record = fit("fanogan", str(mvtec), preset="lite", **options)
    untrained = FAnoGAN(**dict(trained.hparams)).eval()
    held_out = AnomalyDataModule(load_data(str(mvtec)), input_size=(64, 64)).holdout_dataloader()
    x = trained.prepare(next(iter(held_out))[0].image)  # normal stripes, their places not seen by the fit
    with torch.no_grad():
        rebuilt = [model.rebuilt(x) for model in (untrained, trained)]
    likeness = [
        np.mean([np.corrcoef(f64(one).ravel(), f64(other).ravel())[0, 1] for one, other in zip(x, y, strict=True)])
        for y in rebuilt
    ]
    assert likeness[0] < 0.1 and likeness[1] > 0.4, likeness  # 0 for any constant image
    before, after = (by_hand(model, x)[0].mean() for model in (untrained, trained))
    assert after < 0.3 * before, (before, after)
    first, last = (evaluate(model, str(mvtec))["metrics"] for model in (untrained, trained))
    assert last["pixel_auroc"] > 0.9 and last["pixel_ap"] > first["pixel_ap"] + 0.2, (first, last)
    names = [set(tenth) - {"step"} for tenth in record["training"]["losses"]]
    assert "loss_penalty" in names[0] and "loss_residual" in names[-1]
