"""Publishing by the hub's own client over HTTP: what is uploaded, what never is, and what goes wrong on the way."""

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hub_server import READ, STRANGER, WRITE, environment
from huggingface_hub import HfApi, ModelCard
from PIL import Image

from zoo import checkpoint
from zoo.cli import main
from zoo.errors import ZooError
from zoo.hub import from_pretrained, list_models, model_place
from zoo.publish import EVALUATION, is_edited, publish, signed, stage

REPO = "fab/wafers"
FILES = {"model.safetensors", "config.json", "README.md", "results.json"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A private folder with names that tell something, 16-bit images among them."""
    root, rng = tmp_path_factory.mktemp("customer-acme") / "lot-4711-secret", np.random.default_rng(0)
    for i in range(64):
        kind = "bad" if i >= 56 else "good"
        image = rng.integers(0, 2**16, (48, 48), dtype=np.uint16)
        image[10:20, 10:20] += 30000 if kind == "bad" else 0
        (root / kind).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(root / kind / f"wafer17-die{i:03d}.png")
    return root


@pytest.fixture(scope="module")
def home(images, tmp_path_factory):
    """A registry with a model that was fitted, evaluated and calibrated by commands."""
    home = tmp_path_factory.mktemp("home")
    before, os.environ["ZOO_HOME"] = os.environ.get("ZOO_HOME"), str(home)
    try:
        fit = ["fit", "patchcore", "--preset", "lite", "--data", str(images), "--name", "wafers", "--input-size", "64"]
        assert main([*fit, "--bank-size", "100", "--hold-out", "25", "--train-fraction", "1.0"]) == 0
        assert main(["evaluate", "wafers", "--data", str(images), "--bootstrap", "20"]) == 0
        assert main(["calibrate", "wafers", "--data", str(images), "--false-alarm-rate", "0.2"]) == 0
    finally:
        os.environ.update(ZOO_HOME=before) if before else os.environ.pop("ZOO_HOME")
    return home


@pytest.fixture
def folder(home, monkeypatch):
    monkeypatch.setenv("ZOO_HOME", str(home))
    return model_place("wafers")


def commits(hub):
    return len(hub.commits(REPO))


# ---- what is uploaded ------------------------------------------------------------------------------------------------


def test_one_commit_with_the_public_files(hub, folder):
    done = publish(folder, REPO)
    assert set(done.uploaded) == FILES == set(hub.files(REPO)) - {".gitattributes"}
    assert commits(hub) == 2 and done.commit == hub.commits(REPO)[0]  # the first one makes the repository
    assert done.url == f"{hub.url}/{REPO}"
    assert hub.files(REPO)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert json.loads(hub.files(REPO)["config.json"]) == json.loads((folder / "config.json").read_text())


def test_nothing_private_is_uploaded(hub, folder, images):
    publish(folder, REPO)
    sent = b"\n".join(hub.uploaded().values())
    assert len(sent) > (folder / "model.safetensors").stat().st_size
    for file in images.rglob("*.png"):
        pixels = np.asarray(Image.open(file))
        forms = [file.read_bytes(), pixels[:2], (pixels[:2] >> 8).astype(np.uint8), pixels[:2].astype(np.float32)]
        forms += [(pixels[:2] / 65535).astype(np.float32), (pixels[:2] / 65535).astype(np.float32) * 2 - 1]
        assert not any(bytes(form) in sent for form in forms)
        assert file.name.encode() not in sent and file.stem.encode() not in sent
    for word in ("lot-4711", "customer-acme", str(images), str(Path.home()) + "/", str(folder.parents[1]), os.getcwd()):
        assert word.encode() not in sent, word
    for word in (getpass.getuser(), socket.gethostname()):
        for name, content in hub.files(REPO).items():
            if name.endswith(".json"):  # elsewhere a user's name may be a word
                assert f'"{word}"'.encode() not in content and f"/{word}/".encode() not in content
    for private in (folder / "private").iterdir():
        assert private.read_bytes() not in sent


def test_data_is_named_where_that_is_asked_for(hub, folder):
    publish(folder, REPO)
    record = json.loads(hub.files(REPO)["results.json"])
    names = record["train_data"]["name"], record["test_data"]["name"], record["calibration"]["data"]["name"]
    assert names == ("private images",) * 3
    assert "lot-4711-secret" in (folder / "results.json").read_text()  # here it keeps its name
    publish(folder, REPO, data_names=True)
    assert json.loads(hub.files(REPO)["results.json"])["test_data"]["name"] == "lot-4711-secret"


@pytest.mark.parametrize("private", [False, True])
def test_data_set_on_the_hub_is_named_where_all_may_see_it(hub, folder, tmp_path, private):
    hub.edit("lab/lots", {"zoo.json": b"{}"}, kind="datasets")
    hub.set_private("lab/lots", private, kind="datasets")
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / "results.json").read_text())
    for part in ("train_data", "test_data"):
        record[part] |= {"name": "lot 12", "hub": f"lab/lots@{'0' * 40}"}
    (copy / "results.json").write_text(json.dumps(record))
    publish(copy, REPO)
    sent = b"".join(hub.files(REPO).values())
    assert (b"lot 12" in sent) == (b"lab/lots" in sent) == (not private)
    assert (ModelCard(hub.files(REPO)["README.md"].decode()).data.datasets == ["lab/lots"]) == (not private)
    assert (EVALUATION in hub.files(REPO)) == (not private)


def test_place_of_the_machine_is_refused(hub, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / "results.json").read_text())
    places = ["/home/kim/wafers", str(Path.home() / "x"), "C:\\Users\\kim", "/fab7", "/nfs/u/kim", "~/lots", "file:/x"]
    for place in (*places, "\\\\server\\sem", "local:/gpfs/kim", "in /Volumes/sem here"):
        (copy / "results.json").write_text(json.dumps(record | {"note": place}))
        with pytest.raises(ZooError, match="place of this machine"):
            publish(copy, REPO)
    (copy / "results.json").write_text(json.dumps(record | {"note": "good/wafer17-die001.png"}))
    with pytest.raises(ZooError, match="name of an image"):
        publish(copy, REPO)
    assert not hub.requests


def test_names_of_the_machine_and_its_user(hub, folder, tmp_path, monkeypatch):
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(record | {"note": "by kimdoe on sem-host7"}))
    for function, name in (("getpass.getuser", "kimdoe"), ("socket.gethostname", "sem-host7")):
        with monkeypatch.context() as patch:
            patch.setattr(function, lambda name=name: name)
            with pytest.raises(ZooError, match=f"names this machine or its user .{name}"):
                publish(copy, REPO)
            with pytest.raises(ZooError, match="message of the commit names"):
                publish(folder, REPO, commit_message=f"from {name}")

    def unknown():
        raise KeyError("getpwuid(): uid not found")

    monkeypatch.setattr("getpass.getuser", unknown)
    assert publish(folder, REPO).uploaded


def test_damaged_weights_are_refused(hub, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ZooError, match="SHA-256"):
        publish(copy, REPO)
    assert not hub.requests


def test_staged_folder_is_a_model(folder, tmp_path):
    staged = stage(folder, tmp_path / "out" / "wafers")
    assert {path.name for path in staged.iterdir()} == FILES
    image = np.random.default_rng(1).integers(0, 255, (48, 48), dtype=np.uint8)
    assert from_pretrained(staged).predict(image).score == from_pretrained(folder).predict(image).score
    assert from_pretrained(staged).predict(image).p_value == from_pretrained(folder).predict(image).p_value


def test_as_users_of_the_hubs_mixin_do(hub, folder, tmp_path, monkeypatch):
    model = from_pretrained(folder)
    publish(folder, REPO)
    done = model.push_to_hub(REPO, branch="trial", commit_message="Try", overwrite_card=True)
    assert done.commit == hub.commits(REPO)[0] and not done.uploaded  # the same content, on a branch of its own
    model.record = {}
    done = model.push_to_hub(REPO, branch="trial")
    assert {ref.name: ref.target_commit for ref in HfApi().list_repo_refs(REPO).branches} == {
        "main": hub.commits(REPO)[0],
        "trial": done.commit,
    }
    assert model.save_pretrained(tmp_path / "again", push_to_hub=True, repo_id="fab/again", private=None).is_dir()
    assert "config.json" in hub.files("fab/again")
    with pytest.raises(TypeError):
        model.push_to_hub(REPO, surprise=1)
    with pytest.raises(TypeError, match="'recrod'"):
        model.save_pretrained(tmp_path / "typo", recrod={})
    assert not (tmp_path / "typo").exists()


def test_name_of_an_image_in_memory(hub, folder):
    model = from_pretrained(folder)
    model.record = model.record | {"note": "wafer17-die001.png"}
    with pytest.raises(ZooError, match="name of an image"):
        model.push_to_hub(REPO)
    with pytest.raises(ZooError, match="message of the commit has a place"):
        model.push_to_hub(REPO, commit_message="from /fab14/jdoe")
    assert not hub.requests


@pytest.mark.parametrize("private", [None, True, False])
def test_the_organisation_decides_where_nobody_says(hub, folder, private):
    publish(folder, REPO, private=private)
    (asked,) = [json.loads(each.body) for each in hub.requests if each.path == "/api/repos/create"]
    assert asked.get("visibility") == {None: None, True: "private", False: "public"}[private]


def test_card_that_was_edited_here_is_told(hub, folder, tmp_path):
    copy, lines = shutil.copytree(folder, tmp_path / "copy"), []
    publish(copy, REPO, say=lines.append)
    assert not lines
    (copy / "README.md").write_text((copy / "README.md").read_text() + "\nOurs.\n")
    publish(copy, REPO, say=lines.append)
    assert len(lines) == 1 and "published is that of its record" in lines[0]


def test_model_in_memory(hub, folder):
    model = from_pretrained(folder)
    model.push_to_hub("fab/again", commit_message="Ours", private=True)
    assert hub.files("fab/again")["results.json"] == _after(publish, folder, REPO, hub)["results.json"]
    assert "Ours" in json.dumps(hub.repos["models/fab/again"]["commits"]) and hub.repos["models/fab/again"]["private"]


def _after(publish, folder, repo, hub):
    publish(folder, repo)
    return hub.files(repo)


# ---- the card --------------------------------------------------------------------------------------------------------


def test_card_names_its_repository_and_its_example_runs(hub, folder, tmp_path):
    publish(folder, REPO)
    card = hub.files(REPO)["README.md"].decode()
    assert not is_edited(card)
    code = card.split("```python\n")[1].split("```")[0]
    assert REPO in code and len(list(filter(None, code.splitlines()))) == 3
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "image.png")
    found = _run(code, hub, tmp_path, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.split()[0].replace(".", "").replace("e-", "").isdigit()


def test_same_content_is_uploaded_once(hub, folder):
    publish(folder, REPO)
    before, hub.requests[:] = commits(hub), []
    assert publish(folder, REPO).uploaded == []
    assert commits(hub) == before and not hub.paths("PUT") and not [p for p in hub.paths() if "/commit/" in p]


def test_only_what_has_changed_is_uploaded(hub, folder, tmp_path):
    publish(folder, REPO)
    copy = shutil.copytree(folder, tmp_path / "copy")
    record = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps(record | {"seed": 7}))
    hub.requests.clear()
    assert "results.json" in publish(copy, REPO).uploaded and not hub.paths("PUT")


def test_edited_card_is_kept_and_said(hub, folder, tmp_path, capsys, caplog):
    publish(folder, REPO)
    edited = hub.files(REPO)["README.md"].replace(b"\n# ", b"\n# Our favourite: ", 1)
    hub.edit(REPO, {"README.md": edited})
    before = commits(hub)
    assert publish(folder, REPO).uploaded == [] and "was edited on the hub and is kept" in caplog.text
    assert main(["publish", "wafers", "--to", REPO]) == 0
    assert "was edited on the hub and is kept" in capsys.readouterr().out
    assert hub.files(REPO)["README.md"] == edited and commits(hub) == before
    assert main(["publish", "wafers", "--to", REPO, "--overwrite-card"]) == 0
    assert not is_edited(hub.files(REPO)["README.md"].decode()) and "edited" not in capsys.readouterr().out


def test_card_that_somebody_else_wrote_is_kept(hub, folder):
    hub.edit(REPO, {"README.md": b"# Mine\n", "notes.txt": b"keep"})
    lines = []
    publish(folder, REPO, say=lines.append)
    assert (
        hub.files(REPO)["README.md"] == b"# Mine\n" and "kept" in lines[0] and hub.files(REPO)["notes.txt"] == b"keep"
    )


@pytest.mark.parametrize("edit", ["x", " ", "\n", "a\n\n"])
def test_any_edit_shows(edit):
    card = signed("---\nlibrary_name: zoo\n---\n# A\n\ntext\n")
    assert not is_edited(card) and signed(card.rsplit("\n<!--", 1)[0]) == card
    assert is_edited(card + edit) and is_edited(edit + card) and is_edited(card.replace("text", "text" + edit))
    assert is_edited(card.replace("\n", "\r\n")) and is_edited("") and is_edited("# A\n")


def test_card_of_another_evaluation_form_goes(hub, folder):
    hub.edit(REPO, {EVALUATION: b"[]"})
    publish(folder, REPO)
    assert EVALUATION not in hub.files(REPO)  # of private images there is none


# ---- repository and tag ----------------------------------------------------------------------------------------------


def test_private_stays_private(hub, folder):
    publish(folder, REPO, private=True)
    assert hub.repos[f"models/{REPO}"]["private"]
    publish(folder, REPO)
    assert hub.repos[f"models/{REPO}"]["private"]
    hub.set_private(REPO, False)
    hub.requests.clear()
    with pytest.raises(ZooError, match="is public; make it private on its page"):
        publish(folder, REPO, private=True)
    assert not hub.paths("POST")


def test_a_model_of_another_method_is_not_replaced(hub, folder, capsys):
    for config, words in ((b'{"method": "padim"}', "a model of padim"), (b'{"model_type": "bert"}', "something else")):
        hub.edit(REPO, {"config.json": config})
        with pytest.raises(ZooError, match=f"holds {words}.*--replace"):
            publish(folder, REPO)
        assert hub.files(REPO)["config.json"] == config
    assert main(["publish", "wafers", "--to", REPO, "--replace"]) == 0
    assert from_pretrained(REPO).method == "patchcore"
    assert "public)" in capsys.readouterr().out


def test_a_model_that_has_learned_nothing_is_not_published(hub):
    from zoo import create_model

    with pytest.raises(ZooError, match="has learned nothing yet; fit it first"):
        create_model("patchcore", "lite").push_to_hub(REPO)
    assert not hub.requests


def test_branches_are_no_tags(hub, folder):
    publish(folder, REPO)
    with pytest.raises(ZooError, match="main is a branch"):
        publish(folder, REPO, tag="main")


def test_tags_are_not_moved(hub, folder, tmp_path):
    first = publish(folder, REPO, tag="v1")
    assert HfApi().list_repo_refs(REPO).tags[0].target_commit == first.commit
    assert publish(folder, REPO, tag="v1").uploaded == []  # the same again
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "results.json").write_text("{}")
    hub.requests.clear()
    with pytest.raises(ZooError, match=f"has a tag v1 already, at commit {first.commit[:7]}"):
        publish(copy, REPO, tag="v1")
    assert not [path for path in hub.paths() if "/commit/" in path]
    second = publish(copy, REPO, tag="v2")
    assert {tag.name: tag.target_commit for tag in HfApi().list_repo_refs(REPO).tags} == {
        "v1": first.commit,
        "v2": second.commit,
    }


def test_list_has_the_figures_that_decide(hub, folder):
    """Not those of another part of the test set, or by another score; and one odd card spoils nothing."""
    result = "{name: %s, type: x, value: %s%s}"
    metrics = ["image ROC", "0.75", ""], ["image ROC", "0.5", ", args: {score: latent}"], ["PRO", ".nan", ""]
    odd = ["image PR", "abc", ""], ["image F1", "[1, 2]", ""], ["pixel PR", "null", ""], ["pixel ROC", "0.25", ""]
    task = "{task: {type: x}, dataset: {type: y, name: wafers, config: %s}, metrics: [%s]}"
    parts = [("half", metrics), ("half", odd), ("full", [["pixel F1", "1", ""]])]
    text = ", ".join(task % (part, ", ".join(result % tuple(each) for each in of)) for part, of in parts)
    head = f"library_name: zoo\ntags: [zoo, iad-inpainting]\nmodel-index: [{{name: m, results: [{text}]}}]"
    head = head.replace("name: wafers", 'name: "wa\\e[2Jfers"').replace("zoo, iad", 'zoo, "a\\e", iad')
    hub.edit("fab/my_model", {"README.md": f"---\n{head}\n---\n".encode()})
    hub.edit("fab/empty", {})
    hub.edit("fab/no-card", {"README.md": b"hello"})
    for pattern in ("fab/*", "fab/my_model", "fab/my-model"):
        (model,) = list_models(pattern, remote=True)
        assert model == "fab/my_model" and model.method == "iad_inpainting" and model.data == "wa[2Jfers"
        assert model.metrics == {"image_auroc": 0.75, "pixel_auroc": 0.25}


def test_list_of_the_namespace_with_figures(hub, folder, monkeypatch, capsys):
    publish(folder, REPO)
    hub.edit("fab/other", {"README.md": b"---\nlibrary_name: timm\n---\n"})
    hub.edit("org/else", {"README.md": b"---\nlibrary_name: zoo\n---\n"})
    (model,) = list_models("fab/*", remote=True)
    record = json.loads(hub.files(REPO)["results.json"])
    assert model == REPO and model.method == "patchcore" and model.data == "private images"
    assert model.metrics == pytest.approx(record["metrics"]) and len(model.metrics) >= 3
    with pytest.raises(ZooError, match="ZOO_NAMESPACE"):
        list_models(remote=True)
    monkeypatch.setenv("ZOO_NAMESPACE", "fab")
    assert list_models(remote=True) == ["wafers"] == list_models("w*", remote=True) and not list_models("x*", True)
    assert main(["list", "--remote"]) == 0
    out = capsys.readouterr().out
    assert "wafers" in out and f"{record['metrics']['image_auroc']:.4f}" in out and "methods" not in out
    assert main(["list", "fab/*"]) == 2 and "zoo list 'fab/*' --remote" in capsys.readouterr().err
    hub.close()
    with pytest.raises(ZooError, match="can't be asked.*refused"):
        list_models(remote=True)
    assert not capsys.readouterr().err


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "words"), [(False, "hf auth login"), (READ, "may not write"), (STRANGER, "may not write|gone")]
)
def test_without_the_right_to_write(hub, folder, token, words, monkeypatch):
    with pytest.raises(ZooError, match=words) as caught:
        publish(folder, REPO, token=token)
    assert "\n" not in str(caught.value) and not hub.repos
    publish(folder, REPO)
    files = hub.files(REPO)
    hub.edit(REPO, {"config.json": b"{}"})
    with pytest.raises(ZooError, match=words):
        publish(folder, REPO, token=token, replace=True)
    assert hub.files(REPO)["config.json"] == b"{}" and files["results.json"] == hub.files(REPO)["results.json"]


def test_changed_meanwhile(hub, folder, monkeypatch):
    publish(folder, REPO)
    hub.edit(REPO, {"results.json": b"{}"})
    hub.fail("/commit/main", 412)
    with pytest.raises(ZooError, match="changed it meanwhile; publish again"):
        publish(folder, REPO)
    assert publish(folder, REPO).uploaded == ["results.json"]


def test_conflict_on_creation(hub, folder):
    hub.fail("/api/repos/create", 409)
    with pytest.raises(ZooError, match="failed") as caught:
        publish(folder, REPO)
    assert "\n" not in str(caught.value)


def test_server_in_trouble_for_a_moment(hub, folder):
    hub.fail("_lfs|/lfs/", 503)
    assert set(publish(folder, REPO).uploaded) == FILES
    assert from_pretrained(REPO).calibration == from_pretrained(folder).calibration


def test_commit_that_is_refused_leaves_the_repository_as_it_was(hub, folder):
    hub.fail("/commit/main", 400, times=99)
    with pytest.raises(ZooError, match="it answered 400"):
        publish(folder, REPO)
    assert commits(hub) == 1
    hub.heal()
    assert set(publish(folder, REPO).uploaded) == FILES


def test_server_that_is_gone_or_hangs(hub, folder):
    hub.hang("")
    with pytest.raises(ZooError, match=f"on {hub.url} failed"):
        publish(folder, REPO)
    hub.close()
    with pytest.raises(ZooError, match=f"on {hub.url} failed"):
        publish(folder, REPO)


@pytest.mark.parametrize("path", ["/repos/create", "/tree/", "/commit/main"])
def test_server_that_hangs_on_the_way(hub, folder, path, monkeypatch):
    monkeypatch.setattr("zoo.publish.SILENCE", 0.5)
    hub.hang(path)
    with pytest.raises(ZooError, match="failed .*: try again"):
        publish(folder, REPO)
    hub.heal()
    assert set(publish(folder, REPO).uploaded) == FILES


def test_offline_mode(folder, capsys):
    assert main(["publish", "wafers", "--to", REPO]) == 2
    assert "offline mode; unset HF_HUB_OFFLINE" in capsys.readouterr().err


@pytest.mark.parametrize("target", ["wafers", "a/b/c", "/x", "fab/", "fab/a b", "fab/../x", "fab/a--b"])
def test_targets(hub, folder, target, capsys):
    assert main(["publish", "wafers", "--to", target]) == 2
    assert "ORG/NAME" in capsys.readouterr().err and not hub.requests


def test_options(hub, folder, capsys):
    assert main(["publish", "wafers"]) == 2 and "--to ORG/REPO" in capsys.readouterr().err
    assert main(["publish", "wafers", "--to", REPO, "--tag", "a b"]) == 2 and "no tag" in capsys.readouterr().err
    assert main(["publish", "none", "--to", REPO]) == 2 and "No model 'none'" in capsys.readouterr().err
    assert main(["publish", "wafers", "--to", REPO, "--private", "--tag", "v1", "--message", "First"]) == 0
    out = capsys.readouterr().out
    assert REPO in out and "tag v1" in out and hub.repos[f"models/{REPO}"]["private"]
    assert main(["publish", "wafers", "--to", REPO]) == 0 and "has all of it already" in capsys.readouterr().out


def test_hub_that_has_no_xet(hub, folder, tmp_path):
    """A mirror inside a fab knows plain uploads alone; the client would go by Xet where it is installed."""
    code = f"from zoo.publish import publish; print(publish({str(folder)!r}, {REPO!r}).uploaded)"
    found = _run(code, hub, tmp_path, HF_HUB_DISABLE_XET="0")
    assert found.returncode == 0, found.stderr
    assert "model.safetensors" in found.stdout and "Xet" not in found.stderr and len(hub.paths("PUT")) == 1


def test_torch_is_not_needed(hub, folder, tmp_path):
    code = f"import sys; from zoo.cli import main; main(['publish', {str(folder)!r}, '--to', {REPO!r}])"
    found = _run(code + "; assert 'torch' not in sys.modules", hub, tmp_path)
    assert found.returncode == 0, found.stderr


def _run(code, hub, tmp_path, cwd=None, **variables):
    own = environment(hub, tmp_path / "hf", WRITE) | {"PYTHONPATH": str(Path(checkpoint.__file__).parents[1])}
    how = {"env": os.environ | own | variables, "cwd": cwd or tmp_path}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, **how)
