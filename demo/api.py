"""The endpoints for programs, by name; `GET /gradio_api/info` describes them."""

from typing import Any

import gradio as gr
import numpy as np

from zoo import plots
from zoo.demo.server import Server
from zoo.demo.viewer import figures
from zoo.errors import ZooError


def build(server: Server) -> None:
    """`/predict` and `/models`."""

    def models() -> list[dict[str, Any]]:
        """The models that can be asked, each with a line about it; the first one answers where none is named."""
        choices = server.choices()
        names = [name for _, name in choices]
        first = server.preferred(names)
        return sorted(({"name": name, "about": label} for label, name in choices), key=lambda one: one["name"] != first)

    def predict(
        image: str | None, model: str | None, false_alarm_rate: float | None
    ) -> tuple[dict[str, Any], str, str | None]:
        """Score one image: its figures, the heatmap over it and the mask of its regions.

        An empty model is the first one, a rate of 0 the one that the model states.
        """
        try:
            if image is None:
                raise gr.Error("Give an image: a file, by handle_file.", print_exception=False)
            look = server.look(image, model, with_evidence=False)
            answer = look.at(_rate(false_alarm_rate))
            known = look.model.calibration
            shown = plots.overlay(look.model.view.shown(look.brought.array), look.prediction.map, known)
            mask = answer.mask
            drawn = None if mask is None else server.picture("mask", mask.astype(np.uint8) * 255)
            return figures(look, answer), server.picture("heatmap", shown), drawn
        except gr.Error:
            raise
        except Exception as error:
            told = server.told(error).replace("--false-alarm-rate", "false_alarm_rate")
            raise gr.Error(told, print_exception=False) from error

    with gr.Row(visible=False):
        asked = [
            gr.File(label="image"),
            gr.Textbox(label="model", value=""),
            gr.Number(label="false_alarm_rate", value=0),
        ]
        answer = [
            gr.JSON(label="result"),
            gr.Image(label="heatmap", format="png"),
            gr.Image(label="mask", format="png"),
        ]
        gr.Button("predict").click(predict, asked, answer, api_name="predict", concurrency_id="looks")
    gr.api(models, api_name="models", queue=False)


def _rate(value: float | None) -> float | None:
    """A rate as it was asked for; None: the stated one.

    Raises:
        ZooError: it is none.
    """
    if value and not (isinstance(value, float | int) and 0 < value < 1):  # gradio lets texts through
        raise ZooError(f"false_alarm_rate is a share between 0 and 1, such as 0.01 for 1 %, not {str(value)[:20]}.")
    return value or None
