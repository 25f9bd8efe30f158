"""Real images, where they are at hand: circuit boards beside the checkout, solar cells from an optional package."""

from pathlib import Path

import pytest

from zoo.cli import main
from zoo.hub import from_pretrained

BOARDS = Path(__file__).parents[2] / "shared" / "data" / "deeppcb_small"


@pytest.mark.skipif(not BOARDS.is_dir(), reason="the circuit boards are not here")
@pytest.mark.parametrize("method", [pytest.param("padim", marks=pytest.mark.slow), "patchcore"])
def test_circuit_boards_from_fit_to_predict(method, tmp_path, capsys):
    size = ["--bank-size", "1000"] if method == "patchcore" else ["--dims", "50"]
    assert main(["fit", method, "--preset", "lite", "--data", str(BOARDS), "--name", "pcb", *size]) == 0
    assert main(["evaluate", "pcb", "--data", str(BOARDS)]) == 0
    image = next((BOARDS / "test/defect").iterdir())
    assert main(["predict", "pcb", str(image), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/heatmaps" / f"{image.stem}.png").is_file()
    assert "PRO" in capsys.readouterr().out and from_pretrained("pcb").predict(image).map.shape == (640, 640)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["padim", "patchcore"])
def test_solar_cells_beat_the_best_plain_number(method, tmp_path):
    pytest.importorskip("elpv_dataset")
    from bench.real_images import plain_numbers, write_elpv

    from zoo.evaluation import evaluate
    from zoo.fit import fit

    root = write_elpv(tmp_path / "elpv")
    model, record = fit(method, str(root), preset="lite")
    found = evaluate(model, str(root), record)["metrics"]["image_auroc"]
    assert found >= max(plain_numbers(root).values()) + 0.10
