"""One image: choose or drop it, and see what is unusual in it."""

import gradio as gr

from zoo.demo.examples import buttons
from zoo.demo.server import Server
from zoo.demo.uploads import MAX_SIDE_WORDS
from zoo.demo.viewer import render
from zoo.image import EXTENSIONS

KINDS = sorted(EXTENSIONS)
TAKEN = f"PNG, TIFF, JPEG or BMP of 8 or 16 bits, {MAX_SIDE_WORDS}. Files are deleted when the page is closed."
EXAMPLES = """<p class="note">{taken}</p><h2 class="label">Or try an example</h2>{buttons}"""
# a click tells which one
CHOSEN = """element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-example]");
  if (button) trigger("click", { number: Number(button.dataset.example) });
});"""
EMPTY = """<div class="empty"><p><strong>Drop an SEM image here, or choose an example.</strong></p>
<p>The answer says how rare such an image is among normal ones, and shows where it differs.</p></div>"""


def build(server: Server) -> list[gr.Dropdown]:
    """The tab; its choosers of models."""
    with gr.Tab("Inspect", id="inspect"), gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=280, elem_classes="ask"):
            model = gr.Dropdown(label="Model", elem_id="model", interactive=True)
            file = gr.File(label="Image: drop, choose or paste", file_types=KINDS, elem_id="image", height=150)
            shown = EXAMPLES.format(taken=TAKEN, buttons=buttons(server.examples))
            examples = gr.HTML(shown, js_on_load=CHOSEN, elem_id="examples")
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(EMPTY, elem_id="result")

    def inspect(path: str | None, name: str | None, request: gr.Request) -> str:
        if path is None:
            return EMPTY
        try:
            server.took(request, path)
            return render([server.look(path, name)])
        except Exception as error:  # told in the page, and the server lives on
            return server.alert(error)

    def show_example(name: str | None, chosen: gr.EventData) -> str:
        try:
            return render([server.look(server.examples[chosen.number].path, name)])
        except Exception as error:
            return server.alert(error)

    how = {"show_progress": "full", "api_visibility": "private", "concurrency_id": "looks"}
    once = how | {"trigger_mode": "always_last"}
    gr.on([file.upload, file.clear, model.input], inspect, [file, model], result, **once)
    examples.click(lambda: None, None, file, api_visibility="private", queue=False)
    examples.click(show_example, model, result, **once)
    return [model]
