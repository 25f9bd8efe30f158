"""Frozen features: the right weights, proved by ImageNet predictions, and only as much network as is needed."""

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn.functional import interpolate

from zoo.errors import ZooError
from zoo.nn.features import LITE0, FeatureExtractor, architecture_only, find_weights, weights_at_hand


@pytest.mark.parametrize(
    ("photograph", "classes"),
    [
        ("coffee", {967}),
        ("rocket", {657}),
        ("chelsea", {281, 282, 285}),
    ],  # espresso; missile; tabby, tiger, Egyptian cat
)
def test_lite0_knows_imagenet(photograph, classes):
    model = timm.create_model(LITE0, pretrained=False).eval()
    model.load_state_dict(find_weights(LITE0)[0])
    transform = timm.data.create_transform(**timm.data.resolve_data_config(model.pretrained_cfg))
    with torch.inference_mode():
        probability = model(transform(Image.fromarray(getattr(skimage.data, photograph)()))[None]).softmax(1)[0]
    assert int(probability.argmax()) in classes and float(probability[list(classes)].sum()) > 0.25


def test_layers_by_stride_are_those_of_timm():
    extractor = FeatureExtractor(LITE0, (4, 8, 16))
    assert extractor.channels == [24, 40, 112] and extractor.strides == [4, 8, 16]
    assert extractor.mean == extractor.std == (0.5, 0.5, 0.5)
    whole = timm.create_model(LITE0, features_only=True, out_indices=(1, 2, 3)).eval()
    missing = whole.load_state_dict(find_weights(LITE0)[0], strict=False).missing_keys
    assert not missing
    images = torch.rand(2, 3, 96, 64)
    with torch.inference_mode():
        for mine, theirs in zip(extractor(images), whole(images), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_only_the_trunk_is_kept():
    shallow, deep = FeatureExtractor(LITE0, (4, 8)), FeatureExtractor(LITE0, (8, 16))
    size = [sum(p.numel() for p in e.parameters()) for e in (shallow, deep)]
    assert size[0] < 0.1 * size[1] < 0.1 * 1_000_000
    assert not any(k.startswith(("trunk.classifier", "trunk.conv_head")) for k in deep.state_dict())
    with architecture_only():
        resnet = FeatureExtractor("wide_resnet50_2.tv_in1k", (8, 16))
    assert resnet.channels == [512, 1024]
    assert sum(p.numel() for p in resnet.parameters()) == pytest.approx(24.9e6, rel=0.01)  # to layer3


def test_stays_in_eval_mode():
    extractor = FeatureExtractor(LITE0, (8,))
    parent = torch.nn.Sequential(extractor).train()
    before = {k: v.clone() for k, v in extractor.state_dict().items()}
    parent[0](torch.rand(4, 3, 64, 64))
    assert parent.training and not any(m.training for m in extractor.modules())
    assert all(torch.equal(v, before[k]) for k, v in extractor.state_dict().items())


@pytest.mark.parametrize("name", ["resnet18.tv_in1k", "mobilenetv3_small_100", "convnext_atto", "regnety_002"])
def test_any_backbone_from_a_local_file(name, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False).eval()
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    extractor = FeatureExtractor(name, (8, 16), weights=str(path))
    outputs = extractor(torch.rand(1, 3, 64, 64))
    assert [o.shape[1] for o in outputs] == extractor.channels and [o.shape[2] for o in outputs] == [8, 4]
    assert extractor.source["weights"] == "a local file" and len(extractor.source["sha256"]) == 64


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(ZooError, match="no backbone"):
        FeatureExtractor("resnet17", (8,))
    with pytest.raises(ZooError, match="stride"):
        FeatureExtractor("vit_small_patch16_224", (8,))
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ZooError, match="local file doesn't hold"):
        FeatureExtractor(LITE0, (8,), weights=str(tmp_path / "w.safetensors"))
    (tmp_path / "w.safetensors").write_bytes(b"nothing")
    with pytest.raises(ZooError, match="not a readable safetensors"):
        FeatureExtractor(LITE0, (8,), weights=str(tmp_path / "w.safetensors"))
    with pytest.raises(ZooError, match="existing .safetensors"):
        FeatureExtractor(LITE0, (8,), weights=str(tmp_path / "w.pth"))
    assert weights_at_hand(LITE0) and not weights_at_hand("wide_resnet50_2.tv_in1k")
    with pytest.raises(ZooError, match="--backbone-weights") as caught:
        FeatureExtractor("wide_resnet50_2.tv_in1k", (8,))
    assert LITE0 in str(caught.value) and "hub" in str(caught.value)
    monkeypatch.setattr("zoo.nn.features.LITE0_SHA256", "0" * 64)
    with pytest.raises(ZooError, match="damaged"):
        FeatureExtractor(LITE0, (8,))


def test_layers_by_index():
    extractor = FeatureExtractor(LITE0, (8, 16), layers=[1, 4])
    assert extractor.strides == [4, 32]
    with pytest.raises(ZooError, match="Layers"):
        FeatureExtractor(LITE0, (8,), layers=[9])


def test_maps_against_scipy():
    from scipy.ndimage import gaussian_filter

    from zoo.nn.maps import gaussian_blur, masked_to_roi, resize_map

    maps = torch.rand(2, 1, 57, 9)
    for sigma in (0.7, 4.0):
        expected = np.stack([gaussian_filter(m[0].numpy(), sigma) for m in maps])
        np.testing.assert_allclose(gaussian_blur(maps, sigma)[:, 0].numpy(), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(resize_map(maps, (30, 40)), interpolate(maps, (30, 40), mode="bilinear"))
    roi = torch.zeros(2, 1, 570, 90, dtype=torch.bool)
    roi[..., 100:110, :] = True
    kept = masked_to_roi(maps, roi).isfinite()
    assert kept[..., 10, :].all() and kept.sum() == 2 * 9
