"""Images -> scores and maps: milliseconds an image of both sides, over the eight methods that both have.

Timed is the forward pass of each side's model in memory, in inference mode, on the same random images (B, 3, 224, 224):
ours is `AnomalyModule.score_images` (resizing to the input size and normalising included), the peer's is the forward of
its torch model (neither pre- nor post-processing). Both have the same backbone with random weights, which cost what
trained ones do, banks of the same size, and flows, latents and widths of the peer's defaults; what is learned is drawn
at random. GANomaly sees one size on both sides, 256 (the peer pads 224 to it), and three channels.

The backbone's own time is that of our feature extractor alone, in the same mode (of STFPM: of teacher and student).
"""

import statistics
import time
from typing import Any

from sides import in_turns, median_of, serve

WIDE, SLIM = "wide_resnet50_2", "resnet18"
BANK = 10_000
CASES: dict[str, dict[str, Any]] = {  # backbone, and what else is the same on both sides
    "padim": {"backbone": SLIM, "dims": 100},
    "patchcore": {"backbone": WIDE, "bank": BANK},
    "patchcore_2k": {"backbone": WIDE, "bank": 2000},
    "cfa": {"backbone": WIDE},
    "stfpm": {"backbone": SLIM},
    "rd4ad": {"backbone": WIDE},
    "fastflow": {"backbone": WIDE},
    "supersimplenet": {"backbone": WIDE},
    "ganomaly": {},
}
SHARED = [name for name in CASES if name != "patchcore_2k"]  # the eight; the smaller bank is for the light head
LIGHT = ("padim", "stfpm", "patchcore_2k")  # heads that shall take no more than half as long as the backbone
WANTED = {8: {"median": 4.0, "least": 2.5}, 1: {"median": 3.0, "least": 2.0}}  # ratios to the peer, in the fast mode
OVER_BACKBONE = 1.5
MODES = ("32-true", "fast")

_models: dict[str, Any] = {}


def timed(function: Any, clock: Any, least: float = 0.5) -> float:
    """Seconds of a call, after a first one: the mean of as many as take `least` seconds."""
    function()
    begin, count = clock(), 0
    while clock() - begin < least or not count:
        function()
        count += 1
    return (clock() - begin) / count


def ours(case: str, batch: int, mode: str = "", cpu_time: bool = False) -> dict[str, Any]:
    """Milliseconds an image of the model, and of its backbone alone (of an autoencoder: None), in each mode."""
    import torch

    model = _models.get(case) or _models.setdefault(case, _ours(case))
    images = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    clock = time.thread_time if cpu_time else time.perf_counter
    found = {}
    with torch.inference_mode():
        for model.precision in [mode] if mode else MODES:
            with model.autocast():
                found[model.precision] = 1000 / batch * timed(lambda: model.score_images(images), clock)
                if hasattr(model, "features"):
                    alone = 1000 / batch * timed(lambda: _backbone(model, images), clock)
                    found[f"{model.precision} backbone"] = alone
    return found


def _backbone(model: Any, images: Any) -> None:
    images = model.prepare(images)
    model.features(images)
    if model.method == "stfpm":
        model.student(images)


def _ours(case: str) -> Any:
    import torch

    from zoo.methods import create_model
    from zoo.nn.features import architecture_only

    given = dict(CASES[case])
    bank = given.pop("bank", None)
    method = case.removesuffix("_2k")
    if method == "patchcore":
        given |= {"embedding": "concat", "bank_size": bank}
    if method == "ganomaly":
        given |= {"channels": 3}
    torch.manual_seed(0)
    with architecture_only():
        model = create_model(method, **given).eval()
    if method == "patchcore":
        model.bank = torch.randn(bank, model.width)
    elif method == "cfa":
        model.bank = torch.randn(56 * 56, model.bank.shape[1])
    elif method == "padim":
        model.center = torch.randn(56 * 56, model.dims)
        model.whitening = torch.randn(56 * 56, model.dims, model.dims).tril()
    return model


def peer(case: str, batch: int, mode: str = "", cpu_time: bool = False) -> dict[str, Any]:
    import torch

    model = _models.get(case) or _models.setdefault(case, _peer(case))
    images = torch.rand(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    clock = time.thread_time if cpu_time else time.perf_counter
    with torch.inference_mode():
        return {"peer": 1000 / batch * timed(lambda: model(images), clock)}


def _peer(case: str) -> Any:
    """The peer's torch model; classes that ask for published weights get random ones."""
    from importlib import import_module

    import timm
    import torch
    import torchvision

    create, feature_models = timm.create_model, torchvision.models
    timm.create_model = lambda *args, **more: create(*args, **(more | {"pretrained": False}))
    for name in (WIDE, SLIM):
        build = getattr(feature_models, name)
        setattr(feature_models, name, lambda *args, build=build, **more: build(weights=None))
    method = case.removesuffix("_2k")
    place = {"rd4ad": "reverse_distillation"}.get(method, method)
    torch_model = import_module(f"anomalib.models.image.{place}.torch_model")
    torch.manual_seed(0)
    given = dict(CASES[case])
    backbone, layers = given.get("backbone"), ["layer1", "layer2", "layer3"]
    if method == "padim":
        model = torch_model.PadimModel(backbone, layers, pre_trained=False, n_features=given["dims"])
        model.gaussian.mean = torch.randn(given["dims"], 56 * 56)
        model.gaussian.inv_covariance = torch.randn(56 * 56, given["dims"], given["dims"])
    elif method == "patchcore":
        model = torch_model.PatchcoreModel(backbone=backbone, layers=layers[1:], pre_trained=False)
        model.memory_bank = torch.randn(given["bank"], 1536)
    elif method == "cfa":
        model = torch_model.CfaModel(backbone, 1, 1, 3, 3, 1e-5)
        model.memory_bank = torch.randn(1792, 56 * 56)
    elif method == "stfpm":
        model = torch_model.STFPMModel(layers, backbone)
    elif method == "rd4ad":
        mode = import_module("anomalib.models.image.reverse_distillation.anomaly_map").AnomalyMapGenerationMode.ADD
        model = torch_model.ReverseDistillationModel(backbone, (224, 224), layers, mode, pre_trained=False)
    elif method == "fastflow":
        model = torch_model.FastflowModel((224, 224), backbone, pre_trained=False)
    elif method == "supersimplenet":
        model = torch_model.SupersimplenetModel(backbone=backbone, layers=layers[1:])
    else:
        model = torch_model.GanomalyModel((256, 256), 3, n_features=64, latent_vec_size=100)
    return model.eval()


SIDES = {"ours": ours, "peer": peer}


def section(pythons: dict[str, str], quick: bool) -> dict[str, Any]:
    rows = []
    for batch in (8, 1):
        ratios = {}
        for case in CASES:
            found = in_turns(pythons, "inference.py", 1 if quick else 3, case=case, batch=batch)
            peer = median_of(found["peer"], "peer")
            exact, fast = (median_of(found["ours"], mode) for mode in MODES)
            about = {"peer": peer, "unit": "ms an image"}
            name = f"{case}, batch {batch}"
            rows.append({"name": f"{name}, float32", "ours": exact, "ratio": peer / exact, "wanted": None, **about})
            least = WANTED[batch]["least"] if case in SHARED else None
            rows.append({"name": f"{name}, fast", "ours": fast, "ratio": peer / fast, "wanted": least, **about})
            ratios[case] = peer / fast
            if case in LIGHT:
                backbone = median_of(found["ours"], "fast backbone")
                limit = {"ours": fast, "peer": backbone, "ratio": OVER_BACKBONE * backbone / fast, "wanted": 1.0}
                rows.append({"name": f"{name}, fast, beside 1.5 backbones", "unit": "ms an image", **limit})
        middle = statistics.median(ratios[case] for case in SHARED)
        wanted = WANTED[batch]["median"]
        rows.append({"name": f"median, batch {batch}, fast", "ratio": middle, "wanted": wanted})
    return {"rows": rows, "notes": [__doc__]}


if __name__ == "__main__":
    serve(SIDES)
