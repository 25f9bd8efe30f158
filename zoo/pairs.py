"""Pairs of an abnormal image and its clean version, told by their names."""

from pathlib import Path

from zoo.image import EXTENSIONS


def abnormal_and_clean(folder: Path) -> list[tuple[Path, Path]]:
    """Images of a folder that have "abnormal" in their names, each with that of the same name with "normal" instead.

    Returns:
        (abnormal, clean), sorted by name; images without a partner are left out.
    """
    files = {path.name: path for path in sorted(folder.glob("*")) if path.suffix.lower() in EXTENSIONS}
    clean = {name: name.replace("abnormal", "normal") for name in files if "abnormal" in name}
    return [(files[abnormal], files[normal]) for abnormal, normal in clean.items() if normal in files]
