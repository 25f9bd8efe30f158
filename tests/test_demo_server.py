"""What the demo's tabs share: whose files are whose, when they go, which model is offered, what a card may show."""

import asyncio
import os
from types import SimpleNamespace

import pytest

from zoo import checkpoint
from zoo.cli import main
from zoo.demo.about_tab import card_of
from zoo.demo.engine import Engine
from zoo.demo.run import Room
from zoo.demo.server import Server
from zoo.demo.settings import Settings
from zoo.demo.uploads import Uploads
from zoo.errors import ZooError


@pytest.fixture(scope="module")
def home(mvtec, tmp_path_factory):
    """A registry with `plain` and `stated`, which is calibrated."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZOO_HOME", str(home))
        fit = ("patchcore", "--preset", "lite", "--input-size", "64", "--bank-size", "50", "--data", str(mvtec))
        for name in ("plain", "stated"):
            assert main(["fit", *fit, "--name", name]) == 0
        assert main(["calibrate", "stated", "--data", str(mvtec), "--false-alarm-rate", "0.2"]) == 0
    return home


@pytest.fixture
def uploads():
    with Uploads() as uploads:
        yield uploads


@pytest.fixture
def server(home, uploads, monkeypatch):
    monkeypatch.setenv("ZOO_HOME", str(home))
    return Server(Settings(), Engine(), uploads, [])


def visitor(name):
    return SimpleNamespace(session_hash=name)


def put(uploads, name, content=b"x"):
    path = uploads.folder / name / "image.png"
    path.parent.mkdir()
    path.write_bytes(content)
    return path


def test_files_go_when_the_last_one_who_has_them_leaves(server, uploads):
    own, shared = put(uploads, "a"), put(uploads, "b")
    server.took(visitor("one"), own, shared)
    server.took(visitor("two"), shared)
    server.left(visitor("one"))
    assert not own.exists() and shared.exists()
    server.left(visitor("two"))
    assert not shared.exists() and list(uploads.folder.iterdir()) == [] and not server._files


def test_what_is_old_goes_whoever_has_it(server, uploads, monkeypatch):
    old, new = put(uploads, "old"), put(uploads, "new")
    empty = uploads.folder / "empty"
    empty.mkdir()
    server.took(visitor("one"), old)
    server.took(visitor("two"), new)
    real = os.lstat
    later = real(new).st_ctime + 16 * 60  # ctime can't be set: the clock goes on instead
    monkeypatch.setattr("zoo.demo.uploads.time.time", lambda: later)
    new.write_bytes(b"touched")
    os.utime(new, (later, later))
    server.sweep()
    assert not old.exists() and new.exists() and not empty.exists()
    assert set(server._files) == {"two"}


def test_no_further_uploads_where_there_is_no_room(uploads, monkeypatch):
    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    def ask(path):
        answers = []

        async def send(message):
            answers.append(message)

        asyncio.run(Room(app, uploads)({"type": "http", "path": path}, None, send))
        return answers[0]["status"]

    put(uploads, "a", b"1234")
    assert ask("/gradio_api/upload") == 200
    monkeypatch.setattr("zoo.demo.uploads.MAX_TOTAL", 3)
    assert ask("/gradio_api/upload") == 507 and ask("/gradio_api/queue/join") == 200


def test_the_model_that_is_offered_first_states_a_rate_and_can_be_loaded(server, home):
    assert server.engine.names() == ["plain", "stated"] and server.chosen(None) == "stated"
    assert server.choices() == [("plain (not calibrated)", "plain"), ("stated", "stated")]
    server.engine.failed.add("stated")
    assert server.chosen("") == "plain"


def test_evidence_is_shown_where_strangers_do_not_see_it(server, home, uploads, mvtec):
    path = mvtec / "test/square/000.png"
    assert server.look(path, "stated").pairs
    others = Server(Settings(show_training=False), server.engine, uploads, [])
    assert others.look(path, "stated").pairs is None


def test_a_model_that_fails_is_told_by_name(server, home, tmp_path):
    weights = home / "models/stated/model.safetensors"
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[:1000])
        with pytest.raises(ZooError, match="The model stated can't be loaded"):
            server.engine.model("stated")
        assert "stated" in server.engine.failed and server.preferred(server.engine.names()) == "plain"
    finally:
        weights.write_bytes(whole)
    server.engine.add("stated")
    assert server.engine.model("stated") and not server.engine.failed


def test_what_a_visitor_is_told_names_no_place(server, uploads, home):
    for place in (uploads.folder / "abc", home / "models"):
        told = server.alert(ZooError(f"{place}/<b>x.png is broken"))
        assert str(place) not in told and "&lt;b&gt;x.png is broken." in told


def test_a_strangers_card_is_text(tmp_path):
    """No HTML, no picture, no heading of the page's level; code stays as it is."""
    card = "---\ntags: [x]\n---\n# Title\n\n<img src=http://a/b> ![words](http://a/c.png) ![ref][r] `a < b` [link](http://d)\n"
    card += "```\n# comment <b>\nfrom_pretrained('path/to/this/folder')\n```\n<form action=http://e>\n"
    (tmp_path / checkpoint.CARD).write_text(card)
    text = card_of(tmp_path, "name")
    assert text.startswith("## Title") and "tags" not in text
    assert "<img" not in text and "<form" not in text and "&lt;form" in text and "c.png" not in text and "words" in text
    assert "`a < b`" in text and "# comment <b>\nfrom_pretrained('name')" in text and "[link](http://d)" in text
    with pytest.raises(ZooError, match="name has no card"):
        card_of(tmp_path / "nowhere", "name")
