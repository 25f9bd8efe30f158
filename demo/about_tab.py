"""What a model is: its data, terms and figures, as its card says."""

import re

import gradio as gr

from zoo import cards, checkpoint, hub
from zoo.demo.server import Server
from zoo.errors import ZooError

PRIVACY = """### This page

Images are scored on the machine that serves this page and are sent nowhere else. Files are deleted when the page is
closed, after 15 minutes at the latest. Nothing is counted or reported to anybody, and the page loads nothing from
other servers.
"""


def build(server: Server) -> list[gr.Dropdown]:
    """The tab; its chooser of a model."""
    with gr.Tab("About", id="about") as tab:
        model = gr.Dropdown(label="Model", elem_id="about-model", interactive=True)
        card = gr.Markdown(elem_id="card")
        gr.Markdown(PRIVACY)

    def show(name: str | None) -> str:
        try:
            chosen = server.chosen(name)
            return card_of(server.engine.source(chosen)).replace(cards.LOCAL, chosen)
        except Exception as error:  # told in the page, and the server lives on
            return server.told(error)

    gr.on([tab.select, model.change], show, model, card, show_progress="hidden", api_visibility="private")
    return [model]


def card_of(name: str) -> str:
    """A model's card without its front matter.

    Raises:
        ZooError: there is none.
    """
    path = hub.find_model(name) / checkpoint.CARD
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ZooError(f"{name} has no card.") from error
    return re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
