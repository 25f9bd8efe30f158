"""ONNX files of all methods against `forward`, on images that the exporter has not seen; what they hold and don't."""

import getpass
import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from kinds import over
from safetensors.torch import save_file
from torch.nn.functional import interpolate

from zoo import export, graph
from zoo.calibration import Calibration
from zoo.cli import main
from zoo.data.synthetic import render
from zoo.errors import ZooError
from zoo.export import Parity, check_images, compare, export_onnx
from zoo.fit import fit
from zoo.hub import from_pretrained, model_place
from zoo.methods import create_model
from zoo.methods.patchcore import PatchCore, _pool_channels
from zoo.nn import coreset, similarity
from zoo.nn.features import architecture_only
from zoo.nn.seed import seeded
from zoo.view import View

# Beside preset lite, to be quick.
SMALL = {
    "fanogan": {"input_size": 64, "width": 4},
    "fastflow": {"flow_steps": 2},
    "ganomaly": {"input_size": 32, "width": 8},
    "iad_inpainting": {"input_size": 64, "width": 8},
    "padim": {"dims": 40},
    "patchcore": {"bank_size": 300},
    "riad": {"width": 8, "cells": [8]},
}


TINY = "test_resnet.r160_in1k"  # a third of the layers of Lite0, which take most of the time of a trace
OF_FEATURES = ("cfa", "fastflow", "padim", "patchcore", "rd4ad", "stfpm", "supersimplenet")


@pytest.fixture(scope="module")
def tiny_backbone(tmp_path_factory):
    """Arguments of a backbone with random weights."""
    path = tmp_path_factory.mktemp("backbone") / "weights.safetensors"
    with seeded(0):
        save_file(timm.create_model(TINY, pretrained=False).state_dict(), path)
    return {"backbone": TINY, "backbone_weights": str(path)}


def quick_fit(method, data, arguments):
    steps = {} if method in ("padim", "patchcore") else {"max_steps": 8}
    return fit(method, str(data), method.replace("_", "-"), "lite", arguments, trainer_options=steps)[0]


def noise(*shape, seed=1):
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def drawn(count, size, colour=False, seed=3):
    """Synthetic SEM images, every other one with a defect, (n, 1 or 3, size, size)."""
    kinds = (None, "bridge")
    grey = np.stack([render(i, seed=seed, size=size, kind=kinds[i % 2])[0] for i in range(count)])[:, None]
    return np.repeat(grey, 3, axis=1).astype(np.float32) / 255 if colour else grey.astype(np.float32) / 255


def run(path, images):
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"images": images})


@over("padim", "patchcore", "stfpm", "ganomaly")
def test_a_file_equals_forward_on_other_images(method, mvtec, tmp_path, tiny_backbone):
    own = {"input_size": [64, 96]} | SMALL.get(method, {})
    model = quick_fit(method, mvtec, own | (tiny_backbone if method in OF_FEATURES else {}))
    check(model, tmp_path / "model.onnx", mvtec)


@over()
def test_so_do_those_of_preset_lite(method, mvtec, tmp_path):
    check(quick_fit(method, mvtec, {}), tmp_path / "model.onnx", mvtec)


def check(model, path, data):
    """Export, compare, and look for what doesn't belong into the file."""
    stated = export_onnx(model, path)
    assert stated.error <= 1e-4 and not model.training
    seen = []
    for images in (
        *(noise(1, 1, 64, 96), noise(2, 3, 97, 61), noise(4, 1, 45, 50), noise(1, 3, 300, 200)),
        *(drawn(3, 128), drawn(2, 64, colour=True), drawn(1, 233)),
    ):
        score, map = run(path, images)
        with torch.inference_mode():
            expected = model(torch.from_numpy(images))
        assert score.shape == (len(images),) and map.shape == (len(images), 1, *images.shape[2:])
        assert score.dtype == map.dtype == np.float32
        for found, known in ((score, expected.image.numpy()), (map, expected.map.numpy())):
            assert (np.abs(found - known) <= 1e-4 * np.maximum(1, np.abs(known))).all()
        seen += score.tolist()
    assert len(set(seen)) == len(seen) == 14  # and no two images are alike to it

    known, content = onnx.load(path), path.read_bytes()
    onnx.checker.check_model(known, full_check=True)
    assert [v.name for v in (*known.graph.input, *known.graph.output)] == ["images", "score", "map"]
    assert [d.dim_param for d in known.graph.input[0].type.tensor_type.shape.dim] == ["N", "C", "H", "W"]
    places = [
        str(p) for p in (path.parent, data, Path.home(), Path(torch.__file__).parents[1], Path(__file__).parents[1])
    ]
    names = [p.name for p in data.rglob("*.png")] + ["train/good", '.py", line', "Traceback", "pkg.torch"]
    names += [
        name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 3
    ]  # shorter ones occur by chance
    assert [name for name in places + names if name.encode() in content] == []


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        ("patchcore", {"embedding": "official", "score": "reweighted", "neighbours": 3, "bank_size": 60}),
        pytest.param(
            *("iad_inpainting", {"residual": "structure", "score": "latent", "width": 4}), marks=pytest.mark.slow
        ),
        pytest.param(
            *("riad", {"residual": "structure", "cells": [4], "width": 4, "channels": 3}), marks=pytest.mark.slow
        ),
    ],
)
def test_other_forms_of_a_method(method, arguments, tmp_path, tiny_backbone):
    model = learned(method, input_size=64, **arguments, **(tiny_backbone if method in OF_FEATURES else {}))
    export_onnx(model, tmp_path / "model.onnx")
    images = noise(3, 3, 80, 70)
    for found, known in zip(run(tmp_path / "model.onnx", images), model(torch.from_numpy(images)), strict=True):
        assert np.abs(found - known.detach().numpy()).max() <= 1e-4 * max(1, known.abs().max())


def learned(method, **arguments):
    """A model that has seen noise, or nothing where it learns by gradient."""
    model = create_model(method, "lite", **arguments).eval()
    if hasattr(model, "observe"):
        from zoo.module import Batch

        model.num_train_images = 8
        with torch.no_grad():
            model.observe(Batch(torch.from_numpy(noise(8, 1, 64, 64)), [f"{i}.png" for i in range(8)]))
            model.finish()
    return model


# ---- stand-ins: each against what it stands for ----------------------------------------------------------------------


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize(
    ("old", "new"), [((80, 112), (96, 96)), ((500, 333), (224, 224)), ((31, 640), (96, 64)), ((64, 64), (64, 64))]
)
def test_resizing_by_products_is_that_of_torch(old, new, antialias):
    images = torch.from_numpy(noise(2, 3, *old))
    expected = interpolate(images, new, mode="bilinear", align_corners=False, antialias=antialias)
    torch.testing.assert_close(graph.resized(images, new, antialias), expected, rtol=0, atol=3e-5)


def test_stand_ins_are_what_they_stand_for():
    images, others = (torch.from_numpy(noise(2, 3, 40, 60, seed=seed)) for seed in (1, 2))
    torch.testing.assert_close(graph.ssim_distances(images, others), similarity.ssim_distances(images, others))
    for channels, width in ((360, 1024), (1152, 1024), (2048, 1024), (100, 7)):
        x = torch.from_numpy(noise(2, channels, 3, 4))
        torch.testing.assert_close(graph.pool_channels(x, width), _pool_channels(x, width))
    queries, bank = (torch.from_numpy(noise(n, 20, seed=n)) for n in (50, 300))
    queries[:5] = bank[:5]
    for found, expected in zip(graph.nearest(queries, bank, 4), coreset.nearest(queries, bank, 4), strict=True):
        torch.testing.assert_close(found, expected)


def test_stand_ins_are_taken_back():
    with pytest.raises(KeyError), graph.traceable():
        assert PatchCore.forward.__globals__["nearest"] is graph.nearest
        raise KeyError
    assert PatchCore.forward.__globals__["nearest"] is coreset.nearest


# ---- refused, and said -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    return learned("ganomaly", input_size=32, width=4)


@pytest.fixture(scope="module")
def tiny_file(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    export_onnx(tiny, path)
    return path


def off_by(path, score, map):
    """The file with so much added to its scores and maps."""
    known, off = onnx.load(path), {"score": score, "map": map}
    for node in known.graph.node:
        node.output[:] = [f"{name}_right" if name in off else name for name in node.output]
    known.graph.initializer.extend(onnx.helper.make_tensor(f"off_{k}", 1, [1], [v]) for k, v in off.items())
    known.graph.node.extend(onnx.helper.make_node("Add", [f"{k}_right", f"off_{k}"], [k]) for k in off)
    return known


@pytest.mark.parametrize("score, map", [(1.2e-4, 0.0), (0.0, -1.2e-4), (0.0, float("nan"))])
def test_an_unequal_graph_is_not_written(tiny, tiny_file, tmp_path, monkeypatch, score, map):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"of before")
    monkeypatch.setattr(export, "_write_graph", lambda model, path: onnx.save(off_by(tiny_file, score, map), path))
    with pytest.raises(ZooError, match="isn't equal to forward"):
        export_onnx(tiny, path)
    assert path.read_bytes() == b"of before" and list(tmp_path.iterdir()) == [path]


def test_differences_are_those_of_numpy(tiny, tiny_file, tmp_path):
    onnx.save(off_by(tiny_file, 2.0, -0.5), tmp_path / "off.onnx")
    images = torch.from_numpy(noise(2, 1, 40, 40))
    found, expected = compare(tiny, tmp_path / "off.onnx", [images]), tiny(images)
    assert found.images == 2 and isinstance(found, Parity)
    assert found.score_difference == pytest.approx(2, abs=1e-5) == found.error
    assert found.map_difference == pytest.approx(0.5, abs=1e-5)
    assert found.largest_map == pytest.approx(float(expected.map.detach().abs().max()))


def test_beyond_1_a_difference_counts_by_the_value(tiny, tiny_file, tmp_path):
    """0.05 of 1000 is within 1e-4 of it."""
    onnx.save(off_by(tiny_file, 1000.05, 0.0), tmp_path / "off.onnx")
    images = torch.from_numpy(noise(2, 1, 40, 40))
    found = compare(lambda x: tiny(x)._replace(image=tiny(x).image + 1000), tmp_path / "off.onnx", [images])
    assert found.score_difference == pytest.approx(0.05, abs=1e-3) and found.map_difference < 1e-5
    assert found.error == pytest.approx(5e-5, rel=0.01)


def test_what_cannot_be_traced_says_why(tiny, tmp_path, monkeypatch):
    right = type(tiny).forward
    monkeypatch.setattr(
        type(tiny), "forward", lambda self, x, roi=None: right(self, x * 2 if float(x.sum()) > 3 else x)
    )
    with pytest.raises(ZooError, match="torch can't trace this ganomaly into a graph") as caught:
        export_onnx(tiny, tmp_path / "model.onnx")
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_models_that_are_refused(tiny, tmp_path):
    with pytest.raises(ZooError, match="learned nothing"):
        export_onnx(create_model("padim", "lite", input_size=64), tmp_path / "a.onnx")
    tiny.view = View(resize=40, crop=32)
    try:
        with pytest.raises(ZooError, match="cropped images"):
            export_onnx(tiny, tmp_path / "a.onnx")
    finally:
        tiny.view = View()
    assert not list(tmp_path.iterdir())


def test_packages_that_lack_are_named(tiny, tmp_path, monkeypatch):
    there = export.importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "onnxscript" else there(name))
    with pytest.raises(ZooError, match="aren't installed: pip install onnxscript"):
        export_onnx(tiny, tmp_path / "a.onnx")


# ---- what the file says ----------------------------------------------------------------------------------------------


def test_large_weights_stand_beside_the_file(tiny, tiny_file, tmp_path, monkeypatch):
    path, images = tmp_path / "a.onnx", noise(2, 1, 50, 50)
    monkeypatch.setattr(export, "LARGEST", 1000)
    export_onnx(tiny, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data"]
    weights = sum(p.nbytes for p in tiny.generator.parameters())
    assert path.stat().st_size < weights / 2 and (tmp_path / "a.onnx.data").stat().st_size > weights / 2
    beside = run(path, images)
    monkeypatch.undo()
    monkeypatch.setattr(export, "_write_graph", lambda model, path: path.write_bytes(tiny_file.read_bytes()))
    export_onnx(tiny, path)
    assert list(tmp_path.iterdir()) == [path]  # what lay beside the one of before is gone
    assert all(np.array_equal(a, b) for a, b in zip(run(path, images), beside, strict=True))


def test_the_command_writes_a_file_that_describes_itself(tmp_path, capsys):
    data = "synthetic:train=60,good=1,defect=1,size=96,bar=1"
    fit("ganomaly", data, "tool", "lite", {"input_size": 32, "width": 4}, {"hold_out": 30}, {"max_steps": 2})
    assert main(["calibrate", "tool", "--data", data, "--false-alarm-rate", "0.2"]) == 0
    path = tmp_path / "new" / "tool.onnx"
    capsys.readouterr()
    assert main(["export", "tool", "--to", str(path)]) == 0
    said = capsys.readouterr()
    assert str(path) in said.out and "info bar" in said.out and "Traceback" not in said.err
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    known, model = session.get_modelmeta().custom_metadata_map, from_pretrained("tool")
    config = json.loads((model_place("tool") / "config.json").read_text())
    assert known["method"] == "ganomaly" and known["name"] == "tool" and known["format"] == "1"
    assert known["weights_sha256"] == config["weights_sha256"] and known["zoo_version"] == config["zoo_version"]
    assert json.loads(known["input_size"]) == [32, 32] and known["channels"] == "1"
    calibration = json.loads(known["calibration"])
    assert calibration["image_threshold"] == model.calibration.image_threshold
    assert calibration["pixel_threshold"] == model.calibration.pixel_threshold
    assert calibration["calibrated"] and calibration["false_alarm_rate"] == 0.2
    assert calibration["sizes"] == model.calibration.sizes == [[88, 96]]
    assert [1, 1, 88, 96] in [list(batch.shape) for batch in check_images(model)]
    assert json.loads(known["view"])["bars"] == [[96, 96, 8]] and "8 of 96 x 96" in known["preprocessing"]
    versions = json.loads(known["versions"])
    assert versions["torch"] == torch.__version__.split("+")[0] and versions["onnxruntime"] == onnxruntime.__version__
    parity = json.loads(known["parity"])
    again = compare(model, path, check_images(model))
    assert parity["images"] == again.images == 10 and parity["tolerance"] == 1e-4
    for name, value in again._asdict().items():  # threads may change the last digits
        assert parity[name] == pytest.approx(value, rel=0.5, abs=1e-6)
    image = render(5, seed=8, size=96, kind="particle", bar=True)[0]
    score, map = run(path, image[None, None, :88].astype(np.float32) / 255)
    expected = model.predict(image)
    assert score[0] == pytest.approx(expected.score, abs=1e-4)
    assert np.abs(map[0, 0] - expected.map[:88]).max() <= 1e-4


def test_what_comes_before_the_graph_is_told(tiny):
    tiny.view = View(info_bar="none", low=0.25, high=0.75, tile=512)
    try:
        text = " ".join(export.preprocessing(tiny))
        known = export.describe(tiny)
    finally:
        tiny.view = View()
    assert "(x - 0.25) / (0.75 - 0.25)" in text and "tiles" in text and "info bar" not in text
    assert known["preprocessing"] == text and json.loads(known["view"])["tile"] == 512 and "calibration" not in known


@pytest.mark.parametrize(("precision", "holds"), [("32-true", True), ("bf16-mixed", False)])
def test_a_rate_holds_in_the_precision_of_the_graph(tiny, precision, holds):
    stated = {"calibrated": True, "false_alarm_rate": 0.1, "levels": [0.5], "precision": precision}
    tiny.calibration = Calibration([1.0], 2.0, 3.0, 0.5, **stated)
    try:
        known = json.loads(export.describe(tiny)["calibration"])
    finally:
        tiny.calibration = None
    assert known["calibrated"] is holds and (known["image_threshold"], known["pixel_threshold"]) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["export", "nobody", "--to", "a.onnx"], "zoo fit METHOD"),
        (["export", "m"], "needs --to"),
        (["export", "m", "--to", "a.pt"], "ends in .onnx"),
        (["export", "m", "--to", "folder.onnx"], "is a folder"),
        (["export", "m", "--to", "file.txt/a.onnx"], "can't be written"),
        (["export", "m", "--ot", "a.onnx"], "did you mean --to"),
    ],
)
def test_mistakes_are_one_sentence_before_torch_is_imported(argv, words, tmp_path, zoo_home):
    with architecture_only():
        learned("padim", input_size=32, dims=2).save_pretrained(model_place("m"))
    (tmp_path / "folder.onnx").mkdir()
    (tmp_path / "file.txt").write_text("")
    code = (
        "import sys\nfrom zoo.cli import main\ncode = main(sys.argv[1:])\n"
        "assert not {'torch', 'lightning', 'onnx', 'onnxruntime'} & sys.modules.keys()\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("zoo: ") and done.stderr.count("\n") == 1
    assert words in done.stderr and (tmp_path / "file.txt").read_text() == ""
