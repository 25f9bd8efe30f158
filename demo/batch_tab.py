"""Many images at once: the most suspicious first, with a table and files to keep."""

import html
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr

from zoo.demo.batch import MOST, Result, inspect_batch
from zoo.demo.inspect_tab import KINDS
from zoo.demo.server import Server
from zoo.errors import ZooError

EMPTY = f"""<div class="empty"><p><strong>Choose up to {MOST} images.</strong></p>
<p>They are listed with the most suspicious first; the report can be kept and passed on.</p></div>"""
COLUMNS = ("image", "verdict", "p-value", "score", "regions")


def build(server: Server) -> list[gr.Dropdown]:
    """The tab; its chooser of a model."""
    with gr.Tab("Batch", id="batch"):
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=280):
                model = gr.Dropdown(label="Model", elem_id="batch-model", interactive=True)
                files = gr.File(
                    label="Images", file_count="multiple", file_types=KINDS, elem_id="batch-images", height=240
                )
                with gr.Row():
                    start = gr.Button("Inspect all", variant="primary", elem_id="batch-button")
                    stop = gr.Button("Cancel", elem_id="batch-cancel", interactive=False)
                kept = gr.File(
                    label="Report (HTML), table (CSV), all (ZIP)",
                    visible=False,
                    interactive=False,
                    elem_id="batch-files",
                )
            with gr.Column(scale=3, min_width=320):
                told = gr.HTML(EMPTY, elem_id="batch-told")
                gallery = gr.Gallery(
                    visible=False, columns=4, show_label=False, elem_id="batch-gallery", format="png", height="auto"
                )
                table = gr.Dataframe(
                    headers=list(COLUMNS),
                    datatype=["str", "str", "number", "number", "number"],
                    column_widths=["28%", "36%", "12%", "12%", "12%"],
                    visible=False,
                    interactive=False,
                    wrap=True,
                    elem_id="batch-table",
                )
    outputs = [told, gallery, table, kept, start, stop]

    def inspect_all(paths: list[str] | None, name: str | None, request: gr.Request) -> Iterator[list]:
        hidden = [gr.Gallery(visible=False), gr.Dataframe(visible=False), gr.File(visible=False)]
        busy, idle = _buttons(True), _buttons(False)
        try:
            if not paths:
                raise ZooError("Choose images first.")
            server.took(request, *paths)
            with tempfile.TemporaryDirectory(dir=server.uploads.work) as out:
                for found in inspect_batch(server.engine, server.chosen(name), list(map(Path, paths)), Path(out)):
                    if isinstance(found, tuple):
                        yield [_progress(*found), *hidden, *busy]
                        continue
                    lines = "".join(f"<p>{html.escape(line)}</p>" for line in found.lines)
                    found = _placed(found, server.uploads.folder / secrets.token_hex(16))
                    server.took(request, *found.files.values(), *(path for path, _ in found.thumbnails))
                    yield [
                        f'<div class="done" role="status">{lines}</div>',
                        gr.Gallery(found.thumbnails, visible=True),
                        gr.Dataframe([_cells(row) for row in found.rows], visible=True),
                        gr.File([str(found.files[kind]) for kind in ("html", "csv", "zip")], visible=True),
                        *idle,
                    ]
        except Exception as error:  # told in the page, and the server lives on
            yield [server.alert(error), *hidden, *idle]

    running = start.click(
        inspect_all,
        [files, model],
        outputs,
        show_progress="full",
        show_progress_on=told,
        api_visibility="private",
        concurrency_limit=2,
        concurrency_id="batches",
    )

    def took(paths: list[str] | None, request: gr.Request) -> None:
        server.took(request, *(paths or ()))

    files.change(took, files, None, api_visibility="private", queue=False)
    ended = {"cancels": [running], "api_visibility": "private", "queue": False}
    stop.click(lambda: [EMPTY, *_buttons(False)], None, [told, start, stop], **ended)
    return [model]


def _buttons(is_busy: bool) -> list[gr.Button]:
    """That which starts and that which cancels."""
    return [gr.Button(interactive=not is_busy), gr.Button(interactive=is_busy)]


def _placed(found: Result, folder: Path) -> Result:
    """The result with what the page shows in a folder of its own, from which it is served; heatmaps are in the ZIP."""
    folder.mkdir()
    files = {kind: Path(shutil.move(path, folder / path.name)) for kind, path in found.files.items()}
    numbered = ((folder / f"{number}.jpg", *one) for number, one in enumerate(found.thumbnails))
    thumbnails = [(Path(shutil.move(path, place)), caption) for place, path, caption in numbered]
    return replace(found, files=files, thumbnails=thumbnails)


def _progress(share: float, words: str) -> str:
    bar = f'<progress max="1" value="{share:.3f}" aria-label="Progress of the batch"></progress>'
    return f'<div class="waiting" role="status">{bar}<p>{html.escape(words)}</p></div>'


def _cells(row: dict) -> list:
    p_value = None if row["p_value"] is None else float(f"{row['p_value']:.3g}")
    return [row["image"], row["verdict"], p_value, float(f"{row['score']:.6g}"), row["num_regions"]]
