"""PatchCore's parts against a direct computation."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import cdist

from zoo.errors import ZooError
from zoo.methods import create_model
from zoo.module import Batch


def fitted(**arguments):
    model = create_model("patchcore", "lite", **{"input_size": 64, "bank_size": 50} | arguments).eval()
    images = torch.rand(12, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    for i in range(0, 12, 4):
        model.observe(Batch(images[i : i + 4], [f"{j}.png" for j in range(i, i + 4)]))
    vectors = model.embed(images).permute(0, 2, 3, 1).flatten(0, 2)  # (N, D)
    model.finish()
    return model, vectors


def official(features, size):
    """The original's order of steps, position by position: unfold, resize each value, pool 1024, pool 1024."""
    layers = []
    for f in features:
        b, c, h, w = f.shape
        patches = F.unfold(f, 3, padding=1).view(b, c * 9, h, w)
        patches = F.interpolate(patches, size, mode="bilinear", align_corners=False)
        layers.append(F.adaptive_avg_pool1d(patches.permute(0, 2, 3, 1).reshape(-1, 1, c * 9), 1024))  # (B P, 1, 1024)
    stacked = torch.stack([layer[:, 0] for layer in layers], 1).flatten(1)  # (B P, 2048)
    return F.adaptive_avg_pool1d(stacked[:, None], 1024)[:, 0]


def test_official_embedding():
    model = create_model("patchcore", "lite", input_size=64, embedding="official").eval()
    images = torch.rand(2, 1, 64, 64)
    features = model.features(model.prepare(images))
    mine = model.embed(images).permute(0, 2, 3, 1).flatten(0, 2)
    torch.testing.assert_close(mine, official(features, (8, 8)), rtol=1e-4, atol=1e-5)
    assert mine.shape == (2 * 64, 1024)


def test_concat_embedding():
    model = create_model("patchcore", "lite", input_size=64).eval()
    images = torch.rand(2, 1, 64, 64)
    fine, coarse = model.features(model.prepare(images))
    kernel = torch.full((1, 1, 3, 3), 1 / 9)
    mean = [F.conv2d(f.flatten(0, 1)[:, None], kernel, padding=1).view_as(f) for f in (fine, coarse)]
    expected = torch.cat([mean[0], F.interpolate(mean[1], (8, 8), mode="bilinear", align_corners=False)], 1)
    torch.testing.assert_close(model.embed(images), expected, rtol=1e-4, atol=1e-5)


def test_scores_by_hand():
    model, _ = fitted()
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(9))
    vectors = model.embed(image)[0].flatten(1).T.double().numpy()
    patch = cdist(vectors, model.bank.double().numpy()).min(1) ** 2  # squared, as FAISS gives it
    scores = model(image)
    assert float(scores.image) == pytest.approx(patch.max(), rel=1e-4)
    up = F.interpolate(torch.from_numpy(patch.reshape(1, 1, 8, 8)), (64, 64), mode="bilinear")
    np.testing.assert_allclose(scores.map[0, 0].numpy(), gaussian_filter(up[0, 0].numpy(), 4), rtol=1e-3)


def test_mean_of_neighbours():
    model, _ = fitted(neighbours=3)
    image = torch.rand(1, 1, 64, 64)
    vectors = model.embed(image)[0].flatten(1).T.double().numpy()
    nearest = np.sort(cdist(vectors, model.bank.double().numpy()), axis=1)[:, :3] ** 2
    assert float(model(image).image) == pytest.approx(nearest.mean(1).max(), rel=1e-4)


def test_reweighting_is_equation_7():
    model, _ = fitted(score="reweighted")
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(3))
    vectors, bank = model.embed(image)[0].flatten(1).T.double().numpy(), model.bank.double().numpy()
    distance = cdist(vectors, bank)
    test = distance.min(1).argmax()
    nearest = distance[test].argmin()
    around = cdist(bank[nearest : nearest + 1], bank)[0].argsort()[:9]
    exponentials = np.exp(distance[test, around] - distance[test, around].max())
    weight = 1 - exponentials[0] / exponentials.sum()
    assert float(model(image).image) == pytest.approx(weight * distance[test, nearest], rel=1e-3)


def test_bank_vectors_know_their_origin():
    model, vectors = fitted()
    assert model.bank.shape == (50, 152) and len(model.origin) == 50
    for vector, (name, row, column) in zip(model.bank, model.origin, strict=True):
        index = int(name.removesuffix(".png")) * 64 + row * 8 + column
        torch.testing.assert_close(vector, vectors[index], rtol=1e-4, atol=1e-4)


def test_ratio_keeps_a_share_of_all_patches():
    model, vectors = fitted(coreset_ratio=0.05)
    assert len(model.bank) == round(0.05 * len(vectors)) == 38
    assert cdist(model.bank, vectors).min(1).max() < 1e-3
    projected, _ = fitted(coreset_ratio=0.05, project_to=64)
    assert projected.bank.shape == model.bank.shape and not torch.equal(projected.bank, model.bank)


def test_announced_memory_is_what_is_held():
    model = create_model("patchcore", "lite", input_size=64, coreset_ratio=0.1)
    held = 100 * 64 * (152 * 4 + 24)
    assert held * 1.1 <= model.estimate_memory(100) <= held * 1.3  # vectors and sources; a bank of a tenth, twice
    assert model.estimate_memory(100, world=2) == 2 * model.estimate_memory(100)
    bounded = create_model("patchcore", "lite", input_size=64, bank_size=50)
    assert bounded.estimate_memory(100) == bounded.estimate_memory(10**6) >= 2 * (200 + 4096) * (152 * 4 + 24)


def test_training_images_score_lower_than_others():
    model, _ = fitted()
    seen = torch.rand(12, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    new = torch.rand(12, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    assert model(seen).map.mean() < model(new).map.mean()


@pytest.mark.parametrize("wrong", [{"coreset_ratio": 0.0}, {"coreset_ratio": 2.0}, {"project_to": 8}, {"bank_size": 0}])
def test_mistakes(wrong):
    with pytest.raises(ZooError, match="--"):
        create_model("patchcore", "lite", **wrong)
