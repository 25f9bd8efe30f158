"""Two sides of a comparison, ours and the peer's, each a process with a Python of its own, that take turns.

A script of this folder holds both sides of one comparison: `SIDES = {"ours": function, "peer": function}`. A function
takes a request (plain values) and gives an answer (plain values); it imports its own library within. The script ends
with `serve(SIDES)`, which answers the requests of a `Side`, one JSON line each.
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

Function = Callable[..., dict[str, Any]]
THREADS = os.cpu_count() or 1


class Side:
    """A process that measures, to be asked again and again.

    Args:
        python: interpreter of its environment.
        script: with `serve`.
        name: "ours" or "peer".
    """

    def __init__(self, python: str, script: str, name: str):
        command = [python, str(Path(__file__).parent / script), name]
        environment = os.environ | {"OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Raises RuntimeError where the process has ended; what it said of that stands on stderr."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended with code {self.process.wait()}")
        return json.loads(line)

    def __enter__(self) -> "Side":
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.stdin.close()
        self.process.wait()


def serve(sides: dict[str, Function]) -> None:
    """Answer requests from stdin, as the side that the command names, until it is closed."""
    answers = os.fdopen(os.dup(1), "w")  # libraries print what they like, to stderr
    os.dup2(2, 1)
    function = sides[sys.argv[1]]
    for line in sys.stdin:
        answers.write(json.dumps(function(**json.loads(line))) + "\n")
        answers.flush()


def in_turns(pythons: dict[str, str], script: str, rounds: int, **request: Any) -> dict[str, list[dict[str, Any]]]:
    """The answers of all sides to one request, asked in turn, so that other load on the machine falls on each alike.

    Args:
        pythons: interpreter of each side by its name.
        request: a first answer, while all is warming up, is thrown away.
    """
    with ExitStack() as stack:
        sides = {name: stack.enter_context(Side(python, script, name)) for name, python in pythons.items()}
        for side in sides.values():
            side.ask(**request)
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for _ in range(rounds):
            for name, side in sides.items():
                found[name].append(side.ask(**request))
    return found


def median_of(answers: list[dict[str, Any]], key: str) -> float:
    return statistics.median(answer[key] for answer in answers)
