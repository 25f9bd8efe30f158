"""A model goes on from another one: what it learns, what it keeps of its parent, and what is said of both."""

import csv
import json
import shutil

import lightning as L
import numpy as np
import pytest
import torch
from kinds import over
from PIL import Image

from zoo import callbacks
from zoo.calibrate import calibrate
from zoo.card_data import licence
from zoo.cards import render_card
from zoo.checkpoint import file_sha256
from zoo.cli import main
from zoo.data import load_data
from zoo.errors import ZooError
from zoo.finetune import finetune
from zoo.fit import fit
from zoo.hub import from_pretrained
from zoo.image import read_image
from zoo.methods import presets
from zoo.module import Batch
from zoo.publish import publish, stage
from zoo.run import RunOptions

SIZE = 64
SMALL = {
    "fanogan": {"width": 2, "critic_steps": 1},
    "ganomaly": {"width": 2},
    "iad_inpainting": {"width": 2},
    "riad": {"width": 2},
    "padim": {"dims": 12},
    "patchcore": {"bank_size": 60},
}
ONE_PASS = ("padim", "patchcore")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders `first` and `second` of 24 normal images each, of two styles; the second has a test split."""
    root = tmp_path_factory.mktemp("images")
    for folder, style in (("first", "metal"), ("second", "fine")):
        data = load_data(f"synthetic:train=24,good=4,defect=4,size={SIZE},style={style}")
        for split, label, place in (("train", 0, "train/good"), ("test", 0, "test/good"), ("test", 1, "test/bad")):
            (root / folder / place).mkdir(parents=True)
            for i, row in enumerate(row for row in data[split] if row["label"] == label):
                Image.fromarray(read_image(row["image"])).save(root / folder / place / f"{i:03d}.png")
    shutil.rmtree(root / "first/test")
    return root


@pytest.fixture(scope="module")
def parents(images, tmp_path_factory):
    """method -> folder of a model of the first images, made on demand."""
    home, made = tmp_path_factory.mktemp("home"), {}

    def make(method):
        if method not in made:
            arguments = {"input_size": SIZE} | SMALL.get(method, {})
            training = {} if method in ONE_PASS else {"max_steps": 6}
            fit(method, str(images / "first"), method, "lite", arguments, {}, training, home=home)
            made[method] = home / "models" / method.replace("_", "-")
        return made[method]

    return make


def noted(folder, role):
    """Names of the images of a role, of the model's own DATA."""
    lines = csv.DictReader(open(folder / "private/seen.csv"))
    return [line["image"] for line in lines if line["role"] == role and line["image"]]


def tensor(paths):
    return torch.stack([torch.from_numpy(read_image(path) / np.float32(255))[None] for path in paths])


def go_on(method, parents, images, home, name="child", **options):
    if method not in ONE_PASS:
        options = {"trainer_options": {"max_steps": 10}} | options
    return finetune(parents(method), str(images / "second"), name, home=home, **options)


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@over("padim", "patchcore", "cfa", "stfpm", "ganomaly")
def test_each_method_goes_on_and_names_its_parent(method, parents, images, tmp_path):
    before = files(parents(method))
    parent = from_pretrained(parents(method))
    model, record = go_on(method, parents, images, tmp_path)
    assert files(parents(method)) == before
    assert record["parent"]["weights_sha256"] == file_sha256(parents(method) / "model.safetensors")
    assert record["parent"]["train_data"]["name"] == "first" and record["train_data"]["name"] == "second"
    assert record["ancestors"] == []
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, parent.state_dict().get(k))}
    assert not any(name.startswith("features.") for name in changed)
    if method not in ONE_PASS:
        assert record["training"]["steps"] <= 10 and record["configuration"]["trainer"]["lr_scale"] == 0.3
        assert bool(changed) == bool(record["training"]["selection"]["step"])
    else:
        assert changed
    again = from_pretrained(tmp_path / "models/child")
    paths = sorted((images / "second/test/bad").iterdir())
    assert [p.score for p in again.predict(paths)] == [p.score for p in model.predict(paths)]
    assert again.calibration.scores == model.calibration.scores and not again.calibration.calibrated
    assert len(model.calibration.scores) == 12  # held-out images of its own data


@over("padim", "stfpm", "supersimplenet")
def test_held_out_normals_are_no_less_normal_than_before(method, parents, images, tmp_path):
    parent = from_pretrained(parents(method))
    model, _ = go_on(method, parents, images, tmp_path)
    held = noted(model.folder, "held out" if method in ONE_PASS else "selection")
    paths = [images / "second" / name for name in held]
    assert len(paths) == 12
    if method == "supersimplenet":  # whose map of normal images alone tells nothing
        x = torch.stack([torch.from_numpy(read_image(path) / np.float32(255))[None] for path in paths])
        with torch.no_grad():
            size = min(8, presets(method, "lite")["data"]["batch_size"])  # the noise is drawn for a batch
            parts = [Batch(x[i : i + size], held[i : i + size]) for i in range(0, len(x), size)]
            means = [sum(float(m.surprise(part)[0]) for part in parts) for m in (parent, model)]
    else:
        means = [np.mean([p.map.mean(dtype=np.float64) for p in m.predict(paths)]) for m in (parent, model)]
    assert means[1] <= means[0] * (1 + 1e-6) + 1e-12


def test_rates_are_lowered_and_a_resume_does_not_lower_them_again(parents, images, tmp_path, monkeypatch):
    seen = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])
            if stop and len(seen) == 4:
                raise KeyboardInterrupt

    stop = True
    parents("stfpm")
    monkeypatch.setattr("zoo.fitting.training", with_callback(Rates()))
    options = {"trainer_options": {"max_steps": 8, "lr_scale": 0.25, "select": "last"}, "checkpoint_minutes": 0}
    with pytest.raises(KeyboardInterrupt):
        go_on("stfpm", parents, images, tmp_path, **options)
    stop = False
    model, record = go_on("stfpm", parents, images, tmp_path, resume=True, **options)
    assert set(seen) == {0.4 * 0.25} and len(seen) == 4 + 8 - 3 and record["resumed"]
    whole, _ = go_on("stfpm", parents, images, tmp_path / "whole", **options)
    assert all(torch.equal(v, whole.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(KeyboardInterrupt):
        stop = True
        seen.clear()
        go_on("stfpm", parents, images, tmp_path, "other", **options)
    stop = False
    with pytest.raises(ZooError, match="another configuration"):  # its parent is another one
        finetune(tmp_path / "models/child", str(images / "second"), "other", home=tmp_path, resume=True, **options)


def with_callback(callback):
    from zoo.training import training

    def planned(*arguments):
        limits, callbacks = training(*arguments)
        return limits, [callback, *callbacks]

    return planned


def test_an_early_end_keeps_the_weights_it_began_with(parents, images, tmp_path, monkeypatch):
    values = iter(range(1, 100))  # held-out images look less normal at each measurement
    monkeypatch.setattr(callbacks, "_surprise", lambda module, batches: float(next(values)))
    said = []
    model, record = go_on(
        "stfpm", parents, images, tmp_path, trainer_options={"max_steps": 50}, run=RunOptions(say=said.append)
    )
    assert record["training"]["steps"] == 15  # three tenths without progress
    kept = {"rule": "normal", "of": "mean map", "step": 0, "value": 1.0, "images": 12}
    assert record["training"]["selection"] == kept
    parent = from_pretrained(parents("stfpm"))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in parent.state_dict().items())
    assert said[-1].startswith("Kept step 0 (the weights that it began with): mean map of held-out normals 1.")
    assert said[-1].endswith("The fit ended at step 15.")


def test_what_begins_is_measured_with_its_new_statistics(parents, images, tmp_path, monkeypatch):
    values = iter(range(1, 100))
    monkeypatch.setattr(callbacks, "_surprise", lambda module, batches: float(next(values)))
    model, record = go_on("cfa", parents, images, tmp_path, parent_share=None)
    assert record["training"]["selection"]["step"] == 0 and model.stands_for == 12 + 12
    parent = from_pretrained(parents("cfa"))
    own = [images / "second" / name for name in noted(model.folder, "fit")]
    with torch.no_grad():
        new = parent.describe(tensor(own), parent._untrained()).double().mean(0).flatten(1).T
    torch.testing.assert_close(model.bank.double(), (parent.bank.double() + new) / 2, atol=1e-5, rtol=1e-5)
    assert torch.equal(model.descriptor.weight, parent.descriptor.weight)


def test_a_resumed_fit_knows_what_its_statistics_stand_for(parents, images, tmp_path, monkeypatch):
    class Stop(L.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            if stop and module.steps_taken == 3:
                raise KeyboardInterrupt

    parents("cfa")
    monkeypatch.setattr("zoo.fitting.training", with_callback(Stop()))
    options = {"trainer_options": {"max_steps": 6, "select": "last"}, "checkpoint_minutes": 0, "parent_share": None}
    stop = True
    with pytest.raises(KeyboardInterrupt):
        go_on("cfa", parents, images, tmp_path, **options)
    stop = False
    with pytest.raises(ZooError, match="another configuration"):
        go_on("cfa", parents, images, tmp_path, resume=True, remove=[noted(parents("cfa"), "fit")[0]], **options)
    model, record = go_on("cfa", parents, images, tmp_path, resume=True, **options)
    assert record["resumed"] and model.stands_for == 24
    assert from_pretrained(model.folder).stands_for == 24


def test_images_of_a_parent_that_weigh_another_amount_are_not_taken_out(parents, images, tmp_path):
    model, _ = go_on("padim", parents, images, tmp_path)
    before = model.center.clone()
    with pytest.raises(ZooError, match="take it out of that one, and fine-tune anew"):
        model.update(remove=str(images / "first" / noted(parents("padim"), "fit")[0]))
    assert torch.equal(model.center, before)
    model.update(remove=noted(model.folder, "fit")[0])
    assert model.stands_for == 12 + 11


def test_a_small_share_of_a_parent_is_small(parents, images, tmp_path):
    """The nearer to 0, the nearer to a fit on the same images alone."""
    parent = from_pretrained(parents("padim"))
    away = []
    for share in (0.5, 0.05, 1e-4):
        model, _ = go_on("padim", parents, images, tmp_path, f"child-{share}".replace(".", "-"), parent_share=share)
        own = [images / "second" / name for name in noted(model.folder, "fit")]
        with torch.no_grad():
            x = parent.embed(tensor(own)).double().numpy()  # (P, n, d)
        alone = np.stack([np.cov(one, rowvar=False) for one in x]) + parent.hparams.ridge * np.eye(parent.dims)
        ours = np.linalg.inv((model.whitening.mT @ model.whitening).double().numpy())
        away.append(np.abs(ours - alone).max() / np.abs(alone).max())
    assert away == sorted(away, reverse=True) and away[-1] < 2e-3 < away[0]


def test_a_removal_before_a_fine_tuning_is_told(parents, images, tmp_path):
    name = noted(parents("padim"), "fit")[0]
    model, record = go_on("padim", parents, images, tmp_path, remove=[name])
    assert record["parent"]["updates"] == [{"added": 0, "removed": 1}] and "updates" not in record
    assert "1 image was taken out again" in (model.folder / "README.md").read_text()
    with pytest.raises(ZooError, match="12 of these normal images had a say"):  # it is no image to judge by either
        calibrate(model, str(images / "first"), 0.3, folder=model.folder)


def test_images_added_by_an_update_have_terms_of_their_own(parents, images, tmp_path):
    model, record = go_on("padim", parents, images, tmp_path)
    drawn = {"name": "synthetic:train=3", "fingerprint": "f" * 64, "images": 3}
    record = record | {"train_data": drawn, "parent": record["parent"] | {"train_data": drawn}}
    config = model.config()
    assert licence(config, record)["license"] == "apache-2.0"
    for updated in (record | {"updates": [{"added": 2, "removed": 0}]},):
        assert licence(config, updated)["license_name"] == "owner-of-the-data"
        assert "2 normal images were added since, of which no terms are known" in render_card(config, updated)
    record["parent"]["updates"] = [{"added": 2, "removed": 0}]
    assert licence(config, record)["license_name"] == "owner-of-the-data"


def test_a_supervised_model_goes_on_without_labelled_defects(images, tmp_path):
    data = "synthetic:train=24,train_defect=4,good=1,defect=1,size=64"
    arguments = {"input_size": SIZE, "supervised": True}
    fit("supersimplenet", data, "ssn", "lite", arguments, {}, {"max_steps": 3}, home=tmp_path)
    parent = tmp_path / "models/ssn"
    model, _ = finetune(parent, str(images / "second"), "child", trainer_options={"max_steps": 3}, home=tmp_path)
    assert from_pretrained(model.folder).hparams.supervised is False


def test_a_bank_by_ratio_keeps_its_size(images, tmp_path):
    arguments = {"input_size": SIZE, "coreset_ratio": 0.05}
    fit("patchcore", str(images / "first"), "p", "lite", arguments, home=tmp_path)
    model = from_pretrained(tmp_path / "models/p")
    size = len(model.bank)
    model.update(sorted((images / "second/train/good").iterdir()))
    assert len(model.bank) == size
    model, _ = finetune(tmp_path / "models/p", str(images / "second"), "child", home=tmp_path)
    assert len(model.bank) == size
    assert sum(name.startswith("p@") for name, *_ in model.origin) <= size / 2


def test_scheduled_rates_are_lowered_too(parents, images, tmp_path, monkeypatch):
    seen = []

    class Rates(L.Callback):
        def on_train_batch_start(self, trainer, module, *_):
            seen.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    parents("supersimplenet")
    monkeypatch.setattr("zoo.fitting.training", with_callback(Rates()))
    options = {"max_steps": 10, "lr_scale": 0.5, "select": "last"}
    model, _ = go_on("supersimplenet", parents, images, tmp_path, trainer_options=options)
    given = model.hparams
    rates = np.array([given.adaptor_lr, given.segmentation_lr, given.classification_lr]) / 2
    np.testing.assert_allclose(seen[0], rates)
    reached = sum(round(share * 10) <= 9 for share in given.milestones)  # before the last of ten steps
    assert reached > 1
    np.testing.assert_allclose(seen[-1], rates * given.lr_factor**reached)


def test_images_of_the_parent_stay_known(parents, images, tmp_path):
    model, _ = go_on("padim", parents, images, tmp_path)
    with pytest.raises(ZooError, match="12 of these normal images had a say"):
        calibrate(model, str(images / "first"), 0.3, folder=model.folder)
    about, normals = calibrate(model, str(images / "second"), 0.3, folder=model.folder)
    assert len(normals.rows) == 12 + 4  # held out, and the normal test images
    with pytest.raises(ZooError, match="has learned from all 12 of these images"):
        only = tmp_path / "again"
        only.mkdir()
        for name in noted(model.folder, "fit"):
            shutil.copy(images / "second" / name, only)
        finetune(model.folder, str(only), "third", home=tmp_path)
    grown, record = finetune(model.folder, str(images / "second"), "grown", home=tmp_path)
    assert record["train_data"]["images"] + record["train_data"]["held_out"] == 12  # those that were held out before
    assert [parent["train_data"]["name"] for parent in record["ancestors"]] == ["first"]
    assert record["parent"]["train_data"]["name"] == "second"


def test_a_bank_knows_images_of_both_and_forgets_one_by_name(parents, images, tmp_path):
    model, _ = go_on("patchcore", parents, images, tmp_path)
    digest = file_sha256(parents("patchcore") / "model.safetensors")[:8]
    names = {name for name, *_ in model.origin}
    old = {name for name in names if name.startswith(f"patchcore@{digest}:train/good/")}
    assert old and names - old and len(model.bank) == 60
    assert len([1 for name, *_ in model.origin if name in old]) <= 30  # the share of the bank that is the parent's
    earlier = json.loads((model.folder / "private/earlier.json").read_text())
    assert earlier == {f"patchcore@{digest}:": str(images / "first")}
    name = sorted(old)[0]
    gone, record = finetune(model.folder, None, "gone", [name], home=tmp_path)
    assert {n for n, *_ in gone.origin} == names - {name}
    assert record["parent"]["updates"] == [{"added": 0, "removed": 1}] and gone.calibration is None
    assert record["parent"]["weights_sha256"] == file_sha256(model.folder / "model.safetensors")
    about, _ = calibrate(from_pretrained(gone.folder), str(images / "second"), 0.3, folder=gone.folder)
    assert about["checked"] is True


@pytest.mark.parametrize(("share", "counts"), [(None, 12 + 12), (0.25, 12 / 3 + 12)])
def test_the_weight_of_what_a_parent_has_gathered(share, counts, parents, images, tmp_path):
    parent = from_pretrained(parents("padim"))
    model, _ = go_on("padim", parents, images, tmp_path, parent_share=share)
    assert model.stands_for == counts
    own = [images / "second" / name for name in noted(model.folder, "fit")]
    with torch.no_grad():
        new = parent.embed(tensor(own)).double()  # (P, n, d)
    before = counts - len(own)
    mean = (before * parent.center.double() + new.sum(1)) / counts
    torch.testing.assert_close(model.center.double(), mean, atol=1e-5, rtol=1e-5)


def test_a_model_without_private_files_goes_on_and_says_so(parents, images, tmp_path):
    shutil.copytree(parents("patchcore"), tmp_path / "hub")
    shutil.rmtree(tmp_path / "hub/private")
    said = []
    model, record = finetune(
        tmp_path / "hub", str(images / "second"), "child", home=tmp_path, run=RunOptions(say=said.append)
    )
    assert any("can't be checked" in line for line in said) and record["parent"]["checked"] is False
    assert "" in {name for name, *_ in model.origin}
    about, _ = calibrate(model, str(images / "second"), 0.3, folder=model.folder)
    assert about["checked"] is False


def test_terms_of_all_that_was_learned_from():
    drawn, fab = ({"name": name, "fingerprint": "f" * 64, "images": 3} for name in ("synthetic:train=3", "lot 7"))
    miic = {"name": "miic", "fingerprint": "e" * 64, "images": 9, "terms": "Terms of MIIC, for research only."}
    hub = {"name": "open", "fingerprint": "d" * 64, "images": 2, "hub": "lab/set@abc"}
    config = {"method": "ganomaly", "backbone": None}

    def name(own, *before):
        parents = [{"weights_sha256": "b" * 64, "train_data": data} for data in before]
        record = {"train_data": own} | ({"parent": parents[0], "ancestors": parents[1:]} if parents else {})
        return licence(config, record).get("license_name", licence(config, record)["license"])

    assert name(drawn) == "apache-2.0" and name(drawn, miic) == "non-commercial-research-only"
    assert name(fab, miic) == name(drawn, drawn, miic) == "non-commercial-research-only"
    assert name(drawn, fab) == name(hub, fab) == name(fab) == "owner-of-the-data"
    assert name(drawn, hub) == "terms-of-the-data-set" and name(drawn, drawn) == "apache-2.0"


def test_a_published_child_tells_of_its_parent_by_hash_alone(parents, images, tmp_path):
    model, _ = go_on("padim", parents, images, tmp_path)
    staged = stage(model.folder, tmp_path / "staged")
    record = json.loads((staged / "results.json").read_text())
    assert record["parent"]["weights_sha256"] == file_sha256(parents("padim") / "model.safetensors")
    assert "name" not in record["parent"] and record["parent"]["train_data"]["name"] == "private images"
    text = "".join(path.read_text() for path in staged.iterdir() if path.suffix in (".json", ".md"))
    assert "first" not in text.replace("as the first", "") and str(images) not in text
    assert record["parent"]["weights_sha256"] in (staged / "README.md").read_text()


def test_a_card_names_a_parent_of_the_hub(parents, images, tmp_path):
    model, record = go_on("padim", parents, images, tmp_path)
    record = json.loads(json.dumps(record))
    record["parent"]["hub"] = "lab/miic-padim@abcdef"
    record["parent"]["train_data"] |= {"name": "miic", "terms": "For research only."}
    card = render_card(model.config(), record)
    assert "base_model: lab/miic-padim\n" in card and "license_name: non-commercial-research-only" in card
    assert "https://huggingface.co/lab/miic-padim" in card and "For research only." in card
    assert card.count("The images are their owner's") == 1


def test_mistakes_in_the_arguments(parents, images, tmp_path, capsys, zoo_home):
    zoo_home.mkdir()
    shutil.copytree(parents("padim").parent, zoo_home / "models")
    parents("stfpm")
    shutil.copytree(parents("stfpm"), zoo_home / "models/stfpm", dirs_exist_ok=True)
    data = ["--data", str(images / "second")]
    for argv, message in (
        (["padim", "--name", "new"], "needs --data"),
        (["padim", *data], "needs --name"),
        (["padim", *data, "--name", "padim"], "is the model itself"),
        (["none", *data, "--name", "new"], "No model 'none'"),
        (["padim", *data, "--name", "new", "--parent-share", "1"], "lies between 0 and 1"),
        (["padim", *data, "--name", "new", "--max-steps", "5"], "learns in one pass without training steps"),
        (["stfpm", *data, "--name", "new", "--select", "image_auroc"], "on normal images alone"),
        (["stfpm", *data, "--name", "new", "--lr-scale", "0"], "--lr-scale is above 0"),
        (["stfpm", *data, "--name", "new", "--max-steps", "0"], "are at least 1"),
        (["stfpm", *data, "--name", "new", "--remove", "a.png"], "learns by gradient alone"),
        (["padim", "--data", str(tmp_path / "gone"), "--name", "new"], "gone"),
        (["padim", *data, "--name", "new", "--hold-out", "99"], "leaves nothing of 24"),
    ):
        assert main(["finetune", *argv]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error
        assert not (zoo_home / "models/new").exists()


def test_the_command_line(parents, images, tmp_path, capsys, zoo_home):
    parents("padim")
    shutil.copytree(parents("padim").parent, zoo_home / "models")
    command = ["finetune", "padim", "--data", str(images / "second"), "--name", "new", "--intensity", "percentile"]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "Continuing padim on 12 normal images (12 held out)." in out and "from padim (SHA-256" in out
    config = json.loads((zoo_home / "models/new/config.json").read_text())
    assert config["preprocessing"]["low"] is not None
    command = ["finetune", "new", "--remove", "", "--name", "less"]
    names = (zoo_home / "models/new/private/seen.csv").read_text()
    name = next(line.split(",")[1] for line in names.splitlines() if line.startswith("fit,train/good"))
    command[3] = name
    assert main(command) == 0
    assert from_pretrained("less").stands_for == from_pretrained("new").stands_for - 1
    assert from_pretrained("less").view == from_pretrained("new").view


def test_a_model_of_the_hub_goes_on(hub, parents, images, tmp_path):
    publish(parents("padim"), "org/lot-padim")
    model, record = finetune("org/lot-padim", str(images / "second"), "child", home=tmp_path)
    assert record["parent"]["hub"].startswith("org/lot-padim@") and record["parent"]["checked"] is False
    assert record["parent"]["weights_sha256"] == file_sha256(parents("padim") / "model.safetensors")
    staged = stage(
        model.folder, tmp_path / "open", is_open=lambda repo, kind: (repo, kind) == ("org/lot-padim", "model")
    )
    assert "base_model: org/lot-padim" in (staged / "README.md").read_text()
    staged = stage(model.folder, tmp_path / "closed")
    assert "lot-padim" not in "".join(
        path.read_text() for path in staged.glob("*.[jm]*") if path.suffix != ".safetensors"
    )
