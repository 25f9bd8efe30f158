"""The registry of methods. It reads their signatures and presets without importing them (nor torch)."""

import ast
import difflib
import importlib
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from zoo.errors import ZooError
from zoo.forms import misfit, quoted

METHODS = {
    "cfa": "CFA",
    "fanogan": "FAnoGAN",
    "fastflow": "FastFlow",
    "ganomaly": "GANomaly",
    "iad_inpainting": "IADInpainting",
    "padim": "PaDiM",
    "patchcore": "PatchCore",
    "rd4ad": "RD4AD",
    "riad": "RIAD",
    "stfpm": "STFPM",
    "supersimplenet": "SuperSimpleNet",
}


MOST, LONGEST = 10**6, 64  # of a number and a list of arguments
LIMITS = {"seed": 2**63 - 1, "bank_size": 10**8, "input_size": 2**13}  # of numbers that may be higher, or not as high


@dataclass(frozen=True)
class Option:
    """One `__init__` argument of a method: its type, default and the line of the docstring about it."""

    type: Any
    default: Any
    help: str


@dataclass(frozen=True)
class About:
    """What the head of a method's file says, by parts.

    Attributes:
        title: its name and paper, without a full stop.
        idea: in a few sentences.
        origin: the original code and its licence, or that there is none.
        same: what is as in that code; empty where nothing is known of it.
        deviations: what is not.
    """

    title: str
    idea: str
    origin: str
    same: str
    deviations: str


def list_methods() -> list[str]:
    """Ids of all methods."""
    return sorted(METHODS)


def method_id(name: str) -> str:
    """The id that a name stands for (`-` and `_` are the same).

    Raises:
        ZooError: an unknown name, with the nearest ones.
    """
    method = name.lower().replace("-", "_")
    if method not in METHODS:
        near = difflib.get_close_matches(method, METHODS, n=3, cutoff=0.4)
        if not near:
            raise ZooError(f"There is no method {name!r}; there are {', '.join(list_methods())}.")
        raise ZooError(f"There is no method {name!r}; did you mean {' or '.join(near)}? `zoo list` shows all.")
    return method


def method_class(name: str) -> type:
    """The class of a method, imported on use."""
    method = method_id(name)
    return getattr(importlib.import_module(f"zoo.methods.{method}"), METHODS[method])


def create_model(name: str, preset: str | None = None, **arguments: Any) -> Any:
    """A new model: the method's defaults, then the preset's values, then `arguments`.

    Raises:
        ZooError: an unknown method, preset or argument.
    """
    method, known = method_id(name), signature(name)
    values = (presets(method, preset).get("model", {}) if preset else {}) | arguments
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1) or sorted(known)
            raise ZooError(f"{method} has no argument {key!r}; did you mean {near[0]!r}?")
    _check_limits(values)
    model = method_class(method)(**values)
    model.preset = preset
    return model


def check_arguments(name: str, arguments: dict[str, Any]) -> None:
    """Check what a saved model says of itself: a method by its id, all of its arguments, each of its type, no path.

    Raises:
        ZooError: no such id; the first argument that is missing, unknown or of another type.
    """
    if name not in METHODS:
        raise ZooError(f"there is no method {quoted(name)}")
    known = signature(name)
    if wrong := known.keys() ^ arguments.keys():
        raise ZooError(f"{min(wrong)!r} is missing or no argument of {name}")
    local = method_class(name).local_arguments
    for key, value in arguments.items():
        if misfit(value, known[key].type) or (key in local and value is not None):
            raise ZooError(f"argument {key!r} of {name} can't be {quoted(value)}")


def _check_limits(arguments: dict[str, Any]) -> None:
    """Raises ZooError for numbers and lists that no memory or patience is enough for, whatever their types."""
    size = arguments.get("input_size")
    sides = [side for side in (size if isinstance(size, list) else [size]) if isinstance(side, int)]
    limits = LIMITS | {key: max(sides, default=LIMITS["input_size"]) for key in ("sigma", "window")}
    for key, value in arguments.items():
        for number in value if isinstance(value, list) else [value]:
            usual = sys.float_info.max if isinstance(number, float) else MOST  # a rate takes no memory
            most = limits.get(key, usual)
            if isinstance(number, int | float) and not abs(number) <= most:
                raise ZooError(f"The argument {key!r} takes numbers up to {most:,}, not {quoted(number)}.")
        if isinstance(value, list) and len(value) > LONGEST:
            raise ZooError(f"The argument {key!r} takes up to {LONGEST} values, not {len(value):,}.")


def presets(name: str, preset: str) -> dict[str, dict[str, Any]]:
    """Sections `model`, `data`, `trainer` of one preset of a method."""
    known = _read(method_id(name))[1]
    if preset not in known:
        raise ZooError(f"{method_id(name)} has no preset {preset!r}; it has {', '.join(known)}.")
    return known[preset]


def signature(name: str) -> dict[str, Option]:
    """The `__init__` arguments of a method, read from its source."""
    return _read(method_id(name))[0]


def summary(name: str) -> str:
    """First line of the method's file: its name and paper."""
    return _head(method_id(name)).splitlines()[0]


@cache
def about(name: str) -> About:
    """The head of a method's file by its paragraphs: title, `Idea:`, original code with `Same as`, `Deviations:`."""
    title, idea, rest = _head(method_id(name)).split("\n\n", 2)
    origin, deviations = " ".join(rest.split()).split(" Deviations: ")
    origin, mark, same = origin.partition(" Same as ")
    idea = " ".join(idea.split()).removeprefix("Idea: ")
    return About(title.rstrip("."), _capital(idea), _sentence(origin), f"{mark}{same}".strip(), _capital(deviations))


def _sentence(text: str) -> str:
    """Text that begins in capitals, for emphasis in a source file, as it is written elsewhere."""
    head, mark, rest = text.partition(": ")
    return f"{head.capitalize()}{mark}{rest}" if head.isupper() else text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


@cache
def _tree(method: str) -> ast.Module:
    return ast.parse((Path(__file__).parent / f"{method}.py").read_text(encoding="utf-8"))


def _head(method: str) -> str:
    return ast.get_docstring(_tree(method))


@cache
def _read(method: str) -> tuple[dict[str, Option], dict[str, dict]]:
    tree = _tree(method)
    (assign,) = (n for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "PRESETS")
    (owner,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == METHODS[method])
    (init,) = (n for n in owner.body if isinstance(n, ast.FunctionDef) and n.name == "__init__")
    lines = [line.strip() for line in ast.get_docstring(owner).splitlines()]
    options = {}
    for argument, default in zip(init.args.kwonlyargs, init.args.kw_defaults, strict=True):
        kind = eval(ast.unparse(argument.annotation), {"Literal": Literal})  # our own source
        about = next(line.split(": ", 1)[1] for line in lines if line.startswith(f"{argument.arg}: "))
        options[argument.arg] = Option(kind, ast.literal_eval(default), about)
    return options, ast.literal_eval(assign.value)
