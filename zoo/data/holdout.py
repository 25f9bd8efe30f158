"""How many normal images a fit holds out for its thresholds."""

from zoo.errors import ZooError

SHARE, LEAST = 0.1, 20


def held_out(normals: int, wanted: int | None = None) -> int:
    """As many as are wanted; else at least 20 or a tenth of the normals, but never more than a half.

    A fit of few images needs them more than its thresholds do.

    Raises:
        ZooError: so many that none is left to fit on.
    """
    if wanted is None:
        return min(max(LEAST, round(SHARE * normals)), normals // 2)
    if wanted < 0:
        raise ZooError(f"--hold-out is at least 0 images, not {wanted}.")
    if wanted >= normals:
        raise ZooError(f"--hold-out {wanted} leaves nothing of {normals:,} normal images to fit on; hold fewer out.")
    return wanted
