"""The models of the demo: each is loaded once, and whoever waits for it shares its forward passes."""

import os
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from itertools import count
from pathlib import Path
from weakref import WeakValueDictionary

from zoo import evidence, hub
from zoo.errors import ZooError
from zoo.inspection import keeps_patches
from zoo.module import AnomalyModule, Brought, Prediction
from zoo.run import device_of

try:  # on a ZeroGPU Space, where a GPU is lent for the time of a call
    from spaces import GPU
except ImportError:
    GPU = None

ON_ZERO_GPU = GPU is not None and bool(os.environ.get("SPACES_ZERO_GPU"))
KEPT = 4  # models in memory; the one that was asked for longest ago makes room
BATCH = {"cpu": 1, "cuda": 8}  # images through the network at once; on a CPU they take as long one by one
SECONDS = 60  # of a call on ZeroGPU, at most

_models: WeakValueDictionary[int, AnomalyModule] = WeakValueDictionary()  # a lent GPU's process finds them here by id


class Served:
    """A model that many ask at once: whoever has its turn scores the images that have waited longest."""

    def __init__(self, model: AnomalyModule, is_lent: bool = False):
        self.model, self.turn = model, threading.Lock()
        self.is_lent, self._compute = is_lent, _compute_lent if is_lent else _compute
        _models[id(model)] = model
        self.waiting: deque[tuple[Brought, Future]] = deque()
        self.training = evidence.TrainingImages(model) if keeps_patches(model) else None

    def predict(self, images: Sequence[Brought]) -> list[Prediction]:
        asked = [(image, Future()) for image in images]
        self.waiting.extend(asked)
        with self.turn:
            while not all(answer.done() for _, answer in asked):
                self._score_next()
        return [answer.result() for _, answer in asked]

    def _score_next(self) -> None:
        """The first one that waits, with others of its shape."""
        group = [self.waiting.popleft()]
        shape, most = group[0][0].image.shape, BATCH.get(self.model.device.type, 1)
        while self.waiting and len(group) < most and self.waiting[0][0].image.shape == shape:
            group.append(self.waiting.popleft())
        try:
            found = self._compute(id(self.model), [image for image, _ in group])
        except Exception as error:
            if len(group) > 1:  # it may be of one of them
                return self._one_by_one(group)
            return group[0][1].set_exception(error)
        for (_, answer), prediction in zip(group, found, strict=True):
            answer.set_result(prediction)

    def _one_by_one(self, group: list[tuple[Brought, Future]]) -> None:
        for image, answer in group:
            try:
                answer.set_result(self._compute(id(self.model), [image])[0])
            except Exception as error:
                answer.set_exception(error)


def _compute(model: int, images: list[Brought]) -> list[Prediction]:
    return _models[model].predict_brought(images, len(images))


_compute_lent = GPU(duration=SECONDS)(_compute) if ON_ZERO_GPU else _compute


class Engine:
    """Models by name.

    Args:
        names: local models, folders or repositories on the hub, in the order of the page; None: all models of the local
            registry, as it is at the time.
        device: as for the commands.
    """

    def __init__(self, names: Sequence[str] | None = None, device: str = "auto"):
        self.device, self._sources = device_of(device), None if names is None else _by_name(names)
        self.failed: set[str] = set()  # models that could not be loaded
        self._served: OrderedDict[str, Served] = OrderedDict()
        self._look, self._loading = threading.Lock(), threading.Lock()  # the first is never held for long
        self._is_lent = ON_ZERO_GPU
        if ON_ZERO_GPU:  # its processes know the models that were there when they began; later ones stay on the CPU
            for name in self.names():
                with suppress(ZooError):  # it is noted as one that failed
                    self.model(name)
            self.device, self._is_lent = device_of("cpu"), False

    @property
    def training_device(self) -> str:
        """Where models are made: a GPU that is lent is not there for so long."""
        return "cpu" if ON_ZERO_GPU else str(self.device)

    def names(self) -> list[str]:
        """The models to choose from; those that can't be read are told by `model`."""
        return list(hub.list_models()) if self._sources is None else list(self._sources)

    def source(self, name: str) -> str:
        """What a model is loaded by; visitors see its name alone."""
        return (self._sources or {}).get(name, name)

    def add(self, name: str) -> None:
        """Offer a further model, or one that is another one by now."""
        with self._look:
            self._served.pop(name, None)
        self.failed.discard(name)
        if self._sources is not None:
            self._sources.setdefault(name, name)

    def model(self, name: str) -> AnomalyModule:
        """A model, in eval mode on the device.

        Raises:
            ZooError: not one of the names, or it can't be loaded.
        """
        return self._get(name).model

    def predict(self, name: str, images: Sequence[Brought]) -> list[Prediction]:
        """Predictions of images that the model's `bring` gave; those of several callers go through it together.

        Raises:
            ZooError: as `model`, or an image that can't be judged.
        """
        return self._get(name).predict(images)

    def evidence(self, name: str, image: Brought, places: Sequence[tuple[int, int]]) -> list[evidence.Pair] | None:
        """The nearest normal patches to places (row, column) in an image; None of a model that has none to show."""
        served = self._get(name)
        if served.training is None or served.is_lent:  # what comes from the hub has no images to show
            return None
        with served.turn:
            return evidence.pairs(served.model, served.training, image, places)

    def _get(self, name: str) -> Served:
        if served := self._known(name):
            return served
        with self._loading:
            if served := self._known(name):  # somebody else has loaded it meanwhile
                return served
            served = Served(self._load(name), self._is_lent)
            with self._look:
                self._served[name] = served
                while len(self._served) > KEPT and not ON_ZERO_GPU:
                    self._served.popitem(last=False)
            return served

    def drop(self, name: str) -> None:
        """Offer a named model no longer."""
        if self._sources is not None:
            self._sources.pop(name, None)

    def _known(self, name: str) -> Served | None:
        with self._look:
            if name in self._served:
                self._served.move_to_end(name)
            return self._served.get(name)

    def _load(self, name: str) -> AnomalyModule:
        if name not in self.names():
            raise ZooError(f"There is no model {name} here; choose one of {', '.join(self.names()) or 'none yet'}.")
        try:
            model = hub.from_pretrained(self.source(name))
        except ZooError as error:
            self.failed.add(name)
            raise ZooError(f"The model {name} can't be loaded: {error}") from error
        if model.view.crop:
            raise ZooError(
                f"{name} was fitted on cropped images, for parity runs, and can't judge others; choose another."
            )
        return model.to(self.device)


def _by_name(sources: Sequence[str]) -> dict[str, str]:
    """Models by what they are called: a folder by its last part, as nobody needs to know where it is."""
    named: dict[str, str] = {}
    for source in sources:
        plain = Path(source).name if Path(source).is_absolute() else source
        tried = (f"{plain} ({number})" for number in count(2))
        named[plain if plain not in named else next(name for name in tried if name not in named)] = source
    return named
