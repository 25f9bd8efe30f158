"""A model card out of a configuration and a result record; every figure of ours in it comes from the record.

`python -m zoo.cards hub_cards` writes the cards of all methods on MIIC, and that of the data set. A folder that has
`config.json` and `results.json` of a model, fitted and evaluated on MIIC, gets a card with figures; any other says that
the method is not yet trained on it.
"""

import json
import sys
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from zoo import card_terms, card_text, checkpoint, paper
from zoo.card_data import MIIC_DOI, SEM, eval_results, front_matter, learned_from, public_name
from zoo.card_words import paragraphs
from zoo.errors import ZooError
from zoo.methods import about, list_methods, presets, signature

__all__ = ["eval_results", "render_card", "write_cards"]

LOCAL = "path/to/this/folder"
MIIC_PAIRS = {"train": 1312, "test": 135}  # of its Inpainting folders, by its owner's readme
PRESET = "paper224"  # of the models on MIIC that the zoo has a card for


def render_card(
    config: dict[str, Any], record: dict[str, Any] | None, repo: str | None = None, name: str | None = None
) -> str:
    """The card's Markdown text.

    Args:
        config: as in `config.json`.
        record: as in `results.json`; without one the card says that nothing was measured. `seeds`, {"count": n,
            "metrics": {key: [mean, standard deviation]}}, tells of further fits beside this one.
        repo: `ORG/NAME` that the card's example loads; None: this folder.
        name: of the model; None: that of the repository, else its method and preset.
    """
    record, method = record or {}, config["method"].replace("_", "-")
    plain = f"{method} ({config['preset']})" if config.get("preset") else method
    title = name or (repo or plain).rpartition("/")[2]
    return _rendered(
        config,
        record,
        title,
        place=repo or LOCAL,
        commands="",
        lead=card_text.lead(config, record),
        results=card_text.results(config, record),
        threshold=card_text.threshold(config, record),
        terms=card_terms.terms(config, record),
        made=card_text.made(config, record),
        arguments=json.dumps(config["arguments"], indent=1, sort_keys=True),
        size=card_text.size(config["preprocessing"]),
    )


def _rendered(config: dict[str, Any], record: dict[str, Any], title: str, **parts: Any) -> str:
    method, known = config["method"], _known()
    special = known["methods"][method]
    sources = [special["bibtex"]]
    if any(public_name(data) in SEM for data in learned_from(record)):
        sources += [source for source in known["sources"].values() if source not in sources]
    return _template("card.md.j2").render(
        front_matter=front_matter(config, record, title.partition(" ")[0]),
        title=title,
        about=about(method),
        notice=special.get("notice"),
        limits=special["limits"],
        citation="\n".join(sources).strip(),
        **parts,
    )


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    return environment.from_string((files("zoo.hub_cards") / name).read_text(encoding="utf-8"))


@cache
def _known() -> dict[str, Any]:
    """Limits and citations, by method; sources of the data."""
    import yaml

    return yaml.safe_load((files("zoo.hub_cards") / "methods.yaml").read_text(encoding="utf-8"))


# ---- the cards of the repository -------------------------------------------------------------------------------------


def write_cards(folder: Path) -> list[Path]:
    """Write the card of each method on MIIC, and that of the data set.

    Returns:
        The files.

    Raises:
        ZooError: a record beside a card is not one of MIIC; a file that can't be written.
    """
    cards = {folder / f"miic-{method.replace('_', '-')}" / checkpoint.CARD: method for method in list_methods()}
    texts = {path: method_card(method, path.parent) for path, method in cards.items()}
    texts[folder / "miic" / checkpoint.CARD] = data_card()
    for path, text in texts.items():
        checkpoint.write_text(path, text)
    return list(texts)


def method_card(method: str, place: Path) -> str:
    """The card of a method on MIIC.

    Args:
        place: a folder, with the record and the configuration that the card is to tell of, or neither.

    Raises:
        ZooError: one of the two is missing, or they are of another method or data set.
    """
    name = f"miic-{method.replace('_', '-')}"
    paths = [place / checkpoint.CONFIG, place / checkpoint.RECORD]
    if not any(path.is_file() for path in paths):
        return _untrained_card(method, name)
    for path in paths:
        if not path.is_file():
            raise ZooError(f"{path} is missing beside the other of its model; add it, or remove both.")
    config, record = checkpoint.read_config(place), checkpoint.read_record(place)
    if {config["method"], record.get("method")} != {method}:
        raise ZooError(f"{paths[1]} is of {record.get('method')}, where {method} is expected; put it where it belongs.")
    for part in ("train_data", "test_data"):
        if (data := record.get(part, {}).get("name")) != paper.DATA_NAME:
            raise ZooError(
                f"{paths[1]}: {part} is {data!r}, and a card of MIIC tells of MIIC alone; remove the record."
            )
    return render_card(config, record, name, name)


def _untrained_card(method: str, name: str) -> str:
    config, record = {"method": method}, {"train_data": {"name": paper.DATA_NAME, "terms": _miic_terms()}}
    preset = presets(method, PRESET)
    side = preset.get("model", {}).get("input_size") or signature(method)["input_size"].default
    share = preset.get("data", {}).get("train_fraction", 1)
    part = "" if share == 1 else f"a random {100 * share:.4g} % of "
    fit = f"zoo fit {method.replace('_', '-')} --preset {PRESET} --data miic:DIR --name {name}"
    theirs = paper.figures(paper.DATA_NAME, method)
    figures = card_text.table(card_text.paper_column(theirs)) if theirs else ""
    return _rendered(
        config,
        record,
        name,
        place=name,
        commands=f"{fit}\nzoo evaluate {name} --data miic:DIR --protocol house",
        lead=(
            "A visual anomaly detector of the zoo for the SEM images of MIIC. It is **not yet trained on MIIC**: there "
            f"are no weights, and no figure of ours. {card_text.method(config)}"
        ),
        results=paragraphs(
            f"None of ours yet.{' Published figures:' if theirs else ''}",
            figures,
            card_text.about_paper(paper.DATA_NAME, method),
        ),
        threshold="",
        terms=paragraphs(
            f"By the commands above it learns from {part}the normal images of MIIC.",
            card_terms.data_terms(record["train_data"], trained=False),
        ),
        made="",
        arguments="",
        size=card_text.size({"input_size": [side, side]}),
    )


def data_card() -> str:
    """The card of MIIC, which comes without its images."""
    from huggingface_hub import DatasetCardData

    from zoo.data.miic_layout import COUNTS

    about = DatasetCardData(
        license="other",
        pretty_name="MIIC: Microscopic Images of Integrated Circuits",
        size_categories="10K<n<100K",
        task_categories=["image-segmentation"],
        source_datasets=["original"],
        tags=["zoo", "anomaly-detection", "sem", "semiconductor"],
        license_name="non-commercial-research-only",
        license_link=MIIC_DOI,
    )
    counts = {key.replace(" ", "_"): count for key, count in COUNTS.items()}
    sources = "\n".join(_known()["sources"].values()).strip()
    return _template("miic.md.j2").render(
        front_matter=about.to_yaml(),
        counts=counts,
        pairs=MIIC_PAIRS,
        terms=_miic_terms(),
        doi=MIIC_DOI,
        citation=sources,
    )


def _miic_terms() -> str:
    from zoo.data.terms import TERMS  # a card of a record has its terms from there

    return TERMS[paper.DATA_NAME]


if __name__ == "__main__":
    try:
        for path in write_cards(Path(sys.argv[1])):
            print(path)
    except IndexError:
        sys.exit("usage: python -m zoo.cards FOLDER")
    except ZooError as error:
        sys.exit(f"zoo: {error}")
