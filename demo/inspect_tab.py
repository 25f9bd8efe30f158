"""One image: choose or drop it, and see what is unusual in it."""

from typing import Any

import gradio as gr

from zoo.demo.examples import buttons
from zoo.demo.server import Server
from zoo.demo.uploads import MAX_SIDE_WORDS
from zoo.demo.viewer import render
from zoo.image import EXTENSIONS

KINDS = sorted(EXTENSIONS)
TAKEN = f"PNG, TIFF, JPEG or BMP of 8 or 16 bits, {MAX_SIDE_WORDS}. Files are deleted when the page is closed."
EXAMPLES = """<p class="note">{taken}</p><h2 class="label">Or try an example</h2>
<p class="note">A small model finds some of these defects at 1 %, and more at a higher rate.</p>{buttons}"""
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
            file = gr.File(label="Image: drop, choose or paste", file_types=KINDS, elem_id="image", height=175)
            shown = EXAMPLES.format(taken=TAKEN, buttons=buttons(server.examples))
            examples = gr.HTML(shown, js_on_load=CHOSEN, elem_id="examples")
        with gr.Column(scale=3, min_width=320):
            result = gr.HTML(EMPTY, elem_id="result")
            looked_at = gr.State()  # a path, or the number of an example; outside of the tab it would count as one

    def look(what: str | int | None, name: str | None, request: gr.Request) -> str:
        if what is None:
            return EMPTY
        try:
            if isinstance(what, int):
                return render([server.look(server.examples[what].path, name)])
            server.took(request, what)
            return render([server.look(what, name)])
        except Exception as error:  # told in the page, and the server lives on
            return server.alert(error)

    def inspect(path: str | None, name: str | None, request: gr.Request) -> tuple[str, str | None]:
        return look(path, name, request), path

    def choose(chosen: gr.EventData) -> tuple[None, int]:
        return None, chosen.number

    def look_again(what: str | int | None, name: str | None, request: gr.Request) -> Any:
        return gr.skip() if what is None else look(what, name, request)

    how = {"show_progress": "full", "api_visibility": "private", "concurrency_id": "looks"}
    once = how | {"trigger_mode": "always_last"}
    gr.on([file.upload, file.clear], inspect, [file, model], [result, looked_at], show_progress_on=result, **once)
    model.change(look_again, [looked_at, model], result, **once)  # not input: a chooser that is left sends that too
    clicked = examples.click(choose, None, [file, looked_at], api_visibility="private", queue=False)
    clicked.then(look_again, [looked_at, model], result, **once)  # of quick clicks the last one counts
    return [model]
