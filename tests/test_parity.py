"""The parity command, on a folder that is laid out as MVTec AD is."""

import json

from parity import mvtec as parity


def test_figures_of_each_class_beside_the_published_ones(mvtec, tmp_path, capsys):
    root = tmp_path / "mvtec"
    root.mkdir()
    for name in ("bottle", "carpet"):
        (root / name).symlink_to(mvtec)
    (root / "empty" / "train" / "good").mkdir(parents=True)
    options = ["--methods", "patchcore", "stfpm", "--preset", "lite", "--input-size", "64", "--max-steps", "2"]
    command = [str(root), *options, "--out", str(tmp_path / "parity.json")]
    parity.main([*command, "--classes", "bottle"])
    capsys.readouterr()
    parity.main(command)
    said = capsys.readouterr().out
    assert "on bottle" not in said  # done before
    assert said.count("left out: ") == 2 and "empty" in said
    figures = json.loads((tmp_path / "parity.json").read_text())["figures"]
    assert [sorted(figures[method]) for method in ("patchcore", "stfpm")] == [["bottle", "carpet"]] * 2
    assert figures["patchcore"]["bottle"] == figures["patchcore"]["carpet"]
    (line,) = [line for line in said.splitlines() if line.startswith("patchcore ") and "|" in line]
    published, ours = line.split("|")[1].split()
    assert published == "99.2" and float(ours) == round(figures["patchcore"]["bottle"]["image_auroc"], 2)
    assert "ok" not in line and "LOW" not in line  # the published mean is over 15 classes
