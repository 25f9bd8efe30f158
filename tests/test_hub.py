"""Models from the hub by its own client over HTTP: names, revisions, cache, no network, and what is refused."""

import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hub_server import READ, STRANGER, environment
from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
from miic_replica import make
from safetensors.torch import load_file, save_file

from zoo import checkpoint, hub, remote
from zoo.cli import main
from zoo.errors import ZooError
from zoo.fit import fit
from zoo.hub import find_model, from_pretrained, list_models, model_place
from zoo.publish import publish

REPO = "fab/miic-padim"
IMAGES = torch.rand(3, 1, 80, 80, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def fitted(mvtec):
    return fit("padim", str(mvtec), preset="lite", arguments={"input_size": 64, "dims": 10})[0]


@pytest.fixture(scope="module")
def folder(fitted, tmp_path_factory):
    return fitted.save_pretrained(tmp_path_factory.mktemp("models") / "model", private={"heldout.csv": "image,score\n"})


@pytest.fixture
def published(hub, folder):
    return publish(folder, REPO)


@torch.inference_mode()
def scores(model):
    return torch.cat([part.flatten() for part in model(IMAGES)])


def same(model, other):
    return torch.equal(scores(model), scores(other))


def refused(name, words, **how):
    with pytest.raises(ZooError, match=words) as caught:
        from_pretrained(name, **how)
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text and text.count(". ") == 0


def soon(ask, *arguments, seconds=5, **how):
    """Whether something is over within so many seconds: the machine may be busy, so the best of ten tries counts."""
    for _ in range(10):
        start = time.monotonic()
        ask(*arguments, **how)
        if time.monotonic() - start < seconds:
            return True
    return False


def altered(folder, tmp_path, **changes):
    """A copy of the model's files as they lie on a hub, with another configuration, by name and content."""
    files = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors", "README.md")}
    config = json.loads(files["config.json"])
    for key, value in changes.items():
        *path, last = key.split("__")
        place = config
        for part in path:
            place = place[part]
        place[last] = value
    return files | {"config.json": json.dumps(config).encode()}


# ---- names -----------------------------------------------------------------------------------------------------------


def test_bit_identical_by_name_and_again_with_the_server_gone(hub, published, fitted):
    assert same(from_pretrained(REPO), fitted)
    hub.close()
    assert same(from_pretrained(REPO), fitted)
    assert same(from_pretrained(REPO, revision=published.commit), fitted)


def test_bare_name_in_the_namespace(hub, published, fitted, monkeypatch):
    with pytest.raises(ZooError, match="ORG/miic-padim, or miic-padim with ZOO_NAMESPACE=ORG"):
        from_pretrained("miic-padim")
    monkeypatch.setenv("ZOO_NAMESPACE", "fab")
    assert same(from_pretrained("miic-padim"), fitted) and same(from_pretrained("miic_padim"), fitted)
    refused("miic-cfa", "no model fab/miic-cfa")


def test_underscore_of_a_repository(hub, folder, fitted, monkeypatch):
    publish(folder, "fab/my_model")
    monkeypatch.setenv("ZOO_NAMESPACE", "fab")
    assert same(from_pretrained("my_model"), fitted) and same(from_pretrained("fab/my_model"), fitted)
    refused("my-model", "no model fab/my-model")


def test_no_namespace_by_default(monkeypatch):
    monkeypatch.delenv("ZOO_NAMESPACE", raising=False)
    assert hub.namespace() == ""
    refused("miic-cfa", "zoo fit cfa --data miic:DIR --name miic-cfa ")
    refused("miic-iad-inpainting", "zoo fit iad-inpainting --data miic:DIR --name miic-iad-inpainting ")
    refused("my-model", "zoo fit METHOD --data DATA --name my-model ")


def test_command_that_the_error_shows_trains_the_model(tmp_path):
    make(tmp_path / "miic", train=30, normal=4, abnormal=4, size=64, traps=())
    with pytest.raises(ZooError) as caught:
        from_pretrained("miic-cfa")
    shown = re.search(r"train it: zoo (fit .*?) \((--preset lite) without", str(caught.value))
    command = shown[1].replace("miic:DIR", f"miic:{tmp_path / 'miic'}").split() + shown[2].split()
    assert main([*command, "--max-steps", "2", "--input-size", "64"]) == 0
    model = from_pretrained("miic-cfa")
    assert model.method == "cfa" and model.record["train_data"]["name"] == "miic-replica"
    with pytest.raises(ZooError, match="there are miic-cfa"):
        from_pretrained("miic-cfb")


def test_local_model_comes_first_and_has_no_revision(hub, published, fitted, monkeypatch):
    monkeypatch.setenv("ZOO_NAMESPACE", "fab")
    fitted.save_pretrained(model_place("miic-padim"))
    hub.requests.clear()
    assert find_model("miic-padim") == model_place("miic-padim") and not hub.requests
    refused("miic-padim", "no revision 'v1'", revision="v1")
    refused("miic-padim@v1", "no revision 'v1'")
    refused(model_place("miic-padim"), "no revision 'v1'", revision="v1")


def test_local_folder_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("./fab/miic", "../miic", "a/b/c", str(tmp_path / "none"), Path("fab/miic")):
        refused(name, "no model folder")


def test_class_of_the_method(hub, published, fitted):
    from zoo.methods.cfa import CFA
    from zoo.methods.padim import PaDiM

    assert same(PaDiM.from_pretrained(REPO), fitted)
    with pytest.raises(ZooError, match="is a model of padim"):
        CFA.from_pretrained(REPO)


# ---- revisions -------------------------------------------------------------------------------------------------------


def test_revisions(hub, published, fitted, mvtec):
    HfApi().create_tag(REPO, tag="v1")
    HfApi().create_branch(REPO, branch="trial")
    other, _ = fit("padim", str(mvtec), preset="lite", arguments={"input_size": 64, "dims": 12})
    newer = other.push_to_hub(REPO)
    for revision, model in ((None, other), ("main", other), (newer.commit, other), ("v1", fitted), ("trial", fitted)):
        assert same(from_pretrained(REPO, revision), model)
        assert same(from_pretrained(f"{REPO}@{revision}" if revision else REPO), model)
    assert same(from_pretrained(REPO, published.commit[:8]), fitted)
    refused(REPO, "no branch, tag or commit 'v2'", revision="v2")
    hub.close()
    assert same(from_pretrained(REPO, "v1"), fitted) and same(from_pretrained(REPO), other)


def test_commit_that_is_cached_is_not_asked_for(hub, published, fitted):
    from_pretrained(REPO)
    hub.requests.clear()
    assert same(from_pretrained(REPO, published.commit), fitted) and not hub.requests


def test_another_download_of_the_same_commit_is_not_made(hub, published):
    from_pretrained(REPO)
    hub.requests.clear()
    from_pretrained(REPO)
    assert [each.method for each in hub.requests if "/resolve/" in each.path] == ["HEAD", "HEAD"]
    from_pretrained(REPO, force_download=True)
    assert any("/resolve/" in path for path in hub.paths("GET"))


# ---- cache and offline mode ------------------------------------------------------------------------------------------


def test_offline_mode_takes_the_cache_alone(hub, published, fitted, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert soon(refused, REPO, "not in the hub's cache", local_files_only=True, seconds=1)
    from_pretrained(REPO)
    hub.requests.clear()
    assert same(from_pretrained(REPO, local_files_only=True), fitted)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert same(from_pretrained(REPO), fitted) and not hub.requests
    refused("fab/other", "HF_HUB_OFFLINE.*HF_ENDPOINT.*hf download fab/other.*ORG/NAME@COMMIT")
    refused(f"{REPO}@v9", f"hf download {REPO} --revision v9 .*; the cache has {REPO}@main.$")
    Path("fab").mkdir()  # of which a folder may have been meant
    refused("fab/other", "There is no folder fab/other, and as a repository: ")


def test_cache_of_the_hubs_own_tools_is_taken(hub, published, fitted, tmp_path):
    snapshot_download(REPO)
    snapshot_download(REPO, local_dir=tmp_path / "by-hand")
    hf = Path(sys.executable).with_name("hf")
    subprocess.run([hf, "download", REPO, "--local-dir", tmp_path / "hf"], check=True, capture_output=True)
    hub.close()
    for name in (REPO, tmp_path / "by-hand", tmp_path / "hf"):
        assert same(from_pretrained(name), fitted)


def test_list_and_other_tools_leave_the_cached_model_as_it_was(hub, published, fitted):
    from_pretrained(REPO)
    hub.edit(REPO, {"README.md": b"# No metadata\n"})
    list_models("fab/*", remote=True)
    assert (Path(constants.HF_HUB_CACHE) / "models--fab--miic-padim/refs/main").read_text() == published.commit
    hf_hub_download(REPO, "README.md")  # moves the note to a commit of which the cache has no more
    assert (Path(constants.HF_HUB_CACHE) / "models--fab--miic-padim/refs/main").read_text() != published.commit
    hub.close()
    assert same(from_pretrained(REPO), fitted)


def test_damaged_cache_is_fetched_anew(hub, published, fitted):
    path = find_model(REPO) / "model.safetensors"
    for damage in (lambda data: data[:-1] + bytes([data[-1] ^ 1]), lambda data: data[:1000], lambda data: b""):
        path.resolve().write_bytes(damage(path.read_bytes()))
        assert same(from_pretrained(REPO), fitted)
    path.resolve().write_bytes(b"")
    hub.close()
    refused(REPO, "can't be asked")


def test_own_cache_folder(hub, published, fitted, tmp_path):
    from_pretrained(REPO, cache_dir=tmp_path / "shared")
    assert not Path(constants.HF_HUB_CACHE).exists() and (tmp_path / "shared").is_dir()
    hub.close()
    assert same(from_pretrained(REPO, cache_dir=tmp_path / "shared"), fitted)


def test_download_that_fails_leaves_the_earlier_one(hub, published, fitted, mvtec, folder):
    from_pretrained(REPO)
    fit("padim", str(mvtec), preset="lite", arguments={"input_size": 64, "dims": 12})[0].push_to_hub(REPO)
    hub.fail("/resolve/.*safetensors", 403, times=99, method="GET")
    refused(REPO, "download of fab/miic-padim failed .it answered 403")
    hub.close()
    assert same(from_pretrained(REPO), fitted)


# ---- no answer -------------------------------------------------------------------------------------------------------


def test_no_network(hub, monkeypatch):
    hub.close()
    assert soon(refused, REPO, "can't be asked.*connect once.*HF_ENDPOINT.*--local-dir.*@COMMIT")


def test_server_that_hangs(hub, published, fitted):
    from_pretrained(REPO)
    hub.hang("")
    assert soon(refused, "fab/other", "can't be asked")
    assert same(from_pretrained(REPO), fitted) and soon(from_pretrained, REPO)


@pytest.mark.parametrize("path", ["/resolve/", "safetensors"])
def test_server_that_hangs_behind_its_first_answer(hub, published, path):
    hub.hang(path)
    assert soon(refused, REPO, "can't be asked")


@pytest.mark.parametrize("status", [500, 503, 429])
def test_server_in_trouble(hub, published, fitted, status):
    hub.fail("/api/models/", status, times=99)
    assert soon(refused, REPO, f"it answered {status}")
    hub.heal()
    from_pretrained(REPO)
    hub.fail("/api/models/", status, times=99)
    assert same(from_pretrained(REPO), fitted)


def test_page_of_a_firewall(hub, published, monkeypatch):
    """Any address is answered by some page."""
    import http.server
    import threading

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>Please log in to the guest network</html>")

        def log_message(self, *args):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    assert soon(refused, REPO, "can't be asked")
    server.shutdown()


def test_truncated_download_goes_on_where_it_was_cut(hub, published, fitted, folder, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 2**16)
    size = (folder / "model.safetensors").stat().st_size
    hub.truncate("/resolve/.*safetensors", after=size // 2, method="GET")
    hub.requests.clear()
    assert same(from_pretrained(REPO), fitted)
    assert [each.status for each in hub.requests if each.method == "GET" and "safetensors" in each.path] == [200, 206]


# ---- access ----------------------------------------------------------------------------------------------------------


def test_private_repository(hub, folder, fitted, monkeypatch):
    publish(folder, REPO, private=True)
    assert same(from_pretrained(REPO), fitted)
    assert same(from_pretrained(REPO, token=READ, force_download=True), fitted)
    for token in (STRANGER, False):
        refused(REPO, "private.*hf auth login", token=token, force_download=True)
    monkeypatch.setenv("HF_TOKEN", STRANGER)
    assert same(from_pretrained(REPO), fitted)  # what was fetched once, with a word


def test_token_that_is_refused(hub, published):
    refused(REPO, "refuses the token .it answered 401.*hf auth login", token="hf_bogus")


def test_word_on_a_copy_that_may_be_old(hub, published, caplog):
    from_pretrained(REPO)
    hub.set_private(REPO)
    from_pretrained(REPO, token=False)
    assert "no model fab/miic-padim" in caplog.text and published.commit[:7] in caplog.text


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, "format version 2, newer than 1; install a newer zoo"),
        ({"surprise": 1}, "'surprise'"),
        ({"preprocessing__denoise": True}, "'denoise'"),
        ({"preprocessing__mean": [0.1, 0.1, 0.1]}, "'mean'"),
        ({"calibration__spread": 1}, "'spread'"),
        ({"arguments__backbone": "nothing_at_all"}, "no backbone"),
        ({"arguments__dims": 10**9}, "shape|dims"),
        ({"arguments__input_size": 10**9}, "input_size"),
        ({"learned": {"mean": [10**12, 10]}}, "shape"),
    ],
)
def test_configuration_that_is_not_understood(hub, folder, tmp_path, changes, words, monkeypatch):
    hub.edit(REPO, altered(folder, tmp_path, **changes))
    monkeypatch.setattr("safetensors.torch.load_file", None)  # no weight is ever read
    refused(REPO, words)


def test_other_weights_are_not_even_fetched(hub, folder, tmp_path):
    files = altered(folder, tmp_path)
    state = load_file(folder / "model.safetensors")
    state["center"] = torch.zeros(10**6)
    save_file(state, tmp_path / "other.safetensors")
    hub.edit(REPO, files | {"model.safetensors": (tmp_path / "other.safetensors").read_bytes()})
    refused(REPO, "not the weights that its config.json names")
    assert not [path for path in hub.paths("GET") if path.endswith("safetensors")]


def test_repository_of_others(hub):
    hub.edit("fab/bert", {"config.json": b'{"model_type": "bert"}', "model.safetensors": b"x"})
    refused("fab/bert", "no configuration of the zoo")
    hub.edit("fab/text", {"notes.txt": b"hello"})
    refused("fab/text", "no model of the zoo: it has no config.json")
    refused("fab/none", "no model fab/none")
    refused("fab/--", "no name of a repository|no model folder")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "last.ckpt", "model.pt", "data.pickle"])
def test_pickles_alone(hub, folder, name):
    hub.edit(REPO, {"config.json": (folder / "config.json").read_bytes(), name: b"\x80\x04."})
    refused(REPO, f"{name}, which can run code.*only safetensors")
    assert not [path for path in hub.paths() if path.endswith(name)]


def test_header_of_a_bomb(hub, folder, tmp_path):
    files = altered(folder, tmp_path)
    header = b" " * (checkpoint.LARGEST_HEADER + 1)
    weights = struct.pack("<Q", len(header)) + header
    config = json.loads(files["config.json"]) | {"weights_sha256": __import__("hashlib").sha256(weights).hexdigest()}
    hub.edit(REPO, {"config.json": json.dumps(config).encode(), "model.safetensors": weights})
    refused(REPO, "header of 4,194,305 bytes")


def test_configuration_of_a_bomb(hub, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(checkpoint.LARGEST, "config.json", 1000)
    hub.edit(REPO, altered(folder, tmp_path))
    refused(REPO, "larger than 1,000 bytes")
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_bytes(b"[" * 100_000)
    monkeypatch.undo()
    with pytest.raises(ZooError, match="no configuration of the zoo"):
        checkpoint.read_config(tmp_path / "m")


# ---- lists -----------------------------------------------------------------------------------------------------------


def test_commands_with_a_model_of_the_hub(hub, published, mvtec, tmp_path, capsys):
    before = {path: path.read_bytes() for path in Path(find_model(REPO)).rglob("*") if path.is_file()}
    assert main(["predict", REPO, str(mvtec / "test"), "--out", str(tmp_path / "out")]) == 0
    assert main(["evaluate", f"{REPO}@main", "--data", str(mvtec)]) == 0
    assert "not kept" in capsys.readouterr().out
    assert main(["calibrate", REPO, "--data", str(mvtec), "--false-alarm-rate", "0.5"]) == 2
    assert "zoo import" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in Path(find_model(REPO)).rglob("*") if path.is_file()} == before


def test_local_list_has_figures(mvtec, capsys):
    fit("padim", str(mvtec), "a", "lite", arguments={"input_size": 64, "dims": 10})
    assert main(["evaluate", "a", "--data", str(mvtec)]) == 0
    (model,) = list_models()
    record = checkpoint.read_json(model_place("a") / "results.json")
    assert model == "a" and model.method == "padim" and model.data == "tiles" and model.metrics == record["metrics"]


def test_backbone_from_a_mirror_is_part_of_the_model(hub, mvtec, tmp_path):
    """ImageNet weights come by the same way as models, once: afterwards the model has all that it needs."""
    import timm

    state = timm.create_model("resnet18.tv_in1k", pretrained=False).state_dict()
    save_file(state, tmp_path / "resnet.safetensors")
    hub.edit("timm/resnet18.tv_in1k", {"model.safetensors": (tmp_path / "resnet.safetensors").read_bytes()})
    arguments = {"backbone": "resnet18.tv_in1k", "input_size": 64, "bank_size": 50}
    model, _ = fit("patchcore", str(mvtec), preset="lite", arguments=arguments)
    assert model.features.source["weights"] == "hub:timm/resnet18.tv_in1k"
    assert torch.equal(model.features.trunk.conv1.weight, state["conv1.weight"])
    model.push_to_hub("fab/resnet")
    del hub.repos["models/timm/resnet18.tv_in1k"]
    loaded = from_pretrained("fab/resnet", cache_dir=tmp_path / "elsewhere")
    assert same(loaded, model) and loaded.features.source == model.features.source


# ---- a clean process -------------------------------------------------------------------------------------------------


def test_import_asks_nobody_and_errors_come_before_torch(hub, tmp_path):
    code = (
        "import sys, zoo\n"
        "try: zoo.from_pretrained('fab/none')\n"
        "except zoo.ZooError as error: print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    found = _python(code, hub, tmp_path)
    assert found.returncode == 0 and "no model fab/none" in found.stdout


def test_unresolvable_host_is_no_wait(tmp_path):
    variables = {"HF_ENDPOINT": "http://hub.invalid", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    assert soon(_cannot_be_asked, tmp_path, seconds=9, **variables)  # with Python's start


def test_port_that_takes_no_connection(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
        variables = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
        assert soon(_cannot_be_asked, tmp_path, seconds=9, **variables)


def _cannot_be_asked(tmp_path, **variables):
    code = "import zoo\ntry: zoo.from_pretrained('fab/none')\nexcept zoo.ZooError as error: print(error)"
    assert "can't be asked" in _python(code, None, tmp_path, **variables).stdout


def _python(code, hub, tmp_path, **variables):
    own = environment(hub, tmp_path / "hf") if hub else variables
    env = os.environ | own | {"PYTHONPATH": str(Path(remote.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)
