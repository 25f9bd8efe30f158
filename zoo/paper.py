"""Figures of the paper on MIIC, as printed, and what is known of how they came about.

Barusco et al., "Evaluating Modern Visual Anomaly Detection Approaches in Semiconductor Manufacturing" (arXiv
2505.07576), Table 3, in percent. They are the paper's, never the zoo's, and are shown beside ours only where the data
set is MIIC itself.
"""

from typing import Any

from zoo.naming import METRICS

DATA_NAME = "miic"  # of the data set in a record; a replica of its layout has another one
SOURCE = "paper (arXiv 2505.07576)"
COPIED = "Huang et al. (ICIP 2021), as copied by the paper"

_LEVELS = tuple(METRICS)  # image ROC, F1, PR; pixel ROC, F1, PR; PRO
_PRINTED = {
    "padim": (84.89, 47.55, 47.29, 99.05, 22.98, 13.86, 95.30),
    "patchcore": (93.33, 75.51, 78.22, 98.64, 57.67, 44.88, 93.03),
    "cfa": (99.01, 87.96, 94.28, 99.96, 75.66, 78.91, 99.04),
    "stfpm": (96.32, 77.83, 83.31, 99.97, 77.30, 80.77, 99.18),
    "rd4ad": (93.93, 68.48, 72.28, 99.85, 56.94, 54.92, 98.45),
    "fastflow": (97.63, 78.70, 86.17, 99.60, 53.02, 46.03, 99.57),
    "supersimplenet": (96.23, 80.72, 86.65, 98.46, 50.57, 43.84, 97.59),
    "ganomaly": (93.34, 74.64),
    "fanogan": (56.38, 31.65),
    "iad_inpainting": (99.27, 91.23),
}
TABLE3: dict[str, dict[str, float]] = {
    method: dict(zip(_LEVELS, values, strict=False)) for method, values in _PRINTED.items()
}
STARRED = frozenset({"ganomaly", "fanogan", "iad_inpainting"})  # marked * in Table 3

ABOUT = (
    "How the paper's figures came about is known in part only. It says: training on 23,888 normal images, 224 x 224, "
    "half of the test set as a validation set for saving the best model. It does not say whether that half is "
    "stratified, by which seed, whether Table 3 is on the whole test set or on the other half, nor how long the "
    "methods were trained; its 1,274 normal test images are two more than the data set has, probably a misprint for "
    "1,272. Its F1 is the maximum over all thresholds on the evaluated images, an upper bound, as is ours under the "
    "same name. Which code made Table 3 is not confirmed. In the authors' public library, as it was a week before the "
    "paper, there is no such split, each metric keeps its own best epoch on the images that it is reported on, PRO is "
    "taken at 200 thresholds with both axes stretched (our PRO dfr200, not our PRO), masks are resized and then "
    "truncated to whole numbers, so that they shrink, the ImageNet normalisation of its MIIC loader is off by "
    "default, and several methods differ from their originals (RD4AD on a ResNet18, STFPM learning from one layer, "
    "PatchCore's map rescaled by batch). Of PatchCore the paper says that it saw a random half of the training "
    "images, and not how much of them its coreset kept. These are possible explanations and no more. The paper's PRO "
    "stands in the column of that name because it is called so; its recipe is not stated. Rows marked * are copied by "
    "the paper from Huang et al. (ICIP 2021), whose threshold for F1 is not known; RIAD has no row. A difference from "
    "ours is therefore no finding about a method by itself."
)

NO_FINDING = "A difference from ours is therefore no finding about a method by itself."


def figures(data_name: str, method: str) -> dict[str, Any] | None:
    """What the paper prints for a method: `source`, and `metrics` as shares of 1; None on other data, or for no row."""
    if data_name != DATA_NAME or method not in TABLE3:
        return None
    metrics = {key: round(value / 100, 6) for key, value in TABLE3[method].items()}
    return {"source": COPIED if method in STARRED else SOURCE, "metrics": metrics}


def caveat(method: str) -> str:
    """What a card says of the figures of a method that has a row."""
    if method in STARRED:
        return (
            "The figures in the column of Huang et al. (ICIP 2021) are theirs, as the paper copies them (arXiv "
            "2505.07576, Table 3), not the zoo's. Their input size, training and threshold for F1 are not known. "
            f"{NO_FINDING}"
        )
    seen, unsaid = "23,888 normal images", ""
    if method == "patchcore":
        seen = "a random half of its 23,888 normal training images"
        unsaid = "how much of them the coreset kept, "
    return (
        "The figures in the paper's column are the paper's (arXiv 2505.07576, Table 3), not the zoo's. The paper says "
        f"that this method was trained on {seen}, at 224 x 224, and that the best model was chosen on half of the test "
        f"set. It does not say {unsaid}whether its figures are of the whole test set or of the other half, by which "
        "seed, and after how much training, and which code made them is not confirmed. Its F1 is the maximum over all "
        f"thresholds, as ours is; its recipe for PRO is not stated. {NO_FINDING}"
    )
