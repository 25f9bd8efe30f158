"""The page: a head, five tabs, and what is said while the first model is made."""

import html
from importlib.resources import files

import gradio as gr

from zoo.demo import about_tab, api, batch_tab, compare_tab, finetune_tab, inspect_tab
from zoo.demo.server import Server

TITLE = "zoo: SEM inspection"
AT_ONCE = {"cpu": 4, "cuda": 8}  # images in work; further visitors wait in the queue, and are told their place
WAITING = 200  # visitors in the queue; further ones are asked to come again
SECOND = "second-model"  # which differs from the first, where there are two
NONE_YET = "No model here states a false-alarm rate yet, so first ones are being made, of built-in images."
HEAD = """<header class="head"><h1>{icon}zoo</h1>
<p>Finds what is unusual in SEM images of semiconductors, and says how unusual it is.</p></header>
<p class="said" role="status"></p>"""


def build(server: Server) -> gr.Blocks:
    """The page with its endpoints; nothing in it is fetched from elsewhere."""
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(HEAD.format(icon=text_of("icon.svg")))
        waiting = gr.HTML(visible=False)
        tick = gr.Timer(1, active=False)
        with gr.Tabs(overflow_behavior="wrap"):
            choosers = [*inspect_tab.build(server), *compare_tab.build(server), *batch_tab.build(server)]
            bases, tuned = finetune_tab.build(server)
            choosers += [*bases, *about_tab.build(server)]
        api.build(server)

        def offer(*chosen: str | None) -> list[gr.Dropdown]:
            """The models as they are now; what is chosen stays so, as long as it is there."""
            choices = server.choices()
            names = [name for _, name in choices]
            usual = server.preferred(names)
            others = [name for name in names if name != usual]
            other = server.preferred(others) or usual
            found = []
            for chooser, value in zip(choosers, chosen, strict=True):
                first = other if chooser.elem_id == SECOND else usual
                kept = value if value in names and (chooser.elem_id != SECOND or value != usual) else first
                found.append(gr.Dropdown(choices=choices, value=kept))
            return found

        def look(*chosen: str | None) -> list:
            """The progress of the first models, and the models that can be chosen."""
            return [*_progress(server), *offer(*chosen)]

        quietly = {"show_progress": "hidden", "api_visibility": "private", "queue": False}
        page.load(look, choosers, [waiting, tick, *choosers], **quietly)
        tick.tick(look, choosers, [waiting, tick, *choosers], **quietly)
        if tuned is not None:  # there may be a new model to choose
            tuned.then(offer, choosers, choosers, **quietly)
        page.unload(server.left)
    page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE.get(server.engine.device.type, 4))
    return page


def _progress(server: Server) -> list:
    """The line about the first models, and whether to look again."""
    first = server.first
    if first is None or first.error is None and not first.is_alive():
        return [gr.HTML(visible=False), gr.Timer(active=False)]
    if first.error is not None:
        return [gr.HTML(server.alert(first.error), visible=True), gr.Timer(active=False)]
    share, words = first.progress()
    bar = f'<progress max="1" value="{share:.3f}" aria-label="Progress of the first models"></progress>'
    ready = any(map(server.is_calibrated, server.engine.names()))
    text = "The first model is ready. A second one is on its way." if ready else NONE_YET
    told = f'<div class="waiting" role="status"><p><strong>{text}</strong></p>{bar}<p>{html.escape(words)}</p></div>'
    return [gr.HTML(told, visible=True), gr.Timer(active=True)]


def text_of(name: str) -> str:
    """A file beside this module."""
    return (files("zoo.demo") / name).read_text(encoding="utf-8")
