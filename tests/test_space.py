"""The Space: what its README tells the hub, what it installs, and that the README's own commands lay out a Space that
runs from its files alone."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from huggingface_hub import SpaceHardware
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
ASSETS = (".j2", ".css", ".js", ".svg")
COLOURS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
ON_ZERO_GPU = {"python": ("3.10.13", "3.12.12"), "torch": ("2.8.0", "2.9.1", "2.10.0", "2.11.0")}  # the hub's list
FROM_THE_SPACE = {"gradio", "spaces"}


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def parsed(lines):
    found = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(each.name): each for each in found}


def readme():
    """Metadata and body."""
    _, head, body = (DEMO / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(head), body


def test_metadata():
    about, _ = readme()
    needed = {"title", "emoji", "colorFrom", "colorTo", "sdk", "sdk_version", "python_version", "app_file", "license"}
    assert needed | {"short_description", "pinned", "suggested_hardware"} <= about.keys()
    assert about["sdk"] == "gradio" and about["app_file"] == "app.py" and about["license"] == "apache-2.0"
    assert about["colorFrom"] in COLOURS and about["colorTo"] in COLOURS and len(about["short_description"]) <= 60
    assert len(about["emoji"]) == 1 and ord(about["emoji"]) > 0x2000
    assert about["suggested_hardware"] in {each.value for each in SpaceHardware}
    assert isinstance(about["python_version"], str) and about["python_version"] in ON_ZERO_GPU["python"]
    assert about["python_version"] in SpecifierSet(project()["requires-python"])


def test_its_gradio_is_the_oldest_that_is_allowed():
    """By which the page was made; a test that follows what is installed would fail at each release of gradio."""
    allowed = parsed(project()["dependencies"])["gradio"].specifier
    version = readme()[0]["sdk_version"]
    assert version in allowed and f">={version.rpartition('.')[0]}" in map(str, allowed)
    assert importlib.metadata.version("gradio") in allowed


def test_it_installs_what_the_package_needs():
    needed = parsed(project()["dependencies"])
    listed = parsed((DEMO / "requirements.txt").read_text().splitlines())
    assert "zoo" not in listed  # a stranger's, on PyPI
    assert listed.keys() == needed.keys() - FROM_THE_SPACE
    torch = listed.pop("torch")
    (pin,) = torch.specifier
    assert pin.operator == "==" and pin.version in ON_ZERO_GPU["torch"] and pin.version in needed["torch"].specifier
    assert {name: str(each) for name, each in listed.items()} == {name: str(needed[name]) for name in listed}


def test_the_app_needs_no_file_beside_it():
    own = {path.stem for path in DEMO.glob("*.py")}
    for node in ast.walk(ast.parse((DEMO / "app.py").read_text())):
        names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            names = [node.module]
        assert not own & {name.partition(".")[0] for name in names}


def commands():
    """The README's lines, those of the hub apart."""
    (block,) = re.findall(r"```bash\n(.*?)```", readme()[1], re.DOTALL)
    lines = block.splitlines()
    return [line for line in lines if not line.startswith("hf ")], [line for line in lines if line.startswith("hf ")]


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory):
    """The folder that is uploaded, laid out by the README's commands in a copy of the checkout."""
    top = tmp_path_factory.mktemp("checkout")
    kept_out = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
    for name in ("zoo", "demo", "hub_cards"):
        shutil.copytree(ROOT / name, top / name, symlinks=True, ignore=kept_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, top)
    environment = _environment()
    try:
        if int(importlib.metadata.version("setuptools").partition(".")[0]) >= 77:
            environment["PIP_NO_BUILD_ISOLATION"] = "0"  # pip's way to say none: what is here is used, not fetched
    except importlib.metadata.PackageNotFoundError:
        pass
    script = "\n".join(["set -e", *commands()[0]])
    done = subprocess.run(["bash", "-c", script], cwd=top, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return top / "space"


def _environment():
    """Of a process that finds the zoo by its own means, with this Python's programs first."""
    programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PATH": programs}


def test_what_is_uploaded(laid_out):
    assert {"app.py", "README.md", "requirements.txt", "zoo"} <= {path.name for path in laid_out.iterdir()}
    for path in DEMO.iterdir():
        if path.suffix in (*ASSETS, ".py"):
            assert (laid_out / "zoo/demo" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {path.suffix for path in (laid_out / "zoo/demo").iterdir()} >= {".py", ".j2", ".css", ".js"}
    assert list((laid_out / "zoo/hub_cards").glob("*.j2"))
    texts = [path for path in laid_out.rglob("*") if path.is_file() and path.suffix not in (".py", ".j2", ".js")]
    for path in texts:  # nothing tells of the machine it was made on
        assert str(laid_out.parent).encode() not in path.read_bytes(), path
    assert not list(laid_out.rglob("direct_url.json")) and not (laid_out / "bin").exists()


def test_it_runs_from_its_files_alone(laid_out):
    code = (
        "import importlib.metadata, sys; sys.path[0] = ''\n"
        "import zoo, zoo.demo.settings, zoo.hub_cards\n"
        "print(zoo.__file__, zoo.demo.settings.__file__, zoo.hub_cards.__file__, importlib.metadata.version('zoo'))"
    )
    run = {"cwd": laid_out, "env": _environment(), "capture_output": True, "text": True, "check": True}
    *places, version = subprocess.run([sys.executable, "-c", code], **run).stdout.split()
    assert all(Path(place).is_relative_to(laid_out) for place in places) and version == project()["version"]
    by_app = subprocess.run([sys.executable, "app.py", "--help"], **run).stdout
    assert by_app.startswith("usage: zoo demo") and "--finetune" in by_app
    by_app = subprocess.run([sys.executable, "app.py", "--port", "0"], **(run | {"check": False}))
    assert by_app.returncode == 2 and by_app.stderr == "zoo: --port is 1 to 65535, not 0.\n"


def test_the_hubs_client_knows_the_options_of_its_commands():
    upload, variables = commands()[1]
    for line, page in ((upload, "upload --help"), (variables, "spaces variables add --help")):
        known = subprocess.run(["hf", *page.split()], env=_environment(), capture_output=True, text=True, check=True)
        for option in re.findall(r"(?<= )-{1,2}[a-z-]+", line):
            assert re.search(rf"(?<![\w-]){option}\b", known.stdout), option
    assert "ZOO_DEMO_HUB" in variables and "--repo-type space" in upload
