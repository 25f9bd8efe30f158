"""PaDiM's parts against a direct computation."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.distance import mahalanobis
from skimage.transform import resize

from zoo.methods import create_model
from zoo.module import Batch


@pytest.fixture(scope="module")
def model():
    model = create_model("padim", "lite", input_size=64, dims=12).eval()
    generator = torch.Generator().manual_seed(0)
    model.seen = 0.2 + 0.6 * torch.rand(30, 1, 64, 64, generator=generator)
    for first in (0, 7, 16, 27):  # uneven batches
        last = {0: 7, 7: 16, 16: 27, 27: 30}[first]
        model.observe(Batch(model.seen[first:last], [str(i) for i in range(first, last)]))
    model.finish()
    return model


@pytest.fixture(scope="module")
def two_pass(model):
    x = model.embed(model.seen).double().numpy()  # (P, N, d)
    covariance = np.stack([np.cov(p.T, ddof=1) for p in x]) + 0.01 * np.eye(12)
    return x.mean(1), covariance


def test_moments_equal_the_two_pass_result(model, two_pass):
    mean, covariance = two_pass
    np.testing.assert_allclose(model.center.numpy(), mean, rtol=1e-4, atol=1e-5)
    w = model.whitening.double().numpy()
    np.testing.assert_allclose(np.linalg.inv(w.transpose(0, 2, 1) @ w), covariance, rtol=1e-4, atol=1e-5)
    assert np.allclose(w, np.tril(w))


def test_moments_far_from_zero():
    """A mean of 1000 times the spread doesn't cancel: shifted sums keep 1e-4."""
    model = create_model("padim", "lite", input_size=64, dims=12).eval()
    generator = np.random.default_rng(0)
    x = torch.from_numpy(generator.normal(1000, 1, (4, 60, 12)).astype(np.float32))  # (P, N, d)
    model.embed = lambda images: images
    for part in x.split(16, dim=1):
        model.observe(Batch(part, []))
    model.finish()
    covariance = np.stack([np.cov(p.T) for p in x.double().numpy()]) + 0.01 * np.eye(12)
    w = model.whitening.double().numpy()
    inverse = np.linalg.inv(covariance)
    np.testing.assert_allclose(w.transpose(0, 2, 1) @ w, inverse, rtol=1e-4, atol=1e-4 * np.abs(inverse).max())


def test_score_and_map_by_hand(model, two_pass):
    mean, covariance = two_pass
    image = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(5))
    x = model.embed(image)[:, 0].double().numpy()  # (P, d)
    distance = [mahalanobis(a, m, np.linalg.inv(c)) for a, m, c in zip(x, mean, covariance, strict=True)]
    grid = np.reshape(distance, (16, 16))
    upsampled = torch.nn.functional.interpolate(torch.from_numpy(grid)[None, None], (64, 64), mode="bilinear")
    expected = gaussian_filter(upsampled[0, 0].numpy(), 4)
    with torch.inference_mode():
        scores = model(image)
    np.testing.assert_allclose(scores.map[0, 0].numpy(), expected, rtol=1e-3)
    assert float(scores.image[0]) == pytest.approx(expected.max(), rel=1e-3)
    assert resize(grid, (64, 64), order=1).shape == expected.shape


def test_embedding_is_nearest_upsampling_of_chosen_channels(model):
    images = torch.rand(2, 1, 64, 64)
    maps = model.features(model.prepare(images))
    joined = torch.cat(
        [m.repeat_interleave(16 // m.shape[-1], -1).repeat_interleave(16 // m.shape[-1], -2) for m in maps], 1
    )
    expected = joined[:, model.subset].flatten(2).permute(2, 0, 1)
    assert torch.equal(model.embed(images), expected)
    assert len(model.subset.unique()) == 12 and model.subset.max() < 176


def test_subset_follows_the_seed():
    a, b, c = (create_model("padim", "lite", dims=50, seed=s).subset for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_width_beyond_the_layers_is_capped_and_recorded(caplog):
    model = create_model("padim", backbone="tf_efficientnet_lite0")
    assert model.dims == 176 and model.config()["arguments"]["dims"] == 176
    assert sum("capped" in r.message for r in caplog.records) == 1


def test_few_images_rely_on_the_ridge():
    model = create_model("padim", "lite", input_size=64, dims=100).eval()
    model.observe(Batch(torch.rand(3, 1, 64, 64), ["a", "b", "c"]))
    model.finish()
    assert model(torch.rand(1, 1, 64, 64)).map.isfinite().all()


def test_checkpoint_holds_the_factor_packed(model):
    assert model.state_dict()["whitening"].shape == (256, 12 * 13 // 2)
