"""RIAD and the similarity of gradient magnitudes against loops, scikit-image, scipy and counts of an own formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import uniform_filter
from skimage.metrics import structural_similarity
from torch import nn

from zoo.errors import ZooError
from zoo.evaluation import evaluate
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.methods import create_model
from zoo.methods.riad import PRESETS, RIAD, UNet, mean_filter
from zoo.module import Batch
from zoo.nn.seed import seeded
from zoo.nn.similarity import gms_distance, gradient_magnitude, msgms_distances, msgms_loss, msgms_map


def random(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def tiny(**options):
    return RIAD(**{"input_size": 32, "width": 2} | options)


class Halved(nn.Module):
    """Stands for the U-Net: half of what it sees, moved up by a tenth; keeps what it saw."""

    def forward(self, x):
        self.seen = x
        return x / 2 + 0.1


# ---- the sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sets", [2, 3, 5])
def test_sets_are_disjoint_cover_everything_and_are_of_equal_size(sets):
    model = RIAD(input_size=[48, 80], width=1, sets=sets)
    for k in (2, 4, 8, 16):
        grid = getattr(model, f"sets{k}")
        assert grid.shape == (48 // k, 80 // k) and grid.dtype == torch.uint8
        counts = np.bincount(grid.flatten().numpy())
        assert len(counts) == sets and counts.max() - counts.min() <= 1


def test_sets_are_random_and_a_function_of_the_seed(tmp_path):
    torch.manual_seed(1)
    first = tiny(input_size=64, seed=3)
    torch.manual_seed(2)
    again, other = tiny(input_size=64, seed=3), tiny(input_size=64, seed=4)
    loaded = from_pretrained(first.save_pretrained(tmp_path / "model"))
    assert loaded.unet.last.weight.equal(first.unet.last.weight)
    for k in (2, 4, 8, 16):
        grid, same, different, kept = (getattr(m, f"sets{k}") for m in (first, again, other, loaded))
        assert torch.equal(grid, same) and torch.equal(grid, kept) and not torch.equal(grid, different)
        assert f"sets{k}" in first.state_dict()
    # Neighbours are as often in the same set as chance has it (1/3 of 1,984 pairs, within five standard deviations).
    together = (first.sets2[:, 1:] == first.sets2[:, :-1]).float().sum() + (first.sets2[1:] == first.sets2[:-1]).sum()
    assert abs(float(together) / 1984 - 1 / 3) < 5 * (2 / 9 / 1984) ** 0.5


def test_each_copy_hides_one_set_and_pixels_come_from_where_they_were_hidden():
    model, x = tiny(sets=3), random(2, 1, 32, 32) * 2 - 1
    model.unet = Halved()
    for k in (2, 4, 8, 16):
        rebuilt = model.rebuild(x, k)
        assert torch.allclose(rebuilt, torch.full_like(x, 0.1))  # of 0, in the middle of [-1, 1]
        copies = model.unet.seen.view(2, 3, 32, 32)
        grid = getattr(model, f"sets{k}").numpy()
        for i, s, y, col in np.ndindex(2, 3, 32, 32):
            shown = 0.0 if grid[y // k, col // k] == s else float(x[i, 0, y, col])
            assert float(copies[i, s, y, col]) == shown


@pytest.mark.parametrize("k", [2, 8])
def test_a_rebuilt_pixel_depends_on_no_pixel_of_its_set_but_on_others(k):
    model, x = tiny(width=8).eval(), (random(1, 1, 32, 32) * 2 - 1).requires_grad_()
    number = np.kron(getattr(model, f"sets{k}").numpy(), np.ones((k, k)))
    for y, col in ((0, 0), (13, 22), (31, 5)):
        (slope,) = torch.autograd.grad(model.rebuild(x, k)[0, 0, y, col], x)
        same = torch.tensor(number == number[y, col])
        assert not slope[0, 0][same].any() and slope[0, 0][~same].abs().max() > 0
        changed = x.detach().clone()
        changed[0, 0][same] = torch.rand(int(same.sum()))
        with torch.no_grad():
            before, after = model.rebuild(x, k)[0, 0], model.rebuild(changed, k)[0, 0]
        assert torch.equal(before[same], after[same]) and not torch.equal(before[~same], after[~same])


def test_all_sizes_of_cells_are_drawn_and_only_by_the_generator():
    model, drawn = tiny(), []
    model.rebuild = lambda x, cell: drawn.append(cell) or x
    for i in range(200):
        with seeded(0, i):
            model.training_step(Batch(random(1, 1, 32, 32), ["a"]), 0)
    assert min(drawn.count(k) for k in (2, 4, 8, 16)) > 30  # of 50
    first = drawn[:10]
    drawn.clear()
    for i in range(10):
        with seeded(0, i):
            model.training_step(Batch(random(1, 1, 32, 32), ["a"]), 0)
    assert drawn == first


# ---- similarity ------------------------------------------------------------------------------------------------------


def magnitude_by_loops(image):
    """(H, W) in float64, by the definition: Prewitt's two filters / 3 on the image with its edge repeated."""
    across = np.array([[1, 0, -1]] * 3) / 3
    padded, found = np.pad(image, 1, mode="edge"), np.zeros_like(image)
    for y, x in np.ndindex(image.shape):
        patch = padded[y : y + 3, x : x + 3]
        found[y, x] = np.hypot((patch * across).sum(), (patch * across.T).sum())
    return found


def gms_by_loops(a, b, c=0.0026):
    g, h = magnitude_by_loops(a), magnitude_by_loops(b)
    return (2 * g * h + c) / (g**2 + h**2 + c)


def halved(image):
    h, w = image.shape[0] // 2, image.shape[1] // 2
    return image[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3))


def test_gradient_magnitude_by_hand():
    ramp = (torch.arange(5.0) / 10).expand(1, 1, 4, 5)  # 0.1 a pixel: differences of 0.2, of 0.1 at the edges
    expected = torch.tensor([0.1, 0.2, 0.2, 0.2, 0.1]).expand(4, 5)
    torch.testing.assert_close(gradient_magnitude(ramp)[0, 0], expected)
    torch.testing.assert_close(gradient_magnitude(ramp.mT)[0, 0], expected.mT)


@pytest.mark.parametrize("channels", [1, 3])
def test_msgms_equals_loops_at_each_scale(channels):
    a, b = random(2, channels, 16, 24), random(2, channels, 16, 24, seed=1)
    found, losses = msgms_distances(a, b), []
    assert [d.shape for d in found] == [(2, 1, 16, 24), (2, 1, 8, 12), (2, 1, 4, 6), (2, 1, 2, 3)]
    map = torch.zeros(2, 1, 16, 24, dtype=torch.float64)
    for i in range(2):
        one, other = (x[i].double().mean(0).numpy() for x in (a, b))
        for distances in found:
            expected = torch.tensor(1 - gms_by_loops(one, other))
            torch.testing.assert_close(distances[i, 0].double(), expected, rtol=1e-4, atol=1e-5)
            losses.append(float(expected.mean()))
            map[i] += F.interpolate(expected[None, None], (16, 24), mode="bilinear", align_corners=False)[0] / 4
            one, other = halved(one), halved(other)
    assert float(msgms_loss(a, b)) == pytest.approx(np.mean(losses), rel=1e-5)
    torch.testing.assert_close(msgms_map(a, b).double(), map, rtol=1e-4, atol=1e-5)


def test_the_constant_is_170_in_grey_levels():
    """The published constant is for intensities to 255; that for [0, 1] is 255^2 times smaller."""
    a, b = random(1, 1, 8, 8) / 4, random(1, 1, 8, 8, seed=1) / 4
    one, other = (255 * x[0, 0].double().numpy() for x in (a, b))
    expected = torch.tensor(1 - gms_by_loops(one, other, c=170))
    torch.testing.assert_close(gms_distance(a, b)[0, 0].double(), expected, rtol=0, atol=5e-3)  # 0.0026 is rounded
    with pytest.raises(AssertionError):  # the range that the networks see asks for another one
        torch.testing.assert_close(gms_distance(2 * a, 2 * b)[0, 0].double(), expected, rtol=0, atol=5e-3)


def test_a_training_step_sees_the_constants_of_its_range():
    """Squared error in [-1, 1], the two similarities in [0, 1]; SSIM is scikit-image's."""
    model, images = tiny(squared_weight=2.0, gradient_weight=3.0, structure_weight=5.0), random(2, 1, 32, 32)
    made = (images + 0.2 * random(2, 1, 32, 32, seed=1) - 0.1).clamp(0, 1)
    model.rebuild = lambda x, cell: 2 * made - 1
    parts = {}
    model.total_loss = lambda **given: parts.update(given) or sum(given.values())
    with torch.autocast("cpu", torch.bfloat16):
        model.training_step(Batch(images, ["a", "b"]), 0)
    pairs = [(a[0].double().numpy(), b[0].double().numpy()) for a, b in zip(images, made, strict=True)]
    options = dict(win_size=11, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    wide = [[np.pad(image, 5, mode="reflect") for image in pair] for pair in pairs]
    found = [structural_similarity(a, b, full=True, **options)[1][5:-5, 5:-5] for a, b in wide]
    assert float(parts["structure"]) / 5 == pytest.approx(1 - np.mean(found), abs=1e-4)
    distances = []
    for a, b in pairs:
        for _ in range(4):
            distances.append((1 - gms_by_loops(a, b)).mean())
            a, b = halved(a), halved(b)
    assert float(parts["gradient"]) / 3 == pytest.approx(np.mean(distances), rel=1e-4)
    assert float(parts["squared"]) / 2 == pytest.approx(
        4 * np.mean([((a - b) ** 2).mean() for a, b in pairs]), rel=1e-4
    )


@pytest.mark.parametrize("image", [random(2, 1, 32, 32), torch.full((2, 1, 32, 32), 0.5), torch.zeros(2, 1, 32, 32)])
def test_equal_images_cost_nothing_and_have_finite_gradients(image):
    model = tiny()
    made = (2 * image - 1).requires_grad_()
    model.rebuild = lambda x, cell: made
    loss = model.training_step(Batch(image, ["a", "b"]), 0)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-5 and made.grad.isfinite().all() and made.grad.abs().max() < 1e-3
    assert not msgms_loss(image, image).any()


def test_flat_images_give_finite_gradients_to_all_weights():
    model = tiny()
    model.training_step(Batch(torch.full((2, 1, 32, 32), 0.5), ["a", "b"]), 0).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_gradient_of_the_similarity_is_that_of_differences():
    a, b = random(1, 1, 8, 8).double(), random(1, 1, 8, 8, seed=1).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gms_distance(a, x), b)


# ---- network, map and learning rate ----------------------------------------------------------------------------------


def conv(inside, outside, side):
    return inside * outside * side**2 + outside


def count(channels, width):
    """Weights and biases; BatchNorm has two numbers for each channel of the two convolutions of a level."""
    w = [width * f for f in (1, 2, 4, 8, 8)]
    total = conv(channels, w[0], 3) + conv(w[0], w[0], 3) + 4 * w[0] + conv(w[0], channels, 3)
    for a, b in ((w[0], w[1]), (w[1], w[2]), (w[2], w[3]), (w[3], w[4])):
        total += conv(a, b, 4) + conv(b, b, 3) + 4 * b  # down
        total += conv(b, a, 4) + conv(2 * a, a, 3) + conv(a, a, 3) + 4 * a  # up, beside the skipped maps
    return total


@pytest.mark.parametrize(("channels", "number"), [(1, 28_803_393), (3, 28_805_699)])
def test_number_of_parameters(channels, number):
    assert sum(p.numel() for p in RIAD(channels=channels).parameters()) == count(channels, 64) == number
    assert sum(p.numel() for p in UNet(channels, 6).parameters()) == count(channels, 6)


def test_the_network_halves_four_times_and_skips_join_at_each_size():
    unet, sizes = UNet(3, 2).eval(), []
    for part in (*unet.down, *unet.join):
        part.register_forward_hook(lambda _, taken, given: sizes.append((taken[0].shape[1], *given.shape[1:])))
    unet.last.register_forward_hook(lambda *seen: sizes.append(seen[2]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        made = unet(4 * random(1, 3, 32, 48) - 2)
    assert made.shape == (1, 3, 32, 48) and made.dtype == torch.float32
    assert torch.equal(made, sizes.pop().tanh())
    down = [(3, 2, 32, 48), (2, 4, 16, 24), (4, 8, 8, 12), (8, 16, 4, 6), (16, 16, 2, 3)]
    assert sizes == down + [(32, 16, 4, 6), (16, 8, 8, 12), (8, 4, 16, 24), (4, 2, 32, 48)]
    kinds = [type(m) for m in unet.modules()]
    assert kinds.count(nn.BatchNorm2d) == kinds.count(nn.ReLU) == 18 and kinds.count(nn.ConvTranspose2d) == 4


@pytest.mark.parametrize("window", [1, 5, 21])
def test_mean_filter_is_scipys_inside_and_the_mean_of_what_exists_at_edges(window):
    map, half = random(1, 1, 40, 33), window // 2
    found, image = mean_filter(map, window)[0, 0].numpy(), map[0, 0].double().numpy()
    inside = np.s_[half : 40 - half, half : 33 - half]
    np.testing.assert_allclose(found[inside], uniform_filter(image, window)[inside], rtol=1e-5)
    for y, x in ((0, 0), (3, 32), (39, 16)):
        there = image[max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1]
        assert found[y, x] == pytest.approx(there.mean(), rel=1e-5)


def test_map_is_the_mean_over_cells_and_the_score_the_maximum_after_the_filter():
    model, images = tiny(window=5).eval(), random(2, 1, 32, 32)
    with torch.no_grad():
        scores = model(images)
        rebuilt = [(model.rebuild(2 * images - 1, k) + 1) / 2 for k in (2, 4, 8, 16)]
    for i in range(2):
        map = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
        for made in rebuilt:
            a, b = images[i, 0].double().numpy(), made[i, 0].double().numpy()
            for _ in range(4):
                distance = torch.tensor(1 - gms_by_loops(a, b))[None, None]
                map += F.interpolate(distance, (32, 32), mode="bilinear", align_corners=False) / 16
                a, b = halved(a), halved(b)
        smooth = np.array([[_window_mean(map[0, 0], y, x) for x in range(32)] for y in range(32)])
        np.testing.assert_allclose(scores.map[i, 0], smooth, rtol=1e-4, atol=1e-6)
        assert float(scores.image[i]) == pytest.approx(smooth.max(), rel=1e-4)


@pytest.mark.parametrize("residual", ["absolute", "structure"])
def test_other_residuals_take_the_place_of_msgms(residual):
    model, images = tiny(window=1, cells=[4], residual=residual).eval(), random(2, 1, 32, 32)
    with torch.no_grad():
        map, made = model(images).map, (model.rebuild(2 * images - 1, 4) + 1) / 2
    for i in range(2):
        a, b = images[i, 0].double().numpy(), made[i, 0].double().numpy()
        options = dict(data_range=1, gaussian_weights=True, use_sample_covariance=False, full=True)
        wanted = abs(a - b) if residual == "absolute" else 1 - structural_similarity(a, b, **options)[1]
        np.testing.assert_allclose(map[i, 0, 5:-5, 5:-5], wanted[5:-5, 5:-5], rtol=1e-3, atol=1e-5)


def _window_mean(map, y, x):
    return float(map[max(0, y - 2) : y + 3, max(0, x - 2) : x + 3].mean())


def test_score_depends_on_nothing_but_the_image_and_its_region():
    model, images = tiny().eval(), random(5, 1, 40, 32)
    roi = torch.zeros(5, 1, 40, 32, dtype=torch.bool)
    roi[..., :8, :8] = True
    with torch.no_grad():
        together, part = model(images), model(images, roi)
        for i in range(5):
            torch.manual_seed(i)  # nothing is drawn
            alone = model(images[i : i + 1])
            torch.testing.assert_close(together.image[i : i + 1], alone.image, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(together.map[i : i + 1], alone.map, rtol=1e-5, atol=1e-6)
        assert torch.equal(together.map, model(images).map)
        assert torch.equal(together.image, model(images, torch.ones_like(roi)).image)
    assert (part.image <= together.image).all() and (part.image < together.image).any()


def test_the_learning_rate_falls_to_a_tenth_after_250_of_300_epochs():
    model = tiny()
    model.plan = {"max_steps": 300 * 6}
    made = model.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    assert isinstance(optimizer, torch.optim.Adam) and made["lr_scheduler"]["interval"] == "step"
    (group,) = optimizer.param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 1e-5, (0.9, 0.999))
    assert {id(p) for p in group["params"]} == {id(p) for p in model.parameters()}
    rates = []
    for _ in range(300 * 6):
        rates.append(group["lr"])
        optimizer.step()  # without gradients: nothing moves
        schedule.step()
    assert rates[: 250 * 6] == [1e-4] * (250 * 6) and rates[250 * 6 :] == pytest.approx([1e-5] * (50 * 6))
    again = tiny(milestones=[0.5, 0.75])
    again.plan = {"max_steps": 8}
    schedule = again.configure_optimizers()["lr_scheduler"]["scheduler"]
    assert dict(schedule.milestones) == {4: 1, 6: 1}


def test_presets():
    original, paper = PRESETS["original"], PRESETS["paper224"]
    assert PRESETS["mvtec_steps"] == paper | {"trainer": {"max_steps": 300 * 60}}  # 240 images, batches of 4
    assert original["model"]["input_size"] == original["data"]["resize"] == 256 and "crop" not in original["data"]
    assert original["trainer"] == {"max_epochs": 300, "select": "normal"} and paper["trainer"] == {"max_epochs": 300}
    assert original["data"]["batch_size"] == paper["data"]["batch_size"] == 4
    model = create_model("riad", "paper224", width=1)
    assert model.size == (224, 224) and (model.hparams.cells, model.hparams.sets) == ([2, 4, 8, 16], 3)
    assert (model.sets16.shape, model.sets2.numel()) == ((14, 14), 12_544)


WRONG = [
    ("--input-size", {"input_size": 40}),
    ("--input-size", {"input_size": [64, 72]}),
    ("--cells", {"input_size": 64, "cells": [3]}),
    ("--cells", {"cells": []}),
    ("--cells", {"cells": [2, 2]}),
    ("--cells", {"cells": [0, 2]}),
    ("--sets", {"sets": 1}),
    ("--sets", {"sets": 5}),  # of four cells at 16
    ("--width", {"width": 0}),
    ("--window", {"window": 4}),
    ("--residual", {"residual": "square"}),
    ("--structure-weight", {"structure_weight": -1.0}),
    ("--lr", {"lr": 0.0}),
    ("--weight-decay", {"weight_decay": -1.0}),
    ("--milestones", {"milestones": [1.5]}),
]


@pytest.mark.parametrize(("named", "wrong"), WRONG)
def test_mistakes_get_a_sentence(named, wrong):
    with pytest.raises(ZooError, match=named):
        tiny(**wrong)


def test_training_lowers_each_part_of_the_loss_and_finds_defects(mvtec):
    """Images are told apart untrained: noise has gradients of its own. Where the defect is, is not."""
    size = {"input_size": 64, "width": 8, "window": 9, "cells": [4, 8], "lr": 4e-3, "residual": "gradient"}
    untrained = create_model("riad", "lite", **size).eval()
    options = dict(arguments=size, data_options={"batch_size": 4}, trainer_options={"max_steps": 40})
    trained, record = fit("riad", str(mvtec), preset="lite", **options)
    first, last = record["training"]["losses"][0], record["training"]["losses"][-1]
    assert all(last[part] < 0.5 * first[part] for part in ("loss_squared", "loss_gradient", "loss_structure"))
    before, after = (evaluate(model, str(mvtec))["metrics"] for model in (untrained, trained))
    assert after["image_auroc"] > 0.9 and after["pixel_ap"] > before["pixel_ap"] + 0.4
