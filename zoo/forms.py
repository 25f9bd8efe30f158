"""What the JSON files of a model may hold: strict JSON, of stated types. They may come from anywhere."""

import json
import re
from collections.abc import Iterable
from types import UnionType
from typing import Any, Literal, NotRequired, TypedDict, Union, get_args, get_origin, get_type_hints, is_typeddict

DEEPEST = 32  # levels of lists and objects in each other; ours have some six
HIGHEST = 2**64  # of an integer: a seed is below
# Characters that a terminal obeys or that can't be written: all controls but tab and line feed, and half surrogates.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

Precision = Literal["32-true", "bf16-mixed", "16-mixed", "fast"]


class Backbone(TypedDict):
    backbone: str
    weights: str | None
    sha256: str | None


class Selection(TypedDict):
    metric: str
    fingerprint: str
    seed: int
    test: NotRequired[tuple[int, int]]


class Preprocessing(TypedDict):
    """Of all models, beside their `zoo.view.View`."""

    input_size: tuple[int, int]
    channels: int
    mean: list[float]
    std: list[float]
    interpolation: str


class Data(TypedDict):
    name: str
    fingerprint: str
    origin: NotRequired[str]
    hub: NotRequired[str]
    terms: NotRequired[str]
    broken: NotRequired[int]


class Learned(Data):
    images: int
    defects: NotRequired[int]
    tiles: NotRequired[int]
    held_out: NotRequired[int]
    inpainting_pairs: NotRequired[int]
    pairs_of: NotRequired[str]


class Tested(Data):
    normal: int
    anomalous: int
    unmarked: NotRequired[int]
    part: NotRequired[str]
    half: NotRequired[str]
    seen: NotRequired[str]
    ignored: NotRequired[str]


class Reading(TypedDict):
    about: str
    normal: int
    anomalous: int
    metrics: dict[str, float]


class Intervals(TypedDict):
    level: float
    draws: int
    drawn: str
    metrics: dict[str, tuple[float, float]]


class Seeds(TypedDict):
    count: int
    metrics: dict[str, tuple[float, float]]


class Normals(TypedDict):
    data: NotRequired[Data]
    checked: NotRequired[bool]
    tile: NotRequired[int]
    ignored: NotRequired[str]


class Kept(TypedDict):
    rule: str
    step: int
    images: int
    of: NotRequired[str]


class Training(TypedDict):
    steps: int
    epochs: float
    images_a_step: int
    selection: NotRequired[Kept]


class Hardware(TypedDict):
    processor: str
    cores: int
    gpu: NotRequired[str]


class Seconds(TypedDict):
    fit: float


class Evaluation(TypedDict):
    seconds: float
    hardware: Hardware
    peak_memory_mb: NotRequired[float]
    peak_gpu_memory_mb: NotRequired[float]


class Cost(TypedDict):
    ms_per_image: float
    image_size: tuple[int, int]
    checkpoint_mb: float


class Protocol(TypedDict):
    name: str


class Benchmark(TypedDict):
    date: NotRequired[str]


class Update(TypedDict):
    added: int
    removed: int


class Before(TypedDict):
    """What a model was before it was fine-tuned."""

    weights_sha256: str
    name: NotRequired[str]
    hub: NotRequired[str]
    train_data: NotRequired[Learned]
    updates: NotRequired[list[Update]]
    checked: NotRequired[bool]


class Record(TypedDict, total=False):
    """What `results.json` is read for; it may hold more."""

    method: str
    metrics: dict[str, float]
    test_data: Tested
    train_data: Learned
    parent: Before
    ancestors: list[Before]
    updates: list[Update]
    readings: dict[str, Reading]
    other_scores: dict[str, dict[str, float]]
    protocol: Protocol
    intervals: Intervals
    seeds: Seeds
    calibration: Normals
    seed: int
    eval_size: Literal["native"] | tuple[int, int]
    tile: int
    configuration: dict
    training: Training
    evaluation: Evaluation
    seconds: Seconds
    hardware: Hardware
    versions: dict[str, str]
    processes: int
    peak_memory_mb: float
    peak_gpu_memory_mb: float
    cost: Cost
    benchmark: Benchmark
    date: str


# What has to be there where something else is.
NEEDS = {"metrics": {"method", "test_data"}, "readings": {"metrics", "protocol"}, "seeds": {"metrics", "seed"}}


def parse(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is none, nested too deeply, or has a number or a character that nothing of ours has.
    """
    try:
        value = json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_number)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [value]
    for _ in range(DEEPEST):
        if any(_UNSEEN.search(each) for each in _strings(level)):
            raise ValueError("a text in it has control characters")
        level = [each for parent in level for each in _children(parent)]
        if not level:
            return value
    raise ValueError("nested too deeply")


def _number(text: str) -> int | float:
    value = int(text) if text.lstrip("-").isdigit() else float(text)
    if not abs(value) < (HIGHEST if isinstance(value, int) else float("inf")):
        raise ValueError("a number in it is not finite or too large")
    return value


def _strings(level: list[Any]) -> list[str]:
    keys = [key for value in level if isinstance(value, dict) for key in value]
    return keys + [value for value in level if isinstance(value, str)]


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def misfit(value: Any, kind: Any) -> str | None:
    """Where a JSON value is not of an annotated type, such as "test_data.name"; None where it is.

    Args:
        kind: a type, `list`, `tuple`, `dict[str, ...]`, `Literal`, a union, or a `TypedDict`, beside whose keys there
            may be others. Lists and tuples are the same, and an int is a float.
    """
    path = _misfit(value, kind)
    return None if path is None else ".".join(map(str, path)) or "it"


def _misfit(value: Any, kind: Any) -> tuple[Any, ...] | None:
    """The keys to the first part that doesn't fit."""
    origin, of = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return None if any(_misfit(value, each) is None for each in of) else ()
    if origin is Literal:
        return None if isinstance(value, str) and value in of else ()
    if is_typeddict(kind) or origin is dict:
        return _first(_members(value, kind)) if isinstance(value, dict) else ()
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            return ()
        if all(type(each) is of[0] for each in value) and origin is list:  # thousands of scores, again and again
            return None
        of = of[:1] * len(value) if origin is list or of[-1] is ... else of
        return _first(zip(range(len(of)), value, of, strict=True)) if len(value) == len(of) else ()
    fits = isinstance(value, kind) or (kind is float and isinstance(value, int))
    return None if fits and (kind is bool or not isinstance(value, bool)) else ()


def _first(parts: Iterable[tuple[Any, Any, Any]]) -> tuple[Any, ...] | None:
    """The first misfit of parts, which are keys, values and kinds."""
    return next(((key, *path) for key, each, kind in parts if (path := _misfit(each, kind)) is not None), None)


def _members(value: dict[str, Any], kind: Any) -> Iterable[tuple[Any, Any, Any]]:
    """Those of an object that are to be looked at: all, or of a `TypedDict` those that are known."""
    if not is_typeddict(kind):
        return ((key, each, get_args(kind)[1]) for key, each in value.items())
    known = get_type_hints(kind).items()
    missing = ...  # is of no type
    return ((key, value.get(key, missing), of) for key, of in known if key in value or key in kind.__required_keys__)


def quoted(value: Any) -> str:
    """A text from anywhere, as it may stand in a sentence."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
