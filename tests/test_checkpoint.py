"""A model folder: all or nothing when written, refused with a sentence when anything in it is wrong."""

import json
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from zoo import checkpoint
from zoo.errors import ZooError
from zoo.fit import fit
from zoo.hub import find_model, from_pretrained, list_models, model_place


@pytest.fixture(scope="module")
def fitted(mvtec):
    return fit("padim", str(mvtec), preset="lite", arguments={"input_size": 64, "dims": 10})


@pytest.fixture
def folder(fitted, tmp_path):
    model, record = fitted
    return model.save_pretrained(tmp_path / "model", record, {"heldout.csv": "image,score\n"})


def edit(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def refused(folder, words):
    with pytest.raises(ZooError, match=words) as caught:
        from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_contents(folder):
    files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert files == {
        *("model.safetensors", "config.json", "README.md", "results.json"),
        *("private/state.json", "private/heldout.csv"),
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["backbone"]["backbone"] == "tf_efficientnet_lite0" and len(config["backbone"]["sha256"]) == 64
    assert config["learned"]["center"] == [16 * 16, 10] and config["learned"]["whitening"] == [16 * 16, 55]
    assert config["preprocessing"]["mean"] == [0.5, 0.5, 0.5] and config["calibration"]["calibrated"] is False


def test_truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "truncated")


def test_tampered(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, "SHA-256")


def test_foreign_weights(folder):
    save_file({"layer.weight": torch.zeros(3)}, folder / "model.safetensors")
    refused(folder, "doesn't fit")


def test_other_shape(folder):
    path = folder / "model.safetensors"
    state = load_file(path)
    state["center"] = state["center"][:5].clone()
    save_file(state, path)
    refused(folder, "center")


def test_header_that_claims_too_much(folder):
    header = json.dumps({"x": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refused(folder, "model.safetensors")


def test_pickle_is_not_weights(folder):
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "only safetensors")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "newer"),
        ({"surprise": 1}, "surprise"),
        ({"method": "nothing"}, "no method"),
        ({"method": "patchcore"}, "argument"),
        ({"arguments": {"dims": 10}}, "missing"),
        ({"weights_sha256": "0" * 64}, "SHA-256"),
        ({"calibration": 3}, "calibration"),
        ({"calibration": {"x": 1}}, "calibration .x. is unknown"),
    ],
)
def test_configuration_that_is_not_understood(folder, changes, words):
    edit(folder, **changes)
    refused(folder, words)


def test_damaged_configuration(folder):
    (folder / "config.json").write_text("{")
    refused(folder, "damaged")
    (folder / "config.json").unlink()
    refused(folder, "no config.json|no model")


def test_private_is_not_needed(folder, fitted):
    import shutil

    shutil.rmtree(folder / "private")
    batch = torch.rand(1, 1, 64, 64)
    with torch.inference_mode():
        assert torch.equal(from_pretrained(folder)(batch).map, fitted[0](batch).map)


def test_failed_save_changes_nothing(folder, fitted, monkeypatch):
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(ZooError, match="no space left"):
        fitted[0].save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before


def test_old_model_comes_back_when_the_new_one_cannot_take_its_place(folder, fitted, monkeypatch):
    from pathlib import Path

    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    rename = Path.rename

    def fail_once(self, target):
        if Path(target) == folder and self.suffix != ".old":
            raise OSError("the disk is gone")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_once)
    with pytest.raises(ZooError, match="nothing was changed"):
        fitted[0].save_pretrained(folder)
    assert {p: p.read_bytes() for p in folder.parent.rglob("*") if p.is_file()} == before


def test_place_is_checked_before_the_fit(mvtec, monkeypatch):
    model_place("taken").mkdir(parents=True)
    (model_place("taken") / "thesis.txt").write_text("years of work")
    monkeypatch.setattr("zoo.fit.create_model", None)  # it is never reached
    with pytest.raises(ZooError, match="no model of the zoo"):
        fit("padim", str(mvtec), "taken", "lite")


def test_something_else_is_not_replaced(fitted, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("years of work")
    with pytest.raises(ZooError, match="no model of the zoo"):
        fitted[0].save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis/chapter1.txt").read_text() == "years of work"


def test_no_path_of_this_machine_is_stored(mvtec, tmp_path):
    from zoo.nn.features import find_weights

    weights = tmp_path / "secret-place" / "lite0.safetensors"
    weights.parent.mkdir()
    save_file({k: v.contiguous() for k, v in find_weights("tf_efficientnet_lite0")[0].items()}, weights)
    arguments = {"input_size": 64, "dims": 10, "backbone_weights": str(weights)}
    model, record = fit("padim", str(mvtec), preset="lite", arguments=arguments)
    folder = model.save_pretrained(tmp_path / "m", record)
    published = b"".join(p.read_bytes() for p in folder.iterdir() if p.is_file())
    assert b"secret-place" not in published and b"lite0.safetensors" not in published
    weights.unlink()
    assert from_pretrained(folder).features.source["sha256"] == model.features.source["sha256"]


def test_local_registry(fitted):
    assert list_models() == []
    for name in ("miic-a", "miic_b", "other"):
        fitted[0].save_pretrained(model_place(name))
    assert list_models("miic-*") == ["miic-a", "miic-b"] and list_models() == ["miic-a", "miic-b", "other"]
    assert find_model("miic_b") == find_model("miic-b") == model_place("miic-b")
    with pytest.raises(ZooError, match="miic-a"):
        find_model("miic-aa")


def test_method_from_anywhere_in_the_list(fitted, capsys):
    from zoo.cli import main

    fitted[0].save_pretrained(model_place("odd"))
    edit(model_place("odd"), method="[/red]none")
    assert main(["list", "odd"]) == 0 and "[/red]none" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../up", "a/b", "/etc", ".hidden", "", "a b", "x" * 200, "a\\b"])
def test_names_that_are_paths(name):
    with pytest.raises(ZooError):
        model_place(name)
    with pytest.raises(ZooError):
        from_pretrained(name)


def test_text_is_replaced_at_once(tmp_path):
    checkpoint.write_text(tmp_path / "a.txt", "one")
    checkpoint.write_text(tmp_path / "a.txt", "two")
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a.txt"] and (
        tmp_path / "a.txt"
    ).read_text() == "two"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("dims", bad) for bad in (10**12, -1, 1.5, "10", None, True, [10])),
        *(("input_size", bad) for bad in (10**12, [64], [64, 64, 64], "64", {"a": 1})),
        *(("backbone", bad) for bad in (None, 3, [], "x" * 1000, "../../etc")),
        ("backbone_weights", "/etc/passwd"),
    ],
)
def test_arguments_from_anywhere(folder, key, value):
    config = json.loads((folder / "config.json").read_text())
    edit(folder, arguments=config["arguments"] | {key: value})
    refused(folder, "not understood|doesn't fit")
