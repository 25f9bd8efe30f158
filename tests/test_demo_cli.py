"""The command `zoo demo`: what it starts the demo with, and what it answers to mistakes, before torch and gradio."""

import json
import os
import pty
import signal
import socket
import subprocess
import sys
import types

import pytest

from zoo import cli_demo
from zoo.cli import main
from zoo.demo.settings import Settings
from zoo.fit import fit
from zoo.hub import model_place

VARIABLES = (
    *("ZOO_DEMO_HUB", "ZOO_DEMO_USER", "ZOO_DEMO_PASSWORD", "ZOO_NAMESPACE", "SYSTEM"),
    *("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"),
)
# A process whose zoo.demo.app waits instead of serving.
SERVING = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
import sys, time, types
def serve(settings):
    print("serving", flush=True)
    time.sleep(300)
app = types.ModuleType("zoo.demo.app")
app.serve = serve
sys.modules["zoo.demo.app"] = app
from zoo.cli import main
sys.exit(main(["demo", *sys.argv[1:]]))
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False, raising=False)  # nobody is there to be asked


@pytest.fixture
def served(monkeypatch):
    """Settings that the demo was started with, one of each start."""
    found = []
    app = types.ModuleType("zoo.demo.app")
    app.serve = found.append
    monkeypatch.setitem(sys.modules, "zoo.demo.app", app)
    return found


@pytest.fixture(scope="module")
def folder(mvtec, tmp_path_factory):
    model = fit("padim", str(mvtec), preset="lite", arguments={"input_size": 64, "dims": 10})[0]
    return model.save_pretrained(tmp_path_factory.mktemp("models") / "one")


@pytest.fixture
def models(folder):
    """Two models of the local registry, one of which can't be read."""
    place = model_place("fine")
    place.parent.mkdir(parents=True)
    place.symlink_to(folder)
    model_place("broken").mkdir()
    (model_place("broken") / "config.json").write_text("{")


@pytest.fixture
def taken():
    """A port that another program listens on."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def run(*argv):
    return main(["demo", *map(str, argv)])


def started(served, *argv):
    assert run(*argv) == 0
    return served.pop()


def refused(capsys, *argv):
    capsys.readouterr()
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("zoo: ") and error.count("\n") == 1 and "Traceback" not in error
    return error


def test_plain_start(served):
    assert started(served) == Settings(port=served_port(7860))


def served_port(first):
    """What is free here: the machine may run a demo of its own."""
    return next(p for p in range(first, first + 100) if cli_demo._why_not("127.0.0.1", p) is None)


def test_options_become_settings(served, models, folder, monkeypatch):
    monkeypatch.setenv("ZOO_DEMO_PASSWORD", "s3cret, very")
    monkeypatch.chdir(folder.parent)
    port = served_port(9300)
    found = started(
        served,
        *("--name", "fine", "./one", "--hub", "org/a", "org/b@v1", "--host", "localhost", "--port", port),
        *("--user", "ann", "--open", "--finetune", "false", "--device", "cpu"),
    )
    assert found == Settings(
        names=["fine", str(folder)],
        hub=["org/a", "org/b@v1"],
        host="localhost",
        port=port,
        user="ann",
        password="s3cret, very",
        open_browser=True,
        finetune=False,
        device="cpu",
    )
    assert "s3cret" not in repr(found) and "s3cret" not in str(found)


def test_models(served, models, folder):
    every = started(served)
    assert (every.names, every.hub) == ([], [])  # of the registry as it is when the page is loaded
    assert started(served, "--name", "fine").names == ["fine"]
    assert started(served, "--name", "fine", folder, "--name", "fine", folder).names == ["fine", str(folder)]
    only = started(served, "--hub", "org/a", "--hub", "org/b", "org/a")
    assert (only.names, only.hub) == ([], ["org/a", "org/b"])


def test_a_name_is_written_with_dashes_or_underscores(served, models, folder):
    model_place("of-two-words").symlink_to(folder)
    assert started(served, "--name", "of_two_words").names == ["of-two-words"]


def test_namespace_of_bare_names(served, models, monkeypatch):
    monkeypatch.setenv("ZOO_NAMESPACE", "org")
    found = started(served, "--name", "fine", "elsewhere", "pinned@v1", "--hub", "third")
    assert (found.names, found.hub) == (["fine"], ["org/elsewhere", "org/pinned@v1", "org/third"])


def test_variables_stand_for_options_where_there_are_none(served, models, monkeypatch):
    port = served_port(9400)
    monkeypatch.setenv("ZOO_DEMO_HUB", "org/a, org/b org/c@v1")
    monkeypatch.setenv("GRADIO_SERVER_NAME", "0.0.0.0")
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(port))
    monkeypatch.setenv("ZOO_DEMO_USER", "ann")
    monkeypatch.setenv("ZOO_DEMO_PASSWORD", "x")
    found = started(served)
    assert found == Settings([], ["org/a", "org/b", "org/c@v1"], "0.0.0.0", port, "ann", "x")
    other = started(served, "--name", "fine", "--host", "127.0.0.1", "--port", served_port(9500), "--user", "bob")
    assert other.names == ["fine"] and other.hub == [] and other.host == "127.0.0.1" and other.port != port
    assert other.user == "bob"


@pytest.mark.parametrize(
    ("host", "password", "space", "finetune", "warned"),
    [
        ("127.0.0.1", None, False, True, False),
        ("localhost", None, False, True, False),
        ("0.0.0.0", None, False, False, True),
        ("0.0.0.0", "x", False, True, False),
        ("0.0.0.0", None, True, False, False),  # a Space is as private as its owner has set it
    ],
)
def test_open_to_others(served, monkeypatch, capsys, host, password, space, finetune, warned):
    if password:
        monkeypatch.setenv("ZOO_DEMO_PASSWORD", password)
        monkeypatch.setenv("ZOO_DEMO_USER", "ann")
    if space:
        monkeypatch.setenv("SYSTEM", "spaces")
    assert started(served, "--host", host).finetune is finetune
    text = capsys.readouterr().err
    assert text.startswith("Warning: ") is warned and text.count("\n") == warned
    assert not warned or "ZOO_DEMO_PASSWORD" in text
    assert started(served, "--host", host, "--finetune", "true").finetune
    assert not started(served, "--host", host, "--finetune", "false").finetune


def test_ports(served, taken, capsys, monkeypatch):
    assert f"--port {taken}" in (said := refused(capsys, "--port", taken)) and "leave it out" in said
    assert str(taken) in refused(capsys, "--port", taken, "--host", "0.0.0.0")
    monkeypatch.setattr(cli_demo, "FIRST_PORT", taken)
    monkeypatch.setattr(cli_demo, "PORTS", 1)
    assert f"No port from {taken} to {taken} is free" in refused(capsys)
    monkeypatch.setattr(cli_demo, "PORTS", 20)
    assert taken < started(served).port < taken + 20
    monkeypatch.setenv("GRADIO_SERVER_PORT", str(taken))
    assert f"GRADIO_SERVER_PORT {taken}" in refused(capsys)
    monkeypatch.setenv("GRADIO_SERVER_PORT", "http")
    assert "GRADIO_SERVER_PORT" in refused(capsys)


def test_hosts(served, capsys):
    assert "is no address of this machine" in refused(capsys, "--host", "192.0.2.1", "--port", 9600)  # RFC 5737
    assert "--host nowhere.invalid can't be found" in refused(capsys, "--host", "nowhere.invalid")


MISTAKES = [
    (["--port", "0"], "1 to 65535"),
    (["--port", "65536"], "1 to 65535"),
    (["--port", "many"], "--port"),
    (["--name", "nobody"], "zoo fit METHOD"),
    (["--name", "../nobody"], "no model folder"),
    (["--name", "org/a"], "give --hub org/a"),
    (["--name", "broken"], "config.json"),
    (["--hub", "a"], "ZOO_NAMESPACE"),
    (["--hub", "a/b/c"], "ORG/NAME"),
    (["--hub", "a/b@"], "ORG/NAME@REVISION"),
    (["--hub", "a/../b"], "ORG/NAME"),
    (["--hub", "o*/a*"], "one user or organisation"),
    (["--hub", "org/*"], "offline"),
    (["--user", "ann"], "ZOO_DEMO_PASSWORD"),
    (["--user", " "], "--user"),
    (["--password", "x"], "no option --password"),
    (["--finetune", "maybe"], "--finetune"),
    (["--device", "tpu"], "--device"),
    (["--share"], "no option --share"),
]


@pytest.mark.parametrize(("argv", "words"), MISTAKES)
def test_mistakes_are_one_sentence(models, served, capsys, argv, words):
    assert words in refused(capsys, *argv) and served == []


def test_a_password_without_a_name_is_no_open_page(served, capsys, monkeypatch):
    monkeypatch.setenv("ZOO_DEMO_PASSWORD", "hidden word")
    said = refused(capsys)
    assert "--user" in said and "hidden word" not in said and served == []


def test_a_model_of_cropped_images(served, folder, capsys):
    place = model_place("cropped")
    place.mkdir(parents=True)
    config = json.loads((folder / "config.json").read_text())
    config["preprocessing"]["crop"] = 224
    (place / "config.json").write_text(json.dumps(config))
    assert "cropped" in refused(capsys, "--name", "cropped")


def test_patterns_are_asked_of_the_hub(hub, served, folder, capsys):
    from zoo.publish import publish

    for name in ("fab/miic-padim", "fab/via-padim", "other/miic-padim"):
        publish(folder, name)
    assert started(served, "--hub", "fab/*").hub == ["fab/miic-padim", "fab/via-padim"]
    assert started(served, "--hub", "fab/v*", "other/miic-padim").hub == ["fab/via-padim", "other/miic-padim"]
    assert "zoo list 'fab/*' --remote" in refused(capsys, "--hub", "fab/z*")


def test_answers_before_torch_and_gradio_are_imported(models):
    code = (
        "import json, sys\nfrom zoo.cli import main\n"
        "for argv in json.loads(sys.argv[1]):\n"
        "    try: assert main(['demo', *argv]) == 2\n"
        "    except SystemExit: pass\n"
        "    assert not {'torch', 'lightning', 'gradio', 'zoo.demo.app'} & sys.modules.keys(), argv"
    )
    cases = json.dumps([*(argv for argv, _ in MISTAKES), ["--help"], ["--print_config"]])
    subprocess.run([sys.executable, "-c", code, cases], check=True, capture_output=True, stdin=subprocess.DEVNULL)


def test_settings_are_light():
    code = "import sys, zoo.demo.settings\nassert not {'torch', 'gradio', 'numpy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_is_no_traceback(number):
    process = subprocess.Popen(
        [sys.executable, "-c", SERVING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=_environment()
    )
    assert process.stdout.readline() == "serving\n"
    process.send_signal(number)
    _, error = process.communicate(timeout=300)
    assert process.returncode == 130 and error == "zoo: stopped.\n"


def test_a_password_is_asked_for_on_a_terminal():
    code = SERVING.replace("time.sleep(300)", "print(settings.password == 'typed', settings, flush=True)")
    ours, theirs = pty.openpty()
    argv = [sys.executable, "-c", code, "--user", "ann"]
    ends = {"stdin": theirs, "stderr": theirs, "stdout": subprocess.PIPE}
    process = subprocess.Popen(argv, **ends, env=_environment(), start_new_session=True)
    os.close(theirs)
    shown = b""
    while b"Password for ann: " not in shown:
        shown += os.read(ours, 1000)
    os.write(ours, b"typed\n")
    told = process.communicate(timeout=300)[0].decode()
    os.close(ours)
    assert process.returncode == 0 and told.startswith("serving\nTrue Settings(") and "typed" not in told


def _environment():
    return {key: value for key, value in os.environ.items() if key not in VARIABLES}
