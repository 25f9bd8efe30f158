"""What a model is: its data, terms and figures, as its card says."""

import re
from pathlib import Path

import gradio as gr

from zoo import cards, checkpoint
from zoo.demo.server import Server
from zoo.errors import ZooError

CODE = re.compile(r"(```.*?```|`[^`\n]+`)", re.DOTALL)
PRIVACY = """### This page

Images are scored on the machine that serves this page and are sent nowhere else. Files are deleted when the page is
closed, after 15 minutes at the latest. Nothing is counted or reported to anybody, and the page loads nothing from
other servers.
"""


def build(server: Server) -> list[gr.Dropdown]:
    """The tab; its chooser of a model."""
    with gr.Tab("About", id="about") as tab:
        model = gr.Dropdown(label="Model", elem_id="about-model", interactive=True)
        gr.Markdown(PRIVACY)
        card = gr.Markdown(elem_id="card")

    def show(name: str | None) -> str:
        try:
            chosen = server.chosen(name)
            return card_of(server.engine.model(chosen).folder, chosen)
        except Exception as error:  # told in the page, and the server lives on
            return server.told(error)

    gr.on([tab.select, model.change], show, model, card, show_progress="hidden", api_visibility="private")
    return [model]


def card_of(folder: Path, name: str) -> str:
    """A model's card without its front matter, as text alone: it may be a stranger's.

    What is HTML in it is shown as it is written, and pictures by their words: they would be fetched from elsewhere.

    Raises:
        ZooError: there is none.
    """
    try:
        text = (folder / checkpoint.CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ZooError(f"{name} has no card.") from error
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL).replace(cards.LOCAL, name)
    parts = CODE.split(text)  # what is code has odd numbers
    parts[::2] = [_plain(part) for part in parts[::2]]
    return "".join(parts)


def _plain(text: str) -> str:
    """Markdown without HTML and pictures, its headings one level lower, as the page has a title already."""
    text = re.sub(r"!\[([^\]]*)\](\([^)]*\)|\[[^\]]*\])?", r"\1", text).replace("<", "&lt;")
    return re.sub(r"^(#{1,5} )", r"#\1", text, flags=re.MULTILINE)
