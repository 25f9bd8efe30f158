"""Two methods on one image, side by side."""

import gradio as gr

from zoo.demo.inspect_tab import KINDS
from zoo.demo.server import Server
from zoo.demo.viewer import render
from zoo.errors import ZooError

EMPTY = """<div class="empty"><p><strong>Drop an image to compare two models on it.</strong></p>
<p>Scores of different methods have different units; compare their p-values and what they outline.</p></div>"""


def build(server: Server) -> list[gr.Dropdown]:
    """The tab; its choosers of models."""
    with gr.Tab("Compare", id="compare"):
        with gr.Row(equal_height=True):
            file = gr.File(label="Image", file_types=KINDS, elem_id="compare-image", height=120, scale=2)
            with gr.Column(scale=3, min_width=280):
                with gr.Row():
                    first = gr.Dropdown(label="First model", elem_id="first-model", interactive=True)
                    second = gr.Dropdown(label="Second model", elem_id="second-model", interactive=True)
                button = gr.Button("Compare", variant="primary", elem_id="compare-button")
        result = gr.HTML(EMPTY, elem_id="comparison")

    def compare(path: str | None, one: str | None, other: str | None, request: gr.Request) -> str:
        try:
            if path is None:
                raise ZooError("Choose an image to compare on first.")
            server.took(request, path)
            if one == other:
                few = "Fine-tuning makes another one." if len(server.engine.names()) < 2 else ""
                raise ZooError(f"Choose two different models to compare. {few}".strip())
            return render([server.look(path, name) for name in (one, other)])
        except Exception as error:  # told in the page, and the server lives on
            return server.alert(error)

    how = {
        "show_progress": "full",
        "api_visibility": "private",
        "concurrency_id": "looks",
        "trigger_mode": "always_last",
    }
    gr.on([button.click, file.upload], compare, [file, first, second], result, **how)
    return [first, second]
