"""zoo: a PyTorch Lightning model zoo for visual anomaly detection in semiconductor SEM images."""

import importlib

_FACE = {
    "AnomalyModule": "zoo.module",
    "Batch": "zoo.module",
    "Scores": "zoo.module",
    "Prediction": "zoo.module",
    "AnomalyDataModule": "zoo.data.datamodule",
    "load_data": "zoo.data",
    "create_model": "zoo.methods",
    "list_methods": "zoo.methods",
    "list_models": "zoo.hub",
    "from_pretrained": "zoo.hub",
    "ZooError": "zoo.errors",
}
__all__ = list(_FACE)


def __getattr__(name: str) -> object:
    """Import on first use: `import zoo` alone loads no torch."""
    if name not in _FACE:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    return getattr(importlib.import_module(_FACE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
