"""From settings to a running page."""

import ctypes
import json
import logging
import threading
from contextlib import suppress
from importlib.resources import files
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from zoo import hub
from zoo.demo import page, strangers
from zoo.demo.engine import Engine
from zoo.demo.examples import write_examples
from zoo.demo.first import PLANS, FirstModels
from zoo.demo.server import Server
from zoo.demo.settings import Settings
from zoo.demo.uploads import MAX_BYTES, Uploads
from zoo.demo.viewer import colour_tables
from zoo.errors import ZooError

FONT = ("system-ui", "Segoe UI", "Roboto", "Helvetica", "Arial", "sans-serif")  # of the visitor's machine
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "monospace")
M_ARENA_MAX = -8  # of glibc's mallopt
SWEEP = 10  # seconds between two looks for files that are old, and for memory that is free
# Whatever a card of a stranger's model may hold, nothing is fetched from elsewhere and nothing is sent there.
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; form-action 'self'; base-uri 'self'"
FULL = "The server has no more room for files; try again in a quarter of an hour."


def run(settings: Settings, uploads: Uploads) -> None:
    """Serve the page until it is interrupted; see `zoo.demo.app.serve`."""
    _share_arenas()
    server = make_server(settings, uploads)
    launch(page.build(server), server)


def make_server(settings: Settings, uploads: Uploads) -> Server:
    """The models that are asked for, or all of the local registry; first ones are made where none states a rate.

    Raises:
        ZooError: none of the models that are named can be had.
    """
    named = [*settings.names, *settings.hub]
    engine = Engine(named or None, settings.device)
    server = Server(settings, engine, uploads, write_examples(uploads.work / "examples"))
    if named:
        _look_for(engine)
        return server
    names = engine.names()
    missing = [plan for plan in PLANS if plan.name not in names]
    interrupted = missing and set(names) <= {plan.name for plan in PLANS}  # in the middle of the first models
    if interrupted or not any(map(server.is_calibrated, names)):
        plans = missing if interrupted else PLANS
        server.first = FirstModels(engine.add, engine.training_device, lambda line: print(line, flush=True), plans)
    return server


def launch(blocks: gr.Blocks, server: Server) -> None:
    """Serve until an interrupt.

    Raises:
        ZooError: the address can't be taken.
    """
    logging.getLogger("httpx").setLevel(logging.WARNING)
    strangers.shut()
    settings = server.settings
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
            app_kwargs={"middleware": [Middleware(Room, uploads=server.uploads)]},
            favicon_path=str(files("zoo.demo") / "icon.svg"),
            theme=gr.themes.Default(primary_hue="sky", neutral_hue="slate", font=FONT, font_mono=MONO),
            css=page.text_of("page.css"),
            head=f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">{script}',
        )
        print(f"The demo is at {url} (Ctrl-C ends it).", flush=True)
        if server.first:
            print("Models of built-in images are made while the page is there.", flush=True)
            server.first.start()
        while not threading.Event().wait(SWEEP):
            server.sweep()
            _trim_memory()
    except OSError as error:
        place = f"{settings.host}:{settings.port}"
        raise ZooError(f"The page can't be served at {place} ({error}); give another --port.") from error
    finally:
        blocks.close(verbose=False)


class Room:
    """Refuses uploads where the visitors' files take too much of the disk already (ASGI middleware)."""

    def __init__(self, app: Any, uploads: Uploads):
        self.app, self.uploads = app, uploads

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        is_upload = scope["type"] == "http" and scope["path"].endswith("/upload")
        if is_upload and self.uploads.is_full():
            await PlainTextResponse(FULL, status_code=507)(scope, receive, send)
        else:
            await self.app(scope, receive, send)


def _share_arenas() -> None:
    """Let all threads take memory from two heaps: glibc has up to eight for each core, and all of them fill up."""
    with suppress(AttributeError, OSError, TypeError):  # there is no glibc elsewhere
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 2)


def _trim_memory() -> None:
    """Give free memory back to the system."""
    with suppress(AttributeError, OSError, TypeError):  # there is no glibc elsewhere
        ctypes.CDLL(None).malloc_trim(0)


def _look_for(engine: Engine) -> None:
    """Fetch the models that are named, and load the first; those that can't be had are told of and left out."""
    for name in engine.names():
        try:
            hub.find_model(engine.source(name))
        except ZooError as error:
            print(f"Left out: {error}", flush=True)
            reason = error
            engine.drop(name)
    for name in engine.names():
        try:
            engine.model(name)
            return
        except ZooError as error:
            print(f"Left out: {error}", flush=True)
            reason = error
            engine.drop(name)
    raise reason
