"""What the demo is started with; neither torch nor gradio is needed to say it."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Settings:
    """Which models are shown, to whom, and where.

    Attributes:
        names: models of the local registry by name, folders of models by absolute path.
        hub: repositories on the hub, `ORG/NAME` or `ORG/NAME@REVISION`, that are not fetched yet. Neither names nor
            repositories: all models of the local registry, as it is at the time.
        host: address that is listened on.
        port: of it; it was free a moment ago.
        user, password: who may see the page; None: whoever reaches it.
        open_browser: show the page in this machine's browser.
        show_training: whether patches of a model's training images are shown beside what it found.
        finetune: whether visitors may train models, which are kept in the local registry.
        device: auto, cpu, cuda or cuda:N.
    """

    names: list[str] = field(default_factory=list)
    hub: list[str] = field(default_factory=list)
    host: str = "127.0.0.1"
    port: int = 7860
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    open_browser: bool = False
    show_training: bool = True
    finetune: bool = True
    device: str = "auto"
