"""What a fit says of its memory before it starts."""

import json
import subprocess

import pytest

from zoo.cli import main

DATA = "synthetic:train=400,size=64"
OPTIONS = {
    "padim": ["--dims", "60", "--input-size", "128"],
    "padim wide": ["--dims", "176", "--input-size", "192"],
    "padim wide by two": ["--dims", "176", "--input-size", "192", "--devices", "2"],
    "patchcore": ["--bank-size", "3000", "--input-size", "128"],
    "patchcore ratio": ["--coreset-ratio", "0.05", "--input-size", "64"],
}


@pytest.mark.parametrize(
    "case", [c if c in ("padim", "patchcore") else pytest.param(c, marks=pytest.mark.slow) for c in OPTIONS]
)
def test_memory_is_estimated_before_the_fit(case, zoo_home):
    """In a process of its own: the peak of this one is that of all tests before."""
    command = ["zoo", "fit", case.split()[0], "--preset", "lite", "--data", DATA, "--name", "m", "--batch-size", "16"]
    done = subprocess.run([*command, *OPTIONS[case]], check=True, capture_output=True, text=True)
    record = json.loads((zoo_home / "models" / "m" / "results.json").read_text())
    # The sums of two processes may settle in what the look at some batches has freed, which nobody can count on.
    highest = 1.5 if "by two" in case else 1.25
    assert 0.8 < record["estimate"]["memory_mb"] / record["peak_memory_mb"] < highest
    assert record["estimate"]["seconds"] > 0 and "GB of memory" in done.stdout.splitlines()[0]


def test_memory_limit_is_honoured_beforehand(capsys, zoo_home):
    command = f"fit padim --preset lite --data {DATA} --name m --dims 20 --input-size 64".split()
    assert main([*command, "--memory-limit", "50MB"]) == 2
    said = capsys.readouterr().err
    assert "--memory-limit 0.05GB" in said and "--batch-size or --dims" in said and said.count("\n") == 1
    assert not (zoo_home / "models" / "m").exists()
    assert main([*command, "--memory-limit", "200GiB"]) == 0
    large = [*command, "--input-size", "1024", "--dims", "170", "--memory-limit", "2GB"]
    assert main(large) == 2 and "at least" in capsys.readouterr().err  # without a look at a batch
    for wrong in ("6", "0GB", "many"):
        assert main([*command, "--memory-limit", wrong]) == 2 and "such as 6GB" in capsys.readouterr().err
