"""From settings to a running page."""

import json
import logging
import threading
from importlib.resources import files

import gradio as gr

from zoo import hub
from zoo.demo import page, strangers
from zoo.demo.engine import Engine
from zoo.demo.examples import write_examples
from zoo.demo.first import FirstModels
from zoo.demo.server import Server
from zoo.demo.settings import Settings
from zoo.demo.uploads import MAX_BYTES, Uploads
from zoo.demo.viewer import colour_tables

FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")  # of the visitor's machine
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")


def run(settings: Settings, uploads: Uploads) -> None:
    """Serve the page until a signal ends it; see `zoo.demo.app.serve`."""
    server = make_server(settings, uploads)
    launch(page.build(server), settings, uploads)


def make_server(settings: Settings, uploads: Uploads) -> Server:
    """The models that are asked for, or all of the local registry; first ones are made where none states a rate."""
    named = [*settings.names, *settings.hub]
    engine = Engine(named or None, settings.device)
    server = Server(settings, engine, uploads, write_examples(uploads.work / "examples"))
    if named:
        for name in engine.names():
            hub.find_model(engine.source(name))  # what can't be had is told before the page is there
        engine.model(engine.names()[0])
    elif not any(map(server.is_calibrated, engine.names())):
        server.first = FirstModels(engine.add, engine.training_device, lambda line: print(line, flush=True))
        print("No model here states a false-alarm rate yet, so first ones are made while the page is already there.")
        server.first.start()
    return server


def launch(blocks: gr.Blocks, settings: Settings, uploads: Uploads) -> None:
    """Serve until an interrupt."""
    logging.getLogger("httpx").setLevel(logging.WARNING)
    strangers.shut()
    script = f"<script>const COLOURS = {json.dumps(colour_tables())};\n{page.text_of('page.js')}</script>"
    try:
        _, url, _ = blocks.launch(
            server_name=settings.host,
            server_port=settings.port,
            auth=(settings.user, settings.password) if settings.user else None,
            inbrowser=settings.open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            run_history=False,
            footer_links=[],
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            enable_monitoring=False,
            show_error=True,
            max_file_size=MAX_BYTES,
            allowed_paths=[],
            favicon_path=str(files("zoo.demo") / "icon.svg"),
            theme=gr.themes.Default(primary_hue="sky", neutral_hue="slate", font=FONT, font_mono=MONO),
            css=page.text_of("page.css"),
            head=script,
        )
        print(f"The demo is at {url} (Ctrl-C ends it).", flush=True)
        threading.Event().wait()
    finally:
        blocks.close(verbose=False)
