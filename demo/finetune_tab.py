"""A private model of one's own normal images, made on this machine."""

import html
from collections.abc import Iterator

import gradio as gr

from zoo.demo.inspect_tab import KINDS
from zoo.demo.server import Server
from zoo.demo.tuning import EXPLAINED, LEAST, MOST, Tuning, offer
from zoo.errors import ZooError

WAITING = 8  # visitors at a time; one works, the others are told that they wait
INTRODUCTION = f"""<div class="lead"><p>Give {LEAST} to {MOST} images that show nothing unusual, of one tool, layer and
magnification. A copy of the chosen model learns them; the model itself is left as it is. Who sees
this page can choose the new one too; it goes nowhere else.</p>
<p class="note">{EXPLAINED}</p></div>"""
EMPTY = '<div class="empty"><p><strong>Progress, and what the new model promises, appear here.</strong></p></div>'
OFF = """<div class="empty"><p><strong>Fine-tuning is off on this page.</strong></p><p>It is open to others without a
password, who would see each other's models. Start your own with <code>zoo demo</code>.</p></div>"""


def build(server: Server) -> tuple[list[gr.Dropdown], gr.events.Dependency | None]:
    """The tab; its choosers of models, and the event after which there may be a new one."""
    with gr.Tab("Fine-tune", id="finetune"):
        if not server.settings.finetune:
            gr.HTML(OFF)
            return [], None
        gr.HTML(INTRODUCTION)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                base = gr.Dropdown(label="Begin with", elem_id="base-model", interactive=True)
                files = gr.File(
                    label=f"{LEAST} to {MOST} normal images",
                    file_count="multiple",
                    file_types=KINDS,
                    elem_id="normals",
                    height=240,
                )
                name = gr.Textbox(
                    label="Name of the new model", placeholder="lot-17", elem_id="new-name", max_length=96
                )
                with gr.Row():
                    start = gr.Button("Fine-tune", variant="primary", elem_id="finetune-button")
                    stop = gr.Button("Cancel", elem_id="finetune-cancel", interactive=False)
            with gr.Column(scale=2, min_width=320):
                outcome = gr.HTML(EMPTY, elem_id="finetuned")

    def took(paths: list[str] | None, request: gr.Request) -> str:
        """What so many images give."""
        server.took(request, *(paths or ()))
        if not paths or not LEAST <= len(paths) <= MOST:
            return EMPTY
        return f'<div class="empty"><p><strong>{html.escape(offer(len(paths)))}</strong></p></div>'

    def tune(paths: list[str] | None, parent: str | None, wanted: str, request: gr.Request) -> Iterator[tuple]:
        buttons = gr.Button(interactive=False), gr.Button(interactive=True)
        try:
            if not paths:
                raise ZooError(f"Choose {LEAST} to {MOST} normal images first.")
            server.took(request, *paths)
            names = server.engine.names()
            job = Tuning(paths, server.chosen(parent), wanted, server.engine.training_device, bases=names)
            with server.job(request, job):
                for progress in job.run():
                    yield _card(progress.stage == "done", progress.share, progress.line), *buttons
            server.engine.add(job.summary.name)
        except Exception as error:  # told in the page, and the server lives on
            yield server.alert(error), *buttons
        yield gr.skip(), gr.Button(interactive=True), gr.Button(interactive=False)

    done = start.click(
        tune,
        [files, base, name],
        [outcome, start, stop],
        show_progress="hidden",
        api_visibility="private",
        concurrency_limit=WAITING,
        concurrency_id="finetune",
    )
    files.change(took, files, outcome, show_progress="hidden", api_visibility="private", queue=False)
    stop.click(server.cancel, None, None, api_visibility="private", queue=False)
    return [base], done


def _card(is_done: bool, share: float, line: str) -> str:
    if is_done:
        return f'<div class="done" role="status"><p>{html.escape(line)}</p></div>'
    bar = f'<progress max="1" value="{share:.3f}" aria-label="Progress of the fine-tuning"></progress>'
    return f'<div class="waiting" role="status">{bar}<p>{html.escape(line)}</p></div>'
