"""The tests' own hub against huggingface_hub's client: what it pushes comes back, and faults are what they say."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx2
import pytest
from hub_server import READ, STRANGER, WRITE, HubServer, environment
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

CARD = b"---\nlibrary_name: zoo\nlicense: other\ntags: [sem, anomaly]\ndatasets: [miic]\n---\n\n# A model\n"
WEIGHTS = bytes(range(256)) * 4000


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    (folder / ".eval_results").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "config.json").write_text("{}")
    (folder / ".eval_results/miic.yaml").write_text("[]")
    return folder


@pytest.fixture
def pushed(hub, folder):
    HfApi().create_repo("fab/model")
    HfApi().upload_folder(repo_id="fab/model", folder_path=folder)
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_is_pushed_comes_back(hub, pushed):
    path = snapshot_download("fab/model")
    got = {name: data for name, data in contents(Path(path)).items() if name != ".gitattributes"}
    assert got == contents(pushed)
    assert hub.files("fab/model")["model.safetensors"] == WEIGHTS
    assert len(hub.paths("PUT")) == 1 and len(hub.commits("fab/model")) == 2
    assert any(WEIGHTS in data for data in hub.uploaded().values())


def test_the_same_again_uploads_nothing(hub, pushed):
    before = hub.commits("fab/model")
    hub.requests.clear()
    HfApi().upload_folder(repo_id="fab/model", folder_path=pushed)
    assert hub.commits("fab/model") == before and not hub.paths("PUT")
    assert not [path for path in hub.paths() if "/commit/" in path]


def test_commits_tags_branches_and_deletions(hub, pushed):
    api, first = HfApi(), hub.commits("fab/model")[0]
    api.create_tag("fab/model", tag="v1")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_tag("fab/model", tag="v1")
    assert error.value.response.status_code == 409
    api.create_branch("fab/model", branch="trial/a")
    operations = [CommitOperationDelete("config.json"), CommitOperationAdd("new/deep.txt", b"text")]
    done = api.create_commit("fab/model", operations, commit_message="more", parent_commit=first)
    assert api.list_repo_files("fab/model") == sorted(
        {".eval_results/miic.yaml", ".gitattributes", "README.md", "model.safetensors", "new/deep.txt"}
    )
    assert "config.json" in api.list_repo_files("fab/model", revision="v1")
    assert "config.json" in api.list_repo_files("fab/model", revision="trial/a")
    assert api.model_info("fab/model", revision=done.oid[:10]).sha == done.oid
    assert [commit.commit_id for commit in api.list_repo_commits("fab/model")] == hub.commits("fab/model")
    late = CommitOperationAdd("late.txt", b"text")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit("fab/model", [late], commit_message="late", parent_commit=first)
    assert error.value.response.status_code == 412
    refs = api.list_repo_refs("fab/model")
    assert {ref.name for ref in refs.branches} == {"main", "trial/a"} and [ref.name for ref in refs.tags] == ["v1"]
    assert [item.path for item in api.list_repo_tree("fab/model")] == [
        ".eval_results",
        "new",
        ".gitattributes",
        "README.md",
        "model.safetensors",
    ]


def test_what_is_told_of_a_model(hub, pushed):
    info = HfApi().model_info("fab/model", files_metadata=True)
    weights = next(each for each in info.siblings if each.rfilename == "model.safetensors")
    assert weights.size == len(WEIGHTS) and weights.lfs.size == len(WEIGHTS)
    assert info.card_data.license == "other" and "sem" in info.tags
    paths = HfApi().get_paths_info("fab/model", ["README.md", ".eval_results", "nothing"])
    assert [each.path for each in paths] == ["README.md", ".eval_results"]
    HfApi().create_repo("fab/plain", private=True)
    listed = {model.id: model for model in HfApi().list_models(author="fab", cardData=True)}
    assert set(listed) == {"fab/model", "fab/plain"} and listed["fab/model"].card_data.datasets == ["miic"]
    assert [model.id for model in HfApi().list_models(filter=["zoo", "dataset:miic"])] == ["fab/model"]
    assert [model.id for model in HfApi().list_models(author="fab", token=STRANGER)] == ["fab/model"]
    assert HfApi().whoami()["name"] == "maker"
    with pytest.raises(HfHubHTTPError):
        HfApi().create_repo("fab/model")


def test_who_may_do_what(hub, pushed):
    hub.set_private("fab/model")
    for token, status in ((False, 401), (STRANGER, 404)):
        with pytest.raises(RepositoryNotFoundError) as error:
            HfApi().model_info("fab/model", token=token)
        assert error.value.response.status_code == status
    with pytest.raises(HfHubHTTPError) as error:
        HfApi().model_info("fab/model", token="hf_made_up")
    assert not isinstance(error.value, RepositoryNotFoundError) and error.value.response.status_code == 401
    assert HfApi().model_info("fab/model", token=READ).private
    for attempt in (
        lambda: HfApi(token=READ).create_repo("fab/another"),
        lambda: HfApi().create_repo("somebody/model"),
        lambda: HfApi(token=READ).upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id="fab/model"),
    ):
        with pytest.raises(HfHubHTTPError) as error:
            attempt()
        assert error.value.response.status_code == 403
    with pytest.raises(RevisionNotFoundError):
        HfApi().model_info("fab/model", revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download("fab/model", "nothing.bin")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("fab/nothing", "config.json")


def test_an_upload_that_is_damaged_on_its_way_is_refused(hub, pushed):
    answer = httpx2.put(f"{hub.url}/lfs/{'0' * 64}", content=b"something else")
    assert answer.status_code == 400 and not hub.blob("0" * 64).exists()
    pointer = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 9}}
    answer = httpx2.post(
        f"{hub.url}/api/models/fab/model/commit/main", json=pointer, headers={"Authorization": f"Bearer {WRITE}"}
    )
    assert answer.status_code == 400 and "x.bin" not in hub.files("fab/model")


def test_a_cut_download_goes_on_where_it_stopped(hub, pushed, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)  # what the client keeps of a cut one: whole chunks
    hub.truncate("resolve/.*safetensors", after=300_000, method="GET")
    path = hf_hub_download("fab/model", "model.safetensors")
    assert open(path, "rb").read() == WEIGHTS
    gets = [each for each in hub.requests if each.method == "GET" and each.path.endswith(".safetensors")]
    assert [each.status for each in gets] == [200, 206]


def test_faults_are_what_they_say(hub, pushed):
    hub.fail("api/models", 503)
    hub.fail("api/models", 429, Retry_After="7")
    for status in (503, 429):
        with pytest.raises(HfHubHTTPError) as error:
            HfApi().model_info("fab/model")
        assert error.value.response.status_code == status
    assert error.value.response.headers["Retry-After"] == "7"
    assert HfApi().model_info("fab/model").id == "fab/model"
    hub.lose("commit/main")
    before = len(hub.commits("fab/model"))
    with pytest.raises(httpx2.RemoteProtocolError):
        HfApi().upload_file(path_or_fileobj=b"new", path_in_repo="x", repo_id="fab/model")
    assert len(hub.commits("fab/model")) == before + 1 and hub.files("fab/model")["x"] == b"new"
    hub.slow("whoami", seconds=0.3)
    begin = time.monotonic()
    HfApi().whoami()
    assert time.monotonic() - begin >= 0.3


def test_a_hub_that_hangs_ends_at_once_when_it_is_closed(tmp_path, hub, pushed):
    hub.hang(seconds=10**6)
    with pytest.raises(httpx2.ReadTimeout):
        HfApi().model_info("fab/model", timeout=0.3)
    hub.close()  # which waits for what hangs to end
    with pytest.raises((httpx2.NetworkError, LocalEntryNotFoundError)):
        HfApi().model_info("fab/model")


def test_a_process_of_its_own_pulls_what_another_has_pushed(tmp_path, hub, pushed):
    code = "from huggingface_hub import hf_hub_download as get; print(get('fab/model', 'README.md'))"
    for server in (hub, None):
        if server is None:
            hub.close()
            server = HubServer(hub.root)
        env = os.environ | environment(server, tmp_path / f"home{server.port}")
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        assert open(done.stdout.strip(), "rb").read() == CARD
    server.close()
