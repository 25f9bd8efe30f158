"""The page: a head, five tabs, and what is said while the first model is made."""

import html
from importlib.resources import files

import gradio as gr

from zoo.demo import about_tab, api, batch_tab, compare_tab, finetune_tab, inspect_tab
from zoo.demo.server import Server

TITLE = "zoo: SEM inspection"
AT_ONCE = {
    "cpu": 4,
    "cuda": 8,
}  # images in work at a time; further visitors wait in the queue, and are told their place
WAITING = 200  # visitors in the queue; further ones are asked to come again
MINUTES = 15  # that a file is kept at most while the page is open
HEAD = """<header class="head"><h1>zoo</h1>
<p>Finds what is unusual in SEM images of semiconductors, and says how unusual it is.</p></header>"""


def build(server: Server) -> gr.Blocks:
    """The page with its endpoints; nothing in it is fetched from elsewhere."""
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(60, 60 * MINUTES)) as page:
        gr.HTML(HEAD)
        waiting = gr.HTML(visible=False)
        tick = gr.Timer(1, active=False)
        with gr.Tabs():
            choosers = [*inspect_tab.build(server), *compare_tab.build(server), *batch_tab.build(server)]
            bases, tuned = finetune_tab.build(server)
            choosers += [*bases, *about_tab.build(server)]
        api.build(server)

        def arrive() -> list:
            """The models as they are now, and the progress of the first one."""
            choices = server.choices()
            names = [name for _, name in choices]
            value = server.preferred(names)
            second = next((name for name in names if name != value), value)
            values = [second if chooser.elem_id == "second-model" else value for chooser in choosers]
            return [*_progress(server), *(gr.Dropdown(choices=choices, value=chosen) for chosen in values)]

        def look_again() -> list:
            """The progress; the models once there is one."""
            told = _progress(server)
            on_its_way = server.first is not None and server.first.is_alive()
            return [*told, *([gr.skip()] * len(choosers) if on_its_way else arrive()[2:])]

        page.load(
            arrive, None, [waiting, tick, *choosers], show_progress="hidden", api_visibility="private", queue=False
        )
        tick.tick(
            look_again, None, [waiting, tick, *choosers], show_progress="hidden", api_visibility="private", queue=False
        )
        if tuned is not None:  # there may be a new model to choose
            tuned.then(
                lambda: arrive()[2:], None, choosers, show_progress="hidden", api_visibility="private", queue=False
            )
        page.unload(server.left)
    page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE.get(server.engine.device.type, 4))
    return page


def _progress(server: Server) -> list:
    """The line about the first model, and whether to look again."""
    first = server.first
    if first is None or first.error is None and not first.is_alive():
        return [gr.HTML(visible=False), gr.Timer(active=False)]
    if first.error is not None:
        return [gr.HTML(server.alert(first.error), visible=True), gr.Timer(active=False)]
    share, words = first.progress()
    bar = f'<progress max="1" value="{share:.3f}" aria-label="Progress of the first model"></progress>'
    text = "There is no model yet, so a first one is being made on this machine."
    told = f'<div class="waiting" role="status"><p><strong>{text}</strong></p>{bar}<p>{html.escape(words)}</p></div>'
    return [gr.HTML(told, visible=True), gr.Timer(active=True)]


def text_of(name: str) -> str:
    """A file beside this module."""
    return (files("zoo.demo") / name).read_text(encoding="utf-8")
